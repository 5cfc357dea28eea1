"""Tokens per second of a config's training step on this machine, and where the time and the memory go.

    python -m benchmarks.train --config=demo
    python -m benchmarks.train --config=demo --set=recipe.precision=bf16 --record
    python -m benchmarks.train --config=race_small --against=CHECKOUT --against=CHECKOUT --threads=1 --clock=cpu
    python -m benchmarks.train --config=race_real --steps=1 --against=CHECKOUT --peer_optim=adam
    python -m benchmarks.train --config=nvidia_large --set=recipe.precision=bf16 --profile=trace.json
    torchrun --nproc-per-node=8 -m benchmarks.train --config=nvidia_base

The step is the engine's: forward, backward, clipping, optimizer, on random tokens of natural frequencies, so that no
data is needed. --against runs the Transformer-XL of another project beside it (benchmarks/peers.py): the same model,
tokens, precision, learning rate and clipping, each with its own optimizer, in processes that take turns
(benchmarks/race.py). On a machine that others use, one thread and the processor's clock can be trusted.

With several ranks communication is what backward takes more than without it: the part that does not hide behind it.

Memory is what a contender has more than before it made its model, at the most, while rounds are timed: weights,
gradients, moments, what is kept for backward. On a CPU that is the resident set, which also holds what the allocator
keeps; on a GPU it is what torch has allocated. --record adds the rows to benchmarks/train.md.
"""
from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks import flags, peers
from benchmarks.machine import (
    Clock,
    alone,
    bytes_now,
    described,
    device_name,
    forget_peak,
    now,
    peak_bytes,
    set_threads,
)
from benchmarks.race import Contender, Ratio, race
from benchmarks.tables import command, dated
from engine.cli import flag
from engine.metrics import peak_flops
from engine.precision import precision_for
from engine.step import Learner
from engine.task import Position, Step
from engine.values import BadValue
from engine.watch import Timed
from engine.world import World, world
from txl.config import Recipe, flops_per_token
from txl.task import TransformerXLTask

TABLE = Path(__file__).with_name("train.md")
HEADING = ("| date | commit | command | whose | tokens/s | ours is faster by | ms a step: load + forward + backward + "
           "communication + optimizer | peak GiB, ours has | loss, first and last | MFU | machine |")
