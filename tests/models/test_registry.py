"""The registry: names and spellings, sizes and costs of every family's table, and that every registered model works."""

from pathlib import Path

import pytest
import torch
from golden_cases import weights
from numerics import randomize

import models
from benchmarks import backbones
from common.errors import UserError
from common.tables import markdown_table
from config.options import TrainConfig
from config.parsing import parse, require_options
from models.conditioning import Text
from models.elit import Elastic
from models.vae import SD_VAE
from training import setup

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

SIZES = {
    "SiT": (["Ti", "S", "B", "L", "XL"], [1, 2, 4, 8]),
    "SiT-UViT": (["Ti", "S", "B", "L", "XL"], [2]),
    "SiT-HDiT": (["Ti", "S", "B", "L", "XL"], [2]),
    "U-ViT": (["Ti", "S", "S-Deep", "M", "L", "H"], [1, 2, 4]),
    "HDiT": (["Ti", "S", "B", "M", "L"], [1, 2, 4]),
    "MMDiT": (["Ti", "S", "B", "L", "XL"], [2, 4]),
}
# Each size and each patch size of every elastic family, but not all pairs of them.
ELIT = [
    f"{prefix}{family}-{size}/{own[i % len(own)]}"
    for family, (sizes, patches) in SIZES.items()
    for prefix in ("ELIT-", *(["DFM-ELIT-"] if family == "SiT" else []))
    for own in [patches[1:] if prefix == "DFM-ELIT-" else patches]
    for i, size in enumerate(sizes)
]


def on_meta(name, **options):
    with torch.device("meta"):
        return models.create_model(name, **{"input_size": 32, **options})


def test_names_of_every_family_size_and_patch_and_nothing_else():
    prefixes = {family: ("", "ELIT-") for family in SIZES} | {"SiT": ("", "ELIT-", "DFM-", "DFM-ELIT-")}
    wanted = {
        f"{prefix}{family}-{size}/{p}"
        for family, (sizes, patches) in SIZES.items()
        for prefix in prefixes[family]
        for size in sizes
        for p in patches
        if not (p == 1 and "DFM" in prefix)  # its coarse stages have smaller patches
    }
    assert set(models.MODELS) == wanted
    for name, spec in models.MODELS.items():
        assert spec.name == name and spec.elastic == ("ELIT-" in name) and spec.staged == ("DFM-" in name)
        assert spec.text == ("MMDiT" in name) and spec.merged_latents == (4 if "SiT-HDiT" in name else 1)
        assert name.startswith(spec.family) and spec.backbone in SIZES and spec.sizes["patch_size"] == int(name[-1])


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("UViT-S-Deep/2", "U-ViT-S-Deep/2"),
        ("ELIT-UViT-H/4", "ELIT-U-ViT-H/4"),
        ("MM-DiT-L/2", "MMDiT-L/2"),
        ("ELIT-MM-DiT-Ti/4", "ELIT-MMDiT-Ti/4"),
        ("SiT-UViT-XL/2", "SiT-UViT-XL/2"),
    ],
)
def test_other_spellings(spelling, name):
    assert models.model_spec(spelling).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DFM-U-ViT-S/2", "model 'DFM-U-ViT-S/2': DFM exists only for SiT; choose DFM-SiT-"),
        ("DFM-UViT-S/2", "DFM exists only for SiT"),
        ("DFM-ELIT-HDiT-S/2", "DFM exists only for SiT"),
        ("DFM-SiT-UViT-XL/2", "DFM exists only for SiT"),
        ("DFM-MM-DiT", "DFM exists only for SiT"),
        (
            "U-ViT-H/8",
            "unknown model 'U-ViT-H/8' (did you mean U-ViT-H/4?); known: [ELIT-]SiT-{Ti,S,B,L,XL}/{1,2,4,8}, DFM-[ELIT-]SiT-{Ti,S,B,L,XL}/{2,4,8}",
        ),
        ("ELIT-MM-DiT-S/8", "did you mean ELIT-MMDiT-S/4?"),
        ("MMDiT-B/1", "[ELIT-]MMDiT-{Ti,S,B,L,XL}/{2,4}"),
    ],
)
def test_names_that_do_not_exist(name, message):
    with pytest.raises(UserError) as error:
        models.create_model(name, input_size=32)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_every_registered_name_constructs():
    for name, spec in models.MODELS.items():
        model = on_meta(name, input_size=16 * spec.sizes["patch_size"])
        assert type(model) is spec.constructor and isinstance(model, Elastic) == spec.elastic
        assert all(p.is_meta for p in model.parameters())


