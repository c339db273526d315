"""Packed latents behind s3://: a real server that speaks S3, on loopback, and a cache that processes share."""

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import s3
import torch
from PIL import Image
from runs import make_latents, make_vae
from sets import content

from common.errors import UserError
from common.files import file_sha256
from data import remote
from data.dataset import LatentDataset, normalised_record
from dataset_tools import main

pytestmark = pytest.mark.slow

COUNT = 10


@pytest.fixture(scope="module")
def server():
    with s3.serving():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The data set that is uploaded."""
    folder = tmp_path_factory.mktemp("local")
    make_latents(folder, COUNT, make_vae(folder / "vae"))
    main(["pack", f"--source={folder}/vae-sd", f"--dest={folder}/packed", "--shard-size=3"])
    main(["stats", str(folder)])
    return folder


@pytest.fixture(scope="module")
def url(server, folder) -> str:
    import s3fs

    s3 = s3fs.S3FileSystem()
    s3.mkdir("bucket")
    s3.put(f"{folder}/packed", "bucket/set/", recursive=True)
    s3.put(f"{folder}/latent_stats.json", "bucket/set/latent_stats.json")
    return "s3://bucket/set"


def test_remote_data_are_read_as_local_ones(url, folder, tmp_path, monkeypatch):
    found, local = LatentDataset(url, cache_dir=str(tmp_path)), LatentDataset(folder)
    assert len(found) == COUNT and found.record == local.record
    np.testing.assert_array_equal(found.labels, local.labels)
    for a, b in zip(found, local, strict=True):
        assert torch.equal(a["moments"], b["moments"])
    assert normalised_record(url, found.latents) == normalised_record(folder, local.latents)
    (copy,) = tmp_path.iterdir()
    assert content(copy) == content(folder / "packed")
    times = {p.name: p.stat().st_mtime_ns for p in copy.iterdir()}
    again = LatentDataset(url + "/packed", cache_dir=str(tmp_path / "other"))  # the packed folder itself
    assert len(again) == COUNT
    monkeypatch.setattr(remote._Source, "copy", lambda *_: pytest.fail("copied again"))
    LatentDataset(url, cache_dir=str(tmp_path))
    assert all(times[p.name] == p.stat().st_mtime_ns for p in copy.iterdir() if p.name != "index.json")


def test_remote_text_features_are_read_as_local_ones(url, folder, tmp_path, capsys):
    import s3fs

    names = [f"{i:02d}.png" for i in range(COUNT)]
    (tmp_path / "images").mkdir()
    for name in names:
        Image.new("RGB", (2, 2)).save(tmp_path / "images" / name)
    captions = {"captions": [[name, [f"picture {name}", "another"]] for name in names]}
    (tmp_path / "images/captions.json").write_text(json.dumps(captions))
    main(["text", f"--source={tmp_path}", "--encoder=words", "--length=3", "--packed"])
    shutil.copytree(folder / "packed", tmp_path / "packed", dirs_exist_ok=True)
    s3, cache = s3fs.S3FileSystem(), str(tmp_path / "cache")
    s3.put(f"{tmp_path}/packed", "bucket/captioned/", recursive=True)
    local, found = LatentDataset(tmp_path, text=True), LatentDataset("s3://bucket/captioned", text=True, cache_dir=cache)
    for a, b in zip(found, local, strict=True):
        assert torch.equal(a["moments"], b["moments"]) and torch.equal(a["text"], b["text"])
    assert torch.equal(found.text.null.features, local.text.null.features)
    with pytest.raises(UserError, match=r"s3://bucket/set: holds no text\.json; .*text --packed"):
        LatentDataset(url, text=True, cache_dir=cache)
    for whole, message in (
        (True, "text.bin: damaged: its SHA-256 is not what text.json says"),
        (False, "names no packed files"),
    ):
        record = json.loads((tmp_path / "packed/text.json").read_text()) | {"encoder": message}
        if not whole:
            del record["files"]
        s3.pipe("bucket/captioned/packed/text.json", json.dumps(record).encode())
        s3.pipe("bucket/captioned/packed/text.bin", b"x")
        with pytest.raises(UserError, match=message):
            LatentDataset("s3://bucket/captioned", text=True, cache_dir=cache)


def test_training_on_remote_data_is_that_on_local_ones(url, folder, tmp_path):
    one, other = s3.trained(url, folder, tmp_path, 2, "--latent-norm channel")
    assert one["vae"] == other["vae"] and "channel_std" in one["vae"]
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])


def test_processes_share_the_work(url, folder, tmp_path, monkeypatch):
    """Two processes at once copy each file once; what a killed one left is replaced."""
    name = remote.local_copy(url, str(tmp_path / "first")).name
    cache = tmp_path / "cache"
    (cache / name).mkdir(parents=True)
    (cache / name / "latents-00002.npy.tmp").write_bytes(b"half")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        other = pool.apply_async(copied_files, (url, str(cache), 0))
        deadline = time.monotonic() + 60
        while not (cache / name / "index.json").exists():
            assert time.monotonic() < deadline and not other.ready()
            time.sleep(0.01)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        copied = copied_files(url, str(cache), 1) + other.get(60)
    assert sorted(copied) == sorted(p.name for p in (folder / "packed").iterdir() if p.name != "index.json")
    assert content(cache / name) == content(folder / "packed")


def copied_files(url: str, cache: str, rank: int) -> list[str]:
    """The files that this process copied itself, as local rank `rank`."""
    copied: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(rank))
        patch.setattr(
            remote, "file_sha256", lambda p: (copied.append(p.name.removesuffix(f".{os.getpid()}.tmp")), file_sha256(p))[1]
        )
        remote.local_copy(url, cache)
    return copied


def test_other_content_at_the_same_place_is_another_copy(url, folder, tmp_path, server):
    import s3fs

    s3 = s3fs.S3FileSystem()
    main(["pack", f"--source={folder}/vae-sd", f"--dest={tmp_path}/packed", "--shard-size=5"])
    s3.put(f"{folder}/packed", "bucket/changing/", recursive=True)
    LatentDataset("s3://bucket/changing", cache_dir=str(tmp_path / "cache"))
    s3.put(f"{tmp_path}/packed/index.json", "bucket/changing/packed/index.json")
    with pytest.raises(UserError, match=r"latents-00000\.npy: damaged"):
        LatentDataset("s3://bucket/changing", cache_dir=str(tmp_path / "cache"))
    s3.put(f"{tmp_path}/packed", "bucket/changing/", recursive=True)
    found = LatentDataset("s3://bucket/changing", cache_dir=str(tmp_path / "cache"))
    local = LatentDataset(tmp_path)
    assert all(torch.equal(a["moments"], b["moments"]) for a, b in zip(found, local, strict=True))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert not list((tmp_path / "cache").rglob("*.lock"))


@pytest.mark.parametrize(
    ("url_of", "words"),
    [
        (lambda url: url + "/nothing", ["holds neither packed latents (index.json", "vae-sd/"]),
        (lambda url: "s3://no-such-bucket/set", ["s3://no-such-bucket/set"]),
        (lambda url: "nope://x/y", ["nope://x/y", "cannot be read"]),
        (lambda url: "hf://datasets/owner/repo/set", ["hf://datasets/owner/repo/set"]),
    ],
)
def test_what_cannot_be_read_is_one_line(url, tmp_path, monkeypatch, url_of, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        LatentDataset(url_of(url), cache_dir=str(tmp_path))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def test_a_cache_that_cannot_be_written(url, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"--cache-dir {tmp_path}/file"):
        LatentDataset(url, cache_dir=f"{tmp_path}/file")


def test_checksum_is_that_of_the_file(folder):
    import hashlib

    path = folder / "packed/latents-00000.npy"
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
