"""What the benchmarks compare with: the same maths and reading written as plainly as PyTorch allows, sharing no code with ours.

Shapes: B batch, N tokens, D width.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset


class PlainBlock(nn.Module):
    """adaLN-Zero transformer block; x (B, N, D), c (B, D) → (B, N, D)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.condition = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        B, N, D = x.shape
        m = self.condition(F.silu(c)).view(B, 6, 1, D)
        h = F.layer_norm(x, (D,), eps=1e-6) * (1 + m[:, 1]) + m[:, 0]
        q, k, v = (a.view(B, N, self.num_heads, -1).transpose(1, 2) for a in self.qkv(h).split(D, dim=2))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        x = x + m[:, 2] * self.out(h)
        h = F.layer_norm(x, (D,), eps=1e-6) * (1 + m[:, 4]) + m[:, 3]
        return x + m[:, 5] * self.down(F.gelu(self.up(h), approximate="tanh"))


class PlainDiT(nn.Module):
    """Diffusion transformer v(x, t, y) on (B, C, S, S): patches, sine–cosine positions, `PlainBlock`s, linear head.

    Its parameters come in the same order as those of a SiT without qk_norm, so that weights can be copied one by one.
    """

    def __init__(
        self, *, input_size: int, patch_size: int, hidden_size: int, depth: int, num_heads: int, in_channels=4, num_classes=1000
    ):
        super().__init__()
        self.patch_size, self.side = patch_size, input_size // patch_size
        self.patches = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)
        self.time_in, self.time_out = nn.Linear(256, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.labels = nn.Embedding(num_classes + 1, hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(hidden_size, num_heads) for _ in range(depth))
        self.head = nn.Linear(hidden_size, patch_size * patch_size * in_channels)
        self.head_condition = nn.Linear(hidden_size, 2 * hidden_size)
        place = torch.arange(self.side * self.side)
        axes = [sinusoids(axis.double(), hidden_size // 4)[:, None] for axis in (place % self.side, place // self.side)]
        self.register_buffer("positions", torch.cat([w for a in axes for w in (a.sin(), a.cos())], dim=1).flatten(1).float())

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angles = sinusoids(t, 128)
        c = self.time_out(F.silu(self.time_in(torch.cat([angles.cos(), angles.sin()], dim=1)))) + self.labels(y)  # (B, D)
        x = self.patches(x).flatten(2).mT + self.positions  # (B, N, D)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.head_condition(F.silu(c))[:, None].chunk(2, dim=2)
        x = self.head(F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale) + shift)  # (B, N, p·p·C)
        p, S = self.patch_size, self.side
        return torch.einsum("bhwpqc->bchpwq", x.view(len(x), S, S, p, p, -1)).reshape(len(x), -1, S * p, S * p)


def sinusoids(position: Tensor, count: int) -> Tensor:
    """Angles position · 10000^(−i/count), i = 0 … count−1; (n,) → (n, count)."""
    return position[:, None] * torch.exp(-math.log(10000) / count * torch.arange(count, device=position.device))


class PlainEMA:
    """Average of a model's parameters, moved towards them by 1 − decay at each update."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.source = decay, [p.detach() for p in model.parameters()]
        self.average = [p.clone() for p in self.source]

    def update(self) -> None:
        torch._foreach_lerp_(self.average, self.source, 1 - self.decay)


class FilesOneByOne(Dataset):
    """Latents, and with `images` the PNGs too, read as the published training code does: each sample opens its own files."""

    def __init__(self, data_dir: Path, images: bool):
        self.latents = sorted((data_dir / "vae-sd").rglob("*.npy"))
        self.images = sorted((data_dir / "images").rglob("*.png")) if images else None
        labels = dict(json.loads((data_dir / "vae-sd" / "dataset.json").read_text())["labels"])
        self.labels = [labels[path.relative_to(data_dir / "vae-sd").as_posix()] for path in self.latents]

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        moments, label = torch.from_numpy(np.load(self.latents[index])), torch.tensor(self.labels[index])
        if self.images is None:
            return moments, label
        with Image.open(self.images[index]) as image:
            pixels = np.array(image)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), moments, label
