"""Latents as `encode` writes them, one npy file each, and the label file."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.file_tree import FileTree, read_json
from common.files import DataError, check_name, decode_name, encode_name
from common.tensor_files import npy_array
from models.vae import SD_VAE, VAERecord

LABEL_FILE = "dataset.json"


VAE_FILE = "vae.json"
MAX_LABEL = 2**31 - 1


def read_labels(files: FileTree) -> dict[str, int] | None:
    """`dataset.json`: file name → label, or None where it says null (unlabelled). `UserError` if it is malformed."""
    where = files.where(LABEL_FILE)
    content = read_json(files, LABEL_FILE)
    if not isinstance(content, dict) or "labels" not in content:
        raise UserError(f'{where}: must hold {{"labels": [[file name, class], …]}} or {{"labels": null}}')
    if content["labels"] is None:
        return None
    if not isinstance(content["labels"], list):
        raise UserError(f"{where}: labels must be a list of [file name, class], or null")
    labels: dict[str, int] = {}
    for entry in content["labels"]:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)) or type(entry[1]) is not int:
            raise UserError(f"{where}: {json.dumps(entry)[:80]} is not [file name, class], with the class a whole number")
        if not 0 <= entry[1] <= MAX_LABEL:
            raise UserError(
                f"{where}: label {str(entry[1])[:40]} of {entry[0]} is {'negative' if entry[1] < 0 else 'too large'}"
            )
        name = check_name(entry[0].replace("\\", "/"), where)
        if name in labels:
            raise UserError(f"{where}: labels {name} twice")
        labels[name] = entry[1]
    return labels


class LatentFiles:
    """Latents as encode writes them: `vae-sd/` or `vae-sd.zip`, one npy file (2C, h, w) each, dataset.json and vae.json.

    With `flips`, those of the mirrored image too: files of (2, 2C, h, w), which is then `stored_shape`.

    The names are kept as bytes in one array: a million Python objects would be copied by every worker that counts references.
    """

    def __init__(self, path: Path | FileTree):
        self.files = path if isinstance(path, FileTree) else FileTree(path)
        self.path = path = self.files.path
        listed = self.files.names()
        names = [name for name in listed if name.endswith(".npy")]
        if not names:
            raise UserError(f"{path}: empty, it holds no .npy file (`dataset_tools.py encode` writes them)")
        if LABEL_FILE not in listed:
            raise UserError(
                f"{self.files.where(LABEL_FILE)}: missing; encode writes it last, so continue it by the same command"
            )
        self.labels = self._read_labels(names)
        self._names = np.array([encode_name(name) for name in names])
        self.record = SD_VAE
        if VAE_FILE in listed:
            self.record = VAERecord.from_dict(read_json(self.files, VAE_FILE), self.files.where(VAE_FILE))
        first = self.array(0)
        self.stored_shape, self.dtype = first.shape, first.dtype
        self.flips, self.shape = split_flips(first.shape)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The name of file `index` in the folder or zip."""
        return decode_name(self._names[index])

    def where(self, index: int) -> str:
        """How messages name file `index`."""
        return self.files.where(self.name(index))

    @property
    def label_file(self) -> str:
        """How messages name the file of the labels."""
        return self.files.where(LABEL_FILE)

    def array(self, index: int, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """File `index` (2C, h, w), or (2, 2C, h, w), as it is stored, checked to hold finite numbers, and those of `shape`."""
        content = self.files.read(self.name(index))
        try:
            moments = npy_array(content)
        except ValueError as error:
            raise DataError(f"{self.where(index)}: not a readable npy file: {error}") from None
        if moments.dtype.kind != "f":
            raise DataError(f"{self.where(index)}: holds no floating-point array")
        if moments.ndim == 4 and moments.shape[0] == 1:
            moments = moments[0]
        if shape is not None and moments.shape != shape:
            raise DataError(
                f"{self.where(index)}: has shape {format_shape(moments.shape)}, but {self.where(0)} {format_shape(shape)}; one size only"
            )
        if not np.isfinite(moments).all():
            raise DataError(f"{self.where(index)}: holds values that are not finite")
        return moments

    def read(self, indices: Sequence[int], mirrored: Sequence[bool] | None = None) -> list[Tensor]:
        """float32 (2C, h, w) of each index, one file after the other; of the mirrored image where `mirrored` says so."""
        self.files.prefetch([self.name(i) for i in indices])
        arrays = [self.array(i, self.stored_shape) for i in indices]
        if self.flips:
            arrays = [array[int(flip)] for array, flip in zip(arrays, mirrored or [False] * len(arrays), strict=True)]
        return [torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) for array in arrays]

    def _read_labels(self, names: list[str]) -> np.ndarray | None:
        labels = read_labels(self.files)
        if labels is None:
            return None
        if list(labels) == names:  # as encode writes them
            return np.fromiter(labels.values(), dtype=np.int64, count=len(labels))
        keys = pair_keys(self.files, names)
        where = self.files.where(LABEL_FILE)
        of_key = {}
        for name, label in labels.items():
            if (key := pair_key(name)) not in keys:
                raise UserError(f"{where}: labels {name}, but there is no such file")
            of_key[key] = label
        for key, name in keys.items():
            if key not in of_key:
                raise UserError(f"{where}: has no label for {name}")
        return np.array([of_key[key] for key in keys], dtype=np.int64)


def split_flips(stored: tuple[int, ...]) -> tuple[bool, tuple[int, ...]]:
    """Of the shape in which latents are stored: whether it is of two, an image's and its mirror image's, and the shape of one."""
    flips = len(stored) == 4 and stored[0] == 2
    return flips, stored[1:] if flips else stored


def pair_key(name: str) -> tuple[str, int] | None:
    """What pairs images and latents: sub-folder, and the number at the end of the file name."""
    folder, _, file = name.rpartition("/")
    number = re.search(r"(\d+)$", file.rpartition(".")[0])
    return (folder, int(number[1])) if number else None


def pair_keys(files: FileTree, names: list[str]) -> dict[tuple[str, int], str]:
    """`pair_key` → name. `UserError` for a name without a number, and for two of one key."""
    keys: dict[tuple[str, int], str] = {}
    for name in names:
        key = pair_key(name)
        if key is None:
            raise UserError(f"{files.where(name)}: its name does not end in a number, as img00000000.png does")
        if key in keys:
            raise UserError(f"{files.where(name)}: has the same number as {keys[key]}")
        keys[key] = name
    return keys


def format_shape(shape: Sequence[int]) -> str:
    """`8 × 32 × 32`."""
    return " × ".join(map(str, shape))
