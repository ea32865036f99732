"""The exported Hugging Face folder in other programs: does each compute what nanokimi computes?

    python -m benchmarks.engines runs/demo/checkpoints/final.pt        # writes benchmarks/results/interop-DATE.json
    python -m benchmarks.engines --random nano-243m --engines mlx-lm,mistralrs
    python -m benchmarks.engines --random tiny,score_func=softmax,norm_topk_prob=false

Every engine but the transformers of our own environment gets one of its own under --work, made with pip the first
time. The model is exported once, in fp32. Then a small script inside each environment opens that folder, reads the
fixed text of the receipts and continues its beginning greedily through the engine's own cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench.results import ROOT, about
from nanokimi import ModelConfig, Transformer, checkpoint, generate_tokens, load
from nanokimi.config import parse_value
from nanokimi.data.prepare import prepare_stdlib
from nanokimi.data.tokenizer import train_bpe
from nanokimi.interop.engines import TEXT

# Words on which every tokenizer of the engines agrees with its own encoding of the whole text.
PROMPT = TEXT.split(",")[0]
NEW_TOKENS = 64
TOLERANCE = 1e-4  # of fp32 logits: other orders of summation, and nothing else
NANOKIMI = [sys.executable, "-c", "import sys; from nanokimi.cli import main; sys.exit(main(sys.argv[1:]))"]
_TROUBLE = re.compile(r"warn|error|deprecat|mismatch|unexpected|missing|not initiali[sz]ed", re.IGNORECASE)
_FATAL = re.compile(r"[\w.]*(Error|Exception)\b|.*panicked")

# Each script, behind READ, takes one JSON object: folder, text, prompt, limit (of tokens), new_tokens, shown, and the
# path for its logits. It prints one: versions, the ids of text and prompt, the new tokens, and `top`, what it knows of
# log-probabilities.
READ = """
import json, sys
from importlib.metadata import version

asked = json.loads(sys.stdin.readline())
versions = {name: version(name) for name in asked["shown"]}
"""
TRANSFORMERS = """
import numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(asked["folder"])
model = AutoModelForCausalLM.from_pretrained(asked["folder"], dtype=torch.float32).eval()
text = tokenizer(asked["text"], truncation=True, max_length=asked["limit"])["input_ids"]
prompt = tokenizer(asked["prompt"], return_tensors="pt")
with torch.no_grad():
    numpy.save(asked["logits"], model(torch.tensor([text])).logits[0].numpy())
ids = model.generate(**prompt, max_new_tokens=asked["new_tokens"], do_sample=False, eos_token_id=None)[0].tolist()
n = prompt["input_ids"].shape[1]
print(json.dumps({"versions": versions, "text": text, "prompt": ids[:n], "tokens": ids[n:]}))
"""
MLX = """
import mlx.core as mx, numpy
from mlx_lm import load
from mlx_lm.generate import generate_step

mx.set_default_device(mx.cpu)
model, tokenizer = load(asked["folder"])
text = tokenizer.encode(asked["text"], truncation=True, max_length=asked["limit"])
prompt = tokenizer.encode(asked["prompt"])
numpy.save(asked["logits"], numpy.array(model(mx.array([text]))[0]))
steps = generate_step(mx.array(prompt), model, max_tokens=asked["new_tokens"])  # greedy, it does not stop by itself
tokens = [int(token) for token, _ in steps]
print(json.dumps({"versions": versions, "text": text, "prompt": prompt, "tokens": tokens}))
"""
MISTRALRS = """
from mistralrs import ChatCompletionRequest, ModelDType, Runner, Which

# Only a chat reports ids and log-probabilities: this template makes of it the text alone.
template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
with open(asked["logits"] + ".jinja", "w") as file:
    file.write(template)
