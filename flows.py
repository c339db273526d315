"""What differs between plain flow matching (SiT, arXiv 2401.08740) and DFM (2506.19839), once: draws, loss, noise, sampling, pictures.

`flow_of(options)` gives the flow of the model that the options name; whoever trains, samples or measures calls it and never asks
which one it is. A new flow is a subclass of `FlowMatching` that overrides what differs, its entry in `FLOWS`, and that name as the
attribute `flow` of its models' class.

Shapes: B images, (C, h, w) of the VAE latents, called `shape`. A *state* is what a sampler moves from noise to data: latents
(B, C, h, w), or for DFM a list of its S stages, coarsest first.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

import models
import samplers
from common.errors import UserError
from common.sizes import Resolution, latent_sides, resolution_of
from loss import PathType, active_stage, dfm_loss, flow_matching_loss, interpolate, stage_times, training_times
from models.autoencoders import VAE
from models.conditioning import Condition, condition_of, map_condition
from models.pyramid import decompose, recompose
from models.vae import VAERecord, decode, decode_stages, sample_latents
from randomness import Draws, pyramid_noise, sde_noise, to_device, training_draws
from samplers import Guidance

Shape = Sequence[int]
State = Any  # Tensor, or list[Tensor] of DFM
StepNoise = Callable[[int, torch.Size], Tensor]  # (step, shape) → the noise of an SDE's step
OnStage = Callable[[int, Tensor], None]  # (stage, the latents (B, C, h_s, w_s) of the image up to that stage)


class LossCondition(NamedTuple):
    """Under what a loss is taken: the budget (ELIT) and the active stage (DFM); None where the model has none."""

    budget: float | None = None
    stage: int | None = None

    @property
    def metric_suffix(self) -> str:
        """What the names of its losses end in: `_budget_0.5`, `_stage_1`, both or nothing."""
        named = {"budget": self.budget, "stage": self.stage}
        return "".join(f"_{name}_{value:g}" for name, value in named.items() if value is not None)

    @property
    def arguments(self) -> dict[str, float]:
        """The budget as an argument of the model."""
        return {} if self.budget is None else {"inference_budget": self.budget}


class FlowLoss(NamedTuple):
    """The losses of one forward, (B,) float32 each, at their training times."""

    losses: Tensor
    times: Tensor
    condition: LossCondition


@dataclass(frozen=True)
class FlowMatching:
    """Plain flow matching, one state of the latents' shape at one time; and the interface of every flow.

    Attributes (options by the names of the command line's):
        model: registered name of the model, for messages.
        path_type, weighting, time_shift: see `loss.interpolant` and `loss.training_times`.
        mode, num_steps, heun: the sampler; as the defaults stand, training draws its pictures.
    """

    model: str = ""
    path_type: PathType = "linear"
    weighting: Literal["uniform", "lognormal"] = "uniform"
    time_shift: float = 1.0
    mode: Literal["ode", "sde"] = "ode"
    num_steps: int = 50
    heun: bool = False

    ignored_options: ClassVar[dict[str, str]] = {}  # options that have no effect when given by hand, with the reason
    caches_core: ClassVar[bool] = True  # whether a step of the sampler may reuse what the core added in an earlier one

    @property
    def foreign_options(self) -> set[str]:
        """The options that only other flows have."""
        return {f.name for flow in FLOWS.values() for f in dataclasses.fields(flow)} - {
            f.name for f in dataclasses.fields(self)
        }

    def check_training(self) -> None:
        """Raise UserError for options that the flow cannot be trained with."""

    def check_sampling(self) -> None:
        """Raise UserError for options that the flow cannot be sampled with."""
        check_sampler(self.mode, self.heun)

    # Training

    def state_shapes(self, shape: Shape) -> list[Shape]:
        """The shapes (C, h, w) of a state's parts, those of the latents last."""
        return [shape]

    def draws(self, seed: int, n: int, batch_slice: range, shape: Shape, purpose: str = "training") -> Draws:
        """All draws of forward `n` for the images at `batch_slice` of the global batch; see `randomness.training_draws`."""
        return training_draws(seed, n, batch_slice, shape, purpose, self.state_shapes(shape)[:-1])

    def empty_draws(self, batch_size: int, shape: Shape) -> Draws:
        """Draws of the right shapes with no values, to count memory with."""
        *coarse, noise = (torch.empty(batch_size, *s) for s in self.state_shapes(shape))
        t = torch.empty(batch_size)
        return Draws(torch.empty_like(noise), noise, t, t, t, 0.0, 0.0, coarse, torch.empty(batch_size, len(coarse) + 1))

    def conditions(self, budgets: Sequence[float | None]) -> list[LossCondition]:
        """Every condition that training meets: budgets × stages, in this order; the last of a budget costs most memory."""
        return [LossCondition(budget) for budget in budgets]

    def condition(self, draws: Draws, budget: float | None = None) -> LossCondition:
        """The condition of a forward with these draws."""
        return LossCondition(budget)

    def times(self, draws: Draws) -> Tensor:
        """The training times (B,) of the images; of DFM in the active stage."""
        return training_times(draws, self.weighting, self.path_type, self.time_shift)

    def loss_under(self, condition: LossCondition, model: Callable, x: Tensor, draws: Draws, y: Condition) -> FlowLoss:
        """The loss under a condition; otherwise as `loss`."""
        t = self.times(draws)
        losses = flow_matching_loss(model, x, draws.noise, t, y, self.path_type, **condition.arguments)
        return FlowLoss(losses, t, condition)

    def loss(self, model: Callable, x: Tensor, draws: Draws, y: Condition, budget: float | None = None) -> FlowLoss:
        """The velocity loss of each sample.

        Args:
            model: the model, wrapped or not, or `loss.Projecting` around it.
            x: (B, C, h, w) scaled VAE latents.
            draws: of this forward: times, noise and stage.
            y: labels (B,) or text, already dropped.
            budget: the forward's inference budget.
        """
        return self.loss_under(self.condition(draws, budget), model, x, draws, y)

    def val_draws(self, indices: range, shape: Shape) -> Draws:
        """The draws of held-out samples, fixed by their indices."""
        return self.draws(0, 0, indices, shape, purpose="held-out")

    @torch.no_grad()
    def val_losses(
        self, model: Callable, batch: dict[str, Tensor], indices: range, record: VAERecord, conditions: Sequence[LossCondition]
    ) -> Tensor:
        """Velocity loss of each held-out sample under each condition, (conditions, B), with time and noise fixed by its index.

        Args:
            model: the model.
            batch: "moments" (B, 2C, h, w) and labels or text of the samples.
            indices: of the samples in the held-out set.
            record: of the VAE that made them.
            conditions: of `conditions`.
        """
        moments, y = batch["moments"], condition_of(batch)
        draws = self.val_draws(indices, (moments.shape[1] // (1 + record.posterior), *moments.shape[2:])).to(moments.device)
        x = sample_latents(moments, draws.posterior, record)
        return torch.stack([self.loss_under(condition, model, x, draws, y).losses for condition in conditions])

    # Sampling

    def starting_noise(self, seed: int, indices: Sequence[int], shape: Shape, device: torch.device) -> State:
        """The noise that the images `indices` start from, on `device`; that of image i depends on (seed, i) alone."""
        return to_device(pyramid_noise(seed, indices, [shape])[0], device)

    def sample_state(
        self,
        model: nn.Module,
        shape: Shape,
        seed: int,
        indices: Sequence[int],
        y: Condition,
        guidance: Guidance,
        on_stage: OnStage | None = None,
    ) -> State:
        """The images `indices` as the sampler leaves them: a state in float64 on the model's device.

        All noise of image i comes from (seed, i), whatever the budget, guidance and batch.

        Args:
            model: the model, in eval mode.
            shape: (C, h, w) of the latents.
            seed: of all noise.
            indices: the images' indices.
            y: their labels (B,) or text.
            guidance: how velocities are guided, and the budgets.
            on_stage: called with each coarser stage of `preview_sides`, as soon as it is ready.
        """
        device = next(model.parameters()).device
        noise, y = self.starting_noise(seed, indices, shape, device), map_condition(partial(to_device, device=device), y)
        return self.run_sampler(
            model, noise, y, guidance, lambda step, size: sde_noise(seed, indices, step, size[1:]), on_stage
        )

    def run_sampler(
        self, model: nn.Module, noise: State, y: Condition, guidance: Guidance, step_noise: StepNoise, on_stage: OnStage | None
    ) -> State:
        """The state at data, from `noise` on; otherwise as `sample_state`."""
        options = guidance._asdict() | {k: getattr(self, k) for k in ("num_steps", "path_type", "time_shift")}
        if self.mode == "sde":
            return samplers.euler_maruyama_sampler(model, noise, y, noise=step_noise, **options)
        return samplers.euler_sampler(model, noise, y, heun=self.heun, **options)

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        """Scaled VAE latents (B, C, h, w), float64; arguments as of `sample_state`."""
        return self.latents(self.sample_state(*args, **kwargs))

    def latents(self, state: State) -> Tensor:
        """The latents (B, C, h, w) of a state."""
        return state

    @property
    def num_views(self) -> int:
        """How many views `views` gives."""
        return 1

    def views(self, vae: VAE, state: State) -> Tensor:
        """Pictures of a state, uint8 (num_views, B, 3, H, W): the images, and before them what leads to them (DFM's stages)."""
        return decode(vae, self.latents(state))[None]

    def preview_sides(self, resolution: Resolution) -> dict[int, Resolution]:
        """Coarser stage → size in pixels of its images; empty where there are none."""
        return {}

    # What it costs

    @property
    def total_steps(self) -> int:
        """The sampler's steps."""
        return self.num_steps

    def evaluations(self) -> list[tuple[float, ...]]:
        """The times of each velocity evaluation of a run; of DFM those of the stages up to the active one."""
        return [(t,) for t in samplers.evaluation_times(self.num_steps, self.mode, self.heun, self.time_shift)]

    def forward(self, model: nn.Module, noise: State, y: Condition, budget: float | None) -> None:
        """One forward, to be timed: at time 0.5, of all stages where there are any."""
        model(noise, torch.full((len(noise),), 0.5, device=noise.device), y, inference_budget=budget)

    def evaluate(self, model: nn.Module, noise: State, times: tuple[float, ...], y: Condition, guidance: Guidance) -> None:
        """One velocity evaluation, to be timed, guidance included; times: an entry of `evaluations`."""
        samplers.guided_velocity(model, noise.double(), times[0], y, guidance)

    def noised(self, model: nn.Module, x: Tensor, noise: State, t: Tensor) -> tuple[State, Tensor, State]:
        """Latents x on the way to `noise`, every part at times t (B,): the state in the model's dtype, its times, its velocity."""
        state, velocity = interpolate(x, noise, t, self.path_type)
        return state.to(next(model.parameters()).dtype), t, velocity


@dataclass(frozen=True)
class DFM(FlowMatching):
    """Decomposable flow matching: a state of S stages of a Laplacian pyramid, each with a time of its own.

    Attributes:
        stages_count: S.
        stage_weights: how often each stage is trained.
        num_steps_per_scale, stage_sampling_thresholds: the sampler; see `samplers.dfm_schedule`.
    """

    stages_count: int = 2
    stage_weights: Sequence[float] = (0.9, 0.1)
    num_steps_per_scale: Sequence[int] = (40, 10)
    stage_sampling_thresholds: Sequence[float] = (0.1,)

    ignored_options: ClassVar[dict[str, str]] = {"num_steps": "a DFM model is sampled with --num-steps-per-scale"}
    caches_core: ClassVar[bool] = False  # a stage that starts changes what the core sees, whatever the times say

    @override
    def check_training(self) -> None:
        weights = self.stage_weights
        given = f"--stage-weights {' '.join(f'{w:g}' for w in weights)}"
        if len(weights) != self.stages_count:
            raise UserError(f"{given}: {self.stages_count} stages need {self.stages_count} weights")
        if abs(sum(weights) - 1) > 1e-6 or min(weights) < 0:
            raise UserError(f"{given}: must be probabilities that sum to 1, not {sum(weights):g}")
        samplers.check_schedule(self.num_steps_per_scale, self.stage_sampling_thresholds, self.stages_count)
        if self.time_shift != 1:
            raise UserError(f"--time-shift {self.time_shift:g}: {self.model} has times of its own for each stage; only 1 works")

    @override
    def check_sampling(self) -> None:
        super().check_sampling()
        if self.heun or self.mode == "sde":
            option = "--heun" if self.heun else "--mode sde"
            raise UserError(f"{option}: {self.model} is sampled stage by stage with Euler steps; it has neither Heun nor SDE")
        samplers.check_schedule(self.num_steps_per_scale, self.stage_sampling_thresholds, self.stages_count)

    @override
    def state_shapes(self, shape: Shape) -> list[Shape]:
        channels, *sides = shape
        factors = [2**s for s in reversed(range(self.stages_count))]
        return [(channels, *(side // factor for side in sides)) for factor in factors]

    @override
    def conditions(self, budgets: Sequence[float | None]) -> list[LossCondition]:
        return [LossCondition(budget, stage) for budget in budgets for stage in range(self.stages_count)]

    @override
    def condition(self, draws: Draws, budget: float | None = None) -> LossCondition:
        return LossCondition(budget, active_stage(draws.stage, self.stage_weights))

    @override
    def loss_under(self, condition: LossCondition, model: Callable, x: Tensor, draws: Draws, y: Condition) -> FlowLoss:
        assert condition.stage is not None
        t = self.times(draws)
        times, noise = stage_times(t, draws.stage_normal, condition.stage), [*draws.coarse_noise, draws.noise]
        losses = dfm_loss(model, x, noise, times, y, self.path_type, condition.stage, **condition.arguments)
        return FlowLoss(losses, t, condition)

    @override
    def starting_noise(self, seed: int, indices: Sequence[int], shape: Shape, device: torch.device) -> State:
        return [to_device(x, device) for x in pyramid_noise(seed, indices, self.state_shapes(shape))]

    @override
    def run_sampler(
        self, model: nn.Module, noise: State, y: Condition, guidance: Guidance, step_noise: StepNoise, on_stage: OnStage | None
    ) -> State:
        def report(stage: int, clean: list[Tensor]) -> None:
            if on_stage is not None:
                on_stage(stage, recompose(clean))

        own = ("num_steps_per_scale", "stage_sampling_thresholds", "path_type")
        options = guidance._asdict() | {k: getattr(self, k) for k in own}
        return samplers.dfm_sampler(model, noise, y, on_stage=report if on_stage else None, **options)

    @override
    def latents(self, state: State) -> Tensor:
        return recompose(state)

    @property
    @override
    def num_views(self) -> int:
        return self.stages_count + 1

    @override
    def views(self, vae: VAE, state: State) -> Tensor:
        return decode_stages(vae, state)

    @override
    def preview_sides(self, resolution: Resolution) -> dict[int, Resolution]:
        return {
            s: resolution_of(latent_sides(resolution, 2 ** (self.stages_count - 1 - s))) for s in range(self.stages_count - 1)
        }

    @property
    @override
    def total_steps(self) -> int:
        return sum(self.num_steps_per_scale)

    @override
    def evaluations(self) -> list[tuple[float, ...]]:
        phases = samplers.dfm_schedule(self.num_steps_per_scale, self.stage_sampling_thresholds)
        return [times[: phase.active_stage + 1] for phase in phases for times in phase.times[:-1]]

    @override
    def forward(self, model: nn.Module, noise: State, y: Condition, budget: float | None) -> None:
        t = torch.full((len(noise[0]), len(noise)), 0.5, device=noise[0].device)
        model(noise, t, y, inference_budget=budget)

    @override
    def evaluate(self, model: nn.Module, noise: State, times: tuple[float, ...], y: Condition, guidance: Guidance) -> None:
        waiting = (1.0,) * (len(noise) - len(times))
        samplers.guided_velocities(model, [x.double() for x in noise], times + waiting, len(times) - 1, y, guidance)

    @override
    def noised(self, model: nn.Module, x: Tensor, noise: State, t: Tensor) -> tuple[State, Tensor, State]:
        stages = zip(decompose(x, len(noise)), noise, strict=True)
        parts = [super(DFM, self).noised(model, x_s, n_s, t) for x_s, n_s in stages]
        return [state for state, *_ in parts], t[:, None].expand(-1, len(noise)), [velocity for *_, velocity in parts]


FLOWS: dict[str, type[FlowMatching]] = {"flow matching": FlowMatching, "DFM": DFM}  # by the attribute `flow` of a model's class


def flow_of(options: Any, **changes: Any) -> FlowMatching:
    """The flow of the model that `options.model` names, with those of the options that it has.

    Args:
        options: of any script (`config.options`); whatever it lacks is the flow's default.
        **changes: options in place of those.
    """
    flow = FLOWS[models.model_spec(options.model).constructor.flow]
    names = [f.name for f in dataclasses.fields(flow)]
    return flow(**{name: getattr(options, name) for name in names if hasattr(options, name)} | changes)


def check_sampler(mode: str, heun: bool) -> None:
    """Raise UserError for a sampler that no flow has."""
    if heun and mode == "sde":
        raise UserError("--heun: Heun's correction belongs to --mode ode")
