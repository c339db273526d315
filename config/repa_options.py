"""Options of train.py: what REPA aligns with what, and for how long."""

import dataclasses
from typing import Literal

from config.rules import option


@dataclasses.dataclass
class RepaOptions:
    """Variants of REPA; the defaults are its paper's (arXiv 2410.06940), `conv` and `spatial` iREPA's (2512.10794)."""

    projector: Literal["mlp", "conv"] = option(
        "repa", "mlp", "map from tokens to features: three layers on each, or a 3×3 convolution", resume="same", when="repa"
    )
    target_norm: Literal["none", "spatial"] = option(
        "repa", "none", "the encoder's features as they are, or normalised over the patches of each image",
        resume="same", when="repa",
    )  # fmt: skip
    target_norm_gamma: float = option(
        "repa",
        0.6,
        "share of the mean over patches that --target-norm spatial subtracts",
        ge=0,
        le=1,
        resume="same",
        when="repa",
    )
    proj_until: int | None = option(
        "repa",
        None,
        "align in the first so many steps only (default: in all)",
        ge=1,
        le=10**12,
        resume="changeable",
        when="repa",
    )
