"""Mean and standard deviation of each latent channel, or of each position of each channel."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import write_atomically
from config.tool_options import StatsConfig
from data import remote
from data.dataset import STATS_FILE, Latents, open_latents
from preprocessing.check import blocks
from preprocessing.source import prefetch


def stats(config: StatsConfig) -> None:
    """latent_stats.json in the data folder: count, and mean and standard deviation of each channel (or position) of the latents."""
    if remote.is_remote(config.source):
        raise UserError(f"--source {config.source}: remote; measure the data where it lies, and copy {STATS_FILE} with it")
    latents = open_latents(config.source)
    with ThreadPoolExecutor(config.workers) as threads:
        mean, std = latent_statistics(latents, threads, axes=(0,) if config.per == "position" else (0, 2, 3))
    path = Path(config.source) / STATS_FILE
    values = {"count": len(latents), "mean": mean.tolist(), "std": std.tolist()}
    write_atomically(path, json.dumps(values, indent=1))
    if config.per == "position":
        print(f"{path}: of {' × '.join(map(str, mean.shape))}")
    else:
        print(f"{path}: " + ", ".join(f"{m:.4f} ± {s:.4f}" for m, s in zip(mean, std, strict=True)))


def latent_statistics(latents: Latents, threads: ThreadPoolExecutor, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of z = mean + std·ε over the axes of (n, C, h, w): E z = E mean, E z² = E mean² + E std². float64."""
    channels = latents.record.latent_channels
    kinds = [False, True] if latents.flips else [False]  # whether mirrored
    sums: Any = 0.0

    def of_block(block: range) -> np.ndarray:
        parts = [latents.read(block, [flip] * len(block)) for flip in kinds]
        moments = np.stack([m.numpy() for part in parts for m in part]).astype(np.float64)
        mean, std = moments[:, :channels], moments[:, channels:]
        std = std if std.size else np.zeros_like(mean)  # no posterior
        return np.stack([v.sum(axis=axes) for v in (mean, mean**2, std**2)])

    for part in prefetch(threads, of_block, blocks(len(latents), "stats"), ahead=8):
        sums += part
    shape = (len(latents) * len(kinds), *latents.shape)
    first, second, noise = sums / math.prod(shape[axis] for axis in axes)
    return first, np.sqrt(np.maximum(second - first**2, 0) + noise)
