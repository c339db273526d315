"""From options to images: a checkpoint, ready to draw."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import models
from checkpoint import posthoc, reading
from checkpoint.architecture import resolve_architecture
from checkpoint.weights import Weights, build_model
from common import precision
from common.errors import UserError
from common.sizes import latent_sides
from config.options import GenerateConfig, InferenceTool
from config.parsing import parse, require_options
from flows import FlowMatching, OnStage, flow_of
from models.autoencoders import VAE
from models.conditioning import Condition, map_condition
from models.layers import narrow_linears
from models.vae import VAERecord, decode, load_vae
from samplers import Guidance, parse_budget
from sampling import conditions, core_cache, guides
from sampling.conditions import Conditions, Labels
from sampling.core_cache import CoreCaches, Drawn
from sampling.cuda_graphs import FEW_IMAGES, Graphs

Options = GenerateConfig | InferenceTool


# ------------------------------------------------------------------------------------------------------- the options


def from_command_line(
    cls: type, argv: list[str] | None, prog: str, check_options: Callable[[Any], None]
) -> tuple[Any, dict[str, Any], Weights]:
    """The options of a script that takes `--ckpt`, its architecture filled in; those given by hand; and the weights.

    Args:
        cls: the dataclass of the options.
        argv: the command line; None: the process's.
        prog: the script's name.
        check_options: what can be said of the options alone, before a checkpoint is read or downloaded.
    """
    config, given = parse(cls, argv, prog=prog)
    require_options(config, "ckpt")
    check_options(config)
    return config, given, read_checkpoint(config, given)


def read_checkpoint(config: Options, given: dict[str, Any]) -> Weights:
    """The weights that the options name; the architecture that they record is filled in (`given`: the options by hand)."""
    if config.ema_sigma is None:
        weights = reading.read_weights(config.ckpt, config.weights, given)
    else:
        weights = posthoc.read_weights(config.ckpt, config.ema_sigma, config.ema_step)
    resolve_architecture(config, given, weights, config.ckpt)
    weights.check_velocity(f"--ckpt {config.ckpt}")
    weights.prompts = conditions.read(config, weights, given)
    weights.guide = guides.read(config, weights)
    core_cache.check(config, weights)
    return weights


def guidance(config: Options, **changes: Any) -> Guidance:
    """The guidance that the options ask for; `changes` are fields of `Guidance` that go before them."""
    names = set(Guidance._fields) - {"guide"} - changes.keys()
    requested: dict[str, Any] = {name: getattr(config, name) for name in names} | changes
    if config.guide_ckpt is None:
        requested["guide_label"] = None
    requested["inference_budget"] = parse_budget(requested["inference_budget"])
    return Guidance(**requested)


# ------------------------------------------------------------------------------------------------------ the machine


def device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def device_name(device: torch.device) -> str:
    """For people: the GPU's name, or how many threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"CPU with {count} thread{'s' if count > 1 else ''}" if device.type == "cpu" else device.type


def set_precision(config: Options, device: torch.device) -> None:
    """Apply `tf32` and `cudnn_attn`; on a CPU, which has no fp16, change `mixed_precision` to no with a warning."""
    if precision.supported_precision(config.mixed_precision, device.type == "cpu") == "no":
        config.mixed_precision = "no"
    precision.set_tf32(config.tf32)
    precision.set_attention(config.cudnn_attn)


# ------------------------------------------------------------------------------------------------------ the session


