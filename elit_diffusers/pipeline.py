"""A checkpoint, its VAE and the sampler as a pipeline of diffusers.

A folder of `save_pretrained`:

    model_index.json                 the class, and the sampler's options
    transformer/model.safetensors    weights, with configuration and records in the metadata: a checkpoint for --ckpt, too
    transformer/config.json          the same configuration, for people
    vae/                             of diffusers
    README.md                        the model card
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn

from checkpoint import reading
from checkpoint.architecture import SCHEDULE, resolve_architecture
from checkpoint.weights import Weights, save_weights
from common import precision
from common.errors import UserError, did_you_mean, first_line
from common.files import check_folder, parse_json, write_atomically, write_json
from common.hub import fetch_once
from common.tensor_files import PRETRAINED
from common.torchvision_shim import import_torchvision
from config.options import ARCHITECTURE_KEYS, GenerateConfig
from config.rules import names
from config.sampling_options import CoreCacheOptions, GuideOptions
from config.values import coerce, whole_numbers
from elit_diffusers.model_card import model_card, sides_of
from models.conditioning import Condition, Text
from models.text_encoders import TextEncoder
from samplers import joined
from sampling import checks, conditions, session
from sampling.session import Session

import_torchvision()  # which diffusers imports
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput  # noqa: E402

INDEX = "model_index.json"
# What diffusers calls options of generate.py.
SPELLINGS = {
    "budget": "inference_budget",
    "unconditional_budget": "unconditional_inference_budget",
    "num_inference_steps": "num_steps",
    "guidance_scale": "cfg_scale",
}
_OTHERS = {"global_seed", "class_labels", *names(CoreCacheOptions), *names(GuideOptions)} - {"cfg_channels"}
# The options of generate.py that a pipeline records and a call may change.
SAMPLER = tuple(n for n in (*names(GenerateConfig, group={"sample", "guidance"}, images=True), *SCHEDULE) if n not in _OTHERS)

OnStep = Callable[["ELITPipeline", int, float, dict[str, Any]], Any]


class Call(TypedDict, total=False):
    """What a call may say beside what to draw.

    budget: ELIT, share of the latents to compute, or a schedule such as `0.25@1.0-0.5,1.0@0.5-0.0`.
    unconditional_budget: ELIT, of the guiding pass (cheap guidance).
    num_inference_steps, guidance_scale: of the sampler.
    mode, heun, guidance_low, …: options of generate.py, by their names.
    seed: image i has the noise of (seed, i), as in generate.py.
    generator: what the seed is drawn from (default: PyTorch's own).
    indices: the images' indices (default: 0, 1, …).
    output_type: pil, np (B, H, W, 3) or pt (B, 3, H, W) in [0, 1], or latent.
    return_dict: else a tuple.
    callback_on_step_end: called as `callback(pipe, step, timestep, {})` after each velocity evaluation; what it returns is not used.
    """

    budget: float | str | None
    unconditional_budget: float | None
    num_inference_steps: int
    guidance_scale: float
    mode: Literal["ode", "sde"]
    heun: bool
    guidance_low: float
    guidance_high: float
    autoguidance: bool
    cfg_channels: int | None
    num_steps_per_scale: Sequence[int]
    stage_sampling_thresholds: Sequence[float]
    seed: int | None
    generator: torch.Generator | None
    indices: Sequence[int] | None
    output_type: Literal["pil", "np", "pt", "latent"]
    return_dict: bool
    callback_on_step_end: OnStep | None


class ELITPipeline(DiffusionPipeline):
    """Draws images by a checkpoint of this code: `pipe(class_labels=[207], budget=0.25, seed=0).images[0]`.

    The images are those of generate.py for the same seed, indices and options.

    Args:
        transformer: the model.
        vae: of its latents.
        weights: what the checkpoint records of the model.
        sampler: options of `SAMPLER` that are not generate.py's defaults.
    """

    def __init__(
        self, transformer: nn.Module, vae: nn.Module, weights: Weights | None = None, sampler: dict[str, Any] | None = None
    ):
        super().__init__()
        if weights is None:
            raise UserError("ELITPipeline: requires what the checkpoint records; use from_checkpoint or from_pretrained")
        self.transformer: Any
        self.vae: Any
        self.register_modules(transformer=transformer, vae=vae)
        self._weights, self._encoder = replace(weights, state_dict={}), None
        self.register_to_config(sampler=_named(sampler or {}, "sampler"))

    # ------------------------------------------------------------------------------------------------- making one

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, weights: str = "ema", sampler: dict[str, Any] | None = None, **given: Any
    ) -> Self:
        """The pipeline of any checkpoint that generate.py takes.

        Args:
            path: as `--ckpt`.
            weights: ema, ema:DECAY or model.
            sampler: options of sampling in place of generate.py's defaults, e.g. `{"guidance_scale": 4.0}`.
            **given: `vae`, and architecture for what a bare state dict does not tell, e.g. `resolution=512`.

        Raises:
            UserError: no such checkpoint, one that cannot be sampled from, no VAE, or another name than those of `given`.
        """
        known = {"vae", *ARCHITECTURE_KEYS}
        if unknown := next((name for name in given if name not in known), None):
            raise UserError(
                f"from_checkpoint: no argument {unknown!r}{did_you_mean(unknown, known)}; options of sampling: `sampler`"
            )
        config = GenerateConfig(ckpt=str(path), weights=weights, vae=given.get("vae"))
        found = reading.read_weights(path, weights, given)
        resolve_architecture(config, given, found, path)
        found.check_velocity(str(path))
        loaded = session.load(config, found, torch.device("cpu"))
        return cls(loaded.model, loaded.vae, found, sampler)

    @classmethod
    def from_pretrained(cls, name: str | Path, torch_dtype: torch.dtype | None = None, **hub: Any) -> Self:  # type: ignore[override]
        """The pipeline of a folder of `save_pretrained`, or of a hub repository with such a folder.

        Args:
            name: folder, or owner/name.
            torch_dtype: of the weights (default: as they are stored).
            **hub: `revision`, `token`, `cache_dir`, … as `huggingface_hub.snapshot_download` takes them.

        Raises:
            UserError: neither a folder nor a repository that can be downloaded, or another pipeline's.
        """
        folder = _folder(name, hub)
        if not (folder / INDEX).is_file():
            raise UserError(f"{name}: holds no {INDEX}; must be a folder of ELITPipeline.save_pretrained, or a hub repository")
        index = parse_json((folder / INDEX).read_bytes(), folder / INDEX)
        found = index.get("_class_name") if isinstance(index, dict) else None
        if found != cls.__name__:
            raise UserError(f"{name}: its {INDEX} is of a {str(found)[:80]}, not of an {cls.__name__}")
        pipeline = cls.from_checkpoint(
            folder / "transformer" / PRETRAINED, sampler=index.get("sampler"), vae=str(folder / "vae")
        )
        return pipeline if torch_dtype is None else pipeline.to(torch_dtype)

    # ------------------------------------------------------------------------------------------------------ saving

    @property
    def step(self) -> int:
        """Optimizer steps of the training."""
        return self._weights.step

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, figures: str | Path | None = None, repo_id: str | None = None
    ) -> None:
        """Write the folder that `from_pretrained` reads, with a model card.

        Args:
            save_directory: new, or written to again.
            figures: folder of a sweep or of the quick start, or a Markdown file, whose tables the card shows.
            repo_id: the name that the card loads the model by (default: the folder).

        Raises:
            UserError: the folder cannot be written, or there are no figures.
        """
        folder = Path(save_directory)
        check_folder("save_pretrained:", folder)
        card = model_card(self._weights, self.transformer, self.config["sampler"], repo_id or folder.name, figures)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)  # until all is there again
        weights = replace(self._weights, state_dict=self.transformer.state_dict())
        save_weights(folder / "transformer" / PRETRAINED, weights)
        write_json(weights.config | {"vae": weights.record.to_dict()}, folder / "transformer/config.json")
        self.vae.save_pretrained(folder / "vae")
        write_atomically(folder / "README.md", card)
        write_atomically(folder / INDEX, self.to_json_string())  # last: it says that all is there

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        figures: str | Path | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload of an ELITPipeline",
        **upload: Any,
    ) -> str:
        """Upload the folder of `save_pretrained` to a repository of the hub, which is made if it is not there.

        Args:
            repo_id: owner/name.
            figures: see `save_pretrained`.
            private: whether a new repository is (default: the owner's setting).
            token: default: that of `hf auth login`.
            commit_message: of the upload.
            **upload: `revision`, `create_pr`, … as `HfApi.upload_folder` takes them.

        Returns:
            The address of the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, figures=figures, repo_id=repo_id)
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message, **upload))
            except Exception as error:  # network, authentication, no such owner …
                raise UserError(
                    f"push_to_hub {repo_id}: failed ({type(error).__name__}: {first_line(error)}); `hf auth login` gives access"
                ) from None

    # ---------------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def __call__(
        self, class_labels: int | Sequence[int] | None = None, prompt: str | Sequence[str] | None = None, **call: Unpack[Call]
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw an image of each class label or prompt.

        Args:
            class_labels: one or several class ids.
            prompt: one or several prompts, of models conditioned on text.
            **call: see `Call`.

        Raises:
            UserError: values that the model cannot be sampled with.
        """
        options: dict[str, Any] = dict(call)
        of_call = {name: options.pop(name, None) for name in ("seed", "generator", "indices", "callback_on_step_end")}
        output_type, return_dict = options.pop("output_type", "pil"), options.pop("return_dict", True)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type {output_type!r}: choose from pil, np, pt, latent")
        loaded = self._session(options)
        y = self._condition(loaded, class_labels, prompt)
        count = len(y) if isinstance(y, Tensor) else len(y.features)
        indices = range(count) if of_call["indices"] is None else whole_numbers(of_call["indices"], "indices")
        if len(indices) != count:
            raise UserError(f"indices: {len(indices)} of them for {count} image(s); give one for each")
        seed = _seed(of_call["seed"], of_call["generator"])
        with precision.tf32(loaded.config.tf32), self._progress(loaded, of_call["callback_on_step_end"]):
            latents = loaded.latents(session.guidance(loaded.config), seed, indices, y)
            images: Any = latents if output_type == "latent" else _as(output_type, loaded.decode(latents))
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _session(self, options: dict[str, Any]) -> Session:
        """The checkpoint with the recorded options of sampling, and over them those of a call."""
        config = GenerateConfig(ckpt=type(self).__name__, cuda_graphs=False)  # the progress bar counts forwards
        resolve_architecture(config, {}, self._weights, config.ckpt)
        given = _named(options, "call")
        for name, value in (self.config["sampler"] | given).items():
            setattr(config, name, value)
        checks.check_generation_model(config)
        shape = (self.transformer.in_channels, *sides_of(self.transformer))
        loaded = Session(config, self.transformer, self.vae, None, shape)
        for name, reason in loaded.flow.ignored_options.items():
            if name in given:
                raise UserError(f"{name.replace('num_steps', 'num_inference_steps')}: has no effect: {reason}")
        return loaded

    def _condition(self, loaded: Session, class_labels: Any, prompt: Any) -> Condition:
        kind = "text" if self._weights.takes_text else "class labels"
        wanted, other = (prompt, class_labels) if self._weights.takes_text else (class_labels, prompt)
        if wanted is None or other is not None:
            name = "prompt" if self._weights.takes_text else "class_labels"
            raise UserError(f"the model, a {loaded.config.model}, is conditioned on {kind}; give {name} alone")
        if self._weights.takes_text:
            items: list[Any] = [wanted] if isinstance(wanted, str) else list(wanted)
        else:
            items = whole_numbers(wanted, "class_labels")
        if not items:
            raise UserError(f"no {kind}: nothing to draw")
        if self._weights.takes_text:
            return self._text(items)
        checks.check_labels(loaded.config, "class_labels", items)
        return torch.tensor(items)

    def _text(self, prompts: list[Any]) -> Condition:
        record = self._weights.text
        if record is None:
            raise UserError("the checkpoint records no text encoder; draw from it by generate.py --text-encoder")
        if self._encoder is None:
            self._encoder = conditions.load_encoder(record.encoder, record, torch.device("cpu"))
        encoder: TextEncoder = self._encoder
        null = encoder.encode([""])
        pooled = None if null.pooled is None else null.pooled[0]
        conditions.set_missing_null(self.transformer, Text(null.features[0], pooled))
        return encoder.encode(prompts)

    @contextmanager
    def _progress(self, loaded: Session, on_step: OnStep | None) -> Iterator[None]:
        """Count the model's forwards: a step of the bar, and a call of `on_step`, for each velocity evaluation."""
        guidance, evaluations = session.guidance(loaded.config), loaded.flow.evaluations()
        forwards: list[int | None] = []  # of each: which evaluation it is the last one of
        for step, times in enumerate(evaluations):
            passes = guidance.passes(*times)
            forwards += [None] * (0 if joined(passes) else len(passes) - 1) + [step]
        following = iter(forwards)
        progress_bar: Any = self.progress_bar  # which diffusers annotates as another function
        with progress_bar(total=len(evaluations)) as bar:

            def count(*_: Any) -> None:
                step = next(following)
                if step is not None:
                    bar.update()
                    if on_step is not None:
                        on_step(self, step, evaluations[step][-1], {})

            hook = self.transformer.register_forward_hook(count)
            try:
                yield
            finally:
                hook.remove()


