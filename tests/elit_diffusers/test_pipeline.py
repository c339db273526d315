"""ELITPipeline: generate.py's images to the bit, there and back, its card, and what it refuses."""

import json
import re

import huggingface_hub
import numpy as np
import pytest
import runs
import torch
from accelerate.state import PartialState
from PIL import Image
from runs import CLASSES, RESOLUTION, SIDE, make_checkpoint, make_vae

import convert_checkpoint
import generate
import models
from checkpoint import reading, training_state
from common.errors import UserError
from config.options import TrainConfig
from elit_diffusers import ELITPipeline
from models.elit import ELITMMDiT
from models.text_encoders import load_text_encoder

pytestmark = pytest.mark.slow
QUICK = {"num_inference_steps": 2, "output_type": "pil"}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def ckpt(record, tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("ckpt") / "0000007.pt", record, elit_min_mask_prob=0.0, elit_max_mask_prob=0.5
    )


@pytest.fixture(scope="module")
def pipe(ckpt):
    pipe = ELITPipeline.from_checkpoint(ckpt)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


def generated(folder, path, *options):
    generate.main([str(o) for o in ("--ckpt", path, "--sample-dir", folder, "--num-steps", 3, *options)])
    PartialState._reset_state()
    return pixels([Image.open(file) for file in sorted(folder.glob("*/*/*.png"))])


CASES = {
    "cheap": ({"budget": 0.5, "unconditional_budget": 0.25, "guidance_scale": 2.0}, ("--inference-budget", 0.5, "--unconditional-inference-budget", 0.25, "--cfg-scale", 2)),
    "sde": ({"mode": "sde", "guidance_low": 0.3, "budget": "0.25@1.0-0.5,1.0@0.5-0.0"}, ("--mode", "sde", "--guidance-low", 0.3, "--inference-budget", "0.25@1.0-0.5,1.0@0.5-0.0")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_images_are_those_of_generate(pipe, ckpt, tmp_path, case):
    called, given = CASES[case]
    expected = generated(
        tmp_path, ckpt, *given, "--class-labels", 3, 1, "--global-seed", 5, "--num-fid-samples", 4, "--per-proc-batch-size", 4
    )
    images = pipe(class_labels=[3, 1, 3, 1], seed=5, num_inference_steps=3, **called).images
    assert images[0].size == (RESOLUTION, RESOLUTION) and np.array_equal(pixels(images), expected)
    (one,) = pipe(class_labels=3, seed=5, indices=[2], num_inference_steps=3, return_dict=False, **called)
    assert np.array_equal(pixels(one)[0], expected[2])
    floats = pipe(class_labels=[3, 1, 3, 1], seed=5, num_inference_steps=3, output_type="np", **called).images
    assert np.array_equal((floats * 255).round().astype(np.uint8), expected)


def test_a_dfm_model(record, tmp_path):
    path = make_checkpoint(tmp_path / "dfm.pt", record, model="DFM-SiT-Ti/2", num_steps_per_scale=[1, 1])
    pipe, calls = ELITPipeline.from_checkpoint(path), []
    pipe.set_progress_bar_config(disable=True)
    expected = generated(tmp_path, path, "--class-labels", 4, "--num-fid-samples", 1, "--cfg-scale", 1)
    images = pipe(4, seed=0, guidance_scale=1.0, callback_on_step_end=lambda *call: calls.append(call[1:])).images
    assert np.array_equal(pixels(images), expected)
    assert [(step, round(t, 6)) for step, t, _ in calls] == [(0, 1.0), (1, 1.0)]
    with pytest.raises(UserError, match="num_inference_steps: has no effect"):
        pipe(4, num_inference_steps=3)


def test_there_and_back(ckpt, record, tmp_path):
    pipe = ELITPipeline.from_checkpoint(ckpt, sampler={"guidance_scale": 3.0, "num_steps": 2})
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "saved")
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["_class_name"] == "ELITPipeline" and index["sampler"] == {"cfg_scale": 3.0, "num_steps": 2}
    again = ELITPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    first, second = (p(class_labels=[0, 1], seed=3).images for p in (pipe, again))
    assert np.array_equal(pixels(first), pixels(second))
    assert not np.array_equal(pixels(first), pixels(again(class_labels=[0, 1], seed=3, guidance_scale=1.0).images))
    assert (again.step, again.device.type, again.dtype) == (7, "cpu", torch.float32)
    found = reading.read_weights(tmp_path / "saved/transformer")  # what `--ckpt` makes of it
    assert found.record == record and found.config["model"] == "ELIT-SiT-Ti/2"
    half = ELITPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.dtype == torch.bfloat16 and half.vae.dtype == torch.bfloat16
    assert np.abs(pixels(half([0, 1], seed=3).images).astype(int) - pixels(first)).mean() < 8
    assert set(pipe.components) == {"transformer", "vae"}


def test_latents_normalised_by_channel_keep_their_statistics(record, tmp_path):
    own = record.to_dict() | {"channel_mean": [0.1, 0.2, 0.3, 0.4], "channel_std": [1.0, 2.0, 3.0, 4.0]}
    path = make_checkpoint(tmp_path / "ckpt.pt", type(record).from_dict(own))
    pipe = ELITPipeline.from_checkpoint(path)
    pipe.save_pretrained(tmp_path / "saved")
    again = ELITPipeline.from_pretrained(tmp_path / "saved")
    first, second = (p(1, seed=0, **QUICK).images for p in (pipe, again))
    assert np.array_equal(pixels(first), pixels(second))
    assert "channel_mean" not in json.loads((tmp_path / "saved/vae/config.json").read_text())


def test_the_card_tells_budgets_costs_and_figures(pipe, tmp_path, ckpt):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/sweep.md").write_text("fixed\n\n## All points\n\n| budget | FID |\n|---|---|\n| 1 | 9.87 |\n")
    convert_checkpoint.main([str(ckpt), str(tmp_path / "out"), "--to", "diffusers", "--figures", str(tmp_path / "sweep")])
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "### All points" in card and "| 1 | 9.87 |" in card
    for k, trained in ((1, False), (2, True), (3, True), (4, True)):
        gflops = models.count_flops(pipe.transformer, k / 4) / 1e9
        (row,) = [line for line in card.splitlines() if f"{k} of 4" in line]
        assert f"{gflops:.4g}" in row and ("not trained" not in row) == trained
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "README.md", "exec")
    assert 'from_pretrained("out")' in code and "budget=0.25" in code
    assert not list((tmp_path / "out").rglob("*.tmp"))
    ELITPipeline.from_pretrained(tmp_path / "out")


