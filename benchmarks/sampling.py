"""Sampling at every budget against what its FLOPs allow, images/s and peak memory: `python -m benchmarks.sampling`.

Two tables. The first samples with one model at budgets 1, ½, ¼ and 1/16 under CFG and cheap CFG. The second compares single
evaluations of a wide model: the time of a forward at a budget over that at the full one, and of a step with cheap CFG over one
with CFG. All variants run in one process, in turn, round after round; the ratios are of times of the same round. CPU or GPU.
"""

import argparse
import math
import os
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import models
from benchmarks.train_step import CLOCKS, GROUP_SIZE, HEADER, PATCH_SIZE, Line, disturb, durations, quantile, turns
from common.errors import UserError, cli_main
from samplers import Guidance, euler_sampler, guided_velocity
from sampling.session import device_name

BUDGETS = (1.0, 0.5, 0.25, 0.0625)
BOUNDS = {0.5: 1.10, 0.25: 1.10, 0.0625: 1.15}  # of time ratio over FLOPs ratio
GUIDING_BOUND = 0.10  # how far the time of a step with cheap CFG may be from what FLOPs predict, either way
WIDE = {"hidden_size": 1152, "num_heads": 16, "depth": 7, "head_depth": 1, "tail_depth": 1}  # one, five and one block
CFG_SCALE, LOW_BUDGET = 4.0, 0.0625

Job = Callable[[], object]


def guidance(budget: float, cheap: bool) -> Guidance:
    """CFG or cheap CFG at a budget."""
    return Guidance(CFG_SCALE, inference_budget=budget, unconditional_inference_budget=LOW_BUDGET if cheap else None)


def build(tokens: int, batch_size: int, device: torch.device, size: str, **sizes) -> tuple[nn.Module, tuple]:
    """An ELIT-SiT model without any weight at zero, and (noise, times, labels) of a batch."""
    side = PATCH_SIZE * math.isqrt(tokens)
    torch.manual_seed(0)
    model = models.create_model(f"ELIT-SiT-{size}/{PATCH_SIZE}", input_size=side, elit_group_size=GROUP_SIZE, **sizes)
    batch = (torch.randn(batch_size, 4, side, side), torch.full((batch_size,), 0.5), torch.arange(batch_size) % 1000)
    return disturb(model).to(device).eval().requires_grad_(False), tuple(a.to(device) for a in batch)


