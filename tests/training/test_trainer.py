"""train.py: what a step computes, what a run leaves, resume, several processes, and what it refuses."""

import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from reference import pyramid
from runs import RESOLUTION, command_line, environment, make_latents, make_vae, reset_accelerate
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import arguments, assert_same_tensors, final_state, metrics

import models
import train
from checkpoint import training_state
from common.files import WriteError
from config.options import TrainConfig
from config.parsing import parse
from data.dataset import LatentDataset
from loss import active_stage
from randomness import epoch_order, training_draws
from training import data_order, run_dir, setup, trainer, validation
from training.data_order import StepBatches
from training.optim import EMA, learning_rate_factor

pytestmark = pytest.mark.slow

COUNT = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return make_latents(folder / "set", COUNT, make_vae(folder / "vae"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """One run of 4 steps by one process, and its folder."""
    out = tmp_path_factory.mktemp("undisturbed")
    train.main(arguments(data, out))
    reset_accelerate()
    return out


def test_a_run_leaves_its_folder(undisturbed):
    run = undisturbed / "run"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "0000002.pt",
        "0000002.pt.sha256",
        "0000004.pt",
        "0000004.pt.sha256",
    ]
    assert json.loads((run / "status.json").read_text()) == {"state": "finished", "step": 4}
    assert set(metrics(undisturbed)) == {1, 2, 3, 4}
    assert "model: ELIT-SiT-Ti/2" in (run / "config.yaml").read_text()
    assert "step 4" in (run / "log.txt").read_text()
    state = final_state(undisturbed)
    parts = {"format", "model", "ema", "optimizer", "scheduler", "scaler", "step", "config", "vae", "data_size", "meters"}
    parts |= {"data_labels", "data_position", "validation_due"}
    assert set(state) == parts
    assert state["step"] == 4 and list(state["ema"]) == ["0.9999"] and state["vae"]["downsample_factor"] == 4


def test_first_loss_is_the_velocity_error_of_the_draws(data, undisturbed):
    """An untrained model predicts 0, so the first loss is the mean square of the target, here in NumPy."""
    order = epoch_order(0, 0, COUNT)[:8]
    moments = np.stack([np.load(data / "vae-sd" / "00000" / f"img-mean-std-{i:08d}.npy") for i in order]).astype(np.float64)
    draws = training_draws(0, 0, range(8), (4, 8, 8))
    latents = (moments[:, :4] + moments[:, 4:] * draws.posterior.numpy()) * 0.5  # the record's scale
    expected = np.mean((draws.noise.numpy() - latents) ** 2)
    assert metrics(undisturbed)[1] == pytest.approx(expected, rel=1e-5)


def test_killed_and_resumed_equals_undisturbed(data, undisturbed, tmp_path):
    """SIGKILL after the first checkpoint, then the same command: weights, EMA, optimizer and losses are the same bits."""
    command = command_line("train.py", *arguments(data, tmp_path, "--resume-step", -1))
    process = subprocess.Popen(command, env=environment(), cwd=Path(train.__file__).parent, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "0000002.pt").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    train.main(arguments(data, tmp_path, "--resume-step", -1))
    resumed, whole = final_state(tmp_path), final_state(undisturbed)
    assert_same_tensors(resumed["model"], whole["model"])
    assert_same_tensors(resumed["ema"]["0.9999"], whole["ema"]["0.9999"])
    for a, b in zip(resumed["optimizer"]["state"].values(), whole["optimizer"]["state"].values(), strict=True):
        assert_same_tensors(a, b)
    assert metrics(tmp_path) == metrics(undisturbed)


def test_a_damaged_newest_checkpoint_is_passed_over(data, undisturbed, tmp_path, capsys):
    train.main(arguments(data, tmp_path))
    newest = tmp_path / "run" / "checkpoints" / "0000004.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    reset_accelerate()
    train.main(arguments(data, tmp_path, "--resume-step", -1))
    assert "0000004.pt: damaged" in capsys.readouterr().err
    assert_same_tensors(final_state(tmp_path)["model"], final_state(undisturbed)["model"])


def stages_shown(output_dir, step):
    """Size of the picture at a step in cells: images, stages and budgets beside each other, images below each other."""
    with Image.open(output_dir / "run" / "samples" / f"{step:07d}.png") as image:
        return tuple((side + 2) / (RESOLUTION + 2) for side in image.size)


def test_dfm_trains_resumes_and_shows_its_stages(data, tmp_path, monkeypatch):
    model = "DFM-ELIT-SiT-Ti/2"
    monkeypatch.setattr(validation, "SAMPLE_CFG", 1.0)
    more = ("--stage-weights", 0.5, 0.5, "--num-steps-per-scale", 2, 1)
    train.main(arguments(data, tmp_path / "whole", *more, model=model))
    reset_accelerate()
    pictures = ("--val-data-dir", data, "--sampling-steps", 2)
    train.main(arguments(data, tmp_path, *more, *pictures, model=model))
    for name in ("0000004.pt", "0000004.pt.sha256"):
        (tmp_path / "run" / "checkpoints" / name).unlink()
    reset_accelerate()
    train.main(arguments(data, tmp_path, *more, *pictures, "--resume-step", -1, model=model))
    whole, resumed = final_state(tmp_path / "whole"), final_state(tmp_path)
    assert_same_tensors(resumed["model"], whole["model"])
    assert metrics(tmp_path) == metrics(tmp_path / "whole")
    stages = {active_stage(training_draws(0, n, range(1), (1,)).stage, [0.5, 0.5]) for n in range(4)}
    assert stages == {0, 1}  # both were met, so both final layers have moved
    for s in stages:
        assert whole["model"][f"final_layer.projections.{s}.linear.weight"].abs().max() > 0
    for budget in ("1", "0.25"):
        for s in (0, 1):
            assert set(metrics(tmp_path, f"val_loss_budget_{budget}_stage_{s}")) == {1, 2, 4}
    assert stages_shown(tmp_path, 4) == (2 * 3 * 8, 8)  # stage 0, stage 1 and the whole, at each budget


def test_first_loss_of_dfm_is_the_velocity_error_of_its_stages(data, tmp_path, monkeypatch):
    """An untrained model predicts 0: the loss of forward 0, whose active stage is the last, in NumPy."""
    monkeypatch.setattr(validation, "SAMPLE_CFG", 1.0)
    pictures = ("--val-data-dir", data, "--sampling-steps", 1, "--num-steps-per-scale", 2, 1)
    train.main(arguments(data, tmp_path, "--stage-weights", 0, 1, "--max-train-steps", 1, *pictures, model="DFM-SiT-Ti/2"))
    assert set(metrics(tmp_path, "val_loss_stage_0")) == set(metrics(tmp_path, "val_loss_stage_1")) == {1}
    assert stages_shown(tmp_path, 1) == (3 * 8, 8)
    order = epoch_order(0, 0, COUNT)[:8]
    moments = np.stack([np.load(data / "vae-sd" / "00000" / f"img-mean-std-{i:08d}.npy") for i in order]).astype(np.float64)
    draws = training_draws(0, 0, range(8), (4, 8, 8), further_shapes=[(4, 4, 4)])
    latents = (moments[:, :4] + moments[:, 4:] * draws.posterior.numpy()) * 0.5
    noise = [draws.coarse_noise[0].numpy(), draws.noise.numpy()]
    expected = np.mean([sum(np.mean((noise[s][b] - x) ** 2) for s, x in enumerate(pyramid(latents[b], 2))) for b in range(8)])
    assert metrics(tmp_path)[1] == pytest.approx(expected, rel=1e-5)


def assert_close_weights(one, two):
    """Adam turns float rounding of near-zero gradients into steps of its learning rate: means agree, not each entry."""
    for key in one:
        assert (one[key] - two[key]).abs().mean() < 2e-5, key


def status(output_dir):
    return json.loads((output_dir / "run" / "status.json").read_text())


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        (("torchrun", "--nproc_per_node=2", "--master_port=PORT", "--signals_to_handle=SIGUSR1,SIGTERM"), signal.SIGUSR1),
        (("accelerate", "launch", "--multi_gpu", "--num_processes=2", "--main_process_port=PORT"), signal.SIGTERM),
    ],
)
def test_two_processes_train_as_one_and_stop_together_at_a_signal(data, undisturbed, tmp_path, launcher, number):
    lasting = ("--max-train-steps", 100_000, "--epochs", 100_000, "--checkpointing-steps", 100_000, "--num-workers", 1)
    launcher = [word.replace("PORT", str(runs.free_port())) for word in launcher]
    command = command_line(*launcher, "train.py", *arguments(data, tmp_path, *lasting))
    process = subprocess.Popen(command, env=environment(), cwd=runs.ROOT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert "= 2 processes × 4 × 1" in (tmp_path / "run" / "log.txt").read_text()
    one, two = metrics(undisturbed), metrics(tmp_path)
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-5)
    stopped = status(tmp_path)
    assert stopped["state"] == "preempted" and stopped["step"] == max(two), errors
    assert final_state(tmp_path, stopped["step"])["step"] == stopped["step"]
    assert number.name in errors and "--resume-step -1" in errors
    assert "FutureWarning" not in errors


