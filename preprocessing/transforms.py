"""The published transforms, to the pixel."""

import re
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from common.errors import UserError
from common.image_files import check_pixels

Transform = Callable[[np.ndarray], np.ndarray | None]  # uint8 (h, w, 3) → uint8 (H, W, 3), or None: left out


def parse_resolution(text: str | None) -> tuple[int, int] | None:
    """`256x256` → (width, height)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)[xX](\d+)", text.strip())
    if not match or 0 in (size := (int(match[1]), int(match[2]))):
        raise UserError(f"--resolution {text}: must be WIDTHxHEIGHT in pixels, e.g. 256x256")
    return size


def make_transform(name: str, size: tuple[int, int] | None) -> Transform:
    """The transform `name` to `size` = (width, height).

    `UserError` for a size that it cannot make: all but resize-crop give squares whose side is a power of two.
    """
    if size is None:
        if name != "none":
            raise UserError(f"--transform {name}: needs --resolution, e.g. 256x256")
        return unchanged
    width, height = size
    if name == "resize-crop":
        return partial(resize_crop, width=width, height=height)
    if width & (width - 1):
        raise UserError(f"--resolution {width}x{height}: the width must be a power of two (resize-crop makes any size)")
    if name == "center-crop-wide":
        if height > width:
            raise UserError(f"--resolution {width}x{height}: center-crop-wide needs a height of at most the width")
        return partial(center_crop_wide, width=width, height=height)
    if width != height:
        raise UserError(
            f"--resolution {width}x{height}: must be square (center-crop-wide pads to a square; resize-crop makes any size)"
        )
    if name == "center-crop-dhariwal":
        return partial(resize_crop, width=width, height=width)
    if name == "center-crop":
        return partial(center_crop, width=width, height=height)
    return partial(resize, width=width, height=height)


def unchanged(image: np.ndarray) -> np.ndarray:
    """The image."""
    return image


def resize(image: np.ndarray, width: int, height: int, filter: Image.Resampling = Image.Resampling.LANCZOS) -> np.ndarray:
    """uint8 (h, w, 3) → (height, width, 3); an image of that size already stays as it is. ValueError for more than MAX_PIXELS."""
    if image.shape[:2] == (height, width):
        return image
    check_pixels(width, height)  # of a strip, one pixel high, the short side alone would be as long as asked for
    return np.asarray(Image.fromarray(image).resize((width, height), filter))


def center_crop(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """The largest central square, Lanczos to width × height."""
    h, w = image.shape[:2]
    c = min(h, w)
    return resize(image[(h - c) // 2 : (h + c) // 2, (w - c) // 2 : (w + c) // 2], width, height)


def center_crop_wide(image: np.ndarray, width: int, height: int) -> np.ndarray | None:
    """Cropped above and below to width : height, Lanczos, on a black square of side `width`; None where it is too small."""
    h, w = image.shape[:2]
    crop = round(width * h / w)
    if w < width or crop < height:
        return None
    canvas = np.zeros((width, width, 3), dtype=np.uint8)
    top = (width - height) // 2
    canvas[top : top + height] = resize(image[(h - crop) // 2 : (h + crop) // 2], width, height)
    return canvas


def resize_crop(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """ADM's crop to width × height: halved by a box filter while at least twice too large, bicubic until it just covers, centre.

    Of a square it is the published center-crop-dhariwal, to the pixel.
    """
    while image.shape[0] >= 2 * height and image.shape[1] >= 2 * width:
        image = resize(image, image.shape[1] // 2, image.shape[0] // 2, Image.Resampling.BOX)
    h, w = image.shape[:2]
    covering = (round(w * height / h), height) if w * height >= h * width else (width, round(h * width / w))
    image = resize(image, *covering, Image.Resampling.BICUBIC)
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]
