"""Checkpoints that are damaged, unreadable, stale or hostile: what a resumed run and the readers of weights make of them."""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import training_runs
from accelerate import Accelerator
from runs import make_checkpoint, make_latents, make_vae, reset_accelerate

import convert_checkpoint
import elit_ccfg_inference
import elit_multibudget_inference
import generate
import models
import train
from checkpoint import reading, records, training_state
from checkpoint.architecture import resolve_architecture
from checkpoint.init_from import init_from
from checkpoint.weights import build_model
from common import file_facts, files, tensor_files
from common.errors import UserError
from config.options import GenerateConfig, TrainConfig
from training import trainer
from training.stats import TrainingStats

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def nano():
    """Registered models whose checkpoints are small."""
    sizes = {"depth": 3, "hidden_size": 32, "num_heads": 2, "patch_size": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "SiT-Nano/2", models.ModelSpec("SiT-Nano/2", "SiT", models.SiT, sizes))
        elit = sizes | {"head_depth": 1, "tail_depth": 1}
        patch.setitem(models.MODELS, "ELIT-SiT-Nano/2", models.ModelSpec("ELIT-SiT-Nano/2", "ELIT-SiT", models.ELITSiT, elit))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return make_latents(folder / "set", 8, make_vae(folder / "vae"))


def arguments(data, output_dir, *more):
    short = ("--batch-size", 4, "--max-train-steps", 3, "--checkpointing-steps", 1)
    return training_runs.arguments(data, output_dir, *short, *more, model="SiT-Nano/2")


def run_train(data, output_dir, *more):
    reset_accelerate()
    train.main(arguments(data, output_dir, *more))


def refused(capsys, data, output_dir, *more):
    reset_accelerate()
    return runs.refused(train.main, capsys, arguments(data, output_dir, *more))


@pytest.fixture(scope="module")
def three_steps(data, tmp_path_factory):
    """A run of three steps with a checkpoint of each."""
    out = tmp_path_factory.mktemp("three")
    run_train(data, out)
    reset_accelerate()
    return out


@pytest.fixture
def run_dir(three_steps, tmp_path):
    """A copy of that run in `tmp_path`."""
    shutil.copytree(three_steps / "run", tmp_path / "run")
    return tmp_path / "run"


