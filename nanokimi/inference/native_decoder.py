"""Decoding on a CPU with compiled kernels (nanokimi/native): a token costs what reading its weights and cache costs."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_void_p
from typing import Any, cast

import torch
from torch import Tensor, nn

from nanokimi.inference.decoder import PRODUCTS_PER_THREAD, ROW_ALIGNMENT, Decoder, extended, pack
from nanokimi.inference.options import WEIGHT_FORMATS
from nanokimi.model.attention import MLA
from nanokimi.model.cache import LatentCache
from nanokimi.model.layers import LATENT_EPS
from nanokimi.model.moe import MoE
from nanokimi.model.rope import softmax_scale
from nanokimi.model.transformer import Block, Transformer
from nanokimi.native import build

ROWS = 16  # tokens of one prompt that the kernels take at once, however few slots there are
MUCH = 16 * PRODUCTS_PER_THREAD  # in a step: above, waiting at barriers costs little beside the work between them
CONTEST = 64  # steps between two tries of the other choice
SHORT_PROMPT = 32  # tokens: up to here the kernels are quicker than the PyTorch model, which reads longer prompts


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


class NativeDecoder(Decoder):
    """Decodes from packed weights; one call at a time.

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
        super().__init__(model, slots, max_length)
        self._library = build.library()
        self._library.nanokimi_scratch_floats.restype = c_int64
        config = self._config = model.config
        self._kept: list[Any] = []  # memory that the kernels point into
        entry = _padded(config.kv_lora_rank) + _padded(config.qk_rope_head_dim)
        self._cache = torch.zeros(config.n_layers, slots, self.max_length, entry)
        self.slot_bytes = self._cache.nbytes // slots
        build.prefer_huge_pages(self._cache, filled=False)
        self._format = weights
        self._active, self._threads = model.num_parameters(active=True), _Threads()
        self._packed = self._pack_model(model)
        self._scratch = torch.empty(0)

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        self.check_room([slot], len(tokens))
        read = self._read_short if len(tokens) <= SHORT_PROMPT else self._read_long
        logits = read(slot, tokens)
        self.lengths[slot] += len(tokens)
        return logits

    def _read_short(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """With the kernels; to the bit as if each token were a step of its own."""
        held = self.lengths[slot]
        for first in range(0, len(tokens), ROWS):
            part = tokens[first : first + ROWS]
            logits = self._run([slot] * len(part), range(held + first, held + first + len(part)), part)
        return logits[-1]

    def _read_long(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """With the PyTorch model, whose cache entries are copied into the decoder's."""
        held = self.lengths[slot]
        cache = LatentCache(self._config, 1, held + len(tokens))
        cache.length = held
        # Latents and rotated keys [L, tokens, R or P]: those of the model's cache and, without padding, ours.
        widths = [self._config.kv_lora_rank, self._config.qk_rope_head_dim]
        ours = self._cache[:, slot, : cache.max_length].split([*map(_padded, widths)], dim=-1)
        theirs = cache.entries[:, 0].split(widths, dim=-1)
        pairs = [(one, other[..., : one.shape[-1]]) for one, other in zip(theirs, ours, strict=True)]
        for their, our in pairs:
            their[:, :held] = our[:, :held]
        logits: Tensor = self.model(torch.tensor([tokens]), cache=cache, last_only=True)
        for their, our in pairs:
            our[:, held:] = their[:, held:]
        return logits[0, -1]

    @torch.inference_mode()
    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        assert len(tokens) == len(slots) == len(set(slots)), "one token for each of different slots"
        self.check_room(slots)
        logits = self._run(slots, [self.lengths[slot] for slot in slots], tokens)
        for slot in slots:
            self.lengths[slot] += 1
        return logits

    def _run(self, slots: Sequence[int], positions: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Each token at its position of its slot; the logits after them, ``[n, vocab]``."""
        n, vocab_size = len(tokens), self._config.vocab_size
        assert all(0 <= token < vocab_size for token in tokens)
        logits = torch.empty(n, vocab_size)
        numbers = [(c_int64 * n)(*values) for values in (slots, positions, tokens)]
        addresses = [ctypes.addressof(array) for array in numbers]

        def compute(threads: int) -> None:
            call = _Call(n, *addresses, logits.data_ptr(), self._scratch_address(threads))
            self._library.nanokimi_step(byref(self._packed), byref(call), c_int(threads))

        self._threads.run(n * self._active, compute)
        return logits

    def _scratch_address(self, threads: int) -> int:
        """Of working memory for so many threads. It starts as zeros: padding must hold finite numbers."""
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
        return _Model(
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
            cache=self._cache.data_ptr(),
        )

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
        build.prefer_huge_pages(values)
        self._kept += (values, scale)
        return _Matrix(values.data_ptr(), None if scale is None else scale.data_ptr(), *values.shape)

    def _address(self, tensor: Tensor) -> int:
        kept = tensor.detach().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()


class _Threads:
    """Chooses how many threads a step takes, of those that PyTorch had when the decoder was made.

    A large step takes all of them. For a small one, one thread and all of them are both timed now and then and the
    quicker choice stays: threads that wait for each other often lose a lot when another program takes one of their
    cores. No result depends on the choice.
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
