"""What a training step would launch on a GPU, counted without one.

The real model, loss and update run on the meta device under CUDA's rules of automatic mixed precision, and every operation is
counted with the part of the step that it belongs to: kernels, bytes that they read and write, FLOPs, and what autograd keeps for
the backward pass. The counts are exact; no time is measured. `compiled` shows the regions that `torch.compile` gets as fused: a
model of it, in which everything element-wise between two matrix products of a region is one kernel.
"""

import bisect
import contextlib
import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

import models
from common import precision
from common.cuda_autocast import CudaAutocast
from common.precision import AMP_TYPES
from common.sizes import latent_sides
from config.options import TrainConfig
from flows import FlowMatching, flow_of
from loss import drop_conditions
from models.backbone import Backbone
from models.conditioning import Condition, Text
from models.elit import Elastic
from models.layers import FinalLayer
from models.text_encoders import TextRecord
from models.vae import SD_VAE, VAERecord, sample_latents
from randomness import Draws
from training import sharding
from training.optim import EMA
from training.setup import build_model
from training.stats import TrainingStats

aten = torch.ops.aten
autograd_number, current_node = cast(Any, torch._C)._autograd._get_sequence_nr, torch._C._current_autograd_node
foreach_norm, foreach_mul_ = cast(Any, torch)._foreach_norm, cast(Any, torch)._foreach_mul_
Pairs = dict[int, int]  # storage → bytes
DECAY = 0.9999
Region = tuple[str, int, bool]  # part, the how manieth region, whether `torch.compile` gets it

# --------------------------------------------------------------------------------------------------- the recorder

# No kernel; and what makes no values.
FREE = {"_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh", "is_same_size"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
TWO_KERNELS = {"slice_backward", "select_backward", "embedding_dense_backward"}  # zeros, then a copy into them
CHUNK, BLOCKS = 65536, 320  # of a launch over many tensors: elements of a block, blocks of a launch


@dataclasses.dataclass
class Op:
    """One operation: its kernels, its traffic by storage in bytes, and where it ran."""

    name: str
    part: str
    region: Region
    backward: bool
    kernels: int
    flops: int
    reads: Pairs
    writes: Pairs
    across: bool = False  # a sum over other axes than the last

    @property
    def kind(self) -> str:
        """products, attention, or element-wise."""
        if self.name in PRODUCTS:
            return "products"
        return "attention" if "attention" in self.name else "element-wise"

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())


def _traffic(tree: Any) -> Pairs:
    """Storage → bytes of its distinct elements."""
    traffic: Pairs = {}
    for x in tree_leaves(tree):
        if isinstance(x, Tensor):
            distinct = math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
            key = x.untyped_storage()._cdata
            traffic[key] = traffic.get(key, 0) + distinct * x.element_size()
    return traffic


