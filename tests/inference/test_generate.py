from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from scripted import ScriptedModel

from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer
from nanokimi.errors import RunError, UserError
from nanokimi.inference.generate import generate, generate_tokens, stream, stream_tokens
from nanokimi.inference.options import SamplingKeywords, SamplingOptions
from nanokimi.model.cache import LatentCache
from nanokimi.model.transformer import Transformer

CONTEXT = 128
EOT = 256


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread and lose a lot when the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("byte")


def chunks_of(model: ScriptedModel, tokenizer: Tokenizer, *stop: str) -> list[str]:
    return list(
        stream(model, tokenizer, "x", SamplingOptions(temperature=0.0, max_tokens=len(model.script), stop=stop))
    )


@pytest.mark.fault(70)
def test_greedy_equals_the_uncached_forward_pass(debug_model: Transformer) -> None:
    ids = [5, 6, 7]
    with torch.inference_mode():
        for _ in range(12):
            ids.append(int(debug_model(torch.tensor([ids]))[0, -1].argmax()))
    assert generate_tokens(debug_model, [5, 6, 7], max_tokens=12, temperature=0.0) == ids[3:]
    assert generate_tokens(debug_model, [5, 6, 7], max_tokens=12, top_p=0.0) == ids[3:]


def test_the_same_seed_writes_the_same_text_beside_other_draws(debug_model: Transformer, tokenizer: Tokenizer) -> None:
    first = generate(debug_model, tokenizer, "ab", max_tokens=12, seed=3)
    torch.rand(5)
    assert generate(debug_model, tokenizer, "ab", max_tokens=12, seed=3) == first
    assert generate(debug_model, tokenizer, "ab", max_tokens=12, seed=4) != first


def test_a_generation_does_not_touch_the_global_random_state(debug_model: Transformer) -> None:
    before = torch.random.get_rng_state()
    generate_tokens(debug_model, [1], max_tokens=3)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.fault(83)
@pytest.mark.parametrize("seed", range(3))
def test_streamed_chunks_make_the_unstreamed_text(debug_model: Transformer, tokenizer: Tokenizer, seed: int) -> None:
    settings = SamplingOptions(max_tokens=24, seed=seed, stop=("e", "\n"))
    whole = generate(debug_model, tokenizer, "ab", max_tokens=24, seed=seed, stop=["e", "\n"])
    assert "".join(stream(debug_model, tokenizer, "ab", settings)) == whole


@pytest.mark.fault(73)
def test_a_prompt_over_the_context_names_both_counts(debug_model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"129 tokens.*128.*--prompt"):
        generate(debug_model, tokenizer, "a" * (CONTEXT + 1))


@pytest.mark.fault(74)
@pytest.mark.parametrize(("prompt_length", "written"), [(120, 8), (127, 1), (128, 0)])
def test_a_full_context_ends_with_reason_length_and_keeps_the_output(
    debug_model: Transformer, prompt_length: int, written: int
) -> None:
    deltas = stream_tokens(debug_model, [1] * prompt_length, SamplingOptions(max_tokens=50, temperature=0.0))
    assert len(list(deltas)) == deltas.result.tokens == written
    assert deltas.result.finish_reason == "length"


@pytest.mark.fault(75)
def test_an_empty_prompt_starts_after_an_end_of_text(tokenizer: Tokenizer) -> None:
    scripted = ScriptedModel(b"hello")
    assert generate(scripted, tokenizer, "", max_tokens=5, temperature=0.0) == "hello"
    assert scripted.prompts == [[EOT]]


def test_no_prompt_tokens_at_all_is_an_error(debug_model: Transformer) -> None:
    with pytest.raises(UserError, match="prompt has no tokens"):
        generate_tokens(debug_model, [])


@pytest.mark.parametrize("token", [-1, 257])
def test_a_prompt_token_outside_the_vocabulary_is_named(debug_model: Transformer, token: int) -> None:
    with pytest.raises(UserError, match=rf"token {token}.*257"):
        generate_tokens(debug_model, [1, token])


def test_a_prompt_that_is_not_utf8_is_an_error(debug_model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"--prompt is not valid UTF-8"):
        generate(debug_model, tokenizer, b"caf\xe9".decode("utf-8", "surrogateescape"))


@pytest.mark.fault(76)
def test_negative_max_tokens_is_an_error_before_anything_runs(debug_model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"^--max_tokens must be 0 or more, got -1$"):
        generate(debug_model, tokenizer, "a", max_tokens=-1)


def test_zero_max_tokens_writes_nothing(debug_model: Transformer, tokenizer: Tokenizer) -> None:
    assert generate(debug_model, tokenizer, "a", max_tokens=0) == ""
    assert generate_tokens(debug_model, [1], max_tokens=0) == []


@pytest.mark.fault(79)
def test_end_of_text_stops_and_is_not_part_of_the_text(tokenizer: Tokenizer) -> None:
    scripted = ScriptedModel([*b"done", EOT, *b"more"])
    deltas = stream(scripted, tokenizer, "x", SamplingOptions(temperature=0.0))
    assert "".join(deltas) == "done"
    assert (deltas.result.finish_reason, deltas.result.tokens, deltas.result.prompt_tokens) == ("stop", 4, 1)


def test_a_stop_token_ends_the_ids_and_is_left_out() -> None:
    scripted = ScriptedModel([1, 2, 3, 4])
    assert generate_tokens(scripted, [9], temperature=0.0, max_tokens=4, stop_tokens=(3,)) == [1, 2]


