"""Image files: reading any format as RGB, PNG bytes, writing aside."""

import io
import warnings
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from common.files import DataError, FileTree, write_atomically


def save_png(image: Image.Image, path: str | Path, compress_level: int = 6) -> None:
    """Write a PNG atomically: a killed run leaves no half-written picture under its name. Raises WriteError if it cannot."""
    write_atomically(path, lambda file: image.save(file, format="png", compress_level=compress_level))


MAX_PIXELS = 89_478_485  # of an image: Pillow's own limit, above which it warns of a decompression bomb


# Above its limit Pillow warns, and only at twice that refuses; `_rgb` refuses at once.
warnings.filterwarnings("ignore", message="Image size .* exceeds limit", category=Warning)


def read_image(files: FileTree, name: str) -> np.ndarray:
    """An image file as RGB, uint8 (H, W, 3), stored orientation, alpha dropped. `DataError` that names it if it is broken."""
    content = files.read(name)
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _rgb(image)
    except Exception as error:  # Pillow's plugins raise whatever they like on broken files
        reason = str(error) if not isinstance(error, Image.UnidentifiedImageError) else "unknown format"
        raise DataError(f"{files.where(name)}: not a readable image: {reason}") from None


def _rgb(image: Image.Image) -> np.ndarray:
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
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    # A Mac's zip holds a `._name` of its own beside every file.
    return [n for n in names if PurePosixPath(n).suffix.lower() in readable and not PurePosixPath(n).name.startswith("._")]


def png_bytes(image: np.ndarray) -> bytes:
    """uint8 (H, W, 3) or grey (H, W) as an uncompressed PNG: training reads it often, and disks are cheaper than time."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png", compress_level=0)
    return file.getvalue()


def png_pixels(content: bytes) -> np.ndarray:
    """The pixels of a PNG; ValueError if it is broken."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            return np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(str(error)) from None
