"""Whether the host waits for the device anywhere in training steps and in a sampler's loop."""

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.record import Run, describe
from benchmarks.gpu.work import (
    Batch,
    frozen_model,
    make_data,
    over_budgets,
    session_of,
    train_step,
    trainer_of,
    training_config,
)
from common.precision import AMP_TYPES
from models.layers import narrow_linears
from sampling import session
from training.trainer import Trainer

WAITS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
}
STEPS = 20
RUNS = {  # name → (model's family, options)
    "ELIT bf16": ("ELIT-SiT", {}),
    "ELIT fp16": ("ELIT-SiT", {"mixed_precision": "fp16"}),
    "ELIT fp32": ("ELIT-SiT", {"mixed_precision": "no"}),
    "ELIT compiled": ("ELIT-SiT", {"compile": True}),
    "SiT bf16": ("SiT", {}),
    "DFM bf16": ("DFM-SiT", {}),
}

ON_CUDA = {"ELIT fp16", "ELIT compiled"}  # a CPU has no fp16, and compiled code for it reads numbers of its own


def host_reads(job: Callable[[], object]) -> list[str]:
    """The operations of a job that bring a value of a tensor to the host: on a GPU each of them waits.

    Not those inside AdamW's fused kernel for CPUs, which reads its own count of steps.
    """
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        job()
    return sorted({event.name for event in trace.events() if event.name in WAITS and not _inside(event, "aten::_fused_adamw_")})


def _inside(event: Any, name: str) -> bool:
    return event is not None and (event.name == name or _inside(event.cpu_parent, name))


@contextlib.contextmanager
def sync_debug(mode: str) -> Iterator[None]:
    """PyTorch's own watch over what waits."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(run: Run, job: Callable[[], object]) -> list[str]:
    """What in the job waits for the device: nothing, or every place; on a CPU the operations that would."""
    if not run.cuda:
        return host_reads(job)
    try:
        with sync_debug("error"):
            job()
        return []
    except RuntimeError as error:
        traceback.print_exc()
        first = describe(error)
    with warnings.catch_warnings(record=True) as caught, sync_debug("warn"):  # all of them, by the lines that called
        warnings.simplefilter("always")
        job()
    return [first, *sorted({f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)})]


def check(run: Run, name: str, job: Callable[[], object]) -> None:
    """One check: nothing waits."""
    found = waits(run, job)
    how = "" if run.cuda else f"{'; '.join(found) or 'no value brought to the host'}: without CUDA by the profiler"
    run.check(f"{name}: waits", len(found), 0, why="; ".join(found) if run.cuda else how)


def train_all(trainer: Trainer, steps: Sequence[Batch]) -> None:
    """A step with each batch."""
    for batch in steps:
        train_step(trainer, batch)


def waiting(run: Run) -> None:
    """Real training steps over all budgets, and sampling with cheap CFG."""
    size, side = run.size("B/2", "Nano/2"), run.size(32, 8)
    data = make_data(run.folder / "data", 64, side)
    for name, (family, options) in RUNS.items():
        if name in ON_CUDA and not run.cuda:
            run.note(f"{name}: waits", {}, "needs CUDA")
            continue
        with run.attempt(f"{name}: waits"):
            config = training_config(run, data, f"{family}-{size}", exp_name=name.replace(" ", "-"), batch_size=8, **options)
            with trainer_of(config) as (trainer, batches):
                train_all(trainer, over_budgets(trainer, batches, run.size(max(len(trainer.budgets), 2), 1)))  # caches, graphs
                steps = over_budgets(trainer, batches, run.size(STEPS, 1))
                check(run, name, partial(train_all, trainer, steps))
    with run.attempt("sampling with cheap CFG: waits"):
        sample(run, size, side)


def sample(run: Run, size: str, side: int) -> None:
    """A sampler's loop, without what looks at its result."""
    model = narrow_linears(frozen_model(run, f"ELIT-SiT-{size}", side), AMP_TYPES["bf16"])
    options = {"model": f"ELIT-SiT-{size}", "num_steps": 4, "cfg_scale": 4.0, "mixed_precision": "bf16"}
    loaded = session_of(model, None, (4, side, side), inference_budget="1", unconditional_inference_budget=1 / 4, **options)
    y, indices = torch.arange(4), range(4)

    def loop() -> None:
        with torch.no_grad(), loaded.autocast():
            loaded.flow.sample(model, loaded.shape, 0, indices, y, session.guidance(loaded.config))

    loop()
    check(run, "sampling with cheap CFG", loop)
