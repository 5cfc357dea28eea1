"""Tokens per second of a config's training step on this machine, and where the time goes.

    python -m benchmarks.train --config=demo
    python -m benchmarks.train --config=demo --set=recipe.precision=bf16 --record

The step is the engine's: forward, backward, clipping, optimizer, on random tokens of natural frequencies, so that no
data is needed. --record adds the row to benchmarks/train.md.
"""
from __future__ import annotations

import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from benchmarks.tables import commit
from configs import CONFIGS
from engine import optim
from engine.cli import flag, misuse, parse
from engine.metrics import peak_flops
from engine.precision import precision_for
from engine.run import processor
from engine.task import Position
from engine.values import BadValue, nearest, override
from engine.world import World, world
from txl.config import Recipe, flops_per_token
from txl.task import TransformerXLTask

TABLE = Path(__file__).with_name("train.md")
HEADING = "| date | commit | command | tokens/s | range | forward / backward / optimizer | peak GiB | MFU | machine |"


@dataclass(frozen=True)
class Flags:
    config: str = flag("a name of configs.py")
    set: tuple[str, ...] = flag("one field, as for launch.py; may be repeated", default=())
    rounds: int = flag("timed rounds; the median counts", default=5)
    steps: int = flag("steps of a round", default=10)
    record: bool = flag("add the row to benchmarks/train.md", default=False)


@dataclass(frozen=True)
class Timing:
    """Seconds of each round, and of its forward, backward and optimizer parts."""
    rounds: list[tuple[float, float, float]]
    tokens: int                                   # of a round, over all ranks

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each round, rising."""
        return sorted(self.tokens / sum(parts) for parts in self.rounds)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def __str__(self) -> str:
        parts = [statistics.median(x) for x in zip(*self.rounds)]
        return (f"{self.rate:,.0f} | {self.rates[0]:,.0f} to {self.rates[-1]:,.0f} | "
                + " / ".join(f"{part / sum(parts):.0%}" for part in parts))


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="-m benchmarks.train", about=__doc__)
    if min(flags.rounds, flags.steps) < 1:
        misuse("--rounds and --steps must be at least 1")
    if flags.config not in CONFIGS:
        misuse(f"There is no config {flags.config!r}.{nearest(flags.config, CONFIGS)}")
    try:
        recipe = cast(Recipe, override(CONFIGS[flags.config], *flags.set).recipe)
    except BadValue as error:
        misuse(str(error))
    with world() as w:
        timing = measure(recipe, w, flags.rounds, flags.steps)
        if not w.leads:
            return 0
        name = torch.cuda.get_device_name() if w.device.type == "cuda" else processor()
        peak = peak_flops(name, recipe.precision)
        flops = flops_per_token(recipe.model, recipe.context, _n_token(recipe))
        mfu = f"{timing.rate * flops / peak / w.size:.1%}" if peak else "no peak known"
        memory = (torch.cuda.max_memory_allocated() / 2 ** 30 if w.device.type == "cuda"
                  else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)
        command = " ".join([f"--config={flags.config}", *(f"--set={x}" for x in flags.set)])
        row = (f"| {time.strftime('%Y-%m-%d')} | {commit()} | `{command}` | {timing} | {memory:.2f} | {mfu} | "
               f"{w.size} x {name}, {torch.get_num_threads()} threads, torch {torch.__version__} |")
        print(f"{HEADING}\n{row}")
        if flags.record:
            with open(TABLE, "a") as table:
                table.write(row + "\n")
    return 0


def corpus(recipe: Recipe) -> Any:
    """Tokens whose frequencies fall like 1/rank (Zipf), as those of natural text do."""
    n_token = _n_token(recipe)
    weights = 1 / np.arange(1, n_token + 1)
    tokens = np.random.default_rng(0).choice(n_token, 1 << 20, p=weights / weights.sum()).astype(np.int32)
    return SimpleNamespace(splits={"train": tokens}, vocab=SimpleNamespace(start=0, hash=""), n_token=n_token)


def measure(recipe: Recipe, w: World, rounds: int, steps: int) -> Timing:
    """One round more than asked for is run, the first, to warm up."""
    task, precision = TransformerXLTask(recipe, corpus(recipe)), precision_for(recipe.precision, w.device)
    torch.manual_seed(recipe.seed)
    model = task.build().to(w.device)
    ddp = w.parallel(model)
    parameters = list(model.parameters())
    optimizer = optim.build(model.named_parameters(), recipe.optim, recipe.optim.peak_lr(recipe.batch.total(w.size)))
    data = task.steps(w, Position())
    carries: list[Any] = []
    timings: list[tuple[float, float, float]] = []
    for _ in range(rounds + 1):
        parts, tokens = [0.0, 0.0, 0.0], 0
        for _ in range(steps):
            step = next(data)
            carries = [None] * len(step.micro_batches) if step.fresh else carries
            for i, micro_batch in enumerate(step.micro_batches):
                with w.accumulating(ddp, more=i + 1 < len(step.micro_batches)):
                    clock = _clock(w)
                    with precision.autocast():
                        nats, carries[i] = task.loss(ddp, micro_batch, carries[i])
                    parts[0] += _clock(w) - clock
                    clock = _clock(w)
                    (nats * (w.size / step.tokens)).backward()
                    parts[1] += _clock(w) - clock
            clock = _clock(w)
            optim.clip_(parameters, recipe.optim.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            parts[2] += _clock(w) - clock
            tokens += step.tokens
        timings.append((parts[0], parts[1], parts[2]))
    return Timing(timings[1:], tokens)


def _n_token(recipe: Recipe) -> int:
    return recipe.data.n_token or 256


def _clock(w: World) -> float:
    """Now, when the device has done all it was given."""
    if w.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
