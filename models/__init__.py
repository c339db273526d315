"""The registry: names → models.

A family is a backbone with its own table of sizes; `ELIT-` in front of a name puts an elastic core into it.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from common.errors import UserError, did_you_mean
from models.backbone import Backbone, checkpoint_blocks
from models.compilation import compile_model
from models.costs import count_flops, count_reused_flops
from models.dfm import DFMELITSiT, DFMSiT
from models.elit import Elastic, ELITHDiT, ELITMMDiT, ELITSiT, ELITUViT
from models.hdit import HDiT
from models.latent_interface import budget_to_k
from models.layers import QKNorm
from models.mmdit import MMDiT
from models.published import import_state_dict
from models.sit import SiT
from models.uvit import UViT

__all__ = [
    "MODELS",
    "Backbone",
    "ModelSpec",
    "checkpoint_blocks",
    "compile_model",
    "count_flops",
    "count_reused_flops",
    "create_model",
    "import_state_dict",
    "model_spec",
    "register",
]


@dataclass(frozen=True)
class ModelSpec:
    """One registered model: its class and its size.

    Attributes:
        name, family: e.g. "ELIT-SiT-XL/2" and "ELIT-SiT".
        sizes: what the name says, as arguments of the constructor's `size_arguments`.
        qk_norm: the norm of queries and keys that the option of this name turns on; None where the model has no such norm.
        former_split: head and tail depth of checkpoints that record none, where today's default is another.
    """

    name: str
    family: str
    constructor: type[Backbone]
    sizes: Mapping[str, Any]
    qk_norm: QKNorm | None = None
    former_split: Mapping[str, int] = field(default_factory=dict)

    @property
    def elastic(self) -> bool:
        """Whether it has a compute budget."""
        return issubclass(self.constructor, Elastic)

    @property
    def staged(self) -> bool:
        """Whether it works on a pyramid."""
        return issubclass(self.constructor, DFMSiT)

    @property
    def defaults(self) -> dict[str, Any]:
        """The constructor's arguments that have a default, with it."""
        functions = [cls.__init__ for cls in reversed(self.constructor.__mro__) if issubclass(cls, Backbone)]
        found = [p for f in functions for p in inspect.signature(f).parameters.values()]
        return {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}

    def takes(self, name: str) -> bool:
        """Whether the constructor has an argument of this name."""
        return name in _argument_names(self.constructor)

    @property
    def text(self) -> bool:
        """Whether it is always conditioned on text, and never on class labels."""
        return not self.constructor.takes_labels

    @property
    def merged_latents(self) -> int:
        """Latents of a group that become one in the innermost blocks: budgets of fewer cost no less there."""
        return 4 if self.sizes.get("layout") == "hourglass" else 1

    def wasted_saving(self, group_size: int, budgets: Iterable[float | None]) -> str | None:
        """What to warn of where some of the budgets cost no less than others, since blocks merge latents."""
        J = group_size**2
        if not self.elastic or all(budget_to_k(b, J) >= self.merged_latents for b in budgets):
            return None
        return (
            f"budgets below {self.merged_latents}/{J} cost {self.name} no less in its inner blocks, which merge "
            f"{self.merged_latents} latents"
        )

    @property
    def backbone(self) -> str:
        """The family without ELIT and DFM: models of one backbone have the same blocks."""
        return self.family.removeprefix("DFM-").removeprefix("ELIT-")

    def arguments(self, input_size: int | tuple[int, int], **overrides: Any) -> dict[str, Any]:
        """The constructor's arguments for VAE latents of `input_size`, `overrides` in place of those of the size."""
        return self.constructor.size_arguments(input_size, **{**self.sizes, **overrides})


_ENDS = ("head_depth", "tail_depth")
# Of each size the backbone's arguments, and those of ELIT around it.
Table = dict[str, tuple[dict[str, Any], dict[str, int]]]


def _table(names: tuple[str, ...], *rows: tuple, ends: tuple[str, ...] = _ENDS) -> Table:
    """Rows of (size, values of `names` …, value of `ends`)."""
    return {size: (dict(zip(names, values, strict=True)), {end: last for end in ends}) for size, *values, last in rows}


