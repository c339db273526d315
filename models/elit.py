"""ELIT (arXiv 2603.12245) around any backbone: head blocks on tokens, core blocks on latents, tail blocks on tokens."""

from typing import Any, Literal

from torch import Tensor, nn

from common.errors import UserError
from models.backbone import Backbone, Stream
from models.hdit import HDiT
from models.latent_interface import (
    EPS,
    CrossAttention,
    FullWidthRMSNorm,
    LatentInterface,
    budget_to_k,
    mask_levels,
    mask_to_budget,
)
from models.mmdit import MMDiT
from models.sit import SiT
from models.uvit import UViT

__all__ = [
    "EPS",
    "CrossAttention",
    "ELITHDiT",
    "ELITMMDiT",
    "ELITSiT",
    "ELITUViT",
    "Elastic",
    "FullWidthRMSNorm",
    "LatentInterface",
    "budget_to_k",
    "mask_levels",
    "mask_to_budget",
]


class Elastic(Backbone):
    """A backbone whose core blocks run on the latents of a `LatentInterface`; to be mixed in before the backbone.

    What is no image token is left alone by Read and Write and takes part in the core as it is.

    Args (beside the backbone's):
        head_depth, tail_depth: blocks before Read and after Write; the blocks between are the core.
        elit_*: the interface's group size, depths, tail policy, kind of Write and MLP ratio.

    Raises:
        UserError: a split that leaves no core or does not fit the backbone, or groups that do not fit the grid.
    """

    def __init__(
        self,
        *,
        head_depth: int,
        tail_depth: int,
        elit_group_size: int = 4,
        elit_read_depth: int = 1,
        elit_write_depth: int = 1,
        elit_tail: Literal["drop", "skip"] = "drop",
        elit_write: Literal["published", "paper"] = "published",
        elit_mlp_ratio: float = 1.0,
        **backbone: Any,
    ):
        self.head_depth, self.tail_depth = head_depth, tail_depth  # before all else: where REPA reads depends on them
        super().__init__(**backbone)
        if head_depth < 0 or tail_depth < 0 or head_depth + tail_depth >= len(self.blocks):
            raise UserError(f"head_depth {head_depth} and tail_depth {tail_depth} leave no core block of {len(self.blocks)}")
        if hasattr(self, "projectors") and head_depth == 0:
            raise UserError("head_depth 0: REPA reads the tokens after a head block, so it needs at least one")
        self.check_split(head_depth, tail_depth)
        try:
            self.interface = LatentInterface(
                **self.interface_arguments(),
                group_size=elit_group_size,
                read_depth=elit_read_depth,
                write_depth=elit_write_depth,
                tail=elit_tail,
                write=elit_write,
                mlp_ratio=elit_mlp_ratio,
            )
        except UserError as error:  # which begins with the interface's own name of an argument
            raise UserError(f"elit_{error}") from None

    @property
    def repa_depth(self) -> int:
        """The block after which REPA reads the tokens (1-based): one of the head."""
        return min(self.encoder_depth, self.head_depth)

    def compiled_parts(self) -> list[nn.Module]:
        """The backbone's, Read and Write: the budget is a number of latents when it arrives there."""
        return [*super().compiled_parts(), self.interface.reader, self.interface.writer]

    def transform(self, s: Stream, inference_budget: float | None = None) -> Stream:
        """All blocks, at `inference_budget` in [1/J, 1], the share of latents that the core works on (`None`: all)."""
        blocks = self.core_blocks()
        self.run(s, 0, blocks.start)  # head
        s = self.core(s, blocks, inference_budget)
        self.run(s, blocks.stop, len(self.blocks))  # tail
        return s

    def core(self, s: Stream, blocks: range, inference_budget: float | None = None) -> Stream:
        """Read, the core blocks on the latents that the budget keeps, and Write."""
        tokens, kept, tail = self.interface.read(s.image, s.c, inference_budget)  # read: (B, G, J, D), (B, G·k, D)
        core = self._latent_stream(s, kept)
        self.run(core, blocks.start, blocks.stop)  # core
        image = self.interface.write(tokens, core.image, tail)  # write: (B, N, D)
        return core.with_image(image, grid=s.grid, pos=s.pos, groups=0)

    def core_blocks(self, after: int | None = None) -> range:
        """The blocks between Read and Write."""
        if after not in (None, self.head_depth):
            raise UserError(
                f"--cache-after {after}: this ELIT model's core begins after its head of {self.head_depth}; leave the option out"
            )
        return range(self.head_depth, len(self.blocks) - self.tail_depth)

    def _latent_stream(self, s: Stream, latents: Tensor) -> Stream:
        """The core's stream: latents (B, G·k, D) in place of the image tokens; latent j of a group lies where its token j does."""
        G = self.interface.num_groups
        pos = None if s.pos is None else self.interface.gather(s.pos, latents.shape[1] // G)
        return s.with_image(latents, grid=None, pos=pos, groups=G)

    def read_attention(self, x: Any, t: Tensor, y: Any) -> Tensor:
        """What each latent reads at the state x: `LatentInterface.read_attention` of the tokens after the head blocks."""
        s = self.embed(x, t, y)
        self.run(s, 0, self.head_depth)
        return self.interface.read_attention(s.image, s.c)


class ELITSiT(Elastic, SiT):
    """SiT with an elastic core."""


class ELITUViT(Elastic, UViT):
    """U-ViT with an elastic core: as many head blocks as tail blocks."""


class ELITHDiT(Elastic, HDiT):
    """HDiT with an elastic core, which lies in its inner level."""


class ELITMMDiT(Elastic, MMDiT):
    """MM-DiT with an elastic core: the image's tokens become latents; the text stays as long as it is."""
