"""Names that come from outside (a remote index, archives, records, options) become paths inside their folder, or are refused."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import runs
import sets
import torch
from runs import make_checkpoint, make_latents, make_vae

import dataset_tools
import generate
import train
from checkpoint import reading, training_state
from common import tensor_files
from common.errors import UserError
from common.file_tree import FileTree
from common.files import check_name, file_sha256, join_inside
from data import dataset, latent_files, remote
from data.packed import PackedLatents, parse_index
from models.vae import load_vae
from sampling import image_folder

OUTSIDE = ["../x", "a/../../x", "/x", "..", "\\x", "..\\x", "a\\b", "C:x", "c:/x", "a/..", "//x"]
NOTHING = ["", ".", "/", "./", "a\0b", "\ud800", "x" * 256, "é" * 128, "/".join(["x" * 99] * 42), None, 5, ["x"], b"x"]
INSIDE = ["x", "a/b.npy", "..a", "a..", ".../x", "ab:c", "é", "x" * 255, "00000/img 1.png", "\udce9.png"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data folder of 10 latents with packed/ and its VAE."""
    folder = tmp_path_factory.mktemp("set")
    make_latents(folder, 10, make_vae(folder / "vae"))
    dataset_tools.main(["pack", f"--source={folder}/vae-sd", f"--dest={folder}/packed", "--shard-size=5"])
    return folder


@pytest.fixture(scope="module")
def ckpt(folder) -> Path:
    return make_checkpoint(folder / "0000007.pt", latent_files.LatentFiles(folder / "vae-sd").record)


def change_index(packed: Path, change) -> None:
    """change(index) → the new content of index.json, as bytes or as an object."""
    path = packed / "index.json"
    content = change(json.loads(path.read_bytes()))
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


# ------------------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize("name", OUTSIDE + NOTHING)
@pytest.mark.parametrize("plain", [True, False])
def test_refused_names(name, plain):
    with pytest.raises(UserError, match=r"^SOURCE: ") as caught:
        join_inside("folder", name, "SOURCE", plain=plain)
    assert len(str(caught.value)) < 400 and "\0" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", INSIDE)
def test_accepted_names(name, tmp_path):
    path = join_inside(tmp_path, name, "SOURCE")
    assert path == tmp_path / name and tmp_path.resolve() in path.resolve().parents
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")  # the file system agrees
    if "/" in name:
        with pytest.raises(UserError, match="name of one file"):
            check_name(name, "SOURCE", plain=True)
    else:
        assert check_name(name, "SOURCE", plain=True) == name


# ------------------------------------------------------------------------------------------------- remote packed latents


@pytest.fixture
def hostile(folder, tmp_path) -> str:
    """A remote set whose index names, with their right checksums, files that lie outside of it."""
    shutil.copytree(folder / "packed", tmp_path / "a/b/evil/packed")
    (tmp_path / "a/escape.pth").write_text("import os\n")
    (tmp_path / "a/b/evil/packed/inner.pth").write_text("import os\n")
    names = ["../../../escape.pth", str(tmp_path / "victim/absolute.pth"), "inner.pth"]
    digest = file_sha256(tmp_path / "a/escape.pth")
    # fsspec finds the absolute one below the set's own folder.
    source = tmp_path / f"a/b/evil/packed/{names[1]}"
    source.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "a/escape.pth", source)
    (tmp_path / "victim").mkdir()
    change_index(tmp_path / "a/b/evil/packed", lambda i: i | {"sha256": i["sha256"] | dict.fromkeys(names, digest)})
    return f"file://{tmp_path}/a/b/evil"


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_remote_index_writes_nothing_outside_the_cache(hostile, tmp_path, capsys):
    cache = tmp_path / "home/deep/cache"
    cache.mkdir(parents=True)
    before = files_below(tmp_path)
    argv = (
        f"--model SiT-Ti/4 --exp-name x --output-dir {tmp_path}/out --data-dir {hostile} --cache-dir {cache} --resolution 32 "
        "--num-classes 5 --batch-size 5 --max-train-steps 2 --mixed-precision no --report-to none --num-workers 0"
    ).split()
    for more in (["--plan"], []):
        try:
            train.main([*argv, *more])
            code = 0
        except SystemExit as stop:
            code = stop.code
        output = capsys.readouterr()
        assert {name for name in files_below(tmp_path) - before if not name.startswith("home/deep/cache/")} == set()
        assert code not in (0, None) and "sha256 must name labels.npy and names.npy" in output.out + output.err
        assert f"{hostile}/index.json" in output.out + output.err and "Traceback" not in output.err
    with pytest.raises(SystemExit) as stop:
        dataset_tools.main(["check", hostile, f"--cache-dir={cache}"])
    assert stop.value.code == 1
    assert "sha256 must name labels.npy and names.npy" in capsys.readouterr().out
    assert files_below(tmp_path) == before  # what is refused is not even cached


