"""The rules of the options, and the lists of names that are computed from them."""

import dataclasses

import pytest

from checkpoint.architecture import ARCHITECTURE, SCHEDULE
from checkpoint.weights import MODEL_OPTIONS
from config.demo_options import WebDemoConfig
from config.options import Architecture, CCFGConfig, ConvertCheckpointConfig, GenerateConfig, MultibudgetConfig, TrainConfig
from config.rules import GROUPS, Rules, folder_labels, names
from config.tool_options import (
    CheckConfig,
    ConvertConfig,
    DemoConfig,
    EncodeConfig,
    EvaluateConfig,
    PackConfig,
    ReferenceConfig,
    StatsConfig,
)
from sampling.image_folder import SETTINGS
from training.resume import CHANGEABLE, SAME

TOOLS = [CheckConfig, ConvertConfig, DemoConfig, EncodeConfig, EvaluateConfig, PackConfig, ReferenceConfig, StatsConfig]
ALL = [TrainConfig, GenerateConfig, MultibudgetConfig, CCFGConfig, WebDemoConfig, ConvertCheckpointConfig, *TOOLS]

INTERFACE = {"elit_group_size", "elit_read_depth", "elit_write_depth", "elit_tail", "elit_write", "elit_mlp_ratio"}
ELIT = {"head_depth", "tail_depth", *INTERFACE}
MODEL = {"qk_norm", *ELIT, "levels", "stages_count"}
CHECKPOINT = {"model", "resolution", "num_classes", "path_type", "time_shift", *MODEL}


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_option_has_a_group_and_known_rules(cls):
    known = {"group", "help", "required", "range", *Rules.__annotations__}
    for field in dataclasses.fields(cls):
        assert field.metadata.keys() <= known, field.name
        assert field.metadata["group"] in GROUPS, field.name
        assert field.metadata["help"], field.name


def test_every_option_of_training_has_a_resume_rule():
    assert [f.name for f in dataclasses.fields(TrainConfig) if f.metadata["resume"] not in ("same", "changeable", "free")] == []


def test_every_option_of_generation_says_whether_it_changes_the_images():
    assert [f.name for f in dataclasses.fields(GenerateConfig) if f.metadata["images"] not in (True, False)] == []


def test_what_a_resumed_run_must_share():
    repa = {"enc_type", "encoder_depth", "projector", "target_norm", "target_norm_gamma"}
    assert set(SAME) == CHECKPOINT | repa | {"latent_norm", "prediction", "condition"}
    assert SAME[0] == "model"  # the first difference is reported
    assert set(CHANGEABLE) == {
        *("batch_size", "gradient_accumulation_steps", "seed", "mixed_precision", "allow_tf32", "weighting", "cfg_prob"),
        *(
            "elit_min_mask_prob",
            "elit_max_mask_prob",
            "elit_budget_schedule",
            "stage_weights",
            "proj_coeff",
            "proj_until",
            "flip",
            "ema_decay",
            "max_grad_norm",
        ),
        *("learning_rate", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"),
        *("lr_scheduler_type", "warmup_steps", "lr_cooldown", "comm_dtype", "elit_budget_schedule"),
    }
    # Compared in some runs only: with target encoders, or where the rate depends on the number of steps.
    assert set(names(TrainConfig, when="repa", resume="same")) == repa - {"enc_type"}
    assert set(names(TrainConfig, when="schedule", resume="changeable")) == {"epochs", "max_train_steps"}
    free = {"fused_attn", "num_workers", "compile", "output_dir", "data_dir", "checkpointing_steps", "num_steps_per_scale"}
    assert free <= set(names(TrainConfig, resume="free"))


def test_what_a_checkpoint_decides():
    assert (
        set(names(Architecture, model=True, group="elit")) == ELIT
        and set(MODEL_OPTIONS) == MODEL
        and set(ARCHITECTURE) == CHECKPOINT
    )
    assert set(SCHEDULE) == {"num_steps_per_scale", "stage_sampling_thresholds"}


def test_what_changes_the_images_of_a_checkpoint():
    assert {
        *(
            "weights",
            "ema_sigma",
            "ema_step",
            "vae",
            "mode",
            "num_steps",
            "heun",
            "path_type",
            "time_shift",
            "cfg_scale",
            "autoguidance",
        ),
        *("guidance_low", "guidance_high", "inference_budget", "unconditional_inference_budget"),
        *("global_seed", "class_labels", "mixed_precision", "tf32"),
        *("cfg_channels", "guide_weights", "guide_label", "guide_budget", "core_cache", "cache_rule", "cache_after"),
    } == SETTINGS
    # A guide and prompts are recorded by their SHA-256, as the checkpoint is.
    assert set(folder_labels(GenerateConfig)) < SETTINGS | {
        "num_steps_per_scale",
        "stage_sampling_thresholds",
        "guide_ckpt",
        "prompt",
        "prompts",
    }


def test_folder_labels_stand_in_one_order():
    labels = ["weights", "budget", "uncond", "autoguidance", "low", "high", "heun", "labels", "", "scales", "thresholds"]
    labels += ["channels", "guide", "", "label", "at", "cache", "by", "after", "", "prompts", "sigma", "step"]
    assert list(folder_labels(GenerateConfig).values()) == labels


def test_names_by_several_values():
    assert names(Architecture, group=("elit", "dfm"), model=True) == names(Architecture, group={"dfm", "elit"}, model=True)
    assert names(Architecture, group="elit", model=False) == ("elit_init", "elit_max_mask_prob", "elit_min_mask_prob")
