"""Images ↔ VAE latents: a thin layer over diffusers' autoencoders (models/autoencoders.py).

Everything about a VAE (class, downsampling factor, channels, scale, shift, statistics) comes from its own config. A `VAERecord` of it
travels with the data set and the checkpoint, so that training needs no VAE.
"""

import dataclasses
import functools
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError, first_line
from common.file_facts import known_sha256
from common.files import parse_json
from common.hub import fetch_once
from common.torchvision_shim import import_torchvision
from models.autoencoders import CLASSES, VAE, AutoencoderKL, class_of
from models.dfm import recompose

SHORT_NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


@dataclasses.dataclass(frozen=True)
class VAERecord:
    """Which VAE made the latents, and what using them takes. Its fields are the keys of `vae.json`.

    The model sees (z − shift)·scale; with `channel_mean` and `channel_std`, of an autoencoder with statistics of its own or of
    training by --latent-norm, (z − mean)/std. They hold C numbers, or nested tuples of a shape that broadcasts to C × h × w.
    """

    vae: str  # hub name or folder
    sha256: str | None  # of the weights file; None where it is not known
    downsample_factor: int  # pixels per latent position, along each side
    latent_channels: int
    scaling_factor: float
    shift_factor: float
    vae_class: str = AutoencoderKL().name  # diffusers' name
    posterior: bool = True  # whether means and deviations are stored; else means alone
    channel_mean: tuple[Any, ...] | None = dataclasses.field(default=None, hash=False)  # may be many numbers
    channel_std: tuple[Any, ...] | None = dataclasses.field(default=None, hash=False)

    @property
    def stored_channels(self) -> int:
        """Channels of what the data set holds: of means, and of standard deviations where there is a posterior."""
        return self.latent_channels * (1 + self.posterior)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `vae.json`."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return {k: _nested(v, list) for k, v in vars(self).items() if k in _KEYS or v != defaults[k]}

    @classmethod
    def from_dict(cls, values: Any, where: str = "VAE record") -> "VAERecord":
        """The record held by the JSON object `values`; `UserError` that names `where` if it is none. A null shift means 0."""
        if not isinstance(values, dict):
            raise UserError(f"{where}: must hold a JSON object with the keys {', '.join(_KEYS)}")
        if missing := [key for key in _KEYS if key not in values]:
            raise UserError(f"{where}: {missing[0]} is missing")
        values = {key: values[key] for key in (*_KEYS, *_OPTIONAL) if values.get(key) is not None}  # null: as if missing
        values.setdefault("sha256", None)
        values.setdefault("shift_factor", 0.0)
        _check_record(values, where)
        values |= {key: float(values[key]) for key in ("scaling_factor", "shift_factor")}
        return cls(**values | {key: _nested(values[key], tuple) for key in STATISTICS if key in values})

    def check_shape(self, shape: tuple[int, ...], where: str | Path) -> None:
        """Raise UserError if the statistics are not of latents of this shape (C, h, w)."""
        for key in STATISTICS:
            found = _shape(getattr(self, key)) or ()
            if len(found) == 3 and any(n not in (1, m) for n, m in zip(found, shape, strict=True)):
                raise UserError(
                    f"{where}: {key} is of latents of {' × '.join(map(str, found))}, but these are {' × '.join(map(str, shape))}"
                )


STATISTICS = ("channel_mean", "channel_std")
_OPTIONAL = ("vae_class", "posterior", *STATISTICS)
_KEYS = tuple(f.name for f in dataclasses.fields(VAERecord) if f.name not in _OPTIONAL)


def _shape(values: Any, depth: int = 3) -> tuple[int, ...] | None:
    """The shape of numbers in nested lists or tuples; None where they are ragged, deeper, or something else."""
    if not isinstance(values, list | tuple):
        return () if _is_number(values) else None
    shapes = {_shape(v, depth - 1) for v in values} if depth else set()
    inner = shapes.pop() if len(shapes) == 1 else None
    return None if inner is None else (len(values), *inner)


def _nested(values: Any, kind: type) -> Any:
    """Numbers as they are, and as floats inside nested lists or tuples, which become of the kind."""
    if not isinstance(values, list | tuple):
        return values
    return kind(_nested(v, kind) if isinstance(v, list | tuple) else float(v) for v in values)


def _check_record(values: dict[str, Any], where: str) -> None:
    """Raise UserError for a value that its key cannot have."""
    if not isinstance(values.get("vae"), str) or not isinstance(values["sha256"], str | None):
        raise UserError(f"{where}: vae and sha256 must be text")
    for key in ("downsample_factor", "latent_channels"):
        if type(values.get(key)) is not int or not 1 <= values[key] <= MAX_FACTOR:
            shown = repr(values.get(key))[:80]
            raise UserError(f"{where}: {key} is {shown}; it must be a whole number of at least 1, at most {MAX_FACTOR}")
    for key in ("scaling_factor", "shift_factor"):
        if not _is_number(values.get(key)):
            raise UserError(f"{where}: {key} is {repr(values.get(key))[:80]}; it must be a number")
    if values["scaling_factor"] == 0:
        raise UserError(f"{where}: scaling_factor must not be 0")
    if "vae_class" in values:
        class_of(values["vae_class"], f"{where}: vae_class")
    if not isinstance(values.get("posterior", True), bool):
        raise UserError(f"{where}: posterior must be true or false")
    for key in STATISTICS if any(key in values for key in STATISTICS) else ():
        channels, shape = values["latent_channels"], _shape(values.get(key)) or ()
        if shape != (channels,) and not (len(shape) == 3 and shape[0] in (1, channels)):
            raise UserError(
                f"{where}: {key} must be {channels} numbers, one for each channel, or {channels} × height × width of them"
            )
    if "channel_std" in values and torch.tensor(values["channel_std"], dtype=torch.float64).min() <= 0:
        raise UserError(f"{where}: channel_std must be above 0")