COUNT_REDUCTIONS = """
import signal
from torch.profiler import ProfilerActivity, profile
run, step, counts = train.Trainer.run, train.Trainer.train_step, []
def counting_run(self, preemption):
    try:
        run(self, preemption)
    finally:
        if rank == 0:
            print("reductions:", *counts)
def counting_step(self, batches):
    if self.step <= 3:
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            step(self, batches)
        counts.append(sum(event.name == "c10d::allreduce_" for event in trace.events()))
    else:
        step(self, batches)
    if rank == 1 and self.step == 3:
        os.kill(os.getpid(), signal.SIGUSR1)
train.Trainer.run, train.Trainer.train_step = counting_run, counting_step
"""


ONE_READER = """
if rank:
    import checkpoint.training_state, common.tensor_files
    checkpoint.training_state.load = common.tensor_files.load = None
"""


def test_four_processes_train_as_one_and_two_go_on_and_a_signal_to_one_ends_both(data, undisturbed, tmp_path):
    """The two go on to where the undisturbed run ends; and then reduce their gradients once for several micro-steps."""
    split, lasting = tmp_path / "split", tmp_path / "lasting"
    many = (
        "--max-train-steps",
        100_000,
        "--epochs",
        100_000,
        "--gradient-accumulation-steps",
        3,
        "--batch-size",
        4,
        "--ema-decay",
        0,
    )
    told = runs.train_on(
        (4, arguments(data, split, "--max-train-steps", 2), ""),
        (2, arguments(data, split, "--resume-step", -1), ONE_READER),
        (2, arguments(data, lasting, *many, model="DFM-SiT-Ti/2"), COUNT_REDUCTIONS),
    )
    assert told[:2] == ["0 0 0 0", "0 0"]
    one, two = metrics(undisturbed), metrics(split)
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-5)
    assert_close_weights(final_state(undisturbed)["model"], final_state(split)["model"])

    counts = [int(count) for count in told[2].removeprefix("reductions: ").split()]
    # Of three micro-steps together; nothing looks for parameters without a gradient.
    assert len(counts) == 3 and all(1 <= count <= 2 for count in counts)
    stopped = status(lasting)
    assert stopped["state"] == "preempted" and stopped["step"] >= 3
    state = final_state(lasting, stopped["step"])
    assert_same_tensors(state["ema"]["0"], state["model"])  # an average of decay 0 is the weights themselves
    assert state["step"] == stopped["step"]
    assert told[3] == f"{128 + signal.SIGUSR1} {128 + signal.SIGUSR1}"


