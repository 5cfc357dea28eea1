"""A tied table: its gradient against both uses written out, and over real gloo against the mean of each rank's own."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from engine import exchange
from engine.config import Wire
from engine.fused import Part, softmax_nll
from engine.tied import Tied
from engine.world import World, world
from tests.ranks import run_ranks

V, HEAD, D = 40, 8, 4
EPSILON = {"fp32": 0.0, "bf16": 2.0 ** -8, "bf16_feedback": 2.0 ** -8, "fp16": 2.0 ** -11}


class Net(nn.Module):
    """`tied`, or with the table as any parameter, read twice."""

    def __init__(self, tied: bool, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        table, layer, bias = (torch.rand(shape).to(dtype) for shape in ((V, D), (D, D), (V,)))
        self.table = Tied(table, (HEAD,)) if tied else nn.ParameterList([table])
        self.layer = nn.Parameter(layer)
        self.bias = nn.Parameter(bias)

    def forward(self, tokens, target):
        table = self.table
        h = table.embed(tokens) if isinstance(table, Tied) else F.embedding(tokens, table[0])
        h = (h @ self.layer).tanh()
        if isinstance(table, Tied):
            nll, = softmax_nll([h], [target], [[Part(0, 0, V)]], [table.weight()], [self.bias])
            return nll.sum()
        return F.cross_entropy(h @ table[0].T + self.bias, target, reduction="sum")


def grads_of(net: Net) -> list[torch.Tensor]:
    return [p.grad for p in net.parameters()]


BATCHES = [(torch.tensor([3, 3, 0, 39]), torch.tensor([1, 3, 3, 2])), (torch.tensor([5, 30]), torch.tensor([0, 19]))]


@pytest.mark.parametrize("at_once", [False, True])
def test_its_gradient_is_that_of_both_uses_summed_over_micro_batches(at_once):
    plain, tied = Net(False, torch.float64), Net(True, torch.float64)
    sum(plain(*batch) for batch in BATCHES).backward()
    if at_once:
        sum(tied(*batch) for batch in BATCHES).backward()
    else:
        for batch in BATCHES:
            tied(*batch).backward()
    torch.testing.assert_close(grads_of(tied), grads_of(plain), rtol=1e-12, atol=1e-12)


def test_where_it_only_embeds_it_has_the_gradient_of_its_rows():
    tied, tokens = Tied(torch.rand(11, 4, dtype=torch.float64)), torch.tensor([[3, 3], [0, 10]])
    weights = torch.rand(2, 2, 4, dtype=torch.float64)
    (tied.embed(tokens) * weights).sum().backward()
    wanted = torch.zeros(11, 4, dtype=torch.float64)
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        wanted[tokens[place]] += weights[place]
    torch.testing.assert_close(tied[0].grad, wanted)


@dataclass(frozen=True)
class Read:
    """How many tokens the first two ranks read; of those of the first none is in the tails. A third reads fewer."""
    ranks: int
    tokens: int
    most: int                                     # tokens are below

    def batch(self, rank: int, step: int, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(1000 * step + 100 * i + rank)
        count, most = (self.tokens if rank < 2 else 2), (self.most if rank else HEAD)
        return torch.randint(0, most, (count,)), torch.randint(0, V, (count,))


def _found(read: Read) -> dict[tuple[str, int], np.ndarray]:
    """All gradients, [step, element], by wire and number of micro-batches."""
    with world() as w:                             # and in it all there is of DDP: see engine/exchange.py
        return {(wire, n): _gradients(w, read, wire, n, steps=2) for wire in ("fp32", "bf16", "fp16") for n in (1, 2)}


def _gradients(w: World, read: Read, wire: Wire, micro_batches: int, steps: int, alone: bool = False) -> np.ndarray:
    net = Net(True)                                # here, so as to be gone before the process group is
    parallel, found = w.parallel(net, wire), []
    for step in range(steps):
        for i in range(micro_batches):
            with w.accumulating(parallel, more=i + 1 < micro_batches):
                if alone:
                    (parallel(*read.batch(1 - w.rank, 0, 0)) * (w.rank == 0)).backward()
                else:
                    parallel(*read.batch(w.rank, step, i)).backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        net.zero_grad(set_to_none=True)
    return torch.stack(found).numpy()              # a tensor would be shared with a process that is gone


def exact(read: Read, step: int, micro_batches: int) -> torch.Tensor:
    net = Net(False, torch.float64)
    for rank in range(read.ranks):
        for i in range(micro_batches):
            (net(*read.batch(rank, step, i)) / read.ranks).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("read", [Read(3, 7, V), Read(3, 90, V), Read(2, 5, HEAD)], ids=["few", "many", "no tails"])
def test_on_every_rank_it_is_the_mean_over_ranks(read):
    by_rank = run_ranks(read.ranks, _found, read)
    for (wire, micro_batches), found in by_rank[0].items():
        assert all((rank[wire, micro_batches] == found).all() for rank in by_rank)     # else weights would drift apart
        for step, got in enumerate(torch.from_numpy(found)):
            wanted = exact(read, step, micro_batches)
            error = ((got - wanted).abs().max() / wanted.abs().max()).item()
            assert error < 4 * EPSILON[wire] + 1e-6
            assert error > 1e-5 or wire == "fp32"                 # it takes effect


def _alone(read: Read, wire: Wire, steps: int) -> np.ndarray:
    """The mean of the table's gradients over steps that are alike; those of all ranks but the first are 0."""
    with world() as w:
        gradients = _gradients(w, read, wire, 1, steps, alone=True)
    return gradients[:, -V * D:].mean(0, dtype=np.float64).reshape(V, D)


