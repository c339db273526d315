"""Captions and their encoded features, in a data folder.

    images/captions.json   {"captions": [["00000/img00000000.png", ["two sevens …", "…"]], …]}
    text/                  00000/img-text-00000000.npy (captions of the image, L, E), 00000/img-pooled-….npy (captions, P)
                           null.npy (L, E), null-pooled.npy (P): the empty prompt;  text.json: what they are, written last
    packed/                the same as text.bin (captions, L, E), pooled.bin, text.idx (first caption of each image), mapped;
                           text.json has the SHA-256 of these files, too

Captions are also taken from COCO's captions_*.json, or from `.txt` files beside the images, one a line.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, first_line
from common.file_tree import FileTree, read_json, read_regular
from common.files import DataError, is_unicode, parse_json
from common.image_files import image_names
from common.tensor_files import npy_array
from data.latent_files import LatentFiles, pair_key
from data.packed import PackedLatents
from models.conditioning import Text
from models.text_encoders import TextRecord
from randomness import generator

CAPTIONS_FILE, RECORD_FILE = "captions.json", "text.json"
NULL_FILE, NULL_POOLED_FILE = "null.npy", "null-pooled.npy"
BIN_FILE, POOLED_BIN_FILE, INDEX_FILE = "text.bin", "pooled.bin", "text.idx"
PACKED_FILES = (RECORD_FILE, NULL_FILE, NULL_POOLED_FILE, BIN_FILE, POOLED_BIN_FILE, INDEX_FILE)
COCO = re.compile(r"(.*/)?captions_[^/]*\.json")
MAX_CAPTION = 2**16  # characters
DTYPES = ("float16", "float32")


def text_name(number: int, kind: str = "text") -> str:
    """The file of an image's features; kind: text or pooled."""
    return f"{number // 1000:05d}/img-{kind}-{number:08d}.npy"


def caption_of(seed: int, n: int, place: int, count: int) -> int:
    """Which of an image's `count` captions forward `n` takes for the image at `place` of the global batch."""
    return int(generator("caption", seed, n, place).integers(count))


def has_captions(images: FileTree) -> bool:
    """Is there any file that captions are taken from?"""
    files = images.names()
    beside = {name.rpartition(".")[0] + ".txt" for name in image_names(files)}
    return any(name == CAPTIONS_FILE or name in beside or COCO.fullmatch(name) for name in files)


def read_captions(images: FileTree) -> dict[str, list[str]]:
    """The captions of every image: image name → captions, in the order of the names.

    Raises:
        UserError: none, those of several kinds, captions without an image, images without a caption, or empty captions.
    """
    files = images.names()
    names = image_names(files)
    if not names:
        raise UserError(f"{images.path}: holds no image files")
    coco = [name for name in files if COCO.fullmatch(name)]
    texts = {
        name.rpartition(".")[0]: name for name in files if name.endswith(".txt") and name != "skipped.txt"
    }  # which `convert` writes
    stems = {name.rpartition(".")[0]: name for name in names}
    own = [CAPTIONS_FILE] if CAPTIONS_FILE in files else []
    kinds = [kind for kind in (own, coco, [texts[stem] for stem in stems if stem in texts]) if kind]
    if not kinds:
        raise UserError(f"{images.path}: holds no captions: neither {CAPTIONS_FILE}, captions_*.json nor .txt beside images")
    if len(kinds) > 1:
        found = " and ".join(kind[0] + (f" (one of {len(kind)})" if kind[1:] else "") for kind in kinds)
        raise UserError(f"{images.path}: captions of several kinds, {found}; keep one of them")
    if own:
        where, captions = images.where(CAPTIONS_FILE), own_captions(images)
    elif coco:
        where, captions = ", ".join(map(images.where, coco)), _coco(images, coco, names)
    else:
        where = f"{images.path}: *.txt"
        captions = {stems.get(stem, text): _lines(images, text) for stem, text in texts.items()}
    _refuse(where, "caption(s) of images that are not there", sorted(captions.keys() - set(names)))
    _refuse(where, "image(s) without a caption", [name for name in names if not captions.get(name)])
    _refuse(where, "image(s) with an empty caption", [n for n in names if not all(c.strip() for c in captions[n])])
    _refuse(where, "image(s) with a caption that is no Unicode", [n for n in names if not all(map(is_unicode, captions[n]))])
    if long := next((name for name in names if max(map(len, captions[name])) > MAX_CAPTION), None):
        raise UserError(f"{where}: a caption of {long} has more than {MAX_CAPTION} characters")
    return {name: captions[name] for name in names}


