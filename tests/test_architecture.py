"""docs/architecture.md: its worked examples do what it says; the map is short; every module says what it is for."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from starlette.testclient import TestClient

from nanokimi.config import ModelConfig
from nanokimi.inference.generate import generate_tokens
from nanokimi.model.attention import ATTENTIONS
from nanokimi.model.transformer import Transformer

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MOST_WORDS = 15  # of our own


def outcome(heading: str) -> dict[str, Any]:
    """The names that the example under ``heading`` leaves."""
    names: dict[str, Any] = {}
    code = PAGE.partition(f"### … {heading}?\n")[2].partition("```python\n")[2].partition("```\n")[0]
    exec(compile(code, heading, "exec"), names)
    return names


def test_a_source_of_ones_own_is_read_split_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = outcome("a source of text")
    assert found["batch"].tokens.shape == (2, 64)
    text = found["corpus"].tokenizer.decode(found["batch"].tokens[0].tolist())
    assert "is short. Document" in text
    assert found["corpus"].val is not None
    loader = found["corpus"].train.loader(found["LoaderOptions"](length=64, batch_size=2, seed=0))
    batches = iter(loader)
    next(batches)
    state, expected = loader.state_dict(), next(batches)
    again = found["corpus"].train.loader(found["LoaderOptions"](length=64, batch_size=2, seed=0))
    again.load_state_dict(state)
    assert torch.equal(next(iter(again)).tokens, expected.tokens)


def test_an_attention_of_ones_own_trains_and_decodes_through_the_cache() -> None:
    found = outcome("an attention")
    model, prompt = found["model"].eval(), [5, 6, 7, 8]
    decoded = generate_tokens(model, prompt, max_tokens=6, temperature=0.0)
    for _ in range(6):
        prompt.append(int(model(torch.tensor([prompt]))[0, -1].argmax()))
    assert decoded == prompt[4:]
    with patch.dict(ATTENTIONS, mha=found["NoPositions"]):
        one_layer = Transformer(ModelConfig.preset("debug", attention="mha", n_layers=1))
    last = [one_layer(torch.tensor([tokens]))[0, -1] for tokens in ([1, 2, 3, 4], [3, 1, 2, 4])]
    torch.testing.assert_close(*last)


def test_an_optimizer_of_ones_own_is_made_of_the_table() -> None:
    assert outcome("an optimizer")["kinds"] == {"muon"}


def test_a_loss_of_ones_own_is_minimised() -> None:
    seen = outcome("a loss")["seen"]
    assert math.log(257) < seen.cross_entropy < math.log(257) + 1
    assert seen.finite


def test_a_route_of_ones_own_answers() -> None:
    with TestClient(outcome("a route of the server")["app"]) as client:
        assert client.post("/v1/count", json={"text": "four"}).json() == {"tokens": 4}


def test_the_glossary_is_short() -> None:
    table = PAGE.partition("## Our words")[2]
    names = re.findall(r"^\| (?!name|-)([^|]+) \|", table, re.MULTILINE)
    assert 5 < len(names) <= MOST_WORDS


@pytest.mark.parametrize("path", sorted((ROOT / "nanokimi").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_in_one_sentence_what_it_is_for(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    about = ast.get_docstring(ast.parse(source))
    if path.name == "__init__.py" and not source:
        return
    assert about
    first = about.partition("\n")[0]
    assert re.search(r"[.:?]$", first), first


def test_the_readme_counts_the_lines_that_there_are() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = [int(n.replace(",", "")) for n in re.findall(r"has ([\d,]+)\s+lines of Python", " ".join(readme.split()))]
    told += [int(n.replace(",", "")) for n in re.findall(r"The whole package has ([\d,]+)", " ".join(readme.split()))]
    core = [path for room in ("model", "ops", "optim") for path in (ROOT / "nanokimi" / room).glob("*.py")]
    core += [ROOT / "nanokimi" / "training" / name for name in ("trainer.py", "step.py")]
    package = (ROOT / "nanokimi").rglob("*.py")
    for number, files in zip(told, (core, package), strict=True):
        assert abs(number - sum(len(p.read_text(encoding="utf-8").splitlines()) for p in files)) <= 50


def test_the_readme_is_a_page_that_a_newcomer_reads_whole() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500
