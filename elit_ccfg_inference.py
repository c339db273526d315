"""Classifier-free guidance, cheap guidance and autoguidance side by side, at several scales.

`python elit_ccfg_inference.py --ckpt … --cfg-scales 1 2 3 4 5 --class-label 207 --output-dir …` writes

- `cfg_vs_ccfg_grid.png`: for each label a row for CFG, cheap CFG (CCFG) and autoguidance (AutoG), with --guide-ckpt another for
  that guide (Guide), a column for each scale;
- `cfg_vs_ccfg_flops.png`: GFLOPs of a guided step by kind of guidance;
- `results.json`: an entry for each kind (`mode`) and `cfg_scale`,
  - `gflops_per_forward`, `flops_per_forward`: one image through the model once at the inference budget;
  - `gflops_per_guided_step`: one image, one velocity evaluation inside the guidance interval;
  - `gflops_per_step`: one image, mean over the sampler's steps: guidance interval and Heun's second evaluations counted;
    with --core-cache what ran, and `core_share`: in how many of the passes the core ran;
  - `latency_ms`, `latency_ms_quartiles`: median and quartiles of the wall time of one guided velocity evaluation on a batch of
    `batch_size` images (all labels, at most --per-proc-batch-size), after warm-up.

At scale 1 there is no guidance: one pass, whatever the mode. With a schedule as --inference-budget all are means over the steps.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from checkpoint.weights import Weights
from common import files
from common.errors import cli_main
from common.files import check_folder
from common.logging import warn
from common.plotting import bar_plot, labelled_grid
from common.sizes import sides
from config.options import CCFGConfig
from models.elit import budget_to_k
from samplers import BudgetSchedule, Guidance, parse_budget
from sampling import checks, cost, session
from sampling.core_cache import Drawn
from sampling.guidance_kinds import KINDS, guidance_of_kind, kinds_of
from sampling.session import Session


@cli_main
def main(argv: list[str] | None = None) -> None:
    """The command: options → `compare`."""
    config, given, weights = session.from_command_line(CCFGConfig, argv, "elit_ccfg_inference.py", check_options)
    checks.check_elit(config)
    raise_lowest_budget(config, given)
    check(config)
    round_budgets(config)
    checks.warn_of_budgets(config)
    compare(config, weights)


def check_options(config: CCFGConfig) -> None:
    """Refuse what no checkpoint can be sampled with; nothing is read or downloaded before."""
    checks.check_options(config, config.cfg_scales)
    check_folder("--output-dir", config.output_dir)


def check(config: CCFGConfig) -> None:
    """Refuse what the model cannot be sampled with, before anything is loaded or written."""
    checks.check_labels(config, "--class-label", config.class_label)
    checks.check_model(config)


def raise_lowest_budget(config: CCFGConfig, given: Mapping[str, Any]) -> None:
    """Where nobody asked for a guiding budget: at least the model's lowest."""
    lowest = 1 / config.elit_group_size**2
    if "unconditional_inference_budget" not in given and config.unconditional_inference_budget < lowest:
        warn(f"this model's lowest budget is 1/{config.elit_group_size**2}; the guiding passes run at that")
        config.unconditional_inference_budget = lowest


def round_budgets(config: CCFGConfig) -> None:
    """Round the budgets down to multiples of 1/J, each with a warning."""
    J = config.elit_group_size**2

    def rounded(name: str, budget: float) -> float:
        below = budget_to_k(budget, J) / J
        if abs(below - budget) > 1e-6:
            warn(f"--{name.replace('_', '-')} {budget:g} is no multiple of 1/{J}; running at {below:g}, the nearest below")
        return below

    budget = parse_budget(config.inference_budget)
    if isinstance(budget, BudgetSchedule):
        pieces = tuple((rounded("inference_budget", b), start, end) for b, start, end in budget.pieces)
        config.inference_budget = str(BudgetSchedule(pieces))
    elif budget is not None:
        config.inference_budget = str(rounded("inference_budget", budget))
    config.unconditional_inference_budget = rounded("unconditional_inference_budget", config.unconditional_inference_budget)


