"""``nanokimi inspect data``: what a run would be trained on, in words, samples and a picture of the lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nanokimi import console
from nanokimi.config import ModelConfig, TrainConfig, from_dict
from nanokimi.data.corpus import Corpus
from nanokimi.data.loader import LoaderOptions
from nanokimi.data.sources import open_corpus
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.files import require_writable
from nanokimi.insight.findings import LOOK_AROUND, Findings, Tokens, look_at

BAR = 40  # characters of the longest bar
HEAD_TOKENS, TAIL_TOKENS = 200, 100  # shown of a longer sequence
FREQUENT = 10  # tokens listed
PAIRS = 5  # tokens shown with their labels
# Control characters but for line break and tab are shown by their pictures in Unicode, or by their number.
PICTURES: dict[int, int | str] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
PICTURES |= {127: 0x2421} | {code: f"\\x{code:x}" for code in range(128, 160)}


def run_inspect(train: Mapping[str, Any], model: Mapping[str, Any], *, sequences: int, show: int, output: Path) -> int:
    """Prints what a run with these settings would be trained on and draws its documents' lengths; returns 0.

    Args:
        train, model: settings by field name, as for ``Request``.
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
    corpus = open_corpus(config, model_config.tokenizer_name, named="tokenizer_name" in model, log=console.log)
    reading = LoaderOptions(
        model_config.max_seq_length, batch_size=1, seed=config.seed, num_workers=config.num_workers,
        shuffle_buffer=config.shuffle_buffer,
    )  # fmt: skip
    from nanokimi.insight.length_plot import plot_lengths  # matplotlib is slow to import: not before it is needed

    found = look_at(corpus, reading, sequences, keep=max(1, show))
    plot_lengths(found.documents, reading.length, output)
    console.show("\n".join([*report(found, corpus, reading, wanted=sequences, show=show), "", f"Picture: {output}"]))
    return 0


# ---- the report ---------------------------------------------------------------------------------


def report(found: Findings, corpus: Corpus, reading: LoaderOptions, *, wanted: int, show: int) -> Iterator[str]:
    """The lines of the report but for control characters, which ``printable`` must still take out.

    Args:
        wanted: how many sequences the user asked for.
        show: how many of the samples to print.
    """
    yield from _about_source(corpus, reading)
    yield from _about_sequences(found, corpus.tokenizer, wanted)
    yield from _about_lengths(found, reading.length)
    yield from _about_tokens(found, corpus.tokenizer)
    yield from _about_copies(found)
    for number, sequence in enumerate(found.samples[:show], 1):
        yield from _sample(number, sequence, corpus.tokenizer)
    yield from _labels(found.samples[0], corpus.tokenizer)


def _about_source(corpus: Corpus, reading: LoaderOptions) -> Iterator[str]:
    first, *others = corpus.summary.replace("; ", "\n").split("\n")
    yield f"Source     {first}"
    yield from (f"           {line}" for line in others)
    yield f"Tokenizer  {corpus.tokenizer.name}, {corpus.tokenizer.vocab_size:,} entries"
    yield f"Context    {reading.length:,} tokens"


def _about_sequences(found: Findings, tokenizer: Tokenizer, wanted: int) -> Iterator[str]:
    n, n_tokens = found.n_sequences, int(found.counts.sum())
    fewer = f", not {wanted:,}: there the data begins again" if n < wanted else ""
    epoch = f" of an epoch of {found.epoch:,}" if found.epoch else ""
    yield f"\nLooked at {_count(n, 'sequence')}{epoch}{fewer}"
    for name, count in found.by_source.items():
        yield f"  {_percent(count, n)} from {name}"
    yield f"  {n_tokens:,} tokens, {found.n_bytes:,} bytes: {found.n_bytes / n_tokens:.2f} bytes per token"
    yield f"  {_count(int(found.counts[tokenizer.eot_id]), 'document')} ended in them"
    yield f"  {_percent(found.n_mixed, n)} of the sequences show more than one document"


def _about_lengths(found: Findings, context: int) -> Iterator[str]:
    if not found.documents:  # nothing but the ends of some
        return
    lengths = np.array([document.n_tokens for document in found.documents])
    n_cut = sum(not document.whole for document in found.documents)
    parts = " and parts of documents" if n_cut else ""
    yield f"\nLengths of the {_count(len(lengths), 'document')}{parts}, in tokens without the end of text"
    yield from _about_cuts(found, n_cut)
    median, high = np.percentile(lengths, [50, 90])
    longer = f"longer than the context: {_percent(int((lengths > context).sum()), len(lengths))}"
    yield (
        f"  min {lengths.min():,}   median {median:,.0f}   mean {lengths.mean():,.0f}   90 % {high:,.0f}   "
        f"max {lengths.max():,}   {longer if not found.from_stream else ''}".rstrip()
    )
    yield from _bars(lengths, context)


