"""The run's history: an append-only ``.jsonl`` while it trains, parallel lists in ``.json`` for everyone else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from nanokimi.errors import RunError
from nanokimi.files import atomic_write

History = dict[str, list[Any]]

STEP_COLUMNS = (
    "train_loss", "train_ce_loss", "train_aux_loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second",
    "max_logit", "clipped_heads", "expert_load",
)  # fmt: skip
VALIDATION_COLUMNS = ("val_loss", "val_bits_per_byte")


class MetricsLog:
    """History of one run, kept as the lines of ``logs/training_metrics.jsonl``.

    The lines are the only representation: appended to the file, handed to the checkpoint as one string, parsed
    when someone wants lists. So a step costs one line however long the run is. A history that already stands in the
    folder and that ``state`` does not continue is kept as ``training_metrics.jsonl.1`` (``.2``, ...).

    Args:
        folder: the run's output folder; ``logs/`` is made in it. None writes nothing: for ranks that do not lead.
        state: what ``state()`` returned, to continue that history; ``""`` begins a fresh one.

    Raises:
        RunError: the log cannot be written.
    """

    def __init__(self, folder: Path | None, *, state: str = "") -> None:
        self._lines = state.splitlines(keepends=True)
        self._file: TextIO | None = None
        if folder is not None:
            self._open(folder, state)

    def _open(self, folder: Path, state: str) -> None:
        self.jsonl_path = folder / "logs" / "training_metrics.jsonl"
        self.json_path = folder / "logs" / "training_metrics.json"
        try:
            self.jsonl_path.parent.mkdir(parents=True, exist_ok=True)
            _keep_unrelated(self.jsonl_path, state)
            with atomic_write(self.jsonl_path) as file:
                file.write(state.encode())
            self._file = self.jsonl_path.open("a", encoding="utf-8", newline="\n", buffering=1)
        except OSError as error:
            raise cannot_write(self.jsonl_path, error) from error

    def record(self, step: int, values: Mapping[str, object]) -> None:
        """Appends one optimizer step; NaN and infinity become null, as does what ``values`` leaves out.

        Args:
            step: optimizer steps done, this one included.
            values: ``train_ce_loss``, ``train_aux_loss`` (nats per token), ``learning_rate``, ``grad_norm``,
                ``tokens`` (seen so far), ``tokens_per_second``, ``max_logit`` (one per layer, largest over heads),
                ``clipped_heads``, ``expert_load`` (per MoE layer, E shares that sum to 1).

        Raises:
            ValueError: ``values`` holds another name; ``train_loss`` is worked out here.
            RunError: the log cannot be written.
        """
        if unknown := values.keys() - set(STEP_COLUMNS[1:]):
            raise ValueError(f"not columns of the history: {', '.join(sorted(unknown))}")
        ce, aux = values.get("train_ce_loss"), values.get("train_aux_loss")
        total = ce + aux if isinstance(ce, (int, float)) and isinstance(aux, (int, float)) else None
        self._append({"step": step, "train_loss": total} | {name: values.get(name) for name in STEP_COLUMNS[1:]})

    def record_validation(self, step: int, loss: float, bits_per_byte: float) -> None:
        """Appends one evaluation on held-out text, made after ``step`` optimizer steps; loss in nats per token."""
        self._append({"val_step": step, "val_loss": loss, "val_bits_per_byte": bits_per_byte})

    def history(self) -> History:
        """Parallel lists: ``steps`` with ``STEP_COLUMNS``, ``val_steps`` with ``VALIDATION_COLUMNS``."""
        records = [json.loads(line) for line in self._lines]
        steps = [record for record in records if "step" in record]
        validations = [record for record in records if "val_step" in record]
        return {
            "steps": [record["step"] for record in steps],
            **{name: [record[name] for record in steps] for name in STEP_COLUMNS},
            "val_steps": [record["val_step"] for record in validations],
            **{name: [record[name] for record in validations] for name in VALIDATION_COLUMNS},
        }

    def write_json(self) -> History:
        """Writes ``history()`` to ``logs/training_metrics.json``; the work grows with the run, so not every step.

        Returns:
            the history that was written.

        Raises:
            RunError: the file cannot be written.
        """
        history = self.history()
        try:
            with atomic_write(self.json_path) as file:
                file.write(json.dumps(history, allow_nan=False).encode())
        except OSError as error:
            raise cannot_write(self.json_path, error) from error
        return history

    def state(self) -> str:
        """The history for the checkpoint: a single string, because ``weights_only`` loading of numbers is slow."""
        return "".join(self._lines)

    def close(self) -> None:
        """Closes the ``.jsonl``; every line is already in it."""
        if self._file is not None:
            self._file.close()

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(_finite(record), allow_nan=False) + "\n"
        try:
            if self._file is not None:
                self._file.write(line)
        except OSError as error:
            raise cannot_write(self.jsonl_path, error) from error
        self._lines.append(line)


def _finite(value: Any) -> Any:
    """``value`` with None in the place of every NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _keep_unrelated(path: Path, state: str) -> None:
    """Renames the file at ``path`` to a free ``path.N`` unless it is the history that ``state`` is the start of."""
    if not path.exists() or path.stat().st_size == 0 or (state and path.read_bytes().startswith(state.encode())):
        return
    number = 1
    while (kept := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(kept)


def cannot_write(path: Path, error: OSError) -> RunError:
    """The one line for a log or plot that the disk refuses."""
    return RunError(f"cannot write {path}: {error.strerror or error}; make room or choose another --output_dir")
