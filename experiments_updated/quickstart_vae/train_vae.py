"""Trains the quick start's VAE: a small AutoencoderKL for the digit canvases, 64×64×3 → 16×16×4, about 5 minutes on two cores.

    python experiments_updated/quickstart_vae/train_vae.py

It sees training digits only, in canvases recombined at random, and writes config.json and diffusion_pytorch_model.safetensors
beside itself.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from common.torchvision_shim import import_torchvision  # noqa: E402
from models.vae import to_uint8  # noqa: E402
from preprocessing import demo  # noqa: E402

KL_WEIGHT = 1e-6  # per latent dimension, against the mean squared error of a pixel value in [−1, 1]


def build_vae():
    """An untrained VAE of 2.6 MB: few residual blocks and no attention, so that it is quick on a CPU."""
    import_torchvision()  # which diffusers imports
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def to_pixels(canvases: np.ndarray) -> Tensor:
    """Grey canvases uint8 (B, 64, 64) → RGB in [−1, 1], float32 (B, 3, 64, 64)."""
    return (torch.from_numpy(canvases).float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


@torch.no_grad()
def psnr(vae, canvases: np.ndarray, batch_size: int = 50) -> float:
    """Peak signal-to-noise ratio in dB of reconstructions from the posterior's mean, over all of `canvases`."""
    total = 0.0
    for start in range(0, len(canvases), batch_size):
        pixels = to_pixels(canvases[start : start + batch_size])
        restored = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        total += (to_uint8(restored).double() - to_uint8(pixels).double()).square().mean(dim=(1, 2, 3)).sum().item()
    return 10 * math.log10(255**2 / (total / len(canvases)))


@torch.no_grad()
def latent_moments(vae, canvases: np.ndarray, seed: int, batch_size: int = 50) -> tuple[float, float]:
    """Mean and standard deviation of posterior samples, over all their values."""
    generator = torch.Generator().manual_seed(seed)
    batches = [to_pixels(canvases[i : i + batch_size]) for i in range(0, len(canvases), batch_size)]
    latents = torch.cat([vae.encode(pixels).latent_dist.sample(generator) for pixels in batches]).double()
    return latents.mean().item(), latents.std().item()


def finish(vae, held_out: np.ndarray, dest: Path, seed: int) -> None:
    """Measure the latents' scale and shift on training canvases, and write the VAE aside, then in place."""
    train = np.stack([canvas for *_, canvas in demo.demo_canvases(held_out=False, per_class=100)])
    mean, std = latent_moments(vae, train, seed)
    vae.register_to_config(scaling_factor=1 / std, shift_factor=mean)
    dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest) as aside:
        vae.save_pretrained(aside)
        for file in sorted(Path(aside).iterdir()):
            file.replace(dest / file.name)
    size = (dest / "diffusion_pytorch_model.safetensors").stat().st_size
    print(
        f"{dest}: {size / 1e6:.2f} MB, scaling factor {vae.config.scaling_factor:.4f}, shift factor {vae.config.shift_factor:.4f}, "
        f"held-out PSNR {psnr(vae, held_out):.2f} dB"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dest", type=Path, default=HERE)
    options = parser.parse_args(argv)

    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    digits, _ = demo.demo_digits(held_out=False)
    held_out = np.stack([canvas for *_, canvas in demo.demo_canvases(held_out=True, per_class=20)])

    vae = build_vae().to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    optimizer = torch.optim.Adam(vae.parameters(), lr=options.learning_rate)

    def decay(step: int) -> float:  # short warm-up, then half a cosine to 1%
        return min(1.0, (step + 1) / 100) * (0.505 + 0.495 * math.cos(math.pi * step / options.steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    bar = tqdm(range(1, options.steps + 1), unit="step", mininterval=5)
    for step in bar:
        chosen = rng.integers(len(digits), size=(options.batch_size, 4))
        pixels = to_pixels(demo.demo_canvas(digits[chosen]))
        posterior = vae.encode(pixels).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample(generator)).sample, pixels)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        (error + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 50 == 0:
            bar.set_postfix(mse=f"{error.item():.5f}", kl=f"{kl.item():.3f}")
        if step % 500 == 0 or step == options.steps:
            quality = psnr(vae, held_out)
            tqdm.write(
                f"step {step}: error {error.item():.5f}, KL per dimension {kl.item():.3f}, held-out PSNR {quality:.2f} dB"
            )

    finish(vae, held_out, options.dest, options.seed)


if __name__ == "__main__":
    main()
