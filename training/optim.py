"""Optimizer, learning-rate schedule and averaged weights."""

import copy
import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from checkpoint import power_average
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


def clip_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter], optimizer: AdamW, max_norm: float) -> Tensor:
    """Let the next step take gradients that are scaled down to `max_norm` where they exceed it; returns their norm before.

    On CUDA the fused step scales them as it reads them; elsewhere they are scaled here.
    """
    parameters = [p for p in parameters if p.grad is not None]
    if accelerator.device.type != "cuda":
        return torch.as_tensor(accelerator.clip_grad_norm_(parameters, max_norm))
    accelerator.unscale_gradients()
    return clip_in_step(parameters, optimizer, max_norm)


@torch.no_grad()
def clip_in_step(parameters: list[nn.Parameter], optimizer: AdamW, max_norm: float) -> Tensor:
    """The norm of the gradients, by whose excess over `max_norm` the fused step divides them."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)  # pyright: ignore[reportAttributeAccessIssue], which AdamW reads
    return norm


class IdleParameters:
    """Parameters that the forwards of a step leave out, for several processes.

    DDP waits for the gradients of all parameters. These get one of zeros, and after the backward pass none: the optimizer leaves
    such parameters and their moments as they are, as it does with one process.
    """

    def __init__(self) -> None:
        self._idle: set[nn.Parameter] | None = None

    def touch(self, loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
        """The same loss, of which the parameters that its forward left out have gradients, too."""
        self._idle = set(parameters) if self._idle is None else self._idle & set(parameters)
        return loss + torch.stack([p.flatten()[:0].sum() for p in parameters]).sum() if parameters else loss

    def drop_gradients(self) -> None:
        """Of the parameters that no forward of the step used."""
        for parameter in self._idle or ():
            parameter.grad = None
        self._idle = None


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
    """Averages of the weights by name, each of which follows every optimizer step.

    Those of a decay are named by it ("0.9999") and start as a copy of the weights, of which power-function ones ("sigma-0.05") keep
    nothing at the first step. Of several processes each keeps and updates its part of every average: whole tensors, so that the
    bits are those of one process.

    Args:
        model: whose weights are averaged, before it is wrapped.
        decays: of the averages.
        process: which process this is.
        processes: how many share the averages.
        sigmas: relative lengths σ_rel of the power-function averages.
    """

    def __init__(
        self, model: nn.Module, decays: list[float], process: int = 0, processes: int = 1, sigmas: Sequence[float] = ()
    ):
        rules = averaging_rules(decays, sigmas)
        self.names = list(rules)
        self.sources = dict(model.named_parameters())  # not their storage: DDP gives them another one
        self.owners = _owners(self.sources, processes)
        self._is_shared = processes > 1
        self._own = [name for name, owner in self.owners.items() if owner == process]
        self.parts = {n: {name: self.sources[name].detach().clone() for name in self._own} for n in self.names}
        self._updates = [(rule, self.parts[n]) for n, rule in rules.items()]
        memo: dict[int, Any] = {id(b): b for b in model.buffers()}  # fixed tables
        memo |= {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in self.sources.values()}
        self._structure = copy.deepcopy(model, memo).eval()

    @torch.no_grad()
    def update(self, step: int = 1) -> None:
        """Let each average follow the weights by one step, optimizer step `step` (from 1; power-function ones depend on it)."""
        if self._own:
            weights: list[Tensor] = [self.sources[name] for name in self._own]
            for average, part in self._updates:
                average(list(part.values()), weights, step)

    @torch.no_grad()
    def assign(self, average: str, model: nn.Module) -> None:
        """Set the average of this name to the weights of `model`, which has the parameters of the averaged one."""
        weights = dict(model.named_parameters())
        for name, own in self.parts[average].items():
            own.copy_(weights[name])

    @torch.no_grad()
    def model(self, average: str | None = None) -> nn.Module:
        """The model with the average of this name (default: the first, for pictures and validation), in eval mode.

        Every process takes part, and gets all of it; with one process it shares the average's memory.
        """
        memo: dict[int, Any] = {id(b): b for b in self._structure.buffers()}
        for name, empty in self._structure.named_parameters():
            memo[id(empty)] = nn.Parameter(self._whole(average or self.names[0], name), requires_grad=False)
        return copy.deepcopy(self._structure, memo)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Name → state of the model with that average; every process takes part."""
        return {name: self.model(name).state_dict() for name in self.names}

    @torch.no_grad()
    def tensors(self, average: str) -> Iterator[tuple[str, Tensor, bool]]:
        """The entries of that state by name, one after the other, and whether each is averaged; every process takes part."""
        for name, table in self._structure.state_dict().items():
            is_averaged = name in self.sources
            yield name, self._whole(average, name) if is_averaged else table, is_averaged

    def _whole(self, average: str, name: str) -> Tensor:
        """A tensor of an average, in every process."""
        part = self.parts[average]
        weight = part[name] if name in part else torch.empty_like(self.sources[name], requires_grad=False)
        if self._is_shared:
            torch.distributed.broadcast(weight, self.owners[name])
        return weight


def averaging_rules(decays: list[float], sigmas: Sequence[float]) -> dict[str, Callable[[Any, Any, Any], None]]:
    """Name of an average → what updates its tensors by (averages, weights, number of the step from 1)."""
    rules: dict[str, Callable[[Any, Any, Any], None]] = {f"{decay:g}": get_ema_multi_avg_fn(decay) for decay in decays}
    return rules | {power_average.name(sigma): _follow_by_power(sigma) for sigma in sigmas}


def _follow_by_power(sigma: float) -> Callable[[Any, Any, Any], None]:
    exponent = power_average.exponent(sigma)

    def follow(averages: list[Tensor], weights: list[Tensor], step: int) -> None:
        share = power_average.weight_of_step(step, exponent)
        torch._foreach_lerp_(averages, weights, share)  # pyright: ignore[reportPrivateImportUsage], as torch's own averages do

    return follow


def _owners(tensors: dict[str, nn.Parameter], processes: int) -> dict[str, int]:
    """Name → the process that keeps it: the largest first, each to the one that has least."""
    loads, owners = [(0, process) for process in range(processes)], dict.fromkeys(tensors, 0)
    for name in sorted(tensors, key=lambda name: -tensors[name].numel()):
        load, owners[name] = loads[0]
        heapq.heapreplace(loads, (load + tensors[name].numel(), owners[name]))
    return owners
