"""Weights from any checkpoint file: ours, safetensors, the published code's, bare state dicts."""

import argparse
import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from checkpoint.published import _PATCH_EMBEDDING, read_bare, read_published
from checkpoint.training_state import FORMAT, step_path
from checkpoint.weights import MODEL_OPTIONS, Weights, build_model
from common.errors import UserError
from common.hub import local_file
from common.tensor_files import Checksum, load, load_safetensors
from config.options import TrainConfig
from config.values import coerce
from models.vae import VAERecord


def load_step(folder: str | Path, step: int) -> dict[str, Any]:
    """The checkpoint of a step, compared with its checksum. Raises as `load`, and where it records another step."""
    path = step_path(folder, step)
    state = load(path, verify=True)
    if type(state.get("step")) is not int or state["step"] != step:
        raise UserError(f"{path}: does not record step {step}")
    return state


def check_training_state(state: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """The parts that a resumed run reads, checked, with the configuration as options and the VAE as a record."""
    _check_format(state, where)
    optimizer = state.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
        raise UserError(f"{where}: holds no training state; it may start a new run with --init-from")
    return state | {
        "model": check_state_dict(state["model"], f"{where}: model"),
        "ema": {d: check_state_dict(v, f"{where}: ema {d}") for d, v in state["ema"].items()},
        "config": recorded_config(state["config"], where),
        "vae": _record(state["vae"], where),
    }


_OPTIONS = {f.name for f in dataclasses.fields(TrainConfig)}


def recorded_config(values: Any, where: str | Path) -> dict[str, Any]:
    """The options among `values`, which a file records: each of its type and in its range. What is no option is left out.

    Raises:
        UserError: names `where` and the key.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: its config is a {type(values).__name__}, not options by name")
    config = {}
    for name in (n for n in values if isinstance(n, str) and n in _OPTIONS):
        if not _is_plain(values[name]):
            raise UserError(f"{where}: {name}: what it records is no option's value")
        config[name] = coerce(TrainConfig, name, values[name], f"{where}: {name}")
    if config.get("model"):
        try:
            models.model_spec(config["model"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return config


def _is_plain(value: Any) -> bool:
    """None, truth, text, a number, or a few of them: of a size that an option may have, and that a message can show."""
    if isinstance(value, (list, tuple)):
        return len(value) <= 1000 and not any(isinstance(part, (list, tuple)) for part in value) and all(map(_is_plain, value))
    if isinstance(value, str):
        return len(value) < 4096
    return value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 2**63)


def check_state_dict(values: Any, where: str) -> dict[str, Tensor]:
    """`values` as a state dict: dense floating-point tensors by name, with all of their data; of one type, else as float32.

    Raises:
        UserError: names `where` and the key.
    """
    if not isinstance(values, dict) or not values:
        raise UserError(f"{where}: holds no tensors by name")
    for name, tensor in values.items():
        if not isinstance(name, str):
            raise UserError(f"{where}: {type(name).__name__} as the name of a tensor")
        if not isinstance(tensor, Tensor):
            raise UserError(f"{where}: {name} is a {type(tensor).__name__}, not a tensor")
        dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not dense or not tensor.is_floating_point():
            raise UserError(f"{where}: {name} is no dense tensor of floating-point numbers")
        if not 0 < tensor.nbytes <= tensor.untyped_storage().nbytes():
            raise UserError(f"{where}: {name} of shape {tuple(tensor.shape)} has not that many numbers in the file")
    kinds = {tensor.dtype for tensor in values.values()}
    if len(kinds) > 1 or not kinds <= {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
        return {name: tensor.float() for name, tensor in values.items()}
    return dict(values)


def _record(values: Any, where: str | Path) -> VAERecord:
    if not isinstance(values, dict) or not all(map(_is_plain, values.values())):
        raise UserError(f"{where}: its vae is no record of a VAE")
    return VAERecord.from_dict(values, str(where))


def _step(value: Any, where: str | Path) -> int:
    if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):
        return int(value)
    if type(value) is not int or not 0 <= value < 2**63:
        raise UserError(f"{where}: its step must be a whole number of at least 0")
    return value


def _check_format(state: dict[str, Any], where: str | Path) -> None:
    """Refuse another version's file, and one that lacks a part or has another thing in its place."""
    number = state.get("format")
    if type(number) is not int or number != FORMAT:
        named = number if type(number) is int and abs(number) < 10**9 else f"of type {type(number).__name__}"
        raise UserError(f"{where}: format {named} is not known; this version reads {FORMAT}")
    missing = [k for k in ("model", "ema", "config", "vae", "step") if k not in state]
    if missing:
        raise UserError(f"{where}: {missing[0]} is missing from the checkpoint")
    if not isinstance(state["ema"], dict) or not all(isinstance(decay, str) for decay in state["ema"]):
        raise UserError(f"{where}: its ema must be state dicts by decay")


def read_weights(
    path: str | Path,
    weights: str = "ema",
    given: dict[str, Any] | None = None,
    *,
    projectors: bool = False,
    checksum: Checksum | None = None,
) -> Weights:
    """One set of weights (`ema`, `ema:DECAY` or `model`) of a checkpoint file; REPA's `projectors` are left aside unless asked for.

    Formats: ours, its safetensors form, the published ELIT code's, a folder of `save_pretrained`, and bare state dicts (REPA's
    `last.pt`, original SiT's, a model's own); a path `hf://owner/repo/file` is fetched from the hub. `given`: options by hand,
    for what a bare state dict does not record. `checksum`: the file's, where it was read before.
    """
    path = local_file(path)
    if checksum is None and path.is_file() and os.environ.get("RANK", "0") == "0":
        checksum = Checksum(path)
    try:
        found = _read(path, weights, given or {})
        if not projectors:
            found.state_dict = {k: v for k, v in found.state_dict.items() if not k.startswith("projectors.")}
        _check_finite(path, found.state_dict)
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
    state = load(path)
    if "format" in state:
        return _ours(path, state, weights)
    if isinstance(state.get("args"), argparse.Namespace):
        return read_published(path, state, weights)
    _check_single(path, weights)
    return read_bare(path, state, given)


def load_model(path: str | Path, weights: str = "ema", device: str | torch.device = "cpu", **overrides: Any):
    """(model in eval mode, recorded configuration) of a checkpoint file.

    Args:
        weights: `ema` (the first decay), `ema:0.999` (a named one) or `model` (the raw weights).
        overrides: constructor arguments, e.g. `elit_tail="skip"`.
    """
    found = read_weights(path, weights, overrides)
    return build_model(found, path, device, **overrides), found.config


def _check_sizes(path: Path, found: Weights) -> None:
    """Refuse numbers of layers and latents for which the file holds no weights, before anything is made of them."""
    largest = max(tensor.numel() for tensor in found.state_dict.values())
    for name in ("elit_read_depth", "elit_write_depth", "stages_count", "elit_group_size"):
        most = math.isqrt(largest) if name == "elit_group_size" else len(found.state_dict)
        if (found.config.get(name) or 0) > most:
            raise UserError(f"{path}: {name}: {found.config[name]} is recorded, but there are no weights for so many")


def _check_finite(path: Path, state_dict: dict[str, Tensor]) -> None:
    for name, tensor in state_dict.items():
        if tensor.is_floating_point() and tensor.numel():
            # Four times as fast as isfinite; both ends are NaN where any value is.
            ends = tensor.detach().aminmax()
            if not all(math.isfinite(end.item()) for end in ends):
                raise UserError(f"{path}: {name} has values that are not finite (NaN or infinity): its training diverged")


def _ours(path: Path, state: dict[str, Any], weights: str) -> Weights:
    _check_format(state, path)
    kind, _, decay = weights.partition(":")
    if kind == "model" and not decay:
        state_dict = state["model"]
    elif kind == "ema" and state["ema"] and (not decay or decay in state["ema"]):
        state_dict = state["ema"][decay or next(iter(state["ema"]))]
    else:
        known = ", ".join(["model", "ema", *(f"ema:{d}" for d in state["ema"])])
        raise UserError(f"--weights {weights}: not in {path}; it holds {known}")
    state_dict = check_state_dict(state_dict, str(path))
    return Weights(state_dict, recorded_config(state["config"], path), _record(state["vae"], path), _step(state["step"], path))


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
            recorded = {k: v for k, v in recorded.items() if k in MODEL_OPTIONS}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{beside}: must hold a JSON object") from None
        return read_bare(path, state_dict, given | recorded_config(recorded, beside))
    try:
        config, record = json.loads(metadata["config"]), json.loads(metadata["vae"])
    except (ValueError, KeyError, RecursionError):
        raise UserError(f"{path}: its metadata config and vae must hold JSON") from None
    state_dict, step = check_state_dict(state_dict, str(path)), _step(metadata.get("step", 0), path)
    return Weights(state_dict, recorded_config(config, path), _record(record, path), step)


def _check_single(path: Path, weights: str) -> None:
    if weights not in ("ema", "model"):
        raise UserError(f"--weights {weights}: {path} holds one set of weights")


_DIMENSIONS = {  # of the tensors whose shapes tell the architecture, or that are converted
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "t_embedder.mlp.0.weight": 2,
    "final_layer.linear.weight": 2,
    "final_layer.linear.bias": 1,
    "interface.query": 2,
    "interface.reader.adaLN_modulation.1.weight": 2,
    "interface.reader.adaLN_modulation.1.bias": 1,
}


def _check_dimensions(path: Path, state_dict: dict[str, Tensor]) -> None:
    for name, tensor in state_dict.items():
        wanted = 4 if _PATCH_EMBEDDING.fullmatch(name) else _DIMENSIONS.get(name, tensor.dim())
        if tensor.dim() != wanted or (wanted == 4 and tensor.shape[2] != tensor.shape[3]):
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, which no model has")


def depth_of(state_dict: dict[str, Tensor]) -> int:
    """One more than the highest number of a block."""
    return 1 + max((int(m[1]) for k in state_dict if (m := re.match(r"blocks\.([0-9]{1,6})\.", k))), default=-1)
