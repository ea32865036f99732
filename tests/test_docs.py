"""What the README and docs/ say: every command and example runs, every link leads somewhere, every table is true."""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.distributed.run import get_args_parser as torchrun_parser

from benchmarks.bench.__main__ import build_parser as bench_parser
from nanokimi.cli import build_parser, main
from nanokimi.config import PRESETS, ModelConfig
from nanokimi.insight import verify_muon
from nanokimi.model.transformer import Transformer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = "not run by the tests"
SCRIPTS = {"train.py": "train", "inference.py": "generate"}
BENCH = ["python", "-m", "benchmarks.bench"]
BLOCK = re.compile(r"(?P<before>(?:[^\n]+\n)*)\n```(?P<language>\w+)\n(?P<body>.*?)^```", re.DOTALL | re.MULTILINE)


class Example(NamedTuple):
    """A fenced block of a page; ``run`` unless the paragraph before it says otherwise."""

    language: str
    body: str
    run: bool

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line of a shell example, without variables set in front."""
        lines = [shlex.split(line, comments=True) for line in self.body.splitlines()]
        return [words[1:] if "=" in words[0] else words for words in lines if words]


def examples(page: Path, *languages: str) -> list[Example]:
    found = [m for m in BLOCK.finditer(page.read_text(encoding="utf-8")) if m["language"] in languages]
    return [Example(m["language"], m["body"], NOT_RUN not in " ".join(m["before"].split())) for m in found]


def arguments(words: list[str]) -> list[str] | None:
    """What ``nanokimi`` is given by a documented command; None if that is another program."""
    if words[0] == "nanokimi":
        return words[1:]
    if words[0] == "python" and words[1] in SCRIPTS:
        return [SCRIPTS[words[1]], *words[2:]]
    if words[0] == "torchrun":
        return ["train", *words[words.index("train.py") + 1 :]]
    return None


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def table(page: Path, header: str) -> list[list[str]]:
    """The cells of the rows below ``header``, the beginning of a table's first line."""
    lines = page.read_text(encoding="utf-8").partition(f"\n{header}")[2].splitlines()[2:]
    end = next(i for i, line in enumerate([*lines, ""]) if not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[:end]]


# ---- commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_is_understood_as_written(page: Path) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for example in examples(page, "bash"):
        for words in example.commands:
            given = arguments(words)
            if words[0] == "torchrun":
                torchrun_parser().parse_args(words[1:])
            if given is not None:
                build_parser().parse_args(given)
            elif words[:3] == BENCH:
                bench_parser().parse_args(words[3:])
            elif words[0] == "make":
                assert words[1] in targets
            else:
                assert words[:2] in (["python", "verify_muon.py"], ["source", ".venv/bin/activate"]), words


@pytest.fixture(scope="session")
def small_text() -> str:
    """A module of the standard library, in part."""
    return Path(argparse.__file__).read_text(encoding="utf-8")[:40_000]


