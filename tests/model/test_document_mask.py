"""Attention within documents: what is packed into one sequence is as if each document stood alone."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import lively
from torch import Tensor
from torch.nn import functional as F

from nanokimi.config import ModelConfig
from nanokimi.data.batch import document_numbers
from nanokimi.memory import process_memory
from nanokimi.model.transformer import Transformer
from nanokimi.ops.attention import (
    ROW_ALIGNMENT,
    _cuda_kernel,
    _fused_kernel,
    causal_attention,
    document_mask,
    largest_logits,
    reference_attention,
)

EOT = 256
LONG = 4000  # positions whose bias is large beside all else of a pass
LAYOUTS = ((9, 1, 17, 5), (2, 20, 10))  # documents of the two sequences; their lengths differ, the sums do not
VARIANTS: list[dict[str, Any]] = [
    {},
    {"q_lora_rank": 0, "n_dense_layers": 0, "v_head_dim": 12},
    {"n_expert_groups": 4, "n_limited_groups": 2, "score_func": "softmax", "v_head_dim": 24},
]


def packed_tokens() -> tuple[Tensor, Tensor]:
    """Inputs and labels ``[2, T]``: the documents of ``LAYOUTS``, each with its end-of-text token."""
    rows = [torch.cat([F.pad(torch.randint(0, 256, (n - 1,)), (0, 1), value=EOT) for n in row]) for row in LAYOUTS]
    tokens = F.pad(torch.stack(rows), (0, 1), value=7)
    return tokens[:, :-1], tokens[:, 1:]


def documents_of() -> list[tuple[int, slice]]:
    """Sequence and positions of each document of ``LAYOUTS``."""
    starts = [[sum(row[:i]) for i in range(len(row))] for row in LAYOUTS]
    return [(b, slice(s, s + n)) for b, row in enumerate(LAYOUTS) for s, n in zip(starts[b], row, strict=True)]


def random_documents(length: int) -> Tensor:
    """Numbers ``[2, length]`` of a few documents."""
    return (torch.rand(2, length) < 4 / length).long().cumsum(-1)


def heads(length: int, *widths: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    return [torch.randn(2, 3, length, w, dtype=dtype, device=device, requires_grad=True) for w in widths]


def visible_logits(q: Tensor, k: Tensor, scale: float, documents: Tensor) -> Tensor:
    """From the definition: pair by pair, -inf where position t does not see s."""
    logits = torch.full((*q.shape[:3], k.shape[2]), -torch.inf, dtype=q.dtype)
    for b in range(q.shape[0]):
        for t in range(q.shape[2]):
            for s in range(t + 1):
                if documents[b, t] == documents[b, s]:
                    logits[b, :, t, s] = (q[b, :, t] * k[b, :, s]).sum(-1) * scale
    return logits


def exact_positions(model: Transformer) -> Transformer:
    """The model in fp64, rotary tables too: rounded in fp32, rotations depend on more than distances."""
    model.double()
    c = model.config
    width = torch.arange(0, c.qk_rope_head_dim, 2, dtype=torch.float64) / c.qk_rope_head_dim
    angles = torch.outer(torch.arange(c.max_seq_length, dtype=torch.float64), c.rope_theta**-width)
    model.cos.copy_(angles.cos())
    model.sin.copy_(angles.sin())
    return model


def nats_and_gradients(model: Transformer, parts: list[tuple[Tensor, Tensor, Tensor | None]]) -> list[Tensor]:
    """Summed cross-entropy of ``(tokens, labels, documents)`` and its gradient with respect to every parameter.

    The balance loss stays out: it is a statistic of whole sequences, whatever attention sees.
    """
    model.zero_grad()
    losses = [model(tokens, labels, documents=documents, label_count=1) for tokens, labels, documents in parts]
    nats = torch.stack([loss.cross_entropy for loss in losses]).sum()
    nats.backward()
    return [nats.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_an_end_of_text_token_belongs_to_the_document_that_it_ends() -> None:
    tokens = torch.tensor([[5, 9, 9, 5, 5, 9], [9, 5, 5, 5, 5, 5]])
    assert document_numbers(tokens, 9).tolist() == [[0, 0, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1]]
    assert document_numbers(tokens, 8).tolist() == [[0] * 6] * 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
def test_packed_documents_give_the_logits_losses_and_gradients_of_each_alone(
    variant: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    model = lively(Transformer(ModelConfig.preset("debug", **variant)), std=0.15)
    if dtype == torch.float64:
        exact_positions(model)
    tokens, labels = packed_tokens()
    documents = document_numbers(tokens, EOT)
    with torch.no_grad():
        packed = model.head(model.hidden_states(tokens, documents=documents))
        for b, at in documents_of():
            torch.testing.assert_close(packed[b, at], model(tokens[b : b + 1, at])[0], rtol=0, atol=tolerance)

    together = nats_and_gradients(model, [(tokens, labels, documents)])
    alone = nats_and_gradients(
        model, [(tokens[b : b + 1, at], labels[b : b + 1, at], None) for b, at in documents_of()]
    )
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


def test_without_the_mask_documents_do_see_one_another(debug_model: Transformer) -> None:
    tokens, _ = packed_tokens()
    with torch.no_grad():
        masked = debug_model.hidden_states(tokens, documents=document_numbers(tokens, EOT))
        difference = (debug_model.hidden_states(tokens) - masked).abs().amax(dim=-1)
    assert float(difference[0, LAYOUTS[0][0] :].min()) > 1e-3
    assert float(difference[0, : LAYOUTS[0][0]].max()) < 2e-5


def test_changing_a_document_changes_nothing_at_all_in_the_others() -> None:
    model = lively(Transformer(ModelConfig.preset("debug", n_dense_layers=3)))  # MoE batches depend on what is chosen
    tokens, _ = packed_tokens()
    changed = tokens.clone()
    changed[0, 10:20] = (changed[0, 10:20] + 1) % 256
    documents = document_numbers(tokens, EOT)
    with torch.no_grad():
        before, after = (model.hidden_states(x, documents=documents) for x in (tokens, changed))
    same = (before == after).all(dim=-1)
    others = documents != documents[0, 10]
    others[1] = True
    assert bool(same[others].all())
    assert not bool(same[0, 10:27].any())


def test_no_gradient_crosses_into_another_document() -> None:
    q, k, v = heads(600, 16, 16, 16)
    documents = random_documents(600)
    own = (documents == 1)[:, None, :, None]
    out, _ = causal_attention(q, k, v, 0.3, document_mask(documents, q.dtype))
    for gradient in torch.autograd.grad((out * own).square().sum(), (q, k, v)):
        assert not bool(gradient.masked_select(~own).any())
        assert bool(gradient.masked_select(own).any())


@pytest.mark.parametrize(("qk", "value"), [(16, 16), (24, 16), (16, 24)])
@pytest.mark.parametrize("length", [1, 5, 33, 600])  # 600: the kernel works through the keys in blocks of 512
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_fused_attention_within_documents_equals_the_reference_with_its_gradients(
    qk: int, value: int, length: int, dtype: torch.dtype, tolerance: float
) -> None:
    q, k, v = heads(length, qk, qk, value, dtype=dtype)
    documents, weight = random_documents(length), torch.randn(2, 3, length, value, dtype=dtype)
    results = []
    for attend in (causal_attention, reference_attention):
        out, lse = attend(q, k, v, 0.3, document_mask(documents, dtype))
        results.append((out, lse, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=10 * tolerance, atol=tolerance)


def test_the_reference_follows_the_definition_pair_by_pair() -> None:
    q, k, v = heads(12, 16, 16, 16, dtype=torch.float64)
    documents = random_documents(12)
    logits = visible_logits(q, k, 0.3, documents)
    out, lse = reference_attention(q, k, v, 0.3, document_mask(documents, q.dtype))
    torch.testing.assert_close(out, logits.softmax(dim=-1) @ v)
    torch.testing.assert_close(lse, logits.logsumexp(dim=-1), check_stride=False)


def test_log_sum_exp_bounds_the_largest_visible_logit_from_both_sides() -> None:
    q, k, v = heads(60, 16, 16, 16)
    documents = random_documents(60)
    with torch.no_grad():
        _, lse = causal_attention(5 * q, k, v, 0.25, document_mask(documents, q.dtype))
        logits = visible_logits(5 * q, k, 0.25, documents)
    largest, visible = logits.amax(-1), logits.isfinite().sum(-1)
    assert bool((lse >= largest - 1e-5).all())
    assert bool((lse <= largest + visible.log() + 1e-5).all())
    assert int(visible.max()) < 60, "the test needs documents"


def test_exact_maxima_see_visible_pairs_only_across_chunk_borders() -> None:
    q, k = torch.randn(2, 3, 300, 16), torch.randn(2, 3, 300, 16)
    documents = (torch.arange(300) // 100).expand(2, 300)
    q[0, 1, 150] = k[0, 1, 99] = 100.0  # causal, but in the document before
    visible = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
    expected = (q @ k.mT * 0.25).masked_fill(~visible, -torch.inf).amax(dim=(0, 2, 3))
    found = largest_logits(q, k, 0.25, document_mask(documents, q.dtype))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert float(largest_logits(q, k, 0.25)[1]) > 1e4 > float(expected[1])


@pytest.mark.parametrize("exact", [True, False])
def test_the_meter_of_packed_documents_reads_the_maximum_over_each_alone(exact: bool, debug_model: Transformer) -> None:
    tokens, labels = packed_tokens()
    debug_model.train()
    debug_model.exact_logits = exact
    for b, at in documents_of():
        debug_model(tokens[b : b + 1, at], labels[b : b + 1, at])
    alone = debug_model.max_logits.clone()
    debug_model.reset_stats()
    debug_model(tokens, labels, documents=document_numbers(tokens, EOT))
    torch.testing.assert_close(debug_model.max_logits, alone, rtol=1e-5, atol=2e-5)
    debug_model(tokens, labels)
    assert bool((debug_model.max_logits > alone + 1e-3).any()), "the test needs a hidden maximum"


@pytest.mark.parametrize("length", [33, 600])
def test_without_documents_the_kernel_is_the_plain_one_to_the_bit(length: int) -> None:
    q, k, v = heads(length, 16, 16, 16)
    results = []
    for attend in (causal_attention, plain_attention):
        out, lse = attend(q, k, v, 0.3)
        results.append((out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    return out, lse


def test_one_document_equals_no_mask(debug_model: Transformer) -> None:
    tokens, labels = packed_tokens()
    debug_model.train()
    readings = []
    for documents in (torch.full_like(tokens, 3), None):
        readings.append(
            [*nats_and_gradients(debug_model, [(tokens, labels, documents)]), debug_model.max_logits.clone()]
        )
        debug_model.reset_stats()
    for masked, plain in zip(*readings, strict=True):
        torch.testing.assert_close(masked, plain, rtol=0, atol=2e-5 * max(1.0, float(plain.abs().max())))


@pytest.mark.slow
def test_a_compiled_loss_takes_documents_and_goes_without() -> None:
    model = lively(Transformer(ModelConfig.preset("debug", n_layers=2)))
    tokens, labels = packed_tokens()
    compiled = torch.compile(model, backend="aot_eager")
    for documents in (None, document_numbers(tokens, EOT)):
        ours, eager = (called(tokens, labels, documents=documents) for called in (compiled, model))
        torch.testing.assert_close(ours, eager)
        gradients = [torch.autograd.grad(x.cross_entropy, list(model.parameters())) for x in (ours, eager)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.fault("A16")
def test_all_layers_keep_one_bias_for_the_backward_pass() -> None:
    model, length = Transformer(ModelConfig.preset("debug", n_layers=6, max_seq_length=400)).train(), 400
    tokens, kept = torch.randint(0, 257, (1, length)), set()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() >= 4 * length**2:
            kept.add(storage.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(tokens, tokens, documents=random_documents(length)[:1])
    assert len(kept) == 1


@pytest.mark.fault("A16")
@pytest.mark.serial
@pytest.mark.skipif(process_memory("VmHWM") is None, reason="this system does not tell a process its peak")
def test_a_mask_costs_the_memory_of_one_bias_however_many_layers_there_are() -> None:
    """In a process of its own: the peak of a masked pass over that of one without, in sizes of a bias."""
    child = f"""
