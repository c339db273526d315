"""Classifier-free guidance, cheap guidance and autoguidance side by side, at several scales.

`python elit_ccfg_inference.py --ckpt … --cfg-scales 1 2 3 4 5 --class-label 207 --output-dir …` writes

- `cfg_vs_ccfg_grid.png`: for each label a row for CFG, cheap CFG (CCFG) and autoguidance (AutoG), a column for each scale;
- `cfg_vs_ccfg_flops.png`: GFLOPs of a guided step by kind of guidance;
- `results.json`: an entry for each kind (`mode`) and `cfg_scale`,
  - `gflops_per_forward`, `flops_per_forward`: one image through the model once at the inference budget;
  - `gflops_per_guided_step`: one image, one velocity evaluation inside the guidance interval;
  - `gflops_per_step`: one image, mean over the sampler's steps: guidance interval and Heun's second evaluations counted;
  - `latency_ms`, `latency_ms_quartiles`: median and quartiles of the wall time of one guided velocity evaluation on a batch of
    `batch_size` images (all labels, at most --per-proc-batch-size), after warm-up.

At scale 1 there is no guidance: one pass, whatever the mode. With a schedule as --inference-budget all are means over the steps.
"""

import sys
from functools import partial

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from checkpoint import weights
from common import files
from common.errors import cli_main
from common.plotting import bar_plot, labelled_grid
from config.options import CCFGConfig
from models.elit import budget_to_k
from samplers import BudgetSchedule, Guidance, parse_budget
from sampling import checks, cost, session

MODES = {"CFG": "CFG", "CCFG": "cheap CFG", "AutoG": "autoguidance"}


@cli_main
def main(argv: list[str] | None = None) -> None:
    config, given, found = session.from_command_line(CCFGConfig, argv, "elit_ccfg_inference.py")
    check(config, given)
    compare(config, found)


def check(config: CCFGConfig, given: dict) -> None:
    """Refuse what cannot be sampled, before anything is loaded or written; round the budgets down to multiples of 1/J."""
    checks.check_elit(config)
    checks.check_labels(config, "--class-label", config.class_label)
    J = config.elit_group_size**2
    if "unconditional_inference_budget" not in given and config.unconditional_inference_budget < 1 / J:
        _warn(f"this model's lowest budget is 1/{J}; the guiding passes run at that")
        config.unconditional_inference_budget = 1 / J
    checks.check_budget(config, "--inference-budget", config.inference_budget)
    checks.check_budget(config, "--unconditional-inference-budget", config.unconditional_inference_budget)

    def rounded(name: str, budget: float) -> float:
        below = budget_to_k(budget, J) / J
        if abs(below - budget) > 1e-6:
            _warn(f"--{name.replace('_', '-')} {budget:g} is no multiple of 1/{J}; running at {below:g}, the nearest below")
        return below

    budget = parse_budget(config.inference_budget)
    if isinstance(budget, BudgetSchedule):
        pieces = tuple((rounded("inference_budget", b), start, end) for b, start, end in budget.pieces)
        config.inference_budget = str(BudgetSchedule(pieces))
    else:
        config.inference_budget = str(rounded("inference_budget", budget))
    config.unconditional_inference_budget = rounded("unconditional_inference_budget", config.unconditional_inference_budget)
    for scale in config.cfg_scales:
        guidance(config, "AutoG", scale).check()
    checks.check_sampler(config)
    checks.check_folder("--output-dir", config.output_dir)


def guidance(config: CCFGConfig, mode: str, cfg_scale: float) -> Guidance:
    """One of the three kinds of guidance, at a scale."""
    return session.guidance(
        config,
        cfg_scale=cfg_scale,
        unconditional_inference_budget=None if mode == "CFG" else config.unconditional_inference_budget,
        autoguidance=mode == "AutoG",
    )


