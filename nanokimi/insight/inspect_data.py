"""``nanokimi inspect data``: what a run would be trained on, in words, samples and a picture of the lengths."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nanokimi.config import ModelConfig, TrainConfig, from_dict
from nanokimi.console import aligned, counted, log, one_line
from nanokimi.console import show as show_text
from nanokimi.data.batch import TokenArray
from nanokimi.data.corpus import Corpus
from nanokimi.data.loader import BatchLoader, Loader, LoaderOptions, MixLoader, permutation
from nanokimi.data.sources import open_corpus
from nanokimi.data.stream import StreamLoader
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import RunError, UserError
from nanokimi.files import atomic_write, disk_errors_explained, require_writable
from nanokimi.pictures import matplotlib_without_screen

BLOCK_TOKENS = 1 << 14
LOOK_AROUND = 1 << 20  # tokens before and after a sequence among which the ends of its documents are looked for
BAR = 40  # characters of the longest bar
HEAD_TOKENS, TAIL_TOKENS = 200, 100  # shown of a longer sequence
FREQUENT = 10  # tokens listed
PAIRS = 5  # tokens shown with their labels
BINS = 48  # of the picture
# Control characters except line break and tab are shown by their pictures in Unicode, or by their number.
PICTURES: dict[int, int | str] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
PICTURES |= {127: 0x2421} | {code: f"\\x{code:x}" for code in range(128, 160)}

Tokens = NDArray[np.int64]


def run_inspect(train: Mapping[str, Any], model: Mapping[str, Any], *, sequences: int, show: int, output: Path) -> int:
    """Prints what a run with these settings would be trained on and draws its documents' lengths; returns 0.

    Args:
        train, model: settings by field name.
        sequences: how many to look at; of a source that ends, at most one epoch.
        show: how many of them to print.
        output: the PNG file.

    Raises:
        UserError: a setting or the data cannot be used, ``output`` cannot be written.
        RunError: the disk is full, the network failed.
    """
    if sequences < 1:
        raise UserError(f"--sequences must be 1 or more, got {sequences}")
    if show < 0:
        raise UserError(f"--show must be 0 or more, got {show}")
    config = from_dict(TrainConfig, train)
    model_config = ModelConfig.preset(config.preset, **model)
    require_writable(output, example="data_lengths.png")
    corpus = open_corpus(config, model_config.tokenizer_name, named="tokenizer_name" in model, log=log)
    context, tokenizer = model_config.max_seq_length, corpus.tokenizer
    options = LoaderOptions(context, 1, config.seed, config.num_workers, shuffle_buffer=config.shuffle_buffer)
    found = look_at(corpus, options, sequences, keep=max(1, show))
    picture = _picture(found.documents, context, output)
    lines = [*_about_sequences(found, corpus, context, sequences), *_about_lengths(found, context)]
    lines += _about_tokens(found, tokenizer)
    for number, sequence in enumerate(found.samples[:show], 1):
        lines += _sample(number, sequence[:-1], tokenizer)
    show_text("\n".join([*lines, *_labels(found.samples[0], tokenizer), "", picture]))
    return 0


# ---- what is counted ----------------------------------------------------------------------------


class Document(NamedTuple):
    """A document, or what is seen of one: its length without the end of text, and a digest of its tokens."""

    n_tokens: int
    whole: bool
    digest: bytes


@dataclass
class Findings:
    """What was seen in some sequences; every token counts once, as an input."""

    counts: Tokens  # how often each id occurs [vocab_size]
    n_sequences: int = 0
    n_bytes: int = 0  # of text, which an end of text is not
    n_mixed: int = 0  # sequences with tokens of more than one document
    copies: Counter[bytes] = field(default_factory=Counter)  # how often each sequence was seen, by its digest
    samples: list[Tokens] = field(default_factory=list)  # the first sequences, T + 1 ids each
    documents: list[Document] = field(default_factory=list)
    from_stream: int = 0  # sequences of a stream, whose neighbours are not known
    by_source: dict[str, int] = field(default_factory=dict)  # sequences of each source of a mixture
    epoch: int = 0  # sequences that there are in all; 0 where nobody knows


def look_at(corpus: Corpus, options: LoaderOptions, wanted: int, *, keep: int) -> Findings:
    """Measures the first sequences that training would read, up to ``wanted`` or an epoch; keeps the first ``keep``."""
    loader, tokenizer = corpus.train.loader(options), corpus.tokenizer
    sources = loader.loaders.values() if isinstance(loader, MixLoader) else [loader]
    rows = [source for source in sources if isinstance(source, BatchLoader)]
    found, batches = Findings(np.zeros(tokenizer.vocab_size, np.int64)), iter(loader)
    while (count := min(wanted - found.n_sequences, _left(loader))) > 0:
        for sequence in (batch.rows()[0].numpy() for batch in islice(batches, count)):
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


def _left(loader: Loader) -> int:
    """How many sequences ``loader`` can at least give before it begins again; 0 when it has given everything."""
    if isinstance(loader, MixLoader):
        return min(map(_left, loader.loaders.values()))
    if isinstance(loader, BatchLoader):
        return max(0, len(loader.sequences) - loader.samples)
    assert isinstance(loader, StreamLoader)
    waiting = len(loader.state_dict()["ranks"][0]["buffer"])
    return waiting if loader.epoch else max(1, waiting)


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
        shown, stop = max(given, index * length), (index + 1) * length
        if shown >= stop:
            continue
        low, high = max(given, shown - LOOK_AROUND), min(len(row), stop + LOOK_AROUND)
        start = next((end + 1 for end in _ends(row, shown, low, eot)), low)
        for end in chain(_ends(row, start, high, eot), [high]):
            if start >= stop:
                break
            begins = start == 0 or int(row.read(start - 1, start)[0]) == eot
            finishes = end == len(row) or int(row.read(end, end + 1)[0]) == eot
            yield Document(end - start, begins and finishes, _digest(row.read(start, end)))
            start = given = end + finishes


def _ends(row: TokenArray, start: int, limit: int, eot: int) -> Iterator[int]:
    """Where ends of text are from ``start`` on up to ``limit``, or down to it: the nearest first."""
    forward = limit > start
    for at in range(start, limit, BLOCK_TOKENS if forward else -BLOCK_TOKENS):
        low, high = (at, min(at + BLOCK_TOKENS, limit)) if forward else (max(at - BLOCK_TOKENS, limit), at)
        found = np.flatnonzero(row.read(low, high) == eot) + low
        yield from (found if forward else found[::-1]).tolist()


def _digest(tokens: Tokens) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(tokens).tobytes(), digest_size=16).digest()


# ---- the report ---------------------------------------------------------------------------------


def _about_sequences(found: Findings, corpus: Corpus, context: int, wanted: int) -> Iterator[str]:
    tokenizer, n, n_tokens = corpus.tokenizer, found.n_sequences, int(found.counts.sum())
    yield "Source     " + corpus.summary.replace("; ", "\n").replace("\n", "\n           ")
    yield f"Tokenizer  {tokenizer.name}, {tokenizer.vocab_size:,} entries"
    yield f"Context    {context:,} tokens"
    fewer = f", not {wanted:,}: there the data begins again" if n < wanted else ""
    epoch = f" of an epoch of {found.epoch:,}" if found.epoch else ""
    yield f"\nLooked at {counted(n, 'sequence')}{epoch}{fewer}"
    yield from (f"  {_percent(count, n)} from {name}" for name, count in found.by_source.items())
    yield f"  {n_tokens:,} tokens, {found.n_bytes:,} bytes: {found.n_bytes / n_tokens:.2f} bytes per token"
    yield f"  {counted(int(found.counts[tokenizer.eot_id]), 'document')} ended in them"
    yield f"  {_percent(found.n_mixed, n)} of the sequences show more than one document"


def _about_lengths(found: Findings, context: int) -> Iterator[str]:
    if not found.documents:  # nothing but the ends of some
        return
    lengths = np.array([document.n_tokens for document in found.documents])
    n_cut = sum(not document.whole for document in found.documents)
    parts = " and parts of documents" if n_cut else ""
    yield f"\nLengths of the {counted(len(lengths), 'document')}{parts}, in tokens without the end of text"
    if found.from_stream < found.n_sequences:
        far = f", up to {LOOK_AROUND:,} tokens around a sequence" if n_cut and not found.from_stream else ""
        where = "of the sources that are no streams " if found.from_stream else ""
        yield f"  {where}each in full: what a sequence cuts is put together from the source{far}"
    if found.n_sequences < found.epoch:
        yield "  long ones are met more often than short ones, unless all sequences are looked at"
    longer = f"   longer than the context: {_percent(int((lengths > context).sum()), len(lengths))}"
    if found.from_stream:
        longer, share = "", _percent(n_cut, len(lengths))
        yield f"  {n_cut:,} ({share}) may be cut: of a stream only what a sequence shows is known, and counts"
        yield "  longer sequences show more: --set max_seq_length=..."
    median, high = np.percentile(lengths, [50, 90])
    numbers = {"min": lengths.min(), "median": median, "mean": lengths.mean(), "90 %": high, "max": lengths.max()}
    yield "  " + "   ".join(f"{name} {number:,.0f}" for name, number in numbers.items()) + longer
    yield from _bars(Counter(int(length).bit_length() for length in lengths), context)


def _bars(bins: Counter[int], context: int) -> Iterator[str]:
    """A bar for each number of bits that lengths have, that is from one power of two to the next."""
    width = len(f"{1 << max(bins):,}")
    for bits in range(min(bins), max(bins) + 1):
        low, high = (1 << bits) >> 1, (1 << bits) - 1
        bar = "█" * max(round(BAR * bins[bits] / max(bins.values())), bins[bits] > 0)
        mark = f"  < context {context:,}" if low <= context <= high else ""
        yield f"  {low:>{width},} to {high:>{width},}  {bins[bits]:>8,}  {bar}{mark}"


def _about_tokens(found: Findings, tokenizer: Tokenizer) -> Iterator[str]:
    """How often tokens occur, and how often whole documents and sequences are the same."""
    n_tokens, used = int(found.counts.sum()), int((found.counts > 0).sum())
    yield "\nTokens"
    yield f"  {used:,} of {tokenizer.vocab_size:,} entries occur ({_percent(used, tokenizer.vocab_size)})"
    yield f"  {_percent(int(found.counts[tokenizer.eot_id]), n_tokens)} are ends of text"
    yield "  the most frequent:"
    for token in np.argsort(-found.counts, kind="stable")[: min(FREQUENT, used)].tolist():
        yield f"  {_percent(int(found.counts[token]), n_tokens):>8}  {token:>7}  {_quoted(token, tokenizer)}"
    yield "\nExact copies among what was looked at"
    whole = Counter(document.digest for document in found.documents if document.whole)
    for copies, what in ((whole, "whole document"), (found.copies, "sequence")):
        n, repeated = copies.total(), sum(count for count in copies.values() if count > 1)
        share = f" ({_percent(repeated, n)})" if n else ""
        yield f"  {repeated:,} of {counted(n, what)}{share} were seen more than once"


def _sample(number: int, inputs: Tokens, tokenizer: Tokenizer) -> Iterator[str]:
    """A sequence's inputs, with marks of their own for what is no text."""
    n_documents = int((inputs[:-1] == tokenizer.eot_id).sum()) + 1
    yield f"\nSequence {number}: {counted(len(inputs), 'token')} of {counted(n_documents, 'document')}"
    yield "┌ start of the sequence"
    if len(inputs) > HEAD_TOKENS + TAIL_TOKENS:
        left_out = inputs[HEAD_TOKENS:-TAIL_TOKENS]
        n_ends = int((left_out == tokenizer.eot_id).sum())
        yield from _shown(inputs[:HEAD_TOKENS], tokenizer)
        yield f"┊ ... {counted(len(left_out), 'token')} left out, {counted(n_ends, 'end')} of text among them ..."
        inputs = inputs[-TAIL_TOKENS:]
    yield from _shown(inputs, tokenizer)
    yield "└ end of the sequence"