def logged_steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def flip(path: Path, place: float = 0.5) -> None:
    """Change one byte."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 255
    path.write_bytes(content)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------- which one to resume from


def test_checkpoints_of_which_none_loads_are_named_and_nothing_is_begun(data, run_dir, capsys):
    one, two, three = sorted((run_dir / "checkpoints").glob("*.pt"))
    flip(one)
    two.write_bytes(two.read_bytes()[:1000])
    tensor_files.sidecar(two).unlink()
    torch.save([1, 2], three)
    tensor_files.sidecar(three).unlink()
    before = content_of(run_dir)
    line = refused(capsys, data, run_dir.parent, "--resume-step", -1)
    for words in (f"{one}: damaged", f"{two}: truncated", f"{three}: holds a list"):
        assert words in line, line
    assert content_of(run_dir) == before


def test_only_a_folder_without_checkpoints_starts_anew_and_keeps_the_old_lines(data, run_dir):
    for path in (run_dir / "checkpoints").iterdir():
        path.unlink()
    run_train(data, run_dir.parent, "--resume-step", -1, "--max-train-steps", 1)
    assert logged_steps(run_dir / "metrics.jsonl") == [1]
    assert logged_steps(run_dir / "metrics.dropped.jsonl") == [1, 2, 3]


def test_an_input_output_error_is_told_and_stops_the_search(data, run_dir, capsys):
    """Linux answers reads at the start of /proc/self/mem with EIO."""
    newest = run_dir / "checkpoints" / "0000003.pt"
    newest.unlink()
    newest.symlink_to("/proc/self/mem")
    for has_sidecar in (True, False):
        before = (run_dir / "metrics.jsonl").read_bytes()
        line = refused(capsys, data, run_dir.parent, "--resume-step", -1)
        assert f"{newest}: cannot be read: Input/output error" in line, line
        assert (run_dir / "metrics.jsonl").read_bytes() == before
        if has_sidecar:
            tensor_files.sidecar(newest).unlink()


def test_a_shortage_of_memory_is_told_and_stops_the_search(tmp_path):
    for step in (1, 2):
        size = 1000 if step == 1 else 100_000_000
        training_state.save(tmp_path / f"000000{step}.pt", {"step": step, "w": torch.zeros(size, dtype=torch.uint8)})
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 50_000_000, limits[1]))
    try:
        with pytest.raises(tensor_files.Unreadable, match=r"0000002\.pt: cannot be read: .*memory"):
            training_state.load_newest(tmp_path, pytest.fail)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert training_state.load_newest(tmp_path, pytest.fail)["step"] == 2


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError()])
def test_what_the_system_says_is_passed_on(tmp_path, monkeypatch, error):
    for step in (1, 2):
        training_state.save(tmp_path / f"000000{step}.pt", {"step": step})

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(tensor_files.Unreadable, match=r"0000002\.pt: cannot be read: (Permission denied|not enough memory)"):
        training_state.load_newest(tmp_path, pytest.fail)


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to("checkpoints")  # ELOOP
    line = refused(capsys, data, tmp_path, "--resume-step", -1)
    assert "checkpoints: cannot be read: Too many levels of symbolic links" in line


def test_a_checksum_file_that_is_no_text_counts_as_damage(tmp_path):
    for step in (1, 2):
        training_state.save(tmp_path / f"000000{step}.pt", {"step": step})
    tensor_files.sidecar(tmp_path / "0000002.pt").write_bytes(b"\xff\xfe\x00\x80" * 16)
    told = []
    assert training_state.load_newest(tmp_path, told.append)["step"] == 1
    assert len(told) == 1 and "0000002.pt: damaged" in told[0]


def test_checksum_files_of_other_tools_are_read(tmp_path):
    path = tmp_path / "0000001.pt"
    training_state.save(path, {"step": 1})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for text in (f"SHA256 (0000001.pt) = {digest}\n", f"{digest.upper()} *0000001.pt\r\n"):
        tensor_files.sidecar(path).write_text(text)
        assert tensor_files.load(path, verify=True)["step"] == 1


def test_files_of_other_names_are_no_checkpoints_of_the_run(tmp_path):
    training_state.save(tmp_path / "12345678.pt", {"step": 12345678})
    for name in ("²³.pt", "5.pt", "00000005.pt", "0000005.pt.tmp", "x0000005.pt"):
        (tmp_path / name).write_bytes(b"")
    assert training_state.saved_steps(tmp_path) == [12345678]


@pytest.mark.parametrize("state", [{}, {"step": "3"}, {"step": None}])
def test_a_checkpoint_without_a_step_is_one_line(data, run_dir, capsys, state):
    training_state.save(run_dir / "checkpoints" / "0000003.pt", state)
    assert "step" in refused(capsys, data, run_dir.parent, "--resume-step", 3)


# --------------------------------------------------------------------------------------------------------- going back


def test_after_going_back_the_newest_is_that_of_the_new_branch(data, run_dir, capsys):
    """To 1, on to 2, then -1 to 3: step 3 follows from the new 2, and the old 2 and 3 are kept with their checksums."""
    folder = run_dir / "checkpoints"
    old = {p.name: p.read_bytes() for p in folder.iterdir()}
    changed = ("--learning-rate", 0.01, "--allow-change", "learning_rate")
    run_train(data, run_dir.parent, "--resume-step", 1, "--max-train-steps", 2, *changed)
    aside = folder / "abandoned-from-1"
    told = [line for line in capsys.readouterr().err.splitlines() if "abandoned" in line]
    assert len(told) == 1 and "step 1" in told[0] and str(aside) in told[0]
    assert training_state.saved_steps(folder) == [1, 2]
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == {k: v for k, v in old.items() if "1.pt" not in k}
    assert logged_steps(run_dir / "metrics.jsonl") == [1, 2]
    assert logged_steps(run_dir / "metrics.dropped.jsonl") == [2, 3]
    run_train(data, run_dir.parent, "--resume-step", -1, *changed)
    assert logged_steps(run_dir / "metrics.jsonl") == [1, 2, 3]
    new = tensor_files.load(folder / "0000003.pt", verify=True)
    assert new["optimizer"]["param_groups"][0]["lr"] == 0.01 and new["optimizer"]["state"][0]["step"] == 3
    run_train(data, run_dir.parent, "--resume-step", 1)
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["abandoned-from-1", "abandoned-from-1-2"]


@pytest.mark.parametrize("what", ["other learning rate", "broken weights"])
def test_a_refused_way_back_moves_nothing(data, run_dir, capsys, what):
    more = ()
    if what == "broken weights":
        state = tensor_files.load(run_dir / "checkpoints" / "0000001.pt")
        training_state.save(run_dir / "checkpoints" / "0000001.pt", state | {"model": {"w": torch.zeros(1)}})
    else:
        more = ("--learning-rate", 0.01)
    before = content_of(run_dir)
    refused(capsys, data, run_dir.parent, "--resume-step", 1, *more)
    assert content_of(run_dir) == before


def test_a_kill_among_the_moves_leaves_the_newest_where_it_is(run_dir, monkeypatch):
    folder, replace, moves = run_dir / "checkpoints", Path.replace, []

    def killed(path, target):
        if len(moves) == 2:
            raise KeyboardInterrupt
        moves.append(path.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        training_state.set_aside(folder, 1)
    assert moves == ["0000002.pt", "0000002.pt.sha256"]
    assert training_state.load_newest(folder, pytest.fail)["step"] == 3


# ------------------------------------------------------------------------------------------------------------ metrics


def test_lines_after_the_resumed_step_and_odd_ones_are_moved_to_a_file_beside(data, run_dir):
    log, dropped = run_dir / "metrics.jsonl", run_dir / "metrics.dropped.jsonl"
    odd = [b'{"step": 1, "note": "\xff\xfe"}', b"5", b"null", b'{"step": "1"}', b"[" * 100_000, b'{"loss": 1}', b'{"st']
    good = log.read_bytes()
    log.write_bytes(good + b"\n".join(odd))
    run_train(data, run_dir.parent, "--resume-step", -1)
    assert log.read_bytes() == good
    assert dropped.read_bytes() == b"".join(line + b"\n" for line in odd)
    flip(run_dir / "checkpoints" / "0000003.pt")
    run_train(data, run_dir.parent, "--resume-step", -1)
    assert logged_steps(log) == [1, 2, 3]
    assert dropped.read_bytes().splitlines()[len(odd) :] == good.splitlines()[2:]


# ------------------------------------------------------------------------------------------------- reading weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint with a VAE that exists."""
    folder = tmp_path_factory.mktemp("whole")
    return make_checkpoint(folder / "0000007.pt", make_vae(folder / "vae"), model="ELIT-SiT-Nano/2")


