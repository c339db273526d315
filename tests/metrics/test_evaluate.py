"""evaluate.py end to end, its feature networks, reference batches, the evaluation scripts, and what they refuse."""

import json
import math
import os
import shutil
import subprocess
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from accelerate.state import PartialState
from adm import adm_frechet, exact_distances, gaussian, half_distances, inception_score, neighbour_shares
from numerics import randomize
from PIL import Image
from runs import ROOT

import dataset_tools
import evaluate
import metrics
from common.torchvision_shim import import_torchvision
from metrics import feature_extractors
from metrics.images import open_images

pytestmark = pytest.mark.slow

FEATURES = ("--features", "runs:colour_features")
SIDE = 32
EVALUATION = ROOT / "experiments_updated" / "evaluation"


def pictures(count, seed):
    """Smooth colourful images uint8 (count, 32, 32, 3)."""
    coarse = torch.from_numpy(np.random.default_rng(seed).random((count, 3, 5, 5)))
    smooth = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic").clamp(0, 1)
    return (255 * smooth).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def as_folder(images, folder):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:06d}.png")
    return folder


def colour_features(images):
    """What runs.colour_features gives, without it: (pool, spatial, logits)."""
    extract = runs.colour_features("cpu")
    found = extract(torch.from_numpy(images).permute(0, 3, 1, 2))
    return tuple(found[name].numpy() for name in ("pool", "spatial", "logits"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """REF and SAMPLES as deflated npz: 150 and 131 images."""
    folder = tmp_path_factory.mktemp("pair")
    for name, count, seed in (("ref", 150, 0), ("samples", 131, 1)):
        np.savez_compressed(folder / f"{name}.npz", arr_0=pictures(count, seed))
    return folder / "ref.npz", folder / "samples.npz"


def evaluated(*arguments, output):
    evaluate.main([*map(str, arguments), "--output", str(output)])
    return json.loads(output.read_text())


FIGURES = ("fid", "sfid", "is", "precision", "recall")

# ------------------------------------------------------------------------------------------------------------- figures


@pytest.fixture(scope="module")
def found(pair, tmp_path_factory):
    """The JSON of one plain run."""
    found = evaluated(*pair, *FEATURES, "--split-size", 50, output=tmp_path_factory.mktemp("found") / "new" / "metrics.json")
    PartialState._reset_state()
    return found


def test_every_figure_is_that_of_the_definition(pair, found):
    ref, samples = (colour_features(np.load(path)["arr_0"]) for path in pair)
    for name, i in (("fid", 0), ("sfid", 1)):
        expected = adm_frechet(*gaussian(ref[i]), *gaussian(samples[i]))
        assert expected > 1e-4 and found[name] == pytest.approx(expected, rel=1e-4)
    assert found["is"] == pytest.approx(inception_score(samples[2], 50), rel=1e-4)
    precision, recall = neighbour_shares(ref[0], samples[0], half_distances)
    assert 0.2 < precision < 0.98
    assert (found["precision"], found["recall"]) == pytest.approx((precision, recall), abs=5e-4)
    assert found["fdd"] is None
    assert (found["num_ref"], found["num_samples"]) == (150, 131)
    for name, path in zip(("ref_sha256", "samples_sha256"), pair, strict=True):
        assert found[name] == subprocess.check_output(["sha256sum", path], text=True).split()[0]
    assert found["versions"]["torch"] == torch.__version__


def test_figures_on_demand_are_those_of_their_functions(pair, found, tmp_path, capsys):
    names = ["kid", "mind", "density", "coverage", "dino_precision", "dino_recall", "dino_density", "dino_coverage", "cmmd"]
    with_all = ("--features", "runs:all_features")
    again = evaluated(*pair, *with_all, "--metrics", *names, "precision", output=tmp_path / "m.json")
    assert "| Precision | KID | MIND | Density | Coverage | DINO precision |" in capsys.readouterr().out
    ref, samples = (colour_features(np.load(path)["arr_0"])[0] for path in pair)
    expected = {name: getattr(metrics, name)(ref, samples) for name in ("kid", "mind")}
    expected |= zip(("density", "coverage"), metrics.density_coverage(ref, samples, 5), strict=True)
    expected |= zip(
        ("dino_precision", "dino_recall"), neighbour_shares(ref / 2, samples / 2, exact_distances, k=5), strict=True
    )
    expected |= {f"dino_{name}": expected[name] for name in ("density", "coverage")}  # which know no scale
    expected["cmmd"] = metrics.cmmd(ref, samples)
    for name in names:
        assert again[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert again["precision"] == found["precision"] and again["fid"] is None and not set(names) & set(found)
    line = refused(capsys, [*pair, *FEATURES, "--metrics", "cmmd"])
    assert "--metrics cmmd: needs --clip-weights" in line


@pytest.mark.parametrize("form", ["stored", "folder", "zip"])
def test_the_form_of_the_files_changes_nothing(pair, found, tmp_path, form):
    forms = []
    for path in pair:
        images = np.load(path)["arr_0"]
        if form == "stored":
            forms.append(tmp_path / path.name)
            np.savez(forms[-1], labels=np.arange(5), arr_0=images)
        else:
            forms.append(as_folder(images, tmp_path / path.stem))
            if form == "zip":
                forms[-1] = Path(shutil.make_archive(str(forms[-1]), "zip", forms[-1]))
    again = evaluated(*forms, *FEATURES, "--split-size", 50, "--batch-size", 64, output=tmp_path / "m.json")
    assert {k: again[k] for k in FIGURES} == {k: found[k] for k in FIGURES}


def test_the_number_of_processes_changes_nothing(pair, found, tmp_path):
    """3 batches on 2 processes: the last turn is not full."""
    command = runs.command_line("torchrun", "--nproc_per_node=2", f"--master_port={runs.free_port()}")
    done = subprocess.run(
        [*command, str(ROOT / "evaluate.py"), *map(str, pair), *FEATURES, "--split-size", "50", "--output", str(tmp_path / "m.json")],
        env=runs.environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "m.json").read_text()) == found
    assert done.stdout.count("| FID |") == 1


def test_features_do_not_depend_on_the_batch_size(pair, found, tmp_path):
    again = evaluated(*pair, *FEATURES, "--split-size", 50, "--batch-size", 7, output=tmp_path / "m.json")
    for name in FIGURES:
        assert again[name] == pytest.approx(found[name], rel=1e-6)


def test_only_what_is_asked_for_is_computed_and_statistics_of_a_file_are_used(pair, found, tmp_path, capsys):
    pool, spatial, _ = colour_features(np.load(pair[0])["arr_0"])
    (mu, sigma), (mu_s, sigma_s) = gaussian(pool), gaussian(spatial)
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    again = evaluated(tmp_path / "ref.npz", pair[1], "--metrics", "fid", "sfid", *FEATURES, output=tmp_path / "m.json")
    assert (again["fid"], again["sfid"]) == pytest.approx((found["fid"], found["sfid"]), rel=1e-6)
    assert again["is"] is again["precision"] is again["num_ref"] is None
    assert again["statistics_from_file"] == {"ref": ["fid", "sfid"], "samples": []}
    assert "| FID | sFID | samples | reference |" in capsys.readouterr().out
    # statistics on both sides: no network at all
    again = evaluated(*[tmp_path / "ref.npz"] * 2, "--metrics", "fid", output=tmp_path / "m.json")
    assert again["fid"] == pytest.approx(0, abs=1e-9)


def test_slices_are_read_in_any_order_and_never_the_whole(tmp_path, monkeypatch):
    images = pictures(40, 3)
    np.savez_compressed(tmp_path / "deflated.npz", arr_0=images)
    np.savez(tmp_path / "stored.npz", arr_0=images)
    read, largest = zipfile.ZipExtFile.read, []

    def counting(self, n=-1):
        found = read(self, n)
        largest.append(len(found))
        return found

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counting)
    monkeypatch.setattr("metrics.images.SKIP", 10_000)
    for name in ("deflated", "stored"):
        found = open_images(tmp_path / f"{name}.npz")
        for span in (range(3, 8), range(30, 40), range(0, 2), range(1, 2), range(38, 40)):
            np.testing.assert_array_equal(found.read(span), images[span.start : span.stop])
    assert max(largest) == 10 * images[0].nbytes  # the largest slice asked for


# ------------------------------------------------------------------------------------------------------------ Inception


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in torch-fidelity's format, the BatchNorm statistics those of `pictures(12, 5)`: features that vary."""
    import_torchvision()
    from torch_fidelity import feature_extractor_inceptionv3 as package

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(package.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        model = package.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 1, 2)
            torch.nn.init.uniform_(module.bias, 0.5, 1)  # few features that are 0 for all images
            module.momentum = None
    torch.nn.init.normal_(model.fc.weight, std=0.05)
    with torch.no_grad():
        model.train()(torch.from_numpy(pictures(12, 5)).permute(0, 3, 1, 2))
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def directly(inception_file):
    """pool and spatial features of `pictures(12, 5)` by torch-fidelity, the spatial ones written out from their definition."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(inception_file))
    entering = []
    model.Mixed_6d.register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0].clone()))
    (pool,) = model(torch.from_numpy(pictures(12, 5)).permute(0, 3, 1, 2))
    branch, x = model.Mixed_6d.branch1x1, entering[0].double().numpy()
    w = branch.conv.weight[:7, :, 0, 0].double().numpy()
    scale = (branch.bn.weight / (branch.bn.running_var + branch.bn.eps).sqrt())[:7].double().numpy()
    shift, mean = branch.bn.bias[:7].double().numpy(), branch.bn.running_mean[:7].double().numpy()
    spatial = np.empty((12, 2023))
    for row in range(17):
        for column in range(17):
            value = (x[:, :, row, column] @ w.T - mean) * scale + shift  # (12, 7)
            at = (row * 17 + column) * 7
            spatial[:, at : at + 7] = np.maximum(value, 0)
    return pool.numpy(), spatial


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_inception_features_are_torch_fidelitys(inception_file, directly):
    warnings = []
    network = feature_extractors.inception(str(inception_file), torch.device("cpu"), warnings.append)
    assert len(warnings) == 1 and "--inception-weights" in warnings[0]  # random weights are not the published ones
    images = torch.from_numpy(pictures(12, 5)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        found = network.extract(images)
        alone = network.extract(images[9:])
    pool, spatial = directly
    assert pool.std(axis=0).mean() >= 0.1 and spatial.std(axis=0).mean() >= 0.1
    assert found["pool"].shape == (12, 2048) and found["spatial"].shape == (12, 2023)
    assert relative(found["pool"].numpy(), pool) < 1e-5
    assert relative(found["spatial"].numpy(), spatial) < 1e-5
    channels_first = spatial.reshape(12, 17, 17, 7).transpose(0, 3, 1, 2).reshape(12, -1)
    columns_first = spatial.reshape(12, 17, 17, 7).transpose(0, 2, 1, 3).reshape(12, -1)
    for other in (channels_first, columns_first):
        assert relative(found["spatial"].numpy(), other) > 0.1
    for kind in ("pool", "spatial"):
        assert relative(alone[kind].numpy(), found[kind][9:].numpy()) < 1e-4
    assert network.class_weight.shape == (1008, 2048)


def test_evaluate_with_inception(inception_file, directly, tmp_path, capsys):
    """Statistics as REF, so that only the samples pass through the network; IS without the bias of the weights file."""
    pool, spatial = directly
    other = 1.1 * pool + 0.01, 0.9 * spatial
    (mu, sigma), (mu_s, sigma_s) = map(gaussian, other)
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    np.savez(tmp_path / "samples.npz", arr_0=pictures(12, 5))
    found = evaluated(
        tmp_path / "ref.npz", tmp_path / "samples.npz", "--inception-weights", inception_file, "--split-size", 5, "--metrics",
        "fid", "sfid", "is", output=tmp_path / "m.json",
    )  # fmt: skip
    means = ((mu - pool.mean(0, dtype=np.float64)) ** 2).sum(), ((mu_s - spatial.mean(0)) ** 2).sum()
    traces = [(scale - 1) ** 2 * np.trace(gaussian(x)[1]) for scale, x in ((1.1, pool), (0.9, spatial))]  # covariances commute
    assert (found["fid"], found["sfid"]) == pytest.approx([m + t for m, t in zip(means, traces, strict=True)], rel=1e-4)
    state = torch.load(inception_file, weights_only=True)
    assert state["fc.bias"].abs().max() > 1e-3
    assert found["is"] == pytest.approx(inception_score(pool @ state["fc.weight"].numpy().T, 5), rel=1e-4)
    assert len(found["networks"]["inception"]["sha256"]) == 64
    lines = [line for line in capsys.readouterr().err.splitlines() if "fewer images than dimensions" in line]
    assert len(lines) == 1 and "fid of 12 images in 2048 dimensions" in lines[0]


# ----------------------------------------------------------------------------------------------------------------- DINO


def cubic(x, a=-0.75):
    """Keys's kernel, as PyTorch has it."""
    x = abs(x)
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a if x < 2 else 0.0


def resampling(n, m, scale):
    """(m, n): each new position as a mix of the old ones, edges repeated, no antialiasing."""
    matrix = np.zeros((m, n))
    for i in range(m):
        at = (i + 0.5) / scale - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            matrix[i, min(max(j, 0), n - 1)] += cubic(at - j)
    return matrix


def test_dino_positions_are_resampled_as_in_the_original_network():
    positions = torch.randn(1, 1 + 37 * 37, 8, generator=torch.Generator().manual_seed(0))
    found = feature_extractors.resample_positions(positions, 16)
    grid = positions[0, 1:].reshape(37, 37, 8).double().numpy()
    rows = resampling(37, 16, 16.1 / 37)
    expected = np.einsum("ij,jkc,lk->ilc", rows, grid, rows).reshape(256, 8)
    assert found.shape == (1, 257, 8)
    torch.testing.assert_close(found[:, 0], positions[:, 0])
    np.testing.assert_allclose(found[0, 1:].numpy(), expected, atol=1e-5)
    plain = resampling(37, 16, 16 / 37)
    assert np.abs(np.einsum("ij,jkc,lk->ilc", plain, grid, plain).reshape(256, 8) - expected).max() > 0.1


def test_dino_features_and_fdd(tmp_path, monkeypatch):
    """A ViT-L of one block: the class token after the norm, of images that Pillow resized and rounded."""
    import_torchvision()
    import timm

    create, original = timm.create_model, partial(timm.create_model, "vit_large_patch14_dinov2", depth=1, num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=1, **options))
    model = randomize(original(img_size=518)).eval()
    path = tmp_path / "dinov2_vitl14_pretrain.pth"
    torch.save(model.state_dict() | {"mask_token": torch.zeros(1, 1024)}, path)
    images = pictures(5, 6)
    network = feature_extractors.dinov2(str(path), torch.device("cpu"))
    with torch.inference_mode():
        found = network.extract(torch.from_numpy(images).permute(0, 3, 1, 2))["dinov2"]
        pixels = [np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) / 255 for image in images]
        pixels = (np.stack(pixels) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        small = original(img_size=224).eval()
        rows = resampling(37, 16, 16.1 / 37)
        grid = model.pos_embed[0, 1:].reshape(37, 37, 1024).double().numpy()
        positions = np.einsum("ij,jkc,lk->ilc", rows, grid, rows).reshape(1, 256, 1024)
        state = model.state_dict()
        state["pos_embed"] = torch.cat([model.pos_embed[:, :1], torch.from_numpy(positions).float()], dim=1)
        small.load_state_dict(state)
        tokens = small.norm(
            small.blocks(small._pos_embed(small.patch_embed(torch.from_numpy(pixels).permute(0, 3, 1, 2).float())))
        )
    assert found.shape == (5, 1024) and found.std(dim=0).mean() > 0.01
    torch.testing.assert_close(found, tokens[:, 0], rtol=1e-3, atol=1e-4)
    mu, sigma = gaussian(found.numpy())
    np.savez(tmp_path / "ref.npz", mu_dinov2=mu + 0.1, sigma_dinov2=sigma)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    out = evaluated(
        tmp_path / "ref.npz", tmp_path / "samples.npz", "--metrics", "fdd", "--dino-weights", path, output=tmp_path / "m.json"
    )
    assert out["fdd"] == pytest.approx(1024 * 0.01, rel=1e-3)


def test_clip_embeddings_are_openais(tmp_path, monkeypatch):
    """One narrow block, from transformers' folder, against torch-fidelity's copy of OpenAI's code."""
    import_torchvision()
    import timm
    from torch_fidelity.feature_extractor_clip import VisionTransformer

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **o: create(name, depth=1, embed_dim=64, num_heads=1, **o))
    model = randomize(VisionTransformer(336, 14, 64, 1, 1, 768)).eval()
    names = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    names |= {f"layer_norm{i}": f"ln_{i}" for i in (1, 2)}
    block = model.transformer.resblocks[0]
    state = {
        f"vision_model.encoder.layers.0.{ours}.{kind}": block.state_dict()[f"{theirs}.{kind}"]
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
    }
    for kind in ("weight", "bias"):
        for part, value in zip("qkv", block.attn.state_dict()[f"in_proj_{kind}"].chunk(3), strict=True):
            state[f"vision_model.encoder.layers.0.self_attn.{part}_proj.{kind}"] = value.contiguous()
        state[f"vision_model.pre_layrnorm.{kind}"] = model.ln_pre.state_dict()[kind]
        state[f"vision_model.post_layernorm.{kind}"] = model.ln_post.state_dict()[kind]
    state["vision_model.embeddings.class_embedding"] = model.class_embedding.detach()
    state["vision_model.embeddings.position_embedding.weight"] = model.positional_embedding.detach()
    state["vision_model.embeddings.patch_embedding.weight"] = model.conv1.weight.detach()
    state["visual_projection.weight"] = model.proj.detach().T.contiguous()
    others = {"logit_scale": torch.ones(()), "text_projection.weight": torch.zeros(2, 2)}
    (tmp_path / "clip").mkdir()
    torch.save(state | others, tmp_path / "clip" / "pytorch_model.bin")
    images = torch.from_numpy(pictures(3, 6)).permute(0, 3, 1, 2)
    network = feature_extractors.clip(str(tmp_path / "clip"), torch.device("cpu"))
    with torch.inference_mode():
        found = network.extract(images)["clip"]
        pixels = torch.nn.functional.interpolate(images.float() / 255, (336, 336), mode="bicubic")
        mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]).view(2, 3, 1, 1)
        expected = model((pixels - mean) / std)
    assert found.shape == (3, 768) and found.std(dim=0).mean() > 3e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ reference


