"""Latents at scale: encode on several processes, packed files, remote data, and stopped runs of all of them."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import launch
from sets import content, picture, refused, save, zip_of
from torch.utils.data import DataLoader

from common.errors import UserError
from common.files import DataError
from data.dataset import LatentDataset
from data.latent_files import LatentFiles
from data.packed import PackedLatents
from dataset_tools import main
from models.vae import encode_moments, load_vae
from preprocessing import encode as encode_room
from preprocessing.output import UNFINISHED_FILE
from preprocessing.packed_writer import ShardWriter

COUNT = 11


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A converted set of 11 images of 8×8 in 3 classes, number 4 missing."""
    folder = tmp_path_factory.mktemp("set") / "images"
    numbers = [i for i in range(COUNT + 1) if i != 4]
    for i in numbers:
        save(folder / f"00000/img{i:08d}.png", picture(8, 8, seed=i))
    labels = [[f"00000/img{i:08d}.png", i % 3] for i in numbers]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def encode(source: Path, dest: Path, vae: Path, *options: str) -> dict[str, bytes]:
    main(["encode", f"--source={source}", f"--dest={dest}", f"--vae={vae}", "--batch-size=2", *options])
    return content(dest)


@pytest.fixture(scope="module")
def loose(images, vae_folder) -> Path:
    """The data folder with its latents, as one process makes them."""
    encode(images, images.parent / "vae-sd", vae_folder)
    return images.parent


@pytest.fixture(scope="module")
def packed(loose) -> Path:
    """A data folder of the same latents packed, 4 to a file, and the same images."""
    folder = loose.parent / "packed-set"
    main(["pack", f"--source={loose}/vae-sd", f"--dest={folder}/packed", "--shard-size=4"])
    shutil.copytree(loose / "images", folder / "images")
    return folder


# ------------------------------------------------------------------------------------------------- what is read is the same


def same_items(a: LatentDataset, b: LatentDataset) -> None:
    assert len(a) == len(b) and a.record == b.record and a.shape == b.shape
    np.testing.assert_array_equal(a.labels, b.labels)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys() and x["label"] == y["label"]
        assert all(torch.equal(x[key], y[key]) for key in x if key != "label")


def test_a_value_that_is_not_finite_is_named_with_its_file_and_place(packed, tmp_path):
    shutil.copytree(packed / "packed", tmp_path / "packed")
    shard = np.load(tmp_path / "packed/latents-00001.npy", mmap_mode="r+")
    shard[2, 0, 0, 0] = np.nan
    shard.flush()
    data = LatentDataset(tmp_path)
    with pytest.raises(DataError, match=r"latents-00001\.npy\[2\]: holds values that are not finite") as raised:
        data.__getitems__([0, 6, 9])
    assert raised.value.local  # the process that reads it alone knows
    assert len(data.__getitems__([0, 5, 9])) == 3


def test_packed_is_read_as_the_loose_files_are(loose, packed):
    assert sorted(p.name for p in (packed / "packed").iterdir()) == [
        "index.json", "labels.npy", "latents-00000.npy", "latents-00001.npy", "latents-00002.npy", "names.npy",
    ]  # fmt: skip
    same_items(LatentDataset(packed), LatentDataset(loose))
    same_items(LatentDataset(packed, images=True), LatentDataset(loose, images=True))
    same_items(LatentDataset(packed / "packed"), LatentDataset(loose))  # the folder itself


def test_a_batch_is_gathered_in_the_order_asked_for(loose, packed):
    one, other = LatentDataset(packed), LatentDataset(loose)
    for indices in ([10, 0, 5, 4, 5, 3], [7], list(range(COUNT))):
        for x, y in zip(one.__getitems__(indices), other.__getitems__(indices), strict=True):
            assert torch.equal(x["moments"], y["moments"]) and x["label"] == y["label"]
            assert x["moments"].dtype == torch.float32
    for index in (COUNT, -1):
        with pytest.raises(IndexError):
            one[index]


