"""Training step and forward pass of SiT, ELIT-SiT and DFM-SiT against what FLOPs allow: `python -m benchmarks.train_step`.

With `--families` also of other backbones, each with ELIT against itself without, on the same latents. All variants of a backbone
run in one process, in turn, round after round; each line is the median over the rounds of the ratio of two times
of the same round, so that a machine whose speed wanders does not matter much. Times in seconds; CPU or GPU.
"""

import argparse
import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import models
from benchmarks.baselines import PlainDiT, PlainEMA
from common.errors import UserError, cli_main
from flows import DFM
from loss import dfm_loss, flow_matching_loss, stage_times
from models.conditioning import Condition, Text
from training.optim import EMA

BUDGETS = (1.0, 0.5, 0.25)
BASELINE_BOUND, ELIT_BOUND, DFM_BOUND, UPDATE_BOUND = 1.05, 1.08, 1.10, 0.08
FAMILY_BUDGETS = (1.0, 0.25)
FAMILY_BOUNDS = {"U-ViT": 1.10, "HDiT": 1.15, "MMDiT": 1.15, "SiT-UViT": 1.10, "SiT-HDiT": 1.10}
PATCH_SIZE, GROUP_SIZE = 2, 4
Precision = Callable[[], contextlib.AbstractContextManager]  # makes the context of a forward
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


class Batch(NamedTuple):
    """Scaled latents and noise (B, 4, S, S), times (B,), labels (B,) or text."""

    x: Tensor
    noise: Tensor
    t: Tensor
    y: Condition


class Line(NamedTuple):
    """One row of the table: ratios of the rounds (dimensionless), what the FLOPs predict, and the bounds on their quotient."""

    name: str
    ratios: list[float]
    predicted: float
    bound: float
    least: float = 0.0

    def __str__(self) -> str:
        low, measured, high = (quantile(self.ratios, q) for q in (0.25, 0.5, 0.75))
        quotient = measured / self.predicted
        verdict = "ok" if self.least <= quotient <= self.bound else "MISSED"
        return f"{self.name:46} {measured:8.3f}  {low:6.3f}–{high:.3f} {self.predicted:8.3f} {quotient:9.3f} {self.bound:7.2f}  {verdict}"


HEADER = f"{'':46} {'measured':>8}  {'quartiles':>12} {'FLOPs':>8} {'quotient':>9} {'bound':>7}"


def quantile(values: list[float], q: float) -> float:
    """The q-quantile, linear between neighbours."""
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


class TrainingStep:
    """Forward, backward, clipping, AdamW and EMA of one model, as the training loop does them."""

    def __init__(self, model: nn.Module, ema: EMA | PlainEMA, batch: Batch, precision: Precision, budget: float | None = None):
        self.model, self.ema, self.batch, self.precision = model, ema, batch, precision
        self.arguments = {} if budget is None else {"inference_budget": budget}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def loss(self) -> Tensor:
        with self.precision():
            return flow_matching_loss(self.model, *self.batch, "linear", **self.arguments).mean()

    def backward(self) -> None:
        self.loss().backward()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()

    @torch.no_grad()
    def forward(self) -> None:
        self.loss()


class DFMStep(TrainingStep):
    """The same for a DFM model whose last stage is active, which is the dearest case."""

    def __init__(self, model: nn.Module, ema: EMA, batch: Batch, precision: Precision):
        super().__init__(model, ema, batch, precision)
        *coarse, _ = DFM().state_shapes(batch.noise.shape[1:])
        self.stages = len(coarse) + 1
        self.coarse = [batch.noise.new_empty(len(batch.t), *shape).normal_() for shape in coarse]
        self.normals = batch.t.new_empty(len(batch.t), self.stages).normal_()

    def loss(self) -> Tensor:
        x, noise, t, y = self.batch
        times = stage_times(t, self.normals, self.stages - 1)
        with self.precision():
            return dfm_loss(self.model, x, [*self.coarse, noise], times, y, "linear", self.stages - 1).mean()


def durations(device: torch.device, clock: Callable[[], float], *actions: Callable[[], object]) -> list[float]:
    """Seconds that each action took, one after the other: by `clock`, or on a GPU by events, with one wait at the end."""
    cuda = device.type == "cuda"
    marks = []

    def mark() -> None:
        if cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(clock())

    if cuda:
        torch.cuda.synchronize(device)
    mark()
    for action in actions:
        action()
        mark()
    if cuda:
        torch.cuda.synchronize(device)
        return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]
    return [b - a for a, b in itertools.pairwise(marks)]


