"""`train.py --plan`: prints and checks what a run would do, cost and need.

Nothing here needs an accelerator or the memory of the model: costs are counted on the meta device and on fake tensors.
"""

import contextlib
import dataclasses
import math
import shutil
import tempfile
from collections.abc import Iterator

import numpy as np
import torch

from checkpoint import reading
from checkpoint.init_from import init_from
from common.errors import UserError
from common.logging import warn
from config.options import TrainConfig
from models.costs import projector_flops
from models.encoders import TargetEncoder, describe_encoders, encoder_names, load_encoders
from models.vae import SD_VAE, load_vae
from training.alignment import aligned_steps
from training.budgets import mean_training_flops, trained_budgets
from training.cards import CARDS, find_card
from training.cluster import MIB, Cluster, Scheme, mean
from training.memory import GIB, activation_bytes, ema_copies, format_gib, process_bytes, state_bytes
from training.resume import with_recorded_split
from training.run_data import RunData, open_data
from training.run_dir import RunDir
from training.setup import build_model, ema_warnings, token_grid
from training.sharding import COMM_TYPES, group_size, launched_processes
from training.stats import encoder_flops
from training.step_time import Machine, estimate
from training.step_trace import compiled, trace_step

SAMPLES_READ = 64  # by --plan, evenly spread


