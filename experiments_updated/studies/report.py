"""The report of a study: STUDY.json, STUDY.md and pictures, from the models that its script trained.

Differences are paired: the same canvases, times and noise. `a ± b` of two seeds: their mean, and the standard error of it over
canvases; both seeds' own values stand in the JSON.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from anywhere


from common.errors import UserError, cli_main
from common.files import make_folder, write_json
from common.plotting import Curve, curves_plot
from common.tables import markdown_table
from config.parsing import parse, require_options
from experiments_updated.quickstart_report import name_of_budget
from experiments_updated.studies.study import Run, StudyConfig
from samplers import BudgetSchedule
from training.budgets import trained_budgets

BUDGETS = (0.0625, 0.25, 1.0)
SCHEDULE = "0.5@1.0-0.5,1.0@0.5-0.0"
TIMES = (0.2, 0.5, 0.8)
LEFT_OUT = 0.1  # of the steps, in pictures of the training loss


@dataclass
class Study:
    """The models of a study, each with its seeds, and where its results go."""

    config: StudyConfig
    models: dict[str, list[Run]]

    @property
    def baseline(self) -> list[Run]:
        """The first model."""
        return next(iter(self.models.values()))

    def path(self, ending: str) -> Path:
        """A file of the results: STUDY followed by `ending`."""
        return Path(self.config.output_dir) / f"{self.config.study}{ending}"

    def write(self, results: Any, *tables: str) -> None:
        """STUDY.json, and the tables as STUDY.md and on the screen."""
        write_json(results, self.path(".json"))
        text = "\n\n".join(tables)
        self.path(".md").write_text(text + "\n")
        print(text)


@cli_main
def main(argv: list[str] | None = None) -> None:
    """The command: options → the study's report."""
    config, _ = parse(StudyConfig, argv, prog="report.py")
    require_options(config, "study", "runs", "models", "val_data_dir")
    if config.study not in STUDIES:
        raise UserError(f"--study {config.study}: unknown; choose from {', '.join(STUDIES)}")
    make_folder(Path(config.output_dir), "--output-dir")
    runs = {name: _runs(name, config) for name in config.models}
    STUDIES[config.study](Study(config, runs))


def _runs(name: str, config: StudyConfig) -> list[Run]:
    if (Path(config.runs) / name).is_dir():
        return [Run(name, None, config)]
    seeds = [path.name.removeprefix(f"{name}-") for path in Path(config.runs).glob(f"{name}-*") if path.is_dir()]
    seeds = sorted(int(seed) for seed in seeds if seed.isdecimal())
    if not seeds:
        raise UserError(f"--models {name}: no such model in {config.runs}; run the study's script")
    return [Run(name, seed, config) for seed in seeds]


def compare(study: Study) -> None:
    """Models by held-out loss, FID and cost, and the loss in training over steps and FLOPs."""
    results = [_compared(runs, study.baseline) for runs in study.models.values()]
    study.write(results, _comparison(results, study.baseline[0].name))
    _training_curves(study)


def _compared(runs: list[Run], baseline: list[Run]) -> dict[str, Any]:
    """Figures of one model; lists: of each seed."""
    first = runs[0]
    budgets = _budgets(first)
    result: dict[str, Any] = {"model": first.name, "seeds": [run.seed for run in runs], "step": first.steps[-1]}
    result["training_tflops"] = first.training_tflops()
    result["gflops"] = {_budget_name(b): first.flops(b) / 1e9 for b in budgets}
    losses = [run.losses(budgets)[0].mean(axis=0) for run in runs]  # (budgets, canvases) each
    result["held_out_loss"] = {_budget_name(b): [float(x[i].mean()) for x in losses] for i, b in enumerate(budgets)}
    samples = [[run.samples(**_sampling(b)) for run in runs] for b in (budgets[0], budgets[-1])]
    result["fid"] = {
        _budget_name(b): [float(s["fid"]) for s in x] for b, x in zip((budgets[0], budgets[-1]), samples, strict=True)
    }
    result["digits_in_class"] = [float(s["digits_in_class"]) for s in samples[-1]]
    if first.name != baseline[0].name and not first.is_spread:
        own = {run.seed: x[-1] for run, x in zip(runs, losses, strict=True)}
        theirs = {run.seed: run.losses(_budgets(run))[0].mean(axis=0)[-1] for run in baseline if run.seed in own}
        result["difference"] = _paired([own[seed] - theirs[seed] for seed in theirs])
    if len(budgets) > 1:
        result["gain"] = {_budget_name(b): _paired([x[i] - x[-1] for x in losses]) for i, b in enumerate(budgets[:-1])}
    return result


