"""convert: odd and broken images, any number of workers, stopped runs, and what stands in the way of writing."""

import errno
import io
import multiprocessing
import os
import resource
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sets import content, convert, labels_of, load_png, picture, refused, save, zip_of

from common.file_tree import FileTree
from common.files import lock
from common.image_files import MAX_PIXELS
from preprocessing.output import UNFINISHED_FILE


@pytest.fixture
def source(tmp_path) -> Path:
    """Two classes of three noisy 40×48 images."""
    for i in range(6):
        save(tmp_path / f"source/{'ab'[i // 3]}/{i}.png", picture(40, 48, seed=i))
    return tmp_path / "source"


OPTIONS = ("--resolution=16x16", "--transform=center-crop-dhariwal")


# ---------------------------------------------------------------------------------------------------------- odd images


def as_bytes(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def odd_images() -> dict[str, tuple[bytes, np.ndarray]]:
    """File name → its content and the RGB that it stands for, from the definition of each kind."""
    rgb = picture(8, 8)
    grey, alpha = rgb[:, :, 0], rgb[:, :, 1]
    grey16 = grey.astype(np.uint16) * 256 + alpha
    cmyk = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    white = 255 - cmyk.astype(int)
    palette = Image.fromarray(grey % 4).convert("P")
    colours = np.array([[9, 8, 7], [200, 0, 0], [0, 150, 0], [0, 0, 99]], dtype=np.uint8)
    palette.putpalette(colours.tobytes())
    rotated = Image.Exif()
    rotated[0x0112] = 6  # to be shown turned by 90°
    jpeg = as_bytes(Image.fromarray(rgb), "jpeg", quality=100, subsampling=0)
    return {
        "alpha.png": (as_bytes(Image.fromarray(np.dstack([rgb, alpha])), "png"), rgb),
        "bits16.png": (as_bytes(Image.fromarray(grey16), "png"), np.dstack([grey] * 3)),
        "bits16.tif": (as_bytes(Image.fromarray(grey16), "tiff"), np.dstack([grey] * 3)),
        "cmyk.tif": (as_bytes(Image.fromarray(cmyk, "CMYK"), "tiff"), (white[..., :3] * white[..., 3:] / 255)),
        "exif.png": (as_bytes(Image.fromarray(rgb), "png", exif=rotated), rgb),
        "exif_jpeg.jpg": (as_bytes(Image.fromarray(rgb), "jpeg", quality=100, subsampling=0, exif=rotated),
                          np.asarray(Image.open(io.BytesIO(jpeg)))),
        "greyalpha.png": (as_bytes(Image.fromarray(np.dstack([grey, alpha]), "LA"), "png"), np.dstack([grey] * 3)),
        "one.png": (as_bytes(Image.fromarray(grey > 60), "png"), np.dstack([(grey > 60) * 255] * 3)),
        "palette.png": (as_bytes(palette, "png", transparency=1), colours[grey % 4]),
    }  # fmt: skip


def test_odd_images_become_the_rgb_that_they_stand_for(tmp_path):
    (tmp_path / "s").mkdir()
    odd = odd_images()
    for name, (data, _) in odd.items():
        (tmp_path / "s" / name).write_bytes(data)
    found = convert(tmp_path / "s", tmp_path / "d")
    for i, name in enumerate(sorted(odd)):
        pixels = load_png(found[f"00000/img{i:08d}.png"]).astype(float)
        np.testing.assert_allclose(pixels, odd[name][1], atol=1 if "cmyk" in name else 0, err_msg=name)


def test_cmyk_jpeg_is_near_its_colours(tmp_path):
    """An Adobe JPEG stores CMYK inverted; a flat one must come out in its colour."""
    (tmp_path / "s").mkdir()
    flat = np.full((16, 16, 4), (200, 30, 90, 20), dtype=np.uint8)
    (tmp_path / "s/a.jpg").write_bytes(as_bytes(Image.fromarray(flat, "CMYK"), "jpeg", quality=100))
    found = load_png(convert(tmp_path / "s", tmp_path / "d")["00000/img00000000.png"])
    expected = (255 - np.array([200, 30, 90])) * (255 - 20) / 255
    assert np.abs(found - expected).max() <= 3


# ------------------------------------------------------------------------------------------------------- broken images


@pytest.fixture
def with_broken(source) -> dict[str, str]:
    """Breaks four more images of the source: name → a word of the reason."""
    jpeg = as_bytes(Image.fromarray(picture(40, 48)), "jpeg")
    broken = {
        "a/0a.jpg": (jpeg[:-200], "truncated"),
        "a/9.png": (b"", "unknown format"),
        "b/3text.png": (b"some words", "unknown format"),
        "b/9bomb.png": (as_bytes(Image.new("1", (10_000, 10_000)), "png"), f"{MAX_PIXELS:,}"),
    }
    for name, (data, _) in broken.items():
        (source / name).write_bytes(data)
    return {name: reason for name, (_, reason) in broken.items()}


@pytest.mark.parametrize(("workers", "dest"), [(1, "d"), (2, "d"), (2, "d.zip")])
def test_broken_images_are_listed_and_their_numbers_used_up(source, with_broken, tmp_path, workers, dest):
    found = convert(source, tmp_path / dest, *OPTIONS, f"--workers={workers}")
    lines = found["skipped.txt"].decode().splitlines()
    assert [line.split("\t")[0] for line in lines] == sorted(with_broken)
    assert all(with_broken[line.split("\t")[0]] in line.split("\t")[1] for line in lines)
    order = sorted(p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file())
    kept = [i for i, name in enumerate(order) if name not in with_broken]
    assert sorted(n for n in found if n.endswith("png")) == [f"00000/img{i:08d}.png" for i in kept]
    assert labels_of(tmp_path / dest) == [[f"00000/img{i:08d}.png", int(order[i][0] == "b")] for i in kept]
    assert convert(tmp_path / dest, tmp_path / "again")  # such a set is a source like any other


def test_strict_stops_at_the_first_broken_image(source, with_broken, tmp_path, capsys):
    for workers in (1, 2):
        argv = ["convert", f"--source={source}", f"--dest={tmp_path}/d{workers}", *OPTIONS, "--strict", f"--workers={workers}"]
        refused(capsys, argv, "a/0a.jpg", "not a readable image", "truncated")


def test_nothing_but_broken_images(tmp_path, capsys):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a.png").write_bytes(b"")
    refused(capsys, ["convert", f"--source={tmp_path}/s", f"--dest={tmp_path}/d"], "--source", "no image can be read")
    assert not (tmp_path / "d").exists()


# ------------------------------------------------------------------------------------------------- workers, stopped runs


def test_the_number_of_workers_changes_no_byte(source, tmp_path):
    folder = convert(source, tmp_path / "1", *OPTIONS, "--workers=1")
    convert(source, tmp_path / "1.zip", *OPTIONS, "--workers=1")
    zipped = zip_of(source, tmp_path / "s.zip")
    for workers, path in ((2, source), (3, zipped)):
        assert convert(path, tmp_path / f"{workers}", *OPTIONS, f"--workers={workers}") == folder
        convert(path, tmp_path / f"{workers}.zip", *OPTIONS, f"--workers={workers}")
        assert (tmp_path / f"{workers}.zip").read_bytes() == (tmp_path / "1.zip").read_bytes()
    assert content(tmp_path / "1.zip") == folder


def test_a_zip_is_continued_wherever_it_was_cut(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "whole.zip", *OPTIONS)
    whole = (tmp_path / "whole.zip").read_bytes()
    made = []
    write = zipfile.ZipFile.writestr
    monkeypatch.setattr(
        zipfile.ZipFile, "writestr", lambda self, info, data: (made.append(info.filename), write(self, info, data))
    )
    with zipfile.ZipFile(tmp_path / "whole.zip") as archive:
        third, last = archive.infolist()[2].header_offset, archive.infolist()[-1].header_offset
    for cut, expected in ((0, 7), (3, 7), (third - 1, 6), (third, 5), (third + 60, 5), (last + 35, 1), (len(whole) - 5, 1)):
        (tmp_path / "d.zip.tmp").write_bytes(whole[:cut])
        made.clear()
        convert(source, tmp_path / "d.zip", *OPTIONS)
        assert (tmp_path / "d.zip").read_bytes() == whole and len(made) == expected, cut
        (tmp_path / "d.zip").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "whole.zip"]


