"""Does the model draw what the prompts say? The share of quadrants as asked, by budget, and a picture of prompts × budgets.

Writes text_table.md, text_results.json and text_budgets.png. `--prompts` names the demo's prompts.txt, beside which prompts.json
says what each asks for. The samples of every budget must be there (generate.py); the control, canvases of the null prompt, is
drawn here.
"""

import dataclasses
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere


import generate
import models
from common.errors import UserError, cli_main
from common.files import check_folder, parse_json
from common.plotting import labelled_grid
from common.tables import markdown_table
from config.options import GenerateConfig
from config.parsing import require_options
from config.rules import option
from experiments_updated import digit_classifier
from experiments_updated.quickstart_report import name_of_budget, read_samples
from models.conditioning import null_condition
from preprocessing.demo import PROMPTS_FILE
from preprocessing.digit_captions import CAPTIONS, COUNTED, PARAPHRASES, share_as_asked
from sampling import session
from sampling.session import Session

SHOWN = {"position": 3, "count": 2, "numerals": 1, "reordered": 1, "reworded": 1}  # held-out prompts in the picture


@dataclasses.dataclass
class ReportConfig(GenerateConfig):
    """Options of quickstart_text_report.py: those of the samples, and where to write."""

    output_dir: str = option(
        "output", "quickstart_text", "folder of text_budgets.png, text_table.md and text_results.json", images=False
    )
    budgets: list[float] = option(
        "sample", [0.0625, 0.25, 1.0], "budgets to compare, the full one last", gt=0, le=1, images=False
    )


@cli_main
def main(argv: list[str] | None = None) -> None:
    """The command: options → text_budgets.png, text_table.md and text_results.json."""
    config, _, weights = session.from_command_line(ReportConfig, argv, "quickstart_text_report.py", check_options)
    asked = read_prompts(config)
    config.num_fid_samples = len(asked)
    generate.name_run(config, weights)
    generate.check(config)
    samples = {b: read_samples(dataclasses.replace(config, inference_budget=str(b))) for b in config.budgets}
    loaded = session.load(config, weights, session.device())
    out = Path(config.output_dir)
    classifier = digit_classifier.load_or_train(out / "classifier.pt")
    accuracy = digit_classifier.accuracy(classifier, *digit_classifier.digit_images(held_out=True))
    print(f"digit classifier: {accuracy:.3f} of the 1,000 held-out digits right")

    results = []
    for budget, canvases in samples.items():
        read = read_digits(classifier, torch.from_numpy(canvases).permute(0, 3, 1, 2))
        control = read_digits(classifier, null_canvases(loaded, config, budget, asked))
        result = {"budget": budget, "gflops_per_forward": models.count_flops(loaded.model, budget) / 1e9}
        results.append(result | {"sets": scores(asked, read, control)})
    text = "\n\n".join(tables(results))
    print(text)
    (out / "text_table.md").write_text(text + "\n")
    content = {"classifier_accuracy": accuracy, "budgets": results}
    (out / "text_results.json").write_text(json.dumps(content, indent=1) + "\n")
    chosen = examples(asked)
    labels = ["\n".join(textwrap.wrap(asked[i]["prompt"], 24)) for i in chosen]
    rows = [f"budget {name_of_budget(r['budget'])}\n{r['gflops_per_forward']:.2f} GFLOPs" for r in results]
    grid = np.stack([canvases[chosen] for canvases in samples.values()])
    labelled_grid(grid, rows, labels, out / "text_budgets.png", inches=1.45, fontsize=7)


def check_options(config: ReportConfig) -> None:
    """Refuse what no checkpoint can be sampled with; nothing is read or downloaded before."""
    require_options(config, "prompts")
    generate.check_options(config)
    check_folder("--output-dir", config.output_dir)


def read_prompts(config: ReportConfig) -> list[dict[str, Any]]:
    """What each prompt of `--prompts` asks for; see `demo.demo_prompts`. Raises UserError where nothing tells it."""
    where = Path(config.prompts or "").with_name(PROMPTS_FILE)
    try:
        asked = parse_json(where.read_bytes(), where)["prompts"]
    except (OSError, KeyError, TypeError):
        raise UserError(f"--prompts {config.prompts}: no {where}, which says what they ask for") from None
    if [p["prompt"] for p in asked] != Path(config.prompts or "").read_text().splitlines():
        raise UserError(f"--prompts {config.prompts}: {where} is of other prompts")
    return asked


