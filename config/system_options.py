"""Options of train.py for the machines: what is compiled, kept in memory and sent between processes, and --plan."""

import dataclasses
from typing import Literal

from config.rules import option


@dataclasses.dataclass
class ProcessOptions:
    """What scripts have in common that run in several processes."""

    timeout_minutes: float | None = option(
        "system",
        None,
        "minutes that processes wait for each other before they give up (default: 30; a week where one works alone at times)",
        ge=1,
        le=10**6,
        resume="free",
        images=False,
    )


@dataclasses.dataclass
class SystemOptions(ProcessOptions):
    """How a run uses its machines; the model that comes out is the same but for rounding."""

    compile: bool | None = option(
        "system",
        None,
        "torch.compile the blocks and the parts around them (default: on CUDA; --no-compile: nowhere)",
        resume="free",
    )
    comm_dtype: Literal["fp32", "bf16"] = option(
        "system", "fp32", "type in which gradients are summed over the processes", resume="changeable"
    )
    bucket_cap_mb: int = option(
        "system", 25, "MiB of gradients that are summed over the processes at a time", ge=1, le=2**20, resume="free"
    )
    shard: str = option(
        "system",
        "none",
        "split weights, gradients and optimizer over all processes (full), or over groups of N, between which they repeat",
        resume="free",
    )
    gradient_checkpointing: bool = option("system", False, "compute the blocks twice, to keep less in memory", resume="free")
    plan: bool = option(
        "plan", False, "print and check what the run would do, cost and need, and train nothing; needs no GPU", resume="free"
    )
    plan_processes: int | None = option(
        "plan", None, "--plan: number of processes (default: the launcher's)", ge=1, le=2**20, resume="free"
    )
    plan_tflops: float | None = option(
        "plan", None, "--plan: TFLOP/s that a process is taken to sustain, for the time needed", ge=1e-6, le=1e6, resume="free"
    )
    plan_card: str | None = option(
        "plan", None, "--plan: GPU by name, e.g. H100, to estimate a step's time for (default: this machine's)", resume="free"
    )
    plan_per_node: int = option("plan", 8, "--plan: GPUs of a node", ge=1, le=2**20, resume="free")
