"""The data of a training run, opened and checked."""

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from config.options import TrainConfig
from data.dataset import LatentDataset, channel_record
from models.encoders import encoder_names
from models.vae import VAERecord
from training.data_order import Progress, total_steps


@dataclass(frozen=True)
class RunData:
    """The data of a run, which fit the options."""

    dataset: LatentDataset
    val_data: LatentDataset | None
    record: VAERecord  # of the VAE, with what --latent-norm adds
    batches_per_epoch: int
    total_steps: int  # of a new run

    @functools.cached_property
    def labels_sha256(self) -> str | None:
        """A hash of the labels, in the order of the samples; None where there are none."""
        labels = self.dataset.labels
        return None if labels is None else hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8").tobytes()).hexdigest()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        return (self.record.latent_channels, *self.dataset.shape[1:])


def open_data(config: TrainConfig, num_processes: int) -> RunData:
    """Training and validation data. Raises UserError where they do not fit the options or each other."""
    if config.batch_size % num_processes:
        raise UserError(f"--batch-size {config.batch_size}: must be divisible by the {num_processes} processes")
    dataset = LatentDataset(
        config.data_dir, images=bool(encoder_names(config.enc_type, config.proj_coeff)), cache_dir=config.cache_dir
    )
    dataset.check(num_classes=config.num_classes, resolution=config.resolution)
    val_data = None
    if config.val_data_dir:
        val_data = LatentDataset(config.val_data_dir, cache_dir=config.cache_dir)
        val_data.check(num_classes=config.num_classes, resolution=config.resolution)
        if val_data.record != dataset.record:
            raise UserError(
                f"--val-data-dir {config.val_data_dir}: its latents were made by another VAE than those of --data-dir"
            )
    if len(dataset) < config.batch_size:
        raise UserError(f"--batch-size {config.batch_size}: more than the {len(dataset)} samples in {config.data_dir}")
    per_epoch = len(dataset) // config.batch_size
    total = total_steps(config, Progress(0, 0, len(dataset), config.batch_size), len(dataset))
    if total == 0:
        raise UserError(
            f"--epochs {config.epochs}: {config.epochs * per_epoch} batches are less than --gradient-accumulation-steps {config.gradient_accumulation_steps}"
        )
    record = channel_record(config.data_dir, dataset.latents) if config.latent_norm == "channel" else dataset.record
    return RunData(dataset, val_data, record, per_epoch, total)
