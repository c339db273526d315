"""The data of a training run, opened and checked."""

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

import models
from common.errors import UserError
from common.sizes import check_divisible
from config.options import TrainConfig
from data.dataset import LatentDataset, normalised_record
from models.encoders import encoder_names
from models.text_encoders import TextRecord
from models.vae import VAERecord
from sampling.conditions import Conditions, DataPrompts, Labels
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
        """A hash of the labels, in the order of the samples; None where there are none, or text is trained on."""
        labels = self.dataset.labels if self.dataset.text is None else None
        return None if labels is None else hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8").tobytes()).hexdigest()

    @functools.cached_property
    def conditions(self) -> Conditions:
        """What pictures are drawn from: labels, or the first captions of the held-out images, else of the training images."""
        data = self.val_data or self.dataset
        return Labels() if data.text is None else DataPrompts(data.text, str(data.data_dir))

    @property
    def text_record(self) -> TextRecord | None:
        """What the captions' features are; None for a model of class labels."""
        return None if self.dataset.text is None else self.dataset.text.record

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        _, rows, columns = self.dataset.shape
        return self.record.latent_channels, rows, columns


def takes_text(config: TrainConfig) -> bool:
    """Whether the run's model is conditioned on text, and not on class labels."""
    return config.condition == "text" or models.model_spec(config.model).text


def open_data(config: TrainConfig, num_processes: int) -> RunData:
    """Training and validation data. Raises UserError where they do not fit the options or each other."""
    if config.batch_size % num_processes:
        raise UserError(f"--batch-size {config.batch_size}: must be divisible by the {num_processes} processes")
    text = takes_text(config)
    num_classes = None if text else config.num_classes
    images = bool(encoder_names(config.enc_type, config.proj_coeff))
    open_set = functools.partial(LatentDataset, text=text, cache_dir=config.cache_dir, cache_size=config.cache_size)
    dataset = open_set(config.data_dir, images=images, flip=config.flip)
    factor, patch = dataset.record.downsample_factor, models.model_spec(config.model).sizes.get("patch_size", 1)
    why = f"{config.model} on latents of factor {factor} needs multiples of {factor * patch}"
    check_divisible(config.resolution, factor * patch, why)
    dataset.check(num_classes=num_classes, resolution=config.resolution)
    val_data = None
    if config.val_data_dir:
        val_data = open_set(config.val_data_dir)
        val_data.check(num_classes=num_classes, resolution=config.resolution)
        if dataset.text is not None and val_data.text is not None:
            where = f"--val-data-dir {config.val_data_dir}", f"--data-dir {config.data_dir}"
            val_data.text.record.check_same(dataset.text.record, *where)
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
    record = dataset.record
    if config.latent_norm != "vae":
        record = normalised_record(config.data_dir, dataset.latents, config.latent_norm)
    return RunData(dataset, val_data, record, per_epoch, total)
