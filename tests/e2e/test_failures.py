"""Runs that fail end, with their workers, ranks and exit codes; and two runs do not meet in one folder."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import runs
import training_runs
from runs import (
    command_line,
    environment,
    free_port,
    launch,
    make_checkpoint,
    make_latents,
    make_vae,
    reset_accelerate,
)
from torch.utils.data import DataLoader, Dataset

import generate
import train
from common import errors, files
from training import trainer

BOUND = 40  # seconds for a whole run that fails in its first steps; what hangs never ends


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return make_latents(folder / "set", 24, make_vae(folder / "vae"))


@pytest.fixture(scope="module")
def broken(data, tmp_path_factory):
    """The same with one file cut short."""
    folder = tmp_path_factory.mktemp("broken") / "set"
    shutil.copytree(data, folder)
    with (folder / "vae-sd/00000/img-mean-std-00000007.npy").open("r+b") as file:
        file.truncate(200)
    return folder


def arguments(data, output_dir, *more):
    """Of a run that lasts."""
    lasting = ("--batch-size", 4, "--max-train-steps", 100_000, "--epochs", 100_000, "--checkpointing-steps", 100_000)
    return training_runs.arguments(data, output_dir, *lasting, *more)


def status(output_dir):
    return json.loads((output_dir / "run" / "status.json").read_text())


def error_lines(text):
    return [line for line in text.splitlines() if ".py: error:" in line]


# ------------------------------------------------------------------------------------------------- failures with workers

# One import for all runs, which go on at the same time; each process ends as a script does, not by os._exit.
AS_SCRIPTS = """
import json, multiprocessing, os, signal, sys, time
import train, torch._dynamo  # which an optimizer imports
from common.errors import UserError
from data.dataset import LatentDataset
from training.trainer import Trainer

def at_step(number, action):
    original = Trainer.train_step
    def step(self, batches):
        original(self, batches)
        if self.step == number:
            action()
    Trainer.train_step = step

def fail(error):
    raise error

bound, started = float(sys.argv[1]), {}
for name, argv, before, output in json.loads(sys.argv[2]):
    if not (child := os.fork()):
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests are a shell's background job
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
        exec(before)
        train.main(argv)
        sys.exit()
    started[child] = name
deadline = time.monotonic() + bound
codes = dict.fromkeys(started.values())
def members():
    for entry in os.listdir("/proc"):
        try:
            fields = open(f"/proc/{entry}/stat").read().rpartition(")")[2].split()
        except OSError:
            continue
        if entry.isdigit() and int(fields[3]) in started and fields[0] != "Z":
            yield int(entry), started[int(fields[3])]
while None in codes.values() and time.monotonic() < deadline:
    done, code = os.waitpid(-1, os.WNOHANG)
    if done:
        codes[started[done]] = os.waitstatus_to_exitcode(code)
    time.sleep(0.02)
while (left := list(members())) and time.monotonic() < deadline:  # multiprocessing's own helper may need a moment
    time.sleep(0.02)
for pid, _ in left:
    os.kill(pid, signal.SIGKILL)
print(json.dumps([codes, sorted({name for _, name in left})]))
"""
KILL_WORKER = "os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)"
STUCK = """
read = LatentDataset.__getitems__
def slow(self, indices, **more):
    if multiprocessing.parent_process() is not None and slow.reads == 2:
        time.sleep(1000)
    slow.reads += 1
    return read(self, indices, **more)
slow.reads = 0
LatentDataset.__getitems__ = slow
at_step(2, lambda: fail(KeyError("met in training")))
"""
# name: (data, code executed before, exit code, words of the one line for the user)
FAILURES = {
    "broken file": ("broken", "", 2, "img-mean-std-00000007.npy"),
    "broken file, spawned": ("broken", "multiprocessing.set_start_method('spawn')", 2, "img-mean-std-00000007.npy"),
    "worker killed": ("data", f"at_step(2, lambda: {KILL_WORKER})", 2, "a data worker was ended by SIGKILL"),
    "bug, a worker stuck": ("data", STUCK, 1, None),
    "SIGINT": ("data", "at_step(2, lambda: os.kill(os.getpid(), signal.SIGINT))", -2, None),
    "user's error": ("data", "at_step(2, lambda: fail(UserError('50 steps in a row')))", 2, "50 steps in a row"),
}


@pytest.fixture(scope="module")
def failed(data, broken, tmp_path_factory):
    folder = tmp_path_factory.mktemp("failed")
    told = []
    for number, (name, (source, before, *_)) in enumerate(FAILURES.items()):
        argv = arguments(broken if source == "broken" else data, folder / str(number), "--num-workers", 1)
        told.append((name, argv, before, str(folder / f"{number}.txt")))
    done = launch("-c", AS_SCRIPTS, str(BOUND), json.dumps(told))
    assert done.returncode == 0, done.stderr
    codes, left = json.loads(done.stdout)
    return {name: (codes[name], name in left, Path(output).read_text(), Path(output[:-4])) for name, *_, output in told}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_run_ends_with_its_workers_and_exit_code(failed, name):
    _, _, expected, words = FAILURES[name]
    code, left, told, folder = failed[name]
    assert code == expected, told
    assert not left  # no worker
    assert status(folder)["state"] == "failed"
    assert not (folder / "run" / "run.lock").exists()
    if words:
        (line,) = error_lines(told)
        assert words in line and "Traceback" not in told
    else:
        assert ("KeyboardInterrupt" if name == "SIGINT" else "KeyError: 'met in training'") in told


class Failing(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise RuntimeError("a bug in a worker")


def test_what_a_worker_raises_itself_is_no_killed_worker():
    from common.distributed import data_workers

    with (
        pytest.raises(RuntimeError, match="a bug in a worker"),
        data_workers(DataLoader(Failing(), num_workers=1), "") as items,
    ):
        next(items)
    assert not multiprocessing.active_children()


# ---------------------------------------------------------------------------------------------------- launchers and ranks

# Ranks, as torchrun and `accelerate launch` start them, of launchers that can be killed: after one import.
LAUNCHERS = """
import json, os, sys, time
import train, torch._dynamo  # which an optimizer imports
import torch.distributed as dist
for port, count, environment, argv in json.loads(sys.argv[1]):
    if not os.fork():
        os.environ |= environment
        ranks = []
        for rank in range(count):
            if not (child := os.fork()):
                if count > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                train.main(argv)
                sys.exit()
            ranks.append(child)
        if count > 1:  # the launcher has the store
            store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        print(os.getpid(), *ranks, flush=True)
        time.sleep(600)
