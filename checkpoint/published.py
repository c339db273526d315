"""Import of the published code's checkpoints and of bare state dicts."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from checkpoint.records import check_state_dict, recorded_config, recorded_step
from checkpoint.weights import Weights
from common.errors import UserError
from config.options import ARCHITECTURE_KEYS
from models.vae import SD_VAE, VAERecord, load_vae

_PUBLISHED_NAMES = {
    "input_token_editor.adapters.0.learned_query_embed": "interface.query",
    "input_token_editor.adapters.0.pos_embed": "interface.read_pos",
    "input_token_editor.adapters.0.latent_pos_embed": "interface.latent_pos",
    "input_token_editor.adapters.0.fit_layer.adaLN_modulation.": "interface.reader.adaLN_modulation.",
    "input_token_editor.adapters.0.fit_layer.latents_attend_to_patches.": "interface.reader.attn.",
    "input_token_editor.adapters.0.fit_layer.read_ff.": "interface.reader.mlp.",
    "output_token_editor.adapters.0.pos_embed": "interface.write_pos",
    "output_token_editor.adapters.0.patches_attend_to_latents.": "interface.writer.attn.",
    "output_token_editor.adapters.0.write_ff.": "interface.writer.mlp.",
}


_PATCH_EMBEDDING = re.compile(r"x_embedder\.(embedders\.\d+\.)?proj\.weight")


PUBLISHED_HEAD_DEPTH = 8  # of an ELIT model whose checkpoint records no encoder_depth


_DIMENSIONS = {  # of the tensors whose shapes tell the architecture, or that are converted
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "t_embedder.mlp.0.weight": 2,
    "final_layer.linear.weight": 2,
    "final_layer.linear.bias": 1,
    "interface.query": 2,
    "interface.reader.adaLN_modulation.1.weight": 2,
    "interface.reader.adaLN_modulation.1.bias": 1,
}


def _check_dimensions(path: Path, state_dict: dict[str, Tensor]) -> None:
    for name, tensor in state_dict.items():
        wanted = 4 if _PATCH_EMBEDDING.fullmatch(name) else _DIMENSIONS.get(name, tensor.dim())
        if tensor.dim() != wanted or (wanted == 4 and tensor.shape[2] != tensor.shape[3]):
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, which no model has")


def depth_of(state_dict: dict[str, Tensor]) -> int:
    """One more than the highest number of a block."""
    return 1 + max((int(m[1]) for k in state_dict if (m := re.match(r"blocks\.([0-9]{1,6})\.", k))), default=-1)


def read_published(path: Path, state: dict[str, Any], weights: str) -> Weights:
    """The published ELIT code's format: `model`, `ema`, `steps` and an argparse Namespace of the options."""
    if weights not in ("ema", "model") or weights not in state:
        raise UserError(f"--weights {weights}: not in {path}; it holds {', '.join(k for k in ('model', 'ema') if k in state)}")
    recorded = {k: v for k, v in vars(state["args"]).items() if k in ARCHITECTURE_KEYS and v is not None}
    recorded = recorded_config(recorded, path)
    found = read_bare(path, state[weights], recorded)
    return Weights(found.state_dict, recorded | found.config, step=recorded_step(state.get("steps", 0), path))


def read_bare(path: Path, state_dict: dict[str, Any], given: dict[str, Any]) -> Weights:
    """A state dict under the published names or ours: what its shapes tell, and for what they don't, the options `given`."""
    if not isinstance(state_dict, dict) or not any(isinstance(k, str) and _PATCH_EMBEDDING.fullmatch(k) for k in state_dict):
        held = ", ".join(map(str, list(state_dict)[:3])) if isinstance(state_dict, dict) else type(state_dict).__name__
        raise UserError(f"{path}: not a checkpoint of a SiT, ELIT or DFM model (it holds {held})")
    state_dict = check_state_dict(state_dict, str(path))
    if any(k.startswith("decoder_blocks.") for k in state_dict):  # old REPA files
        first = depth_of(state_dict)
        state_dict = {
            re.sub(r"^decoder_blocks\.([0-9]{1,6})", lambda m: f"blocks.{int(m[1]) + first}", k): v
            for k, v in state_dict.items()
        }
    published = any(k.startswith("input_token_editor.") for k in state_dict)
    state_dict = {_our_name(k): v for k, v in state_dict.items()}
    _check_dimensions(path, state_dict)
    channels = next(v.shape[1] for k, v in state_dict.items() if _PATCH_EMBEDDING.fullmatch(k))
    record = load_vae(given["vae"])[1] if given.get("vae") else SD_VAE
    if channels != record.latent_channels:
        raise UserError(
            f"{path}: the model's latents have {channels} channels, {record.vae}'s {record.latent_channels}; give --vae"
        )
    config = _shapes(path, state_dict, given, record)
    spec = models.model_spec(config["model"])
    if "stages_count" not in config:
        for name in ("final_layer.linear.weight", "final_layer.linear.bias", "t_embedder.mlp.0.weight"):
            if name not in state_dict:
                raise UserError(f"{path}: not a checkpoint of a {config['model']}: {name} is missing")
        outputs = [len(state_dict[f"final_layer.linear.{kind}"]) for kind in ("weight", "bias")]
        if outputs == [2 * channels * spec.sizes["patch_size"] ** 2] * 2:
            _turn_original_sit(path, state_dict, channels)
    if spec.elastic:
        names = ("head_depth", "tail_depth", "elit_tail")
        former = {**spec.sizes, **spec.former_split}
        if published:
            # There the head is `encoder_depth` blocks, and the tail latents bypass the core.
            head = given.get("encoder_depth") or PUBLISHED_HEAD_DEPTH
            config |= dict(zip(names, (head, former["tail_depth"], "skip"), strict=True)) | {"elit_write": "published"}
            _turn_published_interface(state_dict, config, spec, record)
        config |= {name: given[name] for name in names if given.get(name) is not None}
        missing = ["--" + name.replace("_", "-") for name in names if name not in config]
        if missing:
            splits = ("--head-depth {head_depth} --tail-depth {tail_depth}".format(**split) for split in (spec.sizes, former))
            usual = f"{', formerly '.join(dict.fromkeys(splits))}; --elit-tail drop"
            raise UserError(f"{path}: does not tell {', '.join(missing)}; give what it was made with (by default: {usual})")
    return Weights(state_dict, config, record)


