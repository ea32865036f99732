"""From a user's settings to a run: fresh or resumed, folders, text, device, then ``Trainer.train``."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from nanokimi import checkpoint
from nanokimi.config import AUTO, ModelConfig, TrainConfig, from_dict
from nanokimi.console import log
from nanokimi.data.corpus import Corpus
from nanokimi.data.sources import open_corpus
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.device import out_of_memory_explained
from nanokimi.errors import ConfigError, UserError
from nanokimi.interop.loading import read_model
from nanokimi.model.transformer import weight_shapes
from nanokimi.parallel.ranks import ALONE, Ranks, from_bytes, joined, launcher, restarts, to_bytes
from nanokimi.training.allocator import keep_freed_memory
from nanokimi.training.batch_size import with_fitting_batch
from nanokimi.training.distributed import about_layout, choose_layout, device_of, replica_fits
from nanokimi.training.loggers import Loggers, Reported, check_loggers
from nanokimi.training.saving import candidates, has_run, holds_a_run, newest_run, place_weights, read_run
from nanokimi.training.trainer import Trainer

# What a resume may change without being asked twice: none of it alters what a step computes,
# but for the length of the run, by which the schedule is laid out anew.
FREE_TO_CHANGE = frozenset(
    {
        "max_steps", "max_seconds", "eval_interval", "save_interval", "samples", "sample_prompt", "val_tokens",
        "device", "num_workers", "output_dir", "log", "activation_checkpointing", "parallel", "replicate",
        "expert_parallel", "async_checkpoints", "timeout",
    }
)  # fmt: skip

# What belongs to the place and the processes of a run and not to what it learns: never taken from a checkpoint.
OF_THIS_PLACE = ("output_dir", "parallel", "replicate", "expert_parallel", "async_checkpoints", "timeout")

LOCK = ".nanokimi.lock"  # in the folder of a run, held while it trains


@dataclass(frozen=True)
class Request:
    """What the user asked for, by flags and files; fields that were not named are absent.

    Attributes:
        train, model: values by field name; ``batch_size`` may be ``auto``.
        resume: go on from a checkpoint: the newest, or ``checkpoint_path``.
        override: fields that may differ from the checkpoint's.
    """

    train: Mapping[str, Any]
    model: Mapping[str, Any]
    resume: bool = False
    checkpoint_path: str = ""
    override: frozenset[str] = frozenset()


def run_training(request: Request) -> int:
    """Trains as requested, together with the other processes that ``torchrun`` started; returns the exit code.

    Raises:
        UserError: a setting, the text, a folder or the checkpoint cannot be used.
        RunError: the run failed on its way.
        SystemExit: the same on ranks that do not lead.
    """
    if request.checkpoint_path and not request.resume:
        raise UserError("--checkpoint_path names where to go on from: add --resume")
    if auto := request.train.get("batch_size") == AUTO:
        request = replace(request, train={k: v for k, v in request.train.items() if k != "batch_size"})
    place = from_dict(TrainConfig, {k: v for k, v in request.train.items() if k in (*OF_THIS_PLACE, "device")})
    output = Path(place.output_dir)
    with joined(place.device, place.timeout) as ranks, out_of_memory_explained():
        if ranks.launched and _started_again(output, ranks):
            request = replace(request, resume=True, checkpoint_path="")
        return (_train_resumed if request.resume else _train_fresh)(request, output, auto, ranks)


def _started_again(output: Path, ranks: Ranks) -> bool:
    """Whether it is the run in ``output`` that ``torchrun`` has started again, and there is something to go on from.

    It does so when a process has ended, which it counts, and when machines join or leave, which it does not.
    """
    launchers = _launchers(ranks)
    lock = output / LOCK
    earlier = set(lock.read_text().splitlines()) if ranks.is_main and lock.is_file() else set()
    again = (restarts() > 0 or bool(earlier & launchers)) and has_run(output / "checkpoints")
    return bool(ranks.largest([ranks.is_main and again])[0])


def _launchers(ranks: Ranks) -> set[str]:
    """Every ``torchrun`` that takes part; none in a process that was started alone."""
    return {told.decode() for told in ranks.gather(launcher().encode())} - {""} if ranks.launched else set()


class Origin(NamedTuple):
    """What a fresh run begins with; the tokenizer is None where the text decides, the weights where chance does."""

    config: ModelConfig
    tokenizer: Tokenizer | None = None
    weights: Mapping[str, Tensor] | None = None


def _train_fresh(request: Request, output: Path, auto_batch: bool, ranks: Ranks) -> int:
    config, origin = ranks.run_or_fail_together(lambda: _begin(request))
    with _own_folder(output, ranks):
        trainer = _fresh_trainer(config, origin, request, auto_batch, ranks)
        del origin  # not two copies of the weights while it trains
        if ranks.is_main:
            _put_aside(output / "checkpoints")
        return _train(trainer, continues=False)


def _begin(request: Request) -> tuple[TrainConfig, Origin]:
    config = from_dict(TrainConfig, request.train)
    check_loggers(config.log)
    if config.init_from:
        return config, _origin_from_weights(config.init_from, request)
    return config, Origin(ModelConfig.preset(config.preset, **request.model))


def _fresh_trainer(config: TrainConfig, origin: Origin, request: Request, auto_batch: bool, ranks: Ranks) -> Trainer:
    model_config, tokenizer = origin.config, origin.tokenizer
    named = "tokenizer_name" in request.model
    corpus = _open_corpus(config, model_config.tokenizer_name, ranks, tokenizer=tokenizer, named=named)
    if corpus.revision:
        config = replace(config, hf_revision=corpus.revision)  # what a resume has to read again
    if tokenizer is None and "vocab_size" not in request.model:
        model_config = replace(model_config, vocab_size=corpus.tokenizer.vocab_size)
    device = ranks.run_or_fail_together(lambda: _fitting_device(config, model_config, corpus, ranks))
    if auto_batch:
        config = _fitting_batch(config, model_config, device, ranks)
    trainer = _trainer(config, model_config, corpus, device, ranks)
    if origin.weights is not None:
        weights = origin.weights
        ranks.run_or_fail_together(lambda: place_weights(Path(config.init_from), weights, trainer.spread))
        log(f"beginning with the {sum(w.numel() for w in origin.weights.values()):,} parameters of {config.init_from}")
    return trainer


def _fitting_batch(config: TrainConfig, model_config: ModelConfig, device: torch.device, ranks: Ranks) -> TrainConfig:
    """The largest batch size that fits on every rank."""

    def measured() -> TrainConfig:
        if config.parallel == "fsdp" or config.replicate > 1 or config.expert_parallel:
            raise UserError("--batch_size auto measures whole models: name a number (nanokimi plan says what it takes)")
        return with_fitting_batch(config, model_config, device, log, ranks=ranks.size)

    fitted = ranks.run_or_fail_together(measured)
    smallest = -int(ranks.largest([-fitted.batch_size])[0])
    passes = config.batch_size * config.gradient_accumulation // smallest
    return replace(config, batch_size=smallest, gradient_accumulation=passes)


def _fitting_device(config: TrainConfig, model_config: ModelConfig, corpus: Corpus, ranks: Ranks) -> torch.device:
    """The device, once vocabulary and tokenizer are known to fit."""
    if model_config.vocab_size < corpus.tokenizer.vocab_size:
        raise UserError(
            f"vocab_size {model_config.vocab_size} is below the tokenizer's {corpus.tokenizer.vocab_size}: "
            "raise it, or leave it out to follow the tokenizer"
        )
    return device_of(config.device, ranks)


def _trainer(
    config: TrainConfig, model_config: ModelConfig, corpus: Corpus, device: torch.device, ranks: Ranks,
    history: str = "",
) -> Trainer:  # fmt: skip
    def fits() -> bool:
        return replica_fits(config, model_config, device, ranks)

    layout = ranks.run_or_fail_together(lambda: choose_layout(config, model_config, ranks, fits))
    if line := about_layout(layout, config):
        log(line)
    if config.async_checkpoints and layout.mode != "fsdp":
        log("note: --async_checkpoints: nothing is in shards here, so checkpoints are written at once")
    return Trainer(config, model_config, corpus, device, history, ranks=ranks, layout=layout)


def _origin_from_weights(path: str, request: Request) -> Origin:
    """``--init_from``: shape, weights and tokenizer of a trained model; the request changes what needs no others."""
    if "preset" in request.train:
        raise UserError("--preset: the shape of the model comes with --init_from: leave one of them out")
    if "tokenizer_name" in request.model:
        raise UserError("tokenizer_name: the tokenizer comes with --init_from: leave one of them out")
    stored = read_model(path)
    config = replace(stored.config, **request.model)
    for name, value in request.model.items():
        with suppress(ConfigError):  # of a field that is right only together with others
            if weight_shapes(replace(stored.config, **{name: value})) != weight_shapes(stored.config):
                own = getattr(stored.config, name)
                raise UserError(f"{name} {value}: the weights of --init_from {path} are made for {own}: leave it out")
    if weight_shapes(config) != weight_shapes(stored.config):
        raise UserError(
            f"{', '.join(request.model)}: the weights of --init_from {path} have other shapes: leave them out"
        )
    return Origin(config, stored.tokenizer, stored.weights)


def _train_resumed(request: Request, output: Path, auto_batch: bool, ranks: Ranks) -> int:
    path, content = find_checkpoint(output, request.checkpoint_path, ranks)
    config, model_config = ranks.run_or_fail_together(lambda: _go_on(request, path, content, auto_batch))
    with _own_folder(output, ranks):
        tokenizer = Tokenizer.from_state(content["tokenizer"])
        corpus = _open_corpus(config, model_config.tokenizer_name, ranks, tokenizer=tokenizer)
        device = ranks.run_or_fail_together(lambda: device_of(config.device, ranks))
        trainer = _trainer(config, model_config, corpus, device, ranks, content["history"])
        ranks.run_or_fail_together(lambda: trainer.restore(path, content, override=request.override))
        newest = candidates(output / "checkpoints")[:1]
        elsewhere = bool(request.checkpoint_path and newest and not newest[0].samefile(path))
        ranks.barrier()  # until all have looked
        if elsewhere and ranks.is_main:
            _put_aside(output / "checkpoints")  # another run's, or later ones of this run
        log(f"resuming {path} at step {trainer.counters.step} of {config.max_steps}")
        return _train(trainer, continues=not elsewhere)


def _go_on(request: Request, path: Path, content: dict[str, Any], auto_batch: bool) -> tuple[TrainConfig, ModelConfig]:
    checkpoint.require(path, content, "model_config", "tokenizer")
    if "train_config" not in content or "history" not in content or "counters" not in content:
        raise UserError(f"{path} holds a model and no run to go on with: begin one with --init_from {path}")
    if not holds_a_run(content):
        raise UserError(
            f"{path} holds the weights of a model in shards, without optimizer state: name a folder step_N beside it, "
            f"or begin a run with --init_from {path}"
        )
    if auto_batch:
        request = _as_cut_before(request, content["train_config"])
    config, model_config = _resumed_configs(request, path, content)
    check_loggers(config.log)
    return config, model_config


def _train(trainer: Trainer, *, continues: bool) -> int:
    """Trains, unless the run is over: then it is left as it is."""
    if trainer.finished():
        return 0
    if trainer.device.type == "cpu":
        keep_freed_memory()
    if not trainer.ranks.is_main:
        return trainer.train()
    config = trainer.config
    fields_of_both = {**asdict(config), **asdict(trainer.model.config)}
    run = Reported(Path(config.output_dir), fields_of_both, trainer.counters.step, continues, log)
    with Loggers(config.log, run) as loggers:
        code = trainer.train(loggers)
    for oddity, count in trainer.batches.warnings.items():
        log(f"note: {count:,} {oddity}")
    return code


def _open_corpus(
    config: TrainConfig, tokenizer_name: str, ranks: Ranks, *, tokenizer: Tokenizer | None = None, named: bool = False
) -> Corpus:
    """The corpus of ``config``; a tokenizer is trained by the rank that leads, and given to the others."""

    def opened(tokenizer: Tokenizer | None) -> Corpus:
        return open_corpus(config, tokenizer_name, tokenizer=tokenizer, named=named, log=log)

    leading = ranks.run_or_fail_together(lambda: opened(tokenizer) if ranks.is_main else None)
    given = ranks.given(to_bytes(leading.tokenizer.to_state()) if leading is not None else None)
    others = ranks.in_turn(lambda: None if ranks.is_main else opened(Tokenizer.from_state(from_bytes(given))))
    corpus = leading or others
    assert corpus is not None
    log(corpus.summary)
    return corpus


def find_checkpoint(output: Path, named: str, ranks: Ranks = ALONE) -> tuple[Path, dict[str, Any]]:
    """The checkpoint to resume: ``named``, or the newest readable one under ``output``; never none."""
    found = ranks.run_or_fail_together(lambda: _found(output, named) if ranks.is_main else None)
    path = Path(ranks.given(str(found[0]).encode() if found else None).decode())
    others = ranks.run_or_fail_together(lambda: None if ranks.is_main else read_run(path))
    return path, found[1] if found else others or {}


def _found(output: Path, named: str) -> tuple[Path, dict[str, Any]]:
    if named:
        return Path(named), read_run(Path(named))
    path, content, problems = newest_run(output / "checkpoints")
    for problem in problems:
        log(f"warning: {problem}")
    return path, content


def _resumed_configs(request: Request, path: Path, content: dict[str, Any]) -> tuple[TrainConfig, ModelConfig]:
    """The checkpoint's configs with the request on top; lists and refuses differences that change the training."""
    saved_train = from_dict(TrainConfig, content["train_config"])
    saved_model = from_dict(ModelConfig, content["model_config"])
    if request.train.get("init_from", "") not in ("", saved_train.init_from):
        raise UserError(f"--init_from: --resume goes on with the weights of {path}: leave one of the two out")
    known = {f.name for f in (*fields(TrainConfig), *fields(ModelConfig))} - {"preset", "init_from"}
    if unknown := sorted(request.override - known):
        raise UserError(f"--override {', '.join(unknown)}: no such field, or none that a resume can change")
    place = {name: request.train.get(name, getattr(TrainConfig, name)) for name in OF_THIS_PLACE}
    config = replace(saved_train, **{**request.train, **place})
    model_config = replace(saved_model, **request.model)
    differences = [
        f"{name} (saved {earlier!r}, now {value!r})"
        for saved, asked in ((saved_train, request.train), (saved_model, request.model))
        for name, value in asked.items()
        if (earlier := getattr(saved, name)) != value and name not in FREE_TO_CHANGE | request.override
    ]
    if differences:
        raise UserError(
            f"{path} was trained with other settings: {', '.join(differences)}: "
            "leave them out, or name those to change with --override"
        )
    return config, model_config


