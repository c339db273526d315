"""The latent interface by itself: grids of any number of axes, latents without positions, tables by group, its errors."""

import itertools

import numpy as np
import pytest
import torch
from numerics import randomize

from common.errors import UserError
from models.elit import LatentInterface


def windows_of(grid, shape):
    """For every window in row-major order, the row-major indices of its tokens in row-major order; by counting coordinates."""
    tokens = list(itertools.product(*map(range, grid)))
    windows = []
    for corner in itertools.product(*(range(0, n, g) for n, g in zip(grid, shape, strict=True))):
        inside = [all(a <= i < a + g for a, i, g in zip(corner, token, shape, strict=True)) for token in tokens]
        windows.append([n for n, kept in enumerate(inside) if kept])
    return windows


def test_a_spread_start_widens_the_queries_and_positions_opens_the_gates_of_read_and_changes_nothing_else():
    torch.manual_seed(0)
    interface = LatentInterface(64, 4, (8, 8), 4)
    before = {name: parameter.clone() for name, parameter in interface.named_parameters()}
    interface.spread()
    gates = torch.zeros(6, 64)
    gates[2], gates[5] = 1, 1
    for name, parameter in interface.named_parameters():
        if name in ("query", "read_pos", "write_pos", "latent_pos"):
            assert torch.allclose(parameter, before[name] * 15)
            assert abs(parameter.std().item() - 0.3) < 0.03
        elif name == "reader.adaLN_modulation.1.bias":
            assert torch.equal(parameter, gates.flatten())
        else:
            assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    ("grid", "group"),
    [((8, 4, 6), (2, 4, 3)), ((4, 4, 4), 2), ((12,), 3), ((4, 6), (1, 3)), ((2, 4, 2, 6), (2, 2, 1, 3))],
    ids=str,
)
def test_groups_of_any_number_of_axes_are_windows(grid, group):
    shape = (group,) * len(grid) if isinstance(group, int) else group
    interface = LatentInterface(8, 2, grid, group)
    tokens = torch.arange(int(np.prod(grid)) * 2).reshape(1, -1, 2)
    grouped = interface.group(tokens)
    assert grouped[0, :, :, 0].tolist() == [[2 * n for n in window] for window in windows_of(grid, shape)]
    assert torch.equal(interface.ungroup(grouped), tokens)
    assert (interface.num_groups, interface.latents_per_group) == (len(grouped[0]), int(np.prod(shape)))


def test_a_video_runs_through_read_and_write_at_a_budget():
    interface = randomize(LatentInterface(16, 2, (8, 16, 16), (2, 4, 4))).float()
    torch.manual_seed(0)  # a token of some inputs moves by less than float32 shows
    x, c = torch.randn(1, 2048, 16), torch.randn(1, 16)
    tokens, kept, tail = interface.read(x, c, 0.25)
    assert tokens.shape == (1, 64, 32, 16) and kept.shape == (1, 64 * 8, 16) and tail is None
    before = interface.write(tokens, kept)
    assert before.shape == (1, 2048, 16)
    x[0, 5 * 256 + 9 * 16 + 6] += 1  # frame 5, row 9, column 6: of the window at frames 4-5, rows 8-11, columns 4-7
    changed = (interface.write(*interface.read(x, c, 0.25)[:2]) - before)[0].abs().amax(dim=1).reshape(8, 16, 16).nonzero()
    assert len(changed) == 32
    assert changed.amin(dim=0).tolist() == [4, 8, 4] and changed.amax(dim=0).tolist() == [5, 11, 7]


@pytest.mark.parametrize("k", [1, 3, 4])
def test_gathered_rows_are_those_of_the_first_tokens_of_each_group(k):
    interface = LatentInterface(8, 2, (4, 6), 2)
    table = torch.arange(48).reshape(24, 2)
    wanted = [row for window in windows_of((4, 6), (2, 2)) for row in window[:k]]
    assert interface.gather(table, k).tolist() == table[wanted].tolist()
    assert interface.gather(table[:, 0], k).tolist() == table[wanted, 0].tolist()
    assert interface.gather(table.reshape(24, 1, 2), k).shape == (6 * k, 1, 2)


def test_without_latent_positions_read_gives_the_query_and_no_parameter_is_left_over():
    interface = LatentInterface(16, 2, (4, 6), 2, latent_pos=False).double()
    assert "latent_pos" not in dict(interface.named_parameters()) and interface.latent_pos is None
    x, c = torch.randn(2, 24, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    _, kept, _ = interface.read(x, c, 0.75)
    torch.testing.assert_close(kept, interface.query[:3].repeat(6, 1).expand(2, -1, -1), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (
            ((8, 8), 5),
            {},
            "group_size 5: the token grid of 8×8 cannot be cut into such groups; choose a common divisor of 8 and 8",
        ),
        (((8, 16, 16), (2, 4, 5)), {}, "group_size 2×4×5: the token grid of 8×16×16 .* a divisor of 8, of 16, of 16"),
        (((8, 16, 16), (4, 4)), {}, "group_size 4×4: .* one number for each of its 3 axes"),
        (((4, 4), 2), {"tail": "keep"}, "tail 'keep' is not valid; choose drop or skip"),
        (((4, 4), 2), {"read_depth": 0}, "read_depth 0: must be at least 1"),
        (((4, 4), 2), {"write_depth": -1}, "write_depth -1: must be at least 1"),
    ],
    ids=lambda value: "" if isinstance(value, str | dict) else str(value),
)
def test_errors_speak_of_the_interfaces_own_arguments(arguments, options, words):
    with pytest.raises(UserError, match=f"^{words}"):
        LatentInterface(8, 2, *arguments, **options)
