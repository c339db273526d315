"""Some twenty silly values for each option of each script: every one is accepted, or refused in one line with exit code 2.

Scripts run in-process up to the end of their checks; what they would then compute is replaced. The data set, the checkpoint and
the working folder are small and lie deep in a temporary folder, so that `..` leads nowhere.
"""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from numerics import ROOT
from PIL import Image
from runs import make_checkpoint, make_latents, make_vae
from safetensors.torch import save_file
from training_runs import arguments

import convert_checkpoint
import dataset_tools
import elit_ccfg_inference
import elit_multibudget_inference
import evaluate
import generate
import train
from checkpoint import reading
from common import tensor_files
from common.errors import UserError
from config.options import CCFGConfig, ConvertCheckpointConfig, GenerateConfig, MultibudgetConfig, TrainConfig
from config.parsing import flag, parse
from config.tool_options import EvaluateConfig
from config.values import kinds
from training import plan

pytestmark = pytest.mark.slow

NUMBERS = ["-1", "0", "-0.5", "0.5 0.5", "nan", "-inf", "1e400", "1e308", "1e-320", "1e18", "9007199254740993", "9" * 5000, "²"]
TEXTS = [
    "",
    ",",
    "~",
    "null",
    "none",
    "..",
    "/",
    "a/../..",
    "x\0y",
    "é" * 200,
    "a" * 5000,
    "b/" * 1500,
    "😀",
    '{"a": [1]}',
    "\ud800\udcff",
]
SPOKEN = re.compile(r": warning: |image/s\]$")  # what may precede an error
LIMIT = 20  # seconds that one attempt may take


