"""The command line of a small training run, and what the run leaves."""

import json

import torch
from runs import CLASSES, RESOLUTION

from common import tensor_files


def arguments(data, output_dir, *more, model="ELIT-SiT-Ti/2"):
    options = {
        "model": model,
        "exp-name": "run",
        "output-dir": output_dir,
        "data-dir": data,
        "resolution": RESOLUTION,
        "num-classes": CLASSES,
        "batch-size": 8,
        "max-train-steps": 4,
        "checkpointing-steps": 2,
        "learning-rate": 1e-3,
        "sampling-steps": 0,
        "num-workers": 0,
        "mixed-precision": "no",
        "report-to": "none",
        "log-every": 1,
    }
    elit = {"elit-group-size": 2, "elit-min-mask-prob": 0, "elit-max-mask-prob": 0.75} if "ELIT" in model else {}
    return [str(part) for name, value in (options | elit).items() for part in ("--" + name, value)] + [str(m) for m in more]


def metrics(output_dir, name="loss"):
    lines = (output_dir / "run" / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry[name] for entry in map(json.loads, lines) if name in entry}


def final_state(output_dir, step=4):
    return tensor_files.load(output_dir / "run" / "checkpoints" / f"{step:07d}.pt", verify=True)


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
