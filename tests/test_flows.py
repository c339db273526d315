"""The two flows behind one interface, against the formulas; and that nobody else asks which one it is."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from numerics import randomize
from torch import nn

import models
from checkpoint.weights import Weights
from common.errors import UserError
from config.options import GenerateConfig, TrainConfig
from data.dataset import LatentDataset
from experiments_updated import quickstart_report
from flows import DFM, FlowMatching, LossCondition, flow_of
from loss import dfm_loss, flow_matching_loss, stage_times
from models.dfm import decompose, recompose
from models.vae import SD_VAE, VAERecord, sample_latents
from randomness import image_noise, sde_noise, training_draws
from samplers import BudgetSchedule, Guidance, euler_maruyama_sampler

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (2, 8, 8)
FLOWS = {
    "SiT-Ti/2": FlowMatching(time_shift=3.0, path_type="cosine", weighting="lognormal"),
    "DFM-SiT-Ti/4": DFM(stages_count=3, stage_weights=[0.2, 0.3, 0.5], weighting="lognormal"),
}


class Recorder(nn.Module):
    """Velocities that are zero, and what the model was called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, y, **kwargs):
        self.calls.append((x, t, y, kwargs))
        return [torch.zeros_like(s) for s in x][: kwargs["active_stage"] + 1] if "active_stage" in kwargs else x * 0


def tiny(name):
    options = {"elit_group_size": 2} if "ELIT" in name else {}
    stages = {"stages_count": 3} if "DFM" in name else {}
    return randomize(models.create_model(name, input_size=8, in_channels=2, num_classes=5, **options, **stages)).eval()


def test_the_model_chooses_and_options_are_taken_over():
    config = TrainConfig(model="ELIT-SiT-B/2", exp_name="x", path_type="cosine", time_shift=2.0, weighting="lognormal")
    assert flow_of(config) == FlowMatching("ELIT-SiT-B/2", "cosine", "lognormal", 2.0, "ode", 50, False)
    config = GenerateConfig(model="DFM-ELIT-SiT-B/2", num_steps_per_scale=[3, 2], mode="sde")
    assert flow_of(config, stage_weights=[0.5, 0.5]) == DFM(
        "DFM-ELIT-SiT-B/2", mode="sde", num_steps_per_scale=[3, 2], stage_sampling_thresholds=[0.1], stage_weights=[0.5, 0.5]
    )
    for spec in models.MODELS.values():
        assert isinstance(
            flow_of(SimpleNamespace(model=next(n for n, s in models.MODELS.items() if s is spec))), FlowMatching | DFM
        )


def test_flow_matching_loss_and_its_times():
    flow, model = FLOWS["SiT-Ti/2"], Recorder()
    draws = flow.draws(3, 7, range(2, 6), SHAPE)
    x, y = torch.randn(4, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 2, 5])
    losses, times, condition = flow.loss(model, x, draws, y, budget=0.5)
    angle = 2 / np.pi * np.arctan(np.exp(draws.time_normal.double().numpy()))  # a noise level on the cosine path
    t = 3 * angle / (1 + 2 * angle)
    np.testing.assert_allclose(times, t, rtol=1e-6)
    noise, c, s = draws.noise.double(), *(torch.from_numpy(f(np.pi / 2 * t))[:, None, None, None] for f in (np.cos, np.sin))
    ((state, given, labels, kwargs),) = model.calls
    torch.testing.assert_close(state, c * x + s * noise, rtol=1e-5, atol=1e-6)
    assert given is times and labels is y and kwargs == {"inference_budget": 0.5}
    target = np.pi / 2 * (c * noise - s * x)
    torch.testing.assert_close(losses.double(), target.square().mean(dim=(1, 2, 3)), rtol=1e-5, atol=0)
    assert condition == LossCondition(0.5) and condition.metric_suffix == "_budget_0.5"
    assert flow.conditions([None]) == [LossCondition()] and LossCondition().metric_suffix == ""


