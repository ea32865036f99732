"""Exported folders pushed to a hub, which is a server on loopback, with the real ``huggingface_hub``."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hub import hub_environment
from model_hub import READER, WRITER, ModelHub

from nanokimi.errors import UserError
from nanokimi.interop.commands import push_folder
from nanokimi.receipt import RECEIPT, NotCompared, write_receipt

# Importing torch takes seconds: one child does so once, and then pushes and fetches what it is told, a line at a time.
CHILD = """
import functools, json, os, sys
from pathlib import Path
import huggingface_hub._commit_api as commits, huggingface_hub.lfs as lfs
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import http_backoff
from nanokimi.errors import RunError, UserError
from nanokimi.interop.commands import push_folder

commits.http_backoff = lfs.http_backoff = functools.partial(http_backoff, max_retries=0)

def push(folder, repository, private):
    said = []
    try:
        result = push_folder(Path(folder), repository, private=private, log=said.append)
    except (UserError, RunError) as error:
        result = f"{type(error).__name__}: {error}"
    return {"result": result, "said": said}

def fetch(repository, cache, revision):
    try:
        return snapshot_download(repository, cache_dir=cache, revision=revision)
    except Exception as error:
        return type(error).__name__

for line in sys.stdin:
    asked = json.loads(line)
    os.environ["HF_TOKEN"] = asked["token"]
    constants.HF_HUB_DISABLE_XET = not asked["xet"]
    print(json.dumps(globals()[asked["call"]](*asked["args"])), flush=True)
"""
SKIP_XET = pytest.mark.skipif(find_spec("hf_xet") is None, reason="hf_xet is not installed")


class Pushed(NamedTuple):
    result: str
    said: list[str]


class Child:
    """A process for which a loopback server is the hub."""

    def __init__(self, url: str, folder: Path) -> None:
        self.errors = folder / "stderr.txt"
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=self.errors.open("w"), env=hub_environment(url, folder / "home"),
        )  # fmt: skip

    def push(
        self, folder: Path, repository: str, *, private: bool = True, token: str = WRITER, xet: bool = False
    ) -> Pushed:
        return Pushed(**self._ask("push", str(folder), repository, private, token=token, xet=xet))

    def fetch(self, repository: str, cache: Path, *, revision: str = "main", token: str = READER) -> Path:
        """The folder with the files, or the name of an error."""
        return Path(self._ask("fetch", repository, str(cache), revision, token=token, xet=True))

    def _ask(self, call: str, *args: Any, **settings: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin
        assert stdout
        stdin.write(json.dumps({"call": call, "args": args, **settings}) + "\n")
        stdin.flush()
        answer = stdout.readline()
        assert answer, self.errors.read_text()
        return json.loads(answer)

    def close(self) -> None:
        self._process.communicate(timeout=30)


@pytest.fixture(scope="module")
def shared_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelHub]:
    with ModelHub(tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture(scope="module")
def child(shared_hub: ModelHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    process = Child(shared_hub.url, tmp_path_factory.mktemp("child"))
    yield process
    process.close()
    assert not process.errors.read_text()  # no bars and no log where there is no terminal


@pytest.fixture
def hub(shared_hub: ModelHub) -> ModelHub:
    """The hub as it was on its first day."""
    shared_hub.clear()
    return shared_hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as an export leaves it, and what is none of its business beside."""
    folder = tmp_path / "my model"
    (folder / "runs").mkdir(parents=True)
    for name in (".env", ".model.safetensors.1234.tmp", "runs/log.txt"):
        (folder / name).write_text("private")
    texts = {"config.json": "{}", "tokenizer.json": '{"a": "é"}', "README.md": "---\nlibrary_name: x\n---\n# A model\n"}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(300_000))
    write_receipt(
        folder / RECEIPT, [folder / name for name in (*texts, "model.safetensors")], target="hf", dtype="f32",
        compared=NotCompared("no engine"),
    )  # fmt: skip
    return folder


FILES = {"config.json", "tokenizer.json", "README.md", "model.safetensors", RECEIPT}


@pytest.mark.parametrize("xet", [pytest.param(True, marks=SKIP_XET), False], ids=["xet", "lfs"])
def test_what_was_pushed_is_fetched_back_to_the_byte(
    xet: bool, hub: ModelHub, child: Child, folder: Path, tmp_path: Path
) -> None:
    pushed = child.push(folder, "someone/model", xet=xet)
    assert pushed.result == f"{hub.url}/someone/model/commit/{hub.commit('someone/model')}"
    assert pushed.said == ["uploading 5 files (0.3 MB) to someone/model, private"]
    assert len(hub.messages["someone/model"]) == 1
    assert any("xet-write-token" in request for request in hub.requests) == xet

    copy = child.fetch("someone/model", tmp_path / "cache")
    assert {path.name for path in copy.iterdir()} == FILES | {".gitattributes"}
    for name in FILES:
        assert (copy / name).read_bytes() == (folder / name).read_bytes(), name
    assert str(child.fetch("someone/model", tmp_path / "other", token="")) == "RepositoryNotFoundError"  # private


