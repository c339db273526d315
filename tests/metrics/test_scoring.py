"""Images that go from the sampler to the metrics in memory give the figures of generate.py and evaluate.py."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from runs import RESOLUTION, make_checkpoint, make_vae

import evaluate
import generate
from config.options import GenerateConfig
from config.tool_options import MetricOptions
from metrics.scoring import Scorer
from sampling import session
from sampling.images import images

pytestmark = pytest.mark.slow

COUNT = 11
OPTIONS = {"num_fid_samples": COUNT, "num_steps": 2, "cfg_scale": 2.0, "per_proc_batch_size": 4}


def test_figures_are_those_of_the_files(tmp_path):
    ckpt = make_checkpoint(tmp_path / "0000007.pt", make_vae(tmp_path / "vae"))
    ref = tmp_path / "ref.npz"
    np.savez(ref, arr_0=np.random.default_rng(0).integers(0, 256, (23, RESOLUTION, RESOLUTION, 3), dtype=np.uint8))
    argv = [str(part) for name, value in OPTIONS.items() for part in (f"--{name}", value)]
    generate.main(["--ckpt", str(ckpt), "--sample-dir", str(tmp_path), *argv])
    PartialState._reset_state()
    (samples,) = (tmp_path / "made").glob("*.npz")
    features = "runs:colour_features"
    evaluate.main([str(ref), str(samples), "--features", features, "--output", str(tmp_path / "m.json")])
    expected = json.loads((tmp_path / "m.json").read_text())
    PartialState._reset_state()

    config, _, weights = session.from_command_line(GenerateConfig, ["--ckpt", str(ckpt), *argv], "", lambda config: None)
    loaded, state = session.load(config, weights, torch.device("cpu")), PartialState(cpu=True)
    scorer = Scorer(MetricOptions(ref=str(ref), features=features, batch_size=3), COUNT, (RESOLUTION,) * 2, state, print)
    figures = scorer.score(images(loaded, config, range(COUNT)), COUNT)
    assert set(figures) == {"fid", "sfid", "is", "precision", "recall"}
    assert figures == pytest.approx({name: expected[name] for name in figures}, rel=1e-6)

    shares = [list(images(loaded, config, range(COUNT), process, 2)) for process in range(2)]
    assert [[list(indices) for indices, _ in share] for share in shares] == [[[0, 1, 2, 3], [8, 9, 10]], [[4, 5, 6, 7], []]]
    batches = [batch for turn in zip(*shares, strict=True) for batch in turn]
    assert scorer.score(batches, COUNT) == figures
    with pytest.raises(ValueError, match="fewer than 11"):
        scorer.score(batches[:-2], COUNT)
    with pytest.raises(ValueError, match="must follow"):
        scorer.score(reversed(batches), COUNT)
