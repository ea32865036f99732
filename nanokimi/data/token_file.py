"""Our token file: a header in JSON, the tokens, the ends of the documents; written once, then mapped into memory.

Magic (8 bytes); header (JSON padded with spaces to byte 16,384); tokens, little-endian uint16 (uint32 for vocabularies
above 65,536), padded to a multiple of 8 bytes; for every document the position after its end-of-text token, uint64.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.files import atomic_write

FORMAT_VERSION = 1
MAGIC = b"NKTOKENS"
_START = 16384  # of the tokens
_BLOCK = 1 << 20
_COUNTS, _TEXTS = ("n_tokens", "n_documents", "n_bytes", "vocab_size"), ("tokenizer", "fingerprint", "sha256")


class TokenFileError(UserError):
    """A file that is no usable token file; the message says which and why."""


@dataclass(frozen=True)
class TokenFile:
    """A token file, ours or another project's, that is open for reading; nothing of ours is read before it is used.

    Attributes:
        tokens: ids [n_tokens], uint16 or uint32, mapped.
        document_ends: position after the last token of every document [n_documents], mapped.
        sha256, ends_sha256: of ``tokens`` and ``document_ends``; the second is empty where it is not known.
        tokenizer, fingerprint: name and fingerprint of the tokenizer that made it.
        n_bytes: UTF-8 bytes of the text; 0 where they are not known.
    """

    path: Path
    tokens: NDArray[np.unsignedinteger[Any]]
    document_ends: NDArray[Any]
    sha256: str
    tokenizer: str
    fingerprint: str
    vocab_size: int
    n_bytes: int = 0
    ends_sha256: str = ""

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        return len(self.document_ends)

    @classmethod
    def open(cls, path: str | Path) -> TokenFile:
        """Maps ``path``; its size must agree with its header.

        Raises:
            TokenFileError: missing, empty, truncated or foreign file.
        """
        path = Path(path)
        header = _read_header(path)
        dtype, count, n_documents = np.dtype(header["dtype"]), header["n_tokens"], header["n_documents"]
        ends_start = _aligned(_START + count * dtype.itemsize)
        expected, actual = ends_start + 8 * n_documents, path.stat().st_size
        if actual != expected:
            raise TokenFileError(f"{path}: truncated or damaged: {actual} bytes instead of {expected}: make it anew")
        if not count:
            raise TokenFileError(f"{path}: holds no tokens")
        ends: NDArray[Any] = np.empty(0, "<u8")  # nothing cannot be mapped
        if n_documents:
            ends = np.memmap(path, np.dtype("<u8"), "r", ends_start, (n_documents,))
        kept = {name: header[name] for name in ("n_bytes", "vocab_size", *_TEXTS)}
        tokens = np.memmap(path, dtype, "r", _START, (count,))
        return cls(path, tokens, ends, **kept, ends_sha256=header.get("ends_sha256", ""))

    def verify(self) -> None:
        """Reads all tokens and ends and compares them with their checksums; TokenFileError if one bit differs."""
        sha256 = hashlib.sha256()
        for start in range(0, self.n_tokens, _BLOCK):
            sha256.update(self.tokens[start : start + _BLOCK].tobytes())
        ends = hashlib.sha256(self.document_ends.tobytes()).hexdigest()
        if sha256.hexdigest() != self.sha256 or self.ends_sha256 not in ("", ends):
            raise TokenFileError(f"{self.path}: damaged (its tokens do not match their checksum): make it anew")


class TokenWriter:
    """Takes the tokens of one document after the other; made by ``write_tokens``.

    Attributes:
        goes_on: set it when the last document goes on in another file: it gets no end-of-text token here.
    """

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer) -> None:
        self._file, self._tokenizer = file, tokenizer
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._sha256, self._ends = hashlib.sha256(), array("Q")
        self.n_tokens = self.n_bytes = 0
        self.goes_on = False
        file.seek(_START)

    def add(self, tokens: Sequence[int], n_bytes: int) -> None:
        """Appends part of the present document: its ids, and how many UTF-8 bytes of text they stand for."""
        data = np.asarray(tokens, self._dtype).tobytes()
        self._sha256.update(data)
        self._file.write(data)
        self.n_tokens += len(tokens)
        self.n_bytes += n_bytes

    def end_document(self) -> None:
        """Appends the end-of-text token."""
        self.add([self._tokenizer.eot_id], 0)
        self._ends.append(self.n_tokens)

    def finish(self) -> None:
        """Ends a document that is still open, unless it ``goes_on``, and writes the ends and the header."""
        if not self.goes_on and self.n_tokens > (self._ends[-1] if self._ends else 0):
            self.end_document()
        self._file.write(bytes(_aligned(self._file.tell()) - self._file.tell()))
        ends = np.asarray(self._ends, "<u8").tobytes()
        self._file.write(ends)
        header = {
            "version": FORMAT_VERSION,
            "dtype": self._dtype.str,
            "n_tokens": self.n_tokens,
            "n_documents": len(self._ends),
            "n_bytes": self.n_bytes,
            "vocab_size": self._tokenizer.vocab_size,
            "tokenizer": self._tokenizer.name,
            "fingerprint": self._tokenizer.fingerprint,
            "sha256": self._sha256.hexdigest(),
            "ends_sha256": hashlib.sha256(ends).hexdigest(),
            "source": {},  # asked for by earlier versions of this program
        }
        self._file.seek(0)
        self._file.write(MAGIC + json.dumps(header).encode().ljust(_START - len(MAGIC)))


@contextmanager
def write_tokens(path: Path, tokenizer: Tokenizer) -> Iterator[TokenWriter]:
    """A writer whose file appears at ``path``, complete, when the block ends without an error; memory is bounded."""
    with atomic_write(path) as file:
        writer = TokenWriter(file, tokenizer)
        yield writer
        writer.finish()


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            start = file.read(_START)
    except OSError as error:
        raise TokenFileError(f"{path}: cannot be read: {error.strerror}") from error
    if not start:
        raise TokenFileError(f"{path}: the file is empty")
    if not start.startswith(MAGIC):
        raise TokenFileError(f"{path}: not a nanokimi token file")
    try:
        header: dict[str, Any] = json.loads(start[len(MAGIC) :])
        version = header["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise TokenFileError(f"{path}: its header is damaged: make it anew") from error
    if version != FORMAT_VERSION:
        raise TokenFileError(f"{path}: written in format {version}, this one reads {FORMAT_VERSION}")
    known = all(isinstance(header.get(name), int) for name in _COUNTS)
    known = known and all(isinstance(header.get(name), str) for name in _TEXTS)
    if not known or header.get("dtype") not in ("<u2", "<u4"):
        raise TokenFileError(f"{path}: its header is damaged: make it anew")
    return header


def _aligned(position: int) -> int:
    return -(-position // 8) * 8