def read_digits(classifier: digit_classifier.DigitClassifier, canvases: torch.Tensor) -> list[list[int]]:
    """What the classifier sees in canvases, uint8 (n, 3, 64, 64): four digits each, row by row."""
    _, logits = digit_classifier.features(classifier, digit_classifier.quarters(canvases))
    return logits.argmax(dim=1).view(-1, 4).tolist()


def null_canvases(loaded: Session, config: ReportConfig, budget: float, asked: list[dict[str, Any]]) -> torch.Tensor:
    """As many canvases of the null prompt as a set has prompts, uint8 (n, 3, 64, 64); nothing guides them."""
    count = max(len(of_set(asked, *key)) for key in sets(asked))
    sampled = loaded.with_options(dataclasses.replace(config, inference_budget=str(budget), cfg_scale=1.0))
    drawn = []
    for start in range(0, count, config.per_proc_batch_size):
        indices = range(start, min(start + config.per_proc_batch_size, count))
        null = null_condition(loaded.model, sampled.condition(indices))
        with torch.no_grad():
            guidance = session.guidance(sampled.config)
            drawn.append(sampled.decode(sampled.latents(guidance, config.global_seed, indices, null)).cpu())
    return torch.cat(drawn)


def sets(asked: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """The sets of prompts: (form, held out), in their order."""
    return list(dict.fromkeys((p["form"], p["held_out"]) for p in asked))


def of_set(asked: list[dict[str, Any]], form: str, held_out: bool) -> list[int]:
    """The indices of a set's prompts."""
    return [i for i, p in enumerate(asked) if (p["form"], p["held_out"]) == (form, held_out)]


def scores(
    asked: list[dict[str, Any]], read: Sequence[Sequence[int]], control: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Of each set the mean share of quadrants as asked, its standard error over prompts, and the control's mean share; by count also
    the share of quadrants that show any of the digits asked for.

    The control's canvases answer no prompt, so each is scored against every prompt of the set.
    """
    scored = []
    for form, held_out in sets(asked):
        chosen = of_set(asked, form, held_out)
        shares = np.array([share_as_asked(form, asked[i]["digits"], read[i]) for i in chosen])
        null = np.mean([[share_as_asked(form, asked[i]["digits"], digits) for digits in control] for i in chosen])
        error = shares.std(ddof=1) / len(shares) ** 0.5 if len(shares) > 1 else 0.0
        scored.append(
            {
                "form": form,
                "held_out": held_out,
                "prompts": len(chosen),
                "as_asked": float(shares.mean()),
                "standard_error": float(error),
                "null_prompt": float(null),
            }
        )
        if form in COUNTED:
            scored[-1]["any_asked"] = float(np.mean([[d in asked[i]["digits"] for d in read[i]] for i in chosen]))
    return scored


def tables(results: list[dict[str, Any]]) -> list[str]:
    """The table of the captions' forms, and that of the paraphrases."""
    return [_table(results, CAPTIONS), _table(results, PARAPHRASES)]


def _table(results: list[dict[str, Any]], forms: Any) -> str:
    chosen = [s for s in results[0]["sets"] if s["form"] in forms]
    head = ["budget", "GFLOPs / forward"]
    for i, s in enumerate(chosen):
        kind = "held out" if s["held_out"] else "seen"
        head += [f"{s['form']}, {kind}", *(["any of them"] if "any_asked" in s else [])]
        if i + 1 == len(chosen) or chosen[i + 1]["form"] != s["form"]:
            head.append("null prompt")
    lines = []
    for r in results:
        line = [name_of_budget(r["budget"]), f"{r['gflops_per_forward']:.3f}"]
        of_forms = [s for s in r["sets"] if s["form"] in forms]
        for i, s in enumerate(of_forms):
            line.append(f"{s['as_asked']:.3f} ± {s['standard_error']:.3f}")
            line += [f"{s['any_asked']:.3f}"] if "any_asked" in s else []
            if i + 1 == len(of_forms) or of_forms[i + 1]["form"] != s["form"]:
                line.append(f"{s['null_prompt']:.3f}")
        lines.append(line)
    return markdown_table(head, lines)


def examples(asked: list[dict[str, Any]]) -> list[int]:
    """The first held-out prompts of each form, for the picture; of no combination twice, where there are others."""
    chosen: list[int] = []
    for form, count in SHOWN.items():
        candidates = of_set(asked, form, True)
        start = len(chosen) % max(len(candidates), 1)
        chosen += (candidates[start:] + candidates[:start])[:count]
    return chosen


if __name__ == "__main__":
    main()
