"""generate.py: image i depends on (seed, i) alone, restarts go on, and what it refuses."""

import errno
import json
import shutil
import signal
import subprocess
import time
import zipfile
from functools import partial

import numpy as np
import pytest
import runs
import torch
from accelerate.state import PartialState
from PIL import Image
from runs import CLASSES, RESOLUTION, ROOT, command_line, environment, launch, make_checkpoint, make_vae

import generate
import randomness
from checkpoint import reading
from config.options import GenerateConfig
from flows import FLOWS, FlowMatching
from metrics.images import write_npz
from models.dfm import recompose
from models.vae import load_vae
from sampling.conditions import labels_of
from sampling.npz_writer import NpzWriter

pytestmark = pytest.mark.slow

COUNT = 11


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ckpt")
    return make_checkpoint(folder / "0000007.pt", make_vae(folder / "vae"))


def arguments(ckpt, sample_dir, *more):
    options = {
        "ckpt": ckpt,
        "sample-dir": sample_dir,
        "num-fid-samples": COUNT,
        "per-proc-batch-size": 3,
        "num-steps": 3,
        "inference-budget": 0.5,
        "cfg-scale": 2,
    }
    return [str(part) for name, value in options.items() for part in ("--" + name, value)] + [str(m) for m in more]


def folder_of(sample_dir):
    (folder,) = [p for p in (sample_dir / "made").iterdir() if p.is_dir()]
    return folder


def images_of(folder):
    return np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))])


def assert_same_images(a, b):
    """Equal but for ±1 in at most 0.1% of the values."""
    difference = np.abs(a.astype(int) - b.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3


@pytest.fixture(scope="module")
def whole(ckpt, tmp_path_factory):
    """All images from one undisturbed run of one process."""
    out = tmp_path_factory.mktemp("whole")
    generate.main(arguments(ckpt, out))
    PartialState._reset_state()
    return folder_of(out)


def test_the_set_is_complete_and_the_npz_holds_it(whole):
    assert whole.name == "ckpt-0000007-cfg-2.0-steps-3-seed-0-ode-budget-0.5"
    assert sorted(p.name for p in whole.iterdir()) == [f"{i:06d}.png" for i in range(COUNT)]
    with np.load(whole.with_name(whole.name + ".npz")) as npz:
        assert list(npz) == ["arr_0"] and npz["arr_0"].dtype == np.uint8
        assert npz["arr_0"].shape == (COUNT, RESOLUTION, RESOLUTION, 3)
        assert np.array_equal(npz["arr_0"], images_of(whole))
    assert len(np.unique(images_of(whole).reshape(COUNT, -1), axis=0)) == COUNT


def test_images_are_those_of_a_plain_euler_loop(ckpt, whole):
    """Written from the definitions: float64 Euler, CFG at the same budget, decode, round to nearest."""
    model, _ = reading.load_model(ckpt)
    vae, _ = load_vae(str(ckpt.parent / "vae"))
    noise = randomness.image_noise(0, [4], (4, 8, 8))
    y = randomness.image_labels(0, [4], CLASSES)
    x = noise.double()
    with torch.no_grad():
        for step in range(3):
            t = torch.full((1,), 1 - step / 3)
            cond = model(x.float(), t, y, inference_budget=0.5).double()
            null = model(x.float(), t, torch.full_like(y, CLASSES), inference_budget=0.5).double()
            x = x - (null + 2 * (cond - null)) / 3
        pixels = vae.decode((x / 0.5).float()).sample[0].permute(1, 2, 0).double().numpy()
    expected = np.clip(np.floor(127.5 * pixels + 128), 0, 255)
    assert_same_images(images_of(whole)[4], expected)


@pytest.mark.parametrize("how", ["batch", "processes"])
def test_images_do_not_depend_on_batch_or_processes(ckpt, whole, tmp_path, how):
    if how == "batch":
        generate.main(arguments(ckpt, tmp_path, "--per-proc-batch-size", 4))
    else:
        port = f"--master_port={runs.free_port()}"
        done = launch("torchrun", "--nproc_per_node=2", port, "generate.py", *arguments(ckpt, tmp_path))
        assert done.returncode == 0, done.stderr
    folder = folder_of(tmp_path)
    assert_same_images(images_of(folder), images_of(whole))
    with np.load(folder.with_name(folder.name + ".npz")) as npz:
        assert np.array_equal(npz["arr_0"], images_of(folder))


def test_a_restart_keeps_what_is_good_and_redoes_what_is_broken(ckpt, whole, tmp_path):
    shutil.copytree(whole.parent, tmp_path / "made")
    folder = folder_of(tmp_path)
    for i in range(7, COUNT):
        (folder / f"{i:06d}.png").unlink()
    (folder / "000002.png").write_bytes((folder / "000002.png").read_bytes()[:-40])  # cut short
    (folder / "000005.png").write_bytes(b"")
    (folder / "000001.png").unlink()
    (folder / "000009.png.tmp").write_bytes(b"half")
    kept = (folder / "000003.png").stat().st_mtime_ns
    generate.main(arguments(ckpt, tmp_path))
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:06d}.png" for i in range(COUNT)]
    assert (folder / "000003.png").stat().st_mtime_ns == kept
    assert_same_images(images_of(folder), images_of(whole))