# ------------------------------------------------------------------------------------- parameters and GFLOPs, by the tables

BUDGETS = (1, 1 / 2, 1 / 4, 1 / 16)
COSTS = [  # name, options, million parameters, GFLOPs, GFLOPs of ELIT at BUDGETS, or at 1/4: a count takes up to seconds
    ("U-ViT-Ti/2", {}, 3.6, 2.1, 1.1),
    ("U-ViT-S/2", {}, 44.8, 24.5, [26.0, 17.0, 12.7, 9.5]),
    ("U-ViT-S-Deep/2", {}, 58.4, 32.1, 14.5),
    ("U-ViT-M/2", {}, 130.9, 70.4, 32.1),
    ("U-ViT-L/2", {}, 286.8, 152.9, 74.9),
    ("U-ViT-H/2", {}, 500.8, 266.4, 126.7),
    ("HDiT-L/4", {"input_size": 256, "in_channels": 3}, 557, 395, 258),
    ("HDiT-M/4", {"input_size": 256, "in_channels": 3}, 302, 231, 169),
    ("HDiT-S/4", {"input_size": 256, "in_channels": 3}, 139, 120, 91),
    ("HDiT-L/1", {}, 547, 326, 189),
    ("HDiT-B/1", {}, 117, 63, [66, 51, 43, 37]),
    ("MMDiT-Ti/2", {}, 10.5, 3.0, 1.7),
    ("MMDiT-S/2", {}, 63, 16.1, [16.9, 12.3, 10.1, 8.5]),
    ("MMDiT-B/2", {}, 505, 120.9, 75.2),
    ("MMDiT-L/2", {"in_channels": 16}, 2030, 579, 402),
    ("MMDiT-XL/2", {"in_channels": 16}, 8060, 2266, 1492),
    ("MMDiT-L/2", {"in_channels": 16, "input_size": 128, "elit_group_size": 8}, 2030, 8437, 4156),
    ("MMDiT-XL/2", {"in_channels": 16, "input_size": 128, "elit_group_size": 8}, 8060, 29597, 13198),
]


@pytest.mark.parametrize(("name", "options", "parameters", "gflops", "elit"), COSTS)
def test_parameters_and_costs(name, options, parameters, gflops, elit):
    plain = {k: v for k, v in options.items() if k != "elit_group_size"}
    model, elastic = on_meta(name, **plain), on_meta(f"ELIT-{name}", **options)
    rounding = max(parameters * 0.01, 0.05)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=rounding)
    budgets = dict(zip(BUDGETS, elit, strict=True)) if isinstance(elit, list) else {1 / 4: elit}
    counts = [(models.count_flops(model), gflops), *((models.count_flops(elastic, b), flops) for b, flops in budgets.items())]
    for count, printed in counts:
        digit = 0.051 if isinstance(printed, float) else 0.55  # half of the last printed one
        assert count / 1e9 == pytest.approx(printed, abs=max(printed * 0.01, digit))


