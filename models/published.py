"""State dicts of others: which backbone they are of, and their weights under our names."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from common.errors import UserError, first_line


def from_uvit(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a published U-ViT under the names of `UViT`: there in, middle and out blocks have lists of their own."""
    half = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("in_blocks."))
    weights = {}
    for name, value in state_dict.items():
        part, rest = name.split(".", 1) if "." in name else (name, "")
        if part == "mid_block":
            name = f"blocks.{half}.{rest}"
        elif part in ("in_blocks", "out_blocks"):
            i, rest = rest.split(".", 1)
            name = f"blocks.{int(i) + (half + 1) * (part == 'out_blocks')}.{rest}"
        weights[name] = value
    return weights


def from_hdit(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """k-diffusion's weights (`image_transformer_v2`) under the names of `HDiT`: there the layers are numbered level by level."""
    sd = {key.removeprefix("inner_model."): value for key, value in state_dict.items()}
    depths = Counter(key.rsplit(".", 3)[0] for key in sd if key.endswith("self_attn.scale"))
    outer = range(len(depths) // 2)
    order = [f"down_levels.{i}" for i in outer] + ["mid_level"] + [f"up_levels.{i}" for i in reversed(outer)]
    layers = {f"{level}.{i}": n for n, (level, i) in enumerate((level, i) for level in order for i in range(depths[level]))}
    weights = {}
    for key, value in sd.items():
        layer = next((f"{name}." for name in layers if key.startswith(f"{name}.")), None)
        if layer and not key.endswith("pos_emb.freqs"):
            weights[f"blocks.{layers[layer[:-1]]}.{key.removeprefix(layer)}"] = value
        elif not layer and not key.startswith(("aug_emb.", "aug_in_proj.")):
            weights[key] = value
    # "No augmentation" is a vector of zeros: of its features, the cosines are 1 and the sines 0.
    weights["cond_bias"] = sd["aug_in_proj.weight"].chunk(2, dim=1)[0].sum(dim=1)
    return weights


_MMDIT_NAMES = (
    ("model.diffusion_model.", ""), ("joint_blocks.", "blocks."), (".context_block.", ".text."), (".x_block.", ".image."),
    (".ln_q.weight", ".q_norm.scale"), (".ln_k.weight", ".k_norm.scale"), ("y_embedder.mlp.", "y_embedder."),
)  # fmt: skip


def from_mmdit(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of SD3, SD3.5 or REPA's text-to-image model under the names of `MMDiT`."""
    weights = {}
    for name, value in state_dict.items():
        for theirs, ours in _MMDIT_NAMES:
            name = name.replace(theirs, ours)
        weights[name] = value
    return weights


# A key that only this backbone has; of the published forms with the function that translates the names.
_PUBLISHED = {
    "mid_block.norm1.weight": ("U-ViT", from_uvit),
    "mid_level.0.self_attn.scale": ("HDiT", from_hdit),
    "joint_blocks.0.x_block.attn.qkv.weight": ("MMDiT", from_mmdit),
}
# What published weights predict where it is no velocity: by family the word that is recorded, and by the word what it means.
PREDICTS = {"U-ViT": "noise", "HDiT": "denoised"}
PREDICTIONS = {
    "noise": "noise, on the path of Stable Diffusion's betas",
    "denoised": "denoised images under k-diffusion's preconditioning, from the noise level σ",
}
_OURS = {
    "patch_embed.proj.weight": "U-ViT",
    "patch_in.proj.weight": "HDiT",
    "blocks.0.image.attn.qkv.weight": "MMDiT",
    "hourglass.merge.weight": "SiT-HDiT",
    "x_embedder.embedders.0.proj.weight": "DFM-SiT",
    "x_embedder.proj.weight": "SiT",
}
SIGNATURES = _OURS.keys()
_PREFIXES = ("", "inner_model.", "model.diffusion_model.")
_WHOLE_PIPELINE = "model.diffusion_model."  # the network's names in a file that also holds a VAE or text encoders


def network_part(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Of a whole pipeline's state dict (SD3) the diffusion network's entries; of any other all."""
    part = {key: value for key, value in state_dict.items() if key.startswith(_WHOLE_PIPELINE)}
    return part or dict(state_dict)


def published_family(state_dict: Mapping[str, Any]) -> str | None:
    """The family of a state dict under published names of U-ViT, HDiT or MM-DiT, by its keys; `None` of any other."""
    found = (family for key, (family, _) in _PUBLISHED.items() if any(prefix + key in state_dict for prefix in _PREFIXES))
    return next(found, None)


def import_state_dict(state_dict: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The family of a state dict, e.g. "U-ViT" or "ELIT-SiT", by its keys, and its weights under our names.

    Takes our own, and the published U-ViT's (Bao et al.), k-diffusion's HDiT, and the MM-DiTs of SD3, SD3.5 and REPA. (The elastic
    interface's published names are `checkpoint.published`'s to translate.)

    Raises:
        UserError: it is of no backbone known, or lacks what its kind has.
    """
    state_dict = network_part(state_dict)
    if family := published_family(state_dict):
        translate = next(translate for of, translate in _PUBLISHED.values() if of == family)
        try:
            return family, translate(state_dict)
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else first_line(error)
            raise UserError(f"not the weights of a published {family}: {what}") from None
    family = next((family for key, family in _OURS.items() if key in state_dict), None)
    if family is None:
        raise UserError(f"not the weights of a known backbone (they hold {', '.join(list(state_dict)[:3])})")
    if family == "SiT" and any(".skip_linear." in key for key in state_dict):
        family = "SiT-UViT"
    if any(key.startswith(("interface.", "input_token_editor.")) for key in state_dict):
        family = family.replace("DFM-", "DFM-ELIT-") if family.startswith("DFM-") else f"ELIT-{family}"
    return family, state_dict
