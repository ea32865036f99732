"""Multiple choice from JSON lines: what is read, what is scored, and what is wrong with a line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scored import log_prob, save_model

from nanokimi.cli import main
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from nanokimi.errors import UserError
from nanokimi.insight.choices import Question, Share, answer, encode_pair, read_questions
from nanokimi.insight.scoring import Scoring
from nanokimi.model.transformer import Transformer

BYTE = load_tokenizer("byte")


def read(tmp_path: Path, *records: Any, limit: int = 0) -> list[Question]:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return read_questions(path, limit)


def test_the_usual_names_are_read(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        {"query": "a", "choices": ["x", "y"], "gold": 1, "id": 7},
        {"question": "b", "choices": ["x", "y", "z"], "answer": "C"},
        {"context": "", "choices": ["x", "y"], "label": "x"},
        {"prompt": "d", "choices": ["1", "0"], "answer": "0"},
        {"ctx": "e", "endings": ["x", "y", "z", "w"], "label": "3"},
        {"question": "f", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"},
    )
    assert [question.gold for question in found] == [1, 2, 0, 1, 3, 2]
    assert [question.context for question in found] == ["a", "b", "", "d", "e", "f"]
    assert found[4].choices == ("x", "y", "z", "w")


def test_blank_lines_and_a_byte_order_mark_are_no_questions_and_a_limit_takes_the_first(tmp_path: Path) -> None:
    line = json.dumps({"query": "é", "choices": ["x", "y"], "gold": 0}, ensure_ascii=False)
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join([line] * 3).encode() + b"\r\n\r\n")
    assert len(read_questions(path)) == 3
    assert len(read_questions(path, 2)) == 2


GOOD = {"query": "a", "choices": ["x", "y"], "gold": 0}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("text", ["object"]),
        ({**GOOD, "query": None}, ["no context", "question"]),
        ({**GOOD, "question": "b"}, ["query and question"]),
        ({**GOOD, "query": 3}, ["query", "int"]),
        ({**GOOD, "choices": None}, ["no choices", "endings"]),
        ({**GOOD, "choices": "xy"}, ["choices", "list"]),
        ({**GOOD, "choices": ["x"]}, ["two or more"]),
        ({**GOOD, "choices": ["x", ""]}, ["empty"]),
        ({**GOOD, "choices": {"text": ["x", "y"], "label": ["A"]}}, ["labels"]),
        ({**GOOD, "gold": None}, ["no right choice", "answer"]),
        ({**GOOD, "gold": 2}, ["gold 2", "0 to 1"]),
        ({**GOOD, "gold": -1}, ["gold -1"]),
        ({**GOOD, "gold": "C"}, ["gold 'C'"]),
        ({**GOOD, "gold": True}, ["gold True"]),
        ({**GOOD, "gold": 0.0}, ["gold 0.0"]),
    ],
)
def test_a_line_that_cannot_be_used_is_named_with_its_number(tmp_path: Path, record: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, GOOD, record)
    message = str(caught.value)
    assert "questions.jsonl line 2" in message
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"{", ["line 1", "JSON"]), (b'{"query": "\xff"}', ["line 1", "UTF-8"]), (b"\n \n", ["empty"]), (b"", ["empty"])],
)
def test_files_that_hold_no_questions(tmp_path: Path, data: bytes, words: list[str]) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_questions(path)
    assert all(word in str(caught.value) for word in words)
    with pytest.raises(UserError, match="No such file"):
        read_questions(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="directory"):
        read_questions(tmp_path)


# ---- scoring ------------------------------------------------------------------------------------


def bpe() -> Tokenizer:
    return train_bpe(["the cat sat on the mat. the dog sat on the log. " * 50], 300)


def test_white_space_between_context_and_choice_belongs_to_the_choice() -> None:
    tokenizer = bpe()
    whole = tokenizer.encode("the cat sat")
    for context, continuation in (("the cat", " sat"), ("the cat ", "sat")):
        before, behind = encode_pair(tokenizer, context, continuation)
        assert before + behind == whole
        assert tokenizer.decode(behind) == " sat"
    assert encode_pair(tokenizer, "", " sat") == ([tokenizer.eot_id], tokenizer.encode(" sat"))
    assert encode_pair(tokenizer, " \n", "sat") == ([tokenizer.eot_id], tokenizer.encode(" \nsat"))


def by_hand(model: Transformer, question: Question) -> list[float]:
    values = []
    for choice in question.choices:
        before, behind = encode_pair(BYTE, question.context, " " + choice)
        values.append(log_prob(model, (before + behind)[-model.config.max_seq_length - 1 :], len(behind))[0])
    return values


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_likeliest_choice_is_the_answer(debug_model: Transformer, batch_size: int) -> None:
    questions = [
        Question(f"question {i} " * (i + 1), tuple(f"{j} answer {'long ' * (j * i % 5)}" for j in range(4)), i % 4)
        for i in range(20)  # the last ones are longer than the context
    ]
    right, right_norm = [], []
    for question in questions:
        values = by_hand(debug_model, question)
        normed = [value / len(choice) for value, choice in zip(values, question.choices, strict=True)]
        right.append(values.index(max(values)) == question.gold)
        right_norm.append(normed.index(max(normed)) == question.gold)
    assert right != right_norm  # the comparison is of something
    n, done = len(questions), []
    found = answer(debug_model, BYTE, questions, Scoring(batch_size), done.append)
    for share, expected in ((found["acc"], right), (found["acc_norm"], right_norm)):
        mean = sum(expected) / n
        variance = sum((value - mean) ** 2 for value in expected) / (n - 1)
        assert share == pytest.approx((mean, math.sqrt(variance / n)))
    assert sum(done) == sum(question.size for question in questions)


def test_a_single_question_has_no_standard_error(debug_model: Transformer) -> None:
    question = Question("a", ("x", "yy"), 0)
    values = by_hand(debug_model, question)
    gold = values.index(max(values))
    found = answer(debug_model, BYTE, [question._replace(gold=gold)], Scoring())
    assert found["acc"] == Share(1.0, None)


def test_the_command_answers_files_and_leaves_texts_alone(
    tmp_path: Path, debug_model: Transformer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model.pt", debug_model, BYTE)
    questions = read(tmp_path, *({"query": f"{i}", "choices": ["x", "yy"], "gold": i % 2} for i in range(9)))
    Path("more.jsonl").write_text(json.dumps(GOOD) + "\n")
    flags = ["--device", "cpu", "--output", "e.json"]
    assert main(["eval", "model.pt", "--tasks", "questions.jsonl,more.jsonl", *flags]) == 0
    written = json.loads(Path("e.json").read_text())
    expected = answer(debug_model, BYTE, questions, Scoring())
    first, second = written["files"]
    assert (first["path"], first["n"], first["acc"]) == ("questions.jsonl", 9, expected["acc"].value)
    assert first["acc_norm_stderr"] == pytest.approx(expected["acc_norm"].stderr)
    assert (second["n"], second["acc_stderr"]) == (1, None)
    assert written["texts"] == []
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["questions.jsonl", "acc", f"{expected['acc'].value:.4f}", f"{expected['acc'].stderr:.4f}"] in [
        line[:4] for line in lines
    ]
    assert main(["eval", "model.pt", "--tasks", "questions.jsonl", "--limit", "4", *flags]) == 0
    assert json.loads(Path("e.json").read_text())["files"][0]["n"] == 4
    assert main(["eval", "model.pt", "--tasks", "absent.jsonl", *flags]) == 2
    assert "--tasks absent.jsonl" in capsys.readouterr().err.splitlines()[-1]
