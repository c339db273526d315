"""Power-function averages and snapshots: against plain sums of a run's weights, after kills, on several processes."""

import json
import shutil

import numpy as np
import pytest
import runs
import torch
from runs import make_latents, make_vae, refused
from scipy.integrate import quad
from training_runs import arguments, assert_same_tensors, final_state

import convert_checkpoint
import generate
import models
import sweep
import train
from checkpoint import posthoc, power_average, reading, snapshots
from checkpoint.power_average import combine, exponent, weight_of_step
from common import tensor_files
from models.elit import ELITSiT
from training.trainer import Trainer

STEPS, EVERY = 24, 2
MODEL = "ELIT-SiT-Nano/2"
SIZES = {"depth": 3, "hidden_size": 48, "num_heads": 2, "head_depth": 1, "tail_depth": 1}
OPTIONS = ("--posthoc-ema", 0.05, 0.1, "--posthoc-ema-steps", EVERY, "--snapshot-steps", 10, "--checkpointing-steps", 8)
REGISTER = f"import models\nfrom models.elit import ELITSiT\nmodels.register({MODEL!r}, ELITSiT, **{SIZES!r})"


@pytest.fixture(scope="module", autouse=True)
def nano():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "MODELS", dict(models.MODELS))
        models.register(MODEL, ELITSiT, **SIZES)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return make_latents(folder / "set", 24, make_vae(folder / "vae"))


def command(data, out, *more, steps=STEPS):
    return arguments(data, out, "--max-train-steps", steps, "--learning-rate", 3e-3, *OPTIONS, *more, model=MODEL)


