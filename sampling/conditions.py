"""What images are drawn from: class labels, or prompts. Each gives the condition of any image by its index."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint.weights import Weights, meta_model
from common.errors import UserError
from common.files import cache_folder, write_atomically, write_json, written_aside
from common.logging import warn
from config.options import GenerateConfig, InferenceTool
from data.captions import RECORD_FILE, TextFeatures, read_prompts, text_folder
from data.coco_layout import CocoText
from data.dataset import captions_of, open_latents, open_text
from models.conditioning import Condition, NullText, Text
from models.text_encoders import TextEncoder, TextRecord, load_text_encoder
from randomness import image_labels

BLOCK = 1024  # prompts that are encoded and written at a time


class Conditions(Protocol):
    """What images are drawn from."""

    @property
    def words(self) -> Sequence[str] | None:
        """The prompts that images go round; None for labels, and where features alone are known."""
        ...

    def of(self, config: Any, indices: Sequence[int]) -> Condition:
        """The condition of the images `indices`; config: the options of sampling."""
        ...

    def names(self, config: Any) -> list[str]:
        """What they are called, for people, in the order in which images go round them."""
        ...

    def told(self, config: Any) -> dict[str, Any]:
        """The same for a record."""
        ...

    def save_names(self, path: Path, count: int) -> None:
        """Write what the images 0 … count − 1 show, a line each; nothing for labels."""
        ...


def labels_of(config: GenerateConfig | InferenceTool, indices: Sequence[int]) -> Tensor:
    """Class ids (B,) of the images `indices`: random by index, balanced, or cycling through a list."""
    if isinstance(config, InferenceTool):
        cycle: Sequence[int] = config.class_label
    elif config.class_labels == ["random"]:
        return image_labels(config.global_seed, indices, config.num_classes)
    else:
        cycle = range(config.num_classes) if config.class_labels == ["balanced"] else [int(c) for c in config.class_labels]
    return torch.tensor([cycle[i % len(cycle)] for i in indices])


class Labels:
    """Class labels, as the options say."""

    words = None

    def of(self, config: GenerateConfig | InferenceTool, indices: Sequence[int]) -> Tensor:
        """See `labels_of`."""
        return labels_of(config, indices)

    def names(self, config: InferenceTool) -> list[str]:
        """See `Conditions`."""
        return [f"class {label}" for label in config.class_label]

    def told(self, config: InferenceTool) -> dict[str, Any]:
        """See `Conditions`."""
        return {"class_label": config.class_label}

    def save_names(self, path: Path, count: int) -> None:
        """See `Conditions`."""


class _Named:
    """Prompts under their own words."""

    def names(self, config: Any) -> list[str]:
        """See `Conditions`."""
        return list(self.texts)  # type: ignore[attr-defined]

    def told(self, config: Any) -> dict[str, Any]:
        """See `Conditions`."""
        return {"prompts": self.names(config)}

    def save_names(self, path: Path, count: int) -> None:
        """See `Conditions`."""
        names = self.names(None)
        write_atomically(path, "".join(f"{names[i % len(names)]}\n" for i in range(count)))


class DataPrompts(_Named):
    """The captions of a data set, the first of each image; image i has that of sample i, and so on from the start.

    Args:
        features: of all captions.
        data_dir: the data folder.
    """

    def __init__(self, features: TextFeatures | CocoText, data_dir: str):
        self.features, self.data_dir = features, data_dir

    @property
    def words(self) -> Sequence[str] | None:
        """See `Conditions`."""
        return self._words

    @cached_property
    def _words(self) -> list[str] | None:
        captions = captions_of(self.data_dir, self.features.latents)
        return None if captions is None else [texts[0] for texts in captions]

    @property
    def texts(self) -> list[str]:
        """In words, where the data folder has them; else which they are."""
        return self._words or [f"caption of sample {i}" for i in range(len(self.features))]

    def of(self, config: Any, indices: Sequence[int]) -> Text:
        """See `Conditions`."""
        rows = [self.features.read(i % len(self.features), lambda count: 0) for i in indices]
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return Text(torch.stack([row.features for row in rows]), torch.stack(pooled) if pooled else None)

    @property
    def null(self) -> Text:
        """Of the empty prompt: (L, E) and (P,)."""
        return self.features.null


class EncodedPrompts(_Named):
    """Prompts and their features; image i has prompt i, and so on from the first.

    Args:
        texts: the prompts.
        rows: float32 (prompts + 1, L·E + P), features and pooled ones of each, those of the empty prompt last.
        record: what they are.
    """

    def __init__(self, texts: Sequence[str], rows: np.ndarray, record: TextRecord):
        self.texts, self.rows, self.record = texts, rows, record
        self.words = texts

    def _text(self, places: Sequence[int]) -> Text:
        length, width = self.record.length, self.record.width
        rows = torch.from_numpy(np.array(self.rows[list(places)]))
        features, pooled = rows.split([length * width, self.record.pooled], dim=1)
        return Text(features.unflatten(1, (length, width)), pooled if self.record.pooled else None)

    @property
    def null(self) -> Text:
        """Of the empty prompt: (L, E) and (P,)."""
        features, pooled = self._text([len(self.texts)])
        return Text(features[0], None if pooled is None else pooled[0])

    def of(self, config: Any, indices: Sequence[int]) -> Text:
        """See `Conditions`."""
        return self._text([i % len(self.texts) for i in indices])


@dataclass
class Prompts:
    """The prompts that the options ask for, checked against the checkpoint; `open` gives their features.

    Attributes:
        texts: in words.
        record: of the features that the model takes.
        encoder_name: what makes them.
        data: the captions of a data set, if they are these.
    """

    texts: list[str]
    record: TextRecord
    encoder_name: str = ""
    encoder: TextEncoder | None = field(default=None, repr=False)  # where it had to be loaded
    data: DataPrompts | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def words(self) -> Sequence[str] | None:
        """See `Conditions`."""
        return self.texts if self.data is None else self.data.words

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that the prompts' features depend on."""
        told: list[Any] = [self.texts]
        if self.data is not None:
            told.append("" if (folder := text_folder(self.data.data_dir)) is None else (folder / RECORD_FILE).read_text())
            if self.words is None:  # nothing but the place tells these captions from others
                told.append(str(Path(self.data.data_dir).resolve()))
        return {"prompts_sha256": _digest(told), "text_encoder_sha256": self.record.sha256}

    def open(self, device: torch.device) -> DataPrompts | EncodedPrompts:
        """The features: the data set's, those in the cache folder, or made now and kept there. All processes call it."""
        if self.data is not None:
            return self.data
        from accelerate import PartialState

        path = cache_folder() / "text" / f"{_digest([vars(self.record) | {'encoder': ''}, self.texts])}.npy"
        with PartialState(cpu=not torch.accelerator.is_available()).local_main_process_first():
            rows, lost = self._cached(path) or self._encode(path, device)
        if lost:
            warn(
                f"{len(lost)} prompt(s) are longer than the model's {self.record.length} tokens and were cut; "
                f"of one, {lost[0][:200]!r} is lost"
            )
        return EncodedPrompts(self.texts, rows, self.record)

    def _cached(self, path: Path) -> tuple[np.ndarray, list[str]] | None:
        """The features in a file, mapped, and what was cut off the prompts; None where it is missing or damaged."""
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
            lost = json.loads(path.with_suffix(".json").read_text())
        except (OSError, ValueError, EOFError):
            return None
        is_whole = rows.shape == self._shape and rows.dtype == np.float32 and isinstance(lost, list)
        return (rows, lost) if is_whole and all(isinstance(text, str) for text in lost) else None

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self.texts) + 1, self.record.length * self.record.width + self.record.pooled

    def _encode(self, path: Path, device: torch.device) -> tuple[np.ndarray, list[str]]:
        """Make what `_cached` returns, and keep it in the file where that can be written."""
        encoder = self.encoder or load_encoder(self.encoder_name, self.record, device)
        rows, lost = [*self.texts, ""], encoder.cut(self.texts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(lost, path.with_suffix(".json"))
            with written_aside(path) as aside, aside.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": self._shape})
                for start in range(0, len(rows), BLOCK):
                    file.write(_features(encoder, self.encoder_name, rows[start : start + BLOCK]).tobytes())
        except OSError as error:
            warn(f"{path}: the prompts' features cannot be kept there for the next time: {error.strerror}")
            return _features(encoder, self.encoder_name, rows), lost
        return np.load(path, mmap_mode="r"), lost


def encode(encoder: TextEncoder, name: str, texts: Sequence[str]) -> EncodedPrompts:
    """The features of prompts, made now and kept nowhere; `name`: the encoder's, for messages."""
    return EncodedPrompts(texts, _features(encoder, name, [*texts, ""]), encoder.record)


def _features(encoder: TextEncoder, name: str, texts: Sequence[str]) -> np.ndarray:
    """Little-endian float32 (texts, L·E + P): features and pooled ones of each."""
    rows = torch.cat([t.flatten(1) for t in encoder.encode(list(texts)) if t is not None], dim=1)
    if not rows.isfinite().all():
        raise UserError(f"--text-encoder {name}: its features are not all finite", local=True)
    return np.ascontiguousarray(rows.numpy(), "<f4")


def read(config: GenerateConfig | InferenceTool, weights: Weights, given: dict[str, Any]) -> Prompts | None:
    """The prompts that the options ask for; None for a model of class labels.

    Raises:
        UserError: prompts for a model of labels, labels for one of text, no prompts, or features of another encoder.
    """
    where = f"--ckpt {config.ckpt}: holds a {config.model}, which is conditioned on"
    option = "--prompt" if config.prompt else "--prompts" if config.prompts else "--text-encoder"
    if not weights.takes_text:
        if config.prompt or config.prompts or config.text_encoder:
            raise UserError(f"{option}: {where.removeprefix('--ckpt ')} class labels, not on text")
        return None
    if labels := next((name for name in ("class_labels", "class_label") if name in given), None):
        raise UserError(f"--{labels.replace('_', '-')}: {where.removeprefix('--ckpt ')} text; give --prompt or --prompts")
    if not (config.prompt or config.prompts):
        raise UserError(f"{where} text; give --prompt or --prompts")
    if isinstance(config, InferenceTool):
        config.class_label = []
    length, width = meta_model(weights, config.ckpt).example_condition(1).features.shape[1:]
    if config.prompts is not None and Path(config.prompts).is_dir():
        prompts = _of_data(config.prompts, config, weights)
    else:
        texts = list(config.prompt) if config.prompt else read_prompts(config.prompts or "")
        prompts = _encoded(texts, config, weights, length)
    if (prompts.record.length, prompts.record.width) != (length, width):
        made = f"{prompts.record.length} tokens × {prompts.record.width}"
        raise UserError(f"{prompts.encoder_name}: makes features of {made}, but {config.ckpt} takes {length} × {width}")
    return prompts


def _of_data(folder: str, config: GenerateConfig | InferenceTool, weights: Weights) -> Prompts:
    if config.text_encoder:
        raise UserError(
            f"--text-encoder {config.text_encoder}: --prompts {folder} holds features already; give the one or the other"
        )
    latents = open_latents(folder, option="--prompts")
    features = open_text(folder, latents)
    if weights.text is not None:
        features.record.check_same(weights.text, f"--prompts {folder}", f"--ckpt {config.ckpt}")
    data = DataPrompts(features, folder)
    return Prompts(data.texts, features.record, f"--prompts {folder}", data=data)


def _encoded(texts: list[str], config: GenerateConfig | InferenceTool, weights: Weights, length: int) -> Prompts:
    name = config.text_encoder or (weights.text.encoder if weights.text else "")
    if not name:
        raise UserError(f"--ckpt {config.ckpt}: records no text encoder; give --text-encoder")
    if weights.text is not None and (config.text_encoder is None or not weights.text.sha256):
        record = weights.text
        if record.sha256:
            return Prompts(texts, record, name)
    encoder = load_encoder(name, weights.text, torch.device("cpu"), length)
    return Prompts(texts, encoder.record, name, encoder=encoder)


def load_encoder(name: str, wanted: TextRecord | None, device: torch.device, length: int | None = None) -> TextEncoder:
    """The text encoder `name`, for `length` tokens in all. Raises UserError where its features are not the `wanted` ones."""
    try:
        encoder = load_text_encoder(name, wanted.length if wanted else length or 77, device, whole=True)
    except UserError as error:
        message = str(error).replace("--encoder", "--text-encoder", 1)
        recorded = wanted is not None and wanted.encoder == name
        raise UserError(message + "; the checkpoint records this name, another place may be given" * recorded) from None
    if wanted is not None:
        encoder.record.check_same(wanted, f"--text-encoder {name}", "the checkpoint")
    return encoder


def check_options(config: GenerateConfig | InferenceTool) -> None:
    """Refuse prompts that are none; nothing is loaded."""
    if config.prompt and config.prompts:
        raise UserError("--prompt and --prompts: give the one or the other")
    if config.prompts is not None and not Path(config.prompts).is_dir():
        read_prompts(config.prompts)


def set_missing_null(model: nn.Module | None, null: Text) -> None:
    """Give a text model that has no null text, as others' weights have none, the empty prompt's features: it is guided by them."""
    if isinstance(model, NullText) and model.null_text is None:
        device = next(model.parameters()).device
        model.set_null_text(null.features.to(device), None if null.pooled is None else null.pooled.to(device))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
