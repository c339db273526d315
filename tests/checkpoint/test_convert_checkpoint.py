"""convert_checkpoint.py: the same model comes back in either format, and what it shows and refuses."""

import argparse
import os

import pytest
import runs
import torch
from runs import make_checkpoint

import convert_checkpoint
from checkpoint import reading, training_state
from common import tensor_files
from models.vae import SD_VAE, VAERecord

RECORD = VAERecord("some/vae", "0" * 64, 4, 4, 0.5, 0.0)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("ckpt") / "0000007.pt", RECORD)


def run(*argv):
    convert_checkpoint.main([str(a) for a in argv])


@pytest.mark.parametrize("out", ["out.pt", "folder/out.safetensors"])
@pytest.mark.parametrize("tag", ["sit", "elit"])
def test_a_published_checkpoint_keeps_its_outputs(golden_checkpoint, golden, tmp_path, tag, out):
    arrays, options = golden
    run(golden_checkpoint(tag), tmp_path / out, *(["--safetensors"] if out.endswith("safetensors") else []))
    model, config = reading.load_model(tmp_path / out)
    assert config["model"] == options[tag]["model"] and config["exp_name"] == "golden"
    found = reading.read_weights(tmp_path / out)
    assert (found.step, found.record) == (1000, SD_VAE)
    for budget in ("1.0", "0.25") if tag == "elit" else (None,):
        asked = {} if budget is None else {"inference_budget": float(budget)}
        velocity = model(*(arrays[f"{tag}_{k}"] for k in "xty"), **asked)
        wanted = arrays[f"{tag}_out" if budget is None else f"{tag}_out_{budget}"]
        torch.testing.assert_close(velocity, wanted, rtol=0, atol=1e-4)
    assert not list(tmp_path.rglob("*.tmp"))


def test_there_and_back_is_equal_to_the_bit(ckpt, tmp_path):
    run("--safetensors", ckpt, tmp_path / "a.safetensors")
    run(tmp_path / "a.safetensors", tmp_path / "b.pt")
    start, end = reading.read_weights(ckpt), reading.read_weights(tmp_path / "b.pt")
    assert start.record == end.record == RECORD and start.step == end.step == 7
    assert start.state_dict.keys() == end.state_dict.keys()
    assert all(torch.equal(start.state_dict[k], end.state_dict[k]) for k in start.state_dict)
    assert {k: end.config[k] for k, v in start.config.items() if v is not None}.items() <= end.config.items()
    assert (tmp_path / "b.pt.sha256").is_file()


def test_every_set_of_weights_is_kept_or_one_is_chosen(ckpt, tmp_path):
    state = tensor_files.load(ckpt)
    sets = {name: {k: v + n for k, v in state["model"].items()} for n, name in enumerate(("model", "0.9", "0.99"))}
    training_state.save(tmp_path / "in.pt", state | {"model": sets["model"], "ema": {d: sets[d] for d in ("0.9", "0.99")}})
    run(tmp_path / "in.pt", tmp_path / "all.pt")
    run(tmp_path / "in.pt", tmp_path / "one.pt", "--weights", "ema:0.99")
    run("--weights=model", tmp_path / "in.pt", "--safetensors", tmp_path / "raw.safetensors")
    for file, weights, wanted in (
        ("all.pt", "model", "model"),
        ("all.pt", "ema:0.9", "0.9"),
        ("all.pt", "ema:0.99", "0.99"),
        ("one.pt", "ema", "0.99"),
        ("one.pt", "model", "0.99"),
        ("raw.safetensors", "ema", "model"),
    ):
        found = reading.read_weights(tmp_path / file, weights).state_dict
        assert all(torch.equal(found[k], v) for k, v in sets[wanted].items()), (file, weights)