@pytest.mark.parametrize("n", range(4))
def test_dfm_loss_takes_its_stage_from_the_draws(n):
    flow, model = FLOWS["DFM-SiT-Ti/4"], Recorder()
    draws = flow.draws(3, n, range(4), SHAPE)
    assert [tuple(noise.shape[1:]) for noise in draws.coarse_noise] == [(2, 2, 2), (2, 4, 4)]
    active = int(np.searchsorted([0.2, 0.5], draws.stage, side="right"))
    x, y = torch.randn(4, *SHAPE), torch.tensor([0, 1, 2, 5])
    losses, times, condition = flow.loss(model, x, draws, y)
    assert condition == LossCondition(None, active) and condition.metric_suffix == f"_stage_{active}"
    torch.testing.assert_close(times, torch.sigmoid(draws.time_normal), rtol=0, atol=0)
    ((states, given, _, kwargs),) = model.calls
    assert kwargs == {"active_stage": active} and torch.equal(given[:, active], times)
    targets = [n - s for s, n in zip(decompose(x, 3), [*draws.coarse_noise, draws.noise], strict=True)]
    wanted = sum(v.square().mean(dim=(1, 2, 3)) for v in targets[: active + 1])
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=0)
    assert all(not s.any() for s in states[active + 1 :])


def test_conditions_are_all_budgets_and_stages():
    conditions = FLOWS["DFM-SiT-Ti/4"].conditions([1.0, 0.5])
    assert [c.metric_suffix for c in conditions] == [f"_budget_{b}_stage_{s}" for b in ("1", "0.5") for s in range(3)]


def test_empty_draws_have_the_shapes_of_real_ones():
    for flow in FLOWS.values():
        real, empty = flow.draws(0, 0, range(3), SHAPE), flow.empty_draws(3, SHAPE)
        for name, value in vars(real).items():
            pairs = (
                zip(value, getattr(empty, name), strict=True) if isinstance(value, list) else [(value, getattr(empty, name))]
            )
            assert all(a.shape == b.shape for a, b in pairs if isinstance(a, torch.Tensor)), name


# ------------------------------------------------------------------------------------------------------ held-out losses


