"""As good as possible within so many milliseconds: budget and steps from measured latencies, and from a sweep where there is one."""

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from common.errors import UserError
from common.logging import warn
from config.demo_options import WebDemoConfig
from config.rules import names
from config.sweep_options import AXES
from config.tool_options import MetricOptions
from flows import flow_of
from metrics.evaluation import HIGHER_IS_BETTER, NAMES
from samplers import BudgetSchedule, Pass, parse_budget
from sampling import cost
from sweeping.axes import OF_CACHE, OF_GUIDANCE
from sweeping.cells import Store
from sweeping.results import Point, main_metric, points_of
from web.drawing import Drawer, resolve

MOST_STEPS = 250
MOST_BUDGETS = 16  # whose latency is measured
# What the page sets, or what is no matter of the sampler.
SET_HERE = {"inference_budget", "num_steps", "num_steps_per_scale", "cfg_scale", "unconditional_inference_budget"}
SET_HERE |= {"autoguidance", "class_labels"}
# In which points must agree to be compared, beside their metric: the reference, how many images of what, and how they are measured.
MEASURED = ("ref_sha256", "num_samples", "class_labels", "prompts_sha256", "networks")
MEASURED += tuple(name for name in names(MetricOptions, group="metrics") if name != "metrics")

Drawable = tuple[Point, WebDemoConfig]  # a point of a sweep, and the request that draws as it did
Evaluation = tuple[tuple[Pass, ...], int]  # the passes of a velocity evaluation, and of how many stages


class Choice(NamedTuple):
    """What is drawn within a time.

    Attributes:
        config: the request, with budget and steps (of a sweep's point: guidance too).
        ms: that it takes by the measured latencies.
        reason: why it was chosen, for people.
    """

    config: WebDemoConfig
    ms: float
    reason: str


class Timings:
    """Milliseconds of velocity evaluations of one image and of its decoding: upper quartiles, each measured once."""

    def __init__(self, drawer: Drawer):
        self._drawer = drawer
        self._ms: dict[Hashable, float] = {}

    def measure(self, configs: Sequence[WebDemoConfig]) -> None:
        """Measure what requests consist of, as far as that has not been done, all in turns."""
        loaded, device = self._drawer.loaded, self._drawer.loaded.device
        jobs: dict[Hashable, partial] = {}
        for config in configs:
            g, sampled = self._drawer.guidance(config), self._drawer.session_of(config)
            y = sampled.condition([0], device)
            noise = sampled.starting_noise(config.seed, [0])
            model, g = sampled.with_options(dataclasses.replace(config, core_cache=0.0)).networks(g, 1)
            for times in sampled.flow.evaluations():
                key: Evaluation = tuple(g.passes(*times)), len(times)
                if key not in self._ms:
                    jobs.setdefault(key, partial(sampled.flow.evaluate, model, noise, times, y, g))
        if jobs:
            jobs["decode"] = partial(loaded.decode, torch.zeros(1, *loaded.shape, device=device))
            with self._drawer.lock, torch.inference_mode(), loaded.autocast():
                self._ms |= {key: high for key, (_, _, high) in cost.interleaved_times(jobs, device).items()}

    def of(self, config: WebDemoConfig) -> float:
        """Of a request's image; what it consists of has been measured."""
        g = self._drawer.guidance(config)
        evaluations = Counter((tuple(g.passes(*times)), len(times)) for times in flow_of(config).evaluations())
        return sum(self._ms[key] * count for key, count in evaluations.items()) + self._ms["decode"]


