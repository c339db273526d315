"""REPA's target encoders: images → patch features, a thin layer over timm (Yu et al. 2024, arXiv 2410.06940).

An encoder sees the image at √N × its own patch size, so that it makes one feature for each of the model's N tokens.
"""

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import hub, tensor_files
from common.errors import UserError, did_you_mean, first_line
from common.sizes import Resolution
from common.torchvision_shim import import_torchvision


@dataclass(frozen=True)
class Target:
    """Which of timm's models an encoder is, and which of its features REPA takes."""

    timm_name: str
    last_norm: bool = True  # features after the last norm, or before it
    resized: bool = True  # the image is resized to the encoder's side, or taken as it is
    weights: str = ""  # where its authors have them, if timm does not


_MOCO = "https://github.com/facebookresearch/moco-v3"
ENCODERS = {
    "dinov1-vit-b": Target("vit_base_patch16_224.dino", resized=False),
    "dinov2-vit-s": Target("vit_small_patch14_dinov2.lvd142m"),
    "dinov2-vit-b": Target("vit_base_patch14_dinov2.lvd142m"),
    "dinov2-vit-l": Target("vit_large_patch14_dinov2.lvd142m"),
    "dinov2-vit-g": Target("vit_giant_patch14_dinov2.lvd142m"),
    "dinov2reg-vit-s": Target("vit_small_patch14_reg4_dinov2.lvd142m"),
    "dinov2reg-vit-b": Target("vit_base_patch14_reg4_dinov2.lvd142m"),
    "dinov2reg-vit-l": Target("vit_large_patch14_reg4_dinov2.lvd142m"),
    "dinov2reg-vit-g": Target("vit_giant_patch14_reg4_dinov2.lvd142m"),
    "dinov3-vit-b": Target("vit_base_patch16_dinov3.lvd1689m"),
    "dinov3-vit-l": Target("vit_large_patch16_dinov3.lvd1689m"),
    "mocov3-vit-b": Target("vit_base_patch16_224.mae", resized=False, weights=_MOCO),  # MAE's is the same ViT
    "mocov3-vit-l": Target("vit_large_patch16_224.mae", resized=False, weights=_MOCO),
    "jepa-vit-h": Target("vit_huge_patch14_gap_224.in1k_ijepa"),
    "mae-vit-b": Target("vit_base_patch16_224.mae", last_norm=False, resized=False),
    "mae-vit-l": Target("vit_large_patch16_224.mae", last_norm=False, resized=False),
    "clip-vit-b": Target("vit_base_patch16_clip_quickgelu_224.openai", last_norm=False),
    "clip-vit-l": Target("vit_large_patch14_clip_quickgelu_224.openai", last_norm=False),
}


