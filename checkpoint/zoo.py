"""Released weights by name: `--ckpt elit-sit-xl-256-multibudget` stands for a file on the hub."""

from dataclasses import dataclass
from pathlib import Path

import models
from common import hub
from common.errors import UserError, did_you_mean
from common.tables import markdown_table

REPOSITORY = "mali6/elit"
VAE = "ema"  # the VAE that released weights are sampled with, as the published code does


@dataclass(frozen=True)
class Released:
    """One released checkpoint.

    Attributes:
        file: its name in `REPOSITORY`.
        model: registered name.
        resolution: image side in pixels.
        steps: optimizer steps of its training.
        group_size: side of a group of an ELIT model, in tokens; 0: not elastic.
        multibudget: trained at every budget k/J, J = group_size²; else at the full one alone.
        fid: published FID of 50,000 images without guidance, 50 Euler steps (40 + 10 of DFM), full budget.
        inception_score: published with it; not comparable with evaluate.py's (docs/evaluation.md).
    """

    file: str
    model: str
    resolution: int
    steps: int
    group_size: int
    multibudget: bool
    fid: float
    inception_score: float

    @property
    def budgets(self) -> str:
        """The budgets that it was trained at."""
        J = self.group_size**2
        return "none" if not J else f"1/{J} … 1" if self.multibudget else "1"


def _released(
    model: str, resolution: int, steps: int, fid: float, inception_score: float, *, multibudget: bool = False
) -> Released:
    family = model.partition("-XL")[0].lower().replace("-", "_") + ("_mb" if multibudget else "")
    file = f"{family}_imagenet_{resolution}px_1k_{steps:07d}.pt"
    group_size = resolution // 64 if models.model_spec(model).elastic else 0
    return Released(file, model, resolution, steps, group_size, multibudget, fid, inception_score)


ZOO = {
    "sit-xl-256": _released("SiT-XL/2", 256, 400_000, 18.97, 73.32),
    "elit-sit-xl-256": _released("ELIT-SiT-XL/2", 256, 400_000, 11.23, 109.66),
    "elit-sit-xl-256-multibudget": _released("ELIT-SiT-XL/2", 256, 400_000, 9.98, 120.34, multibudget=True),
    "elit-sit-xl-256-multibudget-2m": _released("ELIT-SiT-XL/2", 256, 2_000_000, 8.93, 144.57, multibudget=True),
    "sit-xl-512": _released("SiT-XL/2", 512, 400_000, 21.82, 67.58),
    "dfm-sit-xl-512": _released("DFM-SiT-XL/2", 512, 400_000, 18.74, 80.16),
    "elit-sit-xl-512": _released("ELIT-SiT-XL/2", 512, 400_000, 10.28, 114.06),
    "elit-sit-xl-512-multibudget": _released("ELIT-SiT-XL/2", 512, 400_000, 9.65, 117.99, multibudget=True),
    "elit-sit-xl-512-multibudget-1m": _released("ELIT-SiT-XL/2", 512, 1_000_000, 8.77, 135.27, multibudget=True),
}


def local_file(path: str | Path) -> Path:
    """A checkpoint as a local file: a path or hf://owner/repo/file as `hub.local_file` has it, a name of `ZOO` downloaded.

    A file of that name counts before the name. `UserError` for what is neither (with the nearest name), and for a download that
    fails: it names the file to fetch.
    """
    name = str(path)
    if "/" in name or "." in name or hub.local_file(path).is_file():  # names of the zoo have neither
        return hub.local_file(path)
    if name not in ZOO:
        raise UserError(
            f"{name}: no such checkpoint, and no released weights{did_you_mean(name, ZOO)}; known: {', '.join(ZOO)}"
        )
    try:
        return hub.local_file(f"hf://{REPOSITORY}/{ZOO[name].file}")
    except UserError as error:
        page = f"https://huggingface.co/{REPOSITORY}/resolve/main/{ZOO[name].file}"
        raise UserError(f"{name}: {error}, fetched from {page}") from None


def table() -> str:
    """All released weights, as a Markdown table: of files in `REPOSITORY`."""
    head = ["name", "model", "px", "steps", "budgets", "VAE", "FID", "IS", "file"]
    rows = [
        [
            name,
            r.model,
            str(r.resolution),
            f"{r.steps // 1000}k",
            r.budgets,
            VAE,
            f"{r.fid:.2f}",
            f"{r.inception_score:.2f}",
            r.file,
        ]
        for name, r in ZOO.items()
    ]
    return markdown_table(head, rows)
