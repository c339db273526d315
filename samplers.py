"""ODE, SDE and DFM samplers with guidance: from noise (t = 1) to data (t = 0), state in float64.

Sources: SiT (arXiv 2401.08740, §2.4 and appendix A) for the probability-flow ODE, the SDE and the score; classifier-free
guidance (2207.12598); guidance interval (2404.07724); autoguidance and guides of other weights (2406.02507); ELIT (2603.12245)
for cheap guidance; DFM (2506.19839) for the stages.
"""

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import randomness
from common.errors import UserError
from loss import PathType, interpolant, shift_time
from models.conditioning import Condition, map_condition, null_condition


class BudgetSchedule(NamedTuple):
    """A budget for each time: pieces (budget, start, end), from t = 1 down to 0; a piece holds for start ≥ t > end."""

    pieces: tuple[tuple[float, float, float], ...]

    def at(self, t: float) -> float:
        """The budget at time t; the last piece holds at 0 too."""
        return next((budget for budget, _, end in self.pieces if t > end + 1e-9), self.pieces[-1][0])

    @classmethod
    def parse(cls, text: str) -> "BudgetSchedule":
        """`0.25@1.0-0.5,1.0@0.5-0.0`. Raises UserError for gaps, overlaps or anything that is not such a list."""
        matches = [re.fullmatch(r"([\d.]+)@([\d.]+)-([\d.]+)", part.strip()) for part in text.split(",")]
        try:
            pieces = tuple((float(m[1]), float(m[2]), float(m[3])) for m in matches)  # type: ignore[index]
        except (TypeError, ValueError):
            raise UserError(f"budget schedule {text!r}: must be BUDGET@START-END,… e.g. 0.25@1.0-0.5,1.0@0.5-0.0") from None
        bounds = [1.0, *(end for *_, end in pieces)]
        for (budget, start, end), before in zip(pieces, bounds, strict=False):
            if start <= end:
                raise UserError(
                    f"budget schedule {text!r}: the piece {budget:g}@{start:g}-{end:g} must run from a later to an earlier time"
                )
            if start != before:
                kind = "a gap" if start < before else "an overlap"
                raise UserError(
                    f"budget schedule {text!r}: {kind} at {before:g}: the piece that starts there starts at {start:g}"
                )
        if bounds[-1] != 0:
            raise UserError(f"budget schedule {text!r}: a gap: it must end at 0, not {bounds[-1]:g}")
        return cls(pieces)

    def __str__(self) -> str:
        return ",".join(f"{budget}@{start}-{end}" for budget, start, end in self.pieces)


def parse_budget(text: str | float | None) -> "float | BudgetSchedule | None":
    """`None`, a number, or a schedule as text → what samplers take. Raises UserError for anything else."""
    if text is None:
        return None
    if "@" in str(text):
        return BudgetSchedule.parse(str(text))
    try:
        return float(text)
    except ValueError:
        raise UserError(f"inference budget {text!r}: must be a number, or a schedule like 0.25@1.0-0.5,1.0@0.5-0.0") from None


class Pass(NamedTuple):
    """One forward of a velocity evaluation: its budget; whether the guide runs it; whether it reuses what the core added before."""

    budget: float | None
    guide: bool = False
    reused: bool = False


def joined(passes: Sequence[Pass]) -> bool:
    """Whether the passes of an evaluation are one forward of a doubled batch, the conditional half first."""
    return len(passes) == 2 and passes[0] == passes[1]


