"""Published U-ViT, HDiT (k-diffusion) and MM-DiT (SD3, REPA) files, by the golden outputs of their programs; folders of `save_pretrained`."""

import argparse
import json

import pytest
import runs
import torch
from golden_cases import arrays, case, mmdit_arguments, randomized_hdit, weights
from numerics import randomize
from safetensors.torch import save_file

import convert_checkpoint
import elit_ccfg_inference
import elit_multibudget_inference
import generate
import models
from checkpoint import reading
from checkpoint.init_from import init_from
from checkpoint.weights import build_model
from common.errors import UserError
from config.options import TrainConfig
from models.conditioning import Text
from models.layers import sincos_position_embedding

UVIT = ["uvit_class", "uvit_conv_odd", "uvit_uncond", "uvit_t2i"]


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    """The golden cases' sizes, registered: U-ViT-Class/2, …, and MMDiT-Sd3/2, …."""
    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))
    for tag in UVIT:
        kw = case(tag)["kw"]
        size = {"depth": kw["depth"], "hidden_size": kw["embed_dim"], "num_heads": kw["num_heads"]}
        name = f"U-ViT-{tag.removeprefix('uvit_').title()}/{kw['patch_size']}"
        models.register(name, models.UViT, **size)
        models.register(f"ELIT-{name}", models.ELITUViT, **size, head_depth=1, tail_depth=1)
    for tag in ("mmdit_repa", "mmdit_sd3", "mmdit_sd35_x"):
        arguments = mmdit_arguments(tag)
        size = {name: arguments[name] for name in ("depth", "hidden_size", "num_heads")}
        models.register(f"MMDiT-{tag.removeprefix('mmdit_').title()}/2", models.MMDiT, **size, text_width=768)
    spec = models.model_spec("MMDiT-S/2")
    for name in [name for name in models.MODELS if name.startswith("MMDiT-") and name[6] in "RS" and len(name) > 9]:
        models.MODELS[name] = models.ModelSpec(name, "MMDiT", models.MMDiT, models.MODELS[name].sizes, spec.qk_norm)


def saved(tmp_path, state, name="theirs.pth"):
    torch.save(state, tmp_path / name)
    return tmp_path / name


def uvit_inputs(tag):
    data = arrays(tag)
    return data["x"], data["timesteps"] / 1000, Text(data["context"]) if "context" in data else data.get("y")


# ------------------------------------------------------------------------------------------------------------- U-ViT


@pytest.mark.parametrize(
    ("tag", "resolution"), [("uvit_class", 128), ("uvit_conv_odd", 160), ("uvit_uncond", 6), ("uvit_t2i", 96)]
)
def test_a_published_uvit_gives_its_numbers(tmp_path, tag, resolution):
    path, data = saved(tmp_path, weights(tag)), arrays(tag)
    # Of text, not of CLIP's length, and image the table of positions tells the sum alone.
    model, config = reading.load_model(path, **({"resolution": resolution} if tag == "uvit_t2i" else {}))
    torch.testing.assert_close(model(*uvit_inputs(tag)), data["out"], rtol=0, atol=5e-5)
    assert config["model"].startswith("U-ViT-") and config["resolution"] == resolution
    assert config["predicts"] == "noise" and config.get("num_classes") == (10 if "y" in data else None)
    out = tmp_path / "ours.pt"
    convert_checkpoint.main([str(path), str(out), "--resolution", str(resolution)])
    again, recorded = reading.load_model(out)
    torch.testing.assert_close(again(*uvit_inputs(tag)), model(*uvit_inputs(tag)), rtol=0, atol=1e-5)
    assert {name: recorded[name] for name in config} == config


def test_a_size_that_is_not_registered_can_be_given_from_python(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "MODELS", {k: v for k, v in models.MODELS.items() if "-Class/" not in k and "-T2I/" not in k})
    path = saved(tmp_path, weights("uvit_class"))
    with pytest.raises(UserError, match="a published U-ViT of depth 4 and width 64, which predicts noise"):
        reading.load_model(path)
    model, _ = reading.load_model(path, model="UViT-S/2", depth=4, hidden_size=64, num_heads=4)
    torch.testing.assert_close(model(*uvit_inputs("uvit_class")), arrays("uvit_class")["out"], rtol=0, atol=5e-5)