def test_workers_share_the_map_and_the_object_pickles_small(packed):
    dataset = LatentDataset(packed)
    assert len(pickle.dumps(dataset)) < 2000
    same_items(pickle.loads(pickle.dumps(dataset)), dataset)
    loader = DataLoader(dataset, batch_size=4, num_workers=1)
    found = torch.cat([batch["moments"] for batch in loader])
    assert torch.equal(found, torch.stack([item["moments"] for item in dataset]))


def test_pack_of_a_zip_and_other_sizes_hold_the_same(loose, packed, tmp_path):
    zipped = zip_of(loose / "vae-sd", tmp_path / "vae-sd.zip")
    main(["pack", f"--source={zipped}", f"--dest={tmp_path}/a", "--shard-size=4"])
    assert content(tmp_path / "a") == content(packed / "packed")
    main(["pack", f"--source={zipped}", f"--dest={tmp_path}/b", "--shard-size=100"])
    same_items(LatentDataset(tmp_path / "b"), LatentDataset(packed))


def test_unlabelled_stays_so(loose, tmp_path):
    shutil.copytree(loose / "vae-sd", tmp_path / "vae-sd")
    (tmp_path / "vae-sd/dataset.json").write_text('{"labels": null}')
    main(["pack", f"--source={tmp_path}/vae-sd", f"--dest={tmp_path}/packed"])
    dataset = LatentDataset(tmp_path)
    assert dataset.labels is None and dataset[3]["label"] == 0
    with pytest.raises(UserError, match=r"labels\.npy: unlabelled"):
        dataset.check(num_classes=3)


def test_half_precision(images, loose, vae_folder, tmp_path):
    encode(images, tmp_path / "files/vae-sd", vae_folder, "--dtype=float16")
    encode(images, tmp_path / "packed", vae_folder, "--dtype=float16", "--packed")
    assert LatentFiles(tmp_path / "files/vae-sd").dtype == PackedLatents(tmp_path / "packed").dtype == np.float16
    main(["pack", f"--source={tmp_path}/files/vae-sd", f"--dest={tmp_path}/again"])
    assert PackedLatents(tmp_path / "again").dtype == np.float16
    full = LatentDataset(loose)
    for folder in ("files", "packed", "again"):
        half = LatentDataset(tmp_path / folder)
        for a, b in zip(half, full, strict=True):
            np.testing.assert_array_equal(a["moments"].numpy(), b["moments"].numpy().astype(np.float16).astype(np.float32))
    main(["pack", f"--source={loose}/vae-sd", f"--dest={tmp_path}/half", "--dtype=float16"])
    same_items(LatentDataset(tmp_path / "half"), half)


# -------------------------------------------------------------------------------------------------- processes and stops


class Rank:
    """Accelerate's state of one process of several, without the others."""

    device = torch.device("cpu")

    def __init__(self, process_index: int, num_processes: int):
        self.process_index, self.num_processes = process_index, num_processes
        self.is_main_process = process_index == 0

    def wait_for_everyone(self) -> None:
        pass

    destroy_process_group = wait_for_everyone


@pytest.mark.parametrize("options", [(), ("--packed", "--shard-size=4")])
def test_results_do_not_depend_on_the_number_of_processes(images, vae_folder, tmp_path, monkeypatch, options):
    """One process after the other; the first comes last, since it finishes the set."""
    one = encode(images, tmp_path / "one", vae_folder, *options)
    (tmp_path / "three").mkdir()
    for rank in (1, 2, 0):
        monkeypatch.setattr(encode_room, "start_processes", lambda _, rank=rank: Rank(rank, 3))
        encode(images, tmp_path / "three", vae_folder, *options)
    assert content(tmp_path / "three") == one


