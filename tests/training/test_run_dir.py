"""The run folder, alone."""

import json

import pytest

from common.errors import UserError
from config.options import TrainConfig
from training.preemption import Preemption
from training.run_dir import LOCK, RunDir


def run_dir_of(tmp_path, is_main=True, **options):
    return RunDir(TrainConfig(model="SiT-Ti/2", exp_name="run", output_dir=str(tmp_path), **options), is_main)


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_line_is_json_whatever_was_measured(tmp_path):
    folder = run_dir_of(tmp_path)
    folder.begin(0)
    values = {"val_loss": float("nan"), "loss": 1.5, "grad_norm": None, "tflops": float("inf")}
    assert folder.append_metrics(3, values) == {"loss": 1.5}
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert list(strict(line).items()) == [("step", 3), ("val_loss", None), ("loss", 1.5), ("grad_norm", None), ("tflops", None)]


def test_making_it_touches_nothing_and_other_ranks_write_nothing(tmp_path):
    other = run_dir_of(tmp_path, is_main=False)
    other.begin(0)
    other.write_status("running", 1)
    assert other.append_metrics(1, {"loss": 1.0}) == {}
    assert run_dir_of(tmp_path).check() == [] and not list(tmp_path.iterdir())


def test_the_lock_is_held_inside_and_leaves_nothing(tmp_path):
    folder = run_dir_of(tmp_path)
    with pytest.raises(KeyError), folder.lock(Preemption()):
        assert (tmp_path / "run" / LOCK).exists()
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_what_killed_writes_left_goes_and_what_is_not_ours_stays(tmp_path):
    folder = run_dir_of(tmp_path)
    folder.begin(0)
    for name in ("status.json.123.tmp", "notes.txt.123.tmp", "mine.tmp"):
        (tmp_path / "run" / name).write_text("x")
    folder.begin(0)
    there = {path.name for path in (tmp_path / "run").iterdir()}
    assert "status.json.123.tmp" not in there and {"notes.txt.123.tmp", "mine.tmp"} <= there


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("a file")
    with pytest.raises(UserError, match=r"--output-dir .*samples"):
        run_dir_of(tmp_path).begin(0)