_SIT = _table(  # splits by the ELIT paper's study of B/2 and XL/2; of Ti by docs/findings.md
    ("depth", "hidden_size", "num_heads"),
    ("Ti", 8, 192, 3, 2),
    ("S", 12, 384, 6, 3),
    ("B", 12, 768, 12, 3),
    ("L", 24, 1024, 16, 4),
    ("XL", 28, 1152, 16, 4),
)
# The splits until they were recorded in checkpoints; SiT's two layouts still have them.
_FORMER_SPLITS: dict[str, dict[str, int]] = {
    size: dict.fromkeys(_ENDS, ends) for size, ends in {"Ti": 1, "S": 2, "B": 2, "L": 4, "XL": 4}.items()
}
_SIT_LAYOUTS: Table = {size: (arguments, _FORMER_SPLITS[size]) for size, (arguments, _) in _SIT.items()}
_UVIT = _table(  # depth: blocks but the middle one
    ("depth", "hidden_size", "num_heads", "final_conv"),
    ("Ti", 6, 192, 3, True, 1),
    ("S", 12, 512, 8, True, 2),
    ("S-Deep", 16, 512, 8, True, 2),
    ("M", 16, 768, 12, True, 2),
    ("L", 20, 1024, 16, True, 3),
    ("H", 28, 1152, 16, False, 4),
)
_HDIT = _table(
    ("inner_depth", "inner_width", "outer_depth", "mapping_depth", "mapping_width", "head_width"),
    ("Ti", 6, 192, 1, 1, 192, 32, 1),
    ("S", 8, 1024, 2, 2, 256, 64, 1),
    ("B", 11, 768, 2, 1, 768, 64, 2),
    ("M", 12, 1280, 2, 2, 256, 64, 2),
    ("L", 16, 1536, 2, 2, 256, 64, 2),
    ends=("inner_ends",),  # layers of the inner level before Read, and as many after Write
)
_MMDIT = _table(  # B: REPA's text-to-image model; L and XL: SD3-medium and SD3.5-large
    ("depth", "hidden_size", "num_heads", "text_width", "text_length", "pooled_width", "qk_norm"),
    ("Ti", 8, 192, 3, 768, None, None, None, 1),
    ("S", 12, 384, 6, 768, None, None, None, 2),
    ("B", 24, 768, 24, 768, 77, None, None, 4),
    ("L", 24, 1536, 24, 4096, 154, 2048, None, 4),
    ("XL", 38, 2432, 38, 4096, 154, 2048, "rms", 5),
)
# The ELIT paper's own U-ViT and HDiT: SiT's blocks in their layouts.
_LAYOUT = {"rotary": True, "qk_norm": "rms"}
_UNET, _HOURGLASS = {"layout": "unet", **_LAYOUT}, {"layout": "hourglass", **_LAYOUT}


def _family(
    family: str, constructor: type[Backbone], table: Table, patch_sizes: tuple[int, ...], norm: QKNorm | None, /, **fixed: Any
) -> Iterator[ModelSpec]:
    for size, (arguments, elit) in table.items():
        for patch_size in patch_sizes:
            ends = elit if issubclass(constructor, Elastic) else {}
            sizes = {**arguments, "patch_size": patch_size, **ends, **fixed}
            former = _FORMER_SPLITS[size] if ends and table is _SIT else {}
            yield ModelSpec(f"{family}-{size}/{patch_size}", family, constructor, sizes, norm, former)


_SPECS = (
    *_family("SiT", SiT, _SIT, (1, 2, 4, 8), True),
    *_family("ELIT-SiT", ELITSiT, _SIT, (1, 2, 4, 8), True),
    *_family("DFM-SiT", DFMSiT, _SIT, (2, 4, 8), True),
    *_family("DFM-ELIT-SiT", DFMELITSiT, _SIT, (2, 4, 8), True),
    *_family("SiT-UViT", SiT, _SIT_LAYOUTS, (2,), "rms", **_UNET),
    *_family("ELIT-SiT-UViT", ELITSiT, _SIT_LAYOUTS, (2,), "rms", **_UNET),
    *_family("SiT-HDiT", SiT, _SIT_LAYOUTS, (2,), "rms", **_HOURGLASS),
    *_family("ELIT-SiT-HDiT", ELITSiT, _SIT_LAYOUTS, (2,), "rms", **_HOURGLASS),
    *_family("U-ViT", UViT, _UVIT, (1, 2, 4), None),
    *_family("ELIT-U-ViT", ELITUViT, _UVIT, (1, 2, 4), None),
    *_family("HDiT", HDiT, _HDIT, (1, 2, 4), None),
    *_family("ELIT-HDiT", ELITHDiT, _HDIT, (1, 2, 4), None),
    *_family("MMDiT", MMDiT, _MMDIT, (2, 4), "rms"),
    *_family("ELIT-MMDiT", ELITMMDiT, _MMDIT, (2, 4), "rms"),
)
MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in _SPECS}


