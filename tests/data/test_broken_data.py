"""Named cases of broken data: links, devices, bombs, odd labels, foreign files, full disks, damaged sets of images."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sets import convert, picture, refused, save

import evaluate
from common.errors import UserError
from common.file_tree import FileTree
from common.files import DataError, WriteError, remove_leftovers, write_atomically
from common.image_files import read_image
from common.tensor_files import npy_bytes
from config.tool_options import EvaluateConfig
from data.dataset import LatentDataset
from data.packed import LABELS_FILE
from dataset_tools import main
from metrics.evaluation import choose_metrics
from metrics.images import NpzImages, open_images, write_npz
from metrics.statistics import covariance_problem, frechet_distance

CROP = ("--transform=center-crop", "--resolution=16x16", "--workers=1")


@pytest.fixture
def source(tmp_path) -> Path:
    for label in "ab":
        for number in range(3):
            save(tmp_path / "raw" / label / f"{number}.png", picture(24, 32, seed=number + 10 * (label == "b")))
    return tmp_path / "raw"


@pytest.fixture
def latents(tmp_path) -> Path:
    folder = tmp_path / "data/vae-sd/00000"
    folder.mkdir(parents=True)
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(4)]
    for i, name in enumerate(names):
        np.save(tmp_path / "data/vae-sd" / name, np.random.default_rng(i).random((8, 2, 2), np.float32))
    (tmp_path / "data/vae-sd/dataset.json").write_text(json.dumps({"labels": [[name, i % 2] for i, name in enumerate(names)]}))
    return tmp_path / "data"


def label(latents: Path, value: object) -> None:
    path = latents / "vae-sd/dataset.json"
    labels = json.loads(path.read_text())["labels"]
    labels[1][1] = value
    path.write_text(json.dumps({"labels": labels}))


# --------------------------------------------------------------------------------------------------- links and devices


def test_links_to_parents_add_nothing(source, tmp_path, capsys):
    plain = convert(source, tmp_path / "plain", *CROP)
    (source / "a/up").symlink_to("..")
    (source / "b/up").symlink_to(source)
    (source / "b/itself").symlink_to("itself")
    assert convert(source, tmp_path / "linked", *CROP) == plain
    assert "is a link to" in capsys.readouterr().err


def test_class_folders_may_be_links(source, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.move(source / "b", tmp_path / "elsewhere/b")
    plain = FileTree(source).names()
    (source / "b").symlink_to(tmp_path / "elsewhere/b")
    assert FileTree(source).names() == plain + ["b/0.png", "b/1.png", "b/2.png"]


@pytest.mark.parametrize("kind", ["fifo", "device", "sparse"])
def test_only_regular_files_of_a_sensible_size_are_read(source, tmp_path, kind):
    """A FIFO waits for ever, /dev/zero never ends, 200 GiB of nothing fill the memory."""
    path = source / "a/1.png"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(200 * 2**30)
    convert(source, tmp_path / "d", *CROP)
    reason = "the limit is" if kind == "sparse" else "not a regular file"
    assert reason in (tmp_path / "d/skipped.txt").read_text()
    if kind == "fifo":
        with pytest.raises(UserError, match="not a regular file"):
            open_images(path)


def test_a_zip_bomb_is_not_inflated(tmp_path):
    archive = zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("x.png", "w", force_zip64=True) as file:
        for _ in range(65):
            file.write(bytes(2**24))
    with pytest.raises(UserError, match=r"x\.png: cannot be read: has 1,090,519,040 bytes; the limit is"):
        FileTree(tmp_path / "bomb.zip").read("x.png")


# -------------------------------------------------------------------------------------------------------------- images


def strip_png(width: int) -> bytes:
    """A PNG one pixel high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, 1, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 + 3 * width)))
        + chunk(b"IEND", b"")
    )


def test_a_strip_is_left_out_rather_than_enlarged_to_gigabytes(source, tmp_path):
    (source / "a/1.png").write_bytes(strip_png(400_000))
    convert(source, tmp_path / "d", "--transform=center-crop-dhariwal", "--resolution=256x256", "--workers=1")
    assert "a/1.png\tcannot be transformed: 102400000 × 256 pixels" in (tmp_path / "d/skipped.txt").read_text()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_unknown_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.linspace(0, 1 if dtype == np.float32 else 255, 64).reshape(8, 8).astype(dtype)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=r"x\.tif: not a readable image: .* pixels, whose range is not known"):
        read_image(FileTree(tmp_path), "x.tif")


