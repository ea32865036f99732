"""What weights in fewer bits cost a trained model: bits per byte of its held-out text."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.bench.subjects.shapes import use
from nanokimi import checkpoint
from nanokimi.config import TrainConfig, from_dict
from nanokimi.inference.decoder import use_weights_
from nanokimi.insight.bits_per_byte import score_text
from nanokimi.insight.eval_text import choose_text
from nanokimi.insight.likelihood import Scoring
from nanokimi.interop.loading import load

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
