"""The latent cache: what decoding remembers of the tokens before (DeepSeek-V2, section 2.1.3).

Every row has a length of its own, so that sequences of unequal length decode together.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.memory import lazy_zeros


class CacheSlots(NamedTuple):
    """Where in a cache the T new tokens of a forward pass go, and what they see; S is the longest row with them.

    Attributes:
        entries: of the whole cache, ``[L, rows of the cache, max_length, R + P]``.
        written: the rows and columns that the new tokens take, as an index of ``[rows, max_length]``.
        seen: the B rows that take part, as an index.
        positions: an index into the rotary tables that gives ``[T, P / 2]``, or ``[B, T, P / 2]`` for ragged rows.
        span: S.
        attn_mask: bool, broadcasts to ``[B, H, T, S]``: what a token may attend to; None: to everything.
    """

    entries: Tensor
    written: tuple[Any, Any]
    seen: slice | Tensor
    positions: slice | Tensor
    span: int
    attn_mask: Tensor | None

    def append(self, layer: int, new: Tensor) -> Tensor:
        """Stores ``new`` ``[B, T, R + P]``; returns all that ``layer`` holds of these rows, ``[B, S, R + P]``."""
        entries = self.entries[layer]
        entries[self.written] = new
        return entries[self.seen, : self.span]


class LatentCache:
    """Per layer and token the normalised latent and the rotated key that all heads share.

    Attributes:
        entries: ``[L, B, max_length, R + P]``.
        lengths: tokens that each row holds, the same for every layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int = 1,
        max_length: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.max_length = config.max_seq_length if max_length is None else max_length
        shape = (config.n_layers, batch_size, self.max_length, sum(config.cache_widths))
        on_host = torch.device(device or "cpu").type == "cpu"
        self.entries = lazy_zeros(shape, dtype) if on_host else torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch_size
        self.rows: Sequence[int] = range(batch_size)

    def select(self, rows: Sequence[int]) -> LatentCache:
        """Some rows, each once, as a cache of their own over the same memory and the same ``lengths``."""
        part = copy.copy(self)
        part.rows = rows
        return part

    def advance(self, tokens: int) -> None:
        """Counts ``tokens`` more in every row: called once all layers have stored theirs."""
        for row in self.rows:
            self.lengths[row] += tokens

    def slots(self, tokens: int) -> CacheSlots:
        """Slots for so many new tokens of every row.

        Raises:
            ValueError: there is no room for them.
        """
        lengths = [self.lengths[row] for row in self.rows]
        end = max(lengths) + tokens
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, {end} are needed")
        if min(lengths) < max(lengths):
            positions = torch.tensor(lengths)[:, None] + torch.arange(tokens)  # [B, T]
            positions = positions.to(self.entries.device, non_blocking=True)
            ragged = torch.tensor(self.rows).to(self.entries.device, non_blocking=True)
            return ragged_slots(self.entries, ragged, positions, seen=self._index(), span=end)
        columns = slice(end - tokens, end)
        rows = self._index()
        attn_mask = None
        if 1 < tokens < end:  # in empty rows tokens attend in the expanded form, which is causal by itself
            attn_mask = torch.ones(tokens, end, dtype=torch.bool, device=self.entries.device).tril(end - tokens)
        return CacheSlots(self.entries, (rows, columns), rows, columns, end, attn_mask)

    def _index(self) -> slice | Tensor:
        """The rows as an index: a slice, which copies nothing, where they stand side by side."""
        first, n = self.rows[0], len(self.rows)
        if list(self.rows) == list(range(first, first + n)):
            return slice(first, first + n)
        return torch.tensor(self.rows).to(self.entries.device, non_blocking=True)


def ragged_slots(entries: Tensor, rows: Tensor, positions: Tensor, *, seen: slice | Tensor, span: int) -> CacheSlots:
    """``CacheSlots`` from indices on the device, without waiting for it; shapes depend on B, T and ``span`` alone.

    Args:
        entries: of the cache.
        rows: ``[B]`` int64.
        positions: ``[B, T]`` int64, of the new tokens.
        seen: the same rows, where there is a cheaper index than ``rows``.
        span: leading columns to look at.
    """
    attn_mask = torch.arange(span, device=entries.device) <= positions[:, None, :, None]
    return CacheSlots(entries, (rows[:, None], positions), seen, positions, span, attn_mask)
