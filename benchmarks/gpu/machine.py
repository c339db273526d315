"""The machine: versions, and the rates that everything else is divided by."""

import importlib.metadata
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.record import ROOT, Entry, Run
from benchmarks.train_step import durations
from common import precision

PRODUCTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "TF32": torch.float32, "fp32": torch.float32}


def seconds_of(device: torch.device, job: Callable[[], object], repeats: int = 10, warmup: int = 2) -> float:
    """The median time of a job: between events on a GPU, which may run behind the host."""
    for _ in range(warmup):
        job()
    return statistics.median(durations(device, time.perf_counter, *[job] * repeats))


def versions() -> Entry:
    """What runs: name → version. A machine's PyTorch may be another one than the pinned."""
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    found = {"torch": torch.__version__, "torch pinned": pinned and pinned[1], "Python": platform.python_version()}
    for name in ("accelerate", "diffusers", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    if not torch.cuda.is_available():
        return found | {"card": "none: CPU"}
    card = torch.cuda.get_device_properties(0)
    return found | {
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "missing",
        "driver": driver(),
        "card": card.name,
        "card GiB": round(card.total_memory / 2**30, 1),
        "compute capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
    }


def driver() -> str:
    """The driver's version, by nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return (told.stdout.split() or ["unknown"])[0]


def copy_rate(source: Tensor, dest: Tensor) -> float:
    """Bytes per second that `dest` gets from `source`."""
    device = source.device if source.is_cuda else dest.device
    return source.nbytes / seconds_of(device, partial(dest.copy_, source, non_blocking=True))


def host_memory(size: int, run: Run) -> Tensor:
    """So many bytes of the host, page-locked where there is a GPU."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=run.cuda)


def machine(run: Run) -> None:
    """Rates of matrix products and copies."""
    n = run.size(8192, 128)
    for name, dtype in PRODUCTS.items():
        with run.attempt(f"{name} products"), precision.tf32(name == "TF32"):
            a, b = (torch.randn(n, n, device=run.device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            seconds = seconds_of(run.device, partial(torch.mm, a, b, out=out))
            run.note(f"{name} products", {"TFLOP/s": 2 * n**3 / seconds / 1e12})
    size = run.size(2**31, 2**20)
    source, dest = (torch.randint(255, (size,), dtype=torch.uint8, device=run.device) for _ in range(2))
    run.note("device copy", {"GB/s read and written": 2 * copy_rate(source, dest) / 1e9})
    run.note("device to page-locked host", {"GB/s": copy_rate(source, host_memory(size, run)) / 1e9})
