"""Whole runs of the scripts: whether a resumed training is the same, and the command lines under a launcher."""

import importlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.record import ROOT, Run, isolated
from benchmarks.gpu.work import CLASSES, SMALL_VAE, make_data
from checkpoint import training_state
from common import tensor_files
from common.errors import first_line
from models.vae import VAERecord, load_vae

LOSS, FID = 1e-4, 1e-2  # relative differences from the CPU
PATIENCE = 240  # seconds of one command
Command = tuple[str, list[str]]


def in_fork(run: Run, script: str, argv: list[str], **environment: str) -> None:
    """The script's `main(argv)` in a process of its own; what goes wrong there is an error here."""
    told: list[str] = []
    log = run.folder / "commands.log"

    def job(send: Callable[[Any], None]) -> None:
        os.environ |= environment
        importlib.import_module(script).main(argv)

    if problem := isolated(job, log, PATIENCE, lambda entry: told.append(entry["error"])):
        raise RuntimeError(f"{script}.py: {(told or [last_line(log)])[0]} ({problem})")


def last_line(log: Path) -> str:
    """What a command said at its end."""
    return (log.read_text(errors="replace").strip().splitlines() or [""])[-1]


def train_argv(data: Path, out: Path, name: str, run: Run, **changes: Any) -> list[str]:
    """A short run of train.py."""
    options = {
        "model": f"ELIT-SiT-{run.size('S', 'Nano')}/2", "exp-name": name, "output-dir": out, "data-dir": data, "num-classes": CLASSES,
        "batch-size": 8, "sampling-steps": 0, "report-to": "none", "log-every": 1, "num-workers": 0, "epochs": 1000,
        "checkpointing-steps": 3, "elit-min-mask-prob": 0, "elit-max-mask-prob": 0.75,
    }  # fmt: skip
    if run.tiny:
        options |= {"elit-group-size": 2, "head-depth": 1, "tail-depth": 1}
    return ["--no-compile", *(str(word) for key, value in (options | changes).items() for word in (f"--{key}", value))]


def different(a: Any, b: Any) -> tuple[int, float]:
    """How many tensors of two states differ, and by how much at most."""
    pairs = list(zip(tensors_of(a), tensors_of(b), strict=True))
    unequal = [(x, y) for x, y in pairs if not torch.equal(x, y)]
    return len(unequal), max(((x.double() - y.double()).abs().max().item() for x, y in unequal), default=0.0)


def tensors_of(state: Any) -> list[Tensor]:
    """Weights, averages and the optimizer's moments of a training state."""
    from torch.utils._pytree import tree_leaves

    return [x for x in tree_leaves([state[key] for key in ("model", "ema", "optimizer")]) if isinstance(x, Tensor)]


def resume(run: Run) -> None:
    """6 steps against 3 and 3 more, by train.py."""
    data = make_data(run.folder / "data", 32, run.size(16, 8))
    options = {"mixed-precision": "bf16", "resolution": run.size(128, 64)}
    for name, more in (("as is", []), ("--deterministic", ["--deterministic"])):
        with run.attempt(f"{name}: tensors that differ"):
            states = []
            for folder, lengths in (("whole", [6]), ("resumed", [3, 6])):
                out = run.folder / name.strip("-").replace(" ", "-")
                for length in lengths:
                    argv = train_argv(data, out, folder, run, **options, **{"max-train-steps": length})
                    in_fork(run, "train", [*argv, "--resume-step", "-1", *more])
                path = training_state.step_path(out / folder / "checkpoints", 6)
                states.append(tensor_files.load(path, verify=True))
            count, largest = different(*states)
            if more:
                run.check(
                    f"{name}: tensors that differ", count, 0, why=f"of {len(tensors_of(states[0]))}, by {largest:.1e} at most"
                )
            else:
                run.note(f"{name}: tensors that differ", {"count": count, "largest difference": largest})


# -------------------------------------------------------------------------------------------------- command lines


def colour_features(device: torch.device) -> Callable[[Tensor], dict[str, Tensor]]:
    """A feature network for `evaluate.py --features`: mean colours of a 2 × 2 grid."""

    def extract(images: Tensor) -> dict[str, Tensor]:
        return {"pool": torch.nn.functional.adaptive_avg_pool2d(images.float() / 64, 2).flatten(1)}

    return extract


