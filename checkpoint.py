"""Checkpoints: save, load, resume, and import of the published format.

A file is a `torch.save`d dict of tensors and plain containers, always read with PyTorch's restricted unpickler: a file that
carries code is refused and nothing of it runs.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from config import ARCHITECTURE_KEYS, TrainConfig, coerce
from errors import UserError, first_line
from files import check_name, file_sha256
from vae import SD_VAE, VAERecord, load_vae

FORMAT = 1
PRETRAINED = "model.safetensors"  # the weights in a folder of `save_pretrained`
# The architecture options that the state dict's shapes depend on, or that change what a forward computes.
ELIT_OPTIONS = ("head_depth", "tail_depth", "elit_group_size", "elit_read_depth", "elit_write_depth", "elit_tail")
MODEL_OPTIONS = ("qk_norm", *ELIT_OPTIONS, "stages_count")

# ---------------------------------------------------------------------------------------------------- training state


class _HashingFile:
    """A file that hashes what is written to it.

    `torch.save` cannot take an error in the middle of a file: the first one is kept, what follows is dropped, `close` raises it.
    """

    def __init__(self, path: Path):
        self.file, self.sha256, self.error = path.open("wb"), hashlib.sha256(), None

    def write(self, data) -> int:
        self._try(self.file.write, data)
        self.sha256.update(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        self._try(self.file.flush)

    def close(self) -> None:
        """On the disk, or the error that kept it from getting there."""
        with self.file:
            self.flush()
            self._try(os.fsync, self.file.fileno())
            if self.error is not None:
                raise self.error

    def _try(self, action: Callable, *arguments) -> None:
        if self.error is None:
            try:
                action(*arguments)
            except OSError as error:
                self.error = error


def sidecar(path: Path) -> Path:
    """The file that holds the checkpoint's SHA-256."""
    return path.with_name(path.name + ".sha256")


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` (interfaces: model, ema, optimizer, …) and its checksum: aside, synced to the disk, then renamed.

    Raises:
        OSError: the disk is full, or not writable; nothing that was there has changed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    try:
        out = _HashingFile(aside)
        with contextlib.closing(out):
            torch.save({"format": FORMAT} | state, out)
        out_sum = _HashingFile(sidecar(aside))
        with contextlib.closing(out_sum):
            out_sum.write(f"{out.sha256.hexdigest()}  {path.name}\n".encode())
        sidecar(aside).replace(sidecar(path))  # the checksum first: a checkpoint under its own name always has one
        aside.replace(path)
    except BaseException:
        _delete(aside)  # its room on the disk is needed
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Renames outlive a power cut once the folder is synced. Some file systems know no such thing."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _delete(path: Path) -> None:
    """A file and its checksum, in this order: a checkpoint without one would be taken on trust."""
    path.unlink(missing_ok=True)
    sidecar(path).unlink(missing_ok=True)


def remove_unfinished(folder: str | Path) -> None:
    """Delete what killed writes left aside."""
    for path in Path(folder).glob("*.pt.tmp"):
        _delete(path)


def set_aside(folder: str | Path, step: int) -> Path | None:
    """Move the checkpoints after `step`, which a run goes back to, to a new subfolder; returns that, `None` if there are none.

    The newest goes last: until then it is the one to resume from, as if nothing had been moved.
    """
    later = [s for s in saved_steps(folder) if s > step]
    if not later:
        return None
    names = (f"abandoned-from-{step}{f'-{k}' if k > 1 else ''}" for k in itertools.count(1))
    aside = next(path for path in (Path(folder) / name for name in names) if not path.exists())
    aside.mkdir()
    for path in (step_path(folder, s) for s in later):
        path.replace(aside / path.name)
        if sidecar(path).exists():
            sidecar(path).replace(aside / sidecar(path).name)
    _sync_folder(Path(folder))
    return aside


def prune(folder: str | Path, newest: int, keep_last: int, keep_every: int, good: int | None = None) -> None:
    """Delete the checkpoints before the last `keep_last` (0: none) up to step `newest`, but for the multiples of `keep_every`.

    The newest one up to step `good` is kept too: after that step the run has not been sound.
    """
    steps = [step for step in saved_steps(folder) if step <= newest]
    last_good = max((step for step in steps if good is not None and step <= good), default=None)
    for step in steps[:-keep_last] if keep_last else []:
        if step != last_good and (not keep_every or step % keep_every):
            _delete(step_path(folder, step))


class Writer:
    """Saves a run's checkpoints in the background: `save` returns once the state is copied to memory of the host.

    One thread, one write at a time; the memory (pinned where the state is on a GPU) is kept from one checkpoint to the next.
    A failing write is told to `tell`, harms no file and is kept in `error` until another succeeds.
    """

    def __init__(self, folder: str | Path, keep_last: int, keep_every: int, tell: Callable[[str], None]):
        self.folder, self.keep_last, self.keep_every, self.tell = Path(folder), keep_last, keep_every, tell
        self.error: Exception | None = None
        self._memory: dict[tuple, Tensor] = {}  # by the tensor's place in the state
        self._thread: threading.Thread | None = None

    def save(self, step: int, state: dict[str, Any], good: int | None = None) -> None:
        """Copy `state` and begin to write it; waits for the write before, whose memory it needs. good: see `prune`."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(step, self.copy(state), good), name="checkpoint writer")
        self._thread.start()

    def wait(self) -> None:
        """Until the write under way has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` in the kept memory, made the first time."""
        copied = self._copy(state, ())
        if torch.accelerator.is_available():
            torch.accelerator.current_stream().synchronize()
        return copied

    def _copy(self, value: Any, place: tuple) -> Any:
        if isinstance(value, Tensor):
            memory = self._memory.get(place)
            if memory is None or memory.shape != value.shape or memory.dtype != value.dtype:
                memory = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type != "cpu")
                self._memory[place] = memory
            return memory.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {k: self._copy(v, (*place, k)) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(v, (*place, i)) for i, v in enumerate(value))
        return value

    def _write(self, step: int, state: dict[str, Any], good: int | None) -> None:
        try:
            save(step_path(self.folder, step), state)
            self.error = None
        except Exception as error:  # whatever a file system may come up with
            self.error = error
            self.tell(f"{step_path(self.folder, step)}: could not be written: {error}; the checkpoints before it are whole")
            return
        try:
            prune(self.folder, step, self.keep_last, self.keep_every, good)
        except (OSError, UserError) as error:
            self.tell(f"{self.folder}: old checkpoints could not be deleted: {error}")


class Unreadable(UserError):
    """The system could not read a file (no memory, no permission, an I/O error), which says nothing of what is in it."""

    def __init__(self, path: Path, error: BaseException):
        reason = (
            error.strerror if isinstance(error, OSError) else "not enough memory" if isinstance(error, MemoryError) else None
        )
        super().__init__(f"{path}: cannot be read: {reason or first_line(error)}")


# What PyTorch says in a RuntimeError where memory is short.
_NO_MEMORY = re.compile(r"unable to mmap|allocate|bad_alloc|(out of|not enough) memory", re.IGNORECASE)


def load(path: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """The dict in a checkpoint file, on the CPU, memory-mapped where its format allows.

    Raises:
        Unreadable: the file may be whole, but memory, permissions or the disk do not allow to read it.
        UserError: missing, truncated, not a checkpoint, carrying code, or (with `verify`) not matching its checksum.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint" + (f": a folder without {PRETRAINED}" if path.is_dir() else ""))
        if verify:
            Checksum(path).check()
        state = _unpickle(path)
    except (OSError, MemoryError) as error:
        raise Unreadable(path, error) from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    return state


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|(?:[Cc]all|global) ([\w.]+)", str(error))
        if found:
            name = found.group(1) or found.group(2)
            raise UserError(
                f"{path}: refused: it carries code ({name}), nothing of which was run; only tensors and plain containers are loaded"
            ) from None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever damaged bytes make of the unpickler
        if _NO_MEMORY.search(str(error)):
            raise Unreadable(path, error) from None
    file_sha256(path)  # OSError, if it was the disk
    raise UserError(f"{path}: truncated, or not a checkpoint")


