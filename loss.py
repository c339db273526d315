"""Interpolants, training times and losses: flow matching (SiT, arXiv 2401.08740, §2), DFM (2506.19839), REPA (2410.06940, §3)."""

import bisect
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from models.conditioning import Condition, null_condition, select
from models.dfm import decompose
from randomness import Draws

PathType = Literal["linear", "cosine"]


T = TypeVar("T", float, Tensor)


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


def shift_time(t: T, s: float) -> T:
    """Shifted times, s·t/(1 + (s − 1)·t): larger latents need more noise to lose as much (SD3, arXiv 2403.03206, §5.3.2)."""
    return s * t / (1 + (s - 1) * t)


def training_times(
    draws: Draws, weighting: Literal["uniform", "lognormal"], path_type: PathType = "linear", time_shift: float = 1.0
) -> Tensor:
    """Times (B,) of a training step: uniform, or lognormal noise levels σ = e^n put on the path; then shifted."""
    if weighting == "uniform":
        t = draws.time_uniform
    elif path_type == "linear":
        t = torch.sigmoid(draws.time_normal)  # σ/(1 + σ)
    else:
        t = 2 / math.pi * torch.atan(torch.exp(draws.time_normal))
    return shift_time(t, time_shift)


def share_of_times(
    low: float, high: float, weighting: Literal["uniform", "lognormal"], path_type: PathType = "linear", time_shift: float = 1.0
) -> float:
    """The share of `training_times` that lies between two times."""

    def below(t: float) -> float:
        if 0 < t < 1:
            t = shift_time(t, 1 / time_shift)  # before the shift
        if weighting == "uniform" or not 0 < t < 1:
            return t
        return NormalDist().cdf(math.log(t / (1 - t) if path_type == "linear" else math.tan(math.pi / 2 * t)))

    return below(high) - below(low)


def drop_conditions(model: Any, y: Condition, draws: Draws, probability: float) -> Condition:
    """Labels (B,) or text, a share of them replaced by the model's null condition, for classifier-free guidance."""
    if probability == 0:  # a text model without a null prompt trains, too
        return y
    return select(draws.label_drop < probability, null_condition(model, y), y)


def flow_matching_loss(
    model: Callable, x: Tensor, noise: Tensor, t: Tensor, y: Condition, path_type: PathType, **kwargs: Any
) -> Tensor:
    """Velocity mean squared error of each sample (B,), in float32.

    Args:
        model: velocity model.
        x: (B, C, H, W) scaled VAE latents.
        noise: (B, C, H, W) normal noise.
        t: (B,) times.
        y: (B,) labels or text, already dropped.
        path_type: see `interpolant`.
        **kwargs: further arguments of the model, e.g. `inference_budget`.
    """
    state, target = interpolate(x, noise, t, path_type)
    return squared_error(model(state, t, y, **kwargs), target)


def interpolate(x: Tensor, noise: Tensor, t: Tensor, path_type: PathType) -> tuple[Tensor, Tensor]:
    """The state x_t and the velocity at times t (B,) between x and noise, (B, C, H, W) each."""
    path = Interpolant(*(c.view(-1, 1, 1, 1) for c in interpolant(t, path_type)))
    return path.alpha * x + path.sigma * noise, path.d_alpha * x + path.d_sigma * noise


