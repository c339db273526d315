"""REPA in a training run: the target encoders, what is made of their features, and in which steps."""

import torch
from torch import Tensor

from common.precision import AMP_TYPES
from config.options import TrainConfig
from loss import normalise_over_patches
from models.encoders import encoder_names, load_encoders
from models.layers import narrow_linears


def aligned_steps(config: TrainConfig) -> float:
    """The number of steps, from the first on, in which the run aligns; 0 without REPA."""
    if not encoder_names(config.enc_type, config.proj_coeff):
        return 0
    return float("inf") if config.proj_until is None else config.proj_until


def check(config: TrainConfig, given: dict[str, object]) -> list[str]:
    """Warnings of options given by hand that have no effect."""
    warnings, off = [], not encoder_names(config.enc_type, config.proj_coeff)
    if config.enc_type != "none" and off:
        warnings.append(f"--enc-type {config.enc_type} without --proj-coeff: REPA is off")
    for name in ("projector", "target_norm", "proj_until"):
        if name in given and off:
            warnings.append(f"--{name.replace('_', '-')} {given[name]}: has no effect without --enc-type and --proj-coeff")
    if "target_norm_gamma" in given and (off or config.target_norm == "none"):
        warnings.append(f"--target-norm-gamma {given['target_norm_gamma']}: has no effect without --target-norm spatial")
    return warnings


class Alignment:
    """The encoders that a model's tokens are aligned with.

    Args:
        config: of the run.
        grid: (rows, columns) of the tokens.
        device: where the encoders are put.
    """

    def __init__(self, config: TrainConfig, grid: tuple[int, int], device: torch.device):
        self.config, self.steps = config, aligned_steps(config)
        names = encoder_names(config.enc_type, config.proj_coeff)
        encoders = load_encoders(names, config.resolution, grid, config.encoder_weights, device)
        self.encoders = [narrow_linears(encoder, AMP_TYPES[config.mixed_precision]) for encoder in encoders]

    def acts(self, step: int) -> bool:
        """Whether step `step` (from 1) aligns."""
        return step <= self.steps

    def features(self, images: Tensor) -> list[Tensor]:
        """What the projections (B, N, z) are to be like: of uint8 images (B, 3, H, W), for each encoder."""
        features = [encoder(images) for encoder in self.encoders]
        if self.config.target_norm == "none":
            return features
        return [normalise_over_patches(f, self.config.target_norm_gamma) for f in features]
