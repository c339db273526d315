"""`--shard`: weights, gradients, averaged weights and optimizer state split over the processes, by FSDP2's `fully_shard`.

A part of the model (a block, Read, Write, a final layer, a projector) is gathered while it runs; what lies around these parts
stays gathered from the forward to the backward pass. Optimizer, clipping and averages work on this process's shards as plain
tensors, and compute what they compute without sharding.
"""

import copy
import functools
import operator
import os
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from typing_extensions import override

from checkpoint.sharded import fill, is_dtensor, with_local
from checkpoint.weights import check_fits
from common.distributed import LONG_WAIT
from common.errors import UserError
from common.precision import AMP_TYPES
from config.options import TrainConfig
from models.backbone import Backbone
from models.layers import FinalLayer, narrow_linears
from training.optim import EMA, averaging_rules

if TYPE_CHECKING:  # they take a while to import, for what few runs need
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

EMBEDDERS = ("x_embedder", "t_embedder", "y_embedder")  # small: they stay with what lies around the parts
COMM_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of --comm-dtype
MOMENTS = ("exp_avg", "exp_avg_sq")


def group_size(shard: str, processes: int) -> int:
    """Processes per shard group of `--shard`; 1 where nothing is sharded.

    Raises UserError where that is none of none, full and a number, or the processes cannot be divided so.
    """
    if shard in ("none", "full"):
        return processes if shard == "full" else 1
    if not (shard.isascii() and shard.isdecimal() and int(shard)):
        raise UserError(f"--shard {shard}: must be none, full, or the number of processes in a group")
    if processes % int(shard):
        divisors = [str(n) for n in range(2, processes) if processes % n == 0]
        raise UserError(
            f"--shard {shard}: {processes} process{'es' * (processes > 1)} cannot be divided into groups of {shard}; "
            f"choose {', '.join([*divisors, 'full'])} or none"
        )
    return int(shard)


def launched_processes() -> int:
    """The number of processes, as the launcher tells it."""
    world = os.environ.get("WORLD_SIZE", "1")
    return int(world) if world.isdecimal() and int(world) else 1


