"""How long training steps take: against FLOPs, against the machine's own rates, and against each other."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import models
from benchmarks.baselines import PlainDiT, PlainEMA
from benchmarks.gpu.machine import seconds_of
from benchmarks.gpu.record import Run
from benchmarks.gpu.work import (
    CLASSES,
    Batch,
    at,
    first_images,
    host_seconds,
    make_data,
    train_step,
    trainer_of,
    training_config,
)
from benchmarks.train_step import TrainingStep, disturb, durations, make_batch
from models.costs import forward_flops
from training.optim import clip_gradients
from training.stats import peak_tflops
from training.step_trace import Trace, compiled, trace_step
from training.trainer import Trainer

MFU, RATIO = 0.35, 1.15
FEW = 2  # images of a step whose kernels are so short that only the host takes time
KERNELS = 20


@dataclass
class Timing:
    """Of a step, in seconds, and what it computes of one image in FLOPs."""

    step: float
    host: float
    flops: float
    peak_gib: float = 0.0


def training(run: Run) -> None:
    """SiT, a plain stack of the same size, and ELIT at several budgets: eager, then compiled."""
    images, side, size = run.size((32, 32, "XL"), (2, 8, "Nano"))
    data = make_data(run.folder / "data", 2 * images, side)
    if not run.cuda:
        run.note("compiled steps", {}, "need CUDA")
    timings: dict[tuple[str, bool], Timing] = {}
    for family in ("SiT", "ELIT-SiT"):
        with run.attempt(f"{family}: steps"):
            config = training_config(run, data, f"{family}-{size}/2", exp_name=family, batch_size=images)
            with trainer_of(config) as (trainer, batches):
                batch = next(batches)
                places = {"": 0} if family == "SiT" else elit_places(trainer.budgets)
                for is_compiled in (False, True) if run.cuda else (False,):
                    with run.attempt(f"{family} {mode(is_compiled)}: steps"):
                        if is_compiled:
                            compile_in_place(run, trainer, batch)
                        steps_of(run, trainer, batch, places, (family, is_compiled, timings))
                if family == "ELIT-SiT":
                    with run.attempt("ELIT-SiT: the update, part by part"):
                        split_update(run, trainer, batch)
                    with run.attempt("ELIT-SiT: kernels"):
                        top_kernels(run, partial(train_step, trainer, at(batch, 0, len(trainer.budgets))))
            trainer = batch = None
            free(run)
    with run.attempt("plain stack: steps"):
        plain_stack(run, size, images, side, timings)
    judge(run, timings)
    with run.attempt("roofline"):
        roofline(run, f"-{size}/2", images, timings)


def mode(is_compiled: bool) -> str:
    """In words."""
    return "compiled" if is_compiled else "eager"


def elit_places(budgets: Sequence[float | None]) -> dict[str, int]:
    """Name → place among the budgets, which come the largest first, of 1, a quarter and the smallest."""
    wanted = {1.0, 0.25, min(b for b in budgets if b is not None)}
    return {f"at {b:g}": i for i, b in enumerate(budgets) if b in wanted}


def compile_in_place(run: Run, trainer: Trainer, batch: Batch) -> None:
    """As training does it by default on CUDA; then every graph is made."""
    begin, n = time.perf_counter(), len(trainer.budgets)
    models.compile_model(trainer.accelerator.unwrap_model(trainer.model))
    for index in {0, n // 2, n - 1}:
        for part in (batch, first_images(batch, FEW)):
            train_step(trainer, at(part, index, n))
    if run.cuda:
        torch.cuda.synchronize()
    run.note(f"{trainer.config.model}: making the compiled graphs", {"s": time.perf_counter() - begin})


def steps_of(run: Run, trainer: Trainer, batch: Batch, places: dict[str, int], where: tuple[str, bool, dict]) -> None:
    """Time the steps at these places among the budgets, and over all budgets in turn."""
    family, is_compiled, timings = where
    n = len(trainer.budgets)
    flops = forward_flops(trainer.accelerator.unwrap_model(trainer.model), trainer.budgets)
    images = len(batch["moments"])
    for name, index in places.items():
        batches = [at(batch, index, n)]
        timings[f"{family} {name}".strip(), is_compiled] = timed(run, trainer, batches, 3 * flops[index], images)
    if n > 1:
        turns = [at(batch, i, n) for i in range(n)]
        timings[f"{family} over all budgets", is_compiled] = timed(run, trainer, turns, 3 * statistics.mean(flops), images)
    for (name, how), timing in timings.items():
        if name.startswith(family) and how == is_compiled:
            tell(run, name, is_compiled, timing, images)


def timed(run: Run, trainer: Trainer, batches: list[Batch], flops: float, images: int) -> Timing:
    """Steps with these batches in turn."""
    rounds = run.size(10 if len(batches) == 1 else 2, 1)
    jobs = [partial(train_step, trainer, batch) for batch in batches]
    few = partial(train_step, trainer, first_images(batches[0], min(FEW, images)))
    return measure(run, jobs, few, rounds, flops)


def measure(run: Run, jobs: Sequence[Callable[[], object]], few: Callable[[], object], rounds: int, flops: float) -> Timing:
    """Time jobs in turn; `few`: the same with so few images that the host is never held up."""
    for job in (*jobs, few):
        job()
    if run.cuda:
        torch.cuda.reset_peak_memory_stats()
    times = durations(run.device, time.perf_counter, *[*jobs] * rounds)
    peak = torch.cuda.max_memory_allocated() / 2**30 if run.cuda else 0.0
    host = host_seconds(run.device, few, run.size(3, 1))
    return Timing(statistics.mean(times) if len(jobs) > 1 else statistics.median(times), host, flops, peak)


def tell(run: Run, name: str, is_compiled: bool, timing: Timing, images: int) -> None:
    """One line of the table."""
    rate = images * timing.flops / timing.step / 1e12
    peak = peak_tflops(run.device, "bf16", allow_tf32=False)
    products = run.measured("machine", "bf16 products", "TFLOP/s")
    values = {"ms": 1000 * timing.step, "host ms": 1000 * timing.host, "TFLOP/s": rate}
    values |= {"MFU": rate / peak} if peak else {}
    values |= {"of measured products": rate / products} if products else {}
    values |= {"peak GiB": timing.peak_gib} if run.cuda else {}
    run.note(f"{name}, {mode(is_compiled)}", values)
    if is_compiled:
        run.check(f"{name}, compiled: host ÷ step", timing.host / timing.step, 1, is_time=True)
        if peak and name in ("SiT", "ELIT-SiT at 1"):
            run.check(f"{name}, compiled: MFU", rate / peak, MFU, at_least=True, is_time=True)


def split_update(run: Run, trainer: Trainer, batch: Batch) -> None:
    """What follows the backward pass, part by part."""
    parameters, optimizer = list(trainer.model.parameters()), trainer.optimizer
    trainer.accelerator.backward(trainer.forward(batch))
    clip = partial(clip_gradients, trainer.accelerator, parameters, optimizer.optimizer, trainer.config.max_grad_norm)
    jobs = {"clipping": clip, "AdamW": optimizer.step, "averages": trainer.ema.update}
    count = sum(p.numel() for p in parameters)
    for name, job in jobs.items():
        seconds = seconds_of(run.device, job, repeats=run.size(10, 1), warmup=1)
        run.note(f"ELIT-SiT update: {name}", {"ms": 1000 * seconds, "ns per 1,000 parameters": 1e12 * seconds / count})
    optimizer.zero_grad()


def top_kernels(run: Run, step: Callable[[], object]) -> None:
    """Where the time of a compiled step goes."""
    step()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.cuda else [])]
    with profile(activities=kinds) as trace:
        step()
        if run.cuda:
            torch.cuda.synchronize()
    key = "self_device_time_total" if run.cuda else "self_cpu_time_total"
    events = sorted(trace.key_averages(), key=lambda e: getattr(e, key), reverse=True)
    if run.cuda:
        events = [
            e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation
        ]  # kernels, not what launched them
    rows = [{"kernel": e.key[:100], "calls": e.count, "ms": getattr(e, key) / 1000} for e in events[:KERNELS]]
    launches = sum(e.count for e in events) if run.cuda else 0
    run.note(f"ELIT-SiT at 1, {mode(run.cuda)}: one step", {"launches": launches, "top kernels": rows})


def plain_stack(run: Run, size: str, images: int, side: int, timings: dict[tuple[str, bool], Timing]) -> None:
    """SiT written as plainly as PyTorch allows, by a plain step."""
    torch.manual_seed(0)
    sizes = {"input_size": side, "num_classes": CLASSES, **models.model_spec(f"SiT-{size}/2").sizes}
    with run.device:
        model = disturb(PlainDiT(**sizes))
    with torch.device("meta"):
        flops = 3 * models.count_flops(models.create_model(f"SiT-{size}/2", input_size=side))
    autocast = partial(torch.autocast, run.device.type, torch.bfloat16)
    steps = [
        TrainingStep(model, PlainEMA(model, 0.9999), make_batch(n, side // 2, run.device), autocast) for n in (images, FEW)
    ]
    jobs = [partial(run_whole, step) for step in steps]
    for is_compiled in (False, True) if run.cuda else (False,):
        if is_compiled:
            for block in model.blocks:
                block.compile(dynamic=True, fullgraph=True)
        timing = measure(run, jobs[:1], jobs[1], run.size(10, 1), flops)
        timings["plain stack", is_compiled] = timing
        tell(run, "plain stack", is_compiled, timing, images)


def run_whole(step: TrainingStep) -> None:
    """Forward, backward and update."""
    step.backward()
    step.update()


def judge(run: Run, timings: dict[tuple[str, bool], Timing]) -> None:
    """ELIT's steps over SiT's against the FLOPs."""
    for (name, is_compiled), timing in timings.items():
        base = timings.get(("SiT", is_compiled))
        if not name.startswith("ELIT") or base is None:
            continue
        quotient = (timing.step / base.step) / (timing.flops / base.flops)
        label = f"{name}, {mode(is_compiled)}: time over SiT's ÷ FLOPs over SiT's"
        if is_compiled:
            run.check(label, quotient, RATIO, is_time=True)
        else:
            run.note(label, {"quotient": quotient})


def roofline(run: Run, suffix: str, images: int, timings: dict[tuple[str, bool], Timing]) -> None:
    """Share of the step that FLOPs and traffic, counted by `benchmarks.trace`, take at the machine's own rates."""
    products = run.measured("machine", "bf16 products", "TFLOP/s")
    copies = run.measured("machine", "device copy", "GB/s read and written")
    if products is None or copies is None:
        run.note("roofline", {}, "needs the part machine")
        return
    for name, budget in (("SiT", None), ("ELIT-SiT at 1", 1.0), ("ELIT-SiT at 0.0625", 1 / 16)):
        if (name, False) not in timings:
            continue
        config = training_config(run, run.folder, f"{name.partition(' ')[0]}{suffix}", exp_name="trace")
        traced = trace_step(config, images, budget)
        for is_compiled in (False, True):
            if timing := timings.get((name, is_compiled)):
                seconds = least_seconds(compiled(traced) if is_compiled else traced, products, copies)
                values = {"ms by the counts": 1000 * seconds, "share of the step": seconds / timing.step}
                run.note(f"{name}, {mode(is_compiled)}: roofline", values)


def least_seconds(traced: Trace, products: float, copies: float) -> float:
    """Products and attention at the measured TFLOP/s, all else at the measured GB/s."""
    flops, (_, traffic, _) = traced.total()[2], traced.total("element-wise")
    return flops / products / 1e12 + traffic / copies / 1e9


def free(run: Run) -> None:
    """The memory of what is no longer referred to."""
    gc.collect()
    if run.cuda:
        torch.cuda.empty_cache()
