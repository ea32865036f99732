"""From a text to tokens that are ready for training, tokenised once and kept in a cache beside the text."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nanokimi.data.documents import Piece, check_text_file, read_pieces
from nanokimi.data.progress import reading
from nanokimi.data.split import CHANGED, Split, Survey, choose_split, divide, survey
from nanokimi.data.token_bin import TokenFile, TokenFileError, write_tokens
from nanokimi.data.tokenizer import Tokenizer, bpe_size, load_tokenizer, train_bpe
from nanokimi.errors import RunError, UserError

CACHE_VERSION = 1  # raise it when the same text would become other tokens
BATCH_CHARACTERS = 1 << 21

Say = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens held out.

    Attributes:
        val: None when nothing is held out.
        summary: one line with documents, tokens and bytes of each part.
    """

    tokenizer: Tokenizer
    train: TokenFile
    val: TokenFile | None
    summary: str


def open_corpus(
    data_path: str | Path,
    tokenizer_name: str,
    *,
    val_path: str | Path = "",
    val_fraction: float = 0.05,
    encoding_errors: str = "strict",
    tokenizer: Tokenizer | None = None,
    say: Say = print,
) -> Corpus:
    """The tokens of a local text; from the cache unless the text, the tokenizer or the split changed.

    Args:
        data_path: UTF-8 text; lines that are exactly ``<|endoftext|>`` separate its documents.
        tokenizer_name: ``bpe:N`` trains one on the training part; for the rest see ``load_tokenizer``.
        val_path: held-out text of its own; without it ``val_fraction`` of the text is held out (0: nothing).
        encoding_errors: ``strict`` or ``replace``, for bytes that are not UTF-8.
        tokenizer: use this one, whatever ``tokenizer_name`` says (a checkpoint carries its own).
        say: takes warnings, a line each.

    Raises:
        UserError: missing, empty, blank or undecodable text, an unknown tokenizer, nowhere to write the cache.
        RunError: the disk is full.
    """
    text = LocalText(Path(data_path), Path(val_path) if val_path else None, val_fraction, encoding_errors)
    folders = _cache_folders(text.path)
    if tokenizer is None:
        size = bpe_size(tokenizer_name)
        tokenizer = _trained_bpe(text, size, folders) if size is not None else load_tokenizer(tokenizer_name)
    train, val = _tokens(text, tokenizer, folders)
    if nuls := train.source["nuls"]:
        say(f"warning: {data_path} holds {nuls:,} NUL bytes: is it really text?")
    wanted = bpe_size(tokenizer.name)
    if wanted is not None and tokenizer.vocab_size < wanted:
        say(f"note: the text yields only {tokenizer.vocab_size} of the {wanted} entries of {tokenizer.name}")
    return Corpus(tokenizer, train, val, _summary(train, val))


def train_tokenizer_on(path: str | Path, vocab_size: int, output: str | Path, *, val_fraction: float = 0.05) -> str:
    """Trains a byte-level BPE on a text and writes its ``tokenizer.json``; returns a line that says what.

    The share of the text that training holds out by default is not looked at here either.

    Raises:
        UserError: the text or the size cannot be used.
        RunError: ``output`` cannot be written.
    """
    output = Path(output)
    check_text_file(Path(path), "FILE")
    tokenizer = _train_bpe(LocalText(Path(path), None, val_fraction, "strict"), vocab_size)
    with _disk_errors_explained("tokenizer", output):
        output.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(output)
    return f"{output}: {tokenizer.vocab_size:,} entries; use it with --set tokenizer_name={output}"


@dataclass(frozen=True)
class LocalText:
    """Documents of one local file, divided into those to train on and those held out."""

    path: Path
    val_path: Path | None
    val_fraction: float
    encoding_errors: str

    def __post_init__(self) -> None:
        check_text_file(self.path, "--data_path")
        if self.val_path is not None:
            check_text_file(self.val_path, "--val_path")
            if self.val_path.samefile(self.path):
                raise UserError(f"--val_path {self.val_path} is the training text itself: name another file, or none")

    def pieces(self, doing: str) -> Iterator[tuple[bool, Piece]]:
        """Every document that is not blank, in pieces, and for each piece whether it is held out.

        Args:
            doing: what is done with them, for the progress display.
        """
        for path, found, split in self.parts:
            yield from divide(self._read(path, doing), found, split)

    @cached_property
    def parts(self) -> list[tuple[Path, Survey, Split]]:
        """What each file holds and how it is divided, from one pass over it.

        Raises:
            UserError: there is no text in a file, or it is not UTF-8.
        """
        parts = []
        for path, flag in ((self.path, "--data_path"), (self.val_path, "--val_path")):
            if path is None:
                continue
            found = survey(self._read(path, "reading"))
            if not found.n_documents:
                raise UserError(f"{flag} {path}: the text is blank: name a file with something in it")
            if path is self.val_path:
                split = Split(b"\1" * len(found.lengths), about=f"in {path.name}")
            else:
                split = choose_split(found, 0.0 if self.val_path else self.val_fraction)
            parts.append((path, found, split))
        return parts

    @cached_property
    def stamps(self) -> list[list[int]]:
        """Size and time of change of each file as first seen: when they are as before, so is the text."""
        return self._stamps_now()

    @property
    def identity(self) -> list[Any]:
        """Everything on which documents and split depend."""
        share = None if self.val_path else self.val_fraction
        return [CACHE_VERSION, self.stamps, share, self.encoding_errors]

    def require_unchanged(self) -> None:
        """Raises UserError when a file was written to since it was first looked at."""
        if self._stamps_now() != self.stamps:
            raise UserError(CHANGED)

    def _stamps_now(self) -> list[list[int]]:
        files = [path.stat() for path in (self.path, self.val_path) if path is not None]
        return [[stat.st_size, stat.st_mtime_ns] for stat in files]

    def _read(self, path: Path, doing: str) -> Iterator[Piece]:
        with reading(f"{doing} {path}", path.stat().st_size) as advance:
            yield from read_pieces(path, self.encoding_errors, advance)


