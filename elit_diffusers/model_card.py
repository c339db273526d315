"""The model card of a pipeline: how to use it, what its budgets cost, and figures of a sweep or of the quick start."""

import json
from pathlib import Path
from typing import Any

from torch import nn

import models
from checkpoint.weights import Weights
from common.errors import UserError
from common.tables import markdown_table
from models.elit import mask_levels, mask_to_budget

TABLES = ("sweep.md", "table.md", "text_table.md")  # of sweep.py, and of the quick starts
MOST_BUDGETS = 16  # rows; of more budgets, halves

TEMPLATE = """---
library_name: diffusers
pipeline_tag: {task}
tags:
- elit
- diffusion
---

# {name}

{about}

```python
from elit_diffusers import ELITPipeline

pipe = ELITPipeline.from_pretrained("{name}")
image = pipe({example}).images[0]
```

The code is [ELIT's](https://arxiv.org/abs/2603.12245) elastic diffusion transformers. `transformer/model.safetensors` is a checkpoint
for its `generate.py --ckpt`, too.

{tables}"""


def model_card(
    weights: Weights, model: nn.Module, sampler: dict[str, Any], name: str, figures: str | Path | None = None
) -> str:
    """The content of README.md.

    Args:
        weights: what the checkpoint records.
        model: the model, for its FLOPs.
        sampler: the pipeline's options of sampling.
        name: what it is loaded by.
        figures: folder of a sweep or of the quick start, or a Markdown file.

    Raises:
        UserError: there are no figures.
    """
    config, record = weights.config, weights.record
    spec = models.model_spec(config["model"])
    what = "text" if weights.takes_text else f"{config.get('num_classes', 1)} classes"
    height, width = (record.downsample_factor * side for side in sides_of(model))
    about = f"{spec.name}, {height} × {width} pixels, {what}, {weights.step} training steps"
    about += f"; latents of {record.vae}."
    if spec.elastic:
        about += " One checkpoint serves every budget: the share of latents that the core computes."
    if sampler:
        about += (
            f" Sampled with {', '.join(f'{k} {json.dumps(v)}' for k, v in sampler.items())} where a call says nothing else."
        )
    example = 'prompt="…"' if weights.takes_text else "class_labels=[0]"
    tables = ["## Cost", _cost(weights, model)]
    if figures is not None:
        tables += ["## Figures", _figures(Path(figures))]
    return TEMPLATE.format(
        task="text-to-image" if weights.takes_text else "unconditional-image-generation",
        name=name,
        about=about,
        example=example + (", budget=0.25" if spec.elastic and config["elit_group_size"] > 1 else ""),
        tables="\n\n".join(tables) + "\n",
    )


def sides_of(model: Any) -> tuple[int, int]:
    """Rows and columns of the latents of a model."""
    size = model.input_size
    return (size, size) if isinstance(size, int) else tuple(size)


def check_figures(figures: str | Path | None) -> None:
    """Raise UserError where `figures` holds no table."""
    if figures is not None:
        _figures(Path(figures))


def _cost(weights: Weights, model: nn.Module) -> str:
    """A table of GFLOPs, a line for each budget."""
    head = ["budget", "latents per group", "GFLOPs per forward"]
    if not models.model_spec(weights.config["model"]).elastic:
        return markdown_table(head[2:], [[f"{models.count_flops(model) / 1e9:.4g}"]])
    J = weights.config["elit_group_size"] ** 2
    budgets = [k / J for k in range(1, J + 1)] if J <= MOST_BUDGETS else [1 / 2**i for i in reversed(range(J.bit_length()))]
    masks = [weights.config.get(f"elit_{end}_mask_prob") for end in ("min", "max")]
    trained = {mask_to_budget(level, J) for level in mask_levels(J, *masks)}
    rows = []
    for budget in (b for b in budgets if b * J == int(b * J)):
        mark = "" if budget in trained else " (not trained)"
        gflops = models.count_flops(model, budget) / 1e9
        rows.append([f"{budget:g}{mark}", f"{budget * J:.0f} of {J}", f"{gflops:.4g}"])
    return markdown_table(head, rows)


def _figures(path: Path) -> str:
    """The tables of a run, whose headings go one level down."""
    files = [path] if path.is_file() else [path / name for name in TABLES if (path / name).is_file()]
    if not files:
        raise UserError(f"figures {path}: no such file, and no folder with {' or '.join(TABLES)}")
    try:
        text = files[0].read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"figures {files[0]}: cannot be read: {error}") from None
    return "\n".join("#" + line if line.startswith("#") else line for line in text.splitlines())