def doors(data, path, out):
    """Every script that reads weights: what it is, its main, and arguments under which it takes a whole checkpoint."""
    tool = ["--ckpt", path, "--output-dir", out / "tool", "--class-label", 1, "--num-steps", 1]
    start = arguments(data, out, "--init-from", path, "--max-train-steps", 1)
    return {
        "generate": (generate.main, ["--ckpt", path, "--sample-dir", out, "--num-fid-samples", 1, "--num-steps", 1]),
        "ccfg": (elit_ccfg_inference.main, tool),
        "multibudget": (elit_multibudget_inference.main, tool),
        "convert": (convert_checkpoint.main, [path, out / "converted.pt"]),
        "safetensors": (convert_checkpoint.main, [path, out / "converted.safetensors", "--safetensors"]),
        "init-from": (train.main, start),
        "plan": (train.main, [*start, "--plan"]),
    }


DOORS = list(doors("", Path(), Path()))


def rewritten(whole, path, change):
    """The checkpoint, changed by change(state), under another path, with or without its old checksum."""
    state = tensor_files.load(whole)
    change(state)
    training_state.save(path, state)
    return path


@pytest.mark.parametrize("door", DOORS)
def test_weights_that_do_not_match_their_checksum_are_refused(data, whole, tmp_path, capsys, door):
    """The file holds another whole checkpoint than the one whose checksum lies beside it."""

    def add(state):
        state["ema"]["0.9999"]["blocks.0.mlp.fc1.bias"] = state["ema"]["0.9999"]["blocks.0.mlp.fc1.bias"] + 1

    other = rewritten(whole, tmp_path / "in" / "0000007.pt", add)
    tensor_files.sidecar(other).write_bytes(tensor_files.sidecar(whole).read_bytes())
    out = tmp_path / "out"
    out.mkdir()
    main, argv = doors(data, other, out)[door]
    if door == "plan":
        with pytest.raises(SystemExit):
            main([str(a) for a in argv])
        line = "".join(capsys.readouterr())
    else:
        line = runs.refused(main, capsys, argv)
    assert f"{other}: damaged or replaced: it does not match its checksum 0000007.pt.sha256" in line
    assert not [p for p in out.rglob("*") if p.suffix in (".png", ".npz", ".pt", ".safetensors", ".json")]


