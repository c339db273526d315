"""Where a model errs and what Read looks at, patch by patch: flow-matching loss and attention of the same noised latents."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flows import FlowMatching, State
from loss import patch_losses
from models.conditioning import Condition


class Patches(NamedTuple):
    """Of B images, in group order: G groups of J tokens, each read by J latents.

    Attributes:
        losses: (B, G, J), float32, the velocity's mean squared error on each token's patch.
        attention: (B, G, J latents, J tokens) of Read's last layer, the mean over heads.
    """

    losses: Tensor
    attention: Tensor


@torch.no_grad()
def patches_of(model: Any, flow: FlowMatching, x: Tensor, noise: State, t: Tensor, y: Condition) -> Patches:
    """Loss and attention at the full budget, of latents x (B, C, h, w) noised to times t (B,).

    Args:
        model: an ELIT model, in eval mode.
        flow: its flow.
        x: scaled latents.
        noise: a state of the flow.
        t: of every part of the state.
        y: labels (B,) or text.
    """
    state, times, target = flow.noised(model, x, noise, t)
    losses = patch_losses(model(state, times, y), target, model.interface.grid_size)
    grouped = model.interface.group(losses.flatten(1)[..., None])[..., 0]
    return Patches(grouped, model.read_attention(state, times, y).mean(dim=2))


def mean_patches(draws: int, of_draw: Callable[[int], Patches]) -> Patches:
    """The mean over draws of noise: the loss of a single one is mostly that noise."""
    found = [of_draw(n) for n in range(draws)]
    return Patches(*(torch.stack(part).mean(dim=0) for part in zip(*found, strict=True)))


def rank_correlations(a: np.ndarray, b: np.ndarray) -> list[float | None]:
    """Spearman's correlation of each row of a and b, (n, patches); None where all values of a row are equal."""
    from scipy.stats import rankdata

    ranks = [rankdata(x, axis=1) - (x.shape[1] + 1) / 2 for x in (a, b)]
    norms = np.sqrt(np.prod([(x**2).sum(axis=1) for x in ranks], axis=0))
    products = (ranks[0] * ranks[1]).sum(axis=1)
    return [float(p / n) if n else None for p, n in zip(products, norms, strict=True)]


def mean_and_error(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard error of the values that are known; None where there are too few."""
    known = [value for value in values if value is not None]
    error = float(np.std(known, ddof=1) / len(known) ** 0.5) if len(known) > 1 else None
    return (float(np.mean(known)) if known else None), error
