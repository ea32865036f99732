"""The options of a generation, for the library and the command line. Imports nothing heavy: ``--help`` stays fast."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypedDict

from nanokimi.config import MAX_SEED, suggest
from nanokimi.errors import UserError
from nanokimi.native import WEIGHT_FORMATS as WEIGHT_FORMATS

DECODERS = ("auto", "eager", "native", "graph")  # see new_decoder
PREFILL_CHUNK = 1024  # prompt tokens that the engine reads at once by default: see docs/decoding.md


class SamplingKeywords(TypedDict, total=False):
    """The keyword arguments of ``generate`` that its relatives take as well: fields of ``SamplingOptions``."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    max_tokens: int


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn, and where a continuation ends. The filters apply in the order in which they stand here.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens; 0 is off.
        top_p: keep the smallest set of tokens that holds this probability; 1 is off, 0 is greedy.
        min_p: keep tokens at least this likely relative to the most likely one; 0 is off.
        seed: the same seed draws the same tokens; None draws new ones each time.
        max_tokens: most tokens to generate; 0 generates none.
        stop: strings that end the text; they are not part of it.

    Raises:
        UserError: a value is out of range; the message names the flag.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 100
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"--top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"--top_p must be from 0 (greedy) to 1 (off), got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"--min_p must be from 0 (off) to 1, got {self.min_p}")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"--seed must be from 0 to {MAX_SEED}, got {self.seed}")
        if self.max_tokens < 0:
            raise UserError(f"--max_tokens must be 0 or more, got {self.max_tokens}")
        if "" in self.stop:
            raise UserError("--stop must not be empty: name the text that ends the reply, or leave it out")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken without a draw."""
        return self.temperature == 0 or self.top_p == 0

    @property
    def unfiltered(self) -> bool:
        """Whether every token may be drawn."""
        return self.top_k == 0 and self.top_p == 1 and self.min_p == 0

    def with_value(self, name: str, text: str) -> SamplingOptions:
        """A copy whose field ``name`` is read from ``text``, as the chat's ``/set`` gives it.

        Raises:
            UserError: there is no such field, or it does not take this value.
        """
        types = {field.name: str(field.type) for field in dataclasses.fields(self)}
        if name not in types:
            raise UserError(f"unknown setting {name!r}{suggest(name, set(types)) or ': choose ' + ', '.join(types)}")
        value: Any = None
        try:
            if name == "stop":  # one text; a line break or tab cannot be typed into a line
                value = (text.replace(r"\n", "\n").replace(r"\t", "\t"),) if text else ()
            elif name != "seed" or text not in ("", "none"):
                value = float(text) if types[name] == "float" else int(text)
        except ValueError:
            expected = {"float": "a number", "int": "a whole number"}.get(types[name], "a whole number or none")
            raise UserError(f"{name} takes {expected}, got {text!r}") from None
        return dataclasses.replace(self, **{name: value})
