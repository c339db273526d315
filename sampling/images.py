"""Generation as an iterable: the images of a checkpoint, batch by batch and by index, for files or for metrics."""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from common import precision
from common.sizes import sides
from config.options import GenerateConfig
from flows import OnStage
from sampling import session
from sampling.session import Session

AHEAD = 1  # batches that are sampled on CUDA before one is handed out: it is decoded meanwhile

OnStageOf = Callable[[Sequence[int], int, Tensor], None]  # (indices, stage, latents): `flows.OnStage` of a batch


def latents_of(loaded: Session, config: GenerateConfig, indices: Sequence[int], on_stage: OnStage | None = None) -> Tensor:
    """Latents (B, C, h, w) of the images `indices` by the options `config`. on_stage: see `FlowMatching.sample_state`."""
    sampled = loaded.with_options(config)
    return sampled.latents(session.guidance(config), config.global_seed, indices, sampled.condition(indices), on_stage)


def draw(loaded: Session, config: GenerateConfig, indices: Sequence[int], on_stage: OnStage | None = None) -> Tensor:
    """Images `indices` as uint8 (B, 3, H, W); otherwise as `latents_of`."""
    return loaded.decode(latents_of(loaded, config, indices, on_stage))


class Decoding:
    """Images that are being decoded: on CUDA on a stream of its own, while the host goes on to sample the next batch."""

    def __init__(self, loaded: Session, latents: Tensor):
        self._stream = _decoding_stream(latents.device) if latents.is_cuda else None
        if self._stream is None:
            self._images = loaded.decode(latents)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._images = loaded.decode(latents)
        latents.record_stream(self._stream)

    def images(self) -> Tensor:
        """Uint8 (B, 3, H, W)."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._images.record_stream(torch.cuda.current_stream())
        return self._images


@functools.cache
def _decoding_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def images(
    loaded: Session,
    config: GenerateConfig,
    indices: Sequence[int],
    process: int = 0,
    processes: int = 1,
    on_stage: OnStageOf | None = None,
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """The share of one process of the images `indices`, batch by batch: their indices, and uint8 (B, 3, H, W) on the device.

    Image i depends on (global_seed, i) alone. Batches are successive parts of `indices`, dealt out in turns, so that one process
    draws the same batches as several. Every process gets the same number of batches, so that callers may meet after each one:
    where none is left for it in the last turn, it gets an empty batch.

    Args:
        loaded: the checkpoint, or a model that is being trained (in eval mode).
        config: the options of sampling; `per_proc_batch_size` images are drawn at a time, fewer where that would leave a
            process without work.
        indices: of all processes' images.
        process: which process this is.
        processes: how many there are.
        on_stage: called with a batch's indices and each coarser stage, as soon as it is ready; see `FlowMatching.sample_state`.

    Raises:
        UserError: latents are not finite.
    """
    ahead = AHEAD if loaded.device.type == "cuda" else 0
    waiting: deque[tuple[Sequence[int], Decoding | None]] = deque()
    size = max(1, min(config.per_proc_batch_size, -(-len(indices) // processes)))
    for first in range(process * size, -(-len(indices) // (size * processes)) * size * processes, size * processes):
        batch = indices[first : first + size]
        waiting.append((batch, _start(loaded, config, batch, on_stage) if batch else None))
        if len(waiting) > ahead:
            yield _finish(*waiting.popleft(), config)
    while waiting:
        yield _finish(*waiting.popleft(), config)


def _start(loaded: Session, config: GenerateConfig, batch: Sequence[int], on_stage: OnStageOf | None) -> Decoding:
    def report(stage: int, latents: Tensor) -> None:
        assert on_stage is not None
        on_stage(batch, stage, latents)

    # Not in inference mode: a training run may use what is cached here, such as masks, where gradients flow.
    with torch.no_grad(), precision.tf32(config.tf32):
        return Decoding(loaded, latents_of(loaded, config, batch, report if on_stage else None))


def _finish(batch: Sequence[int], decoding: Decoding | None, config: GenerateConfig) -> tuple[Sequence[int], Tensor]:
    if decoding is None:
        return batch, torch.empty(0, 3, *sides(config.resolution), dtype=torch.uint8)
    return batch, decoding.images()
