"""What a run is made of: option checks, accelerator, data, model."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

import models
from checkpoint import training_state
from checkpoint.weights import model_options
from common.errors import UserError, did_you_mean
from common.files import check_name
from config.options import TrainConfig
from data.dataset import LatentDataset, channel_record
from models.elit import mask_levels, mask_to_budget
from models.encoders import encoder_names
from models.vae import VAERecord
from samplers import check_schedule
from training.resume import CHANGEABLE, DATA_SIZE
from training.run_dir import warn


@dataclass(frozen=True)
class RunData:
    """The data of a run, found to fit the options."""

    dataset: LatentDataset
    held_out: LatentDataset | None
    record: VAERecord  # of the VAE, with what --latent-norm adds
    steps_per_epoch: int  # forwards: micro-steps
    total_steps: int


def open_data(config: TrainConfig, num_processes: int) -> RunData:
    """Training and held-out data. Raises UserError where they do not fit the options or each other."""
    if config.batch_size % num_processes:
        raise UserError(f"--batch-size {config.batch_size}: must be divisible by the {num_processes} processes")
    dataset = LatentDataset(
        config.data_dir, images=bool(encoder_names(config.enc_type, config.proj_coeff)), cache_dir=config.cache_dir
    )
    dataset.check(num_classes=config.num_classes, resolution=config.resolution)
    held_out = None
    if config.val_data_dir:
        held_out = LatentDataset(config.val_data_dir, cache_dir=config.cache_dir)
        held_out.check(num_classes=config.num_classes, resolution=config.resolution)
        if held_out.record != dataset.record:
            raise UserError(
                f"--val-data-dir {config.val_data_dir}: its latents were made by another VAE than those of --data-dir"
            )
    if len(dataset) < config.batch_size:
        raise UserError(f"--batch-size {config.batch_size}: more than the {len(dataset)} samples in {config.data_dir}")
    per_epoch = len(dataset) // config.batch_size
    total_steps = min(config.max_train_steps, config.epochs * per_epoch // config.gradient_accumulation_steps)
    if total_steps == 0:
        raise UserError(
            f"--epochs {config.epochs}: {config.epochs * per_epoch} batches are less than --gradient-accumulation-steps {config.gradient_accumulation_steps}"
        )
    record = channel_record(config.data_dir, dataset.latents) if config.latent_norm == "channel" else dataset.record
    return RunData(dataset, held_out, record, per_epoch, total_steps)


def token_grid(config: TrainConfig, record: VAERecord) -> tuple[int, int]:
    """(rows, columns) of the tokens that REPA reads."""
    with torch.device("meta"):
        return build_model(config, record, []).feature_grid


def build_model(config: TrainConfig, record: VAERecord, z_dims: list[int]) -> nn.Module:
    """The model that the options describe, on latents of the VAE `record`, freshly initialised."""
    return models.create_model(
        config.model,
        input_size=config.resolution // record.downsample_factor,
        in_channels=record.latent_channels,
        num_classes=config.num_classes,
        fused_attn=config.fused_attn,
        encoder_depth=config.encoder_depth,
        z_dims=z_dims,
        **model_options(dataclasses.asdict(config)),
    )


def trained_budgets(config: TrainConfig) -> list[float | None]:
    """The budgets that training draws from, the largest first; [None] for a model that has none."""
    if not models.model_spec(config.model).elastic:
        return [None]
    J = config.elit_group_size**2
    return [mask_to_budget(m, J) for m in mask_levels(J, config.elit_min_mask_prob, config.elit_max_mask_prob)]


def check_run_folder(config: TrainConfig) -> list[int]:
    """The steps of the checkpoints in the run's folder. Raises UserError where --resume-step does not fit them."""
    run_dir = Path(config.output_dir) / config.exp_name
    steps = training_state.saved_steps(run_dir / "checkpoints")
    if config.resume_step == 0 and steps:
        raise UserError(
            f"{run_dir}: already holds checkpoints (newest: step {steps[-1]}); use --resume-step -1 to go on, or another --exp-name"
        )
    if config.resume_step > 0 and config.resume_step not in steps:
        raise UserError(
            f"--resume-step {config.resume_step}: no such checkpoint in {run_dir / 'checkpoints'}; there are: {', '.join(map(str, steps)) or 'none'}"
        )
    return steps


