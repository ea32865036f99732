from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from nanokimi.data.packing import PackedSequences
from nanokimi.errors import UserError


def test_every_token_but_the_first_is_a_label_exactly_once() -> None:
    sequences = PackedSequences(np.arange(41, dtype=np.uint16), 8)
    labels = torch.cat([sequences[i][1:] for i in range(len(sequences))])
    assert labels.tolist() == list(range(1, 41))


def test_labels_are_the_inputs_one_token_later() -> None:
    sequences = PackedSequences(np.arange(100, 142, dtype=np.uint16), 8)
    for i in range(len(sequences)):
        inputs, labels = sequences[i][:-1], sequences[i][1:]
        assert labels.tolist() == (inputs + 1).tolist()
        assert inputs.dtype == torch.int64


@pytest.mark.parametrize(("n_tokens", "count"), [(9, 1), (16, 1), (17, 2), (24, 2), (25, 3)])
def test_only_the_last_remainder_is_dropped(n_tokens: int, count: int) -> None:
    assert len(PackedSequences(np.zeros(n_tokens, np.uint16), 8)) == count


def test_iterating_ends_behind_the_last_sequence() -> None:
    assert len(list(PackedSequences(np.zeros(25, np.uint16), 8))) == 3


def test_a_text_shorter_than_the_context_says_need_and_have() -> None:
    """Fault 2."""
    with pytest.raises(UserError, match=r"needs 9 tokens.* has 8"):
        PackedSequences(np.zeros(8, np.uint16), 8)


def test_large_ids_survive() -> None:
    assert PackedSequences(np.array([0, 65535, 70000], np.uint32), 2)[0].tolist() == [0, 65535, 70000]


def test_a_pickled_mapped_file_is_mapped_again_and_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    np.arange(100_000, dtype=np.uint16).tofile(path)
    sequences = PackedSequences(np.memmap(path, np.uint16, "r", 200), 8)
    data = pickle.dumps(sequences)
    assert len(data) < 2000
    assert torch.equal(pickle.loads(data)[5], sequences[5])
    part = PackedSequences(sequences.tokens[50:100], 8)  # a slice has no file of its own
    assert torch.equal(pickle.loads(pickle.dumps(part))[1], part[1])
