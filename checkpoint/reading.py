"""Weights from any checkpoint file: ours, safetensors, the published code's, bare state dicts."""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from checkpoint import sharded
from checkpoint.architecture import with_former_defaults
from checkpoint.published import is_k_diffusion, k_diffusion_arguments, read_bare, read_published
from checkpoint.records import (
    TEXT,
    check_format,
    check_state_dict,
    recorded_arguments,
    recorded_config,
    recorded_step,
    recorded_text,
    recorded_vae,
)
from checkpoint.weights import MODEL_OPTIONS, Weights, build_model
from checkpoint.zoo import local_file
from common.errors import UserError
from common.file_facts import known
from common.tensor_files import Checksum, load, load_safetensors


def read_weights(
    path: str | Path,
    weights: str = "ema",
    given: dict[str, Any] | None = None,
    *,
    projectors: bool = False,
    checksum: Checksum | sharded.Checksum | None = None,
) -> Weights:
    """One set of weights (`ema`, `ema:DECAY` or `model`) of a checkpoint file; REPA's `projectors` are left aside unless asked for.

    Formats: ours (a file, or a sharded run's folder), its safetensors form, the published ELIT code's and REPA's, k-diffusion's, a
    folder of `save_pretrained`, and bare state dicts (REPA's `last.pt`, original SiT's, U-ViT's, SD3's, a model's own); a path
    `hf://owner/repo/file` and a name of `zoo.ZOO` are fetched from the hub. `given`: options by hand, for what a bare state dict does not record. `checksum`: the
    file's, where it was read before.
    """
    path = local_file(path)
    if checksum is None and os.environ.get("RANK", "0") == "0":
        checksum = sharded.Checksum(path) if sharded.is_sharded(path) else Checksum(path) if path.is_file() else None
    try:
        found = _read(path, weights, given or {})
        if not projectors:
            found.state_dict = {k: v for k, v in found.state_dict.items() if not k.startswith("projectors.")}
        known(sharded.identity(path), f"finite {weights} {projectors}", lambda: _check_finite(path, found.state_dict))
        _check_sizes(path, found)
    except UserError:
        if checksum is not None:
            checksum.check()  # damage is the better reason
        raise
    found.checksum = checksum
    return found


def _read(path: Path, weights: str, given: dict[str, Any]) -> Weights:
    if path.suffix == ".safetensors":
        return _safetensors(path, weights, given)
    if sharded.is_sharded(path):
        return _ours(path, sharded.read_record(path), weights)
    state = load(path)
    if "format" in state:
        return _ours(path, state, weights)
    if isinstance(state.get("args"), argparse.Namespace):
        return read_published(path, state, weights)
    if is_k_diffusion(state):
        if weights not in ("ema", "model"):
            raise UserError(f"--weights {weights}: not in {path}; it holds model, ema")
        kept = state["model_ema" if weights == "ema" else "model"]
        return read_bare(path, kept, given, k_diffusion_arguments(state.get("config"), path))
    _check_single(path, weights)
    return read_bare(path, state, given)


