"""ELIT around HDiT and MM-DiT: the golden outputs of the design, its costs, and where Read and Write may stand."""

import pytest
import test_hdit
import test_mmdit
import torch
from golden_cases import arrays, case, weights
from numerics import randomize
from torch._dynamo.testing import CompileCounter

from common.errors import UserError
from models import checkpoint_blocks, compile_model, hdit, mmdit
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


def small(family: str, **changes) -> Elastic:
    """A model of random weights on x of 16×16, in groups of 4×4: budgets down to 1/16."""
    if family == "hdit":
        levels = {
            "depths": [2, 2, 4],
            "widths": [16, 24, 32],
            "attentions": [("shifted-window", 4), ("neighborhood", 3), ("global",)],
        }
        return test_hdit.randomized(elit_hdit(input_size=32, head_depth=5, tail_depth=5, elit_group_size=4, **levels | changes))
    arguments = {
        "input_size": 16, "patch_size": 2, "hidden_size": 32, "depth": 5, "num_heads": 2, "text_width": 5, "head_depth": 1,
        "tail_depth": 1, "elit_group_size": 4, "qk_norm": "rms",
    }  # fmt: skip
    return randomize(ELITMMDiT(**arguments | changes))


def inputs(model: Elastic, batch_size: int = 2):
    x, t = torch.randn(batch_size, 4, model.input_size, model.input_size), torch.rand(batch_size)
    return x, t, torch.randint(9, (batch_size,)) if isinstance(model, ELITHDiT) else Text(torch.randn(batch_size, 3, 5))


@pytest.mark.parametrize("family", ["hdit", "mmdit"])
def test_forward_and_backward_at_both_ends_of_the_budget(family):
    model = small(family, z_dims=(6,), encoder_depth=5)
    for budget in (None, 1 / 16):
        model.zero_grad()
        velocity, features = model(*inputs(model), inference_budget=budget, return_features=True)
        assert features[0].shape == (2, 64, 6) and velocity.isfinite().all()
        (velocity.square().sum() + features[0].sum()).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("family", ["hdit", "mmdit"])
def test_gradient_checkpointing(family):
    model = small(family)
    batch = inputs(model)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(*batch, inference_budget=1 / 4).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        checkpoint_blocks(model)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("family", "graphs"), [("hdit", 3), ("mmdit", 2)])  # one a width; the last block, and all others
def test_budgets_and_batch_sizes_share_their_compiled_graphs(family, graphs):
    model = small(family)
    batches = [inputs(model, 2), inputs(model, 5)]
    budgets = (None, 1 / 2, 1 / 16)
    torch._dynamo.reset()
    counter = CompileCounter()
    with torch.no_grad():
        expected = [model(*batch, inference_budget=b) for b in budgets for batch in batches]
        compile_model(model, backend=counter)
        for out, batch, budget in zip(expected, batches * len(budgets), [b for b in budgets for _ in batches], strict=True):
            torch.testing.assert_close(model(*batch, inference_budget=budget), out)
    assert counter.frame_count == graphs
