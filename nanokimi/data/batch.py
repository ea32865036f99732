"""``Batch``: what every loader gives and every objective takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanokimi.ops.loss import IGNORED

# B batch, T sequence length


class Batch(NamedTuple):
    """Sequences and what is to be predicted in them; each field as ``Transformer.forward`` takes it.

    Attributes:
        tokens: ``[B, T]`` int64.
        labels: ``[B, T]`` int64; -100 where nothing is to be predicted.
        documents: ``[B, T]`` int64, which document each token belongs to, -1 for padding; None: all may see all.
        label_count: what summed losses are divided by; None: the labels of this batch that count.
    """

    tokens: Tensor
    labels: Tensor
    documents: Tensor | None = None
    label_count: float | Tensor | None = None

    @classmethod
    def of_rows(cls, rows: Tensor, eot_id: int | None = None) -> Batch:
        """Inputs and labels out of packed sequences ``[B, T + 1]``, which overlap by all but one token.

        Args:
            eot_id: the end-of-text token, by which documents are told apart; None: they are not.
        """
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        return cls(tokens, labels, None if eot_id is None else document_numbers(tokens, eot_id))

    @classmethod
    def joined(cls, batches: Sequence[Batch]) -> Batch:
        """The sequences of all ``batches``, which are alike."""
        documents = [batch.documents for batch in batches if batch.documents is not None]
        return cls(
            torch.cat([batch.tokens for batch in batches]),
            torch.cat([batch.labels for batch in batches]),
            torch.cat(documents) if documents else None,
        )

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
