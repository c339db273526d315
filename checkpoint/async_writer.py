"""Saving checkpoints in the background."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from checkpoint import sharded
from checkpoint.training_state import FILE, FOLDER, delete_checkpoint, prune, save, step_path, stored
from common.errors import UserError

ALIGNMENT = 64  # bytes


class HostMemory:
    """One block of the host's memory for the tensors of a checkpoint; each of them has a storage of its own in it.

    Args:
        size: bytes.
        pinned: page-locked, so that copies from a GPU run beside the host. PyTorch's own page-locked memory takes up to twice the
            size: it is rounded up to a power of two.
    """

    def __init__(self, size: int, *, pinned: bool):
        self.size, self.taken = size, 0
        self._block = np.empty(size, np.uint8)
        self._registered = 0
        if pinned and size:
            runtime, address = _cuda_runtime(), self._block.ctypes.data
            if runtime.cudaHostRegister(address, size, 0) == runtime.cudaError.success:  # else copies wait, and that is all
                self._registered = address

    def __del__(self) -> None:
        if self._registered:
            _cuda_runtime().cudaHostUnregister(self._registered)

    def take(self, like: Tensor) -> Tensor:
        """The next tensor of this shape and type, on the host."""
        start = self.taken
        self.taken += _room(like)
        if not like.numel():
            return torch.empty(like.shape, dtype=like.dtype)
        return torch.frombuffer(self._block, dtype=like.dtype, count=like.numel(), offset=start).view(like.shape)


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


class Writer:
    """Saves a run's checkpoints in the background: `save` returns once the state is copied to memory of the host.

    One thread, one write at a time; the memory (page-locked where the state is on a GPU) is kept from one checkpoint to the next.
    A failing write is told to `tell`, harms no file and is kept in `error` until another succeeds.

    group: for states that are split over the processes, each of which then calls `save`: all of them, on the CPU, used by nobody
        else. They write a folder of parts (`checkpoint.sharded`).
    """

    def __init__(
        self,
        folder: str | Path,
        keep_last: int,
        keep_every: int,
        tell: Callable[[str], None],
        group: dist.ProcessGroup | None = None,
    ):
        self.folder, self.keep_last, self.keep_every, self.tell = Path(folder), keep_last, keep_every, tell
        self._group = group
        self.error: Exception | None = None
        self._best: int | None = None
        self._newest: tuple[int, int | None] | None = None  # the step of the last write, and `good` with it
        self._memory = HostMemory(0, pinned=False)
        self._thread: threading.Thread | None = None

    def save(self, step: int, state: dict[str, Any], good: int | None = None) -> None:
        """Copy `state` and begin to write it; waits for the write before, whose memory it needs. good: see `prune`."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(step, self.copy(state), good), name="checkpoint writer")
        self._thread.start()

    def wait(self) -> None:
        """Until the write under way has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def keep_best(self, step: int | None) -> None:
        """Never delete the checkpoint of `step`, and no longer keep the one that was the best before; after `wait`."""
        if step != self._best:
            self._best = step
            if self._newest is not None:
                self._prune(*self._newest)

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` in the kept memory, made the first time."""
        tensors = [sharded.local(x) for x in tree_leaves(state) if isinstance(x, Tensor)]
        size = sum(map(_room, tensors))
        if size != self._memory.size:
            self._memory = HostMemory(0, pinned=False)  # gives the old one back first
            self._memory = HostMemory(size, pinned=any(x.is_cuda for x in tensors))
        self._memory.taken = 0
        copied = self._copy(state)
        if torch.accelerator.is_available():
            torch.accelerator.current_stream().synchronize()
        return copied

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            own = sharded.local(value)
            return sharded.with_local(value, self._memory.take(own).copy_(own.detach(), non_blocking=True))
        if isinstance(value, dict):
            return {k: self._copy(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._copy, value))
        return value

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is written."""
        return step_path(self.folder, step, FILE if self._group is None else FOLDER)

    def _write(self, step: int, state: dict[str, Any], good: int | None) -> None:
        try:
            if self._group is None:
                save(self.path(step), state)
            else:
                sharded.save(self.path(step), state, self._group)
            self.error = None
        except Exception as error:  # whatever a file system may come up with
            self.error = error
            self.tell(f"{self.path(step)}: could not be written: {error}; the checkpoints before it are whole")
            return
        self._newest = step, good
        self._prune(step, good)

    def _prune(self, step: int, good: int | None) -> None:
        if self._group is not None and dist.get_rank() > 0:
            return
        try:
            for path in stored(self.folder, step):
                if path != self.path(step):  # written before in another form
                    delete_checkpoint(path)
            prune(self.folder, step, self.keep_last, self.keep_every, good, self._best)
        except (OSError, UserError) as error:
            self.tell(f"{self.folder}: old checkpoints could not be deleted: {error}")
