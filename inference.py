"""From options to images and what they cost: what generation and the inference tools share."""

import json
import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import models
from config import Architecture, CCFGConfig, GenerateConfig, InferenceTool, MultibudgetConfig, parse, require
from errors import UserError
from models.dfm import recompose
from models.elit import budget_to_k
from randomness import image_noise, moved, pyramid_noise, sde_noise
from samplers import (
    BudgetSchedule,
    Guidance,
    OnStage,
    check_schedule,
    dfm_sampler,
    dfm_schedule,
    euler_maruyama_sampler,
    euler_sampler,
    evaluation_times,
    guided_velocities,
    guided_velocity,
    parse_budget,
)
from vae import decode, load_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Options = GenerateConfig | InferenceTool
Run = list[tuple[float | None, ...]]  # the budgets of the passes of each velocity evaluation
Job = TypeVar("Job", bound=Hashable)

# ---------------------------------------------------------------------------------------------------------- options


def from_command_line(cls: type, argv: list[str] | None, prog: str) -> tuple[Any, dict[str, Any], checkpoint.Weights]:
    """The options of a script that takes `--ckpt`, with its architecture filled in; those given by hand; and the weights."""
    config, given = parse(cls, argv, prog=prog)
    require(config, "ckpt")
    found = checkpoint.read_weights(config.ckpt, config.weights, given)
    settle_architecture(config, given, found, config.ckpt)
    return config, given, found


def settle_architecture(config: Architecture, given: dict, found: checkpoint.Weights, where: str | Path) -> None:
    """Take the architecture from the checkpoint `where`; what is given by hand fills gaps in it and may not contradict it."""
    recorded = found.config
    if recorded.get("model"):  # the depths that "by size" stands for
        recorded = {k: v for k, v in models.model_spec(recorded["model"]).sizes.items() if k.endswith("_depth")} | {
            k: v for k, v in recorded.items() if v is not None
        }
    for name in ("model", "resolution", "num_classes", "path_type", "time_shift", *checkpoint.MODEL_OPTIONS):
        if name in given and recorded.get(name) is not None and given[name] not in (None, recorded[name]):
            raise UserError(f"--{name.replace('_', '-')} {given[name]} contradicts {where}, which records {recorded[name]}")
        value = recorded.get(name, getattr(config, name))
        setattr(config, name, value)
        found.config[name] = value
    for name in (
        "num_steps_per_scale",
        "stage_sampling_thresholds",
    ):  # how the model was made to be sampled, if nothing else is asked
        if name not in given and recorded.get(name):
            setattr(config, name, recorded[name])
    found.config["fused_attn"] = config.fused_attn
    if config.model is None:
        raise UserError(f"{where}: the checkpoint records no model; give --model")


def check_sampler(config: Options) -> None:
    """Refuse a sampler that does not exist."""
    if config.heun and config.mode == "sde":
        raise UserError("--heun: Heun's correction belongs to --mode ode")
    if models.model_spec(config.model).staged:
        if config.heun or config.mode == "sde":
            option = "--heun" if config.heun else "--mode sde"
            raise UserError(f"{option}: {config.model} is sampled stage by stage with Euler steps; it has neither Heun nor SDE")
        check_schedule(config.num_steps_per_scale, config.stage_sampling_thresholds, config.stages_count)


def check_elit(config: Options) -> None:
    """Refuse a model without budgets."""
    if not models.model_spec(config.model).elastic:
        raise UserError(f"--ckpt {config.ckpt}: holds a {config.model}, which has no budget; only ELIT models do")


def check_labels(config: Options, option: str, labels: Sequence[int]) -> None:
    """Refuse class ids that the model does not know."""
    for label in labels:
        if label >= config.num_classes:
            raise UserError(f"{option} {label}: class ids of this model lie below {config.num_classes}")


def check_budget(config: Options, option: str, value: str | float | None) -> None:
    """Refuse a budget, or a schedule of budgets, that the model cannot run at."""
    if value is None:
        return
    if not models.model_spec(config.model).elastic:
        raise UserError(f"{option} {value}: {config.model} has no budget; only ELIT models do")
    J = config.elit_group_size**2
    try:
        budget = parse_budget(value)
    except UserError as error:
        raise UserError(f"{option}: {error}") from None
    for piece in [b for b, *_ in budget.pieces] if isinstance(budget, BudgetSchedule) else [budget]:
        try:
            budget_to_k(piece, J)
        except UserError as error:
            raise UserError(f"{option}: {error}; valid values: {', '.join(f'{b:g}' for b in all_budgets(J))}") from None


