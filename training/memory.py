"""What a training run holds in memory, counted on fake tensors."""

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

import models
from config.options import TrainConfig
from loss import Projecting, alignment_loss, velocity_loss
from models.encoders import TargetEncoder
from models.vae import VAERecord
from randomness import Draws
from training.setup import build_model

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


GIB = 2**30


@dataclass(frozen=True)
class StateBytes:
    """What a model's training state takes, in bytes."""

    weights: int  # and fixed tables
    gradients: int
    optimizer: int
    ema: int  # all copies


def state_bytes(model: nn.Module, ema_copies: int) -> StateBytes:
    """The exact sizes of a run's tensors; all are float32."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    tables = sum(b.numel() * b.element_size() for b in model.buffers())
    steps = 4 * len(list(model.parameters()))  # AdamW counts them for each tensor
    return StateBytes(size + tables, size, 2 * size + steps, ema_copies * (size + tables))


def activation_bytes(
    config: TrainConfig, record: VAERecord, encoders: list[TargetEncoder], batch_size: int, budget: float | None
) -> int:
    """What autograd keeps of one forward of `batch_size` images for the backward pass, parameters not counted.

    A step on fake tensors, which have sizes but no memory: what would be saved is counted, each storage once. Under
    autocast that includes the parameters' copies in half precision. With gradient checkpointing it is what the forward keeps,
    the blocks' inputs among it, and one block computed again.
    """
    saved: dict[int, torch.UntypedStorage] = {}
    block_inputs: list[tuple[nn.Module, tuple[torch.Tensor, ...]]] = []
    with FakeTensorMode():
        model = build_model(config, record, [e.z_dim for e in encoders])
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        side = config.resolution // record.downsample_factor
        shape = (record.latent_channels, side, side)
        staged = getattr(model, "stage_shapes", [shape])
        x, noise, *coarse = (torch.empty(batch_size, *s) for s in (shape, shape, *staged[:-1]))
        t, y = torch.empty(batch_size), torch.empty(batch_size, dtype=torch.long)
        draws = Draws(x, noise, t, t, t, 0.0, 0.0, coarse, torch.empty(batch_size, len(staged)))

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage
            return tensor

        if config.gradient_checkpointing:
            models.checkpoint_blocks(model)
            for block in model.blocks:
                block.register_forward_pre_hook(lambda block, inputs: block_inputs.append((block, inputs)))
        arguments = {} if budget is None else {"inference_budget": budget}
        if coarse:
            arguments["active_stage"] = len(coarse)  # the last one, whose loss takes the others' too
        call = Projecting(model) if encoders else model
        dtype = DTYPES[config.mixed_precision]
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                losses = velocity_loss(call, x, draws, y, weighting=config.weighting, path_type=config.path_type, **arguments)
            if encoders:
                features = [torch.empty(p.shape, dtype=dtype) for p in call.projections]
                losses = losses + alignment_loss(call.projections, features)
            for _, inputs in block_inputs:
                for tensor in filter(torch.is_tensor, tree_leaves(inputs)):
                    keep(tensor)
            if block_inputs:
                block, inputs = max(block_inputs, key=lambda found: found[1][0].numel())
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    _ = type(block).forward(block, *inputs)
        return sum(storage.nbytes() for storage in saved.values())


def format_gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.3g} MiB"
