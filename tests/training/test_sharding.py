"""`--shard`: the same run on any number of processes, its folders of parts, and what is refused."""

import json
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
from models.dfm import DFMELITSiT
from models.elit import ELITSiT
from training import sharding

pytestmark = pytest.mark.slow

REGISTER = """
import models
from models.dfm import DFMELITSiT
from models.elit import ELITSiT
for name, kind in {"ELIT-SiT-Nano/2": ELITSiT, "DFM-ELIT-SiT-Nano/2": DFMELITSiT}.items():
    models.register(name, kind, depth=3, hidden_size=48, num_heads=2, head_depth=1, tail_depth=1)
"""
# What the processes hold once they have resumed, written again.
AGAIN = """
from pathlib import Path
from checkpoint import sharded
from training.trainer import Trainer
start = Trainer._start_logging
def again(self):
    start(self)
    sharded.save(Path({path!r}), self.writer.copy(self.state()), self.sharded.group)
    whole = self.ema.first.state_dict()  # every process gathers it
    if self.run_dir.is_main:
        import torch
        torch.save(whole, {path!r} + ".ema")
Trainer._start_logging = again
"""
IMPORTS = ("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.optim.swa_utils")


@pytest.fixture(scope="module", autouse=True)
def nano():
    """The models of `REGISTER`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "MODELS", dict(models.MODELS))
        for name, kind in {"ELIT-SiT-Nano/2": ELITSiT, "DFM-ELIT-SiT-Nano/2": DFMELITSiT}.items():
            models.register(name, kind, depth=3, hidden_size=48, num_heads=2, head_depth=1, tail_depth=1)
        yield


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run of one process, and one that is sharded differently, or not, after each checkpoint; and the same of DFM."""
    out = tmp_path_factory.mktemp("sharded")
    data = make_latents(out / "set", 24, make_vae(out / "vae"))

    def job(processes, name, steps, *more, before="", model="ELIT-SiT-Nano/2"):
        options = ("--max-train-steps", steps, "--checkpointing-steps", 1, "--batch-size", 12, "--ema-decay", 0.5)
        return processes, arguments(data, out / name, *options, *more, model=model), REGISTER + before

    resume = ("--resume-step", -1)
    dfm = ("--mixed-precision", "bf16", "--gradient-accumulation-steps", 2, "--gradient-checkpointing")
    dfm_model = "DFM-ELIT-SiT-Nano/2"
    told = runs.train_on(
        job(1, "one", 5),
        job(2, "split", 2, "--shard", "full"),
        job(3, "split", 3, "--shard", "full", *resume, before=AGAIN.format(path=str(out / "again.dcp"))),
        job(1, "split", 4, *resume),
        job(4, "split", 5, "--shard", 2, *resume),
        job(1, "dfm-one", 2, *dfm, model=dfm_model),
        job(2, "dfm-split", 2, "--shard", "full", *dfm, model=dfm_model),
        imports=IMPORTS,
    )
    assert told == ["0", "0 0", "0 0 0", "0", "0 0 0 0", "0", "0 0"]
    return out


def checkpoints(ran: Path, name: str = "split") -> Path:
    return ran / name / "run" / "checkpoints"


def leaves(state: dict) -> dict:
    return {k: v for k, v in sharded._leaves(state, "") if not k.startswith(("config/", "meters/"))}


def assert_same(a: dict, b: dict, atol: float | None = None) -> None:
    a, b = leaves(a), leaves(b)
    assert list(a) == list(b)
    for key, value in a.items():
        if not isinstance(value, torch.Tensor):
            assert value == b[key], key
        elif atol is None:
            assert torch.equal(value, b[key]), key
        else:
            torch.testing.assert_close(b[key], value, atol=atol, rtol=1e-5, msg=key)