def test_a_safetensors_file_is_compared_too(whole, tmp_path):
    path = tmp_path / "a.safetensors"
    convert_checkpoint.main([str(whole), str(path), "--safetensors"])
    assert reading.load_model(path)  # without a sidecar
    tensor_files.sidecar(path).write_bytes(tensor_files.sidecar(whole).read_bytes())
    with pytest.raises(UserError, match=r"a\.safetensors: damaged or replaced"):
        reading.load_model(path)


def test_damage_is_the_reason_that_is_told(whole, tmp_path):
    """Where it also makes nonsense of what the file says."""
    path = rewritten(whole, tmp_path / "0000007.pt", lambda state: state.update(vae={}))
    tensor_files.sidecar(path).write_bytes(tensor_files.sidecar(whole).read_bytes())
    with pytest.raises(UserError, match="damaged or replaced"):
        reading.load_model(path)


def test_show_warns(whole, tmp_path, capsys):
    path = rewritten(whole, tmp_path / "0000007.pt", lambda state: state.update(step=8))
    for damaged in (False, True):
        convert_checkpoint.main([str(path), "--show"])
        assert ("warning     " in capsys.readouterr().out) == damaged
        tensor_files.sidecar(path).write_bytes(tensor_files.sidecar(whole).read_bytes())


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """The files that are hashed, of which none is known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths, original = [], files.file_sha256
    for module in (tensor_files, file_facts):
        monkeypatch.setattr(module, "file_sha256", lambda path: paths.append(Path(path)) or original(path))
    return paths


@pytest.mark.parametrize("has_sidecar", [True, False])
def test_generate_hashes_the_file_once_and_records_its_own_digest(whole, tmp_path, hashed, has_sidecar):
    path = tmp_path / "0000007.pt"
    path.write_bytes(whole.read_bytes())
    if has_sidecar:
        tensor_files.sidecar(path).write_bytes(tensor_files.sidecar(whole).read_bytes())
    generate.main([str(a) for a in doors("", path, tmp_path / "out")["generate"][1]])
    assert hashed.count(path) == 1
    (record,) = (tmp_path / "out").rglob("ckpt-*.json")
    assert json.loads(record.read_text())["ckpt_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_converting_several_sets_hashes_once(whole, tmp_path, hashed):
    convert_checkpoint.main([str(whole), str(tmp_path / "out.pt")])
    assert hashed == [whole]


def test_only_the_first_process_reads_all_of_the_file(whole, monkeypatch, hashed):
    monkeypatch.setenv("RANK", "1")
    assert reading.load_model(whole)
    assert not hashed


# ------------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("door", DOORS)
def test_weights_that_are_not_finite_are_refused(data, whole, tmp_path, capsys, door, value):
    name = "final_layer.linear.bias"

    def spoil(state):
        for weights in (state["model"], state["ema"]["0.9999"]):
            weights[name] = weights[name].clone()
            weights[name][3] = value

    path = rewritten(whole, tmp_path / "in" / "0000007.pt", spoil)
    out = tmp_path / "out"
    out.mkdir()
    main, argv = doors(data, path, out)[door]
    if door == "plan":
        with pytest.raises(SystemExit):
            main([str(a) for a in argv])
        line = "".join(capsys.readouterr())
    else:
        line = runs.refused(main, capsys, argv)
    assert f"{path}: {name} has values that are not finite" in line
    assert not [p for p in out.rglob("*") if p.suffix in (".png", ".npz", ".pt", ".safetensors", ".json")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_largest_numbers_of_a_type_are_finite(whole, tmp_path, dtype):
    largest = torch.finfo(dtype).max

    def fill(state):
        for weights in (state["model"], state["ema"]["0.9999"]):
            weights.update({k: torch.full_like(v, largest, dtype=dtype) for k, v in weights.items()})

    assert reading.load_model(rewritten(whole, tmp_path / "a.pt", fill))


def diverge(monkeypatch, first, last=math.inf):
    """The gradients of the steps first … last are not finite."""
    forward = trainer.Trainer.forward

    def poisoned(self, batch):
        loss = forward(self, batch)
        return loss + (next(self.model.parameters()).sum() * float("inf") if first <= self.step <= last else 0)

    monkeypatch.setattr(trainer.Trainer, "forward", poisoned)


def test_the_last_good_checkpoint_is_from_before_the_first_skipped_step_and_is_kept(data, tmp_path, monkeypatch, capsys):
    diverge(monkeypatch, 4)
    options = ("--max-train-steps", 20, "--keep-last", 1, "--max-skipped-steps", 5, "--log-every", 8)
    line = refused(capsys, data, tmp_path, *options)
    assert "step 8: 5 steps in a row" in line and line.endswith("0000003.pt")
    assert training_state.saved_steps(tmp_path / "run" / "checkpoints") == [3, 7]


def test_after_the_skipped_steps_the_old_ones_go(data, tmp_path, monkeypatch):
    diverge(monkeypatch, 3, 4)
    run_train(data, tmp_path, "--max-train-steps", 5, "--keep-last", 1)
    assert training_state.saved_steps(tmp_path / "run" / "checkpoints") == [5]


def test_without_a_checkpoint_from_before_none_is_named(data, tmp_path, monkeypatch, capsys):
    diverge(monkeypatch, 1)
    line = refused(capsys, data, tmp_path, "--max-train-steps", 20, "--max-skipped-steps", 3)
    assert line.endswith("the last good checkpoint is none: nothing was saved before")


def test_meters_tell_how_long_ago_the_longest_row_began():
    """Against a plain loop over random rows; lines are read at random steps."""
    rng = np.random.default_rng(0)
    meters, accelerator = TrainingStats(["loss"], torch.device("cpu")), Accelerator(cpu=True)
    row = longest = 0
    before = None  # the step before the longest row since the last line
    for step in range(1, 300):
        skipped = rng.random() < 0.6
        meters.step(torch.tensor(float("nan") if skipped else 1.0))
        row = row + 1 if skipped else 0
        if row > longest:
            longest, before = row, step - row
        if rng.random() < 0.1:
            found = meters.read(accelerator)
            assert found["longest"] == longest and (not longest or step - found["since"] == before)
            longest = 0


# ------------------------------------------------------------------------------------------------------ odd records


def deep(levels=100_000):
    value = []
    for _ in range(levels):
        value = [value]
    return value


ODD = {
    "null": None,
    "true": True,
    "-1": -1,
    "10^12": 10**12,
    "10^400": 10**400,
    "10^5000": 10**5000,
    "nan": float("nan"),
    "inf": float("inf"),
    "empty": "",
    "text": "abc",
    "long": "a" * 100_000,
    "..": "..",
    "[]": [],
    "[1]": [1],
    "many": [0.5] * 100_000,
    "deep": deep(),
    "{}": {},
    "dict": {"a": 1},
    "keys": {1: torch.zeros(2)},
    "bytes": b"abc",
    "scalar": torch.zeros(()),
    "vector": torch.zeros(3),
    "five": torch.zeros(1, 1, 1, 1, 1),
    "void": torch.zeros(0),
    "whole numbers": torch.zeros(3, dtype=torch.int64),
    "complex": torch.zeros(3, dtype=torch.complex64),
    "sparse": torch.zeros(3, 3).to_sparse(),
    "vast": torch.zeros(1).expand(10**12),
    "meta": torch.empty(3, device="meta"),
    "nested": {"a": {"b": torch.zeros(3)}},
}


def attempt(action):
    """What `action` does with odd input: True if it takes it, False if it refuses it in one line; anything else is a failure."""
    try:
        action()
    except UserError as error:
        assert len(str(error)) < 20_000
        return False
    return True


@pytest.fixture
def served(monkeypatch):
    """serve(state) → a path whose checkpoint is this state."""

    def serve(state, path="odd.pt"):
        for module in (tensor_files, reading):
            monkeypatch.setattr(module, "load", lambda path, verify=False: state)
        return Path(path)

    return serve


@functools.cache
def model_to_start():
    return models.create_model("ELIT-SiT-Nano/2", input_size=8, num_classes=3, elit_group_size=4)


def every_reader(path, weights="ema", **given):
    """All that reads a state: the model, a new run's start, what --show prints, a resumed run."""

    def build():
        found = reading.read_weights(path, weights, given)
        resolve_architecture(GenerateConfig(), dict(given), found, path)
        build_model(found, path)

    def start():
        config = dataclasses.asdict(TrainConfig(model="ELIT-SiT-Nano/2", elit_group_size=4))
        model = model_to_start()
        made = init_from(reading.read_weights(path, weights, given), model, config, str(path))
        assert all(made.state_dict[k].shape == v.shape for k, v in model.state_dict().items() if k in made.state_dict)

    return [
        build,
        start,
        lambda: convert_checkpoint.main([str(path), "--show"]),
        lambda: records.check_training_state(tensor_files.load(path), path),
    ]


