"""What the ranks of a config tell each other in a step, by tensor group, and how much of it hides behind backward.

    python -m benchmarks.communication --config=nvidia_base
    torchrun --nproc-per-node=2 -m benchmarks.communication --config=demo --record

Bytes are those of the gradients as they travel (recipe.optim.exchange); of an all-reduce by n ranks each sends
2 (n - 1) / n times as many. With several ranks also the overlap, 1 - (step - step without exchange) / exchange alone,
of benchmarks.train's steps. --record adds the row to benchmarks/communication.md.
"""
from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from benchmarks.machine import described, set_threads
from benchmarks.tables import command, dated, named, show
from benchmarks.train import How, ours
from engine.cli import flag, misuse, parse
from engine.config import Wire
from engine.exchange import TYPES
from engine.expect import all_reduce_s
from engine.tied import travelling_early
from engine.values import BadValue
from engine.weights import freeze
from engine.world import World, leave, world
from txl.config import Recipe
from txl.model import TransformerXL

TABLE = Path(__file__).with_name("communication.md")
HEADING = ("| date | commit | command | MB a step | by group | ms: with exchange / without / it alone | overlap | "
           "machine |")


@dataclass(frozen=True)
class Flags:
    config: str = flag("a name of configs.py")
    set: tuple[str, ...] = flag("one field, as for launch.py; may be repeated", default=())
    rounds: int = flag("timed rounds; the median counts", default=5)
    steps: int = flag("steps of a round", default=5)
    threads: int | None = flag("of torch in each rank; none: torch's own choice", default=None)
    record: bool = flag("add the row to benchmarks/communication.md", default=False)


@dataclass(frozen=True)
class Timing:
    """Of a step, in seconds."""
    with_exchange: float
    without: float
    alone: float

    def __str__(self) -> str:
        overlap = 1 - (self.with_exchange - self.without) / self.alone
        return (f"{1000 * self.with_exchange:,.1f} / {1000 * self.without:,.1f} / {1000 * self.alone:,.1f} | "
                + (f"{overlap:.0%}" if overlap >= 0 else "ranks wait for each other longer than the exchange takes"))


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="-m benchmarks.communication", about=__doc__)
    if min(flags.rounds, flags.steps, flags.threads or 1) < 1:
        misuse("--rounds, --steps and --threads must be at least 1")
    try:
        recipe = cast(Recipe, named(flags.config, *flags.set).recipe)
        if recipe.data.n_token is None:
            raise BadValue(f"What {flags.config} sends follows from its data. Give --set=recipe.data.n_token=N")
        with world() as w:
            set_threads(flags.threads)
            timing = measure(recipe, flags, w) if w.size > 1 else "one rank sends nothing | "
            if w.leads:
                show(HEADING, [_row(recipe, flags, w, timing)], TABLE if flags.record else None)
    except BadValue as error:
        misuse(str(error))
    return 0


def sent(recipe: Recipe, n_token: int) -> dict[str, int]:
    """Bytes of gradients of a step by group. A tied table is embedding and softmax at once; where it travels in two
    parts (engine/tied.py), the head is in both, and where it is split (engine/split.py) the tails are in none. What
    rows of the tails and hidden states make follows from the text."""
    with torch.device("meta"):
        net = TransformerXL(recipe.model, n_token)
    freeze(net, recipe.frozen)
    groups: dict[str, int] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            for group, elements in _groups(recipe, name, parameter.shape):
                groups[group] = groups.get(group, 0) + elements * wire_type(recipe.wire).itemsize
    if travelling_early(net):
        groups["word table: head, again"] = groups["word table: head"]
        if recipe.clock.split_tails:
            groups["word table: tails"] = 0
    return groups


def wire_type(wire: Wire) -> torch.dtype:
    return TYPES.get(wire, torch.float32)


def measure(recipe: Recipe, flags: Flags, w: World) -> Timing:
    """Collective. The same on every rank."""
    one_round = ours(recipe, How(flags.steps, "wall", flags.threads), w)
    rounds = [one_round().seconds for _ in range(flags.rounds + 1)][1:]
    whole = statistics.median(sum(seconds.values()) for seconds in rounds) / flags.steps
    exposed = statistics.median(seconds["communication"] for seconds in rounds) / flags.steps
    size = sum(sent(recipe, recipe.data.n_token or 0).values())
    alone = all_reduce_s(w, size, flags.rounds, wire_type(recipe.wire))
    with_exchange, without = (max(w.gather(x)) for x in (whole, whole - exposed))
    return Timing(with_exchange, without, alone)


def _groups(recipe: Recipe, name: str, shape: torch.Size) -> Iterator[tuple[str, int]]:
    """Into which groups a parameter falls, and with how many elements."""
    part, _, index = name.removeprefix("vocabulary.").partition(".")
    if name.startswith("vocabulary.") and part in ("tables", "out_tables"):
        table = "word table" if recipe.model.tie_weight else {"tables": "embedding", "out_tables": "softmax"}[part]
        head = shape.numel()
        if recipe.model.div_val == 1 and recipe.model.cutoffs:
            head = recipe.model.cutoffs[0] * shape[1]
        elif int(index) > 0:
            head = 0
        yield f"{table}: head", head
        yield f"{table}: tails", shape.numel() - head
    elif name.startswith("vocabulary."):
        yield "projections, clusters and biases", shape.numel()
    else:
        yield "layers" if name.startswith("layers.") else "rest", shape.numel()


def _row(recipe: Recipe, flags: Flags, w: World, timing: Timing | str) -> str:
    groups = {group: size for group, size in sent(recipe, recipe.data.n_token or 0).items() if size}
    return dated(
        f"`{command(flags.config, flags.set)}` | {sum(groups.values()) / 1e6:,.1f} | "
        f"{', '.join(f'{group} {size / 1e6:,.1f}' for group, size in groups.items())} | {timing} | "
        f"{described(w, flags.threads)}")


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
