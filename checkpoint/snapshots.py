"""Snapshots of a run: weights alone, as safetensors files with the record that sampling needs.

    RUN/snapshots/0010000.safetensors              the averaged weights of step 10000
    RUN/snapshots/0010000-sigma-0.05.safetensors   a power-function average as bf16, its fixed tables as they are (`checkpoint.posthoc`)

The metadata hold `config`, `vae`, `step` and, of text models, `text`, as in any safetensors file of this code; those of a
power-function average also `sigma_rel` and `run`, a hash of what makes the run's model what it is.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from checkpoint.records import TEXT
from common import tensor_files
from common.files import remove_leftovers
from config.options import TrainConfig
from config.rules import names
from models.text_encoders import TextRecord
from models.vae import VAERecord

FOLDER = "snapshots"
_NAME = r"([0-9]{7}|[1-9][0-9]{7,})(-sigma-([0-9.e-]+))?\.safetensors"


class Snapshot(NamedTuple):
    """A file; `sigma`: the relative length of its power-function average, None where it is the run's own average."""

    step: int
    sigma: float | None
    path: Path


def path_of(folder: Path, step: int, sigma: float | None = None) -> Path:
    """The file of a snapshot."""
    return folder / f"{step:07d}{'' if sigma is None else f'-sigma-{sigma:g}'}.safetensors"


def stored(folder: Path) -> list[Snapshot]:
    """The snapshots in a folder by step and length; none where there is no such folder."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(_NAME, path.name)
        if match:
            found.append(Snapshot(int(match[1]), float(match[3]) if match[3] else None, path))
    return sorted(found, key=lambda s: (s.step, s.sigma or 0.0))


def metadata(config: dict[str, Any], record: VAERecord, step: int, text: TextRecord | None) -> dict[str, str]:
    """What a safetensors file of weights says of them."""
    told = {"config": json.dumps(config), "vae": json.dumps(record.to_dict()), "step": str(step)}
    return told | ({} if text is None else {TEXT: json.dumps(text.to_dict())})


def run_hash(config: dict[str, Any], record: VAERecord) -> str:
    """Of the options that a run may never change, but for defaults: a later version may have more of them; and of the VAE."""
    defaults = TrainConfig()
    same = {n: config[n] for n in names(TrainConfig, resume="same") if config[n] != getattr(defaults, n)}
    return hashlib.sha256(json.dumps([same, record.to_dict()], sort_keys=True).encode()).hexdigest()[:16]


def save(path: Path, tensors: dict[str, Tensor], told: dict[str, str]) -> None:
    """Write a snapshot: aside, synced to the disk, then renamed. Raises WriteError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensor_files.save_safetensors(path, tensors, told, fsync=True)


def begin(folder: Path, step: int, aside: Path | None) -> None:
    """Bring the folder to the step that a run resumes from: later snapshots, which it will write again, go to `aside`.

    aside: where the checkpoints after that step went; where there were none, a killed run wrote the snapshots, and they are deleted.
    Those of a folder without any checkpoint (step 0) stay under another name.
    """
    if not folder.is_dir():
        return
    remove_leftovers(folder, lambda name: re.fullmatch(_NAME, name))
    later = [snapshot.path for snapshot in stored(folder) if snapshot.step > step]
    if later and aside is None and not step:
        aside = folder / "abandoned-from-0"
    for path in later:
        if aside is None:
            path.unlink()
        else:
            aside.mkdir(exist_ok=True)
            path.replace(aside / path.name)
