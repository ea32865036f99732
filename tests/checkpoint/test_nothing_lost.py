"""Every moment of a save, in a short form of ``benchmarks/nothing_lost.py``; and that it would notice a loss."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import flipped_files, nothing_lost
from benchmarks.disk_model import Op, PowerCuts
from nanokimi.config import TrainConfig
from nanokimi.data.sources import open_corpus
from nanokimi.data.token_files import MANIFEST, TokenFileError, TokenSet, write_tokens
from nanokimi.data.tokenbin import TokenBin
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.errors import UserError


@pytest.mark.slow
@pytest.mark.fault(62)
@pytest.mark.fault("B1")
def test_no_kill_power_cut_full_disk_or_flipped_byte_loses_a_checkpoint(tmp_path: Path) -> None:
    for found in nothing_lost.proven(tmp_path, short=True).values():
        assert min(found.values()) > 0


@pytest.mark.fault("B1")
def test_no_flipped_byte_in_any_other_file_is_accepted_in_silence(tmp_path: Path) -> None:
    found = flipped_files.proven(tmp_path / "files", every=1999, one_in=40)
    refused, anew = (
        {name for name, count in found.items() if word in count} for word in ("noticed and named", "made anew")
    )
    assert anew == {"token cache and cached tokenizer", "sample of the hub"}
    assert refused == found.keys() - anew


@pytest.mark.fault("B1")
def test_a_flip_in_a_token_files_first_bytes_does_not_make_it_a_plain_one(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    with write_tokens(path, load_tokenizer("byte")) as writer:
        writer.add([65] * 9_000, 9_000)
    path.write_bytes(b"nKTOKENS" + path.read_bytes()[8:])
    with pytest.raises(UserError, match=r"train\.bin: not a nanokimi token file, or damaged"):
        TokenBin(str(path)).find_tokenizer()


@pytest.mark.parametrize("lost", ["of files", "of the folder"])
def test_a_sync_that_is_left_out_is_noticed(tmp_path: Path, lost: str) -> None:
    case = nothing_lost.Shards(tmp_path / "case")
    disk = nothing_lost.recorded(case)
    disk.ops = [op for op in disk.ops if op.kind != "sync" or (op.node < 2) == (lost == "of files")]
    with pytest.raises((AssertionError, UserError)):
        nothing_lost.power_cuts(case, disk, 1)


def test_a_power_cut_drops_what_is_not_synced_and_keeps_what_is() -> None:
    """A file of two writes gets its name; only then is it synced, and then the folder."""
    names = (Op("names", names=((1, "a", 2),)),)
    writes = (Op("write", 2, 0, b"x"), Op("write", 2, 1, b"y"))
    cuts = PowerCuts([*names, *writes, Op("sync", 2), Op("sync", 1), Op("done", step=1)])
    trees = [tree.get("a") for _, tree in cuts]
    assert {*trees[:-1]} == {None, b"", b"x", b"xy", b"\0y"}
    assert trees[-1] == b"xy"


@pytest.mark.fault(56)
def test_a_flipped_byte_in_the_token_cache_is_noticed_or_makes_it_anew(tmp_path: Path) -> None:
    text = tmp_path / "train.txt"
    text.write_text(Path(shutil.__file__).read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    config = TrainConfig(data_path=str(text))
    before = open_corpus(config, "bpe:300", log=lambda line: None)
    cache = next(path for path in tmp_path.iterdir() if path.is_dir())
    folder = next(path for path in cache.iterdir() if path.is_dir())
    for name in (MANIFEST, "train-00000.bin"):
        good = (folder / name).read_bytes()
        for position in [*range(0, 900, 7), *range(16_384, len(good), 997)]:
            if position < len(good) and good[position : position + 1] not in b" \n":
                bad = bytearray(good)
                bad[position] ^= 1
                (folder / name).write_bytes(bad)
                with pytest.raises(TokenFileError):
                    TokenSet.open(folder)
        (folder / name).write_bytes(good)
    (tokenizer,) = cache.glob("*.tokenizer.json")
    good = tokenizer.read_bytes()
    tokenizer.write_bytes(good.replace(b'"e": ', b'"f": ', 1).replace(b"false", b"true ", 1))
    after = open_corpus(config, "bpe:300", log=lambda line: None)
    assert after.tokenizer.to_state() == before.tokenizer.to_state()
    assert tokenizer.read_bytes() == good
