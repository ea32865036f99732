"""From a user's settings to a run: fresh or resumed, folders, text, device, then ``Trainer.train``."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nanokimi import checkpoint
from nanokimi.config import ModelConfig, TrainConfig, from_dict
from nanokimi.data.corpus import Corpus
from nanokimi.data.sources import open_corpus
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.device import out_of_memory_explained, resolve_device
from nanokimi.errors import UserError
from nanokimi.training.trainer import Trainer

# What a resume may change without being asked twice: none of it alters what a step computes,
# but for the length of the run, by which the schedule is laid out anew.
FREE_TO_CHANGE = frozenset(
    {
        "max_steps", "max_seconds", "eval_interval", "save_interval", "samples", "sample_prompt", "val_tokens",
        "device", "num_workers", "output_dir",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What the user asked for, by flags and files; fields that were not named are absent.

    Attributes:
        train, model: values by field name.
        resume: go on from a checkpoint: the newest, or ``checkpoint_path``.
        override: fields that may differ from the checkpoint's.
    """

    train: Mapping[str, Any]
    model: Mapping[str, Any]
    resume: bool = False
    checkpoint_path: str = ""
    override: frozenset[str] = frozenset()


def run_training(request: Request) -> int:
    """Trains as requested; returns the exit code.

    Raises:
        UserError: a setting, the text, a folder or the checkpoint cannot be used.
        RunError: the run failed on its way.
    """
    if request.checkpoint_path and not request.resume:
        raise UserError("--checkpoint_path names where to go on from: add --resume")
    output = Path(from_dict(TrainConfig, request.train).output_dir)
    with out_of_memory_explained():
        return _train_resumed(request, output) if request.resume else _train_fresh(request, output)


def _train_fresh(request: Request, output: Path) -> int:
    config = from_dict(TrainConfig, request.train)
    model_config = ModelConfig.preset(config.preset, **request.model)
    with _own_folder(output):
        corpus = _open_corpus(config, model_config.tokenizer_name, named="tokenizer_name" in request.model)
        if corpus.revision:
            config = replace(config, hf_revision=corpus.revision)  # what a resume has to read again
        if "vocab_size" not in request.model:
            model_config = replace(model_config, vocab_size=corpus.tokenizer.vocab_size)
        if model_config.vocab_size < corpus.tokenizer.vocab_size:
            raise UserError(
                f"vocab_size {model_config.vocab_size} is below the tokenizer's {corpus.tokenizer.vocab_size}: "
                "raise it, or leave it out to follow the tokenizer"
            )
        trainer = Trainer(config, model_config, corpus, resolve_device(config.device))
        _put_aside(output / "checkpoints")
        return _train(trainer)


def _train_resumed(request: Request, output: Path) -> int:
    path, content = find_checkpoint(output, request.checkpoint_path)
    checkpoint.require(path, content, "train_config", "model_config", "tokenizer", "history", "model")
    config, model_config = _resumed_configs(request, path, content)
    with _own_folder(output):
        tokenizer = Tokenizer.from_state(content["tokenizer"])
        corpus = _open_corpus(config, model_config.tokenizer_name, tokenizer=tokenizer)
        device = resolve_device(config.device)
        trainer = Trainer(config, model_config, corpus, device, history=content["history"])
        trainer.restore(path, content, override=request.override)
        newest = _checkpoints(output)[:1]
        if request.checkpoint_path and newest and not newest[0].samefile(path):
            _put_aside(output / "checkpoints")  # another run's, or later ones of this run
        say(f"resuming {path} at step {trainer.counters.step} of {config.max_steps}")
        return _train(trainer)


def _train(trainer: Trainer) -> int:
    code = trainer.train()
    for oddity, count in trainer.batches.oddities.items():
        say(f"note: {count:,} {oddity}")
    return code


def _open_corpus(
    config: TrainConfig, tokenizer_name: str, *, tokenizer: Tokenizer | None = None, named: bool = False
) -> Corpus:
    corpus = open_corpus(config, tokenizer_name, tokenizer=tokenizer, named=named, say=say)
    say(corpus.summary)
    return corpus


def say(text: str) -> None:
    """Tells the user something that is not the command's result."""
    print(text, file=sys.stderr, flush=True)


def find_checkpoint(output: Path, named: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint to resume: ``named``, or the newest readable one under ``output``; never none."""
    if named:
        return Path(named), checkpoint.read(Path(named))
    found = _checkpoints(output)
    if not found:
        raise UserError(
            f"--resume: no checkpoint in {output / 'checkpoints'}: check --output_dir, or start without --resume"
        )
    path, content, problems = checkpoint.first_readable(found)
    for problem in problems:
        say(f"warning: {problem}")
    return path, content


def _checkpoints(output: Path) -> list[Path]:
    """The checkpoints of the run in ``output``, newest first; of two names for one file the plainer one first."""
    names = ("latest.pt", "final.pt", "best.pt", "previous.pt")
    found = [path for name in names if (path := output / "checkpoints" / name).is_file()]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _resumed_configs(request: Request, path: Path, content: dict[str, Any]) -> tuple[TrainConfig, ModelConfig]:
    """The checkpoint's configs with the request on top; lists and refuses differences that change the training."""
    saved_train, saved_model = content["train_config"], content["model_config"]
    known = {f.name for f in (*fields(TrainConfig), *fields(ModelConfig))} - {"preset"}
    if unknown := sorted(request.override - known):
        raise UserError(f"--override {', '.join(unknown)}: no such field, or none that a resume can change")
    output = {"output_dir": request.train.get("output_dir", TrainConfig.output_dir)}
    config = from_dict(TrainConfig, {**saved_train, **request.train, **output})
    model_config = from_dict(ModelConfig, {**saved_model, **request.model})
    differences = [
        f"{name} (saved {saved[name]!r}, now {value!r})"
        for saved, asked in ((saved_train, request.train), (saved_model, request.model))
        for name, value in asked.items()
        if saved.get(name) != value and name not in FREE_TO_CHANGE | request.override
    ]
    if differences:
        raise UserError(
            f"{path} was trained with other settings: {', '.join(differences)}: "
            "leave them out, or name those to change with --override"
        )
    return config, model_config


@contextmanager
def _own_folder(output: Path) -> Iterator[None]:
    """Makes the run's folders and keeps other runs out of them until this one ends."""
    try:
        (output / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = (output / ".nanokimi.lock").open("w")
    except OSError as error:
        raise UserError(f"--output_dir {output}: cannot be written ({error.strerror}): choose another") from error
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not held on by orphaned data workers
        except OSError:
            raise UserError(f"--output_dir {output}: another run is writing there: choose another") from None
        yield


def _put_aside(folder: Path) -> None:
    """Renames a folder that holds an earlier run's checkpoints: a fresh run never overwrites them."""
    if not any(folder.glob("*.pt")):
        return
    number = next(n for n in range(1, 1 << 20) if not folder.with_name(f"{folder.name}.{n}").exists())
    kept = folder.with_name(f"{folder.name}.{number}")
    folder.rename(kept)
    folder.mkdir()
    say(f"the earlier run's checkpoints are kept in {kept} (--resume goes on from them instead)")