def test_text_of_a_uvit_has_the_length_of_clip_or_what_the_resolution_leaves(tmp_path):
    state = weights("uvit_t2i")
    with pytest.raises(UserError, match=r"how many of its 43 tokens are text; give --resolution"):
        reading.load_model(saved(tmp_path, state))
    state["pos_embed"] = torch.zeros(1, 1 + 77 + 16, 64)
    assert reading.load_model(saved(tmp_path, state))[1]["arguments"]["text"] == [77, 24]


def test_noise_predictors_start_runs_and_are_not_sampled_from(tmp_path, capsys):
    path = saved(tmp_path, weights("uvit_class"))
    found = reading.read_weights(path)
    name = "ELIT-U-ViT-Class/2"
    model = models.create_model(name, input_size=16, num_classes=10, elit_group_size=2, final_conv=False)
    config = vars(TrainConfig(model=name, resolution=128, num_classes=10, exp_name="a"))
    made = init_from(found, model, config, path)
    assert "what it predicts noise → velocity" in made.summary()
    assert {k.split(".")[0] for k in made.new} == {"interface"} and not made.left and not made.changed
    convert_checkpoint.main([str(path), str(tmp_path / "ours.pt")])
    count = sum(p.numel() for p in reading.load_model(path)[0].parameters())  # of which the table of positions is one
    for ckpt in (path, tmp_path / "ours.pt"):
        convert_checkpoint.main([str(ckpt), "--show"])
        assert f"parameters  {count:,} in 67 tensors" in capsys.readouterr().out
        line = runs.refused(generate.main, capsys, ["--ckpt", ckpt, "--sample-dir", tmp_path / "out"])
        assert f"--ckpt {ckpt}: holds a published U-ViT-Class/2, which predicts noise, on the path of Stable" in line
    for tool in (elit_ccfg_inference, elit_multibudget_inference):
        line = runs.refused(tool.main, capsys, ["--ckpt", path, "--class-label", 1, "--output-dir", tmp_path / "out"])
        assert "which predicts noise" in line and "--init-from" in line
    assert not (tmp_path / "out").exists()
    state = torch.load(tmp_path / "ours.pt")
    torch.save(state | {"config": state["config"] | {"predicts": "v"}}, path)
    with pytest.raises(UserError, match="predicts: must be one of noise, denoised"):
        reading.read_weights(path)


# -------------------------------------------------------------------------------------------------------------- HDiT


def hdit_config(tag):
    """The configuration that k-diffusion keeps beside the weights."""
    kw = case(tag)["kw"]
    model = {"type": "image_transformer_v2", "input_size": list(arrays(tag)["x"].shape[2:]), "patch_size": kw["patch_size"]}
    model |= {name: [level[name[:-1]] for level in kw["levels"]] for name in ("depths", "widths")}
    return {"model": model | {"self_attns": [level["attn"] for level in kw["levels"]]}}


@pytest.mark.parametrize("form", ["training", "slim"])
def test_k_diffusions_files_give_their_numbers(tmp_path, capsys, form):
    state, data, config = weights("hdit_na"), arrays("hdit_na"), hdit_config("hdit_na")
    if form == "training":
        other = {k: v + 1 for k, v in state.items()}
        path = saved(tmp_path, {"config": config, "model": other, "model_ema": state, "opt": {}, "epoch": 3, "step": 4})
    else:
        path = tmp_path / "slim.safetensors"
        save_file(state, path, {"config": json.dumps(config, indent=4)})
    model, recorded = reading.load_model(path, model="HDiT-Ti/2")
    for loaded in (model, reading.load_model(convert(path, tmp_path / "ours.pt", "--model", "HDiT-Ti/2"))[0]):
        torch.testing.assert_close(loaded(data["x"], data["sigma"].log() / 4, data["y"]), data["out"], rtol=0, atol=1e-4)
    assert (recorded["resolution"], recorded["num_classes"], recorded["levels"]) == (256, 10, 3)
    line = runs.refused(generate.main, capsys, ["--ckpt", tmp_path / "ours.pt", "--sample-dir", tmp_path])
    assert "holds a published HDiT-Ti/2, which predicts denoised images under k-diffusion's preconditioning" in line
    with pytest.raises(
        UserError,
        match=r"a published HDiT of depth 2 and width 32, which predicts denoised images .* is no registered size; give --model",
    ):
        reading.load_model(path)


