"""Writing packed latents (data/packed.py): shards block after block, then labels, names and the index."""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.files import WriteError, encode_name, file_sha256, write_atomically
from common.tensor_files import npy_bytes
from data.packed import FORMAT, INDEX_FILE, LABELS_FILE, NAMES_FILE, shard_file
from models.vae import VAERecord


def write_index(
    path: Path, names: Sequence[str], labels: Sequence[int] | None, record: VAERecord, counts: Sequence[int]
) -> None:
    """Labels, names and index.json of the finished files of `counts` latents each: from here on the set is whole."""
    arrays = {NAMES_FILE: np.array([encode_name(name) for name in names])}
    if labels is not None:
        arrays[LABELS_FILE] = np.array(labels, dtype=np.int64)
    for file, array in arrays.items():
        write_atomically(path / file, npy_bytes(array), option="--dest")
    first = np.load(path / shard_file(0), mmap_mode="r")
    index = {
        "format": FORMAT,
        "shape": first.shape[1:],
        "dtype": str(first.dtype),
        "labelled": labels is not None,
        "vae": record.to_dict(),
        "sha256": {file: file_sha256(path / file) for file in arrays},
        "shards": [
            {"file": shard_file(n), "count": count, "sha256": sum_file(path, n).read_text().split()[0]}
            for n, count in enumerate(counts)
        ],
    }
    write_atomically(path / INDEX_FILE, json.dumps(index, indent=1), option="--dest")


def sum_file(path: Path, number: int) -> Path:
    """The checksum of a finished file, until the index holds it."""
    return path / f"{shard_file(number)}.sha256"


def shard_aside(path: Path, number: int) -> Path:
    """Where a file is filled. The name is the same for every process: the work of a stopped run is continued."""
    return path / f"{shard_file(number)}.tmp"


class ShardWriter:
    """One packed file, filled block after block aside and renamed when it holds `count` latents.

    Each block is on disk before the next is begun, so that of a stopped run's blocks all but the last are taken up again
    (`done`: how many latents that is; `count` where the file is finished).
    """

    def __init__(self, path: Path, number: int, count: int, shape: tuple[int, ...], dtype: np.dtype, block: int):
        self.path, self.count, self._sum = path / shard_file(number), count, sum_file(path, number)
        self._file: BinaryIO
        header = _header(count, shape, dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        if self._sum.exists() and self.path.exists() and self.path.stat().st_size == len(header) + count * size:
            self.done = count
            return
        self._aside = shard_aside(path, number)
        try:
            self._file = self._aside.open("r+b" if self._aside.exists() else "w+b")
            found = (self._aside.stat().st_size - len(header)) // (size * block) * block  # in whole blocks
            self.done = max(0, found - block) if self._file.read(len(header)) == header else 0
            self._file.seek(0)
            if not self.done:
                self._file.write(header)
            self._file.seek(len(header) + self.done * size)
            self._file.truncate()
        except OSError as error:
            raise WriteError(self.path, error, "--dest") from None

    def append(self, moments: np.ndarray) -> None:
        """The next latents (n, 2C, h, w), as the shard's type; the last of them finish it."""
        try:
            self._file.write(np.ascontiguousarray(moments).data)
            self._file.flush()
            os.fsync(self._file.fileno())
            self.done += len(moments)
            if self.done == self.count:
                self._file.close()
                # The checksum first: a file under its own name always has one.
                write_atomically(self._sum, f"{file_sha256(self._aside)}  {self.path.name}\n")
                self._aside.replace(self.path)
        except OSError as error:
            raise WriteError(self.path, error, "--dest") from None


def _header(count: int, shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    file = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()
