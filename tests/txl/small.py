"""The smallest real training: a few hundred random tokens and a model of a few thousand parameters."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from engine.config import Batch, Clock, Optim, Schedule, Stop
from engine.loop import Outcome, train
from engine.run import Run
from engine.world import world
from txl.config import Context, Data, Model, Recipe
from txl.task import TransformerXLTask

N_TOKEN = 30
RECIPE = Recipe(
    model=Model(n_layer=2, d_model=16, n_head=2, d_head=8, d_inner=24, dropout=0.1, dropatt=0.1, cutoffs=(10, 20)),
    data=Data("text", "nowhere"), context=Context(tgt_len=8, mem_len=8), eval_context=Context(tgt_len=8, mem_len=8),
    eval_streams=3, batch=Batch(size=4), optim=Optim("lamb", lr=0.01), schedule=Schedule("cosine", warmup_steps=3),
    stop=Stop(max_steps=20), clock=Clock(log_interval=4, eval_interval=10, checkpoint_interval=3, keep_checkpoints=99))


def corpus(train: np.ndarray | None = None, n_token: int = N_TOKEN, length: int = 330) -> SimpleNamespace:
    """A corpus in memory. With 4 streams of 8 tokens a step, 330 tokens make an epoch of 11 steps with a short end."""
    generator = np.random.default_rng(5)

    def text(n: int) -> np.ndarray:                               # each token depends on the one before: learnable
        tokens = np.cumsum(generator.integers(1, 4, n)) % n_token
        return tokens.astype(np.uint16)
    splits = {"train": text(length) if train is None else train, "valid": text(101), "test": text(97)}
    return SimpleNamespace(splits=splits, vocab=SimpleNamespace(start=0, hash="small"), n_token=n_token)


class StopAt(Run):
    """A run that is asked to stop, on its last rank, when it has made so many steps."""

    def __init__(self, folder, world, steps: int | None):
        super().__init__(folder, world)
        self.asked, self.steps = -1, steps

    def stop_requested(self) -> bool:
        self.asked += 1                                           # for the first time before the first step
        return self.steps is not None and self.world.rank == self.world.size - 1 and self.asked >= self.steps - 1


def train_here(folder: Path, recipe: Recipe = RECIPE, data: SimpleNamespace | None = None,
               stop_after: int | None = None) -> Outcome:
    """Train (or go on with) the run in `folder`, in this process or rank."""
    torch.use_deterministic_algorithms(True)
    with world() as w:
        return train(w, TransformerXLTask(recipe, data or corpus()), recipe, StopAt(folder, w, stop_after))
