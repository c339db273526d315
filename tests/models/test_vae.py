"""vae.py: records, scaling, quantisation, and the quick start's VAE."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import tiny_vae

import models.vae
from common.errors import UserError
from models.vae import SD_VAE, VAERecord, decode, encode_moments, load_vae, sample_latents, to_uint8
from preprocessing import demo

QUICKSTART = Path(__file__).resolve().parents[2] / "experiments_updated" / "quickstart_vae"
RECORD = {
    "vae": "a/b",
    "sha256": "0f",
    "downsample_factor": 8,
    "latent_channels": 16,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small untrained VAE of factor 2 with a scale and a shift, as diffusers saves it."""
    return tiny_vae(tmp_path_factory.mktemp("vae"), 2, latent_channels=3, scaling_factor=0.5, shift_factor=0.25)


def test_record_round_trip_and_keys():
    record = VAERecord.from_dict(RECORD)
    assert record.to_dict() == RECORD
    assert json.loads(json.dumps(record.to_dict())) == RECORD
    assert VAERecord.from_dict({**RECORD, "shift_factor": None}).shift_factor == 0
    assert VAERecord.from_dict({**RECORD, "sha256": None}).sha256 is None


def test_record_of_data_without_one():
    assert (SD_VAE.downsample_factor, SD_VAE.latent_channels, SD_VAE.scaling_factor, SD_VAE.shift_factor) == (8, 4, 0.18215, 0)
    assert SD_VAE.sha256 is None


@pytest.mark.parametrize(
    ("values", "culprit"),
    [
        ([], "JSON object"),
        ({k: v for k, v in RECORD.items() if k != "scaling_factor"}, "scaling_factor"),
        ({**RECORD, "downsample_factor": 0}, "downsample_factor"),
        ({**RECORD, "latent_channels": 4.5}, "latent_channels"),
        ({**RECORD, "scaling_factor": 0}, "scaling_factor"),
        ({**RECORD, "scaling_factor": math.nan}, "scaling_factor"),
        ({**RECORD, "shift_factor": "0"}, "shift_factor"),
        ({**RECORD, "vae": None}, "vae"),
    ],
)
def test_broken_records_are_refused(values, culprit):
    with pytest.raises(UserError, match=culprit) as caught:
        VAERecord.from_dict(values, "some/vae.json")
    assert str(caught.value).startswith("some/vae.json: ")


