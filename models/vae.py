"""Images ↔ VAE latents: a thin layer over diffusers' `AutoencoderKL`.

Everything about a VAE (downsampling factor, channels, scale, shift) comes from its own config. A `VAERecord` of it travels with
the data set and the checkpoint, so that training needs no VAE.
"""

import dataclasses
import functools
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError, first_line
from common.file_facts import known_sha256
from common.files import parse_json, write_json
from common.hub import fetch_once
from common.torchvision_shim import import_torchvision
from models.dfm import recompose

VAE: TypeAlias = Any  # diffusers' AutoencoderKL, whose annotations do not say what its methods return


SHORT_NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


@dataclasses.dataclass(frozen=True)
class VAERecord:
    """Which VAE made the latents, and what using them takes. Its fields are the keys of `vae.json`.

    The model sees (z − shift)·scale; with `channel_mean` and `channel_std`, which training by --latent-norm channel records,
    each channel has its own: (z − mean)/std.
    """

    vae: str  # hub name or folder
    sha256: str | None  # of the weights file; None where it is not known
    downsample_factor: int  # pixels per latent position, along each side
    latent_channels: int
    scaling_factor: float
    shift_factor: float
    channel_mean: tuple[float, ...] | None = None
    channel_std: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `vae.json`."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        return {k: v for k, v in values.items() if k in _KEYS or v is not None}

    @classmethod
    def from_dict(cls, values: Any, where: str = "VAE record") -> "VAERecord":
        """The record held by the JSON object `values`; `UserError` that names `where` if it is none. A null shift means 0."""
        if not isinstance(values, dict):
            raise UserError(f"{where}: must hold a JSON object with the keys {', '.join(_KEYS)}")
        if missing := [key for key in _KEYS if key not in values]:
            raise UserError(f"{where}: {missing[0]} is missing")
        values = {key: values[key] for key in _KEYS} | {key: values[key] for key in _CHANNEL_KEYS if values.get(key)}
        if values["shift_factor"] is None:
            values["shift_factor"] = 0.0
        _check_record(values, where)
        values |= {key: float(values[key]) for key in ("scaling_factor", "shift_factor")}
        return cls(**values | {key: tuple(float(n) for n in values[key]) for key in _CHANNEL_KEYS if key in values})


_CHANNEL_KEYS = ("channel_mean", "channel_std")


_KEYS = tuple(f.name for f in dataclasses.fields(VAERecord) if f.name not in _CHANNEL_KEYS)


def _check_record(values: dict[str, Any], where: str) -> None:
    """Raise UserError for a value that its key cannot have."""
    if not isinstance(values["vae"], str) or not isinstance(values["sha256"], str | None):
        raise UserError(f"{where}: vae and sha256 must be text")
    for key in ("downsample_factor", "latent_channels"):
        if type(values[key]) is not int or not 1 <= values[key] <= MAX_FACTOR:
            shown = repr(values[key])[:80]
            raise UserError(f"{where}: {key} is {shown}; it must be a whole number of at least 1, at most {MAX_FACTOR}")
    for key in ("scaling_factor", "shift_factor"):
        if not _are_numbers([values[key]], 1):
            raise UserError(f"{where}: {key} is {repr(values[key])[:80]}; it must be a number")
    if values["scaling_factor"] == 0:
        raise UserError(f"{where}: scaling_factor must not be 0")
    for key in _CHANNEL_KEYS if any(key in values for key in _CHANNEL_KEYS) else ():
        if not _are_numbers(values.get(key), values["latent_channels"]):
            raise UserError(f"{where}: {key} must be {values['latent_channels']} numbers, one for each channel")
    if min(values.get("channel_std", (1.0,))) <= 0:
        raise UserError(f"{where}: channel_std must be above 0")


MAX_DECODED = 2**30  # bytes


MAX_FACTOR = 2**16  # pixels per latent, and channels: far above any VAE


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == count
        and all(type(v) in (int, float) and abs(v) <= sys.float_info.max for v in values)
    )


