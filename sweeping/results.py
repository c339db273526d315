"""Tables of a sweep: a line for each cell (CSV), means over seeds and guidance side by side (Markdown), the best within a bound."""

import csv
import io
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from common.files import write_atomically
from common.tables import markdown_table
from config.options import GenerateConfig
from config.sweep_options import AXES
from metrics.evaluation import HIGHER_IS_BETTER, NAMES
from sweeping.axes import OF_GUIDANCE, shown
from sweeping.cells import Record

COLUMNS = ("global_seed", *AXES)


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds; without the latter where there is one seed."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.deviation is None else f"{self.mean:.4g} ± {self.deviation:.2g}"


@dataclass(frozen=True)
class Point:
    """Cells that differ in their seed alone.

    Attributes:
        values: options of sampling by name, those of the record; beside them `name` (the checkpoint's) and `ref`.
        figures: by metric.
        gflops: per image.
        ms: per image and process, of drawing alone.
        count: images of each cell.
        keys: of the cells.
        seeds: of the cells.
        ckpt: a checkpoint file.
        options: of the first cell.
    """

    values: dict[str, Any]
    figures: dict[str, Spread]
    gflops: float
    ms: float
    count: int
    keys: tuple[str, ...]
    seeds: tuple[int, ...]
    ckpt: str
    options: dict[str, Any]