@pytest.mark.parametrize("name", ["../escape.pth", "/tmp/escape.pth", "sub/inner.npy", ".."])
def test_a_remote_file_is_copied_into_the_cache_alone(folder, tmp_path, monkeypatch, name):
    """Whoever asks for it: the copy has a check of its own."""
    source = remote._Source(f"file://{folder}")
    monkeypatch.setattr(source.files, "get_file", lambda *_: pytest.fail("copied"))
    (tmp_path / "cache/sub").mkdir(parents=True)
    before = files_below(tmp_path)
    with pytest.raises(UserError, match=r"index\.json"):
        source.copy(name, "0" * 64, tmp_path / "cache")
    assert files_below(tmp_path) == before


def test_a_local_index_reads_nothing_outside_either(folder, tmp_path, capsys):
    (tmp_path / "secret").write_text("x")
    shutil.copytree(folder / "packed", tmp_path / "set/packed")
    change_index(tmp_path / "set/packed", lambda i: i | {"sha256": i["sha256"] | {"../../secret": "0" * 64}})
    with pytest.raises(SystemExit):
        dataset_tools.main(["check", str(tmp_path / "set")])
    assert "sha256 must name" in capsys.readouterr().out


def test_remote_data_still_work(folder, tmp_path):
    found = dataset.LatentDataset(f"file://{folder}", cache_dir=str(tmp_path))
    for a, b in zip(found, dataset.LatentDataset(folder), strict=True):
        assert torch.equal(a["moments"], b["moments"]) and a["label"] == b["label"]


def set_count(index: dict, value: object) -> dict:
    index["shards"][0]["count"] = value
    return index


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda i: b"[" * 100_000, "not valid JSON"),
        (lambda i: b'{"format": "\xff\xfe"}', "not valid JSON"),
        (lambda i: b'{"format": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (lambda i: [1], "not an index"),
        (lambda i: None, "not an index"),
        (lambda i: {"format": 1}, "not an index"),
        (lambda i: i | {"format": 9}, "format 9"),
        (lambda i: i | {"sha256": []}, "not an index"),
        (lambda i: i | {"sha256": {"names.npy": i["sha256"]["names.npy"]}}, "labels.npy"),
        (lambda i: i | {"sha256": {"labels.npy": i["sha256"]["labels.npy"]}}, "names.npy"),
        (lambda i: i | {"labelled": False}, "no other file"),
        (lambda i: i | {"labelled": 1}, "labelled"),
        (lambda i: i | {"sha256": dict.fromkeys(i["sha256"], "../x")}, "hexadecimal"),
        (lambda i: i | {"sha256": dict.fromkeys(i["sha256"], 5)}, "not an index"),
        (lambda i: i | {"shards": []}, "shards"),
        (lambda i: i | {"shards": {"file": 1}}, "not an index"),
        (lambda i: i | {"shards": i["shards"][::-1]}, "shards"),
        (lambda i: i | {"shape": [8, 8]}, "shape"),
        (lambda i: i | {"shape": [8, -8, 8]}, "shape"),
        (lambda i: i | {"shape": [8, 8.0, 8]}, "shape"),
        (lambda i: i | {"shape": 8}, "not an index"),
        (lambda i: i | {"dtype": None}, "dtype"),
        (lambda i: i | {"dtype": "f4,f4"}, "dtype"),
        (lambda i: i | {"dtype": "float77"}, "not an index"),
        (lambda i: json.dumps(set_count(i, 5)).replace('"count": 5', '"count": 1e400').encode(), "each count"),
        (lambda i: set_count(i, 10**400), "each count"),
        (lambda i: set_count(i, 2**62), "each count"),
        (lambda i: set_count(i, True), "each count"),
        (lambda i: set_count(i, "5"), "each count"),
        (lambda i: set_count(i, 0), "each count"),
        (lambda i: i | {"vae": i["vae"] | {"scaling_factor": 10**400}}, "scaling_factor"),
        (lambda i: i | {"vae": None}, "vae"),
    ],
)
def test_a_broken_index_is_one_line(folder, tmp_path, change, culprit):
    shutil.copytree(folder / "packed", tmp_path / "p")
    change_index(tmp_path / "p", change)
    for open_set in (PackedLatents, lambda path: dataset.LatentDataset(f"file://{path}", cache_dir=f"{tmp_path}/cache")):
        with pytest.raises(UserError) as caught:
            open_set(tmp_path / "p")
        assert "index.json" in str(caught.value) and culprit in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("names", [[b"../../x1"], [b"/x1"], [b"a\\1"], [b""]])
