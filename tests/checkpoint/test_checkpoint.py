"""Checkpoint files: round trips, damage, refusal of code, and which weights of which model are loaded."""

import argparse
import dataclasses
import hashlib
import pickle
import resource
import threading

import pytest
import torch
from numerics import inputs, randomize

import models
from checkpoint import async_writer, reading, training_state
from checkpoint.architecture import resolve_architecture
from checkpoint.weights import load_state_dict
from common import tensor_files
from common.errors import UserError
from config.options import Architecture, TrainConfig
from models.vae import VAERecord

RECORD = VAERecord("some-vae", "ab12", 4, 3, 0.5, 0.25)  # 32 pixels → 8×8×3
SMALL = {"hidden_size": 32, "num_heads": 4, "depth": 5}  # constructor arguments beyond the registered size
OPTIONS = {"elit_group_size": 2, "elit_read_depth": 2, "elit_tail": "skip", "head_depth": 3, "tail_depth": 1, "qk_norm": True}


def tiny(name="ELIT-SiT-Ti/2", seed=0, **options):
    sizes = {"input_size": 8, "in_channels": 3, "num_classes": 5, **SMALL}
    return randomize(models.create_model(name, **(sizes | (OPTIONS if name.startswith("ELIT") else {}) | options)), seed)


@pytest.fixture(scope="module")
def trained():
    """Three sets of weights of one model: raw, and averaged with two decays."""
    return {kind: tiny(seed=i) for i, kind in enumerate(("model", "0.9999", "0.999"))}


def state_of(trained, **changes):
    config = dataclasses.asdict(TrainConfig(model="ELIT-SiT-Ti/2", exp_name="a", resolution=32, num_classes=5, **OPTIONS))
    state = {
        "model": trained["model"].state_dict(),
        "ema": {decay: trained[decay].state_dict() for decay in ("0.9999", "0.999")},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "scheduler": {"last_epoch": 3},
        "scaler": None,
        "step": 3,
        "config": config,
        "vae": RECORD.to_dict(),
    }
    return state | changes


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoints" / "0000003.pt"
    training_state.save(path, state_of(trained))
    return path


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


# ------------------------------------------------------------------------------------------------------- round trip


def test_what_is_saved_is_what_is_loaded(saved, trained):
    found = tensor_files.load(saved, verify=True)
    assert type(found.pop("format")) is int
    found["model"], found["ema"] = dict(found["model"]), {k: dict(v) for k, v in found["ema"].items()}
    wanted = state_of(trained)
    wanted["model"], wanted["ema"] = dict(wanted["model"]), {k: dict(v) for k, v in wanted["ema"].items()}
    assert_same(found, wanted)


def test_a_checkpoint_has_its_checksum_beside_it_and_nothing_else(saved):
    assert sorted(p.name for p in saved.parent.iterdir()) == ["0000003.pt", "0000003.pt.sha256"]
    line = (saved.parent / "0000003.pt.sha256").read_text()
    assert line.split() == [hashlib.sha256(saved.read_bytes()).hexdigest(), "0000003.pt"]  # as `sha256sum -c` reads it


def test_a_file_of_plain_containers_needs_no_trust(saved):
    torch.load(saved, weights_only=True)  # with no class allowed


def test_a_failing_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "0000001.pt"
    training_state.save(path, {"step": 1})
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        training_state.save(path, {"step": 2, "broken": lambda: None})
    assert tensor_files.load(path, verify=True)["step"] == 1


