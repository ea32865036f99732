from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streams import documents_of

from nanokimi.data import documents, formats, local
from nanokimi.data.documents import START, Piece
from nanokimi.data.finding import Search
from nanokimi.data.formats import Format, Span
from nanokimi.data.local import LocalDocuments, find_files
from nanokimi.errors import UserError

SEPARATOR = "<|endoftext|>\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    return folder


def write(folder: Path, **texts: str) -> None:
    """Files called ``name.txt``, for names such as ``below__name`` in folders."""
    for name, text in texts.items():
        path = folder / (name.replace("__", "/") + ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


def names(path: str | Path, below: Path) -> list[str]:
    return [os.path.relpath(file, below) for file in find_files(str(path), "--data_path", Search())]


def parts_of(path: str | Path) -> tuple[LocalDocuments, list[list[Piece]]]:
    found = LocalDocuments(path, split_up=True)
    return found, [list(found.read(part)) for part in range(found.n_parts)]


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def spans_of(found: LocalDocuments) -> list[tuple[int, Span]]:
    return [(part, span) for part, spans in enumerate(found._parts) for span in spans]


# ---- which files a path means --------------------------------------------------------------------------------


def test_a_folder_means_all_text_below_it_in_the_order_of_names(folder: Path) -> None:
    write(folder, b="b", a="a", c__d__e="e", c__a="a")
    for name in ("a.jsonl", "B.TXT", "c/x.ndjson", "z.parquet", "q.txt.gz", "r.jsonl.zst"):
        (folder / name).write_text("x")
    for name in ("README.md", "model.bin", "a.gz", "a.txt.bak", "noname", "tokenizer.json", ".a.txt.ab12.tmp"):
        (folder / name).write_text("x")
    (folder / "folder.txt").mkdir()
    os.mkfifo(folder / "pipe.txt")
    expected = ["B.TXT", "a.jsonl", "a.txt", "b.txt", "c/a.txt", "c/d/e.txt", "c/x.ndjson", "q.txt.gz", "r.jsonl.zst"]
    assert names(folder, folder) == [*expected, "z.parquet"]


def test_a_folder_leaves_out_the_token_caches_of_its_files(folder: Path) -> None:
    write(folder, a="a")
    cache = folder / "a.txt.nanokimi" / "0123"
    cache.mkdir(parents=True)
    (cache / "manifest.json").write_text("{}")
    (cache.parent / "0123-280.tokenizer.json").write_text("{}")
    assert names(folder, folder) == ["a.txt"]
    shutil.copytree(folder, folder.parent / "other.nanokimi")  # named by the user: this one is meant
    assert names(folder.parent / "other.nanokimi", folder.parent) == ["other.nanokimi/a.txt"]


def test_a_pattern_and_a_list_mean_their_files_each_once(folder: Path) -> None:
    write(folder, b1="1", b2="2", a="a", c__b3="3", c__d__b4="4")
    assert names(folder / "b*.txt", folder) == ["b1.txt", "b2.txt"]
    assert names(folder / "**" / "b*.txt", folder) == ["b1.txt", "b2.txt", "c/b3.txt", "c/d/b4.txt"]
    assert names(f"{folder}/b2.txt, {folder}/a.txt", folder) == ["b2.txt", "a.txt"]
    assert names(f"{folder}/b2.txt,{folder}/b*.txt,{folder}", folder)[:3] == ["b2.txt", "b1.txt", "a.txt"]
    assert len(names(f"{folder}/b2.txt,{folder}/b*.txt,{folder}", folder)) == 5


def test_names_with_commas_and_brackets_mean_themselves(folder: Path) -> None:
    write(folder, **{"a,b": "x", "c[1]": "y"})
    assert names(folder / "a,b.txt", folder) == ["a,b.txt"]
    assert names(folder / "c[1].txt", folder) == ["c[1].txt"]


def test_empty_files_among_others_are_left_out(folder: Path) -> None:
    write(folder, a="", b="x")
    assert names(folder, folder) == ["b.txt"]


@pytest.mark.fault(4)
@pytest.mark.parametrize("path", ["{}/gone.txt", "{}/gone*.txt", "{}/gone/", "{}/a.txt,{}/gone.txt", "{}/dangling.txt"])
def test_a_missing_file_is_named(folder: Path, path: str) -> None:
    write(folder, a="a")
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    missing = path.split(",")[-1].replace("{}", str(folder))
    with pytest.raises(UserError) as raised:
        find_files(path.replace("{}", str(folder)), "--val_path", Search())
    assert str(raised.value).startswith(f"--val_path {missing}: no such file: ")


@pytest.mark.fault(5)
def test_a_folder_without_text_says_what_it_needs(folder: Path) -> None:
    (folder / "notes.md").write_text("x")
    with pytest.raises(
        UserError, match=rf"--data_path {folder} is a directory without text: it needs .txt, .*\.parquet"
    ):
        LocalDocuments(folder)


@pytest.mark.fault(1)
@pytest.mark.parametrize("path", ["a.txt", "", "*.txt"])
def test_empty_files_are_an_error(folder: Path, path: str) -> None:
    write(folder, a="")
    with pytest.raises(UserError, match=r"--data_path .*: the file is empty"):
        LocalDocuments(folder / path)


def test_what_cannot_be_read_twice_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe.txt")
    for path in ("/dev/null", "/dev/zero", folder / "pipe.txt"):
        with pytest.raises(UserError, match=f"--data_path {path}: not a regular file: .*save the text to disk"):
            LocalDocuments(path)


def test_an_unreadable_file_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, a="line\n" * 100)
    monkeypatch.setattr(local, "PART_BYTES", 100)

    def refuse(path: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read: Permission denied"):
        list(LocalDocuments(folder).read(0))
    with pytest.raises(UserError, match=r"a\.txt: cannot be read: Permission denied"):
        assert LocalDocuments(folder, split_up=True).n_parts


# ---- reading -------------------------------------------------------------------------------------------------


def test_files_are_read_one_after_the_other_and_from_any_piece_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 30)
    write(folder, a="one\n" * 20, b="two\n" + SEPARATOR + "x" * 70, c="three")
    (folder / "d.jsonl").write_text(json.dumps({"text": "four " * 20}) + "\n")
    pq.write_table(pa.table({"text": ["five " * 20, "six"]}), folder / "e.parquet")
    found = LocalDocuments(folder)
    pieces = list(found.read(0))
    assert documents_of(pieces) == ["one\n" * 20, "two\n", "x" * 70, "three", "four " * 20, "five " * 20, "six"]
    assert [piece.cursor for piece in pieces] == sorted({piece.cursor for piece in pieces})
    for i, piece in enumerate(pieces):
        assert list(found.read(0, piece.cursor)) == pieces[i:]
    assert found.n_parts == 1


