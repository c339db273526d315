"""Checks of sampling options; they change nothing and raise `UserError`.

Those of the options alone run before a checkpoint is read or downloaded, the others before anything else is loaded or written.
"""

from collections.abc import Sequence

import torch

import models
from checkpoint import posthoc
from common.errors import UserError
from common.logging import warn
from config.options import GenerateConfig
from flows import check_sampler, flow_of
from models.elit import budget_to_k
from samplers import BudgetSchedule, parse_budget
from sampling import conditions, guides
from sampling.session import Options, guidance

BUDGETS = ("inference_budget", "unconditional_inference_budget")


def check_options(config: Options, cfg_scales: Sequence[float] | None = None) -> None:
    """Refuse what no model can be sampled with; `cfg_scales`: of a tool that compares several, and kinds of guidance."""
    for name in BUDGETS:
        _parsed(_flag(name), getattr(config, name))
    check_sampler(config.mode, config.heun)
    if config.cuda_graphs and not torch.cuda.is_available():
        raise UserError("--cuda-graphs: requires CUDA, which this machine does not have; leave it out")
    if config.cuda_graphs and config.core_cache:
        raise UserError("--cuda-graphs: with --core-cache no two steps run the same; leave one of them out")
    posthoc.check_options(config)
    guides.check_options(config)
    conditions.check_options(config)
    for changes in [{}] if cfg_scales is None else [{"cfg_scale": scale, "guide_label": None} for scale in cfg_scales]:
        guidance(config, **changes).check()


def check_model(config: Options) -> None:
    """Refuse what the checkpoint's model cannot be sampled with."""
    flow_of(config).check_sampling()
    for name in BUDGETS:
        check_budget(config, _flag(name), getattr(config, name))


def check_generation(config: GenerateConfig) -> None:
    """Refuse what no set of images can be drawn with."""
    check_options(config)
    for label in [] if config.class_labels in (["random"], ["balanced"]) else config.class_labels:
        if not (label.isascii() and label.isdecimal() and len(label) < 19):
            raise UserError(f"--class-labels {label}: not random, balanced or class ids from 0 on")


def check_generation_model(config: GenerateConfig) -> None:
    """Refuse what the checkpoint's model cannot draw a set of images with."""
    check_model(config)
    if config.class_labels not in (["random"], ["balanced"]):
        check_labels(config, "--class-labels", [int(label) for label in config.class_labels])


def check_elit(config: Options) -> None:
    """Refuse a model without budgets."""
    if not models.model_spec(config.model).elastic:
        raise UserError(f"--ckpt {config.ckpt}: holds a {config.model}, which has no budget; only ELIT models do")


def check_labels(config: Options, option: str, labels: Sequence[int]) -> None:
    """Refuse class ids that the model does not know."""
    for label in labels:
        if label >= config.num_classes:
            raise UserError(f"{option} {label}: class ids of this model lie below {config.num_classes}")


def check_budget(config: Options, option: str, value: str | float | None) -> None:
    """Refuse a budget, or a schedule of budgets, that the model cannot run at."""
    if value is None:
        return
    if not models.model_spec(config.model).elastic:
        raise UserError(f"{option} {value}: {config.model} has no budget; only ELIT models do")
    J = config.elit_group_size**2
    budget = _parsed(option, value)
    for piece in [b for b, *_ in budget.pieces] if isinstance(budget, BudgetSchedule) else [budget]:
        try:
            budget_to_k(piece, J)
        except UserError as error:
            raise UserError(f"{option}: {error}; valid values: {', '.join(f'{b:g}' for b in all_budgets(J))}") from None


def warn_of_budgets(config: Options, budgets: Sequence[float] = ()) -> None:
    """Warn where some of the budgets asked for, or of `budgets`, cost no less than others."""
    asked = list(budgets)
    for value in (getattr(config, name) for name in BUDGETS):
        budget = parse_budget(value)
        asked += [b for b, *_ in budget.pieces] if isinstance(budget, BudgetSchedule) else [] if budget is None else [budget]
    if message := models.model_spec(config.model).wasted_saving(config.elit_group_size, asked):
        warn(message)


def all_budgets(J: int) -> list[float]:
    """Every budget of a model with J latents per group: k/J, k = 1 … J."""
    return [k / J for k in range(1, J + 1)]


def _parsed(option: str, value: str | float | None) -> "float | BudgetSchedule | None":
    try:
        return parse_budget(value)
    except UserError as error:
        raise UserError(f"{option}: {error}") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
