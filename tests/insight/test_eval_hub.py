"""``nanokimi eval`` on data sets of a hub, which is a server on loopback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub import LoopbackHub, fineweb, run_with_hub
from scored import save_model

from nanokimi.cli import main
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.model.transformer import Transformer

TEXTS = [f"document {number}: " + "so much to say, " * (number % 7 * 3) for number in range(40)]
EVAL = "import sys; from nanokimi.cli import main; sys.exit(main(['eval', *sys.argv[1:]]))"


@pytest.mark.slow
def test_a_stream_of_the_hub_scores_as_the_same_documents_on_disk(debug_model: Transformer, tmp_path: Path) -> None:
    model = save_model(tmp_path / "m.pt", debug_model, load_tokenizer("byte"))
    with LoopbackHub({"HuggingFaceFW/fineweb": fineweb(TEXTS)}) as hub:
        flags = ["--dataset", "fineweb", "--streaming", "--num_samples", "30", "--device", "cpu"]
        output = tmp_path / "hub.json"
        done = run_with_hub(hub.url, EVAL, str(model), *flags, "--output", str(output), tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(output.read_text())["texts"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:30])
    (tmp_path / "same.jsonl").write_text(lines)
    here = tmp_path / "here.json"
    flags = ["--data_path", str(tmp_path / "same.jsonl"), "--device", "cpu"]
    assert main(["eval", str(model), *flags, "--output", str(here)]) == 0
    (expected,) = json.loads(here.read_text())["texts"]
    for name in ("documents", "tokens", "n_bytes", "windows"):
        assert found[name] == expected[name], name
    assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)
