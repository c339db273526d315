"""Images that are not square, from `convert` to `evaluate`: sizes, transforms, models, records and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import refused
from sets import picture, save

import dataset_tools
import evaluate
import generate
import models
import train
from common.errors import UserError
from common.sizes import check_divisible, resolution_of, sides
from config.options import TrainConfig
from config.values import coerce
from models.layers import sincos_position_embedding
from preprocessing.transforms import resize_crop

HEIGHT, WIDTH = 24, 16
SIZE = f"{WIDTH}x{HEIGHT}"
MODELS = [
    "SiT-Ti/2",
    "ELIT-SiT-Ti/2",
    "DFM-ELIT-SiT-Ti/2",
    "ELIT-U-ViT-Ti/2",
    "ELIT-HDiT-Ti/2",
    "ELIT-SiT-HDiT-Ti/2",
    "ELIT-MMDiT-Ti/2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory, vae_folder) -> Path:
    """A data set of 6 images of 16 × 24 px (width × height)."""
    root = tmp_path_factory.mktemp("set")
    for i in range(6):
        save(root / f"source/{i % 2}/{i}.png", picture(40 + 8 * (i % 3), 50, seed=i))
    options = [f"--resolution={SIZE}", "--transform=resize-crop", "--workers=1"]
    dataset_tools.main(["convert", f"--source={root}/source", f"--dest={root}/images", *options])
    dataset_tools.main(["encode", f"--source={root}/images", f"--dest={root}/vae-sd", f"--vae={vae_folder}", "--batch-size=4"])
    return root


def arguments(data: Path, out: Path, model: str, **options) -> list[str]:
    values = {"model": model, "resolution": SIZE, "num_classes": 2, "batch_size": 2, "max_train_steps": 1, "num_workers": 0}
    values |= {"data_dir": data, "output_dir": out, "exp_name": "run", "report_to": "none", "mixed_precision": "no"}
    values |= {"sampling_steps": 0, "checkpointing_steps": 2, "elit_group_size": 2, "elit_min_mask_prob": 0}
    return [f"--{k}={v}" for k, v in (values | options).items()]


def test_sizes():
    for value, size in {256: 256, "256": 256, "256x256": 256, "256X384": "256x384"}.items():
        assert coerce(TrainConfig, "resolution", value, "x") == size
    assert sides("256x384") == (384, 256) and sides(256) == (256, 256) and resolution_of((384, 256)) == "256x384"
    for wrong in ("256x", "x256", "0x16", "256x256x256", [1, 2, 3], [1.5, 2], "70000x16"):
        with pytest.raises(UserError, match=r"^x: "):
            coerce(TrainConfig, "resolution", wrong, "x")


def test_the_nearest_valid_sizes():
    check_divisible("48x32", 16, "why")
    with pytest.raises(UserError, match=r"^--resolution 250x384: why; the nearest valid: 240x384, 256x384$"):
        check_divisible("250x384", 16, "why")
    with pytest.raises(UserError, match=r"^--resolution 30: why; the nearest valid: 16, 32$"):
        check_divisible(30, 16, "why")


def dhariwal(pixels: np.ndarray, side: int) -> np.ndarray:
    """ADM's crop, as its image_datasets.py has it."""
    image = Image.fromarray(pixels)
    while min(*image.size) >= 2 * side:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    scale = side / min(*image.size)
    image = image.resize((round(image.size[0] * scale), round(image.size[1] * scale)), Image.Resampling.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    return array[top : top + side, left : left + side]


def test_resize_crop():
    for height, width in [(40, 57), (33, 16), (100, 31), (16, 16)]:
        image = picture(height, width, seed=height)
        np.testing.assert_array_equal(resize_crop(image, 16, 16), dhariwal(image, 16))
    # Twice as large and of its shape: the box filter alone. Wider: left and right are cut, by as much.
    image = picture(2 * HEIGHT, 2 * WIDTH, seed=1)
    halved = np.asarray(Image.fromarray(image).resize((WIDTH, HEIGHT), Image.Resampling.BOX))
    np.testing.assert_array_equal(resize_crop(image, WIDTH, HEIGHT), halved)
    wide = np.concatenate([np.zeros((HEIGHT, 4, 3), np.uint8), halved, np.full((HEIGHT, 4, 3), 255, np.uint8)], axis=1)
    np.testing.assert_array_equal(resize_crop(wide, WIDTH, HEIGHT), halved)


def test_positions_and_costs_of_a_grid():
    model = models.create_model("SiT-Ti/2", input_size=(12, 8))
    assert model.grid_size == (6, 4)
    table = sincos_position_embedding(model.hidden_size, (6, 6))[: 6 * 6].unflatten(0, (6, 6))[:, :4].flatten(0, 1)
    torch.testing.assert_close(model.pos_embed[0], table)  # a token's position does not depend on the grid around it
    for name in MODELS[:2]:
        flops = [models.count_flops(_on_meta(name, size)) for size in ((8, 32), (16, 16))]
        assert flops[0] == flops[1]  # as many tokens
    for name in MODELS[2:]:
        assert _on_meta(name, (16, 24)).grid_size == (8, 12)


def _on_meta(name: str, size: tuple[int, int]) -> models.Backbone:
    with torch.device("meta"):
        return models.create_model(name, input_size=size)


@pytest.mark.parametrize("name", MODELS[1:3])
def test_from_training_to_figures(name, data, tmp_path):
    train.main(arguments(data, tmp_path, name))
    path = tmp_path / "run/checkpoints/0000001.pt"
    assert torch.load(path, weights_only=True)["config"]["resolution"] == SIZE
    steps = ["--num-steps-per-scale", "1", "1"] if name.startswith("DFM") else ["--num-steps=1"]
    drawn = [*steps, "--num-fid-samples=2", "--per-proc-batch-size=2", f"--sample-dir={tmp_path}/out", "--cfg-scale=1"]
    generate.main([f"--ckpt={path}", *drawn])
    (samples,) = (tmp_path / "out").rglob("*.npz")
    found = np.load(samples)["arr_0"]
    assert found.shape == (2, HEIGHT, WIDTH, 3) and found.std() > 0
    with Image.open(next(samples.with_suffix("").glob("*.png"))) as image:
        assert image.size == (WIDTH, HEIGHT)
    samples.unlink()
    generate.main([f"--ckpt={path}", *drawn])  # the PNG files are taken as they are
    np.testing.assert_array_equal(np.load(samples)["arr_0"], found)
    evaluate.main(
        [f"{data}/images", str(samples), "--features=runs:pool_features", "--metrics=fid", f"--output={tmp_path}/m.json"]
    )
    assert json.loads((tmp_path / "m.json").read_text())["num_samples"] == 2


def test_a_plan_counts_them(data, tmp_path, capsys):
    train.main([*arguments(data, tmp_path, "ELIT-SiT-Ti/2"), "--plan"])
    assert "latents 3 × 12 × 8" in capsys.readouterr().out


def test_resume_pictures_and_check(data, tmp_path, monkeypatch):
    monkeypatch.setattr("training.validation.SAMPLE_STEPS", 1)
    monkeypatch.setattr("training.validation.SAMPLE_IMAGES", 8)
    dataset_tools.main(["check", str(data)])
    train.main(arguments(data, tmp_path, "ELIT-SiT-Ti/2", sampling_steps=2, val_data_dir=data))
    train.main(arguments(data, tmp_path, "ELIT-SiT-Ti/2", resume_step=-1, max_train_steps=2))
    with Image.open(tmp_path / "run/samples/0000001.png") as image:
        assert image.size[1] == HEIGHT


def test_mistakes(data, tmp_path, capsys):
    refused(train.main, capsys, arguments(data, tmp_path, "SiT-Ti/2", resolution="18x24"), "--resolution 18x24", "16x24, 20x24")
    refused(train.main, capsys, arguments(data, tmp_path, "SiT-Ti/2", resolution="24x16"), "12 × 8", "needs 8 × 12")
    refused(train.main, capsys, arguments(data, tmp_path, "SiT-Ti/2", resolution="16"), "12 × 8", "needs 8 × 8")
    argv = arguments(data, tmp_path, "ELIT-SiT-Ti/2", elit_group_size=4)
    refused(train.main, capsys, argv, "elit_group_size 4", "6×4", "a common divisor of 6 and 4: 1, 2")
    argv = arguments(data, tmp_path, "SiT-Ti/2", enc_type="dinov2-vit-b", proj_coeff=0.5)
    refused(train.main, capsys, argv, "--enc-type dinov2-vit-b", "square", SIZE)
    argv = ["convert", f"--source={data}/source", f"--dest={tmp_path}/d", f"--resolution={SIZE}"]
    refused(dataset_tools.main, capsys, argv, f"--resolution {SIZE}", "resize-crop")
    refused(dataset_tools.main, capsys, [*argv[:-1], "--transform=resize-crop"], "--transform resize-crop", "--resolution")
    assert not (tmp_path / "run").exists()