MAX_DECODED = 2**30  # bytes


MAX_FACTOR = 2**16  # pixels per latent, and channels: far above any VAE


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


@functools.cache
def _statistics(record: VAERecord) -> tuple[Tensor, Tensor]:
    """Mean and deviation that the latents are normalised by, float64 (C or 1, h or 1, w or 1)."""
    values = (torch.tensor(v, dtype=torch.float64) for v in (record.channel_mean, record.channel_std))
    mean, std = (v.view(-1, 1, 1) if v.dim() == 1 else v for v in values)
    return mean, std


@functools.cache
def _shift_and_scale(record: VAERecord, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shift and factor of every position, float32 of a shape that broadcasts to (C, h, w), copied to a device once."""
    if record.channel_mean is not None:
        mean, std = _statistics(record)
        shift, scale = mean, 1 / std
    else:
        shift, scale = (torch.tensor(v).view(1, 1, 1) for v in (record.shift_factor, record.scaling_factor))
    return shift.to(device, torch.float32), scale.to(device, torch.float32)


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
    config = parse_json((folder / "config.json").read_bytes(), folder / "config.json")
    kind = class_of((config if isinstance(config, dict) else {}).get("_class_name", "AutoencoderKL"), f"--vae {name}: {folder}")
    if expected is not None and expected.vae_class != kind.name:
        raise UserError(f"--vae {name}: an {kind.name}, but the latents were made by {expected.vae}, an {expected.vae_class}")
    import_torchvision()  # which diffusers imports
    cls = kind.load()
    try:
        safe = weights.suffix == ".safetensors"
        vae: VAE = cls.from_pretrained(folder, torch_dtype=dtype, use_safetensors=safe, local_files_only=True)
        kind.prepare(vae)
        facts = kind.facts(vae)
    except Exception as error:  # whatever a broken config or weights file makes diffusers raise
        raise UserError(f"--vae {name}: {folder} does not load as an {kind.name}: {first_line(error)}") from None
    identity = {"vae": SHORT_NAMES.get(name, name), "sha256": known_sha256(weights)}
    classes = {"vae_class": kind.name, "posterior": kind.posterior}
    record = VAERecord.from_dict(identity | facts | classes, f"--vae {name}: {folder}")
    vae.latent_record = record
    if expected is not None:
        _check_fits(name, record, expected)
        vae.latent_record = dataclasses.replace(record, **{key: getattr(expected, key) for key in STATISTICS})
    # Convolutions are a fifth quicker with channels last on a CPU; on CUDA each group norm would copy them twice.
    vae.to(device, memory_format=torch.channels_last if torch.device(device).type == "cpu" else torch.contiguous_format)
    return vae.eval().requires_grad_(False), record


@torch.no_grad()
def encode_moments(vae: VAE, images: Tensor) -> Tensor:
    """Posterior of images: uint8 (B, 3, H, W) → float32 (B, 2C, h, w), the means, then the standard deviations.

    Of a VAE without a posterior the latents, (B, C, h, w).
    """
    pixels = images.to(vae.device, torch.float32) / 127.5 - 1
    return _kind(vae).encode(vae, pixels.to(vae.dtype)).float()


def sample_latents(moments: Tensor, noise: Tensor, record: VAERecord) -> Tensor:
    """Latents as the model sees them, (z − shift) · scale: moments (B, 2C, h, w), noise (B, C, h, w) → (B, C, h, w).

    Where the record says that there is no posterior, moments are latents (B, C, h, w), and the noise is not used.
    """
    shift, scale = _shift_and_scale(record, moments.device)
    if not record.posterior:
        return (moments - shift) * scale
    mean, std = moments.chunk(2, dim=1)
    return (mean + std * noise - shift) * scale


@torch.no_grad()
def decode(vae: VAE, latents: Tensor) -> Tensor:
    """Images of the model's latents: (B, C, h, w), any float type → uint8 (B, 3, H, W)."""
    record = getattr(vae, "latent_record", None)  # `load_vae` has it from the record of the latents
    if record is not None and record.channel_mean is not None:
        mean, std = (_at_size(value, latents.shape[-2:]).to(latents) for value in _statistics(record))
        z = latents * std + mean
    else:
        z = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    kind = _kind(vae)
    parts = [to_uint8(kind.decode(vae, part)) for part in z.to(vae.device, vae.dtype).split(_images_at_a_time(vae, z))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _at_size(value: Tensor, size: torch.Size) -> Tensor:
    """Statistics (C, h, w) for latents of `size`: of positions, those of a coarser stage of a pyramid are means over them."""
    return value if value.shape[1:] in (size, (1, 1)) else F.adaptive_avg_pool2d(value, (size[0], size[1]))


def _images_at_a_time(vae: VAE, z: Tensor) -> int:
    """How many latents (B, C, h, w) are decoded together, so that no tensor is above `MAX_DECODED`, if one image's is not."""
    return max(1, MAX_DECODED // (_kind(vae).size_in_decoder(vae, z.shape[2], z.shape[3]) * vae.dtype.itemsize))


def _kind(vae: VAE) -> AutoencoderKL:
    return CLASSES.get(type(vae).__name__, CLASSES["AutoencoderKL"])


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
            "give a local folder of a diffusers autoencoder"
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