@pytest.fixture(scope="module")
def tiny(whole):
    state = tensor_files.load(whole)
    return state | {"optimizer": {"state": {}, "param_groups": []}}


def test_the_whole_state_is_taken_by_all(tiny, served):
    assert all(attempt(action) for action in every_reader(served(tiny)))


@pytest.mark.parametrize("kind", ODD)
def test_odd_values_in_our_records_are_refused_in_one_line(tiny, served, kind):
    odd = ODD[kind]
    for part in ("format", "model", "ema", "config", "vae", "step"):
        taken = [attempt(action) for action in every_reader(served(tiny | {part: odd}))]
        if part in ("format", "config", "vae"):  # {} as a config is a model without a name
            assert not any(taken[:2]), part
    attempt(lambda: records.check_training_state(tiny | {"optimizer": odd}, "odd.pt"))
    for field in dataclasses.fields(TrainConfig):
        attempt(lambda name=field.name: records.recorded_config(tiny["config"] | {name: odd}, "odd.pt"))
    for name in ("model", "resolution", "num_classes", "elit_group_size", "elit_read_depth", "head_depth", "stages_count"):
        attempt(every_reader(served(tiny | {"config": tiny["config"] | {name: odd}}))[0])
    for name in tiny["vae"]:
        attempt(every_reader(served(tiny | {"vae": tiny["vae"] | {name: odd}}))[0])
    for name in ("pos_embed", "interface.query", "blocks.0.mlp.fc1.weight"):
        weights = dict(tiny["model"]) | {name: odd}
        for action in every_reader(served(tiny | {"model": weights, "ema": {"0.9999": weights}})):
            attempt(action)


