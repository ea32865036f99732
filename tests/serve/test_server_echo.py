"""Prompts that come back with their log-probabilities, and lm-evaluation-harness over them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import lively
from served import ScriptedDecoder, Server, serving

from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.interop.hf_writer import write_folder
from nanokimi.interop.stored import StoredModel
from nanokimi.model.transformer import Transformer

COMPLETIONS = "/v1/completions"
PROMPT = "naïve cat"
pytestmark = pytest.mark.fault("A22")


@pytest.fixture(scope="module")
def model() -> Transformer:
    return lively(Transformer(ModelConfig.preset("debug")))


@pytest.fixture(scope="module")
def server(model: Transformer) -> Iterator[Server]:
    with serving(model, max_queue=64) as server:
        yield server


def complete(server: Server, **body: Any) -> dict[str, Any]:
    answer = httpx.post(server.url + COMPLETIONS, json={"temperature": 0, **body}, timeout=20)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_an_echo_begins_with_the_prompt_and_its_log_probabilities(
    server: Server, model: Transformer, max_tokens: int
) -> None:
    answer = complete(server, prompt=PROMPT, echo=True, logprobs=2, max_tokens=max_tokens)
    choice, ids = answer["choices"][0], list(PROMPT.encode())
    with torch.no_grad():
        table = model(torch.tensor([ids]))[0].log_softmax(-1)
    expected = [float(table[i, token]) for i, token in enumerate(ids[1:])]
    found = choice["logprobs"]
    assert choice["text"].startswith(PROMPT)
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    assert found["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-6)
    assert [max(top.values()) for top in found["top_logprobs"][1 : len(ids)]] == pytest.approx(
        table[:-1].amax(-1).tolist(), abs=1e-6
    )
    assert {len(found[name]) for name in found} == {len(ids) + max_tokens}
    assert found["text_offset"][:5] == [0, 1, 2, 2, 3]  # ï is two bytes
    assert found["text_offset"][len(ids) :][:1] == [len(PROMPT)][:max_tokens]
    assert answer["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": max_tokens,
        "total_tokens": len(ids) + max_tokens,
    }


def test_a_batch_of_ids_is_echoed_in_its_order_and_a_stream_says_the_same(server: Server) -> None:
    body = {"prompt": [[1, 2, 3], [9], [4, 5]], "echo": True, "logprobs": 1, "max_tokens": 1, "n": 2, "seed": 1}
    choices = complete(server, **body)["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [4, 4, 2, 2, 3, 3]
    lines = httpx.post(server.url + COMPLETIONS, json={**body, "temperature": 0, "stream": True}).text.split("\n\n")
    streamed = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
    for choice in choices:
        parts = [part for part in streamed if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name in choice["logprobs"]:
            joined = [value for part in parts if part["logprobs"] for value in part["logprobs"][name]]
            assert joined == choice["logprobs"][name]


def test_an_echo_without_log_probabilities_is_the_text_alone(server: Server) -> None:
    (choice,) = complete(server, prompt=PROMPT, echo=True, max_tokens=0)["choices"]
    assert (choice["text"], choice["logprobs"]) == (PROMPT, None)


def test_a_stop_string_in_the_prompt_stops_nothing() -> None:
    with serving(decoders=[ScriptedDecoder(b"xyz!")]) as server:
        (choice,) = complete(server, prompt="a!b", echo=True, max_tokens=9, stop="!")["choices"]
    assert choice["text"] == "a!bxyz"


def test_after_an_echo_one_more_token_is_told_even_if_it_ends_the_text() -> None:
    """lm-evaluation-harness leaves the last token out, whatever it is."""
    with serving(decoders=[ScriptedDecoder([256])]) as server:
        answer = complete(server, prompt="abc", echo=True, logprobs=1, max_tokens=1)
    assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == 4
    assert answer["choices"][0]["text"] == "abc"
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions"])
def test_a_text_goes_on_after_its_end_when_that_is_asked_for(path: str) -> None:
    given = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    with serving(decoders=[ScriptedDecoder([97, 256, 98])], chat=True) as server:
        for ignore_eos, written in ((False, 1), (True, 5)):
            body = {**given, "max_tokens": 5, "ignore_eos": ignore_eos}
            assert httpx.post(server.url + path, json=body).json()["usage"]["completion_tokens"] == written


def test_every_chunk_tells_the_counts_so_far_when_that_is_asked_for() -> None:
    with serving(decoders=[ScriptedDecoder(b"abcd")]) as server:
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {"prompt": "xy", "max_tokens": 4, "stream": True, "stream_options": options}
        lines = httpx.post(server.url + COMPLETIONS, json=body).text.split("\n\n")[:-2]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    written = ""
    for chunk in chunks:
        written += "".join(choice["text"] for choice in chunk["choices"])
        n = len(written)
        assert chunk["usage"] == {"prompt_tokens": 2, "completion_tokens": n, "total_tokens": 2 + n}
    assert written == "abcd"


@pytest.mark.slow
def test_the_harness_over_the_api_finds_what_eval_finds(
    server: Server, model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets, lm_eval = pytest.importorskip("datasets"), pytest.importorskip("lm_eval")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from nanokimi.insight.harness import NanokimiLM, run_tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hf").mkdir()
    tokenizer = load_tokenizer("byte")
    write_folder(tmp_path / "hf", StoredModel(model.config, model.state_dict(), tokenizer))
    names = write_tasks(tmp_path)
    over_api = LocalCompletionsAPI(
        base_url=server.url + COMPLETIONS,
        model="debug",
        tokenizer=str(tmp_path / "hf"),
        tokenizer_backend="huggingface",
        max_length=model.config.max_seq_length,
        batch_size=4,
        max_retries=1,
    )
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(over_api, tasks=names, task_manager=manager, bootstrap_iters=0)["results"]
    own = run_tasks(NanokimiLM(loaded=(model, tokenizer)), names, include_path=str(tmp_path))["results"]
    for name, figures in {
        "animals": ("acc", "acc_norm"),
        "places": ("acc", "acc_norm"),
        "prose": ("bits_per_byte",),
    }.items():
        for figure in figures:
            assert found[name][f"{figure},none"] == pytest.approx(own[name][f"{figure},none"], rel=1e-6)


def write_tasks(folder: Path) -> list[str]:
    """Two tasks of choices and one of whole texts, on local files."""
    choices = {
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    text = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    words = ["the cat", "a dog", "on the mat", "over the log"]
    rows: dict[str, list[dict[str, Any]]] = {
        name: [{"question": f"{word} {i}", "choices": words[:n], "answer": i % n} for i, word in enumerate(words * 2)]
        for name, n in (("animals", 2), ("places", 4))
    }
    rows["prose"] = [{"text": word * 3} for word in words]
    for name, content in rows.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in content))
        about = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        task = {**about, "test_split": "test", **(text if name == "prose" else choices)}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return list(rows)
