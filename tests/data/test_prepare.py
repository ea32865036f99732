"""``nanokimi prepare tokens``: what it makes, how it goes on after a kill, and what it refuses."""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import locked_folder
from streams import write_json_lines, write_parquet, write_text

from nanokimi import checkpoint
from nanokimi.cli import main
from nanokimi.config import TrainConfig
from nanokimi.data import token_files
from nanokimi.data.sources import open_corpus
from nanokimi.data.token_files import Manifest, TokenFile, TokenSet, TokenWriter
from nanokimi.data.tokenizer import load_tokenizer

PROGRESS = ("reading ", "tokenising ", "training the tokenizer on ")
BATCH_CHARACTERS = 500  # a shard ends with a batch
SHARDS = ("--shard_tokens", "1000")
CHILD = f"""
import sys, time
from nanokimi.cli import main
from nanokimi.data import token_files
from nanokimi.data.tokenizer import Tokenizer

encode_batch, token_files.BATCH_CHARACTERS = Tokenizer.encode_batch, {BATCH_CHARACTERS}

def slow(self, texts):
    time.sleep(0.03)
    return encode_batch(self, texts)

Tokenizer.encode_batch = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(token_files, "BATCH_CHARACTERS", BATCH_CHARACTERS)
    monkeypatch.setattr(
        "nanokimi.training.plots.plot_training", lambda *args, **options: None
    )  # it takes half a second


@pytest.fixture
def texts() -> list[str]:
    rng = random.Random(0)
    words = ["one", "two", "three", "naïve", "😀", "\n"]
    return [f"{i} " + " ".join(rng.choices(words, k=rng.randint(1, 60))) + "\n" for i in range(150)]


@pytest.fixture
def text(tmp_path: Path, texts: list[str]) -> Path:
    write_text(tmp_path / "text.txt", texts)
    return tmp_path / "text.txt"


def flags(source: Path, output: Path, *more: str) -> list[str]:
    return ["prepare", "tokens", "--preset", "debug", "--data_path", str(source), "--output", str(output), *more]


def of_set(output: Path) -> tuple[list[int], list[int]]:
    """Tokens to train on and held-out ones, from all shards."""
    found = TokenSet.open(output, verify=True)
    train, val = ([token for file in files for token in file.tokens.tolist()] for files in (found.train, found.val))
    return train, val


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line with which a command is refused, beside lines about progress."""
    capsys.readouterr()
    try:
        code: Any = main(arguments)
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    (line,) = (line for line in said.err.splitlines() if not line.startswith(PROGRESS))
    return line


