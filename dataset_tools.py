"""Makes training data: `convert` (any images → numbered PNGs), `encode` (→ VAE latents), `demo` (the quick start's digits).
`reference`: images → a reference batch for `evaluate.py`.

    python dataset_tools.py convert --source=ImageNet/train --dest=DATA_DIR/images --resolution=256x256 \\
        --transform=center-crop-dhariwal
    python dataset_tools.py encode --source=DATA_DIR/images --dest=DATA_DIR/vae-sd

A command that was stopped is continued by giving it again: complete files are kept. dataset.json is written last, so that a
data set which has one is whole.
"""

import io
import itertools
import json
import re
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
from config import ConvertConfig, DemoConfig, EncodeConfig, ReferenceConfig, parse, require
from errors import UserError, command, nearest
from vae import encode_moments, load_vae

UNFINISHED_FILE = "unfinished.json"  # in a folder while a command fills it: what is being made there
DECODE_THREADS = 4
DEMO_CANVASES_PER_CLASS = {"train": 500, "val": 50}

T = TypeVar("T")
R = TypeVar("R")

# ------------------------------------------------------------------------------------------------------------ commands


@command
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        for name, (config, _) in COMMANDS.items():
            print(f"{name}: {(config.__doc__ or '').partition(': ')[2]} Options: dataset_tools.py {name} -h")
        return
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}; commands are {', '.join(COMMANDS)}")
    cls, run = COMMANDS[argv[0]]
    config, _ = parse(cls, argv[1:], prog=f"dataset_tools.py {argv[0]}")
    require(config)
    run(config)


def convert(config: ConvertConfig) -> None:
    """Any images → `00000/img00000000.png` …: square RGB PNGs of one size, numbered by their place in the sorted source."""
    transform = make_transform(config.transform, parse_resolution(config.resolution))
    source = open_source(config.source, config.dest)
    names, labels = list_images(source, config.max_images)
    targets = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(names))]
    making = {
        "command": "convert",
        "source": str(source.path.resolve()),
        "transform": config.transform,
        "resolution": config.resolution,
    }

    side: int | None = None

    def check_size(name: str, image: np.ndarray) -> None:
        nonlocal side
        height, width = image.shape[:2]
        if height != width:
            raise UserError(f"{name}: the result has {width}x{height} pixels, not a square; give --transform and --resolution")
        if width & (width - 1):
            raise UserError(f"{name}: the result is {width} pixels wide, not a power of two; give --transform and --resolution")
        if side not in (None, width):
            raise UserError(f"{name}: the result is {width} pixels wide, others {side}; give --transform and --resolution")
        side = width

    written: list[str] = []
    with create(config.dest, making, targets, png_pixels) as dest:
        for name, target in zip(tqdm(names, unit="image", desc="convert"), targets, strict=True):
            if (image := dest.existing(target)) is None:
                image = transform(data.read_image(source, name))
                if image is None:  # too small for center-crop-wide: left out, the number used up
                    continue
                check_size(source.where(name), image)
                dest.write(target, png_bytes(image))
            else:
                check_size(str(dest.path / target), image)
            written.append(target)
        if not written:
            raise UserError(f"--source {config.source}: no image is large enough for {config.transform} at {config.resolution}")
        dest.finish(label_file(written, None if labels is None else dict(zip(targets, labels, strict=True))))
    print(f"{config.dest}: {len(written)} images of {side}x{side}, {'unlabelled' if labels is None else 'labelled'}")


