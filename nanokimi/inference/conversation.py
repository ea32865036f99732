"""What has been said so far: one growing text, or messages in turns. Each step gives a new one, the old one stays."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.files import atomic_write
from nanokimi.inference.chat_template import ChatTemplate, Message
from nanokimi.inference.generate import encode_prompt

FORMAT, VERSION = "nanokimi-talk", 1
MAX_FILE = 100_000_000  # bytes
NO_SYSTEM = "none"


@dataclass(frozen=True)
class TextTalk:
    """For a base model: a text that you and the model write by turns.

    Attributes:
        turns: each your text with the model's continuation of it; a turn begins a line.
    """

    tokenizer: Tokenizer
    turns: tuple[str, ...] = ()

    mode: ClassVar[str] = "text"
    welcome: ClassVar[str] = "This is a base model: it continues your text, it does not answer questions."
    stop: ClassVar[tuple[str, ...]] = ()

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """What ends a reply: the end of text."""
        return (self.tokenizer.eot_id,)

    @property
    def spare(self) -> int:
        """How many turns may be forgotten: all but the newest."""
        return max(0, len(self.turns) - 1)

    def ids(self) -> list[int]:
        """What the model reads. UserError: it is not Unicode text."""
        return encode_prompt(self.tokenizer, "\n".join(self.turns))

    def asked(self, text: str) -> TextTalk:
        """With ``text`` behind it; without one the model goes on where it stopped."""
        return replace(self, turns=(*self.turns, text)) if text or not self.turns else self

    def answered(self, text: str) -> TextTalk:
        """With the model's ``text`` behind yours."""
        return replace(self, turns=(*self.turns[:-1], self.turns[-1] + text))

    def without(self, oldest: int) -> TextTalk:
        """Without the ``oldest`` turns."""
        return replace(self, turns=self.turns[oldest:])

    def emptied(self) -> TextTalk:
        """A new text."""
        return replace(self, turns=())

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` takes."""
        return {"turns": list(self.turns)}

    def from_json(self, content: Mapping[str, Any]) -> TextTalk:
        """The talk of ``content``. ValueError or TypeError: it is none."""
        return replace(self, turns=tuple(_text(turn) for turn in _list(content["turns"])))


@dataclass(frozen=True)
class TurnTalk:
    """For a model with a chat template: your messages and its answers.

    Attributes:
        messages: yours and the model's in turn, without the system message.
        system: the system message; empty if there is none.
    """

    template: ChatTemplate
    messages: tuple[Message, ...] = ()
    system: str = ""

    mode: ClassVar[str] = "turns"

    @property
    def welcome(self) -> str:
        """What the user is told first."""
        return f"This model talks in turns, by {self.template.name}."

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a reply."""
        return self.template.stop

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end a reply."""
        return self.template.stop_tokens

    @property
    def spare(self) -> int:
        """How many pairs of a message and its answer may be forgotten: all but the newest message."""
        return max(0, (len(self.messages) - 1) // 2)

    def ids(self) -> list[int]:
        """What the model reads; nothing before there is a message. UserError: the template refuses it."""
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return self.template.encode([*system, *self.messages]) if self.messages else []

    def asked(self, text: str) -> TurnTalk:
        """With your message ``text``. UserError: there is none."""
        if not text.strip():
            raise UserError("an empty line is no message: write one, or /help")
        return replace(self, messages=(*self.messages, Message(role="user", content=text)))

    def answered(self, text: str) -> TurnTalk:
        """With the model's answer."""
        return replace(self, messages=(*self.messages, Message(role="assistant", content=text)))

    def without(self, oldest: int) -> TurnTalk:
        """Without the ``oldest`` pairs of a message and its answer; the system message stays."""
        return replace(self, messages=self.messages[2 * oldest :])

    def emptied(self) -> TurnTalk:
        """Without messages; the system message stays."""
        return replace(self, messages=())

    def with_system(self, text: str) -> TurnTalk:
        """With another system message, or with none. UserError: the template takes none."""
        changed = replace(self, system="" if text == NO_SYSTEM else text)
        changed.asked("Hello?").ids()
        return changed

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` takes."""
        return {"system": self.system, "messages": list(self.messages)}

    def from_json(self, content: Mapping[str, Any]) -> TurnTalk:
        """The talk of ``content``. ValueError or TypeError: it is none. UserError: the template refuses it."""
        texts = [_text(message["content"]) for message in _list(content["messages"])]
        roles = [message["role"] for message in content["messages"]]
        if roles != ["user", "assistant"] * (len(texts) // 2):
            raise ValueError("messages and answers do not alternate")
        loaded = replace(self, messages=(), system=_text(content["system"]))
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            loaded = loaded.asked(question).answered(answer)
        loaded.ids()
        return loaded


Talk = TextTalk | TurnTalk
_WHAT = {"text": "a text that a base model continues", "turns": "a talk in turns"}


# ---- files -----------------------------------------------------------------------------------------------


def save_talk(path: Path, talk: Talk) -> None:
    """Writes ``talk``, over an earlier saved one at most.

    Raises:
        UserError: there is something else at ``path``, or it cannot be written.
    """
    if os.path.lexists(path):
        _read(path, "exists already and is no saved talk: choose another name")
    content = {"format": FORMAT, "version": VERSION, "mode": talk.mode, **talk.to_json()}
    try:
        with atomic_write(path) as file:
            file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason}): choose another place") from error


def load_talk(path: Path, current: Talk) -> Talk:
    """The talk saved at ``path``, in the mode of ``current``, with its template.

    Raises:
        UserError: it cannot be read, is no saved talk, is damaged, or belongs to the other mode.
    """
    content = _read(path, "no saved talk: name a file that /save wrote")
    mode = content.get("mode")
    if content.get("version") != VERSION or mode not in _WHAT:
        raise UserError(f"{path}: saved by another version of nanokimi: it cannot be read here")
    if mode != current.mode:
        raise UserError(
            f"{path}: {_WHAT[mode]}, but with this model one has {_WHAT[current.mode]}: see --chat_template"
        )
    try:
        return current.from_json(content)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: a damaged talk: it cannot be loaded") from error


def _read(path: Path, otherwise: str) -> dict[str, Any]:
    """The JSON of a saved talk; UserError, which ends in ``otherwise``, if there is none."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_FILE:
            raise UserError(f"{path}: {otherwise}")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): name another file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {otherwise}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: {otherwise}")
    return content


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    value.encode()  # a ValueError if it is not Unicode
    return value
