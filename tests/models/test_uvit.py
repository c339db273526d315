"""U-ViT against the outputs of its reference program, ELIT around it, its sizes, initial weights and conditions."""

import math
import re

import pytest
import torch
from golden_cases import arrays, case, weights
from numerics import randomize
from torch import nn

from common.errors import UserError
from models.conditioning import Text
from models.costs import count_flops
from models.elit import ELITUViT
from models.published import from_uvit as from_published
from models.uvit import UViT

TAGS = ["uvit_class", "uvit_conv_odd", "uvit_uncond", "uvit_t2i"]


def golden_arguments(tag: str) -> dict:
    """Our arguments of a golden case."""
    kw = case(tag)["kw"]
    return {
        "input_size": kw["img_size"],
        "patch_size": kw["patch_size"],
        "in_channels": kw["in_chans"],
        "hidden_size": kw["embed_dim"],
        "depth": kw["depth"],
        "num_heads": kw["num_heads"],
        "num_classes": kw["num_classes"] - 1 if kw.get("num_classes", -1) > 0 else None,  # there the null label counts too
        "text": (kw["num_clip_token"], kw["clip_dim"]) if "clip_dim" in kw else None,
        "final_conv": kw["conv"],
        "time_mlp": kw.get("mlp_time_embed", False),
        "qkv_bias": kw.get("qkv_bias", False),
    }


def golden_inputs(tag: str) -> tuple:
    data = arrays(tag)
    return data["x"], data["timesteps"] / 1000, Text(data["context"]) if "context" in data else data.get("y")


def small(cls=UViT, **changes):
    arguments = {"input_size": (8, 4), "patch_size": 2, "hidden_size": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
    return cls(**arguments | changes)


def labelled():
    return torch.randn(2, 4, 8, 4), torch.tensor([0.2, 0.9]), torch.tensor([1, 5])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tag", TAGS)
def test_golden(tag, fused):
    model = UViT(**golden_arguments(tag), fused_attn=fused)
    model.load_state_dict(from_published(weights(tag)))
    with torch.no_grad():
        torch.testing.assert_close(model(*golden_inputs(tag)), arrays(tag)["out"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("tag", ["elit_uvit", "elit_uvit_skip", "elit_uvit_t2i"])
def test_golden_elit(tag):
    of = case(tag)["of"]
    model = ELITUViT(**golden_arguments(of), **case(tag)["options"])
    model.load_state_dict(from_published(weights(of)) | weights(tag))
    for budget in case(tag)["budgets"]:
        with torch.no_grad():
            out = model(*golden_inputs(of), budget)
        torch.testing.assert_close(out, arrays(tag)[f"out_{budget}"], rtol=0, atol=1e-4)


def test_what_the_golden_outputs_do_not_show():
    model = small(final_conv=False)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert {block.mlp.approximate for block in model.blocks} == {"none"}
    assert [block.skip_linear is not None for block in model.blocks] == [False, False, False, True, True]
    assert not any("qkv.bias" in name for name, _ in model.named_parameters())
    assert isinstance(model.final_layer, nn.Identity)


def test_initial_weights_follow_the_rules():
    model = small(hidden_size=128, time_mlp=True, qkv_bias=True, num_classes=200)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert abs(module.weight.std() / 0.02 - 1) < 0.1 and module.weight.abs().max() > 0.06 and not module.bias.any()
    assert abs(model.pos_embed.std() / 0.02 - 1) < 0.1
    assert abs(model.label_emb.weight.std() - 1) < 0.05
    bound = 1 / math.sqrt(4 * 2 * 2)  # PyTorch's default for a convolution of 16 inputs
    assert 0.95 * bound < model.patch_embed.proj.weight.abs().max() <= bound and model.patch_embed.proj.bias.any()
    assert model.final_layer.weight.any() and model.final_layer.bias.any()


def test_a_tail_block_joins_with_the_head_block_it_mirrors_and_a_core_block_with_a_core_block():
    model = randomize(small(ELITUViT, depth=6, head_depth=2, tail_depth=2, elit_group_size=2)).float()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, arguments, out: seen.append((*arguments, out)))
    model(*labelled(), inference_budget=0.5)
    assert [len(x[0]) for x, *_ in seen] == [10, 10, 6, 6, 6, 10, 10]  # label, time and 8 tokens or 4 latents
    for i in range(7):
        skip, mirrored = seen[i][1], seen[6 - i][2]
        assert skip is mirrored if i > 3 else skip is None
    assert seen[5][0][:, :2].equal(seen[4][2][:, :2])  # label and time go on from what the core made of them


def test_repa_reads_image_tokens_after_the_last_head_block_at_most():
    model = randomize(small(ELITUViT, head_depth=1, tail_depth=1, elit_group_size=2, encoder_depth=2, z_dims=(6,))).float()
    tokens = []
    model.blocks[0].register_forward_hook(lambda module, arguments, out: tokens.append(out[:, 2:]))
    _, (features,) = model(*labelled(), return_features=True)
    torch.testing.assert_close(features, model.projectors[0](tokens[0]))


@pytest.mark.parametrize("budget", [None, 1.0, 0.25])
def test_every_parameter_has_a_gradient(budget):
    model = randomize(small(ELITUViT, head_depth=1, tail_depth=1, elit_group_size=2, time_mlp=True)).float()
    model(*labelled(), inference_budget=budget).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_text_in_place_of_labels():
    model = small(text=(3, 6))
    text = Text(torch.randn(2, 3, 6))
    x, t, y = labelled()
    assert model(x, t, text).shape == x.shape and model.num_classes is None
    assert model.pos_embed.shape == (1, 1 + 3 + 8, 32)
    for wrong, words in (
        (y, "U-ViT is conditioned on text features, not on class labels"),
        (Text(torch.randn(2, 3, 5)), "takes text features (B, L, 6)"),
        (Text(torch.randn(2, 4, 6)), "takes text of 3 tokens, not 4"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            model(x, t, wrong)
    with pytest.raises(UserError, match="U-ViT is conditioned on class labels"):
        small()(x, t, text)
    with pytest.raises(UserError, match="no null_text"):
        model.null(text)
    model.set_null_text(torch.ones(3, 6))
    assert model.null(text).features.equal(torch.ones(2, 3, 6))
    assert small().null(y).tolist() == [5, 5]
    assert count_flops(model) > count_flops(small())


def test_without_labels_there_is_no_label_token():
    model = small(num_classes=None)
    x, t, _ = labelled()
    assert model.pos_embed.shape == (1, 1 + 8, 32) and model(x, t, None).shape == x.shape
    assert model.null(None) is None
    assert count_flops(model) < count_flops(small())


@pytest.mark.parametrize("depth", [3, 0, 7])
def test_an_odd_depth_is_refused(depth):
    with pytest.raises(UserError, match=f"depth {depth}: a U-ViT's must be even"):
        small(depth=depth)


@pytest.mark.parametrize(("head", "tail"), [(1, 2), (2, 1), (0, 1)])
def test_unequal_head_and_tail_are_refused(head, tail):
    with pytest.raises(UserError, match=f"head_depth {head} and tail_depth {tail}: must be equal in a U-ViT"):
        small(ELITUViT, head_depth=head, tail_depth=tail, elit_group_size=2)


def test_a_core_of_the_middle_block_alone():
    model = randomize(small(ELITUViT, head_depth=2, tail_depth=2, elit_group_size=2)).float()
    assert model(*labelled(), inference_budget=0.25).shape == (2, 4, 8, 4)
