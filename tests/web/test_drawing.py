"""The page's logic without a browser: what a request is, its pictures and figures, the choice within a time, and refusals."""

import copy
import dataclasses
import itertools
import os
import re
import shutil
import socket
from functools import partial

import numpy as np
import pytest
import runs
import torch
from runs import CLASSES, RESOLUTION, SIDE, free_port, make_checkpoint, make_vae

import models
import randomness
import samplers
import web_demo
from checkpoint import reading
from common.errors import UserError
from common.plotting import attention_overlay
from config.demo_options import QUICKSTART
from config.options import GenerateConfig
from models.layers import narrow_linears
from models.vae import decode, load_vae
from sampling.attention import read_maps
from sampling.image_folder import settings
from sweeping.cells import Store, key_of
from web import choice, html
from web.choice import Chooser, sweep_dirs
from web.page import Page

REQUEST = {"class_label": 3, "seed": 5, "num_steps": 4, "guidance_kind": "CCFG", "cfg_scale": 2.0}
REQUEST |= {"unconditional_inference_budget": 0.25, "inference_budget": 0.5}


def command(ckpt, *more):
    return [str(o) for o in ("--ckpt", ckpt, "--num-steps", 4, "--port", free_port(), *more)]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return make_checkpoint(folder / "checkpoints" / "0000007.pt", make_vae(folder / "vae"))


@pytest.fixture(scope="module")
def made(ckpt):
    page, _ = web_demo.prepare(command(ckpt))
    return page


@pytest.fixture
def page(made):
    made.drawer._pictures.clear()
    return made


def sampled(ckpt, budget, **guidance):
    """The picture from the sampler itself, of class 3 and seed 5."""
    model, _ = reading.load_model(ckpt)
    vae, _ = load_vae(str(ckpt.parent.parent / "vae"))
    noise = randomness.image_noise(5, [0], (4, SIDE, SIDE))
    latents = samplers.euler_sampler(model, noise, torch.tensor([3]), num_steps=4, inference_budget=budget, **guidance)
    return decode(vae, latents)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("changes", "guidance"),
    [
        ({"guidance_kind": "CFG"}, {"cfg_scale": 2.0}),
        ({}, {"cfg_scale": 2.0, "unconditional_inference_budget": 0.25}),
        ({"guidance_kind": "AutoG"}, {"cfg_scale": 2.0, "unconditional_inference_budget": 0.25, "autoguidance": True}),
        ({"cfg_scale": 1}, {}),
    ],
)
def test_a_picture_and_its_figures_are_the_samplers(page, ckpt, changes, guidance):
    config = page.drawer.options(REQUEST | changes)
    *_, shown = page.drawer.compare(config)
    flops = {b: models.count_flops(page.drawer.loaded.model, b) for b in (0.25, 0.5, 1.0)}
    for picture, budget in ((shown.picture, 0.5), (shown.full, 1.0)):
        difference = np.abs(picture.image.astype(int) - sampled(ckpt, budget, **guidance))
        assert difference.max() <= 1
        guiding = 0 if not guidance else flops[guidance.get("unconditional_inference_budget", budget)]
        assert picture.gflops == pytest.approx(4 * (flops[budget] + guiding) / 1e9) and picture.ms > 0
    assert (shown.picture.image != shown.full.image).any()


def test_each_picture_is_drawn_once(page, monkeypatch):
    drawn, original = [], page.drawer._draw
    monkeypatch.setattr(page.drawer, "_draw", lambda c, p: (drawn.append(c.inference_budget), original(c, p))[1])
    first = list(page.drawer.compare(page.drawer.options(REQUEST)))
    assert [c.full is None for c in first] == [True, False] and drawn == [0.5, 1.0]
    moved = list(page.drawer.compare(page.drawer.options(REQUEST | {"inference_budget": 0.3})))  # runs at 1 of 4
    assert len(moved) == 1 and moved[0].full is first[1].full and drawn == [0.5, 1.0, 0.25]
    assert [b for b, _ in page.drawer.strip(page.drawer.options(REQUEST))] == [0.25, 0.5, 0.75, 1.0] and drawn[3:] == [0.75]
    list(page.drawer.compare(page.drawer.options(REQUEST | {"seed": 6})))
    assert drawn[4:] == [0.5, 1.0]


