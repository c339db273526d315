"""ELIT around every backbone: HDiT's and MM-DiT's golden outputs; gradients, gradient checkpointing and compiled graphs of all."""

import pytest
import torch
from golden_cases import arrays, case, hdit_arguments, mmdit_arguments, randomized_hdit, weights
from numerics import randomize
from torch._dynamo.testing import CompileCounter

import models
from common.errors import UserError
from models import checkpoint_blocks, compile_model
from models.conditioning import Text
from models.elit import Elastic, ELITHDiT, ELITMMDiT
from models.published import from_hdit, from_mmdit

pytestmark = pytest.mark.slow

# Graphs of torch.compile of the blocks: one for each width of HDiT and of the hourglass; blocks that join with others, and blocks that
# do not; the last block of MM-DiT, and all others. And of the layers around them; Read and Write have two each.
FAMILIES = {"sit": 1 + 4, "unet": 2 + 4, "hourglass": 2 + 4, "uvit": 2, "hdit": 3, "mmdit": 2 + 3}


@pytest.mark.parametrize("tag", ["elit_hdit", "elit_hdit_swin", "elit_hdit_head"])
def test_golden_hdit(tag):
    of, options = case(tag)["of"], case(tag)["options"]
    model, data, outputs = ELITHDiT(**hdit_arguments(of), **options), arrays(of), arrays(tag)
    model.load_state_dict(from_hdit(weights(of)) | weights(tag))
    for budget in case(tag)["budgets"]:
        with torch.no_grad():
            out = model(data["x"], data["sigma"].log() / 4, data.get("y"), budget)
        torch.testing.assert_close(out, outputs[f"out_{budget}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("tag", ["elit_mmdit", "elit_mmdit_sd35"])
def test_golden_mmdit(tag):
    of, options = case(tag)["of"], case(tag)["options"]
    model, data, outputs = ELITMMDiT(**mmdit_arguments(of), **options), arrays(of), arrays(tag)
    own = from_mmdit(weights(of)) | weights(tag) | {"pos_embed": model.pos_embed}
    model.load_state_dict(own)
    for budget in case(tag)["budgets"]:
        with torch.no_grad():
            out = model(data["x"], data["t"] / model.time_scale, Text(data["context"], data.get("pooled")), budget)
        torch.testing.assert_close(out, outputs[f"out_{budget}"], rtol=0, atol=1e-4)


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
        return randomized_hdit(elit_hdit(input_size=32, head_depth=5, tail_depth=5, elit_group_size=4, **levels | changes))
    options = {"input_size": 16, "hidden_size": 32, "depth": 6, "num_heads": 2, "head_depth": 1, "tail_depth": 1}
    options |= {"text_width": 5, "qk_norm": True} if family == "mmdit" else {"num_classes": 9}
    name = {"mmdit": "MMDiT", "uvit": "U-ViT", "sit": "SiT", "unet": "SiT-UViT", "hourglass": "SiT-HDiT"}[family]
    return randomize(models.create_model(f"ELIT-{name}-Ti/2", **options | changes)).float()


def inputs(model: Elastic, batch_size: int = 2):
    x, t = torch.randn(batch_size, 4, model.input_size, model.input_size), torch.rand(batch_size)
    return x, t, Text(torch.randn(batch_size, 3, 5)) if isinstance(model, ELITMMDiT) else torch.randint(9, (batch_size,))


def test_text_of_a_u_vit_goes_through_the_core_and_not_through_read():
    """Read's condition is the time token alone: the features of 1000·t. The core sees time, text, and the kept latents."""
    model, seen = small("uvit", text=(3, 5)), []
    for module in (model.interface.reader, model.blocks[1]):  # of six and the middle one: 0 | 1 … 5 | 6
        module.register_forward_pre_hook(lambda _, args: seen.append(args))
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([0.3, 0.8]), torch.randn(2, 3, 5)
    with torch.no_grad():
        velocity = model(x, t, Text(text), inference_budget=1 / 4)
        other = model(x, t, Text(text + 1), inference_budget=1 / 4)
    angles = 1000 * t[:, None] * 10000 ** (-torch.arange(16) / 16)
    (_, tokens, c), (core, *_) = seen[:2]
    torch.testing.assert_close(c, torch.cat([angles.cos(), angles.sin()], dim=1), rtol=0, atol=1e-3)
    assert tokens.shape == (2, 4, 16, 32) and core.shape == (2, 1 + 3 + 4 * 4, 32)
    assert velocity.shape == x.shape and (velocity - other).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward_at_both_ends_of_the_budget(family):
    model = small(family, z_dims=(6,), encoder_depth=5)
    for budget in (None, 1 / 16):
        model.zero_grad()
        velocity, features = model(*inputs(model), inference_budget=budget, return_features=True)
        assert features[0].shape == (2, 64, 6) and velocity.isfinite().all()
        (velocity.square().sum() + features[0].sum()).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize(("family", "graphs"), [item for item in FAMILIES.items() if item[0] != "sit"])  # see test_schedules
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
        velocity = model(*batch, inference_budget=budget)  # as in training
        torch.testing.assert_close(velocity, out)
        velocity.square().mean().backward()
    assert counter.frame_count == graphs + 4
