"""DFM on the quick start's digits: stages.png (rows: stages and result, columns: classes) and the share of right digits."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere


import generate
from common.errors import UserError, cli_main
from common.plotting import labelled_grid
from config.options import GenerateConfig
from config.rules import option
from experiments_updated import digit_classifier
from sampling import image_folder, session
from sampling.conditions import labels_of


@dataclasses.dataclass
class ReportConfig(GenerateConfig):
    """Options of quickstart_dfm_report.py: those of the samples, and where to write."""

    output_dir: str = option("output", "quickstart", "folder of stages.png and dfm.json; classifier.pt is kept there")


@cli_main
def main(argv: list[str] | None = None) -> None:
    """The command: options → stages.png and dfm.json."""
    config, _, weights = session.from_command_line(ReportConfig, argv, "quickstart_dfm_report.py", generate.check_options)
    generate.name_run(config, weights)
    generate.check(config)
    folder = image_folder.images_folder(config)
    samples = folder.with_name(folder.name + ".npz")
    if not samples.is_file():
        raise UserError(f"--sample-dir {config.sample_dir}: no {samples}; make it with generate.py and the same options")
    loaded = session.load(config, weights, session.device())

    out = Path(config.output_dir)
    images = torch.from_numpy(np.load(samples)["arr_0"]).permute(0, 3, 1, 2)
    labels = labels_of(config, range(len(images))).repeat_interleave(4)
    classifier = digit_classifier.load_or_train(out / "classifier.pt")
    share = digit_classifier.accuracy(classifier, digit_classifier.quarters(images), labels)
    print(f"{share:.3f} of {len(labels)} digits in the asked class")
    (out / "dfm.json").write_text(json.dumps({"digits": len(labels), "digits_in_class": share}) + "\n")

    guidance, classes = session.guidance(config), range(config.num_classes)
    state = loaded.flow.sample_state(
        loaded.model, loaded.shape, config.global_seed, classes, torch.arange(config.num_classes), guidance
    )
    stages = loaded.flow.views(loaded.vae, state).cpu()
    names = [f"stage {s}" for s in range(len(stages) - 1)] + ["result"]
    columns = [str(c) for c in range(config.num_classes)]
    labelled_grid(stages.permute(0, 1, 3, 4, 2).numpy(), names, columns, out / "stages.png")


if __name__ == "__main__":
    main()
