"""How long processes wait for each other."""

from datetime import timedelta

import pytest
import runs
import torch

import evaluate
import generate
from common.distributed import LONG_WAIT, WAIT, start_processes, wait_time


def test_as_long_as_given_or_days_where_one_works_alone():
    assert wait_time(None) == LONG_WAIT > timedelta(days=1) and wait_time(None, alone=False) == WAIT < timedelta(hours=1)
    assert wait_time(2.5) == wait_time(2.5, alone=False) == timedelta(seconds=150)


@pytest.mark.parametrize(("minutes", "expected"), [(5.0, timedelta(minutes=5)), (None, LONG_WAIT)])
def test_the_processes_of_a_launcher_wait_so_long(minutes, expected, monkeypatch):
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": runs.free_port(),
    }.items():
        monkeypatch.setenv(name, str(value))
    runs.reset_accelerate()
    state = start_processes(minutes)
    try:
        group = torch.distributed.group.WORLD
        assert group._get_backend(torch.device("cpu")).options._timeout == expected
    finally:
        state.destroy_process_group()
        runs.reset_accelerate()


@pytest.mark.parametrize("value", ["0", "-3", "1e9", "soon"])
def test_bad_values_are_refused(value, capsys):
    for main, options in ((evaluate.main, ["a.npz", "b.npz"]), (generate.main, ["--ckpt", "a.pt"])):
        line = runs.refused(main, capsys, [*options, "--timeout-minutes", value])
        assert "--timeout-minutes" in line and value in line.replace("1000000000", "1e9")
