"""What ranks tell each other, over real gloo."""
from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import engine.world
from engine.world import World, world
from tests.ranks import run_ranks

ALONE = World(0, 0, 1, torch.device("cpu"))


def _state(seed):
    """Every type of tensor and shape that a checkpoint has, and some that none has."""
    torch.manual_seed(seed)
    return {"tensors": [torch.randn(700, 3), torch.tensor(2.5 + seed), torch.randn(5, 4).t(), torch.empty(0, 2),
                        torch.randn(3).bfloat16(), torch.randn(3).half(), torch.arange(4), torch.tensor([True, False]),
                        torch.randn(2, dtype=torch.float64), torch.tensor([float("nan"), -0.0])],
            "nested": ({"step": seed}, [None, "word", (1.5,)])}


def _broadcast_in_small_pieces():
    engine.world.PIECE_BYTES = 1000                               # so that the large ones take several
    expected = _state(0)
    with world() as w:
        found = w.broadcast(_state(w.rank))
        assert len(found["tensors"]) == len(expected["tensors"])
        for one, other in zip(found["tensors"], expected["tensors"]):
            assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        return found["nested"], w.gather(f"I am {w.rank}")


def test_every_rank_has_the_leading_ranks_value_bit_for_bit_and_each_others_words():
    told = run_ranks(3, _broadcast_in_small_pieces)
    assert told == [(_state(0)["nested"], ["I am 0", "I am 1", "I am 2"])] * 3


def test_a_world_of_one_hears_itself():
    value = object()
    assert ALONE.broadcast(value) is value
    assert ALONE.gather(value) == [value]


@pytest.mark.parametrize("flag", [True, False])
def test_what_one_rank_asks_all_ranks_hear_later(flag):
    assert run_ranks(2, _ask, flag) == [flag, flag]


def _ask(flag):
    with world() as w:
        return w.any_later(flag and w.rank == 1)()
