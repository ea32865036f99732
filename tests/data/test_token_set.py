from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nanokimi.data import documents, formats, token_files
from nanokimi.data.documents import Text
from nanokimi.data.local import LocalDocuments
from nanokimi.data.token_files import (
    Manifest,
    TokenFile,
    TokenFileError,
    TokenSet,
    TokenWriter,
    can_go_on,
    write_token_set,
)
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer
from nanokimi.errors import UserError

END = 256
SHARD_TOKENS = 1500
BATCH_CHARACTERS = 250


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 100)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 64)
    monkeypatch.setattr(token_files, "BATCH_CHARACTERS", BATCH_CHARACTERS)


@pytest.fixture
def byte() -> Tokenizer:
    return load_tokenizer("byte")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Documents of one piece and of many, some longer than a shard; blank ones between them."""
    return write(tmp_path / "text.txt", 120)


def write(path: Path, count: int, seed: int = 0) -> Path:
    draw = random.Random(seed)
    lengths = [draw.choice([1, 2, 3, 5]) if i % 40 else 60 for i in range(count)]
    texts = ["".join(f"{i} line é {draw.random()}\n" for _ in range(length)) for i, length in enumerate(lengths)]
    texts[5:5] = ["", "\n \n", "nul \0\0\n"]
    path.write_text("<|endoftext|>\n".join(texts))
    return path


def text_of(path: Path, fraction: float = 0.1, val: Path | None = None) -> Text:
    return Text(LocalDocuments(path), None if val is None else LocalDocuments(val), fraction)


def prepare(
    path: Path, folder: Path, tokenizer: Tokenizer, shard_tokens: int = SHARD_TOKENS, **options: object
) -> TokenSet:
    return write_token_set(text_of(path, **options), tokenizer, folder, shard_tokens=shard_tokens)  # type: ignore[arg-type]


def joined(files: list[TokenFile]) -> tuple[list[int], list[int]]:
    """Tokens of a row of files, and where in it documents end."""
    tokens: list[int] = []
    ends: list[int] = []
    for file in files:
        ends += [len(tokens) + int(end) for end in file.document_ends]
        tokens += file.tokens.tolist()
    return tokens, ends


def texts_in(tokens: list[int]) -> list[str]:
    assert tokens[-1] == END
    ends = [i for i, token in enumerate(tokens) if token == END]
    return [bytes(tokens[i + 1 : j]).decode() for i, j in zip([-1, *ends], ends, strict=False)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def bin_files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".bin")}


# ---- shards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hash", "tail", "val file", "nothing"])
@pytest.mark.parametrize("shard_tokens", [1, SHARD_TOKENS, 5000])
def test_shards_joined_are_what_one_file_would_hold(
    tmp_path: Path, byte: Tokenizer, kind: str, shard_tokens: int
) -> None:
    path = write(tmp_path / "text.txt", 50 if kind == "tail" else 120)
    val = write(tmp_path / "val.txt", 30, seed=1) if kind == "val file" else None
    fraction = 0.0 if kind == "nothing" else 0.1
    whole = prepare(path, tmp_path / "whole", byte, 10**9, fraction=fraction, val=val)
    found = prepare(path, tmp_path / "shards", byte, shard_tokens, fraction=fraction, val=val)
    assert len(whole.train) == 1
    assert len(found.train) > 1
    assert len(whole.val) == (kind != "nothing")
    assert joined(found.train) == joined(whole.train)
    assert joined(found.val) == joined(whole.val)
    for name in ("n_bytes", "n_tokens", "n_documents"):
        assert sum(getattr(file, name) for file in found.train) == getattr(whole.train[0], name)
    for file in found.train[:-1]:
        assert shard_tokens <= file.n_tokens < shard_tokens + 2 * (BATCH_CHARACTERS + 100)
    for file in (*found.train, *found.val):
        file.verify()
        assert file.fingerprint == byte.fingerprint
        assert file.document_ends.tolist() == (np.flatnonzero(file.tokens == END) + 1).tolist()


def test_a_document_longer_than_a_shard_is_ended_once(path: Path, tmp_path: Path, byte: Tokenizer) -> None:
    found = prepare(path, tmp_path / "set", byte, 300, fraction=0.0)
    assert any(file.n_documents == 0 for file in found.train)
    assert texts_in(joined(found.train)[0]) == [t for t in path.read_text().split("<|endoftext|>\n") if t.strip()]


def test_every_document_is_on_one_side_and_whole(path: Path, tmp_path: Path, byte: Tokenizer) -> None:
    found = prepare(path, tmp_path / "set", byte, 300)
    train, val = texts_in(joined(found.train)[0]), texts_in(joined(found.val)[0])
    expected = [text for text in path.read_text().split("<|endoftext|>\n") if text.strip()]
    assert sorted(train + val) == sorted(expected)
    assert 2 <= len(val) <= 40
    assert found.manifest.about == "by hash"


def test_the_end_of_few_documents_is_held_out(tmp_path: Path, byte: Tokenizer) -> None:
    path = write(tmp_path / "text.txt", 50)
    found = prepare(path, tmp_path / "set", byte, 300)
    text = path.read_text().replace("<|endoftext|>\n\n \n", "").replace("<|endoftext|>\n", "")
    train, val = ("".join(texts_in(joined(files)[0])) for files in (found.train, found.val))
    assert train + val == text
    assert int(0.1 * len(text)) <= len(val) < int(0.1 * len(text)) + 50


def test_a_folder_carries_its_tokenizer(path: Path, tmp_path: Path, byte: Tokenizer) -> None:
    prepare(path, tmp_path / "set", byte)
    assert load_tokenizer(str(tmp_path / "set" / "tokenizer.json")).fingerprint == byte.fingerprint


@pytest.mark.fault(10, 30)
def test_blank_documents_and_nul_bytes_are_counted(path: Path, tmp_path: Path, byte: Tokenizer) -> None:
    for shard_tokens in (1, 300, 10**9):
        manifest = prepare(path, tmp_path / str(shard_tokens), byte, shard_tokens).manifest
        assert (manifest.n_blank, manifest.nuls) == (2, 2)


def test_a_finished_set_is_not_made_again(path: Path, tmp_path: Path, byte: Tokenizer, encoded: list[int]) -> None:
    prepare(path, tmp_path / "set", byte)
    assert sum(encoded) > 120
    encoded.clear()
    prepare(path, tmp_path / "set", byte)
    assert encoded == []


# ---- killed and started again --------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pieces each call tokenised."""
    counts: list[int] = []
    encode = Tokenizer.encode_batch

    def count(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        counts.append(len(texts))
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", count)
    return counts


def kill_at(owner: object, name: str, number: int, *, after: bool) -> None:
    """This process is killed at the call with this number of a function, counted from 1: before it or after it."""
    inner: Callable[..., object] = getattr(owner, name)
    calls = 0

    def call(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*args, **options)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)