class Recorder(TorchDispatchMode):
    """Takes note of every operation, and of what autograd keeps, by the part of the step that they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.regions: list[Region] = [("loss", 0, False)]  # those that are entered, the innermost last
        self.entered = 0
        self.modules: dict[int, nn.Module] = {}  # of a region's number
        self.starts: list[tuple[int, Region]] = []  # (autograd's number, region): where each region's operations begin
        # Storage → part, and the storage itself, kept so that no other has its number.
        self.saved: dict[int, tuple[str, Any]] = {}
        self.alive: list[Any] = []
        self._mark()

    def _mark(self) -> None:
        self.starts.append((autograd_number(), self.regions[-1]))

    @contextlib.contextmanager
    def part(self, name: str, compiled: bool = False) -> Iterator[None]:
        """What runs inside, and its backward pass, belongs to `name`."""
        self.entered += 1
        self.regions.append((name, self.entered, compiled))
        self._mark()
        yield
        self.regions.pop()
        self._mark()

    def attach(self, owner: nn.Module, name: str, method: str = "forward", compiled: bool = False) -> None:
        """Everything inside this method of `owner` belongs to the part `name`."""
        function = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name, compiled):
                if method == "forward":
                    self.modules[self.entered] = owner
                return function(*args, **kwargs)

        setattr(owner, method, call)

    def keep(self, tensor: Tensor) -> Tensor:
        """For `saved_tensors_hooks`."""
        storage = tensor.untyped_storage()
        self.saved.setdefault(storage._cdata, (self.regions[-1][0], storage))
        return tensor

    def _region(self) -> tuple[Region, bool]:
        node = current_node()
        if node is None:
            return self.regions[-1], False
        place = bisect.bisect_right(self.starts, node._sequence_nr(), key=lambda start: start[0]) - 1
        return self.starts[place][1], True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        outputs = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in outputs)
        if is_view or name in FREE or "empty" in name or name == "promote_types":
            return result
        in_place = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None
            and argument.alias_info.is_write
            and (argument.name != "grads" or (kwargs or {}).get("grad_scale") is not None)  # AdamW writes those it scales
        ]
        inputs = args[1:] if name in ("embedding", "zero_", "fill_") else args
        reads, writes = _traffic((inputs, kwargs)), _traffic(in_place or result)
        if name in TWO_KERNELS:
            reads = {key: 2 * size for key, size in reads.items()}
        flops = (
            flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
            if func._overloadpacket in flop_registry
            else 0
        )
        kernels = 2 if name in TWO_KERNELS else 1
        if name.startswith("_foreach") or name.startswith("_fused"):
            kernels = _many_tensor_kernels(args)
        region, backward = self._region()
        self.alive += [x.untyped_storage() for x in tree_leaves((args, result)) if isinstance(x, Tensor)]
        across = name == "sum" and (len(args) == 1 or any(d % args[0].dim() != args[0].dim() - 1 for d in args[1]))
        self.ops.append(Op(name, region[0], region, backward, kernels, flops, reads, writes, across))
        return result


def _many_tensor_kernels(args: Any) -> int:
    """Launches of one operation over lists of tensors."""
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    most = {1: 110, 2: 64, 3: 48, 4: 36}.get(len(lists), 30)  # tensors of a launch
    blocks = sum(-(-x.numel() // CHUNK) for x in lists[0])
    return max(-(-blocks // BLOCKS), -(-len(lists[0]) // most))


# --------------------------------------------------------------------------------------------------------- a step


@dataclasses.dataclass
class Trace:
    """The operations of a step, and the bytes that autograd keeps by part."""

    ops: list[Op]
    saved: dict[str, int]
    kept: set[int]  # the storages that autograd keeps
    parameters: int = 0  # of the model
    # Of a region's number: the parameters of its module, and the bytes that `--shard` gathers them in, 0 where it does not.
    sizes: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    is_compiled: bool = False

    def total(self, kind: str | None = None, parts: Iterable[str] | None = None) -> tuple[int, int, int]:
        """(kernels, bytes, FLOPs) of the operations of this kind in these parts."""
        chosen = [op for op in self.ops if kind in (None, op.kind) and (parts is None or op.part in parts)]
        return sum(op.kernels for op in chosen), sum(op.bytes for op in chosen), sum(op.flops for op in chosen)

    @property
    def parts(self) -> list[str]:
        """In the order in which they first run."""
        return list(dict.fromkeys(op.part for op in self.ops))


def name_parts(model: Backbone, recorder: Recorder) -> None:
    """Blocks and what is around them, and what of it is compiled."""
    names = dict.fromkeys(model.blocks, "blocks")
    outer = [(model, "embedding", "embed"), (model, "final layer", "output")]
    if isinstance(model, Elastic):
        names = dict.fromkeys(model.blocks, "head and tail blocks")
        names |= dict.fromkeys(list(model.blocks)[model.head_depth : len(model.blocks) - model.tail_depth], "core blocks")
        names |= {model.interface.reader: "Read", model.interface.writer: "Write"}
        outer += [(model.interface, "Read", "read"), (model.interface, "Write", "write")]
    for part in model.compiled_parts():
        recorder.attach(part, names.get(part, "final layer" if isinstance(part, FinalLayer) else "embedding"), compiled=True)
    for owner, name, method in outer:
        recorder.attach(owner, name, method)


def trace_step(
    config: TrainConfig,
    batch_size: int,
    budget: float | None = None,
    update: bool = True,
    processes: int = 1,
    record: VAERecord = SD_VAE,
    text: TextRecord | None = None,
) -> Trace:
    """One training step of `batch_size` images on the meta device: forward, backward, clipping, AdamW and one EMA copy.

    Of what `processes` do together, what each does with its own is counted, not what travels; with `--shard`, of gathered parts.
    """
    sides, size = latent_sides(config.resolution, record.downsample_factor), sharding.group_size(config.shard, processes)
    flow, recorder, narrow = flow_of(config), Recorder(), AMP_TYPES[config.mixed_precision]
    with torch.device("meta"):
        model = build_model(config, record, [], text)
        if size > 1:
            sharding.narrow_parts(model, narrow)
        draws = flow.empty_draws(batch_size, (record.latent_channels, *sides))
        moments, y = torch.empty(batch_size, record.stored_channels, *sides), model.example_condition(batch_size)
        name_parts(model, recorder)
        stats = TrainingStats(["loss"], torch.device("meta"))
        if config.gradient_checkpointing:
            models.checkpoint_blocks(model)
        mode = CudaAutocast(narrow)
        with mock.patch.object(precision, "full_precision", lambda _: mode.off()), mode, recorder:
            with saved_tensors_hooks(recorder.keep, lambda x: x):
                loss = _loss(model, flow, mode, record, (moments, y, draws), budget, stats)
            loss.backward()
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    saved: dict[str, int] = defaultdict(int)
    for key, (part, storage) in recorder.saved.items():
        saved[part] += 0 if key in own else storage.nbytes()
    ops = recorder.ops + (trace_update(config, processes, record, text) if update else [])
    number = sum(p.numel() for p in model.parameters())
    return Trace(ops, saved, set(recorder.saved) - own, number, _sizes(model, recorder, size > 1))


def trace_update(
    config: TrainConfig, processes: int = 1, record: VAERecord = SD_VAE, text: TextRecord | None = None
) -> list[Op]:
    """What follows a backward pass: clipping, AdamW and one EMA copy, of what the first of the processes holds."""
    recorder, size = Recorder(), sharding.group_size(config.shard, processes)
    with torch.device("meta"):
        model = build_model(config, record, [], text)
        shards = [nn.Parameter(sharding.shard_like(p, size)) for p in model.parameters()]
        ema = EMA(model, [DECAY], 0, processes) if size == 1 else None
        with recorder, recorder.part("update"):
            _update(shards, ema, processes)
    return recorder.ops


def _sizes(model: Backbone, recorder: Recorder, is_sharded: bool) -> dict[int, tuple[int, int]]:
    """See `Trace.sizes`; a module that runs several times counts where it runs first."""
    gathered = set(sharding.sharded_parts(model)) if is_sharded else set()
    sizes = {}
    for module, number in {module: number for number, module in reversed(recorder.modules.items())}.items():
        parameters = list(module.parameters())
        sizes[number] = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters) * (module in gathered)
    return sizes


def _loss(
    model: Backbone,
    flow: FlowMatching,
    mode: CudaAutocast,
    record: VAERecord,
    batch: tuple[Tensor, Condition, Draws],
    budget: float | None,
    stats: TrainingStats,
) -> Tensor:
    """As `Trainer.forward`: accelerate has autocast around the model's forward alone, and gives its output in float32."""
    moments, y, draws = batch

    def call(*args: Any, **kwargs: Any) -> Any:
        with mode.off(False):
            velocity = model(*args, **kwargs)
        return tree_map(lambda v: v.float(), velocity)

    with mode.off():
        x = sample_latents(moments, draws.posterior, record)
        y = drop_conditions(model, y, draws, 0.0 if isinstance(y, Text) else 0.1)  # there is no null text here
        losses, times, _ = flow.loss_under(flow.conditions([budget])[-1], call, x, draws, y)
        stats.add(losses, times)
        return losses.mean()


