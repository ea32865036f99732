"""Flips one byte in every region of every file, besides checkpoints that are resumed, that a run or a command reads.

A part of ``benchmarks.nothing_lost``. Each flip must end in an error that names the file or its folder, or have the
file made anew, or change nothing at all of what is read (white space, padding): the result is compared to the bit.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

from nanokimi import checkpoint
from nanokimi.cli import main as nanokimi
from nanokimi.config import TrainConfig
from nanokimi.data.documents import Piece
from nanokimi.data.hub import fetch_sample
from nanokimi.data.sources import open_corpus
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.errors import RunError, UserError
from nanokimi.interop.loading import read_model
from nanokimi.interop.stored import StoredModel

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    Args:
        read: reads them as the program does, and returns everything that it got from them, comparable.
    """

    name: str
    files: list[Path]
    read: Callable[[], object]


def proven(work: Path, *, every: int, one_in: int = 1) -> dict[str, dict[str, int]]:
    """Tries all kinds of files; AssertionError where a flip is accepted in silence.

    Args:
        every: of so many bytes of a file one is flipped, besides those at the borders of its regions.
        one_in: for a short form: of so many of these flips only one is tried.
    """
    work.mkdir(parents=True)
    with mock.patch.dict("os.environ", XDG_CACHE_HOME=str(work / "cache")):
        record = {}
        for kind in kinds(work):
            record[kind.name] = flipped(kind, every, one_in)
            print(kind.name, json.dumps(record[kind.name]), file=sys.stderr, flush=True)
        return record


def flipped(kind: Kind, every: int, one_in: int) -> dict[str, int]:
    """What became of each flip, counted."""
    count, good_result = Counter[str](), kind.read()
    for path in kind.files:
        good = path.read_bytes()
        for position in positions(path, every)[::one_in]:
            bad = bytearray(good)
            bad[position] ^= 1 << position % 8
            path.unlink()
            path.write_bytes(bad)
            count[outcome(kind, path, good_result, position)] += 1
            path.write_bytes(good)
    return {"bytes flipped": count.total(), **count}


def outcome(kind: Kind, path: Path, good_result: object, position: int) -> str:
    bad, refused, result = path.read_bytes(), "", None
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            result = kind.read()
    except (UserError, RunError) as error:
        refused = str(error)
    if refused:
        assert path.name in refused, (path, position, refused)
        return "noticed and named"
    assert result == good_result, (path, position)
    return "harmless" if path.is_file() and path.read_bytes() == bad else "made anew"


