"""DFM: decomposable flow matching on a Laplacian pyramid (arXiv 2506.19839), around SiT and around ELIT-SiT.

A stage is one level of the pyramid of the VAE latents, 0 the coarsest; S stages. Every stage has its own patch embedding, time
embedding and final layer; all share the blocks, since their patch sizes give the same N tokens.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from common.errors import UserError
from models.backbone import Stream
from models.elit import ELITSiT
from models.layers import FinalLayer, PatchEmbed, TimestepEmbedder, unpatchify, xavier
from models.pyramid import decompose, recompose
from models.sit import SiT

__all__ = ["DFMELITSiT", "DFMSiT", "decompose", "recompose"]


class StagePatchEmbed(nn.Module):
    """Pyramid → tokens (B, N, D): the sum of one patch embedding per stage."""

    def __init__(self, patch_sizes: Sequence[int], in_channels: int, dim: int):
        super().__init__()
        self.embedders = nn.ModuleList(xavier(PatchEmbed(p, in_channels, dim)) for p in patch_sizes)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        tokens = sum(embedder(x) for embedder, x in zip(self.embedders, pyramid, strict=True))
        assert isinstance(tokens, Tensor)
        return tokens


class StageTimestepEmbedder(nn.Module):
    """t (B, S) → (B, D): the sum of one time embedding per stage."""

    def __init__(self, stages_count: int, dim: int):
        super().__init__()
        self.embedders = nn.ModuleList(TimestepEmbedder(dim) for _ in range(stages_count))

    def forward(self, t: Tensor) -> Tensor:
        condition = sum(embedder(t[:, s]) for s, embedder in enumerate(self.embedders))
        assert isinstance(condition, Tensor)
        return condition


class StageFinalLayer(nn.Module):
    """Tokens (B, N, D) → the patches (B, N, p·p·C) of each stage up to `active_stage`."""

    def __init__(self, dim: int, patch_sizes: Sequence[int], out_channels: int):
        super().__init__()
        self.projections = nn.ModuleList(FinalLayer(dim, p, out_channels) for p in patch_sizes)

    def forward(self, x: Tensor, c: Tensor, active_stage: int) -> list[Tensor]:
        return [projection(x, c) for projection in self.projections[: active_stage + 1]]


class DFMSiT(SiT):
    """SiT on a pyramid of S stages: what is around the blocks exists once per stage; the blocks are those of the class it is mixed with.

    Args (beside SiT's):
        patch_size: of the finest stage; stage s has patch_size / 2^(S−1−s).
        stages_count: S ≥ 2.

    Raises:
        UserError: a patch size or input size that the stages do not allow.
    """

    flow = "DFM"

    def __init__(self, *, stages_count: int = 2, **sit: Any):
        super().__init__(**sit)
        if stages_count < 2:
            raise UserError(f"stages_count {stages_count}: must be at least 2")
        if self.patch_size % 2 ** (stages_count - 1):
            raise UserError(
                f"stages_count {stages_count}: a patch size of {self.patch_size} cannot be halved {stages_count - 1} times; "
                f"choose a model with patches of at least {2 ** (stages_count - 1)}, or at most {self.patch_size.bit_length()} stages"
            )
        dim = sit["hidden_size"]
        self.patch_sizes = [self.patch_size // 2 ** (stages_count - 1 - s) for s in range(stages_count)]
        # A stage (C, H, W) each, coarsest first.
        self.stage_shapes = [(self.in_channels, *(p * n for n in self.grid_size)) for p in self.patch_sizes]
        self.x_embedder = StagePatchEmbed(self.patch_sizes, self.in_channels, dim)
        self.t_embedder = StageTimestepEmbedder(stages_count, dim)
        self.final_layer = StageFinalLayer(dim, self.patch_sizes, self.in_channels)

    def compiled_parts(self) -> list[nn.Module]:
        """SiT's, but of what each stage has its own, each by itself: how many of them run depends on the active stage."""
        stages = [self.x_embedder.embedders, self.t_embedder.embedders, self.final_layer.projections]
        whole = [part for part in super().compiled_parts() if part not in (self.x_embedder, self.t_embedder, self.final_layer)]
        return [*whole, *(part for parts in stages for part in parts)]

    def unused_parameters(self, active_stage: int | None, projected: bool = True) -> list[nn.Parameter]:
        """Those of the final layers of the stages after the active one, too."""
        later = [] if active_stage is None else list(self.final_layer.projections[active_stage + 1 :].parameters())
        return super().unused_parameters(active_stage, projected) + later

    def example_inputs(self, batch_size: int = 1) -> tuple[list[Tensor], Tensor, Tensor]:
        """As any backbone's, with all stages active."""
        _, t, y = super().example_inputs(batch_size)
        weight = next(self.parameters())
        pyramid = [weight.new_zeros(batch_size, *shape) for shape in self.stage_shapes]
        return pyramid, t[:, None].repeat(1, len(pyramid)), y

    def output(self, s: Stream, active_stage: int) -> list[Tensor]:
        """Tokens (B, N, D) → the velocity of each stage up to `active_stage`."""
        patches = zip(self.final_layer(s.x, s.c, active_stage), self.patch_sizes, strict=False)
        return [unpatchify(v, self.grid_size, p) for v, p in patches]

    def forward(
        self,
        pyramid: Sequence[Tensor],
        t: Tensor,
        y: Tensor,
        inference_budget: float | None = None,
        return_features: bool = False,
        active_stage: int | None = None,
    ) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
        """The velocity of each stage up to `active_stage` (default: the last), coarsest first.

        Args:
            pyramid: the stages' states, S of them; those after the active one are zeros.
            t: (B, S) times in [0, 1]; 1 for the stages after the active one.
            y: (B,) int64 (`num_classes` = null label).
            inference_budget: as in the class around which the stages are.
            return_features: likewise.
            active_stage: the last stage whose velocity is computed.
        """
        s = self.embed(pyramid, t, y)
        s.features = [] if return_features else None
        s = self.transform(s, inference_budget)
        velocities = self.output(s, len(self.patch_sizes) - 1 if active_stage is None else active_stage)
        return velocities if s.features is None else (velocities, s.features)


class DFMELITSiT(DFMSiT, ELITSiT):
    """DFM whose core blocks run on the latents of ELIT's interface: a pyramid with a compute budget."""