def convert(path, out, *options):
    convert_checkpoint.main([str(path), str(out), *options])
    return out


def as_k_diffusion(model):
    """The state dict of a one- or two-level HDiT under k-diffusion's names, written out by their scheme."""
    depth = model.outer_depth
    names = [f"down_levels.0.{i}" for i in range(depth)]
    names += [f"mid_level.{i}" for i in range(len(model.blocks) - 2 * depth)] + [f"up_levels.0.{i}" for i in range(depth)]
    width = model.cond_dim
    state = {"aug_emb.weight": torch.zeros(width // 2, 9), "aug_in_proj.weight": torch.randn(width, width)}
    for key, value in model.state_dict().items():
        if key == "cond_bias":
            value.copy_(state["aug_in_proj.weight"][:, : width // 2].sum(dim=1))
        elif key.startswith("blocks."):
            _, i, rest = key.split(".", 2)
            state[f"{names[int(i)]}.{rest}"] = value
            state[f"{names[int(i)]}.self_attn.pos_emb.freqs"] = torch.zeros(1, 1)
        else:
            state[key] = value
    return state


@pytest.mark.parametrize(("name", "side", "channels"), [("HDiT-Ti/4", 128, 3), ("HDiT-Ti/1", 16, 4), ("HDiT-Ti/2", 64, 4)])
def test_a_bare_hdit_is_named_by_its_shapes(tmp_path, capsys, name, side, channels):
    model = models.create_model(name, input_size=side, in_channels=channels, num_classes=7, mapping_width=48, mapping_depth=2)
    randomized_hdit(model)
    path = saved(tmp_path, {f"inner_model.{k}": v for k, v in as_k_diffusion(model.float()).items()})
    with pytest.raises(UserError, match="does not tell the resolution; give --resolution"):
        reading.load_model(path)
    resolution = side * (1 if channels == 3 else 8)  # pixels, or Stable Diffusion's latents
    loaded, config = reading.load_model(path, resolution=resolution)
    assert (config["model"], config["num_classes"]) == (name, 7)
    assert config["arguments"] == {"mapping_depth": 2, "mapping_width": 48}
    batch = torch.randn(1, channels, side, side), torch.tensor([0.3]), torch.tensor([2])
    torch.testing.assert_close(loaded(*batch), model(*batch), rtol=0, atol=1e-6)
    convert_checkpoint.main([str(path), "--show", "--resolution", str(resolution)])
    shown = capsys.readouterr().out
    count = (
        sum(p.numel() for p in model.parameters()) - 48 + 48 * 48
    )  # there the bias is a matrix, of whose columns it is a sum
    assert f"parameters  {count:,} in" in shown and "predicts    denoised" in shown and "mapping_width=48" in shown


# ------------------------------------------------------------------------------------------------------------ MM-DiT


def test_sd3_reads_the_table_that_it_holds(tmp_path, capsys):
    data, prefix = arrays("mmdit_sd3"), "model.diffusion_model."
    table = sincos_position_embedding(128, (12, 12))[None]
    state = {prefix + k: v.half() for k, v in (weights("mmdit_sd3") | {"pos_embed": table}).items()}
    pipeline = {
        "first_stage_model.decoder.conv_in.weight": torch.ones(2, 2),
        "text_encoders.clip_l.position_ids": torch.arange(3),
    }
    save_file(state | pipeline, tmp_path / "sd3.safetensors")
    with pytest.raises(UserError, match="for images of any size; give --resolution"):
        reading.load_model(tmp_path / "sd3.safetensors")
    model, config = reading.load_model(tmp_path / "sd3.safetensors", resolution=128)
    assert config["model"] == "MMDiT-Sd3/2" and "predicts" not in config
    assert config["arguments"] == {"text_width": 24, "pooled_width": 20, "pos_grid": [12, 12], "time_scale": 1000.0}
    text = Text(data["context"], data["pooled"])
    out = model.float()(data["x"], data["t"] / 1000, text)
    torch.testing.assert_close(out, data["out"], rtol=0, atol=2e-2)  # of weights in half precision
    half = state | {prefix + "pos_embed": state[prefix + "pos_embed"].flip(1)}
    save_file(half, tmp_path / "moved.safetensors")
    moved = reading.load_model(convert(tmp_path / "moved.safetensors", tmp_path / "moved.pt", "--resolution", "128"))[0].float()
    assert (moved(data["x"], data["t"] / 1000, text) - out).abs().max() > 0.1
    convert_checkpoint.main([str(tmp_path / "sd3.safetensors"), "--show", "--resolution", "128"])
    count = sum(p.numel() for p in model.parameters())
    assert f"parameters  {count:,} in {len(state)} tensors" in capsys.readouterr().out
    line = runs.refused(generate.main, capsys, ["--ckpt", tmp_path / "moved.pt", "--sample-dir", tmp_path])
    assert "MMDiT-Sd3/2, which is conditioned on text" in line


def test_sd35_tells_its_norms_and_second_attentions(tmp_path):
    state = weights("mmdit_sd35_x") | {"pos_embed": sincos_position_embedding(192, (12, 12), 3.0)[None]}
    found = reading.read_weights(saved(tmp_path, state), given={"resolution": 64})
    assert found.config["model"] == "MMDiT-Sd35_X/2" and found.config["qk_norm"] is True
    assert found.config["arguments"]["dual_attention"] == [0, 1]
    assert build_model(found, "sd35.pt").positions().shape == (1, 16, 192)
    del state["pos_embed"]
    with pytest.raises(UserError, match="pos_embed is missing"):
        reading.read_weights(saved(tmp_path, state), given={"resolution": 64})


def test_repa_makes_its_table_itself(tmp_path):
    data = arrays("mmdit_repa")
    args = argparse.Namespace(resolution=256, path_type="linear", encoder_depth=2, qk_norm=True, exp_name="t2i", prediction="v")
    state = {"model": weights("mmdit_repa"), "ema": weights("mmdit_repa"), "args": args, "steps": 5}
    found = reading.read_weights(saved(tmp_path, state, "0000005.pt"))
    assert (found.step, found.config["resolution"], found.config["qk_norm"]) == (5, 256, False)
    model = build_model(found, "repa.pt")
    torch.testing.assert_close(model(data["x"], data["t"], Text(data["context"])), data["out"], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- ours


@pytest.mark.parametrize(
    ("name", "side", "options"),
    [
        ("ELIT-U-ViT-Ti/2", 8, {"hidden_size": 96, "num_classes": 5}),
        ("ELIT-HDiT-Ti/2", 32, {"levels": 2, "inner_width": 64, "num_classes": 5}),
        ("ELIT-HDiT-Ti/1", 16, {"levels": 2, "attentions": [("shifted-window", 4), ("global",)], "num_classes": 5}),
        ("ELIT-SiT-UViT-Ti/2", 8, {"num_classes": 5}),
        ("ELIT-SiT-HDiT-Ti/2", 8, {"hidden_size": 48, "elit_tail": "skip", "num_classes": 5}),
        ("SiT-Ti/2", 8, {"hidden_size": 48, "rotary": True, "qk_norm": "rms", "num_classes": 5}),
        ("ELIT-MMDiT-Ti/2", 8, {"hidden_size": 48, "qk_norm": True, "text_width": 6, "text_length": 3, "pooled_width": 7}),
        ("MMDiT-XL/2", 8, {"depth": 2, "hidden_size": 64, "num_heads": 4, "text_width": 6, "pos_grid": (6, 6)}),
    ],
)
def test_folders_of_save_pretrained(tmp_path, name, side, options):
    model = models.create_model(name, input_size=side, **options)
    model = (randomized_hdit if "HDiT-Ti" in name and "SiT" not in name else randomize)(model).float().eval()
    model.save_pretrained(tmp_path / "folder")
    sizes = {"model": name} if {"hidden_size", "inner_width"} & options.keys() else {}
    batch = model.example_inputs(1)
    batch = (torch.randn_like(batch[0]), *batch[1:])
    budget = {"inference_budget": 0.25} if "ELIT" in name else {}
    out = convert(tmp_path / "folder", tmp_path / "ours.pt", *(["--model", name] if sizes else []))
    for loaded, config in (reading.load_model(tmp_path / "folder", **sizes), reading.load_model(out)):
        torch.testing.assert_close(loaded(*batch, **budget), model(*batch, **budget), rtol=1e-5, atol=1e-5)
        assert type(loaded) is type(model)
        assert config["model"] == name and "predicts" not in config


def test_arguments_that_no_model_has(tmp_path):
    model = models.create_model("U-ViT-Ti/2", input_size=8, num_classes=None)
    model.save_pretrained(tmp_path / "folder")
    state = torch.load(convert(tmp_path / "folder", tmp_path / "ours.pt"))
    assert state["config"]["arguments"] == {"num_classes": None}
    for arguments, words in (
        ({"depths": 3}, "U-ViT-Ti/2 has no argument 'depths'"),
        ([], "its arguments are not values by name"),
        ({"text": {}}, "text: what it records is no argument's value"),
        ({"depth": 10**9}, "depth: 1000000000 is recorded, but there are no weights for so many"),
        ({"num_heads": 0}, "no such model can be made"),
        ({"num_heads": "3"}, "no such model can be made"),
        ({"text": [3]}, "no such model can be made"),
    ):
        torch.save(state | {"config": state["config"] | {"arguments": arguments}}, tmp_path / "odd.pt")
        with pytest.raises(UserError, match=words):
            reading.load_model(tmp_path / "odd.pt")


def test_names_and_shapes_that_no_published_model_has(tmp_path):
    hdit, uvit = weights("hdit_na"), weights("uvit_class")
    for state, words in (
        (
            {k: v for k, v in hdit.items() if k != "aug_in_proj.weight"},
            "not the weights of a published HDiT: aug_in_proj.weight",
        ),
        (
            {k: v for k, v in hdit.items() if "mid_level.1.self_attn.qkv" not in k},
            "blocks.3.self_attn.qkv_proj.weight is missing",
        ),
        (uvit | {"in_blocks.x.norm1.weight": torch.zeros(3)}, "not the weights of a published U-ViT"),
        (uvit | {"pos_embed": torch.zeros(1, 9, 64)}, "positions of 7 tokens, which are no square"),
        (uvit | {"patch_embed.proj.weight": torch.zeros(64, 4, 2, 3)}, r"shape \(64, 4, 2, 3\)"),
        (uvit | {"label_emb.weight": torch.zeros(64)}, r"label_emb.weight has shape \(64,\)"),
        (uvit | {"in_blocks.99999.norm1.weight": torch.zeros(64)}, "there are no weights for"),
        ({"pos_embed": torch.zeros(1, 4, 8)}, "not a checkpoint of a SiT, U-ViT, HDiT, MM-DiT"),
    ):
        with pytest.raises(UserError, match=words):
            reading.load_model(saved(tmp_path, state), resolution=128)
    with pytest.raises(UserError, match=r"--model SiT-Ti/2: .* holds a U-ViT-Class/2"):
        reading.load_model(saved(tmp_path, uvit), model="SiT-Ti/2")
    with pytest.raises(UserError, match=r"resolution 64 contradicts .* records 128"):
        reading.load_model(saved(tmp_path, uvit), resolution=64)
