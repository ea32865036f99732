"""Texts of any content in every format: nothing of them is lost, nothing is on both sides of the split."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanokimi.config import TrainConfig
from nanokimi.data.corpus import Corpus
from nanokimi.data.sources import open_corpus
from nanokimi.data.tokenizer import END_OF_TEXT
from nanokimi.errors import UserError
from tests.properties.seam import TRAIN, Bench, answer, tries

pytestmark = pytest.mark.fault("B5")

END = 256  # of the tokenizer `byte`
characters = st.characters(exclude_characters="\ufeff", exclude_categories=["Cs"])
documents = st.lists(st.text(characters, max_size=40) | st.sampled_from(["", " \n", "a\r\nb", "\0", "\r"]), max_size=8)


def lines(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def plain(texts: Sequence[str]) -> bytes:
    return f"\n{END_OF_TEXT}\n".join(texts).encode() + b"\n"


def table(texts: Sequence[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), sink, row_group_size=3)
    return bytes(sink.getvalue())


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


WRITE: dict[str, Callable[[Sequence[str]], bytes]] = {
    "t.txt": plain,
    "t.jsonl": lines,
    "t.parquet": table,
    "t.txt.gz": lambda texts: gzip.compress(plain(texts)),
    "t.jsonl.gz": lambda texts: gzip.compress(lines(texts)),
    "t.txt.zst": lambda texts: zstd(plain(texts)),
}


def sides(corpus: Corpus) -> tuple[list[int], list[int]]:
    """The tokens to train on, and those that are held out."""
    train, val = corpus.train.tokens, corpus.val
    assert train is not None
    return train.read(0, len(train)).tolist(), [] if val is None else val.read(0, len(val)).tolist()


def opened(config: TrainConfig) -> tuple[list[int], list[int], str]:
    """Both sides of a source, or why it cannot be used."""
    try:
        return *sides(open_corpus(config, "byte", log=lambda line: None)), ""
    except UserError as error:
        return [], [], str(error)


def texts_of(tokens: Sequence[int]) -> list[bytes]:
    """The documents that ``tokens`` hold."""
    found: list[bytes] = []
    start = 0
    for at, token in enumerate(tokens):
        if token == END:
            found.append(bytes(tokens[start:at]))
            start = at + 1
    assert start == len(tokens), "the last document has an end"
    return found


@pytest.mark.parametrize("name", WRITE)
@tries(20)
@given(texts=documents, many=st.booleans())
def test_every_document_is_trained_on_or_held_out_and_nothing_of_it_is_lost(
    bench: Bench, name: str, texts: list[str], many: bool
) -> None:
    texts = [f"{i} {text}" for i in range(30) for text in texts] if many else texts
    with_text = [text + "\n" * (".txt" in name) for text in texts]
    wanted = [text.replace("\r\n", "\n").encode() for text in with_text if text.strip()]
    with bench.copy() as folder:
        (folder / name).write_bytes(WRITE[name](texts))
        config = TrainConfig(data_path=str(folder / name), val_fraction=0.2)
        kept, held_out, problem = opened(config)
    if problem:
        assert not wanted or ("val_fraction" in problem and len(wanted) < 3), problem
        return
    found, others = texts_of(kept), texts_of(held_out)
    if len(texts) < 100:  # the end is held out, if need be from within a document on; a part that is blank is left out
        assert "".join(b"".join(found + others).decode().split()) == "".join(b"".join(wanted).decode().split())
    else:
        assert Counter(found + others) == Counter(wanted)
        assert not set(found) & set(others)


@tries(20)
@given(ids=st.lists(st.integers(0, 256), min_size=1, max_size=300), width=st.sampled_from(["<u2", "<u4"]))
def test_rows_of_ids_are_read_as_they_are(bench: Bench, ids: list[int], width: str) -> None:
    with bench.copy() as folder:
        np.array(ids, width).tofile(folder / "t.bin")
        (folder / "t.bin.json").write_text(json.dumps({"dtype": {"<u2": "uint16", "<u4": "uint32"}[width]}))
        config = TrainConfig(dataset="tokenbin", data_path=str(folder / "t.bin"), val_fraction=0.2)
        kept, held_out, problem = opened(config)
    if problem:
        assert any(words in problem for words in ("this is text", "looks like uint32", "holds out")), problem
        return
    joined = kept + held_out
    assert joined == ids if ids.count(END) < 100 else sorted(joined) == sorted(ids)


plain_value = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
json_value: st.SearchStrategy[Any] = st.recursive(
    plain_value, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner), max_leaves=6
)
records = st.lists(st.dictionaries(st.sampled_from(["text", "a", "", "\n"]), json_value) | json_value, max_size=6)
of_lines = records.map(lambda values: "\n".join(json.dumps(value) for value in values).encode())


@pytest.mark.parametrize("name", [*WRITE, "t.bin", "t.json", "t.ndjson"])
@pytest.mark.parametrize("dataset", ["local", "localstreaming", "tokenbin"])
@tries(10)
@given(
    content=of_lines | st.binary(max_size=400) | st.text(max_size=200).map(lambda text: text.encode()),
    packed=st.booleans(),
)
def test_a_file_of_any_content_is_read_or_named_in_one_line(
    bench: Bench, name: str, dataset: str, content: bytes, packed: bool
) -> None:
    if packed and Path(name).suffix in (".gz", ".zst"):
        content = gzip.compress(content) if name.endswith(".gz") else zstd(content)
    with bench.copy() as folder:
        (folder / name).write_bytes(content)
        answer([*TRAIN, "--dataset", dataset, "--data_path", name], folder).require_plain()
