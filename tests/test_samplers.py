"""Samplers against NumPy loops and exact solutions for Gaussian data, and which calls guidance makes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
from common.errors import UserError
from config.options import GenerateConfig
from flows import flow_of
from samplers import Guidance, euler_maruyama_sampler, euler_sampler, guided_velocity, score_from_velocity
from sampling import session

PATHS = {
    "linear": lambda t: SimpleNamespace(a=1 - t, s=t, da=-1.0, ds=1.0),
    "cosine": lambda t: SimpleNamespace(
        a=math.cos(math.pi * t / 2),
        s=math.sin(math.pi * t / 2),
        da=-math.pi / 2 * math.sin(math.pi * t / 2),
        ds=math.pi / 2 * math.cos(math.pi * t / 2),
    ),
}
MEANS = (0.5, -1.0, 2.0, 0.1)  # of the data of each class; the last row is the null label's
STD = 0.7
NOISE = np.random.default_rng(0).standard_normal((4, 2, 3, 3))
LABELS = np.array([0, 1, 2, 1])


def gaussian_velocity(x, t, mean, path_type="linear", scale=1.0):
    """Velocity E[α′·x₀ + σ′·ε | x_t = x] of data that are N(mean, STD²)."""
    p = PATHS[path_type](t)
    variance = p.a**2 * STD**2 + p.s**2
    off = x - p.a * mean
    return scale * (p.da * (mean + p.a * STD**2 / variance * off) + p.ds * p.s / variance * off)


def means_of(y):
    return np.array(MEANS)[np.asarray(y)][:, None, None, None]


class GaussianModel(nn.Module):
    """The exact velocity for the mean of each label, times the budget; keeps a record of its calls."""

    num_classes = 3

    def __init__(self, path_type="linear", dtype=torch.float64, means=MEANS):
        super().__init__()
        self.means = nn.Parameter(torch.tensor(means, dtype=dtype))
        self.path_type, self.calls = path_type, []

    def forward(self, x, t, y, inference_budget=None):
        assert x.dtype == self.means.dtype and t.shape == y.shape == x.shape[:1] and (t == t[0]).all()
        self.calls.append(SimpleNamespace(t=t[0].item(), y=y.tolist(), budget=inference_budget, t_dtype=t.dtype))
        mean = self.means[y][:, None, None, None].double()
        scale = 1.0 if inference_budget is None else inference_budget
        return gaussian_velocity(x.double(), t[0].item(), mean, self.path_type, scale).to(x.dtype)


def sample(sampler, model, **options):
    return sampler(model, torch.from_numpy(NOISE), torch.from_numpy(LABELS), **options)


# ---------------------------------------------------------------------------------------------------- NumPy loops


def numpy_ode(velocity, steps, heun):
    x = NOISE.copy()
    for i in range(steps):
        t, t_next = (steps - i) / steps, (steps - i - 1) / steps
        v = velocity(x, t)
        if heun and i < steps - 1:
            v = 0.5 * (v + velocity(x - v / steps, t_next))
        x = x - v / steps
    return x


def numpy_sde(velocity, steps, noises, path_type):
    """Euler–Maruyama for dx = (v − w/2·score)dt + √w dW̄ with w = 2t, backwards from 1 to 0.04, and a last step without noise."""
    x = NOISE.copy()
    times = [1 - 0.96 * i / (steps - 1) for i in range(steps)] + [0.0]
    for i in range(steps):
        t, dt = times[i], times[i + 1] - times[i]
        p, v, w = PATHS[path_type](t), velocity(x, t), 2 * t
        ratio = p.a / p.da
        score = (ratio * v - x) / (p.s**2 - ratio * p.ds * p.s)
        x = x + (v - 0.5 * w * score) * dt
        if i < steps - 1:
            x = x + math.sqrt(w * -dt) * noises[i]
    return x


@pytest.mark.parametrize("path_type", PATHS)
@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_ode_sampler_is_the_numpy_loop(steps, heun, path_type):
    found = sample(euler_sampler, GaussianModel(path_type), num_steps=steps, heun=heun, path_type=path_type)
    wanted = numpy_ode(lambda x, t: gaussian_velocity(x, t, means_of(LABELS), path_type), steps, heun)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path_type", PATHS)
@pytest.mark.parametrize("steps", [2, 3, 25])
def test_sde_sampler_is_the_numpy_loop(steps, path_type):
    noises = np.random.default_rng(1).standard_normal((steps, *NOISE.shape))
    asked = []

    def noise(step, shape):
        asked.append((step, tuple(shape)))
        return torch.from_numpy(noises[step])

    found = sample(euler_maruyama_sampler, GaussianModel(path_type), num_steps=steps, path_type=path_type, noise=noise)
    wanted = numpy_sde(lambda x, t: gaussian_velocity(x, t, means_of(LABELS), path_type), steps, noises, path_type)
    assert found.dtype == torch.float64 and asked == [(i, NOISE.shape) for i in range(steps - 1)]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-11)


def test_guided_samplers_are_the_numpy_loops():
    def velocity(x, t):
        guided = 0.3 <= t <= 0.8
        v, v_low = (gaussian_velocity(x, t, mean) for mean in (means_of(LABELS), MEANS[3]))
        return v_low + 2.5 * (v - v_low) if guided else v

    options = {"cfg_scale": 2.5, "guidance_low": 0.3, "guidance_high": 0.8}
    for heun in (False, True):
        found = sample(euler_sampler, GaussianModel(), num_steps=9, heun=heun, **options)
        np.testing.assert_allclose(found, numpy_ode(velocity, 9, heun), rtol=0, atol=1e-12)
    noises = np.random.default_rng(2).standard_normal((9, *NOISE.shape))
    found = sample(
        euler_maruyama_sampler, GaussianModel(), num_steps=9, noise=lambda i, _: torch.from_numpy(noises[i]), **options
    )
    np.testing.assert_allclose(found, numpy_sde(velocity, 9, noises, "linear"), rtol=0, atol=1e-11)


# ------------------------------------------------------------------------------------------------- exact solutions


def ode_error(steps, heun, path_type):
    """At t = 0 the flow of Gaussian data gives mean + STD·(noise − α(1)·mean), and α(1) = 0."""
    found = sample(euler_sampler, GaussianModel(path_type), num_steps=steps, heun=heun, path_type=path_type)
    return np.abs(found.numpy() - (means_of(LABELS) + STD * NOISE)).max()


@pytest.mark.parametrize("path_type", PATHS)
@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_ode_sampler_converges_to_the_exact_flow_with_its_order(heun, order, path_type):
    errors = [ode_error(steps, heun, path_type) for steps in (80, 160, 320)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, order, rtol=0, atol=0.1)
    assert errors[-1] < (1e-2 if order == 1 else 1e-4)


@pytest.mark.parametrize("path_type", PATHS)
def test_sde_sampler_reaches_the_distribution_of_the_data(path_type):
    rng = np.random.default_rng(3)
    start = torch.from_numpy(rng.standard_normal((1, 1, 200, 200)))
    found = euler_maruyama_sampler(
        GaussianModel(path_type), start, torch.tensor([2]), num_steps=100, path_type=path_type,
        noise=lambda step, shape: torch.from_numpy(rng.standard_normal(shape)),
    )  # fmt: skip
    assert found.mean().item() == pytest.approx(MEANS[2], abs=0.02)
    assert found.std().item() == pytest.approx(STD, abs=0.03)
    # In z = (x − α·mean)/√Σ, Σ = α²·STD² + σ², the SDE is dz = −w/(2Σ)·z dτ + √(w/Σ) dW: it forgets its start at that rate.
    rate = quad(lambda t: t / (PATHS[path_type](t).a ** 2 * STD**2 + PATHS[path_type](t).s ** 2), 0, 1)[0]
    assert np.corrcoef(found.flatten(), start.flatten())[0, 1] == pytest.approx(math.exp(-rate), abs=0.02)


@pytest.mark.parametrize("path_type", PATHS)
@pytest.mark.parametrize("t", [0.04, 0.3, 0.77, 1.0])
def test_score_from_velocity_is_the_score_of_a_gaussian(t, path_type):
    p, mean = PATHS[path_type](t), means_of(LABELS)
    velocity = gaussian_velocity(NOISE, t, mean, path_type)
    found = score_from_velocity(torch.from_numpy(velocity), torch.from_numpy(NOISE), t, path_type)
    np.testing.assert_allclose(found, -(NOISE - p.a * mean) / (p.a**2 * STD**2 + p.s**2), rtol=0, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_float64_and_the_model_keeps_its_own_precision(dtype):
    model = GaussianModel(dtype=dtype)  # which asserts the dtype of its input
    found = sample(euler_sampler, model, num_steps=10, cfg_scale=2.0)
    exact = sample(euler_sampler, GaussianModel(), num_steps=10, cfg_scale=2.0)
    assert found.dtype == torch.float64 and all(call.t_dtype == torch.float32 for call in model.calls)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_samplers_leave_no_gradient_and_the_noise_untouched():
    start = torch.from_numpy(NOISE.copy()).requires_grad_()
    for sampler in (euler_sampler, euler_maruyama_sampler):
        assert not sampler(GaussianModel(), start, torch.from_numpy(LABELS), num_steps=3).requires_grad
    assert np.array_equal(start.detach().numpy(), NOISE)


# ----------------------------------------------------------------------------------------------------------- guidance

Y, NULL = LABELS.tolist(), [3] * 4


def calls_of(sampler=euler_sampler, **options):
    model = GaussianModel()
    sample(sampler, model, **options)
    return [(round(c.t, 12), c.y, c.budget) for c in model.calls]


def test_unguided_sampling_makes_one_conditional_call_per_step():
    for options in ({}, {"unconditional_inference_budget": 0.5}, {"cfg_scale": 3.0, "guidance_low": 0.3, "guidance_high": 0.4}):
        assert calls_of(num_steps=2, inference_budget=0.75, **options) == [(1.0, Y, 0.75), (0.5, Y, 0.75)]
    assert calls_of(num_steps=1) == [(1.0, Y, None)]


@pytest.mark.parametrize("budgets", [(None, None), (0.5, None), (0.5, 0.5)])
def test_cfg_makes_one_doubled_call_at_the_same_budget(budgets):
    found = calls_of(num_steps=2, cfg_scale=2.0, inference_budget=budgets[0], unconditional_inference_budget=budgets[1])
    assert found == [(t, Y + NULL, budgets[0]) for t in (1.0, 0.5)]


@pytest.mark.parametrize("budget", [None, 1.0])
def test_cheap_cfg_calls_the_null_label_at_the_lower_budget(budget):
    found = calls_of(num_steps=2, cfg_scale=2.0, inference_budget=budget, unconditional_inference_budget=0.25)
    for step, t in enumerate((1.0, 0.5)):
        assert sorted(found[2 * step : 2 * step + 2], key=str) == sorted([(t, Y, budget), (t, NULL, 0.25)], key=str)
    assert len(found) == 4


@pytest.mark.parametrize("budget", [None, 1.0])
def test_autoguidance_calls_the_same_label_at_the_lower_budget(budget):
    options = {"cfg_scale": 2.0, "autoguidance": True, "inference_budget": budget, "unconditional_inference_budget": 0.25}
    found = calls_of(num_steps=2, **options)
    for step, t in enumerate((1.0, 0.5)):
        assert sorted(found[2 * step : 2 * step + 2], key=str) == sorted([(t, Y, budget), (t, Y, 0.25)], key=str)
    assert len(found) == 4


@pytest.mark.parametrize(
    ("options", "low"),
    [
        ({}, lambda x, t: gaussian_velocity(x, t, MEANS[3], scale=0.75)),
        ({"unconditional_inference_budget": 0.25}, lambda x, t: gaussian_velocity(x, t, MEANS[3], scale=0.25)),
        (
            {"unconditional_inference_budget": 0.25, "autoguidance": True},
            lambda x, t: gaussian_velocity(x, t, means_of(LABELS), scale=0.25),
        ),
    ],
    ids=["cfg", "cheap-cfg", "autoguidance"],
)
def test_guided_velocity_starts_from_the_low_one(options, low):
    guidance = Guidance(cfg_scale=3.0, inference_budget=0.75, **options)
    x, t = torch.from_numpy(NOISE), 0.4
    found = guided_velocity(GaussianModel(), x, t, torch.from_numpy(LABELS), guidance).detach()
    conditional = gaussian_velocity(NOISE, t, means_of(LABELS), scale=0.75)
    v_low = low(NOISE, t)
    np.testing.assert_allclose(found, v_low + 3.0 * (conditional - v_low), rtol=0, atol=1e-12)


@pytest.mark.parametrize("label", ["same", "none"])
@pytest.mark.parametrize("channels", [None, 1])
def test_another_network_guides_and_only_the_first_channels(label, channels):
    """Its own means, at its own budget; one class fewer, so that its null label is another."""
    means = (1.0, 0.2, -0.3, 0.6)
    guide = GaussianModel(means=means if label == "same" else means[:3], dtype=torch.float32)
    guide.num_classes = len(guide.means) - 1
    guidance = Guidance(
        3.0, inference_budget=0.75, guide_label=label, guide_budget=0.5, guide=guide, cfg_channels=channels, guidance_high=0.5
    )
    guidance.check()
    model, y = GaussianModel(), torch.from_numpy(LABELS)
    found = guided_velocity(model, torch.from_numpy(NOISE), 0.4, y, guidance).detach()
    of = np.array(means)[LABELS if label == "same" else [2] * 4][:, None, None, None]
    conditional, v_low = (
        gaussian_velocity(NOISE, 0.4, means_of(LABELS), scale=0.75),
        gaussian_velocity(NOISE, 0.4, of, scale=0.5),
    )
    wanted = v_low + 3.0 * (conditional - v_low)
    if channels is not None:
        wanted[:, channels:] = conditional[:, channels:]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)  # the guide's precision
    assert [(c.y, c.budget) for c in (*model.calls, *guide.calls)] == [(Y, 0.75), (Y if label == "same" else [2] * 4, 0.5)]
    guided_velocity(model, torch.from_numpy(NOISE), 0.6, y, guidance)  # outside of the interval
    assert (len(model.calls), len(guide.calls)) == (2, 1)


@pytest.mark.parametrize(
    ("low", "high"), [(0.2, 0.3), (0.3, 0.3), (0.0, 0.2), (0.7, 1.0), (0.15, 0.85), (0.4, 0.6), (0.1, 0.9)]
)
def test_guidance_interval_includes_both_ends(low, high):
    found = calls_of(num_steps=10, cfg_scale=2.0, guidance_low=low, guidance_high=high)
    tenths = range(10, 0, -1)
    assert found == [(n / 10, Y + NULL if low <= n / 10 <= high else Y, None) for n in tenths]


def test_guidance_interval_is_tested_at_the_time_of_each_evaluation_of_heun():
    found = calls_of(num_steps=4, heun=True, cfg_scale=2.0, guidance_low=0.5, guidance_high=0.75)
    both = Y + NULL
    wanted = [(1.0, Y), (0.75, both), (0.75, both), (0.5, both), (0.5, both), (0.25, Y), (0.25, Y)]
    assert found == [(t, y, None) for t, y in wanted]  # no correction on the last step


def test_guidance_interval_of_the_sde_includes_its_last_point():
    found = calls_of(euler_maruyama_sampler, num_steps=4, cfg_scale=2.0, guidance_low=0.04, guidance_high=0.36)
    assert found == [(1.0, Y, None), (0.68, Y, None), (0.36, Y + NULL, None), (0.04, Y + NULL, None)]


@pytest.mark.parametrize("sampler", [euler_sampler, euler_maruyama_sampler])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cfg_scale": 0.99}, "cfg_scale"),
        ({"cfg_scale": math.nan}, "cfg_scale"),
        ({"cfg_scale": 2.0, "autoguidance": True}, "unconditional_inference_budget"),
        ({"cfg_scale": 2.0, "guide_label": "same", "unconditional_inference_budget": 0.5}, "guide_budget"),
        ({"cfg_scale": 2.0, "guidance_low": 0.6, "guidance_high": 0.5}, "guidance_low"),
        ({"cfg_scale": 2.0, "guidance_high": 1.5}, "guidance_high"),
        ({"num_steps": 0}, "num_steps"),
    ],
)
def test_wrong_sampling_options_are_refused_before_any_forward(sampler, options, said):
    model = GaussianModel()
    with pytest.raises(UserError, match=said):
        sample(sampler, model, **({"num_steps": 4} | options))
    assert model.calls == []


def test_default_noise_of_the_sde_belongs_to_images_and_steps():
    whole = sample(euler_maruyama_sampler, GaussianModel(), num_steps=5)
    assert torch.equal(whole, sample(euler_maruyama_sampler, GaussianModel(), num_steps=5))
    first = euler_maruyama_sampler(GaussianModel(), torch.from_numpy(NOISE[:2]), torch.from_numpy(LABELS[:2]), num_steps=5)
    torch.testing.assert_close(first, whole[:2], rtol=0, atol=1e-12)
    without = sample(euler_maruyama_sampler, GaussianModel(), num_steps=5, noise=lambda step, shape: torch.zeros(shape))
    assert (whole - without).abs().min() > 0


# ------------------------------------------------------------------------------------------------- host and device


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for the device. The meta device stands for it: it has no values, so PyTorch itself refuses
    to bring any to the host (`item`, `nonzero`, a branch on a tensor, a copy); copies to the device must not block."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in tree_leaves((args, kwargs, out)) if isinstance(a, torch.Tensor)]
        copies = func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy)
        hosts = [a for a in tensors if a.device.type == "cpu" and (copies or a.dim() > 0)]  # a scalar is a kernel's argument
        if hosts and any(a.device.type == "meta" for a in tensors):
            assert copies and (kwargs or {}).get("non_blocking"), func
        return out


class NoNewTensors(TorchFunctionMode):
    """Fails where Python numbers become a tensor on the device, which is a copy that blocks."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor) or torch.device((kwargs or {}).get("device") or "cpu").type == "cpu"
        return func(*args, **(kwargs or {}))


