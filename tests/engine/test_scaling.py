from __future__ import annotations

import itertools
import math
import statistics

import pytest

from engine.scaling import (
    Assumptions,
    Exchange,
    Gradients,
    Links,
    compute_time,
    slowest_of,
    step_time,
    warning,
)
from engine.values import BadValue

LINKS = Links(gpus=8, nvlink=120e9, nic=6.25e9)
GRADIENTS = Gradients(head=20e6, tails=254e6, rest=110e6, tied=True, tail_rows=.4e6, tail_states=.5e6)
EXCHANGES = [GRADIENTS.dense(), GRADIENTS.early(8), GRADIENTS.split()]
EVERYWHERE = [(1, 1), (1, 2), (1, 8), (2, 1), (2, 8), (3, 8), (16, 8), (128, 8)]


def in_loops(compute_s, exchange, links, machines, gpus, micro_batches):
    """A step, hop after hop: every piece passes every link as often as the ring that carries it takes it there."""
    def all_reduce(size):
        seconds = 0.0
        for _ in range(2):                        # sums go round, then the result
            for _ in range(gpus - 1):
                seconds += size / gpus / links.nvlink
            for _ in range(machines - 1):
                seconds += size / machines / links.nic
        return seconds + size / 25e6 * 20e-6 * min(2 * (machines - 1), 4 * math.ceil(math.log2(machines)))

    def gather(size):
        seconds = 0.0
        for _ in range(gpus - 1):
            seconds += size / gpus / links.nvlink
        for _ in range(machines - 1):
            seconds += size / machines / links.nic
        return seconds + size / 25e6 * 20e-6 * min(machines - 1, 2 * math.ceil(math.log2(machines)))

    rows = late_rows = swapped = 0.0
    for _ in range(machines * gpus):
        rows, late_rows = rows + exchange.early_rows, late_rows + exchange.late_rows
    for _ in range(gpus):
        swapped += exchange.late_swapped
    early_s = all_reduce(exchange.early) + gather(rows)
    late_s = all_reduce(exchange.late) + gather(late_rows + swapped)
    step_s = compute_s + max(0.0, early_s - .6 * compute_s / micro_batches) + late_s
    return step_s + .02 * compute_s * slowest_of(machines * gpus)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_step_is_the_sum_of_its_hops(exchange):
    for (machines, gpus), compute_s, micro_batches in itertools.product(EVERYWHERE, (.03, .3), (1, 4)):
        step = step_time(compute_s, exchange, LINKS, machines=machines, gpus=gpus, micro_batches=micro_batches)
        assert step.total_s == pytest.approx(in_loops(compute_s, exchange, LINKS, machines, gpus, micro_batches))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_one_gpu_computes_and_does_nothing_else(exchange):
    step = step_time(.1, exchange, LINKS, machines=1, gpus=1)
    assert (step.compute_s, step.exposed_s, step.stragglers_s, step.total_s) == (.1, 0, 0, .1)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_one_machine_does_not_know_its_network_card(exchange):
    assert (step_time(.1, exchange, LINKS, machines=1)
            == step_time(.1, exchange, Links(8, LINKS.nvlink, nic=1.0), machines=1))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_more_bandwidth_is_never_slower_and_more_machines_never_faster_each(exchange):
    steps = [step_time(.05, exchange, LINKS, machines=machines).total_s for machines in (1, 2, 4, 8, 16, 128)]
    assert steps == sorted(steps)
    for nvlink, nic in ((1, 2), (2, 1), (10, 10)):
        better = Links(8, nvlink * LINKS.nvlink, nic * LINKS.nic)
        for (machines, gpus) in EVERYWHERE:
            fast, slow = (step_time(.05, exchange, links, machines=machines, gpus=gpus) for links in (better, LINKS))
            assert .05 <= fast.total_s <= slow.total_s


def test_what_compute_hides_costs_nothing_and_what_is_late_always_does():
    def exposed(early, late, compute_s=1.0):
        return step_time(compute_s, Exchange(early, late), LINKS, machines=4).exposed_s
    assert exposed(500e6, 0) == 0 < exposed(500e6, 0, compute_s=.1) < exposed(0, 500e6) == exposed(0, 500e6, .1)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_compute_is_found_again_in_a_step_that_it_made(exchange):
    for (machines, gpus), compute_s, micro_batches in itertools.product(EVERYWHERE, (.001, .03, 3.), (1, 4)):
        at = {"machines": machines, "gpus": gpus, "micro_batches": micro_batches,
              "assumed": Assumptions(overlap=.7, spread=.05)}
        step_s = step_time(compute_s, exchange, LINKS, **at).total_s
        assert compute_time(step_s, exchange, LINKS, **at) == pytest.approx(compute_s)


def test_a_step_shorter_than_its_exchange_is_refused():
    with pytest.raises(BadValue, match=r"a step of 10 ms is shorter than its exchange of gradients"):
        compute_time(.01, GRADIENTS.dense(), LINKS, machines=16)


def test_the_slowest_of_many_is_the_expected_maximum_of_as_many_normal_deviations():
    below, width = statistics.NormalDist().cdf, 1e-3
    for ranks in (1, 2, 8, 128, 1024):
        expected = 0.0
        for i in range(-8000, 8000):
            x = (i + .5) * width
            expected += ((x > 0) - below(x) ** ranks) * width
        assert slowest_of(ranks) == pytest.approx(expected, rel=.05, abs=1e-9)


@pytest.mark.parametrize("tied", [True, False])
def test_every_exchange_sends_all_gradients_but_split_those_of_the_tails(tied):
    g = Gradients(head=20, tails=254, rest=110, tied=tied, tail_rows=1, tail_states=2)
    dense, early, split = g.dense(), g.early(507), g.split()
    assert dense.early + dense.late == g.total == (384 if tied else 658)
    assert dense.late == 274                       # the embedding's is ready last; a tied one waits for it as a whole
    assert (early.early, early.late, early.late_rows) == (384, 20, 1)
    assert g.early(508) == Exchange(early=384, late=274)          # 508 ranks' rows are as much as all are twice
    assert (split.early, split.late, split.early_rows, split.late_swapped) == (130, 20, 4, 2)
    for tails in (0, 1000):                        # how large they are is nothing to split
        assert Gradients(20, tails, 110, tied, 1, 2).split() == split


def test_a_run_that_loses_a_tenth_of_the_expected_speed_is_told():
    assert {warning(1.0, .5), warning(1.0, 1.0), warning(1.0, 1.11)} == {None}
    assert "A step takes 1120 ms where 1000 are expected: 11% of the speed is lost" in (warning(1.0, 1.12) or "")