def _named(options: Any, where: str) -> dict[str, Any]:
    """Options of sampling under generate.py's names, each of its type and in its range."""
    if not isinstance(options, dict):
        raise UserError(f"{where}: must be options of sampling by name")
    found = {}
    for name, value in options.items():
        own = SPELLINGS.get(name, name)
        if own not in SAMPLER:
            known = [*SPELLINGS, *SAMPLER]
            raise UserError(f"{where}: no option {str(name)[:80]!r} of sampling{did_you_mean(str(name), known)}")
        found[own] = coerce(GenerateConfig, own, value, str(name))
    return found


def _seed(seed: int | None, generator: torch.Generator | None) -> int:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise UserError("generator: must be one torch.Generator; `seed` and `indices` choose the noise of each image")
    if seed is not None:
        if generator is not None:
            raise UserError("seed and generator: give the one or the other")
        return coerce(GenerateConfig, "global_seed", seed, "seed")
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (1,), generator=generator, device=device))


def _as(output_type: str, images: Tensor) -> Any:
    """Uint8 (B, 3, H, W) as diffusers hands out images."""
    if output_type == "pt":
        return images.float() / 255
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return pixels.astype("float32") / 255
    from PIL import Image

    return [Image.fromarray(image) for image in pixels]


def _folder(name: str | Path, hub: dict[str, Any]) -> Path:
    """The folder of a pipeline; that of a hub repository is downloaded."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        raise UserError(f"{name}: no such folder, and no name on the hub (owner/name)")
    from huggingface_hub import snapshot_download

    patterns = [INDEX, f"transformer/{PRETRAINED}", "transformer/config.json", "vae/*.json", "vae/*.safetensors"]
    try:
        return Path(fetch_once(str(name), lambda **more: snapshot_download(str(name), allow_patterns=patterns, **hub, **more)))
    except Exception as error:  # network, authentication, no such repository, no space …
        raise UserError(
            f"{name}: no such folder, and could not be downloaded from the hub ({type(error).__name__}: {first_line(error)})"
        ) from None
