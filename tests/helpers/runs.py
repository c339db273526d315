"""Small real inputs for the tests of whole scripts: a random VAE, a set of latents, a checkpoint with random weights."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from checkpoint import training_state, weights
from common.torchvision_shim import import_torchvision
from config.options import TrainConfig
from models.vae import VAERecord

ROOT = Path(__file__).resolve().parents[2]
SIDE, CHANNELS, RESOLUTION, CLASSES = 8, 4, 32, 5


def tiny_vae(folder: Path, blocks: int, seed: int = 0, **options) -> Path:
    """An untrained AutoencoderKL of factor 2^(blocks − 1) with 8 channels, as diffusers saves it."""
    import_torchvision()  # which diffusers imports
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        norm_num_groups=4,
        **options,
    ).save_pretrained(folder)
    return folder


def make_vae(folder: Path) -> VAERecord:
    """A random VAE of factor 4 with 4 channels, 32 px."""
    options = {"latent_channels": CHANNELS, "sample_size": RESOLUTION, "scaling_factor": 0.5, "mid_block_add_attention": False}
    tiny_vae(folder, 3, **options)
    return VAERecord(str(folder), None, 4, CHANNELS, 0.5, 0.0)


def make_latents(
    data_dir: Path, count: int, record: VAERecord | None, labels: bool = True, seed: int = 0, side: int | None = None
) -> Path:
    """A data set in the published layout, of random moments."""
    folder = data_dir / "vae-sd" / "00000"
    folder.mkdir(parents=True)
    side = side or SIDE
    rng = np.random.default_rng(seed)
    entries = []
    for i in range(count):
        mean = rng.standard_normal((CHANNELS, side, side))
        std = 0.1 + rng.random((CHANNELS, side, side))
        name = f"img-mean-std-{i:08d}.npy"
        np.save(folder / name, np.concatenate([mean, std]).astype(np.float32))
        entries.append([f"00000/{name}", i % CLASSES])
    (data_dir / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": entries if labels else None}))
    if record is not None:
        (data_dir / "vae-sd" / "vae.json").write_text(json.dumps(record.to_dict()))
    return data_dir


def make_checkpoint(path: Path, record: VAERecord, model: str = "ELIT-SiT-Ti/2", **options) -> Path:
    """A checkpoint of train.py's format with random, non-zero weights."""
    if model.startswith("ELIT-SiT-Ti"):
        options = {"head_depth": 1, "tail_depth": 1} | options
    config = TrainConfig(model=model, resolution=RESOLUTION, num_classes=CLASSES, exp_name="made", elit_group_size=2, **options)
    torch.manual_seed(1)
    net = models.create_model(
        model,
        input_size=SIDE,
        num_classes=CLASSES,
        **weights.model_options(vars(config)),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    state = {"model": net.state_dict(), "ema": {"0.9999": net.state_dict()}, "optimizer": {}, "scheduler": {}, "scaler": None}
    training_state.save(path, state | {"step": 7, "config": vars(config), "vae": record.to_dict()})
    return path


def launch(*command: str, cwd: Path | None = None, **kwargs) -> subprocess.CompletedProcess:
    """Run a script or launcher of this environment, on the CPU, with one thread a process."""
    return subprocess.run(command_line(*command), cwd=cwd or ROOT, env=environment(), capture_output=True, text=True, **kwargs)


FORK = """
import importlib, json, os, sys
import train, torch._dynamo  # once, for all processes of all runs: the first optimizer of a process imports Dynamo, in seconds
for name in sys.argv[2:]:
    importlib.import_module(name)
for port, count, argv, before in json.loads(sys.argv[1]):
    os.environ |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(count):
        if not (child := os.fork()):
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            code = 1
            try:
                exec(before)
                train.main(argv)
                code = 0
            except SystemExit as stop:
                code = stop.code
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


def train_on(*several: tuple[int, list[str], str], imports: tuple[str, ...] = ()) -> list[str]:
    """Runs of train.py, one after the other: (number of processes, arguments, code that each process executes before).

    The processes are as a launcher would start them, but it takes less time. Returns the lines that they wrote to stdout; each
    run ends with one of its processes' exit codes. imports: other modules to be imported once.
    """
    told = [(free_port(), count, argv, before) for count, argv, before in several]
    done = launch("-c", FORK, json.dumps(told), *imports)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def reset_accelerate() -> None:
    """Forget accelerate's process-wide state, so that the next run in this process starts anew."""
    if "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command_line(*command: str) -> list[str]:
    """`train.py …` by this interpreter; `torchrun …` and `accelerate launch …` as modules of it."""
    modules = {"torchrun": ["torch.distributed.run"], "accelerate": ["accelerate.commands.accelerate_cli"]}
    if command[0] in modules:
        return [sys.executable, "-m", *modules[command[0]], *command[1:]]
    return [sys.executable, *command]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def refused(main, capsys, argv, *culprits: str) -> str:
    """The one line on stderr with which a script's `main(argv)` refuses a user's mistake, naming all `culprits`; exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not re.search(r"warning|%\||image/s", line)]
    assert len(lines) == 1 and re.match(r"\w+\.py: error: ", lines[0]), lines
    for culprit in culprits:
        assert culprit in lines[0], lines[0]
    return lines[0]


def colour_features(device):
    """A feature network for `--features`: means over a grid as pool (B, 48), edges as spatial, and ten logits."""
    mix = torch.randn(48, 10, generator=torch.Generator().manual_seed(0)).to(device)

    def extract(images):
        x = images.float() / 64
        pool = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
        spatial = (x[:, 0, 1:, ::8] - x[:, 0, :-1, ::8]).unflatten(1, (31, 1)).mean(dim=2).flatten(1)[:, :40]
        return {"pool": pool, "spatial": spatial, "logits": pool @ mix}

    return extract


def all_features(device):
    """`colour_features`, whose pool stands for the features of DINOv2 and CLIP, too."""
    colours = colour_features(device)

    def extract(images):
        found = colours(images)
        return found | {"dinov2": found["pool"] / 2, "clip": found["pool"]}

    return extract


def pool_features(device):
    """Only pool."""
    return lambda images: {"pool": images.float().mean(dim=(2, 3))}


def nan_features(device):
    """NaN for bright images."""

    def extract(images):
        pool = images.float().mean(dim=(2, 3))
        return {"pool": pool.where(pool < 140, float("nan"))}

    return extract
