"""Steps that reuse what the core added: against plain loops, for every backbone, and by image index alone."""

import json
from collections import Counter
from functools import partial

import pytest
import runs
import torch
from numerics import randomize
from runs import CLASSES, make_checkpoint, make_vae
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import generate
import models
from common.errors import UserError
from config.options import GenerateConfig
from models.backbone import Backbone, Stream
from models.conditioning import Text
from samplers import Guidance, Pass
from sampling import cost, session
from sampling.core_cache import CachedCore, Call, Drawn, must_run
from sampling.session import Session

LABELS = torch.arange(20) % CLASSES


def network(name: str, **options) -> Backbone:
    options = {"input_size": 16, "hidden_size": 32, "depth": 6, "num_heads": 2, "fused_attn": False} | options
    if "HDiT" in name and "SiT" not in name:
        options = {"input_size": 64, "inner_width": 32, "mapping_width": 16, "head_width": 16, "inner_depth": 4, "levels": 2}
    options |= {"text_width": 5} if "MMDiT" in name else {"num_classes": CLASSES}
    return randomize(models.create_model(name, **options)).float().eval().requires_grad_(False)  # type: ignore[return-value]


def drawing(model: nn.Module, **options) -> Session:
    """A session that needs no VAE."""
    options = {"model": "ELIT-SiT-Ti/2", "num_steps": 6, "cfg_scale": 3.0, "core_cache": 0.1, "cache_rule": "head"} | options
    side = model.input_size
    config = GenerateConfig(**options)
    return Session(config, model, None, None, (4, side, side))  # type: ignore[arg-type]


def latents(drawn: Session, indices) -> torch.Tensor:
    indices = list(indices)
    with torch.inference_mode():
        return drawn.latents(session.guidance(drawn.config), 0, indices, LABELS[indices])


@pytest.fixture(scope="module")
def elit():
    return network("ELIT-SiT-Ti/2", head_depth=2, tail_depth=1)


# ----------------------------------------------------------------------------------------------------- the decisions


def test_the_time_rule_is_a_running_sum():
    changes, budgets = [0.3, 0.3, 0.3, 0.5, 0.1, 0.2, 0.1], [1.0] * 5 + [0.5] * 3
    #            first, 0.3,  0.6 ≥ 0.5, 0.3,  0.8,  budget, 0.2, the last
    assert must_run(budgets, changes, 0.5, {0, 7}) == [True, False, True, False, True, True, False, True]
    assert must_run(budgets, None, 0.5, {0, 7}) == [True, None, None, None, None, True, None, True]
    assert all(must_run(budgets, changes, 0.0, set()))


def blocks_of(model, s, start, stop):
    for block in model.blocks[start:stop]:
        s.x = block(s.x, s.c)


def plain_loop(model, config: GenerateConfig, image: int) -> tuple[torch.Tensor, Counter]:
    """Image by image and pass by pass, from the definition; how often each pass ran its core, or did not."""
    x, y = torch.randn(0), LABELS[[image]]
    x = (
        session.flow_of(config)
        .starting_noise(0, [image], (4, model.input_size, model.input_size), torch.device("cpu"))
        .double()
    )
    kept: dict[str, list] = {}
    ran: Counter = Counter()
    for step in range(config.num_steps):
        t = torch.full((1,), 1 - step / config.num_steps)
        guided = config.guidance_low <= t <= config.guidance_high
        v = {}
        for name, label in {"cond": y, "null": torch.full_like(y, CLASSES)}.items():
            if name == "null" and not guided:
                continue
            s = model.embed(x.float(), t, label)
            blocks_of(model, s, 0, 2)
            time = model.t_embedder(t)
            head, added, since, before = kept.get(name, [None, None, 0.0, None])
            if before is not None:
                since = since + ((time - before).abs().mean() / before.abs().mean()).item()
            change = since if config.cache_rule == "time" else None
            if change is None and head is not None:
                change = ((s.x - head).abs().mean() / head.abs().mean()).item()
            if head is None or step in (0, config.num_steps - 1) or change >= config.core_cache:
                head, since = s.x, 0.0
                grouped, z, tail = model.interface.read(s.x, s.c, 0.5)
                latents = Stream(z, s.c)
                blocks_of(model, latents, 2, 5)
                s.x = model.interface.write(grouped, latents.x, tail)
                added = s.x - head
                ran["run"] += 1
            else:
                s.x = s.x + added
                ran["reuse"] += 1
            kept[name] = [head, added, since, time]
            blocks_of(model, s, 5, 6)
            v[name] = model.output(s).double()
        low = v.get("null", v["cond"])
        x = x - (low + config.cfg_scale * (v["cond"] - low)) / config.num_steps
    return x, ran


