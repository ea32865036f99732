"""Bits per byte are those of whole documents, scored one by one; nothing depends on batches, chunks or formats."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from scored import document_log_prob, log_prob, save_model

from nanokimi.cli import main
from nanokimi.config import TrainConfig
from nanokimi.data.sources import open_corpus, text_of
from nanokimi.data.token_files import write_tokens
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.errors import RunError
from nanokimi.insight import scoring
from nanokimi.insight import text as eval_text
from nanokimi.insight.scoring import Score, Scoring, TextScore, Window, score, score_rows, score_text, windows
from nanokimi.insight.text import Part, choose_text
from nanokimi.model.transformer import Transformer

BYTE = load_tokenizer("byte")
EOT = BYTE.eot_id
CONTEXT = 128  # of the debug model
SEPARATOR = "<|endoftext|>\n"
TEXTS = ["ab\n", "Größe\n", "\n", "x" * 127 + "\n", "y z " * 32 + "\n", "日本語 " * 100 + "\n", "def f():\n    pass\n"]
TEXTS_WITH_WORDS = [text for text in TEXTS if text.strip()]

Eval = Callable[..., dict[str, Any]]


def test_each_token_is_predicted_once_with_all_its_window_shows() -> None:
    for length in range(1, 40):
        tokens = list(range(1, length + 1))
        for stride in range(1, 9):
            cut = list(windows([(tokens, True)], [0], context=8, stride=stride))
            predicted = [token for window in cut for token in window.tokens[-window.scored :]]
            assert predicted == tokens
            for number, window in enumerate(cut):
                last = window.tokens[-1]
                assert window.tokens == list(range(max(0, last - 8), last + 1))  # all that fits in front of it
                assert window.scored == (stride if number else min(8, length)) or window is cut[-1]


def test_windows_do_not_depend_on_how_rows_come_in() -> None:
    rows = [list(range(10, 10 + length)) for length in (1, 7, 8, 9, 30)]
    whole = list(windows([(row, True) for row in rows], [0], context=8, stride=3))
    for size in (1, 2, 5, 8):
        pieces = [(row[at : at + size], at + size >= len(row)) for row in rows for at in range(0, len(row), size)]
        assert list(windows(pieces, [0], context=8, stride=3)) == whole


def test_a_row_without_end_is_cut_while_it_comes_in() -> None:
    endless = windows(((range(at, at + 10), False) for at in count(1, 10)), [0], context=8)
    assert [window.tokens[-1] for window in islice(endless, 3)] == [8, 16, 24]


def test_a_prefix_that_is_too_long_loses_its_left() -> None:
    assert list(windows([([9, 10], True)], range(9), context=4)) == [Window([6, 7, 8, 9, 10], 2)]
    assert list(windows([([9], True)], range(9), context=4)) == [Window([5, 6, 7, 8, 9], 1)]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_equal_one_window_at_a_time(
    debug_model: Transformer, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "MOST_LOGITS", 257 * 50)  # the head works in several steps
    monkeypatch.setattr(scoring, "SORTED_BATCHES", 2)
    generator = torch.Generator().manual_seed(1)
    cut = []
    for length in (1, 128, 5, 77, 128, 2, 40, 64, 9):
        tokens = torch.randint(0, 257, (length + 1,), generator=generator).tolist()
        cut.append(Window(tokens, int(torch.randint(1, length + 1, (), generator=generator))))
    for window, found in zip(cut, score(debug_model, cut, Scoring(batch_size)), strict=True):
        expected, _ = log_prob(debug_model, *window)
        assert found.log_prob == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_greedy_means_that_every_scored_token_is_the_likeliest(debug_model: Transformer) -> None:
    tokens = [1, 2, 3]
    for _ in range(4):
        tokens.append(int(debug_model(torch.tensor([tokens]))[0, -1].argmax()))
    wrong = [*tokens[:-1], (tokens[-1] + 1) % 257]
    found = list(score(debug_model, [Window(tokens, 4), Window(wrong, 4), Window(wrong, 1)], Scoring()))
    assert [part.greedy for part in found] == [True, False, False]
    assert found[0].greedy == log_prob(debug_model, tokens, 4)[1]


def test_a_row_beyond_the_context_is_scored_in_windows_and_an_empty_one_is_certain(debug_model: Transformer) -> None:
    long = [(7 * i) % 256 for i in range(300)]
    found = list(score_rows(debug_model, [([EOT], long), ([5], []), ([1, 2], [3])], Scoring(2)))
    assert found[0].log_prob == pytest.approx(document_log_prob(debug_model, long, EOT), rel=1e-6)
    assert found[1] == Score(0.0, True)
    assert found[2].log_prob == pytest.approx(log_prob(debug_model, [1, 2, 3], 1)[0], rel=1e-5)


def test_damaged_weights_are_an_error(debug_model: Transformer) -> None:
    with torch.no_grad():
        debug_model.norm.weight.fill_(math.nan)
    with pytest.raises(RunError, match="not finite"):
        list(score(debug_model, [Window([1, 2], 1)], Scoring()))


def test_little_is_read_ahead_of_what_is_scored(debug_model: Transformer) -> None:
    taken = count()
    endless = (([1, 2, 3], next(taken) >= 0) for _ in count())
    scores = score(debug_model, windows(endless, [EOT], context=CONTEXT), Scoring(2))
    assert len(list(islice(scores, 5))) == 5
    assert next(taken) <= 2 * scoring.SORTED_BATCHES + 1


# ---- documents ----------------------------------------------------------------------------------


def parts_of(texts: list[str]) -> Iterator[Part]:
    for text in texts:
        yield Part(BYTE.encode(text), len(text.encode()), True)


@pytest.mark.parametrize("stride", [0, 1, 50, 128])
def test_bits_per_byte_are_those_of_each_document_alone(debug_model: Transformer, stride: int) -> None:
    texts = TEXTS_WITH_WORDS if stride != 1 else TEXTS_WITH_WORDS[:4]
    found = score_text(debug_model, BYTE, parts_of(texts), Scoring(4), stride=stride)
    nats = -sum(document_log_prob(debug_model, BYTE.encode(text), EOT, stride) for text in texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert found.nats == pytest.approx(nats, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
    assert (found.documents, found.tokens, found.n_bytes) == (len(texts), n_bytes, n_bytes)
    assert found.perplexity == pytest.approx(math.exp(nats / n_bytes), rel=1e-6)


def test_a_perplexity_that_no_float_holds_is_infinite() -> None:
    assert TextScore(nats=1e6, tokens=10).perplexity == math.inf


def test_the_batch_size_changes_nothing(debug_model: Transformer) -> None:
    found = [score_text(debug_model, BYTE, parts_of(TEXTS), Scoring(size), stride=50).nats for size in (1, 2, 7, 64)]
    assert found == pytest.approx([found[0]] * 4, rel=1e-6)


def test_a_limit_scores_the_first_tokens_and_counts_their_bytes(debug_model: Transformer) -> None:
    found = score_text(debug_model, BYTE, parts_of(["abc", "defgh", "ij"]), Scoring(), max_tokens=6)
    parts = [document_log_prob(debug_model, BYTE.encode(text), EOT) for text in ("abc", "def")]
    assert (found.documents, found.tokens, found.n_bytes) == (2, 6, 6)
    assert found.nats == pytest.approx(-sum(parts), rel=1e-6)


def test_a_long_document_is_tokenised_in_stretches_and_stays_one(
    debug_model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanokimi.data.documents.PIECE_BYTES", 64)
    monkeypatch.setattr(eval_text, "ENCODED_CHARACTERS", 100)
    (tmp_path / "t.txt").write_text("one line\n" * 100)
    config = TrainConfig(data_path=str(tmp_path / "t.txt"))
    (text,) = choose_text(config, BYTE, held_out=False, log=print)
    parts = list(text.read(lambda count: None))
    assert len(parts) > 5
    assert [part.ends_document for part in parts] == [False] * (len(parts) - 1) + [True]
    whole = score_text(debug_model, BYTE, parts_of(["one line\n" * 100]), Scoring())
    found = score_text(debug_model, BYTE, parts, Scoring())
    assert found.nats == pytest.approx(whole.nats, rel=1e-6)
    assert (found.documents, found.windows) == (1, whole.windows)


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with a text of several documents, long and blank ones among them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(SEPARATOR.join(TEXTS), encoding="utf-8")
    return tmp_path


@pytest.fixture
def evaluate(folder: Path, debug_model: Transformer, capsys: pytest.CaptureFixture[str]) -> Eval:
    """Runs the command on a model that was trained on ``trained.txt`` and returns what it wrote."""
    (folder / "trained.txt").write_text("".join(f"line {i}: {i * i % 97}\n" for i in range(400)))
    save_model(folder / "model.pt", debug_model, BYTE, TrainConfig(data_path="trained.txt", val_fraction=0.1))

    def run(*arguments: str) -> dict[str, Any]:
        assert main(["eval", "model.pt", "--device", "cpu", "--output", "out/eval.json", *arguments]) == 0
        written: dict[str, Any] = json.loads((folder / "out/eval.json").read_text())
        printed = capsys.readouterr().out
        assert all(f"{text['bits_per_byte']:.4f}" in printed for text in written["texts"])
        return written

    return run


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one line in which the command fails."""
    assert main(["eval", *arguments, "--device", "cpu"]) == code
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("nanokimi: ")
    return line


