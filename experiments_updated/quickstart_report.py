"""The quick start's result: budgets.png (rows: baseline and budgets, columns: classes) and a table of quality against compute.

The baseline is the plain transformer, trained beside the elastic one for the same compute. Differences are paired: the same noise,
times and labels; their standard errors are over canvases (losses) or by bootstrap over canvases (FID).
"""

import dataclasses
import itertools
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere


import evaluate
import generate
import models
from checkpoint import reading
from checkpoint.architecture import resolve_architecture
from checkpoint.weights import Weights
from common.errors import UserError, cli_main
from common.files import check_folder
from common.plotting import labelled_grid
from common.tables import markdown_table
from config.options import GenerateConfig, TrainConfig
from config.parsing import require_options
from config.rules import option
from data.dataset import LatentDataset
from experiments_updated import digit_classifier
from flows import flow_of
from metrics import frechet_distance
from metrics.images import write_npz
from sampling import cost, image_folder, session
from sampling.conditions import labels_of
from sampling.images import draw
from sampling.session import Session
from training.budgets import mean_training_flops

TIMED_IMAGES, TIMED_ROUNDS = 10, 2
VAL_REPEATS = 2  # noise and times drawn for each held-out canvas
BOOTSTRAP = 200  # resamplings of the canvases


@dataclasses.dataclass
class ReportConfig(GenerateConfig):
    """Options of quickstart_report.py: those of the samples, and where the held-out data are."""

    baseline_ckpt: str | None = option("checkpoint", None, "the plain transformer's checkpoint", images=False)
    val_data_dir: str = option("data", ..., "held-out data set", images=False)
    output_dir: str = option("output", "quickstart", "folder of budgets.png, table.md and results.json", images=False)
    unguided_samples: int = option(
        "sample", 0, "canvases that generate.py drew of each row without guidance, for another FID; 0: none", ge=0, images=False
    )
    budgets: list[float] = option(
        "sample", [0.0625, 0.25, 1.0], "budgets to compare, the full one last", gt=0, le=1, images=False
    )


@dataclass
class Row:
    """A set of samples: its options, the model that drew it, and the canvases (n, H, W, 3), some also without guidance."""

    name: str
    config: ReportConfig
    loaded: Session
    weights: Weights
    images: np.ndarray
    unguided: np.ndarray | None = None

    @property
    def budget(self) -> float | None:
        """The budget of the conditional pass."""
        return None if self.config.inference_budget is None else float(self.config.inference_budget)

    @property
    def flops(self) -> float:
        """Of one forward of one image."""
        return models.count_flops(self.loaded.model, self.budget)


@dataclass
class Fid:
    """FID of a set of canvases, and of resampled ones (resamplings,)."""

    value: float
    resampled: np.ndarray

    def minus(self, other: "Fid") -> tuple[float, float]:
        """The difference and its standard error."""
        return self.value - other.value, float((self.resampled - other.resampled).std(ddof=1))


