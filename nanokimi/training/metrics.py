"""What a run tells about itself at every step: its history in ``logs/``, and a live bar or plain lines on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from nanokimi.console import log, one_line
from nanokimi.errors import RunError
from nanokimi.files import atomic_write, put_aside

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

History = dict[str, list[Any]]

LOSSES = ("train_loss", "train_ce_loss", "train_aux_loss")
READINGS = ("learning_rate", "grad_norm", "tokens", "tokens_per_second", "max_logit", "clipped_heads", "expert_load")
FLAGS = ("clipped_gradient", "spike", "non_finite", "skipped")
STEP_COLUMNS = (*LOSSES, *READINGS, *FLAGS)
VALIDATION_COLUMNS = ("val_loss", "val_bits_per_byte")


# ---- the history on disk ------------------------------------------------------------------------


class MetricsLog:
    """History of one run, kept as the lines of ``logs/training_metrics.jsonl``.

    The lines are the only representation: appended to the file, handed to the checkpoint as one string, parsed
    when someone wants lists. So a step costs one line however long the run is. A history that already stands in the
    folder and that ``state`` does not continue is kept as ``training_metrics.jsonl.1`` (``.2``, ...).

    Args:
        folder: the run's output folder; ``logs/`` is made in it. None writes nothing: for all but the main process.
        state: what ``state()`` returned, to continue that history; ``""`` begins a fresh one.

    Raises:
        RunError: the log cannot be written.
    """

    def __init__(self, folder: Path | None, *, state: str = "") -> None:
        self._lines = state.splitlines(keepends=True)
        self._file: TextIO | None = None
        if folder is None:
            return
        self.jsonl_path = folder / "logs" / "training_metrics.jsonl"
        self.json_path = self.jsonl_path.with_suffix(".json")
        with log_errors_explained(self.jsonl_path):
            _keep_unrelated(self.jsonl_path, state)
            self._begin_file()

    def record(self, step: int, values: Mapping[str, object]) -> None:
        """Appends one optimizer step; NaN and infinity become null, as does what ``values`` leaves out.

        Args:
            step: optimizer steps done, this one included.
            values: ``train_ce_loss``, ``train_aux_loss`` (nats per token), ``learning_rate``, ``grad_norm``,
                ``tokens`` (seen so far), ``tokens_per_second``, ``max_logit`` (one per layer, largest over heads),
                ``clipped_heads``, ``expert_load`` (per MoE layer, E shares that sum to 1); and as 0 or 1, whether it
                had a ``clipped_gradient``, was a ``spike`` or ``non_finite``, and was ``skipped``.

        Raises:
            ValueError: ``values`` holds another name; ``train_loss`` is worked out here.
            RunError: the line cannot be written; it is in the history, and ``write_json`` writes it again.
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
        """Parallel lists: ``steps`` with ``STEP_COLUMNS``, ``val_steps`` with ``VALIDATION_COLUMNS``.

        A column that is missing in a line, because an older version wrote it, is None there.
        """
        records = [json.loads(line) for line in self._lines]
        history: History = {}
        for step, names in (("step", STEP_COLUMNS), ("val_step", VALIDATION_COLUMNS)):
            rows = [record for record in records if step in record]
            history[f"{step}s"] = [row[step] for row in rows]
            history |= {name: [row.get(name) for row in rows] for name in names}
        return history

    def losses_and_norms(self) -> Iterator[tuple[float | None, float | None]]:
        """Cross-entropy and gradient norm of every step; JSON gives a number back to the bit."""
        history = self.history()
        return zip(history["train_ce_loss"], history["grad_norm"], strict=True)

    def write_json(self) -> History:
        """Writes ``history()`` to ``logs/training_metrics.json``; the work grows with the run, so not every step.

        If the ``.jsonl`` is incomplete, or gone, it is written anew.

        Returns:
            the history that was written.

        Raises:
            RunError: the file cannot be written.
        """
        history = self.history()
        if self._file is None or not self.jsonl_path.exists():
            with log_errors_explained(self.jsonl_path):
                self._begin_file()
        with log_errors_explained(self.json_path), atomic_write(self.json_path) as file:
            file.write(json.dumps(history, allow_nan=False).encode())
        return history

    def state(self) -> str:
        """The history for the checkpoint: a single string, because ``weights_only`` loading of numbers is slow."""
        return "".join(self._lines)

    def close(self) -> None:
        """Closes the ``.jsonl``; every line is already in it."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # of a line that could not be written
                file.close()

    def _begin_file(self) -> None:
        """Writes the lines so far to the ``.jsonl`` and leaves it open for more."""
        self.close()
        self.jsonl_path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.jsonl_path) as file:
            file.write(self.state().encode())
        self._file = self.jsonl_path.open("a", encoding="utf-8", newline="\n", buffering=1)

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(_finite(record), allow_nan=False) + "\n"
        self._lines.append(line)
        if self._file is not None:
            with log_errors_explained(self.jsonl_path):
                try:
                    self._file.write(line)
                except OSError:
                    self.close()  # until there is room again, it would hold half a line
                    raise


def _finite(value: Any) -> Any:
    """``value`` with None in the place of every NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _keep_unrelated(path: Path, state: str) -> None:
    """Puts the file at ``path`` aside unless it is the history that ``state`` is the start of."""
    if path.exists() and path.stat().st_size and not (state and path.read_bytes().startswith(state.encode())):
        put_aside(path)