class Checksum:
    """A checkpoint's SHA-256. Where it has a sidecar, a thread computes it while the file is read and its model is built."""

    def __init__(self, path: Path):
        self.path, self._sha256, self._error = path, "", None
        self._thread = threading.Thread(target=self._compute, name="checksum", daemon=True)
        self._recorded = sidecar(path).is_file()
        if self._recorded:
            self._thread.start()

    def _compute(self) -> None:
        try:
            self._sha256 = file_sha256(self.path)
        except Exception as error:
            self._error = error

    def value(self) -> str:
        """In hexadecimal, of the bytes themselves; computed once. Raises Unreadable."""
        if self._thread.ident is None:
            self._thread.start()
        self._thread.join()
        if self._error is not None:
            raise Unreadable(self.path, self._error)
        return self._sha256

    def check(self) -> None:
        """Raises UserError where the sidecar says another; a file without one is taken as it is."""
        if self._recorded and self.value() != recorded_sha256(self.path):
            raise UserError(f"{self.path}: damaged or replaced: it does not match its checksum {sidecar(self.path).name}")


def recorded_sha256(path: Path) -> str | None:
    """What the checkpoint's sidecar says, `None` where there is none or it holds no SHA-256."""
    found = re.search(rb"\b[0-9a-fA-F]{64}\b", sidecar(path).read_bytes()) if sidecar(path).is_file() else None
    return found[0].decode().lower() if found else None


