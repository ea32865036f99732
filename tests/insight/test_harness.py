"""The adapter for lm-evaluation-harness, and our own figures, against the harness's ``hf`` on the same weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lm_eval
import pytest
import torch
from conftest import lively
from scored import save_model
from tokenizers import Tokenizer as Inner
from tokenizers.processors import TemplateProcessing

from nanokimi.cli import main
from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import Tokenizer, train_bpe
from nanokimi.errors import UserError
from nanokimi.inference.generate import stream_tokens
from nanokimi.inference.options import SamplingOptions
from nanokimi.insight import harness
from nanokimi.insight.choices import encode_pair
from nanokimi.insight.harness import NanokimiLM, run_tasks
from nanokimi.insight.scoring import windows
from nanokimi.interop.hf_writer import write_folder
from nanokimi.interop.stored import StoredModel
from nanokimi.model.transformer import Transformer

WORDS = "the cat sat on the mat while the dog ran over the log and nobody saw what it was, naïve or not. "
TEXTS = [WORDS, WORDS * 12, "", "a\n", (WORDS[::-1] + "\n") * 9, " the dog"]
TASKS = {
    "own_choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "own_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "own_answers": {
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([WORDS * 30], 400)


@pytest.fixture
def model(tokenizer: Tokenizer, debug_model: Transformer) -> Transformer:
    return lively(Transformer(ModelConfig.preset("debug", vocab_size=tokenizer.vocab_size + 3)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tasks of one's own, on local files; the cache of the data sets lies in the folder too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    questions = [
        {
            "question": f"{WORDS * (i % 4)}{'the' if i else ''}{' ' * (i % 3)}",
            "choices": ["the cat", "dog", " what it was"],
            "answer": i % 3,
        }
        for i in range(12)
    ]
    data = {"own_choices": questions, "own_answers": questions, "own_text": [{"text": text} for text in TEXTS]}
    (tmp_path / "tasks").mkdir()
    for name, task in TASKS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data[name]))
        files = {"test": str(tmp_path / f"{name}.jsonl")}
        content = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps({**content, **task}))  # JSON is YAML
    return tmp_path


def instances(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def test_windows_are_those_of_the_harness() -> None:
    for length in range(60):
        tokens = list(range(length))
        for context_len in (1, 2, 5, 8):
            theirs = lm_eval.utils.get_rolling_token_windows(tokens, -1, 8, context_len)
            ours = windows([(tokens, True)], [-1], context=8, stride=8 - context_len + 1)
            assert [(w.tokens[:-1], w.tokens[-w.scored :]) for w in ours] == list(theirs)


def test_pairs_are_divided_as_the_harness_does(model: Transformer, tokenizer: Tokenizer) -> None:
    adapter = NanokimiLM(loaded=(model, tokenizer))
    for context in ("the cat", "the cat ", "the\n\n ", "th", "naï", WORDS):
        for continuation in (" sat", "sat", " ", "\nx"):
            assert encode_pair(tokenizer, context, continuation) == adapter._encode_pair(context, continuation)


@pytest.mark.fault("A19")
def test_a_text_begins_with_the_token_that_the_harness_takes(
    folder: Path, debug_model: Transformer, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate", reason="the harness's model hf needs it")
    from lm_eval.models.huggingface import HFLM

    trained = Inner.from_str(train_bpe([WORDS * 30], 400).to_json())
    trained.add_special_tokens(["<s>"])
    beginning = [("<s>", trained.token_to_id("<s>"))]
    trained.post_processor = TemplateProcessing(single="<s> $A", special_tokens=beginning)  # no model here learns it
    tokenizer = Tokenizer(trained, "with-a-beginning", bos="<s>")
    assert tokenizer.bos_id != tokenizer.eot_id
    model = lively(Transformer(ModelConfig.preset("debug", vocab_size=tokenizer.vocab_size)))
    (folder / "hf").mkdir()
    write_folder(folder / "hf", StoredModel(model.config, model.state_dict(), tokenizer))
    theirs = HFLM(str(folder / "hf"), device="cpu", dtype="float32", batch_size=4)
    ours = NanokimiLM(loaded=(model, tokenizer))
    assert ours.prefix_token_id == theirs.prefix_token_id == tokenizer.bos_id
    texts = instances(*((text,) for text in (WORDS, "a\n", " the dog")))
    expected = theirs.loglikelihood_rolling(texts)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, rel=1e-6)
    pairs = instances(("", " the cat"), ("the dog", " ran"))
    found = [score for score, _ in ours.loglikelihood(pairs)]
    assert found == pytest.approx([score for score, _ in theirs.loglikelihood(pairs)], rel=1e-5)
    assert encode_pair(tokenizer, "", " the cat")[0] == [tokenizer.bos_id]

    save_model(folder / "model.pt", model, tokenizer)
    Path("texts.jsonl").write_text("".join(json.dumps({"text": one.args[0]}) + "\n" for one in texts))
    assert main(["eval", "model.pt", "--data_path", "texts.jsonl", "--output", "e.json", "--device", "cpu"]) == 0
    assert json.loads(Path("e.json").read_text())["texts"][0]["nats"] == pytest.approx(-sum(expected), rel=1e-6)


@pytest.mark.slow
def test_the_same_weights_score_the_same_in_transformers(
    folder: Path, model: Transformer, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate", reason="the harness's model hf needs it")
    from lm_eval.models.huggingface import HFLM

    (folder / "hf").mkdir()
    write_folder(folder / "hf", StoredModel(model.config, model.state_dict(), tokenizer))
    theirs = HFLM(str(folder / "hf"), device="cpu", dtype="float32", batch_size=4)
    ours = NanokimiLM(loaded=(model, tokenizer), batch_size=3)
    assert (ours.max_length, ours.prefix_token_id) == (theirs.max_length, theirs.prefix_token_id)
    pairs = instances(("", " the cat"), (WORDS * 9, " the cat"), ("the dog ", "ran"), ("a", " log and nobody"))
    for found, expected in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert found == (pytest.approx(expected[0], rel=1e-5), expected[1])
    asked = instances(*((text, {"until": ["\n", "q"], "max_gen_toks": 9}) for text in (WORDS * 9, "the dog", "a b")))
    assert ours.generate_until(asked) == theirs.generate_until(asked)

    manager = lm_eval.tasks.TaskManager(include_path="tasks", include_defaults=False)
    names = ["own_choices", "own_text"]
    expected = lm_eval.simple_evaluate(theirs, tasks=names, task_manager=manager)["results"]
    found = run_tasks(ours, names, include_path="tasks")["results"]
    bits = expected["own_text"]["bits_per_byte,none"]
    assert found["own_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)
    assert 0 < expected["own_choices"]["acc,none"] < 1
    for name in ("acc,none", "acc_norm,none"):
        assert found["own_choices"][name] == expected["own_choices"][name]

    save_model(folder / "model.pt", model, tokenizer)
    flags = ["--data_path", "own_text.jsonl", "--tasks", "own_choices.jsonl", "--output", "e.json", "--device", "cpu"]
    assert main(["eval", "model.pt", *flags]) == 0
    written = json.loads(Path("e.json").read_text())
    assert written["texts"][0]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    for name in ("acc", "acc_norm", "acc_stderr"):
        assert written["files"][0][name] == pytest.approx(expected["own_choices"][f"{name},none"])


def test_the_command_runs_tasks_of_ones_own(
    folder: Path, model: Transformer, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(folder / "model.pt", model, tokenizer)
    flags = ["--include_path", "tasks", "--output", "e.json", "--device", "cpu"]
    names = "own_choices,own_text,own_answers"
    assert main(["eval", "model.pt", "--tasks", names, "--limit", "6", "--num_fewshot", "1", *flags]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0][:3] == ["of", "figure", "value"]  # nothing but the table
    written = json.loads(Path("e.json").read_text())["harness"]
    assert set(written["results"]) == set(TASKS)
    acc = written["results"]["own_choices"]["acc,none"]
    assert ["own_choices", "acc", f"{acc:.4f}"] in [line[:3] for line in table]
    assert written["n-samples"]["own_choices"]["effective"] == 6
    assert written["n-shot"]["own_choices"] == 1


def test_the_harness_knows_the_model_by_its_name(folder: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    save_model(folder / "model.pt", model, tokenizer)
    manager = lm_eval.tasks.TaskManager(include_path="tasks", include_defaults=False)
    arguments = "checkpoint=model.pt,device=cpu,batch_size=2"
    found = lm_eval.simple_evaluate("nanokimi", arguments, tasks=["own_text"], task_manager=manager)
    own = run_tasks(NanokimiLM(loaded=(model, tokenizer)), ["own_text"], include_path="tasks")
    bits = [result["results"]["own_text"]["bits_per_byte,none"] for result in (found, own)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-6)


# ---- generation ---------------------------------------------------------------------------------


def greedy(model: Transformer, tokenizer: Tokenizer, prompt: str, max_tokens: int) -> str:
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    settings = SamplingOptions(temperature=0.0, max_tokens=max_tokens)
    stop, size = (tokenizer.eot_id,), tokenizer.vocab_size
    return tokenizer.decode(stream_tokens(model, ids, settings, stop_tokens=stop, vocab_size=size))


def test_a_stop_string_ends_a_continuation_and_is_left_out(model: Transformer, tokenizer: Tokenizer) -> None:
    adapter = NanokimiLM(loaded=(model, tokenizer))
    whole = greedy(model, tokenizer, "the dog", 20)
    stop = whole[5:8]
    asked = instances(
        ("the dog", {"max_gen_toks": 20}),
        ("the dog", {"until": [stop, "never"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.7}),
        ("the dog", {"until": stop, "max_new_tokens": 20, "temperature": 0.0, "num_beams": 1}),
        ("the dog", {"max_gen_toks": 2}),
    )
    cut = whole[: whole.index(stop)]
    assert adapter.generate_until(asked) == [whole, cut, cut, greedy(model, tokenizer, "the dog", 2)]


def test_a_prompt_beyond_the_context_loses_its_left_and_more_tokens_than_fit_become_half(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    adapter, prompt = NanokimiLM(loaded=(model, tokenizer)), WORDS * 20
    ids = tokenizer.encode(prompt)
    for wanted, room in ((28, 100), (1000, 64), (128, 64)):
        left = tokenizer.decode(ids[-room:])
        assert tokenizer.encode(left) == ids[-room:]
        expected = greedy(model, tokenizer, left, 128 - room)
        assert adapter.generate_until(instances((prompt, {"max_gen_toks": wanted}))) == [expected]
    assert adapter.generate_until(instances(("", {"max_gen_toks": 4}))) == [greedy(model, tokenizer, "", 4)]


def test_a_choice_that_changes_the_text_is_never_ignored(model: Transformer, tokenizer: Tokenizer) -> None:
    adapter = NanokimiLM(loaded=(model, tokenizer))
    for choices in ({"num_beams": 4}, {"repetition_penalty": 1.2}):
        with pytest.raises(UserError, match=next(iter(choices))):
            adapter.generate_until(instances(("a", choices)))
    torch.manual_seed(0)
    warm = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 20}
    assert len(set(adapter.generate_until(instances(*[("a", {**warm, "seed": seed}) for seed in range(4)])))) > 1


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_tasks_of_the_harness_itself_are_found_by_name_and_pattern(folder: Path) -> None:
    _, found = harness._find(["own_text", "arc_e?sy", "piqa", "tasks/own_choices.yaml"], "tasks")
    assert found == ["own_text", "arc_easy", "piqa", "tasks/own_choices.yaml"]


def test_mistakes_take_one_line(
    folder: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(harness, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    save_model(folder / "model.pt", model, tokenizer)
    (folder / "tasks" / "gone.yaml").write_text(
        json.dumps(
            {
                **json.loads(Path("tasks/own_text.yaml").read_text()),
                "task": "gone",
                "dataset_kwargs": {"data_files": {"test": "gone.jsonl"}},
            }
        )
    )

    def complaint(*flags: str, code: int = 2) -> str:
        assert main(["eval", "model.pt", "--device", "cpu", *flags]) == code
        return capsys.readouterr().err.splitlines()[-1]

    line = complaint("--tasks", "own_texts", "--include_path", "tasks")
    assert all(word in line for word in ("--tasks own_texts", "own_text", ".jsonl"))
    assert "--include_path absent" in complaint("--tasks", "own_text", "--include_path", "absent")
    line = complaint("--tasks", "gone", "--include_path", "tasks", code=1)
    assert all(word in line for word in ("--tasks gone", "gone.jsonl"))


def test_a_missing_package_is_named(
    folder: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_model(folder / "model.pt", model, tokenizer)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["eval", "model.pt", "--device", "cpu", "--tasks", "own_text"]) == 2
    assert "pip install 'nanokimi[eval]'" in capsys.readouterr().err


def test_arguments_from_the_harness_are_checked(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="batch_size auto"):
        NanokimiLM(loaded=(model, tokenizer), batch_size="auto")
    with pytest.raises(UserError, match="checkpoint="):
        NanokimiLM()
    assert harness.NanokimiLM(loaded=(model, tokenizer), batch_size="4").batch_size == 4
