"""The registry, SiT against a NumPy reference and published outputs, initial weights, REPA's features and FLOPs."""

import functools
import math

import numpy as np
import pytest
import torch
from numerics import inputs, numpy_weights, randomize
from reference import Reference, silu

import models
from checkpoint import reading
from common.errors import UserError
from models.elit import ELITSiT, budget_to_k, mask_levels, mask_to_budget
from models.layers import narrow_linears
from models.sit import SiT, sincos_position_embedding

SIZES = {"Ti": (8, 192, 3, 2), "S": (12, 384, 6, 3), "B": (12, 768, 12, 3), "L": (24, 1024, 16, 4), "XL": (28, 1152, 16, 4)}
TINY = {"patch_size": 2, "hidden_size": 32, "depth": 3, "num_heads": 4, "num_classes": 5}


def build_on_meta(name, **options):
    with torch.device("meta"):
        return models.create_model(name, **{"input_size": 32, **options})


# --------------------------------------------------------------------------------------------------------- registry


@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_registered_models_have_the_sizes_of_the_table(size, patch_size):
    depth, dim, heads, ends = SIZES[size]
    for family, cls in (("SiT", SiT), ("ELIT-SiT", ELITSiT)):
        model = build_on_meta(f"{family}-{size}/{patch_size}")
        assert type(model) is cls
        assert len(model.blocks) == depth
        assert model.x_embedder.proj.weight.shape == (dim, 4, patch_size, patch_size)
        assert {block.attn.num_heads for block in model.blocks} == {heads}
        assert model.blocks[0].mlp.fc1.weight.shape == (4 * dim, dim)
        assert model.y_embedder.embedding_table.weight.shape == (1001, dim)
    assert (model.head_depth, model.tail_depth) == (ends, ends)
    assert model.interface.query.shape == (16, dim)


def test_model_says_what_it_was_built_for():
    model = build_on_meta("SiT-Ti/2", input_size=(8, 12), in_channels=3, num_classes=7)
    assert (model.input_size, model.in_channels, model.num_classes) == ((8, 12), 3, 7)


@pytest.mark.parametrize(("wrong", "near"), [("ELIT-SiT-XL2", "ELIT-SiT-XL/2"), ("sit-b/4", "SiT-B/4"), ("SiT_S/8", "SiT-S/8")])
def test_unknown_model_offers_the_nearest_name(wrong, near):
    with pytest.raises(UserError) as error:
        models.create_model(wrong, input_size=32)
    assert wrong in str(error.value) and f"did you mean {near}?" in str(error.value)


@pytest.mark.parametrize(
    ("name", "wrong", "near"),
    [
        ("SiT-Ti/2", "qknorm", "qk_norm"),
        ("ELIT-SiT-Ti/2", "headdepth", "head_depth"),
        ("ELIT-SiT-Ti/2", "elit_tails", "elit_tail"),
    ],
)
def test_unknown_model_option_offers_the_nearest_name(name, wrong, near):
    with pytest.raises(UserError) as error:
        models.create_model(name, input_size=32, **{wrong: 1})
    assert wrong in str(error.value) and f"did you mean {near}?" in str(error.value)


def test_sit_has_no_elit_options():
    with pytest.raises(UserError, match="head_depth"):
        models.create_model("SiT-Ti/2", input_size=8, head_depth=2)


def test_override_of_none_keeps_the_default():
    model = build_on_meta("ELIT-SiT-L/2", head_depth=None, tail_depth=7)
    assert (model.head_depth, model.tail_depth) == (4, 7)


@pytest.mark.parametrize("size", [31, (32, 31), 1, 0])
def test_input_that_cannot_be_cut_into_patches_is_refused(size):
    with pytest.raises(UserError, match="patches of 2"):
        models.create_model("SiT-Ti/2", input_size=size)


# ---------------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize(
    "options",
    [
        {"input_size": 8},
        {"input_size": (4, 8), "qk_norm": True},
        {"input_size": (8, 4), "in_channels": 3},
        {"input_size": 8, "patch_size": 4, "fused_attn": False},
    ],
    ids=["square", "wide-qk_norm", "tall-3-channels", "patch-4-plain-attention"],
)
def test_sit_is_the_reference(options):
    model = randomize(SiT(**(TINY | options))).double()
    reference = Reference(numpy_weights(model), heads=4, patch_size=model.patch_size)
    # Features of t are made in float32 (exact at t = 0), all else in the model's float64.
    for times, tolerance in (([0.0, 0.0], 1e-9), ([0.37, 1.0], 3e-6)):
        x, t, y = inputs(model, times)
        found = model(x, t, y).detach().numpy()
        wanted, _ = reference.forward(x, t, y)
        assert found.shape == x.shape and found.std() > 0.1
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