def _budgets(run: Run) -> list[float | None]:
    """At which a model is measured: of those that it is trained at, the largest last."""
    trained = trained_budgets(run.training)
    if run.training.elit_budget_schedule is not None:
        return [*BUDGETS]
    return [b for b in BUDGETS if b in trained] or [None]


def _sampling(budget: float | None) -> dict[str, Any]:
    return {} if budget is None else {"inference_budget": str(budget)}


def _budget_name(budget: float | None) -> str:
    return "" if budget is None else name_of_budget(budget)


def _paired(differences: Sequence[np.ndarray]) -> dict[str, Any]:
    """Mean and standard error of differences (canvases,) of each seed, whose draws are the same."""
    mean = np.mean(differences, axis=0)
    error = float(mean.std(ddof=1) / len(mean) ** 0.5)
    return {"mean": float(mean.mean()), "standard_error": error, "seeds": [float(d.mean()) for d in differences]}


def _shown(paired: dict[str, Any] | None, digits: int = 4) -> str:
    if paired is None:
        return ""
    seeds = f" ({', '.join(f'{v:+.{digits}f}' for v in paired['seeds'])})" if len(paired["seeds"]) > 1 else ""
    return f"{paired['mean']:+.{digits}f} ± {paired['standard_error']:.{digits}f}{seeds}"


def _both(values: Sequence[float], digits: int) -> str:
    """The seeds' values."""
    return " / ".join(f"{v:.{digits}f}" for v in values)


def _comparison(results: Sequence[dict[str, Any]], baseline: str) -> str:
    head = ["model", "TFLOPs trained", "budget", "GFLOPs / forward", "held-out loss (seeds)", "− largest budget"]
    head += [f"− {baseline}", "FID (seeds)", "digits in class"]
    lines = []
    for r in results:
        names = list(r["gflops"])
        for name in reversed(names):
            is_last = name == names[-1]
            figures = [f"{r['training_tflops']:.1f}" if is_last else "", name, f"{r['gflops'][name]:.3f}"]
            figures += [_both(r["held_out_loss"][name], 4), _shown(r.get("gain", {}).get(name))]
            figures += [_shown(r.get("difference")) if is_last else "", _both(r["fid"].get(name, []), 1)]
            lines.append([r["model"] if is_last else "", *figures, _both(r["digits_in_class"], 3) if is_last else ""])
    return markdown_table(head, lines)


def _curve(study: Study, name: str, x: Sequence[float], of_seeds: Sequence[Sequence[float]]) -> Curve:
    """The mean of the seeds at each x, with bars from the lowest to the highest where there are several."""
    half = [float(np.ptp(values) / 2) if len(values) > 1 else None for values in of_seeds]
    return Curve(name, x, [float(np.mean(values)) for values in of_seeds], half, name == study.baseline[0].name)


def _title(study: Study) -> str:
    """What bars are, where there are any."""
    return "seeds: mean and range" if any(len(runs) > 1 for runs in study.models.values()) else ""


def _training_curves(study: Study) -> None:
    """STUDY_steps.png and STUDY_flops.png: the training loss after the first steps, whose draws all models share.

    The first steps would fill the axis, and the models look alike.
    """
    by_step, by_flops = [], []
    for name, runs in study.models.items():
        logs = [run.training_loss() for run in runs]
        steps = [step for step in logs[0] if step > LEFT_OUT * max(logs[0]) and all(step in log for log in logs)]
        curve = _curve(study, name, steps, [[log[step] for log in logs] for step in steps])
        by_step.append(curve)
        by_flops.append(curve._replace(x=[runs[0].training_tflops(step) for step in steps]))
    for curves, axis, ending in ((by_step, "step", "steps"), (by_flops, "training TFLOPs", "flops")):
        curves_plot(study.path(f"_{ending}.png"), curves, labels=(axis, "training loss", _title(study)))