@pytest.mark.slow
def test_torchrun_makes_the_same_packed_files(images, packed, vae_folder, tmp_path):
    done = launch(
        "torchrun", "--standalone", "--nproc_per_node=2", "dataset_tools.py", "encode", f"--source={images}",
        f"--dest={tmp_path}/packed", f"--vae={vae_folder}", "--batch-size=2", "--packed", "--shard-size=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "packed") == content(packed / "packed")


def test_several_processes_and_a_zip(images, vae_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(encode_room, "start_processes", lambda _: Rank(0, 2))
    argv = ["encode", f"--source={images}", f"--dest={tmp_path}/d.zip", f"--vae={vae_folder}"]
    refused(capsys, argv, "--dest", "several processes", "--packed")


@pytest.mark.parametrize("cut", [0, 50, 128, 128 + 2 * 384 + 10, 128 + 3 * 384, 128 + 4 * 384])
def test_a_packed_file_is_continued_from_its_last_whole_block_but_one(packed, images, vae_folder, tmp_path, cut, monkeypatch):
    """6 × 4 × 4 float32 are 384 bytes; blocks of 2. What lies behind the trusted blocks may be anything."""
    shutil.copytree(packed / "packed", tmp_path / "p")
    for name in ("index.json", "labels.npy", "names.npy", "latents-00001.npy", "latents-00002.npy"):
        (tmp_path / "p" / name).unlink()
    whole = (tmp_path / "p/latents-00000.npy").read_bytes()
    assert len(whole) == 128 + 4 * 384
    trusted = 2 if cut == len(whole) else 0
    (tmp_path / "p/latents-00000.npy").unlink()
    damaged = whole[: 128 + trusted * 384] + b"\xff" * len(whole)
    (tmp_path / "p/latents-00000.npy.tmp").write_bytes(damaged[:cut])
    (tmp_path / "p" / UNFINISHED_FILE).write_text("")
    encoded = []
    original = encode_room.encode_moments
    monkeypatch.setattr(encode_room, "encode_moments", lambda vae, x: (encoded.append(len(x)), original(vae, x))[1])
    found = encode(images, tmp_path / "p", vae_folder, "--packed", "--shard-size=4")
    assert found == content(packed / "packed") and sum(encoded) == COUNT - trusted


def test_a_header_of_zeros_is_not_trusted(tmp_path):
    (tmp_path / "latents-00000.npy.tmp").write_bytes(bytes(128 + 8 * 16))
    writer = ShardWriter(tmp_path, 0, 8, (4,), np.dtype(np.float32), 2)
    assert writer.done == 0
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    for block in np.split(values, 4):
        writer.append(block)
    np.testing.assert_array_equal(np.load(tmp_path / "latents-00000.npy"), values)


def test_killed_between_the_index_and_the_end(packed, loose, tmp_path, monkeypatch):
    shutil.copytree(packed / "packed", tmp_path / "p")
    (tmp_path / "p" / UNFINISHED_FILE).write_text("")
    (tmp_path / "p/latents-00001.npy.sha256").write_text("half")
    before = (tmp_path / "p/latents-00001.npy").stat().st_mtime_ns
    main(["pack", f"--source={loose}/vae-sd", f"--dest={tmp_path}/p", "--shard-size=4"])
    assert content(tmp_path / "p") == content(packed / "packed")
    assert (tmp_path / "p/latents-00001.npy").stat().st_mtime_ns == before


def test_a_failed_write_is_one_line_and_the_run_goes_on(loose, packed, tmp_path, capsys):
    import resource

    argv = ["pack", f"--source={loose}/vae-sd", f"--dest={tmp_path}/p", "--shard-size=4"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        refused(capsys, argv, f"--dest {tmp_path}/p/latents-00000.npy", "cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    main(argv)
    assert content(tmp_path / "p") == content(packed / "packed")


# -------------------------------------------------------------------------------------------------------------- mistakes


def test_what_pack_refuses(loose, packed, tmp_path, capsys):
    source = loose / "vae-sd"
    refused(capsys, ["pack", "--source=nowhere", f"--dest={tmp_path}/p"], "nowhere", "no such")
    refused(capsys, ["pack", f"--source={source}", f"--dest={packed}/packed"], "--dest", "finished packed latents")
    refused(capsys, ["pack", f"--source={source}", f"--dest={source}/p"], "--dest", "inside")
    refused(capsys, ["pack", f"--source={source}", f"--dest={tmp_path}/p.zip"], "--dest", "not a zip")
    refused(capsys, ["pack", f"--source={source}", f"--dest={loose}/images"], "--dest", "not empty")
    (tmp_path / "file").write_text("")
    refused(capsys, ["pack", f"--source={source}", f"--dest={tmp_path}/file"], "--dest", "is a file")
    shutil.copytree(source, tmp_path / "bad")
    path = tmp_path / "bad/00000/img-mean-std-00000002.npy"
    moments = np.load(path)
    for values, culprit in (
        (moments * np.nan, "not finite"),
        (moments[:, :2], "shape"),
        (moments.astype(np.float16), "--dtype"),
    ):
        np.save(path, values)
        refused(capsys, ["pack", f"--source={tmp_path}/bad", f"--dest={tmp_path}/p"], str(path), culprit)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    refused(capsys, ["pack", f"--source={tmp_path}/bad", f"--dest={tmp_path}/p"], str(path), "allow_pickle")


def test_values_beyond_half_precision_are_refused(loose, tmp_path, capsys):
    shutil.copytree(loose / "vae-sd", tmp_path / "vae-sd")
    path = tmp_path / "vae-sd/00000/img-mean-std-00000002.npy"
    np.save(path, np.load(path) + np.float32(1e5))
    argv = ["pack", f"--source={tmp_path}/vae-sd", f"--dest={tmp_path}/p", "--dtype=float16"]
    refused(capsys, argv, "not all finite in float16")


@pytest.mark.parametrize(
    ("file", "change", "culprit"),
    [
        ("index.json", lambda c: b"{", "not valid JSON"),
        ("index.json", lambda c: c.replace(b'"format": 1', b'"format": 9'), "format 9"),
        ("index.json", lambda c: c.replace(b"latents-00001", b"../../../etc/x"), "not an index"),
        ("index.json", lambda c: c.replace(b'"latent_channels": 3', b'"latent_channels": 0'), "latent_channels"),
        ("latents-00001.npy", lambda c: c[:-1], "truncated"),
        ("latents-00002.npy", lambda c: b"", "truncated"),
        ("labels.npy", lambda c: pickle.dumps([1]), "not an npy file"),
        ("names.npy", lambda c: c.replace(b"(11,)", b"(10,)"), "names"),
    ],
)
def test_broken_packed_files_are_named(packed, tmp_path, file, change, culprit):
    shutil.copytree(packed / "packed", tmp_path / "p")
    before = (tmp_path / "p" / file).read_bytes()
    (tmp_path / "p" / file).write_bytes(change(before))
    assert (tmp_path / "p" / file).read_bytes() != before
    with pytest.raises(UserError) as caught:
        LatentDataset(tmp_path / "p")
    assert str(tmp_path / "p" / file) in str(caught.value) and culprit in str(caught.value)


def test_unfinished_packed_latents_are_not_read(packed, tmp_path):
    shutil.copytree(packed / "packed", tmp_path / "packed")
    (tmp_path / "packed/index.json").unlink()
    with pytest.raises(UserError, match=r"index\.json: missing; it is written last"):
        LatentDataset(tmp_path)


def test_encoded_moments_are_the_vaes(images, packed, vae_folder):
    vae, _ = load_vae(str(vae_folder))
    for item in LatentDataset(packed, images=True):
        torch.testing.assert_close(item["moments"], encode_moments(vae, item["image"][None])[0], atol=1e-5, rtol=1e-4)
