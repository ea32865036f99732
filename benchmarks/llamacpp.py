"""The exported GGUF file in llama.cpp: probabilities, bits per byte, greedy tokens, for every type of weights.

    python -m benchmarks.llamacpp runs/demo/checkpoints/final.pt    # writes benchmarks/results/llamacpp-DATE.json

Each file is made by `nanokimi export gguf`, so its receipt is part of the result. The text is a file of the standard
library, cut to the model's context again and again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench.results import ROOT, about
from benchmarks.engines import NANOKIMI, PROMPT
from nanokimi import Transformer, generate_tokens, load
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.interop.engines import LlamaCpp
from nanokimi.interop.gguf_file import DTYPES

TEXT = textwrap.__file__
TOKENS, NEW_TOKENS = 2000, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="checkpoints")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="(default: %(default)s)")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for path in args.models:
        model, tokenizer = load(path)
        found = {dtype: measure(path, dtype, model, tokenizer) for dtype in args.dtypes.split(",")}
        results["/".join(path.parts[-3:])] = about() | {"bits_per_byte": bits_here(model, tokenizer), "types": found}
    target = ROOT / "benchmarks" / "results" / time.strftime("llamacpp-%Y-%m-%d.json")
    earlier = json.loads(target.read_text()) if target.exists() else {}
    target.write_text(json.dumps(earlier | results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def measure(path: Path, dtype: str, model: Transformer, tokenizer: Tokenizer) -> dict[str, Any]:
    """One type of weights: what the receipt says, and what llama.cpp makes of text and prompt."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        subprocess.run([*NANOKIMI, "export", "gguf", str(path), str(file), "--dtype", dtype], check=True)
        receipt = json.loads(file.with_name("model.gguf.receipt.json").read_text())
        prompt = tokenizer.encode(PROMPT)
        here = generate_tokens(model, prompt, max_tokens=NEW_TOKENS, temperature=0.0)
        with LlamaCpp(file) as engine:
            there = engine.greedy(prompt, NEW_TOKENS)
            nats = sum(engine.loss(piece) * (len(piece) - 1) for piece in pieces(tokenizer, model))
        return {
            "bytes": file.stat().st_size,
            "receipt": receipt["comparison"],
            "bits_per_byte": nats / math.log(2) / scored_bytes(tokenizer, model),
            "equal_greedy_tokens": next((i for i in range(NEW_TOKENS) if here[i] != there[i]), NEW_TOKENS),
        }


def pieces(tokenizer: Tokenizer, model: Transformer) -> list[list[int]]:
    """The text in stretches that leave llama.cpp its one token of room."""
    tokens, size = tokenizer.encode(Path(TEXT).read_text(encoding="utf-8"))[:TOKENS], model.config.max_seq_length - 1
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def scored_bytes(tokenizer: Tokenizer, model: Transformer) -> int:
    return sum(tokenizer.count_bytes(torch.tensor(piece[1:])) for piece in pieces(tokenizer, model))


@torch.no_grad()
def bits_here(model: Transformer, tokenizer: Tokenizer) -> float:
    nats = 0.0
    for piece in pieces(tokenizer, model):
        inputs, labels = torch.tensor([piece[:-1]]), torch.tensor([piece[1:]])
        nats += float(model(inputs, labels, label_count=1).cross_entropy)
    return nats / math.log(2) / scored_bytes(tokenizer, model)


if __name__ == "__main__":
    sys.exit(main())