@cli_main
def main(argv: list[str] | None = None) -> None:
    """The command: options → budgets.png, table.md and results.json."""
    config, _, weights = session.from_command_line(ReportConfig, argv, "quickstart_report.py", check_options)
    generate.name_run(config, weights)
    generate.check(config)
    rows = _rows(config, weights)
    out = Path(config.output_dir)
    classifier = digit_classifier.load_or_train(out / "classifier.pt")
    val_digits, val_labels = digit_classifier.digit_images(held_out=True)
    accuracy = digit_classifier.accuracy(classifier, val_digits, val_labels)
    print(f"digit classifier: {accuracy:.3f} of the 1,000 held-out digits right")

    labels = labels_of(config, range(len(rows[0].images))).numpy()
    features = [_features(classifier, row.images) for row in rows]  # (n, 4, 64), and the classes (n, 4), each
    reference = digit_classifier.statistics(classifier, val_digits)
    guided = _fids({row.name: f for row, (f, _) in zip(rows, features, strict=True)}, reference)
    unguided = {row.name: _features(classifier, row.unguided)[0] for row in rows if row.unguided is not None}
    fids = {"fid": guided, "fid_unguided": _fids(unguided, reference)}
    sets = {f"row-{i}": _digits(row.images) for i, row in enumerate(rows)}
    figures, rates = digit_figures(config, val_digits, sets), _images_per_second(rows)
    # Cheap guidance draws with the weights of the row before it, and has no loss of its own.
    measured = [row for row in rows if not row.config.unconditional_inference_budget]
    losses = dict(zip((row.name for row in measured), _losses(measured), strict=True))
    full = next(i for i, row in enumerate(rows) if row.name == name_of_budget(config.budgets[-1]))
    results = []
    for i, row in enumerate(rows):
        result = {
            "name": row.name,
            "gflops_per_forward": row.flops / 1e9,
            "gflops_per_step": cost.mean_flops_per_step(row.config, session.guidance(row.config), row.loaded.model) / 1e9,
            "images_per_second": rates[i],
            "digits_in_class": float((features[i][1] == labels[:, None]).mean()),
            **{name: figures[i][name] for name in ("precision", "recall")},
            "pixel_difference": float(np.abs(row.images.astype(np.int16) - rows[full].images).mean()),
        }
        for kind, of_kind in fids.items():
            if row.name in of_kind:
                difference, error = of_kind[row.name].minus(of_kind[rows[full].name])
                result |= {
                    kind: of_kind[row.name].value,
                    f"{kind}_difference": difference,
                    f"{kind}_difference_standard_error": error,
                }
        if row.name in losses:
            mean, error = _mean_and_error(losses[row.name] - losses[rows[full].name])
            result |= {"held_out_loss": float(losses[row.name].mean())}
            result |= {"held_out_loss_difference": mean, "held_out_loss_difference_standard_error": error}
        results.append(result)
    steps = _neighbours(config, rows, losses, fids)
    training = [_training(row) for row in rows if row.name in ("SiT", name_of_budget(config.budgets[-1]))]
    text = "\n\n".join([_table(results, rows[full].name), _steps_table(steps), _training_table(training)])
    print(text)
    (out / "table.md").write_text(text + "\n")
    content = {"classifier_accuracy": accuracy, "budgets": results, "steps": steps, "training": training}
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    first = [int(np.flatnonzero(labels == c)[0]) for c in range(config.num_classes)]
    names = [f"{'' if r is rows[0] and r.budget is None else 'budget '}{r.name}\n{r.flops / 1e9:.2f} GFLOPs" for r in measured]
    labelled_grid(np.stack([r.images[first] for r in measured]), names, [str(c) for c in range(10)], out / "budgets.png")


def check_options(config: ReportConfig) -> None:
    """Refuse what no checkpoint can be sampled with; nothing is read or downloaded before."""
    require_options(config, "val_data_dir")
    generate.check_options(config)
    check_folder("--output-dir", config.output_dir)


def _rows(config: ReportConfig, weights: Weights) -> list[Row]:
    """The baseline, the budgets, and the full one with cheap guidance at the lowest."""
    loaded = session.load(config, weights, session.device())
    elastic: list[tuple[str, dict[str, Any]]] = [(name_of_budget(b), {"inference_budget": str(b)}) for b in config.budgets]
    low = config.budgets[0]
    cheap = {"inference_budget": str(config.budgets[-1]), "unconditional_inference_budget": low}
    elastic.append((f"{name_of_budget(config.budgets[-1])}, cheap CFG at {name_of_budget(low)}", cheap))
    rows = []
    if config.baseline_ckpt is not None:
        plain = dataclasses.replace(config, ckpt=config.baseline_ckpt, exp_name=None)
        plain_weights = reading.read_weights(config.baseline_ckpt, config.weights)
        resolve_architecture(plain, {}, plain_weights, config.baseline_ckpt)
        generate.name_run(plain, plain_weights)
        plain_loaded = session.load(plain, plain_weights, session.device())
        rows.append(Row("SiT", plain, plain_loaded, plain_weights, read_samples(plain), _read_unguided(plain)))
    for name, changes in elastic:
        options = dataclasses.replace(config, **changes)
        rows.append(Row(name, options, loaded, weights, read_samples(options), _read_unguided(options)))
    return rows


def _read_unguided(config: ReportConfig) -> np.ndarray | None:
    """What generate.py drew by these options without guidance; cheap guidance has none of its own."""
    if not config.unguided_samples or config.unconditional_inference_budget:
        return None
    images = read_samples(dataclasses.replace(config, cfg_scale=1.0, num_fid_samples=config.unguided_samples))
    if len(images) < config.unguided_samples:
        raise UserError(f"--unguided-samples {config.unguided_samples}: generate.py drew {len(images)} last; run it again")
    return images[: config.unguided_samples]


def read_samples(config: ReportConfig) -> np.ndarray:
    """What generate.py drew by these options, uint8 (n, H, W, 3)."""
    folder = image_folder.images_folder(config)
    path = folder.with_name(folder.name + ".npz")
    if not path.is_file():
        raise UserError(f"--sample-dir {config.sample_dir}: no samples {path}; run generate.py first")
    return np.load(path)["arr_0"]


