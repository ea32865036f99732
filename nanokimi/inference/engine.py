"""Generation through the latent cache: ids, text pieces as they come, or the whole continuation."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from nanokimi.data.tokenizer import TextStream, Tokenizer
from nanokimi.errors import RunError, UserError
from nanokimi.inference.decoder import Decoder, new_decoder
from nanokimi.inference.sampling import new_generator, sample_each
from nanokimi.inference.settings import Settings
from nanokimi.model.transformer import Transformer

Piece = TypeVar("Piece")


@dataclass
class Result:
    """What a generation has done so far; complete once its last piece has been read.

    Attributes:
        prompt_tokens, tokens: ids read and ids generated, the stop token not counted.
        prefill_seconds: time to the first token.
        decode_seconds: time for the tokens behind it.
        finish_reason: ``stop`` (end of text, stop token or stop string), ``length`` (``max_tokens`` or the
            context is used up), None while it runs or when it was broken off.
    """

    prompt_tokens: int
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed; 0 before there is a second token."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 else 0.0

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.tokens} tokens, {self.tokens_per_second:.1f} tokens/s, "
            f"{self.prompt_tokens} prompt tokens in {self.prefill_seconds:.2f} s, "
            f"finish_reason {self.finish_reason or 'interrupted'}"
        )


class Generation(Iterator[Piece]):
    """The pieces of a continuation, made as they are asked for, and the ``result`` that grows with them."""

    def __init__(self, pieces: Generator[Piece, None, None], result: Result) -> None:
        self._pieces = pieces
        self.result = result

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the generation before its time."""
        self._pieces.close()


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


def stream(
    model: Transformer, tokenizer: Tokenizer, prompt: str, settings: Settings, *, decoder: Decoder | None = None
) -> Generation[str]:
    """The continuation in pieces: whole characters, and never a part of a stop string.

    Raises:
        UserError: the prompt is longer than the context, or not Unicode text.
    """
    ids = encode_prompt(tokenizer, prompt)
    tokens = stream_tokens(
        model, ids, settings, stop_tokens=(tokenizer.eot_id,), vocab_size=tokenizer.vocab_size, decoder=decoder
    )
    return Generation(_text(tokens, tokenizer, settings.stop), tokens.result)


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
    check_prompt(model, prompt_ids, context_of(model, decoder))
    result = Result(prompt_tokens=len(prompt_ids))
    pieces = _tokens(model, list(prompt_ids), settings, stop_tokens, vocab_size, result, decoder)
    return Generation(pieces, result)


def context_of(model: Transformer, decoder: Decoder | None) -> int:
    """Most tokens of a sequence."""
    return model.config.max_seq_length if decoder is None else decoder.max_length


def check_prompt(model: Transformer, prompt_ids: Sequence[int], context: int) -> None:
    """UserError if the prompt is empty, longer than ``context`` or not in the vocabulary."""
    if not prompt_ids:
        raise UserError("the prompt has no tokens: begin with the end-of-text token to start a new document")
    if len(prompt_ids) > context:
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens and the model's context holds {context}: shorten --prompt"
        )
    for token in prompt_ids:
        if not 0 <= token < model.config.vocab_size:
            raise UserError(
                f"the prompt holds token {token}, outside the model's vocabulary of {model.config.vocab_size}"
            )


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids to start from; an empty prompt starts where a document does, behind an end of text.

    Raises:
        UserError: the prompt holds bytes that are not UTF-8 (Python shows them as lone surrogates).
    """
    try:
        return tokenizer.encode(prompt) or [tokenizer.eot_id]
    except UnicodeEncodeError:
        raise UserError("--prompt is not valid UTF-8: convert it first, for example with iconv") from None


def _tokens(
    model: Transformer,
    prompt: list[int],
    settings: Settings,
    stop_tokens: Collection[int],
    vocab_size: int | None,
    result: Result,
    decoder: Decoder | None,
) -> Generator[int, None, None]:
    """Prefill in one piece, then a token at a time; prompt and continuation together fit the context."""
    wanted = len(prompt) + settings.max_tokens
    decoder = decoder or new_decoder(model, max_length=wanted)
    decoder.reset(0)
    length = min(wanted, decoder.max_length)
    generator = new_generator(settings.seed, next(model.parameters()).device)
    token = None
    with evaluating(model):
        while len(prompt) + result.tokens < length:
            started = time.perf_counter()
            logits = decoder.prefill(0, prompt)[None] if token is None else decoder.step([0], [token])
            drawn = draw(logits, settings, [generator], vocab_size)[0]
            elapsed = time.perf_counter() - started
            if token is None:
                result.prefill_seconds = elapsed
            else:
                result.decode_seconds += elapsed
            token = drawn
            if token in stop_tokens:
                result.finish_reason = "stop"
                return
            result.tokens += 1
            yield token
    result.finish_reason = "length"


@torch.inference_mode()
def draw(
    logits: Tensor, settings: Settings, generators: Sequence[torch.Generator], vocab_size: int | None = None
) -> list[int]:
    """One id for each of the n rows of ``logits`` ``[n, vocab]``, each drawn with its own generator.

    Raises:
        RunError: the logits are not finite.
    """
    if not logits.isfinite().all():
        raise RunError("the model's logits are not finite: its weights are damaged, try an earlier checkpoint")
    return [int(token) for token in sample_each(logits, settings, generators, vocab_size=vocab_size).tolist()]


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _text(tokens: Generation[int], tokenizer: Tokenizer, stop: tuple[str, ...]) -> Generator[str, None, None]:
    """Decodes ``tokens`` and holds back whatever may still turn out to be a stop string."""
    decoder, held = TextStream(tokenizer), ""
    with closing(tokens):
        for token in tokens:
            text = held + decoder.push(token)
            end = _stop_start(text, stop)
            if end is not None:
                tokens.result.finish_reason = "stop"
                held = text[:end]
                break
            ready = len(text) - _undecided(text, stop)
            if ready:
                yield text[:ready]
            held = text[ready:]
    if held:
        yield held


def _stop_start(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the stop string begins that is complete first, and of several complete at once the longest.

    Going by the end makes the cut independent of how the text was split into tokens.
    """
    found = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    return min(found)[1] if found else None


def _undecided(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` with which some stop string begins."""
    lengths = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return max(lengths, default=0)
