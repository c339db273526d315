"""--profile-steps: which steps are recorded, and what a GPU's memory takes."""

import json

import pytest
import torch

from common.errors import UserError
from training.profiler import StepProfiler, parse_steps
from training.stats import Speed

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def test_steps_are_a_range():
    assert parse_steps("3-5") == range(3, 6) and parse_steps("7") == range(7, 8)
    for text in ("5-3", "0-2", "-1", "a", "", "1-", "1-2-3", "1.5"):
        with pytest.raises(UserError, match="--profile-steps"):
            parse_steps(text)


def operators_of(path):
    return [event["name"] for event in json.loads(path.read_text())["traceEvents"] if event.get("cat") == "cpu_op"]


def test_the_trace_holds_the_steps_that_were_asked_for(tmp_path):
    """Step n multiplies n times."""
    a = torch.ones(4, 4)
    with StepProfiler("2-3", tmp_path, CPU) as profiler:
        for step in range(1, 6):
            profiler.begin_step(step)
            for _ in range(step):
                a @ a
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "trace-2-3.json"
    assert operators_of(trace).count("aten::mm") == 2 + 3


def test_a_run_that_ends_early_writes_what_there_is(tmp_path):
    with pytest.raises(KeyError), StepProfiler("2-9", tmp_path, CPU) as profiler:
        profiler.begin_step(2)
        torch.ones(4, 4) @ torch.ones(4, 4)
        raise KeyError
    assert operators_of(tmp_path / "profile" / "trace-2-2.json").count("aten::mm") == 1


def test_without_steps_nothing_is_written(tmp_path):
    with StepProfiler(None, tmp_path, CPU) as profiler:
        profiler.begin_step(1)
    with StepProfiler("7", tmp_path, CPU) as profiler:
        profiler.begin_step(1)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_cuda_a_snapshot_of_the_memory_is_written_and_the_recording_ends(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda *a, **k: calls.append(("record", k)))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(("dump", path)))
    with StepProfiler("1", tmp_path, torch.device("cuda")) as profiler:
        profiler.begin_step(1)
    assert [name for name, _ in calls] == ["record", "dump", "record"] and calls[-1][1] == {"enabled": None}
    assert calls[1][1].endswith("memory-1-1.pickle") and (tmp_path / "profile" / "trace-1-1.json").is_file()


def test_peak_memory_is_measured_where_there_is_a_device(monkeypatch):
    speed = Speed(torch.nn.Linear(1, 1), [], [], 2, 10.0)
    speed.start()
    assert set(speed.read(CPU)) == {"images_per_second", "tflops", "mfu"}
    resets = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    cuda = torch.device("cuda")
    assert speed.read(cuda)["peak_memory_gib"] == 3 and resets == [cuda]
