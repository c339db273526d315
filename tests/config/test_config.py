"""Options: spellings, types, ranges, YAML files, precedence, and the published command lines."""

import dataclasses
import os
import subprocess
import sys

import pytest
from numerics import ROOT

from common.errors import UserError
from config.options import ARCHITECTURE_KEYS, CCFGConfig, ConvertCheckpointConfig, GenerateConfig, TrainConfig
from config.parsing import parse, require_options
from config.tool_options import CheckConfig, EvaluateConfig
from config.values import coerce


def train(*argv):
    return parse(TrainConfig, list(argv))[0]


def generate(*argv):
    return parse(GenerateConfig, list(argv))[0]


@pytest.fixture
def write(tmp_path):
    """write(name, text) → path of a YAML file."""

    def write(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


# ----------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "argv", [["--elit-group-size", "8"], ["--elit_group_size", "8"], ["--elit_group-size=8"], ["--elit-group-size=8"]]
)
def test_hyphens_and_underscores_are_equal(argv):
    config, given = parse(TrainConfig, argv)
    assert config.elit_group_size == 8 and given == {"elit_group_size": 8}


def test_underscores_in_values_stay():
    config = train("--exp-name", "a_b", "--data_dir=/x_y/k=v_w", "--output_dir", "c-d_e")
    assert (config.exp_name, config.data_dir, config.output_dir) == ("a_b", "/x_y/k=v_w", "c-d_e")


def test_the_last_of_several_counts():
    assert train("--batch-size", "8", "--batch_size=16").batch_size == 16
    assert train("--qk-norm", "--no-qk-norm").qk_norm is False
    assert train("--stage-weights", "0.9", "0.1", "--stage_weights", "0.5", "0.3", "0.2").stage_weights == [0.5, 0.3, 0.2]
    assert generate("--config", "/nowhere.yaml", "--config", "none").config is None


def test_a_list_that_replaces_another_is_said_once(capsys):
    assert generate("--prompt", "a", "--prompt", "b", "c", "--prompt=d").prompt == ["d"]
    said = "--prompt: is given again, and the last one alone counts; several values stand after one --prompt\n"
    assert capsys.readouterr().err.partition("warning: ")[2] == said
    assert train("--ema_decay", "0.9", "--ema-decay", "0.5", "--seed", "1", "--seed", "2").ema_decay == [0.5]
    assert "--ema-decay: is given again" in (err := capsys.readouterr().err) and err.count("\n") == 1
    generate("--prompt", "a", "--prompt", "a", "--cfg-scale", "2", "--cfg-scale", "3", "--tf32", "--no-tf32")
    assert capsys.readouterr().err == ""  # nothing is lost, or a script's option is overridden


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--fused-attn"], True),
        (["--no-fused-attn"], False),
        (["--no_fused_attn"], False),
        (["--fused_attn", "false"], False),
        (["--fused-attn=False"], False),
        (["--fused-attn", "0"], False),
        (["--fused-attn", "true"], True),
        (["--fused-attn=yes"], True),
        ([], True),
    ],
)
def test_switches_have_every_spelling(argv, value):
    config = train(*argv, "--model", "SiT-B/2")
    assert config.fused_attn is value and config.model == "SiT-B/2"


def test_aliases_are_the_same_option(write):
    assert train("--s3-cache-dir", "x").cache_dir == train("--cache_dir", "x").cache_dir == "x"
    assert train("--config", write("t.yaml", "s3_cache_dir: x")).cache_dir == "x"
    path = write("g.yaml", "num_steps: 7")
    assert generate("--eval-config", path).num_steps == generate("--config", path).num_steps == 7


def test_lists_are_separated_by_spaces(write):
    config = generate("--stage-sampling-thresholds", "0.3", "0.1", "--num_steps_per_scale", "30", "20", "10", "--heun")
    assert config.stage_sampling_thresholds == [0.3, 0.1] and config.num_steps_per_scale == [30, 20, 10] and config.heun
    assert generate("--class-labels", "207", "3").class_labels == ["207", "3"]
    path = write("t.yaml", "stage_weights: [0.7, 0.2, 0.1]\nnum_steps_per_scale:\n- 4\n- 5\n- 6\n")
    config = train("--config", path)
    assert config.stage_weights == [0.7, 0.2, 0.1] and config.num_steps_per_scale == [4, 5, 6]
    with pytest.raises(UserError, match="stage-weights"):
        train("--stage-weights", "0.9", "a")