import torch
from nanokimi import ModelConfig, Transformer
from nanokimi.memory import process_memory
torch.set_num_threads(1)
model = Transformer(ModelConfig.preset("debug", n_layers=6, max_seq_length={LONG}))
tokens, peaks = torch.zeros(1, {LONG}, dtype=torch.int64), []
for documents in (None, None, torch.arange({LONG})[None] // 1000):  # the first makes the gradients
    model(tokens, tokens, documents=documents).loss.backward()
    peaks.append(process_memory("VmHWM"))
print((peaks[2] - peaks[1]) / (4 * {LONG} ** 2))
"""
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert 0.5 < float(done.stdout) < 1.2  # 10.5 where every layer has its own


@pytest.mark.parametrize("length", [1, 8, 33])
def test_cuda_is_given_a_bias_whose_rows_are_aligned_and_dense(length: int) -> None:
    """Without a device only shapes can be checked; the ``gpu`` tests check the numbers."""
    bias = document_mask(torch.zeros(2, length, dtype=torch.int64), torch.bfloat16).bias
    assert bias.shape == (2, 1, length, length)
    assert all(stride % ROW_ALIGNMENT == 0 for stride in bias.stride()[:-1])
    assert bias.stride(-1) == 1
    q, k, v = (x.to("meta", torch.bfloat16) for x in heads(length, 24, 24, 24))
    out, lse = _cuda_kernel(q, k, v, 0.3, bias.to("meta"))
    assert (out.shape, lse.shape[:2]) == (q.shape, (2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [33, 64, 600])
@pytest.mark.parametrize(("qk", "value"), [(112, 112), (24, 12)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 5e-2)])
def test_cuda_equals_the_reference_within_documents(
    length: int, qk: int, value: int, dtype: torch.dtype, tolerance: float
) -> None:
    """The tolerances leave room for TF32 and bf16 products; a mask gone wrong is off by far more."""
    q, k, v = heads(length, qk, qk, value, dtype=dtype, device="cuda")
    documents = random_documents(length).cuda()
    weight = torch.randn(2, 3, length, value, device="cuda", dtype=dtype)
    assert _fused_kernel(q, v) is not None
    scale = 1 / math.sqrt(qk)
    out, lse = causal_attention(q, k, v, scale, document_mask(documents, dtype))
    ours = (out, lse, *torch.autograd.grad((out * weight).sum(), (q, k, v)))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = reference_attention(*exact, scale, document_mask(documents, torch.float64))
    for a, b in zip(ours, (out, lse, *torch.autograd.grad((out * weight.double()).sum(), exact)), strict=True):
        assert float((a.double() - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_on_cuda_the_masked_loss_and_its_gradients_are_the_same(dtype: torch.dtype) -> None:
    model = lively(Transformer(ModelConfig.preset("debug", n_dense_layers=3)), std=0.1).cuda()
    tokens, labels = (x[:, :-1].cuda() for x in packed_tokens())  # 31 positions: rows that need padding
    documents = document_numbers(tokens, EOT)
    readings = []
    for called in (torch.compile(model), model):
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            nats = called(tokens, labels, documents=documents).cross_entropy
        readings.append((nats, *torch.autograd.grad(nats, list(model.parameters()))))
    for compiled, eager in zip(*readings, strict=True):
        bound = (1e-3 if dtype == torch.float32 else 0.1) * float(eager.norm()) + 1e-6
        assert float((compiled - eager).norm()) <= bound
