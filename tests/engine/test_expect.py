"""What a run on several ranks expects of itself, over real gloo."""
from __future__ import annotations

import gc
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from engine import expect
from engine.config import Stop
from engine.scaling import Exchange, StepTime
from engine.step import Learner
from engine.task import Position
from engine.tied import Tied
from engine.world import world
from tests.engine.test_loop import assert_same_run
from tests.ranks import run_ranks
from tests.txl.small import RECIPE, corpus, train_here
from txl.task import TransformerXLTask

SHORT = replace(RECIPE, stop=Stop(max_steps=12))


def _train_with(folder, expected):
    """A run that expects what it is told to, instead of trying a step."""
    import engine.loop
    engine.loop.expect, expect.LONG_ENOUGH_S = (lambda *_: expected), 0.0
    return train_here(folder, SHORT)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expecting")
    run_ranks(2, train_here, folder, SHORT)
    return folder


def test_a_run_that_expects_nothing_is_the_same_to_the_bit(run, tmp_path):
    run_ranks(2, _train_with, tmp_path / "plain", None)
    assert_same_run(run, tmp_path / "plain", ranks=2)
    assert "expected" not in _log(tmp_path / "plain")


def test_it_says_once_what_it_expects_with_what_it_sends(run):
    line, = re.findall(r"expected .*", _log(run))
    net = TransformerXLTask(SHORT, corpus()).build()
    head, (V, D) = net.vocabulary.tables.head, net.vocabulary.tables[0].shape
    of_all = sum(p.numel() for p in net.parameters())             # and once more of the table what was read of it
    least, most = (4e-6 * (of_all + again * D) for again in (head, V))
    assert re.search(r"expected [\d.]+\w? tok/s, efficiency \d+% on 2 ranks \(a step alone [\d.]+ ms", line), line
    sent, = re.findall(r"([\d.]+) MB of gradients at", line)
    assert .999 * least < float(sent) < 1.001 * most


@pytest.mark.parametrize(("step_s", "told"), [(1e-6, 1), (1e6, 0)])
def test_a_run_slower_than_expected_is_told_once(tmp_path, step_s, told):
    expected = expect.Expected(StepTime(step_s, 0.0, 0.0), 32, 2, 1e6, 1e9)
    run_ranks(2, _train_with, tmp_path, expected)
    assert _log(tmp_path).count("of the speed is lost") == told


def test_steps_are_judged_when_there_are_enough_of_them():
    compared = expect.Comparison(expect.Expected(StepTime(.1, 0.0, 0.0), 32, 2, 1e6, 1e9))
    assert compared.add(10, 4.0) is None
    assert "A step takes 200 ms where 100 are expected" in (compared.add(40, 6.0) or "")
    assert compared.add(10, 100.0) is None                        # it was said
    assert expect.Comparison(None).add(10, 100.0) is None


def test_one_rank_expects_nothing(tmp_path):
    train_here(tmp_path, replace(SHORT, stop=Stop(max_steps=1)))
    assert "expected" not in _log(tmp_path)


def _log(folder):
    return (folder / "logs" / "rank-0.log").read_text()


def test_what_is_sent_at_the_end_is_the_last_bucket():
    mib = 1 << 20
    assert expect.early_and_late([10 * mib] * 2) == (0, 20 * mib)
    assert expect.early_and_late([10 * mib] * 7) == (60 * mib, 10 * mib)
    assert expect.early_and_late([30 * mib, mib, 500 * mib]) == (30 * mib, 501 * mib)     # a tied table, ready last
    assert expect.early_and_late([]) == (0, 0)


def test_a_tied_table_is_sent_early_and_what_was_read_of_it_again_at_the_end():
    tables = [Tied(torch.zeros(100, 8), (10,)), Tied(torch.zeros(50, 2), (40,))]
    assert expect.exchanged([5000], tables, 4, ranks=2) == Exchange(
        early=4 * (800 + 100), late=5000 + 4 * (80 + 80), late_rows=4 * 4 * (8 + 2))
    assert expect.exchanged([5000], tables, 10, ranks=2, share=.5) == Exchange(    # of the second no less are all
        early=2 * (800 + 100), late=2500 + 2 * (80 + 100), late_rows=2 * 10 * 8)


def test_of_split_tails_rows_and_hidden_states_are_sent_in_each_micro_batch_and_no_gradient():
    tables = [Tied(torch.zeros(100, 8), (10,)), Tied(torch.zeros(50, 2), (40,))]
    there_and_back = 2 * 3 * 4 * 4 * (8 + 2)                      # ways, micro-batches, rows, bytes, columns
    head = 4 * (10 * 8 + 40 * 2)
    assert expect.exchanged([5000], tables, 4, ranks=2, split=3) == Exchange(
        early=head, late=5000 + head, early_rows=there_and_back, late_swapped=there_and_back)


def _ready(freeze, model=SHORT.model):
    """What the trial saw of a model, which it must leave as it was, as torch's generator."""
    with world() as w:
        recipe = replace(SHORT, freeze=freeze, model=model)
        learner = Learner(w, TransformerXLTask(recipe, corpus()), recipe)
        net = learner.model
        before, weights = torch.get_rng_state(), [p.clone() for p in net.parameters()]
        gc.collect()
        gc.disable()                                              # nothing of the copy may wait for it
        tried = expect._tried(learner, Position())
        assert sum(isinstance(x, nn.Parameter) for x in gc.get_objects()) == len(weights)
        assert torch.equal(before, torch.get_rng_state())
        assert all(p.grad is None and torch.equal(p, was) for p, was in zip(net.parameters(), weights))
        return tried, 4 * net.vocabulary.tables[0].numel(), 4 * sum(p.numel() for p in learner.parameters)


@pytest.mark.parametrize("freeze", [(), ("layers.0.*",)])
def test_a_trial_leaves_nothing_behind_and_sees_all_gradients_of_ddps(freeze):
    (tried, table, total), _ = run_ranks(2, _ready, freeze)
    assert sum(tried.ready) == total - table
    assert 0 < tried.in_tails <= 16                               # of 2 streams' 8 tokens


def test_a_trial_sees_a_tied_table_without_tails_last():
    model = replace(SHORT.model, cutoffs=())
    (tried, table, total), _ = run_ranks(2, _ready, (), model)
    assert (tried.ready[-1], sum(tried.ready), tried.in_tails) == (table, total, 0)
