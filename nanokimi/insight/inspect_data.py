"""``nanokimi inspect data``: what a run would be trained on, in words, samples and a picture of the lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
from nanokimi.files import atomic_write, require_writable
from nanokimi.insight.findings import LOOK_AROUND, Document, Findings, Tokens, look_at

BAR = 40  # characters of the longest bar
HEAD_TOKENS, TAIL_TOKENS = 200, 100  # shown of a longer sequence
FREQUENT = 10  # tokens listed
PAIRS = 5  # tokens shown with their labels
WIDTH, HEIGHT, BINS = 1100, 600, 48  # of the picture, in pixels
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
    context, workers = model_config.max_seq_length, config.num_workers
    options = LoaderOptions(context, 1, config.seed, workers, shuffle_buffer=config.shuffle_buffer)
    found = look_at(corpus, options, sequences, keep=max(1, show))
    plot_lengths(found.documents, context, output)
    lines = [*_about_source(corpus, context), *_about_sequences(found, corpus.tokenizer, sequences)]
    lines += [*_about_lengths(found, context), *_about_tokens(found, corpus.tokenizer), *_about_copies(found)]
    for number, sequence in enumerate(found.samples[:show], 1):
        lines += _sample(number, sequence, corpus.tokenizer)
    console.show("\n".join([*lines, *_labels(found.samples[0], corpus.tokenizer), "", f"Picture: {output}"]))
    return 0


# ---- the report ---------------------------------------------------------------------------------


def _about_source(corpus: Corpus, context: int) -> Iterator[str]:
    first, *others = corpus.summary.replace("; ", "\n").split("\n")
    yield f"Source     {first}"
    yield from (f"           {line}" for line in others)
    yield f"Tokenizer  {corpus.tokenizer.name}, {corpus.tokenizer.vocab_size:,} entries"
    yield f"Context    {context:,} tokens"


def _about_sequences(found: Findings, tokenizer: Tokenizer, wanted: int) -> Iterator[str]:
    n, n_tokens = found.n_sequences, int(found.counts.sum())
    fewer = f", not {wanted:,}: there the data begins again" if n < wanted else ""
    epoch = f" of an epoch of {found.epoch:,}" if found.epoch else ""
    yield f"\nLooked at {_count(n, 'sequence')}{epoch}{fewer}"
    yield from (f"  {_percent(count, n)} from {name}" for name, count in found.by_source.items())
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
    if found.from_stream < found.n_sequences:
        far = f", up to {LOOK_AROUND:,} tokens around a sequence" if n_cut and not found.from_stream else ""
        where = "of the sources that are no streams " if found.from_stream else ""
        yield f"  {where}each in full: what a sequence cuts is put together from the source{far}"
    if found.n_sequences < found.epoch:
        yield "  long ones are met more often than short ones, unless all sequences are looked at"
    if found.from_stream:
        share = _percent(n_cut, len(lengths))
        yield f"  {n_cut:,} ({share}) may be cut: of a stream only what a sequence shows is known, and counts"
        yield "  longer sequences show more: --set max_seq_length=..."
    median, high = np.percentile(lengths, [50, 90])
    longer = f"longer than the context: {_percent(int((lengths > context).sum()), len(lengths))}"
    yield (
        f"  min {lengths.min():,}   median {median:,.0f}   mean {lengths.mean():,.0f}   90 % {high:,.0f}   "
        f"max {lengths.max():,}   {longer if not found.from_stream else ''}".rstrip()
    )
    bins = Counter(int(length).bit_length() for length in lengths)  # by powers of two
    width = len(f"{1 << max(bins):,}")
    for power in range(min(bins), max(bins) + 1):
        low, high = (1 << power) >> 1, max(0, (1 << power) - 1)
        bar = "█" * max(round(BAR * bins[power] / max(bins.values())), bins[power] > 0)
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
    pairs = list(pairwise(_quoted(token, tokenizer) for token in sequence[: PAIRS + 1].tolist()))
    widths = [max(map(len, pair)) for pair in pairs]
    yield "\nWhat is to be predicted is the next token (sequence 1)"
    for name, row in zip(("input", "label"), zip(*pairs, strict=True), strict=True):
        yield f"  {name}  " + "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()


def _quoted(token: int, tokenizer: Tokenizer) -> str:
    """A token as a Python literal: bytes where it is part of a character."""
    if token == tokenizer.eot_id:
        return tokenizer.eot
    piece = tokenizer.token_bytes(token)
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return repr(piece)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.1f} %" if share >= 0.05 or not part else "<0.1 %"


# ---- the picture --------------------------------------------------------------------------------


def plot_lengths(documents: Sequence[Document], context: int, path: Path) -> None:
    """Draws a histogram of the documents' lengths, with the context marked, to a PNG of 1100 x 600 pixels at ``path``.

    Documents without a token have no place on a logarithmic axis: they are only counted in the title.

    Raises:
        RunError: ``path`` cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import: not before it is needed

    from nanokimi.training.metrics import cannot_write
    from nanokimi.training.plots import DPI

    whole, cut = (np.array([d.n_tokens for d in documents if d.whole == w and d.n_tokens], int) for w in (True, False))
    parts = " and parts of documents" if len(cut) else ""
    n_empty = len(documents) - len(whole) - len(cut)
    empty = f" ({n_empty:,} empty, not drawn)" if n_empty else ""
    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
    figure.subplots_adjust(left=0.07, right=0.98, top=0.85, bottom=0.1)
    _draw(figure.subplots(), whole, cut, context, f"Lengths of {_count(len(documents), 'document')}{parts}{empty}")
    try:
        with atomic_write(path) as file:
            figure.savefig(file, format="png")
    except OSError as error:
        raise cannot_write(path, error) from error