def test_none_is_no_value(write):
    for text in ("none", "None", "null"):
        assert train("--elit-max-mask-prob", "0.5", "--elit-max-mask-prob", text).elit_max_mask_prob is None
        assert train("--val-data-dir", text).val_data_dir is None
    for text in ("null", "~", "none", ""):
        config = train("--config", write("t.yaml", f"elit_min_mask_prob: {text}\nvae: {text}\nenc_type: {text or 'none'}\n"))
        assert (config.elit_min_mask_prob, config.vae, config.enc_type) == (None, None, "none")
    assert train("--report-to", "none").report_to == "none"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--modle", "a"], ["--modle", "did you mean --model?"]),
        (["--elit-groups-size=4"], ["--elit-groups-size", "did you mean --elit-group-size?"]),
        (["--resolutio", "256"], ["--resolutio", "did you mean --resolution?"]),  # no abbreviations
        (["--cfg-scale", "2"], ["--cfg-scale"]),  # an option of generate.py
        (["SiT-B/2"], ["SiT-B/2", "--name value"]),
        (["--model"], ["--model"]),
    ],
)
def test_unknown_options_offer_the_nearest_name(argv, said):
    with pytest.raises(UserError) as error:
        train(*argv)
    assert all(s in str(error.value) for s in said), error.value


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--batch-size", "0"], "--batch-size: 0"),
        (["--batch-size", "2.5"], "whole number"),
        (["--batch-size", "many"], "whole number"),
        (["--learning-rate", "0"], "--learning-rate: 0"),
        (["--learning-rate", "nan"], "number"),
        (["--max-grad-norm", "inf"], "number"),
        (["--adam-beta1", "1"], "--adam-beta1: 1"),
        (["--resume-step", "-2"], "--resume-step: -2"),
        (["--cfg-prob", "1.1"], "--cfg-prob: 1.1"),
        (["--mixed-precision", "fp8"], "no, fp16, bf16"),
        (["--weighting", "logit"], "uniform, lognormal"),
        (["--path-type", "vp"], "linear, cosine"),
        (["--elit-tail", "keep"], "drop, skip"),
        (["--prediction", "x"], "v"),
        (["--fused-attn", "maybe"], "true or false"),
        (["--elit-max-mask-prob", "-0.5"], "--elit-max-mask-prob"),
        (["--resolution", "none"], "whole number"),
    ],
)
def test_wrong_values_name_the_option_and_what_is_valid(argv, said):
    with pytest.raises(UserError) as error:
        train(*argv)
    assert said in str(error.value) and argv[0] in str(error.value)


@pytest.mark.parametrize("argv", [["--cfg-scale", "0.9"], ["--guidance-high", "1.2"], ["--num-steps", "0"], ["--mode", "pde"]])
def test_wrong_sampling_values_are_refused(argv):
    with pytest.raises(UserError, match=argv[0]):
        generate(*argv)


def test_negative_numbers_are_values():
    assert train("--resume-step", "-1").resume_step == train("--resume_step=-1").resume_step == -1


# -------------------------------------------------------------------------------------------------------------- YAML


def test_yaml_numbers_may_be_written_as_on_the_command_line(write):
    text = "learning_rate: 1e-4\nadam_epsilon: 1e-8\nmax_train_steps: 4e5\nseed: '3'\nelit_max_mask_prob: 0.9375\nadam_beta2: .95\n"
    config = train("--config", write("t.yaml", text))
    assert (config.learning_rate, config.adam_epsilon, config.max_train_steps, config.seed) == (1e-4, 1e-8, 400_000, 3)
    assert (config.elit_max_mask_prob, config.adam_beta2) == (0.9375, 0.95)
    assert type(config.max_train_steps) is int and type(config.learning_rate) is float