def test_names_that_pair_latents_with_images(folder, tmp_path, names):
    shutil.copytree(folder / "packed", tmp_path / "packed")
    for i in range(10):
        sets.save(tmp_path / f"images/00000/img{i:08d}.png", sets.picture(32, 32))
    packed = [latents.name(i) for latents in [PackedLatents(folder / "packed")] for i in range(10)]
    assert len(dataset.LatentDataset(tmp_path, images=True)) == 10
    np.save(tmp_path / "packed/names.npy", np.array([*names, *(name.encode() for name in packed[1:])]))
    with pytest.raises(UserError, match=r"names\.npy: refused"):
        dataset.LatentDataset(tmp_path, images=True)


@pytest.mark.parametrize("names", [np.arange(10), np.array(["a"] * 10)])
def test_names_must_be_bytes(folder, tmp_path, names):
    shutil.copytree(folder / "packed", tmp_path / "packed")
    np.save(tmp_path / "packed/names.npy", names)
    with pytest.raises(UserError, match=r"names\.npy: holds"):
        PackedLatents(tmp_path / "packed")


def test_packed_files_with_a_broken_header(folder, tmp_path):
    for file, content in (
        ("labels.npy", b"\x93NUMPY\x01\x00\x10\x00" + b"{'descr': '''  \n\n" + bytes(99)),
        ("labels.npy", b"PK\x03\x04" + bytes(99)),
        ("names.npy", b"\x93NUMPY\x01\x00\x10\x00" + b"\xff" * 120),
    ):
        shutil.copytree(folder / "packed", tmp_path / "p", dirs_exist_ok=True)
        (tmp_path / "p" / file).write_bytes(content)
        with pytest.raises(UserError, match=rf"{file}: missing, truncated or not an npy file"):
            PackedLatents(tmp_path / "p")
    np.savez(tmp_path / "p/z", np.zeros(10))
    (tmp_path / "p/z.npz").replace(tmp_path / "p/labels.npy")
    shutil.copy(folder / "packed/names.npy", tmp_path / "p")
    with pytest.raises(UserError, match=r"labels\.npy: not an npy file"):
        PackedLatents(tmp_path / "p")


def test_an_index_is_that_of_the_writer(folder):
    """What `pack` writes is accepted, labelled or not."""
    content = (folder / "packed/index.json").read_bytes()
    index = parse_index(content, "index.json")
    del index["sha256"]["labels.npy"]
    assert parse_index(json.dumps(index | {"labelled": False}).encode(), "index.json")["labelled"] is False


# ------------------------------------------------------------------------------------------------------ folders and zips


