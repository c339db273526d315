"""What differs between the transformers of diffusers that `attach` supports: their blocks, token grids, positions and inputs.

Shapes: B batch, C channels of the VAE latents, H × W their size, N image tokens, L text tokens, E text width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import UserError

Gather = Callable[[Tensor], Tensor]  # (N, …), a row for each image token → (G·k, …), the rows of the latents


class Condition(NamedTuple):
    """Text features as a pipeline computes them, and what belongs to them."""

    text: Tensor  # (B, L, E)
    mask: Tensor | None = None  # (B, L), False where a position is padding (Qwen-Image)
    pooled: Tensor | None = None  # (B, P) (SD3, FLUX)


class Family:
    """One class of transformers.

    Attributes:
        stacks: the lists of blocks, in the order in which they run; each block takes and returns image and text.
        separate_guidance: the pipelines run the unconditional pass of guidance by itself, in `cache_context("uncond")`.
    """

    stacks: tuple[str, ...] = ("transformer_blocks",)
    separate_guidance = True

    def check(self, transformer: nn.Module) -> None:
        """Raise UserError for a variant that the interface does not fit."""

    def grid(self, transformer: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        """The token grid (rows, columns) of a forward with these arguments. Raises UserError where there is none."""
        raise NotImplementedError

    def gather_positions(self, rotary: Any, num_tokens: int, gather: Gather) -> Any:
        """The argument `image_rotary_emb` of a block with the positions of the latents in place of those of the N tokens."""
        raise NotImplementedError

    def inputs(self, transformer: Any, x: Tensor, t: Tensor, condition: Condition, guidance: float) -> dict[str, Any]:
        """The arguments of the transformer as its pipeline gives them.

        Args:
            transformer: the model.
            x: (B, C, H, W) noisy latents.
            t: (B,) times, 0 data and 1 noise.
            condition: the text.
            guidance: the guidance scale that a guidance-distilled model is told.
        """
        raise NotImplementedError

    def velocity(self, output: Tensor, shape: torch.Size) -> Tensor:
        """The transformer's output as noise − data, in the shape (B, C, H, W) of the latents."""
        raise NotImplementedError


class QwenImage(Family):
    """QwenImageTransformer2DModel: double-stream blocks, rotary positions on both streams."""

    def check(self, transformer: Any) -> None:
        """See the base class."""
        if transformer.config.get("zero_cond_t") or transformer.config.get("use_layer3d_rope"):
            raise UserError("QwenImageTransformer2DModel: editing and layered variants have several images in one sequence")

    def grid(self, transformer: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        """See the base class."""
        shapes = {tuple(s) if isinstance(s[0], (list, tuple)) else (s,) for s in arguments.get("img_shapes") or []}
        if len(shapes) == 1 and len(shape := next(iter(shapes))) == 1 and shape[0][0] == 1:
            return shape[0][1], shape[0][2]
        raise UserError("img_shapes: must be [(1, rows, columns)], one image a sample and all of one size")

    def gather_positions(self, rotary: tuple[Tensor, Tensor], num_tokens: int, gather: Gather) -> tuple[Tensor, Tensor]:
        """See the base class; image and text positions come apart."""
        image, text = rotary
        return gather(image), text

    def inputs(self, transformer: Any, x: Tensor, t: Tensor, condition: Condition, guidance: float) -> dict[str, Any]:
        """See the base class."""
        B, _, H, W = x.shape
        return {
            "hidden_states": pack(x),
            "timestep": t,
            "encoder_hidden_states": condition.text,
            "encoder_hidden_states_mask": condition.mask,
            "img_shapes": [[(1, H // 2, W // 2)]] * B,
        }

    def velocity(self, output: Tensor, shape: torch.Size) -> Tensor:
        """See the base class."""
        return unpack(output, shape)


class Flux(Family):
    """FluxTransformer2DModel: double-stream, then single-stream blocks; rotary positions of text and image in one table."""

    stacks = ("transformer_blocks", "single_transformer_blocks")

    def grid(self, transformer: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        """See the base class; `img_ids` (N, 3) must be those of one image, row by row."""
        ids = arguments["img_ids"]
        ids = ids[0] if ids.ndim == 3 else ids
        rows, columns = (int(n) + 1 for n in ids[-1, 1:])
        if rows * columns != len(ids):
            raise UserError(f"img_ids: {len(ids)} positions are not the {rows}×{columns} tokens of one image")
        return rows, columns

    def gather_positions(self, rotary: tuple[Tensor, Tensor], num_tokens: int, gather: Gather) -> tuple[Tensor, ...]:
        """See the base class; text comes first in both tables."""
        return tuple(torch.cat([table[:-num_tokens], gather(table[-num_tokens:])]) for table in rotary)

    def inputs(self, transformer: Any, x: Tensor, t: Tensor, condition: Condition, guidance: float) -> dict[str, Any]:
        """See the base class."""
        B, _, H, W = x.shape
        rows, columns = torch.meshgrid(torch.arange(H // 2), torch.arange(W // 2), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
        return {
            "hidden_states": pack(x),
            "timestep": t,
            "encoder_hidden_states": condition.text,
            "pooled_projections": condition.pooled,
            "txt_ids": torch.zeros(condition.text.shape[1], 3, device=x.device, dtype=x.dtype),
            "img_ids": ids.to(x.device, x.dtype),
            "guidance": x.new_full((B,), guidance) if transformer.config.guidance_embeds else None,
        }

    def velocity(self, output: Tensor, shape: torch.Size) -> Tensor:
        """See the base class."""
        return unpack(output, shape)


class SD3(Family):
    """SD3Transformer2DModel: double-stream blocks; positions are added to the tokens, so that latents read them."""

    separate_guidance = False

    def grid(self, transformer: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        """See the base class."""
        rows, columns = (n // transformer.config.patch_size for n in arguments["hidden_states"].shape[-2:])
        return rows, columns

    def inputs(self, transformer: Any, x: Tensor, t: Tensor, condition: Condition, guidance: float) -> dict[str, Any]:
        """See the base class; SD3's time is 0 … 1000."""
        return {
            "hidden_states": x,
            "timestep": 1000 * t,
            "encoder_hidden_states": condition.text,
            "pooled_projections": condition.pooled,
        }

    def velocity(self, output: Tensor, shape: torch.Size) -> Tensor:
        """See the base class."""
        return output


FAMILIES: dict[str, Family] = {
    "QwenImageTransformer2DModel": QwenImage(),
    "SD3Transformer2DModel": SD3(),
    "FluxTransformer2DModel": Flux(),
}


def family_of(transformer: nn.Module) -> tuple[str, Family]:
    """The name of the supported class that the transformer is, and its family. Raises UserError for any other."""
    for cls in type(transformer).__mro__:  # by name: importing all classes of diffusers takes seconds
        if cls.__name__ in FAMILIES and cls.__module__.startswith("diffusers."):
            FAMILIES[cls.__name__].check(transformer)
            return cls.__name__, FAMILIES[cls.__name__]
    raise UserError(f"{type(transformer).__name__}: is not supported; choose a transformer of class {', '.join(FAMILIES)}")


def pack(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, N, 4·C): 2×2 cells, laid out (C, row, column), as the pipelines of FLUX and Qwen-Image pack them."""
    B, C, H, W = x.shape
    return x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, 4 * C)


def unpack(tokens: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack`; shape (B, C, H, W)."""
    B, C, H, W = shape
    return tokens.view(B, H // 2, W // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(shape)
