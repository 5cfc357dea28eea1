"""A plan: everything a launch is going to do, as one frozen value that prints. Standard library only."""
from __future__ import annotations

import shlex
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.run import NEW, Standing
from cluster.spec import LOCAL, Config, Terms


@dataclass(frozen=True)
class Node:
    """One machine's part: a torchrun agent that starts `ranks` processes with `env` added to theirs."""
    rank: int
    address: str
    ranks: int
    env: dict[str, str]
    command: tuple[str, ...]

    def __str__(self) -> str:
        env = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.env.items())
        return f"{env} {shlex.join(self.command)}".strip()


@dataclass(frozen=True)
class Layout:
    """A backend's part of a plan. `machines`, `cost` and `setup` are for people."""
    nodes: tuple[Node, ...]
    machines: str
    cost: str
    setup: str
    notes: tuple[str, ...] = ()
    ask: str | None = None                        # a question to answer with yes before it is carried out
    facts: Any = None                             # what the backend saw, for it to act on
    standing: Standing | None = None              # where the backend knows of more than the run's folder here
    script: str | None = None                     # that is submitted, where not each node is given its command

    @property
    def ranks(self) -> int:
        return sum(node.ranks for node in self.nodes)


@dataclass(frozen=True)
class Plan:
    """What `launch.py` prints, and what a backend carries out."""
    name: str                                     # of the run
    config_name: str
    config: Config                                # with the overrides applied
    backend: str
    layout: Layout
    overrides: tuple[str, ...] = ()               # as --set takes them, whatever flag they came from
    command: str = ""                             # the command line that leads here again
    standing: Standing = NEW
    tensorboard: bool = False
    terms: Terms = field(default_factory=Terms)

    def __post_init__(self):
        """Raises ValueError where so many ranks cannot train it, or the run would go on with another batch."""
        batch, ranks, before = self.config.recipe.batch, self.layout.ranks, self.standing
        self.config.recipe.check_ranks(ranks)
        total = batch.total(ranks)
        if before.ranks is not None and (old := batch.total(before.ranks)) != total:
            raise ValueError(f"{self.run_dir} went up to step {before.step} with {old} sequences a step, "
                             f"batch.local_size={batch.local_size} on each of {before.ranks} rank(s). Here it would "
                             f"have {ranks} rank(s) and {total} sequences: another curve. Go on with {before.ranks} "
                             f"rank(s), or choose another --name")

    @property
    def run_dir(self) -> Path:
        return Path("runs", self.name)

    def __str__(self) -> str:
        recipe, ranks = self.config.recipe, self.layout.ranks
        batch, total = recipe.batch, recipe.batch.total(ranks)
        shares = sorted({len(batch.share(rank, ranks)) for rank in range(ranks)})
        pieces = sorted({len(batch.micro_batches(rank, ranks)) for rank in range(ranks)})
        tokens, steps = total * recipe.tokens_per_sequence, self.steps
        params = f"{recipe.params:,} parameters" if recipe.params else "as many parameters as the vocabulary makes it"
        rows = [
            ("run", f"{self.run_dir}: {self.standing}{self._regrouped}"),
            ("config", f"{self.config_name}: {self.config.about}"),
            *(("set", override) for override in self.overrides),
            ("machines", f"{self.layout.machines} (--backend={self.backend})"),
            ("cost", self.layout.cost),
            ("model", f"{recipe.entry.partition('.')[0]}, {params}, {recipe.precision}"),
            ("batch", f"{total} sequences over {ranks} rank(s), {_span(shares)} each, "
                      f"in {_span(pieces)} micro-batch(es)"),
            ("lr", f"{recipe.optim.name}, peak {recipe.optim.peak_lr(total):.4g}"),
            ("length", f"{steps:,} steps of {tokens:,} tokens: {steps * tokens:,} to the end"),
            ("setup", self.layout.setup),
            *(("note", note) for note in self.layout.notes),
            *((f"node {node.rank}", f"{node.address}: {node}") for node in self.layout.nodes if not self.layout.script),
        ]
        return "\n".join(_row(label, text) for label, text in rows)

    @property
    def _regrouped(self) -> str:
        before = self.standing.ranks
        return "" if before in (None, self.layout.ranks) else (
            f", with {self.layout.ranks} rank(s) instead of {before}: memories start empty")

    @property
    def steps(self) -> int:
        """Steps from the first to the last."""
        stop, recipe = self.config.recipe.stop, self.config.recipe
        tokens = recipe.batch.total(self.layout.ranks) * recipe.tokens_per_sequence
        ends = [stop.max_steps, None if stop.max_tokens is None else -(-stop.max_tokens // tokens)]
        return min(end for end in ends if end is not None)


def torchrun(python: str, entry: str, recipe: Path, *, nnodes: int, node_rank: int | str, ranks: int,
             master_addr: str, master_port: int | str) -> tuple[str, ...]:
    """The line that starts one node's share of a training."""
    return (python, "-m", "torch.distributed.run", f"--nnodes={nnodes}", f"--nproc-per-node={ranks}",
            f"--node-rank={node_rank}", f"--master-addr={master_addr}", f"--master-port={master_port}",
            "-m", entry, str(recipe))


def price(config: Config) -> str:
    """What the config's own machines cost on demand."""
    machines, usd = config.machines, config.machines.usd_per_hour
    if machines.kind == LOCAL:
        return "$0"
    return f"{machines.count} x {machines.kind}: " + (
        f"${usd:.2f} per hour on demand" if usd is not None else "price unknown, the kind is not in cluster/spec.py")


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _row(label: str, text: str) -> str:
    """Prose in lines of 110 characters; a node's command stays in one, to be copied."""
    row = f"{label:<9} {text}"
    return row if label.startswith("node ") else textwrap.fill(row, 110, subsequent_indent=" " * 10)
