"""What a model brings to the engine: its module, its batches, its loss, its evaluation."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from engine.world import World


@dataclass(frozen=True)
class Position:
    """Where in the data a step begins. `steps` is how many an epoch has, so that a run with other batches can find
    the same place."""
    epoch: int = 0
    index: int = 0
    steps: int = 1


@dataclass(frozen=True)
class Step:
    """The data of one optimizer step on one rank."""
    position: Position
    following: Position
    micro_batches: tuple[Any, ...]
    tokens: int                                   # targets over all ranks and micro-batches
    fresh: bool                                   # the text starts anew: what was carried does not belong to it


@dataclass(frozen=True)
class Score:
    """An evaluation: the sum over all ranks, and in words how it was measured."""
    nats: float
    tokens: int
    seconds: float
    protocol: str

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens


class Task(Protocol):
    """`carry` is what passes from a micro-batch to the next one of the same sequences: opaque to the engine, None at
    the start of a text, made of tensors, numbers, tuples and lists so that it can be saved."""

    @property
    def flops_per_token(self) -> float:
        """Of training, for MFU."""
        ...

    @property
    def vocabulary(self) -> str:
        """A hash of what the token ids mean: weights are of no use to another."""
        ...

    @property
    def sizes(self) -> dict[str, float]:
        """More sizes worth a TensorBoard tag, sizes/NAME."""
        ...

    @property
    def eval_sets(self) -> tuple[str, ...]:
        """Further splits that every validation scores and reports by name; they choose no checkpoint."""
        ...

    def build(self) -> nn.Module:
        """The model, initialised from torch's generator, on the CPU."""
        ...

    def steps(self, world: World, start: Position) -> Iterator[Step]:
        """Endless, from `start` on."""
        ...

    def loss(self, model: nn.Module, micro_batch: Any, carry: Any) -> tuple[Tensor, Any]:
        """The sum of the nats of this rank's targets, and the carry."""
        ...

    def evaluate(self, model: nn.Module, split: str, world: World) -> Score:
        """The split's exact loss; collective."""
        ...
