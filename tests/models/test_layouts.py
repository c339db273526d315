"""SiT in the ELIT paper's U-ViT and HDiT layouts: against a NumPy reference, with and without an elastic core; sizes and costs."""

import numpy as np
import pytest
import torch
from layout_reference import LayoutReference
from numerics import inputs, numpy_weights, randomize

import models
from common.errors import UserError
from models.costs import count_flops
from models.elit import ELITSiT
from models.sit import SiT

LAYOUTS = [None, "unet", "hourglass"]
XL = {None: "SiT-XL/2", "unet": "SiT-UViT-XL/2", "hourglass": "SiT-HDiT-XL/2"}
ROTARY = {"rotary": True, "qk_norm": "rms"}


def small(cls=SiT, **changes):
    arguments = {"input_size": (8, 16), "patch_size": 2, "hidden_size": 32, "depth": 7, "num_heads": 4, "num_classes": 5}
    return cls(**arguments | ROTARY | changes)


def pair(cls=SiT, **changes):
    """A model with random weights in float64, and its reference."""
    model = randomize(small(cls, **changes)).double()
    elit = None
    if cls is ELITSiT:
        elit = {"group_size": changes["elit_group_size"], "head_depth": model.head_depth, "tail_depth": model.tail_depth}
        elit |= {"read_depth": 1, "write_depth": 1}
    return model, LayoutReference(numpy_weights(model), heads=4, patch_size=2, elit=elit, layout=changes.get("layout"))


