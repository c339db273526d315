"""Features of a set of images: networks run over batches on any number of processes, and their statistics and rows gathered."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from common.files import DataError
from metrics.feature_extractors import Network
from metrics.images import ImageSet
from metrics.statistics import RunningStatistics

IN_FILE = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s"), "dinov2": ("mu_dinov2", "sigma_dinov2")}

Gaussian = tuple[np.ndarray, np.ndarray]  # mean (d,), covariance (d, d)
Batch = tuple[Sequence[int], Tensor]  # indices, and images uint8 (B, 3, H, W)
Found = tuple[Sequence[int], dict[str, np.ndarray]]  # indices, and features by kind, each (B, d)


class Features:
    """What is known of one set: statistics by kind of feature, given by the file or gathered, and the rows that are kept."""

    def __init__(self, images: ImageSet, gather: set[str], keep: set[str]):
        self.images, self.gather, self.keep = images, gather, keep
        self.gathered: dict[str, RunningStatistics] = {}
        self.gaussians: dict[str, Gaussian] = {}  # of kinds that were gathered before
        self.rows: dict[str, np.ndarray] = {}  # (N, d) float32
        self.device: torch.device | None = None  # of statistics; None: by NumPy
        self._taken = 0

    @property
    def wanted(self) -> set[str]:
        """The kinds of features that the networks must give."""
        return self.gather | self.keep

    def take(self, indices: Sequence[int], batch: dict[str, np.ndarray]) -> None:
        """Add the features of the next images; `indices` are the images'."""
        if list(indices) != list(range(self._taken, self._taken + len(indices))):
            raise ValueError(f"images {indices[0]} ff. after image {self._taken - 1}: batches must follow each other")
        for kind, values in batch.items():
            if kind in self.gather:
                self.gathered.setdefault(kind, RunningStatistics(values.shape[1], self.device)).update(values)
            if kind in self.keep:
                if kind not in self.rows:
                    self.rows[kind] = np.empty((self.images.count, values.shape[1]), np.float32)
                self.rows[kind][self._taken : self._taken + len(values)] = values
        self._taken += len(indices)

    @property
    def complete(self) -> bool:
        """Whether the features of all images have been taken, where any are wanted."""
        return not self.wanted or self._taken == self.images.count

    def gaussian(self, kind: str) -> Gaussian:
        """Mean and covariance of one kind of features."""
        if kind in self.gaussians:
            return self.gaussians[kind]
        if kind in self.gather:
            return self.gathered[kind].mean, self.gathered[kind].covariance
        mean, covariance = IN_FILE[kind]
        return self.images.statistics[mean], self.images.statistics[covariance]


def read_batches(features: Features, batch_size: int, state: PartialState) -> Iterator[Batch]:
    """This process's share of a set's images: fixed spans of their indices, dealt out in turns; read ahead by a thread."""
    images = features.images
    if not features.wanted:
        return
    step = batch_size * state.num_processes
    firsts = range(batch_size * state.process_index, -(-images.count // step) * step, step)
    spans = [range(images.count)[i : i + batch_size] for i in firsts]

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read_batch, images, spans[0])
        for span, following in zip(spans, [*spans[1:], range(0)], strict=True):
            batch = ahead.result()
            ahead = reader.submit(read_batch, images, following)  # while the networks work
            yield span, batch


def read_batch(images: ImageSet, span: range) -> Tensor:
    """Images `span` of a set, which may be empty: uint8 (B, 3, H, W)."""
    pixels = images.read(span) if span else np.empty((0, *images.size, 3), np.uint8)
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def gather(
    features: Features, used: Sequence[Network], batches: Iterable[Batch], batch_size: int, state: PartialState, name: str
) -> None:
    """Run the networks over one set, where anything is wanted of it; `features` is filled on the main process.

    Args:
        features: of the set, to be filled.
        used: the networks.
        batches: this process's share of the images (indices, uint8 (B, 3, H, W)). Successive batches go to the processes in
            turns, and all processes get equally many, of which the last may be empty: features are taken in the images' order,
            and the result is that of one process.
        batch_size: of the networks; larger batches are split.
        state: of this process.
        name: what the images are, for the progress bar.
    """
    if not features.wanted:
        return
    if state.device is not None and state.device.type == "cuda":
        features.device = state.device
    needed = [n for n in used if features.wanted & n.dims.keys()]
    with tqdm(total=features.images.count, desc=name, unit="image", disable=not state.is_main_process) as bar:
        for indices, images in batches:
            found = None
            if len(indices):
                where = f"{features.images.path}: image {indices[0]} ff."
                found = indices, features_of(needed, (indices, images), features.wanted, batch_size, where)
            for part in _gathered(found, state):
                if part is not None:
                    features.take(*part)
                    bar.update(len(part[0]))
    if state.is_main_process and not features.complete:
        raise ValueError(f"{features.images.path}: batches hold fewer than {features.images.count} images")


def features_of(used: Sequence[Network], batch: Batch, wanted: set[str], batch_size: int, where: str) -> dict[str, np.ndarray]:
    """The wanted features of a batch, each (B, d) float32. `DataError` for values that are not finite."""
    indices, images = batch
    found: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for number, part in enumerate(images.cpu().contiguous().split(batch_size)):
            for network in used:
                given = network.features(part, indices[number * batch_size :][: len(part)])
                for kind in network.dims.keys() & wanted:
                    found.setdefault(kind, []).append(given[kind].flatten(1).float().cpu())
    arrays = {kind: torch.cat(values).numpy() for kind, values in found.items()}
    for kind, values in arrays.items():
        if not np.isfinite(values).all():
            raise DataError(f"{where}: its {kind} features hold values that are not finite; are the weights whole?")
    return arrays


def _gathered(found: Found | None, state: PartialState) -> list[Found | None]:
    """What each process found, in order, on the main process; nothing elsewhere."""
    if state.num_processes == 1:
        return [found]
    received: list[Any] | None = [None] * state.num_processes if state.is_main_process else None
    torch.distributed.gather_object(found, received, dst=0)
    return received or []