def cheap_inception(path, device, warn):
    extract = runs.colour_features(device)

    def pool_and_spatial(images):
        found = extract(images)
        return {"pool": found["pool"], "spatial": found["spatial"]}

    return feature_extractors.Network("inception", pool_and_spatial, class_weight=np.eye(10, 48))


def test_a_reference_batch_of_ones_own_images(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feature_extractors, "inception", cheap_inception)
    images = np.load(pair[0])["arr_0"]
    source = as_folder(images, tmp_path / "images")
    for name, seed in (("a", 3), ("again", 3), ("b", 4)):
        dataset_tools.main(
            ["reference", f"--source={source}", f"--dest={tmp_path}/{name}.npz", "--num-images=20", f"--seed={seed}"]
        )
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as made, np.load(tmp_path / "b.npz") as other:
        assert set(made) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s"}
        assert made["arr_0"].shape == (20, SIDE, SIDE, 3) and made["arr_0"].dtype == np.uint8
        whole = {image.tobytes() for image in images}
        assert len({image.tobytes() for image in made["arr_0"]} & whole) == 20
        assert not np.array_equal(made["arr_0"], other["arr_0"])
        pool, spatial, _ = colour_features(images)
        for (mu, sigma), rows in ((("mu", "sigma"), pool), (("mu_s", "sigma_s"), spatial)):
            expected = gaussian(rows)
            np.testing.assert_allclose(made[mu], expected[0], rtol=1e-6)
            np.testing.assert_allclose(made[sigma], expected[1], rtol=1e-4, atol=1e-9)
    through = evaluated(tmp_path / "a.npz", pair[1], output=tmp_path / "through.json")
    direct = evaluated(*pair, output=tmp_path / "direct.json")
    assert (through["fid"], through["sfid"]) == pytest.approx((direct["fid"], direct["sfid"]), rel=1e-6)
    assert through["num_ref"] == 20 and through["statistics_from_file"]["ref"] == ["fid", "sfid"]
    line = capsys.readouterr()
    line = runs.refused(dataset_tools.main, capsys, ["reference", "--source", source, "--dest", tmp_path / "a.npz"])
    assert "a.npz: exists already" in line


