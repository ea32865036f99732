"""What has been said so far: one growing text, or messages in turns. Each change gives a new talk."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.files import atomic_write
from nanokimi.inference.chat_template import ChatTemplate, Message
from nanokimi.inference.generate import encode_prompt

FORMAT, VERSION = "nanokimi-talk", 1
MAX_FILE = 100_000_000  # bytes
NO_SYSTEM = "none"


@dataclass(frozen=True)
class Talk:
    """A talk so far: messages and answers for a model with a chat template, one growing text for a base model.

    Attributes:
        template: None for a base model, which continues the text.
        turns: your text and what the model wrote after it, None before it has. In a growing text a turn begins a line.
        system: the system message, which needs a template; empty if there is none.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    turns: tuple[tuple[str, str | None], ...] = ()
    system: str = ""

    @property
    def mode(self) -> Literal["text", "turns"]:
        """How one talks: a base model continues a text, a chat template makes turns."""
        return "text" if self.template is None else "turns"

    def ids(self) -> list[int]:
        """What the model reads. UserError: it is not Unicode text, or the template refuses it."""
        if self.template is None:
            return encode_prompt(self.tokenizer, "\n".join(self._texts()))
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return self.template.encode([*system, *self._messages()]) if self.turns else []

    def _texts(self) -> list[str]:
        return [asked + (answer or "") for asked, answer in self.turns]

    def _messages(self) -> list[Message]:
        messages: list[Message] = []
        for asked, answer in self.turns:
            messages.append({"role": "user", "content": asked})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        return messages

    def asked(self, text: str) -> Talk:
        """With your ``text`` added. An empty one lets a base model go on where it stopped.

        Raises:
            UserError: there is a template, and the text is an empty message.
        """
        if self.template is not None and not text.strip():
            raise UserError("an empty line is no message: write one, or /help")
        if self.template is None and self.turns and not text:
            return self
        return replace(self, turns=(*self.turns, (text, None)))

    def answered(self, text: str) -> Talk:
        """With the model's ``text`` after yours."""
        asked, answer = self.turns[-1]
        return replace(self, turns=(*self.turns[:-1], (asked, (answer or "") + text)))

    def without(self, oldest: int) -> Talk:
        """Without the ``oldest`` turns; the system message stays."""
        return replace(self, turns=self.turns[oldest:])

    def with_system(self, text: str, *, flag: str) -> Talk:
        """With another system message, or with none. UserError: there is no template, or it takes none."""
        if self.template is None:
            raise UserError(f"{flag} is for talks in turns, and this model continues text: see --chat_template")
        changed = replace(self, system="" if text == NO_SYSTEM else text)
        changed.asked("Hello?").ids()
        return changed

    def to_json(self) -> dict[str, Any]:
        """What a file keeps."""
        if self.template is None:
            return {"turns": self._texts()}
        return {"system": self.system, "messages": self._messages()}

    def from_json(self, content: Mapping[str, Any]) -> Talk:
        """The talk of ``content``. ValueError or TypeError: it is none. UserError: the template refuses it."""
        if self.template is None:
            return replace(self, turns=tuple((turn, None) for turn in _checked_texts(content["turns"])))
        messages = content["messages"]
        system, *texts = _checked_texts([content["system"], *(message["content"] for message in messages)])
        roles = [message["role"] for message in messages]
        if not isinstance(messages, list) or roles != ["user", "assistant"] * (len(texts) // 2):
            raise ValueError("no list of messages and answers in turn")
        loaded = replace(self, turns=(), system=system)
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            loaded = loaded.asked(question).answered(answer)
        loaded.ids()
        return loaded


def save_talk(path: Path, talk: Talk) -> None:
    """Writes ``talk``; the only file that it overwrites is an earlier saved talk.

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
    modes = {"text": "a text that a base model continues", "turns": "a talk in turns"}
    mode = content.get("mode")
    if content.get("version") != VERSION or mode not in modes:
        raise UserError(f"{path}: saved by another version of nanokimi: it cannot be read here")
    if mode != current.mode:
        raise UserError(
            f"{path}: {modes[mode]}, but with this model one has {modes[current.mode]}: see --chat_template"
        )
    try:
        return current.from_json(content)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: a damaged talk: it cannot be loaded") from error


def _read(path: Path, otherwise: str) -> dict[str, Any]:
    """The JSON of a saved talk; a UserError that ends in ``otherwise`` if the file is something else."""
    try:
        with suppress(ValueError, RecursionError):  # of the JSON, or of a name that no file can have
            about = path.stat()
            if stat.S_ISREG(about.st_mode) and about.st_size <= MAX_FILE:
                content = json.loads(path.read_bytes())
                if isinstance(content, dict) and content.get("format") == FORMAT:
                    return content
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): name another file") from error
    raise UserError(f"{path}: {otherwise}")


def _checked_texts(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("not a list of texts")
    "".join(values).encode()  # a ValueError if they are not Unicode
    return values
