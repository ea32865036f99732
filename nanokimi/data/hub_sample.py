"""The first rows of a hub data set, fetched once and kept as JSON lines in the user's cache."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from nanokimi.data.documents import Cursor
from nanokimi.data.hub import HubDocuments
from nanokimi.data.prepared import cache_home
from nanokimi.data.progress import reading
from nanokimi.data.text import short_hash
from nanokimi.errors import UserError
from nanokimi.files import disk_errors_explained


def fetch_sample(limit: int, key: list[Any], open_hub: Callable[[], HubDocuments]) -> Path:
    """The file with the rows, one object with a ``text`` a line; from the cache when it is there, without a network.

    A try that was cut off goes on behind its last whole row.

    Args:
        limit: number of rows, above 0.
        key: everything that the user said about them.
        open_hub: makes the ``HubDocuments``; called only when rows have to be fetched.

    Raises:
        UserError: no such data set, or no network and nothing in the cache.
        RunError: the network failed for good, the disk is full.
    """
    if not limit:
        raise UserError("--num_samples 0 takes all of the data set: add --streaming, or say how many documents to take")
    path = cache_home() / "hub" / f"{short_hash([*key, limit])}.jsonl"
    if path.is_file():
        return path
    documents = open_hub()
    with disk_errors_explained("sample", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.stem}-{short_hash(documents.identity)}.part")
        with unfinished.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # a second run waits for the first
            if not path.is_file():
                _fetch(documents, file)
                os.fsync(file.fileno())
                unfinished.rename(path)
    return path


def _fetch(documents: HubDocuments, file: IO[bytes]) -> None:
    """Appends the rows that are not in ``file`` yet."""
    file.seek(0)
    n_rows = end = 0
    for line in file:
        if line.endswith(b"\n"):
            n_rows, end = n_rows + 1, end + len(line)
    file.truncate(end)
    text = ""
    with reading(f"fetching {documents.name}", None, done=end) as advance:
        for piece in documents.read(0, Cursor(at=n_rows), advance):
            text += piece.text
            if piece.ends_document:
                file.write(json.dumps({"text": text}).encode() + b"\n")
                text = ""
    file.flush()