def positions(path: Path, every: int) -> list[int]:
    """The first and last bytes, start, middle and end of each region, and every so many; of JSON far more."""
    size = path.stat().st_size
    step = max(1, every // 16) if path.suffix in (".json", ".jinja", ".jsonl") else every
    near = {*range(0, 16), *range(size - 16, size), *range(0, size, step)}
    for start, end in regions(path):
        near |= {start, (start + end) // 2, end - 1}
    return sorted(position for position in near if 0 <= position < size)


def regions(path: Path) -> Iterator[tuple[int, int]]:
    """Start and end of every tensor, and of what lies before them."""
    if path.suffix == ".safetensors":
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        yield 8, start
        for name, tensor in json.loads(data[8:start]).items():
            if name != "__metadata__":
                yield start + tensor["data_offsets"][0], start + tensor["data_offsets"][1]
    elif path.suffix == ".bin":
        yield 8, 16_384
        yield 16_384, path.stat().st_size
    elif path.suffix == ".pt":
        entries = sorted(zipfile.ZipFile(path).infolist(), key=lambda entry: entry.header_offset)
        starts = [entry.header_offset for entry in entries] + [path.stat().st_size]
        for entry, (start, following) in zip(entries, pairwise(starts), strict=True):
            yield start, start + 30
            yield following - entry.file_size, following


# ---- the kinds ---------------------------------------------------------------------------------


def kinds(work: Path) -> Iterator[Kind]:
    text = work / "train.txt"
    text.write_text(Path(shutil.__file__).read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    yield from of_tokens(work, text)
    yield of_sample(work)
    yield from of_models(work, text)


def of_tokens(work: Path, text: Path) -> Iterator[Kind]:
    folder = work / "tokens"
    named = ("--set", "tokenizer_name=bpe:300")
    run(["prepare", "tokens", "--data_path", str(text), "--output", str(folder), *named])
    files = sorted(path for path in folder.iterdir() if path.is_file())
    yield Kind("token folder", files, lambda: corpus(TrainConfig(dataset="tokenbin", data_path=str(folder)), False))
    alone = folder / "train-00000.bin"
    config = TrainConfig(dataset="tokenbin", data_path=str(alone))
    yield Kind("token file", [alone, folder / "tokenizer.json"], lambda: corpus(config, False))
    local = TrainConfig(data_path=str(text))
    corpus(local, True)
    (cache,) = (path for path in work.iterdir() if path.name.startswith(text.name) and path.is_dir())
    cached = sorted(path for path in cache.rglob("*") if path.is_file() and not path.name.startswith("."))
    yield Kind("token cache and cached tokenizer", cached, lambda: corpus(local, True))


def corpus(config: TrainConfig, named: bool) -> object:
    found = open_corpus(config, "bpe:300", named=named, log=lambda line: None)
    rows = [tokens.read(0, len(tokens)).tobytes() for tokens in (found.train.tokens, found.val) if tokens is not None]
    return rows, found.train.identity, found.tokenizer.to_state()


class Rows:
    """Stands in for a data set of the hub."""

    name, identity = "owner/name", ["owner/name", "1"]

    def read(self, part: int, start: Any, advance: Callable[[int], None]) -> Iterator[Piece]:
        for row in range(start.at, 40):
            yield Piece(f"row {row} of the sample\n", True, start._replace(at=row))


def of_sample(work: Path) -> Kind:
    def read() -> object:
        rows: Any = Rows()
        return fetch_sample(40, ["owner/name"], lambda: rows).read_bytes()

    read()
    return Kind("sample of the hub", list((work / "cache").rglob("*.jsonl")), read)


def of_models(work: Path, text: Path) -> Iterator[Kind]:
    output, folder = work / "run", work / "exported"
    sizes = ("dim=16", "n_heads=1", "n_layers=2", "q_lora_rank=8", "kv_lora_rank=8", "moe_inter_dim=8")
    small = [part for pair in (*sizes, "inter_dim=16") for part in ("--set", pair)]
    steps = ["--max_steps", "2", "--eval_interval", "1", "--warmup_steps", "0", "--device", "cpu"]
    run(["train", "--preset", "debug", "--data_path", str(text), *steps, *small, "--output_dir", str(output)])
    for name in ("best.pt", "final.pt"):
        path = output / "checkpoints" / name
        yield Kind(name, [path], lambda path=path: values(read_model(path)))  # type: ignore[misc]
    content = checkpoint.read(output / "checkpoints" / "final.pt")
    content["tokenizer"]["chat_template"] = TEMPLATE
    checkpoint.save(work / "chat.pt", content)
    run(["export", "hf", str(work / "chat.pt"), str(folder), "--no_compare"])
    files = sorted(path for path in folder.iterdir() if path.is_file())
    yield Kind("exported folder", files, lambda: values(read_model(folder)))
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "receipt.json")
    of_tokenizer = [path for path in files if path.name in names]
    yield Kind("tokenizer of an exported folder", of_tokenizer, lambda: load_tokenizer(str(folder)).to_state())


def values(stored: StoredModel) -> object:
    weights = {name: tensor.numpy().tobytes() for name, tensor in stored.weights.items()}
    return weights, stored.config, stored.tokenizer.to_state(), stored.training


def run(arguments: list[str]) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = nanokimi(arguments)
    assert code == 0, said.getvalue()
