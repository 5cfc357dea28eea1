"""Gradients in 16 bits, over real gloo: what is applied against sums by hand."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from engine.config import Optim
from engine.world import World, world
from tests.engine.test_loop import losses
from tests.ranks import run_ranks
from tests.txl.small import RECIPE, train_here

SIZES = (3000, 40, 700)                                           # of parameters, which fill several buckets
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Given(nn.Module):
    """Its gradients are what it is called with, one flat tensor."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(size) for size in SIZES)

    def forward(self, wanted):
        return sum((weight * part).sum() for weight, part in zip(self.weights, wanted.split(SIZES)))


def gradients(rank: int, step: int) -> torch.Tensor:
    torch.manual_seed(100 * step + rank)
    return torch.randn(sum(SIZES)) * 10.0 ** torch.randint(-4, 4, (sum(SIZES),))


def applied(*args) -> list[torch.Tensor]:
    """By rank what its optimizer would see, [step, element]."""
    return [torch.from_numpy(found) for found in run_ranks(*args)]


def _train(*args) -> np.ndarray:
    with world() as w:                             # and in it all there is of DDP: see engine/exchange.py
        return _steps(w, *args)


def _steps(w: World, wire: str, steps: int, given, micro_batches: int = 1) -> np.ndarray:
    """`given(rank, step)` is split over micro-batches."""
    found, model = [], Given()
    ddp = w.parallel(model, wire)
    for step in range(steps):
        for i in range(micro_batches):
            with w.accumulating(ddp, more=i + 1 < micro_batches):
                ddp(given(w.rank, step) / micro_batches).backward()
        found.append(torch.cat([weight.grad for weight in model.weights]))
        model.zero_grad(set_to_none=True)
    return torch.stack(found).numpy()              # a tensor would be shared with a process that is gone


@pytest.mark.parametrize("wire", ["bf16", "fp16"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_it_is_the_mean_of_rounded_gradients(wire, micro_batches):
    dtype = DTYPES[wire]
    for found in applied(2, _train, wire, 3, gradients, micro_batches):
        for step, mean in enumerate(found):
            first, second = ((gradients(rank, step) / 2).to(dtype) for rank in (0, 1))
            assert torch.equal(mean, (first + second).float())    # two have one sum, whatever the order
            assert not torch.equal(mean, (gradients(0, step) + gradients(1, step)) / 2)


def test_of_three_ranks_it_is_as_near_as_sixteen_bits_can_be():
    exact = sum(gradients(rank, 0).double() for rank in range(3)) / 3
    size = sum(gradients(rank, 0).abs() for rank in range(3)) / 3     # each is rounded once, and its sums twice
    for mean, in applied(3, _train, "bf16", 1, gradients):
        assert ((mean - exact).abs() <= 3 * 2.0 ** -8 * size).all()
        assert ((mean - exact).abs() > 2.0 ** -12 * exact.abs()).any()


def small_beside_large(rank: int, step: int) -> torch.Tensor:
    """Constant, and of one rank in each place, so that the ranks' sum is exact and only their own rounding loses."""
    return torch.where(torch.arange(sum(SIZES)) % 2 == rank, gradients(0, 0), 0)


@pytest.mark.parametrize("wire", ["bf16", "bf16_feedback"])
def test_with_feedback_all_of_a_gradient_arrives_in_time_and_without_it_never(wire):
    steps = 64
    expected = steps * gradients(0, 0).double() / 2
    for found in applied(2, _train, wire, steps + 1, small_beside_large):
        total = found[1:].double().sum(0)            # the first is before the buckets are laid out anew
        late = ((total - expected) / expected).abs()
        if wire == "bf16":
            assert late.mean() > 2.0 ** -10                       # as after one step: it adds up
        else:
            assert late.max() < 1.01 * 2.0 ** -8 / steps          # what is still to come is the rounding of one step


@pytest.mark.parametrize(("exchange", "precision", "said"), [
    ("fp16", "fp32", "goes with precision=fp16"), ("fp16", "bf16", "goes with precision=fp16"),
    ("bf16_feedback", "fp16", "differ in their loss scale")])
def test_what_does_not_go_together_is_refused(exchange, precision, said):
    with pytest.raises(ValueError, match=said):
        replace(RECIPE, precision=precision, optim=Optim("lamb", lr=.01, exchange=exchange))


def test_a_run_whose_gradients_travel_in_sixteen_bits_learns_as_others_do(tmp_path):
    expected, *others = (_losses(tmp_path / wire, wire) for wire in ("fp32", "bf16", "bf16_feedback"))
    for found in others:
        assert found != expected                                  # it takes effect
        assert found == pytest.approx(expected, abs=.02)


def _losses(folder, wire):
    recipe = replace(RECIPE, optim=replace(RECIPE.optim, exchange=wire))
    run_ranks(2, train_here, folder, recipe)
    return [loss for kind, _, _, loss in losses(folder) if kind == "train"]


def test_if_not_said_it_is_the_ancestors_fp16_in_training_in_fp16_and_float32_else():
    assert [replace(RECIPE, precision=precision).wire for precision in ("fp16", "bf16", "tf32", "fp32")] == [
        "fp16", "fp32", "fp32", "fp32"]
    assert replace(RECIPE, precision="fp16", optim=replace(RECIPE.optim, exchange="bf16")).wire == "bf16"
