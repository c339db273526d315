"""Any checkpoint that is read → ours or safetensors, and what is in a file.

    python convert_checkpoint.py IN OUT.pt                          ours, with every set of weights that IN holds
    python convert_checkpoint.py IN OUT.safetensors --safetensors   one set of weights, the configuration in the metadata
    python convert_checkpoint.py IN --show

IN: a file of ours, a published one, safetensors, a folder of `save_pretrained`, or hf://owner/repo/file. What it does not record is
given by option (`--model`, `--resolution`, `--head-depth`, `--vae`, …). The optimizer's state is left behind: the result is for sampling.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import checkpoint
import inference
from config import Architecture, ConvertCheckpointConfig, parse, with_names
from errors import UserError, command

PUBLISHED_DECAY = "0.9999"  # of the EMA in files of the published code, which do not record it


@command
def main(argv: list[str] | None = None) -> None:
    argv = with_names(ConvertCheckpointConfig, sys.argv[1:] if argv is None else argv, ("source", "dest"))
    config, given = parse(ConvertCheckpointConfig, argv, prog="convert_checkpoint.py IN [OUT]")
    if config.source is None:
        raise UserError("give the checkpoint to convert: convert_checkpoint.py IN OUT, or IN --show")
    if config.dest is None and not config.show:
        raise UserError("give the file to write: convert_checkpoint.py IN OUT, or IN --show to see what is in it")
    check_dest(config)
    source = checkpoint.local_file(config.source)
    if config.show:
        show(config, given, source)
    if config.dest is not None:
        convert(config, given, source)


def check_dest(config: ConvertCheckpointConfig) -> None:
    """Refuse a file to write that exists, cannot be written, or is named as another format."""
    if config.dest is None:
        return
    dest = Path(config.dest)
    if dest.exists():
        raise UserError(f"{dest}: exists already; choose another name")
    if config.safetensors != (dest.suffix == ".safetensors"):
        raise UserError(f"{dest}: --safetensors belongs to a name that ends in .safetensors, and only to such a name")
    inference.check_folder("the folder of OUT,", dest.parent)


# ---------------------------------------------------------------------------------------------------------- converting


def convert(config: ConvertCheckpointConfig, given: dict, source: Path) -> None:
    """Write OUT; the weights are checked against the model first."""
    dest = Path(config.dest)
    if config.safetensors:
        names = [config.weights or "ema"]
    else:
        names = [config.weights] if config.weights else list(look(source).sets)
    sets: dict[str, checkpoint.Weights] = {}
    checksum = None
    for name in names:
        found = checkpoint.read_weights(source, name, given, checksum=checksum)
        checksum = found.checksum
        inference.settle_architecture(config, given, found, config.source)
        checkpoint.build_model(found, config.source)
        found.state_dict = {k: _compact(v) for k, v in found.state_dict.items()}
        sets[name] = found
    found = next(iter(sets.values()))
    try:
        if config.safetensors:
            save_safetensors(dest, found)
        else:
            ema = {_decay(name): w.state_dict for name, w in sets.items() if name != "model"}
            model = sets["model"].state_dict if "model" in sets else found.state_dict
            state = {"model": model, "ema": ema or {"0.0": model}}  # raw weights are their own average of decay 0
            state |= {"optimizer": None, "scheduler": None, "scaler": None}
            checkpoint.save(dest, state | {"step": found.step, "config": found.config, "vae": found.record.to_dict()})
    except OSError as error:
        raise UserError(f"{dest}: cannot be written: {error}") from None
    print(f"{dest}: {found.config['model']}, step {found.step}, weights {', '.join(sets)}")


def save_safetensors(path: Path, found: checkpoint.Weights) -> None:
    """One set of weights with its configuration, VAE record and step as JSON in the metadata; written aside, then renamed."""
    from safetensors.torch import save_file

    metadata = {"config": json.dumps(found.config), "vae": json.dumps(found.record.to_dict()), "step": str(found.step)}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    save_file(found.state_dict, aside, metadata | {"format": "pt"})
    aside.chmod(0o644)  # safetensors leaves it readable by its owner alone
    aside.replace(path)


def _decay(name: str) -> str:
    """The EMA decay of a set of weights, as text."""
    return name.partition(":")[2] or PUBLISHED_DECAY


def _compact(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, in a storage of its own size: a view would carry all of its storage into the file."""
    fits = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if fits else tensor.clone().contiguous()