def _as_cut_before(request: Request, saved: Mapping[str, Any]) -> Request:
    """Under ``--batch_size auto`` a resume cuts its steps as the run did, if they are to be as large as they were."""
    passes = request.train.get("gradient_accumulation", TrainConfig.gradient_accumulation)
    if passes * TrainConfig.batch_size != saved["batch_size"] * saved["gradient_accumulation"]:
        return request
    return replace(request, train={k: v for k, v in request.train.items() if k != "gradient_accumulation"})


@contextmanager
def _own_folder(output: Path, ranks: Ranks) -> Iterator[None]:
    """Makes the run's folders and keeps other runs out of them until this one ends."""
    launchers = _launchers(ranks)
    lock = ranks.run_or_fail_together(lambda: _locked(output, launchers) if ranks.is_main else None)
    with lock or nullcontext():
        yield


def _locked(output: Path, launchers: set[str]) -> TextIO:
    """The run's lock, which says who started the run; held until it is closed."""
    try:
        (output / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = (output / LOCK).open("a")
    except OSError as error:
        raise UserError(f"--output_dir {output}: cannot be written ({error.strerror}): choose another") from error
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not held on by orphaned data workers
    except OSError:
        lock.close()
        raise UserError(f"--output_dir {output}: another run is writing there: choose another") from None
    lock.truncate(0)
    lock.writelines(f"{name}\n" for name in sorted(launchers))
    lock.flush()
    return lock


def _put_aside(folder: Path) -> None:
    """Renames a folder that holds an earlier run's checkpoints: a fresh run never overwrites them."""
    if not candidates(folder):
        return
    number = next(n for n in range(1, 1 << 20) if not folder.with_name(f"{folder.name}.{n}").exists())
    kept = folder.with_name(f"{folder.name}.{number}")
    folder.rename(kept)
    folder.mkdir()
    log(f"the earlier run's checkpoints are kept in {kept} (--resume goes on from them instead)")
