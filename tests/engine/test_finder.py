"""The learning-rate finder, on losses whose theory is known, and through the loop."""
from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from engine.config import Batch, Clock, Optim, Schedule, Stop
from engine.finder import slopes, suggestion
from engine.loop import train
from engine.run import Run
from engine.task import Position, Step
from engine.world import world
from tests.ranks import run_ranks
from tests.txl.small import RECIPE, StopAt, train_here


def rising(low: float, high: float, count: int) -> list[float]:
    return [low * (high / low) ** (i / count) for i in range(count)]


def descent(curvatures: list[float], lrs: list[float]) -> list[tuple[float, float]]:
    """Gradient descent on sum of c/2 x², from x = 1: by hand, each x is multiplied by 1 - lr c."""
    xs, curve = [1.0] * len(curvatures), []
    for lr in lrs:
        curve.append((lr, sum(c / 2 * x * x for c, x in zip(curvatures, xs))))
        xs = [x * (1 - lr * c) for c, x in zip(curvatures, xs)]
        if abs(max(xs, key=abs)) > 1e3:
            break
    return curve


@pytest.mark.parametrize("sharpest", [0.5, 4.0, 60.0])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_on_a_quadratic_the_suggestion_is_stable_and_fast(sharpest, noise):
    """Above 2/L gradient descent diverges, and far below it hardly moves: L is the sharpest curvature."""
    curvatures = [sharpest, sharpest / 3, sharpest / 10]
    generator = random.Random(1)
    curve = [(lr, loss * (1 + generator.gauss(0, noise))) for lr, loss in descent(curvatures, rising(1e-5, 10, 400))]
    found = suggestion(curve)
    assert 0.01 / sharpest < found < 2 / sharpest
    steps = [loss for _, loss in descent(curvatures, [found] * 50)]
    assert all(later < earlier for earlier, later in pairwise(steps))
    assert steps[-1] < 0.9 * steps[0]


def test_the_suggestion_is_where_a_known_curve_falls_fastest():
    """Of a logistic step in ln lr, its middle."""
    curve = [(lr, 5 - 2 / (1 + math.exp(-4 * (math.log(lr) - math.log(0.02))))) for lr in rising(1e-4, 1, 300)]
    assert suggestion(curve) == pytest.approx(0.02, rel=0.05)


def test_a_fall_from_a_peak_behind_the_lowest_loss_is_no_suggestion():
    """Where the rate is too large the loss jumps up and comes down again, faster than it ever fell before."""
    lrs = rising(1e-4, 1, 300)
    curve = [(lr, 5 - 2 / (1 + math.exp(-4 * (math.log(lr) - math.log(0.02))))) for lr in lrs[:250]]
    curve += [(lr, 9 - 0.1 * i) for i, lr in enumerate(lrs[250:])]
    assert suggestion(curve) == pytest.approx(0.02, rel=0.05)


def test_slopes_are_the_derivative_by_ln_lr():
    curve = [(lr, 3 * math.log(lr) ** 2) for lr in rising(1e-3, 1, 200)]
    for (lr, _), slope in list(zip(curve, slopes(curve)))[20:-20]:
        assert slope == pytest.approx(6 * math.log(lr), abs=1e-6)


@pytest.mark.parametrize("curve", [
    [], [(0.1, 2.0)] * 5, [(lr, 5 + lr) for lr in rising(1e-3, 1, 50)], [(0.1, 2.0)] * 50])
def test_where_nothing_fell_nothing_is_suggested(curve):
    assert suggestion(curve) is None


class Bowl(nn.Module):
    """Curvatures 20, 5 and 1; the loss is far from its least at first."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.ones(3))

    def forward(self):
        return (torch.tensor([20.0, 5.0, 1.0], device=self.x.device) * self.x ** 2).sum() / 2


@dataclass(frozen=True)
class BowlTask:
    flops_per_token: float = 1.0
    vocabulary: str = "none"
    sizes = property(lambda self: {})

    def build(self):
        return Bowl()

    def steps(self, world, start) -> Iterator[Step]:
        for k in range(start.index, 10**9):
            yield Step(Position(0, k, 10**9), Position(0, k + 1, 10**9), (None,), 1, False)

    def loss(self, model, micro_batch, carry):
        return model(), 0

    def evaluate(self, model, split, world):
        raise AssertionError("the finder's weights are worth no evaluation")


FINDER = replace(RECIPE, batch=Batch(size=1), optim=Optim("sgd", lr=0.01, clip=None), schedule=Schedule("finder"),
                 stop=Stop(max_steps=300), clock=Clock(log_interval=50, eval_interval=10, checkpoint_interval=100))


def find(folder, stop_after=None):
    with world() as w:
        return train(w, BowlTask(), FINDER, StopAt(folder, w, stop_after))


def test_through_the_loop_it_ends_by_itself_and_its_suggestion_is_stable(tmp_path):
    outcome = find(tmp_path)
    found = json.loads((tmp_path / "lr_finder.json").read_text())
    lrs, losses = [row["lr"] for row in found["curve"]], [row["loss"] for row in found["curve"]]
    assert outcome.finished
    assert outcome.test is None
    assert outcome.step < 300
    assert "rose to" in found["ended"]
    assert lrs == pytest.approx(rising(1e-5, 1, 300)[:len(lrs)])
    assert lrs[-1] > 2 / 20                                       # where it diverges, by theory
    assert losses[-1] <= min(losses) + RECIPE.divergence_nats
    assert outcome.suggested_lr == found["suggested_lr"] == suggestion(list(zip(lrs, losses)))
    assert 0.01 / 20 < outcome.suggested_lr < 2 / 20
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "finished"
    assert f"suggested lr {outcome.suggested_lr:.3g}" in status["message"]
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.value for event in events.Scalars("finder/loss")] == pytest.approx(losses)
    assert [event.value for event in events.Scalars("finder/lr")] == pytest.approx(lrs)


def test_a_finder_that_was_stopped_goes_on_to_the_same_suggestion(tmp_path):
    whole = find(tmp_path / "whole")
    assert not find(tmp_path / "stopped", stop_after=90).finished
    assert find(tmp_path / "stopped") == whole


def test_a_loss_that_is_not_a_number_ends_it_as_well(tmp_path):
    with world() as w:
        recipe = replace(FINDER, divergence_nats=1e300, optim=replace(FINDER.optim, lr=1e6))
        outcome = train(w, BowlTask(), recipe, Run(tmp_path, w))
    assert outcome.finished
    assert "not finite" in json.loads((tmp_path / "lr_finder.json").read_text())["ended"]


def test_two_ranks_of_a_real_model_find_as_one_does(tmp_path):
    """And never validate, though the recipe would."""
    recipe = replace(RECIPE, schedule=Schedule("finder", warmup_steps=5), stop=Stop(max_steps=30), precision="fp32",
                     model=replace(RECIPE.model, dropout=0.0, dropatt=0.0), optim=Optim("adam", lr=0.01))
    one = train_here(tmp_path / "one", recipe)
    two = run_ranks(2, train_here, tmp_path / "two", recipe)
    assert [x.suggested_lr for x in two] == pytest.approx([one.suggested_lr] * 2)
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["kind"] for line in lines} == {"train"}


def test_a_finder_without_a_learning_rate_to_begin_at_is_refused():
    with pytest.raises(ValueError, match="must be above 0"):
        replace(FINDER, optim=Optim("sgd", lr=0.0))
