"""A small target encoder with random weights, and training runs that align with it."""

import numpy as np
import torch
from PIL import Image
from runs import RESOLUTION

from common.torchvision_shim import import_torchvision

TINY = "timm/vit_tiny_patch16_224"


def random_vit(name, **options):
    """A ViT of timm with random weights of a size at which every part shows."""
    import_torchvision()
    import timm

    vit = timm.create_model(name, num_classes=0, **options)
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in vit.named_parameters():
            small = 0.5 if parameter.dim() < 2 or "embed" in key or "token" in key else parameter.shape[-1] ** -0.5
            parameter.copy_(small * torch.randn_like(parameter) + (parameter.dim() == 1 and key.endswith(("weight", "gamma"))))
    return vit


def uint8_images(count, side, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8))


def make_images(data_dir, count=16):
    folder = data_dir / "images" / "00000"
    folder.mkdir(parents=True)
    images = uint8_images(count, RESOLUTION, seed=7)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"img{i:08d}.png")
    return images


def repa(*weights, enc_type=TINY):
    return "--enc-type", enc_type, "--proj-coeff", 0.5, "--encoder-weights", *weights
