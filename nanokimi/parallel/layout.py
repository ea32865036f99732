"""How a model lies on the ranks: which of them hold the same, and which hold a part each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from nanokimi.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Replicas of the model, each sharded over as many ranks; rank ``r * shards + s`` holds shard s of replica r.

    Attributes:
        mode: ``ddp`` (every rank holds everything), ``fsdp``, or ``one`` process.
        ranks: processes in all.
        replicate: replicas under ``fsdp``; more than one is hybrid sharding.
        expert_parallel: ranks over which the routed experts of a replica are distributed; 0 treats them like
            all other weights.

    Raises:
        UserError: the numbers do not divide.
    """

    mode: str
    ranks: int = 1
    replicate: int = 1
    expert_parallel: int = 0

    def __post_init__(self) -> None:
        sharded = self.mode == "fsdp"
        if self.replicate > 1 and not sharded:
            raise UserError(f"--replicate {self.replicate} belongs to --parallel fsdp: add it, or leave it out")
        if self.expert_parallel and not sharded:
            raise UserError(
                f"--expert_parallel {self.expert_parallel} belongs to --parallel fsdp under torchrun: add it, or leave "
                "it out"
            )
        if self.ranks % self.replicate:
            raise UserError(
                f"--replicate {self.replicate} does not divide the {self.ranks} ranks: choose a divisor of them"
            )
        if self.expert_parallel and self.shards % self.expert_parallel:
            raise UserError(
                f"--expert_parallel {self.expert_parallel} does not divide the {self.shards} ranks of a replica: "
                "choose a divisor of them"
            )

    @property
    def replicas(self) -> int:
        """How many ranks hold the same."""
        return self.ranks if self.mode == "ddp" else self.replicate

    @property
    def shards(self) -> int:
        """How many ranks share one replica."""
        return self.ranks // self.replicas

    def check_experts(self, n_routed_experts: int) -> None:
        """Raises UserError unless every rank gets equally many experts."""
        if self.expert_parallel and n_routed_experts % self.expert_parallel:
            raise UserError(
                f"--expert_parallel {self.expert_parallel} does not divide the {n_routed_experts} routed experts: "
                "choose a divisor of them"
            )

    def shard_rows(self, rows: int, shard: int, *, distributed: bool = False) -> slice:
        """Which of the ``rows`` of a parameter shard rank ``shard`` holds.

        Experts that are ``distributed`` lie on ``expert_parallel`` ranks that are neighbours, so that tokens travel
        inside a machine where possible. The experts of one of them are sharded over the ranks of the same remainder.
        """
        if not (distributed and self.expert_parallel):
            return rows_of(rows, self.shards, shard)
        part, group_rank = divmod(shard, self.expert_parallel)
        own = rows // self.expert_parallel
        held = rows_of(own, self.shards // self.expert_parallel, part)
        return slice(group_rank * own + held.start, group_rank * own + held.stop)


ONE = Layout("one")


class StepParts(NamedTuple):
    """A rank's share of a step: ``passes`` forward passes of ``batch_size`` sequences each."""

    batch_size: int
    passes: int


def share_of_step(batch_size: int, gradient_accumulation: int, ranks: int) -> StepParts:
    """Cuts a step of ``batch_size * gradient_accumulation`` sequences evenly, in passes of at most ``batch_size``.

    So a step learns from the same tokens on any number of ranks.

    Raises:
        UserError: the sequences do not divide; says which number would.
    """
    sequences = batch_size * gradient_accumulation
    own, left = divmod(sequences, ranks)
    if left:
        above = -(-sequences // ranks) * ranks
        raise UserError(
            f"a step of {sequences} sequences (--batch_size {batch_size} x --gradient_accumulation "
            f"{gradient_accumulation}) does not divide over {ranks} ranks: make it a multiple of them, such as "
            f"--batch_size 1 --gradient_accumulation {above}"
        )
    size = max(n for n in range(1, min(batch_size, own) + 1) if own % n == 0)
    return StepParts(size, own // size)


def rows_of(n: int, parts: int, index: int) -> slice:
    """The rows of part ``index`` when n rows are cut as FSDP cuts them: in pieces of ``ceil(n / parts)``."""
    size = -(-n // parts)
    return slice(min(index * size, n), min((index + 1) * size, n))
