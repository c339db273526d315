"""SIGKILLs at seeded moments in convert, encode and pack: `python -m benchmarks.data_kill [--kills 20] [--seed 0]`.

Each command is killed repeatedly, a fifth of the times inside a write, and run again; the final output must be byte-identical to
that of an uninterrupted run. Commands run in forks of this process, which has imported everything.
"""

import argparse
import contextlib
import hashlib
import os
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import dataset_tools
from common import files
from common.errors import cli_main
from common.torchvision_shim import import_torchvision
from preprocessing import demo, output, packed_writer

IMAGES, VAE = 400, "experiments_updated/quickstart_vae"


def digest(path: Path) -> dict[str, str]:
    """Every file below `path` (or the file itself) → the hash of its bytes."""
    paths = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path.parent).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def child(argv: list[str], spoil: Callable[[], None] = lambda: None) -> int:
    """Start a command in its own process group; `spoil` is called there first. Returns its process id."""
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)
        return pid
    status = 1
    with contextlib.suppress(ProcessLookupError):
        os.setpgid(0, 0)
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        spoil()
        dataset_tools.main(argv)
        status = 0
    finally:
        os._exit(status)


def die_inside_a_write(which: int) -> Callable[[], None]:
    """For `child`: at the write number `which`, of a file, a zip's member or a block, half of it is written, then all are killed."""

    def spoil() -> None:
        done = 0

        def half(write: Callable[[bytes], object], content: bytes) -> None:
            nonlocal done
            done += 1
            if done == which:
                write(content[: len(content) // 2])
                os.killpg(0, signal.SIGKILL)

        write_file, append, writestr = files.write_atomically, packed_writer.ShardWriter.append, zipfile.ZipFile.writestr

        def spoiled_write_file(path: Path, content: bytes | str, **options) -> None:
            half(files.aside_of(path).write_bytes, content.encode() if isinstance(content, str) else content)
            write_file(path, content, **options)

        def spoiled_append(writer: packed_writer.ShardWriter, moments: np.ndarray) -> None:
            half(lambda content: (writer._file.write(content), writer._file.flush()), moments.tobytes())
            append(writer, moments)

        def spoiled_writestr(archive: zipfile.ZipFile, info: zipfile.ZipInfo, content: bytes) -> None:
            info.CRC = info.file_size = info.compress_size = 0  # as zipfile first writes a header
            half(lambda part: (archive.fp.write(info.FileHeader() + part), archive.fp.flush()), content)
            writestr(archive, info, content)

        zipfile.ZipFile.writestr = spoiled_writestr
        for module in (files, packed_writer, output):
            module.write_atomically = spoiled_write_file
        packed_writer.ShardWriter.append = spoiled_append

    return spoil


def soak(name: str, argv: list[str], dest: Path, kills: int, seed: int) -> bool:
    """Kill a command `kills` times; True if the result is that of an uninterrupted run."""
    whole = dest.with_name("whole-" + dest.name)
    start = time.perf_counter()
    _, status = os.waitpid(child([*argv, f"--dest={whole}"]), 0)
    seconds = time.perf_counter() - start
    assert status == 0, f"{name} fails when it is not interrupted"
    expected = {file.removeprefix("whole-"): h for file, h in digest(whole).items()}
    rng = np.random.default_rng(seed)
    killed = rounds = 0
    while killed < kills:
        rounds += 1
        in_write = killed % 5 == 4
        # Late enough to get on, early enough to be stopped: the work of one run is spread over a few kills.
        delay, which = rng.uniform(0.02, 0.5) * seconds, int(rng.integers(1, 12))
        pid = child([*argv, f"--dest={dest}"], die_inside_a_write(which) if in_write else lambda: None)
        if in_write:
            moment = f"inside write {which}"
        else:
            moment = f"after {delay:.3f} s"
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                # Every other time the workers are left behind, as when the system is short of memory.
                (os.killpg if killed % 2 else os.kill)(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            killed += 1
            there = sum(1 for p in dest.rglob("*") if p.is_file()) if dest.is_dir() else int(dest.exists())
            print(f"  {name}, kill {killed:2d}: {moment}; {there} files there", flush=True)
            if not dest.exists() or digest(dest) != expected:
                continue
        elif os.WEXITSTATUS(status):
            print(f"{name}: failed by itself after kill {killed}")
            return False
        elif digest(dest) != expected:
            print(f"{name}: DIFFERS after kill {killed}")
            return False
        # It came through, or was killed when all was done: once more from the start.
        for path in sorted(dest.rglob("*"), reverse=True) if dest.is_dir() else []:
            path.rmdir() if path.is_dir() else path.unlink()
        dest.rmdir() if dest.is_dir() else dest.unlink()
    _, status = os.waitpid(child([*argv, f"--dest={dest}"]), 0)
    same = status == 0 and digest(dest) == expected
    print(f"{name}: {kills} kills in {rounds} runs, {'byte-identical to' if same else 'DIFFERS from'} the uninterrupted run")
    return same


@cli_main
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="data_kill.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each command [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    import_torchvision()
    from accelerate import PartialState  # noqa: F401  loaded before the forks
    from diffusers import AutoencoderKL  # noqa: F401

    good = True
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for i, (digit, _, canvas) in zip(range(IMAGES), demo.demo_canvases(held_out=True, per_class=40), strict=True):
            path = root / f"source/{digit}/{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(canvas).save(path)
        (root / "source/3/broken.png").write_bytes(b"no image")
        convert = ["convert", f"--source={root}/source", "--resolution=64x64", "--workers=2"]
        encode = ["encode", f"--source={root}/images", f"--vae={VAE}", "--batch-size=8"]
        pack = ["pack", f"--source={root}/vae-sd", "--shard-size=60"]
        good &= soak("convert to a zip", convert, root / "images.zip", args.kills, args.seed)
        good &= soak("convert", convert, root / "images", args.kills, args.seed + 1)
        good &= soak("encode", encode, root / "vae-sd", args.kills, args.seed + 2)
        good &= soak("encode --packed", [*encode, "--packed", "--shard-size=60"], root / "packed", args.kills, args.seed + 3)
        good &= soak("pack", pack, root / "packed2", args.kills, args.seed + 4)
    sys.exit(not good)


if __name__ == "__main__":
    main()
