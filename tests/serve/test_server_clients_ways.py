"""What common clients send beside what they ask for, and how they open their connections."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from served import ScriptedDecoder, Server, serving

from nanokimi.serve.server import UVICORN

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TALK = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(decoders=[ScriptedDecoder(b"ok", max_length=64)], chat=True) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@pytest.mark.fault("A17")
def test_an_offered_upgrade_costs_no_body_whatever_parser_is_installed(server: Server) -> None:
    pytest.importorskip("httptools")
    body = b'{"prompt": "x", "max_tokens": 2}'
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade, HTTP2-Settings, close\r\n"
        "Upgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode() + body)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b'"text":"ok"' in answer


@pytest.mark.fault("A17")
def test_no_part_of_the_server_depends_on_what_is_installed() -> None:
    assert (UVICORN["http"], UVICORN["ws"], UVICORN["loop"]) == ("h11", "none", "asyncio")


NEUTRAL: dict[str, Any] = {
    "tools": None,
    "prompt_cache_key": None,
    "guided_json": None,  # unknown here, and null
    "repetition_penalty": 1.0,
    "parallel_tool_calls": False,
    "top_k": -1,
    "min_tokens": 0,
    "logprobs": False,
    "verbosity": "medium",
    "stream_options": {"include_usage": False},
    "safety_identifier": "someone",
    "stop_token_ids": [],
    "skip_special_tokens": True,
}


@pytest.mark.fault("A21")
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("field", "value"), NEUTRAL.items())
def test_a_value_that_asks_for_nothing_is_accepted(http: httpx.Client, path: str, field: str, value: Any) -> None:
    given: dict[str, Any] = {"messages": TALK} if path == CHAT else {"prompt": "x"}
    answer = http.post(path, json={**given, "max_tokens": 2, field: value})
    assert answer.status_code == 200, answer.text


@pytest.mark.fault("A21")
@pytest.mark.parametrize(
    "more",
    [
        {"name": "me"},
        {"cache_control": {"type": "ephemeral"}},
        {"reasoning_content": "I thought", "role": "assistant"},
        {"tool_call_id": None, "tool_calls": None},
        {"content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
    ],
)
def test_what_clients_keep_beside_a_message_is_accepted(http: httpx.Client, more: dict[str, Any]) -> None:
    answer = http.post(CHAT, json={"messages": [{**TALK[0], **more}], "max_tokens": 2})
    assert answer.status_code == 200, answer.text


@pytest.mark.fault("A21")
@pytest.mark.parametrize(
    ("field", "value"), [("repetition_penalty", 1.1), ("tools", [{}]), ("min_tokens", 3), ("top_logprobs", 2)]
)
def test_a_value_that_asks_for_more_is_refused_by_its_name(http: httpx.Client, field: str, value: Any) -> None:
    error = http.post(CHAT, json={"messages": TALK, field: value}).json()["error"]
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.fault("A21")
@pytest.mark.parametrize("path", ["/", "/web/page.js", "/v1/models", "/v1/models/debug", "/health", "/metrics"])
def test_head_answers_where_get_does(http: httpx.Client, path: str) -> None:
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.fault("A21")
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff", "can't decode byte 0xff in position 0"),
        (b'{"a" 1}', "Expecting ':' delimiter at character 5"),
        (b"[" * 5000, "recursion"),
        (b"9" * 5000, "4300 digits"),
        (b"", "the body is empty"),
    ],
)
def test_a_body_that_does_not_parse_is_told_why(http: httpx.Client, body: bytes, reason: str) -> None:
    answer = http.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert reason in answer.json()["error"]["message"]
