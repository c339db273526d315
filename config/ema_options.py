"""Options of averaged weights: power-function averages and their snapshots in training, and which length a sampler takes."""

import dataclasses

from config.rules import option

MAX_SIGMA = 0.2886  # the longest: 1 / √12, which is γ = 0, where all steps weigh the same


@dataclasses.dataclass
class SnapshotOptions:
    """Of train.py: which weights are written beside the checkpoints."""

    posthoc_ema: list[float] = option(
        "train",
        [],
        "also average by power functions of these relative lengths (EDM2), for lengths chosen after training: 0.05 0.1",
        gt=0,
        lt=MAX_SIGMA,
        resume="free",
        distinct=True,
    )
    posthoc_ema_steps: int = option(
        "output",
        10000,
        "a snapshot (bf16) of each average of --posthoc-ema every so many steps, and at the end",
        ge=1,
        le=10**12,
        resume="free",
    )
    snapshot_steps: int = option(
        "output",
        0,
        "the averaged weights alone as snapshots/STEP.safetensors every so many steps, and at the end; 0: never",
        ge=0,
        le=10**12,
        resume="free",
    )


@dataclasses.dataclass
class AverageOptions:
    """Of scripts that read a checkpoint: an average made of the snapshots of its run."""

    ema_sigma: float | None = option(
        "checkpoint",
        None,
        "the average of this relative length, made of the run's snapshots (train.py --posthoc-ema)",
        gt=0,
        lt=MAX_SIGMA,
        images=True,
        folder=(22, "sigma"),
    )
    ema_step: int | None = option(
        "checkpoint",
        None,
        "the step of --ema-sigma (default: the checkpoint's)",
        ge=1,
        le=10**12,
        images=True,
        folder=(23, "step"),
    )
