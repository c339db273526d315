"""The golden cases of U-ViT, HDiT and MM-DiT, and of ELIT around them, as their folder describes them."""

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[1] / "golden_backbones"


@functools.cache
def _weights_module() -> Any:
    spec = importlib.util.spec_from_file_location("golden_backbones_weights", FOLDER / "weights.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _file(tag: str, suffix: str) -> Path:
    return FOLDER / f"{'golden' if suffix == 'npz' else 'shapes'}{'_elit' if tag.startswith('elit_') else ''}.{suffix}"


def case(tag: str) -> dict[str, Any]:
    """What shapes.json says of a case: `kw`, `params`, …; of an ELIT case `of`, `options` and `budgets`."""
    return json.loads(_file(tag, "json").read_text())[tag]


def weights(tag: str) -> dict[str, Tensor]:
    """The weights of a case by published names, those of an ELIT case by ours."""
    return _weights_module().state_dict(case(tag)["params"])


def arrays(tag: str) -> dict[str, Tensor]:
    """Inputs and outputs of a case, without the tag in their names."""
    with np.load(_file(tag, "npz")) as found:
        names = [name for name in found if name.startswith(f"{tag}_")]
        others = [other for other in json.loads(_file(tag, "json").read_text()) if other.startswith(f"{tag}_")]
        own = [name for name in names if not any(name.startswith(f"{other}_") for other in others)]
        return {name.removeprefix(f"{tag}_"): torch.from_numpy(found[name]) for name in own}
