"""Small untrained autoencoders of each class that is known, as diffusers saves them."""

from pathlib import Path

import torch

from common.torchvision_shim import import_torchvision

SIDE = 32  # pixels
TOKENS = 4  # of RAE, along each side


def tiny_dc(folder: Path) -> Path:
    """DC-AE of factor 4 with 4 channels."""
    import_torchvision()
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

    torch.manual_seed(0)
    sizes = {f"{part}_block_out_channels": (8, 8, 16) for part in ("encoder", "decoder")}
    sizes |= {f"{part}_layers_per_block": (1, 1, 1) for part in ("encoder", "decoder")}
    sizes |= {f"{part}_block_types": "ResBlock" for part in ("encoder", "decoder")}
    sizes |= {f"{part}_qkv_multiscales": ((), (), ()) for part in ("encoder", "decoder")}
    AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.4, **sizes).save_pretrained(folder)
    return folder


def tiny_flux2(folder: Path) -> Path:
    """FLUX.2's class of factor 2 · 2 with 3 · 4 channels, and running statistics."""
    import_torchvision()
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2

    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 12))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 12))
    vae.save_pretrained(folder)
    return folder


def tiny_rae(folder: Path, statistics: bool = True) -> Path:
    """A RAE of 64 channels on 4 × 4 tokens of 32 × 32 px, with statistics of that shape."""
    import_torchvision()
    from diffusers.models.autoencoders.autoencoder_rae import AutoencoderRAE

    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    mean = torch.randn(64, TOKENS, TOKENS, generator=rng)
    std = 0.5 + torch.rand(64, TOKENS, TOKENS, generator=rng)
    AutoencoderRAE(
        encoder_hidden_size=64,
        encoder_patch_size=14,
        encoder_num_hidden_layers=1,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        patch_size=SIDE // TOKENS,
        encoder_input_size=14 * TOKENS,
        latents_mean=mean if statistics else None,
        latents_std=std if statistics else None,
    ).save_pretrained(folder)
    return folder
