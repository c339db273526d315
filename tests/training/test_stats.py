"""What is logged: means by tenth of t and by kind, skipped steps, and what a checkpoint keeps of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from runs import make_latents
from training_runs import arguments, metrics

import train
from models.vae import VAERecord
from training import stats as training_stats
from training.stats import TrainingStats, peak_tflops
from training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def test_means_are_those_of_the_images(accelerator):
    rng = np.random.default_rng(0)
    stats, losses, times, kinds = TrainingStats(["loss", "a", "b", "never"], CPU), [], [], []
    for kind in (0, 1, 1):
        loss, t = rng.random(50).astype(np.float32), rng.random(50).astype(np.float32)
        t[:2], loss[2:4] = (0.0, 1.0), (np.nan, np.inf)
        stats.add(torch.from_numpy(loss), torch.from_numpy(t), "ab"[kind])
        losses, times, kinds = [*losses, *loss], [*times, *t], [*kinds, *[kind] * 50]
    losses, times, kinds = np.array(losses, dtype=float), np.array(times), np.array(kinds)
    finite = np.isfinite(losses)
    found = stats.read(accelerator)
    assert found["loss"] == pytest.approx(losses[finite].mean(), rel=1e-6)
    for kind, name in enumerate("ab"):
        assert found[name] == pytest.approx(losses[finite & (kinds == kind)].mean(), rel=1e-6)
    for i in range(10):
        inside = finite & (times >= i / 10) & ((times < (i + 1) / 10) | (i == 9))
        assert found[f"loss_t{i}"] == pytest.approx(losses[inside].mean(), rel=1e-6)
    assert "never" not in found
    assert stats.read(accelerator)["loss"] is None  # each line starts anew


def test_steps_without_a_finite_gradient_are_counted(accelerator):
    stats = TrainingStats(["loss"], CPU)
    skips = [stats.step(torch.tensor(norm)).item() for norm in (1.0, float("nan"), float("inf"), 3.0, float("nan"))]
    assert skips == [0, 1, 1, 0, 1]
    found = stats.read(accelerator)
    assert (found["grad_norm"], found["skipped"], found["longest"]) == (2.0, 3, 2)
    stats.step(torch.tensor(float("nan")))
    found = stats.read(accelerator)
    assert (found["grad_norm"], found["skipped"], found["longest"]) == (None, 4, 2)  # a row goes on over lines


def test_a_line_begun_before_a_checkpoint_is_finished_after_it(accelerator):
    whole, cut, resumed = (TrainingStats(["loss", "a"], CPU) for _ in range(3))
    for part in (0, 1):
        torch.manual_seed(part)
        losses, t = torch.rand(8), torch.rand(8)
        for stats in (whole, [cut, resumed][part]):
            stats.add(losses, t, "a")
            stats.step(losses.sum())
        if part == 0:
            cut.gather(accelerator)
            resumed.load_state_dict(cut.state_dict(), main=True)
    assert resumed.read(accelerator) == whole.read(accelerator)


def test_the_peak_is_that_of_the_device_and_precision(monkeypatch):
    assert peak_tflops(CPU, "bf16", False) is None
    cuda = torch.device("cuda")
    for name, peak in (
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A40", 150),
        ("NVIDIA RTX A4000", 77),
        ("NVIDIA RTX A4000 Laptop GPU", None),
        ("NVIDIA RTX A400", None),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("Quadro RTX 6000", None),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA H20", 148),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H800 PCIe", 756),
        ("NVIDIA GeForce RTX 5090", 209),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Other", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_tflops(cuda, "bf16", False) == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    assert peak_tflops(cuda, "no", True) == 156 and peak_tflops(cuda, "no", False) is None


def test_times_of_a_step_are_those_of_all_its_forwards(tmp_path, monkeypatch):
    """On a clock that a forward takes a second of, and reading the means, which waits for the device, another."""
    now = [0.0]

    def taking(function):
        def call(*args):
            now[0] += 1
            return function(*args)

        return call

    monkeypatch.setattr(training_stats, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Trainer, "forward", taking(Trainer.forward))
    monkeypatch.setattr(TrainingStats, "read", taking(TrainingStats.read))
    data = make_latents(tmp_path / "set", 16, VAERecord("none", None, 4, 4, 0.5, 0.0))
    options = ("--gradient-accumulation-steps", 3, "--log-every", 2, "--max-train-steps", 4, "--epochs", 9)
    train.main(arguments(data, tmp_path, *options, model="SiT-Ti/4"))
    assert metrics(tmp_path, "host_ms") == {1: 3000, 2: 3000, 4: 3000}
    assert metrics(tmp_path, "step_ms") == {1: 4000, 2: 4000, 4: 3500}
    assert metrics(tmp_path, "images_per_second") == {1: 24 / 4, 2: 24 / 4, 4: 48 / 7}
