"""Every class of autoencoder, and VAE weights of latent-diffusion, from images to images; records with statistics of any shape."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ldm_vae import LDMVAE
from runs import refused, tiny_vae
from safetensors.torch import load_file
from sets import picture, save
from tiny_autoencoders import SIDE, TOKENS, tiny_dc, tiny_flux2, tiny_rae
from torch import nn

import dataset_tools
import evaluate
import generate
import train
from common.errors import UserError
from data.dataset import LatentDataset
from models import autoencoders
from models.vae import VAERecord, decode, encode_moments, load_vae, sample_latents, to_uint8

MAKERS = {"AutoencoderDC": tiny_dc, "AutoencoderKLFlux2": tiny_flux2, "AutoencoderRAE": tiny_rae}
COUNT = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of each class."""
    root = tmp_path_factory.mktemp("autoencoders")
    return {name: make(root / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "images"
    for i in range(COUNT):
        save(folder / f"00000/img{i:08d}.png", picture(SIDE, SIDE, seed=i))
    labels = [[f"00000/img{i:08d}.png", i % 2] for i in range(COUNT)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def pixels() -> torch.Tensor:
    return torch.from_numpy(np.stack([picture(SIDE, SIDE, seed=i) for i in range(2)])).permute(0, 3, 1, 2)


def restored(folder: Path) -> tuple[VAERecord, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The record; moments of images, their means as the model sees them, and these decoded."""
    vae, record = load_vae(str(folder))
    moments = encode_moments(vae, pixels())
    x = sample_latents(moments, torch.zeros(2, record.latent_channels, *moments.shape[2:]), record)
    return record, moments, x, decode(vae, x.double())


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether images are the same but for rounding."""
    return bool((a.int() - b.int()).abs().max() <= 1 and b.float().std() > 1)


# ------------------------------------------------------------------------------------ each class, by diffusers' own pipeline


def test_dc_stores_latents_without_a_posterior(folders):
    record, moments, x, images = restored(folders["AutoencoderDC"])
    assert (record.downsample_factor, record.latent_channels, record.scaling_factor) == (4, 4, 0.4)
    assert not record.posterior and record.vae_class == "AutoencoderDC" and moments.shape == (2, 4, 8, 8)
    vae, _ = load_vae(str(folders["AutoencoderDC"]))
    z = vae.encode(pixels().float() / 127.5 - 1).latent
    torch.testing.assert_close(x, 0.4 * z, atol=1e-5, rtol=1e-4)
    assert close(images, to_uint8(vae.decode(z).sample))
    noise = torch.randn(2, 4, 8, 8)
    assert torch.equal(sample_latents(moments, noise, record), x)  # nothing is drawn


def test_flux2_is_normalised_as_its_pipeline_does(folders):
    record, moments, x, images = restored(folders["AutoencoderKLFlux2"])
    assert (record.downsample_factor, record.latent_channels) == (4, 12) and moments.shape == (2, 24, 8, 8)
    vae, _ = load_vae(str(folders["AutoencoderKLFlux2"]))
    posterior = vae.encode(pixels().float() / 127.5 - 1).latent_dist

    def patchify(z):  # as Flux2Pipeline._patchify_latents
        return z.view(2, 3, 8, 2, 8, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 8, 8)

    mean, std = vae.bn.running_mean.view(1, -1, 1, 1), (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    torch.testing.assert_close(x, (patchify(posterior.mean) - mean) / std, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moments[:, 12:], patchify(posterior.std), atol=1e-5, rtol=1e-4)
    assert close(images, to_uint8(vae.decode(posterior.mean).sample))


def test_rae_has_statistics_of_every_position(folders):
    record, moments, x, images = restored(folders["AutoencoderRAE"])
    assert (record.downsample_factor, record.latent_channels) == (8, 64) and moments.shape == (2, 64, TOKENS, TOKENS)
    assert record.channel_mean is not None and np.shape(record.channel_mean) == (64, TOKENS, TOKENS)
    vae, _ = load_vae(str(folders["AutoencoderRAE"]))
    normalised = vae.encode(pixels().float() / 255).latent
    torch.testing.assert_close(x, normalised, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(moments, x, atol=0.1)
    assert close(images, to_uint8(2 * vae.decode(normalised).sample - 1))


def test_statistics_of_an_autoencoder_kl(tmp_path):
    """As SDXL's pipeline: z · std / scale + mean is decoded."""
    mean, std = [0.5, -1.0, 2.0], [2.0, 0.5, 1.5]
    tiny_vae(tmp_path / "v", 2, latent_channels=3, scaling_factor=0.5, latents_mean=mean, latents_std=std)
    vae, record = load_vae(str(tmp_path / "v"))
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(z * torch.tensor(std).view(-1, 1, 1) / 0.5 + torch.tensor(mean).view(-1, 1, 1)).sample
    assert close(decode(vae, z), to_uint8(expected))
    back = sample_latents(torch.cat([z, torch.zeros_like(z)], dim=1), torch.zeros_like(z), record)
    torch.testing.assert_close(back[:, 1], (z[:, 1] + 1) * 0.5 / 0.5)


@pytest.mark.parametrize("kind", MAKERS)
def test_from_images_to_images(kind, folders, images, tmp_path):
    main = dataset_tools.main
    main(["encode", f"--source={images}", f"--dest={tmp_path}/vae-sd", f"--vae={folders[kind]}", "--batch-size=4", "--flip"])
    main(["check", str(tmp_path)])
    options = {
        "model": "SiT-Ti/2",
        "resolution": SIDE,
        "num_classes": 2,
        "batch_size": 2,
        "max_train_steps": 3,
        "num_workers": 0,
    }
    options |= {"data_dir": tmp_path, "output_dir": tmp_path, "exp_name": "run", "report_to": "none", "mixed_precision": "no"}
    options |= {"sampling_steps": 0, "checkpointing_steps": 3}
    train.main([f"--{k}={v}" for k, v in options.items()])
    state = torch.load(tmp_path / "run/checkpoints/0000003.pt", weights_only=True)
    dataset = LatentDataset(tmp_path)
    assert state["vae"] == dataset.record.to_dict() and state["vae"]["vae_class"] == kind
    assert state["model"]["x_embedder.proj.weight"].shape[1] == dataset.record.latent_channels
    drawn = ["--num-steps=2", "--num-fid-samples=3", "--per-proc-batch-size=2", f"--sample-dir={tmp_path}/out", "--cfg-scale=1"]
    generate.main([f"--ckpt={tmp_path}/run/checkpoints/0000003.pt", *drawn])
    (samples,) = (tmp_path / "out").rglob("*.npz")
    found = np.load(samples)["arr_0"]
    assert found.shape == (3, SIDE, SIDE, 3) and found.dtype == np.uint8 and found.std() > 0
    evaluate.main([str(samples), str(samples), "--features=runs:pool_features", "--metrics=fid", f"--output={tmp_path}/m.json"])
    assert json.loads((tmp_path / "m.json").read_text())["fid"] == pytest.approx(0, abs=1e-3)


def test_statistics_by_position(folders, images, tmp_path, capsys):
    main = dataset_tools.main
    main(["encode", f"--source={images}", f"--dest={tmp_path}/vae-sd", f"--vae={folders['AutoencoderDC']}", "--batch-size=4"])
    main(["stats", str(tmp_path), "--per=position"])
    values = json.loads((tmp_path / "latent_stats.json").read_text())
    moments = torch.stack([item["moments"] for item in LatentDataset(tmp_path)]).double()  # type: ignore[attr-defined]
    np.testing.assert_allclose(values["mean"], moments.mean(dim=0), atol=1e-6)
    np.testing.assert_allclose(values["std"], moments.std(dim=0, correction=0), atol=1e-6)
    options = [
        "--model=SiT-Ti/2",
        f"--resolution={SIDE}",
        "--num-classes=2",
        "--batch-size=2",
        "--max-train-steps=1",
        "--num-workers=0",
    ]
    options += [
        f"--data-dir={tmp_path}",
        f"--output-dir={tmp_path}",
        "--report-to=none",
        "--mixed-precision=no",
        "--sampling-steps=0",
    ]
    train.main([*options, "--exp-name=p", "--latent-norm=position"])
    state = torch.load(tmp_path / "p/checkpoints/0000001.pt", weights_only=True)
    assert np.shape(state["vae"]["channel_std"]) == (4, 8, 8)
    refused(
        train.main, capsys, [*options, "--exp-name=q", "--latent-norm=channel"], "latent_stats.json", "--latent-norm channel"
    )
    values["mean"] = [[row[:4] for row in rows] for rows in values["mean"]]
    (tmp_path / "latent_stats.json").write_text(json.dumps(values))
    refused(
        train.main, capsys, [*options, "--exp-name=q", "--latent-norm=position"], "latent_stats.json", "4 × 8 × 4", "4 × 8 × 8"
    )


# ------------------------------------------------------------------------------------------------------------- bad input


RECORD = {
    "vae": "a/b",
    "sha256": None,
    "downsample_factor": 8,
    "latent_channels": 2,
    "scaling_factor": 0.5,
    "shift_factor": 0.0,
}
GRID = [[[1.0, 2.0], [3.0, 4.0]]] * 2


@pytest.mark.parametrize("values", [[1.0, 2.0], GRID, GRID[:1]])
def test_records_with_statistics_of_any_shape(values):
    record = VAERecord.from_dict(RECORD | {"channel_mean": values, "channel_std": values})
    assert json.loads(json.dumps(record.to_dict())) == RECORD | {"channel_mean": values, "channel_std": values}
    moments = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    table = torch.tensor(values).view(-1, 1, 1) if isinstance(values[0], float) else torch.tensor(values)
    expected = (moments[:, :2] + moments[:, 2:] - table) / table
    torch.testing.assert_close(sample_latents(moments, torch.ones(3, 2, 2, 2), record), expected)
    record.check_shape((2, 2, 2), "x")


def test_a_record_that_says_nothing_new_is_as_before():
    assert VAERecord.from_dict(RECORD).to_dict() == RECORD
    changed = RECORD | {"vae_class": "AutoencoderDC", "posterior": False}
    assert VAERecord.from_dict(changed).to_dict() == changed and VAERecord.from_dict(changed).stored_channels == 2


@pytest.mark.parametrize(
    ("values", "culprit"),
    [
        ({"channel_mean": [1.0], "channel_std": [1.0]}, "channel_mean must be 2 numbers"),
        ({"channel_mean": [GRID], "channel_std": [GRID]}, "channel_mean must be 2 numbers"),
        ({"channel_mean": GRID, "channel_std": [[[1.0, 2.0], [3.0]]] * 2}, "channel_std must be 2 numbers"),
        ({"channel_mean": GRID, "channel_std": [[[1.0, 0.0]]]}, "channel_std must be above 0"),
        ({"channel_mean": GRID}, "channel_std must be"),
        ({"vae_class": "AutoencoderTiny"}, "known are AutoencoderKL, "),
        ({"posterior": 1}, "posterior must be true or false"),
    ],
)
def test_broken_records(values, culprit):
    with pytest.raises(UserError, match=culprit) as caught:
        VAERecord.from_dict(RECORD | values, "some/vae.json")
    assert str(caught.value).startswith("some/vae.json: ")


def test_statistics_of_another_size_of_latents():
    record = VAERecord.from_dict(RECORD | {"channel_mean": GRID, "channel_std": GRID})
    with pytest.raises(UserError, match="latents of 2 × 2 × 2, but these are 2 × 4 × 2"):
        record.check_shape((2, 4, 2), "x")


def test_autoencoders_that_are_not_known_or_too_new(folders, tmp_path, monkeypatch):
    shutil.copytree(folders["AutoencoderDC"], tmp_path / "v")
    config = json.loads((tmp_path / "v/config.json").read_text())
    (tmp_path / "v/config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderTiny"}))
    with pytest.raises(UserError, match=r"'AutoencoderTiny' .* known are AutoencoderKL, .*AutoencoderRAE"):
        load_vae(str(tmp_path / "v"))
    monkeypatch.setattr(autoencoders.AutoencoderDC, "module", "autoencoder_of_tomorrow")
    with pytest.raises(UserError, match=r"AutoencoderDC requires diffusers 0\.35 or newer; installed is \d"):
        load_vae(str(folders["AutoencoderDC"]))


def test_latents_of_another_class(folders):
    _, record = load_vae(str(folders["AutoencoderDC"]))
    load_vae(str(folders["AutoencoderDC"]), expected=record)
    with pytest.raises(UserError, match=r"an AutoencoderKLFlux2, but the latents were made by .*, an AutoencoderDC"):
        load_vae(str(folders["AutoencoderKLFlux2"]), expected=record)


def test_a_rae_takes_one_size_of_images(folders, tmp_path, capsys):
    save(tmp_path / "images/a.png", picture(16, 16))
    argv = ["encode", f"--source={tmp_path}/images", f"--dest={tmp_path}/d", f"--vae={folders['AutoencoderRAE']}"]
    refused(dataset_tools.main, capsys, argv, "a.png", "16x16", "32x32")


# ------------------------------------------------------------------------------------------------ latent-diffusion's names


@pytest.fixture(scope="module")
def ldm(tmp_path_factory) -> tuple[nn.Module, Path]:
    """A VAE as latent-diffusion writes it, with attention at the coarsest level, as VA-VAE has; factor 4, 3 channels."""
    torch.manual_seed(0)
    vae = LDMVAE(width=32, multiples=(1, 2, 2), blocks=1, channels=3, attention=(2,))
    path = tmp_path_factory.mktemp("ldm") / "vavae.pt"
    others = {"loss.discriminator.weight": torch.zeros(2), "linear_proj.weight": torch.zeros(2)}
    torch.save({"state_dict": vae.state_dict() | others, "global_step": 5}, path)
    return vae.eval(), path


def test_weights_of_latent_diffusion(ldm, tmp_path, capsys):
    vae, path = ldm
    mean, std = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([2.0, 1.0, 0.25])
    torch.save({"mean": mean.view(1, 3, 1, 1), "std": std.view(1, 3, 1, 1)}, tmp_path / "stats.pt")
    dataset_tools.main(["vae", str(path), f"{tmp_path}/v", f"--stats={tmp_path}/stats.pt"])
    assert "factor 4 with 3 channels" in capsys.readouterr().out
    record, moments, x, images = restored(tmp_path / "v")
    assert (record.downsample_factor, record.latent_channels, record.vae_class) == (4, 3, "AutoencoderKL")
    assert record.channel_mean == (0.5, -1.0, 0.0) and record.channel_std == (2.0, 1.0, 0.25)
    with torch.no_grad():
        expected, log_variance = vae.moments(pixels().float() / 127.5 - 1).chunk(2, dim=1)
        torch.testing.assert_close(moments, torch.cat([expected, (log_variance / 2).exp()], dim=1), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(x, (expected - mean.view(3, 1, 1)) / std.view(3, 1, 1), atol=1e-4, rtol=1e-3)
        assert close(images, to_uint8(vae.decode(expected)))
    refused(dataset_tools.main, capsys, ["vae", path, tmp_path / "v"], "--dest", "exists already")


def test_a_checkpoint_of_repa_e(ldm, tmp_path):
    vae, _ = ldm
    torch.save({"latents_bias": torch.ones(1, 3, 1, 1), "latents_scale": torch.full((1, 3, 1, 1), 4.0)}, tmp_path / "s.pt")
    norm = {"bn.running_mean": torch.ones(3), "bn.running_var": torch.full((3,), 1 / 16)}
    torch.save({"vae": vae.state_dict(), "ema": norm}, tmp_path / "repae.pt")
    torch.save(vae.state_dict(), tmp_path / "e2e.pt")
    dataset_tools.main(["vae", f"{tmp_path}/repae.pt", f"{tmp_path}/a"])
    dataset_tools.main(["vae", f"{tmp_path}/e2e.pt", f"{tmp_path}/b", f"--stats={tmp_path}/s.pt"])
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert configs[0]["latents_mean"] == configs[1]["latents_mean"] == [1, 1, 1]
    assert configs[0]["latents_std"] == configs[1]["latents_std"] == [0.25] * 3
    a, b = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_files_that_hold_no_such_vae(ldm, tmp_path, capsys):
    vae, path = ldm
    torch.save({"encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "no.pt")
    refused(dataset_tools.main, capsys, ["vae", tmp_path / "no.pt", tmp_path / "d"], "--source", "latent-diffusion's names")
    broken = {k: v for k, v in vae.state_dict().items() if "mid.block_2" not in k}
    torch.save(broken, tmp_path / "part.pt")
    refused(dataset_tools.main, capsys, ["vae", tmp_path / "part.pt", tmp_path / "d"], "--source", "mid_block.resnets.1")
    torch.save({"mean": torch.zeros(4), "std": torch.ones(4)}, tmp_path / "s.pt")
    refused(dataset_tools.main, capsys, ["vae", path, tmp_path / "d", f"--stats={tmp_path}/s.pt"], "--stats", "3 channels")
    assert not (tmp_path / "d").exists()