def test_sit_gives_the_published_outputs(golden, golden_checkpoint):
    arrays, args = golden
    model, config = reading.load_model(golden_checkpoint("sit"))
    assert not model.training and config["model"] == args["sit"]["model"]
    velocity = model(arrays["sit_x"], arrays["sit_t"], arrays["sit_y"])
    torch.testing.assert_close(velocity, arrays["sit_out"], rtol=0, atol=1e-4)


def test_position_table_is_the_published_one(golden_checkpoint):
    published = torch.load(golden_checkpoint("elit"), weights_only=False)["model"]["pos_embed"]
    torch.testing.assert_close(sincos_position_embedding(384, (8, 8))[None], published, rtol=0, atol=1e-7)


def test_time_features_of_a_bf16_model_are_made_in_float32():
    embedder = randomize(SiT(**TINY, input_size=4)).t_embedder
    t = torch.tensor([0.7001, 0.7004])  # one number in bf16
    features = []
    embedder.bfloat16().mlp.register_forward_pre_hook(lambda module, arguments: features.append(arguments[0]))
    embedder(t)
    angle = t.double().numpy()[:, None] * 10000.0 ** (-np.arange(128) / 128)
    wanted = torch.from_numpy(np.concatenate([np.cos(angle), np.sin(angle)], axis=1)).bfloat16()
    assert features[0].dtype == torch.bfloat16
    torch.testing.assert_close(features[0], wanted, rtol=2**-8, atol=1e-6)
    assert (features[0][0] != features[0][1]).any()


@pytest.mark.parametrize("name", ["SiT-Ti/2", "ELIT-SiT-Ti/2"])
def test_plain_and_fused_attention_agree(name):
    options = {"input_size": 8, "hidden_size": 32, "num_heads": 4, "qk_norm": True, "num_classes": 5}
    fused, plain = (randomize(models.create_model(name, fused_attn=f, **options)).double() for f in (True, False))
    arguments = inputs(fused, [0.3, 0.9])
    torch.testing.assert_close(fused(*arguments), plain(*arguments), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["SiT-Ti/2", "ELIT-SiT-Ti/2"])
def test_forward_draws_no_random_numbers_and_is_the_same_in_train_and_eval_mode(name):
    model = randomize(models.create_model(name, input_size=8, hidden_size=32, num_heads=4, num_classes=5))
    arguments = inputs(model, [0.3, 0.9, 0.5], dtype=torch.float32)
    state, numpy_state = torch.random.get_rng_state(), str(np.random.get_state())
    train = model.train()(*arguments)
    assert torch.equal(torch.random.get_rng_state(), state) and str(np.random.get_state()) == numpy_state
    assert torch.equal(train, model.eval()(*arguments))


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.0])
def test_sit_refuses_a_budget(budget):
    model = SiT(**TINY, input_size=8)
    with pytest.raises(UserError, match="budget"):
        model(*inputs(model, [0.5], dtype=torch.float32), inference_budget=budget)


# ------------------------------------------------------------------------------------------------------------- init


def assert_xavier(weight):
    fan_out, fan_in = weight.shape[0], math.prod(weight.shape[1:])
    bound = math.sqrt(6 / (fan_in + fan_out))
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.99 * bound
    assert abs(weight.std() / (bound / math.sqrt(3)) - 1) < 0.05


def assert_normal(weight, std=0.02):
    assert abs(weight.std() / std - 1) < 0.1 and abs(weight.mean()) < 5 * std / math.sqrt(weight.numel())
    assert weight.abs().max() > 2.5 * std  # not uniform of that standard deviation, which ends at 1.73 of it


@pytest.mark.parametrize("name", ["SiT-Ti/2", "ELIT-SiT-Ti/2"])
def test_initial_weights_follow_the_rules(name):
    model = models.create_model(name, input_size=16, z_dims=(48,), qk_norm=True)
    ruled = set()

    def take(prefix, rule):
        found = [(n, p) for n, p in model.named_parameters() if n.startswith(prefix) and n not in ruled]
        assert found, prefix
        for n, p in found:
            rule(n, p.detach())
            ruled.add(n)

    def zero(n, p):
        assert (p == 0).all(), n

    def linear(n, p):
        zero(n, p) if n.endswith("bias") else assert_xavier(p)

    def embedding(n, p):
        zero(n, p) if n.endswith("bias") else assert_normal(p)

    for i in range(8):
        take(f"blocks.{i}.adaLN_modulation", zero)
        for norm in ("q_norm", "k_norm"):
            take(f"blocks.{i}.attn.{norm}", lambda n, p: (p == (1 if n.endswith("weight") else 0)).all() or pytest.fail(n))
        take(f"blocks.{i}", linear)
    take("x_embedder.proj", linear)  # as a Linear of C·p·p inputs
    take("t_embedder.mlp", embedding)
    take("y_embedder", embedding)
    take("final_layer", zero)
    take("projectors", linear)
    rest = {n for n, _ in model.named_parameters()} - ruled
    assert all(n.startswith("interface.") for n in rest)  # ruled in test_elit.py
    assert bool(rest) == (name != "SiT-Ti/2")


