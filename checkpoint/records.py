"""What a checkpoint records, checked once for all formats: options, VAE, step, format, and the state dict."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from common.errors import UserError
from config.options import TrainConfig
from config.values import coerce
from models.published import PREDICTIONS
from models.text_encoders import TextRecord
from models.vae import STATISTICS, VAERecord

FORMAT = 1
TEXT = "text"  # in checkpoints of text models: what their text features are


_OPTIONS = {f.name for f in dataclasses.fields(TrainConfig)}


def check_training_state(state: dict[str, Any], where: str | Path, *, lazy: bool = False) -> dict[str, Any]:
    """The parts that a resumed run reads, checked, with the configuration as options and the VAE as a record.

    lazy: whether meta tensors may stand for those that are still to be read.
    """
    check_format(state, where)
    optimizer = state.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
        raise UserError(f"{where}: holds no training state; it may start a new run with --init-from")
    return state | {
        "model": check_state_dict(state["model"], f"{where}: model", lazy=lazy),
        "ema": {d: check_state_dict(v, f"{where}: ema {d}", lazy=lazy) for d, v in state["ema"].items()},
        "config": recorded_config(state["config"], where),
        "vae": recorded_vae(state["vae"], where),
        TEXT: recorded_text(state.get(TEXT), where),
    }


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
    if values.get("predicts") is not None:
        if not isinstance(values["predicts"], str) or values["predicts"] not in PREDICTIONS:
            raise UserError(f"{where}: predicts: must be one of {', '.join(PREDICTIONS)}")
        config["predicts"] = values["predicts"]
    if values.get("arguments") is not None and config.get("model"):
        config["arguments"] = recorded_arguments(values["arguments"], models.model_spec(config["model"]), where)
    return config


def recorded_arguments(values: Any, spec: models.ModelSpec | None, where: str | Path) -> dict[str, Any]:
    """Arguments of a model's constructor that a file records; without a spec, what any constructor might take.

    Raises:
        UserError: names `where` and the argument that the model has not, or whose value is none.
    """
    if not isinstance(values, dict) or len(values) > 100 or not all(isinstance(name, str) for name in values):
        raise UserError(f"{where}: its arguments are not values by name")
    for name, value in values.items():
        if spec is not None and not spec.takes(name):
            raise UserError(f"{where}: {spec.name} has no argument {name[:80]!r}")
        parts = value if isinstance(value, list) and len(value) <= 1000 else [value]
        if not all(_is_plain(part) for part in parts):
            raise UserError(f"{where}: {name[:80]}: what it records is no argument's value")
    return dict(values)


def _is_plain(value: Any) -> bool:
    """None, truth, text, a number, or a few of them: of a size that an option may have, and that a message can show."""
    if isinstance(value, (list, tuple)):
        return len(value) <= 1000 and not any(isinstance(part, (list, tuple)) for part in value) and all(map(_is_plain, value))
    if isinstance(value, str):
        return len(value) < 4096
    return value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 2**63)


def check_state_dict(values: Any, where: str, *, lazy: bool = False) -> dict[str, Tensor]:
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
        is_there = tensor.device.type == "cpu" or (lazy and tensor.is_meta)
        dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and is_there
        if not dense or not tensor.is_floating_point():
            raise UserError(f"{where}: {name} is no dense tensor of floating-point numbers")
        if not 0 < tensor.nbytes <= tensor.untyped_storage().nbytes():
            raise UserError(f"{where}: {name} of shape {tuple(tensor.shape)} has not that many numbers in the file")
    kinds = {tensor.dtype for tensor in values.values()}
    if len(kinds) > 1 or not kinds <= {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
        return {name: tensor.float() for name, tensor in values.items()}
    return dict(values)


def recorded_vae(values: Any, where: str | Path) -> VAERecord:
    """The VAE of a checkpoint `where`. Raises UserError where its record is none."""
    if not isinstance(values, dict) or not all(_is_plain(v) for k, v in values.items() if k not in STATISTICS):
        raise UserError(f"{where}: its vae is no record of a VAE")
    return VAERecord.from_dict(values, str(where))


def recorded_text(values: Any, where: str | Path) -> TextRecord | None:
    """What the text features of a checkpoint's model are; None where it records none. Raises UserError where it is no such record."""
    if values is not None and not (isinstance(values, dict) and all(map(_is_plain, values.values()))):
        raise UserError(f"{where}: its {TEXT} is no record of text features")
    return None if values is None else TextRecord.from_dict(values, f"{where}: {TEXT}")


def recorded_step(value: Any, where: str | Path) -> int:
    """The step of a checkpoint `where`. Raises UserError where it is no whole number from 0 on."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):
        return int(value)
    if type(value) is not int or not 0 <= value < 2**63:
        raise UserError(f"{where}: its step must be a whole number of at least 0")
    return value


def check_format(state: dict[str, Any], where: str | Path) -> None:
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
