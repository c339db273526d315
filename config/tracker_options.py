"""Options of train.py for the place of a run in Weights & Biases."""

import dataclasses

from config.rules import option


@dataclasses.dataclass
class TrackerOptions:
    """What `--report-to wandb` tells W&B of the run, beside its name."""

    wandb_project: str = option("output", "elit", "W&B project", resume="free")
    wandb_entity: str | None = option("output", None, "W&B user or team (default: the login's)", resume="free")
    wandb_tags: list[str] = option("output", [], "W&B tags of the run", resume="free", distinct=True)
