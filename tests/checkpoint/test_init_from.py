"""transfer.py: which weights of one model become which of another, and training that starts from them."""

import dataclasses
import math

import numpy as np
import pytest
import runs
import torch
from numerics import inputs, randomize
from runs import make_checkpoint, make_latents, make_vae
from training_runs import arguments, assert_same_tensors, final_state

import models
import train
from checkpoint import reading
from checkpoint.init_from import init_from
from checkpoint.weights import MODEL_OPTIONS, Weights
from common.errors import UserError
from config.options import TrainConfig

SIZES = {"hidden_size": 32, "num_heads": 4, "depth": 5}


def tiny(name, resolution=64, num_classes=5, seed=0, **options):
    """(model with random weights, its recorded options): 8-px VAE positions, patches of 2."""
    size = {"input_size": resolution // 8, "num_classes": num_classes}
    model = randomize(models.create_model(name, **SIZES, **size, **options), seed)
    known = {k: v for k, v in options.items() if k in MODEL_OPTIONS}
    return model, vars(TrainConfig(model=name, resolution=resolution, num_classes=num_classes, exp_name="a", **known))


def started(source, target):
    """`target`'s model with what `source` gives it, and the account of it."""
    (model, config), (new, new_config) = source, target
    made = init_from(Weights(model.state_dict(), config, step=7), new, new_config, "a.pt")
    result = new.load_state_dict(made.state_dict, strict=False)
    assert not result.unexpected_keys
    return new, made


def test_sit_becomes_the_blocks_of_elit():
    sit = tiny("SiT-Ti/2")
    elit = tiny("ELIT-SiT-Ti/2", elit_group_size=2, seed=1)
    before = {k: v.clone() for k, v in elit[0].state_dict().items()}
    new, made = started(sit, elit)
    for key, value in new.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith("interface.") else sit[0].state_dict()[key]), key
    assert made.new and all(k.startswith("interface.") for k in made.new) and not made.left and not made.changed
    assert "model SiT-Ti/2 → ELIT-SiT-Ti/2" in made.summary() and "blocks.* (50)" in made.summary()
    assert "interface.reader.*" in made.summary() and "step 7" in made.summary()
    back, made = started(elit, tiny("SiT-Ti/2", seed=2))
    assert not made.new and all(k.startswith("interface.") for k in made.left)
    x, t, y = inputs(back, [0.3, 0.9], dtype=torch.float32)
    assert torch.equal(back(x, t, y), sit[0](x, t, y))


def test_elit_as_it_is_changes_nothing():
    options = {"elit_group_size": 2, "head_depth": 2}
    a, b = tiny("ELIT-SiT-Ti/2", **options), tiny("ELIT-SiT-Ti/2", seed=1, **options)
    new, made = started(a, b)
    assert_same_tensors(new.state_dict(), a[0].state_dict())
    assert not made.new and not made.left and not made.changed


def test_a_larger_resolution_keeps_the_weights_and_makes_its_own_table():
    new, made = started(tiny("SiT-Ti/2"), tiny("SiT-Ti/2", resolution=128, seed=1))
    fresh = models.create_model("SiT-Ti/2", input_size=16, **SIZES)
    assert torch.equal(new.pos_embed, fresh.pos_embed) and new.pos_embed.shape == (1, 64, 32)
    assert not made.new and not made.left and "resolution 64 → 128" in made.summary()


def test_another_number_of_classes_keeps_the_null_label():
    source, target = tiny("SiT-Ti/2", num_classes=5), tiny("SiT-Ti/2", num_classes=9, seed=1)
    fresh = target[0].y_embedder.embedding_table.weight.detach().clone()
    new, made = started(source, target)
    table = new.y_embedder.embedding_table.weight
    assert torch.equal(table[9], source[0].y_embedder.embedding_table.weight[5])
    assert torch.equal(table[:9], fresh[:9])
    assert "null label's row kept, 9 class rows new" in made.summary()


def cubic(x):
    """Keys' kernel with a = −0.5, as antialiased bicubic interpolation uses it."""
    x = abs(x)
    return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resized(line, count):
    """One axis of a bicubic resize, written out: (n, …) → (count, …)."""
    n, out = len(line), []
    stretch = max(1.0, n / count)
    for i in range(count):
        centre = (i + 0.5) * n / count
        weights = np.array([cubic((j + 0.5 - centre) / stretch) for j in range(n)])
        out.append(np.tensordot(weights / weights.sum(), line, axes=1))
    return np.stack(out)


def as_image(table, before, after):
    image = table.reshape(before, before, -1)
    return resized(resized(image, after).transpose(1, 0, 2), after).transpose(1, 0, 2).reshape(after * after, -1)