def check_folder(option: str, folder: str | Path) -> None:
    """Refuse a folder that cannot be made or written to."""
    there = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{option} {folder}: cannot write there: {there} is no folder that can be written to")


def all_budgets(J: int) -> list[float]:
    """Every budget of a model with J latents per group: k/J, k = 1 … J."""
    return [k / J for k in range(1, J + 1)]


def guidance(config: Options, **changes) -> Guidance:
    """The guidance that the options ask for; `changes` are fields of `Guidance` that go before them."""
    asked = {name: getattr(config, name) for name in Guidance._fields if name not in changes} | changes
    return Guidance(**asked | {"inference_budget": parse_budget(asked["inference_budget"])})


# ------------------------------------------------------------------------------------------------------------ images


def device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """For people: the GPU's name, or how many threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"CPU with {count} thread{'s' if count > 1 else ''}" if device.type == "cpu" else device.type


def set_precision(config: Options, device: torch.device, warn: Callable[[str], None]) -> None:
    """Apply `tf32`; on a CPU, where there is no fp16, change `mixed_precision` to no with a warning."""
    if device.type == "cpu" and config.mixed_precision == "fp16":
        config.mixed_precision = "no"
        warn("--mixed-precision fp16 needs a GPU; running as no")
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.tf32


def autocast(config: Options, device: torch.device) -> AbstractContextManager:
    """The context of the model's forward passes: automatic mixed precision where it is asked for."""
    dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def load(
    config: Options, found: checkpoint.Weights, device: torch.device
) -> tuple[nn.Module, "AutoencoderKL", tuple[int, int, int]]:
    """Model (compiled where that is asked for) and VAE on `device`, and the shape (C, h, w) of the VAE latents."""
    vae, _ = load_vae(config.vae or found.record.vae, device, expected=found.record)  # meanwhile the checkpoint is hashed
    model = checkpoint.build_model(found, config.ckpt, device)
    if config.compile:
        models.compile_model(model)
    side = config.resolution // found.record.downsample_factor
    return model, vae, (found.record.latent_channels, side, side)


def open_tool(
    config: MultibudgetConfig | CCFGConfig, found: checkpoint.Weights, warn: Callable[[str], None]
) -> tuple[nn.Module, "AutoencoderKL", tuple[int, int, int], Path]:
    """What both inference tools start with: `load` on this machine's device, and the folder of the results, made."""
    where = device()
    set_precision(config, where, warn)
    model, vae, shape = load(config, found, where)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return model, vae, shape, folder


def sample(
    config: Options,
    g: Guidance,
    model: nn.Module,
    shape: Sequence[int],
    seed: int,
    indices: Sequence[int],
    y: Tensor,
    on_stage: OnStage | None = None,
) -> Tensor:
    """Scaled VAE latents (B, C, h, w), float64, of the images `indices` with labels y (B,).

    All noise of image i comes from (seed, i), whatever the budget, guidance and batch. shape: (C, h, w). on_stage: see
    `samplers.dfm_sampler`.
    """
    device = next(model.parameters()).device
    noise, y = starting_noise(model, shape, seed, indices), moved(y, device)
    options = g._asdict() | {"path_type": config.path_type}
    with autocast(config, device):
        if isinstance(noise, list):
            options |= {k: getattr(config, k) for k in ("num_steps_per_scale", "stage_sampling_thresholds")}
            return recompose(dfm_sampler(model, noise, y, on_stage=on_stage, **options))
        options |= {"num_steps": config.num_steps, "time_shift": config.time_shift}
        if config.mode == "sde":
            return euler_maruyama_sampler(model, noise, y, noise=partial(_noise_of_step, seed, indices), **options)
        return euler_sampler(model, noise, y, heun=config.heun, **options)


def starting_noise(model: nn.Module, shape: Sequence[int], seed: int, indices: Sequence[int]) -> Tensor | list[Tensor]:
    """The noise that the images `indices` start from, on the model's device: (B, C, h, w), or for DFM a list, one per stage."""
    device = next(model.parameters()).device
    if hasattr(model, "stage_shapes"):
        return [moved(x, device) for x in pyramid_noise(seed, indices, model.stage_shapes)]
    return moved(image_noise(seed, indices, shape), device)


def one_forward(model: nn.Module, noise: Tensor | list[Tensor], y: Tensor, budget: float) -> None:
    """A forward pass to be timed, of all stages where there are any."""
    t = torch.full((len(y), len(noise)) if isinstance(noise, list) else (len(y),), 0.5, device=y.device)
    model(noise, t, y, inference_budget=budget)


