"""Every option once: name, type, default, valid range and help."""

import dataclasses
from typing import Any, Literal


def option(default: Any, help: str, *, aliases: tuple[str, ...] = (), ge=None, gt=None, le=None, lt=None) -> Any:
    """A dataclass field with its help text, other spellings and the range of valid numbers. `...`: it must be given."""
    metadata = {"help": help, "aliases": aliases, "range": {"≥": ge, ">": gt, "≤": le, "<": lt}, "required": default is ...}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=None if default is ... else default, metadata=metadata)


@dataclasses.dataclass
class Architecture:
    """What the model is. Recorded in every checkpoint, so that generation needs none of it."""

    model: str = option(..., "registered name, e.g. SiT-XL/2 or ELIT-SiT-XL/2")
    resolution: int = option(256, "image side in pixels", ge=1)
    num_classes: int = option(1000, "number of classes", ge=1)
    encoder_depth: int = option(8, "block after which REPA reads the tokens (1-based)", ge=1)
    qk_norm: bool = option(False, "normalise queries and keys")
    fused_attn: bool = option(True, "scaled_dot_product_attention (false: plain matrix products)")
    path_type: Literal["linear", "cosine"] = option("linear", "interpolant between data and noise")
    time_shift: float = option(1.0, "s of t ← s·t/(1 + (s − 1)·t), in training and sampling: above 1 for larger latents", gt=0)
    enc_type: str = option("none", "REPA target encoders, comma-separated; none: off")
    proj_coeff: float = option(0.0, "weight of the REPA loss; 0: off", ge=0)
    elit_group_size: int = option(4, "ELIT: side of a group, in tokens", ge=1)
    elit_read_depth: int = option(1, "ELIT: cross-attention layers in Read", ge=1)
    elit_write_depth: int = option(1, "ELIT: cross-attention layers in Write", ge=1)
    elit_tail: Literal["drop", "skip"] = option("drop", "ELIT: what becomes of the latents beyond the budget")
    elit_max_mask_prob: float | None = option(None, "ELIT: largest share of latents masked in training", ge=0, le=1)
    elit_min_mask_prob: float | None = option(None, "ELIT: smallest share of latents masked in training", ge=0, le=1)
    head_depth: int | None = option(None, "ELIT: blocks before Read (default: by size)", ge=0)
    tail_depth: int | None = option(None, "ELIT: blocks after Write (default: by size)", ge=0)
    levels: int | None = option(None, "HDiT: levels (default: as many as bring the token grid down to 16×16)", ge=1)
    stages_count: int = option(2, "DFM: stages of the pyramid", ge=2)
    stage_weights: list[float] = option([0.9, 0.1], "DFM: how often each stage is trained")
    stage_sampling_thresholds: list[float] = option([0.1], "DFM: time of a stage at which the next one starts")
    num_steps_per_scale: list[int] = option([40, 10], "DFM: sampling steps of each stage", ge=1)


