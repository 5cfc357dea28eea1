"""Tails split over ranks, over real gloo: the same numbers as with whole tables, and little that travels."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

import engine.split
from engine import checkpoint, exchange
from engine.config import Batch, Optim, Stop, Wire
from engine.split import Shards, Split
from engine.step import Learner
from engine.tied import travelling_early
from engine.values import BadValue
from engine.world import World, world
from tests.engine.test_loop import assert_same_run, losses
from tests.ranks import run_ranks
from tests.txl.small import RECIPE, corpus, train_here
from tests.txl.test_model import MODELS, V, build
from txl.batches import Segment, segment_of
from txl.config import Context
from txl.task import TransformerXLTask


@pytest.mark.parametrize(("edges", "ranks"), [((4, 9, 13), 1), ((4, 9, 13), 2), ((4, 5, 6, 31), 3), ((0, 100), 7)])
def test_each_row_of_a_tail_is_one_ranks_and_is_found_there(edges, ranks):
    shards, found = Shards(edges, ranks), {}
    for rank in range(ranks):
        rows = [row for piece in shards.pieces(rank) for row in piece]
        found |= {row: (rank, i) for i, row in enumerate(rows)}
        of_tail = [len(piece) for piece in shards.pieces(rank)]
        assert all(abs(n - (high - low) / ranks) < 1 for n, low, high in zip(of_tail, edges, edges[1:]))
    assert sorted(found) == list(range(edges[0], edges[-1]))
    tokens = torch.tensor(sorted(found))
    assert list(zip(*(x.tolist() for x in shards.places(tokens)))) == [found[row] for row in sorted(found)]


CONTEXT = Context(tgt_len=6, mem_len=3)
CASES = {                                          # model, ranks, the tokens of a rank are below
    "two ranks": (MODELS["adaptive"], 2, lambda rank: V),
    "three": (MODELS["adaptive"], 3, lambda rank: V),
    "projected": (MODELS["projected_adaptive"], 2, lambda rank: V),
    "a tail of one word": (replace(MODELS["adaptive"], cutoffs=(4, 12)), 3, lambda rank: V),
    "no tails on one": (MODELS["adaptive"], 2, lambda rank: V if rank else 4),
    "no tails": (MODELS["adaptive"], 2, lambda rank: 4),
}


def segment(case: str, rank: int, i: int) -> Segment:
    model, ranks, below = CASES[case]
    generator = torch.Generator().manual_seed(10 * i + rank)
    tokens, targets = (torch.randint(0, below(rank), (2, 6), generator=generator) for _ in range(2))
    targets[0, 2] = -1
    return segment_of(tokens, targets, model.cutoffs).shared(Shards((*model.cutoffs, V), ranks))


def _forward(net: Any, given: Segment) -> torch.Tensor:
    reads = given.reads
    assert reads is not None
    reads.ask_how_many()
    reads.ask_which(dist.get_rank())
    return net(given.tokens_BQ, given.targets_BT, None, CONTEXT, given.rows, given.in_tails, reads)[0]


def _split(w: World, case: str, wire: Wire) -> tuple[Any, Any, Split]:
    net = build(CASES[case][0])
    split = Split(travelling_early(net), w.rank, w.size, wire, torch.optim.SGD(net.named_parameters(), 1.0), net)
    return net, w.parallel(net, wire), split


Made = tuple[dict[str, np.ndarray], np.ndarray]


def _gradients() -> dict[tuple[str, Wire], Made]:
    with world() as w:
        return {(case, wire): _made(w, case, wire) for case in CASES if CASES[case][1] == w.size
                for wire in ("fp32", "bf16")}


@pytest.fixture(scope="module")
def made() -> dict[int, list[dict[tuple[str, Wire], Made]]]:
    """By the number of ranks, then rank, case and what gradients travel in."""
    return {ranks: run_ranks(ranks, _gradients) for ranks in (2, 3)}


def _made(w: World, case: str, wire: Wire) -> Made:
    """The gradients of two micro-batches, whole, and the losses of the first."""
    net, parallel, _ = _split(w, case, wire)       # here, so as to be gone before the process group is
    first = None
    for i in (0, 1):
        with w.accumulating(parallel, more=i == 0):
            nll = _forward(parallel, segment(case, w.rank, i))
            (nll.sum() * (1 + w.rank)).backward()  # of ranks that differ
        first = nll.detach() if first is None else first
    tables = net.vocabulary.tables
    grads = {name: p.grad for name, p in net.named_parameters() if ".tables." not in name}
    grads["table"] = tables.tails.joined(tables[0].grad, tables.tails.table[0].grad)
    return {name: grad.numpy() for name, grad in grads.items()}, first.numpy()


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_whole_tables(made, case):
    model, ranks, _ = CASES[case]
    found, whole = [by_case[case, "fp32"] for by_case in made[ranks]], build(model)
    for rank in range(ranks):
        for i in (0, 1):
            given = segment(case, rank, i)
            nll, _ = whole(given.tokens_BQ, given.targets_BT, None, CONTEXT, given.rows, given.in_tails)
            (nll.sum() * (1 + rank) / ranks).backward()
            if i == 0:
                assert_close(torch.from_numpy(found[rank][1]), nll.detach(), rtol=1e-12, atol=1e-12)
    wanted = {name.replace("vocabulary.tables.0", "table"): p.grad for name, p in whole.named_parameters()}
    for grads, _ in found:
        assert grads.keys() == wanted.keys()
        for name, grad in grads.items():
            assert_close(torch.from_numpy(grad), wanted[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ["table", "layers.0.attention.qkv.weight"])
def test_in_sixteen_bits_gradients_are_as_near_as_these(made, name):
    exact, rounded = (made[2][0]["two ranks", wire][0][name] for wire in ("fp32", "bf16"))
    assert 0 < np.abs(exact - rounded).max() < 2 ** -6 * np.abs(exact).max()


def _sent() -> list[tuple[str, int]]:
    """Bytes that a rank gives to each collective of a step."""
    events = list[tuple[str, int]]()

    def noted(name, collective, given):
        def call(*args, **settings):
            events.append((name, args[given].nbytes))
            return collective(*args, **settings)
        return call
    dist.all_reduce, dist.all_to_all_single = noted("reduce", dist.all_reduce, 0), noted(
        "swap", dist.all_to_all_single, 1)
    exchange._all_gather = noted("gather", exchange._all_gather, 1)
    engine.split._reduce_scatter = noted("scatter", engine.split._reduce_scatter, 1)
    with world() as w:
        net, parallel, _ = _split(w, "two ranks", "fp32")
        given = segment("two ranks", w.rank, 0)
        _forward(parallel, given).sum().backward()
        del net, parallel
        return [*events, ("read", given.in_tails), ("most", sum(given.reads.known.most))]


def test_what_travels_of_the_tails_is_rows_that_are_read_and_states_of_targets():
    d, head = 8, 4
    for events in run_ranks(2, _sent):
        *collectives, (_, read), (_, most) = events
        row, state = 8 * d, 8 * d
        asked, fetched, back = [size for name, size in collectives if name == "swap"]
        assert (asked, back) == (8 * read, row * read)
        assert [(name, size) for name, size in collectives if name != "swap"] == [
            ("gather", state * most), ("gather", 8 * most),      # states and targets
            ("reduce", 2 * 8 * 2 * most),                                          # sums over all words
            ("gather", 8 * most), ("scatter", 2 * state * most),
            ("reduce", head * row), ("reduce", head * row)]
        assert fetched % row == 0


TRAINED = {
    "lamb": replace(RECIPE, stop=Stop(max_steps=6), batch=Batch(size=4, micro_size=1)),
    "adam": replace(RECIPE, stop=Stop(max_steps=6), batch=Batch(size=7), optim=Optim("adam", lr=0.01, clip=0.05)),
    "sgd": replace(RECIPE, stop=Stop(max_steps=6), batch=Batch(size=4), optim=Optim("sgd", lr=0.1, momentum=0.9)),
}
TRAINED |= {f"{name}, split": replace(recipe, clock=replace(recipe.clock, split_tails=True))
            for name, recipe in TRAINED.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    def train(name, ranks):
        folder = tmp_path_factory.mktemp("trained")
        run_ranks(ranks, train_here, folder, TRAINED[name])
        return folder
    return train


def assert_alike(one, other):
    """But for rounding: weights, optimizer's state, losses."""
    a, b = (checkpoint.complete(folder / "checkpoints")[-1].shared() for folder in (one, other))
    assert a["model"].keys() == b["model"].keys()
    assert_close(a["model"], b["model"], rtol=1e-4, atol=1e-6)
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=1e-3, atol=1e-6)
    assert [x[:3] for x in losses(one)] == [x[:3] for x in losses(other)]
    assert_close([x[3] for x in losses(one)], [x[3] for x in losses(other)], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("name", "ranks"), [("lamb", 2), ("adam", 3), ("sgd", 2)])
