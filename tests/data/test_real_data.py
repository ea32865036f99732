"""Data as people really have them: null fields, stray files, odd tokenizers, errors far into a stream."""

from __future__ import annotations

import json
import os
import signal
import threading
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from streams import corpus, plain
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from nanokimi import checkpoint
from nanokimi.cli import main
from nanokimi.config import TrainConfig
from nanokimi.console import attended
from nanokimi.data import tokenizer as tokenizers_of_ours
from nanokimi.data.finding import Search
from nanokimi.data.hub import _choose_column
from nanokimi.data.local import LocalDocuments, find_files
from nanokimi.data.sources import open_corpus
from nanokimi.data.tokenbin import find_token_files
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from nanokimi.errors import UserError
from nanokimi.files import atomic_write
from nanokimi.insight.text import choose_text

pytestmark = pytest.mark.usefixtures("folder_of_runs")

GREEK = "Η γλώσσα είναι ένα σύστημα επικοινωνίας, και αλλάζει με τον χρόνο. " * 40
ENGLISH = "The language is a system of words and it changes with time. " * 40


def train(*more: str, steps: int = 2) -> int:
    quick = ["--preset", "debug", "--max_steps", str(steps), "--eval_interval", "0", "--set", "max_seq_length=24"]
    return main(["train", *quick, "--val_fraction", "0", *more])


