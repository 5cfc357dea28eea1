"""How long a step takes on many GPUs: compute, what of the exchange of gradients it cannot hide, stragglers.

Simple on purpose; how far off it is at published points is in benchmarks/scaling.md. Standard library only. Sizes are
in bytes.
"""
from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

from engine.values import BadValue

WARN_BELOW = 0.9                                  # of the speed that was expected


@dataclass(frozen=True)
class Links:
    """What connects the GPUs: the bandwidth that collectives reach, in bytes/s as nccl-tests count it (busbw)."""
    gpus: int                                     # of a machine
    nvlink: float                                 # among the GPUs of a machine
    nic: float                                    # of one machine, with the others


@dataclass(frozen=True)
class Assumptions:
    overlap: float = 0.6                          # of the compute time, during which what is ready early can be sent
    spread: float = 0.02                          # deviation of one GPU's time for a step, as a share of it
    bucket: float = 25e6                          # gradients travel in pieces of so many bytes (DDP's)
    hop_s: float = 20e-6                          # that each piece needs from one machine to the next


@dataclass(frozen=True)
class Exchange:
    """What every rank sends and receives in a step.

    early, late: bytes that are all-reduced, ready during backward and only at its end. Rows are what one rank has and
    all the others receive, so their sum grows with the ranks; swapped goes from each rank to a single other, while
    nothing is computed.
    """
    early: float
    late: float
    early_rows: float = 0.0
    late_rows: float = 0.0
    late_swapped: float = 0.0


@dataclass(frozen=True)
class Gradients:
    """Bytes of gradients by what they belong to, and of what a rank's own targets need of the tails.

    A table has a row for each word, the frequent ones its head and the others its tails. If it is tied, it is embedding
    and softmax at once, and its gradient is whole only when the embedding's part is there, which is last.
    """
    head: float                                   # of one table, so the next
    tails: float
    rest: float                                   # what is in no table
    tied: bool                                    # False: there are two
    tail_rows: float                              # of the table, one for each target in the tails
    tail_states: float                            # hidden, one for each of them

    @property
    def total(self) -> float:
        return (self.head + self.tails) * (1 if self.tied else 2) + self.rest

    def dense(self) -> Exchange:
        """DDP: each gradient as a whole, when it is whole."""
        return Exchange(early=self.total - self.head - self.tails, late=self.head + self.tails)

    def early(self, ranks: int) -> Exchange:
        """The softmax's part of the table at once; of the embedding's, at the end, the head and the touched rows, or
        all rows where that is less (engine/tied.py)."""
        early = self.rest + self.head + self.tails
        if gathers(self.tail_rows, ranks, self.tails):
            return Exchange(early, self.head, late_rows=self.tail_rows)
        return Exchange(early, self.head + self.tails)

    def split(self) -> Exchange:
        """Each rank keeps a part of the tails, and no gradient of a table's tails travels. Hidden states of the tails'
        targets go to all ranks and their gradients back; rows go to the rank that reads them and their gradients back.
        """
        return Exchange(early=self.rest + self.head, late=self.head, early_rows=2 * self.tail_states,
                        late_swapped=2 * self.tail_rows)


@dataclass(frozen=True)
class StepTime:
    compute_s: float
    exposed_s: float                              # of the exchange, what compute does not hide
    stragglers_s: float                           # until the slowest rank is there

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_s + self.stragglers_s


def step_time(compute_s: float, exchange: Exchange, links: Links, *, machines: int, gpus: int | None = None,
              micro_batches: int = 1, assumed: Assumptions = Assumptions()) -> StepTime:
    """Of `machines`, with `gpus` of each at work (None: all), where a step on one GPU takes `compute_s`.

    Of several micro-batches only the last one's backward hides anything: the others send nothing.
    """
    early_s, late_s = _exchange_s(exchange, links, machines, gpus or links.gpus, assumed)
    hidden_s = assumed.overlap * compute_s / micro_batches
    slowest = slowest_of(machines * (gpus or links.gpus))
    return StepTime(compute_s, max(0.0, early_s - hidden_s) + late_s, assumed.spread * slowest * compute_s)


def compute_time(step_s: float, exchange: Exchange, links: Links, *, machines: int, gpus: int | None = None,
                 micro_batches: int = 1, assumed: Assumptions = Assumptions()) -> float:
    """The compute_s with which step_time would be `step_s`. Raises BadValue where the exchange alone takes longer."""
    early_s, late_s = _exchange_s(exchange, links, machines, gpus or links.gpus, assumed)
    slope, overlap = 1 + assumed.spread * slowest_of(machines * (gpus or links.gpus)), assumed.overlap / micro_batches
    compute_s = (step_s - late_s) / slope
    if early_s > overlap * compute_s:
        compute_s = (step_s - late_s - early_s) / (slope - overlap)
    if compute_s <= 0:
        raise BadValue(f"a step of {1000 * step_s:.4g} ms is shorter than its exchange of gradients at this "
                       f"bandwidth, {1000 * (early_s + late_s):.4g} ms")
    return compute_s


def gathers(rows: float, ranks: int, tails: float) -> bool:
    """Whether rows of each rank, gathered, are less than an all-reduce of all tails, which sends and receives them."""
    return ranks * rows < 2 * tails


def slowest_of(ranks: int) -> float:
    """The expected maximum of so many standard normal deviations, as Blom (1958) approximates it; 0 of one."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def warning(expected_s: float, measured_s: float) -> str | None:
    """What to say of a step that takes much longer than expected; None: nothing."""
    if expected_s >= WARN_BELOW * measured_s:
        return None
    return (f"A step takes {1000 * measured_s:.4g} ms where {1000 * expected_s:.4g} are expected: "
            f"{1 - expected_s / measured_s:.0%} of the speed is lost. Look for a slow machine or link (nccl-tests' "
            f"all_reduce_perf), for waiting on data, and for machines that are not placed together")


def _exchange_s(exchange: Exchange, links: Links, machines: int, gpus: int,
                assumed: Assumptions) -> tuple[float, float]:
    """Of what is ready early, and of what is late."""
    def through(size: float, times: int) -> float:
        """A collective of `size` bytes: a gather takes them through every link once, an all-reduce twice."""
        inside = times * (gpus - 1) / gpus * size / links.nvlink
        if machines == 1:
            return inside
        # As a ring or a tree, whichever is shorter: both are NCCL's.
        hops = min(times * (machines - 1), 2 * times * (machines - 1).bit_length())
        return (inside + times * (machines - 1) / machines * size / links.nic
                + hops * assumed.hop_s * size / assumed.bucket)
    ranks = machines * gpus
    # What the ranks of a machine swap shares its network card.
    late_rows = exchange.late_rows * ranks + exchange.late_swapped * gpus if ranks > 1 else 0.0
    return (through(exchange.early, 2) + through(exchange.early_rows * ranks, 1),
            through(exchange.late, 2) + through(late_rows, 1))
