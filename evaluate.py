"""FID, sFID, Inception Score, Precision, Recall and FDD of a set of images, as OpenAI's ADM evaluator computes them.

    python evaluate.py REF SAMPLES [--metrics fid sfid is precision recall fdd] [--output metrics.json]

REF, SAMPLES: .npz files in ADM's format, or folders of PNG. Alone or under torchrun: the result is the same.
"""

from pathlib import Path

from common.distributed import end_with_launcher, start_processes
from common.errors import UserError, cli_main
from common.files import check_output, make_folder, write_json
from common.logging import warn
from common.precision import set_tf32
from common.tables import markdown_table
from config.parsing import parse
from config.tool_options import EvaluateConfig
from metrics.evaluation import METRICS, evaluate

NAMES = {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "Precision", "recall": "Recall", "fdd": "FDD"}


@cli_main
def main(argv: list[str] | None = None) -> None:
    """Evaluate a set of images: print a table, write a JSON file."""
    config, _ = parse(EvaluateConfig, argv, prog="evaluate.py")
    if config.ref is None or config.samples is None:
        raise UserError("give the reference and the samples: evaluate.py REF SAMPLES, before --metrics")
    output = Path(config.output)
    check_output("--output", output)
    end_with_launcher()
    state = start_processes()
    set_tf32(False)
    results = evaluate(config, state, warn)
    if results is not None:
        make_folder(output.parent, "--output")
        write_json(results, output, option="--output")
        print(table(results))
        print(f"{config.samples} against {config.ref}: {config.output}")
    state.destroy_process_group()


def table(results: dict) -> str:
    """The computed figures and the number of images, as a Markdown table of one row."""
    cells = {NAMES[name]: f"{results[name]:.4f}" for name in METRICS if results[name] is not None}
    cells |= {"samples": str(results["num_samples"]), "reference": str(results["num_ref"])}
    return markdown_table(list(cells), [list(cells.values())])


if __name__ == "__main__":
    main()
