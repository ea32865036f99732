"""The training loop, top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nanokimi.checkpoint.file import require
from nanokimi.checkpoint.run import Checkpoints, SavedRun
from nanokimi.checkpoint.weights import build_model
from nanokimi.config import ModelConfig, TrainConfig, field_names
from nanokimi.console import printable
from nanokimi.data.batch import Batch, PackedSequences
from nanokimi.data.corpus import Corpus
from nanokimi.data.loader import LoaderOptions, merge_states
from nanokimi.errors import RunError, UserError
from nanokimi.inference.generate import generate
from nanokimi.model.transformer import Transformer
from nanokimi.ops.measured import Choice, default_choice
from nanokimi.ops.products import fp32_library, multiply_fp32_by
from nanokimi.optim.muonclip import make_optimizer
from nanokimi.optim.schedule import lr_factor
from nanokimi.parallel.build import build_parallel_model
from nanokimi.parallel.layout import ONE, Layout
from nanokimi.parallel.ranks import HangWatch, Read, StopSignals, current_ranks, from_bytes, read_or_save, to_bytes
from nanokimi.pictures import matplotlib_without_screen
from nanokimi.training.loggers import Loggers
from nanokimi.training.metrics import Extras, MetricsLog, ProgressDisplay
from nanokimi.training.step import SpikeWatch, TrainingStep, evaluate

SAMPLE_TOKENS = 60

# To override one of these is to give up the exact place in the text.
TEXT_FIELDS = {*field_names(TrainConfig, decides_text=True), *field_names(ModelConfig, decides_text=True)}


@dataclass
class Counters:
    """What grows while a run goes on; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training, all earlier processes included
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_loss: float = math.inf


