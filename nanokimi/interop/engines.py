"""Other programs that compute the same from an exported model: transformers, and llama.cpp inside this process."""

from __future__ import annotations

import http.client
import json
import secrets
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.nn import functional as F

from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import RunError
from nanokimi.model.transformer import Transformer
from nanokimi.receipt import Comparison, NotCompared

# Log-probabilities of llama.cpp come as text: so many take a few seconds.
MOST_VALUES = 500_000
FEWEST_POSITIONS = 16
# llama.cpp computes probabilities in fp32 and takes their logarithm: below this they lose digits.
LOWEST = -80.0
FORCED = 1e9  # added to a logit, decides the choice
ALL = 1 << 30

# What all engines read: prose, code, white space, other scripts, emoji. Fixed, so that receipts can be compared.
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


# ---- transformers ---------------------------------------------------------------------------------------


@torch.no_grad()
def compare_transformers(folder: Path, model: Transformer, tokenizer: Tokenizer) -> Comparison:
    """How far the logits of ``AutoModelForCausalLM`` for the fixed text differ from ours, both in fp32.

    Args:
        folder: as exported; its weights are those of ``model``.

    Raises:
        NotCompared: transformers is not installed.
        RunError: transformers does not read the folder, or splits the fixed text into other tokens.
    """
    try:
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise NotCompared("not compared with transformers, which is not here: pip install 'nanokimi[hf]'") from None
    with _quiet(transformers):
        try:
            theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            ids = AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False)["input_ids"]
        except Exception as error:  # whatever its many parts raise
            reason = " ".join(str(error).split())  # some of its messages have many lines
            raise RunError(f"transformers {transformers.__version__} does not read it: {reason}") from error
    if ids != tokenizer.encode(TEXT):
        raise RunError("transformers splits the fixed text into other tokens: please report this tokenizer")
    tokens = ids[: model.config.max_seq_length]
    batch = torch.tensor([tokens])
    ours = model(batch.to(next(model.parameters()).device)).cpu()
    found = theirs.eval()(batch).logits
    return Comparison(
        engine="transformers",
        version=transformers.__version__,
        measure="logits",
        max_difference=float((ours - found).abs().max()),
        positions=len(tokens),
        loss=mean_loss(ours[0], tokens),
        loss_there=mean_loss(found[0], tokens),
        tokens=len(tokens),
    )


def mean_loss(logits: Tensor, tokens: list[int]) -> float:
    """Mean loss in nats per token of predicting ``tokens`` from each other, given ``logits`` ``[T, vocab]``."""
    return float(F.cross_entropy(logits[:-1].double(), torch.tensor(tokens[1:])))


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# ---- llama.cpp ----------------------------------------------------------------------------------------


