"""The CLIP score against transformers' own preprocessing and model, on a tiny random CLIP."""

import json

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

import evaluate

PROMPTS = ["a red cat", "green fish", "blue"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    vocabulary = {w: i for i, w in enumerate(["<s>", "<unk>", "a", "red", "cat", "green", "fish", "blue", "</s>"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 8)])
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 9, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 8, "pad_token_id": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=sizes | text, vision_config=sizes | {"image_size": 24, "patch_size": 8}, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder


def test_clip_score(clip, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 40, 3), dtype=np.uint8)
    (tmp_path / "s").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"s/{i:06d}.png")
    np.savez(tmp_path / "s.npz", arr_0=images)
    names = {f"{i:06d}.png": PROMPTS[i % 3] for i in range(7)}
    (tmp_path / "s/captions.json").write_text(json.dumps({"captions": [[name, [text]] for name, text in names.items()]}))

    model, processor = CLIPModel.from_pretrained(clip), CLIPImageProcessor.from_pretrained(clip)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(clip)
    cosines = []
    with torch.no_grad():
        for image, text in zip(images, names.values(), strict=True):
            tokens = tokenizer(text, return_tensors="pt")
            pixels = processor(Image.fromarray(image), return_tensors="pt")
            found = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, **pixels)
            cosines.append(float(found.logits_per_image / model.logit_scale.exp()))
    expected = np.maximum(100 * np.array(cosines), 0).mean()
    assert min(cosines) < 0 < max(cosines)

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    out = tmp_path / "m.json"
    more = ("--metrics", "fid", "--features", "runs:colour_features", "--batch-size", "3", "--output", str(out), "--clip-score")
    for samples, prompts in (("s", ()), ("s.npz", ()), ("s.npz", ("--prompts", str(tmp_path / "prompts.txt")))):
        evaluate.main([str(tmp_path / "s.npz"), str(tmp_path / samples), *more, str(clip), *prompts])
        runs.reset_accelerate()
        assert json.loads(out.read_text())["clip_score"] == pytest.approx(expected, abs=0.01)  # resized by other code
    assert "CLIP score" in capsys.readouterr().out

    def refuse(*argv, words):
        runs.refused(evaluate.main, capsys, [tmp_path / "s.npz", *argv], words)

    refuse(tmp_path / "s", *more, tmp_path / "nowhere", words="nowhere: no such folder")
    refuse(tmp_path / "s", *more, tmp_path / "s", words=f"--clip-score {tmp_path}/s: cannot be loaded")
    refuse(tmp_path / "s", *more[:-1], "--prompts", "p.txt", words="only --clip-score looks at prompts")
    (tmp_path / "s/captions.json").unlink()
    refuse(tmp_path / "s", *more, clip, words="captions.json, which generate.py writes, is missing; give --prompts")