# ---- what it makes ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
@pytest.mark.parametrize("more", [(), SHARDS])
def test_the_tokens_are_those_that_a_local_run_trains_on(
    tmp_path: Path, text: Path, texts: list[str], kind: str, tokenizer: str, more: tuple[str, ...]
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"  # so that neither finds the other's cache
    if kind == "folder":
        here.mkdir()
        write_text(here / "a.txt", texts[:50])
        write_json_lines(here / "b.jsonl.gz", texts[50:100])
        write_parquet(here / "c.parquet", texts[100:])
        shutil.copytree(here, there)
    else:
        here, there = text, Path(shutil.copy(text, there.with_suffix(".txt")))
    output = tmp_path / "tokens"
    assert main(flags(here, output, "--val_fraction", "0.1", "--set", f"tokenizer_name={tokenizer}", *more)) == 0
    local = open_corpus(TrainConfig(data_path=str(there), val_fraction=0.1), tokenizer, log=lambda line: None)
    assert local.train.tokens is not None
    assert local.val is not None
    row = local.train.tokens
    assert of_set(output) == (row.read(0, len(row)).tolist(), local.val.read(0, len(local.val)).tolist())
    assert load_tokenizer(str(output)).fingerprint == local.tokenizer.fingerprint
    assert (len(TokenSet.open(output).train) > 3) == bool(more)
    decoded = "".join(map(local.tokenizer.decode, of_set(output))).split("<|endoftext|>")
    assert sorted(decoded) == sorted([*texts, ""])


def test_training_on_the_files_gives_the_losses_of_a_local_run_to_the_bit(tmp_path: Path, text: Path) -> None:
    output, split = tmp_path / "tokens", ("--val_fraction", "0.1")
    assert main(flags(text, output, *split, *SHARDS, "--set", "tokenizer_name=bpe:300")) == 0
    quick = ["train", "--preset", "debug", "--max_steps", "4", "--eval_interval", "2", "--save_interval", "0"]
    quick += ["--warmup_steps", "2", "--set", "max_seq_length=32"]
    sources = {
        "local": ["--data_path", str(text), "--set", "tokenizer_name=bpe:300", *split],
        "tokenbin": ["--dataset", "tokenbin", "--data_path", str(output)],
    }
    seen = {}
    for name, source in sources.items():
        assert main([*quick, *source, "--output_dir", str(tmp_path / name)]) == 0
        history = json.loads((tmp_path / name / "logs" / "training_metrics.json").read_text())
        seen[name] = [history[column] for column in ("train_ce_loss", "grad_norm", "val_loss", "val_bits_per_byte")]
    assert seen["local"] == seen["tokenbin"]
    assert [len(column) for column in seen["local"]] == [4, 4, 2, 2]
    one, two = (checkpoint.read(tmp_path / name / "checkpoints" / "final.pt")["model"] for name in sources)
    assert all(bool((one[name] == two[name]).all()) for name in one)


@pytest.mark.fault(10, 30)
def test_the_summary_is_on_stdout_and_the_progress_on_stderr(
    tmp_path: Path, text: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(text, [*texts, " \n", "\n", "a\0b\0\0\n"])
    output = tmp_path / "tokens"
    assert main(flags(text, output, "--val_fraction", "0")) == 0
    said = capsys.readouterr()
    n_bytes = sum(len(t.encode()) for t in texts) + 6
    first, files, speed, command = said.out.splitlines()
    counts = f"training on 151 documents, {n_bytes + 151:,} tokens, {n_bytes:,} bytes; nothing held out"
    assert first.startswith(counts)
    assert files == (
        f"{output}: 1 token file, tokenizer byte; left out 2 documents without text; 3 NUL bytes: is it really text?"
    )
    assert re.fullmatch(r"0\.0 MB in [\d.,]+ s: [\d.,]+ MB/s", speed)
    assert command == f"train on it: nanokimi train --dataset tokenbin --data_path {output}"
    assert [line.split(" (")[0] for line in said.err.splitlines()] == [f"reading {text}", f"tokenising {text}"]


def test_called_again_when_complete_nothing_is_done(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tokens"
    assert main(flags(text, output, *SHARDS)) == 0
    first, before = capsys.readouterr().out.splitlines(), {p: p.stat().st_mtime_ns for p in output.iterdir()}
    assert main(flags(text, output, *SHARDS)) == 0
    said = capsys.readouterr()
    again = said.out.splitlines()
    assert {p: p.stat().st_mtime_ns for p in output.iterdir()} == before
    assert [*again[:2], again[3]] == [*first[:2], first[3]]
    assert again[2] == "it was complete: nothing was left to do"
    assert "tokenising" not in said.err


# ---- ended on the way ---------------------------------------------------------------------------


@pytest.fixture
def child(tmp_path: Path, text: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a process that prepares ``text`` slowly; it has written two shards when this returns."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        output = tmp_path / "tokens"
        command = [sys.executable, "-c", CHILD, *flags(text, output, *SHARDS)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        deadline = time.monotonic() + 60
        while not (output / "manifest.json").exists() or len(Manifest.read(output).shards) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def assert_it_goes_on(output: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is done stays as it is, and the whole equals one that was never interrupted."""
    left = Manifest.read(output)
    done = [output / name for names in left.shards for name in names]
    before = [path.stat().st_mtime_ns for path in done]
    capsys.readouterr()
    assert main(flags(text, output, *SHARDS)) == 0
    said = capsys.readouterr()
    assert f"going on after {left.bytes_read / 1e6:.1f} MB" in said.err
    assert re.search(r"MB in .* MB/s", said.out)
    assert [path.stat().st_mtime_ns for path in done] == before
    whole = output.with_name("whole")
    assert main(flags(text, whole, *SHARDS)) == 0
    found, wanted = contents(output), contents(whole)
    for both in (found, wanted):
        manifest = json.loads(both.pop("manifest.json"))
        assert manifest["complete"]
    assert {name: data for name, data in found.items() if not name.startswith(".")} == wanted


def test_killed_it_goes_on_behind_the_last_whole_shard(
    tmp_path: Path, text: Path, child: Callable[[], subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    process = child()
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    output = tmp_path / "tokens"
    train = ["train", "--preset", "debug", "--dataset", "tokenbin", "--data_path", str(output)]
    line = refused(capsys, [*train, "--output_dir", str(tmp_path / "run")])
    assert "was never finished: run the same `nanokimi prepare` again, it goes on" in line
    assert_it_goes_on(output, text, capsys)


def test_a_second_process_is_refused_and_ctrl_c_leaves_what_is_done(
    tmp_path: Path, text: Path, child: Callable[[], subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    process, output = child(), tmp_path / "tokens"
    process.send_signal(signal.SIGSTOP)  # or it may be done before it is interrupted
    assert f"--output {output}: another process is writing there" in refused(capsys, flags(text, output, *SHARDS))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "nanokimi: interrupted"
    assert "Traceback" not in err
    assert not list(output.glob("*.tmp")) + list(output.glob(".*.tmp"))
    assert_it_goes_on(output, text, capsys)


@pytest.mark.fault(63)
def test_a_full_disk_ends_it_in_one_line_and_it_goes_on(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add, output = TokenWriter.add, tmp_path / "tokens"

    def full(self: TokenWriter, tokens: list[int], n_bytes: int) -> None:
        if (output / "train-00001.bin").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, tokens, n_bytes)

    with monkeypatch.context() as patched:
        patched.setattr(TokenWriter, "add", full)
        assert main(flags(text, output, *SHARDS)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"nanokimi: the token set {output} cannot be written: the disk is full: free space"
    assert_it_goes_on(output, text, capsys)


# ---- mistakes: one line, exit code 2 ------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--shard_tokens", "0"), "--shard_tokens must be 1 or more, got 0"),
        (("--shard-tokens", "-3"), "--shard_tokens must be 1 or more, got -3"),
        (("--shard_tokens", "many"), "--shard_tokens"),
        (("--mix", "a=1"), "unrecognized arguments: --mix"),
        (("--set", "mix=a=1"), "--mix: prepare one source of text"),
        (("--dataset", "tokenbin"), "--dataset tokenbin: prepare one source of text"),
        (("--dataset", "hfstreaming"), "--hf_repo_name (empty)"),
        (("--data_path", "gone.txt"), "--data_path gone.txt: no such file"),
        (("--val_fraction", "1"), "--val_fraction must be 0 or more and less than 1"),
        (("--set", "tokenizer_name=bpe:3"), "needs at least 257 entries"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, flags(text, tmp_path / "tokens", *more))
    assert not list(tmp_path.glob("tokens/*"))


@pytest.mark.fault(12, 13)
def test_a_folder_with_the_tokens_of_something_else_is_left_as_it_is(
    tmp_path: Path, text: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tokens"
    assert main(flags(text, output)) == 0
    before = contents(output)
    lines = [refused(capsys, flags(text, output, "--set", "tokenizer_name=bpe:300"))]
    lines.append(refused(capsys, flags(text, output, "--val_fraction", "0.2")))
    write_text(text, texts[1:])
    lines.append(refused(capsys, flags(text, output)))
    said = f"nanokimi: {output} holds the tokens of another text, tokenizer or split: choose another folder"
    assert lines == [said] * 3
    assert contents(output) == before


@pytest.mark.parametrize("name", ["notes.md", "train.txt", "model.bin", "run/checkpoints"])
def test_a_folder_with_anything_else_is_left_as_it_is(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    output = tmp_path / "tokens"
    (output / name).parent.mkdir(parents=True)
    (output / name).write_text("kept")
    line = refused(capsys, flags(text, output))
    assert f"--output {output} holds something else ({name.split('/')[0]}): choose a new or empty folder" in line
    assert (output / name).read_text() == "kept"
    assert len(list(output.iterdir())) == 1


def test_a_tokenizer_of_ones_own_is_not_overwritten_by_another(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tokens"
    assert (
        main(["tokenizer", "train", str(text), "--vocab_size", "280", "--output", str(output / "tokenizer.json")]) == 0
    )
    before = contents(output)
    assert "holds another tokenizer" in refused(capsys, flags(text, output))
    assert contents(output) == before
    named = f"tokenizer_name={output / 'tokenizer.json'}"  # also what a kill before the first shard leaves
    assert main(flags(text, output, "--set", named)) == 0
    assert TokenFile.open(output / "train-00000.bin").vocab_size == 280


def test_an_output_that_cannot_be_a_folder_is_one_line(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    locked = locked_folder(tmp_path)
    for output in (tmp_path / "file", tmp_path / "file" / "below", locked, locked / "below"):
        assert f"--output {output}: cannot be written" in refused(capsys, flags(text, output))
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_output_inside_the_text_does_not_become_part_of_it(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    write_text(folder / "a.txt", texts)
    for source in (folder, Path(f"{folder / 'a.txt'}, {folder}")):
        assert main(flags(source, folder / "tokens")) == 0
        first = capsys.readouterr().out
        assert main(flags(source, folder / "tokens")) == 0
        again = capsys.readouterr().out
        assert "nothing was left to do" in again
        assert again.splitlines()[0] == first.splitlines()[0]
        shutil.rmtree(folder / "tokens")
    assert main(flags(folder / "a.txt", folder / "tokens")) == 0


@pytest.mark.fault(1, 6)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "the text is blank"),
        (b"one\xff", "not UTF-8 at byte 3"),
    ],
)
def test_a_text_that_cannot_be_used_leaves_no_tokens(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], data: bytes, message: str
) -> None:
    text.write_bytes(data)
    assert message in refused(capsys, flags(text, tmp_path / "tokens"))
    assert not list(tmp_path.glob("tokens/*"))
