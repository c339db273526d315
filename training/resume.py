"""What a resumed run must share with the run that it resumes."""

from checkpoint.weights import MODEL_OPTIONS

# What a resumed run must share with the run that it goes on with, or it would silently be another one: …
SAME = (
    *("model", "resolution", "num_classes", "path_type", "time_shift", "latent_norm", "enc_type"),
    *MODEL_OPTIONS,
)


# … and what the user may change on purpose, by --allow-change.
CHANGEABLE = (
    *("batch_size", "gradient_accumulation_steps", "seed", "mixed_precision", "weighting", "cfg_prob", "ema_decay"),
    *(
        "elit_min_mask_prob",
        "elit_max_mask_prob",
        "stage_weights",
        "max_grad_norm",
        "learning_rate",
        "adam_beta1",
        "adam_beta2",
    ),
    *("adam_weight_decay", "adam_epsilon", "lr_scheduler_type", "warmup_steps", "lr_cooldown", "proj_coeff"),
)


LOCK = "run.lock"  # in the run folder while a run writes there


DATA_SIZE = "data_size"  # no option, but changed by --data-dir


def format_option(value) -> str:
    """An option's value as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
