"""Decoding and prefill of our decoders, transformers and llama.cpp; what weights in fewer bits cost a trained model."""

from __future__ import annotations

import math
from contextlib import nullcontext
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench.workloads.peers import deepseek_v3
from benchmarks.bench.workloads.setup import model_of, random_tokens, seconds, use
from nanokimi import checkpoint
from nanokimi.config import ModelConfig, TrainConfig, from_dict
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.inference.decoding import new_decoder, use_weights_
from nanokimi.insight.scoring import Scoring, score_text
from nanokimi.insight.text import choose_text
from nanokimi.interop.engines import LlamaCpp
from nanokimi.interop.gguf_file import write_gguf
from nanokimi.interop.loading import load

# A continuation goes on where the one before it ended, so the prefill is paid once and not timed.


class Ours:
    """One of our decoders.

    Args:
        length: tokens that each sequence has room for.
        slots: sequences at most.
        weights, kind: see ``new_decoder``.
    """

    def __init__(
        self, preset: str, length: int, slots: int, weights: str, kind: str, device: str, threads: int
    ) -> None:
        self.device = use(device, threads)
        model = model_of(preset, self.device, max_seq_length=length).eval()
        use_weights_(model, weights)
        self.config = model.config
        self.decoder = new_decoder(model, slots=slots, max_length=length, kind=kind, weights=weights)
        self.tokens: list[int] = []

    @torch.inference_mode()
    def fill(self, context: int, rows: int = 1) -> dict[str, Any]:
        """Prefills ``rows`` sequences of ``context`` tokens each; tokens per second are all of theirs."""
        prompts = random_tokens(self.config, rows, context).tolist()

        def work() -> None:
            self.tokens = [int(self.decoder.prefill(row, prompt).argmax()) for row, prompt in enumerate(prompts)]

        for row in range(self.decoder.slots):
            self.decoder.reset(row)
        return {"seconds": seconds(work, self.device)}

    @torch.inference_mode()
    def decode(self, count: int) -> dict[str, Any]:
        """``count`` greedy tokens for every sequence that ``fill`` made: seconds of one of them."""

        def work() -> None:
            rows = list(range(len(self.tokens)))
            for _ in range(count):
                self.tokens = self.decoder.step(rows, self.tokens).argmax(-1).tolist()

        return {"seconds": seconds(work, self.device) / count}


class Transformers:
    """transformers' ``generate``, greedy, with its cache.

    Args:
        weights: ``fp32`` or ``bf16``.
    """

    def __init__(self, preset: str, length: int, weights: str, device: str, threads: int) -> None:
        self.device = use(device, threads)
        self.config = ModelConfig.preset(preset, max_seq_length=length)
        self.model = deepseek_v3(self.config, self.device).eval()
        if weights == "bf16":
            self.model.bfloat16()
        self.ids = torch.empty(0)
        self.cache: Any = None

    def fill(self, context: int, rows: int = 1) -> dict[str, Any]:
        """As ``Ours.fill``: up to the first token that ``generate`` gives."""
        self.cache = import_module("transformers").DynamicCache(config=self.model.config)
        self.ids = random_tokens(self.config, rows, context).to(self.device)
        return {"seconds": seconds(lambda: self._generate(1), self.device)}

    def decode(self, count: int) -> dict[str, Any]:
        """As ``Ours.decode``, by one call of ``generate``."""
        return {"seconds": seconds(lambda: self._generate(count), self.device) / count}

    @torch.inference_mode()
    def _generate(self, count: int) -> None:
        ids: Tensor = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=self.cache,
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert ids.shape[1] == self.ids.shape[1] + count
        self.ids = ids


class GgufFiles:
    """Writes the random model of a preset; its tokenizer is that of bytes, the other entries are unused."""

    def __init__(self, preset: str, length: int, device: str, threads: int) -> None:
        self.model = model_of(preset, use(device, threads), max_seq_length=length)

    def write(self, path: str, dtype: str) -> dict[str, Any]:
        """One file."""
        weights, tokenizer = self.model.state_dict(), load_tokenizer("byte")
        write_gguf(Path(path), self.model.config, weights, tokenizer, dtype=dtype, name="random")
        return {}


class LlamaCppDecoder:
    """A file opened in llama.cpp.

    Args:
        length: tokens of context.
        defaults: flash attention and an fp16 cache, as llama.cpp has them by itself; else neither, and fp32.
    """

    def __init__(self, preset: str, path: str, length: int, defaults: bool, device: str, threads: int) -> None:
        assert use(device, threads).type == "cpu"
        self.config = ModelConfig.preset(preset, max_seq_length=length)
        self.engine = _Timed(Path(path), context=length, threads=threads or torch.get_num_threads(), defaults=defaults)
        self.ids: list[int] = []

    def fill(self, context: int) -> dict[str, Any]:
        """Prefills ``context`` tokens, nothing kept from before."""
        prompt = random_tokens(self.config, context).tolist()
        answer = self.engine.complete(prompt, 1, reuse=False)
        self.ids = prompt + answer["tokens"]
        return {"seconds": answer["timings"]["prompt_ms"] / 1000}

    def decode(self, count: int) -> dict[str, Any]:
        """Seconds of one of ``count`` tokens after what ``fill`` read: its clock starts after the first one."""
        answer = self.engine.complete(self.ids, count + 1, reuse=True)
        assert answer["timings"]["prompt_n"] == 1, "the cache was not used"
        assert len(answer["tokens"]) == count + 1
        self.ids += answer["tokens"]
        return {"seconds": answer["timings"]["predicted_ms"] / 1000 / count}

    def about(self) -> dict[str, Any]:
        """Version and instruction sets that its one build uses."""
        import xllamacpp

        return {"version": metadata.version("xllamacpp"), "system": xllamacpp.get_system_info()}


class _Timed(LlamaCpp):
    """Whole answers, with llama.cpp's own timings."""

    def complete(self, tokens: list[int], count: int, *, reuse: bool) -> dict[str, Any]:
        """``count`` greedy tokens; ``reuse``: of the cache, what stands in it already."""
        return self._ask(
            "/completion",
            prompt=tokens,
            n_predict=count,
            temperature=0.0,
            samplers=["temperature"],
            ignore_eos=True,
            return_tokens=True,
            cache_prompt=reuse,
        )


BATCH_SIZE = 8


class Formats:
    """A checkpoint and the text that its run held out."""

    def __init__(self, path: str, device: str, threads: int) -> None:
        self.device, self.path = use(device, threads), path
        self.config = from_dict(TrainConfig, checkpoint.read(Path(path))["train_config"])

    def score(self, weights: str, max_tokens: int) -> dict[str, Any]:
        """Bits per byte with every matrix rounded to ``weights``; 0 tokens: all of the text."""
        model, tokenizer = load(self.path, device=self.device)
        use_weights_(model, weights)
        scoring = Scoring(BATCH_SIZE, nullcontext())
        nats, n_bytes = 0.0, 0
        for text in choose_text(self.config, tokenizer, held_out=True, log=lambda _: None):
            found = score_text(model, tokenizer, text.read(lambda _: None), scoring, max_tokens=max_tokens)
            nats, n_bytes = nats + found.nats, n_bytes + found.n_bytes
        return {"bits_per_byte": nats / math.log(2) / n_bytes, "n_bytes": n_bytes}
