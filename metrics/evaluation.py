"""The whole evaluation: two sets of images → features, on any number of processes → figures."""

import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor

from common.errors import UserError, did_you_mean, first_line
from config.tool_options import EvaluateConfig, FeatureNetworks, MetricOptions
from metrics import feature_extractors
from metrics.clip_score import ClipScore, clip_score, prompts_of
from metrics.distances import cmmd, kid, mind
from metrics.feature_extractors import Network
from metrics.features import IN_FILE, Features, gather, read_batches
from metrics.images import ImageSet, open_images
from metrics.precision_recall import density_coverage, precision_recall
from metrics.statistics import covariance_problem, frechet_distance, inception_score, score_of_logits

# Metric → the features that it looks at: of ADM's evaluator, and those on demand.
ADM = {"fid": "pool", "sfid": "spatial", "is": "logits", "precision": "pool", "recall": "pool"}
ON_DEMAND = {"fdd": "dinov2", "kid": "pool", "mind": "pool", "density": "pool", "coverage": "pool"}
ON_DEMAND |= dict.fromkeys(("dino_precision", "dino_recall", "dino_density", "dino_coverage"), "dinov2") | {"cmmd": "clip"}
ON_DEMAND |= {"clip_score": "clip_score"}
OF_SAMPLES = ("is", "clip_score")  # metrics that do not look at the reference
NEEDS = ADM | ON_DEMAND
METRICS = tuple(NEEDS)
NAMES = {name: name.capitalize().replace("Dino_", "DINO ") for name in METRICS}  # for people
NAMES |= {"sfid": "sFID", "clip_score": "CLIP score"} | {
    name: name.upper() for name in ("fid", "is", "fdd", "kid", "mind", "cmmd")
}
HIGHER_IS_BETTER = {name for name in METRICS if name.endswith(("is", "precision", "recall", "density", "coverage", "score"))}
FRECHET = {"fid": "pool", "sfid": "spatial", "fdd": "dinov2"}
NEIGHBOURS = 3  # k of precision and recall
PRDC_NEIGHBOURS = 5  # k of density and coverage, and of all four of DINOv2's features

Warn = Callable[[str], None]


class Plan(NamedTuple):
    """What is to be computed of two sets, and by which networks."""

    metrics: list[str]
    ref: Features
    samples: Features
    networks: list[Network]


def prepare(
    config: MetricOptions,
    sets: Sequence[ImageSet],
    state: PartialState,
    warn: Warn,
    prompts: Sequence[str] | None = None,
) -> Plan:
    """Check (reference, samples) `sets` against what `config` asks for, and load the networks; no features are computed.

    `prompts`: those that the samples go round, in words, where they are known.

    Raises:
        UserError: a metric that the sets or networks do not allow, sets of different sizes or of too few images, weights.
    """
    check_names(config.metrics)
    used: list[Network] = []
    if config.features:
        used.append(feature_extractors.by_name(config.features, device_of(state)))
        probe(used[0], sets)
    metrics = choose_metrics(config, used, sets, warn)
    clip = []
    if "clip_score" in metrics:
        if not prompts:
            raise UserError(
                "--clip-score: needs prompts in words, which models of class labels and features without captions do not have"
            )
        clip = [ClipScore(config.clip_score or "", prompts, device_of(state))]
    score_on = "logits" if config.features else "pool"
    ref, samples = (plan(images, metrics, score_on if i else None) for i, images in enumerate(sets))
    check_sets(ref, samples, metrics)
    if state.is_main_process:
        for images in sets:
            images.check()
    state.wait_for_everyone()
    wanted = (ref.wanted | samples.wanted).difference(*(network.dims for network in used))
    used += load_networks(config, wanted, sets, state, warn)
    used += clip
    check_dimensions(ref, samples, metrics, used, warn)
    return Plan(metrics, ref, samples, used)