class Guidance(NamedTuple):
    """How the velocity is guided, and at which budget the model runs.

    v = v_low + cfg_scale·(v_cond − v_low) for t in [guidance_low, guidance_high], in the first `cfg_channels` latent channels
    (None: all), v_cond in the others. v_low is the null label's velocity at the same budget (CFG), at
    `unconditional_inference_budget` (cheap CFG), or the same label's at that budget (autoguidance); with `guide_label` it is
    that of another network, `guide`, at `guide_budget`: of the same label, or of that network's null label.
    """

    cfg_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    inference_budget: float | BudgetSchedule | None = None
    unconditional_inference_budget: float | None = None
    autoguidance: bool = False
    cfg_channels: int | None = None
    guide_label: Literal["same", "none"] | None = None
    guide_budget: float | None = None
    guide: nn.Module | None = None

    def check(self) -> None:
        """Raise UserError for what cannot be computed."""
        if not self.cfg_scale >= 1:
            raise UserError(f"cfg_scale {self.cfg_scale}: must be at least 1 (1: no guidance)")
        if not 0 <= self.guidance_low <= self.guidance_high <= 1:
            raise UserError(
                f"guidance_low {self.guidance_low} and guidance_high {self.guidance_high}: must be ordered within [0, 1]"
            )
        if self.autoguidance and self.unconditional_inference_budget is None:
            raise UserError("autoguidance needs unconditional_inference_budget, the budget of the guiding pass")
        if self.guide_label and (self.autoguidance or self.unconditional_inference_budget is not None):
            raise UserError(
                "guide_ckpt with autoguidance or unconditional_inference_budget: another guide's budget is guide_budget"
            )

    def active(self, t: float) -> bool:
        """Whether velocities at time t are guided."""
        return self.cfg_scale > 1 and self.guidance_low - 1e-9 <= t <= self.guidance_high + 1e-9  # 1 - 8/10 is not 0.2

    def budget(self, t: float) -> float | None:
        """The conditional pass's budget at time t."""
        return self.inference_budget.at(t) if isinstance(self.inference_budget, BudgetSchedule) else self.inference_budget

    def passes(self, *times: float) -> list[Pass]:
        """The forwards that a velocity at time t costs: the conditional one, then the guiding one, if any.

        `times`: t, or in DFM those of the stages up to the active one, whose time decides on the budget.
        """
        budget, low = self.budget(times[-1]), self.unconditional_inference_budget
        guiding = Pass(self.guide_budget, guide=True) if self.guide_label else Pass(budget if low is None else low)
        return [Pass(budget)] + ([guiding] if any(map(self.active, times)) else [])

    def combine(self, v_cond: Tensor, v_low: Tensor) -> Tensor:
        """The guided velocity (B, C, h, w)."""
        guided, n = v_low + self.cfg_scale * (v_cond - v_low), self.cfg_channels
        return guided if n is None else torch.cat([guided[:, :n], v_cond[:, n:]], dim=1)


def guided_velocity(model: nn.Module, x: Tensor, t: float, y: Condition, guidance: Guidance) -> Tensor:
    """Velocity (B, C, H, W) in float64 at the state x (float64) and time t; one, two or one doubled forward."""

    def velocity(network: nn.Module, states: list[Tensor], y: Condition, budget: dict) -> list[Tensor]:
        return [network(states[0], _times([t], states[0])[:, 0], y, **budget)]

    return _guided(model, velocity, [x], [t], y, guidance)[0]


def guided_velocities(
    model: nn.Module, pyramid: Sequence[Tensor], times: Sequence[float], active_stage: int, y: Condition, guidance: Guidance
) -> list[Tensor]:
    """DFM's velocity in float64 of each stage up to the active one; each is guided where its own time lies in the interval.

    Args:
        model: velocity model of a pyramid.
        pyramid: the states (float64) of all stages; those after the active one enter as zeros.
        times: (S,) of all stages.
        active_stage: the last stage that is asked for.
        y: class ids (B,) or text.
        guidance: how velocities are guided, and the budgets.
    """
    states = [x if s <= active_stage else torch.zeros_like(x) for s, x in enumerate(pyramid)]

    def velocity(network: nn.Module, states: list[Tensor], y: Condition, budget: dict) -> list[Tensor]:
        return network(states, _times(times, states[0]), y, active_stage=active_stage, **budget)

    return _guided(model, velocity, states, times[: active_stage + 1], y, guidance)


