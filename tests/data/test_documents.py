from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from nanokimi.data import documents, formats
from nanokimi.data.documents import cut_text
from nanokimi.data.finding import Search
from nanokimi.data.formats import Format, Span
from nanokimi.data.local import find_files
from nanokimi.errors import UserError


def read(path: Path, errors: str = "strict") -> list[str]:
    """The documents of ``path``, put together from their pieces."""
    found, open_document = [], ""
    for piece in Format(errors=errors).read(Span(path)):
        open_document += piece.text
        if piece.ends_document:
            found.append(open_document)
            open_document = ""
    assert not open_document
    return found


@pytest.fixture(params=[1, 2, 3, 7, 1 << 18])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Sizes of block and piece: the result must be the same wherever the text is cut."""
    monkeypatch.setattr(formats, "BLOCK_BYTES", request.param)
    monkeypatch.setattr(documents, "PIECE_BYTES", max(20, request.param))
    return int(request.param)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "text.txt"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("one\ntwo", ["one\ntwo"]),
        ("a\n<|endoftext|>\nb\n", ["a\n", "b\n"]),
        ("a\n<|endoftext|>\nb\n<|endoftext|>", ["a\n", "b\n"]),
        ("<|endoftext|>\n<|endoftext|>\nb", ["", "", "b"]),
        ("a\r\n<|endoftext|>\r\nb", ["a\n", "b"]),
        ("a <|endoftext|>\n<|endoftext|> b\n<|endoftext|>!", ["a <|endoftext|>\n<|endoftext|> b\n<|endoftext|>!"]),
        ("x" * 50 + "<|endoftext|>\ny", ["x" * 50 + "<|endoftext|>\ny"]),
        ("x" * 50 + "\n" + "é😀" * 30 + "\n<|endoftext|>\nz", ["x" * 50 + "\n" + "é😀" * 30 + "\n", "z"]),
    ],
)
def test_only_lines_that_are_exactly_end_of_text_separate_documents(
    path: Path, block: int, data: str, expected: list[str]
) -> None:
    path.write_bytes(data.encode())
    assert read(path) == expected


@pytest.mark.fault(8)
def test_bom_is_stripped_at_the_start_only(path: Path, block: int) -> None:
    path.write_bytes("\ufeffa\ufeff\n".encode())
    assert read(path) == ["a\ufeff\n"]


@pytest.mark.fault(9)
def test_crlf_becomes_lf_and_a_lone_cr_stays(path: Path, block: int) -> None:
    path.write_bytes(b"a\r\nb\rc\r\r\n\r")
    assert read(path) == ["a\nb\rc\r\n\r"]


@pytest.mark.fault(6)
@pytest.mark.parametrize(("data", "offset"), [(b"ab\xe9cd", 2), ("é😀".encode() + b"\xff", 6), (b"abc\xf0\x9f", 3)])
def test_bytes_that_are_not_utf8_give_their_offset(path: Path, block: int, data: bytes, offset: int) -> None:
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"not UTF-8 at byte {offset}: .*--encoding_errors replace"):
        read(path)


@pytest.mark.fault(6)
def test_bytes_that_are_not_utf8_can_be_replaced(path: Path, block: int) -> None:
    path.write_bytes(b"ab\xe9cd")
    assert read(path, "replace") == ["ab\ufffdcd"]


def test_pieces_end_at_line_ends_where_there_are_any(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BLOCK_BYTES", 7)
    monkeypatch.setattr(documents, "PIECE_BYTES", 20)
    path.write_text("eight ch\n" * 40)
    pieces = [piece.text for piece in Format().read(Span(path))]
    assert len(pieces) > 10
    assert all(text.endswith("\n") for text in pieces if text)


@pytest.mark.fault(11)
def test_one_long_line_is_read_in_bounded_memory(path: Path) -> None:
    path.write_bytes(b"word " * (32 << 20 >> 2))  # 40 MB
    tracemalloc.start()
    total = sum(len(piece.text) for piece in Format().read(Span(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == path.stat().st_size
    assert peak < 4 << 20


@pytest.mark.parametrize("length", [1, 99, 100, 101, 119, 120, 121, 250, 1000])
@pytest.mark.parametrize("text", ["words and\nlines\n", "é😀漢", "no end ", "\r\n", "a\r\r\n"])
def test_a_document_is_cut_alike_alone_and_among_others(
    path: Path, monkeypatch: pytest.MonkeyPatch, text: str, length: int
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 100)
    document = (text * 1000)[:length]
    path.write_bytes(b"before\n<|endoftext|>\n" * 3 + document.encode() + b"\n<|endoftext|>\nbehind")
    among = [piece for piece in Format().read(Span(path))][3:-1]
    assert [piece.text for piece in among] == list(cut_text(document + "\n"))
    assert "".join(piece.text for piece in among) == (document + "\n").replace("\r\n", "\n")
    assert [piece.ends_document for piece in among] == [False] * (len(among) - 1) + [True]
    assert all(len(piece.text.encode()) <= 100 for piece in among)


def test_a_document_that_fits_is_one_piece_wherever_it_stands(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 100)
    texts = [f"{i}\n" * (i % 40 + 1) for i in range(10)] + ["x" * 99 + "\n"] * 3
    path.write_text("<|endoftext|>\n".join(texts))
    assert [piece.text for piece in Format().read(Span(path))] == texts


@pytest.mark.fault(1, 4, 5)
def test_a_missing_file_a_folder_and_an_empty_file_are_named_with_the_flag(path: Path) -> None:
    with pytest.raises(UserError, match=r"--data_path .*text\.txt: no such file.*nanokimi prepare stdlib"):
        find_files(str(path), "--data_path", Search())
    with pytest.raises(UserError, match=r"--val_path .* is a directory"):
        find_files(str(path.parent), "--val_path", Search())
    path.touch()
    with pytest.raises(UserError, match=r"--data_path .*is empty"):
        find_files(str(path), "--data_path", Search())