def test_progress_counts_every_forward(page):
    told = []
    page.drawer.picture(page.drawer.options(REQUEST), lambda done, count: told.append((done, count)))
    assert told == [(i, 8) for i in range(1, 9)]  # four steps, two passes each
    told.clear()
    page.drawer.strip(page.drawer.options(REQUEST | {"guidance_kind": "CFG"}), lambda done, count: told.append(done / count))
    assert len(told) == 16 and told == sorted(told) and told[-1] == 1  # the passes of a step are one forward


def test_the_page_shows_both_pictures_and_their_figures(page):
    values = [REQUEST[name] for name in page.names]
    (_, first), (said, both) = page.draw(*values)
    assert "class 3, seed 5, 4 steps, cheap CFG 2" in said
    assert "drawing …" in first and "drawing …" not in both
    figures = {name: float(v) for name, v in re.findall(r'id="(\w+)" data-gflops="([\d.e+-]+)"', both)}
    assert figures["picture"] < figures["full"]
    assert "Budget 0.5" in both and "2 of 4 latents" in both and "PSNR" in both and both.count("data:image/png;base64,") == 3
    ((_, same),) = page.draw(*values[:-1], 1)
    assert "the same picture" in same
    assert page.strip(*values)[1].count("<img") == 4


def test_what_read_looks_at_lies_over_the_picture(page):
    config = page.drawer.options(REQUEST | {"attention_time": 0.25})
    picture = page.drawer.picture(config)
    model, x = page.drawer.loaded.model, picture.latents
    noise = randomness.image_noise(5, [0], (4, SIDE, SIDE))
    weights = model.read_attention((0.75 * x + 0.25 * noise).float(), torch.full((1,), 0.25), torch.tensor([3]))
    maps = page.drawer.attention(config)  # (J, 4, 4): a grid of 4×4 tokens in windows of 2×2
    for latent, row, column in ((0, 0, 0), (2, 1, 2), (3, 3, 1)):
        group, token = row // 2 * 2 + column // 2, row % 2 * 2 + column % 2
        assert maps[latent, row, column] == pytest.approx(4 * weights[0, group, :, latent, token].mean().item(), rel=1e-4)
    _, shown = page.attention(0.25, *(REQUEST[name] for name in page.names))
    assert shown.count("<img") == 5 and "latent 1<" in shown and "latent 2, not kept" in shown and "t = 0.25" in shown
    assert html.data_url(attention_overlay(picture.image, maps[:2].mean(0), max(2.0, float(np.quantile(maps, 0.995))))) in shown


def test_an_overlay_has_the_colours_of_inferno_over_grey():
    image = np.full((4, 4, 3), 100, np.uint8)
    overlay = attention_overlay(image, np.array([[0.0, 2.0], [1.0, 9.0]]), top=2.0)
    assert overlay.shape == (4, 4, 3) and (overlay[2:, 2:] == overlay[0, 2]).all()
    ends = np.array([[0.001462, 0.000466, 0.013866], [0.988362, 0.998364, 0.644924]]) * 255  # of the published table
    np.testing.assert_allclose(overlay[[0, 0], [0, 3]], 0.65 * ends + 35, atol=1)


# ------------------------------------------------------------------------------------------------------------ the choice


@pytest.fixture
def chooser(page, monkeypatch):
    """An evaluation at k of 4 latents takes k + 1 ms, a pass at a time, and decoding 2 ms."""
    chooser = Chooser(page.drawer, [])
    passes = [samplers.Pass(k / 4) for k in range(1, 5)]
    ms = {(pair, 1): sum(4 * p.budget + 1 for p in pair) for n in (1, 2) for pair in itertools.product(passes, repeat=n)}
    monkeypatch.setattr(chooser.timings, "_ms", ms | {"decode": 2.0})
    return chooser


def test_budget_and_steps_that_fit(page, chooser):
    config = page.drawer.options(REQUEST | {"cfg_scale": 1})
    for limit, budget, steps in [
        (22, 1.0, 4),
        (30, 1.0, 5),
        (18, 0.75, 4),
        (17, 0.5, 5),
        (14.5, 0.5, 4),
        (10, 0.25, 4),
        (7, 0.25, 2),
    ]:
        choice = chooser.within(config, limit)
        assert (choice.config.inference_budget, choice.config.num_steps) == (budget, steps), limit
        assert choice.ms == 2 + steps * (4 * budget + 1) <= limit and choice.config.seed == 5
    guided = chooser.within(page.drawer.options(REQUEST), 22)  # its guiding pass is at 0.25
    assert (guided.config.inference_budget, guided.config.num_steps) == (0.5, 4) and guided.ms == 22
    with pytest.raises(UserError, match=r"--within-ms 3: an image takes at least 4 ms, at the lowest budget and fewest steps"):
        chooser.within(config, 3)


