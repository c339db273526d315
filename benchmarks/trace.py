"""What a training step would launch on a GPU, without one: `python -m benchmarks.trace --model ELIT-SiT-XL/2 --batch-size 32`.

Kernels, bytes, FLOPs and what autograd keeps, by the part of the step (see `training.step_trace`). With `--compile` the regions that
`torch.compile` gets count as fused, by a model of it.
"""

import argparse
from collections import defaultdict

import torch

from common.errors import cli_main
from common.precision import AMP_TYPES
from common.tables import markdown_table
from config.options import TrainConfig
from training.step_trace import Trace, compiled, trace_step


def table(trace: Trace) -> str:
    """Kernels, GB of traffic, TFLOPs and GiB kept, by part and kind, as a Markdown table."""
    head = ["part", "kernels", "products", "attention", "element-wise", "element-wise GB", "all GB", "TFLOPs", "kept GiB"]
    rows = []
    for name, parts in [*((part, [part]) for part in trace.parts), ("sum", trace.parts)]:
        kernels, size, flops = trace.total(parts=parts)
        kinds = [trace.total(kind, parts) for kind in ("products", "attention", "element-wise")]
        kept = sum(trace.saved.get(part, 0) for part in parts) / 2**30
        counts = [f"{count:,}" for count in (kernels, *(k[0] for k in kinds))]
        rows.append([name, *counts, f"{kinds[2][1] / 1e9:.2f}", f"{size / 1e9:.2f}", f"{flops / 1e12:.3f}", f"{kept:.2f}"])
    return markdown_table(head, rows)


@cli_main
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="trace.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="ELIT-SiT-XL/2", help="registered name [%(default)s]")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32, help="images of one process [%(default)s]")
    parser.add_argument("--budget", type=float, nargs="+", help="inference budgets of ELIT [the full one]")
    parser.add_argument("--mixed-precision", default="bf16", choices=list(AMP_TYPES))
    parser.add_argument("--processes", type=int, default=1, help="that train together, for the update [%(default)s]")
    parser.add_argument("--compile", action="store_true", help="as compiled (a model of it, see above)")
    parser.add_argument("--kernels", type=int, default=0, help="also print so many of the operations with most traffic")
    args = parser.parse_args(argv)
    config = TrainConfig(model=args.model, exp_name="trace", resolution=args.resolution, mixed_precision=args.mixed_precision)
    for budget in args.budget or [None]:
        trace = trace_step(config, args.batch_size, budget, processes=args.processes)
        trace = compiled(trace) if args.compile else trace
        at = "" if budget is None else f", budget {budget:g}"
        how = "compiled" if args.compile else "eager"
        print(
            f"\n{args.model}, {args.resolution} px, {args.batch_size} images{at}, {args.mixed_precision}, {how}, PyTorch {torch.__version__}\n"
        )
        print(table(trace))
        print(f"\nthe update reads and writes {trace.total(parts=['update'])[1] / trace.parameters:.1f} bytes per parameter")
        sums: dict[tuple[str, str, bool], list[int]] = defaultdict(lambda: [0, 0])
        for op in trace.ops:
            entry = sums[op.part, op.name, op.backward]
            entry[0] += op.kernels
            entry[1] += op.bytes
        for (part, name, backward), (kernels, size) in sorted(sums.items(), key=lambda i: -i[1][1])[: args.kernels]:
            print(f"{part:22} {name:42} {'backward' if backward else 'forward':9} {kernels:6,} {size / 1e9:8.2f} GB")


if __name__ == "__main__":
    main()
