from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from nanokimi.data.documents import (
    MOST_BLANK_PIECES,
    START,
    Advance,
    Cursor,
    HoldOutRule,
    Piece,
    Text,
    divide,
    ignore,
    is_blank,
    settled,
)
from nanokimi.errors import UserError


def placed(texts: Iterable[tuple[str, bool]]) -> Iterator[Piece]:
    """Pieces with the cursors that a reader gives them."""
    at = number = 0
    for text, ends in texts:
        yield Piece(text, ends, Cursor(0, at, number))
        at, number = at + len(text), 0 if ends else number + 1


class Pieces:
    """Documents in memory; ``n_read`` of their pieces were read."""

    name, n_bytes, identity, n_read = "pieces", None, list[Any](), 0

    def __init__(self, parts: list[list[Piece]]) -> None:
        self.parts, self.n_parts = parts, len(parts)

    def read(self, part: int, start: Cursor = START, advance: Advance = ignore) -> Iterator[Piece]:
        for piece in self.parts[part]:
            self.n_read += 1
            yield piece


def rule_of(parts: list[list[Piece]], fraction: float) -> HoldOutRule:
    return Text(Pieces(parts), fraction=fraction).rule


def divided(texts: list[tuple[str, bool]], fraction: float, n_parts: int = 1) -> tuple[str, str]:
    """Training text and held-out text of pieces that lie in ``n_parts`` parts."""
    size = -(-len(texts) // n_parts)
    parts = [list(placed(texts[i : i + size])) for i in range(0, len(texts), size)]
    split = rule_of(parts, fraction)
    sides = ["", ""]
    for part, pieces in enumerate(parts):
        for held_out, piece in divide(pieces, part, split):
            sides[held_out] += "" if is_blank(piece) else piece.text
    return sides[0], sides[1]


def documents(count: int) -> list[tuple[str, bool]]:
    return [(f"document {i};", True) for i in range(count)]


@pytest.mark.parametrize("n_parts", [1, 7])
def test_every_document_is_on_exactly_one_side(n_parts: int) -> None:
    train, val = divided(documents(300), 0.1, n_parts)
    found = (train + val).split(";")[:-1]
    assert sorted(found) == sorted(f"document {i}" for i in range(300))
    assert 15 <= val.count(";") <= 50


def test_copies_of_a_document_stay_together() -> None:
    train, val = divided(documents(200) * 3, 0.2)
    assert set(train.split(";")) & set(val.split(";")) == {""}


def test_a_document_keeps_its_side_when_others_come_and_in_other_parts() -> None:
    before, after = divided(documents(150), 0.2)[1], divided(documents(400), 0.2, 5)[1]
    assert set(before.split(";")) <= set(after.split(";"))


def test_all_pieces_of_a_document_are_on_the_side_of_its_first() -> None:
    cut = [part for i in range(300) for part in ((f"document {i};", False), ("and more,", True))]
    train, val = divided(cut, 0.1)
    assert val.replace("and more,", "") == divided(documents(300), 0.1)[1]
    assert val.count("and more,") == val.count(";")
    assert train.count("and more,") == train.count(";")


@pytest.mark.parametrize("pieces", [1, 3, 50])
@pytest.mark.parametrize("n_parts", [1, 2])
def test_of_few_documents_the_end_is_held_out_from_a_line_start_on(pieces: int, n_parts: int) -> None:
    lines = [f"line {i:03}\n" for i in range(200)]
    size = 200 // pieces
    ends = n_parts > 1  # a document does not go on in another part
    text = [("".join(lines[i : i + size]), ends) for i in range(0, 200, size)] + [("", True)]
    train, val = divided(text, 0.1, n_parts)
    assert train + val == "".join(lines)
    assert val.startswith("line ")
    assert 180 <= len(val) <= 189  # a tenth, and what is left of its first line


def test_without_a_line_start_near_the_cut_is_exact() -> None:
    assert divided([("x" * 10_000, True)], 0.25) == ("x" * 7500, "x" * 2500)


def test_a_document_that_is_cut_ends_on_both_sides() -> None:
    pieces = list(placed([("x" * 100, True)]))
    split = rule_of([pieces], 0.5)
    assert [piece.ends_document for _, piece in divide(pieces, 0, split)] == [True, True]


def test_a_part_that_is_read_from_the_middle_is_divided_at_the_same_place() -> None:
    pieces = list(placed([(f"{i:04}", False) for i in range(100)] + [("", True)]))
    split = rule_of([pieces], 0.25)
    whole = list(divide(pieces, 0, split))
    for start in range(0, 75, 5):
        assert list(divide(pieces[start:], 0, split)) == whole[start:]


def test_a_look_at_the_beginning_chooses_the_rule_that_the_whole_would() -> None:
    parts = [list(placed(documents(99))), list(placed(documents(150)))]
    for few in (parts[:1], parts):
        brief, full = (Text(Pieces(few), fraction=0.2, in_full=in_full).rule for in_full in (False, True))
        assert brief == full
    documents_read = Pieces(parts)
    assert Text(documents_read, fraction=0.2, in_full=False).rule
    assert documents_read.n_read == 100


def test_no_share_holds_out_nothing() -> None:
    assert divided(documents(200), 0.0)[1] == ""
    assert divided(documents(3), 0.0)[1] == ""


@pytest.mark.fault(30)
def test_blank_documents_are_skipped_and_counted() -> None:
    texts = [(" \n", False), ("\t", True), ("", True), ("\n", False), ("a\n", True)]
    assert sum(map(is_blank, settled(placed(texts)))) == 2
    assert divided(texts, 0.0) == ("\na\n", "")


def test_no_more_white_space_is_held_than_memory_allows() -> None:
    texts = [(" ", False)] * (MOST_BLANK_PIECES + 1)
    assert "".join(piece.text for piece in settled(placed(texts))) == " " * (MOST_BLANK_PIECES + 1)


@pytest.mark.fault(41)
@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_an_empty_part_is_an_error(fraction: float) -> None:
    with pytest.raises(UserError, match=r"--val_fraction .* holds out \d+ of 120 documents"):
        divided(documents(120), fraction)