def step_path(folder: str | Path, step: int) -> Path:
    """The checkpoint of a step, in a run's `checkpoints` folder."""
    return Path(folder) / f"{step:07d}.pt"


def saved_steps(folder: str | Path) -> list[int]:
    """The steps of the checkpoints in a run's `checkpoints` folder, ascending; none where there is no such folder."""
    try:
        names = [path.name for path in Path(folder).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:  # not to be taken for an empty folder
        raise Unreadable(Path(folder), error) from None
    return sorted(int(name[:-3]) for name in names if re.fullmatch(r"[0-9]{7}\.pt|[1-9][0-9]{7,}\.pt", name))


def load_newest(folder: str | Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, `None` where the folder has none; `warn(message)` tells of each one passed over.

    Raises:
        Unreadable: one that may be whole could not be read; an older one is not taken for it.
        UserError: there are checkpoints, but none is whole.
    """
    passed: list[str] = []
    for step in reversed(saved_steps(folder)):
        try:
            state = load(step_path(folder, step), verify=True)
        except Unreadable:
            raise
        except UserError as error:
            passed.append(str(error))
            continue
        for message in passed:
            warn(f"{message}; passed over for step {step}")
        return state
    if passed:
        raise UserError(f"none of the checkpoints can be resumed; move them away to start anew: {'; '.join(passed)}")
    return None


# ---------------------------------------------------------------------------------------------------------- models


@dataclass
class Weights:
    """What a checkpoint says of its model."""

    state_dict: dict[str, Tensor]
    config: dict[str, Any]  # the recorded options; empty where the file records none
    record: VAERecord = SD_VAE
    step: int = 0
    checksum: Checksum | None = None  # of the file that they are from; rank 0 alone has it

    def check(self) -> None:
        """Raises UserError where the file does not match its sidecar: to be called before the weights are used."""
        if self.checksum is not None:
            self.checksum.check()


def read_weights(
    path: str | Path,
    weights: str = "ema",
    given: dict[str, Any] | None = None,
    *,
    projectors: bool = False,
    checksum: Checksum | None = None,
) -> Weights:
    """One set of weights (`ema`, `ema:DECAY` or `model`) of a checkpoint file; REPA's `projectors` are left aside unless asked for.

    Formats: ours, its safetensors form, the published ELIT code's, a folder of `save_pretrained`, and bare state dicts (REPA's
    `last.pt`, original SiT's, a model's own); a path `hf://owner/repo/file` is fetched from the hub. `given`: options by hand,
    for what a bare state dict does not record. `checksum`: the file's, where it was read before.
    """
    path = local_file(path)
    if checksum is None and path.is_file() and os.environ.get("RANK", "0") == "0":
        checksum = Checksum(path)
    try:
        found = _read(path, weights, given or {})
        if not projectors:
            found.state_dict = {k: v for k, v in found.state_dict.items() if not k.startswith("projectors.")}
        _check_finite(path, found.state_dict)
    except UserError:
        if checksum is not None:
            checksum.check()  # damage is the better reason
        raise
    found.checksum = checksum
    return found


def _read(path: Path, weights: str, given: dict[str, Any]) -> Weights:
    if path.suffix == ".safetensors":
        return _safetensors(path, weights, given)
    state = load(path)
    if "format" in state:
        return _ours(path, state, weights)
    if isinstance(state.get("args"), argparse.Namespace):
        return _published(path, state, weights)
    _check_single(path, weights)
    return _bare(path, state, given)


def build_model(found: Weights, where: str | Path, device: str | torch.device = "cpu", **overrides: Any) -> nn.Module:
    """The model that `found` records, in eval mode with its weights loaded and checked; `overrides` are constructor arguments."""
    config = found.config
    if not config.get("model"):
        raise UserError(f"{where}: the checkpoint records no model; give --model")
    if config["resolution"] % found.record.downsample_factor:
        raise UserError(
            f"{where}: resolution {config['resolution']} is not divisible by the VAE's factor {found.record.downsample_factor}"
        )
    with torch.device("meta"):  # no time spent on initial weights: all of them are replaced
        model = models.create_model(
            config["model"],
            input_size=config["resolution"] // found.record.downsample_factor,
            in_channels=found.record.latent_channels,
            num_classes=config["num_classes"],
            **(model_options(config) | {"fused_attn": config.get("fused_attn", True)} | overrides),
        )
    load_state_dict(model, found.state_dict, where, assign=True)
    found.check()
    return model.to(device).eval().requires_grad_(False)


def load_model(path: str | Path, weights: str = "ema", device: str | torch.device = "cpu", **overrides: Any):
    """(model in eval mode, recorded configuration) of a checkpoint file.

    Args:
        weights: `ema` (the first decay), `ema:0.999` (a named one) or `model` (the raw weights).
        overrides: constructor arguments, e.g. `elit_tail="skip"`.
    """
    found = read_weights(path, weights, overrides)
    return build_model(found, path, device, **overrides), found.config


def model_options(config: dict[str, Any]) -> dict[str, Any]:
    """The constructor arguments among recorded options that this model family knows."""
    spec = models.model_spec(config["model"])
    known = ["qk_norm", *(ELIT_OPTIONS if spec.elastic else []), *(["stages_count"] if spec.staged else [])]
    return {k: config[k] for k in known if k in config}


def load_state_dict(model: nn.Module, state_dict: dict[str, Tensor], where: str | Path, assign: bool = False) -> None:
    """Load all or nothing. Raises UserError that names the first few missing or unknown keys and wrong shapes."""
    own = model.state_dict()
    wrong = [f"{k} is missing" for k in own if k not in state_dict]
    wrong += [f"{k} is unknown" for k in state_dict if k not in own]
    for k in own:
        if k in state_dict and own[k].shape != state_dict[k].shape:
            wrong.append(f"{k} has shape {tuple(state_dict[k].shape)} instead of {tuple(own[k].shape)}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{where}: not a checkpoint of this model: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict(state_dict, assign=assign)


def _check_finite(path: Path, state_dict: dict[str, Tensor]) -> None:
    for name, tensor in state_dict.items():
        if tensor.is_floating_point() and tensor.numel():
            # Four times as fast as isfinite; both ends are NaN where any value is.
            ends = tensor.detach().aminmax()
            if not all(math.isfinite(end.item()) for end in ends):
                raise UserError(f"{path}: {name} has values that are not finite (NaN or infinity): its training diverged")


def _ours(path: Path, state: dict[str, Any], weights: str) -> Weights:
    if state["format"] != FORMAT:
        raise UserError(f"{path}: format {state['format']} is not known; this version reads {FORMAT}")
    missing = [k for k in ("model", "ema", "config", "vae", "step") if k not in state]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing from the checkpoint")
    kind, _, decay = weights.partition(":")
    if kind == "model" and not decay:
        state_dict = state["model"]
    elif kind == "ema" and state["ema"] and (not decay or decay in state["ema"]):
        state_dict = state["ema"][decay or next(iter(state["ema"]))]
    else:
        known = ", ".join(["model", "ema", *(f"ema:{d}" for d in state["ema"])])
        raise UserError(f"--weights {weights}: not in {path}; it holds {known}")
    return Weights(state_dict, state["config"], VAERecord.from_dict(state["vae"], str(path)), state["step"])


# ------------------------------------------------------------------------------------------------ published format

_PUBLISHED_NAMES = {
    "input_token_editor.adapters.0.learned_query_embed": "interface.query",
    "input_token_editor.adapters.0.pos_embed": "interface.read_pos",
    "input_token_editor.adapters.0.latent_pos_embed": "interface.latent_pos",
    "input_token_editor.adapters.0.fit_layer.adaLN_modulation.": "interface.reader.adaLN_modulation.",
    "input_token_editor.adapters.0.fit_layer.latents_attend_to_patches.": "interface.reader.attn.",
    "input_token_editor.adapters.0.fit_layer.read_ff.": "interface.reader.mlp.",
    "output_token_editor.adapters.0.pos_embed": "interface.write_pos",
    "output_token_editor.adapters.0.patches_attend_to_latents.": "interface.writer.attn.",
    "output_token_editor.adapters.0.write_ff.": "interface.writer.mlp.",
}
_PATCH_EMBEDDING = re.compile(r"x_embedder\.(embedders\.\d+\.)?proj\.weight")
PUBLISHED_HEAD_DEPTH = 8  # of an ELIT model whose checkpoint records no encoder_depth


def _published(path: Path, state: dict[str, Any], weights: str) -> Weights:
    """The published ELIT code's format: `model`, `ema`, `steps` and an argparse Namespace of the options."""
    if weights not in ("ema", "model") or weights not in state:
        raise UserError(f"--weights {weights}: not in {path}; it holds {', '.join(k for k in ('model', 'ema') if k in state)}")
    recorded = {k: v for k, v in vars(state["args"]).items() if k in ARCHITECTURE_KEYS}
    recorded = {k: coerce(TrainConfig, k, v, f"{path}: {k}") for k, v in recorded.items() if v is not None}
    found = _bare(path, state[weights], recorded)
    return Weights(found.state_dict, recorded | found.config, step=int(state.get("steps", 0)))


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises UserError where it is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, MemoryError) as error:
        raise Unreadable(path, error) from None
    except SafetensorError as error:
        raise UserError(f"{path}: truncated, or not a safetensors file: {error}") from None


