"""The trace of a GPU's work without a GPU: its rules against PyTorch's own, its counts against others'."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import models
from benchmarks.trace import table
from common.cuda_autocast import CudaAutocast
from config.options import TrainConfig
from training.step_trace import Op, Trace, compiled, trace_step

CONFIG = TrainConfig(model="ELIT-SiT-Ti/2", exp_name="trace", mixed_precision="bf16", num_classes=10)
CASES = {
    "linear": lambda x, y: F.linear(x, y),
    "matmul": lambda x, y: x @ y,
    "addcmul": lambda x, y: torch.addcmul(x, y, y),
    "add": lambda x, y: x + y,
    "layer_norm": lambda x, y: F.layer_norm(y, (8,)),
    "softmax": lambda x, y: y.softmax(dim=-1),
    "gelu": lambda x, y: F.gelu(y),
    "sum": lambda x, y: y.sum(),
    "square": lambda x, y: y.square(),
    "pow": lambda x, y: y**2,
    "rsqrt": lambda x, y: torch.rsqrt(y),
    "mean": lambda x, y: y.mean(dim=0),
    "lerp": lambda x, y: torch.lerp(y, y, 0.5),
    "cat": lambda x, y: torch.cat([x, y]),
    "rms_norm": lambda x, y: F.rms_norm(y, (8,)),
}


@pytest.fixture(scope="module")
def trace():
    return trace_step(CONFIG, 2, 0.25)


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16])
def test_the_rules_are_those_of_cuda(x_type):
    emulated, real = {}, {}
    with CudaAutocast(torch.bfloat16):
        for (name, case), y_type in itertools.product(CASES.items(), (torch.float32, torch.bfloat16)):
            x, y = torch.empty(8, 8, device="meta", dtype=x_type), torch.empty(8, 8, device="meta", dtype=y_type)
            emulated[name, y_type] = type_of(lambda case=case, x=x, y=y: case(x, y))
    with FakeTensorMode():
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)
        try:
            for (name, case), y_type in itertools.product(CASES.items(), (torch.float32, torch.bfloat16)):
                x, y = torch.empty(8, 8, device="cuda", dtype=x_type), torch.empty(8, 8, device="cuda", dtype=y_type)
                real[name, y_type] = type_of(lambda case=case, x=x, y=y: case(x, y))
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert emulated == real


def type_of(case):
    try:
        return case().dtype
    except RuntimeError:
        return RuntimeError


def test_flops_are_the_counted_ones(trace):
    model = models.create_model(CONFIG.model, input_size=32, num_classes=10)
    forward = sum(op.flops for op in trace.ops if not op.backward)
    assert forward == models.count_flops(model, 0.25, batch_size=2)
    assert (
        1.9 * forward < trace.total()[2] - forward <= 2 * forward + 4 * (7 / 2 - 2) * forward
    )  # attention's backward is 5 of 2


def test_parts_and_traffic_of_a_block(trace):
    assert trace.parts == ["loss", "embedding", "head and tail blocks", "Read", "core blocks", "Write", "final layer", "update"]
    first = next(op.region for op in trace.ops if op.part == "core blocks")
    blocks = [op for op in trace.ops if op.part == "core blocks" and op.region == first]
    gelu = [op for op in blocks if "gelu" in op.name]
    numbers = 2 * 256 // 4 * 4 * 192  # images × kept latents × hidden width
    assert [op.bytes for op in gelu] == [2 * 2 * numbers, 3 * 2 * numbers]  # bf16: read and write; read two, write one
    assert [op.backward for op in gelu] == [False, True]
    weights = sum(p.numel() for p in models.create_model(CONFIG.model, input_size=32, num_classes=10).parameters())
    adam = next(op for op in trace.ops if "adamw" in op.name)
    assert adam.bytes >= 28 * weights
    assert str(f"{trace.total()[0]:,}") in table(trace)


def test_fusing_never_adds(trace):
    fused = compiled(trace)
    assert fused.total("products") == trace.total("products")
    assert fused.total("element-wise", ["loss", "update"]) == trace.total("element-wise", ["loss", "update"])
    assert fused.total("element-wise")[0] < 0.8 * trace.total("element-wise")[0]
    for part in trace.parts:
        kernels, size, _ = fused.total("element-wise", [part])
        assert kernels <= trace.total("element-wise", [part])[0]
        assert size <= trace.total("element-wise", [part])[1]


def test_the_update_of_eight_processes_moves_at_most_48_bytes_per_parameter():
    """It was 60: clipping 12, the mean over processes 8, AdamW 28, an average 12."""
    trace = trace_step(CONFIG, 2, 1.0, processes=8)
    adam = next(op for op in trace.ops if "adamw" in op.name)
    assert adam.bytes / trace.parameters == pytest.approx(32, abs=0.1)  # reads four, writes four: gradients too, once scaled
    assert trace.total(parts=["update"])[1] / trace.parameters <= 48


def test_a_chain_between_two_products_is_one_kernel():
    def op(name, reads, writes):
        return Op(name, "a", ("a", 1, True), False, 1, 0, dict.fromkeys(reads, 4), dict.fromkeys(writes, 4))

    ops = [op("mm", [1], [2]), op("add", [2, 9], [3]), op("mul", [3], [4]), op("mm", [4], [5]), op("mul", [5, 9], [6])]
    fused = compiled(Trace(ops, {}, set()))
    assert sorted(o.name for o in fused.ops) == ["fused", "fused", "mm", "mm"]
    assert sorted(o.bytes for o in fused.ops if o.name == "fused") == [12, 12]


def test_an_elit_step_in_eager_mode_stays_below_its_bound():
    """The element-wise traffic was 115.3 GB while gates and modulations promoted under autocast."""
    trace = trace_step(TrainConfig(model="ELIT-SiT-XL/2", exp_name="trace", mixed_precision="bf16"), 32, 1.0, update=False)
    assert trace.total("element-wise")[1] < 0.89 * 115.3e9
    around = [part for part in trace.parts if part not in ("loss", "core blocks", "head and tail blocks")]
    assert compiled(trace).total(parts=around)[0] <= 191  # 362 in eager mode, before