def assert_same(model, reference, k=None):
    for times, tolerance in (([0.0, 0.0], 1e-9), ([0.37, 1.0], 3e-6)):  # features of t are made in float32, exact at t = 0
        x, t, y = inputs(model, times)
        options = {} if k is None else {"inference_budget": k / model.interface.latents_per_group}
        found = model(x, t, y, **options).detach().numpy()
        assert found.std() > 0.1
        np.testing.assert_allclose(found, reference.forward(x, t, y, k)[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("depth", [7, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_the_reference(layout, depth):
    assert_same(*pair(layout=layout, depth=depth))


@pytest.mark.parametrize("options", [{"fused_attn": False}, {"qk_norm": False}, {"input_size": (4, 8), "in_channels": 3}])
def test_options_are_the_reference(options):
    assert_same(*pair(layout="hourglass", **options))


@pytest.mark.parametrize("k", [None, 1, 3, 6, 8, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_elastic_layouts_are_the_reference(layout, k):
    assert_same(*pair(ELITSiT, layout=layout, depth=8, head_depth=2, tail_depth=2, elit_group_size=4), k)


def test_a_split_within_the_merge_is_the_reference():
    assert_same(*pair(ELITSiT, layout="hourglass", depth=8, head_depth=1, tail_depth=0, elit_group_size=2), 3)
    assert_same(*pair(ELITSiT, layout="unet", depth=7, head_depth=3, tail_depth=3, elit_group_size=2), 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "parameters", "tflops", "elit"),
    [
        (None, 675, (182.2, 805.8), ([244.9, 157.1, 114.3, 82.7], [1080, 674, 489, 359])),
        ("unet", 709, (195.8, 860.1), ([262.5, 168.6, 122.8, 88.9], [1151, 720, 523, 384])),
        ("hourglass", 1365, (182.0, 775.4), ([244.6, 157.8, 115.0, 101.9], [1040, 667, 489, 359])),
    ],
)
def test_sizes_and_costs_are_those_of_the_paper(layout, parameters, tflops, elit):
    for side, group, training, budgets in zip((32, 64), (4, 8), tflops, elit, strict=True):
        with torch.device("meta"):
            plain = models.create_model(XL[layout], input_size=side, in_channels=16, **({} if layout else ROTARY))
            elastic = models.create_model(
                f"ELIT-{XL[layout]}", input_size=side, in_channels=16, elit_group_size=group, **({} if layout else ROTARY)
            )
        assert (plain.layout, elastic.layout, elastic.interface.latent_pos) == (layout, layout, None)
        assert (elastic.head_depth, elastic.tail_depth) == (4, 4)
        assert sum(p.numel() for p in plain.parameters()) / 1e6 == pytest.approx(parameters, rel=0.002)
        assert count_flops(plain) * 3 * 256 / 1e12 == pytest.approx(training, rel=0.001)  # batch 256, backward twice a forward
        ends = {1: budgets[0], 1 / 16: budgets[3]} if side == 64 else dict(zip((1, 1 / 2, 1 / 4, 1 / 16), budgets, strict=True))
        assert {b: count_flops(elastic, b) / 1e9 for b in ends} == pytest.approx(ends, rel=0.002)


def test_positions_of_rotary_models_are_nowhere_else():
    model = small(ELITSiT, layout="hourglass", head_depth=2, tail_depth=2, elit_group_size=2)
    assert not any("pos_embed" in name or "latent_pos" in name for name in model.state_dict())
    assert any("latent_pos" in name for name in small(ELITSiT, rotary=False, head_depth=2, tail_depth=2).state_dict())


def test_budgets_below_a_merge_cost_the_inner_blocks_no_less():
    model = small(ELITSiT, layout="hourglass", head_depth=2, tail_depth=2, elit_group_size=4)
    lengths = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, arguments: lengths.append(arguments[0].shape[1]))
    for k in (1, 4, 5):
        model(*inputs(model, [0.5], dtype=torch.float32), inference_budget=k / 16)
    assert lengths == [32, 32, 2, 2, 2, 32, 32] * 2 + [32, 32, 4, 4, 4, 32, 32]
    assert model.merged_latents == 4


@pytest.mark.parametrize("layout", ["unet", "hourglass"])
def test_every_parameter_has_a_gradient(layout):
    model = randomize(small(ELITSiT, layout=layout, head_depth=1, tail_depth=1, elit_group_size=4)).float()
    for budget in (None, 1 / 16):
        model.zero_grad()
        model(*inputs(model, [0.3, 0.8], dtype=torch.float32), inference_budget=budget).square().mean().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_stay_in_float32_under_autocast(layout):
    model = randomize(small(ELITSiT, layout=layout, head_depth=2, tail_depth=2, elit_group_size=2)).float()
    dtypes = set()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, arguments: dtypes.add(arguments[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(*inputs(model, [0.3, 0.8], dtype=torch.float32))
    assert dtypes == {torch.float32}


def test_repa_reads_tokens_of_the_grid():
    model = small(layout="hourglass", depth=8, encoder_depth=6, z_dims=(6,))
    _, (features,) = model(*inputs(model, [0.5], dtype=torch.float32), return_features=True)
    assert features.shape == (1, 32, 6)
    small(ELITSiT, layout="hourglass", depth=8, encoder_depth=4, z_dims=(6,), head_depth=2, tail_depth=2)
    with pytest.raises(UserError, match=r"--encoder-depth 4: .* choose at most 2, or at least 6"):
        small(layout="hourglass", depth=8, encoder_depth=4, z_dims=(6,))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"layout": "unet", "head_depth": 1, "tail_depth": 2},
            "head_depth 1 and tail_depth 2: must be equal in SiT's unet layout",
        ),
        ({"layout": "hourglass", "head_depth": 3, "tail_depth": 1}, "head_depth 3 and tail_depth 1: must be at most 2"),
        ({"layout": "hourglass", "head_depth": 1, "tail_depth": 3}, "head_depth 1 and tail_depth 3: must be at most 2"),
        ({"layout": "hourglass", "input_size": (6, 8), "elit_group_size": 1}, "the token grid of 3×4 cannot be halved"),
        ({"layout": "ring"}, "layout 'ring' is not valid; choose unet or hourglass"),
        ({"hidden_size": 24}, "rotary: the head width 6 must be divisible by 4"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        small(ELITSiT, **{"head_depth": 1, "tail_depth": 1} | options)
