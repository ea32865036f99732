"""Mixtures: shares, positions, and ``--mix`` from its text to a whole run."""

from __future__ import annotations

import io
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from streams import LENGTH, corpus, loader, plain, sequences, small_pieces, take, write_json_lines, write_text

from nanokimi import checkpoint
from nanokimi.cli import main
from nanokimi.config import TrainConfig
from nanokimi.data import stream
from nanokimi.data.batch import Batch
from nanokimi.data.corpus import Corpus
from nanokimi.data.loader import BatchLoader, LoaderOptions, MixLoader, merge_states
from nanokimi.data.sources import open_corpus, parse_mix
from nanokimi.data.stream import StreamLoader
from nanokimi.data.tokenizer import train_bpe
from nanokimi.errors import UserError
from nanokimi.training.trainer import Trainer

MIX = "a.txt=0.5,localstreaming:b.jsonl=0.3,tokenbin:c=0.2"
KINDS = {"A": "a.txt", "B": "localstreaming:b.jsonl", "C": "tokenbin:c"}  # by the letter that is in every word


class Numbered:
    """A loader whose sequences are its letter and their number."""

    def __init__(self, letter: int) -> None:
        self.letter, self.count = letter, 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.count += 1
            yield Batch.of_rows(torch.tensor([[self.letter, self.count]]))


def mixed(*weights: float, batch_size: int = 1) -> MixLoader:
    sources: dict[str, tuple[float, Any]] = {
        str(i): (weight, lambda options, i=i: Numbered(i)) for i, weight in enumerate(weights)
    }
    return MixLoader(sources, LoaderOptions(1, batch_size, 0))


def documents(letter: str, count: int = 120) -> list[str]:
    rng = random.Random(letter)
    return [" ".join(f"{letter}{i}.{j}" for j in range(rng.randint(1, 30))) + "\n" for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``a.txt``, ``b.jsonl`` and the token files ``c`` in the working directory."""
    small_pieces(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "nanokimi.training.plots.plot_training", lambda *args, **options: None
    )  # it takes half a second
    write_text(tmp_path / "a.txt", documents("A"))
    write_json_lines(tmp_path / "b.jsonl", [*documents("B")])
    write_text(tmp_path / "c.txt", documents("C"))
    assert main(["prepare", "tokens", "--preset", "debug", "--data_path", "c.txt", "--output", "c"]) == 0
    return tmp_path


@pytest.fixture
def source(folder: Path) -> Corpus:
    return corpus(mix=MIX)


def letter_of(sequence: tuple[int, ...]) -> str:
    """Which of the sources a sequence is from; it must be from one of them alone."""
    (letter,) = set(bytes(t for t in sequence if t < 256).decode()) & set(KINDS)
    return letter


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line with which a command is refused, beside what is said about progress and open sources."""
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    (line,) = (x for x in said if not x.startswith(("reading ", "tokenising ")) and ": training on " not in x)
    return line


# ---- shares -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [
        (0.7, 0.3),
        (1e-3, 1),
        (1, 1),
        (3.14159, 2.71828),
        (0.5, 0.3, 0.2),
        (1, 1, 1, 1, 1, 1, 1, 1, 8),
        (0.9, *[0.01] * 10),
        (5, 4, 3, 2, 1, 0.5, 0.25),
        (27, 5, 5, 1, 36, 27),  # always to take the one that is furthest behind is not enough here
        (2.5,),
    ],
)
def test_on_every_prefix_each_source_has_given_its_share_within_one_sequence(weights: tuple[float, ...]) -> None:
    counts = dict.fromkeys(range(len(weights)), 0)
    total = sum(map(Fraction, map(str, weights)))
    for k, batch in enumerate(islice(mixed(*weights), 2000), 1):
        counts[int(batch.tokens[0, 0])] += 1
        for i, weight in enumerate(weights):
            assert abs(counts[i] - Fraction(str(weight)) * k / total) < 1, (k, counts)


def test_random_weights_are_kept_within_one_sequence() -> None:
    rng = random.Random(0)
    for _ in range(30):
        weights = [rng.random() ** 3 + 1e-3 for _ in range(rng.randint(2, 12))]
        counts = [0] * len(weights)
        for k, batch in enumerate(islice(mixed(*weights), 400), 1):
            counts[int(batch.tokens[0, 0])] += 1
            assert all(abs(n - w * k / sum(weights)) < 1 + 1e-9 for n, w in zip(counts, weights, strict=True))


def test_shares_in_tenths_come_out_in_every_ten() -> None:
    order = [int(batch.tokens[0, 0]) for batch in islice(mixed(0.7, 0.2, 0.1), 1000)]
    for start in range(0, 1000, 10):
        assert Counter(order[start : start + 10]) == {0: 7, 1: 2, 2: 1}


