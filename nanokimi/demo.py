"""``make demo``: from an empty machine to a model that has learned something, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.console import log, show
from nanokimi.data.batch import PackedSequences
from nanokimi.data.prepare import prepare_stdlib
from nanokimi.data.sources import open_corpus
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.inference.generate import generate
from nanokimi.interop.loading import load
from nanokimi.model.transformer import Transformer
from nanokimi.training.run import TrainArguments, run_training
from nanokimi.training.step import evaluate

TEXT = Path("data/train.txt")
PROMPT = "def main("
SEED = 1337

# With these settings the demo's figure in docs/results.md was measured.
SETTINGS: dict[str, Any] = {
    "preset": "tiny",
    "data_path": str(TEXT),
    "batch_size": 8,
    "gradient_accumulation": 1,
    "warmup_steps": 10,
    "decay_fraction": 0.8,
    "max_steps": 5000,
    "eval_interval": 50,
    "val_tokens": 8192,
    "save_interval": 100,
    "samples": 5,
    "sample_prompt": PROMPT,
    "seed": SEED,
}


def run_demo(output: Path, seconds: float) -> int:
    """Makes a text and a tokenizer, trains for ``seconds``, shows what was learned; goes on after an interruption.

    Returns:
        the exit code: 0, or that of the interrupted training.
    """
    if not seconds > 0:
        raise UserError(f"--seconds must be more than 0, got {seconds:g}")
    if not TEXT.exists():
        log("There is no text yet: taking the Python standard library of this machine.")
        log(prepare_stdlib(TEXT))
    earlier = any((output / "checkpoints").glob("*.pt"))
    settings = {**SETTINGS, "max_seconds": float(seconds), "output_dir": str(output)}
    log(f"{'Going on to train' if earlier else 'Training'} a small model, for {seconds:.0f} seconds in all.")
    code = run_training(TrainArguments(train=settings, model={}, resume=earlier))
    if code:
        log("\nInterrupted, and saved: the same command goes on from here.")
        return code
    report(output)
    return 0


def report(output: Path) -> None:
    """Prints what the model did before and after, with the same prompt and on the same held-out files."""
    path = output / "checkpoints" / "final.pt"
    trained, tokenizer = load(path)
    torch.manual_seed(SEED)
    untrained = Transformer(trained.config).eval()
    held_out = held_out_files(tokenizer, trained.config)
    log("\nMeasuring both models on all held-out files ...")
    for name, model in (("before training", untrained), ("after training", trained)):
        text = generate(model, tokenizer, PROMPT, max_tokens=80, temperature=0.8, seed=SEED)
        bits = evaluate(model, held_out, tokenizer).bits_per_byte
        show(f"\n=== {name}: {bits:.3f} bits per byte on held-out files ===\n{PROMPT}{text}")
    show(
        f"\nThe run in one picture: {output / 'logs' / 'training_metrics.png'}\n"
        "\nNext:\n"
        f'  .venv/bin/python inference.py {path} --prompt "class " --stream\n'
        f"  .venv/bin/python inference.py {path} --interactive\n"
        "  .venv/bin/python train.py --preset tiny --data_path YOUR_TEXT.txt --output_dir runs/mine"
    )


def held_out_files(tokenizer: Tokenizer, config: ModelConfig) -> PackedSequences:
    """The files that training never saw, in sequences of the model's context."""
    corpus = open_corpus(TrainConfig(data_path=str(TEXT)), config.tokenizer_name, tokenizer=tokenizer, log=log)
    assert corpus.val is not None
    return PackedSequences(corpus.val, config.max_seq_length)
