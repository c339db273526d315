"""The architecture that a checkpoint records, and options by hand that fill its gaps."""

from pathlib import Path
from typing import Any

import models
from checkpoint.weights import Weights
from common.errors import UserError
from common.sizes import latent_size
from config.options import Architecture
from config.rules import names
from models.vae import VAERecord

# What the checkpoint decides, and options by hand may only fill in.
ARCHITECTURE = names(Architecture, resume="same", when=(None, "elit", "dfm"), images=True)
# How the model was made to be sampled, where the user says nothing else.
SCHEDULE = names(Architecture, group="dfm", resume="free", images=True)

DEPTHS = ("head_depth", "tail_depth")


def resolve_architecture(config: Architecture, given: dict[str, Any], weights: Weights, where: str | Path) -> None:
    """Take the architecture from the checkpoint `where`; what is given by hand fills gaps in it and may not contradict it.

    Both `config` and what `weights` records then hold all of it.
    """
    if given.get("model"):
        given = given | {"model": models.model_spec(given["model"]).name}
    recorded = {k: v for k, v in with_former_defaults(weights.config, weights.record).items() if v is not None}
    for name in ARCHITECTURE:
        value = recorded.get(name, getattr(config, name))
        if name in recorded and name in given and given[name] not in (None, value):
            raise UserError(f"--{name.replace('_', '-')} {given[name]} contradicts {where}, which records {value}")
        setattr(config, name, value)
    if config.model is None:
        raise UserError(f"{where}: the checkpoint records no model; give --model")
    for name, value in with_former_defaults(vars(config), weights.record).items():
        setattr(config, name, value)
    for name in SCHEDULE:
        if name not in given and recorded.get(name):
            setattr(config, name, recorded[name])
    weights.config |= {name: getattr(config, name) for name in (*ARCHITECTURE, "fused_attn")}


def with_former_defaults(options: dict[str, Any], record: VAERecord) -> dict[str, Any]:
    """The options with what a checkpoint that does not record them was made with, where they name a model.

    That is: head and tail depth "by size", of the table that held until they were recorded, and the published Write.
    """
    if not options.get("model") or not options.get("resolution"):
        return options
    size = latent_size(options["resolution"], record.downsample_factor)
    spec = models.model_spec(options["model"])
    if not spec.elastic:
        return options
    sizes = {**spec.arguments(size, levels=options.get("levels")), **spec.former_split}
    former = {k: sizes[k] for k in DEPTHS if k in sizes} | {"elit_write": "published", "elit_mlp_ratio": 1.0}
    return {**options, **{k: v for k, v in former.items() if options.get(k) is None}}
