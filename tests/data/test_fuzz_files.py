"""Damaged files of every format that is read: truncated, flipped, spliced, with odd values. Each is read, or refused by UserError."""

import argparse
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from common import tensor_files
from common.errors import UserError
from common.file_tree import FileTree
from common.image_files import png_bytes, png_pixels, read_image
from config.options import TrainConfig
from config.parsing import parse
from data.dataset import LatentDataset, normalised_record
from metrics.images import open_images, write_npz
from models.vae import VAERecord
from preprocessing.pack import pack
from preprocessing.unfinished import UNFINISHED_FILE, Unfinished

pytestmark = pytest.mark.slow

EXAMPLES = 120  # of each file
COUNT, SHAPE = 5, (6, 4, 4)

# Derandomized: the same files each time. No shrinking: the message names the file, which is kept.
fuzz = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def npz_bytes(kind: int, path: Path, **arrays: np.ndarray) -> None:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, array in arrays.items():
            archive.writestr(f"{name}.npy", tensor_files.npy_bytes(array))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """One of each format."""
    root = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(0)
    folder = root / "data/vae-sd/00000"
    folder.mkdir(parents=True)
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(COUNT)]
    for name in names:
        np.save(root / "data/vae-sd" / name, rng.random(SHAPE, np.float32))
    labels = [[name, i % 3] for i, name in enumerate(names)]
    (root / "data/vae-sd/dataset.json").write_text(json.dumps({"labels": labels}))
    record = VAERecord("some/vae", None, 2, 3, 0.5, 0.1)
    (root / "data/vae-sd/vae.json").write_text(json.dumps(record.to_dict()))
    stats = {"count": COUNT, "mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]}
    (root / "data/latent_stats.json").write_text(json.dumps(stats))
    (root / "packed").mkdir()
    pack(argparse.Namespace(source=str(root / "data/vae-sd"), dest=str(root / "packed/packed"), dtype="same", shard_size=3, workers=1))  # fmt: skip
    for kind, method in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        (root / kind).mkdir()
        with zipfile.ZipFile(root / kind / "vae-sd.zip", "w", method) as archive:
            for path in sorted((root / "data/vae-sd").rglob("*.*")):
                archive.write(path, path.relative_to(root / "data/vae-sd").as_posix())
    pictures = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    write_npz(root / "stored.npz", pictures.shape, iter(pictures))
    npz_bytes(zipfile.ZIP_DEFLATED, root / "deflated.npz", arr_0=pictures, mu=rng.random(4), sigma=np.eye(4))
    image = Image.fromarray(pictures[0]).resize((16, 16))
    for suffix in ("png", "jpg", "tif", "gif", "webp", "bmp", "ppm"):
        image.save(root / f"image.{suffix}")
    (root / "plain.png").write_bytes(png_bytes(pictures[0]))
    state = {"model": {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(2)}, "step": 5, "config": {"model": "x"}}
    torch.save(state, root / "zip.pt")
    torch.save(state, root / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state["model"], root / "weights.safetensors", {"config": '{"model": "x"}', "step": "5"})
    (root / "options.yaml").write_text(
        yaml.safe_dump({"model": "SiT-XL/2", "batch_size": 8, "ema_decay": [0.9, 0.99], "val_data_dir": None})
    )
    (root / UNFINISHED_FILE).write_text(json.dumps({"command": "convert", "source": "/a", "resolution": "8x8"}))
    return root


def read_latents(folder: Path) -> None:
    dataset = LatentDataset(folder)
    dataset.check(num_classes=3, resolution=8)
    for index in range(len(dataset)):
        dataset[index]
        dataset.latents.name(index)
        dataset.latents.where(index)


def read_images(path: Path) -> None:
    images = open_images(path)
    images.check()
    images.sha256()
    for start in range(0, images.count, 4):
        images.read(range(start, min(start + 4, images.count)))


def read_one_image(path: Path) -> None:
    read_image(FileTree(path.parent), path.name)


def read_png(path: Path) -> None:
    try:
        png_pixels(path.read_bytes())
    except ValueError as error:  # what `png_pixels` promises
        raise UserError(str(error)) from None


def read_channels(folder: Path) -> None:
    class Latents:
        record, shape = VAERecord("some/vae", None, 2, 3, 0.5, 0.1), SHAPE

        def __len__(self) -> int:
            return COUNT

    normalised_record(folder, Latents())


def read_unfinished(path: Path) -> None:
    making = {"command": "convert", "source": "/a", "resolution": "8x8"}
    Unfinished(path, making, path.parent, is_begun=True).release(remove=False)


# The file that is damaged → how what it belongs to is read; the path that the reader takes, relative to `whole`.
READERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "data/vae-sd/00000/img-mean-std-00000001.npy": (read_latents, "data"),
    "data/vae-sd/dataset.json": (read_latents, "data"),
    "data/vae-sd/vae.json": (read_latents, "data"),
    "data/latent_stats.json": (read_channels, "data"),
    "stored/vae-sd.zip": (read_latents, "stored"),
    "deflated/vae-sd.zip": (read_latents, "deflated"),
    "packed/packed/index.json": (read_latents, "packed"),
    "packed/packed/latents-00000.npy": (read_latents, "packed"),
    "packed/packed/labels.npy": (read_latents, "packed"),
    "packed/packed/names.npy": (read_latents, "packed"),
    "stored.npz": (read_images, "stored.npz"),
    "deflated.npz": (read_images, "deflated.npz"),
    **{f"image.{s}": (read_one_image, f"image.{s}") for s in ("png", "jpg", "tif", "gif", "webp", "bmp", "ppm")},
    "plain.png": (read_png, "plain.png"),
    "zip.pt": (tensor_files.load, "zip.pt"),
    "legacy.pt": (tensor_files.load, "legacy.pt"),
    "weights.safetensors": (tensor_files.load_safetensors, "weights.safetensors"),
    "options.yaml": (lambda path: parse(TrainConfig, ["--config", str(path)], prog="train.py"), "options.yaml"),
    UNFINISHED_FILE: (read_unfinished, UNFINISHED_FILE),
}


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` after one to three of: cut, some bytes changed, a part copied over or into another, a part removed."""
    for _ in range(draw(st.integers(1, 3))):
        if not content:
            break
        last = len(content) - 1
        # Headers and directories lie at the ends, so that these are met more often than the bulk.
        place = draw(st.one_of(st.integers(0, min(last, 160)), st.integers(max(0, last - 160), last), st.integers(0, last)))
        size = draw(st.integers(1, 24))
        match draw(st.sampled_from(["cut", "flip", "bytes", "copy", "insert", "remove"])):
            case "cut":
                content = content[:place]
            case "flip":
                content = content[:place] + bytes([content[place] ^ 1 << draw(st.integers(0, 7))]) + content[place + 1 :]
            case "bytes":
                content = content[:place] + draw(st.binary(min_size=1, max_size=size)) + content[place + size :]
            case "copy":
                source = draw(st.integers(0, last))
                content = content[:place] + content[source : source + size] + content[place + size :]
            case "insert":
                source = draw(st.integers(0, last))
                content = content[:place] + content[source : source + size] + content[place:]
            case "remove":
                content = content[:place] + content[place + size :]
    return content


ODD = [
    None,
    True,
    -1,
    0,
    5,
    2**31,
    10**30,
    10**400,
    1e308,
    -0.5,
    "",
    "x",
    "\ud800",
    "a/../b",
    "²",
    "x" * 5000,
    [],
    {},
    [[]],
    [None],
]


@st.composite
def odd_json(draw: st.DrawFn, content: bytes) -> bytes:
    """The JSON file with one value replaced by another one, left out, or nested deeply."""
    value = json.loads(content)

    def change(node: Any) -> Any:
        inside = [k for k in (node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else [])]
        if inside and draw(st.integers(0, 4)):
            key = draw(st.sampled_from(inside))
            node[key] = change(node[key])
            return node
        if isinstance(node, dict) and draw(st.booleans()):
            node.pop(draw(st.sampled_from(sorted(node))), None)
            return node
        return draw(st.sampled_from(ODD))

    text = json.dumps(change(value))
    return (text if draw(st.integers(0, 20)) else "[" * 100_000).encode()


def check(whole: Path, tmp_path: Path, name: str, damage: Callable[[bytes], st.SearchStrategy[bytes]]) -> None:
    read, where = READERS[name]
    root = tmp_path / "copy"
    if (whole / where).is_dir():
        shutil.copytree(whole / where, root / where)
    else:
        root.mkdir()
    content = (whole / name).read_bytes()
    outcomes = {"read": 0, "refused": 0}

    @fuzz
    @given(damage(content))
    def run(bad: bytes) -> None:
        (root / name).write_bytes(bad)
        try:
            read(root / where)
            outcomes["read"] += 1
        except UserError as error:
            assert str(error).strip()
            outcomes["refused"] += 1

    (root / name).write_bytes(content)
    read(root / where)  # undamaged
    run()
    assert outcomes["refused"] > 0, outcomes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes(whole, tmp_path, name):
    check(whole, tmp_path, name, damaged)


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".json") and name != UNFINISHED_FILE])
def test_odd_values(whole, tmp_path, name):
    check(whole, tmp_path, name, odd_json)