def run_and_be_killed(work: Callable[[], object], owner: object, name: str, number: int, *, after: bool) -> bool:
    """Does ``work`` in a process of its own; whether it was killed."""
    child = os.fork()
    if not child:
        try:
            kill_at(owner, name, number, after=after)
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("kind", ["hash", "val file", "tail"])
@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [(token_files._FilePair, "add", True), (Manifest, "write", False), (os, "replace", True)],
)
def test_a_set_that_was_killed_anywhere_goes_on_to_the_same_result(
    tmp_path: Path, byte: Tokenizer, encoded: list[int], kind: str, owner: object, name: str, after: bool
) -> None:
    path = write(tmp_path / "text.txt", 90 if kind == "tail" else 120)
    val = write(tmp_path / "val.txt", 10, seed=1) if kind == "val file" else None
    whole = prepare(path, tmp_path / "whole", byte, val=val).manifest
    expected, n_pieces = bin_files(tmp_path / "whole"), sum(encoded)
    assert len(whole.shards) > 6
    went_on = 0
    for number in range(1, 100, 7 if name == "add" else 1):
        folder = tmp_path / str(number)
        if not run_and_be_killed(lambda f=folder: prepare(path, f, byte, val=val), owner, name, number, after=after):
            assert number > len(whole.shards)
            break
        complete = (folder / "manifest.json").exists() and Manifest.read(folder).complete
        done = (folder / "manifest.json").exists() and len(Manifest.read(folder).shards)
        encoded.clear()
        prepare(path, folder, byte, val=val)
        assert bin_files(folder) == expected
        manifest = Manifest.read(folder)
        assert (manifest.shards, manifest.n_blank, manifest.nuls) == (whole.shards, whole.n_blank, whole.nuls)
        assert sum(encoded) == 0 if complete else 0 < sum(encoded) <= n_pieces
        if done and not complete:
            went_on += 1
            assert sum(encoded) <= n_pieces - 3 * done
    else:
        pytest.fail("was killed every time")
    assert went_on > 3


def test_a_second_kill_is_survived_too(path: Path, tmp_path: Path, byte: Tokenizer) -> None:
    folder = tmp_path / "set"
    prepare(path, tmp_path / "whole", byte, 500)
    for number in (12, 13, 14, 15):
        assert run_and_be_killed(
            lambda: prepare(path, folder, byte, 500), token_files._FilePair, "add", number, after=False
        )
    assert len(Manifest.read(folder).shards) > 2
    prepare(path, folder, byte, 500)
    assert bin_files(folder) == bin_files(tmp_path / "whole")


