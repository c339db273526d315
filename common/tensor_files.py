"""Files of tensors that may come from anywhere: npy, safetensors, `torch.save`d dicts, and their checksums.

A `torch.save`d file is always read with PyTorch's restricted unpickler: a file that carries code is refused and nothing of it
runs.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from common.errors import UserError, first_line
from common.file_facts import known_sha256, recall
from common.files import file_sha256, written_aside


def npy_bytes(array: np.ndarray) -> bytes:
    """An npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def npy_array(content: bytes) -> np.ndarray:
    """The array of an npy file; ValueError if it is broken."""
    if content[:6] != b"\x93NUMPY":
        raise ValueError("does not start as an npy file does")
    try:
        return np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # NumPy evaluates the header: a damaged one raises whatever Python's parser does
        raise ValueError(first_line(error)) from None


PRETRAINED = "model.safetensors"  # the weights in a folder of `save_pretrained`


def sidecar(path: Path) -> Path:
    """The file that holds the checkpoint's SHA-256."""
    return path.with_name(path.name + ".sha256")


class HashingFile:
    """A file that hashes what is written to it.

    `torch.save` cannot take an error in the middle of a file: the first one is kept, what follows is dropped, `close` raises it.
    """

    def __init__(self, path: Path):
        self.file, self.sha256, self.error = path.open("wb"), hashlib.sha256(), None

    def write(self, data: Buffer) -> int:
        """The number of bytes taken, all of them, whatever becomes of them."""
        self._try(self.file.write, data)
        self.sha256.update(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Hand over to the system what was written."""
        self._try(self.file.flush)

    def close(self) -> None:
        """On the disk, or the error that kept it from getting there."""
        with self.file:
            self.flush()
            self._try(os.fsync, self.file.fileno())
            if self.error is not None:
                raise self.error

    def _try(self, action: Callable, *arguments: Any) -> None:
        if self.error is None:
            try:
                action(*arguments)
            except OSError as error:
                self.error = error


class Unreadable(UserError):
    """The system could not read a file (no memory, no permission, an I/O error), which says nothing of what is in it."""

    def __init__(self, path: Path, error: BaseException):
        reason = (
            error.strerror if isinstance(error, OSError) else "not enough memory" if isinstance(error, MemoryError) else None
        )
        super().__init__(f"{path}: cannot be read: {reason or first_line(error)}")


# What PyTorch says in a RuntimeError where memory is short.
_NO_MEMORY = re.compile(r"unable to mmap|allocate|bad_alloc|(out of|not enough) memory", re.IGNORECASE)


def load(path: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """The dict in a checkpoint file, on the CPU, memory-mapped where its format allows.

    Raises:
        Unreadable: the file may be whole, but memory, permissions or the disk do not allow to read it.
        UserError: missing, truncated, not a checkpoint, carrying code, or (with `verify`) not matching its checksum.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint" + (f": a folder without {PRETRAINED}" if path.is_dir() else ""))
        if verify:
            Checksum(path, reread=True).check()
        state = _unpickle(path)
    except (OSError, MemoryError) as error:
        raise Unreadable(path, error) from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    return state


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|(?:[Cc]all|global) ([\w.]+)", str(error))
        if found:
            name = found.group(1) or found.group(2)
            raise UserError(
                f"{path}: refused: it carries code ({name}), nothing of which was run; only tensors and plain containers are loaded"
            ) from None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever damaged bytes make of the unpickler
        if _NO_MEMORY.search(str(error)):
            raise Unreadable(path, error) from None
    file_sha256(path)  # OSError, if it was the disk
    raise UserError(f"{path}: truncated, or not a checkpoint")


class Checksum:
    """A checkpoint's SHA-256. Where it has a sidecar, a thread computes it while the file is read and its model is built.

    With `reread`, the file is read even if it is known not to have been written to since its SHA-256 was last computed.
    """

    def __init__(self, path: Path, *, reread: bool = False):
        self.path, self._error = path, None
        self._hash = file_sha256 if reread else known_sha256
        self._sha256 = None if reread else recall(path, "sha256")
        self._thread = threading.Thread(target=self._compute, name="checksum", daemon=True)
        self._recorded = sidecar(path).is_file()
        if self._recorded and self._sha256 is None:
            self._thread.start()

    def _compute(self) -> None:
        try:
            self._sha256 = self._hash(self.path)
        except Exception as error:
            self._error = error

    def value(self) -> str:
        """In hexadecimal; computed once. Raises Unreadable."""
        if self._sha256 is None:
            if self._thread.ident is None:
                self._thread.start()
            self._thread.join()
        if self._error is not None:
            raise Unreadable(self.path, self._error)
        assert self._sha256 is not None
        return self._sha256

    def check(self) -> None:
        """Raises UserError where the sidecar says another; a file without one is taken as it is."""
        if self._recorded and self.value() != recorded_sha256(self.path):
            raise UserError(f"{self.path}: damaged or replaced: it does not match its checksum {sidecar(self.path).name}")


def recorded_sha256(path: Path) -> str | None:
    """What the checkpoint's sidecar says, `None` where there is none or it holds no SHA-256."""
    found = re.search(rb"\b[0-9a-fA-F]{64}\b", sidecar(path).read_bytes()) if sidecar(path).is_file() else None
    return found[0].decode().lower() if found else None


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises UserError where it is none."""
    with _open_safetensors(path) as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The metadata alone. Raises as `load_safetensors`."""
    with _open_safetensors(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, MemoryError) as error:
        raise Unreadable(path, error) from None
    except Exception as error:  # SafetensorError, and whatever odd types of numbers make of it
        raise UserError(f"{path}: truncated, or not a safetensors file: {first_line(error)}") from None


def save_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str], *, fsync: bool = False) -> None:
    """Write a safetensors file atomically; `fsync`: it survives a power cut. Raises WriteError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with written_aside(path, fsync=fsync) as aside:
        try:
            save_file(tensors, aside, metadata | {"format": "pt"})
        except SafetensorError as error:  # which it makes of an OSError, too
            raise OSError(first_line(error)) from None
        _sort_metadata(aside)
        aside.chmod(0o644)  # safetensors leaves it readable by its owner alone


def _sort_metadata(path: Path) -> None:
    """The metadata in one order, where safetensors' is another each time: equal content has an equal SHA-256."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))
