"""`--shard`: the same run on any number of processes, its folders of parts, and what is refused."""

import pickle
import shutil
from pathlib import Path

import pytest
import runs
import torch
from runs import make_latents, make_vae
from training_runs import arguments, metrics

import convert_checkpoint
import models
import train
from checkpoint import reading, sharded, training_state
from common.errors import UserError
from training import sharding

pytestmark = pytest.mark.slow

MODEL = "DFM-ELIT-SiT-Nano/2"
REGISTER = f"""
import models
from models.dfm import DFMELITSiT
models.register({MODEL!r}, DFMELITSiT, depth=3, hidden_size=48, num_heads=2, head_depth=1, tail_depth=1)
"""
# What the processes hold once they have resumed from a folder, written again; and whether they get the same from one file.
AGAIN = """
from pathlib import Path
import torch
from checkpoint import sharded, training_state
from training.memory import process_bytes
from training.trainer import Trainer
out, source, start = Path({out!r}), Path({source!r}), Trainer._start_logging

def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)

def check_memory(self):
    if self.run_dir.is_main:
        told = process_bytes(self.sharded._frame, self.config, 4)
        own = size(p.data for p in self.sharded.parameters())
        state = self.optimizer.optimizer.state.values()
        assert (told.gradients, told.ema) == (own, size(self.ema._shards["0.5"])) and own < size(self.sharded._frame.parameters())
        assert (told.weights, told.optimizer) == (own + size(self.model.buffers()), size(t for s in state for t in s.values()))
    waits = [g._get_backend(torch.device("cpu")).options._timeout for g in self.mesh.get_all_groups()]
    assert [w.total_seconds() for w in waits] == [60 * 45] * 2

def again(self):
    start(self)
    sharded.save(out / "again.dcp", self.writer.copy(self.state()), self.sharded.group)
    whole = self.ema.model().state_dict()  # every process gathers it
    if self.run_dir.is_main:
        torch.save(whole, out / "gathered.pt")
        training_state.save(out / "one.pt", training_state.load(source))
    self.accelerator.wait_for_everyone()
    check_memory(self)
    weights = [p.data for p in self.sharded.parameters()] + self.ema._shards["0.5"]
    before = [w.clone() for w in weights]
    for w in weights:
        w.zero_()
    moments = self.sharded.load(training_state.load(out / "one.pt"), out)["optimizer"]["state"]
    after = self.optimizer.optimizer.state_dict()["state"]
    assert all(map(torch.equal, weights, before))
    assert all(torch.equal(entry[k], moments[i][k]) for i, entry in after.items() for k in entry)
Trainer._start_logging = again
"""
# As on CUDA, where models are compiled by default, but without a compiler.
COMPILE = """
from pathlib import Path
from torch._dynamo.testing import CompileCounterWithBackend
counter, compile_model, finish = CompileCounterWithBackend("eager"), models.compile_model, train.Trainer._finish_saving
models.compile_model = lambda model: compile_model(model, backend=counter)

def finished(self):
    finish(self)
    if self.run_dir.is_main:
        Path({out!r}, "graphs").write_text(str(counter.frame_count))
train.Trainer._finish_saving = finished
"""
IMPORTS = ("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.optim.swa_utils")


@pytest.fixture(scope="module", autouse=True)
def nano():
    """The model of `REGISTER`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "MODELS", dict(models.MODELS))
        exec(REGISTER, {})
        yield


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run of one process; and one that is sharded over two, then over two groups of two, then not."""
    out = tmp_path_factory.mktemp("sharded")
    data = make_latents(out / "set", 36, make_vae(out / "vae"))
    options = ("--checkpointing-steps", 1, "--batch-size", 12, "--ema-decay", 0.5, "--gradient-accumulation-steps", 2)
    options += ("--gradient-checkpointing", "--mixed-precision", "bf16", "--elit-min-mask-prob", 0.75)

    def job(processes, name, steps, *more, before=""):
        argv = arguments(data, out / name, *options, "--max-train-steps", steps, *more, model=MODEL)
        return processes, argv, REGISTER + before

    resume = ("--resume-step", -1)
    again = AGAIN.format(out=str(out), source=str(out / "split/run/checkpoints/0000001.dcp"))
    told = runs.train_on(
        job(1, "one", 3),
        job(2, "split", 1, "--shard", "full", "--compile", before=COMPILE.format(out=str(out))),
        job(4, "split", 2, "--shard", 2, "--timeout-minutes", 45, *resume, before=again),
        job(1, "split", 3, *resume),
        imports=IMPORTS,
    )
    assert told == ["0", "0 0", "0 0 0 0", "0"]
    return out


