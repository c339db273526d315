"""A training state as a folder with a part from each process, by `torch.distributed.checkpoint` (`--shard`).

    0010000.dcp/
        state.pt        the training state as in the one-file form, with meta tensors in place of what the parts hold
        .metadata       which part holds what
        __0_0.distcp    process 0's part
        sha256sums      SHA-256 of each of these files, as `sha256sum` writes and checks them

The folder is written under another name and renamed once all of it is on the disk. Any number of processes can read it. `.metadata`
is a pickle: it is read with nothing allowed but what DCP itself puts there.
"""

import contextlib
import hashlib
import os
import pickle
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint.records import FORMAT
from common.errors import UserError, first_line
from common.file_facts import known_sha256
from common.files import file_sha256, sync_folder
from common.tensor_files import HashingFile, Unreadable, load

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

ENDING = ".dcp"
RECORD, METADATA, SUMS = "state.pt", ".metadata", "sha256sums"
READERS = 8  # threads that verify parts


def identity(path: Path) -> Path:
    """The file that changes where a checkpoint does: of a folder its checksums."""
    return path / SUMS if is_sharded(path) else path


def is_sharded(path: str | Path) -> bool:
    """Whether it is such a folder, whole or damaged."""
    path = Path(path)
    return path.is_dir() and (path.suffix == ENDING or (path / RECORD).is_file())


# ---------------------------------------------------------------------------------------------------------------- write


