"""The command line as a user meets it: help, spellings, exit codes, and the small commands from end to end."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from nanokimi import checkpoint, demo
from nanokimi.cli import build_parser, main
from nanokimi.config import TrainConfig
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.errors import RunError, UserError
from nanokimi.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "datasets", "matplotlib", "tokenizers", "rich", "numpy"}


def commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and subcommand there is, as typed after ``nanokimi``."""
    yield path
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, subparser in action.choices.items():
                yield from commands(subparser, (*path, name))


COMMANDS = list(commands(build_parser()))


def modules_after(code: str, *arguments: str) -> set[str]:
    """What a fresh Python has imported after ``code``."""
    report = "import sys, runpy, json\n" + code + "\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line with which ``arguments`` are refused, with exit code 2."""
    try:
        code: Any = main(arguments)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


# ---- help and imports ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(" ".join(("usage: nanokimi", *command)))


def test_no_help_imports_anything_heavy() -> None:
    ask = """
from nanokimi.cli import main
for command in json.loads(sys.argv[1]):
    try:
        main([*command, "--help"])
    except SystemExit as ended:
        assert ended.code == 0
"""
    assert not modules_after(ask, json.dumps(COMMANDS)) & HEAVY


@pytest.mark.parametrize("script", ["train.py", "inference.py"])
def test_the_scripts_explain_themselves_without_importing_anything_heavy(script: str) -> None:
    ask = """
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    assert ended.code == 0
"""
    assert not modules_after(ask, script, "--help") & HEAVY


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not modules_after("import nanokimi") & HEAVY


def test_the_public_names_take_no_gpu_and_import_only_what_they_need() -> None:
    use = "import nanokimi\nfor name in nanokimi.__all__: getattr(nanokimi, name)\n"
    imported = modules_after(use + "import torch; assert not torch.cuda.is_initialized()")
    assert not imported & {"transformers", "datasets", "matplotlib", "rich"}


def test_the_help_of_train_lists_every_setting_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # no line is wrapped
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    entries = re.split(r"\n  (?=--)", capsys.readouterr().out)
    for f in fields(TrainConfig):
        (entry,) = (text for text in entries if text.startswith(f"--{f.name} "))
        assert f"(default: {f.default if f.default != '' else 'none'})" in entry


# ---- spellings and mistakes ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [f.name for f in fields(TrainConfig)] + ["checkpoint_path"])
def test_underscores_and_dashes_both_work(name: str) -> None:
    parse = build_parser().parse_args
    underscores = parse(["train", f"--{name}", "7"])
    assert getattr(underscores, name) == "7"
    assert parse(["train", f"--{name.replace('_', '-')}", "7"]) == underscores
    assert parse(["train", f"--{name.replace('_', '-')}=7"]) == underscores


def test_dashes_in_a_value_stay_dashes() -> None:
    args = build_parser().parse_args(["generate", "m-1.pt", "--stop=--max-tokens", "--prompt", "--top-k is a flag"])
    assert (args.checkpoint, args.stop, args.prompt) == ("m-1.pt", ["--max-tokens"], "--top-k is a flag")