@pytest.mark.parametrize(("rule", "threshold"), [("head", 0.2), ("time", 0.1)])
def test_samples_are_those_of_a_plain_loop(elit, rule, threshold):
    options = {
        "core_cache": threshold,
        "cache_rule": rule,
        "inference_budget": "0.5",
        "guidance_low": 0.3,
        "guidance_high": 0.9,
    }
    drawn = drawing(elit, num_steps=7, **options)
    found = latents(drawn, range(3))
    wanted = Counter()
    for i in range(3):
        with torch.no_grad():
            x, ran = plain_loop(elit, drawn.config, i)
        torch.testing.assert_close(found[[i]], x, rtol=1e-4, atol=1e-4)
        wanted += ran
    passes = drawn.drawn.passes
    assert drawn.drawn.images == 3 and passes == {Pass(0.5): wanted["run"], Pass(0.5, reused=True): wanted["reuse"]}
    assert 0.2 < drawn.drawn.share < 0.8
    assert (latents(drawing(elit, **options | {"core_cache": 0.0}), range(3)) - found).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"mode": "sde"}, {"heun": True}], ids=str)
def test_a_threshold_that_nothing_stays_below_changes_no_bit_and_zero_makes_no_cache(elit, options):
    tiny = drawing(elit, core_cache=1e-9, **options)
    off = drawing(elit, core_cache=0.0, **options)
    assert torch.equal(latents(tiny, range(2)), latents(off, range(2)))
    assert tiny.drawn.share == 1 and off.drawn.images == 0 and off.networks(Guidance(), 1)[0] is elit
    # The other extreme: the core runs in the first and last step alone; Heun's first step has two evaluations.
    never = drawing(elit, core_cache=1e4, **options)
    latents(never, range(2))
    assert never.drawn.passes[Pass(None)] == 2 * 2 * (3 if options.get("heun") else 2)


@pytest.mark.parametrize(("rule", "threshold", "count"), [("head", 0.25, 20), ("time", 0.1, 7)])
def test_an_image_depends_on_its_index_alone(elit, rule, threshold, count):
    drawn = drawing(elit, cache_rule=rule, core_cache=threshold, num_steps=5)
    whole = latents(drawn, range(count))
    assert 0.1 < drawn.drawn.share < 0.9
    for size in (1, 7):  # batches; and two processes, that take images in turn
        parts = torch.cat([latents(drawn, range(i, min(i + size, count))) for i in range(0, count, size)])
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-3)
    for rank in range(2):
        torch.testing.assert_close(latents(drawn, range(rank, count, 2)), whole[rank::2], rtol=0, atol=1e-3)


# ----------------------------------------------------------------------------------------------------- every backbone


NAMES = ["SiT-Ti/2", "SiT-UViT-Ti/2", "SiT-HDiT-Ti/2", "U-ViT-Ti/2", "HDiT-Ti/2", "MMDiT-Ti/2"]


@pytest.mark.parametrize("name", [*NAMES, *(f"ELIT-{name}" for name in NAMES)])
def test_rows_that_run_and_rows_that_reuse(name):
    """Where the input has not changed, what is reused is what the model would compute; where it has, the core runs."""
    model = network(name, **({"head_depth": 1, "tail_depth": 1} if "ELIT" in name and name != "ELIT-HDiT-Ti/2" else {}))
    torch.manual_seed(0)
    x, t = torch.randn(3, 4, model.input_size, model.input_size), torch.tensor([0.3, 0.5, 0.7])
    y = Text(torch.randn(3, 4, 5)) if "MMDiT" in name else torch.tensor([0, 1, 2])
    drawn, counted = Drawn(), FlopCounterMode(display=False)
    plan = [Call([0], [Pass(None)], [runs]) for runs in (True, None, None)]
    cached = CachedCore(model, model.core_blocks(), plan, 1e-3, drawn)
    other = torch.stack([x[0], 2 * x[1], x[2]])
    with torch.no_grad():
        torch.testing.assert_close(cached(x, t, y), model(x, t, y), rtol=0, atol=0)
        torch.testing.assert_close(cached(other, t, y), model(other, t, y), rtol=1e-4, atol=1e-4)
        with counted:
            torch.testing.assert_close(cached(x, t, y), model(x, t, y), rtol=1e-4, atol=1e-4)
    assert drawn.passes == {Pass(None): 5, Pass(None, reused=True): 4}
    # The last call: one of three images runs its core, and the plain forward, whose batch projects Read's queries once.
    full, reused = models.count_flops(model), models.count_reused_flops(model)
    if (
        "MMDiT" not in name and name.removeprefix("ELIT-") != "HDiT-Ti/2"
    ):  # other lengths of text in the example; masked attention
        assert counted.get_total_flops() == pytest.approx(4 * full + 2 * reused, rel=2e-3)
    assert reused < 0.9 * full


