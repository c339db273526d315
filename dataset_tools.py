r"""Makes training data and reference batches.

`convert`: any images → numbered PNGs; `encode`: → VAE latents; `text`: captions → text features; `pack`: → a few large files; `check`, `stats`: is a data set whole,
and the statistics of its latents; `vae`: VAE weights under other names → a folder of diffusers; `demo`: the images of the quick start; `reference`: images → a batch for `evaluate.py`.

    python dataset_tools.py convert --source=ImageNet/train --dest=DATA_DIR/images --resolution=256x256 \
        --transform=center-crop-dhariwal
    python dataset_tools.py encode --source=DATA_DIR/images --dest=DATA_DIR/vae-sd
    python dataset_tools.py text --source=DATA_DIR --encoder=openai/clip-vit-large-patch14 --length=77
    python dataset_tools.py pack --source=DATA_DIR/vae-sd --dest=DATA_DIR/packed
    python dataset_tools.py check DATA_DIR
    python dataset_tools.py stats DATA_DIR

Every command is resumable: run it again and it continues; complete files are kept. The label file or index is written last, so
that a data set which has one is whole.
"""

import sys
from collections.abc import Callable
from typing import Any

from common.distributed import end_with_launcher, start_processes
from common.errors import UserError, cli_main, did_you_mean
from common.logging import warn
from common.precision import set_tf32
from config.parsing import parse, require_options
from config.tool_options import (
    CheckConfig,
    ConvertConfig,
    DemoConfig,
    EncodeConfig,
    PackConfig,
    ReferenceConfig,
    StatsConfig,
    TextConfig,
    VAEConfig,
)
from preprocessing.check import check
from preprocessing.convert import convert
from preprocessing.demo import demo
from preprocessing.encode import encode
from preprocessing.ldm_vae import convert_vae
from preprocessing.pack import pack
from preprocessing.stats import stats
from preprocessing.text import text


def reference(config: ReferenceConfig) -> None:
    """Images of one size → a reference batch for evaluation; under torchrun, too."""
    from metrics.reference import make_reference

    state = start_processes(config.timeout_minutes)
    set_tf32(False)
    make_reference(config, state, warn)
    state.destroy_process_group()


COMMANDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "convert": (ConvertConfig, convert),
    "encode": (EncodeConfig, encode),
    "pack": (PackConfig, pack),
    "check": (CheckConfig, check),
    "stats": (StatsConfig, stats),
    "text": (TextConfig, text),
    "vae": (VAEConfig, convert_vae),
    "demo": (DemoConfig, demo),
    "reference": (ReferenceConfig, reference),
}


@cli_main
def main(argv: list[str] | None = None) -> None:
    """Run the command that the first argument names."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        for name, (config, _) in COMMANDS.items():
            print(f"{name}: {(config.__doc__ or '').partition(': ')[2]} Options: dataset_tools.py {name} -h")
        return
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}{did_you_mean(argv[0], COMMANDS)}; commands are {', '.join(COMMANDS)}")
    cls, run = COMMANDS[argv[0]]
    config, _ = parse(cls, argv[1:], prog=f"dataset_tools.py {argv[0]}")
    require_options(config)
    end_with_launcher()
    run(config)


if __name__ == "__main__":
    main()
