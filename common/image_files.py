"""Image files: reading any format as RGB, PNG bytes, writing atomically; and how far images are apart."""

import functools
import io
import math
import warnings
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from common.errors import first_line
from common.file_tree import FileTree
from common.files import DataError, write_atomically

ARRAYS = ".npy"
MAX_PIXELS = 89_478_485  # of an image: Pillow's own limit, above which it warns of a decompression bomb

# Above its limit Pillow warns, and only at twice that refuses; `check_pixels` refuses at once.
warnings.filterwarnings("ignore", message="Image size .* exceeds limit", category=Warning)


def save_png(image: Image.Image, path: str | Path, compress_level: int = 6) -> None:
    """Write a PNG atomically: a killed run leaves no half-written picture under its name. Raises WriteError if it cannot."""
    write_atomically(path, lambda file: image.save(file, format="png", compress_level=compress_level))


def read_image(files: FileTree, name: str) -> np.ndarray:
    """An image file as RGB, uint8 (H, W, 3), stored orientation, alpha dropped. `DataError` that names it if it is broken.

    An npy file is one, too, as REPA's code has it: uint8 (3, H, W), or with leading axes of 1.
    """
    content = files.read(name)
    try:
        if name.endswith(ARRAYS):
            return _array(content)
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            return _rgb(image)
    except Exception as error:  # Pillow's plugins raise whatever they like on broken files
        raise DataError(f"{files.where(name)}: not a readable image: {image_problem(error)}") from None


@functools.cache
def _formats() -> list[str]:
    """All that Pillow reads by itself: EPS is a program, which it has Ghostscript run, whatever the file's name."""
    Image.preinit()  # the usual ones come first
    Image.init()
    return [kind for kind in Image.OPEN if kind != "EPS"]


def _array(content: bytes) -> np.ndarray:
    from common.tensor_files import npy_array  # which imports PyTorch

    pixels = npy_array(content)
    if pixels.dtype != np.uint8 or pixels.ndim < 3 or pixels.shape[-3] != 3 or pixels.size != np.prod(pixels.shape[-3:]):
        shape = " × ".join(map(str, pixels.shape))
        raise ValueError(f"holds {pixels.dtype} {shape}; must be uint8 3 × height × width")
    return pixels.reshape(pixels.shape[-3:]).transpose(1, 2, 0)


def image_problem(error: Exception) -> str:
    """What an exception of Pillow says, for a message of one line."""
    return "unknown format" if isinstance(error, Image.UnidentifiedImageError) else first_line(error)


def check_pixels(width: int, height: int) -> None:
    """Raise ValueError for a size that only a decompression bomb has."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} × {height} pixels; the limit is {MAX_PIXELS:,}, against decompression bombs")


def _rgb(image: Image.Image) -> np.ndarray:
    check_pixels(image.width, image.height)
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):  # of unknown range: Pillow would clip at 255
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise ValueError(f"{kind} pixels, whose range is not known; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits of grey: the high byte, as Pillow takes of 16-bit colour; it would clip these
        grey = (np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def image_names(names: Iterable[str]) -> list[str]:
    """Those of `names` that have the suffix of a format that Pillow reads."""
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    # A Mac's zip holds a `._name` of its own beside every file.
    return [n for n in names if PurePosixPath(n).suffix.lower() in readable and not PurePosixPath(n).name.startswith("._")]


def stored_image_names(names: Iterable[str]) -> list[str]:
    """`image_names`, or where there are none, npy files."""
    names = list(names)
    return image_names(names) or [name for name in names if name.endswith(ARRAYS)]


def png_bytes(image: np.ndarray, compress_level: int = 0) -> bytes:
    """uint8 (H, W, 3) or grey (H, W) as a PNG, not compressed: training reads it often, and disks are cheaper than time."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png", compress_level=compress_level)
    return file.getvalue()


def png_pixels(content: bytes) -> np.ndarray:
    """The pixels of a PNG; ValueError if it is broken, or a decompression bomb."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            check_pixels(image.width, image.height)
            return np.asarray(image)
    except Exception as error:  # OSError, SyntaxError, struct.error, zlib.error, DecompressionBombError …
        raise ValueError(image_problem(error)) from None


def psnr(images: np.ndarray, reference: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio in dB of uint8 images against others, over all pixels; `None` where they are equal."""
    error = np.mean((images.astype(np.float64) - reference) ** 2)
    return None if error == 0 else 10 * math.log10(255**2 / error)
