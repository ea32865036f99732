from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streams import documents_of

from nanokimi.data import documents, formats, opening
from nanokimi.data.documents import START, Cursor, Piece, cut_text
from nanokimi.data.formats import Format, Span
from nanokimi.errors import UserError

SEPARATOR = "<|endoftext|>\n"
# Every document ends with a line end: in a text file the separator is a line of its own.
DOCUMENTS = [
    "short\n",
    "",
    "",
    "x" * 100 + "\n",
    "é😀漢" * 30 + "\n",
    "many\nshort\n\nlines\n" * 12,
    "\ufeffa mark that opens no file\n",
    "windows\r\nlines\r\n" * 10,
    "\r\n" * 60,
    "a\r\r\n" * 30,
    "no <|endoftext|>\n<|endoftext|> here\n",
    " \n\t\n",
    "y" * 39 + "\n",  # as long as a piece
    "y" * 40 + "\n",
    '"quoted" and \\ \0\n',
    "last\n",
]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue().to_pybytes())


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def text(texts: list[str]) -> bytes:
    return "".join(document + SEPARATOR for document in texts).encode()


def json_lines(texts: list[str | None]) -> bytes:
    return "".join(json.dumps({"id": i, "text": document}) + "\n" for i, document in enumerate(texts)).encode()


def parquet(texts: list[str | None], rows: int = 5) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), file, row_group_size=rows)
    return file.getvalue()


CONTENTS = {".txt": text, ".jsonl": json_lines, ".ndjson": json_lines, ".json": json_lines, ".parquet": parquet}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 40)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 17)
    monkeypatch.setattr(formats, "ROWS_PER_BATCH", 3)


