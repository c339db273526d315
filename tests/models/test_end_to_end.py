"""Every new family through the scripts: plan, training, resume, generation at two budgets, the inference tools, other weights."""

import re

import encoder_runs
import numpy as np
import pytest
import runs
import torch
from numerics import randomize
from PIL import Image
from runs import CLASSES, make_latents, make_vae, refused
from training_runs import arguments, assert_same_tensors, final_state, metrics

import elit_ccfg_inference
import elit_multibudget_inference
import generate
import models
import train
from checkpoint.init_from import init_from
from checkpoint.weights import Weights
from common.errors import UserError
from config.options import TrainConfig
from sampling import cost

pytestmark = pytest.mark.slow

RESOLUTION = 64  # of VAE latents of 16×16
MODELS = {
    "ELIT-U-ViT-Ti/2": (),
    "ELIT-HDiT-Ti/2": ("--levels", 2),  # grids of 8×8 and 4×4
    "ELIT-SiT-UViT-Ti/2": (),
    "ELIT-SiT-HDiT-Ti/2": (),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "SIDE", RESOLUTION // 4)
        patch.setattr(encoder_runs, "RESOLUTION", RESOLUTION)
        encoder_runs.make_images(make_latents(folder / "set", 16, make_vae(folder / "vae")))
    torch.save(encoder_runs.random_vit("vit_tiny_patch16_224").state_dict(), folder / "encoder.pt")
    return folder / "set"


def command(data, out, model, *more):
    elit = ("--elit-group-size", 4, "--elit-max-mask-prob", 0.75) if "ELIT" in model else ()
    return arguments(data, out, "--resolution", RESOLUTION, *elit, *MODELS.get(model, ()), *more, model=model)


def images_of(out, ckpt, budget, *more):
    options = {
        "ckpt": ckpt,
        "sample-dir": out,
        "num-fid-samples": 2,
        "num-steps": 2,
        "cfg-scale": 2,
        "inference-budget": budget,
    }
    generate.main([str(part) for name, value in options.items() for part in ("--" + name, value)] + [str(m) for m in more])
    return np.stack([np.asarray(Image.open(p)) for p in sorted(out.glob("**/*.png"))])


@pytest.mark.parametrize("model", MODELS)
def test_train_resume_and_generate(model, data, tmp_path, monkeypatch, capsys):
    repa = encoder_runs.repa(data.parent / "encoder.pt") if "HDiT-Ti" in model and "SiT" not in model else ()
    train.main(command(data, tmp_path, model, *repa, "--plan", "--gradient-checkpointing"))
    assert model in capsys.readouterr().out

    train.main(command(data, tmp_path, model, *repa))
    whole, losses = final_state(tmp_path), metrics(tmp_path)
    assert ("alignment_loss" in (tmp_path / "run" / "metrics.jsonl").read_text()) == bool(repa)
    last = tmp_path / "run" / "checkpoints" / "0000004.pt"
    last.unlink()
    train.main(command(data, tmp_path, model, *repa, "--resume-step", -1))
    resumed = final_state(tmp_path)
    for a, b in ((resumed["model"], whole["model"]), (resumed["ema"]["0.9999"], whole["ema"]["0.9999"])):
        assert_same_tensors(a, b)
    assert metrics(tmp_path) == losses

    low, full = (images_of(tmp_path / f"images{b}", last, b, "--weights", "model") for b in (0.25, 1.0))
    assert low.shape == full.shape == (2, RESOLUTION, RESOLUTION, 3)

    monkeypatch.setattr(cost, "WARM_UP", 0)
    monkeypatch.setattr(cost, "MOST_ROUNDS", 2)
    tool = ["--ckpt", last, "--output-dir", tmp_path / "tool", "--class-label", 3, "--num-steps", 2]
    if "SiT" in model:
        elit_ccfg_inference.main([str(a) for a in (*tool, "--cfg-scales", 2, "--unconditional-inference-budget", 0.25)])
    else:
        elit_multibudget_inference.main([str(a) for a in (*tool, "--budgets", 0.25, 1, "--attention")])
        assert (tmp_path / "tool" / "attention_maps.png").exists()
    assert (tmp_path / "tool" / "results.json").exists()


@pytest.mark.parametrize(
    ("model", "more", "words"),
    [
        ("MMDiT-Ti/2", (), "holds no text features, no text/ with text.json; `dataset_tools.py text` makes them"),
        ("DFM-U-ViT-Ti/2", (), "DFM exists only for SiT"),
        ("ELIT-U-ViT-Ti/2", ("--head-depth", 2), "head_depth 2 and tail_depth 1: must be equal in a U-ViT"),
        ("U-ViT-Ti/2", ("--levels", 2), "--levels 2: U-ViT-Ti/2 has no levels; only HDiT models do"),
        ("ELIT-HDiT-Ti/2", ("--head-depth", 0), "the core must lie in HDiT's inner level"),
        ("HDiT-Ti/4", ("--levels", 4), "HDiT level 0: head_width 32"),
        ("U-ViT-Ti/2", ("--qk-norm",), "U-ViT-Ti/2 has no option 'qk_norm'"),
    ],
)
def test_what_training_refuses(model, more, words, data, tmp_path, capsys):
    assert words in refused(train.main, capsys, command(data, tmp_path, model, *more))
    assert not (tmp_path / "run").exists()


def test_budgets_that_cost_no_less_are_a_warning(data, tmp_path, capsys):
    for highest, warned in ((0.75, False), (0.9375, True)):
        more = ("--elit-max-mask-prob", highest, "--plan")
        train.main(command(data, tmp_path, "ELIT-SiT-HDiT-Ti/2", *more))
        assert ("budgets below 4/16 cost ELIT-SiT-HDiT-Ti/2 no less" in capsys.readouterr().err) == warned


def test_budgets_that_cost_no_less_are_a_warning_where_images_are_drawn(tmp_path, monkeypatch, capsys):
    last = runs.make_checkpoint(tmp_path / "0000001.pt", make_vae(tmp_path / "vae"), model="ELIT-SiT-HDiT-Ti/2")
    for module, name in ((generate, "generate"), (elit_ccfg_inference, "compare"), (elit_multibudget_inference, "compare")):
        monkeypatch.setattr(module, name, lambda *_: None)
    tool = ("--class-label", 1, "--output-dir", tmp_path)
    for script, more, warned in (
        (generate, (), False),
        (generate, ("--inference-budget", 1), False),
        (generate, ("--inference-budget", "0.5@1.0-0.5,1.0@0.5-0.0"), True),
        (generate, ("--unconditional-inference-budget", 0.25), True),
        (elit_ccfg_inference, tool, True),
        (elit_multibudget_inference, tool, True),
        (elit_multibudget_inference, (*tool, "--budgets", 1), False),
    ):
        script.main([str(a) for a in ("--ckpt", last, *more)])
        told = "warning: budgets below 4/4 cost ELIT-SiT-HDiT-Ti/2 no less in its inner blocks" in capsys.readouterr().err
        assert told == warned, (script, more)


def started(source, target, **options):
    """The target's model after `init_from` of the source's random weights, what was done, and the source's model."""
    side = {"num_classes": CLASSES, **options}
    old = randomize(models.create_model(source, input_size=8, **side)).float()
    new = models.create_model(target, input_size=16, **side | ({"elit_group_size": 2} if "ELIT" in target else {}))
    configs = [
        vars(TrainConfig(model=m, resolution=r, num_classes=CLASSES, exp_name="a")) for m, r in ((source, 64), (target, 128))
    ]
    made = init_from(Weights(old.state_dict(), configs[0]), new, configs[1], "a.pt")
    new.load_state_dict(made.state_dict, strict=False)
    return new, made, old


@pytest.mark.parametrize("family", ["U-ViT", "HDiT", "SiT-UViT", "SiT-HDiT", "MMDiT"])
def test_an_elastic_model_starts_from_its_backbones_weights(family):
    new, made, old = started(f"{family}-Ti/2", f"ELIT-{family}-Ti/2", **({"levels": 1} if family == "HDiT" else {}))
    assert all(re.match("interface", name) for name in made.new) and not made.left
    state = new.state_dict()
    same = {k: v for k, v in old.state_dict().items() if k != "pos_embed"}
    assert_same_tensors({k: state[k] for k in same}, same)  # HDiT's random frequencies, too
    if family == "U-ViT":
        assert torch.equal(new.pos_embed[:, :2], old.pos_embed[:, :2]) and "4 × 4 → 8 × 8 tokens" in made.changed["pos_embed"]
        torch.testing.assert_close(new.pos_embed[:, 2:].mean(), old.pos_embed[:, 2:].mean(), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("source", "target"), [("SiT-Ti/2", "U-ViT-Ti/2"), ("SiT-Ti/2", "SiT-HDiT-Ti/2"), ("U-ViT-Ti/2", "HDiT-Ti/2")]
)
def test_weights_of_another_backbone_are_refused(source, target):
    with pytest.raises(UserError, match=f"^--init-from a.pt: holds a {source}, whose blocks are not those of {target}$"):
        started(source, target)
