"""Options of train.py, of the scripts that sample, and of convert_checkpoint.py: each once, with its rules."""

import dataclasses
from typing import Literal

from common.sizes import Resolution
from config.conversion_options import PipelineOptions
from config.data_options import LatentOptions
from config.ema_options import AverageOptions, SnapshotOptions
from config.remote_options import RemoteOptions
from config.repa_options import RepaOptions
from config.rules import option
from config.sampling_options import CoreCacheOptions, GuideOptions, PromptOptions
from config.score_options import ScoreOptions
from config.system_options import ProcessOptions, SystemOptions
from config.tracker_options import TrackerOptions


@dataclasses.dataclass
class Architecture:
    """What the model is. Recorded in every checkpoint, so that generation needs none of it."""

    model: str = option("architecture", ..., "registered name, e.g. SiT-XL/2 or ELIT-SiT-XL/2", resume="same", images=True)
    resolution: Resolution = option(
        "architecture", 256, "image side in pixels, or WIDTHxHEIGHT", ge=1, le=2**16, resume="same", images=True
    )
    num_classes: int = option("architecture", 1000, "number of classes", ge=1, le=10**7, resume="same", images=True)
    encoder_depth: int = option(
        "repa", 8, "block after which REPA reads the tokens (1-based)", ge=1, le=1000, resume="same", when="repa", images=False
    )
    qk_norm: bool = option("architecture", False, "normalise queries and keys", resume="same", images=True, model=True)
    fused_attn: bool = option(
        "system", True, "scaled_dot_product_attention (false: plain matrix products)", resume="free", images=False
    )
    cudnn_attn: bool = option(
        "system", False, "let PyTorch choose cuDNN's attention on CUDA, in the blocks", resume="free", images=False
    )
    path_type: Literal["linear", "cosine"] = option(
        "path", "linear", "interpolant between data and noise", resume="same", images=True
    )
    time_shift: float = option(
        "path",
        1.0,
        "s of t ← s·t/(1 + (s − 1)·t), in training and sampling: above 1 for larger latents",
        ge=1e-3,
        le=1e3,
        resume="same",
        images=True,
    )
    enc_type: str = option("repa", "none", "REPA target encoders, comma-separated; none: off", resume="same", images=False)
    proj_coeff: float = option("repa", 0.0, "weight of the REPA loss; 0: off", ge=0, resume="changeable", images=False)
    elit_group_size: int = option("elit", 4, "side of a group, in tokens", ge=1, le=256, resume="same", images=True, model=True)
    elit_read_depth: int = option(
        "elit", 1, "cross-attention layers in Read", ge=1, le=100, resume="same", images=True, model=True
    )
    elit_write_depth: int = option(
        "elit", 1, "cross-attention layers in Write", ge=1, le=100, resume="same", images=True, model=True
    )
    elit_tail: Literal["drop", "skip"] = option(
        "elit", "drop", "what becomes of the latents beyond the budget", resume="same", images=True, model=True
    )
    elit_write: Literal["published", "paper"] = option(
        "elit", "published", "Write without norms, or with the paper's pre-norms", resume="same", images=True, model=True
    )
    elit_mlp_ratio: float = option(
        "elit",
        1.0,
        "width of the MLPs in Read and Write, as a multiple of the model's",
        gt=0,
        le=64,
        resume="same",
        images=True,
        model=True,
    )
    elit_init: Literal["published", "spread"] = option(
        "elit", "published", "start of Read and Write; spread: for runs of a few thousand steps", resume="free", images=False
    )
    elit_max_mask_prob: float | None = option(
        "elit", None, "largest share of latents masked in training", ge=0, le=1, resume="changeable", images=False
    )
    elit_min_mask_prob: float | None = option(
        "elit", None, "smallest share of latents masked in training", ge=0, le=1, resume="changeable", images=False
    )
    head_depth: int | None = option(
        "elit", None, "blocks before Read (default: by size)", ge=0, le=1000, resume="same", images=True, model=True
    )
    tail_depth: int | None = option(
        "elit", None, "blocks after Write (default: by size)", ge=0, le=1000, resume="same", images=True, model=True
    )
    levels: int | None = option(
        "architecture",
        None,
        "HDiT: levels (default: as many as bring the token grid down to 16×16)",
        ge=1,
        le=16,
        resume="same",
        images=True,
        model=True,
    )
    stages_count: int = option("dfm", 2, "stages of the pyramid", ge=2, le=16, resume="same", images=True, model=True)
    stage_weights: list[float] = option("dfm", [0.9, 0.1], "how often each stage is trained", resume="changeable", images=False)
    stage_sampling_thresholds: list[float] = option(
        "dfm", [0.1], "time of a stage at which the next one starts", resume="free", images=True, folder=(11, "thresholds")
    )
    num_steps_per_scale: list[int] = option(
        "dfm", [40, 10], "sampling steps of each stage", ge=1, le=10**6, resume="free", images=True, folder=(10, "scales")
    )


