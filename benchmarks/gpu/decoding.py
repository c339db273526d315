"""The VAE's decoder: precisions, memory layouts, and the last image of a large batch."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.machine import seconds_of
from benchmarks.gpu.record import Run
from common import precision
from models.vae import decode

ERROR = 1e-2
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
KINDS = {"fp32": torch.float32, "TF32": torch.float32, "bf16": torch.bfloat16}


def decoder(run: Run) -> Any:
    """Stable Diffusion's VAE with random weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    widths, layers, groups = run.size(((128, 256, 512, 512), 2, 32), ((8, 8, 8, 8), 1, 4))
    torch.manual_seed(0)
    with run.device:
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=layers,
            norm_num_groups=groups,
            latent_channels=4,
            scaling_factor=0.18215,
        )
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def pixels(vae: Any, latents: Tensor) -> Tensor:
    """What the decoder gives, in float32."""
    return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float()


def error_of(images: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, where that of the exact images is scaled to ½: pixels of photographs in [−1, 1]."""
    return 0.5 * ((images - exact).norm() / exact.norm()).item()


def decoding(run: Run) -> None:
    """Decode a batch in every precision and layout, and one at twice the resolution."""
    vae, side, images = decoder(run), run.size(32, 4), run.size(32, 2)
    z = torch.randn(images, 4, side, side, device=run.device)
    few = z[: run.size(4, 2)]
    with precision.tf32(False):
        exact = pixels(vae, few)
    for kind, dtype in KINDS.items():
        for layout, form in LAYOUTS.items():
            with run.attempt(f"{kind}, {layout}"), precision.tf32(kind == "TF32"):
                vae.to(dtype, memory_format=form)
                run.check(f"{kind}, {layout}: RMS error of pixels in [−1, 1]", error_of(pixels(vae, few), exact), ERROR)
                if run.cuda:
                    torch.cuda.reset_peak_memory_stats()
                seconds = seconds_of(run.device, partial(decode, vae, z), run.size(3, 1), warmup=1)
                peak = {"peak GiB": torch.cuda.max_memory_allocated() / 2**30} if run.cuda else {}
                run.note(f"{kind}, {layout}: {8 * side} px", {"images/s": images / seconds, **peak})
    with run.attempt("the last image of a large batch"), precision.tf32(True):
        vae.to(torch.float32, memory_format=torch.contiguous_format)
        large = torch.randn(images, 4, 2 * side, 2 * side, device=run.device)
        last, alone = decode(vae, large)[-1:], decode(vae, large[-1:])
        name = f"TF32, {16 * side} px: image {images} of {images} against itself alone"
        run.check(f"{name}: RMS error of pixels in [−1, 1]", error_of(last.float(), alone.float()), ERROR)
