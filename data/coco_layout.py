"""The COCO features of U-ViT (arXiv 2209.12152) and REPA's text-to-image code, read as they are.

DATA_DIR/train/  {i}.npy (2C, h, w): mean and *log-variance* of the VAE's posterior;  {i}_{k}.npy (77, 768): caption k, by CLIP-L
                 {i}.png: the images (REPA's alone)
DATA_DIR/        empty_context.npy (77, 768): the empty prompt            (val/ is like train/; either may be given itself)
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.file_tree import FileTree
from common.files import DataError, encode_name
from common.tensor_files import npy_array
from models.conditioning import Text
from models.text_encoders import TextRecord
from models.vae import SD_VAE

EMPTY_FILE = "empty_context.npy"
CLIP_L = "openai/clip-vit-large-patch14"


def coco_folder(data_dir: Path) -> Path | None:
    """The folder of the features where `data_dir` has this layout: its train/, or itself; None where it has not."""
    return next((folder for folder in (data_dir / "train", data_dir) if (folder / "0.npy").is_file()), None)


class CocoLatents:
    """The latents: moments as [mean, std], like `LatentFiles`; unlabelled.

    Raises:
        UserError: images whose numbers have gaps, or a broken first file.
    """

    labels, flips = None, False
    record = SD_VAE

    def __init__(self, path: Path):
        self.path, self.files = path, FileTree(path)
        matches = [m for name in self.files.names() if (m := re.fullmatch(r"(\d{1,12})(_\d{1,12})?\.npy", name))]
        numbers = np.array([int(m[1]) for m in matches])
        of_image = np.array([m[2] is None for m in matches])
        count = int(of_image.sum())
        if not np.array_equal(np.sort(numbers[of_image]), np.arange(count)):
            raise UserError(f"{path}: {count} images {{i}}.npy, but their numbers are not 0 … {count - 1}")
        captions = numbers[~of_image]
        self.captions = np.bincount(captions[captions < count], minlength=count)  # of each image
        self.strays = [m[0] for m in matches if m[2] is not None and int(m[1]) >= count]  # captions without an image
        first = _array(self.files, self.name(0))
        self.shape, self.dtype = first.shape, first.dtype

    def __len__(self) -> int:
        return len(self.captions)

    def name(self, index: int) -> str:
        """The name of file `index`."""
        return f"{index}.npy"

    def image_names(self) -> np.ndarray:
        """The images' names (bytes), which REPA's layout has. Raises UserError where one is missing."""
        there = set(self.files.names())
        if missing := [name for i in range(len(self)) if (name := f"{i}.png") not in there]:
            raise UserError(f"{self.path}: {len(missing)} image(s) are missing, which REPA needs: {', '.join(missing[:3])}")
        return np.array([encode_name(f"{i}.png") for i in range(len(self))])

    def where(self, index: int) -> str:
        """How messages name file `index`."""
        return self.files.where(self.name(index))

    @property
    def label_file(self) -> str:
        """How messages name the file of the labels, which this layout has not."""
        return str(self.path)

    def read(self, indices: Sequence[int], mirrored: Sequence[bool] | None = None) -> list[Tensor]:
        """float32 (2C, h, w) of each index, mean and standard deviation; there are no mirrored images."""
        return [torch.from_numpy(self._moments(i)) for i in indices]

    def _moments(self, index: int) -> np.ndarray:
        mean, log_variance = np.split(_array(self.files, self.name(index), self.shape).astype(np.float32), 2)
        return np.concatenate([mean, np.exp(0.5 * np.clip(log_variance, -30, 20))])  # diffusers' clamp


class CocoText:
    """The captions' features, like `TextFeatures`.

    Raises:
        UserError: images without a caption, captions without an image, or no empty_context.npy.
    """

    def __init__(self, latents: CocoLatents):
        self.latents, self.files = latents, latents.files
        folders = (latents.path, latents.path.parent)
        folder = next((folder for folder in folders if (folder / EMPTY_FILE).is_file()), None)
        if folder is None:
            raise UserError(f"{folders[1] / EMPTY_FILE}: missing; it holds the features of the empty prompt")
        if strays := latents.strays:
            raise UserError(f"{latents.path}: {len(strays)} caption(s) of images that are not there: {', '.join(strays[:3])}")
        without = np.flatnonzero(latents.captions == 0)
        if len(without):
            raise UserError(f"{latents.path}: {len(without)} image(s) without a caption: {', '.join(map(str, without[:3]))}")
        null = _array(FileTree(folder), EMPTY_FILE)
        if null.ndim != 2:
            raise UserError(f"{folder / EMPTY_FILE}: has shape {null.shape}; wanted: (tokens, width)")
        self.null = Text(torch.from_numpy(null.astype(np.float32)))
        length, width = null.shape
        self.record = TextRecord(CLIP_L, "", length, width, 0, "end token")  # the layout records no hash

    def __len__(self) -> int:
        return len(self.latents)

    def read(self, index: int, choose: Callable[[int], int] | None = None) -> Text:
        """Features of image `index` in float32: of all its captions, (n, L, E), or of the one that choose(n) names, (L, E)."""
        count, shape = int(self.latents.captions[index]), tuple(self.null.features.shape)
        chosen = range(count) if choose is None else [choose(count)]
        arrays = [_array(self.files, f"{index}_{k}.npy", shape) for k in chosen]
        features = torch.from_numpy(np.stack(arrays).astype(np.float32))
        return Text(features if choose is None else features[0])

    def where(self, index: int) -> str:
        """How messages name the features of image `index`."""
        return self.files.where(f"{index}_0.npy")


def _array(files: FileTree, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    content = files.read(name)
    try:
        array = npy_array(content)
    except ValueError as error:
        raise DataError(f"{files.where(name)}: not a readable npy file: {error}") from None
    if array.dtype.kind != "f" or (shape is not None and array.shape != shape):
        raise DataError(f"{files.where(name)}: holds {array.dtype} {array.shape}; wanted: floating-point {shape or 'numbers'}")
    if not np.isfinite(array).all():
        raise DataError(f"{files.where(name)}: holds values that are not finite")
    return array
