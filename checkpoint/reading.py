"""Weights from any checkpoint file: ours, safetensors, the published code's, bare state dicts."""

import argparse
import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.published import read_bare, read_published
from checkpoint.training_state import FORMAT
from checkpoint.weights import MODEL_OPTIONS, Weights, build_model
from common.errors import UserError
from common.files import check_name
from common.tensor_files import PRETRAINED, Checksum, load, load_safetensors
from config.options import TrainConfig
from config.parsing import coerce
from models.vae import VAERecord


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


def _check_finite(path: Path, state_dict: dict[str, Tensor]) -> None:
    for name, tensor in state_dict.items():
        if tensor.is_floating_point() and tensor.numel():
            # Four times as fast as isfinite; both ends are NaN where any value is.
            ends = tensor.detach().aminmax()
            if not all(math.isfinite(end.item()) for end in ends):
                raise UserError(f"{path}: {name} has values that are not finite (NaN or infinity): its training diverged")


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
        except (OSError, ValueError, TypeError, AttributeError):
            raise UserError(f"{beside}: must hold a JSON object") from None
        return read_bare(
            path, state_dict, given | {k: coerce(TrainConfig, k, v, f"{beside}: {k}") for k, v in recorded.items()}
        )
    try:
        config, record = json.loads(metadata["config"]), json.loads(metadata["vae"])
    except (ValueError, KeyError):
        raise UserError(f"{path}: its metadata config and vae must hold JSON") from None
    return Weights(state_dict, config, VAERecord.from_dict(record, str(path)), int(metadata.get("step", 0)))


def _check_single(path: Path, weights: str) -> None:
    if weights not in ("ema", "model"):
        raise UserError(f"--weights {weights}: {path} holds one set of weights")


def local_file(path: str | Path) -> Path:
    """A file as it is; of a folder of `save_pretrained` its weights; `hf://owner/repo/file` as the local copy of that file."""
    text = str(path)
    if not text.startswith("hf://"):
        pretrained = Path(path) / PRETRAINED
        return pretrained if pretrained.is_file() else Path(path)
    owner, _, rest = text.removeprefix("hf://").partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository and file):
        raise UserError(f"{text}: must be hf://owner/repo/file")
    for part, plain in ((owner, True), (repository, True), (file, False)):
        check_name(part, text, plain=plain)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    folder, _, name = file.rpartition("/")
    try:
        local = Path(hf_hub_download(f"{owner}/{repository}", file))
        if name == PRETRAINED:  # pushed by `push_to_hub`, it has its configuration beside it
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(f"{owner}/{repository}", f"{folder}/config.json".lstrip("/"))
        return local
    except Exception as error:  # network, authentication, no such repository or file, no space …
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{text}: could not be downloaded ({type(error).__name__}: {reason}); give a local file") from None
