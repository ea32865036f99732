from __future__ import annotations

import math

import pytest
import torch

from nanokimi.errors import UserError
from nanokimi.inference.sampling import SamplingParams, new_generator, probabilities, sample, sample_each
from nanokimi.inference.settings import Settings

LOGITS = torch.tensor([2.0, -1.0, 3.5, 0.5, 3.0, -4.0, 1.0, 2.9])


def brute_force(logits: list[float], params: SamplingParams) -> list[float]:
    """The definition, one token at a time in plain Python: temperature, top-k, top-p, min-p."""
    weights = {i: math.exp(x / params.temperature) for i, x in enumerate(logits)}
    kept = sorted(weights, key=lambda i: (-weights[i], i))[: params.top_k or None]
    total, nucleus, mass = sum(weights[i] for i in kept), [], 0.0
    for i in kept:
        if params.top_p == 1 or mass < params.top_p:
            nucleus.append(i)
        mass += weights[i] / total
    kept = [i for i in nucleus if weights[i] >= params.min_p * weights[nucleus[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in weights]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 4, 100])
@pytest.mark.parametrize("top_p", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.3])
def test_distribution_equals_the_definition(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = torch.tensor(brute_force(LOGITS.tolist(), params))
    torch.testing.assert_close(probabilities(LOGITS, params), expected, atol=1e-6, rtol=1e-5)


def test_draws_follow_the_distribution() -> None:
    params = SamplingParams(temperature=1.3, top_k=6, top_p=0.95)
    draws = sample(LOGITS.expand(20000, -1), params, new_generator(0, "cpu"))
    frequencies = torch.bincount(draws, minlength=8) / 20000
    torch.testing.assert_close(frequencies, probabilities(LOGITS, params), atol=0.015, rtol=0)
    assert (frequencies[probabilities(LOGITS, params) == 0] == 0).all()


def test_rows_of_a_batch_are_filtered_each_by_itself() -> None:
    params = SamplingParams(top_k=3, top_p=0.8)
    rows = torch.stack((LOGITS, LOGITS.flip(0)))
    torch.testing.assert_close(probabilities(rows, params), torch.stack([probabilities(row, params) for row in rows]))
    assert sample(rows, params, new_generator(0, "cpu")).shape == (2,)


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 4.0])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 0.9, 0.0), (0, 0.5, 0.1), (30, 1.0, 0.0), (700, 0.8, 0.0)])
def test_a_row_of_many_logits_is_filtered_as_if_all_were_sorted(
    spread: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Some nuclei are wider than all of ``CANDIDATES``, and rounded logits have ties everywhere."""
    params = SamplingParams(temperature=0.9, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = (torch.randn(9000) * spread).bfloat16()
    alone, in_a_batch = probabilities(logits, params), probabilities(logits[None], params)[0]
    assert torch.equal(alone > 0, in_a_batch > 0)
    torch.testing.assert_close(alone, in_a_batch)


def test_rows_with_generators_of_their_own_are_drawn_as_each_is_alone() -> None:
    rows = torch.randn(3, 600)
    for params in (SamplingParams(), SamplingParams(temperature=0.0)):
        together = sample_each(rows, params, [new_generator(seed, "cpu") for seed in (5, 6, 5)], vocab_size=500)
        alone = [
            sample(row, params, new_generator(seed, "cpu"), vocab_size=500)
            for row, seed in zip(rows, (5, 6, 5), strict=True)
        ]
        assert together.tolist() == torch.stack(alone).tolist()


def test_temperature_zero_is_greedy() -> None:
    """Fault 70."""
    assert sample(LOGITS, SamplingParams(temperature=0.0)) == 2


def test_top_p_zero_is_greedy_and_one_is_off() -> None:
    """Fault 72."""
    assert sample(LOGITS, SamplingParams(top_p=0.0)) == 2
    torch.testing.assert_close(probabilities(LOGITS, SamplingParams(top_p=1.0)), LOGITS.softmax(-1))


def test_a_tie_goes_to_the_lowest_id() -> None:
    tied = torch.tensor([0.0] + [5.0] * 999)
    assert sample(tied, SamplingParams(temperature=0.0)) == 1
    kept = probabilities(tied, SamplingParams(top_k=20, top_p=1.0)).nonzero()
    assert kept.flatten().tolist() == list(range(1, 21))


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-300])
def test_a_tiny_temperature_approaches_greedy_without_nan(temperature: float) -> None:
    probs = probabilities(LOGITS * 1e3, SamplingParams(temperature=temperature))
    assert probs.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


def test_half_precision_logits_are_sampled_in_fp32() -> None:
    assert probabilities(LOGITS.bfloat16(), SamplingParams()).dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_of_the_vocabulary_is_never_drawn(temperature: float) -> None:
    logits = torch.cat((LOGITS, torch.full((4,), 50.0))).expand(200, -1)
    params = SamplingParams(temperature=temperature, top_p=1.0)
    assert sample(logits, params, new_generator(0, "cpu"), vocab_size=8).max() < 8


def test_a_seed_repeats_and_none_does_not() -> None:
    def draw(seed: int | None) -> list[int]:
        return sample(torch.zeros(64, 1000), SamplingParams(), new_generator(seed, "cpu")).tolist()

    assert draw(7) == draw(7) != draw(8)
    assert draw(None) != draw(None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("seed", -1),
        ("seed", 2**63),
        ("max_tokens", -1),
        ("stop", ("",)),
    ],
)
def test_a_value_out_of_range_names_its_flag_in_one_line(name: str, value: object) -> None:
    """Faults 71, 72 and 76."""
    with pytest.raises(UserError, match=rf"^--{name} must [^\n]*$"):
        Settings(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("top_k", "40", 40),
        ("seed", "7", 7),
        ("seed", "none", None),
        ("stop", r"\n\n", ("\n\n",)),
        ("stop", "", ()),
    ],
)
def test_a_setting_is_read_from_text(name: str, text: str, value: object) -> None:
    settings = Settings(seed=1, stop=("x",)).with_value(name, text)
    assert getattr(settings, name) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("temprature", "1", "unknown setting 'temprature': did you mean temperature\\?"),
        ("zzz", "1", "unknown setting 'zzz': choose temperature, top_k, .*"),
        ("max_tokens", "many", "max_tokens takes a whole number, got 'many'"),
        ("temperature", "-1", "--temperature must be .*"),
    ],
)
def test_a_setting_that_cannot_be_read_says_why(name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        Settings().with_value(name, text)
