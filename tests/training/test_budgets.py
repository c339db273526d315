"""--elit-budget-schedule: each image's budget by its time, in training and validation."""

import numpy as np
import pytest
import runs
import torch
from runs import make_latents, make_vae, refused, reset_accelerate
from training_runs import arguments, assert_same_tensors, final_state, metrics

import models
import train
from config.options import TrainConfig
from loss import share_of_times, training_times
from randomness import Draws, epoch_order, training_draws
from training import validation
from training.budgets import mean_training_flops, trained_budgets

COUNT = 16
DRAWN = ("--elit-min-mask-prob", "none", "--elit-max-mask-prob", "none")
SCHEDULE = "0.25@1.0-0.6,1.0@0.6-0.3,0.5@0.3-0.0"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return make_latents(folder / "set", COUNT, make_vae(folder / "vae"))


def mean_loss(data, indices, draws, weights):
    """The mean over images, each alone at the budget of its time."""
    model = models.create_model(
        "ELIT-SiT-Ti/2", input_size=8, num_classes=runs.CLASSES, elit_group_size=2, head_depth=2, tail_depth=2
    )
    model.load_state_dict(weights)
    losses = []
    for row, i in enumerate(indices):
        moments = torch.from_numpy(np.load(data / "vae-sd" / "00000" / f"img-mean-std-{i:08d}.npy"))
        x = (moments[:4] + moments[4:] * draws.posterior[row]) * 0.5  # the record's scale
        t, noise = draws.time_uniform[row], draws.noise[row]
        y = runs.CLASSES if draws.label_drop[row] < 0.1 else i % runs.CLASSES
        budget = 0.25 if t > 0.6 else 1.0 if t > 0.3 else 0.5
        with torch.no_grad():
            v = model(((1 - t) * x + t * noise)[None], t[None], torch.tensor([y]), inference_budget=budget)
        losses.append(((v[0] - (noise - x)) ** 2).mean().item())
    return np.mean(losses)


def test_each_image_has_the_budget_of_its_time(data, tmp_path, monkeypatch):
    """Losses of step 3 and of validation against images run one by one; a resumed run gives the same bits."""
    monkeypatch.setattr(validation, "SAMPLE_STEPS", 1)
    monkeypatch.setattr(validation, "SAMPLE_IMAGES", 8)
    options = (*DRAWN, "--elit-budget-schedule", SCHEDULE, "--val-data-dir", data, "--sampling-steps", 2)
    train.main(arguments(data, tmp_path, *options))
    whole, half = final_state(tmp_path), final_state(tmp_path, step=2)
    order = epoch_order(0, 1, COUNT)[:8]
    expected = mean_loss(data, order, training_draws(0, 2, range(8), (4, 8, 8)), half["model"])
    assert metrics(tmp_path)[3] == pytest.approx(expected, rel=1e-5)
    held_out = training_draws(0, 0, range(COUNT), (4, 8, 8), purpose="held-out")
    held_out.label_drop[:] = 1  # no label is dropped
    expected = mean_loss(data, range(COUNT), held_out, half["ema"]["0.9999"])
    assert metrics(tmp_path, "val_loss")[2] == pytest.approx(expected, rel=1e-5)
    assert {2} <= set(metrics(tmp_path, "val_loss_budget_0.25"))
    for name in ("0000004.pt", "0000004.pt.sha256"):
        (tmp_path / "run" / "checkpoints" / name).unlink()
    losses = metrics(tmp_path)
    reset_accelerate()
    train.main(arguments(data, tmp_path, *options, "--resume-step", -1))
    assert_same_tensors(final_state(tmp_path)["model"], whole["model"])
    assert metrics(tmp_path) == losses


@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_share_of_times_is_that_of_the_draws(weighting, path_type):
    generator, n = torch.Generator().manual_seed(0), 200_000
    empty = torch.empty(0)
    draws = Draws(
        empty, empty, torch.rand(n, generator=generator), torch.randn(n, generator=generator), empty, 0.0, 0.0, [], empty
    )
    for shift in (1.0, 3.0):
        times = training_times(draws, weighting, path_type, shift)
        for low, high in ((0.0, 0.3), (0.3, 0.8), (0.8, 1.0)):
            measured = ((times > low) & (times <= high)).double().mean().item()
            assert share_of_times(low, high, weighting, path_type, shift) == pytest.approx(measured, abs=4e-3)


def test_mean_cost_of_training():
    config = TrainConfig(model="ELIT-SiT-Ti/2", exp_name="x", elit_group_size=2, elit_budget_schedule=SCHEDULE)
    model = models.create_model(config.model, input_size=8, elit_group_size=2)
    assert trained_budgets(config) == [1.0, 0.5, 0.25]
    expected = sum(share * models.count_flops(model, b) for b, share in ((0.25, 0.4), (1.0, 0.3), (0.5, 0.3)))
    assert mean_training_flops(config, model) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "culprits"),
    [
        (("0.5@1.0-0.5,1.0@0.4-0.0",), ("a gap at 0.5",)),
        (("0.5@1.0-0.5",), ("it must end at 0",)),
        (("half",), ("BUDGET@START-END",)),
        (("0.3@1.0-0.5,1.0@0.5-0.0",), ("budget 0.3", "multiple of 1/4")),
        (("0.5@1.0-0.0", "--elit-min-mask-prob", "0"), ("drawn or scheduled",)),
        (("0.5@1.0-0.0", "--model", "SiT-Ti/2"), ("SiT-Ti/2 has no budget",)),
    ],
)
def test_refuses(tmp_path, capsys, options, culprits):
    refused(train.main, capsys, arguments("nowhere", tmp_path, *DRAWN, "--elit-budget-schedule", *options), *culprits)
    assert not list(tmp_path.iterdir())
