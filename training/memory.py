"""What a training run holds in memory, counted on fake tensors."""

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

import models
from common.precision import AMP_TYPES, autocast
from common.sizes import latent_sides
from config.options import TrainConfig
from flows import flow_of
from loss import Projecting, alignment_loss
from models.backbone import Backbone
from models.encoders import TargetEncoder
from models.text_encoders import TextRecord
from models.vae import VAERecord
from training import sharding
from training.setup import build_model

GIB = 2**30


@dataclass(frozen=True)
class StateBytes:
    """What a model's training state takes, in bytes."""

    weights: int  # and fixed tables
    gradients: int
    optimizer: int
    ema: int  # all copies
    gathered: int = 0  # of a sharded model, what is whole for a time

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.gathered


def state_bytes(model: nn.Module, ema_copies: int) -> StateBytes:
    """The exact sizes of a run's tensors; all are float32."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    tables = sum(b.numel() * b.element_size() for b in model.buffers())
    steps = 4 * len(list(model.parameters()))  # AdamW counts them for each tensor
    return StateBytes(size + tables, size, 2 * size + steps, ema_copies * (size + tables))


def ema_copies(config: TrainConfig) -> int:
    """How many averages of the weights a run keeps."""
    return len(config.ema_decay) + len(config.posthoc_ema)


def process_bytes(model: Backbone, config: TrainConfig, processes: int) -> StateBytes:
    """What the first of `processes` holds of that: with `--shard` its shards, else everything but its part of the averages."""
    copies, size = ema_copies(config), sharding.group_size(config.shard, processes)
    whole = state_bytes(model, copies)
    if size == 1:
        return replace(whole, ema=-(-whole.ema // processes))
    own = sum(4 * sharding.shard_like(p, size).numel() for p in model.parameters())
    tables, steps = whole.weights - whole.gradients, whole.optimizer - 2 * whole.gradients
    gathered = _gathered_bytes(model, config)
    return StateBytes(own + tables, own, 2 * own + steps, copies * own, gathered)


def _gathered_bytes(model: Backbone, config: TrainConfig) -> int:
    """Of a sharded model's backward pass: two parts' weights, one's gradients as computed and as sent, and what is no part."""
    narrow, width = AMP_TYPES[config.mixed_precision], sharding.COMM_TYPES[config.comm_dtype].itemsize
    numbers = {part: sum(p.numel() for p in part.parameters()) for part in sharding.sharded_parts(model)}
    rest = sum(p.numel() for p in model.parameters()) - sum(numbers.values())
    sizes = [((sharding.gathered_dtype(part, narrow) or torch.float32).itemsize, n) for part, n in numbers.items()]
    return max(3 * each * n + width * n for each, n in sizes) + 2 * 4 * rest


def activation_bytes(
    config: TrainConfig,
    record: VAERecord,
    encoders: list[TargetEncoder],
    batch_size: int,
    budget: float | None,
    text: TextRecord | None = None,
    is_sharded: bool = False,
) -> int:
    """What autograd keeps of one forward of `batch_size` images for the backward pass, parameters not counted.

    A step on fake tensors, which have sizes but no memory: what would be saved is counted, each storage once. Under
    autocast that includes the parameters' copies in half precision, but those of the parts that `--shard` gathers so. With gradient checkpointing it is what the forward keeps,
    the blocks' inputs among it, and one block computed again.
    """
    saved: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode():
        model = build_model(config, record, [e.z_dim for e in encoders], text)
        if is_sharded:
            sharding.narrow_parts(model, AMP_TYPES[config.mixed_precision])
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage
            return tensor

        inputs = _record_block_inputs(model) if config.gradient_checkpointing else []
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            _fake_losses(config, record, model, batch_size, budget)
            for tensor in filter(torch.is_tensor, tree_leaves([tensors for _, tensors in inputs])):
                keep(tensor)
            if inputs:
                block, tensors = max(inputs, key=lambda pair: pair[1][0].numel())
                with autocast(config.mixed_precision, torch.device("cpu")):
                    _ = type(block).forward(block, *tensors)
        return sum(storage.nbytes() for storage in saved.values())


def _record_block_inputs(model: Backbone) -> list[tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    """Checkpoint the blocks; the list is filled with each of them and its inputs by a forward."""
    inputs: list[tuple[nn.Module, tuple[torch.Tensor, ...]]] = []
    models.checkpoint_blocks(model)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, tensors: inputs.append((block, tensors)))
    return inputs


def _fake_losses(
    config: TrainConfig,
    record: VAERecord,
    model: nn.Module,
    batch_size: int,
    budget: float | None,
) -> torch.Tensor:
    """The losses (B,) of a step at this budget, under the condition that keeps most."""
    flow, size = flow_of(config), latent_sides(config.resolution, record.downsample_factor)
    draws = flow.empty_draws(batch_size, (record.latent_channels, *size))
    x, y = torch.empty_like(draws.noise), cast(Backbone, model).example_condition(batch_size)
    call = Projecting(model) if hasattr(model, "projectors") else model
    with autocast(config.mixed_precision, torch.device("cpu")):
        losses = flow.loss_under(flow.conditions([budget])[-1], call, x, draws, y).losses
    if isinstance(call, Projecting):
        features = [torch.empty(p.shape, dtype=AMP_TYPES[config.mixed_precision]) for p in call.projections]
        losses = losses + alignment_loss(call.projections, features)
    return losses


def format_gib(size: float) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{size / GIB:.3g} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.3g} MiB"
