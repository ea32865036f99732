"""Hub data sets through the real ``datasets`` library, from a hub-compatible server on loopback."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hub import FOREVER, LoopbackHub, fineweb, hub_environment, jsonl_file, parquet_file, readme, run_with_hub

from nanokimi.data import hub as hub_module
from nanokimi.data.documents import PIECE_BYTES, Cursor
from nanokimi.data.hub import HubDocuments
from nanokimi.errors import RunError, UserError

# Importing datasets takes seconds: one child does so once, and then runs what it is told, a line at a time.
CHILD = """
import functools, json, multiprocessing, pickle, sys, time
import huggingface_hub.hf_file_system as file_system
from torch.utils.data import DataLoader, IterableDataset
from nanokimi import console
from nanokimi.data import hub
from nanokimi.data.documents import Cursor, START
from nanokimi.errors import RunError, UserError

patient = file_system.http_backoff
impatient = functools.partial(patient, max_retries=0)
said, kept = [], None

def opened(repo, **options):
    return hub.HubDocuments(repo, **{"log": said.append} | options)

def refusal(repo, **options):
    try:
        opened(repo, **options)
    except UserError as error:
        return str(error)

def pieces(documents, part, start=START):
    return [(piece.text, piece.ends_document, tuple(piece.cursor)) for piece in documents.read(part, start)]

def parts(documents):
    return [pieces(documents, part) for part in range(documents.n_parts)]

class Dealt(IterableDataset):
    def __init__(self, documents):
        self.documents = documents
    def __iter__(self):
        import torch
        worker = torch.utils.data.get_worker_info()
        for part in range(worker.id, self.documents.n_parts, worker.num_workers):
            yield from pieces(self.documents, part)

if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        said.clear()
        hub.FIRST_WAIT_SECONDS, hub.RETRIES = 0.01, 6
        file_system.http_backoff = impatient
        space = globals() | asked["values"]
        try:
            exec(asked["code"], space)
            answer, kept = {"result": space["result"]}, space.get("kept")
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
"""


class Child:
    """A process for which a loopback server is the hub."""

    def __init__(self, url: str, folder: Path) -> None:
        script, self._errors = folder / "child.py", folder / "stderr.txt"
        script.write_text(CHILD)
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            stderr=self._errors.open("w"),
            env=hub_environment(url, folder / "home"),
        )

    def ask(self, code: str, **values: Any) -> Any:
        """What ``result`` is after ``code``; ``kept`` is there the next time as well."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin
        assert stdout
        stdin.write(json.dumps({"code": code, "values": values}) + "\n")
        stdin.flush()
        answer = json.loads(stdout.readline() or json.dumps({"error": self.stderr()}))
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def stderr(self) -> str:
        return self._errors.read_text()

    def close(self) -> None:
        self._process.communicate(timeout=30)


