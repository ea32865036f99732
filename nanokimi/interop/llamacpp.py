"""llama.cpp inside this process, through the package xllamacpp: an engine that shares no code with ours."""

from __future__ import annotations

import http.client
import json
import secrets
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import RunError
from nanokimi.interop.receipt import TEXT, Comparison, NotCompared, fixed_tokens, mean_loss
from nanokimi.model.transformer import Transformer

# Log-probabilities come as text: so many take a few seconds.
_MOST_VALUES = 500_000
_FEWEST_POSITIONS = 16
# llama.cpp computes probabilities in fp32 and takes their logarithm: below this they lose digits.
_LOWEST = -80.0
_FORCED = 1e9  # added to a logit, decides the choice
_ALL = 1 << 30


def compare_llamacpp(path: Path, model: Transformer, tokenizer: Tokenizer) -> Comparison:
    """How far llama.cpp's log-probabilities after the fixed text differ from ours.

    Args:
        path: the GGUF file.
        model: in fp32, with the weights that the file holds (see ``gguf_file.stored_weights``).

    Raises:
        NotCompared: xllamacpp is not installed.
        RunError: llama.cpp does not read the file, or splits the fixed text into other tokens.
    """
    tokens = fixed_tokens(tokenizer, model.config.max_seq_length - 1)  # llama.cpp wants room for one more
    count = min(len(tokens), max(_FEWEST_POSITIONS, _MOST_VALUES // model.config.vocab_size))
    positions = torch.linspace(0, len(tokens) - 1, count).long().tolist()
    with LlamaCpp(path, context=len(tokens) + 1) as engine:
        _check_tokens(path, tokenizer.encode(TEXT), engine.tokenize(TEXT))
        theirs = engine.log_probs(tokens, positions)
        loss_there = engine.loss(tokens)
    with torch.no_grad():
        logits = model(torch.tensor([tokens], device=next(model.parameters()).device))[0].double().cpu()
    ours = logits[positions].log_softmax(dim=-1)
    difference = ours.clamp(min=_LOWEST) - theirs.double().clamp(min=_LOWEST)
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


def _check_tokens(path: Path, ours: list[int], theirs: list[int]) -> None:
    if ours == theirs:
        return
    same = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    first = min(len(ours), len(theirs)) if same is None else same
    raise RunError(
        f"{path}: llama.cpp splits the fixed text otherwise: token {first} is {theirs[first : first + 1]} there, "
        f"{ours[first : first + 1]} here: please report this tokenizer"
    )


class LlamaCpp:
    """A GGUF file opened in llama.cpp, strictly: fp32 cache, no flash attention. A context manager.

    Args:
        path: the GGUF file.
        context: tokens of context, for which memory is taken at once; 0 takes the model's own.
        threads: of the CPU; 0 takes as many as PyTorch uses.
        defaults: cache and attention as llama.cpp has them by itself, for speed.

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
        parameters = _quiet_parameters(xllamacpp, path)
        if not defaults:
            _make_strict(xllamacpp, parameters)
        parameters.n_ctx = context
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads or torch.get_num_threads()
        parameters.api_keys = [self._key]
        try:
            self._server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise RunError(f"{path}: llama.cpp does not read it: export the model again") from error
        self._letter = self.tokenize("a")[0]

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine and frees its memory."""
        self._server = None

    def tokenize(self, text: str) -> list[int]:
        """llama.cpp's ids of ``text``, nothing added; special tokens written in it are plain text."""
        tokens: list[int] = self._ask("/tokenize", content=text, add_special=False, parse_special=False)["tokens"]
        return tokens

    def log_probs(self, tokens: Sequence[int], positions: Sequence[int] | None = None) -> Tensor:
        """Log-probabilities of the token behind each of ``positions`` (default: all), ``[positions, vocab]`` in fp32.

        Every value is sent as text: a thousand positions of a large vocabulary take minutes.
        """
        rows = []
        for position in range(len(tokens)) if positions is None else positions:
            # llama.cpp tells probabilities only where it chose a token that is text of its own: make it choose one.
            found = self._choose(tokens[: position + 1], self._letter, n_probs=_ALL)[0]["top_logprobs"]
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
        """The ``count`` most likely tokens behind ``tokens``, one after the other; none behind an end of text."""
        answer = self._ask("/completion", prompt=list(tokens), n_predict=count, temperature=0.0, return_tokens=True)
        chosen: list[int] = answer["tokens"]
        return chosen

    def _choose(self, tokens: Sequence[int], choice: int, *, n_probs: int) -> list[dict[str, Any]]:
        """What is told about the token behind ``tokens`` when it is ``choice``: probabilities do not know of that."""
        bias = [[choice, _FORCED]]
        answer = self._ask("/completion", prompt=list(tokens), n_predict=1, n_probs=n_probs, logit_bias=bias)
        told: list[dict[str, Any]] = answer.get("completion_probabilities", [])
        return told

    def _ask(self, endpoint: str, **request: Any) -> dict[str, Any]:
        address = urlsplit(self._server.listening_address)
        connection = http.client.HTTPConnection(str(address.hostname), address.port)
        try:
            body = json.dumps(request).encode()
            connection.request("POST", endpoint, body, {"Authorization": f"Bearer {self._key}"})
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        if "error" in answer:
            raise RunError(f"{self.path}: llama.cpp: {answer['error'].get('message', answer['error'])}")
        return answer


def _quiet_parameters(xllamacpp: Any, path: Path) -> Any:
    """Settings under which llama.cpp prints nothing and does not look around."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.verbosity = -1
    parameters.n_gpu_layers = 0
    parameters.n_parallel = 1
    parameters.warmup = parameters.fit_params = parameters.ui = parameters.endpoint_slots = False
    parameters.cache_ram_mib = parameters.n_ctx_checkpoints = 0
    return parameters


def _make_strict(xllamacpp: Any, parameters: Any) -> None:
    """Rounds no more than it has to."""
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
