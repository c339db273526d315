"""Interpolants, training times and the flow-matching loss (SiT, arXiv 2401.08740, §2)."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from randomness import Draws, training_draws
from vae import VAERecord, sample_latents

PathType = Literal["linear", "cosine"]


class Interpolant(NamedTuple):
    """Coefficients at t of x_t = α·x + σ·ε and of the velocity α′·x + σ′·ε, shaped as t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def interpolant(t: Tensor, path_type: PathType = "linear") -> Interpolant:
    """The path between data (t = 0) and noise (t = 1)."""
    if path_type == "linear":
        return Interpolant(1 - t, t, -torch.ones_like(t), torch.ones_like(t))
    angle = t * (math.pi / 2)
    alpha, sigma = torch.cos(angle), torch.sin(angle)
    return Interpolant(alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha)


def training_times(draws: Draws, weighting: Literal["uniform", "lognormal"], path_type: PathType = "linear") -> Tensor:
    """t (B,) of a training step: uniform, or lognormal noise levels σ = e^n put on the path."""
    if weighting == "uniform":
        return draws.time_uniform
    if path_type == "linear":
        return torch.sigmoid(draws.time_normal)  # σ/(1 + σ)
    return 2 / math.pi * torch.atan(torch.exp(draws.time_normal))


def dropped_labels(y: Tensor, draws: Draws, probability: float, num_classes: int) -> Tensor:
    """Labels (B,) with a share of them replaced by the null label, for classifier-free guidance."""
    return torch.where(draws.label_drop < probability, num_classes, y)


def flow_matching_loss(
    model: Callable, x: Tensor, noise: Tensor, t: Tensor, y: Tensor, path_type: PathType, **kwargs
) -> Tensor:
    """Velocity mean squared error of each sample (B,), in float32.

    Args:
        x, noise: (B, C, H, W) scaled VAE latents and normal noise. t: (B,). y: (B,) labels, already dropped.
        kwargs: further arguments of the model, e.g. `inference_budget`.
    """
    path = Interpolant(*(c.view(-1, 1, 1, 1) for c in interpolant(t, path_type)))
    velocity = model(path.alpha * x + path.sigma * noise, t, y, **kwargs)
    target = path.d_alpha * x + path.d_sigma * noise
    return (velocity.float() - target).square().flatten(1).mean(dim=1)


@torch.no_grad()
def held_out_losses(
    model: Callable,
    batch: dict[str, Tensor],
    indices: range,
    record: VAERecord,
    budgets: Sequence[float | None],
    *,
    weighting: Literal["uniform", "lognormal"],
    path_type: PathType,
) -> Tensor:
    """Velocity loss of each held-out sample at each budget, (len(budgets), B), with time and noise fixed by the sample's index.

    Args:
        batch: "moments" (B, 2C, h, w) and "label" (B,) of the samples `indices` of the held-out set.
    """
    moments, y = batch["moments"], batch["label"]
    shape = (moments.shape[1] // 2, *moments.shape[2:])
    draws = training_draws(0, 0, indices, shape, purpose="held-out").to(moments.device)
    x = sample_latents(moments, draws.posterior, record)
    t = training_times(draws, weighting, path_type)
    arguments = [{} if b is None else {"inference_budget": b} for b in budgets]
    return torch.stack([flow_matching_loss(model, x, draws.noise, t, y, path_type, **a) for a in arguments])
