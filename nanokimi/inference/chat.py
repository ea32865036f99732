"""The chat in the terminal. Base models continue your text; models with a chat template answer in turns."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import sys
from bisect import bisect_left
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from nanokimi.config import suggest
from nanokimi.console import has_reader, printable
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.files import atomic_write
from nanokimi.inference.chat_template import ChatTemplate, Message
from nanokimi.inference.decoder import Decoder
from nanokimi.inference.decoding import new_decoder
from nanokimi.inference.engine import Result, figures
from nanokimi.inference.generate import encode_prompt, stream
from nanokimi.inference.line_reader import Line, line_reader, read_input
from nanokimi.inference.options import SamplingOptions
from nanokimi.model.transformer import Transformer

HELP_TEXT = {
    "text": "the model continues the text so far; an empty line lets it go on where it stopped",
    "turns": "a message, which the model answers",
}
HELP = '''\
  text               {text}
  """                begins a text of several lines, and ends it
  /reset             forget what was said so far
  /save FILE         keep it in a file
  /load FILE         go on with what a file keeps
  /set NAME VALUE    change a setting; /set alone shows them all
  /system TEXT       tell the model what holds for the whole talk (only in turns); none takes it back
  /stats             tokens, speed, and how full the context is
  /help              this list
  /quit              leave, as Ctrl-D does; Ctrl-C stops a reply