def test_all_bytes_on_the_disk_are_counted_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PART_BYTES", 100)
    write(folder, a="some words\n" * 100, b="x")
    (folder / "c.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(500).hex().encode()))
    for split_up in (False, True):
        found, counted = LocalDocuments(folder, split_up=split_up), list[int]()
        for part in range(found.n_parts):
            list(found.read(part, START, counted.append))
        assert sum(counted) == found.n_bytes == sum(file.stat().st_size for file in folder.iterdir())


CHANGES: dict[str, Callable[[Path], object]] = {
    "appended": lambda path: path.write_text(path.read_text() + "more"),
    "same size": lambda path: (path.write_text("L" + path.read_text()[1:]), os.utime(path, ns=(1, 1))),
    "not UTF-8 any more": lambda path: path.write_bytes(b"line\n" * 100 + b"\xff\n"),
    "truncated": lambda path: os.truncate(path, 10),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.fault(12)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("taken", [0, 2])
def test_a_file_that_is_changed_before_or_while_it_is_read_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], taken: int
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 30)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 10)
    write(folder, a="line\n" * 100)
    pieces = LocalDocuments(folder).read(0)
    for _ in range(taken):
        next(pieces)
    change(folder / "a.txt")
    with pytest.raises(UserError, match=r"a\.txt: .*was changed while it was read: start again"):
        list(pieces)


def test_the_identity_follows_files_and_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, a="one\n", b="two\n")

    def identity(form: Format | None = None, *, split_up: bool = False) -> str:
        return json.dumps(LocalDocuments(folder, form=form, split_up=split_up).identity)

    first = identity()
    assert identity() == first
    others = {identity(Format(text_column="x")), identity(Format(errors="replace")), identity(split_up=True)}
    monkeypatch.setattr(local, "PART_BYTES", 7)
    others.add(identity(split_up=True))
    assert identity() == first  # in one part the size of parts does not matter
    write(folder, c="three")
    others.add(identity())
    os.remove(folder / "c.txt")
    assert identity() == first
    os.utime(folder / "a.txt", ns=(1, 1))
    others.add(identity())
    assert len(others - {first}) == 6


def test_a_pickled_source_is_small_and_reads_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PART_BYTES", 1 << 16)
    monkeypatch.setattr(local, "SEARCHED_BYTES", 1 << 10)
    write(folder, a="some words\n" * 50_000)
    found, parts = parts_of(folder)
    data = pickle.dumps(found)
    assert found.n_parts == 9
    assert len(data) < 4000
    assert [list(pickle.loads(data).read(part)) for part in range(found.n_parts)] == parts


# ---- parts ---------------------------------------------------------------------------------------------------


def draw_text(draw: random.Random, size: int) -> str:
    """Lines of all lengths, blank ones, CRLF, separators; perhaps no line end at the end."""
    text = ""
    while len(text) < size:
        line = draw.choice(["a", "é", "漢字 ", "words "]) * draw.choice([0, 1, 3, 10, 40])
        text += line + draw.choice(["\n", "\n", "\n", "\r\n", "\n" + SEPARATOR, "\n<|endoftext|>\r\n"])
    return text + draw.choice(["", "end", SEPARATOR.strip()])