def expected_nats(model: Transformer, texts: list[str]) -> float:
    return -sum(document_log_prob(model, BYTE.encode(text), EOT) for text in texts)


def test_a_named_text_is_scored_in_full(evaluate: Eval, debug_model: Transformer) -> None:
    written = evaluate("--data_path", "text.txt", "--batch_size", "3")
    (found,) = written["texts"]
    assert found["nats"] == pytest.approx(expected_nats(debug_model, TEXTS_WITH_WORDS), rel=1e-6)
    assert (found["documents"], found["empty"]) == (len(TEXTS) - 1, 1)
    assert found["n_bytes"] == sum(len(text.encode()) for text in TEXTS_WITH_WORDS)
    assert written["complete"]
    assert written["settings"]["part"] == "all"
    assert written["model"]["context"] == CONTEXT


def test_every_source_gives_the_same(evaluate: Eval, folder: Path) -> None:
    whole = evaluate("--data_path", "text.txt")["texts"][0]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"n": 1, "body": text}) + "\n" for text in TEXTS))
    with write_tokens(folder / "text.bin", BYTE) as writer:
        for text in TEXTS_WITH_WORDS:
            writer.add(BYTE.encode(text), len(text.encode()))
            writer.end_document()
    assert (
        main(
            [
                "prepare",
                "tokens",
                "--data_path",
                "text.txt",
                "--val_fraction",
                "0.3",
                "--set",
                "tokenizer_name=byte",
                "--output",
                "prepared",
                "--shard_tokens",
                "200",
            ]
        )
        == 0
    )
    for flags in (
        ("--dataset", "localstreaming", "--data_path", "text.txt"),
        ("--data_path", "rows.jsonl", "--text_column", "body"),
        ("--dataset", "tokenbin", "--data_path", "text.bin"),
    ):
        found = evaluate(*flags)["texts"][0]
        for name in ("nats", "documents", "tokens", "n_bytes", "windows"):
            assert found[name] == pytest.approx(whole[name], rel=1e-6), (flags, name)
    prepared = evaluate("--dataset", "tokenbin", "--data_path", "prepared")["texts"][0]
    assert prepared["tokens"] == whole["tokens"]
    assert prepared["documents"] == whole["documents"] + 1  # the split cut one in two