time.sleep(600)
"""


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ranks_end_with_a_launcher_that_is_killed(data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    accelerate = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    elastic = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    told = [
        (0, 1, accelerate, arguments(data, one, "--num-workers", 1)),
        (free_port(), 2, elastic, arguments(data, two)),
    ]
    command = command_line("-c", LAUNCHERS, json.dumps(told))
    process = subprocess.Popen(command, cwd=runs.ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    pids = []
    try:
        pids = [[int(pid) for pid in process.stdout.readline().split()] for _ in told]
        for out in (one, two):
            log = out / "run" / "metrics.jsonl"
            wait_for(lambda log=log: log.exists() and len(log.read_text().splitlines()) > 2, 60)
        for launcher, *_ in pids:
            os.kill(launcher, signal.SIGKILL)
        wait_for(lambda: all(has_ended(pid) for group in pids for pid in group), 15)
    finally:
        for pid in [process.pid, *(pid for group in pids for pid in group)]:
            if not has_ended(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    stopped = status(one)  # it was alone: it saved
    assert stopped["state"] == "preempted"
    assert (one / "run" / "checkpoints" / f"{stopped['step']:07d}.pt").exists()
    assert status(two)["state"] == "failed"


FAILS_ALONE = """
step = train.Trainer.train_step
def failing_step(self, batches):
    if self.step == 2:
        import time
        time.sleep(2 if rank == 1 else 600)  # as a rank waits whom no collective tells of the end of another
        raise KeyError("met by one")
    step(self, batches)
train.Trainer.train_step = failing_step
"""
OTHER_MACHINE = """
os.environ["LOCAL_RANK"] = "0"
if rank == 1:
    argv[argv.index("--data-dir") + 1] = "/nowhere"
