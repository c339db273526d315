"""Interpolants, training times, label dropout and the flow-matching loss."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numerics import randomize
from scipy import stats

from loss import Projecting, alignment_loss, drop_conditions, flow_matching_loss, interpolant, training_times
from models.conditioning import Text
from models.elit import ELITSiT
from randomness import Draws, training_draws

T = torch.linspace(0, 1, 41, dtype=torch.float64)


def draws_of(**known):
    """Draws of which only the given fields are used."""
    numbers = {"level": 0.0, "stage": 0.0, "coarse_noise": []}
    return Draws(**(dict.fromkeys((f.name for f in dataclasses.fields(Draws)), torch.zeros(1)) | numbers | known))


# ----------------------------------------------------------------------------------------------------- interpolants


@pytest.mark.parametrize(
    ("path_type", "alpha", "sigma"),
    [
        ("linear", lambda t: 1 - t, lambda t: t),
        ("cosine", lambda t: np.cos(np.pi * t / 2), lambda t: np.sin(np.pi * t / 2)),
    ],
)
def test_interpolant_has_the_values_of_its_path_and_their_derivatives(path_type, alpha, sigma):
    path, t, h = interpolant(T, path_type), T.numpy(), 1e-5
    np.testing.assert_allclose(path.alpha, alpha(t), rtol=0, atol=1e-15)
    np.testing.assert_allclose(path.sigma, sigma(t), rtol=0, atol=1e-15)
    np.testing.assert_allclose(path.d_alpha, (alpha(t + h) - alpha(t - h)) / (2 * h), rtol=0, atol=1e-9)
    np.testing.assert_allclose(path.d_sigma, (sigma(t + h) - sigma(t - h)) / (2 * h), rtol=0, atol=1e-9)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_path_goes_from_data_to_noise(path_type):
    path = interpolant(torch.tensor([0.0, 1.0], dtype=torch.float64), path_type)
    np.testing.assert_allclose(path.alpha, [1, 0], rtol=0, atol=1e-15)
    np.testing.assert_allclose(path.sigma, [0, 1], rtol=0, atol=1e-15)


# ------------------------------------------------------------------------------------------------------------ times


def test_uniform_times_are_the_uniform_draws():
    u = torch.rand(7)
    for path_type in ("linear", "cosine"):
        assert torch.equal(training_times(draws_of(time_uniform=u), "uniform", path_type), u)


@pytest.mark.parametrize(
    ("path_type", "time"),
    [("linear", lambda s: s / (1 + s)), ("cosine", lambda s: 2 / np.pi * np.arctan(s))],
)
def test_lognormal_times_put_their_noise_level_on_the_path(path_type, time):
    n = np.linspace(-6, 6, 49)
    t = training_times(draws_of(time_normal=torch.from_numpy(n)), "lognormal", path_type)
    np.testing.assert_allclose(t, time(np.exp(n)), rtol=1e-12)
    path = interpolant(t, path_type)
    np.testing.assert_allclose(path.sigma / path.alpha, np.exp(n), rtol=1e-9)  # what lognormal means


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_lognormal_times_have_the_median_one_half_and_their_quantiles(path_type):
    t = training_times(training_draws(3, 0, range(2000), (1, 1, 1)), "lognormal", path_type).double().numpy()
    sigma = t / (1 - t) if path_type == "linear" else np.tan(np.pi * t / 2)
    assert stats.kstest(sigma, stats.lognorm(s=1).cdf).pvalue > 1e-3


# ----------------------------------------------------------------------------------------------------------- labels


def test_labels_are_dropped_where_the_draw_is_below_the_probability():
    model = SimpleNamespace(num_classes=10)
    y, drop = torch.tensor([3, 0, 9, 5]), torch.tensor([0.05, 0.1, 0.0999, 0.9])
    assert drop_conditions(model, y, draws_of(label_drop=drop), 0.1).tolist() == [10, 0, 10, 5]
    assert drop_conditions(model, y, draws_of(label_drop=drop), 0.0).tolist() == [3, 0, 9, 5]
    assert drop_conditions(model, y, draws_of(label_drop=drop), 1.0).tolist() == [10] * 4
    assert drop_conditions(model, y, draws_of(label_drop=drop), 0.1).dtype == torch.int64


def test_prompts_are_dropped_for_the_null_text():
    class TextModel:
        def null(self, y):
            return Text(torch.full_like(y.features, -1), None)

    text = Text(torch.rand(4, 3, 2))
    dropped = drop_conditions(TextModel(), text, draws_of(label_drop=torch.tensor([0.05, 0.5, 0.0, 0.2])), 0.1)
    assert isinstance(dropped, Text)
    assert (dropped.features[[0, 2]] == -1).all() and torch.equal(dropped.features[[1, 3]], text.features[[1, 3]])


def test_the_share_of_dropped_labels_is_the_probability():
    draws = training_draws(0, 5, range(4000), (1, 1, 1))
    dropped = (
        (drop_conditions(SimpleNamespace(num_classes=1000), torch.zeros(4000, dtype=torch.long), draws, 0.1) == 1000)
        .sum()
        .item()
    )
    assert stats.binomtest(dropped, 4000, 0.1).pvalue > 1e-3


# ------------------------------------------------------------------------------------------------------------- loss


class Recorder:
    """A model that returns what it was told to and keeps what it was given."""

    def __init__(self, velocity):
        self.velocity = velocity

    def __call__(self, x, t, y, **kwargs):
        self.x, self.t, self.y, self.kwargs = x, t, y, kwargs
        return self.velocity


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_loss_is_the_mean_squared_error_of_each_sample_to_the_target_velocity(path_type):
    rng = np.random.default_rng(0)
    x, noise, velocity = rng.standard_normal((3, 3, 4, 5, 5))
    t = np.array([0.1, 0.5, 0.93])
    model = Recorder(torch.from_numpy(velocity).float())
    y = torch.tensor([1, 2, 3])
    single = [torch.from_numpy(a).float() for a in (x, noise, t)]
    losses = flow_matching_loss(model, *single, y, path_type, inference_budget=0.5)
    assert losses.shape == (3,) and model.kwargs == {"inference_budget": 0.5} and model.y is y
    for i in range(3):
        if path_type == "linear":
            x_t, target = (1 - t[i]) * x[i] + t[i] * noise[i], noise[i] - x[i]
        else:
            a = np.pi * t[i] / 2
            x_t, target = np.cos(a) * x[i] + np.sin(a) * noise[i], np.pi / 2 * (np.cos(a) * noise[i] - np.sin(a) * x[i])
        np.testing.assert_allclose(model.x[i], x_t, rtol=0, atol=1e-6)
        assert losses[i].item() == pytest.approx(((velocity[i] - target) ** 2).mean(), rel=1e-5)


def test_loss_of_a_bf16_model_is_made_in_float32():
    rng = np.random.default_rng(1)
    x, noise, velocity = torch.from_numpy(rng.standard_normal((3, 2, 4, 16, 16))).float()
    rounded = velocity.bfloat16()
    losses = flow_matching_loss(Recorder(rounded), x, noise, torch.tensor([0.2, 0.7]), torch.zeros(2).long(), "linear")
    wanted = ((rounded.double().numpy() - (noise.double() - x.double()).numpy()) ** 2).mean((1, 2, 3))
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses, wanted, rtol=1e-6)  # bf16 has 3 digits


# ------------------------------------------------------------------------------------------------------------ REPA


def negative_cosines(projection, feature):
    """The mean of −cos over images and tokens, in NumPy float64, one token at a time."""
    pairs = zip(projection.double().numpy().reshape(-1, projection.shape[-1]), feature.double().numpy().reshape(-1, projection.shape[-1]), strict=True)  # fmt: skip
    return np.mean([-(p / np.linalg.norm(p)) @ (f / np.linalg.norm(f)) for p, f in pairs])


def test_alignment_loss_is_the_mean_of_negative_cosines_over_encoders():
    torch.manual_seed(0)
    projections, features = ([torch.randn(2, 5, z) for z in (7, 12)] for _ in range(2))
    expected = np.mean([negative_cosines(p, f) for p, f in zip(projections, features, strict=True)])
    assert alignment_loss(projections, features).item() == pytest.approx(expected, rel=1e-6)
    assert alignment_loss(features, features).item() == pytest.approx(-1)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float16, 1e-6), (torch.float16, 5e3), (torch.bfloat16, 1e-25), (torch.bfloat16, 1e25), (torch.float32, 1e-30)],
)
def test_alignment_loss_is_right_where_a_half_precision_norm_is_not(dtype, size):
    torch.manual_seed(0)
    projection, feature = ((size * torch.randn(2, 9, 768)).to(dtype) for _ in range(2))
    if dtype == torch.float16:
        assert set(projection.square().sum(dim=-1).unique().tolist()) <= {0.0, math.inf}  # what it would be
    assert (projection != 0).any(dim=-1).all() and projection.isfinite().all()
    projection.requires_grad_()
    loss = alignment_loss([projection], [feature])
    assert loss.item() == pytest.approx(negative_cosines(projection.detach(), feature), abs=1e-6)
    if dtype != torch.float16:  # whose gradients leave its range at such sizes
        loss.backward()
        p = projection.detach().double().requires_grad_()
        cosines = (p * feature.double()).sum(-1) / (p.norm(dim=-1) * feature.double().norm(dim=-1))
        (-cosines.mean()).backward()
        np.testing.assert_allclose(projection.grad.double() * size, p.grad * size, rtol=2e-2, atol=1e-7)


def test_alignment_loss_of_a_zero_projection_is_finite():
    projection = torch.zeros(1, 2, 4, requires_grad=True)
    loss = alignment_loss([projection], [torch.randn(1, 2, 4)])
    loss.backward()
    assert loss == 0 and projection.grad.isfinite().all()


def test_a_velocity_loss_around_a_projecting_model_is_the_same():
    options = {"head_depth": 1, "tail_depth": 1, "elit_group_size": 2, "encoder_depth": 1, "z_dims": (6,)}
    model = randomize(ELITSiT(input_size=8, patch_size=2, hidden_size=32, depth=3, num_heads=4, num_classes=5, **options))
    x, noise, t, y = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 3, 5])
    around = Projecting(model)
    losses = flow_matching_loss(around, x, noise, t, y, "linear", inference_budget=0.5)
    assert torch.equal(losses, flow_matching_loss(model, x, noise, t, y, "linear", inference_budget=0.5))
    state = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * noise
    (expected,) = model(state, t, y, return_features=True)[1]
    assert torch.equal(around.projections[0], expected) and expected.shape == (3, 16, 6)
