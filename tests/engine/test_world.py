"""What ranks tell each other, over real gloo."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


WITHOUT_DYNAMO = """
import sys, torch
import torch.distributed as dist
from engine.world import World, _without_dynamo
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
layer = torch.nn.Linear(3, 1)
model = World(0, 0, 2, torch.device("cpu")).parallel(layer)
model(torch.ones(2, 3)).sum().backward()
print(layer.weight.grad.tolist(), "torch._dynamo" in sys.modules)
with _without_dynamo():
    mode = torch._dynamo.utils.get_optimize_ddp_mode()
    print(mode, "torch._dynamo" in sys.modules, torch._dynamo.is_compiling(), "torch._dynamo" in sys.modules)
print(torch._dynamo.utils.get_optimize_ddp_mode() == mode)
"""


def test_a_step_of_several_ranks_does_not_load_torch_dynamo_and_who_wants_it_has_it(tmp_path):
    done = subprocess.run([sys.executable, "-c", WITHOUT_DYNAMO, tmp_path / "store"], cwd=Path(__file__).parents[2],
                          capture_output=True, text=True, timeout=300)
    assert done.stdout == "[[2.0, 2.0, 2.0]] False\nddp_optimizer False False True\nTrue\n", done.stderr
