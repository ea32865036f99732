"""A hub-compatible server on loopback for tests: data set repositories from memory, with faults on demand.

``datasets`` and ``huggingface_hub`` read HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME when they are imported, and the test
process itself is offline; so whatever talks to this server runs in a child process, see ``run_with_hub``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = Mapping[str, bytes]
FOREVER = 1 << 40


class LoopbackHub:
    """Serves data set repositories at ``url`` while it is entered as a context manager.

    Attributes:
        repositories: name -> files; may be changed while it runs.
        gated: repositories whose files are refused with 403.
        private: repositories that do not exist for those who send no token.
        requests: "METHOD path" of every request, in order.
        bytes_served: bytes of body sent, by "repository/file".
        cut_after_bytes: bodies of data files end after so many bytes and the connection is closed, ``cut_times`` times.
        down: so many requests are closed without an answer.
        faults_after_bytes: cuts and refusals begin once so many bytes of data files were served.
    """

    def __init__(
        self, repositories: Mapping[str, Files] | None = None, *, gated: Iterable[str] = (),
        handler: type[HubHandler] | None = None,
    ) -> None:  # fmt: skip
        self.repositories: dict[str, Files] = dict(repositories or {})
        self.gated, self.private = set(gated), set[str]()
        self._commits: dict[tuple[str, str], Files] = {}
        self.lock = threading.Lock()
        self.calm()
        bound = type("Handler", (handler or HubHandler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def calm(self) -> None:
        """No faults, and every count from zero again."""
        self.requests: list[str] = []
        self.bytes_served: Counter[str] = Counter()
        self.cut_after_bytes = self.cut_times = self.down = self.faults_after_bytes = 0

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def commit(self, repository: str) -> str:
        """The newest commit of a repository: it changes with its files, and is kept."""
        digest = hashlib.sha1()
        for path, data in sorted(self.repositories[repository].items()):
            digest.update(f"{path} {len(data)} {_etag(data)}".encode())
        commit = digest.hexdigest()
        self._commits.setdefault((repository, commit), dict(self.repositories[repository]))
        return commit

    def files(self, repository: str, revision: str) -> Files | None:
        """The files of a commit that was the newest once, or is it now (``main``)."""
        newest = self.commit(repository)
        return self._commits.get((repository, newest if revision in ("main", "") else revision))

    def take(self, knob: str) -> bool:
        """Whether a fault is due, and counts it."""
        with self.lock:
            left = getattr(self, knob) if sum(self.bytes_served.values()) >= self.faults_after_bytes else 0
            if left:
                setattr(self, knob, left - 1)
            return bool(left)


class HubHandler(BaseHTTPRequestHandler):
    """Answers one connection: looks up and serves repositories."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {unquote(self.path)}")
        if self.hub.take("down"):
            self.close_connection = True
            return
        self.route(unquote(urlsplit(self.path).path), sent)

    def route(self, path: str, sent: bytes) -> None:
        """Answers a request for ``path`` with the body ``sent``."""
        path = path.removeprefix("/api").removeprefix("/datasets/")
        name = next((name for name in self.hub.repositories if path == name or path.startswith(name + "/")), None)
        if name is None or (name in self.hub.private and "Authorization" not in self.headers):
            return self.refuse(401, "RepoNotFound")
        route, _, rest = path.removeprefix(name).lstrip("/").partition("/")
        revision, _, inside = rest.partition("/")
        files = self.hub.files(name, revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        commit = self.hub.commit(name) if revision in ("main", "") else revision
        if route == "resolve":
            return self._file(name, inside, files, commit)
        if route == "tree":
            return self._tree(files, inside, recursive="true" in parse_qs(urlsplit(self.path).query)["recursive"])
        if route == "paths-info":
            return self.answer([_entry(files, path) for path in _wanted(sent) if _entry(files, path)])
        if route in ("revision", ""):
            siblings = [{"rfilename": file} for file in files]
            return self.answer({"id": name, "sha": commit, "private": name in self.hub.private, "siblings": siblings})
        self.refuse(404, "EntryNotFound")

    def _file(self, name: str, path: str, files: Files, commit: str) -> None:
        if name in self.hub.gated:
            return self.refuse(403, "GatedRepo")
        data = files.get(path)
        if data is None:
            return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start, end = 0, len(data)
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            start, end = int(first), min(end, int(last) + 1) if last else end
            if start >= len(data):
                return self.refuse(416, "RangeNotSatisfiable")
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self._head(206 if asked else 200, headers | {"Content-Length": str(end - start)})
        if self.command != "HEAD":
            self._body(f"{name}/{path}", data[start:end])

    def _body(self, key: str, data: bytes) -> None:
        is_data = not key.endswith((".md", ".yaml"))
        if is_data and 0 < self.hub.cut_after_bytes < len(data) and self.hub.take("cut_times"):
            data = data[: self.hub.cut_after_bytes]
            self.close_connection = True
        if is_data:  # counted first, so that whoever has the data can rely on the count
            with self.hub.lock:
                self.hub.bytes_served[key] += len(data)
        try:
            self.wfile.write(data)
        except OSError:  # the client has enough
            self.close_connection = True

    def _tree(self, files: Files, folder: str, *, recursive: bool) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = [path.removeprefix(prefix) for path in files if path.startswith(prefix)]
        if not inside:
            return self.refuse(404, "EntryNotFound")
        names = {path for path in inside if recursive} | {path.split("/")[0] for path in inside}
        self.answer([_entry(files, prefix + name) for name in sorted(names)])

    def answer(self, value: Any, status: int = 200) -> None:
        """Sends ``value`` as JSON."""
        body = json.dumps(value).encode()
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        """Sends an error under the hub's name for it."""
        self._head(status, {"X-Error-Code": code, "Content-Length": "0"} | dict(headers or {}))

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _wanted(sent: bytes) -> list[str]:
    try:
        return list(json.loads(sent)["paths"])
    except ValueError:
        return parse_qs(sent.decode())["paths"]


def _entry(files: Files, path: str) -> dict[str, Any] | None:
    """What the hub's API says of a file or a folder."""
    if path in files:
        return {"type": "file", "path": path, "size": len(files[path]), "oid": _etag(files[path])}
    if any(name.startswith(f"{path}/") for name in files):
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    return None


def parquet_file(columns: Mapping[str, Sequence[Any]], *, group_rows: int = 1000, compression: str = "zstd") -> bytes:
    """A parquet file with row groups of ``group_rows`` rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), sink, row_group_size=group_rows, compression=compression)
    return sink.getvalue()


def jsonl_file(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """A JSON lines file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def readme(configs: Mapping[str, str | Mapping[str, str]]) -> bytes:
    """A data set card: config -> pattern of the files of split train, or split -> pattern."""
    lines = ["---", "configs:"]
    for config, files in configs.items():
        lines += [f"- config_name: {json.dumps(config)}", "  data_files:"]
        for split, pattern in ({"train": files} if isinstance(files, str) else files).items():
            lines += [f"  - split: {split}", f"    path: {json.dumps(pattern)}"]
    return "\n".join([*lines, "---", "# A data set", ""]).encode()


def fineweb(texts: Sequence[str], *, files: int = 3, group_rows: int = 8) -> dict[str, bytes]:
    """Files of HuggingFaceFW/fineweb: ``texts`` as its config sample-10BT, the first of them as its default too."""
    size = -(-len(texts) // files)
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    made = {f"sample/10BT/{i:03d}_00000.parquet": _web_pages(part, group_rows) for i, part in enumerate(parts)}
    made["data/CC-MAIN-2013-20/000_00000.parquet"] = _web_pages(parts[0][:2], group_rows)
    made["README.md"] = readme({"default": "data/*/*", "sample-10BT": "sample/10BT/*"})
    return made


def _web_pages(texts: Sequence[str], group_rows: int) -> bytes:
    names = [f"{number:06d}" for number in range(len(texts))]
    columns: dict[str, Sequence[Any]] = {"text": texts, "id": [f"<urn:uuid:{name}>" for name in names]}
    columns |= {"dump": ["CC-MAIN-2013-20"] * len(texts), "url": [f"http://example.org/{name}" for name in names]}
    columns |= {"language_score": [0.9] * len(texts), "token_count": [len(text) // 4 for text in texts]}
    return parquet_file(columns, group_rows=group_rows)


def hub_environment(url: str, home: Path) -> dict[str, str]:
    """The environment of a child process for which ``url`` is the hub and ``home`` the cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    return kept | {"HF_ENDPOINT": url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}


def run_with_hub(
    url: str, code: str, *args: str, tmp_path: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python ``code`` in a child for which ``url`` is the hub, with an empty cache; two minutes at most."""
    home = tmp_path / "hf_home"
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=120,
        env=hub_environment(url, home) | environment,
    )