def check(config: TrainConfig, given: dict) -> None:
    """Refuse what cannot work, before anything is loaded or written."""
    spec = models.model_spec(config.model)
    if spec.text:
        raise UserError(
            f"--model {config.model}: is conditioned on text, which arrives with captions; training takes class labels"
        )
    masks = [config.elit_min_mask_prob, config.elit_max_mask_prob]
    if not spec.elastic and any(masks):
        raise UserError(f"--elit-max-mask-prob: {config.model} has no latents to mask; only ELIT models do")
    if spec.elastic:
        mask_levels(config.elit_group_size**2, *masks)
        if trained_budgets(config)[-1] * config.elit_group_size**2 < spec.merged_latents - 1e-6:
            least = f"{spec.merged_latents}/{config.elit_group_size**2}"
            warn(
                f"budgets below {least} cost {config.model} no less in its inner blocks, which merge {spec.merged_latents} latents"
            )
    if spec.staged:
        check_stages(config)
        if config.time_shift != 1:
            raise UserError(
                f"--time-shift {config.time_shift:g}: {config.model} has times of its own for each stage; only 1 works"
            )
    check_name(config.exp_name, "--exp-name", plain=True)
    if config.enc_type != "none" and not encoder_names(config.enc_type, config.proj_coeff):
        warn(f"--enc-type {config.enc_type} without --proj-coeff: REPA is off")
    config.allow_change = [name.removeprefix("--").replace("-", "_") for name in config.allow_change]
    for name in config.allow_change:
        if name not in (known := (*CHANGEABLE, DATA_SIZE)):
            raise UserError(
                f"--allow-change {name}: cannot be changed{did_you_mean(name, known)}; choose from {', '.join(known)}"
            )
    if config.legacy:
        warn("--legacy has no effect")
    if "head_depth" in spec.sizes and "encoder_depth" in given and config.head_depth is None:
        head = spec.sizes["head_depth"]
        warn(
            f"--encoder-depth {config.encoder_depth} is the block that REPA reads; the head of {config.model} has {head} blocks "
            f"(the published code would take {config.encoder_depth}: --head-depth {config.encoder_depth})"
        )
    if config.mixed_precision == "fp16" and not config.plan and not torch.accelerator.is_available():
        warn("--mixed-precision fp16 needs a GPU; running as no")
        config.mixed_precision = "no"


def check_stages(config: TrainConfig) -> None:
    """Refuse weights and a schedule that do not fit DFM's stages."""
    weights = config.stage_weights
    said = f"--stage-weights {' '.join(f'{w:g}' for w in weights)}"
    if len(weights) != config.stages_count:
        raise UserError(f"{said}: {config.stages_count} stages need {config.stages_count} weights")
    if abs(sum(weights) - 1) > 1e-6 or min(weights) < 0:
        raise UserError(f"{said}: must be probabilities that sum to 1, not {sum(weights):g}")
    check_schedule(config.num_steps_per_scale, config.stage_sampling_thresholds, config.stages_count)


def create_accelerator(config: TrainConfig) -> Accelerator:
    on_cpu = not torch.accelerator.is_available()  # several processes on a CPU must be told, or each trains alone
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=str(Path(config.output_dir) / config.exp_name / config.logging_dir),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=models.model_spec(config.model).staged,  # the final layers of DFM's later stages
            )
        ],
    )
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != accelerator.num_processes:
        raise UserError(
            f"WORLD_SIZE is {world}, but accelerate runs {accelerator.num_processes} process(es); start with torchrun --nproc_per_node {world}"
        )
    if config.allow_tf32:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def wandb_mode() -> str:
    """online, or offline with a warning where nobody is logged in."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import wandb

    if wandb.api.api_key:
        return "online"
    warn("wandb has no login: writing offline (wandb login, then wandb sync, uploads it)")
    return "offline"
