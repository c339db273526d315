"""State dicts of others: which backbone they are of, and their weights under our names."""

from collections.abc import Mapping

from torch import Tensor

from common.errors import UserError
from models import hdit, mmdit, uvit

# A key that only this backbone has; of the published forms with the function that translates the names.
_PUBLISHED = {
    "mid_block.norm1.weight": ("U-ViT", uvit.from_published),
    "mid_level.0.self_attn.scale": ("HDiT", hdit.from_published),
    "joint_blocks.0.x_block.attn.qkv.weight": ("MMDiT", mmdit.from_published),
}
_OURS = {
    "patch_embed.proj.weight": "U-ViT",
    "patch_in.proj.weight": "HDiT",
    "blocks.0.image.attn.qkv.weight": "MMDiT",
    "hourglass.merge.weight": "SiT-HDiT",
    "x_embedder.embedders.0.proj.weight": "DFM-SiT",
    "x_embedder.proj.weight": "SiT",
}
_PREFIXES = ("", "inner_model.", "model.diffusion_model.")


def import_state_dict(state_dict: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The family of a state dict, e.g. "U-ViT" or "ELIT-SiT", by its keys, and its weights under our names.

    Takes our own, and the published U-ViT's (Bao et al.), k-diffusion's HDiT, and the MM-DiTs of SD3, SD3.5 and REPA. (The elastic
    interface's published names are `checkpoint.published`'s to translate.)

    Raises:
        UserError: it is of no backbone known.
    """
    for key, (family, translate) in _PUBLISHED.items():
        if any(prefix + key in state_dict for prefix in _PREFIXES):
            return family, translate(state_dict)
    family = next((family for key, family in _OURS.items() if key in state_dict), None)
    if family is None:
        raise UserError(f"not the weights of a known backbone (they hold {', '.join(list(state_dict)[:3])})")
    if family == "SiT" and any(".skip_linear." in key for key in state_dict):
        family = "SiT-UViT"
    if any(key.startswith(("interface.", "input_token_editor.")) for key in state_dict):
        family = family.replace("DFM-", "DFM-ELIT-") if family.startswith("DFM-") else f"ELIT-{family}"
    return family, dict(state_dict)
