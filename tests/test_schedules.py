"""Budgets over time, what a guided step costs, compiled models, and the hub's format."""

import importlib.util
import shutil

import pytest
import torch
from numerics import inputs, randomize
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental import _config as symbols

import models
from common.errors import UserError
from config.options import GenerateConfig
from models import compilation
from models.elit import ELITSiT
from models.sit import SiT
from samplers import BudgetSchedule, euler_maruyama_sampler, euler_sampler, evaluation_times, parse_budget
from sampling import session
from sampling.cost import mean_flops_per_step

BUDGETS = (1.0, 0.5, 0.25, 0.0625)


class Recorder(torch.nn.Module):
    """Zero velocity; remembers (time, batch size, budget) of every call."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, y, inference_budget=None):
        self.calls.append((round(t[0].item(), 6), len(x), inference_budget))
        return torch.zeros_like(x)


def run(sampler=euler_sampler, **options):
    model = Recorder()
    sampler(model, torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]), **options)
    return model.calls


def test_a_schedule_gives_each_step_its_budget():
    schedule = parse_budget("0.25@1.0-0.5,1.0@0.5-0.0")
    calls = run(num_steps=4, inference_budget=schedule)
    assert calls == [(1.0, 2, 0.25), (0.75, 2, 0.25), (0.5, 2, 1.0), (0.25, 2, 1.0)]
    assert schedule.at(0.0) == 1.0 and str(schedule) == "0.25@1.0-0.5,1.0@0.5-0.0"
    assert [b for *_, b in run(num_steps=5, inference_budget=parse_budget("0.5@1-0.2,1@0.2-0"))] == [0.5, 0.5, 0.5, 0.5, 1.0]
    assert [b for *_, b in run(euler_maruyama_sampler, num_steps=3, inference_budget=schedule)] == [0.25, 0.25, 1.0]


def test_guidance_follows_the_schedule():
    schedule = parse_budget("0.25@1.0-0.5,1.0@0.5-0.0")
    assert run(num_steps=2, inference_budget=schedule, cfg_scale=2) == [(1.0, 4, 0.25), (0.5, 4, 1.0)]
    cheap = run(num_steps=2, inference_budget=schedule, cfg_scale=2, unconditional_inference_budget=0.25)
    assert cheap == [(1.0, 4, 0.25), (0.5, 2, 1.0), (0.5, 2, 0.25)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0.25@1.0-0.6,1.0@0.5-0.0", "a gap at 0.6"),
        ("0.25@1.0-0.4,1.0@0.5-0.0", "an overlap at 0.4"),
        ("0.25@0.9-0.0", "a gap at 1"),
        ("0.25@1.0-0.2", "end at 0"),
        ("0.25@0.5-1.0", "later to an earlier"),
        ("0.25@1.0", "BUDGET@START-END"),
        ("half", "must be a number"),
    ],
)
def test_bad_schedules_are_named(text, words):
    with pytest.raises(UserError, match=words):
        BudgetSchedule.parse(text) if "@" in text else parse_budget(text)


def test_the_cost_of_a_step_counts_guidance_schedule_and_corrections():
    with torch.device("meta"):
        model = models.create_model("ELIT-SiT-Ti/2", input_size=16)
    flops = {b: models.count_flops(model, b) for b in BUDGETS}

    def cost(**options):
        config = GenerateConfig(model="ELIT-SiT-Ti/2", num_steps=4, **options)
        return mean_flops_per_step(config, session.guidance(config), model)

    assert cost(cfg_scale=1.0, inference_budget="0.5") == flops[0.5]
    assert cost(cfg_scale=2.0, inference_budget="0.5") == 2 * flops[0.5]
    cheap = cost(cfg_scale=2.0, inference_budget="1.0", unconditional_inference_budget=0.0625)
    assert cheap == flops[1.0] + flops[0.0625]
    part = cost(cfg_scale=2.0, inference_budget="1.0", guidance_low=0.5, guidance_high=0.75)
    assert part == flops[1.0] * 1.5  # two of the four times
    assert cost(cfg_scale=1.0, inference_budget="0.25@1-0.5,1@0.5-0") == (flops[0.25] + flops[1.0]) / 2
    assert cost(cfg_scale=1.0, inference_budget="1.0", heun=True) == flops[1.0] * 7 / 4
    assert len(evaluation_times(4, "sde")) == 4


def test_every_region_compiles_whole_to_at_most_two_graphs(monkeypatch):
    """Over budgets and batch sizes, one of them the number of tokens, in bf16: one graph a region, two of Read and Write (k = 1)."""
    monkeypatch.setattr(symbols, "use_duck_shape", True)
    model = randomize(models.create_model("ELIT-SiT-Ti/2", input_size=8, num_classes=5, elit_group_size=2)).float().eval()
    batches = [inputs(model, [0.3, 0.9], dtype=torch.float32), inputs(model, [0.5] * 16, dtype=torch.float32)]
    budgets = (1.0, 0.75, 0.5, 0.25)  # all of them
    counter = CompileCounter()
    torch._dynamo.reset()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = [model(*batch, inference_budget=b) for b in budgets for batch in batches]
        models.compile_model(model, backend=counter)
        found = [model(*batch, inference_budget=b) for b in budgets for batch in batches]
    regions = 7  # three embedders, block, Read, Write, final layer
    assert counter.frame_count == regions + 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("missing", ["compiler", "Triton"])
def test_without_a_compiler_the_model_runs_as_it_is(missing, monkeypatch, capsys):
    model = models.create_model("SiT-Ti/4", input_size=8, num_classes=5)
    device = torch.device("cuda" if missing == "Triton" else "cpu")
    monkeypatch.setattr(shutil, "which", lambda name: None if missing == "compiler" else name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(compilation, "compiler_problem", lambda _, check=compilation.compiler_problem: check(device))
    models.compile_model(model)
    assert all(part._compiled_call_impl is None for part in model.modules())
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and missing in error and "running without torch.compile" in error


@pytest.mark.parametrize(("name", "cls", "options"), [("SiT-Ti/4", SiT, {"qk_norm": True}), ("ELIT-SiT-Ti/2", ELITSiT, {"elit_tail": "skip"})])  # fmt: skip
def test_pretrained_folders(tmp_path, name, cls, options):
    model = randomize(
        models.create_model(name, input_size=8, num_classes=5, **({"elit_group_size": 2} if cls is ELITSiT else {}), **options)
    )
    model.float().eval().save_pretrained(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = cls.from_pretrained(tmp_path / "model").eval()
    batch = inputs(model, [0.2, 0.8], dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(*batch), model(*batch), rtol=0, atol=0)