@pytest.mark.parametrize("name", ["ELIT-SiT-Ti/2", "DFM-ELIT-SiT-Ti/4"])
def test_held_out_losses_depend_on_the_sample_and_its_index_alone(name):
    flow, model = FLOWS[name.replace("ELIT-", "")], tiny(name)
    moments = torch.from_numpy(np.random.default_rng(2).random((6, 4, 8, 8))).float()
    batch, conditions = {"moments": moments, "label": torch.tensor([0, 1, 2, 3, 0, 1])}, flow.conditions([0.25, None])
    whole = flow.val_losses(model, batch, range(10, 16), SD_VAE, conditions)
    assert whole.shape == (len(conditions), 6) and not whole.requires_grad and (whole[0] != whole[-1]).all()
    torch.manual_seed(1234)
    parts = [
        flow.val_losses(model, {k: v[a:b] for k, v in batch.items()}, range(10 + a, 10 + b), SD_VAE, conditions)
        for a, b in ((0, 1), (1, 4), (4, 6))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    assert (flow.val_losses(model, batch, range(11, 17), SD_VAE, conditions) != whole).all()


def test_held_out_losses_use_one_noise_and_shifted_times_at_every_condition():
    record = VAERecord("a", None, 8, 2, 0.5, 0.25)
    mean = torch.rand(2, *SHAPE)
    moments, x = torch.cat([mean, torch.zeros_like(mean)], dim=1), (mean - 0.25) * 0.5
    draws = training_draws(0, 0, range(2), SHAPE, purpose="held-out")
    model, flow = Recorder(), FlowMatching(time_shift=4.0)
    losses = flow.val_losses(
        model, {"moments": moments, "label": torch.tensor([1, 2])}, range(2), record, flow.conditions([None, 0.5])
    )
    t = 4 * draws.time_uniform / (1 + 3 * draws.time_uniform)
    for state, given, _, kwargs in model.calls:
        torch.testing.assert_close(given, t)
        at = t[:, None, None, None]
        torch.testing.assert_close(state, (1 - at) * x + at * draws.noise)
        assert kwargs in ({}, {"inference_budget": 0.5})
    torch.testing.assert_close(losses[0], (draws.noise - x).square().mean(dim=(1, 2, 3)))
    assert torch.equal(losses[0], losses[1])


@pytest.mark.parametrize("name", ["ELIT-SiT-Ti/2", "DFM-ELIT-SiT-Ti/2"])
def test_the_quick_starts_report_measures_at_the_times_and_stages_of_training(name, tmp_path):
    shift = 1.0 if "DFM" in name else 3.0
    record = runs.make_vae(tmp_path / "vae")
    data = runs.make_latents(tmp_path / "data", 3, record)
    model = randomize(models.create_model(name, input_size=8, num_classes=5, elit_group_size=2)).eval()
    config = quickstart_report.ReportConfig(model=name, val_data_dir=str(data), budgets=[0.25, 1.0], time_shift=shift)
    loaded, weights = SimpleNamespace(model=model, device=torch.device("cpu")), Weights({}, {"weighting": "lognormal"}, record)
    found = quickstart_report.held_out_losses(config, loaded, weights)
    wanted = np.zeros((2, 3))
    batch = torch.utils.data.default_collate(LatentDataset(data).__getitems__([0, 1, 2]))
    for repeat in range(2):
        places = range(3 * repeat, 3 * repeat + 3)
        draws = training_draws(0, 0, places, (4, 8, 8), "held-out", [(4, 4, 4)] if "DFM" in name else [])
        x = sample_latents(batch["moments"], draws.posterior, record)
        t = torch.sigmoid(draws.time_normal)
        t = shift * t / (1 + (shift - 1) * t)
        for i, budget in enumerate(config.budgets):
            with torch.no_grad():
                if "DFM" in name:
                    arguments = model, x, [*draws.coarse_noise, draws.noise]
                    losses = [
                        dfm_loss(
                            *arguments,
                            stage_times(t, draws.stage_normal, s),
                            batch["label"],
                            "linear",
                            s,
                            inference_budget=budget,
                        )
                        for s in range(2)
                    ]
                else:
                    losses = [flow_matching_loss(model, x, draws.noise, t, batch["label"], "linear", inference_budget=budget)]
            wanted[i] += np.mean([loss.numpy() for loss in losses], axis=0) / 2
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- sampling


def test_a_state_is_views_latents_and_previews():
    flow, model = DFM(stages_count=3, num_steps_per_scale=[2, 1, 2], stage_sampling_thresholds=[0.4, 0.2]), tiny("DFM-SiT-Ti/4")
    stages = []
    arguments = model, SHAPE, 5, [3, 9], torch.tensor([1, 2]), Guidance(cfg_scale=2.0)
    state = flow.sample_state(*arguments, on_stage=lambda stage, latents: stages.append((stage, tuple(latents.shape))))
    assert stages == [(0, (2, 2, 2, 2)), (1, (2, 2, 4, 4))]
    assert flow.preview_sides(64) == {0: 16, 1: 32}
    torch.testing.assert_close(flow.sample(*arguments), recompose(state), rtol=0, atol=0)
    noise = flow.starting_noise(5, [9], SHAPE, torch.device("cpu"))
    assert torch.equal(noise[0], image_noise(5, [9], (2, 2, 2), level=2)) and torch.equal(noise[2], image_noise(5, [9], SHAPE))
    assert flow.num_views == 4 and flow.total_steps == 5 and len(flow.evaluations()) == 5
    assert FlowMatching().num_views == 1 and FlowMatching().preview_sides(64) == {}


def test_sde_noise_is_that_of_the_images():
    flow, model, y = FlowMatching(mode="sde", num_steps=3), tiny("SiT-Ti/2"), torch.tensor([1, 2])
    found = flow.sample(model, SHAPE, 5, [3, 9], y, Guidance())
    noise = image_noise(5, [3, 9], SHAPE)
    wanted = euler_maruyama_sampler(
        model, noise, y, num_steps=3, noise=lambda step, shape: sde_noise(5, [3, 9], step, shape[1:])
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("name", "heun"), [("SiT-Ti/2", False), ("SiT-Ti/2", True), ("DFM-SiT-Ti/4", False)])
def test_evaluations_are_those_of_the_sampler(name, heun):
    """As many forwards as `evaluations` says, at those times; one `evaluate` is one of them."""
    flow = flow_of(SimpleNamespace(model=name, num_steps=3, heun=heun, stages_count=3, num_steps_per_scale=[2, 1, 1],
                                   stage_sampling_thresholds=[0.5, 0.2]))  # fmt: skip
    model, calls = tiny(name), []
    model.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[1][0].tolist()))
    flow.sample(model, SHAPE, 0, [0], torch.tensor([1]), Guidance())
    times = [list(times) + [1.0] * (3 - len(times)) if "DFM" in name else times[0] for times in flow.evaluations()]
    assert len(calls) == len(times)
    np.testing.assert_allclose(np.sort(np.array(calls), axis=0), np.sort(np.array(times), axis=0), rtol=1e-6)
    calls.clear()
    noise = flow.starting_noise(0, [0], SHAPE, torch.device("cpu"))
    flow.evaluate(model, noise, flow.evaluations()[-1], torch.tensor([1]), Guidance())
    np.testing.assert_allclose(calls, times[-1:], rtol=1e-6)
    flow.forward(model, noise, torch.tensor([1]), None)
    assert np.unique(calls[-1]) == [0.5] and len(calls) == 2


