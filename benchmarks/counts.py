"""What a step of training, and a segment of the test, order of a device, counted rather than timed: kernels, and bytes
of the optimizer.

    python -m benchmarks.counts --config=nvidia_base

One micro-batch and one optimizer step in eager mode, in fp32, at the config's own size, with torch's fake tensors:
nothing is computed, and any machine counts the same. A kernel is an operation that reaches the device and is neither a
view nor an allocation; one for many tensors (foreach) is one. Bytes are those of all tensors that an operation of
clipping and optimizer takes or returns: a fused one counts its tensors once, a chain of operations each time. The
segment is one stream's, read with a full memory.
"""
from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.tables import named
from benchmarks.train import corpus
from engine.cli import flag, misuse, parse
from engine.config import Batch
from engine.fused import as_on_a_gpu
from engine.step import Learner
from engine.task import Position
from engine.values import BadValue
from engine.watch import Timed
from engine.world import World
from txl.batches import Segment, Streams
from txl.config import Recipe
from txl.memory import Kept, Memory
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
    others: int                                   # of none of these: the loss of the micro-batches is added up
    optimizer_bytes: int
    params: int

    @property
    def kernels(self) -> int:
        return self.forward + self.backward + self.optimizer + self.others

    def __str__(self) -> str:
        return (f"{self.kernels:,} kernels: {self.forward:,} forward, {self.backward:,} backward, {self.optimizer:,} "
                f"clipping and optimizer, which move {self.optimizer_bytes / self.params:.1f} bytes a parameter "
                f"({self.params:,}), {self.others:,} others")


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


@dataclass
class Counted(Timed):
    """Counts the parts of a step instead of timing them."""
    ops: Ops = field(default_factory=Ops)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        with self.ops.part(name):
            yield


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="-m benchmarks.counts", about=__doc__ or "")
    try:
        recipe = cast(Recipe, named(flags.config, *flags.set).recipe)
        print(f"{count(recipe)}\n{reading(recipe)} kernels to read a segment")
    except BadValue as error:
        misuse(str(error))
    return 0


def count(recipe: Recipe) -> Counts:
    """Of a step with a memory and moments, as all but the first are."""
    recipe = replace(recipe, precision="fp32",
                     batch=Batch(size=min(recipe.batch.micro_size or 32, recipe.batch.total(1))))
    alone, task, fake = World(0, 0, 1, torch.device("cpu")), TransformerXLTask(recipe, corpus(recipe)), FakeTensorMode()
    with fake:
        learner = Learner(alone, task, recipe, task.build())
    for step in itertools.islice(task.steps(alone, Position()), 2):
        counted, segment = Counted(), _faked(fake, step.micro_batches[0])
        with fake, as_on_a_gpu(), counted.ops:
            learner.take(replace(step, micro_batches=(segment,)), learner.peak_lr, counted)
    kernels, moved = counted.ops.kernels, counted.ops.bytes
    return Counts(kernels["forward"], kernels["backward"], kernels["optimizer"], kernels[""], moved["optimizer"],
                  sum(p.numel() for p in learner.parameters))


def reading(recipe: Recipe, batch: int = 1) -> int:
    """Kernels of a segment of the test in so many streams, in fp32."""
    text, context, fake = corpus(recipe), recipe.context_of("test"), FakeTensorMode()
    streams = Streams(text.splits["train"], text.vocab.start, batch)
    with fake:
        net = TransformerXLTask(recipe, text).build().eval()
        fresh: Memory = net.reading(batch, context)
        memory = replace(fresh, length=context.mem_len) if isinstance(fresh, Kept) else (fresh[0], context.mem_len)
    for k in range(2):
        segment, ops = _faked(fake, streams.segment(range(batch), k, context, recipe.model.cutoffs)), Ops()
        with fake, torch.no_grad(), as_on_a_gpu(), ops:
            memory = net(segment.tokens_BQ, segment.targets_BT, memory, context, segment.rows)[1]
    return ops.kernels[""]


def _faked(fake: FakeTensorMode, segment: Segment) -> Segment:
    return Segment(fake.from_tensor(segment.tokens_BQ), fake.from_tensor(segment.targets_BT),
                   tuple(map(fake.from_tensor, segment.rows)), segment.in_tails)


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
