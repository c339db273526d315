"""Steps that reuse what the core added to the tokens the last time it ran, in place of running it again.

For ELIT the core is Read, the blocks on latents and Write; for other models the blocks that `Backbone.core_blocks` gives. Two rules
decide when it runs. `time`: the relative L1 change of the time embedding, from one evaluation to the next, adds up since the
core last ran, and the core runs once the sum reaches the threshold (TeaCache, arXiv 2411.19108, without its fitted polynomial):
known before sampling, the same for all images. `head`: the core runs for an image once the head's output has changed by the
threshold since it last ran for that image (relative L1; first-block caching with ELIT's head as the probe); the images for
which it runs are gathered into a smaller batch. Each pass of guided sampling has what it reuses to itself, and the core always
runs in a pass's first evaluation, where its budget changes, and in the first and last step.

Shapes: B images, R passes of a network, n tokens of width D.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from checkpoint.weights import Weights, meta_model
from common.errors import UserError
from config.options import GenerateConfig, InferenceTool
from flows import flow_of
from models.backbone import Backbone, Stream
from samplers import Guidance, Pass, joined

Rule = Literal["time", "head"]
Run = Sequence[Sequence[Pass]]  # the passes of each velocity evaluation


@dataclass
class Drawn:
    """What a session has drawn so far with a core cache.

    Attributes:
        images: how many.
        passes: how often each pass ran, counted by image.
        cache_bytes: of the largest batch's cached tensors.
    """

    images: int = 0
    passes: Counter[Pass] = field(default_factory=Counter)
    cache_bytes: int = 0

    def add(self, other: "Drawn") -> None:
        """Count what another session, or another process's, has drawn."""
        self.images += other.images
        self.passes.update(other.passes)
        self.cache_bytes = max(self.cache_bytes, other.cache_bytes)

    @property
    def share(self) -> float:
        """In how many of the passes the core ran, as a share."""
        return sum(n for p, n in self.passes.items() if not p.reused) / max(self.passes.total(), 1)


def check(config: GenerateConfig | InferenceTool, weights: Weights) -> None:
    """Raise UserError for a cache that the model cannot have; nothing is computed."""
    if not config.core_cache:
        return
    if not flow_of(config).caches_core:
        raise UserError(
            f"--core-cache {config.core_cache:g}: {config.model} is sampled stage by stage and cannot reuse its core"
        )
    for loaded, where, after in ((weights, config.ckpt, config.cache_after), (weights.guide, config.guide_ckpt, None)):
        if loaded is not None:
            model = meta_model(loaded, where or "")
            model.core_blocks(after)
            if config.cache_rule == "time":
                model.time_embedding(torch.zeros(1, device="meta"))


# -------------------------------------------------------------------------------------------------- which passes run


def time_changes(embedding: Tensor) -> list[float]:
    """Of embeddings (E, D) of times, the relative L1 change from each to the next: E − 1 numbers, on the host."""
    before, after = embedding[:-1], embedding[1:]
    return ((after - before).abs().sum(dim=1) / before.abs().sum(dim=1)).tolist()


def must_run(
    budgets: Sequence[float | None], changes: Sequence[float] | None, threshold: float, always: set[int]
) -> list[bool | None]:
    """Whether the core runs in each evaluation of one pass; None: each image's head decides.

    Args:
        budgets: of the pass, one for each of its E evaluations.
        changes: of the time embedding between its evaluations, E − 1; None for the rule `head`.
        threshold: of the change.
        always: evaluations in which the core runs in any case.
    """
    decided: list[bool | None] = []
    since = 0.0
    for i, budget in enumerate(budgets):
        since += changes[i - 1] if i and changes is not None else 0.0
        if i == 0 or i in always or budget != budgets[i - 1]:
            runs = True
        else:
            runs = None if changes is None else since >= threshold
        decided.append(runs)
        since = 0.0 if runs else since
    return decided


class Call(NamedTuple):
    """One forward of a network: its passes, of B images each, and whether the core runs in each of them (None: the head decides)."""

    roles: list[int]  # 0: the conditional pass, 1: the guiding one
    passes: list[Pass]
    runs: list[bool | None]


def calls(run: Run, guide: bool, decided: dict[int, dict[int, bool | None]]) -> Iterator[Call]:
    """The forwards of the model, or of the guide, in the sampler's order; decided: role → evaluation → whether the core runs."""
    for e, passes in enumerate(run):
        roles = [role for role, p in enumerate(passes) if p.guide == guide]
        for together in [roles] if joined(passes) and roles else [[role] for role in roles]:
            yield Call(together, [passes[role] for role in together], [decided[role][e] for role in together])


# --------------------------------------------------------------------------------------------------------- the cache


