"""The budgets that training meets (ELIT, arXiv 2603.12245): drawn for each forward, or by the time of each image."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, tensor

import models
from common.errors import UserError
from config.options import TrainConfig
from loss import share_of_times
from models.backbone import Backbone
from models.conditioning import map_condition
from models.costs import mean_forward_flops
from models.elit import EPS, mask_levels, mask_to_budget
from randomness import to_device
from samplers import BudgetSchedule

OPTION = "--elit-budget-schedule"


def check_budgets(config: TrainConfig) -> None:
    """Refuse budgets that the model does not have or cannot be trained at."""
    masks, schedule = [config.elit_min_mask_prob, config.elit_max_mask_prob], config.elit_budget_schedule
    if not models.model_spec(config.model).elastic:
        if any(masks):
            raise UserError(f"--elit-max-mask-prob: {config.model} has no latents to mask; only ELIT models do")
        if schedule is not None:
            raise UserError(f"{OPTION} {schedule}: {config.model} has no budget; only ELIT models do")
        return
    J = config.elit_group_size**2
    mask_levels(J, *masks)
    if schedule is None:
        return
    if masks != [None, None]:
        raise UserError(f"{OPTION} {schedule}: the budget is either drawn or scheduled; leave out --elit-min/max-mask-prob")
    parsed = budget_schedule(config)
    for budget, *_ in parsed.pieces if parsed else ():
        if not (budget * J + EPS >= 1 and budget <= 1 and abs(budget * J - round(budget * J)) <= EPS):
            raise UserError(f"{OPTION} {schedule}: budget {budget:g} is not valid; choose a multiple of 1/{J} up to 1")


def budget_schedule(config: TrainConfig) -> BudgetSchedule | None:
    """The schedule that the options name, if any. Raises UserError where it has gaps or is none."""
    if config.elit_budget_schedule is None:
        return None
    try:
        return BudgetSchedule.parse(config.elit_budget_schedule)
    except UserError as error:
        raise UserError(f"{OPTION}: {error}") from None


def trained_budgets(config: TrainConfig) -> list[float | None]:
    """The budgets that training meets, the largest first; [None] for a model that has none."""
    if not models.model_spec(config.model).elastic:
        return [None]
    if (schedule := budget_schedule(config)) is not None:
        return [*sorted({budget for budget, *_ in schedule.pieces}, reverse=True)]
    J = config.elit_group_size**2
    return [mask_to_budget(m, J) for m in mask_levels(J, config.elit_min_mask_prob, config.elit_max_mask_prob)]


def mean_training_flops(config: TrainConfig, model: Backbone) -> float:
    """FLOPs of one image's forward, the mean over training; a backward pass is two forwards."""
    budgets, schedule = trained_budgets(config), budget_schedule(config)
    if schedule is None:
        return mean_forward_flops(model, budgets)
    shares = dict.fromkeys(budgets, 0.0)
    for budget, start, end in schedule.pieces:
        shares[budget] += share_of_times(end, start, config.weighting, config.path_type, config.time_shift)
    return mean_forward_flops(model, budgets, list(shares.values()))


def rows_by_budget(schedule: BudgetSchedule, times: Tensor) -> list[tuple[float, Tensor]]:
    """The images of a batch, put together by budget.

    Args:
        schedule: the budget at each time.
        times: (B,) of the images, on the host: looking at them on a device would wait for it.

    Returns:
        (budget, rows) in the schedule's order, none without images; rows: int64 (n,), ascending. The n sum to B.
    """
    of_image = [schedule.at(t) for t in times.tolist()]
    rows = {budget: [i for i, own in enumerate(of_image) if own == budget] for budget, *_ in schedule.pieces}
    return [(budget, tensor(chosen)) for budget, chosen in rows.items() if chosen]


def parts_by_budget(
    schedule: BudgetSchedule, times: Tensor, batch: dict[str, Any]
) -> Iterator[tuple[float, float, dict[str, Any]]]:
    """The parts of a batch whose images have the same budget, as `rows_by_budget` puts them together.

    Args:
        schedule: the budget at each time.
        times: (B,) of the images, on the host.
        batch: `moments` (B, 2C, h, w), for REPA `image` (B, 3, H, W), the condition `y` (labels (B,), or `Text` of B rows) and
            the `draws` of B images, all on the device.

    Yields:
        (budget, n / B, the same of the n images of that budget). The shares sum to 1.
    """
    for budget, rows in rows_by_budget(schedule, times):
        chosen = to_device(rows, batch["moments"].device)
        part = {k: v[chosen] for k, v in batch.items() if k not in ("y", "draws")}
        part["y"] = map_condition(lambda v, chosen=chosen: v[chosen], batch["y"])
        yield budget, len(rows) / len(times), part | {"draws": batch["draws"].rows(chosen)}
