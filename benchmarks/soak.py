"""Training under attack for as long as asked: `python -m benchmarks.soak [--minutes 20] [--seed 0]` prints counts.

Five attacks take turns, their moments drawn from the seed: SIGKILL and resume, SIGTERM, two runs in one folder at once, a data
worker killed, and a disk (a small tmpfs, which needs root) that fills up. A finding is a run that does not end in time, a
traceback, a process left behind, a checkpoint lost or damaged, or a final state that differs from the undisturbed run's.
"""

import argparse
import collections
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.kill_resume import CLASSES, SIDE, arguments, differences, lines_of, lost, make_data, newest, start
from checkpoint.training_state import saved_steps, step_path
from common import tensor_files
from common.errors import cli_main

STEPS = 60
PATIENCE = 10.0  # seconds in which a failing run must end
LIMIT = 240.0  # seconds after which any run counts as hung
DISK = 64 * 2**20  # bytes of the tmpfs


class Soak:
    """The attacks, with what they need; every attack returns its findings as text."""

    def __init__(self, root: Path, seed: int):
        self.root, self.rng = root, np.random.default_rng(seed)
        self.data = make_data(root / "data", 64, SIDE, CLASSES)
        self.counts: collections.Counter[str] = collections.Counter()
        self.number = 0
        self.whole, log = root / "whole", root / "whole.txt"
        began = time.monotonic()
        if self.wait(start(arguments(self.data, self.whole, STEPS), log), LIMIT) != 0:
            raise SystemExit(f"the undisturbed run failed:\n{log.read_text()[-2000:]}")
        self.seconds = time.monotonic() - began

    def run_dir(self) -> tuple[Path, Path]:
        """A new run folder, and a log beside it."""
        self.number += 1
        return self.root / f"run{self.number}", self.root / f"run{self.number}.txt"

    def wait(self, child: int, limit: float) -> int | None:
        """The exit code (negative: a signal); None, and SIGKILL to it, where it does not end within `limit` seconds."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return None

    def after(self, share: float) -> None:
        """Sleep for a drawn part of `share` of an undisturbed run."""
        time.sleep(float(self.rng.random()) * share * self.seconds)

    def check(self, run_dir: Path, log: Path, code: int | None, valid: set[int], before: int = 0) -> list[str]:
        """What any attack must leave: an end, no traceback, whole checkpoints."""
        found = [] if code in valid else ["did not end" if code is None else f"exit code {code}"]
        if "Traceback" in log.read_text(errors="replace"):
            found.append("traceback")
        if bad := lost(run_dir / "checkpoints", before):
            found.append(f"{bad} checkpoints lost or damaged")
        self.counts["checkpoints checked"] += len(saved_steps(run_dir / "checkpoints"))
        return found

    def finish(self, run_dir: Path, log: Path) -> list[str]:
        """Resume to the end; the final state and the logged lines must be those of the undisturbed run."""
        found = self.check(run_dir, log, self.wait(start(arguments(self.data, run_dir, STEPS), log), LIMIT), {0})
        if found:
            return found
        states = [tensor_files.load(step_path(run / "checkpoints", STEPS), verify=True) for run in (self.whole, run_dir)]
        for state in states:
            state["config"] = {k: v for k, v in state["config"].items() if k != "exp_name"}
        same = not differences(*states) and lines_of(self.whole) == lines_of(run_dir)
        return [] if same else ["another result than the undisturbed run's"]

    def kill(self) -> list[str]:
        """SIGKILL three times, then on to the end."""
        run_dir, log = self.run_dir()
        found = []
        for _ in range(3):
            before = newest(run_dir / "checkpoints")
            child = start(arguments(self.data, run_dir, STEPS), log)
            self.after(0.7)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            self.counts["SIGKILLs"] += 1
            found += [f"{bad} checkpoints lost" for bad in [lost(run_dir / "checkpoints", before)] if bad]
        return found + self.finish(run_dir, log)

    def terminate(self) -> list[str]:
        """SIGTERM: a checkpoint and the signal's exit code, then on to the end."""
        run_dir, log = self.run_dir()
        child = start(arguments(self.data, run_dir, STEPS), log)
        self.after(0.9)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
        self.counts["SIGTERMs"] += 1
        code = self.wait(child, LIMIT)
        found = self.check(run_dir, log, code, {0, 128 + signal.SIGTERM, -signal.SIGTERM})
        return found + self.finish(run_dir, log)

    def two_runs(self) -> list[str]:
        """The same folder twice: one of them is refused, the other is whole."""
        run_dir, log = self.run_dir()
        second = log.with_suffix(".second.txt")
        children = [start(arguments(self.data, run_dir, STEPS), log)]
        self.after(0.3)
        children.append(start(arguments(self.data, run_dir, STEPS), second))
        codes = [self.wait(child, LIMIT) for child in children]
        self.counts["runs in one folder at once"] += 2
        if sorted(str(c) for c in codes) != ["0", "2"]:
            return [f"exit codes {codes}"]
        return self.check(run_dir, second, codes[1], {0, 2}) + self.finish(run_dir, log)

    def kill_worker(self) -> list[str]:
        """SIGKILL to one of two data workers: the run ends in time and leaves no worker."""
        run_dir, log = self.run_dir()
        child = start([*arguments(self.data, run_dir, 100 * STEPS), "--num-workers", "2"], log)
        deadline = time.monotonic() + LIMIT
        while len(workers := children_of(child)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        self.after(0.5)
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(workers[int(self.rng.integers(2))], signal.SIGKILL)
        self.counts["workers killed"] += 1
        found = self.check(run_dir, log, self.wait(child, PATIENCE), {2})
        if left := [w for w in workers if alive(w)]:
            found.append(f"{len(left)} workers left")
            for worker in left:
                os.kill(worker, signal.SIGKILL)
        return found

    def full_disk(self) -> list[str]:
        """A disk that is full at a drawn byte: the run ends or goes on, what was saved is whole, and with room it resumes."""
        run_dir, log = self.run_dir()
        with small_disk(self.root / "disk") as disk:
            if disk is None:
                self.counts["full disks not tried (no tmpfs)"] += 1
                return []
            here = disk / run_dir.name
            (disk / "filler").write_bytes(bytes(int(DISK * (0.2 + 0.78 * self.rng.random()))))
            child = start(arguments(self.data, here, STEPS), log)
            found = self.check(here, log, self.wait(child, LIMIT), {0, 2})
            (disk / "filler").unlink()
            self.counts["full disks"] += 1
            if here.is_dir():
                shutil.rmtree(run_dir, ignore_errors=True)
                shutil.copytree(here, run_dir)
        return found + self.finish(run_dir, log)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A tmpfs of `DISK` bytes; None where it cannot be mounted."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], capture_output=True)
    try:
        yield folder if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def children_of(pid: int) -> list[int]:
    """The child processes of `pid` (Linux)."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [int(word) for word in path.read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    """Does the process run? One that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@cli_main
def main(argv: list[str] | None = None) -> None:
    """Attack until the time is over, then print the counts."""
    parser = argparse.ArgumentParser(prog="soak.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # and no computing here: a forked process must not inherit a pool of threads
    end, findings = time.monotonic() + 60 * args.minutes, []
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), args.seed)
        print(f"undisturbed: {STEPS} steps in {soak.seconds:.1f} s", flush=True)
        attacks: list[Callable[[], list[str]]] = [soak.kill, soak.terminate, soak.two_runs, soak.kill_worker, soak.full_disk]
        while time.monotonic() < end:
            attack = attacks[soak.counts["attacks"] % len(attacks)]
            soak.counts["attacks"] += 1
            if found := attack():
                log = soak.root / f"run{soak.number}.txt"
                findings.append(f"{attack.__name__}: {', '.join(found)}")
                print(f"FINDING {findings[-1]}\n{log.read_text(errors='replace')[-1500:]}", flush=True)
    for name, count in soak.counts.items():
        print(f"{name}: {count}")
    print(f"findings: {len(findings)}")
    if findings:
        raise SystemExit("MISSED")


if __name__ == "__main__":
    main()
