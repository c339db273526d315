"""The table of docs/backbones.md: parameters and GFLOPs of every backbone, counted on the meta device, at four budgets.

python -m benchmarks.backbones
"""

import torch

import models
from common.tables import markdown_table

BUDGETS = (1, 1 / 2, 1 / 4, 1 / 16)
HEAD = ["model", "parameters", "GFLOPs", "with ELIT: parameters", "GFLOPs at budget 1", "1/2", "1/4", "1/16"]
PIXELS = {"input_size": 256, "in_channels": 3}
FLUX = {"in_channels": 16}  # latents of a VAE with 16 channels, as in the ELIT paper
FLUX_512 = {"in_channels": 16, "input_size": 64, "elit_group_size": 8}
ROTARY = {"rotary": True, "qk_norm": "rms"}  # what the layouts have, and the paper's DiT
TABLES = {
    "U-ViT (Bao et al.)": [(f"U-ViT-{size}/2", {}) for size in ("Ti", "S", "S-Deep", "M", "L", "H")],
    "HDiT (Crowson et al.), pixels": [(f"HDiT-{size}/4", PIXELS) for size in ("S", "M", "L")],
    "HDiT (Crowson et al.), VAE latents": [(f"HDiT-{size}/1", {}) for size in ("Ti", "S", "B", "M", "L")],
    "The ELIT paper's, 256 px": [("SiT-XL/2", FLUX | ROTARY), ("SiT-UViT-XL/2", FLUX), ("SiT-HDiT-XL/2", FLUX)],
    "The ELIT paper's, 512 px": [("SiT-XL/2", FLUX_512 | ROTARY), ("SiT-UViT-XL/2", FLUX_512), ("SiT-HDiT-XL/2", FLUX_512)],
    "MM-DiT": [(f"MMDiT-{size}/2", {} if size in ("Ti", "S", "B") else FLUX) for size in ("Ti", "S", "B", "L", "XL")],
}


def build(name: str, **options) -> torch.nn.Module:
    """A registered model on the meta device, for VAE latents of 256 pixels where the options say nothing else."""
    with torch.device("meta"):
        return models.create_model(name, **{"input_size": 32, **options})


def row(name: str, options: dict) -> list[str]:
    """One row of a table: parameters and GFLOPs without and with ELIT."""
    model = build(name, **{k: v for k, v in options.items() if k != "elit_group_size"})
    elastic = build(f"ELIT-{name}", **options)
    millions = [round(sum(p.numel() for p in m.parameters()) / 1e6, 1) for m in (model, elastic)]
    flops = [models.count_flops(model), *(models.count_flops(elastic, b) for b in BUDGETS)]
    gflops = [f"{f / 1e9:.1f}" for f in flops]
    return [name, f"{millions[0]:,.1f} M", gflops[0], f"{millions[1]:,.1f} M", *gflops[1:]]


def main() -> None:
    """Print all tables in Markdown."""
    for title, rows in TABLES.items():
        print(f"\n**{title}**\n")
        print(markdown_table(HEAD, [row(*model) for model in rows]), flush=True)


if __name__ == "__main__":
    main()