def test_asked_for_fewer_than_exist_it_keeps_them_and_uses_the_first(ckpt, whole, tmp_path):
    shutil.copytree(whole.parent, tmp_path / "made")
    generate.main(arguments(ckpt, tmp_path, "--num-fid-samples", 4))
    folder = folder_of(tmp_path)
    assert len(list(folder.glob("*.png"))) == COUNT
    with np.load(folder.with_name(folder.name + ".npz")) as npz:
        assert np.array_equal(npz["arr_0"], images_of(folder)[:4])


def test_killed_and_restarted_gives_the_same_set(ckpt, whole, tmp_path):
    slow = arguments(ckpt, tmp_path, "--per-proc-batch-size", 1)
    process = subprocess.Popen(command_line("generate.py", *slow), cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("000002.png")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.rglob("*.npz"))
    generate.main(arguments(ckpt, tmp_path))
    assert_same_images(images_of(folder_of(tmp_path)), images_of(whole))


def test_the_npz_is_a_stored_zip_that_repeats_to_the_byte(ckpt, whole, tmp_path):
    images = images_of(whole)
    write_npz(tmp_path / "again.npz", images.shape, images)
    assert (tmp_path / "again.npz").read_bytes() == whole.with_name(whole.name + ".npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "again.npz") as archive:
        assert [m.compress_type for m in archive.infolist()] == [zipfile.ZIP_STORED]


def test_without_png_the_npz_is_all_and_what_a_killed_run_wrote_is_kept_where_it_is_whole(ckpt, whole, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NpzWriter, "finish", lambda self: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            generate.main(arguments(ckpt, tmp_path, "--no-png", "--num-fid-samples", 7))
    (unfinished,) = tmp_path.rglob("*.npz.tmp")
    content = bytearray(unfinished.read_bytes())
    content[6400] ^= 255  # of image 2
    unfinished.write_bytes(content)
    PartialState._reset_state()
    generate.main(arguments(ckpt, tmp_path, "--no-png"))
    assert "5 images drawn" in (said := capsys.readouterr().out) and "6 kept" in said
    generate.main(arguments(ckpt, tmp_path, "--no-png"))
    assert f"{COUNT} kept" in capsys.readouterr().out
    (made,) = [p for p in (tmp_path / "made").iterdir() if p.suffix != ".json"]
    with np.load(made) as npz:
        assert_same_images(npz["arr_0"], images_of(whole))
    assert made.name == whole.name + ".npz"


@pytest.mark.parametrize("more", [("--mode", "sde"), ("--heun",), ("--autoguidance", "--unconditional-inference-budget", 0.25),
                                  ("--inference-budget", 1.0, "--unconditional-inference-budget", 0.25)])  # fmt: skip
def test_every_sampler_gives_other_images_in_another_folder(ckpt, whole, tmp_path, more):
    generate.main(arguments(ckpt, tmp_path, *more, "--num-fid-samples", 2))
    folder = folder_of(tmp_path)
    assert folder.name != whole.name
    assert np.abs(images_of(folder).astype(int) - images_of(whole)[:2]).max() > 1


def test_sde_noise_belongs_to_the_image(ckpt, tmp_path):
    generate.main(arguments(ckpt, tmp_path / "a", "--mode", "sde", "--num-fid-samples", 4))
    generate.main(arguments(ckpt, tmp_path / "b", "--mode", "sde", "--num-fid-samples", 4, "--per-proc-batch-size", 2))
    assert_same_images(images_of(folder_of(tmp_path / "a")), images_of(folder_of(tmp_path / "b")))


def test_class_labels_balanced_or_listed():
    assert labels_of(GenerateConfig(class_labels=["balanced"], num_classes=3), range(2, 7)).tolist() == [2, 0, 1, 2, 0]
    assert labels_of(GenerateConfig(class_labels=["4", "1"], num_classes=5), [0, 1, 2, 5]).tolist() == [4, 1, 4, 1]
    drawn = labels_of(GenerateConfig(class_labels=["random"], num_classes=5), range(500))
    assert set(drawn.tolist()) == set(range(5))


def test_options_come_from_the_checkpoint_unless_it_records_none(ckpt, tmp_path):
    train_yaml = tmp_path / "train.yaml"
    train_yaml.write_text(
        "exp_name: named\nmodel: ELIT-SiT-Ti/2\nresolution: 32\nnum_classes: 5\nelit_group_size: 2\nbatch_size: 4\n"
    )
    sample_yaml = tmp_path / "sample.yaml"
    sample_yaml.write_text("num_fid_samples: 2\nnum_steps: 2\ncfg_scale: 1.0\n")
    generate.main(["--train-config", str(train_yaml), "--eval-config", str(sample_yaml), "--ckpt", str(ckpt), "--sample-dir", str(tmp_path),
                   "--num_steps", "1"])  # fmt: skip
    assert (tmp_path / "named" / "ckpt-0000007-cfg-1.0-steps-1-seed-0-ode.npz").is_file()


refused = partial(runs.refused, generate.main)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--inference-budget", 0.1), ["--inference-budget", "0.1", "0.25"]),
        (("--inference-budget", 1.5), ["--inference-budget", "1.5"]),
        (("--unconditional-inference-budget", 0.01), ["--unconditional-inference-budget", "0.25"]),
        (("--cfg-scale", 0.5), ["--cfg-scale", "0.5", "1"]),
        (("--autoguidance",), ["unconditional_inference_budget"]),
        (("--guidance-low", 0.8, "--guidance-high", 0.2), ["guidance_low", "0.8"]),
        (("--num-steps", 0), ["--num-steps", "0"]),
        (("--num-fid-samples", 0), ["--num-fid-samples", "0"]),
        (("--class-labels", 3, 5), ["--class-labels 5", "5"]),
        (("--heun", "--mode", "sde"), ["--heun"]),
        (("--mode", "dopri"), ["--mode", "dopri", "ode", "sde"]),
        (("--model", "SiT-Ti/2"), ["--model SiT-Ti/2", "ELIT-SiT-Ti/2"]),
        (("--resolution", 64), ["--resolution 64", "32"]),
        (("--elit-group-size", 4), ["--elit-group-size 4", "2"]),
        (("--ckpt", "nowhere.pt"), ["nowhere.pt"]),
        (("--weights", "ema:0.5"), ["--weights ema:0.5", "ema:0.9999"]),
        (("--vae", "nowhere/at-all"), ["--vae nowhere/at-all"]),
        (("--inference_budgt", 1), ["--inference-budget"]),
        (("--preview",), ["--preview", "ELIT-SiT-Ti/2", "DFM"]),
        (("--cuda-graphs",), ["--cuda-graphs", "CUDA"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(ckpt, tmp_path, capsys, more, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refused(capsys, arguments(ckpt, tmp_path / "out", *more))
    for word in words:
        assert word in line, line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--guidance-low", 0.8, "--guidance-high", 0.2), "guidance_low"),
        (("--autoguidance",), "unconditional_inference_budget"),
        (("--heun", "--mode", "sde"), "--heun"),
        (("--inference-budget", "half"), "--inference-budget: inference budget 'half'"),
        (("--inference-budget", "0.5@1.0-0.5"), "--inference-budget: budget schedule"),
        (("--class-labels", "cat"), "--class-labels cat"),
    ],
)
def test_options_are_refused_before_a_checkpoint_is_fetched(tmp_path, capsys, monkeypatch, more, words):
    monkeypatch.setattr(reading, "read_weights", lambda *a, **k: pytest.fail("read before the options were checked"))
    line = refused(capsys, ["--ckpt", "hf://nobody/nothing/model.pt", "--sample-dir", str(tmp_path / "out"), *map(str, more)])
    assert words in line


def test_latents_that_are_not_finite_are_an_error_that_names_the_image(ckpt, tmp_path, capsys, monkeypatch):
    def sample(self, model, shape, seed, indices, *more):
        return torch.tensor([float("nan") if i == 4 else 0.0 for i in indices])[:, None, None, None].expand(-1, *shape)

    monkeypatch.setattr(FlowMatching, "sample", sample)
    line = refused(capsys, arguments(ckpt, tmp_path))
    assert "image 4" in line and "not finite" in line and "cfg_scale 2" in line
    assert not list(tmp_path.rglob("*.npz")) and not list(tmp_path.rglob("000004.png")) and not list(tmp_path.rglob("*.lock"))


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["PIL.Image.Image.save", "os.pwrite"])
def test_a_full_disk_is_one_line(ckpt, tmp_path, capsys, monkeypatch, where):
    with monkeypatch.context() as patch:
        patch.setattr(where, no_space)
        line = refused(capsys, arguments(ckpt, tmp_path, "--num-fid-samples", 4))
    assert "No space left on device" in line and (".png" if "PIL" in where else ".npz") in line
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.lock"))
    generate.main(arguments(ckpt, tmp_path, "--num-fid-samples", 4))  # and goes on once there is space
    assert len(images_of(folder_of(tmp_path))) == 4


def test_another_flow_needs_no_change_here(ckpt, tmp_path, monkeypatch):
    """A flow that samples black latents, with an option and a coarser stage of its own."""

    class Black(FlowMatching):
        def sample_state(self, model, shape, seed, indices, y, guidance, on_stage=None):
            if on_stage is not None:
                on_stage(0, torch.zeros(len(indices), *shape[:1], *(n // 2 for n in shape[1:])))
            return torch.zeros(len(indices), *shape, dtype=torch.float64)

        def preview_sides(self, resolution):
            return {0: resolution // 2}

        @property
        def total_steps(self):
            return 77

    monkeypatch.setitem(FLOWS, "flow matching", Black)
    generate.main(arguments(ckpt, tmp_path, "--preview"))
    images, coarse = sorted(p for p in (tmp_path / "made").iterdir() if p.is_dir())
    assert "-steps-77-" in images.name and coarse.name == images.name + "-stage0"
    assert (images_of(images) == images_of(images)[:1]).all() and images_of(coarse).shape[1] == RESOLUTION // 2


def test_a_sit_checkpoint_has_no_budget(ckpt, tmp_path, capsys):
    made = make_checkpoint(tmp_path / "sit.pt", reading.read_weights(ckpt).record, model="SiT-Ti/2")
    assert "no budget" in refused(capsys, arguments(made, tmp_path / "out"))


@pytest.fixture(scope="module")
def dfm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dfm")
    schedule = {"num_steps_per_scale": [3, 2], "stage_sampling_thresholds": [0.2]}
    return make_checkpoint(folder / "dfm.pt", make_vae(folder / "vae"), model="DFM-ELIT-SiT-Ti/2", **schedule)


@pytest.fixture(scope="module")
def five(dfm, tmp_path_factory):
    """Five images with their previews."""
    out = tmp_path_factory.mktemp("five")
    generate.main(arguments(dfm, out, "--preview", "--num-fid-samples", 5))
    PartialState._reset_state()
    return out / "made"


def test_dfm_images_and_previews_are_those_of_the_sampler(dfm, five):
    """By the schedule that the checkpoint records; image 4, drawn alone, and its first stage as that stood at 0.2."""
    main, preview = sorted(p for p in five.iterdir() if p.is_dir())
    assert main.name == "ckpt-dfm-cfg-2.0-steps-5-seed-0-ode-budget-0.5-scales-3_2-thresholds-0.2"
    assert preview.name == main.name + "-stage0"
    model, _ = reading.load_model(dfm)
    vae, _ = load_vae(str(dfm.parent / "vae"))
    y = randomness.image_labels(0, [4], CLASSES)
    x = randomness.pyramid_noise(0, [4], [(4, 4, 4), (4, 8, 8)])
    x = [stage.double() for stage in x]

    def velocities(stages, times, active):
        t = torch.tensor([times])
        runs = [
            model([s.float() for s in stages], t, labels, 0.5, active_stage=active)
            for labels in (y, torch.full_like(y, CLASSES))
        ]
        return [(null + 2 * (cond - null)).double() for cond, null in zip(*runs, strict=True)]

    def pixels(latents):
        found = vae.decode((latents / 0.5).float()).sample[0].permute(1, 2, 0).double().numpy()
        return np.clip(np.floor(127.5 * found + 128), 0, 255)

    with torch.no_grad():
        for k in range(3):
            (v,) = velocities([x[0], torch.zeros_like(x[1])], [1 - 0.8 * k / 3, 1.0], 0)
            x[0] = x[0] - 0.8 / 3 * v
        clean = x[0] - 0.2 * v
        for k in range(2):
            v0, v1 = velocities(x, [0.2 - 0.1 * k, 1 - 0.5 * k], 1)
            x = [x[0] - 0.1 * v0, x[1] - 0.5 * v1]
        assert_same_images(images_of(main)[4], pixels(recompose(x)))
        assert_same_images(images_of(preview)[4], pixels(clean))


def test_dfm_is_repeatable_and_a_lost_preview_is_made_again(dfm, five, tmp_path):
    shutil.copytree(five, tmp_path / "made")
    main, preview = sorted(p for p in (tmp_path / "made").iterdir() if p.is_dir())
    first, early = images_of(main), images_of(preview)
    (preview / "000003.png").unlink()
    (main / "000001.png").unlink()
    generate.main(arguments(dfm, tmp_path, "--preview", "--num-fid-samples", 5, "--per-proc-batch-size", 2))
    assert_same_images(images_of(main), first)
    assert_same_images(images_of(preview), early)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--heun",), ["--heun", "DFM-ELIT-SiT-Ti/2"]),
        (("--mode", "sde"), ["--mode sde", "DFM-ELIT-SiT-Ti/2"]),
        (("--stage-sampling-thresholds", 1.5), ["stage_sampling_thresholds 1.5", "(0, 1)"]),
        (("--stage-sampling-thresholds", 0.5, 0.2), ["2 stages need 1"]),
        (("--num-steps-per-scale", 5), ["num_steps_per_scale 5", "2 whole numbers"]),
        (("--num-steps-per-scale", 5, 0), ["--num-steps-per-scale", "0"]),
        (("--stages-count", 3), ["--stages-count 3", "2"]),
        (("--no-png", "--preview"), ["--no-png", "--preview"]),
    ],
)
def test_what_dfm_cannot_do_is_refused(dfm, tmp_path, capsys, more, words):
    line = refused(capsys, arguments(dfm, tmp_path / "out", *more))
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_dfm_says_that_it_has_steps_per_stage(dfm, tmp_path, capsys):
    generate.main(arguments(dfm, tmp_path, "--num-fid-samples", 1))
    assert "--num-steps has no effect" in capsys.readouterr().err


def test_a_folder_of_other_images_is_not_mixed(ckpt, tmp_path, capsys):
    generate.main(arguments(ckpt, tmp_path, "--num-fid-samples", 2))
    capsys.readouterr()
    other = make_checkpoint(tmp_path / "other" / ckpt.name, reading.read_weights(ckpt).record, elit_tail="skip")
    assert "ckpt_sha256" in refused(capsys, arguments(other, tmp_path))


def test_an_npz_alone_of_another_checkpoint_is_not_mixed(ckpt, tmp_path, capsys):
    """Whose record a run that writes PNG would replace, and then be killed."""
    one = ("--num-fid-samples", 1, "--num-steps", 1)
    generate.main(arguments(ckpt, tmp_path, *one, "--no-png"))
    PartialState._reset_state()
    capsys.readouterr()
    other = make_checkpoint(tmp_path / "other" / ckpt.name, reading.read_weights(ckpt).record, elit_tail="skip")
    assert "ckpt_sha256" in refused(capsys, arguments(other, tmp_path, *one))
    assert "1 kept" in (generate.main(arguments(ckpt, tmp_path, *one, "--no-png")), capsys.readouterr().out)[1]


def bare(ckpt, path):
    """The state dict alone: it records neither depths nor the tail."""
    torch.save(reading.read_weights(ckpt).state_dict, path)
    return path


def test_what_a_bare_checkpoint_is_completed_with_is_recorded(ckpt, tmp_path, capsys):
    options = ("--vae", ckpt.parent / "vae", "--model", "ELIT-SiT-Ti/2", "--num-fid-samples", 2, "--tail-depth", 1)
    options = (*options, "--exp-name", "made", "--resolution", RESOLUTION)
    given = arguments(bare(ckpt, tmp_path / "bare.pt"), tmp_path / "out", *options)
    generate.main([*given, "--head-depth", "1", "--elit-tail", "drop"])
    capsys.readouterr()
    assert "head_depth 1, not 3" in refused(capsys, [*given, "--head-depth", "3", "--elit-tail", "drop"])
    assert "elit_tail drop, not skip" in refused(capsys, [*given, "--head-depth", "1", "--elit-tail", "skip"])


def test_a_vae_of_other_weights_under_the_same_name_is_noticed(ckpt, tmp_path, capsys):
    vae = shutil.copytree(ckpt.parent / "vae", tmp_path / "vae")
    options = arguments(ckpt, tmp_path / "out", "--vae", vae, "--num-fid-samples", 2)
    generate.main(options)
    capsys.readouterr()
    (weights,) = vae.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "vae_sha256" in refused(capsys, options)


def test_a_record_of_an_older_version_is_continued(ckpt, tmp_path):
    generate.main(arguments(ckpt, tmp_path, "--num-fid-samples", 2))
    (path,) = (tmp_path / "made").glob("*.json")
    old = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("vae_sha256", "head_depth", "model", "tf32")}
    path.write_text(json.dumps(old))
    generate.main(arguments(ckpt, tmp_path, "--num-fid-samples", 3))
    assert len(images_of(folder_of(tmp_path))) == 3 and json.loads(path.read_text())["head_depth"] == 1


def test_a_sample_dir_that_cannot_be_written_is_named(ckpt, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "--sample-dir" in refused(capsys, arguments(ckpt, tmp_path / "file"))