@pytest.mark.parametrize("rule", ["head", "time"])
def test_flops_are_those_of_what_ran(elit, rule):
    drawn = drawing(elit, cache_rule=rule, core_cache=0.2, num_steps=6, inference_budget="0.25@1.0-0.5,1.0@0.5-0.0")
    drawn.networks(session.guidance(drawn.config), 1)  # embeds the times, once
    with FlopCounterMode(display=False) as counted:
        latents(drawn, range(3))
    # Read's queries are projected once for a batch.
    assert counted.get_total_flops() == pytest.approx(cost.drawn_flops_per_step(drawn, drawn.drawn) * 3 * 6, rel=2e-3)
    assert drawn.drawn.share < 1
    # What is kept: two passes of three images, of 64 tokens of width 32; for `head` also its output.
    assert drawn.drawn.cache_bytes == 2 * 3 * 64 * 32 * 4 * (2 if rule == "head" else 1)


def test_the_core_of_a_mixed_precision_forward(elit):
    drawn = drawing(elit, mixed_precision="bf16", core_cache=0.3)
    assert latents(drawn, range(3)).isfinite().all() and 0 < drawn.drawn.share < 1


# ----------------------------------------------------------------------------------------------------------- generate


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ckpt")
    return make_checkpoint(folder / "0000007.pt", make_vae(folder / "vae"))


def arguments(ckpt, out, *more):
    return [
        *("--ckpt", ckpt, "--sample-dir", out, "--num-fid-samples", 3, "--num-steps", 4, "--cfg-scale", 2),
        *("--core-cache", 0.1, "--cache-rule", "head", *more),
    ]


def test_generation_records_and_reports_the_cache(ckpt, tmp_path, capsys):
    generate.main([str(a) for a in arguments(ckpt, tmp_path)])
    said = capsys.readouterr().out
    assert "the core ran in " in said and " MiB a process" in said
    (folder,) = [p for p in (tmp_path / "made").iterdir() if p.is_dir()]
    assert folder.name.endswith("-cache-0.1-by-head")
    path = folder.with_name(folder.name + ".json")
    record = json.loads(path.read_text())
    assert (record["core_cache"], record["cache_rule"], record["cache_after"]) == (0.1, "head", None)
    path.write_text(json.dumps(record | {"core_cache": 0.2}))
    runs.refused(generate.main, capsys, arguments(ckpt, tmp_path), "made with core_cache 0.2, not 0.1")


def test_bad_input(ckpt, tmp_path, capsys):
    refused = partial(runs.refused, generate.main, capsys)
    refused(arguments(ckpt, tmp_path / "out", "--cache-after", 3), "--cache-after 3", "after its head of 1")
    refused(arguments(ckpt, tmp_path / "out", "--core-cache", -1), "--core-cache: -1", "≥ 0")
    refused(arguments(ckpt, tmp_path / "out", "--cache-rule", "body"), "--cache-rule: 'body'", "time, head")
    record = make_vae(tmp_path / "vae")
    dfm = make_checkpoint(tmp_path / "dfm.pt", record, model="DFM-SiT-Ti/2")
    refused(arguments(dfm, tmp_path / "out"), "--core-cache 0.1", "DFM-SiT-Ti/2", "stage by stage")
    sit = make_checkpoint(tmp_path / "sit.pt", record, model="SiT-Ti/2")
    refused(arguments(sit, tmp_path / "out", "--cache-after", 8), "--cache-after 8", "8 blocks")
    assert not (tmp_path / "out").exists()


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="--cache-after 3: leaves nothing to reuse of 6 blocks, which mirror"):
        network("SiT-UViT-Ti/2").core_blocks(3)
    with pytest.raises(UserError, match=r"--cache-after 0: .*HDiT's inner level"):
        network("HDiT-Ti/2").core_blocks(0)
    assert network("SiT-Ti/2").core_blocks() == range(1, 6) and network("U-ViT-Ti/2").core_blocks(2) == range(2, 5)

    class Timeless(Backbone):
        pass

    model = Timeless(input_size=4, patch_size=2, in_channels=4, num_classes=1, encoder_depth=1)
    with pytest.raises(UserError, match="Timeless model defines no time_embedding"):
        model.time_embedding(torch.zeros(1))
