from __future__ import annotations

import pytest

from nanokimi.data.tokenizer import Tokenizer, load_tokenizer
from nanokimi.inference.text import Piece, TextAssembly


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("byte")


def pieces(tokenizer: Tokenizer | None, text: bytes, *stop: str) -> list[Piece | None]:
    """What can be taken behind each byte of ``text``, and at the end."""
    assembly = TextAssembly(tokenizer, stop)
    found = []
    for byte in text:
        ended = assembly.push(byte)
        found.append(assembly.take())
        if ended:
            break
    assembly.end()
    return [*found, assembly.take()]


def ids(piece: Piece | None) -> list[int]:
    return [] if piece is None else [token.id for token in piece.tokens]


def test_tokens_are_settled_with_the_character_that_they_complete(tokenizer: Tokenizer) -> None:
    """Fault 80."""
    text = "aé!"
    found = pieces(tokenizer, text.encode())
    assert [piece.text if piece else None for piece in found] == ["a", None, "é", "!", None]
    assert [ids(piece) for piece in found] == [[97], [], list("é".encode()), [33], []]
    assert [token.text_offset for piece in found if piece for token in piece.tokens] == [0, 1, 1, 2]


def test_tokens_of_an_incomplete_character_come_at_the_end_without_text(tokenizer: Tokenizer) -> None:
    found = pieces(tokenizer, "aé".encode()[:-1])
    assert found[-1] == ("", found[-1].tokens if found[-1] else ())
    assert ids(found[-1]) == [0xC3]


def test_tokens_of_text_that_may_become_a_stop_string_are_held_back_with_it(tokenizer: Tokenizer) -> None:
    found = pieces(tokenizer, b"xENy", "END")
    assert [piece.text if piece else None for piece in found] == ["x", None, None, "ENy", None]
    assert [ids(piece) for piece in found] == [[120], [], [], [69, 78, 121], []]


def test_tokens_of_a_stop_string_are_dropped_with_it(tokenizer: Tokenizer) -> None:
    """Fault 102."""
    found = pieces(tokenizer, b"xEND", "END")
    assert [piece.text if piece else None for piece in found] == ["x", None, None, None, None]
    assert [ids(piece) for piece in found] == [[120], [], [], [], []]


def test_a_token_that_a_stop_string_begins_within_keeps_its_place() -> None:
    class Words:
        vocab_size = 3

        @staticmethod
        def piece(token: int) -> bytes:
            return (b"one S", b"TOP", b" two")[token]

    assembly = TextAssembly(Words(), ("STOP",))  # type: ignore[arg-type]
    assert not assembly.push(0)
    assert assembly.take() == ("one ", ())
    assert assembly.push(1)
    piece = assembly.take()
    assert piece is not None
    assert (piece.text, ids(piece)) == ("", [0])


def test_pieces_taken_late_make_the_same_text_and_the_same_tokens(tokenizer: Tokenizer) -> None:
    text = "one é EN two END three".encode()
    often = [piece for piece in pieces(tokenizer, text, "END", "three") if piece]
    assembly = TextAssembly(tokenizer, ("END", "three"))
    for byte in text:
        if assembly.push(byte):
            break
    once = assembly.take()
    assert once is not None
    assert once.text == "".join(piece.text for piece in often) == "one é EN two "
    assert once.tokens == tuple(token for piece in often for token in piece.tokens)


def test_ids_without_a_tokenizer_are_settled_at_once() -> None:
    assert [(piece.text, ids(piece)) for piece in pieces(None, b"ab") if piece] == [("", [97]), ("", [98])]