@pytest.mark.parametrize("name", ["../x.png", "a\\b.png", "x" * 300 + ".png", "a/" * 3000 + "x.png", "../"])
def test_names_in_a_zip(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("a.png", b"")
        archive.writestr(zipfile.ZipInfo(name), b"")
    with pytest.raises(UserError, match=r"z\.zip: refused") as caught:
        FileTree(tmp_path / "z.zip")
    assert len(str(caught.value)) < 400


def test_a_zip_with_folders_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for name in ("./", "./a.png", "b/", "b/c..d.png"):
            archive.writestr(zipfile.ZipInfo(name), b"x")
    assert FileTree(tmp_path / "z.zip").names() == ["./a.png", "b/c..d.png"]


@pytest.mark.parametrize(
    ("of_local", "of_central", "value", "culprit"),  # offsets in the two headers of the member, and what is written there
    [
        (None, 46, b"\xff\xff", "neither a folder nor a readable zip"),  # a name that is no UTF-8
        (None, 6, b"\xff\0", "neither a folder nor a readable zip"),  # a version that nobody knows
        (6, 8, b"\1\x08", "cannot be read"),  # encrypted
        (8, 10, b"\x63\0", "cannot be read"),  # an unknown method
        (36, None, b"\xff" * 8, "cannot be read"),  # damaged content
    ],
)
def test_a_zip_that_cannot_be_read_is_one_line(tmp_path, of_local, of_central, value, culprit):
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("é.png", b"x" * 999)
    content = bytearray((tmp_path / "z.zip").read_bytes())
    for header, offset in ((0, of_local), (content.index(b"PK\1\2"), of_central)):
        if offset is not None:
            content[header + offset : header + offset + len(value)] = value
    (tmp_path / "z.zip").write_bytes(content)
    with pytest.raises(UserError, match=culprit):
        FileTree(tmp_path / "z.zip").read("é.png")


@pytest.mark.parametrize("name", ["../00000/img-mean-std-00000000.npy", "/etc/passwd0", "..\\x0", "a\0b0", "\ud800", "C:0", ""])
def test_names_in_dataset_json(folder, tmp_path, name):
    shutil.copytree(folder / "vae-sd", tmp_path / "vae-sd")
    path = tmp_path / "vae-sd/dataset.json"
    labels = json.loads(path.read_text())["labels"]
    path.write_text(json.dumps({"labels": [[name, 0], *labels[1:]]}))
    with pytest.raises(UserError, match=r"dataset\.json: refused"):
        dataset.LatentDataset(tmp_path)


def test_json_nested_deeply_is_one_line(folder, tmp_path):
    shutil.copytree(folder / "vae-sd", tmp_path / "vae-sd")
    for file in ("dataset.json", "vae.json"):
        before = (tmp_path / "vae-sd" / file).read_bytes()
        (tmp_path / "vae-sd" / file).write_bytes(b"[" * 100_000)
        with pytest.raises(UserError, match=f"{file}: not valid JSON"):
            dataset.LatentDataset(tmp_path)
        (tmp_path / "vae-sd" / file).write_bytes(before)
    (tmp_path / "latent_stats.json").write_bytes(b"[" * 100_000)
    with pytest.raises(UserError, match=r"latent_stats\.json"):
        dataset.normalised_record(tmp_path, dataset.open_latents(tmp_path))


@pytest.mark.parametrize("member", [b"../../evil.png", b"/evil.png", b"\xff\xff.png"])
def test_a_stopped_zip_is_continued_with_its_own_members_alone(tmp_path, capsys, member):
    source = tmp_path / "source"
    sets.save(source / "a.png", sets.picture(32, 32))
    with zipfile.ZipFile(tmp_path / "i.zip.tmp", "w") as archive:
        archive.writestr("x" * len(member), (source / "a.png").read_bytes())
    content = (tmp_path / "i.zip.tmp").read_bytes().replace(b"x" * len(member), member)
    (tmp_path / "i.zip.tmp").write_bytes(content)
    argv = ["convert", f"--source={source}", f"--dest={tmp_path}/i.zip", "--transform=center-crop", "--resolution=32x32"]
    for _ in range(2):  # the lock is given back
        sets.refused(capsys, argv, "i.zip.tmp", "no part of this run")
    assert (tmp_path / "i.zip.tmp").read_bytes() == content and not (tmp_path / "i.zip").exists()


@pytest.mark.parametrize("content", [b"5", b"null", b"[]", b'"x"', b"[" * 100_000, b"\xff"])
def test_a_record_of_an_unfinished_set_that_is_none(tmp_path, content):
    source = tmp_path / "source"
    sets.save(source / "a.png", sets.picture(32, 32))
    (tmp_path / "d").mkdir()
    shutil.copytree(source, tmp_path / "d/00000")
    (tmp_path / "d/00000/a.png").rename(tmp_path / "d/00000/img00000000.png")
    (tmp_path / "d/unfinished.json").write_bytes(content)
    made = sets.convert(source, tmp_path / "d", "--transform=center-crop", "--resolution=32x32")
    assert sorted(made) == ["00000/img00000000.png", "dataset.json"]


# ------------------------------------------------------------------------------------- the folders of runs and of images


@pytest.mark.parametrize("name", ["..", ".", "/x", "a/b", "a\\b", "x" * 256, "a\0b"])
def test_the_name_of_a_run(folder, tmp_path, capsys, name):
    argv = ["--model", "SiT-Ti/4", "--exp-name", name, "--output-dir", tmp_path / "out/runs", "--data-dir", folder]
    argv += ["--resolution", 32, "--num-classes", 5, "--batch-size", 5, "--max-train-steps", 1, "--sampling-steps", 0]
    for more in (["--plan"], ["--mixed-precision", "no", "--report-to", "none", "--num-workers", "0"]):
        assert "error: --exp-name: " in runs.refused(train.main, capsys, [*argv, *more])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["..", "a/b", "x" * 256])