def test_yaml_words_that_yaml_reads_as_booleans_are_kept(write):
    assert train("--config", write("t.yaml", "mixed_precision: no")).mixed_precision == "no"
    config = train("--config", write("t.yaml", "qk_norm: on\nfused_attn: no\nallow_tf32: 'true'"))
    assert (config.qk_norm, config.fused_attn, config.allow_tf32) == (True, False, True)


def test_yaml_keys_may_have_hyphens_and_the_file_may_be_empty(write):
    assert train("--config", write("t.yaml", "batch-size: 12")).batch_size == 12
    assert train("--config", write("t.yaml", "")).batch_size == 256


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bath_size: 3", ["'bath_size'", "did you mean batch_size?"]),
        ("elit_group_sizes: 3", ["'elit_group_sizes'", "did you mean elit_group_size?"]),
        ("batch_size: 2.5", ["batch_size", "whole number"]),
        ("batch_size: true", ["batch_size", "whole number"]),
        ("batch_size: -1", ["batch_size", "-1"]),
        ("batch_size: [1, 2]", ["batch_size", "whole number"]),
        ("batch_size:", ["batch_size", "whole number"]),
        ("model: {a: 1}", ["model"]),
        ("path_type: vp", ["path_type", "linear, cosine"]),
        ("- model", ["option: value"]),
        ("model: [", ["YAML"]),
    ],
)
def test_mistakes_in_a_yaml_file_name_the_file_and_the_key(write, text, said):
    path = write("mine.yaml", text)
    with pytest.raises(UserError) as error:
        train("--config", path)
    assert all(s in str(error.value) for s in (path, *said)), error.value


def test_missing_config_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.yaml"):
        train("--config", str(tmp_path / "nothing.yaml"))


def test_generation_reads_over_training_keys_but_not_over_unknown_ones(write):
    path = write("g.yaml", "num_steps: 25\nlearning_rate: 0.001\n")
    config, given = parse(GenerateConfig, ["--config", path])
    assert config.num_steps == 25 and "learning_rate" not in given
    with pytest.raises(UserError, match=r"num_stepz.*did you mean num_steps"):
        generate("--config", write("g.yaml", "num_stepz: 25"))


def test_a_generation_yaml_is_not_a_training_one(write):
    with pytest.raises(UserError, match="generation config"):
        train("--config", write("g.yaml", "ckpt: a.pt\nmodel: SiT-B/2"))


# -------------------------------------------------------------------------------------------------------- precedence


def test_command_line_over_eval_config_over_train_config_over_default(write):
    of_train = write("t.yaml", "model: ELIT-SiT-B/2\nresolution: 512\nnum_classes: 10\nexp_name: run")
    of_eval = write("g.yaml", "resolution: 128\nnum_classes: 20\nnum_steps: 30\ncfg_scale: 4")
    config, given = parse(
        GenerateConfig, ["--num-classes", "30", "--train-config", of_train, "--eval_config", of_eval, "--cfg-scale", "2.0"]
    )
    assert (config.num_classes, config.cfg_scale) == (30, 2.0)
    assert (config.resolution, config.num_steps) == (128, 30)
    assert (config.model, config.exp_name) == ("ELIT-SiT-B/2", "run")
    assert (config.path_type, config.global_seed) == ("linear", 0)
    assert "path_type" not in given and "global_seed" not in given and given["model"] == "ELIT-SiT-B/2"


def test_command_line_over_train_yaml_over_default(write):
    config = train("--config", write("t.yaml", "batch_size: 64\nseed: 5"), "--seed", "6")
    assert (config.batch_size, config.seed, config.num_workers) == (64, 6, 4)
    config = train(
        "--no-qk-norm", "--config", write("t.yaml", "qk_norm: true\nelit_max_mask_prob: 0.5"), "--elit-max-mask-prob", "none"
    )
    assert config.qk_norm is False and config.elit_max_mask_prob is None