def _images_per_second(rows: list[Row]) -> list[float]:
    """Sampling and decoding, the rows by turns; the best of the rounds."""
    best = [float("inf")] * len(rows)
    with torch.inference_mode():
        for _ in range(TIMED_ROUNDS):
            for i, row in enumerate(rows):
                start = time.perf_counter()
                draw(row.loaded, row.config, range(TIMED_IMAGES)).cpu()
                best[i] = min(best[i], time.perf_counter() - start)
    return [TIMED_IMAGES / seconds for seconds in best]


def _losses(rows: list[Row]) -> list[np.ndarray]:
    """Each held-out canvas's loss (canvases,) of each row; the budgets of one model together."""
    losses: list[np.ndarray] = []
    for model in dict.fromkeys(id(row.loaded) for row in rows):
        same = [row for row in rows if id(row.loaded) == model]
        config = dataclasses.replace(same[0].config, budgets=[row.budget for row in same])
        losses += list(held_out_losses(config, same[0].loaded, same[0].weights))
    return losses


def held_out_losses(config: ReportConfig, loaded: Session, weights: Weights) -> np.ndarray:
    """Velocity loss of each held-out canvas at each budget (budgets, canvases), over a few fixed draws of time and noise.

    Times as in training: its weighting and shift. Of DFM the mean over the stages.
    """
    losses, _ = losses_of_draws(config, loaded, weights)
    return losses.mean(dim=0).mean(dim=1).numpy().astype(np.float64)