def _safetensors(path: Path, weights: str, given: dict[str, Any]) -> Weights:
    """Weights in a safetensors file: ours where its metadata hold the configuration, else a bare state dict.

    The constructor's arguments that `save_pretrained` writes to a `config.json` beside it are what that does not tell.
    """
    _check_single(path, weights)
    state_dict, metadata = load_safetensors(path)
    if "config" not in metadata:
        beside = path.with_name("config.json")
        try:
            # The mixin leaves out defaults of a constructor's base classes; of these only the tail's is not told by the weights.
            recorded = {"elit_tail": "drop"} | json.loads(beside.read_text()) if beside.is_file() else {}
            recorded = {k: v for k, v in recorded.items() if k in MODEL_OPTIONS}
        except (OSError, ValueError, TypeError, AttributeError):
            raise UserError(f"{beside}: must hold a JSON object") from None
        return _bare(path, state_dict, given | {k: coerce(TrainConfig, k, v, f"{beside}: {k}") for k, v in recorded.items()})
    try:
        config, record = json.loads(metadata["config"]), json.loads(metadata["vae"])
    except (ValueError, KeyError):
        raise UserError(f"{path}: its metadata config and vae must hold JSON") from None
    return Weights(state_dict, config, VAERecord.from_dict(record, str(path)), int(metadata.get("step", 0)))


