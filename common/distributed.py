"""Processes that belong together: data workers and the ranks of a launcher. None of them outlives the one it works for."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from common.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState

PR_SET_PDEATHSIG = 1


LONG_WAIT = timedelta(days=7)  # for a process that works alone while the others wait
WAIT = timedelta(minutes=30)  # for processes that do the same, but for compiling and reading; PyTorch's default on CUDA is 10


PATIENCE = 3  # seconds in which workers may finish what they do


# What accelerate sets for the one process that it starts without torchrun; nobody sets all of them by hand.
ACCELERATE = {"ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"}


def end_with_parent(number: int | None = None) -> None:
    """Linux sends this process the signal `number` (SIGKILL) once its parent has ended, however it ended. Elsewhere nothing happens."""
    if sys.platform == "linux":
        number = int(signal.SIGKILL if number is None else number)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        started_by = multiprocessing.parent_process()
        if started_by is not None and os.getppid() != started_by.pid:  # it ended before this process could ask
            os.kill(os.getpid(), number)


def end_with_launcher() -> None:
    """Under torchrun or `accelerate launch`: the end of the launcher is a SIGTERM to this process.

    `accelerate launch` passes no signal on to a single process. A process that the user started goes on without its parent.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.keys() >= ACCELERATE:
        end_with_parent(signal.SIGTERM)


def cpu_count() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wait_time(minutes: float | None, alone: bool = True) -> timedelta:
    """How long processes wait for each other: `minutes` where given, else `LONG_WAIT` where one works `alone` at times, or `WAIT`."""
    return (LONG_WAIT if alone else WAIT) if minutes is None else timedelta(minutes=minutes)


def start_processes(minutes: float | None = None) -> "PartialState":
    """This process among those of torchrun or `accelerate launch`, or alone.

    Args:
        minutes: see `wait_time`; in all that starts its processes here one of them works alone at times.

    Raises:
        UserError: WORLD_SIZE is not the number of processes that run.
    """
    from accelerate import PartialState  # 2 s of import, for what runs in one process

    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=wait_time(minutes))
    check_world_size(state.num_processes)
    return state


def check_world_size(processes: int) -> None:
    """Raise `UserError` if the launcher's WORLD_SIZE is not the number of processes that found each other."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world != str(processes):
        raise UserError(
            f"WORLD_SIZE is {world}, but {processes} process(es) run; start with torchrun --nproc_per_node {world}, or unset it"
        )


@contextlib.contextmanager
def data_workers(loader: DataLoader, hint: str) -> Iterator[Iterator[Any]]:
    """An iterator over `loader`, whose worker processes end with this context, however it is left.

    Otherwise a failure would never end: its traceback keeps the iterator, and at exit Python waits for workers that wait for
    it. A worker that the system killed raises `UserError`, which closes with `hint`.
    """
    others = set(multiprocessing.active_children())
    batches: Any = None
    try:
        batches = iter(loader)
        yield batches
    except Exception as error:
        if isinstance(error, UserError) or not (killed := _killed(getattr(batches, "_workers", []))):
            raise
        # Whatever it was: a batch that the worker had not handed over is met before the worker's end is reported.
        raise UserError(f"a data worker was ended by {killed}; {hint}", local=True) from None
    finally:
        workers = set(multiprocessing.active_children()) - others
        try:
            _end(workers, batches)
        except RuntimeError:  # PyTorch reports a killed worker once, wherever this process then is
            _end(workers, batches)


def _killed(workers: list[Any]) -> str:
    """The signal that ended one of them, and what that may mean; an empty text where none was."""
    number, deadline = None, time.monotonic() + 0.5  # its connections close a moment before its end is known
    while workers and number is None and time.monotonic() < deadline:
        with contextlib.suppress(RuntimeError):  # PyTorch's report of it
            number = next((-w.exitcode for w in workers if (w.exitcode or 0) < 0), None)
            time.sleep(0.01)
    if number is None:
        return ""
    name = signal.Signals(number).name
    return name + {"SIGKILL": " (out of memory?)", "SIGBUS": " (out of shared memory?)"}.get(name, "")


def _end(workers: set[Any], batches: Any) -> None:
    def kill() -> None:
        for worker in workers:
            worker.kill()

    late = threading.Timer(PATIENCE, kill)
    late.start()
    try:
        if workers and batches is not None:
            batches._shutdown_workers()  # its queues and pinning thread too
    finally:
        late.cancel()
        kill()
        for worker in workers:
            worker.join()
