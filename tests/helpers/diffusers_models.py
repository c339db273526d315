"""Tiny transformers of diffusers with random weights, and inputs for them."""

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel
from numerics import randomize

from elit_diffusers.families import FAMILIES, Condition

SHARED = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12}
SIZE = {"sample_size": 16, "pos_embed_max_size": 16, "caption_projection_dim": 32, "in_channels": 4, "out_channels": 4}
SHAPE = (4, 8, 16)  # latents of 4 × 8 tokens


def tiny(name):
    """A transformer of four blocks, of the class in FAMILIES."""
    if name.startswith("Qwen"):
        model = QwenImageTransformer2DModel(in_channels=16, out_channels=4, num_layers=4, axes_dims_rope=(4, 6, 6), **SHARED)
    elif name.startswith("SD3"):
        more = {"pooled_projection_dim": 8, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
        model = SD3Transformer2DModel(num_layers=4, **SIZE, **SHARED, **more)
    else:
        more = {"pooled_projection_dim": 8, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True}
        model = FluxTransformer2DModel(in_channels=16, num_layers=2, num_single_layers=2, **SHARED, **more)
    return randomize(model).eval().requires_grad_(False)


def features(count=2, seed=0):
    """Latents, text and pooled features of some samples."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"latents": SHAPE, "text": (5, 12), "pooled": (8,)}
    return {k: torch.randn(count, *shape, generator=rng) for k, shape in shapes.items()}


def arguments_of(model, count=2, seed=0):
    """The arguments with which its pipeline would call the transformer on some random samples."""
    tensors = features(count, seed)
    condition = Condition(tensors["text"], pooled=tensors["pooled"])
    family = FAMILIES[type(model).__name__]
    return family.inputs(model, tensors["latents"], torch.linspace(0.2, 0.9, count), condition, 3.5)


def velocity(model, count=2, seed=0):
    """The transformer's velocity of these samples."""
    output = model(**arguments_of(model, count, seed), return_dict=False)[0]
    return FAMILIES[type(model).__name__].velocity(output, torch.Size((count, *SHAPE)))
