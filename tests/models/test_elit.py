"""The elastic latent interface: budgets, mask levels, groups, tail policies, and ELIT-SiT against a NumPy reference."""

import math

import numpy as np
import pytest
import torch
from numerics import inputs, numpy_weights, randomize
from reference import Reference, rms_norm, window_members
from torch import nn

from checkpoint import reading
from common.errors import UserError
from models.elit import ELITSiT, FullWidthRMSNorm, LatentInterface, budget_to_k, mask_levels, mask_to_budget

TINY = {"patch_size": 2, "hidden_size": 32, "depth": 4, "num_heads": 4, "num_classes": 5}


# ---------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("J", [1, 4, 9, 16, 25, 36, 49, 64])
def test_every_multiple_of_the_smallest_budget_keeps_as_many_latents(J):
    for k in range(1, J + 1):
        assert budget_to_k(k / J, J) == k
        assert budget_to_k(float(f"{k / J:.8f}"), J) == k  # printed and read again
    assert budget_to_k(None, J) == J


@pytest.mark.parametrize(
    ("budget", "J", "k"), [(0.1, 16, 1), (0.9999, 16, 15), (0.5, 9, 4), (0.34, 9, 3), (0.0625, 64, 4), (1, 4, 4)]
)
def test_a_budget_between_multiples_keeps_the_number_below(budget, J, k):
    assert budget_to_k(budget, J) == k


@pytest.mark.parametrize("budget", [0, 0.0624, -0.5, 1.0001, 16, math.nan, math.inf])
def test_budget_out_of_range_names_the_range(budget):
    with pytest.raises(UserError, match=r"\[1/16, 1\]"):
        budget_to_k(budget, 16)


# ------------------------------------------------------------------------------------------------------ mask levels


@pytest.mark.parametrize("J", [9, 16, 25, 36, 49, 64])
def test_mask_levels_are_all_multiples_between_the_limits(J):
    top = 1 - 1 / J
    assert mask_levels(J, 0, top) == pytest.approx([n / J for n in range(J)])
    assert mask_levels(J, 0.0, None) == pytest.approx([n / J for n in range(J)])
    assert mask_levels(J, None, None) == [0.0]
    for n in range(J):
        assert mask_levels(J, None, n / J) == pytest.approx([n / J])
        assert mask_levels(J, n / J, n / J) == pytest.approx([n / J])
        assert mask_levels(J, n / J, None) == pytest.approx([i / J for i in range(n, J)])


@pytest.mark.parametrize("J", [9, 16, 25, 36, 49, 64])
def test_masked_and_kept_latents_add_up(J):
    for n, level in enumerate(mask_levels(J, 0, 1 - 1 / J)):
        assert budget_to_k(mask_to_budget(level, J), J) == J - n


def test_mask_levels_of_the_published_command_lines():
    assert mask_levels(16, 0, 0.9375) == [n / 16 for n in range(16)]
    assert mask_levels(16, None, 0.75) == [0.75]
    assert mask_levels(16, 0.75, 0.9375) == [0.75, 0.8125, 0.875, 0.9375]
    assert len(mask_levels(64, 0, 0.9375)) == 61
    assert mask_levels(16, 0.3, 0.6) == [0.3125, 0.375, 0.4375, 0.5, 0.5625]
    assert mask_levels(9, 0.33, 0.34) == pytest.approx([1 / 3])


@pytest.mark.parametrize(
    ("J", "low", "high", "said", "near"),
    [
        (16, 0.6, 0.3, "above the maximum", ["0.3125", "0.625"]),
        (16, -0.1, 0.5, "out of range", ["0", "0.5"]),
        (16, 0.0, 1.0, "out of range", ["0.9375"]),
        (16, None, 0.95, "out of range", ["0.9375"]),
        (16, 0.95, None, "out of range", ["0.9375"]),
        (4, 0.8, 0.9, "out of range", ["0.75"]),
        (16, math.nan, 0.5, "out of range", ["0.5"]),
        (16, 0.0, math.inf, "out of range", ["0.9375"]),
        (16, 0.3, 0.31, "no mask level", ["0.25", "0.3125"]),
        (16, None, 0.3, "no mask level", ["0.25", "0.3125"]),
        (4, 0.3, 0.4, "no mask level", ["0.25", "0.5"]),
    ],
)
def test_wrong_mask_limits_name_the_nearest_levels(J, low, high, said, near):
    with pytest.raises(UserError) as error:
        mask_levels(J, low, high)
    message, _, offered = str(error.value).rpartition("the nearest: ")
    assert said in message and "mask_prob" in message
    assert set(near) <= set(offered.split(", "))