def _about_cuts(found: Findings, n_cut: int) -> Iterator[str]:
    """What became of documents that a sequence shows only a part of."""
    if found.from_stream < found.n_sequences:
        far = f", up to {LOOK_AROUND:,} tokens around a sequence" if n_cut and not found.from_stream else ""
        where = "of the sources that are no streams " if found.from_stream else ""
        yield f"  {where}each in full: what a sequence cuts is put together from the source{far}"
    if found.n_sequences < found.epoch:
        yield "  long ones are met more often than short ones, unless all sequences are looked at"
    if found.from_stream:
        share = _percent(n_cut, len(found.documents))
        yield f"  {n_cut:,} ({share}) may be cut: of a stream only what a sequence shows is known, and counts"
        yield "  longer sequences show more: --set max_seq_length=..."


def _bars(lengths: Tokens, context: int) -> Iterator[str]:
    """A histogram by powers of two."""
    bins = Counter(int(length).bit_length() for length in lengths)
    width = len(f"{1 << max(bins):,}")
    for power in range(min(bins), max(bins) + 1):
        low, high = (1 << power) >> 1, max(0, (1 << power) - 1)
        share = bins[power] / max(bins.values())
        bar = "█" * max(round(BAR * share), bins[power] > 0)
        mark = f"  < context {context:,}" if low <= context <= high else ""
        yield f"  {low:>{width},} to {high:>{width},}  {bins[power]:>8,}  {bar}{mark}"


def _about_tokens(found: Findings, tokenizer: Tokenizer) -> Iterator[str]:
    n_tokens, used = int(found.counts.sum()), int((found.counts > 0).sum())
    yield "\nTokens"
    yield f"  {used:,} of {tokenizer.vocab_size:,} entries occur ({_percent(used, tokenizer.vocab_size)})"
    yield f"  {_percent(int(found.counts[tokenizer.eot_id]), n_tokens)} are ends of text"
    yield "  the most frequent:"
    for token in np.argsort(-found.counts, kind="stable")[: min(FREQUENT, used)].tolist():
        yield f"  {_percent(int(found.counts[token]), n_tokens):>8}  {token:>7}  {_quoted(token, tokenizer)}"


def _about_copies(found: Findings) -> Iterator[str]:
    yield "\nExact copies among what was looked at"
    whole = Counter(document.digest for document in found.documents if document.whole)
    for copies, what in ((whole, "whole document"), (found.copies, "sequence")):
        n, repeated = copies.total(), sum(count for count in copies.values() if count > 1)
        share = f" ({_percent(repeated, n)})" if n else ""
        yield f"  {repeated:,} of {_count(n, what)}{share} were seen more than once"


def _sample(number: int, sequence: Tokens, tokenizer: Tokenizer) -> Iterator[str]:
    """A sequence's inputs, with marks of their own for what is no text."""
    inputs = sequence[:-1]
    n_documents = int((inputs[:-1] == tokenizer.eot_id).sum()) + 1
    yield f"\nSequence {number}: {_count(len(inputs), 'token')} of {_count(n_documents, 'document')}"
    yield "┌ start of the sequence"
    if len(inputs) <= HEAD_TOKENS + TAIL_TOKENS:
        yield from _shown(inputs, tokenizer)
    else:
        left_out = inputs[HEAD_TOKENS:-TAIL_TOKENS]
        n_ends = int((left_out == tokenizer.eot_id).sum())
        yield from _shown(inputs[:HEAD_TOKENS], tokenizer)
        yield f"┊ ... {_count(len(left_out), 'token')} left out, {_count(n_ends, 'end')} of text among them ..."
        yield from _shown(inputs[-TAIL_TOKENS:], tokenizer)
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
    tokens = [_quoted(token, tokenizer) for token in sequence[: PAIRS + 1].tolist()]
    pairs = list(pairwise(tokens))
    widths = [max(map(len, pair)) for pair in pairs]
    yield "\nWhat is to be predicted is the next token (sequence 1)"
    for name, row in zip(("input", "label"), zip(*pairs, strict=True), strict=True):
        yield f"  {name}  " + "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()


def _quoted(token: int, tokenizer: Tokenizer) -> str:
    """A token as a Python literal: bytes where it is part of a character."""
    if token == tokenizer.eot_id:
        return tokenizer.eot
    piece = tokenizer.piece(token)
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return repr(piece)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.1f} %" if share >= 0.05 or not part else "<0.1 %"