@dataclasses.dataclass
class TrainConfig(
    SnapshotOptions, TrackerOptions, ScoreOptions, SystemOptions, RepaOptions, LatentOptions, RemoteOptions, Architecture
):
    """Options of train.py."""

    config: list[str] | None = option(
        "run", None, "YAML files with any of these options; a later one counts over an earlier one", resume="free", whole=True
    )
    output_dir: str = option("run", "exps", "folder of all runs", resume="free")
    exp_name: str = option("run", ..., "name of the run: its folder is OUTPUT_DIR/EXP_NAME", resume="free")
    logging_dir: str = option("output", "logs", "folder of the tracker's files, inside the run folder", resume="free")
    report_to: Literal["wandb", "tensorboard", "none"] = option(
        "output", "wandb", "tracker; metrics.jsonl is always written", resume="free"
    )
    sampling_steps: int = option(
        "output",
        10000,
        "pictures and held-out loss every so many steps, and at step 1; 0: never",
        ge=0,
        le=10**12,
        resume="free",
    )
    resume_step: int = option(
        "run", 0, "-1: newest good checkpoint, or start anew; n: the one of step n; 0: a new run", ge=-1, resume="free"
    )
    init_from: str | None = option(
        "run",
        None,
        "checkpoint whose averaged weights a new run starts from: ours, a published one, safetensors, hf://owner/repo/file, or a released name",
        resume="free",
    )
    data_dir: str = option(
        "data",
        "../data/imagenet256",
        "data set: packed/, vae-sd/ or vae-sd.zip, and for REPA images/ or images.zip; or s3://…, hf://…",
        resume="free",
    )
    encoder_weights: list[str] | None = option(
        "repa", None, "file with the weights of each encoder of --enc-type (default: from the hub)", resume="free"
    )
    val_data_dir: str | None = option("data", None, "held-out data set for the validation loss", resume="free")
    batch_size: int = option("train", 256, "images per micro-step, over all processes", ge=1, le=2**31 - 1, resume="changeable")
    vae: str | None = option(
        "output", None, "VAE for pictures: ema, mse, hub name or folder (default: the data set's record)", resume="free"
    )
    allow_tf32: bool = option("system", False, "TF32 matrix products on Ampere and newer GPUs", resume="changeable")
    deterministic: bool = option(
        "system", False, "only kernels that give the same bits in every run; slower on a GPU", resume="free"
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "system", "fp16", "precision of the forward and backward pass", resume="changeable"
    )
    epochs: int = option(
        "train", 1400, "end after so many passes over the data", ge=1, le=10**12, resume="changeable", when="schedule"
    )
    max_train_steps: int = option(
        "train", 400000, "end after so many optimizer steps", ge=1, le=10**12, resume="changeable", when="schedule"
    )
    checkpointing_steps: int = option(
        "output", 10000, "a checkpoint every so many steps, and at the end", ge=1, le=10**12, resume="free"
    )
    gradient_accumulation_steps: int = option("train", 1, "micro-steps per optimizer step", ge=1, le=10**6, resume="changeable")
    max_grad_norm: float = option("optimizer", 1.0, "gradients are clipped to this norm", gt=0, resume="changeable")
    learning_rate: float = option("optimizer", 1e-4, "AdamW's learning rate", gt=0, resume="changeable")
    adam_beta1: float = option("optimizer", 0.9, "AdamW's beta 1", ge=0, lt=1, resume="changeable")
    adam_beta2: float = option("optimizer", 0.999, "AdamW's beta 2", ge=0, lt=1, resume="changeable")
    adam_weight_decay: float = option("optimizer", 0.0, "AdamW's weight decay", ge=0, resume="changeable")
    adam_epsilon: float = option("optimizer", 1e-8, "AdamW's epsilon", gt=0, resume="changeable")
    lr_scheduler_type: Literal["constant", "constant_with_linear_warmup", "cosine"] = option(
        "optimizer",
        "constant_with_linear_warmup",
        "learning rate over the steps; cosine falls to 0 at the last step",
        resume="changeable",
    )
    warmup_steps: int = option("optimizer", 0, "linear warm-up over so many steps", ge=0, le=10**12, resume="changeable")
    lr_cooldown: float = option(
        "optimizer",
        0.0,
        "share of the steps, at the end, in which the rate falls linearly to 2%",
        ge=0,
        le=1,
        resume="changeable",
    )
    ema_decay: list[float] = option(
        "train",
        [0.9999],
        "decay of the averaged weights; several: one copy each",
        ge=0,
        lt=1,
        resume="changeable",
        distinct=True,
    )
    elit_budget_schedule: str | None = option(
        "elit", None, "budget of each image by its time t, e.g. 0.5@1.0-0.5,1.0@0.5-0.0 (default: drawn for each forward)",
        resume="changeable",
    )  # fmt: skip
    seed: int = option("train", 0, "seed of weights, order of the data and all draws", ge=0, resume="changeable")
    num_workers: int = option("data", 4, "data loading processes per training process", ge=0, le=1024, resume="free")
    prediction: Literal["v"] = option("path", "v", "what the model predicts: the velocity", resume="same")
    weighting: Literal["uniform", "lognormal"] = option(
        "path", "uniform", "distribution of the training times", resume="changeable"
    )
    condition: Literal["labels", "text"] | None = option(
        "data", None, "what the model is conditioned on (default: text for MMDiT, else labels; U-ViT takes both)", resume="same"
    )
    cfg_prob: float = option(
        "train", 0.1, "probability that a label is dropped, for classifier-free guidance", ge=0, le=1, resume="changeable"
    )
    keep_last: int = option("output", 0, "keep only the last so many checkpoints; 0: all", ge=0, resume="free")
    keep_every: int = option(
        "output", 0, "of the older ones keep those at multiples of so many steps; 0: none", ge=0, resume="free"
    )
    allow_change: list[str] = option(
        "run",
        [],
        "names of options that a resumed run may change; data_size for another number of samples",
        resume="free",
        distinct=True,
    )
    max_skipped_steps: int = option(
        "train", 50, "stop once so many steps in a row had a gradient that is not finite", ge=1, resume="free"
    )
    log_every: int = option(
        "output", 50, "steps between lines in metrics.jsonl and the tracker", ge=1, le=10**12, resume="free"
    )
    profile_steps: str | None = option(
        "output", None, "write a torch.profiler trace of the steps A-B to the run's folder profile/", resume="free"
    )
    cache_dir: str | None = option(
        "data", None, "where remote data is cached (default: ~/.cache/elastic-dit)", aliases=("s3_cache_dir",), resume="free"
    )
    wait_for_lock: float = option(
        "run",
        0.0,
        "minutes to wait for the end of another run in the same folder (a queued job's predecessor)",
        ge=0,
        le=1e6,
        resume="free",
    )