def checkpoints(ran: Path, name: str = "split") -> Path:
    return ran / name / "run" / "checkpoints"


def leaves(state: dict) -> dict:
    return {k: v for k, v in sharded._leaves(state, "") if not k.startswith(("config/", "meters/"))}


def assert_same(a: dict, b: dict, mean: float | None = None) -> None:
    a, b = leaves(a), leaves(b)
    assert list(a) == list(b)
    for key, value in a.items():
        if not isinstance(value, torch.Tensor):
            assert value == b[key], key
        elif mean is None:
            assert torch.equal(value, b[key]), key
        else:  # Adam makes steps of its learning rate of near-zero gradients' rounding: not each entry agrees
            assert (value.double() - b[key]).abs().mean() < mean, key


def test_any_number_of_processes_trains_the_same(ran):
    assert metrics(ran / "split") == pytest.approx(metrics(ran / "one"), abs=1e-6)
    assert metrics(ran / "split", "grad_norm") == pytest.approx(metrics(ran / "one", "grad_norm"), rel=1e-5)
    forms = [p.name for p in sorted(checkpoints(ran).iterdir()) if p.suffix != ".sha256"]
    assert forms == ["0000001.dcp", "0000002.dcp", "0000003.pt"]
    states = [training_state.load_step(checkpoints(ran, name), 3) for name in ("one", "split")]
    assert_same(*states, mean=2e-5)


def test_sharded_regions_are_compiled_whole(ran):
    """Two patch embedders, time, labels, block, Read, Write, two final layers; one more of a block, whose input may be a view."""
    assert 9 <= int((ran / "graphs").read_text()) <= 10


def test_four_processes_load_what_two_saved(ran):
    before = training_state.load_step(checkpoints(ran), 1)
    assert_same(before, training_state.load(ran / "again.dcp", verify=True))
    gathered = torch.load(ran / "gathered.pt")
    average = before["ema"]["0.5"]
    assert gathered.keys() == average.keys()
    for key, value in average.items():  # Linears are gathered as autocast would convert them
        assert torch.equal(value.to(gathered[key].dtype), gathered[key]), key


def test_conversion_to_one_file_and_back(ran, tmp_path, capsys):
    source = checkpoints(ran) / "0000002.dcp"
    file, folder = tmp_path / "0000002.pt", tmp_path / "again.dcp"
    convert_checkpoint.main([str(source), str(file)])
    convert_checkpoint.main([str(file), str(folder)])
    convert_checkpoint.main([str(source), "--show"])
    assert "all of the training state" in capsys.readouterr().out
    state = training_state.load(source)
    assert_same(state, training_state.load(file, verify=True))
    assert_same(state, training_state.load(folder, verify=True))
    model, config = reading.load_model(source, weights="ema:0.5")
    assert config["model"] == MODEL
    assert all(torch.equal(v, state["ema"]["0.5"][k]) for k, v in model.state_dict().items())
    runs.refused(convert_checkpoint.main, capsys, [source, tmp_path / "b.dcp", "--weights", "ema"], "b.dcp", "--weights")