def test_a_zip_of_other_options_is_not_continued(source, tmp_path, capsys):
    (tmp_path / "d.zip.tmp").write_bytes(b"PK")
    (tmp_path / f"d.zip.{UNFINISHED_FILE}").write_text('{"command": "convert", "transform": "center-crop"}')
    argv = ["convert", f"--source={source}", f"--dest={tmp_path}/d.zip", *OPTIONS]
    refused(capsys, argv, f"--dest {tmp_path}/d.zip", "another transform (center-crop, not center-crop-dhariwal)")
    assert (tmp_path / "d.zip.tmp").read_bytes() == b"PK"


def test_killed_between_the_label_file_and_the_end(source, tmp_path):
    whole = convert(source, tmp_path / "d", *OPTIONS)
    (tmp_path / "d" / UNFINISHED_FILE).write_text("")
    (tmp_path / "d/00000/img00000002.png.77.tmp").write_bytes(b"half")
    assert convert(source, tmp_path / "d", *OPTIONS) == whole


# -------------------------------------------------------------------------------------------------- what is in the way


@pytest.mark.parametrize("dest", ["d", "d.zip"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(source, tmp_path, capsys, dest, workers):
    """No file may grow beyond a limit: in the folder that stops the first one that is larger, in the zip the third image."""
    whole = convert(source, tmp_path / f"whole-{dest}", *OPTIONS)
    one = len(whole["00000/img00000000.png"])
    argv = ["convert", f"--source={source}", f"--dest={tmp_path}/{dest}", *OPTIONS, f"--workers={workers}"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (one - 9 if dest == "d" else int(2.5 * one), before[1]))
    try:
        refused(capsys, argv, f"--dest {tmp_path}/{dest}", "cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [p for p in tmp_path.rglob("*.png.*")] and not (tmp_path / "d.zip").exists()
    assert convert(source, tmp_path / dest, *OPTIONS) == whole


def test_a_read_only_destination(source, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    for dest in ("d", "d.zip"):
        refused(
            capsys,
            ["convert", f"--source={source}", f"--dest={tmp_path}/{dest}", *OPTIONS],
            f"--dest {tmp_path}/{dest}",
            "Read-only",
        )


@pytest.mark.parametrize("dest", ["d", "d.zip"])
def test_two_runs_on_one_destination(source, tmp_path, capsys, dest):
    """Another process holds the record: POSIX locks are between processes."""
    path = tmp_path / "d" / UNFINISHED_FILE if dest == "d" else tmp_path / f"d.zip.{UNFINISHED_FILE}"
    path.parent.mkdir(exist_ok=True)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def hold():
        held = lock(path)
        theirs.send(held is not None)
        theirs.recv()

    other = context.Process(target=hold)
    other.start()
    assert ours.recv()
    argv = ["convert", f"--source={source}", f"--dest={tmp_path}/{dest}", *OPTIONS]
    refused(capsys, argv, "--dest", "another run is writing there")
    ours.send(None)
    other.join()
    assert len(convert(source, tmp_path / dest, *OPTIONS)) == 7


def test_workers_end_with_their_parent(source, tmp_path):
    """A run that is killed while its workers wait to hand over results leaves none of them."""
    from preprocessing.convert import Conversion
    from preprocessing.transforms import unchanged

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def run():
        names = ["a/0.png"] * 1000  # far more than fit in a pipe
        work = Conversion(
            FileTree(source), names, names, lambda _: unchanged(picture(64, 64)), (64, 64), None, {"a/0.png": None}
        )
        results = work.results(2)
        next(results)
        theirs.send([child.pid for child in multiprocessing.active_children()])
        time.sleep(60)

    parent = context.Process(target=run)
    parent.start()
    theirs.close()  # so that a parent that fails is an end of file, not a wait
    workers = ours.recv()
    assert len(workers) == 2 and all(Path(f"/proc/{pid}").exists() for pid in workers)
    parent.kill()
    parent.join()
    for _ in range(200):
        # Adopted by the system's first process, which may be slow to take note of their end.
        states = [Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in workers if Path(f"/proc/{pid}").exists()]
        if all(state == "Z" for state in states):
            return
        time.sleep(0.01)
    pytest.fail(f"workers {workers} are left behind")


def test_a_killed_worker_is_one_line(source, tmp_path, capsys, monkeypatch):
    from preprocessing.convert import Conversion

    here, original = os.getpid(), Conversion.__getitem__

    def die(self, index):
        if index == 4 and os.getpid() != here:
            os.kill(os.getpid(), 9)
        return original(self, index)

    monkeypatch.setattr(Conversion, "__getitem__", die)
    argv = ["convert", f"--source={source}", f"--dest={tmp_path}/d", *OPTIONS, "--workers=2"]
    refused(capsys, argv, "a data worker was ended by SIGKILL", "the same command goes on")
    monkeypatch.undo()
    assert convert(source, tmp_path / "d", *OPTIONS) == convert(source, tmp_path / "e", *OPTIONS)


def test_two_files_of_one_name_and_labels_without_files(source, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        for _ in range(2):
            archive.writestr("a/1.png", b"")
    refused(capsys, ["convert", f"--source={tmp_path}/s.zip", f"--dest={tmp_path}/d"], "s.zip", "'a/1.png'", "one name")
    names = [f"{'ab'[i // 3]}/{i}.png" for i in range(6)]
    for labels, culprit in ((names + ["c/7.png"], "labels c/7.png"), (names + names[:1], "labels a/0.png twice")):
        (source / "dataset.json").write_text(f'{{"labels": {[[n, 0] for n in labels]}}}'.replace("'", '"'))
        refused(capsys, ["convert", f"--source={source}", f"--dest={tmp_path}/d"], "dataset.json", culprit)
