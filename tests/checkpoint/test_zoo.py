"""Released weights by name: what they stand for, and what the scripts say of names that are none."""

import re
from functools import partial

import pytest
import runs

import convert_checkpoint
import generate
import models
from checkpoint import reading
from checkpoint.zoo import ZOO
from common.errors import UserError

FILES = {
    "sit_imagenet_256px_1k_0400000.pt": (18.97, 73.32),
    "elit_sit_imagenet_256px_1k_0400000.pt": (11.23, 109.66),
    "elit_sit_mb_imagenet_256px_1k_0400000.pt": (9.98, 120.34),
    "elit_sit_mb_imagenet_256px_1k_2000000.pt": (8.93, 144.57),
    "sit_imagenet_512px_1k_0400000.pt": (21.82, 67.58),
    "dfm_sit_imagenet_512px_1k_0400000.pt": (18.74, 80.16),
    "elit_sit_imagenet_512px_1k_0400000.pt": (10.28, 114.06),
    "elit_sit_mb_imagenet_512px_1k_0400000.pt": (9.65, 117.99),
    "elit_sit_mb_imagenet_512px_1k_1000000.pt": (8.77, 135.27),
}
refused = partial(runs.refused, generate.main)


def test_names_stand_for_the_files_on_the_hub(monkeypatch, tmp_path):
    asked, local = [], tmp_path / "downloaded.pt"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *file: asked.append("/".join(file)) or str(local))
    for name in ZOO:
        assert reading.local_file(name) == local
    assert asked == [f"mali6/elit/{file}" for file in FILES]
    with pytest.raises(UserError, match=r"downloaded\.pt: no such checkpoint"):  # it is what would be read
        reading.read_weights("sit-xl-256")
    (tmp_path / "sit-xl-256").write_bytes(b"mine")  # a file counts before a name
    assert reading.local_file("sit-xl-256").read_bytes() == b"mine" and len(asked) == len(FILES) + 1


def test_list_and_documentation_say_the_same(capsys):
    convert_checkpoint.main(["--list"])
    lines = capsys.readouterr().out.splitlines()[2:]
    documented = re.findall(r"^\| `(.*?-xl-.*?)` \|.*", (runs.ROOT / "docs" / "checkpoints.md").read_text(), re.MULTILINE)
    assert documented == list(ZOO) and len(lines) == len(ZOO)
    page = (runs.ROOT / "docs" / "checkpoints.md").read_text()
    for line, (name, released), (file, figures) in zip(lines, ZOO.items(), FILES.items(), strict=True):
        spec = models.model_spec(released.model)
        assert released.file == file and (released.fid, released.inception_score) == figures
        assert (
            f"{released.resolution}px" in file
            and f"_{released.steps:07d}.pt" in file
            and spec.elastic == file.startswith("elit")
        )
        row = " | ".join(
            [f"{released.steps // 1000}k", released.budgets, f"{released.fid:.2f}", f"{released.inception_score:.2f}"]
        )
        for part in (name, released.model, file, f"{released.fid:.2f}", f"{released.inception_score:.2f}"):
            assert part in line, (line, part)
        assert f"| `{name}` | {released.model} {released.resolution} | {row} | `python generate.py --ckpt {name} " in page


def test_wrong_names_and_no_network_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    wrong = "elit-sit-xl-256-multibudet"
    assert "did you mean elit-sit-xl-256-multibudget?" in refused(capsys, ["--ckpt", wrong], f"{wrong}: no such checkpoint")
    line = refused(capsys, ["--ckpt", "dfm-sit-xl-512"], "dfm-sit-xl-512: hf://mali6/elit/dfm_sit_imagenet_512px_1k_0400000.pt")
    assert "https://huggingface.co/mali6/elit/resolve/main/dfm_sit_imagenet_512px_1k_0400000.pt" in line
    with pytest.raises(UserError, match=r"no such checkpoint.*known: sit-xl-256, "):
        reading.local_file("qqq")
