"""Precomputed latents and text features, as the transformers of diffusers take them.

A data folder holds any number of `.safetensors` files, each of n samples:

    latents    (n, C, H, W)  VAE latents, normalised as the pipeline does, not packed
    text       (n, L, E)     the prompt's features, all of one length L
    text_mask  (n, L)        bool, False where a position is padding (Qwen-Image)
    pooled     (n, P)        pooled features (SD3, FLUX)

and `null.safetensors`: `text`, `text_mask`, `pooled` of the empty prompt, with n = 1.
"""

import bisect
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError, first_line
from common.files import DataError

NULL = "null.safetensors"
REQUIRED, OPTIONAL = ("latents", "text"), ("text_mask", "pooled")
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
AXES = {"latents": 4, "text": 3, "text_mask": 2, "pooled": 2}


class Features:
    """The samples of a data folder, read from memory-mapped files.

    Attributes:
        shapes: name → shape of a sample without the first axis.
        null: the empty prompt's tensors by name, or `None`.

    Raises:
        UserError: no files, a broken one, or files that differ in their tensors or shapes.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        files = sorted(f for f in folder.glob("*.safetensors") if f.name != NULL)
        if not files:
            raise UserError(f"--data-dir {folder}: holds no .safetensors with latents and text features")
        self.files = [_open(file) for file in files]
        self.names = files
        self.shapes = _shapes(self.files[0], files[0], REQUIRED)
        counts = []
        for file, path in zip(self.files, files, strict=True):
            if (shapes := _shapes(file, path, REQUIRED)) != self.shapes:
                raise UserError(f"{path}: holds {_text(shapes)}, but {files[0].name} holds {_text(self.shapes)}")
            counts.append(file.get_slice("latents").get_shape()[0])
        self.ends = list(accumulate(counts))
        self.null: dict[str, Tensor] | None = None
        if (folder / NULL).is_file():
            file, wanted = _open(folder / NULL), {k: v for k, v in self.shapes.items() if k != "latents"}
            if (shapes := _shapes(file, folder / NULL, ("text",))) != wanted:
                raise UserError(f"{folder / NULL}: holds {_text(shapes)}, but the samples hold {_text(wanted)}")
            self.null = {k: file.get_tensor(k)[:1] for k in wanted}
            if name := _not_finite(self.null):
                raise UserError(f"{folder / NULL}: {name} is not finite")

    def __len__(self) -> int:
        return self.ends[-1]

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The samples `indices` by name, (B, …) each."""
        rows = [self._sample(i) for i in indices]
        return {name: torch.cat([row[name] for row in rows]) for name in self.shapes}

    def _sample(self, index: int) -> dict[str, Tensor]:
        n = bisect.bisect_right(self.ends, index)
        row = index - (self.ends[n - 1] if n else 0)
        try:
            sample = {name: self.files[n].get_slice(name)[row : row + 1] for name in self.shapes}
        except Exception as error:
            raise DataError(f"{self.names[n]}: sample {row} cannot be read: {first_line(error)}") from None
        if name := _not_finite(sample):
            raise DataError(f"{self.names[n]}: {name} of sample {row} is not finite")
        return sample


def _open(path: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # OSError, SafetensorError
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None


def _shapes(file: Any, path: Path, required: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes by name without the first axis, of the tensors that count. Raises UserError where one is missing or misshapen."""
    names = set(file.keys())
    if missing := [name for name in required if name not in names]:
        raise UserError(f"{path}: holds no {' and no '.join(missing)}")
    found = {name: tuple(file.get_slice(name).get_shape()) for name in (*required, *OPTIONAL) if name in names}
    for name, shape in found.items():
        if len(shape) != AXES[name] or shape[:1] != found["text"][:1] or 0 in shape:
            raise UserError(f"{path}: {name} is {'×'.join(map(str, shape))}; wanted: {AXES[name]} axes, one row a sample")
        if name != "text_mask" and (dtype := file.get_slice(name).get_dtype()) not in FLOATS:
            raise UserError(f"{path}: {name} is of type {dtype}; wanted: one of {', '.join(FLOATS)}")
    if "text_mask" in found and found["text_mask"] != found["text"][:2]:
        raise UserError(f"{path}: text_mask is of {found['text_mask'][1]} tokens, but text of {found['text'][1]}")
    return {name: shape[1:] for name, shape in found.items()}


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of a tensor with values that are not finite, if there is one."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def _text(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in shapes.items())