@torch.no_grad()
def _update(parameters: list[nn.Parameter], ema: EMA | None, processes: int) -> None:
    """`ema`: None where the parameters are shards, each with its average."""
    weights = [p.detach() for p in parameters]
    grads, *moments = [[torch.empty_like(w) for w in weights] for _ in range(3)]
    if processes > 1 and ema is not None:
        foreach_mul_(grads, 1 / processes)  # as DDP, on their way into its buckets
    norm = torch.stack(list(foreach_norm(grads))).norm()  # as `clip_in_step` on CUDA; its function has no form for meta tensors
    excess = (norm + 1e-6).clamp(min=1.0)
    if ema is None:
        foreach_mul_(grads, 1 / excess)  # as `ShardedModel.clip_gradients`
    steps = [torch.empty((), device="meta") for _ in weights]
    aten._fused_adamw_(
        weights, grads, *moments, [], steps,
        lr=1e-4, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        grad_scale=None if ema is None else excess,
    )  # fmt: skip
    if ema is None:
        get_ema_multi_avg_fn(DECAY)([torch.empty_like(w) for w in weights], weights, None)
    else:
        ema.update()


# ----------------------------------------------------------------------------------------------------- as compiled


def compiled(trace: Trace) -> Trace:
    """The step with its regions fused: of a region, what is element-wise and hangs together between two products is one kernel."""
    ops, regions = [], defaultdict(list)
    for op in trace.ops:
        regions[op.region, op.backward].append(op)
    readers: dict[int, set[int]] = defaultdict(set)
    for op in trace.ops:
        for key in op.reads:
            readers[key].add(id(op))
    for (region, _), members in regions.items():
        ops += _fuse(members, readers, trace.kept) if region[2] else members
    return dataclasses.replace(trace, ops=ops, is_compiled=True)


