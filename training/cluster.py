"""Arithmetic of many GPUs: how long collectives take, and a training step around them. Estimates: nothing here is measured.

A network carries one collective at a time, in the order in which they are issued, beside what the GPUs compute; neither slows
the other down, and all GPUs compute equally fast.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

MIB = 2**20


class Link(NamedTuple):
    """What a GPU or a node sends, in one direction: bytes per second, and seconds before the first one arrives."""

    bandwidth: float
    latency: float


class Group(NamedTuple):
    """GPUs that communicate: their number, and the nodes that they are evenly spread over."""

    size: int
    nodes: int


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes. The defaults are four fifths of NVLink 4's bandwidth, and of eight InfiniBand cards of 400 Gbit/s a node.

    Attributes:
        gpus, per_node: their number, and that of a node.
        inside: between the GPUs of a node, each.
        between: between nodes: all cards of a node together, of which each GPU has its share.
        reduction: how gradients are summed; faster: the faster of the two, as NCCL chooses.
    """

    gpus: int
    per_node: int = 8
    inside: Link = Link(360e9, 3e-6)
    between: Link = Link(320e9, 10e-6)
    reduction: Literal["ring", "tree", "faster"] = "faster"

    @property
    def everyone(self) -> Group:
        """All GPUs."""
        return self.shards(self.gpus)

    def shards(self, size: int) -> Group:
        """`size` GPUs that follow each other, with a shard each."""
        return Group(size, -(-size // self.per_node))

    def replicas(self, size: int) -> Group:
        """The GPUs that hold the same shard, one of each group of `size`."""
        number, in_node = self.gpus // size, max(1, self.per_node // size)
        return Group(number, -(-number // in_node))

    def one_way(self, size: float, group: Group) -> float:
        """Seconds of a ring's all-gather to, or reduce-scatter of, `size` bytes: each GPU sends (n − 1)/n of them, in n − 1 steps."""
        n, nodes = group
        steps = (n - nodes) * self.inside.latency + (nodes - 1) * self.between.latency
        return (n - 1) / n * size / self._bandwidth(group) + steps if n > 1 else 0.0

    def all_reduce(self, size: float, group: Group) -> float:
        """Seconds to sum `size` bytes: by a ring, both ways; by trees between nodes and chains in them, up and down each byte once."""
        n, nodes = group
        if n == 1:
            return 0.0
        ring = 2 * self.one_way(size, group)
        steps = (n // nodes - 1) * self.inside.latency + math.ceil(math.log2(nodes)) * self.between.latency
        tree = 2 * size / self._bandwidth(group) + 2 * steps
        return {"ring": ring, "tree": tree, "faster": min(ring, tree)}[self.reduction]

    def describe(self) -> str:
        """In words."""
        inside, between = (
            f"{link.bandwidth / 1e9:g} GB/s and {1e6 * link.latency:g} µs" for link in (self.inside, self.between)
        )
        how = "the faster of ring and tree" if self.reduction == "faster" else f"a {self.reduction}"
        nodes = f", {between} between nodes" if self.everyone.nodes > 1 else ""
        return f"{inside} inside a node of {self.per_node}{nodes}, sums by {how}"

    def _bandwidth(self, group: Group) -> float:
        """Of a ring or tree through the group, which shares a node's cards with those of the other GPUs."""
        in_node = group.size // group.nodes
        share = self.between.bandwidth * min(1.0, in_node / self.per_node)
        if group.nodes == 1:
            return self.inside.bandwidth
        return share if in_node == 1 else min(self.inside.bandwidth, share)


class Part(NamedTuple):
    """What runs at a time: seconds of its forward and backward pass; parameters whose gradients are complete after the latter.

    `gathered`: the bytes that `--shard` gathers it in; 0: its parameters stay gathered from the forward to the backward pass.
    """

    forward: float
    backward: float
    parameters: int = 0
    gathered: int = 0


class Scheme(NamedTuple):
    """How a step is shared out.

    Attributes:
        shard_size: GPUs that a model is split over (`--shard`); 1: every GPU holds all of it.
        width: bytes in which a gradient is summed.
        bucket: bytes of float32 gradients that DDP sums at a time.
        micro_steps: forward and backward passes of a step.
    """

    shard_size: int = 1
    width: int = 4
    bucket: float = 25 * MIB
    micro_steps: int = 1


class Timing(NamedTuple):
    """A step: seconds, those in which a GPU waits for others, and the bytes that each GPU sends."""

    seconds: float
    waiting: float
    sent: float


class _Network:
    """Collectives, one after the other."""

    def __init__(self) -> None:
        self.free, self.sent = 0.0, 0.0

    def carry(self, ready: float, seconds: float, sent: float) -> float:
        """A collective that may begin at `ready`; returns when it ends."""
        self.free = max(self.free, ready) + seconds
        self.sent += sent
        return self.free


def step(parts: Sequence[Part], update: float, cluster: Cluster, scheme: Scheme) -> Timing:
    """A step of these parts, in the order of their forward pass, and an update that takes `update` seconds."""
    busy = scheme.micro_steps * sum(part.forward + part.backward for part in parts)
    if scheme.shard_size == 1:
        waiting, sent = _replicated(parts, cluster, scheme)
    else:
        passes = [_sharded(parts, cluster, scheme, is_last) for is_last in (False, True)]
        waiting, sent = ((scheme.micro_steps - 1) * before + last for before, last in zip(*passes, strict=True))
    return Timing(busy + waiting + update, waiting, sent)


def _replicated(parts: Sequence[Part], cluster: Cluster, scheme: Scheme) -> tuple[float, float]:
    """DDP's last micro-step: gradients are summed by buckets while earlier parts are in their backward pass."""
    network, pending, everyone = _Network(), 0.0, cluster.everyone

    def reduce(now: float, size: float) -> None:
        size *= scheme.width / 4
        network.carry(now, cluster.all_reduce(size, everyone), 2 * (everyone.size - 1) / everyone.size * size)

    now = sum(part.forward for part in parts)
    for part in reversed(parts):
        now += part.backward
        pending += 4 * part.parameters
        while pending >= scheme.bucket:
            reduce(now, scheme.bucket)
            pending -= scheme.bucket
    if pending:
        reduce(now, pending)
    return max(network.free - now, 0.0), network.sent


def _sharded(parts: Sequence[Part], cluster: Cluster, scheme: Scheme, is_last: bool) -> tuple[float, float]:
    """FSDP's micro-step.

    Each part is gathered for its forward and for its backward pass, one part ahead of what runs. Its gradients go to the GPUs
    that keep them after its backward pass, and in the last micro-step are summed over the groups with the same shards. What is no
    part is gathered once, before the first.
    """
    size, network = scheme.shard_size, _Network()
    shards, replicas = cluster.shards(size), cluster.replicas(size)

    def one_way(now: float, amount: float) -> float:
        return network.carry(now, cluster.one_way(amount, shards), (size - 1) / size * amount) if amount else now

    def reduce(now: float, parameters: int) -> None:
        one_way(now, scheme.width * parameters)
        n, own = replicas.size, scheme.width * parameters / size
        if is_last:
            network.carry(now, cluster.all_reduce(own, replicas), 2 * (n - 1) / n * own)

    def walk(order: Sequence[Part], now: float, is_backward: bool) -> float:
        coming = [part.gathered for part in order if part.gathered][::-1]
        arrival = one_way(now, coming.pop()) if coming else now
        for part in order:
            if part.gathered:
                now = max(now, arrival)
                arrival = one_way(now, coming.pop()) if coming else now
            now += part.backward if is_backward else part.forward
            if is_backward and part.gathered:
                reduce(now, part.parameters)
        return now

    root = sum(part.parameters for part in parts if not part.gathered)
    now = walk(parts, one_way(0.0, 4 * root), False)
    now = walk(parts[::-1], now, True)
    reduce(now, root)
    end = max(now, network.free)
    if is_last:
        end = network.carry(end, cluster.all_reduce(4, shards), 4)  # the norm
    return end - sum(part.forward + part.backward for part in parts), network.sent


def mean(timings: Sequence[Timing]) -> Timing:
    """Of steps that are equally frequent."""
    return Timing(*(sum(values) / len(timings) for values in zip(*timings, strict=True)))
