"""VAE weights under the names of latent-diffusion's code (VA-VAE, REPA-E's E2E-VAE, original SD) → a folder of diffusers."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.files import make_folder, write_atomically
from common.tensor_files import load, load_safetensors, save_safetensors
from common.torchvision_shim import import_torchvision
from config.tool_options import VAEConfig
from models.vae import WEIGHT_FILES

PREFIXES = ("first_stage_model.", "module.", "vae.")
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

# Names there → names in diffusers, but for the numbers of the decoder's levels, which count the other way.
RENAMED = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.attn\.", r".down_blocks.\1.attentions."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.attn\.", r".up_blocks.\1.attentions."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def convert_vae(config: VAEConfig) -> None:
    """A file of such weights → a folder that `--vae` takes. Its structure is read off the names and shapes of the weights."""
    source, dest = Path(config.source), Path(config.dest)
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"--dest {dest}: exists already; give a new folder")
    content = _read(source)
    weights = vae_weights(content, source)
    options = {"scaling_factor": config.scaling_factor, **statistics_of(content, config.stats, weights, source)}
    vae = to_diffusers(weights, options, source)
    make_folder(dest)
    tensors = {k: v.float().contiguous() for k, v in vae.state_dict().items()}
    save_safetensors(dest / WEIGHT_FILES[0], tensors, {})
    write_atomically(dest / "config.json", vae.to_json_string(), option="--dest")  # last: from here on it is a VAE
    with_statistics = " with statistics of its latents" if "latents_mean" in options else ""
    factor, channels = 2 ** (len(vae.config.block_out_channels) - 1), vae.config.latent_channels
    print(f"{dest}: an AutoencoderKL of factor {factor} with {channels} channels{with_statistics}")


def _read(path: Path) -> dict[str, Any]:
    return dict(load_safetensors(path)[0]) if path.suffix == ".safetensors" else load(path)


def vae_weights(content: dict[str, Any], where: Path) -> dict[str, Tensor]:
    """The VAE's weights in a file, under their names there: of a bare state dict, a Lightning checkpoint, or one of REPA-E."""
    inside = next((content[key] for key in ("vae", "state_dict", "model") if isinstance(content.get(key), dict)), content)
    weights = {}
    for name, tensor in inside.items():
        for prefix in PREFIXES:
            name = name.removeprefix(prefix) if isinstance(name, str) else ""
        if name.startswith(PARTS) and isinstance(tensor, Tensor):
            weights[name] = tensor
    kernels = [weights.get(name) for name in ("encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight")]
    if any(kernel is None or kernel.dim() != 4 for kernel in kernels):
        raise UserError(
            f"--source {where}: holds no VAE under latent-diffusion's names (encoder.down.0.block.0.conv1.weight, …); "
            "a folder of diffusers needs no conversion"
        )
    return weights


def statistics_of(content: dict[str, Any], path: str | None, weights: dict[str, Tensor], where: Path) -> dict[str, list[float]]:
    """latents_mean and latents_std of each channel: from a file, or the batch norm of a REPA-E checkpoint; empty without any.

    Files hold mean and std (LightningDiT), or latents_bias and latents_scale = 1/std (REPA-E).
    """
    channels = weights["decoder.conv_in.weight"].shape[1]
    if path is None:
        ema, shown = content.get("ema"), f"--source {where}: bn"
        if not isinstance(ema, dict) or "bn.running_mean" not in ema:
            return {}
        mean, variance = ema["bn.running_mean"], ema.get("bn.running_var")
        std = variance.sqrt() if isinstance(variance, Tensor) else None
    else:
        values, shown = _read(Path(path)), f"--stats {path}"
        scale = values.get("latents_scale")
        mean = values.get("mean", values.get("latents_bias"))
        std = 1 / scale if isinstance(scale, Tensor) else values.get("std")
    for value in (mean, std):
        if not isinstance(value, Tensor) or value.numel() != channels or not value.isfinite().all():
            raise UserError(f"{shown}: wanted: mean and std, or latents_bias and latents_scale, of {channels} channels")
    assert mean is not None and std is not None
    if std.min() <= 0:
        raise UserError(f"{shown}: deviations must be above 0")
    return {"latents_mean": mean.double().flatten().tolist(), "latents_std": std.double().flatten().tolist()}


def structure(weights: dict[str, Tensor], where: Path) -> dict[str, Any]:
    """The configuration of an `AutoencoderKL` with these weights."""
    levels = 1 + max(int(m[1]) for name in weights if (m := re.match(r"encoder\.down\.(\d+)\.", name)))
    widths = [weights[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    attention = [f"encoder.down.{i}.attn.0.q.weight" in weights for i in range(levels)]
    z = weights["decoder.conv_in.weight"].shape[1]
    quant = weights.get("quant_conv.weight")
    if quant is not None and quant.shape[0] != 2 * z:
        raise UserError(
            f"--source {where}: its embed_dim {quant.shape[0] // 2} is not its z_channels {z}; diffusers has one number"
        )
    return {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "block_out_channels": widths,
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)],
        "layers_per_block": sum(f"encoder.down.0.block.{j}.conv1.weight" in weights for j in range(100)),
        "latent_channels": z,
        "use_quant_conv": quant is not None,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
    }


def to_diffusers(weights: dict[str, Tensor], options: dict[str, Any], where: Path) -> Any:
    """Diffusers' `AutoencoderKL` with the weights and further options. Raises UserError where they do not fit."""
    import_torchvision()
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    try:
        config = structure(weights, where)
        with torch.device("meta"):
            vae = AutoencoderKL(**config, **options)
        named = {_renamed(name, len(config["block_out_channels"])): tensor for name, tensor in weights.items()}
        of_linears = {k: v.flatten(1) if ".attentions." in k and v.dim() == 4 else v for k, v in named.items()}
        vae.load_state_dict(of_linears, assign=True)
    except UserError:
        raise
    except Exception as error:  # weights that lack a part, or have one more
        raise UserError(
            f"--source {where}: not a VAE as latent-diffusion has them: {' '.join(str(error).split())[:200]}"
        ) from None
    return vae


def _renamed(name: str, levels: int) -> str:
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return re.sub(r"up_blocks\.(\d+)", lambda m: f"up_blocks.{levels - 1 - int(m[1])}", name)
