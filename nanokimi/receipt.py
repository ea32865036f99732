"""``receipt.json``: what was exported, its checksums, and how far an independent engine differs from this one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanokimi.errors import UserError
from nanokimi.files import atomic_write, sha256_of

FORMAT = "nanokimi-receipt"
VERSION = 1
RECEIPT = "receipt.json"
_KNOWN = {"format", "version", "target", "dtype", "comparison", "not_compared", "files"}


@dataclass(frozen=True)
class Comparison:
    """What an independent engine computed beside this one, both in fp32 from the exported weights."""

    engine: str
    version: str
    measure: str  # "logits" or "log-probabilities", always over the whole vocabulary
    max_difference: float  # the largest absolute difference, in nats
    positions: int  # how many positions of the text were compared
    loss: float  # mean loss of the text's tokens in nats per token, here
    loss_there: float  # and in the engine
    tokens: int  # how many tokens of the text were read; their ids were equal

    def __str__(self) -> str:
        return (
            f"{self.engine} {self.version}: the same token ids; {self.measure} differ by at most "
            f"{self.max_difference:.2g} over {self.positions} positions, the loss by {self.loss_there - self.loss:.2g}"
        )


class NotCompared(Exception):
    """There is no engine to compare with; the message says which to install."""


def write_receipt(
    path: Path, files: Iterable[Path], *, target: str, dtype: str, compared: Comparison | NotCompared
) -> None:
    """Writes the receipt of the exported ``files``, which lie in its folder.

    Nothing in it depends on time or place: the same export leaves the same bytes.
    """
    found = {} if isinstance(compared, NotCompared) else asdict(compared)
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "target": target,
        "dtype": dtype,
        "comparison": found or None,
        "not_compared": str(compared) if isinstance(compared, NotCompared) else None,
        "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(files)},
    }
    content["sha256"] = _sum_of(content)
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def verify_receipt(path: Path, wanted: Collection[str]) -> None:
    """Checks the files named ``wanted`` against the receipt at ``path``, beside them; without one nothing is known.

    Raises:
        UserError: one is missing, cut short or changed; the message names it.
    """
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("sha256", None)
        if digest not in (None, _sum_of(content)) or not content.keys() <= _KNOWN:  # None: of an earlier version
            raise ValueError("its contents do not match their checksum")
        listed = {name: (entry.get("bytes"), entry.get("sha256")) for name, entry in content["files"].items()}
        if content["format"] != FORMAT:
            raise KeyError("format")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a receipt of nanokimi, or damaged: remove it, or export again") from error
    for name in (name for name in listed if name in wanted):
        file, (size, digest) = path.with_name(name), listed[name]
        remedy = f"export or copy it again, or remove {path.name} if the change is yours"
        if not file.is_file():
            raise UserError(f"{file}: missing, though {path.name} lists it: export or copy the folder again")
        if file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes, {path.name} says {size}"
            raise UserError(f"{file}: {found}: truncated or changed: {remedy}")
        if sha256_of(file) != digest:
            raise UserError(f"{file}: damaged or changed (it does not match its checksum in {path.name}): {remedy}")


def _sum_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
