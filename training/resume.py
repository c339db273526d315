"""What a resumed run must share with the run that it resumes, and the checkpoint that it resumes from."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import models
from checkpoint import power_average, records, training_state
from checkpoint.architecture import DEPTHS, with_former_defaults
from checkpoint.weights import load_state_dict
from common.errors import UserError
from common.logging import warn
from config.options import TrainConfig
from config.rules import names
from flows import flow_of
from models.encoders import encoder_names
from training.data_order import DATA_POSITION, Progress, total_steps
from training.optim import EMA, depends_on_length
from training.run_data import RunData
from training.run_dir import RunDir

# What a resumed run must share with the run that it resumes, or it would silently be another one; …
SAME = names(TrainConfig, resume="same")


# … what the user may change on purpose, by --allow-change; …
CHANGEABLE = names(TrainConfig, resume="changeable", when=(None, "elit", "dfm", "repa"))


# … and what is to be named only where the learning rate depends on the number of steps.
LENGTH = names(TrainConfig, resume="changeable", when="schedule")


DATA_SIZE, DATA_LABELS = "data_size", "data_labels"  # no options, but changed by --data-dir; recorded in checkpoints


SMALL = 2**12  # bytes of a tensor that goes with the rest of a state


VALIDATION_DUE = "validation_due"  # in checkpoints: a signal came while their step was validated


ALLOWED = (*CHANGEABLE, *LENGTH, DATA_SIZE, DATA_LABELS)  # what --allow-change takes


def format_option(value: Any) -> str:
    """An option's value as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)


def load_state(run_dir: RunDir, resume_step: int, *, lazy: bool = False) -> dict[str, Any] | None:
    """The training state to resume from; None for a new run.

    Rank 0 alone reads and verifies the file. In the other processes tensors of more than `SMALL` bytes are on the meta device;
    `shared` brings them there. lazy: for a sharded run, of which each process reads its part, see `training_state.load`.
    """
    if not resume_step:
        return None
    state, problem = None, ""
    if run_dir.is_main:
        try:
            state = _read(run_dir.checkpoints, resume_step, lazy=lazy)
        except UserError as error:
            problem = str(error)
    outline = None if lazy else tree_map(lambda x: x.to("meta") if _is_large(x) else x, state)
    step, outline, problem = broadcast_object_list([state and state["step"], outline, problem])
    if problem:
        raise UserError(problem)
    if run_dir.is_main:
        return state
    if lazy and step is not None:
        path = training_state.step_path(run_dir.checkpoints, step)
        return _checked(training_state.load(path, lazy=True), path, lazy=True)
    return outline


def _read(folder: Path, step: int, *, lazy: bool) -> dict[str, Any] | None:
    """The checkpoint of a step in `folder`, checked; of -1 the newest that is whole, or None where there is none."""
    if step == -1:
        state = training_state.load_newest(folder, warn, lazy=lazy)
    else:
        state = training_state.load_step(folder, step, lazy=lazy)
    return state and _checked(state, training_state.step_path(folder, state["step"]), lazy=lazy)


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.nbytes > SMALL


def shared(part: Any, accelerator: Accelerator) -> Any:
    """A part of the state that `load_state` gave, with the tensors of rank 0 in every process; all of them take part."""
    if accelerator.num_processes == 1:
        return part

    def share(value: Any) -> Any:
        if not _is_large(value):
            return value
        at = {"dtype": value.dtype, "device": accelerator.device}
        tensor = torch.empty(value.shape, **at) if value.is_meta else value.contiguous().to(**at)
        torch.distributed.broadcast(tensor, 0)
        return tensor

    return tree_map(share, part)


def load_weights(model: nn.Module, ema: EMA, accelerator: Accelerator, state: dict[str, Any], where: Path) -> dict[str, Any]:
    """Take weights and averages of what `load_state` gave; returns it with the optimizer's state of rank 0 in every process."""
    model = accelerator.unwrap_model(model)
    for name in ema.names:  # one that is new starts from the weights, as in a new run
        load_state_dict(model, shared(state["ema"].get(name, state["model"]), accelerator), where)
        ema.assign(name, model)
    load_state_dict(model, shared(state["model"], accelerator), where)
    return state | {"optimizer": shared(state["optimizer"], accelerator)}


def _checked(state: dict[str, Any], path: Path, *, lazy: bool) -> dict[str, Any]:
    for name, kind in {DATA_SIZE: int, DATA_POSITION: int, VALIDATION_DUE: bool}.items():
        if name in state and (type(state[name]) is not kind or state[name] < 0):
            raise UserError(f"{path}: its {name} must be {'true or false' if kind is bool else 'a whole number'}")
    return records.check_training_state(state, path, lazy=lazy)