def evaluate(config: EvaluateConfig, state: PartialState, warn: Warn) -> dict[str, Any] | None:
    """Every figure that `config` asks for, and what it belongs to: the content of the JSON file. None off the main process."""
    check_names(config.metrics)
    sets = [open_images(path) for path in (config.ref, config.samples)]
    prompts = prompts_of(sets[1], config.prompts) if config.clip_score else None
    metrics, ref, samples, used = prepare(config, sets, state, warn, prompts)
    with ThreadPoolExecutor(1) as pool:
        hashes = pool.submit(lambda: [images.sha256() for images in sets]) if state.is_main_process else None
        for features, name in ((ref, "reference"), (samples, "samples")):
            gather(features, used, read_batches(features, config.batch_size, state), config.batch_size, state, name)
        if not state.is_main_process:
            return None
        assert hashes is not None
        ref_sha256, samples_sha256 = hashes.result()  # which finds damage
        figures = compute(config, metrics, ref, samples, used, device_of(state))
    return (
        {name: figures.get(name) for name in METRICS if name in (*ADM, "fdd", *metrics)}
        | {"num_ref": ref.images.count or None, "num_samples": samples.images.count or None}
        | {"ref": config.ref, "samples": config.samples, "ref_sha256": ref_sha256, "samples_sha256": samples_sha256}
        | {"statistics_from_file": {"ref": _from_file(ref, metrics), "samples": _from_file(samples, metrics)}}
        | {"networks": {n.name: {"weights": n.weights and str(n.weights), "sha256": n.sha256} for n in used}}
        | {"k": NEIGHBOURS, "pr_dtype": config.pr_dtype, "split_size": config.split_size, "batch_size": config.batch_size}
        | {"device": device_of(state).type, "versions": versions()}
    )


def device_of(state: PartialState) -> torch.device:
    """The device of this process."""
    return torch.device(state.device or "cpu")


def versions() -> dict[str, str]:
    """Of Python and of the packages that the figures depend on."""
    packages = ("torch", "numpy", "scipy", "pillow", "torch-fidelity", "timm")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


# --------------------------------------------------------------------------------------------- what is wanted, and checks


def check_names(metrics: Sequence[str]) -> None:
    """Refuse what is no metric."""
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"--metrics {name}: not a metric{did_you_mean(name, METRICS)}; choose from {' '.join(METRICS)}")


def choose_metrics(config: MetricOptions, used: Sequence[Network], sets: Sequence[ImageSet], warn: Warn) -> list[str]:
    """The metrics asked for, else all that the network's outputs and the (reference, samples) `sets` allow; and the CLIP score.

    What the sets do not allow is named in a warning. Metrics beyond ADM's are computed on demand only.
    """
    kinds = used[0].dims if used else ("pool", "spatial", "logits")
    for name in config.metrics:
        kind = NEEDS[name]
        if kind == "clip" and kind not in kinds and not config.clip_weights:
            raise UserError(
                f"--metrics {name}: needs --clip-weights, e.g. a copy of the hub's openai/clip-vit-large-patch14-336"
            )
        if kind == "clip_score" and not config.clip_score:
            raise UserError(f"--metrics {name}: needs --clip-score, a folder of transformers' CLIPModel and its tokenizer")
        if kind not in ("dinov2", "clip", "clip_score", *kinds):
            raise UserError(f"--metrics {name}: needs {kind}, which --features {config.features} does not give")
    clip_score = ["clip_score"] * bool(config.clip_score)
    if config.metrics:
        return list(dict.fromkeys([*config.metrics, *clip_score]))
    possible = [name for name, kind in ADM.items() if kind in kinds]
    metrics = [name for name in possible if not lacks(name, sets)]
    if not metrics or not sets[1].count:  # `plan` says what is missing
        return possible + clip_score
    if left_out := [f"{name} ({lacks(name, sets)})" for name in possible if name not in metrics]:
        warn(f"left out: {', '.join(left_out)}")
    return metrics + clip_score


def lacks(metric: str, sets: Sequence[ImageSet]) -> str:
    """What a metric needs and one of the (reference, samples) `sets` does not hold; an empty text where nothing is missing."""
    for images in sets[1:] if metric in OF_SAMPLES else sets:
        statistics = IN_FILE[FRECHET[metric]] if metric in FRECHET else ()
        if not images.count and not (statistics and all(name in images.statistics for name in statistics)):
            return f"{images.path.name} holds no arr_0{''.join(f', {name}' for name in statistics)}"
    return ""


