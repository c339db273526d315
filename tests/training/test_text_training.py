"""Text to image end to end: training on captions, resuming, several processes, and drawing from prompts."""

import json
import shlex
import shutil
from functools import partial

import encoder_runs
import numpy as np
import pytest
import runs
import torch
from PIL import Image
from runs import RESOLUTION, ROOT, SIDE, make_checkpoint, make_latents, make_vae, tiny_vae, train_on
from sets import content, picture, save
from tiny_encoders import sd3_pipeline, whole_clip
from training_runs import arguments, assert_same_tensors, final_state, metrics

import convert_checkpoint
import dataset_tools
import elit_ccfg_inference
import elit_multibudget_inference
import evaluate
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
from models.encoders import load_encoders
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
    return moved(whole[0] / "run/checkpoints/0000004.pt")


def moved(path):
    state = tensor_files.load(path)
    torch.manual_seed(0)
    for name, value in state["ema"]["0.9999"].items():
        if not name.startswith("null"):
            value += 0.1 * torch.randn_like(value)
    torch.save(state, path.with_name("moved.pt"))
    return path.with_name("moved.pt")


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


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return whole_clip(tmp_path_factory.mktemp("clip"))


def scored(data, clip, out):
    """Two steps so large, and an average so short, that the images have to do with their captions."""
    if not (ref := clip / "ref.npz").is_file():
        np.savez(ref, arr_0=np.random.default_rng(0).integers(0, 256, (7, RESOLUTION, RESOLUTION, 3), dtype=np.uint8))
    steps = ("--max-train-steps", 2, "--learning-rate", 0.03, "--ema-decay", 0, "--eval-steps", 2, "--eval-ref", ref)
    figures = ("--eval-metrics", "clip_score,fid", "--clip-score", clip, "--eval-features", "runs:colour_features")
    sampled = ("--eval-samples", 14, "--eval-budgets", "0.25,1", "--eval-num-steps", 2, "--eval-cfg-scale", 2)
    return command(data, out, *steps, *figures, *sampled)


SCORES = ("clip_score_budget_0.25", "clip_score_budget_1", "fid_budget_0.25", "fid_budget_1")


@pytest.fixture
def no_flops(monkeypatch):
    """Counting them takes longer than all else."""
    monkeypatch.setattr("models.count_flops", lambda *_: 1)
    monkeypatch.setattr("training.stats.encoder_flops", lambda _: 1)


@pytest.fixture(scope="module")
def with_scores(data, clip, tmp_path_factory):
    """The run of one process."""
    train.main(scored(data, clip, out := tmp_path_factory.mktemp("scored")))
    runs.reset_accelerate()
    return out


