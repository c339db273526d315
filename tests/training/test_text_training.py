"""Text to image end to end: training on captions, resuming, several processes, and drawing from prompts."""

import json
from functools import partial

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from runs import RESOLUTION, SIDE, make_checkpoint, make_latents, make_vae, train_on
from sets import picture, save
from training_runs import arguments, assert_same_tensors, final_state, metrics

import convert_checkpoint
import dataset_tools
import elit_ccfg_inference
import elit_multibudget_inference
import generate
import models
import randomness
import samplers
import sweep
import train
import web_demo
from checkpoint import reading
from common import tensor_files
from common.errors import UserError
from data.captions import caption_of
from loss import drop_conditions
from models.conditioning import Text, condition_of
from models.elit import ELITMMDiT
from models.text_encoders import load_text_encoder
from models.uvit import UViT
from models.vae import decode
from randomness import epoch_order, training_draws
from samplers import Guidance, guided_velocity
from sampling import conditions, cost
from training import validation
from training.trainer import Trainer

COUNT, LENGTH, SEED = 12, 4, 3
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
CAPTIONS = [[f"{word} {noun}" for noun in ("fish", "birds", "cats")[: 1 + i % 3]] for i, word in enumerate(WORDS)]
SIZES = {"hidden_size": 48, "num_heads": 2}
MODEL, UVIT = "ELIT-MMDiT-Test/2", "U-ViT-Test/2"
REGISTER = f"import models; from models.elit import ELITMMDiT; models.register({MODEL!r}, ELITMMDiT, depth=4, head_depth=1, tail_depth=1, text_width=7, **{SIZES})"  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_models():
    known = dict(models.MODELS)
    models.register(MODEL, ELITMMDiT, depth=4, head_depth=1, tail_depth=1, text_width=7, **SIZES)
    models.register(UVIT, UViT, depth=2, **SIZES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "SAMPLE_STEPS", 1)
        patch.setattr(validation, "SAMPLE_IMAGES", 8)
        yield
    models.MODELS.clear()
    models.MODELS.update(known)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Latents and images with one to three captions each, and their features."""
    folder = tmp_path_factory.mktemp("text")
    data = make_latents(folder / "set", COUNT, make_vae(folder / "vae"))
    names = [f"00000/img{i:08d}.png" for i in range(COUNT)]
    for i, name in enumerate(names):
        save(data / "images" / name, picture(RESOLUTION, RESOLUTION, seed=i))
    (data / "images/captions.json").write_text(json.dumps({"captions": [*zip(names, CAPTIONS, strict=True)]}))
    encode(data)
    return data


def encode(data, *more, length=LENGTH):
    dataset_tools.main(["text", f"--source={data}", "--encoder=words", f"--length={length}", "--dtype=float32", *more])


def command(data, out, *more, model=MODEL):
    return arguments(data, out, "--seed", SEED, "--batch-size", 4, "--val-data-dir", data, *more, model=model)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of four steps, with what its forwards saw."""
    folder, seen = tmp_path_factory.mktemp("run"), []
    original = Trainer.forward

    def forward(self, batch):
        seen.append(condition_of(batch).features.clone())
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "forward", forward)
        train.main(command(data, folder, "--sampling-steps", 4))
    runs.reset_accelerate()
    return folder, seen


@pytest.fixture(scope="module")
def ckpt(whole):
    """Its last checkpoint, with weights that are far from zero."""
    path = whole[0] / "run/checkpoints/0000004.pt"
    state = tensor_files.load(path)
    torch.manual_seed(0)
    for name, value in state["ema"]["0.9999"].items():
        if not name.startswith("null"):
            value += 0.1 * torch.randn_like(value)
    torch.save(state, moved := path.with_name("moved.pt"))
    return moved


def features(*prompts):
    return load_text_encoder("words", LENGTH).encode(prompts).features


