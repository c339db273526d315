"""Any length of average at any step, made of a run's snapshots after training (EDM2, arXiv 2312.02696, section 3.2)."""

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoint import reading, snapshots
from checkpoint.power_average import Combination, combine
from checkpoint.snapshots import Snapshot
from checkpoint.weights import Weights, meta_model, save_weights
from common.errors import UserError
from common.files import Busy, FolderLock, cache_folder, make_folder
from common.logging import warn
from common.tensor_files import safetensors_metadata
from config.ema_options import AverageOptions

MAX_ERROR = 0.2  # of `Combination.error`: more is not the average that was asked for
_LENGTHS = np.geomspace(0.005, 0.28, 150)  # among which the valid ones are looked for


@dataclasses.dataclass(frozen=True)
class Average:
    """An average of a run, and the snapshots that it is made of."""

    source: str
    sigma: float
    step: int
    parts: list[Snapshot]
    combination: Combination


def check_options(options: AverageOptions) -> None:
    """Refuse --ema-step alone, and weights of another name beside --ema-sigma."""
    if options.ema_sigma is None and options.ema_step is not None:
        raise UserError(f"--ema-step {options.ema_step}: is the step of --ema-sigma; give that, too")
    weights = getattr(options, "weights", None)
    if options.ema_sigma is not None and weights not in (None, "ema"):
        raise UserError(
            f"--weights {weights}: --ema-sigma {options.ema_sigma:g} is an average of its own; leave one of them out"
        )


def find(source: str, sigma: float, step: int | None = None) -> Average:
    """The average of length `sigma` at a step of the run that `source` is of.

    Args:
        source: the run's folder, its folder of snapshots, or a checkpoint or snapshot in it, whose step is then the default.
        sigma: relative length.
        step: default: the newest.

    Raises:
        UserError: the run has no such snapshots, or they do not reach as far as that step or length.
    """
    folder, own_step = _locate(source)
    there = [snapshot for snapshot in snapshots.stored(folder) if snapshot.sigma is not None]
    if not there:
        raise UserError(
            f"--ema-sigma {sigma:g}: {folder} holds no snapshots of power-function averages; train.py writes them with "
            "--posthoc-ema 0.05 0.1"
        )
    first, last = there[0].step, there[-1].step
    requested = step or own_step or last
    if not first <= requested <= last:
        named = f"--ema-step {step}" if step else f"--ema-sigma {sigma:g}: step {requested}, which {source} is of"
        raise UserError(f"{named}: the snapshots in {folder} span steps {first} to {last}")
    # Later ones tell of no earlier weights that the first of them does not.
    until = next(snapshot.step for snapshot in there if snapshot.step >= requested)
    parts = [snapshot for snapshot in there if snapshot.step <= until]
    combination = _combine(parts, requested, sigma)
    if combination.error > MAX_ERROR:
        valid = _ranges(parts, requested)
        hint = f"valid are {valid}" if valid else f"no length is within their reach there; step {until} has a snapshot"
        raise UserError(f"--ema-sigma {sigma:g}: is not within what the snapshots in {folder} span at step {requested}: {hint}")
    return Average(source, sigma, requested, parts, combination)


def make(average: Average) -> Weights:
    """The weights of an average, float32. Raises UserError for a snapshot that is damaged, or of another run."""
    newest = average.parts[-1]
    found = reading.read_weights(newest.path)
    run = safetensors_metadata(newest.path).get("run")
    names = dict(meta_model(found, newest.path).named_parameters()).keys()
    total: dict[str, Tensor] = {k: torch.zeros(v.shape) if k in names else v for k, v in found.state_dict.items()}
    for part, coefficient in zip(average.parts, average.combination.coefficients.tolist(), strict=True):
        told = safetensors_metadata(part.path)
        if told.get("run") != run or told.get("step") != str(part.step) or told.get("sigma_rel") != f"{part.sigma:g}":
            raise UserError(f"{part.path}: is not what its name says, or of another run than {newest.path.name}; move it away")
        tensors = reading.read_weights(part.path).state_dict
        for name in names:
            if name not in tensors or tensors[name].shape != total[name].shape:
                raise UserError(f"{part.path}: {name} is missing or has another shape than in {newest.path.name}")
            total[name].add_(tensors[name], alpha=coefficient)
    return dataclasses.replace(found, state_dict=total, step=average.step, checksum=None)


def cached(average: Average) -> Path:
    """A safetensors file of the average, made once and kept in the cache folder; the processes of a machine share it."""
    states = [(part.path.name, (stat := part.path.stat()).st_size, stat.st_mtime_ns, stat.st_ino) for part in average.parts]
    text = json.dumps([str(average.parts[0].path.parent.absolute()), average.sigma, average.step, states])
    path = cache_folder() / "averages" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"
    make_folder(path.parent, "the cache folder")
    while not path.is_file():
        try:
            lock = FolderLock(path.with_suffix(".lock"), path.parent, warn)
        except Busy:
            time.sleep(0.2)
            continue
        try:
            if not path.is_file():
                save(average, path)
        finally:
            lock.release()
    return path


def save(average: Average, path: Path) -> None:
    """Write the average as a safetensors file that loads as any other."""
    save_weights(path, make(average))


def read_weights(ckpt: str, sigma: float, step: int | None) -> Weights:
    """The weights of `find`, from the cache."""
    return reading.read_weights(cached(find(ckpt, sigma, step)))


def describe(average: Average) -> str:
    """A line: what it is made of, and how well."""
    steps = {part.step for part in average.parts}
    return (
        f"average of σ_rel {average.sigma:g} at step {average.step}, of {len(average.parts)} snapshots of steps {min(steps)} to "
        f"{max(steps)}; expected error: {100 * average.combination.error:.2g}% of its distance from the weights of that step"
    )


def _locate(source: str) -> tuple[Path, int | None]:
    """The folder of snapshots, and the step that a checkpoint's name tells."""
    path = Path(source).absolute()
    if path.suffix in (".pt", ".dcp", ".safetensors") and path.parent.name in ("checkpoints", snapshots.FOLDER):
        match = re.match(r"[0-9]{7,}", path.name)
        return path.parent.parent / snapshots.FOLDER, int(match[0]) if match else None
    return path if path.name == snapshots.FOLDER else path / snapshots.FOLDER, None


def _combine(parts: Iterable[Snapshot], step: int, sigma: float) -> Combination:
    return combine([(part.step, part.sigma or 0.0) for part in parts], (step, sigma))


def _ranges(parts: list[Snapshot], step: int) -> str:
    """The lengths that the parts span at a step: `0.02 to 0.25`."""
    lengths = sorted({*_LENGTHS.tolist(), *(part.sigma or 0.0 for part in parts)})
    is_valid = [_combine(parts, step, sigma).error <= MAX_ERROR for sigma in lengths]
    starts = [i for i, ok in enumerate(is_valid) if ok and not (i and is_valid[i - 1])]
    ends = [i for i, ok in enumerate(is_valid) if ok and not (i + 1 < len(lengths) and is_valid[i + 1])]
    pairs = ((lengths[i], lengths[j]) for i, j in zip(starts, ends, strict=True))
    return " and ".join(f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}" for low, high in pairs)
