"""Snapshots of averaged weights while a run trains (`--snapshot-steps`, `--posthoc-ema`), written in the background."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from checkpoint import power_average, snapshots
from common.files import WriteError
from common.logging import warn
from config.options import TrainConfig
from training.optim import EMA
from training.run_data import RunData
from training.run_dir import RunDir


class SnapshotWriter:
    """Writes what is due at a step; a file that cannot be written is a warning. Rank 0 writes, every process takes part.

    A step's snapshots follow from its training state: a run that resumes there writes them again, in case it was killed meanwhile.
    """

    def __init__(self, config: TrainConfig, run_dir: RunDir, data: RunData):
        self.config, self.run_dir, self.data = config, run_dir, data
        self._options = dataclasses.asdict(config)
        self._pool = ThreadPoolExecutor(1, "snapshot writer")
        self._writing: Future | None = None

    def lengths_due(self, step: int, total_steps: int) -> list[float | None]:
        """Of the snapshots of a step; None: the run's own average."""
        config = self.config
        lengths: list[float | None] = []
        if config.snapshot_steps and _is_due(step, config.snapshot_steps, total_steps):
            lengths.append(None)
        if _is_due(step, config.posthoc_ema_steps, total_steps):
            lengths += config.posthoc_ema
        return lengths

    def save(self, ema: EMA, step: int, total_steps: int) -> None:
        """Copy what is due to the host, and begin to write it."""
        for sigma in self.lengths_due(step, total_steps):
            self.wait()
            name = ema.names[0] if sigma is None else power_average.name(sigma)
            tensors = dict(_on_host(ema, name, torch.float32 if sigma is None else torch.bfloat16, keep=self.run_dir.is_main))
            if self.run_dir.is_main:
                self._writing = self._pool.submit(self._write, step, sigma, tensors)

    def wait(self) -> None:
        """Until the file under way is on the disk."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, step: int, sigma: float | None, tensors: dict[str, Tensor]) -> None:
        told = snapshots.metadata(self._options, self.data.record, step, self.data.text_record)
        if sigma is not None:
            told |= {"sigma_rel": f"{sigma:g}", "run": snapshots.run_hash(self._options, self.data.record)}
        path = snapshots.path_of(self.run_dir.snapshots, step, sigma)
        try:
            snapshots.save(path, tensors, told)
        except (WriteError, OSError) as error:
            warn(f"{path}: this snapshot is missing: {error.strerror}")


def _is_due(step: int, every: int, total_steps: int) -> bool:
    return step > 0 and (step % every == 0 or step == total_steps)


def _on_host(ema: EMA, name: str, dtype: torch.dtype, *, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an average, one after the other to the host; its weights as `dtype`."""
    for key, tensor, is_averaged in ema.tensors(name):
        if keep:
            yield key, tensor.to("cpu", dtype if is_averaged else tensor.dtype, copy=True).contiguous()
