"""encoders.py: what REPA's target encoders see and give, their weights, and training with them."""

import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
from encoder_runs import TINY, make_images, random_vit, repa, uint8_images
from runs import CLASSES, make_latents, make_vae
from training_runs import arguments, assert_same_tensors, final_state, metrics

import train
from checkpoint import reading
from common.errors import UserError
from common.torchvision_shim import import_torchvision
from models import encoders
from models.encoders import ENCODERS, Target, describe_encoders, encoder_names, load_encoders
from randomness import epoch_order, training_draws

pytestmark = pytest.mark.slow

COUNT = 16
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def reference(state, images, side, *, patch, heads, stats, last_norm, eps=1e-6, quick_gelu=False, no_embed_class=False):
    """A ViT's patch features in float64, from its definition and state dict; images uint8 (B, 3, H, W)."""
    w = {k: v.double() for k, v in state.items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    mean, std = (torch.tensor(s, dtype=torch.float64).view(1, 3, 1, 1) for s in stats)
    x = (images.double() / 255 - mean) / std
    if x.shape[-1] != side:
        x = F.interpolate(x, (side, side), mode="bicubic", align_corners=False, antialias=False)
    n = side // patch
    x = F.unfold(x, patch, stride=patch).transpose(1, 2) @ w["patch_embed.proj.weight"].flatten(1).T
    x = x + w.get("patch_embed.proj.bias", 0)
    table = w["pos_embed"][0]
    of_class, table = (table[:0], table) if no_embed_class or "cls_token" not in w else (table[:1], table[1:])
    old = round(len(table) ** 0.5)
    grid = table.view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (n, n), mode="bicubic", align_corners=False, antialias=True) if old != n else grid
    x = x + grid.flatten(2).transpose(1, 2)
    prefix = [w["cls_token"][0] + of_class.sum(0)] if "cls_token" in w else [x.new_zeros(0, x.shape[-1])]
    prefix += [w["reg_token"][0]] if "reg_token" in w else []
    x = torch.cat([torch.cat(prefix).expand(len(x), -1, -1), x], dim=1)
    x = norm(x, "norm_pre") if "norm_pre.weight" in w else x
    depth = 1 + max(int(k.split(".")[1]) for k in w if k.startswith("blocks."))
    for i in range(depth):
        b = f"blocks.{i}."
        q, k, v = (
            a.unflatten(-1, (heads, -1)).transpose(1, 2) for a in linear(norm(x, b + "norm1"), b + "attn.qkv").chunk(3, -1)
        )
        a = ((q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(a.transpose(1, 2).flatten(2), b + "attn.proj") * w.get(b + "ls1.gamma", 1)
        h = linear(norm(x, b + "norm2"), b + "mlp.fc1")
        h = h * torch.sigmoid(1.702 * h) if quick_gelu else F.gelu(h)
        x = x + linear(h, b + "mlp.fc2") * w.get(b + "ls2.gamma", 1)
    return (norm(x, "norm") if last_norm else x)[:, sum(len(p) for p in prefix) :]


FAMILIES = [  # sides of a 4 × 4 grid for 64-px images
    ("dinov2-vit-s", None, 56, {"patch": 14, "heads": 6, "stats": IMAGENET, "last_norm": True}),
    ("dinov2reg-vit-s", None, 56, {"patch": 14, "heads": 6, "stats": IMAGENET, "last_norm": True, "no_embed_class": True}),
    ("mae-vit-b", "deit_tiny_patch16_224", 64, {"patch": 16, "heads": 3, "stats": IMAGENET, "last_norm": False}),
    ("dinov1-vit-b", "deit_tiny_patch16_224", 64, {"patch": 16, "heads": 3, "stats": IMAGENET, "last_norm": True}),
    ("clip-vit-b", "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m", 64, {"patch": 16, "heads": 4, "stats": CLIP, "last_norm": False, "eps": 1e-5}),
    (TINY, None, 64, {"patch": 16, "heads": 3, "stats": HALF, "last_norm": True}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "timm_name", "side", "known", "pixels"),
    # Images of another size too, where the encoder's rule is to resize them.
    [
        (*family, pixels)
        for family in FAMILIES
        for pixels in (64, 32)
        if pixels == 64 or not family[0].startswith(("mae", "dinov1"))
    ],
)
def test_features_are_those_of_the_definition(name, timm_name, side, known, pixels, tmp_path, monkeypatch):
    if timm_name:  # the family's rules on a model of a size for tests
        monkeypatch.setitem(ENCODERS, name, dataclasses.replace(ENCODERS[name], timm_name=timm_name))
    vit = random_vit(encoders._target(name).timm_name)
    torch.save(vit.state_dict(), tmp_path / "weights.pt")
    (encoder,) = load_encoders([name], pixels, (4, 4), [str(tmp_path / "weights.pt")])
    images = uint8_images(2, pixels)
    found = encoder(images)
    assert found.shape == (2, 16, encoder.z_dim) and encoder.side == side
    expected = reference(vit.state_dict(), images, side, **known)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * expected.abs().max())
    assert not found.requires_grad and not encoder.train().training
    assert not any(p.requires_grad for p in encoder.parameters())


def test_authors_files_of_moco_and_jepa(tmp_path, monkeypatch):
    """Training checkpoints: of MoCo v3 the base encoder, without head, twin and predictor; of I-JEPA the one without a class token."""
    import_torchvision()
    import timm

    create = timm.create_model
    gap = {"class_token": False, "global_pool": "avg", "fc_norm": False}

    def create_model(name, **options):
        return create("vit_tiny_patch16_224", **gap, **options) if name == "gap" else create(name, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(timm, "is_model", lambda name: True)
    for name, timm_name in (("mocov3-vit-b", "deit_tiny_patch16_224"), ("jepa-vit-h", "gap")):
        monkeypatch.setitem(ENCODERS, name, dataclasses.replace(ENCODERS[name], timm_name=timm_name))
    moco, jepa = random_vit("deit_tiny_patch16_224"), random_vit("vit_tiny_patch16_224", **gap)
    held = {f"module.base_encoder.{k}": v for k, v in moco.state_dict().items()}
    held |= {"module.base_encoder.head.0.weight": torch.zeros(2, 192), "module.predictor.0.weight": torch.zeros(2, 2)}
    held |= {f"module.momentum_encoder.{k}": torch.zeros_like(v) for k, v in moco.state_dict().items()}
    torch.save({"epoch": 300, "arch": "vit_base", "state_dict": held}, tmp_path / "moco.pth.tar")
    encoder = {f"module.{k}": v for k, v in jepa.state_dict().items()}
    torch.save({"encoder": encoder, "predictor": {}, "epoch": 300}, tmp_path / "jepa.pth.tar")
    for name, file, vit, stats, side in (
        ("mocov3-vit-b", "moco", moco, IMAGENET, 64),
        ("jepa-vit-h", "jepa", jepa, HALF, 64),
    ):
        images = uint8_images(2, 64)
        (found,) = load_encoders([name], 64, (4, 4), [str(tmp_path / f"{file}.pth.tar")])
        expected = reference(vit.state_dict(), images, side, patch=16, heads=3, stats=stats, last_norm=True)
        np.testing.assert_allclose(found(images), expected, rtol=0, atol=2e-4 * expected.abs().max())
    with pytest.raises(UserError, match=r"mocov3-vit-b: its weights are not on the hub; .*moco-v3: --encoder-weights PATH"):
        load_encoders(["mocov3-vit-b"], 64, (4, 4))


def test_names_that_moco_v3_misspells():
    names = {
        "blocks.13.norm13.weight": "blocks.13.norm1.weight",
        "blocks.13.mlp.fc13.bias": "blocks.13.mlp.fc1.bias",
        "blocks.14.norm14.bias": "blocks.14.norm2.bias",
        "blocks.14.mlp.fc14.weight": "blocks.14.mlp.fc2.weight",
        "blocks.13.attn.qkv.weight": "blocks.13.attn.qkv.weight",
        "blocks.1.norm1.weight": "blocks.1.norm1.weight",
    }
    state = {"state_dict": {f"module.base_encoder.{k}": k for k in names}}
    assert encoders._base_encoder(state) == {name: k for k, name in names.items()}
    assert encoders._base_encoder({"cls_token": 1}) == {"cls_token": 1}


PUBLISHED = {  # width, prefix tokens, patch, statistics, depth
    "dinov1-vit-b": (768, 1, 16, IMAGENET, 12),
    "mocov3-vit-b": (768, 1, 16, IMAGENET, 12),
    "mocov3-vit-l": (1024, 1, 16, IMAGENET, 24),
    "jepa-vit-h": (1280, 0, 14, IMAGENET, 32),
    "dinov2-vit-s": (384, 1, 14, IMAGENET, 12),
    "dinov2-vit-b": (768, 1, 14, IMAGENET, 12),
    "dinov2-vit-l": (1024, 1, 14, IMAGENET, 24),
    "dinov2-vit-g": (1536, 1, 14, IMAGENET, 40),
    "dinov2reg-vit-s": (384, 5, 14, IMAGENET, 12),
    "dinov2reg-vit-b": (768, 5, 14, IMAGENET, 12),
    "dinov2reg-vit-l": (1024, 5, 14, IMAGENET, 24),
    "dinov2reg-vit-g": (1536, 5, 14, IMAGENET, 40),
    "dinov3-vit-b": (768, 5, 16, IMAGENET, 12),
    "dinov3-vit-l": (1024, 5, 16, IMAGENET, 24),
    "mae-vit-b": (768, 1, 16, IMAGENET, 12),
    "mae-vit-l": (1024, 1, 16, IMAGENET, 24),
    "clip-vit-b": (768, 1, 16, CLIP, 12),
    "clip-vit-L": (1024, 1, 14, CLIP, 24),  # the published spelling
}


def test_every_named_encoder_fits_256_and_512_px():
    assert {name.lower() for name in PUBLISHED} == set(ENCODERS)
    for name, (width, prefix, patch, stats, depth) in PUBLISHED.items():
        side = 32 if name.endswith(("-s", "-b")) else 16
        (encoder,) = describe_encoders([name], 16 * side, (side, side))
        assert encoder.side == side * patch and encoder.z_dim == width
        assert encoder.vit.num_prefix_tokens == prefix and len(encoder.vit.blocks) == depth
        assert encoder.mean.flatten().tolist() == pytest.approx(stats[0])
        assert encoder.std.flatten().tolist() == pytest.approx(stats[1])
    for name, target in ENCODERS.items():
        assert target.last_norm == name.startswith(("dino", "moco", "jepa"))
        assert target.resized == (not name.startswith(("dinov1", "moco", "mae")))
        if name.startswith("clip"):
            assert "quickgelu" in target.timm_name and target.timm_name.endswith(".openai")


def test_autocast_reaches_the_encoder(tiny_weights):
    (encoder,) = load_encoders([TINY], 64, (4, 4), [str(tiny_weights)])
    images = uint8_images(2, 64)
    whole = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(images)
    assert not torch.equal(whole, half.float())
    cosine = F.cosine_similarity(whole, half.float(), dim=-1)
    assert cosine.min() > 0.999


def test_weights_under_the_names_of_their_authors_and_in_safetensors(tmp_path):
    """DINOv2's own file with registers: other names, a mask token, and the class token's position apart."""
    from safetensors.torch import save_file

    vit = random_vit("vit_small_patch14_reg4_dinov2")
    state = vit.state_dict()
    position = torch.randn(1, 1, 384)
    theirs = {k: v for k, v in state.items() if k not in ("reg_token", "cls_token", "pos_embed")}
    theirs |= {"register_tokens": state["reg_token"], "cls_token": state["cls_token"] - position}
    theirs |= {"pos_embed": torch.cat([position, state["pos_embed"]], dim=1), "mask_token": torch.zeros(1, 384)}
    torch.save(theirs, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    save_file(state, tmp_path / "timm.safetensors")
    load = partial(load_encoders, ["dinov2reg-vit-s"], 56, (4, 4))
    a, b = (load([str(tmp_path / n)])[0] for n in ("dinov2_vits14_reg4_pretrain.pth", "timm.safetensors"))
    images = uint8_images(1, 56)
    np.testing.assert_allclose(a(images), b(images), rtol=0, atol=1e-4)


def test_weights_come_from_the_hub_where_no_file_is_named(monkeypatch, tiny_weights):
    import_torchvision()
    import timm

    asked = []

    def from_hub(name, pretrained=False, **options):
        asked.append((name, pretrained))
        vit = create(name, **options)
        if pretrained:
            vit.load_state_dict(torch.load(tiny_weights))
        return vit

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", from_hub)
    (fetched,) = load_encoders([TINY], 64, (4, 4))
    (read,) = load_encoders([TINY], 64, (4, 4), [str(tiny_weights)])
    assert ("vit_tiny_patch16_224", True) in asked
    images = uint8_images(1, 64)
    np.testing.assert_allclose(fetched(images), read(images), rtol=0, atol=1e-5)


def test_repa_is_off_when_either_option_is():
    assert encoder_names("none", 0.5) == [] == encoder_names("dinov2-vit-b", 0.0) == encoder_names("", 1.0)
    assert encoder_names("dinov2-vit-b, mae-vit-l", 0.5) == ["dinov2-vit-b", "mae-vit-l"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dinov2-vit-x", ["dinov2-vit-x", "unknown", "did you mean dinov2-vit-", "timm/NAME"]),
        ("timm/vit_tinny_patch16_224", ["timm/vit_tinny_patch16_224", "did you mean vit_tiny_patch16_224"]),
        ("timm/vit_tiny_patch16_224.nothing", ["timm/vit_tiny_patch16_224.nothing", "tag"]),
        ("timm/resnet18", ["timm/resnet18", "not a ViT"]),
        ("timm/swin_tiny_patch4_window7_224", ["timm/swin_tiny_patch4_window7_224", "not a ViT"]),
        ("mae-vit-b", ["mae-vit-b", "4 tokens", "32 × 32", "16"]),
    ],
)
def test_encoders_that_do_not_fit_are_refused(name, words):
    with pytest.raises(UserError) as caught:
        describe_encoders([name], 32, (4, 4))
    for word in words:
        assert word in str(caught.value)


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    path = make_latents(folder / "set", COUNT, make_vae(folder / "vae"))
    return SimpleNamespace(path=path, images=make_images(path))


def test_training_with_repa(data, tiny_weights, tmp_path):
    """First loss by hand, and a run stopped and resumed equals the undisturbed one, projectors and all."""
    options = (*repa(tiny_weights), "--max-train-steps", 3)
    train.main(arguments(data.path, tmp_path / "whole", *options))
    whole = final_state(tmp_path / "whole", 3)

    order = epoch_order(0, 0, COUNT)[:8]
    moments = np.stack([np.load(data.path / "vae-sd" / "00000" / f"img-mean-std-{i:08d}.npy") for i in order])
    draws = training_draws(0, 0, range(8), (4, 8, 8))
    latents = (moments[:, :4] + moments[:, 4:] * draws.posterior.numpy()) * 0.5
    velocity = np.mean((draws.noise.numpy() - latents) ** 2)  # an untrained model predicts 0
    state = torch.load(tiny_weights)
    known = {"patch": 16, "heads": 3, "stats": HALF, "last_norm": True}
    features = reference(state, data.images[order.tolist()], 64, **known)
    torch.manual_seed(0)
    import models

    untrained = models.create_model(
        "ELIT-SiT-Ti/2", input_size=8, num_classes=CLASSES, elit_group_size=2, z_dims=(192,), encoder_depth=8
    )
    taken = {}
    untrained.blocks[0].register_forward_hook(lambda _, i, out: taken.update(x=out))  # after the head's last block
    x = (1 - draws.time_uniform)[:, None, None, None] * torch.from_numpy(latents).float()
    x = x + draws.time_uniform[:, None, None, None] * draws.noise
    labels = torch.tensor([i % CLASSES for i in order])
    predicted = untrained(x.float(), draws.time_uniform, torch.where(draws.label_drop < 0.1, CLASSES, labels))
    projection = untrained.projectors[0](taken["x"]).double()
    alignment = -F.cosine_similarity(projection, features, dim=-1).mean()
    assert abs(alignment) > 1e-3
    assert metrics(tmp_path / "whole")[1] == pytest.approx(velocity, rel=1e-5)
    assert metrics(tmp_path / "whole", "alignment_loss")[1] == pytest.approx(alignment.item(), rel=1e-4)
    target = draws.noise - torch.from_numpy(latents).float()
    ((predicted - target).square().mean() + 0.5 * alignment).backward()
    norm = torch.stack([p.grad.norm() for p in untrained.parameters() if p.grad is not None]).norm().item()
    assert metrics(tmp_path / "whole", "grad_norm")[1] == pytest.approx(norm, rel=1e-4)

    assert any(k.startswith("projectors.0.") for k in whole["model"])
    assert whole["model"].keys() == whole["ema"]["0.9999"].keys()
    assert not torch.equal(whole["model"]["projectors.0.0.weight"], untrained.projectors[0][0].weight)  # it is trained
    model, _ = reading.load_model(tmp_path / "whole" / "run" / "checkpoints" / "0000003.pt")
    assert not hasattr(model, "projectors")

    (tmp_path / "part" / "run").mkdir(parents=True)
    folder = tmp_path / "part" / "run" / "checkpoints"
    folder.mkdir()
    for name in ("0000002.pt", "0000002.pt.sha256"):
        (folder / name).symlink_to(tmp_path / "whole" / "run" / "checkpoints" / name)
    train.main(arguments(data.path, tmp_path / "part", *options, "--resume-step", -1))
    resumed = final_state(tmp_path / "part", 3)
    assert_same_tensors(resumed["model"], whole["model"])
    assert_same_tensors(resumed["ema"]["0.9999"], whole["ema"]["0.9999"])
    for a, b in zip(resumed["optimizer"]["state"].values(), whole["optimizer"]["state"].values(), strict=True):
        assert_same_tensors(a, b)


@pytest.mark.parametrize("model", ["SiT-Ti/2", "DFM-SiT-Ti/2"])
def test_two_encoders_and_bf16(data, tiny_weights, tmp_path, model):
    torch.save(random_vit("deit_tiny_patch16_224").state_dict(), tmp_path / "deit.pt")
    both = repa(tiny_weights, tmp_path / "deit.pt", enc_type=f"{TINY},timm/deit_tiny_patch16_224")
    options = (*both, "--mixed-precision", "bf16", "--max-train-steps", 1)
    train.main(arguments(data.path, tmp_path, *options, model=model))
    assert np.isfinite(list(metrics(tmp_path).values())).all()
    assert any(k.startswith("projectors.1.") for k in final_state(tmp_path, 1)["model"])


def test_images_are_read_only_when_repa_is_on(tiny_weights, tmp_path, capsys):
    path = make_latents(tmp_path / "set", COUNT, make_vae(tmp_path / "vae"))
    go = partial(arguments, path, model="SiT-Ti/4")
    train.main(go(tmp_path / "absent", "--max-train-steps", 1))
    capsys.readouterr()
    line = runs.refused(train.main, capsys, go(tmp_path / "asked", *repa(tiny_weights)))
    assert "images/" in line and "REPA" in line
    make_images(path)
    for image in (path / "images" / "00000").iterdir():
        image.write_bytes(b"no image")
    train.main(go(tmp_path / "unreadable", "--max-train-steps", 1))
    with pytest.raises(SystemExit):
        train.main(go(tmp_path / "asked", *repa(tiny_weights)))
    assert ".png: not a readable image" in capsys.readouterr().err
    train.main(go(tmp_path / "half", "--enc-type", TINY, "--max-train-steps", 1))
    assert "without --proj-coeff: REPA is off" in capsys.readouterr().err


def test_bad_weights_are_one_line(data, tiny_weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    state = torch.load(tiny_weights)
    torch.save({k: v for k, v in state.items() if "blocks.3" not in k}, tmp_path / "part.pt")
    torch.save(random_vit("deit_small_patch16_224").state_dict(), tmp_path / "small.pt")
    torch.save(state | {"reg_token": torch.zeros(1, 4, 192)}, tmp_path / "more.pt")
    (tmp_path / "text.pt").write_text("no weights")
    cases = [
        (repa("nowhere.pt"), ["--encoder-weights nowhere.pt", "no such file", TINY]),
        (repa(tmp_path / "part.pt"), ["part.pt", "blocks.3.norm1.weight is missing"]),
        (repa(tmp_path / "small.pt"), ["small.pt", "not the weights of"]),
        (repa(tmp_path / "more.pt"), ["more.pt", "reg_token is unknown"]),
        (repa(tmp_path / "text.pt"), ["text.pt"]),
        (repa(tiny_weights, tiny_weights), ["--encoder-weights", "2 file(s) for 1"]),
        (repa(tiny_weights, enc_type="dinov5-vit-b"), ["dinov5-vit-b", "unknown", "dinov2-vit-b"]),
        (repa(tiny_weights, enc_type="mae-vit-b"), ["mae-vit-b", "4 tokens", "16"]),
        (("--enc-type", "dinov2-vit-s", "--proj-coeff", 1), ["dinov2-vit-s", "hub", "--encoder-weights PATH"]),
        ((*repa(tiny_weights), "--encoder-depth", 9), ["--encoder-depth 9", "8"]),
    ]
    for more, words in cases:
        line = runs.refused(train.main, capsys, arguments(data.path, tmp_path / "out", *more))
        for word in words:
            assert word in line, line
    assert not (tmp_path / "out").exists()


def test_another_encoder_is_another_run(data, tiny_weights, tmp_path, capsys):
    train.main(arguments(data.path, tmp_path, *repa(tiny_weights), "--max-train-steps", 1, model="SiT-Ti/4"))
    capsys.readouterr()
    options = ("--resume-step", -1, "--max-train-steps", 2)
    line = runs.refused(train.main, capsys, arguments(data.path, tmp_path, *options, model="SiT-Ti/4"))
    assert "--enc-type none" in line and TINY in line
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == 1


def test_target_table_is_used(monkeypatch):
    monkeypatch.setitem(ENCODERS, "my-vit", Target("vit_tiny_patch16_224", resized=False))
    (encoder,) = describe_encoders(["my-vit"], 64, (4, 4))
    assert encoder.side == 64 and encoder.z_dim == 192
