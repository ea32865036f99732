"""Token files, and folders of them that are made from a text, one after the other.

A token file is written once, then mapped into memory. Magic (8 bytes); header (JSON padded with spaces to byte 16,384);
tokens, little-endian uint16 (uint32 for vocabularies above 65,536), padded to a multiple of 8 bytes; for every document
the position after its end-of-text token, uint64.

In a folder, ``manifest.json`` says what the files were made from, which pairs of them are complete and where the next
one begins; it is replaced, atomically, whenever a pair is done: so a large text can go on after a kill.
``train-00000.bin`` and so on are what to train on, ``val-00000.bin`` what is held out, ``tokenizer.json`` is the
tokenizer that made them.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanokimi.console import progress_bar
from nanokimi.data.documents import START, Advance, Cursor, Piece, Text, is_blank
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.files import atomic_write

FILE_VERSION, SET_VERSION = 1, 1
MAGIC, HEADER_START = b"NKTOKENS", b'{"version": '
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
BATCH_CHARACTERS = 1 << 21  # enough to keep all cores busy, little enough for any memory
_START = 16384  # of the tokens
_BLOCK = 1 << 20
_HEADER = {
    **dict.fromkeys(("n_tokens", "n_documents", "n_bytes", "vocab_size"), int),
    **dict.fromkeys(("tokenizer", "fingerprint", "sha256"), str),
}
_KNOWN = {*_HEADER, "version", "dtype", "ends_sha256", "source"}


class TokenFileError(UserError):
    """A file that is no usable token file; the message says which and why."""


@dataclass(frozen=True)
class TokenFile:
    """A token file, ours or another project's, that is open for reading; nothing of ours is read before it is used."""

    path: Path
    tokens: NDArray[np.unsignedinteger[Any]]  # ids [n_tokens], uint16 or uint32, mapped
    document_ends: NDArray[Any]  # position after the last token of every document [n_documents], mapped
    sha256: str  # of the tokens
    tokenizer: str  # name of the one that made it
    fingerprint: str  # of that tokenizer
    vocab_size: int
    n_bytes: int = 0  # of the text in UTF-8; 0 where they are not known
    ends_sha256: str = ""  # of the document ends; empty where it is not known

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        return len(self.document_ends)

    @classmethod
    def open(cls, path: str | Path) -> TokenFile:
        """Maps ``path``; TokenFileError for a missing, empty, truncated or foreign file."""
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
        kept = {name: header[name] for name in _HEADER if name not in ("n_tokens", "n_documents")}
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
        """Appends tokens of the present document, which stand for ``n_bytes`` of text in UTF-8."""
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
            "version": FILE_VERSION,
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
        header["header_sha256"] = _sum_of(header)
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
        raise TokenFileError(f"{path}: not a nanokimi token file, or damaged: make it anew")
    try:
        header: dict[str, Any] = json.loads(start[len(MAGIC) :])
        version = header["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise TokenFileError(f"{path}: its header is damaged: make it anew") from error
    if version != FILE_VERSION:
        raise TokenFileError(f"{path}: written in format {version}, this one reads {FILE_VERSION}")
    known = all(isinstance(header.get(name), kind) for name, kind in _HEADER.items())
    digest = header.pop("header_sha256", None)
    known &= digest in (None, _sum_of(header)) and header.keys() <= _KNOWN  # None: of an earlier version
    if not known or header.get("dtype") not in ("<u2", "<u4"):
        raise TokenFileError(f"{path}: its header is damaged: make it anew")
    return header


def _sum_of(values: dict[str, Any]) -> str:
    """SHA-256 of plain values, in hexadecimal."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _aligned(position: int) -> int:
    return -(-position // 8) * 8


# ---- a folder of token files -----------------------------------------------------------------------


@dataclass
class Manifest:
    """What a folder of token files holds."""

    identity: str  # hash of documents, split and tokenizer
    about: str  # what is held out, in words
    version: int = SET_VERSION
    complete: bool = False
    # Of the first piece that is in no complete file: whether it is of the held-out documents of their own (0 or 1), its
    # part of those or the others, its cursor.
    next: list[Any] = field(default_factory=list)
    bytes_read: int = 0  # of the source, up to about there
    n_blank: int = 0  # documents without text, which are left out
    nuls: int = 0  # NUL characters
    shards: list[list[str]] = field(default_factory=list)  # complete files: the one to train on, the held-out one

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of ``folder``; TokenFileError if there is none that can be used."""
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            digest = content.pop("sha256", None)
            if digest not in (None, _sum_of(content)):  # None: of an earlier version
                raise ValueError("its contents do not match their checksum")
            manifest = cls(**content)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise TokenFileError(
                f"{path}: missing or damaged: delete {folder} and make it anew with `nanokimi prepare tokens`"
            ) from error
        if manifest.version != SET_VERSION:
            raise TokenFileError(f"{path}: of format {manifest.version}, this one reads {SET_VERSION}: make it anew")
        return manifest

    def write(self, folder: Path) -> None:
        with atomic_write(folder / MANIFEST) as file:
            content = asdict(self)
            file.write(json.dumps({**content, "sha256": _sum_of(content)}, indent=1).encode())


class TokenSet(NamedTuple):
    """The open token files of a folder; ``val`` is empty when nothing is held out."""

    train: list[TokenFile]
    val: list[TokenFile]
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> TokenSet:
        """Opens what ``write_token_set`` made; ``verify``: compares all tokens with their checksums.

        Raises:
            TokenFileError: incomplete, damaged or missing.
        """
        manifest = Manifest.read(folder)
        if not manifest.complete:
            raise TokenFileError(f"{folder}: was never finished: run the same `nanokimi prepare` again, it goes on")
        files = [TokenFile.open(folder / name) for names in manifest.shards for name in names]
        for file in files if verify else []:
            file.verify()
        train, val = ([f for f in files if f.path.name.startswith(kind)] for kind in ("train", "val"))
        if not train:
            raise TokenFileError(f"{folder}: nothing is left to train on: hold out less")
        return cls(train, val, manifest)


def write_token_set(text: Text, tokenizer: Tokenizer, folder: Path, *, shard_tokens: int = 100_000_000) -> TokenSet:
    """Tokenises ``text`` into ``folder``, on all cores; goes on where an earlier try with the same input ended.

    Args:
        shard_tokens: begin another file after about so many.

    Raises:
        UserError: the text cannot be read, is blank, or was changed meanwhile; ``folder`` holds another one.
        OSError: the disk is full.
    """
    about = text.about_split  # looks at the text: what is wrong with it shows before anything is written
    manifest = _begun(text, about, tokenizer, folder)
    if not manifest.complete:
        with progress_bar(f"tokenising {text.name}", text.n_bytes, done=manifest.bytes_read) as advance:
            batches = _batches(text, manifest, advance)
            batch = next(batches, [])
            while batch:
                with _FilePair(folder, len(manifest.shards), tokenizer) as pair:
                    batch = pair.fill(batch, batches, manifest, shard_tokens)
                if batch:
                    in_val = batch[0].part >= text.documents.n_parts
                    part = batch[0].part - in_val * text.documents.n_parts
                    manifest.next = [int(in_val), part, batch[0].piece.cursor]
                manifest.shards.append(pair.names)
                manifest.complete = not batch  # in one step: `next` is of no use once there is nothing next
                manifest.write(folder)
    return TokenSet.open(folder, verify=False)


def can_go_on(folder: Path, identity: str) -> bool:
    """Whether ``folder`` holds the beginning of the token set with this identity."""
    with suppress(TokenFileError):
        manifest = Manifest.read(folder)
        return manifest.identity == identity and not manifest.complete
    return False


def _begun(text: Text, about: str, tokenizer: Tokenizer, folder: Path) -> Manifest:
    identity = text.identity(tokenizer)
    if (folder / MANIFEST).exists() or any(folder.glob("*.bin")):
        manifest = Manifest.read(folder)
        if manifest.identity != identity:
            raise UserError(f"{folder} holds the tokens of another text, tokenizer or split: choose another folder")
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / TOKENIZER)
    manifest = Manifest(identity, about)
    manifest.write(folder)
    return manifest


