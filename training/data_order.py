"""Which samples a process reads in which step."""

import dataclasses
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from common.distributed import end_with_parent
from common.early_signals import SIGNALS
from config.options import TrainConfig
from data.captions import caption_of
from data.dataset import LatentDataset
from randomness import Draws, epoch_order, image_flips, split_draws

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


class Batch(list[int]):
    """The indices of the samples of one forward, the `forward`th of the run."""

    def __init__(self, indices: Iterable[int], forward: int):
        super().__init__(indices)
        self.forward = forward

    def __reduce__(self) -> tuple:
        return Batch, (list(self), self.forward)


class StepBatches:
    """For each place from `start` up to `stop` in the data order, the indices of this process's slice of the global batch.

    The order of an epoch is a permutation from (seed, epoch); its last partial batch is dropped.
    """

    def __init__(
        self, num_samples: int, batch_size: int, batch_slice: range, seed: int, start: int, stop: int, forward: int = 0
    ):
        """start, stop: places in the data order, in global batches from the start of the first epoch. forward: that of `start`."""
        self.num_samples, self.batch_size, self.batch_slice = num_samples, batch_size, batch_slice
        self.seed, self.start, self.stop, self.forward = seed, start, stop, forward

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Batch]:
        per_epoch = self.num_samples // self.batch_size
        order = epoch = None
        for n in range(self.start, self.stop):
            if order is None or epoch != n // per_epoch:
                epoch = n // per_epoch
                order = epoch_order(self.seed, epoch, self.num_samples)
            first = n % per_epoch * self.batch_size
            indices = order[first + self.batch_slice.start : first + self.batch_slice.stop].tolist()
            yield Batch(indices, self.forward + n - self.start)


class StepItems(dict[str, Any]):
    """A batch with its draws, which travel from a data worker in the same piece of memory: the training process opens no more of them."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        others = dict(self)
        moments, draws = others.pop("moments"), others.pop("draws")
        _, (flat, *form) = draws.__reduce__()
        return _unpack_items, (torch.cat([moments.flatten(), flat]), moments.shape, form, others)


def _unpack_items(flat: Tensor, shape: torch.Size, form: Sequence[Any], others: dict[str, Any]) -> dict[str, Any]:
    moments, draws = flat[: shape.numel()].view(shape), split_draws(flat[shape.numel() :], *form)
    return {**others, "moments": moments, "draws": draws}


class StepData(Dataset):
    """The samples of a forward with its draws, both made where the data is read: in the data workers, if there are any.

    Of an image with several captions, and of one and its mirror image, each forward draws one, by (seed, forward, place in the
    global batch).
    """

    def __init__(
        self,
        dataset: LatentDataset,
        draw: Callable[[int], Draws],
        seed: int = 0,
        first_place: int = 0,
        image_forwards: float = math.inf,
    ):
        """first_place: of this process's slice of the global batch. image_forwards: how many of the first forwards need images."""
        self.dataset, self.draw, self.seed, self.first_place = dataset, draw, seed, first_place
        self.image_forwards = image_forwards

    def __getitems__(self, batch: Batch) -> dict[str, Any]:
        """The collated samples, and under "draws" what `draw` gives for the forward."""

        def choose(place: int, count: int) -> int:
            return caption_of(self.seed, batch.forward, self.first_place + place, count)

        options: dict[str, Any] = {} if self.dataset.text is None else {"choose_caption": choose}
        options |= {"images": False} if batch.forward >= self.image_forwards else {}
        if self.dataset.flip:
            places = range(self.first_place, self.first_place + len(batch))
            options["mirrored"] = image_flips(self.seed, batch.forward, places)
        items = self.dataset.__getitems__(batch, **options)
        return StepItems(default_collate(items), draws=self.draw(batch.forward))


def create_loader(
    dataset: LatentDataset,
    draw: Callable[[int], Draws],
    batches: StepBatches,
    num_workers: int,
    device: torch.device,
    image_forwards: float = math.inf,
) -> DataLoader:
    """The loader of a process's batches, whose memory a GPU can copy from without waiting; image_forwards: see `StepData`."""
    return DataLoader(
        StepData(dataset, draw, batches.seed, batches.batch_slice.start, image_forwards),
        batch_sampler=cast(Any, batches),
        collate_fn=cast(Any, _as_it_is),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        worker_init_fn=init_data_worker,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def init_data_worker(_: int) -> None:
    """In data workers: only the end of training ends them. A signal to the whole group must not take from it what the last step needs."""
    end_with_parent()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