@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_in_bare_state_dicts_are_refused_in_one_line(tiny, served, kind):
    given = {"head_depth": 1, "tail_depth": 1, "elit_tail": "drop"}
    for name in tiny["model"]:
        assert not attempt(every_reader(served({**tiny["model"], name: ODD[kind]}), **given)[0]), name


def test_odd_tensors_under_published_names_are_refused_in_one_line(served, golden_checkpoint):
    weights = torch.load(golden_checkpoint("elit"), weights_only=False)["ema"]
    for name in [n for n in weights if "blocks." not in n]:
        for kind in ("scalar", "vector"):
            assert not attempt(every_reader(served({**weights, name: ODD[kind]}), head_depth=1)[0]), name


def test_bare_state_dicts_that_lack_a_tensor_or_have_an_odd_name(tiny, served):
    given = {"head_depth": 1, "tail_depth": 1, "elit_tail": "drop"}
    weights = tiny["model"]
    for name in weights:
        for action in every_reader(served({k: v for k, v in weights.items() if k != name}), **given)[:2]:
            attempt(action)
    for name in (
        "blocks.x.attn",
        "blocks",
        "blocks.",
        "blocks.99999999999.a",
        "decoder_blocks.x",
        "decoder_blocks.3.a",
        "",
        "\n",
        5,
    ):
        for action in every_reader(served({**weights, name: torch.zeros(2)}), **given)[:3]:
            attempt(action)
    for state in ({}, {"a": 1}, {5: torch.zeros(1)}, {"x_embedder.proj.weight": torch.zeros(192, 4, 2, 2)}):
        assert not attempt(every_reader(served(state))[0])


