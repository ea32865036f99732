"""The talk in the terminal. A base model continues text: what you write and what it adds grow into one text."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import TextIO

from nanokimi.console import printable
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.inference.decoder import Decoder, new_decoder
from nanokimi.inference.engine import encode_prompt, stream
from nanokimi.inference.settings import Settings
from nanokimi.model.transformer import Transformer

WELCOME = "This is a base model: it continues your text, it does not answer questions. /help lists the commands."
LEAVE_HINT = "Ctrl-D or /quit leaves; Ctrl-C stops a reply"
HELP = """\
  text               the model continues the text so far; an empty line lets it go on where it stopped
  /set NAME VALUE    change a setting; /set alone shows them all
  /reset             forget the text so far
  /quit              leave, as Ctrl-D does; Ctrl-C stops a reply
A line that begins with a space is text, even when a slash follows."""


def interactive(
    model: Transformer,
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    opening: str = "",
    source: TextIO | None = None,
    output: TextIO | None = None,
    decoder: Decoder | None = None,
) -> int:
    """Talks until Ctrl-D, end of input or ``/quit``.

    Args:
        opening: text to continue before the first line is read.
        source, output: a terminal or a pipe (default: standard input and output).
        decoder: one made for ``model`` (default: what ``new_decoder`` takes).

    Returns:
        The exit code, 0.
    """
    chat = Chat(model, tokenizer, settings, output or sys.stdout, decoder)
    read_line = _line_reader(source or sys.stdin)
    chat.say(WELCOME)
    if opening:
        chat.reply(opening)
    talking = True
    while talking:
        try:
            talking = chat.take(read_line())
        except UserError as error:
            chat.say(printable(str(error).removeprefix("--")))
        except KeyboardInterrupt:
            chat.say(f"\n({LEAVE_HINT})")
        except EOFError:
            chat.say("")
            break
    return 0


class Chat:
    """The text so far as ``turns``: each your text with the model's continuation of it."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        settings: Settings,
        output: TextIO,
        decoder: Decoder | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.decoder = decoder or new_decoder(model)
        self.settings = settings
        self.output = output
        self.turns: list[str] = []

    def take(self, line: str) -> bool:
        """Acts on one line; False when it asks to leave.

        Raises:
            UserError: a setting that cannot be, or text that does not fit the context.
        """
        if not line.startswith("/"):
            self.reply(line)
            return True
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/reset":
            self.turns = []
            self.say("(a new text begins)")
        elif command == "/set":
            self.set(rest.strip())
        elif command == "/help":
            self.say(HELP)
        else:
            self.say(printable(f"unknown command {command}: /help lists the commands"))
        return True

    def set(self, assignment: str) -> None:
        """``NAME VALUE`` changes a setting; nothing shows them all."""
        if assignment:
            name, _, value = assignment.partition(" ")
            self.settings = self.settings.with_value(name, value.strip())
        shown = dataclasses.asdict(self.settings)
        self.say("  ".join(f"{name}={value!r}" for name, value in shown.items()))

    def reply(self, text: str) -> None:
        """Continues the text so far with ``text`` at its end; Ctrl-C stops it and keeps what was written.

        Raises:
            UserError: ``text`` alone fills the context.
        """
        turns = self.fit([*self.turns, text] if text or not self.turns else self.turns)
        pieces = stream(self.model, self.tokenizer, _joined(turns), self.settings, decoder=self.decoder)
        self.turns = turns
        with contextlib.suppress(KeyboardInterrupt):
            for piece in pieces:
                self.turns[-1] += piece
                self.output.write(printable(piece))
                self.output.flush()
        self.say(f"\n[{pieces.result.summary()}]")

    def fit(self, turns: list[str]) -> list[str]:
        """``turns`` without the oldest ones that leave too little of the context for a reply.

        Half of the context is kept free at most, so that a large ``max_tokens`` does not cost all history.

        Raises:
            UserError: the last turn alone fills the context.
        """
        context = self.model.config.max_seq_length
        room = context - min(self.settings.max_tokens, context // 2)
        first = 0
        while first < len(turns) - 1 and self.count(turns[first:]) > room:
            first += 1
        if (length := self.count(turns[first:])) >= context:
            raise UserError(f"this text has {length} tokens and the context holds {context}: write less, or /reset")
        if first:
            self.say(f"(the context of {context} tokens is full: oldest turns dropped: {first})")
        return turns[first:]

    def count(self, turns: list[str]) -> int:
        """Tokens of the text that ``turns`` make."""
        return len(encode_prompt(self.tokenizer, _joined(turns)))

    def say(self, line: str) -> None:
        """Writes one line of the program's own."""
        print(line, file=self.output, flush=True)


def _joined(turns: list[str]) -> str:
    """One text, in which each turn begins a line as it does on the screen."""
    return "\n".join(turns)


def _line_reader(source: TextIO) -> Callable[[], str]:
    """Reads a line without its end and raises EOFError behind the last; a terminal gets a prompt and line editing."""
    if source is sys.stdin and source.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (its presence gives input() history and editing)
        return lambda: input("> ")

    def read_line() -> str:
        line = source.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    return read_line