def test_steps_of_which_only_some_are_guided(page, monkeypatch):
    monkeypatch.setattr(choice.cost, "interleaved_times", lambda jobs, device: dict.fromkeys(jobs, (1.0, 1.0, 1.0)))
    monkeypatch.setattr(page.drawer, "config", dataclasses.replace(page.drawer.config, guidance_low=0.3, guidance_high=0.35))
    made = Chooser(page.drawer, []).within(page.drawer.options(REQUEST | {"num_steps": 2}), 21)
    assert (made.config.num_steps, made.ms) == (20, 21)  # one of them is guided; and decoding


def test_read_in_half_precision(page):
    loaded, latents = page.drawer.loaded, torch.randn(2, 4, SIDE, SIDE, dtype=torch.float64)
    narrow = narrow_linears(copy.deepcopy(loaded.model), torch.bfloat16)
    half = dataclasses.replace(loaded, model=narrow, config=dataclasses.replace(loaded.config, mixed_precision="bf16"))
    whole, found = (read_maps(of, latents, 0, 0.5, 2) for of in (loaded, half))
    assert found.maps.dtype == torch.float32
    torch.testing.assert_close(found.maps, whole.maps.float(), rtol=0.1, atol=0.02)
    torch.testing.assert_close(found.maps.mean(dim=(2, 3)), torch.ones(2, 4), rtol=0, atol=1e-5)


def cell_of(ckpt, config, fid, **changes):
    """The file of a sweep's cell, without guidance unless `changes` say so."""
    names = {f.name for f in dataclasses.fields(GenerateConfig)} & {f.name for f in dataclasses.fields(config)}
    plain = {"cfg_scale": 1.0, "unconditional_inference_budget": None}
    options = GenerateConfig(**({name: getattr(config, name) for name in names} | plain | changes))
    recorded = settings(options, reading.read_weights(ckpt), None)
    return {"name": "made", "ckpt": "x", "ref": "r", "guide_ckpt": None, "figures": {"fid": fid}, "gflops_per_image": 1.0,
            "ms_per_image": 1.0, "num_samples": 20, "versions": {}, "options": recorded | {"num_samples": 20}}  # fmt: skip


def test_a_sweep_beside_the_checkpoint_decides(page, chooser, ckpt, tmp_path):
    cell = partial(cell_of, ckpt, page.drawer.config)
    store = Store(tmp_path / "figures", print)
    store.folder.mkdir(parents=True)
    cells = [
        cell(9.0, inference_budget="0.25", num_steps=2),  # 6 ms
        cell(5.0, inference_budget="0.5", num_steps=3, cfg_scale=1.5),  # 20 ms
        cell(5.0, inference_budget=None, num_steps=3),  # 17 ms, as good
        cell(6.0, inference_budget="0.5", num_steps=4),  # 14 ms
        cell(1.0, inference_budget="0.25@1-0.5,1@0.5-0", num_steps=1),  # not of the slider
        cell(1.0, inference_budget="0.25", num_steps=1, heun=True),  # nor this
    ]
    other = cell(0.5, inference_budget="0.25", num_steps=1)
    other["options"]["ckpt_sha256"] = "another"
    for one in [*cells, other]:
        store.write(key_of(one["options"]), one)
    swept = Chooser(page.drawer, [tmp_path / "figures"])
    swept.timings = chooser.timings
    config = page.drawer.options(REQUEST)
    for limit, budget, steps in [(25, 1.0, 3), (16, 0.5, 4), (13, 0.25, 2)]:
        choice = swept.within(config, limit)
        assert (choice.config.inference_budget, choice.config.num_steps, choice.config.cfg_scale) == (budget, steps, 1.0)
        assert "the best of 4 points of a sweep: FID" in choice.reason and choice.ms <= limit
    assert "latencies" in swept.within(page.drawer.options(REQUEST | {"cfg_scale": 1}), 5.5).reason  # no point is within it
    assert sweep_dirs(ckpt, None) == [] and sweep_dirs(tmp_path / "x.pt", None) == [tmp_path / "figures"]
    assert sweep_dirs(tmp_path / "checkpoints" / "x.pt", None) == [tmp_path / "figures"]


