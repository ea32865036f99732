"""One engine behind everything: library, terminal and server write the same text; the page's test compares it with
the library's too."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from conftest import lively
from openai import OpenAI
from served import TURNS, Server, serving

from nanokimi import generate
from nanokimi.config import ModelConfig
from nanokimi.console import printable
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.inference.chat import interactive
from nanokimi.inference.chat_template import ChatTemplate
from nanokimi.inference.options import SamplingOptions
from nanokimi.model.transformer import Transformer

PROMPTS = ["import os", "é 日本", "a", "def main(argv: list[str]) -> int:"]
TOKENIZER = load_tokenizer("byte")
GREEDY = SamplingOptions(temperature=0.0, max_tokens=20)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return lively(Transformer(ModelConfig.preset("debug")))


@pytest.fixture(scope="module")
def server(model: Transformer) -> Iterator[Server]:
    with serving(model, chat=True) as server:
        yield server


def talked(model: Transformer, line: str, template: ChatTemplate | None = None) -> str:
    """What the terminal shows after ``line``: between the welcome and the figures."""
    output = io.StringIO()
    interactive(model, TOKENIZER, GREEDY, template=template, source=io.StringIO(line + "\n"), output=output)
    return output.getvalue().partition("\n")[2].rpartition("\n[")[0]


@pytest.mark.fault(70, 75, 83)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_greedy_continuation_is_the_same_from_library_terminal_and_server(
    model: Transformer, server: Server, prompt: str
) -> None:
    expected = generate(model, TOKENIZER, prompt, temperature=0.0, max_tokens=20)
    completions = OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0).completions
    whole = completions.create(model="debug", prompt=prompt, temperature=0, max_tokens=20)
    streamed = completions.create(model="debug", prompt=prompt, temperature=0, max_tokens=20, stream=True)
    assert whole.choices[0].text == expected
    assert completions.create(model="debug", prompt=prompt, max_tokens=20, top_p=0).choices == whole.choices
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected
    assert talked(model, prompt) == printable(expected)


@pytest.mark.parametrize("message", PROMPTS)
def test_a_greedy_answer_is_the_same_from_library_terminal_and_server(
    model: Transformer, server: Server, message: str
) -> None:
    template = ChatTemplate(TURNS, TOKENIZER)
    prompt = TOKENIZER.decode(template.encode([{"role": "user", "content": message}]))
    expected = generate(model, TOKENIZER, prompt, temperature=0.0, max_tokens=20, stop=template.stop)
    answer = OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0).chat.completions.create(
        model="debug", messages=[{"role": "user", "content": message}], temperature=0, max_completion_tokens=20
    )
    assert answer.choices[0].message.content == expected
    assert talked(model, message, template) == printable(expected)