@pytest.mark.parametrize(("before", "after", "resolution"), [(2, 4, 128), (4, 2, 64), (2, 2, 128)])
def test_tables_of_the_interface_are_resampled(before, after, resolution):
    source = tiny("ELIT-SiT-Ti/2", elit_group_size=before)
    new, made = started(source, tiny("ELIT-SiT-Ti/2", resolution=resolution, elit_group_size=after, seed=1))
    old = {k: v.detach().numpy() for k, v in source[0].interface.named_parameters()}
    J, Jn = before**2, after**2
    for name in ("read_pos", "write_pos"):
        expected = as_image(old[name], before, after) if before != after else old[name]
        np.testing.assert_allclose(getattr(new.interface, name).detach(), expected, rtol=0, atol=1e-5)

    def along_order(table):  # (J, D) → (Jn, D)
        return np.stack([np.interp(np.linspace(0, J - 1, Jn), np.arange(J), column) for column in table.T], axis=1)

    np.testing.assert_allclose(new.interface.query.detach(), along_order(old["query"]), rtol=0, atol=1e-5)
    groups, groups_new = 4 // before, resolution // 16 // after
    expected = np.stack([along_order(group) for group in old["latent_pos"]])
    if groups != groups_new:
        expected = np.stack([as_image(expected[:, j], groups, groups_new) for j in range(Jn)], axis=1)
    np.testing.assert_allclose(new.interface.latent_pos.detach(), expected, rtol=0, atol=1e-5)
    query = new.interface.query.detach()
    assert torch.cdist(query, query).fill_diagonal_(math.inf).min() > 1e-3  # no two latents the same
    changed = {"query", "read_pos", "write_pos", "latent_pos"} if before != after else {"latent_pos"}
    assert {k.removeprefix("interface.") for k in made.changed} == changed and not made.new


def test_projectors_go_on_for_the_same_encoders_alone():
    options = {"z_dims": (6,), "encoder_depth": 2}
    for enc_type, kept in (("dinov2-vit-b", True), ("mae-vit-b", False)):
        source, target = tiny("SiT-Ti/2", **options), tiny("SiT-Ti/2", seed=1, **options)
        source[1]["enc_type"], target[1]["enc_type"] = "dinov2-vit-b", enc_type
        new, made = started(source, target)
        assert torch.equal(new.projectors[0][0].weight, source[0].projectors[0][0].weight) == kept
        assert any(k.startswith("projectors.") for k in made.left) != kept


def test_models_of_other_blocks_are_refused():
    a = tiny("SiT-Ti/2")
    for change in ({"hidden_size": 64}, {"depth": 4}, {"mlp_ratio": 2.0}):
        other = models.create_model("SiT-Ti/2", input_size=8, num_classes=5, **(SIZES | change))
        with pytest.raises(UserError, match="has 5 blocks of width 32"):
            init_from(Weights(a[0].state_dict(), a[1]), other, a[1], "a.pt")


def test_published_checkpoints_are_taken(golden_checkpoint):
    for tag in ("sit", "elit"):
        found = reading.read_weights(golden_checkpoint(tag))
        config = found.config | {"resolution": 2 * found.config["resolution"], "num_classes": 3, "elit_group_size": 2}
        name = "ELIT-SiT-S/" + found.config["model"][-1]
        side = config["resolution"] // 8
        model = models.create_model(name, input_size=side, num_classes=3, elit_group_size=2)
        config = dataclasses.asdict(TrainConfig(exp_name="a")) | config | {"model": name}
        made = init_from(found, model, config, "published.pt")
        assert not [k for k in made.new if not k.startswith("interface.")]
        assert bool(made.new) == (tag == "sit")
        model.load_state_dict(made.state_dict, strict=False)
        assert torch.equal(model.blocks[3].mlp.fc1.weight, found.state_dict["blocks.3.mlp.fc1.weight"])


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    record = make_vae(folder / "vae")
    sit = make_checkpoint(folder / "sit.pt", record, model="SiT-Ti/2")
    return make_latents(folder / "set", 16, record), sit


def test_a_run_starts_from_a_checkpoint_and_resume_wins(data, tmp_path, capsys):
    latents, sit = data
    options = ("--init-from", sit, "--max-train-steps", 2, "--learning-rate", 1e-9, "--resume-step", -1)
    train.main(arguments(latents, tmp_path, *options))
    out = capsys.readouterr().out
    assert f"started from {sit}" in out and "new: interface." in out
    assert "new: interface." in (tmp_path / "run" / "log.txt").read_text()
    weights, state = torch.load(sit)["ema"]["0.9999"], final_state(tmp_path, 2)
    for kind in (state["model"], state["ema"]["0.9999"]):
        for key in weights:
            torch.testing.assert_close(kind[key], weights[key], rtol=0, atol=1e-7)  # the steps are of 1e-9
    assert state["config"]["init_from"] == str(sit) and state["optimizer"]["state"][0]["step"] == 2
    # Goes on, and does not look for it.
    options = ("--init-from", "gone.pt", "--max-train-steps", 4, "--learning-rate", 1e-9, "--resume-step", -1)
    train.main(arguments(latents, tmp_path, *options))
    assert "started from" not in capsys.readouterr().out
    assert final_state(tmp_path, 4)["step"] == 4


def test_what_cannot_be_started_from_is_one_line(data, tmp_path, capsys):
    latents, sit = data
    (tmp_path / "text.pt").write_text("nothing")
    for path, words in (
        ("nowhere.pt", ["nowhere.pt", "no such checkpoint"]),
        (tmp_path / "text.pt", ["text.pt", "not a checkpoint"]),
    ):
        line = runs.refused(train.main, capsys, arguments(latents, tmp_path / "out", "--init-from", path))
        assert all(word in line for word in words), line
    line = runs.refused(train.main, capsys, arguments(latents, tmp_path / "out", "--init-from", sit, model="SiT-S/2"))
    assert "sit.pt: has 8 blocks of width 192" in line and "12 blocks of width 384" in line
    assert not (tmp_path / "out").exists()
