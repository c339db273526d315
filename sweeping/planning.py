"""The plan of a sweep: checkpoints read, options checked, and all cells with what decides their figures."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from checkpoint.architecture import resolve_architecture
from checkpoint.weights import Weights, meta_model
from common.errors import UserError
from common.files import check_folder
from common.logging import warn
from common.sizes import sides
from config.options import Architecture, GenerateConfig
from config.parsing import flag
from config.sweep_options import AXES
from config.tool_options import MetricOptions
from flows import flow_of
from metrics.scoring import Scorer
from samplers import parse_budget
from sampling import checks, core_cache, cost, session
from sampling.image_folder import settings
from sampling.session import Session
from sweeping.axes import OF_GUIDE, Values, axes_of, base_config, canonical, combinations
from sweeping.results import parse_bound

# Options that decide which weights are loaded: cells that share them are done one after the other.
LOADED = ("weights", "ema_sigma", "ema_step", "mixed_precision", *OF_GUIDE)
BEST = 3  # cells that --coarse scores in full


def check_options(config: Any, given: Values) -> list[Values]:
    """The combinations of the axes, each of them checked as far as no checkpoint is needed. Raises UserError."""
    points = list(combinations(axes_of(config, given)))
    for ckpt, values in itertools.product(config.ckpt, points):
        checks.check_generation(dataclasses.replace(base_config(config, ckpt), **values))
    if len(config.ref) not in (1, len(config.ckpt)):
        raise UserError(
            f"--ref: {len(config.ref)} references for {len(config.ckpt)} checkpoints; give one for all, or one for each"
        )
    if config.coarse and config.coarse >= config.num_fid_samples:
        raise UserError(f"--coarse {config.coarse}: must be below --num-fid-samples ({config.num_fid_samples})")
    if config.best_under:
        parse_bound(config.best_under)
    check_folder("--dest", config.dest)
    return points


@dataclasses.dataclass
class Source:
    """Weights of a checkpoint, and all cells that are drawn from them.

    Attributes:
        name: of the run and file, for tables.
        configs: options of its cells, in order, each canonical and different from the others.
        gflops: of each, per image; what a core cache saves is not known before.
        settings: of each, all that the images depend on (on the main process).
        ref: the reference of its cells.
        prompts: those that its images go round, in words; None for labels, and where features alone are known.
    """

    config: GenerateConfig
    given: Values
    ref: str
    weights: Weights | None
    name: str
    configs: list[GenerateConfig]
    gflops: list[float]
    settings: list[Values] = dataclasses.field(default_factory=list)
    prompts: Sequence[str] | None = None

    def load(self, device: torch.device, vaes: dict, keep: bool) -> Session:
        """Model and VAE; `keep`: the state dict stays in memory for another time."""
        weights = self.weights or session.read_checkpoint(dataclasses.replace(self.config), self.given)
        loaded = session.load(self.config, weights, device, vaes)
        if not keep:
            self.weights = None
        return loaded


class Plan:
    """Every source and its scorer; all processes make the same one.

    Raises:
        UserError: whatever cannot be sampled or scored; names checkpoint and option.
    """

    def __init__(self, config: Any, given: Values, points: Sequence[Values], state: PartialState):
        self.config, self.given, self.state = config, given, state
        self.device = torch.device(state.device or "cpu")
        self.vaes: dict = {}
        self.scorers: dict[str, Scorer] = {}
        self.sources: list[Source] = []
        architecture = {f.name for f in dataclasses.fields(Architecture)}
        by_hand = {name: points[0].get(name, given[name]) for name in given if name in architecture}
        refs = config.ref if len(config.ref) > 1 else config.ref * len(config.ckpt)
        for ckpt, ref in zip(config.ckpt, refs, strict=True):
            for _, same in itertools.groupby(sorted(points, key=_loaded), key=_loaded):
                self.sources.append(self._source(ckpt, ref, list(same), by_hand))
        self._check_resolutions()
        smallest = config.coarse or config.num_fid_samples
        fields: Values = {f.name: getattr(config, f.name) for f in dataclasses.fields(MetricOptions)}
        for source in self.sources:
            if source.ref not in self.scorers:
                fields["ref"] = source.ref
                size = sides(source.config.resolution)
                self.scorers[source.ref] = Scorer(MetricOptions(**fields), smallest, size, state, warn, source.prompts)

    def _source(self, ckpt: str, ref: str, points: Sequence[Values], by_hand: Values) -> Source:
        base = base_config(self.config, ckpt)
        first = dataclasses.replace(base, **points[0])
        session.set_precision(first, self.device)
        weights = session.read_checkpoint(first, by_hand)
        if weights.prompts is not None and "class_labels" in self.given:
            raise UserError(f"--class-labels: {ckpt} is conditioned on text; give --prompts")
        for option, reason in flow_of(first).ignored_options.items():
            if option in self.given:
                warn(f"{flag(option)} has no effect: {reason}")
        unique: dict[str, GenerateConfig] = {}
        for values in points:
            config = dataclasses.replace(base, **values)
            resolve_architecture(config, by_hand, weights, ckpt)
            checks.check_generation_model(config)
            core_cache.check(config, weights)
            config.mixed_precision = first.mixed_precision  # what the device can do
            config = canonical(config)
            unique.setdefault(str(_effective(config)), config)
        configs = list(unique.values())
        budgets = [parse_budget(config.inference_budget) for config in configs]
        checks.warn_of_budgets(first, [budget for budget in budgets if isinstance(budget, float)])
        guide = meta_model(weights.guide, configs[0].guide_ckpt or "") if weights.guide else None
        gflops = [flops / 1e9 for flops in cost.flops_per_image(configs, meta_model(weights, ckpt), guide)]
        run = weights.config.get("exp_name") or configs[0].model
        source = Source(first, by_hand, ref, weights, f"{run}/{Path(ckpt).stem}", configs, gflops)
        source.prompts = weights.prompts and weights.prompts.words
        _, record = session.vae_of(first, weights, self.device, self.vaes)
        if self.state.is_main_process:
            alone = dataclasses.replace(weights, guide=None)
            source.settings = [settings(c, weights if c.guide_ckpt else alone, record.sha256) for c in configs]
        if len(self.config.ckpt) > 1 or len({_loaded(values) for values in points}) > 1:
            source.weights = None
        return source

    def _check_resolutions(self) -> None:
        by_ref: dict[str, Source] = {}
        for source in self.sources:
            other = by_ref.setdefault(source.ref, source)
            if other.config.resolution != source.config.resolution:
                raise UserError(
                    f"--ckpt {source.config.ckpt}: has {source.config.resolution} pixels, {other.config.ckpt} "
                    f"{other.config.resolution}: give each checkpoint a --ref of its own, in their order"
                )


def _loaded(values: Values) -> tuple[str, ...]:
    return tuple(str(values.get(name)) for name in LOADED)


def _effective(config: GenerateConfig) -> Values:
    """The options that act on the images of the model."""
    foreign = flow_of(config).foreign_options
    return {name: getattr(config, name) for name in ("global_seed", *AXES) if name not in foreign}
