"""Every command, with flags of any value: it does its work, or says in one line why not."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import fields
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanokimi.cli import build_parser
from nanokimi.config import ModelConfig, TrainConfig
from tests.properties.seam import TRAIN, Bench, answer, tries

pytestmark = pytest.mark.fault("B5")

# Commands that do their work in a fraction of a second, in a folder that `Bench` made.
MODEL = "run/checkpoints/final.pt"
COMMANDS = {
    "train": TRAIN,
    "train again": ["train", "--resume", "--output_dir", "run"],
    "generate": ["generate", MODEL, "--max_tokens", "2"],
    "chat": ["chat", MODEL, "--max_tokens", "2", "--no_history"],
    "serve": ["serve", MODEL],
    "prepare stdlib": ["prepare", "stdlib", "--output", "library.txt"],
    "prepare tokens": ["prepare", "tokens", "--preset", "debug", "--data_path", "t.txt", "--output", "new"],
    "tokenizer train": ["tokenizer", "train", "t.txt", "--vocab_size", "270", "--output", "new.json"],
    "inspect data": ["inspect", "data", "--preset", "debug", "--data_path", "t.txt", "--sequences", "2"],
    "eval": ["eval", MODEL, "--data_path", "t.txt", "--max_tokens", "20"],
    "export hf": ["export", "hf", MODEL, "new", "--no_compare"],
    "export gguf": ["export", "gguf", MODEL, "new.gguf", "--no_compare"],
    "import hf": ["import", "hf", "hf", "--output", "new.pt"],
    "plan": ["plan", "--preset", "debug"],
}
NUMBERS = [
    "0",
    "1",
    "2",
    "-1",
    "3.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-400",
    "0x10",
    "1_000",
    "٣",
    str(2**63),
    "9" * 30,
]
TEXTS = ["", " ", ",", "=", "a=b", "true", "ünï ☃", "a\nb", "\x1b[31mred", "x" * 300, "a/" * 200, "--", "%s{}", "none"]
PATHS = ["t.txt", "folder", "missing", MODEL, "hf", "m.gguf", "tokens", "tokenizer.json", "q.jsonl", "run", "*", "**"]
PATHS += [".", "..", "/dev/null", "/proc/self/mem", "/proc/self/x", "t.txt/below", "t.txt,folder", "bpe:300", "byte"]
# What would take long, or all of the machine, and is right to: these are drawn from other values.
COUNTS = ["0", "1", "2", "-1", "nan", "3.5", "x", ""]
SLOW = {
    "num_workers": ["0", "-1", "x"],
    "gradient_accumulation": COUNTS,
    "n_layers": [*COUNTS, str(2**63)],
    "compile": ["off", "x"],
    "log": ["", ",", "x", "tensorboard,x"],
    "push": ["", "a/b", "x y"],
    "decoder": ["eager", "x", ""],
}


def flags_of(command: str) -> Iterator[argparse.Action]:
    """The optional arguments of ``command``."""
    parser: Any = build_parser()
    for word in command.removesuffix(" again").split():
        parser = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices[word]
    return (a for a in parser._actions if a.option_strings and a.dest not in ("help", "config", "set"))


def values_of(name: str, choices: Any = ()) -> st.SearchStrategy[str]:
    if name in SLOW:
        return st.sampled_from(SLOW[name])
    return st.sampled_from([*NUMBERS, *TEXTS, *PATHS, *(choices or ())]) | st.integers().map(str) | st.floats().map(str)


def flags(command: str) -> st.SearchStrategy[list[str]]:
    """One flag with its value, or without."""
    switches = [a for a in flags_of(command) if a.nargs == 0]
    others = [a for a in flags_of(command) if a.nargs != 0]
    drawn = [st.sampled_from(switches).map(lambda a: [a.option_strings[0]])] if switches else []
    drawn += [values_of(a.dest, a.choices).map(lambda v, a=a: [f"{a.option_strings[0]}={v}"]) for a in others]
    drawn += [st.sampled_from(others).map(lambda a: [a.option_strings[0]])] if others else []
    if "set" in vars(build_parser().parse_args(COMMANDS[command])):
        drawn.append(settings_text().map(lambda text: ["--set", text]))
    return st.one_of(drawn)


def settings_text() -> st.SearchStrategy[str]:
    """``FIELD=VALUE`` for any field, or something like it."""
    choices = {f.name: f.metadata["choices"] for cls in (ModelConfig, TrainConfig) for f in fields(cls)}
    known = st.sampled_from(sorted(choices)).flatmap(
        lambda name: values_of(name, choices[name]).map(lambda value: f"{name}={value}")
    )
    return known | st.sampled_from(["dims=3", "dim", "=", "=3", "dim==3", "DIM=3", ""])


@pytest.mark.parametrize("command", COMMANDS)
@tries(12)
@given(data=st.data())
def test_a_command_with_any_flags_works_or_says_in_one_line_why_not(
    bench: Bench, command: str, data: st.DataObject
) -> None:
    drawn = data.draw(st.lists(flags(command), min_size=1, max_size=3))
    with bench.copy() as folder:
        answer([*COMMANDS[command], *chain(*drawn)], folder, stdin="hello\n/set x y\n/quit\n").require_plain()
