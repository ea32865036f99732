"""One long row of tokens cut into full training sequences."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from nanokimi.errors import UserError

# T sequence length, N tokens


class PackedSequences(Dataset[Tensor]):
    """Sequences of ``length`` inputs and their labels; item i is int64 [T + 1].

    Inputs are ``item[:-1]``, labels ``item[1:]``: neighbours overlap by one token, so that every token but the
    first is predicted exactly once and only the last remainder is dropped. Documents follow one another with an
    end-of-text token between them.

    Args:
        tokens: ids [N], any unsigned dtype; a mapped file stays mapped.
        length: T, the model's context.

    Raises:
        UserError: there are not enough tokens for one sequence.
    """

    def __init__(self, tokens: NDArray[Any], length: int) -> None:
        self.tokens, self.length = tokens, length
        self._count = (len(tokens) - 1) // length
        if self._count < 1:
            raise UserError(
                f"the text is too short: one sequence of max_seq_length {length} needs {length + 1} tokens, the text "
                f"has {len(tokens)}: use more text (--data_path) or a shorter context (--set max_seq_length=...)"
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._count:
            raise IndexError(index)
        start = index * self.length
        return torch.from_numpy(self.tokens[start : start + self.length + 1].astype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes that are not forked map the file again instead of getting a copy of its contents."""
        state, tokens = dict(self.__dict__), self.tokens
        if isinstance(tokens, np.memmap) and isinstance(tokens.base, mmap.mmap):
            state["tokens"] = (tokens.filename, tokens.dtype, tokens.offset, tokens.shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.tokens, tuple):
            path, dtype, offset, shape = self.tokens
            self.tokens = np.memmap(path, dtype, "r", offset, shape)
