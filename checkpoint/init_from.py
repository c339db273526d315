"""Starting a model from another one's weights: SiT → ELIT, another resolution, group size or number of classes.

What both have is taken over, tables of positions are resampled, and what the other has not stays as initialised.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from checkpoint.published import depth_of
from checkpoint.weights import Weights
from common.errors import UserError
from models.latent_interface import LatentInterface
from models.uvit import UViT

# The options whose change a user should see.
_ELIT = ("elit_group_size", "elit_tail", "elit_write", "elit_mlp_ratio")
DESCRIBING = ("model", "resolution", "num_classes", "path_type", "qk_norm", "enc_type", *_ELIT)


@dataclass
class Transfer:
    """The tensors to load into a model, and what became of each of its own and of the other's, by name."""

    title: str
    state_dict: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)  # those of `state_dict` that are not just taken over, and how
    new: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # of the other model

    def summary(self) -> str:
        """What was taken over, changed, new and left aside, tensors gathered by the part they are in."""
        groups = {
            "taken over": [k for k in self.state_dict if k not in self.changed],
            "changed": [f"{name} ({how})" for name, how in self.changed.items()],
            "new": self.new,
            "left aside": self.left,
        }
        lines = [f"  {kind}: {_by_part(names)}" for kind, names in groups.items() if names]
        return "\n".join([self.title, *lines])


def init_from(found: Weights, model: nn.Module, config: dict[str, Any], where: str) -> Transfer:
    """What of `found` goes into `model`, whose options are `config`; nothing is loaded yet.

    - Blocks are matched by their place, so that SiT's become head, core and tail of an ELIT model.
    - The fixed sine–cosine table is the model's own; of a learned one (U-ViT's) the patches' rows are resized as an image (bicubic).
    - Of another number of classes the null label's row is kept; the classes are others.
    - `read_pos` and `write_pos` lie on the tokens of a group, and are resized as images (bicubic).
    - `latent_pos` lies on the grid of groups, and is resized likewise, latent by latent. Latents are in the order of their
      importance, of which a budget keeps the first: for more or fewer of them, `query` and `latent_pos` are interpolated
      along that order.

    Raises:
        UserError: the models' blocks differ, in kind, width or number.
    """
    if not found.config.get("model"):
        raise UserError(f"--init-from {where}: records no model")
    backbones = [models.model_spec(c["model"]).backbone for c in (found.config, config)]
    if backbones[0] != backbones[1]:
        raise UserError(
            f"--init-from {where}: holds a {found.config['model']}, whose blocks are not those of {config['model']}"
        )
    fixed = {"pos_embed", "null_text", "null_pooled"} & dict(model.named_buffers()).keys()
    own = {k: v for k, v in model.state_dict().items() if k not in fixed}
    other = {k: v for k, v in found.state_dict.items() if k not in fixed}
    if isinstance(size := found.config.get("resolution"), str) and size != config["resolution"]:
        raise UserError(f"--init-from {where}: is of images of {size} pixels, but the model of {config['resolution']}")
    # Projectors are of use for the same encoders alone.
    same_encoders = found.config.get("enc_type") == config["enc_type"]
    aside = [k for k in other if k.startswith("projectors.") and not same_encoders]
    other = {k: v for k, v in other.items() if k not in aside}
    _check_blocks(own, other, where)
    differing = [k for k in DESCRIBING if found.config.get(k) not in (None, config[k])]
    if not all(models.model_spec(c["model"]).elastic for c in (config, found.config)):
        differing = [k for k in differing if not k.startswith("elit_")]
    options = "".join(f", {k} {found.config[k]} → {config[k]}" for k in differing)
    theirs = (found.config.get("arguments") or {}).get("time_scale", 1.0)  # SD3's is 1000, which no weight tells
    if theirs != (own_scale := getattr(model, "time_scale", 1.0)):
        options += f", time_scale {theirs} → {own_scale}"
    options += f", what it predicts {found.config['predicts']} → velocity" if "predicts" in found.config else ""
    # A table of another grid may have as many rows.
    moved = _GRIDS if "resolution" in differing and isinstance(config["resolution"], str) else ()
    made = Transfer(f"started from {where}: step {found.step}{options}", left=[*aside, *(k for k in other if k not in own)])
    for name, dst in own.items():
        src = other.get(name)
        if src is not None and src.shape == dst.shape and name not in moved:
            made.state_dict[name] = src
        elif src is not None and name in _ADAPT:
            try:
                made.state_dict[name], made.changed[name] = _ADAPT[name](src, dst, model)
                fits = made.state_dict[name].shape == dst.shape
            except (RuntimeError, IndexError, ValueError, TypeError):
                fits = False
            if not fits:
                shapes = f"{tuple(src.shape)} cannot be brought to {tuple(dst.shape)}"
                raise UserError(f"--init-from {where}: {name} of shape {shapes}")
        else:
            made.new.append(name)
    return made