@torch.no_grad()
def compare_llamacpp(path: Path, model: Transformer, tokenizer: Tokenizer) -> Comparison:
    """How far llama.cpp's log-probabilities after the fixed text differ from ours.

    Args:
        path: the GGUF file.
        model: in fp32, with the weights that the file holds (see ``gguf_file.stored_weights``).

    Raises:
        NotCompared: xllamacpp is not installed.
        RunError: llama.cpp does not read the file, or splits the fixed text into other tokens.
    """
    tokens = tokenizer.encode(TEXT)[: model.config.max_seq_length - 1]  # llama.cpp wants room for one more
    count = min(len(tokens), max(FEWEST_POSITIONS, MOST_VALUES // model.config.vocab_size))
    positions = torch.linspace(0, len(tokens) - 1, count).long().tolist()
    with LlamaCpp(path, context=len(tokens) + 1) as engine:
        here, there = tokenizer.encode(TEXT), engine.tokenize(TEXT)
        if here != there:
            first = next(i for i, (one, other) in enumerate(zip_longest(here, there)) if one != other)
            raise RunError(
                f"{path}: llama.cpp splits the fixed text into other tokens: token {first} is "
                f"{there[first : first + 1]} there, {here[first : first + 1]} here: please report this tokenizer"
            )
        theirs = engine.log_probs(tokens, positions)
        loss_there = engine.loss(tokens)
    logits = model(torch.tensor([tokens], device=next(model.parameters()).device))[0].double().cpu()
    ours = logits[positions].log_softmax(dim=-1)
    difference = ours.clamp(min=LOWEST) - theirs.double().clamp(min=LOWEST)
    return Comparison(
        engine="llama.cpp (xllamacpp)",
        version=metadata.version("xllamacpp"),
        measure="log-probabilities",
        max_difference=float(difference.abs().max()),
        positions=count,
        loss=mean_loss(logits, tokens),
        loss_there=loss_there,
        tokens=len(tokens),
    )


class LlamaCpp(AbstractContextManager["LlamaCpp"]):
    """A GGUF file opened in llama.cpp, by default strictly: fp32 cache, no flash attention.

    Args:
        path: the GGUF file.
        context: tokens of context, for which memory is taken at once; 0 takes the model's own.
        threads: of the CPU; 0 takes as many as PyTorch uses.
        defaults: use llama.cpp's own cache and attention, which are faster.

    Raises:
        NotCompared: xllamacpp is not installed.
        RunError: llama.cpp does not read the file.
    """

    def __init__(self, path: Path, *, context: int = 0, threads: int = 0, defaults: bool = False) -> None:
        try:
            import xllamacpp
        except ImportError as error:
            raise NotCompared("not compared with llama.cpp, which is not here: pip install xllamacpp") from error
        self.path = path
        self._key = secrets.token_hex()  # it listens on this machine's loopback: only we may ask
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.verbosity = -1
        parameters.n_gpu_layers, parameters.n_parallel = 0, 1
        parameters.warmup = parameters.fit_params = parameters.ui = parameters.endpoint_slots = False
        parameters.cache_ram_mib = parameters.n_ctx_checkpoints = 0
        if not defaults:
            parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.n_ctx = context
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads or torch.get_num_threads()
        parameters.api_keys = [self._key]
        try:
            self._server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise RunError(f"{path}: llama.cpp does not read it: export the model again") from error
        self._letter = self.tokenize("a")[0]

    def __exit__(self, *_: object) -> None:
        self._server = None  # ends the engine and frees its memory

    def tokenize(self, text: str) -> list[int]:
        """llama.cpp's ids of ``text``, nothing added; special tokens written in it are plain text."""
        tokens: list[int] = self._ask("/tokenize", content=text, add_special=False, parse_special=False)["tokens"]
        return tokens

    def log_probs(self, tokens: Sequence[int], positions: Sequence[int] | None = None) -> Tensor:
        """Log-probabilities of the token after each of ``positions`` (default: all), ``[positions, vocab]`` in fp32.

        Every value is sent as text: a thousand positions of a large vocabulary take minutes.
        """
        rows = []
        for position in range(len(tokens)) if positions is None else positions:
            # llama.cpp tells probabilities only where it chose a token that is text of its own: make it choose one.
            found = self._choose(tokens[: position + 1], self._letter, n_probs=ALL)[0]["top_logprobs"]
            row = torch.empty(len(found))
            row[torch.tensor([entry["id"] for entry in found])] = torch.tensor([entry["logprob"] for entry in found])
            rows.append(row)
        return torch.stack(rows)

    def loss(self, tokens: Sequence[int]) -> float:
        """Mean cross-entropy in nats of each of the (two or more) tokens but the first, given those before it."""
        total = 0.0
        for position in range(1, len(tokens)):
            told = self._choose(tokens[:position], tokens[position], n_probs=1)
            if told:
                total -= told[0]["logprob"]
            else:  # a part of a character, or an end of text
                total -= float(self.log_probs(tokens, [position - 1])[0, tokens[position]])
        return total / (len(tokens) - 1)

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The ``count`` most likely tokens after ``tokens``, one by one; it stops at an end of text."""
        answer = self._ask("/completion", prompt=list(tokens), n_predict=count, temperature=0.0, return_tokens=True)
        chosen: list[int] = answer["tokens"]
        return chosen

    def _choose(self, tokens: Sequence[int], choice: int, *, n_probs: int) -> list[dict[str, Any]]:
        """What llama.cpp tells about the token after ``tokens`` when it is made to choose ``choice``."""
        bias = [[choice, FORCED]]
        answer = self._ask("/completion", prompt=list(tokens), n_predict=1, n_probs=n_probs, logit_bias=bias)
        told: list[dict[str, Any]] = answer.get("completion_probabilities", [])
        return told

    def _ask(self, endpoint: str, **question: Any) -> dict[str, Any]:
        address = urlsplit(self._server.listening_address).netloc
        with closing(http.client.HTTPConnection(address)) as connection:
            body = json.dumps(question).encode()
            connection.request("POST", endpoint, body, {"Authorization": f"Bearer {self._key}"})
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
        if "error" in answer:
            raise RunError(f"{self.path}: llama.cpp: {answer['error'].get('message', answer['error'])}")
        return answer
