"""``nanokimi export`` and ``nanokimi import``: whole commands and what they leave behind."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gguf import GGUFReader
from stored_models import (
    SOFTMAX,
    contents,
    edit_json,
    edit_tensors,
    exported,
    folder,
    line_of,
    nothing_at,
    run,
    saved,
    source,
    stored_model,
    target,
)
from tokenizers import Tokenizer as HFTokenizer

from nanokimi.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from nanokimi.errors import RunError
from nanokimi.files import sha256_of
from nanokimi.interop import commands
from nanokimi.interop.engines import TEXT
from nanokimi.interop.hf_reader import INDEX, OWN
from nanokimi.interop.loading import load, read_model, training_figures
from nanokimi.receipt import RECEIPT, Comparison, verify_receipt

YARN: dict[str, Any] = {"rope_factor": 4.0, "original_seq_len": 32}
WEIGHTS = "model.safetensors"


# ---- there and back --------------------------------------------------------------------------------------


def ending_in(eot: str, **kept: str) -> Tokenizer:
    text = load_tokenizer("byte").to_json().replace("<|endoftext|>", eot)
    return Tokenizer(HFTokenizer.from_str(text), "mine", eot=eot, **kept)


def talking() -> Tokenizer:
    return ending_in("</s>", bos="a", chat_template="{{ bos_token }}{{ messages[0].content }}é\n\n")


VARIANTS: dict[str, dict[str, Any]] = {
    "debug": {},
    "without q_lora": {"q_lora_rank": 0},
    "groups": {"n_expert_groups": 4, "n_limited_groups": 2, "n_activated_experts": 3},
    "no shared experts": {"n_shared_experts": 0},
    "yarn": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5},
    "yarn off, its fields not": {"original_seq_len": 64, "mscale": 0.5, "beta_fast": 3.0},
    "softmax": SOFTMAX,
    "softmax with all groups": {**SOFTMAX, "n_expert_groups": 4, "n_limited_groups": 4},
    "padded vocabulary": {"vocab_size": 304},
    "a bpe": {"vocab_size": 320, "tokenizer_name": "bpe:300"},
    "</s>": {"tokenizer_name": "mine"},
    "<stop>": {"tokenizer_name": "mine"},
    "a chat template": {"tokenizer_name": "mine"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_export_import_export_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    tokenizers: dict[str, Callable[[], Tokenizer]] = {
        "a bpe": lambda: train_bpe([TEXT] * 3, 300),
        "</s>": lambda: ending_in("</s>"),
        "<stop>": lambda: ending_in("<stop>"),
        "a chat template": talking,
    }
    tokenizer = tokenizers.get(name, lambda: load_tokenizer("byte"))()
    stored = stored_model(tokenizer, **VARIANTS[name])
    first, second, imported = tmp_path / "first", tmp_path / "second", tmp_path / "imported.pt"
    run("export", "hf", saved(stored, tmp_path / "m.pt"), first)
    run("import", "hf", first, "--output", imported)
    run("export", "hf", imported, second)
    assert contents(first) == contents(second)
    assert {WEIGHTS, "config.json", "tokenizer.json", "README.md", OWN, RECEIPT} < set(contents(first))
    assert "transformers" in json.loads((first / RECEIPT).read_text())["comparison"]["engine"]
    back = read_model(imported)
    assert back.config == stored.with_shared_expert().config
    assert back.tokenizer.fingerprint == tokenizer.fingerprint
    assert back.tokenizer.to_state() == {**tokenizer.to_state(), "name": back.config.tokenizer_name}


def test_a_chat_template_changed_behind_its_receipt_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path
) -> None:
    source = saved(stored_model(talking(), tokenizer_name="mine"), tmp_path / "m.pt")
    run("export", "hf", source, tmp_path / "hf", "--no_compare")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    line_of(capsys, ["import", "hf", tmp_path / "hf", "--output", target], "chat_template.jinja", RECEIPT)


@torch.no_grad()
def test_a_model_without_shared_experts_is_exported_with_one_that_adds_nothing(tmp_path: Path) -> None:
    source = saved(stored_model(n_shared_experts=0), tmp_path / "m.pt")
    run("export", "hf", source, tmp_path / "hf", "--no_compare")
    (one, _), (other, _) = load(source), load(tmp_path / "hf")
    assert (one.config.n_shared_experts, other.config.n_shared_experts) == (0, 1)
    tokens = torch.randint(257, (2, 50))
    assert torch.equal(one(tokens), other(tokens))


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf"])
def test_a_limit_of_shards_is_a_size(limit: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line_of(capsys, ["export", "hf", "m.pt", tmp_path / "hf", f"--max_shard_gb={limit}"], "--max_shard_gb", "positive")


def test_who_may_see_an_upload_is_no_question_without_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line_of(capsys, ["export", "hf", "m.pt", tmp_path / "hf", "--public"], "--public", "--push")


def test_a_folder_loads_to_the_same_model_bit_for_bit(source: Path, exported: Path) -> None:
    (one, tokenizer), (other, theirs) = load(source), load(exported)
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())
    assert one.config == other.config
    assert tokenizer.fingerprint == theirs.fingerprint
    tokens = torch.randint(0, 257, (1, 128))
    with torch.no_grad():
        assert torch.equal(one(tokens), other(tokens))


def test_generate_takes_folders(capsys: pytest.CaptureFixture[str], source: Path, exported: Path) -> None:
    said = []
    for model in (source, exported):
        run("generate", model, "--prompt", "def main(", "--max_tokens", "12", "--seed", "3", "--device", "cpu")
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


def test_a_folder_is_exported_like_a_checkpoint(exported: Path, target: Path) -> None:
    run("export", "hf", exported, target)
    assert contents(target) == contents(exported)


def test_small_shards_are_compared_and_loaded_like_one_file(source: Path, exported: Path, target: Path) -> None:
    run("export", "hf", source, target, "--max_shard_gb", "0.00005")
    assert len(list(target.glob("*.safetensors"))) > 2
    assert (target / INDEX).is_file()
    receipts = [json.loads((folder / RECEIPT).read_text()) for folder in (target, exported)]
    assert receipts[0]["comparison"] == receipts[1]["comparison"]
    one, other = load(target)[0].state_dict(), load(exported)[0].state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision_is_exact_once_rounded(dtype: str, source: Path, target: Path) -> None:
    run("export", "hf", source, target, "--dtype", dtype)
    receipt = json.loads((target / RECEIPT).read_text())
    assert receipt["dtype"] == dtype
    assert receipt["comparison"]["max_difference"] < 1e-4
    assert receipt["comparison"]["loss"] == pytest.approx(receipt["comparison"]["loss_there"], abs=1e-5)
    run("import", "hf", target, "--output", target.with_suffix(".pt"))
    assert read_model(target.with_suffix(".pt")).dtype == dtype, "stored as it was"


def test_what_an_import_says(capsys: pytest.CaptureFixture[str], folder: Path, target: Path) -> None:
    (folder / RECEIPT).unlink()
    edit_json(folder / "config.json", tie_word_embeddings=True, num_nextn_predict_layers=1)
    edit_tensors(folder, lm_head__weight=None, model__layers__3__eh_proj__weight=torch.ones(3))
    run("import", "hf", folder, "--output", target)
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 2
    assert "note: " in err
    assert "tie_word_embeddings" in err
    assert "model.layers.3.eh_proj.weight" in err
    assert f"--init_from {target}" in out
    assert torch.equal(read_model(target).weights["head.weight"], stored_model().weights["embed.weight"])


def test_an_imported_model_is_no_run_to_resume(
    capsys: pytest.CaptureFixture[str], exported: Path, target: Path
) -> None:
    run("import", "hf", exported, "--output", target)
    train = ["train", "--resume", "--checkpoint_path", target, "--output_dir", target.parent / "run"]
    line_of(capsys, train, str(target), f"--init_from {target}")


# ---- receipts and comparisons ----------------------------------------------------------------------------


def test_the_receipt_lists_every_file_and_what_the_engine_found(exported: Path) -> None:
    receipt = json.loads((exported / RECEIPT).read_text())
    assert set(receipt["files"]) == set(contents(exported)) - {RECEIPT}
    assert all(entry["sha256"] == sha256_of(exported / name) for name, entry in receipt["files"].items())
    found = receipt["comparison"]
    assert found["engine"] == "transformers"
    assert found["version"].startswith("5.")
    assert 0 < found["max_difference"] < 1e-4
    assert found["positions"] == 128
    assert (receipt["target"], receipt["dtype"], receipt["not_compared"]) == ("huggingface", "f32", None)


def test_a_second_export_gives_the_same_bytes(
    capsys: pytest.CaptureFixture[str], source: Path, exported: Path, target: Path
) -> None:
    run("export", "hf", source, target)
    assert contents(target) == contents(exported)
    assert "transformers 5" in capsys.readouterr().out


def test_no_compare_and_a_missing_engine_are_told(
    capsys: pytest.CaptureFixture[str], source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    missing = {"hf": "pip install 'nanokimi[hf]'", "gguf": "pip install xllamacpp"}
    for form, flags, words in (
        *((form, ["--no_compare"], "as asked for") for form in missing),
        *((form, [], words) for form, words in missing.items()),
    ):
        result = target.with_name(f"{form}{len(flags)}")
        run("export", form, source, result, *flags)
        assert words in capsys.readouterr().out
        receipt = result / RECEIPT if form == "hf" else result.with_name(f"{result.name}.{RECEIPT}")
        content = json.loads(receipt.read_text())
        assert words in content["not_compared"]
        assert content["comparison"] is None


@pytest.mark.parametrize("form", ["hf", "gguf"])
@pytest.mark.parametrize(("difference", "loss"), [(0.01, 5.0), (float("nan"), 5.0), (0.0, 5.2), (0.0, float("nan"))])
def test_an_engine_that_disagrees_stops_the_export(
    form: str,
    difference: float,
    loss: float,
    source: Path,
    target: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = Comparison("engine", "1", "logits", difference, 9, 5.0, loss, 9)
    for name in ("compare_transformers", "compare_llamacpp"):
        monkeypatch.setattr(commands, name, lambda *_: found)
    line_of(capsys, ["export", form, source, target], str(target), "not written", "engine 1", code=1)
    assert nothing_at(target)


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_an_engine_that_cannot_read_stops_the_export_in_one_line(
    form: str, source: Path, target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: Any) -> Comparison:
        raise RunError("it does not read it")

    for name in ("compare_transformers", "compare_llamacpp"):
        monkeypatch.setattr(commands, name, unreadable)
    line_of(capsys, ["export", form, source, target], str(target), "not written", "--no_compare", code=1)
    assert nothing_at(target)


def test_what_transformers_says_over_many_lines_is_one(
    capsys: pytest.CaptureFixture[str], source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("first line\n\n   second line")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    line_of(capsys, ["export", "hf", source, target], "transformers 5", "first line second line", code=1)
    assert nothing_at(target)


# ---- the model card --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a short real run, whose text and tokenizer lie in a folder with a telling name."""
    private = tmp_path_factory.mktemp("private_matters")
    (private / "diary.txt").write_text(Path(json.__file__).read_text(encoding="utf-8") * 4)
    load_tokenizer("byte").save(private / "mine.json")
    run(
        "train", "--preset", "debug", "--data_path", private / "diary.txt", "--output_dir", private / "run",
        "--set", f"tokenizer_name={private / 'mine.json'}", "--set", "max_seq_length=32", "--max_steps", "4",
        "--eval_interval", "2", "--val_tokens", "128", "--learning_rate", "0.0125", "--seed", "77",
    )  # fmt: skip
    run("export", "hf", private / "run" / "checkpoints" / "final.pt", private / "hf", "--no_compare")
    return private / "hf"


