"""The text quick start's captions, held-out combinations and scores, and its report."""

import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from numerics import randomize
from runs import ROOT, refused

import generate
import models
from checkpoint import training_state
from common.file_tree import FileTree
from config.options import TrainConfig
from config.parsing import parse, require_options
from data.captions import read_captions
from dataset_tools import main
from experiments_updated import digit_classifier, quickstart_text_report
from models.text_encoders import load_text_encoder
from models.vae import load_vae
from preprocessing import demo
from preprocessing.digit_captions import CAPTIONS, COUNTED, PARAPHRASES, combinations, drawn, share_as_asked
from training.setup import trained_budgets

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def understood(caption: str) -> dict[str, int] | Counter:
    """What a reader makes of any of the captions: digits by place, or how many of each."""
    words = re.findall(r"\w+", caption)
    names = {**{n: d for d, n in enumerate(NAMES)}, **{f"{n}{s}": d for d, n in enumerate(NAMES) for s in ("s", "es")}}
    if re.search("top|upper", caption):
        side = {"top": "top", "upper": "top", "bottom": "bottom", "lower": "bottom"}
        places, digit, found = [], None, {}
        for word in words:
            if word in names or word.isdigit():
                digit = names.get(word, int(word) if word.isdigit() else -1)
            elif word in side:
                places.append(side[word])
            elif word in ("left", "right"):
                places.append(word)
            if digit is not None and len(places) == 2:
                found[" ".join(places)], places, digit = digit, [], None
        return found
    amounts = {"a": 1, "an": 1, **{n: d for d, n in enumerate(NAMES)}, **{str(i): i for i in range(10)}}
    parts = [part.split() for part in re.split(r", | and ", caption)]
    counted: Counter = Counter()
    for amount, name in parts:
        counted[names[name] if name in names else int(name.rstrip("s"))] += amounts[amount]
    return counted


def test_captions_say_what_is_asked():
    rng = np.random.default_rng(0)
    for digits in [(7, 7, 3, 9), (8, 8, 8, 8), (6, 0, 6, 0), *(tuple(rng.integers(10, size=4).tolist()) for _ in range(50))]:
        for form, say in {**CAPTIONS, **PARAPHRASES}.items():
            places = dict(zip(("top left", "top right", "bottom left", "bottom right"), digits, strict=True))
            assert understood(say(digits)) == (Counter(digits) if form in COUNTED else places), say(digits)
    assert (
        CAPTIONS["position"]((7, 3, 1, 8)) == "a seven top left, a three top right, a one bottom left and an eight bottom right"
    )
    assert CAPTIONS["count"]((7, 3, 7, 9)) == "two sevens, a three and a nine" and CAPTIONS["count"]((6,) * 4) == "four sixes"
    assert CAPTIONS["count"]((9, 3, 7, 7)) == "a nine, a three and two sevens"
    assert PARAPHRASES["numerals"]((3, 7, 7, 7)) == "1 3 and 3 7s"
    trained = {say(c) for say in CAPTIONS.values() for c in itertools.product(range(10), repeat=4)}
    assert not trained & {say(c) for say in PARAPHRASES.values() for c in drawn(True, 100)}


def test_a_tenth_of_the_combinations_is_held_out_with_all_arrangements():
    seen, held = set(combinations(False)), set(combinations(True))
    everything = {tuple(int(d) for d in f"{n:04d}") for n in range(10_000)}
    assert len(held) == 1000 and seen | held == everything and not seen & held
    assert held == {p for c in held for p in itertools.permutations(c)}
    said = [{CAPTIONS["count"](c) for c in part} for part in (seen, held)]
    assert not said[0] & said[1]
    assert drawn(True, 5) == drawn(True, 9)[:5] and len(set(drawn(False, 5000))) == 5000 and set(drawn(False, 5000)) <= seen


