"""Scores during training: those of generate.py and evaluate.py, and nothing else of the run changes."""

import json
import os
import shlex
import signal
from functools import partial

import numpy as np
import pytest
import runs
import training_runs
from runs import RESOLUTION, make_latents, make_vae, reset_accelerate
from training_runs import assert_same_tensors, final_state, metrics

import evaluate
import generate
import models
import train
from checkpoint import training_state
from training import validation

pytestmark = pytest.mark.slow
NAMES = ("fid_budget_0.25", "mind_budget_0.25", "fid_budget_1", "mind_budget_1")
refused = partial(runs.refused, train.main)


def arguments(data, out, *more):
    """Steps so large, and an average so short, that the images of two steps differ."""
    return training_runs.arguments(data, out, "--ema-decay", 0, "--learning-rate", 0.03, *more, model="ELIT-SiT-Ti/4")


@pytest.fixture(scope="module", autouse=True)
def no_flops():
    """Counting them takes longer than all else here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.count_flops", lambda *_: 1)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    images = np.random.default_rng(0).integers(0, 256, (9, RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    np.savez(folder / "ref.npz", arr_0=images)
    np.savez(folder / "large.npz", arr_0=images.repeat(2, axis=1).repeat(2, axis=2))
    return make_latents(folder / "set", 24, make_vae(folder / "vae"))


def scored(data, *more):
    options = ("--eval-steps", 3, "--eval-ref", data.parent / "ref.npz", "--eval-samples", 7, "--eval-budgets", "0.25,1.0")
    return (
        *options,
        "--eval-metrics",
        "fid,mind",
        "--eval-num-steps",
        2,
        "--eval-features",
        "runs:colour_features",
        *more,
    )


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """4 steps, a checkpoint at 2 and 4, scored at 3 and 4; the last one is kept and the best."""
    out = tmp_path_factory.mktemp("whole")
    train.main(arguments(data, out, *scored(data)))
    reset_accelerate()
    return out


def test_scores_are_those_of_generate_and_evaluate_and_training_is_the_same(data, whole, tmp_path):
    for name in NAMES:
        assert set(metrics(whole, name)) == {3, 4}, name
    best = json.loads((whole / "run" / "best.json").read_text())
    assert len({metrics(whole, name)[step] for name in NAMES for step in (3, 4)}) == 8  # all images differ
    first = metrics(whole, NAMES[0])
    assert best["value"] == min(first.values()) and first[best["step"]] == best["value"] and best["metric"] == NAMES[0]
    command = shlex.split(best["generate"])
    assert command[3] == str(training_state.step_path(whole / "run" / "checkpoints", best["step"]))
    for budget in ("0.25", "1.0"):
        out = tmp_path / budget
        generate.main([*command[2:], "--inference-budget", budget, "--sample-dir", str(out)])
        reset_accelerate()
        (samples,) = (out / "run").glob("*.npz")
        options = ("--metrics", "fid", "mind", "--features", "runs:colour_features", "--output", str(out / "m"))
        evaluate.main([str(data.parent / "ref.npz"), str(samples), *options])
        reset_accelerate()
        offline = json.loads((out / "m").read_text())
        for metric in ("fid", "mind"):
            online = metrics(whole, f"{metric}_budget_{float(budget):g}")[best["step"]]
            assert online == pytest.approx(offline[metric], rel=1e-6), (budget, metric)
    train.main(arguments(data, tmp_path))
    assert_same_tensors(final_state(tmp_path)["model"], final_state(whole)["model"])
    assert_same_tensors(final_state(tmp_path)["ema"]["0"], final_state(whole)["ema"]["0"])
    assert metrics(tmp_path) == metrics(whole)


def test_a_signal_or_a_kill_while_images_are_drawn_repeats_that_alone(data, whole, tmp_path, monkeypatch):
    """The signal stops the drawing; then the line is removed, as if a kill had come before it was written."""
    original, steps = models.elit.ELITSiT.forward, []

    def forward(self, *args, **kwargs):
        steps.append(self.training)
        if steps.count(False) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(models.elit.ELITSiT, "forward", forward)
        with pytest.raises(SystemExit) as stop:
            train.main(arguments(data, tmp_path, *scored(data)))
    assert stop.value.code == 128 + signal.SIGTERM and steps.count(False) == 2
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status == {"state": "preempted", "step": 3} and not (tmp_path / "run" / "best.json").exists()
    resumed = partial(
        train.main, arguments(data, tmp_path, *scored(data, "--keep-last", 1, "--keep-best", "--resume-step", -1))
    )
    reset_accelerate()
    resumed()
    assert [metrics(tmp_path, name) for name in NAMES] == [metrics(whole, name) for name in NAMES]
    assert_same_tensors(final_state(tmp_path)["model"], final_state(whole)["model"])
    best = json.loads((whole / "run" / "best.json").read_text())["step"]
    kept = {p.name for p in (tmp_path / "run" / "checkpoints").glob("*.pt")}
    assert kept == {"0000004.pt", f"{best:07d}.pt"}

    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"step": 4' not in line))
    (tmp_path / "run" / "best.json").write_text("cut sh")
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", lambda *_: pytest.fail("a step was repeated"))
        reset_accelerate()
        resumed()
        assert [metrics(tmp_path, name) for name in NAMES] == [metrics(whole, name) for name in NAMES]
        patch.setattr(validation.torch, "tensor", None)  # nothing is left to be drawn
        reset_accelerate()
        resumed()
    found = json.loads((tmp_path / "run" / "best.json").read_text())
    assert (found["step"], found["value"]) == (best, metrics(whole, NAMES[0])[best])


def test_images_that_are_not_finite_leave_a_gap(data, tmp_path, monkeypatch, capsys):
    from flows import FlowMatching

    sample = FlowMatching.sample
    monkeypatch.setattr(FlowMatching, "sample", lambda *args: sample(*args) * float("nan"))
    train.main(arguments(data, tmp_path, *scored(data, "--max-train-steps", 2, "--eval-budgets", 1)))
    assert "step 2 is not scored" in (said := capsys.readouterr().err) and "image 0 are not finite" in said
    assert metrics(tmp_path, "fid_budget_1") == {2: None} and not (tmp_path / "run" / "best.json").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--eval-steps", 2), "--eval-steps 2: needs --eval-ref"),
        (("--keep-best",), "--keep-best: nothing is scored"),
        (("--eval-steps", 2, "--eval-ref", "nowhere.npz"), "--eval-ref nowhere.npz: no such file"),
        (("--eval-steps", 2, "--eval-ref", "large.npz"), "large.npz: has images of 64x64 pixels; those of the run have --resolution 32"),
        (("--eval-steps", 2, "--eval-ref", "ref.npz", "--eval-metrics", "fdi"), "--eval-metrics fdi: not a metric (did you mean fid?)"),
        (("--eval-steps", 2, "--eval-ref", "ref.npz", "--eval-metrics", "cmmd"), "--eval-metrics cmmd: needs --clip-weights"),
        (("--eval-steps", 2, "--eval-ref", "ref.npz", "--eval-budgets", 0.1), "--eval-budgets: inference budget 0.1"),
        (("--eval-steps", 2, "--eval-ref", "ref.npz", "--eval-budgets", 0.25, "--model", "SiT-Ti/2", "--elit-max-mask-prob", "none",
          "--elit-min-mask-prob", "none"), "--eval-budgets 0.25: SiT-Ti/2 has no budget"),
        (("--eval-steps", 2, "--eval-ref", "ref.npz", "--eval-features", "runs:nothing"), "--eval-features runs:nothing"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(data, tmp_path, capsys, monkeypatch, more, words):
    monkeypatch.chdir(data.parent)
    assert words in refused(capsys, arguments(data, tmp_path / "out", *more)).replace(f"{data.parent}/", "")
    assert not list(tmp_path.iterdir())
