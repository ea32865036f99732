"""What training sees of a text: its training split, its held-out tokens and the tokenizer.

A text of local files is tokenised once and its tokens are kept beside it; any other while training goes on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanokimi.console import progress_bar
from nanokimi.data.batch import TokenArray
from nanokimi.data.documents import Text, is_blank, short_hash, wrong_share
from nanokimi.data.fidelity import check_tokenizer
from nanokimi.data.finding import CACHE_SUFFIX
from nanokimi.data.loader import BatchLoader, Loader, LoaderOptions
from nanokimi.data.local import LocalDocuments
from nanokimi.data.stream import StreamLoader
from nanokimi.data.token_files import TokenFileError, TokenSet, can_go_on, write_token_set
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from nanokimi.errors import UserError
from nanokimi.files import cache_home, disk_errors_explained, lock, sha256_of, short_name

BPE_CHARACTERS = 32 << 20  # of a stream, or of each source of a mixture, for a tokenizer
MOST_HELD_OUT_TOKENS = 1 << 20  # of a stream
TRAINING = "training the tokenizer on"

Log = Callable[[str], None]


@dataclass(frozen=True)
class TrainData:
    """What is trained on."""

    identity: str  # hash of the tokens and of what they are read from: positions are valid while it is the same
    loader: Callable[[LoaderOptions], Loader]  # makes batches of it; UserError if it is too short for one
    tokens: TokenArray | None = None  # None when they are not known before training

    @classmethod
    def of_tokens(cls, identity: str, tokens: TokenArray) -> TrainData:
        """All tokens are there: the order of an epoch is a permutation of its sequences."""
        return cls(identity, partial(BatchLoader, tokens), tokens)


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens held out."""

    tokenizer: Tokenizer
    train: TrainData
    val: TokenArray | None  # None when nothing is held out
    summary: str  # one line with documents, tokens and bytes of each split
    revision: str = ""  # commit of the hub's data set that is read; empty when there is none, or more than one source

    @classmethod
    def of_set(cls, found: TokenSet, tokenizer: Tokenizer) -> Corpus:
        """The corpus whose tokens lie in the files of a set."""
        names = "n_documents", "n_tokens", "n_bytes"
        train, val = ([sum(getattr(f, name) for f in files) for name in names] for files in (found.train, found.val))
        held_out = f"held out ({found.manifest.about}): {describe(*val)}" if found.val else "nothing held out"
        summary = f"training on {describe(*train)}; {held_out}; {train[2] / train[1]:.2f} bytes per token"
        identity = short_hash([file.sha256 for file in found.train])
        tokens, val_tokens = (TokenArray([file.tokens for file in files]) for files in (found.train, found.val))
        return cls(tokenizer, TrainData.of_tokens(identity, tokens), val_tokens if found.val else None, summary)


def describe(n_documents: int, n_tokens: int, n_bytes: int) -> str:
    """Counts in words."""
    plural = "" if n_documents == 1 else "s"
    return f"{n_documents:,} document{plural}, {n_tokens:,} tokens, {n_bytes:,} bytes"


# ---- a text that is tokenised while training goes on ----------------------------------------------


class StreamedText:
    """A text of any size in bounded memory; ``val_tokens`` of it (0: a million) are held out for evaluations."""

    def __init__(self, text: Text, val_tokens: int = 0) -> None:
        self.text, self.val_tokens = text, val_tokens or MOST_HELD_OUT_TOKENS

    def train_bpe(self, size: int) -> Tokenizer:
        """A byte-level BPE of the beginning of what is trained on."""
        return train_bpe(self.text.training_text(TRAINING, BPE_CHARACTERS), size)

    def open(self, tokenizer: Tokenizer, log: Log) -> Corpus:
        """Finds what is held out, and reads the tokens of it that are kept."""
        text, rule = self.text, self.text.rule
        check_tokenizer(text, tokenizer, log)
        about, val = "nothing held out", None
        if text.about_split:
            val, counts = held_out_tokens(text, tokenizer, self.val_tokens + 1)
            about = f"held out ({text.about_split}), the first of it for evaluations: {counts}"
        summary = f"training on a stream of {text.name}; {about}"
        identity = short_hash([text.documents.identity, rule.fraction, rule.cut, tokenizer.fingerprint])
        train = TrainData(identity, partial(StreamLoader, text, tokenizer))
        return Corpus(tokenizer, train, val, summary, getattr(text.documents, "commit", ""))


