"""``nanokimi eval``: bits per byte of a text, multiple choice from files, tasks of lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanokimi import __version__, checkpoint
from nanokimi.config import TrainConfig, from_dict
from nanokimi.console import aligned, log, progress_bar, show
from nanokimi.data.corpus import describe
from nanokimi.device import has_fast_bf16, out_of_memory_explained, resolve_device
from nanokimi.errors import UserError
from nanokimi.files import atomic_write, disk_errors_explained, require_writable
from nanokimi.insight.choices import Question, answer, read_questions
from nanokimi.insight.scoring import Scoring, score_text
from nanokimi.insight.text import SETTINGS, ChosenText, choose_text
from nanokimi.interop.loading import load

DEFAULTS = {"batch_size": 8, "mixed_precision": "off"}
NAMES_A_TEXT = {"dataset", "data_path", "mix", "hf_repo_name"}  # settings that mean another text than the trained one
NAMES_A_PART = {"val_path", "val_fraction"}
HARNESS_RESULTS = (
    "lm_eval_version",
    "results",
    "groups",
    "versions",
    "n-shot",
    "n-samples",
    "higher_is_better",
    "configs",
)


@dataclass(frozen=True)
class EvalOptions:
    """What is to be evaluated, beside settings of TrainConfig.

    Raises:
        UserError: a value is out of range; the message names the flag.
    """

    part: str = ""  # "all" of the text, its "held_out" part, or "": what is held out, unless a text is named
    stride: int = 0  # see score_text
    max_tokens: int = 0  # see score_text
    tasks: tuple[str, ...] = ()  # files of questions, which end in .jsonl, and names of tasks of the harness
    include_path: str = ""  # see harness.run_tasks
    num_fewshot: int | None = None  # see harness.run_tasks
    limit: int = 0  # questions of each file and task; 0 takes all
    output: str = ""  # JSON file for the results; "" for none

    def __post_init__(self) -> None:
        for name in ("stride", "max_tokens", "num_fewshot", "limit"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"--{name} must be 0 or more, got {getattr(self, name)}")
        if self.part not in ("", "all", "held_out"):
            raise UserError(f"--part {self.part}: choose all or held_out")
        if not self.harness_tasks and (self.num_fewshot is not None or self.include_path):
            raise UserError("--num_fewshot and --include_path are for tasks of the harness: name one with --tasks")

    @property
    def harness_tasks(self) -> list[str]:
        """Those tasks that are not files."""
        return [task for task in self.tasks if not task.endswith(".jsonl")]


def run_eval(path: str, train: Mapping[str, Any], model: Mapping[str, Any], options: EvalOptions) -> int:
    """Evaluates the model at ``path``, prints a table and writes ``options.output``; returns 0.

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
    if options.output:
        require_writable(Path(options.output), example="eval.json")
    with out_of_memory_explained():
        evaluation = Evaluation(path, config, options)
        texts = evaluation.choose_texts(config, train)
        files = [task for task in options.tasks if task.endswith(".jsonl")]
        questions = {file: read_questions(Path(file), options.limit) for file in files}
        if options.harness_tasks and importlib.util.find_spec("lm_eval") is None:
            raise UserError(
                f"--tasks {','.join(options.harness_tasks)}: needs the evaluation harness: pip install "
                "'nanokimi[eval]' (a file of questions ends in .jsonl)"
            )
        try:
            for text in texts:
                evaluation.score(text)
            for file, asked in questions.items():
                evaluation.answer(file, asked)
            if options.harness_tasks:
                evaluation.run_harness()
            evaluation.results["complete"] = True
        finally:
            evaluation.publish()
    return 0


