"""What the page asks for, and single pictures of it: each is drawn once, one at a time, whoever asks."""

import contextlib
import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import models
from checkpoint.weights import Weights
from common.errors import UserError
from config.demo_options import WebDemoConfig
from config.parsing import flag
from config.values import coerce
from models.costs import forward_flops
from models.elit import budget_to_k
from samplers import Guidance, Pass, joined
from sampling import checks, conditions, cost, session
from sampling.attention import read_maps
from sampling.guidance_kinds import guidance_of_kind, kinds_of
from sampling.session import Session

MOST_PICTURES = 256  # that are kept in memory

Progress = Callable[[int, int], None]  # (forwards that are done, all of them)


class Picture(NamedTuple):
    """One drawn image.

    Attributes:
        image: uint8 (H, W, 3).
        latents: (1, C, h, w), float64.
        gflops: of the transformer, guidance included.
        ms: wall time of sampling and decoding.
    """

    image: np.ndarray
    latents: Tensor
    gflops: float
    ms: float


class Comparison(NamedTuple):
    """A picture, and that of the full budget from the same noise: None while it is not drawn yet, or without budgets."""

    config: WebDemoConfig
    picture: Picture
    full: Picture | None


# ------------------------------------------------------------------------------------------------------------ options


def check_options(config: WebDemoConfig) -> None:
    """Refuse what no checkpoint can be sampled with."""
    checks.check_options(config, [config.cfg_scale])
    if config.guidance_kind == "Guide" and config.guide_ckpt is None:
        raise UserError("--guidance-kind Guide: is the network of --guide-ckpt; give that too")


def check(config: WebDemoConfig) -> None:
    """Refuse what the model cannot be sampled with."""
    check_options(config)
    checks.check_model(config)
    checks.check_labels(config, "--class-label", config.class_label)
    if config.guidance_kind not in (None, *kinds_of(config)):
        raise UserError(f"--guidance-kind {config.guidance_kind}: {config.model} has no budget; only ELIT models do")


def budgets_of(config: WebDemoConfig) -> list[float]:
    """Every budget of the model; none where it has none."""
    return checks.all_budgets(config.elit_group_size**2) if models.model_spec(config.model).elastic else []


def resolve(config: WebDemoConfig) -> WebDemoConfig:
    """Checked options with the defaults that depend on the model filled in, and budgets as the model runs them."""
    budgets = budgets_of(config)
    kind = config.guidance_kind or ("Guide" if config.guide_ckpt else "CFG")
    if not budgets:
        return dataclasses.replace(config, guidance_kind=kind)

    def real(budget: float | None, default: float) -> float:
        wanted = default if budget is None else budget
        return budgets[max(1, budget_to_k(max(wanted, budgets[0]), len(budgets))) - 1]

    lowest = next(b for b in budgets if b >= 1 / 16 - 1e-9)
    return dataclasses.replace(
        config,
        guidance_kind=kind,
        inference_budget=real(config.inference_budget, 0.25),
        unconditional_inference_budget=real(config.unconditional_inference_budget, lowest),
    )


# ------------------------------------------------------------------------------------------------------------ drawing


