"""Sizes of images. `--resolution` is a side in pixels or WIDTHxHEIGHT, and is recorded as that: 256 or "256x384"."""

import re
from collections.abc import Sequence

from common.errors import UserError

Resolution = int | str


def parse_size(text: object) -> Resolution:
    """`256x384`, or for a square the number. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9]{1,9})[xX]([0-9]{1,9})\s*", text) if isinstance(text, str) else None
    if match is None:
        raise ValueError
    width, height = int(match[1]), int(match[2])
    return width if width == height else f"{width}x{height}"


def sides(resolution: Resolution) -> tuple[int, int]:
    """(height, width)."""
    if isinstance(resolution, int):
        return resolution, resolution
    width, height = map(int, resolution.split("x"))
    return height, width


def resolution_of(size: Sequence[int]) -> Resolution:
    """Of (height, width), as it is recorded."""
    return parse_size(format_sides(size))


def latent_size(resolution: Resolution, factor: int) -> int | tuple[int, int]:
    """The side of a square's latents, or (rows, columns): `input_size` of a model."""
    if isinstance(resolution, int):
        return resolution // factor
    height, width = sides(resolution)
    return height // factor, width // factor


def latent_sides(resolution: Resolution, factor: int) -> tuple[int, int]:
    """(rows, columns) of the latents."""
    height, width = sides(resolution)
    return height // factor, width // factor


def check_divisible(resolution: Resolution, step: int, why: str) -> None:
    """Raise UserError where a side is no multiple of `step`; it names the nearest sizes that are, below and above."""
    if any(n % step for n in sides(resolution)):
        below = resolution_of([max(step, n // step * step) for n in sides(resolution)])
        above = resolution_of([-(-n // step) * step for n in sides(resolution)])
        near = ", ".join(map(str, dict.fromkeys((below, above))))
        raise UserError(f"--resolution {resolution}: {why}; the nearest valid: {near}")


def format_sides(size: Sequence[int]) -> str:
    """(height, width) as `WIDTHxHEIGHT`."""
    return f"{size[1]}x{size[0]}"
