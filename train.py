"""Train a diffusion transformer on VAE latents: `accelerate launch train.py --config …` on one process or hundreds.

Build, loop, save. Every random number belongs to (seed, forward), so a run does not depend on the number of processes.
"""

import contextlib
import copy
import dataclasses
import errno
import functools
import json
import logging
import math
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
import models
import plan
from config import TrainConfig, parse, require
from encoders import describe_encoders, encoder_names, load_encoders
from errors import UserError, command, nearest
from files import Busy, FolderLock, check_name
from loss import Projecting, active_stage, alignment_loss, dropped_labels, held_out_losses, training_times, velocity_loss
from meters import Meters, peak_tflops
from models.elit import mask_levels
from pictures import image_grid, save_png
from preemption import SIGNALS, Preemption
from processes import data_workers, end_with_launcher, end_with_parent
from randomness import epoch_order, image_labels, pyramid_noise, training_draws
from samplers import check_schedule, dfm_sampler, euler_sampler
from transfer import transfer
from vae import decode, decode_stages, load_vae, sample_latents

PICTURES = 64  # images drawn in training, over all processes
PICTURE_STEPS, PICTURE_CFG = 50, 4.0
HELD_OUT = 2048  # held-out samples measured, at most

# What a resumed run must share with the run that it goes on with, or it would silently be another one: …
SAME = (
    *("model", "resolution", "num_classes", "path_type", "time_shift", "latent_norm", "enc_type"),
    *checkpoint.MODEL_OPTIONS,
)
# … and what the user may change on purpose, by --allow-change.
CHANGEABLE = (
    *("batch_size", "gradient_accumulation_steps", "seed", "mixed_precision", "weighting", "cfg_prob", "ema_decay"),
    *(
        "elit_min_mask_prob",
        "elit_max_mask_prob",
        "stage_weights",
        "max_grad_norm",
        "learning_rate",
        "adam_beta1",
        "adam_beta2",
    ),
    *("adam_weight_decay", "adam_epsilon", "lr_scheduler_type", "warmup_steps", "lr_cooldown", "proj_coeff"),
)
LOCK = "run.lock"  # in the run folder while a run writes there
DATA_SIZE = "data_size"  # no option, but changed by --data-dir

log = logging.getLogger("train")  # to log.txt alone; what a user must see is printed too
log.addHandler(logging.NullHandler())
log.propagate = False


@command
def main(argv: list[str] | None = None) -> None:
    config, given = parse(TrainConfig, argv, prog="train.py")
    require(config)
    check(config, given)
    if config.plan:
        if os.environ.get("RANK", "0") == "0":
            plan.Plan(config).run()
        return
    end_with_launcher()
    with Preemption() as preemption:
        Trainer(config, preemption).run(preemption)


def check(config: TrainConfig, given: dict) -> None:
    """Refuse what cannot work, before anything is loaded or written."""
    spec = models.model_spec(config.model)
    masks = [config.elit_min_mask_prob, config.elit_max_mask_prob]
    if not spec.elastic and any(masks):
        raise UserError(f"--elit-max-mask-prob: {config.model} has no latents to mask; only ELIT models do")
    if spec.elastic:
        mask_levels(config.elit_group_size**2, *masks)
    if spec.staged:
        check_stages(config)
        if config.time_shift != 1:
            raise UserError(
                f"--time-shift {config.time_shift:g}: {config.model} has times of its own for each stage; only 1 works"
            )
    check_name(config.exp_name, "--exp-name", plain=True)
    if config.enc_type != "none" and not encoder_names(config.enc_type, config.proj_coeff):
        _warn(f"--enc-type {config.enc_type} without --proj-coeff: REPA is off")
    config.allow_change = [name.removeprefix("--").replace("-", "_") for name in config.allow_change]
    for name in config.allow_change:
        if name not in (known := (*CHANGEABLE, DATA_SIZE)):
            raise UserError(f"--allow-change {name}: cannot be changed{nearest(name, known)}; choose from {', '.join(known)}")
    if config.legacy:
        _warn("--legacy has no effect")
    if spec.elastic and "encoder_depth" in given and config.head_depth is None:
        head = spec.sizes["head_depth"]
        _warn(
            f"--encoder-depth {config.encoder_depth} is the block that REPA reads; the head of {config.model} has {head} blocks "
            f"(the published code would take {config.encoder_depth}: --head-depth {config.encoder_depth})"
        )
    if config.mixed_precision == "fp16" and not config.plan and not torch.accelerator.is_available():
        _warn("--mixed-precision fp16 needs a GPU; running as no")
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


