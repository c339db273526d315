"""The core cache against fewer steps, from the same noise: `python -m benchmarks.core_cache --ckpt CKPT`.

Images are drawn by Euler steps with a core cache by both rules at several thresholds, and without one at the same and at fewer steps. Each
way's distance is the RMS over all latents to the result of many steps. A cached run is compared with the distance that fewer
steps would have at its time, interpolated between the neighbouring numbers of steps. All variants run in one process, in turn,
round after round; times are medians. CPU or GPU; any checkpoint of a model with class labels.
"""

import argparse
import math
import statistics
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.sampling import Job, in_turn
from benchmarks.train_step import CLOCKS
from common.errors import UserError, cli_main
from common.tables import markdown_table
from config.options import GenerateConfig
from sampling import cost, session
from sampling.session import Session

HEADER = ["", "core runs", "GFLOPs / image", "seconds", "RMS distance", "of fewer steps in that time", "cache, MiB"]


def draw(loaded: Session, count: int) -> Tensor:
    """Latents of the images 0 … count − 1, classes in turn."""
    y = torch.arange(count) % loaded.config.num_classes
    with torch.inference_mode():
        return loaded.latents(session.guidance(loaded.config), 0, range(count), y)  # type: ignore[arg-type]


def variants(loaded: Session, args: argparse.Namespace) -> dict[str, Session]:
    """Name → a session of its options; those without a cache are named by their number of steps."""

    def options(**changes: Any) -> Session:
        changes = {"core_cache": 0.0, "num_steps": args.num_steps} | changes
        return loaded.with_options(replace(loaded.config, **changes)).fresh()

    rules = {"time": args.time, "head": args.head}
    return {f"{n} steps": options(num_steps=n) for n in sorted({args.num_steps, *args.fewer_steps}, reverse=True)} | {
        f"{rule} {threshold:g}": options(core_cache=threshold, cache_rule=rule)
        for rule, thresholds in rules.items()
        for threshold in thresholds
    }


def distance_at(seconds: float, curve: dict[float, float]) -> float:
    """The distance of as many steps as take so long: geometric interpolation of time → distance; nan beyond its ends."""
    for low, high in pairwise(sorted(curve)):
        if low <= seconds <= high:
            share = (seconds - low) / (high - low)
            return math.exp((1 - share) * math.log(curve[low]) + share * math.log(curve[high]))
    return math.nan


@cli_main
def main(argv: list[str] | None = None) -> None:
    """The command: prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--count", type=int, default=20, help="images, in one batch [%(default)s]")
    parser.add_argument("--num-steps", type=int, default=25, help="Euler steps of the cached runs [%(default)s]")
    parser.add_argument("--fewer-steps", type=int, nargs="+", default=[20, 17, 15, 12, 10, 8])
    parser.add_argument("--many-steps", type=int, default=200, help="of the result that all are compared with [%(default)s]")
    parser.add_argument("--cfg-scale", type=float, default=6.0)
    parser.add_argument("--inference-budget", help="of ELIT models [all latents]")
    parser.add_argument("--time", type=float, nargs="+", default=[0.08, 0.1, 0.15], help="thresholds of the rule time")
    parser.add_argument("--head", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="thresholds of the rule head")
    parser.add_argument("--cache-after", type=int, help="blocks before the core of models without ELIT")
    parser.add_argument("--repeats", type=int, default=3, help="rounds [%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads [all]")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="as in benchmarks.train_step [%(default)s]")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if max(args.fewer_steps) >= args.num_steps:
        raise UserError(f"--fewer-steps {max(args.fewer_steps)}: must be below --num-steps {args.num_steps}")
    options = ["--ckpt", args.ckpt, "--cfg-scale", str(args.cfg_scale), "--core-cache", str(args.time[0])]
    options += ["--cache-after", str(args.cache_after)] if args.cache_after is not None else []
    options += ["--inference-budget", args.inference_budget] if args.inference_budget else []
    config, _, weights = session.from_command_line(GenerateConfig, options, "benchmarks.core_cache", lambda config: None)
    device = session.device()
    loaded = session.load(config, weights, device)
    sessions = variants(loaded, args)
    print(
        f"{config.model}, {args.count} images, cfg {args.cfg_scale:g}, {session.device_name(device)}, {args.clock} clock, "
        f"PyTorch {torch.__version__}, medians of {args.repeats} rounds\n"
    )
    many = draw(loaded.with_options(replace(config, core_cache=0.0, num_steps=args.many_steps)), args.count)
    found: dict[str, Tensor] = {}

    def run(name: str) -> None:
        found[name] = draw(sessions[name], args.count)

    jobs: dict[str, Job] = {name: partial(run, name) for name in sessions}
    times = {name: statistics.median(t) for name, t in in_turn(jobs, args.repeats, 0, device, CLOCKS[args.clock]).items()}
    rms = {name: (latents - many).square().mean().sqrt().item() for name, latents in found.items()}
    curve = {times[name]: rms[name] for name in sessions if name.endswith("steps")}
    rows = []
    for name, s in sessions.items():
        share = kept = other = ""
        if s.config.core_cache:
            flops = cost.drawn_flops_per_step(s, s.drawn)
            share, kept = f"{100 * s.drawn.share:.0f}%", f"{s.drawn.cache_bytes / 2**20:.1f}"
            fewer = distance_at(times[name], curve)
            other = "" if math.isnan(fewer) else f"{fewer:.4f} ({rms[name] / fewer:.2f}×)"
        else:
            flops = cost.mean_flops_per_step(s.config, session.guidance(s.config), loaded.model)
        gflops = flops * s.flow.total_steps / 1e9
        rows.append([name, share, f"{gflops:.1f}", f"{times[name]:.2f}", f"{rms[name]:.4f}", other, kept])
    print(markdown_table(HEADER, rows))


if __name__ == "__main__":
    main()
