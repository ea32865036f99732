"""What the page asks about the tokens of a text."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from conftest import lively
from served import serving

from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.inference.inspection import inspect_tokens
from nanokimi.model.transformer import Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    return lively(Transformer(ModelConfig.preset("debug")))


@pytest.fixture(scope="module")
def http(model: Transformer) -> Iterator[httpx.Client]:
    with serving(model) as server, httpx.Client(base_url=server.url, timeout=20) as http:
        yield http


def test_tokens_tell_their_alternatives_and_experts(http: httpx.Client, model: Transformer) -> None:
    ids = [*b"import os"]
    shown = http.post("/v1/inspect", json={"model": "debug", "tokens": ids, "start": 3, "top": 2}).json()["tokens"]
    views = inspect_tokens(model, load_tokenizer("byte"), ids, start=3, top=2)
    assert [token["text"] for token in shown] == list("ort os")
    for token, view in zip(shown, views, strict=True):
        assert token["id"] == view.id
        assert token["logprob"] == pytest.approx(view.logprob)
        assert [entry["id"] for entry in token["alternatives"]] == [id for id, _, _ in view.likeliest]
        assert token["experts"] == [list(layer) for layer in view.experts]
        assert len(token["experts"]) == sum(1 for _ in model.moe_layers())


def test_the_first_token_has_nothing_to_be_expected_from(http: httpx.Client) -> None:
    first, second = http.post("/v1/inspect", json={"tokens": [97, 98]}).json()["tokens"]
    assert (first["logprob"], first["alternatives"]) == (None, [])
    assert len(second["alternatives"]) == 5


@pytest.mark.parametrize("tokens", [[97] * 129, [257], [-1], []])
def test_tokens_that_cannot_be_are_refused(http: httpx.Client, tokens: list[int]) -> None:
    answer = http.post("/v1/inspect", json={"tokens": tokens})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tokens")