def test_a_schedule_of_budgets_reaches_the_model():
    flow, model, seen = FlowMatching(num_steps=2), tiny("ELIT-SiT-Ti/2"), []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["inference_budget"]), with_kwargs=True)
    flow.sample(
        model, SHAPE, 0, [0], torch.tensor([1]), Guidance(inference_budget=BudgetSchedule.parse("0.25@1.0-0.5,1.0@0.5-0.0"))
    )
    assert seen == [0.25, 1.0]


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("flow", "kind", "words"),
    [
        (FlowMatching(heun=True, mode="sde"), "sampling", "--heun"),
        (DFM("DFM-SiT-B/2", heun=True), "sampling", "--heun: DFM-SiT-B/2"),
        (DFM("DFM-SiT-B/2", mode="sde"), "sampling", "--mode sde: DFM-SiT-B/2"),
        (DFM(num_steps_per_scale=[3]), "sampling", "2 whole numbers"),
        (DFM(stage_weights=[1.0]), "training", "--stage-weights 1: 2 stages need 2 weights"),
        (DFM(stage_weights=[0.5, 0.4]), "training", "sum to 1, not 0.9"),
        (DFM(time_shift=2.0), "training", "--time-shift 2"),
        (DFM(stage_sampling_thresholds=[0.2, 0.1]), "training", "2 stages need 1"),
    ],
)
def test_what_a_flow_cannot_do_is_refused(flow, kind, words):
    with pytest.raises(UserError, match=re.escape(words)):
        getattr(flow, f"check_{kind}")()


def test_defaults_pass_their_own_checks():
    for flow in (FlowMatching(), DFM()):
        flow.check_training()
        flow.check_sampling()


def test_nobody_else_asks_what_kind_of_model_it_is():
    asks = re.compile(r"staged|stage_shapes|coarse_shapes|isinstance\(noise, list\)")
    files = [
        p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in ("models", "tests", "flows.py", ".venv", "build")
    ]
    assert len(files) > 40
    assert [str(p) for p in files if asks.search(p.read_text(encoding="utf-8"))] == []
