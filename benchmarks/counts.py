"""What a training step orders of a device, counted rather than timed: kernels, and bytes of the optimizer.

    python -m benchmarks.counts --config=nvidia_base

One micro-batch and one optimizer step in eager mode, in fp32, at the config's own size, with torch's fake tensors:
nothing is computed, and any machine counts the same. A kernel is an operation that reaches the device and is neither a
view nor an allocation; one for many tensors (foreach) is one. Bytes are those of all tensors that an operation of
clipping and optimizer takes or returns: a fused one counts its tensors once, a chain of operations each time.
"""
from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.train import corpus
from configs import CONFIGS
from engine import optim
from engine.cli import flag, misuse, parse
from engine.config import Batch
from engine.task import Position
from engine.values import BadValue, nearest, override
from engine.world import World
from txl.batches import Segment
from txl.config import Recipe
from txl.task import TransformerXLTask

ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")


@dataclass(frozen=True)
class Flags:
    config: str = flag("a name of configs.py")
    set: tuple[str, ...] = flag("one field, as for launch.py; may be repeated", default=())


@dataclass(frozen=True)
class Counts:
    """Of one step."""
    forward: int                                  # kernels
    backward: int
    optimizer: int                                # with clipping
    optimizer_bytes: int
    params: int

    @property
    def kernels(self) -> int:
        return self.forward + self.backward + self.optimizer

    def __str__(self) -> str:
        return (f"{self.kernels:,} kernels: {self.forward:,} forward, {self.backward:,} backward, {self.optimizer:,} "
                f"clipping and optimizer, which move {self.optimizer_bytes / self.params:.1f} bytes a parameter "
                f"({self.params:,})")


class Ops(TorchDispatchMode):
    """Counts what reaches the device, by parts."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes = Counter[str](), Counter[str]()
        self._part = ""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._part = name
        yield
        self._part = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(of) if isinstance(x, torch.Tensor)] for of in ((args, kwargs), result))
        writes = any(x.alias_info is not None and x.alias_info.is_write for x in func._schema.arguments)
        new = {_storage(x) for x in made} - {_storage(x) for x in given}
        if (writes or new) and func._schema.name not in ALLOCATIONS:
            self.kernels[self._part] += 1
            self.bytes[self._part] += sum(x.nbytes for x in (*given, *made))
        return result


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="-m benchmarks.counts", about=__doc__ or "")
    if flags.config not in CONFIGS:
        misuse(f"There is no config {flags.config!r}.{nearest(flags.config, CONFIGS)}")
    try:
        print(count(cast(Recipe, override(CONFIGS[flags.config], *flags.set).recipe)))
    except BadValue as error:
        misuse(str(error))
    return 0


def count(recipe: Recipe) -> Counts:
    """Of a step with a memory and moments, as all but the first are."""
    recipe = replace(recipe, precision="fp32",
                     batch=Batch(size=min(recipe.batch.micro_size or 32, recipe.batch.total(1))))
    task = TransformerXLTask(recipe, corpus(recipe))
    steps, fake, memory = task.steps(World(0, 0, 1, torch.device("cpu")), Position()), FakeTensorMode(), None
    with fake:
        model = task.build()
        optimizer = optim.build(model.named_parameters(), recipe.optim, 1.0)
    for step in itertools.islice(steps, 2):
        ops, segment = Ops(), step.micro_batches[0]
        segment = Segment(fake.from_tensor(segment.tokens_BQ), fake.from_tensor(segment.targets_BT),
                          tuple(map(fake.from_tensor, segment.rows)))
        with fake, ops:
            with ops.part("forward"):
                nats, memory = task.loss(model, segment, memory)
            with ops.part("backward"):
                (nats / step.tokens).backward()
            with ops.part("optimizer"):
                optim.clip_(model.parameters(), recipe.optim.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return Counts(ops.kernels["forward"], ops.kernels["backward"], ops.kernels["optimizer"], ops.bytes["optimizer"],
                  sum(p.numel() for p in model.parameters()))


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
