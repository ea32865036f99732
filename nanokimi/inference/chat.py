"""The talk in the terminal. Base models continue your text; models with a chat template answer in turns."""

from __future__ import annotations

import dataclasses
import os
import sys
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from nanokimi.config import suggest
from nanokimi.console import printable
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.inference.chat_template import ChatTemplate
from nanokimi.inference.conversation import Talk, TextTalk, TurnTalk, load_talk, save_talk
from nanokimi.inference.decoder import Decoder, new_decoder
from nanokimi.inference.engine import Result
from nanokimi.inference.generate import stream_ids
from nanokimi.inference.line_reader import Line, read_input, reading
from nanokimi.inference.settings import Settings
from nanokimi.model.transformer import Transformer

LEAVE_HINT = "Ctrl-D or /quit leaves; Ctrl-C stops a reply"
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
    settings: Settings,
    *,
    opening: str = "",
    system: str = "",
    template: ChatTemplate | None = None,
    keep_history: bool = False,
    source: TextIO | None = None,
    output: TextIO | None = None,
    decoder: Decoder | None = None,
) -> int:
    """Talks until Ctrl-D, end of input or ``/quit``.

    Args:
        opening: what the model gets to read before the first line is.
        system: the system message of a talk in turns.
        template: talk in turns; None: continue text.
        keep_history: lines typed on a terminal are there again in the next talk.
        source, output: a terminal or a pipe (default: standard input and output).
        decoder: one made for ``model`` (default: what ``new_decoder`` takes).

    Returns:
        The exit code, 0.

    Raises:
        UserError: ``opening`` is longer than the context, or there are no system messages here.
        RunError: the model's logits are not finite.
    """
    talk: Talk = TextTalk(tokenizer) if template is None else TurnTalk(template)
    if system:
        talk = _in_turns(talk, "--system").with_system(system)
    chat = Chat(model, tokenizer, settings, output or sys.stdout, decoder, talk)
    with reading(source or sys.stdin, COMMANDS, keep_history=keep_history) as read_line:
        chat.log(printable(f"{talk.welcome} /help lists the commands."))
        if opening:
            chat.reply(opening)
        talking = True
        while talking:
            try:
                talking = chat.take(read_input(read_line))
            except UserError as error:
                chat.log(printable(str(error).removeprefix("--")))
            except KeyboardInterrupt:
                chat.log(f"\n({LEAVE_HINT})")
            except EOFError:
                chat.log("")
                break
    return 0


class Chat:
    """A model, what was said so far, and what the replies took.

    Attributes:
        talk: what was said so far, of which the model reads as much as fits its context.
        results: one for each reply, in order.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        settings: Settings,
        output: TextIO,
        decoder: Decoder | None = None,
        talk: Talk | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.decoder = decoder or new_decoder(model)
        self.settings = settings
        self.output = output
        self.talk: Talk = talk or TextTalk(tokenizer)
        self.results: list[Result] = []

    def take(self, line: Line) -> bool:
        """Acts on one input; False when it asks to leave.

        Raises:
            UserError: a command that cannot be, or text that does not fit the context.
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

    # ---- talking -----------------------------------------------------------------------------------------

    def reply(self, text: str) -> None:
        """Lets the model go on behind ``text``; Ctrl-C stops it and keeps what was written.

        Raises:
            UserError: ``text`` alone fills the context, or the template refuses it.
            RunError: the model's logits are not finite.
        """
        talk = self.fit(self.talk.asked(text))
        settings = dataclasses.replace(self.settings, stop=self.settings.stop + talk.stop)
        pieces = stream_ids(
            self.model, self.tokenizer, talk.ids(), settings, stop_tokens=talk.stop_tokens, decoder=self.decoder
        )
        written = []
        try:
            for piece in pieces:
                written.append(piece)
                self.output.write(printable(piece))
                self.output.flush()
        except KeyboardInterrupt:
            pieces.close()
        finally:
            self.talk = talk.answered("".join(written))
        self.results.append(pieces.result)
        self.log(f"\n[{_figures([pieces.result])}, finish_reason {pieces.result.finish_reason or 'interrupted'}]")

    def fit(self, talk: Talk) -> Talk:
        """``talk`` without the oldest turns that leave too little of the context for a reply.

        Half of the context is kept free at most, so that a large ``max_tokens`` does not cost all history.

        Raises:
            UserError: the newest turn alone fills the context.
        """
        context = self.decoder.max_length
        room = context - min(self.settings.max_tokens, context // 2)
        dropped = bisect_left(range(talk.spare), True, key=lambda oldest: len(talk.without(oldest).ids()) <= room)
        talk = talk.without(dropped)
        if (length := len(talk.ids())) >= context:
            raise UserError(f"this text has {length} tokens and the context holds {context}: write less, or /reset")
        if dropped:
            self.log(f"(the context of {context} tokens is full: oldest turns dropped: {dropped})")
        return talk

    # ---- commands ----------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets what was said."""
        self.talk = self.talk.emptied()
        self.log("(a new text begins)" if self.talk.mode == "text" else "(a new talk begins)")

    def save(self, name: str) -> None:
        """Keeps the talk in the file ``name``. UserError: that is not possible."""
        path = _named(name, "/save")
        save_talk(path, self.talk)
        self.log(printable(f"(saved in {path})"))

    def load(self, name: str) -> None:
        """Goes on with the talk in the file ``name``. UserError: there is none, or one for other models."""
        path = _named(name, "/load")
        self.talk = load_talk(path, self.talk)
        self.log(printable(f"(loaded from {path}: {len(self.talk.ids())} tokens)"))

    def set(self, assignment: str) -> None:
        """``NAME VALUE`` changes a setting; nothing shows them all."""
        if assignment:
            name, _, value = assignment.partition(" ")
            self.settings = self.settings.with_value(name, value.strip())
        shown = dataclasses.asdict(self.settings)
        self.log(printable("  ".join(f"{name}={value!r}" for name, value in shown.items())))

    def system(self, text: str) -> None:
        """Another system message from here on; nothing shows the one there is."""
        talk = _in_turns(self.talk, "/system")
        self.talk = talk = talk.with_system(text) if text else talk
        self.log(printable(f"(system: {talk.system or 'none'})"))

    def stats(self) -> None:
        """What the last reply and the whole talk took, and how full the context is."""
        context, used = self.decoder.max_length, len(self.talk.ids())
        for name, results in (("last reply", self.results[-1:]), ("all replies", self.results)):
            read = sum(result.prompt_tokens for result in results)
            self.log(f"{name}: {read} tokens read, written {_figures(results)}")
        self.log(f"context: {used} of {context} tokens, {used / context:.0%}")

    def log(self, line: str) -> None:
        """Writes one line of the program's own."""
        print(line, file=self.output, flush=True)


def _named(name: str, command: str) -> Path:
    if not name:
        raise UserError(f"{command} needs the name of a file, such as {command} talk.json")
    return Path(os.path.expanduser(name))


def _in_turns(talk: Talk, asked: str) -> TurnTalk:
    if isinstance(talk, TurnTalk):
        return talk
    raise UserError(f"{asked} is for talks in turns, and this model continues text: see --chat_template")


def _figures(results: Sequence[Result]) -> str:
    """Tokens written, their speed behind the first ones, and the mean time to the first token."""
    tokens, seconds = sum(r.tokens for r in results), sum(r.decode_seconds for r in results)
    later = sum(max(0, r.tokens - 1) for r in results)
    first = sum(r.prefill_seconds for r in results) / max(1, len(results))
    return f"{tokens} tokens, {later / seconds if seconds else 0:.1f} tokens/s, first token after {first:.2f} s"
