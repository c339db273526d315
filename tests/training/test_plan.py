"""plan.py: what `train.py --plan` says is what a run then does, needs and costs, and what it refuses."""

import re
from types import SimpleNamespace

import pytest
import runs
import torch
from encoder_runs import TINY, make_images, repa
from runs import CLASSES, RESOLUTION, make_checkpoint, make_latents, make_vae
from torch.autograd.graph import saved_tensors_hooks
from training_runs import arguments

import models
import train
from config.options import TrainConfig
from config.parsing import parse
from flows import flow_of
from loss import Projecting, alignment_loss
from models.costs import forward_flops, mean_forward_flops
from models.encoders import load_encoders
from models.vae import SD_VAE, VAERecord
from training import optim, plan
from training.budgets import trained_budgets
from training.cards import CARDS
from training.memory import activation_bytes, state_bytes
from training.plan import Plan
from training.setup import build_model

COUNT = 24
RECORD = VAERecord("v", None, 4, 4, 0.5, 0.0)


def config_of(*options):
    return parse(TrainConfig, [str(o) for o in ("--exp-name", "a", *options)])[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    path = make_latents(folder / "set", COUNT, make_vae(folder / "vae"))
    make_images(path, COUNT)
    return path


# --------------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize(
    ("options", "published"),
    [
        (("--model", "SiT-XL/2"), 182),
        (("--model", "ELIT-SiT-XL/2", "--elit-tail", "skip"), 188),
        (("--model", "ELIT-SiT-XL/2", "--elit-tail", "skip", "--elit-min-mask-prob", 0), 127),
        (("--model", "ELIT-SiT-XL/2", "--elit-min-mask-prob", 0), 125),
        (("--model", "SiT-XL/2", "--resolution", 512), 806),
        (("--model", "ELIT-SiT-XL/2", "--resolution", 512, "--elit-group-size", 8, "--elit-tail", "skip"), 831),
        (("--model", "ELIT-SiT-XL/2", "--resolution", 512, "--elit-group-size", 8, "--elit-tail", "skip", "--elit-min-mask-prob", 0), 536),
        (("--model", "ELIT-SiT-XL/2", "--resolution", 512, "--elit-group-size", 8, "--elit-min-mask-prob", 0), 529),
        (("--model", "ELIT-SiT-XL/2", "--resolution", 512, "--elit-group-size", 8, "--elit-tail", "skip", "--elit-min-mask-prob", 0,
          "--elit-max-mask-prob", 0.9375), 549),
    ],
)  # fmt: skip
def test_the_published_training_costs_come_out(options, published, tmp_path):
    account = Plan(config_of(*options, "--data-dir", tmp_path))
    account.describe_model()
    assert account.lines[1].startswith("compute")
    tflops = float(re.search(r"([\d.]+) TFLOPs per iteration", account.lines[1])[1])
    assert tflops == pytest.approx(published, rel=0.005)


def test_mean_flops_of_all_budgets_is_that_of_counting_each():
    config = config_of("--model", "ELIT-SiT-Ti/2", "--elit-min-mask-prob", 0, "--resolution", 96, "--elit-group-size", 3)
    with torch.device("meta"):
        model = build_model(config, SD_VAE, [])
    budgets = trained_budgets(config)
    assert len(budgets) == 9
    expected = [models.count_flops(model, b) for b in budgets]
    assert forward_flops(model, budgets) == expected
    assert mean_forward_flops(model, budgets) == pytest.approx(sum(expected) / 9, rel=1e-9)


