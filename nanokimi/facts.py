"""What is known about a field of a config, and the check that its value agrees."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field, fields
from typing import Any

from nanokimi.errors import ConfigError


@dataclass(frozen=True)
class Facts:
    """What is known about a field beside its name, type and default; ``field_names`` finds fields by it.

    Attributes:
        help: one line for ``--help``.
        choices: the only values that are allowed; empty allows all.
        group: heading in ``--help`` (TrainConfig).
        resume: what a resume may do with it: change it without being asked (``free``); change it with ``--override``
            (``fixed``); ``never`` change it. ``local`` fields are free, and never taken from a checkpoint: they belong
            to this machine and these processes.
        used_by: commands other than ``train`` that have a flag for it.
        decides_text: whether it decides which text is read, and in which order.
        shapes_weights: whether it decides how many weights there are, and their shapes.
        is_path: whether it names files, in which ``~`` is the user's home.
        low, above, high, below: limits of a number: at least, more than, at most, less than.
    """

    help: str
    choices: tuple[str, ...] = ()
    group: str = ""
    resume: str = "fixed"
    used_by: tuple[str, ...] = ()
    decides_text: bool = False
    shapes_weights: bool = False
    is_path: bool = False
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None


def setting(default: Any, about: str, **facts: Any) -> Any:
    """A dataclass field with its ``Facts`` as metadata."""
    return field(default=default, metadata=vars(Facts(about, **facts)))


KINDS = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false"}
_ACCEPTED: dict[str, Any] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
_LIMITS = {
    "low": (operator.ge, "{} or more"),
    "above": (operator.gt, "more than {}"),
    "high": (operator.le, "{} or less"),
    "below": (operator.lt, "less than {}"),
}


def check_fields(config: Any, flag: str = "") -> None:
    """Raises ConfigError for the first field of a wrong type, out of its choices or beyond its limits.

    Args:
        flag: what stands before a field's name where the user wrote it.
    """
    for f in fields(config):
        value, kind, choices = getattr(config, f.name), str(f.type), f.metadata["choices"]
        if not isinstance(value, _ACCEPTED[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise ConfigError(f"{flag}{f.name} takes {KINDS[kind]}, got {value!r}")
        if choices and value not in choices:
            raise ConfigError(f"{flag}{f.name} is {value!r}: choose one of {', '.join(choices)}")
        limits = {name: f.metadata[name] for name in _LIMITS if f.metadata[name] is not None}
        finite = not limits or -math.inf < value < math.inf
        if not finite or not all(_LIMITS[name][0](value, limit) for name, limit in limits.items()):
            words = [_LIMITS[name][1].format(limit) for name, limit in limits.items()]
            words += [] if finite else ["finite"]
            raise ConfigError(f"{flag}{f.name} must be {' and '.join(words)}, got {value}")
