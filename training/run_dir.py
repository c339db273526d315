"""The folder of a run: config.yaml, metrics.jsonl, status.json, best.json, log.txt, samples/, checkpoints/, snapshots/, and the lock of whoever writes there."""

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import broadcast_object_list

from checkpoint import snapshots, training_state
from common.errors import UserError
from common.files import Busy, FolderLock, WriteError, remove_leftovers, write_atomically
from common.logging import log, warn
from config.options import TrainConfig
from training.preemption import Preemption

LOCK = "run.lock"  # in the run folder while a run writes there


METRICS = "metrics.jsonl"
FILES = {"config.yaml", METRICS, "status.json", "best.json"}  # written aside, then renamed


class RunDir:
    """The folder of a run, OUTPUT_DIR/EXP_NAME. Rank 0 alone writes there; making this object touches nothing.

    Beside the checkpoints, a file that cannot be written is a warning once the run has begun: disks fill, and get emptied.
    """

    def __init__(self, config: TrainConfig, is_main: bool):
        self.config, self.is_main = config, is_main
        self.path = Path(config.output_dir) / config.exp_name
        self.checkpoints, self.samples = self.path / "checkpoints", self.path / "samples"
        self.snapshots = self.path / snapshots.FOLDER

    # ------------------------------------------------------------------------------------------------ before a run

    def check(self) -> list[int]:
        """The steps of the checkpoints that are there. Raises UserError where --resume-step does not fit them."""
        resume_step, steps = self.config.resume_step, training_state.saved_steps(self.checkpoints)
        if resume_step == 0 and steps:
            raise UserError(
                f"{self.path}: already holds checkpoints (newest: step {steps[-1]}); "
                "use --resume-step -1 to resume it, or another --exp-name"
            )
        if resume_step > 0 and resume_step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise UserError(f"--resume-step {resume_step}: no such checkpoint in {self.checkpoints}; there are: {there}")
        return steps

    @contextlib.contextmanager
    def lock(self, preemption: Preemption) -> Iterator[None]:
        """Keep other runs out of the folder, after waiting up to --wait-for-lock minutes for the one in it.

        Rank 0 has the lock and tells the others. A signal ends the waiting.
        """
        held = self._acquire(preemption)
        try:
            yield
        finally:
            if held is not None:
                held.release()

    def _acquire(self, preemption: Preemption) -> FolderLock | None:
        minutes, lock, is_waiting = self.config.wait_for_lock, None, False
        deadline = time.monotonic() + 60 * minutes
        while True:
            problem, number, is_last = "", preemption.signal, time.monotonic() >= deadline
            if self.is_main:
                try:
                    lock = FolderLock(self.path / LOCK, self.path, warn)
                except Busy as busy:
                    problem = f"{busy}, or give --wait-for-lock MINUTES"
                except OSError as error:
                    problem, is_last = str(self._cannot_write(error)), True
            # So often that no time-out of a collective ends the waiting.
            problem, number, is_last = broadcast_object_list([problem, number, is_last])
            if not problem:
                return lock
            if is_last:
                raise UserError(problem)
            if number:
                warn(f"{signal.Signals(number).name}: stopped while waiting for another run in {self.path}")
                raise SystemExit(128 + number)
            if not is_waiting:
                warn(f"{problem.partition(';')[0]}; waiting up to {minutes:g} minutes for its end")
            is_waiting = True
            time.sleep(1)

    def _cannot_write(self, error: OSError) -> UserError:
        where = error.filename or self.path
        return UserError(f"--output-dir {self.config.output_dir}: cannot write {where}: {error.strerror}")

    def begin(self, step: int, message: str = "") -> None:
        """Make the folder, or bring it to the step that the run resumes from; `message` goes to the log."""
        if not self.is_main:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.samples.mkdir(exist_ok=True)
            training_state.remove_unfinished(self.checkpoints)
            remove_leftovers(self.path, FILES.__contains__)
            self._start_log()
            if message:
                log.info(message)
            write_atomically(self.path / "config.yaml", yaml.safe_dump(dataclasses.asdict(self.config), sort_keys=False))
            aside = training_state.set_aside(self.checkpoints, step)
            snapshots.begin(self.snapshots, step, aside)
            if aside:
                warn(f"resuming from step {step}; the checkpoints after it are now in {aside}")
            trim_metrics(self.path / METRICS, step)
            self.write_status("running", step)
        except OSError as error:
            raise self._cannot_write(error) from None

    def _start_log(self) -> None:
        handler = logging.FileHandler(self.path / "log.txt")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        handler.handleError = lambda record: None  # a full disk is reported where it matters
        log.handlers[:] = [handler]
        log.setLevel(logging.INFO)

    # --------------------------------------------------------------------------------------------------- in a run

    def write_status(self, state: str, step: int) -> None:
        """status.json: running, preempted, finished or failed, and the step."""
        if self.is_main:
            with warn_if_unwritable(self.path / "status.json"):
                write_atomically(self.path / "status.json", json.dumps({"state": state, "step": step}) + "\n")

    def append_metrics(self, step: int, values: Mapping[str, float | None]) -> dict[str, float]:
        """One line of metrics.jsonl: null for what could not be measured or is not finite. Returns the rest."""
        if not self.is_main:
            return {}
        known = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
        with warn_if_unwritable(self.path / METRICS):
            line: dict[str, Any] = {"step": step} | dict.fromkeys(values) | known
            append_line(self.path / METRICS, json.dumps(line, allow_nan=False) + "\n")
        log.info(f"step {step}: " + ", ".join(f"{k} {v:.6g}" for k, v in known.items()))
        return known

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that are whole."""
        path = self.path / METRICS
        lines = path.read_bytes().splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if math.isfinite(step_of_line(line))]

    def newest_checkpoint(self, up_to: int | None = None) -> str:
        """The newest one of the run (up to a step), as messages name it."""
        steps = [step for step in training_state.saved_steps(self.checkpoints) if up_to is None or step <= up_to]
        return str(training_state.step_path(self.checkpoints, steps[-1])) if steps else "none: nothing was saved before"


def trim_metrics(path: Path, step: int) -> None:
    """Move the lines of metrics.jsonl after `step`, which will be written again, to metrics.dropped.jsonl beside it."""
    content = path.read_bytes() if path.is_file() else b""
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    kept = [line for line in lines if step_of_line(line) <= step]
    dropped = [line for line in lines if not step_of_line(line) <= step]
    if dropped:
        append_line(path.with_name("metrics.dropped.jsonl"), b"".join(line + b"\n" for line in dropped))
    if dropped or not content.endswith(b"\n"):
        write_atomically(path, b"".join(line + b"\n" for line in kept))


def append_line(path: Path, lines: str | bytes) -> None:
    """Append the whole of it or nothing. Raises WriteError where that is not possible."""
    data = lines if isinstance(lines, bytes) else lines.encode()
    try:
        with path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise WriteError(path, error) from None


@contextlib.contextmanager
def warn_if_unwritable(path: Path) -> Iterator[None]:
    """Turn an OSError into a warning that names `path`."""
    try:
        yield
    except OSError as error:
        warn(f"{path}: cannot be written: {error.strerror}")


def step_of_line(line: bytes) -> float:
    """The step that a line of metrics.jsonl records; infinity where it is damaged or cut short."""
    try:
        step = json.loads(line.decode())["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return math.inf
    return step if type(step) in (int, float) else math.inf
