"""The training loop."""

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import math
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import models
from checkpoint import async_writer, reading, training_state
from checkpoint.init_from import init_from
from checkpoint.weights import load_state_dict
from common import tensor_files
from common.distributed import data_workers
from common.errors import UserError, first_line
from common.files import Busy, FolderLock
from common.image_files import save_png
from common.plotting import image_grid
from config.options import TrainConfig
from loss import Projecting, active_stage, alignment_loss, dropped_labels, training_times, val_losses, velocity_loss
from models.encoders import describe_encoders, encoder_names, load_encoders
from models.vae import decode, decode_stages, load_vae, sample_latents
from randomness import image_labels, pyramid_noise, training_draws
from samplers import dfm_sampler, euler_sampler
from training import plan, setup
from training.data_order import StepBatches, init_data_worker
from training.optim import EMA, learning_rate_factor
from training.preemption import Preemption
from training.resume import CHANGEABLE, DATA_SIZE, LOCK, SAME, format_option
from training.run_dir import (
    append_line,
    log,
    log_tracker_errors,
    read_or_create,
    step_of_line,
    warn,
    warn_if_unwritable,
    write_aside,
)
from training.setup import create_accelerator, wandb_mode
from training.stats import TrainingStats, peak_tflops

PICTURES = 64  # images drawn in training, over all processes


PICTURE_STEPS, PICTURE_CFG = 50, 4.0


VAL_SAMPLES = 2048  # held-out samples measured, at most


