"""What overlap, buckets, 16 bits and sending early are worth: real processes on slow links, beside what was predicted.

    python -m benchmarks.simulate
    python -m benchmarks.simulate --config=nvidia_base --kind=p4d.24xlarge --step_ms=34 --ranks=2 --ranks=16
    python -m benchmarks.simulate --record                   # adds the rows to benchmarks/simulate.md

Each rank is a machine with one GPU, in a network namespace with a link that `tc` slows down. DDP, its buckets and hooks
are real, over gloo; compute is sleep, a third of it forward. Sizes shrink, and time is stretched, such that compute and
exchange keep their ratio. The prediction is engine/scaling.py's, without stragglers, with the bandwidth and the time of
a hop that an all-reduce of all gradients and one of a single number show on the same links. Linux, root, iproute2.
"""
from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.namespaces import answer, enter_switch, machines, shape
from benchmarks.scaling import compute, kind_of, workload
from benchmarks.tables import dated, named, show
from engine.cli import flag, misuse, parse
from engine.config import Wire
from engine.expect import all_reduce_s
from engine.run import processor
from engine.scaling import Assumptions, Exchange, Gradients, Links, step_time
from engine.split import Reads, Shards, Split
from engine.tied import Tied
from engine.values import BadValue
from engine.world import World, leave, world

TABLE = Path(__file__).with_name("simulate.md")
HEADING = ("| date | commit | command | ranks | exchange | ms, measured | range | predicted | error "
           "| efficiency, measured | predicted | machine |")
LAYERS = 16
WIDTH = 64                                        # of the table: narrower than there, so that few rows are no fraction
FORWARD = 1 / 3                                   # of compute


@dataclass(frozen=True)
class Flags:
    config: str = flag("a name of configs.py, whose gradients are sent", default="nvidia_base")
    kind: str | None = flag("machines other than the config's", default="p4d.24xlarge")
    step_ms: float | None = flag("a step on one GPU there", default=34.0)
    ranks: tuple[int, ...] = flag("machines; may be repeated", default=(2, 4, 8, 16))
    plan: tuple[str, ...] = flag("only the ways to exchange that begin so; may be repeated", default=())
    shrink: float = flag("sizes are so many times smaller than there", default=200.0)
    stretch: float = flag("seconds are so many times longer", default=50.0)
    rounds: int = flag("timed steps of each; the median counts", default=3)
    record: bool = flag("add the rows to benchmarks/simulate.md", default=False)


@dataclass(frozen=True)
class Plan:
    name: str
    wire: Wire
    bucket_mb: float = 25.0
    way: Literal["dense", "early", "split"] = "dense"
    shaped: bool = True

    def exchange(self, in_16_bits: Gradients, bucket: float, ranks: int) -> Exchange:
        """What the model is told. With a single bucket nothing is ready early."""
        if self.way != "dense":
            return in_16_bits.early(ranks) if self.way == "early" else in_16_bits.split()
        scale, dense = (2 if self.wire == "fp32" else 1), in_16_bits.dense()
        if bucket > scale * in_16_bits.total:
            return Exchange(0.0, scale * in_16_bits.total)
        return Exchange(scale * dense.early, scale * dense.late)


PLANS = (
    Plan("links not slowed: dense, 32 bits", "fp32", shaped=False),
    Plan("dense, 32 bits", "fp32"),
    Plan("dense, 32 bits, nothing overlapped", "fp32", bucket_mb=1e6),
    Plan("dense, 16 bits", "bf16"),
    Plan("dense, 16 bits, buckets of 5 MB", "bf16", bucket_mb=5),
    Plan("early, 16 bits", "bf16", way="early"),
    Plan("split, 16 bits", "bf16", way="split"),
)


@dataclass(frozen=True)
class Scene:
    """All in the sizes and seconds of the simulation."""
    gradients: Gradients                          # in 16 bits
    compute_s: float
    mbit: float
    shrink: float
    rounds: int
    plans: tuple[Plan, ...]


