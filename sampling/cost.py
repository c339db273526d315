"""What a sampling run costs: evaluations, FLOPs, measured times."""

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

import models
from samplers import Guidance, dfm_schedule, evaluation_times, guided_velocities, guided_velocity
from sampling.session import Options

Run = list[tuple[float | None, ...]]  # the budgets of the passes of each velocity evaluation


Job = TypeVar("Job", bound=Hashable)


def one_forward(model: nn.Module, noise: Tensor | list[Tensor], y: Tensor, budget: float) -> None:
    """A forward pass to be timed, of all stages where there are any."""
    t = torch.full((len(y), len(noise)) if isinstance(noise, list) else (len(y),), 0.5, device=y.device)
    model(noise, t, y, inference_budget=budget)


def one_evaluation(model: nn.Module, noise: Tensor | list[Tensor], times: tuple[float, ...], y: Tensor, g: Guidance) -> None:
    """A velocity evaluation to be timed, guidance included; times: an entry of `evaluations`."""
    if isinstance(noise, list):
        waiting = (1.0,) * (len(noise) - len(times))
        guided_velocities(model, [x.double() for x in noise], times + waiting, len(times) - 1, y, g)
    else:
        guided_velocity(model, noise.double(), *times, y, g)


def evaluations(config: Options) -> list[tuple[float, ...]]:
    """The time of each velocity evaluation of a run; for DFM the times of the stages up to the active one."""
    if models.model_spec(config.model).staged:
        phases = dfm_schedule(config.num_steps_per_scale, config.stage_sampling_thresholds)
        return [times[: phase.active_stage + 1] for phase in phases for times in phase.times[:-1]]
    return [(t,) for t in evaluation_times(config.num_steps, config.mode, config.heun, config.time_shift)]


def steps_of_run(config: Options) -> int:
    """The sampler's steps."""
    return sum(config.num_steps_per_scale) if models.model_spec(config.model).staged else config.num_steps


def passes_of_run(config: Options, g: Guidance) -> Run:
    """The budgets of the forward passes of each velocity evaluation of a run, the conditional pass first."""
    return [tuple(g.passes(*times)) for times in evaluations(config)]


def pass_flops(model: nn.Module, runs: Iterable[Run]) -> dict[float | None, int]:
    """Budget → FLOPs of one forward of one image, for every budget in the runs."""
    return {b: models.count_flops(model, b) for b in {b for run in runs for passes in run for b in passes}}


def flops_per_step(config: Options, run: Run, flops: Mapping[float | None, int]) -> float:
    """FLOPs of one image's velocity evaluations, per step of the sampler: guiding passes, schedule and Heun's counted in."""
    return sum(flops[b] for passes in run for b in passes) / steps_of_run(config)


def mean_flops_per_step(config: Options, g: Guidance, model: nn.Module) -> float:
    """`flops_per_step` of the run with guidance g."""
    run = passes_of_run(config, g)
    return flops_per_step(config, run, pass_flops(model, [run]))


WARM_UP, LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 2, 5, 25, 30


def interleaved_times(jobs: Mapping[Job, Callable[[], object]], device: torch.device) -> dict[Job, tuple[float, float, float]]:
    """Wall time of each job in milliseconds: (lower quartile, median, upper quartile).

    The jobs take turns, so that a busy spell of the machine falls on all alike: after `WARM_UP` rounds that do not count,
    `MOST_ROUNDS` rounds, or fewer (at least `LEAST_ROUNDS`) where they would take more than `SECONDS`. The device is
    synchronised before and after each job.
    """
    times: dict[Job, list[float]] = {name: [] for name in jobs}
    start = time.perf_counter()
    for turn in range(-WARM_UP, MOST_ROUNDS):
        if turn >= LEAST_ROUNDS and time.perf_counter() - start > SECONDS:
            break
        for name, job in jobs.items():
            _synchronize(device)
            begin = time.perf_counter()
            job()
            _synchronize(device)
            if turn >= 0:
                times[name].append(1000 * (time.perf_counter() - begin))
    return {name: tuple(statistics.quantiles(t, n=4, method="inclusive")) for name, t in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