def test_the_caption_of_a_forward_belongs_to_seed_step_and_place(data, whole):
    folder, seen = whole
    for n, given in enumerate(seen):
        order = epoch_order(SEED, n // 3, COUNT)[n % 3 * 4 :][:4]
        texts = [CAPTIONS[i][caption_of(SEED, n, place, len(CAPTIONS[i]))] for place, i in enumerate(order)]
        assert torch.equal(given, features(*texts))
    record = json.loads((data / "text/text.json").read_text())
    state = final_state(folder)
    assert state["text"] == {k: record[k] for k in ("encoder", "sha256", "length", "width", "pooled", "padding")}
    assert torch.equal(state["model"]["null_text"], features("")[0])
    assert metrics(folder, "val_loss_budget_0.25").keys() == {1, 4}
    lines = (folder / "run/samples/captions.txt").read_text().splitlines()
    assert lines == [CAPTIONS[i % COUNT][0] for i in range(8)]
    assert (folder / "run/samples/0000004.png").is_file()

    model, _ = reading.load_model(folder / "run/checkpoints/0000004.pt")
    draws = training_draws(SEED, 0, range(64), (4, 2, 2))
    y = Text(torch.ones(64, LENGTH, 64))
    dropped = drop_conditions(model, y, draws, 0.3).features
    expected = torch.where((draws.label_drop < 0.3)[:, None, None], features("").expand(64, -1, -1), y.features)
    assert torch.equal(dropped, expected) and 0 < (dropped == 0).all(2).all(1).sum() < 40


def test_resume_and_two_processes_and_packed_text_give_the_same(data, whole, tmp_path, capsys):
    more = ("--max-train-steps", 3, "--checkpointing-steps", 3)
    train.main(command(data, tmp_path, *more))
    runs.reset_accelerate()
    train.main(command(data, tmp_path, "--resume-step", -1))
    state = final_state(whole[0])
    assert_same_tensors(final_state(tmp_path)["model"], state["model"])
    runs.reset_accelerate()

    encode(data, "--packed")
    try:
        assert train_on((2, command(data, tmp_path / "two"), REGISTER))[-1].split() == ["0", "0"]
    finally:
        for name in ("text.json", "text.bin", "text.idx", "null.npy"):
            (data / "packed" / name).unlink()
        (data / "packed").rmdir()
    for name, value in final_state(tmp_path / "two")["model"].items():
        torch.testing.assert_close(value, state["model"][name], rtol=1e-4, atol=1e-5)

    kept = (data / "text/text.json").read_text()
    sha256 = json.loads(kept)["sha256"]
    (data / "text/text.json").write_text(kept.replace(sha256, "0" * 64))
    try:
        runs.refused(train.main, capsys, command(data, tmp_path, "--resume-step", -1), "the run in", sha256, "0" * 64)
    finally:
        (data / "text/text.json").write_text(kept)


def drawn(out, ckpt, *more):
    """generate.py's images of a run, by number."""
    generate.main([str(a) for a in ("--ckpt", ckpt, "--sample-dir", out, "--num-steps", 2, "--cfg-scale", 3, *more)])
    runs.reset_accelerate()
    return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted(out.glob("**/*.png"))])


def test_prompts_are_encoded_once_and_images_go_round_them(data, ckpt, tmp_path, monkeypatch, capsys):
    prompts = ["five cats", "one fish in the deep blue sea"]
    (tmp_path / "prompts.txt").write_text("\n".join([*prompts, ""]))
    lists = ("--prompts", tmp_path / "prompts.txt")
    three = drawn(tmp_path / "a", ckpt, *lists, "--num-fid-samples", 3)
    assert (
        "1 prompt(s) are longer than the model's 4 tokens and were cut; of one, 'deep blue sea' is lost"
        in capsys.readouterr().err
    )
    (folder,) = (tmp_path / "a").glob("run/*-prompts-prompts")
    captions = json.loads((folder / "captions.json").read_text())["captions"]
    assert captions == [[f"{i:06d}.png", [prompts[i % 2]]] for i in range(3)]
    assert {"prompts_sha256", "text_encoder_sha256"} <= json.loads(folder.with_name(folder.name + ".json").read_text()).keys()
    with monkeypatch.context() as patch:
        patch.setattr(conditions, "load_text_encoder", lambda *_, **__: 1 / 0)  # they are in the cache
        two = drawn(tmp_path / "b", ckpt, "--prompt", *prompts)
    assert "'deep blue sea' is lost" in capsys.readouterr().err
    assert np.array_equal(two, three[:2]) and len(list((tmp_path / "b/run").glob("*-five_cats-????????"))) == 1
    runs.refused(generate.main, capsys, ["--ckpt", ckpt, "--sample-dir", tmp_path / "a", "--num-steps", 2, "--cfg-scale", 3,
                 *lists, "--num-fid-samples", 5, "--class-labels", 1], "conditioned on text; give --prompt or --prompts")  # fmt: skip
    (tmp_path / "prompts.txt").write_text("other")
    runs.refused(generate.main, capsys, ["--ckpt", ckpt, "--sample-dir", tmp_path / "a", "--num-steps", 2, "--cfg-scale", 3,
                 *lists], "holds images made with prompts_sha256")  # fmt: skip
    runs.reset_accelerate()

    # A data folder's first captions, from its features; and by a converted checkpoint.
    of_data = drawn(tmp_path / "c", ckpt, "--prompts", data)
    convert_checkpoint.main([str(ckpt), str(tmp_path / "ema.safetensors"), "--safetensors"])
    by_words = drawn(tmp_path / "d", tmp_path / "ema.safetensors", "--prompt", *(texts[0] for texts in CAPTIONS))
    assert len(of_data) == COUNT and np.array_equal(of_data, by_words)
    assert (of_data[0] != drawn(tmp_path / "e", ckpt, "--prompt", "another")[0]).any()


