"""From options to images: a checkpoint, ready to draw."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import models
from checkpoint import reading, weights
from common.errors import UserError
from config.options import Architecture, CCFGConfig, GenerateConfig, InferenceTool, MultibudgetConfig
from config.parsing import parse, require_options
from models.dfm import recompose
from models.vae import decode, load_vae
from randomness import image_noise, pyramid_noise, sde_noise, to_device
from samplers import Guidance, OnStage, dfm_sampler, euler_maruyama_sampler, euler_sampler, parse_budget

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


Options = GenerateConfig | InferenceTool


def from_command_line(cls: type, argv: list[str] | None, prog: str) -> tuple[Any, dict[str, Any], weights.Weights]:
    """The options of a script that takes `--ckpt`, with its architecture filled in; those given by hand; and the weights."""
    config, given = parse(cls, argv, prog=prog)
    require_options(config, "ckpt")
    found = reading.read_weights(config.ckpt, config.weights, given)
    resolve_architecture(config, given, found, config.ckpt)
    return config, given, found


def resolve_architecture(config: Architecture, given: dict, found: weights.Weights, where: str | Path) -> None:
    """Take the architecture from the checkpoint `where`; what is given by hand fills gaps in it and may not contradict it."""
    recorded = found.config
    if recorded.get("model"):  # the depths that "by size" stands for
        side = recorded["resolution"] // found.record.downsample_factor
        sizes = models.model_spec(recorded["model"]).arguments(side, levels=recorded.get("levels"))
        recorded = {k: v for k, v in sizes.items() if k.endswith("_depth")} | {
            k: v for k, v in recorded.items() if v is not None
        }
    for name in ("model", "resolution", "num_classes", "path_type", "time_shift", *weights.MODEL_OPTIONS):
        if name in given and recorded.get(name) is not None and given[name] not in (None, recorded[name]):
            raise UserError(f"--{name.replace('_', '-')} {given[name]} contradicts {where}, which records {recorded[name]}")
        value = recorded.get(name, getattr(config, name))
        setattr(config, name, value)
        found.config[name] = value
    for name in (
        "num_steps_per_scale",
        "stage_sampling_thresholds",
    ):  # how the model was made to be sampled, if nothing else is asked
        if name not in given and recorded.get(name):
            setattr(config, name, recorded[name])
    found.config["fused_attn"] = config.fused_attn
    if config.model is None:
        raise UserError(f"{where}: the checkpoint records no model; give --model")


def guidance(config: Options, **changes) -> Guidance:
    """The guidance that the options ask for; `changes` are fields of `Guidance` that go before them."""
    asked = {name: getattr(config, name) for name in Guidance._fields if name not in changes} | changes
    return Guidance(**asked | {"inference_budget": parse_budget(asked["inference_budget"])})


def device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """For people: the GPU's name, or how many threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"CPU with {count} thread{'s' if count > 1 else ''}" if device.type == "cpu" else device.type


def set_precision(config: Options, device: torch.device, warn: Callable[[str], None]) -> None:
    """Apply `tf32`; on a CPU, where there is no fp16, change `mixed_precision` to no with a warning."""
    if device.type == "cpu" and config.mixed_precision == "fp16":
        config.mixed_precision = "no"
        warn("--mixed-precision fp16 needs a GPU; running as no")
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.tf32


def autocast(config: Options, device: torch.device) -> AbstractContextManager:
    """The context of the model's forward passes: automatic mixed precision where it is asked for."""
    dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def load(
    config: Options, found: weights.Weights, device: torch.device
) -> tuple[nn.Module, "AutoencoderKL", tuple[int, int, int]]:
    """Model (compiled where that is asked for) and VAE on `device`, and the shape (C, h, w) of the VAE latents."""
    vae, _ = load_vae(config.vae or found.record.vae, device, expected=found.record)  # meanwhile the checkpoint is hashed
    model = weights.build_model(found, config.ckpt, device)
    if config.compile:
        models.compile_model(model)
    side = config.resolution // found.record.downsample_factor
    return model, vae, (found.record.latent_channels, side, side)


def setup_tool(
    config: MultibudgetConfig | CCFGConfig, found: weights.Weights, warn: Callable[[str], None]
) -> tuple[nn.Module, "AutoencoderKL", tuple[int, int, int], Path]:
    """What both inference tools start with: `load` on this machine's device, and the folder of the results, made."""
    where = device()
    set_precision(config, where, warn)
    model, vae, shape = load(config, found, where)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return model, vae, shape, folder


def sample(
    config: Options,
    g: Guidance,
    model: nn.Module,
    shape: Sequence[int],
    seed: int,
    indices: Sequence[int],
    y: Tensor,
    on_stage: OnStage | None = None,
) -> Tensor:
    """Scaled VAE latents (B, C, h, w), float64, of the images `indices` with labels y (B,).

    All noise of image i comes from (seed, i), whatever the budget, guidance and batch. shape: (C, h, w). on_stage: see
    `samplers.dfm_sampler`.
    """
    device = next(model.parameters()).device
    noise, y = starting_noise(model, shape, seed, indices), to_device(y, device)
    options = g._asdict() | {"path_type": config.path_type}
    with autocast(config, device):
        if isinstance(noise, list):
            options |= {k: getattr(config, k) for k in ("num_steps_per_scale", "stage_sampling_thresholds")}
            return recompose(dfm_sampler(model, noise, y, on_stage=on_stage, **options))
        options |= {"num_steps": config.num_steps, "time_shift": config.time_shift}
        if config.mode == "sde":
            return euler_maruyama_sampler(model, noise, y, noise=partial(_noise_of_step, seed, indices), **options)
        return euler_sampler(model, noise, y, heun=config.heun, **options)


def starting_noise(model: nn.Module, shape: Sequence[int], seed: int, indices: Sequence[int]) -> Tensor | list[Tensor]:
    """The noise that the images `indices` start from, on the model's device: (B, C, h, w), or for DFM a list, one per stage."""
    device = next(model.parameters()).device
    if hasattr(model, "stage_shapes"):
        return [to_device(x, device) for x in pyramid_noise(seed, indices, model.stage_shapes)]
    return to_device(image_noise(seed, indices, shape), device)


def sample_all(
    config: InferenceTool, g: Guidance, model: nn.Module, vae: "AutoencoderKL", shape: Sequence[int]
) -> tuple[Tensor, np.ndarray]:
    """One image of each class label, in batches: latents (n, C, h, w), and the decoded images as uint8 (n, H, W, 3)."""
    latents, images = [], []
    for first in range(0, len(config.class_label), config.per_proc_batch_size):
        labels = torch.tensor(config.class_label[first : first + config.per_proc_batch_size])
        latents.append(sample(config, g, model, shape, config.seed, range(first, first + len(labels)), labels))
        images.append(decode(vae, latents[-1]).permute(0, 2, 3, 1).cpu().numpy())
    return torch.cat(latents), np.concatenate(images)


def _noise_of_step(seed: int, indices: Sequence[int], step: int, shape: torch.Size) -> Tensor:
    return sde_noise(seed, indices, step, shape[1:])
