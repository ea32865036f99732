"""The results of an evaluation: a table for people, a JSON file for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanokimi.console import show
from nanokimi.files import atomic_write, disk_errors_explained, require_writable

HEADER = ("of", "figure", "value", "stderr", "over")


class Figure(NamedTuple):
    """One line of the table: ``name`` of ``what``, worked out over "120 questions" or the like."""

    what: str
    name: str
    value: float | None
    stderr: float | None = None
    over: str = ""


class Report:
    """What was found so far.

    Attributes:
        results: plain values for the JSON file.

    Args:
        output: the JSON file; "" for none.

    Raises:
        UserError: ``output`` cannot be written; known now, before the work.
    """

    def __init__(self, output: str) -> None:
        self.output = Path(output) if output else None
        self.figures: list[Figure] = []
        self.results: dict[str, Any] = {"complete": False, "texts": [], "files": [], "harness": {}}
        if self.output is not None:
            require_writable(self.output, example="eval.json")

    def publish(self) -> None:
        """Prints the table and writes the file, unless nothing was found.

        Raises:
            RunError: the file cannot be written.
        """
        if not self.figures:
            return
        show("\n".join(table(self.figures)))
        if self.output is not None:
            with disk_errors_explained("results file", self.output), atomic_write(self.output) as file:
                file.write(json.dumps(_plain(self.results), indent=1, allow_nan=False).encode())


def table(figures: Sequence[Figure]) -> Iterator[str]:
    """The lines of the table, a header first."""
    rows = [HEADER, *((f.what, f.name, _number(f.value), _number(f.stderr), f.over) for f in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for what, name, value, stderr, over in rows:
        yield (
            f"{what:<{widths[0]}}  {name:<{widths[1]}}  {value:>{widths[2]}}  {stderr:>{widths[3]}}  {over}".rstrip()
        )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _plain(value: Any) -> Any:
    """``value`` in what JSON has: null for NaN and infinity, text for what is no value (functions of a task, say)."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else str(value)
