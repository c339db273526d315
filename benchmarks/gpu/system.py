"""What is around the model: saving checkpoints, and figures of nearest neighbours."""

import time
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.machine import copy_rate, host_memory, seconds_of
from benchmarks.gpu.record import Run
from benchmarks.gpu.work import make_data, train_step, trainer_of, training_config
from common import precision
from metrics.precision_recall import precision_recall

PAUSE = 1.5  # of what the copy alone takes
SAME, SECONDS = 1e-3, 10.0


def saving(run: Run) -> None:
    """How long training waits for a checkpoint: for the first, whose memory is made, and for the second."""
    data = make_data(run.folder / "data", 16, run.size(32, 8))
    config = training_config(run, data, f"ELIT-SiT-{run.size('B', 'Nano')}/2", exp_name="saving", batch_size=8)
    with trainer_of(config) as (trainer, batches):
        train_step(trainer, next(batches))
        size = sum(x.nbytes for x in tree_leaves(trainer.state()) if isinstance(x, Tensor))
        pauses = []
        for name in ("first", "second"):
            train_step(trainer, next(batches))
            if run.cuda:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            trainer.save()
            pauses.append(time.perf_counter() - begin)
            trainer.writer.wait()
            written = time.perf_counter() - begin - pauses[-1]
            run.note(f"{name} checkpoint", {"GB": size / 1e9, "pause ms": 1000 * pauses[-1], "then written in s": written})
            if trainer.writer.error is not None:
                raise trainer.writer.error
    block = min(size, run.size(2**31, 2**20))
    rate = copy_rate(torch.empty(block, dtype=torch.uint8, device=run.device), host_memory(block, run))
    run.check("second pause ÷ time of the copy alone", pauses[1] / (size / rate), PAUSE, is_time=True)


def clusters(count: int, width: int, seed: int, device: torch.device) -> Tensor:
    """Features (count, width) around a few centres, as those of images are; made on the CPU."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, width, generator=torch.Generator().manual_seed(0))
    places = torch.randint(20, (count,), generator=random)
    return (centres[places] + 0.5 * torch.randn(count, width, generator=random)).to(device)


def neighbours(run: Run) -> None:
    """Precision and recall on the device against the CPU, and the time at a real evaluation's size."""
    count, width = run.size((2000, 2048), (200, 16))
    for dtype in ("float16", "float32"):
        with run.attempt(f"{dtype}: against the CPU"), precision.tf32(False):
            sets = [clusters(count, width, seed, run.device) for seed in (1, 2)]
            own = precision_recall(*sets, dtype=dtype, device=run.device)
            by_cpu = precision_recall(*(x.cpu() for x in sets), dtype=dtype)
            worst = max(abs(a - b) for a, b in zip(own, by_cpu, strict=True))
            run.note(f"{dtype}: precision, recall", {"precision": own[0], "recall": own[1]})
            run.check(f"{dtype}: largest difference from the CPU", worst, SAME)
    sizes = run.size((10_000, 50_000), (200, 400))
    with run.attempt("time at full size"), precision.tf32(False):
        sets = [torch.randn(n, width, device=run.device) for n in sizes]
        seconds = seconds_of(run.device, partial(precision_recall, *sets, device=run.device), 1, warmup=run.size(1, 0))
        run.check(f"{sizes[0]:,} × {sizes[1]:,}: seconds", seconds, SECONDS, is_time=True)
