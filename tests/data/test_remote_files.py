"""Data that are not packed behind a URL: read file by file through a cache that is shared, bounded and never half."""

import contextlib
import json
import os
import signal
import sqlite3
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import runs
import s3
import torch
from encoder_runs import make_images
from runs import RESOLUTION, make_latents, make_vae
from torch.utils.data import DataLoader

import train
from common.errors import UserError
from common.file_tree import FileTree
from common.files import DataError
from data import file_cache
from data.dataset import LatentDataset
from data.file_cache import FileCache
from data.remote_tree import GIB, RemoteTree

pytestmark = pytest.mark.slow
COUNT = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    make_latents(folder, COUNT, make_vae(folder / "vae"))
    make_images(folder, COUNT)
    return folder


@pytest.fixture(scope="module")
def url(folder):
    """The data set behind S3."""
    import s3fs

    with s3.serving():
        files = s3fs.S3FileSystem()
        files.mkdir("loose")
        for part in ("vae-sd", "images"):
            files.put(f"{folder}/{part}", "loose/set/", recursive=True)
        yield "s3://loose/set"


@pytest.fixture
def memory():
    """A file system in memory, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def put(files, contents):
    for name, content in contents.items():
        files.pipe(f"/set/{name}", content)
    return "memory://set"


def kept(cache_dir):
    """Name → size of what lies in the cache, beside ledger and listings."""
    root = cache_dir / "files"
    found = {p.relative_to(root).as_posix(): p.stat().st_size for p in root.rglob("*") if p.is_file() and p.parent != root}
    return {name: size for name, size in found.items() if not name.startswith("partial/")}


def entered(cache_dir):
    with contextlib.closing(sqlite3.connect(cache_dir / "files/ledger.sqlite")) as ledger:
        return dict(ledger.execute("SELECT name, size FROM files")), ledger.execute("SELECT bytes FROM total").fetchone()[0]


def test_files_behind_s3_are_read_as_local_ones(url, folder, tmp_path, monkeypatch):
    local = LatentDataset(folder, images=True)
    found = LatentDataset(url, images=True, cache_dir=str(tmp_path))
    assert len(found) == COUNT and found.record == local.record
    np.testing.assert_array_equal(found.labels, local.labels)
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    for workers in (1, 0):  # a forked worker connects for itself
        loader = DataLoader(found, batch_sampler=[order[:5], order[5:]], num_workers=workers, collate_fn=list)
        for item, i in zip((item for batch in loader for item in batch), order, strict=True):
            assert torch.equal(item["moments"], local[i]["moments"]) and torch.equal(item["image"], local[i]["image"])
            assert item["label"] == local[i]["label"]
    assert sum(name.endswith((".npy", ".png")) for name in kept(tmp_path)) == 2 * COUNT
    monkeypatch.setattr(RemoteTree, "_fetch", lambda *_: pytest.fail("fetched again"))
    monkeypatch.setattr(RemoteTree, "_write_listing", lambda *_: pytest.fail("listed again"))
    again = LatentDataset(url + "/", images=True, cache_dir=str(tmp_path))
    assert all(torch.equal(item["image"], local[i]["image"]) for i, item in enumerate(again.__getitems__(range(COUNT))))


def test_training_is_that_on_local_files(url, folder, tmp_path):
    one, other = s3.trained(url, folder, tmp_path, 3, "--cache-size 0.00001")
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
    assert 0 < sum(kept(tmp_path / "cache").values()) <= 0.00001 * GIB


def test_the_cache_is_bounded_and_the_oldest_files_go(memory, tmp_path):
    contents = {f"a/{i}.bin": bytes([i]) * 1000 for i in range(8)}
    tree = RemoteTree(put(memory, contents), cache_dir=str(tmp_path), cache_size=3500 / GIB)
    assert tree.names() == sorted(contents)
    for _ in range(2):
        for name, content in contents.items():
            assert tree.read(name) == content and tree.open(name).read() == content
            assert sum(kept(tmp_path).values()) <= 3500
    assert {Path(name).name for name in kept(tmp_path)} == {"5.bin", "6.bin", "7.bin"}
    files, total = entered(tmp_path)
    assert files == kept(tmp_path) and total == 3000
    tree.prefetch(list(contents))  # more than there is room for
    assert sum(kept(tmp_path).values()) <= 3500 and tree.read("a/0.bin") == contents["a/0.bin"]
    RemoteTree("memory://set", cache_dir=str(tmp_path), cache_size=1000 / GIB)  # a smaller bound than before
    assert len(kept(tmp_path)) == 1 and entered(tmp_path)[1] == 1000
    unbounded = RemoteTree("memory://set", cache_dir=str(tmp_path))
    unbounded.prefetch(list(contents))
    assert len(kept(tmp_path)) == 8


def test_processes_share_a_bounded_cache(tmp_path):
    cache = FileCache(tmp_path, 20_000)

    def fill(number):
        for i in range(30):
            cache.keep(f"set/{(i * 7 + number) % 40}", bytes(1000))
            assert cache.read(f"set/{i}", 1000) in (None, bytes(1000))

    children = []
    for number in range(3):
        if not (child := os.fork()):
            code = 1
            with contextlib.suppress(BaseException):
                fill(number)
                code = 0
            os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 3
    files, total = entered(tmp_path)
    assert total == sum(files.values()) <= 20_000 and kept(tmp_path).items() <= files.items()
    assert not list((tmp_path / "files/partial").iterdir())


def test_a_killed_fill_leaves_no_half_file(memory, tmp_path, monkeypatch):
    content = bytes(range(256)) * 100
    tree = RemoteTree(put(memory, {"0.bin": content}), cache_dir=str(tmp_path))
    if not (child := os.fork()):
        write = os.fdopen

        def half(*args):
            file = write(*args)
            file.write(content[: len(content) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        file_cache.os.fdopen = half
        tree.read("0.bin")
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert kept(tmp_path) == {}
    (left,) = (tmp_path / "files/partial").iterdir()
    assert left.stat().st_size == len(content) // 2
    assert tree.read("0.bin") == content and list(kept(tmp_path).values()) == [len(content)]
    assert entered(tmp_path)[1] == len(content)
    os.utime(left, (time.time() - 3600,) * 2)
    again = RemoteTree("memory://set", cache_dir=str(tmp_path))
    assert not left.exists() and again.read("0.bin") == content


def test_a_damaged_copy_is_fetched_again(memory, tmp_path):
    tree = RemoteTree(put(memory, {"0.bin": b"whole"}), cache_dir=str(tmp_path))
    tree.read("0.bin")
    (name,) = kept(tmp_path)
    (tmp_path / "files" / name).write_bytes(b"who")
    assert tree.read("0.bin") == b"whole" and kept(tmp_path) == {name: 5}


def test_another_version_of_the_folder_is_listed_anew(memory, tmp_path):
    put(memory, {"dataset.json": b"1", "0.bin": b"one"})
    first = RemoteTree("memory://set", cache_dir=str(tmp_path))
    assert first.read("0.bin") == b"one"
    put(memory, {"dataset.json": b"2", "0.bin": b"three", "1.bin": b"new"})
    second = RemoteTree("memory://set", cache_dir=str(tmp_path))
    assert second.read("0.bin") == b"three" and second.names() == ["0.bin", "1.bin", "dataset.json"]


def test_what_cannot_be_read_is_one_line(memory, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")

    def refused(run, *words):
        with pytest.raises(UserError) as caught:
            run()
        assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value

    put(memory, {f"{i}.bin": b"content" for i in range(3)})
    tree = RemoteTree("memory://set", cache_dir=cache)
    memory.rm("/set/0.bin")
    refused(lambda: tree.read("0.bin"), "--data-dir memory://set/0.bin: missing", "when the folder was listed")
    refused(lambda: tree.prefetch(["0.bin", "1.bin"]), "memory://set/0.bin: missing")
    refused(lambda: tree.read("9.bin"), "memory://set/9.bin: no such file")
    memory.pipe("/set/2.bin", b"longer content")
    refused(lambda: tree.read("2.bin"), "has 14 bytes, but 7 when the folder was listed", "remove")
    refused(
        lambda: RemoteTree("memory://set", cache_dir=cache, cache_size=5 / GIB),
        "--cache-size",
        "smaller than one file: memory://set/0.bin",
    )
    refused(lambda: RemoteTree("memory://nothing", cache_dir=cache), "memory://nothing: holds no file")
    (tmp_path / "file").write_text("")
    refused(lambda: RemoteTree("memory://set", cache_dir=f"{tmp_path}/file"), f"--cache-dir {tmp_path}/file: cannot be written")
    (tmp_path / "odd/files").mkdir(parents=True)
    (tmp_path / "odd/files/ledger.sqlite").write_bytes(b"no database" * 100)
    refused(lambda: RemoteTree("memory://set", cache_dir=f"{tmp_path}/odd"), "ledger.sqlite", "remove it")

    def denied(path, **_):
        raise PermissionError("Access Denied\nfor this bucket")

    monkeypatch.setattr(memory, "cat_file", denied)
    refused(lambda: tree.read("2.bin"), "--data-dir memory://set/2.bin: cannot be read (PermissionError: Access Denied)")
    refused(
        lambda: LatentDataset("memory://set", cache_dir=cache), "--data-dir memory://set", "(PermissionError: Access Denied)"
    )


def test_data_sets_that_are_none(url, tmp_path, capsys):
    import s3fs

    files, cache = s3fs.S3FileSystem(), str(tmp_path / "cache")
    with pytest.raises(UserError, match=r"s3://loose/none: holds neither packed latents \(index\.json.* nor vae-sd/"):
        LatentDataset("s3://loose/none", cache_dir=cache)
    files.copy("loose/set/vae-sd", "loose/bare/vae-sd", recursive=True)
    with pytest.raises(UserError, match=r"--data-dir s3://loose/bare: holds no images/; REPA needs"):
        LatentDataset("s3://loose/bare", images=True, cache_dir=cache)
    dataset = LatentDataset("s3://loose/bare", cache_dir=cache)
    files.rm(f"loose/bare/vae-sd/{dataset.latents.name(7)}")
    argv = (
        f"--model SiT-Ti/4 --exp-name run --output-dir {tmp_path} --data-dir s3://loose/bare --cache-dir {cache} --resolution 32 "
        "--num-classes 5 --batch-size 5 --max-train-steps 3 --sampling-steps 0 --num-workers 1 --mixed-precision no --report-to none"
    )
    line = runs.refused(train.main, capsys, argv.split(), "img-mean-std-00000007.npy: missing; it was there when")
    assert line.startswith("train.py: error: --data-dir s3://loose/bare/vae-sd/00000/")
    runs.refused(train.main, capsys, [*argv.split(), "--cache-size", "1e-7"], "--cache-size 1e-07: smaller than one file")
    runs.refused(train.main, capsys, [*argv.split(), "--cache-size", "0"], "--cache-size", "must be > 0")


def test_images_stored_as_arrays(folder, tmp_path):
    """As REPA's code reads them: (3, H, W), or with a leading axis."""
    local = LatentDataset(folder, images=True)
    (tmp_path / "vae-sd").symlink_to(folder / "vae-sd")
    (tmp_path / "images/00000").mkdir(parents=True)
    for i in range(COUNT):
        image = local[i]["image"].numpy()
        np.save(tmp_path / f"images/00000/img{i:08d}.npy", image[None] if i % 2 else image)
    (tmp_path / "images/dataset.json").write_text(json.dumps({"labels": None}))
    found = LatentDataset(tmp_path, images=True)
    assert all(torch.equal(found[i]["image"], local[i]["image"]) for i in range(COUNT))
    assert isinstance(found._images, FileTree)
    path = tmp_path / "images/00000/img00000003.npy"
    for wrong, words in (
        (np.zeros((RESOLUTION, RESOLUTION, 3), np.uint8), "holds uint8 32 × 32 × 3; must be uint8 3 × height × width"),
        (np.zeros((3, RESOLUTION, RESOLUTION), np.float32), "holds float32 3 × 32 × 32"),
        (np.zeros((2, 3, RESOLUTION, RESOLUTION), np.uint8), "holds uint8 2 × 3 × 32 × 32"),
        (np.zeros((3, 8, 8), np.uint8), "has 8 × 8 pixels; its latents were made of 32 × 32"),
    ):
        np.save(path, wrong)
        with pytest.raises(DataError, match=words):
            found[3]


