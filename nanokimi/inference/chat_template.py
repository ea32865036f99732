"""Turns messages into tokens with a chat template.

Templates are those of transformers' ``apply_chat_template``, and render as they do there. One thing differs: the text
of a message stays text, also where it is written like a special token (``_Guard``). Templates are programs that come
with a model, so they run in a sandbox, in which they reach no files and no Python and cannot run for ever.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NoReturn, TypedDict

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanokimi.console import printable
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError

NO_TEMPLATE = "none"
NEVER = "(?!)"  # a regular expression that matches nothing
MAX_TEXT = 1_000_000  # characters, or items of a list
MAX_STEPS = 200_000  # iterations of all loops and calls of all functions
MAX_POWER = 10_000  # bits of a power's result
_BUDGET = "steps left"  # a template cannot say a name with a space

Role = Literal["system", "user", "assistant"]
# By the first characters of special tokens, and of marks: the characters that take their places.
_StandIns = tuple[dict[str, str], dict[str, str]]


class Message(TypedDict):
    """One contribution to a talk."""

    role: Role
    content: str


class ChatTemplate:
    """How messages become one text for a model that has learned to talk in turns.

    Args:
        source: the template, in Jinja.
        name: what messages to the user call it.

    Attributes:
        stop_tokens: end of text, and the special token that ends the assistant's turn, where there is one.
        stop: where plain text ends the assistant's turn: that text.

    Raises:
        UserError: it is not Jinja, or does not show what a user writes.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, *, name: str = "the chat template") -> None:
        self.name, self._tokenizer = name, tokenizer
        self._guard = _Guard(tokenizer, source)
        try:
            self._template = _Environment().from_string(source)
        except Exception as error:  # Jinja's own, and those of Python, to which it compiles
            raise UserError(f"{name} is no Jinja template: {_one_line(error)}") from error
        if "Hello?" not in self._render([{"role": "user", "content": "Hello?"}]):
            raise UserError(f"{name} leaves out what the user writes: is it a chat template?")
        self.stop_tokens, self.stop = self._end_of_turn()

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of ``messages`` up to where the assistant begins to write.

        Equal to those of transformers' ``apply_chat_template(messages, add_generation_prompt=True)``, unless the text
        of a message holds what is written like a special token: that stays text here.

        Raises:
            UserError: the template refuses the messages, makes too much of them, or one is not Unicode text.
        """
        guarded, stand_ins = self._guard.guarded(messages)
        text = self._render(guarded)
        try:
            return self._guard.encode(text, stand_ins) or [self._tokenizer.eot_id]
        except UnicodeEncodeError:
            raise UserError("a message is not valid Unicode text: it holds half of a surrogate pair") from None

    def _render(self, messages: Sequence[Message], *, prompt: bool = True) -> str:
        """The text that the template makes of ``messages``; ``prompt``: up to where the assistant begins to write."""
        values = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": prompt,
            "bos_token": self._tokenizer.bos,
            "eos_token": self._tokenizer.eot,
            _BUDGET: iter(range(MAX_STEPS)),
        }
        most = MAX_TEXT + 4 * sum(len(message["content"]) for message in messages)
        text = ""
        try:
            for part in self._template.generate(values):
                text += part
                if len(text) > most:
                    raise SecurityError(f"it writes more than {MAX_TEXT:,} characters")
        except Exception as error:  # a template can raise anything, as any program can
            raise UserError(f"{self.name} cannot be applied to these messages: {_one_line(error)}") from error
        return text

    def _end_of_turn(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """What ends a reply, found in a talk: what stands between the assistant's text and the user's next one."""
        question, answer, thanks = "Who is there?", "Nobody at all.", "So be it."
        talk: list[Message] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            text = self._render([*talk, {"role": "user", "content": thanks}], prompt=False)
        except UserError:  # a template for one question alone
            text = ""
        between = text.partition(answer)[2].partition(thanks)[0]
        if token := self._guard.any_token.search(between):
            return tuple(dict.fromkeys((self._tokenizer.eot_id, self._guard.tokens[token[0]]))), ()
        # A model may join the last space with the word after it.
        end = between.rstrip() or between
        return (self._tokenizer.eot_id,), (end,) if end else ()


class _Guard:
    """Keeps the text of messages apart from the special tokens that the template writes.

    Where a message's text reads like a special token, a stand-in takes the place of its first character while the
    template runs: one character that no message holds, so that a template may trim and split as before. The same goes
    for marks, unless the assistant wrote them: tokens that are not special and that the template writes (DeepSeek-V3).
    """

    def __init__(self, tokenizer: Tokenizer, source: str) -> None:
        self._tokenizer, self._source = tokenizer, source
        self._special = tokenizer.special_tokens
        self._marks = {t: i for t, i in tokenizer.fixed_tokens.items() if t in source and len(t) > 1}
        self.tokens = self._special | self._marks
        self.any_token = re.compile(_any_of(self.tokens))
        self._special_text = re.compile(f"({_any_of(self._special)})")
        self._special_start, self._mark_start = (
            re.compile(f"(?={_any_of(texts)}).", re.DOTALL) for texts in (self._special, self._marks)
        )

    def guarded(self, messages: Sequence[Message]) -> tuple[list[Message], _StandIns]:
        """``messages`` with stand-ins where their text reads like a token: characters that nothing else holds."""
        taken = {*self._source}.union(*(message["content"] for message in messages))
        unused = (chr(code) for code in range(sys.maxunicode, 0, -1) if chr(code) not in taken)
        special = {first: next(unused) for first in _firsts(self._special)}
        marks = {first: next(unused) for first in _firsts(self._marks)}
        guarded: list[Message] = []
        for message in messages:
            content = self._special_start.sub(lambda start: special[start[0]], message["content"])
            if message["role"] != "assistant":
                content = self._mark_start.sub(lambda start: marks[start[0]], content)
            guarded.append({**message, "content": content})
        return guarded, (special, marks)

    def encode(self, text: str, stand_ins: _StandIns) -> list[int]:
        """Ids of ``text``, where special tokens are single ids and stand-ins become the text again."""
        restored = {ord(new): first for firsts in stand_ins for first, new in firsts.items()}
        # The tokenizer finds marks in any text: only a cut after the first character keeps it from that.
        marks = "".join(stand_ins[1].values())
        cut = re.compile(f"(?<=[{marks}])" if marks else NEVER)
        ids: list[int] = []
        for part in self._special_text.split(text):
            if part in self._special:
                ids.append(self._special[part])
            else:
                for plain in cut.split(part):
                    ids += self._tokenizer.encode(plain.translate(restored))
        return ids


def chat_template_of(tokenizer: Tokenizer, path: str = "") -> ChatTemplate | None:
    """The chat template in the file ``path``, else the tokenizer's own, else None; ``none`` is none at all.

    Raises:
        UserError: the file cannot be read, or see ``ChatTemplate``.
    """
    if path == NO_TEMPLATE:
        return None
    if not path:
        own = tokenizer.chat_template
        return ChatTemplate(own, tokenizer, name=f"the chat template of tokenizer {tokenizer.name}") if own else None
    try:
        source = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(
            f"--chat_template {path}: {reason}: name a file with a Jinja template, or {NO_TEMPLATE}"
        ) from error
    return ChatTemplate(source, tokenizer, name=f"--chat_template {path}")


def _firsts(texts: Iterable[str]) -> list[str]:
    return sorted({text[0] for text in texts})


def _any_of(texts: Iterable[str]) -> str:
    """A regular expression for any of ``texts``, the longest that there is."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or NEVER


def _one_line(error: BaseException) -> str:
    return printable(" ".join(str(error).split()))[:300] or type(error).__name__


# ---- the sandbox ------------------------------------------------------------------------------------


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up; it counts the steps of loops and calls, and refuses products out of bounds."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters |= {"tojson": _to_json, "counted": _counted}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _count_step(__context)
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


def _count_step(context: Context) -> None:
    if next(context.resolve(_BUDGET), None) is None:
        raise SecurityError(f"it takes more than {MAX_STEPS:,} steps")


@pass_context
def _counted(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _count_step(context)
        yield value


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