def commands(run: Run, data: Path, ref: Path, out: Path) -> Iterator[Command]:
    """Train, resume, generate, evaluate; each is asked for when the one before has ended."""
    options = {"mixed-precision": "no", "resolution": run.size(128, 32)}
    train = partial(train_argv, data, out, "run", run)
    yield "train", train(**options, **{"max-train-steps": 3})
    yield "train", [*train(**options, **{"max-train-steps": 6}), "--resume-step", "-1"]
    ckpt, count = out / "run" / "checkpoints" / "0000006.pt", run.size(64, 16)
    draw = ["--ckpt", ckpt, "--sample-dir", out / "images", "--num-fid-samples", count, "--num-steps", run.size(5, 2)]
    yield "generate", [*map(str, draw), "--no-tf32", "--no-png", "--per-proc-batch-size", "8"]
    (npz,) = (out / "images").rglob("*.npz")
    score = [ref, npz, "--features", "benchmarks.gpu.runs:colour_features", "--output", out / "figures.json"]
    yield "evaluate", list(map(str, score))


def figures(out: Path) -> dict[str, float]:
    """Losses of all steps, and FID."""
    lines = map(json.loads, (out / "run" / "metrics.jsonl").read_text().splitlines())
    losses = {f"loss of step {entry['step']}": entry["loss"] for entry in lines if "loss" in entry}
    return losses | {"FID": json.loads((out / "figures.json").read_text())["fid"]}


def by_process(folder: Path, launcher: Sequence[str], hide: bool, script: str, argv: list[str]) -> None:
    """A command as a user types it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"CUDA_VISIBLE_DEVICES": ""} if hide else {})
    command = [sys.executable, *launcher, str(ROOT / f"{script}.py"), *argv]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    (folder / "commands.log").open("a").write(done.stdout + done.stderr)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "rror" in line] or [done.stderr[-200:]]
        raise RuntimeError(f"{script}.py ended with {done.returncode}: {errors[0]}")


def ranked() -> dict[str, str]:
    """What torchrun tells the one process of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def command_lines(run: Run) -> None:
    """All commands in a process group of one, NCCL's on a GPU, against the same on the CPU without one."""
    _, record = load_vae(str(SMALL_VAE), "cpu")
    data = make_data(run.folder / "data", 32, run.size(32, 8), VAERecord(**{**vars(record), "vae": str(SMALL_VAE)}))
    pixels = np.random.default_rng(0).integers(0, 255, (run.size(64, 16), *[4 * run.size(32, 8)] * 2, 3), dtype=np.uint8)
    np.savez(run.folder / "ref.npz", arr_0=pixels)
    errors: dict[str, str] = {}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]

    def chain(name: str, launch: Callable[[str, list[str]], None]) -> None:
        try:
            for script, argv in commands(run, data, run.folder / "ref.npz", run.folder / name):
                launch(script, argv)
        except Exception as error:
            errors[name] = first_line(error)

    if run.tiny:
        chain("group", lambda script, argv: in_fork(run, script, argv, **ranked()))
        chain("plain", lambda script, argv: in_fork(run, script, argv))
    else:
        ways = {"group": (launcher, False), "plain": ([], True)}
        threads = [threading.Thread(target=chain, args=(n, partial(by_process, run.folder, *way))) for n, way in ways.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name, problem in errors.items():
        run.check(f"{name}: commands that fail", 1, 0, why=problem)
    if not errors:
        compare(run, figures(run.folder / "group"), figures(run.folder / "plain"))


def compare(run: Run, group: dict[str, float], plain: dict[str, float]) -> None:
    """The figures of both chains."""
    apart = {name: abs(group[name] - plain[name]) / abs(plain[name]) for name in plain}
    backend = "NCCL" if run.cuda else "gloo, since NCCL needs CUDA"
    run.note("figures", {"backend": backend, **group})
    run.check("losses: largest relative difference from the CPU", max(v for n, v in apart.items() if n != "FID"), LOSS)
    run.check("FID: relative difference from the CPU", apart["FID"], FID)
