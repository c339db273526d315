"""SIGKILL a sweep repeatedly, and time a cell against generate.py and evaluate.py: `python -m benchmarks.sweep --ckpt … --ref …`.

First part: a sweep of 12 cells is killed at moments drawn from a seed until it has been killed so often (cells that are whole are
taken away where none would be left). Every cell must be whole and equal to that of an undisturbed sweep, and none that is whole may
be done again. Second part: for each of several settings in turns, generate.py and evaluate.py as a user starts them, and the same
settings as cells of one sweep; the time per cell is that of the whole sweep over its cells.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import sweep
from benchmarks.kill_resume import start
from common.errors import cli_main

ROOT = Path(__file__).resolve().parents[1]
AXES = ("--cfg-scale", "1", "2", "4", "--inference-budget", "0.0625", "0.25", "--seeds", "0", "1")
CELLS = 12
BOUND = 0.8  # of the time per cell over that of generate.py and evaluate.py
SCALES = (2.0, 4.0, 6.0)


def ended(child: int) -> bool:
    """Has the process ended? Asked again after that, too."""
    try:
        return os.waitpid(child, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return True


def in_cell(dest: Path, since: float) -> bool:
    """Has a cell been locked since then?"""
    return any(path.stat().st_mtime > since for path in (dest / "cells").glob("*.lock"))


def files(dest: Path) -> list[Path]:
    return sorted((dest / "cells").glob("*.json"))


def cells_of(dest: Path) -> dict[str, tuple[int, dict]]:
    """Cell → when its file was written, and its figures. ValueError for one that is not whole."""
    return {p.stem: (p.stat().st_mtime_ns, json.loads(p.read_text())["figures"]) for p in files(dest)}


def attack(argv: list[str], root: Path, kills: int, seed: int) -> list[str]:
    """The first part. Returns what was wrong."""
    rng, log, findings = np.random.default_rng(seed), root / "log.txt", []
    os.waitpid(start([*argv, "--dest", str(root / "whole")], log, sweep.main), 0)
    cells = cells_of(root / "whole")
    whole = {key: figures for key, (_, figures) in cells.items()}
    if len(whole) != CELLS:
        return [f"the undisturbed sweep made {len(whole)} cells:\n{log.read_text()[-2000:]}"]
    written = sorted(when for when, _ in cells.values())
    seconds = (written[-1] - written[0]) / 1e9 / (CELLS - 1)
    print(f"undisturbed: {CELLS} cells, {seconds:.2f} s each", flush=True)
    dest, done, again, unfinished = root / "killed", 0, 0, 0
    while done < kills:
        before = cells_of(dest)
        if len(before) >= CELLS - 1:  # too little left to be killed in
            for path in files(dest)[: int(rng.integers(4, CELLS))]:
                path.unlink()
            before = cells_of(dest)
        begin = time.time()
        child = start([*argv, "--dest", str(dest)], log, sweep.main)
        # One in five before it works at cells, the others inside a cell: the first, second or third.
        early, whole_before = rng.random() < 0.2, len(before) + int(rng.integers(3))
        while not early and not (len(files(dest)) >= whole_before and in_cell(dest, begin)) and not ended(child):
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 1)) * seconds)
        is_over = ended(child)
        if not is_over:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done += 1
        after = cells_of(dest)
        again += sum(after[key][0] != written for key, (written, _) in before.items())
        unfinished += len(list((dest / "cells").glob("*.lock")))
        print(
            f"kill {done:2}: {len(before):2} cells before, {len(after):2} after{' (came to its end)' if is_over else ''}",
            flush=True,
        )
    if status := os.waitpid(start([*argv, "--dest", str(dest)], log, sweep.main), 0)[1]:
        return [f"the last run ended with {os.waitstatus_to_exitcode(status)}:\n{log.read_text()[-2000:]}"]
    found = {key: figures for key, (_, figures) in cells_of(dest).items()}
    print(f"kills: {done}, {unfinished} of them inside a cell; cells done again: {again}")
    findings += [f"{again} whole cells were done again"] if again else []
    findings += [f"cells differ: {sum(found.get(key) != figures for key, figures in whole.items())}"] if found != whole else []
    findings += ["files are left behind"] if any(p.suffix != ".json" for p in (dest / "cells").iterdir()) else []
    return findings


def cpu_seconds() -> float:
    """Of the processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


