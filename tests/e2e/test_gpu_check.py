"""`python -m benchmarks.gpu`: all parts on a CPU; parts that fail, crash or never end; time that is up."""

import json
import os
import signal
import time

import pytest

from benchmarks.gpu import __main__ as check
from benchmarks.gpu.record import isolated


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What the check sets is put back."""
    for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK"):
        monkeypatch.setenv(name, "")


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        check.main([str(a) for a in argv])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def results(folder):
    return json.loads((folder / "gpu.json").read_text())


def test_all_parts_run_on_a_cpu(tmp_path, capsys):
    check.main(["--tiny", "--out", str(tmp_path)])
    found = results(tmp_path)
    assert list(found["parts"]) == list(check.PARTS) and len(check.PARTS) == 12
    assert found["versions"]["torch"] and found["versions"]["card"] == "none: CPU"
    for name, part in found["parts"].items():
        assert part["status"] == "done" and part["entries"], name
    verdicts = {name: [e["passed"] for e in part["entries"] if "bound" in e] for name, part in found["parts"].items()}
    numbers = {
        "attention": 6,
        "waiting": 5,
        "parity": 12,
        "sets": 4,
        "resume": 1,
        "decoding": 7,
        "neighbours": 2,
        "command lines": 2,
    }
    for name, count in numbers.items():
        assert sum(passed is True for passed in verdicts[name]) >= count, name
    assert {passed for name in ("training", "sampling", "saving") for passed in verdicts[name]} == {None}  # no time is judged
    table = (tmp_path / "gpu.md").read_text()
    assert table in capsys.readouterr().out and all(f"| **{name}** | done |" in table for name in check.PARTS)


def fail(run):
    run.note("before", {"value": 1.5})
    with run.attempt("inside"):
        raise ValueError("no such kernel")
    run.check("bound", float("nan"), 2.0)
    raise RuntimeError("out of memory\nand more")


def crash(run):
    run.check("a check before", 1, 2)
    os.kill(os.getpid(), signal.SIGKILL)


def good(run):
    run.check("a check", 3, 2, at_least=True)
    print("not between the lines")


def test_a_part_that_fails_or_crashes_is_a_line_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "PARTS", {"fails": fail, "crashes": crash, "is good": good, "is left out": good})
    with pytest.raises(SystemExit) as stop:
        check.main(["--device", "cpu", "--parts", "is good, fails,crashes", "--out", str(tmp_path)])
    assert stop.value.code == 1
    parts, out = results(tmp_path)["parts"], capsys.readouterr().out
    assert [(name, part["status"]) for name, part in parts.items()] == [
        ("fails", "failed"),
        ("crashes", "failed"),
        ("is good", "done"),
    ]
    assert parts["fails"]["problem"].startswith("RuntimeError: out of memory (tests/e2e/test_gpu_check.py:")
    noted, inside, bound = parts["fails"]["entries"]
    assert noted == {"name": "before", "values": {"value": 1.5}}
    assert inside["passed"] is False and "ValueError: no such kernel" in inside["why"]
    assert bound["passed"] is False and bound["value"] == "nan"
    assert parts["crashes"]["problem"] == "ended by SIGKILL" and parts["crashes"]["entries"][0]["passed"]
    assert "FAIL  crashes: ended by SIGKILL\n" in out and "pass  is good: a check: 3 ≥ 2\n" in out and "4 failed" in out
    assert "not between" not in out and "not between the lines" in (tmp_path / "logs" / "is-good.log").read_text()
    assert "out of memory" in (tmp_path / "logs" / "fails.log").read_text()


def test_no_part_begins_after_the_time_is_up(tmp_path, capsys):
    check.main(["--tiny", "--minutes", "0", "--parts", "training,machine", "--out", str(tmp_path)])
    assert [(n, part["status"]) for n, part in results(tmp_path)["parts"].items()] == [
        (n, "not begun") for n in ("machine", "training")
    ]


def test_what_never_ends_is_ended_with_what_it_started(tmp_path):
    def hang(send):
        if not os.fork():
            time.sleep(60)
            os._exit(0)
        send({"name": "begun"})
        time.sleep(60)

    entries, begin = [], time.monotonic()
    assert isolated(hang, tmp_path / "log", 1, entries.append) == "ended after 1 s"
    assert entries == [{"name": "begun"}] and time.monotonic() - begin < 30


def test_mistakes_are_one_line(tmp_path, capsys):
    assert "--parts trainning: no such part (did you mean training?)" in refused(capsys, "--tiny", "--parts", "trainning")
    assert "--minutes -1" in refused(capsys, "--tiny", "--minutes", -1)
    (tmp_path / "file").write_text("")
    assert "--out" in refused(capsys, "--tiny", "--out", tmp_path / "file")
    assert "no GPU that works" in refused(capsys, "--out", tmp_path / "out")