@dataclass(frozen=True)
class Session:
    """A checkpoint with its VAE, ready to draw.

    Attributes:
        config: the options of the sampler.
        model: in eval mode, on the device where all is computed.
        vae_sha256: of the VAE's weights.
        shape: (C, h, w) of the VAE latents.
        guide: the network that guides the model, in eval mode, if another does.
        caches: of its sampler's runs.
        conditions: what images are drawn from, labels or prompts.
        graphs: CUDA graphs of its networks.
        drawn: what it has drawn with a core cache, and with which passes; sessions of other options have it in common.
    """

    config: Options
    model: nn.Module
    vae: VAE
    vae_sha256: str | None
    shape: tuple[int, int, int]
    guide: nn.Module | None = None
    caches: CoreCaches = field(default_factory=CoreCaches)
    graphs: Graphs = field(default_factory=Graphs)
    drawn: Drawn = field(default_factory=Drawn)
    conditions: Conditions = field(default_factory=Labels)

    def with_options(self, config: Options) -> "Session":
        """The same checkpoint, sampled by other options."""
        return dataclasses.replace(self, config=config)

    def fresh(self) -> "Session":
        """The same session, which has drawn nothing yet."""
        return dataclasses.replace(self, drawn=Drawn())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def flow(self) -> FlowMatching:
        """The model's flow, with the options of the sampler."""
        return flow_of(self.config)

    def condition(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Condition:
        """Labels (B,) or text of the images `indices`, on `device`."""
        return map_condition(lambda v: v.to(device), self.conditions.of(self.config, indices))

    def autocast(self) -> AbstractContextManager:
        """The context of the model's forward passes: automatic mixed precision where the options ask for it."""
        return precision.autocast(self.config.mixed_precision, self.device)

    def latents(
        self, guidance: Guidance, seed: int, indices: Sequence[int], y: Condition, on_stage: OnStage | None = None
    ) -> Tensor:
        """Scaled VAE latents (B, C, h, w), float64, of the images `indices` with labels y (B,).

        All noise of image i comes from (seed, i), whatever the budget, guidance and batch.

        Args:
            guidance: how velocities are guided, and the budgets.
            seed: of all noise.
            indices: the images' indices.
            y: their labels (B,) or text.
            on_stage: see `FlowMatching.sample_state`.

        Raises:
            UserError: some are not finite; it names the first such image.
        """
        model, guidance = self.networks(guidance, len(indices))
        if self.config.core_cache:
            self.drawn.images += len(indices)
        with self.autocast():
            latents = self.flow.sample(model, self.shape, seed, indices, y, guidance, on_stage)
        finite = latents.isfinite().flatten(1).all(dim=1).tolist()
        if not all(finite):
            raise UserError(
                f"--ckpt {self.config.ckpt}: the latents of image {indices[finite.index(False)]} are not finite (NaN or infinity) "
                f"at cfg_scale {guidance.cfg_scale:g} and --mixed-precision {self.config.mixed_precision}; "
                "a smaller scale or --mixed-precision no may keep them finite",
                local=True,
            )
        return latents

    def with_guide(self, guidance: Guidance) -> Guidance:
        """The guidance, with the guide's network where another network guides."""
        return guidance._replace(guide=self.guide) if guidance.guide_label else guidance

    def networks(self, guidance: Guidance, images: int) -> tuple[nn.Module, Guidance]:
        """The model for one run of the sampler, and the guidance with the guide's network; with what speeds them up.

        images: drawn by the run.
        """
        guidance = self.with_guide(guidance)
        if not self.config.core_cache:
            if not self.uses_graphs(images):
                return self.model, guidance
            guide = None if guidance.guide is None else self.graphs.of(guidance.guide)
            return self.graphs.of(self.model), guidance._replace(guide=guide)
        return self.caches.cached(self.config, self.model, guidance, self.flow.evaluations(), self.drawn)

    def uses_graphs(self, images: int) -> bool:
        """Whether forwards of so many images are replayed from CUDA graphs."""
        requested = images <= FEW_IMAGES if self.config.cuda_graphs is None else self.config.cuda_graphs
        return requested and self.device.type == "cuda"

    def starting_noise(self, seed: int, indices: Sequence[int]) -> Any:
        """The noise that the images `indices` start from, on the model's device: a state of the flow."""
        return self.flow.starting_noise(seed, indices, self.shape, self.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 (B, 3, H, W) of latents (B, C, h, w)."""
        return decode(self.vae, latents)


def vae_of(config: Options, weights: Weights, device: torch.device, vaes: dict) -> tuple[Any, VAERecord]:
    """The VAE of a checkpoint, and its record; from `vaes` where it is among those, else added to them."""
    name = config.vae or weights.record.vae
    if (name, weights.record) not in vaes:
        vaes[name, weights.record] = load_vae(name, device, expected=weights.record)
    return vaes[name, weights.record]


def load(config: Options, weights: Weights, device: torch.device, vaes: dict | None = None) -> Session:
    """Model (compiled where that is asked for) and VAE on `device`. `vaes`: those that are loaded already; a new one is added."""
    vae, record = vae_of(config, weights, device, {} if vaes is None else vaes)  # meanwhile the checkpoint is hashed
    networks = []
    for loaded, path in ((weights, config.ckpt), (weights.guide, config.guide_ckpt)):
        network = None
        if loaded is not None:
            network = narrow_linears(build_model(loaded, path or "", device), precision.AMP_TYPES[config.mixed_precision])
            if config.compile:
                models.compile_model(network)
        networks.append(network)
    model, guide = networks
    size = latent_sides(config.resolution, weights.record.downsample_factor)
    loaded = Session(config, model, vae, record.sha256, (weights.record.latent_channels, *size), guide)
    if weights.prompts is None:
        return loaded
    prompts = weights.prompts.open(device)
    for network in networks:
        conditions.set_missing_null(network, prompts.null)
    return dataclasses.replace(loaded, conditions=prompts)


# ------------------------------------------------------------------------------------------------ the inference tools


def setup_tool(config: InferenceTool, weights: Weights, output_dir: str) -> tuple[Session, Path]:
    """What both inference tools start with: `load` on this machine's device, and the folder of the results, made."""
    where = device()
    set_precision(config, where)
    session = load(config, weights, where)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return session, folder


def sample_examples(session: Session, config: InferenceTool, guidance: Guidance) -> tuple[Tensor, np.ndarray]:
    """One image of each class label or prompt, in batches: latents (n, C, h, w), and the decoded images as uint8 (n, H, W, 3)."""
    latents, images = [], []
    indices = range(len(session.conditions.names(config)))
    for first in range(0, len(indices), config.per_proc_batch_size):
        batch = indices[first : first + config.per_proc_batch_size]
        latents.append(session.latents(guidance, config.seed, batch, session.condition(batch)))
        images.append(session.decode(latents[-1]).permute(0, 2, 3, 1).cpu().numpy())
    return torch.cat(latents), np.concatenate(images)