CHEAP = {"cfg_scale": 2.0, "unconditional_inference_budget": 0.25}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ELIT-SiT-Ti/2", {}),
        ("ELIT-SiT-Ti/2", {"heun": True}),
        ("ELIT-SiT-Ti/2", {"mode": "sde"}),
        ("ELIT-SiT-Ti/2", {"mode": "sde", "path_type": "cosine"}),
        ("DFM-ELIT-SiT-Ti/2", {"num_steps_per_scale": [2, 1]}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "guided",
    [
        {},
        {"cfg_scale": 2.0, "guidance_low": 0.3, "guidance_high": 0.7},
        {"inference_budget": "0.5", **CHEAP},
        {"inference_budget": "0.5", **CHEAP, "autoguidance": True},
        {"inference_budget": "0.25@1.0-0.5,1.0@0.5-0.0", **CHEAP},
    ],
    ids=str,
)
def test_the_host_never_waits_for_the_device(name, options, guided):
    with torch.device("meta"):
        small = {"input_size": 8, "num_classes": 5, "depth": 3, "head_depth": 1, "tail_depth": 1}
        model = models.create_model(name, elit_group_size=2, **small).eval()
    config = GenerateConfig(model=name, num_steps=3, **({"cfg_scale": 1.0} | options | guided))
    labels = torch.tensor([1, 4])
    with NoWaiting(), NoNewTensors():
        latents = flow_of(config).sample(model, (4, 8, 8), 0, [0, 7], labels, session.guidance(config))
    assert latents.device.type == "meta" and latents.shape == (2, 4, 8, 8) and latents.dtype == torch.float64


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: 1 if x.sum() > 0 else 0,
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: torch.zeros(3).to(x),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
    ],
)
def test_waiting_is_noticed(wait):
    with NoWaiting(), NoNewTensors(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        wait(torch.empty(3, device="meta"))