def test_shares_of_real_canvases_and_of_shuffled_ones():
    asked = drawn(True, 60)
    canvases = np.stack([demo.captioned_canvas(digits, True, n) for n, digits in enumerate(asked)])
    classifier = digit_classifier.train_classifier(epochs=1)
    read = quickstart_text_report.read_digits(classifier, torch.from_numpy(canvases)[:, None].expand(-1, 3, -1, -1))
    for form, chance in (("position", 0.1), ("count", 0.31)):
        shares = [
            np.mean([share_as_asked(form, a, r) for a, r in zip(asked, read[n:] + read[:n], strict=True)]) for n in range(60)
        ]
        assert shares[0] > 0.9 and np.mean(shares[1:]) == pytest.approx(chance, abs=0.04), shares[0]
    assert (
        share_as_asked("count", (7, 7, 3, 9), (9, 7, 1, 7)) == 0.75
        and share_as_asked("position", (7, 7, 3, 9), (9, 7, 1, 7)) == 0.25
    )
    prompts = [{"form": form, "held_out": True, "digits": a} for form in ("position", "numerals") for a in asked]
    position, numerals = quickstart_text_report.scores(prompts, [*asked, *asked[::-1]], read)
    assert position["as_asked"] == 1 and position["standard_error"] == 0 and position["prompts"] == 60
    assert position["null_prompt"] == pytest.approx(0.1, abs=0.03) and 0.25 < numerals["as_asked"] < 0.4
    assert "any_asked" not in position and numerals["as_asked"] < numerals["any_asked"] < 0.5
    (one,) = quickstart_text_report.scores([{"form": "count", "held_out": True, "digits": (7, 7, 3, 9)}], [(7, 9, 9, 1)], read)
    assert one["as_asked"] == 0.5 and one["any_asked"] == 0.75


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(demo, "CAPTIONED_CANVASES", {"train": 4, "val": 2})
    patch.setattr(demo, "PROMPTS", 2)
    dest = tmp_path_factory.mktemp("demo") / "data"
    main(["demo", "--captions", f"--dest={dest}.partial"])
    (dest.with_name("data.partial")).rename(dest)
    yield dest
    patch.undo()


def test_demo_makes_data_folders(folder, tmp_path):
    for split, held_out in (("train", False), ("val", True)):
        captions = read_captions(FileTree(folder / split / "images"))
        assert list(captions) == [f"00000/img{i:08d}.png" for i in range(2 if held_out else 4)]
        digits = drawn(held_out, len(captions))
        assert list(captions.values()) == [[CAPTIONS["position"](d), CAPTIONS["count"](d)] for d in digits]
    prompts = json.loads((folder / "prompts.json").read_text())["prompts"]
    assert [p["prompt"] for p in prompts] == (folder / "prompts.txt").read_text().splitlines() and len(prompts) == 2 * 4 + 3
    assert {p["form"] for p in prompts} == {*CAPTIONS, *PARAPHRASES} and all(len(p["digits"]) == 4 for p in prompts)
    main(["encode", f"--source={folder}/val/images", f"--dest={tmp_path}/vae-sd", "--vae=experiments_updated/quickstart_vae"])
    assert json.loads((tmp_path / "vae-sd/dataset.json").read_text())["labels"] is None


def test_report(folder, tmp_path, monkeypatch, capsys):
    classifier = digit_classifier.DigitClassifier().eval()
    torch.save(classifier.state_dict(), tmp_path / "classifier.pt")
    config, _ = parse(TrainConfig, ["--config", str(ROOT / "experiments_updated/train/quickstart_text.yaml")])
    require_options(config)
    assert len(trained_budgets(config)) == 16
    encoder = load_text_encoder("words", 24)
    model = models.create_model(config.model, input_size=16, text_width=64, text_length=24, head_depth=1, tail_depth=1)
    model = randomize(model).float()
    model.set_null_text(encoder.encode([""]).features[0])
    state = {"model": model.state_dict(), "ema": {"0.99": model.state_dict()}, "optimizer": {}, "scheduler": {}, "scaler": None}
    record = load_vae("experiments_updated/quickstart_vae")[1]
    state |= {"step": 7, "config": vars(config), "vae": record.to_dict(), "text": encoder.record.to_dict()}
    ckpt = tmp_path / "run/checkpoints/0000007.pt"
    training_state.save(ckpt, state)
    options = [
        "--ckpt",
        ckpt,
        "--prompts",
        folder / "prompts.txt",
        "--sample-dir",
        tmp_path,
        "--num-steps",
        1,
        "--cfg-scale",
        3,
    ]
    options = [str(o) for o in options]
    report = [*options, f"--output-dir={tmp_path}", "--budgets", "0.0625", "1.0"]
    refused(quickstart_text_report.main, capsys, report, "no samples", "run generate.py first")
    for budget in ("0.0625", "1.0"):
        generate.main([*options, "--inference-budget", budget])
    quickstart_text_report.main(report)
    low, full = json.loads((tmp_path / "text_results.json").read_text())["budgets"]
    assert low["gflops_per_forward"] < full["gflops_per_forward"] and full["budget"] == 1
    assert [(s["form"], s["held_out"], s["prompts"]) for s in full["sets"]] == [
        *((form, held_out, 2) for form in CAPTIONS for held_out in (False, True)), *((form, True, 1) for form in PARAPHRASES)
    ]  # fmt: skip
    assert all(0 <= s[k] <= 1 for s in full["sets"] for k in ("as_asked", "null_prompt"))
    table = (tmp_path / "text_table.md").read_text()
    assert table in capsys.readouterr().out and (tmp_path / "text_budgets.png").stat().st_size > 0
    assert table.startswith("| budget | GFLOPs / forward | position, seen | position, held out | null prompt | count, seen |")
    (folder / "prompts.txt").write_text("another\n")
    refused(quickstart_text_report.main, capsys, report, "prompts.json", "other prompts")