# -------------------------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("wrapper", sorted(p.name for p in EVALUATION.glob("eval_*.sh")))
def test_wrappers_find_their_configs(wrapper, tmp_path):
    text = (EVALUATION / wrapper).read_text().splitlines()
    assert len(text) == 2
    done = subprocess.run(
        ["bash", EVALUATION / wrapper], env=os.environ | {"CKPT": str(tmp_path / "none.pt")}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "none.pt: no such checkpoint" in done.stderr, done.stderr


# ------------------------------------------------------------------------------------------------------------ bad input

refused = partial(runs.refused, evaluate.main)


def refused_midway(capsys, argv):
    """The last line, after progress bars."""
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(a) for a in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def damaged(path, images):
    """A deflated npz of which some bytes in the middle are others."""
    np.savez_compressed(path, arr_0=images)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)
    return path


BAD = {
    "no such": (lambda d, i: d / "nothing.npz", ["nothing.npz", "no such"]),
    "no arr_0": (lambda d, i: npz(d / "x.npz", labels=np.arange(3)), ["no arr_0", "labels"]),
    "statistics alone": (lambda d, i: npz(d / "x.npz", mu=np.zeros(48), sigma=np.eye(48)), ["no arr_0", "precision"]),
    "float": (lambda d, i: npz(d / "x.npz", arr_0=i / 255), ["float64", "uint8"]),
    "grey": (lambda d, i: npz(d / "x.npz", arr_0=i[..., 0]), ["(20, 32, 32)", "uint8 (N, H, W, 3)"]),
    "one channel": (lambda d, i: npz(d / "x.npz", arr_0=i[..., :1]), ["(20, 32, 32, 1)"]),
    "other size": (lambda d, i: npz(d / "x.npz", arr_0=i[:, :16, :16]), ["16x16", "32x32"]),
    "few": (lambda d, i: npz(d / "x.npz", arr_0=i[:3]), ["3 images", "at least 4"]),
    "text": (lambda d, i: (d / "x.npz").write_text("hello") and d / "x.npz", ["not an .npz file"]),
    "other statistics": (lambda d, i: npz(d / "x.npz", arr_0=i, mu=np.zeros(7), sigma=np.eye(7)), ["(7,)", "(48,)"]),
    "NaN statistics": (lambda d, i: npz(d / "x.npz", arr_0=i, mu=np.full(48, np.nan), sigma=np.eye(48)), ["mu.npy", "finite"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sets_are_refused_in_one_line(pair, tmp_path, capsys, case):
    make, words = BAD[case]
    line = refused(capsys, [pair[0], make(tmp_path, pictures(20, 4)), *FEATURES, "--output", tmp_path / "m.json"])
    for word in words:
        assert word in line, line
    assert not (tmp_path / "m.json").exists()


def test_what_only_reading_shows_is_one_line_too(pair, tmp_path, capsys):
    line = refused_midway(
        capsys, [pair[0], damaged(tmp_path / "x.npz", pictures(20, 4)), *FEATURES, "--output", tmp_path / "m.json"]
    )
    assert line.startswith("evaluate.py: error: ") and "x.npz: truncated or damaged" in line
    line = refused_midway(capsys, [*pair, "--features", "runs:nan_features", "--output", tmp_path / "m.json"])
    assert line.startswith("evaluate.py: error: ") and "ref.npz: image 0 ff." in line and "not finite" in line
    assert not (tmp_path / "m.json").exists()


def test_a_truncated_zip_is_refused(pair, tmp_path, capsys):
    (tmp_path / "cut.npz").write_bytes(pair[1].read_bytes()[:-100])
    assert "cut.npz: truncated" in refused(capsys, [tmp_path / "cut.npz", pair[1], *FEATURES])


def test_folders_of_odd_images_are_refused(pair, tmp_path, capsys):
    odd = {"grey": pictures(1, 0)[0][..., 0], "large": np.zeros((64, 64, 3), np.uint8)}
    for name, image in odd.items():
        folder = as_folder(pictures(6, 0), tmp_path / name)
        Image.fromarray(image).save(folder / "000004.png")
        line = refused(capsys, [pair[0], folder, *FEATURES])
        assert "000004.png" in line and ("mode L" if name == "grey" else "64x64") in line
    (tmp_path / "empty").mkdir()
    assert "no image files" in refused(capsys, [pair[0], tmp_path / "empty", *FEATURES])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--metrics", "fdi"), ["--metrics fdi", "did you mean fid"]),
        (("--features", "nowhere:factory"), ["--features nowhere:factory", "module:factory"]),
        (("--features", "runs:not_there"), ["--features runs:not_there"]),
        (("--features", "runs:pool_features", "--metrics", "sfid"), ["--metrics sfid", "spatial"]),
        (("--inception-weights", "nowhere.pth"), ["--inception-weights", "nowhere.pth"]),
        (("--metrics", "fdd", "--dino-weights", "nowhere.pth"), ["--dino-weights", "nowhere.pth"]),
        (("--split-size", 0), ["--split-size"]),
        (("--pr-dtype", "float64"), ["--pr-dtype", "float16"]),
        (("--output", "."), ["--output", "folder"]),
    ],
)
def test_bad_options_are_refused_in_one_line(pair, capsys, more, words):
    line = refused(capsys, [*pair, *more])
    for word in words:
        assert word in line, line


def test_ref_and_samples_must_be_given(pair, capsys):
    assert "REF SAMPLES" in refused(capsys, [pair[0]])


def test_weights_of_another_network_and_files_that_carry_code_are_refused(pair, tmp_path, capsys):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    line = refused(capsys, [*pair, "--inception-weights", tmp_path / "other.pth"])
    assert "other.pth" in line and "Inception" in line

    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"fc.weight": Code()}, tmp_path / "code.pth")
    line = refused(capsys, [*pair, "--inception-weights", tmp_path / "code.pth"])
    assert "code.pth" in line and "carries code" in line and not (tmp_path / "ran").exists()


def test_without_network_one_line_says_what_to_download(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no route")))
    line = refused(capsys, [*pair])
    assert "no route" in line and "weights-inception-2015-12-05-6726825d.pth" in line and str(tmp_path) in line
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args: (_ for _ in ()).throw(OSError("no route")))
    line = refused(capsys, [*pair, "--metrics", "fdd"])
    assert "--dino-weights" in line and "vit_large_patch14_dinov2" in line
