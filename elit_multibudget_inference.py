"""One checkpoint at every budget: the same images, what they cost, how long they take and how far they are from full compute.

`python elit_multibudget_inference.py --ckpt … --class-label 207 88 --output-dir …` writes

- `image_grid.png`: a row for each label, a column for each budget, the same noise in a row;
- `budget_vs_flops.png`, `budget_vs_latency.png`, `budget_vs_psnr.png`, and `results.json`: an entry for each budget,
  - `gflops_per_forward`, `flops_per_forward`: one image through the model once, without guidance;
  - `gflops_per_step`: one image, mean over the sampler's steps, guiding passes counted;
  - `latency_ms`, `latency_ms_quartiles`: median and quartiles of the wall time of one forward of the model, without guidance,
    on a batch of `batch_size` images (all labels, at most --per-proc-batch-size), after warm-up;
  - `psnr`: dB against the full budget's images, over all their pixels; null for equal images.

An --inference-budget that is a schedule is one more column; its entries are means over the steps, and its `budget` is the text.
With --attention also `attention_maps.png`, `attention_entropy.png` and `attention.json`: what each latent reads.
"""

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint.weights import Weights
from common import files
from common.errors import cli_main
from common.plotting import attention_maps, labelled_grid, line_plot
from config.options import MultibudgetConfig
from loss import interpolate
from models.dfm import decompose
from samplers import BudgetSchedule, Guidance
from sampling import checks, cost, session


@cli_main
def main(argv: list[str] | None = None) -> None:
    config, _, found = session.from_command_line(MultibudgetConfig, argv, "elit_multibudget_inference.py")
    check(config)
    compare(config, found)


def check(config: MultibudgetConfig) -> None:
    """Refuse what cannot be sampled, before anything is loaded or written; fill in the budgets."""
    checks.check_elit(config)
    checks.check_labels(config, "--class-label", config.class_label)
    if config.budgets is None:
        config.budgets = checks.all_budgets(config.elit_group_size**2)
    for budget in config.budgets:
        checks.check_budget(config, "--budgets", budget)
    checks.check_budget(config, "--inference-budget", config.inference_budget)
    checks.check_budget(config, "--unconditional-inference-budget", config.unconditional_inference_budget)
    session.guidance(config).check()
    checks.check_sampler(config)
    checks.check_folder("--output-dir", config.output_dir)


def compare(config: MultibudgetConfig, found: Weights) -> list[dict]:
    """Sample at every budget, measure, and write all files; returns the entries of results.json."""
    model, vae, shape, folder = session.setup_tool(config, found, _warn)

    asked = session.guidance(config)
    columns: list[float | BudgetSchedule] = sorted(set(config.budgets))
    if isinstance(asked.inference_budget, BudgetSchedule):
        columns.append(asked.inference_budget)
    elif asked.inference_budget is not None:
        columns = sorted({*columns, asked.inference_budget})
    # The full budget is sampled in any case: it is what the others are compared with.
    images: dict[float | BudgetSchedule, np.ndarray] = {}
    latents: dict[float | BudgetSchedule, Tensor] = {}
    with torch.inference_mode():
        for column in tqdm([*columns, 1.0] if 1.0 not in columns else columns, desc="sample", unit="budget"):
            g = asked._replace(inference_budget=column)
            latents[column], images[column] = session.sample_all(config, g, model, vae, shape)
        results = measure(config, model, asked, columns, shape)
        for entry, column in zip(results, columns, strict=True):
            entry["psnr"] = psnr(images[column], images[1.0])
        labels = [f"class {label}" for label in config.class_label]
        grid = np.stack([images[column] for column in columns], axis=1)  # (labels, budgets, H, W, 3)
        labelled_grid(grid, labels, [_heading(e) for e in results], folder / "image_grid.png",
                      inches=min(max(config.resolution / 160, 1.0), 1.6), fontsize=8)  # fmt: skip
        plot(config, asked, results, columns, folder, session.device_name(latents[1.0].device))
        if config.attention:
            show_attention(config, model, latents[1.0], images[1.0], labels, folder)
    files.write_json(results, folder / "results.json")
    for entry in results:
        print(
            f"budget {_name(entry)}: {entry['gflops_per_forward']:.4g} GFLOPs per forward, {entry['gflops_per_step']:.4g} per step, "
            f"{entry['latency_ms']:.4g} ms, PSNR {'–' if entry['psnr'] is None else format(entry['psnr'], '.4g')} dB"
        )
    print(f"{folder}: image_grid.png, plots and results.json")
    return results


def measure(
    config: MultibudgetConfig,
    model: nn.Module,
    asked: Guidance,
    columns: Sequence[float | BudgetSchedule],
    shape: Sequence[int],
) -> list[dict]:
    """FLOPs and latency of each column: the entries of results.json but for `psnr`."""
    device = next(model.parameters()).device
    runs = [cost.passes_of_run(config, asked._replace(inference_budget=column)) for column in columns]
    flops = cost.pass_flops(model, runs)

    count = min(len(config.class_label), config.per_proc_batch_size)
    noise = session.starting_noise(model, shape, config.seed, range(count))
    y = torch.tensor(config.class_label[:count], device=device)
    with session.autocast(config, device):
        budgets = {passes[0] for run in runs for passes in run}
        jobs = {b: partial(cost.one_forward, model, noise, y, b) for b in budgets}
        times = cost.interleaved_times(jobs, device)

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


