from __future__ import annotations

import pytest

from nanokimi.data.tokenizer import Tokenizer, load_tokenizer
from nanokimi.inference.engine import TextAssembly, TextChunk


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("byte")


def chunks(tokenizer: Tokenizer | None, text: bytes, *stop: str) -> list[TextChunk | None]:
    """What can be taken behind each byte of ``text``, and at the end."""
    assembly = TextAssembly(tokenizer, stop)
    found = []
    for byte in text:
        ended = assembly.push(byte)
        found.append(assembly.take())
        if ended:
            break
    assembly.ended = True
    return [*found, assembly.take()]


def ids(chunk: TextChunk | None) -> list[int]:
    return [] if chunk is None else [token.id for token in chunk.tokens]


def test_tokens_are_settled_with_the_character_that_they_complete(tokenizer: Tokenizer) -> None:
    """Fault 80."""
    text = "aé!"
    found = chunks(tokenizer, text.encode())
    assert [chunk.text if chunk else None for chunk in found] == ["a", None, "é", "!", None]
    assert [ids(chunk) for chunk in found] == [[97], [], list("é".encode()), [33], []]
    assert [token.text_offset for chunk in found if chunk for token in chunk.tokens] == [0, 1, 1, 2]


def test_tokens_of_an_incomplete_character_come_at_the_end_without_text(tokenizer: Tokenizer) -> None:
    found = chunks(tokenizer, "aé".encode()[:-1])
    assert found[-1] == ("", found[-1].tokens if found[-1] else ())
    assert ids(found[-1]) == [0xC3]


def test_tokens_of_text_that_may_become_a_stop_string_are_held_back_with_it(tokenizer: Tokenizer) -> None:
    found = chunks(tokenizer, b"xENy", "END")
    assert [chunk.text if chunk else None for chunk in found] == ["x", None, None, "ENy", None]
    assert [ids(chunk) for chunk in found] == [[120], [], [], [69, 78, 121], []]


def test_tokens_of_a_stop_string_are_dropped_with_it(tokenizer: Tokenizer) -> None:
    """Fault 102."""
    found = chunks(tokenizer, b"xEND", "END")
    assert [chunk.text if chunk else None for chunk in found] == ["x", None, None, None, None]
    assert [ids(chunk) for chunk in found] == [[120], [], [], [], []]


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
    chunk = assembly.take()
    assert chunk is not None
    assert (chunk.text, ids(chunk)) == ("", [0])


def test_chunks_taken_late_make_the_same_text_and_the_same_tokens(tokenizer: Tokenizer) -> None:
    text = "one é EN two END three".encode()
    often = [chunk for chunk in chunks(tokenizer, text, "END", "three") if chunk]
    assembly = TextAssembly(tokenizer, ("END", "three"))
    for byte in text:
        if assembly.push(byte):
            break
    once = assembly.take()
    assert once is not None
    assert once.text == "".join(chunk.text for chunk in often) == "one é EN two "
    assert once.tokens == tuple(token for chunk in often for token in chunk.tokens)


def test_ids_without_a_tokenizer_are_settled_at_once() -> None:
    assert [(chunk.text, ids(chunk)) for chunk in chunks(None, b"ab") if chunk] == [("", [97]), ("", [98])]