def turns(names: list[str], repeats: int, warmup: int) -> Iterator[tuple[bool, str]]:
    """(does it count, whose turn it is), round by round; the order of the names rotates from round to round."""
    for r in range(-warmup, repeats):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            yield r >= 0, name


def in_turn(
    steps: dict[str, TrainingStep], repeats: int, warmup: int, device: torch.device, clock: Callable[[], float]
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every part of every variant: times[variant][part][round], parts step, update and forward."""
    times = {name: {"step": [], "update": [], "forward": []} for name in steps}
    for counted, name in turns(list(steps), repeats, warmup):
        step = steps[name]
        backward, update = durations(device, clock, step.backward, step.update)
        (forward,) = durations(device, clock, step.forward)
        if counted:
            for part, seconds in (("step", backward + update), ("update", update), ("forward", forward)):
                times[name][part].append(seconds)
    return times


def same_velocity(ours: nn.Module, plain: nn.Module, batch: Batch) -> float:
    """Copies our weights to the baseline and returns the largest difference of their velocities, over the largest velocity."""
    with torch.no_grad():
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            q.copy_(p)
        a, b = (m(batch.noise, batch.t, batch.y) for m in (ours, plain))
    return ((a - b).abs().max() / a.abs().max()).item()


def disturb(model: nn.Module) -> nn.Module:
    """Small noise on all weights, so that no layer is still at its zero start."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    return model


def side_of(tokens: int) -> int:
    """Tokens along an axis. Raises UserError where the tokens are no square, or cannot be grouped."""
    side = math.isqrt(tokens)
    if side * side != tokens or side % GROUP_SIZE:
        raise UserError(f"--tokens {tokens}: must be the square of a multiple of {GROUP_SIZE}")
    return side


def make_batch(batch_size: int, side: int, device: torch.device) -> Batch:
    """Latents for `side` tokens an axis, noise, times and labels."""
    shape = (batch_size, 4, PATCH_SIZE * side, PATCH_SIZE * side)
    batch = Batch(torch.randn(shape), torch.randn(shape), torch.rand(batch_size), torch.randint(1000, (batch_size,)))
    return Batch(*(a.to(device) for a in batch))


def family_model(family: str, size: str) -> tuple[str, dict[str, Any]]:
    """A backbone's name and options: of HDiT two levels, as deep as SiT and the inner one as wide."""
    if family != "HDiT":
        return f"{family}-{size}/{PATCH_SIZE}", {}
    sit = models.model_spec(f"SiT-{size}/{PATCH_SIZE}").sizes
    width, outer = sit["hidden_size"], 2
    options = {"inner_width": width, "inner_depth": sit["depth"] - 2 * outer, "outer_depth": outer, "mapping_width": width}
    return f"HDiT-{'Ti' if size == 'Ti' else 'S'}/{PATCH_SIZE}", {"levels": 2, **options}


def compare_family(
    family: str, size: str, batch: Batch, repeats: int, *, warmup: int, precision: Precision, clock: Callable[[], float]
) -> tuple[list[Line], dict[str, dict[str, list[float]]]]:
    """Steps and forwards of a backbone with ELIT over its own without, as lines, and the times behind them (seconds)."""
    device = batch.x.device
    torch.manual_seed(0)
    name, options = family_model(family, size)
    options["input_size"] = batch.x.shape[-1]
    plain = disturb(models.create_model(name, **options)).to(device)
    elit = disturb(models.create_model(f"ELIT-{name}", elit_group_size=GROUP_SIZE, **options)).to(device)
    if models.model_spec(name).text:
        features = plain.example_condition(len(batch.t)).features
        batch = batch._replace(y=Text(torch.randn_like(features)))
    ema = EMA(elit, [0.9999])
    steps = {family: TrainingStep(plain, EMA(plain, [0.9999]), batch, precision)}
    steps |= {f"ELIT-{family}, b = {b:g}": TrainingStep(elit, ema, batch, precision, b) for b in FAMILY_BUDGETS}
    times = in_turn(steps, repeats, warmup, device, clock)
    lines = []
    for part in ("step", "forward"):
        for b in FAMILY_BUDGETS:
            ratios = [x / y for x, y in zip(times[f"ELIT-{family}, b = {b:g}"][part], times[family][part], strict=True)]
            predicted = models.count_flops(elit, b) / models.count_flops(plain)
            lines.append(Line(f"ELIT-{family} {part} at b = {b:g} / {family}'s", ratios, predicted, FAMILY_BOUNDS[family]))
    return lines, times


def compare(
    size: str,
    tokens: int,
    batch_size: int,
    repeats: int,
    *,
    warmup: int = 2,
    device: torch.device,
    precision: Precision = contextlib.nullcontext,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Line], dict[str, dict[str, list[float]]], float]:
    """The table's lines, the times behind them (seconds), and how far the baseline's velocity is from ours (relative)."""
    side = side_of(tokens)
    torch.manual_seed(0)
    options = {"input_size": PATCH_SIZE * side}
    sit = disturb(models.create_model(f"SiT-{size}/{PATCH_SIZE}", **options)).to(device)
    elit = disturb(models.create_model(f"ELIT-SiT-{size}/{PATCH_SIZE}", elit_group_size=GROUP_SIZE, **options)).to(device)
    dfm = disturb(models.create_model(f"DFM-SiT-{size}/{PATCH_SIZE}", **options)).to(device)
    plain = PlainDiT(**options, **models.model_spec(f"SiT-{size}/{PATCH_SIZE}").sizes).to(device)
    batch = make_batch(batch_size, side, device)
    difference = same_velocity(sit, plain, batch)

    steps = {
        "SiT": TrainingStep(sit, EMA(sit, [0.9999]), batch, precision),
        "plain": TrainingStep(plain, PlainEMA(plain, 0.9999), batch, precision),
        "DFM": DFMStep(dfm, EMA(dfm, [0.9999]), batch, precision),
    }
    ema = EMA(elit, [0.9999])
    steps |= {f"b = {b:g}": TrainingStep(elit, ema, batch, precision, b) for b in BUDGETS}
    times = in_turn(steps, repeats, warmup, device, clock)

    def over(name: str, part: str, other: str, other_part: str) -> list[float]:
        return [a / b for a, b in zip(times[name][part], times[other][other_part], strict=True)]

    lines = [Line("SiT step / plain SDPA stack step", over("SiT", "step", "plain", "step"), 1.0, BASELINE_BOUND)]
    for part in ("step", "forward"):
        for b in BUDGETS:
            predicted = models.count_flops(elit, b) / models.count_flops(sit)
            lines.append(
                Line(f"ELIT-SiT {part} at b = {b:g} / SiT's", over(f"b = {b:g}", part, "SiT", part), predicted, ELIT_BOUND)
            )
    lines.append(Line("DFM-SiT step / SiT's", over("DFM", "step", "SiT", "step"), 1.0, DFM_BOUND))
    lines.append(Line("clipping + AdamW + EMA / SiT step", over("SiT", "update", "SiT", "step"), 1.0, UPDATE_BOUND))
    return lines, times, difference


