from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.counts import Ops, count, reading
from configs import CONFIGS


def test_what_is_computed_counts_and_views_and_allocations_do_not():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with Ops() as ops, ops.part("x"):
        c = a @ b                                 # 12 + 20 numbers in, 15 out
        c.t()[1:].view(-1, 3)
        torch.empty(7)
        c.add_(1)                                 # 15 in, 15 out, where they were
        torch._foreach_mul_([a, b], 2.0)          # 12 + 20
    assert ops.kernels["x"] == 3
    assert ops.bytes["x"] == 4 * (47 + 30 + 32)


@pytest.mark.slow
def test_a_step_of_nvidias_base_orders_at_most_1600_kernels():
    recipe = CONFIGS["nvidia_base"].recipe
    counts = count(recipe)
    assert counts.params == 191_950_298
    assert counts.kernels <= 1600
    half = count(dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, n_layer=8)))
    assert half.optimizer == counts.optimizer     # its kernels are for all tensors at once
    assert .45 < (half.forward + half.backward) / (counts.forward + counts.backward) < .6


@pytest.mark.parametrize("batch", [1, 3])
def test_reading_a_segment_orders_at_most_half_the_kernels_that_nvidias_code_does(batch):
    """Which orders 440 at this shape and with these words, counted by the same `Ops` while it reads."""
    assert reading(CONFIGS["nvidia_base"].recipe, batch) <= 220


@pytest.mark.slow
def test_clipping_and_adam_move_at_most_25_bytes_a_parameter():
    recipe = CONFIGS["nvidia_base"].recipe
    counts = count(dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, name="adam")))
    assert counts.optimizer_bytes / counts.params <= 25
