"""Checkpoints of training: saving whole or not at all, which steps are there, pruning."""

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checkpoint import sharded
from checkpoint.records import FORMAT
from common import tensor_files
from common.errors import UserError
from common.files import sync_folder
from common.tensor_files import HashingFile, Unreadable, sidecar

# How the checkpoint of a step may be stored: one file, a folder of parts, and one that is being replaced. The first counts.
FILE, FOLDER = ".pt", sharded.ENDING
FORMS = (FILE, FOLDER, f"{FOLDER}.old")


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` (interfaces: model, ema, optimizer, …) and its checksum: aside, synced to the disk, then renamed.

    Raises:
        OSError: the disk is full, or not writable; nothing that was there has changed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    try:
        out = HashingFile(aside)
        with contextlib.closing(out):
            torch.save({"format": FORMAT} | state, out)  # pyright: ignore[reportArgumentType], it only writes and flushes
        out_sum = HashingFile(sidecar(aside))
        with contextlib.closing(out_sum):
            out_sum.write(f"{out.sha256.hexdigest()}  {path.name}\n".encode())
        sidecar(aside).replace(sidecar(path))  # the checksum first: a checkpoint under its own name always has one
        aside.replace(path)
    except BaseException:
        delete_checkpoint(aside)  # its room on the disk is needed
        raise
    sync_folder(path.parent)


def delete_checkpoint(path: Path) -> None:
    """A file and its checksum, in this order: a checkpoint without one would be taken on trust. A folder likewise goes at once."""
    if path.is_dir() and not path.is_symlink():
        aside = path if path.name.endswith(".tmp") else path.with_name(path.name + ".tmp")
        path.rename(aside)
        shutil.rmtree(aside)
        return
    path.unlink(missing_ok=True)
    sidecar(path).unlink(missing_ok=True)


def remove_unfinished(folder: str | Path) -> None:
    """Delete what killed writes of this run's checkpoints left aside; nothing else, and no links."""
    for path in Path(folder).glob("*.tmp"):
        if re.fullmatch(r"[0-9]{7,}\.(pt|dcp|dcp\.old)\.tmp", path.name) and not path.is_symlink():
            delete_checkpoint(path)
    for path in Path(folder).glob(f"*{FORMS[-1]}"):
        if re.fullmatch(r"[0-9]{7,}\.dcp\.old", path.name) and path.with_suffix("").exists() and not path.is_symlink():
            delete_checkpoint(path)


def set_aside(folder: str | Path, step: int) -> Path | None:
    """Move the checkpoints after `step`, which a run goes back to, to a new subfolder; returns that, `None` if there are none.

    The newest goes last: until then it is the one to resume from, as if nothing had been moved.
    """
    later = [s for s in saved_steps(folder) if s > step]
    if not later:
        return None
    names = (f"abandoned-from-{step}{f'-{k}' if k > 1 else ''}" for k in itertools.count(1))
    aside = next(path for path in (Path(folder) / name for name in names) if not path.exists())
    aside.mkdir()
    for path in (p for s in later for p in reversed(stored(folder, s))):
        path.replace(aside / path.name)
        if sidecar(path).exists():
            sidecar(path).replace(aside / sidecar(path).name)
    sync_folder(Path(folder))
    return aside


def prune(
    folder: str | Path, newest: int, keep_last: int, keep_every: int, good: int | None = None, best: int | None = None
) -> None:
    """Delete the checkpoints before the last `keep_last` (0: none) up to step `newest`, but for the multiples of `keep_every`.

    The newest one up to step `good` is kept too: after that step the run has not been sound. So is that of step `best`.
    """
    steps = [step for step in saved_steps(folder) if step <= newest]
    last_good = max((step for step in steps if good is not None and step <= good), default=None)
    for step in steps[:-keep_last] if keep_last else []:
        if step not in (last_good, best) and (not keep_every or step % keep_every):
            for path in stored(folder, step):
                delete_checkpoint(path)


def step_path(folder: str | Path, step: int, form: str | None = None) -> Path:
    """The checkpoint of a step, in a run's `checkpoints` folder, as it is stored there or in a `form` of `FORMS`."""
    if form is None:
        return next(iter(stored(folder, step)), step_path(folder, step, FILE))
    return Path(folder) / f"{step:07d}{form}"


def stored(folder: str | Path, step: int) -> list[Path]:
    """What is there of a step's checkpoint; the first counts."""
    return [path for path in (step_path(folder, step, form) for form in FORMS) if os.path.lexists(path)]


def saved_steps(folder: str | Path) -> list[int]:
    """The steps of the checkpoints in a run's `checkpoints` folder, ascending; none where there is no such folder."""
    try:
        names = [path.name for path in Path(folder).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:  # not to be taken for an empty folder
        raise Unreadable(Path(folder), error) from None
    matches = (re.fullmatch(r"([0-9]{7}|[1-9][0-9]{7,})\.(pt|dcp|dcp\.old)", name) for name in names)
    return sorted({int(match[1]) for match in matches if match})


def load(path: Path, *, verify: bool = False, lazy: bool = False) -> dict[str, Any]:
    """The training state in a file or a folder of parts; with `lazy` what the parts hold is left in them (`sharded.fill`).

    Raises as `tensor_files.load`.
    """
    if not sharded.is_sharded(path):
        return tensor_files.load(path, verify=verify)
    if verify:
        sharded.Checksum(path, reread=True).check()
    record = sharded.read_record(path)
    return record if lazy else sharded.read(path, record)


def load_step(folder: str | Path, step: int, *, lazy: bool = False) -> dict[str, Any]:
    """The checkpoint of a step, compared with its checksum. Raises as `load`, and where it records another step."""
    path = step_path(folder, step)
    state = load(path, verify=True, lazy=lazy)
    if type(state.get("step")) is not int or state["step"] != step:
        raise UserError(f"{path}: does not record step {step}")
    return state


def load_newest(folder: str | Path, warn: Callable[[str], None], *, lazy: bool = False) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, `None` where the folder has none; `warn(message)` tells of each one passed over.

    Raises:
        Unreadable: one that may be whole could not be read; an older one is not taken for it.
        UserError: there are checkpoints, but none is whole.
    """
    passed: list[str] = []
    for step in reversed(saved_steps(folder)):
        try:
            state = load_step(folder, step, lazy=lazy)
        except Unreadable:
            raise
        except UserError as error:
            passed.append(str(error))
            continue
        for message in passed:
            warn(f"{message}; passed over for step {step}")
        return state
    if passed:
        raise UserError(f"none of the checkpoints can be resumed; move them away to start anew: {'; '.join(passed)}")
    return None
