"""W&B and TensorBoard. A tracker that fails is a warning, never the end of a run."""

import dataclasses
import os
import secrets
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from common.errors import UserError
from common.files import write_atomically
from common.logging import warn
from config.options import TrainConfig
from training.run_dir import RunDir


def log_tracker_errors(action: Callable[[], None]) -> None:
    """Run `action`; whatever it raises becomes a warning."""
    try:
        action()
    except Exception as error:
        warn(f"tracker: {error}")


def check(config: TrainConfig, given: Container[str]) -> list[str]:
    """Refuse names that W&B does; returns warnings. given: the options that the user gave."""
    if config.report_to != "wandb":
        names = [name for name in ("wandb_project", "wandb_entity", "wandb_tags") if name in given]
        return [f"--{name.replace('_', '-')}: has no effect with --report-to {config.report_to}" for name in names]
    if len(config.wandb_project) > 128 or set("/\\#?%:") & set(config.wandb_project):
        raise UserError(f"--wandb-project {config.wandb_project}: must be at most 128 characters, none of them / \\ # ? % :")
    if "/" in (config.wandb_entity or ""):
        raise UserError(f"--wandb-entity {config.wandb_entity}: must be the name of a user or team, without /")
    for tag in config.wandb_tags:
        if len(tag) > 64:
            raise UserError(f"--wandb-tags {tag}: must be at most 64 characters")
    return []


def start_trackers(accelerator: Accelerator, config: TrainConfig, run_dir: RunDir, step: int) -> None:
    """Start the tracker of --report-to, which continues the run's own after `step`."""
    if config.report_to == "none":
        return
    run = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in dataclasses.asdict(config).items()}
    folder = run_dir.path / config.logging_dir
    if run_dir.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1}}  # what was logged after the checkpoint
    if config.report_to == "wandb" and run_dir.is_main:
        options: dict[str, Any] = {"name": config.exp_name, "dir": str(folder), "mode": wandb_mode()}
        options |= {"entity": config.wandb_entity, "tags": config.wandb_tags or None}
        if options["mode"] == "online":
            options |= {"id": read_or_create(folder / "wandb_id", secrets.token_hex(4)), "resume": "allow"}
        arguments = {"wandb": options}
    project = config.wandb_project if config.report_to == "wandb" else "elit"
    log_tracker_errors(lambda: accelerator.init_trackers(project, config=run, init_kwargs=arguments))


def log_values(accelerator: Accelerator, values: dict[str, float], step: int) -> None:
    """Numbers of a step, by name."""
    for tracker in accelerator.trackers:
        log_tracker_errors(lambda t=tracker: t.log(values, step=step))


def log_images(accelerator: Accelerator, images: np.ndarray, step: int) -> None:
    """Sample images of a step, uint8 (n, H, W, 3)."""
    for tracker in accelerator.trackers:
        log_tracker_errors(lambda t=tracker: t.log_images({"samples": images}, step=step))


def wandb_mode() -> str:
    """online, or offline with a warning where nobody is logged in."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import wandb

    if wandb.api.api_key:
        return "online"
    warn("wandb has no login: writing offline (wandb login, then wandb sync, uploads it)")
    return "offline"


def read_or_create(path: Path, value: str) -> str:
    """What the file holds; `value` the first time, which is then kept."""
    if not path.exists():
        write_atomically(path, value)
    return path.read_text()
