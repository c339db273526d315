r"""Guidance and budgets over time on the quick start's model: a table of quality against compute.

    python experiments_updated/quickstart_guidance.py --ckpt quickstart/quickstart/checkpoints/0002700.pt \
        --config experiments_updated/generation/quickstart.yaml --cfg-scale 3 --num-fid-samples 60 \
        --sample-dir quickstart/samples --output-dir quickstart

draws the same images with every kind of guidance at several budgets, and with three schedules of budgets. Stopped at any point, it
goes on from there. Digits are judged by the quick start's classifier.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere


import generate
from common import files
from common.errors import cli_main
from common.files import check_folder
from common.tables import markdown_table
from config.options import GenerateConfig
from config.rules import option
from experiments_updated import digit_classifier
from metrics import frechet_distance
from sampling import cost, session
from sampling.conditions import labels_of
from sampling.images import draw

TIMED_IMAGES = 6
SCHEDULES = ("0.0625@1.0-0.5,1.0@0.5-0.0", "1.0@1.0-0.5,0.0625@0.5-0.0", "0.0625@1.0-0.75,0.25@0.75-0.25,1.0@0.25-0.0")


@dataclasses.dataclass
class GuidanceConfig(GenerateConfig):
    """Options of quickstart_guidance.py: those of the samples, and what to compare."""

    output_dir: str = option("output", "quickstart", "folder of guidance.md and guidance.json; classifier.pt is kept there")
    budgets: list[float] = option("sample", [0.25, 1.0], "budgets to guide at, each above the guiding one", gt=0, le=1)
    guiding_budget: float = option("guidance", 0.0625, "budget of the guiding pass of cheap CFG and autoguidance", gt=0, le=1)


@cli_main
def main(argv: list[str] | None = None) -> None:
    """The command: options → the images of every cell, and the table."""
    config, _, weights = session.from_command_line(GuidanceConfig, argv, "quickstart_guidance.py", check_options)
    generate.name_run(config, weights)
    runs = cells(config)
    for run in runs.values():
        generate.check(run)

    out = Path(config.output_dir)
    classifier = digit_classifier.load_or_train(out / "classifier.pt")
    reference = digit_classifier.statistics(classifier, digit_classifier.digit_images(held_out=True)[0])
    folders = [generate.generate(run, weights) for run in runs.values()]
    loaded = session.load(config, weights, session.device())
    jobs = {name: partial(draw, loaded, run, range(TIMED_IMAGES)) for name, run in runs.items()}
    with torch.inference_mode():
        times = cost.interleaved_times(jobs, session.device())
    rows = []
    for (name, run), folder in zip(runs.items(), folders, strict=True):
        images = torch.from_numpy(np.load(folder.with_name(folder.name + ".npz"))["arr_0"]).permute(0, 3, 1, 2)
        digits = digit_classifier.quarters(images)
        labels = labels_of(run, range(len(images))).repeat_interleave(4)
        flops = run.num_steps * cost.mean_flops_per_step(run, session.guidance(run), loaded.model)
        rows.append(
            {
                "guidance": name[0],
                "budget": name[1],
                "digits": len(digits),
                "digits_in_class": digit_classifier.accuracy(classifier, digits, labels),
                "frechet_distance": frechet_distance(*digit_classifier.statistics(classifier, digits), *reference),
                "gflops_per_image": flops / 1e9,
                "images_per_second": 1000 * TIMED_IMAGES / times[name][1],
            }
        )
    files.write_json(rows, out / "guidance.json")
    table = _table(rows)
    (out / "guidance.md").write_text(table + "\n")
    print(table)


def check_options(config: GuidanceConfig) -> None:
    """Refuse what no checkpoint can be sampled with; nothing is read or downloaded before."""
    generate.check_options(config)
    check_folder("--output-dir", config.output_dir)


def cells(config: GuidanceConfig) -> dict[tuple[str, str], GenerateConfig]:
    """(guidance, budget) → the options of its samples."""
    common = {f.name: getattr(config, f.name) for f in dataclasses.fields(GenerateConfig)}
    plain = GenerateConfig(**common | {"unconditional_inference_budget": None, "autoguidance": False})
    low = {"unconditional_inference_budget": config.guiding_budget}
    kinds = [("none", config.budgets[-1], {"cfg_scale": 1.0})]
    kinds += [("CFG", b, {}) for b in [config.guiding_budget, *config.budgets, *SCHEDULES]]
    kinds += [("cheap CFG", b, low) for b in [*config.budgets, SCHEDULES[0]]]
    kinds += [("autoguidance", b, low | {"autoguidance": True}) for b in config.budgets]
    return {(name, str(b)): dataclasses.replace(plain, inference_budget=str(b), **changes) for name, b, changes in kinds}


def _table(rows: list[dict[str, Any]]) -> str:
    head = ["guidance", "budget", "digits in class", "Fréchet distance", "GFLOPs / image", "images/s"]
    lines = []
    for r in rows:
        figures = (f"{r['digits_in_class']:.3f}", f"{r['frechet_distance']:.1f}", f"{r['gflops_per_image']:.1f}")
        lines.append([r["guidance"], r["budget"], *figures, f"{r['images_per_second']:.2f}"])
    return markdown_table(head, lines)


if __name__ == "__main__":
    main()
