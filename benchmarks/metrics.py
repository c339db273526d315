"""Precision and Recall, and the Fréchet distance, beside what others compute them with; every ratio of one run.

python -m benchmarks.metrics [--full]

Without --full: P/R on 2,000 × 2,000 features beside scikit-learn's ball tree, and the Fréchet distance beside scipy's root. With
it, also P/R at its usual size, 10,000 × 50,000 features of 2048, with the peak of memory.
"""

import argparse
import resource
import time
import warnings
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from sklearn.neighbors import BallTree

from metrics import frechet_distance, precision_recall

DIM = 2048


def features(count: int, seed: int) -> np.ndarray:
    """Correlated non-negative rows (count, DIM) float32, of Inception's scale."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((64, DIM), dtype=np.float32) / 16
    return np.maximum(rng.standard_normal((count, 64), dtype=np.float32) @ mix + 0.1 * rng.random((count, DIM), np.float32), 0)


def timed(name: str, job: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    result = job()
    seconds = time.perf_counter() - start
    print(f"{name:48} {seconds:8.2f} s   {result}", flush=True)
    return seconds, result


def ball_tree(ref: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    """Precision and recall by neighbour queries (float64): is the nearest candidate within its own radius?"""
    trees = [BallTree(rows) for rows in (ref, samples)]
    shares = []
    for rows, others, tree in ((samples, ref, trees[1]), (ref, samples, trees[0])):
        radii = BallTree(others).query(others, 4)[0][:, 3]
        inside = np.zeros(len(rows), dtype=bool)
        for neighbours in tree.query_radius(others, radii):
            inside[neighbours] = True
        shares.append(inside.mean())
    return tuple(map(float, shares))


def scipy_distance(mu1, sigma1, mu2, sigma2) -> float:
    """By the root of the product."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="P/R at 10,000 x 50,000 too")
    options = parser.parse_args(argv)
    print(f"{torch.get_num_threads()} threads")
    warm = features(100, 0)  # imports and threads
    precision_recall(warm, warm)
    frechet_distance(*2 * _gaussian(warm[:, :600]))

    for count, kind in ((4096, "full rank"), (1000, "deficient rank")):
        gaussians = [f for seed in (0, 1) for f in _gaussian(features(count, seed) + 0.1 * noise(count, seed))]
        ours, _ = timed(f"Fréchet, {DIM} dimensions, {kind}: ours", lambda g=gaussians: frechet_distance(*g))
        other, _ = timed(f"Fréchet, {DIM} dimensions, {kind}: scipy sqrtm", lambda g=gaussians: scipy_distance(*g))
        _say("scipy / ours", other / ours, 5)

    ref, samples = features(2000, 0), features(2000, 1)
    ours, _ = timed("P/R 2,000 × 2,000, float16 as ADM", lambda: precision_recall(ref, samples))
    timed("P/R 2,000 × 2,000, float32", lambda: precision_recall(ref, samples, dtype="float32"))
    other, _ = timed("P/R 2,000 × 2,000, ball tree", lambda: ball_tree(ref, samples))
    _say("ball tree / ours", other / ours, 70)

    if options.full:
        ref, samples = features(10_000, 0), features(50_000, 1)
        ours, _ = timed("P/R 10,000 × 50,000, float16 as ADM", lambda: precision_recall(ref, samples, progress=True))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"  {ours:.0f} s of at most 300, {memory:.1f} GiB of at most 6: {'ok' if ours <= 300 and memory <= 6 else 'MISSED'}"
        )


def noise(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed + 7).standard_normal((count, DIM), dtype=np.float32)


def _gaussian(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows.mean(axis=0, dtype=np.float64), np.cov(rows, rowvar=False)


def _say(name: str, ratio: float, wanted: float) -> None:
    print(f"  {name}: {ratio:.1f} (at least {wanted}): {'ok' if ratio >= wanted else 'MISSED'}", flush=True)


if __name__ == "__main__":
    main()
