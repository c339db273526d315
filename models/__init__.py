"""The registry: names → models."""

import inspect
from dataclasses import dataclass
from typing import Any

from common.errors import UserError, did_you_mean
from models.backbone import Backbone, checkpoint_blocks, compile_model
from models.costs import count_flops
from models.dfm import DFMELITSiT, DFMSiT
from models.elit import Elastic, ELITSiT
from models.sit import SiT

__all__ = ["MODELS", "ModelSpec", "checkpoint_blocks", "compile_model", "count_flops", "create_model", "model_spec"]


@dataclass(frozen=True)
class ModelSpec:
    """One registered model: its class and its size."""

    family: str
    constructor: type[Backbone]
    sizes: dict[str, int]

    @property
    def elastic(self) -> bool:
        """Whether it has a compute budget."""
        return issubclass(self.constructor, Elastic)

    @property
    def staged(self) -> bool:
        """Whether it works on a pyramid."""
        return issubclass(self.constructor, DFMSiT)


_SIZES = {  # depth, width, heads, head / tail depth of ELIT
    "Ti": (8, 192, 3, 1),
    "S": (12, 384, 6, 2),
    "B": (12, 768, 12, 2),
    "L": (24, 1024, 16, 4),
    "XL": (28, 1152, 16, 4),
}
_FAMILIES = {"SiT": SiT, "ELIT-SiT": ELITSiT, "DFM-SiT": DFMSiT, "DFM-ELIT-SiT": DFMELITSiT}


def _specs() -> dict[str, ModelSpec]:
    specs = {}
    for size, (depth, hidden_size, num_heads, ends) in _SIZES.items():
        for patch_size in (2, 4, 8):
            sizes = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads, "patch_size": patch_size}
            elit = sizes | {"head_depth": ends, "tail_depth": ends}
            for family, constructor in _FAMILIES.items():
                arguments = elit if issubclass(constructor, Elastic) else sizes
                specs[f"{family}-{size}/{patch_size}"] = ModelSpec(family, constructor, arguments)
    return specs


MODELS: dict[str, ModelSpec] = _specs()


def model_spec(name: str) -> ModelSpec:
    """The registered spec of `name`. Raises UserError with the nearest name where there is none."""
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}{did_you_mean(name, MODELS)}; known: {', '.join(MODELS)}")
    return MODELS[name]


def create_model(
    name: str, *, input_size: int | tuple[int, int], in_channels: int = 4, num_classes: int = 1000, z_dims=(), **overrides: Any
) -> Backbone:
    """A freshly initialised model.

    Args:
        name: a key of `MODELS`, e.g. "ELIT-SiT-XL/2".
        input_size: side of the VAE latents, or (rows, columns).
        z_dims: feature widths of the REPA target encoders; empty without REPA.
        overrides: any other constructor argument, e.g. `head_depth=8`, `elit_tail="skip"`; `None` keeps the default.
    Raises:
        UserError: unknown name or argument, or sizes that do not fit.
    """
    spec = model_spec(name)
    signatures = [inspect.signature(cls.__init__) for cls in spec.constructor.__mro__ if issubclass(cls, Backbone)]
    known = {p.name for signature in signatures for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    for key in overrides:
        if key not in known:
            raise UserError(f"{name} has no option {key!r}{did_you_mean(key, known)}")
    arguments = spec.sizes | {k: v for k, v in overrides.items() if v is not None}
    return spec.constructor(
        input_size=input_size, in_channels=in_channels, num_classes=num_classes, z_dims=tuple(z_dims), **arguments
    )
