"""Generation as an iterable: the images of a checkpoint, batch by batch and by index, for files or for metrics."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from common import precision
from config.options import GenerateConfig
from flows import OnStage
from sampling import session
from sampling.session import Session

OnStageOf = Callable[[Sequence[int], int, Tensor], None]  # (indices, stage, latents): `flows.OnStage` of a batch


def draw(loaded: Session, config: GenerateConfig, indices: Sequence[int], on_stage: OnStage | None = None) -> Tensor:
    """Images `indices` as uint8 (B, 3, H, W) by the options `config`. on_stage: see `FlowMatching.sample_state`."""
    sampled = loaded.with_options(config)
    y = sampled.condition(indices)
    return sampled.decode(sampled.latents(session.guidance(config), config.global_seed, indices, y, on_stage))


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
    size = max(1, min(config.per_proc_batch_size, -(-len(indices) // processes)))
    for first in range(process * size, -(-len(indices) // (size * processes)) * size * processes, size * processes):
        batch = indices[first : first + size]
        if not batch:
            yield batch, torch.empty(0, 3, config.resolution, config.resolution, dtype=torch.uint8)
            continue

        def report(stage: int, latents: Tensor, batch: Sequence[int] = batch) -> None:
            assert on_stage is not None
            on_stage(batch, stage, latents)

        # Not in inference mode: a training run may use what is cached here, such as masks, where gradients flow.
        with torch.no_grad(), precision.tf32(config.tf32):
            drawn = draw(loaded, config, batch, report if on_stage else None)
        yield batch, drawn
