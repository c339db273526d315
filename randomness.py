"""Every random draw, by index.

A draw belongs to an image, a training step or an epoch, never to a process: it is made on the CPU by a counter-based
generator (Philox; Salmon et al. 2011) whose key is (purpose, seed, index) and whose counter starts at the image's place, so
that any process can make just its own share. Results do not depend on device, process count or batch size.

(PyTorch's CPU generator is not used: it keeps 32 bits of its seed, so that two of 50,000 images would often be the same.)
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def generator(purpose: str, seed: int, index: int, place: int = 0) -> np.random.Generator:
    """The generator of (purpose, seed, index); `place` picks one of 2⁶⁴ independent streams of it."""
    key = hashlib.blake2b(f"{purpose}/{int(seed)}/{int(index)}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, "<u8"), counter=[0, 0, 0, place]))


def normal(rng: np.random.Generator, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 tensor."""
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


# ------------------------------------------------------------------------------------------------------- generation


def image_noise(global_seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Starting noise of the images `indices`: (len(indices), *shape) float32."""
    return torch.stack([normal(generator("image noise", global_seed, i), shape) for i in indices])


def image_labels(global_seed: int, indices: Sequence[int], num_classes: int) -> Tensor:
    """Uniform class ids of the images `indices`: (len(indices),) int64."""
    return torch.tensor([int(generator("image label", global_seed, i).integers(num_classes)) for i in indices])


def sde_noise(global_seed: int, indices: Sequence[int], step: int, shape: Sequence[int]) -> Tensor:
    """Noise of SDE step `step` for the images `indices`: (len(indices), *shape) float32."""
    return torch.stack([normal(generator("SDE noise", global_seed, i, place=step), shape) for i in indices])


# --------------------------------------------------------------------------------------------------------- training


@dataclass
class Draws:
    """The random numbers of one forward for the images of one process, b of them."""

    posterior: Tensor  # (b, C, h, w) normal: which sample of the VAE's posterior
    noise: Tensor  # (b, C, h, w) normal: the flow's noise
    time_uniform: Tensor  # (b,) uniform in [0, 1)
    time_normal: Tensor  # (b,) normal
    label_drop: Tensor  # (b,) uniform in [0, 1): a label is dropped where it is below the dropout probability
    level: float  # uniform in [0, 1), one for the whole global batch: picks the mask level (ELIT) or the stage (DFM)

    def to(self, device: torch.device) -> "Draws":
        """The same draws on `device`; the level stays a number on the host."""
        moved = {k: v.pin_memory() if device.type == "cuda" else v for k, v in vars(self).items() if k != "level"}
        return Draws(**{k: v.to(device, non_blocking=True) for k, v in moved.items()}, level=self.level)


def training_draws(seed: int, n: int, places: range, shape: Sequence[int], purpose: str = "training") -> Draws:
    """All draws of forward `n` (counted over micro-steps) for the images at `places` of the global batch.

    Args:
        places: this process's slice of the global batch.
        shape: (C, h, w) of the VAE latents.
    """
    rows = []
    for place in places:
        rng = generator(purpose, seed, n, place + 1)
        u_time, u_drop = rng.random(2)
        n_time = rng.standard_normal()
        rows.append((normal(rng, shape), normal(rng, shape), u_time, n_time, u_drop))
    posterior, noise, u_time, n_time, u_drop = zip(*rows, strict=True)
    return Draws(
        posterior=torch.stack(posterior),
        noise=torch.stack(noise),
        time_uniform=torch.tensor(u_time, dtype=torch.float32),
        time_normal=torch.tensor(n_time, dtype=torch.float32),
        label_drop=torch.tensor(u_drop, dtype=torch.float32),
        level=float(generator(purpose, seed, n).random()),  # place 0 of the same generator
    )


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The order of the data in `epoch`: a permutation of range(num_samples)."""
    return generator("epoch order", seed, epoch).permutation(num_samples)
