"""FLOPs of Qwen-Image with the interface: what the benchmark counts, by hand; and the paper's four ratios from the same sums."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from benchmarks.elit_qwen_image import BUDGETS, LOWEST, PAPER, flops
from elit_diffusers import attach

D, CHANNELS, TEXT_WIDTH, GROUP = 3072, 64, 3584, 64  # of Qwen-Image; tokens of a group


def blocks(images, texts):
    """A block over so many image and text tokens: projections and MLPs of both, their modulations, one attention."""
    return 24 * (images + texts) * D**2 + 24 * D**2 + 4 * (images + texts) ** 2 * D


def ends(images, texts):
    """Embeddings, time and output."""
    return 4 * images * CHANNELS * D + 2 * texts * TEXT_WIDTH * D + 2 * (256 * D + D**2) + 4 * D**2


def interface(images, latents):
    """Read and Write: cross-attention in groups and an MLP without widening, each; Read's modulation.

    Read's queries, those of a group, are projected once for all groups.
    """
    attention, queries = 4 * latents * GROUP * D, latents * GROUP // images
    read = 2 * queries * D**2 + (2 + 4) * latents * D**2 + 4 * images * D**2 + attention + 12 * D**2
    return read + (2 + 2 + 4) * images * D**2 + 4 * latents * D**2 + attention


def test_flops_by_hand_and_the_papers_ratios():
    side, texts = 16, 24
    images = side**2
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(num_layers=3)
    assert flops(transformer, side, texts) == pytest.approx(ends(images, texts) + 3 * blocks(images, texts), rel=1e-6)
    with torch.device("meta"):
        elastic = attach(transformer, 1, 2).requires_grad_(False)
    for elastic.budget in (1, 1 / 4):
        latents = int(images * elastic.budget)
        by_hand = ends(images, texts) + 2 * blocks(images, texts) + blocks(latents, texts) + interface(images, latents)
        assert flops(transformer, side, texts) == pytest.approx(by_hand, rel=1e-6)

    images, texts = 4096, 300
    whole = ends(images, texts) + 60 * blocks(images, texts)
    assert whole == pytest.approx(74.0e12, rel=1e-3)  # docs/text_to_image.md

    def ratio(budget):
        latents = int(images * budget)
        core = 44 * blocks(latents, texts) + interface(images, latents)
        return (ends(images, texts) + 16 * blocks(images, texts) + core) / whole

    assert [round(ratio(budget), 3) for budget in BUDGETS] == [1.012, 0.632, 0.466, 0.388]
    guided = [(ratio(budget) + ratio(LOWEST)) / 2 for budget in BUDGETS]
    assert guided == pytest.approx(PAPER, rel=0.03)
