"""Text to token ids and back: one class for bytes, for a BPE trained here and for any ``tokenizer.json``."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

from nanokimi.console import attended
from nanokimi.errors import UserError
from nanokimi.files import atomic_write
from nanokimi.receipt import RECEIPT, verify_receipt

END_OF_TEXT = "<|endoftext|>"
MAX_VOCABULARY = 1 << 24  # of a BPE that is trained: room for all of them is taken at once
# What other families call it, tried in this order when there is no <|endoftext|>.
_OTHER_ENDS = ("<|end_of_text|>", "<｜end▁of▁sentence｜>", "[EOS]", "<eos>", "</s>", "<|eot_id|>", "<|im_end|>")
# Bytes between two splits, of which training a BPE looks at once: its time grows with their square.
LONGEST_TRAINED_WORD = 512
CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"  # what may lie beside a tokenizer.json
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ALTERNATIVES = "--set tokenizer_name=byte, --set tokenizer_name=bpe:4096, or the path of a local tokenizer.json"


class Tokenizer:
    """A ``tokenizers.Tokenizer`` that knows its end of text and the bytes that every token stands for.

    Args:
        inner: the tokenizer; padding and truncation, which its file may carry, are switched off.
        name: what the user called it.
        eot: the token that ends a document; None looks for the usual names.
        bos: what chat templates know as ``bos_token``; None: the end of text.
        chat_template: how messages become one text, in Jinja; see ``inference.chat_template``.

    Attributes:
        vocab_size: one more than the largest id.
        eot_id: id of the token that ends a document.
        bos_id: id of ``bos``, or of the end of text if it is no token.
        special_tokens: ids of the special tokens, end of text included, by how they are written.
        fixed_tokens: ids of the other added tokens, which are found wherever a text holds what they say.
        unknown_id: id of the token in place of what the vocabulary lacks, which stands for no text; None without one.
        fingerprint: SHA-256 of its canonical JSON; equal exactly when text becomes the same ids.

    Raises:
        UserError: it has no end-of-text token, or loses white space (WordPiece) so that text cannot be restored.
    """

    def __init__(
        self,
        inner: HFTokenizer,
        name: str,
        *,
        eot: str | None = None,
        bos: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True  # "<|endoftext|>" in a document is text, not a command
        self.name, self._inner = name, inner
        self._vocabulary: dict[str, int] = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        usual = (token for token in (END_OF_TEXT, *_OTHER_ENDS) if token in self._vocabulary)
        self.eot = eot or next(usual, "")
        if not self.eot:
            raise UserError(f"tokenizer {name}: has no end-of-text token such as {END_OF_TEXT}: use {_ALTERNATIVES}")
        self.eot_id = self._vocabulary[self.eot]
        self.bos = self.eot if bos is None else bos
        self.bos_id = self._vocabulary.get(self.bos, self.eot_id)
        self.chat_template = chat_template
        added: dict[int, AddedToken] = inner.get_added_tokens_decoder()
        layout = json.loads(inner.to_str())
        self.unknown_id = _unknown_id(layout["model"], self._vocabulary)
        special = {i for i, token in added.items() if token.special or i == self.eot_id}
        self.special_tokens = {added[i].content: i for i in added if i in special}
        self._special_bytes = {i: text.encode() for text, i in self.special_tokens.items()}
        self._special_bytes |= {i: text.encode() for text, i in self._vocabulary.items() if i == self.unknown_id}
        self.fixed_tokens = {added[i].content: i for i in added if i not in special}
        self.fingerprint = hashlib.sha256(json.dumps([layout, self.eot], sort_keys=True).encode()).hexdigest()
        pipeline = json.dumps([layout["normalizer"], layout["pre_tokenizer"], layout["decoder"]], ensure_ascii=False)
        self._byte_level = "ByteLevel" in pipeline
        plain = layout["normalizer"] is None and (layout["pre_tokenizer"] or {}).get("add_prefix_space") is False
        self._is_bytes = plain and self._vocabulary == _BYTES_AND_END
        if not self._byte_level and "▁" not in pipeline:
            raise UserError(f"tokenizer {name}: text cannot be restored from its tokens: use {_ALTERNATIVES}")

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, nothing added; special tokens in it are plain text. UnicodeEncodeError: lone surrogates."""
        data = text.encode()
        if self._is_bytes:
            return list(data)
        with self._errors_explained():
            ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of every text, on all cores."""
        if self._is_bytes:
            return [list(text.encode()) for text in texts]
        with self._errors_explained():
            return [e.ids for e in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    @contextmanager
    def _errors_explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(
                f"tokenizer {self.name}: cannot tokenise the text ({error}): use {_ALTERNATIVES}"
            ) from error

    def normalised(self, text: str) -> str:
        """What the tokenizer makes of ``text`` before it cuts it into tokens; without a normaliser the same."""
        normaliser = self._inner.normalizer
        changed = text if normaliser is None else str(normaliser.normalize_str(text))
        return changed if self._byte_level else changed.replace("▁", " ")

    def restored(self, ids: Iterable[int]) -> bytes:
        """The bytes of text that ``ids`` stand for, of which ``count_bytes`` counts the length."""
        return b"".join(map(self._text_bytes.__getitem__, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD, special tokens show as they are written."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes with which ``token`` is shown."""
        return self._text_bytes[token] or self._special_bytes.get(token, b"")

    def count_bytes(self, tokens: Tensor) -> int:
        """UTF-8 bytes of text that ``tokens`` stand for (ids of any shape, on the CPU); special tokens have none."""
        return int(self._byte_counts[tokens].sum())

    @cached_property
    def _text_bytes(self) -> list[bytes]:
        """The bytes of text of every id [vocab_size]; ``b""`` for special tokens and unused ids."""
        table = [b""] * self.vocab_size
        bytes_of = _from_byte_level if self._byte_level else _from_sentencepiece
        for token, token_id in self._vocabulary.items():
            if token not in self.special_tokens and token_id != self.unknown_id:
                table[token_id] = token.encode() if token in self.fixed_tokens else bytes_of(token)
        return table

    @cached_property
    def _byte_counts(self) -> Tensor:
        return torch.tensor([len(text) for text in self._text_bytes])

    def to_state(self) -> dict[str, str]:
        """Everything about it as plain strings, for a checkpoint."""
        state = {"name": self.name, "json": self._inner.to_str(), "eot": self.eot, "bos": self.bos}
        return state if self.chat_template is None else {**state, "chat_template": self.chat_template}

    @classmethod
    def from_state(cls, state: Mapping[str, str]) -> Tokenizer:
        """The tokenizer that ``to_state`` described, now or before it knew of ``bos`` and chat templates."""
        inner, template = HFTokenizer.from_str(state["json"]), state.get("chat_template")
        return cls(inner, state["name"], eot=state["eot"], bos=state.get("bos"), chat_template=template)

    def save(self, path: str | Path) -> None:
        """Writes a ``tokenizer.json`` that ``load_tokenizer`` and other programs read; OSError if it cannot."""
        with atomic_write(path) as file:
            file.write(self.to_json().encode())

    def to_json(self) -> str:
        return str(self._inner.to_str(pretty=True))


