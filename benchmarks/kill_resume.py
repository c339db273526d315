"""SIGKILL a training run repeatedly and compare it with an uninterrupted one: `python -m benchmarks.kill_resume`.

The moments come from a seed and are printed: some before the first checkpoint is there, some while a checkpoint is being
written (at a share of its bytes), the others at any time. CPU, where the two runs must be the same to the last bit.

With `--shard full` the run has two processes, which write their checkpoints as folders of parts; either both are killed, or
one, whose end the other must notice.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train
from checkpoint import training_state
from common.errors import cli_main

SIDE, CLASSES = 8, 5
EVERY = 10  # steps between checkpoints
EVERY_SHARDED = 3  # whose steps take longer: the processes wait for each other in every block
KEPT = 3
PROCESSES = 2  # of a sharded run
PATIENCE = 60  # seconds in which the others of a run end, once one is killed
TIMED = ("images_per_second", "tflops", "step_ms", "host_ms")  # the entries of a line that two runs need not share
FIFTH = 0.2


class Kill(NamedTuple):
    """What became of one attempt."""

    kind: str
    moment: str
    step: int  # of the last line logged
    newest: int  # step of the newest checkpoint, 0: none
    unfinished: int  # bytes of a checkpoint that was being written


def make_data(folder: Path, samples: int, side: int, classes: int) -> Path:
    """Random latents in the published layout."""
    rng = np.random.default_rng(0)
    (folder / "vae-sd").mkdir(parents=True)
    names = [f"img-mean-std-{i:08d}.npy" for i in range(samples)]
    for name in names:
        np.save(folder / "vae-sd" / name, rng.random((8, side, side), dtype=np.float32))
    labels = [[name, i % classes] for i, name in enumerate(names)]
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def arguments(data: Path, run_dir: Path, steps: int, **more: object) -> list[str]:
    options = {
        "model": "ELIT-SiT-Ti/2",
        "exp-name": run_dir.name,
        "output-dir": run_dir.parent,
        "data-dir": data,
        "resolution": 8 * SIDE,
        "num-classes": CLASSES,
        "elit-group-size": 2,
        "elit-min-mask-prob": 0,
        "batch-size": 4,
        "max-train-steps": steps,
        "checkpointing-steps": EVERY,
        "keep-last": KEPT,
        "ema-decay": 0.9,
        "learning-rate": 1e-3,
        "mixed-precision": "no",
        "sampling-steps": 0,
        "num-workers": 0,
        "log-every": 3,
        "report-to": "none",
        "resume-step": -1,
    }
    return [str(part) for name, value in (options | more).items() for part in ("--" + name, value)]


def start(argv: list[str], log: Path, main: Callable[[list[str]], object] = train.main) -> int:
    """Fork a process that runs a script, train.py unless told otherwise, with everything imported already; returns its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            main(argv)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            os._exit(code)
    return child


def start_ranks(argv: list[str], log: Path, pids: Path) -> int:
    """Fork a process that starts and awaits the processes of a sharded run, whose ids it writes to the file `pids`; returns its id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    leader = os.fork()
    if leader:
        return leader
    os.environ |= {"WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(PROCESSES):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(start(argv, log))
    pids.write_text(" ".join(map(str, ranks)))
    os._exit(max(abs(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1])) for rank in ranks))


class Runner:
    """Starts and kills a run of one process, or a sharded one of several."""

    def __init__(self, argv: list[str], log: Path, sharded: bool):
        self.argv, self.log, self.pids = argv, log, log.with_suffix(".pids") if sharded else None

    def start(self) -> int:
        if self.pids is None:
            return start(self.argv, self.log)
        self.pids.unlink(missing_ok=True)
        return start_ranks(self.argv, self.log, self.pids)

    def kill(self, child: int, one: int | None = None) -> None:
        """SIGKILL to all of its processes, or to that of rank `one`; returns once all have ended."""
        deadline = time.monotonic() + PATIENCE
        ranks = [child]
        if self.pids is not None:
            while not (text := self.pids.read_text() if self.pids.exists() else ""):
                time.sleep(0.001)
            ranks = list(map(int, text.split()))
        for rank in ranks if one is None or self.pids is None else [ranks[one]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        while not ended(child):
            if time.monotonic() > deadline:
                for rank in ranks:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(rank, signal.SIGKILL)
                raise SystemExit(f"one process was killed; the others had not ended {PATIENCE} s later")
            time.sleep(0.001)


def ended(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG)[0] != 0


def writing(folder: Path) -> tuple[str, int]:
    """Name and size of the checkpoint that this attempt is writing."""
    for path in unfinished(folder):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime > 0:
                return path.name, size_of(path)
    return "", 0


def unfinished(folder: Path) -> list[Path]:
    return [*folder.glob("*.pt.tmp"), *folder.glob("*.dcp.tmp")]


def size_of(path: Path) -> int:
    """Bytes of a file, or of those in a folder."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def at_time(seconds: float) -> Callable[[Path, float], bool]:
    """A moment: so long after the start."""
    return lambda folder, since: time.perf_counter() - since >= seconds


def in_write(number: int, size: int) -> Callable[[Path, float], bool]:
    """A moment: when `size` bytes of the `number`-th checkpoint after the start are written."""
    seen = set()

    def now(folder: Path, since: float) -> bool:
        name, written = writing(folder)
        if name:
            seen.add(name)
        return len(seen) >= number and bool(name) and written >= size

    return now


