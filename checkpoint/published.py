"""Import of the published code's checkpoints and of bare state dicts."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from checkpoint.records import check_state_dict, recorded_arguments, recorded_config, recorded_step
from checkpoint.shapes import Shapes, hdit, hdit_patches, interface, mmdit, qk_norm, uvit
from checkpoint.weights import MODEL_OPTIONS, Weights
from common.errors import UserError
from config.options import ARCHITECTURE_KEYS
from models.layers import sincos_position_embedding
from models.published import PREDICTIONS, PREDICTS, SIGNATURES, import_state_dict, network_part, published_family
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


def is_k_diffusion(state: dict[str, Any]) -> bool:
    """Whether it is a checkpoint of k-diffusion's training."""
    return isinstance(state.get("model"), dict) and isinstance(state.get("model_ema"), dict)


def k_diffusion_arguments(config: Any, path: Path) -> dict[str, Any]:
    """The arguments of `HDiT` that k-diffusion's configuration has and the weights do not tell. Raises UserError where it is none."""
    if config is None:
        return {}
    try:
        model = config["model"]
        arguments = {name: list(model[name]) for name in ("input_size", "depths", "widths")}
        arguments["patch_size"] = model["patch_size"][0]
        if "self_attns" in model:  # else those of `HDiT`'s sizes
            default = {"neighborhood": {"kernel_size": 7}}
            kinds = [default.get(a["type"], {}) | a for a in model["self_attns"]]
            sizes = ("kernel_size", "window_size")
            arguments["attentions"] = [[a["type"], *(a[name] for name in sizes if name in a)] for a in kinds]
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"{path}: its config is none of k-diffusion's image_transformer_v2") from None
    return recorded_arguments(arguments, None, path)


# What the latents of others are, by their channels: SD3's and SD3.5's, and pixels for models that have no VAE.
FOREIGN_LATENTS = {
    4: SD_VAE,
    16: VAERecord("stabilityai/stable-diffusion-3-medium-diffusers", None, 8, 16, 1.5305, 0.0609),
    3: VAERecord("none", None, 1, 3, 1.0, 0.0),
}


