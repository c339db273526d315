"""Options of dataset_tools.py and evaluate.py."""

import dataclasses
from typing import Literal

from config.rules import option
from config.system_options import ProcessOptions


@dataclasses.dataclass
class ConvertConfig:
    """Options of dataset_tools.py convert: any images → numbered PNGs of one size."""

    source: str = option("files", ..., "folder tree or .zip with images")
    dest: str = option("files", ..., "new folder or .zip, e.g. DATA_DIR/images")
    resolution: str | None = option("images", None, "WxH in pixels, e.g. 256x256 (default: sizes stay)")
    transform: Literal["none", "center-crop", "center-crop-wide", "center-crop-dhariwal", "resize-crop"] = option(
        "images", "none", "how images are cropped; resize-crop makes sizes that are not square"
    )
    max_images: int | None = option("images", None, "only the first so many images", ge=1)
    workers: int | None = option("system", None, "processes (default: one for each CPU core)", ge=1, le=1024)
    strict: bool = option("images", False, "stop at the first image that cannot be read (default: list them in skipped.txt)")


@dataclasses.dataclass
class EncodeConfig(ProcessOptions):
    """Options of dataset_tools.py encode: images → VAE latents."""

    source: str = option("files", ..., "folder or .zip of images, e.g. DATA_DIR/images")
    dest: str = option("files", ..., "new folder or .zip, e.g. DATA_DIR/vae-sd")
    vae: str = option("images", "stabilityai/sd-vae-ft-mse", "VAE: ema, mse, hub name or folder", aliases=("model_url",))
    max_images: int | None = option("images", None, "only the first so many images", ge=1)
    batch_size: int = option("system", 32, "images per batch", ge=1, le=2**31 - 1)
    workers: int = option("system", 4, "threads of each process that decode images in advance", ge=1, le=1024)
    dtype: Literal["float32", "float16"] = option("files", "float32", "how the latents are stored")
    flip: bool = option("images", False, "also encode each mirrored image; training draws one of the two")
    packed: bool = option("files", False, "write a few large files that training maps, e.g. to DATA_DIR/packed")
    shard_size: int = option("files", 8192, "latents in each packed file", ge=1, le=10**9)


@dataclasses.dataclass
class VAEConfig:
    """Options of dataset_tools.py vae: VAE weights under latent-diffusion's names (VA-VAE, E2E-VAE) → a folder of diffusers."""

    source: str = option("files", ..., "file of weights: .pt, .ckpt or .safetensors", positional="FILE")
    dest: str = option("files", ..., "new folder, for --vae", positional="DEST")
    stats: str | None = option(
        "files", None, "file with mean and std, or latents_bias and latents_scale, of the latents' channels"
    )
    scaling_factor: float = option("images", 1.0, "latents are multiplied by it", gt=0, le=1e6)


@dataclasses.dataclass
class PackConfig:
    """Options of dataset_tools.py pack: vae-sd/ or vae-sd.zip → a few large files that training maps."""

    source: str = option("files", ..., "folder or .zip of latents, e.g. DATA_DIR/vae-sd")
    dest: str = option("files", ..., "new folder, e.g. DATA_DIR/packed")
    dtype: Literal["same", "float32", "float16"] = option("files", "same", "how the latents are stored; same: as in the source")
    workers: int = option("system", 8, "threads that read", ge=1, le=1024)
    shard_size: int = option("files", 8192, "latents in each packed file", ge=1, le=10**9)


@dataclasses.dataclass
class CheckConfig:
    """Options of dataset_tools.py check: is a data set whole and sound?"""

    source: str = option("files", ..., "data folder, as given to train.py --data-dir", positional="DIR")
    cache_dir: str | None = option("files", None, "where remote data is cached", aliases=("s3_cache_dir",))
    sample_grid: str | None = option("files", None, "picture to write: a few latents decoded, and beside them their images")
    vae: str | None = option(
        "files", None, "VAE for --sample-grid: ema, mse, hub name or folder (default: the data set's record)"
    )
    workers: int = option("system", 8, "threads that read", ge=1, le=1024)