def save(path: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Write a training state: DTensors, of which each process has a part, to the parts, all else to `state.pt`, by rank 0.

    Args:
        path: the folder; one that is there is replaced, once the new one is whole.
        state: as in the one-file form. Without `group` its large tensors are whole, and go to one part.
        group: of all processes, each of which calls this; one that works on the CPU.

    Raises:
        OSError: in every process, where one of them could not write; nothing that was there has changed.
    """
    aside, tensors = path.with_name(path.name + ".tmp"), dict(_parts(state, group is None))
    is_main = group is None or dist.get_rank() == 0
    try:
        with _agreed(group):
            if is_main:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
        _write_parts(aside, tensors, group)
        with _agreed(group):
            if is_main:
                _write_record(aside / RECORD, _without(state, tensors))
        sums = _sums_of(aside, group)
        with _agreed(group):
            if is_main:
                _write_sums(aside / SUMS, sums)
                sync_folder(aside)
                _replace(aside, path)
    except BaseException:
        if is_main:
            shutil.rmtree(aside, ignore_errors=True)  # its room on the disk is needed
        raise


def _write_parts(aside: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts

    writer = FileSystemWriter(aside)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process writes alone
            save_parts(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise OSError(f"process {rank}: {first_line(reason)}") from None


def _write_record(path: Path, record: dict[str, Any]) -> None:
    out = HashingFile(path)
    with contextlib.closing(out):
        torch.save({"format": FORMAT} | record, out)  # pyright: ignore[reportArgumentType], it only writes and flushes


def _sums_of(aside: Path, group: dist.ProcessGroup | None) -> dict[str, str]:
    """SHA-256 by name; every process computes those of its own parts."""
    rank, problem, own = 0 if group is None else dist.get_rank(), None, {}
    try:
        names = [p.name for p in aside.iterdir()]
        mine = [n for n in names if n.startswith(f"__{rank}_") or (not rank and n in (RECORD, METADATA))]
        own = {name: file_sha256(aside / name) for name in mine}
    except OSError as error:
        problem = str(error)
    gathered: list[Any] = [(own, problem)]
    if group is not None:
        gathered = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (own, problem), group=group)
    for _, message in gathered:
        if message:
            raise OSError(message)
    return {name: value for sums, _ in gathered for name, value in sums.items()}


def _write_sums(path: Path, sums: dict[str, str]) -> None:
    out = HashingFile(path)
    with contextlib.closing(out):
        out.write("".join(f"{value}  {name}\n" for name, value in sorted(sums.items())).encode())


def _replace(aside: Path, path: Path) -> None:
    """A folder cannot be renamed over another: until the new one is there, the old one has a name under which it is found, too."""
    old = path.with_name(path.name + ".old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    aside.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _agreed(group: dist.ProcessGroup | None) -> Iterator[None]:
    """What one process does inside has failed in all of them, or in none."""
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    if group is None:
        if problem is not None:
            raise problem
        return
    problems: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, None if problem is None else str(problem), group=group)
    for message in filter(None, problems):
        raise OSError(message) from None


# ----------------------------------------------------------------------------------------------------------------- read


def read_record(path: str | Path) -> dict[str, Any]:
    """The training state in a folder, with meta tensors in place of what the parts hold. Raises as `tensor_files.load`."""
    return load(Path(path) / RECORD)


def read(path: str | Path, values: Any, place: str = "") -> Any:
    """`values`, a part of `read_record(path)`, with its tensors. place: where in the record it stands, e.g. "ema/0.9999".

    Raises UserError where a part is missing or damaged.
    """
    path = Path(path)
    missing = {key: v for key, v in _leaves(values, place) if _is_meta(v)}
    try:
        held = sum(part.stat().st_size for part in path.glob("*.distcp"))
    except OSError as error:
        raise Unreadable(path, error) from None
    if sum(v.nbytes for v in missing.values()) > held:  # before memory is taken for it
        raise UserError(f"{path}: a part is missing or damaged: its parts hold {held:,} bytes, fewer than its tensors have")
    targets = {key: torch.empty_like(v, device="cpu") for key, v in missing.items()}
    _read_into(path, targets)
    return _filled(values, targets, place)


def fill(targets: dict[str, Any], state: dict[str, Any], where: Path) -> None:
    """Bring each tensor of `targets`, whole or a process's part of it, to what `state` has in its place.

    state: a record of the folder `where`, or a training state with all tensors. Raises UserError as `read`.
    """
    whole = dict(_leaves(state, ""))
    from_parts: dict[str, Tensor] = {}
    for key, target in _leaves(targets, ""):
        if _is_meta(whole[key]):
            from_parts[key] = target.detach()
        elif is_dtensor(target):
            target.detach().to_local().copy_(_own_part(whole[key], target))
        else:
            target.detach().copy_(whole[key])
    _read_into(where, from_parts)


def _own_part(whole: Tensor, like: Any) -> Tensor:
    """This process's part of `whole`, split as the DTensor `like`."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offsets = compute_local_shape_and_global_offset(whole.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(first, first + length) for first, length in zip(offsets, shape, strict=True))]


def _read_into(path: Path, targets: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    if not targets:
        return
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process reads alone, which is what is wanted
            load_parts(targets, storage_reader=_reader(path), planner=planner, no_dist=True)
    except MemoryError as error:
        raise Unreadable(path, error) from None
    except (Exception, CheckpointException) as error:  # whatever damaged parts make of it; the latter is no Exception
        reason = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if isinstance(reason, OSError) and not isinstance(reason, FileNotFoundError):
            raise Unreadable(path, reason) from None
        raise UserError(f"{path}: a part is missing or damaged: {first_line(reason)}") from None


def _reader(path: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            with (path / METADATA).open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            metadata.storage_meta = None
            names = {info.relative_path for info in metadata.storage_data.values()}
            if any(not re.fullmatch(r"__\d+_\d+\.distcp", str(name)) for name in names):
                raise UserError("its .metadata names files that are no parts")
            return metadata

    return Reader(path)


class _MetadataUnpickler(pickle.Unpickler):
    """What DCP writes into `.metadata`, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            "torch.distributed.checkpoint.metadata": {
                "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
                "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
            },
            "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
            "torch": {"Size", "float32", "float16", "bfloat16", "float64", "strided"},
            "torch.serialization": {"_get_layout"},
            "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath"},
        }  # fmt: skip
        if name not in allowed.get(module, ()):
            raise UserError(f"refused: its .metadata carries code ({module}.{name}), nothing of which was run")
        return super().find_class(module, name)


class Checksum:
    """The SHA-256 of a folder: that of its `sha256sums`. A thread verifies the parts while the model is built.

    As `tensor_files.Checksum`; with `reread` each file is read even where it is known not to have been written to.
    """

    def __init__(self, path: Path, *, reread: bool = False):
        self.path, self._hash = path, file_sha256 if reread else known_sha256
        self._problem: UserError | None = None
        self._thread = threading.Thread(target=self._verify, name="checksum", daemon=True)
        self._thread.start()

    def value(self) -> str:
        """In hexadecimal. Raises Unreadable."""
        return hashlib.sha256(self._sums()).hexdigest()

    def check(self) -> None:
        """Raises UserError where a part is missing, or is not what was written."""
        self._thread.join()
        if self._problem is not None:
            raise self._problem

    def _sums(self) -> bytes:
        try:
            return (self.path / SUMS).read_bytes()
        except FileNotFoundError:
            raise UserError(f"{self.path}: its {SUMS} is missing") from None
        except OSError as error:
            raise Unreadable(self.path / SUMS, error) from None

    def _verify(self) -> None:
        try:
            sums = re.findall(rb"^([0-9a-f]{64})  (\S+)$", self._sums(), re.MULTILINE)
            recorded = {os.fsdecode(name): value.decode() for value, name in sums}
            for name in (RECORD, METADATA):
                if name not in recorded:
                    raise UserError(f"{self.path}: its {SUMS} is damaged")
            with ThreadPoolExecutor(READERS) as pool:
                list(pool.map(self._verify_part, recorded, recorded.values()))
        except UserError as error:
            self._problem = error

    def _verify_part(self, name: str, recorded: str) -> None:
        path = self.path / Path(name).name
        try:
            value = self._hash(path)
        except FileNotFoundError:
            raise UserError(f"{self.path}: its part {name} is missing") from None
        except (OSError, MemoryError) as error:
            raise Unreadable(path, error) from None
        if value != recorded:
            raise UserError(f"{self.path}: damaged: its part {name} does not match its checksum in {SUMS}")


# ------------------------------------------------------------------------------------------------------- nested values


def is_dtensor(value: Any) -> bool:
    """Whether it is a tensor of which each process has a part; their module takes a while to import."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: its part of a DTensor, else all."""
    return cast("DTensor", tensor).to_local() if is_dtensor(tensor) else tensor


def with_local(tensor: Tensor, own: Tensor) -> Tensor:
    """`own`, on any device, as what this process has of `tensor`."""
    if not is_dtensor(tensor):
        return own
    whole: Any = tensor  # `DTensor.from_local` would move it to the device
    return type(whole)(own, whole._spec, requires_grad=False)


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _leaves(values: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Whatever is no dict, by the keys that lead there, joined with "/"."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _leaves(value, f"{place}/{key}" if place else str(key))
    else:
        yield place, values


def _parts(state: dict[str, Any], whole: bool) -> Iterator[tuple[str, Tensor]]:
    """What goes to the parts: DTensors, or with `whole` all tensors of weights, averages and moments."""
    for key, value in _leaves(state, ""):
        is_large = isinstance(value, Tensor) and key.startswith(("model/", "ema/", "optimizer/state/")) and value.dim() > 0
        if is_dtensor(value) or (whole and is_large):
            yield key, value


def _without(state: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """`state` with meta tensors in place of `tensors`."""
    shapes = {key: torch.empty(v.shape, dtype=v.dtype, device="meta") for key, v in tensors.items()}
    return _filled(state, shapes, "")


def _filled(values: Any, tensors: dict[str, Tensor], place: str) -> Any:
    if isinstance(values, dict):
        return {key: _filled(value, tensors, f"{place}/{key}" if place else str(key)) for key, value in values.items()}
    return tensors.get(place, values)