@pytest.mark.parametrize(
    "other", [{"ref_sha256": "b"}, {"num_samples": 10}, {"networks": ["x"]}, {"class_labels": ["balanced"]}, {"split_size": 7}]
)
def test_points_that_are_measured_otherwise_are_not_compared(page, chooser, ckpt, tmp_path, other):
    def write(folder, name, fid, steps, age, **changes):
        cell = cell_of(ckpt, page.drawer.config, fid, inference_budget="0.5", num_steps=steps)
        cell["options"] |= {"ref_sha256": "a", "networks": [], **changes}
        cell |= {"ref": f"refs/{name}.npz", "num_samples": cell["options"]["num_samples"]}
        store = Store(tmp_path / folder, print)
        store.folder.mkdir(parents=True, exist_ok=True)
        store.write(key := key_of(cell["options"]), cell)
        os.utime(store.path(key), (age, age))

    def chosen(*folders):
        swept = Chooser(page.drawer, [tmp_path / folder for folder in folders])
        swept.timings = chooser.timings
        return swept.within(page.drawer.options(REQUEST), 14)

    for steps, fid in ((2, 9.0), (3, 8.0)):
        write("one", "first", fid, steps, age=100)
    write("two", "second", 1.0, 1, age=200, **other)
    both = chosen("one", "two")  # its two points count, however good the other's one looks
    assert both.config.num_steps == 3
    assert re.search(
        r"best of 2 points of a sweep: FID 8 of 20 images against first\.npz \(1 more, of another reference.* left out\)",
        both.reason,
    )
    assert "left out" not in chosen("one").reason and chosen("two").config.num_steps == 1
    write("two", "second", 2.0, 2, age=50, **other)  # equally many: the newest cell's
    assert chosen("one", "two").config.num_steps == 1 and "against second.npz (2 more," in chosen("two", "one").reason
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert "FID 8 of" in chosen("one", "copy").reason  # the same cells, once


def test_latencies_are_measured_once_and_the_choice_is_drawn(page, monkeypatch):
    measured = []

    def times(jobs, device):
        measured.append(len(jobs))
        for job in jobs.values():
            job()
        return dict.fromkeys(jobs, (1.0, 1.0, 1.0))

    monkeypatch.setattr("sampling.cost.interleaved_times", times)
    monkeypatch.setattr(page, "chooser", Chooser(page.drawer, []))
    for ms in (5, 9):
        config, said, pictures = page.within(ms, *(REQUEST[name] for name in page.names))
        assert (config.inference_budget, config.num_steps) == (1.0, ms - 1) and "by measured latencies; expected" in said
        assert "Budget 1<" in pictures and page.values(config)[2:3] == [ms - 1]
    # Four budgets with their guiding pass, and the decoder; those of the request were measured before.
    assert sum(measured) == 4 + len(measured)


# ------------------------------------------------------------------------------------------------------------- refusals

BAD = [
    ("class_label", 5, f"class ids of this model lie below {CLASSES}"),
    ("class_label", -1, "it must be ≥ 0"),
    ("class_label", 1.5, "is not a whole number"),
    ("seed", -1, "it must be ≥ 0"),
    ("num_steps", 0, "it must be ≥ 1"),
    ("num_steps", "many", "is not a whole number"),
    ("cfg_scale", 0.5, "it must be ≥ 1"),
    ("guidance_kind", "all", "choose from CFG, CCFG, AutoG, Guide"),
    ("guidance_kind", "Guide", "--guide-ckpt"),
    ("inference_budget", 0.1, "0.25, 0.5, 0.75, 1"),
    ("inference_budget", 2, "it must be ≤ 1"),
    ("unconditional_inference_budget", 0.2, "0.25, 0.5, 0.75, 1"),
    ("within_ms", 0, "it must be > 0"),
    ("attention_time", 1.5, "it must be ≤ 1"),
]