def encode(config: EncodeConfig) -> None:
    """Images → `00000/img-mean-std-00000000.npy` …: float32 (2C, h, w), mean and std of the VAE's posterior."""
    source = open_source(config.source, config.dest)
    names, labels = list_images(source, config.max_images)
    numbers = image_numbers(names)
    targets = [f"{i // 1000:05d}/img-mean-std-{i:08d}.npy" for i in numbers]
    first = data.read_image(source, names[0]).shape  # (H, W, 3)
    making = {"command": "encode", "source": str(source.path.resolve()), "vae": config.vae}

    def read(item: tuple[str, str]) -> tuple[str, np.ndarray]:
        name, target = item
        image = data.read_image(source, name)
        if image.shape != first:
            raise UserError(
                f"{source.where(name)}: has {image.shape[1]}x{image.shape[0]} pixels, but {names[0]} {first[1]}x{first[0]}; "
                "`dataset_tools.py convert` makes them one size"
            )
        return target, image

    with create(config.dest, making, targets, npy_array) as dest:
        torch.backends.cudnn.allow_tf32 = False  # the latents are promised in float32
        vae, record = load_vae(config.vae, "cuda" if torch.cuda.is_available() else "cpu")
        factor = record.downsample_factor
        if first[0] % factor or first[1] % factor:
            raise UserError(
                f"{source.where(names[0])}: has {first[1]}x{first[0]} pixels, not divisible by the VAE's factor {factor}"
            )
        shape = (2 * record.latent_channels, first[0] // factor, first[1] // factor)

        def is_there(target: str) -> bool:
            array = dest.existing(target)
            return array is not None and array.shape == shape

        missing = [(name, target) for name, target in zip(names, targets, strict=True) if not is_there(target)]
        bar = tqdm(total=len(names), initial=len(names) - len(missing), unit="image", desc="encode")
        with bar, ThreadPoolExecutor(DECODE_THREADS) as threads:
            decoded = prefetch(threads, read, missing, ahead=2 * config.batch_size)
            while batch := list(itertools.islice(decoded, config.batch_size)):
                images = torch.from_numpy(np.stack([image for _, image in batch])).permute(0, 3, 1, 2)  # (B, 3, H, W)
                moments = encode_moments(vae, images).cpu().numpy()  # (B, 2C, h, w)
                for (target, _), values in zip(batch, moments, strict=True):
                    dest.write(target, npy_bytes(values))
                bar.update(len(batch))
        dest.write(data.VAE_FILE, json.dumps(record.to_dict(), indent=2).encode())
        dest.finish(label_file(targets, None if labels is None else dict(zip(targets, labels, strict=True))))
    print(f"{config.dest}: {len(names)} latents of {'x'.join(map(str, shape))} by {record.vae}")


def demo(config: DemoConfig) -> None:
    """Digit canvases in class folders: `train/<digit>/00000.png` … and `val/…`, grey, 64×64, four handwritings each."""
    targets = [
        f"{split}/{digit}/{i:05d}.png" for split, n in DEMO_CANVASES_PER_CLASS.items() for digit in range(10) for i in range(n)
    ]
    with create(config.dest, {"command": "demo"}, targets, png_pixels) as dest:
        bar = tqdm(total=len(targets), unit="image", desc="demo")
        with bar:
            for split, per_class in DEMO_CANVASES_PER_CLASS.items():
                for digit, number, canvas in data.demo_canvases(split == "val", per_class):
                    target = f"{split}/{digit}/{number:05d}.png"
                    if dest.existing(target) is None:
                        dest.write(target, png_bytes(canvas))
                    bar.update()
        dest.finish({})


def reference(config: ReferenceConfig) -> None:
    """Images of one size → a reference batch for evaluation; under torchrun, too."""
    from metrics.evaluation import start_processes
    from metrics.reference import make_reference

    state = start_processes()
    make_reference(
        config, state, lambda text: state.is_main_process and print(f"dataset_tools.py: warning: {text}", file=sys.stderr)
    )
    state.destroy_process_group()


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "convert": (ConvertConfig, convert),
    "encode": (EncodeConfig, encode),
    "demo": (DemoConfig, demo),
    "reference": (ReferenceConfig, reference),
}

# ---------------------------------------------------------------------------------------------------------- transforms

Transform = Callable[[np.ndarray], np.ndarray | None]  # uint8 (h, w, 3) → uint8 (H, W, 3), or None: left out


def parse_resolution(text: str | None) -> tuple[int, int] | None:
    """`256x256` → (width, height)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)[xX](\d+)", text.strip())
    if not match or 0 in (size := (int(match[1]), int(match[2]))):
        raise UserError(f"--resolution {text}: must be WIDTHxHEIGHT in pixels, e.g. 256x256")
    return size


def make_transform(name: str, size: tuple[int, int] | None) -> Transform:
    """The transform `name` to `size` = (width, height); `UserError` for a size that it cannot make square, of a power of two."""
    if size is None:
        if name != "none":
            raise UserError(f"--transform {name}: needs --resolution, e.g. 256x256")
        return lambda image: image
    width, height = size
    if width & (width - 1):
        raise UserError(f"--resolution {width}x{height}: the width must be a power of two")
    if name == "center-crop-wide":
        if height > width:
            raise UserError(f"--resolution {width}x{height}: center-crop-wide needs a height of at most the width")
        return lambda image: center_crop_wide(image, width, height)
    if width != height:
        raise UserError(f"--resolution {width}x{height}: must be square (only center-crop-wide pads to a square)")
    if name == "center-crop-dhariwal":
        return lambda image: center_crop_dhariwal(image, width)
    if name == "center-crop":
        return lambda image: center_crop(image, width, height)
    return lambda image: resize(image, width, height)


def resize(image: np.ndarray, width: int, height: int, filter: Image.Resampling = Image.Resampling.LANCZOS) -> np.ndarray:
    """uint8 (h, w, 3) → (height, width, 3); an image of that size already stays as it is."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), filter))


