"""llama.cpp over our own GGUF files: prefill and greedy decoding, by its own clock."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench.subjects.shapes import model_of, random_tokens, use
from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.interop.engines import LlamaCpp
from nanokimi.interop.gguf_file import write_gguf


class Files:
    """Writes the random model of a preset; its tokenizer is that of bytes, the other entries are unused."""

    def __init__(self, preset: str, length: int, device: str, threads: int) -> None:
        self.model = model_of(preset, use(device, threads), max_seq_length=length)

    def write(self, path: str, dtype: str) -> dict[str, Any]:
        """One file."""
        weights, tokenizer = self.model.state_dict(), load_tokenizer("byte")
        write_gguf(Path(path), self.model.config, weights, tokenizer, dtype=dtype, name="random")
        return {}


class Engine:
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
        """Seconds of one of ``count`` tokens behind what ``fill`` read: its clock starts behind the first one."""
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
            "/completion", prompt=tokens, n_predict=count, temperature=0.0, samplers=["temperature"],
            ignore_eos=True, return_tokens=True, cache_prompt=reuse,
        )  # fmt: skip