class Drawer:
    """A checkpoint that draws single pictures and keeps them.

    Attributes:
        config: the options that the page starts with.
        loaded: the checkpoint.
        budgets: of the model, ascending; empty where it has none.
        steps_option: the option of the sampler's steps.
        takes_text: whether it is conditioned on prompts.
        sha256: of the checkpoint.
    """

    def __init__(self, config: WebDemoConfig, weights: Weights):
        prompts = weights.prompts
        device = session.device()
        session.set_precision(config, device)
        self._encoder = None
        self._encoded: conditions.EncodedPrompts | None = None  # the last prompt
        if prompts is not None:
            if prompts.data is not None:
                raise UserError(
                    f"--prompts {config.prompts}: the page encodes prompts itself; give --prompt or a file of prompts"
                )
            self._encoder = prompts.encoder or conditions.load_encoder(prompts.encoder_name, prompts.record, device)
            self._encoder_name, prompts.encoder = prompts.encoder_name, self._encoder
            config = dataclasses.replace(config, prompt=prompts.texts[:1], prompts=None)
        self.loaded = session.load(config, weights, device)
        self.config = resolve(config)
        self.sha256 = weights.sha256
        self.budgets = budgets_of(config)
        self.steps_option = "num_steps_per_scale" if "num_steps" in self.loaded.flow.ignored_options else "num_steps"
        self.takes_text = prompts is not None
        self.lock = threading.RLock()
        self._pictures: OrderedDict[str, Picture] = OrderedDict()
        counts = forward_flops(self.loaded.model, self.budgets or [None])  # type: ignore[arg-type]
        self._flops = {Pass(b): n for b, n in zip(self.budgets or [None], counts, strict=True)}

    def options(self, values: Mapping[str, Any]) -> WebDemoConfig:
        """The options of a request.

        Args:
            values: option → value, as text or number; the others are those of the command line.

        Raises:
            UserError: as the command line does.
        """
        read = {name: coerce(WebDemoConfig, name, value, flag(name)) for name, value in values.items()}
        config = dataclasses.replace(self.config, **read)
        if self.takes_text and not config.prompt:
            raise UserError("--prompt: is empty; it must be text")
        check(config)
        return resolve(config)

    def guidance(self, config: WebDemoConfig) -> Guidance:
        """How a request is guided, and at which budgets it runs."""
        return guidance_of_kind(config, config.guidance_kind or "CFG", config.cfg_scale)

    def at(self, config: WebDemoConfig, budget: float) -> WebDemoConfig:
        """The same request at another budget."""
        return dataclasses.replace(config, inference_budget=budget)

    def session_of(self, config: WebDemoConfig) -> Session:
        """The checkpoint with a request's options and condition."""
        sampled = self.loaded.with_options(config).fresh()
        if self._encoder is None:
            return sampled
        if self._encoded is None or self._encoded.texts != config.prompt:
            self._encoded = conditions.encode(self._encoder, self._encoder_name, config.prompt or [])
        return dataclasses.replace(sampled, conditions=self._encoded)

    def gflops(self, config: WebDemoConfig, sampled: Session) -> float:
        """Of a request's image; `sampled`: what has drawn it, where a core cache decides."""
        if config.core_cache:
            return cost.drawn_flops_per_step(sampled, sampled.drawn) * sampled.flow.total_steps / 1e9
        run = cost.passes_of_run(config, self.guidance(config))
        missing = {p for passes in run for p in passes} - self._flops.keys()
        self._flops |= cost.pass_flops(self.loaded.model, [[tuple(missing)]], self.loaded.guide)
        return cost.flops_per_step(config, run, self._flops) * sampled.flow.total_steps / 1e9

    def kept(self, config: WebDemoConfig) -> Picture | None:
        """The picture of a request, if it has been drawn."""
        return self._pictures.get(self._key(config))

    def picture(self, config: WebDemoConfig, progress: Progress | None = None) -> Picture:
        """The picture of a request: the one that is kept, or drawn now; meanwhile all others wait.

        Raises:
            UserError: its latents are not finite.
        """
        with self.lock:
            key = self._key(config)
            if key not in self._pictures:
                self._pictures[key] = self._draw(config, progress)
                if len(self._pictures) > MOST_PICTURES:
                    self._pictures.popitem(last=False)
            self._pictures.move_to_end(key)
            return self._pictures[key]

    def compare(self, config: WebDemoConfig, progress: Progress | None = None) -> Iterator[Comparison]:
        """The request's picture as soon as it is drawn, and then with that of the full budget."""
        picture = self.picture(config, progress)
        if not self.budgets:
            yield Comparison(config, picture, None)
            return
        full = self.at(config, 1.0)
        if self.kept(full) is None:
            yield Comparison(config, picture, None)
        yield Comparison(config, picture, self.picture(full, progress))

    def strip(self, config: WebDemoConfig, progress: Progress | None = None) -> list[tuple[float, Picture]]:
        """The request's picture at every budget."""
        pictures = []
        for i, budget in enumerate(self.budgets):
            inner = progress and partial(_part, progress, i, len(self.budgets))
            pictures.append((budget, self.picture(self.at(config, budget), inner)))
        return pictures

    def attention(self, config: WebDemoConfig) -> np.ndarray:
        """What each latent reads from the request's picture: (J, h, w), in units of uniform attention."""
        picture = self.picture(config)
        with self.lock, torch.inference_mode():
            read = read_maps(self.session_of(config), picture.latents, config.seed, config.attention_time, 1)
        return read.maps[0].float().cpu().numpy()

    def warm_up(self) -> None:
        """Draw at the lowest and the full budget and keep nothing, so that what comes first is timed like the others."""
        short = {"num_steps": 1, "num_steps_per_scale": [1] * len(self.config.num_steps_per_scale)}
        config = dataclasses.replace(self.config, **short)
        for budget in (self.budgets[0], 1.0) if self.budgets else (None,):
            self._draw(dataclasses.replace(config, inference_budget=budget), None)

    def _key(self, config: WebDemoConfig) -> str:
        flow = self.loaded.with_options(config).flow
        return str((config.class_label, config.prompt, config.seed, flow, self.guidance(config)))

    def _draw(self, config: WebDemoConfig, progress: Progress | None) -> Picture:
        g, sampled = self.guidance(config), self.session_of(config)
        y = sampled.condition([0])
        with torch.inference_mode(), _counted(sampled, g, progress):
            cost.synchronize(sampled.device)
            begin = time.perf_counter()
            latents = sampled.latents(g, config.seed, [0], y)
            image = sampled.decode(latents)[0].permute(1, 2, 0).cpu().numpy()
            ms = 1000 * (time.perf_counter() - begin)
        return Picture(image, latents, self.gflops(config, sampled), ms)


def _part(progress: Progress, i: int, count: int, done: int, of: int) -> None:
    """The progress of the part `i` of `count`, in that of the whole."""
    progress(i * of + done, count * of)


@contextlib.contextmanager
def _counted(sampled: Session, g: Guidance, progress: Progress | None) -> Iterator[None]:
    """Tell of the model's forwards in one run of the sampler."""
    if progress is None or sampled.config.core_cache:
        yield
        return
    run = cost.passes_of_run(sampled.config, g)
    count = sum(1 if joined(passes) else sum(not p.guide for p in passes) for passes in run)
    done = 0

    def tell(*_: Any) -> None:
        nonlocal done
        done += 1
        progress(min(done, count), count)

    network, _ = sampled.networks(g, 1)
    handle = network.register_forward_hook(tell)
    try:
        yield
    finally:
        handle.remove()
