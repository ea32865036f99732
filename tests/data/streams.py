"""What the tests of several modules share: small corpora as every kind of file, and loaders over them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import Tensor

from nanokimi.config import TrainConfig
from nanokimi.data import documents, local, stream
from nanokimi.data.batch import Batch
from nanokimi.data.corpus import Corpus
from nanokimi.data.documents import Piece
from nanokimi.data.loader import Loader, LoaderOptions
from nanokimi.data.sources import open_corpus

LENGTH = 24
END = 256  # of the byte tokenizer


def write_text(path: Path, texts: Sequence[str]) -> None:
    path.write_text("<|endoftext|>\n".join(texts), encoding="utf-8")


def write_json_lines(path: Path, texts: Sequence[str | None]) -> None:
    data = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_parquet(path: Path, texts: Sequence[str | None], rows: int = 10) -> None:
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=rows)


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is cut is cut often: parts, pieces, chunks."""
    monkeypatch.setattr(local, "PART_BYTES", 400)
    monkeypatch.setattr(documents, "PIECE_BYTES", 120)
    monkeypatch.setattr(stream, "CHUNK_CHARACTERS", 150)


def corpus(**settings: Any) -> Corpus:
    """A source on bytes, opened as a run opens it."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    return open_corpus(TrainConfig(**values), "byte", log=lambda line: None)


def loader(source: Corpus, *, batch_size: int = 3, seed: int = 5, shuffle_buffer: int = 10, **options: Any) -> Loader:
    return source.train.loader(LoaderOptions(LENGTH, batch_size, seed, shuffle_buffer=shuffle_buffer, **options))


def take(batches: Loader, count: int) -> list[Any]:
    return [batch.rows().tolist() for batch in islice(iter(batches), count)]


def sequences(batches: Sequence[Any]) -> list[tuple[int, ...]]:
    return [tuple(sequence) for batch in batches for sequence in batch]


def inputs(batches: Iterator[Batch]) -> Iterator[bytes]:
    """The inputs of every sequence as text; the end of a document shows as a line end of its own kind."""
    for batch in batches:
        for row in batch.tokens.tolist():
            yield bytes(0xFF if token == END else token for token in row)


def documents_of(pieces: Sequence[Piece]) -> list[str]:
    """The documents that ``pieces`` make up."""
    found = [""]
    for piece in pieces:
        found[-1] += piece.text
        if piece.ends_document:
            found.append("")
    assert found.pop() == ""
    return found


def plain(value: Any) -> Any:
    """Tensors as lists, so that all of a checkpoint can be compared at once."""
    if isinstance(value, Tensor):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
