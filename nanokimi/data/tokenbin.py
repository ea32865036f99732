"""The source ``--dataset tokenbin``: our own token files, and plain rows of ids as other projects write them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanokimi.console import progress_bar
from nanokimi.data.batch import TokenArray
from nanokimi.data.corpus import Corpus, TrainData
from nanokimi.data.documents import ENOUGH_DOCUMENTS, in_share, short_hash, wrong_share
from nanokimi.data.finding import Search, split_path
from nanokimi.data.token_files import HEADER_START, MAGIC, MANIFEST, TOKENIZER, TokenFile, TokenSet
from nanokimi.data.tokenizer import Tokenizer, bpe_size, load_tokenizer
from nanokimi.errors import UserError

BLOCK_TOKENS = 1 << 22
HASHED_TOKENS = 1 << 17
LOOKED_AT_BYTES = 1 << 20
_ASCII = b"\t\n\r" + bytes(range(0x20, 0x7F))
_CONTROL = bytes(byte for byte in range(0x20) if byte not in b"\t\n\v\f\r\x1b")


@dataclass(frozen=True)
class TokenBin:
    """Token files under ``--data_path``: a folder that `nanokimi prepare` made, ``.bin`` files, or a folder of them.

    In a folder, files called ``val*`` are held out. Without any, a share of the documents is, by their hash; of
    fewer than 100, the end of the row. With a share of 0 nothing is, and ``val*`` files are left alone.

    Args:
        path, val_path: as the user gave them; "" as ``val_path`` for the rule above.
        fraction: the share.
    """

    path: str
    val_path: str = ""
    fraction: float = 0.05
    _search: Search = field(default_factory=Search, compare=False)

    def find_tokenizer(self) -> Tokenizer | None:
        """The ``tokenizer.json`` beside the files, or the one that a header names, unless that must be trained."""
        first = self._paths[0][0]
        beside = first.with_name(TOKENIZER)
        file = TokenFile.open(first) if _is_ours(first) else None
        if beside.is_file():
            found = load_tokenizer(str(beside))
            if file is not None and file.fingerprint != found.fingerprint:
                raise UserError(
                    f"{beside}: damaged, or another tokenizer than the one that made {first.name} ({file.tokenizer}): "
                    "put that one beside the file, or prepare the text anew"
                )
            return found
        name = "" if file is None else file.tokenizer
        return load_tokenizer(name) if name and bpe_size(name) is None else None

    def open(self, tokenizer: Tokenizer, log: Callable[[str], None]) -> Corpus:
        """Maps the files and divides them.

        Raises:
            UserError: there are none; made by another tokenizer, ids beyond its vocabulary, of odd length, empty, text.
        """
        folder = Path(self.path)
        if (folder / MANIFEST).is_file():
            found = TokenSet.open(folder, verify=not self.val_path)
            for file in (*found.train, *found.val):
                _require_tokenizer(file, tokenizer)
            if not self.val_path:
                return Corpus.of_set(found if self.fraction else found._replace(val=[]), tokenizer)
        train, val = ([_open(path, tokenizer) for path in paths] for paths in self._paths)
        if self._search.note:
            log(f"note: {self.path}: left out {self._search.note}")
        fraction = 0.0 if val else self.fraction
        kept, held_out, about = divide_tokens(train, fraction)
        if val:
            held_out = TokenArray([file.tokens for file in val])
            about = "in " + ", ".join(file.path.name for file in val)
        summary = f"training on {len(kept):,} tokens of {self.path}; "
        summary += "nothing held out" if held_out is None else f"held out ({about}): {len(held_out):,} tokens"
        identity = short_hash([[file.sha256 for file in train], fraction])
        return Corpus(tokenizer, TrainData.of_tokens(identity, kept), held_out, summary)

    @cached_property
    def _paths(self) -> tuple[list[Path], list[Path]]:
        found = find_token_files(self.path, "--data_path", self._search)
        from_folder = os.path.isdir(self.path)
        train = [path for path in found if not (from_folder and path.name.startswith("val"))]
        if not train:
            raise UserError(f"--data_path {self.path}: all of its files are called val*: there is nothing to train on")
        if not self.val_path:
            return train, [path for path in found if path not in train] if self.fraction else []
        val = find_token_files(self.val_path, "--val_path", self._search)
        if {path.resolve() for path in train} & {path.resolve() for path in val}:
            raise UserError(f"--val_path {self.val_path}: is trained on too: name another file, or none")
        return train, val


def find_token_files(path: str, flag: str, search: Search) -> list[Path]:
    """The files that ``path`` means: a file, the ``.bin`` files of a folder, a pattern, or several with commas."""
    files: list[Path] = []
    for item in split_path(path):
        if os.path.isdir(item):
            found = search.files_in(Path(item), lambda name: name.endswith(".bin"))
            missing = " is a directory without .bin files: make them"
        else:
            found = [Path(item)] if os.path.lexists(item) else search.matching(item)
            missing = ": no such file: check the path, or make it"
        if not found:
            raise UserError(f"{flag} {item}{missing} with `nanokimi prepare`")
        files += found
    return search.once(files)


def divide_tokens(files: list[TokenFile], fraction: float) -> tuple[TokenArray, TokenArray | None, str]:
    """What to train on, what is held out, and the rule in words: that of a text, but for the hash of ids."""
    arrays = [file.tokens for file in files]
    everything = TokenArray(arrays)
    if sum(file.n_documents for file in files) < ENOUGH_DOCUMENTS or not fraction:
        cut = len(everything) - int(len(everything) * fraction)
        if cut == len(everything):
            return everything, None, ""
        return everything.part(0, cut), everything.part(cut, len(everything)), f"the last {fraction:g} of the tokens"
    kept, held_out = (np.array(runs, np.int64).reshape(-1, 3) for runs in _runs(files, fraction))
    if not len(kept) or not len(held_out):
        raise wrong_share(fraction, f"{'all' if len(held_out) else 'none'} of the documents")
    return TokenArray(arrays, kept), TokenArray(arrays, held_out), "documents by hash"


def _runs(files: list[TokenFile], fraction: float) -> tuple[list[list[int]], list[list[int]]]:
    """Stretches of documents that are kept, and of those that are held out: file, first token and end of each."""
    runs: tuple[list[list[int]], list[list[int]]] = [], []
    goes_on: bool | None = None  # whether a document that the file before left open is held out
    for number, file in enumerate(files):
        ends = [int(end) for end in file.document_ends]
        is_open = not ends or ends[-1] != file.n_tokens
        start = 0
        for end in [*ends, file.n_tokens] if is_open else ends:
            beginning = file.tokens[start : min(end, start + HASHED_TOKENS)].astype("<u4").tobytes()
            held_out = in_share(beginning, fraction) if goes_on is None else goes_on
            side = runs[held_out]
            if side and (side[-1][0], side[-1][2]) == (number, start):
                side[-1][2] = end
            else:
                side.append([number, start, end])
            start, goes_on = end, held_out if is_open and end == file.n_tokens else None
    return runs


# ---- opening one file -----------------------------------------------------------------------------------


def _open(path: Path, tokenizer: Tokenizer) -> TokenFile:
    if not _is_ours(path):
        return _open_plain(path, tokenizer)
    file = TokenFile.open(path)
    _require_tokenizer(file, tokenizer)
    file.verify()
    return file


def _require_tokenizer(file: TokenFile, tokenizer: Tokenizer) -> None:
    if file.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{file.path}: made by another tokenizer ({file.tokenizer}) than {tokenizer.name}: put its tokenizer.json "
            "beside the file and leave tokenizer_name out, or prepare the text anew"
        )


def _is_ours(path: Path) -> bool:
    if path.is_dir():
        raise UserError(f"{path} is a directory: name the token files in it")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file: it is mapped into memory, so save the tokens to disk first")
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC + HEADER_START))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not start:
        raise UserError(f"{path}: the file is empty: make it anew with `nanokimi prepare`")
    return start.startswith(MAGIC) or start.endswith(HEADER_START)  # the other one may be damaged


def _open_plain(path: Path, tokenizer: Tokenizer) -> TokenFile:
    """A file of nothing but ids: uint16, or uint32 for vocabularies above 65,536 or where ``FILE.json`` says so."""
    dtype = _sidecar_dtype(path) or np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(LOOKED_AT_BYTES)
    if _is_text(start):
        raise UserError(f"{path}: this is text, not tokens: train on it with --dataset local, or `nanokimi prepare` it")
    if size % dtype.itemsize:
        raise UserError(f"{path}: {size} bytes are no whole number of {dtype.name} tokens: truncated, or no token file")
    if dtype.itemsize == 2 and _looks_like_uint32(start):
        raise UserError(
            f"{path}: looks like uint32 tokens and would be read as uint16: say so in {path.name}.json: "
            '{"dtype": "uint32"}'
        )
    tokens = np.memmap(path, dtype, "r")
    sha256, ends = hashlib.sha256(), []
    with progress_bar(f"checking {path}", size) as advance:
        for begin in range(0, len(tokens), BLOCK_TOKENS):
            block = np.asarray(tokens[begin : begin + BLOCK_TOKENS])
            _require_known(path, block, begin, tokenizer)
            sha256.update(block.tobytes())
            ends.append(np.flatnonzero(block == tokenizer.eot_id) + (begin + 1))
            advance(block.nbytes)
    name, fingerprint = tokenizer.name, tokenizer.fingerprint
    return TokenFile(path, tokens, np.concatenate(ends), sha256.hexdigest(), name, fingerprint, tokenizer.vocab_size)


def _require_known(path: Path, block: NDArray[Any], begin: int, tokenizer: Tokenizer) -> None:
    unknown = np.flatnonzero(block >= tokenizer.vocab_size)
    if len(unknown):
        at = int(unknown[0])
        short = f', or, if it is of uint16, say {{"dtype": "uint16"}} in {path.name}.json'
        raise UserError(
            f"{path}: token {int(block[at])} at position {begin + at} is beyond the {tokenizer.vocab_size} entries of "
            f"{tokenizer.name}: name the tokenizer that made the file with --set tokenizer_name=..."
            f"{short if block.itemsize == 4 else ''}"
        )


def _sidecar_dtype(path: Path) -> Any:
    sidecar = path.with_name(f"{path.name}.json")
    if not os.path.isfile(sidecar):  # unlike Path's this takes names that are too long
        return None
    try:
        name = json.loads(sidecar.read_text(encoding="utf-8"))["dtype"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{sidecar}: write it as {{"dtype": "uint16"}} or {{"dtype": "uint32"}}') from error
    if name not in ("uint16", "uint32"):
        raise UserError(f"{sidecar}: dtype {name!r}: only uint16 and uint32 can be read")
    return np.dtype(name).newbyteorder("<")


def _is_text(data: bytes) -> bool:
    """Whether the start of a file is text: UTF-8 without control characters, or mostly ASCII; ids hardly ever are."""
    if len(data.translate(None, _CONTROL)) < len(data):
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= len(data) - 4 or len(data.translate(None, _ASCII)) < len(data) / 10
    return True


def _looks_like_uint32(data: bytes) -> bool:
    """Whether every second number is as small as the upper half of an id, and the others are not."""
    numbers = np.frombuffer(data[: len(data) // 4 * 4], "<u2")
    lower, upper = numbers[::2], numbers[1::2]
    return len(numbers) >= 64 and int(upper.max()) <= 3 < len(np.unique(lower)) and int(lower.max()) > 3
