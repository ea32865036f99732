"""A model as the compiled kernels read it: packed matrices, and the structures of model.h that point to them."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanokimi.memory import lazy_zeros
from nanokimi.model.attention import MLA, softmax_scale
from nanokimi.model.layers import LATENT_EPS
from nanokimi.model.moe import MoE
from nanokimi.model.transformer import Block, Transformer
from nanokimi.native import WEIGHT_FORMATS
from nanokimi.native.build import prefer_huge_pages

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROW_ALIGNMENT = 16  # elements: PAD in simd.h
_LARGEST_INT8 = 127
_CACHE_LINE = 64  # bytes: vectors that straddle two of them load at half the speed


def padded(width: int) -> int:
    """``width`` rounded up to a multiple of ``ROW_ALIGNMENT``."""
    return -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127, in floating point, and the scale of each row ``[...]``."""
    scale = weight.abs().amax(dim=-1) / _LARGEST_INT8
    return (weight / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round(), scale


@torch.no_grad()
def pack(weight: Tensor, weight_format: str) -> tuple[Tensor, Tensor | None]:
    """A matrix as the native decoder reads it, from ``weight`` ``[..., out, in]`` in fp32.

    In fp32 with rows of a suitable length the values are the weight's own memory, not a copy.

    Returns:
        ``values [rows, in]`` in the format, all leading dimensions flattened to rows, and ``in`` padded with zeros to
        a multiple of ``ROW_ALIGNMENT``; ``scale [rows]`` in fp32, for int8 only.
    """
    rows = weight.detach().flatten(0, -2)
    scale = None
    if weight_format == "int8":
        whole, scale = quantised(rows)
        rows = whole.to(torch.int8)
    elif weight_format != "fp32":
        rows = rows.to(HALVES[weight_format])
    missing = padded(rows.shape[1]) - rows.shape[1]
    rows = (F.pad(rows, (0, missing)) if missing else rows).contiguous()
    return rows.clone() if rows.data_ptr() % _CACHE_LINE else rows, scale


class _Matrix(Structure):
    _fields_ = (("data", c_void_p), ("scale", c_void_p), ("rows", c_int64), ("cols", c_int64))


class _Mlp(Structure):
    _fields_ = tuple((name, _Matrix) for name in ("w1", "w2", "w3"))


class _Layer(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("attention_norm", "q_norm", "kv_norm", "mlp_norm")),
        *((name, _Matrix) for name in ("wq_a", "wq_b", "wkv_a", "wkv_b", "wo")),
        ("dense", _Mlp),
        ("experts", _Mlp),
        ("router", _Matrix),
        ("balance_bias", c_void_p),
    )


class _Routing(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("experts", "chosen", "groups", "limited_groups", "sigmoid", "normalise")),
        ("route_scale", c_float),
    )


class _Model(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("format", "slots", "max_length", "rows")),
        *((name, c_int64) for name in ("dim", "heads", "nope", "rope", "value", "rank", "query_rank")),
        *((name, c_int64) for name in ("dense_width", "expert_width", "layers")),
        ("routing", _Routing),
        *((name, c_float) for name in ("norm_eps", "latent_eps", "softmax_scale")),
        *((name, c_void_p) for name in ("embed", "cos", "sin", "norm")),
        ("head", _Matrix),
        ("layer", POINTER(_Layer)),
        ("cache", c_void_p),
    )


class Call(Structure):
    _fields_ = (("n", c_int64), *((name, c_void_p) for name in ("slots", "positions", "tokens", "logits", "scratch")))


class PackedModel:
    """A model packed in one format, and all the memory that the kernels point into.

    Args:
        rows: most tokens of a call.

    Attributes:
        structure: what the kernels are given.
        cache: ``[L, slots, max_length, padded R + padded P]`` in fp32: normalised latents and rotated keys.
    """

    def __init__(self, model: Transformer, *, slots: int, max_length: int, rows: int, weight_format: str) -> None:
        config = self._config = model.config
        self._format = weight_format
        self._kept: list[Any] = []
        entry = padded(config.kv_lora_rank) + padded(config.qk_rope_head_dim)
        self.cache = lazy_zeros((config.n_layers, slots, max_length, entry), torch.float32)
        prefer_huge_pages(self.cache, filled=False)
        layers = (_Layer * config.n_layers)(*map(self._layer, model.blocks()))
        self._kept.append(layers)
        shared = config.n_shared_experts * config.moe_inter_dim if config.n_moe_layers else 0
        self.structure = _Model(
            format=WEIGHT_FORMATS.index(weight_format),
            slots=slots,
            max_length=max_length,
            rows=rows,
            dim=config.dim,
            heads=config.n_heads,
            nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim,
            value=config.v_head_dim,
            rank=config.kv_lora_rank,
            query_rank=config.q_lora_rank,
            dense_width=max(shared, config.inter_dim if config.n_dense_layers else 0),
            expert_width=config.moe_inter_dim,
            layers=config.n_layers,
            routing=_Routing(
                experts=config.n_routed_experts,
                chosen=config.n_activated_experts,
                groups=config.n_expert_groups,
                limited_groups=config.n_limited_groups,
                sigmoid=config.score_func == "sigmoid",
                normalise=config.norm_topk_prob,
                route_scale=config.route_scale,
            ),
            norm_eps=config.norm_eps,
            latent_eps=LATENT_EPS,
            softmax_scale=softmax_scale(config),
            embed=self._address(model.embed.weight),
            cos=self._address(model.cos),
            sin=self._address(model.sin),
            norm=self._address(model.norm.weight),
            head=self._matrix(model.head.weight),
            layer=layers,
            cache=self.cache.data_ptr(),
        )

    def _layer(self, block: Block) -> _Layer:
        attention, mlp = cast(MLA, block.attention), block.mlp
        layer = _Layer(
            attention_norm=self._address(block.attention_norm.weight),
            kv_norm=self._address(attention.kv_norm.weight),
            mlp_norm=self._address(block.mlp_norm.weight),
            wkv_a=self._matrix(attention.wkv_a.weight),
            wkv_b=self._matrix(attention.wkv_b.weight),
            wo=self._matrix(attention.wo.weight),
        )
        if self._config.q_lora_rank:
            layer.q_norm = self._address(attention.q_norm.weight)
            layer.wq_a, layer.wq_b = self._matrix(attention.wq_a.weight), self._matrix(attention.wq_b.weight)
        else:
            layer.wq_b = self._matrix(attention.wq.weight)
        dense = mlp.shared if isinstance(mlp, MoE) else mlp
        if dense is not None:
            layer.dense = _Mlp(*(self._matrix(linear.weight) for linear in (dense.w1, dense.w2, dense.w3)))
        if isinstance(mlp, MoE):
            layer.experts = _Mlp(*map(self._matrix, (mlp.experts.w1, mlp.experts.w2, mlp.experts.w3)))
            layer.router = self._matrix(mlp.router.weight, "fp32")
            layer.balance_bias = self._address(mlp.router.balance_bias)
        return layer

    def _matrix(self, weight: nn.Parameter, weight_format: str | None = None) -> _Matrix:
        values, scale = pack(weight, weight_format or self._format)
        prefer_huge_pages(values)
        self._kept += (values, scale)
        return _Matrix(values.data_ptr(), None if scale is None else scale.data_ptr(), *values.shape)

    def _address(self, tensor: Tensor) -> int:
        kept = tensor.detach().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()
