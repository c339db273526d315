"""The CLIP score against transformers' own preprocessing and model, on a tiny random CLIP."""

import json
import shutil

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from tiny_encoders import whole_clip
from transformers import CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

import evaluate
from metrics.clip_score import prompts_of
from metrics.images import open_images

PROMPTS = ["a red cat", "green fish", "blue"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return whole_clip(tmp_path_factory.mktemp("clip"))


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
    (broken := shutil.copytree(clip, tmp_path / "clip") / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    refuse(tmp_path / "s", *more, tmp_path / "clip", words=f"--clip-score {tmp_path}/clip: cannot be loaded")
    broken.unlink()
    (tmp_path / "clip/tokenizer.json").unlink()
    (tmp_path / "clip/tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')  # which would be made up
    refuse(tmp_path / "s", *more, tmp_path / "clip", words=f"--clip-score {tmp_path}/clip: {tmp_path}/clip holds no tokenizer")
    refuse(tmp_path / "s", *more[:-1], "--prompts", "p.txt", words="only --clip-score looks at prompts")
    for path in (tmp_path / "s").glob("*.png"):  # as generate.py --no-png leaves it
        path.unlink()
    assert prompts_of(open_images(tmp_path / "s.npz"), None) == list(names.values())
    (tmp_path / "s/captions.json").unlink()
    refuse(tmp_path / "s.npz", *more, clip, words="captions.json, which generate.py writes, is missing; give --prompts")
