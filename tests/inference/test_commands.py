from __future__ import annotations

import argparse
import copy
import io
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import InterruptedModel, ScriptedModel
from torch import Tensor

from nanokimi.cli_settings import Parser
from nanokimi.console import printable, protect_streams
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.errors import RunError, UserError
from nanokimi.inference.commands import add_generate_arguments, run_generate
from nanokimi.inference.decoding import new_decoder, use_weights_
from nanokimi.inference.generate import generate
from nanokimi.inference.options import WEIGHT_FORMATS
from nanokimi.model.transformer import Transformer
from nanokimi.native import build


def run(monkeypatch: pytest.MonkeyPatch, model: ScriptedModel | Transformer, *flags: str) -> int:
    monkeypatch.setattr("nanokimi.interop.loading.load", lambda path, device: (model, load_tokenizer("byte")))
    return run_generate(parsed("model.pt", "--device", "cpu", "--temperature", "0", *flags))


def parsed(*arguments: str) -> argparse.Namespace:
    parser = Parser()
    add_generate_arguments(parser)
    return parser.parse_args(arguments)


def test_prompt_and_continuation_go_to_stdout_and_the_speed_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, ScriptedModel(b"main()"), "--prompt", "def ", "--max_tokens", "6") == 0
    captured = capsys.readouterr()
    assert captured.out == "def main()\n"
    assert "tokens/s" in captured.err
    assert captured.err.endswith("finish_reason length]\n")


@pytest.mark.fault(83)
def test_stream_writes_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = ScriptedModel("é日本 END\x1b[31m".encode())
    for flags in ([], ["--stop", "END"], ["--max_tokens", "4"]):
        run(monkeypatch, model, "--prompt", "x", *flags)
        whole = capsys.readouterr().out
        run(monkeypatch, model, "--prompt", "x", "--stream", *flags)
        assert capsys.readouterr().out == whole


def test_several_stop_strings_may_be_given(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, ScriptedModel(b"one two"), "--stop", "zz", "--stop", " t", "--stream") == 0
    captured = capsys.readouterr()
    assert captured.out == "one\n"
    assert "finish_reason stop" in captured.err


@pytest.mark.parametrize("flags", [[], ["--stream"]])
def test_ctrl_c_keeps_what_was_written_and_exits_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert run(monkeypatch, InterruptedModel(b"abc"), "--prompt", "x", *flags) == 130
    captured = capsys.readouterr()
    assert captured.out == "xabc\n"
    assert "finish_reason interrupted" in captured.err


@pytest.mark.fault("A21")
@pytest.mark.parametrize("flags", [["--stream"], ["--interactive"]])
def test_an_error_while_a_text_is_written_begins_on_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    class BreakingModel(ScriptedModel):
        def forward(self, *args: Any, **named: Any) -> Tensor:
            logits = super().forward(*args, **named)
            return logits if self.written < 4 else logits * torch.nan

    with pytest.raises(RunError, match="not finite"):
        run(monkeypatch, BreakingModel(b"abcdef"), "--prompt", "x", *flags)
    written = capfd.readouterr()
    assert (written.out + written.err).rstrip(" ").endswith("abc\n")


