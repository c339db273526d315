"""Any checkpoint that is read → ours or safetensors, and what is in a file.

    python convert_checkpoint.py IN OUT.pt                          ours, with every set of weights that IN holds
    python convert_checkpoint.py IN.dcp OUT.pt                      a sharded run's folder as one file, and the reverse: all of its state
    python convert_checkpoint.py IN OUT.safetensors --safetensors   one set of weights, the configuration in the metadata
    python convert_checkpoint.py RUN OUT.safetensors --safetensors --ema-sigma 0.075    an average of that length, of a run's snapshots
    python convert_checkpoint.py IN DIR --to diffusers              a pipeline of diffusers, with the VAE and a model card
    python convert_checkpoint.py IN --show
    python convert_checkpoint.py --list                             released weights by name, each of which can be IN

IN: a file of ours, a published one, safetensors, a folder of `save_pretrained`, hf://owner/repo/file, or a released name. What it does not record is
given by option (`--model`, `--resolution`, `--head-depth`, `--vae`, …). The optimizer's state is left behind: the result is for sampling.
"""

from pathlib import Path

from checkpoint import posthoc, power_average, reading, sharded, training_state, weights, zoo
from checkpoint.architecture import resolve_architecture
from checkpoint.inspect import look, show
from checkpoint.records import TEXT, check_format, check_state_dict, recorded_config, recorded_step
from common.errors import UserError, cli_main
from common.files import WriteError, check_folder
from config.options import ARCHITECTURE_KEYS, ConvertCheckpointConfig
from config.parsing import parse
from models.vae import SHORT_NAMES

PUBLISHED_DECAY = "0.9999"  # of the EMA in files of the published code, which do not record it


@cli_main
def main(argv: list[str] | None = None) -> None:
    """Convert a checkpoint, or show what is in it."""
    config, given = parse(ConvertCheckpointConfig, argv, prog="convert_checkpoint.py")
    if config.list:
        print(zoo.table())
        return
    if config.source is None:
        raise UserError("give the checkpoint to convert: convert_checkpoint.py IN OUT, or IN --show")
    if config.dest is None and not config.show:
        raise UserError("give the file to write: convert_checkpoint.py IN OUT, or IN --show to see what is in it")
    check_average(config)
    check_dest(config)
    if config.ema_sigma is not None:
        average = posthoc.find(config.source, config.ema_sigma, config.ema_step)
        print(posthoc.describe(average))
        if config.dest is not None:
            write(config, {power_average.name(average.sigma): posthoc.make(average)})
        return
    source = reading.local_file(config.source)
    if config.show:
        show(config, given, source)
    if config.to == "diffusers":
        to_diffusers(config, given)
    elif config.dest is not None:
        convert(config, given, source)


def check_average(config: ConvertCheckpointConfig) -> None:
    """Refuse --ema-sigma where it does not make one set of weights for a file."""
    posthoc.check_options(config)
    if config.ema_sigma is None:
        return
    if config.show or config.to:
        given = f"--to {config.to}" if config.to else "--show"
        raise UserError(f"{given}: takes a file; make one with --ema-sigma {config.ema_sigma:g} first")
    if Path(config.dest or "").suffix == sharded.ENDING:
        raise UserError(
            f"{config.dest}: a folder of parts holds all of a training state; --ema-sigma makes a .pt file, or safetensors"
        )


def check_dest(config: ConvertCheckpointConfig) -> None:
    """Refuse a file to write that exists, cannot be written, or is named as another format."""
    if config.figures and not config.to:
        raise UserError(f"--figures {config.figures}: go into the model card of a pipeline; give --to diffusers too")
    if config.dest is None:
        if config.to:
            raise UserError(f"--to {config.to}: give the folder to write: convert_checkpoint.py IN DIR --to {config.to}")
        return
    dest = Path(config.dest)
    if dest.exists():
        raise UserError(f"{dest}: exists already; choose another name")
    if dest.suffix == sharded.ENDING and config.weights:
        raise UserError(f"{dest}: a folder of parts holds all of a training state; leave --weights out, or write a .pt file")
    if config.safetensors != (dest.suffix == ".safetensors"):
        raise UserError(f"{dest}: --safetensors belongs to a name that ends in .safetensors, and only to such a name")
    check_folder("the folder of OUT,", dest.parent)


