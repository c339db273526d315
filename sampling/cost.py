"""What a sampling run costs: evaluations, FLOPs, measured times."""

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

import models
from flows import flow_of
from samplers import Guidance
from sampling.session import Options, guidance

Run = list[tuple[float | None, ...]]  # the budgets of the passes of each velocity evaluation


Job = TypeVar("Job", bound=Hashable)


def passes_of_run(config: Options, g: Guidance) -> Run:
    """The budgets of the forward passes of each velocity evaluation of a run, the conditional pass first."""
    return [tuple(g.passes(*times)) for times in flow_of(config).evaluations()]


def pass_flops(model: nn.Module, runs: Iterable[Run]) -> dict[float | None, int]:
    """Budget → FLOPs of one forward of one image, for every budget in the runs."""
    return {b: models.count_flops(model, b) for b in {b for run in runs for passes in run for b in passes}}


def flops_per_step(config: Options, run: Run, flops: Mapping[float | None, int]) -> float:
    """FLOPs of one image's velocity evaluations, per step of the sampler: guiding passes, schedule and Heun's counted in."""
    return sum(flops[b] for passes in run for b in passes) / flow_of(config).total_steps


def mean_flops_per_step(config: Options, g: Guidance, model: nn.Module) -> float:
    """`flops_per_step` of the run with guidance g."""
    run = passes_of_run(config, g)
    return flops_per_step(config, run, pass_flops(model, [run]))


def flops_per_image(configs: Sequence[Options], model: nn.Module) -> list[float]:
    """FLOPs of one image's velocity evaluations by each of the options; the model may be on the meta device."""
    runs = [passes_of_run(config, guidance(config)) for config in configs]
    flops = pass_flops(model, runs)
    return [flops_per_step(config, run, flops) * flow_of(config).total_steps for config, run in zip(configs, runs, strict=True)]


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
            synchronize(device)
            begin = time.perf_counter()
            job()
            synchronize(device)
            if turn >= 0:
                times[name].append(1000 * (time.perf_counter() - begin))
    quartiles = {name: statistics.quantiles(t, n=4, method="inclusive") for name, t in times.items()}
    return {name: (low, median, high) for name, (low, median, high) in quartiles.items()}


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