def points_of(records: Iterable[Record]) -> list[Point]:
    """Group cells by all but the seed, in the order of their options."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        rest = {name: value for name, value in record["options"].items() if name != "global_seed"}
        groups.setdefault(str(sorted(rest.items())), []).append(record)
    return sorted((_point(group) for group in groups.values()), key=lambda point: _order(point.values))


def _order(values: dict[str, Any]) -> list[tuple]:
    """Numbers ascending, text after them, none last."""
    numbers = [(name, shown(values.get(name))) for name in ("ref", "name", *AXES)]
    return [
        (0, float(v), "") if re.fullmatch(r"\d+(\.\d+)?(e[+-]?\d+)?", v) else (1, 0.0, v) if v != "none" else (2, 0.0, v)
        for _, v in numbers
    ]


def _point(group: Sequence[Record]) -> Point:
    first = group[0]
    figures = {}
    for metric in first["figures"]:
        values = [record["figures"][metric] for record in group]
        figures[metric] = Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
    return Point(
        {"name": first["name"], "ref": Path(first["ref"]).name, "guide_ckpt": first.get("guide_ckpt")}
        | {k: v for k, v in first["options"].items() if k in AXES},
        figures,
        statistics.fmean(record["gflops_per_image"] for record in group),
        statistics.fmean(record["ms_per_image"] for record in group),
        first["num_samples"],
        tuple(record["key"] for record in group),
        tuple(record["options"]["global_seed"] for record in group),
        first["ckpt"],
        first["options"] | {"guide_ckpt": first.get("guide_ckpt")},
    )


def main_metric(figures: Iterable[str]) -> str:
    """By which cells are compared: FID, else the first."""
    figures = list(figures)
    return "fid" if "fid" in figures else figures[0]


def best(points: Iterable[Point], count: int = 1) -> list[Point]:
    """The best points by `main_metric`, best first."""
    points = [*points]
    metric = main_metric(points[0].figures)
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    return sorted((p for p in points if metric in p.figures), key=lambda p: sign * p.figures[metric].mean)[:count]


def is_guided(values: dict[str, Any]) -> bool:
    """Is the velocity guided?"""
    return values["cfg_scale"] > 1


# ------------------------------------------------------------------------------------------------------------- tables


def write_csv(records: Sequence[Record], path: Path) -> None:
    """One line a cell, a column an axis."""
    metrics = list(dict.fromkeys(metric for record in records for metric in record["figures"]))
    content = io.StringIO(newline="")
    writer = csv.writer(content, lineterminator="\n")
    measured = ("num_samples", "gflops_per_image", "ms_per_image")
    writer.writerow(["ckpt", "ckpt_step", "ref", *COLUMNS, *measured, *metrics, "cell"])
    for record in records:
        options, figures = record["options"], record["figures"]
        options = {"guide_ckpt": record.get("guide_ckpt")} | options
        axes = [shown(options[name]) if name in options else "" for name in COLUMNS]
        writer.writerow(
            [record["ckpt"], options["ckpt_step"], record["ref"], *axes, *(repr(record[name]) for name in measured)]
            + [repr(figures[metric]) if metric in figures else "" for metric in metrics]
            + [record["key"]]
        )
    write_atomically(path, content.getvalue(), option="--dest")


def write_markdown(points: Sequence[Point], path: Path) -> None:
    """The table of papers, without and with guidance, and one line for each point."""
    varying = varying_names(points)
    fixed = {name: value for name, value in points[0].values.items() if name not in varying}
    text = [", ".join(f"{name} {shown(value)}" for name, value in fixed.items()), ""]
    text += ["## Without and with guidance", "", _side_by_side(points, varying), ""]
    text += ["## All points", "", _all_points(points, varying), ""]
    if any(len(point.seeds) > 1 for point in points):
        text += ["±: standard deviation over seeds.", ""]
    write_atomically(path, "\n".join(text), option="--dest")


def varying_names(points: Sequence[Point]) -> list[str]:
    """The options in which the points differ."""
    names = dict.fromkeys(name for point in points for name in point.values)
    return [name for name in names if len({shown(point.values.get(name)) for point in points}) > 1]


def _side_by_side(points: Sequence[Point], varying: Sequence[str]) -> str:
    """Each row: all options but guidance; its figures without, and the best with guidance."""
    rest = [name for name in varying if name not in ("cfg_scale", *OF_GUIDANCE)]
    metrics = list(points[0].figures)
    rows = []
    for group in grouped(points, [*rest, "count"]).values():
        plain = [point for point in group if not is_guided(point.values)]
        guided = best(group_with, 1) if (group_with := [p for p in group if is_guided(p.values)]) else []
        pair = [side[0] if side else None for side in (plain, guided)]
        values = group[0].values
        rows.append(
            [*(shown(values.get(name)) for name in rest), f"{group[0].count:,}"]
            + [str(side.figures[m]) if side and m in side.figures else "" for m in metrics for side in pair]
            + [f"{side.gflops:.4g}" if side else "" for side in pair]
            + [guidance_text(guided[0].values) if guided else ""]
        )
    doubled = [title for m in metrics for title in (NAMES[m], f"{NAMES[m]}, guided")]
    return markdown_table([*rest, "images", *doubled, "GFLOPs / image", "GFLOPs, guided", "guidance"], rows)


def _all_points(points: Sequence[Point], varying: Sequence[str]) -> str:
    metrics = list(dict.fromkeys(metric for point in points for metric in point.figures))
    head = [*varying, "images", "seeds", "GFLOPs / image", "ms / image", *(NAMES[metric] for metric in metrics)]
    rows = [
        [shown(point.values.get(name)) for name in varying]
        + [f"{point.count:,}", str(len(point.seeds)), f"{point.gflops:.4g}", f"{point.ms:.4g}"]
        + [str(point.figures[metric]) if metric in point.figures else "" for metric in metrics]
        for point in points
    ]
    return markdown_table(head, rows)


def grouped(points: Iterable[Point], names: Sequence[str]) -> dict[tuple[str, ...], list[Point]]:
    """Points by the text of some of their options (or `count`)."""
    groups: dict[tuple[str, ...], list[Point]] = {}
    for point in points:
        key = tuple(str(point.count) if name == "count" else shown(point.values.get(name)) for name in names)
        groups.setdefault(key, []).append(point)
    return groups


def guidance_text(values: dict[str, Any]) -> str:
    """`cfg 1.5`, `cfg 4 at 0.0625, t 0.1–0.7`, `autoguidance 2 at 0.0625`: kind, scale, and what is not the default."""
    kind = "autoguidance" if values["autoguidance"] else "cfg"
    budget = values["unconditional_inference_budget"]
    text = f"{kind} {values['cfg_scale']:g}" + ("" if budget is None else f" at {budget:g}")
    if (values["guidance_low"], values["guidance_high"]) != (0, 1):
        text += f", t {values['guidance_low']:g}–{values['guidance_high']:g}"
    others = {n for n in OF_GUIDANCE if n in values} - {
        "autoguidance",
        "unconditional_inference_budget",
        "guidance_low",
        "guidance_high",
    }
    defaults = GenerateConfig()
    changed = [name for name in sorted(others) if values[name] != getattr(defaults, name)]
    return text + "".join(f", {name} {shown(values[name])}" for name in changed)


# ------------------------------------------------------------------------------------------------------------- bounds


class Bound(NamedTuple):
    """What an image may cost."""

    text: str
    limit: float  # GFLOPs or ms
    is_time: bool

    def cost(self, point: Point) -> float:
        """What an image of the point costs, in the unit of the limit."""
        return point.ms if self.is_time else point.gflops


def parse_bound(text: str) -> Bound:
    """`500GFLOPs`, `1.2TFLOPs`, `40ms` or `2s`. Raises UserError for anything else."""
    factors = {"gflops": 1.0, "tflops": 1000.0, "ms": 1.0, "s": 1000.0}
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*(gflops?|tflops?|ms|s)", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise UserError(f"--best-under {text}: must be a bound for one image, such as 500GFLOPs, 1.2TFLOPs, 40ms or 2s")
    unit = match[2].lower()
    unit = unit if unit in factors else f"{unit}s"
    return Bound(text.strip(), float(match[1]) * factors[unit], unit in ("ms", "s"))


def best_under(bound: Bound, points: Sequence[Point]) -> Point:
    """The best point within a bound. `UserError` where none is: it names the cheapest."""
    within = [point for point in points if bound.cost(point) <= bound.limit]
    if not within:
        cheapest = min(points, key=bound.cost)
        raise UserError(no_cell_within(bound, bound.cost(cheapest), cheapest.values))
    return best(within)[0]


def no_cell_within(bound: Bound, cost: float, values: dict[str, Any]) -> str:
    """The message that no cell is within a bound."""
    told = {name: value for name, value in values.items() if name in ("name", "cfg_scale", "inference_budget", "num_steps")}
    named = ", ".join(f"{name} {shown(value)}" for name, value in told.items())
    return f"--best-under {bound.text}: no cell is within it; the cheapest takes {cost:.4g} {'ms' if bound.is_time else 'GFLOPs'} ({named})"