def test_the_name_of_a_set_of_images(ckpt, tmp_path, capsys, name):
    argv = ["--ckpt", ckpt, "--sample-dir", tmp_path / "out/samples", "--num-fid-samples", 1, "--num-steps", 1]
    assert "error: --exp-name: " in runs.refused(generate.main, capsys, [*argv, "--exp-name", name])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["..", "/x", "a/b", ["x"]])
def test_the_name_of_a_run_that_a_checkpoint_records(ckpt, tmp_path, capsys, name):
    state = tensor_files.load(ckpt)
    training_state.save(tmp_path / "c.pt", state | {"config": state["config"] | {"exp_name": name}})
    before = files_below(tmp_path)
    argv = ["--ckpt", tmp_path / "c.pt", "--sample-dir", tmp_path / "out/samples", "--num-fid-samples", 1, "--num-steps", 1]
    assert f"error: {tmp_path}/c.pt: exp_name" in runs.refused(generate.main, capsys, argv)
    assert files_below(tmp_path) == before


def test_the_name_of_weights_that_a_checkpoint_records(ckpt, tmp_path, capsys):
    state = tensor_files.load(ckpt)
    training_state.save(tmp_path / "c.pt", state | {"ema": {"/../../../x": state["ema"]["0.9999"]}})
    argv = [
        "--ckpt",
        tmp_path / "c.pt",
        "--weights",
        "ema:/../../../x",
        "--sample-dir",
        tmp_path / "out",
        "--num-fid-samples",
        1,
    ]
    assert "leads outside" in runs.refused(generate.main, capsys, argv)
    assert not (tmp_path / "out").exists() and not (tmp_path.parent / "x").exists()


def test_a_folder_name_that_leaves_no_room_for_the_files_beside_it(ckpt, tmp_path, capsys):
    long = tmp_path / ("x" * 216 + ".pt")
    shutil.copy(ckpt, long)
    argv = ["--ckpt", long, "--sample-dir", tmp_path / "out", "--num-fid-samples", 1, "--num-steps", 1]
    assert "is too long" in runs.refused(generate.main, capsys, argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"5", b"null", b"[]", b"[" * 100_000, b"\xff"])
def test_a_record_of_images_that_is_none(tmp_path, content):
    config = generate.GenerateConfig(ckpt="c.pt", model="ELIT-SiT-Ti/2", exp_name="x", sample_dir=str(tmp_path))
    folder = image_folder.images_folder(config)
    image_folder.open_folder(folder, config, {"ckpt_step": 7}, image_folder.npz_writer(config), alone=False)
    (folder / "000000.png").write_bytes(b"")
    folder.with_name(folder.name + ".json").write_bytes(content)
    with pytest.raises(UserError, match=r"\.json: not "):
        image_folder.open_folder(folder, config, {"ckpt_step": 7}, image_folder.npz_writer(config), alone=False)


# ------------------------------------------------------------------------------------------------------------- the hub


@pytest.mark.parametrize(
    "path", ["o/r/../x.pt", "o/r/a/../../../x.pt", "../r/x.pt", "o/../x.pt", "o/r//x.pt", "o/r/a\\x.pt", "o/r/" + "x" * 300]
)
def test_files_on_the_hub(monkeypatch, capsys, path):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"^hf://"):
        reading.local_file(f"hf://{path}")
    assert "error: hf://" in runs.refused(generate.main, capsys, ["--ckpt", f"hf://{path}"])


def test_a_file_on_the_hub_is_still_fetched(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args: asked.append(args) or tmp_path / "x")
    assert reading.local_file("hf://o-1/r.2/a/b.safetensors") == tmp_path / "x"
    assert asked == [("o-1/r.2", "a/b.safetensors")]


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "a\0b", "../../nowhere/x", "o/../r"])
def test_the_name_of_a_vae(name, monkeypatch):
    """A data set's record may hold any; an honest one may be a path anywhere."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="--vae"):
        load_vae(name)