def convert(config: ConvertCheckpointConfig, given: dict, source: Path) -> None:
    """Write OUT; the weights are checked against the model first."""
    assert config.dest is not None
    dest = Path(config.dest)
    if not config.safetensors and not config.weights and sharded.ENDING in (dest.suffix, source.suffix):
        change_form(source, dest)
        return
    if config.safetensors:
        names = [config.weights or "ema"]
    else:
        names = [config.weights] if config.weights else list(look(source).sets)
    if not names:
        raise UserError(f"{config.source}: holds no weights")
    sets: dict[str, weights.Weights] = {}
    checksum = None
    for name in names:
        found = reading.read_weights(source, name, given, checksum=checksum)
        checksum = found.checksum
        if config.vae and found.record.vae != SHORT_NAMES.get(config.vae, config.vae):
            raise UserError(f"--vae {config.vae}: is for bare state dicts; {config.source} was made with {found.record.vae}")
        resolve_architecture(config, given, found, config.source)
        weights.build_model(found, config.source)
        found.state_dict = {k: weights.compact(v) for k, v in found.state_dict.items()}
        sets[name] = found
    write(config, sets)


def write(config: ConvertCheckpointConfig, sets: dict[str, weights.Weights]) -> None:
    """Write sets of weights, by name, of one model to OUT."""
    assert config.dest is not None
    dest, found = Path(config.dest), next(iter(sets.values()))
    try:
        if config.safetensors:
            weights.save_weights(dest, found)
        else:
            ema = {_decay(name): w.state_dict for name, w in sets.items() if name != "model"}
            model = sets["model"].state_dict if "model" in sets else found.state_dict
            state = {"model": model, "ema": ema or {"0.0": model}}  # raw weights are their own average of decay 0
            state |= {"optimizer": None, "scheduler": None, "scaler": None}
            state |= {} if found.text is None else {TEXT: found.text.to_dict()}
            training_state.save(dest, state | {"step": found.step, "config": found.config, "vae": found.record.to_dict()})
    except WriteError:
        raise
    except OSError as error:
        raise UserError(f"{dest}: cannot be written: {error}") from None
    print(f"{dest}: {found.config['model']}, step {found.step}, weights {', '.join(sets)}")


def to_diffusers(config: ConvertCheckpointConfig, given: dict) -> None:
    """Write the folder of a pipeline."""
    from elit_diffusers.model_card import check_figures
    from elit_diffusers.pipeline import ELITPipeline

    assert config.dest is not None
    check_figures(config.figures)  # before weights are read
    architecture = {k: v for k, v in given.items() if k in ("vae", *ARCHITECTURE_KEYS)}
    pipeline = ELITPipeline.from_checkpoint(config.source, config.weights or "ema", **architecture)
    pipeline.save_pretrained(config.dest, figures=config.figures)
    print(f"{config.dest}: an ELITPipeline, step {pipeline.step}, weights {config.weights or 'ema'}")


def change_form(source: Path, dest: Path) -> None:
    """Write the training state of a file to a folder of parts, or of a folder to a file, with all that it holds."""
    state = training_state.load(source, verify=True)
    if "format" not in state:
        raise UserError(f"{dest}: is made of a training state of this code, which {source} is not; write a .pt file")
    check_format(state, source)
    for place, tensors in {"model": state["model"], **{f"ema {d}": v for d, v in state["ema"].items()}}.items():
        check_state_dict(tensors, f"{source}: {place}")
    model, step = recorded_config(state["config"], source).get("model"), recorded_step(state["step"], source)
    try:
        if dest.suffix == sharded.ENDING:
            sharded.save(dest, state)
        else:
            training_state.save(dest, state)
    except OSError as error:
        raise UserError(f"{dest}: cannot be written: {error}") from None
    print(f"{dest}: {model}, step {step}, all of the training state")


def _decay(name: str) -> str:
    """What an average is called in our format: its decay, as text, or the name of a power-function one."""
    return name if name.startswith("sigma-") else name.partition(":")[2] or PUBLISHED_DECAY


if __name__ == "__main__":
    main()
