"""The checkpoint that guides another one in sampling (`--guide-ckpt`): what it must share with it."""

import models
from checkpoint import reading
from checkpoint.architecture import resolve_architecture
from checkpoint.weights import Weights
from common.errors import UserError
from common.sizes import latent_sides
from config.options import Architecture, GenerateConfig, InferenceTool
from flows import flow_of
from models.elit import budget_to_k


def check_options(config: GenerateConfig | InferenceTool) -> None:
    """Refuse options of a guide where there is none; before a checkpoint is read or downloaded."""
    defaults = type(config)()
    for name in ("guide_budget", "guide_label", "guide_weights"):
        if config.guide_ckpt is None and getattr(config, name) != getattr(defaults, name):
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(config, name)}: is an option of a guide; give --guide-ckpt too"
            )


def read(config: GenerateConfig | InferenceTool, weights: Weights) -> Weights | None:
    """The guide's weights, with its architecture; None where there is no guide.

    Args:
        config: the options, with the architecture of the model filled in.
        weights: of the model.

    Raises:
        UserError: it cannot guide this model.
    """
    channels = weights.record.latent_channels
    if config.cfg_channels is not None and config.cfg_channels > channels:
        raise UserError(f"--cfg-channels {config.cfg_channels}: the model's latents have {channels} channels")
    if config.guide_ckpt is None:
        return None
    own = Architecture(resolution=config.resolution, num_classes=config.num_classes)
    try:
        guide = reading.read_weights(config.guide_ckpt, config.guide_weights, {})
        resolve_architecture(own, {}, guide, config.guide_ckpt)
    except UserError as error:
        message = str(error).replace("--weights", "--guide-weights")
        hint = "; for a guide, convert_checkpoint.py records it" if "give --" in message else ""
        raise UserError(f"--guide-ckpt: {message}{hint}") from None
    _check(config, weights, own, guide)
    return guide


def _check(config: GenerateConfig | InferenceTool, weights: Weights, own: Architecture, guide: Weights) -> None:
    where, spec = f"--guide-ckpt {config.guide_ckpt}", models.model_spec(own.model)
    if guide.takes_text != weights.takes_text:
        kinds = ["text" if w.takes_text else "class labels" for w in (guide, weights)]
        raise UserError(f"{where}: holds a {own.model}, which is conditioned on {kinds[0]}, but the model on {kinds[1]}")
    if guide.text is not None and weights.text is not None:
        guide.text.check_same(weights.text, where, f"--ckpt {config.ckpt}")
    guide.check_velocity(where)
    states = [_states(options, w) for options, w in ((own, guide), (config, weights))]
    if states[0] != states[1]:
        theirs, ours = (" and ".join("×".join(map(str, shape)) for shape in shapes) for shapes in states)
        raise UserError(f"{where}: guides latents of {theirs}, but the model's are {ours}")
    for name in ("vae_class", "scaling_factor", "shift_factor", "channel_mean", "channel_std"):
        values = getattr(guide.record, name), getattr(weights.record, name)
        if values[0] != values[1]:
            shown = [str(value)[:60] for value in values]
            raise UserError(f"{where}: its latents have {name} {shown[0]}, but the model's {shown[1]}: they are not alike")
    if own.path_type != config.path_type:
        raise UserError(f"{where}: was trained with path_type {own.path_type}, but the model with {config.path_type}")
    if config.guide_label == "same" and not guide.takes_text and own.num_classes != config.num_classes:
        raise UserError(
            f"{where}: knows {own.num_classes} classes, but the model {config.num_classes}; --guide-label none guides without a label"
        )
    if config.guide_budget is not None:
        if not spec.elastic:
            raise UserError(
                f"--guide-budget {config.guide_budget}: the guide, a {own.model}, has no budget; only ELIT models do"
            )
        try:
            budget_to_k(config.guide_budget, own.elit_group_size**2)
        except UserError as error:
            raise UserError(f"--guide-budget: {error}") from None


def _states(options: Architecture, weights: Weights) -> list[tuple[int, ...]]:
    """The shapes (C, h, w) that a sampler moves from noise to data."""
    size = latent_sides(options.resolution, weights.record.downsample_factor)
    return [tuple(shape) for shape in flow_of(options).state_shapes((weights.record.latent_channels, *size))]
