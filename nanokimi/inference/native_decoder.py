"""Decoding on a CPU with compiled kernels (nanokimi/native): a token costs what reading its weights and cache costs."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from ctypes import byref, c_int, c_int64

import torch
from torch import Tensor

from nanokimi.inference.decoder import Decoder, extended
from nanokimi.model.cache import LatentCache
from nanokimi.model.transformer import Transformer
from nanokimi.native import build
from nanokimi.native.packed_model import Call, PackedModel, padded

PRODUCTS_PER_THREAD = 8_000_000  # multiply-adds: with fewer in a step a thread is not worth waking
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
    go through the PyTorch model, so its values should be those of the format (``use_weights_``).

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
        self._packed = PackedModel(
            model, slots=slots, max_length=self.max_length, rows=max(slots, ROWS), weight_format=weights
        )
        self.slot_bytes = self._packed.cache.nbytes // slots
        self._active, self._threads = model.num_parameters(active=True), _Threads()
        self._scratch = torch.empty(0)

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        self.check_room([slot], len(tokens))
        if len(tokens) > SHORT_PROMPT:
            logits = self._read_long(slot, tokens)
            self.lengths[slot] += len(tokens)
            return logits
        for first in range(0, len(tokens), ROWS):  # to the bit as if each token were a step of its own
            part, held = tokens[first : first + ROWS], self.lengths[slot]
            logits = self._run([slot] * len(part), range(held, held + len(part)), part)
            self.lengths[slot] += len(part)
        return logits[-1]

    def _read_long(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """With the PyTorch model, whose cache entries are copied into the decoder's."""
        held = self.lengths[slot]
        cache = LatentCache(self.model.config, 1, held + len(tokens))
        cache.advance(held)
        # Latents and rotated keys [L, tokens, R or P]: those of the model's cache and, without padding, ours.
        widths = self.model.config.cache_widths
        ours = self._packed.cache[:, slot, : cache.max_length].split([*map(padded, widths)], dim=-1)
        theirs = cache.entries[:, 0].split([*widths], dim=-1)
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
        n, vocab_size = len(tokens), self.model.config.vocab_size
        assert all(0 <= token < vocab_size for token in tokens)
        logits = torch.empty(n, vocab_size)
        numbers = [(c_int64 * n)(*values) for values in (slots, positions, tokens)]
        addresses = [ctypes.addressof(array) for array in numbers]

        def compute(threads: int) -> None:
            structure = byref(self._packed.structure)
            size = int(self._library.nanokimi_scratch_floats(structure, c_int(threads)))
            if self._scratch.numel() < size:
                self._scratch = torch.zeros(size)  # not empty: padding must hold finite numbers
            call = Call(n, *addresses, logits.data_ptr(), self._scratch.data_ptr())
            self._library.nanokimi_step(structure, byref(call), c_int(threads))

        self._threads.run(n * self._active, compute)
        return logits


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
        self._steps += 1
        size = products.bit_length()
        one_is_quicker = self._seconds.get((size, 1), 0.0) <= self._seconds.get((size, most), 0.0)
        threads = 1 if one_is_quicker != (self._steps % CONTEST == 0) else most
        started = time.perf_counter()
        compute(threads)
        seconds = time.perf_counter() - started
        self._seconds[size, threads] = 0.75 * self._seconds.get((size, threads), seconds) + 0.25 * seconds