class StepBatches:
    """For each forward from `start` on, the indices of this process's slice of the global batch.

    The order of an epoch is a permutation from (seed, epoch); its last partial batch is dropped.
    """

    def __init__(self, num_samples: int, batch_size: int, places: range, seed: int, start: int, stop: int):
        self.num_samples, self.batch_size, self.places = num_samples, batch_size, places
        self.seed, self.start, self.stop = seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.num_samples // self.batch_size
        order = epoch = None
        for n in range(self.start, self.stop):
            if epoch != n // per_epoch:
                epoch = n // per_epoch
                order = epoch_order(self.seed, epoch, self.num_samples)
            first = n % per_epoch * self.batch_size
            yield order[first + self.places.start : first + self.places.stop].tolist()


def learning_rate_factor(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at optimizer step n − 1 (PyTorch counts from 0): warm-up, schedule, cool-down."""
    warmup = 0 if config.lr_scheduler_type == "constant" else config.warmup_steps
    cooldown = round(config.lr_cooldown * total_steps)

    def factor(done: int) -> float:
        value = 1 / warmup + (1 - 1 / warmup) * min(done, warmup) / warmup if warmup else 1.0
        if config.lr_scheduler_type == "cosine":
            value *= 0.5 * (1 + math.cos(math.pi * min(max(0, done - warmup) / max(1, total_steps - warmup), 1)))
        if cooldown and done > total_steps - cooldown:
            value *= 1 - 0.98 * (done - (total_steps - cooldown)) / cooldown
        return value

    return factor


class EMA:
    """Averaged copies of the weights, one for each decay; each starts as a copy and follows every optimizer step."""

    def __init__(self, model: nn.Module, decays: list[float]):
        self.models = {f"{d:g}": copy.deepcopy(model).eval().requires_grad_(False) for d in decays}
        self.sources = [p.detach() for p in model.parameters()]
        self.updates = [
            (get_ema_multi_avg_fn(d), list(m.parameters())) for d, m in zip(decays, self.models.values(), strict=True)
        ]

    @torch.no_grad()
    def update(self) -> None:
        for average, parameters in self.updates:
            average(parameters, self.sources, None)

    @property
    def first(self) -> nn.Module:
        """The copy that pictures and the held-out loss use."""
        return next(iter(self.models.values()))


class Trainer:
    """One run: its parts, its loop and its folder (config.yaml, metrics.jsonl, log.txt, status.json, checkpoints/, samples/)."""

    def __init__(self, config: TrainConfig, preemption: Preemption | None = None):
        """`preemption`: a signal ends the waiting for another run."""
        self.config = config
        self.accelerator = accelerator = _accelerator(config)
        self.main = accelerator.is_main_process
        self.run_dir = Path(config.output_dir) / config.exp_name
        self._load_data()
        local = config.batch_size // accelerator.num_processes
        self.places = range(accelerator.process_index * local, (accelerator.process_index + 1) * local)
        self._build_model()
        plan.check_run_folder(config)
        self.lock = self._lock_folder(preemption)
        try:
            state, started = self._open_run()
            self._optimize(state)
            self._prepare_pictures()
            self._begin(started)
        except BaseException:
            self._release_lock()
            raise

    # ------------------------------------------------------------------------------------------------------ set-up

    def _load_data(self) -> None:
        self.run_data = plan.open_data(self.config, self.accelerator.num_processes)
        self.dataset, self.held_out, self.record = self.run_data.dataset, self.run_data.held_out, self.run_data.record
        self.shape = (self.record.latent_channels, *self.dataset.shape[1:])
        self.total_steps = self.run_data.total_steps

    def _build_model(self) -> None:
        config, device = self.config, self.accelerator.device
        names = encoder_names(config.enc_type, config.proj_coeff)
        grid = plan.token_grid(config, self.record)
        self.encoders = load_encoders(names, config.resolution, grid, config.encoder_weights, device)
        torch.manual_seed(config.seed)  # after the encoders, whose making draws numbers too
        self.model = plan.build_model(config, self.record, [encoder.z_dim for encoder in self.encoders]).to(device)
        # FLOPs of one image's forward at a budget; each is counted once, when first asked for.
        self.forward_flops = functools.cache(functools.partial(models.count_flops, copy.deepcopy(self.model).to("meta")))
        targets = describe_encoders(names, config.resolution, grid)
        self.repa_flops = 3 * plan.projector_flops(self.model) + sum(map(plan.encoder_flops, targets))  # of one image's step
        self.ema = EMA(self.model, config.ema_decay)
        if config.gradient_checkpointing:
            models.checkpoint_blocks(self.model)
        if config.compile:
            models.compile_model(self.model)
        self.coarse_shapes = getattr(self.model, "stage_shapes", [])[:-1]
        self.budgets = plan.trained_budgets(config)
        stages = range(len(self.coarse_shapes) + 1)
        kinds = dict.fromkeys("loss" + _named(self.variant(b, stage)) for b in self.budgets for stage in stages)
        names = ["loss", *(kind for kind in kinds if kind != "loss"), *(["alignment_loss"] if self.encoders else [])]
        self.meters = Meters(names, self.accelerator.device)

    def _lock_folder(self, preemption: Preemption | None) -> FolderLock | None:
        """Keep other runs out of the run folder, or wait for the end of the one in it. Rank 0 has the lock and tells the others.

        Nothing was read from the folder before, nor written or deleted.
        """
        config, lock, is_waiting = self.config, None, False
        deadline = time.monotonic() + 60 * config.wait_for_lock
        while True:
            error, number, last = "", preemption.signal if preemption else 0, time.monotonic() >= deadline
            if self.main:
                try:
                    lock = FolderLock(self.run_dir / LOCK, self.run_dir, _warn)
                except Busy as busy:
                    error = f"{busy}, or give --wait-for-lock MINUTES"
                except OSError as failed:
                    error, last = str(self._cannot_write(failed)), True
            # So often that no time-out of a collective ends the waiting.
            error, number, last = broadcast_object_list([error, number, last])
            if not error:
                return lock
            if last:
                raise UserError(error)
            if number:
                _warn(f"{signal.Signals(number).name}: stopped while waiting for another run in {self.run_dir}")
                raise SystemExit(128 + number)
            if not is_waiting:
                _warn(f"{error.partition(';')[0]}; waiting up to {config.wait_for_lock:g} minutes for its end")
            is_waiting = True
            time.sleep(1)

    def _release_lock(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(
            f"--output-dir {self.config.output_dir}: cannot write {error.filename or self.run_dir}: {error.strerror}"
        )

    def _open_run(self) -> tuple[dict | None, str]:
        """The state to resume from, the same in every process, and what --init-from did. Nothing is written yet."""
        config, folder = self.config, self.run_dir / "checkpoints"
        plan.check_run_folder(config)  # again: another run may have written there meanwhile
        state, started = self._load_state(folder) if config.resume_step else None, ""
        if state is not None:
            self._check_same_run(state)
        elif config.init_from:
            started = self._start_from(config.init_from)
        self.start_step = self.step = self.saved_step = state["step"] if state else 0
        return state, started

    def _begin(self, started: str) -> None:
        """Make the run folder, or bring it to the step to resume from: all that could refuse the run has passed. Rank 0 writes."""
        config, folder = self.config, self.run_dir / "checkpoints"
        self.accelerator.wait_for_everyone()  # all have looked before anything is written
        if self.main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (self.run_dir / "samples").mkdir(exist_ok=True)
                checkpoint.remove_unfinished(folder)
                self._start_log()
                if started:
                    log.info(started)
                _write_aside(self.run_dir / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
                if aside := checkpoint.set_aside(folder, self.start_step):
                    _warn(f"resuming from step {self.start_step}; the checkpoints after it are now in {aside}")
                self._trim_metrics()
                self.status("running", self.start_step)
            except OSError as error:
                raise self._cannot_write(error) from None
        self.accelerator.wait_for_everyone()

    def _start_from(self, path: str) -> str:
        """Another run's averaged weights, as far as they fit, for the weights and their averages; returns what was done."""
        found = checkpoint.read_weights(path, given={"resolution": self.config.resolution}, projectors=bool(self.encoders))
        problem: list[str | None] = [None]
        try:
            found.check()
        except UserError as error:  # of rank 0, which alone has read all of the file
            problem = [str(error)]
        if message := broadcast_object_list(problem)[0]:
            raise UserError(message)
        made = transfer(found, self.model, dataclasses.asdict(self.config), path)
        for model in (self.model, *self.ema.models.values()):
            model.load_state_dict(made.state_dict, strict=False)
        if self.main:
            print(made.summary(), flush=True)
        return made.summary()

    def _load_state(self, folder: Path) -> dict | None:
        """The state to go on from. Rank 0 verifies it and the others follow, so that all of them take the same."""
        step, state, error = self.config.resume_step, None, None
        if self.main:
            try:
                if step == -1:
                    state = checkpoint.load_newest(folder, _warn)
                else:
                    state = checkpoint.load(checkpoint.step_path(folder, step), verify=True)
                if state is not None and type(state.get("step")) is not int:
                    raise UserError(f"{folder}: the checkpoint to resume from records no step")
            except UserError as found:
                state, error = None, str(found)
        step, error = broadcast_object_list([state and state["step"], error])
        if error:
            raise UserError(error)
        return state if self.main or step is None else checkpoint.load(checkpoint.step_path(folder, step))

    def _check_same_run(self, state: dict) -> None:
        """Going on with another model, data order or VAE would silently be another run."""
        if "optimizer" not in state:
            raise UserError(f"{self.run_dir}: its checkpoints hold no training state")
        config = self.config
        own, recorded = dataclasses.asdict(config), state["config"]
        for name in (*SAME, *(["encoder_depth"] if self.encoders else []), *CHANGEABLE):
            if name in recorded and own[name] != recorded[name] and name not in config.allow_change:
                hint = f" (--allow-change {name} goes on all the same)" if name in CHANGEABLE else ""
                raise UserError(
                    f"--{name.replace('_', '-')} {_spoken(own[name])}: the run in {self.run_dir} was started with {_spoken(recorded[name])}{hint}"
                )
        if self.record.to_dict() != state["vae"]:
            raise UserError(f"--data-dir {config.data_dir}: its latents were made by another VAE than those of the run")
        size = state.get(DATA_SIZE, len(self.dataset))
        if len(self.dataset) != size and DATA_SIZE not in config.allow_change:
            raise UserError(
                f"--data-dir {config.data_dir}: holds {len(self.dataset)} samples; the run in {self.run_dir} was started with {size} (--allow-change {DATA_SIZE} goes on all the same)"
            )

    def _optimize(self, state: dict | None) -> None:
        """Optimizer, schedule and data, at the place where `state` stands."""
        config = self.config
        options = {
            "lr": config.learning_rate,
            "betas": (config.adam_beta1, config.adam_beta2),
            "weight_decay": config.adam_weight_decay,
            "eps": config.adam_epsilon,
        }
        optimizer = torch.optim.AdamW(self.model.parameters(), **options, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        if state is not None:
            checkpoint.load_state_dict(self.accelerator.unwrap_model(self.model), state["model"], self.run_dir)
            for decay, model in self.ema.models.items():  # a decay that is new starts from the weights, as in a new run
                checkpoint.load_state_dict(model, state["ema"].get(decay, state["model"]), self.run_dir)
            optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.meters.load_state_dict(state.get("meters", {}), self.main)
        # The rate is a function of the step, and the rest is as the options say, whatever a checkpoint may hold.
        optimizer.param_groups[0] |= options | {"initial_lr": config.learning_rate}
        factor = learning_rate_factor(config, self.total_steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=self.start_step - 1)
        self.schedule._step_count = self.start_step + 1  # it is saved, and should tell nothing of interruptions
        accumulation = config.gradient_accumulation_steps
        start, stop = self.start_step * accumulation, self.total_steps * accumulation
        batches = StepBatches(len(self.dataset), config.batch_size, self.places, config.seed, start, stop)
        self.loader = DataLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=config.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            persistent_workers=config.num_workers > 0,
            worker_init_fn=_serve_this_process_alone,
        )
        folder = self.run_dir / "checkpoints"
        self.writer = checkpoint.Writer(folder, config.keep_last, config.keep_every, _warn)

    def _prepare_pictures(self) -> None:
        """The VAE for pictures. One that the user named must load; the data set's own may be missing, with a warning."""
        self.vae = None
        if not self.config.sampling_steps or self.start_step >= self.total_steps:
            return
        try:
            name = self.config.vae or self.record.vae
            self.vae, _ = load_vae(name, self.accelerator.device, expected=self.record)
        except UserError as error:
            if self.config.vae:
                raise
            _warn(f"no pictures in training: {error}")

    def _start_log(self) -> None:
        handler = logging.FileHandler(self.run_dir / "log.txt")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        handler.handleError = lambda _: None  # a full disk is told where it matters
        log.handlers[:] = [handler]
        log.setLevel(logging.INFO)

    def _trim_metrics(self) -> None:
        """Move the lines after the step that the run resumes from, which will be written again, to metrics.dropped.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        content = path.read_bytes() if path.is_file() else b""
        lines = content.removesuffix(b"\n").split(b"\n") if content else []
        kept = [line for line in lines if _step_of(line) <= self.start_step]
        dropped = [line for line in lines if not _step_of(line) <= self.start_step]
        if dropped:
            _append(path.with_name("metrics.dropped.jsonl"), b"".join(line + b"\n" for line in dropped))
        if dropped or not content.endswith(b"\n"):
            _write_aside(path, b"".join(line + b"\n" for line in kept))

    # -------------------------------------------------------------------------------------------------------- loop

    def run(self, preemption: Preemption) -> None:
        """Train to the end, or to the step at which the processes are told to stop: then exit as that signal would have it."""
        config, accelerator = self.config, self.accelerator
        self._start_trackers()
        parameters = sum(p.numel() for p in self.model.parameters())
        log.info(
            f"{config.model}: {parameters:,} parameters; {len(self.dataset):,} samples; steps {self.start_step} to {self.total_steps}; "
            f"global batch {config.batch_size * config.gradient_accumulation_steps} = {accelerator.num_processes} processes × "
            f"{len(self.places)} × {config.gradient_accumulation_steps}; {accelerator.device.type}, {config.mixed_precision}"
        )
        try:
            preemption.watch(self.start_step)
            self._loop(preemption)
            self._finish_saving()
        except BaseException:
            preemption.end()  # a failed process takes the time that its last checkpoint needs
            self.writer.wait()
            self.status("failed", self.step)
            self._release_lock()
            raise
        accelerator.wait_for_everyone()  # who leaves early is taken for failed, and its launcher ends the others
        preemption.end()
        preempted = self.step < self.total_steps
        self.status("preempted" if preempted else "finished", self.step)
        _never_stop(accelerator.end_training)
        self._release_lock()
        if preempted:
            _warn(
                f"{signal.Signals(preemption.signal).name}: stopped after step {self.step}; --resume-step -1 goes on from there"
            )
            raise SystemExit(128 + preemption.signal)

    def _loop(self, preemption: Preemption) -> None:
        config = self.config
        progress = {"total": self.total_steps, "initial": self.start_step, "disable": not self.main}
        with (
            data_workers(self.loader, "--resume-step -1 goes on from the newest checkpoint") as batches,
            tqdm(**progress, desc="train", unit="step", mininterval=1) as bar,
        ):
            self.start_measuring()
            while not preemption.reached(self.step) and self.step < self.total_steps:
                self.step += 1
                self.train_step(batches)
                bar.update()
                if self.step % config.log_every == 0 or self.step in (1, self.total_steps):
                    bar.set_postfix_str(self.log_line())
                if config.sampling_steps and (self.step % config.sampling_steps == 0 or self.step == 1):
                    with self._untimed():
                        self.look()
                if self.step % config.checkpointing_steps == 0 or self.step == self.total_steps:
                    with self._untimed():
                        self.save()
                elif self.step == self.start_step + 1 and self.main:
                    self.writer.copy(self.state())  # makes the memory, so that no checkpoint waits for it

    def train_step(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """One optimizer step; the host waits for the device nowhere."""
        config, accelerator = self.config, self.accelerator
        accumulation = config.gradient_accumulation_steps
        for micro in range(accumulation):
            with accelerator.accumulate(self.model):
                accelerator.backward(self.forward((self.step - 1) * accumulation + micro, next(batches)))
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
                    skip = self.meters.step(norm)
                    if accelerator.scaler is None:  # which sets this itself
                        self.optimizer.optimizer.found_inf = skip  # fused AdamW then leaves weights and state as they are
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.schedule.step()
        self.ema.update()

    def forward(self, n: int, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of this process's images in forward `n` (counted over micro-steps)."""
        config, device = self.config, self.accelerator.device
        draws = training_draws(config.seed, n, self.places, self.shape, coarse_shapes=self.coarse_shapes).to(device)
        moments, y = (batch[k].to(device, non_blocking=True) for k in ("moments", "label"))
        x = sample_latents(moments, draws.posterior, self.record)
        y = dropped_labels(y, draws, config.cfg_prob, config.num_classes)
        budget = self.budgets[int(draws.level * len(self.budgets))]
        variant = self.variant(budget, active_stage(draws.stage, config.stage_weights))
        options = {k: getattr(config, k) for k in ("weighting", "path_type", "time_shift")}
        model = Projecting(self.model) if self.encoders else self.model
        losses = velocity_loss(model, x, draws, y, **options, **variant)
        self.meters.add(losses, training_times(draws, **options), "loss" + _named(variant))
        self.images += config.batch_size
        # A backward pass is two forwards.
        self.flops += config.batch_size * (3 * self.forward_flops(budget) + self.repa_flops)
        loss = losses.mean()
        if self.encoders:
            images = batch["image"].to(device, non_blocking=True)
            with self.accelerator.autocast():
                features = [encoder(images) for encoder in self.encoders]
            alignment = alignment_loss(model.projections, features)
            self.meters.add_mean("alignment_loss", alignment)
            loss = loss + config.proj_coeff * alignment
        return loss

    def variant(self, budget: float | None, stage: int) -> dict:
        """What this model takes of a budget and an active stage, as arguments of `velocity_loss`."""
        arguments = {} if budget is None else {"inference_budget": budget}
        return arguments | ({"active_stage": stage} if self.coarse_shapes else {})

    # ----------------------------------------------------------------------------------------------------- reports

    @contextlib.contextmanager
    def _untimed(self) -> Iterator[None]:
        """What is done here does not count in images per second."""
        begin = time.perf_counter()
        yield
        self.since += time.perf_counter() - begin

    def start_measuring(self) -> None:
        """Speed is measured from here on."""
        self.since, self.images, self.flops = time.perf_counter(), 0, 0

    def log_line(self) -> str:
        """Report the means and the speed since the last line; returns them in short. Waits for the device."""
        config, accelerator = self.config, self.accelerator
        values = self.meters.read(accelerator)
        seconds = time.perf_counter() - self.since
        values |= {"lr": self.schedule.get_last_lr()[0], "images_per_second": self.images / seconds}
        values["tflops"] = self.flops / seconds / 1e12
        peak = peak_tflops(accelerator.device, config.mixed_precision, config.allow_tf32)
        if peak is not None:
            values["mfu"] = values["tflops"] / (peak * accelerator.num_processes)
        in_a_row, since = values.pop("longest"), values.pop("since")
        self.report(values)
        if in_a_row >= config.max_skipped_steps:
            good = self._newest_checkpoint(self.step - int(since))
            raise UserError(
                f"step {self.step}: {in_a_row:.0f} steps in a row had a gradient that is not finite, and were skipped; the last good checkpoint is {good}"
            )
        self.start_measuring()
        loss = float("nan") if values["loss"] is None else values["loss"]
        return f"loss {loss:.4f}, {values['images_per_second']:.1f} images/s"

    def report(self, values: dict[str, float | None]) -> None:
        """One line in metrics.jsonl and in the tracker; `None` for what could not be measured."""
        if not self.main:
            return
        with _warned(self.run_dir / "metrics.jsonl"):
            _append(self.run_dir / "metrics.jsonl", json.dumps({"step": self.step} | values) + "\n")
        known = {k: v for k, v in values.items() if v is not None}
        log.info(f"step {self.step}: " + ", ".join(f"{k} {v:.6g}" for k, v in known.items()))
        for tracker in self.accelerator.trackers:
            _never_stop(lambda t=tracker: t.log(known, step=self.step))
        self.status("running", self.step)

    def look(self) -> None:
        """Pictures of fixed noise and labels, and the held-out loss by budget, with the averaged weights."""
        if self.held_out is not None:
            self.report(self.measure_held_out())
        if self.vae is not None:
            self.draw_pictures()

    def measure_held_out(self) -> dict[str, float]:
        """Mean held-out loss at each trained budget that is a power of two, and in each of DFM's stages; samples split over processes."""
        config, accelerator = self.config, self.accelerator
        budgets = [b for b in self.budgets if b is None or math.log2(b).is_integer()] or [self.budgets[0]]
        shown = [self.variant(b, stage) for b in budgets for stage in range(len(self.coarse_shapes) + 1)]
        count = min(len(self.held_out), HELD_OUT)
        sums = torch.zeros(len(shown), device=accelerator.device)
        bounds = [count * r // accelerator.num_processes for r in range(accelerator.num_processes + 1)]
        first, last = bounds[accelerator.process_index : accelerator.process_index + 2]
        batch_size = len(self.places)
        for start in range(first, last, batch_size):
            indices = range(start, min(start + batch_size, last))
            batch = torch.utils.data.default_collate(self.held_out.__getitems__(list(indices)))
            batch = {k: batch[k].to(accelerator.device) for k in ("moments", "label")}
            with accelerator.autocast():
                losses = held_out_losses(
                    self.ema.first,
                    batch,
                    indices,
                    self.record,
                    shown,
                    weighting=config.weighting,
                    path_type=config.path_type,
                    time_shift=config.time_shift,
                    coarse_shapes=self.coarse_shapes,
                )
            sums += losses.sum(dim=1)
        means = (accelerator.reduce(sums, reduction="sum") / count).tolist()
        return {"val_loss" + _named(variant): mean for variant, mean in zip(shown, means, strict=True)}

    def draw_pictures(self) -> None:
        """samples/{step}.png: 64 images at full budget and, beside them, at the lowest trained one; of DFM each stage first."""
        accelerator = self.accelerator
        indices = range(accelerator.process_index, PICTURES, accelerator.num_processes)
        grids = []
        for budget in sorted({self.budgets[0], self.budgets[-1]}, key=lambda b: -(b or 1)):
            views = len(self.coarse_shapes) + 2 if self.coarse_shapes else 1
            images = torch.zeros((views, PICTURES, 3, self.config.resolution, self.config.resolution), dtype=torch.uint8)
            if len(indices):
                images[:, list(indices)] = self._pictures(indices, budget).cpu()
            images = accelerator.reduce(images.to(accelerator.device, torch.int32)).cpu()  # each process fills its own
            grids.extend(images.to(torch.uint8).permute(0, 1, 3, 4, 2).numpy())
        if self.main:
            rows = np.concatenate([g.reshape(-1, 8, *g.shape[1:]) for g in grids], axis=1)  # views side by side
            picture = image_grid(rows.reshape(-1, *grids[0].shape[1:]), columns=8 * len(grids))
            path = self.run_dir / "samples" / f"{self.step:07d}.png"
            with _warned(path):
                save_png(picture, path)
            for tracker in accelerator.trackers:
                _never_stop(lambda t=tracker: t.log_images({"samples": grids[views - 1]}, step=self.step))

    def _pictures(self, indices: range, budget: float | None) -> Tensor:
        """Views of the images `indices`, uint8 (views, n, 3, H, W): the images, and of DFM each stage before them."""
        config, device = self.config, self.accelerator.device
        shapes = [*self.coarse_shapes, self.shape]
        noise = [x.to(device) for x in pyramid_noise(config.seed, indices, shapes)]
        y = image_labels(config.seed, indices, config.num_classes).to(device)
        options = {
            "cfg_scale": PICTURE_CFG if config.cfg_prob else 1.0,
            "path_type": config.path_type,
            "inference_budget": budget,
        }
        with self.accelerator.autocast():
            if self.coarse_shapes:
                schedule = {k: getattr(config, k) for k in ("num_steps_per_scale", "stage_sampling_thresholds")}
                return decode_stages(self.vae, dfm_sampler(self.ema.first, noise, y, **schedule, **options))
            grid = {"num_steps": PICTURE_STEPS, "time_shift": config.time_shift}
            return decode(self.vae, euler_sampler(self.ema.first, noise[0], y, **grid, **options))[None]

    def state(self) -> dict:
        """Everything that a resumed run needs."""
        scaler = self.accelerator.scaler
        return {
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "ema": {decay: model.state_dict() for decay, model in self.ema.models.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "vae": self.record.to_dict(),
            DATA_SIZE: len(self.dataset),
            "meters": self.meters.state_dict(),
        }

    def save(self) -> None:
        """checkpoints/{step}.pt, written in the background. A failing write harms none before it; the next one is as always."""
        self.meters.gather(self.accelerator)
        self.saved_step = self.step
        if self.main:
            good = self.step - int(self.meters.streak)  # the last step that was not skipped
            self.writer.save(self.step, self.state(), good)
            log.info(f"step {self.step}: saving")

    def _finish_saving(self) -> None:
        """The last step's checkpoint, on the disk."""
        if self.saved_step != self.step:
            self.save()
        self.writer.wait()
        if self.writer.error is not None:
            raise UserError(
                f"{checkpoint.step_path(self.writer.folder, self.step)}: could not be written: {self.writer.error}; the last good checkpoint is {self._newest_checkpoint()}"
            )

    def _newest_checkpoint(self, up_to: int | None = None) -> str:
        """The newest one of this run (up to a step), as messages name it."""
        self.writer.wait()
        steps = [step for step in checkpoint.saved_steps(self.writer.folder) if up_to is None or step <= up_to]
        return str(checkpoint.step_path(self.writer.folder, steps[-1])) if steps else "none: nothing was saved before"

    def status(self, state: str, step: int) -> None:
        """status.json: running, preempted, finished or failed, and the step."""
        if self.main:
            with _warned(self.run_dir / "status.json"):
                _write_aside(self.run_dir / "status.json", json.dumps({"state": state, "step": step}) + "\n")

    def _start_trackers(self) -> None:
        config = self.config
        if config.report_to == "none":
            return
        run = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in dataclasses.asdict(config).items()}
        folder = self.run_dir / config.logging_dir
        if self.main:
            folder.mkdir(parents=True, exist_ok=True)
        arguments = {"tensorboard": {"purge_step": self.start_step + 1}}  # what an interrupted run logged after its checkpoint
        if config.report_to == "wandb" and self.main:
            arguments = {"wandb": {"name": config.exp_name, "dir": str(folder), "mode": _wandb_mode()}}
            if arguments["wandb"]["mode"] == "online":
                arguments["wandb"] |= {"id": _kept(folder / "wandb_id", secrets.token_hex(4)), "resume": "allow"}
        _never_stop(lambda: self.accelerator.init_trackers("elit", config=run, init_kwargs=arguments))


def _accelerator(config: TrainConfig) -> Accelerator:
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


def _wandb_mode() -> str:
    """online, or offline with a warning where nobody is logged in."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import wandb

    if wandb.api.api_key:
        return "online"
    _warn("wandb has no login: writing offline (wandb login, then wandb sync, uploads it)")
    return "offline"


def _kept(path: Path, value: str) -> str:
    """What the file holds; `value` the first time, which is then kept."""
    if not path.exists():
        _write_aside(path, value)
    return path.read_text()


def _never_stop(action: Callable[[], None]) -> None:
    """A tracker that fails is a warning, never the end of a run."""
    try:
        action()
    except Exception as error:
        _warn(f"tracker: {error}")


def _warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"train.py: warning: {message}", file=sys.stderr, flush=True)
        log.warning(message)


def _write_aside(path: Path, content: str | bytes) -> None:
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(content if isinstance(content, bytes) else content.encode())
    shutil.move(aside, path)


def _named(variant: dict) -> str:
    """What a forward's `variant` adds to the name of its loss."""
    labels = {"active_stage": "stage", "inference_budget": "budget"}
    return "".join(f"_{labels[k]}_{v:g}" for k, v in variant.items())


def _append(path: Path, lines: str | bytes) -> None:
    """The whole of it or nothing."""
    data = lines if isinstance(lines, bytes) else lines.encode()
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


@contextlib.contextmanager
def _warned(path: Path) -> Iterator[None]:
    """A file beside the checkpoints that cannot be written is a warning: disks fill, and get emptied."""
    try:
        yield
    except OSError as error:
        _warn(f"{path}: cannot be written: {error.strerror}")


def _serve_this_process_alone(_) -> None:
    """In data workers: only the end of training ends them. A signal to the whole group must not take from it what the last step needs."""
    end_with_parent()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _spoken(value) -> str:
    """An option's value as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)


def _step_of(line: bytes) -> float:
    try:
        step = json.loads(line.decode())["step"]
    except (ValueError, LookupError, TypeError, RecursionError):  # cut short by a kill, or damaged
        return math.inf
    return step if type(step) in (int, float) else math.inf


if __name__ == "__main__":
    main()
