"""A folder of token files made from a text, one after the other, so that a large one can go on after a kill.

``manifest.json`` says what the folder was made from, which pairs of files are complete and where the next one begins;
it is replaced, atomically, whenever a pair is done. ``train-00000.bin`` and so on are what to train on,
``val-00000.bin`` what is held out, ``tokenizer.json`` is the tokenizer that made them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nanokimi.console import progress_bar
from nanokimi.data.documents import START, Advance, Cursor, Piece
from nanokimi.data.split import Text, is_blank
from nanokimi.data.token_file import TokenFile, TokenFileError, TokenWriter, write_tokens
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.files import atomic_write

VERSION = 1
BATCH_CHARACTERS = 1 << 21  # enough to keep all cores busy, little enough for any memory
SHARD_TOKENS = 100_000_000
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"


class Task(NamedTuple):
    """One piece, of a part of the text, on its way to a token file."""

    part: int
    held_out: bool
    piece: Piece


@dataclass
class Manifest:
    """What a folder of token files holds.

    Attributes:
        identity: hash of documents, split and tokenizer.
        about: what is held out, in words.
        next: of the first piece that is in no complete file: whether it is of the held-out documents of their own
            (0 or 1), its part of those or the others, its cursor.
        bytes_read: of the source, up to about there.
        n_blank, nuls: documents without text, which are left out, and NUL characters.
        shards: names of the complete files, the one to train on with the held-out one.
    """

    identity: str
    about: str
    version: int = VERSION
    complete: bool = False
    next: list[Any] = field(default_factory=list)
    bytes_read: int = 0
    n_blank: int = 0
    nuls: int = 0
    shards: list[list[str]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of ``folder``; TokenFileError if there is none that can be used."""
        path = folder / MANIFEST
        try:
            manifest = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise TokenFileError(
                f"{path}: missing or damaged: delete {folder} and make it anew with `nanokimi prepare tokens`"
            ) from error
        if manifest.version != VERSION:
            raise TokenFileError(f"{path}: of format {manifest.version}, this one reads {VERSION}: make it anew")
        return manifest

    def write(self, folder: Path) -> None:
        with atomic_write(folder / MANIFEST) as file:
            file.write(json.dumps(asdict(self), indent=1).encode())


class TokenSet(NamedTuple):
    """The open token files of a folder; ``val`` is empty when nothing is held out."""

    train: list[TokenFile]
    val: list[TokenFile]
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> TokenSet:
        """Opens what ``write_token_set`` made.

        Args:
            verify: read all tokens and compare them with their checksums.

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


def write_token_set(text: Text, tokenizer: Tokenizer, folder: Path, *, shard_tokens: int = SHARD_TOKENS) -> TokenSet:
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
                with _Shard(folder, len(manifest.shards), tokenizer) as shard:
                    batch = _fill(shard, batch, batches, manifest, shard_tokens)
                if batch:
                    in_val = batch[0].part >= text.documents.n_parts
                    part = batch[0].part - in_val * text.documents.n_parts
                    manifest.next = [int(in_val), part, batch[0].piece.cursor]
                manifest.shards.append(shard.names)
                manifest.complete = not batch  # in one step: `next` is of no use once there is nothing next
                manifest.write(folder)
    return TokenSet.open(folder, verify=False)


def can_go_on(folder: Path, identity: str) -> bool:
    """Whether ``folder`` holds the beginning of the token set with this identity."""
    try:
        manifest = Manifest.read(folder)
    except TokenFileError:
        return False
    return manifest.identity == identity and not manifest.complete


def _begun(text: Text, about: str, tokenizer: Tokenizer, folder: Path) -> Manifest:
    """The manifest of an earlier try, or a new one."""
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


def _batches(text: Text, manifest: Manifest, advance: Advance) -> Iterator[list[Task]]:
    """Every piece from the manifest's place on, in groups of about BATCH_CHARACTERS."""

    def count(n_bytes: int) -> None:
        manifest.bytes_read += n_bytes
        advance(n_bytes)

    in_val, first, cursor = manifest.next or (0, 0, START)
    first += in_val * text.documents.n_parts
    batch: list[Task] = []
    size = 0
    for part in range(first, text.n_parts):
        start = Cursor(*cursor) if part == first else START
        for held_out, piece in text.read(part, start, count):
            batch.append(Task(part, held_out, piece))
            size += len(piece.text) + 1
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


class _Shard(ExitStack):
    """A pair of token files that are being written; each appears, complete, when the block ends without an error."""

    def __init__(self, folder: Path, number: int, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._folder, self._number, self._tokenizer = folder, number, tokenizer
        self.names: list[str] = []
        self._writers: dict[str, TokenWriter] = {}

    def add(self, batch: list[Task]) -> None:
        """Tokenises and writes some pieces."""
        encoded = self._tokenizer.encode_batch([task.piece.text for task in batch])
        for task, tokens in zip(batch, encoded, strict=True):
            writer = self._writer("val" if task.held_out else "train")
            writer.add(tokens, len(task.piece.text.encode()))
            if task.piece.ends_document:
                writer.end_document()

    def ends_before(self, batch: list[Task], limit: int) -> bool:
        """Whether the files are large enough and ``batch`` may open the next ones, perhaps inside a document."""
        train = self._writers.get("train")
        if train is None or train.n_tokens < limit or batch[0].held_out:
            return False
        train.goes_on = batch[0].piece.cursor.piece > 0
        return True

    def _writer(self, kind: str) -> TokenWriter:
        if kind not in self._writers:
            self.names.append(f"{kind}-{self._number:05d}.bin")
            self._writers[kind] = self.enter_context(write_tokens(self._folder / self.names[-1], self._tokenizer))
        return self._writers[kind]


def _fill(shard: _Shard, batch: list[Task], more: Iterator[list[Task]], manifest: Manifest, limit: int) -> list[Task]:
    """Writes ``batch`` and what follows into a shard; returns the batch that opens the next one, [] for none."""
    while batch:
        with_text = [task for task in batch if not is_blank(task.piece)]
        manifest.n_blank += len(batch) - len(with_text)
        manifest.nuls += sum(task.piece.text.count("\0") for task in batch)
        shard.add(with_text)
        batch = next(more, [])
        if batch and shard.ends_before(batch, limit):
            break
    return batch