def held_out_tokens(text: Text, tokenizer: Tokenizer, limit: int) -> tuple[TokenArray, str]:
    """The first ``limit`` held-out tokens, and the counts of what was read for them, in words."""
    tokens: list[NDArray[np.int32]] = []
    n_documents = n_bytes = n_tokens = 0
    name = text.name if text.val is None else text.val.name
    with progress_bar(f"reading the held-out part of {name}", None) as advance:
        for piece in text.held_out_pieces(advance):
            if is_blank(piece):
                continue
            ids = tokenizer.encode(piece.text)
            tokens.append(np.array([*ids, tokenizer.eot_id] if piece.ends_document else ids, np.int32))
            n_documents += piece.ends_document
            n_bytes += len(piece.text.encode())
            n_tokens += len(tokens[-1])
            if n_tokens >= limit:
                break
    if not n_tokens:
        raise wrong_share(text.fraction, f"no document of {name}")
    return TokenArray([np.concatenate(tokens)[:limit]]), describe(n_documents, n_tokens, n_bytes)


# ---- local text, tokenised once --------------------------------------------------------------------


class CachedText:
    """A text whose tokens are made on the first run and found again on the next.

    What is kept is named after a hash of all that it depends on, so that nothing in it is ever out of date. It lies
    beside the local files of ``text``, or in the user's cache where that cannot be written.
    """

    def __init__(self, text: Text) -> None:
        documents = text.documents
        assert isinstance(documents, LocalDocuments)
        self.text = text
        path = Path(documents.name if os.path.exists(documents.name) else documents.files[0]).resolve()
        beside = path.with_name(f"{short_name(path.name)}{CACHE_SUFFIX}")
        self.folders = [beside, cache_home() / f"{short_name(path.name)}-{short_hash(str(path))}"]
        self._state = f"{short_hash(documents.name)}-{short_hash(documents.stamps)}"
        self.stem = f"{self._state}-{text.identity()}"

    def train_bpe(self, size: int) -> Tokenizer:
        """A BPE of the training split (never of held-out text), trained at most once."""
        name = f"{self.stem}-{size}-{{}}.tokenizer.json"  # with a checksum of the contents
        for path in (path for folder in self.folders for path in folder.glob(name.format("*"))):
            with suppress(UserError, OSError):  # of a later version, or gone
                if path.name == name.format(sha256_of(path)[:16]):  # else it is damaged
                    state = load_tokenizer(str(path)).to_state()
                    return Tokenizer.from_state({**state, "name": f"bpe:{size}"})
        tokenizer = train_bpe(self.text.training_text(TRAINING), size)
        folder, digest = self._writable_folder(), hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
        with disk_errors_explained("token cache", folder):
            tokenizer.save(folder / name.format(digest[:16]))
        return tokenizer

    def open(self, tokenizer: Tokenizer, log: Log) -> Corpus:
        """The tokens, made now unless they are there; tells ``log`` what is odd about the text.

        Raises:
            UserError: blank or undecodable text, nowhere to write the cache.
            RunError: the disk is full.
        """
        check_tokenizer(self.text, tokenizer, log)
        name = f"{self.stem}-{short_hash(tokenizer.fingerprint)}"
        found = _whole_set(folder / name for folder in self.folders) or self._written(name, tokenizer)
        if found.manifest.nuls:
            log(f"warning: {self.text.name} holds {found.manifest.nuls:,} NUL bytes: is it really text?")
        if found.manifest.n_blank:
            log(f"note: {self.text.name}: left out {found.manifest.n_blank:,} documents without text")
        return Corpus.of_set(found, tokenizer)

    def _written(self, name: str, tokenizer: Tokenizer) -> TokenSet:
        _ = self.text.rule  # looks at the text: what is wrong with it shows before anything is written
        folder = self._writable_folder()
        with disk_errors_explained("token cache", folder), _locked(folder):
            if found := _whole_set([folder / name]):
                return found
            if not can_go_on(folder / name, self.text.identity(tokenizer)):
                shutil.rmtree(folder / name, ignore_errors=True)
            found = write_token_set(self.text, tokenizer, folder / name)
        # What was made from an earlier state of the same files goes; a run that still maps it keeps it.
        for path in folder.glob(f"{self._state.split('-')[0]}-*"):
            if not path.name.startswith(self._state):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return found

    def _writable_folder(self) -> Path:
        for folder in self.folders:
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    return folder
        raise UserError(f"no folder for the token cache: {' and '.join(map(str, self.folders))} cannot be written")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A second run that wants to write into ``folder`` waits here for the first."""
    held = os.open(folder, os.O_RDONLY)
    try:
        lock(held, wait=True)
        yield
    finally:
        os.close(held)


def _whole_set(folders: Iterable[Path]) -> TokenSet | None:
    for folder in folders:
        with suppress(TokenFileError):  # none there yet, or a damaged one
            return TokenSet.open(folder)
    return None
