"""Lines as a person types them on a terminal: history, completion, texts of several lines."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from terminal import Terminal

from nanokimi.inference.line_reader import HISTORY_LINES, history_file

TYPING = """
import sys
from nanokimi.inference.line_reader import line_reader, read_input
assert "torch" not in sys.modules
with line_reader(sys.stdin, ["/help", "/set", "/stats"], keep_history={keep}) as read_line:
    while True:
        try:
            print("got", tuple(read_input(read_line)))
        except EOFError:
            break
"""
UP, TAB, LEAVE = "\x1b[A", "\t", "\x04"


def typed(state: Path, *inputs: tuple[str, str], keep: bool = True) -> None:
    """Types the keys of ``inputs``, each of which must be read as the text beside them."""
    terminal = Terminal(TYPING.format(keep=keep), XDG_STATE_HOME=str(state), TERM="xterm")
    for keys, text in inputs:
        terminal.wait_for("> ")
        terminal.press(keys)
        terminal.wait_for(f"got {text}")
    terminal.wait_for("> ")
    terminal.press(LEAVE)
    assert terminal.exit_code() == 0


def test_lines_are_edited_completed_and_remembered_for_the_next_talk(tmp_path: Path) -> None:
    typed(
        tmp_path,
        ("onn\x7fe\n", "('one', False)"),
        (f"/he{TAB}\n", "('/help ', True)"),
        (f"see /he{TAB}lp\n", "('see /help', False)"),
        ('"""two\n/lines"""\n', r"('two\n/lines', False)"),
        (f"{UP}{UP}{UP}\n", "('see /help', False)"),
    )
    history = tmp_path / "nanokimi" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    history.chmod(0o644)
    typed(tmp_path, (f"{UP}\n", "('see /help', False)"))
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    typed(tmp_path, (f"{UP}x\n", "('x', False)"), keep=False)
    assert "x" not in history.read_text().splitlines()


def test_a_history_that_cannot_be_kept_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "nanokimi").write_text("a file in the place of the folder")
    typed(tmp_path, ("one\n", "('one', False)"))
    assert (tmp_path / "nanokimi").read_text() == "a file in the place of the folder"


def test_a_long_history_is_cut(tmp_path: Path) -> None:
    history = tmp_path / "nanokimi" / "chat_history"
    history.parent.mkdir()
    history.write_text("".join(f"line {i}\n" for i in range(HISTORY_LINES + 50)))
    typed(tmp_path, ("last\n", "('last', False)"))
    lines = history.read_text().splitlines()
    assert (len(lines), lines[-1]) == (HISTORY_LINES, "last")


def test_the_history_lies_in_the_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for state in (None, "", "relative"):
        monkeypatch.delenv("XDG_STATE_HOME", raising=False)
        if state is not None:
            monkeypatch.setenv("XDG_STATE_HOME", state)
        assert history_file() == tmp_path / ".local" / "state" / "nanokimi" / "chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert history_file() == tmp_path / "state" / "nanokimi" / "chat_history"
