"""Processes that belong together: data workers and the ranks of a launcher. None of them outlives the one it works for."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from errors import UserError, first_line

PR_SET_PDEATHSIG = 1
PATIENCE = 3  # seconds in which workers may finish what they do
# What accelerate sets for the one process that it starts without torchrun; nobody sets all of them by hand.
ACCELERATE = {"ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"}


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Linux sends this process the signal `number` once its parent has ended, however it ended. Elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


def end_with_launcher() -> None:
    """Under torchrun or `accelerate launch`: the end of the launcher is a SIGTERM to this process.

    `accelerate launch` passes no signal on to a single process. A process that the user started goes on without its parent.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.keys() >= ACCELERATE:
        end_with_parent(signal.SIGTERM)


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
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):  # also in what a worker raised itself, but not in front
            raise
        raise UserError(f"a data worker ended: {first_line(error)}; {hint}", local=True) from None
    finally:
        _end(set(multiprocessing.active_children()) - others, batches)


def _end(workers: set[Any], batches: Any) -> None:
    def kill() -> None:
        for worker in workers:
            worker.kill()

    late = threading.Timer(PATIENCE, kill)
    late.start()
    try:
        # Its queues and pinning thread too. A killed worker may be reported once more.
        with contextlib.suppress(RuntimeError):
            if workers and batches is not None:
                batches._shutdown_workers()
    finally:
        late.cancel()
        kill()
        for worker in workers:
            worker.join()
