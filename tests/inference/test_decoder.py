"""The decoder interface, the PyTorch reference behind it, and the choice among decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import lively

from nanokimi.config import ModelConfig
from nanokimi.errors import RunError, UserError
from nanokimi.inference import decoding
from nanokimi.inference.decoder import Decoder, EagerDecoder
from nanokimi.inference.decoding import new_decoder, store_parameters_, use_weights_
from nanokimi.inference.graph_decoder import GraphDecoder
from nanokimi.inference.options import WEIGHT_FORMATS
from nanokimi.model.transformer import Transformer

VARIANTS: list[dict[str, Any]] = [
    {},
    {"q_lora_rank": 0, "n_dense_layers": 0, "v_head_dim": 12},
    {"n_expert_groups": 4, "n_limited_groups": 2, "score_func": "softmax", "route_scale": 1.7},
    {"n_dense_layers": 3, "n_heads": 3, "kv_lora_rank": 20},
    {"n_shared_experts": 0, "norm_topk_prob": False, "n_routed_experts": 32},
    {"n_activated_experts": 8, "qk_nope_head_dim": 6},
]


def uncaptured(model: Transformer, **sizes: int) -> GraphDecoder:
    return GraphDecoder(model, capture=False, **sizes)


@pytest.fixture(params=[EagerDecoder, uncaptured], ids=["eager", "graph"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def model_of(variant: dict[str, Any]) -> Transformer:
    return lively(Transformer(ModelConfig.preset("debug", max_seq_length=300, **variant)), std=0.15)


@torch.no_grad()
def expected(model: Transformer, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]))[0, -1]


def ids(n: int) -> list[int]:
    return torch.randint(0, 257, (n,)).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_over_ragged_slots_are_those_of_the_uncached_model(kind: Any, variant: dict[str, Any]) -> None:
    model = model_of(variant)
    decoder: Decoder = kind(model, slots=5)
    texts = [ids(n) for n in (7, 1, 126, 40, 3)]
    for slot, text in enumerate(texts):
        close(decoder.prefill(slot, text), expected(model, text))
    for slots in ([0, 1, 2, 3, 4], [2, 0], [2, 4], [1], [2]):
        tokens = ids(len(slots))
        logits = decoder.step(slots, tokens)
        for slot, token, row in zip(slots, tokens, logits, strict=True):
            texts[slot].append(token)
            close(row, expected(model, texts[slot]))
    assert decoder.lengths == [len(text) for text in texts]


def close(found: torch.Tensor, reference: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (torch.float32, reference.shape)
    torch.testing.assert_close(found, reference, rtol=0, atol=2e-5)


@pytest.mark.parametrize("splits", [[24], [1] * 24, [10, 14], [1, 22, 1], [5, 1, 1, 17]])
def test_any_split_of_a_prompt_into_chunks_gives_the_same_logits(
    kind: Any, splits: list[int], debug_model: Transformer
) -> None:
    text = torch.tensor(ids(24))
    decoder: Decoder = kind(debug_model)
    for part in text.split(splits):
        logits = decoder.prefill(0, part.tolist())
    torch.testing.assert_close(logits, expected(debug_model, text.tolist()), rtol=0, atol=1e-5)


def test_a_slot_that_was_reset_remembers_nothing(kind: Any, debug_model: Transformer) -> None:
    text, decoder = ids(9), kind(debug_model, slots=2)
    first = decoder.prefill(1, text)
    decoder.step([1], [5])
    decoder.reset(1)
    assert decoder.lengths == [0, 0]
    assert torch.equal(decoder.prefill(1, text), first)


def test_on_a_cpu_a_slots_logits_are_its_own_to_the_bit(debug_model: Transformer) -> None:
    texts = [ids(n) for n in (20, 3, 11)]
    steps = [ids(3) for _ in range(4)]
    together = EagerDecoder(debug_model, slots=3)
    for slot, text in enumerate(texts):
        together.prefill(slot, text)
    found = [together.step([0, 1, 2], tokens) for tokens in steps]
    for slot, text in enumerate(texts):
        alone = EagerDecoder(debug_model, max_length=30)
        alone.prefill(0, text)
        for tokens, logits in zip(steps, found, strict=True):
            assert torch.equal(alone.step([0], [tokens[slot]])[0], logits[slot])


def test_slots_taken_together_as_on_other_devices_give_the_same_logits(debug_model: Transformer) -> None:
    alone, together = EagerDecoder(debug_model, slots=3), EagerDecoder(debug_model, slots=3)
    together.one_by_one = False
    for decoder in (alone, together):
        torch.manual_seed(1)
        for slot, n in enumerate((4, 9, 2)):
            decoder.prefill(slot, ids(n))
    for slots in ([0, 1, 2], [2, 0], [1, 2]):
        tokens = ids(len(slots))
        torch.testing.assert_close(together.step(slots, tokens), alone.step(slots, tokens), rtol=0, atol=2e-5)


def test_a_full_slot_takes_no_more_and_leaves_the_others_as_they_are(kind: Any, debug_model: Transformer) -> None:
    decoder: Decoder = kind(debug_model, slots=2, max_length=6)
    decoder.prefill(0, ids(6))
    text = ids(3)
    decoder.prefill(1, text)
    with pytest.raises(ValueError, match="the cache holds 6 tokens, 7 are needed"):
        decoder.step([1, 0], [5, 5])
    with pytest.raises(ValueError, match="the cache holds 6 tokens, 7 are needed"):
        decoder.prefill(1, ids(4))
    assert decoder.lengths == [6, 3]
    close(decoder.step([1], [9])[0], expected(debug_model, [*text, 9]))


def test_a_decoder_is_no_longer_than_the_context(kind: Any, debug_model: Transformer) -> None:
    assert kind(debug_model, max_length=10_000).max_length == 128
    assert kind(debug_model).max_length == 128
    assert kind(debug_model, max_length=7).max_length == 7


def test_the_eager_decoder_uses_the_weights_of_the_moment(debug_model: Transformer) -> None:
    decoder, text = EagerDecoder(debug_model), ids(5)
    decoder.prefill(0, text)
    with torch.no_grad():
        debug_model.head.weight.mul_(2)
    decoder.reset(0)
    close(decoder.prefill(0, text), expected(debug_model, text))


# ---- shapes of a graph --------------------------------------------------------------------------


def test_few_shapes_of_steps_occur(debug_config: ModelConfig) -> None:
    model = lively(Transformer(ModelConfig.preset("debug", max_seq_length=300)))
    decoder = uncaptured(model, slots=6)
    for slot in range(6):
        decoder.prefill(slot, ids(120))
    for n in (1, 2, 3, 4, 5, 6):
        decoder.step(list(range(n)), ids(n))
    assert set(decoder.steps) == {(1, 128), (2, 128), (4, 128), (6, 128)}
    for _ in range(10):
        decoder.step([0, 1], ids(2))
    decoder.prefill(0, ids(140))
    decoder.step([0], [1])
    assert set(decoder.steps) == {(1, 128), (2, 128), (4, 128), (6, 128), (2, 256), (1, 300)}


def test_half_precision_is_decoded_by_fixed_steps_as_by_the_model(debug_model: Transformer) -> None:
    store_parameters_(debug_model, torch.bfloat16)
    reference, fixed = EagerDecoder(debug_model, slots=2), uncaptured(debug_model, slots=2)
    for decoder in (reference, fixed):
        torch.manual_seed(2)
        for slot, n in enumerate((4, 9)):
            decoder.prefill(slot, ids(n))
    found, wanted = fixed.step([0, 1], [3, 4]), reference.step([0, 1], [3, 4])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.05 * float(wanted.std()))


# ---- the choice ---------------------------------------------------------------------------------


def test_small_models_are_decoded_eagerly_and_an_unknown_kind_is_named(debug_model: Transformer) -> None:
    assert type(new_decoder(debug_model)) is EagerDecoder
    assert type(new_decoder(debug_model, kind="eager")) is EagerDecoder
    with pytest.raises(UserError, match=r"--decoder fast: unknown; choose auto, eager"):
        new_decoder(debug_model, kind="fast")


def test_a_graph_without_cuda_is_refused(debug_model: Transformer) -> None:
    with pytest.raises(UserError, match=r"--decoder graph needs a CUDA device"):
        new_decoder(debug_model, kind="graph")


def test_a_large_model_gets_compiled_kernels_unless_it_trains_or_they_cannot_be_had(
    debug_model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Compiled:
        def __init__(self, model: Transformer, **options: Any) -> None:
            made.append(options)

    def fail(model: Transformer, **options: Any) -> None:
        raise RunError("no compiler")

    monkeypatch.setattr("nanokimi.inference.decoding.NativeDecoder", Compiled)
    monkeypatch.setattr(decoding, "WORTH_COMPILING", debug_model.num_parameters())
    assert type(new_decoder(debug_model, slots=3, max_length=9, weights="int8")) is Compiled
    assert made == [{"slots": 3, "max_length": 9, "weights": "int8"}]
    assert type(new_decoder(debug_model.train())) is EagerDecoder
    debug_model.eval()
    monkeypatch.setattr("nanokimi.inference.decoding.NativeDecoder", fail)
    assert type(new_decoder(debug_model)) is EagerDecoder
    with pytest.raises(RunError, match="no compiler"):
        new_decoder(debug_model, kind="native")
    monkeypatch.setattr("nanokimi.inference.decoding.supports", lambda model: "it is odd")
    assert type(new_decoder(debug_model)) is EagerDecoder
    with pytest.raises(UserError, match=r"--decoder native: it is odd; use --decoder eager"):
        new_decoder(debug_model, kind="native")


@pytest.mark.parametrize("weights", ["bf16", "fp16", "int8"])
def test_weights_are_rounded_in_place_and_stay_fp32_on_a_cpu(debug_model: Transformer, weights: str) -> None:
    before = {name: value.clone() for name, value in debug_model.state_dict().items()}
    use_weights_(debug_model, "fp32")
    assert all(torch.equal(value, before[name]) for name, value in debug_model.state_dict().items())
    use_weights_(debug_model, weights)
    after = debug_model.state_dict()
    assert not torch.equal(after["head.weight"], before["head.weight"])
    torch.testing.assert_close(after["head.weight"], before["head.weight"], rtol=0, atol=0.01)
    assert {parameter.dtype for parameter in debug_model.parameters()} == {torch.float32}


def test_int8_off_the_cpu_is_refused_with_a_remedy() -> None:
    with torch.device("meta"):
        elsewhere = Transformer(ModelConfig.preset("debug"))
    with pytest.raises(UserError, match=r"--weights int8 is for a CPU, this is meta: use --device cpu or"):
        use_weights_(elsewhere, "int8")


def test_stored_in_half_precision_a_model_keeps_its_routers_and_its_tables_in_fp32(debug_model: Transformer) -> None:
    store_parameters_(debug_model, torch.bfloat16)
    assert debug_model.cos.dtype == torch.float32
    for name, parameter in debug_model.named_parameters():
        assert parameter.dtype == (torch.float32 if "router" in name else torch.bfloat16), name


# ---- weights in fewer bytes -----------------------------------------------------------------------

UNITS = {"bf16": 2.0**-8, "fp16": 2.0**-11}  # half a unit of the last place of 1.0
SMALLEST = 2.0**-25  # half of the smallest number of fp16


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_rounding_twice_is_rounding_once(debug_model: Transformer, weight_format: str) -> None:
    use_weights_(debug_model, weight_format)
    once = {name: value.clone() for name, value in debug_model.state_dict().items()}
    use_weights_(debug_model, weight_format)
    for name, value in debug_model.state_dict().items():
        torch.testing.assert_close(value, once[name], rtol=3e-7, atol=0)


@pytest.mark.parametrize("weight_format", ["bf16", "fp16", "int8"])
def test_matrices_are_rounded_and_norms_routers_and_the_embedding_are_not(
    debug_model: Transformer, weight_format: str
) -> None:
    before = {name: value.clone() for name, value in debug_model.named_parameters()}
    use_weights_(debug_model, weight_format)
    same = {name for name, value in debug_model.named_parameters() if torch.equal(value, before[name])}
    assert same == {name for name in before if "norm" in name or "router" in name or name == "embed.weight"}
    for name, value in debug_model.named_parameters():
        unit = (before[name].abs() * UNITS.get(weight_format, 0)).clamp(min=SMALLEST)
        if weight_format == "int8":
            unit = before[name].abs().amax(dim=-1, keepdim=True) / 127 / 2
        assert ((value - before[name]).abs() <= unit * 1.0001).all(), name


def test_a_weight_too_large_for_fp16_is_a_clear_error(debug_model: Transformer) -> None:
    with torch.no_grad():
        debug_model.head.weight[0, 0] = 70000.0
    with pytest.raises(UserError, match=r"--weights fp16: a weight is larger than it can hold; use bf16"):
        use_weights_(debug_model, "fp16")


def test_an_unknown_format_lists_the_known_ones(debug_model: Transformer) -> None:
    with pytest.raises(UserError, match="--weights int4: choose one of fp32, bf16, fp16, int8"):
        use_weights_(debug_model, "int4")
