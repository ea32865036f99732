from __future__ import annotations

import itertools
import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from nanokimi.config import TrainConfig
from nanokimi.data import corpus as corpus_module
from nanokimi.data import documents, sources, token_files
from nanokimi.data.batch import TokenArray
from nanokimi.data.corpus import Corpus
from nanokimi.data.documents import Text
from nanokimi.data.sources import train_tokenizer_on
from nanokimi.data.token_files import TokenSet, write_token_set
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from nanokimi.errors import RunError, UserError

LINES = "".join(f"line {i} of a small text, with words\n" for i in range(60))


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "train.txt"
    path.write_text(LINES)
    return path


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows by one folder with each tokenisation that is not answered from the cache."""
    made: list[Path] = []

    def counted(text: Text, tokenizer: Tokenizer, folder: Path) -> TokenSet:
        made.append(folder)
        return write_token_set(text, tokenizer, folder)

    monkeypatch.setattr(corpus_module, "write_token_set", counted)
    return made


def open_corpus(
    path: Path, tokenizer_name: str, *, log: Any = print, tokenizer: Tokenizer | None = None, **settings: Any
) -> Corpus:
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    config = TrainConfig(data_path=str(path), **settings)
    return sources.open_corpus(config, tokenizer_name, tokenizer=tokenizer, log=log)


def train_row(corpus: Corpus) -> TokenArray:
    assert corpus.train.tokens is not None
    return corpus.train.tokens


def texts(corpus: Corpus, row: TokenArray | None) -> list[str]:
    """The documents of a row, decoded; each must end in exactly one end of text."""
    assert row is not None
    found: list[list[int]] = [[]]
    for token in row.read(0, len(row)).tolist():
        if token == corpus.tokenizer.eot_id:
            found.append([])
        else:
            found[-1].append(token)
    assert found.pop() == []
    return [corpus.tokenizer.decode(tokens) for tokens in found]


@pytest.mark.parametrize("name", ["byte", "bpe:280"])
@pytest.mark.parametrize("batch", [1, 500, 1 << 21])
def test_every_document_is_found_exactly_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, batch: int
) -> None:
    monkeypatch.setattr(token_files, "BATCH_CHARACTERS", batch)
    monkeypatch.setattr(documents, "PIECE_BYTES", 50)
    wanted = [f"document {i}\n" * (i % 9 + 1) for i in range(150)]
    (tmp_path / "t.txt").write_text("<|endoftext|>\n".join(wanted))
    corpus = open_corpus(tmp_path / "t.txt", name, val_fraction=0.2)
    train, val = texts(corpus, train_row(corpus)), texts(corpus, corpus.val)
    assert sorted(train + val) == sorted(wanted)
    assert f" {sum(map(len, train)):,} bytes; held out" in corpus.summary
    assert "150" not in corpus.summary  # the parts are counted one by one
    assert f"training on {len(train)} documents" in corpus.summary
    assert f"held out (by hash): {len(val)} documents" in corpus.summary


def test_a_single_text_loses_its_end_to_the_held_out_part(path: Path) -> None:
    corpus = open_corpus(path, "byte", val_fraction=0.1)
    (train,), (val,) = texts(corpus, train_row(corpus)), texts(corpus, corpus.val)
    assert train + val == LINES
    assert "the last 0.1 of the text" in corpus.summary


def test_the_bytes_behind_the_tokens_are_exact(path: Path) -> None:
    path.write_text("naïve 😀 漢字\n" * 50)
    corpus = open_corpus(path, "bpe:270", val_fraction=0)
    row = train_row(corpus)
    size = path.stat().st_size
    assert corpus.tokenizer.count_bytes(torch.from_numpy(row.read(0, len(row)))) == size
    assert f" {size:,} bytes; nothing held out" in corpus.summary


def test_no_share_means_no_validation(path: Path) -> None:
    corpus = open_corpus(path, "byte", val_fraction=0.0)
    assert corpus.val is None
    assert "nothing held out" in corpus.summary


def test_a_held_out_file_takes_the_place_of_the_share(path: Path, tmp_path: Path) -> None:
    val = tmp_path / "val.txt"
    val.write_text("held\n<|endoftext|>\nout\n")
    corpus = open_corpus(path, "byte", val_path=val, val_fraction=0.5)
    assert texts(corpus, train_row(corpus)) == [LINES]
    assert texts(corpus, corpus.val) == ["held\n", "out\n"]


def test_the_training_text_cannot_be_its_own_held_out_text(path: Path) -> None:
    with pytest.raises(UserError, match=r"--val_path .* is the training text itself"):
        open_corpus(path, "byte", val_path=path)


def test_a_bpe_is_trained_on_the_training_part_only(path: Path) -> None:
    corpus = open_corpus(path, "bpe:300", val_fraction=0.25)
    assert corpus.tokenizer.fingerprint == train_bpe(texts(corpus, train_row(corpus)), 300).fingerprint
    assert corpus.tokenizer.fingerprint != train_bpe([LINES], 300).fingerprint


def test_a_text_too_small_for_its_bpe_is_reported(path: Path) -> None:
    said: list[str] = []
    open_corpus(path, "bpe:4096", log=said.append)
    assert any("of the 4096 entries" in line for line in said)


def test_a_tokenizer_of_ones_own_sees_the_training_part_only(path: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "tokenizer.json"
    summary = train_tokenizer_on(path, 280, output)
    assert "280 entries" in summary
    assert load_tokenizer(str(output)).fingerprint == open_corpus(path, "bpe:280").tokenizer.fingerprint
    with pytest.raises(UserError, match=r"--output .* cannot be written"):
        train_tokenizer_on(path, 280, path / "tokenizer.json")


# ---- the cache --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["byte", "bpe:280"])
def test_an_unchanged_text_is_read_once(path: Path, built: list[Path], name: str) -> None:
    first = open_corpus(path, name)
    again = open_corpus(path, name)
    assert len(built) == 1
    assert texts(again, train_row(again)) == texts(first, train_row(first))
    assert (again.summary, again.tokenizer.name) == (first.summary, name)


@pytest.mark.fault(12)
def test_an_edited_text_is_read_again_and_its_old_tokens_go(path: Path, built: list[Path]) -> None:
    open_corpus(path, "bpe:280")
    stat = path.stat()
    path.write_text(LINES.replace("small", "large"))  # the same size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    corpus = open_corpus(path, "bpe:280")
    assert len(built) == 2
    assert "large" in texts(corpus, train_row(corpus))[0]
    assert len(os.listdir(built[1].parent)) == 2  # the tokenizer, and a folder of tokens
    assert built[1].is_dir()
    assert not built[0].exists()


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_name": "bpe:280"},
        {"val_fraction": 0.2},
        {"val_fraction": 0.0},
        {"encoding_errors": "replace"},
        {"tokenizer": train_bpe([LINES], 270)},
    ],
)
def test_another_tokenizer_or_split_is_read_again_and_the_first_is_kept(
    path: Path, built: list[Path], change: dict[str, Any]
) -> None:
    usual: dict[str, Any] = {"tokenizer_name": "byte", "val_fraction": 0.1}
    open_corpus(path, **usual)
    open_corpus(path, **{**usual, **change})
    assert len(built) == 2
    open_corpus(path, **usual)
    open_corpus(path, **{**usual, **change})
    assert len(built) == 2


def test_another_held_out_text_is_read_again(path: Path, tmp_path: Path, built: list[Path]) -> None:
    val = tmp_path / "val.txt"
    val.write_text("one\n")
    open_corpus(path, "byte", val_path=val)
    val.write_text("other\n")
    corpus = open_corpus(path, "byte", val_path=val)
    assert texts(corpus, corpus.val) == ["other\n"]


@pytest.mark.fault(14)
@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "garbage"])
def test_damaged_tokens_are_made_again(path: Path, built: list[Path], part: str, damage: str) -> None:
    first = open_corpus(path, "byte")
    wanted = texts(first, train_row(first)), texts(first, first.val)
    file = built[0] / f"{part}-00000.bin"
    file.unlink()  # not in place: the first corpus still maps the old file
    if damage != "missing":
        file.write_bytes({"truncated": b"NKTOKENS", "garbage": b"x" * 20_000}[damage])
    again = open_corpus(path, "byte")
    assert (texts(again, train_row(again)), texts(again, again.val)) == wanted
    assert len(built) == 2


def test_a_damaged_tokenizer_is_trained_again(path: Path, built: list[Path]) -> None:
    fingerprint = open_corpus(path, "bpe:280").tokenizer.fingerprint
    (file,) = built[0].parent.glob("*.tokenizer.json")
    file.write_text("{")
    assert open_corpus(path, "bpe:280").tokenizer.fingerprint == fingerprint
    assert len(built) == 1


@pytest.mark.fault(15)
def test_beside_a_read_only_text_the_users_cache_is_used(path: Path, cache_home: Path, built: list[Path]) -> None:
    path.with_name("train.txt.nanokimi").touch()  # a folder cannot be made there
    open_corpus(path, "bpe:280")
    open_corpus(path, "bpe:280")
    assert len(built) == 1
    assert cache_home in built[0].parents


def test_nowhere_to_write_is_an_error_that_names_the_folders(path: Path, cache_home: Path) -> None:
    path.with_name("train.txt.nanokimi").touch()
    cache_home.touch()
    with pytest.raises(UserError, match=r"train\.txt\.nanokimi and .*cache.* cannot be written"):
        open_corpus(path, "byte")


@pytest.mark.fault(63)
def test_a_full_disk_is_a_run_error_and_leaves_nothing_half_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanokimi.data.token_files.TokenWriter.add", full)
    with pytest.raises(RunError, match="disk is full"):
        open_corpus(path, "byte")
    (folder,) = path.with_name("train.txt.nanokimi").iterdir()
    assert sorted(os.listdir(folder)) == ["manifest.json", "tokenizer.json"]  # and the next try goes on from there


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "BATCH_CHARACTERS", 100)
    monkeypatch.setattr(documents, "PIECE_BYTES", 50)


@pytest.mark.usefixtures("small_batches")
def test_a_text_that_changes_while_it_is_read_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_batch = Tokenizer.encode_batch

    def slow(self: Tokenizer, batch: list[str]) -> list[list[int]]:
        path.write_text(LINES + "more\n")
        return encode_batch(self, batch)

    monkeypatch.setattr(Tokenizer, "encode_batch", slow)
    with pytest.raises(UserError, match="changed while it was read"):
        open_corpus(path, "byte")
    assert not list(path.with_name("train.txt.nanokimi").glob("*/*.bin"))


@pytest.mark.usefixtures("small_batches")
def test_a_run_killed_half_way_leaves_nothing_that_is_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = os.fork()
    if child == 0:
        encode_batch, calls = Tokenizer.encode_batch, itertools.count()

        def killed(self: Tokenizer, batch: list[str]) -> list[list[int]]:
            if next(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode_batch(self, batch)

        monkeypatch.setattr(Tokenizer, "encode_batch", killed)
        open_corpus(path, "byte")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = [file.name for file in path.with_name("train.txt.nanokimi").glob("*/*.bin*")]
    assert left
    assert all(name.startswith(".") for name in left)
    corpus = open_corpus(path, "byte", val_fraction=0.1)
    assert "".join(texts(corpus, train_row(corpus)) + texts(corpus, corpus.val)) == LINES


def test_a_run_that_starts_while_another_tokenises_the_text_waits_for_its_tokens(
    path: Path, built: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_batch = Tokenizer.encode_batch
    later: list[Future[Corpus]] = []

    def overtaken(self: Tokenizer, batch: list[str]) -> list[list[int]]:
        if not later:
            later.append(runs.submit(open_corpus, path, "byte"))
            wait(later, timeout=0.5)
            assert not later[0].done()
        return encode_batch(self, batch)

    monkeypatch.setattr(Tokenizer, "encode_batch", overtaken)
    with ThreadPoolExecutor(1) as runs:
        first = open_corpus(path, "byte")
        second = later[0].result(timeout=60)
    assert len(built) == 1
    assert texts(first, train_row(first)) == texts(second, train_row(second))
    TokenSet.open(built[0], verify=True)


# ---- faults -----------------------------------------------------------------------------------------------


@pytest.mark.fault(1)
@pytest.mark.parametrize("text", ["\n", " \t\r\n", "<|endoftext|>\n", "\n<|endoftext|>\n \n<|endoftext|>"])
def test_a_blank_text_is_an_error(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(UserError, match=r"--data_path .*the text is blank"):
        open_corpus(path, "byte")


@pytest.mark.fault(41)
def test_a_blank_held_out_text_is_an_error(path: Path, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("\n")
    with pytest.raises(UserError, match=r"--val_path .*the text is blank"):
        open_corpus(path, "byte", val_path=tmp_path / "val.txt")


@pytest.mark.fault(6)
def test_a_text_that_is_not_utf8_leaves_no_cache(path: Path) -> None:
    path.write_bytes(b"abc\xff")
    with pytest.raises(UserError, match=r"train\.txt: not UTF-8 at byte 3"):
        open_corpus(path, "byte")
    assert not path.with_name("train.txt.nanokimi").exists()


@pytest.mark.fault(10)
def test_nul_bytes_are_counted_in_a_warning_each_time(path: Path) -> None:
    path.write_text("a\0b\0" + LINES)
    for _ in range(2):
        said: list[str] = []
        open_corpus(path, "byte", log=said.append)
        assert said == [f"warning: {path} holds 2 NUL bytes: is it really text?"]


def test_special_token_text_inside_a_line_stays_text(path: Path) -> None:
    path.write_text("see <|endoftext|> here\n")
    corpus = open_corpus(path, "byte", val_fraction=0)
    assert texts(corpus, train_row(corpus)) == ["see <|endoftext|> here\n"]


def test_a_given_tokenizer_wins_over_the_name(path: Path) -> None:
    assert open_corpus(path, "no/such", tokenizer=load_tokenizer("byte")).tokenizer.name == "byte"