@pytest.mark.usefixtures("no_flops")
def test_scores_are_of_the_first_captions_images_and_their_clip_score(data, clip, with_scores, tmp_path, capsys, monkeypatch):
    best = json.loads((with_scores / "run/best.json").read_text())
    assert best["metric"] == SCORES[0] and f"--prompts {data}" in best["generate"]
    words = [*shlex.split(best["generate"])[2:], "--sample-dir", str(tmp_path)]
    generate.main(words)
    runs.reset_accelerate()
    (samples,) = (tmp_path / "run").glob("*.npz")
    captions = json.loads((samples.with_suffix("") / "captions.json").read_text())["captions"]
    assert [texts for _, texts in captions] == [[CAPTIONS[i % COUNT][0]] for i in range(14)]
    argv = [str(a) for a in (clip / "ref.npz", samples, "--features", "runs:colour_features", "--clip-score", clip)]
    evaluate.main([*argv, "--metrics", "fid", "--output", str(tmp_path / "m.json")])
    runs.reset_accelerate()
    offline, ref = json.loads((tmp_path / "m.json").read_text()), ("--ref", clip / "ref.npz")
    for metric in ("fid", "clip_score"):
        assert metrics(with_scores, f"{metric}_budget_0.25")[2] == pytest.approx(offline[metric], rel=1e-5), metric

    # The same by a sweep; the larger score is the better one.
    more = ("--features", "runs:colour_features", "--metrics", "clip_score", "--inference-budget", 0.25, 1, "--cfg-scale", 2)
    argv = [*words[:2], *ref, "--prompts", data, "--num-steps", 2, "--num-fid-samples", 14, "--dest", tmp_path / "s", *more]
    monkeypatch.setattr(sweep.plots, "write_plots", lambda *_: [])
    sweep.main([str(a) for a in (*argv, "--clip-score", clip)])
    runs.reset_accelerate()
    cells = [json.loads(path.read_text()) for path in (tmp_path / "s/cells").glob("*.json")]
    found = {cell["options"]["inference_budget"]: cell["figures"]["clip_score"] for cell in cells}
    assert len(cells) == 2 and str(clip) not in str([cell["options"] for cell in cells])  # which know the weights' hash
    assert found["0.25"] == pytest.approx(offline["clip_score"], rel=1e-5)
    assert f"best: clip_score {max(found.values()):.4g}" in capsys.readouterr().out
    assert "CLIP score" in (tmp_path / "s/sweep.md").read_text()

    runs.refused(sweep.main, capsys, argv, "--metrics clip_score: needs --clip-score")
    runs.refused(sweep.main, capsys, [*argv, "--clip-score", "gone"], "--clip-score gone: no such folder")
    refused = partial(runs.refused, train.main, capsys)
    refused(command(data, tmp_path / "no", "--eval-steps", 2, "--eval-ref", clip / "ref.npz", "--eval-metrics", "clip_score"),
            "--eval-metrics clip_score: needs --clip-score")  # fmt: skip
    labels = arguments(data, tmp_path / "no", "--eval-steps", 2, "--eval-ref", clip / "ref.npz", "--clip-score", clip)
    refused(labels, "--clip-score: needs prompts in words")


def test_resume_and_two_processes_and_packed_text_give_the_same(data, whole, clip, with_scores, tmp_path, capsys):
    more = ("--max-train-steps", 3, "--checkpointing-steps", 3)
    train.main(command(data, tmp_path, *more))
    runs.reset_accelerate()
    train.main(command(data, tmp_path, "--resume-step", -1))
    state = final_state(whole[0])
    assert_same_tensors(final_state(tmp_path)["model"], state["model"])
    runs.reset_accelerate()

    encode(data, "--packed")
    np.savez(tmp_path / "s.npz", arr_0=np.random.default_rng(1).integers(0, 256, (7, 32, 40, 3), dtype=np.uint8))
    (tmp_path / "prompts.txt").write_text("red cat\nblue fish\ntwo")
    evaluated = [str(a) for a in (tmp_path / "s.npz", tmp_path / "s.npz", "--clip-score", clip, "--metrics", "fid", "--prompts",
                 tmp_path / "prompts.txt", "--batch-size", 2, "--features", "runs:pool_features", "--output")]  # fmt: skip
    evaluate.main([*evaluated, str(tmp_path / "one.json")])
    runs.reset_accelerate()
    helpers = f"\nimport sys; sys.path.append({str(ROOT / 'tests/helpers')!r})\n"
    two = f"{helpers}import evaluate; evaluate.main({[*evaluated, str(tmp_path / 'two.json')]!r}); raise SystemExit(0)"
    encoded = [shutil.copytree(data, tmp_path / f"text{n}", ignore=lambda *_: ["text", "packed"]) for n in (1, 2)]
    argv = [["text", f"--source={folder}", f"--encoder={clip}", "--length=8", "--batch-size=1"] for folder in encoded]
    dataset_tools.main(argv[0])
    runs.reset_accelerate()
    two_encode = f"import dataset_tools; dataset_tools.main({argv[1]!r}); raise SystemExit(0)"
    try:
        exits = train_on(
            (2, command(data, tmp_path / "two"), REGISTER),
            (2, scored(data, clip, tmp_path / "two_scored"), REGISTER + helpers),
            (2, [], two),
            (2, [], two_encode),
        )
        assert [line for line in exits if line.replace(" ", "").isdigit()] == ["0 0"] * 4
        assert content(encoded[0] / "text") == content(encoded[1] / "text")
    finally:
        for name in ("text.json", "text.bin", "text.idx", "null.npy"):
            (data / "packed" / name).unlink()
        (data / "packed").rmdir()
    for name, value in final_state(tmp_path / "two")["model"].items():
        torch.testing.assert_close(value, state["model"][name], rtol=1e-4, atol=1e-5)

    for name in SCORES:  # pixels that are rounded otherwise
        assert metrics(tmp_path / "two_scored", name) == pytest.approx(metrics(with_scores, name), rel=2e-3), name
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["clip_score"] == two["clip_score"] > 0

    kept = (data / "text/text.json").read_text()
    sha256 = json.loads(kept)["sha256"]
    (data / "text/text.json").write_text(kept.replace(sha256, "0" * 64))
    try:
        runs.refused(train.main, capsys, command(data, tmp_path, "--resume-step", -1), "the run in", sha256, "0" * 64)
    finally:
        (data / "text/text.json").write_text(kept)