def interrupt(monkeypatch, action, at):
    """Do `action` when the run has taken step `at`."""
    train_step = trainer.Trainer.train_step

    def step(self, batches):
        train_step(self, batches)
        if self.step == at:
            action()

    monkeypatch.setattr(trainer.Trainer, "train_step", step)


def test_a_signal_saves_after_the_step_and_resuming_gives_the_same_lines(data, tmp_path, monkeypatch, capsys):
    """Lines are logged every 3 steps, and the run is cut between two of them: their means still are of 3 steps."""
    number = signal.SIGTERM
    options = ("--log-every", 3, "--checkpointing-steps", 100, "--max-train-steps", 7, "--ema-decay", 0.9, 0.99)
    train.main(arguments(data, tmp_path / "whole", *options))
    read = []
    with monkeypatch.context() as patch:
        interrupt(patch, lambda: os.kill(os.getpid(), number), at=4)
        reset_accelerate()
        with pytest.raises(SystemExit) as stop:
            train.main(arguments(data, tmp_path / "cut", *options))
    assert stop.value.code == 128 + number and status(tmp_path / "cut") == {"state": "preempted", "step": 4}
    assert f"{number.name}: stopped after step 4; --resume-step -1" in capsys.readouterr().err
    assert signal.getsignal(number) == signal.SIG_DFL
    batch = LatentDataset.__getitems__
    monkeypatch.setattr(LatentDataset, "__getitems__", lambda self, i, **more: read.append(i) or batch(self, i, **more))
    reset_accelerate()
    train.main(arguments(data, tmp_path / "cut", *options, "--resume-step", -1))
    assert read == [
        epoch_order(0, n // 3, COUNT)[n % 3 * 8 : n % 3 * 8 + 8].tolist() for n in (4, 5, 6)
    ]  # nothing before its place
    a, b = final_state(tmp_path / "whole", 7), final_state(tmp_path / "cut", 7)
    assert a["scheduler"] == b["scheduler"]
    for kind in ("model", "meters"):
        assert_same_tensors(a[kind], b[kind])
    for decay in ("0.9", "0.99"):
        assert_same_tensors(a["ema"][decay], b["ema"][decay])
    lines = [[json.loads(line) for line in (tmp_path / run / "run" / "metrics.jsonl").open()] for run in ("whole", "cut")]
    assert [line["step"] for line in lines[0]] == [1, 3, 6, 7]
    for line in lines[0] + lines[1]:
        assert line.pop("images_per_second") > 0 and line.pop("tflops") > 0
        assert 0 < line.pop("host_ms") <= line.pop("step_ms")
    assert lines[0] == lines[1]
    names = set().union(*lines[0])
    assert {"loss", "grad_norm", "lr", "skipped", "loss_t0", "loss_t9", "loss_budget_0.25", "loss_budget_1"} <= names


def test_full_disk_in_training_is_told_and_outlived(data, tmp_path, monkeypatch, capsys, undisturbed):
    """No room for checkpoints while steps 2 and 3 are saved: those are missing, and the run is as it would have been."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = trainer.Trainer.save

    def saving(self):
        self.writer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6 if self.step in (2, 3) else limits[0], limits[1]))
        save(self)

    monkeypatch.setattr(trainer.Trainer, "save", saving)
    train.main(arguments(data, tmp_path, "--checkpointing-steps", 1, "--keep-last", 2))
    assert training_state.saved_steps(tmp_path / "run" / "checkpoints") == [1, 4]
    told = capsys.readouterr().err
    assert told.count("could not be written") == 2 and "0000002.pt" in told and "0000003.pt" in told
    assert status(tmp_path) == {"state": "finished", "step": 4}
    assert_same_tensors(final_state(tmp_path)["model"], final_state(undisturbed)["model"])


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_that_names_the_one_before(data, tmp_path, monkeypatch, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = trainer.Trainer.save

    def saving(self):
        self.writer.wait()  # the checkpoint before is on the disk when that is full
        if self.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
        save(self)

    monkeypatch.setattr(trainer.Trainer, "save", saving)
    try:
        line = refused(capsys, arguments(data, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "0000004.pt: could not be written" in line and "last good checkpoint is" in line and "0000002.pt" in line
    assert status(tmp_path) == {"state": "failed", "step": 4}


def test_a_line_that_does_not_fit_on_the_disk_leaves_nothing_of_it(tmp_path, capsys):
    path, limits = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    run_dir.append_line(path, "one\n")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6, limits[1]))
        with run_dir.warn_if_unwritable(path):
            run_dir.append_line(path, "two\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "metrics.jsonl: cannot be written" in capsys.readouterr().err
    with pytest.raises(WriteError, match=f"^{tmp_path}: cannot be written: Is a directory$"):
        run_dir.append_line(tmp_path, "lost")
    run_dir.append_line(path, "three\n")
    assert path.read_text() == "one\nthree\n"


def poison(monkeypatch, steps):
    """The gradient of these steps is not finite, though the loss is."""
    forward = trainer.Trainer.forward

    def poisoned(self, batch):
        loss = forward(self, batch)
        return loss + (next(self.model.parameters()).sum() * float("inf") if self.step in steps else 0)

    monkeypatch.setattr(trainer.Trainer, "forward", poisoned)


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(data, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 4})
    train.main(arguments(data, tmp_path, "--checkpointing-steps", 1))
    states = [final_state(tmp_path, step) for step in (1, 2, 3, 4)]
    for (before, after), same in zip(itertools.pairwise(states), (True, False, True), strict=True):
        assert all(torch.equal(before["model"][k], after["model"][k]) for k in before["model"]) == same
        moments = [[v for s in state["optimizer"]["state"].values() for v in s.values()] for state in (before, after)]
        assert all(map(torch.equal, *moments)) == same
    assert metrics(tmp_path, "skipped") == {1: 0, 2: 1, 3: 1, 4: 2}
    assert metrics(tmp_path, "grad_norm")[2] is None and metrics(tmp_path, "grad_norm")[3] > 0


def test_too_many_skipped_steps_in_a_row_stop_the_run_at_the_next_line(data, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {3, 5, 6, 7})
    options = ("--max-skipped-steps", 3, "--log-every", 4, "--max-train-steps", 20)
    line = refused(capsys, arguments(data, tmp_path, *options))
    assert "step 8: 3 steps in a row" in line and "0000004.pt" in line  # the one before step 5
    assert status(tmp_path) == {"state": "failed", "step": 8}


def test_a_step_does_not_wait_for_the_device(data, tmp_path, monkeypatch):
    """No operation that brings a value to the host, or has a shape that depends on one."""
    found, steps, train_step = [], [], trainer.Trainer.train_step

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket._qualified_op_name
            found.extend([name] if name in WAITING else [])
            return function(*args, **(kwargs or {}))

    def watched(self, batches):
        with Record():
            train_step(self, batches)
            steps.append(self.step)

    monkeypatch.setattr(trainer.Trainer, "train_step", watched)
    train.main(arguments(data, tmp_path, "--gradient-accumulation-steps", 2, "--mixed-precision", "bf16"))
    assert steps == [1, 2, 3, 4] and found == []
    with Record():
        torch.ones(2).sum().item()
    assert found == ["aten::_local_scalar_dense"]


WAITING = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::equal",
)


def test_compiled_training_is_the_same_with_at_most_two_graphs_a_region(data, undisturbed, tmp_path, monkeypatch):
    counter = CompileCounterWithBackend("eager")
    compile_model = setup.models.compile_model
    monkeypatch.setattr(setup.models, "compile_model", lambda model: compile_model(model, backend=counter))
    torch._dynamo.reset()
    train.main(arguments(data, tmp_path, "--compile", "--gradient-checkpointing", "--max-train-steps", 4))
    assert 7 <= counter.frame_count <= 7 + 2  # a single latent per group has graphs of its own in Read and Write
    one, two = metrics(undisturbed), metrics(tmp_path)
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-4)


def test_averaged_weights_follow_every_step(data, tmp_path):
    train.main(arguments(data, tmp_path, "--checkpointing-steps", 1, "--ema-decay", 0.5, 0.9, model="SiT-Ti/2"))
    states = [final_state(tmp_path, step) for step in (1, 2, 3, 4)]
    for decay in ("0.5", "0.9"):
        name = "blocks.3.mlp.fc1.weight"
        d = float(decay)
        expected = states[0]["ema"][decay][name].double()
        for state in states[1:]:
            expected = d * expected + (1 - d) * state["model"][name].double()
            torch.testing.assert_close(state["ema"][decay][name].double(), expected, rtol=0, atol=1e-7)
    assert not torch.equal(states[3]["ema"]["0.5"][name], states[3]["ema"]["0.9"][name])


def test_averaged_weights_follow_parameters_whose_storage_is_replaced():
    """As DDP does it when a model is prepared for several processes."""
    model = torch.nn.Linear(2, 2)
    ema = EMA(model, [0.0])
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
        parameter.data.add_(1)
    ema.update()
    assert_same_tensors(ema.model().state_dict(), model.state_dict())


def test_accumulation_averages_its_micro_steps(data, tmp_path):
    """Two micro-steps of 4: the first logged loss is the mean of forwards 0 and 1 of an untrained model."""
    options = ("--batch-size", 4, "--gradient-accumulation-steps", 2, "--max-train-steps", 1)
    train.main(arguments(data, tmp_path, *options))
    order, losses = epoch_order(0, 0, COUNT), []
    for n in range(2):
        files = [f"img-mean-std-{i:08d}.npy" for i in order[4 * n : 4 * n + 4]]
        moments = np.stack([np.load(data / "vae-sd" / "00000" / f) for f in files])
        draws = training_draws(0, n, range(4), (4, 8, 8))
        latents = (moments[:, :4] + moments[:, 4:] * draws.posterior.numpy()) * 0.5
        losses.append(np.mean((draws.noise.numpy() - latents) ** 2))
    assert metrics(tmp_path)[1] == pytest.approx(np.mean(losses), rel=1e-5)


def test_sample_images_validation_loss_and_tracker(data, tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "SAMPLE_STEPS", 2)
    options = ("--val-data-dir", data, "--sampling-steps", 2, "--max-train-steps", 2, "--report-to", "tensorboard")
    train.main(arguments(data, tmp_path, *options))
    run = tmp_path / "run"
    for step in (1, 2):
        with Image.open(run / "samples" / f"{step:07d}.png") as image:
            assert image.size == (16 * (RESOLUTION + 2) - 2, 8 * (RESOLUTION + 2) - 2)  # full and lowest budget, 8 × 8 each
    assert set(metrics(tmp_path, "val_loss_budget_0.25")) == {1, 2}
    assert set(metrics(tmp_path, "val_loss_budget_1")) == {1, 2}
    assert list((run / "logs").rglob("events.out.tfevents*"))


def test_a_signal_while_images_are_drawn_leaves_them_to_the_resumed_run(data, tmp_path, monkeypatch):
    """They would take for ever; the run that resumes draws and measures what an undisturbed one has at that step."""
    options = ("--val-data-dir", data, "--sampling-steps", 2, "--max-train-steps", 3, "--checkpointing-steps", 100)
    monkeypatch.setattr(validation, "SAMPLE_STEPS", 2)
    train.main(arguments(data, tmp_path / "whole", *options, model="SiT-Ti/4"))
    runs.reset_accelerate()

    evaluations = []

    def forward(self, *args, **kwargs):
        evaluations.append(self.training)
        if evaluations.count(False) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    original = models.sit.SiT.forward
    with monkeypatch.context() as patch:
        patch.setattr(models.sit.SiT, "forward", forward)
        patch.setattr(validation, "SAMPLE_STEPS", 10**6)
        with pytest.raises(SystemExit) as stop:
            train.main(arguments(data, tmp_path, *options, model="SiT-Ti/4"))
    assert stop.value.code == 128 + signal.SIGTERM and evaluations.count(False) == 20
    assert status(tmp_path) == {"state": "preempted", "step": 1} and not list((tmp_path / "run" / "samples").iterdir())
    assert final_state(tmp_path, 1)["validation_due"] and not metrics(tmp_path, "val_loss")
    runs.reset_accelerate()
    train.main(arguments(data, tmp_path, *options, "--resume-step", -1, model="SiT-Ti/4"))
    for name in ("0000001.png", "0000002.png"):
        whole, resumed = (folder / "run" / "samples" / name for folder in (tmp_path / "whole", tmp_path))
        assert whole.read_bytes() == resumed.read_bytes()
    assert metrics(tmp_path, "val_loss") == metrics(tmp_path / "whole", "val_loss")
    assert metrics(tmp_path) == metrics(tmp_path / "whole")
    assert not final_state(tmp_path, 3)["validation_due"]


def test_a_signal_while_the_last_images_are_drawn_is_a_preemption_too(data, tmp_path, monkeypatch):
    options = ("--sampling-steps", 1, "--max-train-steps", 1)
    with monkeypatch.context() as patch:
        patch.setattr(validation.Validation, "_sample", lambda *_: signal.raise_signal(signal.SIGTERM) or stopped())
        with pytest.raises(SystemExit):
            train.main(arguments(data, tmp_path, *options, model="SiT-Ti/4"))
    assert status(tmp_path) == {"state": "preempted", "step": 1} and final_state(tmp_path, 1)["validation_due"]
    runs.reset_accelerate()
    monkeypatch.setattr(validation, "SAMPLE_STEPS", 1)
    train.main(arguments(data, tmp_path, *options, "--resume-step", -1, model="SiT-Ti/4"))
    assert status(tmp_path) == {"state": "finished", "step": 1} and not final_state(tmp_path, 1)["validation_due"]
    assert (tmp_path / "run" / "samples" / "0000001.png").is_file() and list(metrics(tmp_path)) == [1]


def stopped():
    raise validation.Interrupted


def test_another_process_s_interruption_ends_the_drawing_of_all(monkeypatch):
    """One of two processes was told to stop: in the sum of both, the flag is set."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), reduce=lambda flag, reduction: flag + 1)
    with pytest.raises(validation.Interrupted), validation.together(accelerator, [torch.nn.Identity()], lambda: False):
        pass


def test_building_a_trainer_writes_nothing(data, tmp_path):
    argv = arguments(data, tmp_path / "out", "--sampling-steps", 2)
    built = trainer.Trainer(parse(TrainConfig, argv)[0])
    assert not list(tmp_path.iterdir())
    assert {p.device.type for p in built.model.parameters()} == {"cpu"} and built.step == 0


def test_steps_are_profiled_in_the_run_folder(data, tmp_path, capsys):
    train.main(arguments(data, tmp_path, "--profile-steps", "2-3", model="SiT-Ti/4"))
    trace = json.loads((tmp_path / "run" / "profile" / "trace-2-3.json").read_text())
    names = [event["name"] for event in trace["traceEvents"]]
    assert sum("AdamW.step" in name for name in names) == 2
    assert "--profile-steps 3-2" in refused(capsys, arguments(data, tmp_path / "x", "--profile-steps", "3-2"))


def test_epochs_go_on_with_another_batch_size(data, tmp_path):
    """Two epochs of 24 samples: 3 + 1 steps of 8, then those of 4 that are left of the second one."""
    options = ("--epochs", 2, "--max-train-steps", 100)
    train.main(arguments(data, tmp_path, *options, "--max-train-steps", 4, model="SiT-Ti/4"))
    runs.reset_accelerate()
    more = ("--batch-size", 4, "--allow-change", "batch_size", "--resume-step", -1)
    train.main(arguments(data, tmp_path, *options, *more, model="SiT-Ti/4"))
    assert status(tmp_path) == {"state": "finished", "step": 4 + 4}


def test_wandb_without_a_login_goes_offline(data, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    train.main(arguments(data, tmp_path, "--report-to", "wandb", "--max-train-steps", 1, model="SiT-Ti/4"))
    assert "offline" in capsys.readouterr().err
    assert list((tmp_path / "run" / "logs").rglob("offline-run-*"))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


def test_wandb_gets_project_entity_and_tags(data, tmp_path, monkeypatch, capsys):
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ("--wandb-project", "digits", "--wandb-entity", "team", "--wandb-tags", "a,long run")
    train.main(arguments(data, tmp_path, "--report-to", "wandb", "--max-train-steps", 1, *options, model="SiT-Ti/4"))
    (path,) = (tmp_path / "run" / "logs").rglob("*.wandb")
    found = next(record.run for record in records_of(path, Record) if record.HasField("run"))
    assert (found.project, found.entity, found.display_name) == ("digits", "team", "run")
    assert sorted(found.tags) == ["a", "long", "run"]
    for option, value in (("project", "a/b"), ("entity", "a/b"), ("tags", 65 * "x")):
        argv = arguments(data, tmp_path / "no", "--report-to", "wandb", f"--wandb-{option}", value)
        runs.refused(train.main, capsys, argv, f"--wandb-{option} {value}: must be")
    runs.reset_accelerate()
    ignored = ("--wandb-tags", "a", "--cache-size", 2)
    train.main(arguments(data, tmp_path / "plain", *ignored, "--max-train-steps", 1, model="SiT-Ti/4"))
    told = capsys.readouterr().err
    assert "--wandb-tags: has no effect with --report-to none" in told and "--cache-size 2: has no effect on local data" in told


def records_of(path, kind):
    """The records of an offline run: a header of 7 bytes, then blocks of 32 KiB of (checksum 4, length 2, type 1, data)."""
    content, found = path.read_bytes(), []
    place = 7
    while place + 7 <= len(content):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        size = int.from_bytes(content[place + 4 : place + 6], "little")
        if content[place + 6] == 1:  # whole, in one block
            found.append(kind.FromString(content[place + 7 : place + 7 + size]))
        place += 7 + size
    return found


def test_bf16_trains(data, tmp_path):
    train.main(arguments(data, tmp_path, "--mixed-precision", "bf16", "--max-train-steps", 2))
    state = final_state(tmp_path, 2)
    assert all(v.dtype == torch.float32 for v in state["model"].values())
    assert all(math.isfinite(v) for v in metrics(tmp_path).values())


def test_fp16_on_a_cpu_runs_as_no_and_says_so(data, tmp_path, capsys):
    train.main(arguments(data, tmp_path, "--mixed-precision", "fp16", "--max-train-steps", 1))
    assert "fp16 needs a GPU" in capsys.readouterr().err
    assert final_state(tmp_path, 1)["config"]["mixed_precision"] == "no"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", ["says 4", "--gradient-accumulation-steps 1"]),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", ["says eager", "--compile"]),
    ],
)
def test_what_accelerate_would_do_by_itself_is_refused(data, tmp_path, capsys, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    line = refused(capsys, arguments(data, tmp_path / "out"))
    assert all(word in line for word in (name, *words)), line
    assert not list(tmp_path.iterdir())


def test_training_ends_after_its_epochs(data, tmp_path):
    train.main(arguments(data, tmp_path, "--epochs", 1, "--max-train-steps", 100, model="SiT-Ti/4"))
    assert set(metrics(tmp_path)) == {1, 2, 3}  # 24 samples in batches of 8


@pytest.mark.parametrize("world", [1, 2, 8])
def test_every_sample_of_an_epoch_is_used_once_whatever_the_process_count(world):
    num_samples, batch = 50, 8  # the last two are dropped
    local = batch // world
    seen = []
    for rank in range(world):
        batch_slice = range(rank * local, (rank + 1) * local)
        seen.append(list(StepBatches(num_samples, batch, batch_slice, seed=3, start=0, stop=12)))
    steps = [[i for rank in seen for i in rank[n]] for n in range(12)]
    for epoch in (steps[:6], steps[6:]):
        used = [i for step in epoch for i in step]
        assert len(used) == len(set(used)) == 48
    assert steps[:6] != steps[6:]
    late = list(StepBatches(num_samples, batch, range(batch), seed=3, start=7, stop=12))
    assert late == steps[7:]  # a resumed run goes on at its place


def test_1024_processes_use_every_sample_once_and_512_or_2048_go_on(monkeypatch):
    num_samples, batch, per_epoch = 50_000, 4096, 12  # the last 848 of an epoch's order are dropped
    orders = {epoch: epoch_order(7, epoch, num_samples) for epoch in range(2)}
    monkeypatch.setattr(data_order, "epoch_order", lambda seed, epoch, n: orders[epoch])  # each would make its own

    def used(world, start, stop):
        """(forward, place) → sample, over all ranks."""
        found = np.empty((stop - start, batch), dtype=int)
        for rank in range(world):
            batch_slice = range(rank * batch // world, (rank + 1) * batch // world)
            found[:, batch_slice.start : batch_slice.stop] = list(StepBatches(num_samples, batch, batch_slice, 7, start, stop))
        return found

    whole = used(1024, 0, 2 * per_epoch)
    for epoch in (whole[:per_epoch], whole[per_epoch:]):
        assert len(np.unique(epoch)) == epoch.size == per_epoch * batch
        assert epoch.min() >= 0 and epoch.max() < num_samples
    for world, start in ((512, 5), (2048, 17)):
        assert np.array_equal(used(world, start, 2 * per_epoch), whole[start:])


def test_learning_rate_is_that_of_the_spec():
    warm = learning_rate_factor(TrainConfig(warmup_steps=10), 100)
    for n in range(1, 31):
        assert warm(n - 1) == pytest.approx(1 / 10 + (1 - 1 / 10) * min(n - 1, 10) / 10)
    assert {learning_rate_factor(TrainConfig(), 100)(n) for n in range(100)} == {1.0}
    assert learning_rate_factor(TrainConfig(warmup_steps=10, lr_scheduler_type="constant"), 100)(0) == 1.0
    cosine = learning_rate_factor(TrainConfig(lr_scheduler_type="cosine"), 100)
    assert cosine(0) == 1 and cosine(50) == pytest.approx(0.5) and cosine(100) == pytest.approx(0)
    cooled = learning_rate_factor(TrainConfig(lr_cooldown=0.25), 100)
    assert cooled(75) == 1 and cooled(100) == pytest.approx(0.02) and cooled(80) == pytest.approx(1 - 0.98 / 5)


refused = partial(runs.refused, train.main)

THREE_STAGES = """--model DFM-ELIT-SiT-B/2 --stages-count 3 --stage-weights 0.8 0.1 0.1 --stage-sampling-thresholds 0.3 0.1
--num-steps-per-scale 4 3 2"""


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--resolution", 36), ["36"]),  # latents of another size than the resolution says
        (("--resolution", 30), ["resolution", "30"]),  # not divisible by the VAE's factor
        (("--model", "ELIT-SiT-Ti/8", "--elit-group-size", 2), ["elit_group_size 2", "1×1"]),
        (("--elit-group-size", 3), ["elit_group_size 3", "4×4"]),
        (("--elit-max-mask-prob", 1.5), ["--elit-max-mask-prob", "1.5", "1"]),
        (("--elit-max-mask-prob", 0.9), ["0.9", "0.75"]),
        (("--elit-min-mask-prob", 0.75, "--elit-max-mask-prob", 0.25), ["minimum", "0.75", "0.25"]),
        (("--elit-min-mask-prob", 0.3, "--elit-max-mask-prob", 0.4), ["0.3", "0.4", "0.25", "0.5"]),
        (("--model", "ELIT-SiT-XXL/2"), ["ELIT-SiT-XXL/2", "ELIT-SiT-XL/2"]),
        (("--model", "DFM-ELIT-SiT-B/2", "--stages-count", 3), ["--stage-weights 0.9 0.1", "3 weights"]),
        (("--model", "DFM-ELIT-SiT-B/2", "--stage-weights", 0.9, 0.2), ["--stage-weights 0.9 0.2", "sum to 1", "1.1"]),
        (
            ("--model", "DFM-ELIT-SiT-B/2", "--stage-sampling-thresholds", 0.3, 0.1),
            ["stage_sampling_thresholds 0.3 0.1", "need 1"],
        ),
        (("--model", "DFM-ELIT-SiT-B/2", "--num-steps-per-scale", 40, 0), ["--num-steps-per-scale", "0", "≥ 1"]),
        (
            THREE_STAGES.split(),
            ["stages_count 3", "patch size of 2"],
        ),
        (("--learning-rte", 1), ["--learning-rte", "--learning-rate"]),
        (("--batch-size", "many"), ["--batch-size", "many", "whole number"]),
        (("--batch-size", 32), ["--batch-size 32", "24"]),
        (("--num-classes", 3), ["--num-classes 3", "dataset.json"]),
        (("--data-dir", "nowhere"), ["nowhere"]),
        (("--val-data-dir", "nowhere"), ["nowhere"]),
        (("--enc-type", "dinov2-vit-b", "--proj-coeff", 0.5), ["images/", "REPA"]),
        (("--exp-name", "a/b"), ["--exp-name", "a/b"]),
        (("--resume-step", 3), ["--resume-step 3", "none"]),
        (("--config", "nowhere.yaml"), ["nowhere.yaml"]),
        (("--vae", "nowhere/at-all", "--sampling-steps", 2), ["--vae", "nowhere/at-all"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(data, tmp_path, capsys, more, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refused(capsys, arguments(data, tmp_path / "out", *more))
    for word in words:
        assert word in line, line
    assert not list(tmp_path.rglob("*.pt"))


def test_bad_data_is_named(data, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, arguments(tmp_path / "empty", tmp_path / "out"))
    unlabelled = make_latents(tmp_path / "unlabelled", 8, None, labels=False)
    assert "unlabelled" in refused(capsys, arguments(unlabelled, tmp_path / "out"))
    yaml = tmp_path / "my.yaml"
    yaml.write_text("lerning_rate: 1\n")
    line = refused(capsys, arguments(data, tmp_path / "out", "--config", yaml))
    assert "my.yaml" in line and "learning_rate" in line


def test_a_run_folder_with_checkpoints_needs_resume_and_the_same_model(data, undisturbed, capsys, tmp_path):
    line = refused(capsys, arguments(data, undisturbed))
    assert "--resume-step -1" in line
    assert "2, 4" in refused(capsys, arguments(data, undisturbed, "--resume-step", 3))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ("--model", "ELIT-SiT-Ti/4", "--elit-group-size", 1, "--elit-max-mask-prob", 0),
            ["--model ELIT-SiT-Ti/4", "ELIT-SiT-Ti/2"],
        ),
        (("--seed", 5), ["--seed 5", "with 0", "--allow-change seed"]),
        (("--batch-size", 4), ["--batch-size 4", "with 8", "--allow-change batch_size"]),
        (("--gradient-accumulation-steps", 2), ["--gradient-accumulation-steps 2", "with 1"]),
        (("--learning-rate", 0.5), ["--learning-rate 0.5", "with 0.001", "--allow-change learning_rate"]),
        (("--ema-decay", 0.9, 0.99), ["--ema-decay 0.9 0.99", "with 0.9999"]),
        (("--elit-tail", "skip", "--allow-change", "seed"), ["--elit-tail skip", "with drop"]),
        (("--seed", 5, "--allow-change", "learning-rate"), ["--seed 5"]),
        (("--allow-change", "model"), ["--allow-change model", "choose from", "seed", "data_size"]),
        (("--allow-change", "lerning-rate"), ["--allow-change lerning_rate", "did you mean learning_rate"]),
    ],
)
def test_resuming_another_run_is_refused_by_name(data, undisturbed, capsys, more, words):
    line = refused(capsys, arguments(data, undisturbed, "--resume-step", -1, *more))
    for word in words:
        assert word in line, line
    assert status(undisturbed) == {"state": "finished", "step": 4}


def test_data_of_another_size_is_refused_or_allowed(data, undisturbed, capsys, tmp_path):
    shutil.copytree(undisturbed / "run", tmp_path / "run")
    record = LatentDataset(data).record
    more = make_latents(tmp_path / "more", COUNT + 8, record)
    line = refused(capsys, arguments(more, tmp_path, "--resume-step", -1))
    assert "--data-dir" in line and "32 samples" in line and "with 24" in line and "--allow-change data_size" in line
    reset_accelerate()
    train.main(arguments(more, tmp_path, "--resume-step", -1, "--allow-change", "data-size", "--max-train-steps", 5))
    assert status(tmp_path) == {"state": "finished", "step": 5}


def test_what_may_change_takes_effect(data, undisturbed, tmp_path):
    shutil.copytree(undisturbed / "run", tmp_path / "run")
    changes = {"learning-rate": 0.02, "adam-beta1": 0.5, "ema-decay": 0.25}
    options = [str(part) for name, value in changes.items() for part in ("--" + name, value)]
    train.main(
        arguments(
            data, tmp_path, "--resume-step", 2, "--max-train-steps", 3, *options, "--allow-change", *changes, "--keep-last", 1
        )
    )
    before, after = final_state(undisturbed, 2), final_state(tmp_path, 3)
    group = after["optimizer"]["param_groups"][0]
    assert (group["lr"], group["betas"]) == (0.02, (0.5, 0.999)) and metrics(tmp_path, "lr")[3] == 0.02
    # AdamW's first update of a weight, from its definition.
    old, new = ({k: s["optimizer"]["state"][0][k].double() for k in ("exp_avg", "exp_avg_sq")} for s in (before, after))
    name = next(name for name in before["model"] if name != "pos_embed")
    mean, square = new["exp_avg"] / (1 - 0.5**3), new["exp_avg_sq"] / (1 - 0.999**3)
    expected = before["model"][name].double() - 0.02 * mean / (square.sqrt() + 1e-8)
    torch.testing.assert_close(after["model"][name].double(), expected, rtol=0, atol=1e-6)
    assert not torch.equal(old["exp_avg"], new["exp_avg"])
    ema = 0.25 * before["model"][name] + 0.75 * after["model"][name]
    torch.testing.assert_close(after["ema"]["0.25"][name], ema)


def test_an_output_folder_that_cannot_be_written_is_named(data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "--output-dir" in refused(capsys, arguments(data, tmp_path / "file"))


def test_deterministic_and_full_float32_reach_the_kernels(data, tmp_path, monkeypatch):
    """Convolutions are TF32 by PyTorch's default: without --allow-tf32 they are not."""
    chosen = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    config, _ = parse(TrainConfig, [str(a) for a in arguments(data, tmp_path, "--deterministic")], prog="train.py")
    setup.create_accelerator(config)
    assert chosen == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.cudnn_sdp_enabled()