def test_guidance_with_text_is_the_formula(ckpt):
    model, _ = reading.load_model(ckpt)
    text, null, x = features("one fish", "two birds"), features("").expand(2, -1, -1), torch.randn(2, 4, 8, 8).double()

    def velocity(words, budget):
        return model(x.float(), torch.full((2,), 0.4), Text(words), inference_budget=budget).double()

    for guidance, low in (
        (Guidance(cfg_scale=2.5, inference_budget=0.5), velocity(null, 0.5)),
        (Guidance(cfg_scale=2.5, unconditional_inference_budget=0.25), velocity(null, 0.25)),
        (Guidance(cfg_scale=2.5, unconditional_inference_budget=0.25, autoguidance=True), velocity(text, 0.25)),
        (Guidance(cfg_scale=2.5, guide=model, guide_label="none"), velocity(null, None)),
    ):
        high = velocity(text, guidance.inference_budget)
        with torch.no_grad():
            found = guided_velocity(model, x, 0.4, Text(text), guidance)
        torch.testing.assert_close(found, low + 2.5 * (high - low), rtol=1e-4, atol=1e-5)
        assert (high - low).abs().max() > 1e-3


def test_every_way_of_sampling_takes_prompts(data, ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "WARM_UP", 0)
    monkeypatch.setattr(cost, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(cost, "MOST_ROUNDS", 2)
    for module, names_of_plots in (
        (elit_ccfg_inference, ("bar_plot",)),
        (elit_multibudget_inference, ("labelled_grid", "line_plot", "attention_maps")),
    ):
        for name in names_of_plots:
            monkeypatch.setattr(module, name, lambda *_, **__: None)
    names: list[str] = []
    monkeypatch.setattr(elit_ccfg_inference, "labelled_grid", lambda grid, rows, *_, **__: names.extend(rows))
    monkeypatch.setattr(sweep.plots, "write_plots", lambda *_: [])
    prompts = ("--prompt", "one fish", "two birds")
    schedule = ("--inference-budget", "0.25@1.0-0.5,1.0@0.5-0.0", "--unconditional-inference-budget", 0.25)
    assert len(drawn(tmp_path / "a", ckpt, *prompts, *schedule, "--core-cache", 0.2)) == 2
    assert len(drawn(tmp_path / "b", ckpt, *prompts, "--guide-ckpt", ckpt, "--guide-budget", 0.25)) == 2
    tool = ("--ckpt", ckpt, *prompts, "--num-steps", 2, "--output-dir")
    elit_multibudget_inference.main([str(a) for a in (*tool, tmp_path / "m", "--budgets", 0.25, 1, "--attention")])
    assert json.loads((tmp_path / "m/attention.json").read_text())["prompts"] == list(prompts[1:])
    uncond = ("--cfg-scales", 2, "--unconditional-inference-budget", 0.25)
    elit_ccfg_inference.main([str(a) for a in (*tool, tmp_path / "c", *uncond)])
    assert names[0] == "one fish\nCFG" and names[-1] == "two birds\nautoguidance"
    np.savez(tmp_path / "ref.npz", arr_0=np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8))
    more = ("--num-fid-samples", 5, "--features", "runs:colour_features", "--inference-budget", 0.25, 1, "--keep-images", 3)
    options = ("--ckpt", ckpt, "--ref", tmp_path / "ref.npz", "--dest", tmp_path / "s", *prompts, "--num-steps", 2, *more)
    sweep.main([str(a) for a in (*options, "--metrics", "fid", "--cfg-scale", 3)])
    runs.reset_accelerate()
    cells = {path.stem: json.loads(path.read_text())["options"] for path in (tmp_path / "s/cells").glob("*.json")}
    (full,) = (key for key, told in cells.items() if told["inference_budget"] is None)
    assert len(cells) == 2 and "class_labels" not in cells[full]
    kept = [np.asarray(Image.open(tmp_path / f"s/images/{full}/{i:06d}.png")).astype(int) for i in range(3)]
    assert np.array_equal(kept, drawn(tmp_path / "g", ckpt, *prompts, "--num-fid-samples", 5)[:3])