@pytest.fixture
def small_files():
    """small_files(n): no file can grow beyond n bytes, as on a full disk; None: all room again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)


@pytest.mark.parametrize("room", [0, 100, 30_000, 399_000])
def test_a_full_disk_harms_nothing_and_is_left_clean(tmp_path, small_files, room):
    old, new = tmp_path / "0000001.pt", tmp_path / "0000002.pt"
    training_state.save(old, {"step": 1})
    names = sorted(tmp_path.iterdir())
    small_files(room)
    with pytest.raises(OSError, match="File too large"):
        training_state.save(new, {"step": 2, "w": torch.zeros(100_000), "v": torch.ones(10)})
    small_files(None)
    assert sorted(tmp_path.iterdir()) == names
    assert tensor_files.load(old, verify=True)["step"] == 1


# ------------------------------------------------------------------------------------------------ in the background


def test_the_writer_saves_the_state_of_its_call(tmp_path):
    """What training does to the weights while the file is written does not get into it; the memory is used again."""
    writer = async_writer.Writer(tmp_path, 0, 0, pytest.fail)
    weight, addresses = torch.zeros(1000), set()
    for step in (1, 2):
        weight += 1
        writer.save(step, {"step": step, "nested": [{"w": weight}]})
        weight += 100
        addresses.add(writer._memory._block.ctypes.data)
    writer.wait()
    assert len(addresses) == 1
    for step, value in ((1, 1.0), (2, 102.0)):
        assert tensor_files.load(tmp_path / f"{step:07d}.pt", verify=True)["nested"][0]["w"].unique().tolist() == [value]


def test_a_checkpoint_under_way_is_not_seen(tmp_path, monkeypatch):
    begun, go_on, write = threading.Event(), threading.Event(), tensor_files.HashingFile.write

    def slowly(file, data):
        begun.set()
        assert go_on.wait(30)
        return write(file, data)

    monkeypatch.setattr(tensor_files.HashingFile, "write", slowly)
    checkpoint_writer = async_writer.Writer(tmp_path, 0, 0, pytest.fail)
    checkpoint_writer.save(5, {"step": 5})  # comes back at once
    assert begun.wait(30)
    assert training_state.saved_steps(tmp_path) == [] and training_state.load_newest(tmp_path, pytest.fail) is None
    go_on.set()
    checkpoint_writer.wait()
    assert training_state.load_newest(tmp_path, pytest.fail)["step"] == 5


def test_a_failed_write_is_told_and_the_next_one_succeeds(tmp_path, small_files):
    told = []
    writer = async_writer.Writer(tmp_path, 1, 0, told.append)
    state = {"w": torch.zeros(100_000)}
    for step, room in ((1, None), (2, 1000), (3, 1000), (4, None)):
        small_files(room)
        writer.save(step, state | {"step": step})
        writer.wait()
        assert (writer.error is None) == (room is None)
        assert training_state.saved_steps(tmp_path) == [{1: 1, 2: 1, 3: 1, 4: 4}[step]]  # one is kept, if another is whole
    assert len(told) == 2 and all("0000002.pt" in m or "0000003.pt" in m for m in told) and "too large" in told[0]


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [
        (0, 0, [2, 4, 5, 6, 8, 10, 12]),
        (0, 4, [2, 4, 5, 6, 8, 10, 12]),
        (1, 0, [10, 12]),
        (3, 0, [6, 8, 10, 12]),
        (2, 4, [4, 8, 10, 12]),
        (9, 0, [2, 4, 5, 6, 8, 10, 12]),
    ],
)
def test_old_checkpoints_are_deleted_but_for_the_last_and_every_so_many_steps(tmp_path, last, every, kept):
    for step in (2, 4, 5, 6, 8, 10, 12):
        training_state.save(tmp_path / f"{step:07d}.pt", {"step": step})
    training_state.prune(tmp_path, 10, last, every)  # 12 is not older than 10
    assert training_state.saved_steps(tmp_path) == kept
    assert len(list(tmp_path.iterdir())) == 2 * len(kept)  # their checksums went too


# ------------------------------------------------------------------------------------------------------------ damage


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.pt: no such checkpoint"):
        tensor_files.load(tmp_path / "none.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        reading.load_model(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_checkpoint_is_refused(saved, tmp_path, keep):
    content = saved.read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UserError, match=r"cut\.pt: truncated"):
        tensor_files.load(path)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" + bytes(100), b"model: SiT-B/2\n" * 50, b"PK\x03\x04" + bytes(500)])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a checkpoint"):
        tensor_files.load(path)


def test_a_single_changed_byte_is_found_by_the_checksum(saved, tmp_path):
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / "0000003.pt"
    path.write_bytes(content)
    tensor_files.sidecar(path).write_text(tensor_files.sidecar(saved).read_text())
    with pytest.raises(UserError, match="checksum"):
        tensor_files.load(path, verify=True)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty-sidecar"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
    for step in (10, 200, 30000):
        training_state.save(tmp_path / f"{step:07d}.pt", {"step": step, "w": torch.arange(5000)})
    newest = tmp_path / "0030000.pt"
    content = bytearray(newest.read_bytes())
    if damage == "cut":
        newest.write_bytes(content[:-100])
    elif damage == "flip":
        content[len(content) // 2] ^= 255
        newest.write_bytes(content)
    else:
        tensor_files.sidecar(newest).write_text("")
    warnings = []
    assert training_state.saved_steps(tmp_path) == [10, 200, 30000]
    assert training_state.load_newest(tmp_path, warnings.append)["step"] == 200
    assert len(warnings) == 1 and "0030000.pt" in warnings[0]


def test_the_newest_whole_checkpoint_needs_no_warning_and_none_is_none(tmp_path):
    assert training_state.load_newest(tmp_path, pytest.fail) is None
    for step in (9, 10):
        training_state.save(tmp_path / f"{step:07d}.pt", {"step": step})
    (tmp_path / "0000011.pt.tmp").write_bytes(b"half a file")  # what a killed save leaves
    (tmp_path / "best.pt").write_bytes(b"not one of ours")
    assert training_state.load_newest(tmp_path, pytest.fail)["step"] == 10


# -------------------------------------------------------------------------------------------------------------- code


class Bomb:
    """Unpickled freely, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Shell(Bomb):
    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


