"""Figures of images that are in memory: what `evaluate.py` gives for their .npz file, without the file."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from common.errors import UserError
from common.precision import tf32
from config.tool_options import MetricOptions
from metrics import reference_cache
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
        ref: the reference and its features (on the main process, once a set has been scored).
    """

    def __init__(
        self,
        options: MetricOptions,
        count: int,
        size: tuple[int, int],
        state: PartialState,
        warn: Warn,
        prompts: Sequence[str] | None = None,
    ):
        """Check, and load the networks. The reference is looked at when the first set is scored, or by `look_at_reference`.

        Args:
            options: `ref`, `metrics` (none: all that reference and network allow), networks, `batch_size` of the networks.
            count: images of a set (the smallest one, where they differ).
            size: (height, width) of the images.
            state: of this process.
            warn: called with what may surprise a user.
            prompts: those that the images go round, in words, where they are known.

        Raises:
            UserError: as of `evaluate.py`: reference, metrics, networks.
        """
        self._options, self._state, self._size, self._warn = options, state, size, warn
        ref = open_images(options.ref)
        if ref.count and ref.size != size:
            (h1, w1), (h2, w2) = ref.size, size
            raise UserError(f"{options.ref}: has images of {w1}x{h1} pixels, but those to be scored have {w2}x{h2}")
        with tf32(False):
            sets = ref, DrawnImages(count, size)
            self.metrics, self.ref, samples, self.networks = prepare(options, sets, state, warn, prompts)
        self._gather, self._keep = samples.gather, samples.keep
        self._is_ready = False

    @cached_property
    def ref_sha256(self) -> str:
        """Of the reference; reading all of it finds damage."""
        return self.ref.images.sha256()

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the figures beside the images: reference, networks, metrics and their options."""
        fields = dataclasses.fields(MetricOptions)
        options = {f.name: getattr(self._options, f.name) for f in fields if f.metadata["group"] == "metrics"}
        weights = {name for name in options if name.endswith(("_weights", "clip_score"))}  # told by their hash
        return {name: value for name, value in options.items() if name not in weights} | {
            "ref_sha256": self.ref_sha256,
            "metrics": sorted(self.metrics),
            "networks": sorted(network.identity for network in self.networks),
        }

    def score(self, batches: Iterable[Batch], count: int, name: str = "images") -> dict[str, float] | None:
        """The figures of a set, by metric; None off the main process.

        The same as those of `evaluate.py` for the set in an .npz file, on any number of processes.

        Args:
            batches: this process's share of the images, indices and uint8 (B, 3, H, W): see `sampling.images.images`.
            count: images of all processes.
            name: what they are, for the progress bar.
        """
        self.look_at_reference()
        samples = Features(DrawnImages(count, self._size), self._gather, self._keep)
        with tf32(False):
            gather(samples, self.networks, batches, self._options.batch_size, self._state, name)
            if not self._state.is_main_process:
                return None
            return compute(
                self._options, self.metrics, self.ref, samples, self.networks, device_of(self._state), progress=False
            )

    def look_at_reference(self) -> None:
        """Fill in the features of the reference, from the file beside it where there is one."""
        if self._is_ready or not self.ref.wanted:
            return
        is_main, path = self._state.is_main_process, None
        networks = [network for network in self.networks if self.ref.wanted & network.dims.keys()]
        with tf32(False):
            if is_main:
                path = reference_cache.path_of(self.ref, networks, self.ref_sha256)
            (is_kept,) = broadcast_object_list(
                [path is not None and reference_cache.read(path, self.ref, networks, self._warn)]
            )
            if not is_kept:
                batches = read_batches(self.ref, self._options.batch_size, self._state)
                gather(self.ref, networks, batches, self._options.batch_size, self._state, "reference")
                if path is not None:
                    reference_cache.write(path, self.ref, networks, self._warn)
        self._is_ready = True
