"""Latency of a segment and tokens per second of a config's inference, batch by batch, as NVIDIA measures them.

    python -m benchmarks.infer --config=nvidia_base --set=recipe.precision=bf16
    python -m benchmarks.infer --config=nvidia_large --batch=1,32 --against=CHECKOUT
    python -m benchmarks.infer --config=nvidia_base --batch=1 --threads=1 --clock=cpu --record

The protocol is its scripts/inference_benchmark.sh: a text is scored segment by segment by the recipe's test_context
(base: tgt_len 64, mem_len 640; large: 128, 1600), each segment timed alone; those during which memory fills do not
count. Weights are random, and tokens of natural frequencies: of a run's own weights and text `python -m txl.evaluate
--run=RUN --streams=1` says the same. --against runs another project's Transformer-XL beside it, eagerly, by turns
(benchmarks/race.py), its weights in the precision; ours computes under autocast, as evaluation does. The ratio is that
of the median latencies of a round. --record adds the rows to benchmarks/infer.md.
"""
from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import flags, peers
from benchmarks.machine import Clock, alone, described, now
from benchmarks.race import Contender, Ratio, race
from benchmarks.tables import command, dated
from benchmarks.train import corpus
from engine.cli import flag
from engine.precision import precision_for
from engine.values import BadValue
from txl.batches import Segment, Streams
from txl.config import Recipe
from txl.evaluate import filling
from txl.task import TransformerXLTask

TABLE = Path(__file__).with_name("infer.md")
PERCENTILES = (50, 90, 95, 99)
HEADING = ("| date | commit | command | batch | whose | tokens/s | ms a segment: mean; 50%, 90%, 95%, 99% within | "
           "ours is faster by | machine |")


@dataclass(frozen=True, kw_only=True)
class Flags(flags.Flags):
    batch: tuple[int, ...] = flag("streams read at once, several between commas", default=(1, 2, 4, 8, 16, 32))
    segments: int = flag("segments of a round", default=20)


@dataclass(frozen=True)
class How:
    """What a contender reads. A round: so many segments, by which clock."""
    recipe: Recipe
    batch: int
    segments: int
    clock: Clock
    threads: int | None


def main(argv: list[str]) -> int:
    return flags.run(Flags, argv, table, counted=["segments", "batch"], heading=HEADING, table=TABLE,
                     about=__doc__ or "")


def table(recipe: Recipe, given: Flags) -> list[str]:
    """The rows. Raises BadValue, Died."""
    rows = []
    for batch in given.batch:
        latencies = measure(How(recipe, batch, given.segments, given.clock, given.threads), given)
        rows += [_row(whose, latencies, batch, recipe, given) for whose in latencies]
    return rows


def measure(how: How, given: Flags) -> dict[str, list[list[float]]]:
    """Seconds of every segment of the timed rounds of each contender, ours first. Raises BadValue, Died."""
    found = peers.find_all(given.against)
    contenders: dict[str, Contender[list[float]]] = {"ours": partial(ours, how)}
    contenders |= {peer.name: partial(theirs, how, peer) for peer in found}
    return {whose: rounds[1:] for whose, rounds in race(contenders, given.rounds).items()}


def ours(how: How) -> Callable[[], list[float]]:
    """A contender."""
    device, context = alone(how.threads).device, how.recipe.context_of("test")
    precision, text = precision_for(how.recipe.precision, device), corpus(how.recipe)
    net = TransformerXLTask(how.recipe, text).build().to(device).eval()

    def read(segment: Segment, memory: Any) -> Any:
        memory = memory or net.reading(how.batch, context)
        return net(segment.tokens_BQ, segment.targets_BT, memory, context, segment.rows)[1]

    def under_autocast() -> Iterator[list[float]]:
        with precision.autocast():                # over all segments: it casts the weights once
            yield from _rounds(how, text, device, read)
    return under_autocast().__next__


def theirs(how: How, peer: peers.Peer) -> Callable[[], list[float]]:
    """A contender: another project's model, its weights in the precision, on our tokens."""
    device, context = alone(how.threads).device, how.recipe.context_of("test")
    precision, text = precision_for(how.recipe.precision, device), corpus(how.recipe)
    net = peer.build(how.recipe.model, text.n_token, context).to(device, precision.compute).eval()

    def read(segment: Segment, memory: Any) -> Any:
        return peer.forward(net, segment.tokens_BQ.t().contiguous(), segment.targets_BT.t().contiguous(), memory)[1]
    return _rounds(how, text, device, read).__next__


def _rounds(how: How, text: Any, device: torch.device,
            read: Callable[[Segment, Any], Any]) -> Iterator[list[float]]:
    """Endless: seconds of each segment of a round. The first round fills the memory."""
    context, cutoffs = how.recipe.context_of("test"), how.recipe.model.cutoffs
    streams = Streams(text.splits["train"], text.vocab.start, how.batch)
    whole = min(streams.lengths) // context.tgt_len
    if whole < 1:
        raise BadValue(f"{how.batch} streams of {context.tgt_len} tokens are more than the {len(text.splits['train'])} "
                       f"there are. Give a smaller --batch")
    segments = (streams.segment(range(how.batch), k, context, cutoffs).to(device)
                for k in itertools.cycle(range(whole)))
    memory, count = None, filling(context)
    with torch.no_grad():
        while True:
            seconds = []
            for segment in itertools.islice(segments, count):
                begin = now(how.clock, device)
                memory = read(segment, memory)
                seconds.append(now(how.clock, device) - begin)
            yield seconds
            count = how.segments


def _row(whose: str, latencies: dict[str, list[list[float]]], batch: int, recipe: Recipe, given: Flags) -> str:
    context, seconds = recipe.context_of("test"), list(itertools.chain(*latencies[whose]))
    mean, within = statistics.mean(seconds), np.percentile(seconds, PERCENTILES)
    ours_to_it = "" if whose == "ours" else Ratio.of(*(
        [statistics.median(x) for x in latencies[name]] for name in (whose, "ours")))
    used = command(given.config, given.set, f"--clock={given.clock}")
    return dated(
        f"`{used}` | {batch} x {context.tgt_len}, mem_len "
        f"{context.mem_len} | {whose} | {batch * context.tgt_len / mean:,.0f} | {1000 * mean:,.2f}; "
        f"{', '.join(f'{1000 * x:,.2f}' for x in within)} | {ours_to_it} | "
        f"{described(alone(given.threads), given.threads)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