def test_to_uint8_is_the_definition_and_inverts_the_input_scaling():
    values = np.linspace(-1.5, 1.5, 4001, dtype=np.float32)
    expected = np.clip(values * np.float32(127.5) + 128, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(to_uint8(torch.from_numpy(values)).numpy(), expected)
    every = torch.arange(256)
    assert torch.equal(to_uint8(every.double() / 127.5 - 1), every.to(torch.uint8))


def test_sample_latents():
    rng = np.random.default_rng(0)
    mean, std, noise = rng.normal(size=(3, 2, 4, 5, 5)).astype(np.float32)
    record = VAERecord("x", None, 8, 4, 0.5, 0.25)
    found = sample_latents(torch.from_numpy(np.concatenate([mean, std], axis=1)), torch.from_numpy(noise), record)
    np.testing.assert_allclose(found.numpy(), (mean + std * noise - 0.25) * 0.5, rtol=1e-5, atol=1e-6)


def test_load_reads_everything_from_the_vaes_own_config(folder):
    vae, record = load_vae(str(folder))
    assert (record.downsample_factor, record.latent_channels, record.scaling_factor, record.shift_factor) == (2, 3, 0.5, 0.25)
    assert record.vae == str(folder)
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    import hashlib

    assert record.sha256 == hashlib.sha256((folder / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()


def test_null_shift_means_0(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "v")
    config = json.loads((tmp_path / "v/config.json").read_text())
    (tmp_path / "v/config.json").write_text(json.dumps({**config, "shift_factor": None}))
    vae, record = load_vae(str(tmp_path / "v"))
    assert record.shift_factor == 0
    z = torch.randn(1, 3, 4, 4)
    assert torch.equal(decode(vae, z * 0.5), to_uint8(vae.decode(z).sample))


def test_encode_moments_is_the_posterior_of_scaled_pixels(folder):
    vae, _ = load_vae(str(folder))
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    moments = encode_moments(vae, images)
    assert moments.dtype == torch.float32 and moments.shape == (2, 6, 4, 6)
    # The posterior by hand: the encoder's output is mean and log variance.
    parameters = vae.quant_conv(vae.encoder(torch.from_numpy(images.numpy().astype(np.float32) / 127.5 - 1)))
    mean, log_variance = parameters.numpy()[:, :3], parameters.numpy()[:, 3:]
    np.testing.assert_allclose(moments[:, :3].numpy(), mean, atol=1e-5)
    np.testing.assert_allclose(moments[:, 3:].numpy(), np.exp(log_variance / 2), atol=1e-5)


def test_decode_takes_float64_and_undoes_scale_and_shift(folder):
    vae, _ = load_vae(str(folder))
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = decode(vae, (z.double() - 0.25) * 0.5)
    assert images.dtype == torch.uint8 and images.shape == (2, 3, 8, 8)
    expected = to_uint8(vae.decode(z).sample)
    assert (images.int() - expected.int()).abs().max() <= 1
    assert expected.float().std() > 1  # not one grey


def test_many_latents_are_decoded_in_parts_that_keep_tensors_small(folder, monkeypatch):
    vae, _ = load_vae(str(folder))
    z, sizes = torch.randn(5, vae.config.latent_channels, 4, 4), []
    whole, decode_part = decode(vae, z), vae.decode
    channels, side = vae.config.block_out_channels[1], whole.shape[-1]
    monkeypatch.setattr(models.vae, "MAX_DECODED", 2 * 4 * channels * side * side)
    monkeypatch.setattr(vae, "decode", lambda z: sizes.append(len(z)) or decode_part(z))
    assert (decode(vae, z).int() - whole.int()).abs().max() <= 1 and sizes == [2, 2, 1]


def test_relative_name_is_found_beside_the_code(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    _, record = load_vae("experiments_updated/quickstart_vae")
    assert record.vae == "experiments_updated/quickstart_vae"


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "nothing", "/no/where"])
def test_vae_not_found(name):
    with pytest.raises(UserError, match=r"--vae .*no such folder") as caught:
        load_vae(name)
    assert name in str(caught.value)


@pytest.mark.parametrize(("name", "repository"), [("mse", "stabilityai/sd-vae-ft-mse"), ("some/vae", "some/vae")])
def test_failed_download_is_one_line_that_names_what_was_tried(monkeypatch, name, repository):
    import huggingface_hub

    tried = []

    def download(repo_id, **_):
        tried.append(repo_id)
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError) as caught:
        load_vae(name)
    message = str(caught.value)
    assert tried == [repository] and repository in message and "--vae" in message and "no network" in message
    assert "\n" not in message


def test_broken_folders(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json"):
        load_vae(str(tmp_path / "empty"))
    shutil.copytree(folder, tmp_path / "truncated")
    weights = tmp_path / "truncated" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="does not load") as caught:
        load_vae(str(tmp_path / "truncated"))
    assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model\.safetensors"):
        load_vae(str(tmp_path / "truncated"))


def test_a_vae_that_does_not_fit_the_latents(folder):
    _, record = load_vae(str(folder))
    load_vae(str(folder), expected=record)
    with pytest.raises(UserError, match="downsample_factor is 2"):
        load_vae(str(folder), expected=SD_VAE)
    changed = VAERecord(**{**record.to_dict(), "sha256": "0"})
    with pytest.raises(UserError, match="not those that made the latents"):
        load_vae(str(folder), expected=changed)


def test_quickstart_vae():
    """Small, factor 4 with 4 channels, latents of mean 0 and deviation 1, and held-out canvases restored above 25 dB."""
    assert (QUICKSTART / "diffusion_pytorch_model.safetensors").stat().st_size < 3e6
    vae, record = load_vae(str(QUICKSTART))
    assert (record.downsample_factor, record.latent_channels) == (4, 4)
    canvases = np.stack([canvas for *_, canvas in demo.demo_canvases(held_out=True, per_class=4)])
    images = torch.from_numpy(canvases)[:, None].expand(-1, 3, -1, -1)
    moments = encode_moments(vae, images)
    assert moments.shape == (40, 8, 16, 16)
    noise = torch.randn(40, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = sample_latents(moments, noise, record)
    assert latents.mean().item() == pytest.approx(0, abs=0.05) and latents.std().item() == pytest.approx(1, abs=0.05)
    restored = decode(vae, sample_latents(moments, torch.zeros(40, 4, 16, 16), record))
    error = (restored.numpy().astype(float) - images.numpy()) ** 2
    assert 10 * math.log10(255**2 / error.mean()) > 25
