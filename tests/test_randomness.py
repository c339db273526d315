"""Every draw belongs to an index: the same for any process count and batch size, different for any other index."""

import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from randomness import epoch_order, generator, image_labels, image_noise, sde_noise, training_draws

SHAPE = (4, 8, 8)
FIELDS = ("posterior", "noise", "time_uniform", "time_normal", "label_drop")


# ------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize(
    "draw",
    [
        lambda indices: image_noise(3, indices, SHAPE),
        lambda indices: image_labels(3, indices, 1000),
        lambda indices: sde_noise(3, indices, 7, SHAPE),
    ],
    ids=["noise", "labels", "sde"],
)
def test_draws_of_an_image_do_not_depend_on_the_batch_it_is_in(draw):
    whole = draw(range(60, 84))
    assert len(whole) == 24
    for batch_size in (1, 5, 24):
        parts = [draw(range(60, 84)[i : i + batch_size]) for i in range(0, 24, batch_size)]
        assert torch.equal(torch.cat(parts), whole)
    for processes in (2, 3):
        for rank in range(processes):
            assert torch.equal(draw(range(60 + rank, 84, processes)), whole[rank::processes])
    assert torch.equal(draw([83, 60, 71]), whole[[23, 0, 11]])


def test_draws_do_not_depend_on_the_global_generators_nor_touch_them():
    noise, labels = image_noise(0, [5], SHAPE), image_labels(0, range(20), 1000)
    torch.manual_seed(99)
    np.random.seed(99)
    state, numpy_state = torch.random.get_rng_state(), str(np.random.get_state())
    assert torch.equal(image_noise(0, [5], SHAPE), noise) and torch.equal(image_labels(0, range(20), 1000), labels)
    training_draws(0, 0, range(2), SHAPE)
    epoch_order(0, 0, 10)
    assert torch.equal(torch.random.get_rng_state(), state) and str(np.random.get_state()) == numpy_state


def distinct(rows):
    """No two rows, each flattened, share even their first values, and none correlates with the first."""
    rows = [np.asarray(r, dtype=np.float64).ravel() for r in rows]
    return len({r[:4].tobytes() for r in rows}) == len(rows) and all(
        abs(np.corrcoef(rows[0], r)[0, 1]) < 0.35 for r in rows[1:]
    )


def test_noise_differs_with_image_seed_step_and_purpose():
    big = 2**32
    rows = [image_noise(seed, [i], SHAPE) for seed in (0, 1, 2, big, 5 * big + 1) for i in (0, 1, 2, 3, 1000)]
    rows += [sde_noise(seed, [i], step, SHAPE) for seed in (0, 1, big) for i in (0, 1) for step in (0, 1, 2, 249)]
    rows += [training_draws(seed, n, range(2), SHAPE).noise[place] for seed in (0, 1, big) for n in (0, 1) for place in (0, 1)]
    rows += [training_draws(0, 0, range(1), SHAPE).posterior, training_draws(0, 0, range(1), SHAPE, purpose="other").noise]
    assert distinct(rows)


def test_50000_images_have_different_noise():
    first_values = image_noise(0, range(50_000), (2,)).numpy()  # 64 bits: by chance two of 50,000 agree once in 10⁸ sets
    assert len(np.unique(first_values, axis=0)) == 50_000


def test_seeds_and_indices_that_spell_alike_have_different_noise():
    keys = [(1, 11), (11, 1), (111, 1), (1, 111), (2**32, 0), (0, 1), (0, 2**32), (1, 0)]
    assert distinct([image_noise(seed, [i], SHAPE) for seed, i in keys])


def test_noise_is_standard_normal_float32():
    noise = image_noise(1, range(40), SHAPE)
    assert noise.dtype == torch.float32 and noise.shape == (40, *SHAPE)
    assert stats.kstest(noise.numpy().ravel(), "norm").pvalue > 1e-3
    assert stats.kstest(sde_noise(1, range(40), 2, SHAPE).numpy().ravel(), "norm").pvalue > 1e-3
    assert stats.kstest(noise[:, 0, 0, 0].numpy(), "norm").pvalue > 1e-3  # also across images


