"""The engine: requests join and leave a running batch; every way to generate goes through it.

A step admits what waits, reads one chunk of prompt and gives every running sequence a token. What a sequence becomes
depends on its request alone: its prompt is cut at places that depend on nothing else, it draws from a generator of its
own, and a decoder's rows do not depend on each other.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import RunError, UserError
from nanokimi.inference.decoder import Decoder, new_decoder
from nanokimi.inference.sampling import Report, draw, log_probabilities
from nanokimi.inference.settings import PREFILL_CHUNK, Settings
from nanokimi.inference.text import Piece, TextAssembly
from nanokimi.model.transformer import Transformer

NOT_FINITE = "the model's logits are not finite: its weights are damaged, try an earlier checkpoint"


@dataclass(frozen=True)
class Request:
    """What one continuation is to be.

    Attributes:
        prompt: ids, from one to the context.
        settings: how tokens are drawn and where the text ends.
        stop_tokens: end the continuation and are not part of it.
        logprobs: report each token's log-probability and those of so many likeliest; None reports none.
    """

    prompt: tuple[int, ...]
    settings: Settings
    stop_tokens: tuple[int, ...] = ()
    logprobs: int | None = None


@dataclass
class Result:
    """What a continuation has come to so far.

    Attributes:
        prompt_tokens, tokens: ids of the prompt and ids generated, the stop token not counted.
        prefill_seconds: from a free slot to the first token.
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


