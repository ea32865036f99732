"""Multiple choice by log-likelihood: reads questions from JSON lines, scores them as lm-evaluation-harness does."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from nanokimi.data.documents import Advance, ignore
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.insight.scoring import Scoring, score_rows
from nanokimi.model.transformer import Transformer

CONTEXT_FIELDS = ("query", "question", "context", "prompt", "ctx")
CHOICES_FIELDS = ("choices", "endings")
GOLD_FIELDS = ("gold", "answer", "label", "answerKey")


class Question(NamedTuple):
    """A context, its possible continuations and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    gold: int

    @property
    def size(self) -> int:
        """Characters, as a measure of the work."""
        return len(self.choices) * len(self.context) + sum(map(len, self.choices))


class Share(NamedTuple):
    """Share of right answers, and the standard error of this mean; None for a single question."""

    value: float
    stderr: float | None


def answer(
    model: Transformer, tokenizer: Tokenizer, questions: Sequence[Question], scoring: Scoring, advance: Advance = ignore
) -> dict[str, Share]:
    """Answers at least one question, each by the choice that is the likeliest after the context and a space.

    Args:
        model: in evaluation mode.
        advance: told the ``size`` of each question that is done.

    Returns:
        ``acc`` by the log-probability of each choice; ``acc_norm`` by that divided by the choice's characters, so that
        short ones have no advantage.
    """
    pairs = (encode_pair(tokenizer, q.context, " " + choice) for q in questions for choice in q.choices)
    scores = score_rows(model, pairs, scoring)
    right, right_norm = [], []
    for question in questions:
        log_probs = [part.log_prob for part in islice(scores, len(question.choices))]
        per_character = [value / len(choice) for value, choice in zip(log_probs, question.choices, strict=True)]
        right.append(log_probs.index(max(log_probs)) == question.gold)
        right_norm.append(per_character.index(max(per_character)) == question.gold)
        advance(question.size)
    return {"acc": _share(right), "acc_norm": _share(right_norm)}


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows it, divided as ``TemplateLM._encode_pair`` of the harness does.

    White space at the end of the context moves to the continuation; both are encoded as one text. An empty context
    becomes the token that begins a text.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    before = tokenizer.encode(stripped)
    return before or [tokenizer.bos_id], tokenizer.encode(stripped + continuation)[len(before) :]


def _share(right: Sequence[bool]) -> Share:
    n, mean = len(right), sum(right) / len(right)
    return Share(mean, math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else None)


# ---- reading ------------------------------------------------------------------------------------


def read_questions(path: Path, limit: int = 0) -> list[Question]:
    """The questions of a JSON lines file, or its first ``limit``.

    A line is an object with a context (one of ``CONTEXT_FIELDS``), its ``choices`` or ``endings``, a list of texts,
    and the right one (one of ``GOLD_FIELDS``): its text, its letter from A on, or its index from 0 on. The form of ARC,
    ``"choices": {"text": [...], "label": [...]}`` with ``answerKey``, is read too.

    Raises:
        UserError: there is no such file, or a line that cannot be used; the message gives its number.
    """
    if path.is_dir():
        raise UserError(f"--tasks {path} is a directory: name a .jsonl file")
    try:
        with path.open("rb") as file:
            lines = ((n, line) for n, line in enumerate(file, 1) if line.strip(b" \t\r\n\xef\xbb\xbf"))
            questions = [_question(line, f"{path} line {n}") for n, line in islice(lines, limit or None)]
    except OSError as error:
        raise UserError(f"--tasks {path}: {error.strerror}: check the path") from error
    if not questions:
        raise UserError(f"--tasks {path}: the file is empty: write one question a line")
    return questions


def _question(line: bytes, where: str) -> Question:
    try:
        record = _record(line)
        name, context = _field(record, CONTEXT_FIELDS, "context")
        if not isinstance(context, str):
            raise ValueError(f"{name} is of type {type(context).__name__}, not a text")
        choices, labels = _choices(*_field(record, CHOICES_FIELDS, "choices"))
        return Question(context, choices, _gold(*_field(record, GOLD_FIELDS, "right choice"), choices, labels))
    except ValueError as error:
        raise UserError(f"--tasks {where}: {error}") from error


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}: convert it (iconv -t utf-8)") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): one object a line is needed") from error
    if not isinstance(record, dict):
        raise ValueError("no JSON object: one object a line is needed")
    return record


def _field(record: Mapping[str, Any], names: Sequence[str], what: str) -> tuple[str, Any]:
    found = [name for name in names if record.get(name) is not None]
    if not found:
        raise ValueError(f"no {what}: name it {' or '.join(names)}; there are: {', '.join(record) or 'no fields'}")
    if len(found) > 1:
        raise ValueError(f"{' and '.join(found)} could each be the {what}: keep one of them")
    return found[0], record[found[0]]


def _choices(name: str, value: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The choices, and what they are called: A, B, C and so on, unless the record says otherwise."""
    texts, labels = (value.get("text"), value.get("label")) if isinstance(value, dict) else (value, None)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is no list of texts")
    if len(texts) < 2:
        raise ValueError(f"{name} holds {len(texts)}: a choice needs two or more")
    if "" in texts:
        raise ValueError(f"{name} holds an empty text: write each choice out")
    if labels is None:
        labels = string.ascii_uppercase[: len(texts)]
    elif not isinstance(labels, list) or len(labels) != len(texts):
        raise ValueError(f"{name} has not as many labels as texts")
    return tuple(texts), tuple(map(str, labels))


def _gold(name: str, value: Any, choices: Sequence[str], labels: Sequence[str]) -> int:
    for names in (choices, labels):
        if value in names:
            return names.index(value)
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    raise ValueError(
        f"{name} {value!r} is none of the {len(choices)} choices: give its text, its letter from A on, or its index "
        f"from 0 to {len(choices) - 1}"
    )