"""


def test_ranks_that_fail_refuse_or_stand_on_other_machines(data, broken, tmp_path):
    """One rank fails and the other ends, by a bug, or by the file that it meets first, since each reads half of every batch.

    A held folder is refused by both, in one line, and so is a batch that they cannot share; rank 1 speaks for its machine.
    """
    held = tmp_path / "held" / "run"
    held.mkdir(parents=True)
    told = [
        (2, arguments(data, tmp_path / "alone"), FAILS_ALONE),
        (2, arguments(data, tmp_path / "held", "--max-train-steps", 1), ""),
        (2, arguments(data, tmp_path / "machines", "--max-train-steps", 1), OTHER_MACHINE),
        (2, arguments(broken, tmp_path / "broken", "--num-workers", 1), ""),
        (2, arguments(data, tmp_path / "odd", "--batch-size", 7), ""),
    ]
    with held_by_another(held / "run.lock"):
        runs_ = json.dumps([(free_port(), *run) for run in told])
        done = launch("-c", runs.FORK, runs_, timeout=90)
    alone, refusal, machines, file, odd = done.stdout.splitlines()
    assert alone == "1 1" and "process 1 failed" in done.stderr
    assert refusal == "2 2"
    assert [p.name for p in held.iterdir()] == ["run.lock"]
    assert len([line for line in error_lines(done.stderr) if "another run is writing there" in line]) == 1
    assert machines.split()[1] == "2"
    assert len([line for line in error_lines(done.stderr) if "/nowhere" in line]) == 1
    assert "2" in file.split() and "0" not in file.split()
    assert [line for line in error_lines(done.stderr) if "img-mean-std-00000007.npy" in line]
    assert odd == "2 2" and not (tmp_path / "odd").exists()
    assert len([line for line in error_lines(done.stderr) if "--batch-size 7" in line]) == 1


@pytest.mark.parametrize(
    ("rank", "local_rank", "lines"), [("0", "0", 1), ("8", "0", 1), ("9", "1", 0), ("0", None, 1), ("1", None, 0)]
)
def test_the_first_rank_of_a_machine_prints_its_error(monkeypatch, capsys, rank, local_rank, lines):
    @errors.cli_main
    def main(argv):
        raise errors.UserError("--data-dir nowhere: no such folder")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit):
        main([])
    assert len(error_lines(capsys.readouterr().err)) == lines


# ------------------------------------------------------------------------------------------------------ one run in a folder


class held_by_another:
    """A context in which another process has locked the file; `then`: what it does before it gives the lock up."""

    def __init__(self, path, then=None):
        context = multiprocessing.get_context("fork")
        self.ours, theirs = context.Pipe()

        def hold():
            held = files.lock(path)
            theirs.send(held is not None)
            theirs.recv() if then is None else then()

        self.process = context.Process(target=hold)

    def __enter__(self):
        self.process.start()
        assert self.ours.recv()

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()


def try_lock(path) -> bool:
    """Would another process get the lock?"""
    code = "import sys, pathlib; sys.path.insert(0, '.'); from common import files; print(files.lock(pathlib.Path(sys.argv[1])) is not None)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=runs.ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"


@pytest.fixture(scope="module")
def run_of_two_steps(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    train.main(arguments(data, out, "--max-train-steps", 2))
    reset_accelerate()
    return out


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_second_run_is_refused_and_nothing_is_touched(data, run_of_two_steps, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(run_of_two_steps, out)
    assert not (out / "run" / "run.lock").exists()
    (out / "run" / "checkpoints" / "0000003.pt.tmp").write_text("half a checkpoint of the other run")
    with held_by_another(out / "run" / "run.lock"):
        before = content(out)
        argv = arguments(data, out, "--max-train-steps", 3, "--resume-step", -1)
        line = runs.refused(train.main, capsys, argv)
        assert content(out) == before
    assert str(out / "run") in line and "another run is writing there" in line and "--wait-for-lock" in line


def test_a_run_holds_its_folder_and_leaves_it(data, tmp_path, monkeypatch):
    path, seen = tmp_path / "run" / "run.lock", []
    original = trainer.Trainer.train_step

    def step(self, batches):
        original(self, batches)
        seen.append(try_lock(path))

    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    train.main(arguments(data, tmp_path, "--max-train-steps", 1))
    assert seen == [False]
    assert not path.exists()


def test_a_run_that_is_refused_leaves_no_folder(data, tmp_path, capsys):
    assert "nowhere.pt" in runs.refused(train.main, capsys, arguments(data, tmp_path / "out", "--init-from", "nowhere.pt"))
    assert not (tmp_path / "out").exists()


def test_a_queued_run_waits_for_the_one_before_and_goes_on_from_it(data, run_of_two_steps, tmp_path, capsys):
    """The other run saves its checkpoint while this one waits."""
    (tmp_path / "run").mkdir()

    def finish():
        time.sleep(2)
        shutil.copytree(run_of_two_steps / "run", tmp_path / "run", dirs_exist_ok=True)

    with held_by_another(tmp_path / "run" / "run.lock", finish):
        train.main(arguments(data, tmp_path, "--max-train-steps", 3, "--resume-step", -1, "--wait-for-lock", 1))
    assert "waiting up to 1 minute" in capsys.readouterr().err
    assert status(tmp_path) == {"state": "finished", "step": 3}
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_waiting_ends_in_time_and_at_a_signal(data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with held_by_another(tmp_path / "run" / "run.lock"):
        line = runs.refused(train.main, capsys, arguments(data, tmp_path, "--wait-for-lock", 0.02))
        assert "another run is writing there" in line
        reset_accelerate()
        threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(SystemExit) as stop:
            train.main(arguments(data, tmp_path, "--wait-for-lock", 5))
    assert stop.value.code == 128 + signal.SIGTERM
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.lock"]


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    told = []
    files.FolderLock(tmp_path / "new" / "run.lock", tmp_path / "new", told.append).release()
    assert len(told) == 1 and "no locks" in told[0] and str(tmp_path / "new") in told[0]
    assert not (tmp_path / "new").exists()


def test_two_generations_in_one_folder(tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path / "0000007.pt", make_vae(tmp_path / "vae"))
    options = {"ckpt": checkpoint, "sample-dir": tmp_path / "out", "num-fid-samples": 2, "num-steps": 1}
    argv = [str(part) for name, value in options.items() for part in ("--" + name, value)]
    generate.main(argv)
    (folder,) = [p for p in (tmp_path / "out" / "made").iterdir() if p.is_dir()]
    (folder / "000001.png").rename(folder / "000001.png.tmp")  # as the other one writes it
    reset_accelerate()
    with held_by_another(folder.with_name(folder.name + ".lock")):
        before = content(tmp_path)
        line = runs.refused(generate.main, capsys, argv)
        assert content(tmp_path) == before
    assert str(folder) in line and "another run is writing there" in line
    reset_accelerate()
    generate.main(argv)
    assert len(list(folder.iterdir())) == 2 and not list(tmp_path.rglob("*.lock"))
