"""docs/own_backbone.md: its code runs as it stands, and its commands train the model and draw images at two budgets."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import runs
from runs import make_latents, make_vae

import generate
import models
import train
from common.errors import UserError
from models.backbone import Backbone

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "own_backbone.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder, with data and plain.py in it; whatever is registered there is gone afterwards."""
    monkeypatch.setattr(runs, "SIDE", 16)
    make_latents(tmp_path / "data" / "train", 16, make_vae(tmp_path / "vae"))
    (tmp_path / "plain.py").write_text(blocks("python")[1])
    (tmp_path / "experiments_updated").symlink_to(ROOT / "experiments_updated")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))
    yield tmp_path
    sys.modules.pop("plain", None)


def test_the_interface_alone():
    exec(blocks("python")[0], {})


def test_train_and_generate(workplace):
    importlib.import_module("plain")
    for line in blocks("sh")[0].splitlines():
        python, flag, code, *arguments = shlex.split(line)
        assert (python, flag) == ("python", "-c") and code.startswith("import plain, ")
        script = train if "train" in code else generate
        script.main(arguments + (["--num-classes", "5"] if script is train else []))
    images = list((workplace / "results").rglob("*.png"))
    assert len(images) == 16 and len({p.parent for p in images}) == 2
    assert "[ELIT-]Plain-{Ti}/{2}" in models.known_names() and models.model_spec("ELIT-Plain-Ti/2").elastic


def test_names_of_ones_own(monkeypatch):
    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))
    for name, words in (("plain", "must be named FAMILY-SIZE/PATCH_SIZE"), ("SiT-XL/2", "is registered already")):
        with pytest.raises(UserError, match=words):
            models.register(name, Backbone)
    spec = models.register("My-Own-S/4", Backbone, width=3)
    assert (spec.family, spec.sizes) == ("My-Own", {"width": 3, "patch_size": 4}) and models.model_spec("My-Own-S/4") is spec