class TargetEncoder(nn.Module):
    """A frozen ViT: uint8 images (B, 3, H, W) → its patch features (B, N, z), without class and register tokens."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, vit: Any, side: int, last_norm: bool):
        super().__init__()
        self.name, self.side, self.last_norm = name, side, last_norm
        self.vit: Any = vit.eval().requires_grad_(False)
        self.z_dim: int = vit.num_features
        for kind in ("mean", "std"):
            value = torch.tensor(vit.pretrained_cfg[kind], device="cpu").view(1, 3, 1, 1)
            self.register_buffer(kind, value, persistent=False)

    def train(self, mode: bool = True) -> "TargetEncoder":
        """Stays in eval mode."""
        return super().train(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) → float32 (B, 3, side, side): bicubic, then the encoder's mean and standard deviation.

        Bicubic weights sum to 1, so that resizing before or after the normalisation is the same.
        """
        x = images.float() / 255
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bicubic", align_corners=False)
        return (x - self.mean) / self.std

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) → (B, N, z)."""
        return self.features(self.preprocess(images))

    def features(self, x: Tensor) -> Tensor:
        """Preprocessed images (B, 3, side, side) → (B, N, z)."""
        return self.vit.forward_intermediates(x, indices=1, norm=self.last_norm, output_fmt="NLC", intermediates_only=True)[0]


def encoder_names(enc_type: str, proj_coeff: float) -> list[str]:
    """The encoders that `--enc-type` names, comma-separated; none where REPA is off, by either option."""
    names = [name.strip() for name in enc_type.split(",") if name.strip()]
    return [] if names in ([], ["none"]) or proj_coeff == 0 else names


def describe_encoders(names: list[str], resolution: Resolution, grid_size: tuple[int, int]) -> list[TargetEncoder]:
    """The encoders without weights, on the meta device: their widths, sides and costs, at no cost.

    Raises:
        UserError: unknown, or not of as many tokens as the model's grid.
    """
    return [_on_meta(name, resolution, grid_size) for name in names]


def load_encoders(
    names: list[str],
    resolution: Resolution,
    grid_size: tuple[int, int],
    weights: list[str] | None = None,
    device: str | torch.device = "cpu",
) -> list[TargetEncoder]:
    """The encoders with their pretrained weights: from the hub, or from one file each.

    Args:
        names: see `encoder_names`.
        resolution: side of the images in pixels.
        grid_size: (rows, columns) of the model's tokens.
        weights: a file for each encoder; None for those on the hub.
        device: where the encoders are put.

    Raises:
        UserError: unknown, weights missing or of another model, or not of as many tokens as the model's grid.
    """
    check_weights(names, weights)
    described = describe_encoders(names, resolution, grid_size)  # all mistakes first, they cost nothing to find
    loaded = []
    for i, found in enumerate(described):
        vit = _from_file(found, weights[i]) if weights else _from_hub(found)
        loaded.append(TargetEncoder(found.name, vit, found.side, found.last_norm).to(device))
    return loaded


def check_weights(names: list[str], weights: list[str] | None) -> None:
    """Raise UserError unless `--encoder-weights` names one file for each encoder, or nothing."""
    if weights and len(weights) != len(names):
        raise UserError(f"--encoder-weights: {len(weights)} file(s) for {len(names)} encoder(s) of --enc-type; give one each")


def _target(name: str) -> Target:
    """What `name` stands for; the published spellings (`clip-vit-L`, `dinov2_reg-vit-b`) are known too."""
    if name.startswith("timm/"):
        return Target(name.removeprefix("timm/"))
    folded = name.lower().replace("_", "")
    if folded not in ENCODERS:
        raise UserError(
            f"--enc-type {name}: unknown encoder{did_you_mean(folded, ENCODERS)}; known: {', '.join(ENCODERS)}, and timm/NAME for any "
            "other ViT of timm"
        )
    return ENCODERS[folded]


def _timm() -> ModuleType:
    import_torchvision()
    import timm

    return timm


def _on_meta(name: str, resolution: Resolution, grid_size: tuple[int, int]) -> TargetEncoder:
    target, timm = _target(name), _timm()
    if not timm.is_model(target.timm_name):
        raise UserError(f"--enc-type {name}: timm has no such model{did_you_mean(target.timm_name, timm.list_models())}")
    if not isinstance(resolution, int):
        raise UserError(f"--enc-type {name}: REPA reads square images; --resolution {resolution} is none")
    tokens = grid_size[0] * grid_size[1]
    no_vit = UserError(
        f"--enc-type {name}: not a ViT with one feature per patch; REPA needs one for each of the {tokens} tokens"
    )
    with torch.device("meta"):
        try:
            vit = timm.create_model(target.timm_name, num_classes=0)
        except RuntimeError as error:  # an unknown tag after the model's name
            raise UserError(f"--enc-type {name}: {error}") from None
        patch = getattr(getattr(vit, "patch_embed", None), "patch_size", None)
        if patch is None or not hasattr(vit, "set_input_size"):
            raise no_vit
        side = grid_size[0] * patch[0] if target.resized else resolution
        if side % patch[0] or (side // patch[0]) ** 2 != tokens:
            made = "no whole number of" if side % patch[0] else str((side // patch[0]) ** 2)
            raise UserError(
                f"--enc-type {name}: makes {made} tokens of {side} × {side} pixels in patches of {patch[0]}, but the model has {tokens}"
            )
        vit.set_input_size(img_size=(side, side))
        encoder = TargetEncoder(name, vit, side, target.last_norm)
        try:
            found = encoder.features(torch.empty(1, 3, side, side)).shape
        except Exception:  # whatever models of other kinds raise
            raise no_vit from None
    if found[1] != tokens:
        raise UserError(f"--enc-type {name}: makes {found[1]} tokens of {side} × {side} pixels, but the model has {tokens}")
    return encoder


def _from_hub(found: TargetEncoder) -> nn.Module:
    target = _target(found.name)
    if target.weights:
        raise UserError(
            f"--enc-type {found.name}: its weights are not on the hub; give its authors' file, from {target.weights}: --encoder-weights PATH"
        )
    timm_name = target.timm_name
    try:
        create = _timm().create_model
        vit = hub.fetch_once(timm_name, lambda **_: create(timm_name, pretrained=True, num_classes=0))
    except Exception as error:  # network, no such repository or file, no space …
        reason = first_line(error)
        raise UserError(
            f"--enc-type {found.name}: the weights of timm's {timm_name} could not be downloaded from the hub ({type(error).__name__}: {reason}); "
            "give a file: --encoder-weights PATH"
        ) from None
    vit.set_input_size(img_size=(found.side, found.side))  # resamples position embeddings: bicubic, with antialias
    return vit


# Of the published MoCo v3 ViT-L.
_MISNAMED = {"13.norm13": "13.norm1", "13.mlp.fc13": "13.mlp.fc1", "14.norm14": "14.norm2", "14.mlp.fc14": "14.mlp.fc2"}


def _base_encoder(state: dict[str, Any]) -> dict[str, Any]:
    """The encoder in a training checkpoint of MoCo v3, without its momentum twin, predictor and head; any other file as it is."""
    held, prefix = state.get("state_dict"), "module.base_encoder."
    if not isinstance(held, dict) or not any(str(name).startswith(prefix) for name in held):
        return state
    own = {str(name).removeprefix(prefix): value for name, value in held.items() if str(name).startswith(prefix)}
    for wrong, name in _MISNAMED.items():
        own = {k.replace(f"blocks.{wrong}.", f"blocks.{name}."): v for k, v in own.items()}
    return own


def _from_file(found: TargetEncoder, path: str) -> nn.Module:
    """The encoder with the weights of a file: timm's own names, or the names of the encoder's authors, which timm translates."""
    file = hub.local_file(path)
    if not file.is_file():
        raise UserError(f"--encoder-weights {path}: no such file; it should hold the weights of {found.name}")
    state = tensor_files.load_safetensors(file)[0] if file.suffix == ".safetensors" else tensor_files.load(file)
    vit = _timm().create_model(_target(found.name).timm_name, num_classes=0)
    vit.set_input_size(img_size=(found.side, found.side))  # the file's position embeddings are resampled once, to this
    translate = getattr(importlib.import_module(type(vit).__module__), "checkpoint_filter_fn", lambda state, _: state)
    try:
        state = {
            k: v for k, v in translate(_base_encoder(state), vit).items() if not k.startswith(("head.", "head_dist."))
        }  # classifiers
        wrong = vit.load_state_dict(state, strict=False)
        keys = [f"{k} is missing" for k in wrong.missing_keys] + [f"{k} is unknown" for k in wrong.unexpected_keys]
    except Exception as error:  # other shapes, or names that timm cannot translate
        keys = (str(error).strip().splitlines() or [""])[-1:]
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise UserError(
            f"--encoder-weights {path}: not the weights of {found.name}: {'; '.join(k.strip() for k in keys[:3])}{more}"
        )
    return vit
