"""What a training step would launch on a GPU, without one: `python -m benchmarks.trace --model ELIT-SiT-XL/2 --batch-size 32`.

The real model, loss and update run on the meta device under CUDA's rules of automatic mixed precision, and every operation is
counted with the part of the step that it belongs to: kernels, bytes that they read and write, FLOPs, and what autograd keeps for
the backward pass. The counts are exact; no time is measured. With `--compile` the regions that `torch.compile` gets count as
fused: a model of it, in which everything element-wise between two matrix products of a region is one kernel.
"""

import argparse
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

import models
from benchmarks.cuda_autocast import CudaAutocast
from common import precision
from common.errors import cli_main
from common.precision import AMP_TYPES
from common.tables import markdown_table
from config.options import TrainConfig
from flows import FlowMatching, flow_of
from loss import drop_conditions
from models.backbone import Backbone
from models.elit import Elastic
from models.layers import FinalLayer
from models.vae import VAERecord, sample_latents
from randomness import Draws
from training.optim import EMA
from training.stats import TrainingStats

aten = torch.ops.aten
autograd_number, current_node = cast(Any, torch._C)._autograd._get_sequence_nr, torch._C._current_autograd_node
foreach_norm, foreach_mul_ = cast(Any, torch)._foreach_norm, cast(Any, torch)._foreach_mul_
Pairs = dict[int, int]  # storage → bytes
RECORD = VAERecord("SD", None, 8, 4, 0.18215, 0.0)
Region = tuple[str, int, bool]  # part, the how manieth region, whether `torch.compile` gets it

# --------------------------------------------------------------------------------------------------- the recorder

FREE = {
    "_unsafe_view",
    "_reshape_alias",
    "detach",
    "alias",
    "lift_fresh",
    "is_same_size",
}  # no kernel; and what makes no values
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
        self.starts: list[tuple[int, Region]] = []  # (autograd's number, region): where each region's operations begin
        self.saved: dict[
            int, tuple[str, Any]
        ] = {}  # storage → part, and the storage itself, kept so that no other has its number
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

    def attach(self, owner: Any, name: str, method: str = "forward", compiled: bool = False) -> None:
        """Everything inside this method of `owner` belongs to the part `name`."""
        function = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name, compiled):
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
            if argument.alias_info is not None and argument.alias_info.is_write
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
        self.ops.append(Op(name, region[0], region, backward, kernels, flops, reads, writes))
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
    config: TrainConfig, batch_size: int, budget: float | None = None, update: bool = True, processes: int = 1
) -> Trace:
    """One training step of `batch_size` images on the meta device: forward, backward, clipping, AdamW and one EMA copy.

    Of the sum of gradients over `processes`, what each does with its own is counted, not what travels.
    """
    record = RECORD
    side = config.resolution // record.downsample_factor
    flow, recorder = flow_of(config), Recorder()
    with torch.device("meta"):
        model = models.create_model(config.model, input_size=side, num_classes=config.num_classes)
        draws = flow.empty_draws(batch_size, (4, side, side))
        moments, y = torch.empty(batch_size, 8, side, side), torch.empty(batch_size, dtype=torch.long)
        stats = TrainingStats(["loss"], torch.device("meta"))
        ema, parameters = EMA(model, [0.9999], 0, processes), list(model.parameters())
        name_parts(model, recorder)
        mode = CudaAutocast(AMP_TYPES[config.mixed_precision])
        with mock.patch.object(precision, "full_precision", lambda _: mode.off()), mode, recorder:
            with saved_tensors_hooks(recorder.keep, lambda x: x):
                loss = _loss(model, flow, mode, (moments, y, draws), budget, stats)
            loss.backward()
            if update:
                with recorder.part("update"):
                    _update(parameters, ema, processes)
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    saved: dict[str, int] = defaultdict(int)
    for key, (part, storage) in recorder.saved.items():
        saved[part] += 0 if key in own else storage.nbytes()
    return Trace(recorder.ops, saved, set(recorder.saved) - own, sum(map(Tensor.numel, parameters)))


