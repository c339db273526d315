"""The study of backbones: samples and held-out loss of one model at each budget, then the table of all that are measured.

Writes NAME.json and NAME.npz of the checkpoint's run NAME into --output-dir, then table.md, results.json and samples.png of all.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from anywhere


import generate
import models
from common.errors import cli_main
from common.files import write_json
from common.plotting import labelled_grid
from common.tables import markdown_table
from experiments_updated import digit_classifier, quickstart_report
from experiments_updated.quickstart_report import ReportConfig
from sampling import session
from sampling.conditions import labels_of

HEAD = "model", "parameters", "budget", "GFLOPs", "held-out loss", "− without ELIT (± s.e.)", "FID", "digits in class"


@cli_main
def main(argv: list[str] | None = None) -> None:
    """The command: options → the model's figures, and the table of all."""
    config, _, weights = session.from_command_line(ReportConfig, argv, "backbones_report.py", quickstart_report.check_options)
    generate.name_run(config, weights)
    generate.check(config)
    if not models.model_spec(config.model).elastic:
        config.budgets = [None]
    runs = [dataclasses.replace(config, inference_budget=None if b is None else str(b)) for b in config.budgets]
    for run in runs:
        generate.generate(run, weights)

    out, loaded = Path(config.output_dir), session.load(config, weights, session.device())
    samples = [quickstart_report.read_samples(run) for run in runs]
    digits = [digit_classifier.quarters(torch.from_numpy(images).permute(0, 3, 1, 2)) for images in samples]
    classifier = digit_classifier.load_or_train(out / "classifier.pt")
    sets = {f"budget-{budget}": images for budget, images in zip(config.budgets, digits, strict=True)}
    figures = quickstart_report.digit_figures(config, digit_classifier.digit_images(held_out=True)[0], sets)
    losses = quickstart_report.held_out_losses(config, loaded, weights)
    labels = labels_of(config, range(len(samples[0]))).numpy()
    rows = []
    for budget, images, measured, loss in zip(config.budgets, digits, figures, losses, strict=True):
        predicted = digit_classifier.features(classifier, images)[1].argmax(dim=1).numpy()
        rows.append(
            {
                "model": config.model,
                "parameters": sum(p.numel() for p in loaded.model.parameters()),
                "budget": budget,
                "gflops_per_forward": models.count_flops(loaded.model, budget) / 1e9,
                "held_out_loss": float(loss.mean()),
                "fid": measured["fid"],
                "digits_in_class": float((predicted == labels.repeat(4)).mean()),
            }
        )
    first = [int(np.flatnonzero(labels == c)[0]) for c in range(config.num_classes)]
    np.savez(out / f"{config.exp_name}.npz", losses=losses, samples=np.stack([s[first] for s in samples]))
    write_json(rows, out / f"{config.exp_name}.json")
    summarize(out)


def summarize(out: Path) -> None:
    """table.md, results.json and samples.png of all models measured so far, each backbone before its ELIT."""
    measured = {
        path.stem: (json.loads(path.read_text()), np.load(path.with_suffix(".npz"))) for path in out.glob("*-Ti-*.json")
    }
    rows, pictures = [], []
    for name in sorted(measured, key=lambda name: (name.removeprefix("ELIT-"), name.startswith("ELIT-"))):
        of_model, arrays = measured[name]
        plain = measured.get(name.removeprefix("ELIT-"))
        for i, row in reversed(list(enumerate(of_model))):  # the full budget first
            if plain is not None and name.startswith("ELIT-"):
                difference = arrays["losses"][i] - plain[1]["losses"][0]
                row["difference"] = float(difference.mean())
                row["difference_standard_error"] = float(difference.std(ddof=1) / len(difference) ** 0.5)
            rows.append(row)
            pictures.append(arrays["samples"][i])
    write_json(rows, out / "results.json")
    lines = [_cells(row) for row in rows]
    table = markdown_table(HEAD, lines)
    print(table)
    (out / "table.md").write_text(table + "\n")
    names = [f"{cells[0]}{f', budget {cells[2]}' if cells[2] else ''}\n{cells[3]} GFLOPs" for cells in lines]
    labelled_grid(np.stack(pictures), names, [str(c) for c in range(pictures[0].shape[0])], out / "samples.png", inches=0.5)


def _cells(row: dict) -> list[str]:
    difference = f"{row['difference']:+.4f} ± {row['difference_standard_error']:.4f}" if "difference" in row else ""
    return [
        row["model"],
        f"{row['parameters'] / 1e6:.2f} M",
        "" if row["budget"] is None else quickstart_report.name_of_budget(row["budget"]),
        f"{row['gflops_per_forward']:.3f}",
        f"{row['held_out_loss']:.4f}",
        difference,
        f"{row['fid']:.2f}",
        f"{row['digits_in_class']:.3f}",
    ]


if __name__ == "__main__":
    main()
