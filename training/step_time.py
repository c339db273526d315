"""Estimates of a training step on GPUs that are not at hand: from its trace, a card's data sheet, and the network of a cluster."""

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from training.cards import Card
from training.cluster import Cluster, Part, Scheme, Timing, step
from training.step_trace import Op, Trace

PRODUCTS, MEMORY = 0.6, 0.78  # of the data sheet, that large products and element-wise kernels are taken to sustain
EAGER_LAUNCH, COMPILED_LAUNCH = 16e-6, 8e-6  # seconds of the host for a kernel


class Machine(NamedTuple):
    """A GPU and its host: FLOP/s of products and bytes/s of memory that it sustains, and seconds to launch a kernel."""

    flops: float
    bandwidth: float
    eager_launch: float = EAGER_LAUNCH
    compiled_launch: float = COMPILED_LAUNCH

    @classmethod
    def of(cls, card: Card, peak: float) -> "Machine":
        """A card whose products reach at most `peak` TFLOP/s."""
        return cls(PRODUCTS * peak * 1e12, MEMORY * card.bandwidth * 1e12)

    def describe(self) -> str:
        """In words."""
        launches = f"{1e6 * self.eager_launch:g} µs to launch a kernel, {1e6 * self.compiled_launch:g} µs a compiled one"
        return f"{self.flops / 1e12:.4g} TFLOP/s, {self.bandwidth / 1e12:.3g} TB/s and {launches}"

    def device_seconds(self, op: Op) -> float:
        """What an operation takes on the GPU: its products or its traffic, whichever is longer."""
        return max(op.flops / self.flops, op.bytes / self.bandwidth)

    def host_seconds(self, op: Op, is_compiled: bool) -> float:
        """What launching an operation takes."""
        return op.kernels * (self.compiled_launch if is_compiled and op.region[2] else self.eager_launch)


class Estimate(NamedTuple):
    """A step's times by the slower of GPU and host; seconds in which the GPU computes, and in which the host launches."""

    timing: Timing
    device: float
    host: float


def parts_of(trace: Trace, seconds: Callable[[Op], float]) -> tuple[list[Part], float]:
    """The parts of a step in the order of its forward pass, and the seconds of its update."""
    times: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    update = 0.0
    for op in trace.ops:
        if op.part == "update":
            update += seconds(op)
        else:
            times[op.region[1]][op.backward] += seconds(op)
    rest = trace.parameters - sum(parameters for parameters, _ in trace.sizes.values())  # tables, before all parts
    parts = []
    for number in sorted({0, *times}):
        forward, backward = times[number]
        parts.append(Part(forward, backward, *trace.sizes.get(number, (0 if number else rest, 0))))
    return parts, update


def estimate(trace: Trace, machine: Machine, cluster: Cluster, scheme: Scheme, more_flops: float = 0.0) -> Estimate:
    """A step of the traced micro-step, of which each GPU also computes `more_flops` that the trace lacks."""
    device, update = parts_of(trace, machine.device_seconds)
    host, launches = parts_of(trace, lambda op: machine.host_seconds(op, trace.is_compiled))
    device = [Part(more_flops / machine.flops, 0.0), *device]
    busy, issued = (
        scheme.micro_steps * sum(part.forward + part.backward for part in parts) + end
        for parts, end in ((device, update), (host, launches))
    )
    slower = (host, launches) if issued > busy else (device, update)
    return Estimate(step(*slower, cluster, scheme), busy, issued)
