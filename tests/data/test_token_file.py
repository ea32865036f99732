from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from nanokimi.data.token_files import TokenFile, TokenFileError, write_tokens
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture
def byte() -> Tokenizer:
    return load_tokenizer("byte")


@pytest.fixture
def path(tmp_path: Path, byte: Tokenizer) -> Path:
    """Two documents, "abc" (added in two parts) and "é"."""
    path = tmp_path / "tokens.bin"
    with write_tokens(path, byte) as writer:
        writer.add([97], 1)
        writer.add([98, 99], 2)
        writer.end_document()
        writer.add([0xC3, 0xA9], 2)
        writer.end_document()
    return path


def test_what_was_written_is_read(path: Path, byte: Tokenizer) -> None:
    file = TokenFile.open(path)
    assert file.tokens.tolist() == [97, 98, 99, 256, 0xC3, 0xA9, 256]
    assert file.document_ends.tolist() == [4, 7]
    assert (file.n_tokens, file.n_documents, file.n_bytes, file.vocab_size) == (7, 2, 5, 257)
    assert file.fingerprint == byte.fingerprint
    assert file.tokens.dtype == np.uint16
    file.verify()


def test_a_document_left_open_is_ended(tmp_path: Path, byte: Tokenizer) -> None:
    with write_tokens(tmp_path / "t", byte) as writer:
        writer.add([97], 1)
    file = TokenFile.open(tmp_path / "t")
    assert file.tokens.tolist() == [97, 256]
    assert file.document_ends.tolist() == [2]


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path, byte: Tokenizer) -> None:
    byte.vocab_size = 65_537
    with write_tokens(tmp_path / "t", byte) as writer:
        writer.add([65_536], 1)
    file = TokenFile.open(tmp_path / "t")
    assert file.tokens.dtype == np.uint32
    assert file.tokens.tolist() == [65_536, 256]


def test_nothing_appears_when_writing_fails(tmp_path: Path, byte: Tokenizer) -> None:
    with suppress(KeyboardInterrupt), write_tokens(tmp_path / "t", byte) as writer:
        writer.add([97], 1)
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [1, 100, 16_384, 16_390])
def test_a_truncated_file_is_named(path: Path, size: int) -> None:
    os.truncate(path, size)
    with pytest.raises(TokenFileError, match=r"tokens\.bin: (truncated|not a|its header is)"):
        TokenFile.open(path)


@pytest.mark.fault(18, 20)
def test_an_empty_a_missing_and_a_foreign_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("Once upon a time " * 2000)
    for name, problem in (("empty", "is empty"), ("missing", "No such file"), ("text", "not a nanokimi token file")):
        with pytest.raises(TokenFileError, match=f"{name}: .*{problem}"):
            TokenFile.open(tmp_path / name)


def test_a_file_without_tokens_is_an_error(tmp_path: Path, byte: Tokenizer) -> None:
    with write_tokens(tmp_path / "t", byte):
        pass
    with pytest.raises(TokenFileError, match="holds no tokens"):
        TokenFile.open(tmp_path / "t")


def test_one_flipped_bit_fails_verification(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[16_384] ^= 1
    path.write_bytes(data)
    with pytest.raises(TokenFileError, match="checksum"):
        TokenFile.open(path).verify()
