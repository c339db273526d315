"""Captions to text features, on any number of processes.

The encoder sees the captions of fixed blocks of images by index, and fixed blocks of those that blocks share, so that its features
are the same bits whatever the number of processes, and after any stop.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common.distributed import start_processes
from common.errors import UserError
from common.files import WriteError, file_sha256, make_folder, write_atomically
from common.logging import warn
from common.precision import set_tf32
from common.tensor_files import npy_array, npy_bytes
from config.tool_options import TextConfig
from data.captions import (
    BIN_FILE,
    INDEX_FILE,
    NULL_FILE,
    NULL_POOLED_FILE,
    POOLED_BIN_FILE,
    RECORD_FILE,
    read_captions,
    text_name,
)
from models.conditioning import Text
from models.text_encoders import TextEncoder, TextRecord, load_text_encoder
from preprocessing.check import images_of
from preprocessing.output import Folder, remove_asides
from preprocessing.shared_captions import SharedCaptions
from preprocessing.source import image_numbers
from preprocessing.unfinished import Unfinished

UNFINISHED = "text-unfinished.json"

Features = Callable[[list[str]], list[np.ndarray]]  # captions → their features as they are stored, and the pooled ones, if any


def text(config: TextConfig) -> None:
    """Captions → `text/` (or text.bin in `packed/`): features of each caption and of the empty prompt, and text.json."""
    if not Path(config.source).is_dir():
        raise UserError(f"--source {config.source}: no such data folder")
    images = images_of(config.source)
    if images is None:
        raise UserError(f"--source {config.source}: holds neither images/ nor images.zip, beside which captions are looked for")
    captions = read_captions(images)
    numbers, prompts = image_numbers(list(captions)), list(captions.values())
    folder = Path(config.source) / ("packed" if config.packed else "text")
    if (folder / RECORD_FILE).is_file():
        raise UserError(f"{folder}: holds finished text features; remove them ({RECORD_FILE} at least) to encode again")
    state = start_processes(config.timeout_minutes)
    set_tf32(False)
    encoder_dtype = getattr(torch, config.encoder_dtype)
    encoder = load_text_encoder(config.encoder, config.length, state.device or "cpu", dtype=encoder_dtype)
    digest = hashlib.sha256(json.dumps(list(captions.items())).encode()).hexdigest()
    making = {"command": "text", "captions": digest}
    making |= {name: getattr(config, name) for name in ("dtype", "batch_size", "encoder_dtype")}
    making |= dataclasses.asdict(encoder.record)
    lock = None
    if state.is_main_process:
        make_folder(folder, "--source")
        lock = _lock(folder, making)
    state.wait_for_everyone()
    cls = PackedText if config.packed else LooseText
    dest = cls(folder, numbers, [len(texts) for texts in prompts], encoder.record, np.dtype(config.dtype), config.batch_size)
    if state.is_main_process:
        dest.begin()
    state.wait_for_everyone()
    made_with = hashlib.sha256(json.dumps(making, sort_keys=True).encode()).hexdigest()
    shared = SharedCaptions(folder, made_with, prompts, config.batch_size)
    features = functools.partial(_features, encoder, dest.dtype)
    _fill_shared(shared, features, state)
    lost = encoder.cut(list(shared.rows)) + _fill(dest, prompts, shared, features, encoder.cut, state, config.workers)
    state.wait_for_everyone()
    if lost:
        warn(
            f"{len(lost)} different caption(s) are longer than --length {config.length} and were cut; of one, {lost[0][:200]!r} is lost"
        )
    if state.is_main_process:
        dest.finish(encoder.encode([""]))
        shared.remove()
        assert lock is not None
        lock.release(remove=True)
        print(f"{folder}: {dest.first[-1]} captions of {len(numbers)} images, {config.length} tokens, by {config.encoder}")
    state.wait_for_everyone()
    state.destroy_process_group()


def _lock(folder: Path, making: dict[str, Any]) -> Unfinished:
    try:
        return Unfinished(folder / UNFINISHED, making, folder, is_begun=True)
    except UserError as error:
        message = (
            str(error)
            .removeprefix("--dest ")
            .replace("give a new name", f"finish that one, or remove {UNFINISHED} and its files")
        )
        raise UserError(message) from None


def _features(encoder: TextEncoder, dtype: np.dtype, captions: list[str]) -> list[np.ndarray]:
    """The features of captions as they are stored, and the pooled ones, if any. Raises UserError where they overflow."""
    arrays = [t.to(getattr(torch, dtype.name)).numpy() for t in encoder.encode(captions) if t is not None]
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError(f"captions {captions[0]!r} … {captions[-1]!r}: the features are not all finite in {dtype}", local=True)
    return arrays


def _fill_shared(shared: SharedCaptions, features: Features, state: Any) -> None:
    """Make this process's share of the captions that blocks of images share, and wait for the others'."""
    mine = range(state.process_index, len(shared.files), state.num_processes)
    for n in tqdm(mine, desc="shared captions", unit="batch", disable=not (mine and state.is_main_process)):
        shared.make(n, features)
    state.wait_for_everyone()


def _fill(
    dest: "LooseText | PackedText",
    prompts: list[list[str]],
    shared: SharedCaptions,
    features: Features,
    cut: Callable[[list[str]], list[str]],
    state: Any,
    workers: int,
) -> list[str]:
    """Make this process's share of the blocks; returns what was cut off captions that are not shared, of all processes."""
    rank, ranks, total = state.process_index, state.num_processes, len(prompts)
    lost: list[str] = []
    bar = tqdm(total=total, desc="text", unit="image", disable=not state.is_main_process)
    with bar, ThreadPoolExecutor(workers) as threads:
        blocks = [range(start, min(start + dest.block, total)) for start in range(0, total, dest.block)]
        writing: list[Any] = []
        for block in blocks[rank::ranks]:
            if not dest.is_there(block):
                of_block = [prompt for i in block for prompt in prompts[i]]
                own = [prompt for prompt in dict.fromkeys(of_block) if prompt not in shared.rows]
                lost += cut(own)
                arrays = features(own) if own else []
                if len(own) < len(of_block):
                    found = dict(zip(own, zip(*arrays, strict=True), strict=True))
                    of_captions = [found.get(prompt) or shared.of(prompt) for prompt in of_block]
                    arrays = [np.stack(of_all) for of_all in zip(*of_captions, strict=True)]
                for future in writing:  # what was encoded before is on disk before more is
                    future.result()
                writing = dest.write(threads, block, arrays)
            bar.update(min(len(block) * ranks, total - bar.n))
        for future in writing:
            future.result()
    if ranks > 1:
        from accelerate.utils import gather_object

        lost = gather_object(lost)
    return lost


