"""Pictures for people: grids of images, with labels where they help."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def image_grid(images: np.ndarray, columns: int, gap: int = 2) -> Image.Image:
    """uint8 images (n, H, W, 3), row by row, `columns` to a row, `gap` white pixels apart."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        canvas[y : y + height, x : x + width] = image
    return Image.fromarray(canvas)


def labelled_grid(images: np.ndarray, row_labels: Sequence[str], column_labels: Sequence[str], path: str | Path) -> None:
    """PNG of uint8 images (rows, columns, H, W, 3) with a label at each row and column."""
    from matplotlib.figure import Figure

    rows, columns, height, width, _ = images.shape
    inches = 0.9
    figure = Figure(figsize=(columns * inches + 1.4, rows * inches * height / width + 0.5), dpi=160, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    for r in range(rows):
        for c in range(columns):
            axis = axes[r, c]
            axis.imshow(images[r, c], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if r == 0:
                axis.set_title(column_labels[c], fontsize=9)
            if c == 0:
                axis.set_ylabel(row_labels[r], fontsize=9, rotation=0, ha="right", va="center")
    save_figure(figure, path)


def save_figure(figure, path: str | Path) -> None:
    """Write a matplotlib figure as PNG, aside and then renamed."""
    aside = Path(path).with_suffix(".tmp")
    figure.savefig(aside, format="png")
    aside.replace(path)


def save_png(image: Image.Image, path: str | Path, compress_level: int = 6) -> None:
    """Write a PNG aside, then rename it: a killed run leaves no half-written picture under its name."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    image.save(aside, format="png", compress_level=compress_level)
    aside.replace(path)
