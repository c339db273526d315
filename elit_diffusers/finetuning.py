"""Fine-tuning of an interface around a pretrained transformer (ELIT §4.4): rectified flow + λ × the distance to the original."""

import copy
import dataclasses
import importlib
import json
import math
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType
from torch import Tensor, nn

from common import tensor_files
from common.distributed import check_world_size
from common.errors import UserError, first_line
from common.files import FolderLock, make_folder, remove_leftovers, written_aside
from common.hub import local_folder
from common.logging import warn
from common.precision import set_tf32
from config.rules import names
from config.tool_options import FinetuneDiffusersConfig
from elit_diffusers.attach import attach
from elit_diffusers.families import FAMILIES, Condition
from elit_diffusers.features import NULL, Features
from loss import interpolate, squared_error, training_times
from randomness import Draws, to_device, training_draws
from training.data_order import StepBatches
from training.run_dir import METRICS, append_line, trim_metrics, warn_if_unwritable

STATE, WEIGHTS = "state.pt", "elit.safetensors"


def load_transformer(name: str, dtype: torch.dtype) -> nn.Module:
    """The transformer of a folder of `save_pretrained`, its own or its pipeline's, or of a pipeline on the hub.

    Raises:
        UserError: none there, of an unsupported class, or no network.
    """
    diffusers = importlib.import_module("diffusers")
    folder = local_folder(name, "--transformer", ["transformer/*.json", "transformer/*.safetensors"])
    if (folder / "transformer" / "config.json").is_file():
        folder = folder / "transformer"
    try:
        config = diffusers.FluxTransformer2DModel.load_config(folder)
    except Exception as error:
        raise UserError(f"--transformer {name}: has no configuration that can be read: {first_line(error)}") from None
    cls = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(cls, str) or cls not in FAMILIES:
        raise UserError(f"--transformer {name}: is a {str(cls)[:80]}; choose one of class {', '.join(FAMILIES)}")
    try:
        model, info = getattr(diffusers, cls).from_pretrained(folder, torch_dtype=dtype, output_loading_info=True)
    except Exception as error:
        raise UserError(f"--transformer {name}: cannot be loaded: {first_line(error)}") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"--transformer {name}: holds no weights for {len(missing)} of its parameters: {missing[0]} …")
    return model


def check_features(features: Features, transformer: Any, config: FinetuneDiffusersConfig) -> None:
    """Refuse data that the transformer or the options do not fit."""
    wanted, (C, H, W) = transformer.config, features.shapes["latents"]
    channels = wanted.in_channels if wanted.get("pos_embed_max_size") else wanted.in_channels // 4
    widths = {"text": (features.shapes["text"][-1], wanted.joint_attention_dim), "latents": (C, channels)}
    if "pooled_projection_dim" in wanted:
        widths["pooled"] = (features.shapes.get("pooled", (0,))[-1], wanted.pooled_projection_dim)
    for name, (width, right) in widths.items():
        if width != right:
            of = "channels" if name == "latents" else "features"
            raise UserError(f"--data-dir {config.data_dir}: {name} of {width} {of}; the transformer takes {right}")
    if H % (2 * config.group_size) or W % (2 * config.group_size):
        raise UserError(
            f"--group-size {config.group_size}: latents of {H}×{W} have {H / 2:g}×{W / 2:g} tokens, which such groups do not divide"
        )
    patch, largest = wanted.get("patch_size"), wanted.get("pos_embed_max_size")
    if largest and max(H, W) > patch * largest:
        raise UserError(
            f"--data-dir {config.data_dir}: latents of {H}×{W}; the transformer has positions for {patch * largest}×{patch * largest}"
        )
    if config.cfg_prob and features.null is None:
        raise UserError(f"--cfg-prob {config.cfg_prob:g}: needs {Path(config.data_dir) / NULL}, the empty prompt; or give 0")
    if len(features) < config.batch_size:
        raise UserError(f"--batch-size {config.batch_size}: {config.data_dir} holds {len(features)} samples")