def _shown(tokens: Tokens, tokenizer: Tokenizer) -> Iterator[str]:
    start = 0
    for end in [*np.flatnonzero(tokens == tokenizer.eot_id).tolist(), len(tokens)]:
        text = tokenizer.decode(tokens[start:end].tolist()).translate(PICTURES)
        yield from (f"│ {line}" for line in text.removesuffix("\n").split("\n") if end > start)
        if end < len(tokens):
            yield "├ end of text"
        start = end + 1


def _labels(sequence: Tokens, tokenizer: Tokenizer) -> Iterator[str]:
    """The first inputs of a sequence above their labels."""
    pairs = [("  input", "  label"), *pairwise(_quoted(id_, tokenizer) for id_ in sequence[: PAIRS + 1].tolist())]
    yield "\nWhat is to be predicted is the next token (sequence 1)"
    yield from aligned(list(zip(*pairs, strict=True)), "<" * len(pairs))


def _quoted(token: int, tokenizer: Tokenizer) -> str:
    """A token as a Python literal: bytes where it is part of a character."""
    if token == tokenizer.eot_id:
        return tokenizer.eot
    piece = tokenizer.token_bytes(token)
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return repr(piece)


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.1f} %" if share >= 0.05 or not part else "<0.1 %"


# ---- the picture --------------------------------------------------------------------------------