def test_only_the_ratio_of_the_weights_counts() -> None:
    ratios = ((0.7, 0.3), (7, 3), (1.4, 0.6))
    orders = [[int(batch.tokens[0, 0]) for batch in islice(mixed(*weights), 500)] for weights in ratios]
    assert orders[0] == orders[1] == orders[2]


def test_a_batch_holds_sequences_of_several_sources_each_in_its_own_order() -> None:
    batches = list(islice(mixed(2, 1, batch_size=6), 50))
    assert all(sorted(batch.tokens[:, 0].tolist()) == [0, 0, 0, 0, 1, 1] for batch in batches)
    rows = torch.cat([batch.rows() for batch in batches])
    for i in range(2):
        numbers = rows[rows[:, 0] == i][:, 1].tolist()
        assert numbers == list(range(1, len(numbers) + 1))


def test_sources_of_every_kind_give_their_shares_of_whole_sequences(source: Corpus) -> None:
    found = sequences(take(loader(source, batch_size=10), 50))
    assert all(len(sequence) == LENGTH + 1 for sequence in found)
    assert Counter(map(letter_of, found)) == {"A": 250, "B": 150, "C": 100}


# ---- positions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 2), (2, 0)])
def test_from_a_saved_position_on_the_rest_is_the_same_to_the_bit(source: Corpus, before: int, after: int) -> None:
    whole = take(loader(source), 150)
    for stop in (0, 1, 7, 120):
        stopped = loader(source, num_workers=before)
        assert take(stopped, stop) == whole[:stop]
        file = io.BytesIO()
        torch.save(stopped.state_dict(), file)
        file.seek(0)
        resumed = loader(corpus(mix=MIX), num_workers=after)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert take(resumed, 30) == whole[stop : stop + 30]


def from_ranks(source: Corpus, before: int, after: int, stop: int, rest: int) -> dict[str, Counter[tuple[int, ...]]]:
    """By source, what ``before`` ranks gave in ``stop`` steps and then ``after`` ranks in ``rest``."""
    options: dict[str, Any] = {"batch_size": 1, "shuffle_buffer": 1}
    found: list[tuple[int, ...]] = []
    states = []
    for rank in range(before):
        batches = loader(source, rank=rank, world_size=before, **options)
        found += sequences(take(batches, stop))
        states.append(batches.state_dict())
    for rank in range(after):
        batches = loader(source, rank=rank, world_size=after, **options)
        batches.load_state_dict(merge_states(states))
        given = sequences(take(batches, rest))
        found += given
        shares = {letter: weight * rest for letter, weight in (("A", 0.5), ("B", 0.3), ("C", 0.2))}
        n_given = Counter(map(letter_of, given))
        assert all(abs(n_given[letter] - shares[letter]) < 2 for letter in KINDS), "the shares go on"
    return {letter: Counter(row for row in found if letter_of(row) == letter) for letter in KINDS}


@pytest.mark.fault(69)
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("stop", [0, 7, 60])
def test_on_another_number_of_ranks_nothing_is_lost_or_repeated(
    source: Corpus, monkeypatch: pytest.MonkeyPatch, before: int, after: int, stop: int
) -> None:
    """Each source goes on after what all ranks have had of it."""
    monkeypatch.setattr(stream, "LANES", 1)  # then a stream has one order as well, of which ranks take turns
    for letter, found in from_ranks(source, before, after, stop, 60).items():
        alone = corpus(mix=f"{KINDS[letter]}=1")
        one = sequences(take(loader(alone, batch_size=1, shuffle_buffer=1), found.total()))
        assert found == Counter(one), letter


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("stop", [0, 7, 60])
def test_a_stream_in_lanes_repeats_nothing_on_another_number_of_ranks(
    source: Corpus, before: int, after: int, stop: int
) -> None:
    found = from_ranks(source, before, after, stop, 60)["B"]
    assert found.total() == len(found) > 17


def test_other_sources_begin_where_they_can(source: Corpus) -> None:
    batches = loader(source)
    take(batches, 20)
    state = batches.state_dict()
    other = loader(corpus(mix="a.txt=0.9,localstreaming:b.jsonl=0.1"))
    other.go_near(state)
    assert other.state_dict()["sources"]["a.txt"]["samples"] == state["sources"]["a.txt"]["samples"] == 30
    alone = loader(corpus(data_path="a.txt"))
    alone.go_near(state)
    assert take(alone, 1)


