"""What sequences of training data hold: read with the loader that training uses, each token counted once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nanokimi.data.batch import TokenArray
from nanokimi.data.corpus import Corpus
from nanokimi.data.loader import BatchLoader, Loader, LoaderOptions, MixLoader, permutation
from nanokimi.data.stream import StreamLoader

BLOCK_TOKENS = 1 << 14
LOOK_AROUND = 1 << 20  # tokens before and after a sequence among which the ends of its documents are looked for

Tokens = NDArray[np.int64]


class Document(NamedTuple):
    """A document, or what is seen of one: its length without the end of text, and a digest of its tokens."""

    n_tokens: int
    whole: bool
    digest: bytes


@dataclass
class Findings:
    """What was seen; every token counts once, as an input.

    Attributes:
        counts: how often each id occurs ``[vocab_size]``.
        n_bytes: of text, which an end of text is not.
        n_mixed: sequences with tokens of more than one document.
        copies: how often each sequence was seen, by its digest.
        samples: the first sequences, T + 1 ids each.
        from_stream: sequences of a stream, whose neighbours are not known.
        by_source: sequences of each source of a mixture.
        epoch: sequences that there are in all; 0 where nobody knows.
    """

    counts: Tokens
    n_sequences: int = 0
    n_bytes: int = 0
    n_mixed: int = 0
    copies: Counter[bytes] = field(default_factory=Counter)
    samples: list[Tokens] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    from_stream: int = 0
    by_source: dict[str, int] = field(default_factory=dict)
    epoch: int = 0


def look_at(corpus: Corpus, options: LoaderOptions, wanted: int, *, keep: int) -> Findings:
    """Reads up to ``wanted`` sequences, one a batch, and measures them; keeps the first ``keep``."""
    loader, tokenizer = corpus.train.loader(options), corpus.tokenizer
    sources = loader.loaders.values() if isinstance(loader, MixLoader) else [loader]
    rows = [source for source in sources if isinstance(source, BatchLoader)]
    found = Findings(np.zeros(tokenizer.vocab_size, np.int64))
    for sequence in _once(loader, wanted):
        inputs = sequence[:-1]
        found.n_sequences += 1
        found.n_bytes += tokenizer.count_bytes(torch.from_numpy(inputs))
        found.n_mixed += bool((inputs[:-1] == tokenizer.eot_id).any())
        np.add.at(found.counts, inputs, 1)
        found.copies[_digest(sequence)] += 1
        if len(found.samples) < keep:
            found.samples.append(sequence)
        if sum(row.samples for row in rows) + found.from_stream < found.n_sequences:  # no row gave it
            found.from_stream += 1
            found.documents += seen_documents(sequence, tokenizer.eot_id)
    for row in rows:
        indices = sorted(permutation(row.options.seed, 0, len(row.sequences))[: row.samples].tolist())
        found.documents += whole_documents(row.sequences.tokens, indices, options.length, tokenizer.eot_id)
    if isinstance(loader, BatchLoader):
        found.epoch = len(loader.sequences)
    if isinstance(loader, MixLoader):
        found.by_source = loader.state_dict()["counts"]
    return found


def _once(loader: Loader, wanted: int) -> Iterator[Tokens]:
    """Up to ``wanted`` sequences, int64 [T + 1]; fewer where a source would begin again."""
    batches = iter(loader)
    while (count := min(wanted, _left(loader))) > 0:
        yield from (batch.rows()[0].numpy() for batch in islice(batches, count))
        wanted -= count


def _left(loader: Loader) -> int:
    """How many sequences ``loader`` can at least give before it begins again; 0 when it has given everything."""
    if isinstance(loader, MixLoader):
        return min(map(_left, loader.loaders.values()))
    if isinstance(loader, BatchLoader):
        return max(0, len(loader.sequences) - loader.samples)
    assert isinstance(loader, StreamLoader)
    (state,) = loader.state_dict()["ranks"]
    return len(state["buffer"]) if loader.epoch else max(1, len(state["buffer"]))


def seen_documents(sequence: Tokens, eot: int) -> Iterator[Document]:
    """The documents of one sequence ``[T + 1]`` as far as it shows them; the last token is only looked ahead at."""
    inputs, start = sequence[:-1], 0
    for end in map(int, [*np.flatnonzero(inputs == eot), len(inputs)]):
        if end > start or 0 < start < len(inputs):  # at an edge, nothing of a document is no document
            whole = start > 0 and int(sequence[end]) == eot
            yield Document(end - start, whole, _digest(inputs[start:end]))
        start = end + 1


def whole_documents(row: TokenArray, indices: Sequence[int], length: int, eot: int) -> Iterator[Document]:
    """Every document of which sequences ``indices`` (ascending) of ``row`` show something, once and in full.

    Only one that reaches further than ``LOOK_AROUND`` beyond its sequence may be cut.
    """
    given = 0  # all up to here was given
    for index in indices:
        stop = (index + 1) * length
        if stop <= given:
            continue
        start = _start_of_document(row, given, max(given, index * length), eot)
        for end in _ends(row, start, stop, eot):
            begins = start == 0 or int(row.read(start - 1, start)[0]) == eot
            finishes = end == len(row) or int(row.read(end, end + 1)[0]) == eot
            yield Document(end - start, begins and finishes, _digest(row.read(start, end)))
            start = given = end + finishes


def _start_of_document(row: TokenArray, low: int, position: int, eot: int) -> int:
    """Where the document of the token at ``position`` begins; at the earliest at ``low``."""
    low = max(low, position - LOOK_AROUND)
    while position > low:
        at = max(low, position - BLOCK_TOKENS)
        ends = np.flatnonzero(row.read(at, position) == eot)
        if len(ends):
            return at + int(ends[-1]) + 1
        position = at
    return low


def _ends(row: TokenArray, start: int, stop: int, eot: int) -> Iterator[int]:
    """Where the documents from ``start`` on end, up to that of the token before ``stop``: at an end of text."""
    limit = min(len(row), stop + LOOK_AROUND)
    for at in range(start, limit, BLOCK_TOKENS):
        for end in (np.flatnonzero(row.read(at, min(limit, at + BLOCK_TOKENS)) == eot) + at).tolist():
            yield end
            start = end + 1
            if start >= stop:
                return
    if start < limit:
        yield limit


def _digest(tokens: Tokens) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(tokens).tobytes(), digest_size=16).digest()