# ------------------------------------------------------------------------------------------------------------- looking


@dataclass
class Held:
    """What is in a file, under its own names."""

    format: str
    sets: dict[str, dict[str, Tensor]]  # by what --weights calls them
    others: list[str]  # entries beside the weights


def look(path: Path) -> Held:
    """The sets of weights in a checkpoint file. Raises UserError for what is no checkpoint or carries code."""
    if path.suffix == ".safetensors":
        tensors, metadata = checkpoint.load_safetensors(path)
        kind = "with its configuration" if "config" in metadata else "a bare state dict"
        return Held(f"safetensors, {kind}", {"ema": tensors}, sorted(metadata))
    state = checkpoint.load(path)
    if "format" in state:
        sets = {"model": state.get("model") or {}} | {f"ema:{d}": v for d, v in (state.get("ema") or {}).items()}
        others = [k for k, v in state.items() if k not in ("model", "ema", "format") and v]
        return Held(f"this code's, version {state['format']}", sets, others)
    if isinstance(state.get("args"), argparse.Namespace):
        sets = {k: state[k] for k in ("model", "ema") if isinstance(state.get(k), dict)}
        return Held("the published ELIT code's", sets, [k for k in state if k not in sets])
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    return Held("a bare state dict", {"ema": tensors}, [k for k in state if k not in tensors])


def show(config: ConvertCheckpointConfig, given: dict, source: Path) -> None:
    """Print the format, model, options and tensors of a file."""
    held = look(source)
    chosen = config.weights or ("ema" if "ema" in held.sets else list(held.sets)[-1])
    tensors = held.sets.get(chosen, {})
    lines = [f"{config.source}", f"format      {held.format}"]
    lines.append(f"weights     {', '.join(held.sets) if len(held.sets) > 1 else 'one set'}")
    lines.append(f"beside them {', '.join(held.others) or 'nothing'}")
    checksum = checkpoint.Checksum(source)
    try:
        checksum.check()
    except UserError as error:
        lines.append(f"warning     {error}")
    try:
        found = checkpoint.read_weights(source, config.weights or "ema", given, checksum=checksum)
        inference.settle_architecture(Architecture(), given, found, config.source)
        vae = found.record
        lines.append(f"model       {found.config['model']}")
        lines.append(f"step        {found.step}")
        lines.append(f"vae         {vae.vae}: factor {vae.downsample_factor}, {vae.latent_channels} channels")
        lines.append("options     " + " ".join(f"{k}={v}" for k, v in found.config.items() if v is not None and k != "model"))
    except UserError as error:
        lines.append(f"model       not known: {error}")
    count = sum(v.numel() for k, v in tensors.items() if k != "pos_embed")
    lines.append(f"parameters  {count:,} in {len(tensors)} tensors")
    print("\n  ".join(["\n".join(lines), *summary(tensors)]))


def summary(tensors: dict[str, Tensor]) -> list[str]:
    """A line for each tensor, those of numbered layers that look the same in one: name, shape, type."""
    alike: dict[tuple, list[tuple[int, ...]]] = {}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            pattern = re.sub(r"\d+", "#", name)
            key = (pattern, tuple(value.shape), str(value.dtype).removeprefix("torch."))
            alike.setdefault(key, []).append(tuple(int(n) for n in re.findall(r"\d+", name)))
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


if __name__ == "__main__":
    main()