# ---- the cache: files named after a hash of all that they depend on, so that none is ever out of date ----


def _trained_bpe(text: LocalText, size: int, folders: list[Path]) -> Tokenizer:
    """A BPE of the training part (never of held-out text), trained at most once."""
    name = f"{_hash(text.stamps[0])}-{_hash([text.identity, size])}.tokenizer.json"
    for folder in folders:
        with suppress(UserError):  # not there yet, or damaged
            state = load_tokenizer(str(folder / name)).to_state()
            return Tokenizer.from_state({**state, "name": f"bpe:{size}"})
    tokenizer = _train_bpe(text, size)
    folder = _writable(folders)
    with _disk_errors_explained("token cache", folder):
        tokenizer.save(folder / name)
    return tokenizer


def _train_bpe(text: LocalText, size: int) -> Tokenizer:
    training_text = (piece.text for held_out, piece in text.pieces("training the tokenizer on") if not held_out)
    tokenizer = train_bpe(training_text, size)
    text.require_unchanged()
    return tokenizer


def _tokens(text: LocalText, tokenizer: Tokenizer, folders: list[Path]) -> tuple[TokenFile, TokenFile | None]:
    stem = f"{_hash(text.stamps[0])}-{_hash([text.identity, tokenizer.fingerprint])}"
    for folder in folders:
        try:
            return _open_pair(folder / stem)
        except TokenFileError:
            continue  # not there yet, or damaged
    source = _describe(text)  # reads all of it: what is wrong with the text shows before anything is written
    folder = _writable(folders)
    with _disk_errors_explained("token cache", folder):
        _tokenise(text, tokenizer, source, folder / stem)
    _remove_outdated(folder, stem)
    return _open_pair(folder / stem)


def _open_pair(stem: Path) -> tuple[TokenFile, TokenFile | None]:
    train = TokenFile.open(f"{stem}.train.bin")
    val = TokenFile.open(f"{stem}.val.bin") if train.source["held_out"] else None
    for part in (train, val):
        if part is not None:
            part.verify()
    return train, val


def _describe(text: LocalText) -> dict[str, str | int]:
    return {
        "name": text.path.name,
        "held_out": "".join(split.about for _, _, split in text.parts),  # at most one of them holds something out
        "nuls": sum(found.nuls for _, found, _ in text.parts),
        "blank_documents": sum(found.n_blank for _, found, _ in text.parts),
    }


def _tokenise(text: LocalText, tokenizer: Tokenizer, source: dict[str, str | int], stem: Path) -> None:
    with ExitStack() as files:
        writers = [files.enter_context(write_tokens(Path(f"{stem}.train.bin"), tokenizer, source))]
        if source["held_out"]:
            writers.append(files.enter_context(write_tokens(Path(f"{stem}.val.bin"), tokenizer, source)))
        for batch in _batches(text.pieces("tokenising")):
            encoded = tokenizer.encode_batch([piece.text for _, piece in batch])
            for (held_out, piece), tokens in zip(batch, encoded, strict=True):
                writers[held_out].add(tokens, len(piece.text.encode()))
                if piece.ends_document:
                    writers[held_out].end_document()
        text.require_unchanged()


def _batches(pieces: Iterable[tuple[bool, Piece]]) -> Iterator[list[tuple[bool, Piece]]]:
    """Groups of about BATCH_CHARACTERS: enough to keep all cores busy, little enough for any memory."""
    batch, size = [], 0
    for held_out, piece in pieces:
        batch.append((held_out, piece))
        size += len(piece.text) + 1
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def _cache_folders(text: Path) -> list[Path]:
    """Beside the text, and for folders that cannot be written the user's cache."""
    path = text.resolve()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [path.with_name(f"{path.name}.nanokimi"), home / "nanokimi" / f"{path.name}-{_hash(str(path))}"]


def _writable(folders: list[Path]) -> Path:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise UserError(f"no folder for the token cache: {' and '.join(map(str, folders))} cannot be written")


def _remove_outdated(folder: Path, stem: str) -> None:
    """Removes what was made from an earlier state of the text; a run that still maps it keeps it."""
    for path in (*folder.glob("*.bin"), *folder.glob("*.tokenizer.json")):
        if path.name.split("-")[0] != stem.split("-")[0]:
            path.unlink(missing_ok=True)


@contextmanager
def _disk_errors_explained(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full: free space" if full else error.strerror
        raise RunError(f"the {what} {path} cannot be written: {reason}") from error


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _summary(train: TokenFile, val: TokenFile | None) -> str:
    parts = [f"training on {_size(train)}"]
    parts.append(f"held out ({val.source['held_out']}): {_size(val)}" if val else "nothing held out")
    parts.append(f"{train.n_bytes / train.n_tokens:.2f} bytes per token")
    return "; ".join(parts)


def _size(part: TokenFile) -> str:
    plural = "" if part.n_documents == 1 else "s"
    return f"{part.n_documents:,} document{plural}, {part.n_tokens:,} tokens, {part.n_bytes:,} bytes"
