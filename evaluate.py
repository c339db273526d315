"""FID, sFID, Inception Score, Precision and Recall of a set of images, as OpenAI's ADM evaluator computes them; and others.

    python evaluate.py REF SAMPLES [--metrics fid fdd kid mind density coverage dino_precision cmmd …] [--output metrics.json]

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
from metrics.evaluation import METRICS, NAMES, evaluate


@cli_main
def main(argv: list[str] | None = None) -> None:
    """Evaluate a set of images: print a table, write a JSON file."""
    config, _ = parse(EvaluateConfig, argv, prog="evaluate.py")
    if config.ref is None or config.samples is None:
        raise UserError("give the reference and the samples: evaluate.py REF SAMPLES, before --metrics")
    output = Path(config.output)
    check_output("--output", output)
    end_with_launcher()
    state = start_processes(config.timeout_minutes)
    set_tf32(False)
    if config.prompts and not config.clip_score:
        raise UserError(f"--prompts {config.prompts}: only --clip-score looks at prompts")
    results = evaluate(config, state, warn)
    if results is not None:
        make_folder(output.parent, "--output")
        write_json(results, output, option="--output")
        print(table(results))
        print(f"{config.samples} against {config.ref}: {config.output}")
    state.destroy_process_group()


def table(results: dict) -> str:
    """The computed figures and the number of images, as a Markdown table of one row."""
    known = {name: results[name] for name in METRICS if results.get(name) is not None}
    cells = {NAMES[name]: f"{value:.4f}" for name, value in known.items()}
    cells |= {"samples": str(results["num_samples"]), "reference": str(results["num_ref"])}
    return markdown_table(list(cells), [list(cells.values())])


if __name__ == "__main__":
    main()
