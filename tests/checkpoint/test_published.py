"""Checkpoints that users bring: published, REPA, original SiT, safetensors; what is refused."""

import json

import pytest
import torch
from numerics import randomize
from runs import CLASSES, RESOLUTION, SIDE, make_vae

import models
from checkpoint import reading, weights
from common.errors import UserError


def small_sit(**options):
    return randomize(models.create_model("SiT-Ti/2", input_size=SIDE, num_classes=CLASSES, **options)).float().eval()


def batch():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 4, SIDE, SIDE, generator=generator)
    return x, torch.tensor([0.1, 0.5, 0.93]), torch.tensor([0, 3, CLASSES])


def saved(tmp_path, state, name="bare.pt"):
    torch.save(state, tmp_path / name)
    return tmp_path / name


def test_a_bare_state_dict_tells_its_architecture(tmp_path):
    model = small_sit(qk_norm=True)
    loaded, config = reading.load_model(saved(tmp_path, model.state_dict()))
    assert (
        config["model"] == "SiT-Ti/2" and config["resolution"] == 64 and config["num_classes"] == CLASSES and config["qk_norm"]
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded(*batch()), model(*batch()), rtol=0, atol=0)


def test_original_sit_runs_backwards_and_keeps_the_first_channels(tmp_path):
    """v(x, t) = −v_SiT(x, 1 − t), where v_SiT is the first C of its 2C output channels at each of the p² positions."""
    model = small_sit()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for kind in ("weight", "bias"):
        value = state[f"final_layer.linear.{kind}"].unflatten(0, (2, 2, 4))  # (p, p, C), to which C channels of variance come
        state[f"final_layer.linear.{kind}"] = torch.cat([value, torch.randn_like(value)], dim=2).flatten(0, 2)
    loaded, _ = reading.load_model(saved(tmp_path, state, "SiT-XL-2-256x256.pt"))
    x, t, y = batch()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, t, y), -model(x, 1 - t, y), rtol=0, atol=2e-5)