@dataclass(frozen=True)
class Measured:
    busbw: float
    hop_s: float
    steps_s: dict[str, list[float]]


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="-m benchmarks.simulate", about=__doc__)
    if min(flags.ranks) < 2 or max(flags.ranks) > 250:
        misuse("--ranks are from 2 to 250")
    if min(flags.shrink, flags.stretch, flags.rounds) < 1:
        misuse("--shrink, --stretch and --rounds must be at least 1")
    try:
        scene = scene_of(flags)
        enter_switch()
        command = " ".join(argv) or "(no flags)"
        for count in flags.ranks:
            with machines(count, partial(_rank, scene)) as pipes:
                results = [answer(pipe) for pipe in pipes]
            first = results[0]
            print(f"{count} ranks: links slowed to {scene.mbit:.0f} Mbit/s reach {first.busbw / 125e3:.0f}, "
                  f"a hop takes {1e6 * first.hop_s:.0f} us", file=sys.stderr)
            show(HEADING, list(rows(scene, count, first, command)), TABLE if flags.record else None)
    except BadValue as error:
        misuse(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def scene_of(flags: Flags) -> Scene:
    """Sizes and seconds of the machines that are simulated, scaled. Raises BadValue."""
    config = named(flags.config)
    kind, work = kind_of(config, flags.kind), workload(config)
    compute_s, _ = compute(config, work, kind, flags.step_ms, Assumptions())
    there = work.gradients(16)
    here = replace(there, **{name: getattr(there, name) / flags.shrink
                             for name in ("head", "tails", "rest", "tail_rows", "tail_states")})
    plans = tuple(plan for plan in PLANS if not flags.plan or plan.name.startswith(flags.plan))
    if not there.tails or not there.tied:
        raise BadValue(f"{flags.config} has no tied table with tails, which these exchanges are about")
    if not plans:
        raise BadValue(f"--plan: no way to exchange begins so. There are: {'; '.join(plan.name for plan in PLANS)}")
    return Scene(here, compute_s * flags.stretch, 8e-6 * kind.links.nic / flags.shrink / flags.stretch, flags.shrink,
                 flags.rounds, plans)


def rows(scene: Scene, count: int, measured: Measured, command: str) -> Iterator[str]:
    for plan in scene.plans:
        steps = [1000 * seconds for seconds in measured.steps_s[plan.name]]
        step, alone = statistics.median(steps), 1000 * scene.compute_s
        expected = 1000 * predicted_s(scene, plan, count, measured) if plan.shaped else alone
        yield dated(
            f"`{command}` | {count} | {plan.name} | {step:.0f} | "
            f"{min(steps):.0f} to {max(steps):.0f} | {expected:.0f} | {expected / step - 1:+.1%} | "
            f"{alone / step:.1%} | {alone / expected:.1%} | {processor()}, {os.cpu_count()} processors, "
            f"torch {torch.__version__}")


def predicted_s(scene: Scene, plan: Plan, count: int, measured: Measured) -> float:
    bucket = 1e6 * plan.bucket_mb / scene.shrink
    exchange = plan.exchange(scene.gradients, bucket, count)
    assumed = Assumptions(spread=0.0, bucket=min(bucket, exchange.early + exchange.late), hop_s=measured.hop_s)
    return step_time(scene.compute_s, exchange, Links(1, float("inf"), measured.busbw), machines=count,
                     assumed=assumed).total_s


class _Slow(torch.autograd.Function):
    """Passes on what it gets, later; backward, the weight's gradient is there after its time. `meanwhile`: called half
    way, as the softmax's when it has scores and has not added them up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float, meanwhile: Callable[[], None] | None = None
                ) -> Tensor:
        ctx.weight, ctx.seconds = weight, seconds
        time.sleep(FORWARD * seconds / 2)
        if meanwhile is not None:
            meanwhile()
        time.sleep(FORWARD * seconds / 2)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        time.sleep((1 - FORWARD) * ctx.seconds)
        return grads[0], torch.zeros_like(ctx.weight), None, None


class Sleeper(nn.Module):
    """A tied table, read first and last, and layers between. Early and split: the engine's (engine/tied.py, split.py),
    of whose tails as many rows are read, and as many are targets, as tokens would; else a parameter as any other."""

    def __init__(self, gradients: Gradients, compute_s: float, plan: Plan, w: World):
        super().__init__()

        def parameter(size: float) -> nn.Parameter:
            return nn.Parameter(torch.zeros(max(1, round(size / 2))))
        self.tied: Tied | None = None
        self.reads: Reads | None = None
        if plan.way == "dense":
            self.table = parameter(gradients.head + gradients.tails)
        else:
            head, tails, read = (round(size / 2 / WIDTH) for size in (
                gradients.head, gradients.tails, gradients.tail_rows))
            self.tied = Tied(torch.zeros(head + tails, WIDTH), (head,))
            self.tokens, self.targets = head + torch.arange(read) * tails // read, torch.arange(read)
            if plan.way == "split":
                self.bias = nn.Parameter(torch.zeros(head + tails))
                Split([self.tied], w.rank, w.size, plan.wire, torch.optim.SGD(self.parameters()), self)
                self.reads = Reads(Shards((head, head + tails), w.size), self.tokens, [read])
                self.reads.ask_how_many()
                self.reads.ask_which(w.rank)
        self.layers = nn.ParameterList(parameter(gradients.rest / LAYERS) for _ in range(LAYERS))
        self.part_s = compute_s / (LAYERS + 1)

    def forward(self, x: Tensor) -> Tensor:
        tied, rows = self.tied, torch.zeros(0)
        if tied is not None:
            rows = tied.embed(self.tokens, reads=self.reads)
            x = x + rows.sum()
        else:
            x = _Slow.apply(x, self.table, 0.0)
        for layer in self.layers:
            x = _Slow.apply(x, layer, self.part_s)
        if tied is None or tied.tails is None or self.reads is None:
            return _Slow.apply(x, self.table if tied is None else tied.weight(), self.part_s)
        with torch.autocast("cpu", torch.bfloat16):              # hidden states have the products' bits
            sent = tied.tails.send([rows * 0 + x], [self.targets], self.bias, self.reads)
            x = _Slow.apply(x, tied.weight(), self.part_s, sent.score)
            return x + sent.nll()[0].sum()


def _rank(scene: Scene, pipe: Any) -> None:
    torch.set_num_threads(1)
    with world() as w:
        times: dict[str, list[float]] = {}
        busbw, hop_s = 0.0, 0.0
        for shaped in (False, True):
            shape(scene.mbit if shaped else None)
            w.barrier()
            if shaped:
                size = round(2 * scene.gradients.total)
                busbw = 2 * (w.size - 1) / w.size * size / all_reduce_s(w, size, rounds=3)
                hop_s = all_reduce_s(w, 4, rounds=20) / (2 * (w.size - 1))
            times |= {plan.name: _steps(w, plan, scene) for plan in scene.plans if plan.shaped == shaped}
        pipe.send(Measured(busbw, hop_s, times))
        pipe.recv()                                # until it is all over


def _steps(w: World, plan: Plan, scene: Scene) -> list[float]:
    """Seconds of each timed step. Two before them: DDP lays its buckets out after the first."""
    model = Sleeper(scene.gradients, scene.compute_s, plan, w)
    ddp = w.parallel(model, plan.wire, bucket_mib=plan.bucket_mb * 1e6 / scene.shrink / 2 ** 20 * (
        1 if plan.wire == "fp32" else 2))          # DDP counts float32, the wire 16 bits
    x = torch.zeros(1, requires_grad=True)

    found = []
    for _ in range(scene.rounds + 2):
        found.append(_timed(w, lambda: ddp(x).backward()))
        model.zero_grad(set_to_none=True)
    return found[2:]


def _timed(w: World, action: Callable[[], Any]) -> float:
    """Seconds on the slowest rank."""
    w.barrier()
    begin = time.perf_counter()
    action()
    return max(w.gather(time.perf_counter() - begin))


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""        # what is measured are links between processors
    leave(main(sys.argv[1:]))