@pytest.fixture(params=[f"a{suffix}{ending}" for suffix in CONTENTS for ending in COMPRESS])
def every_format(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """DOCUMENTS in every format there is."""
    path = tmp_path / str(request.param)
    path.write_bytes(
        COMPRESS[path.suffix if path.suffix in COMPRESS else ""](CONTENTS[opening.inner_suffix(path)](DOCUMENTS))
    )
    return path


def read(path: Path, start: Cursor = START, *, column: str = "", errors: str = "strict") -> list[Piece]:
    return list(Format(column, errors).read(Span(path), start))


def cut(texts: list[str]) -> list[tuple[str, bool]]:
    """Every piece of some documents, and whether it ends one."""
    pieces = [list(cut_text(document)) for document in texts]
    return [(piece, i + 1 == len(some)) for some in pieces for i, piece in enumerate(some)]


def assert_read_from_everywhere(span: Span, form: Format | None = None) -> list[Piece]:
    """Reads ``span`` from each of its pieces on: always the rest, cursors included."""
    form = form or Format()
    pieces = list(form.read(span))
    for i, piece in enumerate(pieces):
        assert list(form.read(span, piece.cursor)) == pieces[i:], piece
    assert [piece.cursor for piece in pieces] == sorted({piece.cursor for piece in pieces})
    return pieces


# ---- the same in every format ------------------------------------------------------------------------------


@pytest.mark.fault(9)
def test_the_same_documents_make_the_same_pieces_in_every_format(every_format: Path) -> None:
    pieces = read(every_format)
    assert [(piece.text, piece.ends_document) for piece in pieces] == cut(DOCUMENTS)
    assert documents_of(pieces) == [document.replace("\r\n", "\n") for document in DOCUMENTS]
    assert len(pieces) > 2 * len(DOCUMENTS)


def test_every_format_is_read_from_any_piece_on(every_format: Path) -> None:
    assert len(assert_read_from_everywhere(Span(every_format))) > 2 * len(DOCUMENTS)


def test_cursors_keep_the_number_of_their_file(every_format: Path) -> None:
    pieces = list(Format().read(Span(every_format), Cursor(3)))
    assert {piece.cursor.span for piece in pieces} == {3}
    assert list(Format().read(Span(every_format), pieces[5].cursor)) == pieces[5:]


def test_all_bytes_on_the_disk_are_counted_once(every_format: Path) -> None:
    counted: list[int] = []
    pieces = list(Format().read(Span(every_format), START, counted.append))
    assert sum(counted) == every_format.stat().st_size
    list(Format().read(Span(every_format), pieces[-1].cursor, counted.append))
    assert sum(counted) < 2 * every_format.stat().st_size  # what is only passed over was counted before


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("at", [1, 300, 777])
def test_compressed_files_may_have_several_members(tmp_path: Path, name: str, at: int) -> None:
    path, compress = tmp_path / name, COMPRESS[Path(name).suffix]
    data = CONTENTS[opening.inner_suffix(path)](DOCUMENTS)
    path.write_bytes(compress(data[:at]) + compress(b"") + compress(data[at:]))
    pieces = assert_read_from_everywhere(Span(path))
    assert [(piece.text, piece.ends_document) for piece in pieces] == cut(DOCUMENTS)


def test_parquet_row_groups_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for rows in (1, 2, 100):
        path.write_bytes(parquet(DOCUMENTS, rows))
        pieces = assert_read_from_everywhere(Span(path))
        assert [(piece.text, piece.ends_document) for piece in pieces] == cut(DOCUMENTS)


# ---- text --------------------------------------------------------------------------------------------------


def documents_in(data: str) -> list[str]:
    """What the rule for text files means, written down a second time; line ends as they are."""
    found, lines = [""], data.removeprefix("\ufeff").split("\n")
    for i, line in enumerate(lines):
        if line.removesuffix("\r") == SEPARATOR.strip():
            found.append("")
        else:
            found[-1] += line + ("\n" if i + 1 < len(lines) else "")
    return found if found[-1] else found[:-1]


WORDS = ["a", "bcdefgh", "é", "😀", "漢", "\n", "\n", "\r\n", "\r", " ", "\ufeff", "\n" + SEPARATOR, SEPARATOR, "\0"]


@pytest.mark.parametrize("seed", range(60))
def test_random_texts_are_read_from_any_piece_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(formats, "BLOCK_BYTES", draw.choice([1, 2, 5, 31, 1 << 20]))
    monkeypatch.setattr(documents, "PIECE_BYTES", draw.choice([16, 20, 33]))
    data = "".join(draw.choices(WORDS, [8, 8, 3, 3, 3, 2, 2, 2, 1, 3, 1, 1, 1, 1], k=draw.randrange(120)))
    path = tmp_path / draw.choice(["a.txt", "a.txt.gz"])
    path.write_bytes(COMPRESS["" if path.suffix == ".txt" else ".gz"](data.encode()))
    pieces = assert_read_from_everywhere(Span(path))
    assert [(piece.text, piece.ends_document) for piece in pieces] == cut(documents_in(data))


@pytest.mark.parametrize("length", range(24, 46))
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_separator_at_the_end_of_the_file_needs_no_line_end(tmp_path: Path, length: int, end: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(("x" * length + "\n<|endoftext|>" + end).encode())
    assert [(piece.text, piece.ends_document) for piece in read(path)] == cut(["x" * length + "\n"])


@pytest.mark.fault(9)
@pytest.mark.parametrize("length", range(30, 50))
def test_a_cut_makes_no_separator_and_parts_no_line_end(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.txt"
    for line in ("x" * length + "<|endoftext|>\nrest\n", "x" * length + "\r\nrest" + "y" * 40 + "\r\n"):
        path.write_bytes(line.encode())
        pieces = assert_read_from_everywhere(Span(path))
        assert documents_of(pieces) == [line.replace("\r\n", "\n")]


@pytest.mark.parametrize("seed", range(30))
def test_slices_of_a_text_are_read_from_any_piece_on_and_make_up_the_whole(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    data = "".join(draw.choices(WORDS, k=150)).encode()
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    starts = [0, *(i + 1 for i, byte in enumerate(data) if byte == 0x0A and i + 1 < len(data) and draw.random() < 0.3)]
    joined = ""
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        counted: list[int] = []
        joined += "".join(piece.text for piece in Format().read(Span(path, start, end), START, counted.append))
        assert sum(counted) == (len(data) if end is None else end) - start
        assert_read_from_everywhere(Span(path, start, end))
    assert joined == "".join(piece.text for piece in read(path))
    assert len(starts) > 3


def test_a_slice_of_json_lines_is_read_from_any_piece_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = json_lines(DOCUMENTS).splitlines(keepends=True)
    path.write_bytes(b"".join(lines))
    start, end = (sum(map(len, lines[:n])) for n in (3, 10))
    pieces = assert_read_from_everywhere(Span(path, start, end))
    assert [(piece.text, piece.ends_document) for piece in pieces] == cut(DOCUMENTS[3:10])


@pytest.mark.fault(8)
def test_a_byte_order_mark_is_stripped_from_the_file_and_not_from_its_documents(tmp_path: Path) -> None:
    mark = "\ufeff".encode()
    (tmp_path / "a.txt").write_bytes(mark + b"<|endoftext|>\n" + mark + b"a\n")
    assert documents_of(assert_read_from_everywhere(Span(tmp_path / "a.txt"))) == ["", "\ufeffa\n"]
    (tmp_path / "b.txt").write_bytes(mark + mark + b"a" * 100)
    assert documents_of(assert_read_from_everywhere(Span(tmp_path / "b.txt"))) == ["\ufeff" + "a" * 100]
    (tmp_path / "c.txt").write_bytes(mark)
    assert read(tmp_path / "c.txt") == []
    (tmp_path / "a.jsonl").write_bytes(mark + json_lines(["a", "\ufeffb"]))
    assert documents_of(assert_read_from_everywhere(Span(tmp_path / "a.jsonl"))) == ["a", "\ufeffb"]


@pytest.mark.fault(6)
@pytest.mark.parametrize("ending", COMPRESS)
def test_bytes_that_are_not_utf8_give_their_offset_in_the_text(tmp_path: Path, ending: str) -> None:
    data = "é".encode() * 100 + b"\n<|endoftext|>\nabc \xe9\nxyz"
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(COMPRESS[ending](data))
    with pytest.raises(
        UserError, match=rf"a\.txt.*: not UTF-8 at byte {data.index(0xE9)}: .*--encoding_errors replace"
    ):
        read(path)
    replaced = assert_read_from_everywhere(Span(path), Format(errors="replace"))
    assert documents_of(replaced) == ["é" * 100 + "\n", "abc \ufffd\nxyz"]


@pytest.mark.parametrize("tail", [b"\xff", b"\xf0\x9f", b"\x80\x80\x80\x80\x80", b"\xe9\xa0"])
def test_broken_characters_are_replaced_alike_wherever_the_text_is_cut(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "a.txt"
    for before in range(30, 45):
        data = b"x" * before + tail + b"y" * 50
        path.write_bytes(data)
        pieces = assert_read_from_everywhere(Span(path), Format(errors="replace"))
        if len(tail) < 4:  # longer than any character: a cut may come between
            assert documents_of(pieces) == [data.decode("utf-8", "replace")]
        assert documents_of(pieces)[0].replace("\ufffd", "") == "x" * before + "y" * 50


@pytest.mark.fault(11)
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_line_of_64_megabytes_is_read_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.undo()
    path = tmp_path / f"a.txt{ending}"
    with path.open("wb") as raw:
        file = gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1) if ending == ".gz" else raw
        if ending == ".zst":
            file = pa.CompressedOutputStream(pa.PythonFile(raw, "w"), "zstd")
        for _ in range(64):
            file.write(b"word" * (1 << 18))
        if file is not raw:
            file.close()
    tracemalloc.start()
    total = sum(len(piece.text) for piece in Format().read(Span(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 64 << 20
    assert peak < 8 << 20


# ---- JSON lines and columns ----------------------------------------------------------------------------------


@pytest.mark.fault(30)
def test_rows_without_text_are_empty_documents(tmp_path: Path) -> None:
    rows = '{"text": "a"}\n\n{"text": null}\n  \r\n{"text": ""}\n{"id": 1}\n{"text": "b"}'
    (tmp_path / "a.jsonl").write_text(rows)
    assert documents_of(assert_read_from_everywhere(Span(tmp_path / "a.jsonl"))) == ["a", "", "", "", "b"]
    (tmp_path / "a.parquet").write_bytes(parquet(["a", None, "", "b"]))
    assert documents_of(assert_read_from_everywhere(Span(tmp_path / "a.parquet"))) == ["a", "", "", "b"]


@pytest.mark.fault(9)
def test_json_lines_may_end_with_crlf(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\r\\nb"}\r\n{"text": "c"}\r\n')
    assert documents_of(assert_read_from_everywhere(Span(tmp_path / "a.jsonl"))) == ["a\nb", "c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 5}', "a.jsonl at byte 14: the text is of type int, .*--text_column"),
        ('{"text": ["a"]}', "at byte 14: the text is of type list"),
        ("plain words", "the line at byte 14 is not JSON"),
        ('{"text": "b"', "the line at byte 14 is not JSON"),
        ('["b"]', "the line at byte 14 is no JSON object"),
        ("null", "the line at byte 14 is no JSON object"),
        ("[" * 100_000, "the line at byte 14 is not JSON"),
        ('{"text": ' + "1" * 10_000 + "}", "the line at byte 14 is not JSON"),
    ],
)
def test_a_line_that_is_no_object_with_a_text_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match=message) as raised:
        read(path)
    assert "\n" not in str(raised.value)


@pytest.mark.fault(6)
@pytest.mark.parametrize("mark", [b"", "\ufeff".encode()])
def test_bytes_in_json_that_are_not_utf8_give_their_offset(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "a.jsonl"
    for before in (b"", b'{"text": "first"}\n'):
        data = mark + before + b'{"text": "a\xffb"}\n'
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"not UTF-8 at byte {data.index(0xFF)}: .*--encoding_errors replace"):
            read(path)
        assert documents_of(read(path, errors="replace"))[-1] == "a\ufffdb"


@pytest.mark.fault(6)
def test_a_parquet_text_that_is_not_utf8_gives_its_row_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    broken = pa.array([b"fine", b"\xc3\xa9 \xff.", b"good"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), path)
    with pytest.raises(UserError, match=r"a\.parquet row 1: not UTF-8 at byte 3 .*--encoding_errors replace"):
        read(path)
    pieces = assert_read_from_everywhere(Span(path), Format(errors="replace"))
    assert documents_of(pieces) == ["fine", "é \ufffd.", "good"]


def test_lone_surrogates_become_replacement_characters_and_pairs_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a\ud83d b\ude00 \ud83d\ude00"}' + "\n")
    assert documents_of(read(path)) == ["a\ufffd b\ufffd 😀"]


@pytest.mark.fault(11)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_json_line_that_is_too_long_is_an_error_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", 2 << 20)
    path = tmp_path / f"a.jsonl{ending}"
    with gzip.open(path, "wb", compresslevel=1) if ending else path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(32):
            file.write(b"word" * (1 << 18))
    tracemalloc.start()
    with pytest.raises(UserError, match="the line at byte 14 is longer than 2 MiB: is this JSON lines"):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


def test_a_json_line_over_many_blocks_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["é" * 5000, "b"]))
    assert documents_of(read(path)) == ["é" * 5000, "b"]


COLUMNS = [
    ({"id": 1, "body": "a"}, "", "a"),
    ({"title": "t", "text": "a", "body": "b"}, "", "a"),
    ({"title": "t", "text": "a"}, "title", "t"),
    ({"title": "t", "body": "a"}, "", None),
    ({"id": 1, "n": 2}, "", None),
    ({"id": 1, "body": "a"}, "content", None),
]


@pytest.mark.fault(28)
@pytest.mark.parametrize(("row", "wanted", "expected"), COLUMNS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_text_column_is_found_or_the_columns_are_listed(
    tmp_path: Path, suffix: str, row: dict[str, object], wanted: str, expected: str | None
) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    if expected is not None:
        assert documents_of(read(path, column=wanted)) == [expected]
        return
    with pytest.raises(UserError, match=r"--text_column.*: .*\(") as raised:
        read(path, column=wanted)
    assert all(f"{name} (" in str(raised.value) for name in row)
    assert str(path) in str(raised.value)
    assert wanted in str(raised.value)


@pytest.mark.parametrize("column", ["", "body"])
def test_the_first_records_decide_on_the_column_wherever_reading_begins(tmp_path: Path, column: str) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"body": None}, {"body": "a" * 90}, {"body": "b", "n": 3}, {"n": 4}]
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))
    pieces = assert_read_from_everywhere(Span(path), Format(column))
    assert documents_of(pieces) == ["", "a" * 90, "b", ""]
    assert documents_of(list(Format(column).read(Span(path, len(lines[0] + lines[1]))))) == ["b", ""]


# ---- damaged files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst", "a.txt.bz2", "a.jsonl.xz", "a.parquet", "a.parquet.gz"])
@pytest.mark.parametrize("left", [0.02, 0.5, 0.9, -1])
def test_a_truncated_file_is_named_in_one_line(tmp_path: Path, name: str, left: float) -> None:
    path = tmp_path / name
    inner = CONTENTS[opening.inner_suffix(path)](DOCUMENTS * 20)
    data = COMPRESS[path.suffix if path.suffix in COMPRESS else ""](inner)
    path.write_bytes(data[: int(left * len(data)) if left > 0 else -1])
    with pytest.raises(UserError, match=f"{path}: .*(repair|replace)") as raised:
        read(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst", "a.parquet", "a.parquet.zst"])
@pytest.mark.parametrize("data", [b"plain text\n" * 30, b"x", bytes(range(256))])
def test_garbage_is_named_in_one_line(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path}: .*(repair|replace)") as raised:
        read(path)
    assert "\n" not in str(raised.value)


def test_a_parquet_file_with_any_byte_flipped_is_read_or_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    data = parquet(DOCUMENTS[:6])
    messages = []
    for i in range(0, len(data), 7):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])
        try:
            read(path)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert all(str(path) in message and "\n" not in message for message in messages)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for name in ("gone.txt", "gone.jsonl.gz", "gone.parquet"):
        with pytest.raises(UserError, match=f"{name}: cannot be read: No such file"):
            read(tmp_path / name)
