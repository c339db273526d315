"""Fine-tuning of an interface in tiny transformers of diffusers."""

import errno
import json
import os
import shutil

import pytest
import runs
import torch
from diffusers_models import SHAPE, features, tiny, velocity
from runs import refused, train_on
from safetensors.torch import load_file, save_file

import finetune_diffusers
from common.tensor_files import safetensors_metadata
from elit_diffusers import ElasticTransformer, attach, finetuning, load
from elit_diffusers.families import FAMILIES

SHAPE_OPTIONS = ("--read-after", 1, "--write-after", 3, "--group-size", 2, "--min-budget", 0.25)
PRECISION = ("--dtype", "float32", "--mixed-precision", "no")
STEPS = ("--batch-size", 8, "--learning-rate", 2e-3, "--log-steps", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Transformers by class name, and `data`: two files of features and an empty prompt."""
    folder = tmp_path_factory.mktemp("diffusers")
    for name in FAMILIES:
        tiny(name).save_pretrained(folder / name)
    (folder / "data").mkdir()
    for i, count in enumerate((5, 7, 1)):
        tensors = features(count, seed=i + 1) | {"text_mask": torch.tensor([True, True, True, i < 2, False]).repeat(count, 1)}
        if i == 2:
            del tensors["latents"]
        save_file(tensors, folder / "data" / ("null.safetensors" if i == 2 else f"{i}.safetensors"))
    return folder


def finetune(folder, output, *options, name="QwenImageTransformer2DModel"):
    places = ("--transformer", folder / name, "--data-dir", folder / "data", "--output-dir", output)
    finetune_diffusers.main([str(a) for a in (*places, *SHAPE_OPTIONS, *PRECISION, *STEPS, *options)])
    return load_file(output / "elit.safetensors")


def distances(transformer, elastic):
    """The squared distance to the original's velocity at every budget."""
    with torch.no_grad():
        with elastic.original():
            original = velocity(transformer, 8)
        found = []
        for elastic.budget in (0.25, 0.5, 0.75, 1):
            found.append((velocity(transformer, 8) - original).square().mean().item())
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_it_comes_nearer_to_the_original_at_every_budget(folder, tmp_path, name):
    transformer = tiny(name)
    torch.manual_seed(0)
    elastic = attach(transformer, 1, 3, 2)
    before = distances(transformer, elastic)
    elastic.detach()
    weights = finetune(folder, tmp_path, "--max-train-steps", 30, name=name)
    assert all(key.startswith("elit.") for key in weights)
    after = distances(transformer, load(transformer, tmp_path / "elit.safetensors"))
    assert all(b < 0.9 * a for a, b in zip(before, after, strict=True)), (before, after)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["budget"] for line in lines} == {0.25, 0.5, 0.75, 1} and len(lines) == 30
    for budget in (0.25, 1):
        losses = [line["distill_loss"] for line in lines if line["budget"] == budget]
        assert losses[-1] < losses[0]


def test_an_interrupted_run_continues_as_if_nothing_had_been(folder, tmp_path, capsys):
    more = ("--train", "all", "--gradient-checkpointing", "--checkpointing-steps", 2)
    whole = finetune(folder, tmp_path / "a", *more, "--max-train-steps", 4)
    finetune(folder, tmp_path / "b", *more, "--max-train-steps", 2)
    resumed = finetune(folder, tmp_path / "b", *more, "--max-train-steps", 4)
    assert "continuing after step 2" in capsys.readouterr().out
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)
    original = tiny("QwenImageTransformer2DModel")
    weights = dict(original.named_parameters())
    moved = {k for k, v in weights.items() if not torch.equal(v, whole[k])}
    assert "transformer_blocks.0.attn.to_q.weight" in moved
    assert torch.equal(velocity(original), velocity(tiny("QwenImageTransformer2DModel")))
    load(original, tmp_path / "b" / "elit.safetensors")
    assert all(torch.equal(v, whole[k]) for k, v in original.state_dict().items())
    options = ("--transformer", folder / "QwenImageTransformer2DModel", "--data-dir", folder / "data")
    again = (*options, "--output-dir", tmp_path / "b", *SHAPE_OPTIONS, *PRECISION, *STEPS, *more)
    refused(finetune_diffusers.main, capsys, [*again, "--group-size", 4], "--group-size 4", "--group-size 2")