class Trainer:
    """One run: its parts, its loop and its folder (config.yaml, metrics.jsonl, log.txt, status.json, checkpoints/, samples/)."""

    def __init__(self, config: TrainConfig, preemption: Preemption | None = None):
        """`preemption`: a signal ends the waiting for another run."""
        self.config = config
        self.accelerator = accelerator = create_accelerator(config)
        self.main = accelerator.is_main_process
        self.run_dir = Path(config.output_dir) / config.exp_name
        self._load_data()
        local = config.batch_size // accelerator.num_processes
        self.places = range(accelerator.process_index * local, (accelerator.process_index + 1) * local)
        setup.check_run_folder(config)
        self.lock = self._lock_folder(preemption)
        try:
            self._build_model()
            state, started = self._open_run()
            self._optimize(state)
            self._prepare_pictures()
            self._begin(started)
        except BaseException:
            self._release_lock()
            raise

    # ------------------------------------------------------------------------------------------------------ set-up

    def _load_data(self) -> None:
        self.run_data = setup.open_data(self.config, self.accelerator.num_processes)
        self.dataset, self.held_out, self.record = self.run_data.dataset, self.run_data.held_out, self.run_data.record
        self.shape = (self.record.latent_channels, *self.dataset.shape[1:])
        self.total_steps = self.run_data.total_steps

    def _build_model(self) -> None:
        config, device = self.config, self.accelerator.device
        names = encoder_names(config.enc_type, config.proj_coeff)
        grid = setup.token_grid(config, self.record)
        self.encoders = load_encoders(names, config.resolution, grid, config.encoder_weights, device)
        torch.manual_seed(config.seed)  # after the encoders, whose making draws numbers too
        self.model = setup.build_model(config, self.record, [encoder.z_dim for encoder in self.encoders]).to(device)
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
        self.budgets = setup.trained_budgets(config)
        stages = range(len(self.coarse_shapes) + 1)
        kinds = dict.fromkeys("loss" + metric_suffix(self.variant(b, stage)) for b in self.budgets for stage in stages)
        names = ["loss", *(kind for kind in kinds if kind != "loss"), *(["alignment_loss"] if self.encoders else [])]
        self.meters = TrainingStats(names, self.accelerator.device)

    def _lock_folder(self, preemption: Preemption | None) -> FolderLock | None:
        """Keep other runs out of the run folder, or wait for the end of the one in it. Rank 0 has the lock and tells the others.

        Nothing was loaded from the folder before, nor written or deleted there.
        """
        config, lock, is_waiting = self.config, None, False
        deadline = time.monotonic() + 60 * config.wait_for_lock
        while True:
            error, number, last = "", preemption.signal if preemption else 0, time.monotonic() >= deadline
            if self.main:
                try:
                    lock = FolderLock(self.run_dir / LOCK, self.run_dir, warn)
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
                warn(f"{signal.Signals(number).name}: stopped while waiting for another run in {self.run_dir}")
                raise SystemExit(128 + number)
            if not is_waiting:
                warn(f"{error.partition(';')[0]}; waiting up to {config.wait_for_lock:g} minutes for its end")
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
        setup.check_run_folder(config)  # again: another run may have written there meanwhile
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
                training_state.remove_unfinished(folder)
                self._start_log()
                if started:
                    log.info(started)
                write_aside(self.run_dir / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
                if aside := training_state.set_aside(folder, self.start_step):
                    warn(f"resuming from step {self.start_step}; the checkpoints after it are now in {aside}")
                self._trim_metrics()
                self.status("running", self.start_step)
            except OSError as error:
                raise self._cannot_write(error) from None
        self.accelerator.wait_for_everyone()

    def _start_from(self, path: str) -> str:
        """Another run's averaged weights, as far as they fit, for the weights and their averages; returns what was done."""
        found = reading.read_weights(path, given={"resolution": self.config.resolution}, projectors=bool(self.encoders))
        problem: list[str | None] = [None]
        try:
            found.check()
        except UserError as error:  # of rank 0, which alone has read all of the file
            problem = [str(error)]
        if message := broadcast_object_list(problem)[0]:
            raise UserError(message)
        made = init_from(found, self.model, dataclasses.asdict(self.config), path)
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
                state = training_state.load_newest(folder, warn) if step == -1 else reading.load_step(folder, step)
                if state is not None:
                    state = reading.check_training_state(state, training_state.step_path(folder, state["step"]))
            except UserError as found:
                state, error = None, str(found)
        step, error = broadcast_object_list([state and state["step"], error])
        if error:
            raise UserError(error)
        if self.main or step is None:
            return state
        path = training_state.step_path(folder, step)
        return reading.check_training_state(tensor_files.load(path), path)

    def _check_same_run(self, state: dict) -> None:
        """Going on with another model, data order or VAE would silently be another run."""
        config = self.config
        own, recorded = dataclasses.asdict(config), state["config"]
        for name in (*SAME, *(["encoder_depth"] if self.encoders else []), *CHANGEABLE):
            if name in recorded and own[name] != recorded[name] and name not in config.allow_change:
                hint = f" (--allow-change {name} goes on all the same)" if name in CHANGEABLE else ""
                raise UserError(
                    f"--{name.replace('_', '-')} {format_option(own[name])}: the run in {self.run_dir} was started with {format_option(recorded[name])}{hint}"
                )
        if self.record != state["vae"]:
            raise UserError(f"--data-dir {config.data_dir}: its latents were made by another VAE than those of the run")
        size = state.get(DATA_SIZE, len(self.dataset))
        if type(size) is not int:
            raise UserError(f"{self.run_dir}: the checkpoint's {DATA_SIZE} must be a whole number")
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
            load_state_dict(self.accelerator.unwrap_model(self.model), state["model"], self.run_dir)
            for decay, model in self.ema.models.items():  # a decay that is new starts from the weights, as in a new run
                load_state_dict(model, state["ema"].get(decay, state["model"]), self.run_dir)
            self._load_optimizer(optimizer, state)
            self.meters.load_state_dict(state.get("meters"), self.main)
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
            worker_init_fn=init_data_worker,
        )
        folder = self.run_dir / "checkpoints"
        self.writer = async_writer.Writer(folder, config.keep_last, config.keep_every, warn)

    def _load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Moments and loss scale; AdamW's options are this run's own."""
        moments, parameters = state["optimizer"]["state"], optimizer.param_groups[0]["params"]
        try:
            for place, entry in moments.items():
                shapes = [entry[name].shape for name in ("exp_avg", "exp_avg_sq")]
                if shapes != [parameters[place].shape] * 2 or entry["step"].numel() != 1:
                    raise ValueError(f"moments of another shape for parameter {place}")
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
            if self.accelerator.scaler is not None and state.get("scaler"):
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except Exception as error:  # whatever stands there instead
            raise UserError(
                f"{training_state.step_path(self.run_dir / 'checkpoints', state['step'])}: its optimizer state is not one of this model: {first_line(error)}"
            ) from None

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
            warn(f"no pictures in training: {error}")

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
        kept = [line for line in lines if step_of_line(line) <= self.start_step]
        dropped = [line for line in lines if not step_of_line(line) <= self.start_step]
        if dropped:
            append_line(path.with_name("metrics.dropped.jsonl"), b"".join(line + b"\n" for line in dropped))
        if dropped or not content.endswith(b"\n"):
            write_aside(path, b"".join(line + b"\n" for line in kept))

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
        log_tracker_errors(accelerator.end_training)
        self._release_lock()
        if preempted:
            warn(
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
        self.meters.add(losses, training_times(draws, **options), "loss" + metric_suffix(variant))
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
        with warn_if_unwritable(self.run_dir / "metrics.jsonl"):
            append_line(self.run_dir / "metrics.jsonl", json.dumps({"step": self.step} | values) + "\n")
        known = {k: v for k, v in values.items() if v is not None}
        log.info(f"step {self.step}: " + ", ".join(f"{k} {v:.6g}" for k, v in known.items()))
        for tracker in self.accelerator.trackers:
            log_tracker_errors(lambda t=tracker: t.log(known, step=self.step))
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
        count = min(len(self.held_out), VAL_SAMPLES)
        sums = torch.zeros(len(shown), device=accelerator.device)
        bounds = [count * r // accelerator.num_processes for r in range(accelerator.num_processes + 1)]
        first, last = bounds[accelerator.process_index : accelerator.process_index + 2]
        batch_size = len(self.places)
        for start in range(first, last, batch_size):
            indices = range(start, min(start + batch_size, last))
            batch = torch.utils.data.default_collate(self.held_out.__getitems__(list(indices)))
            batch = {k: batch[k].to(accelerator.device) for k in ("moments", "label")}
            with accelerator.autocast():
                losses = val_losses(
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
        return {"val_loss" + metric_suffix(variant): mean for variant, mean in zip(shown, means, strict=True)}

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
            with warn_if_unwritable(path):
                save_png(picture, path)
            for tracker in accelerator.trackers:
                log_tracker_errors(lambda t=tracker: t.log_images({"samples": grids[views - 1]}, step=self.step))

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
                f"{training_state.step_path(self.writer.folder, self.step)}: could not be written: {self.writer.error}; the last good checkpoint is {self._newest_checkpoint()}"
            )

    def _newest_checkpoint(self, up_to: int | None = None) -> str:
        """The newest one of this run (up to a step), as messages name it."""
        self.writer.wait()
        steps = [step for step in training_state.saved_steps(self.writer.folder) if up_to is None or step <= up_to]
        return str(training_state.step_path(self.writer.folder, steps[-1])) if steps else "none: nothing was saved before"

    def status(self, state: str, step: int) -> None:
        """status.json: running, preempted, finished or failed, and the step."""
        if self.main:
            with warn_if_unwritable(self.run_dir / "status.json"):
                write_aside(self.run_dir / "status.json", json.dumps({"state": state, "step": step}) + "\n")

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
            arguments = {"wandb": {"name": config.exp_name, "dir": str(folder), "mode": wandb_mode()}}
            if arguments["wandb"]["mode"] == "online":
                arguments["wandb"] |= {"id": read_or_create(folder / "wandb_id", secrets.token_hex(4)), "resume": "allow"}
        log_tracker_errors(lambda: self.accelerator.init_trackers("elit", config=run, init_kwargs=arguments))


def metric_suffix(variant: dict) -> str:
    """What a forward's `variant` adds to the name of its loss."""
    labels = {"active_stage": "stage", "inference_budget": "budget"}
    return "".join(f"_{labels[k]}_{v:g}" for k, v in variant.items())
