"""Streams: their order, their positions, and what becomes of both on other workers and ranks."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from dataclasses import replace
from itertools import chain, islice, pairwise, takewhile
from pathlib import Path
from typing import Any

import pytest
from streams import (
    LENGTH,
    corpus,
    inputs,
    loader,
    sequences,
    small_pieces,
    take,
    write_json_lines,
    write_text,
)

from nanokimi.data import local, stream
from nanokimi.data.corpus import Corpus
from nanokimi.data.loader import merge_states
from nanokimi.data.stream import Position
from nanokimi.errors import RunError, UserError

N_DOCUMENTS = 120


@pytest.fixture
def texts() -> list[str]:
    rng = random.Random(0)
    return [f"{i} " + "".join(rng.choices("abcd \n", k=rng.randint(1, 200))) + "\n" for i in range(N_DOCUMENTS)]


@pytest.fixture
def path(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    small_pieces(monkeypatch)
    write_text(tmp_path / "train.txt", texts)
    return tmp_path / "train.txt"


@pytest.fixture
def source(path: Path) -> Corpus:
    return corpus(dataset="localstreaming", data_path=path, val_fraction=0.0)


def rest_of_epoch(source: Corpus, state: dict[str, Any] | None = None, **options: Any) -> list[tuple[int, ...]]:
    """The sequences of the first epoch, from ``state`` on."""

    def start(**more: Any) -> Any:
        batches = loader(source, **{"batch_size": 1, **options, **more})
        if state is not None:
            batches.load_state_dict(state)
        return batches

    plain = start(shuffle_buffer=1)
    in_order = takewhile(lambda _: plain.epoch == 0, plain)
    return sequences(take(start(), sum(1 for _ in in_order)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_order_is_the_same_for_any_number_of_workers(source: Corpus) -> None:
    reference = take(loader(source), 300)
    for num_workers in (1, 2, 3, 16):
        assert take(loader(source, num_workers=num_workers), 300) == reference


def test_labels_are_the_inputs_one_token_later_in_each_lane(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LANES", 1)
    source = corpus(dataset="localstreaming", data_path=path, val_fraction=0.0)
    found = sequences(take(loader(source, shuffle_buffer=1), 200))
    assert all(a[-1] == b[0] for a, b in pairwise(found))
    assert all(len(sequence) == LENGTH + 1 for sequence in found)


def test_nothing_is_dropped_between_epochs(path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LANES", 1)
    source = corpus(dataset="localstreaming", data_path=path, val_fraction=0.0)
    text = b"".join(inputs(islice(iter(loader(source, shuffle_buffer=1)), 2000)))
    documents = text.split(b"\xff")[:-1]
    n_pieces = {}
    for epoch in range(5):
        of_epoch = documents[epoch * N_DOCUMENTS : (epoch + 1) * N_DOCUMENTS]
        assert sorted(d.decode() for d in of_epoch) == sorted(texts)
        n_pieces[tuple(of_epoch)] = epoch
    assert len(n_pieces) == 5  # each epoch in an order of its own


def test_another_seed_gives_another_order_of_the_same_sequences(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PART_BYTES", 1 << 20)
    source = corpus(dataset="localstreaming", data_path=path, val_fraction=0.0)
    first, other = rest_of_epoch(source, seed=1), rest_of_epoch(source, seed=2)
    assert first != other
    assert Counter(first) == Counter(other)


def test_the_shuffle_buffer_moves_sequences_and_loses_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LANES", 2)
    source = corpus(dataset="localstreaming", data_path=path, val_fraction=0.0)
    plain, shuffled = rest_of_epoch(source, shuffle_buffer=1), rest_of_epoch(source, shuffle_buffer=50)
    assert plain != shuffled
    assert Counter(plain) == Counter(shuffled)


def test_a_lane_reader_that_was_pickled_reads_the_same(source: Corpus) -> None:
    made = loader(source).reader  # type: ignore[attr-defined]
    reader = replace(made, positions=dict.fromkeys(range(made.n_lanes), Position()))
    copy = pickle.loads(pickle.dumps(reader))
    for lane in range(reader.n_lanes):
        for _ in range(5):
            assert copy.chunk((lane, 0)).sequences.tolist() == reader.chunk((lane, 0)).sequences.tolist()


# ---- ranks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_an_epoch_without_overlap(source: Corpus, world_size: int) -> None:
    ranks = [rest_of_epoch(source, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert Counter(chain.from_iterable(ranks)) == Counter(rest_of_epoch(source))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("stop", [0, 7, 30])
def test_on_another_number_of_ranks_nothing_is_lost_or_repeated(
    source: Corpus, before: int, after: int, stop: int
) -> None:
    seen: Counter[tuple[int, ...]] = Counter()
    states = []
    for rank in range(before):
        batches = loader(source, rank=rank, world_size=before)
        seen += Counter(sequences(take(batches, stop)))
        states.append(batches.state_dict())
    for rank in range(after):
        seen += Counter(rest_of_epoch(source, merge_states(states), rank=rank, world_size=after))
    assert seen == Counter(rest_of_epoch(source))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("stop", [0, 7, 200])
def test_ranks_without_a_lane_of_their_own_take_turns_in_one_order(
    path: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int, stop: int
) -> None:
    monkeypatch.setattr(stream, "LANES", 1)
    source = corpus(dataset="localstreaming", data_path=path, val_fraction=0.0)
    options: dict[str, Any] = {"batch_size": 1, "shuffle_buffer": 1}
    stopped = [loader(source, rank=rank, world_size=before, **options) for rank in range(before)]
    seen = [sequences(take(batches, stop)) for batches in stopped]
    state = merge_states([batches.state_dict() for batches in stopped])
    resumed = [loader(source, rank=rank, world_size=after, **options) for rank in range(after)]
    for batches in resumed:
        batches.load_state_dict(state)
    rest = [sequences(take(batches, 400)) for batches in resumed]
    order = [*chain.from_iterable(zip(*seen, strict=True)), *chain.from_iterable(zip(*rest, strict=True))]
    assert order == sequences(take(loader(source, **options), len(order)))


def test_the_same_number_of_ranks_goes_on_to_the_bit(source: Corpus) -> None:
    whole = [take(loader(source, rank=rank, world_size=2), 60) for rank in range(2)]
    stopped = [loader(source, rank=rank, world_size=2) for rank in range(2)]
    assert [take(batches, 25) for batches in stopped] == [batches[:25] for batches in whole]
    state = merge_states([batches.state_dict() for batches in stopped])
    for rank in range(2):
        resumed = loader(source, rank=rank, world_size=2, num_workers=2 * rank)
        resumed.load_state_dict(state)
        assert take(resumed, 35) == whole[rank][25:]


# ---- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.fault(2)
def test_a_stream_shorter_than_the_context_says_need_and_have(tmp_path: Path) -> None:
    write_text(tmp_path / "t.txt", ["abc\n"])
    source = corpus(dataset="localstreaming", data_path=tmp_path / "t.txt", val_fraction=0.0)
    with pytest.raises(UserError, match=rf"needs {LENGTH + 1} tokens.* has 5"):
        next(iter(loader(source)))


@pytest.mark.fault(3)
def test_a_stream_with_fewer_sequences_than_a_batch_says_the_counts(tmp_path: Path) -> None:
    write_text(tmp_path / "t.txt", ["abc\n" * 20])
    source = corpus(dataset="localstreaming", data_path=tmp_path / "t.txt", val_fraction=0.0)
    with pytest.raises(UserError, match="--batch_size is 4 but the text makes only 3 sequences"):
        next(iter(loader(source, batch_size=4)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_row_that_cannot_be_read_is_one_line_from_any_process(tmp_path: Path, num_workers: int) -> None:
    write_json_lines(tmp_path / "t.jsonl", ["some text that is long enough"] * 150)
    with (tmp_path / "t.jsonl").open("a") as file:
        file.write('{"text": 3}\n')
    source = corpus(dataset="localstreaming", data_path=tmp_path / "t.jsonl", val_fraction=0.0)
    with pytest.raises(UserError, match="the text is of type int") as error:
        take(loader(source, shuffle_buffer=1, num_workers=num_workers), 1000)
    assert "\n" not in str(error.value)


@pytest.mark.fault(12)
def test_an_edited_file_stops_the_stream(path: Path, source: Corpus) -> None:
    batches = iter(loader(source))
    next(batches)
    path.write_text(path.read_text() + "more\n")
    with pytest.raises(UserError, match="changed while it was read"):
        list(islice(batches, 500))


@pytest.mark.fault(24)
@pytest.mark.parametrize(("name", "value"), [("length", 7), ("seed", 6), ("parts", 1)])
def test_a_position_of_another_order_is_refused(source: Corpus, name: str, value: int) -> None:
    state = loader(source).state_dict() | {name: value}
    with pytest.raises(UserError, match=f"{name} was {value} and is"):
        loader(source).load_state_dict(state)


def test_a_worker_that_dies_is_a_run_error(source: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream.Lane, "chunk", lambda *_: __import__("os")._exit(3))
    with pytest.raises(RunError, match="data worker"):
        next(iter(loader(source, num_workers=2)))
