"""Generation for a caller of one's own: ids, pieces of text as they come, the whole continuation, or many at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TypeVar

from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.inference.decoder import Decoder
from nanokimi.inference.engine import Continuation, Engine, Request, Result
from nanokimi.inference.settings import Settings
from nanokimi.inference.text import Piece
from nanokimi.model.transformer import Transformer

MOST_SLOTS = 32  # decoded together unless the caller says more: each holds a cache of the longest sequence

Part = TypeVar("Part")


class Generation(Iterator[Part]):
    """The parts of a continuation, made as they are asked for, and the ``result`` that grows with them."""

    def __init__(self, parts: Generator[Part, None, None], result: Result) -> None:
        self._parts = parts
        self.result = result

    def __next__(self) -> Part:
        return next(self._parts)

    def close(self) -> None:
        """Ends the generation before its time."""
        self._parts.close()


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 100,
    temperature: float = 1.0,
    top_p: float = 0.9,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    decoder: Decoder | None = None,
) -> str:
    """The continuation of ``prompt``, without it; an empty prompt starts a new document.

    See ``Settings`` for the choices, ``stream_tokens`` for ``decoder``. Ends at end of text, at a stop string
    (which is left out), after ``max_tokens``, or where the context is full.

    Raises:
        UserError: a choice is out of range, or the prompt is longer than the context.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    settings = Settings(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, max_tokens=max_tokens, stop=stops
    )
    return "".join(stream(model, tokenizer, prompt, settings, decoder=decoder))


def generate_tokens(
    model: Transformer,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int = 100,
    temperature: float = 1.0,
    top_p: float = 0.9,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop_tokens: Collection[int] = (),
    decoder: Decoder | None = None,
) -> list[int]:
    """The ids that follow ``prompt_ids``; a stop token ends them and is left out. See ``stream_tokens``.

    Raises:
        UserError: a choice is out of range, or the prompt is empty, longer than the context or not in the vocabulary.
    """
    settings = Settings(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, max_tokens=max_tokens
    )
    return list(stream_tokens(model, prompt_ids, settings, stop_tokens=stop_tokens, decoder=decoder))


def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 100,
    temperature: float = 1.0,
    top_p: float = 0.9,
    top_k: int = 0,
    min_p: float = 0.0,
    seeds: Sequence[int | None] | None = None,
    stop_tokens: Collection[int] = (),
    decoder: Decoder | None = None,
) -> list[list[int]]:
    """The ids that follow each of ``prompts``, decoded together; the prompts may be of any lengths.

    Every sequence becomes what ``generate_tokens`` makes of it alone, with its seed and the same kind of decoder.
    See ``Settings`` for the choices.

    Args:
        seeds: one for each prompt (default: new draws each time).
        decoder: one made for ``model``, all of whose slots are used anew (default: ``new_decoder`` of up to
            ``MOST_SLOTS`` slots).

    Raises:
        UserError: a choice is out of range, or a prompt is empty, longer than the context or not in the vocabulary.
    """
    settings = Settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, max_tokens=max_tokens)
    seeds = [None] * len(prompts) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise UserError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one for each prompt, or none")
    if not prompts:
        return []
    longest = max(map(len, prompts)) + max_tokens
    batch = Engine(model, None, slots=min(len(prompts), MOST_SLOTS), max_length=longest, decoder=decoder)
    sequences = [
        batch.submit(Request(tuple(prompt), dataclasses.replace(settings, seed=seed), tuple(stop_tokens)))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    with evaluating(model):
        while not batch.idle:
            batch.step()
    for sequence in sequences:
        if sequence.error is not None:
            raise sequence.error
    written = [sequence.take() for sequence in sequences]
    return [[token.id for token in piece.tokens] if piece else [] for piece in written]


def stream(
    model: Transformer, tokenizer: Tokenizer, prompt: str, settings: Settings, *, decoder: Decoder | None = None
) -> Generation[str]:
    """The continuation in pieces: whole characters, and never a part of a stop string.

    Raises:
        UserError: the prompt is longer than the context, or not Unicode text.
    """
    ids = encode_prompt(tokenizer, prompt)
    return stream_ids(model, tokenizer, ids, settings, stop_tokens=(tokenizer.eot_id,), decoder=decoder)


def stream_ids(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    settings: Settings,
    *,
    stop_tokens: Collection[int] = (),
    decoder: Decoder | None = None,
) -> Generation[str]:
    """``stream`` behind a prompt of ids; see ``stream_tokens`` for the rest."""
    request = Request(tuple(prompt_ids), settings, tuple(stop_tokens))
    own = Engine(model, tokenizer, max_length=_length(request), decoder=decoder)
    sequence = own.submit(request)
    return Generation(_texts(_pieces(own, sequence)), sequence.result)


def stream_tokens(
    model: Transformer,
    prompt_ids: Sequence[int],
    settings: Settings,
    *,
    stop_tokens: Collection[int] = (),
    vocab_size: int | None = None,
    decoder: Decoder | None = None,
) -> Generation[int]:
    """The ids that follow ``prompt_ids``, one at a time; ``settings.stop`` is text and belongs to ``stream``.

    Args:
        vocab_size: ids from here on are padding and never drawn (default: the model's vocabulary).
        decoder: one made for ``model``, whose first slot is used anew. Whoever generates more than once saves by
            this what ``new_decoder`` does, which is called otherwise.

    Raises:
        UserError: the prompt is empty, longer than the context or not in the vocabulary.
    """
    request = Request(tuple(prompt_ids), settings, tuple(stop_tokens))
    own = Engine(model, None, max_length=_length(request), vocab_size=vocab_size, decoder=decoder)
    sequence = own.submit(request)
    return Generation(_ids(_pieces(own, sequence)), sequence.result)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids to start from; an empty prompt starts where a document does, behind an end of text.

    Raises:
        UserError: the prompt holds bytes that are not UTF-8 (Python shows them as lone surrogates).
    """
    try:
        return tokenizer.encode(prompt) or [tokenizer.eot_id]
    except UnicodeEncodeError:
        raise UserError("--prompt is not valid UTF-8: convert it first, for example with iconv") from None


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _length(request: Request) -> int:
    """Most tokens that the sequence can come to; one for a prompt without tokens, which is refused later."""
    return max(1, len(request.prompt) + request.settings.max_tokens)


def _pieces(own: Engine, sequence: Continuation) -> Generator[Piece, None, None]:
    """Steps an engine that works for one sequence alone; a reader who leaves breaks the sequence off."""
    with evaluating(own.model):
        try:
            while True:
                if (piece := sequence.take()) is not None:
                    yield piece
                elif sequence.done:
                    break
                else:
                    own.step()
        finally:
            own.cancel(sequence)
    if sequence.error is not None:
        raise sequence.error


def _texts(pieces: Generator[Piece, None, None]) -> Generator[str, None, None]:
    with closing(pieces):
        for piece in pieces:
            if piece.text:
                yield piece.text


def _ids(pieces: Generator[Piece, None, None]) -> Generator[int, None, None]:
    with closing(pieces):
        for piece in pieces:
            yield from (token.id for token in piece.tokens)
