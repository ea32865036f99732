"""``nanokimi prepare``: any source of text as token files, and a training text that every machine has."""

from __future__ import annotations

import os
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanokimi.config import ModelConfig, TrainConfig, from_dict
from nanokimi.console import counted
from nanokimi.data.corpus import CachedText, Corpus, Log, StreamedText
from nanokimi.data.fidelity import check_tokenizer
from nanokimi.data.local import LocalDocuments
from nanokimi.data.sources import choose_tokenizer, text_of, with_sample
from nanokimi.data.token_files import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    TokenFile,
    TokenFileError,
    TokenSet,
    write_token_set,
)
from nanokimi.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer
from nanokimi.errors import RunError, UserError
from nanokimi.files import atomic_write, disk_errors_explained, lock

# Tests, other people's packages, and the file that holds the language reference, which is taken topic by topic.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}


def prepare_tokens(
    train: Mapping[str, Any], model: Mapping[str, Any], output: Path, *, shard_tokens: int, log: Log
) -> str:
    """Tokenises what ``nanokimi train`` would read with the same settings, and returns a summary; killed, it goes on.

    Args:
        train, model: settings by field name.
        output: folder to make; ``--dataset tokenbin --data_path`` takes it.
        shard_tokens: begin another file after about so many.

    Raises:
        UserError: a setting or the data cannot be used, ``output`` holds something else.
        RunError: the disk is full, the network failed.
    """
    if shard_tokens < 1:
        raise UserError(f"--shard_tokens must be 1 or more, got {shard_tokens}")
    config = from_dict(TrainConfig, train)
    model_config = ModelConfig.preset(config.preset, **model)
    if config.mix or config.dataset == "tokenbin":
        what = "--mix" if config.mix else "--dataset tokenbin"
        raise UserError(f"{what}: prepare one source of text; several, or tokens, are for `nanokimi train`")
    with _own(output), disk_errors_explained("token set", output):
        text = text_of(with_sample(config, log), log)
        source = CachedText(text) if isinstance(text.documents, LocalDocuments) else StreamedText(text)
        tokenizer = choose_tokenizer([source], model_config.tokenizer_name, named=True)
        check_tokenizer(text, tokenizer, log)
        _require_same_tokenizer(output, tokenizer)
        before, started = _bytes_in(output), time.monotonic()
        found = write_token_set(text, tokenizer, output, shard_tokens=shard_tokens)
        seconds = time.monotonic() - started
    return "\n".join(_summary(found, tokenizer, output, _bytes_in(output) - before, seconds))


def _summary(found: TokenSet, tokenizer: Tokenizer, output: Path, n_bytes: int, seconds: float) -> Iterator[str]:
    yield Corpus.of_set(found, tokenizer).summary
    left_out = f"; left out {found.manifest.n_blank:,} documents without text" if found.manifest.n_blank else ""
    nuls = f"; {found.manifest.nuls:,} NUL bytes: is it really text?" if found.manifest.nuls else ""
    n_files = sum(map(len, found.manifest.shards))
    yield f"{output}: {counted(n_files, 'token file')}, tokenizer {tokenizer.name}{left_out}{nuls}"
    if n_bytes:
        yield f"{n_bytes / 1e6:,.1f} MB in {seconds:,.1f} s: {n_bytes / 1e6 / seconds:,.2f} MB/s"
    else:
        yield "it was complete: nothing was left to do"
    yield f"train on it: nanokimi train --dataset tokenbin --data_path {output}"


def _bytes_in(folder: Path) -> int:
    try:
        shards = Manifest.read(folder).shards
    except TokenFileError:
        return 0
    return sum(TokenFile.open(folder / name).n_bytes for names in shards for name in names)


@contextmanager
def _own(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes out; UserError if it is in use or holds what no token set holds."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written ({error.strerror}): choose another folder") from error
    try:
        try:
            lock(descriptor)
        except BlockingIOError:
            raise UserError(f"--output {folder}: another process is writing there: choose another folder") from None
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        if MANIFEST not in names and (foreign := sorted(names - {TOKENIZER})):
            raise UserError(f"--output {folder} holds something else ({foreign[0]}): choose a new or empty folder")
        yield
    finally:
        os.close(descriptor)


def _require_same_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Raises UserError where the folder has no manifest yet and a tokenizer that would be overwritten by another."""
    path, begun = folder / TOKENIZER, (folder / MANIFEST).exists()
    if not begun and path.exists() and load_tokenizer(str(path)).fingerprint != tokenizer.fingerprint:
        raise UserError(f"--output {folder} holds another tokenizer: choose a new or empty folder")


# ---- Python's own library as a text -----------------------------------------------------------------


def prepare_stdlib(output: str | Path = "data/train.txt", *, library: str | Path | None = None) -> str:
    """Writes the sources of Python's standard ``library`` and its language reference as one text.

    Each source file or topic is a document. Returns a line that says what was written.

    Raises:
        UserError: there are no sources in the folder, or ``output`` is a folder.
        RunError: ``output`` cannot be written.
    """
    output = Path(output)
    folder = Path(library or sysconfig.get_path("stdlib"))
    if output.is_dir():
        raise UserError(f"--output {output} is a directory: name the text file to write")
    own = (p for p in sorted(folder.rglob("*.py")) if _LEFT_OUT.isdisjoint(p.relative_to(folder).parts[:-1]))
    sources = [_read(path) for path in own if path.is_file()]
    if not sources:
        raise UserError(f"{folder} holds no Python sources: train on a text of your own with --data_path")
    files = [text for text in sources if text]
    topics = _topics()
    text = f"{END_OF_TEXT}\n".join(files + topics).encode()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output) as file:
            file.write(text)
    except OSError as error:
        raise RunError(f"--output {output} cannot be written: {error.strerror}") from error
    return (
        f"{output}: {len(files)} source files and {len(topics)} topics of the language reference, "
        f"{len(text) / 1e6:.1f} MB; left out {sources.count(None)} that are not UTF-8 or hold a line {END_OF_TEXT}"
    )


def _read(path: Path) -> str | None:
    """The file as one document, ``""`` when it is blank, None when it cannot be one."""
    try:
        return _document(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        return None


def _document(text: str) -> str | None:
    if END_OF_TEXT in text.splitlines():
        return None
    return text.rstrip("\n") + "\n" if text.strip() else ""


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions put it in a package of its own
        return []
    return [document for _, text in sorted(topics.items()) if (document := _document(text))]