@pytest.fixture(scope="module")
def ran(data, tmp_path_factory):
    """The folder of a run, and its weights after each step."""
    out, weights, step = tmp_path_factory.mktemp("ran"), [], Trainer.train_step

    def recording(self, batches):
        step(self, batches)
        weights.append({k: v.detach().double().clone() for k, v in self.model.named_parameters()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", recording)
        train.main(command(data, out))
    return out / "run", weights


def true_average(weights, sigma, step):
    """The weights of each step by the integral of its profile: (i^(γ+1) − (i−1)^(γ+1)) / t^(γ+1)."""
    power = exponent(sigma) + 1
    shares = np.diff(np.arange(step + 1, dtype=float) ** power) / step**power
    return {k: sum(share * w[k] for share, w in zip(shares, weights, strict=False)) for k in weights[0]}


def distance(a, b):
    """Relative error of the weights, over all of them."""
    square = sum((a[k].double() - b[k]).square().sum() for k in b)
    return float((square / sum(v.square().sum() for v in b.values())).sqrt())


# ------------------------------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.1, 0.25])
def test_the_exponent_gives_the_length(sigma):
    g = exponent(sigma)
    mean = quad(lambda x: (g + 1) * x ** (g + 1), 0, 1)[0]
    square = quad(lambda x: (g + 1) * x ** (g + 2), 0, 1)[0]
    assert (square - mean**2) ** 0.5 == pytest.approx(sigma, rel=1e-6)
    assert [round(exponent(s), 2) for s in (0.05, 0.1)] == [16.97, 6.94]  # the paper's pair


@pytest.mark.parametrize(("a", "g_a", "b", "g_b"), [(3.0, 0.5, 5.0, 2.0), (5.0, 2.0, 3.0, 0.5), (4.0, 7.0, 4.0, 1.0)])
def test_inner_products_are_the_integrals(a, g_a, b, g_b):
    below = quad(lambda x: min(x / a, 1) ** (g_a + 1) * min(x / b, 1) ** (g_b + 1), 0, 6, points=[a, b])[0]
    assert power_average._inner(a, g_a, b, g_b, 6.0) == pytest.approx(below)


def test_combinations():
    profiles = [(t, s) for t in range(25, 501, 25) for s in (0.05, 0.1)]
    same = combine(profiles, (500, 0.05))
    assert same.coefficients.argmax() == len(profiles) - 2 and same.error < 0.01
    for target in ((500, 0.075), (400, 0.15), (312, 0.08)):
        made = combine(profiles, target)
        assert made.coefficients.sum() == pytest.approx(1) and made.error < 0.1
        # The error is that of weights that walk at random.
        steps, g = np.arange(1, 501), exponent(target[1])
        walk = np.random.default_rng(0).standard_normal((2000, 500)).cumsum(axis=1)

        def average(t, sigma, walk=walk, steps=steps):
            power = exponent(sigma) + 1
            return walk[:, :t] @ np.diff(np.append(0, steps[:t]).astype(float) ** power) / t**power

        sum_of_others = sum(c * average(*p) for c, p in zip(made.coefficients, profiles, strict=True))
        true = average(*target)
        error = np.sqrt(np.mean((sum_of_others - true) ** 2) / np.mean((true - walk[:, target[0] - 1]) ** 2))
        assert error == pytest.approx(made.error, rel=0.3, abs=0.004), g


def test_the_shares_of_steps_are_the_profile():
    g = exponent(0.1)
    average = 0.0
    for step in range(1, 8):
        average += weight_of_step(step, g) * (step**2 - average)
    expected = sum((i ** (g + 1) - (i - 1) ** (g + 1)) / 7 ** (g + 1) * i**2 for i in range(1, 8))
    assert average == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------- runs


def test_averages_of_a_run_are_the_sums_of_its_weights(ran):
    folder, weights = ran
    ema = tensor_files.load(folder / "checkpoints" / f"{STEPS:07d}.pt")["ema"]
    assert list(ema) == ["0.9999", "sigma-0.05", "sigma-0.1"]
    for sigma in (0.05, 0.1):
        assert distance(ema[f"sigma-{sigma}"], true_average(weights, sigma, STEPS)) < 1e-6


def test_snapshots_lie_beside_the_checkpoints_and_can_be_sampled(ran, tmp_path):
    folder, _ = ran
    found = snapshots.stored(folder / "snapshots")
    steps = range(EVERY, STEPS + 1, EVERY)
    assert [(s.step, s.sigma) for s in found if s.sigma] == [(step, sigma) for step in steps for sigma in (0.05, 0.1)]
    assert [s.step for s in found if not s.sigma] == [10, 20, STEPS]
    whole = tensor_files.load(folder / "checkpoints" / f"{STEPS:07d}.pt")
    path = snapshots.path_of(folder / "snapshots", STEPS)
    light = reading.read_weights(path)
    assert light.step == STEPS and light.config["model"] == MODEL
    assert_same_tensors(light.state_dict, whole["ema"]["0.9999"])
    assert path.stat().st_size < (folder / "checkpoints" / f"{STEPS:07d}.pt").stat().st_size / 3
    tensors, told = tensor_files.load_safetensors(snapshots.path_of(folder / "snapshots", STEPS, 0.05))
    parameters = {k for k, v in tensors.items() if v.dtype == torch.bfloat16}
    assert told["step"] == str(STEPS) and told["sigma_rel"] == "0.05" and len(told["run"]) == 16
    for name, tensor in whole["ema"]["sigma-0.05"].items():
        assert torch.equal(tensors[name], tensor.bfloat16() if name in parameters else tensor)
    assert tensors["pos_embed"].dtype == torch.float32 and len(parameters) == len(list(ran[1][0]))
    images = []
    for number, ckpt in enumerate((path, folder / "checkpoints" / f"{STEPS:07d}.pt")):
        options = ["--sample-dir", tmp_path / str(number), "--num-fid-samples", 2, "--num-steps", 2, "--no-png"]
        generate.main([str(a) for a in ("--ckpt", ckpt, *options)])
        images.append(np.load(next((tmp_path / str(number)).rglob("*.npz")))["arr_0"])
    assert np.array_equal(*images)


def test_equal_snapshots_are_equal_files(ran, tmp_path):
    source = snapshots.path_of(ran[0] / "snapshots", STEPS, 0.05)
    tensors, told = tensor_files.load_safetensors(source)
    told["vae"] = told["vae"].replace("/", "/ü\n")  # JSON in JSON, with what is escaped
    for n in range(6):
        snapshots.save(tmp_path / str(n), tensors, dict(reversed(told.items())) if n % 2 else told)
        assert (tmp_path / str(n)).read_bytes() == (tmp_path / "0").read_bytes()
    again, said = tensor_files.load_safetensors(tmp_path / "0")
    assert_same_tensors(again, tensors)
    assert said == told


def test_any_length_at_any_step(ran):
    folder, weights = ran
    for sigma, step, bound in ((0.05, 24, 2e-3), (0.075, 24, 2e-3), (0.12, 24, 2e-3), (0.1, 17, 8e-3), (0.2, 23, 4e-3)):
        made = posthoc.make(posthoc.find(str(folder), sigma, step))
        assert made.step == step
        true = true_average(weights, sigma, step)
        assert distance(made.state_dict, true) < bound
        assert distance(weights[step - 1], true) > 2 * bound  # which raw weights are not
    assert torch.equal(
        made.state_dict["pos_embed"], reading.read_weights(folder / "snapshots" / "0000010.safetensors").state_dict["pos_embed"]
    )


def test_a_run_without_is_the_same(ran, data, tmp_path):
    train.main(arguments(data, tmp_path, "--max-train-steps", 8, "--learning-rate", 3e-3, model=MODEL))
    plain, state = final_state(tmp_path, 8), tensor_files.load(ran[0] / "checkpoints" / "0000008.pt")
    assert_same_tensors(plain["model"], state["model"])
    assert_same_tensors(plain["ema"]["0.9999"], state["ema"]["0.9999"])
    assert list(plain["ema"]) == ["0.9999"] and not (tmp_path / "run" / "snapshots").exists()


def contents(folder):
    return {s.path.name: tensor_files.load_safetensors(s.path)[0] for s in snapshots.stored(folder / "snapshots")}


def assert_same_snapshots(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert_same_tensors(a[name], b[name])


def test_a_killed_run_ends_with_the_same_snapshots(ran, data, tmp_path):
    """Killed after step 16's checkpoint: without that step's snapshots, with one of a later step and one half written."""
    shutil.copytree(ran[0], tmp_path / "run")
    folder = tmp_path / "run"
    for path in (folder / "checkpoints").glob("0000024*"):
        path.unlink()
    for path in (folder / "snapshots").iterdir():
        if path.name >= "0000016" and path.name != "0000020-sigma-0.1.safetensors":
            path.unlink()
    (folder / "snapshots" / "0000020-sigma-0.1.safetensors").write_bytes(b"of another branch")
    half = folder / "snapshots" / "0000024-sigma-0.1.safetensors.123.tmp"
    half.write_bytes(b"half")
    train.main(command(data, tmp_path, "--resume-step", -1))
    assert_same_snapshots(contents(folder), contents(ran[0]))
    assert not half.exists()
    state = tensor_files.load(folder / "checkpoints" / f"{STEPS:07d}.pt")
    for name, average in tensor_files.load(ran[0] / "checkpoints" / f"{STEPS:07d}.pt")["ema"].items():
        assert_same_tensors(state["ema"][name], average)


def test_going_back_keeps_the_snapshots_of_the_other_branch(ran, data, tmp_path):
    shutil.copytree(ran[0], tmp_path / "run")
    train.main(command(data, tmp_path, "--resume-step", 16, steps=17))
    there = {s.step for s in snapshots.stored(tmp_path / "run" / "snapshots")}
    aside = {s.step for s in snapshots.stored(tmp_path / "run" / "checkpoints" / "abandoned-from-16")}
    assert max(there) == 17 and aside == {18, 20, 22, 24}


@pytest.mark.slow
def test_several_processes_write_the_same(ran, data, tmp_path):
    argv = [command(data, tmp_path / name, *more, steps=4) for name, more in (("two", ()), ("sharded", ("--shard", "full")))]
    assert runs.train_on(*((2, a, REGISTER) for a in argv)) == ["0 0", "0 0"]
    for name in ("two", "sharded"):
        made = contents(tmp_path / name / "run")
        assert len(made) == 5 and "0000004.safetensors" in made
        for file in made.keys() - {"0000004.safetensors"}:
            expected = contents(ran[0])[file]
            assert [t.dtype for t in made[file].values()] == [t.dtype for t in expected.values()]
            assert distance(made[file], {k: v.double() for k, v in expected.items()}) < 3e-3, (name, file)


def test_a_failed_write_is_a_warning(ran, data, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "snapshots").write_text("a file in its place")
    train.main(command(data, tmp_path, steps=4))
    assert "0000004-sigma-0.05.safetensors: this snapshot is missing" in capsys.readouterr().err
    assert (folder / "checkpoints" / "0000004.pt").is_file()


# ------------------------------------------------------------------------------------------------------------- reading


def test_converting_gives_a_checkpoint_like_any_other(ran, tmp_path, capsys):
    folder, weights = ran
    for dest, more in ((tmp_path / "a.safetensors", ["--safetensors"]), (tmp_path / "a.pt", [])):
        convert_checkpoint.main([str(folder), str(dest), "--ema-sigma", "0.075", "--ema-step", "23", *more])
        assert "σ_rel 0.075 at step 23, of 24 snapshots of steps 2 to 24" in capsys.readouterr().out
        found = reading.read_weights(dest)
        assert found.step == 23 and distance(found.state_dict, true_average(weights, 0.075, 23)) < 8e-3
    assert list(tensor_files.load(tmp_path / "a.pt")["ema"]) == ["sigma-0.075"]


def test_a_checkpoint_in_the_working_folder(ran, monkeypatch):
    monkeypatch.chdir(ran[0] / "checkpoints")
    assert posthoc.find("0000016.pt", 0.1).step == 16


def test_generate_takes_a_length_and_keeps_what_it_made(ran, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, made = ran[0], []
    make = posthoc.make
    monkeypatch.setattr(posthoc, "make", lambda average: made.append(average) or make(average))
    options = ["--ckpt", folder / "checkpoints" / "0000016.pt", "--num-fid-samples", 2, "--num-steps", 2, "--no-png"]
    for sigma in (0.1, 0.1, 0.075):
        generate.main([str(a) for a in (*options, "--ema-sigma", sigma, "--sample-dir", tmp_path / "images")])
    assert [(a.sigma, a.step) for a in made] == [(0.1, 16), (0.075, 16)]
    found = sorted(p.name for p in (tmp_path / "images" / "run").glob("*.npz"))
    assert len(found) == 2 and "sigma-0.075" in found[0] and "sigma-0.1" in found[1]


def test_sweeps_have_lengths_as_an_axis(ran, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ref, made = tmp_path / "ref.npz", []
    np.savez(ref, arr_0=np.random.default_rng(0).integers(0, 256, (23, 32, 32, 3), dtype=np.uint8))
    make = posthoc.make
    monkeypatch.setattr(posthoc, "make", lambda average: made.append(average.sigma) or make(average))
    options = ["--ref", ref, "--dest", tmp_path / "sweep", "--num-fid-samples", 4, "--num-steps", 1, "--cfg-scale", 1]
    options += ["--features", "runs:pool_features", "--metrics", "fid", "--ema-sigma", "none", 0.05, 0.1, "--ema-step", 20]
    for _ in range(2):
        sweep.main([str(a) for a in ("--ckpt", ran[0] / "checkpoints" / "0000024.pt", *options)])
        runs.reset_accelerate()
    cells = [json.loads(path.read_text()) for path in (tmp_path / "sweep" / "cells").glob("*.json")]
    found = {(c["options"]["ema_sigma"], c["options"]["ema_step"], c["options"]["ckpt_step"]): c for c in cells}
    assert found.keys() == {(None, None, 24), (0.05, 20, 20), (0.1, 20, 20)} and made == [0.05, 0.1]
    assert len({c["figures"]["fid"] for c in cells}) == 3
    assert "ema_sigma" in (tmp_path / "sweep" / "sweep.csv").read_text().partition("\n")[0]


def test_what_is_refused(ran, data, tmp_path, capsys):
    folder = ran[0]
    ckpt = folder / "checkpoints" / "0000024.pt"
    out = tmp_path / "out.pt"

    def convert(source, *argv):
        return refused(convert_checkpoint.main, capsys, (source, out, *argv))

    line = convert(ckpt, "--ema-sigma", 0.004)
    low, high = map(float, line.rpartition("valid are ")[2].split(" to "))
    assert 0.01 < low < 0.05 and 0.15 < high <= 0.28
    for edge in (low, high):
        assert posthoc.find(str(ckpt), edge * (1.01 if edge == low else 0.99)).combination.error <= posthoc.MAX_ERROR
    assert "--ema-step 30: the snapshots in" in convert(folder, "--ema-sigma", 0.1, "--ema-step", 30)
    assert "span steps 2 to 24" in convert(folder, "--ema-sigma", 0.1, "--ema-step", 1)
    assert "must be < 0.2886" in convert(folder, "--ema-sigma", 0.3)
    assert "--ema-step 8: is the step of --ema-sigma" in convert(ckpt, "--ema-step", 8)
    assert "--show: takes a file; make one with --ema-sigma 0.1 first" in convert(ckpt, "--ema-sigma", 0.1, "--show")
    assert "--to diffusers: takes a file" in convert(ckpt, "--ema-sigma", 0.1, "--to", "diffusers")
    refused(convert_checkpoint.main, capsys, (ckpt, tmp_path / "a.dcp", "--ema-sigma", 0.1), "a.dcp: a folder of parts")
    line = refused(generate.main, capsys, ("--ckpt", ckpt, "--ema-sigma", 0.1, "--weights", "model"))
    assert "--weights model: --ema-sigma 0.1 is an average of its own" in line
    (tmp_path / "other" / "snapshots").mkdir(parents=True)
    line = convert(tmp_path / "other", "--ema-sigma", 0.1)
    assert "holds no snapshots of power-function averages; train.py writes them with --posthoc-ema" in line
    assert not out.exists()
    line = refused(train.main, capsys, command(data, folder.parent, "--resume-step", -1, "--posthoc-ema", 0.2))
    assert "--posthoc-ema 0.2: step 24 of the run" in line
    assert "must be > 0" in refused(train.main, capsys, command(data, tmp_path, "--posthoc-ema", 0))


def test_snapshots_of_another_run_and_damaged_ones_are_named(ran, tmp_path, capsys):
    folder = tmp_path / "run" / "snapshots"
    shutil.copytree(ran[0] / "snapshots", folder)
    victim = folder / "0000016-sigma-0.05.safetensors"
    tensors, told = tensor_files.load_safetensors(victim)
    argv = (folder, tmp_path / "out.pt", "--ema-sigma", 0.1)
    for wrong in ({"run": "0" * 16}, {"step": "12"}, {"sigma_rel": "0.1"}):
        snapshots.save(victim, tensors, told | wrong)
        assert str(victim) in refused(convert_checkpoint.main, capsys, argv, "of another run")
    name = next(iter(tensors))
    snapshots.save(victim, {k: v for k, v in tensors.items() if k != name}, told)
    refused(convert_checkpoint.main, capsys, argv, str(victim), f"{name} is missing")
    snapshots.save(victim, tensors | {name: tensors[name] * float("nan")}, told)
    refused(convert_checkpoint.main, capsys, argv, str(victim), "not finite")
    victim.write_bytes(victim.read_bytes()[:1000])
    refused(convert_checkpoint.main, capsys, argv, str(victim), "truncated")
    assert json.loads(told["config"])["posthoc_ema"] == [0.05, 0.1]