def test_old_repa_names_and_projectors(tmp_path):
    model = small_sit()
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith("blocks.") and int(key.split(".")[1]) >= 3:
            _, index, rest = key.split(".", 2)
            key = f"decoder_blocks.{int(index) - 3}.{rest}"
        state[key] = value
    state["projectors.0.0.weight"] = torch.zeros(2048, 192)
    loaded, _ = reading.load_model(saved(tmp_path, state, "last.pt"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(*batch()), model(*batch()), rtol=0, atol=0)


@pytest.mark.parametrize("budget", ["1.0", "0.25"])
def test_a_bare_elit_takes_its_head_by_hand(golden_checkpoint, golden, tmp_path, budget):
    arrays, _ = golden
    state = torch.load(golden_checkpoint("elit"), weights_only=False)["ema"]
    path = saved(tmp_path, state)
    found = reading.read_weights(path, given={"encoder_depth": 8})
    assert found.config["elit_group_size"] == 2 and found.config["elit_tail"] == "skip"
    model = weights.build_model(found, path)
    velocity = model(*(arrays[f"elit_{k}"] for k in "xty"), inference_budget=float(budget))
    torch.testing.assert_close(velocity, arrays[f"elit_out_{budget}"], rtol=0, atol=1e-4)
    head = reading.read_weights(path, given={"head_depth": 4}).config["head_depth"]
    assert head == 4


def small_elit():
    options = {"elit_group_size": 2, "elit_read_depth": 2, "elit_tail": "skip", "head_depth": 2, "tail_depth": 1}
    return randomize(models.create_model("ELIT-SiT-Ti/2", input_size=SIDE, num_classes=CLASSES, **options)).float().eval()


def assert_same_model(path, model, **options):
    """The file gives this model: by hand from Python, and as a script reads it."""
    found = reading.read_weights(path, given=options)
    loaded = [reading.load_model(path, **options)[0], weights.build_model(found, path)]
    for budget in (None, 0.25):
        for other in loaded:
            torch.testing.assert_close(other(*batch(), budget), model(*batch(), budget).detach(), rtol=0, atol=0)
    return found.config


@pytest.mark.parametrize("name", ["bare.pt", "bare.safetensors"])
def test_a_bare_elit_under_our_names(tmp_path, name):
    from safetensors.torch import save_file

    model = small_elit()
    (save_file if name.endswith("safetensors") else torch.save)(model.state_dict(), tmp_path / name)
    config = assert_same_model(tmp_path / name, model, head_depth=2, tail_depth=1, elit_tail="skip")
    wanted = {
        "model": "ELIT-SiT-Ti/2",
        "num_classes": CLASSES,
        "elit_group_size": 2,
        "elit_read_depth": 2,
        "elit_write_depth": 1,
    }
    assert wanted.items() <= config.items()
    for options, missing in (
        ({}, "--head-depth, --tail-depth, --elit-tail"),
        ({"head_depth": 2, "tail_depth": 1}, "tell --elit-tail;"),
    ):
        with pytest.raises(UserError, match=missing):
            reading.read_weights(tmp_path / name, given=options)


def test_a_pretrained_folder_needs_no_options(tmp_path):
    model, folder = small_elit(), tmp_path / "model"
    model.save_pretrained(folder)
    for path in (folder, folder / "model.safetensors"):
        config = assert_same_model(path, model)
        assert (config["head_depth"], config["elit_tail"]) == (2, "skip")
    (folder / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json"):
        reading.load_model(folder)


def test_the_vae_of_a_bare_state_dict_is_given_by_hand(tmp_path):
    record = make_vae(tmp_path / "vae")  # of factor 4, where SD's is 8
    path = saved(tmp_path, small_sit().state_dict())
    found = reading.read_weights(path, given={"vae": str(tmp_path / "vae")})
    assert found.config["resolution"] == RESOLUTION and found.record.downsample_factor == record.downsample_factor
    assert weights.build_model(found, path).input_size == SIDE
    with pytest.raises(UserError, match=r"3 channels.*--vae"):
        reading.read_weights(saved(tmp_path, small_sit(in_channels=3).state_dict()))


def test_safetensors_with_and_without_configuration(tmp_path):
    from safetensors.torch import save_file

    model = small_sit()
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    config = {"model": "SiT-Ti/2", "resolution": 64, "num_classes": CLASSES, "exp_name": "kept"}
    metadata = {"config": json.dumps(config), "vae": json.dumps(weights.SD_VAE.to_dict()), "step": "12"}
    save_file(model.state_dict(), tmp_path / "whole.safetensors", metadata)
    for name in ("bare", "whole"):
        loaded, _ = reading.load_model(tmp_path / f"{name}.safetensors")
        with torch.no_grad():
            torch.testing.assert_close(loaded(*batch()), model(*batch()), rtol=0, atol=0)
    found = reading.read_weights(tmp_path / "whole.safetensors")
    assert found.step == 12 and found.config["exp_name"] == "kept"


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"x": torch.zeros(2)}, "not a checkpoint of a SiT"),
    ],
)
def test_other_models_are_refused(tmp_path, state, words):
    with pytest.raises(UserError, match=words):
        reading.load_model(saved(tmp_path, state))


def test_what_a_state_dict_does_not_tell_is_asked_for(tmp_path):
    state = small_sit().state_dict()
    del state["pos_embed"]
    with pytest.raises(UserError, match="--resolution"):
        reading.read_weights(saved(tmp_path, state))
    deep = {k: v for k, v in small_sit().state_dict().items() if not k.startswith("blocks.7.")}
    with pytest.raises(UserError, match="--model"):
        reading.read_weights(saved(tmp_path, deep))
    wide = small_sit().state_dict() | {"blocks.2.mlp.fc3.weight": torch.zeros(3)}
    with pytest.raises(UserError, match=r"fc3.weight is unknown"):
        reading.load_model(saved(tmp_path, wide))
    with pytest.raises(UserError, match="--model SiT-S/2"):
        reading.read_weights(saved(tmp_path, small_sit().state_dict()), given={"model": "SiT-S/2"})


def test_hub_paths(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def fetch(repository, file):
        calls.append((repository, file))
        return str(saved(tmp_path, small_sit().state_dict()))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    _, config = reading.load_model("hf://someone/elit/folder/sit.pt")
    assert calls == [("someone/elit", "folder/sit.pt")] and config["model"] == "SiT-Ti/2"
    with pytest.raises(UserError, match="hf://owner/repo/file"):
        reading.load_model("hf://someone/elit")
    calls.clear()
    model, pushed = small_elit(), tmp_path / "pushed"
    model.save_pretrained(pushed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, file: calls.append(file) or str(pushed / file))
    assert reading.load_model("hf://someone/elit/model.safetensors")[1]["head_depth"] == 2
    assert set(calls) == {"model.safetensors", "config.json"}
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"hf://someone/elit/sit\.pt"):
        reading.load_model("hf://someone/elit/sit.pt")