def write_rows(path: str, *rows: dict[str, Any]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- which column ------------------------------------------------------------------------------------


@pytest.mark.fault("A1")
@pytest.mark.parametrize("dataset", ["local", "localstreaming"])
def test_a_field_that_is_null_at_first_is_not_overlooked(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows("t.jsonl", {"url": "u", "content": None}, *({"url": "u", "content": "some words " * 9},) * 20)
    assert train("--dataset", dataset, "--data_path", "t.jsonl") == 2
    said = capsys.readouterr().err
    assert "Name it with --text_column; there are: url (string), content (string)" in said
    assert train("--dataset", dataset, "--data_path", "t.jsonl", "--text_column", "content") == 0


@pytest.mark.fault("A1")
def test_the_only_column_of_text_is_taken_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows("t.jsonl", {"n": 1, "body": None}, *({"n": None, "body": "some words " * 9},) * 20)
    pq.write_table(pa.table({"n": [1] * 20, "story": ["some words " * 9] * 20}), "t.parquet")
    assert train("--data_path", "t.jsonl,t.parquet") == 0
    said = capsys.readouterr().err
    assert "note: t.jsonl: the text is 'body', the only column with text (--text_column)" in said
    assert "note: t.parquet: the text is 'story', the only column with text (--text_column)" in said
    assert main(["tokenizer", "train", "t.jsonl", "--vocab_size", "280", "--output", "t.json"]) == 0
    assert "note: t.jsonl: the text is 'body'" in capsys.readouterr().err


@pytest.mark.fault("A1")
def test_columns_of_a_stream_without_declared_types_are_looked_at_until_they_are_known() -> None:
    from datasets import load_dataset

    Path("t.csv").write_text("url,content\n" + "u,\n" * 300 + "u,words\n" * 300)
    stream = load_dataset("csv", data_files="t.csv", split="train", streaming=True)
    with pytest.raises(UserError, match=r"--text_column; there are: url \(string\), content \(string\)"):
        _choose_column(stream, "", "owner/name")


# ---- tokenizers that change or lose text ---------------------------------------------------------------


def metaspace(*, normaliser: Any = None, unknown: str | None = None) -> str:
    """A Metaspace BPE that knows the letters of English only; returns the name of its file."""
    inner = HFTokenizer(models.BPE(unk_token=unknown))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if normaliser is not None:
        inner.normalizer = normaliser
    special = ["</s>"] if unknown is None else ["</s>", unknown]
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    inner.train_from_iterator([ENGLISH, ENGLISH.lower(), "\n"], trainer)
    inner.save("metaspace.json")
    return "metaspace.json"


def opened(name: str, text: str, dataset: str = "local") -> list[str]:
    """What is said when ``text`` is opened with a tokenizer."""
    Path("t.txt").write_text(text)
    said: list[str] = []
    open_corpus(TrainConfig(dataset=dataset, data_path="t.txt"), name, named=True, log=said.append)
    return said


@pytest.mark.fault("A2")
@pytest.mark.parametrize("dataset", ["local", "localstreaming"])
def test_a_tokenizer_that_loses_text_is_refused(dataset: str) -> None:
    with pytest.raises(UserError, match=r"metaspace.json: loses text: 'Η' \(U\+0397\) in t.txt does not come back"):
        opened(metaspace(), GREEK, dataset)
    assert opened(metaspace(), ENGLISH, dataset) == []


@pytest.mark.fault("A2")
@pytest.mark.parametrize(
    ("design", "text", "why"),
    [
        ({"normaliser": normalizers.Lowercase()}, ENGLISH, "its normaliser"),
        ({"normaliser": normalizers.Replace("λ", "l")}, ENGLISH + "λ", "its normaliser"),
        ({"unknown": "<unk>"}, ENGLISH + "λλ ", "2 unknown tokens"),
    ],
)
def test_what_a_tokenizer_changes_by_design_is_counted_in_a_warning(
    design: dict[str, Any], text: str, why: str
) -> None:
    (said,) = opened(metaspace(**design), text)
    assert said.startswith("warning: tokenizer metaspace.json does not give back 1 of 1 samples of t.txt")
    assert why in said


@pytest.mark.fault("A2")
def test_training_and_eval_count_the_same_bytes() -> None:
    Path("t.txt").write_text(ENGLISH + "λ" * 50)
    tokenizer = load_tokenizer(metaspace(unknown="<unk>"))
    (text,) = choose_text(TrainConfig(data_path="t.txt"), tokenizer, held_out=False, log=lambda line: None)
    (part,) = text.read(lambda count: None)
    assert part.n_bytes == tokenizer.count_bytes(torch.tensor(part.tokens)) == len(ENGLISH) + 1  # a space before it
    assert tokenizer.decode(part.tokens).count("<unk>") == 50


@pytest.mark.fault("A2")
def test_a_text_that_a_tokenizer_cannot_take_is_one_line() -> None:
    inner = HFTokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="<none>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    with pytest.raises(UserError, match="tokenizer words: cannot tokenise the text"):
        Tokenizer(inner, "words").encode("b")


# ---- files that nobody meant ---------------------------------------------------------------------------


def found(path: str) -> tuple[list[str], str]:
    search = Search()
    return [str(file) for file in find_files(path, "--data_path", search)], search.note


@pytest.mark.fault("A6")
def test_hidden_files_are_left_out_unless_they_are_named() -> None:
    for name in ("d/a.txt", "d/._a.txt", "d/.ipynb_checkpoints/a-checkpoint.txt", "d/e/b.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    for path in ("d", "d/**/*.txt", "d/**"):
        files, note = found(path)
        assert files == ["d/a.txt", "d/e/b.txt"], path
        assert "names that begin with a dot (" in note
        assert "d/._a.txt" in note
        assert "d/.ipynb_checkpoints" in note
    assert found("d/._a.txt") == (["d/._a.txt"], "")
    assert found("d/.ipynb_checkpoints/*.txt")[0] == ["d/.ipynb_checkpoints/a-checkpoint.txt"]
    Path("d/._t.bin").write_bytes(b"x")
    Path("d/t.bin").write_bytes(b"x")
    assert find_token_files("d", "--data_path", Search()) == [Path("d/t.bin")]


@pytest.mark.fault("A6")
def test_linked_folders_are_followed_once_and_each_file_is_read_once() -> None:
    Path("other").mkdir()
    Path("other/far.txt").write_text("far")
    Path("d/e").mkdir(parents=True)
    Path("d/a.txt").write_text("a")
    os.link("d/a.txt", "d/b.txt")
    Path("d/0.txt").symlink_to("a.txt")
    Path("d/e/loop").symlink_to("..", target_is_directory=True)
    Path("d/linked").symlink_to("../other", target_is_directory=True)
    for path in ("d", "d/**/*.txt", "d/**"):
        files, note = found(path)
        assert files == ["d/a.txt", "d/linked/far.txt"], path
        assert "links to folders that are read already (d/e/loop)" in note
        assert "further names of files that are read already (d/b.txt, d/0.txt)" in note
    assert found("d/b.txt,d/a.txt")[0] == ["d/b.txt"]
    assert LocalDocuments("d").notes == [f"d: left out {found('d')[1]}"]


# ---- errors far into a stream ----------------------------------------------------------------------------


def rows_with_a_mistake(number: int, mistake: str) -> str:
    lines = [json.dumps({"text": f"row {i} of a long text, which goes on for a while"}) for i in range(1, 401)]
    lines[number - 1] = mistake.ljust(len(lines[number - 1]))
    return "\n".join(lines) + "\n"


@pytest.mark.fault("A13")
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_stream_that_fails_late_is_saved_and_goes_on_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    monkeypatch.setattr("nanokimi.data.stream.CHUNK_CHARACTERS", 400)
    flags = ["--dataset", "localstreaming", "--data_path", "t.jsonl", "--batch_size", "3", "--shuffle_buffer", "10"]
    flags += ["--num_workers", workers, "--save_interval", "0"]
    text = Path("t.jsonl")
    text.write_text(rows_with_a_mistake(301, ""))  # a blank line is passed over
    os.utime(text, (1, 1))
    assert train(*flags, "--output_dir", "whole", steps=110) == 0
    text.write_text(rows_with_a_mistake(301, "no JSON"))
    os.utime(text, (1, 1))
    assert train(*flags, "--output_dir", "broken", steps=110) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "is not JSON" in line
    saved = checkpoint.read(Path("broken/checkpoints/latest.pt"))["counters"]["step"]
    assert f"the run is saved as it was after step {saved}: mend the data, and go on with --resume" in line
    assert saved > 50
    text.write_text(rows_with_a_mistake(301, ""))
    os.utime(text, (1, 1))
    assert main(["train", "--resume", "--output_dir", "broken", "--num_workers", workers]) == 0
    whole, resumed = (checkpoint.read(Path(f"{name}/checkpoints/latest.pt")) for name in ("whole", "broken"))
    for name in ("model", "optimizer", "data", "random"):
        assert plain(whole[name]) == plain(resumed[name]), name


@pytest.mark.fault("A13")
def test_a_run_that_fails_before_its_first_step_saves_nothing() -> None:
    Path("t.jsonl").write_text(rows_with_a_mistake(2, "no JSON"))
    assert train("--dataset", "localstreaming", "--data_path", "t.jsonl", "--output_dir", "run") == 2
    assert not list(Path("run").rglob("*.pt"))


# ---- long calls --------------------------------------------------------------------------------------------


@pytest.mark.fault("A14")
def test_a_tokenizer_is_trained_on_text_without_spaces_in_words_of_a_bounded_length() -> None:
    tokenizer = train_bpe(["ab" * 3000 + "\n"] * 2, 400)
    assert max(map(len, tokenizer._text_bytes)) == tokenizers_of_ours.LONGEST_TRAINED_WORD


@pytest.mark.fault("A14")
def test_a_bounded_word_changes_no_tokenizer_of_ordinary_text(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [ENGLISH, GREEK, Path(__file__).read_text(encoding="utf-8")]
    plainly = tokenizers_of_ours._byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plainly.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=599, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    )
    plainly.add_special_tokens(["<|endoftext|>"])
    assert train_bpe(texts, 600).to_json() == str(plainly.to_str(pretty=True))


@pytest.mark.fault("A14")
def test_ctrl_c_does_not_wait_for_a_long_call() -> None:
    never = threading.Event()
    threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        attended(never.wait, "waiting")
    never.set()


def test_an_error_in_a_long_call_is_raised_where_it_was_called() -> None:
    with pytest.raises(UserError, match="at least 257"):
        attended(lambda: train_bpe([], 3), "training")


# ---- what is no text, and names that are long --------------------------------------------------------------


@pytest.mark.fault("A15")
def test_a_zstd_window_that_is_too_large_is_said_plainly() -> None:
    Path("t.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00" + bytes([(31 - 10) << 3]) + b"\x01\x00\x00" + bytes(9))
    with pytest.raises(UserError, match=r"t.txt.zst: its zstd window of 2,048 MiB is over the 128 MiB"):
        corpus(data_path="t.txt.zst")


@pytest.mark.fault("A15")
def test_binary_files_are_refused_whatever_is_done_with_odd_bytes() -> None:
    with zipfile.ZipFile("zip.txt", "w") as archive:
        archive.writestr("a.txt", ENGLISH)
    noise = bytes(range(256)) * 4
    Path("7z.jsonl").write_bytes(b"7z\xbc\xaf\x27\x1c" + noise)
    Path("pdf.txt").write_bytes(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + noise)
    Path("utf16.txt").write_bytes(ENGLISH.encode("utf-16"))
    Path("xz.txt").write_bytes(b"\xfd7zXZ\x00" + noise)
    for name, kind in {"zip": "a zip archive", "7z": "a 7z", "pdf": "a PDF", "utf16": "UTF-16", "xz": "xz"}.items():
        (path,) = Path().glob(f"{name}.*")
        with pytest.raises(UserError, match=f"{path}: not text but {kind}"):
            corpus(data_path=path, encoding_errors="replace")
    Path("words.txt").write_text("%PDF- is how such files begin. " * 50)
    assert len(corpus(data_path="words.txt").train.tokens or []) > 1000


@pytest.mark.fault("A15")
def test_names_of_250_bytes_can_be_read_cached_and_written() -> None:
    path = Path("ä" * 123 + ".txt")
    path.write_text(ENGLISH)
    assert corpus(data_path=path).train.tokens is not None
    assert len(list(Path().glob("*.nanokimi"))) == 1
    other = Path("b" * 250)
    with atomic_write(other) as file:
        file.write(b"x")
    assert other.read_bytes() == b"x"
