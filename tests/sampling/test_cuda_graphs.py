"""CUDA graphs without CUDA: which forwards are recorded, and that inputs and outputs go through."""

import pytest
import torch

import models
from models.dfm import DFMSiT
from sampling import cuda_graphs
from sampling.cuda_graphs import GraphedModel, Graphs


class Recorded:
    """In place of a CUDA graph: computes with the tensors of the first call alone, into which later ones are copied."""

    made = 0

    def __init__(self, function, tensors):
        type(self).made += 1
        self.function, self.inputs = function, [x.clone() for x in tensors]

    def __call__(self, tensors):
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given)
        return self.function(self.inputs)


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "Replay", type("Recorded", (Recorded,), {"made": 0}))
    return cuda_graphs


@torch.no_grad()
def test_one_graph_for_each_budget_and_batch(recorded):
    model = models.create_model("ELIT-SiT-Ti/2", input_size=8, num_classes=5, elit_group_size=2).eval()
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    graphed = Graphs().of(model)
    for budget, batch in [(1.0, 2), (0.25, 2), (1.0, 2), (0.25, 1), (1.0, 2), (0.25, 2)]:
        inputs = torch.randn(batch, 4, 8, 8), torch.rand(batch), torch.arange(batch)
        assert torch.equal(graphed(*inputs, inference_budget=budget), model(*inputs, inference_budget=budget))
    assert recorded.Replay.made == 3


@torch.no_grad()
def test_the_stages_of_a_pyramid_are_graphs_of_their_own(recorded):
    model = DFMSiT(input_size=8, patch_size=2, in_channels=4, hidden_size=8, depth=1, num_heads=1, num_classes=5).eval()
    graphed = GraphedModel(model)
    for stage in (0, 1, 0, 1):
        pyramid, t, y = model.example_inputs(2)
        pyramid = [torch.randn_like(x) for x in pyramid]
        expected = model(pyramid, t, y, active_stage=stage)
        actual = graphed(pyramid, t, y, active_stage=stage)
        assert len(actual) == stage + 1 and all(map(torch.equal, actual, expected))
    assert recorded.Replay.made == 2


def test_so_many_graphs_are_kept_at_most(recorded, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 2)
    graphed = GraphedModel(torch.nn.Identity())
    for size in (1, 2, 3, 3, 1):
        assert len(graphed(torch.ones(size))) == size
    assert recorded.Replay.made == 4


def test_what_cannot_be_recorded_runs_without_and_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(cuda_graphs, "Replay", lambda *_: (_ for _ in ()).throw(RuntimeError("operation not permitted")))
    graphed = GraphedModel(torch.nn.Identity())
    assert [graphed(torch.full((1,), x)).item() for x in (1.0, 2.0)] == [1.0, 2.0]
    assert capsys.readouterr().err.count("operation not permitted") == 1
