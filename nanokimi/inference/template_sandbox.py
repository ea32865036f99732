"""Jinja as transformers sets it up for chat templates, in which no template runs foreign code or takes for ever."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from types import SimpleNamespace
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEXT = 1_000_000  # characters, or items of a list
MAX_STEPS = 200_000  # turns of all loops and calls of all functions
MAX_POWER = 10_000  # bits of a power's result
_BUDGET = "steps left"  # no name that a template can say


class Template:
    """A Jinja template.

    Raises:
        ValueError: ``source`` is none, with what is wrong in one line or several.
    """

    def __init__(self, source: str) -> None:
        try:
            self._compiled = _Environment().from_string(source)
        except Exception as error:  # beside Jinja's own, those of Python, to which it compiles
            raise ValueError(str(error) or type(error).__name__) from error

    def render(self, values: Mapping[str, Any], *, room: int = 0) -> str:
        """The text that it makes of ``values``, of at most ``MAX_TEXT`` and ``room`` characters.

        Raises:
            ValueError: it cannot, with the reason, which may be the template's own.
        """
        left = MAX_TEXT + room
        parts = []
        try:
            for part in self._compiled.generate({**values, _BUDGET: SimpleNamespace(steps=MAX_STEPS)}):
                parts.append(part)
                left -= len(part)
                if left < 0:
                    raise SecurityError(f"it writes more than {MAX_TEXT:,} characters")
        except Exception as error:  # a template can raise anything, as any program can
            raise ValueError(str(error) or type(error).__name__) from error
        return "".join(parts)


class _Environment(ImmutableSandboxedEnvironment):
    """Counts the steps of loops and calls, and refuses products out of bounds."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters |= {"tojson": _to_json, "counted": _counted}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "range": _range}

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _spend(__context, 1)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers and left.bit_length() * right > MAX_POWER:
            raise SecurityError("it computes too large a power")
        for times, value in ((left, right), (right, left)):
            if isinstance(times, int) and hasattr(value, "__len__") and times * len(value) > MAX_TEXT:
                raise SecurityError(f"it repeats something to more than {MAX_TEXT:,} parts")
        return super().call_binop(context, operator, left, right)

    def _generate(self, source: nodes.Template, *args: Any, **named: Any) -> str:
        for loop in source.find_all(nodes.For):
            if loop.recursive:
                raise TemplateSyntaxError("loops marked as recursive are not supported", loop.lineno)
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        return super()._generate(source, *args, **named)


class _Generation(Extension):
    """``{% generation %}`` marks what a model is trained on; here its contents are all that counts."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _spend(context: Context, steps: int) -> None:
    budget: Any = context.resolve(_BUDGET)
    budget.steps -= steps
    if budget.steps < 0:
        raise SecurityError(f"it takes more than {MAX_STEPS:,} steps")


@pass_context
def _counted(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _spend(context, 1)
        yield value


@pass_context
def _range(context: Context, *bounds: int) -> range:
    numbers = range(*bounds)
    _spend(context, min(len(numbers), MAX_STEPS + 1))
    return numbers


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without HTML's escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
