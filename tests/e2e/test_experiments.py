"""The published training and generation configs, and the benchmark scripts."""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from adm import adm_frechet
from numerics import randomize
from runs import make_latents, refused
from torch.distributed.run import get_args_parser

import generate
import models
from benchmarks import sampling, train_step
from checkpoint import training_state, weights
from config.options import GenerateConfig, TrainConfig
from config.parsing import parse, require_options
from experiments_updated import digit_classifier, quickstart_guidance, quickstart_report
from experiments_updated.studies import backbones_report
from models.elit import budget_to_k, mask_levels, mask_to_budget
from models.vae import VAERecord
from sampling import cost as cost_module

ROOT = Path(__file__).resolve().parents[2] / "experiments_updated"
TRAIN = sorted(p for p in (ROOT / "train").glob("*.yaml") if not re.match("quickstart|.*(vit|hdit|mmdit)_", p.stem))
CHEAP = ROOT / "generation" / "cheap_cfg.yaml"  # laid over another
COCO = ROOT / "generation" / "coco_256.yaml"  # of both text models
GENERATION = [p for p in sorted((ROOT / "generation").glob("*.yaml")) if "quickstart" not in p.stem and p not in (CHEAP, COCO)]

NAMES = [
    "sit_b_256",
    "sit_xl_256",
    "elit_sit_b_256",
    "elit_sit_xl_256",
    "elit_sit_xl_256_multibudget",
    "elit_sit_xl_512",
    "elit_sit_xl_512_multibudget",
    "elit_sit_xl_256_large_scale",
    "elit_sit_xl_256_large_scale_multibudget",
]


def budgets_of(config: TrainConfig) -> list[float | None]:
    """The budgets that a training config draws from; [None] for a model without any."""
    if not config.model.startswith("ELIT"):
        return [None]
    J = config.elit_group_size**2
    return [mask_to_budget(m, J) for m in mask_levels(J, config.elit_min_mask_prob, config.elit_max_mask_prob)]


def test_all_published_configs_exist():
    assert {p.stem for p in TRAIN} >= set(NAMES)
    assert {p.stem for p in GENERATION} >= set(NAMES)


@pytest.mark.parametrize("path", TRAIN, ids=lambda p: p.stem)
def test_train_config(path):
    config, _ = parse(TrainConfig, ["--config", str(path)])
    require_options(config)
    assert path.read_text().startswith("# ")
    assert config.exp_name == path.stem
    family = models.model_spec(config.model).family
    side = config.resolution // 8
    assert config.data_dir == f"../data/imagenet{config.resolution}"
    assert (config.mixed_precision, config.allow_tf32) == ("bf16", True)
    assert (config.batch_size, config.max_train_steps, config.checkpointing_steps) == (256, 400_000, 50_000)
    assert config.weighting == ("lognormal" if family == "ELIT-SiT" else "uniform")
    budgets = budgets_of(config)
    assert config.warmup_steps == (10_000 if len(budgets) > 1 else 0)
    assert path.stem.endswith("multibudget") == (len(budgets) > 1)
    if family == "ELIT-SiT":
        assert config.elit_group_size == side // 8  # 16 groups at either resolution
        assert side // 2 % config.elit_group_size == 0


def test_text_configs():
    plain, elit = (
        vars(parse(TrainConfig, ["--config", str(ROOT / f"train/{n}mmdit_b_coco_256.yaml")])[0]) for n in ("", "elit_")
    )
    assert {name for name in plain if plain[name] != elit[name]} == {
        *("model", "exp_name", "config", "elit_min_mask_prob", "elit_max_mask_prob"),
    }
    assert (plain["model"], plain["enc_type"], plain["proj_coeff"]) == ("MMDiT-B/2", "dinov2-vit-b", 0.5)
    assert len(budgets_of(TrainConfig(**elit))) == 16
    generation = parse(GenerateConfig, ["--config", str(COCO)])[0]
    assert (generation.prompts, generation.cfg_scale) == ("../data/coco256_val", 2.0)