def register(name: str, constructor: type[Backbone], **sizes: Any) -> ModelSpec:
    """Add a model of one's own: every script then takes `name`, where the module that registers it is imported first.

    Args:
        name: "FAMILY-SIZE/PATCH_SIZE", e.g. "ELIT-Plain-Ti/2".
        constructor: its class.
        sizes: arguments of the constructor that the name fixes; `patch_size` is the name's.

    Raises:
        UserError: a name of another form, or one that is there already.
    """
    form = re.fullmatch(r"(.+)-([^-/]+)/(\d+)", name)
    if form is None or name in MODELS:
        raise UserError(f"model {name!r}: {'is registered already' if form else 'must be named FAMILY-SIZE/PATCH_SIZE'}")
    MODELS[name] = ModelSpec(name, form[1], constructor, {**sizes, "patch_size": int(form[3])})
    return MODELS[name]


def model_spec(name: str) -> ModelSpec:
    """The registered spec of `name`; `UViT-…` and `MM-DiT-…` are other spellings of `U-ViT-…` and `MMDiT-…`.

    Raises:
        UserError: there is none; with the nearest name.
    """
    known = re.sub(r"^((?:DFM-)?(?:ELIT-)?)MM-DiT\b", r"\1MMDiT", re.sub(r"^((?:DFM-)?(?:ELIT-)?)UViT\b", r"\1U-ViT", name))
    if known in MODELS:
        return MODELS[known]
    if re.match(r"DFM-(ELIT-)?(U-ViT|HDiT|MMDiT|SiT-UViT|SiT-HDiT)\b", known):
        raise UserError(f"model {name!r}: DFM exists only for SiT; choose DFM-SiT-… or DFM-ELIT-SiT-…, or leave DFM- out")
    raise UserError(f"unknown model {name!r}{did_you_mean(known, MODELS)}; known: {known_names()}")


def known_names() -> str:
    """All registered names, a pattern for each backbone."""
    patterns: dict[str, tuple[dict, dict]] = {}
    for spec in MODELS.values():
        size, patch_size = spec.name.removeprefix(spec.family + "-").split("/")
        sizes, patch_sizes = patterns.setdefault(f"{'DFM-' * spec.staged}[ELIT-]{spec.backbone}", ({}, {}))
        sizes[size] = patch_sizes[patch_size] = None
    return ", ".join(f"{name}-{{{','.join(sizes)}}}/{{{','.join(p)}}}" for name, (sizes, p) in patterns.items())


def create_model(
    name: str,
    *,
    input_size: int | tuple[int, int],
    in_channels: int = 4,
    num_classes: int = 1000,
    z_dims: Iterable[int] = (),
    arguments: Mapping[str, Any] = MappingProxyType({}),
    **overrides: Any,
) -> Backbone:
    """A freshly initialised model.

    Args:
        name: a key of `MODELS`, e.g. "ELIT-SiT-XL/2", or another spelling that `model_spec` knows.
        input_size: side of the VAE latents, or (rows, columns).
        in_channels: of the VAE latents.
        num_classes: of class-conditional models; text models take none.
        z_dims: feature widths of the REPA target encoders; empty without REPA.
        arguments: constructor arguments as they are, `None` too; they go before all others but the overrides.
        overrides: any other constructor argument, e.g. `head_depth=8`, `elit_tail="skip"`; `None` keeps the default. `qk_norm` is
            a switch: `True` turns on the norm that the family has, `False` leaves what the registered size has.

    Raises:
        UserError: unknown name or argument, or sizes that do not fit.
    """
    spec = model_spec(name)
    overrides = {k: v for k, v in overrides.items() if v is not None and (k, v) != ("qk_norm", False)}
    if overrides.get("qk_norm") is True and spec.qk_norm is not None:
        overrides["qk_norm"] = spec.qk_norm
    known = _argument_names(spec.constructor)
    for key in overrides:
        if key not in known:
            raise UserError(f"{spec.name} has no option {key!r}{did_you_mean(key, known)}")
    classes = {"num_classes": num_classes} if "num_classes" in known else {}
    overrides = {**classes, **arguments, **overrides}
    inputs = {"input_size": input_size, "in_channels": in_channels, "z_dims": tuple(z_dims)}
    return spec.constructor(**inputs, **spec.arguments(input_size, **overrides))


def _argument_names(constructor: type[Backbone]) -> set[str]:
    """What a model of this class takes by name, or takes as its size."""
    classes = [cls for cls in constructor.__mro__ if issubclass(cls, Backbone) and cls is not Backbone]
    functions = [constructor.size_arguments, *(cls.__init__ for cls in classes)]
    return {p.name for f in functions for p in inspect.signature(f).parameters.values() if p.kind is p.KEYWORD_ONLY}