def test_tokens_are_read_in_blocks_and_ends_of_text_at_their_edges_are_no_documents(
    folder: Path, debug_model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["abcd", "e", "fgh", "ij"]
    with write_tokens(folder / "text.bin", BYTE) as writer:
        for text in texts:
            writer.add(BYTE.encode(text), len(text))
            writer.end_document()
    expected = expected_nats(debug_model, texts)
    config = TrainConfig(dataset="tokenbin", data_path="text.bin")
    for size in range(1, 16):
        monkeypatch.setattr(eval_text, "BLOCK_TOKENS", size)
        (text,) = choose_text(config, BYTE, held_out=False, log=print)
        found = score_text(debug_model, BYTE, text.read(lambda count: None), Scoring())
        assert (found.documents, found.empty, found.tokens) == (4, 0, 10)
        assert found.nats == pytest.approx(expected, rel=1e-6)


def test_without_a_text_the_held_out_part_of_the_training_text_is_scored(
    evaluate: Eval, debug_model: Transformer
) -> None:
    written = evaluate()
    config = TrainConfig(data_path="trained.txt", val_fraction=0.1)
    corpus = open_corpus(config, "byte", log=lambda text: None)
    assert corpus.val is not None
    held_out = corpus.val.read(0, len(corpus.val)).tolist()
    assert held_out[-1] == EOT
    (found,) = written["texts"]
    assert found["tokens"] == len(held_out) - 1
    assert found["nats"] == pytest.approx(-document_log_prob(debug_model, held_out[:-1], EOT), rel=1e-6)
    assert (written["settings"]["part"], written["settings"]["data_path"]) == ("held_out", "trained.txt")


@pytest.mark.parametrize("dataset", ["local", "localstreaming", "tokenbin"])
def test_both_parts_make_up_the_whole(evaluate: Eval, folder: Path, dataset: str) -> None:
    lines = [f"document {i}, {'long ' * (i % 40)}\n" for i in range(150)]
    (folder / "many.txt").write_text(SEPARATOR.join(lines))
    path = "many.txt"
    if dataset == "tokenbin":
        path = "many.bin"
        with write_tokens(folder / path, BYTE) as writer:
            for line in lines:
                writer.add(BYTE.encode(line), len(line))
                writer.end_document()
    flags = ("--dataset", dataset, "--data_path", path)
    whole, held_out = (evaluate(*flags, "--part", part)["texts"][0] for part in ("all", "held-out"))
    assert whole["documents"] == 150
    assert 0 < held_out["documents"] < 30
    if dataset != "tokenbin":
        text = text_of(TrainConfig(data_path=path), print)
        assert held_out["n_bytes"] == sum(len(piece.text) for is_out, piece in text.read(0) if is_out)


def test_held_out_documents_of_their_own_and_mixtures(evaluate: Eval, folder: Path, debug_model: Transformer) -> None:
    (folder / "val.txt").write_text("held out\n")
    (folder / "b.txt").write_text("other text\n")
    found = evaluate("--data_path", "text.txt", "--val_path", "val.txt")["texts"]
    assert [text["nats"] for text in found] == pytest.approx([expected_nats(debug_model, ["held out\n"])], rel=1e-6)
    found = evaluate("--mix", "text.txt=0.7,b.txt=0.3")["texts"]
    expected = [expected_nats(debug_model, texts) for texts in (TEXTS_WITH_WORDS, ["other text\n"])]
    assert [text["nats"] for text in found] == pytest.approx(expected, rel=1e-6)
    found = evaluate("--mix", "text.txt=0.7,b.txt=0.3", "--val_path", "val.txt")["texts"]
    assert [text["n_bytes"] for text in found] == [len("held out\n")]


def test_a_stride_gives_more_context_and_a_limit_less_text(evaluate: Eval, debug_model: Transformer) -> None:
    found = evaluate("--data_path", "text.txt", "--stride", "40")["texts"][0]
    nats = -sum(document_log_prob(debug_model, BYTE.encode(text), EOT, 40) for text in TEXTS_WITH_WORDS)
    assert found["nats"] == pytest.approx(nats, rel=1e-6)
    assert evaluate("--data_path", "text.txt", "--max_tokens", "100")["texts"][0]["tokens"] == 100


def test_bf16_is_close_and_off_unless_asked_for(evaluate: Eval) -> None:
    exact = evaluate("--data_path", "text.txt")
    rounded = evaluate("--data_path", "text.txt", "--mixed_precision")
    assert exact["settings"]["mixed_precision"] == "off"
    assert rounded["texts"][0]["nats"] != exact["texts"][0]["nats"]
    assert rounded["texts"][0]["nats"] == pytest.approx(exact["texts"][0]["nats"], rel=0.05)


def test_what_was_done_is_kept_when_something_fails_later(
    evaluate: Eval, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Beyond the documents on which the tokenizer is tried.
    (folder / "b.jsonl").write_bytes(b'{"text": "fine"}\n' * 60 + b'{"text": "\xff"}\n')
    flags = ("--mix", "text.txt=0.5,b.jsonl=0.5", "--max_tokens", "0", "--part", "all", "--output", "kept.json")
    assert "UTF-8" in complaint(capsys, "model.pt", *flags)
    written = json.loads((folder / "kept.json").read_text())
    assert not written["complete"]
    assert [text["name"] for text in written["texts"]] == ["text.txt"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data_path", "absent.txt"], ["--data_path absent.txt", "no such file"]),
        (["--stride", "129"], ["--stride 129", "128"]),
        (["--stride", "-1"], ["--stride"]),
        (["--max-tokens", "-1"], ["--max_tokens"]),
        (["--limit", "-1"], ["--limit"]),
        (["--batch_size", "0"], ["--batch_size"]),
        (["--part", "some"], ["--part some", "held_out"]),
        (["--set", "dim=3"], ["dim", "leave it out"]),
        (["--num_fewshot", "2"], ["--num_fewshot", "--tasks"]),
        (["--output", "."], ["--output", "directory"]),
        (["--data_path", "text.txt", "--part", "held_out", "--val_fraction", "0"], ["held out", "--part all"]),
        (["--data_path", "blank.txt"], ["blank.txt", "no text"]),
        (["--val_fraction", "0"], ["model.pt", "held out"]),
    ],
)
def test_mistakes_take_one_line(
    evaluate: Eval, folder: Path, flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "blank.txt").write_text(" \n\n")
    line = complaint(capsys, "model.pt", *flags)
    assert all(word in line for word in words), line


def test_a_model_that_does_not_say_what_it_was_trained_on_asks_for_a_text(
    folder: Path, debug_model: Transformer, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(folder / "bare.pt", debug_model, BYTE)
    line = complaint(capsys, "bare.pt")
    assert "bare.pt" in line
    assert "--data_path" in line
    assert "absent.pt" in complaint(capsys, "absent.pt")


def test_a_training_text_that_is_gone_is_named(
    evaluate: Eval, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "trained.txt").unlink()
    line = complaint(capsys, "model.pt")
    assert all(word in line for word in ("model.pt was trained on", "trained.txt", "no such file"))