def write_bomb(path, state, kind):
    if kind == "pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("bomb", [Bomb, Shell])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path, kind, bomb):
    path, trace = tmp_path / "evil.pt", tmp_path / "ran"
    write_bomb(path, {"format": 1, "model": {"w": 1.0}, "config": bomb(trace)}, kind)
    assert not trace.exists()
    for read in (tensor_files.load, reading.read_weights, reading.load_model):
        with pytest.raises(UserError, match=r"evil\.pt: refused: it carries code \(.*(open|system)\)"):
            read(path)
    assert not trace.exists()
    if kind != "pickle":  # the file does run what it carries, where it is trusted
        torch.load(path, weights_only=False)
        assert trace.exists()


def test_code_hidden_in_published_arguments_is_refused_and_does_not_run(tmp_path):
    trace = tmp_path / "ran"
    args = argparse.Namespace(model="SiT-S/4", resolution=128, num_classes=10, extra=Bomb(trace))
    torch.save({"model": {}, "ema": {}, "opt": {}, "steps": 1, "args": args}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="carries code"):
        reading.load_model(tmp_path / "evil.pt")
    assert not trace.exists()


def test_other_classes_are_refused_by_name(tmp_path):
    torch.save({"model": {}, "record": RECORD}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="VAERecord"):
        tensor_files.load(tmp_path / "a.pt")


# ----------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("weights", "kind"), [("ema", "0.9999"), ("ema:0.9999", "0.9999"), ("ema:0.999", "0.999"), ("model", "model")]
)
def test_weights_are_chosen_by_name(saved, trained, weights, kind):
    model, config = reading.load_model(saved, weights, **SMALL)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert (model.head_depth, model.interface.tail, model.interface.latents_per_group) == (3, "skip", 4)
    assert config["model"] == "ELIT-SiT-Ti/2" and config["resolution"] == 32
    arguments = inputs(model, [0.2, 0.9], dtype=torch.float32)
    for budget in (None, 0.5):
        assert torch.equal(model(*arguments, budget), trained[kind](*arguments, budget))


@pytest.mark.parametrize(
    ("model", "split"), [("ELIT-SiT-Ti/2", (1, 1)), ("ELIT-SiT-S/2", (2, 2)), ("ELIT-SiT-UViT-Ti/2", (1, 1))]
)
def test_a_checkpoint_that_records_no_split_has_the_former_one(tmp_path, model, split):
    net = tiny(model, depth=7, elit_tail="drop", head_depth=split[0], tail_depth=split[1], qk_norm=None)
    config = {
        "model": model,
        "resolution": 32,
        "num_classes": 5,
        "head_depth": None,
        "elit_group_size": 2,
        "elit_read_depth": 2,
    }
    training_state.save(tmp_path / "old.pt", state_of(dict.fromkeys(("model", "0.9999", "0.999"), net), config=config))
    weights = reading.read_weights(tmp_path / "old.pt")
    assert (weights.config["head_depth"], weights.config["tail_depth"], weights.config["elit_write"]) == (*split, "published")
    loaded, _ = reading.load_model(tmp_path / "old.pt", **SMALL | {"depth": 7})
    arguments = inputs(net, [0.2, 0.9], dtype=torch.float32)
    assert torch.equal(loaded(*arguments, 0.25), net.eval()(*arguments, 0.25))
    # By hand the split and the Write may be repeated, but not contradicted.
    options = {"head_depth": split[0], "elit_write": "published", "elit_mlp_ratio": 1.0}
    resolve_architecture(Architecture(), options, weights, "old.pt")
    for name, value in {"head_depth": 3, "elit_write": "paper", "elit_mlp_ratio": 4.0}.items():
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value} contradicts old.pt"):
            resolve_architecture(Architecture(), {name: value}, weights, "old.pt")