def in_turn(
    jobs: dict[str, Job], repeats: int, warmup: int, device: torch.device, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of every job, by round."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for counted, name in turns(list(jobs), repeats, warmup):
        (seconds,) = durations(device, clock, jobs[name])
        if counted:
            times[name].append(seconds)
    return times


def peak_memory(job: Job, device: torch.device) -> int:
    """The most bytes that are allocated for tensors at any time of a job, beyond those that were there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no lines of the profiler between ours
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        job()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def ratios(times: dict[str, list[float]], name: str, other: str) -> list[float]:
    return [a / b for a, b in zip(times[name], times[other], strict=True)]


def throughput(
    size: str, tokens: int, batch_size: int, num_steps: int, repeats: int, device: torch.device, clock: Callable[[], float]
) -> list[str]:
    """The lines of the first table: images/s (median and quartiles) and peak memory of sampling a batch."""
    model, (noise, _, y) = build(tokens, batch_size, device, size)
    runs = {(b, cheap): guidance(b, cheap) for cheap in (False, True) for b in BUDGETS if not (cheap and b == LOW_BUDGET)}
    jobs = {
        f"{'cheap CFG' if cheap else 'CFG'}, b = {b:g}": partial(
            euler_sampler, model, noise, y, num_steps=num_steps, **g._asdict()
        )
        for (b, cheap), g in runs.items()
    }
    flops = {b: models.count_flops(model, b) for b in BUDGETS}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    times = in_turn(jobs, repeats, 1, device, clock)
    lines = [
        f"{'':24} {'images/s':>9}  {'quartiles':>13} {'GFLOPs/step':>12} {'peak MiB beside ' + f'{weights / 2**20:.0f}':>20}"
    ]
    for (name, job), g in zip(jobs.items(), runs.values(), strict=True):
        low, middle, high = (batch_size / quantile(times[name], q) for q in (0.75, 0.5, 0.25))
        gigaflops = sum(flops[p.budget] for p in g.passes(0.5)) / 1e9
        memory = peak_memory(job, device) / 2**20
        lines.append(f"{name:24} {middle:9.3g}  {f'{low:.3g}–{high:.3g}':>13} {gigaflops:12.4g} {memory:20.1f}")
    return lines


def bounds(
    tokens: int, batch_size: int, repeats: int, device: torch.device, clock: Callable[[], float], **sizes
) -> tuple[list[Line], dict[str, list[float]]]:
    """The lines of the second table, and the times behind them (seconds)."""
    model, (x, t, y) = build(tokens, batch_size, device, "XL", **(WIDE | sizes))
    jobs: dict[str, Job] = {f"forward at b = {b:g}": partial(model, x, t, y, inference_budget=b) for b in BUDGETS}
    for name, cheap in (("CFG", False), ("cheap CFG", True)):
        jobs[f"step with {name}"] = partial(guided_velocity, model, x.double(), 0.5, y, guidance(1.0, cheap))
    flops = {b: models.count_flops(model, b) for b in BUDGETS}
    times = in_turn(jobs, repeats, 1, device, clock)
    full = "forward at b = 1"
    lines = []
    for b, bound in BOUNDS.items():
        name = f"forward at b = {b:g}"
        lines.append(Line(f"{name} / at 1", ratios(times, name, full), flops[b] / flops[1.0], bound))
    predicted = (flops[1.0] + flops[LOW_BUDGET]) / (2 * flops[1.0])
    cheap = ratios(times, "step with cheap CFG", "step with CFG")
    lines.append(Line("step with cheap CFG / with CFG", cheap, predicted, 1 + GUIDING_BOUND, 1 - GUIDING_BOUND))
    return lines, times


@cli_main
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="sampling.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--model-size", default="S", choices=["Ti", "S", "B", "L", "XL"], help="of the first table [%(default)s]"
    )
    parser.add_argument("--width", type=int, default=1152, help="of the second table's model [%(default)s]")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per image: a square [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-steps", type=int, default=2, help="of the first table [%(default)s]")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; each times every variant once [%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads [all]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="as in benchmarks.train_step [%(default)s]")
    args = parser.parse_args(argv)
    if math.isqrt(args.tokens) ** 2 != args.tokens or math.isqrt(args.tokens) % GROUP_SIZE:
        raise UserError(f"--tokens {args.tokens}: must be the square of a multiple of {GROUP_SIZE}")
    if args.threads:
        torch.set_num_threads(args.threads)
    device, clock = torch.device(args.device), CLOCKS[args.clock]
    print(
        f"{args.tokens} tokens, batch {args.batch_size}, group size {GROUP_SIZE}, {args.mixed_precision}, {device_name(device)}, "
        f"{args.clock} clock, PyTorch {torch.__version__}, median of {args.repeats} rounds\n"
    )
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
        print(f"Sampling: ELIT-SiT-{args.model_size}/{PATCH_SIZE}, {args.num_steps} Euler steps")
        sampled = throughput(args.model_size, args.tokens, args.batch_size, args.num_steps, args.repeats, device, clock)
        print("\n".join(sampled), flush=True)
        print(f"\nEvaluations: width {args.width}, 16 heads, head / core / tail 1 / 5 / 1")
        lines, times = bounds(args.tokens, args.batch_size, args.repeats, device, clock, hidden_size=args.width)
    for name, seconds in times.items():
        print(f"{name:36} {1000 * statistics.median(seconds):8.1f} ms")
    print("\n".join(["", HEADER, *map(str, lines)]))


if __name__ == "__main__":
    main()
