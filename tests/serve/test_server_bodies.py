"""What a request's body may hold, and what happens when it holds something else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from served import ScriptedDecoder, Server, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TALK = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(decoders=[ScriptedDecoder(b"ok", max_length=64)], chat=True, max_body=20_000) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error in an answer, which has OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"prompt": }', b"\xff", b"[1]", b"7", b"null", b'"x"', b"[" * 5000, b"9" * 5000, b"{}x"]
)
@pytest.mark.fault(86)
def test_a_body_that_is_no_json_object_is_refused(http: httpx.Client, body: bytes) -> None:
    refused(http.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_of_another_type_is_refused(http: httpx.Client, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    error = refused(http.post(COMPLETIONS, content=b'{"prompt": "x"}', headers=headers), 415)
    assert "send application/json" in error["message"]


@pytest.mark.fault(87)
def test_an_oversized_body_is_refused(http: httpx.Client) -> None:
    error = refused(http.post(COMPLETIONS, json={"prompt": "x" * 20_000}), 413)
    assert "--max_body" in error["message"]
    assert http.post(COMPLETIONS, json={"prompt": [1] * 60, "max_tokens": 1}).status_code == 200


@pytest.mark.fault(87)
def test_an_oversized_body_in_chunks_is_refused_before_it_has_been_read(http: httpx.Client) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 1 << 33:
            sent += 1 << 16
            yield b" " * (1 << 16)

    refused(http.post(COMPLETIONS, content=endless(), headers={"Content-Type": "application/json"}), 413)
    assert sent < 1 << 33


@pytest.mark.fault(88)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/inspect"])
def test_an_unknown_model_is_named(http: httpx.Client, path: str) -> None:
    body = {COMPLETIONS: {}, CHAT: {"messages": TALK}, "/v1/inspect": {"tokens": [1]}}[path]
    error = refused(http.post(path, json={"model": "gpt-9", **body}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'gpt-9'" in error["message"]
    assert "'debug'" in error["message"]


@pytest.mark.fault(73, 89)
@pytest.mark.parametrize("prompt", ["x" * 65, [1] * 65, ["x", "y" * 65]])
def test_a_prompt_over_the_context_names_both_counts(http: httpx.Client, prompt: Any) -> None:
    error = refused(http.post(COMPLETIONS, json={"prompt": prompt}))
    assert "65 tokens" in error["message"]
    assert "64" in error["message"]
    assert error["param"] == "prompt"


def test_a_long_prompt_is_counted_beside_the_event_loop(http: httpx.Client) -> None:
    assert "15000 tokens" in refused(http.post(COMPLETIONS, json={"prompt": "x" * 15_000}))["message"]


def test_a_talk_over_the_context_names_both_counts(http: httpx.Client) -> None:
    error = refused(http.post(CHAT, json={"messages": [{"role": "user", "content": "x" * 100}]}))
    assert "64" in error["message"]
    assert error["param"] == "messages"


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (COMPLETIONS, "max_tokens", 65),
        (COMPLETIONS, "n", 9),
        (CHAT, "max_tokens", 65),
        (CHAT, "n", 9),
        (CHAT, "max_completion_tokens", 65),
    ],
)
@pytest.mark.fault(90)
def test_more_than_the_server_allows_is_refused(http: httpx.Client, path: str, field: str, value: int) -> None:
    error = refused(http.post(path, json={"messages": TALK, field: value} if path == CHAT else {field: value}))
    assert error["param"] == field
    assert str(value) in error["message"]


def test_more_choices_than_there_is_room_for_are_refused_for_good(http: httpx.Client) -> None:
    assert "13 choices" in refused(http.post(COMPLETIONS, json={"prompt": ["x"] * 13}))["message"]


WRONG: dict[str, list[Any]] = {
    "temperature": [-0.1, 2.1, "1", True],
    "top_p": [-0.1, 1.1],
    "top_k": [-2, 1.5],
    "min_p": [-0.1, 1.1],
    "max_tokens": [-1, "5", 2**40],
    "n": [0, -1],
    "seed": [-1, 2**63, 1.5],
    "stop": ["", ["a", ""], ["a"] * 17, "a" * 201],
    "logprobs": [-1, 21, True],
    "stream": ["yes", 1],
    "prompt": [[], [1, "a"], [-1], [True], {"a": 1}, [1.5], [257], [10**30], "\ud800"],
    "model": [7],
    "user": [7],
    "stream_options": [{"include_usage": True}, {"other": 1}],
    "best_of": [2],
}


@pytest.mark.fault(71, 72, 76)
@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_value_out_of_range_is_refused_and_its_field_named(http: httpx.Client, field: str, value: Any) -> None:
    body = json.dumps({"prompt": "x", field: value})
    error = refused(http.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"}))
    assert error["param"].startswith(field)
    assert field.removesuffix("_options") in error["message"]


@pytest.mark.fault(71)
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(http: httpx.Client, number: str) -> None:
    body = f'{{"prompt": "x", "temperature": {number}}}'
    error = refused(http.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"}))
    assert error["param"] == "temperature"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages: field required"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0.type: "),
        ({"messages": [{"role": "user", "content": "x", "typo": 1}]}, "unknown field messages.0.typo: leave it out"),
        ({"messages": TALK, "stop": ["a", ""]}, "stop.1: string should have at least 1 character"),
        ({"messages": TALK, "stop": 7}, "stop: input should be a valid string or input should be a valid list"),
        ([], "the body must be a JSON object: "),
    ],
)
def test_a_mistake_is_told_with_its_place(http: httpx.Client, body: Any, message: str) -> None:
    assert refused(http.post(CHAT, json=body))["message"].startswith(message)


def test_the_largest_seed_leaves_room_for_the_seeds_of_all_choices(http: httpx.Client) -> None:
    body = {"prompt": "x", "seed": 2**63 - 1, "max_tokens": 1}
    assert http.post(COMPLETIONS, json=body).status_code == 200
    assert refused(http.post(COMPLETIONS, json={**body, "n": 2}))["param"] == "seed"


UNSUPPORTED: dict[str, dict[str, Any]] = {
    COMPLETIONS: {
        "presence_penalty": 1.0,
        "frequency_penalty": -1,
        "suffix": "x",
        "logit_bias": {"50256": -100},
        "typo": 1,
    },
    CHAT: {
        "tools": [{"type": "function"}],
        "tool_choice": "required",
        "response_format": {"type": "json_object"},
        "store": True,
        "functions": [{}],
        "metadata": {"a": "b"},
        "modalities": ["audio"],
        "reasoning_effort": "high",
        "prediction": {},
        "web_search_options": {},
        "best_of": 1,
        "top_logprobs": 2,
        "audio": {},
        "service_tier": "flex",
    },
}


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [(path, field, value) for path, fields in UNSUPPORTED.items() for field, value in fields.items()],
)
@pytest.mark.fault(92)
def test_a_field_that_is_not_supported_is_refused_and_named(
    http: httpx.Client, path: str, field: str, value: Any
) -> None:
    body = json.dumps({"messages": TALK, field: value} if path == CHAT else {"prompt": "x", field: value})
    error = refused(http.post(path, content=body, headers={"Content-Type": "application/json"}))
    assert error["param"] == field
    assert field in error["message"]


def test_a_field_whose_name_is_no_text_is_refused(http: httpx.Client) -> None:
    refused(http.post(COMPLETIONS, content=rb'{"\ud800": 1}', headers={"Content-Type": "application/json"}))


def test_values_that_ask_for_nothing_are_accepted(http: httpx.Client) -> None:
    nothing = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "someone", "n": 1}
    completion = {"best_of": 1, "suffix": None, "echo": False, "logprobs": None, "stop": []}
    assert http.post(COMPLETIONS, json={"prompt": "x", **nothing, **completion}).status_code == 200
    chat = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "store": False,
        "metadata": {},
        "modalities": ["text"],
        "logprobs": False,
        "parallel_tool_calls": True,
        "service_tier": "auto",
    }
    assert http.post(CHAT, json={"messages": TALK, **nothing, **chat}).status_code == 200


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_null_is_the_same_as_leaving_a_field_out(server: Server, http: httpx.Client, path: str) -> None:
    name = {COMPLETIONS: "CompletionBody", CHAT: "ChatBody"}[path]
    fields = http.get("/openapi.json").json()["components"]["schemas"][name]["properties"]
    body = {"messages": TALK} if path == CHAT else {}
    everything = {**dict.fromkeys(fields), **body}
    assert len(everything) > 20
    answer, plain = (http.post(path, json=given).json() for given in (everything, body))
    assert answer["choices"] == plain["choices"]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "tool", "content": "x"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"content": "x"},
        {"role": "assistant", "content": "x", "tool_calls": [{}]},
        {"role": "user", "content": "\ud800"},
        "x",
    ],
)
def test_a_message_of_another_kind_is_refused(http: httpx.Client, message: Any) -> None:
    body = json.dumps({"messages": [message]})
    error = refused(http.post(CHAT, content=body, headers={"Content-Type": "application/json"}))
    assert error["param"] == "messages"


def test_a_reply_of_this_server_may_be_sent_back_as_it_came(http: httpx.Client) -> None:
    reply = http.post(CHAT, json={"messages": TALK, "max_tokens": 4}).json()["choices"][0]["message"]
    talk = [*TALK, {**reply, "tool_calls": None, "annotations": []}, {"role": "user", "content": "y"}]
    assert http.post(CHAT, json={"messages": talk, "max_tokens": 4}).status_code == 200


def test_without_a_chat_template_the_way_to_one_is_named() -> None:
    with serving(decoders=[ScriptedDecoder(b"ok")]) as server, httpx.Client(base_url=server.url) as http:
        error = refused(http.post(CHAT, json={"messages": TALK}))
        assert "--chat_template FILE" in error["message"]
        assert http.get("/v1/models").json()["data"][0]["chat"] is False


def test_token_ids_are_told_when_they_are_asked_for(http: httpx.Client) -> None:
    body = {"prompt": "hi", "max_tokens": 2, "return_token_ids": True}
    choice = http.post(COMPLETIONS, json=body).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([*b"hi"], [*b"ok"])
    for path, given in ((COMPLETIONS, body), (CHAT, {"messages": TALK, "max_tokens": 2, "return_token_ids": True})):
        lines = http.post(path, json={**given, "stream": True}).text.split("\n\n")[:-2]
        choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
        assert [bool(choice.get("prompt_token_ids")) for choice in choices] == [True] + [False] * (len(choices) - 1)
        assert [token for choice in choices for token in choice["token_ids"]] == [*b"ok"]


def test_an_unknown_path_and_a_wrong_method_have_the_same_shape(http: httpx.Client) -> None:
    refused(http.get("/v2"), 404)
    refused(http.get(COMPLETIONS), 405)
    refused(http.get("/docs"), 404)  # FastAPI's page would load scripts from elsewhere
