"""QK-Clip at work: one run without it and one with it, at a learning rate that drives attention logits far over tau.

    python -m benchmarks.qk_clip            # writes benchmarks/results/qk_clip.json and docs/images/qk_clip.png

The text is the Python standard library (``nanokimi prepare stdlib`` makes it), read as bytes by the debug preset.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.data.prepare import prepare_stdlib
from nanokimi.data.sources import open_corpus
from nanokimi.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
TEXT = Path("data/train.txt")
TAU = 100.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, default=0.1)
    args = parser.parse_args()
    if not TEXT.exists():
        print(prepare_stdlib(TEXT))
    runs = {
        name: run(TEXT, args.steps, args.learning_rate, tau) for name, tau in (("unclipped", 0.0), ("clipped", TAU))
    }
    for name, curves in runs.items():
        print(f"{name}: largest logit {max(curves['max_logit']):.1f}, loss {mean_tail(curves['loss']):.3f}")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "machine": platform.processor() or platform.machine(),
        "tau": TAU,
        **vars(args),
    }
    (ROOT / "benchmarks" / "results" / "qk_clip.json").write_text(json.dumps({"about": about, "runs": runs}) + "\n")
    draw(runs, ROOT / "docs" / "images" / "qk_clip.png")


def run(text: Path, steps: int, learning_rate: float, tau: float, *, batch_size: int = 8, context: int = 128) -> Any:
    """Loss and largest attention logit of every step, of a debug model on bytes."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            preset="debug",
            learning_rate=learning_rate,
            qk_clip_tau=tau,
            max_steps=steps,
            batch_size=batch_size,
            gradient_accumulation=1,
            warmup_steps=20,
            schedule="constant",
            eval_interval=0,
            output_dir=folder,
        )
        corpus = open_corpus(TrainConfig(data_path=str(text)), "byte", log=lambda line: None)
        trainer = Trainer(config, ModelConfig.preset("debug", max_seq_length=context), corpus, torch.device("cpu"))
        (Path(folder) / "checkpoints").mkdir()
        trainer.train()
        history = trainer.metrics.history()
    return {"loss": history["train_ce_loss"], "max_logit": [max(layers) for layers in history["max_logit"]]}


def mean_tail(values: list[float], n: int = 20) -> float:
    """The mean of the last ``n`` values."""
    return sum(values[-n:]) / n


def draw(runs: dict[str, Any], path: Path) -> None:
    """Both curves of both runs, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    logits, loss = figure.subplots(1, 2)
    for (name, curves), colour in zip(runs.items(), ("#D55E00", "#0072B2"), strict=True):
        steps = range(1, len(curves["loss"]) + 1)
        logits.plot(steps, curves["max_logit"], color=colour, label=name)
        loss.plot(steps, curves["loss"], color=colour, label=name, linewidth=0.9)
    logits.axhline(TAU, color="black", linestyle="--", linewidth=1, label=f"tau = {TAU:.0f}")
    logits.set(yscale="log", xlabel="step", ylabel="largest attention logit", title="QK-Clip holds the logits")
    loss.set(xlabel="step", ylabel="training loss (nats per byte)", title="and the loss still falls")
    for axes in (logits, loss):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