# ----------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize(("rows", "columns", "g"), [(4, 4, 2), (2, 6, 2), (9, 3, 3), (4, 8, 4), (3, 2, 1)])
def test_grouping_is_a_permutation_in_window_order(rows, columns, g):
    interface = LatentInterface(8, 2, (rows, columns), g)
    tokens = torch.arange(rows * columns * 2).reshape(1, rows * columns, 2)
    grouped = interface.group(tokens)
    assert grouped[0, :, :, 0].tolist() == [[2 * n for n in window] for window in window_members(rows, columns, g)]
    assert torch.equal(interface.ungroup(grouped), tokens)


@pytest.mark.parametrize(("grid", "g"), [((4, 4), 3), ((4, 6), 4), ((2, 2), 4), ((4, 4), 0)])
def test_grid_that_cannot_be_cut_into_groups_is_refused(grid, g):
    with pytest.raises(UserError, match="group"):
        LatentInterface(8, 2, grid, g)


@pytest.mark.parametrize("options", [{"tail": "keep"}, {"read_depth": 0}, {"write_depth": 0}])
def test_interface_refuses_wrong_options(options):
    with pytest.raises(UserError):
        LatentInterface(8, 2, (4, 4), 2, **options)


@pytest.mark.parametrize(("head", "tail"), [(4, 0), (2, 2), (-1, 1), (0, 4)])
def test_split_without_a_core_is_refused(head, tail):
    with pytest.raises(UserError, match="core"):
        ELITSiT(**TINY, input_size=8, elit_group_size=2, head_depth=head, tail_depth=tail)


# -------------------------------------------------------------------------------------------------------- interface


def test_rms_norm_has_its_eps_outside_the_root():
    norm = randomize(FullWidthRMSNorm(24))
    x = np.random.default_rng(0).standard_normal((5, 24)) * np.array([[1.0], [1e-2], [1e-4], [1e-6], [0.0]])
    wanted = rms_norm(x, norm.scale.detach().numpy())
    np.testing.assert_allclose(norm(torch.from_numpy(x).float()).detach(), wanted, rtol=1e-5, atol=1e-9)
    assert norm(torch.from_numpy(x).bfloat16()).dtype == torch.bfloat16


def test_rms_norm_of_bf16_is_made_in_float32():
    norm = FullWidthRMSNorm(4096)
    x = torch.full((1, 4096), 0.5, dtype=torch.bfloat16)
    x[0, 0] = 64.0  # the sum of squares, 5119.75, has more digits than bf16 (5120 in steps of 32)
    wanted = 64.0 / (math.sqrt((4095 * 0.25 + 64.0**2) / 4096) + 1e-5)
    assert norm(x)[0, 0].item() == torch.tensor(wanted).bfloat16().item()


@pytest.mark.parametrize("tail", ["drop", "skip"])
@pytest.mark.parametrize("budget", [None, 0.5, 0.25])
def test_read_hands_over_the_shapes_that_write_takes(tail, budget):
    interface = randomize(LatentInterface(16, 2, (4, 6), 2, cond_dim=8, tail=tail))
    k = 4 if budget is None else int(4 * budget)
    tokens, kept, rest = interface.read(torch.randn(3, 24, 16), torch.randn(3, 8), budget)
    assert tokens.shape == (3, 6, 4, 16) and kept.shape == (3, 6 * k, 16)
    if tail == "skip" and k < 4:
        assert rest.shape == (3, 6, 4 - k, 16)
    else:
        assert rest is None
    assert interface.write(tokens, kept, rest).shape == (3, 24, 16)