def plan(images: ImageSet, metrics: Sequence[str], score_on: str | None) -> Features:
    """Which features of a set the metrics need beyond what its file holds. score_on: the features of the Inception Score."""
    needed_by: dict[str, list[str]] = {}
    gather, keep = set(), set()
    for metric in metrics:
        kind = NEEDS[metric]
        if metric in FRECHET and all(name in images.statistics for name in IN_FILE[kind]):
            continue
        if metric in OF_SAMPLES:
            if score_on is None:
                continue
            kind = score_on if metric == "is" else kind
        (gather if metric in FRECHET else keep).add(kind)
        needed_by.setdefault(kind, []).append(metric)
    if needed_by and not images.count:
        names = ", ".join(m for found in needed_by.values() for m in found)
        raise UserError(f"{images.path}: holds no arr_0 (images), which {names} need; choose others by --metrics")
    return Features(images, gather, keep)


def check_sets(ref: Features, samples: Features, metrics: Sequence[str]) -> None:
    """Refuse sets of different sizes, and too few images."""
    sizes = [f.images.size for f in (ref, samples)]
    if ref.images.count and samples.images.count and sizes[0] != sizes[1]:
        (h1, w1), (h2, w2) = sizes
        raise UserError(f"{samples.images.path}: has images of {w2}x{h2} pixels, but {ref.images.path} of {w1}x{h1}")
    for features in (ref, samples):
        images = features.images
        for metric in metrics:
            least = 2 if metric == "kid" else neighbours(metric) + 1 if neighbours(metric) else 0
            if images.count < least:
                raise UserError(f"{images.path}: {images.count} images; {metric} needs at least {least}")
        if features.gather and images.count < 2:
            raise UserError(f"{images.path}: one image has no covariance; wanted: at least 2")


def neighbours(metric: str) -> int:
    """The k of a figure of nearest neighbours; 0 for another one."""
    if metric in ("precision", "recall"):
        return NEIGHBOURS
    return PRDC_NEIGHBOURS if metric.removeprefix("dino_") in ("precision", "recall", "density", "coverage") else 0


def load_networks(
    config: FeatureNetworks, wanted: set[str], sets: Sequence[ImageSet], state: PartialState, warn: Warn
) -> list[Network]:
    """Those that give the `wanted` features. One process of each machine downloads, the others find the file."""
    used = []
    with state.local_main_process_first():
        if wanted & {"pool", "spatial"}:
            used.append(feature_extractors.inception(config.inception_weights, device_of(state), warn))
        if "dinov2" in wanted:
            used.append(feature_extractors.dinov2(config.dino_weights, device_of(state)))
        if "clip" in wanted:
            assert isinstance(config, MetricOptions) and config.clip_weights  # see `choose_metrics`
            used.append(feature_extractors.clip(config.clip_weights, device_of(state)))
    for network in used:
        probe(network, sets)
    return used


def probe(network: Network, sets: Sequence[ImageSet]) -> None:
    """Fill in what a network gives, from one image. `UserError` if that is not what a feature network gives."""
    images = next((images for images in sets if images.count), None)
    if images is None:
        raise UserError(f"{sets[-1].path}: holds no arr_0 (images)")
    batch = torch.from_numpy(images.read(range(1)).transpose(0, 3, 1, 2).copy())
    wanted = "must give a dict with pool (B, d), and spatial, logits if it has them"
    try:
        with torch.inference_mode():
            given = network.extract(batch)
    except Exception as error:  # whatever a function that is no feature network raises
        raise UserError(f"--features {network.name}: {type(error).__name__}: {first_line(error)}; {wanted}") from None
    kinds = {"pool", "spatial", "logits", "dinov2", "clip"}
    if not isinstance(given, dict) or not given or not given.keys() <= kinds or not all(map(_is_one_row, given.values())):
        raise UserError(f"--features {network.name}: {wanted}")
    network.dims = {kind: values.numel() for kind, values in given.items()}


