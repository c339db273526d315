"""Everything that only a GPU can show, in nine minutes: `python -m benchmarks.gpu --minutes 8.5 --out DIR`.

Speed, precision, waits, repeatability and memory of training, sampling and what is around them, by the code that they run, each with
its bound. DIR/gpu.json is written after each part and gpu.md at the end, a table for docs/gpu.md. `--tiny` runs all parts on a
CPU with small models. Nothing is downloaded: models and VAEs have random weights.
"""

import argparse
import contextlib
import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import attention, decoding, machine, numbers, report, runs, sampling, system, training, waiting
from benchmarks.gpu.record import Entry, Run, isolated
from benchmarks.gpu.work import register_nano
from common.errors import UserError, cli_main, did_you_mean
from common.files import write_atomically, write_json
from common.torchvision_shim import import_torchvision

GRACE = 60  # seconds after --minutes, when the part that is still running is ended
PARTS: dict[str, Callable[[Run], None]] = {
    "machine": machine.machine,
    "attention": attention.attention,
    "waiting": waiting.waiting,
    "parity": numbers.parity,
    "sets": numbers.sets,
    "resume": runs.resume,
    "training": training.training,
    "sampling": sampling.sampling,
    "decoding": decoding.decoding,
    "saving": system.saving,
    "neighbours": system.neighbours,
    "command lines": runs.command_lines,
}


def preload(device: str) -> None:
    """Import what several parts need, once; nothing of it may touch CUDA, or no fork could use it."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # whoever asks whether there is a GPU does not start CUDA
    for name in ("train", "generate", "evaluate"):
        importlib.import_module(name)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        with contextlib.suppress(ImportError):  # the parts that need it say so
            import_torchvision()
            importlib.import_module("diffusers.models.autoencoders.autoencoder_kl")  # which asks for devices


def run_part(name: str, tiny: bool, out: Path, results: dict[str, Any], seconds: float) -> None:
    """Run a part and put what it found into the results."""
    entries: list[Entry] = []
    part = results["parts"][name] = {"status": "failed", "seconds": 0.0, "entries": entries}
    problems = []

    def on_entry(entry: Entry) -> None:
        if "error" in entry:
            problems.append(entry["error"])
            return
        entries.append(entry)
        print(report.line(name, entry), flush=True)

    known = {done: values["entries"] for done, values in results["parts"].items()}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="benchmark", ignore_cleanup_errors=True) as folder:
        run = Run(tiny, Path(folder), known)

        def job(send: Callable[[Entry], None]) -> None:
            run.send = send
            if tiny:
                register_nano()
            PARTS[name](run)

        log = out / "logs" / f"{name.replace(' ', '-')}.log"
        if problem := isolated(job, log, seconds, on_entry):
            part["problem"] = problems[0] if problems else problem
            print(f"FAIL  {name}: {part['problem']}", flush=True)
        else:
            part["status"] = "done"
    part["seconds"] = round(time.monotonic() - begin, 1)


def chosen_parts(text: str | None) -> list[str]:
    """The parts that `--parts` names, in their order."""
    names = list(PARTS) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PARTS:
            raise UserError(f"--parts {name}: no such part{did_you_mean(name, PARTS)}; choose from {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def check_cuda(out: Path) -> None:
    """Raise UserError where a forked process cannot use a GPU."""

    def probe(send: Callable[[Entry], None]) -> None:
        torch.zeros(1, device="cuda").sum().item()

    if isolated(probe, out / "logs" / "device.log", 120, lambda _: None):
        raise UserError(f"--device cuda: there is no GPU that works ({out / 'logs' / 'device.log'}); --tiny runs on a CPU")


def check_all(names: list[str], tiny: bool, minutes: float, out: Path) -> dict[str, Any]:
    """Run the parts; gpu.json after each."""
    results: dict[str, Any] = {"versions": {}, "minutes": minutes, "tiny": tiny, "parts": {}}
    begin = time.monotonic()
    problem = isolated(lambda send: send(machine.versions()), out / "logs" / "versions.log", 60, results["versions"].update)
    results["versions"] |= {"problem": problem} if problem else {}
    print(", ".join(f"{name} {value}" for name, value in results["versions"].items()), flush=True)
    for name in names:
        left = 60 * minutes - (time.monotonic() - begin)
        if left <= 0:
            results["parts"][name] = {"status": "not begun", "seconds": 0.0, "entries": []}
        else:
            run_part(name, tiny, out, results, left + GRACE)
        write_json(report.as_json(results), out / "gpu.json", option="--out")
    results["seconds"] = round(time.monotonic() - begin, 1)
    write_json(report.as_json(results), out / "gpu.json", option="--out")
    return results


@cli_main
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", default="gpu", help="folder of gpu.json, gpu.md and logs/, made where it is missing [%(default)s]"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="after which no part begins [%(default)s]")
    parser.add_argument("--parts", help=f"some of them, separated by commas: {', '.join(PARTS)} [all]")
    parser.add_argument(
        "--tiny", action="store_true", help="small models, on a CPU unless --device says otherwise; no time is judged"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], help="[cuda; with --tiny cpu]")
    args = parser.parse_args(argv)
    names, out = chosen_parts(args.parts), Path(args.out)
    if not args.minutes >= 0:
        raise UserError(f"--minutes {args.minutes:g}: must be at least 0")
    try:
        shutil.rmtree(out / "logs", ignore_errors=True)
        (out / "logs").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made: {error}") from None
    device = args.device or ("cpu" if args.tiny else "cuda")
    preload(device)
    if device == "cuda":
        check_cuda(out)
    results = check_all(names, args.tiny, args.minutes, out)
    text = report.tables(report.as_json(results))
    write_atomically(out / "gpu.md", text, option="--out")
    print(f"\n{text}\n{out / 'gpu.json'}: {report.failures(results['parts'])} failed, {results['seconds']:.0f} s")
    if report.failures(results["parts"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
