"""The engine: sequences join and leave a running batch. Every way to generate goes through it.

A step admits what waits, reads one chunk of prompt and gives every running sequence a token. A sequence's tokens
depend on its arguments alone: its prompt is cut at places that depend on nothing else, it draws from a generator of
its own, and a decoder's rows do not depend on each other.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nanokimi.data.tokenizer import TextStream, Tokenizer
from nanokimi.errors import RunError, UserError
from nanokimi.inference.decoder import Decoder
from nanokimi.inference.decoding import new_decoder
from nanokimi.inference.options import PREFILL_CHUNK, SamplingOptions
from nanokimi.inference.sampling import Report, draw, log_probabilities
from nanokimi.model.transformer import Transformer

NOT_FINITE = "the model's logits are not finite: its weights are damaged, try an earlier checkpoint"


@dataclass(frozen=True)
class GenerationArguments:
    """What the engine is given for one continuation.

    Attributes:
        prompt: ids, from one to the context.
        options: how tokens are drawn and where the text ends.
        stop_tokens: end the continuation and are not part of it.
        logprobs: report each token's log-probability and those of so many likeliest; None reports none.
        report_stop: a stop token is among the tokens, although it has no text and is not counted.
    """

    prompt: tuple[int, ...]
    options: SamplingOptions
    stop_tokens: tuple[int, ...] = ()
    logprobs: int | None = None
    report_stop: bool = False


@dataclass
class Result:
    """Counts and times of a continuation so far.

    Attributes:
        prompt_tokens, tokens: ids of the prompt and ids generated, the stop token not counted.
        prefill_seconds: from a free slot to the first token.
        decode_seconds: time for the tokens after it.
        finish_reason: ``stop`` (end of text, stop token or stop string), ``length`` (``max_tokens`` or the
            context is used up), None while it runs or when it was cancelled.
    """

    prompt_tokens: int
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish_reason: Literal["stop", "length"] | None = None

    def summary(self) -> str:
        """One line for people."""
        return f"{figures([self])}, finish_reason {self.finish_reason or 'interrupted'}"


def figures(results: Sequence[Result]) -> str:
    """Tokens generated, their speed after the first ones, and the mean time to the first token."""
    tokens, seconds = sum(r.tokens for r in results), sum(r.decode_seconds for r in results)
    later = sum(max(0, r.tokens - 1) for r in results)
    first = sum(r.prefill_seconds for r in results) / max(1, len(results))
    return f"{tokens} tokens, {later / seconds if seconds else 0:.1f} tokens/s, first token after {first:.2f} s"


class Token(NamedTuple):
    """One token of a continuation.

    Attributes:
        id: its number in the vocabulary.
        text_offset: characters of the continuation before the first byte of this token.
        logprob: natural log of its probability before temperature and filters; None unless it was asked for.
        likeliest: id and log-probability of as many of the likeliest tokens as were asked for, best first.
    """

    id: int
    text_offset: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class TextChunk(NamedTuple):
    """Text that cannot change any more, and the tokens that became settled with it."""

    text: str
    tokens: tuple[Token, ...]


class TextAssembly:
    """Makes the text of one continuation, token by token: whole characters, and no part of a stop string.

    A token is settled when the text up to its last byte is. Tokens whose text begins at a stop string or after it
    are dropped.

    Args:
        tokenizer: None for ids without text; every token is settled at once.
        stop: strings that end the text; they are not part of it.

    Attributes:
        done: nothing more will come.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._stop = stop
        self._held = ""  # decoded and not taken yet
        self._taken = 0  # characters
        self._tokens: deque[tuple[int, Token]] = deque()  # not taken yet, each with the offset at which its text ends
        self.done = False

    def push(self, token: int, report: Report | None = None) -> bool:
        """Adds a token; True when a stop string is complete, which ends the text."""
        offset = end = self._taken + len(self._held)
        if self._stream is not None:
            text = self._stream.push(token)
            self._held += text
            end += len(text) + self._stream.pending
        self._tokens.append((end, Token(token, offset, *(report or ()))))
        # Of several stop strings the one that is complete first counts, of several complete at once the longest: the
        # cut then does not depend on how the text was split into tokens.
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.done = True
            self._held = self._held[: min(found)[1]]
            while self._tokens and self._tokens[-1][1].text_offset >= self._taken + len(self._held):
                self._tokens.pop()
        return self.done

    def push_silent(self, token: int, report: Report | None) -> None:
        """Adds a token that stands at the end of the text and adds none."""
        end = self._taken + len(self._held)
        self._tokens.append((end, Token(token, end, *(report or ()))))

    def take(self) -> TextChunk | None:
        """Everything that has become settled since the last call, or None; once ``done``, all there is."""
        ready = len(self._held)
        if not self.done:  # the longest end with which some stop string begins may still become one
            lengths = (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
            ready -= max(lengths, default=0)
        text, self._held = self._held[:ready], self._held[ready:]
        self._taken += ready
        tokens = []
        while self._tokens and (self.done or self._tokens[0][0] <= self._taken):
            tokens.append(self._tokens.popleft()[1])
        return TextChunk(text, tuple(tokens)) if text or tokens else None


class Continuation(TextAssembly):
    """One sequence on its way through the engine.

    Attributes:
        arguments: as submitted.
        result: grows with every step.
        error: why it ended early, if it failed.
    """

    def __init__(self, arguments: GenerationArguments, tokenizer: Tokenizer | None, context: int) -> None:
        super().__init__(tokenizer, arguments.options.stop)
        self.arguments = arguments
        self.result = Result(prompt_tokens=len(arguments.prompt))
        self.error: Exception | None = None
        self.read = 0  # prompt tokens in the cache
        self.last = 0  # the newest token, not in the cache yet
        self.room = min(arguments.options.max_tokens, context - len(arguments.prompt))
        self.random = random.Random(arguments.options.seed)
        if self.room == 0:
            self.finish("length")

    def add(self, token: int, report: Report | None) -> None:
        """Appends the next token, which may be the last."""
        if token in self.arguments.stop_tokens:
            if self.arguments.report_stop:
                self.push_silent(token, report)
            return self.finish("stop")
        self.last = token
        self.result.tokens += 1
        if self.push(token, report):
            self.finish("stop")
        elif self.result.tokens == self.room:
            self.finish("length")

    def finish(self, reason: Literal["stop", "length"] | None, error: Exception | None = None) -> None:
        """Nothing more comes; the reason is None for a sequence that was cancelled or failed with ``error``."""
        self.done, self.error = True, error
        self.result.finish_reason = reason


Rows = tuple[list[Continuation], Tensor]  # n sequences and the logits [n, V] after their newest tokens


class Engine:
    """Sequences in the slots of a decoder, and those that wait for one. It is used by one thread at a time.

    Args:
        model: in evaluation mode whenever ``step`` is called.
        tokenizer: makes text of ids; with None, chunks hold tokens and no text.
        slots, max_length: of the decoder that is made.
        vocab_size: ids from here on are padding and never drawn (default: the size of the tokenizer's vocabulary).
        decoder: one made for ``model``, used instead of a new one.
        prefill_chunk: most prompt tokens read between two tokens of the sequences that are being decoded.

    Attributes:
        max_length: most tokens of a sequence, prompt and continuation.
        slots: sequences decoded together.
        slot_bytes: memory of one sequence's cache, which it takes as it is filled.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        *,
        slots: int = 1,
        max_length: int | None = None,
        vocab_size: int | None = None,
        decoder: Decoder | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._decoder = decoder or new_decoder(model, slots=slots, max_length=max_length)
        self.max_length, self.slots = self._decoder.max_length, self._decoder.slots
        self.slot_bytes = self._decoder.slot_bytes
        self._prefill_chunk = prefill_chunk
        self._vocab_size = tokenizer.vocab_size if tokenizer is not None else vocab_size
        self._waiting: deque[Continuation] = deque()
        self._in_slots: dict[int, Continuation] = {}

    @property
    def running(self) -> int:
        """Sequences that have a slot."""
        return len(self._in_slots)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._in_slots and not self._waiting

    def submit(self, arguments: GenerationArguments) -> Continuation:
        """Adds a sequence to the end of the queue. UserError: see ``check_prompt``."""
        check_prompt(arguments.prompt, self.max_length, self._vocab_size or self.model.config.vocab_size)
        sequence = Continuation(arguments, self.tokenizer, self.max_length)
        if not sequence.done:
            self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Continuation) -> None:
        """Ends ``sequence`` early; its slot is free at once. Nothing happens to one that is done."""
        if not sequence.done:
            sequence.finish(None)
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            self._free_slots()

    def step(self) -> list[Continuation]:
        """Moves every running sequence on; returns those that took part, some of them done.

        A sequence that fails has its ``error`` set; the others go on.
        """
        assert not self.model.training, "a model is decoded in evaluation mode"
        started = time.perf_counter()
        for slot in range(self.slots):
            if self._waiting and slot not in self._in_slots:
                self._in_slots[slot] = self._waiting.popleft()
                self._decoder.reset(slot)
        active = [(sequence, sequence.result.tokens == 0) for sequence in self._in_slots.values()]
        self._draw(self._prefill() + self._decode())
        elapsed = time.perf_counter() - started
        for sequence, first in active:
            if first:
                sequence.result.prefill_seconds += elapsed
            else:
                sequence.result.decode_seconds += elapsed
        self._free_slots()
        return [sequence for sequence, _ in active]

    def _free_slots(self) -> None:
        self._in_slots = {slot: sequence for slot, sequence in self._in_slots.items() if not sequence.done}

    def _prefill(self) -> list[Rows]:
        """Reads up to a chunk of prompts, oldest first; the logits after those that are read to the end.

        A chunk is never cut to fit what is left: a sequence's logits would then depend on who else is there.
        """
        rows: list[Rows] = []
        budget = self._prefill_chunk
        for slot, sequence in self._in_slots.items():
            part = sequence.arguments.prompt[sequence.read : sequence.read + self._prefill_chunk]
            if len(part) > budget:
                break
            if not part:  # its prompt is read
                continue
            budget -= len(part)
            try:
                logits = self._decoder.prefill(slot, part)
            except Exception as error:
                sequence.finish(None, error)
                continue
            sequence.read += len(part)
            if sequence.read == len(sequence.arguments.prompt):
                rows.append(([sequence], logits[None]))
        return rows

    def _decode(self) -> list[Rows]:
        """The logits after the newest token of each sequence that has one."""
        slots = sorted(slot for slot, sequence in self._in_slots.items() if sequence.result.tokens)
        if not slots:
            return []
        sequences = [self._in_slots[slot] for slot in slots]
        try:
            return [(sequences, self._decoder.step(slots, [sequence.last for sequence in sequences]))]
        except Exception as error:
            for sequence in sequences:
                sequence.finish(None, error)
            return []

    @torch.inference_mode()
    def _draw(self, rows: list[Rows]) -> None:
        """Gives each sequence the token that it draws from its logits."""
        sequences = [sequence for group, _ in rows for sequence in group]
        if not sequences:
            return
        logits = rows[0][1] if len(rows) == 1 else torch.cat([part for _, part in rows])
        logits = logits[:, : self._vocab_size]
        finite = (logits.amax(dim=-1) - logits.amin(dim=-1)).isfinite().tolist()
        tokens = draw(logits, [s.arguments.options for s in sequences], [s.random.random() for s in sequences])
        reports = log_probabilities(logits, tokens, [s.arguments.logprobs for s in sequences])
        for sequence, token, report, usable in zip(sequences, tokens, reports, finite, strict=True):
            if usable:
                sequence.add(token, report)
            else:
                sequence.finish(None, RunError(NOT_FINITE))


def check_prompt(prompt: Sequence[int], context: int, vocab_size: int) -> None:
    """UserError if ``prompt`` is empty, longer than ``context`` or not in the vocabulary."""
    if not prompt:
        raise UserError("the prompt has no tokens: begin with the end-of-text token to start a new document")
    if len(prompt) > context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and the model's context holds {context}: shorten --prompt"
        )
    for token in prompt:
        if not 0 <= token < vocab_size:
            raise UserError(f"the prompt holds token {token}, outside the model's vocabulary of {vocab_size}")
