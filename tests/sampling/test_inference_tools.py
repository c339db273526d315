"""The two inference tools: their pictures and results.json, what they refuse; and Read's attention weights."""

import errno
import json
import math

import numpy as np
import pytest
import runs
import torch
from numerics import randomize
from PIL import Image
from runs import CLASSES, RESOLUTION, SIDE, make_checkpoint, make_vae
from scipy.stats import spearmanr

import elit_ccfg_inference
import elit_multibudget_inference
import models
import randomness
import samplers
from checkpoint import reading, training_state
from common import tensor_files
from models.elit import CrossAttention, LatentInterface
from models.vae import decode, load_vae
from sampling import cost

pytestmark = pytest.mark.slow

SCHEDULE = "0.25@1.0-0.5,1.0@0.5-0.0"


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ckpt")
    return make_checkpoint(folder / "0000007.pt", make_vae(folder / "vae"))


@pytest.fixture(scope="module")
def flops(ckpt):
    model, _ = reading.load_model(ckpt)
    return {k / 4: models.count_flops(model, k / 4) for k in (1, 2, 3, 4)}


@pytest.fixture(autouse=True)
def quick(monkeypatch, flops):
    """Few rounds, and FLOPs counted once: the models here are alike."""
    monkeypatch.setattr(cost, "WARM_UP", 1)
    monkeypatch.setattr(cost, "MOST_ROUNDS", 3)
    monkeypatch.setattr(models, "count_flops", lambda model, budget: flops[budget])


def command(ckpt, out, *more):
    return [str(o) for o in ("--ckpt", ckpt, "--output-dir", out, "--class-label", 3, 1, "--num-steps", 4, *more)]


def run(tool, ckpt, out, *more):
    tool.main(command(ckpt, out, *more))
    results = json.loads((out / "results.json").read_text())
    assert not list(out.glob("*.tmp"))
    for picture in out.glob("*.png"):
        with Image.open(picture) as image:
            image.load()
            assert min(image.size) > 200
    return results


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# ------------------------------------------------------------------------------------------------------- multibudget


def test_every_budget_and_a_schedule(ckpt, flops, tmp_path, monkeypatch):
    grids = []
    monkeypatch.setattr(elit_multibudget_inference, "labelled_grid", lambda images, *a, **k: grids.append((images, *a)))
    results = run(elit_multibudget_inference, ckpt, tmp_path, "--inference-budget", SCHEDULE, "--cfg-scale", 2)
    assert [e["budget"] for e in results] == [0.25, 0.5, 0.75, 1.0, SCHEDULE]
    assert names(tmp_path) == ["budget_vs_flops.png", "budget_vs_latency.png", "budget_vs_psnr.png", "results.json"]
    for entry in results[:4]:
        assert entry["flops_per_forward"] == flops[entry["budget"]]
        assert entry["gflops_per_forward"] == pytest.approx(flops[entry["budget"]] / 1e9)
        assert entry["gflops_per_step"] == pytest.approx(2 * flops[entry["budget"]] / 1e9)
        low, high = entry["latency_ms_quartiles"]
        assert 0 < low <= entry["latency_ms"] <= high
    # Evaluated at t = 1, ¾, ½, ¼; the piece that starts at ½ holds there.
    assert results[4]["gflops_per_forward"] == pytest.approx((flops[0.25] + flops[1.0]) / 2 / 1e9)
    assert results[4]["gflops_per_step"] == pytest.approx((flops[0.25] + flops[1.0]) / 1e9)

    ((images, rows, headings, path),) = grids
    assert images.shape == (2, 5, RESOLUTION, RESOLUTION, 3) and rows == ["class 3", "class 1"]
    assert path == tmp_path / "image_grid.png" and "0.25" in headings[0] and headings[4].startswith("0.25@1-0.5,\n1@0.5-0\n")
    assert f"{results[0]['gflops_per_forward']:.3g} GFLOPs" in headings[0] and " ms" in headings[0]

    # The same noise for all budgets, that of (seed, i): written from the sampler.
    model, _ = reading.load_model(ckpt)
    vae, _ = load_vae(str(ckpt.parent / "vae"))
    noise = randomness.image_noise(42, [0, 1], (4, SIDE, SIDE))
    for column, budget in ((1, 0.5), (3, 1.0), (4, samplers.BudgetSchedule.parse(SCHEDULE))):
        latents = samplers.euler_sampler(
            model, noise, torch.tensor([3, 1]), num_steps=4, cfg_scale=2.0, inference_budget=budget
        )
        wanted = decode(vae, latents).permute(0, 2, 3, 1).numpy()
        assert np.abs(images[:, column].astype(int) - wanted).max() <= 1
    assert results[3]["psnr"] is None
    for column in (0, 1, 2, 4):
        error = np.mean((images[:, column].astype(float) - images[:, 3]) ** 2)
        assert results[column]["psnr"] == pytest.approx(10 * math.log10(255**2 / error))