def compare(config: CCFGConfig, found: weights.Weights) -> list[dict]:
    """Sample with every kind of guidance at every scale, measure, and write all files; returns the entries of results.json."""
    model, vae, shape, folder = session.setup_tool(config, found, _warn)

    scales = sorted(set(config.cfg_scales))
    runs = {(mode, scale): guidance(config, mode, scale) for mode in MODES for scale in scales}
    with torch.inference_mode():
        images: dict[tuple[str, float], np.ndarray] = {}
        for (mode, scale), g in tqdm(runs.items(), desc="sample", unit="guidance"):
            same = images.get(("CFG", scale)) if scale == 1 else None  # no guidance is the same in every mode
            images[mode, scale] = session.sample_all(config, g, model, vae, shape)[1] if same is None else same
        results = measure(config, model, runs, shape)
    # (labels × modes, scales, H, W, 3)
    grid = np.stack([[images[mode, s][i] for s in scales] for i in range(len(config.class_label)) for mode in MODES])
    rows = [f"class {label}\n{name}" for label in config.class_label for name in MODES.values()]
    labelled_grid(grid, rows, [f"scale {scale:g}" for scale in scales], folder / "cfg_vs_ccfg_grid.png",
                  inches=min(max(config.resolution / 160, 1.0), 1.6))  # fmt: skip
    bars = {MODES[e["mode"]]: e["gflops_per_guided_step"] for e in results if e["cfg_scale"] == scales[-1]}
    budget = parse_budget(config.inference_budget)
    said = f"schedule {budget}" if isinstance(budget, BudgetSchedule) else f"budget {budget:g}"
    bar_plot(
        folder / "cfg_vs_ccfg_flops.png",
        bars,
        ylabel="GFLOPs per guided step of one image",
        title=f"{config.model}, {said}, guiding at {config.unconditional_inference_budget:g}",
    )
    files.write_json(results, folder / "results.json")
    for name, gflops in bars.items():
        less = "" if name == "CFG" else f" ({100 * (gflops / bars['CFG'] - 1):+.0f}%)"
        print(f"{name}: {gflops:.4g} GFLOPs per guided step{less}")
    print(f"{folder}: cfg_vs_ccfg_grid.png, cfg_vs_ccfg_flops.png and results.json")
    return results


def measure(
    config: CCFGConfig, model: nn.Module, runs: dict[tuple[str, float], Guidance], shape: tuple[int, ...]
) -> list[dict]:
    """FLOPs and latency of each (mode, scale): the entries of results.json."""
    device = next(model.parameters()).device
    count = min(len(config.class_label), config.per_proc_batch_size)
    noise = session.starting_noise(model, shape, config.seed, range(count))
    y = torch.tensor(config.class_label[:count], device=device)

    # What a step costs depends on its passes alone, not on the scale: (mode, passes) → a job to be timed.
    whole = {key: cost.passes_of_run(config, g) for key, g in runs.items()}
    flops = cost.pass_flops(model, whole.values())
    jobs, steps = {}, {}
    for (mode, scale), g in runs.items():
        evaluations = cost.evaluations(config)
        evaluations = [times for times in evaluations if any(map(g.active, times))] or evaluations
        passes = [tuple(g.passes(*times)) for times in evaluations]
        steps[mode, scale] = [(mode if len(p) > 1 else "", p) for p in passes]
        for times, step in zip(evaluations, steps[mode, scale], strict=True):
            jobs.setdefault(step, partial(cost.one_evaluation, model, noise, times, y, g))
    with session.autocast(config, device):
        latency = cost.interleaved_times(jobs, device)

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
                "gflops_per_guided_step": sum(flops[b] for _, passes in guided for b in passes) / len(guided) / 1e9,
                "gflops_per_step": cost.flops_per_step(config, whole[mode, scale], flops) / 1e9,
                "latency_ms": median,
                "latency_ms_quartiles": [low, high],
                "batch_size": count,
            }
        )
    return results


def _warn(message: str) -> None:
    print(f"elit_ccfg_inference.py: warning: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