def _refuse(where: str, what: str, names: Sequence[str]) -> None:
    if names:
        raise UserError(f"{where}: {len(names)} {what}: {_first(names)}")


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def own_captions(images: FileTree) -> dict[str, list[str]]:
    """captions.json: image name → captions, in the order of the file. Raises UserError where it is malformed."""
    where, content = images.where(CAPTIONS_FILE), read_json(images, CAPTIONS_FILE)
    wanted = '{"captions": [[image name, [caption, …]], …]}'
    entries = content.get("captions") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{where}: must hold {wanted}")
    captions: dict[str, list[str]] = {}
    for entry in entries:
        match entry:
            case [str(name), [*texts]] if texts and all(isinstance(t, str) for t in texts):
                if name in captions:
                    raise UserError(f"{where}: holds {name} twice")
                captions[name] = texts
            case [str(name), []]:
                captions[name] = []
            case _:
                raise UserError(f"{where}: {json.dumps(entry)[:80]} is not [image name, [caption, …]]")
    return captions


def _coco(images: FileTree, files: list[str], names: list[str]) -> dict[str, list[str]]:
    """COCO's annotations. Images are known by their file names; of a converted set, by their places among the sorted ones.

    An image of several files has the captions of all, in their order, those that it has already once.
    """
    of_file: dict[str, list[str]] = {}
    for file in files:
        where, content = images.where(file), read_json(images, file)
        try:
            file_names = {image["id"]: str(image["file_name"]) for image in content["images"]}
            own: dict[str, list[str]] = {name: [] for name in file_names.values()}
            annotations = sorted(content["annotations"], key=lambda a: a["id"])
            unknown = [str(a["image_id"]) for a in annotations if a["image_id"] not in file_names]
            if unknown:
                wrong = f"image_id {_first(unknown)} is not among its images"
                raise UserError(f"{where}: {len(unknown)} caption(s) without an image: {wrong}")
            for annotation in annotations:
                if not isinstance(annotation["caption"], str):
                    raise TypeError(f"caption {annotation['caption']!r} is no text")
                own[file_names[annotation["image_id"]]].append(annotation["caption"].strip())
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: not COCO's captions: {type(error).__name__} {first_line(error)}") from None
        for name, captions in own.items():
            earlier = of_file.get(name, [])
            of_file[name] = earlier + [caption for caption in captions if caption not in earlier]
    by_base = {name.rpartition("/")[2]: name for name in names}
    if by_base.keys() & of_file.keys():
        captions = {by_base.get(file, file): texts for file, texts in of_file.items()}
        return {name: captions[name] for name in names if name in captions}  # a part of COCO is no mistake
    if len(of_file) == len(names):  # `convert` numbers images in this order
        return dict(zip(names, (of_file[file] for file in sorted(of_file)), strict=True))
    raise UserError(
        f"{images.where(files[0])}: has captions of {len(of_file)} images, none of which is in {images.path} by name, which has "
        f"{len(names)}; convert exactly those images, or give their names"
    )


