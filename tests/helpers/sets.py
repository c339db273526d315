"""Small sources of images, and what the data tools make of them."""

import io
import json
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import runs
from PIL import Image

from dataset_tools import main


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise over a slope: any shift by a pixel or wrong filter shows."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 120, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    return (slope + rng.integers(0, 76, (height, width, 3))).astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def zip_of(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):  # order in the zip must not matter
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return path


def content(path: Path) -> dict[str, bytes]:
    """Every file of a folder or zip."""
    if path.is_dir():
        return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def load_png(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    assert image.mode == "RGB" and image.format == "PNG"
    return np.array(image)


def labels_of(path: Path) -> object:
    return json.loads(content(path)["dataset.json"])["labels"]


def convert(source: Path, dest: Path, *options: str) -> dict[str, bytes]:
    main(["convert", f"--source={source}", f"--dest={dest}", *options])
    return content(dest)


refused = partial(runs.refused, main)  # (capsys, argv, *culprits)
