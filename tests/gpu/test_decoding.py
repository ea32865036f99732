"""What only a CUDA device shows of decoding: recorded graphs write what the model does and wait for nothing."""

from __future__ import annotations

import pytest
import torch
from conftest import lively, no_waiting

from nanokimi import generate_batch, generate_tokens
from nanokimi.config import ModelConfig
from nanokimi.inference.decoder import EagerDecoder
from nanokimi.inference.decoding import new_decoder, use_weights_
from nanokimi.inference.graph_decoder import GraphDecoder
from nanokimi.model.transformer import Transformer

pytestmark = pytest.mark.gpu
PROMPTS = [[5, 6, 7], [9], list(range(120)), [3] * 11, [200, 1]]


@pytest.fixture
def model() -> Transformer:
    config = ModelConfig.preset("debug", max_seq_length=300)
    return lively(Transformer(config), std=0.15).to("cuda")


def test_graphs_are_what_a_cuda_model_is_decoded_by(model: Transformer) -> None:
    assert type(new_decoder(model, slots=2)) is GraphDecoder
    assert type(new_decoder(model.train())) is EagerDecoder


def test_recorded_steps_write_the_tokens_of_the_eager_model(model: Transformer) -> None:
    eager = EagerDecoder(model, slots=3)
    graph = GraphDecoder(model, slots=3)
    expected = generate_batch(model, PROMPTS, max_tokens=40, temperature=0.0, decoder=eager)
    assert generate_batch(model, PROMPTS, max_tokens=40, temperature=0.0, decoder=graph) == expected
    assert len({span for _, span in graph.steps}) == 2
    assert [generate_tokens(model, prompt, max_tokens=40, temperature=0.0) for prompt in PROMPTS] == expected


def test_sampled_texts_are_those_of_their_seeds(model: Transformer) -> None:
    seeds = [3, 4, 5, 3, 7]
    decoder = EagerDecoder(model, slots=5)
    together = generate_batch(model, PROMPTS, max_tokens=10, seeds=seeds, decoder=decoder)
    alone = EagerDecoder(model)
    assert together == [
        generate_tokens(model, prompt, max_tokens=10, seed=seed, decoder=alone)
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]


def test_logits_of_recorded_steps_are_those_of_the_eager_model(model: Transformer) -> None:
    eager, graph = EagerDecoder(model, slots=4), GraphDecoder(model, slots=4)
    for decoder in (eager, graph):
        for slot, prompt in enumerate(PROMPTS[:4]):
            decoder.prefill(slot, prompt)
    for slots in ([0, 1, 2, 3], [3, 1], [2], [0, 1, 2, 3]):
        tokens = [slot + 17 for slot in slots]
        found, expected = graph.step(slots, tokens), eager.step(slots, tokens)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_recorded_step_never_waits_for_the_device_and_is_recorded_once(model: Transformer) -> None:
    decoder = GraphDecoder(model, slots=4)
    for slot, prompt in enumerate(PROMPTS[:2]):
        decoder.prefill(slot, prompt)
    decoder.step([0, 1], [1, 2])
    recorded = dict(decoder.steps)
    with no_waiting():
        logits = [decoder.step([0, 1], [3, 4]) for _ in range(5)]
    assert decoder.steps == recorded
    assert all(row.isfinite().all() for row in logits)
    assert not torch.equal(logits[0], logits[1])  # what a call returns is not overwritten by the next


@pytest.mark.parametrize("weights", ["bf16", "fp16"])
def test_half_precision_is_stored_and_close_to_the_rounded_fp32_model(model: Transformer, weights: str) -> None:
    reference = EagerDecoder(lively(Transformer(model.config), std=0.15), max_length=64)
    use_weights_(reference.model, weights)
    use_weights_(model, weights)
    assert model.head.weight.dtype in (torch.bfloat16, torch.float16)
    decoder = new_decoder(model, max_length=64)
    for found, expected in (
        (decoder.prefill(0, PROMPTS[0]), reference.prefill(0, PROMPTS[0])),
        (decoder.step([0], [4]), reference.step([0], [4])),
    ):
        assert found.dtype == torch.float32
        similar = torch.nn.functional.cosine_similarity(found.cpu().flatten(), expected.flatten(), dim=0)
        assert similar > 0.99
