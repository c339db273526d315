"""Deterministic weights of the golden cases, by the reference's parameter names: python weights.py TAG OUT.pt"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
SALT = "public-"


def value(name, shape):
    a = np.random.default_rng(zlib.crc32((SALT + name).encode())).standard_normal(shape, dtype=np.float32)
    small = len(shape) < 2 or "pos_embed" in name or "query" in name
    a = a * (0.5 if small else 1.0 / np.sqrt(shape[-1]))
    a = a * (0.3 if "adaLN" in name else 1.0)
    if name.endswith(".scale"):
        a = 1 + 0.2 * a
    a = np.asarray(a, dtype=np.float32)
    if name.endswith("self_attn.scale"):  # HDiT's temperature, initially 10
        a = np.float32(10) * a
    if name.endswith(".norm.linear.weight"):  # HDiT's AdaRMSNorm
        a = np.float32(0.3) * a
    if len(shape) == 1 and name.endswith(("ln_q.weight", "ln_k.weight", "norm1.weight", "norm2.weight", "norm.weight")):
        a = 1 + np.float32(0.2) * a
    return a


def state_dict(params):
    return {name: torch.from_numpy(value(name, tuple(shape))) for name, shape in params.items()}


if __name__ == "__main__":
    file = "shapes_elit.json" if sys.argv[1].startswith("elit_") else "shapes.json"
    torch.save(state_dict(json.loads((HERE / file).read_text())[sys.argv[1]]["params"]), sys.argv[2])
