"""Train a diffusion transformer on VAE latents: `accelerate launch train.py --config …` on one process or hundreds.

Build, loop, save. Every random number belongs to (seed, forward), so a run does not depend on the number of processes.
"""

import os

from common.distributed import end_with_launcher
from common.errors import cli_main
from config.options import TrainConfig
from config.parsing import parse, require_options
from training import plan
from training.preemption import Preemption
from training.setup import check
from training.trainer import Trainer


@cli_main
def main(argv: list[str] | None = None) -> None:
    config, given = parse(TrainConfig, argv, prog="train.py")
    require_options(config)
    check(config, given)
    if config.plan:
        if os.environ.get("RANK", "0") == "0":
            plan.Plan(config).run()
        return
    end_with_launcher()
    with Preemption() as preemption:
        Trainer(config, preemption).run(preemption)


if __name__ == "__main__":
    main()