def test_chosen_budgets_cheap_guidance_and_a_plain_budget_more(ckpt, flops, tmp_path):
    options = ("--budgets", 0.5, "--inference-budget", 0.75, "--unconditional_inference_budget", 0.25, "--guidance-high", 0.5)
    results = run(elit_multibudget_inference, ckpt, tmp_path, *options, "--heun", "--per-proc-batch-size", 1)
    assert [e["budget"] for e in results] == [0.5, 0.75] and results[0]["batch_size"] == 1
    assert results[0]["psnr"] > 0 and (tmp_path / "image_grid.png").is_file()
    # Heun evaluates at 1, ¾, ½, ¼ and again at ¾, ½, ¼; four of the seven are guided.
    assert results[0]["gflops_per_step"] == pytest.approx((7 * flops[0.5] + 4 * flops[0.25]) / 4 / 1e9)


def test_attention_files(ckpt, tmp_path, monkeypatch, capsys):
    drawn, shown = [], []
    grid = elit_multibudget_inference.labelled_grid

    def keeping(images, rows, columns, path, **options):
        if path.name == "attention_loss.png":
            shown.append((images, rows, columns))
        grid(images, rows, columns, path, **options)

    monkeypatch.setattr(elit_multibudget_inference, "labelled_grid", keeping)
    real = elit_multibudget_inference.attention_maps
    monkeypatch.setattr(elit_multibudget_inference, "attention_maps", lambda *a: (drawn.append(a), real(*a)))
    run(elit_multibudget_inference, ckpt, tmp_path, "--budgets", 1, "--attention", "--attention-time", 0.25, "--cfg-scale", 1)
    assert {"attention_maps.png", "attention_entropy.png", "attention_loss.png", "attention.json"} <= set(names(tmp_path))
    said = json.loads((tmp_path / "attention.json").read_text())
    assert said["time"] == 0.25 and len(said["attention_entropy"]) == 4
    assert all(0 < e <= math.log(4) + 1e-6 for e in said["attention_entropy"])

    # The result noised to t with its own first noise, and Read's weights there.
    model, _ = reading.load_model(ckpt)
    noise, y = randomness.image_noise(42, [0, 1], (4, SIDE, SIDE)), torch.tensor([3, 1])
    x = samplers.euler_sampler(model, noise, y, num_steps=4, inference_budget=1.0)
    weights = model.read_attention((0.75 * x + 0.25 * noise).float(), torch.full((2,), 0.25), y).double().numpy()
    entropy = -(weights * np.log(weights)).sum(-1).mean((0, 1, 2))
    np.testing.assert_allclose(said["attention_entropy"], entropy, rtol=1e-4)
    ((images, maps, windows, labels, columns, _),) = drawn
    assert columns == ["latent 0", "latent 1", "latent 2", "latent 3", "total"] and labels == ["class 3", "class 1"]
    assert images.shape == (2, RESOLUTION, RESOLUTION, 3) and maps.shape == (2, 5, 4, 4) and windows.shape == (5, 2, 2)
    mean = weights.mean(2)  # (B, G, J latents, J tokens); a grid of 4×4 tokens in windows of 2×2
    for i, latent, row, column in ((0, 0, 0, 0), (1, 2, 1, 2), (0, 3, 3, 1)):
        group, token = row // 2 * 2 + column // 2, row % 2 * 2 + column % 2
        assert maps[i, latent, row, column] == pytest.approx(4 * mean[i, group, latent, token], rel=1e-4)
    np.testing.assert_allclose(maps[:, 4], maps[:, :4].mean(1), rtol=1e-5)
    np.testing.assert_allclose(windows[1].reshape(-1), 4 * mean[:, :, 1].mean((0, 1)), rtol=1e-4)

    # What all latents read beside each patch's loss, over eight other draws of noise.
    attention, losses = np.zeros((2, 4, 4)), np.zeros((2, 4, 4))
    for n in range(8):
        noise = randomness.image_noise(43 + n, [0, 1], (4, SIDE, SIDE))
        state, t = (0.75 * x + 0.25 * noise).float(), torch.full((2,), 0.25)
        with torch.no_grad():
            error = ((model(state, t, y) - (noise - x)) ** 2).mean(1).double().numpy()
            read = model.read_attention(state, t, y).double().numpy().mean((2, 3))  # (B, G, J tokens)
        losses += error.reshape(2, 4, 2, 4, 2).mean((2, 4)) / 8
        attention += read.reshape(2, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(2, 4, 4) / 8
    expected = [spearmanr(attention[i], losses[i], axis=None).statistic for i in range(2)]
    assert said["loss_correlation"]["images"] == pytest.approx(expected, abs=1e-6) and said["loss_correlation"]["draws"] == 8
    assert said["loss_correlation"]["mean"] == pytest.approx(np.mean(expected))
    assert f"over 16 patches: {np.mean(expected):.2f} ±" in capsys.readouterr().out
    ((columns, rows, heads),) = shown
    assert columns.shape == (2, 3, RESOLUTION, RESOLUTION, 3) and len(rows) == 2 and len(heads) == 3
    assert rows[0] == f"class 3\nρ {expected[0]:.2f}"
    for column, values in ((1, attention), (2, losses)):
        row, place = np.unravel_index(values[1].argmax(), (4, 4))
        brightness = columns[1, column].astype(int).sum(-1)
        assert brightness.max() == brightness[8 * row + 4, 8 * place + 4]  # patches of 8 pixels


# -------------------------------------------------------------------------------------------------------------- ccfg


def test_three_kinds_of_guidance(ckpt, flops, tmp_path, monkeypatch, capsys):
    grids = []
    monkeypatch.setattr(elit_ccfg_inference, "labelled_grid", lambda images, *a, **k: grids.append((images, *a)))
    options = ("--cfg-scales", 1, 3, "--inference-budget", 1.0, "--unconditional-inference-budget", 0.3)
    results = run(elit_ccfg_inference, ckpt, tmp_path, *options)
    assert "0.3 is no multiple of 1/4; running at 0.25" in capsys.readouterr().err
    assert [(e["mode"], e["cfg_scale"]) for e in results] == [(m, s) for m in ("CFG", "CCFG", "AutoG") for s in (1.0, 3.0)]
    assert names(tmp_path) == ["cfg_vs_ccfg_flops.png", "results.json"]
    costs = {"CFG": 2 * flops[1.0], "CCFG": flops[1.0] + flops[0.25], "AutoG": flops[1.0] + flops[0.25]}
    for entry in results:
        wanted = flops[1.0] if entry["cfg_scale"] == 1 else costs[entry["mode"]]
        assert entry["gflops_per_step"] == entry["gflops_per_guided_step"] == pytest.approx(wanted / 1e9)
        assert entry["budget"] == 1.0 and entry["flops_per_forward"] == flops[1.0] and entry["latency_ms"] > 0
        assert entry["unconditional_budget"] == (None if entry["mode"] == "CFG" else 0.25)

    ((images, rows, columns, path),) = grids
    assert path == tmp_path / "cfg_vs_ccfg_grid.png" and columns == ["scale 1", "scale 3"]
    assert images.shape == (6, 2, RESOLUTION, RESOLUTION, 3) and rows[4] == "class 1\ncheap CFG"
    assert (images[0, 0] == images[1, 0]).all() and (images[0, 1] != images[1, 1]).any()
    model, _ = reading.load_model(ckpt)
    vae, _ = load_vae(str(ckpt.parent / "vae"))
    noise, y = randomness.image_noise(42, [0, 1], (4, SIDE, SIDE)), torch.tensor([3, 1])
    for mode in range(3):
        low = {} if mode == 0 else {"unconditional_inference_budget": 0.25, "autoguidance": mode == 2}
        latents = samplers.euler_sampler(model, noise, y, num_steps=4, cfg_scale=3.0, inference_budget=1.0, **low)
        wanted = decode(vae, latents).permute(0, 2, 3, 1).numpy()
        assert np.abs(images[mode::3, 1].astype(int) - wanted).max() <= 1


def test_a_schedule_an_interval_and_the_lowest_budget_by_default(ckpt, flops, tmp_path, capsys):
    results = run(elit_ccfg_inference, ckpt, tmp_path, "--inference-budget", "0.3@1.0-0.5,1@0.5-0", "--guidance-high", 0.75,
                  "--cfg-scales", 2)  # fmt: skip
    said = capsys.readouterr().err
    assert "lowest budget is 1/4" in said and "0.3 is no multiple" in said
    assert (tmp_path / "cfg_vs_ccfg_grid.png").is_file()
    entry = results[1]
    assert entry["mode"] == "CCFG" and entry["budget"] == SCHEDULE and entry["unconditional_budget"] == 0.25
    # Of t = 1, ¾, ½, ¼ the last three are guided, the last two at the full budget.
    assert entry["gflops_per_guided_step"] == pytest.approx((4 * flops[0.25] + 2 * flops[1.0]) / 3 / 1e9)
    assert entry["gflops_per_step"] == pytest.approx((5 * flops[0.25] + 2 * flops[1.0]) / 4 / 1e9)


# -------------------------------------------------------------------------------------------------------------- both


def test_published_command_lines_with_a_training_config(ckpt, tmp_path):
    yaml = tmp_path / "train.yaml"
    yaml.write_text(
        "exp_name: named\nmodel: ELIT-SiT-Ti/2\nresolution: 32\nnum_classes: 5\nelit_group_size: 2\nbatch_size: 4\n"
    )
    run(elit_multibudget_inference, ckpt, tmp_path / "a", "--train-config", yaml, "--num_steps", 1, "--budgets=1")
    sampling = tmp_path / "sampling.yaml"
    sampling.write_text("num_fid_samples: 50000\nnum_steps: 1\nautoguidance: true\ncfg_scale: 4.0\n")
    run(elit_ccfg_inference, ckpt, tmp_path / "b", "--train-config", yaml, "--eval-config", sampling, "--inference-budget", "1.0",
        "--unconditional-inference-budget", 0.25, "--cfg-scales", 1, 2, "--class-label", 4)  # fmt: skip


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--budgets", 0.5, 0.1), ["--budgets", "0.1", "0.25, 0.5, 0.75, 1"]),
        (("--budgets", 1.5), ["--budgets", "1.5", "≤ 1"]),
        (("--inference-budget", "0.25@1-0.5,1@0.4-0"), ["--inference-budget", "gap"]),
        (("--inference-budget", "0.25@1-0.4,1@0.5-0"), ["--inference-budget", "overlap"]),
        (("--inference-budget", "0.1@1-0.4,1@0.4-0"), ["--inference-budget", "0.1", "0.25, 0.5, 0.75, 1"]),
        (("--unconditional-inference-budget", 0.1), ["--unconditional-inference-budget", "0.25, 0.5"]),
        (("--class-label", 3, CLASSES), ["--class-label 5", "below 5"]),
        (("--class-label", -1), ["--class-label", "-1"]),
        (("--autoguidance",), ["unconditional_inference_budget"]),
        (("--cfg-scale", 0.5), ["--cfg-scale", "0.5"]),
        (("--cfg-scales", 2, 0.5), ["--cfg-scales", "0.5"]),
        (("--heun", "--mode", "sde"), ["--heun"]),
        (("--resolution", 64), ["--resolution 64", "32"]),
        (("--attention-time", 2), ["--attention-time"]),
        (("--vae", "nowhere/at-all"), ["--vae nowhere/at-all"]),
        (("--ckpt", "nowhere.pt"), ["nowhere.pt"]),
        (("--output-dir", __file__), ["--output-dir"]),
        (("--num-fid-samples", 3), ["--num-fid-samples"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(ckpt, tmp_path, capsys, monkeypatch, more, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tools = {"--cfg-scales": [elit_ccfg_inference], "--budgets": [elit_multibudget_inference]} | {
        option: [elit_multibudget_inference] for option in ("--cfg-scale", "--autoguidance", "--attention-time")
    }
    for tool in tools.get(more[0], [elit_multibudget_inference, elit_ccfg_inference]):
        line = refused(capsys, tool, ckpt, tmp_path / "out", *more)
        for word in words:
            assert word in line, line
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tool", [elit_multibudget_inference, elit_ccfg_inference])
def test_a_sit_checkpoint_is_refused(ckpt, tmp_path, capsys, tool):
    made = make_checkpoint(tmp_path / "sit.pt", reading.read_weights(ckpt).record, model="SiT-Ti/2")
    assert "SiT-Ti/2, which has no budget" in refused(capsys, tool, made, tmp_path / "out")


@pytest.mark.parametrize("tool", [elit_multibudget_inference, elit_ccfg_inference])
def test_a_checkpoint_that_does_not_fit_or_cannot_be_fetched_is_refused(ckpt, tmp_path, capsys, monkeypatch, tool):
    state = tensor_files.load(ckpt)
    weights = dict(state["ema"]["0.9999"]) | {"interface.query": torch.zeros(4, 7), "blocks.0.odd": torch.zeros(1)}
    weights.pop("final_layer.linear.bias")
    training_state.save(tmp_path / "odd.pt", state | {"ema": {"0.9999": weights}})
    line = refused(capsys, tool, tmp_path / "odd.pt", tmp_path / "out")
    for words in (
        "odd.pt",
        "interface.query has shape (4, 7)",
        "blocks.0.odd is unknown",
        "final_layer.linear.bias is missing",
    ):
        assert words in line, line
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "hf://someone/elit/a.pt: could not be downloaded" in refused(
        capsys, tool, "hf://someone/elit/a.pt", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def refused(capsys, tool, ckpt, out, *more):
    return runs.refused(tool.main, capsys, command(ckpt, out, *more))


def test_jobs_are_timed_in_turn():
    calls = []
    jobs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = cost.interleaved_times(jobs, torch.device("cpu"))
    assert "".join(calls) == 4 * "abc"
    assert all(0 <= low <= median <= high for low, median, high in times.values())


# ---------------------------------------------------------------------------------------------------- read attention


def test_attention_weights_are_those_of_the_forward():
    """In NumPy from the definition; and weights · values, projected, are the layer's output."""
    layer = randomize(CrossAttention(12, 3)).double()
    rng = np.random.default_rng(0)
    z, x = rng.standard_normal((2, 5, 4, 12)), rng.standard_normal((2, 5, 6, 12))
    weights = layer.weights(torch.from_numpy(z), torch.from_numpy(x)).detach().numpy()
    assert weights.shape == (2, 5, 3, 4, 6)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-12)

    p = {name: value.detach().numpy() for name, value in layer.named_parameters()}

    def norm(a, scale):
        return scale * a / (np.sqrt((a**2).mean(-1, keepdims=True)) + 1e-5)

    def split(a):  # (B, G, n, 12) → (B, G, 3, n, 4)
        return np.stack(np.split(a, 3, axis=-1), axis=2)

    q = split(norm(z @ p["q_proj.weight"].T + p["q_proj.bias"], p["q_norm.scale"]))
    kv = x @ p["kv_proj.weight"].T + p["kv_proj.bias"]
    k, v = split(norm(kv[..., :12], p["k_norm.scale"])), split(kv[..., 12:])
    scores = np.exp(q @ k.swapaxes(-1, -2) / 2)
    np.testing.assert_allclose(weights, scores / scores.sum(-1, keepdims=True), rtol=1e-9)
    out = np.concatenate(list((weights @ v).transpose(2, 0, 1, 3, 4)), axis=-1) @ p["proj.weight"].T + p["proj.bias"]
    np.testing.assert_allclose(layer(torch.from_numpy(z), torch.from_numpy(x)).detach().numpy(), out, rtol=1e-9, atol=1e-9)


def test_read_attention_is_of_the_last_layer_and_leaves_no_hook():
    interface = randomize(LatentInterface(16, 2, (4, 6), 2, cond_dim=8, read_depth=2))
    x, c = torch.randn(3, 24, 16), torch.randn(3, 8)
    seen = []
    interface.reader.attn[1].register_forward_hook(lambda layer, inputs, out: seen.append((inputs, out)))
    weights = interface.read_attention(x, c)
    assert weights.shape == (3, 6, 2, 4, 4)
    torch.testing.assert_close(weights, interface.reader.attn[1].weights(*seen[0][0]))
    assert not interface.reader.attn[1]._forward_pre_hooks


def test_both_tools_take_a_dfm_with_a_budget(ckpt, tmp_path):
    made = make_checkpoint(
        tmp_path / "dfm.pt",
        reading.read_weights(ckpt).record,
        model="DFM-ELIT-SiT-Ti/2",
        num_steps_per_scale=[2, 2],
        stage_sampling_thresholds=[0.2],
    )
    model, _ = reading.load_model(made)
    full, low = (models.count_flops(model, b) for b in (1.0, 0.25))
    options = ("--budgets", 0.25, 1, "--cfg-scale", 2, "--guidance-low", 0.9, "--attention")
    results = run(elit_multibudget_inference, made, tmp_path / "multi", *options)
    assert [e["flops_per_forward"] for e in results] == [low, full]
    # Guided where a stage's own time is at least 0.9: the first step of either phase.
    assert results[1]["gflops_per_step"] == pytest.approx(6 / 4 * full / 1e9)
    assert results[0]["psnr"] > 0 and (tmp_path / "multi" / "attention_maps.png").is_file()
    results = run(elit_ccfg_inference, made, tmp_path / "ccfg", "--cfg-scales", 2, "--unconditional-inference-budget", 0.25)
    assert {e["mode"]: e["gflops_per_guided_step"] for e in results} == {
        "CFG": pytest.approx(2 * full / 1e9),
        "CCFG": pytest.approx((full + low) / 1e9),
        "AutoG": pytest.approx((full + low) / 1e9),
    }


@pytest.mark.parametrize("tool", [elit_multibudget_inference, elit_ccfg_inference])
def test_a_full_disk_is_one_line(ckpt, tmp_path, capsys, monkeypatch, tool):
    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", no_space)
    scales = ["--cfg-scales", "1"] if tool is elit_ccfg_inference else ["--budgets", "1"]
    options = ["--ckpt", str(ckpt), "--output-dir", str(tmp_path), "--class-label", "1", "--num-steps", "1", *scales]
    line = runs.refused(tool.main, capsys, options)
    assert ".png" in line and "No space left on device" in line
    assert not list(tmp_path.iterdir())
