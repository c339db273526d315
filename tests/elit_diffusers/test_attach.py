"""An interface in transformers of diffusers: against Read, core and Write written out, under their pipelines, and out again."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
)
from diffusers_models import arguments_of, features, tiny, velocity
from numerics import randomize
from reference import window_members

from common.errors import UserError
from common.tensor_files import load_safetensors, save_safetensors
from elit_diffusers import attach, load
from elit_diffusers.families import FAMILIES

J = 4  # groups of 2×2


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """A transformer and its interface, around its second and third block; both have random weights."""
    transformer = tiny(request.param)
    elastic = attach(transformer, read_after=1, write_after=3, group_size=2)
    randomize(elastic, seed=1)
    return transformer, elastic


@pytest.fixture(autouse=True)
def full_budget(request):
    """Every test leaves the shared interface as it was."""
    yield
    if "pair" in request.fixturenames:
        elastic = request.getfixturevalue("pair")[1]
        elastic.budget = elastic._unconditional_budget = None


def blocks_of(transformer):
    return [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", [])]


def captured(module, run, output=False):
    """What a module is called with, or what it returns, while `run` runs."""
    calls = []
    if output:
        hook = module.register_forward_hook(lambda _, __, out: calls.append(out))
    else:
        hook = module.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    run()
    hook.remove()
    return calls[0]


@pytest.mark.parametrize("k", [1, 2, J])
def test_blocks_run_on_latents_at_the_positions_of_their_tokens(pair, k):
    transformer, elastic = pair
    blocks, interface = blocks_of(transformer), elastic.interface
    with elastic.original():
        call = captured(blocks[0], lambda: velocity(transformer))
    elastic.budget = k / J
    result = captured(transformer.proj_out, lambda: velocity(transformer), output=True)

    windows = torch.tensor(window_members(4, 8, 2))  # (G, J): row-major indices of the tokens of each group
    kept = windows[:, :k].flatten()
    x, text, temb = call["hidden_states"], call["encoder_hidden_states"], call["temb"]
    more = {k: v for k, v in call.items() if k == "encoder_hidden_states_mask"}

    def run(block, x, text, rotary):
        rotary = {} if rotary is None else {"image_rotary_emb": rotary}
        return block(hidden_states=x, encoder_hidden_states=text, temb=temb, **more, **rotary)

    tokens_at = latents_at = call.get("image_rotary_emb")
    if "Qwen" in type(transformer).__name__:
        latents_at = (tokens_at[0][kept], tokens_at[1])
    elif tokens_at is not None:
        latents_at = [torch.cat([table[:5], table[5:][kept]]) for table in tokens_at]
    text, x = run(blocks[0], x, text, tokens_at)
    tokens = x[:, windows] + interface.read_pos
    z = interface.reader(interface.query[:k], tokens, temb).flatten(1, 2)
    for block in blocks[1:3]:
        text, z = run(block, z, text, latents_at)
    written = interface.writer(tokens + interface.write_pos, z.unflatten(1, (8, k)))
    x = torch.empty_like(x)
    x[:, windows.flatten()] = written.flatten(1, 2)
    _, x = run(blocks[3], x, text, tokens_at)
    expected = transformer.proj_out(transformer.norm_out(x, temb))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_detached_it_is_the_transformer_that_it_was(pair, tmp_path):
    transformer, elastic = pair
    plain = tiny(type(transformer).__name__)
    attributes, expected = set(plain.__dict__), velocity(plain)
    with elastic.original():
        assert torch.equal(velocity(transformer), expected)
    elastic.budget = 1 / 2
    changed = velocity(transformer)
    elastic.save(tmp_path / "elit.safetensors")
    other = load(plain, tmp_path / "elit.safetensors")
    other.budget = 1 / 2
    assert torch.equal(velocity(plain), changed)
    assert not torch.equal(changed, expected)
    with pytest.raises(UserError, match=r"detach\(\)"):
        attach(plain, 1, 3, 2)
    other.detach()
    assert torch.equal(velocity(plain), expected)
    assert set(plain.__dict__) == attributes and list(plain.state_dict()) == list(tiny(type(plain).__name__).state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called for m in plain.modules())
    tensors, metadata = load_safetensors(tmp_path / "elit.safetensors")
    tensors["elit.interface.query"] = tensors["elit.interface.query"] * float("nan")
    save_safetensors(tmp_path / "broken.safetensors", tensors, metadata)
    with pytest.raises(UserError, match=r"holds weights that are not finite: elit\.interface\.query"):
        load(plain, tmp_path / "broken.safetensors")
    assert torch.equal(velocity(plain), expected)
    numbers = attach(plain, np.int64(1), np.int64(3), np.int64(2))  # of numpy, which JSON does not take
    numbers.save(tmp_path / "numbers.safetensors")
    numbers.detach()
    with pytest.raises(UserError, match="is not one of a Linear"):
        load(torch.nn.Linear(1, 1), tmp_path / "elit.safetensors")


def test_gradients_reach_all_of_the_interface_with_recomputed_blocks_too(pair):
    transformer, elastic = pair
    found = []
    for recompute in (False, True):
        transformer.enable_gradient_checkpointing() if recompute else transformer.disable_gradient_checkpointing()
        loss = 0
        for elastic.budget, seed in ((1 / 2, 0), (1 / 4, 1), (1 / 4, 2)):  # all forwards before the backward
            loss = loss + velocity(transformer, seed=seed).square().sum()
        elastic.budget = None
        elastic.zero_grad()
        loss.backward()
        found.append({n: p.grad.clone() for n, p in elastic.named_parameters()})
    transformer.disable_gradient_checkpointing()
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, found[1][name], msg=name)


def test_pipelines_sample_with_it(pair):
    transformer, elastic = pair
    tensors, name = features(1), type(transformer).__name__
    text = {"prompt_embeds": tensors["text"], "negative_prompt_embeds": -tensors["text"]}
    pooled = {"pooled_prompt_embeds": tensors["pooled"], "negative_pooled_prompt_embeds": -tensors["pooled"]}
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if "Qwen" in name:
        mask = torch.ones(1, 5, dtype=torch.int64)
        text |= {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask, "true_cfg_scale": 4.0}
        cls = QwenImagePipeline
    else:
        parts |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
        text |= pooled | ({"true_cfg_scale": 4.0} if "Flux" in name else {})
        cls = FluxPipeline if "Flux" in name else StableDiffusion3Pipeline
        if cls is StableDiffusion3Pipeline:
            parts |= dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    pipeline = cls(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    pipeline.set_progress_bar_config(disable=True)

    def sample():
        rng = torch.Generator().manual_seed(0)
        size = {"height": 64, "width": 128, "num_inference_steps": 2}
        return pipeline(**size, **text, generator=rng, output_type="latent").images

    with elastic.original():
        plain = sample()
    elastic.budget = 1 / 2
    if elastic.family.separate_guidance:
        elastic.unconditional_budget = 1 / 4
    else:
        with pytest.raises(UserError, match="one batch"):
            elastic.unconditional_budget = 1 / 4
    lengths = []
    hook = blocks_of(transformer)[2].register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    images = sample()
    hook.remove()
    assert lengths == ([16, 8] * 2 if elastic.family.separate_guidance else [16, 16])
    assert images.shape == plain.shape and images.isfinite().all() and not torch.equal(images, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "read_after 8, write_after 52: SD3Transformer2DModel has 4 blocks; 0 ≤ read_after < write_after ≤ 4 must hold"),
        ({"read_after": 2, "write_after": 2}, "read_after 2, write_after 2"),
        ({"read_after": -1, "write_after": 3}, "read_after -1"),
        ({"read_after": 1, "write_after": 3, "group_size": 0}, "group_size 0"),
    ],
)
def test_blocks_that_do_not_exist(options, message):
    transformer = tiny("SD3Transformer2DModel")
    with pytest.raises(UserError, match=message):
        attach(transformer, **options)
    assert not hasattr(transformer, "elit")


def test_what_the_interface_does_not_fit(pair):
    transformer, elastic = pair
    name = type(transformer).__name__
    with pytest.raises(UserError, match="Conv2d: is not supported; choose a transformer of class QwenImage"):
        attach(torch.nn.Conv2d(1, 1, 1))
    for budget in (0.2, 1.5, float("nan")):
        with pytest.raises(UserError, match="out of range"):
            elastic.budget = budget
    arguments = arguments_of(transformer)
    residuals = "block_controlnet_hidden_states" if "SD3" in name else "controlnet_block_samples"
    with pytest.raises(UserError, match="ControlNet"):
        transformer(**arguments, **{residuals: [torch.zeros(1)]})
    if "SD3" not in name:
        transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(UserError, match=r"enable_cache: .*; disable_cache\(\) first"):
            transformer(**arguments)
        transformer.disable_cache()
    if "SD3" in name:
        with pytest.raises(UserError, match="block 2"):
            transformer(**arguments, skip_layers=[0, 2])
        arguments["hidden_states"] = arguments["hidden_states"][..., :6, :]
    else:
        arguments["hidden_states"] = arguments["hidden_states"][:, :24]
        if "Qwen" in name:
            with pytest.raises(UserError, match="one image a sample"):
                transformer(**arguments | {"img_shapes": [[(1, 4, 4), (1, 4, 4)]]})
            arguments["img_shapes"] = [[(1, 3, 8)]] * 2
        else:
            with pytest.raises(UserError, match="23 positions"):
                transformer(**arguments | {"img_ids": arguments["img_ids"][:23]})
            arguments["img_ids"] = arguments["img_ids"][:24]
    with pytest.raises(UserError, match=r"3×8 tokens cannot be cut into groups of 2×2: .* multiples of 2 tokens \(32 pixels"):
        transformer(**arguments)
    assert velocity(transformer).isfinite().all()  # an error leaves nothing behind


@pytest.mark.parametrize(
    "told",
    ["{", "[]", '{"read_after": 1}', {"x": 1}, {"read_after": "a"}, {"read_depth": 10**9}, {"class": 5}, {"group_size": True}],
)
def test_files_of_no_interface_are_one_line(tmp_path, told):
    transformer = tiny("SD3Transformer2DModel")
    options = {
        "class": "SD3Transformer2DModel",
        "read_after": 1,
        "write_after": 3,
        "group_size": 2,
        "read_depth": 1,
        "write_depth": 1,
    }
    text = told if isinstance(told, str) else json.dumps(options | told)
    save_safetensors(tmp_path / "a.safetensors", {"elit.query": torch.zeros(1)}, {"elit": text})
    with pytest.raises(UserError, match=r"a\.safetensors: (not valid JSON|its metadata are not those of an interface)"):
        load(transformer, tmp_path / "a.safetensors")
    assert not hasattr(transformer, "elit")
