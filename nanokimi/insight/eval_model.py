"""``nanokimi eval``: bits per byte of a text, multiple choice from files, tasks of lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanokimi import __version__, checkpoint
from nanokimi.config import TrainConfig, from_dict
from nanokimi.console import log, progress_bar
from nanokimi.data.corpus import describe
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.device import has_fast_bf16, out_of_memory_explained, resolve_device
from nanokimi.errors import UserError
from nanokimi.insight.bits_per_byte import score_text
from nanokimi.insight.choices import Question, answer, read_questions
from nanokimi.insight.eval_report import Figure, Report
from nanokimi.insight.eval_text import SETTINGS, ChosenText, choose_text
from nanokimi.insight.likelihood import Scoring
from nanokimi.loading import load
from nanokimi.model.transformer import Transformer

DEFAULTS = {"batch_size": 8, "mixed_precision": "off"}
NAMES_A_TEXT = {"dataset", "data_path", "mix", "hf_repo_name"}  # settings that mean another text than the trained one
NAMES_A_PART = {"val_path", "val_fraction"}


@dataclass(frozen=True)
class Request:
    """What is to be evaluated, beside settings of TrainConfig.

    Attributes:
        part: ``all`` of the text, its ``held_out`` part, or "": what is held out, unless a text is named.
        stride, max_tokens: see ``score_text``.
        tasks: files of questions, which end in ``.jsonl``, and names of tasks of the harness.
        include_path, num_fewshot: see ``harness.run_tasks``.
        limit: questions of each file and task; 0 takes all.
        output: JSON file for the results; "" for none.

    Raises:
        UserError: a value is out of range; the message names the flag.
    """

    part: str = ""
    stride: int = 0
    max_tokens: int = 0
    tasks: tuple[str, ...] = ()
    include_path: str = ""
    num_fewshot: int | None = None
    limit: int = 0
    output: str = ""

    def __post_init__(self) -> None:
        for name in ("stride", "max_tokens", "num_fewshot", "limit"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"--{name} must be 0 or more, got {getattr(self, name)}")
        if self.part not in ("", "all", "held_out"):
            raise UserError(f"--part {self.part}: choose all or held_out")
        if not self.harness_tasks and (self.num_fewshot is not None or self.include_path):
            raise UserError("--num_fewshot and --include_path are for tasks of the harness: name one with --tasks")

    @property
    def files(self) -> list[str]:
        """Those tasks that are files."""
        return [task for task in self.tasks if task.endswith(".jsonl")]

    @property
    def harness_tasks(self) -> list[str]:
        """Those that are not."""
        return [task for task in self.tasks if not task.endswith(".jsonl")]


class Subject(NamedTuple):
    """The model that is evaluated and how it is run."""

    model: Transformer
    tokenizer: Tokenizer
    scoring: Scoring


def run_eval(path: str, train: Mapping[str, Any], model: Mapping[str, Any], request: Request) -> int:
    """Evaluates the model at ``path``, prints a table and writes ``request.output``; returns 0.

    What is done by then is printed and written even when something fails.

    Args:
        train: settings by field name: the text, ``batch_size``, ``device``, ``mixed_precision``.
        model: settings of ModelConfig, of which there may be none.

    Raises:
        UserError: a setting, the model, the text or a task cannot be used.
        RunError: the network or the disk failed, or the weights are damaged.
    """
    if model:
        raise UserError(f"{', '.join(model)}: the model comes with its own settings: leave it out")
    config = from_dict(TrainConfig, {**DEFAULTS, **train})
    report = Report(request.output)
    with out_of_memory_explained():
        subject = _load(path, config, request)
        report.results |= _about(path, subject, config, request)
        texts = _choose_texts(path, train, config, request, subject.tokenizer, report)
        questions = {file: read_questions(Path(file), request.limit) for file in request.files}
        _require_harness(request)
        try:
            for text in texts:
                _score_text(text, subject, request, report)
            for file, asked in questions.items():
                _answer(file, asked, subject, report)
            if request.harness_tasks:
                _run_harness(subject, request, report)
            report.results["complete"] = True
        finally:
            report.publish()
    return 0


def _load(path: str, config: TrainConfig, request: Request) -> Subject:
    device = resolve_device(config.device)
    enabled = config.mixed_precision == "on" or (config.mixed_precision == "auto" and has_fast_bf16(device))
    model, tokenizer = load(path, device=device)
    if request.stride > model.config.max_seq_length:
        raise UserError(f"--stride {request.stride}: at most the context of the model, {model.config.max_seq_length}")
    precision = torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
    return Subject(model, tokenizer, Scoring(config.batch_size, precision))


def _about(path: str, subject: Subject, config: TrainConfig, request: Request) -> dict[str, Any]:
    """The model and the settings, for the record."""
    model, tokenizer = subject.model, subject.tokenizer
    return {
        "nanokimi": __version__,
        "model": {
            "path": path,
            "parameters": model.num_parameters(),
            "context": model.config.max_seq_length,
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
        },
        "settings": {
            **asdict(request),
            "device": str(model.embed.weight.device),
            "batch_size": config.batch_size,
            "mixed_precision": config.mixed_precision,
        },
    }


def _require_harness(request: Request) -> None:
    if request.harness_tasks and importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"--tasks {','.join(request.harness_tasks)}: needs the evaluation harness: pip install 'nanokimi[eval]' "
            "(a file of questions ends in .jsonl)"
        )


# ---- which text ---------------------------------------------------------------------------------


def _choose_texts(
    path: str, train: Mapping[str, Any], config: TrainConfig, request: Request, tokenizer: Tokenizer, report: Report
) -> list[ChosenText]:
    """The texts to score: the named one; none where only tasks are asked for; else what the model was trained on."""
    named, part_named = bool(NAMES_A_TEXT & train.keys()), bool(NAMES_A_PART & train.keys())
    if request.tasks and not (named or part_named or request.part):
        return []
    if not named:
        config = replace(_trained_with(path), **{**DEFAULTS, "device": config.device, **train})
    part = request.part or ("all" if named and not part_named else "held_out")
    report.results["settings"] |= {"part": part, **{name: getattr(config, name) for name in SETTINGS}}
    try:
        return choose_text(config, tokenizer, held_out=part == "held_out", log=log)
    except UserError as error:
        if named:
            raise
        raise UserError(f"the text that {path} was trained on: {error}; or name another with --data_path") from error


def _trained_with(path: str) -> TrainConfig:
    """The settings of the run that made a checkpoint."""
    try:
        saved = checkpoint.read(Path(path)).get("train_config")
    except checkpoint.CheckpointError:  # a model in another format
        saved = None
    if saved is None:
        raise UserError(f"{path} does not say what it was trained on: name the text to score with --data_path")
    return from_dict(TrainConfig, saved)


# ---- what is done -------------------------------------------------------------------------------


def _score_text(text: ChosenText, subject: Subject, request: Request, report: Report) -> None:
    model, tokenizer, scoring = subject
    began = time.monotonic()
    with progress_bar(f"scoring {text.name}", text.n_bytes) as advance:
        found = score_text(
            model, tokenizer, text.read(advance), scoring, stride=request.stride, max_tokens=request.max_tokens
        )
    seconds = time.monotonic() - began
    if not found.tokens:
        raise UserError(f"{text.name}: there is no text in it to score: choose another --part, or name another text")
    counts = describe(found.documents, found.tokens, found.n_bytes)
    log(f"{counts} in {seconds:.1f} s ({found.tokens / seconds:,.0f} tokens/s)")
    figures = {name: getattr(found, name) for name in ("bits_per_byte", "perplexity", "loss")}
    report.results["texts"].append({"name": text.name, **figures, **asdict(found), "seconds": seconds})
    report.figures += [
        Figure(text.name, "bits_per_byte", found.bits_per_byte, over=f"{found.n_bytes:,} bytes"),
        Figure(text.name, "perplexity", found.perplexity, over=f"{found.tokens:,} tokens"),
    ]


def _answer(file: str, questions: Sequence[Question], subject: Subject, report: Report) -> None:
    with progress_bar(f"answering {file}", sum(question.size for question in questions)) as advance:
        found = answer(subject.model, subject.tokenizer, questions, subject.scoring, advance)
    results: dict[str, Any] = {"path": file, "n": found.n}
    for name, share in (("acc", found.acc), ("acc_norm", found.acc_norm)):
        results |= {name: share.value, f"{name}_stderr": share.stderr}
        report.figures.append(Figure(file, name, share.value, share.stderr, f"{found.n:,} questions"))
    report.results["files"].append(results)


def _run_harness(subject: Subject, request: Request, report: Report) -> None:
    from nanokimi.insight.harness import NanokimiLM, run_tasks

    model, tokenizer, scoring = subject
    adapter = NanokimiLM(loaded=(model, tokenizer), batch_size=scoring.batch_size, precision=scoring.precision)
    found = run_tasks(
        adapter, request.harness_tasks,
        include_path=request.include_path, num_fewshot=request.num_fewshot, limit=request.limit,
    )  # fmt: skip
    kept = ("lm_eval_version", "results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs")
    report.results["harness"] = {name: found[name] for name in kept if name in found}
    report.figures += _harness_figures(found)


def _harness_figures(found: Mapping[str, Any]) -> list[Figure]:
    """A line for each metric of each task; ``filter`` only where a task has more than one way to read its answers."""
    figures = []
    for task, values in found["results"].items():
        n = found["n-samples"].get(task, {}).get("effective")
        for key, value in values.items():
            name, _, way = key.partition(",")
            if not isinstance(value, float) or name.endswith("_stderr"):
                continue
            stderr = values.get(f"{name}_stderr,{way}")
            figures.append(
                Figure(
                    task, name if way == "none" else key, value, stderr if isinstance(stderr, float) else None,
                    "" if n is None else f"{n:,} samples",
                )
            )  # fmt: skip
    return figures
