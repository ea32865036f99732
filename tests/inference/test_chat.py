from __future__ import annotations

import io
import os
import pty
import select
import signal
import sys
import time
from pathlib import Path

import pytest
from scripted import InterruptedModel, ScriptedModel

from nanokimi.console import printable
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.errors import UserError
from nanokimi.inference.chat import Chat, interactive
from nanokimi.inference.settings import Settings


def settings(max_tokens: int) -> Settings:
    return Settings(temperature=0.0, max_tokens=max_tokens)


def talk(model: ScriptedModel, *lines: str, max_tokens: int = 3, opening: str = "") -> str:
    output = io.StringIO()
    source = io.StringIO("".join(line + "\n" for line in lines))
    tokenizer = load_tokenizer("byte")
    assert interactive(model, tokenizer, settings(max_tokens), opening=opening, source=source, output=output) == 0
    return output.getvalue()


def prompts(model: ScriptedModel) -> list[str]:
    return [bytes(ids).decode() for ids in model.prompts]


def test_it_says_first_that_it_is_a_base_model() -> None:
    assert talk(ScriptedModel(b"a")).startswith("This is a base model: it continues your text")


def test_the_context_is_your_text_and_its_replies() -> None:
    model = ScriptedModel(b"abc")
    shown = talk(model, "def", "one", "two")
    assert prompts(model) == ["def", "defabc\none", "defabc\noneabc\ntwo"]
    assert shown.count("abc\n[3 tokens, ") == 3


def test_an_empty_line_lets_the_reply_go_on() -> None:
    model = ScriptedModel(b"abc")
    talk(model, "x", "", "y")
    assert prompts(model) == ["x", "xabc", "xabcabc\ny"]


def test_an_opening_is_continued_before_the_first_line() -> None:
    model = ScriptedModel(b"abc")
    talk(model, "x", opening="once")
    assert prompts(model) == ["once", "onceabc\nx"]


def test_reset_forgets_the_text() -> None:
    model = ScriptedModel(b"abc")
    talk(model, "one", "/reset", "two")
    assert prompts(model) == ["one", "two"]


def test_quit_leaves_before_the_end_of_input() -> None:
    model = ScriptedModel(b"abc")
    talk(model, "/quit", "never read")
    assert model.prompts == []


def test_set_changes_the_replies_that_follow() -> None:
    shown = talk(ScriptedModel(b"abcdef"), "x", "/set max_tokens 5", "y", r"/set stop d", "z")
    assert "abc\n[3 tokens" in shown
    assert "abcde\n[5 tokens" in shown
    assert "max_tokens=5  stop=('d',)" in shown
    assert shown.rstrip().endswith("finish_reason stop]")


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/set temperature -1", "temperature must be 0 (greedy) or a positive number, got -1.0"),
        ("/set temprature 1", "unknown setting 'temprature': did you mean temperature?"),
        ("/set top_k x", "top_k takes a whole number, got 'x'"),
        ("/sing", "unknown command /sing: /help lists the commands"),
        ("/\x1b[2J", "unknown command /[2J: /help lists the commands"),
    ],
)
def test_a_mistake_gets_one_line_and_the_talk_goes_on(line: str, answer: str) -> None:
    model = ScriptedModel(b"abc")
    assert talk(model, line, "x").splitlines()[1] == answer
    assert prompts(model) == ["x"]


def test_help_names_every_command() -> None:
    assert all(command in talk(ScriptedModel(b"a"), "/help") for command in ("/set", "/reset", "/quit", "Ctrl-C"))


def test_a_line_behind_a_space_is_text_even_with_a_slash() -> None:
    model = ScriptedModel(b"abc")
    talk(model, " /quit")
    assert prompts(model) == [" /quit"]


def test_the_oldest_turns_leave_a_full_context_and_the_user_is_told() -> None:
    model = ScriptedModel(b"abcdefghij", context=64)
    shown = talk(model, "1" * 20, "2" * 20, "3" * 20, max_tokens=10)
    assert prompts(model)[2] == "2" * 20 + "abcdefghij\n" + "3" * 20
    assert shown.count("(the context of 64 tokens is full: oldest turns dropped: 1)") == 1


def test_a_large_max_tokens_leaves_half_of_the_context_to_the_history() -> None:
    model = ScriptedModel([*b"abc", 256], context=64)
    talk(model, "1" * 10, "2" * 10, max_tokens=1000)
    assert prompts(model)[1] == "1" * 10 + "abc\n" + "2" * 10


