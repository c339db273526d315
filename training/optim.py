"""Optimizer, learning-rate schedule and averaged weights."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from checkpoint.weights import load_state_dict
from common.errors import UserError, first_line
from config.options import TrainConfig

if TYPE_CHECKING:
    from training.sharding import ShardedModel


def optimizer_options(config: TrainConfig) -> dict[str, Any]:
    """AdamW's options, as its parameter groups name them."""
    return {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }


def create_optimizer(model: "nn.Module | ShardedModel", config: TrainConfig) -> AdamW:
    """AdamW over all parameters, fused."""
    return AdamW(model.parameters(), **optimizer_options(config), fused=True)


def load_optimizer(optimizer: AdamW, scaler: torch.amp.GradScaler | None, state: dict[str, Any], where: Path) -> None:
    """The moments and the loss scale of the training state `state`; AdamW's options stay this run's own.

    Raises UserError, which names `where`, if they are not those of an optimizer of this model.
    """
    moments, parameters = state["optimizer"]["state"], optimizer.param_groups[0]["params"]
    try:
        for place, entry in moments.items():
            shapes = [entry[name].shape for name in ("exp_avg", "exp_avg_sq")]
            if shapes != [parameters[place].shape] * 2 or entry["step"].numel() != 1:
                raise ValueError(f"moments of another shape for parameter {place}")
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        if scaler is not None and state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
    except Exception as error:  # whatever stands there instead
        raise UserError(f"{where}: its optimizer state is not one of this model: {first_line(error)}") from None


def create_schedule(optimizer: AdamW, config: TrainConfig, step: int, total_steps: int) -> LambdaLR:
    """The learning-rate schedule after optimizer step `step` of `total_steps`.

    The rate is a function of the step, and the rest is as the options say, whatever a checkpoint may have loaded.
    """
    optimizer.param_groups[0] |= optimizer_options(config) | {"initial_lr": config.learning_rate}
    schedule = LambdaLR(optimizer, learning_rate_factor(config, total_steps), last_epoch=step - 1)
    schedule._step_count = step + 1  # it is saved, and must not depend on interruptions
    return schedule


def learning_rate_factor(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at optimizer step n − 1 (PyTorch counts from 0): warm-up, schedule, cool-down."""
    warmup = 0 if config.lr_scheduler_type == "constant" else config.warmup_steps
    cooldown = round(config.lr_cooldown * total_steps)

    def factor(done: int) -> float:
        value = 1 / warmup + (1 - 1 / warmup) * min(done, warmup) / warmup if warmup else 1.0
        if config.lr_scheduler_type == "cosine":
            value *= 0.5 * (1 + math.cos(math.pi * min(max(0, done - warmup) / max(1, total_steps - warmup), 1)))
        if cooldown and done > total_steps - cooldown:
            value *= 1 - 0.98 * (done - (total_steps - cooldown)) / cooldown
        return value

    return factor


def depends_on_length(config: TrainConfig) -> bool:
    """Whether the learning rate of a step depends on the total number of steps."""
    return config.lr_scheduler_type == "cosine" or config.lr_cooldown > 0


class EMA:
    """Averaged copies of the weights, one for each decay; each starts as a copy and follows every optimizer step."""

    def __init__(self, model: nn.Module, decays: list[float]):
        self.models = {f"{d:g}": copy.deepcopy(model).eval().requires_grad_(False) for d in decays}
        self.sources = list(model.parameters())  # not their storage: DDP gives them another one
        self.updates: list[tuple[Callable, list[nn.Parameter]]] = [
            (get_ema_multi_avg_fn(d), list(m.parameters())) for d, m in zip(decays, self.models.values(), strict=True)
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Let each copy follow the weights by one step."""
        for average, parameters in self.updates:
            average(parameters, self.sources, None)

    def state_dicts(self) -> dict[str, dict[str, Tensor]]:
        """Those of the copies, by decay."""
        return {decay: model.state_dict() for decay, model in self.models.items()}

    def load(self, state: dict[str, Any], where: Path) -> None:
        """Resume from a training state; a decay that is new starts from the weights, as in a new run."""
        for decay, model in self.models.items():
            load_state_dict(model, state["ema"].get(decay, state["model"]), where)

    @property
    def first(self) -> nn.Module:
        """The copy that sample images and the validation loss use."""
        return next(iter(self.models.values()))