def _is_one_row(values: object) -> bool:
    return isinstance(values, Tensor) and values.dim() > 0 and len(values) == 1 and values.numel() > 0


def check_dimensions(ref: Features, samples: Features, metrics: Sequence[str], used: Sequence[Network], warn: Warn) -> None:
    """Refuse statistics of a file that are none or do not fit the features; warn where images are fewer than dimensions."""
    dims = {kind: d for network in used for kind, d in network.dims.items()}
    few = []
    for metric in (m for m in metrics if m in FRECHET):
        kind = FRECHET[metric]
        for features in (samples, ref):
            images = features.images
            if kind in features.gather:
                if images.count < dims[kind]:
                    few.append(f"{metric} of {images.count} images in {dims[kind]} dimensions ({images.path})")
                continue
            sigma = IN_FILE[kind][1]
            mean, covariance = (images.statistics[name].shape for name in IN_FILE[kind])
            d = dims.setdefault(kind, mean[0] if mean else 0)
            if not d or mean != (d,) or covariance != (d, d):
                names = " and ".join(IN_FILE[kind])
                raise UserError(
                    f"{images.path}: {names} have shapes {mean} and {covariance}; {metric} needs ({d},) and ({d}, {d})"
                )
            if problem := covariance_problem(images.statistics[sigma]):
                raise UserError(f"{images.path}: {sigma} is no covariance: {problem}")
    if few:
        warn(f"fewer images than dimensions, so the figure is far above that of a large set: {'; '.join(few)}")


def _from_file(features: Features, metrics: Sequence[str]) -> list[str]:
    return [m for m in metrics if m in FRECHET and FRECHET[m] not in features.gather]


def compute(
    config: MetricOptions,
    metrics: Sequence[str],
    ref: Features,
    samples: Features,
    used: Sequence[Network],
    device: torch.device,
    progress: bool = True,
) -> dict[str, float]:
    """The figures, of features that are gathered. progress: bars for what takes long."""
    figures = {m: frechet_distance(*ref.gaussian(FRECHET[m]), *samples.gaussian(FRECHET[m])) for m in metrics if m in FRECHET}
    if "is" in metrics and "logits" in samples.rows:
        figures["is"] = score_of_logits(samples.rows["logits"], config.split_size)
    elif "is" in metrics:
        weight = used[0].class_weight
        assert weight is not None  # Inception has one
        figures["is"] = inception_score(samples.rows["pool"], weight, config.split_size)
    for name, distance in {"mind": mind, "cmmd": cmmd}.items():
        if name in metrics:
            figures[name] = distance(ref.rows[NEEDS[name]], samples.rows[NEEDS[name]], device=device)
    if "clip_score" in metrics:
        figures["clip_score"] = clip_score(samples.rows["clip_score"])
    if "kid" in metrics:
        figures["kid"] = kid(ref.rows["pool"], samples.rows["pool"])
    return figures | _of_neighbours(config, metrics, ref, samples, device, progress)


def _of_neighbours(
    config: MetricOptions, metrics: Sequence[str], ref: Features, samples: Features, device: torch.device, progress: bool
) -> dict[str, float]:
    figures = {}
    for prefix, kind in (("", "pool"), ("dino_", "dinov2")):
        pair = f"{prefix}precision", f"{prefix}recall"
        if set(pair) & set(metrics):
            dtype = "float32" if prefix else config.pr_dtype
            k = neighbours(pair[0])
            both = precision_recall(ref.rows[kind], samples.rows[kind], k, dtype, device=device, progress=progress)
            figures |= dict(zip(pair, both, strict=True))
        pair = f"{prefix}density", f"{prefix}coverage"
        if set(pair) & set(metrics):
            both = density_coverage(ref.rows[kind], samples.rows[kind], PRDC_NEIGHBOURS, device=device, progress=progress)
            figures |= dict(zip(pair, both, strict=True))
    return {metric: value for metric, value in figures.items() if metric in metrics}
