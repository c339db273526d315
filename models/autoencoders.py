"""The classes of diffusers' autoencoders that can be used: what is known of each one's latents, and pixels ↔ latents of it.

One class here is one there, chosen by `_class_name` in its config.json. Pixels (B, 3, H, W) are of [−1, 1]. Stored latents are
those of the encoder, before any normalisation: that of an autoencoder's own statistics belongs to its `VAERecord`.
"""

import importlib
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from common.errors import UserError, did_you_mean

VAE = Any  # an autoencoder of diffusers, whose annotations do not say what its methods return


class AutoencoderKL:
    """The VAE of Stable Diffusion, SDXL, SD3, FLUX, VA-VAE …; and the interface of every class of autoencoders.

    Attributes:
        module: of diffusers.models.autoencoders.
        since: the first version of diffusers that has the class.
        posterior: whether latents are drawn from a posterior, so that means and deviations are stored; else means alone.
        widths: the key of its config that holds the decoder's widths, the one at full size first.
    """

    module: ClassVar[str] = "autoencoder_kl"
    since: ClassVar[str] = "0.35"
    posterior: ClassVar[bool] = True
    widths: ClassVar[str] = "block_out_channels"

    @property
    def name(self) -> str:
        """The name of diffusers' class."""
        return type(self).__name__

    def load(self) -> Any:
        """Diffusers' class. Raises UserError where the installed version has none."""
        try:
            return getattr(importlib.import_module(f"diffusers.models.autoencoders.{self.module}"), self.name)
        except (ModuleNotFoundError, AttributeError):
            import diffusers

            raise UserError(
                f"{self.name} requires diffusers {self.since} or newer; installed is {diffusers.__version__}"
            ) from None

    def prepare(self, vae: VAE) -> None:
        """Bring a loaded autoencoder into the state that the other methods expect."""

    def facts(self, vae: VAE) -> dict[str, Any]:
        """What its record says of the latents: factor, channels, scale, shift, and statistics if it has any of its own."""
        config = vae.config
        facts = {
            "downsample_factor": 2 ** (len(config[self.widths]) - 1),
            "latent_channels": config.latent_channels,
            "scaling_factor": float(config.scaling_factor),
            "shift_factor": float(config.get("shift_factor") or 0.0),
        }
        if config.get("latents_mean") and config.get("latents_std"):  # then (z − mean) / std · scale, as in SDXL's pipeline
            std = torch.tensor(config.latents_std, dtype=torch.float64) / facts["scaling_factor"]
            facts |= {"channel_mean": config.latents_mean, "channel_std": std.tolist()}
        return facts

    def check_pixels(self, vae: VAE, height: int, width: int, where: str) -> None:
        """Raise UserError for images of a size that cannot be encoded."""
        factor = self.facts(vae)["downsample_factor"]
        if height % factor or width % factor:
            raise UserError(f"{where}: has {width}x{height} pixels, not divisible by the VAE's factor {factor}")

    def encode(self, vae: VAE, pixels: Tensor) -> Tensor:
        """What is stored of images: means, then standard deviations (B, 2C, h, w); without a posterior means (B, C, h, w)."""
        posterior = vae.encode(pixels).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    def decode(self, vae: VAE, z: Tensor) -> Tensor:
        """Pixels of latents (B, C, h, w)."""
        return vae.decode(z).sample

    def size_in_decoder(self, vae: VAE, height: int, width: int) -> int:
        """How many numbers the largest tensor has while one latent of h × w is decoded."""
        widths = vae.config[self.widths]
        return widths[min(1, len(widths) - 1)] * height * width * 4 ** (len(widths) - 1)  # of the first layers at full size