def kill(
    runner: Runner, run_dir: Path, kind: str, moment: str, now: Callable[[Path, float], bool], one: int | None
) -> Kill | None:
    """One attempt, ended by SIGKILL at the moment; `None` where it came to its own end before. one: see `Runner.kill`."""
    folder = run_dir / "checkpoints"
    for path in unfinished(folder):
        os.utime(path, (0, 0))  # known from now on as an earlier attempt's
    since = time.perf_counter()
    child = runner.start()
    while not now(folder, since):
        if ended(child):
            return None
        time.sleep(0.001)
    runner.kill(child, one)
    lines = lines_of(run_dir)
    return Kill(kind, moment, lines[-1]["step"] if lines else 0, newest(folder), writing(folder)[1])


def newest(folder: Path) -> int:
    return max(training_state.saved_steps(folder), default=0)


def lines_of(run_dir: Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path, entries = run_dir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            entries.append({k: v for k, v in json.loads(line).items() if k not in TIMED})
    return entries


def lost(folder: Path, before: int) -> int:
    """Checkpoints that are damaged, and one where the newest of `before` has gone."""
    damaged = 0
    for step in training_state.saved_steps(folder):
        try:
            training_state.load(training_state.step_path(folder, step), verify=True)
        except ValueError:
            damaged += 1
    return damaged + (newest(folder) < before)


def differences(a, b, where: str = "") -> list[str]:
    """Where two checkpoints are not the same, to the bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [where]
        return [d for k in a for d in differences(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, (list, tuple)):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}/{i}")]
    return [] if a == b else [where]


@cli_main
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="kill_resume.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=240, help="length of the run [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", choices=("none", "full"), default="none", help="full: a run of two processes [%(default)s]")
    args = parser.parse_args(argv)
    is_sharded = args.shard != "none"
    more = {"shard": args.shard, "checkpointing-steps": EVERY_SHARDED} if is_sharded else {}
    rng = np.random.default_rng(args.seed)
    torch.set_num_threads(1)  # and no computing here: a forked process must not inherit a pool of threads
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_data(root / "data", 64, SIDE, CLASSES)
        log, whole, cut = root / "log.txt", root / "whole", root / "cut"

        since = time.perf_counter()
        child, first = Runner(arguments(root / "data", whole, args.steps, **more), log, is_sharded).start(), None
        while not ended(child):
            if first is None and newest(whole / "checkpoints"):
                first = time.perf_counter() - since
            time.sleep(0.001)
        last = training_state.step_path(whole / "checkpoints", args.steps)
        if not last.exists():
            raise SystemExit(f"the uninterrupted run failed:\n{log.read_text()}")
        size = size_of(last)
        print(
            f"uninterrupted: {args.steps} steps in {time.perf_counter() - since:.1f} s, first checkpoint after {first:.2f} s, {size:,} bytes each"
        )

        runner, kills, missing = Runner(arguments(root / "data", cut, args.steps, **more), log, is_sharded), [], 0
        early, inside = -(-args.kills * 4 // 15), -(-args.kills // 3)
        later = rng.permutation(["write"] * inside + ["any"] * (args.kills - early - inside))
        for kind in ["start"] * early + list(later):
            if kind == "write":
                number, share = int(rng.integers(1, 3)), rng.random()
                moment, now = f"write {number}, {share:.2f} of its bytes", in_write(number, int(share * size))
            else:
                seconds = rng.random() * (0.8 * first if kind == "start" else 1.5 * first)
                moment, now = f"{seconds:.3f} s after the start", at_time(seconds)
            before = newest(cut / "checkpoints")
            one = int(rng.integers(PROCESSES)) if is_sharded and rng.random() < 0.5 else None
            moment += "" if one is None else f", process {one}"
            done = kill(runner, cut, kind, moment, now, one)
            if done is None:
                raise SystemExit(
                    f"the run ended before it was killed {args.kills} times; give more --steps:\n{log.read_text()[-2000:]}"
                )
            missing += lost(cut / "checkpoints", before)
            kills.append(done)
            print(
                f"kill {len(kills):2}: {moment:43} line of step {done.step:3}, newest checkpoint {done.newest:3}"
                + (f", {done.unfinished:,} bytes of the next" if done.unfinished else ""),
                flush=True,
            )
        os.waitpid(runner.start(), 0)

        states = [
            training_state.load(training_state.step_path(run / "checkpoints", args.steps), verify=True) for run in (whole, cut)
        ]
        for state in states:
            state["config"] = {k: v for k, v in state["config"].items() if k != "exp_name"}
        different = differences(*states)
        same_lines = lines_of(whole) == lines_of(cut)
        unsaved, unfinished = (sum(k.newest == 0 for k in kills), sum(k.unfinished > 0 for k in kills))
        passed_over = log.read_text().count("damaged")
    tensors = "identical" if not different else f"DIFFERENT in {len(different)} places: {', '.join(different[:3])}"
    print(f"\nkills: {len(kills)}; before the first checkpoint: {unsaved}; inside a write: {unfinished}")
    print(f"final state: {tensors}; logged lines: {'identical' if same_lines else 'DIFFERENT'}")
    print(f"checkpoints lost or damaged: {missing}; passed over on resuming: {passed_over}")
    enough = min(unsaved, unfinished) >= FIFTH * len(kills)
    if different or not same_lines or missing or passed_over or not enough:
        raise SystemExit("MISSED")


if __name__ == "__main__":
    main()