# ---- from text to sources -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("a.txt", "--mix a.txt: write it as PATH=WEIGHT"),
        ("a.txt=", "--mix a.txt=: write it as PATH=WEIGHT"),
        ("a.txt=much", "--mix a.txt=much: write it as PATH=WEIGHT"),
        ("a.txt=0", "with a weight above 0"),
        ("a.txt=-0.5,b.jsonl=1", "--mix a.txt=-0.5: write it as PATH=WEIGHT with a weight above 0"),
        ("a.txt=nan", "with a weight above 0"),
        ("a.txt=inf", "with a weight above 0"),
        ("=0.5", "--mix =0.5: write it"),
        ("a.txt=0.5,", "--mix : write it"),
        ("a.txt=0.5, a.txt=0.5", "--mix names a.txt twice: add the weights up"),
        ("gone.txt=1", "--data_path gone.txt: no such file"),
        ("a.txt=1,tokenbin:gone=1", "--data_path gone: no such file"),
        ("a.txt=1,tokenbin:a.txt=1", "a.txt: this is text, not tokens"),
        ("hfstreaming:=1", "--hf_repo_name (empty)"),
    ],
)
def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], mix: str, message: str) -> None:
    assert message in refused(capsys, ["train", "--preset", "debug", "--mix", mix, "--output_dir", "run"])


def test_the_name_of_a_source_may_hold_whatever_a_path_does() -> None:
    shares = parse_mix(TrainConfig(mix="x=y.txt=1e-1, C:d.txt=2,tokenbin:t:u=3,fineweb=4", dataset="localstreaming"))
    assert {name: (weight, part.dataset) for name, (weight, part) in shares.items()} == {
        "x=y.txt": (0.1, "localstreaming"),
        "C:d.txt": (2.0, "localstreaming"),
        "tokenbin:t:u": (3.0, "tokenbin"),
        "fineweb": (4.0, "fineweb"),
    }
    assert [part.data_path for _, part in shares.values()][:3] == ["x=y.txt", "C:d.txt", "t:u"]
    assert shares["fineweb"][1].hf_repo_name == ""


def test_a_prefix_names_the_kind_of_a_source_and_dataset_that_of_the_others(folder: Path) -> None:
    for dataset, kind in (("local", BatchLoader), ("localstreaming", StreamLoader)):
        source = corpus(dataset=dataset, mix="a.txt=1,localstreaming:b.jsonl=2,tokenbin:c=3")
        found = loader(source)
        assert isinstance(found, MixLoader)
        assert [type(part) for part in found.loaders.values()] == [kind, StreamLoader, BatchLoader]
        lines = source.summary.splitlines()
        assert [line.split(":")[0] for line in lines] == ["1 of a.txt", "2 of localstreaming", "3 of tokenbin"]


def opened(mix: str, tokenizer_name: str, **options: Any) -> Corpus:
    return open_corpus(TrainConfig(mix=mix), tokenizer_name, log=lambda line: None, **options)


def decoded(source: Corpus) -> str:
    assert source.train.tokens is not None
    row = source.train.tokens
    return source.tokenizer.decode(row.read(0, len(row)).tolist()).replace("<|endoftext|>", "")


def test_a_bpe_is_trained_on_what_all_sources_train_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanokimi.data.documents.PIECE_BYTES", 1 << 18)  # a document is one piece
    found = opened("a.txt=0.9,localstreaming:b.jsonl=0.1", "bpe:280").tokenizer
    texts = [decoded(corpus(data_path=path)) for path in ("a.txt", "b.jsonl")]
    split = [document for text in texts for document in text.splitlines(keepends=True)]
    assert found.fingerprint == train_bpe(split, 280).fingerprint
    assert found.fingerprint != opened("a.txt=1", "bpe:280").tokenizer.fingerprint
    assert found.name == "bpe:280"


def prepare(name: str, tokenizer: str) -> None:
    named = ["--set", f"tokenizer_name={tokenizer}", "--data_path", "c.txt", "--output", name]
    assert main(["prepare", "tokens", "--preset", "debug", *named]) == 0


def test_token_files_bring_their_tokenizer_into_the_mixture(folder: Path) -> None:
    prepare("d", "bpe:300")
    wanted = opened("tokenbin:d=1", "byte").tokenizer
    assert wanted.vocab_size > 257
    for mix in ("a.txt=0.5,tokenbin:d=0.5", "tokenbin:d=0.5,localstreaming:b.jsonl=0.5"):
        source = opened(mix, "byte")
        assert source.tokenizer.fingerprint == wanted.fingerprint
        shown = [wanted.decode(row) for row in sequences(take(loader(source), 4))]
        assert Counter(next(iter(set(text) & set(KINDS))) for text in shown)["C"] == 6
        assert all(len(set(text) & set(KINDS)) == 1 for text in shown), "all are ids of that tokenizer"
    with pytest.raises(UserError, match=r"d.train-00000\.bin: made by another tokenizer .* than byte"):
        opened("a.txt=0.5,tokenbin:d=0.5", "byte", named=True)


@pytest.mark.fault(13)
def test_token_files_of_two_tokenizers_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare("d", "bpe:300")
    line = refused(capsys, ["train", "--preset", "debug", "--mix", "tokenbin:c=1,tokenbin:d=1", "--output_dir", "run"])
    assert "d/train-00000.bin: made by another tokenizer" in line


