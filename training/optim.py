"""Learning-rate schedule and averaged weights."""

import copy
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from config.options import TrainConfig


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


class EMA:
    """Averaged copies of the weights, one for each decay; each starts as a copy and follows every optimizer step."""

    def __init__(self, model: nn.Module, decays: list[float]):
        self.models = {f"{d:g}": copy.deepcopy(model).eval().requires_grad_(False) for d in decays}
        self.sources = [p.detach() for p in model.parameters()]
        self.updates = [
            (get_ema_multi_avg_fn(d), list(m.parameters())) for d, m in zip(decays, self.models.values(), strict=True)
        ]

    @torch.no_grad()
    def update(self) -> None:
        for average, parameters in self.updates:
            average(parameters, self.sources, None)

    @property
    def first(self) -> nn.Module:
        """The copy that pictures and the held-out loss use."""
        return next(iter(self.models.values()))
