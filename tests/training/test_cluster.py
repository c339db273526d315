"""Estimates of many GPUs: collectives and steps against closed forms, memory and traffic against counts by hand."""

import dataclasses
import json
import re

import pytest
import torch

import models
from benchmarks import scale
from common.errors import UserError
from config.options import TrainConfig
from training.cards import CARDS, find_card
from training.cluster import Cluster, Group, Link, Part, Scheme, mean, step
from training.memory import process_bytes
from training.step_time import Machine, estimate, parts_of
from training.step_trace import compiled, trace_step, trace_update

CONFIG = TrainConfig(model="ELIT-SiT-Ti/2", exp_name="a", mixed_precision="bf16", num_classes=10)
NODE = Cluster(8, 8, Link(100.0, 0.5), Link(10.0, 2.0), "ring")  # 100 bytes/s: numbers to be checked by hand


def parameters_of(model="ELIT-SiT-Ti/2"):
    with torch.device("meta"):
        return models.create_model(model, input_size=32, num_classes=10)


# --------------------------------------------------------------------------------------------------------- collectives


def ring_steps(n, size, bandwidth, latency):
    """A reduce-scatter in steps: every GPU holds n pieces and sends one to its neighbour, until each piece has met all."""
    met, seconds = [{piece: {gpu} for piece in range(n)} for gpu in range(n)], 0.0
    for i in range(n - 1):
        sent = [(gpu, (gpu - i) % n) for gpu in range(n)]
        moved = [(gpu, piece, met[gpu][piece]) for gpu, piece in sent]
        for gpu, piece, sources in moved:
            met[(gpu + 1) % n][piece] = met[(gpu + 1) % n][piece] | sources
        seconds += size / n / bandwidth + latency
    assert all(len(met[gpu][(gpu + 1) % n]) == n for gpu in range(n))
    return seconds


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_ring_is_its_steps(n):
    cluster = dataclasses.replace(NODE, gpus=n)
    assert cluster.one_way(800, cluster.everyone) == pytest.approx(ring_steps(n, 800, 100.0, 0.5))
    assert cluster.all_reduce(800, cluster.everyone) == pytest.approx(2 * (n - 1) / n * 800 / 100 + 2 * (n - 1) * 0.5)


def test_a_ring_over_nodes_has_the_narrowest_link_and_the_latency_of_each():
    cluster = dataclasses.replace(NODE, gpus=32)
    assert cluster.everyone == Group(32, 4)
    assert cluster.all_reduce(640, cluster.everyone) == pytest.approx(2 * (31 / 32 * 640 / 10 + 28 * 0.5 + 3 * 2.0))
    assert cluster.replicas(8) == Group(4, 4)  # one of each node, with an eighth of its cards
    assert cluster.all_reduce(640, cluster.replicas(8)) == pytest.approx(2 * (3 / 4 * 640 / (10 / 8) + 3 * 2.0))
    assert cluster.shards(4) == Group(4, 1) and cluster.replicas(4) == Group(8, 4)
    assert cluster.one_way(640, cluster.replicas(4)) == pytest.approx(7 / 8 * 640 / (10 / 4) + 4 * 0.5 + 3 * 2.0)
    alone = dataclasses.replace(NODE, gpus=1)
    assert alone.all_reduce(640, alone.everyone) == 0 == alone.one_way(640, alone.everyone)


@pytest.mark.parametrize("n", [2, 64, 1000])
def test_a_tree_has_the_latency_of_its_depth(n):
    cluster = Cluster(n, 1, Link(1.0, 9.0), Link(10.0, 2.0), "tree")
    assert cluster.all_reduce(640, cluster.everyone) == pytest.approx(2 * 640 / 10 + 2 * {2: 1, 64: 6, 1000: 10}[n] * 2.0)
    ring = dataclasses.replace(cluster, reduction="ring")
    faster = dataclasses.replace(cluster, reduction="faster").all_reduce(640, cluster.everyone)
    assert faster == min(c.all_reduce(640, c.everyone) for c in (cluster, ring))
    assert (faster == ring.all_reduce(640, cluster.everyone)) == (n == 2)


# --------------------------------------------------------------------------------------------------------------- steps


def test_a_replicated_step_waits_for_the_buckets_that_its_backward_pass_does_not_hide():
    reduce = 2 * 7 / 8 * 400 / 100 + 2 * 7 * 0.5  # 14 s for each bucket of 400 bytes
    parts = [Part(1.0, 2.0, 100), Part(3.0, 20.0, 100)]
    timing = step(parts, 5.0, NODE, Scheme(bucket=400))
    assert timing == pytest.approx((1 + 3 + 20 + 2 + 12 + reduce + 5, 12 + reduce, 2 * 7 / 8 * 800))
    no_compute = step([Part(0.0, 0.0, 250)], 0.0, NODE, Scheme(bucket=400, width=2))  # 400, 400 and 200 bytes, halved
    assert no_compute.waiting == pytest.approx(sum(2 * 7 / 8 * size / 100 + 7 for size in (200, 200, 100)))
    twice = step(parts, 5.0, NODE, Scheme(bucket=400, micro_steps=2))
    assert twice.seconds - timing.seconds == pytest.approx(26.0) and twice.sent == timing.sent
    hidden = step([Part(1.0, 2.0, 0), Part(3.0, 20.0, 100)], 5.0, dataclasses.replace(NODE, inside=Link(1e9, 0)), Scheme())
    assert hidden.seconds == pytest.approx(31.0, abs=1e-5)