def test_train_config_gives_generation_its_architecture_only(write):
    text = "model: DFM-SiT-B/2\nstages_count: 3\nqk_norm: true\npath_type: cosine\nelit_tail: skip\nelit_max_mask_prob: 0.5\n"
    text += (
        "mixed_precision: bf16\nvae: mse\nallow_tf32: true\nlegacy: true\nseed: 9\nlearning_rate: 1e-4\nconfig: other.yaml\n"
    )
    config, given = parse(GenerateConfig, ["--train-config", write("t.yaml", text), "--no-tf32"])
    assert (config.model, config.stages_count, config.qk_norm, config.path_type) == ("DFM-SiT-B/2", 3, True, "cosine")
    assert (config.elit_tail, config.elit_max_mask_prob) == ("skip", 0.5)
    assert (config.mixed_precision, config.vae, config.tf32, config.global_seed) == ("no", None, False, 0)
    assert set(given) - {"train_config", "tf32"} <= ARCHITECTURE_KEYS


def test_keys_of_a_train_config_that_are_no_option_of_either_are_refused(write):
    path = write("t.yaml", "model: SiT-B/2\ncfg_scale: 2.0\nnum_steps: 7\nckpt: a.pt")
    config, given = parse(GenerateConfig, ["--train-config", path])  # options of generation, not read from here
    assert (config.cfg_scale, config.num_steps, config.ckpt) == (1.5, 50, None) and "num_steps" not in given
    path = write("t.yaml", "model: SiT-B/2\nqk_nrom: true")
    with pytest.raises(UserError, match="did you mean qk_norm") as error:
        generate("--train-config", path)
    assert path in str(error.value)


# ---------------------------------------------------------------------------------------------------------- required


def test_required_options_are_asked_for(write):
    for argv in ([], ["--config", write("t.yaml", "model: null\nexp_name: run")]):
        with pytest.raises(UserError, match="--model is required"):
            require_options(train(*argv))
    with pytest.raises(UserError, match="--exp-name is required"):
        require_options(train("--model", "SiT-B/2"))
    require_options(train("--model", "SiT-B/2", "--exp-name", "a"))
    with pytest.raises(UserError, match="--ckpt is required"):
        require_options(generate("--model", "SiT-B/2"), "ckpt")


def test_checkpoint_records_are_coerced_like_options():
    assert coerce(TrainConfig, "elit_group_size", "8", "here") == 8
    assert coerce(TrainConfig, "elit_min_mask_prob", None, "here") is None
    with pytest.raises(UserError, match="here"):
        coerce(TrainConfig, "elit_group_size", None, "here")


# ---------------------------------------------------------------------------------------------------------- defaults


def test_training_defaults_are_the_published_ones():
    published = {
        "output_dir": "exps", "logging_dir": "logs", "report_to": "wandb", "sampling_steps": 10000, "resume_step": 0,
        "num_classes": 1000, "encoder_depth": 8, "fused_attn": True, "qk_norm": False, "data_dir": "../data/imagenet256",
        "resolution": 256, "batch_size": 256, "allow_tf32": False, "mixed_precision": "fp16", "epochs": 1400,
        "max_train_steps": 400000, "checkpointing_steps": 10000, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0,
        "learning_rate": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.0, "adam_epsilon": 1e-8,
        "lr_scheduler_type": "constant_with_linear_warmup", "warmup_steps": 0, "seed": 0, "num_workers": 4,
        "path_type": "linear", "prediction": "v", "weighting": "uniform", "cfg_prob": 0.1, "enc_type": "none", "proj_coeff": 0.0,
        "stages_count": 2, "stage_weights": [0.9, 0.1], "stage_sampling_thresholds": [0.1], "num_steps_per_scale": [40, 10],
        "elit_max_mask_prob": None, "elit_min_mask_prob": None, "elit_group_size": 4, "elit_read_depth": 1,
        "elit_write_depth": 1, "elit_tail": "drop", "head_depth": None, "tail_depth": None, "vae": None,
        "val_data_dir": None, "cache_dir": None, "config": None, "ema_decay": [0.9999],
    }  # fmt: skip
    found = dataclasses.asdict(train())
    assert {k: found.get(k, "absent") for k in published} == published


