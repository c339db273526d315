"""Plots of a sweep: quality against compute (a line per budget), guidance and steps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.plotting import Curve, curves_plot
from metrics.evaluation import HIGHER_IS_BETTER, NAMES
from sweeping.axes import OF_GUIDANCE, shown
from sweeping.results import Point, best, grouped, is_guided, main_metric, varying_names

MOST_CURVES = 8  # of a plot of guidance: those with the best points

Of = Callable[[Point], float]


def write_plots(points: Sequence[Point], dest: Path) -> list[Path]:
    """`fid_vs_gflops.png`, `fid_vs_cfg.png`, `fid_vs_steps.png`, each where its axis has several values. Returns their paths.

    Lines are of the number of images that most points have; points of others are stars.
    """
    metric = main_metric(points[0].figures)
    points = [point for point in points if metric in point.figures]
    sizes = grouped(points, ["count"])
    usual = max(sizes.values(), key=len)
    others = {f"{group[0].count:,} images": group for group in sizes.values() if group is not usual}
    title = f"{usual[0].count:,} images a point"
    written = []
    plots: dict[str, tuple[str, Of, Callable]] = {
        "gflops": ("GFLOPs per image", lambda point: point.gflops, _by_budget),
        "cfg": ("guidance scale", lambda point: point.values["cfg_scale"], _by_guidance),
        "steps": ("sampling steps", lambda point: steps_of(point.values), _by_budget),
    }
    for name, (label, x_of, group) in plots.items():
        if len({x_of(point) for point in usual}) < 2:
            continue
        curves = group(usual, metric, x_of)
        front = pareto_front(usual, metric) if name == "gflops" else ()
        stars = {count: [(x_of(p), p.figures[metric].mean) for p in stars] for count, stars in others.items()}
        written.append(dest / f"{metric}_vs_{name}.png")
        curves_plot(written[-1], curves, labels=(label, NAMES[metric], title), front=front, stars=stars)
    return written


def steps_of(values: dict[str, Any]) -> int:
    """The sampler's steps, over all stages of DFM."""
    return sum(values["num_steps_per_scale"]) if "num_steps_per_scale" in values else values["num_steps"]


def pareto_front(points: Sequence[Point], metric: str) -> list[tuple[float, float]]:
    """(GFLOPs, figure) of the points that no other beats in both, the cheapest first."""
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.gflops, sign * p.figures[metric].mean)):
        if not front or sign * point.figures[metric].mean < sign * front[-1].figures[metric].mean:
            front.append(point)
    return [(point.gflops, point.figures[metric].mean) for point in front]


def _by_budget(points: Sequence[Point], metric: str, x_of: Of) -> list[Curve]:
    """A line per checkpoint and budget, over the steps, at the best of all else; that of the full budget is the reference."""
    names = [name for name in varying_names(points) if name in ("name", "ref", "weights")]
    several = len(grouped(points, ["inference_budget"])) > 1
    curves = []
    for key, group in sorted(grouped(points, [*names, "inference_budget"]).items()):
        chosen = [best(same, 1)[0] for same in grouped(group, ["num_steps", "num_steps_per_scale"]).values()]
        is_full = key[-1] == "none"
        label = "steps only (full budget)" if is_full and several else "full budget" if is_full else f"budget {key[-1]}"
        curves.append(_curve(", ".join([*key[:-1], label]), chosen, metric, x_of, is_reference=is_full and several))
    return curves


def _by_guidance(points: Sequence[Point], metric: str, x_of: Of) -> list[Curve]:
    """A line for each of the other options, over the scale; points without guidance belong to the lines of all its kinds."""
    names = [name for name in varying_names(points) if name != "cfg_scale"]
    rest = [name for name in names if name not in OF_GUIDANCE]
    plain = grouped([point for point in points if not is_guided(point.values)], rest)
    curves = []
    for key, group in grouped([point for point in points if is_guided(point.values)], names).items():
        start = plain.get(tuple(shown(group[0].values.get(name)) for name in rest), [])
        label = _label(dict(zip(names, key, strict=True)))
        curves.append((best(group)[0].figures[metric].mean, _curve(label, [*start, *group], metric, x_of)))
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    return [curve for _, curve in sorted(curves, key=lambda pair: sign * pair[0])[:MOST_CURVES]]


def _label(values: dict[str, str]) -> str:
    """A few options, as briefly as a legend wants them: `budget 0.25, steps 50, t 0.1–0.7`."""
    short = {"inference_budget": "budget", "num_steps": "steps", "unconditional_inference_budget": "guiding budget"}
    interval = [values[name] for name in ("guidance_low", "guidance_high") if name in values]
    parts = [
        f"{short.get(name, name)} {'full' if name == 'inference_budget' and value == 'none' else value}"
        for name, value in values.items()
        if name not in ("guidance_low", "guidance_high")
    ]
    if len(interval) == 2:
        parts.append(f"t {interval[0]}–{interval[1]}")
    elif interval:
        parts.append(f"t {'from' if 'guidance_low' in values else 'to'} {interval[0]}")
    return ", ".join(parts)


def _curve(label: str, points: Sequence[Point], metric: str, x_of: Of, is_reference: bool = False) -> Curve:
    points = sorted(points, key=x_of)
    figures = [point.figures[metric] for point in points]
    return Curve(
        label or "all", [x_of(p) for p in points], [f.mean for f in figures], [f.deviation for f in figures], is_reference
    )