class Evaluation:
    """A model, and what has been found about it so far.

    Attributes:
        results: plain values for the JSON file.
        table: lines of what, figure, value, standard error, and what it was worked out over.
    """

    def __init__(self, path: str, config: TrainConfig, options: EvalOptions) -> None:
        device = resolve_device(config.device)
        enabled = config.mixed_precision == "on" or (config.mixed_precision == "auto" and has_fast_bf16(device))
        self.path, self.options = path, options
        self.model, self.tokenizer = load(path, device=device)
        context = self.model.config.max_seq_length
        if options.stride > context:
            raise UserError(f"--stride {options.stride}: at most the context of the model, {context}")
        precision = torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
        self.scoring = Scoring(config.batch_size, precision)
        self.table = [("of", "figure", "value", "stderr", "over")]
        model, tokenizer = self.model, self.tokenizer
        about = {"path": path, "parameters": model.num_parameters(), "context": context}
        about |= {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size}
        settings = {**asdict(options), "device": str(model.embed.weight.device)}
        settings |= {name: getattr(config, name) for name in DEFAULTS}
        self.results: dict[str, Any] = {"complete": False, "texts": [], "files": [], "harness": {}}
        self.results |= {"nanokimi": __version__, "model": about, "settings": settings}

    def choose_texts(self, config: TrainConfig, train: Mapping[str, Any]) -> list[ChosenText]:
        """The texts to score: the named one; none where only tasks are asked for; else what the model was trained on.

        Args:
            train: the settings that were named, which ``config`` has too.
        """
        named, part_named = bool(NAMES_A_TEXT & train.keys()), bool(NAMES_A_PART & train.keys())
        if self.options.tasks and not (named or part_named or self.options.part):
            return []
        if not named:
            config = replace(_trained_with(self.path), **{**DEFAULTS, "device": config.device, **train})
        part = self.options.part or ("all" if named and not part_named else "held_out")
        self.results["settings"] |= {"part": part, **{name: getattr(config, name) for name in SETTINGS}}
        try:
            return choose_text(config, self.tokenizer, held_out=part == "held_out", log=log)
        except UserError as error:
            if named:
                raise
            about = f"the text that {self.path} was trained on: {error}; or name another with --data_path"
            raise UserError(about) from error

    def score(self, text: ChosenText) -> None:
        """Bits per byte and perplexity of one text."""
        limits = {"stride": self.options.stride, "max_tokens": self.options.max_tokens}
        began = time.monotonic()
        with progress_bar(f"scoring {text.name}", text.n_bytes) as advance:
            found = score_text(self.model, self.tokenizer, text.read(advance), self.scoring, **limits)
        seconds = time.monotonic() - began
        if not found.tokens:
            raise UserError(
                f"{text.name}: there is no text in it to score: choose another --part, or name another text"
            )
        counts = describe(found.documents, found.tokens, found.n_bytes)
        log(f"{counts} in {seconds:.1f} s ({found.tokens / seconds:,.0f} tokens/s)")
        figures = {name: getattr(found, name) for name in ("bits_per_byte", "perplexity", "loss")}
        self.results["texts"].append({"name": text.name, **figures, **asdict(found), "seconds": seconds})
        self._add(text.name, "bits_per_byte", found.bits_per_byte, over=f"{found.n_bytes:,} bytes")
        self._add(text.name, "perplexity", found.perplexity, over=f"{found.tokens:,} tokens")

    def answer(self, file: str, questions: Sequence[Question]) -> None:
        """The share of right answers to the questions of one file."""
        with progress_bar(f"answering {file}", sum(question.size for question in questions)) as advance:
            shares = answer(self.model, self.tokenizer, questions, self.scoring, advance)
        results: dict[str, Any] = {"path": file, "n": len(questions)}
        for name, share in shares.items():
            results |= {name: share.value, f"{name}_stderr": share.stderr}
            self._add(file, name, share.value, share.stderr, f"{len(questions):,} questions")
        self.results["files"].append(results)

    def run_harness(self) -> None:
        """Every metric of each task; with its filter only where a task has several ways to read its answers."""
        from nanokimi.insight.harness import NanokimiLM, run_tasks

        loaded, scoring, options = (self.model, self.tokenizer), self.scoring, self.options
        found = run_tasks(
            NanokimiLM(loaded=loaded, batch_size=scoring.batch_size, precision=scoring.precision),
            options.harness_tasks,
            include_path=options.include_path,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
        )
        self.results["harness"] = {name: found[name] for name in HARNESS_RESULTS if name in found}
        for task, values in found["results"].items():
            n = found["n-samples"].get(task, {}).get("effective")
            over = "" if n is None else f"{n:,} samples"
            for key, value in values.items():
                name, _, way = key.partition(",")
                if isinstance(value, float) and not name.endswith("_stderr"):
                    stderr = values.get(f"{name}_stderr,{way}")  # text where there is none
                    stderr = stderr if isinstance(stderr, float) else None
                    self._add(task, name if way == "none" else key, value, stderr, over)

    def _add(self, what: str, figure: str, value: float, stderr: float | None = None, over: str = "") -> None:
        self.table.append((what, figure, f"{value:.4f}", "" if stderr is None else f"{stderr:.4f}", over))

    def publish(self) -> None:
        """Prints the table and writes the file, unless nothing was found.

        Raises:
            RunError: the file cannot be written.
        """
        if len(self.table) == 1:
            return
        show("\n".join(aligned(self.table, "<<>><")))
        if self.options.output:
            path = Path(self.options.output)
            # What JSON has: null for NaN and infinity, text for what is no value (functions of a task, say).
            plain = json.loads(json.dumps(self.results, default=str), parse_constant=lambda _: None)
            with disk_errors_explained("results file", path), atomic_write(path) as file:
                file.write(json.dumps(plain, indent=1).encode())


def _trained_with(path: str) -> TrainConfig:
    try:
        saved = checkpoint.read(Path(path)).get("train_config")
    except checkpoint.CheckpointError:  # a model in another format
        saved = None
    if saved is None:
        raise UserError(f"{path} does not say what it was trained on: name the text to score with --data_path")
    return from_dict(TrainConfig, saved)