def test_u_vit_with_text(data, tmp_path):
    train.main(command(data, tmp_path, "--condition", "text", "--max-train-steps", 2, model=UVIT))
    runs.reset_accelerate()
    state = final_state(tmp_path, 2)
    assert state["model"]["context_embed.weight"].shape == (48, 64) and state["config"]["condition"] == "text"
    assert len(drawn(tmp_path, tmp_path / "run/checkpoints/0000002.pt", "--prompt", "one fish")) == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), ["0000004.pt", "conditioned on text; give --prompt or --prompts"]),
        (("--prompt", "a", " "), ["--prompt: ' ' is no value here; it must be text"]),
        (("--prompt", "a", "--prompts", "b.txt"), ["--prompt and --prompts: give the one or the other"]),
        (("--prompts", "nowhere.txt"), ["--prompts nowhere.txt: no such file or data folder"]),
        (("--prompts", "hole.txt"), ["--prompts hole.txt: line 2 is empty"]),
        (("--prompts", "latin.txt"), ["--prompts latin.txt: is not UTF-8"]),
        (("--prompts", "short"), ["--prompts short", "length 3", "length 4"]),
        (("--prompt", "a", "--text-encoder", "/nowhere"), ["--text-encoder /nowhere: no such folder"]),
        (("--prompt", "a", "--text-encoder", "other"), ["--text-encoder other", "sha256 ffff", "by words (sha256 "]),
        (
            ("--prompt", "a", "--guide-ckpt", "label.pt"),
            ["label.pt: holds a SiT-Ti/2, which is conditioned on class labels, but"],
        ),
        (
            ("--ckpt", "label.pt", "--prompt", "a"),
            ["--prompt: label.pt: holds a SiT-Ti/2, which is conditioned on class labels"],
        ),
    ],
)
def test_prompts_that_do_not_fit(more, words, data, ckpt, small_cases, monkeypatch, capsys):
    monkeypatch.chdir(small_cases)
    load = partial(load_text_encoder)

    def other(name, *rest, **options):
        encoder = load("words" if name == "other" else name, *rest, **options)
        if name == "other":
            encoder.record = type(encoder.record)(**(vars(encoder.record) | {"sha256": "f" * 64}))
        return encoder

    monkeypatch.setattr(conditions, "load_text_encoder", other)
    real = ckpt.with_name("0000004.pt")
    runs.refused(generate.main, capsys, ["--ckpt", real, "--sample-dir", "out", "--num-fid-samples", 1, *more], *words)


@pytest.fixture(scope="module")
def small_cases(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cases")
    (folder / "hole.txt").write_text("a\n \nb\n")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    record = make_vae(folder / "vae")
    make_checkpoint(folder / "label.pt", record, model="SiT-Ti/2")
    make_latents(folder / "short", 2, record)
    for i in range(2):
        save(folder / f"short/images/00000/img{i:08d}.png", picture(RESOLUTION, RESOLUTION, seed=i))
        (folder / f"short/images/00000/img{i:08d}.txt").write_text("a")
    encode(folder / "short", length=3)
    return folder


def test_training_refuses(data, small_cases, tmp_path, capsys):
    for model, more, words in (
        ("SiT-Ti/2", ("--condition", "text"), "--condition text: SiT-Ti/2 is conditioned on class labels"),
        (MODEL, ("--condition", "labels"), f"--condition labels: {MODEL} is conditioned on text"),
        (MODEL, ("--val-data-dir", small_cases / "short"), "(length 3)"),
        (MODEL, ("--data-dir", "s3://bucket/set"), "s3://bucket/set"),
        (MODEL, ("--data-dir", small_cases / "vae"), "vae-sd"),
    ):
        runs.refused(train.main, capsys, command(data, tmp_path, *more, model=model), words)
    train.main(command(data, tmp_path, "--plan", "--sampling-steps", 0))
    assert "captions of 4 tokens × 64 by words" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_page_draws_from_prompts(ckpt, capsys):
    page, _ = web_demo.prepare(
        ["--ckpt", str(ckpt), "--prompt", "one fish", "--num-steps", "2", "--port", str(runs.free_port())]
    )
    values = page.values(page.drawer.config)
    assert page.names[0] == "prompt" and values[0] == "one fish"
    drawn = [page.drawer.picture(page.options(prompt, *values[1:])).image for prompt in ("one fish", "two birds", "one fish")]
    assert (drawn[0] == drawn[2]).all() and (drawn[0] != drawn[1]).any()
    model, _ = reading.load_model(ckpt)
    noise = randomness.image_noise(42, [0], (4, SIDE, SIDE))
    y = load_text_encoder("words", LENGTH).encode(["two birds"])
    latents = samplers.euler_sampler(model, noise, y, num_steps=2, cfg_scale=1.5, inference_budget=values[-1])
    wanted = decode(page.drawer.loaded.vae, latents)[0].permute(1, 2, 0).numpy()
    assert np.abs(drawn[1].astype(int) - wanted).max() <= 1
    for prompt in ("", None):
        with pytest.raises(UserError, match="--prompt: "):
            page.options(prompt, *values[1:])
    assert "text; give --prompt or --prompts" in runs.refused(
        web_demo.main, capsys, ["--ckpt", ckpt, "--port", runs.free_port()]
    )