def test_odd_published_arguments_are_refused_in_one_line(served, golden_checkpoint):
    state = torch.load(golden_checkpoint("elit"), weights_only=False)
    for name in ("model", "resolution", "encoder_depth", "elit_group_size", "exp_name", "path_type", "anything"):
        for kind in ("null", "-1", "10^5000", "nan", "long", "deep", "dict", "vector"):
            args = argparse.Namespace(**(vars(state["args"]) | {name: ODD[kind]}))
            attempt(every_reader(served(state | {"args": args}))[0])
    for kind in ODD:
        for part in ("ema", "steps"):
            attempt(every_reader(served(state | {part: ODD[kind]}))[0])
            attempt(every_reader(served(state | {part: ODD[kind]}))[2])


@pytest.mark.parametrize(
    "changes",
    [
        *({"step": text} for text in ("abc", "-1", "1" * 5000, "1.5", "")),
        *({"config": text} for text in ("null", "[]", "5", "{", "[" * 100_000, '{"model": 5}', '{"resolution": "x"}')),
        *({"vae": text} for text in ("null", "{}", "[" * 100_000, '{"vae": "' + "1" * 400 + '"}')),
    ],
    ids=lambda changes: str(changes)[:30],
)
def test_odd_metadata_of_safetensors_is_refused_in_one_line(tiny, tmp_path, changes):
    from safetensors.torch import save_file

    metadata = {"config": json.dumps(tiny["config"]), "vae": json.dumps(tiny["vae"]), "step": "3"}
    save_file(dict(tiny["model"]), tmp_path / "a.safetensors", metadata | changes)
    assert not attempt(every_reader(tmp_path / "a.safetensors")[0])


def test_a_config_beside_safetensors_that_is_no_record_is_refused(tiny, tmp_path):
    from safetensors.torch import save_file

    save_file(dict(tiny["model"]), tmp_path / "model.safetensors")
    for content in (b"5", b"null", b"[" * 100_000, b"\xff\xfe", b'{"head_depth": {}}', b'{"head_depth": 1e400}'):
        (tmp_path / "config.json").write_bytes(content)
        assert not attempt(every_reader(tmp_path)[0]), content[:30]


@pytest.mark.parametrize(
    ("name", "value"),
    [("path_type", "x"), ("time_shift", -1), ("time_shift", float("nan")), ("resolution", "many"), ("num_classes", -5)]
    + [("elit_read_depth", 1_000_000), ("elit_group_size", 20_000), ("stages_count", 10**9), ("model", "ELIT-SiT-Nano2")],
)
def test_a_recorded_option_of_wrong_type_or_range_names_file_and_key(tiny, served, name, value):
    with pytest.raises(UserError, match=rf"odd\.pt.*{'Nano2' if name == 'model' else name}"):
        reading.read_weights(served(tiny | {"config": tiny["config"] | {name: value}}))