def test_sixteen_bits_keep_their_high_byte(tmp_path):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(grey).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(FileTree(tmp_path), "x.png")[:, :, 1], grey >> 8)


def test_a_name_that_is_no_utf8(source, tmp_path):
    broken = os.fsdecode(bytes(source / "a") + b"/caf\xe9.png")
    Path(broken).write_bytes(b"no image")
    convert(source, tmp_path / "d", *CROP)
    assert b"a/caf\xe9.png\tnot a readable image" in (tmp_path / "d/skipped.txt").read_bytes()


# -------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("value", [-1, 10**30, 2**31, 2**63])
def test_impossible_labels_are_refused(latents, value):
    label(latents, value)
    with pytest.raises(UserError, match=r"label .* is (negative|too large)"):
        LatentDataset(latents)


def test_a_large_label_costs_no_memory(latents, capsys):
    label(latents, 10**9)
    main(["check", str(latents)])
    assert "999999998 classes below 1000000001 have none: 2, 3, 4" in capsys.readouterr().out


def test_negative_packed_labels(latents, tmp_path, capsys):
    main(["pack", f"--source={latents}/vae-sd", f"--dest={tmp_path}/packed"])
    path = tmp_path / "packed" / LABELS_FILE
    labels = np.load(path)
    labels[2] = -1
    path.write_bytes(npy_bytes(labels))
    with pytest.raises(UserError, match=r"labels\.npy: label -1 of .* is out of range"):
        LatentDataset(tmp_path / "packed").check(num_classes=2)
    with pytest.raises(SystemExit) as caught:
        main(["check", f"{tmp_path}/packed"])
    assert caught.value.code == 1 and "label -1 of" in capsys.readouterr().out


@pytest.mark.parametrize(
    "header",
    [b"PK\3\4", b"\x93NUMPY\1\0v\0{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 30 + b", 4, 4), }", b""],
)
def test_npy_files_that_claim_too_much(latents, header):
    path = next((latents / "vae-sd").rglob("*3.npy"))
    path.write_bytes(header.ljust(128) + b"\n" + bytes(64))
    dataset = LatentDataset(latents)
    with pytest.raises(UserError, match="not a readable npy file"):
        dataset[3]


# ------------------------------------------------------------------------------------------------- foreign files, full disks


def test_foreign_files_are_never_deleted(source, tmp_path):
    (tmp_path / "mine/00000").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    foreign = [tmp_path / "mine/thesis.tmp", tmp_path / "mine/00000/notes.1.tmp", tmp_path / "elsewhere/notes.tmp"]
    for path in foreign:
        path.write_text("precious")
    (tmp_path / "mine/link").symlink_to("../elsewhere")
    own = tmp_path / "mine/00000/img00000001.png.4711.tmp"
    own.write_text("half")
    convert(source, tmp_path / "mine", *CROP)
    assert [path.read_text() for path in foreign] == ["precious"] * 3
    assert not own.exists()


@pytest.mark.parametrize("link", [False, True])
def test_a_foreign_file_in_the_place_of_a_zip(source, tmp_path, capsys, link):
    path = tmp_path / "i.zip.tmp"
    (tmp_path / "notes").write_text("precious")
    path.symlink_to("notes") if link else path.write_text("precious")
    argv = ["convert", f"--source={source}", f"--dest={tmp_path}/i.zip", *CROP]
    for _ in range(2):
        refused(capsys, argv, "i.zip.tmp is there, and is no part of this run")
    assert path.read_text() == "precious" and not (tmp_path / "i.zip.unfinished.json").exists()


def test_a_foreign_packed_file_is_not_continued(latents, tmp_path, capsys):
    (tmp_path / "p").mkdir()
    path = tmp_path / "p/latents-00000.npy.tmp"
    path.write_text("precious")
    refused(capsys, ["pack", f"--source={latents}/vae-sd", f"--dest={tmp_path}/p"], "latents-00000.npy.tmp is there")
    assert path.read_text() == "precious"


def test_leftovers_are_those_of_the_targets(tmp_path):
    for name in ("a.png.12.tmp", "a.png.tmp", "b.png.12.tmp", "a.png.x.tmp", "a.png"):
        (tmp_path / name).touch()
    (tmp_path / "a.png.13.tmp").symlink_to("a.png")
    (tmp_path / "a.png.14.tmp").mkdir()
    remove_leftovers(tmp_path, {"a.png"}.__contains__)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.png", "a.png.13.tmp", "a.png.14.tmp", "a.png.x.tmp", "b.png.12.tmp",
    ]  # fmt: skip