def read_bare(
    path: Path, state_dict: dict[str, Any], given: dict[str, Any], arguments: dict[str, Any] | None = None
) -> Weights:
    """A state dict under published names or ours: what its shapes tell, and for what they don't, the options `given`.

    `arguments`: the model's constructor's, as far as a configuration beside the weights holds them.
    """
    state_dict, family, foreign = _under_our_names(path, state_dict)
    is_published_elit = any(k.startswith("input_token_editor.") for k in state_dict)
    state_dict = {_our_name(k): v for k, v in state_dict.items()}
    _check_dimensions(path, state_dict)
    shapes, arguments = Shapes(path, family, state_dict), arguments or {}
    given = given | {k: v for k, v in arguments.items() if k in MODEL_OPTIONS and k != "qk_norm"}
    patch_size, channels = _patches(shapes, given, arguments, bool(foreign))
    if given.get("vae"):
        record = load_vae(given["vae"])[1]
    else:
        record = FOREIGN_LATENTS.get(channels, SD_VAE) if foreign else SD_VAE
    if channels != record.latent_channels:
        raise UserError(
            f"{path}: the model's latents have {channels} channels, {record.vae}'s {record.latent_channels}; give --vae"
        )
    config = _architecture(shapes, patch_size, given, arguments, record, bool(foreign))
    if foreign in PREDICTS:
        config["predicts"] = PREDICTS[foreign]
    spec = models.model_spec(config["model"])
    if "SiT" in family and "stages_count" not in config:
        for name in ("final_layer.linear.weight", "final_layer.linear.bias", "t_embedder.mlp.0.weight"):
            shapes(name, state_dict[name].dim() if name in state_dict else 0)
        outputs = [len(state_dict[f"final_layer.linear.{kind}"]) for kind in ("weight", "bias")]
        if outputs == [2 * channels * patch_size**2] * 2:
            _turn_original_sit(path, state_dict, channels)
    if spec.elastic:
        names = ("head_depth", "tail_depth", "elit_tail")
        usual = spec.arguments(config["resolution"] // record.downsample_factor, levels=config.get("levels"))
        former = {**usual, **spec.former_split}
        config["elit_write"] = "published" if is_published_elit else given.get("elit_write") or "published"
        if is_published_elit:
            # There the head is `encoder_depth` blocks, and the tail latents bypass the core.
            head = given.get("encoder_depth") or PUBLISHED_HEAD_DEPTH
            config |= dict(zip(names, (head, former["tail_depth"], "skip"), strict=True))
            _turn_published_interface(state_dict, config, spec, record)
        config |= {name: given[name] for name in names if given.get(name) is not None}
        missing = ["--" + name.replace("_", "-") for name in names if name not in config]
        if missing:
            splits = ("--head-depth {head_depth} --tail-depth {tail_depth}".format(**split) for split in (usual, former))
            usually = f"{', formerly '.join(dict.fromkeys(splits))}; --elit-tail drop"
            raise UserError(f"{path}: does not tell {', '.join(missing)}; give what it was made with (by default: {usually})")
    return Weights(state_dict, config, record)


def _under_our_names(path: Path, state_dict: Any) -> tuple[dict[str, Tensor], str, str | None]:
    """The weights under our names (but the published interface's), their family, and that of published names where they had such."""
    if isinstance(state_dict, dict) and all(isinstance(k, str) for k in state_dict):
        state_dict = network_part(state_dict)
    names = {k for k in state_dict if isinstance(k, str)} if isinstance(state_dict, dict) else set()
    foreign = published_family(dict.fromkeys(names))
    if not foreign and not names & SIGNATURES:
        held = ", ".join(map(str, list(state_dict)[:3])) if isinstance(state_dict, dict) else type(state_dict).__name__
        raise UserError(f"{path}: not a checkpoint of a SiT, U-ViT, HDiT, MM-DiT, ELIT or DFM model (it holds {held})")
    state_dict = check_state_dict(state_dict, str(path))
    if any(k.startswith("decoder_blocks.") for k in state_dict):  # old REPA files
        first = depth_of(state_dict)
        state_dict = {
            re.sub(r"^decoder_blocks\.([0-9]{1,6})", lambda m: f"blocks.{int(m[1]) + first}", k): v
            for k, v in state_dict.items()
        }
    try:
        family, state_dict = import_state_dict(state_dict)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if foreign == "MMDiT" and "pos_embed" not in state_dict and "y_embedder.0.weight" not in state_dict:
        # REPA's model makes its table itself, always this one.
        width = Shapes(path, family, state_dict)("x_embedder.proj.weight", 4)[0]
        state_dict["pos_embed"] = sincos_position_embedding(width, (16, 16))[None]
    return state_dict, family, foreign


def _patches(shapes: Shapes, given: dict[str, Any], arguments: dict[str, Any], foreign: bool) -> tuple[int, int]:
    """Patch size (of DFM the finest stage's) and channels."""
    embeddings = [tuple(v.shape) for k, v in shapes.state_dict.items() if _PATCH_EMBEDDING.fullmatch(k)]
    if embeddings:
        return max(shape[-1] for shape in embeddings), embeddings[0][1]
    if "patch_embed.proj.weight" in shapes:
        shape = shapes("patch_embed.proj.weight", 4)
        if shape[2] != shape[3]:
            raise UserError(f"{shapes.path}: patch_embed.proj.weight has shape {shape}, which no model has")
        return shape[3], shape[1]
    named = models.model_spec(given["model"]).sizes["patch_size"] if given.get("model") else None
    channels = [load_vae(given["vae"])[1].latent_channels] if given.get("vae") else [4, *([3] if foreign else [])]
    return hdit_patches(shapes, arguments.get("patch_size") or named, channels)


# What a size's name says, and what is told otherwise: of a file's configuration, or of shapes alone, no arguments of their own.
_OF_NAME = ("depth", "hidden_size", "depths", "widths")
_ELSEWHERE = ("input_size", "in_channels", "num_classes", "z_dims", "encoder_depth", "fused_attn", *MODEL_OPTIONS)


def _architecture(
    shapes: Shapes, patch_size: int, given: dict[str, Any], arguments: dict[str, Any], record: VAERecord, foreign: bool
) -> dict[str, Any]:
    """The options, and under `arguments` what else of the model the shapes of a bare state dict tell; `given` fills the rest."""
    if not isinstance(given.get("resolution") or 0, int):
        raise UserError(
            f"--resolution {given['resolution']}: {shapes.path} is a bare state dict, which is read as a model of square images"
        )
    input_size = arguments.get("input_size") or (given.get("resolution") or 0) // record.downsample_factor
    rows, columns = input_size if isinstance(input_size, list) and len(input_size) == 2 else (input_size, input_size)
    if type(rows) is not int or rows != columns or not 0 <= rows * record.downsample_factor <= 2**16:
        raise UserError(f"{shapes.path}: input_size {str(input_size)[:80]}: must be the side of a square image")
    side = rows or None
    backbone = shapes.family.removeprefix("DFM-").removeprefix("ELIT-")
    if backbone == "U-ViT":
        told, grid = uvit(shapes, side, patch_size)
    elif backbone == "HDiT":
        told, grid = hdit(shapes)
    elif backbone == "MMDiT":
        told, grid = mmdit(shapes, side, patch_size, stability=foreign and "y_embedder.0.weight" in shapes)
    else:
        told, grid = _sit(shapes)
    config: dict[str, Any] = {"path_type": given.get("path_type") or "linear", "qk_norm": bool(qk_norm(shapes))}
    config["model"] = _model_name(shapes, told | {"patch_size": patch_size}, given, foreign)
    if told.get("num_classes") is not None:
        config["num_classes"] = told["num_classes"]
    if grid is None and side is None:
        raise UserError(f"{shapes.path}: does not tell the resolution; give --resolution")
    config["resolution"] = (side or 0 if grid is None else grid * patch_size) * record.downsample_factor
    if "depths" in told:
        config["levels"] = len(told["depths"])
    if "x_embedder.embedders.0.proj.weight" in shapes:
        config["stages_count"] = shapes.count("x_embedder.embedders")
    if "interface.query" in shapes:
        config |= interface(shapes)
    spec = models.model_spec(config["model"])
    usual = spec.defaults | spec.arguments(config["resolution"] // record.downsample_factor, levels=config.get("levels"))
    found = {
        k: v for k, v in told.items() if k not in _OF_NAME and (k != "num_classes" or (v is None and not told.get("text")))
    }
    found |= {k: v for k, v in arguments.items() if k not in _ELSEWHERE and spec.takes(k)}
    norm = qk_norm(shapes)
    if norm != ((spec.qk_norm or True) if norm else usual.get("qk_norm") or False):
        found["qk_norm"] = norm or (None if spec.text else False)
    found = {k: v for k, v in found.items() if _listed(v) != _listed(usual.get(k))}
    return config | ({"arguments": found} if found else {})


def _listed(value: Any) -> Any:
    """The value as JSON gives it back."""
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value


def _sit(shapes: Shapes) -> tuple[dict[str, Any], int | None]:
    """SiT's arguments, in all of its layouts and as DFM, and the side of its token grid where a table of positions tells it."""
    state_dict = shapes.state_dict
    width = next(v.shape[0] for k, v in state_dict.items() if _PATCH_EMBEDDING.fullmatch(k))
    told = {"depth": depth_of(state_dict), "hidden_size": width}
    if "y_embedder.embedding_table.weight" in shapes:
        told["num_classes"] = len(state_dict["y_embedder.embedding_table.weight"]) - 1
    return told, math.isqrt(state_dict["pos_embed"].shape[1]) if "pos_embed" in shapes else None


def _model_name(shapes: Shapes, told: dict[str, Any], given: dict[str, Any], foreign: bool) -> str:
    """The registered name of the family with these sizes; where there is none, the one that is given."""
    if "depths" in told:
        depth, width = told["depths"][-1], told["widths"][-1]
        sizes = {"inner_depth": depth, "inner_width": width, "patch_size": told["patch_size"]}
        sizes |= {"outer_depth": told["depths"][0]} if len(told["depths"]) > 1 else {}
    else:
        depth, width = told["depth"], told["hidden_size"]
        sizes = {"depth": depth, "hidden_size": width, "patch_size": told["patch_size"]}
    fits = [n for n, s in models.MODELS.items() if s.family == shapes.family and sizes.items() <= s.sizes.items()]
    if given.get("model"):
        spec = models.model_spec(given["model"])
        if (fits and spec.name not in fits) or spec.family != shapes.family:
            raise UserError(f"--model {given['model']}: {shapes.path} holds a {fits[0] if fits else shapes.family}")
        return spec.name
    if not fits:
        what = f"{shapes.family} of depth {depth} and width {width}"
        if foreign and shapes.family in PREDICTS:
            what = f"published {what}, which predicts {PREDICTIONS[PREDICTS[shapes.family]]},"
        raise UserError(f"{shapes.path}: a {what} is no registered size; give --model")
    return fits[0]


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
