"""Stopping early, together: a signal to any process of a run ends all of them after the same step.

Nothing is added to the steps, neither a collective nor a wait for the device. A thread of each process looks twice a second
into the store through which the processes found each other. Once a signal stands there, each thread notes the step that its
process is in, and the process begins no other before the largest of these is known: the step after which all of them stop.
"""

import contextlib
import signal
import threading

import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
POLL = 0.5  # seconds between looks into the store


class Preemption:
    """A context in which SIGTERM and SIGUSR1 are remembered instead of ending the process.

    `signal`: the number of the one that came, to this process or to another; 0 where none did.
    """

    def __init__(self):
        self.signal = 0
        self._step = 0  # the one under way
        self._stop_after: int | None = None
        self._noted = False  # the step under way is noted: none begins before `_stop_after` is known
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        self.end()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def watch(self, step: int) -> None:
        """From here on the processes agree; all of them have done `step`."""
        self._step = step
        if dist.is_initialized() and dist.get_world_size() > 1:
            # With a connection of its own: whoever waits for an answer holds up the others on the same one.
            store = dist.distributed_c10d._get_default_store().clone()
            self._thread = threading.Thread(target=self._agree, args=(store,), name="preemption", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """No process asks any more."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def reached(self, step: int) -> bool:
        """To be asked before the first step and after each: was `step` the last one?"""
        with self._changed:
            self._changed.wait_for(lambda: not self._noted or self._stop_after is not None)
            if self._thread is None and self.signal:
                self._stop_after = step
            if self._stop_after is not None and step >= self._stop_after:
                return True
            self._step = step + 1
            return False

    def _remember(self, number: int, _) -> None:
        self.signal = self.signal or number

    def _agree(self, store: dist.Store) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        with contextlib.suppress(RuntimeError):  # the store has gone, and the run with it
            while not store.check(["preemption/signal"]):
                if self.signal:
                    store.set("preemption/signal", str(self.signal))
                elif self._ended.wait(POLL):
                    return
            with self._changed:
                self._noted = True
            store.set(f"preemption/step/{rank}", str(self._step))
            if store.add("preemption/noted", 1) == world:  # the last one tells the others
                steps = store.multi_get([f"preemption/step/{r}" for r in range(world)])
                store.set("preemption/stop_after", str(max(int(s) for s in steps)))
            while not store.check(["preemption/stop_after"]):
                if self._ended.wait(POLL / 5):
                    return
            with self._changed:
                self.signal = int(store.get("preemption/signal"))
                self._stop_after = int(store.get("preemption/stop_after"))
                self._changed.notify_all()