def _loss(
    model: Backbone,
    flow: FlowMatching,
    mode: CudaAutocast,
    batch: tuple[Tensor, Tensor, Draws],
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
        x = sample_latents(moments, draws.posterior, RECORD)
        y = drop_conditions(model, y, draws, 0.1)
        losses, times, _ = flow.loss_under(flow.conditions([budget])[-1], call, x, draws, y)
        stats.add(losses, times)
        return losses.mean()


@torch.no_grad()
def _update(parameters: list[nn.Parameter], ema: EMA, processes: int) -> None:
    weights, grads = [p.detach() for p in parameters], [p.grad for p in parameters if p.grad is not None]
    if processes > 1:
        foreach_mul_(grads, 1 / processes)  # as DDP, on their way into its buckets
    norm = torch.stack(list(foreach_norm(grads))).norm()  # as `clip_in_step` on CUDA; its function has no form for meta tensors
    grad_scale = (norm + 1e-6).clamp(min=1.0)
    moments = [[torch.empty_like(w) for w in weights] for _ in range(2)]
    steps = [torch.empty((), device="meta") for _ in weights]
    aten._fused_adamw_(
        weights, grads, *moments, [], steps,
        lr=1e-4, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False, grad_scale=grad_scale,
    )  # fmt: skip
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
    return dataclasses.replace(trace, ops=ops)


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
            reads |= op.reads
            writes |= op.writes
        inside = {key for op in members for key in op.reads}
        last = {key: size for key, size in writes.items() if key in kept or key not in inside or len(readers[key]) > 1}
        external = {key: size for key, size in reads.items() if key not in writes}
        fused.append(dataclasses.replace(members[0], name="fused", kernels=1, flops=0, reads=external, writes=last))
    return fused


def _sums(op: Op) -> bool:
    """A sum over images and tokens runs across the rows that the rest of a kernel runs along: nothing after it is in its kernel."""
    return op.name == "sum" and op.backward


# ----------------------------------------------------------------------------------------------------- the tables


def table(trace: Trace) -> str:
    """Kernels, GB of traffic, TFLOPs and GiB kept, by part and kind, as a Markdown table."""
    head = ["part", "kernels", "products", "attention", "element-wise", "element-wise GB", "all GB", "TFLOPs", "kept GiB"]
    rows = []
    for name, parts in [*((part, [part]) for part in trace.parts), ("sum", trace.parts)]:
        kernels, size, flops = trace.total(parts=parts)
        kinds = [trace.total(kind, parts) for kind in ("products", "attention", "element-wise")]
        kept = sum(trace.saved.get(part, 0) for part in parts) / 2**30
        counts = [f"{count:,}" for count in (kernels, *(k[0] for k in kinds))]
        rows.append([name, *counts, f"{kinds[2][1] / 1e9:.2f}", f"{size / 1e9:.2f}", f"{flops / 1e12:.3f}", f"{kept:.2f}"])
    return markdown_table(head, rows)


@cli_main
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="trace.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="ELIT-SiT-XL/2", help="registered name [%(default)s]")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32, help="images of one process [%(default)s]")
    parser.add_argument("--budget", type=float, nargs="+", help="inference budgets of ELIT [the full one]")
    parser.add_argument("--mixed-precision", default="bf16", choices=list(AMP_TYPES))
    parser.add_argument("--processes", type=int, default=1, help="that train together, for the update [%(default)s]")
    parser.add_argument("--compile", action="store_true", help="as compiled (a model of it, see above)")
    parser.add_argument("--kernels", type=int, default=0, help="also print so many of the operations with most traffic")
    args = parser.parse_args(argv)
    config = TrainConfig(model=args.model, exp_name="trace", resolution=args.resolution, mixed_precision=args.mixed_precision)
    for budget in args.budget or [None]:
        trace = trace_step(config, args.batch_size, budget, processes=args.processes)
        trace = compiled(trace) if args.compile else trace
        at = "" if budget is None else f", budget {budget:g}"
        how = "compiled" if args.compile else "eager"
        print(
            f"\n{args.model}, {args.resolution} px, {args.batch_size} images{at}, {args.mixed_precision}, {how}, PyTorch {torch.__version__}\n"
        )
        print(table(trace))
        print(f"\nthe update reads and writes {trace.total(parts=['update'])[1] / trace.parameters:.1f} bytes per parameter")
        sums: dict[tuple[str, str, bool], list[int]] = defaultdict(lambda: [0, 0])
        for op in trace.ops:
            entry = sums[op.part, op.name, op.backward]
            entry[0] += op.kernels
            entry[1] += op.bytes
        for (part, name, backward), (kernels, size) in sorted(sums.items(), key=lambda i: -i[1][1])[: args.kernels]:
            print(f"{part:22} {name:42} {'backward' if backward else 'forward':9} {kernels:6,} {size / 1e9:8.2f} GB")


if __name__ == "__main__":
    main()
