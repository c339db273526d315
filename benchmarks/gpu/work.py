"""Real training runs and models for the parts: random latents on the disk, the trainer of train.py, batches at a chosen budget."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

import models
from benchmarks.gpu.record import ROOT, Run
from benchmarks.train_step import disturb
from common.distributed import data_workers
from config.options import GenerateConfig, TrainConfig
from models.dfm import DFMSiT
from models.elit import ELITSiT
from models.sit import SiT
from models.vae import SD_VAE, VAERecord
from sampling.session import Session
from training.setup import resolve
from training.trainer import Trainer

Batch = dict[str, Any]
CLASSES = 1000
SMALL_VAE = ROOT / "experiments_updated" / "quickstart_vae"  # trained on digits; factor 4
TINY = {"num_classes": CLASSES, "elit_group_size": 2, "head_depth": 1, "tail_depth": 1}  # beside the size Nano


def register_nano() -> None:
    """A size below the smallest, for --tiny."""
    for family, constructor in {"SiT": SiT, "ELIT-SiT": ELITSiT, "DFM-SiT": DFMSiT}.items():
        ends = {"head_depth": 1, "tail_depth": 1} if family == "ELIT-SiT" else {}
        models.register(f"{family}-Nano/2", constructor, depth=3, hidden_size=64, num_heads=2, **ends)


def make_data(folder: Path, count: int, side: int, record: VAERecord = SD_VAE) -> Path:
    """A data set of random moments (8, side, side), in the layout that `dataset_tools.py encode` writes."""
    latents = folder / "vae-sd" / "00000"
    latents.mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels = []
    for i in range(count):
        mean, std = rng.standard_normal((4, side, side)), 0.1 + rng.random((4, side, side))
        scaled = np.concatenate([mean / record.scaling_factor + record.shift_factor, 0.1 * std])
        np.save(latents / f"img-mean-std-{i:08d}.npy", scaled.astype(np.float32))
        labels.append([f"00000/img-mean-std-{i:08d}.npy", i % CLASSES])
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    (folder / "vae-sd" / "vae.json").write_text(json.dumps(record.to_dict()))
    return folder


def training_config(run: Run, data: Path, model: str, **options: Any) -> TrainConfig:
    """Options of a run on the data: all budgets, everything else as it is unless `options` say otherwise."""
    tiny = TINY if run.tiny else {}
    J = tiny.get("elit_group_size", 4) ** 2
    elastic = {"elit_min_mask_prob": 0.0, "elit_max_mask_prob": 1 - 1 / J} if "ELIT" in model else {}
    fixed = {"report_to": "none", "sampling_steps": 0, "output_dir": str(run.folder), "data_dir": str(data), "epochs": 10**9}
    fixed |= {
        "num_workers": run.size(4, 0),
        "resolution": run.size(256, 64),
        "mixed_precision": "bf16",
        "max_train_steps": 10**9,
    }
    return TrainConfig(**cast(Any, {"model": model, "compile": False, **fixed, **tiny, **elastic, **options}))


@contextlib.contextmanager
def trainer_of(config: TrainConfig) -> Iterator[tuple[Trainer, Iterator[Batch]]]:
    """The trainer of these options as train.py makes it, at its first step, and its batches."""
    try:
        trainer = Trainer(resolve(config))
        trainer.open()
        with data_workers(trainer.loader, "") as batches:
            yield trainer, batches
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # the next one may have another precision
        GradientState._reset_state()


def at(batch: Batch, index: int, count: int, stage: float = 0.0) -> Batch:
    """The batch with draws that pick the `index`th of `count` budgets, and DFM's stage."""
    return {**batch, "draws": dataclasses.replace(batch["draws"], level=(index + 0.5) / count, stage=stage)}


def first_images(batch: Batch, count: int) -> Batch:
    """The first so many images of a batch of moments and labels."""
    part = {key: value[:count] for key, value in batch.items() if key != "draws"}
    return {**part, "draws": batch["draws"].rows(torch.arange(count))}


def train_step(trainer: Trainer, batch: Batch) -> None:
    """One step of the training loop."""
    trainer.step += 1
    trainer.train_step(iter([batch]))


def over_budgets(trainer: Trainer, batches: Iterator[Batch], count: int) -> list[Batch]:
    """The next batches of the loader, at all budgets in turn, and at DFM's stages."""
    n = len(trainer.budgets)
    return [at(next(batches), i % n, n, stage=0.95 * (i % 2)) for i in range(count)]


def host_seconds(device: torch.device, job: Any, repeats: int) -> float:
    """The shortest time in which the host issues a job to a device that has nothing else to do."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        job()
        times.append(time.perf_counter() - begin)
    return min(times)


def frozen_model(run: Run, name: str, side: int, **sizes: Any) -> nn.Module:
    """A model with random weights, none of them at zero, ready to sample."""
    torch.manual_seed(0)
    options = {"input_size": side, **(TINY if run.tiny else {}), **sizes}
    with run.device:
        return disturb(models.create_model(name, **options)).eval().requires_grad_(False)


def session_of(network: nn.Module, vae: Any, shape: Sequence[int], **options: Any) -> Session:
    """The network, ready to draw as generate.py does; `options`: of generate.py."""
    config = GenerateConfig(ckpt="random weights", num_classes=CLASSES, **options)
    return Session(config, network, vae, None, cast(tuple[int, int, int], tuple(shape)))
