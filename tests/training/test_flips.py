"""Mirrored images: `encode --flip`, which of the two training draws, and that sets without them train as before."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import CLASSES, make_latents, make_vae, refused
from sets import content, picture, save

import train
from data.dataset import LatentDataset
from dataset_tools import main
from models.vae import encode_moments, load_vae
from randomness import epoch_order, generator, image_flips
from training.data_order import Batch, StepData

COUNT = 7


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A data folder with 7 images of 8 × 8 px, in 3 classes."""
    folder = tmp_path_factory.mktemp("set")
    for i in range(COUNT):
        save(folder / f"images/00000/img{i:08d}.png", picture(8, 8, seed=i))
    labels = [[f"00000/img{i:08d}.png", i % 3] for i in range(COUNT)]
    (folder / "images/dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


@pytest.fixture(scope="module")
def flipped(images, vae_folder) -> Path:
    main(["encode", f"--source={images}/images", f"--dest={images}/vae-sd", f"--vae={vae_folder}", "--batch-size=3", "--flip"])
    return images


def test_the_second_moments_are_of_the_mirrored_image(flipped, vae_folder, tmp_path):
    main(["encode", f"--source={flipped}/images", f"--dest={tmp_path}/vae-sd", f"--vae={vae_folder}", "--batch-size=3"])
    vae, _ = load_vae(str(vae_folder))
    plain, both, pictures = LatentDataset(tmp_path), LatentDataset(flipped), LatentDataset(flipped, images=True)
    assert both.latents.flips and not plain.latents.flips and both.shape == plain.shape
    for i in range(COUNT):
        assert torch.equal(both[i]["moments"], plain[i]["moments"])  # the first ones do not depend on --flip
        mirrored = pictures.__getitems__([i], mirrored=[True])[0]
        assert torch.equal(mirrored["image"], pictures[i]["image"].flip(-1))
        expected = encode_moments(vae, mirrored["image"][None])[0]
        torch.testing.assert_close(mirrored["moments"], expected, atol=1e-5, rtol=1e-4)
        assert not torch.equal(mirrored["moments"], both[i]["moments"])


@pytest.mark.parametrize("way", ["pack", "encode --packed"])
def test_packed_flips_are_the_same(flipped, vae_folder, tmp_path, way):
    if way == "pack":
        main(["pack", f"--source={flipped}/vae-sd", f"--dest={tmp_path}/packed", "--shard-size=3"])
    else:
        rest = ["--flip", "--packed", "--shard-size=3", f"--vae={vae_folder}", "--batch-size=3"]
        main(["encode", f"--source={flipped}/images", f"--dest={tmp_path}/packed", *rest])
    loose, packed = LatentDataset(flipped), LatentDataset(tmp_path)
    assert packed.latents.flips and packed.shape == loose.shape
    indices, mirrored = [6, 0, 3, 3, 2, 0], [True, False, False, True, True, True]
    for a, b in zip(*(data.__getitems__(indices, mirrored=mirrored) for data in (loose, packed)), strict=True):
        assert torch.equal(a["moments"], b["moments"]) and a["label"] == b["label"]


def test_a_stopped_encode_is_continued_to_the_same_bytes(flipped, vae_folder, tmp_path):
    whole = content(flipped / "vae-sd")
    arguments = [f"--source={flipped}/images", f"--dest={tmp_path}/vae-sd", f"--vae={vae_folder}", "--batch-size=3"]
    main(["encode", *arguments])  # without: as if these had been stopped
    (tmp_path / "vae-sd/dataset.json").unlink()
    main(["encode", *arguments, "--flip"])
    assert content(tmp_path / "vae-sd") == whole


def test_check_and_stats_look_at_both(flipped, tmp_path, capsys):
    main(["check", str(flipped)])
    assert "mirrored" in capsys.readouterr().out
    main(["stats", str(flipped)])
    mean = json.loads((flipped / "latent_stats.json").read_text())["mean"]
    data = LatentDataset(flipped)
    parts = [item["moments"] for flip in (False, True) for item in data.__getitems__(range(COUNT), mirrored=[flip] * COUNT)]
    np.testing.assert_allclose(mean, torch.stack(parts).double()[:, :3].mean(dim=(0, 2, 3)), atol=1e-6)
    main(["pack", f"--source={flipped}/vae-sd", f"--dest={tmp_path}/packed"])
    shard = np.load(tmp_path / "packed/latents-00000.npy", mmap_mode="r+")
    shard[4, 1, 3:] = -1  # deviations of a mirrored image
    shard.flush()
    with pytest.raises(SystemExit):
        main(["check", str(tmp_path)])
    found = capsys.readouterr().out
    assert "negative deviation" in found and "latents-00000.npy[4]" in found


def test_flips_are_drawn_by_seed_forward_and_place(flipped):
    draws = np.array([image_flips(3, n, range(8)) for n in range(200)])
    assert 0.45 < draws.mean() < 0.55
    assert image_flips(3, 5, range(4, 8)) == image_flips(3, 5, range(8))[4:] != image_flips(4, 5, range(4, 8))
    data = LatentDataset(flipped, flip=None)
    assert data.flip and not LatentDataset(flipped).flip
    for first in (0, 2):  # the second process of two
        batch = StepData(data, lambda n: None, seed=1, first_place=first).__getitems__(Batch([5, 1], 9))  # type: ignore[arg-type]
        for place, index in enumerate([5, 1]):
            mirrored = bool(generator("flip", 1, 9, first + place).integers(2))
            assert torch.equal(batch["moments"][place], data.__getitems__([index], mirrored=[mirrored])[0]["moments"])


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[Path, Path]:
    """Random latents, and the same with others as those of the mirrored images."""
    root = tmp_path_factory.mktemp("flips")
    record = make_vae(root / "vae")
    plain, both = (make_latents(root / name, 12, record) for name in ("plain", "both"))
    rng = np.random.default_rng(5)
    for path in (both / "vae-sd").rglob("*.npy"):
        moments = np.load(path)
        np.save(path, np.stack([moments, np.abs(rng.standard_normal(moments.shape)).astype(np.float32)]))
    return plain, both


def assert_same_state(a: dict, b: dict) -> None:
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def arguments(data: Path, out: Path, name: str, **options) -> list[str]:
    values = {
        "model": "SiT-Ti/2",
        "resolution": 32,
        "num_classes": CLASSES,
        "batch_size": 4,
        "max_train_steps": 4,
        "num_workers": 0,
    }
    values |= {
        "data_dir": data,
        "output_dir": out,
        "exp_name": name,
        "report_to": "none",
        "sampling_steps": 0,
        "mixed_precision": "no",
    }
    return [f"--{k}={v}" for k, v in (values | {"checkpointing_steps": 2} | options).items()]


def state_of(out: Path, name: str, step: int = 4) -> dict:
    return torch.load(out / name / f"checkpoints/{step:07d}.pt", weights_only=True)


def test_training_draws_flips_resumes_exactly_and_is_as_before_without(sets, tmp_path, capsys):
    plain, both = sets
    train.main(arguments(plain, tmp_path, "plain"))
    train.main([*arguments(both, tmp_path, "off"), "--no-flip"])
    train.main(arguments(both, tmp_path, "on"))
    states = {name: state_of(tmp_path, name) for name in ("plain", "off", "on")}
    assert [states[name]["config"]["flip"] for name in states] == [False, False, True]
    assert_same_state(states["plain"]["model"], states["off"]["model"])
    assert any(not torch.equal(v, states["off"]["model"][k]) for k, v in states["on"]["model"].items())
    # Which of the two a step took: those of a set that holds, for each, what was drawn.
    order = epoch_order(0, 0, 12)
    wanted = dict(zip(order[:8].tolist(), image_flips(0, 0, range(4)) + image_flips(0, 1, range(4)), strict=True))
    drawn = make_latents(tmp_path / "drawn", 12, None)
    (drawn / "vae-sd/vae.json").write_bytes((both / "vae-sd/vae.json").read_bytes())
    for index, mirrored in wanted.items():
        name = f"vae-sd/00000/img-mean-std-{index:08d}.npy"
        np.save(drawn / name, np.load(both / name)[int(mirrored)])
    train.main(arguments(drawn, tmp_path, "drawn", max_train_steps=2))
    assert_same_state(state_of(tmp_path, "drawn", 2)["model"], state_of(tmp_path, "on", 2)["model"])
    # Resumed, it ends as it would have; turned off, it is refused.
    for path in (tmp_path / "on/checkpoints").glob("0000004*"):
        path.unlink()
    refused(
        train.main, capsys, [*arguments(both, tmp_path, "on", resume_step=-1), "--no-flip"], "--flip False", "started with True"
    )
    train.main(arguments(both, tmp_path, "on", resume_step=-1))
    assert_same_state(states["on"]["model"], state_of(tmp_path, "on")["model"])
    refused(train.main, capsys, arguments(both, tmp_path, "plain", resume_step=-1), "--flip True", "started with False")


def test_flips_that_are_not_there(sets, tmp_path, capsys):
    refused(train.main, capsys, [*arguments(sets[0], tmp_path, "x"), "--flip"], "--flip", "mirrored", "encode --flip")
    assert not (tmp_path / "x").exists()