@pytest.fixture
def folder(tmp_path: Path, small_text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the texts that the pages take for granted.

    What takes long is made small: ``tiny`` has the shapes of ``debug``, a few files are the standard
    library, and pictures are left to tests/training/test_plots.py.
    """
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.txt").write_text(small_text, encoding="utf-8")
    (tmp_path / "data" / "mine.txt").write_text(small_text, encoding="utf-8")
    question = {"question": "import json\njson.", "choices": ["loads", "walks", "sings"], "answer": 0}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question), encoding="utf-8")
    monkeypatch.setitem(PRESETS, "tiny", {**PRESETS["debug"], "tokenizer_name": "bpe:512"})
    library = SimpleNamespace(get_path=lambda _: Path(json.__file__).parent)
    monkeypatch.setattr("nanokimi.data.prepare.sysconfig", library)
    monkeypatch.setattr("nanokimi.data.prepare._topics", list)
    monkeypatch.setattr("nanokimi.training.plots.plot_training", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shortened(given: list[str]) -> list[str]:
    """The same command with few steps, ``fewer`` of what it says."""
    if "--max_steps" in given:
        at = given.index("--max_steps") + 1
        given = [*given[:at], fewer(given[at]), *given[at + 1 :]]
    return given


def fewer(steps: str) -> str:
    """A hundredth, so that a run which is made longer still becomes longer."""
    return str(max(1, int(steps) // 100))


def run_example(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    if example.language == "python":
        exec(compile(example.body, "example", "exec"), {})
        return
    for words in example.commands:
        monkeypatch.setattr("sys.stdin", io.StringIO("import os\n\n/quit\n"))
        given = arguments(words)
        if words[0] == "torchrun":
            code = on_ranks(words)
        elif given is not None:
            code = main(shortened(given))
        else:
            assert words == ["python", "verify_muon.py"]
            code = verify_muon.main()
        assert code == 0, words


def on_ranks(words: list[str]) -> int:
    """The exit code of a documented ``torchrun ... train.py ...``."""
    words = [str(ROOT / word) if word in SCRIPTS else word for word in shortened(words[1:])]
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True).returncode


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_examples_run_in_the_order_of_the_page(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    settings = dict(zip(re.findall(r"Save this as `(.+?)`", text), examples(page, "toml"), strict=True))
    for path, example in settings.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        short = re.sub(r"(?<=max_steps = )\d+", lambda m: fewer(m[0]), example.body)
        (folder / path).write_text(short, encoding="utf-8")
    if "checkpoints/latest.pt" in text and page.name != "README.md":  # the README makes it, other pages have it
        assert main(["train", "--preset", "debug", "--max_steps", "1"]) == 0
    for example in examples(page, "bash", "python"):
        if example.run:
            run_example(example, monkeypatch)


@pytest.mark.slow
def test_the_scripts_of_the_readme_train_and_continue_a_prompt(tmp_path: Path, small_text: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.txt").write_text(small_text, encoding="utf-8")
    commands = [words for example in examples(PAGES[0], "bash") for words in example.commands]
    for script in SCRIPTS:
        words = next(words for words in commands if words[:2] == ["python", script])
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *shortened(words[2:])],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def main(")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_flag_that_is_mentioned_exists(page: Path) -> None:
    text = re.sub(r"^#SBATCH .*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)  # Slurm's flags
    mentioned = set(re.findall(r"(?<![\w-])--[a-z]\w*(?:-\w+)*(?![\w-])", text))
    assert mentioned <= all_flags(build_parser()) | all_flags(bench_parser()) | all_flags(torchrun_parser())


def all_flags(parser: argparse.ArgumentParser) -> set[str]:
    flags = set()
    for action in parser._actions:
        flags.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            flags.update(*map(all_flags, action.choices.values()))
    return flags


# ---- links, files, tables -----------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link}: no such file"
        assert not heading or heading in headings(target), f"{link}: no such heading"


def headings(page: Path) -> set[str]:
    """The anchors of a page: lower case, without punctuation, dashes for spaces."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_tree_of_the_readme_has_every_room_of_the_package() -> None:
    tree = next(e.body for e in examples(PAGES[0], "text") if e.body.startswith("train.py"))
    named, above = set(), {0: ROOT}
    for line in tree.splitlines():
        depth = len(line) - len(line.lstrip())
        path = above[depth] / line.split()[0]
        assert path.exists(), path
        above[depth + 2] = path
        named.add(path)
    rooms = {path.parent for path in (ROOT / "nanokimi").glob("*/__init__.py")}
    assert rooms <= named, rooms - named


def test_the_preset_table_holds_what_the_presets_are() -> None:
    shown = {}
    for preset in PRESETS:
        config = ModelConfig.preset(preset)
        with torch.device("meta"):
            model = Transformer(config)
        shown[preset] = [
            f"{config.n_layers} ({config.n_dense_layers})",
            str(config.dim),
            str(config.n_heads),
            f"{config.n_routed_experts} / {config.n_activated_experts} / {config.n_shared_experts}",
            str(config.max_seq_length),
            f"{model.num_parameters():,}",
            f"{model.num_parameters(active=True):,}",
        ]
    assert {row[0].split("`")[1]: row[1:] for row in table(PAGES[0], "| preset |")} == shown


def test_the_cache_table_holds_what_the_presets_give() -> None:
    for cell, *numbers in table(ROOT / "docs" / "model.md", "| preset |"):
        config = ModelConfig.preset(cell.strip("| `"))
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        full = config.n_heads * (config.qk_head_dim + config.v_head_dim)
        assert numbers == [str(latent), f"{full:,}", f"{full / latent:.1f}"]


def test_every_message_under_troubleshooting_is_one_that_nanokimi_prints() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## Messages")[2]
    cells = re.findall(r"^\| (.*?) \| ", text, re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"`(.+?)`", cell)]
    messages += re.findall(r"\*\*`(.+?)`", text)
    assert len(messages) > 30
    printed = printed_texts()
    for message in messages:
        for part in re.split(r"\.\.\.|\b\d+\b|\b[NM]\b|'[^']*'", message):
            assert part.strip() in printed, message


def printed_texts() -> str:
    """Every text in the sources of nanokimi, and of argparse, which reports unknown flags."""
    texts = []
    for path in (*(ROOT / "nanokimi").rglob("*.py"), Path(argparse.__file__)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)
