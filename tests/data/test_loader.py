from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nanokimi.data.batch import PackedSequences
from nanokimi.data.loader import BatchLoader, LoaderOptions, evenly_spread, permutation
from nanokimi.errors import RunError, UserError

N, LENGTH, BATCH = 10, 4, 3


def loader(*, seed: int = 0, num_workers: int = 0, n: int = N) -> BatchLoader:
    return BatchLoader(np.arange(n * LENGTH + 1), LoaderOptions(LENGTH, BATCH, seed, num_workers=num_workers))


def take(batches: BatchLoader, count: int) -> list[list[list[int]]]:
    return [batch.rows().tolist() for batch in islice(batches, count)]


def first_tokens(batches: list[list[list[int]]]) -> list[int]:
    return [sequence[0] for batch in batches for sequence in batch]


def test_batches_are_int64_with_one_token_more_than_the_context() -> None:
    batch = next(iter(loader()))
    assert batch.rows().shape == (BATCH, LENGTH + 1)
    assert torch.equal(batch.labels, batch.tokens + 1), "each label is the token that follows"
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64


def test_every_sequence_comes_once_per_epoch_though_batches_straddle() -> None:
    seen = first_tokens(take(loader(), N))  # three epochs in ten batches
    everything = list(range(0, N * LENGTH, LENGTH))
    for epoch in range(BATCH):
        assert sorted(seen[epoch * N : (epoch + 1) * N]) == everything


def test_sample_k_is_the_permutation_of_its_epoch() -> None:
    seen = first_tokens(take(loader(seed=5), 7))
    assert seen == [int(permutation(5, k // N, N)[k % N]) * LENGTH for k in range(7 * BATCH)]


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = [tuple(permutation(seed, epoch, 50)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 5])
def test_a_resume_equals_the_uninterrupted_run(num_workers: int, stop: int) -> None:
    whole = take(loader(), 8)
    interrupted = loader(num_workers=num_workers)
    assert take(interrupted, stop) == whole[:stop]
    resumed = loader(num_workers=num_workers)
    resumed.load_state_dict(interrupted.state_dict())
    assert take(resumed, 8 - stop) == whole[stop:]


def test_the_state_counts_what_was_handed_out_and_not_what_was_read_ahead() -> None:
    batches = loader(num_workers=2)
    iterator = iter(batches)
    for _ in range(4):
        next(iterator)
    assert batches.state_dict()["samples"] == 4 * BATCH


def test_the_order_leaves_the_global_random_numbers_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    take(loader(), 2)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("other", [{"seed": 1}, {"n": N + 1}])
def test_a_position_of_another_order_is_refused(other: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"was \d+ and is \d+ now"):
        loader(**other).load_state_dict(loader().state_dict())


@pytest.mark.fault(3)
def test_fewer_sequences_than_a_batch_says_the_counts() -> None:
    with pytest.raises(UserError, match="--batch_size is 3 but the text makes only 2 sequences"):
        loader(n=2)


def test_a_worker_that_dies_is_a_run_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedSequences, "batch", lambda *_: os._exit(3))
    batches = loader(num_workers=1)
    with pytest.raises(RunError, match="data worker") as error:
        next(iter(batches))
    assert "\n" not in str(error.value)


def truncated(sequences: PackedSequences, indices: Sequence[int]) -> NDArray[np.int32]:
    raise RunError("tokens.bin: truncated")


@pytest.mark.fault(23)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_worker_has_to_say_is_one_line(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedSequences, "batch", truncated)
    with pytest.raises(RunError) as error:
        next(iter(loader(num_workers=num_workers)))
    assert str(error.value) == "tokens.bin: truncated"


@pytest.mark.parametrize(("n", "limit", "expected"), [(5, 0, 5), (5, 9, 5), (100, 10, 10), (7, 3, 3), (1, 1, 1)])
def test_evaluation_sequences_are_distinct_and_spread(n: int, limit: int, expected: int) -> None:
    chosen = evenly_spread(n, limit)
    assert len(set(chosen)) == len(chosen) == expected
    gaps = np.diff([*chosen, n])
    assert chosen[0] == 0
    assert gaps.max() - gaps.min() <= 1