def test_what_does_not_fit(folder, tmp_path, capsys, monkeypatch):
    def check(*culprits, data=folder / "data", name=folder / "SD3Transformer2DModel", options=()):
        places = ("--transformer", name, "--data-dir", data, "--output-dir", tmp_path / "run")
        argv = [*places, *SHAPE_OPTIONS, *PRECISION, *STEPS, *options]
        refused(finetune_diffusers.main, capsys, argv, *culprits)
        assert not (tmp_path / "run").exists()

    def data(name, **tensors):
        (tmp_path / name).mkdir()
        tensors = {k: v for k, v in (features(8) | tensors).items() if v is not None}
        save_file(tensors, tmp_path / name / "a.safetensors")
        return tmp_path / name

    check("read_after 1", "write_after 9", "has 4 blocks", options=("--write-after", 9))
    check("--read-after 3", "less than --write-after 3", options=("--read-after", 3))
    check("--train all needs float32", options=("--train", "all", "--dtype", "bfloat16"))
    check("--group-size 3", "4×8 tokens", options=("--group-size", 3))
    check("--batch-size 13", "12 samples", options=("--batch-size", 13))
    check("no such folder", name=tmp_path / "none")
    (tmp_path / "none").mkdir()
    check("no configuration", name=tmp_path / "none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check("some/model: no such folder, and not to be had from the hub: ", "; give a folder", name="some/model")
    check("holds no .safetensors", data=tmp_path)
    check("--cfg-prob 0.1", "null.safetensors", data=data("without-null"))
    check("holds no text", data=data("without-text", text=None))
    check("text of 13 features; the transformer takes 12", data=data("wide", text=torch.zeros(8, 5, 13)))
    check("latents of 3 channels", "takes 4", data=data("channels", latents=torch.zeros(8, 3, *SHAPE[1:])))
    check("pooled of 0 features", data=data("without-pooled", pooled=None))
    check("latents is 8×4×8×16", "one row a sample", data=data("rows", text=torch.zeros(7, 5, 12)))
    check("latents is 8×4×8×16", data=data("number", text=torch.tensor(1.0)))
    check("text_mask is of 3 tokens, but text of 5", data=data("mask", text_mask=torch.ones(8, 3, dtype=torch.bool)))
    check("latents is of type U8", data=data("bytes", latents=torch.zeros(8, *SHAPE, dtype=torch.uint8)))
    check("latents of 8×64; the transformer has positions for 32×32", data=data("large", latents=torch.zeros(8, 4, 8, 64)))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.safetensors").write_bytes(b"no tensors")
    check("a.safetensors: cannot be read", data=tmp_path / "broken")
    (tmp_path / "other").mkdir()
    for named in ("UNet2DModel", ["SD3Transformer2DModel"]):
        (tmp_path / "other" / "config.json").write_text(json.dumps({"_class_name": named}))
        check(f"is a {named}; choose", name=tmp_path / "other")
    config = json.loads((folder / "QwenImageTransformer2DModel/config.json").read_text())
    shutil.copytree(folder / "QwenImageTransformer2DModel", tmp_path / "other", dirs_exist_ok=True)
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"num_layers": 5}))
    check("holds no weights for ", "of its parameters: transformer_blocks.", name=tmp_path / "other")


def test_values_that_are_not_finite_are_named(folder, tmp_path, capsys):
    for name, culprit in (("1.safetensors", "latents of sample 0 is not finite"), ("null.safetensors", "text is not finite")):
        data = shutil.copytree(folder / "data", tmp_path / name)
        tensors = load_file(data / name)
        tensors[culprit.split()[0]][0].fill_(float("nan"))
        save_file(tensors, data / name)
        places = ("--transformer", folder / "SD3Transformer2DModel", "--data-dir", data, "--output-dir", tmp_path / "run")
        argv = [*places, *SHAPE_OPTIONS, *PRECISION, *STEPS, "--max-train-steps", 2]
        refused(finetune_diffusers.main, capsys, argv, f"{data / name}: {culprit}")
        runs.reset_accelerate()


