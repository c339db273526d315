"""What a run is made of: option checks, accelerator, data, model."""

import dataclasses
import inspect
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from torch import nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

import models
from checkpoint import reading
from checkpoint.init_from import init_from
from checkpoint.weights import model_options
from common.distributed import check_world_size, wait_time
from common.errors import UserError, did_you_mean
from common.files import check_name
from common.precision import set_attention, set_deterministic, set_tf32, supported_precision
from common.sizes import latent_size
from config.options import TrainConfig
from data.remote import is_remote
from flows import flow_of
from models.backbone import Backbone
from models.elit import Elastic
from models.text_encoders import TextRecord
from models.vae import VAERecord
from training import alignment, scores, sharding, trackers
from training.budgets import check_budgets, trained_budgets
from training.profiler import parse_steps
from training.resume import ALLOWED
from training.run_data import RunData, takes_text

# The type that gradients are summed in over the processes → accelerate's hook of DDP for it.
COMM_HOOKS = {"fp32": DDPCommunicationHookType.NO, "bf16": DDPCommunicationHookType.BF16}


def token_grid(config: TrainConfig, record: VAERecord) -> tuple[int, int]:
    """(rows, columns) of the tokens that REPA reads."""
    with torch.device("meta"):
        return build_model(config, record, []).feature_grid


def build_model(config: TrainConfig, record: VAERecord, z_dims: list[int], text: TextRecord | None = None) -> Backbone:
    """The model that the options describe, on latents of the VAE `record` and `text` features, freshly initialised."""
    sizes = (text.length, text.width, text.pooled) if text else ()
    model = models.create_model(
        config.model,
        input_size=latent_size(config.resolution, record.downsample_factor),
        in_channels=record.latent_channels,
        num_classes=config.num_classes,
        fused_attn=config.fused_attn,
        encoder_depth=config.encoder_depth,
        z_dims=z_dims,
        arguments=models.model_spec(config.model).constructor.text_arguments(*sizes) if sizes else {},
        **model_options(dataclasses.asdict(config)),
    )
    if config.projector == "conv":
        model.convolve_projectors()
    if isinstance(model, Elastic) and config.elit_init == "spread":
        model.interface.spread()
    return model


