"""One check of everything that only a GPU can show: `python -m benchmarks.gpu`; see `__main__`."""