class Trainer:
    """One run: the model, its optimizer, its data and what it writes.

    Args:
        config, model_config: the run's choices; ``vocab_size`` already fits the tokenizer.
        corpus: tokenised text.
        device: where the model trains.
        layout: how the model lies on the ranks of the process group, if this process has joined one.
        checkpoints: where to save; by default in ``config.output_dir``.
        history: ``MetricsLog.state()`` of the checkpoint that is continued, ``""`` for a fresh run.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: ModelConfig,
        corpus: Corpus,
        device: torch.device,
        *,
        layout: Layout = ONE,
        checkpoints: Checkpoints | None = None,
        history: str = "",
    ) -> None:
        torch.manual_seed(config.seed)
        torch.use_deterministic_algorithms(config.deterministic)
        self.config, self.corpus, self.device, self.ranks = config, corpus, device, current_ranks()
        output = Path(config.output_dir)
        self.parallel = build_parallel_model(model_config, layout, device)
        self.model = self.parallel.model
        self.optimizer = make_optimizer(self.model, config, orthogonalise=self.parallel.orthogonalise)
        self.step = TrainingStep(self.model, self.optimizer, config, device, parallel=self.parallel)
        options = LoaderOptions(
            model_config.max_seq_length,
            self.step.parts.batch_size,
            config.seed,
            num_workers=config.num_workers,
            pin_memory=device.type == "cuda",
            eot_id=corpus.tokenizer.eot_id if config.mask_documents else None,
            shuffle_buffer=config.shuffle_buffer,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
        )
        self.batches = corpus.train.loader(options)
        self.held_out = self._held_out_sequences()
        self._check_sample_prompt()
        self.metrics = MetricsLog(output if self.ranks.is_main else None, state=history)
        self.step.spikes = SpikeWatch(self.metrics.losses_and_norms())
        self.counters = Counters()
        self.products = default_choice(device)
        self._first_step = 0  # of this process
        self.checkpoints = checkpoints or Checkpoints(output / "checkpoints")
        self.hang_watch = HangWatch(output / "logs", config.timeout)
        self.extras = Extras()

    # ---- the loop -------------------------------------------------------------------------------

    def train(self, loggers: Loggers | None = None, *, stop_after: int = 0) -> int:
        """Trains to the end of the schedule or until a signal; returns the exit code (0, 129, 130 or 143).

        Args:
            loggers: hear of every step too.
            stop_after: the step after which to save and end; 0 = the last one.

        Raises:
            RunError: the loss stayed non-finite, or the disk is full.
        """
        config, counters, last = self.config, self.counters, stop_after or math.inf
        self._first_step = counters.step
        began = time.monotonic() - counters.seconds
        batches = iter(self.batches)
        with StopSignals() as signals, self._display() as display, self.hang_watch as hang_watch:
            while not self.finished() and signals.stop is None and counters.step < last:
                sampled = int(self._progress() * config.samples)
                values = self._train_step(batches)
                with self.extras.attempt("writing the metrics"):
                    self.metrics.record(counters.step, values)
                counters.seconds = self.ranks.max([time.monotonic() - began])[0]
                hang_watch.alive()
                if config.async_checkpoints:
                    self.checkpoints.raise_failure()
                if self._validates() and counters.step % config.eval_interval == 0 and not self.finished():
                    values |= self._validate()
                self._show(values, display, loggers)
                if counters.skipped_in_a_row >= config.max_skipped_steps:
                    self._give_up()
                signals.look()
                if self.finished() or signals.stop is not None:
                    continue
                if int(self._progress() * config.samples) > sampled:
                    self._show_sample(display)
                if signals.save or (config.save_interval and counters.step % config.save_interval == 0):
                    signals.save = False
                    self.save()
            if self._validates() and self.finished() and signals.stop is None:
                self._show(self._validate(), display, loggers)
            self.save(final=self.finished())
            self.checkpoints.finish()
        self.metrics.close()
        return 0 if signals.stop is None else 128 + signals.stop

    def _train_step(self, batches: Iterator[Batch]) -> dict[str, Any]:
        """One optimizer step, skipped when anything in it is not finite, or as a spike; returns its metrics."""
        config, counters, model = self.config, self.counters, self.model
        started = time.monotonic()
        micro_batches = self._read(lambda: list(islice(batches, self.step.parts.passes)))
        warmup, decay, progress = config.warmup_steps, config.decay_fraction, self._progress()
        factor = lr_factor(config.schedule, counters.step, progress, warmup_steps=warmup, decay_fraction=decay)
        self.optimizer.set_lr_factor(factor)
        seen = self.step(iter(micro_batches))
        largest = [max(heads) for heads in seen.max_logits]
        tau = config.qk_clip_tau
        near = config.qk_clip_meter == "exact" and 0 < tau / 2 < max(largest)
        model.exact_logits = self.optimizer.needs_exact_logits or near
        counters.step += 1
        counters.tokens += seen.tokens
        counters.skipped += seen.skipped
        counters.skipped_in_a_row = 0 if seen.finite else counters.skipped_in_a_row + 1
        return {
            "train_ce_loss": seen.cross_entropy if seen.finite else None,
            "train_aux_loss": seen.balance_loss if seen.finite else None,
            "learning_rate": self.optimizer.lr,
            "grad_norm": seen.grad_norm,
            "tokens": counters.tokens,
            "tokens_per_second": seen.tokens / (time.monotonic() - started),
            "max_logit": largest,
            "clipped_heads": 0 if seen.skipped else sum(x > tau > 0 for heads in seen.max_logits for x in heads),
            "clipped_gradient": int(seen.finite and seen.grad_norm > config.max_grad_norm > 0),
            "spike": int(seen.spike),
            "non_finite": int(not seen.finite),
            "skipped": int(seen.skipped),
            "expert_load": [[n / max(1.0, sum(layer)) for n in layer] for layer in seen.expert_counts],
        }

    def _read(self, read: Callable[[], Read]) -> Read:
        """What ``read`` takes from the data; where it fails, the run is saved as it is before it, and ends."""
        position = self.batches.mark()
        return read_or_save(read, lambda: self._save_at(position), self.ranks)

    def _save_at(self, position: Callable[[], dict[str, Any]]) -> str:
        """Saves the run as it was at ``position`` in the data, unless it has made no step; says so."""
        if self.counters.step == self._first_step:
            return ""
        self.save(position=position)
        self.checkpoints.finish()
        return (
            f"; the run is saved as it was after step {self.counters.step}: mend the data, and go on with --resume "
            "(and --override data_path, if a file has changed)"
        )

    def _give_up(self) -> None:
        """Ends a run whose loss stays non-finite; nothing is saved over the last good checkpoint."""
        self.checkpoints.finish()
        self._write_history()
        stopped = f"the loss was not finite in {self.counters.skipped_in_a_row} steps in a row: stopped; "
        lower = " a lower --learning_rate and --adam_lr"
        if not self.checkpoints.candidates():
            raise RunError(f"{stopped}no checkpoint yet: start again with{lower}")
        raise RunError(
            f"{stopped}the last good checkpoint is intact: --resume it with{lower} (--override learning_rate,adam_lr)"
        )

    def _validate(self) -> dict[str, Any]:
        """Evaluates, records, keeps the best checkpoint; returns what it measured."""
        assert self.held_out is not None
        self._read(self.held_out.tokens.require_whole)
        measured = evaluate(
            self.model,
            self.held_out,
            self.corpus.tokenizer,
            batch_size=self.config.batch_size,
            max_tokens=self.config.val_tokens,
            precision=self.step.autocast(),
            mask_documents=self.config.mask_documents,
        )
        with self.extras.attempt("writing the metrics"):
            self.metrics.record_validation(self.counters.step, measured.loss, measured.bits_per_byte)
        if measured.loss < self.counters.best_loss:
            self.counters.best_loss = measured.loss
            self.save("best.pt")
        return {"val_loss": measured.loss, "val_bits_per_byte": measured.bits_per_byte}

    def _show(self, values: dict[str, Any], display: ProgressDisplay, loggers: Loggers | None) -> None:
        with self.extras.attempt("showing the step"):
            display.step(self.counters.step, values)
        if loggers is not None and loggers.open:
            loggers.log(self.counters.step, values)

    # ---- helpers --------------------------------------------------------------------------------

    def _progress(self) -> float:
        """Share of the run that is over, by steps or by time, whichever is further."""
        config, counters = self.config, self.counters
        by_time = counters.seconds / config.max_seconds if config.max_seconds else 0.0
        return min(1.0, max(counters.step / config.max_steps, by_time))

    def _validates(self) -> bool:
        return self.held_out is not None and self.config.eval_interval > 0

    def finished(self) -> bool:
        """Whether the schedule is over."""
        return self._progress() >= 1.0

    def _display(self) -> ProgressDisplay:
        config, counters = self.config, self.counters
        return ProgressDisplay(
            config.max_steps,
            counters.step,
            interval=config.eval_interval or 25,
            max_seconds=config.max_seconds,
            spent_seconds=counters.seconds,
            silent=not self.ranks.is_main,
        )

    def _show_sample(self, display: ProgressDisplay) -> None:
        """Shows what the model writes, with a heading. All ranks call it, and the main one shows it."""
        config, model = self.config, self._whole_model()
        if model is None:
            return
        tokenizer, prompt = self.corpus.tokenizer, config.sample_prompt
        with self.extras.attempt("writing a sample"):
            text = generate(model, tokenizer, prompt, max_tokens=SAMPLE_TOKENS, temperature=0.8, seed=config.seed)
            display.log(printable(f"--- sample at step {self.counters.step} ---\n{prompt}{text}\n---"))

    def _whole_model(self) -> Transformer | None:
        """A model that generates, on the main rank; of a sharded model a copy. All ranks call it."""
        if self.parallel.layout.mode != "fsdp":
            return self.model if self.ranks.is_main else None
        weights = self.parallel.full_tensors(self.model.state_dict())
        return build_model(Path("the model in training"), self.model.config, weights) if self.ranks.is_main else None

    def _check_sample_prompt(self) -> None:
        length = len(self.corpus.tokenizer.encode(self.config.sample_prompt)) if self.config.samples else 0
        if length > self.model.config.max_seq_length:
            raise UserError(
                f"--sample_prompt has {length} tokens and the context holds {self.model.config.max_seq_length}: "
                "shorten it"
            )

    def _held_out_sequences(self) -> PackedSequences | None:
        """The held-out text in sequences of the context, or of its own length where it is shorter."""
        if self.corpus.val is None:
            return None
        tokens = self.corpus.val
        return PackedSequences(tokens, min(self.model.config.max_seq_length, max(1, len(tokens) - 1)))

    # ---- checkpoints ----------------------------------------------------------------------------

    def save(
        self,
        name: str = "latest.pt",
        *,
        final: bool = False,
        position: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        """Writes all that a resume or an inference needs; what was ``latest.pt`` becomes ``previous.pt``.

        Args:
            position: where in the data the run goes on, if that is not where the loader is.
        """
        state = self.state_dict(position)
        self.checkpoints.save(name, self.counters.step, state, self.parallel, self.optimizer, final=final)
        if name == "latest.pt":
            self._write_history()

    def _write_history(self) -> None:
        if not self.ranks.is_main:
            return
        with self.extras.attempt("writing the metrics"):
            history = self.metrics.write_json()
            with self.extras.attempt("drawing the metrics"), matplotlib_without_screen():
                from nanokimi.training.plots import plot_training

                path = self.metrics.json_path.with_suffix(".png")
                title = self.config.init_from or self.config.preset
                plot_training(history, path, tau=self.config.qk_clip_tau, title=title)

    def multiply_by(self, choice: Choice) -> None:
        """Has this process and the optimizer multiply so on a CPU, from the next step on."""
        multiply_fp32_by(choice.library)
        self.optimizer.ns_dtype, self.products = choice.torch_dtype, choice

    def state_dict(self, position: Callable[[], dict[str, Any]] | None = None) -> dict[str, Any]:
        """The run as plain data, but for weights and optimizer state; the same on all ranks."""
        own_position = (position or self.batches.state_dict)()
        positions = [from_bytes(own) for own in self.ranks.gather(to_bytes(own_position))]
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {
            "model_config": asdict(self.model.config),
            "train_config": asdict(self.config),
            "tokenizer": self.corpus.tokenizer.to_state(),
            "counters": asdict(self.counters),
            "data": {"sha256": self.corpus.train.identity, **merge_states(positions)},
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "exact_logits": self.model.exact_logits,
            "newton_schulz": str(self.optimizer.ns_dtype or "").removeprefix("torch."),
            "fp32_products": fp32_library(),
            "history": self.metrics.state(),
        }

    def load_state(self, saved: SavedRun, *, override: frozenset[str] = frozenset()) -> None:
        """Continues where ``saved`` was written; ``override`` names the fields that may differ.

        Raises:
            CheckpointError: weights or optimizer state do not fit.
            UserError: the text or its order is another one.
        """
        path, content = saved
        require(path, content, "counters", "data", "random", "exact_logits")
        moved = bool(override & TEXT_FIELDS)
        if content["data"]["sha256"] != self.corpus.train.identity and not moved:
            raise UserError(
                f"{path} was trained on another text than the settings give now: restore it, or --override data_path"
            )
        self.checkpoints.load_state(saved, self.parallel, self.optimizer)
        self.counters = Counters(**content["counters"])
        if moved:
            self.batches.go_near(content["data"])
        else:
            self.batches.load_state_dict(content["data"])
        self.model.exact_logits = content["exact_logits"] or self.optimizer.needs_exact_logits
        if self.device.type == "cpu":  # whatever is faster here by now
            dtype = content.get("newton_schulz") or default_choice(self.device).dtype
            self.multiply_by(Choice(dtype, content.get("fp32_products", "onednn")))
        torch.set_rng_state(content["random"]["cpu"])
        cuda = content["random"]["cuda"]
        if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():  # of these devices, not of others
            torch.cuda.set_rng_state_all(cuda)
