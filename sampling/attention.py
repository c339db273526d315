"""What an elastic model's Read looks at in its own images."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sampling.session import Session


class ReadMaps(NamedTuple):
    """Read's attention, its heads' mean, in units of uniform attention.

    Attributes:
        maps: (B, J, h, w), of each image and latent, made of those of all groups.
        windows: (J, g, g), of a single group, the mean over images and groups.
        entropy: (J,) in nats, of each head's attention, the mean over heads, groups and images.
    """

    maps: Tensor
    windows: Tensor
    entropy: Tensor


def read_maps(loaded: Session, latents: Tensor, seed: int, time: float, batch_size: int) -> ReadMaps:
    """What each latent reads from images, noised again to a time with their first noise: Read's last layer, at the full budget.

    Args:
        loaded: an elastic checkpoint.
        latents: (B, C, h, w) of its images 0 … B − 1.
        seed: that they were drawn with.
        time: t in [0, 1].
        batch_size: images per forward.
    """
    model: Any = loaded.model
    means, entropies = [], []
    for first in range(0, len(latents), batch_size):
        x = latents[first : first + batch_size]
        noise = loaded.starting_noise(seed, range(first, first + len(x)))
        y = loaded.condition(range(first, first + len(x)), x.device)
        t = torch.full((len(x),), time, device=x.device)
        with loaded.autocast():
            weights = model.read_attention(*loaded.flow.noised(model, x, noise, t)[:2], y)
        means.append(weights.mean(dim=2))  # (B, G, J latents, J tokens)
        entropies.append(torch.special.entr(weights).sum(dim=-1).mean(dim=(1, 2)))  # (B, J)
    mean, entropy = torch.cat(means), torch.cat(entropies).mean(dim=0)
    J = len(entropy)
    over_tokens = model.interface.ungroup(mean.transpose(2, 3))  # (B, N tokens, J latents), row-major
    maps = J * over_tokens.transpose(1, 2).unflatten(2, model.interface.grid_size)
    windows = J * mean.mean(dim=(0, 1)).unflatten(1, (model.interface.group_size,) * 2)
    return ReadMaps(maps, windows, entropy)


def shown_latents(J: int) -> list[int]:
    """The first three and the last three latents of J."""
    return sorted({*range(min(3, J)), *range(max(J - 3, 0), J)})
