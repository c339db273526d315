"""`train.py --profile-steps A-B`: what those steps do and when, and on a GPU what holds its memory."""

import contextlib
import re
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from common.errors import UserError
from common.logging import log
from training.run_dir import warn_if_unwritable

FOLDER = "profile"  # in the run folder


def parse_steps(text: str) -> range:
    """The steps of "A-B", both included, or of "A". Raises UserError."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"--profile-steps {text}: must be a step, or a range of steps A-B with 1 ≤ A ≤ B, e.g. 10-12")
    return range(first, last + 1)


class StepProfiler:
    """A context around the training loop, in which `begin_step` is called before each step, in rank 0 alone.

    After the last of the steps it writes profile/trace-A-B.json, for Perfetto or chrome://tracing, and on CUDA
    profile/memory-A-B.pickle, for https://pytorch.org/memory_viz. A run that ends earlier writes what it has by then.

    Args:
        steps: see `parse_steps`; an empty text profiles nothing.
        run_dir: the run folder.
    """

    def __init__(self, steps: str | None, run_dir: Path, device: torch.device):
        self.steps = parse_steps(steps) if steps else range(0)
        self.folder, self.device = run_dir / FOLDER, device
        self._profile: profile | None = None
        self._first = self._last = 0

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._finish()

    def begin_step(self, step: int) -> None:
        """Start the profiler where `step` is the first to profile, and end it where the one before was the last."""
        if step not in self.steps:
            self._finish()
            return
        if self._profile is None:
            self._start(step)
        self._last = step

    def _start(self, step: int) -> None:
        self._first = step
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()

    def _finish(self) -> None:
        if self._profile is None:
            return
        running, self._profile = self._profile, None
        running.stop()
        names = f"{self._first}-{self._last}"
        with warn_if_unwritable(self.folder), contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                stack.callback(torch.cuda.memory._record_memory_history, enabled=None)
            self.folder.mkdir(exist_ok=True)
            trace = self.folder / f"trace-{names}.json"
            running.export_chrome_trace(str(trace))
            if self.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-{names}.pickle"))
            log.info(f"profile of the steps {names}: {trace}")
