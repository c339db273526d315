"""dataset_tools.py: transforms to the pixel, labels, folders and zips, resume, and every mistake in one line."""

import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sets import content, convert, labels_of, load_png, picture, refused, save, zip_of

from data.dataset import LatentDataset
from dataset_tools import main
from models.vae import encode_moments, load_vae
from preprocessing import demo
from preprocessing import encode as encode_room
from preprocessing import output as dest_room
from preprocessing.transforms import resize_crop


@pytest.fixture
def source(tmp_path) -> Path:
    """Three class folders of 8×8 images; sorted by path: cat (0), dog (1), eel (2)."""
    for i, name in enumerate(["dog/b.png", "dog/a.png", "cat/z/1.png", "eel/q.png", "cat/x.png"]):
        save(tmp_path / "source" / name, picture(8, 8, seed=i))
    (tmp_path / "source/cat/notes.txt").write_text("not an image")
    return tmp_path / "source"


SORTED = ["cat/x.png", "cat/z/1.png", "dog/a.png", "dog/b.png", "eel/q.png"]
NUMBERED = [f"00000/img{i:08d}.png" for i in range(5)]


# ---------------------------------------------------------------------- transforms, from the definitions, in Pillow alone


def by_definition(name: str, image: Image.Image, W: int, H: int) -> Image.Image | None:
    w, h = image.size
    if name == "center-crop-dhariwal":
        while min(image.size) >= 2 * W:
            image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.BOX)
        short = min(image.size)
        new = tuple(round(side * W / short) for side in image.size)
        image = image.resize(new, Image.BICUBIC)
        left, top = (new[0] - W) // 2, (new[1] - W) // 2
        return image.crop((left, top, left + W, top + W))
    if name == "center-crop":
        c = min(h, w)
        return image.crop(((w - c) // 2, (h - c) // 2, (w + c) // 2, (h + c) // 2)).resize((W, H), Image.LANCZOS)
    if name == "center-crop-wide":
        ch = round(W * h / w)
        if w < W or ch < H:
            return None
        band = image.crop((0, (h - ch) // 2, w, (h + ch) // 2)).resize((W, H), Image.LANCZOS)
        canvas = Image.new("RGB", (W, W))
        canvas.paste(band, (0, (W - H) // 2))
        return canvas
    return image.resize((W, H), Image.LANCZOS)


SIZES = [(16, 16), (17, 23), (23, 17), (33, 64), (64, 33), (31, 95), (97, 40), (129, 70), (15, 9), (32, 47), (200, 131)]


@pytest.mark.parametrize("transform", ["center-crop-dhariwal", "center-crop", "none"])
def test_transform_to_the_pixel(tmp_path, transform):
    for i, (h, w) in enumerate(SIZES):
        save(tmp_path / f"s/{i:02d}.png", picture(h, w, seed=i))
    found = convert(tmp_path / "s", tmp_path / "d", "--resolution=16x16", f"--transform={transform}")
    for i, (h, w) in enumerate(SIZES):
        expected = by_definition(transform, Image.fromarray(picture(h, w, seed=i)), 16, 16)
        np.testing.assert_array_equal(load_png(found[f"00000/img{i:08d}.png"]), np.asarray(expected))


def test_center_crop_wide_leaves_out_and_uses_up_numbers(tmp_path):
    # At 16×9 (width × height): the second is too narrow, the fourth's band (16·5/16 = 5) too low.
    sizes = [(40, 40), (40, 15), (31, 17), (5, 16), (37, 50)]
    for i, (h, w) in enumerate(sizes):
        save(tmp_path / f"s/{'ab'[i % 2]}{i}/{i}.png", picture(h, w, seed=i))
    found = convert(tmp_path / "s", tmp_path / "d", "--resolution=16x9", "--transform=center-crop-wide")
    names = sorted(name for name in found if name.endswith(".png"))
    order = [0, 2, 4, 1, 3]  # a0 a2 a4 b1 b3
    kept = [place for place, i in enumerate(order) if i in (0, 2, 4)]
    assert names == [f"00000/img{place:08d}.png" for place in kept]
    for place in kept:
        h, w = sizes[order[place]]
        expected = by_definition("center-crop-wide", Image.fromarray(picture(h, w, seed=order[place])), 16, 9)
        np.testing.assert_array_equal(load_png(found[f"00000/img{place:08d}.png"]), np.asarray(expected))
    assert labels_of(tmp_path / "d") == [[f"00000/img{place:08d}.png", place] for place in kept]


def test_wide_with_a_gap_in_the_middle_pairs_with_its_latents(tmp_path, vae_folder):
    for i, w in enumerate([20, 8, 20]):  # the second is too narrow
        save(tmp_path / f"s/{i}.png", picture(20, w, seed=i))
    convert(tmp_path / "s", tmp_path / "D/images", "--resolution=16x8", "--transform=center-crop-wide")
    main(["encode", f"--source={tmp_path}/D/images", f"--dest={tmp_path}/D/vae-sd", f"--vae={vae_folder}"])
    assert sorted(n for n in content(tmp_path / "D/vae-sd") if n.endswith(".npy")) == [
        "00000/img-mean-std-00000000.npy",
        "00000/img-mean-std-00000002.npy",
    ]
    vae, _ = load_vae(str(vae_folder))
    for item in LatentDataset(tmp_path / "D", images=True):
        torch.testing.assert_close(item["moments"], encode_moments(vae, item["image"][None])[0], atol=1e-5, rtol=1e-4)


def test_dhariwal_halves_by_averages_of_four():
    """Against NumPy: an image of twice the target and even size is the mean of 2×2 pixels (Pillow rounds twice)."""
    image = picture(32, 32)
    means = image.reshape(16, 2, 16, 2, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(resize_crop(image, 16, 16) - means).max() <= 1


def test_no_transform_keeps_pixels_and_grey_and_palette_become_rgb(tmp_path):
    grey = picture(8, 8)[:, :, 0]
    save(tmp_path / "s/0.png", picture(8, 8))
    save(tmp_path / "s/1.png", grey)
    Image.fromarray(picture(8, 8, seed=2)).convert("P").save(tmp_path / "s/2.png")
    palette = np.asarray(Image.open(tmp_path / "s/2.png").convert("RGB"))
    found = convert(tmp_path / "s", tmp_path / "d")
    for i, expected in enumerate([picture(8, 8), np.stack([grey] * 3, axis=2), palette]):
        np.testing.assert_array_equal(load_png(found[f"00000/img{i:08d}.png"]), expected)


def test_png_is_uncompressed(tmp_path):
    save(tmp_path / "s/0.png", np.zeros((64, 64, 3), dtype=np.uint8))
    found = convert(tmp_path / "s", tmp_path / "d")
    assert len(found["00000/img00000000.png"]) > 64 * 64 * 3


def test_a_thousand_to_a_folder(tmp_path):
    for i in range(1002):
        save(tmp_path / f"s/{i:04d}.png", np.full((1, 1, 3), i % 251, dtype=np.uint8))
    found = convert(tmp_path / "s", tmp_path / "d")
    assert {"00000/img00000999.png", "00001/img00001000.png", "00001/img00001001.png"} <= set(found) and len(found) == 1003
    assert load_png(found["00001/img00001001.png"])[0, 0, 0] == 1001 % 251


# -------------------------------------------------------------------------------------------------- order, labels, zips


def check_order(found: dict[str, bytes], source: Path) -> None:
    assert sorted(found) == NUMBERED + ["dataset.json"]
    for name, original in zip(NUMBERED, SORTED, strict=True):
        np.testing.assert_array_equal(load_png(found[name]), np.asarray(Image.open(source / original)))


def test_labels_from_folders_in_sorted_order(source, tmp_path):
    check_order(convert(source, tmp_path / "d"), source)
    assert labels_of(tmp_path / "d") == [[name, label] for name, label in zip(NUMBERED, [0, 0, 1, 1, 2], strict=True)]


def test_sorted_by_path_as_text(tmp_path):
    for i, name in enumerate(["a/b.png", "a-c/b.png", "a.d/b.png"]):  # '-' < '.' < '/'
        save(tmp_path / "s" / name, np.full((4, 4, 3), i, dtype=np.uint8))
    for path in (tmp_path / "s", zip_of(tmp_path / "s", tmp_path / "s.zip")):
        dest = tmp_path / f"d-{path.name}"
        found = convert(path, dest)
        assert [load_png(found[name])[0, 0, 0] for name in NUMBERED[:3]] == [1, 2, 0]
        assert [label for _, label in labels_of(dest)] == [1, 2, 0]  # folder names sort as a < a-c < a.d


def test_zip_and_folder_are_equal(source, tmp_path):
    expected = convert(source, tmp_path / "d")
    assert convert(source, tmp_path / "d.zip") == expected
    zipped = zip_of(source, tmp_path / "s.zip")
    assert convert(zipped, tmp_path / "from-zip") == expected
    assert convert(zipped, tmp_path / "from-zip.zip") == expected
    with zipfile.ZipFile(tmp_path / "d.zip") as archive:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_one_folder_or_none_is_unlabelled(tmp_path):
    save(tmp_path / "s/only/0.png", picture(8, 8))
    convert(tmp_path / "s", tmp_path / "d")
    assert labels_of(tmp_path / "d") is None
    save(tmp_path / "flat/0.png", picture(8, 8))
    convert(tmp_path / "flat", tmp_path / "d2")
    assert labels_of(tmp_path / "d2") is None


def test_label_file_goes_before_folder_names(source, tmp_path):
    (source / "dataset.json").write_text(json.dumps({"labels": [[name, 7 - i] for i, name in enumerate(SORTED)]}))
    convert(source, tmp_path / "d")
    assert [label for _, label in labels_of(tmp_path / "d")] == [7, 6, 5, 4, 3]


@pytest.mark.parametrize("as_zip", [False, True])
def test_null_labels_stay_unlabelled_through_convert_and_encode(source, tmp_path, vae_folder, as_zip):
    (source / "dataset.json").write_text('{"labels": null}')
    path = zip_of(source, tmp_path / "s.zip") if as_zip else source
    suffix = ".zip" if as_zip else ""
    images, latents = tmp_path / f"D/images{suffix}", tmp_path / f"D/vae-sd{suffix}"
    convert(path, images)
    assert labels_of(images) is None
    main(["encode", f"--source={images}", f"--dest={latents}", f"--vae={vae_folder}"])
    assert labels_of(latents) is None
    dataset = LatentDataset(tmp_path / "D")
    assert dataset.labels is None and len(dataset) == 5


def test_max_images_takes_the_first_and_keeps_the_classes_of_all(source, tmp_path):
    found = convert(source, tmp_path / "d", "--max-images", "3")
    assert sorted(found) == NUMBERED[:3] + ["dataset.json"]
    assert [label for _, label in labels_of(tmp_path / "d")] == [0, 0, 1]


def test_converting_a_converted_set_keeps_labels(source, tmp_path):
    first = convert(source, tmp_path / "d")
    assert convert(tmp_path / "d", tmp_path / "again") == first


# -------------------------------------------------------------------------------------------------------------- resume


def test_convert_is_continued(source, tmp_path, monkeypatch):
    whole = convert(source, tmp_path / "whole")
    writes = []
    original = dest_room.Folder.write

    def stop_at_the_third(self, name, payload):
        if name == NUMBERED[2]:
            raise KeyboardInterrupt
        original(self, name, payload)

    monkeypatch.setattr(dest_room.Folder, "write", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "d", "--workers=1")
    assert (tmp_path / "d" / NUMBERED[1]).exists() and not (tmp_path / "d/dataset.json").exists()
    (tmp_path / "d" / NUMBERED[0]).write_bytes(whole[NUMBERED[0]][:100])  # as another tool's kill leaves it
    (tmp_path / "d/00000/img00000002.png.tmp").write_bytes(b"half")

    def record(self, name, payload):
        writes.append(name)
        original(self, name, payload)

    monkeypatch.setattr(dest_room.Folder, "write", record)
    assert convert(source, tmp_path / "d", "--workers=1") == whole
    assert [name for name in writes if name in NUMBERED] == [NUMBERED[0], *NUMBERED[2:]]
    assert writes[-1] == "dataset.json"


def test_numbered_files_without_a_label_file_are_continued(source, tmp_path):
    whole = convert(source, tmp_path / "d")
    (tmp_path / "d/dataset.json").unlink()
    (tmp_path / "d" / NUMBERED[3]).unlink()
    assert convert(source, tmp_path / "d") == whole


def test_a_stopped_run_with_other_options_is_not_continued(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dest_room.FolderDest, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(source, tmp_path / "d")
    monkeypatch.undo()
    refused(
        capsys, ["convert", f"--source={source}", f"--dest={tmp_path}/d", "--resolution=4x4"], "--dest", "resolution", "4x4"
    )
    refused(capsys, ["convert", f"--source={tmp_path}/d", f"--dest={tmp_path}/e"], "--source", "continue it first")


@pytest.mark.parametrize("dest", ["d", "d.zip"])
def test_failure_on_the_first_image_leaves_nothing(source, tmp_path, capsys, dest):
    save(source / "ant/wide.png", picture(8, 16))
    refused(capsys, ["convert", f"--source={source}", f"--dest={tmp_path}/{dest}"], "ant/wide.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


# -------------------------------------------------------------------------------------------------------------- encode


@pytest.fixture
def encoded(source, tmp_path, vae_folder) -> Path:
    convert(source, tmp_path / "D/images")
    main(
        [
            "encode",
            f"--source={tmp_path}/D/images",
            f"--dest={tmp_path}/D/vae-sd",
            "--model-url",
            str(vae_folder),
            "--batch-size=2",
        ]
    )
    return tmp_path / "D"


def test_encode_equals_one_image_at_a_time(encoded, vae_folder):
    vae, record = load_vae(str(vae_folder))
    found = content(encoded / "vae-sd")
    assert sorted(found) == [f"00000/img-mean-std-{i:08d}.npy" for i in range(5)] + ["dataset.json", "vae.json"]
    images = content(encoded / "images")
    for i in range(5):
        values = np.load(io.BytesIO(found[f"00000/img-mean-std-{i:08d}.npy"]))
        assert values.dtype == np.float32 and values.shape == (6, 4, 4)
        pixels = torch.from_numpy(load_png(images[NUMBERED[i]])).permute(2, 0, 1)[None]
        np.testing.assert_allclose(values, encode_moments(vae, pixels)[0].numpy(), atol=1e-5, rtol=1e-4)
    assert labels_of(encoded / "vae-sd") == [
        [f"00000/img-mean-std-{i:08d}.npy", label] for i, label in enumerate([0, 0, 1, 1, 2])
    ]
    assert json.loads(found["vae.json"]) == record.to_dict()


def test_encoded_set_is_read_with_its_images(encoded):
    dataset = LatentDataset(encoded, images=True)
    dataset.check(num_classes=3, resolution=8)
    assert dataset.labels.tolist() == [0, 0, 1, 1, 2] and dataset.record.downsample_factor == 2
    images = content(encoded / "images")
    for i in range(5):
        assert np.array_equal(dataset[i]["image"].permute(1, 2, 0).numpy(), load_png(images[NUMBERED[i]]))


def test_encode_to_and_from_zip(encoded, vae_folder, tmp_path):
    expected = content(encoded / "vae-sd")
    (tmp_path / "Z").mkdir()
    zipped = zip_of(encoded / "images", tmp_path / "Z/images.zip")
    main(["encode", f"--source={zipped}", f"--dest={tmp_path}/Z/vae-sd.zip", f"--vae={vae_folder}", "--batch-size=2"])
    assert content(tmp_path / "Z/vae-sd.zip") == expected
    assert len(LatentDataset(tmp_path / "Z", images=True)) == 5


def test_encode_takes_labels_from_folders(source, tmp_path, vae_folder):
    main(["encode", f"--source={source}", f"--dest={tmp_path}/vae-sd", f"--vae={vae_folder}", "--max-images=4"])
    assert [label for _, label in labels_of(tmp_path / "vae-sd")] == [0, 0, 1, 1]


def test_encode_is_continued(encoded, vae_folder, monkeypatch):
    whole = content(encoded / "vae-sd")
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(5)]
    (encoded / "vae-sd/dataset.json").unlink()
    (encoded / "vae-sd" / names[1]).write_bytes(whole[names[1]][:50])
    np.save(encoded / "vae-sd" / names[2], np.zeros((8, 4, 4), dtype=np.float32))
    (encoded / "vae-sd" / names[4]).unlink()
    encoded_images = []
    original = encode_room.encode_moments

    def count(vae, images):
        encoded_images.append(len(images))
        return original(vae, images)

    monkeypatch.setattr(encode_room, "encode_moments", count)
    main(["encode", f"--source={encoded}/images", f"--dest={encoded}/vae-sd", f"--vae={vae_folder}", "--batch-size=2"])
    assert encoded_images == [2, 2, 1]  # whole blocks: the same batches, so the same bits
    assert content(encoded / "vae-sd") == whole


# ---------------------------------------------------------------------------------------------------------------- demo


def test_demo_makes_class_folders_and_is_continued(tmp_path, monkeypatch):
    assert demo.DEMO_CANVASES_PER_CLASS == {"train": 500, "val": 50}
    monkeypatch.setattr(demo, "DEMO_CANVASES_PER_CLASS", {"train": 2, "val": 1})
    main(["demo", f"--dest={tmp_path}/demo"])
    first = content(tmp_path / "demo")
    assert sorted(first) == sorted(
        f"{split}/{digit}/{i:05d}.png" for split, n in (("train", 2), ("val", 1)) for digit in range(10) for i in range(n)
    )
    for split in ("train", "val"):
        for digit, number, canvas in demo.demo_canvases(split == "val", 1):
            image = Image.open(tmp_path / f"demo/{split}/{digit}/{number:05d}.png")
            assert image.mode == "L" and np.array_equal(np.asarray(image), canvas)
    (tmp_path / "demo/train/3/00001.png").write_bytes(b"")
    (tmp_path / "demo/val/9/00000.png").unlink()
    main(["demo", f"--dest={tmp_path}/demo"])
    assert content(tmp_path / "demo") == first
    found = convert(tmp_path / "demo/train", tmp_path / "images", "--resolution=64x64")
    assert labels_of(tmp_path / "images") == [[f"00000/img{i:08d}.png", i // 2] for i in range(20)]
    assert load_png(found["00000/img00000000.png"]).shape == (64, 64, 3)


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("argv", "culprits"),
    [
        (["convrt"], ["'convrt'", "did you mean convert"]),
        (["convert", "--sorce=x", "--dest=y"], ["--sorce", "--source"]),
        (["convert", "--dest=y"], ["--source is required"]),
        (["convert", "--source=x"], ["--dest is required"]),
        (["encode", "--source=x"], ["--dest is required"]),
        (["demo"], ["--dest is required"]),
        (["convert", "--source=nowhere", "--dest={tmp}/d"], ["--source nowhere", "no such"]),
        (["encode", "--source=nowhere", "--dest={tmp}/d"], ["--source nowhere", "no such"]),
        (["convert", "--source={s}", "--dest={tmp}/d", "--resolution=256"], ["--resolution 256", "WIDTHxHEIGHT"]),
        (["convert", "--source={s}", "--dest={tmp}/d", "--resolution=0x0"], ["--resolution 0x0"]),
        (["convert", "--source={s}", "--dest={tmp}/d", "--resolution=8x16"], ["--resolution 8x16", "square"]),
        (["convert", "--source={s}", "--dest={tmp}/d", "--resolution=12x12"], ["--resolution 12x12", "power of two"]),
        (["convert", "--source={s}", "--dest={tmp}/d", "--transform=center-crop"], ["--transform center-crop", "--resolution"]),
        (["convert", "--source={s}", "--dest={tmp}/d", "--transform=crop", "--resolution=8x8"], ["--transform", "'crop'", "center-crop"]),
        (
            ["convert", "--source={s}", "--dest={tmp}/d", "--transform=center-crop-wide", "--resolution=8x16"],
            ["--resolution 8x16", "height"],
        ),
        (["convert", "--source={s}", "--dest={tmp}/d", "--transform=center-crop-wide", "--resolution=64x32"], ["--source", "large enough"]),
        (["convert", "--source={s}", "--dest={tmp}/d", "--max-images=0"], ["--max-images", "0"]),
        (["convert", "--source={s}", "--dest={s}/d"], ["--dest", "inside"]),
        (["convert", "--source={s}", "--dest={s}"], ["--dest", "inside"]),
        (["convert", "--source={s}", "--dest={s}/cat/x.png/d"], ["--dest"]),
        (["encode", "--source={s}", "--dest={tmp}/d", "--vae=./nowhere"], ["--vae ./nowhere"]),
        (["encode", "--source={s}", "--dest={tmp}/d", "--batch-size=0"], ["--batch-size"]),
    ],
)  # fmt: skip
def test_bad_options(source, tmp_path, capsys, argv, culprits):
    before = content(tmp_path)
    refused(capsys, [a.format(s=source, tmp=tmp_path) for a in argv], *culprits)
    assert content(tmp_path) == before


def test_dest_is_a_file_or_lies_under_one(source, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for dest in ("file", "file/d", "file/d.zip"):
        refused(capsys, ["convert", f"--source={source}", f"--dest={tmp_path}/{dest}"], f"--dest {tmp_path}/{dest}")


def test_finished_and_foreign_dest(source, tmp_path, capsys, vae_folder):
    convert(source, tmp_path / "d")
    convert(source, tmp_path / "d.zip")
    before = content(tmp_path)
    refused(capsys, ["convert", f"--source={source}", f"--dest={tmp_path}/d"], f"--dest {tmp_path}/d", "finished")
    refused(capsys, ["convert", f"--source={source}", f"--dest={tmp_path}/d.zip"], f"--dest {tmp_path}/d.zip", "exists")
    refused(capsys, ["demo", f"--dest={source}"], f"--dest {source}", "not empty", "cat/notes.txt")
    refused(
        capsys, ["encode", f"--source={tmp_path}/d", f"--dest={source}", f"--vae={vae_folder}"], f"--dest {source}", "not empty"
    )
    (tmp_path / "d/dataset.json").unlink()
    refused(
        capsys, ["convert", f"--source={source}", f"--dest={tmp_path}/d", "--max-images=4"], NUMBERED[4], "no part of this run"
    )
    (tmp_path / "d/dataset.json").write_bytes(before["d/dataset.json"])
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("shape", "reason"), [((8, 16), "not a square"), ((12, 12), "not a power of two"), ((16, 16), "others 8")]
)
def test_images_that_do_not_fit(source, tmp_path, capsys, shape, reason):
    save(source / "zoo/odd.png", picture(*shape))
    refused(capsys, ["convert", f"--source={source}", f"--dest={tmp_path}/d"], "zoo/odd.png", reason, "--resolution")
    assert not (tmp_path / "d/dataset.json").exists()


@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize("command", ["convert", "encode"])
def test_unreadable_image(source, tmp_path, capsys, vae_folder, command, as_zip):
    whole = (source / "dog/a.png").read_bytes()
    (source / "dog/a.png").write_bytes(whole[: len(whole) // 2])
    path = zip_of(source, tmp_path / "s.zip") if as_zip else source
    options = [f"--vae={vae_folder}"] if command == "encode" else ["--strict"]
    refused(capsys, [command, f"--source={path}", f"--dest={tmp_path}/d", *options], "dog/a.png", "not a readable image")
    assert not (tmp_path / "d/dataset.json").exists()


def test_encode_sizes(source, tmp_path, capsys, vae_folder):
    save(source / "ant/odd.png", picture(9, 9))
    argv = ["encode", f"--source={source}", f"--dest={tmp_path}/d", f"--vae={vae_folder}"]
    refused(capsys, argv, "ant/odd.png", "9x9", "factor 2")
    (source / "ant/odd.png").unlink()
    save(source / "zoo/odd.png", picture(8, 10))
    refused(capsys, argv, "zoo/odd.png", "10x8", "8x8")


def test_sources_without_usable_images_or_labels(source, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    refused(capsys, ["convert", f"--source={tmp_path}/empty", f"--dest={tmp_path}/d"], "--source", "no image files")
    save(source / "stray.png", picture(8, 8))
    refused(capsys, ["convert", f"--source={source}", f"--dest={tmp_path}/d"], "stray.png", "no label")
    (source / "dataset.json").write_text(json.dumps({"labels": [[name, 0] for name in SORTED]}))
    refused(capsys, ["convert", f"--source={source}", f"--dest={tmp_path}/d"], "dataset.json", "stray.png")
    (source / "dataset.json").write_text('{"labels": [["a.png"]]}')
    refused(capsys, ["convert", f"--source={source}", f"--dest={tmp_path}/d"], "dataset.json", "a.png")
    (source / "dataset.json").write_text("{")
    refused(capsys, ["convert", f"--source={source}", f"--dest={tmp_path}/d"], "dataset.json", "JSON")


def test_zip_that_leads_outside(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.writestr("../x.png", b"")
    refused(capsys, ["convert", f"--source={tmp_path}/s.zip", f"--dest={tmp_path}/d"], "s.zip", "../x.png")
    (tmp_path / "t.zip").write_bytes(b"no zip")
    refused(capsys, ["convert", f"--source={tmp_path}/t.zip", f"--dest={tmp_path}/d"], "t.zip", "zip")


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_usage_of_all(capsys, argv):
    main(argv)
    text = capsys.readouterr().out
    assert all(name in text for name in ("convert", "encode", "demo"))


def test_underscores_are_accepted(source, tmp_path):
    main(["convert", f"--source={source}", f"--dest={tmp_path}/d", "--max_images=1"])
    assert len(content(tmp_path / "d")) == 2


# ---------------------------------------------------------------------------------------------- the quick start's classifier


def test_quarters_row_by_row():
    from experiments_updated import digit_classifier

    canvases = torch.arange(2 * 3 * 64 * 64).reshape(2, 3, 64, 64)
    found = digit_classifier.quarters(canvases)
    assert found.shape == (8, 3, 32, 32)
    for i, (b, top, left) in enumerate([(b, t, x) for b in range(2) for t in (0, 32) for x in (0, 32)]):
        assert torch.equal(found[i], canvases[b, :, top : top + 32, left : left + 32])


@pytest.mark.slow
def test_classifier(tmp_path, monkeypatch):
    from experiments_updated import digit_classifier

    model = digit_classifier.load_or_train(tmp_path / "c/weights.pt")
    images, labels = digit_classifier.digit_images(held_out=True)
    found = digit_classifier.accuracy(model, images, labels)
    assert found >= 0.97
    pool, logits = digit_classifier.features(model, images[:8])
    assert logits.shape == (8, 10) and pool.shape == (8, digit_classifier.FEATURE_DIM)
    monkeypatch.setattr(digit_classifier, "train_classifier", lambda **_: pytest.fail("trained a second time"))
    monkeypatch.setenv("DIGIT_CLASSIFIER", str(tmp_path / "c/weights.pt"))
    extract = digit_classifier.factory("cpu")
    torch.testing.assert_close(extract(images[:8])["pool"], pool)
    canvases = images[:8].reshape(2, 2, 2, 3, 32, 32).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 64, 64)
    of_canvases = extract(canvases)
    torch.testing.assert_close(of_canvases["pool"], pool.reshape(2, -1))
    torch.testing.assert_close(of_canvases["logits"], logits.reshape(2, 4, 10).mean(dim=1))
    assert math.isclose(found, (model(images[:, :1].float() / 255)[1].argmax(1) == labels).float().mean().item(), abs_tol=2e-3)
    (tmp_path / "c/weights.pt").write_bytes(b"broken")
    with pytest.raises(digit_classifier.UserError, match=r"weights\.pt: holds no weights"):
        digit_classifier.load_or_train(tmp_path / "c/weights.pt")
