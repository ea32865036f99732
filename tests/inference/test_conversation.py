"""What was said: kept in files, and read back only where it fits."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from conftest import locked_folder

from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.errors import UserError
from nanokimi.inference.chat import Talk, load_talk, save_talk
from nanokimi.inference.chat_template import ChatTemplate

SOURCE = """\
{% for m in messages %}
{% if m.role == 'system' and m.content == 'refused' %}{{ raise_exception('no system messages') }}{% endif %}
{{ m.role }}: {{ m.content }}
{% endfor %}"""


def new_talk(mode: str) -> Talk:
    tokenizer = load_tokenizer("byte")
    return Talk(tokenizer, None if mode == "text" else ChatTemplate(SOURCE, tokenizer))


def some_talk(mode: str) -> Talk:
    talk = new_talk(mode)
    if mode == "turns":
        talk = talk.with_system("Be \x1b[2J brief.", flag="/system")
    return talk.asked("Who's there?\né 😀").answered(" Nobody.\n").asked("Well?").answered("")


@pytest.mark.parametrize("mode", ["text", "turns"])
def test_a_talk_is_the_same_when_it_comes_back(tmp_path: Path, mode: str) -> None:
    talk = some_talk(mode)
    save_talk(tmp_path / "talk.json", talk)
    again = load_talk(tmp_path / "talk.json", new_talk(mode))
    assert again.to_json() == talk.to_json()
    assert again.ids() == talk.ids() != new_talk(mode).ids()


@pytest.mark.parametrize(("mode", "other"), [("text", "turns"), ("turns", "text")])
def test_a_talk_of_the_other_mode_is_refused(tmp_path: Path, mode: str, other: str) -> None:
    save_talk(tmp_path / "talk.json", some_talk(mode))
    with pytest.raises(UserError, match=r"talk\.json: a .*, but with this model one has a .*--chat_template"):
        load_talk(tmp_path / "talk.json", new_talk(other))


def test_the_oldest_turns_leave_and_the_system_message_stays() -> None:
    talk = some_talk("turns").asked("Now")
    shorter = talk.without(2)
    assert shorter.to_json() == {"system": "Be \x1b[2J brief.", "messages": [{"role": "user", "content": "Now"}]}
    assert some_talk("text").asked("Now").without(2).to_json() == {"turns": ["Now"]}


# ---- files that are no saved talks -----------------------------------------------------------------------


def place(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to nothing":
        path.symlink_to(path.with_name("nothing"))
    else:
        path.write_bytes({"text": b"dear diary", "json": b'{"a": 1}', "list": b"[]", "nested": b"[" * 99_999}[kind])


FOREIGN = ["text", "json", "list", "nested", "folder", "pipe", "link to nothing"]


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_no_talk_is_neither_overwritten_nor_loaded(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mine"
    place(path, kind)
    before = os.lstat(path)
    for attempt in (lambda: save_talk(path, some_talk("text")), lambda: load_talk(path, new_talk("text"))):
        with pytest.raises(UserError, match=r"mine: .*(name|choose) a") as error:
            attempt()
        assert "\n" not in str(error.value)
    after = os.lstat(path)
    assert (after.st_ino, after.st_size, stat.S_IFMT(after.st_mode)) == (
        before.st_ino,
        before.st_size,
        stat.S_IFMT(before.st_mode),
    )
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["", ".", "no/such/folder/talk.json", "x" * 5000, "a\0b"])
def test_a_place_that_cannot_be_is_one_line(tmp_path: Path, name: str) -> None:
    for attempt in (save_talk, load_talk):
        with pytest.raises(UserError, match=r"(name|choose) a") as error:
            attempt(tmp_path / name, some_talk("text"))
        assert "\n" not in str(error.value)


def test_a_folder_in_which_nobody_can_write_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        save_talk(locked_folder(tmp_path) / "talk.json", some_talk("text"))


@pytest.mark.parametrize(
    ("mode", "changes", "problem"),
    [
        ("text", {"version": 2}, "another version"),
        ("text", {"mode": "song"}, "another version"),
        ("text", {"turns": "abc"}, "damaged"),
        ("text", {"turns": ["a", 1]}, "damaged"),
        ("text", {"turns": ["\ud800"]}, "damaged"),
        ("text", {"turns": None}, "damaged"),
        ("turns", {"messages": [{"role": "user", "content": "alone"}]}, "damaged"),
        ("turns", {"messages": [{"role": "user"}, {"role": "assistant"}]}, "damaged"),
        ("turns", {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}, "damaged"),
        ("turns", {"messages": ["a", "b"]}, "damaged"),
        ("turns", {"messages": {}}, "damaged"),
        ("turns", {"system": None}, "damaged"),
        ("turns", {"system": "refused"}, "no system messages"),
    ],
)
def test_a_damaged_talk_is_one_line(tmp_path: Path, mode: str, changes: dict[str, Any], problem: str) -> None:
    path = tmp_path / "talk.json"
    save_talk(path, some_talk(mode))
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))
    with pytest.raises(UserError, match=problem) as error:
        load_talk(path, new_talk(mode))
    assert "\n" not in str(error.value)