CLOCKS = {"wall": time.perf_counter, "cpu": cpu_seconds}


def timed(argv: list[str], clock: Callable[[], float]) -> float:
    since = clock()
    done = subprocess.run(
        [sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return clock() - since


def compare(args: argparse.Namespace, root: Path) -> tuple[list[float], list[float]]:
    """The second part: seconds of generate.py and evaluate.py, and of a cell of sweep.py, by round."""
    sampling = ["--ckpt", args.ckpt, *(["--vae", args.vae] if args.vae else []), "--num-steps", str(args.num_steps)]
    sampling += ["--num-fid-samples", str(args.samples), "--class-labels", "balanced"]
    features = ["--features", args.features] if args.features else []
    clock, apart, cells = CLOCKS[args.clock], [], []
    for turn in range(args.repeats):
        seconds = 0.0
        for scale in SCALES:
            folder = root / f"apart{turn}-{scale:g}"
            seconds += timed(
                ["generate.py", *sampling, "--cfg-scale", str(scale), "--sample-dir", str(folder), "--exp-name", "x"],
                clock,
            )
            (samples,) = (folder / "x").glob("*.npz")
            seconds += timed(["evaluate.py", args.ref, str(samples), *features, "--output", str(folder / "m.json")], clock)
            expected = json.loads((folder / "m.json").read_text())
        apart.append(seconds / len(SCALES))
        for file in Path(args.ref).parent.glob(f"{Path(args.ref).name}.features-*.npz"):
            file.unlink()  # a sweep alone looks at the reference, too
        dest = root / f"cells{turn}"
        scales = ["--cfg-scale", *map(str, SCALES)]
        cells.append(
            timed(["sweep.py", *sampling, *scales, "--ref", args.ref, *features, "--dest", str(dest)], clock) / len(SCALES)
        )
        (last,) = (f for _, f in cells_of(dest).values() if abs(f["fid"] / expected["fid"] - 1) < 1e-6)
        worst = max(abs(value - expected[name]) / max(abs(expected[name]), 1e-12) for name, value in last.items())
        print(
            f"round {turn + 1}: generate + evaluate {apart[-1]:.1f} s, a cell {cells[-1]:.1f} s, figures differ by {worst:.1e}",
            flush=True,
        )
    return apart, cells


@cli_main
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="sweep.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--vae", help="of a checkpoint that records none, or another place of it")
    parser.add_argument("--ref", required=True)
    parser.add_argument("--features", help="as of evaluate.py")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--samples", type=int, default=40, help="images of a cell of the second part [%(default)s]")
    parser.add_argument("--num-steps", type=int, default=10, help="of the second part [%(default)s]")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the second part [%(default)s]")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: of a busy machine [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    findings = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        # A copy: the features that are kept beside a reference go with it.
        ref = root / Path(args.ref).name
        shutil.copytree(args.ref, ref) if Path(args.ref).is_dir() else shutil.copy(args.ref, ref)
        args.ckpt, args.ref = str(Path(args.ckpt).absolute()), str(ref)
        if args.vae and Path(args.vae).exists():
            args.vae = str(Path(args.vae).absolute())
        if args.kills:
            cell = [
                "--ckpt",
                args.ckpt,
                *(["--vae", args.vae] if args.vae else []),
                "--ref",
                args.ref,
                "--num-fid-samples",
                "6",
            ]
            cell += [*(["--features", args.features] if args.features else []), "--num-steps", "1", *AXES]
            findings += attack(cell, root, args.kills, args.seed)
        if args.repeats:
            apart, cells = compare(args, root)
            ratios = [b / a for a, b in zip(apart, cells, strict=True)]
            print(
                f"a cell over generate + evaluate: {statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f}), at most {BOUND}"
            )
            findings += [f"ratio above {BOUND}"] if statistics.median(ratios) > BOUND else []
    print(f"findings: {len(findings)}", *findings, sep="\n")
    if findings:
        raise SystemExit("MISSED")


if __name__ == "__main__":
    main()