@pytest.mark.fault(63)
@pytest.mark.parametrize("number", [1, 20, 110, 180])
def test_a_full_disk_leaves_the_earlier_shards_and_a_second_try_completes(
    path: Path, tmp_path: Path, byte: Tokenizer, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    whole = prepare(path, tmp_path / "whole", byte)
    add, calls = TokenWriter.add, 0

    def fill_up(self: TokenWriter, tokens: list[int], n_bytes: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, tokens, n_bytes)

    folder = tmp_path / "set"
    with monkeypatch.context() as context:
        context.setattr(TokenWriter, "add", fill_up)
        with pytest.raises(OSError, match="No space left"):
            prepare(path, folder, byte)
    shards = Manifest.read(folder).shards
    assert shards == whole.manifest.shards[: len(shards)]
    assert len(shards) > 0 or number < 100
    for name in (name for names in shards for name in names):
        TokenFile.open(folder / name).verify()
    assert not list(folder.glob(".*"))
    assert can_go_on(folder, text_of(path).identity(byte))
    found = prepare(path, folder, byte)
    assert joined(found.train) == joined(whole.train)
    assert joined(found.val) == joined(whole.val)


# ---- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["text", "tokenizer", "split", "settings"])
def test_another_text_tokenizer_or_split_is_refused_in_the_same_folder(
    path: Path, tmp_path: Path, byte: Tokenizer, other: str
) -> None:
    folder = tmp_path / "set"
    prepare(path, folder, byte)
    before = contents(folder)
    if other == "text":
        path.write_text(path.read_text() + "more\n")
    text = text_of(path, 0.2 if other == "split" else 0.1)
    if other == "settings":
        text = Text(LocalDocuments(path, form=formats.Format(errors="replace")), None, 0.1)
    if other == "tokenizer":
        byte.fingerprint = "another"
    with pytest.raises(UserError, match=f"{folder} holds the tokens of another text, .*: choose another folder"):
        write_token_set(text, byte, folder)
    assert contents(folder) == before
    assert not can_go_on(folder, text.identity(byte))


def test_token_files_without_a_manifest_are_not_overwritten(path: Path, tmp_path: Path, byte: Tokenizer) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.bin").write_bytes(b"mine")
    with pytest.raises(TokenFileError, match=r"manifest\.json: missing or damaged"):
        prepare(path, folder, byte)
    assert contents(folder) == {"train.bin": b"mine"}


def test_an_unfinished_set_is_refused_with_the_remedy(
    path: Path, tmp_path: Path, byte: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    assert run_and_be_killed(lambda: prepare(path, folder, byte), Manifest, "write", 4, after=True)
    with pytest.raises(TokenFileError, match=f"{folder}: was never finished: run the same `nanokimi prepare` again"):
        TokenSet.open(folder)
    assert can_go_on(folder, text_of(path).identity(byte))
    assert not can_go_on(folder, "another")
    assert not can_go_on(tmp_path / "nowhere", text_of(path).identity(byte))


NO_MANIFEST = r"manifest\.json: missing or damaged: delete .* and make it anew"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), NO_MANIFEST),
    "half a manifest": (lambda folder: os.truncate(folder / "manifest.json", 50), NO_MANIFEST),
    "no object": (lambda folder: (folder / "manifest.json").write_text("[1]"), NO_MANIFEST),
    "no shard": (lambda folder: (folder / "train-00001.bin").unlink(), r"train-00001\.bin: cannot be read: No such"),
    "truncated": (lambda folder: os.truncate(folder / "train-00001.bin", 17_000), r"train-00001\.bin: truncated"),
    "empty": (lambda folder: os.truncate(folder / "train-00001.bin", 0), r"train-00001\.bin: the file is empty"),
    "token": (lambda folder: flip(folder / "train-00001.bin", 16_384), r"train-00001\.bin: .*checksum"),
    "document end": (lambda folder: flip(folder / "train-00001.bin", -8), r"train-00001\.bin: .*checksum"),
    "held-out token": (lambda folder: flip(next(folder.glob("val-*.bin")), 16_385), r"val-\d+\.bin: .*checksum"),
    "header": (lambda folder: flip(folder / "train-00001.bin", 12), r"train-00001\.bin: its header is damaged"),
}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.fault(14, 18, 56)
@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_set_is_named(
    path: Path, tmp_path: Path, byte: Tokenizer, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "set"
    prepare(path, folder, byte)
    TokenSet.open(folder)
    damage(folder)
    with pytest.raises(TokenFileError, match=message):
        TokenSet.open(folder)


@pytest.mark.fault(56)
def test_no_flipped_byte_of_a_header_is_a_traceback(tmp_path: Path, byte: Tokenizer) -> None:
    path = write(tmp_path / "text.txt", 5)
    prepare(path, tmp_path / "set", byte, fraction=0.0)
    file = tmp_path / "set" / "train-00000.bin"
    data = file.read_bytes()
    named = 0
    for at in range(len(data[:1000].rstrip())):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            TokenSet.open(tmp_path / "set")
        except TokenFileError:
            named += 1
    assert named > 150


@pytest.mark.fault(1)
def test_a_set_with_nothing_to_train_on_is_refused_each_time(tmp_path: Path, byte: Tokenizer) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n" * 5 + "x" * 95)
    for _ in range(2):
        with pytest.raises(UserError, match="nothing is left to train on: hold out less"):
            prepare(path, tmp_path / "set", byte, fraction=0.9)


@pytest.mark.fault(12)
def test_a_text_edited_after_its_set_was_begun_is_refused(path: Path, tmp_path: Path, byte: Tokenizer) -> None:
    text = text_of(path)
    assert text.about_split
    path.write_text("another text")
    with pytest.raises(UserError, match="was changed while it was read"):
        write_token_set(text, byte, tmp_path / "set")
