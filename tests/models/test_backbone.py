"""What every backbone is: casts, conditions, example inputs, and what a backbone of one's own has to define."""

import pytest
import torch
from numerics import inputs, randomize
from torch import nn

import models
from common.errors import UserError
from models.backbone import Backbone, Stream
from models.costs import mean_forward_flops, projector_flops
from models.elit import Elastic

SMALL = {"input_size": 8, "num_classes": 5, "hidden_size": 32, "depth": 4, "num_heads": 4}
ELIT = {"elit_group_size": 2, "head_depth": 1, "tail_depth": 1}


class Own(Backbone):
    """A backbone of one's own: a prefix token in front, Linears as blocks, no text and no positions."""

    def __init__(self, *, input_size: int, in_channels: int = 4, num_classes: int = 5, encoder_depth: int = 1, z_dims=()):
        super().__init__(
            input_size=input_size, patch_size=1, in_channels=in_channels, num_classes=num_classes, encoder_depth=encoder_depth
        )
        self.width = 16
        self.inside = nn.Linear(in_channels, 16)
        self.label = nn.Embedding(num_classes + 1, 16)
        layer = {"dim_feedforward": 32, "dropout": 0.0, "batch_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, **layer) for _ in range(3))
        self.outside = nn.Linear(16, in_channels)
        self.add_projectors(16, z_dims)

    def interface_arguments(self):
        return {"dim": 16, "num_heads": 2, "grid_size": self.grid_size}

    def embed(self, x, t, y):
        image, label = self.inside(x.flatten(2).transpose(1, 2)), self.label(y)
        return Stream(torch.cat([label[:, None], image], dim=1), label + t[:, None], grid=self.grid_size, prefix=1)

    def step(self, i, s):
        s.x = self.blocks[i](s.x)

    def output(self, s):
        return self.outside(s.image).transpose(1, 2).unflatten(2, self.grid_size)


class ElasticOwn(Elastic, Own):
    pass


def test_a_backbone_of_ones_own_becomes_elastic_without_a_line():
    model = randomize(ElasticOwn(input_size=4, head_depth=1, tail_depth=1, elit_group_size=2, z_dims=(6,))).float()
    lengths = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, arguments: lengths.append(arguments[0].shape[1]))
    arguments = inputs(model, [0.3, 0.9], dtype=torch.float32)
    velocity, (features,) = model(*arguments, inference_budget=0.25, return_features=True)
    assert lengths == [1 + 16, 1 + 4, 1 + 16]  # the prefix takes part in the core as it is
    assert velocity.shape == arguments[0].shape and features.shape == (2, 16, 6)  # REPA sees image tokens only
    velocity.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "projectors" not in n)
    assert models.count_flops(model, 1.0) > models.count_flops(model, 0.25)
    assert model.read_attention(*arguments).shape == (2, 4, 2, 4, 4)


def test_a_backbone_without_an_interface_has_no_budget():
    model = Own(input_size=4)
    with pytest.raises(UserError, match="a Own model has no budget"):
        model(*inputs(model, [0.5], dtype=torch.float32), inference_budget=0.5)


@pytest.mark.parametrize("name", ["SiT-Ti/2", "ELIT-SiT-Ti/2", "DFM-SiT-Ti/2"])
def test_models_cast_by_the_methods_of_a_module(name):
    options = SMALL | (ELIT if "ELIT" in name else {})
    model = models.create_model(name, **options)
    assert model.half() is model
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert {p.dtype for p in model.float().parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["SiT-Ti/2", "ELIT-SiT-Ti/2", "DFM-SiT-Ti/2", "DFM-ELIT-SiT-Ti/2"])
def test_example_inputs_are_what_the_model_takes(name):
    options = SMALL | {"input_size": (8, 16)} | (ELIT if "ELIT" in name else {})
    model = models.create_model(name, **options).double()
    x, t, y = model.example_inputs(3)
    velocity = model(x, t, y)
    assert len(y) == 3 and (y < 5).all()
    for a, b in zip(velocity, x, strict=True) if isinstance(x, list) else [(velocity, x)]:
        assert a.shape == b.shape and a.dtype == b.dtype == torch.float64
    with torch.device("meta"):
        on_meta = models.create_model(name, **options)
    assert models.count_flops(on_meta, batch_size=2) == models.count_flops(model, batch_size=2)


def test_null_condition_of_labels_is_the_null_label():
    model = models.create_model("SiT-Ti/2", **SMALL)
    assert model.null(torch.tensor([3, 0, 5])).tolist() == [5, 5, 5]


def test_an_elastic_models_errors_name_its_own_options():
    for wrong, words in (
        ({"elit_group_size": 5}, "elit_group_size 5: the token grid of 4×4"),
        ({"elit_tail": "keep"}, "elit_tail 'keep' is not valid"),
        ({"elit_read_depth": 0}, "elit_read_depth 0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=f"^{words}"):
            models.create_model("ELIT-SiT-Ti/2", **(SMALL | ELIT | wrong))


def test_projector_flops_are_counted_product_by_product():
    model = models.create_model("SiT-Ti/2", **SMALL, z_dims=(6, 10), encoder_depth=2)
    one_token = sum(32 * 2048 + 2048 * 2048 + 2048 * z for z in (6, 10))
    assert projector_flops(model) == 2 * 16 * one_token
    assert projector_flops(models.create_model("SiT-Ti/2", **SMALL)) == 0


@pytest.mark.slow
def test_mean_flops_are_those_of_counting_each_where_latents_merge():
    class Merging(ElasticOwn):
        """Every three latents of a group become one in the core's block."""

        merged_latents = 3

        def step(self, i, s):
            if not s.groups:
                return super().step(i, s)
            label, latents = s.x[:, :1], s.image.unflatten(1, (s.groups, -1))
            merged = nn.functional.pad(latents, (0, 0, 0, -latents.shape[2] % 3)).unflatten(2, (-1, 3)).sum(dim=3)
            merged = self.blocks[i](torch.cat([label, merged.flatten(1, 2)], dim=1))[:, 1:].unflatten(1, (s.groups, -1))
            latents = latents + merged.repeat_interleave(3, dim=2)[:, :, : latents.shape[2]]
            s.x = torch.cat([label, latents.flatten(1, 2)], dim=1)

    model = Merging(input_size=8, head_depth=1, tail_depth=1, elit_group_size=4)
    for budgets in ([k / 16 for k in range(16, 0, -1)], [k / 16 for k in range(14, 6, -1)], [1.0, 0.5]):
        expected = sum(models.count_flops(model, b) for b in budgets) / len(budgets)
        assert mean_forward_flops(model, budgets) == pytest.approx(expected, rel=1e-9)
