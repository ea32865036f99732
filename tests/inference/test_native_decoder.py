"""Compiled kernels against the PyTorch model they stand for."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from conftest import lively
from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.errors import RunError
from nanokimi.inference.decoder import EagerDecoder
from nanokimi.inference.decoding import use_weights_
from nanokimi.inference.native_decoder import (
    CONTEST,
    MUCH,
    PRODUCTS_PER_THREAD,
    SHORT_PROMPT,
    NativeDecoder,
    _Threads,
    supports,
)
from nanokimi.model.transformer import Transformer
from nanokimi.native import WEIGHT_FORMATS, build

pytestmark = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="needs a C++ compiler")

TOLERANCE = 2e-5  # of logits that reach 4
SHAPES: dict[str, dict[str, Any]] = {
    "debug": {},
    "no query latent": {"q_lora_rank": 0},
    "query latent wider than the model": {"q_lora_rank": 50},
    "no shared experts": {"n_shared_experts": 0},
    "no dense layers": {"n_dense_layers": 0},
    "dense layers only": {"n_dense_layers": 3},
    "wide shared experts": {"n_shared_experts": 5},
    "softmax": {"score_func": "softmax", "norm_topk_prob": False, "route_scale": 2.5},
    "groups": {"n_routed_experts": 12, "n_expert_groups": 4, "n_limited_groups": 2, "n_activated_experts": 5},
    "softmax groups": {"score_func": "softmax", "n_expert_groups": 4, "n_limited_groups": 3},
    "all experts": {"n_activated_experts": 8},
    "one expert": {"n_routed_experts": 1, "n_activated_experts": 1},
    "odd widths": {
        "dim": 37,
        "inter_dim": 61,
        "moe_inter_dim": 7,
        "kv_lora_rank": 19,
        "q_lora_rank": 21,
        "n_heads": 3,
        "qk_nope_head_dim": 5,
        "qk_rope_head_dim": 6,
        "v_head_dim": 9,
        "vocab_size": 259,
    },
    "rotary part only": {"qk_nope_head_dim": 0, "n_heads": 1},
    "many heads": {"n_heads": 15},
    "yarn": {"rope_factor": 4.0, "original_seq_len": 32, "mscale_all_dim": 0.7},
    "eps": {"norm_eps": 1e-2},
}


def model_of(**shape: Any) -> Transformer:
    return lively(Transformer(ModelConfig.preset("debug", **shape)))


def tokens_of(model: Transformer, count: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()


def compared(model: Transformer, weights: str = "fp32", length: int = 28, prompt: int = 8) -> tuple[Tensor, Tensor]:
    """Logits of both decoders after the prompt and after each token after it."""
    tokens = tokens_of(model, length)
    found = []
    for decoder in (EagerDecoder(model), NativeDecoder(model, weights=weights)):
        first = decoder.prefill(0, tokens[:prompt])
        found.append(torch.stack([first, *(decoder.step([0], [token])[0] for token in tokens[prompt:])]))
    return found[0], found[1]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_logits_are_those_of_the_model(shape: dict[str, Any]) -> None:
    eager, native = compared(model_of(**shape))
    torch.testing.assert_close(native, eager, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("slots", [1, 3])
def test_a_short_prompt_is_read_to_the_bit_as_if_token_by_token(slots: int) -> None:
    """Also in two parts, and beside what other slots hold."""
    model = model_of()
    tokens = tokens_of(model, 60)
    decoder, reference = NativeDecoder(model, slots=slots), NativeDecoder(model)
    last = slots - 1
    if last:
        decoder.prefill(0, tokens[::-1][:20])
    for first, count in ((0, 2), (2, SHORT_PROMPT), (2 + SHORT_PROMPT, 17)):
        part = tokens[first : first + count]
        expected = [reference.step([0], [token])[0] for token in part][-1]
        assert torch.equal(decoder.prefill(last, part), expected)
    assert decoder.lengths[last] == reference.lengths[0] == 19 + SHORT_PROMPT


@pytest.mark.parametrize("count", [SHORT_PROMPT, SHORT_PROMPT + 1])
def test_prompts_on_both_sides_of_the_border_have_the_logits_of_the_model(count: int) -> None:
    eager, native = compared(model_of(), length=count + 4, prompt=count)
    torch.testing.assert_close(native, eager, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", ["debug", "odd widths"])
@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_packed_weights_compute_what_the_rounded_model_does(weights: str, shape: str) -> None:
    model = model_of(**SHAPES[shape])
    use_weights_(model, weights)
    eager, native = compared(model, weights)
    torch.testing.assert_close(native, eager, rtol=0, atol=TOLERANCE)


def test_a_prompt_of_one_token_needs_no_other(debug_model: Transformer) -> None:
    eager, native = compared(debug_model, prompt=1)
    torch.testing.assert_close(native, eager, rtol=0, atol=TOLERANCE)


def test_caches_of_several_chunks_are_read_to_their_ends() -> None:
    model = model_of(max_seq_length=400, n_heads=3)
    eager, native = compared(model, length=400, prompt=370)
    torch.testing.assert_close(native, eager, rtol=0, atol=TOLERANCE)


def test_a_prompt_may_come_in_parts(debug_model: Transformer) -> None:
    tokens = tokens_of(debug_model, 20)
    whole, parts = NativeDecoder(debug_model), NativeDecoder(debug_model)
    expected = whole.prefill(0, tokens)
    for start, end in ((0, 7), (7, 8), (8, 20)):
        found = parts.prefill(0, tokens[start:end])
    assert parts.lengths == whole.lengths == [20]
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(parts.step([0], [3]), whole.step([0], [3]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("shape", ["debug", "odd widths", "many heads"])
def test_a_slot_computes_the_same_bits_beside_others_of_any_length(shape: str, weights: str) -> None:
    model = model_of(**SHAPES[shape])
    prompts = [tokens_of(model, 2 + 4 * slot, seed=slot) for slot in range(7)]
    together, alone = NativeDecoder(model, slots=7, weights=weights), NativeDecoder(model, weights=weights)
    for slot, prompt in enumerate(prompts):
        together.prefill(slot, prompt)
    order = [3, 0, 6, 5, 1, 2, 4]
    steps = [together.step(order[: 7 - i], [(11 * slot + i) % 250 for slot in order[: 7 - i]]) for i in range(5)]
    for place, slot in enumerate(order):
        alone.reset(0)
        alone.prefill(0, prompts[slot])
        for i in range(5):
            if place < 7 - i:
                assert torch.equal(alone.step([0], [(11 * slot + i) % 250])[0], steps[i][place])
    assert together.lengths == [2 + 4 * slot + min(5, 7 - order.index(slot)) for slot in range(7)]


def test_a_slot_used_again_remembers_nothing(debug_model: Transformer) -> None:
    fresh, used = NativeDecoder(debug_model, slots=2), NativeDecoder(debug_model, slots=2)
    used.prefill(1, tokens_of(debug_model, 40))
    used.step([1], [9])
    used.reset(1)
    assert used.lengths == [0, 0]
    for token in tokens_of(debug_model, 5, seed=4):
        assert torch.equal(used.step([1], [token]), fresh.step([0], [token]))


@pytest.mark.parametrize("shape", ["debug", "groups", "odd widths"])
def test_the_number_of_threads_changes_no_bit(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(**SHAPES[shape], max_seq_length=300)
    prompts = [tokens_of(model, 290, seed=2), tokens_of(model, 3, seed=3)]
    found = []
    for threads in (1, 2, 3):
        decoder = NativeDecoder(model, slots=2)
        monkeypatch.setattr(decoder._threads, "run", lambda products, compute, threads=threads: compute(threads))
        for slot, prompt in enumerate(prompts):
            decoder.prefill(slot, prompt)
        found.append(torch.stack([decoder.step([0, 1], [token, token]) for token in range(5)]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_step_takes_as_many_threads_as_have_work_and_of_two_choices_the_quicker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, seconds, taken = 0.0, {1: 1.0, 4: 0.5}, []

    def compute(threads: int) -> None:
        nonlocal now
        now += seconds.get(threads, 1.0)
        taken.append(threads)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr("time.perf_counter", lambda: now)
    threads = _Threads()
    for products in (0, PRODUCTS_PER_THREAD, 2 * MUCH):  # no work for more than one; work for all without a question
        threads.run(products, compute)
    assert taken == [1, 1, 4]
    for cost, quicker in ((0.5, 4), (9.0, 1), (0.5, 4)):
        seconds[4] = cost
        taken.clear()
        for _ in range(12 * CONTEST):
            threads.run(5 * PRODUCTS_PER_THREAD, compute)
        last = taken[-CONTEST:]
        assert last.count(quicker) == CONTEST - 1
        assert set(last) == {1, 4}


def test_the_cache_can_be_filled_to_its_last_place(debug_model: Transformer) -> None:
    decoder, reference = NativeDecoder(debug_model, max_length=10), EagerDecoder(debug_model, max_length=10)
    tokens = tokens_of(debug_model, 10)
    for one in (decoder, reference):
        one.prefill(0, tokens[:9])
    torch.testing.assert_close(decoder.step([0], tokens[9:]), reference.step([0], tokens[9:]), rtol=0, atol=TOLERANCE)
    with pytest.raises(ValueError, match="the cache holds 10 tokens, 11 are needed"):
        decoder.step([0], [1])
    with pytest.raises(ValueError, match="the cache holds 10 tokens, 12 are needed"):
        decoder.prefill(0, [1, 2])
    assert decoder.lengths == [10]


def test_fp32_weights_stay_where_the_model_has_them_and_others_are_copies(debug_model: Transformer) -> None:
    head = debug_model.head.weight
    assert NativeDecoder(debug_model)._packed.structure.head.data == head.data_ptr()
    assert NativeDecoder(debug_model, weights="int8")._packed.structure.head.data != head.data_ptr()


def test_a_model_of_another_precision_is_told_apart(debug_model: Transformer) -> None:
    assert supports(debug_model) is None
    assert supports(debug_model.bfloat16()) == "the compiled kernels read fp32 models, this one is in bfloat16"
    with torch.device("meta"):
        elsewhere = Transformer(debug_model.config)
    assert supports(elsewhere) == "the compiled kernels run on a CPU, the model is on meta"


def test_kernels_that_cannot_be_built_are_one_clear_error(
    debug_model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_outcome", lambda: "no C++ compiler found: install g++")
    with pytest.raises(RunError, match=r"^the native decoder cannot be built: no C\+\+ .*; or use --decoder eager$"):
        NativeDecoder(debug_model)
