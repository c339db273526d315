"""The data set that training reads: VAE latents with labels, and images where they are asked for."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.errors import UserError
from common.file_tree import FileTree, read_regular
from common.files import DataError, decode_name, encode_name, parse_json
from common.image_files import read_image, stored_image_names
from common.sizes import Resolution, check_divisible, latent_sides
from data import remote
from data.captions import PACKED_FILES, RECORD_FILE, TextFeatures, has_captions, read_captions, text_folder
from data.coco_layout import CocoLatents, CocoText, coco_folder
from data.latent_files import LatentFiles, format_shape, pair_key, pair_keys
from data.packed import INDEX_FILE, PackedLatents
from data.remote_tree import RemoteTree
from models.vae import VAERecord

STATS_FILE = "latent_stats.json"

Latents = LatentFiles | PackedLatents | CocoLatents


def open_latents(
    data_dir: str | Path, cache_dir: str | None = None, option: str = "--data-dir", cache_size: float | None = None
) -> Latents:
    """The latents in a data folder: `packed/` (or the folder itself), `vae-sd/` or `vae-sd.zip`, the first that is there.

    A folder in the layout of U-ViT's and REPA's COCO features is read as it is.

    `data_dir` may be remote, e.g. `s3://bucket/folder`: packed latents are then copied to `cache_dir` first, others file by file
    when they are read. `option`: how errors name a remote folder. `cache_size`: see `RemoteTree`.
    """
    if remote.is_remote(data_dir):
        return _open_remote(str(data_dir).rstrip("/"), cache_dir, option, cache_size)
    data_dir = Path(data_dir)
    if (data_dir / INDEX_FILE).is_file():
        return PackedLatents(data_dir)
    if (data_dir / "packed").is_dir() and not _holds_text_alone(data_dir / "packed"):
        return PackedLatents(data_dir / "packed")
    if (folder := coco_folder(data_dir)) is not None:
        return CocoLatents(folder)
    return LatentFiles(_part(data_dir, "vae-sd", "`dataset_tools.py encode` makes it"))


def _open_remote(url: str, cache_dir: str | None, option: str, cache_size: float | None) -> Latents:
    try:
        return PackedLatents(remote.local_copy(url, cache_dir, option))
    except remote.NotThere:
        pass
    try:
        return LatentFiles(RemoteTree(f"{url}/vae-sd", option, cache_dir, cache_size))
    except remote.NotThere:
        raise UserError(
            f"{option} {url}: holds neither packed latents ({INDEX_FILE}, or packed/ with it) nor vae-sd/ with files of encode"
        ) from None


def open_text(
    data_dir: str | Path, latents: Latents, cache_dir: str | None = None, option: str = "--data-dir"
) -> TextFeatures | CocoText:
    """The features of the captions in a data folder, of the images that `latents` are of. Raises UserError where there are none.

    Remote ones must be packed, and are copied as the latents are; see `open_latents`.
    """
    if isinstance(latents, CocoLatents):
        return CocoText(latents)
    folder = remote.local_text(str(data_dir), cache_dir, option) if remote.is_remote(data_dir) else text_folder(data_dir)
    if folder is None:
        raise UserError(f"{data_dir}: holds no text features, no text/ with {RECORD_FILE}; `dataset_tools.py text` makes them")
    return TextFeatures(folder, latents)


class LatentDataset(Dataset):
    """VAE latents with their labels (`open_latents`), and if asked for the `images` they were made of and their captions' `text`.

    [i] -> {"moments": float32 (2C, h, w), mean and std of the posterior, or (C, h, w) where there is none; "label": int, 0 where unlabelled;
            "image": uint8 (3, H, W), if asked for; "text": float32 (L, E), and "pooled" (P,) where the encoder makes it, likewise}

    `text`: the features of all captions, if asked for. `labels`: int64 (n,), or None where unlabelled. `record`: the VAE. `shape`: of the moments of every item.
    `flip`: whether training draws mirrored images; None: if the set has them.
    Raises `UserError` for a folder that holds no such data set, and `DataError` for a broken file met on reading.
    """

    def __init__(
        self,
        data_dir: str | Path,
        *,
        images: bool = False,
        text: bool = False,
        flip: bool | None = False,
        cache_dir: str | None = None,
        cache_size: float | None = None,
        option: str = "--data-dir",
    ):
        self.data_dir = data_dir
        self.latents = open_latents(data_dir, cache_dir, option, cache_size)
        self.text = open_text(data_dir, self.latents, cache_dir, option) if text else None
        self.record, self.shape = self.latents.record, self.latents.shape
        channels = self.record.stored_channels
        if len(self.shape) != 3 or self.shape[0] != channels:
            raise UserError(
                f"{self.latents.where(0)}: has shape {format_shape(self.shape)}; {self.record.vae} makes {channels} × height × width"
            )
        self.record.check_shape((self.record.latent_channels, *self.shape[1:]), self.latents.where(0))
        self.flip = self.latents.flips if flip is None else flip
        if self.flip and not self.latents.flips:
            raise UserError(
                f"--flip: {data_dir} has no latents of mirrored images; `dataset_tools.py encode --flip` makes them"
            )
        self._images: FileTree | None = None
        if images:
            self._images = self._open_images(cache_dir, cache_size, option)
            coco = self.latents if isinstance(self.latents, CocoLatents) else None
            self._image_names = paired_images(self._images, self.latents) if coco is None else coco.image_names()

    def _open_images(self, cache_dir: str | None, cache_size: float | None, option: str) -> FileTree:
        """The files of the images."""
        if isinstance(self.latents, CocoLatents):
            return self.latents.files
        hint = "REPA needs the images too; `dataset_tools.py convert` makes them"
        if not remote.is_remote(self.data_dir):
            return FileTree(_part(Path(self.data_dir), "images", hint))
        try:
            return RemoteTree(f"{str(self.data_dir).rstrip('/')}/images", option, cache_dir, cache_size)
        except remote.NotThere:
            raise UserError(f"{option} {self.data_dir}: holds no images/; {hint}") from None

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (n,), or None where unlabelled."""
        return self.latents.labels

    def check(self, *, num_classes: int | None = None, resolution: Resolution | None = None) -> None:
        """Raise `UserError` if the labels do not fit `num_classes`, or the latents images of `resolution` pixels."""
        if num_classes is not None and self.labels is None and num_classes != 1:
            raise UserError(f"{self.latents.label_file}: unlabelled, which trains with --num-classes 1 only, not {num_classes}")
        if self.labels is not None:
            wrong = self.labels < 0 if num_classes is None else (self.labels < 0) | (self.labels >= num_classes)
            if wrong.any():
                first = int(np.argmax(wrong))
                allowed = (
                    "labels start at 0" if num_classes is None else f"--num-classes {num_classes} allows 0 to {num_classes - 1}"
                )
                raise UserError(
                    f"{self.latents.label_file}: label {self.labels[first]} of {self.latents.name(first)} is out of range; {allowed}"
                )
        if resolution is not None:
            factor = self.record.downsample_factor
            check_divisible(resolution, factor, f"not divisible by the VAE's factor {factor}")
            wanted = latent_sides(resolution, factor)
            if self.shape[1:] != wanted:
                height, width = (factor * n for n in self.shape[1:])
                raise UserError(
                    f"{self.latents.where(0)}: has latents of {format_shape(self.shape[1:])}, made of images of {height} × {width} pixels; "
                    f"--resolution {resolution} needs {format_shape(wanted)}"
                )

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(
        self,
        indices: Sequence[int],
        choose_caption: Callable[[int, int], int] = lambda place, count: 0,
        mirrored: Sequence[bool] | None = None,
        images: bool = True,
    ) -> list[dict[str, Any]]:
        """A whole batch, its latents in one read.

        choose_caption: which of `count` captions the item at `place` takes; the first. mirrored: which images are; none. images: with
        those that were asked for.
        """
        moments = self.latents.read(indices, mirrored)
        labels = [0] * len(indices) if self.labels is None else self.labels[indices].tolist()
        items = [{"moments": m, "label": label} for m, label in zip(moments, labels, strict=True)]
        if self._images is not None and images:
            self._images.prefetch([decode_name(self._image_names[index]) for index in indices])
            for place, (item, index) in enumerate(zip(items, indices, strict=True)):
                image = self._read_image(self._images, index)
                item["image"] = image.flip(-1) if mirrored and mirrored[place] else image
        if self.text is not None:
            for place, (item, index) in enumerate(zip(items, indices, strict=True)):
                text = self.text.read(index, partial(choose_caption, place))
                item |= {"text": text.features} | ({} if text.pooled is None else {"pooled": text.pooled})
        return items

    def _read_image(self, images: FileTree, index: int) -> Tensor:
        name = decode_name(self._image_names[index])
        image = read_image(images, name)
        wanted = tuple(self.record.downsample_factor * n for n in self.shape[1:])
        if image.shape[:2] != wanted:
            raise DataError(
                f"{images.where(name)}: has {format_shape(image.shape[:2])} pixels; its latents were made of {format_shape(wanted)}"
            )
        return torch.from_numpy(image.transpose(2, 0, 1).copy())


