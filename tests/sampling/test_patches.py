"""Losses and attention by patch: their means are the losses that training has, and ranks correlate as scipy's."""

import numpy as np
import pytest
import torch
from numerics import randomize
from scipy.stats import spearmanr

import models
from common.plotting import attention_maps, labelled_grid
from config.options import TrainConfig
from flows import flow_of
from loss import dfm_loss, flow_matching_loss
from sampling.patches import Patches, mean_and_error, mean_patches, patches_of, rank_correlations


@pytest.mark.parametrize("name", ["ELIT-SiT-Ti/2", "DFM-ELIT-SiT-Ti/2"])
def test_patches_are_the_loss_of_the_flow(name):
    options = {"elit_group_size": 2, "head_depth": 1, "tail_depth": 1}
    model = randomize(models.create_model(name, input_size=8, num_classes=3, **options)).eval()
    flow = flow_of(TrainConfig(model=name, exp_name="a"))
    x, y, t = torch.randn(2, 4, 8, 8), torch.tensor([0, 2]), torch.tensor([0.3, 0.8])
    noise = flow.starting_noise(0, range(2), (4, 8, 8), torch.device("cpu"))
    found = patches_of(model, flow, x, noise, t, y)
    assert found.losses.shape == (2, 4, 4) and found.attention.shape == (2, 4, 4, 4)
    with torch.no_grad():
        if isinstance(noise, list):
            expected = dfm_loss(model, x, noise, t[:, None].expand(-1, 2), y, "linear", active=1)
        else:
            expected = flow_matching_loss(model, x, noise, t, y, "linear")
            # One patch by hand: row 2, column 1 of the grid is in the third group, its second token.
            state = (1 - t[:, None, None, None]) * x + t[:, None, None, None] * noise
            error = (model(state, t, y) - (noise - x)) ** 2
            torch.testing.assert_close(found.losses[:, 2, 1], error[:, :, 4:6, 2:4].mean(dim=(1, 2, 3)))
    torch.testing.assert_close(found.losses.mean(dim=(1, 2)), expected)
    torch.testing.assert_close(found.attention.sum(dim=3), torch.ones(2, 4, 4))


def test_means_over_draws():
    found = mean_patches(3, lambda n: Patches(torch.full((1, 2), float(n)), torch.full((1,), 2.0 * n)))
    assert found.losses.tolist() == [[1, 1]] and found.attention.tolist() == [2]


def test_rank_correlations_are_spearmans():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 40)), rng.integers(0, 5, (3, 40)).astype(float)  # with ties
    b[1] += 2 * a[1]
    expected = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert rank_correlations(a, b) == pytest.approx(expected)
    assert rank_correlations(np.exp(a), b) == pytest.approx(expected)
    assert rank_correlations(a, np.ones((3, 40))) == [None] * 3
    mean, error = mean_and_error([*expected, None])
    assert mean == pytest.approx(np.mean(expected)) and error == pytest.approx(np.std(expected, ddof=1) / 3**0.5)
    assert mean_and_error([0.5]) == (0.5, None) and mean_and_error([None]) == (None, None)


def test_dollars_in_a_label_are_dollars(tmp_path):
    image = np.zeros((1, 1, 8, 8, 3), np.uint8)
    for label in ("a $5 note and $10", "from $5_{ to $10"):
        labelled_grid(image, [label], [label], tmp_path / "a.png")
        attention_maps(image[0], np.zeros((1, 1, 2, 2)), np.zeros((1, 2, 2)), [label], ["total"], tmp_path / "b.png")