@pytest.mark.fault(71, 82)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["trian"], "'trian'"),
        (["train", "--batch", "2"], "unrecognized arguments: --batch"),  # nothing is guessed from a prefix
        (["train", "--learning-rat", "1"], "unrecognized arguments: --learning-rat"),
        (["train", "--seed"], "--seed: expected one argument"),
        (["train", "leftover"], "unrecognized arguments: leftover"),
        (["generate"], "required: CHECKPOINT"),
        (["generate", "m.pt", "--temp", "1"], "unrecognized arguments: --temp"),
        (["generate", "m.pt", "--max_tokens", "many"], "--max_tokens"),
        (["generate", "missing.pt"], "missing.pt: no such checkpoint"),  # fault 82
        (["chat", "missing.pt", "--temperature", "nan"], "--temperature must be"),  # fault 71
        (["prepare"], "required: SOURCE"),
        (["tokenizer", "train"], "required: FILE"),
        (["generate", "a\nb.pt"], r"a\nb.pt: no such checkpoint"),
        (["generate", "\x1b[31m.pt"], r"\x1b[31m.pt: no such checkpoint"),
        (["generate", "x" * 300], "File name too long: choose a shorter name"),
        (["plan", "--set", "n_layers=99999999"], "n_layers must be 1 or more and 1000 or less"),
        (["train", "--max_steps=--"], "max_steps takes a whole number, got '--'"),
        (["demo", "--sec", "5"], "unrecognized arguments: --sec"),
        (["demo", "--seconds", "0"], "--seconds must be more than 0"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    line = refused(capsys, arguments)
    assert line.startswith("nanokimi")
    assert message in line


def flags_with_values(command: tuple[str, ...]) -> list[str]:
    """Every flag of ``command`` that takes a value."""
    parser = build_parser()
    for name in command:
        (choices,) = (a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = choices[name]
    return [action.option_strings[0] for action in parser._actions if action.option_strings and action.nargs != 0]


@pytest.mark.fault("A12")
@pytest.mark.parametrize("command", [c for c in COMMANDS if flags_with_values(c)], ids=" ".join)
def test_a_flag_that_is_not_utf8_is_named_in_one_line(
    capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    positional = {
        "generate": ["m"],
        "chat": ["m"],
        "serve": ["m"],
        "eval": ["m"],
        "import": ["m"],
        "export": ["m", "t"],
    }
    words = [*command, *(["t"] if command == ("tokenizer", "train") else positional.get(command[0], []))]
    for flag in flags_with_values(command):
        line = refused(capsys, [*words, flag, "\udcff"])
        assert flag in line
        assert "\\udcff" in line


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--output: name a file"), 2, "nanokimi: --output: name a file"),
        (RunError("the disk is full"), 1, "nanokimi: the disk is full"),
        (KeyboardInterrupt(), 130, "nanokimi: interrupted"),
    ],
)
def test_a_failure_is_one_line_and_its_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def fail(output: str) -> str:
        raise error

    monkeypatch.setattr("nanokimi.data.prepare.prepare_stdlib", fail)
    assert main(["prepare", "stdlib"]) == code
    assert capsys.readouterr().err.splitlines() == [line]


# ---- the small commands -------------------------------------------------------------------------


def test_prepare_writes_the_library_as_a_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "library"
    library.mkdir()
    (library / "one.py").write_text("a = 1\n")
    (library / "two.py").write_text("b = 2\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "stdlib"]) == 0
    assert (tmp_path / "data" / "train.txt").read_text() == "a = 1\n<|endoftext|>\nb = 2\n"
    assert "2 source files" in capsys.readouterr().out


def test_a_tokenizer_is_trained_from_a_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "new" / "tokenizer.json"
    text.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    arguments = ["tokenizer", "train", str(text), "--output", str(output)]
    assert main([*arguments, "--vocab-size", "300"]) == 0
    assert "300 entries" in capsys.readouterr().out
    assert load_tokenizer(str(output)).vocab_size == 300
    assert "at least 257 entries" in refused(capsys, [*arguments, "--vocab_size", "5"])


# ---- the demo -----------------------------------------------------------------------------------

STEPS = 12
QUICK = {
    "preset": "debug",
    "warmup_steps": 2,
    "max_steps": STEPS,
    "eval_interval": 4,
    "val_tokens": 256,
    "save_interval": 0,
    "samples": 2,
}


@pytest.fixture
def small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which ``nanokimi demo`` takes a second; its output goes to the path returned."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SETTINGS", demo.SETTINGS | QUICK)
    (tmp_path / "data").mkdir()
    text = Path(argparse.__file__).read_text(encoding="utf-8")[:20_000]
    (tmp_path / demo.TEXT).write_text(text, encoding="utf-8")
    return tmp_path / "runs" / "demo"


def steps_of(output: Path) -> list[int]:
    steps: list[int] = json.loads((output / "logs" / "training_metrics.json").read_text())["steps"]
    return steps


def bits_per_byte(report: str) -> list[float]:
    """Before and after, from the demo's report."""
    return [float(bits) for bits in re.findall(r"training: (\d+\.\d+) bits per byte on held-out files", report)]


def test_the_demo_trains_shows_samples_and_reports(small_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seconds", "600"]) == 0
    said = capsys.readouterr()
    before, after = bits_per_byte(said.out)
    assert before == pytest.approx(8, abs=0.1)  # nothing is known of the next byte
    assert after < before - 1
    assert said.err.count("--- sample at step") == 1  # the other one is the report's
    assert steps_of(small_demo) == list(range(1, STEPS + 1))
    plot = Path("runs/demo/logs/training_metrics.png")
    assert f"The run in one picture: {plot}" in said.out
    assert plot.is_file()
    assert said.out.rpartition("Next:\n")[2].count(".py ") == 3


def test_an_interrupted_demo_goes_on_when_called_again_and_a_finished_one_only_reports(
    small_demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(trainer: Trainer, batches: Any) -> dict[str, Any]:
        if trainer.counters.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(trainer, batches)

    train_step = Trainer._train_step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        assert main(["demo", "--seconds", "600"]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert checkpoint.read(small_demo / "checkpoints" / "latest.pt")["counters"]["step"] == 6

    assert main(["demo", "--seconds", "600"]) == 0
    resumed = capsys.readouterr()
    assert "latest.pt at step 6 of 12" in resumed.err
    assert steps_of(small_demo) == list(range(1, STEPS + 1))

    final = (small_demo / "checkpoints" / "final.pt").read_bytes()
    assert main(["demo", "--seconds", "600"]) == 0
    assert bits_per_byte(capsys.readouterr().out) == bits_per_byte(resumed.out)
    assert (small_demo / "checkpoints" / "final.pt").read_bytes() == final


def test_without_a_text_the_demo_makes_one(small_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = demo.TEXT.read_bytes()
    demo.TEXT.unlink()

    def prepare(output: Path) -> str:
        output.write_bytes(text)
        return "made"

    monkeypatch.setattr(demo, "prepare_stdlib", prepare)
    monkeypatch.setattr(demo, "SETTINGS", demo.SETTINGS | {"max_steps": 1})
    assert main(["demo", "--seconds", "600"]) == 0
    assert demo.TEXT.read_bytes() == text


def test_the_demo_ends_when_its_seconds_are_over(small_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.SETTINGS, "max_steps", 10**9)
    assert main(["demo", "--seconds", "0.3"]) == 0
    assert (small_demo / "checkpoints" / "final.pt").is_file()


def test_memory_that_runs_out_anywhere_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def take_too_much(*_: object, **__: object) -> str:
        raise MemoryError

    monkeypatch.setattr("nanokimi.data.prepare.prepare_stdlib", take_too_much)
    assert main(["prepare", "stdlib", "--output", "x"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nanokimi: out of memory: ")
