"""What follows a backward pass: gradients over processes, clipping, averages, and the copy of a checkpoint."""

import hashlib

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from checkpoint import async_writer, training_state
from common import hub
from config.options import TrainConfig
from training.optim import EMA, IdleParameters, clip_in_step
from training.setup import ddp_options


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone: DDP does in it all that it does in one of several."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Stages(nn.Module):
    """A trunk, and a head for each stage, of which a forward uses those up to the active one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(8, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, stage):
        return sum(head(self.trunk(x)).square().mean() for head in self.heads[: stage + 1])


def train(stages, wrap, idle, accumulation=2):
    model = Stages()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    wrapped = wrap(model)
    for step in range(0, len(stages), accumulation):
        for n, stage in enumerate(stages[step : step + accumulation]):
            wrapped.require_backward_grad_sync = n == accumulation - 1
            loss = wrapped(torch.full((4, 8), 1.0 + step + n), stage)
            if idle:
                loss = idle.touch(loss, list(model.heads[stage + 1 :].parameters()))
            loss.backward()
        if idle:
            idle.drop_gradients()
        optimizer.step()
        optimizer.zero_grad()
    state = [x for s in optimizer.state_dict()["state"].values() for x in s.values()]
    return [*model.state_dict().values(), *state]


def test_parameters_that_a_stage_leaves_out_are_as_in_one_process_with_two_reductions_a_step(process_group):
    """The optimizer leaves them and their moments alone, whichever micro-steps used them."""
    stages = [0, 0, 2, 1, 0, 1, 0, 0]
    expected = train(stages, lambda model: model, None)
    options = ddp_options(TrainConfig(model="DFM-SiT-Ti/2", exp_name="a")).to_kwargs()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        actual = train(stages, lambda model: DistributedDataParallel(model, **options), IdleParameters())
    assert len(actual) == len(expected) and all(map(torch.equal, actual, expected))
    reductions = sum(event.name == "c10d::allreduce_" for event in trace.events())
    assert 1 <= reductions <= 2 * len(stages) // 2


def test_gradients_are_summed_in_the_type_that_was_asked_for(process_group):
    options = ddp_options(TrainConfig(model="SiT-Ti/2", exp_name="a", comm_dtype="bf16", bucket_cap_mb=3))
    assert options.to_kwargs()["bucket_cap_mb"] == 3
    plain, model = nn.Linear(8, 8), nn.Linear(8, 8)
    model.load_state_dict(plain.state_dict())
    wrapped = DistributedDataParallel(model, **options.to_kwargs())
    options.register_comm_hook(wrapped)
    for each in (plain, wrapped):
        each(torch.linspace(0, 1, 8)[None]).square().sum().backward()
    assert not torch.equal(model.weight.grad, plain.weight.grad)
    assert torch.equal(model.weight.grad, plain.weight.grad.bfloat16().float())


@pytest.mark.parametrize("processes", [2, 3, 100])
def test_the_parts_of_averages_are_the_bits_of_whole_ones(processes):
    model = Stages()
    whole = EMA(model, [0.9, 0.5])
    parts = [EMA(model, [0.9, 0.5], process, processes) for process in range(processes)]
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        for ema in (whole, *parts):
            ema.update()
    for decay in ("0.9", "0.5"):
        joined = {name: x for ema in parts for name, x in ema.parts[decay].items()}
        assert sum(len(ema.parts[decay]) for ema in parts) == len(joined) == len(whole.parts[decay])
        assert all(torch.equal(joined[name], x) for name, x in whole.model(decay).named_parameters())
    sizes = [sum(x.numel() for x in ema.parts["0.5"].values()) for ema in parts]
    assert max(sizes) - min(sizes) <= 64  # the largest tensor


@pytest.mark.parametrize("scale", [0.01, 10.0, float("nan")])
def test_clipping_inside_the_step_is_clipping_before_it(scale):
    models = [Stages(), Stages()]
    norms = []
    for model, inside in zip(models, (True, False), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=0.1, fused=True)
        model(torch.ones(4, 8) * scale, 1).backward()
        parameters = [p for p in model.parameters() if p.grad is not None]
        norms.append(clip_in_step(parameters, optimizer, 0.5) if inside else nn.utils.clip_grad_norm_(parameters, 0.5))
        optimizer.found_inf = (~norms[-1].isfinite()).float()
        optimizer.step()
    assert torch.equal(*norms) or norms[0].isnan()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_checkpoint_s_memory_is_one_block_and_its_file_is_the_same(tmp_path):
    def state(n):
        x = torch.arange(n, dtype=torch.float32)
        tensors = {"a": x, "b": [x.bfloat16()[1:], torch.tensor(3.0)], "c": (torch.zeros(0, 2), torch.tensor([True]))}
        return {"model": tensors, "matrix": x.expand(2, n).t(), "step": n, "none": None}

    writer = async_writer.Writer(tmp_path, 0, 0, print)
    first = writer.copy(state(5))
    block = first["model"]["a"].data_ptr()
    plain = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in state(5).items()}
    plain["model"]["b"][0] = plain["model"]["b"][0].clone()
    for path, saved in ((tmp_path / "1" / "x.pt", plain), (tmp_path / "2" / "x.pt", first)):
        training_state.save(path, saved)
    assert len({hashlib.sha256(p.read_bytes()).digest() for p in tmp_path.glob("*/x.pt")}) == 1
    assert writer.copy(state(5))["model"]["a"].data_ptr() == block
    assert torch.equal(writer.copy(state(70))["matrix"], state(70)["matrix"])


def test_a_machine_s_processes_download_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def fetch(**options):
        calls.append(options)
        return "path"

    def of_process(launch, size="2"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", size)
        assert hub.fetch_once("owner/repo", fetch) == "path"

    of_process("one"), of_process("one"), of_process("two"), of_process("two", size="1")
    assert calls == [{}, {"local_files_only": True}, {}, {}]