def test_a_second_push_is_a_new_commit_that_deletes_nothing(
    hub: ModelHub, child: Child, folder: Path, tmp_path: Path
) -> None:
    child.push(folder, "someone/model", private=False)
    first = hub.commit("someone/model")
    hub.repositories["someone/model"] = {**hub.repositories["someone/model"], "old.safetensors": b"1", "LICENSE": b"2"}
    (folder / "config.json").write_text('{"new": 1}')
    (folder / RECEIPT).unlink()
    said = "\n".join(child.push(folder, "someone/model").said)
    assert "is public already" in said
    files = hub.repositories["someone/model"]
    assert {"old.safetensors", "LICENSE", RECEIPT} <= set(files)
    assert files["config.json"] == b'{"new": 1}'
    assert len(hub.messages["someone/model"]) == 2
    assert (child.fetch("someone/model", tmp_path, revision=first) / "config.json").read_text() == "{}"


def test_a_push_of_the_same_files_commits_nothing(hub: ModelHub, child: Child, folder: Path) -> None:
    first, again = child.push(folder, "model"), child.push(folder, "model")
    assert again.result == first.result
    assert "nothing to commit" in again.said[-1]
    assert len(hub.messages["someone/model"]) == 1


@pytest.mark.parametrize(
    ("action", "status", "kind", "words"),
    [
        ("create", 401, "UserError", ["hf auth login", "because so"]),
        ("create", 403, "UserError", ["no right to write", "because so"]),
        ("create", 404, "UserError", ["no such user"]),
        ("create", 500, "RunError", ["out of order", "500", "hf upload someone/model"]),
        ("preupload", 429, "RunError", ["busy", "429"]),
        ("batch", 403, "UserError", ["no right to write"]),
        ("upload", 413, "RunError", ["no room", "413"]),
        ("commit", 400, "UserError", ["refuses the files", "because so"]),
        ("commit", 503, "RunError", ["out of order", "503"]),
    ],
)
def test_a_refusal_is_one_line_and_leaves_no_half_model(
    action: str, status: int, kind: str, words: list[str], hub: ModelHub, child: Child, folder: Path
) -> None:
    hub.refusals[action] = (status, "because so")
    told = child.push(folder, "someone/model").result
    assert told.startswith(f"{kind}: --push someone/model: ")
    assert "\n" not in told
    assert all(word in told for word in words), told
    assert set(hub.repositories.get("someone/model", {})) <= {".gitattributes"}


@SKIP_XET
def test_xet_refusals_are_told_by_their_status(hub: ModelHub, child: Child, folder: Path) -> None:
    hub.refusals["xet-write-token"] = (403, "")
    assert "you have no right to write" in child.push(folder, "someone/model", xet=True).result


def test_a_full_account_is_no_question_of_rights(hub: ModelHub, child: Child, folder: Path) -> None:
    hub.refusals["create"] = (403, "Private repository storage limit reached")
    told = child.push(folder, "someone/model").result
    assert told.startswith("RunError")
    assert "no room" in told
    assert "storage limit reached" in told
    assert f"`hf upload someone/model '{folder}' --private`" in told


def test_tokens_decide_who_may_push(hub: ModelHub, child: Child, folder: Path) -> None:
    assert "does not accept your token" in child.push(folder, "someone/model", token="hf_wrong").result
    assert "no right to write" in child.push(folder, "someone/model", token=READER).result
    assert "no right to write" in child.push(folder, "stranger/model").result
    hub.requests.clear()
    told = child.push(folder, "someone/model", token="").result
    assert "not logged in" in told
    assert "hf auth login" in told
    assert not hub.requests


def test_a_connection_that_breaks_names_the_command_to_try_again(hub: ModelHub, child: Child, folder: Path) -> None:
    hub.down = 100
    told = child.push(folder, "someone/model", private=False).result
    assert told.startswith("RunError: --push someone/model: the hub cannot be reached")
    assert f"intact, try again with `hf upload someone/model '{folder}'`" in told


@pytest.mark.slow
def test_without_a_hub_nothing_hangs(folder: Path, tmp_path: Path) -> None:
    alone = Child("http://127.0.0.1:9", tmp_path)
    assert "the hub cannot be reached" in alone.push(folder, "someone/model").result
    alone.close()


def test_offline_mode_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):  # as it is for all tests
        push_folder(folder, "someone/model", log=print)


def test_a_broken_model_card_is_told_before_anything_is_uploaded(hub: ModelHub, child: Child, folder: Path) -> None:
    (folder / "README.md").write_text("---\ntags: [a\n---\n")
    told = child.push(folder, "someone/model").result
    assert told.startswith("UserError")
    assert "README.md" in told
    assert "\n" not in told
    assert not hub.objects


@pytest.mark.parametrize("name", ["", "a/b/c", "../model", "a/..", "my model", "a/b?", "https://huggingface.co/a/b"])
def test_other_names_are_refused(name: str, folder: Path) -> None:
    with pytest.raises(UserError, match="owner/name"):
        push_folder(folder, name, log=print)


@pytest.mark.parametrize("name", ["-model", "someone/-model", "a--b"])
def test_names_that_only_the_library_refuses_take_one_line_as_well(
    name: str, hub: ModelHub, child: Child, folder: Path
) -> None:
    told = child.push(folder, name).result
    assert told.startswith("UserError: --push ")
    assert "owner/name" in told
    assert "\n" not in told
