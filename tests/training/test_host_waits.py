"""No training step and no sampler's loop brings a tensor's value to the host: on a GPU each would wait for all that is under way.

By the profiler, which sees what operations do inside, too, but not `tolist` and copies, which are no waits on a CPU; on a GPU
`benchmarks.gpu` asks CUDA itself.
"""

import pytest
import torch
from runs import make_latents, make_vae
from training_runs import arguments

import models
import train
from benchmarks.gpu.waiting import WAITS, host_reads
from config.options import GenerateConfig
from flows import flow_of
from sampling import session
from training import trainer

SMALL = {"depth": 3, "hidden_size": 32, "num_heads": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return make_latents(folder / "set", 16, make_vae(folder / "vae"))


@pytest.fixture
def names(monkeypatch):
    """Models of few blocks: family → name."""
    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))
    registered = {}
    for family in ("SiT", "ELIT-SiT", "DFM-SiT", "DFM-ELIT-SiT"):
        ends = {"head_depth": 1, "tail_depth": 1} if "ELIT" in family else {}
        constructor = models.model_spec(f"{family}-Ti/2").constructor
        registered[family] = models.register(f"{family}-Nano/2", constructor, **SMALL, **ends).name
    return registered


@pytest.mark.parametrize("family", ["SiT", "ELIT-SiT", "DFM-SiT"])
def test_training_steps(family, names, data, tmp_path, monkeypatch):
    found, budgets, train_step = [], set(), trainer.Trainer.train_step

    def watched(self, batches):
        found.extend(host_reads(lambda: train_step(self, batches)))
        budgets.update(name for name, (_, count) in zip(self.stats.names, self.stats.losses.tolist(), strict=True) if count)

    monkeypatch.setattr(trainer.Trainer, "train_step", watched)
    options = ("--gradient-accumulation-steps", 2, "--mixed-precision", "bf16", "--max-train-steps", 2)
    stages = ("--stage-weights", 0.5, 0.5) if family == "DFM-SiT" else ()
    train.main(arguments(data, tmp_path, *options, *stages, model=names[family]))
    assert found == []
    kinds = {name for name in budgets if name.startswith(("loss_budget", "loss_stage"))}
    assert len(kinds) >= (2 if family != "SiT" else 0)


@pytest.mark.parametrize("family", ["ELIT-SiT", "DFM-ELIT-SiT"])
@pytest.mark.parametrize(
    "guided", [{"unconditional_inference_budget": 0.25}, {"guidance_low": 0.3}], ids=["cheap CFG", "interval"]
)
@torch.no_grad()
def test_sampling_with_guidance(family, guided, names):
    model = models.create_model(names[family], input_size=8, num_classes=5, elit_group_size=2).eval()
    config = GenerateConfig(
        model=names[family], ckpt="", num_steps=3, num_steps_per_scale=[2, 1], cfg_scale=2.0, inference_budget="0.5", **guided
    )
    flow, guidance = flow_of(config), session.guidance(config)
    assert host_reads(lambda: flow.sample(model, (4, 8, 8), 0, [0, 7], torch.tensor([1, 4]), guidance)) == []


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: 1 if x.sum() > 0 else 0, lambda x: x.tolist()]
)
def test_waits_are_noticed(wait):
    found = host_reads(lambda: wait(torch.ones(3)))
    assert found and set(found) <= WAITS