PARTS = ("load", "forward", "backward", "communication", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Flags(flags.Flags):
    peer_optim: Literal["own", "adam"] = flag("adam: also for those whose own is another", default="own")
    steps: int = flag("steps of a round", default=10)
    profile: str | None = flag("a file for torch's trace of one round more (chrome://tracing)", default=None)


@dataclass(frozen=True)
class How:
    """A round: how many steps, and by which clock."""
    steps: int
    clock: Clock
    threads: int | None


@dataclass(frozen=True)
class Round:
    """What one round of a contender was. Pickled."""
    seconds: dict[str, float]                     # by part
    tokens: int                                   # over all ranks
    losses: tuple[float, float]                   # of its first and last step, nats a token
    peak_bytes: int
    params: int

    @property
    def rate(self) -> float:
        return self.tokens / sum(self.seconds.values())


def main(argv: list[str]) -> int:
    return flags.run(Flags, argv, table, counted=["steps"], heading=HEADING, table=TABLE, about=__doc__ or "")


def table(recipe: Recipe, given: Flags) -> list[str]:
    """The rows, of the leading rank. Raises BadValue, Died."""
    with world() as w:
        set_threads(given.threads)
        rounds = measure(recipe, given, w)
        return _rows(rounds, recipe, given, w) if w.leads else []


def measure(recipe: Recipe, given: Flags, w: World) -> dict[str, list[Round]]:
    """The rounds of each contender, ours first: one to warm up, then those that count. Raises BadValue, Died."""
    how = How(given.steps, given.clock, given.threads)
    if not given.against:
        one_round = ours(recipe, how, w)
        rounds = [one_round() for _ in range(given.rounds + 1)]
        if given.profile is not None:
            _profile(one_round, Path(given.profile), w)
        return {"ours": rounds}
    if given.profile is not None:
        raise BadValue("--profile is of ours alone: leave --against out")
    if w.size > 1:
        raise BadValue("--against is a race of single processes: start it without torchrun")
    contenders: dict[str, Contender[Round]] = {"ours": partial(ours, recipe, how)}
    contenders |= {peer.name: partial(theirs, recipe, how, peer, given.peer_optim == "adam")
                   for peer in peers.find_all(given.against)}
    return race(contenders, given.rounds)


def ours(recipe: Recipe, how: How, w: World | None = None) -> Callable[[], Round]:
    """A contender. Without a world, a process alone."""
    w = w or alone(how.threads)
    task, begin = TransformerXLTask(recipe, corpus(recipe)), bytes_now(w.device)
    learner = Learner(w, task, recipe)
    learner.distribute()

    def take(step: Step, timed: Timed) -> Tensor:
        return learner.take(step, learner.peak_lr, timed)[0] * (w.size / step.tokens)

    def take_silently(step: Step, timed: Timed) -> None:
        with w.accumulating(learner.parallel, more=True):         # as if another micro-batch came, so nothing is sent
            learner.take(step, 0.0, timed)
    return _rounds(learner.ahead(task.steps(w, Position())), take, how, w.device, begin,
                   sum(p.numel() for p in learner.parameters), take_silently if w.size > 1 else None)


def theirs(recipe: Recipe, how: How, peer: peers.Peer, adam: bool) -> Callable[[], Round]:
    """A contender: another project's model on our tokens, in a loop like its own."""
    w = alone(how.threads)
    task, precision = TransformerXLTask(recipe, corpus(recipe)), precision_for(recipe.precision, w.device)
    peer.load()
    begin = bytes_now(w.device)
    torch.manual_seed(recipe.seed)
    net = peer.build(recipe.model, task.corpus.n_token, recipe.context).to(w.device)
    parameters, lr = list(net.parameters()), recipe.optim.peak_lr(recipe.batch.total(1))
    optimizer = torch.optim.Adam(parameters, lr=lr) if adam else peer.optimizer(parameters, lr)
    scaler = precision.scaler()
    memories: list[Any] = []

    def take(step: Step, timed: Timed) -> Tensor:
        total = torch.zeros((), device=w.device)
        memories[:] = [None] * len(step.micro_batches) if step.fresh else memories
        for i, segment in enumerate(step.micro_batches):
            with timed.part("forward"), precision.autocast():
                nll_TB, memories[i] = peer.forward(net, segment.tokens_BQ.t().contiguous(),
                                                   segment.targets_BT.t().contiguous(), memories[i])
                loss = nll_TB.float().mean() / len(step.micro_batches)
            with timed.part("backward"):
                scaler.scale(loss).backward()
            total += loss.detach()
        with timed.part("optimizer"):
            if recipe.optim.clip is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, recipe.optim.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        return total
    return _rounds(task.steps(w, Position()), take, how, w.device, begin, sum(p.numel() for p in parameters))


def corpus(recipe: Recipe) -> Any:
    """Tokens whose frequencies fall like 1/rank (Zipf), as those of natural text do: a million, in whole steps."""
    n_token, of_step = recipe.data.n_token or 256, recipe.batch.total(1) * recipe.context.tgt_len
    weights, count = 1 / np.arange(1, n_token + 1), max(1, (1 << 20) // of_step) * of_step
    tokens = np.random.default_rng(0).choice(n_token, count, p=weights / weights.sum()).astype(np.int32)
    return SimpleNamespace(splits={"train": tokens}, vocab=SimpleNamespace(start=0, hash=""), n_token=n_token)


def _rounds(data: Iterator[Step], take: Callable[[Step, Timed], Tensor], how: How, device: torch.device, begin: int,
            params: int, silent: Callable[[Step, Timed], None] | None = None) -> Callable[[], Round]:
    """Rounds of steps, each of which `take` takes and gives its loss. `begin`: bytes in use without the model.

    As many `silent` ones after them tell how much of backward was communication that it did not hide.
    """
    def one_round() -> Round:
        timed, losses, tokens = Timed(partial(now, how.clock, device)), [], 0
        forget_peak(device)
        for _ in range(how.steps):
            with timed.part("load"):
                step = next(data)
            losses.append(take(step, timed))
            tokens += step.tokens
        seconds = timed.seconds | {"communication": 0.0}
        if silent is not None:
            quiet = Timed(partial(now, how.clock, device))
            for _ in range(how.steps):
                silent(next(data), quiet)
            seconds["backward"] = min(timed.seconds["backward"], quiet.seconds["backward"])
            seconds["communication"] = timed.seconds["backward"] - seconds["backward"]
        return Round(seconds, tokens, (losses[0].item(), losses[-1].item()), peak_bytes(device) - begin, params)
    return one_round


def _profile(one_round: Callable[[], Round], path: Path, w: World) -> None:
    """A round on all ranks, seen by the leading one: a trace of each operation, and what the dearest sum up to."""
    with torch.profiler.profile() if w.leads else nullcontext() as profile:
        one_round()
    if profile is not None:
        profile.export_chrome_trace(str(path))
        by = f"self_{w.device.type}_time_total"
        print(profile.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=60), file=sys.stderr)


def _rows(rounds: dict[str, list[Round]], recipe: Recipe, given: Flags, w: World) -> list[str]:
    timed = {whose: of[1:] for whose, of in rounds.items()}
    own = timed["ours"]
    peak = peak_flops(device_name(w.device), recipe.precision)
    flops = flops_per_token(recipe.model, recipe.context, recipe.data.n_token or 256)
    used = command(given.config, given.set, f"--steps={given.steps}", f"--clock={given.clock}",
                   *(["--peer_optim=adam"] if given.peer_optim == "adam" else []))
    rows = []
    for whose, of in timed.items():
        rates, ms = sorted(x.rate for x in of), [1000 * statistics.median(x.seconds[part] for x in of) / given.steps
                                                 for part in PARTS]
        gib, own_gib = (max(x.peak_bytes for x in y) / 2 ** 30 for y in (of, own))
        rate, another = statistics.median(rates), whose != "ours"
        rows.append(dated(
            f"`{used}` | {whose} | "
            f"{rate:,.0f} ({rates[0]:,.0f} to {rates[-1]:,.0f}) | "
            f"{Ratio.of([x.rate for x in own], [x.rate for x in of]) if another else ''} | "
            f"{sum(ms):,.1f}: {' + '.join(f'{x:,.1f}' for x in ms)} | "
            f"{gib:.2f}{f', {own_gib / gib:.2f} of it' if another else ''} | "
            f"{rounds[whose][0].losses[0]:.3f}, {of[-1].losses[1]:.3f} | "
            f"{f'{rate * flops / peak / w.size:.1%}' if peak else 'no peak known'} | "
            f"{described(w, given.threads)}, {of[0].params:,} parameters"))
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
