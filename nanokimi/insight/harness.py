"""The adapter for lm-evaluation-harness: a nanokimi model as its model ``nanokimi``.

Importing this module registers it, as ``nanokimi eval MODEL --tasks NAME,...`` does; from Python see
docs/evaluation.md. Needs the package ``lm_eval``, which nothing else of nanokimi imports.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from nanokimi.config import suggest
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.device import resolve_device
from nanokimi.errors import RunError, UserError
from nanokimi.inference.decoder import Decoder
from nanokimi.inference.decoding import new_decoder
from nanokimi.inference.generate import stream_tokens
from nanokimi.inference.options import SamplingOptions
from nanokimi.insight.scoring import Score, Scoring, score_rows
from nanokimi.interop.loading import load
from nanokimi.model.transformer import Transformer

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
IGNORED = {"do_sample": None, "num_beams": 1}  # what a task may say because it changes nothing here


class NanokimiLM(TemplateLM):  # type: ignore[misc]  # untyped where the package is there, unknown where it is not
    """A nanokimi model with the interface of the harness.

    Args:
        checkpoint: whatever ``nanokimi.interop.loading.load`` takes.
        device: as for ``--device``.
        batch_size: rows of a forward pass.
        loaded: a model in evaluation mode and its tokenizer, instead of ``checkpoint``.
        precision: an autocast context, see ``Scoring``.

    Raises:
        UserError: the model cannot be loaded, ``batch_size`` is no number.
    """

    def __init__(
        self,
        checkpoint: str = "",
        device: str = "auto",
        batch_size: int | str = 8,
        *,
        loaded: tuple[Transformer, Tokenizer] | None = None,
        precision: contextlib.AbstractContextManager[object] | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size {batch_size}: give a whole number of 1 or more")
        if loaded is None and not checkpoint:
            raise UserError("the harness's model nanokimi needs checkpoint=PATH")
        self.model, self.text_tokenizer = loaded or load(checkpoint, device=resolve_device(device))
        self.scoring = Scoring(int(batch_size), precision)
        self._device = self.model.embed.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text: the beginning-of-text token if there is one, as in the harness's ``hf``."""
        return self.text_tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self.model.config.max_seq_length

    @property
    def max_gen_toks(self) -> int:
        """Most tokens to generate where a task does not say."""
        return 256

    @property
    def batch_size(self) -> int:
        return self.scoring.batch_size

    @property
    def tokenizer_name(self) -> str:
        """Differs wherever text becomes other tokens: the cache of the harness goes by it."""
        return f"{self.text_tokenizer.name}-{self.text_tokenizer.fingerprint[:16]}".replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; nothing is ever added to them."""
        return self.text_tokenizer.encode(string)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness reports of the model beside the results."""
        return {"model_num_parameters": self.model.num_parameters(), "model_dtype": str(self.model.embed.weight.dtype)}

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        rows = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        answers = [(part.log_prob, part.greedy) for part in self._score(rows, "continuations", disable_tqdm)]
        for (asked, *_rest), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", asked, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each by itself after ``prefix_token_id``, in windows of the context."""
        rows = [([self.prefix_token_id], self.tok_encode(request.args[0])) for request in requests]
        answers = [part.log_prob for part in self._score(rows, "texts", disable_tqdm)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def _score(self, rows: Sequence[tuple[list[int], list[int]]], what: str, quiet: bool) -> Iterator[Score]:
        scores = score_rows(self.model, rows, self.scoring)
        yield from tqdm(scores, f"scoring {what}", total=len(rows), disable=quiet)

    @functools.cached_property
    def decoder(self) -> Decoder:
        return new_decoder(self.model)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, which is left out, or an end of text; greedy unless a task says more."""
        texts = []
        for request in tqdm(requests, "generating", disable=disable_tqdm):
            context, choices = request.args
            texts.append(self._generate(context, choices))
            self.cache_hook.add_partial("generate_until", (context, choices), texts[-1])
        return texts

    def _generate(self, context: str, choices: dict[str, Any]) -> str:
        tokenizer, settings = self.text_tokenizer, self._settings(choices)
        prompt = self.tok_encode(context)[settings.max_tokens - self.max_length :] or [self.prefix_token_id]
        stop, size = (self.eot_token_id,), tokenizer.vocab_size
        tokens = stream_tokens(self.model, prompt, settings, stop_tokens=stop, vocab_size=size, decoder=self.decoder)
        ids, text = [], ""
        with contextlib.closing(tokens):
            for token in tokens:
                ids.append(token)
                text = tokenizer.decode(ids)
                if any(stop in text for stop in settings.stop):
                    break
        return text[: min((text.find(stop) for stop in settings.stop if stop in text), default=len(text))]

    def _settings(self, choices: dict[str, Any]) -> SamplingOptions:
        """The sampling that a task asks for; more tokens than the context holds become half of it."""
        asked: dict[str, Any] = normalize_gen_kwargs(choices, self.max_gen_toks)
        wanted, stops = asked.pop("max_gen_toks"), tuple(stop for stop in asked.pop("until") if stop)
        values: dict[str, Any] = {"temperature": 1.0 if asked.get("do_sample") else 0.0, "top_p": 1.0}
        values |= {name: asked.pop(name) for name in SAMPLING if name in asked}
        for name, value in asked.items():
            if name not in IGNORED or IGNORED[name] not in (None, value):
                raise UserError(f"a task asks for {name}={value!r} in generation_kwargs: take it out of the task")
        most = wanted if wanted < self.max_length else self.max_length // 2
        return SamplingOptions(**values, max_tokens=most, stop=stops)


register_model("nanokimi")(NanokimiLM)


def run_tasks(
    model: NanokimiLM, names: Sequence[str], *, include_path: str = "", num_fewshot: int | None = None, limit: int = 0
) -> dict[str, Any]:
    """Runs tasks of the harness; returns what ``lm_eval.simple_evaluate`` does.

    Args:
        names: of tasks, groups, tags, patterns of these, or YAML files.
        include_path: a folder with YAML files of more tasks.
        num_fewshot: solved examples before each question; None leaves it to the task.
        limit: questions of each task; 0 takes all.

    Raises:
        UserError: there is no such task.
        RunError: a task failed, for example because its data set could not be fetched.
    """
    if include_path and not Path(include_path).is_dir():
        raise UserError(
            f"--include_path {include_path}: no such folder: name the one with the YAML files of your tasks"
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the results
            manager, chosen = _find(names, include_path)
            results: dict[str, Any] = lm_eval.simple_evaluate(
                model,
                tasks=chosen,
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit or None,
                log_samples=False,
                batch_size=model.batch_size,
                device=str(model.device),
            )
    except (UserError, RunError):
        raise
    except Exception as error:  # whatever the harness, its tasks and their data sets raise
        reason = " ".join(str(error).split())[:300] or "no more is known"
        raise RunError(
            f"--tasks {','.join(names)}: the harness failed: {type(error).__name__}: {reason}; without a network only "
            "tasks with data on this machine can run"
        ) from error
    return results


def _find(names: Sequence[str], include_path: str) -> tuple[Any, list[str]]:
    """The harness's index of tasks, and what of it ``names`` mean.

    Its own tasks are thousands of files, so they are only looked at when one of them is meant.
    """
    if include_path:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own, list(names)
    print("looking for tasks of the harness", file=sys.stderr, flush=True)
    manager = TaskManager(include_path=include_path or None)
    chosen: list[str] = []
    for name in names:
        is_file = Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()
        found = [name] if is_file else manager.match_tasks([name])
        if not found:
            raise UserError(
                f"--tasks {name}: no such task{suggest(name, set(manager.all_tasks))}; `lm-eval ls tasks` lists those "
                "of the harness, --include_path adds your own, and a file of questions ends in .jsonl"
            )
        chosen += found
    return manager, list(dict.fromkeys(chosen))
