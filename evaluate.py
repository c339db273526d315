"""FID, sFID, Inception Score, Precision, Recall and FDD of a set of images, as OpenAI's ADM evaluator computes them.

    python evaluate.py REF SAMPLES [--metrics fid sfid is precision recall fdd] [--output metrics.json]

REF, SAMPLES: .npz files in ADM's format, or folders of PNG. Alone or under torchrun: the result is the same.
"""

import sys
from pathlib import Path

from accelerate import PartialState

from common import files
from common.distributed import end_with_launcher
from common.errors import UserError, cli_main
from config.parsing import parse
from config.tool_options import EvaluateConfig
from metrics.evaluation import METRICS, evaluate, start_processes
from sampling import checks

NAMES = {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "Precision", "recall": "Recall", "fdd": "FDD"}


@cli_main
def main(argv: list[str] | None = None) -> None:
    config, _ = parse(EvaluateConfig, argv, prog="evaluate.py")
    if config.ref is None or config.samples is None:
        raise UserError("give the reference and the samples: evaluate.py REF SAMPLES, before --metrics")
    output = Path(config.output)
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; wanted: a JSON file")
    checks.check_folder("--output: the folder", output.parent)
    end_with_launcher()
    state = start_processes()
    found = evaluate(config, state, lambda message: _warn(state, message))
    if found is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(found, output)
        print(table(found))
        print(f"{config.samples} against {config.ref}: {config.output}")
    state.destroy_process_group()


def table(found: dict) -> str:
    """The figures that were asked for, and the number of images."""
    asked = [name for name in METRICS if found[name] is not None]
    cells = {NAMES[name]: f"{found[name]:.4f}" for name in asked}
    cells |= {"samples": str(found["num_samples"]), "reference": str(found["num_ref"])}
    return "\n".join("| " + " | ".join(line) + " |" for line in (cells, ["---"] * len(cells), cells.values()))


def _warn(state: PartialState, message: str) -> None:
    if state.is_main_process:
        print(f"evaluate.py: warning: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
