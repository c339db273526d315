"""The documentation speaks of what exists: links, files, options, imports."""

import ast
import dataclasses
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import convert_checkpoint
import dataset_tools
import elit_ccfg_inference
import elit_multibudget_inference
import evaluate
import finetune_diffusers
import generate
import sweep
import train
import web_demo
from common.errors import UserError
from config.parsing import parse_command_line
from experiments_updated import quickstart_guidance
from experiments_updated.studies.study import StudyConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted((ROOT / "docs").glob("*.md"))
ROOMS = [path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.*"))]
SCRIPTS = {
    "train.py": train.TrainConfig,
    "train.sbatch": train.TrainConfig,
    "generate.py": generate.GenerateConfig,
    "evaluate.py": evaluate.EvaluateConfig,
    "sweep.py": sweep.SweepConfig,
    "elit_multibudget_inference.py": elit_multibudget_inference.MultibudgetConfig,
    "elit_ccfg_inference.py": elit_ccfg_inference.CCFGConfig,
    "convert_checkpoint.py": convert_checkpoint.ConvertCheckpointConfig,
    "finetune_diffusers.py": finetune_diffusers.FinetuneDiffusersConfig,
    "quickstart_guidance.py": quickstart_guidance.GuidanceConfig,
    "web_demo.py": web_demo.WebDemoConfig,
    "report.py": StudyConfig,
}
OTHERS = {"--clean", "--no-deps", "--target"}  # of eval.sh and pip


def read(page: Path) -> tuple[str, list[tuple[str, str]]]:
    """The page without its code blocks, and those: (language, code)."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), blocks


def commands() -> Iterator[tuple[Path, list[str]]]:
    """Every command in a block of shell code, split into words."""
    for page in PAGES:
        for language, code in read(page)[1]:
            if language == "bash":
                for line in code.replace("\\\n", " ").splitlines():
                    if words := shlex.split(line, comments=True):
                        yield page, words


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", read(page)[0], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)[0]):
        link = urlsplit(target)
        if link.scheme:
            assert link.scheme == "https", target
            continue
        file = (page.parent / link.path).resolve() if link.path else page
        assert file.is_file(), f"{target}: no such file"
        assert not link.fragment or link.fragment in anchors(file), f"{target}: no such heading"


def test_every_page_and_picture_is_linked_from_another():
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", read(page)[0])
    }
    assert not [file for file in (ROOT / "docs").iterdir() if file.resolve() not in linked]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_exist(page):
    text, blocks = read(page)
    words = [word for span in re.findall(r"`([^`]+)`", text) for word in span.split()]
    words += [word for language, code in blocks if language in ("bash", "") for word in code.split()]
    for word in words:
        word = word.strip(",;:·()").removesuffix("/")
        if re.search(r"[…*{}]|NAME", word):
            continue
        if (word.partition("/")[0] in ROOMS and "/" in word) or re.fullmatch(
            r"\w+\.(py|sh|md|toml)|(requirements|constraints)\S*\.txt", word
        ):
            known = (ROOT / word).exists() or any(
                (ROOT / room / word).exists() for room in (*ROOMS, "experiments_updated/evaluation")
            )
            assert known or re.match(r"(data/imagenet|quickstart|OUT|plain.py)", word), f"{word}: no such file"


def known_options() -> set[str]:
    """Of our scripts and benchmarks, of the launchers, and of a few other commands."""
    found = set(OTHERS)
    for cls in (*SCRIPTS.values(), *(cls for cls, _ in dataset_tools.COMMANDS.values())):
        for field in dataclasses.fields(cls):
            found |= {"--" + name.replace("_", "-") for name in (field.name, *field.metadata["aliases"])}
    for parser in (get_args_parser(), launch_command_parser()):
        found |= set(parser._option_string_actions)
    return found


def test_options_named_in_the_text_exist():
    known = known_options()
    for page in PAGES:
        for span in re.findall(r"`([^`]+)`", read(page)[0]):
            for option in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", span):
                positive = re.sub("^--no-", "--", option)
                assert {option, option.replace("_", "-"), positive} & known, f"{page.name}: {option}"


@pytest.mark.parametrize(("page", "words"), list(commands()), ids=lambda v: v.name if isinstance(v, Path) else " ".join(v)[:60])
def test_commands(page, words):
    """Commands of our scripts parse: options exist and their values are valid; launchers' own options exist too."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[0] in ("torchrun", "accelerate"):
        parser = get_args_parser() if words[0] == "torchrun" else launch_command_parser()
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        for option in words[1:script]:
            assert not option.startswith("-") or option.partition("=")[0] in parser._option_string_actions, option
        words = ["python", *words[script:]]
    if words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        module = ROOT / words[2].replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
    if words[0] not in ("python", "sbatch", "bash") or words[1].startswith("-"):
        return
    script = ROOT / words[1]
    assert script.is_file()
    cls, words = SCRIPTS.get(script.name), words[2:]
    if script.name == "dataset_tools.py":
        cls, words = dataset_tools.COMMANDS[words[0]][0], words[1:]
    if cls is None:
        return
    while words and not words[0].startswith("-"):  # REF SAMPLES, IN OUT, DATA_DIR
        words = words[1:]
    given = parse_command_line(cls, [word.replace("…", "x") for word in words])
    for name in ("config", "train_config"):
        for path in given.get(name) or []:
            assert not path.startswith("experiments_updated") or (ROOT / path).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python(page):
    """Code blocks are Python, and what they import exists."""
    for language, code in read(page)[1]:
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


def test_a_wrong_option_is_noticed():
    with pytest.raises(UserError, match="unknown option --guidence"):
        parse_command_line(generate.GenerateConfig, ["--guidence", "1"])
    assert "--guidence-low" not in known_options()
    assert "--guidance-low" in known_options()