class LooseText:
    """One npy file for each image (two with pooled features)."""

    def __init__(self, folder: Path, numbers: list[int], counts: list[int], record: TextRecord, dtype: np.dtype, block: int):
        self.folder, self.numbers, self.record, self.dtype, self.block = folder, numbers, record, dtype, block
        self.first = np.concatenate([[0], np.cumsum(counts)]).astype("<i8")  # the first caption of each image
        self.shapes = {"text": (record.length, record.width)} | ({"pooled": (record.pooled,)} if record.pooled else {})
        self._files = Folder(folder, npy_array, "--source")

    def begin(self) -> None:
        """Remove what a killed run left aside."""
        names = [text_name(number, kind) for kind in self.shapes for number in self.numbers]
        remove_asides(self.folder, [*names, RECORD_FILE, NULL_FILE, NULL_POOLED_FILE])

    def is_there(self, block: range) -> bool:
        """Are all files of these images written?"""
        return all(
            self._files.existing(text_name(self.numbers[i], kind)) == (self.first[i + 1] - self.first[i], *shape)
            for i in block
            for kind, shape in self.shapes.items()
        )

    def write(self, threads: ThreadPoolExecutor, block: range, arrays: list[np.ndarray]) -> list[Any]:
        """Write the features of these images' captions, (n, …) each; returns futures."""
        base = self.first[block[0]]
        return [
            threads.submit(
                self._files.write,
                text_name(self.numbers[i], kind),
                npy_bytes(array[self.first[i] - base : self.first[i + 1] - base]),
            )
            for kind, array in zip(self.shapes, arrays, strict=True)
            for i in block
        ]

    def finish(self, null: Text) -> None:
        """Write the empty prompt's features and text.json: from here on they are whole."""
        for name, tensor in ((NULL_FILE, null.features), (NULL_POOLED_FILE, null.pooled)):
            if tensor is not None:
                self._files.write(name, npy_bytes(tensor[0].numpy().astype(self.dtype)))
        content = dataclasses.asdict(self.record) | {"count": int(self.first[-1]), "dtype": str(self.dtype)} | self._checksums()
        write_atomically(self.folder / RECORD_FILE, json.dumps(content, indent=1) + "\n")

    def _checksums(self) -> dict[str, Any]:
        """What text.json says of the files: nothing of loose ones."""
        return {}


