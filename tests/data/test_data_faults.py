"""What goes wrong with data, met through ``nanokimi train``: one line that names the remedy, exit code 2."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub import LoopbackHub, jsonl_file, readme, run_with_hub
from streams import END, LENGTH, corpus, loader, write_json_lines, write_parquet, write_text

from nanokimi import checkpoint
from nanokimi.cli import main
from nanokimi.data import stream
from nanokimi.data.batch import Batch
from nanokimi.data.loader import BatchLoader, permutation
from nanokimi.data.token_files import write_tokens
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.training.trainer import Trainer

# What is said of progress; the last two tell what an open source holds, and how the run multiplies.
PROGRESS = ("reading ", "tokenising ", "checking ", "training on ", "products: ")
MORE = b" and more words" * 3
TEXT_SOURCES = ("local", "localstreaming")

pytestmark = pytest.mark.usefixtures("folder_of_runs")

Write = Callable[[Path], object]


def flags(dataset: str, path: str | Path, *more: str) -> list[str]:
    quick = ["--preset", "debug", "--eval_interval", "0", "--set", "max_seq_length=24"]
    quick += ["--max_steps", "2", "--warmup_steps", "0"]
    return ["train", "--dataset", dataset, "--data_path", str(path), "--output_dir", "run", *quick, *more]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    """The one line with which a command is refused, beside what is said about progress."""
    capsys.readouterr()
    assert main(arguments) == code
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = (x for x in said.err.splitlines() if not x.startswith(PROGRESS))
    assert line.startswith("nanokimi: ")
    return line.removeprefix("nanokimi: ")


def holds(data: bytes) -> Write:
    return lambda path: path.write_bytes(data)


def rows(*texts: str | None) -> Write:
    return lambda path: write_parquet(path, texts) if path.suffix == ".parquet" else write_json_lines(path, texts)


def table(**columns: list[Any]) -> Write:
    def write(path: Path) -> None:
        if path.suffix == ".parquet":
            pq.write_table(pa.table(columns), path)
        else:
            records = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
            path.write_text("".join(json.dumps(record) + "\n" for record in records))

    return write


def bad_utf8(path: Path) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array([b"good", b"caf\xe9" + MORE], pa.binary()).view(pa.string())}), path)
    else:
        text = b"caf\xe9" + MORE
        path.write_bytes(b'{"text": "good"}\n{"text": "%s"}\n' % text if path.suffix == ".jsonl" else b"good " + text)


def ids(*tokens: int, dtype: str = "<u2") -> Write:
    return lambda path: np.array(tokens, dtype).tofile(path)


def ours(path: Path, *, keep: float = 1.0, tokenizer_name: str = "byte") -> None:
    with write_tokens(path, load_tokenizer(tokenizer_name)) as writer:
        writer.add([*range(200)] * 5, 1000)
    os.truncate(path, int(path.stat().st_size * keep))


LARGE = [70_000 % 257, 300, 5, 66, 77, 40, 9] * 100

# number of the fault, files, what they hold, more flags, what the line says
TEXT_FAULTS: list[tuple[int, str, Write | None, tuple[str, ...], str]] = [
    (1, "t.txt", holds(b""), (), "--data_path t.txt: the file is empty: name a text file"),
    (1, "t.jsonl", holds(b""), (), "--data_path t.jsonl: the file is empty"),
    (1, "t.parquet", rows(), (), "--data_path t.parquet: the text is blank: name one with something in it"),
    (1, "t.txt", holds(b" \r\n\t\n<|endoftext|>\n\n"), (), "--data_path t.txt: the text is blank"),
    (1, "t.jsonl", rows("", None, " \n"), (), "--data_path t.jsonl: the text is blank"),
    (1, "t.parquet", rows("", None, " \n"), (), "--data_path t.parquet: the text is blank"),
    (1, "t.txt.gz", lambda path: path.write_bytes(gzip.compress(b"")), (), "--data_path t.txt.gz: the text is blank"),
    (
        2,
        "t.txt",
        holds(b"abc def\n"),
        (),
        "one sequence of max_seq_length 24 needs 25 tokens, the text has 9: use more",
    ),
    (2, "t.jsonl", rows("abc", "def"), (), "needs 25 tokens, the text has 8"),
    (2, "t.parquet", rows("abc", "def"), (), "needs 25 tokens, the text has 8"),
    (3, "t.txt", holds(b"abc def\n" * 31), ("--batch_size", "50"), "--batch_size is 50 but the text makes only 9 seq"),
    (3, "t.parquet", rows(*["abcdefg"] * 31), ("--batch_size", "50"), "--batch_size is 50 but the text makes only 9"),
    (4, "gone.txt", None, (), "--data_path gone.txt: no such file: check the path"),
    (4, "gone.parquet", None, (), "--data_path gone.parquet: no such file"),
    (4, "go*.jsonl", None, (), "--data_path go*.jsonl: no such file"),
    (4, "t.txt", holds(b"x" * 99), ("--val_path", "gone.txt"), "--val_path gone.txt: no such file"),
    (5, "t.txt", Path.mkdir, (), "--data_path t.txt is a directory without text: it needs .txt"),
    (5, "t.txt", holds(b"x" * 99), ("--val_path", "nothing"), "--val_path nothing is a directory without text"),
    (6, "t.txt", bad_utf8, (), "t.txt: not UTF-8 at byte 8: convert it (iconv -t utf-8), or go on with --encoding_err"),
    (
        6,
        "t.jsonl",
        bad_utf8,
        (),
        "t.jsonl: not UTF-8 at byte 30: convert it (iconv -t utf-8), or go on with --encoding_errors replace",
    ),
    (6, "t.parquet", bad_utf8, (), "t.parquet row 1: not UTF-8 at byte 3 of the text: go on with --encoding_errors"),
    (28, "t.jsonl", table(a=["x"], b=["y"]), (), "which column holds the text? Name it with --text_column; there are"),
    (28, "t.parquet", table(a=["x"], b=["y"]), (), "Name it with --text_column; there are: a (string), b (string)"),
    (28, "t.jsonl", table(n=[1]), (), "which column holds the text? Name it with --text_column; there are: n (int)"),
    (28, "t.parquet", table(a=["x"]), ("--text_column", "b"), "no column 'b': choose another --text_column of: a (str"),
    (28, "t.jsonl", table(text=[5]), (), "t.jsonl at byte 0: the text is of type int, not a string: choose another"),
    (0, "t.jsonl", holds(b'{"text": \n'), (), "t.jsonl: the line at byte 0 is not JSON"),
    (0, "t.parquet", holds(b"PAR1 no more"), (), "t.parquet: not a Parquet file, or damaged"),
    (0, "t.txt.gz", holds(b"not gzip at all" * 9), (), "t.txt.gz: cannot be read"),
    (0, "t.jsonl.zst", holds(b"not zstd at all" * 9), (), "t.jsonl.zst: cannot be read"),
]

TOKEN_FAULTS: list[tuple[int, str, Write | None, tuple[str, ...], str]] = [
    (2, "t.bin", ids(*range(10)), (), "one sequence of max_seq_length 24 needs 25 tokens, the text has 10"),
    (3, "t.bin", ids(*range(200)), ("--batch_size", "50"), "--batch_size is 50 but the text makes only 7 sequences"),
    (4, "gone.bin", None, (), "--data_path gone.bin: no such file: check the path, or make it with"),
    (5, "t.bin", Path.mkdir, (), "--data_path t.bin is a directory without .bin files: make them with"),
    (14, "t.bin", lambda path: ours(path, keep=0.9), (), "t.bin: truncated or damaged: "),
    (17, "t.bin", holds(b"\1\0\2\0\3"), (), "t.bin: 5 bytes are no whole number of uint16 tokens"),
    (18, "t.bin", holds(b""), (), "t.bin: the file is empty: make it anew with `nanokimi prepare`"),
    (19, "t.bin", ids(*LARGE, dtype="<u4"), (), "t.bin: looks like uint32 tokens and would be read as uint16: say so"),
    (
        20,
        "t.bin",
        holds(b"Once upon a time.\n" * 50),
        (),
        "t.bin: this is text, not tokens: train on it with --dataset",
    ),
    (20, "t.txt", holds(b"Once upon a time.\n" * 50), (), "t.txt: this is text, not tokens"),
    (21, "t.bin", ids(*[1, 2, 3] * 50, 257), (), "t.bin: token 257 at position 150 is beyond the 257 entries of byte"),
    (13, "t.bin", ours, ("--set", "tokenizer_name=other.json"), "t.bin: made by another tokenizer (byte) than other.j"),
    (41, "t.bin", ids(*range(200)), ("--val_path", "t.bin"), "--val_path t.bin: is trained on too"),
]

CASES = [
    *((dataset, *fault) for dataset in TEXT_SOURCES for fault in TEXT_FAULTS),
    *(("tokenbin", *fault) for fault in TOKEN_FAULTS),
]


@pytest.mark.fault(1, 2, 3, 4, 5, 6, 13, 14, 17, 18, 19, 20, 21, 28, 41)
@pytest.mark.parametrize(
    ("dataset", "number", "name", "write", "more", "message"),
    CASES,
    ids=[f"{case[1]}-{case[0]}-{case[2]}-{i}" for i, case in enumerate(CASES)],
)
def test_a_mistake_in_the_data_is_one_line(
    folder_of_runs: Path,
    capsys: pytest.CaptureFixture[str],
    dataset: str,
    number: int,
    name: str,
    write: Write | None,
    more: tuple[str, ...],
    message: str,
    request: pytest.FixtureRequest,
) -> None:
    marker = request.node.get_closest_marker("fault")
    assert marker is not None
    assert number in (0, *marker.args)
    if "tokenizer_name=other.json" in more:
        (folder_of_runs / "corpus.txt").write_text("some words and some more words\n" * 9)
        assert main(["tokenizer", "train", "corpus.txt", "--vocab_size", "270", "--output", "other.json"]) == 0
    (folder_of_runs / "nothing").mkdir()
    if write is not None:
        write(folder_of_runs / name)
    line = refused(capsys, flags(dataset, name, *more))
    assert message in line
    assert not list(folder_of_runs.glob("run/checkpoints/*"))
    assert not list(folder_of_runs.glob("**/*.nanokimi/*/*.bin")) or number in (2, 3), "nothing of it is kept"


@pytest.mark.fault(6)
@pytest.mark.parametrize("dataset", TEXT_SOURCES)
@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.parquet"])
def test_bytes_that_are_not_utf8_can_be_replaced(folder_of_runs: Path, dataset: str, name: str) -> None:
    """With --encoding_errors replace."""
    bad_utf8(folder_of_runs / name)
    more = ("--encoding_errors", "replace", "--val_fraction", "0", "--batch_size", "1")
    assert main(flags(dataset, name, *more)) == 0
    source = corpus(dataset=dataset, data_path=name, encoding_errors="replace", val_fraction=0.0)
    batches = islice(iter(loader(source, batch_size=1)), 2)
    seen = [bytes(t if t < 256 else 0 for t in batch.rows()[0].tolist()) for batch in batches]
    assert any("caf\ufffd and".encode() in sequence for sequence in seen)


@pytest.mark.fault(23)
@pytest.mark.parametrize("name", ["plain.bin", "ours.bin"])
def test_token_files_that_shrink_during_a_run_end_it_in_one_line(
    folder_of_runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Exit code 1, and no bus error."""
    (ids(*[*range(200)] * 5) if name == "plain.bin" else ours)(folder_of_runs / name)
    step = Trainer._train_step

    def truncating(self: Trainer, batches: Iterator[Batch]) -> dict[str, Any]:
        if self.counters.step == 1:
            os.truncate(folder_of_runs / name, 100)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", truncating)
    assert main(flags("tokenbin", name)) == 1
    said = capsys.readouterr().err.splitlines()
    assert f"{name}: the token file was truncated while in use: make it anew, then --resume" in said[-1]
    assert "the run is saved as it was after step 1" in said[-1]
    assert sum(line.startswith("nanokimi: ") for line in said) == 1


