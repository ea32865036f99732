"""``receipt.json``: what was exported, its checksums, and how far an independent engine differs from this one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.files import atomic_write, sha256_of

FORMAT = "nanokimi-receipt"
VERSION = 1
RECEIPT = "receipt.json"

# What both engines read: prose, code, white space, other scripts, emoji. Fixed, so that receipts can be compared.
TEXT = '''The lamp by the door had been burning since four o'clock, and nobody could say who lit it.
"It wasn't me," said the older of the two, "I've only just come in; ask them, they'll know."

def total(prices: dict[str, float], *, tax: float = 0.19) -> float:
    """Sum of all prices, tax included."""
    return sum(prices.values()) * (1.0 + tax)  # 3 items -> 12.50 EUR

for name, value in sorted({"tea": 2.5, "bread": 3.75}.items()):
\tprint(f"{name:>10} | {value:8.2f}")

Größe, façade, smørrebrød, żółw; Москва, Αθήνα, 東京は晴れ。서울, नमस्ते, مرحبا — 🙂👩‍🚀🇰🇪!
   1, 22, 333, 4444   ...   x=-1e-9;y!=0   https://example.org/a?b=c&d=%20
'''


@dataclass(frozen=True)
class Comparison:
    """What an independent engine computed beside this one, both in fp32 from the exported weights.

    Attributes:
        engine, version: which program, and its version.
        measure: ``logits`` or ``log-probabilities``, always over the whole vocabulary.
        max_difference: largest absolute difference, in nats. An engine that also rounds what it multiplies half
            precision or quantised weights with differs most where probabilities are smallest.
        positions: how many positions of the text were compared.
        loss, loss_there: mean loss of the text's tokens here and there, in nats per token.
        tokens: how many tokens of the text were read; their ids were equal.
    """

    engine: str
    version: str
    measure: str
    max_difference: float
    positions: int
    loss: float
    loss_there: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.engine} {self.version}: the same token ids; {self.measure} differ by at most "
            f"{self.max_difference:.2g} over {self.positions} positions, the loss by {self.loss_there - self.loss:.2g}"
        )


class NotCompared(Exception):
    """There is no engine to compare with; the message says which to install."""


def fixed_tokens(tokenizer: Tokenizer, max_length: int) -> list[int]:
    """The tokens of ``TEXT``, at most ``max_length``."""
    return tokenizer.encode(TEXT)[:max_length]


def mean_loss(logits: Tensor, tokens: list[int]) -> float:
    """Mean loss in nats per token of predicting ``tokens`` from each other, given ``logits`` ``[T, vocab]``."""
    return float(F.cross_entropy(logits[:-1].double(), torch.tensor(tokens[1:])))


def write_receipt(
    path: Path, files: Iterable[Path], *, target: str, dtype: str, compared: Comparison | NotCompared
) -> None:
    """Writes the receipt of the exported ``files``, which lie in its folder.

    Nothing in it depends on time or place: the same export leaves the same bytes.
    """
    found = {} if isinstance(compared, NotCompared) else asdict(compared)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "target": target,
        "dtype": dtype,
        "comparison": found or None,
        "not_compared": str(compared) if isinstance(compared, NotCompared) else None,
        "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(files)},
    }
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def verify_receipt(path: Path, wanted: Iterable[str]) -> None:
    """Checks the files named ``wanted`` against the receipt at ``path``, beside them; without one nothing is known.

    Raises:
        UserError: one is missing, cut short or changed; the message names it.
    """
    if not path.is_file():
        return
    for name, entry in _entries(path).items():
        if name not in set(wanted):
            continue
        file = path.with_name(name)
        if not file.is_file():
            raise UserError(f"{file}: missing, though {path.name} lists it: export or copy the folder again")
        if file.stat().st_size != entry.get("bytes"):
            raise UserError(
                f"{file}: {file.stat().st_size} bytes, {path.name} says {entry.get('bytes')}: "
                f"truncated or changed: export or copy it again, or remove {path.name} if the change is yours"
            )
        if sha256_of(file) != entry.get("sha256"):
            raise UserError(
                f"{file}: damaged or changed (it does not match its checksum in {path.name}): export or copy it "
                f"again, or remove {path.name} if the change is yours"
            )


def _entries(path: Path) -> Mapping[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = content["files"]
        if content["format"] != FORMAT or not all(isinstance(entry, dict) for entry in files.values()):
            raise KeyError("format")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a receipt of nanokimi: remove it, or export the model again") from error
    entries: dict[str, dict[str, Any]] = files
    return entries
