"""What every study needs of a trained model: held-out losses and samples, each computed once and kept beside the run."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import models
from checkpoint import training_state
from checkpoint.weights import Weights
from common.errors import UserError
from common.files import write_atomically
from config.options import TrainConfig
from config.rules import option
from data.dataset import LatentDataset
from experiments_updated import digit_classifier
from experiments_updated.quickstart_report import ReportConfig, losses_of_draws
from experiments_updated.studies.spread import gather_patches
from flows import flow_of
from metrics import frechet_distance
from models.elit import Elastic
from models.vae import sample_latents
from randomness import generator, normal
from sampling import cost, session
from sampling.conditions import labels_of
from sampling.images import latents_of
from sampling.patches import patches_of
from sampling.session import Session
from training.budgets import mean_training_flops


@dataclasses.dataclass
class StudyConfig:
    """Options of studies/report.py."""

    study: str = option("files", ..., "which study: the name of its script")
    runs: str = option("files", ..., "folder of the trained models")
    models: list[str] = option("files", ..., "the models to compare, the baseline first")
    val_data_dir: str = option("data", ..., "held-out data set")
    output_dir: str = option("output", "experiments_updated/studies/results", "folder of STUDY.json, STUDY.md and pictures")
    samples: int = option("sample", 60, "canvases drawn of each model and budget", ge=10, le=10**6)
    num_steps: int = option("sample", 16, "sampling steps", ge=1, le=10**4)
    cfg_scale: float = option("guidance", 1.5, "guidance scale; 1: none", ge=1, le=100)


class Run:
    """A trained model of a study: the run folder NAME-SEED, or NAME, and figures of its averaged weights at a step (default: the last)."""

    def __init__(self, name: str, seed: int | None, config: StudyConfig):
        self.name, self.seed, self.config = name, seed, config
        self.folder = Path(config.runs) / (name if seed is None else f"{name}-{seed}")
        self.steps = list(training_state.saved_steps(self.folder / "checkpoints"))
        if not self.steps:
            raise UserError(f"--models {name}: no checkpoint in {self.folder}; run the study's script")

    @property
    def is_spread(self) -> bool:
        """Whether its canvases are spread over four times the tokens (`spread.py`)."""
        return self.name.endswith("-synth")

    @functools.cached_property
    def val_data_dir(self) -> str:
        """Its held-out set."""
        return str(Path(self.config.runs) / "spread" / "val") if self.is_spread else self.config.val_data_dir

    @functools.cache  # noqa: B019, a few runs live as long as the process
    def opened(self, step: int | None = None) -> tuple[ReportConfig, Weights, Session]:
        """The options of its samples, its weights, and the model with its VAE."""
        step = step or self.steps[-1]
        config = ReportConfig(
            ckpt=str(training_state.step_path(self.folder / "checkpoints", step)),
            val_data_dir=self.val_data_dir,
            class_labels=["balanced"],
            num_fid_samples=self.config.samples,
            num_steps=self.config.num_steps,
            cfg_scale=self.config.cfg_scale,
        )
        weights = session.read_checkpoint(config, {})
        return config, weights, session.load(config, weights, session.device())

    def kept(self, kind: str, options: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, np.ndarray]:
        """The arrays that `compute` gives, from the run's folder if they are there; `options`: all that they depend on."""
        text = json.dumps(options, sort_keys=True, default=str)
        path = self.folder / "figures" / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.npz"
        if not path.is_file():
            arrays = compute()
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, lambda file: np.savez(file, **arrays))
        with np.load(path) as arrays:
            return dict(arrays)

    @property
    def training(self) -> TrainConfig:
        """The options that it was trained with."""
        names = {f.name for f in dataclasses.fields(TrainConfig)}
        return TrainConfig(**{k: v for k, v in self.opened()[1].config.items() if k in names})

    def flops(self, budget: float | None = None) -> float:
        """FLOPs of one image's forward."""
        return float(self.kept("flops", budget, lambda: {"flops": models.count_flops(self.opened()[2].model, budget)})["flops"])

    def training_tflops(self, step: int | None = None) -> float:
        """TFLOPs of training up to a step (default: the last): a backward pass is two forwards."""

        def compute() -> dict[str, Any]:
            options, model = self.training, self.opened()[2].model
            images = options.batch_size * options.gradient_accumulation_steps
            return {"flops": 3 * images * mean_training_flops(options, model)}

        of_step = float(self.kept("training-flops", None, compute)["flops"])
        return of_step * (self.steps[-1] if step is None else step) / 1e12

    def training_loss(self) -> dict[int, float]:
        """Step → mean training loss since the line before."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    def losses(
        self, budgets: Sequence[float | None], step: int | None = None, order: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Held-out losses (draws, budgets, canvases), and the times (draws, canvases) they are taken at; of spread canvases on their patches.

        order: of the latents in each group, of which a budget keeps the first.
        """

        def compute(budget: float | None) -> dict[str, Any]:
            config, weights, loaded = self.opened(step)
            config = dataclasses.replace(config, budgets=[budget])
            if self.is_spread:
                loaded = dataclasses.replace(loaded, model=_RealPatches(loaded.model))
            with reordered(loaded.model, order):
                losses, times = losses_of_draws(config, loaded, weights)
            return {"losses": (4 if self.is_spread else 1) * losses[:, 0, 0].double().numpy(), "times": times.numpy()}

        step = step or self.steps[-1]
        found = [self.kept("losses", [step, b, order], functools.partial(compute, b)) for b in budgets]
        return np.stack([f["losses"] for f in found], axis=1), found[0]["times"]

    def samples(self, step: int | None = None, **options: Any) -> dict[str, np.ndarray]:
        """Of samples by `options` of generate.py: `fid` and share of `digits_in_class`, `gflops` of an image, the first ten `canvases`."""

        def compute() -> dict[str, Any]:
            config, _, loaded = self.opened(step)
            config = dataclasses.replace(config, **options)
            batches = [range(i, min(i + 20, config.num_fid_samples)) for i in range(0, config.num_fid_samples, 20)]
            canvases = torch.cat([self._draw(loaded, config, batch) for batch in batches])
            classifier = digit_classifier.load_or_train(Path(self.config.runs) / "classifier.pt")
            digits = digit_classifier.quarters(canvases)
            labels = labels_of(config, range(len(canvases))).repeat_interleave(len(digits) // len(canvases))
            reference = digit_classifier.statistics(classifier, digit_classifier.digit_images(held_out=True)[0])
            flops = config.num_steps * cost.mean_flops_per_step(config, session.guidance(config), loaded.model)
            return {
                "fid": frechet_distance(*digit_classifier.statistics(classifier, digits), *reference),
                "digits_in_class": digit_classifier.accuracy(classifier, digits, labels),
                "gflops": flops / 1e9,
                "canvases": canvases[:10].permute(0, 2, 3, 1).numpy(),
            }

        sampling = [self.config.samples, self.config.num_steps, self.config.cfg_scale]
        return self.kept("samples", [step or self.steps[-1], sampling, options], compute)

    @torch.inference_mode()
    def _draw(self, loaded: Session, config: ReportConfig, indices: range) -> Tensor:
        latents = latents_of(loaded, config, indices)
        return loaded.decode(gather_patches(latents) if self.is_spread else latents).cpu()

    def patches(self, t: float, canvases: int = 200) -> dict[str, np.ndarray]:
        """Of held-out canvases at time t, in group order: the `losses` of each patch (canvases, G, J), and Read's `attention` to
        it from each latent (canvases, G, J latents, J tokens), the mean over heads.
        """

        def compute() -> dict[str, Any]:
            _, weights, loaded = self.opened()
            model, dataset = loaded.model, LatentDataset(self.val_data_dir)
            assert isinstance(model, Elastic)
            flow, found = flow_of(self.training), []
            for start in range(0, min(canvases, len(dataset)), 50):
                indices = list(range(start, min(start + 50, canvases, len(dataset))))
                batch = torch.utils.data.default_collate(dataset.__getitems__(indices))
                mean = batch["moments"].chunk(2, dim=1)[0]
                x = sample_latents(batch["moments"], torch.zeros_like(mean), weights.record)
                noise = torch.stack([normal(generator("difficulty", 0, i), x.shape[1:]) for i in indices])
                found.append(patches_of(model, flow, x, noise, torch.full((len(x),), t), batch["label"]))
            losses, attention = zip(*found, strict=True)
            return {"losses": torch.cat(losses).numpy(), "attention": torch.cat(attention).numpy()}

        return self.kept("patches", [self.steps[-1], t, canvases], compute)


class _RealPatches(nn.Module):
    """A model of spread canvases that errs on their patches alone: in between, where data is 0, x_t = t·noise tells the velocity."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor, **options: Any) -> Tensor:
        v = self.model(x, t, y, **options)
        real = torch.zeros_like(v)
        real[..., 0::4, 0::4] = real[..., 1::4, 0::4] = real[..., 0::4, 1::4] = real[..., 1::4, 1::4] = 1
        return torch.where(real > 0, v, x / t[:, None, None, None])


@contextlib.contextmanager
def reordered(model: nn.Module, order: Sequence[int] | None) -> Iterator[None]:
    """Inside, the latents of each group stand in another order, so that a budget keeps others: those of `order`'s beginning."""
    if order is None:
        yield
        return
    assert isinstance(model, Elastic)
    query, pos = model.interface.query, model.interface.latent_pos
    assert pos is not None
    before = query.data, pos.data
    query.data, pos.data = query.data[list(order)], pos.data[:, list(order)]
    try:
        yield
    finally:
        query.data, pos.data = before
