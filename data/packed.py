"""Packed latents: a few large npy files that training memory-maps, with an index.

packed/  index.json              count, shape, dtype, VAE record, and each file's size in latents and SHA-256; written last
         latents-00000.npy …     float32 or float16 (n, 2C, h, w), mean and std of the posterior; (n, 2, 2C, h, w) with those of
                                 the mirrored images
         labels.npy              int64 (count,); absent where unlabelled
         names.npy               bytes (count,): the file that each latent is under in `vae-sd/`, which pairs it with its image
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, first_line
from common.file_tree import open_regular, read_regular
from common.files import DataError, check_name, decode_name, parse_json
from data.latent_files import split_flips
from models.vae import VAERecord

INDEX_FILE, LABELS_FILE, NAMES_FILE = "index.json", "labels.npy", "names.npy"


FORMAT = 1


def shard_file(number: int) -> str:
    """The name of a packed file."""
    return f"latents-{number:05d}.npy"


class PackedLatents:
    """Packed latents for reading. What the object holds is mapped, so workers share it, and it is pickled by its path alone."""

    def __init__(self, path: Path):
        self.path = path
        index = read_index(path)
        self.record = VAERecord.from_dict(index["vae"], f"{path / INDEX_FILE}: vae")
        self.stored_shape, self.dtype = tuple(index["shape"]), np.dtype(index["dtype"])
        self.flips, self.shape = split_flips(self.stored_shape)
        counts = [shard["count"] for shard in index["shards"]]
        self._starts = np.cumsum([0, *counts])
        shards = [self._map(shard["file"], (shard["count"], *self.stored_shape), self.dtype) for shard in index["shards"]]
        self._shards = [shard.reshape(-1, *self.shape) for shard in shards]  # with flips, two rows of each latent
        self._names = self._map(NAMES_FILE, (len(self),), None)
        if self._names.dtype.kind != "S":
            raise UserError(f"{path / NAMES_FILE}: holds {self._names.dtype}; wanted: names as bytes")
        self.labels = self._map(LABELS_FILE, (len(self),), np.dtype(np.int64)) if index["labelled"] else None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return PackedLatents, (self.path,)

    def name(self, index: int) -> str:
        """The name of latent `index` in `vae-sd/`."""
        return check_name(decode_name(self._names[index]), self.path / NAMES_FILE)

    def where(self, index: int) -> str:
        """How messages name latent `index`."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self.path / shard_file(shard)}[{index - self._starts[shard]}]"

    @property
    def label_file(self) -> str:
        """How messages name the file of the labels."""
        return str(self.path / LABELS_FILE)

    def read(self, indices: Sequence[int], mirrored: Sequence[bool] | None = None) -> list[Tensor]:
        """float32 (2C, h, w) of each index, of the mirrored image where `mirrored` says so.

        They are views of one array, gathered from every file at once and in the order of the file. Raises DataError where a value
        is not finite.
        """
        wanted, starts = np.asarray(indices), self._starts
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"{self.path}: no latents {wanted.min()} … {wanted.max()}; it holds {len(self)}")
        if self.flips:
            wanted, starts = 2 * wanted + (0 if mirrored is None else np.asarray(mirrored)), 2 * starts
        order = np.argsort(wanted, kind="stable")
        ordered = wanted[order]
        bounds = np.searchsorted(ordered, starts)
        rows = np.empty((len(ordered), *self.shape), dtype=self.dtype)
        for shard in np.flatnonzero(np.diff(bounds)):
            first, last = bounds[shard], bounds[shard + 1]
            # mode clip: by the default, NumPy gathers into a buffer of its own first
            np.take(self._shards[shard], ordered[first:last] - starts[shard], axis=0, out=rows[first:last], mode="clip")
        if not np.isfinite(rows).all():
            broken = next(i for i, row in zip(ordered.tolist(), rows, strict=True) if not np.isfinite(row).all())
            raise DataError(f"{self.where(broken // (1 + self.flips))}: holds values that are not finite")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        gathered = torch.from_numpy(rows).float()
        return [gathered[p] for p in place.tolist()]

    def _map(self, file: str, shape: tuple[int, ...], dtype: np.dtype | None) -> np.ndarray:
        path = self.path / file
        try:
            open_regular(path).close()
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # NumPy evaluates the header, so that a damaged one raises whatever Python's parser does
            raise UserError(f"{path}: missing, truncated or not an npy file: {first_line(error)}") from None
        if not isinstance(array, np.ndarray):
            raise UserError(f"{path}: not an npy file, but a zip of them")
        if array.shape != shape or (dtype is not None and array.dtype != dtype):
            raise UserError(f"{path}: holds {array.dtype} {array.shape}; {INDEX_FILE} says {dtype or 'names'} {shape}")
        return np.asarray(array)


def read_index(path: Path) -> dict[str, Any]:
    """index.json of packed latents, checked by `parse_index`."""
    where = path / INDEX_FILE
    if not where.is_file():
        raise UserError(f"{where}: missing; it is written last, so continue `dataset_tools.py pack` or `encode --packed`")
    try:
        return parse_index(read_regular(where), where)
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None


def parse_index(content: bytes, where: str | Path) -> dict[str, Any]:
    """The content of index.json, checked for all that a reader relies on. `UserError` that names `where` and what is wrong.

    It may come from anywhere: the files it names are those of the format, and nothing else becomes a path.
    """
    index = parse_json(content, where)
    try:
        if index["format"] != FORMAT:
            raise UserError(f"{where}: format {str(index['format'])[:20]} is not known; this version reads {FORMAT}")
        VAERecord.from_dict(index["vae"], f"{where}: vae")
        shape, shards, labelled = index["shape"], index["shards"], index["labelled"]
        counts = [shard["count"] for shard in shards]
        digests = [*index["sha256"].values(), *(shard["sha256"] for shard in shards)]
        files = [LABELS_FILE, NAMES_FILE] if labelled else [NAMES_FILE]
        rules = {
            "labelled must be true or false": type(labelled) is bool,
            f"sha256 must name {' and '.join(files)} and no other file": sorted(index["sha256"]) == files,
            "shards must be a list of latents-00000.npy and so on": isinstance(shards, list)
            and len(shards) > 0
            and all(shard["file"] == shard_file(number) for number, shard in enumerate(shards)),
            "every sha256 must be 64 hexadecimal digits": all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests),
            "shape must be three positive whole numbers, or 2 and three, and each count one, of a size that a disk can hold": len(
                split_flips(tuple(shape))[1]
            )
            == 3
            and all(type(n) is int and n > 0 for n in (*shape, *counts))
            and sum(counts) * math.prod(shape) < 2**60,
            "dtype must be a floating-point type": isinstance(index["dtype"], str)
            and re.fullmatch(r"float\d\d|[<>]f\d", index["dtype"]) is not None
            and np.dtype(index["dtype"]).kind == "f",
        }
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not an index of packed latents: {type(error).__name__} {first_line(error)[:80]}") from None
    for rule, holds in rules.items():
        if not holds:
            raise UserError(f"{where}: not an index of packed latents: {rule}")
    return index


def checksums(index: dict[str, Any]) -> dict[str, str]:
    """File → SHA-256 of everything that an index describes."""
    return index["sha256"] | {shard["file"]: shard["sha256"] for shard in index["shards"]}
