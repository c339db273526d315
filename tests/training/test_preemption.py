"""Signals that come before the first step: while the script imports, and while processes wait for others that never come."""

import json
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from runs import ROOT, command_line, environment, free_port, make_latents, make_vae
from training_runs import arguments

from common import early_signals
from training import preemption

pytestmark = pytest.mark.slow

BLOCKED = """
import os, signal, sys, threading, time
from training import preemption
preemption.SETUP_GRACE = float(sys.argv[1])
with preemption.Preemption() as waiting:
    waiting.at_abandon = lambda: print("abandoned", flush=True)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    if sys.argv[2] == "blocked":  # in C++, where no handler of Python's runs
        preemption.dist.TCPStore("127.0.0.1", int(sys.argv[3]), world_size=2, is_master=True)
    time.sleep(1)  # a set-up that ends in time
    waiting.watch(0)
    print("stops" if waiting.reached(0) else "goes on", flush=True)
    time.sleep(1)
"""


def caught_signals(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))


def test_a_set_up_that_waits_for_a_lost_process_ends_at_a_signal_and_others_go_on_to_their_step():
    processes = []
    for grace, kind in (("0.5", "blocked"), ("20", "slow")):
        command = command_line("-c", BLOCKED, grace, kind, str(free_port()))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes))
    (out, err), (slow, _) = (process.communicate(timeout=60) for process in processes)
    assert processes[0].returncode == 128 + signal.SIGTERM and out.split() == ["abandoned"]
    assert err.splitlines()[-1].endswith("error: SIGTERM: stopped before the first step, while waiting for other processes")
    assert processes[1].returncode == 0 and slow.split() == ["stops"]


def test_a_signal_among_the_imports_is_a_preemption(tmp_path):
    data = make_latents(tmp_path / "set", 24, make_vae(tmp_path / "vae"))
    command = command_line("train.py", *arguments(data, tmp_path, model="SiT-Ti/4"))
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    while not caught_signals(process.pid) >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.001)
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()  # the imports are still to come
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert json.loads((tmp_path / "run" / "status.json").read_text()) == {"state": "preempted", "step": 0}
    assert "SIGTERM: stopped after step 0" in errors


def test_who_does_not_train_gives_the_signals_back(monkeypatch):
    before = {number: signal.getsignal(number) for number in early_signals.SIGNALS}
    monkeypatch.setattr(early_signals, "received", [])
    try:
        early_signals.catch()
        early_signals.release()
        assert {signal.getsignal(number) for number in before} == {signal.SIG_DFL}
        early_signals.catch()
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(SystemExit) as stop:
            early_signals.release()
        assert stop.value.code == 128 + signal.SIGUSR1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_no_thread_is_left_behind():
    """One that still runs when the interpreter ends aborts the process, now and then."""
    with preemption.Preemption():
        assert any(thread.name == "set-up guard" for thread in threading.enumerate())
    assert not any(thread.name == "set-up guard" for thread in threading.enumerate())
