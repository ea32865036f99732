"""Decoding on a CPU with compiled kernels (nanokimi/native): a token costs what reading its weights and cache costs."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_void_p
from typing import Any, cast

import torch
from torch import Tensor, nn

from nanokimi.config import ModelConfig
from nanokimi.inference.decoder import PRODUCTS_PER_THREAD, extended, fitting_length
from nanokimi.inference.weights import ROW_ALIGNMENT, WEIGHT_FORMATS, pack
from nanokimi.model.attention import MLA, softmax_scale
from nanokimi.model.cache import LatentCache
from nanokimi.model.layers import LATENT_EPS
from nanokimi.model.moe import MoE
from nanokimi.model.transformer import Block, Transformer
from nanokimi.native import build
from nanokimi.native.huge_pages import prefer_huge_pages

ROWS = 16  # tokens of one prompt that the kernels take at once, however few slots there are
MUCH = 16 * PRODUCTS_PER_THREAD  # in a step: then threads meet seldom for what they do
CONTEST = 64  # steps between two tries of the other choice
SHORT_PROMPT = 32  # up to so many they are quicker than the PyTorch model, with which longer prompts are read


def supports(model: Transformer) -> str | None:
    """Why ``model`` cannot be decoded by compiled kernels, or None; whether they can be built is another question."""
    if model.config.attention != "mla":
        return f"the compiled kernels know mla alone, the attention of this model is {model.config.attention}"
    if reason := extended(model):
        return reason
    for parameter in model.parameters():
        if parameter.device.type != "cpu":
            return f"the compiled kernels run on a CPU, the model is on {parameter.device}"
        if parameter.dtype != torch.float32:
            return f"the compiled kernels read fp32 models, this one is in {str(parameter.dtype).partition('.')[2]}"
    return None


class NativeDecoder:
    """A ``Decoder`` (see ``decoder``) over packed weights; one call at a time.

    Matrices are packed once, in the format ``weights``. In fp32 they stay in the model's own memory where their rows
    are multiples of ``ROW_ALIGNMENT``, and training on would change them. Prompts of more than ``SHORT_PROMPT`` tokens
    go through the PyTorch model, so its values should be those of the format (``round_weights_``).

    A slot's logits depend on its own tokens alone, to the bit: not on the batch, the slot or the number of threads.

    Raises:
        RunError: the kernels cannot be built.
    """

    def __init__(
        self, model: Transformer, *, slots: int = 1, max_length: int | None = None, weights: str = "fp32"
    ) -> None:
        self._library = build.library()
        self._library.nanokimi_scratch_floats.restype = c_int64
        config = self._config = model.config
        self.model = model
        self.slots, self.max_length = slots, fitting_length(model, max_length)
        self.lengths = [0] * slots
        self._kept: list[Any] = []  # memory that the kernels point into
        entry = _padded(config.kv_lora_rank) + _padded(config.qk_rope_head_dim)
        self._cache = torch.zeros(config.n_layers, slots, self.max_length, entry)
        self.slot_bytes = self._cache.nbytes // slots
        prefer_huge_pages(self._cache, filled=False)
        self._format = weights
        self._active, self._threads = model.num_parameters(active=True), _Threads()
        self._packed = self._pack_model(model)
        self._scratch = torch.empty(0)

    def reset(self, slot: int) -> None:
        """See ``Decoder``."""
        self.lengths[slot] = 0

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """See ``Decoder``."""
        self._check_room(slot, len(tokens))
        read = self._read_short if len(tokens) <= SHORT_PROMPT else self._read_long
        logits = read(slot, tokens)
        self.lengths[slot] += len(tokens)
        return logits

    def _read_short(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """By the kernels; to the bit as if each token were a step of its own."""
        held = self.lengths[slot]
        for first in range(0, len(tokens), ROWS):
            part = tokens[first : first + ROWS]
            logits = self._run([slot] * len(part), range(held + first, held + first + len(part)), part)
        return logits[-1]

    def _read_long(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """By the PyTorch model."""
        held = self.lengths[slot]
        cache = LatentCache(self._config, 1, held + len(tokens))
        cache.advance(held)
        pairs = self._parts_beside(cache, slot)
        for theirs, ours in pairs:
            theirs[:, :held] = ours[:, :held]
        logits: Tensor = self.model(torch.tensor([tokens]), cache=cache, last_only=True)
        for theirs, ours in pairs:
            ours[:, held:] = theirs[:, held:]
        return logits[0, -1]

    def _parts_beside(self, cache: LatentCache, slot: int) -> list[tuple[Tensor, Tensor]]:
        """Latents and rotated keys ``[L, max_length, R or P]``: those of ``cache`` and, unpadded, ours."""
        widths = [self._config.kv_lora_rank, self._config.qk_rope_head_dim]
        ours = self._cache[:, slot, : cache.max_length].split([*map(_padded, widths)], dim=-1)
        theirs = cache.entries[:, 0].split(widths, dim=-1)
        return [(one, other[..., : one.shape[-1]]) for one, other in zip(theirs, ours, strict=True)]

    @torch.inference_mode()
    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """See ``Decoder``."""
        assert len(tokens) == len(slots) == len(set(slots)), "one token for each of different slots"
        for slot in slots:
            self._check_room(slot, 1)
        logits = self._run(slots, [self.lengths[slot] for slot in slots], tokens)
        for slot in slots:
            self.lengths[slot] += 1
        return logits

    def _run(self, slots: Sequence[int], positions: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Each token at its position of its slot; the logits behind them, ``[n, vocab]``."""
        n, vocab_size = len(tokens), self._config.vocab_size
        assert all(0 <= token < vocab_size for token in tokens)
        logits = torch.empty(n, vocab_size)
        numbers = [(c_int64 * n)(*values) for values in (slots, positions, tokens)]
        addresses = [ctypes.addressof(array) for array in numbers]

        def compute(threads: int) -> None:
            call = _Call(n, *addresses, logits.data_ptr(), self._room(threads))
            self._library.nanokimi_step(byref(self._packed), byref(call), c_int(threads))

        self._threads.run(n * self._active, compute)
        return logits

    def _check_room(self, slot: int, tokens: int) -> None:
        if (end := self.lengths[slot] + tokens) > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, {end} are needed")

    def _room(self, threads: int) -> int:
        """Address of working memory for so many threads, zeroed when it was made."""
        size = int(self._library.nanokimi_scratch_floats(byref(self._packed), c_int(threads)))
        if self._scratch.numel() < size:
            self._scratch = torch.zeros(size)
        return self._scratch.data_ptr()

    # ---- packing: the structures of nanokimi/native/model.h

    def _pack_model(self, model: Transformer) -> _Model:
        config = model.config
        layers = (_Layer * config.n_layers)(*map(self._pack_layer, model.blocks()))
        self._kept.append(layers)
        shared = config.n_shared_experts * config.moe_inter_dim if config.n_moe_layers else 0
        packed = _Model(
            format=WEIGHT_FORMATS.index(self._format),
            slots=self.slots,
            max_length=self.max_length,
            rows=max(self.slots, ROWS),
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
            routing=_routing(config),
            norm_eps=config.norm_eps,
            latent_eps=LATENT_EPS,
            softmax_scale=softmax_scale(config),
            head=self._matrix(model.head.weight),
            layer=layers,
            cache=self._cache.data_ptr(),
        )
        for name, tensor in (
            ("embed", model.embed.weight),
            ("cos", model.cos),
            ("sin", model.sin),
            ("norm", model.norm.weight),
        ):
            setattr(packed, name, self._address(tensor))
        return packed

    def _pack_layer(self, block: Block) -> _Layer:
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


