"""One table and one plot from checkpoints: figures over guidance, budgets, steps and any other sampling option.

    python sweep.py --ckpt A --ref REF --cfg-scale 1 1.5 4 --inference-budget 0.0625 0.25 1 --num-steps 25 50 --seeds 0 1 2

Alone or under torchrun. Every combination is a cell: one JSON file, named by the hash of all that decides its figures. Run again, a
sweep does what is missing; several jobs may share the folder. Images go from the sampler to the feature networks in memory.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from common.distributed import end_with_launcher, start_processes
from common.errors import UserError, cli_main
from common.logging import warn
from common.tables import markdown_table
from config.options import GenerateConfig
from config.parsing import flag, parse, require_options
from config.rules import names
from config.sweep_options import AXES, PROMPTS, SweepConfig
from config.values import kinds
from sweeping import plots, results
from sweeping.axes import shown
from sweeping.cells import Cell, Record, Store
from sweeping.planning import BEST, Plan, check_options
from sweeping.results import Point, points_of
from sweeping.running import Runner, seconds_per_image


@cli_main
def main(argv: list[str] | None = None) -> None:
    """The command: options → cells → tables and plots."""
    config, given = parse(SweepConfig, argv, prog="sweep.py")
    require_options(config, "ckpt", "ref")
    points = check_options(config, given)
    end_with_launcher()
    state = start_processes(config.timeout_minutes)
    runner = Runner(Plan(config, given, points, state), Store(config.dest, warn))
    cells = runner.cells(config.coarse or config.num_fid_samples)
    full = runner.cells(config.num_fid_samples) if config.coarse else cells
    if state.is_main_process and cells:
        check_bound(config, cells)
    if config.plan:
        if state.is_main_process:
            print_plan(config, runner, cells)
    else:
        records = runner.run(cells, range(len(runner.sources)), config.coarse or config.num_fid_samples)
        if config.coarse:
            chosen = best_numbers(config, cells, records) if state.is_main_process else []
            (chosen,) = broadcast_object_list([chosen])
            records = runner.run(full, chosen, config.num_fid_samples)
        if state.is_main_process:
            finish(config, given, runner, records)
    state.wait_for_everyone()
    state.destroy_process_group()


def check_bound(config: Any, cells: Sequence[Cell]) -> None:
    """Refuse a bound on FLOPs that no cell is within."""
    bound = results.parse_bound(config.best_under) if config.best_under else None
    cheapest = min(cells, key=lambda cell: cell.gflops)
    is_known = not any(cell.config.core_cache for cell in cells)
    if bound and not bound.is_time and is_known and cheapest.gflops > bound.limit:
        raise UserError(results.no_cell_within(bound, cheapest.gflops, cheapest.options))


def best_numbers(config: Any, cells: Sequence[Cell], records: Sequence[Record]) -> list[int]:
    """Places of the cells that are scored in full: of each reference the best three within the bound, with all their seeds."""
    bound = results.parse_bound(config.best_under) if config.best_under else None
    chosen: set[str] = set()
    refs = {cell.key: cell.ref for cell in cells}  # a record may have another path of the same file
    for ref in dict.fromkeys(config.ref):
        points = points_of(record for record in records if refs[record["key"]] == ref)
        if bound:
            results.best_under(bound, points)  # refuses where there is none
            points = [point for point in points if bound.cost(point) <= bound.limit]
        chosen |= {key for point in results.best(points, BEST) for key in point.keys}
    return [number for number, cell in enumerate(cells) if cell.key in chosen]


def print_plan(config: Any, runner: Runner, cells: Sequence[Cell]) -> None:
    """A line for each cell: its options, GFLOPs, whether it is done, the estimated time of drawing; and the sum."""
    options = [{"name": source.name} | cell.options for cell, (source, _) in zip(cells, runner.sources, strict=True)]
    varying = [n for n in ("name", *results.COLUMNS) if len({shown(o.get(n)) for o in options}) > 1]
    seconds = [
        s * cell.count / runner.plan.state.num_processes
        for s, cell in zip(seconds_per_image(runner, cells), cells, strict=True)
    ]
    done = [runner.store.read(cell.key) is not None for cell in cells]
    rows = [
        [*(shown(o.get(n)) for n in varying), f"{cell.gflops:.4g}", "done" if is_done else f"{s / 60:.3g} min"]
        for o, cell, s, is_done in zip(options, cells, seconds, done, strict=True)
    ]  # what a core cache saves is not known yet
    print(markdown_table([*varying, "GFLOPs / image", "drawing"], rows))
    left = sum(s for s, is_done in zip(seconds, done, strict=True) if not is_done)
    more = f"; then the best {BEST} with {config.num_fid_samples:,}" if config.coarse else ""
    print(
        f"{len(cells)} cells of {cells[0].count:,} images, {sum(done)} done; the others take about {left / 60:.3g} min to draw{more}"
    )


def finish(config: Any, given: dict[str, Any], runner: Runner, records: Sequence[Record]) -> None:
    """Write tables and plots of all cells in the folder, and say what was done and what is best."""
    dest, everything = Path(config.dest), runner.store.read_all()
    points = points_of(everything)
    results.write_csv(everything, dest / "sweep.csv")
    results.write_markdown(points, dest / "sweep.md")
    written = [dest / "sweep.csv", dest / "sweep.md", *plots.write_plots(points, dest)]
    print(f"{runner.done} cells done now, {len(everything)} in {dest}: {', '.join(path.name for path in written)}")
    found = points_of(records)
    bound = results.parse_bound(config.best_under) if config.best_under else None
    point = results.best_under(bound, found) if bound else results.best(found)[0]
    metric = results.main_metric(point.figures)
    within = f" within {bound.text}" if bound else ""
    print(f"best{within}: {metric} {point.figures[metric]}, {point.gflops:.4g} GFLOPs and {point.ms:.4g} ms an image")
    print(generate_line(point, given))


def generate_line(point: Point, given: dict[str, Any]) -> str:
    """The command that draws the images of a point."""
    defaults, options = GenerateConfig(), point.options
    words = ["python", "generate.py", "--ckpt", point.ckpt]
    shared = (*names(GenerateConfig, images=True), *PROMPTS)
    by_hand = {name: given[name] for name in shared if name in given and name not in AXES}
    values = {name: options[name] for name in ("global_seed", *AXES) if name in options}
    if "num_steps_per_scale" in values:
        del values["num_steps"]
    everything: dict[str, Any] = by_hand | values | {"num_fid_samples": point.count}
    for name, value in everything.items():
        if value == getattr(defaults, name) and name not in ("cfg_scale", "num_steps", "global_seed"):
            continue
        items = [str(v) for v in value] if kinds(GenerateConfig)[name].is_list else [shown(value)]
        words += [flag(name), *(item.lower() if isinstance(value, bool) else item for item in items)]
    return shlex.join(words)


if __name__ == "__main__":
    main()