def test_generation_defaults_are_the_published_ones():
    published = {
        "config": None, "train_config": None, "sample_dir": "results", "global_seed": 0, "tf32": True, "weights": "ema",
        "vae": None, "per_proc_batch_size": 32, "num_fid_samples": 50000, "class_labels": ["random"], "mode": "ode",
        "num_steps": 50, "heun": False, "path_type": "linear", "cfg_scale": 1.5, "guidance_low": 0.0, "guidance_high": 1.0,
        "inference_budget": None, "unconditional_inference_budget": None, "autoguidance": False,
        "stage_sampling_thresholds": [0.1], "num_steps_per_scale": [40, 10], "mixed_precision": "no",
    }  # fmt: skip
    found = dataclasses.asdict(generate())
    assert {k: found.get(k, "absent") for k in published} == published


def test_two_configurations_do_not_share_their_lists():
    a, b = train(), train()
    a.stage_weights.append(1.0)
    assert b.stage_weights == [0.9, 0.1]


# ------------------------------------------------------------------------------------------- published command lines


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--model ELIT-SiT-XL/2 --exp-name xl --data-dir ../data",
            {"model": "ELIT-SiT-XL/2", "exp_name": "xl", "data_dir": "../data", "elit_group_size": 4},
        ),
        (
            "--config experiments_updated/train/elit_sit_b_256.yaml --data-dir ../elsewhere",
            {"model": "ELIT-SiT-B/2", "data_dir": "../elsewhere", "mixed_precision": "bf16", "weighting": "lognormal"},
        ),
        (
            "--model ELIT-SiT-XL/2 --exp-name xl --elit-min-mask-prob 0 --elit-max-mask-prob 0.9375 --elit_group_size 4",
            {"elit_min_mask_prob": 0.0, "elit_max_mask_prob": 0.9375, "elit_group_size": 4},
        ),
        ("--model DFM-SiT-XL/2 --exp-name dfm --data-dir ../data", {"model": "DFM-SiT-XL/2", "stages_count": 2}),
    ],
)
def test_published_training_lines_parse(monkeypatch, line, expected):
    monkeypatch.chdir(ROOT)
    config = train(*line.split())
    require_options(config)
    assert {k: getattr(config, k) for k in expected} == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--model ELIT-SiT-XL/2 --ckpt exps/xl/checkpoints/0400000.pt",
            {"model": "ELIT-SiT-XL/2", "ckpt": "exps/xl/checkpoints/0400000.pt", "inference_budget": None},
        ),
        (
            "--config experiments_updated/generation/elit_sit_b_256.yaml --ckpt a.pt --inference-budget 0.5",
            {"ckpt": "a.pt", "inference_budget": "0.5", "num_fid_samples": 50000, "num_steps": 50, "mode": "ode"},
        ),
        (
            "--train-config experiments_updated/train/elit_sit_b_256.yaml "
            "--eval-config experiments_updated/generation/elit_sit_b_256.yaml --ckpt a.pt",
            {"model": "ELIT-SiT-B/2", "ckpt": "a.pt", "elit_group_size": 4, "cfg_scale": 1.0, "mixed_precision": "no"},
        ),
    ],
)
def test_published_generation_lines_parse(monkeypatch, line, expected):
    monkeypatch.chdir(ROOT)
    config = generate(*line.split())
    require_options(config, "ckpt")
    assert {k: getattr(config, k) for k in expected} == expected


# ------------------------------------------------------------------------------------------------------ exact and bounded


