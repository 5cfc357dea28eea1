"""A run's start, from torch imported to where its first step begins, timed in parts; benchmarks/data.py starts it.

    python -m benchmarks.start runs/NAME/recipe.json

It does what txl/train.py does, in one process and to the same folder, and ends where the model would read the first
batch. Nothing but torch is imported before.
"""
from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PARTS = ("imports", "data", "build", "optimizer", "rest")


class FirstStep(Exception):
    """It would begin here."""


class Parts:
    """[seconds of the clock, of all threads on the processor] of each part."""

    def __init__(self) -> None:
        self.seconds = {name: [0.0, 0.0] for name in PARTS}
        self._begin = self._now()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self.seconds[name] = [x + y for x, y in zip(self.seconds[name], self._since(begin))]

    def end(self) -> None:
        """What was in no part is the rest."""
        whole = self._since(self._begin)
        self.seconds["rest"] = [x - sum(parts) for x, parts in zip(whole, zip(*self.seconds.values()))]

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def _since(self, begin: tuple[float, float]) -> list[float]:
        return [y - x for x, y in zip(begin, self._now())]


def start(path: Path) -> dict[str, list[float]]:
    """Of the recipe in `path`, in a process that has done nothing else."""
    parts = Parts()
    with parts.part("imports"):
        from engine import optim
        from engine.loop import train
        from engine.run import Run
        from engine.task import Position, Step
        from engine.world import World, world
        from txl.model import TransformerXL
        from txl.task import TransformerXLTask, read_recipe
        from txl.train import same_corpus
        gc.freeze()

    class Watched(TransformerXLTask):
        def build(self) -> TransformerXL:
            with parts.part("build"):
                return super().build()

        def steps(self, world: World, start: Position) -> Iterator[Step]:
            with parts.part("data"):
                steps = super().steps(world, start)
                first = next(steps)
            yield first
            yield from steps

        def loss(self, *_: Any) -> Any:
            raise FirstStep

    make = optim.build

    def build(*args: Any) -> torch.optim.Optimizer:
        with parts.part("optimizer"):
            return make(*args)
    vars(optim)["build"] = build
    recipe = read_recipe(path)
    with world() as w:
        run = Run(path.parent, w)
        with parts.part("data"):
            corpus = same_corpus(w, recipe.data)
        run.listen()
        try:
            train(w, Watched(recipe, corpus), recipe, run)
        except FirstStep:
            parts.end()
    return parts.seconds


if __name__ == "__main__":
    print(json.dumps(start(Path(sys.argv[1]))))