# ------------------------------------------------------------------------------------------------------------- REPA


def project_by_hand(weights, index, tokens):
    x = tokens
    for layer in (0, 2, 4):
        x = x @ weights[f"projectors.{index}.{layer}.weight"].T + weights[f"projectors.{index}.{layer}.bias"]
        x = silu(x) if layer < 4 else x
    return x


@pytest.mark.parametrize(
    ("elit", "encoder_depth", "block"),
    [(False, 1, 1), (False, 3, 3), (True, 1, 1), (True, 2, 2), (True, 3, 2)],
)
def test_repa_projects_the_tokens_of_the_right_block(elit, encoder_depth, block):
    options = TINY | {"depth": 4, "input_size": (8, 4), "encoder_depth": encoder_depth, "z_dims": (6, 10)}
    interface = {"group_size": 2, "head_depth": 2, "tail_depth": 1, "tail": "drop", "read_depth": 1, "write_depth": 1}
    cls = SiT
    if elit:
        cls, options = ELITSiT, options | {"head_depth": 2, "tail_depth": 1, "elit_group_size": 2}
    model = randomize(cls(**options)).double()
    weights = numpy_weights(model)
    x, t, y = inputs(model, [0.0, 0.0])
    velocity, found = model(x, t, y, return_features=True)
    _, tokens = Reference(weights, heads=4, patch_size=2, elit=interface if elit else None).forward(x, t, y)
    assert [f.shape for f in found] == [(2, 8, 6), (2, 8, 10)]
    for i in range(2):
        np.testing.assert_allclose(found[i].detach(), project_by_hand(weights, i, tokens[block]), rtol=0, atol=1e-9)
    torch.testing.assert_close(velocity, model(x, t, y), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["SiT-Ti/2", "ELIT-SiT-Ti/2"])
def test_without_repa_there_is_no_projector(name):
    model = models.create_model(name, input_size=8, hidden_size=32, num_heads=4, num_classes=5, z_dims=())
    assert not any("projector" in key for key in model.state_dict())
    velocity, features = model(*inputs(model, [0.5], dtype=torch.float32), return_features=True)
    assert features == [] and velocity.shape == (1, 4, 8, 8)


# ------------------------------------------------------------------------------------------------------------ FLOPs


@functools.cache
def gflops(name, budget=None, **options):
    return models.count_flops(build_on_meta(name, **options), budget) / 1e9


def test_forward_flops_of_sit_are_those_of_the_table():
    assert gflops("SiT-XL/2") == pytest.approx(237.2, rel=0.01)


@pytest.mark.parametrize(
    ("tail", "table"),
    [
        ("skip", {1.0: 245.4, 0.5: 159.4, 0.25: 117.5, 0.0625: 86.5}),
        ("drop", {1.0: 245.4, 0.5: 157.3, 0.25: 114.4, 0.0625: 82.7}),
    ],
)
def test_forward_flops_of_elit_are_those_of_the_table(tail, table):
    found = {b: gflops("ELIT-SiT-XL/2", b, elit_tail=tail, elit_group_size=4) for b in table}
    assert found == pytest.approx(table, rel=0.01)


def training_tflops(gflops_per_forward):
    """Forward and backward count as three forwards; batch 256."""
    return np.mean(gflops_per_forward) * 3 * 256 / 1e3