def create_mesh(shard: str, processes: int, device: torch.device, wait: timedelta) -> "DeviceMesh | None":
    """The processes as (shards), or as (groups that have the same shards, shards); None where nothing is sharded.

    `wait`: how long they wait for each other.
    """
    size = group_size(shard, processes)
    if size == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    if size == processes:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    mesh = init_device_mesh(device.type, (processes // size, size), mesh_dim_names=("replicate", "shard"))
    for group in mesh.get_all_groups():  # which have PyTorch's default
        dist.distributed_c10d._set_pg_timeout(wait, group)
    return mesh


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model that has no memory, to be made before it is compiled or sharded."""
    memo: dict[int, Any] = {id(b): b.to("meta") for b in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def sharded_parts(model: Backbone) -> list[nn.Module]:
    """What is gathered by itself, each called by its forward alone: blocks, Read and Write, final layers, projectors."""
    small = {m for name in EMBEDDERS if hasattr(model, name) for m in getattr(model, name).modules()}
    return [*(part for part in model.compiled_parts() if part not in small), *getattr(model, "projectors", [])]


def gathered_dtype(part: nn.Module, narrow: torch.dtype | None) -> torch.dtype | None:
    """The type to gather a part in: autocast's `narrow` one where autocast converts all of its weights to that; None: as it is."""
    layers = [m for m in part.modules() if any(True for _ in m.parameters(recurse=False))]
    is_wide = isinstance(part, FinalLayer) or not all(isinstance(m, nn.Linear) for m in layers)
    return None if is_wide else narrow


def narrow_parts(model: Backbone, narrow: torch.dtype | None) -> None:
    """Give a model without memory the types that its parts are gathered in, as its forward meets them."""
    for part in sharded_parts(model):
        if (dtype := gathered_dtype(part, narrow)) is not None:
            for name, parameter in list(part.named_parameters()):
                _assign(part, name, nn.Parameter(parameter.detach().to(dtype)))


def shard_like(parameter: Tensor, size: int) -> Tensor:
    """An empty tensor like the largest shard of a parameter that `size` processes split: the first one's rows."""
    return parameter.new_empty((-(-parameter.shape[0] // size), *parameter.shape[1:]) if size > 1 else parameter.shape)


class ShardedModel:
    """A model whose parameters are split over the processes, in place.

    Args:
        model: on the CPU or the device; of each parameter this process keeps its shard, on the device.
        frame: `on_meta(model)`, made before it was compiled.
        mesh: see `create_mesh`.
        accelerator: whose autocast the forward gets.

    Attributes:
        ema: its averages.
        group: all processes, on the CPU, for checkpoints that are written while training goes on.
    """

    def __init__(self, model: nn.Module, frame: nn.Module, mesh: "DeviceMesh", accelerator: Accelerator, config: TrainConfig):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # Of outputs that are views, which nothing here changes in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # autocast alone, in place
        narrow, summed = AMP_TYPES[config.mixed_precision], COMM_TYPES[config.comm_dtype]
        for part in sharded_parts(cast(Backbone, model)):
            policy = MixedPrecisionPolicy(gathered_dtype(part, narrow), summed, cast_forward_inputs=False)
            fully_shard(part, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=summed, cast_forward_inputs=False))
        self._model, self._frame, self._narrow = model, frame, narrow
        self._whole = {name: cast("DTensor", p) for name, p in model.named_parameters()}
        self._own = [nn.Parameter(p.to_local().detach()) for p in self._whole.values()]  # the same memory
        self._shard_group = mesh.get_group("shard")
        self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=LONG_WAIT))
        self.ema = ShardedEMA(self, config.ema_decay, config.posthoc_ema)

    def parameters(self) -> list[nn.Parameter]:
        """This process's shard of each parameter of the model, in its order, as plain tensors; some may be empty."""
        return self._own

    # A step

    def begin_micro_step(self, is_last: bool) -> None:
        """Before a backward pass: groups with the same shards sum their gradients in the last micro-step alone."""
        cast("FSDPModule", self._model).set_requires_all_reduce(is_last)

    @torch.no_grad()
    def clip_gradients(self, accelerator: Accelerator, _: Any, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
        """As `optim.clip_gradients`, by the norm of all shards; after the last backward pass of a step."""
        for own, parameter in zip(self._own, self._whole.values(), strict=True):
            own.grad = None if parameter.grad is None else cast("DTensor", parameter.grad).to_local()
            parameter.grad = None
        accelerator.unscale_gradients()
        if accelerator.scaler is not None and accelerator.scaler.is_enabled():
            # What is not finite in one shard is so for all.
            for found in accelerator.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
                dist.all_reduce(found, dist.ReduceOp.MAX, group=self._shard_group)
        square = torch.nn.utils.get_total_norm([p.grad for p in self._own if p.grad is not None]).square()
        dist.all_reduce(square, group=self._shard_group)
        norm = square.sqrt()
        torch.nn.utils.clip_grads_with_norm_(self._own, max_norm, norm)
        return norm

    # Shards as parts of the whole

    @torch.no_grad()
    def gathered(self, own: list[Tensor]) -> nn.Module:
        """The whole model with these shards as its weights, in eval mode in each process; Linears in the type of mixed precision.

        Every process takes part.
        """
        model = narrow_linears(copy.deepcopy(self._frame), self._narrow).eval().requires_grad_(False)
        buffers = dict(self._model.named_buffers())
        for (name, parameter), shard in zip(list(model.named_parameters()), own, strict=True):
            whole = self._part(name, shard).full_tensor().to(parameter.dtype)
            _assign(model, name, nn.Parameter(whole, requires_grad=False))
        for name, _ in list(model.named_buffers()):
            _assign(model, name, buffers[name])
        return model

    def state_dict(self, own: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """That of the model, with `own` in place of its parameters' shards: DTensors, and the model's buffers."""
        shards = dict(zip(self._whole, self._own if own is None else own, strict=True))
        entries = self._model.state_dict()
        return {name: self._part(name, shards[name]) if name in shards else entries[name] for name in entries}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's state dict, its moments as DTensors."""
        state = optimizer.state_dict()
        moments = {
            i: {k: self._part(self._names[i], v) if k in MOMENTS else v for k, v in entry.items()}
            for i, entry in state["state"].items()
        }
        return {"state": moments, "param_groups": state["param_groups"]}

    def load(self, state: dict[str, Any], where: Path) -> dict[str, Any]:
        """Take weights and averages of the training state `state` of `where`; returns it with this process's part of the moments.

        Raises UserError where these are not of this model.
        """
        moments = self._moments(state, where)
        for name in self.ema.names:  # one that is new starts from the weights, as in a new run
            self._fill(["ema", name] if name in state["ema"] else ["model"], state, where)
            self.ema.assign(name, self._model)
        self._fill(["model"], state, where)
        parts = {i: {k: self._part(self._names[i], entry[k]) for k in MOMENTS} for i, entry in moments.items()}
        fill({"optimizer": {"state": parts}}, state, where)
        return state | {"optimizer": {"state": moments}}

    def _fill(self, keys: list[str], state: dict[str, Any], where: Path) -> None:
        """Load the weights that stand under `keys` of the state."""
        targets: dict[str, Any] = self.state_dict()
        check_fits(self._model, targets, functools.reduce(operator.getitem, keys, state), where)
        for key in reversed(keys):
            targets = {key: targets}
        fill(targets, state, where)

    def _moments(self, state: dict[str, Any], where: Path) -> dict[int, dict[str, Tensor]]:
        """Entries of the optimizer's state with zeros for this process's part of the moments."""
        moments: dict[int, dict[str, Tensor]] = {}
        for i, entry in state["optimizer"]["state"].items():
            try:
                shapes, name = [entry[k].shape for k in MOMENTS], self._names[i]
            except (LookupError, TypeError, AttributeError):
                shapes, name = [], ""
            if not name or shapes != [self._whole[name].shape] * 2:
                raise UserError(
                    f"{where}: its optimizer state is not one of this model: moments of another shape for parameter {i}"
                )
            moments[i] = {**entry, **{k: torch.zeros_like(self._own[i]) for k in MOMENTS}}
        return moments

    @property
    def _names(self) -> list[str]:
        return list(self._whole)

    def _part(self, name: str, own: Tensor) -> "DTensor":
        """This process's shard `own` of a tensor that is split as the parameter `name` is."""
        return cast("DTensor", with_local(self._whole[name], own.detach()))


class ShardedEMA(EMA):
    """Averages of a sharded model's weights: each process averages its own shards."""

    def __init__(self, sharded: ShardedModel, decays: list[float], sigmas: Sequence[float]):
        rules = averaging_rules(decays, sigmas)
        self.names = list(rules)
        self._sharded = sharded
        self._shards = {name: [p.detach().clone() for p in sharded.parameters()] for name in rules}
        self._averages = list(rules.values())

    @override
    @torch.no_grad()
    def update(self, step: int = 1) -> None:
        for average, own in zip(self._averages, self._shards.values(), strict=True):
            average(own, cast(list[Tensor], self._sharded.parameters()), step)

    @override
    @torch.no_grad()
    def assign(self, average: str, model: nn.Module) -> None:
        for own, parameter in zip(self._shards[average], model.parameters(), strict=True):
            own.copy_(cast("DTensor", parameter).to_local())

    @override
    def model(self, average: str | None = None) -> nn.Module:
        return self._sharded.gathered(self._shards[average or self.names[0]])

    @override
    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {name: self._sharded.state_dict(own) for name, own in self._shards.items()}

    @override
    @torch.no_grad()
    def tensors(self, average: str) -> Iterator[tuple[str, Tensor, bool]]:
        for name, tensor in self._sharded.state_dict(self._shards[average]).items():
            whole = cast("DTensor", tensor).full_tensor() if is_dtensor(tensor) else tensor
            yield name, whole, is_dtensor(tensor)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, tensor)