def _times(times: Sequence[float], x: Tensor) -> Tensor:
    """Times as the model takes them, (B, S), in float32 or better; made by filling, which no device waits for."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.stack([torch.full((len(x),), t, dtype=dtype, device=x.device) for t in times], dim=1)


def _guided(
    model: nn.Module, velocity: Callable, states: Sequence[Tensor], times: Sequence[float], y: Condition, g: Guidance
) -> list[Tensor]:
    """v_low + s·(v_cond − v_low) for each stage whose time lies in the interval; only v_cond where none does."""
    cond, *low = g.passes(*times)

    def run(network: nn.Module, states: Sequence[Tensor], y: Condition, budget: float | None) -> list[Tensor]:
        dtype = next((p.dtype for p in network.parameters()), states[0].dtype)
        options = {} if budget is None else {"inference_budget": budget}
        return [v.double() for v in velocity(network, [x.to(dtype) for x in states], y, options)]

    if not low:
        return run(model, states, y, cond.budget)
    guide = model if g.guide is None else g.guide
    y_low = y if g.autoguidance or g.guide_label == "same" else null_condition(guide, y)
    if joined([cond, *low]):
        both = map_condition(lambda *pair: torch.cat(pair), y, y_low)
        pairs = [v.chunk(2) for v in run(model, [torch.cat([x, x]) for x in states], both, cond.budget)]
    else:
        pairs = zip(run(model, states, y, cond.budget), run(guide, states, y_low, low[0].budget), strict=True)
    return [g.combine(v_cond, v_low) if g.active(t) else v_cond for (v_cond, v_low), t in zip(pairs, times, strict=True)]


def sampling_times(num_steps: int, mode: str = "ode", time_shift: float = 1.0) -> list[float]:
    """The times of a sampler, from 1 (noise) to 0: a uniform grid (ODE), or 1 … 0.04 and then 0 (SDE); shifted."""
    if num_steps < 1:
        raise UserError(f"num_steps {num_steps}: must be at least 1")
    if mode == "sde":
        times = [*torch.linspace(1.0, 0.04, num_steps, dtype=torch.float64).tolist(), 0.0]
    else:
        times = [1 - i / num_steps for i in range(num_steps + 1)]
    return [shift_time(t, time_shift) for t in times]


def evaluation_times(num_steps: int, mode: str = "ode", heun: bool = False, time_shift: float = 1.0) -> list[float]:
    """The times at which a sampler evaluates the velocity, in its order."""
    times = sampling_times(num_steps, mode, time_shift)[:-1]
    return [t for i, t in enumerate(times) for _ in range(2 if heun and i else 1)]


def data_from_velocity(velocity: Tensor, x: Tensor, t: float, path_type: PathType) -> Tensor:
    """The clean image that a velocity at the state x and time t points to."""
    alpha, sigma, d_alpha, d_sigma = _coefficients(t, path_type)
    return (d_sigma * x - sigma * velocity) / (alpha * d_sigma - d_alpha * sigma)


def _coefficients(t: float, path_type: PathType) -> tuple[float, ...]:
    return tuple(c.item() for c in interpolant(torch.tensor(t, dtype=torch.float64), path_type))  # on the host


def score_from_velocity(velocity: Tensor, x: Tensor, t: float, path_type: PathType) -> Tensor:
    """Score ∇ log p_t(x) of the path, from its velocity."""
    alpha, sigma, d_alpha, d_sigma = _coefficients(t, path_type)
    ratio = alpha / d_alpha
    return (ratio * velocity - x) / (sigma**2 - ratio * d_sigma * sigma)


@torch.no_grad()
def euler_sampler(
    model: nn.Module,
    latents: Tensor,
    y: Condition,
    *,
    num_steps: int,
    heun: bool = False,
    path_type: PathType = "linear",
    time_shift: float = 1.0,
    **guidance: Any,
) -> Tensor:
    """Probability-flow ODE on a uniform (or shifted) grid of `num_steps`, by Euler or, with `heun`, second-order steps (but the last).

    Args:
        model: velocity model.
        latents: (B, C, H, W) noise.
        y: class ids (B,) or text.
        num_steps: of the grid.
        heun: second-order steps.
        path_type: see `loss.interpolant`.
        time_shift: see `loss.shift_time`.
        **guidance: the fields of `Guidance`.

    Returns:
        (B, C, H, W) float64 scaled VAE latents.
    """
    g = Guidance(**guidance)
    g.check()
    x = latents.double()
    for step, (t, t_next) in enumerate(pairwise(sampling_times(num_steps, time_shift=time_shift))):
        v = guided_velocity(model, x, t, y, g)
        x_next = x + (t_next - t) * v
        if heun and step < num_steps - 1:
            v_next = guided_velocity(model, x_next, t_next, y, g)
            x_next = x + (t_next - t) * (v + v_next) / 2
        x = x_next
    return x


@torch.no_grad()
def euler_maruyama_sampler(
    model: nn.Module,
    latents: Tensor,
    y: Condition,
    *,
    num_steps: int,
    path_type: PathType = "linear",
    time_shift: float = 1.0,
    noise: Callable[[int, torch.Size], Tensor] | None = None,
    **guidance: Any,
) -> Tensor:
    """Reverse SDE with diffusion w(t) = 2t: `num_steps` points from 1 to 0.04, then one noise-free step to 0.

    Args:
        model: velocity model.
        latents: (B, C, H, W) noise.
        y: class ids (B,) or text.
        num_steps: of the grid.
        path_type: see `loss.interpolant`.
        time_shift: see `loss.shift_time`.
        noise: `noise(step, shape)` → normal noise of that step; default: the draws of seed 0 for images 0 … B − 1.
        **guidance: see `Guidance`.
    """
    g = Guidance(**guidance)
    g.check()
    noise = noise or (lambda step, shape: randomness.sde_noise(0, range(shape[0]), step, shape[1:]))
    x = latents.double()
    for step, (t, t_next) in enumerate(pairwise(sampling_times(num_steps, "sde", time_shift))):
        v, w, dt = guided_velocity(model, x, t, y, g), 2 * t, t_next - t
        drift = v - 0.5 * w * score_from_velocity(v, x, t, path_type)
        x_next = x + dt * drift
        if step < num_steps - 1:
            x_next = x_next + math.sqrt(w * abs(dt)) * randomness.to_device(noise(step, x.shape), x.device).double()
        x = x_next
    return x


OnStage = Callable[[int, list[Tensor]], None]


class Phase(NamedTuple):
    """One phase of DFM's sampler: the active stage, and the times (n + 1, S) of all stages before and after its n steps."""

    active_stage: int
    times: list[tuple[float, ...]]