@pytest.mark.parametrize("weights", ["ema:0.5", "modle", "model:0.999", "EMA", ""])
def test_unknown_weights_name_what_there_is(saved, weights):
    with pytest.raises(UserError) as error:
        reading.load_model(saved, weights)
    assert all(known in str(error.value) for known in ("model", "ema", "ema:0.9999", "ema:0.999", str(saved)))


def test_published_files_have_ema_and_model(golden_checkpoint):
    for weights in ("ema", "model"):
        assert reading.load_model(golden_checkpoint("sit"), weights)[1]["num_classes"] == 10
    with pytest.raises(UserError, match="model, ema"):
        reading.load_model(golden_checkpoint("sit"), "ema:0.999")


def test_loading_takes_overrides_and_the_device(saved):
    model, _ = reading.load_model(saved, elit_tail="drop", fused_attn=False, **SMALL)
    assert model.interface.tail == "drop" and not model.blocks[0].attn.fused
    assert next(model.parameters()).device.type == "cpu"


def test_loading_leaves_the_random_state_alone(saved):
    before = torch.random.get_rng_state()
    reading.load_model(saved, **SMALL)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_projectors_are_left_aside(trained, tmp_path):
    with_projectors = tiny(z_dims=(7,), encoder_depth=2)
    path = tmp_path / "a.pt"
    training_state.save(path, state_of(trained, model=with_projectors.state_dict()))
    model, _ = reading.load_model(path, "model", **SMALL)
    assert not any("projector" in name for name, _ in model.named_parameters())
    arguments = inputs(model, [0.5], dtype=torch.float32)
    assert torch.equal(model(*arguments), with_projectors(*arguments))


# ------------------------------------------------------------------------------------------------------- wrong models


def test_wrong_keys_and_shapes_are_named():
    model = tiny("SiT-Ti/2")
    good = model.state_dict()
    before = {k: v.clone() for k, v in good.items()}
    bias, table = "blocks.3.attn.qkv.bias", "y_embedder.embedding_table.weight"
    for change, said in (
        ({k: v for k, v in good.items() if k != bias}, f"{bias} is missing"),
        (good | {"blocks.9.odd": torch.zeros(1)}, "blocks.9.odd is unknown"),
        (good | {table: torch.zeros(1001, 32)}, f"{table} has shape (1001, 32) instead of (6, 32)"),
    ):
        changed = {k: v + 1 if v.shape == before.get(k, v).shape else v for k, v in change.items()}
        with pytest.raises(UserError) as error:
            load_state_dict(model, changed, "here.pt")
        assert "here.pt" in str(error.value) and said in str(error.value)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # nothing half-loaded


def test_a_state_of_another_model_is_refused(saved, trained, tmp_path):
    state = tensor_files.load(saved)
    path = tmp_path / "other.pt"
    for changes, small, said in (
        ({"model": "SiT-Ti/2"}, SMALL, "interface.query is unknown"),
        ({"model": "ELIT-SiT-Ti/4"}, SMALL, "x_embedder.proj.weight has shape (32, 3, 2, 2) instead of (32, 3, 4, 4)"),
        ({"elit_group_size": 4}, SMALL, "interface.query has shape (4, 32) instead of (16, 32)"),
        ({"qk_norm": False}, SMALL, "blocks.0.attn.q_norm.weight is unknown"),
        ({}, SMALL | {"depth": 6}, "blocks.5.attn.qkv.weight is missing"),
        ({}, {}, "blocks.5.attn.qkv.weight is missing"),
    ):
        training_state.save(path, state_of(trained, config=state["config"] | changes))
        with pytest.raises(UserError) as error:
            reading.load_model(path, **small)
        assert "other.pt: not a checkpoint of this model" in str(error.value) and said in str(error.value), error.value


def test_an_unknown_model_or_format_and_a_missing_part_are_named(saved, trained, tmp_path):
    path = tmp_path / "a.pt"
    for changes, said in (
        ({"config": state_of(trained)["config"] | {"model": "ELIT-SiT-Ti2"}}, "did you mean ELIT-SiT-Ti/2"),
        ({"config": state_of(trained)["config"] | {"resolution": 30}}, "resolution 30"),
        ({"format": 999}, "format 999"),
        ({"vae": {"vae": "x"}}, "sha256 is missing"),
    ):
        training_state.save(path, state_of(trained, **changes))
        with pytest.raises(UserError, match=said):
            reading.load_model(path)
    state = state_of(trained)
    del state["ema"]
    training_state.save(path, state)
    with pytest.raises(UserError, match="ema is missing"):
        reading.load_model(path)


@pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, [1, 2], torch.zeros(3)])
def test_files_that_hold_something_else_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt"):
        reading.load_model(tmp_path / "a.pt")
