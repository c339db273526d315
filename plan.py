"""What a training run is made of, worked out before it starts; and `train.py --plan`, which prints and checks it.

Nothing here needs an accelerator or the memory of the model: costs are counted on the meta device and on fake tensors.
"""

import contextlib
import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import models
from config import TrainConfig
from data import LatentDataset, channel_record
from encoders import TargetEncoder, describe_encoders, encoder_names, load_encoders
from errors import UserError
from loss import Projecting, alignment_loss, velocity_loss
from models.costs import mean_forward_flops, projector_flops
from models.elit import mask_levels, mask_to_budget
from randomness import Draws
from transfer import transfer
from vae import SD_VAE, VAERecord, load_vae

SAMPLES_READ = 64  # by --plan, evenly spread
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GIB = 2**30

# ----------------------------------------------------------------------------------------------- what a run is made of


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
    """(rows, columns) of the model's tokens."""
    side = config.resolution // record.downsample_factor // models.model_spec(config.model).sizes["patch_size"]
    return side, side


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
        **checkpoint.model_options(dataclasses.asdict(config)),
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
    steps = checkpoint.saved_steps(run_dir / "checkpoints")
    if config.resume_step == 0 and steps:
        raise UserError(
            f"{run_dir}: already holds checkpoints (newest: step {steps[-1]}); use --resume-step -1 to go on, or another --exp-name"
        )
    if config.resume_step > 0 and config.resume_step not in steps:
        raise UserError(
            f"--resume-step {config.resume_step}: no such checkpoint in {run_dir / 'checkpoints'}; there are: {', '.join(map(str, steps)) or 'none'}"
        )
    return steps


# --------------------------------------------------------------------------------------------------------------- costs


def encoder_flops(encoder: TargetEncoder) -> int:
    """FLOPs of one image's features; the encoder is on the meta device."""
    with FlopCounterMode(display=False) as counter:
        encoder.features(torch.empty(1, 3, encoder.side, encoder.side, device="meta"))
    return counter.get_total_flops()


@dataclass(frozen=True)
class StateBytes:
    """What a model's training state takes, in bytes."""

    weights: int  # and fixed tables
    gradients: int
    optimizer: int
    ema: int  # all copies