def test_labels_are_uniform_over_the_classes():
    labels = image_labels(0, range(4000), 10)
    assert labels.dtype == torch.int64
    assert stats.chisquare(np.bincount(labels, minlength=10)).pvalue > 1e-3
    assert image_labels(0, range(50), 1).tolist() == [0] * 50


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_the_draws_of_a_process_are_its_slice_of_the_global_ones(processes):
    whole = training_draws(7, 123, range(12), SHAPE)
    local = 12 // processes
    parts = [training_draws(7, 123, range(r * local, (r + 1) * local), SHAPE) for r in range(processes)]
    for field in FIELDS:
        assert torch.equal(torch.cat([getattr(p, field) for p in parts]), getattr(whole, field)), field
    assert {p.level for p in parts} == {whole.level}


def test_draws_of_training_have_their_shapes_and_distributions():
    draws = training_draws(0, 9, range(1500), (2, 3, 3))
    assert draws.posterior.shape == draws.noise.shape == (1500, 2, 3, 3)
    assert all(getattr(draws, f).shape == (1500,) for f in FIELDS[2:])
    assert all(getattr(draws, f).dtype == torch.float32 for f in FIELDS)
    for field in ("posterior", "noise", "time_normal"):
        assert stats.kstest(getattr(draws, field).numpy().ravel(), "norm").pvalue > 1e-3, field
    for field in ("time_uniform", "label_drop"):
        values = getattr(draws, field).numpy()
        assert stats.kstest(values, "uniform").pvalue > 1e-3, field
        assert values.min() >= 0 and values.max() < 1
    columns = [draws.time_uniform, draws.time_normal, draws.label_drop, draws.noise[:, 0, 0, 0], draws.posterior[:, 0, 0, 0]]
    correlation = np.corrcoef(np.stack([c.numpy() for c in columns]))
    assert np.abs(correlation - np.eye(5)).max() < 0.1


def test_levels_of_the_forwards_are_uniform_and_every_mask_level_is_met():
    levels = np.array([training_draws(0, n, range(1), (1,)).level for n in range(1600)])
    assert stats.kstest(levels, "uniform").pvalue > 1e-3
    assert stats.chisquare(np.bincount((levels * 16).astype(int), minlength=16)).pvalue > 1e-3
    assert len(np.unique(levels)) == 1600
    assert abs(np.corrcoef(levels[:-1], levels[1:])[0, 1]) < 0.1


def test_forwards_and_seeds_have_different_draws():
    found = [training_draws(seed, n, range(2), SHAPE) for seed in (0, 1) for n in range(4)]
    for field in ("time_uniform", "time_normal", "label_drop"):
        assert len({v for d in found for v in getattr(d, field).tolist()}) == 16, field
    assert len({d.level for d in found}) == 8


# ------------------------------------------------------------------------------------------------------------ epochs


@pytest.mark.parametrize("n", [1, 2, 1000])
def test_order_of_an_epoch_is_a_permutation(n):
    assert sorted(epoch_order(0, 3, n).tolist()) == list(range(n))


def test_order_belongs_to_seed_and_epoch():
    assert np.array_equal(epoch_order(1, 2, 500), epoch_order(1, 2, 500))
    orders = [epoch_order(seed, epoch, 500) for seed in (0, 1, 2) for epoch in range(5)]
    for i, a in enumerate(orders):
        for b in orders[i + 1 :]:
            assert (a == b).sum() < 12  # two random permutations agree in one place on average
        assert (a == np.arange(500)).sum() < 12


def test_places_of_one_generator_do_not_overlap():
    streams = [generator("any", 0, 0, place).integers(2**63, size=2000) for place in (0, 1, 2, 2**32)]
    assert len(np.unique(np.concatenate(streams))) == 8000


def test_draws_travel_between_processes_in_one_piece():
    draws = training_draws(3, 5, range(2, 6), SHAPE, further_shapes=[(2, 3, 3)])
    copy = pickle.loads(pickle.dumps(draws))
    for name, value in vars(draws).items():
        other = getattr(copy, name)
        for a, b in zip(value, other, strict=True) if isinstance(value, list) else [(value, other)]:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name
    moved = draws.to(torch.device("meta"))
    assert moved.noise.is_meta and moved.noise.shape == draws.noise.shape and moved.level == draws.level