def test_the_card_holds_the_figures_of_the_run(trained: Path) -> None:
    card = (trained / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    assert {"deepseek_v3", "nanokimi"} < set(front["tags"])
    history = [
        json.loads(line) for line in (trained.parent / "run/logs/training_metrics.jsonl").read_text().splitlines()
    ]
    last: dict[str, Any] = {}
    for record in history:
        last |= {name: value for name, value in record.items() if value is not None}
    training = json.loads((trained / OWN).read_text())["training"]
    assert training["steps"] == 4
    assert training["tokens"] == 4 * 2 * 2 * 32
    for name in ("train_ce_loss", "val_loss", "val_bits_per_byte"):
        assert training[name] == last[name]
        assert f"| {last[name]:.4g} |" in card
    for row in ("| steps | 4 |", "| learning rate | 0.0125 |", "| seed | 77 |", "`diary.txt`", "`wsd`", "32 tokens"):
        assert row in card, row


def test_a_figure_is_the_last_that_was_a_number() -> None:
    lines = [{"step": 1, "train_ce_loss": 2.5}, {"val_step": 1, "val_loss": 3.0}, {"step": 2, "train_ce_loss": None}]
    history = "".join(json.dumps(line) + "\n" for line in lines)
    figures = training_figures({"train_config": {}, "history": history})
    assert (figures["train_ce_loss"], figures["val_loss"]) == (2.5, 3.0)
    assert "val_bits_per_byte" not in figures


def test_no_path_of_this_machine_leaves_it(trained: Path) -> None:
    for name, data in contents(trained).items():
        assert b"private_matters" not in data, name
        assert str(Path.home()).encode() + b"/" not in data, name


def test_an_imported_model_says_that_its_training_is_not_known(folder: Path, target: Path) -> None:
    for name in (OWN, RECEIPT):
        (folder / name).unlink()
    run("import", "hf", folder, "--output", target)
    run("export", "hf", target, target.with_name("again"), "--no_compare")
    assert "imported" in (target.with_name("again") / "README.md").read_text()


# ---- GGUF ------------------------------------------------------------------------------------------------


def test_a_gguf_file_comes_with_its_receipt(
    capsys: pytest.CaptureFixture[str], source: Path, exported: Path, target: Path
) -> None:
    file, again = target.with_name("m.gguf"), target.with_name("again") / "m.gguf"
    run("export", "gguf", source, file)
    assert "llama.cpp" in capsys.readouterr().out
    receipt_path = target.with_name(f"m.gguf.{RECEIPT}")
    assert sorted(os.listdir(target.parent)) == sorted([file.name, receipt_path.name])
    receipt = json.loads(receipt_path.read_text())
    assert receipt["files"] == {"m.gguf": {"bytes": file.stat().st_size, "sha256": sha256_of(file)}}
    assert (receipt["target"], receipt["dtype"]) == ("gguf", "f32")
    assert receipt["comparison"]["measure"] == "log-probabilities"
    assert receipt["comparison"]["max_difference"] < 1e-4
    verify_receipt(receipt_path, ["m.gguf"])
    run("export", "gguf", exported, again)
    assert again.read_bytes() == file.read_bytes()
    assert again.with_name(receipt_path.name).read_bytes() == receipt_path.read_bytes()


@pytest.mark.parametrize(("stored_as", "flags", "dtype", "file_type"), [
    ("bf16", [], "bf16", 32), ("f16", [], "f16", 1), ("f32", ["--dtype", "q8_0"], "q8_0", 7),
])  # fmt: skip
def test_the_type_of_a_gguf_file_is_that_of_the_weights_unless_named(
    stored_as: str, flags: list[str], dtype: str, file_type: int, target: Path
) -> None:
    model = saved(stored_model().with_dtype(stored_as), target.with_suffix(".pt"))
    run("export", "gguf", model, target, *flags)
    receipt = json.loads(target.with_name(f"{target.name}.{RECEIPT}").read_text())
    assert receipt["dtype"] == dtype
    assert receipt["comparison"]["loss"] == pytest.approx(receipt["comparison"]["loss_there"], abs=0.02)
    assert GGUFReader(target).fields["general.file_type"].contents() == file_type


def test_what_gguf_cannot_express_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = saved(stored_model(**SOFTMAX, n_expert_groups=4, n_limited_groups=2), tmp_path / "groups.pt")
    monkeypatch.setattr(commands, "partial_folder", None)
    line_of(capsys, ["export", "gguf", groups, target], "n_limited_groups", "hf")
    run("export", "hf", groups, target)


def test_softmax_scores_go_to_gguf(tmp_path: Path, target: Path) -> None:
    run("export", "gguf", saved(stored_model(**SOFTMAX), tmp_path / "m.pt"), target)
    assert json.loads(target.with_name(f"{target.name}.{RECEIPT}").read_text())["comparison"]["max_difference"] < 1e-3