class _Task(NamedTuple):
    """A piece of one part of the text, on its way to a token file."""

    part: int
    held_out: bool
    piece: Piece


def _batches(text: Text, manifest: Manifest, advance: Advance) -> Iterator[list[_Task]]:
    """Every piece from where the manifest ends, in groups of about BATCH_CHARACTERS."""

    def count(n_bytes: int) -> None:
        manifest.bytes_read += n_bytes
        advance(n_bytes)

    in_val, first, cursor = manifest.next or (0, 0, START)
    first += in_val * text.documents.n_parts
    batch: list[_Task] = []
    size = 0
    for part in range(first, text.n_parts):
        for held_out, piece in text.read(part, Cursor(*cursor) if part == first else START, count):
            batch.append(_Task(part, held_out, piece))
            size += len(piece.text) + 1
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


class _FilePair(ExitStack):
    """A file to train on and a held-out one, being written; each appears when the block ends without an error."""

    def __init__(self, folder: Path, number: int, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._folder, self._number, self._tokenizer = folder, number, tokenizer
        self.names: list[str] = []
        self._writers: dict[str, TokenWriter] = {}

    def add(self, batch: list[_Task]) -> None:
        encoded = self._tokenizer.encode_batch([task.piece.text for task in batch])
        for task, tokens in zip(batch, encoded, strict=True):
            kind = "val" if task.held_out else "train"
            if kind not in self._writers:
                self.names.append(f"{kind}-{self._number:05d}.bin")
                self._writers[kind] = self.enter_context(write_tokens(self._folder / self.names[-1], self._tokenizer))
            self._writers[kind].add(tokens, len(task.piece.text.encode()))
            if task.piece.ends_document:
                self._writers[kind].end_document()

    def fill(self, batch: list[_Task], more: Iterator[list[_Task]], manifest: Manifest, limit: int) -> list[_Task]:
        """Writes ``batch`` and what follows; returns the batch that opens the next pair, [] for none."""
        while batch:
            with_text = [task for task in batch if not is_blank(task.piece)]
            manifest.n_blank += len(batch) - len(with_text)
            manifest.nuls += sum(task.piece.text.count("\0") for task in batch)
            self.add(with_text)
            batch = next(more, [])
            if batch and self.ends_before(batch, limit):
                break
        return batch

    def ends_before(self, batch: list[_Task], limit: int) -> bool:
        """Whether the files are large enough and ``batch`` may open the next ones, perhaps inside a document."""
        train = self._writers.get("train")
        if train is None or train.n_tokens < limit or batch[0].held_out:
            return False
        train.goes_on = batch[0].piece.cursor.piece > 0
        return True