def _fuse(region: list[Op], readers: dict[int, set[int]], kept: set[int]) -> list[Op]:
    stage: dict[int, int] = {}  # op → products, attentions and sums on the longest way to it
    producer: dict[int, Op] = {}
    for op in region:
        before = [producer[key] for key in op.reads if key in producer]
        stage[id(op)] = max((stage[id(b)] + (b.kind != "element-wise" or _sums(b)) for b in before), default=0)
        producer |= dict.fromkeys(op.writes, op)
    sums = {id(op) for op in region if _sums(op)}
    fused = [op for op in region if op.kind != "element-wise"]
    groups: list[tuple[Any, set[int], list[Op]]] = []  # what must be equal, storages that connect, and the operations
    inlined: dict[int, Pairs] = {}  # what sums alone read → what it is made of
    for op in region:
        reads = {k: size for key, own in op.reads.items() for k, size in inlined.get(key, {key: own}).items()}
        if op.kind != "element-wise":
            continue
        if all(readers[key] and readers[key] <= sums and key not in kept for key in op.writes):
            inlined |= dict.fromkeys(op.writes, reads)
            continue
        form = (stage[id(op)], sum(op.writes.values()) if _sums(op) else None)
        keys = set(reads) if _sums(op) else {*reads, *op.writes}
        touching = [g for g in groups if g[0] == form and g[1] & keys]
        groups = [g for g in groups if not any(g is t for t in touching)]
        members = [*(o for t in touching for o in t[2]), dataclasses.replace(op, reads=reads)]
        groups.append((form, keys.union(*(t[1] for t in touching)), members))
    for _, _, members in groups:
        reads, writes = {}, {}
        for op in members:
            reads, writes = reads | op.reads, writes | op.writes
        inside = {key for op in members for key in op.reads}
        last = {key: size for key, size in writes.items() if key in kept or key not in inside or len(readers[key]) > 1}
        external = {key: size for key, size in reads.items() if key not in writes}
        fused.append(dataclasses.replace(members[0], name="fused", kernels=1, flops=0, reads=external, writes=last))
    return fused


def _sums(op: Op) -> bool:
    """A sum over images and tokens runs across the rows that the rest of a kernel runs along: nothing after it is in its kernel."""
    return op.across and op.backward
