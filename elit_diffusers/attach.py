"""Read and Write in a transformer of diffusers, by hooks on its blocks."""

import functools
import inspect
import json
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.errors import UserError
from common.files import parse_json
from common.tensor_files import load_safetensors, save_safetensors
from elit_diffusers.families import family_of
from models.latent_interface import LatentInterface, budget_to_k

CHILD = "elit"  # the name under which the interface is a part of the transformer
METADATA = "elit"  # of its safetensors file
# Added to the image's tokens after each block, or in place of one: they do not fit latents.
RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states")


@dataclass
class _Pass:
    """One forward of the transformer: what Read leaves for the core and for Write."""

    interface: LatentInterface
    budget: float | None
    tokens: Tensor | None = None  # (B, G, J, D)
    positions: Any = None  # of the latents, as the blocks take them


class ElasticTransformer(nn.Module):
    """A transformer of diffusers whose core blocks run on the latents of an interface; made by `attach`.

    The module itself holds the interface's parameters alone, and is a part of the transformer, so that `.to`, optimizers and
    DDP find them there. Calling it calls the transformer, which may be called directly, too: pipelines do.

    The image's tokens become latents; text stays as it is and takes part in every block. Latent j of a group has the rotary
    position of the group's token j (row-major). The interface has no positions of its own, so that it serves every image size
    whose token grid can be cut into groups.

    Args:
        transformer: a transformer of a supported class.
        read_after, write_after: blocks before Read, and before Write; the blocks between them are the core.
        group_size: side of a group, in tokens.
        read_depth, write_depth: cross-attention layers.
    """

    def __init__(self, transformer: Any, read_after: int, write_after: int, group_size: int, read_depth: int, write_depth: int):
        super().__init__()
        name, self.family = family_of(transformer)
        read_after, write_after, group_size = map(operator.index, (read_after, write_after, group_size))
        read_depth, write_depth = operator.index(read_depth), operator.index(write_depth)
        if hasattr(transformer, CHILD):
            raise UserError(f"{name}: has an interface already; detach() that one first")
        blocks = [block for stack in self.family.stacks for block in getattr(transformer, stack)]
        if not 0 <= read_after < write_after <= len(blocks):
            raise UserError(
                f"read_after {read_after}, write_after {write_after}: {name} has {len(blocks)} blocks; "
                f"0 ≤ read_after < write_after ≤ {len(blocks)} must hold"
            )
        self.options = {"class": name, "read_after": read_after, "write_after": write_after, "group_size": group_size}
        self.options |= {"read_depth": read_depth, "write_depth": write_depth}
        heads = transformer.config.num_attention_heads
        grid = (group_size, group_size)  # the smallest; each forward brings its own
        interface = LatentInterface(
            transformer.inner_dim, heads, grid, group_size, read_depth=read_depth, write_depth=write_depth, latent_pos=False
        )
        parameter = next(transformer.parameters())
        self.interface = interface.to(parameter.device, parameter.dtype)
        self._budget: float | None = None
        self._unconditional_budget: float | None = None
        self._pass: _Pass | None = None
        self._context: str | None = None
        self._checkpoint: Any = None
        self._enabled = True
        self._core = blocks[read_after:write_after]
        self._bind(transformer)

    def _bind(self, transformer: Any) -> None:
        self.__dict__["_transformer"] = transformer  # past nn.Module: it is no child of its own part
        transformer.add_module(CHILD, self)
        self._hooks = [
            transformer.register_forward_pre_hook(self._begin, with_kwargs=True),
            transformer.register_forward_hook(self._end, always_call=True),
            self._core[-1].register_forward_hook(self._write),
            *(block.register_forward_pre_hook(self._enter, with_kwargs=True) for block in self._core),
        ]
        if self.family.separate_guidance:
            self._cache_context = transformer.cache_context
            transformer.cache_context = self._named_context

    @property
    def transformer(self) -> Any:
        """The transformer."""
        return self.__dict__["_transformer"]

    @property
    def budget(self) -> float | None:
        """The share of latents that the core works on, in [1/J, 1] (J tokens a group); `None`: all."""
        return self._budget

    @budget.setter
    def budget(self, value: float | None) -> None:
        budget_to_k(value, self.interface.latents_per_group)
        self._budget = value

    @property
    def unconditional_budget(self) -> float | None:
        """The budget of the unconditional pass of guidance (cheap guidance); `None`: as the conditional one.

        The pipelines of Qwen-Image and FLUX run that pass by itself; SD3's runs both in one batch.
        """
        return self._unconditional_budget

    @unconditional_budget.setter
    def unconditional_budget(self, value: float | None) -> None:
        if value is not None and not self.family.separate_guidance:
            raise UserError("unconditional_budget: SD3's pipelines run both passes of guidance in one batch, at one budget")
        budget_to_k(value, self.interface.latents_per_group)
        self._unconditional_budget = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer's forward."""
        return self.transformer(*args, **kwargs)

    @contextmanager
    def original(self) -> Iterator[None]:
        """In this context the transformer computes what it did before `attach`, to the bit."""
        enabled, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = enabled

    def detach(self) -> None:
        """Take the interface and all hooks out of the transformer, which is then what it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if getattr(self.transformer, CHILD, None) is self:
            delattr(self.transformer, CHILD)
            self.transformer.__dict__.pop("cache_context", None)

    def save(self, path: str | Path, *, whole: bool = False, **metadata: str) -> None:
        """Write the interface to a safetensors file, for `load`; `whole`: with the transformer's own weights.

        Raises:
            WriteError: it cannot be written.
        """
        tensors = {f"{CHILD}.{k}": v for k, v in self.state_dict().items()}
        if whole:
            tensors = self.transformer.state_dict()
        tensors = {k: v.detach().contiguous() for k, v in tensors.items()}
        save_safetensors(path, tensors, {METADATA: json.dumps(self.options), **metadata})

    # One forward of the transformer: _begin, then in the blocks _enter (Read in the first) and _write, then _end.

    def _begin(self, transformer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._pass = None
        if not self._enabled:
            return
        arguments = _by_name(transformer, args, kwargs)
        for name in RESIDUALS:
            if arguments.get(name) is not None:
                raise UserError(f"{name}: ControlNet's residuals are tokens, and the core works on latents; detach() first")
        if getattr(transformer, "is_cache_enabled", False):
            raise UserError(
                "enable_cache: skips blocks, among them those that read and write the latents; disable_cache() first"
            )
        skipped = {self.options["read_after"], self.options["write_after"] - 1} & set(arguments.get("skip_layers") or ())
        if skipped:
            raise UserError(f"skip_layers: block {min(skipped)} reads or writes the latents and cannot be skipped")
        interface = self._interface_on(*self.family.grid(transformer, arguments))
        unconditional = self._context == "uncond" and self._unconditional_budget is not None
        current = self._pass = _Pass(interface, self._unconditional_budget if unconditional else self._budget)
        if transformer.gradient_checkpointing:  # blocks run again in the backward pass, when this is no longer the current one
            checkpoint = self._checkpoint = transformer._gradient_checkpointing_func

            def run_checkpointed(block: nn.Module, *inputs: Any) -> Any:
                return checkpoint(functools.partial(self._in_pass, current, block), *inputs)

            transformer._gradient_checkpointing_func = run_checkpointed

    def _interface_on(self, rows: int, columns: int) -> LatentInterface:
        try:
            return self.interface.on_grid((rows, columns))
        except UserError:
            g = self.options["group_size"]
            raise UserError(
                f"an image of {rows}×{columns} tokens cannot be cut into groups of {g}×{g}: both sides must be multiples of {g} "
                f"tokens ({16 * g} pixels where a token is 16×16)"
            ) from None

    def _in_pass(self, current: _Pass, block: nn.Module, *inputs: Any) -> Any:
        outer, self._pass = self._pass, current
        try:
            return block(*inputs)
        finally:
            self._pass = outer

    def _end(self, transformer: Any, args: tuple, output: Any) -> None:
        self._pass = None
        if self._checkpoint is not None:
            transformer._gradient_checkpointing_func, self._checkpoint = self._checkpoint, None

    def _enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        current = self._pass
        if current is None:
            return None
        arguments = _by_name(block, args, kwargs)
        if block is self._core[0]:
            arguments["hidden_states"] = self._read(current, arguments)
        if current.positions is not None:
            arguments["image_rotary_emb"] = current.positions
        return (), arguments

    def _read(self, current: _Pass, arguments: dict[str, Any]) -> Tensor:
        """Tokens (B, N, D) → latents (B, G·k, D), in their dtype."""
        x, interface = arguments["hidden_states"], current.interface
        dtype = interface.query.dtype
        current.tokens, latents, _ = interface.read(x.to(dtype), arguments["temb"].to(dtype), current.budget)
        k = latents.shape[1] // interface.num_groups
        if (rotary := arguments.get("image_rotary_emb")) is not None:
            current.positions = self.family.gather_positions(rotary, x.shape[1], lambda table: interface.gather(table, k))
        return latents.to(x.dtype)

    def _write(self, block: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
        current = self._pass
        if current is None:
            return None
        text, latents = output
        assert current.tokens is not None
        tokens = current.interface.write(current.tokens, latents.to(current.tokens.dtype))
        return text, tokens.to(latents.dtype)

    @contextmanager
    def _named_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """`cache_context`, by whose name pipelines tell the two passes of guidance apart."""
        outer, self._context = self._context, name
        try:
            with self._cache_context(name, **kwargs):
                yield
        finally:
            self._context = outer


def attach(
    transformer: nn.Module,
    read_after: int = 8,
    write_after: int = 52,
    group_size: int = 8,
    *,
    read_depth: int = 1,
    write_depth: int = 1,
) -> ElasticTransformer:
    """Put a latent interface into a transformer of diffusers (ELIT §4.4): Read, core and Write on its image stream.

    A new interface is untrained: until it is fine-tuned (finetune_diffusers.py) the core's work does not reach the image.

    Args:
        transformer: a QwenImageTransformer2DModel, SD3Transformer2DModel or FluxTransformer2DModel, not compiled or wrapped.
        read_after: the blocks before Read.
        write_after: the blocks before Write, counted from the first block. The defaults are the paper's for Qwen-Image.
        group_size: side of a group in tokens, 8 at 1024 px. The token grid of every image must be a multiple of it on both
            axes; other images are refused when they arrive.
        read_depth: cross-attention layers in Read.
        write_depth: cross-attention layers in Write.

    Returns:
        The handle on it: `budget`, `unconditional_budget`, `original()`, `save()`, `detach()`.

    Raises:
        UserError: an unsupported class, blocks that do not exist, or an interface that is there already.
    """
    return ElasticTransformer(transformer, read_after, write_after, group_size, read_depth, write_depth)


def load(transformer: nn.Module, path: str | Path) -> ElasticTransformer:
    """Attach the interface of a file that `ElasticTransformer.save` wrote, with its weights.

    Raises:
        UserError: not such a file, or of another transformer.
    """
    tensors, metadata = load_safetensors(Path(path))
    if METADATA not in metadata:
        raise UserError(f"{path}: holds no interface of finetune_diffusers.py")
    options, name = _options(metadata[METADATA], path), type(transformer).__name__
    if options.pop("class") != name:
        raise UserError(f"{path}: its interface is not one of a {name}")
    elastic = attach(transformer, **options)
    own = elastic.transformer.state_dict()
    wrong = [k for k, v in tensors.items() if k not in own or own[k].shape != v.shape]
    missing = [k for k in own if k.startswith(f"{CHILD}.") and k not in tensors]
    broken = [k for k, v in tensors.items() if not v.isfinite().all()]
    if wrong or missing or broken:
        elastic.detach()
        if wrong or missing:
            raise UserError(f"{path}: its weights do not fit this transformer: {(wrong + missing)[0]}")
        raise UserError(f"{path}: holds weights that are not finite: {broken[0]}")
    elastic.transformer.load_state_dict(tensors, strict=False)
    return elastic


def _options(text: str, path: str | Path) -> dict[str, Any]:
    """The options in a file's metadata. Raises UserError where they are none, or are of more layers than any interface has."""
    options = parse_json(text.encode(), path)
    names = {"class", "read_after", "write_after", "group_size", "read_depth", "write_depth"}
    is_whole = isinstance(options, dict) and options.keys() == names and isinstance(options["class"], str)
    if not is_whole or any(type(options[n]) is not int or not 0 <= options[n] <= 1000 for n in names - {"class"}):
        raise UserError(f"{path}: its metadata are not those of an interface")
    return options


@functools.cache
def _parameters(cls: type) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]  # pyright: ignore[reportAttributeAccessIssue]


def _by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward, by name."""
    return {**dict(zip(_parameters(type(module)), args, strict=False)), **kwargs}