def noise(number: int, size: int) -> str:
    """Text that compression makes no smaller than half."""
    return random.Random(number).randbytes(size // 2).hex()


TEXTS = [f"document {number} {noise(number, 3000)}" for number in range(100)]
LONG = "".join(f"line {number} ☃\n" for number in range(PIECE_BYTES // 6))
ODD = ["first", "", None, LONG, None, "a\r\nb", LONG[:-1], "last"]
BIG = [noise(number, 3000) for number in range(2400)]


def repositories() -> dict[str, dict[str, bytes]]:
    rows = [{"n": number, "text": text} for number, text in enumerate(TEXTS)]
    numbers = list(range(len(BIG)))
    other = [noise(-number, 12000) for number in numbers]
    big = {
        "train.parquet": parquet_file({"other": other, "text": BIG, "n": numbers}, group_rows=300),
        "README.md": readme({"default": {"train": "train.parquet"}}),
    }
    return {
        **dict.fromkeys(("org/big", "org/head", "org/tail"), big),
        "HuggingFaceFW/fineweb": fineweb(TEXTS),
        "org/lines": {"a.jsonl": jsonl_file(rows[:60]), "b.jsonl": jsonl_file(rows[60:])},
        "org/odd": {"data/train-0.parquet": parquet_file({"text": ODD, "n": numbers[: len(ODD)]}, group_rows=3)},
        "org/odd-lines": {"train.jsonl": jsonl_file({"n": 1, "text": text} for text in ODD)},
        "org/many": {
            "README.md": readme({f"lang-{number:02d}": f"{number:02d}.parquet" for number in range(30)}),
            **{f"{number:02d}.parquet": parquet_file({"body": [f"of {number}"], "n": [1]}) for number in range(30)},
        },
        "org/splits": {
            "README.md": readme({"only": {"train": "a.parquet", "test": "b.parquet"}}),
            "a.parquet": parquet_file({"title": ["t"], "body": ["of a"], "n": [1]}),
            "b.parquet": parquet_file({"title": ["t"], "body": ["of b"], "n": [1]}),
        },
        "org/script": {"script.py": b"open('executed', 'w')", "README.md": b"# made by a script"},
        "org/nothing": {"README.md": b"# nothing here", "picture.bin": b"\0"},
        "org/gated": {"train.jsonl": jsonl_file(rows[:2])},
        "org/broken": {"a.jsonl": jsonl_file(rows[:5]), "b.jsonl": b'{"text": "good"}\n{"text": 17, [}\n'},
    }


@pytest.fixture(scope="module")
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub(repositories(), gated=["org/gated"]) as server:
        yield server


@pytest.fixture(scope="module")
def child(server: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    child = Child(server.url, tmp_path_factory.mktemp("child"))
    yield child
    child.close()


@pytest.fixture(autouse=True)
def calm(server: LoopbackHub) -> None:
    server.calm()


def texts(parts: Sequence[Sequence[Sequence[Any]]]) -> list[str]:
    return [piece[0] for part in parts for piece in part]


FINEWEB = {"repo": hub_module.FINEWEB, "config": hub_module.FINEWEB_CONFIG}
LINES = {"repo": "org/lines"}


@pytest.mark.parametrize(("source", "n_parts"), [(FINEWEB, 3), (LINES, 2)])
def test_every_row_is_read_once_over_all_parts(child: Child, source: dict[str, str], n_parts: int) -> None:
    parts = child.ask("result = parts(opened(**source))", source=source)
    assert len(parts) == n_parts
    assert texts(parts) == TEXTS
    assert [piece[2] for piece in parts[1]] == [[0, row, 0] for row in range(len(parts[1]))]


def test_what_it_is_known_by_names_the_commit(child: Child, server: LoopbackHub) -> None:
    code = "d = opened(**source, limit=7); result = [d.name, d.identity, d.n_bytes]"
    name, identity, n_bytes = child.ask(code, source=FINEWEB)
    assert name == "HuggingFaceFW/fineweb (config sample-10BT, split train)"
    commit = server.commit("HuggingFaceFW/fineweb")
    assert identity == ["HuggingFaceFW/fineweb", commit, "sample-10BT", "train", "text", 7]
    assert n_bytes is None


@pytest.mark.parametrize("limit", [0, 41])
@pytest.mark.parametrize("source", [FINEWEB, LINES, {"repo": "org/odd"}, {"repo": "org/odd-lines"}])
def test_from_any_piece_on_the_rest_is_the_same(child: Child, source: dict[str, str], limit: int) -> None:
    code = """
documents = opened(**source, limit=limit)
result = []
for part, whole in enumerate(parts(documents)):
    for number in sorted({*range(0, len(whole), 9), *range(min(6, len(whole))), len(whole) - 1}):
        if pieces(documents, part, Cursor(*whole[number][2])) != whole[number:]:
            result.append([part, number])
    after = Cursor(0, whole[-1][2][1] + 1, 0)
    result += pieces(documents, part, after)
"""
    assert child.ask(code, source=source, limit=limit) == []


@pytest.mark.parametrize("repo", ["org/odd", "org/odd-lines"])
def test_rows_without_text_are_empty_documents_and_long_ones_come_in_pieces(child: Child, repo: str) -> None:
    [part] = child.ask("result = parts(opened(repo))", repo=repo)
    assert [number for _, _, (_, number, piece) in part if piece == 0] == list(range(len(ODD)))
    assert max(len(text.encode()) for text, _, _ in part) <= PIECE_BYTES
    documents = "".join(text + ("\0" if ends else "") for text, ends, _ in part).split("\0")[:-1]
    assert documents == [(text or "").replace("\r\n", "\n") for text in ODD]
    assert part[1] == ["", True, [0, 1, 0]]
    assert part[2] == ["", True, [0, 2, 0]]


def test_the_bytes_of_every_row_are_told(child: Child) -> None:
    code = """
told = []
pieces_read = sum(1 for _ in opened("org/odd").read(0, START, told.append))
result = [told, pieces_read]
"""
    told, n_pieces = child.ask(code)
    assert told == [len((text or "").encode()) for text in ODD]
    assert n_pieces > len(ODD)


@pytest.mark.parametrize("source", [FINEWEB, LINES])
@pytest.mark.parametrize(("limit", "rows"), [(1, 1), (77, 77), (100, 100), (1000, 100)])
def test_a_limit_takes_exactly_the_first_rows_as_one_part(
    child: Child, source: dict[str, str], limit: int, rows: int
) -> None:
    parts = child.ask("result = parts(opened(**source, limit=limit))", source=source, limit=limit)
    assert len(parts) == 1
    assert texts(parts) == TEXTS[:rows]


def test_only_the_text_column_is_downloaded(child: Child, server: LoopbackHub) -> None:
    [size] = [len(data) for path, data in server.repositories["org/big"].items() if path.endswith("parquet")]
    text_bytes = sum(map(len, BIG)) // 2
    assert size > 4 * text_bytes
    assert child.ask('result = len(pieces(opened("org/big"), 0))') == len(BIG)
    assert server.bytes_served["org/big/train.parquet"] < 1.5 * text_bytes


@pytest.mark.parametrize(("repo", "limit", "start"), [("org/head", 20, 0), ("org/tail", 0, len(BIG) - 300)])
def test_only_the_row_groups_that_are_read_are_downloaded(
    child: Child, server: LoopbackHub, repo: str, limit: int, start: int
) -> None:
    code = "result = [p[0] for p in pieces(opened(repo, limit=limit), 0, Cursor(0, start, 0))]"
    assert child.ask(code, repo=repo, limit=limit, start=start) == BIG[start : start + (limit or 300)]
    group_bytes = sum(map(len, BIG[:300])) // 2
    assert server.bytes_served[f"{repo}/train.parquet"] < group_bytes + 500_000


def test_the_configuration_is_the_one_named_the_only_one_or_the_default(child: Child) -> None:
    code = """
result = [opened(hub.FINEWEB).config, opened("org/splits", text_column="body").config, opened("org/lines").config,
          opened("org/many", config="lang-07").config, texts_of("org/many", config="lang-07")]
"""
    helper = "texts_of = lambda repo, **o: [p[0] for part in parts(opened(repo, **o)) for p in part]\n"
    assert child.ask(helper + code) == ["default", "only", "default", "lang-07", ["of 7"]]


@pytest.mark.fault(29)
def test_configurations_are_listed_where_one_has_to_be_named(child: Child) -> None:
    nameless, unknown = child.ask('result = [refusal("org/many"), refusal("org/many", config="lang-99")]')
    for message in (nameless, unknown):
        assert "--hf_config" in message
        assert "lang-00, lang-01" in message
        assert "and 10 more" in message
        assert "\n" not in message
    assert "lang-99" in unknown


def test_an_unknown_split_lists_the_splits(child: Child) -> None:
    message, found = child.ask("""
d = opened("org/splits", split="test", text_column="body")
result = [refusal("org/splits", split="validation"), pieces(d, 0)[0][0]]
""")
    assert "--hf_split validation" in message
    assert "train, test" in message
    assert found == "of b"


def test_the_text_column_is_the_one_named_or_called_text_or_the_only_one_of_strings(child: Child) -> None:
    code = """
result = [opened("org/many", config="lang-00").text_column, opened(hub.FINEWEB).text_column,
          opened("org/splits", text_column="title").text_column]
"""
    assert child.ask(code) == ["body", "text", "title"]


@pytest.mark.fault(28)
def test_columns_are_listed_where_one_has_to_be_named(child: Child) -> None:
    code = 'result = [refusal("org/splits"), refusal("org/splits", text_column="content")]'
    for message in child.ask(code):
        assert "--text_column" in message
        assert "title (string), body (string), n (int64)" in message
        assert "\n" not in message
    number = child.ask('result = refusal("org/splits", text_column="n")')
    assert "--text_column n" in number
    assert "title, body" in number


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("no/such", "no such data set, or it is private: check the name or run `hf auth login`"),
        ("json", "no such data set"),
        ("org/gated", "gated: accept its terms on the hub and run `hf auth login`"),
        ("org/script", "a script of its own, which is not executed"),
        ("org/nothing", "holds no files that can be read"),
    ],
)
def test_what_cannot_be_opened_is_one_line_with_the_remedy(child: Child, repo: str, message: str) -> None:
    said = child.ask("result = refusal(repo)", repo=repo)
    assert said.startswith(f"--hf_repo_name {repo}: ")
    assert message in said
    assert "\n" not in said


def test_an_unknown_revision_is_named(child: Child) -> None:
    assert "check --hf_revision" in child.ask('result = refusal("org/lines", revision="v9")')


def test_a_script_is_not_executed_and_a_folder_of_the_same_name_is_not_read(child: Child) -> None:
    code = """
import os
os.makedirs("org/lines"); open("org/lines/other.jsonl", "w").write('{"text": "local"}')
refusal("org/script")
result = [os.path.exists("executed"), len(parts(opened("org/lines")))]
"""
    assert child.ask(code) == [False, 2]


@pytest.mark.parametrize("name", ["", "../etc", "a/b/c", "a..b/c", "https://huggingface.co/x", "-x;y", "a/b\n"])
def test_bad_names_are_refused_before_anything_is_asked(name: str) -> None:
    with pytest.raises(UserError, match="--hf_repo_name") as caught:
        HubDocuments(name)
    assert "HuggingFaceFW/fineweb" in str(caught.value)


@pytest.mark.fault(26)
@pytest.mark.parametrize("source", [FINEWEB, LINES])
@pytest.mark.parametrize(
    ("after", "cut_after", "limit"), [(0, 1, 0), (20_000, 700, 0), (90_000, 5000, 0), (90_000, 1, 90)]
)
def test_a_cut_connection_goes_on_at_the_same_row(
    child: Child, server: LoopbackHub, source: dict[str, str], after: int, cut_after: int, limit: int
) -> None:
    child.ask("kept = opened(**source, limit=limit); result = 0", source=source, limit=limit)
    served = server.bytes_served.total()
    server.faults_after_bytes, server.cut_after_bytes, server.cut_times = served + after, cut_after, 5
    result, said = child.ask("result = [parts(kept), said]")
    assert server.cut_times == 0
    assert texts(result) == TEXTS[: limit or None]
    assert len(said) == 5
    assert all("connection broke at row" in line and "\n" not in line for line in said)


@pytest.mark.fault(26)
def test_a_cut_in_the_middle_of_json_lines_goes_on_at_the_same_row(child: Child, server: LoopbackHub) -> None:
    rows = [f"{number} " + "long " * 600 for number in range(6000)]  # more than the 15 MiB that are fetched at first
    server.repositories["org/long"] = {"train.jsonl": jsonl_file({"text": text} for text in rows)}
    child.ask('kept = opened("org/long"); result = 0')
    served = server.bytes_served.total()
    server.faults_after_bytes, server.cut_after_bytes, server.cut_times = served + 1, 500_000, 2
    numbers, said = child.ask("result = [[int(p[0].split()[0]) for p in pieces(kept, 0)], said]")
    assert numbers == list(range(len(rows)))
    assert server.cut_times == 0
    broken = [int(line.split("at row ")[1].split()[0]) for line in said]
    assert broken[0] > 0


def test_a_cut_in_the_last_row_groups_repeats_and_loses_nothing(child: Child, server: LoopbackHub) -> None:
    child.ask('kept = opened("org/big"); result = 0')
    # Once the text of three row groups has gone over the wire, every request fails for a while.
    server.faults_after_bytes, server.down = 3 * sum(map(len, BIG[:300])) // 2, 4
    rows, said = child.ask("result = [[p[0] for p in pieces(kept, 0)], said]")
    assert rows == BIG
    assert server.down == 0
    broken = [int(line.split("at row ")[1].split()[0]) for line in said]
    assert 0 < broken[0] < len(BIG)
    assert broken == [broken[0]] * 4
    assert [line.split("attempt ")[1] for line in said] == [
        "1 of 6 in 0.01 s",
        "2 of 6 in 0.02 s",
        "3 of 6 in 0.04 s",
        "4 of 6 in 0.08 s",
    ]


def test_short_breaks_are_healed_by_the_library_itself(child: Child, server: LoopbackHub) -> None:
    child.ask('kept = opened("org/lines"); result = 0')
    server.down = 1
    result, said = child.ask("file_system.http_backoff = patient; result = [parts(kept), said]")
    assert texts(result) == TEXTS
    assert said == []


@pytest.mark.fault(26)
def test_a_hub_that_is_gone_for_good_ends_the_run_with_the_remedy(child: Child, server: LoopbackHub) -> None:
    child.ask('kept = opened("org/lines"); result = 0')
    asked, server.down = len(server.requests), FOREVER
    message, said = child.ask("""
hub.RETRIES = 3
try:
    parts(kept)
except RunError as error:
    result = [str(error), said]
""")
    assert len(said) == 3
    assert len(server.requests) - asked == 4
    assert "--resume" in message
    assert "check the network" in message
    assert "broke 4 times" in message
    assert "\n" not in message


def test_a_file_that_has_gone_is_not_tried_again(child: Child, server: LoopbackHub) -> None:
    server.repositories["org/passing"] = {"train.jsonl": jsonl_file([{"text": "a"}])}
    child.ask('kept = opened("org/passing"); result = 0')
    del server.repositories["org/passing"]
    message, said = child.ask("""
try:
    parts(kept)
except RunError as error:
    result = [str(error), said]
""")
    assert said == []
    assert "--resume" in message


def test_damaged_data_are_told_from_a_broken_connection(child: Child) -> None:
    message, said = child.ask("""
documents = opened("org/broken")
try:
    parts(documents)
except UserError as error:
    result = [str(error), said]
""")
    assert len(said) == 1
    assert "the data cannot be read" in message
    assert "\n" not in message


def test_it_reads_in_workers_that_were_forked_or_spawned(child: Child) -> None:
    code = """
documents = opened(**source, log=console.log)
copy = pickle.loads(pickle.dumps(documents))
whole = parts(copy)
result = [sum(whole, [])]
for method in methods:
    loader = DataLoader(Dealt(documents), batch_size=None, num_workers=2, multiprocessing_context=method)
    result.append(list(loader))
"""
    for source, methods in ((FINEWEB, ["fork", "spawn"]), (LINES, ["fork"])):
        whole, *dealt = child.ask(code, source=source, methods=methods)
        assert [piece[0] for piece in whole] == TEXTS
        assert all(sorted(pieces) == sorted(whole) for pieces in dealt)


def test_nothing_of_the_libraries_clutters_stderr(child: Child) -> None:
    assert len(child.ask("result = parts(opened(hub.FINEWEB))")) == 1
    assert child.stderr() == ""


OPEN = """
import sys, time
from nanokimi.data.hub import HubDocuments
from nanokimi.errors import UserError
start = time.monotonic()
try:
    HubDocuments("org/lines")
except UserError as error:
    print(error)
print(time.monotonic() - start < 15)
"""


@pytest.mark.fault(27)
@pytest.mark.parametrize(("url", "offline"), [("http://127.0.0.1:9", "0"), ("", "1")])
def test_no_network_is_told_in_seconds(tmp_path: Path, server: LoopbackHub, url: str, offline: str) -> None:
    done = run_with_hub(url or server.url, OPEN, tmp_path=tmp_path, HF_HUB_OFFLINE=offline)
    assert done.stderr == ""
    message, in_time = done.stdout.splitlines()
    assert in_time == "True"
    assert "the Hugging Face hub cannot be reached" in message
    assert "--dataset local, localstreaming or tokenbin" in message
    assert "nanokimi prepare stdlib" in message
    assert server.requests == []


class Flaky(HubDocuments):
    """Rows whose connection breaks after so many of them, in turn."""

    def __init__(self, breaks: list[int], said: list[str]) -> None:
        self.limit, self.name, self._breaks, self._log = 0, "flaky", breaks, said.append

    def _texts(self, part: int, row: int) -> Iterator[str | None]:
        for number in range(self._breaks.pop(0) if self._breaks else 1000):
            if row + number == 50:
                return
            yield f"row {row + number}"
        raise ConnectionError("reset")


def test_waits_grow_and_start_anew_after_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    said: list[str] = []
    rows = [piece.text for piece in Flaky([10, 0, 0, 5, 0, 0, 0, 0, 0, 7], said).read(0)]
    assert rows == [f"row {number}" for number in range(50)]
    assert waits == [1, 2, 4, 1, 2, 4, 8, 16, 32, 1]
    assert len(said) == len(waits)
    monkeypatch.setattr(hub_module, "RETRIES", 9)
    waits.clear()
    documents = Flaky([3] + [0] * 20, said)
    with pytest.raises(RunError, match=r"row 3: .*--resume"):
        list(documents.read(0, Cursor(at=0)))
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
