"""How close averages made of snapshots are to the true ones: `python -m benchmarks.posthoc_ema`.

A small ELIT-SiT trains for some hundred steps on the quick start's latents, with `--posthoc-ema 0.05 0.1`. Beside it, the average
of each length is summed up from the weights of every step in float64, by the closed form of its profile. The table tells the
relative error of all weights, of averages made of the bf16 snapshots and of the same sums of float32 ones, and how far the weights
of the step alone are from the average.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
import train
from checkpoint import posthoc, power_average
from common.errors import UserError, cli_main
from common.tables import markdown_table
from models.elit import ELITSiT
from training.trainer import Trainer

LENGTHS = (0.03, 0.05, 0.06, 0.075, 0.09, 0.1, 0.15, 0.2)
KEPT = (0.05, 0.1)
MODEL = "ELIT-SiT-Nano/2"


class Recorder:
    """The true averages of a run, and its snapshots before they are rounded.

    Args:
        targets: (σ_rel, step) of each average.
        every: steps between snapshots.
    """

    def __init__(self, targets: list[tuple[float, int]], every: int):
        self.every = every
        self.true: dict[tuple[float, int], dict[str, Tensor]] = {target: {} for target in targets}
        self.raw: dict[int, dict[str, Tensor]] = {}
        self.wide: dict[tuple[int, float], dict[str, Tensor]] = {}

    def add(self, trainer: Trainer) -> None:
        """Take the weights of a step."""
        n = trainer.step
        weights = {name: p.detach().double().clone() for name, p in trainer.model.named_parameters()}
        for (sigma, step), total in self.true.items():
            if n <= step:
                power = power_average.exponent(sigma) + 1
                share = (n / step) ** power - ((n - 1) / step) ** power
                for name, value in weights.items():
                    total[name] = total.get(name, 0.0) + share * value
        if n in {step for _, step in self.true}:
            self.raw[n] = weights
        if n % self.every == 0 or n == trainer.total_steps:
            for sigma in KEPT:
                part = trainer.ema.parts[power_average.name(sigma)]
                self.wide[n, sigma] = {name: value.clone() for name, value in part.items()}


@contextlib.contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Inside, `recorder` follows every step that is trained."""
    step = Trainer.train_step

    def train_step(self: Trainer, batches: Any) -> None:
        step(self, batches)
        recorder.add(self)

    Trainer.train_step = train_step
    try:
        yield
    finally:
        Trainer.train_step = step


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """|a − b| / |b| over all weights of b."""
    difference = sum(float((a[name].double() - value).square().sum()) for name, value in b.items())
    return (difference / sum(float(value.square().sum()) for value in b.values())) ** 0.5


@cli_main
def main(argv: list[str] | None = None) -> None:
    """The command: train, and print the table."""
    parser = argparse.ArgumentParser(description="Errors of averages that are made of snapshots.")
    parser.add_argument("--data-dir", default="quickstart/data/train", help="latents of the quick start")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=25, help="steps between snapshots")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args(argv)
    if not Path(options.data_dir).is_dir():
        raise UserError(f"--data-dir {options.data_dir}: no such folder; `make quickstart` makes it")
    models.register(MODEL, ELITSiT, depth=4, hidden_size=64, num_heads=4, head_depth=1, tail_depth=1)
    between = options.steps - options.every // 2
    targets = [(sigma, step) for step in (options.steps, between) for sigma in LENGTHS]
    recorder = Recorder(targets, options.every)
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "model": MODEL, "exp-name": "run", "output-dir": folder, "data-dir": options.data_dir, "resolution": 64,
            "num-classes": 10, "batch-size": 16, "max-train-steps": options.steps, "checkpointing-steps": options.steps,
            "learning-rate": options.learning_rate, "mixed-precision": "no", "sampling-steps": 0, "num-workers": 0,
            "report-to": "none", "elit-group-size": 4, "elit-min-mask-prob": 0, "ema-decay": 0.99,
            "posthoc-ema-steps": options.every,
        }  # fmt: skip
        words = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
        with recorded(recorder):
            train.main([*words, "--posthoc-ema", *map(str, KEPT)])
        rows = [_row(recorder, f"{folder}/run", sigma, step) for sigma, step in targets]
    print(f"{options.steps} steps, a snapshot of {' and '.join(map(str, KEPT))} every {options.every}")
    print(markdown_table(["σ_rel", "step", "bf16 snapshots", "float32 snapshots", "weights of the step"], rows))


def _row(recorder: Recorder, run: str, sigma: float, step: int) -> list[str]:
    true = recorder.true[sigma, step]
    errors = ["–", "–"]
    with contextlib.suppress(UserError):  # a length that they do not span
        average = posthoc.find(run, sigma, step)
        coefficients = average.combination.coefficients.tolist()
        wide = [recorder.wide[part.step, part.sigma or 0.0] for part in average.parts]
        pairs = list(zip(coefficients, wide, strict=True))
        summed = {name: torch.stack([c * w[name].double() for c, w in pairs]).sum(dim=0) for name in true}
        errors = [f"{100 * distance(found, true):.3f}%" for found in (posthoc.make(average).state_dict, summed)]
    return [f"{sigma:g}", str(step), *errors, f"{100 * distance(recorder.raw[step], true):.2f}%"]


if __name__ == "__main__":
    main()
