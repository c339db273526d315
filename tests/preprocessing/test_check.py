"""check and stats: a sound set passes, whatever is wrong is named, and the statistics are those of the definition."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import make_latents
from sets import picture, refused, save

from common.errors import UserError
from data.dataset import LatentDataset, normalised_record
from dataset_tools import main
from models.vae import VAERecord

COUNT = 9
RECORD = VAERecord("some/vae", None, 2, 4, 0.5, 0.0)


@pytest.fixture
def loose(tmp_path) -> Path:
    """Latents of 9 images of 16×16, and the images."""
    make_latents(tmp_path / "set", COUNT, RECORD)
    labels = [[f"00000/img{i:08d}.png", i % 5] for i in range(COUNT)]
    for i in range(COUNT):
        save(tmp_path / f"set/images/00000/img{i:08d}.png", picture(16, 16, seed=i))
    (tmp_path / "set/images/dataset.json").write_text(json.dumps({"labels": labels}))
    return tmp_path / "set"


@pytest.fixture
def packed(loose) -> Path:
    main(["pack", f"--source={loose}/vae-sd", f"--dest={loose}/packed", "--shard-size=4"])
    return loose


def found_wrong(capsys, *argv) -> str:
    """What check prints of a set in which something is wrong; its exit code is 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["check", *map(str, argv)])
    assert stop.value.code == 1
    return capsys.readouterr().out


def test_a_sound_set(loose, capsys):
    main(["check", str(loose)])
    text = capsys.readouterr().out
    assert f"{COUNT} latents of 8x8x8" in text and "5 classes of 1 to 2 images" in text and text.endswith(": sound\n")
    main(["pack", f"--source={loose}/vae-sd", f"--dest={loose}/packed"])
    main(["check", "--source", str(loose)])
    assert capsys.readouterr().out.endswith(": sound\n")


def latent(folder: Path, i: int) -> Path:
    return folder / f"vae-sd/00000/img-mean-std-{i:08d}.npy"


def change(path: Path, f) -> None:
    np.save(path, f(np.load(path)))


WRONG = {
    "constant": (lambda s: change(latent(s, 3), np.zeros_like), "00000003.npy"),
    "latent": (lambda s: change(latent(s, 3), lambda m: m * np.nan), "00000003.npy: holds values that are not finite"),
    "negative deviation": (lambda s: change(latent(s, 3), np.negative), "00000003.npy"),
    "pairing": (lambda s: save(s / "images/00000/img00000099.png", picture(16, 16)), "img00000099.png: has no latent"),
    "image": (lambda s: save(s / "images/00000/img00000002.png", picture(8, 16)), "img00000002.png"),
    "data set": (lambda s: (s / "vae-sd/dataset.json").unlink(), "dataset.json: missing"),
    "label": (
        lambda s: (s / "vae-sd/dataset.json").write_text(
            (s / "vae-sd/dataset.json").read_text().replace("00000008.npy\", 3", "00000008.npy\", 4")
        ),
        "img00000008.png: is labelled otherwise",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named(loose, capsys, kind):
    spoil, words = WRONG[kind]
    spoil(loose)
    text = found_wrong(capsys, loose)
    assert f"{kind}: " in text and words in text and text.endswith(f"1 problems: 1 × {kind}\n")


def test_a_missing_image_and_a_latent_without_a_file(loose, capsys):
    (loose / "images/00000/img00000004.png").unlink()
    assert "holds no image for" in found_wrong(capsys, loose)
    latent(loose, 4).unlink()
    assert "labels 00000/img-mean-std-00000004.npy, but there is no such file" in found_wrong(capsys, loose)


def test_a_flipped_bit_in_a_packed_file(packed, capsys):
    content = bytearray((packed / "packed/latents-00001.npy").read_bytes())
    content[-100] ^= 1
    (packed / "packed/latents-00001.npy").write_bytes(content)
    assert "latents-00001.npy: its SHA-256 is not what the index says" in found_wrong(capsys, packed)


def test_no_such_folder_is_a_mistake(tmp_path, capsys):
    refused(capsys, ["check", f"{tmp_path}/nowhere"], "nowhere", "no such data folder")
    refused(capsys, ["check"], "--source is required")


def test_the_grid_shows_latents_over_their_images(tmp_path, vae_folder):
    for i in range(3):
        save(tmp_path / f"images/00000/img{i:08d}.png", picture(8, 8, seed=i))
    main(["encode", f"--source={tmp_path}/images", f"--dest={tmp_path}/packed", f"--vae={vae_folder}", "--packed"])
    main(["check", str(tmp_path), f"--sample-grid={tmp_path}/grid.png"])
    with Image.open(tmp_path / "grid.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (8 + 2 + 8, 3 * 8 + 2 * 2, 3)
    for i in range(3):
        np.testing.assert_array_equal(pixels[10:, 10 * i : 10 * i + 8], picture(8, 8, seed=i))


def test_stats_are_those_of_the_latents(packed):
    """Against draws: of 400 samples of every posterior, and against the definition in NumPy."""
    main(["stats", str(packed)])
    found = json.loads((packed / "latent_stats.json").read_text())
    moments = np.stack([np.load(latent(packed, i)) for i in range(COUNT)]).astype(np.float64)
    mean, std = moments[:, :4], moments[:, 4:]
    assert found["count"] == COUNT
    np.testing.assert_allclose(found["mean"], mean.mean(axis=(0, 2, 3)), rtol=1e-10)
    variance = mean.var(axis=(0, 2, 3)) + (std**2).mean(axis=(0, 2, 3))  # law of total variance
    np.testing.assert_allclose(found["std"], np.sqrt(variance), rtol=1e-10)
    drawn = mean + std * np.random.default_rng(0).standard_normal((400, *mean.shape))
    np.testing.assert_allclose(found["std"], drawn.std(axis=(0, 1, 3, 4)), rtol=0.01)
    shutil.rmtree(packed / "packed")
    main(["stats", str(packed)])
    np.testing.assert_allclose(json.loads((packed / "latent_stats.json").read_text())["std"], found["std"], rtol=1e-12)


def test_the_record_with_channels(loose):
    latents = LatentDataset(loose).latents
    with pytest.raises(UserError, match=r"latent_stats\.json: missing; .*dataset_tools.py stats"):
        normalised_record(loose, latents)
    main(["stats", str(loose)])
    record = normalised_record(loose, latents)
    stats = json.loads((loose / "latent_stats.json").read_text())
    assert list(record.channel_mean) == stats["mean"] and list(record.channel_std) == stats["std"]
    assert record.vae == RECORD.vae and VAERecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    for broken, culprit in (
        ({**stats, "count": 8}, "made of 8 latents"),
        ({**stats, "std": [1, 2, 3]}, "4 numbers"),
        ({**stats, "std": [1, 2, 3, 0]}, "above 0"),
        ({**stats, "mean": None}, "channel_mean"),
        ([], "run it again"),
    ):
        (loose / "latent_stats.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=culprit):
            normalised_record(loose, latents)