@pytest.mark.parametrize("seed", range(60))
def test_the_parts_of_random_texts_make_up_the_whole(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(local, "PART_BYTES", draw.choice([20, 50, 200, 700]))
    monkeypatch.setattr(local, "SEARCHED_BYTES", draw.choice([10, 60, 300]))
    for name in "abc"[: draw.choice([1, 3])]:
        write(folder, **{name: draw_text(draw, draw.choice([30, 200, 2000]))})
    found, parts = parts_of(folder)
    whole = list(LocalDocuments(folder).read(0))
    assert "".join(map(text_of, parts)) == text_of(whole)
    assert all(part[-1].ends_document for part in parts if part)
    for _, span in spans_of(found):
        assert span.start == 0 or span.path.read_bytes()[: span.start].endswith(b"\n")
        assert span.end is None or span.start < span.end < span.path.stat().st_size
    for number, pieces in enumerate(parts):
        for i, piece in enumerate(pieces):
            assert list(found.read(number, piece.cursor)) == pieces[i:]


@pytest.mark.parametrize("seed", range(20))
def test_documents_stay_whole_where_one_ends_near_enough(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(local, "PART_BYTES", 200)
    monkeypatch.setattr(local, "SEARCHED_BYTES", 120)
    texts = ["".join(f"{draw.random()}\n" for _ in range(draw.randrange(1, 5))) for _ in range(100)]
    end = draw.choice(["", SEPARATOR])
    write(folder, a=SEPARATOR.join(texts) + end)
    found, parts = parts_of(folder)
    assert [document for part in parts for document in documents_of(part)] == texts
    assert found.n_parts > 15
    assert max(len(text_of(part).encode()) for part in parts) < 200 + 120


def test_a_long_document_is_cut_between_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PART_BYTES", 100)
    monkeypatch.setattr(local, "SEARCHED_BYTES", 50)
    lines = [f"line {i}\n" for i in range(200)]
    write(folder, a="".join(lines))
    _, parts = parts_of(folder)
    assert len(parts) > 10
    assert [line for part in parts for line in text_of(part).splitlines(keepends=True)] == lines


@pytest.mark.fault(11)
def test_a_line_longer_than_a_part_is_never_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PART_BYTES", 100)
    monkeypatch.setattr(local, "SEARCHED_BYTES", 50)
    write(folder, a="x" * 1234 + "\n" + "y" * 567 + "\n" + "z\n" * 100)
    _, parts = parts_of(folder)
    assert [line for part in parts for line in text_of(part).split()] == ["x" * 1234, "y" * 567, *"z" * 100]
    write(folder, a="x" * 1234)
    assert len(parts_of(folder)[1]) == 1


def test_json_lines_are_cut_between_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PART_BYTES", 100)
    monkeypatch.setattr(local, "SEARCHED_BYTES", 60)
    texts = [f"row {i} " * (i % 7) for i in range(100)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"n": "x", "text": text}) + "\n" for text in texts))
    found, parts = parts_of(folder)
    assert found.n_parts > 10
    assert [document for part in parts for document in documents_of(part)] == texts


def test_small_files_are_read_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PART_BYTES", 100)
    write(folder, **{f"f{i:02}": f"file {i:02}\n" for i in range(40)})
    found, parts = parts_of(folder)
    assert found.n_parts == 4  # of up to twelve files of eight bytes
    assert "".join(map(text_of, parts)) == "".join(f"file {i:02}\n" for i in range(40))
    for number, pieces in enumerate(parts):
        for i, piece in enumerate(pieces):
            assert list(found.read(number, piece.cursor)) == pieces[i:]


def test_compressed_and_parquet_files_are_never_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PART_BYTES", 100)
    text = random.Random(0).randbytes(600).hex() + "\n"
    (folder / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    table = io.BytesIO()
    pq.write_table(pa.table({"text": [text, "b"]}), table)
    (folder / "b.parquet").write_bytes(table.getvalue())
    write(folder, c="c\n", d="d\n" * 100)
    found, parts = parts_of(folder)
    sizes = [(span.path.name, span.start) for _, span in spans_of(found)]
    assert sizes[:3] == [("a.txt.gz", 0), ("b.parquet", 0), ("c.txt", 0)]
    assert [text_of(part) for part in parts[:2]] == [text, text + "b"]
    assert "".join(map(text_of, parts)) == text + text + "b" + "c\n" + "d\n" * 100
    assert len(parts) == 4


def test_parts_depend_on_nothing_but_the_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PART_BYTES", 100)
    monkeypatch.setattr(local, "SEARCHED_BYTES", 60)
    draw = random.Random(0)
    write(folder, **{name: draw_text(draw, 500) for name in "ba"})
    parts = parts_of(folder)[1]
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.setattr(os, "cpu_count", lambda: 77)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 7)
    monkeypatch.chdir(tmp_path)
    assert parts_of("copy")[1] == parts
    assert len(parts) > 5
