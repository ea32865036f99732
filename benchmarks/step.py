"""Speed beside transformers and torch.optim: the training step, what QK-Clip costs, decoding.

    make bench                                            # writes benchmarks/results/step-DATE.json
    python benchmarks/step.py --preset debug --repeats 2

Candidates take turns, so that whatever else the machine does hits all of them; the medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.inference.engine import generate_tokens
from nanokimi.interop.hf_config import huggingface_config
from nanokimi.model.transformer import Transformer
from nanokimi.optim.muonclip import MuonClip, parameters_by_role

ROOT = Path(__file__).parent.parent
CONTEXT, NEW_TOKENS = 128, 32  # of decoding
SLOW = 5  # torch.optim.Muon works in bf16, slow on a CPU without it: repeated this many times less often


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = ModelConfig.preset(args.preset)
    tokens = torch.randint(config.vocab_size, (args.batch_size, min(256, config.max_seq_length)))
    prompt = tokens[:1, : min(CONTEXT, config.max_seq_length - NEW_TOKENS)]
    ours = Transformer(config)
    shape = transformers.DeepseekV3Config(**huggingface_config(config))
    theirs = transformers.DeepseekV3ForCausalLM(shape)
    seconds = {
        "forward and backward": time_passes(ours, theirs, tokens, args.repeats),
        "optimizer": time_optimizers(ours, args.repeats),
        "decoding": time_decoding(ours, theirs, prompt, args.repeats),
    }
    passes, optimizers = seconds["forward and backward"], seconds["optimizer"]
    seconds["whole step"] = {name: passes[name] + optimizers[name] for name in ("ours", "reference")}
    show(seconds, {"whole step": tokens.numel(), "decoding": NEW_TOKENS})
    results = {"about": about() | vars(args), "seconds": seconds, "tokens_per_step": tokens.numel()}
    path = ROOT / "benchmarks" / "results" / time.strftime("step-%Y-%m-%d.json")
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{path.relative_to(ROOT)}: {results['about']}")


def time_passes(ours: Transformer, theirs: Any, tokens: Tensor, repeats: int) -> dict[str, float]:
    """One forward and backward pass, with QK-Clip's two meters of logits; transformers has none."""

    def ours_once(exact: bool) -> None:
        ours.exact_logits = exact
        torch.stack(ours.loss(tokens[:, :-1], tokens[:, 1:])).sum().backward()
        ours.zero_grad()

    def theirs_once() -> None:
        theirs(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        theirs.zero_grad()

    meters = {"ours": lambda: ours_once(exact=False), "ours, exact logits": lambda: ours_once(exact=True)}
    return medians({**meters, "reference": theirs_once}, repeats)


def time_optimizers(model: Transformer, repeats: int) -> dict[str, float]:
    """One update of all parameters: by MuonClip, without QK-Clip, and by Muon and AdamW of torch."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    reference = torch_optimizers(model)
    ours = {"ours": MuonClip(model).step, "ours, no QK-Clip": MuonClip(model, tau=0.0).step}
    slow = {"reference": lambda: [optimizer.step() for optimizer in reference]}
    return medians(ours, repeats) | medians(slow, max(1, repeats // SLOW))


def torch_optimizers(model: Transformer) -> list[torch.optim.Optimizer]:
    """Muon and AdamW of torch on copies of the weights; Muon takes only matrices, so each expert becomes one."""
    roles = parameters_by_role(model)
    matrices = [*roles["query_key"], *roles["matrix"], *(expert for stack in roles["experts"] for expert in stack)]
    others = [*roles["embedding"], *roles["head"], *roles["norm"]]
    return [torch.optim.Muon(map(leaf, matrices), lr=0.02), torch.optim.AdamW(map(leaf, others), lr=0.003)]


def leaf(weight: Tensor) -> Tensor:
    """A copy to be optimised on its own, with a gradient."""
    copy = weight.detach().clone().requires_grad_()
    copy.grad = torch.randn_like(copy)
    return copy


def time_decoding(ours: Transformer, theirs: Any, prompt: Tensor, repeats: int) -> dict[str, float]:
    """NEW_TOKENS greedy tokens behind ``prompt`` ``[1, T]``, its prefill included."""
    ids, theirs = prompt[0].tolist(), theirs.eval()
    greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    candidates = {
        "ours": lambda: generate_tokens(ours, ids, max_tokens=NEW_TOKENS, temperature=0.0),
        "reference": lambda: theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy),
    }
    return medians(candidates, repeats)


def medians(candidates: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each candidate; the first round warms up and does not count."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats + 1):
        for name, candidate in candidates.items():
            began = time.perf_counter()
            candidate()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def show(seconds: dict[str, dict[str, float]], tokens: dict[str, int]) -> None:
    """A table of times, their ratios to ours and, for parts that handle ``tokens``, tokens per second."""
    for part, candidates in seconds.items():
        for name, taken in candidates.items():
            rate = f"{tokens[part] / taken:10,.0f} tokens/s" if part in tokens else ""
            print(f"{part:22}{name:20}{taken * 1000:10.1f} ms{taken / candidates['ours']:7.2f} x{rate}")


def about() -> dict[str, Any]:
    """When, where and of what the figures are."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    info = Path("/proc/cpuinfo")  # names the processor on Linux
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = named[0] if named else platform.processor()
    hardware = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit, **hardware, **versions}


if __name__ == "__main__":
    main()
