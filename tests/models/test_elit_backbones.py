"""ELIT around HDiT and MM-DiT: the golden outputs of the design, its costs, and where Read and Write may stand."""

import pytest
import test_hdit
import test_mmdit
import torch
from conftest import randomize
from golden_cases import arrays, case, weights

from errors import UserError
from models import hdit, mmdit
from models.conditioning import Text
from models.costs import count_flops
from models.elit import Elastic


class ELITHDiT(Elastic, hdit.HDiT):
    pass


class ELITMMDiT(Elastic, mmdit.MMDiT):
    pass


@pytest.mark.parametrize("tag", ["elit_hdit", "elit_hdit_swin", "elit_hdit_head"])
def test_golden_hdit(tag):
    of, options = case(tag)["of"], case(tag)["options"]
    model, data, outputs = ELITHDiT(**test_hdit.golden_arguments(of), **options), arrays(of), arrays(tag)
    model.load_state_dict(hdit.from_published(weights(of)) | weights(tag))
    for budget in case(tag)["budgets"]:
        with torch.no_grad():
            out = model(data["x"], data["sigma"].log() / 4, data.get("y"), budget)
        torch.testing.assert_close(out, outputs[f"out_{budget}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("tag", ["elit_mmdit", "elit_mmdit_sd35"])
def test_golden_mmdit(tag):
    of, options = case(tag)["of"], case(tag)["options"]
    model, data, outputs = ELITMMDiT(**test_mmdit.golden_arguments(of), **options), arrays(of), arrays(tag)
    own = mmdit.from_published(weights(of)) | weights(tag) | {"pos_embed": model.pos_embed}
    model.load_state_dict(own)
    for budget in case(tag)["budgets"]:
        with torch.no_grad():
            out = model(data["x"], data["t"] / model.time_scale, Text(data["context"], data.get("pooled")), budget)
        torch.testing.assert_close(out, outputs[f"out_{budget}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "side", "patch_size", "ends", "gflops"),
    [("S", 256, 4, 1, [126, 102, 91, 82]), ("L", 32, 1, 2, [340, 239, 189, 152]), ("B", 32, 1, 2, [66, 51, 43, 37])],
)
def test_cost_of_hdit(size, side, patch_size, ends, gflops):
    sizes = dict(hdit.SIZES[size])
    shape = {k: sizes.pop(k) for k in ("inner_depth", "inner_width", "outer_depth")}
    levels = hdit.hourglass((side // patch_size, side // patch_size), **shape)
    depth = sum(levels["depths"][:-1]) + ends
    with torch.device("meta"):
        model = ELITHDiT(
            input_size=side, patch_size=patch_size, in_channels=3 if patch_size == 4 else 4, head_depth=depth, tail_depth=depth,
            **levels, **sizes,
        )  # fmt: skip
    for budget, expected in zip((1, 1 / 2, 1 / 4, 1 / 16), gflops, strict=True):
        assert count_flops(model, budget) / 1e9 == pytest.approx(expected, abs=max(0.01 * expected, 0.6))  # printed as integers


@pytest.mark.parametrize(("side", "group", "gflops"), [(32, 4, [592, 465, 402, 355]), (128, 8, [8654, 5449, 4156, 3322])])
def test_cost_of_mmdit(side, group, gflops):
    with torch.device("meta"):
        model = ELITMMDiT(
            input_size=side, patch_size=2, in_channels=16, hidden_size=1536, depth=24, num_heads=24, text_width=4096, text_length=154,
            pooled_width=2048, head_depth=4, tail_depth=4, elit_group_size=group,
        )  # fmt: skip
    for budget, expected in zip((1, 1 / 2, 1 / 4, 1 / 16), gflops, strict=True):
        assert count_flops(model, budget) / 1e9 == pytest.approx(expected, rel=0.01)


def elit_hdit(**changes) -> ELITHDiT:
    """Levels of 8×8 and 4×4 cells; layers 0, 1 | 2, 3, 4 | 5, 6."""
    arguments = {
        "input_size": 8, "patch_size": 1, "depths": [2, 3], "widths": [16, 32], "attentions": [("neighborhood", 3), ("global",)],
        "head_width": 8, "mapping_depth": 1, "mapping_width": 24, "head_depth": 2, "tail_depth": 2, "elit_group_size": 2,
    }  # fmt: skip
    return ELITHDiT(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_depth": 1}, "the core must lie in HDiT's inner level, so both must be at least 2"),
        ({"tail_depth": 1}, "the core must lie in HDiT's inner level"),
        ({"attentions": [("global",), ("neighborhood", 3)]}, "must be global, not neighborhood"),
        ({"elit_group_size": 3}, "the token grid of 4×4 cannot be cut"),
    ],
)
def test_a_core_that_does_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        elit_hdit(**changes)


def test_the_interface_fits_the_inner_level():
    model = elit_hdit()
    assert model.interface.query.shape == (4, 32) and model.interface.num_groups == 4
    assert model.interface.reader.adaLN_modulation[1].in_features == 24
    assert model.interface.reader.attn[0].num_heads == 4


def inputs(model):
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.9])
    return (x, t, torch.tensor([1, 2])) if isinstance(model, ELITHDiT) else (x, t, Text(torch.randn(2, 3, 5)))


@pytest.mark.parametrize("ends", [2, 3])
@pytest.mark.parametrize("family", ["hdit", "mmdit"])
def test_forward_and_backward_at_both_ends_of_the_budget(family, ends):
    if family == "hdit":
        model = elit_hdit(head_depth=ends, tail_depth=ends, z_dims=(6,), encoder_depth=4)
    else:
        model = ELITMMDiT(
            input_size=8, patch_size=2, hidden_size=32, depth=2 * ends, num_heads=2, text_width=5, head_depth=1, tail_depth=1,
            elit_group_size=2, qk_norm="rms", z_dims=(6,), encoder_depth=2,
        )  # fmt: skip
    randomize(model)
    for budget in (None, 1 / 4):
        model.zero_grad()
        velocity, features = model(*inputs(model), inference_budget=budget, return_features=True)
        assert features[0].shape == (2, 16, 6)
        (velocity.square().sum() + features[0].sum()).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
