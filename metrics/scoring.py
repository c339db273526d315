"""Figures of images that are in memory: what `evaluate.py` gives for their .npz file, without the file."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from accelerate import PartialState

from config.tool_options import MetricOptions
from metrics.evaluation import Warn, compute, device_of, prepare
from metrics.features import Batch, Features, gather, read_batches
from metrics.images import ImageSet, open_images


class DrawnImages(ImageSet):
    """Images that are drawn while they are looked at: only their number and size are known before."""

    def __init__(self, count: int, size: tuple[int, int]):
        super().__init__(Path("drawn images"))
        self.count, self.size = count, size

    def read(self, span: range) -> np.ndarray:
        """Black images, to try a network on."""
        return np.zeros((len(span), *self.size, 3), np.uint8)


class Scorer:
    """A reference with its features, and the networks: against these, any number of sets is scored.

    All processes make one and call it alike.

    Attributes:
        metrics: those that are computed.
        networks: by which.
        ref: the reference and its features (on the main process).
    """

    def __init__(self, options: MetricOptions, count: int, size: tuple[int, int], state: PartialState, warn: Warn):
        """Check, load the networks, and look at the reference.

        Args:
            options: `ref`, `metrics` (none: all that reference and network allow), networks, `batch_size` of the networks.
            count: images of a set (the smallest one, where they differ).
            size: (height, width) of the images.
            state: of this process.
            warn: called with what may surprise a user.

        Raises:
            UserError: as of `evaluate.py`: reference, metrics, networks.
        """
        self._options, self._state, self._size = options, state, size
        self.metrics, self.ref, samples, self.networks = prepare(
            options, [open_images(options.ref), DrawnImages(count, size)], state, warn
        )
        self._gather, self._keep = samples.gather, samples.keep
        reference = read_batches(self.ref, options.batch_size, state)
        gather(self.ref, self.networks, reference, options.batch_size, state, "reference")

    def score(self, batches: Iterable[Batch], count: int, name: str = "images") -> dict[str, float] | None:
        """The figures of a set, by metric; None off the main process.

        The same as those of `evaluate.py` for the set in an .npz file, on any number of processes.

        Args:
            batches: this process's share of the images, indices and uint8 (B, 3, H, W): see `sampling.images.images`.
            count: images of all processes.
            name: what they are, for the progress bar.
        """
        samples = Features(DrawnImages(count, self._size), self._gather, self._keep)
        gather(samples, self.networks, batches, self._options.batch_size, self._state, name)
        if not self._state.is_main_process:
            return None
        return compute(self._options, self.metrics, self.ref, samples, self.networks, device_of(self._state))