def test_a_bare_state_dict_takes_its_options_by_hand(golden_checkpoint, golden, tmp_path):
    arrays, _ = golden
    torch.save(torch.load(golden_checkpoint("elit"), weights_only=False)["ema"], tmp_path / "bare.pt")
    run("--model", "ELIT-SiT-S/2", tmp_path / "bare.pt", "--head_depth", 8, tmp_path / "out.pt", "--elit-tail=skip")
    for weights in ("ema", "model"):
        model, config = reading.load_model(tmp_path / "out.pt", weights)
        assert config["head_depth"] == 8 and config["elit_tail"] == "skip"
        velocity = model(*(arrays[f"elit_{k}"] for k in "xty"), inference_budget=0.75)
        torch.testing.assert_close(velocity, arrays["elit_out_0.75"], rtol=0, atol=1e-4)


def test_show_tells_what_is_in_a_file(ckpt, golden_checkpoint, tmp_path, capsys):
    run("--show", ckpt)
    said = capsys.readouterr().out
    count = sum(p.numel() for p in reading.load_model(ckpt)[0].parameters())
    for words in ("ema:0.9999", "ELIT-SiT-Ti/2", "step        7", "some/vae", "elit_group_size=2", f"{count:,} in",
                  "blocks.{0…7}.attn.qkv.weight  576×192  float32"):  # fmt: skip
        assert words in said, words
    run(golden_checkpoint("sit"), "--show")
    said = capsys.readouterr().out
    assert "published" in said and "SiT-S/4" in said and "step        1000" in said and "final_layer.linear.weight" in said
    run(ckpt, tmp_path / "a.safetensors", "--safetensors", "--show")
    assert (tmp_path / "a.safetensors").is_file()
    torch.save({"x_embedder.proj.weight": torch.zeros(7, 4, 2, 2)}, tmp_path / "odd.pt")
    capsys.readouterr()
    run(tmp_path / "odd.pt", "--show")
    said = capsys.readouterr().out
    assert "not known" in said and "--model" in said and "7×4×2×2" in said


def refused(capsys, *argv):
    return runs.refused(convert_checkpoint.main, capsys, argv)


def test_bad_input_is_one_line_and_nothing_is_written(ckpt, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "there.pt").write_text("mine")
    torch.save({k: v for k, v in tensor_files.load(ckpt)["model"].items() if k != "pos_embed"}, tmp_path / "unsure.pt")
    for words, *argv in (
        (["IN OUT"],),
        (["IN --show"], ckpt),
        (["there.pt", "exists"], ckpt, tmp_path / "there.pt"),
        ([".safetensors"], ckpt, out / "a.pt", "--safetensors"),
        (["--safetensors"], ckpt, out / "a.safetensors"),
        (["nowhere.pt"], "nowhere.pt", out / "a.pt"),
        (["not a checkpoint"], tmp_path / "there.pt", out / "a.pt"),
        (["--weights ema:0.5", "ema:0.9999"], ckpt, out / "a.pt", "--weights", "ema:0.5"),
        (["--elit-group-size 4", "2"], ckpt, out / "a.pt", "--elit-group-size", 4),
        (["--resolution"], tmp_path / "unsure.pt", out / "a.pt"),
        (["b.pt"], ckpt, out / "a.pt", tmp_path / "b.pt"),
        (["cannot write", "there.pt"], ckpt, tmp_path / "there.pt" / "a.pt"),
        (["--weihgts", "--weights"], ckpt, out / "a.pt", "--weihgts", "ema"),
    ):
        line = refused(capsys, *argv)
        for word in words:
            assert word in line, (line, argv)
    assert not list(out.iterdir()) and (tmp_path / "there.pt").read_text() == "mine"


class Carrier:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_code_in_a_file_does_not_run(tmp_path, capsys):
    torch.save({"model": Carrier(tmp_path / "ran"), "args": argparse.Namespace()}, tmp_path / "evil.pt")
    assert "carries code" in refused(capsys, tmp_path / "evil.pt", tmp_path / "out.pt")
    assert "carries code" in refused(capsys, tmp_path / "evil.pt", "--show")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out.pt").exists()


def test_a_vae_by_hand_is_for_bare_state_dicts(ckpt, tmp_path, capsys):
    runs.refused(convert_checkpoint.main, capsys, (ckpt, tmp_path / "a.pt", "--vae", "mse"), "--vae mse", "made with some/vae")
