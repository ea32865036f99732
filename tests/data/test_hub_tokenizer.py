"""The real download code, against a hub-compatible server on loopback."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nanokimi.data.tokenizer import train_bpe

COMMIT = "c" * 40
LOAD = """
import sys
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.errors import UserError
try:
    tokenizer = load_tokenizer(sys.argv[1])
    print(tokenizer.vocab_size, tokenizer.encode("the cat"), tokenizer.decode(tokenizer.encode("the cat")))
except UserError as error:
    print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """One public repository, one gated, nothing else."""

    tokenizer = b""
    paths: list[str]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer(body=self.command == "GET")

    def _answer(self, body: bool = False) -> None:
        self.paths.append(self.path)
        if self.path == "/some/model/resolve/main/tokenizer.json":
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(self.tokenizer).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(self.tokenizer)))
            self.end_headers()
            if body:
                self.wfile.write(self.tokenizer)
            return
        gated = self.path.startswith("/gated/")
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    tokenizer = train_bpe(["the cat sat on the mat and the cat was fat"] * 3, 300)
    paths: list[str] = []
    handler = type("OneHub", (Hub,), {"tokenizer": tokenizer.to_state()["json"].encode(), "paths": paths})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    thread.join()
    server.server_close()


def load(name: str, endpoint: str, home: Path) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    environment = kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, name], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_tokenizer_is_fetched_once_and_then_taken_from_the_cache(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, paths = hub
    first = load("some/model", endpoint, tmp_path)
    assert first.endswith("the cat")
    asked = [path for path in paths if "tokenizer" in path]
    assert asked
    assert load("some/model", endpoint, tmp_path) == first
    assert [path for path in paths if "tokenizer" in path] == asked


@pytest.mark.fault(25)
@pytest.mark.parametrize(("name", "message"), [("gated/model", "hf auth login"), ("no/model", "no such repository")])
def test_what_the_hub_refuses_is_one_line_with_the_remedy(
    hub: tuple[str, list[str]], tmp_path: Path, name: str, message: str
) -> None:
    said = load(name, hub[0], tmp_path)
    assert message in said
    assert "tokenizer_name=byte" in said
    assert "\n" not in said


@pytest.mark.fault(27)
def test_no_network_is_one_line_that_names_the_alternatives(tmp_path: Path) -> None:
    said = load("some/model", "http://127.0.0.1:9", tmp_path)
    assert "cannot be reached" in said
    assert "tokenizer_name=byte" in said
