"""``nanokimi inspect data`` counts what is there, shows it without harm, and says in one line what is wrong."""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanokimi.cli import main
from nanokimi.config import TrainConfig
from nanokimi.data.batch import TokenArray
from nanokimi.data.corpus import Corpus
from nanokimi.data.loader import LoaderOptions
from nanokimi.data.sources import open_corpus
from nanokimi.insight import inspect_data
from nanokimi.insight.inspect_data import Document, Findings, look_at, plot_lengths, seen_documents, whole_documents

EOT = 256  # of the byte tokenizer
SEPARATOR = "\n<|endoftext|>\n"
LENGTHS = [5, 40, 5, 200, 17, 2, 64, 90, 33]  # in bytes, line end included: no two texts but the first and third equal
TEXTS = [chr(ord("a") + LENGTHS.index(length)) * (length - 1) + "\n" for length in LENGTHS]

Inspect = Callable[..., str]


@pytest.fixture
def inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Inspect:
    """Runs the command on a debug model in a folder of its own and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: str) -> str:
        assert main(["inspect", "data", "--preset", "debug", *arguments]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    path = tmp_path / "made_up.txt"
    path.write_text("<|endoftext|>\n".join(TEXTS))
    return path


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "library.txt"
    modules: list[Any] = [argparse, ast, json, re]
    path.write_text(SEPARATOR.join(Path(module.__file__).read_text(encoding="utf-8") for module in modules))
    return path


def opened(path: Path, dataset: str = "local") -> Corpus:
    config = TrainConfig(preset="debug", dataset=dataset, data_path=str(path), val_fraction=0.0)
    return open_corpus(config, "byte", log=lambda text: None)


def looked_at(path: Path, dataset: str = "local", *, length: int = 16, sequences: int = 10**6, **how: Any) -> Findings:
    return look_at(opened(path, dataset), LoaderOptions(length, 1, **{"seed": 3, **how}), sequences, keep=1)


def lengths(documents: list[Document]) -> list[int]:
    return sorted(document.n_tokens for document in documents)


# ---- what is counted ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_holds_every_document_in_full_and_once(made_up: Path, num_workers: int) -> None:
    found = looked_at(made_up, num_workers=num_workers)
    assert lengths(found.documents) == sorted(LENGTHS)
    assert all(document.whole for document in found.documents)
    n_tokens = sum(LENGTHS) + len(LENGTHS)
    assert found.n_sequences == (n_tokens - 1) // 16
    assert found.counts.sum() == found.n_sequences * 16


def test_a_few_sequences_show_their_documents_in_full(made_up: Path) -> None:
    row = np.array([id_ for text in TEXTS for id_ in (*text.encode(), EOT)])
    belongs_to = np.concatenate([[0], np.cumsum(row == EOT)[:-1]])
    for seed in range(6):
        found = look_at(opened(made_up), LoaderOptions(16, 1, seed=seed), 3, keep=3)
        at = [next(i for i in range(0, len(row), 16) if (row[i : i + 17] == sample).all()) for sample in found.samples]
        touched = {int(number) for start in at for number in belongs_to[start : start + 16]}
        assert lengths(found.documents) == sorted(LENGTHS[number] for number in touched)


def test_counts_are_those_of_the_inputs(made_up: Path) -> None:
    found = looked_at(made_up, length=8)
    row = np.array([id_ for text in TEXTS for id_ in (*text.encode(), EOT)])
    inputs = row[: (len(row) - 1) // 8 * 8]
    assert (found.counts == np.bincount(inputs, minlength=257)).all()
    assert found.n_bytes == (inputs != EOT).sum()
    assert found.n_mixed == sum((sequence[:-1] == EOT).any() for sequence in inputs.reshape(-1, 8))


def test_a_stream_shows_what_its_sequences_show(made_up: Path) -> None:
    found = looked_at(made_up, "localstreaming", shuffle_buffer=1, length=48, sequences=3)
    # 48 tokens each: 5 | 40 | 1 of 5; 4 of 5 | 43 of 200; 48 of 200
    assert [(d.n_tokens, d.whole) for d in found.documents] == [
        (5, False),
        (40, True),
        (1, False),
        (4, False),
        (43, False),
        (48, False),
    ]
    assert found.from_stream == found.n_sequences == 3


def test_the_edges_of_a_sequence_are_no_documents() -> None:
    sequence = np.array([EOT, 1, 2, EOT, EOT, 3, EOT])
    assert [(d.n_tokens, d.whole) for d in seen_documents(sequence, EOT)] == [(2, True), (0, True), (1, True)]
    assert [(d.n_tokens, d.whole) for d in seen_documents(np.array([1, EOT, 3]), EOT)] == [(1, False)]
    assert [(d.n_tokens, d.whole) for d in seen_documents(np.array([1, 2, 3]), EOT)] == [(2, False)]


def test_documents_are_found_whatever_the_size_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    row = TokenArray([np.array([*range(30), EOT, 7, EOT, EOT, *range(50)], np.uint16)])
    for block in (1, 3, 32, 1000):
        monkeypatch.setattr(inspect_data, "BLOCK_TOKENS", block)
        assert [(d.n_tokens, d.whole) for d in whole_documents(row, [2, 8], 10, EOT)] == [(30, True), (50, True)]
        assert lengths(list(whole_documents(row, [3], 10, EOT))) == [0, 1, 30, 50]


def test_a_search_for_the_end_of_a_document_ends_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_data, "LOOK_AROUND", 20)
    row = TokenArray([np.arange(1000).astype(np.uint16) % 200])
    (document,) = whole_documents(row, [30], 10, EOT)
    assert (document.n_tokens, document.whole) == (50, False)


def test_a_stream_is_looked_at_once(made_up: Path) -> None:
    n_tokens = sum(LENGTHS) + len(LENGTHS)
    for buffer in (1, 4, 1000):
        found = looked_at(made_up, "localstreaming", shuffle_buffer=buffer)
        assert n_tokens // 16 - 1 <= found.n_sequences <= n_tokens // 16 + 1


def test_what_is_looked_at_is_what_training_reads(library: Path) -> None:
    corpus, options = opened(library), LoaderOptions(128, 1, seed=11)
    found = look_at(corpus, options, 5, keep=5)
    for sample, batch in zip(found.samples, corpus.train.loader(options), strict=False):
        assert (sample == batch.rows()[0].numpy()).all()


# ---- the report ---------------------------------------------------------------------------------


def test_the_report_gives_the_counts_of_a_made_up_text(inspect: Inspect, made_up: Path) -> None:
    text = inspect("--data_path", str(made_up), "--val-fraction", "0", "--set", "max_seq_length=16")
    assert "training on 9 documents, 465 tokens, 456 bytes" in text
    assert "byte, 257 entries" in text
    assert "Looked at 29 sequences of an epoch of 29, not 1,000" in text
    assert "464 tokens, 456 bytes: 0.98 bytes per token" in text
    assert "8 documents ended in them" in text
    assert (
        f"min 2   median 33   mean {sum(LENGTHS) / 9:,.0f}   90 % {np.percentile(LENGTHS, 90):,.0f}   max 200" in text
    )
    assert "longer than the context: 66.7 %" in text  # 6 of 9
    assert re.search(r"^ +16 to +31 +1  █+  < context 16$", text, re.MULTILINE)


def test_copies_are_found_exactly(inspect: Inspect, tmp_path: Path) -> None:
    part = "the same again".ljust(31) + "\n"  # with its end of text 33 tokens
    texts = [part] * 3 + ["something else\n", "nothing like it\n"] + ["x" * 65 + "\n"] * 2
    (tmp_path / "copies.txt").write_text("<|endoftext|>\n".join(texts))
    text = inspect("--data_path", "copies.txt", "--val_fraction", "0", "--set", "max_seq_length=33")
    assert "5 of 7 whole documents (71.4 %) were seen more than once" in text
    found = looked_at(tmp_path / "copies.txt", length=33)
    row = [id_ for text in texts for id_ in (*text.encode(), EOT)]
    sequences = [tuple(row[at : at + 34]) for at in range(0, len(row) - 33, 33)]
    expected = sum(sequences.count(sequence) > 1 for sequence in sequences)
    assert expected >= 2
    assert sum(count for count in found.copies.values() if count > 1) == expected
    assert f"{expected} of {len(sequences)} sequences" in text


def test_parts_of_documents_are_no_copies_of_one_another(inspect: Inspect, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 1000)
    arguments = ["--dataset", "localstreaming", "--data_path", "a.txt", "--val_fraction", "0"]
    text = inspect(*arguments, "--sequences", "5", "--set", "max_seq_length=100", "--shuffle_buffer", "1")
    assert "0 of 0 whole documents were seen more than once" in text
    assert "5 of 5 sequences (100.0 %) were seen more than once" in text


@pytest.mark.parametrize("dataset", ["local", "localstreaming"])
@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_real_text_is_shown_with_its_statistics(inspect: Inspect, library: Path, dataset: str, tokenizer: str) -> None:
    text = inspect(
        "--data_path",
        str(library),
        "--dataset",
        dataset,
        "--set",
        f"tokenizer_name={tokenizer}",
        "--sequences",
        "50",
        "--show",
        "3",
        "--set",
        "max_seq_length=64",
    )
    assert "Looked at 50 sequences" in text
    assert f"Tokenizer  {tokenizer}, {257 if tokenizer == 'byte' else 300} entries" in text
    assert re.search(r"^ +\d+\.\d % +\d+  ' '$", text, re.MULTILINE)
    assert text.count("┌ start of the sequence") == text.count("└ end of the sequence") == 3
    assert ("may be cut" in text) == (dataset == "localstreaming")
    assert Image.open("data_lengths.png").size == (1100, 600)


def test_token_files_can_be_looked_at(inspect: Inspect, tmp_path: Path) -> None:
    np.array([*b"first", EOT, *b"second\n", EOT] * 20, "<u2").tofile(tmp_path / "t.bin")
    text = inspect(
        "--dataset",
        "tokenbin",
        "--data_path",
        "t.bin",
        "--val_fraction",
        "0",
        "--set",
        "tokenizer_name=byte",
        "--set",
        "max_seq_length=14",
    )
    assert "Looked at 19 sequences of an epoch of 19" in text
    assert "min 5   median 6   mean 6   90 % 7   max 7" in text
    assert "19 of 19 sequences (100.0 %) were seen more than once" in text
    assert "│ first\n├ end of text\n│ second\n├ end of text\n└ end" in text


def test_a_mixture_shows_its_shares(inspect: Inspect, made_up: Path, library: Path) -> None:
    mix = f"{library}=0.75,localstreaming:{made_up}=0.25"
    text = inspect("--mix", mix, "--sequences", "40", "--val_fraction", "0", "--set", "max_seq_length=16")
    assert f"75.0 % from {library}" in text
    assert f"25.0 % from localstreaming:{made_up}" in text
    whole = [len(text) for text in library.read_text().split(SEPARATOR[1:])]
    (longest,) = re.findall(r"max ([\d,]+)", text)
    assert int(longest.replace(",", "")) in [length + extra for length in whole for extra in (0, 1)]


def test_a_label_is_the_next_token(inspect: Inspect, tmp_path: Path) -> None:
    (tmp_path / "abc.txt").write_text("".join(map(chr, range(97, 123))))
    arguments = ["--data_path", "abc.txt", "--val_fraction", "0", "--set", "max_seq_length=26"]
    text = inspect(*arguments, "--show", "0")
    assert "  input  'a'  'b'  'c'  'd'  'e'\n  label  'b'  'c'  'd'  'e'  'f'\n" in text
    assert "start of the sequence" not in text


def test_a_long_sequence_is_shortened_in_the_middle(inspect: Inspect, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a" * 230 + "\n<|endoftext|>\n" + "b" * 770)
    text = inspect("--data_path", "long.txt", "--val_fraction", "0", "--set", "max_seq_length=1000")
    lines = text[text.index("┌ start") : text.index("└ end")].splitlines()
    assert lines[1:] == [
        "│ " + "a" * 200,
        "┊ ... 700 tokens left out, 1 end of text among them ...",
        "│ " + "b" * 100,
    ]


def test_no_control_character_reaches_the_terminal(inspect: Inspect, tmp_path: Path) -> None:
    name = "ev\x1b]0;il.txt"
    (tmp_path / name).write_text("\x1b]0;title\x07 \x1b[2J \x00 \x7f \x9b31m \x0b tab\there\n" * 9)
    text = inspect(
        "--data_path",
        name,
        "--dataset",
        "localstreaming",
        "--val_fraction",
        "0",
        "--set",
        "max_seq_length=64",
        "--show",
        "9",
    )
    assert "training on a stream of ev]0;il.txt" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert "␛]0;title␇ ␛[2J ␀ ␡ \\x9b31m ␋ tab\there" in text
    assert r"'\x1b'" in text


# ---- the picture and the mistakes ---------------------------------------------------------------


def test_the_picture_is_drawn_for_every_kind_of_length(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    blank = None
    for documents in (
        [],
        [(0, True)],
        [(1, True)],
        [(7, False)],
        [(10**6, True), (1, True), (0, True), (300, False)] * 50,
    ):
        plot_lengths([Document(n, whole, b"") for n, whole in documents], 128, path)
        pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
        blue = int((pixels == (0x00, 0x72, 0xB2)).all(1).sum())
        assert (blue > 500) == any(n and whole for n, whole in documents)
        blank = pixels if blank is None else blank
    assert not np.array_equal(blank, pixels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sequences", "0"], "--sequences must be 1 or more, got 0"),
        (["--show", "-1"], "--show must be 0 or more, got -1"),
        (["--sequences", "many"], "--sequences: invalid int value"),
        (["--output", "."], "--output . is a directory"),
        (["--output", "made_up.txt/a.png"], "--output made_up.txt/a.png: cannot be written"),
        (["--data_path", "missing.txt"], "--data_path missing.txt: no such file"),
        (["--seed", "x"], "seed takes a whole number"),
        (["--set", "vocab_sise=3"], "did you mean vocab_size"),
        (["--val_fraction", "0", "--set", "max_seq_length=10000"], "the text is too short"),
        (["--learning_rate", "1"], "unrecognized arguments: --learning_rate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_nothing_is_drawn(
    inspect: Inspect, made_up: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        code: Any = main(["inspect", "data", "--preset", "debug", "--data_path", made_up.name, *arguments])
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert message in said.err.splitlines()[-1]
    assert not list(made_up.parent.glob("*.png"))


def test_an_output_that_cannot_be_written_costs_no_work(
    inspect: Inspect, made_up: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **more: Any) -> Corpus:
        raise AssertionError("the data was opened")

    monkeypatch.setattr("nanokimi.insight.inspect_data.open_corpus", never)
    assert main(["inspect", "data", "--data_path", str(made_up), "--output", "made_up.txt/a.png"]) == 2


def test_settings_of_a_run_are_read_from_its_file(inspect: Inspect, made_up: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('data_path = "made_up.txt"\nmax_seq_length = 16\nlearning_rate = 0.5\n')
    text = inspect("--config", "run.toml", "--val_fraction", "0", "--output", "new/folder/a.png")
    assert "Context    16 tokens" in text
    assert (tmp_path / "new" / "folder" / "a.png").stat().st_size > 5000