def test_no_tokenizer_can_be_trained_where_a_part_is_only_tokens(folder: Path) -> None:
    (folder / "plain.bin").write_bytes(bytes(range(100)) * 20)
    with pytest.raises(UserError, match=r"plain\.bin: no tokenizer can be trained on tokens"):
        opened("a.txt=1,tokenbin:plain.bin=1", "bpe:300")


@pytest.mark.fault(41)
def test_the_held_out_parts_of_all_sources_are_used(source: Corpus, folder: Path) -> None:
    parts = [corpus(dataset=d, data_path=p) for d, p in (("local", "a.txt"), ("localstreaming", "b.jsonl"))]
    parts.append(corpus(dataset="tokenbin", data_path="c"))
    rows = [part.val for part in parts]
    assert source.val is not None
    joined = list(chain.from_iterable(row.read(0, len(row)).tolist() for row in rows if row is not None))
    assert source.val.read(0, len(source.val)).tolist() == joined
    assert set(bytes(t for t in joined if t < 256).decode()) >= set(KINDS)
    assert corpus(mix="a.txt=1,b.jsonl=1,tokenbin:c=1", val_fraction=0.0).val is None


def test_another_weight_is_another_mixture(folder: Path) -> None:
    identities = {corpus(mix=mix).train.identity for mix in ("a.txt=1,b.jsonl=1", "a.txt=1,b.jsonl=2", "a.txt=1")}
    assert len(identities) == 3
    assert corpus(mix="a.txt=1,b.jsonl=1").train.identity in identities


# ---- whole runs ---------------------------------------------------------------------------------


def left_by(output: Path) -> Any:
    """All that a finished run leaves, but for what the clock says."""
    content = checkpoint.read(output / "checkpoints" / "final.pt")
    history = json.loads((output / "logs" / "training_metrics.json").read_text())
    parts = {name: content[name] for name in ("model", "optimizer", "data", "random", "tokenizer")}
    return plain([parts, content["counters"] | {"seconds": 0}, history | {"tokens_per_second": 0}])


@pytest.mark.fault(68)
@pytest.mark.parametrize("mix", ["a.txt=0.7,b.jsonl=0.3", MIX])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(
    folder: Path, mix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["train", "--preset", "debug", "--mix", mix, "--max_steps", "7", "--eval_interval", "3"]
    flags += ["--save_interval", "0", "--warmup_steps", "2", "--set", "max_seq_length=24", "--shuffle_buffer", "8"]
    assert main([*flags, "--output_dir", "whole"]) == 0
    step = Trainer._train_step

    def terminated(self: Trainer, batches: Iterator[Batch]) -> dict[str, Any]:
        if self.counters.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_train_step", terminated)
        assert main([*flags, "--output_dir", "stopped"]) == 128 + signal.SIGTERM
    saved = checkpoint.read(folder / "stopped" / "checkpoints" / "latest.pt")
    assert saved["counters"]["step"] == 5
    assert sum(saved["data"]["counts"].values()) == 5 * 4
    assert main(["train", "--resume", "--output_dir", "stopped"]) == 0
    assert left_by(folder / "stopped") == left_by(folder / "whole")


@pytest.mark.fault(57)
def test_a_resume_with_another_mixture_is_refused_and_can_be_overridden(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["train", "--preset", "debug", "--eval_interval", "0", "--set", "max_seq_length=24", "--output_dir", "run"]
    assert main([*flags, "--mix", "a.txt=0.7,b.jsonl=0.3", "--max_steps", "2"]) == 0
    resume = [*flags, "--resume", "--max_steps", "3", "--mix", "a.txt=0.5,b.jsonl=0.5"]
    assert "mix (saved 'a.txt=0.7,b.jsonl=0.3', now 'a.txt=0.5,b.jsonl=0.5')" in refused(capsys, resume)
    assert main([*resume, "--override", "mix"]) == 0
    state = checkpoint.read(folder / "run" / "checkpoints" / "final.pt")["data"]["sources"]
    assert {name: part["samples"] for name, part in state.items()} == {"a.txt": 6 + 2, "b.jsonl": 2 + 2}


@pytest.mark.fault(12)
def test_an_edited_part_is_another_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["train", "--preset", "debug", "--eval_interval", "0", "--set", "max_seq_length=24", "--output_dir", "run"]
    assert main([*flags, "--mix", "a.txt=0.7,b.jsonl=0.3", "--max_steps", "1"]) == 0
    write_json_lines(folder / "b.jsonl", [*documents("B")[1:]])
    line = refused(capsys, ["train", "--resume", "--output_dir", "run", "--max_steps", "2"])
    assert "was trained on another text" in line
