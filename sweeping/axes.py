"""The options of sweep.py → the sampling options of every cell."""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any

from common.errors import UserError
from config.options import GenerateConfig
from config.parsing import flag
from config.rules import names
from config.sweep_options import AXES, DEFAULTS
from config.values import coerce, kinds
from flows import flow_of
from samplers import parse_budget

Values = dict[str, Any]  # option of generate.py → value

# Without guidance these have no effect: cells that differ in them alone are one.
OF_GUIDANCE = tuple(name for name in names(GenerateConfig, group="guidance") if name in AXES and name != "cfg_scale")
OF_GUIDE = tuple(name for name in OF_GUIDANCE if name.startswith("guide_"))
OF_CACHE = tuple(name for name in AXES if name.startswith("cache_"))


def axes_of(config: Any, given: Values) -> list[list[Values]]:
    """The axes: of each, its points, which are values of one option (of an interval: of two). Seeds come first.

    Raises:
        UserError: names the axis, the value and what is valid.
    """
    axes = [[{"global_seed": seed} for seed in config.seeds]]
    intervals = [_interval(text) for text in config.guidance_interval]
    ends = ("guidance_low", "guidance_high")
    if intervals and (both := [flag(name) for name in ends if name in given]):
        raise UserError(f"--guidance-interval and {' and '.join(both)}: give the one or the other")
    for name in AXES:
        if intervals and name in ends:
            continue
        if name in given:
            axes.append([{name: coerce(GenerateConfig, name, value, flag(name))} for value in _points(name, given[name])])
        elif name in DEFAULTS:
            axes.append([{name: DEFAULTS[name]}])
    return [*axes, [dict(zip(ends, interval, strict=True)) for interval in intervals]] if intervals else axes


def combinations(axes: list[list[Values]]) -> Iterator[Values]:
    """Every combination of the axes' points, the last axis the fastest."""
    several = {name for axis in axes if len(axis) > 1 for name in axis[0]}
    for points in itertools.product(*axes):
        values = {name: value for point in points for name, value in point.items()}
        # Options of a guide belong to the points that have one, a step to those of an average, and autoguidance to those with a budget for it.
        if "guide_ckpt" in several and values["guide_ckpt"] is None:
            values = {name: value for name, value in values.items() if name not in OF_GUIDE}
        if "ema_sigma" in several and values["ema_sigma"] is None:
            values.pop("ema_step", None)
        if "autoguidance" in several and values.get("unconditional_inference_budget") is None:
            values["autoguidance"] = False
        yield values


def base_config(config: Any, ckpt: str) -> GenerateConfig:
    """What all cells of a checkpoint share; its architecture is not filled in."""
    fields = {f.name for f in dataclasses.fields(GenerateConfig)} - set(AXES)
    shared: Values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in fields}
    shared["ckpt"] = ckpt
    return GenerateConfig(**shared)


def canonical(config: GenerateConfig) -> GenerateConfig:
    """The same images by options in one spelling: those that have no effect are the defaults, and a budget of 1 is the full one."""
    ignored = [name for name in flow_of(config).ignored_options if name in AXES]
    idle = (*(OF_GUIDANCE if config.cfg_scale == 1 else ()), *(() if config.core_cache else OF_CACHE), *ignored)
    changes: Values = {name: getattr(GenerateConfig(), name) for name in idle}
    if config.inference_budget is not None:
        budget = parse_budget(config.inference_budget)
        changes["inference_budget"] = None if budget == 1 else str(budget)
    return dataclasses.replace(config, **changes)


def describe(values: Values) -> str:
    """Values in one line: `cfg_scale 1.5, inference_budget 0.25`."""
    return ", ".join(f"{name} {shown(value)}" for name, value in values.items())


def shown(value: object) -> str:
    """A value as on the command line."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _points(name: str, values: list[Any]) -> list[Any]:
    """The points of an axis. Of an option that is a list itself, points have commas: `40,10 20,5`; `40 10` is one."""
    if kinds(GenerateConfig)[name].is_list and not any("," in value for value in values):
        return [values]
    return values


def _interval(text: str) -> tuple[float, float]:
    match = re.fullmatch(r"([\d.]+)-([\d.]+)", text.strip())
    try:
        low, high = (float(part) for part in match.groups()) if match else (1.0, 0.0)
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise UserError(f"--guidance-interval {text}: must be LOW-HIGH with 0 ≤ LOW ≤ HIGH ≤ 1, e.g. 0.1-0.7")
    return low, high
