"""One long row of tokens cut into full training sequences."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from nanokimi.errors import RunError, UserError

# T sequence length, N tokens

Tokens = NDArray[Any]


class TokenRow:
    """One row of tokens that lie in several places: in the shards of a set, in the documents that are not held out.

    Args:
        arrays: ids, any unsigned dtype; mapped files stay mapped.
        runs: ``[runs, 3]``, array number, first token and end of each stretch; None takes all of every array.
    """

    def __init__(self, arrays: Sequence[Tokens], runs: NDArray[np.int64] | None = None) -> None:
        if runs is None:
            runs = np.array([(i, 0, len(array)) for i, array in enumerate(arrays)], np.int64).reshape(-1, 3)
        self._arrays, self._runs = list(arrays), runs
        self._ends = np.cumsum(runs[:, 2] - runs[:, 1])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens ``start`` to ``stop`` of the row.

        Raises:
            RunError: a file was truncated since it was opened.
        """
        tokens = np.empty(stop - start, np.int64)
        self.read_into(tokens, start)
        return tokens

    def read_into(self, out: NDArray[Any], start: int) -> None:
        """Fills ``out`` with the tokens from ``start`` on; see ``read``."""
        done, run = 0, int(self._ends.searchsorted(start, side="right"))
        while done < len(out):
            number, _, end = self._runs[run].tolist()
            begin = end - (int(self._ends[run]) - start - done)
            count = min(len(out) - done, end - begin)
            array = self._arrays[number]
            _require_whole(array)
            out[done : done + count] = array[begin : begin + count]
            done, run = done + count, run + 1

    def part(self, start: int, stop: int) -> TokenRow:
        """The row from token ``start`` to ``stop``, in the same files."""
        runs = self._runs.copy()
        before = self._ends - (runs[:, 2] - runs[:, 1])  # tokens of the row in front of each run
        runs[:, 2] -= np.maximum(0, self._ends - stop)
        runs[:, 1] += np.maximum(0, start - before)
        return TokenRow(self._arrays, runs[runs[:, 1] < runs[:, 2]])

    @classmethod
    def joined(cls, rows: Sequence[TokenRow]) -> TokenRow:
        """One row behind the other."""
        arrays = [array for row in rows for array in row._arrays]
        firsts = np.cumsum([0, *(len(row._arrays) for row in rows)])
        runs = [row._runs + np.array([first, 0, 0]) for row, first in zip(rows, firsts[:-1], strict=True)]
        return cls(arrays, np.concatenate(runs))

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes that are not forked map the files again instead of getting a copy of their contents."""
        return {**self.__dict__, "_arrays": [_reference(array) for array in self._arrays]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._arrays = [np.memmap(a[0], a[1], "r", *a[2:]) if isinstance(a, tuple) else a for a in self._arrays]


class PackedSequences(Dataset[Tensor]):
    """Sequences of ``length`` inputs and their labels; item i is int64 [T + 1].

    Inputs are ``item[:-1]``, labels ``item[1:]``: neighbours overlap by one token, so that every token but the
    first is predicted exactly once and only the last remainder is dropped. Documents follow one another with an
    end-of-text token between them.

    Args:
        tokens: a row of N tokens, or one array of them.
        length: T, the model's context.

    Raises:
        UserError: there are not enough tokens for one sequence.
    """

    def __init__(self, tokens: TokenRow | Tokens, length: int) -> None:
        self.tokens = tokens if isinstance(tokens, TokenRow) else TokenRow([tokens])
        self.length = length
        self._count = (len(self.tokens) - 1) // length
        if self._count < 1:
            raise UserError(too_short(length, len(self.tokens)))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._count:
            raise IndexError(index)
        start = index * self.length
        return torch.from_numpy(self.tokens.read(start, start + self.length + 1))

    def batch(self, indices: Sequence[int]) -> NDArray[np.int32]:
        """Some of them at once, int32 ``[B, T + 1]``: ids stay below 2^31."""
        out = np.empty((len(indices), self.length + 1), np.int32)
        for row, index in zip(out, indices, strict=True):
            self.tokens.read_into(row, index * self.length)
        return out


def too_short(length: int, n_tokens: int) -> str:
    """The message for a text that does not fill one sequence."""
    return (
        f"the text is too short: one sequence of max_seq_length {length} needs {length + 1} tokens, the text "
        f"has {n_tokens}: use more text (--data_path) or a shorter context (--set max_seq_length=...)"
    )


def _require_whole(array: Tokens) -> None:
    """Raises RunError when the file behind ``array`` has become too short: to read it would kill the process."""
    mapped = array.base if isinstance(array, np.memmap) else None
    if isinstance(mapped, mmap.mmap) and mapped.size() < array.offset + array.nbytes:
        raise RunError(f"{array.filename}: the token file was truncated while in use: make it anew, then --resume")


def _reference(array: Tokens) -> Any:
    if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap):
        return array.filename, array.dtype, array.offset, array.shape
    return array