class Continuation:
    """One request on its way through the engine.

    Attributes:
        request: as submitted.
        result: grows with every step.
        done: nothing more will come.
        error: why it was broken off, if it was.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None, context: int) -> None:
        self.request = request
        self.result = Result(prompt_tokens=len(request.prompt))
        self.done = False
        self.error: Exception | None = None
        self.slot: int | None = None
        self.read = 0  # prompt tokens in the cache
        self.last = 0  # the newest token, not in the cache yet
        self.room = min(request.settings.max_tokens, context - len(request.prompt))
        self.random = random.Random(request.settings.seed)
        self._text = TextAssembly(tokenizer, request.settings.stop)
        if self.room == 0:
            self.finish("length")

    def take(self) -> Piece | None:
        """Everything new since the last call, or None."""
        return self._text.take()

    def add(self, token: int, report: Report | None) -> None:
        """Takes the next token, which may be the last."""
        if token in self.request.stop_tokens:
            return self.finish("stop")
        self.last = token
        self.result.tokens += 1
        if self._text.push(token, report):
            self.finish("stop")
        elif self.result.tokens == self.room:
            self.finish("length")

    def finish(self, reason: Literal["stop", "length"] | None) -> None:
        """Nothing more comes; None: it was broken off."""
        self.done = True
        self.result.finish_reason = reason
        self._text.end()


Rows = tuple[list[Continuation], Tensor]  # n sequences and the logits [n, V] behind their tokens


class Engine:
    """Sequences in the slots of a decoder, and those that wait for one. One thread at a time.

    Args:
        model: in evaluation mode whenever ``step`` is called.
        tokenizer: makes text of ids; None leaves pieces without text.
        slots, max_length: of the decoder that is made.
        vocab_size: ids from here on are padding and never drawn (default: what the tokenizer has).
        decoder: one made for ``model``, used in the place of a new one.
        prefill_chunk: most prompt tokens read between two tokens of the sequences that are being decoded.

    Attributes:
        max_length: most tokens of a sequence, prompt and continuation.
        slots: sequences decoded together.
        slot_bytes: memory of one sequence's cache, reserved from the start.
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
    def waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._in_slots and not self._waiting

    def submit(self, request: Request) -> Continuation:
        """Puts a request behind those that wait.

        Raises:
            UserError: the prompt is empty, longer than the context or not in the vocabulary.
        """
        check_prompt(request.prompt, self.max_length, self._vocab_size or self.model.config.vocab_size)
        sequence = Continuation(request, self.tokenizer, self.max_length)
        if not sequence.done:
            self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Continuation) -> None:
        """Breaks ``sequence`` off; its slot is free at once. Nothing happens to one that is done."""
        if not sequence.done:
            sequence.finish(None)
            if sequence.slot is None:
                self._waiting.remove(sequence)
            self._release(sequence)

    def step(self) -> list[Continuation]:
        """Moves every running sequence on; returns those that took part, some of them done.

        What goes wrong with a sequence is in its ``error``; the others go on.
        """
        assert not self.model.training, "a model is decoded in evaluation mode"
        started = time.perf_counter()
        self._admit()
        active = list(self._in_slots.values())
        first_tokens = [sequence.result.tokens == 0 for sequence in active]
        rows = self._prefill([s for s in active if s.read < len(s.request.prompt)])
        rows += self._decode([s for s in active if s.result.tokens])
        self._draw(rows)
        elapsed = time.perf_counter() - started
        for sequence, first in zip(active, first_tokens, strict=True):
            if first:
                sequence.result.prefill_seconds += elapsed
            else:
                sequence.result.decode_seconds += elapsed
            if sequence.done:
                self._release(sequence)
        return active

    def _admit(self) -> None:
        for slot in range(self.slots):
            if not self._waiting:
                return
            if slot not in self._in_slots:
                sequence = self._in_slots[slot] = self._waiting.popleft()
                sequence.slot = slot
                self._decoder.reset(slot)

    def _release(self, sequence: Continuation) -> None:
        if sequence.slot is not None:
            del self._in_slots[sequence.slot]
            sequence.slot = None

    def _prefill(self, unread: list[Continuation]) -> list[Rows]:
        """Reads up to a chunk of prompts, oldest first; the logits behind those that are read to the end.

        A chunk is never cut to fit what is left: a sequence's logits would then depend on who else is there.
        """
        rows: list[Rows] = []
        budget = self._prefill_chunk
        for sequence in unread:
            chunk = sequence.request.prompt[sequence.read : sequence.read + self._prefill_chunk]
            if len(chunk) > budget:
                break
            budget -= len(chunk)
            try:
                logits = self._decoder.prefill(_slot(sequence), chunk)
            except Exception as error:
                _fail([sequence], error)
                continue
            sequence.read += len(chunk)
            if sequence.read == len(sequence.request.prompt):
                rows.append(([sequence], logits[None]))
        return rows

    def _decode(self, sequences: list[Continuation]) -> list[Rows]:
        """The logits behind the newest token of each of ``sequences``."""
        if not sequences:
            return []
        sequences = sorted(sequences, key=_slot)
        try:
            logits = self._decoder.step([_slot(s) for s in sequences], [s.last for s in sequences])
        except Exception as error:
            _fail(sequences, error)
            return []
        return [(sequences, logits)]

    @torch.inference_mode()
    def _draw(self, rows: list[Rows]) -> None:
        """Gives each sequence the token that it draws from its logits."""
        sequences = [sequence for group, _ in rows for sequence in group]
        if not sequences:
            return
        logits = rows[0][1] if len(rows) == 1 else torch.cat([part for _, part in rows])
        logits = logits[:, : self._vocab_size]
        finite = (logits.amax(dim=-1) - logits.amin(dim=-1)).isfinite().tolist()
        tokens = draw(logits, [s.request.settings for s in sequences], [s.random.random() for s in sequences])
        reports = log_probabilities(logits, tokens, [s.request.logprobs for s in sequences])
        for sequence, token, report, usable in zip(sequences, tokens, reports, finite, strict=True):
            if usable:
                sequence.add(token, report)
            else:
                _fail([sequence], RunError(NOT_FINITE))


def _slot(sequence: Continuation) -> int:
    assert sequence.slot is not None
    return sequence.slot


def _fail(sequences: list[Continuation], error: Exception) -> None:
    for sequence in sequences:
        sequence.error = error
        sequence.finish(None)


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