@dataclasses.dataclass
class TrainConfig(Architecture):
    """Options of train.py."""

    config: str | None = option(None, "YAML file with any of these options")
    output_dir: str = option("exps", "folder of all runs")
    exp_name: str = option(..., "name of the run: its folder is OUTPUT_DIR/EXP_NAME")
    logging_dir: str = option("logs", "folder of the tracker's files, inside the run folder")
    report_to: Literal["wandb", "tensorboard", "none"] = option("wandb", "tracker; metrics.jsonl is always written")
    sampling_steps: int = option(10000, "pictures and held-out loss every so many steps, and at step 1; 0: never", ge=0)
    resume_step: int = option(0, "-1: newest good checkpoint, or start anew; n: the one of step n; 0: a new run", ge=-1)
    init_from: str | None = option(
        None,
        "checkpoint whose averaged weights a new run starts from: ours, a published one, safetensors, or hf://owner/repo/file",
    )
    data_dir: str = option(
        "../data/imagenet256", "data set: packed/, vae-sd/ or vae-sd.zip, and for REPA images/ or images.zip; or s3://…, hf://…"
    )
    encoder_weights: list[str] | None = option(
        None, "REPA: file with the weights of each encoder of --enc-type (default: from the hub)"
    )
    val_data_dir: str | None = option(None, "held-out data set for the validation loss")
    batch_size: int = option(256, "images per micro-step, over all processes", ge=1)
    vae: str | None = option(None, "VAE for pictures: ema, mse, hub name or folder (default: the data set's record)")
    allow_tf32: bool = option(False, "TF32 matrix products on Ampere and newer GPUs")
    mixed_precision: Literal["no", "fp16", "bf16"] = option("fp16", "precision of the forward and backward pass")
    epochs: int = option(1400, "end after so many passes over the data", ge=1)
    max_train_steps: int = option(400000, "end after so many optimizer steps", ge=1)
    checkpointing_steps: int = option(10000, "a checkpoint every so many steps, and at the end", ge=1)
    gradient_accumulation_steps: int = option(1, "micro-steps per optimizer step", ge=1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", gt=0)
    learning_rate: float = option(1e-4, "AdamW's learning rate", gt=0)
    adam_beta1: float = option(0.9, "AdamW's beta 1", ge=0, lt=1)
    adam_beta2: float = option(0.999, "AdamW's beta 2", ge=0, lt=1)
    adam_weight_decay: float = option(0.0, "AdamW's weight decay", ge=0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", gt=0)
    lr_scheduler_type: Literal["constant", "constant_with_linear_warmup", "cosine"] = option(
        "constant_with_linear_warmup", "learning rate over the steps; cosine falls to 0 at the last step"
    )
    warmup_steps: int = option(0, "linear warm-up over so many steps", ge=0)
    lr_cooldown: float = option(0.0, "share of the steps, at the end, in which the rate falls linearly to 2%", ge=0, le=1)
    ema_decay: list[float] = option([0.9999], "decay of the averaged weights; several: one copy each", ge=0, lt=1)
    seed: int = option(0, "seed of weights, order of the data and all draws", ge=0)
    num_workers: int = option(4, "data loading processes per training process", ge=0)
    prediction: Literal["v"] = option("v", "what the model predicts: the velocity")
    weighting: Literal["uniform", "lognormal"] = option("uniform", "distribution of the training times")
    latent_norm: Literal["vae", "channel"] = option(
        "vae", "latents by the VAE's own scale and shift, or by each channel's (`dataset_tools.py stats`)"
    )
    cfg_prob: float = option(0.1, "probability that a label is dropped, for classifier-free guidance", ge=0, le=1)
    keep_last: int = option(0, "keep only the last so many checkpoints; 0: all", ge=0)
    keep_every: int = option(0, "of the older ones keep those at multiples of so many steps; 0: none", ge=0)
    allow_change: list[str] = option(
        [], "names of options that a resumed run may change; data_size for another number of samples"
    )
    compile: bool = option(False, "torch.compile the blocks")
    gradient_checkpointing: bool = option(False, "compute the blocks twice, to keep less in memory")
    max_skipped_steps: int = option(50, "stop once so many steps in a row had a gradient that is not finite", ge=1)
    log_every: int = option(50, "steps between lines in metrics.jsonl and the tracker", ge=1)
    cache_dir: str | None = option(
        None, "where remote data is cached (default: ~/.cache/elastic-dit)", aliases=("s3_cache_dir",)
    )
    wait_for_lock: float = option(
        0.0, "minutes to wait for the end of another run in the same folder (a queued job's predecessor)", ge=0
    )
    plan: bool = option(False, "print and check what the run would do, cost and need, and train nothing; needs no GPU")
    plan_processes: int | None = option(None, "--plan: number of processes (default: the launcher's)", ge=1)
    plan_tflops: float | None = option(None, "--plan: TFLOP/s that a process is taken to sustain, for the time needed", gt=0)
    legacy: bool = option(False, "accepted from old YAML files; no effect")


@dataclasses.dataclass
class Sampling:
    """How images are drawn from a checkpoint; shared by generation and the inference tools."""

    ckpt: str = option(..., "checkpoint: ours, a published one, safetensors, a save_pretrained folder, or hf://owner/repo/file")
    config: str | None = option(None, "YAML file with any of these options", aliases=("eval_config",))
    train_config: str | None = option(None, "training YAML, read for the architecture only")
    weights: str = option("ema", "which weights: ema, ema:DECAY or model")
    vae: str | None = option(None, "VAE: ema, mse, hub name or folder (default: the checkpoint's record, else ema)")
    tf32: bool = option(True, "TF32 matrix products on Ampere and newer GPUs", aliases=("allow_tf32",))
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "precision of the model's forward pass")
    mode: Literal["ode", "sde"] = option("ode", "sampler")
    num_steps: int = option(50, "sampling steps", ge=1)
    heun: bool = option(False, "Heun's second-order correction (ode)")
    guidance_low: float = option(0.0, "guide at times from here …", ge=0, le=1)
    guidance_high: float = option(1.0, "… to here, both included", ge=0, le=1)
    autoguidance: bool = option(False, "guide with the same label at the unconditional budget")
    compile: bool = option(False, "torch.compile the blocks: slower to start; one graph for all budgets")
    legacy: bool = option(False, "accepted from old command lines; no effect")
    enable_repa: bool = option(False, "accepted from old command lines; no effect")
    projector_embed_dims: str | None = option(None, "accepted from old command lines; no effect")


@dataclasses.dataclass
class GenerateConfig(Sampling, Architecture):
    """Options of generate.py. Architecture comes from the checkpoint unless that records none."""

    sample_dir: str = option("results", "folder of all sample sets")
    exp_name: str | None = option(None, "name of the run (default: the checkpoint's)")
    global_seed: int = option(0, "seed of noise and labels", ge=0)
    per_proc_batch_size: int = option(32, "images per batch and process", ge=1)
    num_fid_samples: int = option(50000, "number of images", ge=1)
    class_labels: list[str] = option(["random"], "random, balanced, or class ids to cycle through")
    cfg_scale: float = option(1.5, "guidance scale; 1: none", ge=1)
    inference_budget: str | None = option(
        None, "ELIT: share of the latents to compute, or 0.25@1.0-0.5,1.0@0.5-0.0 (default: all)"
    )
    unconditional_inference_budget: float | None = option(None, "ELIT: budget of the guiding pass (cheap guidance)")
    preview: bool = option(False, "DFM: also write each coarser stage's images, as soon as they are ready")


@dataclasses.dataclass
class InferenceTool(Sampling, Architecture):
    """What the two inference tools share."""

    class_label: list[int] = option([207], "class id, or several: one image of each", ge=0)
    seed: int = option(42, "seed of the noise: image i has that of (seed, i), whatever the budget and guidance", ge=0)
    per_proc_batch_size: int = option(32, "images per forward", ge=1)


@dataclasses.dataclass
class MultibudgetConfig(InferenceTool):
    """Options of elit_multibudget_inference.py: one checkpoint at every budget."""

    output_dir: str = option("multibudget_results", "folder of the pictures and results.json")
    budgets: list[float] | None = option(None, "budgets to compare (default: every k/J, k = 1 … J)")
    inference_budget: str | None = option(None, "one more column: a budget, or a schedule like 0.25@1.0-0.5,1.0@0.5-0.0")
    cfg_scale: float = option(1.5, "guidance scale; 1: none", ge=1)
    unconditional_inference_budget: float | None = option(None, "budget of the guiding pass (cheap guidance)")
    attention: bool = option(False, "also show what each latent reads: attention maps and their entropy")
    attention_time: float = option(0.5, "time t at which the attention is looked at", ge=0, le=1)


@dataclasses.dataclass
class CCFGConfig(InferenceTool):
    """Options of elit_ccfg_inference.py: CFG, cheap CFG and autoguidance side by side."""

    output_dir: str = option("ccfg_results", "folder of the pictures and results.json")
    cfg_scales: list[float] = option([1.0, 2.0, 3.0, 4.0, 5.0], "guidance scales", ge=1)
    inference_budget: str = option("1.0", "share of the latents to compute, or a schedule like 0.25@1.0-0.5,1.0@0.5-0.0")
    unconditional_inference_budget: float = option(0.0625, "budget of the guiding pass of cheap CFG and autoguidance")
    autoguidance: bool = option(False, "no effect: all three kinds of guidance are always compared")


@dataclasses.dataclass
class ConvertCheckpointConfig(Architecture):
    """convert_checkpoint.py IN [OUT]: any checkpoint that is read → ours or safetensors, and what is in a file."""

    source: str = option(..., "IN: any checkpoint that the other scripts take as --ckpt")
    dest: str | None = option(None, "OUT: new file")
    vae: str | None = option(None, "VAE that a bare state dict belongs to: ema, mse, hub name or folder (default: ema)")
    safetensors: bool = option(False, "write a safetensors file with the configuration in its metadata")
    show: bool = option(False, "print what is in IN")
    weights: str | None = option(
        None, "which weights to write: ema, ema:DECAY or model (default: all; for safetensors, which holds one set, ema)"
    )


@dataclasses.dataclass
class ConvertConfig:
    """Options of dataset_tools.py convert: any images → numbered square PNGs."""

    source: str = option(..., "folder tree or .zip with images")
    dest: str = option(..., "new folder or .zip, e.g. DATA_DIR/images")
    resolution: str | None = option(None, "WxH in pixels, e.g. 256x256 (default: sizes stay)")
    transform: Literal["none", "center-crop", "center-crop-wide", "center-crop-dhariwal"] = option(
        "none", "how images are cropped"
    )
    max_images: int | None = option(None, "only the first so many images", ge=1)
    workers: int | None = option(None, "processes (default: one for each CPU core)", ge=1)
    strict: bool = option(False, "stop at the first image that cannot be read (default: list them in skipped.txt)")


@dataclasses.dataclass
class EncodeConfig:
    """Options of dataset_tools.py encode: images → VAE latents."""

    source: str = option(..., "folder or .zip of images, e.g. DATA_DIR/images")
    dest: str = option(..., "new folder or .zip, e.g. DATA_DIR/vae-sd")
    vae: str = option("stabilityai/sd-vae-ft-mse", "VAE: ema, mse, hub name or folder", aliases=("model_url",))
    max_images: int | None = option(None, "only the first so many images", ge=1)
    batch_size: int = option(32, "images per batch", ge=1)
    workers: int = option(4, "threads of each process that decode images in advance", ge=1)
    dtype: Literal["float32", "float16"] = option("float32", "how the latents are stored")
    packed: bool = option(False, "write a few large files that training maps, e.g. to DATA_DIR/packed")
    shard_size: int = option(8192, "latents in each packed file", ge=1)


@dataclasses.dataclass
class PackConfig:
    """Options of dataset_tools.py pack: vae-sd/ or vae-sd.zip → a few large files that training maps."""

    source: str = option(..., "folder or .zip of latents, e.g. DATA_DIR/vae-sd")
    dest: str = option(..., "new folder, e.g. DATA_DIR/packed")
    dtype: Literal["same", "float32", "float16"] = option("same", "how the latents are stored; same: as in the source")
    workers: int = option(8, "threads that read", ge=1)
    shard_size: int = option(8192, "latents in each packed file", ge=1)


@dataclasses.dataclass
class CheckConfig:
    """Options of dataset_tools.py check: is a data set whole and sound?"""

    source: str = option(..., "data folder, as given to train.py --data-dir")
    cache_dir: str | None = option(None, "where remote data is cached", aliases=("s3_cache_dir",))
    sample_grid: str | None = option(None, "picture to write: a few latents decoded, and beside them their images")
    vae: str | None = option(None, "VAE for --sample-grid: ema, mse, hub name or folder (default: the data set's record)")
    workers: int = option(8, "threads that read", ge=1)


@dataclasses.dataclass
class StatsConfig:
    """Options of dataset_tools.py stats: mean and standard deviation of each latent channel, for --latent-norm channel."""

    source: str = option(..., "data folder, as given to train.py --data-dir")
    workers: int = option(8, "threads that read", ge=1)


@dataclasses.dataclass
class DemoConfig:
    """Options of dataset_tools.py demo: the digit canvases of the quick start."""

    dest: str = option(..., "new folder, for train/ and val/ with a folder per digit")


@dataclasses.dataclass
class FeatureNetworks:
    """The networks that evaluation and reference batches look at images with."""

    inception_weights: str | None = option(None, "Inception in torch-fidelity's format (default: downloaded)")
    dino_weights: str | None = option(None, "DINOv2 ViT-L/14, timm's or the original file (default: downloaded)")
    batch_size: int = option(64, "images per batch and process", ge=1)


@dataclasses.dataclass
class EvaluateConfig(FeatureNetworks):
    """evaluate.py REF SAMPLES: FID, sFID, Inception Score, Precision, Recall and FDD, as ADM's evaluator has them."""

    ref: str = option(..., "REF: reference, .npz in ADM's format or a folder of PNG")
    samples: str = option(..., "SAMPLES: .npz or a folder of PNG")
    metrics: list[str] = option([], "of fid sfid is precision recall fdd (default: all that the network gives; fdd on demand)")
    output: str = option("metrics.json", "JSON file with the figures and what they belong to")
    features: str | None = option(None, "another network than Inception, as module:factory")
    pr_dtype: Literal["float16", "float32"] = option(
        "float16", "distances of precision and recall; float16 as in ADM's evaluator"
    )
    split_size: int = option(5000, "images per split of the Inception Score", ge=1)


@dataclasses.dataclass
class ReferenceConfig(FeatureNetworks):
    """Options of dataset_tools.py reference: images → a reference batch for evaluation, in ADM's format."""

    source: str = option(..., "folder or .zip of images of one size, or .npz")
    dest: str = option(..., "new .npz file")
    num_images: int = option(10000, "images kept in it, for precision and recall; the statistics are of all", ge=1)
    seed: int = option(0, "seed of the choice", ge=0)
    dino: bool = option(False, "also the DINOv2 statistics that FDD needs")


# Of a training YAML, generation reads these keys.
ARCHITECTURE_KEYS = {f.name for f in dataclasses.fields(Architecture)} | {"exp_name"}
