"""HDiT against the reference program's outputs, the published sizes, and independent formulas of its parts."""

import math

import pytest
import torch
from golden_cases import arrays, hdit_arguments, randomized_hdit, weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention

from common.errors import UserError
from models import local_attention
from models.conditioning import Text
from models.costs import count_flops
from models.hdit import HDiT, hourglass, places, positions, rotation
from models.local_attention import Kind, attend, attended_pairs, attention_mask, kernel_size
from models.published import from_hdit

TAGS = ["hdit_na", "hdit_na_wide", "hdit_swin", "hdit_global"]


def small(**changes) -> HDiT:
    arguments = hdit_arguments("hdit_na_wide") | changes
    return HDiT(**arguments)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tag", TAGS)
def test_golden(tag, fused):
    model, data = HDiT(**hdit_arguments(tag), fused_attn=fused), arrays(tag)
    model.load_state_dict(from_hdit(weights(tag)))
    with torch.no_grad():
        out = model(data["x"], data["sigma"].log() / 4, data.get("y"))
    torch.testing.assert_close(out, data["out"], rtol=0, atol=1e-4 if tag != "hdit_global" else 5e-5)


def test_eps():
    model = small()
    assert {m.eps for m in model.modules() if hasattr(m, "eps")} == {1e-6}
    x, c = torch.full((1, 1, 16), 1e-3), torch.zeros(1, 24)  # mean(x²) = eps
    assert math.isclose(model.blocks[0].ff.norm(x, c)[0, 0, 0].item(), math.sqrt(0.5), rel_tol=1e-4)
    assert math.isclose(model.out_norm(x)[0, 0, 0].item(), math.sqrt(0.5), rel_tol=1e-4)


def test_an_untrained_model_gives_zero_velocity_and_layers_change_nothing():
    model = small()
    x, t = torch.randn(2, 4, 6, 10), torch.tensor([0.1, 0.9])
    assert torch.equal(model(x, t, torch.tensor([1, 10])), torch.zeros_like(x))
    s = model.embed(x, t, torch.tensor([1, 10]))
    before = s.x
    model.step(0, s)
    assert torch.equal(s.x, before)
    assert torch.equal(model.blocks[0].self_attn.scale, torch.full((2,), 10.0)) and model.splits[0].fac.item() == 0.5


def test_random_frequencies_are_saved_and_not_trained():
    model = small()
    assert "time_emb.weight" in model.state_dict() and "time_emb.weight" not in dict(model.named_parameters())


