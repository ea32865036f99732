from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanokimi.errors import UserError
from nanokimi.inference.decoder import WEIGHT_FORMATS, pack, round_weights_
from nanokimi.model.transformer import Transformer

UNITS = {"bf16": 2.0**-8, "fp16": 2.0**-11}  # half a unit of the last place of 1.0
SMALLEST = 2.0**-25  # half of the smallest number of fp16


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_rounding_twice_is_rounding_once(debug_model: Transformer, weight_format: str) -> None:
    round_weights_(debug_model, weight_format)
    once = {name: value.clone() for name, value in debug_model.state_dict().items()}
    round_weights_(debug_model, weight_format)
    for name, value in debug_model.state_dict().items():
        torch.testing.assert_close(value, once[name], rtol=3e-7, atol=0)


@pytest.mark.parametrize("weight_format", ["bf16", "fp16", "int8"])
def test_matrices_are_rounded_and_norms_routers_and_the_embedding_are_not(
    debug_model: Transformer, weight_format: str
) -> None:
    before = {name: value.clone() for name, value in debug_model.named_parameters()}
    round_weights_(debug_model, weight_format)
    same = {name for name, value in debug_model.named_parameters() if torch.equal(value, before[name])}
    assert same == {name for name in before if "norm" in name or "router" in name or name == "embed.weight"}
    for name, value in debug_model.named_parameters():
        unit = (before[name].abs() * UNITS.get(weight_format, 0)).clamp(min=SMALLEST)
        if weight_format == "int8":
            unit = before[name].abs().amax(dim=-1, keepdim=True) / 127 / 2
        assert ((value - before[name]).abs() <= unit * 1.0001).all(), name


def test_int8_holds_every_row_at_its_own_scale() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-6, 3e-6, -1.27e-4]])
    values, scale = pack(weight, "int8")
    assert scale is not None
    assert values.dtype == torch.int8
    assert values[:, :3].tolist() == [[64, -127, 32], [0, 0, 0], [1, 3, -127]]
    torch.testing.assert_close(scale, torch.tensor([2 / 127, 0.0, 1e-6]))


def unpacked(weight: Tensor, weight_format: str) -> Tensor:
    values, scale = pack(weight, weight_format)
    rows = values[:, : weight.shape[-1]].float()
    return rows if scale is None else rows * scale.unsqueeze(-1)


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_a_rounded_matrix_is_packed_without_loss(debug_model: Transformer, weight_format: str) -> None:
    round_weights_(debug_model, weight_format)
    weight = debug_model.moe_layers()[0].experts.w1
    torch.testing.assert_close(unpacked(weight, weight_format), weight.flatten(0, 1), rtol=3e-7, atol=0)


def test_rows_are_padded_with_zeros_to_whole_vectors() -> None:
    values, _ = pack(torch.ones(3, 17), "bf16")
    assert values.shape == (3, 32)
    assert values[:, 17:].abs().sum() == 0


def test_weights_that_lie_between_cache_lines_are_moved() -> None:
    weight = torch.randn(2 * 16 + 1)[1:].view(2, 16)
    values, _ = pack(weight, "fp32")
    assert values.data_ptr() % 64 == 0
    assert torch.equal(values, weight)


def test_a_weight_too_large_for_fp16_is_a_clear_error(debug_model: Transformer) -> None:
    with torch.no_grad():
        debug_model.head.weight[0, 0] = 70000.0
    with pytest.raises(UserError, match=r"--weights fp16: a weight is larger than it can hold; use bf16"):
        round_weights_(debug_model, "fp16")


def test_an_unknown_format_lists_the_known_ones(debug_model: Transformer) -> None:
    with pytest.raises(UserError, match="--weights int4: choose one of fp32, bf16, fp16, int8"):
        round_weights_(debug_model, "int4")
