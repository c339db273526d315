"""Which samples a process reads in which step."""

import dataclasses
import math
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from common.distributed import end_with_parent
from common.early_signals import SIGNALS
from config.options import TrainConfig
from data.dataset import LatentDataset
from randomness import epoch_order

DATA_POSITION = "data_position"  # in checkpoints


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands in its data: after `step` optimizer steps, `position` batches from the start of the first epoch."""

    step: int
    position: int
    num_samples: int
    batch_size: int

    @classmethod
    def of_state(cls, state: dict[str, Any], num_samples: int) -> "Progress":
        """That of a checkpoint. Older ones record no position, the oldest not even the number of samples: it is `num_samples`."""
        config, step = TrainConfig(**state["config"]), state["step"]
        position = state.get(DATA_POSITION, step * config.gradient_accumulation_steps)
        return cls(step, position, state.get("data_size", num_samples), config.batch_size)

    def converted(self, num_samples: int, batch_size: int) -> "Progress":
        """The same place counted in batches of another size: a batch that begins no earlier, so that nothing is read twice."""
        if (num_samples, batch_size) == (self.num_samples, self.batch_size):
            return self
        epoch, batch = divmod(self.position, self.num_samples // self.batch_size)
        per_epoch = num_samples // batch_size
        position = epoch * per_epoch + min(math.ceil(batch * self.batch_size / batch_size), per_epoch)
        return Progress(self.step, position, num_samples, batch_size)


def total_steps(config: TrainConfig, progress: Progress, num_samples: int) -> int:
    """The optimizer step at which a run of `num_samples` samples ends, by --max-train-steps and --epochs."""
    progress = progress.converted(num_samples, config.batch_size)
    remaining = config.epochs * (num_samples // config.batch_size) - progress.position
    return min(config.max_train_steps, progress.step + remaining // config.gradient_accumulation_steps)


class StepBatches:
    """For each place from `start` up to `stop` in the data order, the indices of this process's slice of the global batch.

    The order of an epoch is a permutation from (seed, epoch); its last partial batch is dropped.
    """

    def __init__(self, num_samples: int, batch_size: int, batch_slice: range, seed: int, start: int, stop: int):
        """start, stop: places in the data order, in global batches from the start of the first epoch."""
        self.num_samples, self.batch_size, self.batch_slice = num_samples, batch_size, batch_slice
        self.seed, self.start, self.stop = seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.num_samples // self.batch_size
        order = epoch = None
        for n in range(self.start, self.stop):
            if order is None or epoch != n // per_epoch:
                epoch = n // per_epoch
                order = epoch_order(self.seed, epoch, self.num_samples)
            first = n % per_epoch * self.batch_size
            yield order[first + self.batch_slice.start : first + self.batch_slice.stop].tolist()


def create_loader(dataset: LatentDataset, batches: StepBatches, num_workers: int, device: torch.device) -> DataLoader:
    """The loader of a process's batches, whose memory a GPU can copy from without waiting."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        worker_init_fn=init_data_worker,
    )


def init_data_worker(_: int) -> None:
    """In data workers: only the end of training ends them. A signal to the whole group must not take from it what the last step needs."""
    end_with_parent()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
