"""The planner's arithmetic against models, optimizers and processes that really exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanokimi.cli import main
from nanokimi.config import ModelConfig
from nanokimi.insight.planner import Machine, Transfer, forward_flops, step_time, transfers
from nanokimi.model.transformer import Transformer, meta_model
from nanokimi.ops.newton_schulz import newton_schulz_flops
from nanokimi.optim.muonclip import MUON_ROLES, STATE, MuonClip
from nanokimi.parallel.distributed_muon import assign
from nanokimi.parallel.layout import ONE, Layout
from nanokimi.parallel.memory_estimate import (
    CPU,
    GPU,
    Device,
    Job,
    memory,
    muon_work,
    parameters,
    peak,
)

DEBUG = ModelConfig.preset("debug", max_seq_length=64)
WIDE = ModelConfig.preset(
    "debug",
    max_seq_length=32,
    vocab_size=1000,
    dim=256,
    n_layers=2,
    n_routed_experts=16,
    n_activated_experts=4,
    qk_nope_head_dim=48,
    qk_rope_head_dim=16,
    v_head_dim=32,
    q_lora_rank=0,
)
TINY = ModelConfig.preset("tiny", max_seq_length=32)
PLAIN = ModelConfig.preset(
    "debug",
    max_seq_length=64,
    v_head_dim=24,
    n_dense_layers=0,
    n_shared_experts=0,
    norm_topk_prob=False,
    aux_loss_coeff=0.0,
)
SHAPES = {"debug": DEBUG, "tiny": TINY, "wide": WIDE, "plain": PLAIN}

# ---- what lies there ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["debug", "tiny"])
def test_weights_gradients_and_state_take_the_bytes_foreseen(shape: str) -> None:
    config = SHAPES[shape]
    model = Transformer(config)
    optimizer = MuonClip(model)
    tokens = torch.randint(config.vocab_size, (2, 9))
    losses = model(tokens[:, :-1], tokens[:, 1:])
    losses.loss.backward()
    optimizer.step()
    planned = memory(Job(config, ONE, 2, device=CPU))
    assert planned["weights"] == sum(p.nbytes for p in model.parameters())
    assert planned["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    for name, kind in (("momentum (Muon)", "muon"), ("two moments (AdamW)", "adamw")):
        state = [
            optimizer.state[p] for group in optimizer.param_groups for p in group["params"] if group["kind"] == kind
        ]
        assert planned[name] == sum(s[part].nbytes for s in state for part in STATE[kind])
    assert planned["rotary tables"] == model.cos.nbytes + model.sin.nbytes


# ---- what comes and goes ------------------------------------------------------------------------


class Kept:
    """Bytes that autograd keeps while this is entered: each storage once, those of the model itself left out."""

    def __init__(self, model: Transformer) -> None:
        self.bytes = 0
        self._seen = {t.untyped_storage()._cdata: t for t in (*model.parameters(), *model.buffers())}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor  # held, so that no other storage takes its place
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def kept_in_a_pass(config: ModelConfig, batch: int, *, checkpointing: bool, half: bool = False) -> int:
    """With checkpointing: until the block that keeps most has been computed again."""
    model = Transformer(config).train()
    model.checkpointing = checkpointing
    tokens = torch.randint(config.vocab_size, (batch, config.max_seq_length + 1))
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=half)
    with Kept(model) as kept, autocast:
        losses = model(tokens[:, :-1], tokens[:, 1:])
    assert losses.cross_entropy.requires_grad
    again = [kept_in_a_block(model, layer, batch, half) for layer in range(config.n_layers if checkpointing else 0)]
    return kept.bytes + max(again, default=0)


def kept_in_a_block(model: Transformer, layer: int, batch: int, half: bool) -> int:
    """Beside its input."""
    x = torch.randn(batch, model.config.max_seq_length, model.config.dim, requires_grad=True)
    counted = torch.ones(x.shape[:2], dtype=torch.bool)
    with Kept(model) as kept, torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        out, _ = model.blocks()[layer](x, (model.cos, model.sin), None, counted=counted, exact=False)
    assert out.requires_grad
    return kept.bytes - x.nbytes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_what_is_kept_for_the_backward_pass_is_foreseen(shape: str, checkpointing: bool) -> None:
    for batch, half in ((1, False), (3, False), (2, True)):
        device = Device(half, cuda=False)
        planned = memory(Job(SHAPES[shape], ONE, batch, device=device, checkpointing=checkpointing))
        measured = kept_in_a_pass(SHAPES[shape], batch, checkpointing=checkpointing, half=half)
        head = SHAPES[shape].vocab_size * SHAPES[shape].dim * (2 if half else 4)  # its gradient is made with the loss
        kept = planned["kept for the backward pass"] + planned["weights in bf16, kept too"] + head
        assert kept == pytest.approx(measured, rel=0.02), (batch, half)


def test_the_height_is_in_a_pass_or_in_the_update_whichever_is_more() -> None:
    parts = memory(Job(DEBUG, ONE, 1, device=CPU))
    held = ("weights", "gradients", "momentum (Muon)", "two moments (AdamW)", "rotary tables")
    static = sum(parts[name] for name in held)
    assert peak(parts | {"Newton-Schulz": 1e9}) == static + 1e9
    passing = parts["kept for the backward pass"] + parts["a chunk of logits"]
    assert peak(parts | {"Newton-Schulz": 0}) == static + passing


def test_a_replica_needs_more_for_more_sequences_and_less_with_checkpointing() -> None:
    jobs = [Job(ModelConfig.preset("nano-243m"), Layout("ddp", 2), n) for n in (1, 8, 64)]
    need = [peak(memory(job)) for job in jobs]
    assert need == sorted(need)
    assert peak(memory(jobs[2]._replace(checkpointing=True))) < need[2] / 3
    assert need[0] > 4 * 243_263_104 * 3


# ---- on several ranks ---------------------------------------------------------------------------


def test_rows_that_do_not_divide_are_padded_in_memory_and_on_their_way() -> None:
    sharded, dealt, replicated = (
        next(m for m in parameters(DEBUG, layout) if m.role == "experts")  # [8, 16, 32]
        for layout in (Layout("fsdp", 16), Layout("fsdp", 16, 1, 2), Layout("ddp", 16))
    )
    assert sharded.held == [1] * 8 + [0] * 8
    assert (sharded.local, sharded.gathered) == (16 * 32, 16 * 16 * 32)
    assert dealt.held == [1] * 8 + [0] * 8  # four experts over eight ranks, twice
    assert (dealt.local, dealt.gathered) == (16 * 32, 8 * 16 * 32)
    assert replicated.gathered == 8 * 16 * 32


@pytest.mark.parametrize(
    "layout", [Layout("ddp", 5), Layout("fsdp", 4), Layout("fsdp", 6, 3), Layout("fsdp", 32, 2, 4)], ids=str
)
def test_the_work_of_the_ranks_is_what_the_optimizer_deals_out(layout: Layout) -> None:
    for role, work in zip(MUON_ROLES, muon_work(DEBUG, layout, GPU), strict=True):
        alike = [m for m in parameters(DEBUG, layout) if m.role == role]
        held = [[slice(0, n) for n in m.held] for m in alike]
        flops, sizes = [0] * layout.ranks, [[0] * layout.replicas for _ in range(layout.shards)]
        for number, rows, replica, shard in assign([m.shape for m in alike], held, layout):
            matrix = alike[number]
            count = 1 if rows is None else rows.stop - rows.start
            flops[replica * layout.shards + shard] += count * newton_schulz_flops(*matrix.shape[-2:])
            for other in range(layout.shards) if rows is None else [shard]:
                here = matrix.held[other] if rows is None else count * matrix.shape[1]
                sizes[other][replica] += here * matrix.shape[-1]
        assert work.flops == flops
        assert work.longest == ([max(of_replicas) for of_replicas in sizes] if layout.replicas > 1 else [])


def test_rings_send_all_but_their_own_share_and_sums_take_two_rounds() -> None:
    found = [Transfer("", kind, 800, 4) for kind in ("all_gather", "all_reduce", "all_to_all")]
    assert {t.collective: t.sent for t in found} == {"all_gather": 600, "all_reduce": 1200, "all_to_all": 600}


def payload(layout: Layout, sequences: int, passes: int) -> dict[str, float]:
    """Of all transfers of a step of the debug model, by collective."""
    sums: dict[str, float] = {}
    for transfer in transfers(Job(DEBUG, layout, sequences, passes)):
        sums[transfer.collective] = sums.get(transfer.collective, 0) + transfer.payload
    return sums


def test_traffic_of_shards_grows_with_passes_and_that_of_replicas_does_not() -> None:
    sharded, replicas = Layout("fsdp", 4), Layout("ddp", 4)
    assert payload(sharded, 1, 6)["all_gather"] == 6 * payload(sharded, 2, 1)["all_gather"]
    assert payload(replicas, 1, 6) == payload(replicas, 2, 1)
    weights = 4 * meta_model(DEBUG).num_parameters()
    assert payload(replicas, 1, 1)["all_reduce"] == pytest.approx(weights, rel=0.01)


def test_a_transfer_takes_the_slower_way_of_its_group() -> None:
    machine = Machine(bandwidth=400, network=50, ranks_per_node=4)
    by = {kind: Transfer("", kind, 1600e9, 8) for kind in ("all_gather", "all_to_all")}
    assert machine.seconds(by["all_gather"]._replace(group=4)) == 1600 * 3 / 4 / 400
    assert machine.seconds(by["all_gather"]) == 1600 * 7 / 8 / (50 * 4)  # a ring through four devices of each node
    assert machine.seconds(by["all_gather"]._replace(stride=4)) == 1600 * 7 / 8 / 50
    assert machine.seconds(by["all_to_all"]) == 1600e9 / 8 * (4 / 50e9)  # to the four of the other node


# ---- FLOPs and time -----------------------------------------------------------------------------


def test_a_step_without_traffic_takes_what_its_products_take() -> None:
    job = Job(DEBUG, ONE, 2, 3)
    machine = Machine(peak_tflops=1e-3, efficiency=0.25)
    time = step_time(job, machine)
    model = 3 * forward_flops(DEBUG, meta_model(DEBUG).num_parameters(active=True), 6, 64)
    muon = sum(sum(work.flops) for work in muon_work(DEBUG, ONE, GPU))
    assert time.seconds == pytest.approx((model + muon) / 0.25e9)
    assert time.utilisation == pytest.approx(model / time.seconds / 1e9)
    again = step_time(job._replace(checkpointing=True), machine)
    assert 0.2 * model < again.again < model / 3
    assert again.utilisation < time.utilisation


def test_traffic_that_takes_longer_than_what_it_is_beside_is_waited_for() -> None:
    job = Job(DEBUG, Layout("fsdp", 4), 1)
    fast, slow = (Machine(4, 80, 1, 0.5, bandwidth, 1) for bandwidth in (1e6, 1e-3))
    free = step_time(job, fast)
    assert free.seconds == pytest.approx(free.computing, rel=0.01)
    waited, seconds = step_time(job, slow), sum(map(slow.seconds, transfers(job)))
    assert waited.exposed + waited.overlapped == pytest.approx(seconds)
    assert waited.overlapped < waited.computing < waited.exposed


# ---- the command --------------------------------------------------------------------------------

LARGE = "plan --preset kimi-k2 --ranks 1024 --batch_size 1 --gradient_accumulation 1024 --set max_seq_length=4096"


def test_the_quickest_layout_that_fits_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LARGE.split(), "--activation_checkpointing"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("--parallel")]
    marked = [line for line in rows if "quickest" in line]
    assert "--parallel ddp" in rows[0]
    assert sum("--expert_parallel" in line for line in rows) >= 3
    fitting = [float(line.split(" yes ")[1].split()[1]) for line in rows if " yes " in line]
    assert [float(line.split(" yes ")[1].split()[1]) for line in marked] == [min(fitting)]


@pytest.mark.parametrize("shards", [False, True])
def test_the_plan_counts_the_host_memory_of_checkpoints_that_are_written_in_the_background(
    shards: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--parallel", "fsdp", "--ranks", "2"] if shards else ["--ranks", "1"]
    assert main(["plan", "--preset", "tiny", *flags]) == 0
    optimizer = MuonClip(Transformer(ModelConfig.preset("tiny")))
    sizes = {  # of weights and state, 4 bytes a number
        kind: sum(p.numel() for g in optimizer.param_groups if g["kind"] == kind for p in g["params"]) for kind in STATE
    }
    saved = sum(4 * (1 + len(STATE[kind])) * size for kind, size in sizes.items()) / 1e9
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("--async_checkpoints takes"))
    told = [float(number) for number in re.findall(r"([\d.]+) GB", line)]
    weights = 4 * sum(sizes.values()) / 1e9
    assert told == pytest.approx([saved / 2, saved / 2 + weights] if shards else [saved], rel=0.05)


def test_nothing_fits_and_the_plan_says_what_to_try(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LARGE.split(), "--device_memory", "16"]) == 0
    out = capsys.readouterr().out
    assert "Nothing fits into --device_memory 16: try --activation_checkpointing, more --ranks" in out
    assert "quickest" not in out


def test_one_layout_is_shown_part_by_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "debug", "--ranks", "4", "--batch_size", "4", "--expert_parallel", "2"]) == 0
    out = capsys.readouterr().out
    for part in ("momentum (Muon)", "does not fit", "tokens to their experts", "Newton-Schulz, the busiest", "MFU"):
        assert (part in out) == (part != "does not fit"), part
    assert "--parallel fsdp --expert_parallel 2: 1 x 4 shards" in out


def test_the_largest_plan_holds_no_weights() -> None:
    """A trillion parameters would take 4 TB."""
    peak = "from nanokimi.memory import process_memory; print(process_memory('VmHWM'))"
    code = f"from nanokimi.cli import main; main({LARGE.split()!r}); {peak}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 1 << 30


def test_the_plans_of_the_page_are_those_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    shown = re.findall(r"```bash\nnanokimi (plan [^\n]+)\n```\n\n```text\n(.+?)```", page, re.DOTALL)
    assert len(shown) >= 3
    for command, output in shown:
        assert main(command.split()) == 0
        assert capsys.readouterr().out == output


WRONG = {
    "--ranks 3": "does not divide over 3 ranks",
    "--ranks 4 --replicate 3": "--replicate 3 does not divide the 4 ranks",
    "--ranks 4 --expert_parallel 3": "--expert_parallel 3 does not divide the 4 ranks of a replica",
    "--ranks 16 --gradient_accumulation 8 --expert_parallel 16": "--expert_parallel 16 does not divide the 8 routed",
    "--ranks 4 --parallel ddp --replicate 2": "--replicate 2 belongs to --parallel fsdp",
    "--ranks 0": "--ranks must be 1 or more, got 0",
    "--ranks_per_node 0": "--ranks_per_node must be 1 or more, got 0",
    "--device_memory -1": "--device_memory must be positive and finite, got -1",
    "--network nan": "--network must be positive and finite, got nan",
    "--efficiency 1.5": "--efficiency is a share of the peak, 1 or less, got 1.5",
    "--batch_size auto": "--batch_size takes a whole number",
    "--preset gpt": "--preset is 'gpt': choose one of",
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_plan_that_cannot_be_is_refused_in_one_line(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "debug", *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert WRONG[flags] in err
    assert err.count("\n") == 1
    assert out == ""
