"""What the candidates do while they are timed: the same work on both sides."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.bench.results import ROOT
from benchmarks.bench.workloads import peers
from benchmarks.bench.workloads.decoding import Formats, GgufFiles, LlamaCppDecoder, Ours, Transformers
from benchmarks.bench.workloads.peers import MuonAndAdamW, random_gradients
from benchmarks.bench.workloads.setup import model_of, random_tokens
from benchmarks.bench.workloads.training import Network, Optimizer, Reference
from nanokimi import generate_tokens
from nanokimi.cli import main

HERE = {"device": "cpu", "threads": 1}


def test_our_decoding_is_greedy_generation() -> None:
    ours = Ours("debug", 64, 2, "fp32", "eager", **HERE)
    ours.fill(10, rows=2)
    first = list(ours.tokens)
    ours.decode(5)
    model = model_of("debug", torch.device("cpu"), max_seq_length=64).eval()
    for row, prompt in enumerate(random_tokens(model.config, 2, 10).tolist()):
        expected = generate_tokens(model, prompt, max_tokens=6, temperature=0.0)
        assert (first[row], ours.tokens[row]) == (expected[0], expected[-1])
    assert ours.decoder.lengths == [15, 15]


def test_transformers_goes_on_in_its_cache_as_if_it_had_not_stopped() -> None:
    pytest.importorskip("transformers")
    theirs = Transformers("debug", 64, "fp32", **HERE)
    theirs.fill(10, rows=2)
    theirs.decode(3)
    theirs.decode(4)
    stopped = theirs.ids
    theirs.fill(10, rows=2)
    theirs.decode(7)
    assert torch.equal(stopped, theirs.ids)
    assert theirs.cache.get_seq_length() == 17  # the last token has not been read yet


def test_llamacpp_writes_what_our_model_writes(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    path = str(tmp_path / "m.gguf")
    GgufFiles("debug", 64, **HERE).write(path, "f32")
    engine = LlamaCppDecoder("debug", path, 64, False, **HERE)
    taken = [engine.fill(10), engine.decode(3), engine.decode(4)]
    assert all(answer["seconds"] > 0 for answer in taken)
    model = model_of("debug", torch.device("cpu"), max_seq_length=64).eval()
    prompt = random_tokens(model.config, 10).tolist()
    assert engine.ids == prompt + generate_tokens(model, prompt, max_tokens=10, temperature=0.0)


def test_both_networks_train_on_as_many_tokens_and_leave_no_gradient() -> None:
    pytest.importorskip("transformers")
    ours = Network("debug", 2, 16, "off", **HERE)
    theirs = Reference("debug", 2, 16, **HERE)
    assert ours.batch.labels.shape == theirs.tokens.shape == (2, 16)
    same = sum(p.numel() for p in theirs.model.parameters())
    assert same == ours.model.num_parameters()
    assert ours.passes()["seconds"] > 0 < theirs.passes()["seconds"]
    assert all(p.grad is None for p in (*ours.model.parameters(), *theirs.model.parameters()))


def test_the_whole_step_moves_the_weights_and_switches_qk_clip() -> None:
    ours = Network("debug", 2, 16, "off", **HERE)
    before = ours.model.head.weight.detach().clone()
    ours.whole(tau=0.0)
    assert ours.optimizer.tau == 0.0
    ours.whole(tau=100.0)
    assert ours.optimizer.tau == 100.0
    assert not torch.equal(before, ours.model.head.weight)
    assert ours.data()["seconds"] > 0


@pytest.mark.parametrize("kind", ["muonclip", "muon", "adamw_fused", "adamw_foreach"])
def test_every_optimizer_moves_every_weight(kind: str) -> None:
    workload = Optimizer("debug", kind, **HERE)
    owner = workload.optimizer.param_groups if hasattr(workload.optimizer, "param_groups") else []
    weights = [p for group in owner for p in group["params"]] or [*workload.optimizer.matrices]
    before = [w.detach().clone() for w in weights]
    workload.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, weights, strict=True))


def stacked() -> nn.Module:
    """A stack of three experts, a matrix, a head and a norm, with gradients."""
    module = nn.Module()
    shapes = {"experts": (3, 4, 6), "matrix": (8, 8), "embed": (5, 4), "norm": (4,)}
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.randn(shape)))
    random_gradients(module.parameters())
    return module


def test_muon_steps_each_expert_as_a_matrix_of_its_own_in_the_place_of_the_stack() -> None:
    module = stacked()
    lone = nn.Parameter(module.experts[1].detach().clone())
    lone.grad = module.experts.grad[1].clone()
    torch.optim.Muon([lone], lr=peers.LR).step()
    MuonAndAdamW(module.named_parameters()).step()
    torch.testing.assert_close(module.experts[1], lone, rtol=0, atol=0)


def test_a_slow_step_is_put_together_from_one_matrix_of_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = MuonAndAdamW(stacked().named_parameters())
    monkeypatch.setattr(peers, "seconds", lambda work, device: 1.0)
    assert optimizer.extrapolated(torch.device("cpu")) == 1 + 3 + 1  # AdamW, three experts, one matrix
    monkeypatch.setattr(peers, "PATIENCE", 0.0)
    assert optimizer.is_slow()
    monkeypatch.setattr(peers, "PATIENCE", 1e9)
    assert not optimizer.is_slow()


def test_the_memory_of_a_slow_step_is_all_of_its_state() -> None:
    module = stacked()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = MuonAndAdamW(module.named_parameters())
    optimizer.step_largest()
    buffers = [optimizer.muon.state[m]["momentum_buffer"] for m in optimizer.matrices]
    assert [b.shape for b in buffers] == [(4, 6)] * 3 + [(8, 8)]
    assert torch.equal(before["experts"], module.experts)
    assert not torch.equal(before["matrix"], module.matrix)
    assert not torch.equal(before["embed"], module.embed)
    assert module.matrix.grad is not None


def test_the_peak_is_that_of_the_process_itself_and_stays() -> None:
    script = """
        import torch
        from benchmarks.bench.workloads.setup import peak_bytes
        cpu = torch.device("cpu")
        before = peak_bytes(cpu)
        held = torch.ones(1 << 26)
        during = peak_bytes(cpu)
        del held
        print(before, during, peak_bytes(cpu))
    """
    held = torch.ones(1 << 28)  # a gigabyte here is none there
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    before, during, after = map(int, done.stdout.split())
    assert before < held.nbytes
    assert during - before > 0.9 * (1 << 28)
    assert after > 0.99 * during  # the kernel counts loosely


def test_formats_are_scored_on_what_the_run_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(Path(textwrap.__file__).read_text(encoding="utf-8")[:8000], encoding="utf-8")
    flags = ["--preset", "debug", "--data_path", "text.txt", "--max_steps", "2", "--eval_interval", "0"]
    assert main(["train", *flags, "--device", "cpu"]) == 0
    assert main(["eval", "checkpoints/final.pt", "--output", "eval.json", "--device", "cpu"]) == 0
    (text,) = json.loads(Path("eval.json").read_text())["texts"]
    workload = Formats("checkpoints/final.pt", **HERE)
    exact, int8 = (workload.score(weights, 0) for weights in ("fp32", "int8"))
    assert exact == {"bits_per_byte": pytest.approx(text["bits_per_byte"], rel=1e-12), "n_bytes": text["n_bytes"]}
    assert int8["bits_per_byte"] != exact["bits_per_byte"]
    assert int8["bits_per_byte"] == pytest.approx(exact["bits_per_byte"], abs=0.05)
