"""The protocols of others, against their definitions in slow loops over the raw tokens."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.values import BadValue
from engine.world import World, world
from tests.ranks import run_ranks
from tests.txl.small import corpus
from tests.txl.test_task import model
from txl.config import Context
from txl.model import visible
from txl.protocol import context_for, segments
from txl.task import evaluate

ALONE = World(0, 0, 1, torch.device("cpu"))
CONTEXTS = [Context(7, 5), Context(4, 9, clamp_len=3, same_length=True), Context(5, 0), Context(3, 6, ext_len=2),
            Context(40, 2)]


def slow_streams(protocol: str, tokens: list[int], count: int, context: Context) -> list[tuple[list[int], int]]:
    """Each stream as (all it reads, how many of these before its own first token)."""
    n_step = len(tokens) // count
    own = [tokens[b * n_step:(b + 1) * n_step] for b in range(count)]
    if protocol == "original":
        return [(stream, 0) for stream in own]
    batches = 0
    while batches * context.tgt_len < context.mem_len:
        batches += 1
    warm = batches * context.tgt_len
    return [(own[b - 1][n_step - warm:] + own[b], warm) for b in range(count)]


def slow_loss(protocol: str, tokens: list[int], count: int, context: Context) -> tuple[float, int]:
    """Stream after stream, segment after segment; only targets of segments that begin in the stream itself count."""
    net, nats, counted = model(), 0.0, 0
    for stream, warm in slow_streams(protocol, tokens, count, context):
        memory, i = None, 0
        while i < len(stream) - 1:
            length = min(context.tgt_len, len(stream) - 1 - i)
            inputs = torch.tensor([stream[max(0, i - context.ext_len):i + length]])
            with torch.no_grad():
                hidden, memory = net.hidden(inputs, memory, context)
                log_prob = net.vocabulary.log_prob(hidden[0, -length:])
            for j in range(length if i >= warm else 0):
                nats -= float(log_prob[j, stream[i + 1 + j]])
                counted += 1
            i += context.tgt_len
    return nats, counted


@pytest.mark.parametrize("protocol", ["nvidia", "original"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("count", [1, 2])
def test_the_loss_is_that_of_their_loops(protocol, context, count):
    if protocol == "original" and context.same_length:
        context = Context(4, 10, clamp_len=3, same_length=True)
        defined = Context(4, 9, clamp_len=3, same_length=True)     # the test below has the reason
    else:
        defined = context
    text = corpus().splits["valid"]
    score = evaluate(model(), corpus(), "valid", context, count, ALONE, protocol)
    nats, counted = slow_loss(protocol, text.tolist(), count, defined)
    assert score.tokens == counted == count * (len(text) // count - 1)
    assert score.nats == pytest.approx(nats, rel=1e-10)


def test_the_first_stream_of_nvidias_warms_up_on_the_end_of_the_last():
    text = np.arange(100, 123, dtype=np.uint16)                    # three streams of seven; 121 and 122 are the tail
    read = list(segments("nvidia", text, 0, 3, range(3), Context(tgt_len=2, mem_len=3)))
    assert [counts for _, counts in read] == [False, False, True, True, True]
    assert torch.cat([x.tokens_BQ for x, _ in read], 1).tolist() == [
        [117, 118, 119, 120, 100, 101, 102, 103, 104, 105],
        [103, 104, 105, 106, 107, 108, 109, 110, 111, 112],
        [110, 111, 112, 113, 114, 115, 116, 117, 118, 119]]
    assert torch.cat([x.targets_BT for x, counts in read if counts], 1).tolist() == [
        [*range(101, 107)], [*range(108, 114)], [*range(115, 121)]]


@pytest.mark.parametrize("mem_len", [1, 4, 6, 13])
def test_the_originals_same_length_counts_a_token_among_its_mem_len(mem_len):
    """Their mask, triu(1 + mlen) + tril(-shift), over the keys that they keep, step by step from an empty memory."""
    qlen, ours = 4, context_for("original", Context(4, mem_len, same_length=True))
    for step in range(6):
        mlen = min(step * qlen, mem_len)
        ones = torch.ones(qlen, mlen + qlen)
        mask_len = mlen + qlen - mem_len
        shift = qlen - mask_len if mask_len > 0 else qlen
        theirs = (torch.triu(ones, 1 + mlen) + torch.tril(ones, -shift)) == 0
        length = min(step * qlen, ours.mem_len)
        mine = visible(qlen, ours.mem_len, length, ours.mem_len, torch.device("cpu"))
        for q in range(qlen):                                      # keys by distance from the segment's begin
            assert ({k - mlen for k in range(mlen + qlen) if theirs[q, k]}
                    == {k - ours.mem_len for k in range(ours.mem_len + qlen) if mine[q, k]})


def _scores():
    with world() as w:
        return [evaluate(model(), corpus(), "valid", Context(7, 5), count, w, protocol)
                for protocol in ("nvidia", "original") for count in (1, 2, 5)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_loss_is_the_same_for_every_number_of_ranks(ranks):
    alone = _scores()
    for scores in run_ranks(ranks, _scores):
        for mine, score in zip(alone, scores):
            assert (score.tokens, score.protocol) == (mine.tokens, mine.protocol)
            assert score.nats == pytest.approx(mine.nats, rel=1e-12)


def test_a_split_too_short_to_warm_up_on_is_refused():
    with pytest.raises(BadValue, match="33 of the 101 tokens each, but this protocol needs 35"):
        evaluate(model(), corpus(), "valid", Context(7, 33), 3, ALONE, "nvidia")
    with pytest.raises(BadValue, match="needs 2"):
        evaluate(model(), corpus(), "valid", Context(7, 33), 60, ALONE, "original")