def _check_blocks(own: dict[str, Tensor], other: dict[str, Tensor], where: str) -> None:
    name = next(k for k in own if k.startswith("blocks.0.") and k.endswith(("mlp.fc1.weight", "ff.up_proj.weight")))
    if name not in other or other[name].dim() != 2:
        raise UserError(f"--init-from {where}: {name} is missing, or no matrix")

    def size(state: dict[str, Tensor]) -> tuple[int, int, int]:
        hidden, width = state[name].shape
        return depth_of(state), width, hidden

    if size(own) != size(other):
        sizes = ["{} blocks of width {} (MLP {})".format(*size(state)) for state in (other, own)]
        raise UserError(f"--init-from {where}: has {sizes[0]}, but the model {sizes[1]}; they must be the same")


def _labels(src: Tensor, dst: Tensor, _: nn.Module) -> tuple[Tensor, str]:
    table = dst.clone()
    table[-1] = src[-1]
    return table, f"null label's row kept, {len(dst) - 1} class rows new"


def _patch_positions(src: Tensor, dst: Tensor, model: nn.Module) -> tuple[Tensor, str]:
    assert isinstance(model, UViT)
    (rows, columns), side = model.grid_size, math.isqrt(max(0, src.shape[1] - model.prefix))
    if model.prefix + side**2 != src.shape[1]:
        return dst, "as initialised: the other has other tokens before the patches"
    patches = _as_image(src[0, model.prefix :], (side, side), (rows, columns))
    return torch.cat([src[:, : model.prefix], patches[None]], dim=1), f"{side} × {side} → {rows} × {columns} tokens"


def _query(src: Tensor, dst: Tensor, _: nn.Module) -> tuple[Tensor, str]:
    return _along_order(src, len(dst)), f"{len(src)} → {len(dst)} latents"


def _token_positions(src: Tensor, dst: Tensor, _: nn.Module) -> tuple[Tensor, str]:
    before, after = math.isqrt(len(src)), math.isqrt(len(dst))
    return _as_image(src, (before, before), (after, after)), f"{before} × {before} → {after} × {after} tokens"


def _latent_positions(src: Tensor, dst: Tensor, model: nn.Module) -> tuple[Tensor, str]:
    interface = model.interface
    assert isinstance(interface, LatentInterface)
    rows, columns = (n // g for n, g in zip(interface.grid_size, interface.group_shape, strict=True))
    before, after = math.isqrt(len(src)), (rows, columns)
    table = _as_image(src.flatten(1), (before, before), after).unflatten(1, src.shape[1:])  # (G, J, D)
    table = _along_order(table.transpose(0, 1), dst.shape[1]).transpose(0, 1).contiguous()
    how = f"{before} × {before} → {after[0]} × {after[1]} groups, {src.shape[1]} → {dst.shape[1]} latents"
    return table, how


_ADAPT = {
    "y_embedder.embedding_table.weight": _labels,
    "label_emb.weight": _labels,
    "class_emb.weight": _labels,
    "pos_embed": _patch_positions,
    "interface.query": _query,
    "interface.read_pos": _token_positions,
    "interface.write_pos": _token_positions,
    "interface.latent_pos": _latent_positions,
}


_GRIDS = ("pos_embed", "interface.latent_pos")  # whose rows lie on the grid of tokens or groups


def _as_image(table: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """A row-major table (rows · columns, D) on another grid."""
    if before == after:
        return table
    image = table.float().unflatten(0, before).permute(2, 0, 1)[None]  # (1, D, rows, columns)
    image = F.interpolate(image, after, mode="bicubic", align_corners=False, antialias=True)
    return image[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)


def _along_order(table: Tensor, count: int) -> Tensor:
    """(J, …) → (count, …), linear between the neighbours; first and last stay, so that no two rows are the same."""
    if len(table) == count:
        return table
    lines = table.float().flatten(1).T[None]  # (1, …, J)
    lines = F.interpolate(lines, count, mode="linear", align_corners=True)
    return lines[0].T.unflatten(1, table.shape[1:]).to(table.dtype)


def _by_part(names: list[str]) -> str:
    """`blocks.* (144), interface.reader.* (12), …`, single ones by their name."""
    parts: dict[str, list[str]] = {}
    for name in names:
        head = name.split(".")
        parts.setdefault(".".join(head[: 2 if head[0] == "interface" else 1]), []).append(name)
    return ", ".join(same[0] if len(same) == 1 else f"{part}.* ({len(same)})" for part, same in parts.items())