@functools.cache
def _shift_and_scale(record: VAERecord, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shift and factor of every channel, (C or 1, 1, 1), copied to a device once."""
    mean = record.channel_mean or (record.shift_factor,)
    factor = tuple(1 / s for s in record.channel_std) if record.channel_std else (record.scaling_factor,)
    shift, scale = (torch.tensor(v, dtype=torch.float32, device=device).view(-1, 1, 1) for v in (mean, factor))
    return shift, scale


# Data without a vae.json was made by the published tool, with a Stable Diffusion VAE (ema and mse share their encoder).
SD_VAE = VAERecord(SHORT_NAMES["ema"], None, 8, 4, 0.18215, 0.0)


def load_vae(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, *, expected: VAERecord | None = None
) -> tuple[VAE, VAERecord]:
    """The VAE in eval mode without gradients, and its record.

    `name`: `ema`, `mse`, a hub name or a local folder (relative to the working folder, else to this code's). `expected`: the
    record of the latents that it shall read, normalised as that says. `UserError` if it cannot be found or read, or does not fit those latents.
    """
    folder = _folder(name)
    weights = next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if weights is None:
        raise UserError(f"--vae {name}: {folder} has no {WEIGHT_FILES[0]}")
    import_torchvision()  # which diffusers imports
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    try:
        safe = weights.suffix == ".safetensors"
        vae: VAE = AutoencoderKL.from_pretrained(folder, torch_dtype=dtype, use_safetensors=safe, local_files_only=True)
    except Exception as error:  # whatever a broken config or weights file makes diffusers raise
        raise UserError(f"--vae {name}: {folder} does not load as an AutoencoderKL: {first_line(error)}") from None
    record = VAERecord(
        vae=SHORT_NAMES.get(name, name),
        sha256=known_sha256(weights),
        downsample_factor=2 ** (len(vae.config.block_out_channels) - 1),
        latent_channels=vae.config.latent_channels,
        scaling_factor=float(vae.config.scaling_factor),
        shift_factor=float(vae.config.get("shift_factor") or 0.0),
    )
    if expected is not None:
        _check_fits(name, record, expected)
        if expected.channel_mean:
            vae.register_to_config(**{key: list(getattr(expected, key)) for key in _CHANNEL_KEYS})
    # Convolutions are a fifth quicker with channels last on a CPU; on CUDA each group norm would copy them twice.
    vae.to(device, memory_format=torch.channels_last if torch.device(device).type == "cpu" else torch.contiguous_format)
    return vae.eval().requires_grad_(False), record


def save_vae(vae: VAE, folder: Path) -> None:
    """Write a VAE of `load_vae` as diffusers does, without what it was told of the latents."""
    vae.save_pretrained(folder)
    if vae.config.get("channel_mean"):
        path = folder / "config.json"
        write_json({k: v for k, v in parse_json(path.read_bytes(), path).items() if k not in _CHANNEL_KEYS}, path)


@torch.no_grad()
def encode_moments(vae: VAE, images: Tensor) -> Tensor:
    """Posterior of images: uint8 (B, 3, H, W) → float32 (B, 2C, h, w), the means, then the standard deviations."""
    pixels = images.to(vae.device, torch.float32) / 127.5 - 1
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1).float()


def sample_latents(moments: Tensor, noise: Tensor, record: VAERecord) -> Tensor:
    """Latents as the model sees them, (z − shift) · scale: moments (B, 2C, h, w), noise (B, C, h, w) → (B, C, h, w)."""
    mean, std = moments.chunk(2, dim=1)
    shift, scale = _shift_and_scale(record, moments.device)
    return (mean + std * noise - shift) * scale


@torch.no_grad()
def decode(vae: VAE, latents: Tensor) -> Tensor:
    """Images of the model's latents: (B, C, h, w), any float type → uint8 (B, 3, H, W)."""
    if vae.config.get("channel_mean"):  # `load_vae` was told so by the record of the latents
        mean, std = (latents.new_tensor(vae.config[key]).view(-1, 1, 1) for key in _CHANNEL_KEYS)
        z = latents * std + mean
    else:
        z = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    parts = [to_uint8(vae.decode(part).sample) for part in z.to(vae.device, vae.dtype).split(_images_at_a_time(vae, z))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _images_at_a_time(vae: VAE, z: Tensor) -> int:
    """How many latents (B, C, h, w) are decoded together, so that no tensor is above `MAX_DECODED`, if one image's is not."""
    channels = vae.config.block_out_channels
    factor = 2 ** (len(channels) - 1)
    numbers = channels[min(1, len(channels) - 1)] * z.shape[2] * z.shape[3] * factor**2  # of the first layers at full size
    return max(1, MAX_DECODED // (numbers * vae.dtype.itemsize))


def decode_stages(vae: VAE, pyramid: Sequence[Tensor]) -> Tensor:
    """A DFM pyramid for people: each stage decoded alone, then the image of all, uint8 (S + 1, B, 3, H, W) at the image's size."""
    image = decode(vae, recompose(pyramid))
    stages = [F.interpolate(decode(vae, stage), size=image.shape[-2:], mode="nearest") for stage in pyramid]
    return torch.stack([*stages, image])


def to_uint8(images: Tensor) -> Tensor:
    """Pixels of [−1, 1] as uint8: clamp(127.5 x + 128, 0, 255), truncated. The inverse of x/127.5 − 1 on whole values."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def _folder(name: str) -> Path:
    """The local folder of a VAE, downloaded if `name` is on the hub."""
    for folder in (Path(name), Path(__file__).parents[1] / name):
        if os.path.isdir(folder):  # noqa: PTH112, Path.is_dir raises for a name that is too long, which a record may hold
            folder = _inside_pipeline(folder)
            if not (folder / "config.json").is_file():
                raise UserError(
                    f"--vae {name}: {folder} has no config.json; wanted: ema, mse, a hub name or a diffusers folder"
                )
            return folder
    repository = SHORT_NAMES.get(name, name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository):
        raise UserError(f"--vae {name}: no such folder; wanted: ema, mse, a hub name (owner/name) or a local folder")
    from huggingface_hub import snapshot_download

    files = ["config.json", "vae/config.json"]

    def fetch(**options: Any) -> Path:
        for weights in WEIGHT_FILES:  # the second: older repositories
            patterns = [*files, weights, f"vae/{weights}"]
            folder = _inside_pipeline(Path(snapshot_download(repository, allow_patterns=patterns, **options)))
            if (folder / weights).is_file():
                break
        return folder

    try:
        folder = fetch_once(repository, fetch)
    except Exception as error:  # network, authentication, no such repository, no space …
        reason = first_line(error)
        raise UserError(
            f"--vae {name}: found no folder of that name, and {repository} could not be downloaded ({type(error).__name__}: {reason}); "
            "give a local folder of a diffusers AutoencoderKL"
        ) from None
    if not (folder / "config.json").is_file():
        raise UserError(f"--vae {name}: {repository} on the hub has no config.json of a VAE")
    return folder


def _inside_pipeline(folder: Path) -> Path:
    """The folder of the VAE: that of a whole pipeline (SD3, FLUX, …) has it in vae/."""
    return folder / "vae" if not (folder / "config.json").is_file() and (folder / "vae/config.json").is_file() else folder


def _check_fits(name: str, record: VAERecord, expected: VAERecord) -> None:
    for key in ("downsample_factor", "latent_channels", "scaling_factor", "shift_factor"):
        found, wanted = getattr(record, key), getattr(expected, key)
        if not math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-9):
            raise UserError(f"--vae {name}: its {key} is {found}, but the latents were made by {expected.vae} with {wanted}")
    if record.vae == expected.vae and expected.sha256 is not None and record.sha256 != expected.sha256:
        raise UserError(f"--vae {name}: its weights are not those that made the latents (sha256 differs)")
