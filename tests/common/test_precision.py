"""TF32 on or off is that of matrix products and of convolutions alike, whoever sets it; PyTorch's default is off and on."""

import pytest
import torch

from common import precision
from config.options import GenerateConfig, TrainConfig
from sampling import session
from training import setup

CPU = torch.device("cpu")
SETTERS = {
    "itself": precision.set_tf32,
    "sampling": lambda on: session.set_precision(GenerateConfig(model="SiT-Ti/2", ckpt="", tf32=on), CPU),
    "training": lambda on: setup.create_accelerator(
        TrainConfig(model="SiT-Ti/2", exp_name="run", allow_tf32=on, mixed_precision="no", report_to="none")
    ),
}


def state():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def put_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("setter", SETTERS)
@pytest.mark.parametrize("enabled", [False, True])
def test_products_and_convolutions_alike(setter, enabled):
    torch.set_float32_matmul_precision("highest" if enabled else "medium")
    torch.backends.cudnn.allow_tf32 = not enabled
    SETTERS[setter](enabled)
    assert state() == (enabled, enabled)


def test_for_a_while():
    precision.set_tf32(True)
    with precision.tf32(False):
        assert state() == (False, False)
    assert state() == (True, True)