class Finetuning:
    """One run. The draws of a step belong to (seed, step, place): they are the same on any number of processes.

    Args:
        config: the options.

    Raises:
        UserError: what cannot work, before anything is written.
    """

    def __init__(self, config: FinetuneDiffusersConfig):
        self.config, self.folder = config, Path(config.output_dir)
        self.features = Features(config.data_dir)
        self.accelerator = _accelerator(config)
        processes = self.accelerator.num_processes
        if config.batch_size % processes:
            raise UserError(f"--batch-size {config.batch_size}: must be a multiple of the {processes} processes")
        share = config.batch_size // processes
        self.batch_slice = range(share * self.accelerator.process_index, share * (self.accelerator.process_index + 1))
        state = self._read_state()
        self.transformer = load_transformer(config.transformer, getattr(torch, config.dtype)).requires_grad_(False)
        check_features(self.features, self.transformer, config)
        self.original = None
        if config.train == "all" and config.distill_weight:
            self.original = copy.deepcopy(self.transformer).to(self.accelerator.device)
        torch.manual_seed(config.seed)
        self.elastic = attach(
            self.transformer,
            config.read_after,
            config.write_after,
            config.group_size,
            read_depth=config.read_depth,
            write_depth=config.write_depth,
        )
        self.family = self.elastic.family
        self.elastic.float()
        trained = self.transformer if config.train == "all" else self.elastic
        trained.requires_grad_(True)
        self.trained = {n: p for n, p in self.transformer.named_parameters() if p.requires_grad}
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
        J = config.group_size**2
        self.budgets = [k / J for k in range(max(1, math.ceil(config.min_budget * J - 1e-6)), J + 1)]
        options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        optimizer = torch.optim.AdamW(self.trained.values(), **options)
        self.model, self.optimizer = self.accelerator.prepare(self.transformer, optimizer)
        self.step = 0
        if state is not None:
            self._load(state, options)

    def run(self) -> None:
        """Train up to --max-train-steps, saving on the way and at the end."""
        config, main = self.config, self.accelerator.is_main_process
        lock = None
        if main:
            make_folder(self.folder, "--output-dir")
            lock = FolderLock(self.folder / ".lock", self.folder, warn)
            self._begin()
        batches = StepBatches(
            len(self.features),
            config.batch_size,
            self.batch_slice,
            config.seed,
            self.step,
            max(self.step, config.max_train_steps),
        )
        for indices in batches:
            losses = self._train_step(indices)
            self.step += 1
            if self.step % config.log_steps == 0 or self.step == config.max_train_steps:
                self._log(losses)
            if self.step % config.checkpointing_steps == 0 or self.step == config.max_train_steps:
                self._save()
        if main:
            if not (self.folder / WEIGHTS).is_file():  # removed, and there was no step to go
                self._save_weights()
            print(f"{self.folder / WEIGHTS}: step {self.step}", flush=True)
        if lock is not None:
            lock.release()

    def _begin(self) -> None:
        """Bring the folder, which this process has locked, to the step that the run continues from."""
        state = self._read_state()
        if (0 if state is None else state["step"]) != self.step:
            raise UserError(
                f"--output-dir {self.folder}: another run has saved there meanwhile; run the command again", local=True
            )
        remove_leftovers(self.folder, {STATE, WEIGHTS, METRICS}.__contains__)
        trim_metrics(self.folder / METRICS, self.step)

    def _train_step(self, indices: list[int]) -> dict[str, Any]:
        config, device = self.config, self.accelerator.device
        tensors = {k: to_device(v, device) for k, v in self.features.batch(indices).items()}
        shape = self.features.shapes["latents"]
        draws = training_draws(config.seed, self.step, self.batch_slice, shape, "finetuning").to(device)
        self.elastic.budget = self.budgets[int(draws.level * len(self.budgets))]  # one for all processes
        flow, distance = self.losses(tensors, draws)
        factor = min(1.0, (self.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        self.optimizer.param_groups[0]["lr"] = config.learning_rate * factor
        self.accelerator.backward((flow + config.distill_weight * distance).mean())
        self.accelerator.clip_grad_norm_(self.trained.values(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"budget": self.elastic.budget, "flow_loss": flow.detach().mean(), "distill_loss": distance.detach().mean()}

    def losses(self, tensors: dict[str, Tensor], draws: Draws) -> tuple[Tensor, Tensor]:
        """The flow's loss and the squared distance to the original's velocity, of each sample (B,), at the current budget."""
        config = self.config
        x = tensors["latents"].float()
        t = training_times(draws, config.weighting, "linear", config.time_shift)
        state, target = interpolate(x, draws.noise, t, "linear")
        condition = self._condition(tensors, draws.label_drop < config.cfg_prob)
        dtype = getattr(torch, config.dtype)
        inputs = self.family.inputs(self.transformer, state.to(dtype), t.to(dtype), condition, config.guidance)
        velocity = self._velocity(self.model, inputs, x.shape)
        distance = torch.zeros_like(t)
        if config.distill_weight:
            with torch.no_grad(), self.elastic.original() if self.original is None else nullcontext():
                frozen = self._velocity(self.original or self.transformer, inputs, x.shape)
            distance = squared_error(velocity, frozen)
        return squared_error(velocity, target), distance

    def _velocity(self, model: nn.Module, inputs: dict[str, Any], shape: torch.Size) -> Tensor:
        with self.accelerator.autocast():
            return self.family.velocity(model(**inputs, return_dict=False)[0], shape).float()

    def _condition(self, tensors: dict[str, Tensor], dropped: Tensor) -> Condition:
        """The text of a batch, the empty prompt where `dropped` (B,)."""
        dtype, found = getattr(torch, self.config.dtype), {}
        for name in ("text", "text_mask", "pooled"):
            if (value := tensors.get(name)) is None:
                continue
            if self.features.null is not None:
                null = self.features.null[name].to(value)
                value = torch.where(dropped.view(-1, *[1] * (value.dim() - 1)), null, value)
            found[name] = value if name == "text_mask" else value.to(dtype)
        return Condition(found["text"], found.get("text_mask"), found.get("pooled"))

    def _log(self, losses: dict[str, Any]) -> None:
        reduce: Any = self.accelerator.reduce
        mean = {k: reduce(v, "mean").item() if isinstance(v, Tensor) else v for k, v in losses.items()}
        if not self.accelerator.is_main_process:
            return
        if not all(map(math.isfinite, mean.values())):
            raise UserError(f"the loss is not finite at step {self.step}; lower --learning-rate", local=True)
        line = {"step": self.step, **mean, "lr": self.optimizer.param_groups[0]["lr"]}
        print(" ".join(f"{k} {v:g}" for k, v in line.items()), flush=True)
        with warn_if_unwritable(self.folder / METRICS):
            append_line(self.folder / METRICS, json.dumps(line) + "\n")

    def _save(self) -> None:
        """The weights alone, then the state of the run, from which they are made again; all that is trained, and nothing that is not."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.trained.values()):
            raise UserError(f"the weights are not finite at step {self.step} and were not saved; lower --learning-rate")
        if self.accelerator.is_main_process:
            state = {
                "step": self.step,
                "config": dataclasses.asdict(self.config),
                "weights": {n: p.detach() for n, p in self.trained.items()},
                "optimizer": self.optimizer.optimizer.state_dict(),
            }
            self._save_weights()
            with written_aside(self.folder / STATE, fsync=True) as aside, closing(tensor_files.HashingFile(aside)) as file:
                torch.save(state, file)  # pyright: ignore[reportArgumentType], it only writes and flushes
        self.accelerator.wait_for_everyone()

    def _save_weights(self) -> None:
        whole = self.config.train == "all"
        self.elastic.save(self.folder / WEIGHTS, whole=whole, step=str(self.step), transformer=self.config.transformer)

    def _read_state(self) -> dict[str, Any] | None:
        """The state of an interrupted run of the same options; None where there is none."""
        path = self.folder / STATE
        if not path.is_file():
            return None
        state = tensor_files.load(path)
        try:
            recorded = {name: state["config"][name] for name in names(FinetuneDiffusersConfig, resume="same")}
        except (KeyError, TypeError):
            raise UserError(f"{path}: is not the state of a run of finetune_diffusers.py") from None
        for name, value in recorded.items():
            if value != (given := getattr(self.config, name)):
                option = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{option} {given}: {self.folder} holds a run with {option} {value}; choose another --output-dir"
                )
        return state

    def _load(self, state: dict[str, Any], options: dict[str, Any]) -> None:
        path = self.folder / STATE
        try:
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(state["weights"][name])
            self.optimizer.optimizer.load_state_dict(state["optimizer"])
            self.step = int(state["step"])
        except Exception as error:  # whatever stands there instead
            raise UserError(f"{path}: is not the state of this run: {first_line(error)}") from None
        self.optimizer.param_groups[0].update(options)
        if self.accelerator.is_main_process:
            print(f"{path}: continuing after step {self.step}", flush=True)


def _accelerator(config: FinetuneDiffusersConfig) -> Accelerator:
    on_cpu = not torch.accelerator.is_available()
    # The last block's text goes nowhere, and parameters of it have no gradient.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=config.train == "all", gradient_as_bucket_view=True)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=config.mixed_precision, kwargs_handlers=[ddp])
    check_world_size(accelerator.num_processes)
    set_tf32(False)  # --dtype float32 is that of convolutions too
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(f"accelerate's configuration says {kind.value}; this runs on one process or by DDP (--multi_gpu)")
    return accelerator