@cli_main
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="train_step.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--families", nargs="+", default=["SiT"], choices=["SiT", *FAMILY_BOUNDS], help="backbones, one after the other [SiT]"
    )
    parser.add_argument("--model-size", default="S", choices=["Ti", "S", "B", "L", "XL"])
    parser.add_argument("--tokens", type=int, default=256, help="tokens per image: a square [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15, help="rounds; each times every variant once [%(default)s]")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before, not counted [%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads [all]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16"])
    parser.add_argument(
        "--clock",
        default="wall",
        choices=list(CLOCKS),
        help="CPU only; process: processor time, to be used with --threads 1 on a machine that others use too [%(default)s]",
    )
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    def precision() -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16")

    lines, times, difference = [], {}, None
    how = {"warmup": args.warmup, "precision": precision, "clock": CLOCKS[args.clock]}
    if "SiT" in args.families:
        lines, times, difference = compare(args.model_size, args.tokens, args.batch_size, args.repeats, device=device, **how)
    for family in args.families:
        if family != "SiT":
            batch = make_batch(args.batch_size, side_of(args.tokens), device)
            of_family, seconds = compare_family(family, args.model_size, batch, args.repeats, **how)
            lines, times = [*lines, *of_family], times | seconds
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{args.model_size}/{PATCH_SIZE}, {args.tokens} tokens, batch {args.batch_size}, group size {GROUP_SIZE}, "
        f"{args.mixed_precision}, {where}, {args.clock} clock, PyTorch {torch.__version__}, median of {args.repeats} rounds"
    )
    if difference is not None:
        print(f"same velocity from SiT and the plain stack: relative difference {difference:.1e}")
    print()
    print(f"{'milliseconds':46} {'step':>8} {'update':>8} {'forward':>8}")
    for name, parts in times.items():
        print(f"{name:46} " + " ".join(f"{1000 * statistics.median(v):8.1f}" for v in parts.values()))
    print(f"\n{HEADER}")
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
