"""Tokens on disk as one long array, training sequences cut from it, and batches of these."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanokimi.errors import RunError, UserError
from nanokimi.ops.loss import IGNORED

# B batch, T sequence length, N tokens


class Batch(NamedTuple):
    """Sequences and what is to be predicted in them; each field as ``Transformer.forward`` takes it."""

    tokens: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64; -100 where nothing is to be predicted
    documents: Tensor | None = None  # [B, T] int64, the document of each token, -1 for padding; None: all may see all
    label_count: float | Tensor | None = None  # what summed losses are divided by; None: this batch's labels that count

    @classmethod
    def of_rows(cls, rows: Tensor, eot_id: int | None = None) -> Batch:
        """Inputs and labels out of packed sequences ``[B, T + 1]``, which overlap by all but one token.

        Args:
            eot_id: the end-of-text token, by which documents are told apart; None: they are not.
        """
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        return cls(tokens, labels, None if eot_id is None else document_numbers(tokens, eot_id))

    def rows(self) -> Tensor:
        """The packed sequences ``[B, T + 1]`` that ``of_rows`` made the batch of."""
        return torch.cat((self.tokens, self.labels[:, -1:]), dim=1)

    def counted(self) -> int:
        """How many labels count; on the host, so ask before the batch is on a device."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; from page-locked memory the copy overlaps with computing."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        documents = None if self.documents is None else change(self.documents)
        return Batch(change(self.tokens), change(self.labels), documents, self.label_count)


def document_numbers(tokens: Tensor, eot_id: int) -> Tensor:
    """Numbers the documents of packed sequences: int64 ``[B, T] -> [B, T]``, from 0 in each sequence.

    An end-of-text token belongs to the document that it ends; the token after it begins the next one.
    """
    ends = (tokens == eot_id).long()
    return ends.cumsum(-1) - ends


class TokenArray:
    """Tokens that lie in several places, such as files, or the documents that are not held out, read like one array.

    Args:
        arrays: ids, any unsigned dtype; mapped files stay mapped.
        runs: ``[runs, 3]``, array number, first token and end of each stretch; None takes all of every array.
    """

    def __init__(self, arrays: Sequence[NDArray[Any]], runs: NDArray[np.int64] | None = None) -> None:
        if runs is None:
            runs = np.array([(i, 0, len(array)) for i, array in enumerate(arrays)], np.int64).reshape(-1, 3)
        self._arrays, self._runs = list(arrays), runs
        self._ends = np.cumsum(runs[:, 2] - runs[:, 1])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens ``start`` to ``stop``; RunError if a file was truncated since it was opened."""
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

    def require_whole(self) -> None:
        """Raises RunError if a file was truncated since it was opened."""
        for array in self._arrays:
            _require_whole(array)

    def part(self, start: int, stop: int) -> TokenArray:
        """The tokens from ``start`` to ``stop``, in the same files."""
        runs = self._runs.copy()
        starts = self._ends - (runs[:, 2] - runs[:, 1])  # of the runs, counted in all tokens
        runs[:, 2] -= np.maximum(0, self._ends - stop)
        runs[:, 1] += np.maximum(0, start - starts)
        return TokenArray(self._arrays, runs[runs[:, 1] < runs[:, 2]])

    @classmethod
    def joined(cls, parts: Sequence[TokenArray]) -> TokenArray:
        """All of them, one after the other."""
        arrays = [array for part in parts for array in part._arrays]
        firsts = np.cumsum([0, *(len(part._arrays) for part in parts)])
        runs = [part._runs + np.array([first, 0, 0]) for part, first in zip(parts, firsts[:-1], strict=True)]
        return cls(arrays, np.concatenate(runs))

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes that are not forked map the files again instead of getting a copy of their contents.
        return {**self.__dict__, "_arrays": [_reference(array) for array in self._arrays]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._arrays = [np.memmap(a[0], a[1], "r", *a[2:]) if isinstance(a, tuple) else a for a in self._arrays]


class PackedSequences:
    """N tokens cut into sequences of ``length`` inputs and their labels.

    Sequence i is ``tokens[i T : (i + 1) T + 1]``: neighbours overlap by one token, so that every token but the first is
    predicted exactly once and only the last remainder is dropped.

    Args:
        tokens: UserError if that is not enough for one sequence.
        length: T, the model's context.
    """

    def __init__(self, tokens: TokenArray | NDArray[Any], length: int) -> None:
        self.tokens = tokens if isinstance(tokens, TokenArray) else TokenArray([tokens])
        self.length = length
        self._count = (len(self.tokens) - 1) // length
        if self._count < 1:
            raise UserError(too_short(length, len(self.tokens)))

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Sequence[int]) -> NDArray[np.int32]:
        """Some of the sequences, int32 ``[B, T + 1]``: ids stay below 2^31."""
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


def _require_whole(array: NDArray[Any]) -> None:
    """Raises RunError when the file of ``array`` has become too short: to read it would kill the process."""
    mapped = array.base if isinstance(array, np.memmap) else None
    if isinstance(mapped, mmap.mmap) and mapped.size() < array.offset + array.nbytes:
        raise RunError(f"{array.filename}: the token file was truncated while in use: make it anew, then --resume")


def _reference(array: NDArray[Any]) -> Any:
    if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap):
        return array.filename, array.dtype, array.offset, array.shape
    return array
