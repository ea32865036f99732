"""The official client of OpenAI, unchanged, against a real server."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import lively
from openai import APIStatusError, NotFoundError, OpenAI
from served import TURNS, ScriptedDecoder, serving

from nanokimi import generate
from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer
from nanokimi.inference.chat_template import ChatTemplate
from nanokimi.inference.generate import stream
from nanokimi.inference.options import SamplingOptions
from nanokimi.model.transformer import Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    return lively(Transformer(ModelConfig.preset("debug")))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("byte")


@pytest.fixture(scope="module")
def client(model: Transformer) -> Iterator[OpenAI]:
    with serving(model, chat=True) as server, OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def scripted(text: bytes) -> Iterator[OpenAI]:
    with serving(decoders=[ScriptedDecoder(text)], chat=True) as server:
        yield OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)


@pytest.fixture(scope="module")
def split_characters() -> Iterator[OpenAI]:
    yield from scripted("aé€ END b".encode())


def test_the_model_is_listed_and_found_by_name(client: OpenAI) -> None:
    (listed,) = client.models.list()
    assert (listed.id, listed.owned_by) == ("debug", "nanokimi")
    assert client.models.retrieve("debug") == listed
    with pytest.raises(NotFoundError, match="no model 'gpt' here"):
        client.models.retrieve("gpt")


def test_a_chat_continues_what_the_template_makes_of_it(
    client: OpenAI, model: Transformer, tokenizer: Tokenizer
) -> None:
    template = ChatTemplate(TURNS, tokenizer)
    ids = template.encode([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi, you."}])
    settings = SamplingOptions(temperature=0.0, max_tokens=20, stop=template.stop)
    expected = "".join(stream(model, tokenizer, tokenizer.decode(ids), settings))
    parts = [{"type": "text", "text": "Hi, "}, {"type": "text", "text": "you."}]
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    given = {"model": "debug", "messages": messages, "temperature": 0, "max_completion_tokens": 20}
    answer = client.chat.completions.create(**given)
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", expected)
    assert answer.usage.prompt_tokens == len(ids)
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**given, stream=True)]
    assert (deltas[0].role, "".join(delta.content or "" for delta in deltas)) == ("assistant", expected)


def test_the_same_seed_writes_the_same_and_choice_i_draws_with_seed_plus_i(
    client: OpenAI, model: Transformer, tokenizer: Tokenizer
) -> None:
    given = {"model": "debug", "prompt": "ab", "max_tokens": 12, "top_p": 0.9}
    several = client.completions.create(**given, n=3, seed=5)
    texts = [choice.text for choice in several.choices]
    assert texts == [generate(model, tokenizer, "ab", max_tokens=12, seed=5 + i) for i in range(3)]
    assert len(set(texts)) == 3
    assert (several.usage.prompt_tokens, several.usage.completion_tokens) == (2, 36)


@pytest.mark.fault(85)
def test_what_else_is_written_at_the_time_does_not_change_a_seeded_text(
    client: OpenAI, model: Transformer, tokenizer: Tokenizer
) -> None:
    """Twice as many as there are slots."""

    def ask(seed: int) -> str:
        given = {"model": "debug", "prompt": "ab" * seed, "max_tokens": 10 + seed, "seed": seed, "top_p": 0.9}
        return "".join(chunk.choices[0].text for chunk in client.completions.create(**given, stream=True))

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(8)))
    assert texts == [generate(model, tokenizer, "ab" * seed, max_tokens=10 + seed, seed=seed) for seed in range(8)]


def test_several_prompts_are_choices_in_their_order(client: OpenAI, model: Transformer, tokenizer: Tokenizer) -> None:
    expected = [generate(model, tokenizer, prompt, max_tokens=6, temperature=0.0) for prompt in ("ab", "", "xyz")]
    given = {"model": "debug", "max_tokens": 6, "temperature": 0}
    for prompts in (["ab", "", "xyz"], [[97, 98], [], [120, 121, 122]]):
        answer = client.completions.create(**given, prompt=prompts)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage.prompt_tokens == 6  # an empty one is an end of text
        texts = ["", "", ""]
        for chunk in client.completions.create(**given, prompt=prompts, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == expected


def test_usage_comes_last_in_a_stream_that_asks_for_it(client: OpenAI) -> None:
    given = {"model": "debug", "prompt": "ab", "max_tokens": 5, "temperature": 0, "stream": True}
    *chunks, last = client.completions.create(**given, stream_options={"include_usage": True})
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (2, 5, 7)
    assert {chunk.usage for chunk in chunks} == {None}
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.choices for chunk in client.completions.create(**given))


@pytest.mark.fault(102)
@pytest.mark.parametrize("stop", ["END", ["nothing", " END"]])
def test_a_stop_string_ends_the_text_and_is_not_part_of_it(split_characters: OpenAI, stop: str | list[str]) -> None:
    given = {"model": "debug", "max_tokens": 30, "stop": stop}
    expected = "aé€ " if stop == "END" else "aé€"
    answer = split_characters.completions.create(**given, prompt="x")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
    chunks = list(split_characters.completions.create(**given, prompt="x", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]


@pytest.mark.fault(80)
def test_a_character_split_over_tokens_is_never_broken(split_characters: OpenAI) -> None:
    chunks = split_characters.completions.create(model="debug", prompt="x", max_tokens=7, stream=True)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == "aé€ "
    cut = split_characters.completions.create(model="debug", prompt="x", max_tokens=5)
    assert cut.choices[0].text == "aé"


@pytest.mark.fault(79)
def test_end_of_text_stops() -> None:
    with serving(decoders=[ScriptedDecoder([*b"done", 256])]) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="-")
        choice = client.completions.create(model="debug", prompt="x", max_tokens=30).choices[0]
        assert (choice.text, choice.finish_reason) == ("done", "stop")


def test_log_probabilities_of_completions(client: OpenAI, split_characters: OpenAI) -> None:
    given = {"model": "debug", "prompt": "ab", "max_tokens": 6, "temperature": 0, "logprobs": 3}
    found = client.completions.create(**given).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 6
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 3
        assert max(top.values()) == top[token] == logprob < 0  # greedy: its own is the best
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**given, stream=True)]
    assert [token for chunk in chunks if chunk for token in chunk.tokens] == found.tokens
    pieces = split_characters.completions.create(model="debug", prompt="x", max_tokens=6, logprobs=0)
    found = pieces.choices[0].logprobs
    assert found.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert found.text_offset == [0, 1, 1, 2, 2, 2]


def test_log_probabilities_of_chats_have_the_exact_bytes(client: OpenAI, split_characters: OpenAI) -> None:
    given = {"model": "debug", "messages": [{"role": "user", "content": "x"}], "max_tokens": 6, "logprobs": True}
    content = (
        split_characters.chat.completions.create(**given, temperature=0, top_logprobs=2).choices[0].logprobs.content
    )
    assert bytes(byte for entry in content for byte in entry.bytes).decode() == "aé€"
    assert [len(entry.top_logprobs) for entry in content] == [2] * 6
    assert content[0].token == content[0].top_logprobs[0].token == "a"
    content = client.chat.completions.create(**given, temperature=0).choices[0].logprobs.content
    assert all(-math.inf < entry.logprob < 0 and entry.top_logprobs == [] for entry in content)


@pytest.mark.fault(74)
def test_a_full_context_ends_with_reason_length_and_keeps_the_output() -> None:
    with serving(decoders=[ScriptedDecoder(b"b", max_length=50)], chat=True) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="-")
        for length, written in ((47, "bbb"), (50, "")):
            choice = client.completions.create(model="debug", prompt=[97] * length, max_tokens=40).choices[0]
            assert (choice.text, choice.finish_reason) == (written, "length")
            *_, last = client.completions.create(model="debug", prompt=[97] * length, max_tokens=40, stream=True)
            assert last.choices[0].finish_reason == "length"
        messages = [{"role": "user", "content": "x"}]  # a reply may be as long as the context allows
        assert client.chat.completions.create(model="debug", messages=messages).usage.total_tokens == 50


def test_a_completion_has_16_tokens_unless_it_says_more(split_characters: OpenAI) -> None:
    assert split_characters.completions.create(model="debug", prompt="x").usage.completion_tokens == 16


def test_errors_arrive_as_the_clients_own(client: OpenAI) -> None:
    with pytest.raises(APIStatusError) as found:
        client.completions.create(model="debug", prompt="x", presence_penalty=0.5)
    assert (found.value.status_code, found.value.param) == (400, "presence_penalty")
    assert found.value.code == "unsupported_parameter"
