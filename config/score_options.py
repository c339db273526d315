"""Options of train.py for scores during training: images of the averaged weights against a reference."""

import dataclasses

from config.rules import option


@dataclasses.dataclass
class ScoreOptions:
    """Which images are drawn, how often, and what is computed of them. `evaluate.py` has the same metrics and networks."""

    eval_steps: int = option(
        "metrics",
        0,
        "draw images, score them against --eval-ref and save a checkpoint every so many steps, and at the end; 0: never",
        ge=0,
        le=10**12,
        resume="free",
    )
    eval_ref: str | None = option("metrics", None, "reference: .npz in ADM's format or a folder of PNG", resume="free")
    eval_samples: int = option(
        "metrics", 10000, "images drawn at each budget, of balanced classes", ge=2, le=10**7, resume="free"
    )
    eval_budgets: list[float] | None = option(
        "metrics", None, "ELIT: budgets to draw at; the first one decides what is best (default: all latents)",
        gt=0, le=1, resume="free", distinct=True,
    )  # fmt: skip
    eval_metrics: list[str] = option(
        "metrics", ["fid"], "metrics of evaluate.py; the first one decides what is best", resume="free", distinct=True
    )
    eval_cfg_scale: float = option("metrics", 1.0, "guidance scale of the images; 1: none", ge=1, le=1e4, resume="free")
    eval_num_steps: int = option(
        "metrics", 50, "Euler steps of the images (DFM: --num-steps-per-scale)", ge=1, le=10**6, resume="free"
    )
    eval_features: str | None = option("metrics", None, "another network than Inception, as module:factory", resume="free")
    inception_weights: str | None = option("metrics", None, "as of evaluate.py", resume="free")
    dino_weights: str | None = option("metrics", None, "as of evaluate.py", resume="free")
    clip_weights: str | None = option("metrics", None, "as of evaluate.py", resume="free")
    clip_score: str | None = option("metrics", None, "text models: as of evaluate.py", resume="free")
    keep_best: bool = option("metrics", False, "never delete the checkpoint with the best score (best.json)", resume="free")