class TextStream:
    """Text of tokens that arrive one by one; an incomplete character is held back until it is whole.

    What it returns, joined, is ``tokenizer.decode`` of all ids, less an incomplete character at the very end.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that became complete with ``token``; may be empty."""
        return self._decoder.decode(self._token_bytes(token))

    @property
    def pending(self) -> bool:
        """Whether an incomplete character is held back."""
        return bool(self._decoder.getstate()[0])


def train_bpe(texts: Iterable[str], vocab_size: int, *, name: str = "") -> Tokenizer:
    """A byte-level BPE with GPT-2's splitting rule; the same texts give the same tokenizer.

    It has ``vocab_size`` entries, ``<|endoftext|>`` the last of them; fewer where the texts repeat too little.
    UserError if that has no room for the 256 bytes and the end of text, or could never be filled.
    """
    if vocab_size < 257:
        raise UserError(f"tokenizer_name bpe:{vocab_size}: needs at least 257 entries: 256 bytes and {END_OF_TEXT}")
    if vocab_size > MAX_VOCABULARY:
        raise UserError(f"tokenizer_name bpe:{vocab_size}: at most {MAX_VOCABULARY:,} entries can be learned: lower it")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner = _byte_level(models.BPE())
    as_saved = inner.pre_tokenizer
    short = pre_tokenizers.Split(Regex(f".{{1,{LONGEST_TRAINED_WORD}}}"), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([as_saved, short])
    attended(lambda: inner.train_from_iterator(texts, trainer), "training the tokenizer")
    inner.pre_tokenizer = as_saved
    inner.add_special_tokens([END_OF_TEXT])
    return Tokenizer(inner, name or f"bpe:{vocab_size}")


def load_tokenizer(name: str) -> Tokenizer:
    """``byte``, a ``tokenizer.json``, a folder that holds one, or the name of a Hugging Face repository.

    Raises:
        UserError: nothing usable under that name; the message names the alternatives.
    """
    if name == "byte":  # every byte its own token with its own value, then the end of text: a BPE without merges
        inner = _byte_level(models.BPE(vocab=_BYTE_OF, merges=[]))
        inner.add_special_tokens([END_OF_TEXT])
        return Tokenizer(inner, "byte")
    path = Path(name)
    if os.path.isdir(path):
        return _from_file(path / "tokenizer.json", name)
    if os.path.isfile(path) or path.suffix == ".json":
        return _from_file(path, name)
    return _from_hub(name)


def is_hub_name(name: str) -> bool:
    """Whether ``name`` can be that of a Hugging Face repository: ``owner/name`` or ``name``, and no path."""
    return bool(_HUB_NAME.fullmatch(name)) and ".." not in name


def bpe_size(name: str) -> int | None:
    """N of the tokenizer name ``bpe:N``, None for every other name; UserError if N is not a whole number."""
    if not name.startswith("bpe:"):
        return None
    if not name[4:].isdecimal():
        raise UserError(f"tokenizer_name {name}: write bpe:N with the number of entries, such as bpe:4096")
    return int(name[4:])


def _byte_level(model: models.BPE) -> HFTokenizer:
    inner = HFTokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    return inner


def _from_file(path: Path, name: str) -> Tokenizer:
    if not os.path.isfile(path):
        raise UserError(f"tokenizer_name {name}: there is no {path}: use {_ALTERNATIVES}")
    verify_receipt(path.with_name(RECEIPT), (path.name, CONFIG, CHAT_TEMPLATE))
    try:
        inner = HFTokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"tokenizer_name {name}: {path} is damaged ({error}): use {_ALTERNATIVES}") from error
    config = _config(path.with_name(CONFIG))
    eos, bos = _token(config, "eos_token"), _token(config, "bos_token")
    eot = eos if inner.token_to_id(END_OF_TEXT) is None and inner.token_to_id(eos) is not None else None
    return Tokenizer(inner, name, eot=eot, bos=bos if config else None, chat_template=_template_beside(path, config))