def _picture(documents: Sequence[Document], context: int, path: Path) -> str:
    """Draws the lengths to ``path`` if matplotlib can; the line that says so."""
    try:
        with matplotlib_without_screen():
            plot_lengths(documents, context, path)
    except RunError:
        raise
    except Exception as error:  # whatever fonts and settings of its own make it raise
        return f"No picture: matplotlib failed: {one_line(error)}"
    return f"Picture: {path}"


def plot_lengths(documents: Sequence[Document], context: int, path: Path) -> None:
    """Draws a histogram of the documents' lengths, with the context marked, to a PNG of 1100 x 600 pixels at ``path``.

    Documents without a token have no place on a logarithmic axis: they are only counted in the title.

    Raises:
        RunError: ``path`` cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import: not before it is needed
    from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

    whole, cut = (np.array([d.n_tokens for d in documents if d.whole == w and d.n_tokens], int) for w in (True, False))
    lengths = np.concatenate([whole, cut])
    n_empty = len(documents) - len(lengths)
    parts = " and parts of documents" if len(cut) else ""
    empty = f" ({n_empty:,} empty, not drawn)" if n_empty else ""
    figure = Figure(figsize=(11, 6), dpi=100, layout="constrained")
    ax = figure.subplots()
    if len(lengths):
        # Edges between whole numbers, evenly spread over the logarithm as far as whole numbers allow.
        edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, BINS + 1).round()) - 0.5
        labels = ["whole documents" if len(whole) else "", "cut: what a sequence shows" if len(cut) else ""]
        ax.hist(
            [whole, cut], edges.tolist(), stacked=True, color=["#0072B2", "#7F7F7F"], label=labels, edgecolor="white"
        )
        median = float(np.median(lengths))
        ax.axvline(median, color="#222222", linestyle=":", linewidth=1.8, label=f"median: {median:,.0f} tokens")
    ax.axvline(context, color="#D55E00", linestyle="--", linewidth=1.5, label=f"context: {context:,} tokens")
    shown = np.append(lengths, context)
    ax.set(xscale="log", xlim=(shown.min() / 2, shown.max() * 2), axisbelow=True)
    ax.set(xlabel="tokens, without the end of text", ylabel="documents")
    ax.set_title(f"Lengths of {counted(len(documents), 'document')}{parts}{empty}", loc="left", fontweight="bold")
    ax.grid(True, color="#E6E6E6")
    ax.minorticks_off()
    ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=StrMethodFormatter("{x:,.0f}"))
    ax.yaxis.set(major_locator=MaxNLocator(integer=True), major_formatter=StrMethodFormatter("{x:,.0f}"))
    figure.legend(loc="outside upper left", ncols=4, frameon=False)
    with disk_errors_explained("picture", path), atomic_write(path) as file:
        figure.savefig(file, format="png")
