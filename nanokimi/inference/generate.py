"""Generation in Python: the whole continuation, its ids, many prompts at once, or text as it comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.inference.decoder import Decoder
from nanokimi.inference.engine import Continuation, Engine, GenerationArguments, TextChunk
from nanokimi.inference.options import SamplingKeywords, SamplingOptions
from nanokimi.model.transformer import Transformer

if TYPE_CHECKING:
    from typing_extensions import Unpack

MOST_SLOTS = 32  # decoded together unless the caller says more: each holds a cache of the longest sequence

Part = TypeVar("Part")


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    stop: str | Sequence[str] = (),
    decoder: Decoder | None = None,
    **options: Unpack[SamplingKeywords],
) -> str:
    """The continuation of ``prompt``, without it; an empty prompt starts a new document.

    It ends at an end of text, at a stop string (which is left out), after ``max_tokens``, or where the context is full.

    Args:
        decoder: as for ``stream_tokens``.
        options: ``max_tokens`` (100), ``temperature`` (1.0), ``top_p`` (0.9), ``top_k`` (0), ``min_p`` (0.0) and
            ``seed`` (None), see ``SamplingOptions``.

    Raises:
        UserError: an option is out of range, or the prompt is longer than the context.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    return "".join(stream(model, tokenizer, prompt, SamplingOptions(**options, stop=stops), decoder=decoder))


def generate_tokens(
    model: Transformer,
    prompt_ids: Sequence[int],
    *,
    stop_tokens: Collection[int] = (),
    decoder: Decoder | None = None,
    **options: Unpack[SamplingKeywords],
) -> list[int]:
    """The ids that follow ``prompt_ids``; a stop token ends them. Options and errors: as ``generate_batch``."""
    return generate_batch(model, [prompt_ids], stop_tokens=stop_tokens, decoder=decoder, **options)[0]


def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int | None] | None = None,
    stop_tokens: Collection[int] = (),
    decoder: Decoder | None = None,
    **options: Unpack[SamplingKeywords],
) -> list[list[int]]:
    """The ids that follow each of ``prompts``, decoded together; the prompts may be of any lengths.

    Every sequence becomes what ``generate_tokens`` makes of it alone, with its seed and the same kind of decoder.
    The options are those of ``generate``.

    Args:
        seeds: one for each prompt (default: ``seed`` for all of them).
        decoder: one made for ``model``, all of whose slots are used anew (default: ``new_decoder`` of up to
            ``MOST_SLOTS`` slots).

    Raises:
        UserError: an option is out of range, or a prompt is empty, longer than the context or not in the vocabulary.
    """
    shared = SamplingOptions(**options)
    if shared.stop:
        raise UserError("stop ends a text and these are ids: give stop_tokens, or use generate")
    seeds = [shared.seed] * len(prompts) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise UserError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one for each prompt, or none")
    if not prompts:
        return []
    length = max(_length(prompt, shared) for prompt in prompts)
    engine = Engine(model, None, slots=min(len(prompts), MOST_SLOTS), max_length=length, decoder=decoder)
    sequences = [
        engine.submit(GenerationArguments(tuple(prompt), dataclasses.replace(shared, seed=seed), tuple(stop_tokens)))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    with evaluating(model):
        while not engine.idle:
            engine.step()
    for sequence in sequences:
        if sequence.error is not None:
            raise sequence.error
    chunks = [sequence.take() for sequence in sequences]
    return [[token.id for token in chunk.tokens] if chunk else [] for chunk in chunks]


class Generation(Iterator[Part]):
    """The parts of a continuation, made as they are asked for, and the ``result`` that grows with them."""

    def __init__(self, engine: Engine, sequence: Continuation, parts: Callable[[TextChunk], Iterable[Part]]) -> None:
        self._parts = _run(engine, sequence, parts)
        self.result = sequence.result

    def __next__(self) -> Part:
        return next(self._parts)

    def close(self) -> None:
        """Ends the generation early."""
        self._parts.close()


def _run(
    engine: Engine, sequence: Continuation, parts: Callable[[TextChunk], Iterable[Part]]
) -> Generator[Part, None, None]:
    """Steps the engine; a reader who leaves cancels the sequence."""
    with evaluating(engine.model):
        try:
            while True:
                if (chunk := sequence.take()) is not None:
                    yield from parts(chunk)
                elif sequence.done:
                    break
                else:
                    engine.step()
        finally:
            engine.cancel(sequence)
    if sequence.error is not None:
        raise sequence.error


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    options: SamplingOptions,
    *,
    stop_tokens: Collection[int] | None = None,
    decoder: Decoder | None = None,
) -> Generation[str]:
    """The continuation as it comes: whole characters, and never a part of a stop string.

    Args:
        stop_tokens: end the continuation and are left out (default: the end of text).
        decoder: as for ``stream_tokens``.

    Raises:
        UserError: the prompt is longer than the context, or not Unicode text.
    """
    ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt
    stops = (tokenizer.eot_id,) if stop_tokens is None else tuple(stop_tokens)
    engine = Engine(model, tokenizer, max_length=_length(ids, options), decoder=decoder)
    sequence = engine.submit(GenerationArguments(tuple(ids), options, stops))
    return Generation(engine, sequence, lambda chunk: [chunk.text] if chunk.text else [])


def stream_tokens(
    model: Transformer,
    prompt_ids: Sequence[int],
    options: SamplingOptions,
    *,
    stop_tokens: Collection[int] = (),
    vocab_size: int | None = None,
    decoder: Decoder | None = None,
) -> Generation[int]:
    """The ids that follow ``prompt_ids``, one at a time; ``options.stop`` is for text and has no effect here.

    Args:
        vocab_size: ids from here on are padding and never drawn (default: the model's vocabulary).
        decoder: one made for ``model``, whose first slot is used anew. The default is a ``new_decoder`` for each
            call, so pass one on if you generate more than once.

    Raises:
        UserError: the prompt is empty, longer than the context or not in the vocabulary.
    """
    length = _length(prompt_ids, options)
    engine = Engine(model, None, max_length=length, vocab_size=vocab_size, decoder=decoder)
    sequence = engine.submit(GenerationArguments(tuple(prompt_ids), options, tuple(stop_tokens)))
    return Generation(engine, sequence, lambda chunk: [token.id for token in chunk.tokens])


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids to start from; an empty prompt starts where a document does, after an end of text.

    Raises:
        UserError: the prompt holds bytes that are not UTF-8 (Python shows them as lone surrogates).
    """
    try:
        return tokenizer.encode(prompt) or [tokenizer.eot_id]
    except UnicodeEncodeError:
        raise UserError("--prompt is not valid UTF-8: convert it first, for example with iconv") from None


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Evaluation mode inside the block, the mode from before after it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _length(prompt: Sequence[int], options: SamplingOptions) -> int:
    """Most tokens that the sequence can come to; one for a prompt without tokens, which is refused later."""
    return max(1, len(prompt) + options.max_tokens)