@pytest.mark.parametrize("wire", ["bf16", "bf16_feedback"])
def test_with_feedback_what_rounding_takes_arrives_later_and_without_it_never(wire):
    read, steps = Read(2, 5, V), 32
    net = Net(False, torch.float64)
    (net(*read.batch(1, 0, 0)) / read.ranks).backward()
    wanted = net.table[0].grad
    for found in run_ranks(read.ranks, _alone, read, wire, steps):
        error = (torch.from_numpy(found) - wanted).abs().max() / wanted.abs().max()
        if wire == "bf16":
            assert 2.0 ** -11 < error < 2.0 ** -8                 # as after one step
        else:
            assert error < 2 * 2.0 ** -8 / steps                  # the last step's rounding is still to come


def _sent(read: Read) -> list[tuple[str, int]]:
    """What a step does, in its order: collectives, with the elements that a rank gives, and other gradients."""
    events = list[tuple[str, int]]()

    def noted(name, collective, given):
        def call(*args, **settings):
            events.append((name, args[given].numel()))
            return collective(*args, **settings)
        return call
    dist.all_reduce = noted("all_reduce", dist.all_reduce, 0)
    exchange._all_gather = noted("all_gather", exchange._all_gather, 1)
    with world() as w:
        net = Net(True)
        net.layer.register_hook(lambda grad: events.append(("the layer's gradient is made", grad.numel())))
        w.parallel(net)(*read.batch(w.rank, 0, 0)).backward()
    return events


def test_the_softmaxs_part_is_sent_before_the_layers_is_made_and_of_the_rest_the_head_and_the_rows_read():
    read = Read(2, 5, V)
    most = max(int((read.batch(rank, 0, 0)[0] >= HEAD).sum()) for rank in range(read.ranks))
    for events in run_ranks(read.ranks, _sent, read):
        assert events == [("all_reduce", 1), ("all_reduce", V * D), ("the layer's gradient is made", D * D),
                          ("all_reduce", HEAD * D), ("all_gather", most), ("all_gather", most * D)]


def test_rows_that_are_more_than_the_tails_travel_as_the_tails():
    for events in run_ranks(3, _sent, Read(3, 90, V)):
        assert events == [("all_reduce", 1), ("all_reduce", V * D), ("the layer's gradient is made", D * D),
                          ("all_reduce", V * D)]