class CachedCore(nn.Module):
    """A network for one run of a sampler, whose forwards may reuse what its core added before.

    Args:
        network: the model, or the guide.
        blocks: of its core, see `Backbone.core_blocks`.
        plan: its forwards, in the sampler's order.
        threshold: of the rule `head`.
        drawn: where the passes are counted.
    """

    def __init__(self, network: nn.Module, blocks: range, plan: Sequence[Call], threshold: float, drawn: Drawn):
        super().__init__()
        self.module = network
        self.blocks, self.plan, self.threshold, self.drawn = blocks, iter(plan), threshold, drawn
        self.roles = sorted({role for call in plan for role in call.roles})
        self.by_head = any(None in call.runs for call in plan)
        self.kept: dict[
            str, Tensor
        ] = {}  # (R·B, n, D) each: what the core added to tokens and text, and the head's output then

    def forward(self, x: Tensor, t: Tensor, y: Any, inference_budget: float | None = None) -> Tensor:
        """As the network's."""
        network = cast(Backbone, self.module)
        return network.forward_around(partial(self._core, next(self.plan), inference_budget), self.blocks, x, t, y)

    def _core(self, call: Call, budget: float | None, s: Stream) -> Stream:
        """The stream after the core, which runs for some rows of the batch, while the others reuse what it added to them."""
        B = len(s.x) // len(call.roles)
        rows = self._rows(call, s, B)
        if rows is None:
            return self._reuse(call, s, B)
        part = s if rows == slice(None) else _part(s, rows)
        # On a stream of its own: the core leaves nothing to later blocks but tokens and text.
        out = cast(Backbone, self.module).core(replace(part, skips=[]), self.blocks, budget)
        added = {"x": out.x - part.x} | ({} if out.text is None or part.text is None else {"text": out.text - part.text})
        for name, new in (added | ({"head": part.x} if self.by_head else {})).items():
            self._view(name, call, B, like=new)[rows] = new
        self.drawn.cache_bytes = max(self.drawn.cache_bytes, sum(kept.nbytes for kept in self.kept.values()))
        if part is s:
            return replace(s, x=out.x, text=out.text)
        s = self._reuse(call, s, B)
        s.x[rows] = out.x  # not with the rounding of what was added
        if s.text is not None and out.text is not None:
            s.text[rows] = out.text
        return s

    def _rows(self, call: Call, s: Stream, B: int) -> "slice | Tensor | None":
        """The rows of the batch for which the core runs; they are counted."""
        if None in call.runs:
            head = self._view("head", call, B, like=s.x)
            change = _l1(s.x - head) / _l1(head)
            runs = ~(change < self.threshold)  # also where it is no number
            for i, decided in enumerate(call.runs):
                if decided is not None:
                    runs[i * B : (i + 1) * B] = decided
            counts = runs.unflatten(0, (-1, B)).sum(dim=1).tolist()
            rows = runs.nonzero().squeeze(1)
        else:
            counts = [B * bool(decided) for decided in call.runs]
            first = call.runs.index(True) if any(call.runs) else 0
            rows = slice(first * B, first * B + sum(counts))  # at most two passes: those that run are next to each other
        for p, n in zip(call.passes, counts, strict=True):
            self.drawn.passes += Counter({p: n, p._replace(reused=True): B - n})
        if not sum(counts):
            return None
        return slice(None) if sum(counts) == len(s.x) else rows

    def _reuse(self, call: Call, s: Stream, B: int) -> Stream:
        text = None if s.text is None else s.text + self._view("text", call, B)
        return replace(s, x=s.x + self._view("x", call, B), text=text)

    def _view(self, name: str, call: Call, B: int, like: Tensor | None = None) -> Tensor:
        """The rows of this forward in a kept tensor, which is made in the first one."""
        if name not in self.kept:
            assert like is not None
            self.kept[name] = like.new_zeros(len(self.roles) * B, *like.shape[1:])
        first = self.roles.index(call.roles[0]) * B
        return self.kept[name][first : first + len(call.roles) * B]


def _part(s: Stream, rows: "slice | Tensor") -> Stream:
    return replace(s, x=s.x[rows], c=s.c[rows], text=None if s.text is None else s.text[rows])


def _l1(x: Tensor) -> Tensor:
    """Σ|x| of each image, (B,), in float32 or better."""
    return x.abs().sum(dim=(1, 2), dtype=torch.promote_types(x.dtype, torch.float32))


class CoreCaches:
    """Makes the cached networks of a sampler's runs; times are embedded once, so that later runs wait for no device."""

    def __init__(self):
        self._changes: dict[tuple[bool, tuple[float, ...]], list[float]] = {}

    def cached(
        self,
        config: GenerateConfig | InferenceTool,
        model: nn.Module,
        guidance: Guidance,
        evaluations: Sequence[tuple[float, ...]],
        drawn: Drawn,
    ) -> tuple[nn.Module, Guidance]:
        """Model and guidance of one run of a sampler.

        Args:
            config: threshold, rule and blocks before the core.
            model: in eval mode; the same in all runs, as is the guide.
            guidance: of the run, with the guide's network where there is one.
            evaluations: the time of each velocity evaluation, in the sampler's order.
            drawn: where the passes are counted.
        """
        run = [guidance.passes(*times) for times in evaluations]
        always = {*range(2 if config.heun else 1), len(run) - 1}
        networks = {False: model} if guidance.guide is None else {False: model, True: guidance.guide}
        decided = {}
        for role in range(max(map(len, run))):
            own = [e for e, passes in enumerate(run) if role < len(passes)]
            passes = [run[e][role] for e in own]
            changes = None
            if config.cache_rule == "time":
                changes = self._changes_of(networks, passes[0].guide, tuple(evaluations[e][0] for e in own))
            ran = must_run(
                [p.budget for p in passes], changes, config.core_cache, {i for i, e in enumerate(own) if e in always}
            )
            decided[role] = dict(zip(own, ran, strict=True))
        made = {}
        for guide, network in networks.items():
            # The option is that of the model; a guide has its default.
            blocks = cast(Backbone, network).core_blocks(None if guide else config.cache_after)
            made[guide] = CachedCore(network, blocks, list(calls(run, guide, decided)), config.core_cache, drawn)
        return made[False], guidance._replace(guide=made.get(True))

    def _changes_of(self, networks: dict[bool, nn.Module], guide: bool, times: tuple[float, ...]) -> list[float]:
        """`time_changes` of a network between these times, in float32 or better."""
        if (guide, times) not in self._changes:
            network = cast(Backbone, networks[guide])
            t = torch.tensor(times, dtype=torch.float32, device=next(network.parameters()).device)
            with torch.autocast(t.device.type, enabled=False):
                self._changes[guide, times] = time_changes(network.time_embedding(t).double().cpu())
        return self._changes[guide, times]
