"""Mean and standard deviation of each latent channel."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import write_atomically
from config.tool_options import StatsConfig
from data import remote
from data.dataset import STATS_FILE, Latents, open_latents
from preprocessing.check import blocks
from preprocessing.source import prefetch


def stats(config: StatsConfig) -> None:
    """latent_stats.json in the data folder: count, and mean and standard deviation of each channel of the latents."""
    if remote.is_remote(config.source):
        raise UserError(f"--source {config.source}: remote; measure the data where it lies, and copy {STATS_FILE} with it")
    latents = open_latents(config.source)
    with ThreadPoolExecutor(config.workers) as threads:
        mean, std = channel_statistics(latents, threads)
    path = Path(config.source) / STATS_FILE
    values = {"count": len(latents), "mean": mean.tolist(), "std": std.tolist()}
    write_atomically(path, json.dumps(values, indent=1))
    print(f"{path}: " + ", ".join(f"{m:.4f} ± {s:.4f}" for m, s in zip(mean, std, strict=True)))


def channel_statistics(latents: Latents, threads: ThreadPoolExecutor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) of z = mean + std·ε: E z = E mean, E z² = E mean² + E std². float64."""
    channels = latents.shape[0] // 2
    sums, kinds = np.zeros((3, channels)), [False, True] if latents.flips else [False]  # whether mirrored

    def of_block(block: range) -> np.ndarray:
        parts = [latents.read(block, [flip] * len(block)) for flip in kinds]
        moments = np.stack([m.numpy() for part in parts for m in part]).astype(np.float64)
        mean, std = moments[:, :channels], moments[:, channels:]
        return np.stack([v.sum(axis=(0, 2, 3)) for v in (mean, mean**2, std**2)])

    for part in prefetch(threads, of_block, blocks(len(latents), "stats"), ahead=8):
        sums += part
    first, second, noise = sums / (len(latents) * len(kinds) * latents.shape[1] * latents.shape[2])
    return first, np.sqrt(np.maximum(second - first**2, 0) + noise)