@pytest.mark.fault(80)
@pytest.mark.parametrize("text", ["é", "日本語", "a😀b", "👩‍👩‍👧"])
def test_a_character_split_over_tokens_is_never_broken(tokenizer: Tokenizer, text: str) -> None:
    deltas = chunks_of(ScriptedModel(text.encode()), tokenizer)
    assert deltas == list(text)
    cut = chunks_of(ScriptedModel(text.encode()[:-1]), tokenizer)
    assert "".join(cut) == text[:-1]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ["END"], "one "),
        ("one EN two", ["END"], "one EN two"),
        ("one EN", ["END"], "one EN"),
        ("aab", ["ab"], "a"),
        ("aaab!", ["aab"], "a"),
        ("ababac.", ["abac"], "ab"),
        ("xabcd", ["bc", "abcd"], "xa"),
        ("xabcd", ["cd", "abcd"], "x"),
        ("xabce", ["abcd", "e"], "xabc"),
        ("x日本y", ["日本"], "x"),
        ("END", ["END"], ""),
    ],
)
def test_a_stop_string_split_over_tokens_is_never_leaked(
    tokenizer: Tokenizer, text: str, stop: list[str], expected: str
) -> None:
    deltas = chunks_of(ScriptedModel(text.encode()), tokenizer, *stop)
    assert "".join(deltas) == expected


def test_only_what_may_become_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    assert chunks_of(ScriptedModel(b"a END"), tokenizer, "ENDE", " EX") == ["a", " ", "END"]
    assert chunks_of(ScriptedModel(b"a ENx"), tokenizer, "END") == ["a", " ", "ENx"]


class ChunkTokenizer:
    """Splits one text as told, to show that the cut does not depend on the split."""

    eot_id = EOT

    def __init__(self, chunks: list[str]) -> None:
        self.chunks = chunks
        self.vocab_size = len(chunks)

    def encode(self, text: str) -> list[int]:
        return [0]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.chunks[i] for i in ids)


def test_the_cut_at_a_stop_string_does_not_depend_on_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    class PlainStream:
        pending = False

        def __init__(self, tokenizer: ChunkTokenizer) -> None:
            self.push = lambda token: tokenizer.chunks[token]

    monkeypatch.setattr("nanokimi.inference.engine.TextStream", PlainStream)
    text, stop = "xabcdy", ("bc", "abcd", "cdy")
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        marked = "".join(c + "|" * cut for c, cut in zip(text, (*cuts, False), strict=True))
        tokenizer = ChunkTokenizer(marked.split("|"))
        scripted = ScriptedModel(list(range(len(tokenizer.chunks))))
        deltas = stream(scripted, tokenizer, "", SamplingOptions(temperature=0.0, stop=stop))
        assert ("".join(deltas), deltas.result.finish_reason) == ("xa", "stop"), marked


def test_one_stop_string_may_be_given_bare(tokenizer: Tokenizer) -> None:
    assert generate(ScriptedModel(b"one two"), tokenizer, "x", temperature=0.0, max_tokens=7, stop="tw") == "one "


def test_the_keywords_of_generate_are_the_options_of_sampling() -> None:
    names = {field.name for field in dataclasses.fields(SamplingOptions)}
    assert set(SamplingKeywords.__annotations__) == names - {"stop"}
    with pytest.raises(TypeError, match="temprature"):
        generate_tokens(ScriptedModel([1]), [1], temprature=0.5)


def test_ids_end_at_stop_tokens_and_not_at_stop_strings() -> None:
    with pytest.raises(UserError, match="give stop_tokens, or use generate"):
        generate_tokens(ScriptedModel([1]), [1], stop=("x",))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_of_the_model_vocabulary_is_never_written(tokenizer: Tokenizer, temperature: float) -> None:
    scripted = ScriptedModel(b"hello", padding=63)
    assert generate(scripted, tokenizer, "x", max_tokens=5, temperature=temperature) == "hello"


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_comes_back_also_when_the_reader_stops_early(training: bool) -> None:
    scripted = ScriptedModel(b"hello").train(training)
    deltas = stream_tokens(scripted, [1], SamplingOptions(temperature=0.0))
    next(deltas)
    assert not scripted.training
    deltas.close()
    assert scripted.training == training


def test_nothing_of_inference_mode_leaks_to_the_reader(debug_model: Transformer) -> None:
    for _ in stream_tokens(debug_model, [1], SamplingOptions(max_tokens=2)):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


def test_the_cache_has_the_precision_of_the_model_and_no_more_room_than_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    def remember(*args: object, **kwargs: object) -> object:
        made.append(original(*args, **kwargs))
        return made[-1]

    original = LatentCache
    monkeypatch.setattr("nanokimi.inference.decoder.LatentCache", remember)
    generate_tokens(Transformer(ModelConfig.preset("debug")).bfloat16(), [1] * 10, max_tokens=5)
    assert made[0].entries.dtype == torch.bfloat16
    assert made[0].entries.shape[2] == 15


def test_logits_that_are_not_finite_are_reported() -> None:
    broken = Transformer(ModelConfig.preset("debug"))
    torch.nn.init.constant_(broken.head.weight, torch.nan)
    with pytest.raises(RunError, match=r"not finite.*earlier checkpoint"):
        generate_tokens(broken, [1])


def test_the_result_tells_prefill_from_decoding() -> None:
    deltas = stream_tokens(ScriptedModel([1], seconds=0.001), [1, 2], SamplingOptions(max_tokens=5, temperature=0.0))
    assert deltas.result.finish_reason is None
    next(deltas)
    assert (deltas.result.tokens, deltas.result.decode_seconds) == (1, 0.0)
    assert deltas.result.prefill_seconds > 0
    assert len(list(deltas)) == 4
    assert deltas.result.decode_seconds > 0
    assert deltas.result.summary().endswith("finish_reason length")
