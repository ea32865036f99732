"""Clients that leave, queues that are full, time that runs out, engines that fail, servers that end."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from served import ScriptedDecoder, Server, serving, until

from nanokimi.serve import answers, worker

COMPLETIONS = "/v1/completions"


class Held:
    """A server whose every token has to be permitted."""

    def __init__(self, server: Server, decoder: ScriptedDecoder, permits: threading.Semaphore) -> None:
        self.server, self.decoder, self.permits = server, decoder, permits
        self.http = httpx.Client(base_url=server.url, timeout=20)

    def connect(self, **body: Any) -> socket.socket:
        """See ``connected``."""
        return connected(self.server, **{"prompt": "x", "max_tokens": 1000, **body})

    def outstanding(self, count: int) -> None:
        """Waits until so many sequences wait or run."""
        until(lambda: self.server.worker.outstanding == count)

    def open_jobs(self, count: int) -> None:
        """Waits until so many requests are being answered."""
        until(lambda: len(self.server.worker._jobs) == count)


def connected(server: Server, **body: Any) -> socket.socket:
    """A connection that has asked for a completion and read nothing yet."""
    text = json.dumps(body)
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
    return connection


def held_server(**options: Any) -> Iterator[Held]:
    permits = threading.Semaphore(0)
    decoder = ScriptedDecoder(b"abcdefgh", slots=2, permits=permits)
    with serving(decoders=[decoder], chat=True, **options) as server:
        held = Held(server, decoder, permits)
        try:
            yield held
        finally:
            permits.release(1_000_000)
            held.http.close()


@pytest.fixture
def held() -> Iterator[Held]:
    yield from held_server(max_queue=2)


@pytest.mark.fault(93)
@pytest.mark.parametrize("stream", [True, False])
def test_when_the_client_is_gone_generation_stops_within_a_token(held: Held, stream: bool) -> None:
    connection = held.connect(stream=stream, n=2)
    held.outstanding(2)
    held.permits.release(2)
    until(lambda: held.decoder.steps == 2)
    connection.close()
    held.open_jobs(0)  # the server has seen it; the engine is at most in the middle of its third step
    held.permits.release(100)
    held.outstanding(0)
    assert held.decoder.steps <= 3
    assert (held.server.worker.running, held.server.worker.waiting) == (0, 0)


def test_a_client_that_leaves_the_queue_is_forgotten(held: Held) -> None:
    running = held.connect(n=2)
    held.outstanding(2)
    waiting = held.connect(n=2)
    held.outstanding(4)
    waiting.close()
    held.open_jobs(1)
    held.permits.release(1)
    held.outstanding(2)
    running.close()


@pytest.mark.fault(94)
def test_a_full_queue_is_429_with_retry_after_and_takes_all_choices_or_none(held: Held) -> None:
    connections = [held.connect(n=2), held.connect()]
    held.outstanding(3)
    answer = held.http.post(COMPLETIONS, json={"prompt": "x", "n": 2})
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(answer.headers["retry-after"]) > 0
    assert held.server.worker.outstanding == 3
    connections.append(held.connect())
    held.outstanding(4)
    assert held.http.post(COMPLETIONS, json={"prompt": "x"}).status_code == 429
    assert "nanokimi_queue_refusals_total 2\n" in held.http.get("/metrics").text
    for connection in connections:
        connection.close()


def test_what_waits_and_runs_is_told(held: Held) -> None:
    connection = held.connect(n=3)
    until(lambda: held.http.get("/health").json()["running"] == 2)
    health = held.http.get("/health").json()
    assert (health["status"], health["slots"], health["waiting"]) == ("ok", 2, 1)
    gauges = held.http.get("/metrics").text
    assert "nanokimi_running 2\n" in gauges
    assert "nanokimi_waiting 1\n" in gauges
    assert "nanokimi_slot_bytes 1000\n" in gauges
    connection.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_takes_too_long_ends_with_an_error_of_its_own(stream: bool) -> None:
    for held in held_server(max_seconds=0.2):
        body = {"prompt": "x", "max_tokens": 1000, "stream": stream}
        answer = held.http.post(COMPLETIONS, json=body)
        assert answer.status_code == (200 if stream else 504)
        error = json.loads(answer.text.split("data: ")[-1])["error"]
        assert (error["code"], error["type"]) == ("timeout", "server_error")
        assert "--max_seconds" in error["message"]
        assert "[DONE]" not in answer.text
        held.permits.release(100)
        held.outstanding(0)


def test_a_client_that_does_not_read_holds_up_nobody_and_is_left_alone_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers, "LAST_WORDS", 0.1)
    decoder = ScriptedDecoder(b"ab", max_length=1_000_000)
    with serving(decoders=[decoder], max_seconds=2.0) as server:
        prompt = [7] * 200_000  # told to every choice, it is more than the buffers between the two can hold
        connection = connected(server, prompt=prompt, n=8, stream=True, return_token_ids=True, max_tokens=9)
        until(lambda: server.worker.outstanding == 8)
        until(lambda: server.worker.outstanding == 0)  # what it has not read keeps no slot
        assert server.metrics.generated_tokens == 72
        assert len(server.worker._jobs) == 1  # and is not sent yet
        until(lambda: not server.worker._jobs)
        until(lambda: not server.uvicorn.server_state.connections)
        connection.close()


@pytest.mark.fault(100)
def test_an_error_in_mid_stream_is_an_event_without_done_and_the_server_lives_on() -> None:
    decoder = ScriptedDecoder(b"abcdefgh", fails_at=3)
    with serving(decoders=[decoder]) as server, httpx.Client(base_url=server.url) as http:
        answer = http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 6, "stream": True})
        *chunks, error = [json.loads(event) for event in answer.text.removeprefix("data: ").split("\n\ndata: ")]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abc"
        assert error["error"]["type"] == "server_error"
        assert "a bit has flipped" in error["error"]["message"]
        assert http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 6}).json()["choices"][0]["text"] == "abcdef"
        assert http.get("/health").json()["failures"] == 0


def test_an_error_of_one_choice_ends_the_others_too() -> None:
    decoder = ScriptedDecoder(b"abcdefgh", slots=2, fails_at=3)
    with serving(decoders=[decoder]) as server, httpx.Client(base_url=server.url) as http:
        answer = http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 6, "n": 4})
        assert answer.status_code == 500
        until(lambda: server.worker.outstanding == 0)


def test_an_engine_that_fails_altogether_is_replaced_and_health_says_what_happened() -> None:
    broken, sound = ScriptedDecoder(b"ab", breaks=True), ScriptedDecoder(b"ab")
    with serving(decoders=[broken, sound]) as server, httpx.Client(base_url=server.url) as http:
        answer = http.post(COMPLETIONS, json={"prompt": "x", "n": 3})
        assert answer.status_code == 500
        assert "/health" in answer.json()["error"]["message"]
        assert server.worker.outstanding == 0
        health = http.get("/health").json()
        assert (health["status"], health["failures"]) == ("ok", 1)
        assert "a cable is loose" in health["last_failure"]
        assert http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 2}).json()["choices"][0]["text"] == "ab"


def test_the_text_of_several_sequences_gathers_and_none_of_it_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GATHERING", 1e9)
    with serving(decoders=[ScriptedDecoder(b"abcdefgh")]) as server:
        answer = httpx.post(f"{server.url}{COMPLETIONS}", json={"prompt": "x", "max_tokens": 8, "n": 2, "stream": True})
    events = [json.loads(event) for event in answer.text.removeprefix("data: ").split("\n\ndata: ")[:-1]]
    texts = [(event["choices"][0]["index"], event["choices"][0]["text"]) for event in events]
    assert sorted(text for text in texts if text[1]) == [(0, "abcdefgh"), (1, "abcdefgh")]


# ---- the end ------------------------------------------------------------------------------------


@pytest.mark.fault(98)
def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(held: Held) -> None:
    answers: list[httpx.Response] = []
    body = {"prompt": "x", "max_tokens": 4, "stream": True}
    thread = threading.Thread(target=lambda: answers.append(held.http.post(COMPLETIONS, json=body)))
    thread.start()
    held.outstanding(1)
    held.server.uvicorn.handle_exit(signal.SIGTERM, None)
    until(lambda: held.server.worker.draining)
    with httpx.Client(base_url=held.server.url) as http:
        refusal = http.post(COMPLETIONS, json={"prompt": "x"})
        assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "1")
        health = http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
    held.permits.release(10)
    thread.join(timeout=20)
    assert answers[0].text.endswith("data: [DONE]\n\n")
    until(lambda: not held.server.thread.is_alive())


def test_what_still_runs_when_the_time_to_drain_is_over_is_told() -> None:
    for held in held_server(drain_seconds=0.0):
        connection = held.connect(stream=True)
        held.outstanding(1)
        held.server.uvicorn.handle_exit(signal.SIGTERM, None)
        held.open_jobs(0)
        held.permits.release(100)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))  # noqa: B023
        assert b'"message": "the server is shutting down"' in answer
        assert b"[DONE]" not in answer


def test_a_second_signal_ends_at_once() -> None:
    for held in held_server():
        connection = held.connect(stream=True)
        held.outstanding(1)
        held.server.uvicorn.handle_exit(signal.SIGINT, None)
        held.server.uvicorn.handle_exit(signal.SIGINT, None)
        until(lambda: held.server.uvicorn.should_exit and not held.server.uvicorn.servers[0].is_serving())  # noqa: B023
        assert held.server.uvicorn.signal == signal.SIGINT
        connection.close()