class AutoencoderKLFlux2(AutoencoderKL):
    """FLUX.2's: 2 × 2 positions become one with four times the channels, normalised by running statistics, as in its pipeline."""

    module = "autoencoder_kl_flux2"
    since = "0.36"

    @override
    def facts(self, vae: VAE) -> dict[str, Any]:
        patch = self._patch(vae)
        std = (vae.bn.running_var.double() + vae.config.batch_norm_eps).sqrt()
        return {
            "downsample_factor": 2 ** (len(vae.config[self.widths]) - 1) * patch,
            "latent_channels": vae.config.latent_channels * patch**2,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
            "channel_mean": vae.bn.running_mean.double().tolist(),
            "channel_std": std.tolist(),
        }

    @override
    def encode(self, vae: VAE, pixels: Tensor) -> Tensor:
        means, deviations = super().encode(vae, pixels).chunk(2, dim=1)
        return torch.cat([F.pixel_unshuffle(x, self._patch(vae)) for x in (means, deviations)], dim=1)

    @override
    def decode(self, vae: VAE, z: Tensor) -> Tensor:
        return super().decode(vae, F.pixel_shuffle(z, self._patch(vae)))

    @override
    def size_in_decoder(self, vae: VAE, height: int, width: int) -> int:
        patch = self._patch(vae)
        return super().size_in_decoder(vae, height * patch, width * patch)

    def _patch(self, vae: VAE) -> int:
        return vae.config.patch_size[0]


class AutoencoderDC(AutoencoderKL):
    """DC-AE (arXiv 2410.10733): factor 32 and more, without a posterior."""

    module = "autoencoder_dc"
    posterior = False
    widths = "decoder_block_out_channels"

    @override
    def encode(self, vae: VAE, pixels: Tensor) -> Tensor:
        return vae.encode(pixels).latent


class AutoencoderRAE(AutoencoderKL):
    """Representation autoencoders (arXiv 2510.11690): the tokens of a frozen DINOv2, SigLIP 2 or MAE, and a ViT that decodes them.

    Its `encode` normalises the tokens by statistics of C × h × w, which `decode` undoes; here they belong to the record.
    """

    module = "autoencoder_rae"
    since = "0.37"
    posterior = False
    EPS = 1e-5  # diffusers divides by std + 1e-5

    @override
    def prepare(self, vae: VAE) -> None:
        config = vae.config
        mean, std = ([0.0] if config.get(key) is None else config[key] for key in ("latents_mean", "latents_std"))
        std = torch.tensor([1.0] if config.get("latents_std") is None else std) + self.EPS
        vae.register_buffer("token_mean", torch.tensor(mean), persistent=False)
        vae.register_buffer("token_std", std / config.scaling_factor, persistent=False)
        vae.reshape_to_2d = True

    @override
    def facts(self, vae: VAE) -> dict[str, Any]:
        facts = {
            "downsample_factor": vae.config.patch_size,
            "latent_channels": vae.config.encoder_hidden_size,
            "scaling_factor": float(vae.config.scaling_factor),
            "shift_factor": 0.0,
        }
        if vae.config.get("latents_mean") is not None or vae.config.get("latents_std") is not None:
            shape = torch.broadcast_shapes(vae.token_mean.shape, vae.token_std.shape)
            last = shape[-3:] if len(shape) > 3 and set(shape[:-3]) == {1} else shape
            values = (x.detach().cpu().double().expand(shape).reshape(last).tolist() for x in (vae.token_mean, vae.token_std))
            facts |= dict(zip(("channel_mean", "channel_std"), values, strict=True))
        return facts

    @override
    def check_pixels(self, vae: VAE, height: int, width: int, where: str) -> None:
        side = vae.decoder_image_size
        if (height, width) != (side, side):
            raise UserError(f"{where}: has {width}x{height} pixels; this {self.name} takes {side}x{side} alone")

    @override
    def encode(self, vae: VAE, pixels: Tensor) -> Tensor:
        return vae.encode((pixels + 1) / 2).latent * vae.token_std + vae.token_mean

    @override
    def decode(self, vae: VAE, z: Tensor) -> Tensor:
        return 2 * vae.decode((z - vae.token_mean) / vae.token_std).sample - 1

    @override
    def size_in_decoder(self, vae: VAE, height: int, width: int) -> int:
        return height * width * max(vae.config.decoder_intermediate_size, 3 * vae.config.patch_size**2)


CLASSES: dict[str, AutoencoderKL] = {
    kind.name: kind for kind in (AutoencoderKL(), AutoencoderKLFlux2(), AutoencoderDC(), AutoencoderRAE())
}


def class_of(name: Any, where: str) -> AutoencoderKL:
    """The class of that name. Raises UserError, which begins with `where` and names those that are known."""
    if not isinstance(name, str) or name not in CLASSES:
        shown = repr(name)[:80]
        raise UserError(
            f"{where}: {shown} is no autoencoder that can be used{did_you_mean(str(name)[:80], CLASSES)}; known are {', '.join(CLASSES)}"
        )
    return CLASSES[name]
