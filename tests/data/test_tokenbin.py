from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nanokimi.data import tokenbin
from nanokimi.data.batch import PackedSequences
from nanokimi.data.corpus import Corpus, StreamedText
from nanokimi.data.documents import Text
from nanokimi.data.local import LocalDocuments
from nanokimi.data.sources import choose_tokenizer
from nanokimi.data.token_files import TokenFile, TokenSet, write_token_set, write_tokens
from nanokimi.data.tokenbin import TokenBin
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from nanokimi.errors import RunError, UserError

END = 256


@pytest.fixture
def byte() -> Tokenizer:
    return load_tokenizer("byte")


@pytest.fixture
def large(byte: Tokenizer) -> Tokenizer:
    """A tokenizer of more than 65,536 entries, as far as token files are concerned."""
    byte.vocab_size = 100_000
    return byte


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.bin"


def draw_documents(count: int, seed: int = 0, vocab_size: int = 256) -> list[list[int]]:
    """Documents of distinct ids, END behind each."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size) for _ in range(draw.randrange(1, 30))] + [END] for _ in range(count)]


def flat(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in document]


def write_ours(path: Path, tokenizer: Tokenizer, documents: list[list[int]]) -> None:
    with write_tokens(path, tokenizer) as writer:
        for document in documents:
            writer.add(document[:-1], len(document) - 1)
            writer.end_document()


def write_plain(path: Path, documents: list[list[int]], dtype: str = "<u2") -> None:
    np.array(flat(documents), dtype).tofile(path)


def opened(path: str | Path, tokenizer: Tokenizer, val_path: str | Path = "", fraction: float = 0.1) -> Corpus:
    return TokenBin(str(path), str(val_path), fraction).open(tokenizer, lambda line: None)


def rows(corpus: Corpus) -> tuple[list[int], list[int]]:
    """Tokens to train on, and held-out ones."""
    assert corpus.train.tokens is not None
    sides = (corpus.train.tokens, corpus.val)
    train, val = ([] if row is None else row.read(0, len(row)).tolist() for row in sides)
    return train, val


def documents_in(tokens: list[int]) -> list[tuple[int, ...]]:
    found: list[list[int]] = [[]]
    for token in tokens:
        found[-1].append(token)
        if token == END:
            found.append([])
    assert not found.pop()
    return list(map(tuple, found))


def prepared(folder: Path, tokenizer: Tokenizer, count: int = 200, shard_tokens: int = 1000) -> TokenSet:
    texts = [bytes(token % 26 + 97 for token in document).decode() + "\n" for document in draw_documents(count)]
    source = folder.with_suffix(".txt")
    source.write_text("<|endoftext|>\n".join(texts))
    return write_token_set(Text(LocalDocuments(source), None, 0.1), tokenizer, folder, shard_tokens=shard_tokens)


# ---- what a path may mean ------------------------------------------------------------------------------------


def test_a_prepared_folder_keeps_its_split(tmp_path: Path, byte: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanokimi.data.token_files.BATCH_CHARACTERS", 300)
    found = prepared(tmp_path / "set", byte)
    assert len(found.train) > 2
    train, val = rows(opened(tmp_path / "set", byte, fraction=0.5))
    assert train == [token for file in found.train for token in file.tokens.tolist()]
    assert val == [token for file in found.val for token in file.tokens.tolist()]


@pytest.mark.parametrize("write", [write_ours, lambda path, tokenizer, documents: write_plain(path, documents)])
@pytest.mark.parametrize("count", [100, 500])
def test_every_document_of_many_is_on_exactly_one_side_and_whole(
    path: Path, byte: Tokenizer, write: Callable[[Path, Tokenizer, list[list[int]]], None], count: int
) -> None:
    documents = draw_documents(count)
    write(path, byte, documents)
    corpus = opened(path, byte)
    train, val = map(documents_in, rows(corpus))
    assert sorted(train + val) == sorted(map(tuple, documents))
    assert train == [document for document in map(tuple, documents) if document in set(train)]  # in their order
    assert 0.04 * count < len(val) < 0.2 * count
    assert "held out (documents by hash)" in corpus.summary


def test_copies_of_a_document_stay_together_whichever_file_and_width_they_are_in(
    tmp_path: Path, byte: Tokenizer
) -> None:
    documents = draw_documents(150)
    write_ours(tmp_path / "a.bin", byte, documents)
    write_plain(tmp_path / "b.bin", documents)
    write_plain(tmp_path / "c.bin", documents, "<u4")
    (tmp_path / "c.bin.json").write_text('{"dtype": "uint32"}')
    train, val = map(documents_in, rows(opened(tmp_path, byte)))
    assert sorted(train + val) == sorted(list(map(tuple, documents)) * 3)
    unlike = {document for document in train if len(document) > 4}
    assert not unlike & set(val)
    assert sorted(val) == sorted(documents_in(rows(opened(tmp_path / "b.bin", byte))[1]) * 3)


@pytest.mark.parametrize("write", [write_ours, lambda path, tokenizer, documents: write_plain(path, documents)])
def test_the_end_of_few_documents_is_held_out(
    path: Path, byte: Tokenizer, write: Callable[[Path, Tokenizer, list[list[int]]], None]
) -> None:
    documents = draw_documents(99)
    write(path, byte, documents)
    train, val = rows(opened(path, byte))
    assert train + val == flat(documents)
    assert len(val) == len(flat(documents)) // 10


def test_a_document_over_two_files_is_on_one_side(tmp_path: Path, byte: Tokenizer) -> None:
    for seed in range(20):
        documents = draw_documents(300, seed)
        tokens = np.array(flat(documents), "<u2")
        places = sorted(random.Random(seed).sample(range(1, len(tokens)), 40))
        for i, (start, end) in enumerate(zip([0, *places], [*places, len(tokens)], strict=True)):
            tokens[start:end].tofile(tmp_path / f"{i:02}.bin")
        train, val = map(documents_in, rows(opened(tmp_path, byte)))
        assert sorted(train + val) == sorted(map(tuple, documents))
        assert val


def test_shards_that_are_named_one_by_one_are_divided_into_whole_documents(
    tmp_path: Path, byte: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanokimi.data.token_files.BATCH_CHARACTERS", 50)
    monkeypatch.setattr("nanokimi.data.documents.PIECE_BYTES", 20)
    found = prepared(tmp_path / "set", byte, shard_tokens=60)
    assert any(file.tokens[-1] != END for file in found.train)
    train, val = map(documents_in, rows(opened(tmp_path / "set" / "train-*.bin", byte)))
    everything = [token for file in found.train for token in file.tokens.tolist()]
    assert sorted(train + val) == sorted(documents_in(everything))


def test_a_folder_of_train_and_val_as_nanogpt_writes_it(tmp_path: Path, byte: Tokenizer) -> None:
    write_plain(tmp_path / "train.bin", draw_documents(300))
    write_plain(tmp_path / "val.bin", draw_documents(20, seed=1))
    (tmp_path / "meta.pkl").write_bytes(b"never read")
    corpus = opened(tmp_path, byte)
    assert rows(corpus) == (flat(draw_documents(300)), flat(draw_documents(20, seed=1)))
    assert "held out (in val.bin)" in corpus.summary


def test_a_folder_without_val_is_divided(tmp_path: Path, byte: Tokenizer) -> None:
    write_plain(tmp_path / "b.bin", draw_documents(60))
    write_plain(tmp_path / "a.bin", draw_documents(60, seed=1))
    train, val = map(documents_in, rows(opened(tmp_path, byte)))
    assert sorted(train + val) == sorted(map(tuple, draw_documents(60) + draw_documents(60, seed=1)))
    assert train[:3] == list(map(tuple, draw_documents(60, seed=1)))[:3]  # in the order of names


def test_patterns_and_lists_mean_their_files(tmp_path: Path, byte: Tokenizer) -> None:
    for name in "abc":
        write_plain(tmp_path / f"{name}.bin", [[ord(name), END]])
    for path, expected in (("[ab].bin", "ab"), ("c.bin, {}/a.bin", "ca"), ("c.bin,{}/[ab]*", "cab")):
        given = f"{tmp_path}/{path.replace('{}', str(tmp_path))}"
        assert rows(opened(given, byte, fraction=0.0))[0] == flat([[ord(name), END] for name in expected])


def test_val_path_holds_out_its_files_and_nothing_else(tmp_path: Path, byte: Tokenizer) -> None:
    write_plain(tmp_path / "all.bin", draw_documents(300))
    write_ours(tmp_path / "other.bin", byte, draw_documents(20, seed=1))
    found = opened(tmp_path / "all.bin", byte, tmp_path / "other.bin")
    assert rows(found) == (flat(draw_documents(300)), flat(draw_documents(20, seed=1)))


def test_what_is_held_out_is_never_trained_on_as_well(tmp_path: Path, byte: Tokenizer) -> None:
    found = prepared(tmp_path / "set", byte)
    val = tmp_path / "set" / "val-00000.bin"
    train = [token for file in found.train for token in file.tokens.tolist()]
    assert rows(opened(tmp_path / "set", byte, val)) == (train, found.val[0].tokens.tolist())
    write_plain(tmp_path / "a.bin", draw_documents(5))
    (tmp_path / "link.bin").symlink_to(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"--val_path .*link\.bin: is trained on too: name another file, or none"):
        opened(tmp_path / "a.bin", byte, tmp_path / "link.bin")


def test_without_a_share_nothing_is_held_out(path: Path, byte: Tokenizer) -> None:
    write_plain(path, draw_documents(300))
    corpus = opened(path, byte, fraction=0.0)
    assert rows(corpus) == (flat(draw_documents(300)), [])
    assert corpus.val is None
    assert "nothing held out" in corpus.summary


def test_the_identity_follows_the_tokens_and_the_share(tmp_path: Path, byte: Tokenizer) -> None:
    write_plain(tmp_path / "a.bin", draw_documents(300))
    write_plain(tmp_path / "b.bin", draw_documents(300))
    write_plain(tmp_path / "c.bin", draw_documents(300, seed=1))
    identities = [opened(tmp_path / name, byte).train.identity for name in ("a.bin", "b.bin", "c.bin")]
    identities.append(opened(tmp_path / "a.bin", byte, fraction=0.2).train.identity)
    assert identities[0] == identities[1]
    assert len(set(identities)) == 3


# ---- the width of ids ----------------------------------------------------------------------------------------


def test_a_large_vocabulary_is_read_as_uint32(path: Path, large: Tokenizer) -> None:
    documents = draw_documents(50, vocab_size=100_000)
    write_plain(path, documents, "<u4")
    assert rows(opened(path, large, fraction=0.0))[0] == flat(documents)
    write_ours(path, large, documents)
    assert rows(opened(path, large, fraction=0.0))[0] == flat(documents)


@pytest.mark.fault(19)
def test_a_sidecar_says_what_the_width_is(path: Path, byte: Tokenizer, large: Tokenizer) -> None:
    write_plain(path, draw_documents(50), "<u2")
    Path(f"{path}.json").write_text('{"dtype": "uint16"}')
    assert rows(opened(path, large, fraction=0.0))[0] == flat(draw_documents(50))
    byte.vocab_size = 257
    write_plain(path, draw_documents(50), "<u4")
    Path(f"{path}.json").write_text('{"dtype": "uint32"}')
    assert rows(opened(path, byte, fraction=0.0))[0] == flat(draw_documents(50))


@pytest.mark.parametrize("text", ['{"dtype": "int64"}', "[1]", "{}", '{"dtype": ', '"uint16"', '{"dtype": [1]}'])
def test_a_sidecar_that_says_nothing_useful_is_named(path: Path, byte: Tokenizer, text: str) -> None:
    write_plain(path, draw_documents(50))
    Path(f"{path}.json").write_text(text)
    with pytest.raises(UserError, match=r"tokens\.bin\.json: .*uint16.*uint32"):
        opened(path, byte)


@pytest.mark.fault(19)
def test_uint32_read_as_uint16_is_an_error(path: Path, byte: Tokenizer) -> None:
    byte.vocab_size = 65_536
    for vocab_size in (256, 50_000, 65_536):
        write_plain(path, draw_documents(50, vocab_size=vocab_size), "<u4")
        with pytest.raises(UserError, match=r'tokens\.bin: looks like uint32 .*tokens\.bin\.json: {"dtype": "uint32"}'):
            opened(path, byte)


@pytest.mark.fault(19)
def test_uint16_read_as_uint32_is_an_error(path: Path, large: Tokenizer) -> None:
    for count in (50, 51, 52):
        tokens = np.array(flat(draw_documents(count))[: 100 + count], "<u2")
        tokens.tofile(path)
        with pytest.raises(UserError, match=r"tokens\.bin: (token \d+ at position 0 .*uint16|.*no whole number)"):
            opened(path, large)


# ---- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.fault(17)
def test_a_file_of_odd_length_is_named(path: Path, byte: Tokenizer) -> None:
    write_plain(path, draw_documents(50))
    size = path.stat().st_size - 1
    os.truncate(path, size)
    with pytest.raises(UserError, match=rf"tokens\.bin: {size} bytes are no whole number of uint16 tokens: truncated"):
        opened(path, byte)


@pytest.mark.fault(18)
def test_an_empty_file_is_named(path: Path, byte: Tokenizer) -> None:
    path.touch()
    for act in (lambda: opened(path, byte), lambda: TokenBin(str(path)).find_tokenizer()):
        with pytest.raises(UserError, match=r"tokens\.bin: the file is empty"):
            act()


TEXTS = {
    "ASCII": b"Once upon a time there was\n" * 100,
    "odd": b"Once upon a time" * 100 + b".",
    "UTF-8": "Il était une fois… 昔々 😀\n".encode() * 100,
    "byte order mark": "\ufeffOnce upon a time\n".encode() * 100,
    "invisible characters": "soft\u00adhyphen, zero\u200bwidth, 👩\u200d🚀\n".encode() * 100,
    "Latin-1": "Il était une fois un garçon\n".encode("latin-1") * 100,
    "page feeds": b"page\n\f\x1b[1mpage\x1b[0m\r\n" * 100,
    "JSON lines": b'{"text": "Once"}\n' * 100,
}


@pytest.mark.fault(20)
@pytest.mark.parametrize("looked_at", [1 << 20, 100, 101, 102, 103])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_given_as_tokens_is_named(
    path: Path, byte: Tokenizer, monkeypatch: pytest.MonkeyPatch, text: bytes, looked_at: int
) -> None:
    monkeypatch.setattr(tokenbin, "LOOKED_AT_BYTES", looked_at)
    byte.vocab_size = 50_257  # the ids of ASCII read as uint16 are all below
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"tokens\.bin: this is text, not tokens: .*--dataset local"):
        opened(path, byte)


@pytest.mark.parametrize("vocab_size", [256, 5000, 50_000, 65_000])
@pytest.mark.parametrize("seed", range(5))
def test_tokens_are_not_taken_for_text_or_for_another_width(
    path: Path, byte: Tokenizer, vocab_size: int, seed: int
) -> None:
    byte.vocab_size = max(257, vocab_size)
    draw = np.random.default_rng(seed)
    tokens = np.minimum(draw.zipf(1.3, 500) - 1, vocab_size - 1).astype("<u2")  # as often as words are
    tokens.tofile(path)
    assert rows(opened(path, byte, fraction=0.0))[0] == tokens.tolist()


@pytest.mark.fault(21)
@pytest.mark.parametrize("at", [0, 6, 7, 99])
def test_an_id_beyond_the_vocabulary_is_named_with_its_position(
    path: Path, byte: Tokenizer, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(tokenbin, "BLOCK_TOKENS", 7)
    tokens: NDArray[np.uint16] = np.arange(100, dtype="<u2")
    tokens[at] = 257
    tokens.tofile(path)
    with pytest.raises(UserError, match=rf"tokens\.bin: token 257 at position {at} is beyond the 257 entries of byte"):
        opened(path, byte)


def test_blocks_change_nothing(path: Path, byte: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plain(path, draw_documents(300))
    whole = opened(path, byte)
    monkeypatch.setattr(tokenbin, "BLOCK_TOKENS", 7)
    assert rows(opened(path, byte)) == rows(whole)
    assert opened(path, byte).train.identity == whole.train.identity


@pytest.mark.fault(13)
def test_files_of_another_tokenizer_are_refused(tmp_path: Path, path: Path, byte: Tokenizer) -> None:
    other = train_bpe(["some words and some more words"] * 20, 270)
    write_ours(path, other, draw_documents(5))
    write_plain(tmp_path / "plain.bin", draw_documents(5))
    message = r"\.bin: made by another tokenizer \(bpe:270\) than byte: put its tokenizer\.json beside"
    for data, val in ((path, ""), (tmp_path / "plain.bin", path)):
        with pytest.raises(UserError, match=message):
            opened(data, byte, val)
    prepared(tmp_path / "set", other)
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "set", byte)


@pytest.mark.fault(23)
@pytest.mark.parametrize("kind", ["plain", "ours", "set"])
def test_a_file_that_is_truncated_during_the_run_ends_it_at_the_next_read(
    tmp_path: Path, path: Path, byte: Tokenizer, kind: str
) -> None:
    documents = draw_documents(1000)
    if kind == "set":
        path = prepared(tmp_path / "set", byte, 1000, 10**9).train[0].path
    elif kind == "ours":
        write_ours(path, byte, documents)
    else:
        write_plain(path, documents)
    child = os.fork()  # what must not happen kills the process
    if not child:
        code = 1
        try:
            corpus = opened(path.parent if kind == "set" else path, byte)
            assert corpus.train.tokens is not None
            sequences = PackedSequences(corpus.train.tokens, 16)
            assert sequences.batch([len(sequences) - 1]).shape == (1, 17)
            os.truncate(path, 4096)
            with pytest.raises(RunError, match=f"{path}: the token file was truncated while in use: make it anew"):
                sequences.batch([len(sequences) - 1])
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.fault(4, 5)
@pytest.mark.parametrize("val", [False, True])
def test_what_is_missing_or_no_file_is_named_with_its_flag(tmp_path: Path, byte: Tokenizer, val: bool) -> None:
    write_plain(tmp_path / "a.bin", draw_documents(5))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("text")
    flag = "--val_path" if val else "--data_path"
    cases = [
        ("gone.bin", rf"{flag} {tmp_path}/gone\.bin: no such file: .*nanokimi prepare"),
        ("gone*.bin", rf"{flag} {re.escape(str(tmp_path))}/gone\*\.bin: no such file"),
        (f"a.bin,{tmp_path}/gone.bin", rf"{flag} {tmp_path}/gone\.bin: no such file"),
        ("folder", rf"{flag} {tmp_path}/folder is a directory without \.bin files: .*nanokimi prepare"),
        ("f*r", rf"{tmp_path}/folder is a directory: name the token files in it"),
    ]
    for name, message in cases:
        path = f"{tmp_path}/{name}"
        with pytest.raises(UserError, match=message):
            opened(tmp_path / "a.bin", byte, path) if val else opened(path, byte)


def test_what_cannot_be_mapped_is_refused(tmp_path: Path, byte: Tokenizer) -> None:
    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path / "link.bin").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"pipe\.bin: not a regular file: .*save the tokens to disk"):
        opened(tmp_path / "pipe.bin", byte)
    with pytest.raises(UserError, match=r"link\.bin: cannot be read: No such file"):
        opened(tmp_path / "link.bin", byte)


def test_a_folder_of_held_out_files_only_is_an_error(tmp_path: Path, byte: Tokenizer) -> None:
    write_plain(tmp_path / "val.bin", draw_documents(5))
    with pytest.raises(UserError, match=f"--data_path {tmp_path}: all of its files are called val"):
        opened(tmp_path, byte)
    assert rows(opened(tmp_path / "val.bin", byte, fraction=0.0))[0] == flat(draw_documents(5))  # named: that is meant


def test_a_share_that_leaves_one_side_empty_is_an_error(path: Path, byte: Tokenizer) -> None:
    write_plain(path, [[1, 2, END]] * 200)
    for fraction, how_many in ((0.01, "none"), (0.99, "all")):
        with pytest.raises(UserError, match=f"--val_fraction {fraction} holds out {how_many} of the documents"):
            opened(path, byte, fraction=fraction)


def test_an_unfinished_set_is_refused_whatever_is_held_out(tmp_path: Path, byte: Tokenizer) -> None:
    prepared(tmp_path / "set", byte)
    manifest = tmp_path / "set" / "manifest.json"
    kept = {name: value for name, value in json.loads(manifest.read_text()).items() if name != "sha256"}
    manifest.write_text(json.dumps(kept | {"complete": False}))
    write_plain(tmp_path / "val.bin", draw_documents(5))
    for val in ("", tmp_path / "val.bin"):
        with pytest.raises(UserError, match="was never finished: run the same `nanokimi prepare` again"):
            opened(tmp_path / "set", byte, val)


@pytest.mark.fault(56)
def test_a_flipped_byte_is_found(tmp_path: Path, path: Path, byte: Tokenizer) -> None:
    write_ours(path, byte, draw_documents(200))
    data = bytearray(path.read_bytes())
    for at in (16_384, len(data) - 8):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(UserError, match=r"tokens\.bin: damaged .*checksum"):
            opened(path, byte)


# ---- the tokenizer -------------------------------------------------------------------------------------------


def test_the_tokenizer_beside_the_files_is_found(tmp_path: Path, path: Path, byte: Tokenizer) -> None:
    other = train_bpe(["some words and some more words"] * 20, 270)
    prepared(tmp_path / "set", other)
    write_plain(path, draw_documents(5))
    other.save(tmp_path / "tokenizer.json")
    for given in (tmp_path / "set", tmp_path / "set" / "train-*.bin", path, f"{path},{tmp_path}/set"):
        found = TokenBin(str(given)).find_tokenizer()
        assert found is not None
        assert found.fingerprint == other.fingerprint


def test_the_tokenizer_that_a_header_names_is_found_unless_it_must_be_trained(path: Path, byte: Tokenizer) -> None:
    write_ours(path, byte, draw_documents(5))
    found = TokenBin(str(path)).find_tokenizer()
    assert found is not None
    assert found.fingerprint == byte.fingerprint
    write_ours(path, train_bpe(["some words and some more words"] * 20, 270), draw_documents(5))
    assert TokenFile.open(path).tokenizer == "bpe:270"
    assert TokenBin(str(path)).find_tokenizer() is None
    write_plain(path, draw_documents(5))
    assert TokenBin(str(path)).find_tokenizer() is None


def test_no_tokenizer_is_trained_on_tokens(path: Path) -> None:
    write_plain(path, draw_documents(5))
    for sources in ([TokenBin(str(path))], [StreamedText(Text(LocalDocuments(path))), TokenBin(str(path))]):
        with pytest.raises(UserError, match=r"no tokenizer can be trained on tokens: .*--set tokenizer_name="):
            choose_tokenizer(sources, "bpe:300", named=False)