@pytest.mark.parametrize("budget", [None, 0.5, 0.25])
@pytest.mark.parametrize("tail", ["drop", "skip"])
def test_untrained_interface_leaves_the_tokens_but_for_the_position_terms(tail, budget):
    interface = LatentInterface(16, 2, (4, 6), 2, tail=tail, read_depth=2, write_depth=2).double()
    x, c = torch.randn(2, 24, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    tokens, kept, rest = interface.read(x, c, budget)
    out = interface.write(tokens, 3 * torch.randn_like(kept), rest).detach().numpy()
    wanted = x.numpy().copy()
    position = (interface.read_pos + interface.write_pos).detach().numpy()
    for window in window_members(4, 6, 2):
        wanted[:, window] += position
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-12)


def test_untrained_read_gives_the_query_and_the_latent_positions():
    interface = LatentInterface(16, 2, (4, 6), 2).double()
    _, kept, _ = interface.read(torch.randn(2, 24, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64), 0.75)
    wanted = (interface.query + interface.latent_pos)[:, :3].reshape(1, 18, 16).expand(2, -1, -1)
    torch.testing.assert_close(kept, wanted, rtol=0, atol=1e-15)


def test_initial_weights_of_the_interface_follow_the_rules():
    interface = LatentInterface(128, 4, (16, 16), 4, read_depth=2, write_depth=2)
    assert interface.query.shape == interface.read_pos.shape == interface.write_pos.shape == (16, 128)
    assert interface.latent_pos.numel() == 256 * 128
    ruled = set()
    for name, parameter in interface.named_parameters():
        values = parameter.detach()
        if name in ("query", "read_pos", "write_pos", "latent_pos"):
            assert abs(values.std() / 0.02 - 1) < 0.1 and values.abs().max() > 0.05
        elif "adaLN" in name or (name.startswith("writer") and (("attn" in name and ".proj." in name) or "fc2" in name)):
            assert (values == 0).all(), name
            ruled.add(name)
        elif name.endswith("norm.scale"):
            assert (values == 1).all()
        else:  # PyTorch's default for a Linear of 128 inputs: uniform up to 1/√128, weights and biases
            assert 0.95 / math.sqrt(128) < values.abs().max() <= 1 / math.sqrt(128), name
            assert abs(values.std() * math.sqrt(3 * 128) - 1) < 0.15, name
    assert len(ruled) == 2 + 2 * 3
    assert not any("fc" in name and "bias" in name for name, _ in interface.named_parameters())
    assert [interface.reader.mlp[0].fc1.weight.shape, interface.writer.mlp[0].fc2.weight.shape] == [(128, 128)] * 2


def test_several_read_layers_share_one_modulation():
    one, three = (LatentInterface(16, 2, (4, 4), 2, read_depth=d) for d in (1, 3))
    assert len(three.reader.attn) == 3
    assert [n for n, _ in one.named_parameters() if "adaLN" in n] == [n for n, _ in three.named_parameters() if "adaLN" in n]


def test_interface_wraps_any_stack_of_blocks():
    interface = randomize(LatentInterface(16, 4, (4, 4), 2, cond_dim=3))
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    x = torch.randn(2, 16, 16, requires_grad=True)
    tokens, kept, tail = interface.read(x, torch.randn(2, 3), 0.5)
    out = interface.write(tokens, stack(kept), tail)
    out.square().mean().backward()
    assert out.shape == x.shape and all(p.grad is not None and p.grad.any() for p in stack.parameters())


# ------------------------------------------------------------------------------------------------------------ model


def elit_pair(
    *, read_depth=1, write_depth=1, tail="drop", head_depth=1, tail_depth=1, group_size=2, write="published", **options
):
    """ELIT-SiT with random weights in float64, and its reference."""
    interface = {
        "elit_group_size": group_size,
        "elit_read_depth": read_depth,
        "elit_write_depth": write_depth,
        "elit_tail": tail,
        "elit_write": write,
    }
    model = ELITSiT(**(TINY | options | interface), head_depth=head_depth, tail_depth=tail_depth)
    model = randomize(model).double()
    elit = {"group_size": group_size, "head_depth": head_depth, "tail_depth": tail_depth}
    elit |= {"read_depth": read_depth, "write_depth": write_depth, "tail": tail, "write": write}
    return model, Reference(numpy_weights(model), heads=4, patch_size=2, elit=elit)


