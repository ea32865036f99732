"""The key, Host and Origin, and the headers that bind browsers."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import httpx
import pytest
from served import ScriptedDecoder, serving

from nanokimi.serve.arguments import Rules, is_loopback

KEY = "a-key-of-our-own"
READ = ["/", "/web/page.js", "/v1/models", "/v1/models/debug", "/health", "/metrics", "/openapi.json"]
EVERY_ROUTE = [*READ, "/nowhere", "/v1/completions", "/v1/chat/completions", "/v1/inspect"]


@pytest.fixture(scope="module")
def open_server() -> Iterator[httpx.Client]:
    with serving(decoders=[ScriptedDecoder(b"ok")]) as server, httpx.Client(base_url=server.url) as http:
        yield http


@pytest.fixture(scope="module")
def locked_server() -> Iterator[httpx.Client]:
    rules = Rules(api_key=KEY, allowed_origins=("https://friend.example",), allowed_hosts=("model.example",))
    with serving(decoders=[ScriptedDecoder(b"ok")], rules=rules) as server, httpx.Client(base_url=server.url) as http:
        yield http


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anyone:{password}".encode()).decode()


@pytest.mark.fault(95)
@pytest.mark.parametrize("path", EVERY_ROUTE)
@pytest.mark.parametrize("given", [None, "Bearer wrong", f"Bearer {KEY}x", "Bearer", basic("wrong"), "Basic %", KEY])
def test_a_wrong_key_is_401_on_every_route(locked_server: httpx.Client, path: str, given: str | None) -> None:
    answer = locked_server.get(path, headers={"Authorization": given} if given else {})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic ")
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert locked_server.post(path, json={}, headers={"Authorization": given or ""}).status_code == 401


@pytest.mark.parametrize("given", [f"Bearer {KEY}", f"bearer {KEY}", basic(KEY)])
def test_the_right_key_opens_every_route(locked_server: httpx.Client, given: str) -> None:
    for path in READ:
        assert locked_server.get(path, headers={"Authorization": given}).status_code == 200, path
    assert locked_server.post("/v1/completions", json={}, headers={"Authorization": given}).status_code == 200


def test_a_key_that_is_not_ascii_is_wrong_and_no_more(locked_server: httpx.Client) -> None:
    headers = [(b"Authorization", "Bearer ключ".encode()), (b"Authorization", b"Basic \xff")]
    for header in headers:
        assert locked_server.get("/health", headers=[header]).status_code == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "", "[", "a@b"]
)
@pytest.mark.fault(96)
def test_a_foreign_host_is_403(open_server: httpx.Client, host: str) -> None:
    """A page elsewhere whose name was made to lead to this machine."""
    answer = open_server.get("/v1/models", headers={"Host": host})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_host")


@pytest.mark.parametrize("host", ["localhost", "LocalHost:1", "127.0.0.1", "127.1.2.3:80", "[::1]:8000", "localhost."])
def test_this_machine_goes_by_its_own_names(open_server: httpx.Client, host: str) -> None:
    assert open_server.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "", "http://localhost:1", "file://", "https://127.0.0.1"]
)
@pytest.mark.fault(96)
def test_a_foreign_origin_is_403(open_server: httpx.Client, origin: str) -> None:
    answer = open_server.post("/v1/completions", json={}, headers={"Origin": origin})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")


def test_the_page_of_this_server_may_use_it(open_server: httpx.Client) -> None:
    own = str(open_server.base_url).rstrip("/")
    assert open_server.post("/v1/completions", json={}, headers={"Origin": own}).status_code == 200
    headers = {"Host": "localhost", "Origin": "http://localhost:80"}
    assert open_server.post("/v1/completions", json={}, headers=headers).status_code == 200


def test_an_allowed_host_and_origin_are_let_in(locked_server: httpx.Client) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Host": "Model.Example:80", "Origin": "https://friend.example"}
    answer = locked_server.post("/v1/completions", json={}, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    preflight = {"Origin": "https://friend.example", **asked}
    assert locked_server.options("/v1/completions", headers=preflight).status_code == 200
    preflight["Origin"] = "https://stranger.example"
    assert locked_server.options("/v1/completions", headers=preflight).status_code == 403


def test_no_origin_is_told_that_it_is_allowed_unless_one_is(open_server: httpx.Client) -> None:
    own = str(open_server.base_url).rstrip("/")
    answer = open_server.post("/v1/completions", json={}, headers={"Origin": own})
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.fault(99)
@pytest.mark.parametrize("path", ["/", "/web/page.js", "/v1/models", "/nowhere", "/v1/completions"])
def test_every_answer_binds_the_browser(open_server: httpx.Client, path: str) -> None:
    """Whatever a model writes, no script of its own can run in the page."""
    for answer in (open_server.get(path), open_server.get(path, headers={"Host": "evil.example"})):
        policy = answer.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"} <= {*policy}
        assert "unsafe" not in " ".join(policy)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", ["/web/..%2fserve/server.py", "/web/../server.py", "/web/%2e%2e/server.py", "/web/"])
def test_only_the_files_of_the_page_are_served(open_server: httpx.Client, path: str) -> None:
    url = str(open_server.base_url).rstrip("/") + path
    assert open_server.send(httpx.Request("GET", httpx.URL(url))).status_code == 404


@pytest.mark.parametrize(
    ("listening", "host", "ours"),
    [
        ("0.0.0.0", "192.168.1.5:8000", True),
        ("0.0.0.0", "evil.example", False),
        ("::", "[2001:db8::1]:80", True),
        ("::", "10.0.0.1", True),
        ("192.168.1.5", "192.168.1.5", True),
        ("192.168.1.5", "192.168.1.6", False),
        ("model.lan", "model.lan:8000", True),
        ("model.lan", "other.lan", False),
    ],
)
def test_on_other_addresses_names_are_foreign_and_addresses_are_not(listening: str, host: str, ours: bool) -> None:
    assert Rules(host=listening).host_is_ours(host) is ours


def test_what_counts_as_loopback() -> None:
    assert [is_loopback(host) for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "model.lan")] == [False] * 4