def with_recorded_split(config: TrainConfig, run_dir: RunDir) -> TrainConfig:
    """The options with head and tail depth of the run that is resumed, where none are given: defaults change over the years.

    Rank 0 alone reads. `check_same_run` compares them with the checkpoint that is taken in the end.
    """
    (depths,) = broadcast_object_list([_recorded_depths(config, run_dir) if run_dir.is_main else {}])
    return dataclasses.replace(config, **depths)


def _recorded_depths(config: TrainConfig, run_dir: RunDir) -> dict[str, int | None]:
    if not config.resume_step or None not in (config.head_depth, config.tail_depth):
        return {}
    steps = [config.resume_step] if config.resume_step > 0 else reversed(training_state.saved_steps(run_dir.checkpoints))
    for path in (training_state.step_path(run_dir.checkpoints, step) for step in steps):
        try:
            state = _checked(training_state.load(path, lazy=True), path, lazy=True)
        except UserError:  # which `load_state` reports
            continue
        recorded = with_former_defaults(state["config"], state["vae"])
        missing = {name: recorded.get(name) for name in DEPTHS if getattr(config, name) is None}
        return missing if recorded.get("model") == config.model else {}
    return {}


def check_same_run(config: TrainConfig, state: dict[str, Any], data: RunData, run_dir: RunDir) -> None:
    """Raise UserError where continuing from `state` with these options and data would silently be another run."""
    own, recorded = dataclasses.asdict(config), {"flip": False, **with_former_defaults(state["config"], state["vae"])}
    for name in (*SAME, *CHANGEABLE):
        if name in recorded and own[name] != recorded[name] and _acts(name, config):
            _refuse(config, name, f"was started with {format_option(recorded[name])}", run_dir, allowed=name in CHANGEABLE)
    if data.record != state["vae"]:
        raise UserError(f"--data-dir {config.data_dir}: its latents were made by another VAE than those of the run")
    if (text := data.text_record) is not None and state[records.TEXT] is not None:
        text.check_same(state[records.TEXT], f"--data-dir {config.data_dir}", f"the run in {run_dir.path}")
    for sigma in config.posthoc_ema:
        if power_average.name(sigma) not in state["ema"]:
            raise UserError(
                f"--posthoc-ema {sigma:g}: step {state['step']} of the run in {run_dir.path} holds no such average, which "
                "must follow every step from the first; leave it out, or start a new run"
            )
    _check_data(config, state, data, run_dir)
    _check_length(config, state, len(data.dataset), run_dir)


def _acts(name: str, config: TrainConfig) -> bool:
    """Whether the option acts in this run: an SiT takes no notice of ELIT's."""
    when = next(field.metadata["when"] for field in dataclasses.fields(config) if field.name == name)
    if when == "elit":
        return models.model_spec(config.model).elastic
    if when == "dfm":
        return hasattr(flow_of(config), name)
    return when != "repa" or bool(encoder_names(config.enc_type, config.proj_coeff))


def _refuse(config: TrainConfig, name: str, was: str, run_dir: RunDir, *, allowed: bool, value: str = "") -> None:
    if name in config.allow_change:
        return
    option = value or f"--{name.replace('_', '-')} {format_option(getattr(config, name))}:"
    hint = f" (--allow-change {name} continues all the same)" if allowed else ""
    raise UserError(f"{option} the run in {run_dir.path} {was}{hint}")


def _check_data(config: TrainConfig, state: dict[str, Any], data: RunData, run_dir: RunDir) -> None:
    size, now = state.get(DATA_SIZE, len(data.dataset)), len(data.dataset)
    if now != size:
        holds = f"--data-dir {config.data_dir}: holds {now} samples;"
        _refuse(config, DATA_SIZE, f"was started with {size}", run_dir, allowed=True, value=holds)
    elif state.get(DATA_LABELS, "") not in ("", data.labels_sha256):
        holds = f"--data-dir {config.data_dir}: its labels differ;"
        _refuse(config, DATA_LABELS, "was started with others", run_dir, allowed=True, value=holds)


def _check_length(config: TrainConfig, state: dict[str, Any], num_samples: int, run_dir: RunDir) -> None:
    """A schedule that ends at another step moves the learning rate at once."""
    before = TrainConfig(**state["config"])
    if not (depends_on_length(before) and depends_on_length(config)):
        return
    progress = Progress.of_state(state, num_samples)
    ends = total_steps(before, progress, progress.num_samples)
    now = total_steps(config, progress, num_samples)
    if ends == now:
        return
    for name in LENGTH:
        if getattr(before, name) != getattr(config, name):
            was = f"has a learning rate that ends its schedule at step {ends}, not {now}, and would change at once"
            _refuse(config, name, was, run_dir, allowed=True)
    warn(f"the schedule of the learning rate now ends at step {now}, not {ends}")