@dataclasses.dataclass
class StatsConfig:
    """Options of dataset_tools.py stats: mean and standard deviation of the latents, for --latent-norm."""

    source: str = option("files", ..., "data folder, as given to train.py --data-dir", positional="DIR")
    per: Literal["channel", "position"] = option("images", "channel", "of each channel, or of each position of each channel")
    workers: int = option("system", 8, "threads that read", ge=1, le=1024)


@dataclasses.dataclass
class DemoConfig:
    """Options of dataset_tools.py demo: the digit canvases of the quick start."""

    dest: str = option("files", ..., "new folder, for train/ and val/ with a folder per digit")
    captions: bool = option("files", False, "four different digits and captions of them: data folders train/ and val/")


@dataclasses.dataclass
class FeatureNetworks:
    """The networks that evaluation and reference batches look at images with."""

    inception_weights: str | None = option("metrics", None, "Inception in torch-fidelity's format (default: downloaded)")
    dino_weights: str | None = option("metrics", None, "DINOv2 ViT-L/14, timm's or the original file (default: downloaded)")
    batch_size: int = option("system", 64, "images per batch and process of these networks", ge=1, le=2**31 - 1)


@dataclasses.dataclass
class MetricOptions(FeatureNetworks):
    """Which figures are computed, against what, and how."""

    ref: str = option("files", ..., "reference: .npz in ADM's format or a folder of PNG", positional="REF")
    metrics: list[str] = option(
        "metrics",
        [],
        "of fid sfid is precision recall (default: those that the network gives) and, on demand, fdd kid mind density coverage "
        "dino_precision dino_recall dino_density dino_coverage cmmd clip_score",
        distinct=True,
    )
    clip_weights: str | None = option(
        "metrics", None, "CLIP ViT-L/14 at 336 px for cmmd: transformers' folder, or timm's file (required for cmmd)"
    )
    clip_score: str | None = option(
        "metrics", None, "also the CLIP score of images and prompts, by this folder of transformers' CLIPModel"
    )
    features: str | None = option("metrics", None, "another network than Inception, as module:factory")
    pr_dtype: Literal["float16", "float32"] = option(
        "metrics", "float16", "distances of precision and recall; float16 as in ADM's evaluator"
    )
    split_size: int = option("metrics", 5000, "images per split of the Inception Score", ge=1, le=10**9)


@dataclasses.dataclass
class EvaluateConfig(MetricOptions, ProcessOptions):
    """Options of evaluate.py: the figures of ADM's evaluator, and others."""

    samples: str = option("files", ..., ".npz or a folder of PNG", positional="SAMPLES")
    prompts: str | None = option(
        "files", None, "file with a prompt in each line, for --clip-score (default: captions.json of the samples)"
    )
    output: str = option("files", "metrics.json", "JSON file with the figures and what they belong to")


@dataclasses.dataclass
class ReferenceConfig(FeatureNetworks, ProcessOptions):
    """Options of dataset_tools.py reference: images → a reference batch for evaluation, in ADM's format."""

    source: str = option("files", ..., "folder or .zip of images of one size, or .npz")
    dest: str = option("files", ..., "new .npz file")
    num_images: int = option(
        "metrics", 10000, "images kept in it, for precision and recall; the statistics are of all", ge=1, le=10**9
    )
    seed: int = option("metrics", 0, "seed of the choice", ge=0)
    dino: bool = option("metrics", False, "also the DINOv2 statistics that FDD needs")