def _lines(images: FileTree, name: str) -> list[str]:
    try:
        return [line for line in images.read(name).decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{images.where(name)}: is not UTF-8") from None


def read_prompts(path: str) -> list[str]:
    """The lines of a text file. Raises UserError where it is missing, empty, not UTF-8, or a line is empty."""
    try:
        lines = Path(path).read_text("utf-8-sig").rstrip().split("\n")  # not at U+2028, which is a part of a line
    except UnicodeDecodeError:
        raise UserError(f"--prompts {path}: is not UTF-8") from None
    except OSError as error:
        raise UserError(f"--prompts {path}: no such file or data folder ({error.strerror})") from None
    if lines == [""]:
        raise UserError(f"--prompts {path}: is empty; wanted: one prompt a line")
    if empty := [i for i, line in enumerate(lines, 1) if not line.strip()]:
        raise UserError(f"--prompts {path}: line {empty[0]} is empty; wanted: one prompt a line")
    return [line.strip() for line in lines]


class TextFeatures:
    """The encoded captions of a data folder, loose or packed.

    Args:
        folder: a folder with text.json.
        latents: of the same images: loose features have their numbers.

    Attributes:
        record: what the features are.
        null: the empty prompt's, (L, E) and (P,).

    Raises:
        UserError: no features, not whole, or of another number of images.
    """

    def __init__(self, folder: str | Path, latents: LatentFiles | PackedLatents):
        self.folder, self.latents = Path(folder), latents
        self.numbers = np.array([_number(latents, i) for i in range(len(latents))])
        self.record, self.content = read_record(self.folder)
        self.dtype = np.dtype(self.content["dtype"])
        pooled = self._null(NULL_POOLED_FILE, (self.record.pooled,)) if self.record.pooled else None
        self.null = Text(self._null(NULL_FILE, self._shape), pooled)
        self._first: np.ndarray | None = None
        self._bins: list[np.ndarray] = []
        if (self.folder / INDEX_FILE).is_file():
            self._open_packed()

    @property
    def is_packed(self) -> bool:
        """Do the features lie in one file?"""
        return self._first is not None

    @property
    def _shape(self) -> tuple[int, int]:
        return self.record.length, self.record.width

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int, choose: Callable[[int], int] | None = None) -> Text:
        """Features of image `index` in float32: of all its captions, (n, L, E), or of the one that choose(n) names, (L, E)."""
        if self._first is not None:
            first, last = self._first[index : index + 2].tolist()
            arrays = [array[first:last] for array in self._bins]
        else:
            number = int(self.numbers[index])
            kinds = [("text", self._shape)] + ([("pooled", (self.record.pooled,))] if self.record.pooled else [])
            arrays = [self._file(text_name(number, kind), shape) for kind, shape in kinds]
        if choose is not None:
            arrays = [array[choose(len(array))] for array in arrays]
        features, *pooled = (torch.from_numpy(np.array(array, dtype=np.float32)) for array in arrays)
        if not all(tensor.isfinite().all() for tensor in (features, *pooled)):
            raise DataError(f"{self.where(index)}: holds values that are not finite")
        return Text(features, pooled[0] if pooled else None)

    def where(self, index: int) -> str:
        """How messages name the features of image `index`."""
        return str(self.folder / (text_name(int(self.numbers[index])) if self._first is None else f"{BIN_FILE}, image {index}"))

    def _open_packed(self) -> None:
        where, count = self.folder / INDEX_FILE, self.content["count"]
        first = np.fromfile(where, dtype="<i8")
        if len(first) != len(self) + 1 or first[0] or first[-1] != count or (np.diff(first) < 1).any():
            raise UserError(
                f"{where}: is of {max(len(first), 1) - 1} images and not of the {len(self)} latents; encode the text again"
            )
        for file, shape in ((BIN_FILE, self._shape), (POOLED_BIN_FILE, (self.record.pooled,))):
            if 0 in shape:
                continue
            size = count * int(np.prod(shape)) * self.dtype.itemsize
            if not (self.folder / file).is_file() or (self.folder / file).stat().st_size != size:
                raise UserError(f"{self.folder / file}: missing or truncated; {size} bytes are wanted")
            self._bins.append(np.memmap(self.folder / file, self.dtype, "r", shape=(count, *shape)))
        self._first = first

    def _null(self, name: str, shape: tuple[int, ...]) -> Tensor:
        array = self._array(name, UserError)
        if array.shape != shape:
            raise UserError(f"{self.folder / name}: has shape {array.shape}; {RECORD_FILE} says {shape}")
        if not np.isfinite(array).all():
            raise UserError(f"{self.folder / name}: holds values that are not finite")
        return torch.from_numpy(array.astype(np.float32))

    def _file(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        array = self._array(name, DataError)
        if array.ndim != len(shape) + 1 or array.shape[1:] != shape or not len(array):
            raise DataError(f"{self.folder / name}: has shape {array.shape}; {RECORD_FILE} says (captions, {shape})")
        return array

    def _array(self, name: str, mistake: type[UserError]) -> np.ndarray:
        try:
            array = npy_array(read_regular(self.folder / name))
        except (OSError, ValueError) as error:
            raise mistake(f"{self.folder / name}: missing or broken: {first_line(error)}") from None
        if array.dtype.name not in DTYPES:
            raise mistake(f"{self.folder / name}: holds {array.dtype}; wanted: {' or '.join(DTYPES)}")
        return array


def _number(latents: LatentFiles | PackedLatents, index: int) -> int:
    key = pair_key(latents.name(index))
    if key is None:
        raise UserError(f"{latents.where(index)}: its name does not end in a number, by which its text is found")
    return key[1]


def read_record(folder: Path) -> tuple[TextRecord, dict[str, Any]]:
    """text.json: the record, and all of it. Raises UserError where it is missing or malformed."""
    where = folder / RECORD_FILE
    try:
        content = parse_json(read_regular(where), where)
    except OSError:
        raise UserError(f"{where}: missing; it is written last, so continue `dataset_tools.py text`") from None
    record = TextRecord.from_dict(content, where)
    if type(content.get("count")) is not int or content["count"] < 1 or content.get("dtype") not in DTYPES:
        raise UserError(f"{where}: count must be a positive whole number and dtype {' or '.join(DTYPES)}")
    return record, content


def packed_checksums(content: bytes, where: str) -> dict[str, str]:
    """File → SHA-256 of the packed features that `content`, a text.json, describes. Raises UserError, which begins with `where`."""
    record = parse_json(content, where)
    files = record.get("files") if isinstance(record, dict) else None
    wanted = {NULL_FILE, BIN_FILE, INDEX_FILE}
    if isinstance(files, dict) and record.get("pooled"):
        wanted |= {NULL_POOLED_FILE, POOLED_BIN_FILE}
    if not isinstance(files, dict) or files.keys() != wanted:
        raise UserError(f"{where}: names no packed files with their SHA-256; write them with `dataset_tools.py text --packed`")
    if not all(isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) for digest in files.values()):
        raise UserError(f"{where}: every SHA-256 must be 64 hexadecimal digits")
    return files


def text_folder(data_dir: str | Path) -> Path | None:
    """Where the text features of a data folder lie: `packed/` or `text/`, the first that has any; None where there are none."""
    folders = (Path(data_dir), Path(data_dir) / "packed", Path(data_dir) / "text")
    return next((folder for folder in folders if (folder / RECORD_FILE).is_file()), None)
