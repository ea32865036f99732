"""From a user's settings to a run: fresh or resumed, folders, text, device, then ``Trainer.train``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from nanokimi.checkpoint.file import require
from nanokimi.checkpoint.run import Checkpoints, SavedRun, holds_a_run
from nanokimi.checkpoint.weights import load_weights
from nanokimi.config import AUTO, ModelConfig, TrainConfig, field_names, from_dict
from nanokimi.console import log
from nanokimi.data.corpus import Corpus
from nanokimi.data.sources import open_corpus
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.device import out_of_memory_explained
from nanokimi.errors import ConfigError, UserError
from nanokimi.interop.loading import read_model
from nanokimi.memory import keep_freed_memory
from nanokimi.model.transformer import weight_shapes
from nanokimi.native.build import cache_folder
from nanokimi.ops.measured import Choice, machine_choice
from nanokimi.optim.muonclip import largest_matrix
from nanokimi.parallel.build import layout_of_run
from nanokimi.parallel.process_group import process_group, rank_device
from nanokimi.parallel.ranks import current_ranks, from_bytes, to_bytes
from nanokimi.training.advice import doubts
from nanokimi.training.batch_size import with_fitting_batch
from nanokimi.training.loggers import Loggers, Reported, check_loggers
from nanokimi.training.trainer import Trainer

# What belongs to this machine and these processes: never taken from a checkpoint.
LOCAL_FIELDS = field_names(TrainConfig, resume="local")
# What a resume may change without --override: none of it alters what a step computes, but for the length of the run,
# by which the schedule is laid out anew.
FREE_FIELDS = frozenset(field_names(TrainConfig, resume="free") + LOCAL_FIELDS)


@dataclass(frozen=True)
class TrainArguments:
    """What the user asked for, by flags and files; fields that were not named are absent.

    Attributes:
        train, model: values by field name; ``batch_size`` may be ``auto``.
        resume: go on from a checkpoint: the newest, or ``checkpoint_path``.
        override: fields that may differ from the checkpoint's.
        stop_after: step after which to save and end, with the schedule of the whole run; 0 = the last.
    """

    train: Mapping[str, Any]
    model: Mapping[str, Any]
    resume: bool = False
    checkpoint_path: str = ""
    override: frozenset[str] = frozenset()
    stop_after: int = 0

    @property
    def auto_batch(self) -> bool:
        """Whether the batch size is to be what fits into memory."""
        return bool(self.train.get("batch_size") == AUTO)

    @property
    def settings(self) -> dict[str, Any]:
        """``train`` without a batch size of ``auto``."""
        return _without(self.train, "batch_size") if self.auto_batch else dict(self.train)


class Origin(NamedTuple):
    """What a fresh run begins with; the tokenizer is None where the text decides, the weights where chance does."""

    config: ModelConfig
    tokenizer: Tokenizer | None = None
    weights: Mapping[str, Tensor] | None = None


def run_training(arguments: TrainArguments) -> int:
    """Trains as asked, together with the other processes that ``torchrun`` started; returns the exit code.

    Raises:
        UserError: a setting, the text, a folder or the checkpoint cannot be used.
        RunError: the run failed on its way.
        SystemExit: another rank has told of the failure.
    """
    if arguments.checkpoint_path and not arguments.resume:
        raise UserError("--checkpoint_path names where to go on from: add --resume")
    if arguments.stop_after < 0:
        raise UserError(f"--stop_after must be 0 or more, got {arguments.stop_after}")
    local = from_dict(TrainConfig, {k: v for k, v in arguments.settings.items() if k in (*LOCAL_FIELDS, "device")})
    folder = Path(local.output_dir) / "checkpoints"
    with process_group(local.device, local.timeout), out_of_memory_explained():
        checkpoints = Checkpoints(folder, asynchronous=local.async_checkpoints, timeout=local.timeout)
        if checkpoints.started_again():
            arguments = replace(arguments, resume=True, checkpoint_path="")
        return (_train_resumed if arguments.resume else _train_fresh)(arguments, checkpoints)


def _train_fresh(arguments: TrainArguments, checkpoints: Checkpoints) -> int:
    config = from_dict(TrainConfig, arguments.settings)
    check_loggers(config.log)
    if config.init_from:
        origin = origin_from_weights(config.init_from, arguments)
    else:
        origin = Origin(ModelConfig.preset(config.preset, **arguments.model))
    with checkpoints.locked():
        trainer = _fresh_trainer(config, origin, arguments, checkpoints)
        choose_products(trainer)
        del origin  # not two copies of the weights while it trains
        checkpoints.put_aside()
        return _train(trainer, continues=False, stop_after=arguments.stop_after)


def _fresh_trainer(config: TrainConfig, origin: Origin, arguments: TrainArguments, checkpoints: Checkpoints) -> Trainer:
    model_config, tokenizer, weights = origin
    named = "tokenizer_name" in arguments.model
    corpus = _open_corpus(config, model_config.tokenizer_name, tokenizer, named=named)
    if corpus.revision:
        config = replace(config, hf_revision=corpus.revision)  # what a resume has to read again
    if tokenizer is None and "vocab_size" not in arguments.model:
        model_config = replace(model_config, vocab_size=corpus.tokenizer.vocab_size)
    if model_config.vocab_size < corpus.tokenizer.vocab_size:
        raise UserError(
            f"vocab_size {model_config.vocab_size} is below the tokenizer's {corpus.tokenizer.vocab_size}: "
            "raise it, or leave it out to follow the tokenizer"
        )
    device = rank_device(config.device)
    if arguments.auto_batch:
        config = with_fitting_batch(config, model_config, device, log)
    layout = layout_of_run(config, model_config, device)
    trainer = Trainer(config, model_config, corpus, device, layout=layout, checkpoints=checkpoints)
    if weights is not None:
        load_weights(Path(config.init_from), trainer.parallel, weights)
        log(f"beginning with the {sum(w.numel() for w in weights.values()):,} parameters of {config.init_from}")
    return trainer


def _train_resumed(arguments: TrainArguments, checkpoints: Checkpoints) -> int:
    saved = checkpoints.find(arguments.checkpoint_path)
    config, model_config = resumed_configs(arguments, saved)
    check_loggers(config.log)
    with checkpoints.locked():
        tokenizer = Tokenizer.from_state(saved.content["tokenizer"])
        corpus = _open_corpus(config, model_config.tokenizer_name, tokenizer)
        device = rank_device(config.device)
        layout = layout_of_run(config, model_config, device)
        history = saved.content["history"]
        trainer = Trainer(config, model_config, corpus, device, layout=layout, checkpoints=checkpoints, history=history)
        trainer.load_state(saved, override=arguments.override)
        # Another run's checkpoints, or later ones of this run, are not overwritten.
        elsewhere = bool(arguments.checkpoint_path) and checkpoints.put_aside(unless_newest=saved.path)
        log(f"resuming {saved.path} at step {trainer.counters.step} of {config.max_steps}")
        if device.type == "cpu":
            log(f"products: {trainer.products} (as the checkpoint says)")
        return _train(trainer, continues=not elsewhere, stop_after=arguments.stop_after)


def choose_products(trainer: Trainer) -> None:
    """Has a fresh run on a CPU multiply as is faster here; the main rank decides for all."""
    if trainer.device.type != "cpu":
        return
    ranks, choice = current_ranks(), None
    if ranks.is_main:
        shape = largest_matrix(trainer.model)
        choice = machine_choice(shape, cache_folder(), deterministic=trainer.config.deterministic)
    choice = Choice(*from_bytes(ranks.broadcast(to_bytes(tuple(choice)) if choice else None)))
    trainer.multiply_by(choice)
    log(f"products: {choice} ({choice.evidence})")


def _open_corpus(
    config: TrainConfig, tokenizer_name: str, tokenizer: Tokenizer | None, *, named: bool = False
) -> Corpus:
    """The corpus of ``config``; a tokenizer is trained by the main rank, and sent to the others."""

    def opened(tokenizer: Tokenizer | None) -> Corpus:
        return open_corpus(config, tokenizer_name, tokenizer=tokenizer, named=named, log=log)

    ranks = current_ranks()
    corpus = opened(tokenizer) if ranks.is_main else None
    state = ranks.broadcast(to_bytes(corpus.tokenizer.to_state()) if corpus else None)
    with ranks.first_of_machine_first():
        corpus = corpus or opened(Tokenizer.from_state(from_bytes(state)))
    log(corpus.summary)
    return corpus


def _train(trainer: Trainer, *, continues: bool, stop_after: int) -> int:
    """Trains, unless the run is over: then it is left as it is."""
    if trainer.finished():
        return 0
    if trainer.device.type == "cpu":
        keep_freed_memory()
    if trainer.optimizer.needs_exact_logits:
        log(
            f"--qk_clip_tau {trainer.config.qk_clip_tau:g}: attention logits are measured exactly, for the bound that "
            f"costs nothing is too loose with a context of {trainer.model.config.max_seq_length}"
        )
    if not current_ranks().is_main:
        return trainer.train(stop_after=stop_after)
    config = trainer.config
    fields_of_both = {**asdict(config), **asdict(trainer.model.config)}
    run = Reported(Path(config.output_dir), fields_of_both, trainer.counters.step, continues, log)
    for doubt in doubts(config):
        log(f"warning: {doubt}")
    with Loggers(config.log, run) as loggers:
        code = trainer.train(loggers, stop_after=stop_after)
    for warning, count in trainer.batches.warnings.items():
        log(f"note: {count:,} {warning}")
    return code


# ---- settings -----------------------------------------------------------------------------------


def origin_from_weights(path: str, arguments: TrainArguments) -> Origin:
    """``--init_from``: shape, weights and tokenizer of a trained model; the user may change what needs no others."""
    if "preset" in arguments.train:
        raise UserError("--preset: the shape of the model comes with --init_from: leave one of them out")
    if "tokenizer_name" in arguments.model:
        raise UserError("tokenizer_name: the tokenizer comes with --init_from: leave one of them out")
    stored = read_model(path)
    config = replace(stored.config, **arguments.model)
    for name, value in arguments.model.items():
        with suppress(ConfigError):  # of a field that is right only together with others
            if weight_shapes(replace(stored.config, **{name: value})) != weight_shapes(stored.config):
                own = getattr(stored.config, name)
                raise UserError(f"{name} {value}: the weights of --init_from {path} are made for {own}: leave it out")
    if weight_shapes(config) != weight_shapes(stored.config):
        raise UserError(
            f"{', '.join(arguments.model)}: the weights of --init_from {path} have other shapes: leave them out"
        )
    return Origin(config, stored.tokenizer, stored.weights)


def resumed_configs(arguments: TrainArguments, saved: SavedRun) -> tuple[TrainConfig, ModelConfig]:
    """The checkpoint's configs with the user's settings on top.

    Raises:
        UserError: the checkpoint holds no run, or settings differ that change the training: the message lists them.
    """
    path, content = saved
    require(path, content, "model_config", "tokenizer")
    if "train_config" not in content or "history" not in content or "counters" not in content:
        raise UserError(f"{path} holds a model and no run to go on with: begin one with --init_from {path}")
    if not holds_a_run(content):
        raise UserError(
            f"{path} holds the weights of a model in shards, without optimizer state: name a folder step_N beside it, "
            f"or begin a run with --init_from {path}"
        )
    saved_train = from_dict(TrainConfig, content["train_config"])
    saved_model = from_dict(ModelConfig, content["model_config"])
    asked = _as_cut_before(arguments.settings, saved_train) if arguments.auto_batch else arguments.settings
    if asked.get("init_from", "") not in ("", saved_train.init_from):
        raise UserError(f"--init_from: --resume goes on with the weights of {path}: leave one of the two out")
    known = {*field_names(TrainConfig), *field_names(ModelConfig)} - {*field_names(TrainConfig, resume="never")}
    if unknown := sorted(arguments.override - known):
        raise UserError(f"--override {', '.join(unknown)}: no such field, or none that a resume can change")
    differences = [
        f"{name} (saved {earlier!r}, now {value!r})"
        for config, values in ((saved_train, asked), (saved_model, arguments.model))
        for name, value in values.items()
        if (earlier := getattr(config, name)) != value and name not in FREE_FIELDS | arguments.override
    ]
    if differences:
        raise UserError(
            f"{path} was trained with other settings: {', '.join(differences)}: "
            "leave them out, or name those to change with --override"
        )
    local = {name: asked.get(name, getattr(TrainConfig, name)) for name in LOCAL_FIELDS}
    return replace(saved_train, **{**asked, **local}), replace(saved_model, **arguments.model)


def _as_cut_before(asked: Mapping[str, Any], saved: TrainConfig) -> Mapping[str, Any]:
    """Under ``--batch_size auto`` a resume cuts its steps as the run did, if they are to be as large as they were."""
    passes = asked.get("gradient_accumulation", TrainConfig.gradient_accumulation)
    if passes * TrainConfig.batch_size != saved.batch_size * saved.gradient_accumulation:
        return asked
    return _without(asked, "gradient_accumulation")


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != name}