def paired_images(images: FileTree, latents: Latents) -> np.ndarray:
    """The image's name (bytes) for each latent: that of the same sub-folder and number. `UserError` where there is none."""
    pairs = pair_keys(images, stored_image_names(images.names()))
    names = []
    for index in range(len(latents)):
        key = pair_key(latents.name(index))
        name = None if key is None else pairs.get(key)
        if name is None:
            raise UserError(f"{images.path}: holds no image for {latents.where(index)}")
        names.append(encode_name(name))
    return np.array(names)


def captions_of(data_dir: str | Path, latents: Latents) -> list[list[str]] | None:
    """The captions of each latent's image, in words; None where the data folder holds no images with captions."""
    paths = [Path(data_dir) / name for name in ("images", "images.zip")]
    images = next((FileTree(path) for path in paths if not remote.is_remote(data_dir) and path.exists()), None)
    if images is None or not has_captions(images):
        return None
    captions = read_captions(images)
    return [captions[decode_name(name)] for name in paired_images(images, latents)]


def normalised_record(data_dir: str | Path, latents: Latents, norm: str = "channel") -> VAERecord:
    """The record of the latents, with the mean and deviation that `dataset_tools.py stats` wrote beside them.

    norm: channel or position, of which they must be.
    """
    where, make = f"{data_dir}/{STATS_FILE}", f"dataset_tools.py stats {data_dir}{' --per=position' * (norm == 'position')}"
    try:
        content = remote.read(str(data_dir), STATS_FILE) if remote.is_remote(data_dir) else read_regular(Path(where))
        stats = parse_json(content, where)
        count, values = stats["count"], {"channel_mean": stats["mean"], "channel_std": stats["std"]}
    except FileNotFoundError:
        raise UserError(f"{where}: missing; --latent-norm {norm} needs it: `{make}`") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{where}: not what `dataset_tools.py stats` writes; run it again") from None
    if count != len(latents):
        raise UserError(
            f"{where}: was made of {count} latents, but there are {len(latents)}; run `dataset_tools.py stats` again"
        )
    record = VAERecord.from_dict(latents.record.to_dict() | values, where)
    record.check_shape((record.latent_channels, *latents.shape[1:]), where)
    if isinstance(values["channel_mean"][0], list) != (norm == "position"):
        raise UserError(f"{where}: its statistics are not of each {norm}; --latent-norm {norm} needs `{make}`")
    return record


def _holds_text_alone(packed: Path) -> bool:
    """Is there nothing but text features, of latents that are not packed?"""
    return (packed / RECORD_FILE).is_file() and {p.name for p in packed.iterdir()} <= set(PACKED_FILES)


def _part(data_dir: Path, name: str, hint: str) -> Path:
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such data folder")
    for path in (data_dir / name, data_dir / f"{name}.zip"):
        if path.exists():
            return path
    raise UserError(f"{data_dir}: holds neither {name}/ nor {name}.zip; {hint}")
