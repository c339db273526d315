"""Stopping early, together: a signal to any process of a run ends all of them after the same step.

Nothing is added to the steps, neither a collective nor a wait for the device. A thread of each process looks twice a second
into the store through which the processes found each other. Once a signal stands there, each thread notes the step that its
process is in, and the process begins no other before the largest of these is known: the step after which all of them stop.

The same thread ends its process where the run is lost: another process failed, or the store has gone, with its launcher. A
process that waits for the others in a collective would not notice, and heeds no SIGTERM.

Before the first step there is nothing to agree on, but a process may wait for others that never come. Another thread, which the
interpreter wakes at a signal even then, ends the process if it does not get to its first step in time.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import Store

from common import early_signals
from common.early_signals import SIGNALS
from common.errors import UserError, speaks_for_machine

POLL = 0.5  # seconds between looks into the store


GRACE = 7.0  # seconds that a process of a lost run has for its own end


# Seconds from a signal to the end of a process that is still being set up: two thirds of what torchrun gives.
SETUP_GRACE = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30)) * 2 / 3


FAILED = "preemption/failed"  # the first process that failed


class Preemption:
    """A context in which SIGTERM and SIGUSR1 are remembered instead of ending the process.

    `signal`: the number of the one that came, to this process or to another; 0 where none did.
    `at_abandon`: called before a set-up that does not end is abandoned.
    """

    def __init__(self):
        self.signal = 0
        self.at_abandon: Callable[[], None] = lambda: None
        self._step = 0  # the one under way
        self._stop_after: int | None = None
        self._noted = False  # the step under way is noted: none begins before `_stop_after` is known
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._lost = ""  # why this run cannot continue
        self._store: Store | None = None
        self._thread: threading.Thread | None = None
        self._is_set_up = threading.Event()
        self._wakeup: tuple[socket.socket, socket.socket, int] | None = None  # both ends, and the descriptor before
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self._guard_setup()
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
            for number in early_signals.received[:1]:
                signal.raise_signal(number)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end()
        failed = None  # the first process that did
        if kind not in (None, SystemExit) and self._store is not None:
            with contextlib.suppress(RuntimeError):  # the store has gone
                failed = int(self._store.compare_set(FAILED, "", str(dist.get_rank())))
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._wakeup is not None:
            ours, interpreters, before = self._wakeup
            signal.set_wakeup_fd(before)
            interpreters.close()  # which ends the thread, as does this, where it counts down
            self._is_set_up.set()
            self._guard.join()  # a thread that still runs when the interpreter ends aborts the process
            ours.close()
        if failed is not None and kind is not None and issubclass(kind, RuntimeError) and failed != dist.get_rank():
            # What a collective says of a process that has gone; that one tells why.
            raise UserError(f"ended, since process {failed} failed") from None

    def watch(self, step: int) -> None:
        """From here on the processes agree; all of them have done `step`."""
        self._is_set_up.set()
        self._step = step
        if dist.is_initialized() and dist.get_world_size() > 1:
            # With a connection of its own: whoever waits for an answer holds up the others on the same one.
            store = distributed_c10d._get_default_store()
            self._store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
            self._thread = threading.Thread(target=self._watch, args=(self._store,), name="preemption", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """No process asks any more."""
        self._is_set_up.set()
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def reached(self, step: int) -> bool:
        """To be asked before the first step and after each: was `step` the last one? `UserError` where the run is lost."""
        with self._changed:
            self._changed.wait_for(lambda: not self._noted or self._stop_after is not None or self._lost)
            if self._lost:
                raise UserError(self._lost)
            if self._thread is None and self.signal:
                self._stop_after = step
            if self._stop_after is not None and step >= self._stop_after:
                return True
            self._step = step + 1
            return False

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or number

    def _guard_setup(self) -> None:
        ours, interpreters = socket.socketpair()
        interpreters.setblocking(False)
        # The interpreter writes a signal's number there at once; a handler waits until the main thread is back in Python.
        self._wakeup = (ours, interpreters, signal.set_wakeup_fd(interpreters.fileno(), warn_on_full_buffer=False))
        self._guard = threading.Thread(target=self._abandon_setup, args=(ours,), name="set-up guard", daemon=True)
        self._guard.start()

    def _abandon_setup(self, wakeup: socket.socket) -> None:
        number = 0
        while number not in SIGNALS:
            try:
                number = next(iter(wakeup.recv(1)))
            except (StopIteration, OSError):  # the context has been left
                return
        if not self._is_set_up.wait(SETUP_GRACE):
            self.at_abandon()
            _say(f"{signal.Signals(number).name}: stopped before the first step, while waiting for other processes")
            os._exit(128 + number)

    def _watch(self, store: Store) -> None:
        try:
            while not store.check([FAILED]):
                self._agree(store)
                is_agreeing = self._noted and self._stop_after is None
                if self._ended.wait(POLL / 5 if is_agreeing else POLL):
                    return
            self._lose(f"ended, since process {int(store.get(FAILED))} failed")
        except RuntimeError:
            self._lose("ended, since the launcher or the first process has gone")

    def _agree(self, store: Store) -> None:
        """The next of what is to be done once a signal has come, until `_stop_after` is known."""
        rank, world = dist.get_rank(), dist.get_world_size()
        if self.signal and not store.check(["preemption/signal"]):
            store.set("preemption/signal", str(self.signal))
        if not self._noted and store.check(["preemption/signal"]):
            with self._changed:
                self._noted = True
            store.set(f"preemption/step/{rank}", str(self._step))
            if store.add("preemption/noted", 1) == world:  # the last one tells the others
                steps = store.multi_get([f"preemption/step/{r}" for r in range(world)])
                store.set("preemption/stop_after", str(max(int(s) for s in steps)))
        if self._noted and self._stop_after is None and store.check(["preemption/stop_after"]):
            with self._changed:
                self.signal = int(store.get("preemption/signal"))
                self._stop_after = int(store.get("preemption/stop_after"))
                self._changed.notify_all()

    def _lose(self, why: str) -> None:
        """`reached` raises; if the process does not come to that, nor to a failure of its own, it ends here."""
        with self._changed:
            self._lost = why
            self._changed.notify_all()
        if not self._ended.wait(GRACE):
            _say(why)
            os._exit(1)


def _say(message: str) -> None:
    if speaks_for_machine():
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