@dataclasses.dataclass
class Sampling(PromptOptions, GuideOptions, CoreCacheOptions, AverageOptions):
    """How images are drawn from a checkpoint; shared by generation and the inference tools."""

    ckpt: str = option(
        "checkpoint",
        ...,
        "checkpoint: ours, a published one, safetensors, a save_pretrained folder, hf://owner/repo/file, or a released name",
        images=False,
    )
    config: list[str] | None = option(
        "checkpoint",
        None,
        "YAML files with any of these options; a later one counts over an earlier one",
        whole=True,
        aliases=("eval_config",),
        images=False,
    )
    train_config: list[str] | None = option(
        "checkpoint", None, "training YAML, read for the architecture only", images=False, whole=True
    )
    weights: str = option("checkpoint", "ema", "which weights: ema, ema:DECAY or model", images=True, folder=(1, "weights"))
    vae: str | None = option(
        "checkpoint", None, "VAE: ema, mse, hub name or folder (default: the checkpoint's record, else ema)", images=True
    )
    tf32: bool = option("system", True, "TF32 matrix products on Ampere and newer GPUs", aliases=("allow_tf32",), images=True)
    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "system", "no", "precision of the model's forward pass", images=True, folder=(9, "")
    )
    mode: Literal["ode", "sde"] = option("sample", "ode", "sampler", images=True)
    num_steps: int = option("sample", 50, "sampling steps", ge=1, le=10**6, images=True)
    heun: bool = option("sample", False, "Heun's second-order correction (ode)", images=True, folder=(7, "heun"))
    guidance_low: float = option(
        "guidance", 0.0, "lower end of the guidance interval in t (inclusive)", ge=0, le=1, images=True, folder=(5, "low")
    )
    guidance_high: float = option(
        "guidance", 1.0, "upper end of the guidance interval in t (inclusive)", ge=0, le=1, images=True, folder=(6, "high")
    )
    autoguidance: bool = option(
        "guidance", False, "guide with the same label at the unconditional budget", images=True, folder=(4, "autoguidance")
    )
    compile: bool = option(
        "system", False, "torch.compile the model's parts: slower to start; one graph for all budgets", images=False
    )
    cuda_graphs: bool | None = option(
        "system",
        None,
        "replay the model's forwards from CUDA graphs (default: of up to 8 images at a time; --no-cuda-graphs: never)",
        images=False,
    )


