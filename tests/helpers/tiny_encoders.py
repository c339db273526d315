"""Tiny random text encoders and CLIP models with their tokenizers, as transformers saves them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ["a", "red", "green", "blue", "fisch", "cat", "on", "mat"]
SMALL = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}


def save_tokenizer(folder, start=None, end="</s>", pad="</s>", words=WORDS):
    """A tokenizer of words; returns its vocabulary."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", end, pad, *([start] if start else []), *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(token, vocabulary[token]) for token in dict.fromkeys((end, *([start] if start else [])))]
    template = f"{start} $A {end}" if start else f"$A {end}"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=pad, unk_token="<unk>").save_pretrained(folder)
    return vocabulary


def clip_text(folder, cls, **options):
    """The text side of a CLIP."""
    torch.manual_seed(len(options))
    cls(CLIPTextConfig(**SMALL, max_position_embeddings=9, projection_dim=6, eos_token_id=1, **options)).save_pretrained(folder)


def sd3_pipeline(folder: Path) -> Path:
    """The three text encoders of an SD3 pipeline: 9 tokens of both CLIPs, then T5's; 40 wide, 12 pooled."""
    for number, pad in (("", "</s>"), ("_2", "!"), ("_3", "<pad>")):
        save_tokenizer(folder / f"tokenizer{number}", start=None if number == "_3" else "<s>", pad=pad)
    for number in ("", "_2"):
        options = {"hidden_act": "gelu"} if number else {}
        clip_text(folder / f"text_encoder{number}", CLIPTextModelWithProjection, **options)
    t5 = T5EncoderModel(T5Config(vocab_size=20, d_model=40, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    t5.save_pretrained(folder / "text_encoder_3")
    return folder


def whole_clip(folder: Path) -> Path:
    """A CLIPModel of 24-pixel images and 8 tokens, its tokenizer and its preprocessing."""
    vocabulary = save_tokenizer(folder, start="<s>", words=[*WORDS, "fish", "one", "two", "three"])
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": vocabulary["<s>"], "eos_token_id": vocabulary["</s>"], "pad_token_id": vocabulary["</s>"]}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 8} | ids
    torch.manual_seed(0)
    config = CLIPConfig(text_config=sizes | text, vision_config=sizes | {"image_size": 24, "patch_size": 8}, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder
