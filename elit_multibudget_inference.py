"""One checkpoint at every budget: the same images, what they cost, how long they take and how far they are from full compute.

`python elit_multibudget_inference.py --ckpt … --class-label 207 88 --output-dir …` writes

- `image_grid.png`: a row for each label, a column for each budget, the same noise in a row;
- `budget_vs_flops.png`, `budget_vs_latency.png`, `budget_vs_psnr.png`, and `results.json`: an entry for each budget,
  - `gflops_per_forward`, `flops_per_forward`: one image through the model once, without guidance;
  - `gflops_per_step`: one image, mean over the sampler's steps, guiding passes counted; with --core-cache what ran, and
    `core_share`: in how many of the passes the core ran;
  - `latency_ms`, `latency_ms_quartiles`: median and quartiles of the wall time of one forward of the model, without guidance,
    on a batch of `batch_size` images (all labels, at most --per-proc-batch-size), after warm-up;
  - `psnr`: dB against the full budget's images, over all their pixels; null for equal images.

An --inference-budget that is a schedule is one more column; its entries are means over the steps, and its `budget` is the text.
With --attention also `attention_maps.png`, `attention_entropy.png` and `attention.json`: what each latent reads; and `attention_loss.png`:
of each image what all latents read beside the flow-matching loss of each patch, and their rank correlation.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint.weights import Weights
from common import files
from common.errors import cli_main
from common.files import check_folder
from common.image_files import psnr
from common.plotting import attention_maps, heat_map, labelled_grid, line_plot
from common.sizes import sides
from config.options import MultibudgetConfig
from samplers import BudgetSchedule, Guidance
from sampling import checks, cost, session
from sampling.attention import read_maps, shown_latents
from sampling.core_cache import Drawn
from sampling.patches import Patches, mean_and_error, mean_patches, patches_of, rank_correlations
from sampling.session import Session

LOSS_DRAWS = 8  # of noise, for the loss of each patch


@cli_main
def main(argv: list[str] | None = None) -> None:
    """The command: options → `compare`."""
    config, _, weights = session.from_command_line(MultibudgetConfig, argv, "elit_multibudget_inference.py", check_options)
    check(config)
    checks.warn_of_budgets(config, config.budgets or checks.all_budgets(config.elit_group_size**2))
    compare(config, weights)


def check_options(config: MultibudgetConfig) -> None:
    """Refuse what no checkpoint can be sampled with; nothing is read or downloaded before."""
    checks.check_options(config)
    check_folder("--output-dir", config.output_dir)


def check(config: MultibudgetConfig) -> None:
    """Refuse what the model cannot be sampled with, before anything is loaded or written."""
    checks.check_elit(config)
    checks.check_labels(config, "--class-label", config.class_label)
    for budget in config.budgets or []:
        checks.check_budget(config, "--budgets", budget)
    checks.check_model(config)


def compare(config: MultibudgetConfig, weights: Weights) -> list[dict[str, Any]]:
    """Sample at every budget, measure, and write all files; returns the entries of results.json."""
    loaded, folder = session.setup_tool(config, weights, config.output_dir)

    requested = session.guidance(config)
    columns: list[float | BudgetSchedule] = sorted(set(config.budgets or checks.all_budgets(config.elit_group_size**2)))
    if isinstance(requested.inference_budget, BudgetSchedule):
        columns.append(requested.inference_budget)
    elif requested.inference_budget is not None:
        columns = sorted({*columns, requested.inference_budget})
    # The full budget is sampled in any case: it is what the others are compared with.
    images: dict[float | BudgetSchedule, np.ndarray] = {}
    latents: dict[float | BudgetSchedule, Tensor] = {}
    drawn: dict[float | BudgetSchedule, Drawn] = {}
    with torch.inference_mode():
        for column in tqdm([*columns, 1.0] if 1.0 not in columns else columns, desc="sample", unit="budget"):
            g = requested._replace(inference_budget=column)
            sampled = loaded.fresh()
            latents[column], images[column] = session.sample_examples(sampled, config, g)
            drawn[column] = sampled.drawn
        results = measure(config, loaded, requested, columns)
        if config.core_cache:
            for entry, column in zip(results, columns, strict=True):
                entry["gflops_per_step"] = cost.drawn_flops_per_step(loaded, drawn[column]) / 1e9
                entry["core_share"] = drawn[column].share
        for entry, column in zip(results, columns, strict=True):
            entry["psnr"] = psnr(images[column], images[1.0])
        labels = loaded.conditions.names(config)
        grid = np.stack([images[column] for column in columns], axis=1)  # (labels, budgets, H, W, 3)
        labelled_grid(grid, labels, [_heading(e) for e in results], folder / "image_grid.png",
                      inches=min(max(sides(config.resolution)[1] / 160, 1.0), 1.6), fontsize=8)  # fmt: skip
        plot(config, requested, results, columns, folder, session.device_name(latents[1.0].device))
        if config.attention:
            show_attention(config, loaded, latents[1.0], images[1.0], labels, folder)
    files.write_json(results, folder / "results.json")
    for entry in results:
        print(
            f"budget {_name(entry)}: {entry['gflops_per_forward']:.4g} GFLOPs per forward, {entry['gflops_per_step']:.4g} per step, "
            f"{entry['latency_ms']:.4g} ms, PSNR {'–' if entry['psnr'] is None else format(entry['psnr'], '.4g')} dB"
        )
    print(f"{folder}: image_grid.png, plots and results.json")
    return results


def measure(
    config: MultibudgetConfig, loaded: Session, requested: Guidance, columns: Sequence[float | BudgetSchedule]
) -> list[dict[str, Any]]:
    """FLOPs and latency of each column: the entries of results.json but for `psnr`."""
    runs = [cost.passes_of_run(config, requested._replace(inference_budget=column)) for column in columns]
    flops = cost.pass_flops(loaded.model, runs, loaded.guide)

    count = min(len(loaded.conditions.names(config)), config.per_proc_batch_size)
    noise, y = loaded.starting_noise(config.seed, range(count)), loaded.condition(range(count), loaded.device)
    with loaded.autocast():
        conditional = {passes[0] for run in runs for passes in run}
        jobs = {p: partial(loaded.flow.forward, loaded.model, noise, y, p.budget) for p in conditional}
        times = cost.interleaved_times(jobs, loaded.device)

    results = []
    for column, run in zip(columns, runs, strict=True):
        forward = sum(flops[passes[0]] for passes in run) / len(run)
        low, median, high = (sum(times[passes[0]][q] for passes in run) / len(run) for q in range(3))
        results.append(
            {
                "budget": str(column) if isinstance(column, BudgetSchedule) else column,
                "gflops_per_forward": forward / 1e9,
                "flops_per_forward": round(forward),
                "gflops_per_step": cost.flops_per_step(config, run, flops) / 1e9,
                "latency_ms": median,
                "latency_ms_quartiles": [low, high],
                "batch_size": count,
            }
        )
    return results


def plot(
    config: MultibudgetConfig,
    requested: Guidance,
    results: Sequence[dict],
    columns: Sequence[float | BudgetSchedule],
    folder: Path,
    machine: str,
) -> None:
    """The plots of budget against FLOPs, latency and PSNR; a schedule is a point of its own, at its mean budget."""
    fixed = [entry for entry in results if not isinstance(entry["budget"], str)]
    budgets = [entry["budget"] for entry in fixed]
    scheduled = [(e, c) for e, c in zip(results, columns, strict=True) if isinstance(c, BudgetSchedule)]

    def points(key: str) -> dict[str, tuple[float, float]]:
        means = {}
        for entry, column in scheduled:
            run = cost.passes_of_run(config, requested._replace(inference_budget=column))
            if entry[key] is not None:
                mean = sum(passes[0].budget or 1.0 for passes in run) / len(run)
                means[f"schedule {column} (mean)"] = (mean, entry[key])
        return means

    line_plot(
        folder / "budget_vs_flops.png",
        budgets,
        [e["gflops_per_forward"] for e in fixed],
        points=points("gflops_per_forward"),
        labels=("inference budget", "GFLOPs per forward of one image", config.model),
    )
    line_plot(
        folder / "budget_vs_latency.png",
        budgets,
        [e["latency_ms"] for e in fixed],
        spread=("quartiles", [e["latency_ms_quartiles"][0] for e in fixed], [e["latency_ms_quartiles"][1] for e in fixed]),
        points=points("latency_ms"),
        labels=(
            "inference budget",
            "median latency of a forward [ms]",
            f"{config.model}, batch of {results[0]['batch_size']}, {machine}",
        ),
    )
    other = [e for e in fixed if e["psnr"] is not None]
    line_plot(
        folder / "budget_vs_psnr.png",
        [e["budget"] for e in other],
        [e["psnr"] for e in other],
        points=points("psnr"),
        labels=("inference budget", "PSNR against the full budget [dB]", config.model),
        from_zero=False,
    )


def show_attention(
    config: MultibudgetConfig, loaded: Session, latents: Tensor, images: np.ndarray, labels: Sequence[str], folder: Path
) -> None:
    """What each latent reads from the model's own images at time t = --attention-time; see `sampling.attention.read_maps`.

    The total is the mean over all latents.
    """
    maps, windows, entropies = read_maps(loaded, latents, config.seed, config.attention_time, config.per_proc_batch_size)
    entropy = entropies.tolist()
    J = len(entropy)
    chosen = shown_latents(J)
    attention_maps(
        images,
        torch.cat([maps[:, chosen], maps.mean(dim=1, keepdim=True)], dim=1).cpu().numpy(),
        torch.cat([windows[chosen], windows.mean(dim=0, keepdim=True)]).cpu().numpy(),
        labels,
        [*(f"latent {j}" for j in chosen), "total"],
        folder / "attention_maps.png",
    )
    line_plot(
        folder / "attention_entropy.png",
        range(J),
        entropy,
        labels=("latent index", "mean attention entropy [nats]", f"{config.model}, Read at t = {config.attention_time:g}"),
        level=("uniform attention", math.log(J)),
    )
    told = {"attention_entropy": entropy, "uniform_entropy": math.log(J), "time": config.attention_time}
    told["loss_correlation"] = show_losses(config, loaded, latents, images, labels, folder)
    files.write_json(told | loaded.conditions.told(config), folder / "attention.json")


def show_losses(
    config: MultibudgetConfig, loaded: Session, latents: Tensor, images: np.ndarray, labels: Sequence[str], folder: Path
) -> dict[str, Any]:
    """What all latents read together, beside the loss of each patch: a row of pictures for each image, and Spearman's correlation.

    At time --attention-time and the full budget; both are means over `LOSS_DRAWS` draws of noise. Each map is drawn from its
    lowest to its highest value.
    """
    model: Any = loaded.model
    parts = []
    for first in range(0, len(latents), config.per_proc_batch_size):
        x = latents[first : first + config.per_proc_batch_size]
        indices = range(first, first + len(x))
        t, y = torch.full((len(x),), config.attention_time, device=x.device), loaded.condition(indices, x.device)

        def of_draw(n: int, x: Tensor = x, indices: range = indices, t: Tensor = t, y: Any = y) -> Patches:
            noise = loaded.starting_noise(config.seed + 1 + n, indices)  # not the one that the image was drawn from
            with loaded.autocast():
                return patches_of(model, loaded.flow, x, noise, t, y)

        parts.append(mean_patches(LOSS_DRAWS, of_draw))
    losses, attention = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    maps = [  # (B, rows, columns)
        model.interface.ungroup(values[..., None]).flatten(1).unflatten(1, model.interface.grid_size).float().cpu().numpy()
        for values in (attention.mean(dim=2), losses)
    ]
    correlations = rank_correlations(*(values.reshape(len(values), -1) for values in maps))
    mean, error = mean_and_error(correlations)
    side = images.shape[1:3]
    columns = np.stack([images, *(np.stack([heat_map(v, side) for v in values]) for values in maps)], axis=1)
    rows = [f"{label}\nρ {_decimals(value)}" for label, value in zip(labels, correlations, strict=True)]
    heads = ["image", "attention of\nall latents", "flow-matching\nloss"]
    labelled_grid(columns, rows, heads, folder / "attention_loss.png", inches=1.25)
    print(
        f"Spearman's correlation of attention with loss at t = {config.attention_time:g} over {maps[0][0].size} patches: "
        f"{_decimals(mean)} ± {_decimals(error)} (standard error over {len(correlations)} images)"
    )
    return {"mean": mean, "standard_error": error, "images": correlations, "draws": LOSS_DRAWS}


def _decimals(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _name(entry: dict) -> str:
    return entry["budget"] if isinstance(entry["budget"], str) else f"{entry['budget']:g}"


def _heading(entry: dict) -> str:
    name = f"budget {_name(entry)}"
    if isinstance(entry["budget"], str):  # a schedule: a line for each piece, no wider than an image
        name = ",\n".join(f"{b:g}@{start:g}-{end:g}" for b, start, end in BudgetSchedule.parse(entry["budget"]).pieces)
    return f"{name}\n{entry['gflops_per_forward']:.3g} GFLOPs\n{entry['latency_ms']:.3g} ms"


if __name__ == "__main__":
    main()
