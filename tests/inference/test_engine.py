"""The engine: sequences that join and leave, and what each of them becomes whatever the others do."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conftest import lively
from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer
from nanokimi.errors import RunError, UserError
from nanokimi.inference.decoder import Decoder, EagerDecoder
from nanokimi.inference.decoding import new_decoder
from nanokimi.inference.engine import Continuation, Engine, GenerationArguments, TextAssembly, TextChunk, Token
from nanokimi.inference.generate import generate_tokens
from nanokimi.inference.options import SamplingOptions
from nanokimi.model.transformer import Transformer
from nanokimi.native import build


def job(prompt: Sequence[int], *, logprobs: int | None = None, **choices: object) -> GenerationArguments:
    values: dict[str, object] = {"temperature": 0.0, "max_tokens": 8, **choices}
    return GenerationArguments(tuple(prompt), SamplingOptions(**values), logprobs=logprobs)  # type: ignore[arg-type]


def tokens(sequence: Continuation) -> list[Token]:
    chunk = sequence.take()
    return list(chunk.tokens) if chunk else []


def run(engine: Engine, *sequences: Continuation) -> list[list[int]]:
    """Steps until all is done; the ids of each."""
    found: dict[int, list[int]] = {id(sequence): [] for sequence in sequences}
    while not engine.idle:
        engine.step()
        for sequence in sequences:
            found[id(sequence)] += [token.id for token in tokens(sequence)]
    return list(found.values())


def decoders(model: Transformer, slots: int) -> list[Decoder]:
    kinds: list[Decoder] = [EagerDecoder(model, slots=slots)]
    return kinds if isinstance(build._outcome(), str) else [*kinds, new_decoder(model, slots=slots, kind="native")]


def test_a_seeded_sequence_does_not_depend_on_seven_others_that_come_and_go(debug_model: Transformer) -> None:
    """Eight at once in five slots, joining at different steps, one cancelled in the middle; every decoder."""
    prompts = [[5, 6, 7], [9], list(range(60)), [3] * 11, [200, 1], [8, 8], [250], [1] * 100]
    choices = [
        {
            "temperature": 1.0 + 0.1 * i,
            "top_p": (1.0, 0.9)[i % 2],
            "top_k": (0, 30)[i // 4],
            "seed": i,
            "max_tokens": 24,
        }
        for i in range(8)
    ]
    for alone, together in zip(decoders(debug_model, 1), decoders(debug_model, 5), strict=True):
        expected = []
        for prompt, choice in zip(prompts, choices, strict=True):
            single = Engine(debug_model, None, decoder=alone)
            expected += run(single, single.submit(job(prompt, **choice)))
        engine = Engine(debug_model, None, decoder=together)
        sequences = []
        for prompt, choice in zip(prompts, choices, strict=True):
            sequences.append(engine.submit(job(prompt, **choice)))
            engine.step()
            engine.step()
        doomed = engine.submit(job([77], temperature=2.0, max_tokens=50))
        engine.step()
        engine.cancel(doomed)
        assert run(engine, *sequences) == expected
        assert len({tuple(ids) for ids in expected}) == 8


def test_prompts_are_read_in_chunks_beside_decoding(debug_model: Transformer) -> None:
    """A long prompt does not keep the others waiting, and is cut at places that depend on nothing but itself."""
    long, short = [i % 250 for i in range(100)], [4, 5]
    alone = Engine(debug_model, None, prefill_chunk=16)
    expected = run(alone, alone.submit(job(long)))
    engine = Engine(debug_model, None, slots=3, prefill_chunk=16)
    first = engine.submit(job(short, max_tokens=30))
    engine.step()
    second, third = engine.submit(job(long)), engine.submit(job(short, max_tokens=3))
    steps = 0
    while second.result.tokens == 0:
        engine.step()
        steps += 1
        assert first.result.tokens == 1 + steps
    assert steps == 7  # 100 tokens, 16 at a time
    run(engine)
    assert [token.id for token in tokens(second)] == expected[0]
    assert third.result.tokens == 3


def test_a_chunk_that_does_not_fit_beside_others_waits_whole(debug_model: Transformer) -> None:
    class Watched(EagerDecoder):
        read: list[tuple[int, int]]

        def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
            self.read.append((slot, len(tokens)))
            return super().prefill(slot, tokens)

    decoder = Watched(debug_model, slots=3)
    decoder.read = []
    engine = Engine(debug_model, None, decoder=decoder, prefill_chunk=16)
    for length in (10, 20, 5):
        engine.submit(job([1] * length, max_tokens=1))
    engine.step()
    assert decoder.read == [(0, 10)]
    engine.step()
    assert decoder.read == [(0, 10), (1, 16)]
    run(engine)
    assert decoder.read == [(0, 10), (1, 16), (1, 4), (2, 5)]


def test_sequences_wait_for_a_slot_in_the_order_in_which_they_came(debug_model: Transformer) -> None:
    engine = Engine(debug_model, None, slots=2)
    sequences = [engine.submit(job([i], max_tokens=2)) for i in range(5)]
    assert (engine.running, engine.idle) == (0, False)
    engine.step()
    assert engine.running == 2
    assert [sequence.result.tokens for sequence in sequences] == [1, 1, 0, 0, 0]
    run(engine)
    assert all(sequence.done and sequence.result.finish_reason == "length" for sequence in sequences)
    assert engine.idle


@pytest.mark.fault(93)
def test_a_cancelled_sequence_frees_its_slot_at_once_and_keeps_what_it_wrote(debug_model: Transformer) -> None:
    engine = Engine(debug_model, None)
    first, second = engine.submit(job([1], max_tokens=50)), engine.submit(job([2], max_tokens=3))
    engine.step()
    engine.cancel(first)
    engine.cancel(first)
    assert (engine.running, engine.idle) == (0, False)
    assert (first.done, first.result.finish_reason, len(tokens(first))) == (True, None, 1)
    engine.step()
    assert (second.result.tokens, first.result.tokens) == (1, 1)


def test_a_sequence_that_waits_can_be_cancelled(debug_model: Transformer) -> None:
    engine = Engine(debug_model, None)
    running, waiting = engine.submit(job([1], max_tokens=2)), engine.submit(job([2]))
    engine.step()
    engine.cancel(waiting)
    run(engine)
    assert (running.result.tokens, waiting.result.tokens, engine.idle) == (2, 0, True)


@pytest.mark.fault(100)
def test_one_sequence_with_bad_logits_does_not_disturb_the_others(debug_model: Transformer) -> None:
    class Spoiled(EagerDecoder):
        def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
            logits = super().step(slots, tokens)
            logits[list(slots).index(1) if 1 in slots else slice(0), 3] = torch.nan
            return logits

    engine = Engine(debug_model, None, decoder=Spoiled(debug_model, slots=2))
    good, bad = engine.submit(job([1, 2])), engine.submit(job([3]))
    assert run(engine, good, bad)[0] == generate_tokens(debug_model, [1, 2], max_tokens=8, temperature=0.0)
    assert good.error is None
    assert isinstance(bad.error, RunError)
    assert "not finite" in str(bad.error)
    assert (bad.result.tokens, bad.result.finish_reason) == (1, None)


def test_a_failing_decoder_ends_its_sequences_and_serves_the_next(debug_model: Transformer) -> None:
    class Failing(EagerDecoder):
        broken = True

        def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
            if self.broken:
                raise RuntimeError("out of memory")
            return super().step(slots, tokens)

    decoder = Failing(debug_model)
    engine = Engine(debug_model, None, decoder=decoder)
    broken = engine.submit(job([1]))
    run(engine)
    assert str(broken.error) == "out of memory"
    decoder.broken = False
    assert run(engine, engine.submit(job([1]))) == [generate_tokens(debug_model, [1], max_tokens=8, temperature=0)]


def test_log_probabilities_are_those_of_the_uncached_model(debug_model: Transformer) -> None:
    engine = Engine(debug_model, None, slots=2)
    plain = engine.submit(job([5, 6, 7], max_tokens=6))
    asked = engine.submit(job([5, 6, 7], max_tokens=6, logprobs=4))
    run(engine)
    found = tokens(asked)
    assert [token.id for token in found] == [token.id for token in tokens(plain)]
    with torch.inference_mode():
        logits = debug_model(torch.tensor([[5, 6, 7, *(token.id for token in found)]]))[0]
    for token, row in zip(found, logits[2:].log_softmax(-1), strict=False):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=2e-5)
        values, best = row.topk(4)
        assert [i for i, _ in token.likeliest] == best.tolist()
        assert [value for _, value in token.likeliest] == pytest.approx(values.tolist(), abs=2e-5)


def test_the_memory_of_a_sequence_is_known_before_it_is_admitted() -> None:
    model = lively(Transformer(ModelConfig.preset("debug")))
    config = model.config
    for decoder in decoders(model, 3):
        entry = config.kv_lora_rank + config.qk_rope_head_dim
        padded = sum(-(-width // 16) * 16 for width in (config.kv_lora_rank, config.qk_rope_head_dim))
        width = entry if isinstance(decoder, EagerDecoder) else padded
        expected = 4 * config.n_layers * config.max_seq_length * width
        assert Engine(model, None, decoder=decoder).slot_bytes == expected


@pytest.mark.fault(73)
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt has no tokens"),
        ([1] * 129, "129 tokens and the model's context holds 128"),
        ([257], "token 257, outside the model's vocabulary of 257"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused_before_it_waits(
    debug_model: Transformer, prompt: list[int], message: str
) -> None:
    engine = Engine(debug_model, load_tokenizer("byte"))
    with pytest.raises(UserError, match=message):
        engine.submit(job(prompt))
    assert engine.idle


def test_a_model_in_training_mode_is_not_decoded(debug_model: Transformer) -> None:
    engine = Engine(debug_model.train(), None)
    engine.submit(job([1]))
    with pytest.raises(AssertionError, match="evaluation mode"):
        engine.step()


# ---- text -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("byte")


def chunks(tokenizer: Tokenizer | None, text: bytes, *stop: str) -> list[TextChunk | None]:
    """What can be taken after each byte of ``text``, and at the end."""
    assembly = TextAssembly(tokenizer, stop)
    found = []
    for byte in text:
        ended = assembly.push(byte)
        found.append(assembly.take())
        if ended:
            break
    assembly.done = True
    return [*found, assembly.take()]


def ids(chunk: TextChunk | None) -> list[int]:
    return [] if chunk is None else [token.id for token in chunk.tokens]


@pytest.mark.fault(80)
def test_tokens_are_settled_with_the_character_that_they_complete(tokenizer: Tokenizer) -> None:
    text = "aé!"
    found = chunks(tokenizer, text.encode())
    assert [chunk.text if chunk else None for chunk in found] == ["a", None, "é", "!", None]
    assert [ids(chunk) for chunk in found] == [[97], [], list("é".encode()), [33], []]
    assert [token.text_offset for chunk in found if chunk for token in chunk.tokens] == [0, 1, 1, 2]


def test_tokens_of_an_incomplete_character_come_at_the_end_without_text(tokenizer: Tokenizer) -> None:
    found = chunks(tokenizer, "aé".encode()[:-1])
    assert found[-1] == ("", found[-1].tokens if found[-1] else ())
    assert ids(found[-1]) == [0xC3]


def test_tokens_of_text_that_may_become_a_stop_string_are_held_back_with_it(tokenizer: Tokenizer) -> None:
    found = chunks(tokenizer, b"xENy", "END")
    assert [chunk.text if chunk else None for chunk in found] == ["x", None, None, "ENy", None]
    assert [ids(chunk) for chunk in found] == [[120], [], [], [69, 78, 121], []]


@pytest.mark.fault(102)
def test_tokens_of_a_stop_string_are_dropped_with_it(tokenizer: Tokenizer) -> None:
    found = chunks(tokenizer, b"xEND", "END")
    assert [chunk.text if chunk else None for chunk in found] == ["x", None, None, None, None]
    assert [ids(chunk) for chunk in found] == [[120], [], [], [], []]


def test_a_token_that_a_stop_string_begins_within_keeps_its_place() -> None:
    class Words:
        vocab_size = 3

        @staticmethod
        def token_bytes(token: int) -> bytes:
            return (b"one S", b"TOP", b" two")[token]

    assembly = TextAssembly(Words(), ("STOP",))  # type: ignore[arg-type]
    assert not assembly.push(0)
    assert assembly.take() == ("one ", ())
    assert assembly.push(1)
    chunk = assembly.take()
    assert chunk is not None
    assert (chunk.text, ids(chunk)) == ("", [0])


def test_chunks_taken_late_make_the_same_text_and_the_same_tokens(tokenizer: Tokenizer) -> None:
    text = "one é EN two END three".encode()
    often = [chunk for chunk in chunks(tokenizer, text, "END", "three") if chunk]
    assembly = TextAssembly(tokenizer, ("END", "three"))
    for byte in text:
        if assembly.push(byte):
            break
    once = assembly.take()
    assert once is not None
    assert once.text == "".join(chunk.text for chunk in often) == "one é EN two "
    assert once.tokens == tuple(token for chunk in often for token in chunk.tokens)


def test_ids_without_a_tokenizer_are_settled_at_once() -> None:
    assert [(chunk.text, ids(chunk)) for chunk in chunks(None, b"ab") if chunk] == [("", [97]), ("", [98])]
