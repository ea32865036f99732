"""A folder of token files made from documents: in shards, so that a large one can be resumed after a kill.

``manifest.json`` says what the folder was made from, which shards are complete and where the next one begins; it is
replaced, atomically, whenever a shard is done. ``train-00000.bin`` and so on are what to train on, ``val-00000.bin``
what is held out, ``tokenizer.json`` is the tokenizer behind them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nanokimi.data.documents import START, Advance, Cursor, Piece
from nanokimi.data.progress import reading
from nanokimi.data.split import is_blank
from nanokimi.data.text import Role, Text
from nanokimi.data.token_bin import TokenFile, TokenFileError, TokenWriter, write_tokens
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.files import atomic_write

VERSION = 1
BATCH_CHARACTERS = 1 << 21
SHARD_TOKENS = 100_000_000
MANIFEST = "manifest.json"


class CacheSlots(NamedTuple):
    """Where in the roles a piece stands."""

    role: int = 0
    part: int = 0
    cursor: Cursor = START


class Task(NamedTuple):
    """One piece on its way to a token file."""

    held_out: bool
    piece: Piece
    place: CacheSlots


@dataclass
class Manifest:
    """What a folder of token files holds.

    Attributes:
        identity: hash of documents, split and tokenizer.
        about: what is held out, in words.
        next: ``Place`` of the first piece that is in no complete shard.
        bytes_read: of the source, up to about there.
        n_blank, nuls: documents without text, which are left out, and NUL characters.
        shards: names of the files of each complete shard.
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
        """Replaces the manifest of ``folder``."""
        with atomic_write(folder / MANIFEST) as file:
            file.write(json.dumps(asdict(self), indent=1).encode())

    @property
    def place(self) -> CacheSlots:
        """``next`` as it is used."""
        return CacheSlots(self.next[0], self.next[1], Cursor(*self.next[2])) if self.next else CacheSlots()


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
        by_kind = {kind: [f for f in files if f.path.name.startswith(kind)] for kind in ("train", "val")}
        if not by_kind["train"]:
            raise TokenFileError(f"{folder}: nothing is left to train on: hold out less")
        return cls(by_kind["train"], by_kind["val"], manifest)


def write_token_set(text: Text, tokenizer: Tokenizer, folder: Path, *, shard_tokens: int = SHARD_TOKENS) -> TokenSet:
    """Tokenises ``text`` into ``folder``, on all cores; goes on where an earlier try with the same input ended.

    Raises:
        UserError: the text cannot be read, is blank, or was changed meanwhile; ``folder`` holds another one.
        OSError: the disk is full.
    """
    roles = text.roles  # looks at the text: what is wrong with it shows before anything is written
    manifest = _begun(text, tokenizer, folder)
    if not manifest.complete:
        with reading(f"tokenising {text.name}", text.n_bytes, done=manifest.bytes_read) as advance:
            batches = _batches(_tasks(roles, manifest, advance))
            batch = next(batches, [])
            while batch:
                batch = _write_shard(batch, batches, tokenizer, folder, manifest, shard_tokens)
    return TokenSet.open(folder, verify=False)


def can_go_on(folder: Path, identity: str) -> bool:
    """Whether ``folder`` holds the beginning of the token set with this identity."""
    try:
        manifest = Manifest.read(folder)
    except TokenFileError:
        return False
    return manifest.identity == identity and not manifest.complete


def _begun(text: Text, tokenizer: Tokenizer, folder: Path) -> Manifest:
    """The manifest of an earlier try, or a new one."""
    identity = text.identity(tokenizer)
    if (folder / MANIFEST).exists() or any(folder.glob("*.bin")):
        manifest = Manifest.read(folder)
        if manifest.identity != identity:
            raise UserError(f"{folder} holds the tokens of another text, tokenizer or split: choose another folder")
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer.json")
    manifest = Manifest(identity, text.about_split)
    manifest.write(folder)
    return manifest


def _tasks(roles: Sequence[Role], manifest: Manifest, advance: Advance) -> Iterator[Task]:
    """Every piece from the manifest's place on."""

    def count(n_bytes: int) -> None:
        manifest.bytes_read += n_bytes
        advance(n_bytes)

    first = manifest.place
    for number in range(first.role, len(roles)):
        role = roles[number]
        begun = number == first.role
        for part in range(first.part if begun else 0, role.documents.n_parts):
            start = first.cursor if begun and part == first.part else START
            for held_out, piece in role.pieces(part, start, count):
                yield Task(held_out, piece, CacheSlots(number, part, piece.cursor))


def _batches(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """Groups of about BATCH_CHARACTERS: enough to keep all cores busy, little enough for any memory."""
    batch: list[Task] = []
    size = 0
    for task in tasks:
        batch.append(task)
        size += len(task.piece.text) + 1
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

    @property
    def names(self) -> list[str]:
        """The files' names."""
        return [self._name(kind) for kind in self._writers]

    def _writer(self, kind: str) -> TokenWriter:
        if kind not in self._writers:
            files = write_tokens(self._folder / self._name(kind), self._tokenizer, {})
            self._writers[kind] = self.enter_context(files)
        return self._writers[kind]

    def _name(self, kind: str) -> str:
        return f"{kind}-{self._number:05d}.bin"


def _write_shard(
    batch: list[Task], more: Iterator[list[Task]], tokenizer: Tokenizer, folder: Path, manifest: Manifest, limit: int
) -> list[Task]:
    """Writes one shard, ``batch`` first; returns the batch that opens the next one, [] when there is none."""
    with _Shard(folder, len(manifest.shards), tokenizer) as shard:
        while batch:
            with_text = [task for task in batch if not is_blank(task.piece)]
            manifest.n_blank += len(batch) - len(with_text)
            manifest.nuls += sum(task.piece.text.count("\0") for task in batch)
            shard.add(with_text)
            batch = next(more, [])
            if batch and shard.ends_before(batch, limit):
                manifest.next = list(batch[0].place)
                break
    manifest.shards.append(shard.names)
    manifest.complete = not batch  # in one step: `next` is of no use once there is nothing next
    manifest.write(folder)
    return batch
