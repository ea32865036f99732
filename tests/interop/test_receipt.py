"""Receipts: what they say, and that nothing which they list changes unnoticed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from nanokimi.errors import UserError
from nanokimi.files import sha256_of
from nanokimi.interop.engines import TEXT, mean_loss
from nanokimi.receipt import (
    RECEIPT,
    Comparison,
    NotCompared,
    verify_receipt,
    write_receipt,
)

FOUND = Comparison("some engine", "1.2", "logits", 3e-6, 40, 5.5, 5.5000001, 41)
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", from FIPS 180-2, appendix B.1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files and their receipt."""
    (tmp_path / "b.bin").write_bytes(b"abc")
    (tmp_path / "a.json").write_text("{}")
    write_receipt(
        tmp_path / RECEIPT, [tmp_path / "b.bin", tmp_path / "a.json"], target="t", dtype="f32", compared=FOUND
    )
    return tmp_path


def test_a_receipt_holds_checksums_engine_and_difference(folder: Path) -> None:
    content = json.loads((folder / RECEIPT).read_text())
    assert content["files"]["b.bin"] == {"bytes": 3, "sha256": ABC}
    assert list(content["files"]) == ["a.json", "b.bin"]
    assert (content["target"], content["dtype"], content["not_compared"]) == ("t", "f32", None)
    assert content["comparison"]["engine"] == "some engine"
    assert content["comparison"]["version"] == "1.2"
    assert content["comparison"]["max_difference"] == 3e-6
    assert str(folder) not in json.dumps(content)


def test_the_same_files_give_the_same_receipt_in_any_order_anywhere(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    files = [other / "a.json", other / "b.bin"]
    for file in files:
        file.write_bytes((folder / file.name).read_bytes())
        os.utime(file, (1e9, 1e9))
    write_receipt(other / RECEIPT, files, target="t", dtype="f32", compared=FOUND)
    assert (other / RECEIPT).read_bytes() == (folder / RECEIPT).read_bytes()


def test_a_missing_engine_is_told(folder: Path) -> None:
    write_receipt(folder / RECEIPT, [], target="t", dtype="f16", compared=NotCompared("install it"))
    content = json.loads((folder / RECEIPT).read_text())
    assert content["comparison"] is None
    assert content["not_compared"] == "install it"


def test_whole_files_pass_and_only_those_asked_for_are_read(folder: Path) -> None:
    verify_receipt(folder / RECEIPT, ["a.json", "b.bin", "of another time"])
    (folder / "a.json").unlink()
    verify_receipt(folder / RECEIPT, ["b.bin"])
    verify_receipt(folder / "no receipt", ["a.json"])


@pytest.mark.parametrize("name", ["a.json", "b.bin"])
@pytest.mark.parametrize("fault", ["missing", "longer", "shorter", "flipped"])
def test_every_change_is_noticed_by_name(folder: Path, name: str, fault: str) -> None:
    file = folder / name
    data = file.read_bytes()
    if fault == "missing":
        file.unlink()
    else:
        flipped = bytes([data[0] ^ 1, *data[1:]])
        file.write_bytes({"longer": data + b"\0", "shorter": data[:-1], "flipped": flipped}[fault])
    with pytest.raises(UserError, match=rf"{name}.*{RECEIPT}.*again") as caught:
        verify_receipt(folder / RECEIPT, ["a.json", "b.bin"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", "\xff", '{"format": "nanokimi-receipt"}', '{"format": "other", "files": {}}',
        '{"format": "nanokimi-receipt", "files": []}', '{"format": "nanokimi-receipt", "files": {"a.json": 3}}',
    ],
)  # fmt: skip
def test_what_is_no_receipt_is_refused(folder: Path, text: str) -> None:
    (folder / RECEIPT).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{RECEIPT}: not a receipt.*remove it"):
        verify_receipt(folder / RECEIPT, ["a.json"])


def test_large_files_are_summed_block_by_block(tmp_path: Path) -> None:
    import hashlib

    data = os.urandom((2 << 20) + 17)
    (tmp_path / "large").write_bytes(data)
    assert sha256_of(tmp_path / "large") == hashlib.sha256(data).hexdigest()


def test_the_fixed_text_is_of_many_kinds() -> None:
    kinds = {"latin": "ß", "cyrillic": "М", "han": "東", "arabic": "م", "emoji": "🙂", "tab": "\t", "digits": "4444"}
    assert all(sample in TEXT for sample in kinds.values())


def test_the_mean_loss_is_that_of_each_token_given_those_before_it() -> None:
    logits = torch.randn(5, 9)
    tokens = [3, 1, 4, 1, 5]
    by_hand = -sum(logits[i].double().log_softmax(-1)[tokens[i + 1]] for i in range(4)) / 4
    assert mean_loss(logits, tokens) == pytest.approx(float(by_hand))


def test_a_comparison_says_in_a_line_what_was_found() -> None:
    assert "\n" not in str(FOUND)
    assert all(word in str(FOUND) for word in ("some engine 1.2", "3e-06", "40 positions"))


@pytest.mark.fault("B1")
def test_a_receipt_is_checked_too_and_one_without_its_checksum_is_still_read(folder: Path) -> None:
    path = folder / RECEIPT
    good = path.read_text()
    for changed in (good.replace('"b.bin"', '"c.bin"'), good.replace('"sha256": "', '"sha257": "')):
        path.write_text(changed)
        with pytest.raises(UserError, match=rf"{RECEIPT}: not a receipt of nanokimi, or damaged"):
            verify_receipt(path, ["b.bin"])
    content = json.loads(good)
    del content["sha256"]
    path.write_text(json.dumps(content))
    verify_receipt(path, ["b.bin"])
    (folder / "b.bin").write_bytes(b"abd")
    with pytest.raises(UserError, match=r"b\.bin: damaged or changed"):
        verify_receipt(path, ["b.bin"])