def tensor_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_state_is_counted_exactly():
    config = config_of("--model", "ELIT-SiT-Ti/2", "--resolution", 32, "--num-classes", 5, "--elit-group-size", 2)
    model = build_model(config, RECORD, [7])
    found = state_bytes(model, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert found.optimizer == tensor_bytes(v for s in optimizer.state.values() for v in s.values())
    assert found.gradients == tensor_bytes(p.grad for p in model.parameters())
    averages = optim.EMA(model, [0.9, 0.99]).state_dict().values()
    assert found.ema == sum(tensor_bytes(average.values()) for average in averages)
    assert found.weights == tensor_bytes(model.state_dict().values())


def kept_by_autograd(config, encoders, batch_size, budget):
    """A real forward: the bytes of all storages that are saved for the backward pass and are no parameters."""
    model = build_model(config, RECORD, [e.z_dim for e in encoders])
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address comes twice
        return tensor

    x, y = torch.randn(batch_size, 4, 8, 8), torch.arange(batch_size) % 5
    flow = flow_of(config)
    draws = flow.draws(0, 0, range(batch_size), (4, 8, 8))
    around = Projecting(model) if encoders else model
    half = config.mixed_precision == "bf16"
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = flow.loss_under(flow.conditions([budget])[-1], around, x, draws, y).losses.mean()
        if encoders:
            images = torch.zeros(batch_size, 3, RESOLUTION, RESOLUTION, dtype=torch.uint8)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                features = [e(images) for e in encoders]
            loss = loss + alignment_loss(around.projections, features)
    return sum(s.nbytes() for p, s in saved.items() if p not in own)


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        (("--model", "SiT-Ti/2"), None),
        (("--model", "ELIT-SiT-Ti/2"), 1.0),
        (("--model", "ELIT-SiT-Ti/2"), 0.25),
        (("--model", "ELIT-SiT-Ti/2", "--elit-tail", "skip"), 0.25),
        (("--model", "ELIT-SiT-Ti/2", "--mixed-precision", "bf16"), 0.5),
        (("--model", "SiT-Ti/2", "--no-fused-attn", "--qk-norm"), None),
        (("--model", "DFM-ELIT-SiT-Ti/2"), 0.5),
        (("--model", "ELIT-SiT-Ti/2", "--enc-type", TINY, "--proj-coeff", 0.5), 0.5),
    ],
)
def test_activations_are_those_that_autograd_keeps(options, budget, tiny_weights):
    config = config_of(
        "--resolution", RESOLUTION, "--num-classes", CLASSES, "--elit-group-size", 2, "--mixed-precision", "no", *options
    )
    encoders = load_encoders([TINY], RESOLUTION, (4, 4), [str(tiny_weights)]) if "--enc-type" in options else []
    found = activation_bytes(config, RECORD, encoders, 6, budget)
    real = kept_by_autograd(config, encoders, 6, budget)
    assert found == pytest.approx(real, rel=0.03)


def test_a_smaller_budget_keeps_less():
    config = config_of(
        "--model", "ELIT-SiT-Ti/2", "--head-depth", 1, "--tail-depth", 1, "--resolution", 64, "--mixed-precision", "no"
    )
    full, quarter = (activation_bytes(config, RECORD, [], 8, b) for b in (1.0, 0.25))
    assert quarter < 0.6 * full


# ----------------------------------------------------------------------------------------------------------- the account


def account_of(capsys, *argv):
    capsys.readouterr()
    train.main([str(a) for a in argv])
    return capsys.readouterr().out


def test_the_plan_of_a_run_is_what_the_run_does(data, tmp_path, capsys):
    options = ("--batch-size", 4, "--gradient-accumulation-steps", 2, "--epochs", 2, "--max-train-steps", 100)
    out = account_of(capsys, *arguments(data, tmp_path, *options, "--plan", "--sampling-steps", 5, "--plan-tflops", 1))
    assert not list(tmp_path.iterdir())  # nothing is written
    assert "batch       8 = 1 processes × 4 × 2" in out
    assert "steps       6 at 3 per epoch: 2 epochs" in out
    assert f"data        {data}: 24 samples, 5 classes; latents 4 × 8 × 8" in out
    assert re.search(r"time .* at 1 TFLOP/s per process", out)
    assert "pictures    every 5 steps" in out
    assert "trained at budgets 1 … 0.25" in out
    train.main(arguments(data, tmp_path, *options))
    assert re.search(r"[\d,]+ parameters", out)[0] in (tmp_path / "run" / "log.txt").read_text()
    saved = sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))
    assert [p.stem for p in saved] == ["0000002", "0000004", "0000006"]
    kept, size = re.search(r"outputs .*: (\d+) checkpoints of ([\d.]+) MiB", out).groups()
    assert int(kept) == 3 and saved[0].stat().st_size / 2**20 == pytest.approx(float(size), rel=0.01)
    resumed = account_of(capsys, *arguments(data, tmp_path, *options, "--plan", "--resume-step", -1))
    assert "resumes from step 6" in resumed
    assert "--resume-step -1" in runs.refused(train.main, capsys, arguments(data, tmp_path, *options, "--plan"))


def test_time_memory_and_batch_of_several_processes(data, tmp_path, capsys):
    options = ("--plan", "--batch-size", 8, "--plan-tflops", 2)
    one, two = (account_of(capsys, *arguments(data, tmp_path, *options, "--plan-processes", n)) for n in (1, 2))
    assert "batch       8 = 1 processes × 8 × 1" in one and "batch       8 = 2 processes × 4 × 1" in two
    rates = [float(re.search(r"([\d,]+) images/s", text)[1].replace(",", "")) for text in (one, two)]
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.01)
    averages = [float(re.search(r"EMA +([\d.]+) MiB", text)[1]) for text in (one, two)]
    assert averages[1] == pytest.approx(averages[0] / 2, rel=0.01)  # each process keeps its part


