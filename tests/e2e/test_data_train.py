"""From the VAEs of other models to images: encode, a few steps of training, generation; channel-wise scale; shifted times."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import make_latents, refused, tiny_vae
from sets import picture, save

import dataset_tools
import generate
import train
from checkpoint import reading
from common import tensor_files
from flows import FlowMatching
from loss import training_times
from models.vae import decode, load_vae, to_uint8
from randomness import epoch_order, image_labels, image_noise, training_draws
from samplers import euler_maruyama_sampler, euler_sampler, evaluation_times
from training import validation

COUNT, RESOLUTION = 8, 32
# What the published VAEs have in their config.json; the widths are small here.
KINDS = {
    "SDXL": {"latent_channels": 4, "scaling_factor": 0.13025},
    "SD3": {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False},
    "FLUX": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False},
}  # fmt: skip


def make_kind(kind: str, folder: Path) -> Path:
    """A random VAE of factor 8, in the sub-folder vae/ as in a whole pipeline."""
    tiny_vae(folder / "vae", 4, seed=1, mid_block_add_attention=False, **KINDS[kind])
    return folder


def run(kind: str, folder: Path, *options: str) -> dict:
    """Encode, train 2 steps, generate 3 images; the state of the checkpoint."""
    vae = make_kind(kind, folder / kind)
    for i in range(COUNT):
        save(folder / f"set/images/00000/img{i:08d}.png", picture(RESOLUTION, RESOLUTION, seed=i))
    labels = [[f"00000/img{i:08d}.png", i % 2] for i in range(COUNT)]
    (folder / "set/images/dataset.json").write_text(json.dumps({"labels": labels}))
    dataset_tools.main(["encode", f"--source={folder}/set/images", f"--dest={folder}/set/packed", f"--vae={vae}", "--packed"])
    dataset_tools.main(["stats", f"{folder}/set"])
    train.main(
        f"--model SiT-Ti/2 --exp-name run --output-dir {folder} --data-dir {folder}/set --resolution {RESOLUTION} --num-classes 2 "
        f"--batch-size {COUNT} --max-train-steps 2 --checkpointing-steps 2 --sampling-steps 2 --num-workers 0 --log-every 1 "
        f"--mixed-precision no --report-to none --val-data-dir {folder}/set --learning-rate 1e-2".split()
        + list(options)
    )
    ckpt = folder / "run/checkpoints/0000002.pt"
    generate.main(
        f"--ckpt {ckpt} --sample-dir {folder}/out --num-fid-samples 3 --num-steps 3 --weights model --cfg-scale 1".split()
    )
    return tensor_files.load(ckpt)


def metrics(folder: Path, name: str) -> dict[int, float]:
    lines = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("SDXL", ()), ("SD3", ("--latent-norm", "channel")), ("FLUX", ("--time-shift", "3"))],
)
def test_from_images_to_images(tmp_path, monkeypatch, kind, options):
    monkeypatch.setattr(validation, "SAMPLE_STEPS", 1)
    state = run(kind, tmp_path, *options)
    record, channels = state["vae"], KINDS[kind]["latent_channels"]
    assert (record["latent_channels"], record["downsample_factor"]) == (channels, 8)
    assert (record["scaling_factor"], record["shift_factor"]) == (
        KINDS[kind]["scaling_factor"],
        KINDS[kind].get("shift_factor", 0),
    )
    mean, factor = np.full(channels, record["shift_factor"]), np.full(channels, record["scaling_factor"])
    if options[:1] == ("--latent-norm",):
        stats = json.loads((tmp_path / "set/latent_stats.json").read_text())
        mean, factor = np.array(stats["mean"]), 1 / np.array(stats["std"])
        assert record["channel_mean"] == stats["mean"] and record["channel_std"] == stats["std"]

    # The untrained model predicts 0, so the first loss is the mean square of noise − latents.
    moments = np.load(tmp_path / "set/packed/latents-00000.npy")[epoch_order(0, 0, COUNT)].astype(np.float64)
    draws = training_draws(0, 0, range(COUNT), (channels, 4, 4))
    z = moments[:, :channels] + moments[:, channels:] * draws.posterior.numpy()
    x = (z - mean[:, None, None]) * factor[:, None, None]
    assert metrics(tmp_path, "loss")[1] == pytest.approx(np.mean((draws.noise.numpy() - x) ** 2), rel=1e-5)

    # The images are the sampler's latents, scaled back and decoded.
    model, config = reading.load_model(tmp_path / "run/checkpoints/0000002.pt", weights="model")
    shift = config["time_shift"]
    assert shift == (3.0 if options[:1] == ("--time-shift",) else 1.0)
    noise = image_noise(0, range(3), (channels, 4, 4))
    labels = image_labels(0, range(3), 2)
    times = [shift * t / (1 + (shift - 1) * t) for t in (1, 2 / 3, 1 / 3, 0)]
    state_ = noise.double()
    for t, t_next in itertools.pairwise(times):
        with torch.no_grad():
            velocity = model(state_.float(), torch.full((3,), t), labels)
        state_ = state_ + (t_next - t) * velocity.double()
    z = state_ / torch.from_numpy(factor).view(-1, 1, 1) + torch.from_numpy(mean).view(-1, 1, 1)
    vae, _ = load_vae(f"{tmp_path}/{kind}")
    with torch.no_grad():
        expected = to_uint8(vae.decode(z.float()).sample).permute(0, 2, 3, 1).numpy()
    folder = next(p for p in (tmp_path / "out/run").iterdir() if p.is_dir())
    found = np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(3)])
    assert np.abs(found.astype(int) - expected).max() <= 1 and expected.std() > 1
    assert (tmp_path / "run/samples/0000002.png").is_file() and set(metrics(tmp_path, "val_loss")) == {1, 2}


def test_training_refuses_what_contradicts(tmp_path, capsys):
    make_latents(tmp_path / "set", COUNT, None)
    base = (
        f"--exp-name run --output-dir {tmp_path} --data-dir {tmp_path}/set --resolution 64 --num-classes 5 --batch-size {COUNT} "
        "--max-train-steps 1 --sampling-steps 0 --num-workers 0 --mixed-precision no --report-to none --resume-step -1"
    ).split()
    train.main(["--model", "SiT-Ti/4", *base])
    capsys.readouterr()
    for options, words in (
        (["--latent-norm", "channel"], ["latent_stats.json: missing", "dataset_tools.py stats"]),
        (["--time-shift", "2"], ["--time-shift 2", "started with 1.0"]),
        (["--time-shift", "0"], ["--time-shift", "0.001"]),
        (["--model", "DFM-SiT-B/2", "--time-shift", "2"], ["--time-shift 2", "DFM-SiT-B/2"]),
    ):
        line = refused(train.main, capsys, ["--model", "SiT-Ti/4", *base, *options])
        assert all(word in line for word in words), line
    dataset_tools.main(["stats", f"{tmp_path}/set"])
    capsys.readouterr()
    line = refused(train.main, capsys, ["--model", "SiT-Ti/4", *base, "--latent-norm", "channel"])
    assert "--latent-norm channel" in line and "started with vae" in line
    argv = ["--ckpt", tmp_path / "run/checkpoints/0000001.pt", "--time-shift", 2, "--sample-dir", tmp_path / "o"]
    assert "--time-shift 2.0 contradicts" in refused(generate.main, capsys, argv)


# ------------------------------------------------------------------------------------------------------- shifted times


@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
def test_training_times_are_shifted(weighting):
    draws = training_draws(0, 0, range(50), (1, 2, 2))
    t = training_times(draws, weighting).double().numpy()
    assert torch.equal(training_times(draws, weighting, "linear", 1.0), training_times(draws, weighting))
    np.testing.assert_allclose(training_times(draws, weighting, "linear", 3.0), 3 * t / (1 + 2 * t), rtol=1e-6)


class Drift(torch.nn.Module):
    """v(x, t) = t² + x, and the times at which it was asked."""

    num_classes = 1

    def __init__(self):
        super().__init__()
        self.times = []

    def forward(self, x, t, y):
        self.times.append(float(t[0]))
        return t.view(-1, 1, 1, 1) ** 2 + x


@pytest.mark.parametrize("heun", [False, True])
def test_the_sampler_walks_the_shifted_grid(heun):
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Drift()
    found = euler_sampler(model, x, torch.zeros(2, dtype=torch.long), num_steps=4, heun=heun, time_shift=2.5)
    grid = [2.5 * t / (1 + 1.5 * t) for t in (1, 0.75, 0.5, 0.25, 0)]
    expected = x.numpy().copy()
    for i, (t, t_next) in enumerate(itertools.pairwise(grid)):
        v = t**2 + expected
        euler = expected + (t_next - t) * v
        expected = expected + (t_next - t) * (v + t_next**2 + euler) / 2 if heun and i < 3 else euler
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(sorted(model.times), sorted(evaluation_times(4, "ode", heun, 2.5)), rtol=1e-6)


def test_the_sde_sampler_takes_the_shifted_grid():
    model = Drift()
    euler_maruyama_sampler(model, torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.long), num_steps=3, time_shift=2.0)
    np.testing.assert_allclose(model.times, [2 * t / (1 + t) for t in (1, 0.52, 0.04)], rtol=1e-6)


def test_validation_losses_take_the_shift():
    from models.vae import SD_VAE

    batch = {"moments": torch.rand(2, 8, 4, 4), "label": torch.zeros(2, dtype=torch.long)}
    model = Drift()
    draws = training_draws(0, 0, range(2), (4, 4, 4), purpose="held-out")
    for s in (1.0, 4.0):
        flow = FlowMatching(time_shift=s)
        flow.val_losses(model, batch, range(2), SD_VAE, flow.conditions([None]))
        t = draws.time_uniform[0].item()
        assert model.times[-1] == pytest.approx(s * t / (1 + (s - 1) * t), rel=1e-6)


def test_decode_undoes_the_channels(tmp_path):
    vae_folder = make_kind("SD3", tmp_path)
    _, record = load_vae(str(vae_folder))
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=16), 0.5 + rng.random(16)
    from models.vae import VAERecord, sample_latents

    channels = VAERecord.from_dict(record.to_dict() | {"channel_mean": mean.tolist(), "channel_std": std.tolist()})
    vae, found = load_vae(str(vae_folder), expected=channels)
    assert found == record
    z = torch.from_numpy(rng.normal(size=(2, 16, 4, 4)))
    moments = torch.cat([z, torch.zeros_like(z)], dim=1).float()
    x = sample_latents(moments, torch.zeros_like(z).float(), channels)
    np.testing.assert_allclose(x.numpy(), (z.numpy() - mean[:, None, None]) / std[:, None, None], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        expected = to_uint8(vae.decode(z.float()).sample)
    assert (decode(vae, x.double()).int() - expected.int()).abs().max() <= 1