def _from_hub(name: str) -> Tokenizer:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    if not is_hub_name(name):
        raise UserError(f"tokenizer_name {name}: no such file, and not a repository name: use {_ALTERNATIVES}")
    try:
        path = try_to_load_from_cache(name, "tokenizer.json")
        if not isinstance(path, str):
            # One quick try: without a connection the download itself would retry for half a minute.
            get_hf_file_metadata(hf_hub_url(name, "tokenizer.json"))
            path = hf_hub_download(name, "tokenizer.json")
    except Exception as error:  # besides its own errors, those of whichever HTTP client the hub library uses
        raise UserError(f"tokenizer_name {name}: {hub_problem(error)}; or use {_ALTERNATIVES}") from error
    return _from_file(Path(path), name)


def hub_problem(error: Exception) -> str:
    """Why a repository's tokenizer could not be fetched."""
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "it is gated: accept its terms on the hub and run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such repository, or it is private: run `hf auth login`"
    if isinstance(error, EntryNotFoundError):
        return "the repository has no tokenizer.json"
    return f"it is not on this machine and the Hugging Face hub cannot be reached ({type(error).__name__})"


def _config(path: Path) -> dict[str, Any]:
    """What ``tokenizer_config.json`` says; nothing where there is none."""
    if not path.is_file():
        return {}
    with suppress(ValueError, RecursionError):
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict):
            return config
    raise UserError(f"{path}: not a JSON object: repair or remove it")


def _token(config: Mapping[str, Any], name: str) -> str:
    """How the token ``name`` of a ``tokenizer_config.json`` is written; empty if it names none."""
    token = config.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _template_beside(path: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template of ``tokenizer.json``'s folder: a file of its own, else the one of ``config``."""
    own = path.with_name(CHAT_TEMPLATE)
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{own}: not UTF-8 at byte {error.start}: repair or remove it") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name, as older versions of transformers wrote them
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str | None):
        raise UserError(f"{path.with_name(CONFIG)}: its chat_template is no text: repair or remove it")
    return template


# GPT-2's printable character for each byte: itself where it is visible, else the next one from U+0100 on.
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_BYTE_OF = dict(zip(_ALPHABET, sorted(range(256), key=lambda byte: chr(byte) not in _ALPHABET), strict=True))
_BYTES_AND_END = {**_BYTE_OF, END_OF_TEXT: 256}


def _unknown_id(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> int | None:
    unknown = model.get("unk_id")  # of Unigram; other models name the token
    return unknown if isinstance(unknown, int) else vocabulary.get(model.get("unk_token") or "")


def _from_byte_level(token: str) -> bytes:
    return bytes(_BYTE_OF[char] for char in token) if all(char in _BYTE_OF for char in token) else token.encode()


def _from_sentencepiece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
