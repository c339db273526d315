"""W&B and TensorBoard. A tracker that fails is a warning, never the end of a run."""

import dataclasses
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

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
        if options["mode"] == "online":
            options |= {"id": read_or_create(folder / "wandb_id", secrets.token_hex(4)), "resume": "allow"}
        arguments = {"wandb": options}
    log_tracker_errors(lambda: accelerator.init_trackers("elit", config=run, init_kwargs=arguments))


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
