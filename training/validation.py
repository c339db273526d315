"""Validation loss and sample images of the averaged weights while a run trains, over all its processes."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common.errors import UserError
from common.image_files import save_png
from common.logging import warn
from common.plotting import image_grid
from common.precision import AMP_TYPES
from common.sizes import sides
from config.options import GenerateConfig, TrainConfig
from data.dataset import LatentDataset
from flows import LossCondition, flow_of
from models.autoencoders import VAE
from models.layers import narrow_linears
from models.vae import VAERecord, load_vae
from samplers import BudgetSchedule, Guidance
from sampling.conditions import Conditions
from training.budgets import budget_schedule, rows_by_budget, trained_budgets
from training.stats import sum_over_processes

SAMPLE_IMAGES = 64  # drawn at each budget, over all processes


SAMPLE_STEPS, SAMPLE_CFG = 50, 4.0


VAL_SAMPLES = 2048  # of the validation set, at most


class Interrupted(Exception):
    """A signal came while something was drawn or measured; the run is to save and end soon."""


class Validation:
    """What `validate` measures and `sample_images` draws. Every process takes part in each call.

    Attributes:
        vae: draws the images; None where it is missing, or --sampling-steps 0.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        data: LatentDataset | None,
        record: VAERecord,
        conditions: Conditions,
    ):
        """Open what is needed.

        Args:
            config: of the run.
            accelerator: of the run.
            data: the validation set.
            record: of the VAE, as training normalises latents.
            conditions: what pictures are drawn from.
        """
        self.config, self.accelerator, self.data, self.record = config, accelerator, data, record
        self.budgets, self.schedule = trained_budgets(config), budget_schedule(config)
        self.flow, self.conditions = flow_of(config, num_steps=SAMPLE_STEPS), conditions
        self.sampled = sampling_options(config)
        self.vae = self._load_vae() if config.sampling_steps else None

    def _load_vae(self) -> VAE | None:
        """One that the user named must load; the data set's own may be missing, with a warning."""
        try:
            vae, _ = load_vae(self.config.vae or self.record.vae, self.accelerator.device, expected=self.record)
        except UserError as error:
            if self.config.vae:
                raise
            warn(f"no pictures in training: {error}")
            return None
        return vae

    def narrowed(self, model: nn.Module) -> nn.Module:
        """The model with its Linears' weights in the type that mixed precision computes in, for many forwards; it stays as it is."""
        shared: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
        return narrow_linears(copy.deepcopy(model, shared), AMP_TYPES[self.config.mixed_precision])

    @torch.no_grad()
    def validate(self, model: nn.Module, should_stop: Callable[[], bool]) -> dict[str, float]:
        """Mean validation loss at each trained budget that is a power of two (and stage), by metric name.

        With a schedule of budgets: at each of its budgets, and as `val_loss` that of each image at the budget of its time.

        Raises Interrupted, in every process, if `should_stop()` became true in one.
        """
        if self.data is None:
            return {}
        accelerator = self.accelerator
        powers = [b for b in self.budgets if b is None or math.log2(b).is_integer()] or [self.budgets[0]]
        conditions = self.flow.conditions(self.budgets if self.schedule else powers)
        scheduled = self.flow.conditions([None]) if self.schedule else []
        count = min(len(self.data), VAL_SAMPLES)
        sums = torch.zeros(len(conditions) + len(scheduled), device=accelerator.device)
        with together(accelerator, self._networks(model), should_stop):
            for indices in self._batches(count):
                losses = self._losses(model, indices, conditions)  # (conditions, B)
                sums += torch.cat([losses, self._scheduled(losses, indices)]).sum(dim=1)
        means = (sum_over_processes(accelerator, sums) / count).tolist()
        return {"val_loss" + c.metric_suffix: mean for c, mean in zip([*conditions, *scheduled], means, strict=True)}

    def _batches(self, count: int) -> Iterator[range]:
        """This process's part of the samples, in batches of the size that it trains with."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        first, last = count * rank // world, count * (rank + 1) // world
        size = self.config.batch_size // world
        for start in range(first, last, size):
            yield range(start, min(start + size, last))

    def _networks(self, model: nn.Module) -> list[nn.Module]:
        return [model] if self.vae is None else [model, self.vae]

    def _losses(self, model: nn.Module, indices: range, conditions: list[LossCondition]) -> Tensor:
        assert self.data is not None
        batch = torch.utils.data.default_collate(self.data.__getitems__(list(indices)))
        batch = {k: v.to(self.accelerator.device) for k, v in batch.items()}
        with self.accelerator.autocast():
            return self.flow.val_losses(model, batch, indices, self.record, conditions)

    def _scheduled(self, losses: Tensor, indices: range) -> Tensor:
        """Of losses (budgets × stages, B), those of each image at the budget that the schedule gives its time: (stages, B)."""
        if self.schedule is None:
            return losses[:0]
        assert self.data is not None
        shape = (self.record.latent_channels, *self.data.shape[1:])
        times = self.flow.times(self.flow.val_draws(indices, shape))
        of_budgets = losses.unflatten(0, (len(self.budgets), -1))  # (budgets, stages, B)
        chosen = torch.empty_like(of_budgets[0])
        for budget, rows in rows_by_budget(self.schedule, times):
            chosen[:, rows] = of_budgets[self.budgets.index(budget)][:, rows]
        return chosen

    @torch.no_grad()
    def sample_images(self, model: nn.Module, shape: tuple[int, int, int], should_stop: Callable[[], bool]) -> list[np.ndarray]:
        """64 images at the full budget, then at the lowest trained one (or once, by the schedule of budgets), uint8 (64, H, W, 3).

        Of DFM each stage before them. shape: (C, h, w) of the latents. Noise and labels are always the same. Raises Interrupted as `validate` does.
        """
        if self.vae is None:
            return []
        accelerator, size = self.accelerator, sides(self.config.resolution)
        indices = range(accelerator.process_index, SAMPLE_IMAGES, accelerator.num_processes)
        grids: list[np.ndarray] = []
        ends = sorted({self.budgets[0], self.budgets[-1]}, key=lambda b: -(b or 1))
        for budget in [self.schedule] if self.schedule else ends:
            images = torch.zeros((self.flow.num_views, SAMPLE_IMAGES, 3, *size), dtype=torch.uint8)
            with together(accelerator, self._networks(model), should_stop):
                if len(indices):
                    images[:, list(indices)] = self._sample(model, shape, indices, budget).cpu()
            images = sum_over_processes(
                accelerator, images.to(accelerator.device, torch.int32)
            ).cpu()  # each process fills its own
            grids.extend(images.to(torch.uint8).permute(0, 1, 3, 4, 2).numpy())
        return grids

    def _sample(
        self, model: nn.Module, shape: tuple[int, int, int], indices: range, budget: float | BudgetSchedule | None
    ) -> Tensor:
        """Views of the images `indices`, uint8 (views, n, 3, H, W)."""
        config = self.config
        y = self.conditions.of(self.sampled, indices)
        guidance = Guidance(cfg_scale=SAMPLE_CFG if config.cfg_prob else 1.0, inference_budget=budget)
        with self.accelerator.autocast():
            state = self.flow.sample_state(model, shape, config.seed, indices, y, guidance)
            assert self.vae is not None
            return self.flow.views(self.vae, state)


@contextlib.contextmanager
def together(accelerator: Accelerator, networks: Sequence[nn.Module], should_stop: Callable[[], bool]) -> Iterator[None]:
    """Inside, each process computes alone and stops at the `networks`' next layer once `should_stop()`; at the end all agree.

    Raises Interrupted in every process where one of them stopped.
    """

    def check(*_: object) -> None:
        if should_stop():
            raise Interrupted

    hooks = [module.register_forward_pre_hook(check) for network in networks for module in network.modules()]
    stopped = False
    try:
        yield
    except Interrupted:
        stopped = True
    finally:
        for hook in hooks:
            hook.remove()
    flag = torch.tensor(float(stopped), device=accelerator.device)
    if sum_over_processes(accelerator, flag) > 0:
        raise Interrupted


def sampling_options(config: TrainConfig) -> GenerateConfig:
    """What of generate.py's options tells the pictures' labels: random ones, by the run's seed."""
    return GenerateConfig(num_classes=config.num_classes, global_seed=config.seed)


def save_samples(grids: list[np.ndarray], path: Path) -> None:
    """A PNG of grids side by side, each of uint8 (64, H, W, 3), 8 × 8 images. Raises OSError."""
    rows = np.concatenate([grid.reshape(-1, 8, *grid.shape[1:]) for grid in grids], axis=1)
    save_png(image_grid(rows.reshape(-1, *grids[0].shape[1:]), columns=8 * len(grids)), path)