class _Threads:
    """How many threads a step takes, of those that PyTorch had when the decoder was made. No result depends on it.

    Where there is much to do, all of them. Where there is little, one is held against all of them now and then, and the
    quicker choice stays: threads that meet often lose a lot when another program takes one of their cores.
    """

    def __init__(self) -> None:
        self._most = torch.get_num_threads()
        self._seconds: dict[tuple[int, int], float] = {}  # of a step, by its size and threads
        self._steps = 0

    def run(self, products: int, compute: Callable[[int], None]) -> None:
        """Calls ``compute`` with a number of threads, for a step of so many multiply-adds."""
        most = min(self._most, products // PRODUCTS_PER_THREAD)
        if most <= 1 or products > MUCH:
            return compute(max(1, most))
        size = products.bit_length()
        threads = self._choice(size, most)
        started = time.perf_counter()
        compute(threads)
        seconds, key = time.perf_counter() - started, (size, threads)
        self._seconds[key] = 0.75 * self._seconds.get(key, seconds) + 0.25 * seconds

    def _choice(self, size: int, most: int) -> int:
        self._steps += 1
        one, all_of_them = (self._seconds.get((size, threads), 0.0) for threads in (1, most))
        one_is_quicker = one <= all_of_them
        return 1 if one_is_quicker != (self._steps % CONTEST == 0) else most


def _routing(config: ModelConfig) -> _Routing:
    return _Routing(
        experts=config.n_routed_experts,
        chosen=config.n_activated_experts,
        groups=config.n_expert_groups,
        limited_groups=config.n_limited_groups,
        sigmoid=config.score_func == "sigmoid",
        normalise=config.norm_topk_prob,
        route_scale=config.route_scale,
    )


def _padded(width: int) -> int:
    return -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT


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


class _Call(Structure):
    _fields_ = (("n", c_int64), *((name, c_void_p) for name in ("slots", "positions", "tokens", "logits", "scratch")))
