"""How long guided evaluations and whole samplings take: TF32 and bf16, large batch and one image, with CUDA graphs and a core cache."""

import copy
import dataclasses
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks.gpu.machine import seconds_of
from benchmarks.gpu.record import Run
from benchmarks.gpu.work import frozen_model, session_of
from benchmarks.sampling import GUIDING_BOUND, LOW_BUDGET, guidance
from benchmarks.train_step import durations
from common import precision
from models.costs import count_flops
from models.layers import narrow_linears
from samplers import Guidance, guided_velocity
from sampling import session
from sampling.cuda_graphs import GraphedModel
from sampling.session import Session

PASSES = {"CFG at 1": (1.0, False), f"CFG at {LOW_BUDGET:g}": (LOW_BUDGET, False), "cheap CFG": (1.0, True)}


def passes(run: Run) -> dict[str, Guidance]:
    """Name → guidance; the smallest budget of tiny models is a quarter."""
    made = {name: guidance(*arguments) for name, arguments in PASSES.items()}
    if not run.tiny:
        return made
    low = {"inference_budget": LOW_BUDGET, "unconditional_inference_budget": LOW_BUDGET}
    return {n: g._replace(**{k: 0.25 for k, v in low.items() if getattr(g, k) == v}) for n, g in made.items()}


def sampling(run: Run) -> None:
    """Guided evaluations, then images per second of 50 steps."""
    side, name = run.size((32, "ELIT-SiT-XL/2"), (8, "ELIT-SiT-Nano/2"))
    wide = frozen_model(run, name, side)
    batch = run.size(32, 2)
    for kind, mixed in (("TF32", "no"), ("bf16", "bf16")):
        model = narrow_linears(copy.deepcopy(wide), precision.AMP_TYPES[mixed])
        with precision.tf32(kind == "TF32"):
            for images in (batch, 1):
                with run.attempt(f"{kind}, batch {images}: evaluations"):
                    evaluations(run, model, side, (kind, mixed, images))
    del wide
    with run.attempt("images per second"):
        whole(run, model, name, side, batch)


def evaluations(run: Run, model: nn.Module, side: int, how: tuple[str, str, int]) -> None:
    """One guided evaluation of each kind, as it is and replayed from a CUDA graph."""
    kind, mixed, images = how
    x = torch.randn(images, 4, side, side, device=run.device, dtype=torch.float64)
    y = torch.arange(images, device=run.device)
    seconds: dict[str, float] = {}
    for name, g in passes(run).items():
        values = {}
        for way, network in {"ms": model, **({"CUDA graph ms": GraphedModel(model)} if run.cuda else {})}.items():
            with torch.no_grad(), precision.autocast(mixed, run.device):
                values[way] = 1000 * seconds_of(run.device, partial(guided_velocity, network, x, 0.5, y, g), run.size(10, 1))
        seconds[name] = min(values.values())
        run.note(f"{kind}, batch {images}: {name}", values)
    g = passes(run)
    flops = {name: sum(count_flops(model, p.budget) for p in g[name].passes(0.5)) for name in ("CFG at 1", "cheap CFG")}
    quotient = seconds["cheap CFG"] / seconds["CFG at 1"] / (flops["cheap CFG"] / flops["CFG at 1"])
    label = f"{kind}, batch {images}: cheap CFG over CFG, time ÷ FLOPs"
    if images > 1:
        run.check(label, quotient, 1 + GUIDING_BOUND, is_time=True)
        run.check(label, quotient, 1 - GUIDING_BOUND, at_least=True, is_time=True)
    else:
        run.note(label, {"quotient": quotient})


def whole(run: Run, model: nn.Module, name: str, side: int, batch: int) -> None:
    """Latents of 50 steps, by the session that generate.py draws with."""
    low = run.size(LOW_BUDGET, 0.25)
    options = {
        "model": name,
        "num_steps": run.size(50, 2),
        "cfg_scale": 4.0,
        "mixed_precision": "bf16",
        "inference_budget": "1",
    }
    base = session_of(model, None, (4, side, side), **options)
    ways: dict[str, tuple[int, dict]] = {
        "CFG": (batch, {}),
        "cheap CFG": (batch, {"unconditional_inference_budget": low}),
        "cheap CFG, core cache 0.1": (batch, {"unconditional_inference_budget": low, "core_cache": 0.1}),
        "cheap CFG, without CUDA graphs": (1, {"unconditional_inference_budget": low, "cuda_graphs": False}),
        "cheap CFG, CUDA graphs by default": (1, {"unconditional_inference_budget": low}),
    }
    for way, (images, changes) in ways.items():
        with run.attempt(f"{way}, batch {images}: images per second"):
            loaded = base.with_options(dataclasses.replace(base.config, **changes)).fresh()
            job = drawing(loaded, images)
            job()
            (seconds,) = durations(run.device, time.perf_counter, job)
            values = {"images/s": images / seconds}
            values |= {"core runs": loaded.drawn.share} if loaded.config.core_cache else {}
            run.note(f"{way}, batch {images}, {loaded.config.num_steps} steps", values)


def drawing(loaded: Session, images: int) -> Callable[[], object]:
    """Draws the images 0 … n − 1 once."""

    def draw() -> None:
        with torch.no_grad():
            loaded.latents(session.guidance(loaded.config), 0, range(images), torch.arange(images))

    return draw
