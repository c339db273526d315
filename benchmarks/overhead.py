"""What the training loop adds to a bare step, and what a checkpoint costs it: `python -m benchmarks.overhead`.

The real loop (data from disk, draws, clipping, AdamW, two EMAs, a logged line every step) in turn with forward, backward and
AdamW alone; then the pause of a checkpoint, a plain copy of its tensors into memory that is already there, and saving it
while training waits; then `load_model` with and without its checks (checksum, finite values). Each line is the median over the rounds of the ratio of two times of the same round.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import models
from benchmarks.kill_resume import make_data
from benchmarks.train_step import HEADER, Line, durations, quantile
from checkpoint import reading, training_state
from checkpoint.weights import build_model
from common.errors import cli_main
from config.options import TrainConfig
from training.trainer import Trainer

STEP_BOUND, PAUSE_BOUND, CHECKS_BOUND = 1.05, 1.5, 1.02
SIDE, CLASSES = 32, 1000


class BareStep:
    """Forward, backward and AdamW on a batch that is already on the device."""

    def __init__(self, model: nn.Module, batch_size: int, precision: str):
        device = next(model.parameters()).device
        self.model, self.precision = model, precision
        self.x, self.target = (torch.randn(batch_size, 4, SIDE, SIDE, device=device) for _ in range(2))
        self.t = torch.rand(batch_size, device=device)
        self.y = torch.randint(CLASSES, (batch_size,), device=device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def __call__(self) -> None:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            velocity = self.model(self.x, self.t, self.y)
        (velocity.float() - self.target).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def tensors(value) -> Iterator[Tensor]:
    """All tensors of a nested state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def show(names: Sequence[str], rounds: list[tuple[float, ...]]) -> None:
    """The median time of each column, and the head of the ratios that follow."""
    for name, seconds in zip(names, zip(*rounds, strict=True), strict=True):
        print(f"{name:36} {1000 * quantile(list(seconds), 0.5):8.1f} ms")
    print(HEADER)


def load_rounds(trainer: Trainer, repeats: int) -> None:
    """Print what the checks of a checkpoint add to loading it: the first time, and once the file is known."""
    path = training_state.step_path(trainer.writer.folder, 0)
    training_state.save(path, trainer.state())
    time.sleep(4)  # a file written a moment ago is not remembered

    def unchecked() -> None:
        build_model(reading._read(path, "ema", {}), path)

    timed = functools.partial(durations, torch.device("cpu"), time.process_time)
    (first,) = timed(lambda: reading.load_model(path))
    rounds = []
    load = functools.partial(reading.load_model, path)
    for r in range(10 * repeats):  # they are short
        checked, bare = timed(load, unchecked) if r % 2 else reversed(timed(unchecked, load))
        rounds.append((checked, bare))
    print(f"checkpoint of {path.stat().st_size / 1e6:.0f} MB, loaded and checked the first time: {1000 * first:.1f} ms of CPU")
    show(("load_model, a file that is known", "without checks"), rounds)
    print(Line("load_model / without checks", [a / b for a, b in rounds], 1.0, CHECKS_BOUND), "\n", flush=True)
    path.unlink()


@cli_main
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="overhead.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="SiT-S/2")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=11, help="rounds of both parts [%(default)s]")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before, not counted [%(default)s]")
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--workers", type=int, default=1, help="data loading processes [%(default)s]")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=args.model,
            exp_name="run",
            output_dir=folder,
            data_dir=str(make_data(Path(folder) / "data", 256, SIDE, CLASSES)),
            batch_size=args.batch_size,
            ema_decay=[0.999, 0.9999],
            mixed_precision=args.mixed_precision,
            num_workers=args.workers,
            sampling_steps=0,
            report_to="none",
        )
        trainer = Trainer(config)
        trainer.open()
        device = trainer.accelerator.device
        bare = BareStep(models.create_model(args.model, input_size=SIDE).to(device), args.batch_size, args.mixed_precision)
        batches = iter(trainer.loader)

        def step() -> None:
            trainer.step += 1
            trainer.train_step(batches)
            trainer.log_line()

        timed = functools.partial(durations, device, time.perf_counter)
        trainer.speed.start()
        rounds = []
        for r in range(-args.warmup, args.repeats):
            first, second = timed(step, bare) if r % 2 else reversed(timed(bare, step))
            if r >= 0:
                rounds.append((first, second))

        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(f"{args.model}, batch {args.batch_size}, {args.mixed_precision}, {name}, PyTorch {torch.__version__}")
        show(("step of the loop", "bare step"), rounds)
        print(Line("step of the loop / bare step", [a / b for a, b in rounds], 1.0, STEP_BOUND), "\n", flush=True)

        load_rounds(trainer, args.repeats)
        state = trainer.state()
        pairs = [(torch.empty_like(t, device="cpu", pin_memory=device.type == "cuda"), t) for t in tensors(state)]
        size = sum(t.nbytes for _, t in pairs)

        def copy() -> None:
            for memory, tensor in pairs:
                memory.copy_(tensor, non_blocking=True)

        path = training_state.step_path(trainer.writer.folder, 0)
        pauses = []
        for r in range(-args.warmup, args.repeats):
            trainer.step += 1
            actions = [copy, trainer.save] if r % 2 else [trainer.save, copy]
            times = dict(zip(actions, timed(*actions), strict=True))
            trainer.writer.wait()  # as in training, where the steps between take longer than the write
            (saving,) = timed(lambda: training_state.save(path, trainer.state()))
            if r >= 0:
                pauses.append((times[copy], times[trainer.save], saving))
            for step_ in training_state.saved_steps(trainer.writer.folder):
                training_state.step_path(trainer.writer.folder, step_).unlink()

    print(f"state of a checkpoint: {size / 1e6:.0f} MB")
    show(("plain copy of the state", "pause of a checkpoint", "saving while training waits"), pauses)
    print(Line("pause / plain copy", [pause / copied for copied, pause, _ in pauses], 1.0, PAUSE_BOUND))
    print(f"{'saving while training waits / pause':36} {quantile([s / p for _, p, s in pauses], 0.5):8.3f}")


if __name__ == "__main__":
    main()
