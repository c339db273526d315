"""What a sampling run costs: evaluations, FLOPs, measured times."""

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

import models
from flows import flow_of
from samplers import Guidance, Pass
from sampling.core_cache import Drawn
from sampling.session import Options, Session, guidance

Run = list[tuple[Pass, ...]]  # the passes of each velocity evaluation


Job = TypeVar("Job", bound=Hashable)


def passes_of_run(config: Options, g: Guidance) -> Run:
    """The forward passes of each velocity evaluation of a run, the conditional one first; of a core cache nothing is known here."""
    return [tuple(g.passes(*times)) for times in flow_of(config).evaluations()]


def pass_flops(model: nn.Module, runs: Iterable[Run], guide: nn.Module | None = None) -> dict[Pass, int]:
    """Pass → FLOPs of one forward of one image, for every pass in the runs; `guide`: the network of the guide's passes."""
    passes = {p for run in runs for passes in run for p in passes}
    return {p: models.count_flops(_network(p, model, guide), p.budget) for p in passes}


def flops_per_step(config: Options, run: Run, flops: Mapping[Pass, int]) -> float:
    """FLOPs of one image's velocity evaluations, per step of the sampler: guiding passes, schedule and Heun's counted in."""
    return sum(flops[p] for passes in run for p in passes) / flow_of(config).total_steps


def mean_flops_per_step(config: Options, g: Guidance, model: nn.Module, guide: nn.Module | None = None) -> float:
    """`flops_per_step` of the run with guidance g; `guide`: the network of the guide's passes. What a core cache saves is not known here."""
    run = passes_of_run(config, g)
    return flops_per_step(config, run, pass_flops(model, [run], guide))


def drawn_flops_per_step(loaded: Session, drawn: Drawn) -> float:
    """FLOPs per image and step of what was drawn with a core cache: what ran."""
    flops = {}
    for p in drawn.passes:
        network = _network(p, loaded.model, loaded.guide)
        after = None if p.guide else loaded.config.cache_after
        flops[p] = models.count_reused_flops(network, after) if p.reused else models.count_flops(network, p.budget)
    return sum(flops[p] * n for p, n in drawn.passes.items()) / (drawn.images * loaded.flow.total_steps)


def _network(p: Pass, model: nn.Module, guide: nn.Module | None) -> nn.Module:
    if p.guide and guide is None:
        raise ValueError("the FLOPs of a guide's passes are those of its network, which is not given")
    return guide if p.guide and guide is not None else model


def flops_per_image(configs: Sequence[Options], model: nn.Module, guide: nn.Module | None = None) -> list[float]:
    """FLOPs of one image's velocity evaluations by each of the options, without a core cache; networks may be on the meta device."""
    runs = [passes_of_run(config, guidance(config)) for config in configs]
    flops = pass_flops(model, runs, guide)
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
