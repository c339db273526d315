"""Forwards of few images as CUDA graphs: recorded once for each budget and batch, then launched by the host as one.

Nothing here changes what is computed. It pays where the host takes longer to launch a forward's kernels than the GPU to run them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from common.errors import first_line
from common.logging import warn

FEW_IMAGES = 8  # up to so many at a time, graphs are used by default
MOST_GRAPHS = 64  # of one model; each keeps the memory of a forward


class Replay:
    """A function of tensors on CUDA, recorded with those of its first call.

    Args:
        function: of a list of tensors; it allocates nothing that outlives it and waits for nothing.
        tensors: whose shapes and types all calls have.
    """

    def __init__(self, function: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor]):
        self._inputs = [x.clone() for x in tensors]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # libraries set themselves up, and regions compile
                function(self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = function(self._inputs)

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """The function's result for these tensors."""
        for own, given in zip(self._inputs, tensors, strict=True):
            own.copy_(given)
        self._graph.replay()
        return tree_map(torch.clone, self._outputs)


class GraphedModel(nn.Module):
    """A frozen model whose forwards are replayed."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.module = model
        self._replays: dict[Any, Callable[[Sequence[Tensor]], Any]] = {}

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """As the model's."""
        leaves, form = tree_flatten((inputs, options))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        others = [None if isinstance(x, Tensor) else x for x in leaves]  # budgets, and which stage is active

        def call(tensors: Sequence[Tensor]) -> Any:
            given = iter(tensors)
            filled = [next(given) if isinstance(x, Tensor) else x for x in leaves]
            args, kwargs = tree_unflatten(filled, form)
            return self.module(*args, **kwargs)

        precision = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        key = str(form), *others, *((x.shape, x.dtype) for x in tensors), precision
        if key not in self._replays:
            if len(self._replays) == MOST_GRAPHS:
                self._replays.clear()
            try:
                self._replays[key] = Replay(call, tensors)
            except RuntimeError as error:  # no memory for it, or something that waits
                warn(f"no CUDA graph of this forward, which runs without: {first_line(error)}")
                self._replays[key] = call
        return self._replays[key](tensors)


class Graphs:
    """The graphed networks of a session."""

    def __init__(self) -> None:
        self._graphed: dict[int, GraphedModel] = {}

    def of(self, model: nn.Module) -> GraphedModel:
        """The model with its graphs."""
        if id(model) not in self._graphed:
            self._graphed[id(model)] = GraphedModel(model)
        return self._graphed[id(model)]
