"""sweep.py: figures of cells, what is done again, several jobs, tables, bounds, eval.sh, and what it refuses."""

import csv
import json
import os
import shutil
import subprocess
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import runs
from accelerate.state import PartialState
from runs import RESOLUTION, ROOT, make_checkpoint, make_vae

import evaluate
import generate
import sweep
from metrics import evaluation
from sweeping import results, running

pytestmark = pytest.mark.slow

COUNT = 11
FEATURES = ("--features", "runs:colour_features")
refused = partial(runs.refused, sweep.main)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with two EMAs and a reference."""
    folder = tmp_path_factory.mktemp("sweep")
    make_checkpoint(folder / "0000007.pt", make_vae(folder / "vae"))
    make_checkpoint(folder / "sit.pt", make_vae(folder / "vae2"), model="SiT-Ti/2")
    make_reference(folder / "ref.npz", RESOLUTION)
    return folder


def make_reference(path, side):
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (23, side, side, 3), dtype=np.uint8))


def arguments(folder, dest, *more, ckpt="0000007.pt", ref="ref.npz"):
    options = ["--num-fid-samples", COUNT, "--num-steps", 2, "--per-proc-batch-size", 4, *FEATURES]
    return [str(a) for a in ("--ckpt", folder / ckpt, "--ref", folder / ref, "--dest", dest, *options, *more)]


def swept(*argv):
    sweep.main(arguments(*argv))
    runs.reset_accelerate()


AXES = ("--cfg-scale", 1, 3, "--guidance-interval", "0-1", "0.6-1", "--inference-budget", 0.25, 1, "--seeds", 0, 1)
# Two budgets and seeds; without guidance, and with it in two intervals.
CELLS = 2 * 2 * (1 + 2)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The folder of an undisturbed sweep."""
    dest = tmp_path_factory.mktemp("whole")
    swept(folder, dest, *AXES, "--keep-images", 2)
    return dest


def cells_of(dest):
    return {path.stem: json.loads(path.read_text()) for path in (dest / "cells").glob("*.json")}


def figures_of(dest):
    return {key: cell["figures"] for key, cell in cells_of(dest).items()}


def find(cells, **options):
    (key,) = [k for k, cell in cells.items() if all(cell["options"][name] == value for name, value in options.items())]
    return key, cells[key]


GUIDED = {"cfg_scale": 3.0, "guidance_low": 0.6, "inference_budget": "0.25", "global_seed": 1}


def test_a_cell_is_generate_and_evaluate(folder, whole, tmp_path):
    generate.main(
        [*map(str, ("--ckpt", folder / "0000007.pt", "--sample-dir", tmp_path, "--num-fid-samples", COUNT, "--num-steps", 2)),
         *["--cfg-scale", "3", "--guidance-low", "0.6", "--inference-budget", "0.25", "--global-seed", "1", "--class-labels", "balanced"]]
    )  # fmt: skip
    PartialState._reset_state()
    (samples,) = (tmp_path / "made").glob("*.npz")
    evaluate.main([str(folder / "ref.npz"), str(samples), *FEATURES, "--output", str(tmp_path / "m.json")])
    expected = json.loads((tmp_path / "m.json").read_text())
    key, cell = find(cells_of(whole), **GUIDED)
    assert len(cells_of(whole)) == CELLS and set(cell["figures"]) == {"fid", "sfid", "is", "precision", "recall"}
    assert cell["figures"] == pytest.approx({name: expected[name] for name in cell["figures"]}, rel=1e-6)
    kept = sorted(p.name for p in (whole / "images" / key).iterdir())
    assert kept == ["000000.png", "000001.png"]
    assert (whole / "images" / key / kept[1]).read_bytes() == (samples.with_suffix("") / kept[1]).read_bytes()