def test_a_sharded_step_waits_for_what_it_gathers():
    free = dataclasses.replace(NODE, inside=Link(100.0, 0.0))
    parts = [Part(1.0, 1.0, 100), Part(10.0, 30.0, 200, 400), Part(10.0, 30.0, 200, 400)]
    gather, root, scatter = 7 / 8 * 400 / 100, 7 / 8 * 400 / 100, 7 / 8 * 800 / 100  # 3.5, 3.5 and 7 s
    timing = step(parts, 0.0, free, Scheme(8))
    # Before the first part: the root, 3.5 s, and the first block, 3.5 s less 1 s of the part that needs none. Backward: the last block
    # is gathered again, 3.5 s; the other one meanwhile. The scatter of the first block and of the root come after, 7 + 3.5 s less 1 s.
    assert timing.waiting == pytest.approx(root + gather - 1 + gather + scatter + root - 1 + 2 * 7 / 8 * 4 / 100)
    assert timing.sent == pytest.approx(7 / 8 * (400 + 4 * 400 + 4 * 500) + 4)
    assert timing.seconds == pytest.approx(82 + timing.waiting)
    groups = step(parts, 0.0, dataclasses.replace(free, gpus=32), Scheme(8))
    assert groups.sent - timing.sent == pytest.approx(2 * 3 / 4 * 4 * 500 / 8)
    twice = step(parts, 0.0, dataclasses.replace(free, gpus=32), Scheme(8, micro_steps=2))
    assert twice.sent == pytest.approx(groups.sent + timing.sent - 4)
    fast = step(parts, 3.0, dataclasses.replace(NODE, inside=Link(1e12, 0.0)), Scheme(8))
    assert fast.seconds == pytest.approx(85.0)
    assert mean([timing, fast]).sent == pytest.approx((timing.sent + fast.sent) / 2)


# ------------------------------------------------------------------------------------------------------- from the trace


@pytest.fixture(scope="module")
def traces():
    sharded = dataclasses.replace(CONFIG, shard="full")
    return trace_step(CONFIG, 2, 0.25), trace_step(sharded, 2, 0.25, processes=8)


def test_parts_are_all_of_the_step_and_of_the_model(traces):
    model = parameters_of()
    block = sum(p.numel() for p in model.blocks[0].parameters())
    for trace, is_sharded in zip(traces, (False, True), strict=True):
        parts, update = parts_of(trace, lambda op: op.bytes)
        assert sum(p.forward + p.backward for p in parts) + update == sum(op.bytes for op in trace.ops)
        assert sum(p.parameters for p in parts) == sum(p.numel() for p in model.parameters())
        blocks = [p for p in parts if p.parameters == block]
        assert len(blocks) == 8 and all(p.backward > p.forward > 0 for p in blocks)
        assert {p.gathered for p in blocks} == ({2 * block} if is_sharded else {0})  # bf16
        read = sum(p.numel() for p in model.interface.reader.parameters())
        assert next(p.gathered for p in parts if p.parameters == read) == (4 * read if is_sharded else 0)  # its norms are not


def test_a_step_is_bound_by_the_slower_of_gpu_and_host(traces):
    alone, machine = Cluster(1, 1), Machine(1e12, 1e11, 0.0, 0.0)
    found = estimate(traces[0], machine, alone, Scheme())
    ops = traces[0].ops
    assert found.device == pytest.approx(sum(max(op.flops / 1e12, op.bytes / 1e11) for op in ops))
    assert found.host == 0 and found.timing == pytest.approx((found.device, 0, 0))
    slow = machine._replace(eager_launch=1.0, compiled_launch=0.5)
    assert estimate(traces[0], slow, alone, Scheme()).timing.seconds == pytest.approx(sum(op.kernels for op in ops))
    fused = compiled(traces[0])
    kernels = sum(op.kernels * (0.5 if op.region[2] else 1.0) for op in fused.ops)
    assert estimate(fused, slow, alone, Scheme()).timing.seconds == pytest.approx(kernels)
    assert kernels < sum(op.kernels for op in ops)
    more = estimate(traces[0], machine, alone, Scheme(micro_steps=3), more_flops=1e12)
    assert more.device == pytest.approx(3 * (1 + found.device) - 2 * parts_of(traces[0], machine.device_seconds)[1])


