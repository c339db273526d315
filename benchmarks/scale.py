"""How a training step scales over GPUs that are not at hand: `python -m benchmarks.scale --model ELIT-SiT-XL/2 --gpus 8 64 256 1024`.

Estimates, from the trace of a step (`benchmarks.trace`), a card's data sheet, and the network's bandwidths and latencies
(`training.cluster`): for DDP, for `--shard` by node, and for `--shard full`; in eager mode and compiled. What is assumed is printed.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from common.errors import UserError, cli_main, first_line
from common.precision import AMP_TYPES
from common.tables import markdown_table
from config.options import TrainConfig
from models.backbone import Backbone
from models.vae import SD_VAE
from training.cards import CARDS, Card, find_card
from training.cluster import MIB, Cluster, Link, Scheme
from training.memory import GIB, process_bytes
from training.setup import build_model
from training.sharding import COMM_TYPES
from training.step_time import Machine, estimate
from training.step_trace import Trace, compiled, trace_step, trace_update

HEAD = ["GPUs", "shards", "eager ms", "host ms", "compiled ms", "host ms", "waiting ms", "sent GB", "GiB a card", "images/s", "MFU"]  # fmt: skip


def measured_rates(path: str, mixed_precision: str) -> tuple[float, float]:
    """TFLOP/s of large products and GB/s of copies that `benchmarks.gpu` found. Raises UserError where they are not there."""
    try:
        entries = json.loads(Path(path).read_text())["parts"]["machine"]["entries"]
        values = {entry["name"]: entry["values"] for entry in entries if "values" in entry}
        rates = values[f"{mixed_precision} products"]["TFLOP/s"], values["device copy"]["GB/s read and written"]
        return float(rates[0]), float(rates[1])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--measured {path}: not a gpu.json with its part machine: {first_line(error)}") from None


def machine_of(args: argparse.Namespace, card: Card) -> Machine:
    """The card, with what was measured or is assumed instead of its data sheet."""
    found = Machine.of(card, args.peak)
    tflops, gbs = measured_rates(args.measured, args.mixed_precision) if args.measured else (None, None)
    tflops, gbs = args.tflops or tflops, args.memory_gbs or gbs
    given = {
        "flops": tflops and tflops * 1e12,
        "bandwidth": gbs and gbs * 1e9,
        "eager_launch": args.launch_us and args.launch_us[0] * 1e-6,
        "compiled_launch": args.launch_us and args.launch_us[1] * 1e-6,
    }
    return found._replace(**{name: value for name, value in given.items() if value})


def cluster_of(args: argparse.Namespace, gpus: int) -> Cluster:
    """So many GPUs by the options."""
    inside, between = (Link(gbs * 1e9, us * 1e-6) for gbs, us in zip(args.link_gbs, args.link_us, strict=True))
    return Cluster(gpus, min(args.per_node, gpus), inside, between, args.reduction)


def table(args: argparse.Namespace, config: TrainConfig, machine: Machine, budget: float | None) -> str:
    """A row for each number of GPUs and of shards."""
    with torch.device("meta"):
        model = build_model(config, SD_VAE, [])
    scheme = Scheme(1, COMM_TYPES[config.comm_dtype].itemsize, config.bucket_cap_mb * MIB)
    traces: dict[bool, tuple[Trace, Trace]] = {}  # whether it is sharded → as it is, compiled
    for is_sharded in (False, True):
        one = dataclasses.replace(config, shard="full" if is_sharded else "none")
        trace = trace_step(one, args.batch_size, budget, update=False, processes=2)
        traces[is_sharded] = trace, compiled(trace)
    rows = []
    for gpus in args.gpus:
        for size in args.shards or sorted({1, min(args.per_node, gpus), gpus}):
            own = dataclasses.replace(config, shard=str(size) if size > 1 else "none")
            update = trace_update(own, gpus)
            both = [dataclasses.replace(t, ops=t.ops + update) for t in traces[size > 1]]
            rows.append(row(args, machine, cluster_of(args, gpus), scheme._replace(shard_size=size), both, model, own))
    return markdown_table(HEAD, rows)


def row(
    args: argparse.Namespace,
    machine: Machine,
    cluster: Cluster,
    scheme: Scheme,
    traces: list[Trace],
    model: Backbone,
    config: TrainConfig,
) -> list[str]:
    """One row; `traces`: as it is, and compiled."""
    eager, fast = (estimate(trace, machine, cluster, scheme) for trace in traces)
    memory = process_bytes(model, config, cluster.gpus).total + sum(traces[0].saved.values())
    seconds, flops = fast.timing.seconds, sum(op.flops for op in traces[1].ops)
    return [
        f"{cluster.gpus:,}",
        "1 (DDP)" if scheme.shard_size == 1 else f"{scheme.shard_size:,}",
        f"{1e3 * eager.timing.seconds:.0f}",
        f"{1e3 * eager.host:.0f}",
        f"{1e3 * seconds:.0f}",
        f"{1e3 * fast.host:.0f}",
        f"{1e3 * fast.timing.waiting:.1f}",
        f"{fast.timing.sent / 1e9:.2f}",
        f"{memory / GIB:.1f}" + ("" if memory < args.capacity else " (too much)"),
        f"{args.batch_size * cluster.gpus / seconds:,.0f}",
        f"{flops / seconds / args.peak / 1e12:.0%}",
    ]


@cli_main
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="scale.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="ELIT-SiT-XL/2", help="registered name [%(default)s]")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--group-size", type=int, default=4, help="--elit-group-size [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=32, help="images of one GPU [%(default)s]")
    parser.add_argument("--budget", type=float, nargs="+", help="inference budgets of ELIT, a table each [the full one]")
    parser.add_argument("--mixed-precision", default="bf16", choices=[name for name, dtype in AMP_TYPES.items() if dtype])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument("--per-node", type=int, default=8, help="GPUs of a node [%(default)s]")
    parser.add_argument("--shards", type=int, nargs="+", help="GPUs that a model is split over [1, those of a node, all]")
    parser.add_argument("--card", default="H100", help=f"one of {', '.join(CARDS)} [%(default)s]")
    parser.add_argument("--measured", metavar="GPU_JSON", help="take the next two from a run of `benchmarks.gpu`")
    parser.add_argument("--tflops", type=float, help="TFLOP/s that products sustain [0.6 of the card's]")
    parser.add_argument("--memory-gbs", type=float, help="GB/s that element-wise kernels sustain [0.78 of the card's]")
    parser.add_argument("--launch-us", type=float, nargs=2, help="µs of the host to launch a kernel, and a compiled one [16 8]")
    parser.add_argument("--link-gbs", type=float, nargs=2, default=[360, 320], metavar=("GPU", "NODE"), help="GB/s that a GPU sends in its node, and a node to others [%(default)s]")  # fmt: skip
    parser.add_argument("--link-us", type=float, nargs=2, default=[3, 10], metavar=("GPU", "NODE"), help="their latencies [%(default)s]")  # fmt: skip
    parser.add_argument("--reduction", choices=("ring", "tree", "faster"), default="faster", help="how gradients are summed [%(default)s]")  # fmt: skip
    parser.add_argument("--comm-dtype", choices=list(COMM_TYPES), default="fp32")
    parser.add_argument("--bucket-cap-mb", type=int, default=25)
    args = parser.parse_args(argv)
    card = find_card(args.card)
    if card is None:
        raise UserError(f"--card {args.card}: not known; choose from {', '.join(CARDS)}")
    for gpus in args.gpus:
        if gpus < 1 or gpus % min(args.per_node, gpus):
            raise UserError(f"--gpus {gpus}: must be a multiple of --per-node {args.per_node}, or fewer")
        if any(size < 1 or gpus % size for size in args.shards or ()):
            raise UserError(f"--shards {' '.join(map(str, args.shards))}: {gpus} GPUs cannot be divided into such groups")
    args.peak, args.capacity = card.half, card.memory * GIB
    machine = machine_of(args, card)
    config = TrainConfig(
        model=args.model, exp_name="scale", resolution=args.resolution, mixed_precision=args.mixed_precision,
        comm_dtype=args.comm_dtype, bucket_cap_mb=args.bucket_cap_mb, elit_group_size=args.group_size,
    )  # fmt: skip
    for budget in args.budget or [None]:
        at = "" if budget is None else f", budget {budget:g}"
        print(
            f"\n{args.model}, {args.resolution} px{at}, {args.batch_size} images a GPU, {args.mixed_precision}, {args.card}\n"
        )
        print(table(args, config, machine, budget))
    print(f"\nEstimates. Assumed: {machine.describe()}; {cluster_of(args, max(args.gpus)).describe()}.")


if __name__ == "__main__":
    main()
