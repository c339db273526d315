"""Every random draw, by index.

A draw belongs to an image, a training step or an epoch, never to a process: it is made on the CPU by a counter-based
generator (Philox; Salmon et al. 2011) whose key is (purpose, seed, index) and whose counter starts at the image's place, so
that any process can make just its own share. Results do not depend on device, process count or batch size.

(PyTorch's CPU generator is not used: it keeps 32 bits of its seed, so that two of 50,000 images would often be the same.)
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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


def to_device(draws: Tensor, device: torch.device) -> Tensor:
    """The draws on `device`: to a GPU through pinned memory, so that the host does not wait for the copy."""
    pinned = draws.pin_memory() if device.type == "cuda" and draws.device.type == "cpu" else draws
    return pinned.to(device, non_blocking=True)


def image_noise(global_seed: int, indices: Sequence[int], shape: Sequence[int], level: int = 0) -> Tensor:
    """Starting noise of the images `indices`: (len(indices), *shape) float32. `level`: of a pyramid, from the finest (0) on."""
    return torch.stack([normal(generator("image noise", global_seed, i, place=level), shape) for i in indices])


def pyramid_noise(global_seed: int, indices: Sequence[int], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Starting noise of the images' stages (DFM), coarsest first: (len(indices), *shape) each."""
    return [image_noise(global_seed, indices, shape, len(shapes) - 1 - s) for s, shape in enumerate(shapes)]


def image_labels(global_seed: int, indices: Sequence[int], num_classes: int) -> Tensor:
    """Uniform class ids of the images `indices`: (len(indices),) int64."""
    return torch.tensor([int(generator("image label", global_seed, i).integers(num_classes)) for i in indices])


def sde_noise(global_seed: int, indices: Sequence[int], step: int, shape: Sequence[int]) -> Tensor:
    """Noise of SDE step `step` for the images `indices`: (len(indices), *shape) float32."""
    return torch.stack([normal(generator("SDE noise", global_seed, i, place=step), shape) for i in indices])


@dataclass
class Draws:
    """The random numbers of one forward for the images of one process, b of them."""

    posterior: Tensor  # (b, C, h, w) normal: which sample of the VAE's posterior
    noise: Tensor  # (b, C, h, w) normal: the flow's noise
    time_uniform: Tensor  # (b,) uniform in [0, 1)
    time_normal: Tensor  # (b,) normal
    label_drop: Tensor  # (b,) uniform in [0, 1): a label is dropped where it is below the dropout probability
    level: float  # uniform in [0, 1), one for the whole global batch: picks the mask level (ELIT)
    stage: float  # the same, for the active stage (DFM)
    coarse_noise: list[Tensor]  # (b, C, h_s, w_s) normal: the flow's noise of each stage but the finest, whose is `noise` (DFM)
    stage_normal: Tensor  # (b, S) normal: the times of the stages before the active one (DFM)

    def to(self, device: torch.device) -> "Draws":
        """The same draws on `device`; the level and the stage stay numbers on the host."""

        def move(x: Any) -> Any:
            if isinstance(x, list):
                return [move(v) for v in x]
            return x if isinstance(x, float) else to_device(x, device)

        return Draws(**{k: move(v) for k, v in vars(self).items()})

    def rows(self, rows: Tensor) -> "Draws":
        """The draws of some of the images."""

        def select(x: Any) -> Any:
            return [v[rows] for v in x] if isinstance(x, list) else x[rows] if isinstance(x, Tensor) else x

        return Draws(**{k: select(v) for k, v in vars(self).items()})

    def pin_memory(self) -> "Draws":
        """The same draws in memory that a GPU can copy from without waiting; a data loader calls it, outside the main thread."""
        rebuild, (flat, *others) = self.__reduce__()
        return rebuild(flat.pin_memory(), *others)

    def __reduce__(self) -> tuple[Callable, tuple]:
        """One tensor goes from a data worker to the training process, which would take time for each of many."""
        values = [v for v in vars(self).values() if isinstance(v, Tensor)]
        tensors = [*values, *self.coarse_noise]
        flat = torch.cat([x.flatten() for x in tensors])
        return split_draws, (flat, [tuple(x.shape) for x in tensors], self.level, self.stage)


def split_draws(flat: Tensor, shapes: Sequence[Sequence[int]], level: float, stage: float) -> Draws:
    """The draws whose tensors, of these shapes, lie one after the other in `flat` as `Draws.__reduce__` puts them."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    views = [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]
    posterior, noise, uniform, normals, drop, stage_normal, *coarse = views
    return Draws(posterior, noise, uniform, normals, drop, level, stage, coarse, stage_normal)


def training_draws(
    seed: int,
    n: int,
    batch_slice: range,
    shape: Sequence[int],
    purpose: str = "training",
    further_shapes: Sequence[Sequence[int]] = (),
) -> Draws:
    """All draws of forward `n` (counted over micro-steps) for the images at `batch_slice` of the global batch.

    Args:
        seed: of the run.
        n: the forward.
        batch_slice: this process's part of the global batch.
        shape: (C, h, w) of the VAE latents.
        purpose: other draws for another purpose.
        further_shapes: of more noise that the flow needs: of DFM's stages but the finest, coarsest first.
    """
    rows = []
    coarse = []
    for place in batch_slice:
        rng = generator(purpose, seed, n, place + 1)
        u_time, u_drop = rng.random(2)
        n_time = rng.standard_normal()
        rows.append((normal(rng, shape), normal(rng, shape), u_time, n_time, u_drop))
        coarse.append(([normal(rng, s) for s in further_shapes], normal(rng, (len(further_shapes) + 1,))))
    posterior, noise, u_time, n_time, u_drop = zip(*rows, strict=True)
    coarse_noise, stage_normal = zip(*coarse, strict=True)
    level, stage = generator(purpose, seed, n).random(2).tolist()  # place 0 of the same generator
    return Draws(
        posterior=torch.stack(posterior),
        noise=torch.stack(noise),
        time_uniform=torch.tensor(u_time, dtype=torch.float32),
        time_normal=torch.tensor(n_time, dtype=torch.float32),
        label_drop=torch.tensor(u_drop, dtype=torch.float32),
        level=level,
        stage=stage,
        coarse_noise=[torch.stack(stage) for stage in zip(*coarse_noise, strict=True)],
        stage_normal=torch.stack(stage_normal),
    )


def image_flips(seed: int, n: int, batch_slice: range) -> list[bool]:
    """Whether forward `n` takes the mirrored image, for the images at `batch_slice` of the global batch: each with probability 1/2."""
    return [bool(generator("flip", seed, n, place).integers(2)) for place in batch_slice]


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The order of the data in `epoch`: a permutation of range(num_samples)."""
    return generator("epoch order", seed, epoch).permutation(num_samples)