runner = Runner(
    Which.Plain(model_id=asked["folder"], dtype=ModelDType.F32), token_source="none", jinja_explicit=file.name
)
request = ChatCompletionRequest(
    messages=[{"role": "user", "content": asked["prompt"]}], model="default", max_tokens=asked["new_tokens"],
    temperature=0.0, ignore_eos=True, logprobs=True, top_logprobs=20,
)
answer = runner.send_chat_completion_request(request)
best = [step.top_logprobs for step in answer.choices[0].logprobs.content]
text, prompt = (runner.tokenize_text(asked[name], False, None) for name in ("text", "prompt"))
assert answer.usage.prompt_tokens == len(prompt)
print(json.dumps({
    "versions": versions, "text": text[:asked["limit"]], "prompt": prompt, "tokens": [top[0].token for top in best],
    "top": [[(entry.token, entry.logprob) for entry in top] for top in best],
}))
"""


@dataclass(frozen=True)
class Engine:
    """A program that opens Hugging Face folders.

    Attributes:
        packages: what pip installs; none: it is in our own environment.
        shown: distributions whose versions are recorded.
        environment: variables that make it compute in fp32 throughout.
    """

    packages: tuple[str, ...]
    shown: tuple[str, ...]
    script: str
    environment: Mapping[str, str] = field(default_factory=dict)


ENGINES = {
    "transformers": Engine((), ("transformers", "torch"), TRANSFORMERS),
    "transformers-4.57": Engine(("transformers==4.57.*", "torch==2.13.0"), ("transformers", "torch"), TRANSFORMERS),
    "mlx-lm": Engine(("mlx[cpu]", "mlx-lm"), ("mlx", "mlx-lm"), MLX),
    "mistralrs": Engine(("mistralrs",), ("mistralrs",), MISTRALRS, {"MISTRALRS_CPU_KV_F32": "1"}),
}


@dataclass(frozen=True)
class Ours:
    """What nanokimi computes from the checkpoint: logits ``[T, vocab]`` of the text, ids, and greedy tokens."""

    text: list[int]
    prompt: list[int]
    tokens: list[int]
    logits: np.ndarray
    log_probs: np.ndarray


@dataclass(frozen=True)
class Finding:
    """How an engine compares.

    Attributes:
        same_ids: text and prompt became the ids that nanokimi gives them.
        max_logit_difference: over the whole text and vocabulary; None where the engine shows no logits.
        max_log_prob_difference: over its best tokens of every greedy step; None where it shows none.
        equal_tokens: how many greedy tokens are equal before the first that is not, of ``new_tokens``.
        said: lines of its output that sound like trouble.
    """

    versions: dict[str, str]
    same_ids: bool
    max_logit_difference: float | None
    max_log_prob_difference: float | None
    equal_tokens: int
    new_tokens: int
    seconds: float
    said: list[str]

    @property
    def agrees(self) -> bool:
        """Whether nothing tells the two programs apart but rounding."""
        differences = [d for d in (self.max_logit_difference, self.max_log_prob_difference) if d is not None]
        return self.same_ids and self.equal_tokens == self.new_tokens and max(differences) < TOLERANCE

    def __str__(self) -> str:
        parts = ["agrees" if self.agrees else "DIFFERS", f"{self.equal_tokens} of {self.new_tokens} greedy tokens"]
        if self.max_logit_difference is not None:
            parts.append(f"logits within {self.max_logit_difference:.1e}")
        if self.max_log_prob_difference is not None:
            parts.append(f"log-probabilities within {self.max_log_prob_difference:.1e}")
        return "\n    ".join([", ".join(parts), *self.said])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="checkpoints")
    parser.add_argument(
        "--random", action="append", default=[], metavar="PRESET,FIELD=VALUE,...", help="random weights"
    )
    parser.add_argument("--engines", default=",".join(ENGINES), help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, default=ROOT / ".engines", help="environments and exported models")
    args = parser.parse_args()
    names = args.engines.split(",")
    if unknown := sorted(set(names) - set(ENGINES)):
        parser.error(f"--engines {unknown[0]}: there are {', '.join(ENGINES)}")
    if not args.models and not args.random:
        parser.error("name a checkpoint, or --random nano-243m")
    pythons = {name: prepared_environment(args.work.absolute() / "environments" / name, name) for name in names}
    models = [*args.models, *(random_checkpoint(args.work, shape) for shape in args.random)]
    results = {}
    for model in models:
        results["/".join(model.parts[-3:])] = compare(model, pythons, args.work)
    path = ROOT / "benchmarks" / "results" / time.strftime("interop-%Y-%m-%d.json")
    earlier = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(earlier | results, indent=1) + "\n")
    if not all(found["agrees"] for result in results.values() for found in result["engines"].values()):
        sys.exit("not every engine agrees: see above")


# ---- environments and models -----------------------------------------------------------------------------


def prepared_environment(folder: Path, name: str) -> Path:
    """The Python of the engine's environment, which is made unless a complete one is there."""
    packages, stamp = ENGINES[name].packages, folder / "installed.json"
    if not packages:
        return Path(sys.executable)
    if not stamp.exists() or json.loads(stamp.read_text()) != list(packages):
        log(f"{name}: pip install {' '.join(packages)}")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *packages], check=True)
        stamp.write_text(json.dumps(packages))
    return folder / "bin/python"


