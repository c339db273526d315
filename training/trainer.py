"""The training loop."""

import dataclasses
import signal
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import async_writer, training_state
from checkpoint.records import TEXT
from common.distributed import data_workers
from common.errors import UserError
from common.logging import log, warn
from config.options import TrainConfig
from flows import flow_of
from loss import Projecting, alignment_loss, drop_conditions
from models.conditioning import NullText, condition_of, map_condition
from models.encoders import describe_encoders, encoder_names
from models.vae import sample_latents
from training import resume, scores, setup, sharding, snapshots, trackers
from training.alignment import Alignment, aligned_steps
from training.budgets import budget_schedule, parts_by_budget, trained_budgets
from training.data_order import DATA_POSITION, Progress, StepBatches, create_loader, total_steps
from training.optim import EMA, IdleParameters, clip_gradients, create_optimizer, create_schedule, load_optimizer
from training.preemption import Preemption
from training.profiler import StepProfiler
from training.run_data import open_data
from training.run_dir import RunDir, warn_if_unwritable
from training.stats import Speed, TrainingStats, peak_tflops
from training.validation import Interrupted, Validation, save_samples


class Trainer:
    """One training run.

    The constructor builds the model on the CPU and opens the data; it writes nothing, and takes no memory of a device that
    another run in the same folder may still need. `run` does the rest: it takes the folder, resumes, trains.
    """

    def __init__(self, config: TrainConfig):
        """Raises UserError where options, data and run folder do not fit each other."""
        self.accelerator = accelerator = setup.create_accelerator(config)
        wait = setup.process_wait(config)
        self.mesh = sharding.create_mesh(config.shard, accelerator.num_processes, accelerator.device, wait)
        self.run_dir = RunDir(config, accelerator.is_main_process)
        self.run_dir.check()
        config = resume.with_recorded_split(config, self.run_dir)
        self.data = open_data(config, accelerator.num_processes)
        local = config.batch_size // accelerator.num_processes
        self.batch_slice = range(accelerator.process_index * local, (accelerator.process_index + 1) * local)
        self.flow, self.budgets, self.schedule_of_budgets = flow_of(config), trained_budgets(config), budget_schedule(config)
        grid = setup.token_grid(config, self.data.record)
        targets = describe_encoders(encoder_names(config.enc_type, config.proj_coeff), config.resolution, grid)
        torch.manual_seed(config.seed)
        self.model = setup.build_model(config, self.data.record, [t.z_dim for t in targets], self.data.text_record)
        if isinstance(self.model, NullText) and self.data.dataset.text is not None:
            self.model.set_null_text(*self.data.dataset.text.null)
        self.config = self.run_dir.config = setup.as_built(config, self.model, self.data)
        peak = peak_tflops(accelerator.device, config.mixed_precision, config.allow_tf32)
        self.speed = Speed(self.model, self.budgets, targets, accelerator.num_processes, peak)
        kinds = dict.fromkeys("loss" + condition.metric_suffix for condition in self.flow.conditions(self.budgets))
        losses = ["loss", *(kind for kind in kinds if kind != "loss"), *(["alignment_loss"] if targets else [])]
        self.stats = TrainingStats(losses, accelerator.device)
        self.idle = IdleParameters()
        self.step = self.saved_step = 0

    # ------------------------------------------------------------------------------------------------------ set-up

    def run(self, preemption: Preemption) -> None:
        """Train to the end, or to the step at which the processes are told to stop: then exit as that signal would have it."""
        with self.run_dir.lock(preemption):
            preemption.at_abandon = lambda: self.run_dir.write_status("preempted", self.step)
            self.open()
            try:
                preemption.watch(self.step)
                self._loop(preemption)
                self._finish_saving()
            except BaseException:
                preemption.end()  # a failed process takes the time that its last checkpoint needs
                self.writer.wait()
                self.run_dir.write_status("failed", self.step)
                raise
            self.accelerator.wait_for_everyone()  # who leaves early is taken for failed, and its launcher ends the others
            preemption.end()
            is_preempted = self.step < self.total_steps or self.validation_due or self.scores_due
            self.run_dir.write_status("preempted" if is_preempted else "finished", self.step)
            trackers.log_tracker_errors(self.accelerator.end_training)
        if is_preempted:
            name = signal.Signals(preemption.signal).name
            warn(f"{name}: stopped after step {self.step}; --resume-step -1 continues from there")
            raise SystemExit(128 + preemption.signal)

    def open(self) -> None:
        """Bring model, data and folder to where the run stands. All that could refuse the run comes before the first write."""
        config, accelerator = self.config, self.accelerator
        self.run_dir.check()  # again: another run may have written there meanwhile
        state, summary = resume.load_state(self.run_dir, config.resume_step, lazy=self.mesh is not None), ""
        if state is not None:
            resume.check_same_run(config, state, self.data, self.run_dir)
        elif config.init_from:
            summary = setup.init_weights(config.init_from, config, self.model, self.run_dir.is_main)
        self._prepare()
        if state is not None:
            self._load(state)
        self.schedule = create_schedule(self.optimizer.optimizer, config, self.step, self.total_steps)
        self.validation = self._open_validation()
        self.scores = self._open_scores()
        accelerator.wait_for_everyone()  # all have read before anything is written
        self.run_dir.begin(self.step, summary)
        accelerator.wait_for_everyone()
        self._start_logging()

    def _prepare(self) -> None:
        """Put everything on the device, as a new run starts."""
        config, device, data = self.config, self.accelerator.device, self.data
        self.alignment = Alignment(config, setup.token_grid(config, data.record), device)
        if self.mesh is None:
            self.model.to(device)
            place = self.accelerator.process_index, self.accelerator.num_processes
            self.ema = EMA(self.model, config.ema_decay, *place, config.posthoc_ema)
            setup.adapt_blocks(self.model, config, device)
            self.sharded, group = None, None
            self.model, self.optimizer = self.accelerator.prepare(self.model, create_optimizer(self.model, config))
        else:  # accelerate knows FSDP2 on CUDA alone
            frame = sharding.on_meta(self.model)
            setup.adapt_blocks(self.model, config, device)
            self.sharded = sharding.ShardedModel(self.model, frame, self.mesh, self.accelerator, config)
            self.ema, group = self.sharded.ema, self.sharded.group
            self.optimizer = self.accelerator.prepare(create_optimizer(self.sharded, config))
        self.writer = async_writer.Writer(self.run_dir.checkpoints, config.keep_last, config.keep_every, warn, group)
        self.snapshots = snapshots.SnapshotWriter(config, self.run_dir, data)
        self.validation_due = self.scores_due = False
        self._go_to(Progress(0, 0, len(data.dataset), config.batch_size))

    def _go_to(self, progress: Progress) -> None:
        """Read the data from this place on."""
        config, data = self.config, self.data
        self.progress = progress.converted(len(data.dataset), config.batch_size)
        self.total_steps = total_steps(config, self.progress, len(data.dataset))
        self.step = self.saved_step = progress.step
        place = (len(data.dataset), config.batch_size, self.batch_slice, config.seed)
        start, stop = (self._data_position(step) for step in (self.step, max(self.step, self.total_steps)))
        batches = StepBatches(*place, start, stop, forward=self.step * config.gradient_accumulation_steps)
        draw = partial(self.flow.draws, config.seed, batch_slice=self.batch_slice, shape=data.shape)
        image_forwards = aligned_steps(config) * config.gradient_accumulation_steps
        self.loader = create_loader(data.dataset, draw, batches, config.num_workers, self.accelerator.device, image_forwards)

    def _data_position(self, step: int) -> int:
        """The batches of the data order before optimizer step `step`."""
        return self.progress.position + (step - self.progress.step) * self.config.gradient_accumulation_steps

    def _load(self, state: dict[str, Any]) -> None:
        """Resume from a training state."""
        where = training_state.step_path(self.run_dir.checkpoints, state["step"])
        whole = partial(resume.load_weights, self.model, self.ema, self.accelerator)
        state = (whole if self.sharded is None else self.sharded.load)(state, where)
        load_optimizer(self.optimizer.optimizer, self.accelerator.scaler, state, where)
        self.stats.load_state_dict(state.get("meters"), self.accelerator.is_main_process)
        self.validation_due = state.get(resume.VALIDATION_DUE, False)
        self._go_to(Progress.of_state(state, len(self.data.dataset)))

    def _open_validation(self) -> Validation | None:
        if not self.config.sampling_steps or (self.step >= self.total_steps and not self.validation_due):
            return None
        data = self.data
        return Validation(self.config, self.accelerator, data.val_data, data.record, data.conditions)

    def _open_scores(self) -> scores.Scores | None:
        """Networks and reference of --eval-steps. What the checkpoint's step lacks, since the run was killed, is due."""
        self.scores_due = scores.is_scored_at(self.step, self.config, self.total_steps) and not scores.is_recorded(
            self.config, self.run_dir, self.step
        )
        if not self.config.eval_steps or (self.step >= self.total_steps and not self.scores_due):
            return None
        vae = self.validation.vae if self.validation is not None else None
        opened = scores.Scores(self.config, self.accelerator, self.run_dir, self.data, vae)
        opened.find_best(self.step)
        self.writer.keep_best(opened.best_step)
        return opened

    def _start_logging(self) -> None:
        config, accelerator = self.config, self.accelerator
        trackers.start_trackers(accelerator, config, self.run_dir, self.step)
        for message in setup.ema_warnings(config, self.total_steps):
            warn(message)
        parameters = sum(p.numel() for p in self.model.parameters())
        log.info(
            f"{config.model}: {parameters:,} parameters; {len(self.data.dataset):,} samples; "
            f"steps {self.step} to {self.total_steps}; global batch {config.batch_size * config.gradient_accumulation_steps} = "
            f"{accelerator.num_processes} processes × {len(self.batch_slice)} × {config.gradient_accumulation_steps}; "
            f"{accelerator.device.type}, {config.mixed_precision}"
        )

    # -------------------------------------------------------------------------------------------------------- loop

    def _loop(self, preemption: Preemption) -> None:
        config, is_main = self.config, self.run_dir.is_main
        bar_options = {"total": self.total_steps, "initial": self.step, "disable": not is_main}
        profiled = config.profile_steps if is_main else None
        with (
            data_workers(self.loader, "--resume-step -1 resumes from the newest checkpoint") as batches,
            tqdm(**bar_options, desc="train", unit="step", mininterval=1) as bar,
            StepProfiler(profiled, self.run_dir.path, self.accelerator.device) as profiler,
        ):
            self.snapshots.save(self.ema, self.step, self.total_steps)
            if self.validation_due:
                self.validate(preemption)
                self.saved_step = -1  # its checkpoint says that it is due
            if self.scores_due:
                self.score(preemption)
            first = self.step + 1
            self.speed.start()
            while not preemption.reached(self.step) and self.step < self.total_steps:
                self.step += 1
                profiler.begin_step(self.step)
                with self.speed.host():
                    self.train_step(batches)
                bar.update()
                # Waiting for the device is allowed from here on.
                if self.step % config.log_every == 0 or self.step in (1, self.total_steps):
                    bar.set_postfix_str(self.log_line())
                if config.sampling_steps and (self.step % config.sampling_steps == 0 or self.step == 1):
                    with self.speed.untimed():
                        self.validate(preemption)
                with self.speed.untimed():
                    self.snapshots.save(self.ema, self.step, self.total_steps)
                is_scored = scores.is_scored_at(self.step, config, self.total_steps)
                if self.step % config.checkpointing_steps == 0 or self.step == self.total_steps or is_scored:
                    with self.speed.untimed():
                        self.save()
                elif self.step == first:
                    self._reserve_memory()
                if is_scored:
                    with self.speed.untimed():
                        self.score(preemption)

    def train_step(self, batches: Iterator[dict[str, Any]]) -> None:
        """One optimizer step; the host waits for the device nowhere."""
        config, accelerator = self.config, self.accelerator
        for _ in range(config.gradient_accumulation_steps):
            with accelerator.accumulate(self.model):
                if self.sharded is not None:
                    self.sharded.begin_micro_step(accelerator.sync_gradients)
                accelerator.backward(self.forward(next(batches)))
                if accelerator.sync_gradients:
                    self.idle.drop_gradients()
                    clip = clip_gradients if self.sharded is None else self.sharded.clip_gradients
                    norm = clip(accelerator, self.model.parameters(), self.optimizer.optimizer, config.max_grad_norm)
                    skip = self.stats.step(norm)
                    if accelerator.scaler is None:  # which sets this itself
                        self.optimizer.optimizer.found_inf = skip  # fused AdamW then leaves weights and state as they are
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.schedule.step()
        self.ema.update(self.step)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Mean loss of this process's images with their draws: of one forward, or of one for each budget of a schedule."""
        device, draws = self.accelerator.device, batch["draws"]
        moved = {k: batch[k].to(device, non_blocking=True) for k in ("moments", "image") if k in batch}
        moved["y"] = map_condition(lambda v: v.to(device, non_blocking=True), condition_of(batch))
        moved["draws"] = draws.to(device)
        if self.schedule_of_budgets is None:
            return self._forward(moved, self.budgets[int(draws.level * len(self.budgets))])  # one for all processes
        parts = parts_by_budget(self.schedule_of_budgets, self.flow.times(draws), moved)
        return torch.stack([share * self._forward(part, budget) for budget, share, part in parts]).sum()

    def _forward(self, batch: dict[str, Any], budget: float | None) -> Tensor:
        config, draws = self.config, batch["draws"]
        x = sample_latents(batch["moments"], draws.posterior, self.data.record)
        y = drop_conditions(self.model, batch["y"], draws, config.cfg_prob)
        aligned = self.alignment.acts(self.step)
        model = Projecting(self.model) if aligned else self.model
        losses, times, condition = self.flow.loss(model, x, draws, y, budget)
        self.stats.add(losses, times, "loss" + condition.metric_suffix)
        self.speed.add(len(x) * self.accelerator.num_processes, budget, aligned)
        loss = losses.mean()
        if isinstance(self.model, DistributedDataParallel):
            loss = self.idle.touch(loss, self.model.module.unused_parameters(condition.stage, aligned))
        if isinstance(model, Projecting):  # REPA: its projections are to be like the encoders' features
            with self.accelerator.autocast():
                features = self.alignment.features(batch["image"])
            alignment = alignment_loss(model.projections, features)
            self.stats.add_mean("alignment_loss", alignment)
            loss = loss + config.proj_coeff * alignment
        return loss

    # ----------------------------------------------------------------------------------------------------- reports

    def log_line(self) -> str:
        """Report the means and the speed since the last line; returns them in short. Waits for the device."""
        values = self.stats.read(self.accelerator) | {"lr": float(self.schedule.get_last_lr()[0])}
        values |= self.speed.read(self.accelerator.device)
        in_a_row, since = (int(values.pop(name) or 0) for name in ("longest", "since"))
        self.report(values)
        if in_a_row >= self.config.max_skipped_steps:
            self.writer.wait()
            good = self.run_dir.newest_checkpoint(self.step - since)
            raise UserError(
                f"step {self.step}: {in_a_row} steps in a row had a gradient that is not finite, and were skipped; "
                f"the last good checkpoint is {good}"
            )
        self.speed.start()
        loss = float("nan") if values["loss"] is None else values["loss"]
        return f"loss {loss:.4f}, {values['images_per_second']:.1f} images/s"

    def report(self, values: Mapping[str, float | None]) -> None:
        """One line in metrics.jsonl and in the tracker; `None` for what could not be measured."""
        known = self.run_dir.append_metrics(self.step, values)
        trackers.log_values(self.accelerator, known, self.step)
        self.run_dir.write_status("running", self.step)

    def validate(self, preemption: Preemption) -> None:
        """Validation loss and sample images of the averaged weights. A signal leaves them to the run that resumes this one."""
        self.validation_due = False
        if self.validation is None:
            return
        model = self.validation.narrowed(self.ema.model())
        try:
            losses = self.validation.validate(model, lambda: preemption.signal > 0)
            grids = self.validation.sample_images(model, self.data.shape, lambda: preemption.signal > 0)
        except Interrupted:
            self.validation_due = True
            return
        if losses:
            self.report(losses)
        if grids and self.run_dir.is_main:
            path = self.run_dir.samples / f"{self.step:07d}.png"
            with warn_if_unwritable(path):
                save_samples(grids, path)
                self.data.conditions.save_names(path.with_name("captions.txt"), len(grids[0]))
            trackers.log_images(self.accelerator, grids[self.flow.num_views - 1], self.step)

    def score(self, preemption: Preemption) -> None:
        """Score the averaged weights. A run that is ended meanwhile does that first when it resumes, from this step's checkpoint."""
        if self.scores is None:
            return
        self.scores_due = True
        self.writer.wait()
        try:
            values = self.scores.score(self.ema.model(), self.step, lambda: preemption.signal > 0)
        except Interrupted:
            return
        self.scores_due = False
        self.report(values)
        self.scores.record_best(self.step, values)
        self.writer.keep_best(self.scores.best_step)

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, of a sharded run with DTensors; every process takes part."""
        scaler, sharded = self.accelerator.scaler, self.sharded
        return {
            "model": self.accelerator.unwrap_model(self.model).state_dict() if sharded is None else sharded.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict() if sharded is None else sharded.optimizer_state(self.optimizer.optimizer),
            "scheduler": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "vae": self.data.record.to_dict(),
            **({} if self.data.text_record is None else {TEXT: self.data.text_record.to_dict()}),
            resume.DATA_SIZE: len(self.data.dataset),
            resume.DATA_LABELS: self.data.labels_sha256,
            DATA_POSITION: self._data_position(self.step),
            resume.VALIDATION_DUE: self.validation_due,
            "meters": self.stats.state_dict(),
        }

    def save(self) -> None:
        """checkpoints/{step}.pt, of a sharded run {step}.dcp, written in the background. A failing write harms none before it."""
        self.stats.gather(self.accelerator)
        self.saved_step = self.step
        state = self.state()
        if self.run_dir.is_main or self.sharded is not None:
            good = self.step - int(self.stats.streak)  # the last step that was not skipped
            self.writer.save(self.step, state, good)
            log.info(f"step {self.step}: saving")

    def _reserve_memory(self) -> None:
        """Make the memory of the first checkpoint, so that it does not wait for it."""
        state = self.state()
        if self.run_dir.is_main or self.sharded is not None:
            self.writer.copy(state)

    def _finish_saving(self) -> None:
        """The last step's checkpoint, on the disk."""
        if self.saved_step != self.step:
            self.save()
        self.writer.wait()
        self.snapshots.wait()
        if self.writer.error is not None:
            problem = f"{self.writer.path(self.step)}: could not be written: {self.writer.error}"
            raise UserError(f"{problem}; the last good checkpoint is {self.run_dir.newest_checkpoint()}")
