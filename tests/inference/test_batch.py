"""Several prompts at once: each becomes what it would alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nanokimi import generate_batch, generate_tokens
from nanokimi.errors import RunError, UserError
from nanokimi.inference.decoder import EagerDecoder
from nanokimi.inference.decoding import new_decoder
from nanokimi.inference.graph_decoder import GraphDecoder
from nanokimi.model.transformer import Transformer
from nanokimi.native import build

PROMPTS = [[5, 6, 7], [9], list(range(60)), [3] * 11, [200, 1], [8, 8], [250]]


class Watched(EagerDecoder):
    """Remembers which slots every step decodes."""

    def __init__(self, model: Transformer, **sizes: int) -> None:
        super().__init__(model, **sizes)
        self.steps: list[list[int]] = []

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        self.steps.append(list(slots))
        return super().step(slots, tokens)


def alone(model: Transformer, prompt: list[int], **choices: Any) -> list[int]:
    return generate_tokens(model, prompt, **choices)


@pytest.mark.fault(85)
@pytest.mark.parametrize("slots", [1, 2, 3, 7])
@pytest.mark.parametrize("choices", [{"temperature": 0.0}, {"temperature": 1.2, "top_k": 40, "top_p": 0.95}])
def test_every_prompt_is_continued_as_it_is_alone(
    debug_model: Transformer, slots: int, choices: dict[str, Any]
) -> None:
    seeds = [11, 12, 13, 11, 15, 16, 2**40]
    decoder = EagerDecoder(debug_model, slots=slots)
    together = generate_batch(debug_model, PROMPTS, max_tokens=12, seeds=seeds, decoder=decoder, **choices)
    pairs = zip(PROMPTS, seeds, strict=True)
    assert together == [alone(debug_model, prompt, max_tokens=12, seed=seed, **choices) for prompt, seed in pairs]
    assert generate_batch(debug_model, PROMPTS, max_tokens=12, seeds=seeds, **choices) == together


def test_a_sequence_leaves_when_it_is_done_and_the_next_takes_its_place(debug_model: Transformer) -> None:
    decoder = Watched(debug_model, slots=2)
    first = alone(debug_model, PROMPTS[0], max_tokens=6, temperature=0.0)
    stops = (first[2],)
    wanted = [alone(debug_model, prompt, max_tokens=6, temperature=0.0, stop_tokens=stops) for prompt in PROMPTS]
    assert len({len(ids) for ids in wanted}) > 1
    found = generate_batch(debug_model, PROMPTS, max_tokens=6, temperature=0.0, stop_tokens=stops, decoder=decoder)
    assert found == wanted
    steps = sum(len(ids) - (len(ids) == 6) for ids in wanted)  # the last of six needs no step, a stop needs one
    assert sum(map(len, decoder.steps)) == steps
    assert len(decoder.steps) < steps


def test_prompts_that_fill_the_context_and_no_tokens_at_all(debug_model: Transformer) -> None:
    full = [1] * 128
    assert generate_batch(debug_model, [full, [1] * 126, [2]], max_tokens=5, temperature=0.0) == [
        [],
        alone(debug_model, [1] * 126, max_tokens=5, temperature=0.0),
        alone(debug_model, [2], max_tokens=5, temperature=0.0),
    ]
    assert generate_batch(debug_model, [[1], [2]], max_tokens=0) == [[], []]
    assert generate_batch(debug_model, []) == []


def test_without_seeds_every_prompt_draws_anew_and_the_global_state_stays(debug_model: Transformer) -> None:
    before = torch.random.get_rng_state()
    first, second, third = generate_batch(debug_model, [[7]] * 3, max_tokens=20, temperature=2.0, top_p=1.0)
    assert len({tuple(first), tuple(second), tuple(third)}) == 3
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_fixed_steps_of_a_graph_write_the_same_tokens(debug_model: Transformer) -> None:
    decoder = GraphDecoder(debug_model, slots=3, capture=False)
    found = generate_batch(debug_model, PROMPTS, max_tokens=20, temperature=0.0, decoder=decoder)
    assert found == [alone(debug_model, prompt, max_tokens=20, temperature=0.0) for prompt in PROMPTS]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_compiled_kernels_continue_every_prompt_as_they_do_alone(debug_model: Transformer, temperature: float) -> None:
    if isinstance(reason := build._outcome(), str):
        pytest.skip(reason)
    seeds = list(range(len(PROMPTS)))
    several, one = (new_decoder(debug_model, kind="native", slots=slots) for slots in (3, 1))
    choices: dict[str, Any] = {"max_tokens": 20, "temperature": temperature}
    assert generate_batch(debug_model, PROMPTS, seeds=seeds, decoder=several, **choices) == [
        alone(debug_model, prompt, seed=seed, decoder=one, **choices)
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]


def test_the_training_flag_comes_back(debug_model: Transformer) -> None:
    debug_model.train()
    generate_batch(debug_model, PROMPTS[:2], max_tokens=2)
    assert debug_model.training


@pytest.mark.parametrize(
    ("prompts", "choices", "message"),
    [
        ([[1], []], {}, "prompt has no tokens"),
        ([[1], [257]], {}, "token 257, outside the model's vocabulary of 257"),
        ([[1] * 129], {}, "129 tokens and the model's context holds 128: shorten --prompt"),
        ([[1], [2]], {"seeds": [1]}, "2 prompts and 1 seeds"),
        ([[1]], {"seeds": [-1]}, "--seed must be from 0"),
        ([[1]], {"temperature": -1.0}, "--temperature must be"),
    ],
)
def test_mistakes_are_named(
    debug_model: Transformer, prompts: list[list[int]], choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate_batch(debug_model, prompts, **choices)


def test_logits_that_are_not_finite_are_reported(debug_model: Transformer) -> None:
    torch.nn.init.constant_(debug_model.head.weight, torch.nan)
    with pytest.raises(RunError, match="not finite"):
        generate_batch(debug_model, [[1], [2]])