A line that begins with a space is text, even when a slash follows.'''
COMMANDS = ("/help", "/load", "/quit", "/reset", "/save", "/set", "/stats", "/system")


def interactive(
    model: Transformer,
    tokenizer: Tokenizer,
    options: SamplingOptions,
    *,
    opening: str = "",
    system: str = "",
    template: ChatTemplate | None = None,
    keep_history: bool = False,
    source: TextIO | None = None,
    output: TextIO | None = None,
    decoder: Decoder | None = None,
) -> int:
    """Talks until Ctrl-D, end of input or ``/quit``; returns the exit code, 0.

    Args:
        opening: what the model reads before the first line.
        system: the system message of a talk in turns.
        template: talk in turns; None: continue text.
        keep_history: lines typed on a terminal are there again in the next talk.
        source, output: a terminal or a pipe (default: standard input and output).
        decoder: one made for ``model`` (default: a ``new_decoder``).

    Raises:
        UserError: ``opening`` is longer than the context, or there are no system messages here.
        RunError: the model's logits are not finite.
    """
    talk = Talk(tokenizer, template)
    if system:
        talk = talk.with_system(system, flag="--system")
    welcome = "This is a base model: it continues your text, it does not answer questions."
    if template is not None:
        welcome = f"This model talks in turns, by {template.name}."
    chat = Chat(model, options, output or sys.stdout, decoder or new_decoder(model), talk)
    with line_reader(source or sys.stdin, COMMANDS, keep_history=keep_history) as read_line:
        chat.log(f"{welcome} /help lists the commands.")
        if opening:
            chat.reply(opening)
        talking = True
        while talking and has_reader():
            try:
                talking = chat.take(read_input(read_line))
            except UserError as error:
                chat.log(str(error).removeprefix("--"))
            except KeyboardInterrupt:
                chat.log("\n(Ctrl-D or /quit leaves; Ctrl-C stops a reply)")
            except EOFError:
                chat.log("")
                talking = False
    return 0


@dataclass
class Chat:
    """A model, the talk so far (the model reads as much of it as fits its context), and the result of each reply."""

    model: Transformer
    options: SamplingOptions
    output: TextIO
    decoder: Decoder
    talk: Talk
    results: list[Result] = field(default_factory=list)

    def take(self, line: Line) -> bool:
        """Acts on one input; False when it asks to leave.

        Raises:
            UserError: a command that is not possible, or text that does not fit the context.
        """
        if not line.is_command:
            self.reply(line.text)
            return True
        name, _, rest = line.text.partition(" ")
        if name == "/quit":
            return False
        commands = {
            "/help": lambda _: self.log(HELP.format(text=HELP_TEXT[self.talk.mode])),
            "/load": self.load,
            "/reset": lambda _: self.reset(),
            "/save": self.save,
            "/set": self.set,
            "/stats": lambda _: self.stats(),
            "/system": self.system,
        }
        if name not in commands:
            raise UserError(f"unknown command {name}{suggest(name, set(COMMANDS)) or ': /help lists the commands'}")
        commands[name](rest.strip())
        return True

    def reply(self, text: str) -> None:
        """Lets the model write after ``text``; Ctrl-C stops it and keeps what was written.

        Raises:
            UserError: ``text`` alone fills the context, or the template refuses it.
            RunError: the model's logits are not finite.
        """
        talk = self.fit(self.talk.asked(text))
        options, stop_tokens = self.options, None
        if talk.template is not None:
            options = dataclasses.replace(options, stop=options.stop + talk.template.stop)
            stop_tokens = talk.template.stop_tokens
        deltas = stream(self.model, talk.tokenizer, talk.ids(), options, stop_tokens=stop_tokens, decoder=self.decoder)
        written = ""
        try:
            for delta in deltas:
                written += delta
                self.output.write(printable(delta))
                self.output.flush()
        except KeyboardInterrupt:
            deltas.close()
        finally:
            self.talk = talk.answered(written)
        self.results.append(deltas.result)
        self.log(f"\n[{deltas.result.summary()}]")

    def fit(self, talk: Talk) -> Talk:
        """``talk`` without the oldest turns that leave too little of the context for a reply.

        At most half of the context is kept free, so that a large ``max_tokens`` does not cost all history.

        Raises:
            UserError: the newest turn alone fills the context.
        """
        context = self.decoder.max_length
        room = context - min(self.options.max_tokens, context // 2)
        oldest = range(len(talk.turns) - 1)  # the newest turn stays
        dropped = bisect_left(oldest, True, key=lambda count: len(talk.without(count).ids()) <= room)
        talk = talk.without(dropped)
        if (length := len(talk.ids())) >= context:
            raise UserError(f"this text has {length} tokens and the context holds {context}: write less, or /reset")
        if dropped:
            self.log(f"(the context of {context} tokens is full: oldest turns dropped: {dropped})")
        return talk

    def reset(self) -> None:
        """Forgets the talk; the system message stays."""
        self.talk = dataclasses.replace(self.talk, turns=())
        self.log("(a new text begins)" if self.talk.mode == "text" else "(a new talk begins)")

    def save(self, name: str) -> None:
        """Keeps the talk in the file ``name``."""
        path = _path(name, "/save")
        save_talk(path, self.talk)
        self.log(f"(saved in {path})")

    def load(self, name: str) -> None:
        """Goes on with the talk in the file ``name``."""
        path = _path(name, "/load")
        self.talk = load_talk(path, self.talk)
        self.log(f"(loaded from {path}: {len(self.talk.ids())} tokens)")

    def set(self, assignment: str) -> None:
        """``NAME VALUE`` changes a setting; nothing shows them all."""
        if assignment:
            name, _, value = assignment.partition(" ")
            self.options = self.options.with_value(name, value.strip())
        self.log("  ".join(f"{name}={value!r}" for name, value in dataclasses.asdict(self.options).items()))

    def system(self, text: str) -> None:
        """Sets another system message from here on; nothing shows the present one."""
        self.talk = self.talk.with_system(text or self.talk.system, flag="/system")
        self.log(f"(system: {self.talk.system or 'none'})")

    def stats(self) -> None:
        """Shows the figures of the last reply and of all, and how full the context is."""
        context, used = self.decoder.max_length, len(self.talk.ids())
        for name, results in (("last reply", self.results[-1:]), ("all replies", self.results)):
            read = sum(result.prompt_tokens for result in results)
            self.log(f"{name}: {read} tokens read, written {figures(results)}")
        self.log(f"context: {used} of {context} tokens, {used / context:.0%}")

    def log(self, line: str) -> None:
        """Writes a line of the program's own, without what could control the terminal."""
        print(printable(line), file=self.output, flush=True)


def _path(name: str, command: str) -> Path:
    if not name:
        raise UserError(f"{command} needs the name of a file, such as {command} talk.json")
    return Path(os.path.expanduser(name))


# ---- what has been said so far ------------------------------------------------------------------

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