def test_files_without_a_ledger_count_too(tmp_path):
    cache = FileCache(tmp_path, 10_000)
    for i in range(10):
        cache.keep(f"set/{i}", bytes(1000))
    (tmp_path / "files/ledger.sqlite").unlink()  # as a message says
    cache = FileCache(tmp_path, 10_000)
    for i in range(10, 14):
        cache.keep(f"set/{i}", bytes(1000))
    files, total = entered(tmp_path)
    assert files == kept(tmp_path) and total == 10_000


def test_a_kill_while_files_go_leaves_none_that_nobody_lists(tmp_path):
    cache = FileCache(tmp_path, 10_000)
    for i in range(10):
        cache.keep(f"set/{i}", bytes(1000))
    if not (child := os.fork()):
        file_cache.Path.unlink = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        cache.keep("set/10", bytes(1000))
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert kept(tmp_path).keys() <= entered(tmp_path)[0].keys()


def test_latents_of_another_vae_at_the_same_place_are_other_files(memory, tmp_path):
    put(memory, {"dataset.json": b"1", "vae.json": b"one", "0.bin": b"one"})
    assert RemoteTree("memory://set", cache_dir=str(tmp_path)).read("0.bin") == b"one"
    put(memory, {"vae.json": b"two", "0.bin": b"two"})
    assert RemoteTree("memory://set", cache_dir=str(tmp_path)).read("0.bin") == b"two"


def test_a_damaged_listing_is_made_anew(memory, tmp_path):
    put(memory, {"0.bin": b"one"})
    RemoteTree("memory://set", cache_dir=str(tmp_path))
    (listing,) = (tmp_path / "files").glob("*.npz")
    listing.write_bytes(listing.read_bytes()[:100])
    assert RemoteTree("memory://set", cache_dir=str(tmp_path)).names() == ["0.bin"]


def test_a_server_that_lists_no_sizes(folder, tmp_path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = LatentDataset(f"http://127.0.0.1:{server.server_port}", cache_dir=str(tmp_path))
        assert torch.equal(found[3]["moments"], LatentDataset(folder)[3]["moments"])
        server.shutdown()
