"""Several prompts at once: sequences of any lengths share a decoder, and a new one takes the place of each done."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from nanokimi.errors import UserError
from nanokimi.inference.decoder import Decoder, new_decoder
from nanokimi.inference.engine import check_prompt, context_of, draw, evaluating
from nanokimi.inference.sampling import new_generator
from nanokimi.inference.settings import Settings
from nanokimi.model.transformer import Transformer

MOST_SLOTS = 32  # decoded together unless the caller says more: each holds a cache of the longest sequence


@dataclass
class _Sequence:
    """One prompt and what has been written behind it."""

    prompt: Sequence[int]
    length: int  # of prompt and continuation together, at most
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)
    stopped: bool = False

    @property
    def done(self) -> bool:
        return self.stopped or len(self.prompt) + len(self.ids) >= self.length

    def take(self, token: int, stop_tokens: Collection[int]) -> None:
        self.stopped = token in stop_tokens
        if not self.stopped:
            self.ids.append(token)


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

    Every sequence draws from a generator of its own: it becomes what ``generate_tokens`` makes of it alone, with
    its seed and the same kind of decoder. See ``Settings`` for the choices.

    Args:
        seeds: one for each prompt (default: new draws each time).
        decoder: one made for ``model``, all of whose slots are used anew (default: ``new_decoder`` of up to
            ``MOST_SLOTS`` slots).

    Raises:
        UserError: a choice is out of range, or a prompt is empty, longer than the context or not in the vocabulary.
    """
    settings = Settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, max_tokens=max_tokens)
    sequences = _sequences(model, prompts, settings, seeds, context_of(model, decoder))
    waiting = [sequence for sequence in sequences if not sequence.done]
    if waiting:
        longest = max(sequence.length for sequence in waiting)
        decoder = decoder or new_decoder(model, slots=min(len(waiting), MOST_SLOTS), max_length=longest)
        with evaluating(model):
            _decode(decoder, iter(waiting), settings, stop_tokens)
    return [sequence.ids for sequence in sequences]


def _sequences(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    seeds: Sequence[int | None] | None,
    context: int,
) -> list[_Sequence]:
    seeds = [None] * len(prompts) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise UserError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one for each prompt, or none")
    device = next(model.parameters()).device
    sequences = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        check_prompt(model, prompt, context)
        checked = dataclasses.replace(settings, seed=seed)
        length = min(len(prompt) + settings.max_tokens, context)
        sequences.append(_Sequence(prompt, length, new_generator(checked.seed, device)))
    return sequences


def _decode(decoder: Decoder, waiting: Iterator[_Sequence], settings: Settings, stop_tokens: Collection[int]) -> None:
    """Works off ``waiting``: free slots are filled by prefill, then every slot in use moves on by one token."""
    running: dict[int, _Sequence] = {}
    while True:
        for slot in range(decoder.slots):
            while slot not in running and (sequence := next(waiting, None)) is not None:
                decoder.reset(slot)
                logits = decoder.prefill(slot, sequence.prompt)
                sequence.take(draw(logits[None], settings, [sequence.generator])[0], stop_tokens)
                if not sequence.done:
                    running[slot] = sequence
        if not running:
            return
        slots = sorted(running)
        logits = decoder.step(slots, [running[slot].ids[-1] for slot in slots])
        tokens = draw(logits, settings, [running[slot].generator for slot in slots])
        for slot, token in zip(slots, tokens, strict=True):
            running[slot].take(token, stop_tokens)
            if running[slot].done:
                del running[slot]
