"""What the parts of the check write down, and how each runs in a process of its own.

A part is a function of a `Run`. It is forked before anything has touched CUDA, so that a crash, a wait without end or a setting of
one part is no matter of the next. What it measures goes line by line to the main process, which keeps it whatever comes after.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.distributed import end_with_parent
from common.errors import first_line

ROOT = Path(__file__).resolve().parents[2]
Entry = dict[str, Any]  # a note or a check, as it stands in gpu.json
Job = Callable[[Callable[[Entry], None]], None]


@dataclass
class Run:
    """What a part needs, and where its results go.

    Attributes:
        tiny: small models and few repeats; times are not judged.
        folder: for the part's files.
        known: the entries of the parts before, by part.
        send: takes an entry.
    """

    tiny: bool
    folder: Path
    known: Mapping[str, list[Entry]] = field(default_factory=dict)
    send: Callable[[Entry], None] = print

    @property
    def cuda(self) -> bool:
        """Whether it runs on a GPU; not to be asked before a fork."""
        return torch.cuda.is_available()

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device("cuda" if self.cuda else "cpu")

    def size(self, full: Any, tiny: Any) -> Any:
        """One of the two."""
        return tiny if self.tiny else full

    def note(self, name: str, values: Mapping[str, Any], text: str | None = None) -> None:
        """Something measured; `text` stands for the values in the table."""
        self.send({"name": name, "values": dict(values), **({"text": text} if text else {})})

    def check(
        self, name: str, value: float, bound: float, *, at_least: bool = False, is_time: bool = False, why: str = ""
    ) -> None:
        """A value with its bound. `is_time`: of times, which tiny models and CPUs do not have to meet."""
        passed = value >= bound if at_least else value <= bound  # NaN passes neither
        judged = not is_time or (self.cuda and not self.tiny)
        sign = "≥" if at_least else "≤"
        self.send(
            {"name": name, "value": value, "sign": sign, "bound": bound, "passed": passed if judged else None, "why": why}
        )

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What fails inside is one failed check of this name, and the part goes on."""
        try:
            yield
        except Exception as error:  # of any library
            traceback.print_exc()
            self.send({"name": name, "passed": False, "why": f"{describe(error)}"})

    def measured(self, part: str, name: str, key: str) -> float | None:
        """What another part has noted; None where it did not run."""
        notes = [entry["values"] for entry in self.known.get(part, ()) if entry["name"] == name and "values" in entry]
        return notes[-1].get(key) if notes else None


def describe(error: BaseException) -> str:
    """Type, first line, and the last place in this project."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT)) and "/.venv/" not in f.filename
    ]
    own = [f for f in frames if f"{os.sep}benchmarks{os.sep}" not in f.filename] or frames
    where = f" ({Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"


# ------------------------------------------------------------------------------------------------------ processes


def isolated(job: Job, log: Path, seconds: float, on_entry: Callable[[Entry], None]) -> str | None:
    """Run `job(send)` in a forked process; each entry that it sends goes to `on_entry`. Returns what went wrong, if anything did.

    Args:
        job: the work.
        log: file for what it prints.
        seconds: after which it is ended, with the processes that it started.
        on_entry: called while it runs.
    """
    read, write = os.pipe()
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if not pid:
        _work(job, log, write)
    os.close(write)
    os.set_blocking(read, False)
    deadline, text, status = time.monotonic() + seconds, b"", None
    problem = None
    try:
        while status is None:
            select.select([read], [], [], 0.05)
            ended, code = os.waitpid(pid, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if ended else None
            text = _entries(text + _available(read), on_entry)
            if status is None and time.monotonic() > deadline:
                problem = f"ended after {seconds:.0f} s"
                break
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # itself, and what it left running
        if status is None:
            os.waitpid(pid, 0)
        os.close(read)
    if problem or status == 0:
        return problem
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"failed; see {log.name}"


def _work(job: Job, log: Path, write: int) -> None:
    """The forked process: never returns."""
    status = 1
    try:
        os.setsid()
        end_with_parent()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(out, 1), os.dup2(out, 2)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
        stream = os.fdopen(write, "w")

        def send(entry: Entry) -> None:
            stream.write(json.dumps(entry) + "\n")
            stream.flush()

        try:
            job(send)
            status = 0
        except Exception as error:
            traceback.print_exc()
            send({"error": describe(error)})
    except SystemExit as stop:  # of a script: 2 after its line on stderr
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _available(read: int) -> bytes:
    text = b""
    with contextlib.suppress(BlockingIOError):
        while part := os.read(read, 2**16):
            text += part
    return text


def _entries(text: bytes, on_entry: Callable[[Entry], None]) -> bytes:
    """Hand over the whole lines; returns what is after the last of them."""
    *lines, rest = text.split(b"\n")
    for line in lines:
        on_entry(json.loads(line))
    return rest
