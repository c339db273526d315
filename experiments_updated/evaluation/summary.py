"""Adds an evaluation to summary.csv and summary.md: run, step, budget, guidance, counts, figures. Given again, its line is replaced.

python experiments_updated/evaluation/summary.py METRICS.json --dest results
"""

import argparse
import csv
import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.errors import UserError, cli_main
from common.files import make_folder, write_atomically

SETTINGS = ("run", "weights", "step", "budget", "guidance", "interval", "sampler", "seed", "samples", "reference")
FIGURES = ("fid", "sfid", "is", "precision", "recall", "fdd")


@cli_main
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("metrics", type=Path, help="JSON file of evaluate.py")
    parser.add_argument("--dest", type=Path, default=Path("results"), help="folder of summary.csv and summary.md")
    options = parser.parse_args(argv)
    new = row(options.metrics)
    table = options.dest / "summary.csv"
    rows = list(csv.DictReader(table.open(newline="", encoding="utf-8"))) if table.is_file() else []
    same = [i for i, old in enumerate(rows) if all(old.get(name) == new[name] for name in SETTINGS)]
    rows[slice(same[0], same[0] + 1) if same else slice(len(rows), None)] = [new]
    content = io.StringIO(newline="")
    writer = csv.DictWriter(content, SETTINGS + FIGURES, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    make_folder(options.dest)
    write_atomically(table, content.getvalue())
    lines = [SETTINGS + FIGURES, ["---"] * len(SETTINGS + FIGURES)]
    lines += [[r.get(name, "") if name in SETTINGS else _short(r.get(name)) for name in lines[0]] for r in rows]
    write_atomically(table.with_suffix(".md"), "".join("| " + " | ".join(line) + " |\n" for line in lines))
    print(f"{table}: {len(rows)} line(s)")


def row(path: Path) -> dict[str, str]:
    """The line of one evaluation, from its JSON and the record that generate.py leaves beside the samples."""
    try:
        found = json.loads(path.read_text())
        samples = Path(found["samples"])
        record_path = samples.with_suffix(".json") if samples.suffix == ".npz" else samples.with_name(samples.name + ".json")
        made = json.loads(record_path.read_text())
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be summed up: {error}") from None
    steps = "+".join(map(str, made.get("num_steps_per_scale") or [made["num_steps"]]))  # of each stage, for DFM
    values = {
        "run": samples.parent.name,
        "weights": made["weights"],
        "step": made["ckpt_step"],
        "budget": made["inference_budget"] or 1,
        "guidance": guidance(made),
        "interval": f"{made['guidance_low']:g}-{made['guidance_high']:g}",
        "sampler": f"{made['mode']}{' heun' if made['heun'] else ''} {steps}",
        "seed": made["global_seed"],
        "samples": found["num_samples"],
        "reference": found["num_ref"] or "",
    }
    return {name: str(value) for name, value in values.items()} | {
        name: "" if found[name] is None else repr(found[name]) for name in FIGURES
    }


def guidance(made: dict) -> str:
    """`none`, `cfg 1.5`, `ccfg 4 at 0.0625`, `autoguidance 2 at 0.0625`."""
    if made["cfg_scale"] == 1:
        return "none"
    if made["unconditional_inference_budget"] is None:
        return f"cfg {made['cfg_scale']:g}"
    kind = "autoguidance" if made["autoguidance"] else "ccfg"
    return f"{kind} {made['cfg_scale']:g} at {made['unconditional_inference_budget']:g}"


def _short(figure: str | None) -> str:
    return f"{float(figure):.4f}" if figure else ""


if __name__ == "__main__":
    main()