def naive_neighborhood(q: int, k: int, rows: int, columns: int, size: int) -> bool:
    start = [min(max(p - size // 2, 0), n - size) for p, n in ((q // columns, rows), (q % columns, columns))]
    return all(a <= p < a + size for a, p in zip(start, (k // columns, k % columns), strict=True))


@pytest.mark.parametrize(
    ("kind", "grid", "shift", "size"),
    [
        (Kind("neighborhood", 7), (8, 9), 0, 7),
        (Kind("neighborhood", 7), (4, 9), 0, 3),
        (Kind("neighborhood", 3), (5, 3), 0, 3),
        (Kind("shifted-window", 4), (8, 12), 0, 4),
        (Kind("shifted-window", 4), (8, 12), 2, 4),
        (Kind("shifted-window", 3), (6, 9), 1, 3),
    ],
)
def test_masks(kind, grid, shift, size):
    rows, columns = grid
    n = rows * columns
    x = torch.zeros(1)
    mask = attention_mask(kind, grid, shift, x, True)
    if kind[0] == "neighborhood":
        expected = [[naive_neighborhood(q, k, rows, columns, size) for k in range(n)] for q in range(n)]
        assert (mask.sum(dim=1) == size * size).all()
    else:
        window = [((i // columns + shift) // size, (i % columns + shift) // size) for i in range(n)]
        expected = [[a == b for b in window] for a in window]
    assert torch.equal(mask, torch.tensor(expected))
    assert kernel_size(kind, grid) == size and attended_pairs(kind, grid, shift) == mask.sum()
    assert attention_mask(kind, grid, shift, x, True) is mask  # made once
    assert attention_mask(kind, grid, shift, x.to("meta"), True).is_meta
    assert attention_mask(Kind("global"), grid, 0, x, True) is None and attention_mask(kind, None, 0, x, True) is None


@pytest.mark.parametrize(("kind", "shift"), [(Kind("neighborhood", 7), 0), (Kind("shifted-window", 4), 2)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_blocks_of_flex_attention_are_the_dense_mask(kind, shift, monkeypatch):
    monkeypatch.setattr(local_attention, "_compiled_flex_attention", lambda: flex_attention)  # what is compiled on CUDA
    grid, n = (8, 20), 160  # more than one block of 128
    blocks = local_attention._build_mask(kind, grid, shift, torch.device("cpu"), flex=True)
    mask = attention_mask(kind, grid, shift, torch.zeros(1), True)
    q, k, v = torch.randn(3, 2, 2, n, 16).unbind(0)
    dense = attend(q, k, v, mask, True)
    torch.testing.assert_close(attend(q, k, v, blocks, True), dense)
    torch.testing.assert_close(attend(q, k, v, mask, False), dense)


def test_masks_of_fake_tensors_are_not_kept():
    grid = (6, 18)  # of no other test
    model, y = small(input_size=grid), torch.tensor([1, 2])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.zeros(2, 4, *grid))
        model(fake, mode.from_tensor(torch.zeros(2)), mode.from_tensor(y))
    assert type(model(torch.zeros(2, 4, *grid), torch.zeros(2), y)) is torch.Tensor


def test_a_mask_first_made_in_inference_mode_serves_training():
    model = randomized_hdit(small(attentions=[("neighborhood", 3), ("global",)], input_size=(6, 14)))
    x, t, y = torch.randn(2, 4, 6, 14), torch.tensor([0.1, 0.9]), torch.tensor([1, 2])
    with torch.inference_mode():
        model(x, t, y)
    out = model(x, t, y)
    assert out.isfinite().all()
    out.sum().backward()


def test_layers_of_a_level_are_counted_on_through_both_sides():
    depths, kinds = [3, 2, 2], [("shifted-window", 4), ("neighborhood", 3), ("shifted-window", 2)]
    found = places(depths, [Kind(*kind) for kind in kinds])
    assert [p.level for p in found] == [0, 0, 0, 1, 1, 2, 2, 1, 1, 0, 0, 0]
    assert [p.shift for p in found] == [0, 2, 0, 0, 0, 0, 1, 0, 0, 2, 0, 2]
    assert [i for i, p in enumerate(found) if p.merges] == [2, 4] and [i for i, p in enumerate(found) if p.splits] == [7, 9]


def test_positions_and_rotation():
    pos = positions((2, 4), torch.zeros(1))
    assert pos[:, 0].tolist() == [-0.25] * 4 + [0.25] * 4 and pos[:4, 1].tolist() == [-0.75, -0.25, 0.25, 0.75]
    merged = pos.view(1, 2, 2, 2, 2).mean(dim=(1, 3)).flatten(0, 1)
    assert torch.equal(merged, positions((1, 2), torch.zeros(1)))
    cos, sin = rotation(*pos.double().unbind(1), num_heads=3, head_width=16)
    assert cos.shape == (3, 8, 4)
    for h in range(3):  # n = 6 frequencies, head h has F_h and F_{3+h}
        f = [math.pi * 10 ** ((h + 3 * i) / 6) for i in range(2)]
        expected = [[p * w for p in (y, x) for w in f] for y, x in pos.tolist()]
        torch.testing.assert_close(cos[h], torch.tensor(expected, dtype=torch.float64).cos())
        torch.testing.assert_close(sin[h], torch.tensor(expected, dtype=torch.float64).sin())


def test_levels_of_a_size():
    shape = {"inner_depth": 6, "inner_width": 768, "outer_depth": 2}
    assert [len(hourglass((n, n), **shape)["depths"]) for n in (8, 16, 24, 32, 64, 128)] == [1, 1, 1, 2, 3, 4]
    three = hourglass((64, 64), **shape)
    assert three["widths"] == [192, 384, 768] and three["depths"] == [2, 2, 6]
    assert three["attentions"] == [("neighborhood", 7), ("neighborhood", 7), ("global",)]
    assert len(hourglass((16, 16), levels=2, **shape)["depths"]) == 2


def test_windows_count_as_attended():
    kinds = [("shifted-window", 4), ("global",)]
    windows = count_flops(small(input_size=(8, 16), attentions=kinds))
    dense = count_flops(small(input_size=(8, 16), attentions=[("global",)] * 2))
    pairs = 128**2 - 128 * 16, 128**2 - (4**2 + 2 * 2**2) * (3 * 4**2 + 2 * 2**2)  # unshifted, shifted
    assert dense - windows == 4 * 16 * 2 * sum(pairs)


def test_autocast_keeps_what_layers_add_to_in_float32():
    model = randomized_hdit(small())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        s = model.embed(torch.randn(2, 4, 6, 10), torch.tensor([0.1, 0.9]), torch.tensor([1, 2]))
        for i in range(len(model.blocks)):
            model.step(i, s)
            assert s.x.dtype == torch.float32 and s.c.dtype == torch.float32


def test_repa_reads_the_inner_level():
    model = small(z_dims=(5,), encoder_depth=3)
    _, (features,) = model(torch.randn(2, 4, 6, 10), torch.tensor([0.1, 0.9]), torch.tensor([1, 2]), return_features=True)
    assert features.shape == (2, 15, 5) and model.feature_grid == (3, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": (6, 9)}, r"level 0: its grid of 6×9 cannot be halved exactly"),
        (
            {"input_size": 12, "depths": [1] * 4, "widths": [16] * 4, "attentions": [("global",)] * 4},
            r"level 2: its grid of 3×3 cannot be halved .* at most 3 levels",
        ),
        ({"attentions": [("shifted-window", 4), ("global",)]}, r"level 0: windows of 4 do not divide its grid of 6×10"),
        ({"attentions": [("neighborhood", 4), ("global",)]}, r"level 0: neighborhood kernel 4 must be odd"),
        ({"attentions": [("global",), ("local",)]}, r"level 1: attention \('local', 0\) must be"),
        ({"widths": [20, 32]}, r"level 0: head_width 8 must be divisible by 8 and divide the width 20"),
        ({"depths": [2]}, r"one depth, width and attention a level"),
        ({"patch_size": 4}, r"cannot be cut into patches of 4"),
        ({"z_dims": (5,), "encoder_depth": 5}, r"--encoder-depth 5: .* after block 2 to 4"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        small(**changes)


@pytest.mark.parametrize("y", [Text(torch.zeros(2, 3, 4)), torch.zeros(2), None])
def test_what_is_no_label(y):
    with pytest.raises(UserError, match="HDiT is conditioned on class labels"):
        small()(torch.zeros(2, 4, 6, 10), torch.zeros(2), y)


def test_no_labels():
    model = HDiT(**hdit_arguments("hdit_swin"))
    assert model.num_classes is None and model.null(None) is None
    assert count_flops(model) > 0