class Hub:
    """What push_to_hub asks of the hub."""

    def __init__(self, token=None):
        assert token == "secret"

    def create_repo(self, repo_id, private, exist_ok):
        if repo_id == "no/access":
            raise PermissionError("403 Forbidden\nfor url")
        assert private and exist_ok

    def upload_folder(self, repo_id, folder_path, commit_message, **more):
        Hub.kept = {p.relative_to(folder_path).as_posix(): p.read_bytes() for p in sorted(type(ROOT)(folder_path).rglob("*")) if p.is_file()}  # fmt: skip
        return f"https://hub/{repo_id}/{more['revision']}"


ROOT = runs.ROOT


def test_push_and_download(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert pipe.push_to_hub("me/digits", token="secret", private=True, revision="v1") == "https://hub/me/digits/v1"
    assert set(Hub.kept) >= {"README.md", "model_index.json", "transformer/model.safetensors", "transformer/config.json"}
    assert b'from_pretrained("me/digits")' in Hub.kept["README.md"]
    with pytest.raises(UserError, match=r"push_to_hub no/access: failed \(PermissionError: 403 Forbidden\)"):
        pipe.push_to_hub("no/access", token="secret", private=True)

    def download(name, allow_patterns, **options):
        assert options == {"revision": "v1"} and name == "me/digits"
        for file, content in Hub.kept.items():
            if any(re.fullmatch(pattern.replace(".", r"\.").replace("*", "[^/]*"), file) for pattern in allow_patterns):
                (tmp_path / "hub" / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "hub" / file).write_bytes(content)
        return tmp_path / "hub"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    again = ELITPipeline.from_pretrained("me/digits", revision="v1")
    assert np.array_equal(pixels(again(2, seed=1, **QUICK).images), pixels(pipe(2, seed=1, **QUICK).images))


@pytest.mark.parametrize(
    ("options", "evaluations", "forwards"),
    [({}, 3, 3), ({"budget": 1.0, "unconditional_budget": 0.5}, 3, 6), ({"heun": True, "guidance_scale": 1.0}, 5, 5)],
)
def test_progress(pipe, options, evaluations, forwards):
    calls, run = [], []
    hook = pipe.transformer.register_forward_hook(lambda *_: run.append(1))
    report = lambda p, step, t, kwargs: calls.append((p is pipe, step, round(t, 4), kwargs))  # noqa: E731
    pipe(0, num_inference_steps=3, seed=0, callback_on_step_end=report, **options)
    hook.remove()
    assert len(run) == forwards and [call[1] for call in calls] == list(range(evaluations))
    assert all(own and kwargs == {} for own, *_, kwargs in calls) and calls[0][2] == 1.0
    assert [t for _, _, t, _ in calls] == sorted((t for _, _, t, _ in calls), reverse=True)


def test_seeds(pipe):
    def draw(**options):
        return pixels(pipe(1, **QUICK, **options).images)

    one, other = (draw(generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert np.array_equal(one, other)
    generator = torch.Generator().manual_seed(3)
    assert np.array_equal(draw(generator=generator), one) and not np.array_equal(draw(generator=generator), one)
    torch.manual_seed(0)
    free = draw()
    assert not np.array_equal(draw(), free)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": [CLASSES]}, "class_labels 5: class ids of this model lie below 5"),
        ({"class_labels": [-1]}, "class_labels [-1]: must be whole numbers from 0 on"),
        ({"class_labels": ["dog"]}, "must be whole numbers from 0 on"),
        ({"class_labels": [1.7]}, "class_labels [1.7]: must be whole numbers from 0 on"),
        ({"class_labels": [True]}, "must be whole numbers from 0 on"),
        ({"class_labels": 1, "indices": [1.5]}, "indices [1.5]: must be whole numbers from 0 on"),
        ({"class_labels": 1, "indices": [-1]}, "indices [-1]: must be whole numbers from 0 on"),
        ({"class_labels": []}, "nothing to draw"),
        ({"prompt": "a dog"}, "conditioned on class labels; give class_labels alone"),
        ({"class_labels": 1, "budget": 0.1}, "--inference-budget: "),
        ({"class_labels": 1, "guidence_scale": 2}, "no option 'guidence_scale' of sampling (did you mean guidance_scale?)"),
        ({"class_labels": 1, "guidance_scale": 0.5}, "guidance_scale: 0.5 is out of range"),
        ({"class_labels": 1, "num_inference_steps": 0}, "num_inference_steps: 0 is out of range"),
        ({"class_labels": 1, "seed": -1}, "seed: -1 is out of range"),
        ({"class_labels": 1, "seed": 1, "generator": torch.Generator()}, "the one or the other"),
        ({"class_labels": [1, 2], "generator": [torch.Generator()] * 2}, "one torch.Generator"),
        ({"class_labels": [1, 2], "indices": [0]}, "1 of them for 2 image"),
        ({"class_labels": 1, "output_type": "jpg"}, "choose from pil, np, pt, latent"),
        ({"class_labels": 1, "mode": "sde", "heun": True}, "--heun"),
    ],
)
def test_bad_calls_are_one_line(pipe, options, message):
    with pytest.raises(UserError) as caught:
        pipe(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_folders_are_one_line(tmp_path, pipe, ckpt, capsys):
    for name, message in (
        (tmp_path / "none", "no such folder, and no name on the hub"),
        (tmp_path, "holds no model_index.json"),
        (tmp_path / "other", "is of a DiTPipeline, not of an ELITPipeline"),
        (tmp_path / "odd", "no option 'x' of sampling"),
    ):
        if name.name in ("other", "odd"):
            pipe.save_pretrained(name)
            index = json.loads((name / "model_index.json").read_text())
            changed = {"_class_name": "DiTPipeline"} if name.name == "other" else {"sampler": {"x": 1}}
            (name / "model_index.json").write_text(json.dumps(index | changed))
        with pytest.raises(UserError) as caught:
            ELITPipeline.from_pretrained(name)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        pipe.save_pretrained(tmp_path / "file")
    refused = convert_checkpoint.main
    runs.refused(refused, capsys, [ckpt, "--to", "diffusers"], "give the file to write")
    runs.refused(refused, capsys, [ckpt, "--show", "--to", "diffusers"], "give the folder to write")
    runs.refused(refused, capsys, [ckpt, tmp_path / "new", "--to", "onnx"], "choose from diffusers")
    runs.refused(refused, capsys, [ckpt, tmp_path / "new.pt", "--figures", tmp_path], "give --to diffusers too")
    runs.refused(refused, capsys, [ckpt, tmp_path / "new", "--to", "diffusers", "--figures", tmp_path], "figures", "sweep.md")
    runs.refused(refused, capsys, [ckpt, tmp_path, "--to", "diffusers"], "exists already")
    assert not (tmp_path / "new").exists()


def test_a_text_model(record, tmp_path, monkeypatch):
    known = dict(models.MODELS)
    monkeypatch.setattr(models, "MODELS", known)
    sizes = {"depth": 4, "hidden_size": 48, "num_heads": 2, "head_depth": 1, "tail_depth": 1}
    models.register("ELIT-MMDiT-Pipe/2", ELITMMDiT, text_width=7, **sizes)
    encoder = load_text_encoder("words", 5)
    config = TrainConfig(model="ELIT-MMDiT-Pipe/2", resolution=RESOLUTION, exp_name="made", elit_group_size=2, head_depth=1, tail_depth=1)  # fmt: skip
    text = encoder.record
    torch.manual_seed(0)
    net = models.create_model(
        config.model,
        input_size=SIDE,
        elit_group_size=2,
        arguments=ELITMMDiT.text_arguments(text.length, text.width, text.pooled),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    net.set_null_text(encoder.encode([""]).features[0])
    state = {"model": net.state_dict(), "ema": {"0.9999": net.state_dict()}, "optimizer": {}, "scheduler": {}, "scaler": None}
    path, told = tmp_path / "text.pt", {"step": 7, "config": vars(config), "vae": record.to_dict(), "text": text.to_dict()}
    training_state.save(path, state | told)
    pipe = ELITPipeline.from_checkpoint(path)
    prompts = ["a red dog", "two birds"]
    expected = generated(tmp_path / "out", path, "--prompt", *prompts, "--inference-budget", 0.5)
    options = {"seed": 0, "num_inference_steps": 3, "budget": 0.5}
    assert np.array_equal(pixels(pipe(prompt=prompts, **options).images), expected)
    pipe.save_pretrained(tmp_path / "saved")
    assert "pipeline_tag: text-to-image" in (tmp_path / "saved/README.md").read_text()
    again = ELITPipeline.from_pretrained(tmp_path / "saved")
    assert np.array_equal(pixels(again(prompt=prompts[0], **options).images)[0], expected[0])
    with pytest.raises(UserError, match="conditioned on text; give prompt alone"):
        pipe(class_labels=[1])


def test_numbers_of_other_libraries(pipe):
    expected = pixels(pipe([2], indices=[1], seed=0, **QUICK).images)
    for label, index in ((np.int64(2), np.int64(1)), (torch.tensor(2), torch.tensor([1])), (np.array([2]), [np.int32(1)])):
        assert np.array_equal(pixels(pipe(label, indices=index, seed=0, **QUICK).images), expected)


def test_what_from_checkpoint_does_not_know(ckpt):
    for name, words in (("resolutoin", "did you mean resolution?"), ("budget", "options of sampling: `sampler`")):
        with pytest.raises(UserError, match="from_checkpoint: no argument") as caught:
            ELITPipeline.from_checkpoint(ckpt, **{name: 1})
        assert words in str(caught.value)


def test_a_folder_written_again_is_none_until_it_is_whole(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("elit_diffusers.pipeline.model_card", lambda *_: "")
    pipe.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(pipe.vae, "save_pretrained", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match=r"holds no model_index\.json"):
        ELITPipeline.from_pretrained(tmp_path / "saved")
