"""The golden cases of U-ViT, HDiT and MM-DiT, and of ELIT around them, as their folder describes them."""

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numerics import randomize
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


def hdit_arguments(tag: str) -> dict[str, Any]:
    """`HDiT`'s arguments of a golden case."""
    kw = case(tag)["kw"]
    levels = kw["levels"]
    kinds = [
        (a["type"], *(a[k] for k in ("kernel_size", "window_size") if k in a)) for a in (level["attn"] for level in levels)
    ]
    return {
        "input_size": tuple(arrays(tag)["x"].shape[2:]),
        "patch_size": kw["patch_size"][0],
        "in_channels": kw["in_channels"],
        "depths": [level["depth"] for level in levels],
        "widths": [level["width"] for level in levels],
        "attentions": kinds,
        "head_width": levels[0]["attn"]["d_head"],
        "mapping_depth": kw["mapping"][0],
        "mapping_width": kw["mapping"][1],
        "num_classes": kw["num_classes"] - 1 if kw["num_classes"] else None,
    }


def mmdit_arguments(tag: str) -> dict[str, Any]:
    """`MMDiT`'s arguments of a golden case."""
    kw, params, data = case(tag)["kw"], case(tag)["params"], arrays(tag)
    stability = "adm_in_channels" in kw
    arguments = {
        "input_size": tuple(data["x"].shape[2:]),
        "patch_size": kw["patch_size"],
        "in_channels": kw["in_channels"],
        "hidden_size": params["context_embedder.bias"][0],
        "depth": kw["depth"],
        "num_heads": kw["depth"],
        "text_width": params["context_embedder.weight"][1],
        "pos_grid": (12, 12) if stability else (16, 16),
    }
    if stability:
        return arguments | {
            "pooled_width": kw["adm_in_channels"],
            "qk_norm": kw["qk_norm"],
            "dual_attention": tuple(kw.get("x_block_self_attn_layers", ())),
            "pos_scale": 3.0 if "sd35" in tag else 1.0,
            "time_scale": 1000.0,
        }
    return arguments | {k: kw[k] for k in ("encoder_depth", "z_dims", "projector_dim")}


def randomized_hdit(model: Any) -> Any:
    """The model with random weights, temperatures positive."""
    randomize(model)
    with torch.no_grad():
        for block in model.blocks:
            block.self_attn.scale.abs_()
    return model