def random_checkpoint(work: Path, shape: str) -> Path:
    """A model whose every part matters to its logits, with a small tokenizer of the standard library's text."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"random-{shape}.pt"
    preset, *changes = shape.split(",")
    pairs = (change.partition("=") for change in changes)
    fields = {name: parse_value(ModelConfig, name, text) for name, _, text in pairs}
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset(preset, tokenizer_name="bpe:2048", **fields))
    with torch.no_grad():
        for role, parameter in model.param_roles():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.2 * noise if role == "norm" else 2 * parameter)
        for moe in model.moe_layers():
            if model.config.score_func == "sigmoid":  # DeepSeek-V2 has no such bias
                moe.router.balance_bias.normal_(std=0.1)
    text = path.with_suffix(".txt")
    prepare_stdlib(text)
    with text.open(encoding="utf-8") as file:
        tokenizer = train_bpe([file.read(4_000_000)], 2048)
    text.unlink()
    content = {"model_config": asdict(model.config), "model": model.state_dict(), "tokenizer": tokenizer.to_state()}
    checkpoint.save(path, content)
    return path


def export(model: Path, folder: Path) -> Path:
    """The checkpoint as a Hugging Face folder, in fp32."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([*NANOKIMI, "export", "hf", str(model), str(folder), "--dtype", "f32", "--no_compare"], check=True)
    return folder


# ---- comparison ------------------------------------------------------------------------------------------


class EngineFailed(Exception):
    """The engine does not open the folder; the message is the last that it said."""


def compare(model: Path, pythons: Mapping[str, Path], work: Path) -> dict[str, Any]:
    """What each engine makes of ``model``."""
    folder = export(model, work.absolute() / "exported")
    ours = our_results(model)
    engines: dict[str, Any] = {}
    for name, python in pythons.items():
        try:
            finding = judged(ours, *theirs(name, python, folder, work.absolute() / f"{name}.npy", ours))
        except EngineFailed as error:
            log(f"{model.name} in {name}: FAILS: {error}")
            engines[name] = {"agrees": False, "failed": str(error)}
            continue
        log(f"{model.name} in {name}: {finding}")
        engines[name] = asdict(finding) | {"agrees": finding.agrees}
    return about() | {"text_tokens": len(ours.text), "vocab_size": ours.logits.shape[1], "engines": engines}


@torch.no_grad()
def our_results(path: Path) -> Ours:
    """Logits of the fixed text, greedy tokens behind its beginning, and log-probabilities ``[n, vocab]`` of these."""
    model, tokenizer = load(path)
    text, prompt = tokenizer.encode(TEXT)[: model.config.max_seq_length], tokenizer.encode(PROMPT)
    tokens = generate_tokens(model, prompt, max_tokens=NEW_TOKENS, temperature=0.0)
    steps = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1].double().log_softmax(dim=-1)
    return Ours(text, prompt, tokens, model(torch.tensor([text]))[0].numpy(), steps.numpy())


def theirs(name: str, python: Path, folder: Path, logits: Path, ours: Ours) -> tuple[dict[str, Any], float, list[str]]:
    """What the engine answered, how long it took, and what else it said."""
    engine = ENGINES[name]
    asked = {"folder": str(folder), "text": TEXT, "prompt": PROMPT, "limit": len(ours.text), "new_tokens": NEW_TOKENS}
    asked |= {"shown": engine.shown, "logits": str(logits)}
    began = time.perf_counter()
    done = subprocess.run(
        [str(python), "-c", READ + engine.script],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", **engine.environment},
    )
    seconds = time.perf_counter() - began
    lines = (done.stderr + done.stdout).replace(str(folder), folder.name).splitlines()
    if done.returncode:
        raise EngineFailed(next(filter(_FATAL.match, reversed(lines)), f"exit code {done.returncode}"))
    found: dict[str, Any] = json.loads(lines.pop())
    found["logits"] = np.load(logits) if logits.exists() else None
    logits.unlink(missing_ok=True)
    return found, seconds, [line for line in lines if _TROUBLE.search(line)]


def judged(ours: Ours, found: Mapping[str, Any], seconds: float, said: list[str]) -> Finding:
    """The comparison in numbers."""
    tokens, logits, top = found["tokens"], found["logits"], found.get("top")
    pairs = zip(ours.tokens, tokens, strict=True)
    equal = next((i for i, (one, other) in enumerate(pairs) if one != other), len(tokens))
    differences = [
        abs(ours.log_probs[step, token] - log_prob)
        for step, entries in enumerate(top or [])
        for token, log_prob in entries
        if step <= equal  # behind it the engines read different tokens
    ]
    return Finding(
        versions=found["versions"],
        same_ids=found["text"] == ours.text and found["prompt"] == ours.prompt,
        max_logit_difference=None if logits is None else float(np.abs(logits - ours.logits).max()),
        max_log_prob_difference=float(max(differences)) if differences else None,
        equal_tokens=equal,
        new_tokens=NEW_TOKENS,
        seconds=round(seconds, 1),
        said=said,
    )


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