def squared_error(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample (B,), in float32."""
    return (velocity.float() - target).square().flatten(1).mean(dim=1)


def patch_losses(velocity: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor], grid: Sequence[int]) -> Tensor:
    """Mean squared error on each patch of a grid, (B, rows, columns), float32: its mean is the sample's loss.

    Args:
        velocity: (B, C, H, W), or DFM's stages, whose errors are summed.
        target: the same.
        grid: rows and columns of patches, which divide the sides.
    """
    if isinstance(velocity, Tensor) and isinstance(target, Tensor):
        error = (velocity.float() - target).square().mean(dim=1, keepdim=True)
        rows, columns = grid
        return F.adaptive_avg_pool2d(error, (rows, columns))[:, 0]
    return torch.stack([patch_losses(v, u, grid) for v, u in zip(velocity, target, strict=True)]).sum(dim=0)


def active_stage(draw: float, stage_weights: Sequence[float]) -> int:
    """The stage that a uniform draw in [0, 1) picks by the weights."""
    return min(bisect.bisect_right(list(accumulate(stage_weights)), draw), len(stage_weights) - 1)


def stage_times(t: Tensor, normals: Tensor, active: int) -> Tensor:
    """Times (B, S) of DFM's stages: sigmoid(n − 2) before the active stage, t (B,) in it, 1 after it. normals: (B, S)."""
    times = torch.ones_like(normals)
    times[:, :active] = torch.sigmoid(normals[:, :active] - 2)
    times[:, active] = t
    return times


def dfm_loss(
    model: Callable,
    x: Tensor,
    noise: Sequence[Tensor],
    t: Tensor,
    y: Condition,
    path_type: PathType,
    active: int,
    **kwargs: Any,
) -> Tensor:
    """DFM's loss of each sample (B,): the velocity errors of the stages up to `active`, summed (arXiv 2506.19839).

    Args:
        model: velocity model of a pyramid.
        x: (B, C, H, W) scaled VAE latents.
        noise: one per stage, coarsest first.
        t: (B, S) as `stage_times` gives them.
        y: (B,) labels or text, already dropped.
        path_type: see `interpolant`.
        active: the active stage.
        **kwargs: further arguments of the model, e.g. `inference_budget`.
    """
    pyramid = decompose(x, len(noise))
    states, targets = zip(
        *(interpolate(x_s, n_s, t[:, s], path_type) for s, (x_s, n_s) in enumerate(zip(pyramid, noise, strict=True))),
        strict=True,
    )
    states = [*states[: active + 1], *(torch.zeros_like(n) for n in noise[active + 1 :])]
    velocities = model(states, t, y, active_stage=active, **kwargs)
    losses = [squared_error(v, target) for v, target in zip(velocities, targets, strict=False)]
    return sum(losses[1:], start=losses[0])


class Projecting:
    """A model that keeps its REPA projections aside: a velocity loss calls it as it calls any model.

    `projections`: those of the last call, (B, N, z) for each target encoder.
    """

    def __init__(self, model: Callable):
        self.model, self.projections = model, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's velocity."""
        velocity, self.projections = self.model(*args, return_features=True, **kwargs)
        return velocity


def normalise_over_patches(features: Tensor, gamma: float) -> Tensor:
    """Features (B, N, z) in float32, each channel normalised over the N patches of an image: (f − γ·mean) / (std + 1e-6).

    iREPA's spatial normalisation (arXiv 2512.10794): what all patches share, of which a share 1 − γ is left, tells little of where
    things are. The deviation is the unbiased one.
    """
    features = features.float()
    std, mean = torch.std_mean(features, dim=1, keepdim=True)
    return (features - gamma * mean) / (std + 1e-6)


def alignment_loss(projections: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
    """REPA: the mean over encoders, images and tokens of −cos(projection, feature), (B, N, z) each; computed in float32.

    Norms taken in half precision overflow at entries of a few thousand and vanish at small ones, and the run with them.
    """

    def scaled(x: Tensor) -> Tensor:
        # A cosine does not depend on lengths: with largest entry 1 no square leaves float32, not even bfloat16's.
        x = x.float()
        largest = x.detach().abs().amax(dim=-1, keepdim=True)
        return x / torch.where(largest > 0, largest, 1)

    pairs = zip(projections, features, strict=True)
    cosines = [F.cosine_similarity(scaled(p), scaled(f), dim=-1) for p, f in pairs]  # (B, N) each
    return -torch.stack(cosines).mean()
