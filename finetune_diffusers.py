r"""Fine-tunes a latent interface in a pretrained transformer of diffusers, on precomputed latents and text features.

    python finetune_diffusers.py --transformer=Qwen/Qwen-Image --data-dir=FEATURES --output-dir=RUN \
        --read-after=8 --write-after=52 --group-size=8 --time-shift=2.0 --gradient-checkpointing

Alone, or on several GPUs by `accelerate launch`. The weights are RUN/elit.safetensors, for `elit_diffusers.load`. Run the command
again and it continues after the last save.
"""

from common.distributed import end_with_launcher
from common.errors import UserError, cli_main
from common.files import check_folder
from config.parsing import parse, require_options
from config.tool_options import FinetuneDiffusersConfig


@cli_main
def main(argv: list[str] | None = None) -> None:
    """Fine-tune, or continue."""
    config, _ = parse(FinetuneDiffusersConfig, argv, prog="finetune_diffusers.py")
    require_options(config)
    if config.read_after >= config.write_after:
        raise UserError(f"--read-after {config.read_after}: must be less than --write-after {config.write_after}")
    if config.train == "all" and config.dtype != "float32":
        raise UserError(f"--dtype {config.dtype}: --train all needs float32, or most of AdamW's steps are rounded away")
    check_folder("--output-dir", config.output_dir)
    end_with_launcher()
    from elit_diffusers.finetuning import Finetuning

    Finetuning(config).run()


if __name__ == "__main__":
    main()