def psnr(images: np.ndarray, reference: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio in dB of uint8 images against others, over all pixels; `None` where they are equal."""
    error = np.mean((images.astype(np.float64) - reference) ** 2)
    return None if error == 0 else 10 * math.log10(255**2 / error)


def plot(
    config: MultibudgetConfig,
    asked: Guidance,
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
        found = {}
        for entry, column in scheduled:
            run = cost.passes_of_run(config, asked._replace(inference_budget=column))
            if entry[key] is not None:
                found[f"schedule {column} (mean)"] = (sum(passes[0] for passes in run) / len(run), entry[key])
        return found

    line_plot(
        folder / "budget_vs_flops.png",
        budgets,
        [e["gflops_per_forward"] for e in fixed],
        points=points("gflops_per_forward"),
        xlabel="inference budget",
        ylabel="GFLOPs per forward of one image",
        title=config.model,
    )
    line_plot(
        folder / "budget_vs_latency.png",
        budgets,
        [e["latency_ms"] for e in fixed],
        spread=tuple([e["latency_ms_quartiles"][side] for e in fixed] for side in (0, 1)),
        spread_label="quartiles",
        points=points("latency_ms"),
        xlabel="inference budget",
        ylabel="median latency of a forward [ms]",
        title=f"{config.model}, batch of {results[0]['batch_size']}, {machine}",
    )
    other = [e for e in fixed if e["psnr"] is not None]
    line_plot(
        folder / "budget_vs_psnr.png",
        [e["budget"] for e in other],
        [e["psnr"] for e in other],
        points=points("psnr"),
        xlabel="inference budget",
        ylabel="PSNR against the full budget [dB]",
        title=config.model,
        from_zero=False,
    )


def show_attention(
    config: MultibudgetConfig, model: nn.Module, latents: Tensor, images: np.ndarray, labels: Sequence[str], folder: Path
) -> None:
    """What each latent reads from the model's own images, noised again to time t = --attention-time with their first noise.

    Read's last layer, at the full budget. The maps show the heads' mean; each latent's map is made of those of all groups,
    and the total is the mean over all latents. The entropy is that of each head's attention, mean over heads, groups and images.
    """
    dtype = next(model.parameters()).dtype
    means, entropies = [], []
    for first in range(0, len(latents), config.per_proc_batch_size):
        x = latents[first : first + config.per_proc_batch_size]
        noise = session.starting_noise(model, x.shape[1:], config.seed, range(first, first + len(x)))
        y = torch.tensor(config.class_label[first : first + len(x)], device=x.device)
        t = torch.full((len(x),), config.attention_time, device=x.device)
        if isinstance(noise, list):  # DFM: every stage at that time
            state = [
                interpolate(*pair, t, config.path_type)[0].to(dtype)
                for pair in zip(decompose(x, len(noise)), noise, strict=True)
            ]
            t = t[:, None].expand(-1, len(noise))
        else:
            state = interpolate(x, noise, t, config.path_type)[0].to(dtype)
        weights = model.read_attention(state, t, y)
        means.append(weights.mean(dim=2))  # (B, G, J latents, J tokens)
        entropies.append(torch.special.entr(weights).sum(dim=-1).mean(dim=(1, 2)))  # (B, J)
    mean, entropy = torch.cat(means), torch.cat(entropies).mean(dim=0).tolist()

    J = len(entropy)
    chosen = sorted({*range(min(3, J)), *range(max(J - 3, 0), J)})
    over_tokens = model.interface.ungroup(mean.transpose(2, 3))  # (B, N tokens, J latents), row-major
    maps = J * over_tokens.transpose(1, 2).unflatten(2, model.interface.grid_size)  # (B, J, h, w); 1: uniform attention
    windows = J * mean.mean(dim=(0, 1)).unflatten(1, (model.interface.group_size,) * 2)  # (J, g, g)
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
        xlabel="latent index",
        ylabel="mean attention entropy [nats]",
        title=f"{config.model}, Read at t = {config.attention_time:g}",
        level=("uniform attention", math.log(J)),
    )
    files.write_json(
        {"attention_entropy": entropy, "uniform_entropy": math.log(J), "time": config.attention_time, "class_label": config.class_label},
        folder / "attention.json",
    )  # fmt: skip


def _name(entry: dict) -> str:
    return entry["budget"] if isinstance(entry["budget"], str) else f"{entry['budget']:g}"


def _heading(entry: dict) -> str:
    name = f"budget {_name(entry)}"
    if isinstance(entry["budget"], str):  # a schedule: a line for each piece, no wider than an image
        name = ",\n".join(f"{b:g}@{start:g}-{end:g}" for b, start, end in BudgetSchedule.parse(entry["budget"]).pieces)
    return f"{name}\n{entry['gflops_per_forward']:.3g} GFLOPs\n{entry['latency_ms']:.3g} ms"


def _warn(message: str) -> None:
    print(f"elit_multibudget_inference.py: warning: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