def check_schedule(num_steps_per_scale: Sequence[int], stage_sampling_thresholds: Sequence[float], stages_count: int) -> None:
    """Raise UserError for steps and thresholds that are no schedule of so many stages."""
    steps, thresholds = list(num_steps_per_scale), list(stage_sampling_thresholds)
    if len(steps) != stages_count or min(steps) < 1:
        raise UserError(
            f"num_steps_per_scale {_listed(steps)}: must be {stages_count} whole numbers above 0, one for each stage"
        )
    if len(thresholds) != stages_count - 1:
        raise UserError(
            f"stage_sampling_thresholds {_listed(thresholds)}: {stages_count} stages need {stages_count - 1}, one for each stage but the last"
        )
    if not all(a > b for a, b in pairwise([1.0, *thresholds, 0.0])):
        raise UserError(f"stage_sampling_thresholds {_listed(thresholds)}: must fall strictly, within (0, 1)")


def _listed(values: Sequence[float]) -> str:
    return " ".join(f"{v:g}" for v in values)


def dfm_schedule(num_steps_per_scale: Sequence[int], stage_sampling_thresholds: Sequence[float]) -> list[Phase]:
    """The times of DFM's sampler, phase by phase.

    In phase i stage i runs linearly from 1 to θ_i and every earlier one from θ_{i−1} to θ_i, where θ of the last stage is 0;
    later stages wait at 1.
    """
    check_schedule(num_steps_per_scale, stage_sampling_thresholds, len(num_steps_per_scale))
    ends = [*stage_sampling_thresholds, 0.0]
    phases = []
    for i, (n, end) in enumerate(zip(num_steps_per_scale, ends, strict=True)):
        starts = [ends[i - 1]] * i + [1.0]
        moving = [[start + (end - start) * k / n for start in starts] for k in range(n)] + [[end] * (i + 1)]
        phases.append(Phase(i, [(*times, *[1.0] * (len(ends) - i - 1)) for times in moving]))
    return phases


@torch.no_grad()
def dfm_sampler(
    model: nn.Module,
    latents: Sequence[Tensor],
    y: Condition,
    *,
    num_steps_per_scale: Sequence[int],
    stage_sampling_thresholds: Sequence[float],
    path_type: PathType = "linear",
    on_stage: OnStage | None = None,
    **guidance: Any,
) -> list[Tensor]:
    """DFM's progressive sampler: Euler steps, a phase for each stage (arXiv 2506.19839).

    Args:
        model: velocity model of a pyramid.
        latents: noise of each stage, coarsest first.
        y: class ids (B,) or text.
        num_steps_per_scale: see `dfm_schedule`.
        stage_sampling_thresholds: see `dfm_schedule`.
        path_type: see `loss.interpolant`.
        on_stage: called as `on_stage(i, stages)` after each phase i but the last, with the estimates of the clean stages 0 … i.
        **guidance: the fields of `Guidance`.

    Returns:
        The stages (float64), for `models.dfm.recompose`.
    """
    g = Guidance(**guidance)
    g.check()
    phases = dfm_schedule(num_steps_per_scale, stage_sampling_thresholds)
    if len(phases) != len(latents):
        raise UserError(f"num_steps_per_scale {_listed(num_steps_per_scale)}: the model has {len(latents)} stages")
    pyramid = [x.double() for x in latents]
    velocities, times_next = [], ()
    for active, phase_times in phases:
        for times, times_next in pairwise(phase_times):
            velocities = guided_velocities(model, pyramid, times, active, y, g)
            for s, v in enumerate(velocities):
                pyramid[s] = pyramid[s] + (times_next[s] - times[s]) * v
        if on_stage is not None and active < len(phases) - 1:
            clean = [data_from_velocity(v, x, t, path_type) for v, x, t in zip(velocities, pyramid, times_next, strict=False)]
            on_stage(active, clean)
    return pyramid
