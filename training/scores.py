"""Scores during training: images of the averaged weights, drawn by all processes, against a reference.

They are the images of `generate.py` and the figures of `evaluate.py` for the checkpoint of that step.
"""

import contextlib
import dataclasses
import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from checkpoint import training_state
from common.errors import UserError
from common.files import DataError, write_json
from common.logging import warn
from common.sizes import format_sides, sides
from config.options import Architecture, GenerateConfig, TrainConfig
from config.score_options import ScoreOptions
from config.tool_options import MetricOptions
from flows import LossCondition, flow_of
from metrics.evaluation import HIGHER_IS_BETTER, check_names
from metrics.features import Batch
from metrics.images import open_images
from metrics.scoring import Scorer
from models.autoencoders import VAE
from models.vae import load_vae
from sampling.checks import check_budget, check_options
from sampling.conditions import DataPrompts
from sampling.images import images
from sampling.session import Session
from training.resume import format_option
from training.run_data import RunData
from training.run_dir import RunDir, warn_if_unwritable
from training.stats import sum_over_processes
from training.validation import together


def sampling_options(config: TrainConfig, budget: float | None, processes: int = 1) -> GenerateConfig:
    """The options of `generate.py` for the images of one budget (None: all latents, or a model without budgets)."""
    architecture = {f.name: getattr(config, f.name) for f in dataclasses.fields(Architecture)}
    return GenerateConfig(
        **architecture,
        num_steps=config.eval_num_steps,
        cfg_scale=config.eval_cfg_scale,
        class_labels=["balanced"],
        num_fid_samples=config.eval_samples,
        inference_budget=None if budget is None else str(budget),
        mixed_precision=config.mixed_precision,
        tf32=config.allow_tf32,
        vae=config.vae,
        per_proc_batch_size=min(32, max(1, config.batch_size // processes)),
        cuda_graphs=False,  # the weights change, and a signal is noticed between layers
    )


def metric_options(config: TrainConfig) -> MetricOptions:
    """The options of `evaluate.py`."""
    assert config.eval_ref is not None
    names = ("inception_weights", "dino_weights", "clip_weights", "clip_score")
    networks = {name: getattr(config, name) for name in names}
    return MetricOptions(ref=config.eval_ref, metrics=metrics_of(config), features=config.eval_features, **networks)


def metrics_of(config: TrainConfig) -> list[str]:
    """The metrics; a CLIP is one of them."""
    return list(dict.fromkeys([*config.eval_metrics, *["clip_score"] * bool(config.clip_score)]))


def budgets_of(config: TrainConfig) -> list[float | None]:
    """The budgets to draw at; [None] for all latents."""
    return list(config.eval_budgets) if config.eval_budgets else [None]


def check(config: TrainConfig) -> None:
    """Refuse options of scores that cannot work: nothing is loaded, and of the reference only what a file says of itself is read."""
    if not config.eval_steps:
        if config.keep_best:
            raise UserError("--keep-best: nothing is scored; give --eval-steps")
        return
    if config.eval_ref is None:
        raise UserError(f"--eval-steps {config.eval_steps}: needs --eval-ref, the reference that images are scored against")
    with _own_options():
        check_names(config.eval_metrics)
    for budget in budgets_of(config):
        options = sampling_options(config, budget)
        check_options(options)
        check_budget(options, "--eval-budgets", budget)
    flow_of(sampling_options(config, None)).check_sampling()
    try:
        ref = open_images(config.eval_ref)
    except UserError as error:
        raise UserError(f"--eval-ref {error}") from None
    if ref.count and ref.size != sides(config.resolution):
        raise UserError(
            f"--eval-ref {config.eval_ref}: has images of {format_sides(ref.size)} pixels; those of the run have "
            f"--resolution {config.resolution}"
        )


@contextlib.contextmanager
def _own_options() -> Iterator[None]:
    """Errors of `evaluate.py`'s functions name the options of train.py."""
    try:
        yield
    except UserError as error:
        message = str(error)
        for name in ("metrics", "features"):
            message = message.replace(f"--{name}", f"--eval-{name}")
        raise UserError(message, local=error.local) from None


def is_scored_at(step: int, config: TrainConfig, total_steps: int) -> bool:
    """Whether the options want scores of `step`: every so many, and of the last one."""
    return bool(config.eval_steps and step) and (step % config.eval_steps == 0 or step == total_steps)


def is_recorded(config: TrainConfig, run_dir: RunDir, step: int) -> bool:
    """Whether metrics.jsonl has the scores of `step`; the same in all processes."""
    is_there = run_dir.is_main and any(line["step"] == step and _decisive(config) in line for line in run_dir.read_metrics())
    return broadcast_object_list([is_there])[0]


def _decisive(config: TrainConfig) -> str:
    """The name in metrics.jsonl of the score that decides what is best."""
    return config.eval_metrics[0] + LossCondition(budgets_of(config)[0]).metric_suffix


class Scores:
    """Draws and scores while a run trains. Every process takes part in each call.

    The constructor loads VAE and networks, looks at the reference, and raises UserError where these do not fit.

    Attributes:
        best_step: the step with the best score so far, whose checkpoint --keep-best keeps; None without that, or before the first.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, run_dir: RunDir, data: RunData, vae: VAE | None = None):
        """vae: where it is loaded already."""
        self.config, self.accelerator, self.run_dir, self.shape = config, accelerator, run_dir, data.shape
        self.conditions = data.conditions
        self.vae = vae or load_vae(config.vae or data.record.vae, accelerator.device, expected=data.record)[0]
        size = sides(config.resolution)
        with _own_options():
            prompts = self.conditions.words if config.clip_score else None
            self.scorer = Scorer(metric_options(config), config.eval_samples, size, PartialState(), warn, prompts)
        self.scorer.look_at_reference()
        self._name, self._best, self._since = _decisive(config), None, 0

    @property
    def best_step(self) -> int | None:  # noqa: D102, see the class
        return self._best[0] if self._best and self.config.keep_best else None

    def score(self, model: nn.Module, step: int, should_stop: Callable[[], bool]) -> dict[str, float | None]:
        """Every metric at every budget, by name in metrics.jsonl; nothing off the main process. None for images that are not finite.

        Raises Interrupted, in every process, if `should_stop()` became true in one while images were drawn.
        """
        values: dict[str, float | None] = {}
        count = self.config.eval_samples
        for budget in budgets_of(self.config):
            suffix = LossCondition(budget).metric_suffix
            figures = None
            try:
                batches = self._batches(model, step, budget, should_stop)
                figures = self.scorer.score(batches, count, f"images of step {step}{suffix.replace('_', ' ')}")
            except UserError as error:  # the same in every process that draws, or in the one that computes
                if isinstance(error, DataError):  # met by one process, for which the others wait
                    raise
                warn(f"step {step} is not scored: {error}")
            if self.run_dir.is_main:
                values |= {metric + suffix: (figures or {}).get(metric) for metric in metrics_of(self.config)}
        return values

    def record_best(self, step: int, values: Mapping[str, float | None]) -> None:
        """best.json, where `step` with these scores is the best one."""
        value = values.get(self._name)
        if value is None or not math.isfinite(value) or (self._best is not None and not self._is_better(value, self._best[1])):
            return
        self._best = step, value
        self._write_best(values)

    def find_best(self, step: int) -> None:
        """Take up best.json where the run resumes, after `step`. Scores of other images or another reference are not compared."""
        if not self.run_dir.is_main:
            return
        path = self.run_dir.path / "best.json"
        is_same = True
        try:
            before = json.loads(path.read_bytes())
            is_same = {"clip_score": None} | before["settings"] == self._settings()  # an option newer than some files
            self._since = int(before["since"]) if is_same else step
        except (OSError, ValueError, LookupError, TypeError):  # none, or damaged
            pass
        for line in self.run_dir.read_metrics():
            if self._since < line["step"] <= step:
                self.record_best(line["step"], line)
        if self._best is None and is_same:  # the run goes back to before its first score
            path.unlink(missing_ok=True)

    def _batches(self, model: nn.Module, step: int, budget: float | None, should_stop: Callable[[], bool]) -> Iterator[Batch]:
        """This process's share of the images. All processes stop together where one was told to or failed."""
        accelerator, path = self.accelerator, training_state.step_path(self.run_dir.checkpoints, step)
        options = dataclasses.replace(sampling_options(self.config, budget, accelerator.num_processes), ckpt=str(path))
        session = Session(options, model, self.vae, None, self.shape, conditions=self.conditions)
        share = images(session, options, range(self.config.eval_samples), accelerator.process_index, accelerator.num_processes)
        while True:
            batch, problem = None, ""
            with together(accelerator, [model, self.vae], should_stop):
                try:
                    batch = next(share, None)
                except UserError as error:  # latents that are not finite
                    problem = str(error)
            failed = sum_over_processes(accelerator, torch.tensor(float(bool(problem)), device=accelerator.device))
            if failed > 0:
                raise UserError(problem or "another process drew images that are not finite")
            if batch is None:
                return
            yield batch

    def _is_better(self, value: float, than: float) -> bool:
        return value > than if self.config.eval_metrics[0] in HIGHER_IS_BETTER else value < than

    def _settings(self) -> dict[str, Any]:
        """What scores must share to be compared."""
        config = self.config
        own = {
            f.name: getattr(config, f.name)
            for f in dataclasses.fields(ScoreOptions)
            if f.name not in ("eval_steps", "keep_best")
        }
        return own | {"vae": config.vae, "mixed_precision": config.mixed_precision, "allow_tf32": config.allow_tf32}

    def _write_best(self, values: Mapping[str, Any]) -> None:
        assert self._best is not None
        step, value = self._best
        checkpoint = str(training_state.step_path(self.run_dir.checkpoints, step))
        scores = {name: v for name, v in values.items() if name.split("_budget_")[0] in metrics_of(self.config)}
        content = {"step": step, "checkpoint": checkpoint, "metric": self._name, "value": value, "scores": scores}
        content |= {"generate": self._command(checkpoint), "since": self._since, "settings": self._settings()}
        with warn_if_unwritable(self.run_dir.path / "best.json"):
            write_json(content, self.run_dir.path / "best.json")

    def _command(self, checkpoint: str) -> str:
        """The line that draws the images again."""
        options = sampling_options(self.config, budgets_of(self.config)[0])
        words = ["python", "generate.py", "--ckpt", checkpoint]
        for name in (
            "num_fid_samples",
            "class_labels",
            "num_steps",
            "cfg_scale",
            "inference_budget",
            "mixed_precision",
            "tf32",
            "vae",
        ):
            value = getattr(options, name)
            if name == "class_labels" and isinstance(self.conditions, DataPrompts):
                name, value = "prompts", self.conditions.data_dir
            if value is not None:
                words += [f"--{name.replace('_', '-')}", format_option(value)]
        return shlex.join(words)