@pytest.mark.parametrize(
    ("text", "value"),
    [("9007199254740993", 2**53 + 1), (str(2**63 - 1), 2**63 - 1), ("4e5", 400_000), ("1_000", 1000), ("7.0", 7), ("+3", 3)],
)
def test_whole_numbers_are_exact(text, value, write):
    assert train("--seed", text).seed == train("--config", write("t.yaml", f"seed: {text}")).seed == value


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--seed", str(2**63)], "≤ 9223372036854775807"),
        (["--seed", "1e30"], "≤ 9223372036854775807"),
        (["--seed", "9" * 5000], "≤ 9223372036854775807"),
        (["--seed", "1e999999999"], "≤ 9223372036854775807"),
        (["--seed", "1e-999999999"], "whole number"),
        (["--seed", "1e99999999999999999999"], "whole number"),
        (["--seed", "²"], "whole number"),
        (["--seed", "٣"], "whole number"),
        (["--learning-rate", "٣"], "a number"),
        (["--learning-rate", "1e400"], "a number"),
        (["--num-workers", "1e9"], "≤ 1024"),
        (["--plan-processes", "1e18"], "≤ 1048576"),
        (["--elit-read-depth", "1e9"], "≤ 100"),
        (["--elit-group-size", "20000"], "≤ 256"),
        (["--time-shift", "1e-320"], "≥ 0.001"),
        (["--plan-tflops", "1e308"], "≤ 1000000.0"),
    ],
)
def test_numbers_have_limits_that_are_named(argv, said):
    with pytest.raises(UserError) as error:
        train(*argv)
    assert said in str(error.value) and argv[0] in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    "argv",
    [
        *(["--ema-decay", ","], ["--ema-decay", ""], ["--ema-decay="], ["--stage-weights", ", ,"], ["--encoder-weights", ","]),
        *(["--ema-decay", "0.9", "0.9"], ["--ema-decay", "0.9999999", "0.99999999"]),
        *(["--output-dir", ""], ["--output-dir", "~"], ["--output-dir", "null"], ["--output-dir", "  "], ["--data-dir="]),
        *(["--output-dir", "a\0b"], ["--exp-name", "a" * 256], ["--output-dir", "a/" * 2000], ["--vae", "b" * 5000]),
        *(["--config", "a" * 300], ["--model", "--seed", "3"], ["--model"], ["--no-qk-norm=true"], ["-x"]),
    ],
)
def test_values_that_are_none_are_refused(argv):
    with pytest.raises(UserError) as error:
        train(*argv)
    assert argv[0].partition("=")[0] in str(error.value) and len(str(error.value)) < 300


def test_an_empty_list_is_a_value_where_it_is_the_default(write):
    assert train("--config", write("t.yaml", "allow_change: []\nencoder_weights: null")).allow_change == []
    with pytest.raises(UserError, match="ema_decay: the list is empty"):
        train("--config", write("t.yaml", "ema_decay: []"))
    assert generate("--class-labels", "3", "3").class_labels == ["3", "3"]  # a cycle may repeat


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2", "seed: is given twice"),
        ("batch-size: 1\nbatch_size: 2", "batch_size: is given twice"),
        ("cache_dir: a\ns3_cache_dir: b", "s3_cache_dir: is given twice"),
        ("ema_decay: [[0.9], 0.8]", "ema_decay: must be a value or a list of values"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: &c [*b, *b]", "b: must be a value"),
        ("ema_decay: &a [&b [&c [x, x], *c, *c], *b, *b]", "ema_decay: must be a value or a list of values"),
        ("<<: {seed: 3}", "<<: must be a value"),
        ("? [a, b]\n: 3", "option: value"),
        ("output_dir: 'a\\0b'\nvae: \"a\\0b\"", "NUL"),
        ('output_dir: "\\ud800"', "t.yaml"),
    ],
)
def test_odd_yaml_is_one_line(write, text, said):
    path = write("t.yaml", text)
    with pytest.raises(UserError) as error:
        train("--config", path)
    assert said in str(error.value) and path in str(error.value)


def test_a_file_that_is_no_config_is_not_read(tmp_path):
    (tmp_path / "big.yaml").write_bytes(b"#" * (2**20 + 1))
    (tmp_path / "binary.yaml").write_bytes(b"\x80\x04\x95")
    for name, said in (
        ("big.yaml", "larger than 1 MiB"),
        ("binary.yaml", "not a YAML file"),
        ("bigg.yaml", "did you mean big.yaml"),
    ):
        with pytest.raises(UserError, match=said):
            train("--config", str(tmp_path / name))


