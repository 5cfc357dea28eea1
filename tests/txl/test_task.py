"""Evaluation: every token once, one number whatever the ranks, and what memory is worth."""
from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch

from engine.config import Clock
from engine.step import Learner
from engine.task import Position
from engine.values import BadValue
from engine.watch import Timed
from engine.world import World, world
from tests.ranks import run_ranks
from tests.txl.small import RECIPE, corpus
from txl.config import Context
from txl.model import TransformerXL
from txl.task import TransformerXLTask, evaluate

ALONE = World(0, 0, 1, torch.device("cpu"))


def model():
    torch.manual_seed(2)
    return TransformerXL(RECIPE.model, 30).double().eval()


def _scores(streams):
    with world() as w:
        return [evaluate(model(), corpus(), "valid", Context(tgt_len=7, mem_len=5), count, w) for count in streams]


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_loss_is_the_same_for_every_number_of_ranks(ranks):
    streams = (1, 2, 3, 5, 16, 101)                               # also fewer streams than ranks, and one token each
    alone = [evaluate(model(), corpus(), "valid", Context(tgt_len=7, mem_len=5), count, ALONE) for count in streams]
    for scores in run_ranks(ranks, _scores, streams):
        for mine, score in zip(alone, scores):
            assert score.tokens == mine.tokens == 101
            assert score.nats == pytest.approx(mine.nats, rel=1e-12)
            assert score.protocol == mine.protocol


def test_the_loss_equals_predicting_one_token_after_the_other():
    """One stream, all of its past in memory: the sum over single steps, each with the whole text before it."""
    net, text = model(), corpus().splits["valid"][:40]
    data = corpus()
    data.splits["valid"] = text
    score = evaluate(net, data, "valid", Context(tgt_len=6, mem_len=40), 1, ALONE)
    tokens = torch.tensor([0, *text.tolist()])
    nats = 0.0
    with torch.no_grad():
        for i in range(len(text)):
            hidden, _ = net.hidden(tokens[None, :i + 1], None, Context(tgt_len=1, mem_len=0))
            nats -= float(net.vocabulary.log_prob(hidden[:, -1])[0, tokens[i + 1]])
    assert score.nats == pytest.approx(nats, rel=1e-10)


def test_an_epoch_reads_every_token_once_and_then_starts_anew():
    task = TransformerXLTask(RECIPE, corpus())
    seen, steps = 0, task.steps(ALONE, Position())
    for step in steps:
        if step.position.epoch == 1:
            break
        assert step.fresh == (step.position.index == 0)
        seen += step.tokens
    assert seen == 330
    assert step.fresh


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_data_go_on_from_any_position(shuffle):
    task = TransformerXLTask(replace(RECIPE, shuffle_sentences=shuffle), corpus())
    steps = task.steps(ALONE, Position())
    whole = [next(steps) for _ in range(25)]
    for i in (1, 10, 11, 12, 24):
        again = next(task.steps(ALONE, whole[i - 1].following))
        assert again.position == whole[i].position
        assert torch.equal(again.micro_batches[0].tokens_BQ, whole[i].micro_batches[0].tokens_BQ)


def test_the_same_place_is_found_with_another_batch():
    """Half the streams make twice the steps: the middle of an epoch stays the middle."""
    half = replace(RECIPE, batch=replace(RECIPE.batch, size=2))
    steps = TransformerXLTask(RECIPE, corpus(length=320)).steps(ALONE, Position())
    position = [next(steps) for _ in range(5)][-1].following
    assert (position.index, position.steps) == (5, 10)
    assert next(TransformerXLTask(half, corpus(length=320)).steps(ALONE, position)).position.index == 10


