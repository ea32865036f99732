"""The sample of a hub data set that is fetched once, with a stand-in for the data set."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanokimi.config import TrainConfig
from nanokimi.data import documents, sources
from nanokimi.data.corpus import Corpus
from nanokimi.data.documents import START, Advance, Cursor, Piece, cut_text, ignore
from nanokimi.data.hub import fetch_sample
from nanokimi.data.sources import open_corpus
from nanokimi.errors import RunError, UserError

TEXTS = ["first\n", "", "long ☃\n" * 20, "a\r\nb", 'quoted " \\ \x00 \u2028 \ud800', "long again\n" * 9, "last"]
WANTED = ["first\n", "", "long ☃\n" * 20, "a\nb", 'quoted " \\ \x00 \u2028 \ufffd', "long again\n" * 9, "last"]
KEY = ["repo", "", "train", ""]
BROKEN = RunError("the connection broke")


class Rows:
    """Documents like those of the hub, whose connection may break.

    Args:
        breaks_at: number of pieces after which it fails for good; what it raises is ``error``.

    Attributes:
        starts: from where it was read.
    """

    name, n_bytes, n_parts = "owner/name (config default, split train)", None, 1

    def __init__(
        self,
        texts: list[str] = TEXTS,
        *,
        commit: str = "1",
        breaks_at: int = 1 << 30,
        error: BaseException = BROKEN,
        before_row: Callable[[int], object] = ignore,
    ) -> None:
        self.texts, self.identity, self.breaks_at, self.error = texts, ["repo", commit], breaks_at, error
        self.starts: list[Cursor] = []
        self.before_row = before_row

    def read(self, part: int, start: Cursor = START, advance: Advance = ignore) -> Iterator[Piece]:
        self.starts.append(start)
        n_given = 0
        for row in range(start.at, len(self.texts)):
            self.before_row(row)
            pieces = list(cut_text(self.texts[row]))
            for number, piece in enumerate(pieces):
                if n_given == self.breaks_at:
                    raise self.error
                n_given += 1
                yield Piece(piece, number == len(pieces) - 1, Cursor(at=row, piece=number))
            advance(len(self.texts[row]))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(documents, "PIECE_BYTES", 40)
    return tmp_path / "nanokimi" / "hub"


def never() -> Any:
    raise AssertionError("nothing has to be fetched")


def fetch(rows: Any, limit: int = len(TEXTS)) -> Path:
    return fetch_sample(limit, KEY, lambda: rows)


def texts_in(path: Path) -> list[str]:
    records = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert all(list(record) == ["text"] for record in records)
    return [record["text"] for record in records]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def unfinished(cache: Path) -> Path:
    (path,) = cache.glob("*.part")
    return path


# ---- once and for all ---------------------------------------------------------------------------


@pytest.mark.fault(27)
def test_rows_are_fetched_once_and_need_no_network_again(cache: Path) -> None:
    """With the sample in the cache, nothing is opened."""
    rows = Rows()
    path = fetch(rows)
    assert texts_in(path) == WANTED
    assert rows.starts == [START]
    assert list(cache.iterdir()) == [path]
    assert fetch_sample(len(TEXTS), KEY, never) == path


def test_another_question_is_another_sample(cache: Path) -> None:
    paths = {fetch(Rows()), fetch(Rows(TEXTS[:3]), 3)}
    paths |= {fetch_sample(7, [*KEY[:-1], "column"], Rows), fetch_sample(7, ["other", *KEY[1:]], Rows)}  # type: ignore[arg-type]
    assert len(paths) == 4 == len(list(cache.iterdir()))


def test_all_of_a_data_set_is_no_sample() -> None:
    with pytest.raises(UserError, match=r"^--num_samples 0 takes all of the data set: add --streaming"):
        fetch_sample(0, KEY, never)


# ---- cut off and gone on ------------------------------------------------------------------------


@pytest.mark.fault(26)
@pytest.mark.parametrize("half", [b"", b'{"te', b'{"text": "half a li', b'{"text": "all but its end"}'])
@pytest.mark.parametrize("breaks_at", range(1, sum(len(list(cut_text(text))) for text in TEXTS)))
def test_an_interrupted_fetch_goes_on_after_the_last_whole_row(cache: Path, breaks_at: int, half: bytes) -> None:
    """Wherever it broke, also inside a row, and whatever a kill left of a line."""
    with pytest.raises(RunError, match="connection broke"):
        fetch(Rows(breaks_at=breaks_at))
    left = unfinished(cache)
    n_whole = left.read_bytes().count(b"\n")
    assert texts_in(left) == WANTED[:n_whole]
    with left.open("ab") as file:
        file.write(half)
    rows = Rows()
    path = fetch(rows)
    assert rows.starts == [Cursor(at=n_whole)]
    assert texts_in(path) == WANTED
    assert list(cache.iterdir()) == [path]


def test_interruptions_may_follow_one_another(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for error in (KeyboardInterrupt(), RunError("again"), OSError("once more")):
        with pytest.raises((KeyboardInterrupt, RunError)):
            fetch(Rows(breaks_at=2, error=error))
    path = fetch(Rows())
    assert texts_in(path) == WANTED
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "fetching owner/name (config default, split train)"
    assert all(line.startswith(said[0] + ", going on after 0.0 MB") for line in said[1:])
    assert len(said) == 4


def test_rows_of_another_commit_are_not_appended(cache: Path) -> None:
    with pytest.raises(RunError):
        fetch(Rows(breaks_at=3))
    rows = Rows(["other"] * 7, commit="2")
    assert texts_in(fetch(rows)) == ["other"] * 7
    assert rows.starts == [START]


def test_a_killed_fetch_is_gone_on_with(cache: Path) -> None:
    texts = [f"row {number} " + "x" * 3000 for number in range(30)]
    child = os.fork()
    if child == 0:
        fetch(Rows(texts, before_row=lambda row: row == 20 and os.kill(os.getpid(), signal.SIGKILL)), 30)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    n_whole = unfinished(cache).read_bytes().count(b"\n")
    rows = Rows(texts)
    assert texts_in(fetch(rows, 30)) == texts
    assert rows.starts == [Cursor(at=n_whole)]
    assert 10 < n_whole <= 20


def test_a_second_process_waits_for_the_first_and_fetches_nothing(cache: Path, tmp_path: Path) -> None:
    reached, go = tmp_path / "reached", tmp_path / "go"

    def wait(row: int) -> None:
        if row == 3:
            reached.touch()
            wait_for(go)

    child = os.fork()
    if child == 0:
        fetch(Rows(before_row=wait))
        os._exit(0)
    wait_for(reached)
    second, found = Rows(), list[Path]()
    thread = threading.Thread(target=lambda: found.append(fetch(second)), daemon=True)
    thread.start()
    thread.join(0.3)
    waited = thread.is_alive()
    go.touch()
    thread.join(30)
    assert waited
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert second.starts == []
    assert texts_in(found[0]) == WANTED


def test_a_second_process_takes_over_from_one_that_fails(cache: Path, tmp_path: Path) -> None:
    reached, go = tmp_path / "reached", tmp_path / "go"

    def fail(row: int) -> None:
        if row == 3:
            reached.touch()
            wait_for(go)
            os._exit(7)

    child = os.fork()
    if child == 0:
        fetch(Rows(before_row=fail))
    wait_for(reached)
    threading.Timer(0.2, go.touch).start()
    assert texts_in(fetch(Rows())) == WANTED
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.fault(15)
def test_nowhere_to_write_is_one_line(cache: Path) -> None:
    cache.parent.write_text("in the way")
    with pytest.raises(RunError, match=r"^the sample .*hub.*\.jsonl cannot be written: ") as raised:
        fetch(Rows())
    assert "\n" not in str(raised.value)


# ---- as a source --------------------------------------------------------------------------------


def fineweb(texts: list[str], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Corpus:
    monkeypatch.setattr(sources, "hub_documents", lambda config, log: Rows(texts))
    config = TrainConfig(dataset="fineweb", num_samples=len(texts), **settings)
    return open_corpus(config, "byte", log=lambda line: None)


def test_a_sample_is_split_and_tokenised_like_a_local_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"document {number}\n" * (number % 7 + 1) for number in range(150)]
    sample = fineweb(texts, monkeypatch)
    (tmp_path / "local.txt").write_text("<|endoftext|>\n".join(texts))
    local = open_corpus(TrainConfig(data_path=str(tmp_path / "local.txt")), "byte", log=lambda line: None)
    assert sample.train.identity == local.train.identity
    assert sample.summary == local.summary
    assert sample.val is not None
    assert local.val is not None
    assert sample.val.read(0, len(sample.val)).tolist() == local.val.read(0, len(local.val)).tolist()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sources, "hub_documents", lambda config, log: never())
    config = TrainConfig(dataset="fineweb", num_samples=150)
    assert open_corpus(config, "byte", log=lambda line: None).train.identity == sample.train.identity


@pytest.mark.fault("B1")
def test_a_damaged_sample_is_told_and_fetched_again_and_one_without_a_checksum_is_read(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fetch(Rows())
    good = path.read_bytes()
    path.write_bytes(good.replace(b"first", b"girst"))
    assert fetch(Rows()) == path
    assert path.read_bytes() == good
    assert f"{path.name}: damaged: it is fetched again" in capsys.readouterr().err
    of_earlier_version = path.with_name(f"{path.stem.rsplit('-', 1)[0]}.jsonl")
    path.rename(of_earlier_version)
    assert fetch_sample(len(TEXTS), KEY, never) == of_earlier_version
