"""The studies' report: figures of trained models, kept beside them, and each study's table."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numerics import randomize
from runs import make_latents, refused

import models
from checkpoint import training_state
from config.options import TrainConfig
from experiments_updated import digit_classifier, quickstart_report
from experiments_updated.studies import report, spread, study
from models.vae import VAERecord
from samplers import BudgetSchedule

VAE = Path(digit_classifier.__file__).parent / "quickstart_vae"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs of two models, untrained but not zero, and the options of a report of them."""
    folder = tmp_path_factory.mktemp("studies")
    torch.save(digit_classifier.DigitClassifier().eval().state_dict(), folder / "classifier.pt")
    vae = json.loads((VAE / "config.json").read_text())
    record = VAERecord(str(VAE), None, 4, 4, vae["scaling_factor"], vae["shift_factor"])
    data = make_latents(folder / "val", 4, record, side=16)
    for name, options in {"sit": {}, "elit-all": {"elit_min_mask_prob": 0.0, "head_depth": 1, "tail_depth": 1}}.items():
        model = "ELIT-SiT-Ti/2" if options else "SiT-Ti/2"
        config = TrainConfig(
            model=model, exp_name=name, resolution=64, num_classes=10, batch_size=2, weighting="lognormal", **options
        )
        split = {k: v for k, v in options.items() if "depth" in k}
        weights = randomize(models.create_model(model, input_size=16, num_classes=10, **split)).float().state_dict()
        parts = {"model": weights, "ema": {"0.9": weights}, "optimizer": {}, "scheduler": {}, "scaler": None, "step": 7}
        path = folder / f"{name}-0" / "checkpoints" / "0000007.pt"
        training_state.save(path, parts | {"config": vars(config), "vae": record.to_dict()})
        lines = [json.dumps({"step": step, "loss": 1 / step}) for step in (1, 4, 7)]
        (path.parents[1] / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder, [
        "--runs",
        folder,
        "--val-data-dir",
        data,
        "--samples",
        10,
        "--num-steps",
        1,
        "--output-dir",
        folder / "results",
    ]


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    digits = torch.randint(256, (40, 3, 32, 32)).byte(), torch.arange(40) % 10
    monkeypatch.setattr(digit_classifier, "digit_images", lambda held_out: digits)
    monkeypatch.setattr(quickstart_report, "VAL_REPEATS", 2)


def test_each_study_writes_its_table(made, monkeypatch, capsys):
    folder, options = made[0] / "results", made[1]
    for name, chosen, rows in (
        ("joint", ["sit", "elit-all"], 2), ("convergence", ["sit", "elit-all"], 2), ("schedule", ["elit-all"], 2), ("order", ["elit-all"], 3), ("difficulty", ["elit-all"], 3),
    ):  # fmt: skip
        report.main([str(o) for o in ("--study", name, "--models", *chosen, *options)])
        assert len(json.loads((folder / f"{name}.json").read_text())) == rows
        assert (folder / f"{name}.md").read_text() in capsys.readouterr().out
    sit, elit = json.loads((folder / "joint.json").read_text())
    assert elit["difference"]["mean"] == pytest.approx(elit["held_out_loss"]["1"][0] - sit["held_out_loss"][""][0])
    assert elit["gain"]["1/16"]["mean"] == pytest.approx(elit["held_out_loss"]["1/16"][0] - elit["held_out_loss"]["1"][0])
    assert sit["training_tflops"] == pytest.approx(7 * 3 * 2 * sit["gflops"][""] / 1000)
    whole, half = json.loads((folder / "schedule.json").read_text())
    assert whole["held_out_loss"][0] == pytest.approx(elit["held_out_loss"]["1"][0]) and whole["difference"]["mean"] == 0
    assert half["gflops_per_image"] <= whole["gflops_per_image"]
    for whole, at_step in zip((sit, elit), json.loads((folder / "convergence.json").read_text()), strict=True):
        largest = list(whole["gflops"])[-1]
        assert at_step["step"] == 7 and at_step["training_tflops"] == whole["training_tflops"]
        assert at_step["held_out_loss"] == whole["held_out_loss"][largest] and at_step["fid"] == whole["fid"][largest]
        assert at_step["difference"]["mean"] == (0 if whole is sit else elit["difference"]["mean"])
    for picture in (
        "joint_steps.png",
        "joint_flops.png",
        "convergence_loss_steps.png",
        "convergence_fid_flops.png",
        "order.png",
    ):
        assert (folder / picture).stat().st_size > 0
    monkeypatch.setattr(study, "losses_of_draws", None)  # all is there already
    report.main([str(o) for o in ("--study", "joint", "--models", "sit", "elit-all", *options)])
    assert json.loads((folder / "joint.json").read_text()) == [sit, elit]


def test_pictures_show_seeds_alike_and_leave_out_the_first_steps(monkeypatch, tmp_path):
    """One seed has no bar, in any of them; the training loss is shown from where the models differ."""
    drawn = {}
    monkeypatch.setattr(report, "curves_plot", lambda path, curves, *, labels: drawn.update({path.name: (curves, labels[2])}))
    losses = {step: 5.0 if step <= 10 else 1 / step for step in range(10, 101, 10)}

    def run(name, more=0.0):
        log = {step: loss + more for step, loss in losses.items() if step < 100 or not more}
        return SimpleNamespace(name=name, training_loss=lambda: log, training_tflops=lambda step: step / 10)

    models = {"sit": [run("sit")], "elit": [run("elit"), run("elit", 0.5)]}
    made = report.Study(SimpleNamespace(study="x", output_dir=tmp_path), models)
    results = [
        {"model": name, "step": 7, "training_tflops": 2.0, "held_out_loss": v, "fid": v, "gflops": {"1": 3.0}}
        for name, v in (("sit", [1.0]), ("elit", [1.0, 2.0]))
    ]
    report._training_curves(made)
    report._convergence_plots(made, results)
    report._compute_plot(made, [r | {"fid": {"1": r["fid"]}} for r in results])
    assert len(drawn) == 7
    for curves, title in drawn.values():
        (plain, elastic), n = curves, len(curves[1].x)
        assert plain.spread == [None] * len(plain.x) and plain.is_reference and not elastic.is_reference
        assert elastic.spread == pytest.approx([0.25 if n > 1 else 0.5] * n)
        assert title == "seeds: mean and range"
    (plain, elastic), _ = drawn["x_steps.png"]
    assert list(plain.x) == [*range(20, 101, 10)] and plain.y == [losses[step] for step in plain.x]
    assert list(elastic.x) == [*range(20, 91, 10)]  # what both seeds have
    assert elastic.y == pytest.approx([losses[step] + 0.25 for step in elastic.x])
    assert drawn["x_flops.png"][0][0].x == pytest.approx([step / 10 for step in plain.x])
    report._training_curves(report.Study(made.config, {"sit": models["sit"]}))
    assert drawn["x_steps.png"][1] == ""


def test_what_cannot_be_reported_is_refused(made, capsys):
    _, options = made
    refused(report.main, capsys, ["--study", "taste", "--models", "sit", *options], "--study taste", "convergence")
    refused(report.main, capsys, ["--study", "order", "--models", "uvit", *options], "--models uvit", "no such model")


def test_other_latents_of_a_group_are_read_at_its_budget():
    interface = models.create_model("ELIT-SiT-Ti/2", input_size=8, elit_group_size=2)
    x, c, latents = torch.randn(1, 16, 192), torch.randn(1, 192), interface.interface
    with torch.no_grad():
        tokens = latents.group(x) + latents.read_pos
        expected = latents.reader(latents.query[3:], tokens, c) + latents.latent_pos[:, 3:]
        with study.reordered(interface, [3, 2, 1, 0]):
            kept = latents.read(x, c, 0.25)[1]
        np.testing.assert_allclose(kept, expected[:, :, 0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(latents.read(x, c)[1].unflatten(1, (4, 4))[:, :, 3], expected[:, :, 0], rtol=1e-5, atol=1e-6)


def test_each_draw_counts_at_the_budget_of_its_time():
    class Of:
        def losses(self, budgets):
            return np.arange(12.0).reshape(2, 2, 3), np.array([[0.9, 0.1, 0.9], [0.1, 0.1, 0.9]])  # (draws, budgets, canvases)

    schedule = BudgetSchedule.parse("0.5@1.0-0.5,1.0@0.5-0.0")
    np.testing.assert_array_equal(report._scheduled(Of(), schedule), [(0 + 9) / 2, (4 + 10) / 2, (2 + 8) / 2])


def test_correlation_inside_groups():
    a, b = np.random.default_rng(0).random((2, 3, 4, 16))
    expected = [[np.corrcoef(a[i, g], b[i, g])[0, 1] for g in range(4)] for i in range(3)]
    np.testing.assert_allclose(report._correlations(a, b), np.mean(expected, axis=1), rtol=1e-6)


def test_spread_patches_come_back_and_alone_count():
    x = np.random.default_rng(0).random((8, 4, 4)).astype(np.float32)
    spread_out = spread.spread_patches(x, shift=0.5)
    assert spread_out[0, 0, 2] == 0.5 and spread_out[4, 0, 2] == 0  # mean and std between patches
    gathered = spread.gather_patches(torch.from_numpy(spread_out)[None])
    np.testing.assert_array_equal(gathered[0], x)
    model = study._RealPatches(lambda x, t, y: torch.zeros_like(x))
    v = model(torch.ones(1, 1, 8, 8), torch.tensor([0.5]), None)
    assert (spread.gather_patches(v) == 0).all() and v.sum() == 2 * 48
