from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from scripted import InterruptedModel, ScriptedModel
from terminal import Terminal

from nanokimi.console import printable
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.errors import UserError
from nanokimi.inference.chat import COMMANDS, Chat, Talk, interactive
from nanokimi.inference.decoding import new_decoder
from nanokimi.inference.options import SamplingOptions


def settings(max_tokens: int) -> SamplingOptions:
    return SamplingOptions(temperature=0.0, max_tokens=max_tokens)


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
        ("/quitt x", "unknown command /quitt: did you mean /quit?"),
        ("/\x1b[2J", "unknown command /[2J: /help lists the commands"),
        ("/save", "/save needs the name of a file, such as /save talk.json"),
        ("/load  ", "/load needs the name of a file, such as /load talk.json"),
        ("/system Be brief.", "/system is for talks in turns, and this model continues text: see --chat_template"),
    ],
)
def test_a_mistake_gets_one_line_and_the_talk_goes_on(line: str, answer: str) -> None:
    model = ScriptedModel(b"abc")
    assert talk(model, line, "x").splitlines()[1] == answer
    assert prompts(model) == ["x"]


def test_help_names_every_command() -> None:
    shown = talk(ScriptedModel(b"a"), "/help")
    assert all(f"  {command} " in shown for command in COMMANDS)
    assert "Ctrl-C" in shown


def test_every_reply_ends_in_its_figures() -> None:
    shown = talk(ScriptedModel([*b"abc", 256]), "x", max_tokens=9)
    line = r"\[3 tokens, [\d.]+ tokens/s, first token after \d+\.\d\d s, finish_reason stop\]"
    assert re.fullmatch(line, shown.splitlines()[2])


def test_stats_add_up_what_the_replies_took() -> None:
    shown = talk(ScriptedModel(b"abc"), "/stats", "xx", "y", "/stats")
    before, after = (shown.partition("last reply: ")[2].splitlines()[:3], shown.rsplit("last reply: ")[-1].splitlines())
    assert before[0].startswith("0 tokens read, written 0 tokens, 0.0 tokens/s")
    assert before[2] == "context: 1 of 128 tokens, 1%"
    assert after[0].startswith("7 tokens read, written 3 tokens, ")
    assert after[1].startswith("all replies: 9 tokens read, written 6 tokens, ")
    assert after[2] == "context: 10 of 128 tokens, 8%"


def test_three_quotes_hold_a_text_of_several_lines() -> None:
    model = ScriptedModel(b"abc")
    talk(model, '"""', "def f():", "", "/quit", '"""', "/reset", '"""one line"""', "/reset", '"""two', 'lines"""')
    assert prompts(model) == ["def f():\n\n/quit", "one line", "two\nlines"]


def test_the_end_of_input_ends_a_text_of_several_lines() -> None:
    model = ScriptedModel(b"abc")
    talk(model, '"""', "one", "two")
    assert prompts(model) == ["one\ntwo"]


def test_a_saved_text_goes_on_in_another_talk(tmp_path: Path) -> None:
    path = tmp_path / "my talk.json"
    talk(ScriptedModel(b"abc"), "one", f"/save {path}", "two", f"/save {path}")
    model = ScriptedModel(b"abc")
    shown = talk(model, "forgotten", f"/load {path}", "three")
    assert prompts(model)[1] == "oneabc\ntwoabc\nthree"
    assert f"(loaded from {path}: 13 tokens)" in shown
    assert [file.name for file in tmp_path.iterdir()] == ["my talk.json"]


def test_a_line_after_a_space_is_text_even_with_a_slash() -> None:
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


@pytest.mark.fault(81)
def test_ctrl_c_stops_the_reply_and_keeps_what_was_written() -> None:
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


def new_chat(model: ScriptedModel) -> Chat:
    tokenizer = load_tokenizer("byte")
    return Chat(model, settings(3), io.StringIO(), new_decoder(model), Talk(tokenizer))


def test_the_text_kept_for_the_model_is_not_stripped() -> None:
    chat = new_chat(ScriptedModel(b"a\x1bb"))
    chat.reply("x")
    assert chat.talk.turns == (("x", "a\x1bb"),)


def test_a_refused_text_raises_for_the_caller() -> None:
    chat = new_chat(ScriptedModel(b"a", context=8))
    with pytest.raises(UserError, match="context holds 8"):
        chat.reply("too long for it")


ON_A_TERMINAL = """
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.inference.chat import interactive
from nanokimi.inference.options import SamplingOptions
from scripted import ScriptedModel
model = ScriptedModel(b"abc", context=50_000, seconds=0.005)
raise SystemExit(interactive(model, load_tokenizer("byte"), SamplingOptions(temperature=0.0, max_tokens=50_000)))
"""


@pytest.mark.fault(81)
def test_on_a_terminal_ctrl_c_stops_the_reply_and_ctrl_d_leaves() -> None:
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
