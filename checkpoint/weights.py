"""One set of weights with its recorded configuration, and the model built from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from checkpoint import sharded, snapshots
from common.errors import UserError, first_line
from common.sizes import latent_sides, latent_size, sides
from common.tensor_files import Checksum
from config.options import Architecture
from config.rules import names
from models.conditioning import NullText
from models.published import PREDICTIONS
from models.text_encoders import TextRecord
from models.vae import SD_VAE, VAERecord

# The architecture options that the state dict's shapes depend on, or that change what a forward computes.
MODEL_OPTIONS = names(Architecture, model=True)


@dataclass
class Weights:
    """What a checkpoint says of its model."""

    state_dict: dict[str, Tensor]
    # The recorded options; empty where the file records none. Of others' models also `arguments`, those of the constructor that
    # no option has, and `predicts`, a key of `models.published.PREDICTIONS` where that is no velocity.
    config: dict[str, Any]
    record: VAERecord = SD_VAE
    step: int = 0
    text: TextRecord | None = None  # what a text model's features were, where the file records it
    checksum: Checksum | sharded.Checksum | None = None  # of the file that they are from; rank 0 alone has it
    prompts: Any = None  # that it is sampled with: `sampling.conditions.Prompts`, of text models
    guide: "Weights | None" = None  # of the checkpoint that guides this one in sampling

    @property
    def sha256(self) -> str | None:
        """Of the file, on rank 0."""
        return None if self.checksum is None else self.checksum.value()

    def check(self) -> None:
        """Raises UserError where the file does not match its sidecar: to be called before the weights are used."""
        if self.checksum is not None:
            self.checksum.check()

    def check_velocity(self, where: str) -> None:
        """Raises UserError where the model does not predict the velocity, so that it cannot be sampled from."""
        model = self.config.get("model")
        if "predicts" in self.config:
            raise UserError(
                f"{where}: holds a published {model}, which predicts {PREDICTIONS[self.config['predicts']]}, not the "
                "velocity that the samplers follow; a run may start from it (train.py --init-from)"
            )

    @property
    def takes_text(self) -> bool:
        """Whether the model is conditioned on text, and not on class labels."""
        is_text = self.config.get("model") and models.model_spec(self.config["model"]).text
        return bool(is_text or "text" in (self.config.get("arguments") or {}))


def build_model(found: Weights, where: str | Path, device: str | torch.device = "cpu", **overrides: Any) -> nn.Module:
    """The model that `found` records, in eval mode with its weights loaded and checked; `overrides` are constructor arguments."""
    model = meta_model(found, where, **overrides)  # no time spent on initial weights: all of them are replaced
    load_state_dict(model, found.state_dict, where, assign=True)
    found.check()
    return model.to(device).eval().requires_grad_(False)


def meta_model(found: Weights, where: str | Path, **overrides: Any) -> models.Backbone:
    """The model that `found` records, of meta tensors; `overrides` are constructor arguments."""
    config, arguments = found.config, found.config.get("arguments") or {}
    is_labelled = config.get("model") and not found.takes_text and "num_classes" not in arguments
    for name in ("model", "resolution", *(["num_classes"] if is_labelled else [])):
        if not config.get(name):
            raise UserError(f"{where}: the checkpoint records no {name}; give --{name.replace('_', '-')}")
    factor, resolution = found.record.downsample_factor, config["resolution"]
    if any(side % factor for side in sides(resolution)):
        raise UserError(f"{where}: resolution {resolution} is not divisible by the VAE's factor {factor}")
    found.record.check_shape((found.record.latent_channels, *latent_sides(resolution, factor)), where)
    try:
        with torch.device("meta"):
            return models.create_model(
                config["model"],
                input_size=latent_size(resolution, factor),
                in_channels=found.record.latent_channels,
                num_classes=config.get("num_classes") or 1,
                arguments=arguments,
                **(model_options(config) | {"fused_attn": config.get("fused_attn", True)} | overrides),
            )
    except UserError:
        raise
    except (RuntimeError, TypeError, ArithmeticError, ValueError, LookupError) as error:  # sizes beyond all bounds, or none
        raise UserError(f"{where}: no such model can be made: {first_line(error)}") from None


def save_weights(path: Path, found: Weights) -> None:
    """A safetensors file of the weights, with their configuration and the records of VAE and text in its metadata. Raises WriteError."""
    tensors = {name: compact(tensor) for name, tensor in found.state_dict.items()}
    snapshots.save(path, tensors, snapshots.metadata(found.config, found.record, found.step, found.text))


def compact(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, in a storage of its own size: a view would carry all of its storage into the file."""
    fits = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if fits else tensor.clone().contiguous()


def model_options(config: dict[str, Any]) -> dict[str, Any]:
    """The constructor arguments among recorded options that this model family knows."""
    spec, own = models.model_spec(config["model"]), config.get("arguments") or {}
    options = {k: config[k] for k in MODEL_OPTIONS if k in config and (k == "qk_norm" or spec.takes(k))}
    return {k: v for k, v in options.items() if k not in own}


def load_state_dict(model: nn.Module, state_dict: dict[str, Tensor], where: str | Path, assign: bool = False) -> None:
    """Load all or nothing. Raises UserError as `check_fits`."""
    check_fits(model, model.state_dict(), state_dict, where)
    model.load_state_dict(state_dict, assign=assign)


def check_fits(model: nn.Module, own: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], where: str | Path) -> None:
    """Raises UserError that names the first few missing or unknown keys and wrong shapes, beside the model's `own` state dict."""
    wrong = [f"{k} is missing" for k in own if k not in state_dict]
    optional = ("null_text", "null_pooled") if isinstance(model, NullText) else ()  # which a new model does not have yet
    wrong += [f"{k} is unknown" for k in state_dict if k not in own and k not in optional]
    for k in own:
        if k in state_dict and own[k].shape != state_dict[k].shape:
            wrong.append(f"{k} has shape {tuple(state_dict[k].shape)} instead of {tuple(own[k].shape)}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{where}: not a checkpoint of this model: {'; '.join(wrong[:3])}{more}")