def values_of(cls, name):
    kind = kinds(cls)[name].type
    return {int: NUMBERS + TEXTS[:5], float: NUMBERS + TEXTS[:5], bool: NUMBERS[:6] + TEXTS[:5]}.get(
        kind, TEXTS + NUMBERS[:7] + ["²", "٣", "9" * 239]
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A VAE, a data set, images, a checkpoint, bare weights and a set of samples; the folder is the working folder."""
    folder = tmp_path_factory.mktemp("a") / "b" / "c" / "d"
    folder.mkdir(parents=True)
    record = make_vae(folder / "vae")
    make_latents(folder / "data", 8, record)
    checkpoint = make_checkpoint(folder / "elit.pt", record)
    save_file(tensor_files.load(checkpoint)["model"], folder / "bare.safetensors")
    (folder / "images").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "images" / "0.png")
    np.savez(folder / "samples.npz", arr_0=np.zeros((2, 32, 32, 3), np.uint8))
    return folder


class Findings:
    """Runs attempts and keeps those that end in another way than they may."""

    def __init__(self, capsys, codes=(0, 2)):
        self.capsys, self.codes, self.all, self.refused, self.count = capsys, codes, [], 0, 0

    def attempt(self, main, argv):
        def stop(*_):
            raise TimeoutError

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(LIMIT)
        code, problem = 0, None
        try:
            main(argv)
        except SystemExit as end:
            code = end.code or 0
        except BaseException as error:  # whatever it is: no user should see it
            problem = f"{type(error).__name__}: {str(error)[:100]}"
        finally:
            signal.alarm(0)
        lines = [line for line in self.capsys.readouterr().err.splitlines() if line.strip() and not SPOKEN.search(line)]
        if problem is None and (code not in self.codes or (code == 2 and not (len(lines) == 1 and ".py: error: " in lines[0]))):
            problem = f"exit code {code}: {lines}"
        self.refused += code == 2
        self.count += 1
        if problem:
            self.all.append(f"{[part[:60] for part in argv[-2:]]}: {problem}")

    def all_of(self, cls, main, base, *, skip=()):
        """Each silly value of each option, after the `base` of a command line that is accepted."""
        self.attempt(main, base)
        assert not self.all and not self.refused, (self.all, "the base itself is refused")
        for field in dataclasses.fields(cls):
            for value in values_of(cls, field.name):
                if (field.name, value) not in skip:
                    self.attempt(main, [*base, f"{flag(field.name)}={value}"])
        assert not self.all, "\n".join([f"{len(self.all)} of {self.count}", *self.all])
        assert self.refused > self.count / 3


@pytest.fixture
def findings(capsys, files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    return Findings(capsys)


def test_train(findings, files, monkeypatch):
    # The account of costs counts FLOPs for seconds where a model is large; the checks of options, data and folders are all run.
    monkeypatch.setattr(plan.Plan, "describe_model", lambda self: None)
    monkeypatch.setattr(plan, "activation_bytes", lambda *_: 0)
    base = arguments(files / "data", files / "out")
    findings.all_of(TrainConfig, train.main, [*base, "--plan"], skip={("plan", "0")})


def keep_weights(monkeypatch):
    """The checkpoint is read once for each set of weights that is asked for, and copied."""
    read, kept = reading.read_weights, {}

    def read_weights(source, name, given, **more):
        if str(source) != "elit.pt":
            return read(source, name, given, **more)
        if name not in kept:
            kept[name] = read(source, name, {}, **more)
        return dataclasses.replace(kept[name], config=dict(kept[name].config))

    monkeypatch.setattr(reading, "read_weights", read_weights)


def test_generate(findings, monkeypatch):
    keep_weights(monkeypatch)
    monkeypatch.setattr(generate, "generate", lambda *_: None)
    findings.all_of(GenerateConfig, generate.main, ["--ckpt", "elit.pt"])


def test_multibudget(findings, monkeypatch):
    keep_weights(monkeypatch)
    monkeypatch.setattr(elit_multibudget_inference, "compare", lambda *_: None)
    findings.all_of(MultibudgetConfig, elit_multibudget_inference.main, ["--ckpt", "elit.pt", "--class-label", "1"])


def test_ccfg(findings, monkeypatch):
    keep_weights(monkeypatch)
    monkeypatch.setattr(elit_ccfg_inference, "compare", lambda *_: None)
    findings.all_of(CCFGConfig, elit_ccfg_inference.main, ["--ckpt", "elit.pt", "--class-label", "1"])


def test_convert_checkpoint(findings):
    bare = ["bare.safetensors", "--vae", "vae", "--model", "ELIT-SiT-Ti/2", "--resolution", "32", "--num-classes", "5"]
    bare += ["--elit-group-size", "2", "--show"]
    findings.all_of(ConvertCheckpointConfig, convert_checkpoint.main, bare)


def test_evaluate(findings, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: None)
    monkeypatch.setattr(evaluate, "end_with_launcher", lambda: None)
    findings.all_of(EvaluateConfig, evaluate.main, ["samples.npz", "samples.npz"])


@pytest.mark.parametrize("command", ["convert", "pack", "check", "stats", "encode", "demo", "reference"])
def test_dataset_tools(command, findings, files, monkeypatch, tmp_path):
    cls, _ = dataset_tools.COMMANDS[command]
    if command in ("encode", "demo", "reference"):  # they load networks or take long at once
        monkeypatch.setitem(dataset_tools.COMMANDS, command, (cls, lambda config: None))
    findings.codes = (0, 1, 2) if command == "check" else (0, 2)
    dest = {"dest": tmp_path / "made"} if "dest" in kinds(cls) else {}
    source = {"source": {"convert": "images", "pack": "data/vae-sd"}.get(command, "data")} if "source" in kinds(cls) else {}
    base = [command, *(f"--{name}={value}" for name, value in (source | dest).items())]

    def main(argv):
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        dataset_tools.main(argv)

    # The whole file system is not walked here.
    findings.all_of(cls, main, base, skip={("source", "/"), ("dest", "/"), ("dest", "..")})


def test_plan_and_check_in_a_locale_without_utf8(files, tmp_path):
    options = [*arguments(files / "data", tmp_path / "\udcc3\udca9"), "--plan"]  # é, as Python reads it there
    program = f"import train, dataset_tools; train.main({options!a}); dataset_tools.main(['check', {str(files / 'data')!r}])"
    env = os.environ | {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "sound" in done.stdout and "outputs" in done.stdout, done.stderr


@pytest.mark.parametrize("cls", [TrainConfig, GenerateConfig, CCFGConfig])
def test_yaml(cls, tmp_path):
    odd = [
        "{a: 1}",
        "[[1]]",
        "[]",
        "[1, {a: 1}]",
        "!!python/object:os.system ls",
        "&a [*a]",
        "2024-01-01",
        "0x1F",
        ".inf",
        "|\n  a\n  b",
    ]
    count = 0
    for name in kinds(cls).keys() - {"train_config"}:  # another file
        for value in odd:
            path = tmp_path / "odd.yaml"
            path.write_text(f"{name}: {value}\n")
            try:
                parse(cls, ["--config", str(path)])
            except UserError as error:
                assert "odd.yaml" in str(error)
                count += 1
    assert count > 5 * len(dataclasses.fields(cls))
