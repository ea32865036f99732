"""Files that were damaged at random: noticed and named, or as good as whole; never a traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties.seam import TRAIN, Bench, answer, tries

pytestmark = pytest.mark.fault("B5")

# What reads a file; whether every flipped byte of it has to be noticed.
CHECKED = {
    "run/checkpoints/final.pt": ["generate", "run/checkpoints/final.pt", "--max_tokens", "1"],
    "hf/model.safetensors": ["generate", "hf", "--max_tokens", "1"],
    "hf/config.json": ["generate", "hf", "--max_tokens", "1"],
    "hf/tokenizer.json": ["generate", "hf", "--max_tokens", "1"],
    "hf/nanokimi.json": ["generate", "hf", "--max_tokens", "1"],
    "tokens/train-00000.bin": [*TRAIN, "--dataset", "tokenbin", "--data_path", "tokens"],
}
READ = {
    "hf/receipt.json": ["generate", "hf", "--max_tokens", "1"],
    "tokens/manifest.json": [*TRAIN, "--dataset", "tokenbin", "--data_path", "tokens"],
    "tokens/tokenizer.json": [*TRAIN, "--dataset", "tokenbin", "--data_path", "tokens"],
    "tokenizer.json": [*TRAIN, "--set", "tokenizer_name=tokenizer.json"],
    "bare/model.safetensors": ["import", "hf", "bare", "--output", "new.pt"],
    "bare/config.json": ["import", "hf", "bare", "--output", "new.pt"],
    "bare/tokenizer.json": ["import", "hf", "bare", "--output", "new.pt"],
    "bare/nanokimi.json": ["import", "hf", "bare", "--output", "new.pt"],
    "q.jsonl": ["eval", "run/checkpoints/final.pt", "--tasks", "q.jsonl"],
    "m.gguf": ["generate", "m.gguf"],
}


def damage(data: bytes, draw: st.DataObject) -> bytes:
    """Some bytes changed, the end cut off, a part lost, or something put in."""
    at = draw.draw(st.integers(0, len(data) - 1) | st.integers(0, min(400, len(data) - 1)))
    kind = draw.draw(st.sampled_from(["flip", "cut", "lose", "insert", "replace"]))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ draw.draw(st.integers(1, 255))]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "insert":
        return data[:at] + draw.draw(st.binary(min_size=1, max_size=20)) + data[at:]
    end = at + draw.draw(st.integers(1, 40))
    return data[:at] + (draw.draw(st.binary(max_size=40)) if kind == "replace" else b"") + data[end:]


@pytest.mark.parametrize("name", [*CHECKED, *READ])
@tries(15)
@given(data=st.data())
def test_a_damaged_file_is_named_in_one_line_or_harmless(bench: Bench, name: str, data: st.DataObject) -> None:
    with bench.copy() as folder:
        whole = (folder / name).read_bytes()
        damaged = damage(whole, data)
        (folder / name).write_bytes(damaged)
        found = answer({**CHECKED, **READ}[name], folder)
    found.require_plain()
    assert found.code == 2 or name in READ or damaged == whole, "it was not noticed"


@pytest.mark.parametrize("name", ["bare/config.json", "bare/nanokimi.json", "bare/tokenizer.json", "hf/receipt.json"])
@tries(25)
@given(data=st.data())
def test_json_with_a_value_of_another_kind_is_named_in_one_line_or_harmless(
    bench: Bench, name: str, data: st.DataObject
) -> None:
    with bench.copy() as folder:
        content = json.loads((folder / name).read_text())
        places = list(_places(content))
        above, key = data.draw(st.sampled_from(places))
        above[key] = data.draw(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just([]) | st.just({})
        )
        (folder / name).write_text(json.dumps(content))
        answer(["import", "hf", str(Path(name).parent), "--output", "new.pt"], folder).require_plain()


def _places(content: object) -> list[tuple[object, object]]:
    """Every value of a JSON document: what holds it, and where; of long lists the first three."""
    items: list[tuple[object, object]] = []
    if isinstance(content, dict):
        items = list(content.items())[:40]
    elif isinstance(content, list):
        items = list(enumerate(content))[:3]
    return [(content, key) for key, _ in items] + [place for _, value in items for place in _places(value)]


@tries(40)
@given(data=st.data())
def test_a_resume_passes_over_damaged_checkpoints(bench: Bench, data: st.DataObject) -> None:
    with bench.copy() as folder:
        for path in sorted((folder / "run" / "checkpoints").glob("*.pt")):
            if data.draw(st.booleans()):
                path.write_bytes(damage(path.read_bytes(), data))
        if data.draw(st.booleans()):
            os.truncate(folder / "run" / "logs" / "training_metrics.jsonl", 3)
        answer(["train", "--resume", "--output_dir", "run", "--max_steps", "2"], folder).require_plain()
