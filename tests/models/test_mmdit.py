"""MM-DiT against the outputs of REPA's and Stability AI's programs, and what a text model is conditioned on."""

import math

import pytest
import torch
from golden_cases import arrays, mmdit_arguments, weights
from numerics import randomize

from common.errors import UserError
from models.conditioning import Text, map_condition, select
from models.mmdit import MMDiT
from models.published import from_mmdit as from_published

TAGS = ["mmdit_repa", "mmdit_repa_crop", "mmdit_sd3", "mmdit_sd35", "mmdit_sd35_x"]


def small(**changes) -> MMDiT:
    arguments = {"input_size": (4, 6), "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2, "text_width": 5}
    return MMDiT(**arguments | changes)


def inputs(length: int = 3, width: int = 5, pooled: int | None = None) -> tuple[torch.Tensor, torch.Tensor, Text]:
    text = Text(torch.randn(2, length, width), None if pooled is None else torch.randn(2, pooled))
    return torch.randn(2, 4, 4, 6), torch.tensor([0.2, 0.9]), text


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tag", TAGS)
def test_golden(tag, fused):
    model, data = MMDiT(**mmdit_arguments(tag), fused_attn=fused), arrays(tag)
    found = model.load_state_dict(from_published(weights(tag)), strict=False)
    assert found.missing_keys == ["pos_embed"] and not found.unexpected_keys  # which the reference makes itself
    with torch.no_grad():
        text = Text(data["context"], data.get("pooled"))
        out, features = model(data["x"], data["t"] / model.time_scale, text, return_features=True)
    torch.testing.assert_close(out, data["out"], rtol=0, atol=1e-5)
    assert len(features) == ("z0" in data)
    for z in features:
        torch.testing.assert_close(z, data["z0"], rtol=0, atol=1e-5)


def test_the_position_table_of_a_checkpoint_is_read():
    tag = "mmdit_sd3"
    published = {f"model.diffusion_model.{k}": v for k, v in weights(tag).items()}
    right = MMDiT(**mmdit_arguments(tag))
    model = MMDiT(**mmdit_arguments(tag) | {"pos_scale": 7.0})  # another table, which the checkpoint's replaces
    model.load_state_dict(from_published(published | {"model.diffusion_model.pos_embed": right.pos_embed}))
    data = arrays(tag)
    with torch.no_grad():
        out = model(data["x"], data["t"] / 1000, Text(data["context"], data["pooled"]))
    torch.testing.assert_close(out, data["out"], rtol=0, atol=1e-5)


def test_eps_and_initialisation():
    model = small(qk_norm="rms", dual_attention=(0,), pooled_width=7)
    assert {m.eps for m in model.modules() if hasattr(m, "eps")} == {1e-6}
    norm = model.blocks[0].image.attn.q_norm
    root = norm(torch.full((16,), 1e-3))[0].item()  # mean(x²) = eps: inside the root 1/√2, outside 1/1.001
    assert math.isclose(root, math.sqrt(0.5), rel_tol=1e-4)
    x, t, text = inputs(pooled=7)
    assert torch.equal(model(x, t, text), torch.zeros_like(x))
    for name, parameter in model.named_parameters():
        if "adaLN" in name or name.startswith("final_layer") or name.endswith(".bias"):
            assert not parameter.any(), name


def test_the_last_text_side_ends_after_its_keys_and_values():
    names = {name for name, _ in small(qk_norm="rms").blocks[-1].text.named_parameters()}
    assert names == {
        "attn.qkv.weight", "attn.qkv.bias", "attn.q_norm.scale", "attn.k_norm.scale", "adaLN_modulation.1.weight",
        "adaLN_modulation.1.bias",
    }  # fmt: skip
    assert small().blocks[-1].text.adaLN_modulation[1].out_features == 2 * 32


def test_every_parameter_has_a_gradient():
    model = randomize(small(qk_norm="rms", dual_attention=(1,), pooled_width=7))
    model(*inputs(pooled=7)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_order_of_text_tokens_has_no_effect():
    model = randomize(small())
    x, t, text = inputs()
    torch.testing.assert_close(model(x, t, Text(text.features.flip(1))), model(x, t, text))
    assert not torch.allclose(model(x, t, Text(text.features + 1)), model(x, t, text))


@pytest.mark.parametrize(
    ("options", "y", "message"),
    [
        ({}, torch.tensor([1, 2]), "MMDiT is conditioned on text features, not on class labels"),
        ({}, Text(torch.zeros(2, 3, 6)), r"takes text features \(B, L, 5\), not \(2, 3, 6\)"),
        ({"text_length": 4}, Text(torch.zeros(2, 3, 5)), "takes text of 4 tokens, not 3"),
        ({}, Text(torch.zeros(2, 3, 5), torch.zeros(2, 7)), "takes no pooled text features"),
        ({"pooled_width": 7}, Text(torch.zeros(2, 3, 5)), r"pooled text features \(B, 7\), there are none"),
        ({"pooled_width": 7}, Text(torch.zeros(2, 3, 5), torch.zeros(2, 8)), r"\(B, 7\), not \(2, 8\)"),
    ],
)
def test_what_is_no_text_of_the_model(options, y, message):
    with pytest.raises(UserError, match=message):
        small(**options)(torch.zeros(2, 4, 4, 6), torch.zeros(2), y)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "hidden_size 32 must be divisible by 4 and by num_heads 3"),
        ({"pos_grid": (1, 12)}, "pos_grid 1×12 of MMDiT is smaller than the token grid of 2×3"),
        ({"qk_norm": "layer"}, "qk_norm 'layer': MMDiT has rms, or none"),
        ({"dual_attention": (2,)}, r"dual_attention \[2\]: blocks are numbered from 0 to 1"),
        ({"input_size": 5}, "cannot be cut into patches of 2"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        small(**changes)


def test_null_text():
    model = small(pooled_width=7)
    _, _, text = inputs(pooled=7)
    with pytest.raises(UserError, match="has no null_text"):
        model.null(text)
    features, pooled = torch.randn(3, 5), torch.randn(7)
    model.set_null_text(features, pooled)
    null = model.null(text)
    assert torch.equal(null.features, features.expand(2, 3, 5)) and torch.equal(null.pooled, pooled.expand(2, 7))
    with pytest.raises(UserError, match="beside a null_text of"):
        model.null(inputs(length=4, pooled=7)[2])
    with pytest.raises(UserError, match="not on class labels"):
        model.null(torch.tensor([1]))
    # A checkpoint brings it, and is strict about nothing else.
    fresh = small(pooled_width=7)
    assert "null_text" not in fresh.state_dict()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.null(text).features, null.features)
    assert fresh.example_condition(3).features.shape == (3, 3, 5)
    with pytest.raises(RuntimeError, match="null_text"):
        model.load_state_dict(small(pooled_width=7).state_dict())


def test_conditions():
    one, other = Text(torch.zeros(2, 3, 5)), Text(torch.ones(2, 3, 5))
    both = map_condition(lambda *y: torch.cat(y), one, other)
    assert both.features.shape == (4, 3, 5) and both.pooled is None
    drop = torch.tensor([True, False])
    assert select(drop, other, one).features[:, 0, 0].tolist() == [1, 0]
    assert select(drop, torch.tensor([9, 9]), torch.tensor([1, 2])).tolist() == [9, 2]
    with pytest.raises(UserError, match="class labels and text"):
        map_condition(lambda *y: torch.cat(y), one, torch.tensor([1]))
    with pytest.raises(UserError, match="with and without pooled"):
        select(drop, Text(torch.zeros(2, 3, 5), torch.zeros(2, 4)), one)