def test_two_processes_give_the_same_and_two_jobs_share_the_work(folder, whole, tmp_path):
    """One job of two processes and one of one, in one folder, with another batch size."""
    port = f"--master_port={runs.free_port()}"
    argv = arguments(folder, tmp_path, *AXES)
    environment = runs.environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])}
    launched = runs.command_line("torchrun", "--nproc_per_node=2", port, str(ROOT / "sweep.py"), *argv)
    job = subprocess.Popen(launched, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    swept(folder, tmp_path, *AXES, "--per-proc-batch-size", 3, "--seeds", 0)
    out, err = job.communicate()
    assert job.returncode == 0, err
    for key, figures in figures_of(whole).items():
        # Another batch size may round a pixel to its neighbour, which shows in the FID of so few images.
        tolerance = 1e-6 if cells_of(tmp_path)[key]["batch_size"] == 4 else 1e-5
        assert figures_of(tmp_path)[key] == pytest.approx(figures, rel=tolerance)
    processes = [cell["processes"] for cell in cells_of(tmp_path).values()]
    assert len(processes) == CELLS and 2 in processes and f"{CELLS} in {tmp_path}" in out
    assert not list((tmp_path / "cells").glob("*.lock"))


def test_only_what_is_missing_or_damaged_is_done(folder, whole, tmp_path, capsys, monkeypatch):
    dest = shutil.copytree(whole, tmp_path / "copy")
    before = figures_of(dest)
    missing, *damaged = sorted((dest / "cells").glob("*.json"))[:4]
    missing.unlink()
    damaged[0].write_bytes(damaged[0].read_bytes()[:-30])
    damaged[1].write_text(damaged[2].read_text())  # another cell's
    damaged[2].write_text(json.dumps(json.loads(damaged[2].read_text()) | {"figures": {"fid": None}}))
    leftover = dest / "cells" / f"{missing.name}.123.tmp"
    leftover.write_text("{")
    gathered, gather = [], evaluation.gather
    monkeypatch.setattr("metrics.scoring.gather", lambda *a: gathered.append(a[-1]) or gather(*a))
    swept(folder, dest, *AXES, "--keep-images", 2)
    assert figures_of(dest) == before and not leftover.exists()
    told = capsys.readouterr()
    assert "4 cells done now, 12 in" in told.out
    assert all(told.err.count(f"{path}: damaged") == 1 for path in damaged)
    # The reference's features were kept beside it; other weights under the same name are noticed.
    assert len(gathered) == 4 and "reference" not in gathered
    mix = runs.colour_features

    def other(device):
        return lambda images: {name: 1.1 * values for name, values in mix(device)(images).items()}

    monkeypatch.setattr(runs, "colour_features", other)
    (dest / "cells" / missing.name).unlink()
    swept(folder, dest, *AXES, "--keep-images", 2)
    assert "feature networks have changed" in capsys.readouterr().err
    assert gathered.count("reference") == 1 and figures_of(dest)[missing.stem] != before[missing.stem]
    for file in folder.glob("ref.npz.features-*"):
        file.unlink()


def test_tables_means_and_bounds(folder, whole, capsys):
    swept(folder, whole, *AXES, "--best-under", "1GFLOPs")
    out = capsys.readouterr().out.splitlines()
    rows = list(csv.DictReader((whole / "sweep.csv").open()))
    cells = cells_of(whole)
    assert len(rows) == CELLS and {row["cell"] for row in rows} == cells.keys()
    for row in rows:
        assert float(row["fid"]) == cells[row["cell"]]["figures"]["fid"]
    text = (whole / "sweep.md").read_text()
    pair = [float(row["fid"]) for row in rows if (row["cfg_scale"], row["inference_budget"]) == ("1", "0.25")]
    assert len(pair) == 2
    mean, deviation = np.mean(pair), np.std(pair, ddof=1)
    assert text.count(f"| {mean:.4g} ± {deviation:.2g} |") == 2  # in both tables
    assert (whole / "fid_vs_gflops.png").exists() and (whole / "fid_vs_cfg.png").exists()
    assert not (whole / "fid_vs_steps.png").exists()  # one number of steps
    within = {}
    for row in rows:
        if float(row["gflops_per_image"]) <= 1:
            within.setdefault((row["cfg_scale"], row["guidance_low"], row["inference_budget"]), []).append(float(row["fid"]))
    scale, low, budget = min(within, key=lambda point: np.mean(within[point]))
    words = out[-1].split()
    assert words[:2] == ["python", "generate.py"] and words[words.index("--cfg-scale") + 1] == scale
    assert ("--guidance-low" in words) == (low != "0") and ("--inference-budget" in words) == (budget != "none")
    assert words[words.index("--class-labels") + 1] == "balanced"
    # GFLOPs are the transformer's: two evaluations, each with one pass or two.
    flops = {cell["options"]["cfg_scale"]: cell["gflops_per_image"] for cell in cells.values()
             if cell["options"]["guidance_low"] == 0 and cell["options"]["inference_budget"] is None}  # fmt: skip
    assert flops[3.0] == pytest.approx(2 * flops[1.0])


def test_points_are_ordered_by_numbers_and_names_of_references_are_none():
    points = [{"ref": ref, "num_steps": steps} for ref in ("2026.11.30", "ref.npz") for steps in (9, 50)]
    assert sorted(reversed(points), key=results._order) == points


def test_the_best_are_of_all_records_of_a_reference_whatever_its_path_was():
    cells = [SimpleNamespace(key=f"k{n}", ref="ref.npz") for n in range(4)]
    shared = {"name": "x", "ckpt": "x", "gflops_per_image": 1.0, "ms_per_image": 1.0, "num_samples": 4}
    records = [
        shared | {"key": f"k{n}", "ref": f"{'./' * (n % 2)}ref.npz", "figures": {"fid": float(n)}, "options": {"global_seed": 0, "cfg_scale": n}}
        for n in range(4)
    ]  # fmt: skip
    assert sweep.best_numbers(SimpleNamespace(best_under=None, ref=["ref.npz"]), cells, records) == [0, 1, 2]


def test_coarse_then_the_best_three_in_full(folder, tmp_path, capsys):
    axes = ("--cfg-scale", 1, 2, 3, 4, 5, "--metrics", "fid", "--coarse", 6)
    swept(folder, tmp_path, *axes, "--plan")
    assert "5 cells of 6 images, 0 done" in capsys.readouterr().out and not (tmp_path / "cells").exists()
    swept(folder, tmp_path, *axes)
    cells = [
        (cell["num_samples"], cell["figures"]["fid"], cell["options"]["cfg_scale"]) for cell in cells_of(tmp_path).values()
    ]
    best = {scale for _, _, scale in sorted(cell for cell in cells if cell[0] == 6)[:3]}
    assert len(cells) == 8 and {scale for count, _, scale in cells if count == COUNT} == best
    swept(folder, tmp_path, *axes, "--plan")
    assert "5 cells of 6 images, 5 done" in capsys.readouterr().out


def test_axes_from_yaml_and_other_weights(folder, tmp_path):
    (tmp_path / "axes.yaml").write_text("cfg_scale: [1, 2]\nweights: [ema, model]\nheun: true\nnum_fid_samples: 5\nseeds: 3\n")
    swept(folder, tmp_path, "--config", tmp_path / "axes.yaml", "--num-fid-samples", 4, "--metrics", "is")
    options = [cell["options"] for cell in cells_of(tmp_path).values()]
    assert sorted((o["cfg_scale"], o["weights"]) for o in options) == [(1, "ema"), (1, "model"), (2, "ema"), (2, "model")]
    assert {(o["heun"], o["global_seed"], o["num_samples"]) for o in options} == {(True, 3, 4)}


def test_core_cache_and_guides_are_axes(folder, tmp_path):
    axes = ("--core-cache", 0, 0.9, "--cache-rule", "time", "head", "--guide-ckpt", "none", folder / "sit.pt", "--num-steps", 5)
    swept(folder, tmp_path, "--cfg-scale", 1, 2, *axes, "--num-fid-samples", 4, "--metrics", "is")
    cells = [cell["options"] | cell for cell in cells_of(tmp_path).values()]
    assert len(cells) == 3 * (1 + 2)  # of the caches; without guidance, and guided by the model itself or by another
    assert sum("guide_sha256" in cell for cell in cells) == 3
    for guided in (1, 2):
        same = [c for c in cells if c["cfg_scale"] == guided and "guide_sha256" not in c]
        plain, *cached = [c["gflops_per_image"] for c in sorted(same, key=lambda c: c["core_cache"])]
        assert len(cached) == 2 and max(cached) < plain  # what ran
    with (tmp_path / "sweep.csv").open() as file:
        assert {row["guide_ckpt"] for row in csv.DictReader(file)} == {"none", str(folder / "sit.pt")}


@pytest.mark.parametrize(
    ("more", "culprits"),
    [
        (["--cfg-scale", "1", "0.5"], ["--cfg-scale: 0.5", "≥ 1"]),
        (["--cfg-scale", "1", "x"], ["--cfg-scale: 'x'", "number"]),
        (["--num-steps", "4", "2.5"], ["--num-steps", "2.5", "whole number"]),
        (["--mode", "ode", "euler"], ["--mode", "euler", "ode, sde"]),
        (["--inference-budget", "0.25", "0.01"], ["--inference-budget", "0.01", "valid values"]),
        (["--unconditional-inference-budget", "none", "2"], ["--unconditional-inference-budget", "≤ 1"]),
        (["--guidance-interval", "0-1", "0.7"], ["--guidance-interval 0.7", "LOW-HIGH"]),
        (["--guidance-interval", "0.7-0.1"], ["--guidance-interval 0.7-0.1"]),
        (["--guidance-interval", "0-1", "--guidance-low", "0.1"], ["--guidance-interval", "--guidance-low"]),
        (["--weights", "ema", "ema:0.5"], ["--weights ema:0.5", "ema:0.9999"]),
        (["--class-labels", "9"], ["--class-labels 9", "below 5"]),
        (["--coarse", "11"], ["--coarse 11", "--num-fid-samples"]),
        (["--best-under", "40"], ["--best-under 40", "500GFLOPs"]),
        (["--best-under", "0.0001GFLOPs"], ["--best-under 0.0001GFLOPs", "cheapest", "cfg_scale"]),
        (["--ref", "a", "b"], ["--ref", "2 references for 1"]),
        (["--ref", "SMALL"], ["small.npz", "16x16", "32x32"]),
        (["--ckpt", "SIT", "--inference-budget", "0.25"], ["--inference-budget 0.25", "SiT-Ti/2 has no budget"]),
        (["--metrics", "fidd"], ["--metrics fidd", "did you mean fid?"]),
    ],
)
def test_refusals(folder, tmp_path, capsys, more, culprits):
    if "SMALL" in more:
        make_reference(folder / "small.npz", 16)
    named = {"SMALL": folder / "small.npz", "SIT": folder / "sit.pt"}
    refused(capsys, [*arguments(folder, tmp_path), *(named.get(a, a) for a in more)], *culprits)
    assert not list(tmp_path.iterdir())


def test_checkpoints_of_two_sizes_need_references_of_their_own(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "RESOLUTION", 64)
    monkeypatch.setattr(runs, "SIDE", 16)
    make_checkpoint(folder / "large.pt", make_vae(folder / "vae3"))
    argv = arguments(folder, tmp_path, "--ckpt", folder / "0000007.pt", folder / "large.pt")
    refused(capsys, argv, "large.pt: has 64 pixels", "0000007.pt 32", "--ref of its own")


def test_a_latency_that_no_cell_meets_names_the_fastest(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(running.Stopwatch, "ms_per_image", 7.0)
    argv = arguments(folder, tmp_path, "--num-fid-samples", 4, "--metrics", "is", "--best-under", "5ms")
    with pytest.raises(SystemExit):
        sweep.main(argv)
    assert "--best-under 5ms: no cell is within it; the cheapest takes 7 ms" in capsys.readouterr().err
    assert len(cells_of(tmp_path)) == 1 and (tmp_path / "sweep.csv").exists()


def test_the_evaluation_script_does_another_scale_anew(folder, tmp_path):
    """What is done decides: not a name in which an option may be missing."""
    train, generation = tmp_path / "train.yaml", tmp_path / "small.yaml"
    train.write_text("exp_name: made\nmodel: ELIT-SiT-Ti/2\nresolution: 32\nnum_classes: 5\nelit_group_size: 2\n")
    generation.write_text("num_fid_samples: 6\nnum_steps: 2\ncfg_scale: 1.0\n")
    script = ROOT / "experiments_updated" / "evaluation" / "eval.sh"
    torchrun = tmp_path / "bin" / "torchrun"  # tells its arguments
    torchrun.parent.mkdir()
    torchrun.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    torchrun.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{torchrun.parent}:{os.environ['PATH']}",
        "EVALUATE": "--features runs:colour_features --metrics fid is",
        "RESULTS": str(tmp_path / "results"),
        "NPROC": "3",
    }
    text = ROOT / "experiments_updated/generation/coco_256.yaml"
    argv = ["bash", script, train, text, folder / "0000007.pt", folder / "ref.npz"]
    told = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "--class-labels" not in told and "--features" in told  # it has prompts
    for scale, clean in ((2, ""), (6, "--clean")):
        told = subprocess.run(
            ["bash", script, *([clean] if clean else []), train, generation, folder / "0000007.pt", folder / "ref.npz", "0.5"],
            env=environment | {"GENERATE": f"--cfg-scale {scale}"}, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        assert told[:3] == ["--standalone", "--nproc_per_node=3", str(ROOT / "sweep.py")]
        sweep.main(told[3:])
        runs.reset_accelerate()
    rows = list(csv.DictReader((tmp_path / "results" / "sweep.csv").open()))
    assert sorted((row["cfg_scale"], row["inference_budget"], row["num_samples"]) for row in rows) == [
        ("2", "0.5", "6"),
        ("6", "0.5", "6"),
    ]
    assert len(list((tmp_path / "results" / "images").rglob("*.png"))) == 6
    assert rows[0]["fid"] != rows[1]["fid"] and rows[0]["class_labels"] == "random"
