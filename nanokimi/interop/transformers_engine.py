"""transformers as the independent engine beside an exported folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import RunError
from nanokimi.interop.receipt import TEXT, Comparison, NotCompared, fixed_tokens, mean_loss
from nanokimi.model.transformer import Transformer


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
    theirs.eval()
    tokens = fixed_tokens(tokenizer, model.config.max_seq_length)
    batch = torch.tensor([tokens])
    with torch.no_grad():
        ours = model(batch.to(next(model.parameters()).device)).cpu()
        found = theirs(batch).logits
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


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and warnings of its own."""
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
