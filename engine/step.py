"""A model in training, and one optimizer step of it: forward, backward, clipping, update."""
from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from engine import optim
from engine.config import Recipe
from engine.memory import keep_freed
from engine.precision import precision_for
from engine.split import Split
from engine.task import Step, Task
from engine.tied import travelling_early
from engine.watch import Timed
from engine.weights import freeze
from engine.world import World


class Learner:
    """Weights, optimizer, loss scale, and what is carried from each micro-batch of a step to that of the next."""

    def __init__(self, world: World, task: Task, recipe: Recipe, model: nn.Module | None = None):
        """The same initial weights on every rank, by torch's generator, which it seeds, or `model`. Raises BadValue."""
        self.world, self.task, self.recipe = world, task, recipe
        recipe.check_ranks(world.size)
        self.precision = precision_for(recipe.precision, world.device)
        self.batch_size = recipe.batch.total(world.size)
        self.peak_lr = recipe.optim.peak_lr(self.batch_size)
        self.carries: list[Any] = []
        if world.device.type == "cpu":
            keep_freed()

        if model is None:
            torch.manual_seed(recipe.seed)
            model = task.build().to(world.device)
        freeze(model, recipe.frozen)
        self.model = model
        self.split: Split | None = None
        self._name_parameters()
        self.optimizer = optim.build(self.model.named_parameters(), recipe.optim, self.peak_lr)
        self.scaler = self.precision.scaler()
        self.parallel = self.model

    def _name_parameters(self) -> None:
        self.names, self.parameters = zip(*((name, p) for name, p in self.model.named_parameters() if p.requires_grad))

    def distribute(self) -> None:
        """From here on gradients are the mean over ranks, and tables with tails may be split: see `whole`. Once, when
        all ranks have the weights to begin with."""
        world, recipe = self.world, self.recipe
        tables = travelling_early(self.model)
        if recipe.clock.split_tails and world.size > 1 and tables:
            self.split = Split(tables, world.rank, world.size, recipe.wire, self.optimizer, self.model)
            self._name_parameters()
        self.parallel = world.parallel(self.model, recipe.wire)

    def whole(self, optimizer: bool = False) -> AbstractContextManager[None]:
        """Around what reads the weights, or also the optimizer's state, as they are on one rank. Collective."""
        return nullcontext() if self.split is None else self.split.whole(optimizer)

    def ahead(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The same steps. What ranks must know of each other's, where tables are split, they ask two steps before."""
        if self.split is None:
            yield from steps
            return
        upcoming: deque[Step] = deque()
        for step in steps:
            for micro_batch in step.micro_batches:
                micro_batch.reads.ask_how_many()
            upcoming.append(step)
            if len(upcoming) > 1:
                for micro_batch in upcoming[-2].micro_batches:
                    micro_batch.reads.ask_which(self.world.rank)
            if len(upcoming) > 2:
                yield upcoming.popleft()

    def take(self, step: Step, lr: float, timed: Timed) -> tuple[Tensor, Tensor, Tensor]:
        """The step, with the learning rate `lr`. On the device: this rank's nats, the norm of all gradients before they
        were clipped, and that of each.

        Nothing in it waits for the device (but fp16's scaler, which must know of overflows).
        """
        world = self.world
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if step.fresh or len(self.carries) != len(step.micro_batches):
            self.carries = [None] * len(step.micro_batches)

        loss = torch.zeros((), device=world.device)
        for i, micro_batch in enumerate(step.micro_batches):
            with world.accumulating(self.parallel, more=i + 1 < len(step.micro_batches)):
                with timed.part("forward"), self.precision.autocast():
                    nats, self.carries[i] = self.task.loss(self.parallel, micro_batch, self.carries[i])
                # ranks hold unequal shares and their gradients are averaged: every target weighs the same this way
                with timed.part("backward"):
                    self.scaler.scale(nats * (world.size / step.tokens)).backward()
            loss += nats.detach()

        with timed.part("optimizer"):
            if self.split and self.precision.scaled:
                self.split.share_overflow()
            self.scaler.unscale_(self.optimizer)
            # where the loss is scaled, torch's scaler has its own use for what the optimizer divides by
            norm, norms = optim.clip_(self.parameters, self.recipe.optim.clip,
                                      None if self.precision.scaled else self.optimizer,
                                      self.split.pairs if self.split else ())
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        timed.steps += 1
        timed.tokens += step.tokens
        return loss, norm, norms