def test_a_run_with_split_tails_is_that_with_whole_ones(trained, name, ranks):
    assert_alike(trained(name, ranks), trained(f"{name}, split", ranks))


def test_stopped_and_resumed_it_is_the_same_to_the_bit_and_may_go_on_whole(tmp_path, trained):
    straight, recipe = trained("lamb, split", 2), TRAINED["lamb, split"]
    run_ranks(2, train_here, tmp_path / "split", recipe, None, 4)
    run_ranks(2, train_here, tmp_path / "whole", recipe, None, 4)
    run_ranks(2, train_here, tmp_path / "split", recipe)
    assert_same_run(straight, tmp_path / "split", ranks=2)
    run_ranks(2, train_here, tmp_path / "whole", TRAINED["lamb"])
    assert_alike(straight, tmp_path / "whole")


def _overflowing() -> list[bool]:
    with world() as w:
        net, parallel, split = _split(w, "two ranks", "fp32")
        seen = []
        for bad in (-1, 0, 1):                     # the rank with a gradient that is none
            (head, rows), = split.pairs
            head.grad, rows.grad = torch.zeros_like(head), torch.zeros_like(rows)
            rows.grad[1, 1] = float("nan") if w.rank == bad else 1e30
            split.share_overflow()
            seen.append(bool(head.grad.isfinite().all()))
        del net, parallel
        return seen