@pytest.fixture
def disk(monkeypatch):
    """disk(n): no file of this process may have more than n bytes from here on, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 60, 400])
@pytest.mark.parametrize("command", ["convert", "convert to a zip", "pack", "stats"])
def test_full_disks_are_one_line(source, latents, tmp_path, capsys, disk, size, command):
    argv = {
        "convert": ["convert", f"--source={source}", f"--dest={tmp_path}/d", *CROP],
        "convert to a zip": ["convert", f"--source={source}", f"--dest={tmp_path}/d.zip", *CROP],
        "pack": ["pack", f"--source={latents}/vae-sd", f"--dest={tmp_path}/p"],
        "stats": ["stats", str(latents)],
    }[command]
    capsys.readouterr()
    disk(size)
    if command == "stats" and size == 400:
        main(argv)
        return
    with pytest.raises(SystemExit) as caught:
        main(argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert caught.value.code == 2 and len(lines) == 1 and "cannot be written" in lines[0], lines
    assert ("--dest" in lines[0]) == (command != "stats")
    disk(resource.RLIM_INFINITY)
    main(argv)  # and it goes on
    assert not [path for path in tmp_path.rglob("*.tmp")]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, disk):
    path = tmp_path / "x.json"
    path.write_text("before")
    disk(10)
    with pytest.raises(WriteError, match=r"^--output .*x\.json: cannot be written: File too large$") as caught:
        write_atomically(path, b"x" * 100, option="--output")
    assert isinstance(caught.value, OSError) and isinstance(caught.value, UserError) and caught.value.strerror
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_devices_and_fifos_are_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "x")
    with ThreadPoolExecutor(1) as thread:
        received = thread.submit((tmp_path / "x").read_bytes)
        write_atomically(tmp_path / "x", b"content")
        assert received.result(10) == b"content"
    assert (tmp_path / "x").is_fifo() and len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------------------------------------------ sets of images


def npz(path: Path, kind: int = zipfile.ZIP_STORED, **arrays: np.ndarray) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, array in arrays.items():
            archive.writestr(f"{name}.npy", npy_bytes(array))
    return path


PIXELS = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)


def test_damage_in_a_stored_npz_is_found(tmp_path):
    write_npz(tmp_path / "s.npz", PIXELS.shape, iter(PIXELS))
    whole = (tmp_path / "s.npz").read_bytes()
    NpzImages(tmp_path / "s.npz").sha256()
    middle = len(whole) // 2
    (tmp_path / "s.npz").write_bytes(whole[:middle] + bytes(100) + whole[middle + 100 :])
    with pytest.raises(UserError, match=r"s\.npz: damaged: arr_0 does not match its CRC-32"):
        NpzImages(tmp_path / "s.npz").sha256()


@pytest.mark.parametrize(
    ("sigma", "reason"),
    [(-np.eye(3), "negative variance"), (np.ones((3, 3)) + np.diag([0, 0, -2]), "negative"),
     (np.array([[1, 2, 0], [2, 1, 0], [0, 0, 1]]), "semi-definite"), (np.eye(3) + np.eye(3, k=1), "symmetric")],
)  # fmt: skip
def test_what_is_no_covariance_is_refused_by_name(tmp_path, capsys, sigma, reason):
    reference = npz(tmp_path / "ref.npz", mu=np.zeros(3), sigma=sigma.astype(float))
    same = npz(tmp_path / "same.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(SystemExit) as caught:
        evaluate.main([str(reference), str(same), "--metrics", "fid", "--output", str(tmp_path / "m.json")])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert caught.value.code == 2 and "ref.npz: sigma is no covariance" in line and reason in line


def test_covariances_of_float32_and_of_few_images_are_covariances():
    rows = np.random.default_rng(0).normal(size=(20, 64))
    for dtype in (np.float64, np.float32):
        assert not covariance_problem(np.cov(rows, rowvar=False).astype(dtype))


@pytest.mark.parametrize(
    ("mu", "sigma"), [(np.full(3, 1e200), np.eye(3)), (np.zeros(3), 1e308 * np.eye(3)), (np.full(3, np.nan), np.eye(3))]
)
def test_huge_statistics_are_refused_by_name(tmp_path, mu, sigma):
    with pytest.raises(UserError, match=r"ref\.npz: (mu|sigma)\.npy holds values"):
        NpzImages(npz(tmp_path / "ref.npz", mu=mu, sigma=sigma))
    with pytest.raises(UserError):
        frechet_distance(mu, sigma, np.zeros(3), np.eye(3))


def test_a_reference_of_statistics_alone_gives_what_it_allows(tmp_path, capsys):
    reference = open_images(npz(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3)))
    samples = open_images(npz(tmp_path / "s.npz", arr_0=PIXELS))
    said: list[str] = []
    assert choose_metrics(EvaluateConfig(), [], [reference, samples], said.append) == ["fid", "is"]
    (message,) = said
    assert all(f"{name} (ref.npz holds no arr_0" in message for name in ("sfid", "precision", "recall")) and "mu_s" in message
    with pytest.raises(SystemExit):  # asked for by name, it is refused
        evaluate.main([f"{tmp_path}/ref.npz", f"{tmp_path}/s.npz", "--metrics", "recall", f"--output={tmp_path}/m.json"])
    assert "holds no arr_0 (images), which recall need" in capsys.readouterr().err


def test_two_sets_of_statistics_give_their_distance(tmp_path):
    for name, value in (("ref", 0.0), ("s", 2.0)):
        npz(tmp_path / f"{name}.npz", mu=np.full(3, value), sigma=np.eye(3))
    evaluate.main([f"{tmp_path}/ref.npz", f"{tmp_path}/s.npz", "--metrics", "fid", f"--output={tmp_path}/m.json"])
    results = json.loads((tmp_path / "m.json").read_text())
    assert results["fid"] == pytest.approx(12) and results["sfid"] is results["is"] is results["recall"] is None


@pytest.mark.parametrize(
    "factory", ["os:getcwd", "math:sqrt", "torch.nn:Linear", "..", ":", "builtins:print", "sys:exit", "x:y"]
)
def test_what_is_no_feature_network_is_one_line(tmp_path, capsys, factory):
    path = npz(tmp_path / "s.npz", arr_0=PIXELS)
    with pytest.raises(SystemExit) as caught:
        evaluate.main([str(path), str(path), "--features", factory, f"--output={tmp_path}/m.json"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert caught.value.code == 2 and f"--features {factory}: " in line


def damage_method(content: bytes) -> bytes:
    """The npz with a compression method that nobody knows."""
    place = content.index(b"PK\1\2")
    return content[:8] + b"\x63\0" + content[10 : place + 10] + b"\x63\0" + content[place + 12 :]


def damage_flag(content: bytes) -> bytes:
    """The npz with an encrypted member."""
    place = content.index(b"PK\1\2")
    return content[:6] + b"\1\0" + content[8 : place + 8] + b"\1\0" + content[place + 10 :]


@pytest.mark.parametrize("damage", [damage_method, damage_flag, lambda content: content[:200] + bytes(300) + content[500:]])
def test_npz_files_that_cannot_be_inflated(tmp_path, damage):
    path = npz(tmp_path / "s.npz", zipfile.ZIP_DEFLATED, arr_0=PIXELS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"s\.npz: truncated"):
        images = NpzImages(path)
        images.read(range(8))


def test_the_output_must_be_writable(tmp_path, capsys):
    path = npz(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(SystemExit) as caught:
            evaluate.main([str(path), str(path), "--metrics", "fid", f"--output={tmp_path}/m.json"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == 2 and "error: --output" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ref.npz"]


# -------------------------------------------------------------------------------------------------------------- Windows

WINDOWS = """
import os, signal, sys
for module, names in ((os, ("sched_getaffinity", "mkfifo")), (signal, ("SIGKILL", "SIGBUS", "SIGUSR1", "SIGUSR2", "SIGHUP"))):
    for name in names:
        delattr(module, name)
import torch
sys.modules["fcntl"] = None
import common.distributed, dataset_tools, evaluate
print(common.distributed.cpu_count())
"""


def test_modules_import_without_posix():
    done = subprocess.run([sys.executable, "-c", WINDOWS], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout) >= 1, done.stderr


@pytest.mark.parametrize("name", ["a.png", "a.eps"])
def test_no_image_is_a_program(tmp_path, monkeypatch, name):
    """Pillow has Ghostscript run PostScript, whatever its file is called."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # it has not looked for it yet
    (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    with pytest.raises(DataError, match="not a readable image: unknown format"):
        read_image(FileTree(tmp_path), name)
    assert not (tmp_path / "ran").exists()