@dataclasses.dataclass
class GenerateConfig(Sampling, Architecture, ProcessOptions):
    """Options of generate.py. Architecture comes from the checkpoint unless that records none."""

    sample_dir: str = option("output", "results", "folder of all sample sets", images=False)
    exp_name: str | None = option("output", None, "name of the run (default: the checkpoint's)", images=False)
    global_seed: int = option("sample", 0, "seed of noise and labels", ge=0, images=True)
    per_proc_batch_size: int = option("system", 32, "images per batch and process", ge=1, le=10**6, images=False)
    num_fid_samples: int = option("output", 50000, "number of images (with prompts: one of each)", ge=1, le=10**7, images=False)
    class_labels: list[str] = option(
        "sample", ["random"], "random, balanced, or class ids to cycle through", images=True, folder=(8, "labels")
    )
    cfg_scale: float = option("guidance", 1.5, "guidance scale; 1: none", ge=1, le=1e4, images=True)
    inference_budget: str | None = option(
        "sample",
        None,
        "ELIT: share of the latents to compute, or 0.25@1.0-0.5,1.0@0.5-0.0 (default: all)",
        images=True,
        folder=(2, "budget"),
    )
    unconditional_inference_budget: float | None = option(
        "guidance", None, "ELIT: budget of the guiding pass (cheap guidance)", gt=0, le=1, images=True, folder=(3, "uncond")
    )
    no_png: bool = option("output", False, "write the .npz alone, and no PNG files", images=False)
    preview: bool = option(
        "output", False, "DFM: also write each coarser stage's images, as soon as they are ready", images=False
    )


@dataclasses.dataclass
class InferenceTool(Sampling, Architecture):
    """What the two inference tools share."""

    class_label: list[int] = option("sample", [207], "class id, or several: one image of each", ge=0)
    seed: int = option("sample", 42, "seed of the noise: image i has that of (seed, i), whatever the budget and guidance", ge=0)
    per_proc_batch_size: int = option("system", 32, "images per forward", ge=1, le=10**6)


@dataclasses.dataclass
class MultibudgetConfig(InferenceTool):
    """Options of elit_multibudget_inference.py: one checkpoint at every budget."""

    output_dir: str = option("output", "multibudget_results", "folder of the pictures and results.json")
    budgets: list[float] | None = option(
        "sample", None, "budgets to compare (default: every k/J, k = 1 … J)", gt=0, le=1, distinct=True
    )
    inference_budget: str | None = option(
        "sample", None, "one more column: a budget, or a schedule like 0.25@1.0-0.5,1.0@0.5-0.0"
    )
    cfg_scale: float = option("guidance", 1.5, "guidance scale; 1: none", ge=1, le=1e4)
    unconditional_inference_budget: float | None = option(
        "guidance", None, "budget of the guiding pass (cheap guidance)", gt=0, le=1
    )
    attention: bool = option("output", False, "also show what each latent reads: attention maps and their entropy")
    attention_time: float = option("output", 0.5, "time t at which the attention is looked at", ge=0, le=1)


@dataclasses.dataclass
class CCFGConfig(InferenceTool):
    """Options of elit_ccfg_inference.py: CFG, cheap CFG and autoguidance side by side."""

    output_dir: str = option("output", "ccfg_results", "folder of the pictures and results.json")
    cfg_scales: list[float] = option("guidance", [1.0, 2.0, 3.0, 4.0, 5.0], "guidance scales", ge=1, le=1e4, distinct=True)
    inference_budget: str = option(
        "sample", "1.0", "share of the latents to compute, or a schedule like 0.25@1.0-0.5,1.0@0.5-0.0"
    )
    unconditional_inference_budget: float = option(
        "guidance", 0.0625, "budget of the guiding pass of cheap CFG and autoguidance", gt=0, le=1
    )
    autoguidance: bool = option("guidance", False, "no effect: all three kinds of guidance are always compared", hidden=True)


@dataclasses.dataclass
class ConvertCheckpointConfig(AverageOptions, PipelineOptions, Architecture):
    """Options of convert_checkpoint.py: any checkpoint that is read → ours or safetensors, and what is in a file."""

    source: str = option("files", ..., "any checkpoint that the other scripts take as --ckpt", positional="IN")
    dest: str | None = option("files", None, "new file or folder", positional="[OUT]")
    vae: str | None = option(
        "files", None, "VAE that a bare state dict belongs to: ema, mse, hub name or folder (default: ema)"
    )
    safetensors: bool = option("files", False, "write a safetensors file with the configuration in its metadata")
    show: bool = option("files", False, "print what is in IN")
    list: bool = option(
        "files", False, "print the released weights: names that --ckpt takes, files, budgets, published figures"
    )
    weights: str | None = option(
        "files",
        None,
        "which weights to write: ema, ema:DECAY or model (default: all; for safetensors, which holds one set, ema)",
    )


# Of a training YAML, generation reads these keys.
ARCHITECTURE_KEYS = {f.name for f in dataclasses.fields(Architecture)} | {"exp_name"}