@dataclasses.dataclass
class FinetuneDiffusersConfig:
    """Options of finetune_diffusers.py: an interface for a pretrained transformer of diffusers."""

    transformer: str = option(
        "files", ..., "folder of save_pretrained, of the transformer or of its pipeline; or a name on the hub", resume="same"
    )
    data_dir: str = option("files", ..., "folder of .safetensors with latents and text features", resume="free")
    output_dir: str = option("files", ..., "folder of this run; run the command again and it continues there", resume="free")
    read_after: int = option("elit", 8, "blocks before Read", ge=0, le=1000, resume="same")
    write_after: int = option("elit", 52, "blocks before Write, from the first block", ge=1, le=1000, resume="same")
    group_size: int = option("elit", 8, "side of a group, in tokens", ge=1, le=256, resume="same")
    read_depth: int = option("elit", 1, "cross-attention layers in Read", ge=1, le=100, resume="same")
    write_depth: int = option("elit", 1, "cross-attention layers in Write", ge=1, le=100, resume="same")
    min_budget: float = option(
        "elit", 0.0625, "smallest budget that is trained; 1: the full one alone", gt=0, le=1, resume="same"
    )
    train: Literal["interface", "all"] = option("train", "interface", "what is trained", resume="same")
    distill_weight: float = option("train", 20.0, "weight of the distance to the frozen original; 0: off", ge=0, resume="same")
    cfg_prob: float = option(
        "train", 0.1, "how often the empty prompt, of null.safetensors, takes a caption's place", ge=0, le=1, resume="same"
    )
    guidance: float = option("train", 3.5, "guidance scale that a guidance-distilled model is told", ge=0, resume="same")
    max_train_steps: int = option("train", 60000, "optimizer steps", ge=1, le=10**9, resume="free")
    batch_size: int = option("train", 16, "images per step, over all processes", ge=1, le=2**31 - 1, resume="same")
    learning_rate: float = option("optimizer", 1e-4, "AdamW's", gt=0, resume="free")
    warmup_steps: int = option("optimizer", 0, "steps in which the learning rate rises", ge=0, le=10**9, resume="free")
    weight_decay: float = option("optimizer", 0.0, "AdamW's", ge=0, resume="free")
    max_grad_norm: float = option("optimizer", 1.0, "largest norm of the gradient", gt=0, resume="free")
    weighting: Literal["uniform", "lognormal"] = option("path", "lognormal", "how times are drawn", resume="same")
    time_shift: float = option(
        "path", 1.0, "s of t ← s·t/(1 + (s − 1)·t) (the paper: 2.22 at 512, 2.0 at 1024 px)", ge=1e-3, le=1e3, resume="same"
    )
    seed: int = option("run", 0, "seed of the interface, the data order and all draws", ge=0, resume="same")
    checkpointing_steps: int = option("output", 1000, "steps between two saves", ge=1, le=10**9, resume="free")
    log_steps: int = option("output", 10, "steps between two lines of metrics.jsonl", ge=1, le=10**9, resume="free")
    dtype: Literal["float32", "bfloat16"] = option("system", "bfloat16", "of the frozen weights", resume="free")
    mixed_precision: Literal["no", "bf16"] = option("system", "bf16", "of matrix products", resume="free")
    gradient_checkpointing: bool = option("system", False, "recompute blocks in the backward pass: less memory", resume="free")


@dataclasses.dataclass
class TextConfig(ProcessOptions):
    """Options of dataset_tools.py text: captions → text features."""

    source: str = option("files", ..., "data folder with captions, e.g. DATA_DIR; writes DATA_DIR/text")
    encoder: str = option(
        "images",
        "openai/clip-vit-large-patch14",
        "text encoder: folder or hub name of a transformers model or of an SD3 pipeline, minilm, or words (for tests)",
    )
    length: int = option("images", 77, "text tokens; longer captions are cut (SD3: 77 more)", ge=1, le=4096)
    encoder_dtype: Literal["float32", "bfloat16"] = option(
        "images", "float32", "in which the encoder computes; bfloat16: half its memory, faster, features 1% off"
    )
    dtype: Literal["float32", "float16"] = option("files", "float16", "how the features are stored")
    packed: bool = option("files", False, "write one large file that training maps, in DATA_DIR/packed")
    batch_size: int = option("system", 64, "images per batch, with all their captions", ge=1, le=2**31 - 1)
    workers: int = option("system", 4, "threads of each process that write", ge=1, le=1024)