def test_a_text_over_the_context_is_refused_and_the_history_stays() -> None:
    model = ScriptedModel(b"abc", context=64)
    shown = talk(model, "one", "2" * 64, "three")
    assert "this text has 64 tokens and the context holds 64: write less, or /reset" in shown
    assert prompts(model) == ["one", "oneabc\nthree"]


def test_ctrl_c_stops_the_reply_and_keeps_what_was_written() -> None:
    """Fault 81."""
    model = InterruptedModel(b"abc").train()
    shown = talk(model, "x", "y", max_tokens=9)
    assert "abc\n[3 tokens, " in shown
    assert "finish_reason interrupted]" in shown
    assert prompts(model) == ["x", "xabc\ny"]
    assert model.training


def test_ctrl_c_at_the_prompt_gives_a_hint_and_the_talk_goes_on() -> None:
    class Source(io.StringIO):
        presses = 2

        def readline(self, *args: int) -> str:
            self.presses -= 1
            if self.presses >= 0:
                raise KeyboardInterrupt
            return super().readline(*args)

    model, output = ScriptedModel(b"abc"), io.StringIO()
    interactive(model, load_tokenizer("byte"), settings(3), source=Source("x\n"), output=output)
    assert output.getvalue().count("(Ctrl-D or /quit leaves; Ctrl-C stops a reply)") == 2
    assert prompts(model) == ["x"]


def test_a_reply_cannot_control_the_terminal() -> None:
    written = b"a\x1b]0;title\x07\x1b[2J\rb"
    shown = talk(ScriptedModel(written), "x", max_tokens=len(written))
    assert "a]0;title[2Jb\n[" in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),
        ("c1: \x9b2J \x9d0;t\x9c \x85", "c1: 2J 0;t "),
        ("\x00\x07\x08\r\x7f", ""),
        ("héllo 日本 😀", "héllo 日本 😀"),
    ],
)
def test_control_characters_are_stripped_and_text_is_not(text: str, shown: str) -> None:
    assert printable(text) == shown == "".join(printable(c) for c in text)


def test_the_text_kept_for_the_model_is_not_stripped() -> None:
    chat = Chat(ScriptedModel(b"a\x1bb"), load_tokenizer("byte"), settings(3), io.StringIO())
    chat.reply("x")
    assert chat.turns == ["xa\x1bb"]


def test_a_refused_text_raises_for_the_caller() -> None:
    chat = Chat(ScriptedModel(b"a", context=8), load_tokenizer("byte"), settings(3), io.StringIO())
    with pytest.raises(UserError, match="context holds 8"):
        chat.reply("too long for it")


ON_A_TERMINAL = """
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.inference.chat import interactive
from nanokimi.inference.settings import Settings
from scripted import ScriptedModel
model = ScriptedModel(b"abc", context=50_000, seconds=0.005)
raise SystemExit(interactive(model, load_tokenizer("byte"), Settings(temperature=0.0, max_tokens=50_000)))
"""


class Terminal:
    """A Python program on a pseudo-terminal of its own, as a person would use it."""

    def __init__(self, code: str) -> None:
        self.seen = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests in the background ignores it
            path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
            os.execve(sys.executable, [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": path})

    def wait_for(self, text: str, *, pressing: str = "") -> None:
        """Reads up to and including ``text``; presses ``pressing`` again each time nothing comes for a while.

        Again, because a Ctrl-C between the display of the prompt and the wait for a key is seen only with the
        next key: CPython's readline module has this gap.
        """
        deadline = time.monotonic() + 60
        self.press(pressing)
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
            else:
                self.press(pressing)
        self.seen = self.seen.partition(text)[2]

    def press(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_on_a_terminal_ctrl_c_stops_the_reply_and_ctrl_d_leaves() -> None:
    """Fault 81."""
    terminal = Terminal(ON_A_TERMINAL)
    terminal.wait_for("> ")
    terminal.press("go on\n")
    terminal.wait_for("abccc")
    terminal.wait_for("finish_reason interrupted]", pressing="\x03")
    terminal.wait_for("> ")
    terminal.wait_for("Ctrl-D or /quit leaves", pressing="\x03")
    terminal.wait_for("> ")
    terminal.press("\x04")
    assert terminal.exit_code() == 0
