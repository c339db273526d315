"""The table of docs/text_to_image.md: FLOPs of Qwen-Image with ELIT at four budgets, against those of Qwen-Image, on the meta device.

python -m benchmarks.elit_qwen_image [text tokens: 300] [side of the image in tokens: 64]
"""

import sys

import torch
from diffusers import QwenImageTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from common.tables import markdown_table
from elit_diffusers import attach

BUDGETS = (1, 1 / 2, 1 / 4, 1 / 8)
LOWEST = 5 / 64  # 320 of 4,096 tokens, the fewest that the paper shows
PAPER = (0.688, 0.494, 0.409, 0.369)  # ELIT §4.4


def flops(transformer: QwenImageTransformer2DModel, side: int, text: int) -> int:
    """FLOPs of one forward of an image of side × side tokens, and so many text tokens."""
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        transformer(
            hidden_states=torch.empty(1, side * side, 64),
            encoder_hidden_states=torch.empty(1, text, 3584),
            timestep=torch.empty(1),
            img_shapes=[[(1, side, side)]],
        )
    return counter.get_total_flops()


def main() -> None:
    """Print the table in Markdown."""
    text, side = (int(n) for n in (*sys.argv[1:], *(300, 64)[len(sys.argv) - 1 :]))
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel()
    whole = flops(transformer, side, text)
    elastic = attach(transformer).requires_grad_(False)  # which the counter wants
    ratios = {}
    for elastic.budget in (*BUDGETS, LOWEST):
        ratios[elastic.budget] = flops(transformer, side, text) / whole
    print(f"Qwen-Image, {side * side} image and {text} text tokens: {whole / 1e12:.2f} TFLOPs a forward\n")
    rows = []
    for budget, paper in zip(BUDGETS, PAPER, strict=True):
        guided = (ratios[budget] + ratios[LOWEST]) / 2
        rows.append([f"{budget:.1%}", f"{ratios[budget]:.3f}", f"{guided:.3f}", str(paper), f"{guided / paper - 1:+.1%}"])
    print(markdown_table(["tokens", "one forward", "guided, the unconditional one at 5/64", "paper", "off by"], rows))


if __name__ == "__main__":
    main()
