"""What a model is conditioned on: class labels (B,) int64, or `Text`; and the null condition that guidance subtracts.

Losses and samplers handle a condition through `map_condition` alone, and so serve labels and text without asking which.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import UserError


class Text(NamedTuple):
    """A batch of encoded prompts: `features` (B, L, E), one vector per text token; `pooled` (B, P), one per prompt, or `None`."""

    features: Tensor
    pooled: Tensor | None = None


Condition = Tensor | Text


def map_condition(fn: Callable[..., Tensor], *conditions: Condition) -> Condition:
    """`fn` of the tensors at the same place in each condition: `map_condition(lambda *y: torch.cat(y), y, null)`.

    Raises:
        UserError: labels beside text, or pooled text beside text without it.
    """
    if not any(isinstance(y, Text) for y in conditions):
        return fn(*conditions)
    if not all(isinstance(y, Text) for y in conditions):
        raise UserError("class labels and text cannot be joined into one batch")
    features, pooled = zip(*conditions, strict=True)
    if len({p is None for p in pooled}) == 2:
        raise UserError("text with and without pooled features cannot be joined into one batch")
    return Text(fn(*features), None if pooled[0] is None else fn(*pooled))


def condition_of(batch: Mapping[str, Any]) -> Condition:
    """The condition of a batch of `data.LatentDataset`: its "text" (B, L, E), with "pooled" (B, P) if it has that; else "label" (B,)."""
    return Text(batch["text"], batch.get("pooled")) if "text" in batch else batch["label"]


def select(drop: Tensor, null: Condition, y: Condition) -> Condition:
    """`null` where `drop` (B,) is true, `y` elsewhere."""
    return map_condition(lambda a, b: torch.where(drop.view(-1, *[1] * (b.dim() - 1)), a, b), null, y)


def null_condition(model: Any, y: Condition) -> Condition:
    """The condition that says nothing, of the shape of y, for any model, also within DDP: its `null(y)`, or label `num_classes`."""
    model = getattr(model, "module", model)
    return model.null(y) if hasattr(model, "null") else map_condition(lambda v: torch.full_like(v, model.num_classes), y)


def check_labels(y: Condition | None, model: str) -> Tensor:
    """The labels y. Raises UserError where a model of class labels is given anything else."""
    if not isinstance(y, Tensor) or y.is_floating_point():
        given = "text" if isinstance(y, Text) else "no label" if y is None else f"a tensor of {y.dtype}"
        raise UserError(f"{model} is conditioned on class labels (B,) int64, not on {given}")
    return y


def check_text(y: Condition | None, model: str, *, width: int, length: int | None, pooled_width: int | None) -> Text:
    """The text y. Raises UserError where a text model is given labels, or text of another width or length (`None`: any length)."""
    if not isinstance(y, Text):
        raise UserError(f"{model} is conditioned on text features, not on class labels: y must be a Text(features, pooled)")
    if y.features.dim() != 3 or y.features.shape[2] != width:
        raise UserError(
            f"{model} takes text features (B, L, {width}), not {tuple(y.features.shape)}: another text encoder made them"
        )
    if length is not None and y.features.shape[1] != length:
        raise UserError(
            f"{model} takes text of {length} tokens, not {y.features.shape[1]}: encode the prompts with length {length}"
        )
    if pooled_width is None and y.pooled is not None:
        raise UserError(f"{model} takes no pooled text features; this text has some of width {y.pooled.shape[-1]}")
    if pooled_width is not None and (y.pooled is None or y.pooled.shape[1:] != (pooled_width,)):
        given = "there are none" if y.pooled is None else f"not {tuple(y.pooled.shape)}"
        raise UserError(f"{model} takes pooled text features (B, {pooled_width}), {given}")
    return y


class NullText(nn.Module):
    """Mixin of text models, before the backbone: the encoded empty prompt, kept so that a checkpoint guides without its encoder.

    Buffers `null_text` (L, E) and `null_pooled` (P,); both `None` until `set_null_text` or a checkpoint provides them.
    """

    null_text: Tensor | None
    null_pooled: Tensor | None

    def __init__(self, **backbone: Any):
        super().__init__(**backbone)
        self.register_buffer("null_text", None)
        self.register_buffer("null_pooled", None)

    def set_null_text(self, features: Tensor, pooled: Tensor | None = None) -> None:
        """Keep the features (L, E) and pooled features (P,) of the empty prompt."""
        self.null_text, self.null_pooled = features, pooled

    def null(self, y: Condition) -> Text:
        """The empty prompt, once for each prompt of `y`.

        Raises:
            UserError: the model has none, or one of another size than `y`.
        """
        if not isinstance(y, Text):
            raise UserError("this model is conditioned on text features, not on class labels")
        if self.null_text is None:
            raise UserError("this model has no null_text, the features of the empty prompt: it cannot guide or drop prompts")
        pooled = None if y.pooled is None or self.null_pooled is None else self.null_pooled.to(y.pooled).expand_as(y.pooled)
        if self.null_text.shape != y.features.shape[1:] or (pooled is None) != (y.pooled is None):
            raise UserError(
                f"text of {tuple(y.features.shape[1:])} (tokens, width) beside a null_text of {tuple(self.null_text.shape)}, "
                "or only one with pooled text: encode both in the same way"
            )
        return Text(self.null_text.to(y.features).expand_as(y.features), pooled)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A model just built has no null text: it takes the checkpoint's, whatever its length.
        for name in ("null_text", "null_pooled"):
            if getattr(self, name) is None and prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=next(self.parameters()).device))
        super()._load_from_state_dict(state_dict, prefix, *rest)