@pytest.mark.parametrize(("name", "value", "words"), BAD)
def test_bad_values_are_the_command_lines_errors(page, ckpt, capsys, name, value, words):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UserError) as error:
        page.drawer.options(REQUEST | {name: value})
    line = runs.refused(web_demo.main, capsys, command(ckpt, f"{flag}={value}"), flag, words)
    said, expected = (re.sub(r"'(-?[\d.]+)'", r"\1", text) for text in (str(error.value), line))  # a number in the page
    assert expected == f"web_demo.py: error: {said}"


def test_an_empty_field_is_refused(page):
    for name in ("class_label", "seed", "num_steps", "cfg_scale"):
        with pytest.raises(UserError, match="--" + name.replace("_", "-")):
            page.drawer.options(REQUEST | {name: None})


def test_refused_before_anything_is_loaded(ckpt, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sampling.session.read_checkpoint", lambda *_: 1 / 0)
    refused = lambda *argv: runs.refused(web_demo.main, capsys, argv)  # noqa: E731
    assert f"{QUICKSTART}, does not exist; run make quickstart" in refused("--port", free_port())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port}: is in use" in refused("--ckpt", ckpt, "--port", port)
    assert "--host 192.0.2.1: cannot be listened at" in refused("--ckpt", ckpt, "--host", "192.0.2.1")
    assert "--port: 70000 is out of range" in refused("--ckpt", ckpt, "--port", 70000)
    assert f"--sweep-dir {tmp_path}: holds no cells/ of sweep.py" in refused("--ckpt", ckpt, "--sweep-dir", tmp_path)


# ------------------------------------------------------------------------------------------------------- other models


def test_a_model_without_budgets(ckpt, tmp_path, capsys):
    sit = make_checkpoint(tmp_path / "sit.pt", reading.read_weights(ckpt).record, model="SiT-Ti/2")
    page, _ = web_demo.prepare(command(sit, "--class-label", 3))
    assert "inference_budget" not in page.names
    ((_, shown),) = page.draw(*page.values(page.drawer.config))
    assert shown.count("<img") == 1 and "SiT-Ti/2" in shown
    page.chooser.timings._ms = {((samplers.Pass(None),) * 2, 1): 2.0, "decode": 2.0}
    assert page.chooser.within(page.drawer.config, 13).config.num_steps == 5
    assert "--inference-budget 0.5: SiT-Ti/2 has no budget" in runs.refused(
        web_demo.main, capsys, command(sit, "--inference-budget", 0.5)
    )
    assert "--guidance-kind AutoG: SiT-Ti/2 has no budget" in runs.refused(
        web_demo.main, capsys, command(sit, "--guidance-kind", "AutoG")
    )


def test_a_guide_and_stages(ckpt, tmp_path):
    record = reading.read_weights(ckpt).record
    dfm = make_checkpoint(tmp_path / "dfm.pt", record, model="DFM-ELIT-SiT-Ti/2")
    page, _ = web_demo.prepare(
        [*command(dfm), "--num-steps-per-scale", "2", "1", "--guide-ckpt", str(dfm), "--guide-budget=0.25"]
    )
    values = page.values(page.drawer.config)
    assert page.names[2] == "num_steps_per_scale" and values[2:4] == ["2 1", "Guide"]
    told = []
    *_, (_, shown) = page.draw(*values, progress=lambda done, count: told.append((done, count)))
    assert shown.count("<img") == 3 and told == 2 * [(i, 3) for i in (1, 2, 3)]
    flops = {b: models.count_flops(page.drawer.loaded.model, b) for b in (0.25, 1.0)}
    assert f'id="full" data-gflops="{3 * (flops[0.25] + flops[1.0]) / 1e9:.6g}"' in shown
    page.chooser.timings.measure = lambda configs: None
    page.chooser.timings.of = lambda config: float(sum(config.num_steps_per_scale))
    assert page.chooser.within(page.drawer.config, 9).config.num_steps_per_scale == [6, 3]
    assert page.attention(0.5, *values)[1].count("<img") == 5


def test_page_is_made_of_plain_values(page):
    assert isinstance(page, Page) and page.names == [*REQUEST]
    assert page.values(page.drawer.options(REQUEST)) == list(REQUEST.values())
    assert RESOLUTION <= html.SMALL and "web-pixels" in page.strip(*REQUEST.values())[1]