def test_ranks_agree_on_the_order_of_sentences():
    """The streams of two ranks, one after the other, are those of one rank with all of them."""
    task = TransformerXLTask(replace(RECIPE, shuffle_sentences=True), corpus())
    ranks = [task.steps(World(rank, rank, 2, torch.device("cpu")), Position()) for rank in (0, 1)]
    plain = TransformerXLTask(RECIPE, corpus()).steps(ALONE, Position())
    orders = set()
    for whole, first, second in islice(zip(task.steps(ALONE, Position()), *ranks), 25):       # more than two epochs
        assert torch.equal(torch.cat([first.micro_batches[0].tokens_BQ, second.micro_batches[0].tokens_BQ]),
                           whole.micro_batches[0].tokens_BQ)
        assert (whole.position, whole.tokens) == (first.position, first.tokens)
        if whole.fresh:
            orders.add(tuple(whole.micro_batches[0].tokens_BQ.flatten().tolist()))
    orders.add(tuple(next(plain).micro_batches[0].tokens_BQ.flatten().tolist()))
    assert len(orders) == 4


def test_a_batch_larger_than_the_text_is_refused_before_a_step():
    task = TransformerXLTask(RECIPE, corpus(length=31))
    with pytest.raises(BadValue, match=r"step of 4 sequences of 8 tokens is more than the text .* has 31 tokens"):
        task.steps(ALONE, Position())
    assert next(TransformerXLTask(RECIPE, corpus(length=32)).steps(ALONE, Position())).tokens == 32


def test_the_test_is_measured_by_its_own_context():
    recipe = replace(RECIPE, test_context=Context(tgt_len=3, mem_len=20, clamp_len=9, same_length=True))
    task = TransformerXLTask(recipe, corpus())
    net = task.build()
    assert "tgt_len 3, mem_len 20, clamp_len 9, same_length" in task.evaluate(net, "test", ALONE).protocol
    assert "tgt_len 8, mem_len 8" in task.evaluate(net, "valid", ALONE).protocol


def test_a_validation_may_be_of_the_first_segments_and_the_test_never_is():
    recipe = replace(RECIPE, eval_max_segments=2)
    task = TransformerXLTask(recipe, corpus())
    net = task.build().eval()
    with world() as w:
        scores = {split: task.evaluate(net, split, w) for split in ("valid", "test")}
    assert scores["valid"].tokens == 2 * recipe.eval_streams * recipe.eval_context.tgt_len
    assert scores["test"].tokens == 97
    assert "of each the first 2 segments alone" in scores["valid"].protocol
    assert "alone" not in scores["test"].protocol


@pytest.mark.parametrize("attn_type", ["rel", "abs"])
def test_layers_are_compiled_once_whatever_the_lengths(attn_type):
    """Two epochs, each with a short end, and evaluations of other lengths between. The compiler's own is left out."""
    recipe = replace(RECIPE, model=replace(RECIPE.model, attn_type=attn_type), clock=Clock(compile=True),
                     eval_context=Context(tgt_len=5, mem_len=11))
    task = TransformerXLTask(recipe, corpus())
    learner = Learner(ALONE, task, recipe)
    for layer in learner.model.layers:
        layer.compile(backend="eager")
    torch.compiler.reset()
    steps = task.steps(ALONE, Position())
    learner.take(next(steps), .01, Timed())
    with torch.compiler.set_stance("fail_on_recompile"):
        for k in range(23):
            learner.take(next(steps), .01, Timed())
            if k % 9 == 0:
                learner.model.eval()
                task.evaluate(learner.model, "valid", ALONE)
                learner.model.train()


def test_the_end_of_an_epoch_that_is_padded_for_the_compiler_trains_as_the_short_one_does():
    recipe = replace(RECIPE, model=replace(RECIPE.model, dropout=0.0, dropatt=0.0))
    padded = replace(recipe, clock=replace(recipe.clock, compile=True))
    widths, losses = [], []
    for each in (recipe, padded):
        task = TransformerXLTask(each, corpus())
        learner = Learner(ALONE, task, recipe, TransformerXLTask(recipe, corpus()).build())
        torch.manual_seed(0)
        with torch.no_grad():
            for p in learner.parameters:
                p.normal_(0, .3)
        taken = list(islice(task.steps(ALONE, Position()), 13))
        widths.append([step.micro_batches[0].tokens_BQ.size(1) for step in taken])
        losses.append([learner.take(step, .01, Timed())[0].item() / step.tokens for step in taken])
    assert widths[0][10] < widths[0][9] == 8
    assert set(widths[1]) == {8}
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