def _draw(ax: Any, whole: Tokens, cut: Tokens, context: int, title: str) -> None:
    """Stacked bars, the median and the context; the legend is above, where no bar can be."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    from nanokimi.training.plots import BLUE, FONT_SIZE, GREY, RED, ROUND_STEPS

    lengths = np.concatenate([whole, cut])
    kinds = [k for k in ((whole, BLUE, "whole documents"), (cut, GREY, "cut: what a sequence shows")) if len(k[0])]
    if kinds:
        values, colors, labels = zip(*kinds, strict=True)
        # Edges between whole numbers, evenly spread over the logarithm as far as whole numbers allow.
        edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, BINS + 1).round()) - 0.5
        ax.hist(values, edges, stacked=True, color=colors, label=labels, edgecolor="white", linewidth=0.4)
        median = float(np.median(lengths))
        ax.axvline(median, color="#222222", linestyle=":", linewidth=1.8, label=f"median: {median:,.0f} tokens")
    ax.axvline(context, color=RED, linestyle="--", linewidth=1.5, label=f"context: {context:,} tokens")
    shown = np.append(lengths, context)
    low, high = float(shown.min()), float(shown.max())
    margin = max(1.25, (10 * low / high) ** 0.5)  # a decade or more, or there would hardly be a number below
    ax.set(xscale="log", xlim=(low / margin, high * margin), axisbelow=True)
    ax.set_title(title, loc="left", fontsize=FONT_SIZE + 3, fontweight="bold", pad=28)
    ax.set_xlabel("tokens, without the end of text", fontsize=FONT_SIZE + 1)
    ax.set_ylabel("documents", fontsize=FONT_SIZE + 1)
    ax.tick_params(which="both", labelsize=FONT_SIZE, color=GREY)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#E6E6E6", linewidth=0.8)
    ax.yaxis.set(major_locator=MaxNLocator(7, integer=True, steps=ROUND_STEPS))
    ax.xaxis.set(major_locator=LogLocator(subs=(1.0, 2.0, 5.0) if high < 3000 * low else (1.0,), numticks=20))
    ax.xaxis.set(minor_locator=NullLocator())
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.005), "ncols": 4, "borderpad": 0.0, "borderaxespad": 0.3}
    ax.legend(frameon=False, fontsize=FONT_SIZE + 1, handlelength=1.5, columnspacing=1.5, **place)