@pytest.mark.parametrize(
    ("table", "row"), [("U-ViT (Bao et al.)", 1), ("HDiT (Crowson et al.), VAE latents", 0), ("MM-DiT", 1)]
)
def test_the_tables_of_the_docs_are_those_of_the_script(table, row):
    line = markdown_table(backbones.HEAD, [backbones.row(*backbones.TABLES[table][row])]).splitlines()[-1]
    assert line in (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")


RECIPES = {  # model, trained budgets, steps, batch, time weighting
    "u_vit_h_256": ("U-ViT-H/2", 1, 500_000, 1024, "uniform"),
    "elit_u_vit_h_256": ("ELIT-U-ViT-H/2", 1, 500_000, 1024, "lognormal"),
    "hdit_l_256": ("HDiT-L/1", 1, 400_000, 256, "uniform"),
    "elit_hdit_l_256": ("ELIT-HDiT-L/1", 1, 400_000, 256, "lognormal"),
    "sit_uvit_xl_256": ("SiT-UViT-XL/2", 1, 500_000, 256, "lognormal"),
    "elit_sit_uvit_xl_256": ("ELIT-SiT-UViT-XL/2", 1, 500_000, 256, "lognormal"),
    "elit_sit_uvit_xl_256_multibudget": ("ELIT-SiT-UViT-XL/2", 16, 500_000, 384, "lognormal"),
    "sit_hdit_xl_256": ("SiT-HDiT-XL/2", 1, 500_000, 256, "lognormal"),
    "elit_sit_hdit_xl_256": ("ELIT-SiT-HDiT-XL/2", 1, 500_000, 256, "lognormal"),
    "elit_sit_hdit_xl_256_multibudget": ("ELIT-SiT-HDiT-XL/2", 13, 500_000, 384, "lognormal"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    config, _ = parse(TrainConfig, ["--config", str(ROOT / "experiments_updated" / "train" / f"{name}.yaml")])
    require_options(config)
    assert config.exp_name == name and config.data_dir == "../data/imagenet256"
    budgets = setup.trained_budgets(config)
    assert (config.model, len(budgets), config.max_train_steps, config.batch_size, config.weighting) == RECIPES[name]
    assert config.warmup_steps == {"SiT": 10_000, "U-V": 5_000, "HDi": 0}[models.model_spec(config.model).backbone[:3]]
    assert setup.check(config, {}) == []
    with torch.device("meta"):
        setup.build_model(config, SD_VAE, [])


# ------------------------------------------------------------------------------------------------------- small models


def small(name, group_size=4, **changes):
    """A model of that name's depth, heads and patches, of little width, on the smallest input of one group."""
    spec = models.model_spec(name)
    p = spec.sizes["patch_size"]
    if spec.backbone == "HDiT":
        options = {"input_size": 8 * p, "levels": 2, "inner_width": 32, "head_width": 8, "mapping_width": 16}
    else:
        options = {"input_size": 4 * p, "hidden_size": 8 * spec.sizes["num_heads"]}
    if spec.text:
        options |= {"text_width": 6, "text_length": 3} | ({"pooled_width": 5} if spec.sizes["pooled_width"] else {})
    elif "num_classes" not in changes:
        options["num_classes"] = 5
    return models.create_model(name, **options | ({"elit_group_size": group_size} if spec.elastic else {}) | changes)


@pytest.mark.parametrize("name", ELIT)
def test_elastic_models_run_forward_and_backward_at_both_ends_of_the_budget(name):
    model = small(name)
    x, t, y = model.example_inputs(2)
    for budget in (1 / 16, 1.0):
        model.zero_grad()
        velocity = model(x, t, y, inference_budget=budget)
        for a, b in zip(velocity, x, strict=True):
            assert a.shape == b.shape
        sum(v.square().sum() for v in velocity).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_head_and_tail_of_hdit_count_all_layers_and_can_be_given():
    by_size = {side: small("ELIT-HDiT-B/1", input_size=side, levels=None, group_size=2).head_depth for side in (8, 32, 64)}
    assert by_size == {8: 2, 32: 4, 64: 6}  # 1, 2 and 3 levels
    model = small("ELIT-HDiT-B/1", head_depth=3, tail_depth=5)
    assert (model.head_depth, model.tail_depth, len(model.blocks)) == (3, 5, 15)
    assert models.model_spec("ELIT-HDiT-B/1").arguments(32, head_depth=7)["head_depth"] == 7
    levels = {"depths": [1, 3], "widths": [16, 32], "attentions": [("shifted-window", 2), ("global",)]}
    own = small("ELIT-HDiT-S/1", **levels)
    assert (own.head_depth, len(own.blocks)) == (2, 5) and own.attentions[0].name == "shifted-window"


def test_qk_norm_is_a_switch_whose_kind_is_the_familys():
    def norm(name, **options):
        block = small(name, **{"depth": 8, **options}).blocks[0]
        norm = (block.image if hasattr(block, "image") else block).attn.q_norm
        return type(norm).__name__

    for name in ("SiT-Ti/2", "ELIT-SiT-Ti/2", "MMDiT-Ti/2"):
        assert {norm(name), norm(name, qk_norm=False), norm(name, qk_norm=None)} == {"Identity"}
    for name in ("SiT-UViT-Ti/2", "ELIT-SiT-HDiT-Ti/2", "MMDiT-XL/2"):
        assert {norm(name, qk_norm=kind) for kind in (False, None, True, "rms")} == {"RMSNorm"}
    assert norm("SiT-Ti/2", qk_norm=True) == "LayerNorm" and norm("SiT-Ti/2", qk_norm="rms") == "RMSNorm"
    assert norm("MMDiT-Ti/2", qk_norm=True) == "RMSNorm"
    for name in ("U-ViT-Ti/2", "HDiT-Ti/2"):
        assert not any("_norm" in key and "attn" in key for key in small(name, qk_norm=False).state_dict())
        with pytest.raises(UserError, match=f"^{name} has no option 'qk_norm'"):
            small(name, qk_norm=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("U-ViT-S/2", {"depth": 7}, "depth 7: a U-ViT's must be even"),
        ("ELIT-U-ViT-S/2", {"head_depth": 1}, "head_depth 1 and tail_depth 2: must be equal in a U-ViT"),
        ("ELIT-SiT-UViT-S/2", {"tail_depth": 1}, "head_depth 2 and tail_depth 1: must be equal in SiT's unet layout"),
        ("ELIT-SiT-HDiT-S/2", {"tail_depth": 4}, "must be at most 3, since the core holds all blocks of the hourglass"),
        ("SiT-HDiT-S/2", {"input_size": 10}, "layout hourglass: the token grid of 5×5 cannot be halved"),
        (
            "HDiT-S/1",
            {"input_size": 12, "levels": 4, "inner_width": 64},
            "HDiT level 2: its grid of 3×3 cannot be halved exactly for level 3",
        ),
        ("HDiT-S/1", {"levels": 0}, "levels 0: HDiT has at least one"),
        (
            "HDiT-S/1",
            {"attentions": [("shifted-window", 3), ("global",)]},
            "level 0: windows of 3 do not divide its grid of 8×8",
        ),
        ("ELIT-HDiT-S/1", {"head_depth": 1}, "the core must lie in HDiT's inner level, so both must be at least 2"),
        (
            "HDiT-Ti/1",
            {"z_dims": (4,), "encoder_depth": 8},
            "--encoder-depth 8: REPA reads HDiT's inner level, after block 1 to 7",
        ),
        ("SiT-HDiT-S/2", {"z_dims": (4,)}, "--encoder-depth 8: REPA reads whole tokens"),
        ("U-ViT-S/2", {"head_depth": 1}, "U-ViT-S/2 has no option 'head_depth'"),
        ("HDiT-S/2", {"hidden_size": 8}, "HDiT-S/2 has no option 'hidden_size'"),
        ("MMDiT-S/2", {"inner_depth": 8}, "MMDiT-S/2 has no option 'inner_depth'"),
        ("MMDiT-S/2", {"num_heads": 5}, "hidden_size 48 must be divisible by 4 and by num_heads 5"),
        ("U-ViT-S/4", {"input_size": 6}, "cannot be cut into patches of 4"),
    ],
)
def test_what_does_not_fit_is_one_line(name, options, message):
    with pytest.raises(UserError, match=message) as error:
        small(name, **options)
    assert "\n" not in str(error.value)


def test_conditions_of_another_kind_are_one_line():
    for name, y, message in (
        ("MMDiT-Ti/2", torch.tensor([1]), "MMDiT is conditioned on text features, not on class labels"),
        ("MMDiT-Ti/2", Text(torch.zeros(1, 3, 7)), r"takes text features \(B, L, 6\), not \(1, 3, 7\)"),
        ("MMDiT-Ti/2", Text(torch.zeros(1, 4, 6)), "takes text of 3 tokens, not 4"),
        ("SiT-UViT-Ti/2", Text(torch.zeros(1, 3, 6)), "SiT is conditioned on class labels"),
        ("U-ViT-Ti/2", Text(torch.zeros(1, 3, 6)), "U-ViT is conditioned on class labels"),
        ("HDiT-Ti/2", Text(torch.zeros(1, 3, 6)), "HDiT is conditioned on class labels"),
    ):
        model = small(name)
        x, t, _ = model.example_inputs(1)
        with pytest.raises(UserError, match=message):
            model(x, t, y)


def test_a_text_model_takes_no_classes_and_the_text_of_its_size():
    assert on_meta("MMDiT-B/2", num_classes=10).num_classes is None
    for size, length, width in (("S", None, 768), ("B", 77, 768), ("L", 154, 4096), ("XL", 154, 4096)):
        model = on_meta(f"MMDiT-{size}/2", text_length=5 if length is None else None)
        assert model.example_condition(1).features.shape == (1, length or 5, width)


@pytest.mark.parametrize(
    "name", ["ELIT-SiT-UViT-Ti/2", "SiT-HDiT-Ti/2", "ELIT-U-ViT-Ti/2", "ELIT-HDiT-Ti/1", "ELIT-MMDiT-Ti/2"]
)
def test_the_hub_mixin_gives_the_model_back(name, tmp_path):
    model = randomize(small(name)).float()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    inputs = model.example_inputs(2)
    assert torch.equal(again(*inputs), model(*inputs))


# ------------------------------------------------------------------------------------------------- weights of others


@pytest.mark.parametrize(
    ("case", "family", "key"),
    [
        ("uvit_class", "U-ViT", "blocks.0.norm1.weight"),
        ("uvit_t2i", "U-ViT", "context_embed.weight"),
        ("hdit_na", "HDiT", "blocks.0.self_attn.scale"),
        ("hdit_global", "HDiT", "cond_bias"),
        ("mmdit_repa", "MMDiT", "blocks.0.image.attn.qkv.weight"),
        ("mmdit_sd35_x", "MMDiT", "blocks.0.text.attn.q_norm.scale"),
    ],
)
def test_published_weights_are_recognised(case, family, key):
    prefixes = {"HDiT": ["", "inner_model."], "MMDiT": ["", "model.diffusion_model."]}.get(family, [""])
    for prefix in prefixes:
        found, state_dict = models.import_state_dict({prefix + k: v for k, v in weights(case).items()})
        assert found == family and key in state_dict
        assert models.import_state_dict(state_dict)[0] == family  # and under our names


def test_our_own_weights_are_recognised():
    for family, (sizes, patches) in SIZES.items():
        for prefix in ("", "ELIT-", *(["DFM-", "DFM-ELIT-"] if family == "SiT" else [])):
            state_dict = small(f"{prefix}{family}-{sizes[0]}/{patches[-1]}").state_dict()
            found, same = models.import_state_dict(state_dict)
            assert found == prefix + family and same.keys() == state_dict.keys()
    with pytest.raises(UserError, match="not the weights of a known backbone"):
        models.import_state_dict({"conv.weight": torch.zeros(1)})