@pytest.mark.parametrize(
    ("stem", "lowest", "highest", "count"),
    [
        ("elit_sit_xl_256", 1.0, 1.0, 1),
        ("elit_sit_xl_256_multibudget", 1 / 16, 1.0, 16),
        ("elit_sit_xl_512_multibudget", 1 / 64, 1.0, 64),
        ("elit_sit_xl_256_large_scale", 1 / 4, 1 / 4, 1),
        ("elit_sit_xl_256_large_scale_multibudget", 1 / 16, 1 / 4, 4),
    ],
)
def test_trained_budgets(stem, lowest, highest, count):
    config, _ = parse(TrainConfig, ["--config", str(ROOT / "train" / f"{stem}.yaml")])
    budgets = budgets_of(config)
    assert (min(budgets), max(budgets), len(budgets)) == (lowest, highest, count)


@pytest.mark.parametrize("cheap", [False, True], ids=["plain", "cheap_cfg"])
@pytest.mark.parametrize("path", GENERATION, ids=lambda p: p.stem)
def test_generation_config(path, cheap):
    config, given = parse(GenerateConfig, ["--config", str(path), *([str(CHEAP)] if cheap else []), "--ckpt", "some.pt"])
    require_options(config, "model", "ckpt")
    assert path.read_text().startswith("# ")
    assert (config.mode, config.num_steps, config.num_fid_samples) == ("ode", 50, 50_000)
    trained, _ = parse(TrainConfig, ["--config", str(ROOT / "train" / f"{path.stem}.yaml")])
    for name in ("model", "resolution", "elit_group_size"):
        assert getattr(config, name) == getattr(trained, name)
    budgets = tuple(b and float(b) for b in (config.inference_budget, config.unconditional_inference_budget))
    highest = budgets_of(trained)[0]  # of the large-scale models a quarter
    full = None if highest == 1 else highest
    assert (config.cfg_scale, *budgets) == ((4.0, full, 0.0625) if cheap else (1.0, full, None))
    for budget in budgets:
        J = config.elit_group_size**2
        if budget is not None:
            assert budget_to_k(budget, J) == budget * J  # a multiple of 1/J: nothing is rounded
    assert {"ckpt", "config"} <= given.keys()


def test_generation_configs_are_few_and_those_of_the_wrappers():
    assert len(list((ROOT / "generation").glob("*.yaml"))) <= 15
    wrappers = sorted((ROOT / "evaluation").glob("eval_*.sh"))
    named = {name for path in wrappers for name in re.findall(r"\$D/../(\w+/[\w.]+\.yaml)", path.read_text())}
    assert len(wrappers) == 12 and all((ROOT / name).is_file() for name in named) and len(named) == 22, named