def break_part(folder: Path) -> None:
    part = next(folder.glob("__1_*"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)


DAMAGES = {
    "a changed part": (break_part, "__1_0.distcp does not match its checksum"),
    "a missing part": (lambda folder: next(folder.glob("__0_*")).unlink(), "__0_0.distcp is missing"),
    "no list of parts": (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
    "no checksums": (lambda folder: (folder / "sha256sums").unlink(), "sha256sums is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_folder_is_taken(ran, tmp_path, damage):
    for step in (1, 2):
        shutil.copytree(checkpoints(ran) / f"000000{step}.dcp", tmp_path / f"000000{step}.dcp")
    spoil, reason = DAMAGES[damage]
    spoil(tmp_path / "0000002.dcp")
    messages = []
    state = training_state.load_newest(tmp_path, messages.append, lazy=True)
    assert state is not None and state["step"] == 1
    assert len(messages) == 1 and reason in messages[0] and messages[0].endswith("passed over for step 1")
    with pytest.raises(UserError, match=str(tmp_path)):
        reading.load_model(tmp_path / "0000002.dcp")


def test_a_folder_with_code_is_refused(ran, tmp_path):
    folder = tmp_path / "0000002.dcp"
    shutil.copytree(checkpoints(ran) / "0000002.dcp", folder)
    (folder / ".metadata").write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match=r"carries code \(builtins\.print\)"):
        training_state.load(folder)


def test_folders_are_replaced_pruned_and_set_aside(ran, tmp_path):
    for name in ("0000001.dcp", "0000002.dcp", "0000002.dcp.old", "0000003.dcp", "0000004.dcp.tmp"):
        shutil.copytree(checkpoints(ran) / f"000000{min(2, int(name[6]))}.dcp", tmp_path / name)
    state = training_state.load_step(tmp_path, 2)
    sharded.save(tmp_path / "0000002.dcp", state)  # in place of the one with four parts
    assert_same(training_state.load_step(tmp_path, 2), state)
    assert not (tmp_path / "0000002.dcp.old").exists()
    (tmp_path / "0000002.dcp").rename(tmp_path / "0000002.dcp.old")  # killed before the new one has its name
    assert training_state.saved_steps(tmp_path) == [1, 2, 3]
    assert training_state.load_step(tmp_path, 2, lazy=True)["step"] == 2
    shutil.copytree(tmp_path / "0000001.dcp", tmp_path / "0000001.dcp.old")
    training_state.remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000001.dcp", "0000002.dcp.old", "0000003.dcp"]
    aside = training_state.set_aside(tmp_path, 1)
    assert aside is not None and sorted(p.name for p in aside.iterdir()) == ["0000002.dcp.old", "0000003.dcp"]
    (aside / "0000002.dcp.old").rename(tmp_path / "0000002.dcp")
    training_state.prune(tmp_path, 2, keep_last=1, keep_every=0)
    assert training_state.saved_steps(tmp_path) == [2]


def test_a_failed_write_leaves_what_was_there(ran, tmp_path, monkeypatch):
    shutil.copytree(checkpoints(ran) / "0000002.dcp", tmp_path / "0000002.dcp")
    state = training_state.load_step(tmp_path, 2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharded, "_write_record", full)
    with pytest.raises(OSError, match="No space left"):
        sharded.save(tmp_path / "0000002.dcp", state)
    assert [p.name for p in tmp_path.iterdir()] == ["0000002.dcp"]
    assert_same(training_state.load_step(tmp_path, 2), state)


def test_groups(monkeypatch, capsys, tmp_path):
    sizes = {("none", 8): 1, ("full", 8): 8, ("4", 8): 4, ("8", 8): 8, ("1", 8): 1, ("full", 1): 1}
    assert {case: sharding.group_size(*case) for case in sizes} == sizes
    monkeypatch.setenv("WORLD_SIZE", "8")
    argv = arguments(tmp_path, tmp_path)
    runs.refused(train.main, capsys, [*argv, "--shard", 3], "--shard 3", "8 processes", "choose 2, 4, full or none")
    runs.refused(train.main, capsys, [*argv, "--shard", "half"], "--shard half", "none, full")
    assert not list(tmp_path.iterdir())