@pytest.mark.parametrize("flags", [[], ["--stream"], ["--interactive"]])
def test_a_reader_that_leaves_is_no_error(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        for name in ("stdout", "__stdout__"):
            monkeypatch.setattr(sys, name, stdout)
        protect_streams()
        monkeypatch.setattr(sys, "stdin", io.StringIO("x\n"))
        assert run(monkeypatch, ScriptedModel(b"abc"), "--prompt", "x", *flags) == 0


def test_a_talk_scripted_through_a_pipe_survives_bytes_that_are_not_utf8(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ScriptedModel(b"abc")
    stdin = io.TextIOWrapper(io.BytesIO(b"one\ncaf\xe9\n/quit\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run(monkeypatch, model, "--interactive", "--max_tokens", "3") == 0
    assert [bytes(ids).decode() for ids in model.prompts] == ["one", "oneabc\ncaf\N{REPLACEMENT CHARACTER}"]
    assert capsys.readouterr().out.count("abc\n[3 tokens") == 2


SOURCE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
CONTINUES, TALKS = "This is a base model", "This model talks in turns, by "


@pytest.mark.parametrize(
    ("own", "flags", "told", "read"),
    [
        (None, [], CONTINUES, "hi"),
        (SOURCE, [], TALKS + "the chat template of tokenizer byte.", "user: hi\nassistant:"),
        (SOURCE, ["--chat_template", "none"], CONTINUES, "hi"),
        (None, ["--chat_template", "FILE"], TALKS + "--chat_template FILE.", "user: hi\nassistant:"),
        ("{{ messages }}", ["--chat-template", "FILE", "--system", "S"], TALKS, "system: S\nuser: hi\nassistant:"),
    ],
)
def test_a_talk_is_in_turns_where_there_is_a_chat_template(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    own: str | None,
    flags: list[str],
    told: str,
    read: str,
) -> None:
    tokenizer, model = load_tokenizer("byte"), ScriptedModel(b"abc")
    tokenizer.chat_template = own
    monkeypatch.setattr("nanokimi.interop.loading.load", lambda path, device: (model, tokenizer))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text(SOURCE)
    assert run_generate(parsed("model.pt", "--device", "cpu", "--max_tokens", "3", "--interactive", *flags)) == 0
    assert capsys.readouterr().out.startswith(told)
    assert [bytes(ids).decode() for ids in model.prompts] == [read]


@pytest.mark.parametrize(("flags", "kept"), [([], True), (["--no_history"], False)])
def test_what_is_typed_is_kept_unless_the_user_says_no(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], kept: bool
) -> None:
    asked = []
    monkeypatch.setattr(
        "nanokimi.inference.chat.line_reader", lambda *_, keep_history: asked.append(keep_history) or nullcontext(input)
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert run(monkeypatch, ScriptedModel(b"abc"), "--interactive", *flags) == 0
    assert asked == [kept]


@pytest.mark.parametrize("flag", ["--chat_template", "--system"])
def test_flags_of_a_talk_are_refused_for_one_prompt(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    with pytest.raises(UserError, match=f"{flag} is for talks: use nanokimi chat"):
        run(monkeypatch, ScriptedModel(b"abc"), flag, "x")


@pytest.mark.fault(71, 72, 76)
@pytest.mark.parametrize("flags", [["--temperature", "-1"], ["--top_p", "2"], ["--max-tokens", "-1"], ["--stop", ""]])
def test_a_bad_flag_is_refused_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    monkeypatch.setattr("nanokimi.interop.loading.load", lambda path, device: pytest.fail("loaded"))
    with pytest.raises(UserError, match=flags[0].replace("-", "[-_]")):
        run_generate(parsed("model.pt", *flags))


@pytest.mark.parametrize("kind", ["eager", "native"])
@pytest.mark.parametrize("chosen", WEIGHT_FORMATS)
def test_weights_are_rounded_before_the_text_is_written(
    debug_model: Transformer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    chosen: str,
    kind: str,
) -> None:
    if kind == "native" and isinstance(reason := build._outcome(), str):
        pytest.skip(reason)
    rounded = copy.deepcopy(debug_model)
    use_weights_(rounded, chosen)
    decoder = new_decoder(rounded, kind=kind, weights=chosen)
    expected = generate(rounded, load_tokenizer("byte"), "abc", max_tokens=30, temperature=0.0, decoder=decoder)
    flags = ["--prompt", "abc", "--max_tokens", "30", "--weights", chosen, "--decoder", kind]
    assert run(monkeypatch, debug_model, *flags) == 0
    assert capsys.readouterr().out == printable("abc" + expected) + "\n"


def test_a_decoder_that_cannot_be_is_a_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--decoder graph needs a CUDA device: use --decoder auto"):
        run(monkeypatch, ScriptedModel(b"abc"), "--decoder", "graph")


def test_the_choices_named_in_the_help_are_those_that_exist() -> None:
    for flag in ("--weights", "--decoder"):
        with pytest.raises(SystemExit):
            parsed("m.pt", flag, "other")


@pytest.mark.fault(82)
def test_a_missing_model_file_is_a_mistake_of_the_user() -> None:
    with pytest.raises(UserError, match=r"missing\.pt"):
        run_generate(parsed("missing.pt", "--device", "cpu"))


def test_underscores_and_dashes_both_work() -> None:
    dashes = parsed("m.pt", "--max-tokens", "7", "--top-p", "0.5", "--top-k", "3", "--min-p", "0.1")
    assert dashes == parsed("m.pt", "--max_tokens", "7", "--top_p", "0.5", "--top_k", "3", "--min_p", "0.1")


def test_the_documented_defaults() -> None:
    assert vars(parsed("m.pt")) == {
        "checkpoint": "m.pt",
        "prompt": "",
        "max_tokens": 100,
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": [],
        "device": "auto",
        "weights": "fp32",
        "decoder": "auto",
        "stream": False,
        "interactive": False,
        "chat_template": "",
        "system": "",
        "no_history": False,
    }


def test_the_flags_are_listed_without_importing_torch() -> None:
    code = "import sys, nanokimi.inference.commands; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
