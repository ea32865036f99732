"""A byte-level BPE as a GGUF file holds it, for llama.cpp's tokenizer ``gpt2``.

llama.cpp splits text into words by rules that it knows by name; there is no way to tell it another rule. So only
tokenizers with one of these rules can be exported: their ids are then the same for every text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError

# Token types of the format.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_REMEDY = "choose tokenizer_name byte, bpe:N or HuggingFaceTB/SmolLM-135M before training, or export to hf"


@dataclass(frozen=True)
class Vocabulary:
    """The ``tokenizer.ggml`` keys of a GGUF file.

    Attributes:
        pre: llama.cpp's name of the rule that splits text into words.
        tokens: text of every id, as the byte-level alphabet writes it; one per row of the embedding.
        types: ``NORMAL``, ``CONTROL``, ``USER_DEFINED`` or ``UNUSED``, one per token.
        merges: ``left right``, the most frequent first; never empty.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]


def gguf_vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """``tokenizer`` for a model whose embedding has ``size`` rows; those without a token are marked as unused.

    Raises:
        UserError: llama.cpp would split text otherwise, or the tokenizer has more tokens than the model.
    """
    layout = json.loads(tokenizer.to_json())
    pre = _pre_tokenizer(tokenizer.name, layout)
    _check_model(tokenizer.name, layout["model"])
    if tokenizer.vocab_size > size:
        raise UserError(
            f"tokenizer {tokenizer.name}: has {tokenizer.vocab_size} entries, the model only {size} (vocab_size): "
            "it belongs to another model"
        )
    texts = {token_id: text for text, token_id in layout["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, NORMAL)
    for added in layout["added_tokens"]:
        texts[added["id"]] = added["content"]
        kinds[added["id"]] = _added_type(tokenizer.name, added)
    if kinds[tokenizer.eot_id] == USER_DEFINED:
        raise _refusal(tokenizer.name, f"{tokenizer.eot} ends documents but is not marked as special: mark it, or")
    kinds[tokenizer.eot_id] = CONTROL
    taken = set(texts.values())
    tokens = [texts[i] if i in texts else _unused_name(i, taken) for i in range(size)]
    return Vocabulary(pre, tokens, [kinds.get(i, UNUSED) for i in range(size)], _merges(layout, tokenizer.eot))


def _pre_tokenizer(name: str, layout: dict[str, Any]) -> str:
    if layout["normalizer"] is not None:
        raise _refusal(name, f"its normalizer {layout['normalizer']['type']} is unknown to llama.cpp:")
    found = layout["pre_tokenizer"] or {"type": "none"}
    steps = found["pretokenizers"] if found["type"] == "Sequence" else [found]
    described = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if described == [gpt2]:
        return "gpt-2"
    if described == [{"type": "Digits", "individual_digits": True}, gpt2]:
        return "smollm"
    kinds = ", ".join(str(step["type"]) for step in steps)
    raise _refusal(name, f"llama.cpp has no rule that splits text as it does (pre_tokenizer {kinds}):")


def _check_model(name: str, model: dict[str, Any]) -> None:
    if model["type"] != "BPE":
        raise _refusal(name, f"is a {model['type']} model, not a byte-level BPE:")
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise _refusal(name, f"its option {option} is unknown to llama.cpp:")
    if model.get("ignore_merges"):
        raise _refusal(name, "its option ignore_merges is unknown to llama.cpp:")


def _added_type(name: str, added: dict[str, Any]) -> int:
    if added["special"]:
        return CONTROL
    for option in ("single_word", "lstrip", "rstrip"):
        if added[option]:
            raise _refusal(name, f"the option {option} of its token {added['content']!r} is unknown to llama.cpp:")
    return USER_DEFINED


def _merges(layout: dict[str, Any], eot: str) -> list[str]:
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in layout["model"]["merges"]]
    # llama.cpp refuses a file without merges. This one never happens: words begin as single characters.
    return merges or [f"{eot} {eot}"]


def _unused_name(token_id: int, taken: set[str]) -> str:
    name = f"[PAD{token_id}]"
    while name in taken:
        name = f"[{name}]"
    return name


def _refusal(name: str, problem: str) -> UserError:
    return UserError(f"tokenizer {name}: {problem} {_REMEDY}")