def _check_single(path: Path, weights: str) -> None:
    if weights not in ("ema", "model"):
        raise UserError(f"--weights {weights}: {path} holds one set of weights")


def _bare(path: Path, state_dict: dict[str, Any], given: dict[str, Any]) -> Weights:
    """A state dict under the published names or ours: what its shapes tell, and for what they don't, the options `given`."""
    if not all(isinstance(v, Tensor) for v in state_dict.values()) or not any(map(_PATCH_EMBEDDING.fullmatch, state_dict)):
        raise UserError(f"{path}: not a checkpoint of a SiT, ELIT or DFM model (it holds {', '.join(list(state_dict)[:3])})")
    state_dict = dict(state_dict)
    if any(k.startswith("decoder_blocks.") for k in state_dict):  # old REPA files
        first = 1 + max(int(k.split(".")[1]) for k in state_dict if k.startswith("blocks."))
        state_dict = {
            re.sub(r"^decoder_blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) + first}", k): v for k, v in state_dict.items()
        }
    published = any(k.startswith("input_token_editor.") for k in state_dict)
    state_dict = {_our_name(k): v for k, v in state_dict.items()}
    channels = next(v.shape[1] for k, v in state_dict.items() if _PATCH_EMBEDDING.fullmatch(k))
    record = load_vae(given["vae"])[1] if given.get("vae") else SD_VAE
    if channels != record.latent_channels:
        raise UserError(
            f"{path}: the model's latents have {channels} channels, {record.vae}'s {record.latent_channels}; give --vae"
        )
    config = _shapes(path, state_dict, given, record)
    spec = models.model_spec(config["model"])
    if not spec.staged and len(state_dict["final_layer.linear.weight"]) == 2 * channels * spec.sizes["patch_size"] ** 2:
        _turn_original_sit(state_dict, channels)
    if spec.elastic:
        names = ("head_depth", "tail_depth", "elit_tail")
        if published:
            # There the head is `encoder_depth` blocks, and the tail latents bypass the core.
            head = given.get("encoder_depth") or PUBLISHED_HEAD_DEPTH
            config |= dict(zip(names, (head, spec.sizes["tail_depth"], "skip"), strict=True))
            _turn_published_interface(state_dict, config, spec, record)
        config |= {name: given[name] for name in names if given.get(name) is not None}
        missing = ["--" + name.replace("_", "-") for name in names if name not in config]
        if missing:
            usual = f"--head-depth {spec.sizes['head_depth']} --tail-depth {spec.sizes['tail_depth']} --elit-tail drop"
            raise UserError(f"{path}: does not tell {', '.join(missing)}; give what it was made with (by default: {usual})")
    return Weights(state_dict, config, record)


