"""Local text, tokenised once and kept in a cache beside it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nanokimi.data.corpus import Corpus, Finite
from nanokimi.data.local import LocalDocuments
from nanokimi.data.packing import TokenRow
from nanokimi.data.text import Text, short_hash
from nanokimi.data.token_bin import TokenFile, TokenFileError
from nanokimi.data.token_set import TokenSet, can_go_on, write_token_set
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from nanokimi.errors import UserError
from nanokimi.files import disk_errors_explained

Say = Callable[[str], None]


class PreparedText:
    """A text whose tokens are made on the first run and found again on the next.

    What is kept is named after a hash of all that it depends on, so that nothing in it is ever out of date.

    Args:
        text: of local files; the cache is beside them, or in the user's cache where that cannot be written.
    """

    def __init__(self, text: Text) -> None:
        documents = text.documents
        assert isinstance(documents, LocalDocuments)
        self.text = text
        path = Path(documents.name if os.path.exists(documents.name) else documents.files[0]).resolve()
        self.folders = [path.with_name(f"{path.name}.nanokimi"), cache_home() / f"{path.name}-{short_hash(str(path))}"]
        self._state = f"{short_hash(documents.name)}-{short_hash(documents.stamps)}"
        self.stem = f"{self._state}-{self.text.identity()}"

    def find_tokenizer(self) -> Tokenizer | None:
        """A text brings none."""
        return None

    def training_text(self, characters: int) -> Iterator[str]:
        """The first ``characters`` of what is not held out."""
        return self.text.training_text("training the tokenizer on", characters)

    def train_bpe(self, size: int) -> Tokenizer:
        """A BPE of the training part (never of held-out text), trained at most once."""
        for folder in self.folders:
            with suppress(UserError):  # not there yet, or damaged
                state = load_tokenizer(str(folder / f"{self.stem}-{size}.tokenizer.json")).to_state()
                return Tokenizer.from_state({**state, "name": f"bpe:{size}"})
        tokenizer = train_bpe(self.text.training_text("training the tokenizer on"), size)
        folder = _writable(self.folders)
        with disk_errors_explained("token cache", folder):
            tokenizer.save(folder / f"{self.stem}-{size}.tokenizer.json")
        return tokenizer

    def open(self, tokenizer: Tokenizer, log: Say) -> Corpus:
        """The tokens, made now unless they are there.

        Raises:
            UserError: blank or undecodable text, nowhere to write the cache.
            RunError: the disk is full.
        """
        found = self._token_set(tokenizer)
        if found.manifest.nuls:
            log(f"warning: {self.text.name} holds {found.manifest.nuls:,} NUL bytes: is it really text?")
        if found.manifest.n_blank:
            log(f"note: {self.text.name}: left out {found.manifest.n_blank:,} documents without text")
        return corpus_of(found, tokenizer)

    def _token_set(self, tokenizer: Tokenizer) -> TokenSet:
        name = f"{self.stem}-{short_hash(tokenizer.fingerprint)}"
        for folder in self.folders:
            if found := _whole_set(folder / name):
                return found
        roles = self.text.roles  # looks at the text: what is wrong with it shows before anything is written
        assert roles
        folder = _writable(self.folders)
        with disk_errors_explained("token cache", folder), _to_itself(folder):
            if found := _whole_set(folder / name):
                return found
            if not can_go_on(folder / name, self.text.identity(tokenizer)):
                shutil.rmtree(folder / name, ignore_errors=True)
            found = write_token_set(self.text, tokenizer, folder / name)
        _remove_outdated(folder, self._state)
        return found


@contextmanager
def _to_itself(folder: Path) -> Iterator[None]:
    """A second run that wants to write into ``folder`` waits here for the first."""
    held = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _whole_set(folder: Path) -> TokenSet | None:
    """The token set there; None where there is none yet, or a damaged one."""
    with suppress(TokenFileError):
        return TokenSet.open(folder)
    return None


def corpus_of(found: TokenSet, tokenizer: Tokenizer) -> Corpus:
    """The corpus whose tokens lie in the files of a set."""
    val = TokenRow([file.tokens for file in found.val]) if found.val else None
    parts = [f"training on {_size(found.train)}"]
    parts.append(f"held out ({found.manifest.about}): {_size(found.val)}" if found.val else "nothing held out")
    n_bytes, n_tokens = (sum(getattr(file, name) for file in found.train) for name in ("n_bytes", "n_tokens"))
    parts.append(f"{n_bytes / n_tokens:.2f} bytes per token")
    train = TokenRow([file.tokens for file in found.train])
    return Corpus(tokenizer, Finite(train, short_hash([file.sha256 for file in found.train])), val, "; ".join(parts))


def _size(files: list[TokenFile]) -> str:
    n_documents, n_tokens, n_bytes = (
        sum(getattr(f, name) for f in files) for name in ("n_documents", "n_tokens", "n_bytes")
    )
    return describe(n_documents, n_tokens, n_bytes)


def describe(n_documents: int, n_tokens: int, n_bytes: int) -> str:
    """Counts in words."""
    plural = "" if n_documents == 1 else "s"
    return f"{n_documents:,} document{plural}, {n_tokens:,} tokens, {n_bytes:,} bytes"


def cache_home() -> Path:
    """The user's cache folder for what nanokimi makes."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanokimi"


def _writable(folders: list[Path]) -> Path:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise UserError(f"no folder for the token cache: {' and '.join(map(str, folders))} cannot be written")


def _remove_outdated(folder: Path, state: str) -> None:
    """Removes what was made from an earlier state of the same files; a run that still maps it keeps it."""
    for path in folder.glob(f"{state.split('-')[0]}-*"):
        if not path.name.startswith(state):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
