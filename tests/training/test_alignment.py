"""Variants of REPA: the convolution, features normalised over patches, and alignment that ends."""

from functools import partial

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
import training_runs
from encoder_runs import TINY, make_images, repa, uint8_images
from runs import CLASSES, make_latents, make_vae, train_on
from training_runs import assert_same_tensors, final_state, metrics

import models
import train
from checkpoint import reading
from config.options import TrainConfig
from data.dataset import LatentDataset
from loss import alignment_loss, normalise_over_patches
from models.encoders import load_encoders
from models.layers import ConvProjector
from training import alignment

pytestmark = pytest.mark.slow
COUNT = 16
arguments = partial(training_runs.arguments, model="SiT-Ti/4")
IREPA = ("--projector", "conv", "--target-norm", "spatial", "--proj-until", 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    path = make_latents(folder / "set", COUNT, make_vae(folder / "vae"))
    make_images(path)
    return path


@pytest.fixture(scope="module")
def whole(data, tiny_weights, tmp_path_factory):
    """Four steps, of which the first two align; and how many images were read."""
    folder, read = tmp_path_factory.mktemp("whole"), []
    original = LatentDataset._read_image
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentDataset, "_read_image", lambda *args: (read.append(1), original(*args))[1])
        train.main(arguments(data, folder, *repa(tiny_weights), *IREPA, "--checkpointing-steps", 1))
    runs.reset_accelerate()
    return folder, len(read)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_normalisation_over_patches(gamma):
    features = np.random.default_rng(0).normal(3, 2, (2, 5, 4))
    found = normalise_over_patches(torch.from_numpy(features), gamma)
    expected = (features - gamma * features.mean(axis=1, keepdims=True)) / (features.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_convolution_is_over_the_grid_of_tokens():
    projector = ConvProjector(3, 5, (4, 2))
    tokens = torch.randn(2, 8, 3)
    padded = F.pad(tokens.view(2, 4, 2, 3), (0, 0, 1, 1, 1, 1))
    expected = torch.stack(
        [
            torch.einsum("bijd,zdij->bz", padded[:, r : r + 3, c : c + 3], projector.weight) + projector.bias
            for r in range(4)
            for c in range(2)
        ],
        dim=1,
    )
    torch.testing.assert_close(projector(tokens), expected)


@pytest.mark.parametrize("model", ["DFM-SiT-Ti/2", "ELIT-HDiT-Ti/2", "U-ViT-Ti/2"])
def test_every_backbone_takes_the_convolution(model):
    with torch.device("meta"):
        made = models.create_model(model, input_size=32, z_dims=(7,), encoder_depth=2)
        made.convolve_projectors()
        _, (projection,) = made(*made.example_inputs(), return_features=True)
        assert projection.shape == (1, made.feature_grid[0] * made.feature_grid[1], 7)
        models.create_model(model, input_size=32).convolve_projectors()  # none


def test_the_first_step_by_hand(data, whole, tiny_weights):
    """The alignment of an untrained model is that of its convolution and of normalised features."""
    from randomness import epoch_order, training_draws

    order = epoch_order(0, 0, COUNT)[:8]
    moments = np.stack([np.load(data / f"vae-sd/00000/img-mean-std-{i:08d}.npy") for i in order])
    draws = training_draws(0, 0, range(8), (4, 8, 8))
    latents = torch.from_numpy((moments[:, :4] + moments[:, 4:] * draws.posterior.numpy()) * 0.5).float()
    torch.manual_seed(0)
    net = models.create_model("SiT-Ti/4", input_size=8, num_classes=CLASSES, z_dims=(192,))
    net.convolve_projectors()
    t = draws.time_uniform
    x = (1 - t)[:, None, None, None] * latents + t[:, None, None, None] * draws.noise
    labels = torch.tensor([i % CLASSES for i in order])
    _, projections = net(x, t, torch.where(draws.label_drop < 0.1, CLASSES, labels), return_features=True)
    (encoder,) = load_encoders([TINY], 32, (2, 2), [str(tiny_weights)])
    features = encoder(uint8_images(COUNT, 32, seed=7)[order.tolist()]).numpy()
    normed = (features - 0.6 * features.mean(axis=1, keepdims=True)) / (features.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    expected = alignment_loss(projections, [torch.from_numpy(normed)]).item()
    assert metrics(whole[0], "alignment_loss")[1] == pytest.approx(expected, rel=1e-4)


def test_alignment_ends(whole):
    folder, read = whole
    assert list(metrics(folder, "alignment_loss")) == [1, 2] and list(metrics(folder)) == [1, 2, 3, 4]
    assert read == 2 * 8  # no image is read after them
    two, four = (final_state(folder, step)["model"] for step in (2, 4))
    projector = [key for key in four if key.startswith("projectors.")]
    assert four["projectors.0.weight"].shape == (192, 192, 3, 3) and all(torch.equal(two[key], four[key]) for key in projector)
    assert not torch.equal(two["blocks.0.attn.qkv.weight"], four["blocks.0.attn.qkv.weight"])
    model, config = reading.load_model(folder / "run/checkpoints/0000004.pt")
    assert not hasattr(model, "projectors") and config["projector"] == "conv"


def test_resuming_before_the_end_of_alignment(data, whole, tiny_weights, tmp_path):
    checkpoints = tmp_path / "run/checkpoints"
    checkpoints.mkdir(parents=True)
    for file in (whole[0] / "run/checkpoints").glob("0000001.pt*"):
        (checkpoints / file.name).symlink_to(file)
    train.main(arguments(data, tmp_path, *repa(tiny_weights), *IREPA, "--resume-step", -1))
    resumed, expected = final_state(tmp_path), final_state(whole[0])
    assert_same_tensors(resumed["model"], expected["model"])
    assert_same_tensors(resumed["ema"]["0.9999"], expected["ema"]["0.9999"])


def test_two_processes(data, whole, tiny_weights, tmp_path):
    """DDP waits for no gradient of a projector that is not used any more."""
    assert train_on((2, arguments(data, tmp_path, *repa(tiny_weights), *IREPA), ""))[-1:] == ["0 0"]
    for name in ("loss", "alignment_loss"):
        assert metrics(tmp_path, name) == pytest.approx(metrics(whole[0], name), rel=1e-3)
    two, four = (final_state(tmp_path, step)["model"] for step in (2, 4))
    assert torch.equal(two["projectors.0.weight"], four["projectors.0.weight"])


def test_another_variant_is_another_run(data, whole, tiny_weights, tmp_path, capsys):
    resume = ("--resume-step", -1, "--output-dir", whole[0], *repa(tiny_weights))
    options = (*IREPA, "--target-norm", "none", "--proj-until", 3, "--allow-change", "proj_until")
    runs.refused(train.main, capsys, arguments(data, tmp_path, *resume, *options), "--target-norm none: the run in")
    for option, value in (("--projector", "cnn"), ("--target-norm", "layer"), ("--target-norm-gamma", 2), ("--proj-until", 0)):
        runs.refused(train.main, capsys, arguments(data, tmp_path, option, value), option)


def test_what_has_no_effect_is_said():
    given = {"projector": "conv", "target_norm": "spatial", "target_norm_gamma": 0.5, "proj_until": 2}
    told = alignment.check(TrainConfig(**given), given)
    for name in ("--projector conv", "--target-norm spatial", "--proj-until 2"):
        assert f"{name}: has no effect without --enc-type and --proj-coeff" in told
    assert "--target-norm-gamma 0.5: has no effect without --target-norm spatial" in told
    on = {"enc_type": TINY, "proj_coeff": 0.5}
    assert alignment.check(TrainConfig(**given, **on), given) == []
    assert alignment.aligned_steps(TrainConfig(**on)) == float("inf") and alignment.aligned_steps(TrainConfig(**given)) == 0
