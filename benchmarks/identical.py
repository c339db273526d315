"""Records what the scripts compute, so that a change of the code alone can be shown to change no bit of it.

    python -m benchmarks.identical record OLD.json --keep OLD_RUNS                     # before the change
    python -m benchmarks.identical record NEW.json                                     # after it
    python -m benchmarks.identical compare OLD.json NEW.json --old-runs OLD_RUNS       # exit code 1: something differs

Only command lines are used, never the modules behind them, so this file works on both versions. Everything runs on the CPU with
one thread; results are the same to the bit on one machine with one set of libraries. The part `quickstart` runs only where
`--only` names it (half an hour). `--keep DIR` keeps what is made, and reuses what DIR holds. `--old-runs DIR` repeats, with the
code of now and the data and checkpoints in DIR, whatever starts from a checkpoint, and compares that with OLD.json too.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
VAE, ENCODER = "experiments_updated/quickstart_vae", "vit_tiny_patch16_224"
TIMED = re.compile("per_second|tflops|mfu|latency|quartiles|seconds|memory|_ms$")  # keys of values that no two runs share
TIMED_PICTURES = {"image_grid.png", "budget_vs_latency.png"}  # of the inference tools: they show milliseconds

# In all commands {NAME} stands for the path of what `Work.make` makes under that name.
DATA = {  # output → command of dataset_tools.py
    "train/images": "convert --resolution=64x64 --source={demo}/val",
    "train/vae-sd": f"encode --model-url={VAE} --source={{train/images}}",
    "small.zip": "convert --resolution=32x32 --source={demo}/val",
    "small/packed": f"encode --vae={VAE} --packed --shard-size=200 --source={{small.zip}}",
    "val/vae-sd": f"encode --vae={VAE} --max-images=12 --source={{small.zip}}",
    "latents.zip": f"encode --vae={VAE} --max-images=7 --source={{small.zip}}",
    "enlarged": "convert --resolution=64x64 --source={small.zip}",
    "float16": f"encode --vae={VAE} --dtype=float16 --batch-size=7 --max-images=20 --source={{train/images}}",
    "packed": "pack --shard-size=200 --source={train/vae-sd}",
    "packed16": "pack --dtype=float16 --source={latents.zip}",
    "squeezed": "convert --resolution=32x32 --workers=2 --source={odd}",
}
for crop in ("center-crop", "center-crop-wide", "center-crop-dhariwal"):
    DATA[crop] = f"convert --resolution=64x64 --transform={crop} --source={{odd}}"
COMMON = (
    "--data-dir {train/vae-sd}/.. --resolution 64 --num-classes 10 --batch-size 4 --learning-rate 2e-3 --ema-decay 0.5 "
    "--max-train-steps 20 --checkpointing-steps 10 --log-every 1 --sampling-steps 0 --num-workers 0 --mixed-precision no "
    "--report-to none"
)  # a fast average, so that sampling shows what was learnt and not the first weights, whose velocity is 0
BUDGETS, STAGES = "--elit-min-mask-prob 0 --elit-max-mask-prob 0.9375", "--stage-weights 0.4 0.6 --num-steps-per-scale 6 4"
RUNS = {  # name → options of train.py after the common ones
    "SiT": "--model SiT-Ti/2",
    "ELIT-SiT": f"--model ELIT-SiT-Ti/2 {BUDGETS}",
    "DFM-SiT": f"--model DFM-SiT-Ti/2 {STAGES}",
    "DFM-ELIT-SiT": f"--model DFM-ELIT-SiT-Ti/2 {BUDGETS} {STAGES}",
    "SiT-REPA": f"--model SiT-Ti/2 --enc-type timm/{ENCODER} --proj-coeff 0.5 --encoder-depth 4 --encoder-weights {{encoder}}",
    "from-SiT": f"--model ELIT-SiT-Ti/2 {BUDGETS} --init-from {{SiT}}",
    "options": "--model ELIT-SiT-Ti/4 --elit-group-size 2 --elit-min-mask-prob 0 --elit-max-mask-prob 0.75 --elit-tail skip "
    "--data-dir {small/packed}/.. --resolution 32 --val-data-dir {val/vae-sd}/.. --sampling-steps 20 --seed 3 --qk-norm "
    "--gradient-accumulation-steps 2 --lr-scheduler-type cosine --warmup-steps 4 --ema-decay 0.5 0.9 --weighting lognormal "
    "--path-type cosine --latent-norm channel --time-shift 1.5 --adam-weight-decay 0.01 --max-grad-norm 0.5 --num-workers 1",
}
SCHEDULE = "--inference-budget 0.25@1.0-0.5,1.0@0.5-0.0"
SAMPLES = {  # name → checkpoint and options of generate.py
    "SiT ODE": "{SiT}",
    "SiT SDE": "{SiT} --mode sde",
    "SiT with REPA": "{SiT-REPA} --guidance-low 0.2 --guidance-high 0.8",
    "options": "{options} --weights ema:0.9 --global-seed 5 --per-proc-batch-size 3 --class-labels balanced",
    "ELIT ODE": "{ELIT-SiT}",
    "ELIT SDE": "{ELIT-SiT} --mode sde --inference-budget 0.5",
    "ELIT Heun": "{ELIT-SiT} --heun --inference-budget 0.25 --weights model",
    "ELIT cheap CFG": "{ELIT-SiT} --unconditional-inference-budget 0.0625",
    "ELIT autoguidance": "{ELIT-SiT} --unconditional-inference-budget 0.0625 --autoguidance",
    "ELIT budget schedule": f"{{ELIT-SiT}} {SCHEDULE}",
    "DFM preview": "{DFM-SiT} --preview",
    "DFM-ELIT preview": "{DFM-ELIT-SiT} --preview --inference-budget 0.5",
}
TOOLS = {  # name → tool, checkpoint and options
    "multibudget": f"multibudget {{ELIT-SiT}} --budgets 0.0625 0.5 1 --attention {SCHEDULE}",
    "multibudget DFM": "multibudget {DFM-ELIT-SiT} --budgets 0.25 1 --attention",
    "ccfg": "ccfg {ELIT-SiT} --cfg-scales 1 2 4",
    "ccfg schedule": f"ccfg {{ELIT-SiT}} --cfg-scales 3 {SCHEDULE} --guidance-low 0.3 --heun",
    "ccfg DFM": "ccfg {DFM-ELIT-SiT} --cfg-scales 3 --unconditional-inference-budget 0.25",
}


def sha256(content: bytes) -> str:
    """The hash of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def tree(path: Path) -> dict[str, str]:
    """The hash of a file, or of every file below a folder, by relative name."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {file.relative_to(path.parent).as_posix(): sha256(file.read_bytes()) for file in files}


def weights(path: Path) -> dict[str, str]:
    """A hash of each set of weights in a checkpoint: of the names, types, shapes and bytes of its tensors, by name."""
    state, hashes = torch.load(path, map_location="cpu", weights_only=True), {}
    for name, tensors in ({"model": state["model"]} | state["ema"]).items():
        parts = ((f"{key} {v.dtype} {tuple(v.shape)} ".encode(), v.numpy().tobytes()) for key, v in sorted(tensors.items()))
        hashes[name] = sha256(b"".join(part for pair in parts for part in pair))
    return hashes


def timeless(value: Any) -> Any:
    """Decoded JSON without the entries that depend on the time a run took."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not TIMED.search(key)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def read_run(folder: Path) -> dict[str, Any]:
    """What a training run left: lines of metrics.jsonl, the last checkpoint's weights, pictures."""
    last = max((folder / "checkpoints").glob("*.pt"))
    lines = [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"checkpoint": last.name, "weights": weights(last), "metrics.jsonl": lines} | tree(folder / "samples")


