"""The quick start's result: budgets.png (rows: budgets, columns: classes) and a table of quality against compute."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere


import evaluate
import generate
import models
from checkpoint.weights import Weights
from common.errors import UserError, cli_main
from common.files import check_folder
from common.plotting import labelled_grid
from common.tables import markdown_table
from config.options import GenerateConfig
from config.parsing import require_options
from config.rules import option
from data.dataset import LatentDataset
from experiments_updated import digit_classifier
from flows import flow_of
from metrics.images import write_npz
from sampling import image_folder, session
from sampling.session import Session

TIMED_IMAGES, TIMED_ROUNDS = 20, 2
VAL_REPEATS = 2  # noise and times drawn for each held-out canvas


@dataclasses.dataclass
class ReportConfig(GenerateConfig):
    """Options of quickstart_report.py: those of the samples, and where the held-out data are."""

    val_data_dir: str = option("data", ..., "held-out data set")
    output_dir: str = option("output", "quickstart", "folder of budgets.png, table.md and results.json")
    budgets: list[float] = option("sample", [0.0625, 0.25, 1.0], "budgets to compare, the full one last", gt=0, le=1)


@cli_main
def main(argv: list[str] | None = None) -> None:
    """The command: options → budgets.png, table.md and results.json."""
    config, _, weights = session.from_command_line(ReportConfig, argv, "quickstart_report.py", check_options)
    generate.name_run(config, weights)
    generate.check(config)
    loaded = session.load(config, weights, session.device())

    out = Path(config.output_dir)
    classifier = digit_classifier.load_or_train(out / "classifier.pt")
    val_digits, val_labels = digit_classifier.digit_images(held_out=True)
    accuracy = digit_classifier.accuracy(classifier, val_digits, val_labels)
    print(f"digit classifier: {accuracy:.3f} of the 1,000 held-out digits right")

    samples = [read_samples(config, budget) for budget in config.budgets]  # (n, H, W, 3) each
    labels = generate.labels_of(config, range(len(samples[0]))).numpy()
    rates = _images_per_second(config, loaded)
    losses = held_out_losses(config, loaded, weights)
    figures = digit_figures(config, val_digits, samples)
    rows = []
    for i, (budget, images) in enumerate(zip(config.budgets, samples, strict=True)):
        predicted = digit_classifier.features(classifier, digits_of(images))[1].argmax(dim=1).numpy()
        difference = losses[i] - losses[-1]
        rows.append(
            {
                "budget": budget,
                "gflops_per_forward": models.count_flops(loaded.model, budget) / 1e9,
                "images_per_second": rates[i],
                "digits_in_class": float((predicted == labels.repeat(4)).mean()),
                **{name: figures[i][name] for name in ("fid", "is", "precision", "recall")},
                "held_out_loss": float(losses[i].mean()),
                "held_out_loss_difference": float(difference.mean()),
                "held_out_loss_difference_standard_error": float(difference.std(ddof=1) / len(difference) ** 0.5),
                "pixel_difference": float(np.abs(images.astype(np.int16) - samples[-1]).mean()),
            }
        )
    table = _table(rows)
    print(table)
    (out / "table.md").write_text(table + "\n")
    (out / "results.json").write_text(json.dumps({"classifier_accuracy": accuracy, "budgets": rows}, indent=1) + "\n")
    first = [int(np.flatnonzero(labels == c)[0]) for c in range(config.num_classes)]
    names = [f"budget {fraction(b)}\n{r['gflops_per_forward']:.2f} GFLOPs" for b, r in zip(config.budgets, rows, strict=True)]
    labelled_grid(
        np.stack([s[first] for s in samples]), names, [str(c) for c in range(config.num_classes)], out / "budgets.png"
    )


def check_options(config: ReportConfig) -> None:
    """Refuse what no checkpoint can be sampled with; nothing is read or downloaded before."""
    require_options(config, "val_data_dir")
    generate.check_options(config)
    check_folder("--output-dir", config.output_dir)


def with_budget(config: ReportConfig, budget: float | None) -> ReportConfig:
    """The options for samples at a budget, `None` where the model has none."""
    return dataclasses.replace(config, inference_budget=None if budget is None else str(budget))


def read_samples(config: ReportConfig, budget: float | None) -> np.ndarray:
    """What generate.py drew at a budget, uint8 (n, H, W, 3)."""
    folder = image_folder.images_folder(with_budget(config, budget))
    path = folder.with_name(folder.name + ".npz")
    if not path.is_file():
        raise UserError(f"--sample-dir {config.sample_dir}: no samples at budget {budget} ({path}); run generate.py first")
    return np.load(path)["arr_0"]


def _images_per_second(config: ReportConfig, loaded: Session) -> list[float]:
    """Sampling and decoding at each budget, the budgets by turns; the best of the rounds."""
    best = [float("inf")] * len(config.budgets)
    with torch.inference_mode():
        for _ in range(TIMED_ROUNDS):
            for i, budget in enumerate(config.budgets):
                start = time.perf_counter()
                generate.draw(loaded, with_budget(config, budget), range(TIMED_IMAGES)).cpu()
                best[i] = min(best[i], time.perf_counter() - start)
    return [TIMED_IMAGES / seconds for seconds in best]


def held_out_losses(config: ReportConfig, loaded: Session, weights: Weights) -> np.ndarray:
    """Velocity loss of each held-out canvas at each budget (budgets, canvases), over a few fixed draws of time and noise.

    Times as in training: its weighting and shift. Of DFM the mean over the stages.
    """
    dataset = LatentDataset(config.val_data_dir)
    flow = flow_of(config, weighting=weights.config["weighting"])
    conditions = flow.conditions(config.budgets)  # budgets × stages
    batch_size, total = 50, []
    for start in range(0, len(dataset), batch_size):
        indices = range(start, min(start + batch_size, len(dataset)))
        batch = torch.utils.data.default_collate(dataset.__getitems__(list(indices)))
        batch = {k: v.to(loaded.device) for k, v in batch.items()}
        repeats = [
            flow.val_losses(
                loaded.model,
                batch,
                range(r * len(dataset) + start, r * len(dataset) + indices.stop),
                weights.record,
                conditions,
            )
            for r in range(VAL_REPEATS)
        ]
        total.append(torch.stack(repeats).mean(dim=0))
    losses = torch.cat(total, dim=1).unflatten(0, (len(config.budgets), -1))  # (budgets, stages, canvases)
    return losses.mean(dim=1).cpu().numpy().astype(np.float64)


def digits_of(canvases: np.ndarray) -> torch.Tensor:
    """The digits of uint8 (n, H, W, 3) canvases: (4n, 3, 32, 32)."""
    return digit_classifier.quarters(torch.from_numpy(canvases).permute(0, 3, 1, 2))


def digit_figures(config: ReportConfig, val_digits: torch.Tensor, samples: list[np.ndarray]) -> list[dict]:
    """evaluate.py's JSON for each set of samples: their digits against the held-out ones, in the classifier's features."""
    folder = Path(config.output_dir) / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[digit_classifier.WEIGHTS_VARIABLE] = str(Path(config.output_dir) / "classifier.pt")
    sets = {"held-out": val_digits} | {f"budget-{b}": digits_of(s) for b, s in zip(config.budgets, samples, strict=True)}
    for name, digits in sets.items():
        images = digits.permute(0, 2, 3, 1).numpy()
        write_npz(folder / f"{name}.npz", images.shape, images)
    evaluated = []
    for name in list(sets)[1:]:
        reference, npz, figures = (str(folder / file) for file in ("held-out.npz", f"{name}.npz", f"{name}.json"))
        evaluate.main([reference, npz, "--features", "experiments_updated.digit_classifier:factory", "--output", figures])
        evaluated.append(json.loads(Path(figures).read_text()))
    return evaluated


def fraction(budget: float) -> str:
    """For people: 1/16 in place of 0.0625."""
    return f"1/{round(1 / budget)}" if budget < 1 and (1 / budget).is_integer() else f"{budget:g}"


def _table(rows: list[dict]) -> str:
    head = [
        "budget",
        "GFLOPs / forward",
        "images/s",
        "digits in class",
        "FID",
        "precision",
        "recall",
        "held-out loss",
        "− full (± s.e.)",
        "pixel − full",
    ]
    lines = []
    for r in rows:
        difference = f"{r['held_out_loss_difference']:+.4f} ± {r['held_out_loss_difference_standard_error']:.4f}"
        lines.append(
            [
                fraction(r["budget"]),
                f"{r['gflops_per_forward']:.3f}",
                f"{r['images_per_second']:.2f}",
                f"{r['digits_in_class']:.3f}",
                f"{r['fid']:.2f}",
                f"{r['precision']:.3f}",
                f"{r['recall']:.3f}",
                f"{r['held_out_loss']:.4f}",
                difference if r is not rows[-1] else "0",
                f"{r['pixel_difference']:.2f}",
            ]
        )
    return markdown_table(head, lines)


if __name__ == "__main__":
    main()
