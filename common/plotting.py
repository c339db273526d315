"""Figures and grids of images, with labels where they help."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from common.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def image_grid(images: np.ndarray, columns: int, gap: int = 2) -> Image.Image:
    """uint8 images (n, H, W, 3), row by row, `columns` to a row, `gap` white pixels apart."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        canvas[y : y + height, x : x + width] = image
    return Image.fromarray(canvas)


def labelled_grid(
    images: np.ndarray,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    path: str | Path,
    *,
    inches: float = 0.9,
    fontsize: float = 9,
) -> None:
    """PNG of uint8 images (rows, columns, H, W, 3) with a label at each row and column; `inches`: width of an image."""
    from matplotlib.figure import Figure

    rows, columns, height, width, _ = images.shape
    head = 0.3 + 0.022 * fontsize * max(label.count("\n") + 1 for label in column_labels)
    figure = Figure(figsize=(columns * inches + 1.4, rows * inches * height / width + head), dpi=160, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    for r in range(rows):
        for c in range(columns):
            axis = axes[r, c]
            axis.imshow(images[r, c], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if r == 0:
                axis.set_title(column_labels[c], fontsize=fontsize, parse_math=False)
            if c == 0:
                axis.set_ylabel(row_labels[r], fontsize=fontsize, rotation=0, ha="right", va="center", parse_math=False)
    save_figure(figure, path)


def line_plot(
    path: str | Path,
    x: Sequence[float],
    y: Sequence[float],
    *,
    labels: tuple[str, str, str],
    spread: tuple[str, Sequence[float], Sequence[float]] | None = None,
    points: dict[str, tuple[float, float]] | None = None,
    level: tuple[str, float] | None = None,
    from_zero: bool = True,
) -> None:
    """PNG of one line through the points (x, y).

    `labels`: of the axes x and y, and the title. `spread`: label, lower and upper bound of a band around the line. `points`: single points of their own, by label. `level`: a
    named horizontal line. `from_zero`: the y axis starts at 0. An axis of integers gets no ticks between them.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 4), dpi=160, layout="constrained")
    axis = _plain_axis(figure.subplots(), *labels)
    axis.plot(x, y, color=BLUE, marker="o", markersize=4, linewidth=1.6)
    if spread is not None:
        axis.fill_between(x, *spread[1:], color=BLUE, alpha=0.2, linewidth=0, label=spread[0])
    for (label, point), color in zip((points or {}).items(), (ORANGE, GREEN, GREY), strict=False):
        axis.plot(*point, color=color, marker="*", markersize=12, linestyle="none", label=label)
    if level is not None:
        axis.axhline(level[1], color=GREY, linestyle="--", linewidth=1, label=level[0])
    if all(isinstance(v, int) for v in x):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if spread is not None or points or level:
        axis.legend(frameon=False, fontsize=9)
    if from_zero:
        axis.set_ylim(bottom=0)
    save_figure(figure, path)


class Curve(NamedTuple):
    """Points of a plot of several lines, in order of x; `spread`: half the height of each error bar."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float | None]
    is_reference: bool = False  # grey and dashed: what the others are compared with


def curves_plot(
    path: str | Path,
    curves: Sequence[Curve],
    *,
    labels: tuple[str, str, str],
    front: Sequence[tuple[float, float]] = (),
    stars: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> None:
    """PNG of several lines; the x axis is logarithmic where its values lie far apart.

    `labels`: of the axes x and y, and the title. `front`: points of the Pareto front, ringed and joined. `stars`: single points, by label.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    is_crowded = len(curves) > 4  # the legend then stands beside the axes
    figure = Figure(figsize=(9.5 if is_crowded else 7, 4.5), dpi=160, layout="constrained")
    axis = _plain_axis(figure.subplots(), *labels)
    colours = iter([BLUE, ORANGE, GREEN, "#8a5fb0", "#b5443a", "#3aa0a8", "#a8932f", "#c76f9e"])
    if front:
        axis.plot(*zip(*front, strict=True), color="black", linewidth=0.9, zorder=1, label="Pareto front")
        ring: dict[str, Any] = {
            "marker": "o",
            "markersize": 11,
            "markerfacecolor": "none",
            "markeredgewidth": 0.9,
            "linestyle": "none",
        }
        axis.plot(*zip(*front, strict=True), color="black", zorder=3, **ring)
    for curve in curves:
        style: dict[str, Any] = {"color": GREY, "linestyle": "--"} if curve.is_reference else {"color": next(colours, GREY)}
        axis.plot(curve.x, curve.y, marker="o", markersize=4, linewidth=1.6, label=curve.label, zorder=2, **style)
        bars = [(x, y, s) for x, y, s in zip(curve.x, curve.y, curve.spread, strict=True) if s is not None]
        if bars:
            x, y, spread = zip(*bars, strict=True)
            axis.errorbar(x, y, spread, color=style["color"], linestyle="none", capsize=3, linewidth=1, zorder=2)
    for (label, points), colour in zip((stars or {}).items(), ("#b5443a", GREEN), strict=False):
        axis.plot(*zip(*points, strict=True), color=colour, marker="*", markersize=12, linestyle="none", label=label, zorder=4)
    values = [x for curve in curves for x in curve.x] + [x for x, _ in front]
    if min(values) > 0 and max(values) > 5 * min(values):
        axis.set_xscale("log")
        ticks = _spaced(sorted({*values}))
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.xaxis.set_minor_formatter(NullFormatter())
    if is_crowded:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    else:
        axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _spaced(values: Sequence[float]) -> list[float]:
    """Those of ascending values whose labels do not overlap on a logarithmic axis."""
    kept = [values[0]]
    for value in values[1:]:
        if value > 1.25 * kept[-1]:
            kept.append(value)
    return [float(f"{value:.3g}") for value in kept]


def bar_plot(path: str | Path, bars: dict[str, float], *, ylabel: str, title: str = "") -> None:
    """PNG of one bar for each name, with its value and, from the second on, its difference from the first in percent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), dpi=160, layout="constrained")
    axis = _plain_axis(figure.subplots(), "", ylabel, title)
    drawn = axis.bar(list(bars), list(bars.values()), color=[BLUE, ORANGE, GREEN, GREY][: len(bars)], width=0.6)
    first, *others = bars.values()
    labels = [f"{first:.4g}"] + [f"{v:.4g}\n({100 * (v / first - 1):+.0f}%)" for v in others]
    axis.bar_label(drawn, labels, padding=2, fontsize=9)
    axis.margins(y=0.15)
    axis.grid(False, axis="x")
    save_figure(figure, path)


def attention_maps(
    images: np.ndarray, maps: np.ndarray, windows: np.ndarray, row_labels: Sequence[str], names: Sequence[str], path: str | Path
) -> None:
    """PNG of attention over images: a row for each image, and a last one of the mean over all groups.

    Args:
        images: uint8 (rows, H, W, 3).
        row_labels: what each image is.
        path: the PNG.
        maps: (rows, columns, h, w) in units of uniform attention, laid over the images.
        windows: (columns, g, g), the same, of a single group.
        names: what each column is.
    """
    from matplotlib.figure import Figure

    rows, columns = maps.shape[:2]
    height, width = images.shape[1:3]
    inches = 1.25
    size = ((columns + 1) * inches + 1.6, (rows + 1) * inches * height / width + 0.6)
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    axes = figure.subplots(rows + 1, columns + 1, squeeze=False, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    top = max(2.0, float(np.quantile(maps, 0.995)))
    options = {"cmap": "inferno", "vmin": 0.0, "vmax": top, "interpolation": "nearest"}
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for r in range(rows):
        grey = images[r].astype(float) @ [0.299, 0.587, 0.114]
        axes[r, 0].imshow(images[r], interpolation="nearest")
        axes[r, 0].set_ylabel(row_labels[r], fontsize=9, rotation=0, ha="right", va="center", parse_math=False)
        for c in range(columns):
            axes[r, c + 1].imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes[r, c + 1].imshow(maps[r, c], alpha=OPACITY, extent=(-0.5, width - 0.5, height - 0.5, -0.5), **options)
    mappable = [axes[rows, c + 1].imshow(windows[c], **options) for c in range(columns)][-1]
    axes[rows, 0].set_ylabel("mean over\nall groups", fontsize=9, rotation=0, ha="right", va="center")
    for axis, name in zip(axes[0], ["image", *names], strict=True):
        axis.set_title(name, fontsize=9)
    bar = figure.colorbar(mappable, ax=axes, fraction=0.03, pad=0.01, extend="max")
    bar.set_label("attention (1: uniform)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    save_figure(figure, path)


def heat_map(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3) of values (h, w), from the lowest (black) to the highest (bright); `size`: H and W, multiples of h and w."""
    from matplotlib import colormaps

    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low or 1.0)
    colours = (255 * colormaps["inferno"](scaled)[..., :3]).round().astype(np.uint8)
    return np.kron(colours, np.ones((size[0] // values.shape[0], size[1] // values.shape[1], 1), np.uint8))


def attention_overlay(image: np.ndarray, attention: np.ndarray, top: float) -> np.ndarray:
    """Attention over a grey image, as `attention_maps` shows it: uint8 (H, W, 3).

    Args:
        image: uint8 (H, W, 3).
        attention: (h, w), whose sides divide the image's.
        top: the attention that has the brightest colour.
    """
    from matplotlib import colormaps

    height, width = image.shape[:2]
    repeats = height // attention.shape[0], width // attention.shape[1]
    colour = 255 * np.kron(colormaps["inferno"](np.clip(attention / top, 0, 1))[..., :3], np.ones((*repeats, 1)))
    grey = (image.astype(float) @ [0.299, 0.587, 0.114])[..., None]
    return (OPACITY * colour + (1 - OPACITY) * grey).round().astype(np.uint8)


OPACITY = 0.65  # of attention over an image

BLUE, ORANGE, GREEN, GREY = "#2f6db5", "#d9772b", "#3f9a5f", "#777777"


def _plain_axis(axis: "Axes", xlabel: str, ylabel: str, title: str) -> "Axes":
    """A matplotlib axis with labels, a light grid and no box."""
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.set_title(title, fontsize=11)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return axis


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a matplotlib figure as PNG, atomically. Raises WriteError where it cannot be written."""
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