def adapt_blocks(model: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Gradient checkpointing and compilation, in place."""
    if config.gradient_checkpointing:
        models.checkpoint_blocks(model)
    if device.type == "cuda" if config.compile is None else config.compile:
        models.compile_model(model)


def as_built(config: TrainConfig, model: Backbone, data: RunData) -> TrainConfig:
    """The options with what their defaults came to, to be recorded: the split of `model`, and whether `data` is flipped."""
    config = dataclasses.replace(config, flip=data.dataset.flip)
    if not isinstance(model, Elastic):
        return config
    return dataclasses.replace(config, head_depth=model.head_depth, tail_depth=model.tail_depth)


def init_weights(path: str, config: TrainConfig, model: nn.Module, is_main: bool) -> str:
    """The averaged weights of --init-from `path`, as far as they fit; returns what was done.

    Raises UserError, in every process, for a checkpoint that does not fit or is damaged.
    """
    weights = reading.read_weights(path, given={"resolution": config.resolution}, projectors=hasattr(model, "projectors"))
    problem: list[str | None] = [None]
    try:
        weights.check()
    except UserError as error:  # of rank 0, which alone has read all of the file
        problem = [str(error)]
    if message := broadcast_object_list(problem)[0]:
        raise UserError(message)
    made = init_from(weights, model, dataclasses.asdict(config), path)
    model.load_state_dict(made.state_dict, strict=False)
    if is_main:
        print(made.summary(), flush=True)
    return made.summary()


def check(config: TrainConfig, given: dict[str, Any]) -> list[str]:
    """Refuse what cannot work, before anything is loaded or written. Returns warnings; changes nothing.

    given: the options that the user gave, by name.
    """
    check_model(config)
    scores.check(config)
    check_name(config.exp_name, "--exp-name", plain=True)
    size = sharding.group_size(config.shard, config.plan_processes or sharding.launched_processes())
    if size > 1 and config.elit_budget_schedule is not None:
        raise UserError(
            f"--shard {config.shard}: --elit-budget-schedule gives each process forwards of its own, but sharded ones run "
            "together; leave one of the two out"
        )
    if config.profile_steps:
        parse_steps(config.profile_steps)
    for name in map(_option_name, config.allow_change):
        if name not in ALLOWED:
            known = ", ".join(ALLOWED)
            raise UserError(f"--allow-change {name}: cannot be changed{did_you_mean(name, ALLOWED)}; choose from {known}")
    warnings = trackers.check(config, given) + alignment.check(config, given)
    if config.cache_size is not None and not any(is_remote(d) for d in (config.data_dir, config.val_data_dir) if d):
        warnings.append(f"--cache-size {config.cache_size:g}: has no effect on local data")
    if "posthoc_ema_steps" in given and not config.posthoc_ema:
        warnings.append(f"--posthoc-ema-steps {config.posthoc_ema_steps} without --posthoc-ema: no such average is kept")
    spec = models.model_spec(config.model)
    if "head_depth" in spec.sizes and "encoder_depth" in given and config.head_depth is None:
        warnings.append(
            f"--encoder-depth {config.encoder_depth} is the block that REPA reads; the head of {config.model} has "
            f"{spec.sizes['head_depth']} blocks (the published code would take {config.encoder_depth}: "
            f"--head-depth {config.encoder_depth})"
        )
    if message := spec.wasted_saving(config.elit_group_size, trained_budgets(config)):
        warnings.append(message)
    return warnings


def ema_warnings(config: TrainConfig, total_steps: int) -> list[str]:
    """Warnings of averaged weights that still hold early ones at the end of the run."""
    return [
        f"--ema-decay {decay:g}: averages over about {round(1 / (1 - decay)):,} steps, but the run has {total_steps:,}; "
        f"its averaged weights lag behind (for a tenth of the run: {max(0.0, 1 - 10 / total_steps):.3g})"
        for decay in config.ema_decay
        if total_steps and 1 / (1 - decay) > total_steps
    ]


def check_model(config: TrainConfig) -> None:
    """Refuse options that contradict the model or its flow."""
    spec = models.model_spec(config.model)
    if config.condition == "text" and not spec.constructor.takes_text:
        raise UserError(f"--condition text: {config.model} is conditioned on class labels; MMDiT and U-ViT models take text")
    if config.condition == "labels" and spec.text:
        raise UserError(f"--condition labels: {config.model} is conditioned on text, the captions of --data-dir")
    if config.levels is not None and not spec.takes("levels"):
        raise UserError(f"--levels {config.levels}: {config.model} has no levels; only HDiT models do")
    check_budgets(config)
    flow_of(config).check_training()


def resolve(config: TrainConfig) -> TrainConfig:
    """The options as they act: one spelling of names, and the precision that this machine has (a plan is for another one)."""
    on_cpu = not torch.accelerator.is_available()
    precision = config.mixed_precision if config.plan else supported_precision(config.mixed_precision, on_cpu)
    names = [_option_name(name) for name in config.allow_change]
    name = models.model_spec(config.model).name  # the spelling that checkpoints record
    condition = "text" if takes_text(config) else "labels"
    return dataclasses.replace(config, condition=condition, model=name, allow_change=names, mixed_precision=precision)


def _option_name(given: str) -> str:
    return given.removeprefix("--").replace("-", "_")


@dataclass
class DDPOptions(DistributedDataParallelKwargs):
    """DDP's keyword arguments, with the one that PyTorch 2.13 has in place of `broadcast_buffers`."""

    forward_sync_buffers: bool | None = None

    @override
    def register_comm_hook(self, model: DistributedDataParallel) -> None:
        """As accelerate, but on any backend: PyTorch permits its own hook on CUDA alone."""
        if self.comm_hook == DDPCommunicationHookType.BF16:
            model.register_comm_hook(None, _sum_in_bf16)


def _sum_in_bf16(group: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    return bf16_compress_hook(group, bucket)


def ddp_options(config: TrainConfig) -> DDPOptions:
    """Buffers are fixed tables here, the same in every process: no forward needs to copy them."""
    is_new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    options = DDPOptions(
        gradient_as_bucket_view=True, bucket_cap_mb=config.bucket_cap_mb, comm_hook=COMM_HOOKS[config.comm_dtype]
    )
    setattr(options, "forward_sync_buffers" if is_new else "broadcast_buffers", False)
    return options


def process_wait(config: TrainConfig) -> timedelta:
    """How long processes wait for each other; one of them works out the scores."""
    return wait_time(config.timeout_minutes, alone=bool(config.eval_steps))


def create_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of this process. Raises UserError where accelerate's own configuration contradicts the options."""
    on_cpu = not torch.accelerator.is_available()  # several processes on a CPU must be told, or each trains alone
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=str(Path(config.output_dir) / config.exp_name / config.logging_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=process_wait(config))],
    )
    # Accelerate takes no subclass as an argument.
    accelerator.ddp_handler = ddp_options(config)  # pyright: ignore[reportAttributeAccessIssue]
    check_accelerator(accelerator, config)
    set_tf32(config.allow_tf32)
    if config.deterministic:
        set_deterministic()
    set_attention(config.cudnn_attn)
    return accelerator


def check_accelerator(accelerator: Accelerator, config: TrainConfig) -> None:
    """Refuse what accelerate's environment and configuration file would do behind the options' back."""
    check_world_size(accelerator.num_processes)
    for name in ("gradient_accumulation_steps", "mixed_precision"):
        theirs, ours = getattr(accelerator, name), getattr(config, name)
        if theirs != ours:
            raise UserError(
                f"ACCELERATE_{name.upper()}: accelerate's configuration says {theirs}, "
                f"but --{name.replace('_', '-')} {ours}; remove it there, and use the option"
            )
    plugin = accelerator.state.dynamo_plugin
    if plugin is not None and plugin.backend != DynamoBackend.NO:
        raise UserError(
            f"ACCELERATE_DYNAMO_BACKEND: accelerate's configuration says {plugin.backend.value.lower()}, which compiles the whole model; "
            "remove it there (--dynamo_backend no), and use --compile"
        )
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(f"accelerate's configuration says {kind.value}; train.py runs on one process or by DDP (--multi_gpu)")