def state_bytes(model: nn.Module, ema_copies: int) -> StateBytes:
    """The exact sizes of a run's tensors; all are float32."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    tables = sum(b.numel() * b.element_size() for b in model.buffers())
    steps = 4 * len(list(model.parameters()))  # AdamW counts them for each tensor
    return StateBytes(size + tables, size, 2 * size + steps, ema_copies * (size + tables))


def activation_bytes(
    config: TrainConfig, record: VAERecord, encoders: list[TargetEncoder], batch_size: int, budget: float | None
) -> int:
    """What autograd keeps of one forward of `batch_size` images for the backward pass, parameters not counted.

    A step on fake tensors, which have sizes but no memory: what would be saved is counted, each storage once. Under
    autocast that includes the parameters' copies in half precision. With gradient checkpointing it is what the forward keeps,
    the blocks' inputs among it, and one block computed again.
    """
    saved: dict[int, torch.UntypedStorage] = {}
    block_inputs: list[tuple[nn.Module, tuple[torch.Tensor, ...]]] = []
    with FakeTensorMode():
        model = build_model(config, record, [e.z_dim for e in encoders])
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        side = config.resolution // record.downsample_factor
        shape = (record.latent_channels, side, side)
        staged = getattr(model, "stage_shapes", [shape])
        x, noise, *coarse = (torch.empty(batch_size, *s) for s in (shape, shape, *staged[:-1]))
        t, y = torch.empty(batch_size), torch.empty(batch_size, dtype=torch.long)
        draws = Draws(x, noise, t, t, t, 0.0, 0.0, coarse, torch.empty(batch_size, len(staged)))

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage
            return tensor

        if config.gradient_checkpointing:
            models.checkpoint_blocks(model)
            for block in model.blocks:
                block.register_forward_pre_hook(lambda block, inputs: block_inputs.append((block, inputs)))
        arguments = {} if budget is None else {"inference_budget": budget}
        if coarse:
            arguments["active_stage"] = len(coarse)  # the last one, whose loss takes the others' too
        call = Projecting(model) if encoders else model
        dtype = DTYPES[config.mixed_precision]
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                losses = velocity_loss(call, x, draws, y, weighting=config.weighting, path_type=config.path_type, **arguments)
            if encoders:
                features = [torch.empty(p.shape, dtype=dtype) for p in call.projections]
                losses = losses + alignment_loss(call.projections, features)
            for _, inputs in block_inputs:
                for tensor in inputs:
                    keep(tensor)
            if block_inputs:
                block, inputs = max(block_inputs, key=lambda found: found[1][0].numel())
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    _ = type(block).forward(block, *inputs)
        return sum(storage.nbytes() for storage in saved.values())


# ---------------------------------------------------------------------------------------------------------------- plan


class Plan:
    """`train.py --plan`: the account of a run and every mistake in it, found without training or writing anything."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.processes = config.plan_processes or int(os.environ.get("WORLD_SIZE", 1))
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.data: RunData | None = None
        self.record = SD_VAE  # where the data do not tell
        self.encoders: list[TargetEncoder] = []
        with self.checked():
            self.data = open_data(config, self.processes)
            self.record = self.data.record
        with self.checked():
            names = encoder_names(config.enc_type, config.proj_coeff)
            self.encoders = describe_encoders(names, config.resolution, token_grid(config, self.record))
        self.budgets = trained_budgets(config)
        with torch.device("meta"):
            self.model = build_model(config, self.record, [e.z_dim for e in self.encoders])

    @contextlib.contextmanager
    def checked(self) -> Iterator[None]:
        """A mistake met inside is kept, and the plan goes on."""
        try:
            yield
        except UserError as error:
            self.errors.append(str(error))

    def say(self, title: str, text: str) -> None:
        self.lines.append(f"{title:<12}{text}")

    def run(self) -> str:
        """The whole account, as text. Raises UserError, after printing it, if the run could not be carried out."""
        self.describe_model()
        self.describe_data()
        self.describe_memory()
        self.describe_outputs()
        self.describe_parts()
        print("\n".join(self.lines), flush=True)
        if self.errors:
            raise UserError("; also: ".join(self.errors))
        return "\n".join(self.lines)

    def describe_model(self) -> None:
        config, model = self.config, self.model
        parameters = sum(p.numel() for p in model.parameters())
        budgets = ""
        if self.budgets != [None]:
            few = [f"{b:g}" for b in self.budgets]
            budgets = f", trained at budget{'s' * (len(few) > 1)} {' … '.join(dict.fromkeys([few[0], few[-1]]))}"
        self.say("model", f"{config.model}: {parameters:,} parameters, {math.prod(model.grid_size)} tokens{budgets}")
        images = config.batch_size * config.gradient_accumulation_steps
        forward = mean_forward_flops(model, self.budgets) + projector_flops(model)
        self.flops = 3 * forward * images  # the backward pass is two forwards
        text = f"{_tera(self.flops)} TFLOPs per iteration, forward and backward of {images} images"
        if self.encoders:
            targets = images * sum(encoder_flops(e) for e in self.encoders)
            self.flops += targets
            text += f", {_tera(targets)} of them in the encoders"
        self.say("compute", text)

    def describe_data(self) -> None:
        config, data = self.config, self.data
        if config.batch_size % self.processes == 0:
            images, local = config.batch_size * config.gradient_accumulation_steps, config.batch_size // self.processes
            self.say("batch", f"{images} = {self.processes} processes × {local} × {config.gradient_accumulation_steps}")
        if data is None:
            return
        C, h, w = self.record.latent_channels, *data.dataset.shape[1:]
        with self.checked():
            count = len(data.dataset)
            for i in np.linspace(0, count - 1, min(count, SAMPLES_READ)).astype(int).tolist():
                data.dataset[i]
        classes = "unlabelled" if data.dataset.labels is None else f"{len(np.unique(data.dataset.labels))} classes"
        images = " and images" if self.encoders else ""
        self.say(
            "data", f"{config.data_dir}: {count:,} samples, {classes}; latents {C} × {h} × {w} of {self.record.vae}{images}"
        )
        if data.held_out is not None:
            self.say("held out", f"{config.val_data_dir}: {len(data.held_out):,} samples")
        per_epoch = data.steps_per_epoch / config.gradient_accumulation_steps
        epochs = data.total_steps / per_epoch
        self.say("steps", f"{data.total_steps:,} at {per_epoch:,.6g} per epoch: {epochs:,.4g} epochs")
        if config.plan_tflops:
            seconds = self.flops * data.total_steps / (config.plan_tflops * 1e12 * self.processes)
            each = self.flops / (config.plan_tflops * 1e12 * self.processes)
            rate = config.batch_size * config.gradient_accumulation_steps / each
            self.say(
                "time",
                f"{_duration(seconds)} at {config.plan_tflops:g} TFLOP/s per process: {each:.3g} s per step, {rate:,.0f} images/s",
            )
        else:
            self.say("time", "--plan-tflops N tells it for N TFLOP/s per process")

    def describe_memory(self) -> None:
        config = self.config
        state = state_bytes(self.model, len(config.ema_decay))
        local = max(1, config.batch_size // self.processes)
        ends = sorted(set(self.budgets[:1] + self.budgets[-1:]), key=lambda b: -(b or 1))
        activations = [activation_bytes(config, self.record, self.encoders, local, b) for b in ends]
        encoders = sum(p.numel() * p.element_size() for e in self.encoders for p in e.parameters())
        total = state.weights + state.gradients + state.optimizer + state.ema + activations[0] + encoders
        self.say(
            "memory", f"{_gib(total)} per process and {local} images, {config.mixed_precision}; kernels' workspace not counted"
        )
        names = {"weights": state.weights, "gradients": state.gradients, "AdamW": state.optimizer, "EMA": state.ema}
        if encoders:
            names["encoders"] = encoders
        for name, size in names.items():
            self.say("", f"{name:<12}{_gib(size)}")
        at = [f"{_gib(size)}{'' if b is None else f' at budget {b:g}'}" for b, size in zip(ends, activations, strict=True)]
        self.say("", f"{'activations':<12}{', '.join(at)}")
        if torch.cuda.is_available():
            available = torch.cuda.get_device_properties(0).total_memory
            if total > available:
                self.errors.append(
                    f"--batch-size {config.batch_size}: {_gib(total)} per process, but {torch.cuda.get_device_name(0)} has {_gib(available)}"
                )
        self.checkpoint_bytes = state.weights + state.optimizer + state.ema

    def describe_outputs(self) -> None:
        config = self.config
        run_dir = Path(config.output_dir) / config.exp_name
        steps: list[int] = []
        with self.checked():
            steps = check_run_folder(config)
        begin = ""
        if steps and config.resume_step:
            begin = f", goes on from step {steps[-1] if config.resume_step == -1 else config.resume_step}"
        existing = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                free = shutil.disk_usage(existing).free
        except OSError as error:
            self.errors.append(f"--output-dir {config.output_dir}: cannot write {existing}: {error.strerror}")
            return
        text = f"{run_dir}{begin}"
        if self.data is not None:
            count = self.checkpoints_kept(self.data.total_steps)
            need = count * self.checkpoint_bytes
            text += f": {count} checkpoints of {_gib(self.checkpoint_bytes)} = {_gib(need)}; {_gib(free)} free"
            if need > free:
                self.errors.append(
                    f"--output-dir {config.output_dir}: {count} checkpoints of {_gib(self.checkpoint_bytes)} need {_gib(need)}, but {_gib(free)} are free (--checkpointing-steps, --keep-last)"
                )
        self.say("outputs", text)

    def checkpoints_kept(self, total_steps: int) -> int:
        """The most that lie in the folder at one time: by --keep-last and --keep-every, and the one being written."""
        config = self.config
        steps = [*range(config.checkpointing_steps, total_steps, config.checkpointing_steps), total_steps]
        if not config.keep_last:
            return len(steps)
        old = steps[: -config.keep_last]
        return min(len(steps), config.keep_last + 1 + sum(config.keep_every > 0 and s % config.keep_every == 0 for s in old))

    def describe_parts(self) -> None:
        """What a run uses beside the data: the VAE of its pictures, REPA's encoders, the checkpoint that it starts from."""
        config = self.config
        if config.sampling_steps:
            name = config.vae or self.record.vae
            try:
                load_vae(name, expected=self.record)
                self.say("pictures", f"every {config.sampling_steps:,} steps, by the VAE {name}")
            except UserError as error:
                if config.vae:
                    self.errors.append(str(error))
                else:
                    self.say("pictures", f"none: {error}")
        if self.encoders:
            with self.checked():
                names = [e.name for e in self.encoders]
                load_encoders(names, config.resolution, self.model.grid_size, config.encoder_weights)
                sides = ", ".join(f"{e.name} at {e.side} px" for e in self.encoders)
                self.say("REPA", f"{sides}; weight {config.proj_coeff:g}")
        if config.init_from:
            with self.checked():
                found = checkpoint.read_weights(
                    config.init_from, given={"resolution": config.resolution}, projectors=bool(self.encoders)
                )
                found.check()
                made = transfer(found, self.model, dataclasses.asdict(config), config.init_from)
                self.lines.append(made.summary())


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.1f}" if flops >= 1e13 else f"{flops / 1e12:.3g}"


def _gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.3g} MiB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"
