"""DFM: pyramid, models, loss, schedule and sampler against NumPy, published outputs and plain loops; what is refused."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from numerics import numpy_weights, randomize
from reference import StagedReference, pyramid
from torch import nn

import convert_checkpoint
import models
from checkpoint import reading, weights
from common.errors import UserError
from flows import DFM, LossCondition
from loss import active_stage, dfm_loss, stage_times
from models.dfm import DFMELITSiT, DFMSiT, decompose, recompose
from randomness import image_noise, pyramid_noise, training_draws
from samplers import dfm_sampler, dfm_schedule

TINY = {"hidden_size": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
ELIT = {"head_depth": 1, "tail_depth": 1, "elit_group_size": 2}


def noise_like(shapes, batch=3, seed=0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal((batch, *shape))).to(dtype) for shape in shapes]


# ---------------------------------------------------------------------------------------------------------- pyramid


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_pyramid_is_the_laplacian_one_and_recomposes(stages, dtype, bound):
    (x,) = noise_like([(4, 16, 24)], dtype=dtype)
    found = decompose(x, stages)
    for b in range(len(x)):
        for stage, wanted in zip(found, pyramid(x[b].double().numpy(), stages), strict=True):
            np.testing.assert_allclose(stage[b].double().numpy(), wanted, rtol=0, atol=bound)
    assert (recompose(found) - x).abs().max() < bound
    coarser = recompose(found[:-1])  # the first stages alone: the image at half the size
    torch.testing.assert_close(coarser, decompose(x, 2)[0], rtol=0, atol=2 * bound)


@pytest.mark.parametrize(("shape", "stages"), [((4, 6, 8), 3), ((4, 8, 7), 2)])
def test_sizes_that_cannot_be_halved_are_refused(shape, stages):
    with pytest.raises(UserError, match="cannot be halved"):
        decompose(torch.zeros(1, *shape), stages)


# ----------------------------------------------------------------------------------------------------------- models


def test_registry_holds_both_families_in_every_size_and_patch():
    wanted = {f"{f}-{s}/{p}" for f in ("DFM-SiT", "DFM-ELIT-SiT") for s in ("Ti", "S", "B", "L", "XL") for p in (2, 4, 8)}
    assert {name for name in models.MODELS if name.startswith("DFM-")} == wanted
    assert models.MODELS["DFM-SiT-B/2"].constructor is DFMSiT
    assert models.MODELS["DFM-ELIT-SiT-B/2"].constructor is DFMELITSiT
    assert models.MODELS["DFM-ELIT-SiT-XL/2"].sizes == models.MODELS["ELIT-SiT-XL/2"].sizes


def test_published_outputs(golden, golden_checkpoint):
    arrays, _ = golden
    model, config = reading.load_model(golden_checkpoint("dfm"))
    assert config["model"] == "DFM-SiT-B/4" and config["stages_count"] == 2 and config["resolution"] == 128
    found = model([arrays["dfm_x0"], arrays["dfm_x"]], arrays["dfm_t"], arrays["dfm_y"])
    for s in range(2):
        torch.testing.assert_close(found[s], arrays[f"dfm_out_{s}"], rtol=0, atol=1e-4)


def test_a_bare_published_state_dict_tells_its_stages(golden, golden_checkpoint, tmp_path):
    state = torch.load(golden_checkpoint("dfm"), weights_only=False)["ema"]
    torch.save(state, tmp_path / "bare.pt")
    found = reading.read_weights(tmp_path / "bare.pt")
    assert {k: found.config[k] for k in ("model", "stages_count", "resolution", "num_classes")} == {
        "model": "DFM-SiT-B/4",
        "stages_count": 2,
        "resolution": 128,
        "num_classes": 10,
    }
    weights.build_model(found, "bare.pt")


def test_kept_and_read_again_by_every_way(tmp_path, golden_checkpoint):
    """save_pretrained, that folder as a checkpoint, and the published file in our formats."""
    pass

    sizes = {"input_size": 8, "elit_group_size": 2, "num_classes": 5}
    model = randomize(models.create_model("DFM-ELIT-SiT-Ti/2", **sizes)).float().eval()
    arguments = noise_like(model.stage_shapes, dtype=torch.float32), torch.rand(3, 2), torch.tensor([0, 1, 5]), 0.5
    model.save_pretrained(tmp_path / "folder")
    again, (loaded, config) = DFMELITSiT.from_pretrained(tmp_path / "folder"), reading.load_model(tmp_path / "folder")
    assert (config["model"], config["stages_count"]) == ("DFM-ELIT-SiT-Ti/2", 2)
    for other in (again.eval(), loaded):
        for a, b in zip(model(*arguments), other(*arguments), strict=True):
            assert torch.equal(a, b)
    published = golden_checkpoint("dfm")
    for name, option in (("ours.pt", []), ("ours.safetensors", ["--safetensors"])):
        convert_checkpoint.main([str(published), str(tmp_path / name), *option])
        one, other = (reading.load_model(path)[0].state_dict() for path in (published, tmp_path / name))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({"input_size": (8, 12), "patch_size": 2, "stages_count": 2}, None),
        ({"input_size": 16, "patch_size": 4, "stages_count": 3, "qk_norm": True}, None),
        ({"input_size": 8, "patch_size": 2, "stages_count": 2, **ELIT}, 0.5),
        ({"input_size": 8, "patch_size": 2, "stages_count": 2, "elit_tail": "skip", **ELIT}, 0.25),
    ],
    ids=["two-stages", "three-stages", "elit-drop", "elit-skip"],
)
def test_forward_is_the_reference(options, budget):
    elastic = "elit_group_size" in options
    model = randomize((DFMELITSiT if elastic else DFMSiT)(**(TINY | options))).double()
    interface = {"group_size": 2, "head_depth": 1, "tail_depth": 1, "read_depth": 1, "write_depth": 1}
    elit = interface | {"tail": options.get("elit_tail", "drop")} if elastic else None
    reference = StagedReference(numpy_weights(model), heads=4, patch_size=options["patch_size"], elit=elit)
    states = noise_like(model.stage_shapes, batch=2)
    y, S = torch.tensor([3, 5]), options["stages_count"]
    for times, tolerance in ((torch.zeros(2, S), 1e-9), (torch.linspace(0.1, 1.0, 2 * S).view(2, S), 3e-6)):
        for active in range(S):
            found = model(states, times.double(), y, active_stage=active, **({"inference_budget": budget} if elastic else {}))
            wanted = reference.forward(states, times, y, active, k=round(4 * budget) if elastic else None)
            assert len(found) == len(wanted) == active + 1
            for a, b in zip(found, wanted, strict=True):
                np.testing.assert_allclose(a.detach().numpy(), b, rtol=0, atol=tolerance)
                assert b.std() > 0.1


def test_all_stages_are_active_by_default():
    model = randomize(DFMSiT(**TINY, input_size=8, patch_size=2))
    states, t, y = noise_like(model.stage_shapes, dtype=torch.float32), torch.rand(3, 2), torch.tensor([0, 1, 5])
    for a, b in zip(model(states, t, y), model(states, t, y, active_stage=1), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["DFM-SiT-Ti/2", "DFM-ELIT-SiT-Ti/2"])
def test_repa_reads_the_shared_tokens(name):
    elit = {"elit_group_size": 2} if "ELIT" in name else {}
    model = models.create_model(name, input_size=8, z_dims=(7,), encoder_depth=1, **elit)
    states, t = noise_like(model.stage_shapes, dtype=torch.float32), torch.rand(3, 2)
    velocities, (projection,) = model(states, t, torch.zeros(3, dtype=torch.long), return_features=True)
    assert [v.shape for v in velocities] == [s.shape for s in states] and projection.shape == (3, 16, 7)


def test_dfm_costs_little_more_than_its_backbone():
    for family, budget in (("SiT", None), ("ELIT-SiT", 0.25)):
        with torch.device("meta"):
            plain, staged = (models.create_model(f"{f}-B/2", input_size=32) for f in (family, f"DFM-{family}"))
        ratio = models.count_flops(staged, budget) / models.count_flops(plain, budget)
        assert 1 < ratio < 1.01


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch_size": 2, "stages_count": 3}, ["stages_count 3", "patch size of 2", "4"]),
        ({"patch_size": 2, "stages_count": 1}, ["stages_count 1", "2"]),
        ({"patch_size": 2, "input_size": 7}, ["7×7", "patches of 2"]),
    ],
)
def test_stages_that_do_not_fit_are_refused(options, words):
    with pytest.raises(UserError) as error:
        DFMSiT(**(TINY | {"input_size": 8} | options))
    assert all(word in str(error.value) for word in words), error.value


# ------------------------------------------------------------------------------------------------------------- loss


class Oracle(nn.Module):
    """Answers with fixed velocities; keeps what it was asked."""

    num_classes = 5

    def __init__(self, velocities):
        super().__init__()
        self.velocities = velocities

    def forward(self, states, t, y, active_stage, **kwargs):
        self.states, self.t, self.active, self.kwargs = states, t, active_stage, kwargs
        return [v[: len(y)] for v in self.velocities[: active_stage + 1]]


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("active", [0, 1, 2])
def test_loss_is_the_sum_of_the_velocity_errors_up_to_the_active_stage(active, path_type):
    shapes = [(4, 2, 2), (4, 4, 4), (4, 8, 8)]
    (x,), noise, velocities = noise_like(shapes[-1:], seed=1), noise_like(shapes, seed=2), noise_like(shapes, seed=3)
    model, rng = Oracle(velocities), np.random.default_rng(4)
    t = torch.from_numpy(rng.random((3, 3)))
    found = dfm_loss(model, x, noise, t, torch.zeros(3), path_type, active, inference_budget=0.5)
    wanted = np.zeros(3)
    for b in range(3):
        for s, stage in enumerate(pyramid(x[b].numpy(), 3)):
            time, eps = t[b, s].item(), noise[s][b].numpy()
            if path_type == "linear":
                state, target = (1 - time) * stage + time * eps, eps - stage
            else:
                c, d = np.cos(np.pi / 2 * time), np.sin(np.pi / 2 * time)
                state, target = c * stage + d * eps, np.pi / 2 * (c * eps - d * stage)
            np.testing.assert_allclose(model.states[s][b].numpy(), state if s <= active else 0 * state, atol=1e-12)
            if s <= active:
                wanted[b] += np.mean((velocities[s][b].numpy() - target) ** 2)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)
    assert model.active == active and model.kwargs == {"inference_budget": 0.5} and torch.equal(model.t, t)


def test_times_before_the_active_stage_are_small_and_after_it_one():
    normals, t = torch.tensor([[0.3, -1.0, 2.0], [1.5, 0.0, 0.1]]), torch.tensor([0.7, 0.2])
    found = stage_times(t, normals, 1).double().numpy()
    early = 1 / (1 + np.exp(2 - normals[:, 0].double().numpy()))
    np.testing.assert_allclose(found, np.stack([early, t.double().numpy(), [1, 1]], axis=1), rtol=1e-6)


def test_stages_are_drawn_by_their_weights():
    draws = np.array([training_draws(3, n, range(1), (1,)).stage for n in range(4000)])
    stages = np.array([active_stage(d, [0.7, 0.0, 0.3]) for d in draws])
    assert set(stages) == {0, 2} and abs((stages == 0).mean() - 0.7) < 0.03
    assert active_stage(0.999999, [0.5, 0.4999]) == 1  # weights that rounding leaves short of 1
    levels = np.array([training_draws(3, n, range(1), (1,)).level for n in range(4000)])
    assert abs(np.corrcoef(levels, draws)[0, 1]) < 0.05  # budget and stage are independent


def test_draws_of_the_stages_belong_to_the_image():
    shapes = [(2, 2, 2), (2, 4, 4)]
    whole = training_draws(0, 5, range(6), (2, 8, 8), further_shapes=shapes)
    part = training_draws(0, 5, range(2, 5), (2, 8, 8), further_shapes=shapes)
    for a, b in zip(whole.coarse_noise, part.coarse_noise, strict=True):
        assert torch.equal(a[2:5], b)
    assert torch.equal(whole.stage_normal[2:5], part.stage_normal) and whole.stage == part.stage
    plain = training_draws(0, 5, range(6), (2, 8, 8))  # what SiT draws does not depend on the stages
    for field in dataclasses.fields(plain):
        if field.name not in ("coarse_noise", "stage_normal"):
            assert np.array_equal(getattr(plain, field.name), getattr(whole, field.name)), field.name
    values = torch.cat([x.flatten() for x in [*whole.coarse_noise, whole.noise, whole.posterior]])
    assert len(values.unique()) == len(values)
    x, y = whole.posterior, torch.zeros(6)
    model = Oracle([torch.zeros(6, *s) for s in [*shapes, (2, 8, 8)]])
    DFM(stages_count=3).loss_under(LossCondition(None, 2), model, x, whole, y)
    assert torch.equal(model.t[:, 2], whole.time_uniform)


# ---------------------------------------------------------------------------------------------------------- sampler


def test_two_stage_schedule_of_the_published_settings():
    first, second = dfm_schedule([40, 10], [0.1])
    assert (first.active_stage, second.active_stage) == (0, 1)
    np.testing.assert_allclose(first.times, np.stack([np.linspace(1, 0.1, 41), np.ones(41)], 1), atol=1e-12)
    np.testing.assert_allclose(second.times, np.stack([np.linspace(0.1, 0, 11), np.linspace(1, 0, 11)], 1), atol=1e-12)


def test_schedules_never_move_a_stage_backwards_and_end_at_zero():
    rng = np.random.default_rng(0)
    for _ in range(300):
        S = int(rng.integers(2, 5))
        thresholds = np.sort(rng.uniform(1e-3, 0.999, S - 1))[::-1].tolist()
        steps = rng.integers(1, 30, S).tolist()
        phases = dfm_schedule(steps, thresholds)
        assert [len(p.times) - 1 for p in phases] == steps
        path = np.concatenate([phases[0].times, *(p.times[1:] for p in phases[1:])])
        assert (np.diff(path, axis=0) <= 1e-12).all() and (path[0] == 1).all() and (path[-1] == 0).all()
        for i, phase in enumerate(phases):
            assert phase.times[0] == (phases[i - 1].times[-1] if i else (1.0,) * S)
            end = [*thresholds, 0.0][i]
            np.testing.assert_allclose(phase.times[-1], [end] * (i + 1) + [1.0] * (S - 1 - i), atol=1e-12)
            moving = np.diff(phase.times, axis=0)
            np.testing.assert_allclose(moving, np.broadcast_to(moving[:1], moving.shape), atol=1e-12)  # straight lines


@pytest.mark.parametrize(
    ("steps", "thresholds", "words"),
    [
        ([40, 10], [], "2 stages need 1"),
        ([40, 10, 5], [0.1], "3 stages need 2"),
        ([40, 10, 5], [0.1, 0.3], "fall strictly"),
        ([40, 10, 5], [0.1, 0.1], "fall strictly"),
        ([40, 10], [0.0], "within"),
        ([40, 10], [1.0], "within"),
        ([40, 0], [0.1], "above 0"),
    ],
)
def test_wrong_schedules_are_refused(steps, thresholds, words):
    with pytest.raises(UserError, match=words):
        dfm_schedule(steps, thresholds)


def small_model(**options):
    return randomize(DFMSiT(**TINY, input_size=8, patch_size=2, **options)).double().eval()


def test_one_active_stage_is_a_plain_euler_loop():
    model = small_model()
    noise, y, theta = noise_like(model.stage_shapes), torch.tensor([0, 2, 4]), 0.3
    clean = []
    dfm_sampler(
        model,
        noise,
        y,
        num_steps_per_scale=[7, 1],
        stage_sampling_thresholds=[theta],
        on_stage=lambda stage, stages: clean.append((stage, stages)),
    )
    x, grid = noise[0], np.linspace(1, theta, 8)
    with torch.no_grad():
        for t, t_next in pairwise(grid):
            times = torch.tensor([[t, 1.0]] * 3, dtype=torch.float64)
            (v,) = model([x, torch.zeros_like(noise[1])], times, y, active_stage=0)
            x = x + (t_next - t) * v
    ((stage, (estimate,)),) = clean
    assert stage == 0
    torch.testing.assert_close(estimate, x - theta * v, rtol=0, atol=1e-12)  # straight on to t = 0


@pytest.mark.parametrize("stages", [2, 3])
def test_sampler_is_the_plain_loop_over_all_phases(stages):
    patch_size = 2 ** (stages - 1)
    model = randomize(DFMSiT(**TINY, input_size=2 * patch_size, patch_size=patch_size, stages_count=stages)).double().eval()
    noise, y = noise_like(model.stage_shapes), torch.tensor([0, 2, 4])
    steps, theta = [3, 4, 2][:stages], [0.5, 0.2][: stages - 1]
    found = dfm_sampler(model, noise, y, num_steps_per_scale=steps, stage_sampling_thresholds=theta)
    x, times, ends = list(noise), [1.0] * stages, [*theta, 0.0]
    with torch.no_grad():
        for active in range(stages):
            for k in range(steps[active]):
                states = [x[s] if s <= active else torch.zeros_like(x[s]) for s in range(stages)]
                velocities = model(states, torch.tensor([times] * 3, dtype=torch.float64), y, active_stage=active)
                for s in range(active + 1):
                    step = (ends[active] - times[s]) / (steps[active] - k)  # what is left, in equal steps
                    x[s], times[s] = x[s] + step * velocities[s], times[s] + step
    for a, b in zip(found, x, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


class Recorder(nn.Module):
    """Velocities that tell the label and the budget apart, and a list of the calls."""

    num_classes = 5

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, states, t, y, active_stage, inference_budget=None):
        self.calls.append((t[0].tolist(), y.tolist(), inference_budget, active_stage))
        value = (y.double() + (inference_budget or 0))[:, None, None, None]
        return [value.expand_as(x).clone() for x in states[: active_stage + 1]]


def test_guidance_is_tested_and_applied_stage_by_stage():
    model = Recorder()
    noise = [torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.zeros(1, 1, 4, 4, dtype=torch.float64)]
    guidance = {"cfg_scale": 3.0, "guidance_low": 0.45, "guidance_high": 0.8}
    found = dfm_sampler(
        model, noise, torch.tensor([2]), num_steps_per_scale=[4, 4], stage_sampling_thresholds=[0.2], **guidance
    )
    # Stage 0 stands at 1, .8, .6, .4 and then at .2, .15, .1, .05; stage 1 waits at 1 and then stands at 1, .75, .5, .25.
    doubled = [len(call[1]) == 2 for call in model.calls]
    assert doubled == [False, True, True, False, False, True, True, False]
    guided = 5 + 3 * (2 - 5)
    first = -0.2 * (2 + guided + guided + 2) - 0.05 * 4 * 2  # in the second phase stage 0 lies below the interval
    second = -0.25 * (2 + guided + guided + 2)
    torch.testing.assert_close(found[0], torch.full_like(found[0], first))
    torch.testing.assert_close(found[1], torch.full_like(found[1], second))


def test_cheap_guidance_and_budgets_over_time_reach_the_model():
    from samplers import BudgetSchedule

    model = Recorder()
    noise = [torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4, 4)]
    budgets = BudgetSchedule.parse("0.25@1.0-0.5,1.0@0.5-0.0")
    options = {"cfg_scale": 2.0, "inference_budget": budgets, "unconditional_inference_budget": 0.0625}
    dfm_sampler(model, noise, torch.tensor([2]), num_steps_per_scale=[2, 2], stage_sampling_thresholds=[0.2], **options)
    assert [(call[1], call[2]) for call in model.calls[::2]] == [
        ([2], b) for b in (0.25, 0.25, 0.25, 1.0)
    ]  # the active stage's time
    assert [(call[1], call[2]) for call in model.calls[1::2]] == [([5], 0.0625)] * 4


def test_noise_of_the_stages_belongs_to_the_image():
    shapes = [(4, 4, 4), (4, 8, 8)]
    many, one = pyramid_noise(3, range(5), shapes), pyramid_noise(3, [4], shapes)
    for a, b in zip(many, one, strict=True):
        assert torch.equal(a[4:], b)
    assert torch.equal(many[1], image_noise(3, range(5), (4, 8, 8)))  # the finest stage starts as SiT does
    values = torch.cat([x.flatten() for x in many])
    assert len(values.unique()) == len(values)


def test_a_plain_model_is_no_pyramid():
    with pytest.raises(UserError, match="2 stages"):
        dfm_sampler(small_model(), noise_like([(4, 4, 4), (4, 8, 8)]), torch.tensor([0, 1, 2]), num_steps_per_scale=[3, 2, 1],
                    stage_sampling_thresholds=[0.5, 0.2])  # fmt: skip
    with pytest.raises(UserError, match="no budget"):
        small_model()(
            noise_like([(4, 4, 4), (4, 8, 8)]), torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), inference_budget=1.0
        )
