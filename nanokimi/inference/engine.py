"""Generation through the latent cache: ids, text pieces as they come, or the whole continuation."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from nanokimi.data.tokenizer import TextStream, Tokenizer
from nanokimi.errors import RunError, UserError
from nanokimi.inference.sampling import new_generator, sample
from nanokimi.inference.settings import Settings
from nanokimi.model.attention import LatentCache
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
) -> str:
    """The continuation of ``prompt``, without it; an empty prompt starts a new document.

    See ``Settings`` for the choices. Ends at end of text, at a stop string (which is left out), after
    ``max_tokens``, or where the context is full.

    Raises:
        UserError: a choice is out of range, or the prompt is longer than the context.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    settings = Settings(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, max_tokens=max_tokens, stop=stops
    )
    return "".join(stream(model, tokenizer, prompt, settings))


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
) -> list[int]:
    """The ids that follow ``prompt_ids``; a stop token ends them and is left out.

    Raises:
        UserError: a choice is out of range, or the prompt is empty, longer than the context or not in the vocabulary.
    """
    settings = Settings(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, max_tokens=max_tokens
    )
    return list(stream_tokens(model, prompt_ids, settings, stop_tokens=stop_tokens))


def stream(model: Transformer, tokenizer: Tokenizer, prompt: str, settings: Settings) -> Generation[str]:
    """The continuation in pieces: whole characters, and never a part of a stop string.

    Raises:
        UserError: the prompt is longer than the context, or not Unicode text.
    """
    ids = encode_prompt(tokenizer, prompt)
    tokens = stream_tokens(model, ids, settings, stop_tokens=(tokenizer.eot_id,), vocab_size=tokenizer.vocab_size)
    return Generation(_text(tokens, tokenizer, settings.stop), tokens.result)


def stream_tokens(
    model: Transformer,
    prompt_ids: Sequence[int],
    settings: Settings,
    *,
    stop_tokens: Collection[int] = (),
    vocab_size: int | None = None,
) -> Generation[int]:
    """The ids that follow ``prompt_ids``, one at a time; ``settings.stop`` is text and belongs to ``stream``.

    Args:
        vocab_size: ids from here on are padding and never drawn (default: the model's vocabulary).

    Raises:
        UserError: the prompt is empty, longer than the context or not in the vocabulary.
    """
    config = model.config
    if not prompt_ids:
        raise UserError("the prompt has no tokens: begin with the end-of-text token to start a new document")
    if len(prompt_ids) > config.max_seq_length:
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens and the model's context holds {config.max_seq_length}: "
            "shorten --prompt"
        )
    for token in prompt_ids:
        if not 0 <= token < config.vocab_size:
            raise UserError(f"the prompt holds token {token}, outside the model's vocabulary of {config.vocab_size}")
    result = Result(prompt_tokens=len(prompt_ids))
    return Generation(_tokens(model, list(prompt_ids), settings, stop_tokens, vocab_size, result), result)


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
) -> Generator[int, None, None]:
    """Prefill in one piece, then a token at a time; prompt and continuation together fit the context."""
    weight = next(model.parameters())
    length = min(len(prompt) + settings.max_tokens, model.config.max_seq_length)
    cache = LatentCache(model.config, 1, length, device=weight.device, dtype=weight.dtype)
    generator = new_generator(settings.seed, weight.device)
    pending = prompt
    with _evaluating(model):
        while len(prompt) + result.tokens < length:
            started = time.perf_counter()
            token = _next_token(model, cache, pending, settings, generator, vocab_size)
            elapsed = time.perf_counter() - started
            if pending is prompt:
                result.prefill_seconds = elapsed
            else:
                result.decode_seconds += elapsed
            if token in stop_tokens:
                result.finish_reason = "stop"
                return
            result.tokens += 1
            yield token
            pending = [token]
    result.finish_reason = "length"


@torch.inference_mode()
def _next_token(
    model: Transformer,
    cache: LatentCache,
    pending: list[int],
    settings: Settings,
    generator: torch.Generator,
    vocab_size: int | None,
) -> int:
    """Reads ``pending`` into the cache and draws the id behind it."""
    tokens = torch.tensor([pending], device=generator.device)
    logits = model(tokens, cache=cache, last_only=True)[0, -1]
    if not logits.isfinite().all():
        raise RunError("the model's logits are not finite: its weights are damaged, try an earlier checkpoint")
    return int(sample(logits, settings, generator, vocab_size=vocab_size))


@contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
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