def convergence(study: Study) -> None:
    """Held-out loss and FID at the largest budget, at each checkpoint, against steps and training FLOPs."""
    results = []
    for name, runs in study.models.items():
        for step in runs[0].steps:
            losses, theirs = ([_held_out(run, step) for run in of] for of in (runs, study.baseline))
            samples = [run.samples(step, **_sampling(_budgets(run)[-1])) for run in runs]
            result = {"model": name, "step": step, "training_tflops": runs[0].training_tflops(step)}
            result |= {"held_out_loss": [float(x.mean()) for x in losses], "fid": [float(s["fid"]) for s in samples]}
            result["difference"] = _paired([a - b for a, b in zip(losses, theirs, strict=True)])
            results.append(result)
    head = ["step", "model", "TFLOPs trained", "held-out loss (seeds)", f"− {study.baseline[0].name}", "FID (seeds)"]
    lines = []
    for r in sorted(results, key=lambda r: r["step"]):
        figures = [f"{r['training_tflops']:.1f}", _both(r["held_out_loss"], 4), _shown(r["difference"]), _both(r["fid"], 1)]
        lines.append([f"{r['step']:,}", r["model"], *figures])
    study.write(results, markdown_table(head, lines))
    _convergence_plots(study, results)


def _convergence_plots(study: Study, results: list[dict[str, Any]]) -> None:
    """STUDY_loss_steps.png and so on."""
    for over, axis, ending in (("step", "step", "steps"), ("training_tflops", "training TFLOPs", "flops")):
        for figure, label, start in (("held_out_loss", "held-out loss", "loss"), ("fid", "FID", "fid")):
            curves = []
            for name in study.models:
                own = [r for r in results if r["model"] == name]
                curves.append(_curve(study, name, [r[over] for r in own], [r[figure] for r in own]))
            curves_plot(study.path(f"_{start}_{ending}.png"), curves, labels=(axis, label, _title(study)))


def _held_out(run: Run, step: int) -> np.ndarray:
    """Held-out losses (canvases,) at the largest budget after `step` steps."""
    return run.losses(_budgets(run)[-1:], step)[0].mean(axis=0)[0]


def order(study: Study) -> None:
    """The loss of the first, the last and random k latents above that of all, over k."""
    runs, kept = study.baseline, (1, 4, 8)
    J = runs[0].training.elit_group_size ** 2
    orders: dict[str, list[list[int]]] = {"first": [list(range(J))], "last": [list(range(J))[::-1]]}
    orders["random"] = [np.random.default_rng(i).permutation(J).tolist() for i in range(2)]
    budgets = [k / J for k in kept]
    whole = [run.losses([1.0])[0].mean(axis=0)[0] for run in runs]  # in any order
    results, curves = [], []
    for name, several in orders.items():
        losses = [
            np.mean([run.losses(budgets, order=own)[0].mean(axis=0) for own in several], axis=0) for run in runs
        ]  # (budgets, canvases) of each seed
        above = [_paired([x[i] - own for x, own in zip(losses, whole, strict=True)]) for i in range(len(kept))]
        results.append({"latents": name, "kept": kept, "loss_above_all": above})
        curves.append(Curve(name, kept, [a["mean"] for a in above], [a["standard_error"] for a in above]))
    lines = [[r["latents"], *map(_shown, r["loss_above_all"])] for r in results]
    study.write(results, markdown_table([f"held-out loss above that of all {J}", *(f"k = {k}" for k in kept)], lines))
    curves_plot(study.path(".png"), curves, labels=("k latents kept per group", f"held-out loss above all {J}", ""))


def schedule(study: Study) -> None:
    """Models at all latents and at half of them while t > 0.5: loss, FID and cost."""
    results = []
    for name, runs in study.models.items():
        for budget in ("1.0", SCHEDULE):
            losses = [_scheduled(run, BudgetSchedule.parse(budget if "@" in budget else "1.0@1.0-0.0")) for run in runs]
            theirs = [_scheduled(run, BudgetSchedule.parse("1.0@1.0-0.0")) for run in study.baseline[: len(runs)]]
            samples = [run.samples(inference_budget=budget) for run in runs]
            result = {"model": name, "training_tflops": runs[0].training_tflops()}
            result |= {"sampled_at": budget, "gflops_per_image": float(samples[0]["gflops"])}
            result |= {"held_out_loss": [float(x.mean()) for x in losses], "fid": [float(s["fid"]) for s in samples]}
            result["difference"] = _paired([a - b for a, b in zip(losses, theirs, strict=True)])
            result["digits_in_class"] = [float(s["digits_in_class"]) for s in samples]
            results.append(result)
    head = ["model", "TFLOPs trained", "budget at sampling", "GFLOPs / image", "held-out loss (seeds)"]
    head += [f"− {study.baseline[0].name} at 1", "FID (seeds)", "digits in class"]
    lines = []
    for r in results:
        figures = [f"{r['training_tflops']:.1f}", r["sampled_at"], f"{r['gflops_per_image']:.1f}", _both(r["held_out_loss"], 4)]
        lines.append([r["model"], *figures, _shown(r["difference"]), _both(r["fid"], 1), _both(r["digits_in_class"], 3)])
    study.write(results, markdown_table(head, lines))