class PackedText(LooseText):
    """One file of all captions' features (two with pooled ones), which all processes fill; a byte for each block says what is done."""

    _bins = (BIN_FILE, POOLED_BIN_FILE)

    def begin(self) -> None:
        """Make the files in their full size, where a stopped run has not."""
        is_new = not self._done.is_file()
        for name, shape in zip(self._bins, self.shapes.values(), strict=False):
            if is_new or not (self.folder / name).is_file():  # it has its name already where finishing was stopped
                _resize(self._aside(name), int(self.first[-1]) * int(np.prod(shape)) * self.dtype.itemsize)
        _resize(self._done, -(-len(self.numbers) // self.block))

    def is_there(self, block: range) -> bool:
        """See `LooseText`."""
        with self._done.open("rb") as file:
            return os.pread(file.fileno(), 1, block[0] // self.block) == b"\1"

    def write(self, threads: ThreadPoolExecutor, block: range, arrays: list[np.ndarray]) -> list[Any]:
        """See `LooseText`."""
        return [threads.submit(self._write, block, arrays)]

    def _write(self, block: range, arrays: list[np.ndarray]) -> None:
        places = [
            (self._aside(name), int(self.first[block[0]]) * array[0].nbytes, array.tobytes())
            for name, array in zip(self._bins, arrays, strict=False)
        ]
        for path, offset, content in (*places, (self._done, block[0] // self.block, b"\1")):
            try:
                with path.open("r+b") as file:
                    file.seek(offset)
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise WriteError(path, error, "--source") from None

    def finish(self, null: Text) -> None:
        """See `LooseText`."""
        done = self._done.read_bytes() if self._done.is_file() else b""
        if b"\0" in done:
            raise UserError(f"{self.folder}: a part is missing: another process failed; run it again")
        for name, _ in zip(self._bins, self.shapes, strict=False):
            with contextlib.suppress(FileNotFoundError):  # renamed before it was stopped
                self._aside(name).replace(self.folder / name)
        write_atomically(self.folder / INDEX_FILE, self.first.tobytes())
        super().finish(null)
        self._done.unlink(missing_ok=True)

    def _checksums(self) -> dict[str, Any]:
        files = [
            INDEX_FILE,
            *([BIN_FILE, POOLED_BIN_FILE][: len(self.shapes)]),
            *([NULL_FILE, NULL_POOLED_FILE][: len(self.shapes)]),
        ]
        return {"files": {file: file_sha256(self.folder / file) for file in files}}

    @property
    def _done(self) -> Path:
        return self.folder / "text-done.tmp"

    def _aside(self, name: str) -> Path:
        return self.folder / f"{name}.tmp"


def _resize(path: Path, size: int) -> None:
    try:
        with path.open("ab") as file:
            file.truncate(size)
    except OSError as error:
        raise WriteError(path, error, "--source") from None