def test_any_number_of_processes_trains_the_same(ran):
    for one, split in (("one", "split"), ("dfm-one", "dfm-split")):
        for name in ("loss", "grad_norm"):
            expected = metrics(ran / one, name)
            assert metrics(ran / split, name) == pytest.approx(expected, abs=1e-6), (split, name)
    forms = [p.name for p in sorted(checkpoints(ran).iterdir()) if p.suffix != ".sha256"]
    assert forms == ["0000001.dcp", "0000002.dcp", "0000003.dcp", "0000004.pt", "0000005.dcp"]
    states = [training_state.load_step(checkpoints(ran, name), 5) for name in ("one", "split")]
    assert_same(*states, atol=1e-4)


def test_three_processes_load_what_two_saved(ran):
    before, again = training_state.load_step(checkpoints(ran), 2), training_state.load(ran / "again.dcp", verify=True)
    assert_same(before, again)
    gathered = torch.load(ran / "again.dcp.ema")
    assert gathered.keys() == before["ema"]["0.5"].keys()
    assert all(torch.equal(v, gathered[k]) for k, v in before["ema"]["0.5"].items())
    parts = {n: sum(t.startswith("__") for t in map(str, (p.name for p in (ran / n).iterdir()))) for n in ["again.dcp"]}
    assert parts == {"again.dcp": 3}


def test_conversion_to_one_file_and_back(ran, tmp_path, capsys):
    source = checkpoints(ran) / "0000005.dcp"
    file, folder = tmp_path / "0000005.pt", tmp_path / "again.dcp"
    convert_checkpoint.main([str(source), str(file)])
    convert_checkpoint.main([str(file), str(folder)])
    convert_checkpoint.main([str(source), "--show"])
    assert "all of the training state" in capsys.readouterr().out
    state = training_state.load(source)
    assert_same(state, training_state.load(file, verify=True))
    assert_same(state, training_state.load(folder, verify=True))
    model, config = reading.load_model(source, weights="ema:0.5")
    assert config["model"] == "ELIT-SiT-Nano/2"
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
    for step in (2, 3):
        shutil.copytree(checkpoints(ran) / f"000000{step}.dcp", tmp_path / f"000000{step}.dcp")
    spoil, reason = DAMAGES[damage]
    spoil(tmp_path / "0000003.dcp")
    messages = []
    state = training_state.load_newest(tmp_path, messages.append, lazy=True)
    assert state is not None and state["step"] == 2
    assert len(messages) == 1 and reason in messages[0] and messages[0].endswith("passed over for step 2")
    with pytest.raises(UserError, match=str(tmp_path)):
        reading.load_model(tmp_path / "0000003.dcp")


def test_a_folder_with_code_is_refused(ran, tmp_path):
    folder = tmp_path / "0000002.dcp"
    shutil.copytree(checkpoints(ran) / "0000002.dcp", folder)
    (folder / ".metadata").write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match=r"carries code \(builtins\.print\)"):
        training_state.load(folder)


def test_folders_are_replaced_pruned_and_set_aside(ran, tmp_path):
    source, folder = checkpoints(ran), tmp_path
    for step in (1, 2, 3):
        shutil.copytree(source / f"000000{step}.dcp", folder / f"000000{step}.dcp")
    state = training_state.load_step(folder, 3)
    sharded.save(folder / "0000003.dcp", state)  # in place of the one with three parts
    assert_same(training_state.load_step(folder, 3), state)
    (folder / "0000003.dcp").rename(folder / "0000003.dcp.old")  # killed before the new one has its name
    shutil.copytree(folder / "0000001.dcp", folder / "0000004.dcp.tmp")
    assert training_state.saved_steps(folder) == [1, 2, 3]
    assert_same(training_state.load_step(folder, 3), state)
    shutil.copytree(folder / "0000002.dcp", folder / "0000002.dcp.old")
    training_state.remove_unfinished(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["0000001.dcp", "0000002.dcp", "0000003.dcp.old"]
    aside = training_state.set_aside(folder, 2)
    assert aside is not None and [p.name for p in aside.iterdir()] == ["0000003.dcp.old"]
    training_state.prune(folder, 2, keep_last=1, keep_every=0)
    assert training_state.saved_steps(folder) == [2]


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
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == "[]"
