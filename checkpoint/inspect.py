"""What is in a checkpoint file."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoint import reading, sharded
from checkpoint.architecture import resolve_architecture
from checkpoint.published import is_k_diffusion
from common import tensor_files
from common.errors import UserError
from config.options import Architecture, ConvertCheckpointConfig
from models.published import PREDICTIONS, network_part


@dataclass
class Held:
    """What is in a file, under its own names."""

    format: str
    sets: dict[str, dict[str, Tensor]]  # by what --weights calls them
    others: list[str]  # entries beside the weights


def _tensors(values: Any) -> dict[str, Tensor]:
    """Those among the entries of a state dict."""
    entries = values.items() if isinstance(values, dict) else ()
    return {k: v for k, v in entries if isinstance(k, str) and isinstance(v, Tensor)}


def look(path: Path) -> Held:
    """The sets of weights in a checkpoint file. Raises UserError for what is no checkpoint or carries code."""
    if path.suffix == ".safetensors":
        tensors, metadata = tensor_files.load_safetensors(path)
        kind = "with its configuration" if "config" in metadata else "a bare state dict"
        return Held(f"safetensors, {kind}", {"ema": tensors}, sorted(metadata))
    state = sharded.read_record(path) if sharded.is_sharded(path) else tensor_files.load(path)
    if "format" in state:
        ema = state["ema"] if isinstance(state.get("ema"), dict) else {}
        sets = {"model": _tensors(state.get("model"))} | {f"ema:{d}": _tensors(v) for d, v in ema.items()}
        others = [k for k, v in state.items() if k not in ("model", "ema", "format") and (isinstance(v, Tensor) or v)]
        version = state["format"] if type(state["format"]) is int and abs(state["format"]) < 10**9 else "unknown"
        form = "this code's" + (", in parts" if sharded.is_sharded(path) else "")
        return Held(f"{form}, version {version}", sets, list(map(str, others)))
    if is_k_diffusion(state):
        sets = {"model": _tensors(state["model"]), "ema": _tensors(state["model_ema"])}
        return Held("k-diffusion's", sets, [str(k) for k in state if k not in ("model", "model_ema")])
    if isinstance(state.get("args"), argparse.Namespace):
        sets = {k: _tensors(state[k]) for k in ("model", "ema") if isinstance(state.get(k), dict)}
        return Held("the published ELIT code's", sets, [str(k) for k in state if k not in sets])
    tensors = _tensors(state)
    return Held("a bare state dict", {"ema": tensors}, [str(k) for k in state if k not in tensors])


def show(config: ConvertCheckpointConfig, given: dict, source: Path) -> None:
    """Print the format, model, options and tensors of a file."""
    held = look(source)
    chosen = config.weights or ("ema" if "ema" in held.sets else next(reversed(held.sets), ""))
    tensors = held.sets.get(chosen, {})
    lines = [f"{config.source}", f"format      {held.format}"]
    lines.append(f"weights     {', '.join(held.sets) if len(held.sets) > 1 else 'one set'}")
    lines.append(f"beside them {', '.join(held.others) or 'nothing'}")
    kind = sharded.Checksum if sharded.is_sharded(source) else tensor_files.Checksum
    checksum = kind(source, reread=True)
    try:
        checksum.check()
    except UserError as error:
        lines.append(f"warning     {error}")
    try:
        found = reading.read_weights(source, config.weights or "ema", given, checksum=checksum)
        resolve_architecture(Architecture(), given, found, config.source)
        vae = found.record
        lines.append(f"model       {found.config['model']}")
        lines.append(f"step        {found.step}")
        lines.append(f"vae         {vae.vae}: factor {vae.downsample_factor}, {vae.latent_channels} channels")
        if found.text is not None:
            text = found.text
            lines.append(
                f"text        {text.encoder}: {text.length} tokens × {text.width}, sha256 {text.sha256[:12] or 'unknown'}"
            )
        options = {k: v for k, v in found.config.items() if v is not None and k not in ("model", "arguments", "predicts")}
        lines.append("options     " + " ".join(f"{k}={v}" for k, v in options.items()))
        if "arguments" in found.config:
            lines.append("arguments   " + " ".join(f"{k}={v}" for k, v in found.config["arguments"].items()))
        if "predicts" in found.config:
            lines.append(f"predicts    {PREDICTIONS[found.config['predicts']]}: not to be sampled from")
    except UserError as error:
        lines.append(f"model       not known: {error}")
    own = network_part(tensors)
    count = sum(v.numel() for k, v in own.items() if not is_table(k, own))
    lines.append(f"parameters  {count:,} in {len(own)} tensors")
    print("\n  ".join(["\n".join(lines), *summary(tensors)]))


_TABLES = ("pos_emb.freqs", "time_emb.weight", "aug_emb.weight", "null_text", "null_pooled")


def is_table(name: str, tensors: dict[str, Tensor]) -> bool:
    """Whether it is no parameter but a fixed table, which training does not change; U-ViT alone learns its `pos_embed`."""
    if name.endswith("pos_embed"):
        return "patch_embed.proj.weight" not in tensors
    return name.endswith(_TABLES)


def summary(tensors: dict[str, Tensor]) -> list[str]:
    """A line for each tensor, those of numbered layers that look the same in one: name, shape, type."""
    alike: dict[tuple, list[tuple[int, ...]]] = {}
    for name, value in tensors.items():
        pattern = re.sub(r"\d{1,9}", "#", name)
        key = (pattern, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        alike.setdefault(key, []).append(tuple(int(n) for n in re.findall(r"\d{1,9}", name)))
    lines = []
    for (pattern, shape, dtype), numbers in alike.items():
        name = pattern
        for values in zip(*numbers, strict=True):
            found = sorted(set(values))
            row = len(found) > 2 and found == list(range(found[0], found[-1] + 1))
            text = f"{found[0]}…{found[-1]}" if row else ",".join(map(str, found))
            name = name.replace("#", text if len(found) == 1 else f"{{{text}}}", 1)
        lines.append(f"{name}  {'×'.join(map(str, shape)) or 'scalar'}  {dtype}")
    return lines