def test_shards_are_in_the_memory_of_a_process(data, tmp_path, capsys):
    options = ("--plan", "--plan-processes", 4, "--mixed-precision", "bf16")
    whole, split = (account_of(capsys, *arguments(data, tmp_path, *options, *more)) for more in ((), ("--shard", "full")))
    for name, share in (("weights", 4), ("gradients", 4), ("AdamW", 4), ("EMA", 1)):  # whose parts are split anyway
        found = [float(re.search(rf"{name} +([\d.]+) MiB", text)[1]) for text in (whole, split)]
        assert found[1] == pytest.approx(found[0] / share, rel=0.02), name
    assert "gathered" in split and "gathered" not in whole
    kept = [float(re.search(r"activations +([\d.]+) MiB", text)[1]) for text in (whole, split)]
    with torch.device("meta"):
        model = models.create_model("ELIT-SiT-Ti/2", input_size=8, num_classes=CLASSES, elit_group_size=2)
    blocks = sum(p.numel() for p in model.blocks.parameters())
    assert (kept[0] - kept[1]) * 2**20 == pytest.approx(2 * blocks, rel=0.01)  # no copies in bf16 of what is gathered so


def test_a_card_by_name_tells_a_step_and_what_is_sent(data, tmp_path, capsys, monkeypatch):
    options = ("--plan", "--plan-processes", 4, "--plan-per-node", 2, "--mixed-precision", "bf16")
    out = account_of(capsys, *arguments(data, tmp_path, *options, "--plan-card", "NVIDIA H100 PCIe"))
    found = re.search(
        r"estimate    ([\d.e-]+) s per step on 4 × NVIDIA H100 PCIe, the mean of budgets 1, 0.5, 0.25: ([\d,]+) images/s", out
    )
    assert 8 / float(found[1]) == pytest.approx(float(found[2].replace(",", "")), rel=0.01)
    parameters = int(re.search(r"([\d,]+) parameters", out)[1].replace(",", ""))
    sent = float(re.search(r"([\d.e-]+) GB sent by each", out)[1])
    assert sent == pytest.approx(2 * 3 / 4 * 4 * parameters / 1e9, rel=0.01)
    assert "(compiled)" in out and "assumes 453.6 TFLOP/s, 1.56 TB/s" in out and "between nodes" in out
    options += ("--elit-max-mask-prob", 0)  # one budget
    eager = account_of(capsys, *arguments(data, tmp_path, *options, "--plan-card", "H100", "--no-compile", "--shard", 2))
    split = 1e9 * float(re.search(r"([\d.e-]+) GB sent by each", eager)[1])
    assert "(eager)" in eager and 4 * parameters < split < 8 * parameters  # gradients, and weights of 2 or 4 bytes twice
    wide = ("--plan", "--plan-card", "H100", "--mixed-precision", "no")
    assert "estimate    none: the peak of H100" in account_of(capsys, *arguments(data, tmp_path, *wide))
    line = runs.refused(train.main, capsys, arguments(data, tmp_path, *options, "--plan-card", "Z9"))
    assert "--plan-card Z9" in line and "H100" in line
    monkeypatch.setattr(plan, "find_card", lambda name: CARDS["L4"]._replace(memory=0))
    line = runs.refused(train.main, capsys, arguments(data, tmp_path, *options, "--plan-card", "L4"))
    assert "--batch-size 8" in line and "but L4 has 0 MiB" in line
    assert not list(tmp_path.iterdir())


def test_a_launcher_s_processes_print_one_plan(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, count in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        out = account_of(capsys, *arguments(data, tmp_path, "--plan"))
        assert out.count("batch       8 = 2 processes × 4 × 1") == count and bool(out) == bool(count)
    assert not list(tmp_path.iterdir())


def test_what_would_fail_later_is_told_in_one_line(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").write_text("")
    cases = [
        (("--vae", "nowhere/at-all", "--sampling-steps", 5), ["--vae", "nowhere/at-all"]),
        (("--output-dir", tmp_path / "file" / "out"), ["--output-dir", "file"]),
        (("--data-dir", tmp_path / "gone"), ["gone"]),
        (("--val-data-dir", tmp_path / "gone"), ["gone"]),
        (("--batch-size", 32), ["--batch-size 32", "24"]),
        (("--batch-size", 8, "--plan-processes", 3), ["--batch-size 8", "3 processes"]),
        (("--init-from", "gone.pt"), ["gone.pt"]),
        (repa("gone.pt"), ["--encoder-weights gone.pt"]),
        (("--enc-type", "dinov2-vit-z", "--proj-coeff", 1), ["dinov2-vit-z"]),
        (("--vae", "nowhere/at-all", "--sampling-steps", 5, "--init-from", "gone.pt"), ["nowhere/at-all", "; also: gone.pt"]),
    ]
    for more, words in cases:
        line = runs.refused(train.main, capsys, arguments(data, tmp_path / "out", "--plan", *more, model="SiT-Ti/4"))
        for word in words:
            assert word in line, line
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**20}))
    line = runs.refused(train.main, capsys, arguments(data, tmp_path / "out", "--plan"))
    assert "2 checkpoints of" in line and "1 MiB are free" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_missing_vae_of_the_data_is_said_and_a_broken_sample_found(data, tmp_path, capsys):
    gone = make_latents(tmp_path / "set", COUNT, VAERecord(str(tmp_path / "moved"), None, 4, 4, 0.5, 0.0))
    out = account_of(capsys, *arguments(gone, tmp_path / "out", "--plan", "--sampling-steps", 5))
    assert "pictures    none: --vae" in out and "moved" in out
    (gone / "vae-sd" / "00000" / "img-mean-std-00000011.npy").write_bytes(b"short")
    assert "00000011.npy" in runs.refused(train.main, capsys, arguments(gone, tmp_path / "out", "--plan"))