def test_a_gradient_that_is_not_finite_is_so_on_all_ranks():
    assert run_ranks(2, _overflowing) == [[True, False, False]] * 2


def test_ranks_with_unequal_numbers_of_micro_batches_are_refused():
    recipe = replace(RECIPE, batch=Batch(size=5, micro_size=2), clock=replace(RECIPE.clock, split_tails=True))
    recipe.check_ranks(5)
    with pytest.raises(BadValue, match="5 sequences in pieces of 2 are not on 2 ranks"):
        Learner(World(0, 0, 2, torch.device("cpu")), TransformerXLTask(recipe, corpus()), recipe)


def test_a_table_that_is_not_one_is_refused():
    with pytest.raises(ValueError, match=r"split_tails is for one table .*cutoffs, tie_weight=true and div_val=1"):
        replace(RECIPE, model=replace(RECIPE.model, div_val=2), clock=replace(RECIPE.clock, split_tails=True))


def test_one_rank_splits_nothing(tmp_path):
    recipe = replace(TRAINED["lamb, split"], batch=Batch(size=2), stop=Stop(max_steps=2))
    train_here(tmp_path / "split", recipe)
    train_here(tmp_path / "whole", replace(recipe, clock=RECIPE.clock))
    assert_same_run(tmp_path / "split", tmp_path / "whole")