def test_later_configs_count_over_earlier_ones(write):
    first, second = write("a b.yaml", "num_steps: 5\ncfg_scale: 2.0"), write("b,c.yaml", "cfg-scale: 4.0\nheun: true")
    config = generate("--config", first, second, "--no-heun")
    assert (config.num_steps, config.cfg_scale, config.heun, config.config) == (5, 4.0, False, [first, second])
    assert generate("--config", second, first).cfg_scale == 2.0
    assert train("--config", write("t.yaml", "seed: 1\nbatch_size: 8"), write("u.yaml", "seed: 2")).seed == 2
    config = generate("--train-config", write("t.yaml", "resolution: 64\nqk_norm: true"), write("u.yaml", "resolution: 128"))
    assert (config.resolution, config.qk_norm) == (128, True)


# --------------------------------------------------------------------------------------------- positional, ignored and help


@pytest.mark.parametrize(
    "argv",
    [
        ["ref.npz", "samples.npz", "--metrics", "fid"],
        ["ref.npz", "--split-size", "5", "samples.npz", "--metrics", "fid"],
        ["--split-size", "5", "ref.npz", "samples.npz"],
        ["--ref", "ref.npz", "--samples=samples.npz"],
    ],
)
def test_positional_arguments_stand_anywhere_among_the_options(argv):
    config, _ = parse(EvaluateConfig, argv)
    assert (config.ref, config.samples) == ("ref.npz", "samples.npz")


def test_a_switch_before_a_positional_argument_takes_booleans_alone():
    config, _ = parse(ConvertCheckpointConfig, ["--show", "in.pt", "--safetensors", "false", "out.pt"])
    assert (config.source, config.show, config.dest, config.safetensors) == ("in.pt", True, "out.pt", False)
    with pytest.raises(UserError, match="unexpected argument 'c'"):
        parse(ConvertCheckpointConfig, ["a", "b", "c"])
    with pytest.raises(UserError, match="DIR or --source is required"):
        require_options(parse(CheckConfig, ["--workers", "2"])[0])


def test_options_without_effect_are_accepted_with_one_warning(write, capsys):
    path = write("g.yaml", "legacy: true\nprojector_embed_dims: 768")
    config, given = parse(GenerateConfig, ["--enable-repa", "--config", path, "--no-legacy", "--num-steps", "7"])
    assert given.keys() == {"config", "num_steps"} and not hasattr(config, "legacy")
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.partition(": warning: ")[2] for line in lines) == [
        *("--enable-repa has no effect", "--legacy has no effect", "--projector-embed-dims has no effect")
    ]
    train("--legacy", "--model", "SiT-B/2")
    assert capsys.readouterr().err.count("no effect") == 1


def help_of(cls, capsys):
    with pytest.raises(SystemExit) as end:
        parse(cls, ["-h"], prog="it.py")
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_shows_groups_and_what_acts(capsys):
    text = help_of(GenerateConfig, capsys)
    before, after = text.split("Recorded in the checkpoint")
    assert text.index("--ckpt") < text.index("sampling:") < text.index("guidance:") and "[required]" not in after
    assert "--model" in after and "--model" not in before and "--fused-attn" in before
    for name in ("encoder-depth", "enc-type", "proj-coeff", "mask-prob", "stage-weights", "legacy", "repa"):
        assert name not in text, name
    text = help_of(TrainConfig, capsys)
    assert "--encoder-depth" in text and "Recorded" not in text and "--model STR             registered" in text
    text = help_of(CCFGConfig, capsys)
    assert "--autoguidance" not in text and "--cfg-scales" in text
    text = help_of(EvaluateConfig, capsys)
    assert text.startswith("usage: it.py REF SAMPLES [--option value …]\n")


@pytest.mark.parametrize(
    "encoding", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}]
)
def test_help_in_a_locale_without_utf8(encoding):
    program = "import sys; from common.errors import cli_main; from config.parsing import parse; from config.options import TrainConfig\n"
    program += "cli_main(lambda argv: parse(TrainConfig, argv))(['-h'])"
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | encoding, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "\\u2190" in done.stdout, done.stderr
