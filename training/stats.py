"""What training measures: losses and gradients, summed on the device until a line is logged, and speed."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.backbone import Backbone
from models.costs import forward_flops, projector_flops
from models.encoders import TargetEncoder
from training.cards import find_card

TENTHS = 10  # intervals of t whose losses are told apart


def peak_tflops(device: torch.device, mixed_precision: str, allow_tf32: bool) -> float | None:
    """TFLOP/s that one such device could reach in this precision; `None` where it is not known."""
    card = find_card(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if card is None else card.peak(mixed_precision, allow_tf32)


def encoder_flops(encoder: TargetEncoder) -> int:
    """FLOPs of one image's features; the encoder is on the meta device."""
    with FlopCounterMode(display=False) as counter:
        encoder.features(torch.empty(1, 3, encoder.side, encoder.side, device="meta"))
    return counter.get_total_flops()


def sum_over_processes(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, in each of them."""
    return cast(Tensor, accelerator.reduce(tensor, reduction="sum"))


class Speed:
    """Images and FLOPs per second of all processes, since the last time they were read, and the peak of this device's memory.

    Args:
        model: before it is wrapped. budgets: those that are trained. encoders: REPA's, on the meta device.
        num_processes: between which the images are split.
        peak: TFLOP/s that a device can reach (`peak_tflops`); None where it is not known.
    """

    def __init__(
        self,
        model: Backbone,
        budgets: Sequence[float | None],
        encoders: Sequence[TargetEncoder],
        num_processes: int,
        peak: float | None,
    ):
        self._forward_flops = dict(zip(budgets, forward_flops(model, budgets), strict=True))  # of one image
        self._repa_flops = 3 * projector_flops(model) + sum(map(encoder_flops, encoders))  # of one image's step
        self._num_processes, self._peak = num_processes, peak
        self.start()

    def start(self) -> None:
        """Measure from here on."""
        self._since, self._images, self._flops = time.perf_counter(), 0, 0
        self._host, self._steps = 0.0, 0

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """What is done inside does not count."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    @contextlib.contextmanager
    def host(self) -> Iterator[None]:
        """What is done inside is one step, which a GPU may end later than the host has issued it."""
        begin = time.perf_counter()
        yield
        self._host += time.perf_counter() - begin
        self._steps += 1

    def add(self, images: int, budget: float | None, aligned: bool = True) -> None:
        """Forward and backward of `images` images of all processes, with REPA if any. A backward pass is two forwards."""
        self._images += images
        self._flops += images * (3 * self._forward_flops[budget] + (self._repa_flops if aligned else 0))

    def read(self, device: torch.device) -> dict[str, float]:
        """images_per_second, tflops, mfu where it is known, and on CUDA peak_memory_gib of this process since the last line.

        Also the mean times of a step: step_ms, and host_ms, in which the host had issued it (and got its batch). Where the two are
        close on a GPU, launches are the bottleneck, or data.
        """
        seconds = time.perf_counter() - self._since
        values = {"images_per_second": self._images / seconds, "tflops": self._flops / seconds / 1e12}
        if self._steps:
            values |= {"step_ms": 1000 * seconds / self._steps, "host_ms": 1000 * self._host / self._steps}
        if self._peak is not None:
            values["mfu"] = values["tflops"] / (self._peak * self._num_processes)
        if device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            torch.cuda.reset_peak_memory_stats(device)
        return values


class TrainingStats:
    """Sums on the device since the last line: losses of all images, by tenth of t, and by kind of forward; gradient norms.

    Values that are not finite are left out of all means. A step whose gradient is not finite counts as skipped.

    Args:
        names: of the loss of all images and of each kind of forward, e.g. ["loss", "loss_budget_0.5", "loss_budget_1"].
    """

    def __init__(self, names: list[str], device: torch.device):
        self.names = [*(f"loss_t{i}" for i in range(TENTHS)), *names]
        self.tenths = torch.arange(TENTHS, device=device)
        self.losses = torch.zeros(len(self.names), 2, device=device)  # (sum, count) of the process's own images
        self.norms = torch.zeros(2, device=device)  # (sum, count)
        self.skipped = torch.zeros((), device=device)  # in the whole run
        self.streak = torch.zeros((), device=device)  # skipped in a row, up to now
        self.longest = torch.zeros((), device=device)  # in a row, since the last line
        self.since = torch.zeros((), device=device)  # steps since the one before the longest row

    @torch.no_grad()
    def add(self, losses: Tensor, t: Tensor, kind: str = "loss") -> None:
        """Losses (B,) at times t (B,) of one forward, of the kind with this name."""
        finite = losses.isfinite()
        sums = torch.stack([torch.where(finite, losses, 0), finite.to(losses.dtype)], dim=1)  # (B, 2)
        inside = (t[:, None] * TENTHS).floor().clamp(max=TENTHS - 1) == self.tenths  # (B, TENTHS)
        self.losses[:TENTHS] += (inside[:, :, None] * sums[:, None]).sum(dim=0)
        for name in {"loss", kind}:
            self.losses[self.names.index(name)] += sums.sum(dim=0)

    @torch.no_grad()
    def add_mean(self, name: str, value: Tensor) -> None:
        """A scalar of one forward that is a mean over its images already."""
        finite = value.isfinite()
        self.losses[self.names.index(name)] += torch.stack([torch.where(finite, value, 0), finite.to(value.dtype)])

    @torch.no_grad()
    def step(self, norm: Tensor) -> Tensor:
        """Take note of an optimizer step's gradient norm; 1.0 where it is not finite and the step is to be skipped, else 0.0."""
        skip = (~norm.isfinite()).float()
        self.norms += torch.stack([torch.where(skip > 0, 0, norm), 1 - skip])
        self.skipped += skip
        self.streak = (self.streak + 1) * skip
        self.since = torch.where(self.streak > self.longest, self.streak, self.since + 1)
        self.longest = torch.maximum(self.longest, self.streak)
        return skip

    def gather(self, accelerator: Accelerator) -> None:
        """Bring the sums of all processes to the main one."""
        self.losses = sum_over_processes(accelerator, self.losses)
        if not accelerator.is_main_process:
            self.losses.zero_()

    def read(self, accelerator: Accelerator) -> dict[str, float | None]:
        """The means since the last line, of all processes, and start anew; waits for the device."""
        self.losses = sum_over_processes(accelerator, self.losses)
        read = torch.cat([self.losses.flatten(), self.norms, self.skipped[None], self.longest[None], self.since[None]])
        values = read.tolist()
        sums, counts = values[: 2 * len(self.names) : 2], values[1 : 2 * len(self.names) : 2]
        means = {name: s / n for name, s, n in zip(self.names, sums, counts, strict=True) if n}
        norm, steps, skipped, longest, since = values[2 * len(self.names) :]
        for sum_ in (self.losses, self.norms, self.longest):
            sum_.zero_()
        skips = {"skipped": skipped, "longest": longest, "since": since}
        return {"loss": None, **means, "grad_norm": norm / steps if steps else None, **skips}

    _KEPT = ("losses", "norms", "skipped", "streak", "longest", "since")

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint, after `gather`."""
        return {name: getattr(self, name) for name in self._KEPT}

    def load_state_dict(self, state: Any, main: bool) -> None:
        """Go on from `state_dict`; the processes' common sums go to the main one. What does not fit starts anew."""
        for name in self._KEPT if isinstance(state, dict) else ():
            own, value = getattr(self, name), state.get(name)
            if isinstance(value, Tensor) and value.shape == own.shape and (name != "losses" or main):
                own.copy_(value)