def _shapes(path: Path, state_dict: dict[str, Tensor], given: dict[str, Any], record: VAERecord) -> dict[str, Any]:
    """The architecture options that the shapes of a bare state dict tell; `given` fills what they do not."""
    config = {"path_type": given.get("path_type") or "linear"}
    embeddings = [v.shape for k, v in state_dict.items() if _PATCH_EMBEDDING.fullmatch(k)]  # of DFM, one for each stage
    width, patch_size = embeddings[0][0], max(shape[-1] for shape in embeddings)
    depth = depth_of(state_dict)
    elit = "interface.query" in state_dict
    has_stages = "x_embedder.proj.weight" not in state_dict
    family = ("DFM-" if has_stages else "") + ("ELIT-SiT" if elit else "SiT")
    sizes = {"depth": depth, "hidden_size": width, "patch_size": patch_size}
    fits = [n for n, s in models.MODELS.items() if s.family == family and sizes.items() <= s.sizes.items()]
    if given.get("model"):
        config["model"] = given["model"]
        if fits and given["model"] not in fits:
            raise UserError(f"--model {given['model']}: {path} holds a {fits[0]}")
    elif fits:
        config["model"] = fits[0]
    else:
        raise UserError(f"{path}: a {family} of depth {depth} and width {width} is no registered size; give --model")
    if "y_embedder.embedding_table.weight" in state_dict:
        config["num_classes"] = len(state_dict["y_embedder.embedding_table.weight"]) - 1
    if "pos_embed" in state_dict:
        config["resolution"] = math.isqrt(state_dict["pos_embed"].shape[1]) * patch_size * record.downsample_factor
    elif given.get("resolution"):
        config["resolution"] = given["resolution"]
    else:
        raise UserError(f"{path}: does not tell the resolution; give --resolution")
    config["qk_norm"] = "blocks.0.attn.q_norm.weight" in state_dict
    if has_stages:
        config["stages_count"] = len(embeddings)
    if elit:
        hidden = state_dict.get("interface.reader.mlp.0.fc1.weight")
        config["elit_mlp_ratio"] = len(hidden) / width if hidden is not None and hidden.dim() == 2 else 1.0
        config["elit_group_size"] = math.isqrt(len(state_dict["interface.query"]))
        for name, layers in (("elit_read_depth", "reader"), ("elit_write_depth", "writer")):
            config[name] = len({k for k in state_dict if re.fullmatch(rf"interface\.{layers}\.attn\.\d+\.q_proj\.weight", k)})
    return config


def _turn_original_sit(path: Path, state_dict: dict[str, Tensor], channels: int) -> None:
    """Fold original SiT's conventions into the weights: v(x, t) = −v_SiT(x, 1 − t), and of 2C output channels the first C.

    The sinusoidal features of 1 − t are a rotation of those of t, since cos((1−t)f) = cos f·cos tf + sin f·sin tf and
    sin((1−t)f) = sin f·cos tf − cos f·sin tf; the rotation goes into the time MLP's first Linear, the sign into the last one.
    """
    for kind in ("weight", "bias"):
        value = state_dict[f"final_layer.linear.{kind}"]
        kept = value.unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1)
        state_dict[f"final_layer.linear.{kind}"] = -kept
    weight = state_dict["t_embedder.mlp.0.weight"]
    if weight.shape[1] % 2:
        raise UserError(f"{path}: t_embedder.mlp.0.weight has an odd number of columns, which no model has")
    half = weight.shape[1] // 2
    f = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float64))
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    turned = torch.cat([of_cos * f.cos() + of_sin * f.sin(), of_cos * f.sin() - of_sin * f.cos()], dim=1)
    state_dict["t_embedder.mlp.0.weight"] = turned.to(weight.dtype)


def _our_name(name: str) -> str:
    """A published name of the elastic interface → ours; any other name as it is."""
    published = next((p for p in _PUBLISHED_NAMES if name.startswith(p)), "")
    return _PUBLISHED_NAMES.get(published, "") + name[len(published) :]


def _turn_published_interface(
    state_dict: dict[str, Tensor], config: dict[str, Any], spec: models.ModelSpec, record: VAERecord
) -> None:
    """Published tables of the interface, under our names → ours: six parts of modulation, latent positions in group order."""
    for kind in ("weight", "bias"):
        key = f"interface.reader.adaLN_modulation.1.{kind}"
        if key in state_dict:
            state_dict[key] = state_dict[key][: 6 * spec.sizes["hidden_size"]]  # nothing uses the seventh part
    side = config["resolution"] // record.downsample_factor // spec.sizes["patch_size"]
    g = config["elit_group_size"]
    table = state_dict.get("interface.latent_pos")
    if table is not None and side and side % g == 0 and table.dim() == 2 and len(table) >= side * side:
        # Raster order of the token grid there, group order here.
        grid = table[: side * side].reshape(side // g, g, side // g, g, -1)
        state_dict["interface.latent_pos"] = grid.transpose(1, 2).reshape(-1, g * g, table.shape[1])
