"""Another checkpoint as the guide, and guidance of some channels: in the scripts, with what they record, count and refuse."""

import json
from functools import partial

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from runs import CLASSES, make_checkpoint, make_vae

import elit_ccfg_inference
import elit_multibudget_inference
import generate
import models
import randomness
from checkpoint import reading
from models.vae import load_vae
from sampling import cost

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, guide.pt of one block fewer in its core, and other.pt, another network of the guide's name."""
    folder = tmp_path_factory.mktemp("ckpt")
    record = make_vae(folder / "vae")
    make_checkpoint(folder / "model.pt", record)
    make_checkpoint(folder / "guide.pt", record, head_depth=2, elit_tail="skip")
    make_checkpoint(folder / "sit.pt", record, model="SiT-Ti/2")
    return folder


def arguments(folder, out, *more):
    options = ("--ckpt", folder / "model.pt", "--sample-dir", out, "--num-fid-samples", 2, "--num-steps", 2, "--cfg-scale", 3)
    return [str(a) for a in (*options, "--guide-ckpt", folder / "guide.pt", *more)]


def test_images_are_those_of_a_plain_loop_and_the_guide_is_recorded(folder, tmp_path, capsys):
    more = ("--guide-budget", 0.25, "--inference-budget", 0.5, "--guide-label", "none", "--cfg-channels", 3)
    generate.main(arguments(folder, tmp_path, *more))
    model, guide = (reading.load_model(folder / f"{name}.pt")[0] for name in ("model", "guide"))
    (images,) = [p for p in (tmp_path / "made").iterdir() if p.is_dir()]
    assert images.name == "ckpt-model-cfg-3.0-steps-2-seed-0-ode-budget-0.5-channels-3-guide-guide-label-none-at-0.25"
    x, y = randomness.image_noise(0, [0, 1], (4, 8, 8)).double(), randomness.image_labels(0, [0, 1], CLASSES)
    with torch.no_grad():
        for t in (1.0, 0.5):
            v = model(x.float(), torch.full((2,), t), y, inference_budget=0.5).double()
            low = guide(x.float(), torch.full((2,), t), torch.full_like(y, CLASSES), inference_budget=0.25).double()
            v[:, :3] = low[:, :3] + 3 * (v[:, :3] - low[:, :3])
            x = x - v / 2
        pixels = load_vae(str(folder / "vae"))[0].decode((x / 0.5).float()).sample.permute(0, 2, 3, 1).double().numpy()
    found = np.stack([np.asarray(Image.open(p)) for p in sorted(images.glob("*.png"))])
    assert np.abs(found - np.clip(np.floor(127.5 * pixels + 128), 0, 255)).max() <= 1
    flops = models.count_flops(model, 0.5) + models.count_flops(guide, 0.25)
    assert f"{flops / 1e9:.2f} GFLOPs per image and step" in capsys.readouterr().out

    record = json.loads(images.with_name(images.name + ".json").read_text())
    assert record["guide_sha256"] == reading.read_weights(folder / "guide.pt").sha256 and record["guide_label"] == "none"
    other = make_checkpoint(tmp_path / "guide.pt", reading.read_weights(folder / "model.pt").record, head_depth=2)
    runs.refused(generate.main, capsys, arguments(folder, tmp_path, *more, "--guide-ckpt", other), "guide_sha256")


def test_both_tools_take_a_guide_and_a_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "WARM_UP", 0)
    monkeypatch.setattr(cost, "MOST_ROUNDS", 2)
    monkeypatch.setattr(cost, "LEAST_ROUNDS", 2)
    grids = []
    for tool in (elit_ccfg_inference, elit_multibudget_inference):
        monkeypatch.setattr(tool, "labelled_grid", lambda images, rows, *a, **k: grids.append((images, rows)))
    options = ["--ckpt", folder / "model.pt", "--guide-ckpt", folder / "sit.pt", "--class-label", 3, "--num-steps", 3]
    options += ["--output-dir", tmp_path, "--core-cache", 1000]
    full, quarter, sit = (models.count_flops(reading.load_model(folder / f"{name}.pt")[0], b)
                          for name, b in (("model", None), ("model", 0.25), ("sit", None)))  # fmt: skip
    reused = {name: models.count_reused_flops(reading.load_model(folder / f"{name}.pt")[0]) for name in ("model", "sit")}

    elit_ccfg_inference.main([str(o) for o in [*options, "--cfg-scales", 2, "--unconditional-inference-budget", 0.25]])
    results = {(e["mode"], e["cfg_scale"]): e for e in json.loads((tmp_path / "results.json").read_text())}
    (images, rows) = grids[0]
    assert rows == ["class 3\nCFG", "class 3\ncheap CFG", "class 3\nautoguidance", "class 3\nguide"] and len(results) == 4
    assert (images[3] != images[0]).any()
    # The core runs in the first and last of three steps.
    for mode, (low, again) in {"CFG": (full, "model"), "AutoG": (quarter, "model"), "Guide": (sit, "sit")}.items():
        entry = results[mode, 2]
        assert entry["gflops_per_guided_step"] == pytest.approx((full + low) / 1e9)
        assert entry["gflops_per_step"] == pytest.approx((2 * (full + low) + reused["model"] + reused[again]) / 3 / 1e9)
        assert entry["core_share"] == pytest.approx(2 / 3)

    elit_multibudget_inference.main([str(o) for o in [*options, "--budgets", 0.25, "--guide-label", "none"]])
    (entry,) = json.loads((tmp_path / "results.json").read_text())
    wanted = 2 * (quarter + sit) + reused["model"] + reused["sit"]
    assert entry["gflops_per_step"] == pytest.approx(wanted / 3 / 1e9) and entry["core_share"] == pytest.approx(2 / 3)


def test_bad_input(folder, tmp_path, capsys):
    record = reading.read_weights(folder / "model.pt").record
    dfm = make_checkpoint(tmp_path / "dfm.pt", record, model="DFM-SiT-Ti/2")
    classes = make_checkpoint(tmp_path / "classes.pt", record, path_type="cosine")
    refused = partial(runs.refused, generate.main, capsys)

    def refuse(*more_and_words, given=()):
        refused(arguments(folder, tmp_path / "out", *given), *more_and_words)

    refuse("--guide-ckpt", "dfm.pt", "latents of 4×4×4 and 4×8×8, but the model's are 4×8×8", given=("--guide-ckpt", dfm))
    refuse("classes.pt", "path_type cosine", given=("--guide-ckpt", classes))
    refuse("--guide-ckpt", "nowhere.pt", given=("--guide-ckpt", "nowhere.pt"))
    refuse("--guide-weights ema:0.5", given=("--guide-weights", "ema:0.5"))
    refuse("--guide-budget 0.5", "SiT-Ti/2", "no budget", given=("--guide-ckpt", folder / "sit.pt", "--guide-budget", 0.5))
    refuse("--guide-budget", "0.1", "[0.25, 1]", given=("--guide-budget", 0.1))
    refuse("autoguidance", "guide_budget", given=("--autoguidance", "--unconditional-inference-budget", 0.25))
    refuse("--cfg-channels 5", "4 channels", given=("--cfg-channels", 5))
    refuse("--cfg-channels: 0", given=("--cfg-channels", 0))
    refuse("--guide-label: 'any'", "same, none", given=("--guide-label", "any"))
    for option, value in (("--guide-budget", 0.5), ("--guide-label", "none"), ("--guide-weights", "model")):
        refused(["--ckpt", "hf://a/b/c.pt", option, value], f"{option} {value}", "--guide-ckpt")
    assert not (tmp_path / "out").exists()