def compare(config: CCFGConfig, weights: Weights) -> list[dict[str, Any]]:
    """Sample with every kind of guidance at every scale, measure, and write all files; returns the entries of results.json."""
    loaded, folder = session.setup_tool(config, weights, config.output_dir)

    scales = sorted(set(config.cfg_scales))
    modes = kinds_of(config)
    runs = {(mode, scale): guidance_of_kind(config, mode, scale) for mode in modes for scale in scales}
    with torch.inference_mode():
        images: dict[tuple[str, float], np.ndarray] = {}
        drawn: dict[tuple[str, float], Drawn] = {}
        for (mode, scale), g in tqdm(runs.items(), desc="sample", unit="guidance"):
            same = ("CFG", scale)
            if scale != 1 or same not in images:  # no guidance is the same in every mode
                same, sampled = (mode, scale), loaded.fresh()
                images[same], drawn[same] = session.sample_examples(sampled, config, g)[1], sampled.drawn
            images[mode, scale], drawn[mode, scale] = images[same], drawn[same]
        results = measure(config, loaded, runs)
    for entry in results if config.core_cache else []:
        of = drawn[entry["mode"], entry["cfg_scale"]]
        entry |= {"gflops_per_step": cost.drawn_flops_per_step(loaded, of) / 1e9, "core_share": of.share}
    # (labels × modes, scales, H, W, 3)
    examples = loaded.conditions.names(config)
    grid = np.stack([[images[mode, s][i] for s in scales] for i in range(len(examples)) for mode in modes])
    rows = [f"{example}\n{name}" for example in examples for name in modes.values()]
    labelled_grid(grid, rows, [f"scale {scale:g}" for scale in scales], folder / "cfg_vs_ccfg_grid.png",
                  inches=min(max(sides(config.resolution)[1] / 160, 1.0), 1.6))  # fmt: skip
    bars = {KINDS[e["mode"]]: e["gflops_per_guided_step"] for e in results if e["cfg_scale"] == scales[-1]}
    budget = parse_budget(config.inference_budget)
    budget_name = f"schedule {budget}" if isinstance(budget, BudgetSchedule) else f"budget {budget:g}"
    bar_plot(
        folder / "cfg_vs_ccfg_flops.png",
        bars,
        ylabel="GFLOPs per guided step of one image",
        title=f"{config.model}, {budget_name}, guiding at {config.unconditional_inference_budget:g}",
    )
    files.write_json(results, folder / "results.json")
    for name, gflops in bars.items():
        less = "" if name == "CFG" else f" ({100 * (gflops / bars['CFG'] - 1):+.0f}%)"
        print(f"{name}: {gflops:.4g} GFLOPs per guided step{less}")
    print(f"{folder}: cfg_vs_ccfg_grid.png, cfg_vs_ccfg_flops.png and results.json")
    return results


def measure(config: CCFGConfig, loaded: Session, runs: dict[tuple[str, float], Guidance]) -> list[dict[str, Any]]:
    """FLOPs and latency of each (mode, scale): the entries of results.json."""
    count = min(len(loaded.conditions.names(config)), config.per_proc_batch_size)
    noise, y = loaded.starting_noise(config.seed, range(count)), loaded.condition(range(count), loaded.device)

    # What a step costs depends on its passes alone, not on the scale: (mode, passes) → a job to be timed.
    whole = {key: cost.passes_of_run(config, g) for key, g in runs.items()}
    flops = cost.pass_flops(loaded.model, whole.values(), loaded.guide)
    jobs, steps = {}, {}
    for (mode, scale), g in runs.items():
        evaluations = loaded.flow.evaluations()
        evaluations = [times for times in evaluations if any(map(g.active, times))] or evaluations
        passes = [tuple(g.passes(*times)) for times in evaluations]
        steps[mode, scale] = [(mode if len(p) > 1 else "", p) for p in passes]
        for times, step in zip(evaluations, steps[mode, scale], strict=True):
            jobs.setdefault(step, partial(loaded.flow.evaluate, loaded.model, noise, times, y, loaded.with_guide(g)))
    with loaded.autocast():
        latency = cost.interleaved_times(jobs, loaded.device)

    results = []
    for (mode, scale), g in runs.items():
        guided = steps[mode, scale]
        forward = sum(flops[passes[0]] for _, passes in guided) / len(guided)
        low, median, high = (sum(latency[step][q] for step in guided) / len(guided) for q in range(3))
        results.append(
            {
                "mode": mode,
                "cfg_scale": scale,
                "budget": str(g.inference_budget) if isinstance(g.inference_budget, BudgetSchedule) else g.inference_budget,
                "unconditional_budget": g.unconditional_inference_budget,
                "gflops_per_forward": forward / 1e9,
                "flops_per_forward": round(forward),
                "gflops_per_guided_step": sum(flops[p] for _, passes in guided for p in passes) / len(guided) / 1e9,
                "gflops_per_step": cost.flops_per_step(config, whole[mode, scale], flops) / 1e9,
                "latency_ms": median,
                "latency_ms_quartiles": [low, high],
                "batch_size": count,
            }
        )
    return results


if __name__ == "__main__":
    main()