def test_two_processes_killed_once_train_as_one_does(folder, tmp_path):
    """Also by a smallest budget below one latent of a group, which is that one."""
    more = ("--max-train-steps", 4, "--checkpointing-steps", 2, "--min-budget", 0.01)
    whole = finetune(folder, tmp_path / "a", *more)
    places = (
        "--transformer",
        folder / "QwenImageTransformer2DModel",
        "--data-dir",
        folder / "data",
        "--output-dir",
        tmp_path / "b",
    )
    argv = [str(a) for a in (*places, *SHAPE_OPTIONS, *PRECISION, *STEPS, *more)]
    run = f"import finetune_diffusers; finetune_diffusers.main({argv!r}); raise SystemExit(0)"
    killed = (
        "import os; from elit_diffusers import finetuning; step = finetuning.Finetuning._train_step\n"
        "finetuning.Finetuning._train_step = lambda self, indices: os._exit(9) if self.step == 3 else step(self, indices)\n"
    )
    exits = train_on((2, [], killed + run), (2, [], run), imports=("diffusers", "elit_diffusers.finetuning"))
    assert [line for line in exits if line.replace(" ", "").isdigit()] == ["9 9", "0 0"]
    resumed = load_file(tmp_path / "b/elit.safetensors")
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-2, atol=2e-4)  # sums of another order
    lines = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in "ab"]
    assert [line["budget"] for line in lines[1]] == [line["budget"] for line in lines[0]]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4]


def test_a_run_killed_between_its_two_files_ends_with_both_of_the_last_step(folder, tmp_path, monkeypatch):
    more = ("--max-train-steps", 4, "--checkpointing-steps", 2)
    whole, writes = finetune(folder, tmp_path / "a", *more), []

    def dying(function):
        def wrapped(*args, **kwargs):
            writes.append(function)
            if len(writes) == 4:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "written_aside", dying(finetuning.written_aside))
        patch.setattr(ElasticTransformer, "save", dying(ElasticTransformer.save))
        with pytest.raises(KeyboardInterrupt):
            finetune(folder, tmp_path / "b", *more)
    (tmp_path / "b/state.pt.123.tmp").write_bytes(b"half")
    before = (tmp_path / "b/metrics.jsonl").read_bytes().splitlines()
    with (tmp_path / "b/metrics.jsonl").open("ab") as file:
        file.write(b'{"st')  # of a step that a kill cut short
    runs.reset_accelerate()
    resumed = finetune(folder, tmp_path / "b", *more)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert safetensors_metadata(tmp_path / "b/elit.safetensors")["step"] == "4"
    assert [json.loads(line)["step"] for line in (tmp_path / "b/metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    dropped = (tmp_path / "b/metrics.dropped.jsonl").read_bytes().splitlines()
    assert dropped == [*before[2:], b'{"st'] and [json.loads(line)["step"] for line in before] == [1, 2, 3, 4]
    assert not list((tmp_path / "b").glob("*.tmp"))


def test_a_full_disk_is_one_line(folder, tmp_path, monkeypatch, capsys):
    whole = finetune(folder, tmp_path / "a", "--max-train-steps", 2, "--checkpointing-steps", 1)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(finetuning.tensor_files.HashingFile, "_try", full)
        patch.setattr(finetuning, "append_line", full)
        with pytest.raises(SystemExit):
            finetune(folder, tmp_path / "b", "--max-train-steps", 2, "--checkpointing-steps", 1)
    lines = capsys.readouterr().err.splitlines()
    assert f"error: {tmp_path}/b/state.pt: cannot be written: No space left on device" in lines[-1]
    assert any(f"warning: {tmp_path}/b/metrics.jsonl: cannot be written: No space left" in line for line in lines)
    runs.reset_accelerate()
    finetune(folder, tmp_path / "b", "--max-train-steps", 2, "--checkpointing-steps", 1)
    (tmp_path / "b/elit.safetensors").unlink()
    runs.reset_accelerate()
    again = finetune(folder, tmp_path / "b", "--max-train-steps", 2, "--checkpointing-steps", 1)  # nothing is left to train
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_weights_that_are_not_finite_replace_none(folder, tmp_path, capsys, monkeypatch):
    kept, step = finetune(folder, tmp_path, "--max-train-steps", 1), finetuning.Finetuning._train_step

    def diverging(self, indices):
        losses = step(self, indices)
        with torch.no_grad():
            next(iter(self.trained.values())).fill_(float("nan"))
        return losses

    monkeypatch.setattr(finetuning.Finetuning, "_train_step", diverging)
    runs.reset_accelerate()
    with pytest.raises(SystemExit):
        finetune(folder, tmp_path, "--max-train-steps", 2)
    assert "the weights are not finite at step 2 and were not saved" in capsys.readouterr().err
    assert all(torch.equal(kept[k], v) for k, v in load_file(tmp_path / "elit.safetensors").items())