@contextmanager
def log_errors_explained(path: Path) -> Iterator[None]:
    """Turns an error of the file system into a RunError with the remedy, for a log or plot of a run."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"cannot write {path}: {reason}; make room or choose another --output_dir") from error


# ---- what the user watches ----------------------------------------------------------------------


class Extras:
    """Work that only shows something: the first failure of each kind is told, and none ends what else is going on."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Whatever the block raises costs a line that names ``what``, the first time."""
        try:
            yield
        except Exception as error:
            if what not in self._told:
                self._told.add(what)
                log(f"warning: {what} failed ({one_line(error)}); nothing else is affected")


class ProgressDisplay(AbstractContextManager["ProgressDisplay"]):
    """Shows a training run on stderr; use it as a context manager, so that the terminal is always given back.

    Args:
        max_steps: the step at which the run ends.
        start_step: steps done before this process began (0, or where a resume starts).
        interval: steps between plain lines; 0 shows the first and the last only. The live bar ignores it.
        plain: lines instead of the bar; None asks whether stderr is a terminal.
        max_seconds: time the run may take, 0 for no limit. ETA and bar follow what ends first.
        spent_seconds: time it has taken in earlier processes.
        silent: shows nothing: for all but the main process.
    """

    def __init__(
        self,
        max_steps: int,
        start_step: int,
        *,
        interval: int,
        plain: bool | None = None,
        max_seconds: float = 0,
        spent_seconds: float = 0,
        silent: bool = False,
    ) -> None:
        self.max_steps, self.start_step, self.interval, self.max_seconds = max_steps, start_step, interval, max_seconds
        self._step = self._printed = start_step
        self._values: dict[str, object] = {}
        self._clipped = self._spikes = 0
        self._started = time.monotonic() - spent_seconds
        self._first_step_done: float | None = None
        self._silent = silent
        if plain is None:
            plain = not sys.stderr.isatty() or os.environ.get("TERM") == "dumb"
        self._live = None if plain or silent else self._open_live()

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, step: int, values: Mapping[str, object]) -> None:
        """Takes in one finished step.

        Args:
            step: optimizer steps done, this one included.
            values: as for ``MetricsLog.record``, plus ``val_bits_per_byte`` when there is a new one, which stays
                on show until the next. Clipped heads and spikes are shown as the sum since this process began.
        """
        self._first_step_done = self._first_step_done or time.monotonic()
        self._step = step
        self._values.update(values)
        clipped = values.get("clipped_heads")
        self._clipped += clipped if isinstance(clipped, int) else 0
        self._spikes += bool(values.get("spike"))
        due = step == self.start_step + 1 or (self.interval > 0 and step % self.interval == 0)
        if self._live is None and due and step not in (self._printed, self.max_steps):
            self._print_line()

    def log(self, text: str) -> None:
        """Prints ``text`` on stderr, above the bar where there is one."""
        if self._silent:
            return
        if self._live is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._live.console.print(text, markup=False, highlight=False, emoji=False)

    def close(self) -> None:
        """Shows the last step, with what came after it, and gives the terminal back; may be called twice."""
        if self._live is not None:
            self._live.stop()
        elif self._printed != self._step:
            self._print_line()

    def _print_line(self) -> None:
        self._printed = self._step
        self.log(f"step {self._count()}  {self._facts()}  ETA {clock(self._seconds_left())}")

    def _count(self) -> str:
        """Steps done, and of how many where time is not what ends the run."""
        return f"{self._step:,}" if self.max_seconds else f"{self._step:,}/{self.max_steps:,}"

    def _facts(self) -> str:
        logits = self._values.get("max_logit")
        largest = max((x for x in logits if x is not None), default=None) if isinstance(logits, (list, tuple)) else None
        facts = (
            f"loss {_number(self._values.get('train_ce_loss'), '.3f')}",
            f"bits/byte {_number(self._values.get('val_bits_per_byte'), '.3f')}",
            f"{_number(self._values.get('tokens_per_second'), ',.0f')} tok/s",
            f"max logit {_number(largest, '.1f')}",
            f"heads clipped {self._clipped:,}",
            *[f"spikes {self._spikes:,}"] * bool(self._spikes),
        )
        return "  ".join(facts)

    def _seconds_left(self) -> float | None:
        """Seconds until the last step or the end of the time budget; None while neither is known."""
        now, ends = time.monotonic(), []
        timed_steps = self._step - self.start_step - 1  # not the first one, which compiles and warms caches
        if self._first_step_done is not None and timed_steps > 0:
            ends.append((self.max_steps - self._step) * (now - self._first_step_done) / timed_steps)
        if self.max_seconds:
            ends.append(max(0.0, self.max_seconds - (now - self._started)))
        return 0.0 if self._step >= self.max_steps else min(ends, default=None)

    def _done(self) -> float:
        """Share of the run that is over, by steps or by time, whichever is further."""
        by_time = (time.monotonic() - self._started) / self.max_seconds if self.max_seconds else 0.0
        return min(1.0, max(self._step / self.max_steps, by_time))

    def _open_live(self) -> Live:
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        # Live would send a print() to the console, which is right on a terminal and would empty a redirected stdout.
        live = Live(console=console, get_renderable=self._render, redirect_stdout=sys.stdout.isatty())
        live.start()
        return live

    def _render(self) -> Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        done = self._done()
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(
            Text(f"step {self._count()}", style="bold"),
            ProgressBar(total=1.0, completed=done),
            Text(f"{done:4.0%}  ETA {clock(self._seconds_left())}"),
        )
        return Group(row, Text(self._facts(), no_wrap=True, overflow="ellipsis"))


def clock(seconds: float | None) -> str:
    """Seconds as ``h:mm:ss`` or ``m:ss``; ``-`` while unknown."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else "-"
