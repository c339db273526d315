"""Checkpoints: save, load, resume, and import of the published format.

A file is a `torch.save`d dict of tensors and plain containers, always read with PyTorch's restricted unpickler: a file that
carries code is refused and nothing of it runs.
"""

import argparse
import hashlib
import os
import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from config import ARCHITECTURE_KEYS, TrainConfig, coerce
from errors import UserError
from vae import SD_VAE, VAERecord

FORMAT = 1
# The architecture options that the state dict's shapes depend on, or that change what a forward computes.
MODEL_OPTIONS = ("qk_norm", "head_depth", "tail_depth", "elit_group_size", "elit_read_depth", "elit_write_depth", "elit_tail")

# ---------------------------------------------------------------------------------------------------- training state


class _HashingFile:
    """A file that hashes what is written to it."""

    def __init__(self, path: Path):
        self.file, self.sha256 = path.open("wb"), hashlib.sha256()

    def write(self, data) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def sidecar(path: Path) -> Path:
    """The file that holds the checkpoint's SHA-256."""
    return path.with_name(path.name + ".sha256")


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` (interfaces: model, ema, optimizer, …) and its checksum; written aside, synced and renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    out = _HashingFile(aside)
    with out.file:
        torch.save({"format": FORMAT} | state, out)
        out.flush()
        os.fsync(out.file.fileno())
    aside_sum = sidecar(aside)
    aside_sum.write_text(f"{out.sha256.hexdigest()}  {path.name}\n")
    aside_sum.replace(sidecar(path))  # the checksum first: a checkpoint under its own name always has one
    aside.replace(path)


def load(path: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """The dict in a checkpoint file, on the CPU, memory-mapped where its format allows.

    Raises:
        UserError: missing, truncated, not a checkpoint, carrying code, or (with `verify`) not matching its checksum.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    if verify and sidecar(path).is_file() and [file_sha256(path)] != sidecar(path).read_text().split()[:1]:
        raise UserError(f"{path}: damaged: it does not match its checksum {sidecar(path).name}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|(?:[Cc]all|global) ([\w.]+)", str(error))
        if found:
            name = found.group(1) or found.group(2)
            raise UserError(
                f"{path}: refused: it carries code ({name}), nothing of which was run; only tensors and plain containers are loaded"
            ) from None
        raise UserError(f"{path}: truncated, or not a checkpoint") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        raise UserError(f"{path}: truncated, or not a checkpoint") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    return state


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def saved_steps(folder: str | Path) -> list[int]:
    """The steps of the checkpoints in a run's `checkpoints` folder, ascending."""
    return sorted(int(p.stem) for p in Path(folder).glob("*.pt") if p.stem.isdigit())


def load_newest(folder: str | Path, warn) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, `None` where there is none; `warn(message)` tells of each damaged one passed over."""
    for step in reversed(saved_steps(folder)):
        try:
            return load(Path(folder) / f"{step:07d}.pt", verify=True)
        except UserError as error:
            warn(f"{error}; trying the one before")
    return None


# ---------------------------------------------------------------------------------------------------------- models


@dataclass
class Weights:
    """What a checkpoint says of its model."""

    state_dict: dict[str, Tensor]
    config: dict[str, Any]  # the recorded options; empty where the file records none
    record: VAERecord = SD_VAE
    step: int = 0
    extras: dict[str, Any] = field(default_factory=dict)  # constructor arguments that no option of ours holds


def read_weights(path: str | Path, weights: str = "ema") -> Weights:
    """One set of weights (`ema`, `ema:DECAY` or `model`) of our or the published format, REPA projectors left aside."""
    state = load(path)
    if "format" in state:
        found = _ours(Path(path), state, weights)
    elif isinstance(state.get("args"), argparse.Namespace):
        found = _published(Path(path), state, weights)
    else:
        raise UserError(
            f"{path}: neither a checkpoint of train.py nor of the published code (bare state dicts: not available yet)"
        )
    found.state_dict = {k: v for k, v in found.state_dict.items() if not k.startswith("projectors.")}
    return found


def build_model(found: Weights, where: str | Path, device: str | torch.device = "cpu", **overrides: Any) -> nn.Module:
    """The model that `found` records, in eval mode with its weights loaded; `overrides` are constructor arguments."""
    config = found.config
    if not config.get("model"):
        raise UserError(f"{where}: the checkpoint records no model; give --model")
    if config["resolution"] % found.record.downsample_factor:
        raise UserError(
            f"{where}: resolution {config['resolution']} is not divisible by the VAE's factor {found.record.downsample_factor}"
        )
    with torch.device("meta"):  # no time spent on initial weights: all of them are replaced
        model = models.create_model(
            config["model"],
            input_size=config["resolution"] // found.record.downsample_factor,
            in_channels=found.record.latent_channels,
            num_classes=config["num_classes"],
            **(model_options(config) | {"fused_attn": config.get("fused_attn", True)} | overrides),
        )
    load_state_dict(model, found.state_dict, where, assign=True)
    return model.to(device).eval().requires_grad_(False)


def load_model(path: str | Path, weights: str = "ema", device: str | torch.device = "cpu", **overrides: Any):
    """(model in eval mode, recorded configuration) of a checkpoint file.

    Args:
        weights: `ema` (the first decay), `ema:0.999` (a named one) or `model` (the raw weights).
        overrides: constructor arguments, e.g. `elit_tail="skip"`.
    """
    found = read_weights(path, weights)
    return build_model(found, path, device, **overrides), found.config


def model_options(config: dict[str, Any]) -> dict[str, Any]:
    """The constructor arguments among recorded options that this model family knows."""
    elit = config["model"].startswith("ELIT-")
    return {k: config[k] for k in MODEL_OPTIONS if k in config and (elit or k == "qk_norm")}


def load_state_dict(model: nn.Module, state_dict: dict[str, Tensor], where: str | Path, assign: bool = False) -> None:
    """Load all or nothing. Raises UserError that names the first few missing or unknown keys and wrong shapes."""
    own = model.state_dict()
    wrong = [f"{k} is missing" for k in own if k not in state_dict]
    wrong += [f"{k} is unknown" for k in state_dict if k not in own]
    for k in own.keys() & state_dict.keys():
        if own[k].shape != state_dict[k].shape:
            wrong.append(f"{k} has shape {tuple(state_dict[k].shape)} instead of {tuple(own[k].shape)}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{where}: not a checkpoint of this model: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict(state_dict, assign=assign)


def _ours(path: Path, state: dict[str, Any], weights: str) -> Weights:
    if state["format"] != FORMAT:
        raise UserError(f"{path}: format {state['format']} is not known; this version reads {FORMAT}")
    missing = [k for k in ("model", "ema", "config", "vae", "step") if k not in state]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing from the checkpoint")
    kind, _, decay = weights.partition(":")
    if kind == "model" and not decay:
        state_dict = state["model"]
    elif kind == "ema" and state["ema"] and (not decay or decay in state["ema"]):
        state_dict = state["ema"][decay or next(iter(state["ema"]))]
    else:
        known = ", ".join(["model", "ema", *(f"ema:{d}" for d in state["ema"])])
        raise UserError(f"--weights {weights}: not in {path}; it holds {known}")
    return Weights(state_dict, state["config"], VAERecord.from_dict(state["vae"], str(path)), state["step"])


# ------------------------------------------------------------------------------------------------ published format

_PUBLISHED_NAMES = [
    (r"input_token_editor\.adapters\.0\.learned_query_embed", "interface.query"),
    (r"input_token_editor\.adapters\.0\.pos_embed", "interface.read_pos"),
    (r"input_token_editor\.adapters\.0\.latent_pos_embed", "interface.latent_pos"),
    (r"input_token_editor\.adapters\.0\.fit_layer\.adaLN_modulation\.", "interface.reader.adaLN_modulation."),
    (r"input_token_editor\.adapters\.0\.fit_layer\.latents_attend_to_patches\.", "interface.reader.attn."),
    (r"input_token_editor\.adapters\.0\.fit_layer\.read_ff\.", "interface.reader.mlp."),
    (r"output_token_editor\.adapters\.0\.pos_embed", "interface.write_pos"),
    (r"output_token_editor\.adapters\.0\.patches_attend_to_latents\.", "interface.writer.attn."),
    (r"output_token_editor\.adapters\.0\.write_ff\.", "interface.writer.mlp."),
]


def _published(path: Path, state: dict[str, Any], weights: str) -> Weights:
    """The published ELIT code's format: `model`, `ema`, `steps` and an argparse Namespace of the options."""
    if weights not in ("ema", "model"):
        raise UserError(f"--weights {weights}: not in {path}; it holds model, ema")
    args = vars(state["args"])
    config = {k: coerce(TrainConfig, k, v, f"{path}: {k}") for k, v in args.items() if k in ARCHITECTURE_KEYS}
    spec = models.model_spec(config.get("model") or "")
    config = {"resolution": 256, "num_classes": 1000} | config
    state_dict = dict(state[weights])
    if spec.family == "ELIT-SiT":
        # There the head is `encoder_depth` blocks, and the tail latents bypass the core.
        config |= {"head_depth": config.get("encoder_depth", 8), "tail_depth": spec.sizes["tail_depth"], "elit_tail": "skip"}
        state_dict = _rename_interface(state_dict, config, spec)
    return Weights(state_dict, config, step=state.get("steps", 0))


def _rename_interface(state_dict: dict[str, Tensor], config: dict[str, Any], spec: models.ModelSpec) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state_dict.items():
        for pattern, ours in _PUBLISHED_NAMES:
            name = re.sub("^" + pattern, ours, name)
        renamed[name] = value
    width = spec.sizes["hidden_size"]
    for kind in ("weight", "bias"):
        key = f"interface.reader.adaLN_modulation.1.{kind}"
        if key in renamed:
            renamed[key] = renamed[key][: 6 * width]  # nothing uses the seventh part
    side = config["resolution"] // SD_VAE.downsample_factor // spec.sizes["patch_size"]
    g = config.get("elit_group_size", 4)
    table = renamed.get("interface.latent_pos")
    if table is not None and side % g == 0 and table.dim() == 2 and len(table) >= side * side:
        # Raster order of the token grid there, group order here.
        grid = table[: side * side].reshape(side // g, g, side // g, g, -1)
        renamed["interface.latent_pos"] = grid.transpose(1, 2).reshape(-1, g * g, table.shape[1])
    return renamed