def test_repa_and_init_from_are_in_the_plan(data, tmp_path, capsys, tiny_weights):
    sit = make_checkpoint(tmp_path / "sit.pt", RECORD, model="SiT-Ti/2")
    out = account_of(capsys, *arguments(data, tmp_path / "out", "--plan", *repa(tiny_weights), "--init-from", sit))
    assert f"REPA        {TINY} at 64 px; weight 0.5" in out and "in the encoders" in out
    assert f"started from {sit}" in out and "projectors.* (6), interface.query" in out
    plain = account_of(capsys, *arguments(data, tmp_path / "out", "--plan"))
    assert "encoders" not in plain
    total, targets = map(float, re.findall(r"compute +(\S+) TFLOPs.*, (\S+) of them", out)[0])
    assert total > 0.99 * (targets + float(re.findall(r"compute +(\S+) TFLOPs", plain)[0]))
    steps, rate = int(re.findall(r"steps +(\d+) at", out)[0]), total / 10
    until = (*repa(tiny_weights), "--proj-until", 1, "--plan-tflops", rate, "--cache-size", 1)
    out = account_of(capsys, *arguments(data, tmp_path / "out", "--plan", *until))
    seconds = float(re.findall(r"time +(\S+) seconds", out)[0])
    assert seconds == pytest.approx((total * steps - targets * (steps - 1)) / rate, rel=0.02)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_checkpointed_activations_are_the_blocks_inputs_and_little_more(precision):
    options = {"model": "SiT-S/2", "resolution": 256, "mixed_precision": precision}
    kept = activation_bytes(TrainConfig(**options), SD_VAE, [], 4, None)
    found = activation_bytes(TrainConfig(**options, gradient_checkpointing=True), SD_VAE, [], 4, None)
    inputs = 12 * 4 * 256 * 384 * 4  # twelve blocks, 4 × 256 tokens of width 384, float32
    assert inputs < found < inputs + kept / 12 * 1.3 < kept / 2


def test_checkpoints_kept_at_one_time(tmp_path):
    def kept(**options):
        config = TrainConfig(model="SiT-S/2", checkpointing_steps=10, **options)
        return Plan.checkpoints_kept(SimpleNamespace(config=config), 95)

    assert kept() == 10
    assert kept(keep_last=2) == 3  # 90 and 95, and 80 until 95 is written
    assert kept(keep_last=2, keep_every=40) == 5  # 40 and 80 too
    assert kept(keep_last=20) == 10


def test_averages_and_snapshots_are_in_the_plan(data, tmp_path, capsys):
    options = ("--posthoc-ema", 0.05, 0.1, "--posthoc-ema-steps", 3, "--snapshot-steps", 2)
    plain, more = (
        Plan(config_of("--model", "SiT-Ti/4", "--data-dir", data, "--resolution", RESOLUTION, "--num-classes", CLASSES,
                       "--max-train-steps", 4, "--batch-size", 8, "--output-dir", tmp_path, *o))
        for o in ((), options)
    )  # fmt: skip
    for account in (plain, more):
        account.describe_memory()
        account.describe_outputs()
    model = plain.model
    one = sum(p.numel() * 4 for p in model.parameters()) + sum(b.numel() * 4 for b in model.buffers())
    assert more.checkpoint_bytes - plain.checkpoint_bytes == 2 * one
    # Steps 2 and 4; of each average steps 3 and 4.
    half = one - sum(p.numel() * 2 for p in model.parameters())
    assert more.snapshots_written(4) == (2 + 4, 2 * one + 4 * half) and plain.snapshots_written(4) == (0, 0)
    assert ", 6 snapshots = " in more.lines[-1] and " snapshots = " not in plain.lines[-1]