def center_crop(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """The largest central square, Lanczos to width × height."""
    h, w = image.shape[:2]
    c = min(h, w)
    return resize(image[(h - c) // 2 : (h + c) // 2, (w - c) // 2 : (w + c) // 2], width, height)


def center_crop_wide(image: np.ndarray, width: int, height: int) -> np.ndarray | None:
    """Cropped above and below to width : height, Lanczos, on a black square of side `width`; None where it is too small."""
    h, w = image.shape[:2]
    crop = round(width * h / w)
    if w < width or crop < height:
        return None
    canvas = np.zeros((width, width, 3), dtype=np.uint8)
    top = (width - height) // 2
    canvas[top : top + height] = resize(image[(h - crop) // 2 : (h + crop) // 2], width, height)
    return canvas


def center_crop_dhariwal(image: np.ndarray, side: int) -> np.ndarray:
    """ADM's crop: halved by a box filter while at least twice too large, bicubic to a short side of `side`, central square."""
    while min(image.shape[:2]) >= 2 * side:
        image = resize(image, image.shape[1] // 2, image.shape[0] // 2, Image.Resampling.BOX)
    h, w = image.shape[:2]
    short = min(h, w)
    image = resize(image, round(w * side / short), round(h * side / short), Image.Resampling.BICUBIC)
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


# -------------------------------------------------------------------------------------------------------------- source


def open_source(source: str, dest: str) -> data.FileTree:
    """The source's files; `UserError` if there is no such source, or if the destination would lie inside it."""
    if not Path(source).exists():
        raise UserError(f"--source {source}: no such folder or zip file")
    files = data.FileTree(source)
    here, there = Path(source).resolve(), Path(dest).resolve()
    if here == there or (here.is_dir() and here in there.parents):
        raise UserError(f"--dest {dest}: lies inside --source {source}; its files would be taken for the source's")
    return files


def list_images(source: data.FileTree, max_images: int | None) -> tuple[list[str], list[int] | None]:
    """The names of the first `max_images` images of a source, sorted, and their labels (None: unlabelled).

    Labels come from dataset.json; only where there is none, from the sorted names of at least two top-level folders.
    """
    files = source.names()
    names = data.image_names(files)
    if not names:
        raise UserError(f"--source {source.path}: holds no image files")
    others = set(files) - set(names)
    if UNFINISHED_FILE in others:
        raise UserError(f"--source {source.path}: the command that makes it was stopped; continue it first")
    chosen = names[:max_images]
    if data.LABEL_FILE in others:
        of_name = data.read_labels(source)
        if of_name is None:
            return chosen, None
        for name in chosen:
            if name not in of_name:
                raise UserError(f"{source.where(data.LABEL_FILE)}: has no label for {name}")
        return chosen, [of_name[name] for name in chosen]
    folders = sorted({name.partition("/")[0] for name in names if "/" in name})
    if len(folders) < 2:
        return chosen, None
    classes = {folder: label for label, folder in enumerate(folders)}
    for name in names:
        if "/" not in name:
            raise UserError(
                f"{source.where(name)}: lies beside the class folders {folders[0]}, {folders[1]} …, so it has no label"
            )
    return chosen, [classes[name.partition("/")[0]] for name in chosen]


def image_numbers(names: list[str]) -> list[int]:
    """The number of each image: that in its name for a converted set, which may have gaps, else its place."""
    matches = [re.fullmatch(r"(\d{5})/img(\d{8})\.png", name) for name in names]
    if all(m and int(m[1]) == int(m[2]) // 1000 for m in matches):
        return [int(m[2]) for m in matches if m]
    return list(range(len(names)))


# --------------------------------------------------------------------------------------------------------- destination


class FolderDest:
    """A folder that is filled file by file, each written aside and renamed. A stopped run is continued.

    `targets`: every file that this run may write; `making`: what is made, so that nothing else is continued; `decode`:
    bytes of a complete file → its content (raises ValueError on others).
    """

    def __init__(self, path: Path, making: dict[str, Any], targets: list[str], decode: Callable[[bytes], np.ndarray]):
        self.path, self._decode = path, decode
        self._present = self._check_can_continue(making, set(targets))
        self._is_new = not path.exists()
        self._mkdir(path)
        self.write(UNFINISHED_FILE, json.dumps(making, indent=2).encode())
        self._is_empty = not self._present

    def __enter__(self) -> "FolderDest":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._is_empty:  # nothing to continue
            (self.path / UNFINISHED_FILE).unlink(missing_ok=True)
            if self._is_new:
                self.path.rmdir()

    def existing(self, name: str) -> np.ndarray | None:
        """The content of a file that is there already, or None where it is missing or broken."""
        if name not in self._present:
            return None
        try:
            return self._decode((self.path / name).read_bytes())
        except (ValueError, OSError):
            return None

    def write(self, name: str, content: bytes) -> None:
        path = self.path / name
        self._is_empty = False
        self._mkdir(path.parent)
        aside = path.with_name(path.name + ".tmp")
        try:
            aside.write_bytes(content)
            aside.replace(path)
        except OSError as error:
            raise UserError(f"--dest {path}: cannot be written: {error.strerror}") from None

    def finish(self, label_file: dict[str, Any]) -> None:
        """Write dataset.json (where there is one to write): from here on the set is whole."""
        if label_file:
            self.write(data.LABEL_FILE, json.dumps(label_file).encode())
        (self.path / UNFINISHED_FILE).unlink()

    def _mkdir(self, path: Path) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--dest {path}: cannot be made: {error.strerror}") from None

    def _check_can_continue(self, making: dict[str, Any], targets: set[str]) -> set[str]:
        """The targets that exist already. `UserError` if anything else does."""
        if not self.path.exists():
            return set()
        if not self.path.is_dir():
            raise UserError(f"--dest {self.path}: is a file; wanted: a new folder, or a name ending in .zip")
        files = data.FileTree(self.path)
        names = {name for name in files.names() if not name.endswith(".tmp")}
        if data.LABEL_FILE in names:
            raise UserError(f"--dest {self.path}: holds a finished data set; give a new folder, or remove that one")
        if UNFINISHED_FILE in names and names & targets:
            before = data.read_json(files, UNFINISHED_FILE)
            for key, value in making.items():
                if not isinstance(before, dict) or before.get(key) != value:
                    found = before.get(key) if isinstance(before, dict) else None
                    raise UserError(
                        f"--dest {self.path}: holds a stopped run of another {key} ({found}, not {value}); give a new folder"
                    )
        foreign = names - targets - {UNFINISHED_FILE, data.VAE_FILE}
        if foreign:
            raise UserError(
                f"--dest {self.path}: not empty, it holds {min(foreign)}, which is no part of this run; give a new folder"
            )
        return names & targets


class ZipDest:
    """A zip (stored, not compressed), written aside and renamed when it is whole. A stopped run starts again."""

    def __init__(self, path: Path):
        self.path = path
        self._aside = path.with_name(path.name + ".tmp")
        if path.exists():
            raise UserError(f"--dest {path}: exists already; give a new name, or remove it")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._zip = zipfile.ZipFile(self._aside, "w", zipfile.ZIP_STORED)
        except OSError as error:
            raise UserError(f"--dest {path}: cannot be written: {error.strerror}") from None

    def __enter__(self) -> "ZipDest":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._zip.close()
            self._aside.unlink(missing_ok=True)

    def existing(self, name: str) -> None:
        return None

    def write(self, name: str, content: bytes) -> None:
        try:
            self._zip.writestr(zipfile.ZipInfo(name), content)  # a fixed date: the same images give the same bytes
        except OSError as error:
            raise UserError(f"--dest {self.path}: cannot be written: {error.strerror}") from None

    def finish(self, label_file: dict[str, Any]) -> None:
        if label_file:
            self.write(data.LABEL_FILE, json.dumps(label_file).encode())
        self._zip.close()
        self._aside.replace(self.path)


def create(
    dest: str, making: dict[str, Any], targets: list[str], decode: Callable[[bytes], np.ndarray]
) -> FolderDest | ZipDest:
    """The destination of a command, refused if it holds anything but a stopped run of the same."""
    if dest.lower().endswith(".zip"):
        return ZipDest(Path(dest))
    return FolderDest(Path(dest), making, targets, decode)


def label_file(names: Iterable[str], labels: dict[str, int] | None) -> dict[str, Any]:
    """The content of dataset.json."""
    return {"labels": None if labels is None else [[name, labels[name]] for name in names]}


# ----------------------------------------------------------------------------------------------------- files and reading


def png_bytes(image: np.ndarray) -> bytes:
    """uint8 (H, W, 3) or grey (H, W) as an uncompressed PNG: training reads it often, and disks are cheaper than time."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png", compress_level=0)
    return file.getvalue()


def png_pixels(content: bytes) -> np.ndarray:
    """The pixels of a PNG; ValueError if it is broken."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            return np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(str(error)) from None


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def npy_array(content: bytes) -> np.ndarray:
    """The array of an npy file; ValueError if it is broken."""
    try:
        return np.load(io.BytesIO(content), allow_pickle=False)
    except EOFError as error:
        raise ValueError(str(error)) from None


def prefetch(threads: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """`map(function, items)` in order, computed by `threads` up to `ahead` items early."""
    pending: deque = deque()
    try:
        for item in items:
            pending.append(threads.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


if __name__ == "__main__":
    main()