def drawn(out, ckpt, *more, images="*.png"):
    """generate.py's images of a run, by number."""
    generate.main([str(a) for a in ("--ckpt", ckpt, "--sample-dir", out, "--num-steps", 2, "--cfg-scale", 3, *more)])
    runs.reset_accelerate()
    if images == "*.npz":
        return np.load(next(out.rglob(images)))["arr_0"]
    return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted(out.glob(f"**/{images}"))])


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
    assert len(drawn(tmp_path / "alone", ckpt, *lists, "--num-fid-samples", 3, "--no-png", images="*.npz")) == 3
    (alone,) = (tmp_path / "alone").glob("run/*/captions.json")
    assert json.loads(alone.read_text())["captions"] == captions
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


def test_prompts_do_not_need_their_cache(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prompt = ("--prompt", "one fish in the sea")
    kept = drawn(tmp_path / "a", ckpt, *prompt)
    for suffix, text in ((".json", "5"), (".json", "[5]"), (".npy", "")):
        (features_file,) = (tmp_path / "cache/elastic-dit/text").glob(f"*{suffix}")
        features_file.write_text(text)
        assert np.array_equal(drawn(tmp_path / f"b{suffix}{text}", ckpt, *prompt), kept)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # a folder that cannot be made, as on a read-only disk
    capsys.readouterr()
    assert np.array_equal(drawn(tmp_path / "c", ckpt, *prompt), kept)
    err = capsys.readouterr().err
    assert "the prompts' features cannot be kept there for the next time: Not a directory" in err and "'sea' is lost" in err


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


@pytest.mark.usefixtures("no_flops")
def test_three_encoders_with_pooled_text(data, tmp_path):
    """SD3's three, whose pooled features training, the null prompt and prompts have, too."""
    folder, pipeline = shutil.copytree(data, tmp_path / "set", ignore=lambda *_: ["text"]), sd3_pipeline(tmp_path / "sd3")
    captions = [["red cat"], ["a mat", "blue cat on a mat"]] * 6
    named = [[f"00000/img{i:08d}.png", texts] for i, texts in enumerate(captions)]
    (folder / "images/captions.json").write_text(json.dumps({"captions": named}))
    dataset_tools.main(["text", f"--source={folder}", f"--encoder={pipeline}", "--length=4", "--dtype=float32"])
    runs.reset_accelerate()
    seen, original = [], Trainer.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "forward", lambda self, batch: seen.append(condition_of(batch)) or original(self, batch))
        train.main(command(folder, tmp_path, "--max-train-steps", 2, "--sampling-steps", 2))
    runs.reset_accelerate()
    encoder, close = load_text_encoder(str(pipeline), 4), partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    order = epoch_order(SEED, 0, COUNT)[4:8]
    given = encoder.encode([captions[i][caption_of(SEED, 1, place, len(captions[i]))] for place, i in enumerate(order)])
    close(seen[1], given)
    state, null = final_state(tmp_path, 2), encoder.encode([""])
    assert torch.equal(state["model"]["null_text"], null.features[0])
    assert torch.equal(state["model"]["null_pooled"], null.pooled[0])

    ckpt = moved(tmp_path / "run/checkpoints/0000002.pt")
    model, _ = reading.load_model(ckpt)
    text, x = encoder.encode(["red cat", "a mat"]), torch.randn(2, 4, 8, 8)
    dropped = drop_conditions(model, text, training_draws(SEED, 0, range(2), (4, 8, 8)), 1.1)
    assert torch.equal(dropped.pooled, null.pooled.expand(2, -1)) and torch.equal(dropped.features[1], null.features[0])
    with torch.no_grad():
        high, low, other = (model(x, torch.full((2,), 0.4), y) for y in (text, dropped, Text(text.features, dropped.pooled)))
        found = guided_velocity(model, x.double(), 0.4, text, Guidance(cfg_scale=2.5))
    torch.testing.assert_close(found.float(), low + 2.5 * (high - low), rtol=1e-4, atol=1e-4)
    assert (high - other).abs().max() > 1e-3  # the pooled part matters
    by_words = drawn(tmp_path / "a", ckpt, "--prompt", *(texts[0] for texts in captions))
    assert np.abs(by_words - drawn(tmp_path / "b", ckpt, "--prompts", folder)).max() <= 1 and (by_words[0] != by_words[1]).any()


