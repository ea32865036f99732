from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nanokimi.data.batch import PackedSequences, TokenArray
from nanokimi.errors import RunError, UserError


def test_every_token_but_the_first_is_a_label_exactly_once() -> None:
    sequences = PackedSequences(np.arange(41, dtype=np.uint16), 8)
    labels = sequences.batch(range(len(sequences)))[:, 1:]
    assert labels.reshape(-1).tolist() == list(range(1, 41))


@pytest.mark.parametrize(("n_tokens", "count"), [(9, 1), (16, 1), (17, 2), (24, 2), (25, 3)])
def test_only_the_last_remainder_is_dropped(n_tokens: int, count: int) -> None:
    assert len(PackedSequences(np.zeros(n_tokens, np.uint16), 8)) == count


@pytest.mark.fault(2)
def test_a_text_shorter_than_the_context_says_need_and_have() -> None:
    with pytest.raises(UserError, match=r"needs 9 tokens.* has 8"):
        PackedSequences(np.zeros(8, np.uint16), 8)


def test_large_ids_survive() -> None:
    assert PackedSequences(np.array([0, 65535, 70000], np.uint32), 2).batch([0]).tolist() == [[0, 65535, 70000]]


def test_a_pickled_mapped_file_is_mapped_again_and_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    np.arange(100_000, dtype=np.uint16).tofile(path)
    mapped = np.memmap(path, np.uint16, "r", 200)
    sequences = PackedSequences(mapped, 8)
    data = pickle.dumps(sequences)
    assert len(data) < 2000
    assert pickle.loads(data).batch([5]).tolist() == sequences.batch([5]).tolist()
    part = PackedSequences(mapped[50:100], 8)  # a slice has no file of its own
    assert pickle.loads(pickle.dumps(part)).batch([1]).tolist() == part.batch([1]).tolist()


# ---- rows ------------------------------------------------------------------------------------------------


def draw_row(seed: int) -> tuple[TokenArray, NDArray[np.int64]]:
    """A row of random runs, empty ones too, over arrays of both widths; and what it should hold."""
    draw = np.random.default_rng(seed)
    arrays = [
        draw.integers(0, 65_536, draw.integers(0, 50)).astype(draw.choice([np.uint16, np.uint32]))
        for _ in range(draw.integers(1, 5))
    ]
    if seed % 3 == 0:
        return TokenArray(arrays), np.concatenate(arrays).astype(np.int64)
    runs = []
    for _ in range(draw.integers(1, 12)):
        number = int(draw.integers(len(arrays)))
        start, end = sorted(draw.integers(0, len(arrays[number]) + 1, 2).tolist())
        runs.append([number, start, end])
    expected = np.concatenate([arrays[number][start:end] for number, start, end in runs])
    return TokenArray(arrays, np.array(runs, np.int64)), expected.astype(np.int64)


@pytest.mark.parametrize("seed", range(30))
def test_a_row_reads_as_its_runs_one_behind_the_other(seed: int) -> None:
    row, expected = draw_row(seed)
    assert len(row) == len(expected)
    draw = np.random.default_rng(seed)
    for _ in range(50):
        start, stop = sorted(draw.integers(0, len(expected) + 1, 2).tolist())
        found = row.read(start, stop)
        assert found.tolist() == expected[start:stop].tolist()
        assert found.dtype == np.int64


@pytest.mark.parametrize("seed", range(30))
def test_a_part_of_a_row_is_a_row(seed: int) -> None:
    row, expected = draw_row(seed)
    draw = np.random.default_rng(seed)
    for _ in range(20):
        start, stop = sorted(draw.integers(0, len(expected) + 1, 2).tolist())
        part = row.part(start, stop)
        assert len(part) == stop - start
        assert part.read(0, len(part)).tolist() == expected[start:stop].tolist()
        inner = part.part(len(part) // 3, len(part) // 2)
        assert inner.read(0, len(inner)).tolist() == expected[start:stop][len(part) // 3 : len(part) // 2].tolist()
    assert row.read(0, len(row)).tolist() == expected.tolist()  # as it was


@pytest.mark.parametrize("seed", range(30))
def test_joined_rows_follow_one_another(seed: int) -> None:
    rows, contents = zip(*(draw_row(3 * seed + i) for i in range(3)), strict=True)
    joined, expected = TokenArray.joined([*rows, rows[0].part(0, len(rows[0]) // 2)]), np.concatenate(contents)
    expected = np.concatenate([expected, contents[0][: len(contents[0]) // 2]])
    assert len(joined) == len(expected)
    assert joined.read(0, len(joined)).tolist() == expected.tolist()
    middle = len(joined) // 2
    assert joined.read(middle, len(joined)).tolist() == expected[middle:].tolist()
    assert TokenArray.joined([joined]).read(0, middle).tolist() == expected[:middle].tolist()


def test_a_row_of_nothing_is_empty() -> None:
    for row in (TokenArray([]), TokenArray([np.zeros(0, np.uint16)]), TokenArray([np.arange(9)]).part(4, 4)):
        assert len(row) == 0
        assert row.read(0, 0).tolist() == []


def test_a_row_of_several_mapped_files_is_pickled_without_their_contents(tmp_path: Path) -> None:
    arrays = []
    for number, dtype in enumerate((np.uint16, np.uint32, np.uint16)):
        np.arange(50_000, dtype=dtype).tofile(tmp_path / str(number))
        arrays.append(np.memmap(tmp_path / str(number), dtype, "r", 8 * number))
    runs = np.array([[2, 5, 30_000], [0, 0, 7], [1, 100, 40_000], [2, 0, 5]], np.int64)
    for row in (TokenArray(arrays), TokenArray(arrays, runs), TokenArray(arrays, runs).part(29_000, 50_000)):
        data = pickle.dumps(row)
        assert len(data) < 3000
        again = pickle.loads(data)
        assert again.read(0, len(again)).tolist() == row.read(0, len(row)).tolist()
        assert pickle.dumps(again) == data


@pytest.mark.fault(23)
def test_a_mapped_file_that_became_too_short_is_an_error_also_behind_parts_and_pickles(tmp_path: Path) -> None:
    for name in "ab":
        np.arange(50_000, dtype=np.uint16).tofile(tmp_path / name)
    whole = TokenArray([np.memmap(tmp_path / name, np.uint16, "r") for name in "ab"])
    rows = [whole, whole.part(10_000, 90_000), TokenArray.joined([whole, whole]), pickle.loads(pickle.dumps(whole))]
    os.truncate(tmp_path / "b", 4096)
    for row in rows:
        assert len(row.read(0, 10)) == 10  # of the other file
        with pytest.raises(RunError, match="b: the token file was truncated while in use"):
            row.read(45_000, 75_000)
