"""U-ViT: a plain transformer over [label, time, patches] with long skip connections (Bao et al. 2022, arXiv 2209.12152).

The published networks predict noise on another path; here the same network predicts the velocity. (The ELIT paper's own "U-ViT"
is another model: SiT's blocks in this layout, `SiT(layout="unet")`.)
"""

from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from models.backbone import Backbone, Stream
from models.conditioning import Condition, NullText, Text, check_labels, check_text
from models.layers import Attention, Mlp, PatchEmbed, timestep_features, unpatchify


class UViTBlock(nn.Module):
    """Pre-norm transformer block without modulation; an out block first joins the tokens with those of the in block it mirrors."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, fused: bool, skip: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)  # eps 1e-5, unlike SiT's
        self.attn = Attention(dim, num_heads, fused=fused, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), approximate="none")
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Tokens x and skip (B, n, D) → (B, n, D)."""
        if self.skip_linear is not None and skip is not None:
            # What layers add to stays as wide as x, also where autocast makes matrix products narrower.
            x = self.skip_linear(torch.cat([x, skip], dim=-1)).to(x.dtype)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(NullText, Backbone):
    """depth/2 in blocks, one in the middle, depth/2 out blocks, on a sequence of label, time and patch tokens.

    Args (beside Backbone's):
        depth: blocks but the middle one; even.
        num_classes: None: no labels, and y is not looked at.
        text: (tokens, width) of text features, which y then holds instead of labels.
        final_conv: whether a 3×3 convolution goes over the result.
        time_mlp: whether a two-layer MLP follows the features of time.
        z_dims: feature widths of the REPA target encoders.

    Raises:
        UserError: an odd depth, or sizes that do not divide.
    """

    mirrored = True
    takes_text = True

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int],
        patch_size: int,
        in_channels: int = 4,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int | None = 1000,
        text: tuple[int, int] | None = None,
        final_conv: bool = True,
        time_mlp: bool = False,
        qkv_bias: bool = False,
        fused_attn: bool = True,
        encoder_depth: int = 8,
        z_dims: tuple[int, ...] = (),
    ):
        super().__init__(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_classes=None if text else num_classes,
            encoder_depth=encoder_depth,
        )
        if depth < 2 or depth % 2:
            raise UserError(
                f"depth {depth}: a U-ViT's must be even: half of the blocks go in, half come out, and one is between"
            )
        if hidden_size % num_heads or hidden_size % 2:
            raise UserError(f"hidden_size {hidden_size} must be divisible by 2 and by num_heads {num_heads}")
        self.hidden_size, self.num_heads, self.fused_attn, self.text = hidden_size, num_heads, fused_attn, text
        # The names are the published ones, but for the blocks', which are in_blocks.I, mid_block and out_blocks.I there.
        self.patch_embed = PatchEmbed(patch_size, in_channels, hidden_size)
        layers = (nn.Linear(hidden_size, 4 * hidden_size), nn.SiLU(), nn.Linear(4 * hidden_size, hidden_size))
        self.time_embed = nn.Sequential(*layers) if time_mlp else nn.Identity()
        self.prefix = 1
        if text:
            self.context_embed = nn.Linear(text[1], hidden_size)
            self.prefix += text[0]
        elif num_classes is not None:
            self.label_emb = nn.Embedding(num_classes + 1, hidden_size)
            self.prefix += 1
        self.pos_embed = nn.Parameter(torch.empty(1, self.prefix + self.grid_size[0] * self.grid_size[1], hidden_size))
        self.blocks = nn.ModuleList(
            UViTBlock(hidden_size, num_heads, mlp_ratio, qkv_bias, fused_attn, skip=i > depth // 2) for i in range(depth + 1)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.decoder_pred = nn.Linear(hidden_size, patch_size * patch_size * in_channels)
        self.final_layer = nn.Conv2d(in_channels, in_channels, 3, padding=1) if final_conv else nn.Identity()
        self._initialize()
        self.add_projectors(hidden_size, z_dims)

    @classmethod
    def text_arguments(cls, length: int, width: int, pooled: int) -> dict[str, Any]:
        """See `Backbone.text_arguments`."""
        if pooled:
            raise UserError("a U-ViT model takes no pooled text features: encode the captions with another encoder")
        return {"text": [length, width]}

    def _initialize(self) -> None:
        """Normal (the reference cuts at ±2, a hundred deviations), zero biases; label table and convolutions are PyTorch's default."""
        nn.init.normal_(self.pos_embed, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def interface_arguments(self) -> dict[str, Any]:
        """The interface's tokens are the image's."""
        return {
            "dim": self.hidden_size,
            "num_heads": self.num_heads,
            "grid_size": self.grid_size,
            "fused_attn": self.fused_attn,
        }

    def check_split(self, head_depth: int, tail_depth: int) -> None:
        """Raises UserError where skips would join tokens with latents."""
        if head_depth != tail_depth:
            raise UserError(
                f"head_depth {head_depth} and tail_depth {tail_depth}: must be equal in a U-ViT, "
                "whose out blocks join with the in blocks that they mirror, tokens with tokens and latents with latents"
            )

    def null(self, y: Any) -> Any:
        """The empty prompt of a text model, else the null label."""
        return super().null(y) if self.text else Backbone.null(self, y)

    def example_condition(self, batch_size: int) -> Any:
        """Zeros, as text or as labels."""
        if self.text is None:
            return super().example_condition(batch_size)
        return Text(self.context_embed.weight.new_zeros(batch_size, *self.text))

    def embed(self, x: Tensor, t: Tensor, y: Condition | None) -> Stream:
        """Tokens (B, prefix + N, D): [label, time, patches], [time, patches] or [time, text, patches], and the condition (B, D)."""
        patches = self.patch_embed(x)
        time = self.time_embedding(t)
        condition, prefix = time, [time[:, None]]
        if self.text:
            length, width = self.text
            text = check_text(y, "U-ViT", width=width, length=length, pooled_width=None)
            prefix = [*prefix, self.context_embed(text.features)]
        elif self.num_classes is not None:
            label = self.label_emb(check_labels(y, "U-ViT"))
            condition, prefix = time + label, [label[:, None], *prefix]
        tokens = torch.cat([*prefix, patches], dim=1) + self.pos_embed
        return Stream(tokens, condition, grid=self.grid_size, prefix=self.prefix)

    def time_embedding(self, t: Tensor) -> Tensor:
        """(B,) → (B, D); published weights count time in steps up to 1000."""
        return self.time_embed(timestep_features(1000 * t.float(), self.hidden_size).to(self.pos_embed.dtype))

    def step(self, i: int, s: Stream) -> None:
        """Block i; an out block takes what the in block that it mirrors left."""
        middle = len(self.blocks) // 2
        s.x = self.blocks[i](s.x, s.skips.pop() if i > middle else None)
        if i < middle:
            s.skips.append(s.x)

    def output(self, s: Stream) -> Tensor:
        """Tokens (B, prefix + N, D) → velocity (B, C, H, W)."""
        patches = self.decoder_pred(self.norm(s.x)[:, self.prefix :])
        return self.final_layer(unpatchify(patches, self.grid_size, self.patch_size))
