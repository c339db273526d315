"""What a resumed run may change, what is named when it does, and where it stands in its data."""

import dataclasses
import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from runs import CLASSES, make_latents, make_vae
from training_runs import arguments

import train
from checkpoint import training_state
from common.errors import UserError
from config.options import TrainConfig
from models.vae import SD_VAE
from randomness import training_draws
from training import resume
from training.data_order import DATA_POSITION, Progress, StepBatches, create_loader, total_steps
from training.run_data import RunData
from training.run_dir import RunDir
from training.setup import check, ema_warnings, resolve

pytestmark = pytest.mark.slow

LABELS = np.arange(24) % 5
WEIGHTS = {"x": torch.zeros(1)}


class Samples:
    """A data set of which only the labels matter."""

    shape = (8, 4, 4)
    text = None

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)


def run_data(labels=LABELS):
    return RunData(Samples(labels), None, SD_VAE, 0, 0)


def options(**changes):
    given = {"model": "SiT-Ti/2", "exp_name": "run", "batch_size": 4, "epochs": 3, "resume_step": -1}
    return TrainConfig(**given | changes)


def state_of(config, step=6, **changes):
    data = run_data()
    state = {"optimizer": {}, "step": step, "config": dataclasses.asdict(config), "vae": SD_VAE}
    return state | {resume.DATA_SIZE: 24, resume.DATA_LABELS: data.labels_sha256, DATA_POSITION: step} | changes


def problem(config, state, data=None) -> str:
    """Why the run may not be resumed; an empty text where it may."""
    try:
        resume.check_same_run(config, state, data or run_data(), RunDir(config, is_main=True))
    except UserError as error:
        return str(error)
    return ""


def test_options_that_the_model_does_not_have_may_change():
    state = state_of(options())
    assert not problem(options(elit_group_size=2, elit_tail="skip", head_depth=3, stages_count=3), state)
    elit = options(model="ELIT-SiT-Ti/2")
    line = problem(options(model="ELIT-SiT-Ti/2", elit_group_size=2), state_of(elit))
    assert "--elit-group-size 2" in line and "with 4" in line
    dfm = options(model="DFM-SiT-Ti/2")
    assert "--stages-count 3" in problem(options(model="DFM-SiT-Ti/2", stages_count=3), state_of(dfm))


def test_a_resumed_run_keeps_the_split_that_it_was_started_with(tmp_path):
    config = options(model="ELIT-SiT-Ti/2", output_dir=str(tmp_path), head_depth=None)
    run_dir = RunDir(config, is_main=True)
    assert resume.with_recorded_split(config, run_dir) == config  # a new run
    for recorded, split in ((None, (1, 1)), (3, (3, 1))):  # of a checkpoint of before, and of one that records it
        state = {"model": WEIGHTS, "ema": {"0.9": WEIGHTS}, "optimizer": {"state": {}}, "step": 6, "vae": SD_VAE.to_dict()}
        state["config"] = dataclasses.asdict(dataclasses.replace(config, head_depth=recorded))
        training_state.save(training_state.step_path(run_dir.checkpoints, 6), state)
        found = resume.with_recorded_split(config, run_dir)
        assert (found.head_depth, found.tail_depth) == split
        assert resume.with_recorded_split(dataclasses.replace(config, head_depth=2), run_dir).head_depth == 2
    old = state_of(config)
    assert not problem(dataclasses.replace(config, head_depth=1, tail_depth=1), old)
    assert "--head-depth 2" in problem(dataclasses.replace(config, head_depth=2, tail_depth=1), old)
    assert "--elit-write paper" in problem(dataclasses.replace(config, head_depth=1, tail_depth=1, elit_write="paper"), old)


def test_averages_longer_than_the_run_are_named():
    config = options(ema_decay=[0.9, 0.998])
    assert ema_warnings(config, 500) == []
    (line,) = ema_warnings(config, 400)
    assert "--ema-decay 0.998" in line and "500 steps" in line and "400" in line


@pytest.mark.parametrize("schedule", [{"lr_scheduler_type": "cosine"}, {"lr_cooldown": 0.5}])
def test_another_length_is_named_where_the_learning_rate_depends_on_it(schedule, capsys):
    before = options(max_train_steps=10, **schedule)
    for changes, name in (({"max_train_steps": 20}, "max_train_steps"), ({"epochs": 1, "max_train_steps": 10}, "epochs")):
        line = problem(options(**schedule | changes), state_of(before))
        assert f"--{name.replace('_', '-')} {changes[name]}:" in line and f"--allow-change {name}" in line and "step 10" in line
        assert not problem(options(**schedule | changes, allow_change=[name]), state_of(before))
        assert "learning rate now ends at step" in capsys.readouterr().err
        assert not problem(options(**changes), state_of(options(max_train_steps=10)))  # a constant rate
    assert not problem(options(max_train_steps=10, epochs=30, **schedule), state_of(before))  # ends at step 10 as before
    wider = options(max_train_steps=100, batch_size=8, allow_change=["batch_size"], **schedule)
    assert not problem(wider, state_of(options(max_train_steps=100, **schedule)))
    assert "now ends at step 12, not 18" in capsys.readouterr().err  # what the user asked for is said