def read_samples(folder: Path) -> dict[str, str]:
    """Hashes of the pixels of all sample sets below a folder: of each .npz, and of each coarser stage's images."""
    pixels = {path: np.load(path)["arr_0"] for path in folder.rglob("*.npz")}
    for stage in folder.rglob("*-stage?/"):
        pixels[stage] = np.stack([np.asarray(Image.open(file)) for file in sorted(stage.glob("*.png"))])
    return {f"{path.relative_to(folder)} {pixels[path].shape}": sha256(pixels[path].tobytes()) for path in sorted(pixels)}


def odd_images(folder: Path) -> None:
    """Noise over slopes, of several sizes and modes, in folders of classes; one file is no image."""
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate([(97, 64), (64, 140), (300, 200), (64, 64), (70, 71)]):
        slope = np.linspace(0, 120, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
        image = Image.fromarray((slope + rng.integers(0, 76, (height, width, 3))).astype(np.uint8))
        (folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        image.convert("L" if i == 3 else "RGB").save(folder / f"class{i % 2}/{i}.png")
    (folder / "class1/broken.png").write_bytes(b"no image")


def random_encoder(path: Path) -> None:
    """A weights file of the encoder for REPA."""
    import timm

    torch.manual_seed(0)
    state = timm.create_model(ENCODER, num_classes=0).state_dict()
    torch.save({k: 0.05 * torch.randn_like(v) + ("norm" in k) * v for k, v in state.items()}, path)


class Work:
    """A folder for everything that is made; what several parts need is made once, when it is first needed."""

    def __init__(self, folder: Path):
        """`folder` has no space in its name."""
        self.folder = folder

    def start(self, command: str) -> subprocess.Popen[str]:
        """Start a script of this repository on the CPU, with one thread."""
        argv = re.sub(r"\{(.+?)\}", lambda match: str(self.make(match[1])), command).split()
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        env |= {"DIGIT_CLASSIFIER": f"{self.folder}/classifier.pt", "PYTHONPATH": str(ROOT)}
        env |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        program = ["bash" if argv[0].endswith(".sh") else sys.executable, *argv]
        return subprocess.Popen(program, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, command: str, code: int = 0) -> list[str]:
        """Run a script to its end; returns its lines, without progress bars, warnings and the name of the work folder."""
        process, begin = self.start(command), time.perf_counter()
        output = process.communicate()[0]
        if process.returncode != code:
            raise SystemExit(f"{command}: exit code {process.returncode}\n{output[-3000:]}")
        print(f"{time.perf_counter() - begin:7.1f} s  {command.split()[0]} … {command[-80:]}", file=sys.stderr, flush=True)
        lines = output.replace("\r", "\n").replace(str(self.folder), "WORK").splitlines()
        return [line for line in lines if line.strip() and not re.search(r"%\||warn|it/s|image/s", line, re.IGNORECASE)]

    def make(self, name: str) -> Path:
        """The path of data, of the encoder's weights, or of a run's last checkpoint, which are made where they are missing."""
        path = self.folder / (f"runs/{name}/checkpoints/0000020.pt" if name in RUNS else f"data/{name}")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            if name in RUNS:
                self.run(self.training(name, "runs"))
            elif name in ("odd", "encoder"):
                (odd_images if name == "odd" else random_encoder)(path)
            else:
                self.run(f"dataset_tools.py {DATA.get(name, name)} --dest={path}")
                if path.name == "packed":
                    self.run(f"dataset_tools.py stats {path}/..")
        return path

    def training(self, name: str, runs: str) -> str:
        """The command line of a run of train.py in the folder `runs`."""
        return f"train.py {COMMON} {RUNS[name]} --exp-name {name} --output-dir {self.folder}/{runs}"

    def kill(self, name: str) -> Path:
        """The folder of a run that was killed as soon as the checkpoint of step 10 was there."""
        folder = self.folder / "killed" / name
        if not (checkpoint := folder / "checkpoints/0000010.pt").exists():
            process = self.start(self.training(name, "killed"))
            while not checkpoint.exists() and process.poll() is None:
                time.sleep(0.01)
            process.kill()
            output = process.communicate()[0]
            if process.returncode != -signal.SIGKILL:
                raise SystemExit(f"{name}: ended before it was killed\n{output[-3000:]}")
        return folder

    def sample(self, name: str, checkpoint: str, count: int = 8) -> Path:
        """The folder of images of a checkpoint, which options may follow."""
        folder = self.folder / "samples" / name.replace(" ", "-")
        options = f"--num-fid-samples {count} --cfg-scale 3 --num-steps 10"
        self.run(f"generate.py {options} --sample-dir {folder} --ckpt {checkpoint}")
        return folder


def data(work: Work) -> dict[str, Any]:
    """Bytes of what dataset_tools.py makes, and what check and stats print."""
    results: dict[str, Any] = {name: tree(work.make(name)) for name in ("demo", *DATA)}
    results["demo"] = sha256(json.dumps(results["demo"]).encode())
    damaged, grid = work.folder / "damaged", work.folder / "grid.png"
    shutil.copytree(work.make("train/vae-sd").parent, damaged, dirs_exist_ok=True)
    results["check"] = work.run(f"dataset_tools.py check {damaged} --sample-grid {grid}")
    (damaged / "images/00000/img00000003.png").unlink()
    results["check, an image missing"] = work.run(f"dataset_tools.py check {damaged}", code=1)
    results["check, packed"] = work.run("dataset_tools.py check {small/packed}/..")
    results["stats"] = work.run(f"dataset_tools.py stats {damaged}")
    return results | {"files of check and stats": tree(grid) | tree(damaged / "latent_stats.json")}


def train(work: Work) -> dict[str, Any]:
    """Runs of 20 steps that nothing disturbs."""
    return {name: read_run(work.make(name).parents[1]) for name in RUNS}


def resume(work: Work) -> dict[str, Any]:
    """The same runs, killed after the checkpoint of step 10 and resumed."""
    for name in RUNS:
        shutil.rmtree(work.folder / "resumed" / name, ignore_errors=True)
        shutil.copytree(work.kill(name), work.folder / "resumed" / name)
        work.run(f"{work.training(name, 'resumed')} --resume-step -1")
    return {name: read_run(work.folder / "resumed" / name) for name in RUNS}


def generate(work: Work) -> dict[str, Any]:
    """Pixels of 8 images of each kind of sampling."""
    return {name: read_samples(work.sample(name, options)) for name, options in SAMPLES.items()}


def tools(work: Work) -> dict[str, Any]:
    """JSON of both inference tools without latencies, and their pictures that show none."""
    results = {}
    for name, command in TOOLS.items():
        folder, (tool, options) = work.folder / "tools" / name.replace(" ", "-"), command.split(maxsplit=1)
        work.run(f"elit_{tool}_inference.py --class-label 3 7 --num-steps 4 --output-dir {folder} --ckpt {options}")
        values = {path.name: timeless(json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))}
        results[name] = values | {
            k: v for p in folder.glob("*.png") if p.name not in TIMED_PICTURES for k, v in tree(p).items()
        }
    return results


def convert_checkpoint(work: Work) -> dict[str, Any]:
    """Weights after conversion to our format, and images of safetensors."""
    results: dict[str, Any] = {}
    for run in ("ELIT-SiT", "DFM-SiT"):
        ours, other = (work.folder / f"converted/{run}{suffix}" for suffix in (".pt", ".safetensors"))
        shutil.rmtree(ours.parent, ignore_errors=True)
        ours.parent.mkdir()
        work.run(f"convert_checkpoint.py {{{run}}} {ours}")
        work.run(f"convert_checkpoint.py {{{run}}} {other} --safetensors")
        results[run] = weights(ours) | read_samples(work.sample(f"safetensors {run}", str(other)))
    return results


def evaluate(work: Work) -> dict[str, Any]:
    """JSON of evaluate.py with a small feature network, for folders and for an .npz."""
    (npz,) = work.sample("evaluated", "{ELIT-SiT} --num-steps 4", 24).rglob("*.npz")
    results, output = {}, work.folder / "metrics.json"
    for name, options in (("folder", "{enlarged} --split-size 100"), ("npz", f"{npz} --metrics fid is --batch-size 7")):
        features = "--features experiments_updated.digit_classifier:factory"
        work.run(f"evaluate.py {{train/images}} {options} {features} --output {output}")
        results[name] = timeless(json.loads(output.read_text().replace(str(work.folder), "WORK")))
    return results


def quickstart(work: Work) -> dict[str, Any]:
    """The quick start: its results.json without speeds, its training run and its samples."""
    out = work.folder / "quickstart"
    work.run(f"experiments_updated/quickstart.sh {out}")
    results = {"results.json": timeless(json.loads((out / "results.json").read_text())), "run": read_run(out / "quickstart")}
    return results | {"samples": read_samples(out / "samples")}


PARTS = {part.__name__: part for part in (data, train, resume, generate, tools, convert_checkpoint, evaluate, quickstart)}


def record(names: list[str], keep: Path | None = None, old_runs: Path | None = None) -> dict[str, Any]:
    """The results of some parts; `old_runs`: the folder that an earlier call kept, whose data and runs are used."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Work((keep or Path(temporary)).resolve())
        work.folder.mkdir(parents=True, exist_ok=True)
        if old_runs:
            for name in ("data", "runs"):
                (work.folder / name).symlink_to((old_runs / name).resolve())
            shutil.copytree(old_runs / "killed", work.folder / "killed")
        return {name: PARTS[name](work) for name in names}


def leaves(value: Any, name: str = "") -> dict[str, str]:
    """The single values in decoded JSON, by the path to them."""
    if not isinstance(value, (dict, list)) or not value:
        return {name: json.dumps(value)}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, item in pairs for k, v in leaves(item, f"{name}/{key}").items()}


def table(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, int]:
    """A Markdown table with a row for each item of each part, and the number of values that differ."""
    rows, total = ["| part | item | values | result |", "| --- | --- | --- | --- |"], 0
    for part in dict.fromkeys([*old, *new]):
        for item in dict.fromkeys([*old.get(part, {}), *new.get(part, {})]):
            a, b = (leaves(side.get(part, {}).get(item)) for side in (old, new))
            different = [k for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]
            total += len(different)
            shown = "; ".join(f"`{k.strip('/')}`: {a.get(k, 'absent')} → {b.get(k, 'absent')}" for k in different[:3])
            rows.append(
                f"| {part} | {item} | {len(a)} | {f'**{len(different)} differ**: {shown}' if different else 'identical'} |"
            )
    return "\n".join(rows), total


def main(argv: list[str] | None = None) -> None:
    """Record, or compare two records."""
    parser = argparse.ArgumentParser(prog="identical.py", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run everything and write a JSON file")
    recording.add_argument("output", type=Path)
    recording.add_argument("--keep", type=Path, help="folder for all that is made")
    comparing = commands.add_parser("compare", help="print a table of what is identical")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    comparing.add_argument("--old-runs", type=Path, help="the folder kept when OLD was recorded")
    for command in (recording, comparing):
        command.add_argument("--only", nargs="+", choices=PARTS, metavar="NAME", help=f"of {', '.join(PARTS)}")
    args = parser.parse_args(argv)
    if args.command == "record":
        results = record(args.only or [name for name in PARTS if name != "quickstart"], args.keep)
        results["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        args.output.write_text(json.dumps(results, indent=1) + "\n")
        return
    old, new = (json.loads(path.read_text()) for path in (args.old, args.new))
    old, new = ({k: v for k, v in side.items() if k in (args.only or side)} for side in (old, new))
    if args.old_runs:
        names = [name for name in ("resume", "generate", "tools", "convert_checkpoint") if name in old]
        old |= {f"{name} from old runs": old[name] for name in names}
        new |= {f"{name} from old runs": results for name, results in record(names, old_runs=args.old_runs).items()}
    text, different = table(old, new)
    print(text)
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