class Plan:
    """`train.py --plan`: the account of a run and every mistake in it, found without training or writing anything."""

    def __init__(self, config: TrainConfig):
        config = self.config = with_recorded_split(config, RunDir(config, is_main=True))
        self.processes = config.plan_processes or launched_processes()
        self.local_batch = max(1, config.batch_size // self.processes)
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.data: RunData | None = None
        self.record, self.text = SD_VAE, None  # where the data do not tell
        self.encoders: list[TargetEncoder] = []
        with self.checked():
            self.data = open_data(config, self.processes)
            self.record, self.text = self.data.record, self.data.text_record
        with self.checked():
            names = encoder_names(config.enc_type, config.proj_coeff)
            self.encoders = describe_encoders(names, config.resolution, token_grid(config, self.record))
        self.budgets = trained_budgets(config)
        with torch.device("meta"):
            self.model = build_model(config, self.record, [e.z_dim for e in self.encoders], self.text)

    @contextlib.contextmanager
    def checked(self) -> Iterator[None]:
        """Keep a mistake met inside, and continue with the plan."""
        try:
            yield
        except UserError as error:
            self.errors.append(str(error))

    def say(self, title: str, text: str) -> None:
        """Add a line."""
        self.lines.append(f"{title:<12}{text}")

    def run(self) -> str:
        """The whole account, as text. Raises UserError, after printing it, if the run could not be carried out."""
        self.describe_model()
        self.describe_data()
        self.describe_memory()
        self.describe_step()
        self.describe_outputs()
        self.describe_parts()
        print("\n".join(self.lines), flush=True)
        if self.errors:
            raise UserError("; also: ".join(self.errors))
        return "\n".join(self.lines)

    def describe_model(self) -> None:
        """Lines on the model and what a step computes."""
        config, model = self.config, self.model
        parameters = sum(p.numel() for p in model.parameters())
        budgets = ""
        if self.budgets != [None]:
            few = [f"{b:g}" for b in self.budgets]
            budgets = f", trained at budget{'s' * (len(few) > 1)} {' … '.join(dict.fromkeys([few[0], few[-1]]))}"
        self.say("model", f"{config.model}: {parameters:,} parameters, {math.prod(model.grid_size)} tokens{budgets}")
        images = config.batch_size * config.gradient_accumulation_steps
        forward = mean_training_flops(config, model) + projector_flops(model)
        self.targets = images * sum(encoder_flops(e) for e in self.encoders)
        self.flops = 3 * forward * images + self.targets  # the backward pass is two forwards
        text = f"{_tera(self.flops)} TFLOPs per iteration, forward and backward of {images} images"
        if self.encoders:
            text += f", {_tera(self.targets)} of them in the encoders"
        self.say("compute", text)

    def describe_data(self) -> None:
        """Lines on batches, data, number of steps and time."""
        config, data = self.config, self.data
        for message in ema_warnings(config, data.total_steps) if data is not None else ():
            warn(message)
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
        if self.text is not None:
            classes = f"captions of {self.text.length} tokens × {self.text.width} by {self.text.encoder}"
        images = " and images" if self.encoders else ""
        images += ", each mirrored half the time" if data.dataset.flip else ""
        self.say(
            "data", f"{config.data_dir}: {count:,} samples, {classes}; latents {C} × {h} × {w} of {self.record.vae}{images}"
        )
        if data.val_data is not None:
            self.say("validation", f"{config.val_data_dir}: {len(data.val_data):,} samples")
        per_epoch = data.batches_per_epoch / config.gradient_accumulation_steps
        epochs = data.total_steps / per_epoch
        self.say("steps", f"{data.total_steps:,} at {per_epoch:,.6g} per epoch: {epochs:,.4g} epochs")
        if config.plan_tflops:
            without = max(0, data.total_steps - aligned_steps(config)) if self.encoders else 0  # steps that do not align
            flops = self.flops * data.total_steps - self.targets * without
            seconds = flops / (config.plan_tflops * 1e12 * self.processes)
            each = self.flops / (config.plan_tflops * 1e12 * self.processes)
            rate = config.batch_size * config.gradient_accumulation_steps / each
            self.say(
                "time",
                f"{_duration(seconds)} at {config.plan_tflops:g} TFLOP/s per process: {each:.3g} s per step, {rate:,.0f} images/s",
            )
        else:
            self.say("time", "unknown; --plan-tflops N estimates it at N TFLOP/s per process")

    def describe_memory(self) -> None:
        """Lines on what a process holds in memory."""
        config, state = self.config, process_bytes(self.model, self.config, self.processes)
        ends = sorted(set(self.budgets[:1] + self.budgets[-1:]), key=lambda b: -(b or 1))
        is_sharded = group_size(config.shard, self.processes) > 1
        place = (config, self.record, self.encoders, self.local_batch)
        activations = [activation_bytes(*place, b, self.text, is_sharded) for b in ends]
        encoders = sum(p.numel() * p.element_size() for e in self.encoders for p in e.parameters())
        self.memory = state.total + activations[0] + encoders
        self.say(
            "memory",
            f"{format_gib(self.memory)} per process and {self.local_batch} images, {config.mixed_precision}; kernels' workspace not counted",
        )
        names = {"weights": state.weights, "gradients": state.gradients, "AdamW": state.optimizer, "EMA": state.ema}
        names |= {name: size for name, size in (("gathered", state.gathered), ("encoders", encoders)) if size}
        for name, size in names.items():
            self.say("", f"{name:<12}{format_gib(size)}")
        at = [
            f"{format_gib(size)}{'' if b is None else f' at budget {b:g}'}" for b, size in zip(ends, activations, strict=True)
        ]
        self.say("", f"{'activations':<12}{', '.join(at)}")
        if config.plan_card is None and torch.cuda.is_available():
            self.check_memory(torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory)
        whole = state_bytes(self.model, ema_copies(config))
        self.checkpoint_bytes = whole.weights + whole.optimizer + whole.ema

    def check_memory(self, card: str, available: float) -> None:
        """A mistake where a process needs more than the card has."""
        if self.memory > available:
            self.errors.append(
                f"--batch-size {self.config.batch_size}: {format_gib(self.memory)} per process, but {card} has {format_gib(available)}"
            )

    def describe_step(self) -> None:
        """Lines on the estimated time of a step by the data sheet of a card, and on what is sent."""
        config, name = self.config, self.config.plan_card
        if name is None and torch.cuda.is_available():
            name = torch.cuda.get_device_name(0)
        card = find_card(name) if name is not None else None
        if config.plan_card is not None and card is None:
            self.errors.append(f"--plan-card {config.plan_card}: not known; choose from {', '.join(CARDS)}")
        if name is None or card is None:
            return
        if config.plan_card is not None:
            self.check_memory(config.plan_card, card.memory * GIB)
        peak = card.peak(config.mixed_precision, config.allow_tf32)
        if peak is None:
            self.say("estimate", f"none: the peak of {name} in float32 without --allow-tf32 is not known")
        elif config.elit_budget_schedule is not None:
            self.say("estimate", "none: --elit-budget-schedule makes several forwards of a step")
        else:
            self.estimate_step(name, Machine.of(card, peak))

    def estimate_step(self, name: str, machine: Machine) -> None:
        """Lines on a step of these cards: the mean over the largest, the middle and the smallest budget."""
        config, local = self.config, self.local_batch
        cluster = Cluster(self.processes, min(config.plan_per_node, self.processes))
        size, micro_steps = group_size(config.shard, self.processes), config.gradient_accumulation_steps
        scheme = Scheme(size, COMM_TYPES[config.comm_dtype].itemsize, config.bucket_cap_mb * MIB, micro_steps)
        repa = local * (3 * projector_flops(self.model) + sum(map(encoder_flops, self.encoders)))
        budgets = list(dict.fromkeys(self.budgets[i] for i in (0, len(self.budgets) // 2, -1)))
        estimates = []
        for budget in budgets:
            trace = trace_step(config, local, budget, processes=self.processes, record=self.record, text=self.text)
            trace = trace if config.compile is False else compiled(trace)
            estimates.append(estimate(trace, machine, cluster, scheme, repa))
        timing = mean([e.timing for e in estimates])
        device, host = (
            1e3 * sum(values) / len(values) for values in zip(*((e.device, e.host) for e in estimates), strict=True)
        )
        several = "at budget" if len(budgets) == 1 else "the mean of budgets"
        at = "" if budgets == [None] else f", {several} {', '.join(f'{b:g}' for b in budgets)}"
        rate = local * micro_steps * self.processes / timing.seconds
        self.say("estimate", f"{timing.seconds:.3g} s per step on {self.processes:,} × {name}{at}: {rate:,.0f} images/s")
        how = "eager" if config.compile is False else "compiled"
        wait = f"{1e3 * timing.waiting:.3g} ms waiting for others; {timing.sent / 1e9:.3g} GB sent by each"
        self.say("", f"{device:.3g} ms of the GPU, {host:.3g} ms of the host to launch it ({how}), {wait}")
        self.say("", f"assumes {machine.describe()}; {cluster.describe()}")

    def describe_outputs(self) -> None:
        """A line on the run folder, and whether its checkpoints fit on the disk."""
        config = self.config
        run_dir = RunDir(config, is_main=True)
        steps: list[int] = []
        with self.checked():
            steps = run_dir.check()
        begin = ""
        if steps and config.resume_step:
            begin = f", resumes from step {steps[-1] if config.resume_step == -1 else config.resume_step}"
        existing = next(p for p in (run_dir.path, *run_dir.path.absolute().parents) if p.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                free = shutil.disk_usage(existing).free
        except OSError as error:
            self.errors.append(f"--output-dir {config.output_dir}: cannot write {existing}: {error.strerror}")
            return
        text = f"{run_dir.path}{begin}"
        if self.data is not None:
            count = self.checkpoints_kept(self.data.total_steps)
            need = count * self.checkpoint_bytes
            text += f": {count} checkpoints of {format_gib(self.checkpoint_bytes)} = {format_gib(need)}"
            files, size = self.snapshots_written(self.data.total_steps)
            text += f", {files} snapshots = {format_gib(size)}" if files else ""
            text += f"; {format_gib(free)} free"
            if need + size > free:
                more = f" and {files} snapshots of {format_gib(size)}" if files else ""
                self.errors.append(
                    f"--output-dir {config.output_dir}: {count} checkpoints of {format_gib(self.checkpoint_bytes)}{more} need {format_gib(need + size)}, but {format_gib(free)} are free (--checkpointing-steps, --keep-last)"
                )
        self.say("outputs", text)

    def snapshots_written(self, total_steps: int) -> tuple[int, int]:
        """How many files of --snapshot-steps and --posthoc-ema are written until the end, and their bytes."""
        config, size = self.config, sum(p.numel() for p in self.model.parameters())
        tables = sum(b.numel() * b.element_size() for b in self.model.buffers())
        own = -(-total_steps // config.snapshot_steps) if config.snapshot_steps else 0
        averages = len(config.posthoc_ema) * -(-total_steps // config.posthoc_ema_steps)
        return own + averages, own * (4 * size + tables) + averages * (2 * size + tables)

    def checkpoints_kept(self, total_steps: int) -> int:
        """The most that lie in the folder at one time: by --keep-last, --keep-every and --keep-best, and the one being written."""
        config = self.config
        every = [n for n in (config.checkpointing_steps, config.eval_steps) if n]
        at = sum(total_steps // n for n in every) - (total_steps // math.lcm(*every) if len(every) > 1 else 0)
        count = at + all(total_steps % n for n in every)  # one every so many steps, and one at the end
        if not config.keep_last:
            return count
        newest_old = max(count - config.keep_last, 0) * config.checkpointing_steps
        kept = newest_old // math.lcm(config.checkpointing_steps, config.keep_every) if config.keep_every else 0
        return min(count, config.keep_last + 1 + kept + config.keep_best)

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
        if config.eval_steps:
            budgets = f" at {len(config.eval_budgets)} budgets" if config.eval_budgets else ""
            images = f"{config.eval_samples:,} images{budgets} against {config.eval_ref}"
            self.say("scores", f"{' '.join(config.eval_metrics)} every {config.eval_steps:,} steps and at the end, {images}")
        if self.encoders:
            with self.checked():
                names = [e.name for e in self.encoders]
                load_encoders(names, config.resolution, self.model.feature_grid, config.encoder_weights)
                sides = ", ".join(f"{e.name} at {e.side} px" for e in self.encoders)
                until = "" if config.proj_until is None else f", in the first {config.proj_until:,} steps"
                self.say("REPA", f"{sides}; weight {config.proj_coeff:g}{until}")
        if config.init_from:
            with self.checked():
                weights = reading.read_weights(
                    config.init_from, given={"resolution": config.resolution}, projectors=bool(self.encoders)
                )
                weights.check()
                made = init_from(weights, self.model, dataclasses.asdict(config), config.init_from)
                self.lines.append(made.summary())


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.1f}" if flops >= 1e13 else f"{flops / 1e12:.3g}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"