@pytest.mark.parametrize(
    "options",
    [
        {"input_size": 8, "tail": "drop"},
        {"input_size": 8, "tail": "skip"},
        {"input_size": (4, 12), "tail": "drop", "read_depth": 2, "write_depth": 2, "qk_norm": True},
        {"input_size": (12, 4), "tail": "skip", "read_depth": 2, "write_depth": 2, "fused_attn": False},
        {"input_size": (6, 12), "tail": "drop", "group_size": 3, "head_depth": 2, "tail_depth": 0},
        {"input_size": 4, "tail": "skip", "head_depth": 0, "tail_depth": 3, "write_depth": 2},
        {"input_size": 4, "write": "paper", "write_depth": 2, "elit_mlp_ratio": 2.5},
    ],
    ids=[
        "drop",
        "skip",
        "drop-wide-deep-qk_norm",
        "skip-tall-deep-plain",
        "drop-J9-no-tail-blocks",
        "skip-one-group-no-head",
        "paper-write-wide-mlp",
    ],
)
def test_elit_is_the_reference_at_every_kind_of_budget(options):
    model, reference = elit_pair(**options)
    J = model.interface.latents_per_group
    for k, times, tolerance in ((None, [0.0, 0.0], 1e-9), (1, [0.0, 0.0], 1e-9), (J - 1, [0.61, 1.0], 3e-6)):
        x, t, y = inputs(model, times)
        found = model(x, t, y, None if k is None else k / J).detach().numpy()
        wanted, _ = reference.forward(x, t, y, k)
        assert found.std() > 0.1
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("budget", ["1.0", "0.75", "0.25"])
def test_elit_gives_the_published_outputs(golden, golden_checkpoint, budget):
    arrays, args = golden
    model, config = reading.load_model(golden_checkpoint("elit"))
    assert (model.head_depth, model.tail_depth, model.interface.tail) == (8, 2, "skip")
    assert config["elit_group_size"] == args["elit"]["elit_group_size"] == 2
    velocity = model(arrays["elit_x"], arrays["elit_t"], arrays["elit_y"], float(budget))
    torch.testing.assert_close(velocity, arrays[f"elit_out_{budget}"], rtol=0, atol=1e-4)


def test_no_budget_is_the_full_budget_and_others_differ():
    model, _ = elit_pair(input_size=8)
    arguments = inputs(model, [0.2, 0.8])
    full = model(*arguments)
    assert torch.equal(full, model(*arguments, inference_budget=1.0))
    assert torch.equal(model(*arguments, inference_budget=0.5), model(*arguments, inference_budget=0.6))
    assert (full - model(*arguments, inference_budget=0.5)).abs().max() > 0.01


@pytest.mark.parametrize("tail", ["drop", "skip"])
def test_dropped_latents_matter_with_skip_and_not_with_drop(tail):
    model, _ = elit_pair(input_size=8, tail=tail)
    arguments = inputs(model, [0.2, 0.8])
    before = model(*arguments, inference_budget=0.5)
    before.square().mean().backward()
    interface = model.interface
    beyond = [interface.query.grad[2:], interface.latent_pos.grad.reshape(4, 4, 32)[:, 2:]]
    with torch.no_grad():
        interface.query[2:] += 1
        interface.latent_pos.view(4, 4, 32)[:, 2:] -= 1
    changed = (model(*arguments, inference_budget=0.5) - before).abs().max().item()
    if tail == "drop":
        assert changed == 0 and not any(g.any() for g in beyond)
    else:
        assert changed > 1e-3 and all(g.any() for g in beyond)
    assert interface.query.grad[:2].any()


def test_skipped_latents_do_not_enter_the_core():
    model, _ = elit_pair(input_size=8, tail="skip")
    lengths = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, arguments: lengths.append(arguments[0].shape[1]))
    model(*inputs(model, [0.5]), inference_budget=0.25)
    assert lengths == [16, 4, 4, 16]


@pytest.mark.parametrize("budget", [0.2, 1.5])
def test_model_refuses_a_budget_out_of_range(budget):
    model, _ = elit_pair(input_size=8)
    with pytest.raises(UserError, match=r"\[1/4, 1\]"):
        model(*inputs(model, [0.5]), inference_budget=budget)
