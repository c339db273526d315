"""What the tensors of a bare state dict, under our names, tell of the model: the constructor's arguments, by backbone."""

import math
import re
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import UserError
from models.hdit import hourglass

CLIP_TOKENS = 77  # of text, where a table of positions does not tell it from the image's tokens


@dataclass(frozen=True)
class Shapes:
    """The shapes of a state dict; what is missing, or has other dimensions, is a UserError that names it."""

    path: Path
    family: str
    state_dict: dict[str, Tensor]

    def __contains__(self, name: str) -> bool:
        return name in self.state_dict

    def __call__(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of the tensor, of so many dimensions."""
        if name not in self.state_dict:
            raise UserError(f"{self.path}: not a checkpoint of a {self.family}: {name} is missing")
        shape = tuple(self.state_dict[name].shape)
        if len(shape) != dims:
            raise UserError(f"{self.path}: {name} has shape {shape}, which no model has")
        return shape

    def count(self, part: str) -> int:
        """One more than the highest number N of a tensor `part.N.…`, of those that can be: there is a tensor for each."""
        found = (re.match(re.escape(part) + r"\.([0-9]{1,6})\.", name) for name in self.state_dict)
        count = 1 + max((int(m[1]) for m in found if m), default=-1)
        if count > len(self.state_dict):
            raise UserError(f"{self.path}: not a checkpoint of a {self.family}: there are no weights for {count} {part}")
        return count

    def square(self, cells: int, name: str) -> int:
        """The side of a square grid of so many cells."""
        side = math.isqrt(max(cells, 0))
        if side == 0 or side * side != cells:
            raise UserError(f"{self.path}: {name} has positions of {cells} tokens, which are no square image's")
        return side


def hdit_patches(shapes: Shapes, patch_size: Any, channels: list[int]) -> tuple[int, int]:
    """Patch size p and channels C of an HDiT, whose weights tell p²·C alone: of a known p, or so that C is one of `channels`."""
    _, inputs = shapes("patch_in.proj.weight", 2)
    if type(patch_size) is int and patch_size > 0 and inputs % patch_size**2 == 0:
        return patch_size, inputs // patch_size**2
    for count in channels:
        for p in (4, 2, 1):
            if p * p * count == inputs:
                return p, count
    raise UserError(f"{shapes.path}: does not tell the patch size of its {inputs} inputs a token; give --model and --vae")


def uvit(shapes: Shapes, side: int | None, patch_size: int) -> tuple[dict[str, Any], int | None]:
    """U-ViT's arguments, and the side of its token grid; `side`: of the latents, where that is known."""
    width = shapes("patch_embed.proj.weight", 4)[0]
    told: dict[str, Any] = {
        "depth": shapes.count("blocks") - 1,
        "hidden_size": width,
        "final_conv": "final_layer.weight" in shapes,
        "time_mlp": "time_embed.0.weight" in shapes,
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "num_classes": shapes("label_emb.weight", 2)[0] - 1 if "label_emb.weight" in shapes else None,
    }
    tokens = shapes("pos_embed", 3)[1] - 1  # but time
    if "context_embed.weight" in shapes:
        length = CLIP_TOKENS if math.isqrt(max(0, tokens - CLIP_TOKENS)) ** 2 == tokens - CLIP_TOKENS else None
        if length is None and side is not None:
            length = tokens - (side // patch_size) ** 2
        if length is None or length < 1:
            raise UserError(f"{shapes.path}: does not tell how many of its {tokens} tokens are text; give --resolution")
        told["text"] = [length, shapes("context_embed.weight", 2)[1]]
        tokens -= length
    elif told["num_classes"] is not None:
        tokens -= 1
    return told, shapes.square(tokens, "pos_embed")


def hdit(shapes: Shapes) -> tuple[dict[str, Any], int | None]:
    """HDiT's arguments. Kinds of attention have no weights: neighborhoods of 7 outside, global inside, as in all its sizes."""
    blocks = range(shapes.count("blocks"))
    widths = [shapes("patch_in.proj.weight", 2)[0]]
    widths += [shapes(f"merges.{i}.proj.weight", 2)[0] for i in range(shapes.count("merges"))]
    runs = [(w, len(list(run))) for w, run in groupby(shapes(f"blocks.{i}.self_attn.qkv_proj.weight", 2)[1] for i in blocks)]
    depths = [count for _, count in runs]
    if [w for w, _ in runs] != widths + widths[-2::-1] or depths != depths[::-1] or any(a == b for a, b in pairwise(widths)):
        raise UserError(f"{shapes.path}: does not tell the depths of its levels, of widths {', '.join(map(str, widths))}")
    depths = depths[: len(widths)]
    heads = shapes(f"blocks.{sum(depths[:-1])}.self_attn.scale", 1)[0]
    of_size = {"inner_depth": depths[-1], "inner_width": widths[-1], "outer_depth": depths[0]}
    told = {
        "depths": depths,
        "widths": widths,
        "attentions": hourglass((1, 1), **of_size, levels=len(widths))["attentions"],
        "head_width": max(1, widths[-1] // max(1, heads)),
        "mapping_depth": shapes.count("mapping.blocks"),
        "mapping_width": shapes("mapping.out_norm.scale", 1)[0],
        "num_classes": shapes("class_emb.weight", 2)[0] - 1 if "class_emb.weight" in shapes else None,
    }
    return told, None


def mmdit(shapes: Shapes, side: int | None, patch_size: int, stability: bool) -> tuple[dict[str, Any], int | None]:
    """MM-DiT's arguments, and the side of its token grid. `stability`: SD3's form, of time 0 … 1000 and a table for any size."""
    table = shapes.square(shapes("pos_embed", 3)[1], "pos_embed")
    tokens = table if side is None else side // patch_size
    told: dict[str, Any] = {
        "depth": shapes.count("blocks"),
        "hidden_size": shapes("x_embedder.proj.weight", 4)[0],
        "text_width": shapes("context_embedder.weight", 2)[1],
        "pooled_width": shapes("y_embedder.0.weight", 2)[1] if "y_embedder.0.weight" in shapes else None,
        "dual_attention": [i for i in range(shapes.count("blocks")) if f"blocks.{i}.image.attn2.qkv.weight" in shapes],
        "pos_grid": None if tokens == table else [table, table],
    }
    if stability:
        told["time_scale"] = 1000.0
    if side is None and stability:
        raise UserError(f"{shapes.path}: its table of positions is for images of any size; give --resolution")
    return told, min(tokens, table)


def qk_norm(shapes: Shapes) -> bool | str:
    """The norm of queries and keys: `True` (LayerNorm), "rms", or False."""
    side = "blocks.0.image.attn." if "blocks.0.image.attn.qkv.weight" in shapes else "blocks.0.attn."
    return "rms" if side + "q_norm.scale" in shapes else side + "q_norm.weight" in shapes


def interface(shapes: Shapes) -> dict[str, Any]:
    """The options of the elastic interface that its weights tell."""
    latents, width = shapes("interface.query", 2)
    told: dict[str, Any] = {"elit_group_size": math.isqrt(latents)}
    told["elit_mlp_ratio"] = shapes("interface.reader.mlp.0.fc1.weight", 2)[0] / max(width, 1)
    for name, layers in (("elit_read_depth", "reader"), ("elit_write_depth", "writer")):
        pattern = rf"interface\.{layers}\.attn\.\d+\.q_proj\.weight"
        told[name] = sum(bool(re.fullmatch(pattern, key)) for key in shapes.state_dict)
    return told