@torch.no_grad()
def losses_of_draws(config: ReportConfig, loaded: Session, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Velocity losses (draws, budgets, stages, canvases) of the held-out canvases, and the times (draws, canvases) they are taken at."""
    dataset = LatentDataset(config.val_data_dir)
    channels, *sides = dataset.shape
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
        total.append(torch.stack(repeats))
    losses = torch.cat(total, dim=2).unflatten(1, (len(config.budgets), -1)).cpu()
    n = len(dataset)
    times = [flow.times(flow.val_draws(range(r * n, (r + 1) * n), (channels // 2, *sides))) for r in range(VAL_REPEATS)]
    return losses, torch.stack(times)


def _digits(canvases: np.ndarray) -> torch.Tensor:
    """The digits of uint8 (n, H, W, 3) canvases: (4n, 3, 32, 32)."""
    return digit_classifier.quarters(torch.from_numpy(canvases).permute(0, 3, 1, 2))


def _features(classifier: digit_classifier.DigitClassifier, canvases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pool, logits = digit_classifier.features(classifier, _digits(canvases))
    return pool.double().unflatten(0, (-1, 4)).numpy(), logits.argmax(dim=1).unflatten(0, (-1, 4)).numpy()


def _fids(features: dict[str, np.ndarray], reference: tuple[np.ndarray, np.ndarray]) -> dict[str, Fid]:
    """FID of features (n, 4, F) by row; resamplings take the same canvases of all rows, which share noise and labels."""
    rng, n = np.random.default_rng(0), len(next(iter(features.values()), ()))
    chosen = rng.integers(max(n, 1), size=(BOOTSTRAP, n))
    return {
        name: Fid(_fid(f, reference), np.array([_fid(f[rows], reference) for rows in chosen])) for name, f in features.items()
    }


def _fid(features: np.ndarray, reference: tuple[np.ndarray, np.ndarray]) -> float:
    flat = features.reshape(-1, features.shape[-1])
    return frechet_distance(flat.mean(axis=0), np.cov(flat, rowvar=False), *reference)


def _mean_and_error(differences: np.ndarray) -> tuple[float, float]:
    return float(differences.mean()), float(differences.std(ddof=1) / len(differences) ** 0.5)


def digit_figures(config: ReportConfig, val_digits: torch.Tensor, sets: dict[str, torch.Tensor]) -> list[dict]:
    """evaluate.py's JSON for each set of digits (n, 3, 32, 32) against the held-out ones, in the classifier's features."""
    folder = Path(config.output_dir) / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[digit_classifier.WEIGHTS_VARIABLE] = str(Path(config.output_dir) / "classifier.pt")
    for name, digits in {"held-out": val_digits, **sets}.items():
        images = digits.permute(0, 2, 3, 1).numpy()
        write_npz(folder / f"{name}.npz", images.shape, images)
    evaluated = []
    for name in sets:
        reference, npz, figures = (str(folder / file) for file in ("held-out.npz", f"{name}.npz", f"{name}.json"))
        evaluate.main([reference, npz, "--features", "experiments_updated.digit_classifier:factory", "--output", figures])
        evaluated.append(json.loads(Path(figures).read_text()))
    return evaluated


def _neighbours(
    config: ReportConfig, rows: list[Row], losses: dict[str, np.ndarray], fids: dict[str, dict[str, Fid]]
) -> list[dict[str, Any]]:
    """What each step in compute gains: losses and FIDs of one row less those of the next, with their standard errors."""
    names = [name_of_budget(b) for b in config.budgets]
    pairs = [*itertools.pairwise(names), *((names[-1], row.name) for row in rows if row.name not in names)]
    steps = []
    for a, b in pairs:
        step: dict[str, Any] = {"from": a, "to": b}
        for kind, of_kind in fids.items():
            if a in of_kind and b in of_kind:
                step[kind], step[f"{kind}_standard_error"] = of_kind[a].minus(of_kind[b])
        if a in losses and b in losses:
            step["loss"], step["loss_standard_error"] = _mean_and_error(losses[a] - losses[b])
        steps.append(step)
    return steps


def _training(row: Row) -> dict[str, Any]:
    """What the training of a row's model took: steps, FLOPs, and the seconds by its metrics.jsonl."""
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    options = TrainConfig(**{k: v for k, v in row.weights.config.items() if k in names})
    images = row.weights.step * options.batch_size * options.gradient_accumulation_steps
    forward = mean_training_flops(options, row.loaded.model)
    seconds = 0.0
    for line in (Path(row.config.ckpt).parent.parent / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if values.get("images_per_second"):
            seconds += min(values["step"], options.log_every) * options.batch_size / values["images_per_second"]
    flops = 3 * forward * images
    return {"model": options.model, "steps": row.weights.step, "flops": flops, "seconds": seconds}


def _training_table(training: list[dict[str, Any]]) -> str:
    lines = [[t["model"], f"{t['steps']:,}", f"{t['flops'] / 1e12:.0f}", f"{t['seconds']:.0f}"] for t in training]
    return markdown_table(["trained on one core", "steps", "TFLOPs", "seconds"], lines)


def name_of_budget(budget: float) -> str:
    """As a fraction where it is one."""
    return f"1/{round(1 / budget)}" if budget < 1 and (1 / budget).is_integer() else f"{budget:g}"


COLUMNS = {  # of results.json's entries
    "GFLOPs / forward": "{gflops_per_forward:.3f}",
    "images/s": "{images_per_second:.2f}",
    "digits in class": "{digits_in_class:.3f}",
    "precision": "{precision:.3f}",
    "recall": "{recall:.3f}",
    "FID": "{fid:.2f}",
    "FID, unguided": "{fid_unguided:.2f}",
    "− full (± s.e.)": "{fid_unguided_difference:+.2f} ± {fid_unguided_difference_standard_error:.2f}",
    "held-out loss": "{held_out_loss:.4f}",
    "− full (± s.e.) ": "{held_out_loss_difference:+.4f} ± {held_out_loss_difference_standard_error:.4f}",
    "pixel − full": "{pixel_difference:.2f}",
}
STEP_COLUMNS = {
    "held-out loss": "{loss:+.4f} ± {loss_standard_error:.4f}",
    "FID": "{fid:+.2f} ± {fid_standard_error:.2f}",
    "FID, unguided": "{fid_unguided:+.2f} ± {fid_unguided_standard_error:.2f}",
}


def _table(results: list[dict[str, Any]], full: str) -> str:
    lines = []
    for r in results:
        line = _cells(COLUMNS, r)
        lines.append([r["name"], *("0" if r["name"] == full and "±" in cell else cell for cell in line)])
    return markdown_table(["budget", *COLUMNS], lines)


def _steps_table(steps: list[dict[str, Any]]) -> str:
    lines = [[f"{s['from']} − {s['to']}", *_cells(STEP_COLUMNS, s)] for s in steps]
    return markdown_table(["difference (± s.e.)", *STEP_COLUMNS], lines)


def _cells(columns: dict[str, str], values: dict[str, Any]) -> list[str]:
    """Of the columns whose values there are; the others stay empty."""
    cells = []
    for form in columns.values():
        first = form[1 : form.index(":")]
        cells.append(form.format(**values) if first in values else "")
    return cells


if __name__ == "__main__":
    main()