def test_images_that_are_not_square_are_traced():
    trace = trace_step(dataclasses.replace(CONFIG, model="SiT-Ti/2", resolution="64x96"), 2, update=False)
    with torch.device("meta"):
        model = models.create_model("SiT-Ti/2", input_size=(8, 12), num_classes=10)
    assert sum(op.flops for op in trace.ops if not op.backward) == models.count_flops(model, batch_size=2)


def test_the_update_of_a_shard_moves_52_bytes_per_parameter():
    """Its norm 4, scaling gradients 8, AdamW 28, an average 12."""
    own = dataclasses.replace(CONFIG, shard="full")
    numbers = sum(-(-p.shape[0] // 8) * p[0].numel() for p in parameters_of().parameters())
    moved = sum(op.bytes for op in trace_update(own, 8))
    assert moved / numbers == pytest.approx(52, abs=0.1)


def test_memory_of_shards_by_hand():
    model, whole = parameters_of("SiT-Ti/2"), 0
    config = TrainConfig(model="SiT-Ti/2", exp_name="a", mixed_precision="bf16", num_classes=10, ema_decay=[0.9, 0.99])
    numbers = sum(p.numel() for p in model.parameters())
    tables, tensors = 4 * 256 * 192, len(list(model.parameters()))
    plain = process_bytes(model, config, 8)
    assert (plain.weights, plain.gradients, plain.optimizer) == (4 * numbers + tables, 4 * numbers, 8 * numbers + 4 * tensors)
    assert plain.ema == (2 * (4 * numbers + tables) + 7) // 8 and plain.gathered == 0
    for size in (2, 3):
        own = sum(4 * -(-p.shape[0] // size) * p[0].numel() for p in model.parameters())
        found = process_bytes(model, dataclasses.replace(config, shard=str(size)), 6)
        assert (found.weights, found.gradients, found.ema) == (own + tables, own, 2 * own)
        block = 18 * 192**2 + 15 * 192  # weights, and biases of 3 + 1 + 4 + 1 + 6 widths
        last = 192 * 16 + 16 + 2 * 192**2 + 2 * 192
        whole = 2 * 4 * (numbers - 8 * block - last)
        assert found.gathered == (2 + 2 + 2 + 4) * block + whole  # two blocks in bf16, gradients in bf16 and float32
        assert found.total == sum((found.weights, found.gradients, found.optimizer, found.ema, found.gathered))
    assert whole < 4 * numbers


# ------------------------------------------------------------------------------------------------------ cards, commands


def test_cards_by_name():
    assert find_card("H100") == CARDS["H100"] == find_card("NVIDIA H100 80GB HBM3")
    assert find_card("L40") is not find_card("L4") and find_card("RTX 5090 D") is None
    assert all(card.half > 1.9 * (card.tf32 or 0) and card.bandwidth < 10 and card.memory >= 24 for card in CARDS.values())


def test_the_command_prints_a_row_for_each_number_of_gpus_and_shards(capsys):
    scale.main(["--model", "SiT-Ti/2", "--gpus", "8", "16", "--batch-size", "4", "--tflops", "100", "--link-us", "0", "0"])
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if re.match(r"\| \d", line)]
    assert [row[:2] for row in rows] == [["8", "1 (DDP)"], ["8", "8"], ["16", "1 (DDP)"], ["16", "8"], ["16", "16"]]
    numbers = sum(p.numel() for p in parameters_of("SiT-Ti/2").parameters())
    sent = dict(zip((tuple(row[:2]) for row in rows), (float(row[7]) for row in rows), strict=True))
    with torch.device("meta"):
        total = sum(p.numel() for p in models.create_model("SiT-Ti/2", input_size=32).parameters())
    assert numbers < total and sent["8", "1 (DDP)"] == pytest.approx(2 * 7 / 8 * 4 * total / 1e9, abs=0.005)
    assert "Estimates. Assumed: 100 TFLOP/s" in out and "320 GB/s and 0 µs between nodes" in out


def test_rates_that_were_measured_take_the_place_of_the_data_sheet(tmp_path):
    path = tmp_path / "gpu.json"
    values = {"bf16 products": {"TFLOP/s": 500}, "device copy": {"GB/s read and written": 2000}}
    entries = [{"name": name, "values": value} for name, value in values.items()] + [{"name": "failed", "passed": False}]
    path.write_text(json.dumps({"parts": {"machine": {"entries": entries}}}))
    assert scale.measured_rates(str(path), "bf16") == (500, 2000)
    for wrong in ("fp16", "bf16"):
        with pytest.raises(UserError, match="--measured"):
            scale.measured_rates(str(path), wrong)
        path.write_text("[]")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--card Z9", ["--card Z9", "H100"]),
        ("--gpus 12", ["--gpus 12", "--per-node 8"]),
        ("--gpus 8 --shards 2 3", ["--shards 2 3"]),
    ],
)
def test_bad_input_of_the_command(options, words, capsys):
    with pytest.raises(SystemExit) as stop:
        scale.main(options.split())
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in line and all(word in line for word in words)