def gflops_by_latents(J, **options):
    """GFLOPs per forward for each number of latents kept, 1 … J.

    Linears are linear in it and attention is quadratic, so three counts give all; a fourth proves it.
    """
    count = {k: gflops("ELIT-SiT-XL/2", k / J, **options) for k in (1, J // 4, J // 2, J)}
    fit = np.polynomial.Polynomial.fit([1, J // 2, J], [count[1], count[J // 2], count[J]], 2)
    assert fit(J // 4) == pytest.approx(count[J // 4], rel=1e-9)
    return fit(np.arange(1, J + 1))


@pytest.mark.parametrize(
    ("side", "g", "sit", "full", "multibudget"),
    [(32, 4, 182, 188, {"skip": 127, "drop": 125}), (64, 8, 806, 831, {"skip": 536, "drop": 529})],
    ids=["256px", "512px"],
)
def test_training_flops_are_those_of_the_table(side, g, sit, full, multibudget):
    size = {} if side == 32 else {"input_size": side}
    assert training_tflops(gflops("SiT-XL/2", **size)) == pytest.approx(sit, rel=0.01)
    for tail, wanted in multibudget.items():
        counts = gflops_by_latents(g * g, elit_tail=tail, elit_group_size=g, **size)
        assert training_tflops(counts[-1]) == pytest.approx(full, rel=0.01)
        assert training_tflops(counts) == pytest.approx(wanted, rel=0.01)


def test_training_flops_of_the_published_mask_limit_at_512_px():
    counts = gflops_by_latents(64, elit_tail="skip", elit_group_size=8, input_size=64)
    kept = [budget_to_k(mask_to_budget(m, 64), 64) for m in mask_levels(64, 0.0, 0.9375)]
    assert training_tflops(counts[np.array(kept) - 1]) == pytest.approx(549, rel=0.01)


def test_flops_of_a_tiny_model_are_counted_product_by_product():
    model = SiT(**TINY, input_size=(8, 4))
    n, d, batch = 8, 32, 3
    block = 2 * n * d * (3 * d) + 2 * (2 * n * n * d) + 2 * n * d * d + 2 * 2 * n * d * (4 * d) + 2 * d * 6 * d
    other = 2 * n * d * 16 + 2 * (256 * d + d * d) + 2 * d * 2 * d + 2 * n * d * 16
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert models.count_flops(model, batch_size=batch) == batch * (3 * block + other)
    assert all(v.device.type == "cpu" and torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_plain_attention_counts_the_same_flops():
    assert gflops("ELIT-SiT-Ti/2", 0.25, fused_attn=True) == gflops("ELIT-SiT-Ti/2", 0.25, fused_attn=False)
    assert gflops("ELIT-SiT-Ti/2", None) == gflops("ELIT-SiT-Ti/2", 1.0)


# ------------------------------------------------------------------------------------------- gradient checkpointing


def saved_bytes(model, batch, **arguments):
    """Gradients of a forward and backward pass, and the most memory that tensors kept for the backward pass took at once.

    Counted by storage, parameters aside: from its saving until autograd lets go of it.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive, peak = {}, 0

    class Kept:
        def __init__(self, tensor):
            nonlocal peak
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            count, size = alive.get(self.key, (0, tensor.untyped_storage().nbytes()))
            alive[self.key] = (count + 1, size if self.key not in parameters else 0)
            peak = max(peak, sum(size for _, size in alive.values()))

        def __del__(self):
            count, size = alive.pop(self.key)
            if count > 1:
                alive[self.key] = (count - 1, size)

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        loss = model(*batch, **arguments).square().mean()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()], peak


@pytest.mark.parametrize("name", ["SiT-S/4", "ELIT-SiT-S/4"])
def test_checkpointed_blocks_have_the_same_gradients_and_keep_at_most_half(name):
    options = {"elit_group_size": 2} if name.startswith("ELIT") else {}
    model = randomize(models.create_model(name, input_size=32, num_classes=5, **options)).float()
    batch = inputs(model, [0.1, 0.6], dtype=torch.float32)
    plain, kept = saved_bytes(model, batch)
    x = torch.randn(2, 64, 384, requires_grad=True)
    _, of_one_block = saved_bytes(model.blocks[1], (x, torch.randn(2, 384)))
    models.checkpoint_blocks(model)
    checkpointed, kept_now = saved_bytes(model, batch)
    for a, b in zip(plain, checkpointed, strict=True):
        assert (a - b).abs().max() <= 1e-6 * max(1, b.abs().max())
    assert kept_now + of_one_block <= kept / 2  # in the backward pass one block at a time is computed again


def test_narrow_linears_give_the_same_bits_under_autocast():
    model = randomize(models.create_model("ELIT-SiT-Ti/2", input_size=16, num_classes=5)).float().eval().requires_grad_(False)
    batch = inputs(model, [0.3, 0.9], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(*batch, inference_budget=0.25)
        narrow_linears(model, torch.bfloat16)
        assert torch.equal(model(*batch, inference_budget=0.25), expected)
    kept = {type(m) for m in model.modules() for p in m.parameters(recurse=False) if p.dtype == torch.float32}
    assert torch.nn.Linear in kept and model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16  # the final layer's stays
    assert models.count_flops(model, 0.25) > 0


def test_first_and_last_layer_ignore_autocast():
    model = randomize(models.create_model("SiT-Ti/2", input_size=16, num_classes=5)).float().eval()
    x, t, y = inputs(model, [0.3, 0.9], dtype=torch.float32)
    with torch.no_grad():
        stream = model.embed(x, t, y)
        plain = model.output(stream)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.x_embedder(x) + model.pos_embed, stream.x)
            assert torch.equal(model.output(stream), plain)