def _scheduled(run: Run, budgets: BudgetSchedule) -> np.ndarray:
    """Held-out losses (canvases,), each draw at the budget of its time."""
    values = sorted({budget for budget, *_ in budgets.pieces})
    losses, times = run.losses(values)
    place = np.vectorize(lambda t: values.index(budgets.at(t)))(times)  # (draws, canvases)
    return np.take_along_axis(losses, place[:, None], axis=1)[:, 0].mean(axis=0)


def difficulty(study: Study) -> None:
    """The correlation, inside each group, of a patch's share of Read's attention with its loss.

    "beyond place": of all latents, after the mean of each place in the group is taken off both.
    """
    results = []
    for name, runs in study.models.items():
        for t in TIMES:
            of_seeds = [run.patches(t) for run in runs]
            row: dict[str, Any] = {"model": name, "time": t}
            for which, latents in (("all latents", slice(None)), ("first latent", slice(1))):
                found = [_correlations(p["attention"][:, :, latents].mean(axis=2), p["losses"]) for p in of_seeds]
                row[which] = _paired(found)
            row["beyond place"] = _paired(
                [_correlations(*map(_beyond_place, (p["attention"].mean(axis=2), p["losses"]))) for p in of_seeds]
            )
            results.append(row)
    kinds = ("all latents", "first latent", "beyond place")
    head = ["model", "t", *kinds]
    lines = [[r["model"], f"{r['time']:g}", *(_shown(r[kind], 3) for kind in kinds)] for r in results]
    study.write(results, markdown_table(head, lines))


def _correlations(attention: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Of (canvases, G, J) each: Pearson's correlation over the patches of a group, the mean over groups (canvases,)."""
    a, b = (x - x.mean(axis=2, keepdims=True) for x in (attention, losses))
    return ((a * b).mean(axis=2) / (a.std(axis=2) * b.std(axis=2) + 1e-12)).mean(axis=1)


def _beyond_place(x: np.ndarray) -> np.ndarray:
    """(canvases, G, J) less the mean of each place in a group."""
    return x - x.mean(axis=(0, 1), keepdims=True)


def compute(study: Study) -> None:
    """Loss and FID against FLOPs on plain and on spread canvases, and how much Read attends to real patches."""
    results = []
    for name, runs in study.models.items():
        result = _compared(runs, study.baseline)
        if name.startswith("elit") and runs[0].is_spread:
            attention = runs[0].patches(0.5)["attention"]  # of J patches in a group, a quarter is real
            side = int(attention.shape[-1] ** 0.5)
            real = attention.mean(axis=(0, 1, 2)).reshape(side, side)[::2, ::2]
            result["attention_to_real_patches"] = float(real.sum())
        results.append(result)
    study.write(results, _comparison(results, study.baseline[0].name))
    _compute_plot(study, results)


def _compute_plot(study: Study, results: Sequence[dict[str, Any]]) -> None:
    """STUDY.png: a point for each model at its largest budget."""
    points = {r["model"]: (list(r["gflops"].values())[-1], list(r["fid"].values())[-1]) for r in results}
    curves = [_curve(study, name, [x], [of_seeds]) for name, (x, of_seeds) in points.items()]
    curves_plot(study.path(".png"), curves, labels=("GFLOPs / forward", "FID", _title(study)))


STUDIES: dict[str, Callable[[Study], None]] = {
    "convergence": convergence,
    "joint": compare,
    "order": order,
    "split": compare,
    "start": compare,
    "schedule": schedule,
    "difficulty": difficulty,
    "compute": compute,
}


if __name__ == "__main__":
    main()