def one_evaluation(model: nn.Module, noise: Tensor | list[Tensor], times: tuple[float, ...], y: Tensor, g: Guidance) -> None:
    """A velocity evaluation to be timed, guidance included; times: an entry of `evaluations`."""
    if isinstance(noise, list):
        waiting = (1.0,) * (len(noise) - len(times))
        guided_velocities(model, [x.double() for x in noise], times + waiting, len(times) - 1, y, g)
    else:
        guided_velocity(model, noise.double(), *times, y, g)


def sample_all(
    config: InferenceTool, g: Guidance, model: nn.Module, vae: "AutoencoderKL", shape: Sequence[int]
) -> tuple[Tensor, np.ndarray]:
    """One image of each class label, in batches: latents (n, C, h, w), and the decoded images as uint8 (n, H, W, 3)."""
    latents, images = [], []
    for first in range(0, len(config.class_label), config.per_proc_batch_size):
        labels = torch.tensor(config.class_label[first : first + config.per_proc_batch_size])
        latents.append(sample(config, g, model, shape, config.seed, range(first, first + len(labels)), labels))
        images.append(decode(vae, latents[-1]).permute(0, 2, 3, 1).cpu().numpy())
    return torch.cat(latents), np.concatenate(images)


def _noise_of_step(seed: int, indices: Sequence[int], step: int, shape: torch.Size) -> Tensor:
    return sde_noise(seed, indices, step, shape[1:])


# -------------------------------------------------------------------------------------------------------------- cost


def evaluations(config: Options) -> list[tuple[float, ...]]:
    """The time of each velocity evaluation of a run; for DFM the times of the stages up to the active one."""
    if models.model_spec(config.model).staged:
        phases = dfm_schedule(config.num_steps_per_scale, config.stage_sampling_thresholds)
        return [times[: phase.active_stage + 1] for phase in phases for times in phase.times[:-1]]
    return [(t,) for t in evaluation_times(config.num_steps, config.mode, config.heun, config.time_shift)]


def steps_of_run(config: Options) -> int:
    """The sampler's steps."""
    return sum(config.num_steps_per_scale) if models.model_spec(config.model).staged else config.num_steps


def passes_of_run(config: Options, g: Guidance) -> Run:
    """The budgets of the forward passes of each velocity evaluation of a run, the conditional pass first."""
    return [tuple(g.passes(*times)) for times in evaluations(config)]


def pass_flops(model: nn.Module, runs: Iterable[Run]) -> dict[float | None, int]:
    """Budget → FLOPs of one forward of one image, for every budget in the runs."""
    return {b: models.count_flops(model, b) for b in {b for run in runs for passes in run for b in passes}}


def flops_per_step(config: Options, run: Run, flops: Mapping[float | None, int]) -> float:
    """FLOPs of one image's velocity evaluations, per step of the sampler: guiding passes, schedule and Heun's counted in."""
    return sum(flops[b] for passes in run for b in passes) / steps_of_run(config)


def mean_flops_per_step(config: Options, g: Guidance, model: nn.Module) -> float:
    """`flops_per_step` of the run with guidance g."""
    run = passes_of_run(config, g)
    return flops_per_step(config, run, pass_flops(model, [run]))


WARM_UP, LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 2, 5, 25, 30


def interleaved_times(jobs: Mapping[Job, Callable[[], object]], device: torch.device) -> dict[Job, tuple[float, float, float]]:
    """Wall time of each job in milliseconds: (lower quartile, median, upper quartile).

    The jobs take turns, so that a busy spell of the machine falls on all alike: after `WARM_UP` rounds that do not count,
    `MOST_ROUNDS` rounds, or fewer (at least `LEAST_ROUNDS`) where they would take more than `SECONDS`. The device is
    synchronised before and after each job.
    """
    times: dict[Job, list[float]] = {name: [] for name in jobs}
    start = time.perf_counter()
    for turn in range(-WARM_UP, MOST_ROUNDS):
        if turn >= LEAST_ROUNDS and time.perf_counter() - start > SECONDS:
            break
        for name, job in jobs.items():
            _synchronize(device)
            begin = time.perf_counter()
            job()
            _synchronize(device)
            if turn >= 0:
                times[name].append(1000 * (time.perf_counter() - begin))
    return {name: tuple(statistics.quantiles(t, n=4, method="inclusive")) for name, t in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def write_json(values: object, path: str | Path) -> None:
    """A JSON file, written aside and then renamed."""
    aside = Path(path).with_suffix(".json.tmp")
    aside.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
    aside.replace(path)
