"""The Laplacian pyramid of DFM (arXiv 2506.19839): a stage is one level of it, 0 the coarsest; S stages."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError


def upsample(x: Tensor) -> Tensor:
    """(B, C, h, w) → (B, C, 2h, 2w), bilinear."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def decompose(x: Tensor, stages_count: int) -> list[Tensor]:
    """The Laplacian pyramid of x (B, C, H, W), coarsest stage first: stage s is (B, C, H/2^(S−1−s), W/2^(S−1−s)).

    Raises:
        UserError: H or W cannot be halved S − 1 times.
    """
    pyramid: list[Tensor] = []
    for _ in range(stages_count - 1):
        if x.shape[-2] % 2 or x.shape[-1] % 2:
            raise UserError(f"stages_count {stages_count}: a stage of {x.shape[-2]}×{x.shape[-1]} cannot be halved")
        low = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        pyramid.insert(0, x - upsample(low))
        x = low
    return [x, *pyramid]


def recompose(pyramid: Sequence[Tensor]) -> Tensor:
    """The image (B, C, H, W) of a pyramid, or, of its first stages alone, the coarser image that they make."""
    x = pyramid[0]
    for detail in pyramid[1:]:
        x = upsample(x) + detail
    return x