class Chooser:
    """Chooses budget and steps for a checkpoint; `sweep_dirs`: folders of sweeps that may hold cells of it."""

    def __init__(self, drawer: Drawer, sweep_dirs: Sequence[Path]):
        self.timings = Timings(drawer)
        self._drawer = drawer
        records, self._written = {}, {}  # by the cells' keys; a cell may lie in several folders
        for store in (Store(folder, warn) for folder in sweep_dirs):
            for record in store.read_all():
                if record["options"].get("ckpt_sha256") == drawer.sha256:
                    key = record["key"]
                    records[key] = record
                    self._written[key] = max(store.path(key).stat().st_mtime, self._written.get(key, 0))
        self._points = points_of(records.values())

    def within(self, config: WebDemoConfig, ms: float) -> Choice:
        """The best request within a time: of a sweep's Pareto front where one of its points is, else by `_by_latency`.

        Raises:
            UserError: nothing is within it.
        """
        swept = [(point, self._request(point, config)) for point in self._points]
        drawable = [(point, request) for point, request in swept if request is not None]
        points = self._comparable(drawable)
        self.timings.measure([config, *(request for _, request in points)])
        choice = self._swept(points, ms) or self._by_latency(config, ms)
        if not (others := len(drawable) - len(points)):
            return choice
        left_out = f"{others} more, of another reference, number of images or measurement, left out"
        return choice._replace(reason=f"{choice.reason} ({left_out})")

    def _comparable(self, points: Sequence[Drawable]) -> list[Drawable]:
        """Those that are measured alike, so that figures can be compared: the most; of equally many, with the newest cell."""
        groups: dict[str, list[Drawable]] = {}
        for point, request in points:
            measured = [main_metric(point.figures), *(point.options.get(name) for name in MEASURED)]
            groups.setdefault(str(measured), []).append((point, request))
        newest = {name: max(self._written[key] for point, _ in of for key in point.keys) for name, of in groups.items()}
        return groups[max(groups, key=lambda name: (len(groups[name]), newest[name]))] if groups else []

    def _swept(self, points: Sequence[Drawable], ms: float) -> Choice | None:
        """The best of comparable points within a time."""
        metric = main_metric(points[0][0].figures) if points else ""
        sign = -1 if metric in HIGHER_IS_BETTER else 1
        within = [
            (sign * point.figures[metric].mean, self.timings.of(request), i)
            for i, (point, request) in enumerate(points)
            if self.timings.of(request) <= ms
        ]
        if not within:
            return None
        _, expected, i = min(within)
        point, request = points[i]
        figure = f"{NAMES[metric]} {point.figures[metric]} of {point.count:,} images against {point.values['ref']}"
        return Choice(request, expected, f"the best of {len(points)} points of a sweep: {figure}")

    def _request(self, point: Point, config: WebDemoConfig) -> WebDemoConfig | None:
        """The request that draws as a point of a sweep did; None where the page has no such options."""
        values, budget = point.options, parse_budget(point.options.get("inference_budget"))
        idle = (*(OF_GUIDANCE if values["cfg_scale"] == 1 else ()), *(() if config.core_cache else OF_CACHE))
        others = [name for name in AXES if name in values and name not in (*SET_HERE, *idle)]
        if isinstance(budget, BudgetSchedule) or any(values[name] != getattr(config, name) for name in others):
            return None
        low = values.get("unconditional_inference_budget")
        changes = {name: values[name] for name in ("num_steps", "num_steps_per_scale", "cfg_scale") if name in values}
        if self._drawer.budgets:
            changes["inference_budget"] = 1.0 if budget is None else budget
        if low is not None:
            changes["unconditional_inference_budget"] = low
        kind = "AutoG" if values.get("autoguidance") else "CFG" if low is None else "CCFG"
        kind = "Guide" if values.get("guide_ckpt") and values["cfg_scale"] != 1 else kind
        return resolve(dataclasses.replace(config, guidance_kind=kind, **changes))

    def _by_latency(self, config: WebDemoConfig, ms: float) -> Choice:
        """The largest budget at which the requested steps fit, and then as many steps as fit; else fewer at the lowest budget."""
        budgets = self._drawer.budgets
        step = max(1, len(budgets) // MOST_BUDGETS)
        ladder = [self._drawer.at(config, b) for b in budgets[step - 1 :: step]] or [config]
        self.timings.measure(ladder)
        fits = [request for request in ladder if self.timings.of(request) <= ms]
        chosen = fits[-1] if fits else ladder[0]
        steps, best = list(_steps_of(chosen)), None
        self.timings.measure(steps)  # a guidance interval may hold times of some of them alone
        for request in steps:
            if self.timings.of(request) > ms:
                break
            best = request
        if best is None:
            raise UserError(
                f"--within-ms {ms:g}: an image takes at least {self.timings.of(steps[0]):.3g} ms, at the lowest budget and fewest steps"
            )
        if not budgets:
            reason = "as many steps as fit"
        elif fits:
            reason = f"the largest budget at which {flow_of(config).total_steps} steps fit, and as many steps as fit there"
        else:
            reason = f"{flow_of(config).total_steps} steps fit at no budget: as many as fit at the lowest"
        return Choice(best, self.timings.of(best), f"{reason}, by measured latencies")


def sweep_dirs(ckpt: Path, given: str | None) -> list[Path]:
    """Folders of sweeps: the one that is given, else those in the checkpoint's folder and in its run's.

    Raises:
        UserError: the one that is given holds no cells.
    """
    if given is not None:
        if not (Path(given) / "cells").is_dir():
            raise UserError(f"--sweep-dir {given}: holds no cells/ of sweep.py")
        return [Path(given)]
    run = [ckpt.parent.parent] if ckpt.parent.name == "checkpoints" else []
    return sorted(cells.parent for folder in (ckpt.parent, *run) for cells in folder.glob("*/cells") if cells.is_dir())


def _steps_of(config: WebDemoConfig) -> Iterator[WebDemoConfig]:
    """The request with fewer and more steps, ascending; stages keep their shares."""
    total, scales = flow_of(config).total_steps, config.num_steps_per_scale
    for count in range(1, MOST_STEPS + 1):
        per_scale = [max(1, round(count * n / total)) for n in scales]
        yield dataclasses.replace(config, num_steps=count, num_steps_per_scale=per_scale)
