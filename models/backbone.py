"""What every backbone is: tokens in, a list of blocks, velocity out; and how its blocks run.

Shapes: B batch, C channels of the VAE latents, H × W their size, p patch size, N = (H/p)·(W/p) tokens, D width, n tokens or
latents of the blocks at hand. A backbone of one's own defines `blocks`, `embed`, `step`, `output` and `interface_arguments`.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from models.layers import ConvProjector, projector


@dataclass
class Stream:
    """What the blocks pass on; each block changes it in place.

    Attributes:
        x: (B, prefix + n, D), first what is no image (U-ViT's label, time and text), then image tokens or, in ELIT's core, latents.
        c: (B, cond_dim), the condition; what modulates Read.
        text: (B, L, D), MM-DiT's other stream.
        pos: (n, …), a row for each image token; of backbones that rotate queries and keys by position.
        grid: (rows, columns) of the image tokens, row-major; None for latents.
        groups: the number of groups in which the latents lie, k after k; 0 for tokens.
        prefix: tokens in front of the image.
        skips: what earlier blocks leave for later ones, the last on top.
        features: REPA's projections, (B, n, z) for each target encoder; None where nobody asks for them.
    """

    x: Tensor
    c: Tensor
    text: Tensor | None = None
    pos: Tensor | None = None
    grid: tuple[int, int] | None = None
    groups: int = 0
    prefix: int = 0
    skips: list[Any] = field(default_factory=list)
    features: list[Tensor] | None = None

    @property
    def image(self) -> Tensor:
        """The image tokens or latents (B, n, D), without the prefix."""
        return self.x[:, self.prefix :] if self.prefix else self.x

    def with_image(self, image: Tensor, **changes: Any) -> "Stream":
        """The same stream with other image tokens or latents (B, n′, D), and with `changes` of other attributes."""
        x = torch.cat([self.x[:, : self.prefix], image], dim=1) if self.prefix else image
        return replace(self, x=x, **changes)


class Backbone(nn.Module, PyTorchModelHubMixin, library_name="elit", license="mit", tags=["diffusion", "class-conditional"]):
    """Velocity model v(x, t, y) on VAE latents. `save_pretrained`, `from_pretrained` and `push_to_hub` are the hub mixin's.

    It never draws random numbers: labels arrive already dropped, the budget is an argument.

    Args:
        input_size: side of the VAE latents, or (rows, columns).
        num_classes: class labels y lie below it, and it is the null label; None where y are no labels.
        encoder_depth: block after which the tokens go to REPA's projectors (1-based); used only where there are any.

    Raises:
        UserError: sizes that do not divide.
    """

    flow: str = "flow matching"  # what it is trained and sampled with: a name of `flows.FLOWS`
    blocks: nn.ModuleList  # in forward order
    mirrored: bool = False  # whether blocks at the end need what blocks at the start leave, or their grid
    takes_labels: bool = True  # whether it can be conditioned on class labels
    takes_text: bool = False  # whether it can be conditioned on text; then `text_arguments` is there
    merged_latents: int = 1  # latents of a group that become one in the innermost blocks: budgets below it cost no less

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int],
        patch_size: int,
        in_channels: int,
        num_classes: int | None,
        encoder_depth: int,
    ):
        super().__init__()
        rows, columns = (input_size, input_size) if isinstance(input_size, int) else input_size
        if rows % patch_size or columns % patch_size or min(rows, columns) < patch_size:
            raise UserError(
                f"VAE latents of {rows}×{columns} cannot be cut into patches of {patch_size}: choose a resolution divisible by the VAE's factor × {patch_size}"
            )
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch_size = patch_size
        self.grid_size = (rows // patch_size, columns // patch_size)
        self.encoder_depth = encoder_depth

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @classmethod
    def size_arguments(cls, input_size: int | tuple[int, int], **sizes: Any) -> dict[str, Any]:
        """The constructor's arguments of a registered size `sizes`, where they depend on the VAE latents' size."""
        return sizes

    @classmethod
    def text_arguments(cls, length: int, width: int, pooled: int) -> dict[str, Any]:
        """The constructor's arguments for text features (B, L, E) and pooled ones (B, P; P = 0: none). Raises UserError."""
        raise UserError(f"a {cls.__name__} model takes no text")

    # What a backbone defines.

    def embed(self, x: Any, t: Tensor, y: Any) -> Stream:
        """The stream that enters the first block; x (B, C, H, W), or what else the model takes as its state."""
        raise NotImplementedError

    def step(self, i: int, s: Stream) -> None:
        """Block i, with all that belongs to it."""
        raise NotImplementedError

    def output(self, s: Stream) -> Tensor:
        """The velocity (B, C, H, W) of the stream that leaves the last block."""
        raise NotImplementedError

    def interface_arguments(self) -> dict[str, Any]:
        """Arguments of the `LatentInterface` that fits between this backbone's blocks.

        `dim`, `num_heads`, `grid_size`, and `cond_dim`, `latent_pos` and `fused_attn` where they are not the default.
        """
        raise NotImplementedError

    def check_split(self, head_depth: int, tail_depth: int) -> None:
        """Raise UserError where Read after `head_depth` blocks and Write before the last `tail_depth` do not fit the backbone."""

    def time_embedding(self, t: Tensor) -> Tensor:
        """What the model knows of the times t (B,), a row each: (B, …). Raises UserError where the backbone does not define it."""
        raise UserError(f"a {type(self).__name__} model defines no time_embedding, by which --cache-rule time decides")

    def null(self, y: Any) -> Any:
        """The condition that says nothing, of the shape of y: for labels (B,) the null label; y where it says nothing anyway."""
        return y if self.num_classes is None else torch.full_like(y, self.num_classes)

    def example_condition(self, batch_size: int) -> Any:
        """Some condition y of a batch, on the model's device: for labels (B,) zeros."""
        if self.num_classes is None:
            return None
        return torch.zeros(batch_size, dtype=torch.long, device=next(self.parameters()).device)

    def uncounted_flops(self, batch_size: int) -> int:
        """FLOPs that a counter of dense products finds and a forward does not do, e.g. where attention is masked."""
        return 0

    # What is the same in all.

    def example_inputs(self, batch_size: int = 1) -> tuple[Any, Tensor, Any]:
        """Some x, t and y of a batch, on the model's device and in its dtype."""
        weight = next(self.parameters())
        rows, columns = (n * self.patch_size for n in self.grid_size)
        x = torch.zeros(batch_size, self.in_channels, rows, columns, device=weight.device, dtype=weight.dtype)
        return x, torch.zeros(batch_size, device=weight.device), self.example_condition(batch_size)

    def unused_parameters(self, active_stage: int | None, projected: bool = True) -> list[nn.Parameter]:
        """Those that a forward with this active stage (None: one without stages), or without REPA's projections, leaves out."""
        return [] if projected else [p for name, p in self.named_parameters() if name.startswith("projectors.")]

    def compiled_parts(self) -> list[nn.Module]:
        """What `torch.compile` gets, each called by its forward alone: the blocks, and the parts around them that know no budget."""
        parts = (getattr(self, name, None) for name in ("x_embedder", "t_embedder", "y_embedder", "final_layer"))
        own = [part for part in parts if isinstance(part, nn.Module) and not type(part).__module__.startswith("torch.")]
        return [*self.blocks, *own]  # a layer of PyTorch's is one kernel as it is

    def add_projectors(self, dim: int, z_dims: tuple[int, ...], hidden_dim: int = 2048) -> None:
        """REPA's projectors of tokens of width `dim`, one per target encoder; to be called after `blocks` is there."""
        if z_dims and not 1 <= self.encoder_depth <= len(self.blocks):
            raise UserError(
                f"--encoder-depth {self.encoder_depth}: must lie between 1 and the model's depth, {len(self.blocks)}"
            )
        if z_dims:
            self.projectors = nn.ModuleList(projector(dim, z, hidden_dim) for z in z_dims)

    def convolve_projectors(self) -> None:
        """Put a convolution in the place of each of REPA's projectors; see `ConvProjector`."""
        layers = [[m for m in p if isinstance(m, nn.Linear)] for p in cast(Any, getattr(self, "projectors", []))]
        if layers:
            convolutions = [ConvProjector(m[0].in_features, m[-1].out_features, self.feature_grid) for m in layers]
            self.projectors = nn.ModuleList(convolutions)

    @property
    def repa_depth(self) -> int:
        """The block after which REPA reads the tokens (1-based)."""
        return self.encoder_depth

    @property
    def feature_grid(self) -> tuple[int, int]:
        """(rows, columns) of the tokens that REPA reads."""
        return self.grid_size

    def run(self, s: Stream, start: int, stop: int) -> None:
        """Blocks start … stop − 1, and REPA's projections where they are asked for."""
        for i in range(start, stop):
            self.step(i, s)
            if s.features is not None and i + 1 == self.repa_depth and hasattr(self, "projectors"):
                s.features = [p(s.image) for p in self.projectors]

    def core_blocks(self, after: int | None = None) -> range:
        """The blocks whose work a core cache may reuse: all after the first `after`, but as many at the end where blocks mirror each other.

        Raises UserError where such a core does not fit the backbone.
        """
        depth, after = len(self.blocks), self.default_head if after is None else after
        tail = after if self.mirrored else 0
        if after + tail >= depth:
            raise UserError(
                f"--cache-after {after}: leaves nothing to reuse of {depth} blocks{', which mirror each other' * self.mirrored}"
            )
        try:
            self.check_split(after, tail)
        except UserError as error:
            raise UserError(f"--cache-after {after}: {error}") from None
        return range(after, depth - tail)

    @property
    def default_head(self) -> int:
        """Blocks before the core where nobody says how many."""
        return 1

    def core(self, s: Stream, blocks: range, inference_budget: float | None = None) -> Stream:
        """The stream s after `blocks`, the core; whatever they leave for each other is used up within them."""
        if inference_budget is not None:
            raise UserError(
                f"inference budget {inference_budget}: a {type(self).__name__} model has no budget; only ELIT models do"
            )
        self.run(s, blocks.start, blocks.stop)
        return s

    def transform(self, s: Stream, inference_budget: float | None = None) -> Stream:
        """All blocks."""
        return self.core(s, range(len(self.blocks)), inference_budget)

    def forward(
        self, x: Tensor, t: Tensor, y: Any, inference_budget: float | None = None, return_features: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Velocity (B, C, H, W) for x (B, C, H, W), t (B,) in [0, 1] (1 = noise), y (B,) int64 (`num_classes` = null label).

        With `return_features` also the REPA projections. Raises UserError for a budget that the model does not have.
        """
        s = self.embed(x, t, y)
        s.features = [] if return_features else None
        s = self.transform(s, inference_budget)
        velocity = self.output(s)
        return velocity if s.features is None else (velocity, s.features)

    def forward_around(self, core: Callable[[Stream], Stream], blocks: range, x: Tensor, t: Tensor, y: Any) -> Tensor:
        """As `forward`, with `core` in place of `blocks`; see `core_blocks`."""
        s = self.embed(x, t, y)
        self.run(s, 0, blocks.start)
        s = core(s)
        self.run(s, blocks.stop, len(self.blocks))
        return self.output(s)


def checkpoint_blocks(model: nn.Module) -> nn.Module:
    """Gradient checkpointing, in place: each block keeps its inputs alone and is computed again in the backward pass."""
    for block in cast(Backbone, model).blocks:
        block.forward = types.MethodType(_recompute_block, block)
    return model


def _recompute_block(block: nn.Module, *inputs: Any) -> Any:
    # Nothing in a model is random, so no state of a generator has to be kept (and read from the device).
    return checkpoint(type(block).forward, block, *inputs, use_reentrant=False, preserve_rng_state=False)