def test_a_resolution_that_is_text_is_a_number(tiny, served):
    """As YAML or JSON may hold it."""
    found = reading.read_weights(served(tiny | {"config": tiny["config"] | {"resolution": "32", "exp_name": 5}}))
    assert found.config["resolution"] == 32 and found.config["exp_name"] == "5"


@pytest.mark.parametrize("name", ["..", ".", "a/b", "/a", "a\0b", "a\\b", "n" * 300])
def test_the_name_of_a_run_in_a_checkpoint_is_one_folder(whole, tmp_path, capsys, name):
    path = rewritten(whole, tmp_path / "in" / "a.pt", lambda state: state["config"].update(exp_name=name))
    out = tmp_path / "out" / "deep"
    argv = ["--ckpt", path, "--sample-dir", out, "--num-fid-samples", 1, "--num-steps", 1]
    message = runs.refused(generate.main, capsys, argv)
    assert str(path) in message and "exp_name" in message
    assert not out.exists()


def test_tensors_of_several_types_become_float32(whole, tmp_path):
    def mix(state):
        for weights in (state["model"], state["ema"]["0.9999"]):
            weights["blocks.0.mlp.fc1.weight"] = weights["blocks.0.mlp.fc1.weight"].half()
            weights["blocks.1.mlp.fc1.weight"] = weights["blocks.1.mlp.fc1.weight"].double()

    path = rewritten(whole, tmp_path / "a.pt", mix)
    model, _ = reading.load_model(path)
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32}
    state = tensor_files.load(whole)["ema"]["0.9999"]
    mixed = model.state_dict()
    assert all(torch.equal(mixed[k], v) for k, v in state.items() if k != "blocks.0.mlp.fc1.weight")
    generate.main([str(a) for a in doors("", path, tmp_path / "out")["generate"][1]])


def moments_of(state):
    return state["optimizer"]["state"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.update(optimizer={}),
        lambda state: state.update(optimizer=None),
        lambda state: state.pop("optimizer"),
        lambda state: state.update(optimizer={"state": {0: 5}, "param_groups": []}),
        lambda state: moments_of(state)[0].pop("exp_avg"),
        lambda state: moments_of(state)[0].update(exp_avg_sq=torch.zeros(())),
        lambda state: moments_of(state)[0].update(step=torch.zeros(4)),
        lambda state: moments_of(state).update({10_000: moments_of(state)[0]}),
        lambda state: state.update(ema=[]),
        lambda state: state.update(config=5),
        lambda state: state["config"].pop("model") and state["config"].update(seed=[1, 2]),
        lambda state: state.update(data_size=torch.zeros(4)),
        lambda state: state.update(vae=None),
        lambda state: state.update(format=2),
        lambda state: state.update(step=2),
    ],
)
def test_a_training_state_with_parts_missing_or_odd_is_refused_in_one_line(data, run_dir, capsys, spoil):
    path = run_dir / "checkpoints" / "0000003.pt"
    state = tensor_files.load(path)
    spoil(state)
    training_state.save(path, state)
    if state.get("format", 1) != 1:
        torch.save(state, path)
        tensor_files.sidecar(path).unlink()
    before = content_of(run_dir)
    line = refused(capsys, data, run_dir.parent, "--resume-step", 3, "--max-train-steps", 4)
    assert str(run_dir) in line
    assert content_of(run_dir) == before


def test_odd_sums_scaler_and_groups_do_not_stop_a_run(data, run_dir):
    path = run_dir / "checkpoints" / "0000003.pt"
    state = tensor_files.load(path)
    state |= {"meters": {"losses": 5, "forward": torch.zeros(2), "norms": torch.zeros(7)}}
    state["optimizer"]["param_groups"] = "x"
    del state["scaler"]
    training_state.save(path, state)
    run_train(data, run_dir.parent, "--resume-step", -1, "--max-train-steps", 4)
    assert logged_steps(run_dir / "metrics.jsonl") == [1, 2, 3, 4]