@pytest.mark.fault(12)
def test_a_stream_that_changes_during_a_run_ends_it_in_one_line(
    folder_of_runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(folder_of_runs / "t.txt", ["a line of text\n" * 20] * 3)
    step = Trainer._train_step

    def edited(self: Trainer, batches: Iterator[Batch]) -> dict[str, Any]:
        if self.counters.step == 1:
            (folder_of_runs / "t.txt").write_text("another text\n" * 90)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", edited)
    assert main(flags("localstreaming", "t.txt", "--max_steps", "50", "--shuffle_buffer", "1")) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("nanokimi: t.txt: the text was changed while it was read: start again; the run is saved")


@pytest.mark.fault(24)
@pytest.mark.parametrize("dataset", ["local", "localstreaming", "tokenbin"])
def test_a_position_in_another_context_or_split_is_refused(
    folder_of_runs: Path, capsys: pytest.CaptureFixture[str], dataset: str
) -> None:
    """The line says what was saved and what is asked for now."""
    name = "t.bin" if dataset == "tokenbin" else "t.txt"
    ids(*[*range(200)] * 5)(folder_of_runs / "t.bin")
    (folder_of_runs / "t.txt").write_text("a line of text\n" * 60)
    assert main(flags(dataset, name)) == 0
    resume = ["train", "--resume", "--output_dir", "run", "--max_steps", "3"]
    assert "max_seq_length (saved 24, now 48)" in refused(capsys, [*resume, "--set", "max_seq_length=48"])
    assert "val_fraction (saved 0.05, now 0.2)" in refused(capsys, [*resume, "--val_fraction", "0.2"])
    assert main([*resume, "--set", "max_seq_length=48", "--override", "max_seq_length"]) == 0
    assert checkpoint.read(folder_of_runs / "run" / "checkpoints" / "final.pt")["counters"]["step"] == 3


# ---- what a run goes on with ------------------------------------------------------------------------------


def tokens_of(dataset: str, path: Path) -> list[int]:
    """What the first epoch of a source trains on, in its order, as far as it fills sequences."""
    source = corpus(dataset=dataset, data_path=path, val_fraction=0.0)
    if source.train.tokens is not None:
        return source.train.tokens.read(0, len(source.train.tokens)).tolist()
    found: list[int] = []
    batches: Any = loader(source, batch_size=1, shuffle_buffer=1)
    for batch in batches:
        if batches.epoch:
            return found
        found += batch.tokens[0].tolist()
    raise AssertionError


@pytest.mark.fault(8, 9)
@pytest.mark.parametrize("dataset", TEXT_SOURCES)
@pytest.mark.parametrize("before", [b"\xef\xbb\xbf", b"\r\n"])
def test_a_byte_order_mark_and_line_ends_change_no_token(folder_of_runs: Path, dataset: str, before: bytes) -> None:
    """The mark is left out, CRLF is read as LF, also around separators."""
    plain = b"".join(f"{i} one\n{i} two\n<|endoftext|>\n".encode() for i in range(40))
    odd = plain.replace(b"\n", b"\r\n") if before == b"\r\n" else before + plain
    (folder_of_runs / "plain.txt").write_bytes(plain)
    (folder_of_runs / "odd.txt").write_bytes(odd)
    wanted = tokens_of(dataset, folder_of_runs / "plain.txt")
    assert tokens_of(dataset, folder_of_runs / "odd.txt") == wanted
    assert wanted[:6] == [*b"0 one\n"]
    assert main(flags(dataset, "odd.txt")) == 0


@pytest.mark.fault(10, 30)
@pytest.mark.parametrize("dataset", TEXT_SOURCES)
@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.parquet"])
def test_nul_bytes_and_documents_without_text_are_told_and_trained_around(
    folder_of_runs: Path, capsys: pytest.CaptureFixture[str], dataset: str, name: str
) -> None:
    """With their counts."""
    texts = [f"document {i} of many\n" for i in range(50)]
    odd = [*texts[:20], " \n", "", "\0\0\0 three\n", *texts[20:], "\n"]
    {"t.txt": write_text, "t.jsonl": write_json_lines, "t.parquet": write_parquet}[name](folder_of_runs / name, odd)  # type: ignore[operator]
    assert main(flags(dataset, name, "--val_fraction", "0", "--max_steps", "1", "--batch_size", "8")) == 0
    said = capsys.readouterr().err
    assert re.search(r"\b3 NUL bytes", said), said
    assert re.search(r"\b3 documents without text", said), said
    assert "Traceback" not in said
    (folder_of_runs / "plain.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in odd if t.strip()))
    assert tokens_of(dataset, folder_of_runs / name) == tokens_of(dataset, folder_of_runs / "plain.jsonl")


@pytest.mark.fault(12, 13, 14, 15)
def test_what_is_wrong_with_a_cache_is_made_good_on_the_way(
    folder_of_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Edited text, another tokenizer, damaged tokens, nowhere to put them beside the text."""
    path = folder_of_runs / "t.txt"
    path.write_text("a line of text\n" * 200)

    def made_anew() -> bool:
        capsys.readouterr()
        assert main(flags("local", path)) == 0
        return "tokenising" in capsys.readouterr().err

    assert made_anew()
    assert not made_anew()
    path.write_text("another line of text\n" * 200)
    assert made_anew()
    (tokens,) = folder_of_runs.glob("t.txt.nanokimi/*/train-00000.bin")
    os.truncate(tokens, tokens.stat().st_size - 8)
    assert made_anew()
    data = tokens.read_bytes()
    tokens.write_bytes(data[:20_000] + bytes([data[20_000] ^ 1]) + data[20_001:])
    assert made_anew()
    assert main(flags("local", path, "--set", "tokenizer_name=bpe:270")) == 0
    assert "tokenising" in capsys.readouterr().err
    assert not made_anew()
    (folder_of_runs / "b.txt").write_text("a line of text\n" * 60)
    (folder_of_runs / "b.txt.nanokimi").write_text("in the way of a folder")
    assert main(flags("local", "b.txt")) == 0
    assert list(folder_of_runs.glob("cache/nanokimi/b.txt-*/*/train-00000.bin"))


# ---- labels -----------------------------------------------------------------------------------------------


@pytest.mark.fault(31)
@pytest.mark.parametrize("dataset", ["local", "localstreaming", "tokenbin"])
def test_every_label_is_a_token_of_the_text_and_none_stands_for_padding(
    folder_of_runs: Path, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    """Sequences are full; in an epoch every token is the label of its forerunner once, to the last rest."""
    monkeypatch.setattr(stream, "LANES", 1)
    texts = [f"document {i} " + "words " * (i % 11) + "\n" for i in range(60)]
    expected = [token for text in texts for token in (*text.encode(), END)]
    write_text(folder_of_runs / "t.txt", texts)
    ids(*expected)(folder_of_runs / "t.bin")
    name = "t.bin" if dataset == "tokenbin" else "t.txt"
    source = corpus(dataset=dataset, data_path=name, val_fraction=0.0)
    batches = loader(source, batch_size=1, shuffle_buffer=1)
    n = (len(expected) - 1) // LENGTH
    found = [batch.rows()[0] for batch in islice(iter(batches), n)]
    if isinstance(batches, BatchLoader):
        order = permutation(5, 0, n).tolist()
        found = [found[order.index(i)] for i in range(n)]
    assert all(sequence.shape == (LENGTH + 1,) for sequence in found)
    labels, before = torch.cat([s[1:] for s in found]).tolist(), torch.cat([s[:-1] for s in found]).tolist()
    assert labels == expected[1 : n * LENGTH + 1]
    assert before == expected[: n * LENGTH]
    assert labels.count(END) == sum(token == END for token in expected[1 : n * LENGTH + 1]) > 50


@pytest.mark.fault(31)
@pytest.mark.parametrize("dataset", ["local", "localstreaming"])
def test_a_run_counts_as_many_labels_as_its_sequences_have(folder_of_runs: Path, dataset: str) -> None:
    """None of them was left out as padding."""
    (folder_of_runs / "t.txt").write_text("a line of text\n" * 60)
    assert main(flags(dataset, "t.txt", "--batch_size", "3", "--gradient_accumulation", "2")) == 0
    assert checkpoint.read(folder_of_runs / "run" / "checkpoints" / "final.pt")["counters"]["tokens"] == 2 * 3 * 2 * 24


# ---- the hub ----------------------------------------------------------------------------------------------

RUNS = """
import contextlib, io, json, sys
from nanokimi.cli import main
answers = []
for arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(arguments)
    answers.append([code, said.getvalue().splitlines()])
print(json.dumps(answers))
"""


def hub_runs(url: str, folder_of_runs: Path, *runs: list[str], **environment: str) -> list[tuple[int, list[str]]]:
    """Exit code and stderr of each run, in one process for which ``url`` is the hub."""
    done = run_with_hub(url, RUNS, json.dumps(runs), tmp_path=folder_of_runs, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [(code, lines) for code, lines in json.loads(done.stdout)]


@pytest.mark.fault(25, 28, 29)
def test_what_is_wrong_with_a_hub_data_set_is_one_line(folder_of_runs: Path) -> None:
    """Missing, gated, without a column of text, of several configurations."""
    texts = jsonl_file({"text": f"row {i} " + "of words " * 9} for i in range(20))
    two = {"README.md": readme({"en": "en.jsonl", "de": "de.jsonl"}), "en.jsonl": texts, "de.jsonl": texts}
    with LoopbackHub(
        {
            "org/gated": {"train.jsonl": texts},
            "org/numbers": {"train.jsonl": jsonl_file({"a": i, "b": str(i), "c": str(i)} for i in range(9))},
            "org/two": two,
        },
        gated=["org/gated"],
    ) as hub:
        names = ("gone", "gated", "numbers", "two")
        runs = [flags("hfstreaming", "unused", "--hf_repo_name", f"org/{name}") for name in names]
        refusals = hub_runs(hub.url, folder_of_runs, *runs)
    remedies = ["hf auth login", "accept its terms on the hub and run `hf auth login`", "--text_column", "--hf_config"]
    for (failed, lines), remedy in zip(refusals, remedies, strict=True):
        assert failed == 2
        assert len(lines) == 1
        assert remedy in lines[0]
    assert "a (int64), b (string), c (string)" in refusals[2][1][0]
    assert "de, en" in refusals[3][1][0] or "en, de" in refusals[3][1][0]


@pytest.mark.fault(27)
def test_without_a_network_the_alternatives_are_named(folder_of_runs: Path) -> None:
    runs = [flags(dataset, "unused", "--hf_repo_name", "org/good") for dataset in ("hfstreaming", "fineweb")]
    for code, lines in hub_runs("http://127.0.0.1:9", folder_of_runs, *runs, HF_HUB_OFFLINE="1"):
        assert code == 2
        assert len(lines) == 1
        assert "work offline with --dataset local, localstreaming or tokenbin" in lines[0]