@pytest.mark.parametrize(
    ("stem", "teraflops"),
    [  # published FLOPs per iteration of 256 images; the multibudget ones under the tail policy "drop"
        ("sit_xl_256", 182),
        ("elit_sit_xl_256", 188),
        ("elit_sit_xl_256_multibudget", 125),
        ("elit_sit_xl_512", 831),
        ("elit_sit_xl_512_multibudget", 529),
    ],
)
def test_published_training_flops(stem, teraflops):
    config, _ = parse(TrainConfig, ["--config", str(ROOT / "train" / f"{stem}.yaml")])
    options = weights.model_options(vars(config))
    with torch.device("meta"):
        model = models.create_model(config.model, input_size=config.resolution // 8, **options)
    budgets = budgets_of(config)
    counted = budgets if len(budgets) < 3 else [budgets[0], budgets[len(budgets) // 2], budgets[-1]]
    flops = [models.count_flops(model, b) for b in counted]
    if (
        len(budgets) > 2
    ):  # attention over k latents per group is quadratic in k, all else linear: three points give every budget
        flops = np.polyval(np.polyfit(counted, flops, 2), budgets)
    forward = sum(flops) / len(budgets)
    assert 3 * forward * config.batch_size / 1e12 == pytest.approx(teraflops, rel=0.01)


def test_benchmark_prints_every_line(capsys):
    train_step.main(["--model-size", "Ti", "--tokens", "16", "--batch-size", "2", "--repeats", "1", "--warmup", "0"])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.endswith(("ok", "MISSED"))]
    assert len(lines) == 9
    assert "same velocity" in printed


def test_benchmark_of_other_backbones(capsys):
    options = ["--model-size", "Ti", "--tokens", "64", "--batch-size", "1", "--repeats", "1", "--warmup", "0"]
    train_step.main(["--families", "HDiT", "MMDiT", *options])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(("ok", "MISSED"))]
    assert [line.split(" at ")[0] for line in lines] == [
        f"ELIT-{family} {part}" for family in ("HDiT", "MMDiT") for part in ("step", "forward") for _ in range(2)
    ]
    predicted = [float(line.split()[-4]) for line in lines]
    assert all(1 < full < 1.3 and low < 1 for full, low in zip(predicted[::2], predicted[1::2], strict=True))


def test_the_study_of_backbones_pairs_each_model_with_its_elit(tmp_path, capsys):
    rng = np.random.default_rng(0)
    losses = {"U-ViT-Ti-2": rng.random((1, 9)), "ELIT-U-ViT-Ti-2": rng.random((2, 9))}
    for name, of_model in losses.items():
        budgets = [0.25, 1.0] if "ELIT" in name else [None]
        figures = {"parameters": 1_000_000, "gflops_per_forward": 0.5, "fid": 2.0, "digits_in_class": 0.1}
        rows = [
            {"model": name, "budget": b, "held_out_loss": x.mean(), **figures} for b, x in zip(budgets, of_model, strict=True)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        np.savez(tmp_path / f"{name}.npz", losses=of_model, samples=np.zeros((len(budgets), 3, 8, 8, 3), np.uint8))
    backbones_report.summarize(tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [(row[0], row[2]) for row in cells] == [("U-ViT-Ti-2", ""), ("ELIT-U-ViT-Ti-2", "1"), ("ELIT-U-ViT-Ti-2", "1/4")]
    plain, low = losses["U-ViT-Ti-2"][0], losses["ELIT-U-ViT-Ti-2"][0]
    assert cells[2][5] == f"{(low - plain).mean():+.4f} ± {np.std(low - plain, ddof=1) / 3:.4f}"
    assert (tmp_path / "samples.png").is_file() and len(json.loads((tmp_path / "results.json").read_text())) == 3


def test_sampling_benchmark_prints_every_line(capsys):
    sampling.main(["--model-size", "Ti", "--tokens", "16", "--batch-size", "2", "--repeats", "1", "--width", "64"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in printed if ", b = " in line] == 4 * ["CFG"] + 3 * ["cheap CFG"]
    assert sum(line.endswith(("ok", "MISSED")) for line in printed) == 4


def test_sampling_benchmark_refuses_a_grid_without_groups(capsys):
    assert "sampling.py: error: --tokens 36" in refused(sampling.main, capsys, ["--tokens", 36])


def test_peak_memory_counts_what_lives_at_once():
    def job():
        kept = torch.zeros(1_000_000)
        for _ in range(5):
            kept = kept + 1  # the old and the new one

    assert sampling.peak_memory(job, torch.device("cpu")) == pytest.approx(2 * 4_000_000, rel=0.01)
    x = torch.zeros(500_000)
    assert sampling.peak_memory(lambda: x.double(), torch.device("cpu")) == pytest.approx(4_000_000, rel=0.01)


def test_guidance_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost_module, "WARM_UP", 0)
    monkeypatch.setattr(cost_module, "MOST_ROUNDS", 2)
    monkeypatch.setattr(quickstart_guidance, "TIMED_IMAGES", 1)
    monkeypatch.setattr(digit_classifier, "load_or_train", lambda path: digit_classifier.DigitClassifier().eval())
    model = randomize(models.create_model("ELIT-SiT-Ti/2", input_size=16, num_classes=10)).eval()
    model.save_pretrained(tmp_path / "model")
    options = ["--ckpt", tmp_path / "model", "--vae", ROOT / "quickstart_vae", "--exp-name", "made", "--sample-dir", tmp_path,
               "--output-dir", tmp_path, "--num-fid-samples", 2, "--num-steps", 4, "--cfg-scale", 2]  # fmt: skip
    quickstart_guidance.main([str(o) for o in options])
    rows = {(r["guidance"], r["budget"]): r for r in json.loads((tmp_path / "guidance.json").read_text())}
    low, quarter, full = (models.count_flops(model, b) / 1e9 for b in (0.0625, 0.25, 1.0))
    for (guidance, budget), cost in {
        ("none", "1.0"): 4 * full,
        ("CFG", "0.0625"): 8 * low,
        ("CFG", "0.25"): 8 * quarter,
        ("CFG", "1.0"): 8 * full,
        ("CFG", "0.0625@1.0-0.5,1.0@0.5-0.0"): 4 * (low + full),
        ("CFG", "1.0@1.0-0.5,0.0625@0.5-0.0"): 4 * (low + full),
        ("CFG", "0.0625@1.0-0.75,0.25@0.75-0.25,1.0@0.25-0.0"): 2 * (low + 2 * quarter + full),
        ("cheap CFG", "0.25"): 4 * (low + quarter),
        ("cheap CFG", "1.0"): 4 * (low + full),
        ("cheap CFG", "0.0625@1.0-0.5,1.0@0.5-0.0"): 4 * low + 2 * (low + full),
        ("autoguidance", "0.25"): 4 * (low + quarter),
        ("autoguidance", "1.0"): 4 * (low + full),
    }.items():
        row = rows.pop((guidance, budget))
        assert row["gflops_per_image"] == pytest.approx(cost) and row["digits"] == 8 and row["images_per_second"] > 0
        assert 0 <= row["digits_in_class"] <= 1 and row["frechet_distance"] > 0
    assert not rows and (tmp_path / "guidance.md").read_text() in capsys.readouterr().out


SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$HERE/command"
if [ "$STATE" != crash ]; then
    sleep 0.05; kill -USR1 $PPID; sleep 0.05  # Slurm may tell the batch script too
    mkdir -p exps/long && echo '{"state": "'$STATE'", "step": 7}' > exps/long/status.json
fi
exit $CODE
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1" = show ] && echo node17 && echo node18 || echo "$@" >> "$HERE/told"
"""


@pytest.mark.parametrize(
    ("state", "code", "queued"), [("preempted", 1, True), ("finished", 0, False), ("failed", 2, False), ("crash", 1, False)]
)
def test_the_slurm_job_queues_itself_again_where_training_was_preempted(tmp_path, state, code, queued):
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "exps" / "long").mkdir(parents=True)
    status = tmp_path / "exps" / "long" / "status.json"
    status.write_text('{"state": "preempted", "step": 1}')  # of the job before
    os.utime(status, (1, 1))
    slurm = {"SLURM_JOB_NAME": "long", "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "node[17-18]", "SLURM_NNODES": "2"}
    done = subprocess.run(
        ["bash", ROOT / "slurm" / "train.sbatch", "--config", str(ROOT / "train" / "sit_xl_256.yaml"), "--batch-size", "512"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "HERE": str(tmp_path), "STATE": state, "CODE": str(code)} | slurm,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == (0 if queued else code), done.stderr
    assert (tmp_path / "told").exists() == queued
    if queued:
        assert (tmp_path / "told").read_text() == "requeue 5\n"
        assert json.loads(status.read_text())["step"] == 7
    command = (tmp_path / "command").read_text().splitlines()
    launcher = get_args_parser().parse_args(command[command.index("torchrun") + 1 :])
    assert (launcher.nnodes, launcher.nproc_per_node, launcher.rdzv_endpoint) == ("2", "8", "node17:29500")
    assert launcher.signals_to_handle == "SIGUSR1,SIGTERM" and launcher.training_script == "train.py"
    config, _ = parse(TrainConfig, launcher.training_script_args)
    assert (config.exp_name, config.batch_size, config.resume_step) == ("long", 512, -1)


def test_quickstart_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart_report, "TIMED_IMAGES", 1)
    monkeypatch.setattr(quickstart_report, "BOOTSTRAP", 5)
    classifier = digit_classifier.DigitClassifier().eval()
    torch.save(classifier.state_dict(), tmp_path / "classifier.pt")
    digits = torch.randint(256, (40, 3, 32, 32)).byte(), torch.arange(40) % 10
    monkeypatch.setattr(digit_classifier, "digit_images", lambda held_out: digits)
    vae = ROOT / "quickstart_vae"
    config = json.loads((vae / "config.json").read_text())
    record = VAERecord(str(vae), None, 4, 4, config["scaling_factor"], config["shift_factor"])
    data = make_latents(tmp_path / "val", 4, record, side=16)
    options = ["--vae", vae, "--sample-dir", tmp_path, "--num-fid-samples", 10, "--num-steps", 2, "--cfg-scale", 2]
    options += ["--class-labels", "balanced"]
    paths = {}
    for name, head in (("SiT-Ti/2", None), ("ELIT-SiT-Ti/2", 1)):
        config = TrainConfig(
            model=name, exp_name=name[:-2], resolution=64, num_classes=10, head_depth=head, tail_depth=head,
            elit_min_mask_prob=0.0, batch_size=2, weighting="lognormal",
        )  # fmt: skip
        split = {"head_depth": head, "tail_depth": head} if head else {}
        model = randomize(models.create_model(name, input_size=16, num_classes=10, **split)).float()
        paths[name] = tmp_path / name[:-2] / "checkpoints" / "0000007.pt"
        state = {
            "model": model.state_dict(),
            "ema": {"0.9": model.state_dict()},
            "optimizer": {},
            "scheduler": {},
            "scaler": None,
        }
        training_state.save(paths[name], state | {"step": 7, "config": vars(config), "vae": record.to_dict()})
        (paths[name].parents[1] / "metrics.jsonl").write_text('{"step": 7, "images_per_second": 2.0}\n')
    sit, elit = paths.values()
    measured = [[sit], *([elit, "--inference-budget", b] for b in (0.0625, 0.25, 1.0))]
    cheap = [elit, "--inference-budget", 1.0, "--unconditional-inference-budget", 0.0625]
    unguided = ["--cfg-scale", 1, "--num-fid-samples", 20]
    for more in (*measured, cheap, *([*m, *unguided] for m in measured)):
        generate.main([str(o) for o in (*options, "--ckpt", *more)])
    report = [*options, "--ckpt", elit, "--baseline-ckpt", sit, "--val-data-dir", data, "--output-dir", tmp_path]
    report += ["--unguided-samples", 20]
    quickstart_report.main([str(o) for o in report])
    found = json.loads((tmp_path / "results.json").read_text())
    rows = {row["name"]: row for row in found["budgets"]}
    assert list(rows) == ["SiT", "1/16", "1/4", "1", "1, cheap CFG at 1/16"]
    for row in rows.values():
        assert 0 <= row["digits_in_class"] <= 1 and row["fid"] > 0
    full, cheap = rows["1"], rows["1, cheap CFG at 1/16"]
    assert full["pixel_difference"] == full["fid_difference"] == full["held_out_loss_difference"] == 0
    assert rows["SiT"]["held_out_loss"] == pytest.approx(full["held_out_loss"] + rows["SiT"]["held_out_loss_difference"])
    assert cheap["gflops_per_step"] == pytest.approx(full["gflops_per_forward"] + rows["1/16"]["gflops_per_forward"])
    steps = {(s["from"], s["to"]): s for s in found["steps"]}
    drawn = torch.from_numpy(np.load(next(tmp_path.glob("**/*cfg-1.0-*budget-0.25-*.npz")))["arr_0"]).permute(0, 3, 1, 2)
    sets = [digit_classifier.features(classifier, d)[0].double().numpy() for d in (digit_classifier.quarters(drawn), digits[0])]
    expected = adm_frechet(*(moment for f in sets for moment in (f.mean(axis=0), np.cov(f, rowvar=False))))
    assert len(drawn) == 20 and rows["1/4"]["fid_unguided"] == pytest.approx(expected, rel=1e-3) and "fid_unguided" not in cheap
    assert steps["1/4", "1"]["fid_unguided"] == pytest.approx(rows["1/4"]["fid_unguided"] - full["fid_unguided"])
    plain, elastic = found["training"]
    assert plain["flops"] == pytest.approx(3 * 7 * 2 * 1e9 * rows["SiT"]["gflops_per_forward"]) and plain["seconds"] == 7
    assert rows["1/16"]["gflops_per_forward"] < elastic["flops"] / (3 * 7 * 2 * 1e9) < full["gflops_per_forward"]
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out and (tmp_path / "budgets.png").stat().st_size > 0
