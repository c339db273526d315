"""Distances of two sets of features that assume no Gaussian: KID, MIND and CMMD's kernel distance."""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from common.errors import UserError
from common.torchvision_shim import import_torchvision

SEED = 2020  # of subsets and directions: torch-fidelity's
KID_SUBSET = 1000  # rows of each of the 100 subsets, where there are so many
MIND_DIRECTIONS = 1000
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
BLOCK = 4096  # rows whose kernels exist at one time


def kid(ref_features: ArrayLike, sample_features: ArrayLike) -> float:
    """Kernel Inception Distance (Bińkowski et al. 2018, arXiv 1801.01401) of features (N, d) and (M, d), by torch-fidelity.

    The unbiased squared MMD with the kernel (x·y / d + 1)³, mean over 100 random subsets of 1,000 rows of each set (all rows of
    the smaller one, if it has fewer).
    """
    import_torchvision()
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    ref, samples = _rows(ref_features, sample_features, 2)
    size = min(KID_SUBSET, len(ref), len(samples))
    return kid_features_to_metric(samples, ref, kid_subset_size=size, rng_seed=SEED, verbose=False)[KEY_METRIC_KID_MEAN]


def mind(ref_features: ArrayLike, sample_features: ArrayLike, *, device: torch.device | str = "cpu") -> float:
    """Monge Inception Distance (Berthet et al. 2026, arXiv 2605.06797) of features (N, d) and (M, d).

    3d times the squared sliced 2-Wasserstein distance, over 1,000 directions: along each, the mean squared difference of the
    sorted projections. Of the larger set, as many random rows are taken as the smaller one has.
    """
    ref, samples = (rows.to(device) for rows in _rows(ref_features, sample_features, 1))
    count, d = min(len(ref), len(samples)), ref.shape[1]
    generator = torch.Generator().manual_seed(SEED)
    ref, samples = (
        rows if len(rows) == count else rows[torch.randperm(len(rows), generator=generator)[:count].to(device)]
        for rows in (ref, samples)
    )
    directions = torch.nn.functional.normalize(torch.randn(MIND_DIRECTIONS, d, generator=generator), dim=1).to(device)
    total = 0.0
    for some in directions.split(100):
        along_ref, along_samples = ((rows @ some.T).sort(dim=0).values for rows in (ref, samples))
        total += (along_ref - along_samples).square().mean(dim=0).double().sum().item()
    return 3 * d * total / MIND_DIRECTIONS


def cmmd(ref_features: ArrayLike, sample_features: ArrayLike, *, device: torch.device | str = "cpu") -> float:
    """CMMD (Jayasumana et al. 2024, arXiv 2401.09603) of CLIP's image embeddings (N, d) and (M, d), of any length.

    1,000 times the squared MMD of the embeddings scaled to length 1, with the kernel exp(−|x − y|² / (2 · 10²)); the estimator of
    least variance, whose means hold the diagonal.
    """
    ref, samples = (torch.nn.functional.normalize(rows.to(device), dim=1) for rows in _rows(ref_features, sample_features, 1))
    return CMMD_SCALE * (_kernel_mean(ref, ref) + _kernel_mean(samples, samples) - 2 * _kernel_mean(ref, samples))


def _kernel_mean(x: Tensor, y: Tensor) -> float:
    """Mean of exp(−|x − y|² / 2σ²) over all pairs of rows of length 1; float64 after the product."""
    total = 0.0
    for rows in x.split(BLOCK):
        for columns in y.split(BLOCK):
            squared = (2 - 2 * (rows @ columns.T).double()).clamp(min=0)
            total += squared.div_(-2 * CMMD_SIGMA**2).exp_().sum().item()
    return total / (len(x) * len(y))


def _rows(ref_features: ArrayLike, sample_features: ArrayLike, at_least: int) -> list[Tensor]:
    """Both sets as float32 (n, d). `UserError` for other shapes, too few rows, and values that are not finite."""
    sets = [torch.as_tensor(np.asarray(f), dtype=torch.float32) for f in (ref_features, sample_features)]
    for name, rows in zip(("reference", "sample"), sets, strict=True):
        if rows.dim() != 2 or rows.shape[1] != sets[0].shape[-1]:
            raise UserError(f"{name} features of shape {tuple(rows.shape)}; wanted (n, {sets[0].shape[-1]})")
        if len(rows) < at_least:
            raise UserError(f"{len(rows)} {name} image(s); wanted: at least {at_least}")
        if not rows.isfinite().all():
            raise UserError(f"{name} features hold values that are not finite")
    return sets