def test_other_labels_of_the_same_number_are_named():
    other = LABELS.copy()
    other[[3, 4]] = other[[4, 3]]
    state = state_of(options())
    line = problem(options(), state, run_data(other))
    assert "--data-dir" in line and "labels differ" in line and "--allow-change data_labels" in line
    assert not problem(options(allow_change=["data_labels"]), state, run_data(other))
    assert not problem(options(), state, run_data(LABELS.astype(np.int32)))
    del state[resume.DATA_LABELS]  # a checkpoint of before
    assert not problem(options(), state, run_data(other))
    unlabelled = SimpleNamespace(dataset=SimpleNamespace(labels=None, text=None))
    assert RunData.labels_sha256.func(unlabelled) is None


def test_a_run_is_refused_with_other_labels(tmp_path, capsys):
    data = make_latents(tmp_path / "set", 24, make_vae(tmp_path / "vae"))
    train.main(arguments(data, tmp_path, "--max-train-steps", 1, model="SiT-Ti/4"))
    runs.reset_accelerate()
    other = tmp_path / "other"
    shutil.copytree(data, other)
    labels = json.loads((other / "vae-sd/dataset.json").read_text())["labels"]
    swapped = [[name, (label + 1) % CLASSES] for name, label in labels]
    (other / "vae-sd/dataset.json").write_text(json.dumps({"labels": swapped}))
    argv = arguments(other, tmp_path, "--max-train-steps", 2, "--resume-step", -1, model="SiT-Ti/4")
    capsys.readouterr()
    assert "its labels differ" in runs.refused(train.main, capsys, argv)


# ------------------------------------------------------------------------------------------------ the place in the data


def samples_of(num_samples, batch_size, start, stop):
    return list(StepBatches(num_samples, batch_size, range(batch_size), 0, start, stop))


@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4), (3, 5), (5, 3), (4, 24), (24, 4), (7, 7)])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 11])
def test_after_a_change_of_batch_size_no_sample_of_an_epoch_is_read_twice(before, after, steps):
    start = Progress(steps, steps, 24, before)
    now = start.converted(24, after)
    per_epoch = 24 // after
    epoch = steps // (24 // before)
    end = (epoch + 1) * per_epoch
    assert epoch * per_epoch <= now.position <= end
    done = [i for batch in samples_of(24, before, epoch * (24 // before), steps) for i in batch]
    rest = [i for batch in samples_of(24, after, now.position, end) for i in batch]
    assert len(set(done + rest)) == len(done + rest)
    assert len(done + rest) >= 24 - 2 * (max(before, after) - 1)  # less than a batch here and at the end is left out
    assert now.step == steps and (before != after or now == start)


def test_epochs_are_counted_in_samples_when_the_batch_size_changes():
    """Nine steps of 4, one epoch and a half of three; the other half and the third epoch follow in steps of 8."""
    halfway = Progress(9, 9, 24, 4)
    assert total_steps(options(), halfway, 24) == 18
    assert total_steps(options(batch_size=8), halfway, 24) == 9 + 1 + 3
    assert total_steps(options(batch_size=4, gradient_accumulation_steps=3), halfway, 24) == 9 + 3
    assert total_steps(options(batch_size=8, max_train_steps=11), halfway, 24) == 11


def test_the_position_is_recorded_and_old_checkpoints_stand_where_they_stood():
    config = options(gradient_accumulation_steps=2)
    state = state_of(config, step=5, **{DATA_POSITION: 7})
    assert Progress.of_state(state, 99) == Progress(5, 7, 24, 4)
    del state[DATA_POSITION], state[resume.DATA_SIZE]
    assert Progress.of_state(state, 99) == Progress(5, 10, 99, 4)


# -------------------------------------------------------------------------------------------------------------- checks


def test_checks_change_nothing(capsys):
    config = options(mixed_precision="fp16", allow_change=["--batch-size", "data-labels"], enc_type="dinov2-vit-b")
    before = dataclasses.asdict(config)
    assert ["REPA is off" in message for message in check(config, {})] == [True]
    assert dataclasses.asdict(config) == before and not capsys.readouterr().err
    resolved = resolve(config)
    assert (resolved.mixed_precision, resolved.allow_change) == ("no", ["batch_size", "data_labels"])
    assert dataclasses.asdict(config) == before and "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_arrive_with_the_draws_of_their_forward(workers):
    """Made in the data workers, where there are any; a run that begins in between counts its forwards on."""

    class Samples:
        text, flip = None, False

        def __getitems__(self, indices):
            return [{"moments": torch.full((4, 3, 3), float(i)), "label": i} for i in indices]

    batches = StepBatches(20, 4, range(1, 3), 0, start=7, stop=10, forward=5)
    draw = partial(training_draws, 3, batch_slice=range(1, 3), shape=(2, 3, 3), further_shapes=[(2, 1, 1)])
    loaded = list(create_loader(Samples(), draw, batches, workers, torch.device("cpu")))
    assert [batch["label"].tolist() for batch in loaded] == list(batches)
    for n, batch in enumerate(loaded):
        assert batch["moments"][:, 0, 0, 0].tolist() == batch["label"].tolist()
        for name, value in vars(draw(5 + n)).items():
            torch.testing.assert_close(getattr(batch["draws"], name), value, rtol=0, atol=0)