def _shapes(path: Path, state_dict: dict[str, Tensor], given: dict[str, Any], record: VAERecord) -> dict[str, Any]:
    """The architecture options that the shapes of a bare state dict tell; `given` fills what they do not."""
    config = {"path_type": given.get("path_type") or "linear"}
    embeddings = [v.shape for k, v in state_dict.items() if _PATCH_EMBEDDING.fullmatch(k)]  # of DFM, one for each stage
    width, patch_size = embeddings[0][0], max(shape[-1] for shape in embeddings)
    depth = 1 + max((int(k.split(".")[1]) for k in state_dict if k.startswith("blocks.")), default=-1)
    elit = "interface.query" in state_dict
    staged = "x_embedder.proj.weight" not in state_dict
    family = ("DFM-" if staged else "") + ("ELIT-SiT" if elit else "SiT")
    sizes = {"depth": depth, "hidden_size": width, "patch_size": patch_size}
    fits = [n for n, s in models.MODELS.items() if s.family == family and sizes.items() <= s.sizes.items()]
    if given.get("model"):
        config["model"] = given["model"]
        if fits and given["model"] not in fits:
            raise UserError(f"--model {given['model']}: {path} holds a {fits[0]}")
    elif fits:
        config["model"] = fits[0]
    else:
        raise UserError(f"{path}: a {family} of depth {depth} and width {width} is no registered size; give --model")
    if "y_embedder.embedding_table.weight" in state_dict:
        config["num_classes"] = len(state_dict["y_embedder.embedding_table.weight"]) - 1
    if "pos_embed" in state_dict:
        config["resolution"] = math.isqrt(state_dict["pos_embed"].shape[1]) * patch_size * record.downsample_factor
    elif given.get("resolution"):
        config["resolution"] = given["resolution"]
    else:
        raise UserError(f"{path}: does not tell the resolution; give --resolution")
    config["qk_norm"] = "blocks.0.attn.q_norm.weight" in state_dict
    if staged:
        config["stages_count"] = len(embeddings)
    if elit:
        config["elit_group_size"] = math.isqrt(len(state_dict["interface.query"]))
        for name, layers in (("elit_read_depth", "reader"), ("elit_write_depth", "writer")):
            config[name] = len({k for k in state_dict if re.fullmatch(rf"interface\.{layers}\.attn\.\d+\.q_proj\.weight", k)})
    return config


