from __future__ import annotations

import pytest

from nanokimi.data.documents import Piece
from nanokimi.data.split import choose_split, divide, survey
from nanokimi.errors import UserError


def divided(pieces: list[Piece], fraction: float) -> tuple[str, str]:
    """Training text and held-out text of ``pieces``."""
    found = survey(pieces)
    parts = ["", ""]
    for held_out, piece in divide(pieces, found, choose_split(found, fraction)):
        parts[held_out] += piece.text
    return parts[0], parts[1]


def documents(count: int) -> list[Piece]:
    return [Piece(f"document {i};", True) for i in range(count)]


def test_every_document_is_on_exactly_one_side() -> None:
    train, val = divided(documents(300), 0.1)
    found = (train + val).split(";")[:-1]
    assert sorted(found) == sorted(f"document {i}" for i in range(300))
    assert 15 <= val.count(";") <= 50


def test_copies_of_a_document_stay_together() -> None:
    train, val = divided(documents(200) * 3, 0.2)
    assert set(train.split(";")) & set(val.split(";")) == {""}


def test_a_document_keeps_its_side_when_others_come() -> None:
    before, after = divided(documents(150), 0.2)[1], divided(documents(400), 0.2)[1]
    assert set(before.split(";")) <= set(after.split(";"))


def test_the_side_of_a_document_does_not_depend_on_its_pieces() -> None:
    cut = [part for i in range(300) for part in (Piece("docu", False), Piece(f"ment {i};", True))]
    assert divided(cut, 0.1) == divided(documents(300), 0.1)


@pytest.mark.parametrize("pieces", [1, 3, 50])
def test_of_few_documents_the_end_is_held_out_from_a_line_start_on(pieces: int) -> None:
    lines = [f"line {i:03}\n" for i in range(200)]
    size = 200 // pieces
    text = [Piece("".join(lines[i : i + size]), False) for i in range(0, 200, size)] + [Piece("", True)]
    train, val = divided(text, 0.1)
    assert train + val == "".join(lines)
    assert val.startswith("line ")
    assert 180 <= len(val) <= 189  # a tenth, and what is left of its first line


def test_without_a_line_start_near_the_cut_is_exact() -> None:
    assert divided([Piece("x" * 10_000, True)], 0.25) == ("x" * 7500, "x" * 2500)


def test_a_document_that_is_cut_ends_on_both_sides() -> None:
    pieces = [Piece("x" * 100, True)]
    found = survey(pieces)
    assert [piece.ends_document for _, piece in divide(pieces, found, choose_split(found, 0.5))] == [True, True]


def test_no_share_holds_out_nothing() -> None:
    assert divided(documents(200), 0.0)[1] == ""
    assert divided(documents(3), 0.0)[1] == ""


def test_blank_documents_are_skipped_and_counted() -> None:
    """Fault 30."""
    pieces = [Piece(" \n", False), Piece("\t", True), Piece("", True), Piece("\n", False), Piece("a\n", True)]
    assert survey(pieces).n_blank == 2
    assert divided(pieces, 0.0) == ("\na\n", "")


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_an_empty_part_is_an_error(fraction: float) -> None:
    """Fault 41."""
    with pytest.raises(UserError, match=r"--val_fraction .* holds out \d+ of 120 documents"):
        divided(documents(120), fraction)


def test_nul_bytes_are_counted() -> None:
    assert survey([Piece("a\0b", False), Piece("\0", True)]).nuls == 2