@pytest.mark.usefixtures("no_flops")
def test_repa_with_text_on_its_coco_features(tiny_weights, tmp_path):
    """REPA's train/ and val/, moments of mean and log-variance: the first loss by hand, a stopped run, images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        (tmp_path / split).mkdir()
        for i in range(count):
            np.save(tmp_path / f"{split}/{i}.npy", rng.standard_normal((8, 8, 8)).astype(np.float32))
            np.save(tmp_path / f"{split}/{i}_0.npy", rng.standard_normal((5, 6)).astype(np.float32))
            save(tmp_path / f"{split}/{i}.png", picture(64, 64, seed=i))
    np.save(tmp_path / "empty_context.npy", np.ones((5, 6), np.float32))
    vae = tiny_vae(tmp_path / "vae", 4, latent_channels=4, scaling_factor=0.18215, mid_block_add_attention=False)
    repa = (*encoder_runs.repa(tiny_weights), "--encoder-depth", 1, "--cfg-prob", 1, "--checkpointing-steps", 1)
    places = ("--resolution", 64, "--val-data-dir", tmp_path / "val")
    pictures = ("--vae", vae, "--sampling-steps", 2)
    train.main(command(tmp_path, tmp_path / "whole", *places, *repa, "--max-train-steps", 2))
    runs.reset_accelerate()
    kept, losses = tmp_path / "whole/run/checkpoints", metrics(tmp_path / "whole", "alignment_loss")
    shutil.copytree(kept, tmp_path / "part/run/checkpoints", ignore=shutil.ignore_patterns("0000002*"))
    train.main(command(tmp_path, tmp_path / "part", *places, *repa, *pictures, "--max-train-steps", 2, "--resume-step", -1))
    runs.reset_accelerate()
    assert_same_tensors(final_state(tmp_path / "part", 2)["model"], final_state(tmp_path / "whole", 2)["model"])
    assert metrics(tmp_path / "part", "alignment_loss") == {2: losses[2]}
    assert (tmp_path / "part/run/samples/0000002.png").is_file() and metrics(tmp_path / "part", "val_loss_budget_0.25")

    order, draws = epoch_order(SEED, 0, 6)[:4], training_draws(SEED, 0, range(4), (4, 8, 8))
    moments = torch.stack([torch.from_numpy(np.load(tmp_path / f"train/{i}.npy")) for i in order])
    latents = (moments[:, :4] + (0.5 * moments[:, 4:]).exp() * draws.posterior) * 0.18215
    assert metrics(tmp_path / "whole")[1] == pytest.approx((draws.noise - latents).square().mean().item(), rel=1e-5)
    t = draws.time_uniform.float()
    x = latents + t[:, None, None, None] * (draws.noise - latents)
    torch.manual_seed(SEED)
    sizes = {"text_width": 6, "text_length": 5, "elit_group_size": 2, "z_dims": (192,), "encoder_depth": 1}
    untrained = models.create_model(MODEL, input_size=8, **sizes)
    _, (projection,) = untrained(x, t, Text(torch.ones(4, 5, 6)), return_features=True)
    encoder = load_encoders([encoder_runs.TINY], 64, (4, 4), [str(tiny_weights)])[0]
    target = encoder(torch.from_numpy(np.stack([picture(64, 64, seed=i) for i in order])).permute(0, 3, 1, 2))
    alignment = -torch.nn.functional.cosine_similarity(projection, target, dim=-1).mean().item()
    assert losses[1] == pytest.approx(alignment, rel=1e-4)

    ckpt = moved(tmp_path / "whole/run/checkpoints/0000002.pt")
    assert len(drawn(tmp_path / "a", ckpt, "--prompts", tmp_path / "val", "--vae", vae)) == 3
    assert not list((tmp_path / "a").glob("**/captions.json"))  # nobody knows the words


@pytest.mark.usefixtures("no_flops")
def test_the_chain_of_the_coco_recipe(clip, tmp_path):
    """COCO's images and annotations → latents and features by CLIP → the YAML's training → its images → FID and CLIP score."""
    names = [f"COCO_val2014_{90 - 7 * i:012d}.jpg" for i in range(6)]
    captions = [
        ["a red cat", "one cat"],
        ["two fish on a mat"],
        ["a blue mat"],
        ["three fish"],
        ["one red mat"],
        ["a green cat"],
    ]
    for i, name in enumerate(names):
        save(tmp_path / "val2014" / name, picture(40, 52, seed=i))
    make_vae(tmp_path / "vae")
    data = tmp_path / "set"
    tool = partial(map, str)
    dataset_tools.main([*tool(("convert", "--source", tmp_path / "val2014", "--dest", data / "images", "--resolution", "32x32",
                               "--transform", "center-crop-dhariwal", "--workers", 1))])  # fmt: skip
    notes = [{"id": 9 - k, "image_id": i, "caption": t} for i, texts in enumerate(captions) for k, t in enumerate(texts[::-1])]
    of_coco = {"images": [{"id": i, "file_name": name} for i, name in enumerate(names)], "annotations": notes}
    (data / "images/captions_val2014.json").write_text(json.dumps(of_coco))
    dataset_tools.main([*tool(("encode", "--source", data / "images", "--dest", data / "vae-sd", "--vae", tmp_path / "vae"))])
    runs.reset_accelerate()
    dataset_tools.main([*tool(("text", "--source", data, "--encoder", clip, "--length", 8))])
    runs.reset_accelerate()
    recipe = (
        "--config",
        ROOT / "experiments_updated/train/elit_mmdit_b_coco_256.yaml",
        "--enc-type",
        "none",
        "--val-data-dir",
        data,
    )
    train.main(arguments(data, tmp_path, *recipe, "--batch-size", 4, "--max-train-steps", 2, model=MODEL))
    runs.reset_accelerate()
    state = final_state(tmp_path, 2)
    assert state["text"]["padding"] == "end token" and state["model"]["null_text"].shape == (8, 16)
    generate.main([*tool(("--config", ROOT / "experiments_updated/generation/coco_256.yaml", "--resolution", 32, "--num-steps", 2,
                          "--ckpt", tmp_path / "run/checkpoints/0000002.pt", "--prompts", data, "--sample-dir", tmp_path / "out"))])  # fmt: skip
    runs.reset_accelerate()
    (samples,) = (tmp_path / "out/run").glob("*.npz")
    told = json.loads((samples.with_suffix("") / "captions.json").read_text())["captions"]
    assert [texts[0] for _, texts in told] == [captions[i][0] for i in range(5, -1, -1)]  # of the sorted files
    evaluate.main([*tool((data / "images", samples, "--features", "runs:colour_features", "--metrics", "fid", "--clip-score", clip,
                          "--output", tmp_path / "m.json"))])  # fmt: skip
    figures = json.loads((tmp_path / "m.json").read_text())
    assert figures["num_samples"] == 6 and figures["fid"] > 0 and figures["clip_score"] >= 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), ["0000004.pt", "conditioned on text; give --prompt or --prompts"]),
        (("--prompt", "a", " "), ["--prompt: ' ' is no value here; it must be text"]),
        (("--prompt", "a", "\udcff"), ["--prompt: '\\udcff' is no Unicode"]),
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
