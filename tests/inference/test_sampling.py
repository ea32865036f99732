from __future__ import annotations

import math

import pytest
import torch

from nanokimi.errors import UserError
from nanokimi.inference.options import SamplingOptions
from nanokimi.inference.sampling import _weights, draw, log_probabilities

LOGITS = torch.tensor([2.0, -1.0, 3.5, 0.5, 3.0, -4.0, 1.0, 2.9])


def probabilities(logits: torch.Tensor, params: SamplingOptions) -> torch.Tensor:
    """What ``draw`` draws a row from, and what a greedy row is: all on one token."""
    if params.greedy:
        return torch.zeros_like(logits).index_fill(0, torch.tensor(draw(logits[None], [params], [0.0])), 1.0)
    (weights,) = _weights(logits[None], [params])
    return (weights / weights.sum()).float()


def brute_force(logits: list[float], params: SamplingOptions) -> list[float]:
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
    params = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = torch.tensor(brute_force(LOGITS.tolist(), params))
    torch.testing.assert_close(probabilities(LOGITS, params), expected, atol=1e-6, rtol=1e-5)


def draws(logits: torch.Tensor, params: SamplingOptions, n: int = 20000) -> torch.Tensor:
    """``n`` draws from one row, with random numbers spread evenly."""
    return torch.tensor(draw(logits.expand(n, -1), [params] * n, [(i + 0.5) / n for i in range(n)]))


def test_draws_follow_the_distribution() -> None:
    params = SamplingOptions(temperature=1.3, top_k=6, top_p=0.95)
    frequencies = torch.bincount(draws(LOGITS, params), minlength=8) / 20000
    torch.testing.assert_close(frequencies, probabilities(LOGITS, params), atol=1e-4, rtol=0)
    assert (frequencies[probabilities(LOGITS, params) == 0] == 0).all()


def test_the_ends_of_the_random_numbers_give_the_first_and_the_last_token_that_is_kept() -> None:
    params = SamplingOptions(top_k=3, top_p=1.0)
    kept = probabilities(LOGITS, params).nonzero().flatten().tolist()
    assert draw(LOGITS.expand(2, -1), [params] * 2, [0.0, math.nextafter(1.0, 0.0)]) == [kept[0], kept[-1]]


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 4.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 0.9001, 0.0), (0, 0.5001, 0.1), (30, 1.0, 0.0), (700, 0.8001, 0.0)]
)
def test_a_row_of_many_logits_is_filtered_as_the_definition_says(
    spread: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Rounded logits have ties everywhere; no sum of probabilities comes near the edge of a nucleus."""
    params = SamplingOptions(temperature=0.9, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = (torch.randn(3000) * spread).bfloat16()
    expected = torch.tensor(brute_force(logits.tolist(), params))
    found = probabilities(logits, params)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected)


def test_each_row_is_drawn_by_its_own_choices_as_it_is_alone() -> None:
    torch.manual_seed(3)
    for vocab in (600, 40000):
        rows = torch.randn(6, vocab)
        params = [
            SamplingOptions(temperature=0.7),
            SamplingOptions(temperature=0.0),
            SamplingOptions(top_p=1.0),
            SamplingOptions(top_k=5, top_p=1.0),
            SamplingOptions(min_p=0.2),
            SamplingOptions(top_p=0.0),
        ]
        for uniforms in ([0.1] * 6, [0.3, 0.9, 0.5, 0.77, 0.2, 0.6]):
            together = draw(rows, params, uniforms)
            alone = [draw(rows[i : i + 1], [params[i]], [uniforms[i]])[0] for i in range(6)]
            assert together == alone


def test_log_probabilities_are_the_models_own_and_the_likeliest_come_first() -> None:
    rows = torch.stack((LOGITS, LOGITS.flip(0), LOGITS))
    expected = rows.log_softmax(-1)
    first, second, none = log_probabilities(rows, [1, 5, 0], [3, 0, None])
    assert first is not None
    assert second == (pytest.approx(float(expected[1, 5])), ())
    assert none is None
    assert first[0] == pytest.approx(float(expected[0, 1]))
    assert [token for token, _ in first[1]] == [2, 4, 7]
    assert [value for _, value in first[1]] == pytest.approx(expected[0, [2, 4, 7]].tolist())


@pytest.mark.fault(70)
def test_temperature_zero_is_greedy() -> None:
    assert draw(LOGITS[None], [SamplingOptions(temperature=0.0)], [0.99]) == [2]


@pytest.mark.fault(72)
def test_top_p_zero_is_greedy_and_one_is_off() -> None:
    assert draw(LOGITS[None], [SamplingOptions(top_p=0.0)], [0.99]) == [2]
    torch.testing.assert_close(probabilities(LOGITS, SamplingOptions(top_p=1.0)), LOGITS.softmax(-1))


def test_a_tie_goes_to_the_lowest_id() -> None:
    tied = torch.tensor([0.0] + [5.0] * 999)
    assert draw(tied[None], [SamplingOptions(temperature=0.0)], [0.99]) == [1]
    kept = probabilities(tied, SamplingOptions(top_k=20, top_p=1.0)).nonzero()
    assert kept.flatten().tolist() == list(range(1, 21))


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-300])
def test_a_tiny_temperature_approaches_greedy_without_nan(temperature: float) -> None:
    probs = probabilities(LOGITS * 1e3, SamplingOptions(temperature=temperature))
    assert probs.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


def test_half_precision_logits_are_sampled_in_fp32() -> None:
    assert probabilities(LOGITS.bfloat16(), SamplingOptions()).dtype == torch.float32


@pytest.mark.fault(71, 72, 76)
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
    with pytest.raises(UserError, match=rf"^--{name} must [^\n]*$"):
        SamplingOptions(**{name: value})  # type: ignore[arg-type]


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
    settings = SamplingOptions(seed=1, stop=("x",)).with_value(name, text)
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
        SamplingOptions().with_value(name, text)