def load_model(
    path: str | Path, weights: str = "ema", device: str | torch.device = "cpu", **overrides: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint file, in eval mode on `device`, and its recorded configuration.

    Args:
        path: a file of any format that `read_weights` takes, a folder of `save_pretrained`, `hf://owner/repo/file`, or a name of `zoo.ZOO`.
        weights: `ema` (the first decay), `ema:0.999` (a named one) or `model` (the raw weights).
        device: where the model goes.
        overrides: constructor arguments, e.g. `elit_tail="skip"`; and `model`, `resolution`, `num_classes` and `vae`, for what a
            bare state dict does not tell.

    Raises:
        UserError: the file is damaged, carries code, or does not hold such a model.
    """
    found = read_weights(path, weights, overrides)
    options = {k: overrides.pop(k) for k in ("model", "resolution", "num_classes", "vae") if k in overrides}
    for name in options.keys() - {"vae"}:
        value = models.model_spec(options[name]).name if name == "model" else options[name]
        if found.config.setdefault(name, value) != value:
            raise UserError(f"{name} {value} contradicts {path}, which records {found.config[name]}")
    return build_model(found, path, device, **overrides), found.config


def _check_sizes(path: Path, found: Weights) -> None:
    """Refuse numbers of layers and latents for which the file holds no weights, before anything is made of them."""
    largest = max(tensor.numel() for tensor in found.state_dict.values())
    for name in ("elit_read_depth", "elit_write_depth", "stages_count", "elit_group_size"):
        most = math.isqrt(largest) if name == "elit_group_size" else len(found.state_dict)
        if (found.config.get(name) or 0) > most:
            raise UserError(f"{path}: {name}: {found.config[name]} is recorded, but there are no weights for so many")
    for name in ("depth", "depths", "mapping_depth"):
        value = (found.config.get("arguments") or {}).get(name, 0)
        for depth in value if isinstance(value, list) else [value]:
            if type(depth) is not int or depth > len(found.state_dict):
                raise UserError(f"{path}: {name}: {value} is recorded, but there are no weights for so many")


def _check_finite(path: Path, state_dict: dict[str, Tensor]) -> None:
    for name, tensor in state_dict.items():
        if tensor.is_floating_point() and tensor.numel():
            # Four times as fast as isfinite; both ends are NaN where any value is.
            ends = tensor.detach().aminmax()
            if not all(math.isfinite(end.item()) for end in ends):
                raise UserError(f"{path}: {name} has values that are not finite (NaN or infinity): its training diverged")


def _ours(path: Path, state: dict[str, Any], weights: str) -> Weights:
    check_format(state, path)
    kind, _, decay = weights.partition(":")
    if kind == "model" and not decay:
        state_dict = state["model"]
    elif kind == "ema" and state["ema"] and (not decay or decay in state["ema"]):
        decay = decay or next(iter(state["ema"]))
        state_dict = state["ema"][decay]
    else:
        known = ", ".join(["model", "ema", *(f"ema:{d}" for d in state["ema"])])
        raise UserError(f"--weights {weights}: not in {path}; it holds {known}")
    if sharded.is_sharded(path):
        state_dict = sharded.read(path, state_dict, f"ema/{decay}" if decay else "model")
    state_dict = check_state_dict(state_dict, str(path))
    record = recorded_vae(state["vae"], path)
    config = with_former_defaults(recorded_config(state["config"], path), record)
    return _with_text(Weights(state_dict, config, record, recorded_step(state["step"], path)), state.get(TEXT), path)


def _with_text(found: Weights, recorded: Any, path: Path) -> Weights:
    """The weights with the record of their text features, which tells what of the model's size depends on these."""
    found.text = recorded_text(recorded, path)
    if found.text is not None and found.config.get("model"):
        constructor = models.model_spec(found.config["model"]).constructor
        sizes = constructor.text_arguments(found.text.length, found.text.width, found.text.pooled)
        found.config["arguments"] = sizes | (found.config.get("arguments") or {})
    return found


def _safetensors(path: Path, weights: str, given: dict[str, Any]) -> Weights:
    """Weights in a safetensors file: ours where its metadata hold the configuration, else a bare state dict.

    The constructor's arguments that `save_pretrained` writes to a `config.json` beside it are what that does not tell.
    """
    _check_single(path, weights)
    state_dict, metadata = load_safetensors(path)
    if "config" not in metadata:
        beside = path.with_name("config.json")
        try:
            # The mixin leaves out defaults of a constructor's base classes; of these only the tail's is not told by the weights.
            recorded = {"elit_tail": "drop"} | json.loads(beside.read_text()) if beside.is_file() else {}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{beside}: must hold a JSON object") from None
        # Of the norm the weights tell the kind, which the option of this name does not.
        options = {k: v for k, v in recorded.items() if k in MODEL_OPTIONS and k != "qk_norm"}
        arguments = recorded_arguments(recorded, None, beside) | recorded_config(options, beside)
        return read_bare(path, state_dict, given, arguments)
    try:
        config = json.loads(metadata["config"])
        if isinstance(config, dict) and isinstance(config.get("model"), dict):
            return read_bare(path, state_dict, given, k_diffusion_arguments(config, path))
        record, text = json.loads(metadata["vae"]), json.loads(metadata.get(TEXT, "null"))
    except (ValueError, KeyError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: its metadata config and vae must hold JSON") from None
    state_dict, step = check_state_dict(state_dict, str(path)), recorded_step(metadata.get("step", 0), path)
    record = recorded_vae(record, path)
    return _with_text(
        Weights(state_dict, with_former_defaults(recorded_config(config, path), record), record, step), text, path
    )


def _check_single(path: Path, weights: str) -> None:
    if weights not in ("ema", "model"):
        raise UserError(f"--weights {weights}: {path} holds one set of weights")