def _turn_original_sit(state_dict: dict[str, Tensor], channels: int) -> None:
    """Fold original SiT's conventions into the weights: v(x, t) = −v_SiT(x, 1 − t), and of 2C output channels the first C.

    The sinusoidal features of 1 − t are a rotation of those of t, since cos((1−t)f) = cos f·cos tf + sin f·sin tf and
    sin((1−t)f) = sin f·cos tf − cos f·sin tf; the rotation goes into the time MLP's first Linear, the sign into the last one.
    """
    for kind in ("weight", "bias"):
        value = state_dict[f"final_layer.linear.{kind}"]
        kept = value.unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1)
        state_dict[f"final_layer.linear.{kind}"] = -kept
    weight = state_dict["t_embedder.mlp.0.weight"]
    half = weight.shape[1] // 2
    f = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float64))
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    turned = torch.cat([of_cos * f.cos() + of_sin * f.sin(), of_cos * f.sin() - of_sin * f.cos()], dim=1)
    state_dict["t_embedder.mlp.0.weight"] = turned.to(weight.dtype)


def _our_name(name: str) -> str:
    """A published name of the elastic interface → ours; any other name as it is."""
    published = next((p for p in _PUBLISHED_NAMES if name.startswith(p)), "")
    return _PUBLISHED_NAMES.get(published, "") + name[len(published) :]


def _turn_published_interface(
    state_dict: dict[str, Tensor], config: dict[str, Any], spec: models.ModelSpec, record: VAERecord
) -> None:
    """Published tables of the interface, under our names → ours: six parts of modulation, latent positions in group order."""
    for kind in ("weight", "bias"):
        key = f"interface.reader.adaLN_modulation.1.{kind}"
        if key in state_dict:
            state_dict[key] = state_dict[key][: 6 * spec.sizes["hidden_size"]]  # nothing uses the seventh part
    side = config["resolution"] // record.downsample_factor // spec.sizes["patch_size"]
    g = config["elit_group_size"]
    table = state_dict.get("interface.latent_pos")
    if table is not None and side % g == 0 and table.dim() == 2 and len(table) >= side * side:
        # Raster order of the token grid there, group order here.
        grid = table[: side * side].reshape(side // g, g, side // g, g, -1)
        state_dict["interface.latent_pos"] = grid.transpose(1, 2).reshape(-1, g * g, table.shape[1])


def local_file(path: str | Path) -> Path:
    """A file as it is; of a folder of `save_pretrained` its weights; `hf://owner/repo/file` as the local copy of that file."""
    text = str(path)
    if not text.startswith("hf://"):
        pretrained = Path(path) / PRETRAINED
        return pretrained if pretrained.is_file() else Path(path)
    owner, _, rest = text.removeprefix("hf://").partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository and file):
        raise UserError(f"{text}: must be hf://owner/repo/file")
    for part, plain in ((owner, True), (repository, True), (file, False)):
        check_name(part, text, plain=plain)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    folder, _, name = file.rpartition("/")
    try:
        local = Path(hf_hub_download(f"{owner}/{repository}", file))
        if name == PRETRAINED:  # pushed by `push_to_hub`, it has its configuration beside it
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(f"{owner}/{repository}", f"{folder}/config.json".lstrip("/"))
        return local
    except Exception as error:  # network, authentication, no such repository or file, no space …
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{text}: could not be downloaded ({type(error).__name__}: {reason}); give a local file") from None
