"""Train a diffusion transformer on VAE latents: `accelerate launch train.py --config …` on one process or hundreds.

Build, loop, save. Every random number belongs to (seed, forward), so a run does not depend on the number of processes.
"""

from common import early_signals

if __name__ == "__main__":
    early_signals.catch()  # the imports below take seconds, in which a scheduler may end the job

import os

from common.distributed import end_with_launcher
from common.errors import cli_main
from common.logging import warn
from config.options import TrainConfig
from config.parsing import parse, require_options
from training import plan
from training.preemption import Preemption
from training.setup import check, resolve
from training.trainer import Trainer


@cli_main
def main(argv: list[str] | None = None) -> None:
    """Parse and check the options, then train, or print the plan."""
    config, given = parse(TrainConfig, argv, prog="train.py")
    require_options(config)
    for message in check(config, given):
        warn(message)
    config = resolve(config)
    if config.plan:
        early_signals.release()
        if os.environ.get("RANK", "0") == "0":
            plan.Plan(config).run()
        return
    end_with_launcher()
    with Preemption() as preemption:
        Trainer(config).run(preemption)


if __name__ == "__main__":
    main()
