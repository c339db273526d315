"""Canvases with their patches spread over a grid of four times the tokens, zeros between them (the paper's Figure 2).

    python experiments_updated/studies/spread.py --source quickstart/data/train --dest quickstart/studies-400/spread/train

Patches of 2×2 latents stand at every second place of both axes.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from anywhere


from common.errors import UserError, cli_main

PATCH = 2


def spread_patches(x: np.ndarray, shift: float) -> np.ndarray:
    """Moments (2C, h, w) → (2C, 2h, 2w): between the patches the mean is the VAE's shift, so that scaled latents are 0, and std is 0."""
    channels, h, w = x.shape
    spread = np.zeros((channels, h // PATCH, 2, PATCH, w // PATCH, 2, PATCH), x.dtype)
    spread[: channels // 2] = shift
    spread[:, :, 0, :, :, 0, :] = x.reshape(channels, h // PATCH, PATCH, w // PATCH, PATCH)
    return spread.reshape(channels, 2 * h, 2 * w)


def gather_patches(x: Tensor) -> Tensor:
    """(B, C, 2h, 2w) → the patches (B, C, h, w)."""
    grid = x.unflatten(3, (-1, 2, PATCH)).unflatten(2, (-1, 2, PATCH))  # (B, C, h/2, 2, 2, w/2, 2, 2)
    return grid[:, :, :, 0, :, :, 0, :].flatten(4, 5).flatten(2, 3)


@cli_main
def main(argv: list[str] | None = None) -> None:
    """The command: a folder of loose latents → another one."""
    parser = argparse.ArgumentParser(description="Spreads the patches of a data set over four times the tokens.")
    parser.add_argument("--source", required=True, help="data set with vae-sd/")
    parser.add_argument("--dest", required=True, help="new data set; what is there already stays")
    options = parser.parse_args(argv)
    source, dest = Path(options.source) / "vae-sd", Path(options.dest) / "vae-sd"
    if not (source / "dataset.json").is_file():
        raise UserError(f"--source {options.source}: holds no vae-sd/dataset.json")
    if dest.exists():
        return
    shift = json.loads((source / "vae.json").read_text())["shift_factor"]
    aside = dest.with_name("vae-sd.partial")
    shutil.rmtree(aside, ignore_errors=True)
    for path in sorted(source.rglob("*")):
        target = aside / path.relative_to(source)
        if path.is_dir():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            np.save(target, spread_patches(np.load(path), shift))
        else:
            shutil.copy(path, target)
    aside.rename(dest)


if __name__ == "__main__":
    main()
