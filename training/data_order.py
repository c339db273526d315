"""Which samples a process reads in which step."""

import signal
from collections.abc import Iterator

from common.distributed import end_with_parent
from randomness import epoch_order
from training.preemption import SIGNALS


class StepBatches:
    """For each forward from `start` on, the indices of this process's slice of the global batch.

    The order of an epoch is a permutation from (seed, epoch); its last partial batch is dropped.
    """

    def __init__(self, num_samples: int, batch_size: int, places: range, seed: int, start: int, stop: int):
        self.num_samples, self.batch_size, self.places = num_samples, batch_size, places
        self.seed, self.start, self.stop = seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.num_samples // self.batch_size
        order = epoch = None
        for n in range(self.start, self.stop):
            if epoch != n // per_epoch:
                epoch = n // per_epoch
                order = epoch_order(self.seed, epoch, self.num_samples)
            first = n % per_epoch * self.batch_size
            yield order[first + self.places.start : first + self.places.stop].tolist()


def init_data_worker(_) -> None:
    """In data workers: only the end of training ends them. A signal to the whole group must not take from it what the last step needs."""
    end_with_parent()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
