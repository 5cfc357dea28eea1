"""Batches: every target once, each after what precedes it, whatever the ranks and streams."""
from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from engine.config import Batch
from txl.adaptive import IGNORE
from txl.batches import Sentences, Streams
from txl.config import Context

START = 99


def text(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.uint16) + 100               # token i is 100 + i: it tells where it is from


@pytest.mark.parametrize("length", [1, 7, 24, 25, 101])
@pytest.mark.parametrize("streams", [1, 2, 3, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("tgt_len", [1, 4, 10])
def test_every_token_is_a_target_exactly_once(length, streams, ranks, tgt_len):
    context = Context(tgt_len, mem_len=4, ext_len=2)
    whole = Streams(text(length), START, streams)
    seen = []
    for k in range(whole.segments(tgt_len)):
        here = []
        for rank in range(ranks):
            share = range(rank * streams // ranks, (rank + 1) * streams // ranks)
            if share:
                segment = whole.segment(share, k, context)
                here += segment.targets_BT[segment.targets_BT != IGNORE].tolist()
        assert len(here) == whole.targets(k, tgt_len)
        seen += here
    assert sorted(seen) == text(length).tolist()


@pytest.mark.parametrize("length", [1, 7, 24, 101, 400])
@pytest.mark.parametrize("streams", [1, 3, 8])
@pytest.mark.parametrize(("roll", "varlen"), [(True, None), (False, 10), (True, 10)])
@pytest.mark.parametrize("ext_len", [0, 3])
def test_in_an_epochs_own_order_too_every_token_is_a_target_once_after_the_one_before_it(
        length, streams, roll, varlen, ext_len):
    context = Context(10, mem_len=4, ext_len=ext_len)
    whole = Streams(text(length), START, streams).of_epoch(1, 2, roll=roll, varlen=varlen)
    seen = []
    for k in range(whole.segments(10)):
        segment = whole.segment(range(streams), k, context)
        again = segment.tokens_BQ.size(1) - segment.targets_BT.size(1)
        for tokens, targets in zip(segment.tokens_BQ[:, again:].tolist(), segment.targets_BT.tolist()):
            here = [(token, target) for token, target in zip(tokens, targets) if target != IGNORE]
            assert all(token == (START if target == 100 else target - 1) for token, target in here)
            seen += [target for _, target in here]
        assert len(seen) == sum(whole.targets(i, 10) for i in range(k + 1))
    assert sorted(seen) == text(length).tolist()


def test_a_rolled_stream_begins_anywhere_goes_on_at_its_beginning_and_is_another_in_each_epoch():
    plain, context = Streams(text(1000), START, 4), Context(tgt_len=10, mem_len=4)

    def stream(epoch: int, seed: int = 5) -> np.ndarray:
        rolled = plain.of_epoch(seed, epoch, roll=True, varlen=None)
        return np.concatenate([rolled.segment(range(4), k, context).targets_BT.numpy() for k in range(25)], axis=1)
    for i, row in enumerate(stream(0)):
        assert np.array_equal(row, np.roll(row.min() + np.arange(250), row.min() - row[0]))
        assert row.min() == 100 + 250 * i
    starts = {tuple(stream(epoch)[:, 0]) for epoch in range(20)}
    assert len(starts) == 20
    assert np.array_equal(stream(3), stream(3))
    assert not np.array_equal(stream(3), stream(3, seed=6))


def sentences_of(lengths: list[int]) -> tuple[np.ndarray, list[list[int]]]:
    """A text whose sentences end in START and are otherwise made of tokens that occur once."""
    whole = iter(range(100, 100 + sum(lengths)))
    sentences = [[next(whole) for _ in range(length - 1)] + [START] for length in lengths]
    return np.array([token for sentence in sentences for token in sentence], np.uint16), sentences


def lm_shuffled_iterator(sentences: list[list[int]], order: list[int], tgt_len: int):
    """The original's LMShuffledIterator with a batch of one, re-derived: inputs and targets of each batch but the last,
    which it drops. It reads <S> before every sentence, and never has that as a target."""
    waiting, stream = [[START, *sentences[i]] for i in order], [START]
    while True:
        inputs, targets = [], []
        while len(targets) < tgt_len:
            if len(stream) == 1:
                if not waiting:
                    return
                stream = waiting.pop(0)
            count = min(len(stream) - 1, tgt_len - len(targets))
            inputs += stream[:count]
            targets += stream[1:count + 1]
            stream = stream[count:]
        yield inputs, targets


@pytest.mark.parametrize("tgt_len", [1, 4, 7])
def test_one_stream_of_shuffled_sentences_is_the_originals(tgt_len):
    text, sentences = sentences_of([3, 1, 6, 2, 9, 4, 4, 1, 5])
    found = Sentences(text, START)
    plain, context = Streams(text, START, 1), Context(tgt_len, mem_len=4)
    for epoch in range(3):
        order = found.shuffled(np.random.default_rng((7, epoch)))._order.tolist()
        streams = plain.of_epoch(7, epoch, roll=False, varlen=None, sentences=found)
        theirs = list(lm_shuffled_iterator(sentences, order, tgt_len))
        for k, (inputs, targets) in enumerate(theirs):
            segment = streams.segment(range(1), k, context)
            assert segment.tokens_BQ[0].tolist() == inputs
            assert segment.targets_BT[0].tolist() == targets
        assert len(theirs) == len(text) // tgt_len
        assert streams.segments(tgt_len) == -(-len(text) // tgt_len)          # the rest is not dropped here


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("end", [True, False])
def test_shuffled_streams_have_every_sentence_whole_once_and_in_another_order_each_epoch(count, end):
    lengths = np.random.default_rng(1).integers(1, 12, 200).tolist()
    text, sentences = sentences_of(lengths)
    if not end:
        text, sentences = text[:-1], [*sentences[:-1], sentences[-1][:-1]]    # the text does not end in START
    plain, context, found = Streams(text, START, count), Context(10, mem_len=4), Sentences(text, START)

    def epoch(number: int, seed: int = 3) -> list[int]:
        streams = plain.of_epoch(seed, number, roll=False, varlen=None, sentences=found)
        assert len(streams.tokens) == len(text)
        rows = [streams.segment(range(count), k, context) for k in range(streams.segments(10))]
        targets = np.concatenate([row.targets_BT.numpy() for row in rows], axis=1)
        read = [token for row in targets.tolist() for token in row if token != IGNORE]
        inputs = np.concatenate([row.tokens_BQ.numpy() for row in rows], axis=1)
        assert [token for i, t in zip(inputs, targets) for token in i[t != IGNORE].tolist()] == [START, *read[:-1]]
        return read
    for number in range(3):
        there, rest = epoch(number), list(map(tuple, sentences))
        while there:                              # each sentence begins with a token of its own, or is START alone
            sentence = next(s for s in rest if s == tuple(there[:len(s)]) and (len(s) > 1 or there[0] == START))
            rest.remove(sentence)
            there = there[len(sentence):]
        assert rest == []
    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=4)


def test_segments_of_random_lengths_are_those_of_the_original():
    """Of 19 in 20 the mean is tgt_len, of the others half of it; deviation 5, at least 5, at most tgt_len + 15."""
    context = Context(tgt_len=70, mem_len=4)
    streams = Streams(text(60_000).astype(np.int64), START, 1).of_epoch(0, 0, roll=False, varlen=70)
    widths = np.array([streams.segment(range(1), k, context).targets_BT.size(1) for k in range(streams.segments(70))])
    assert widths.min() >= 5
    assert widths.max() <= 85
    short = widths[:-1] < 52
    assert short.mean() == pytest.approx(.05, abs=.03)
    assert widths[:-1][~short].mean() == pytest.approx(69.5, abs=1)
    assert widths[:-1][~short].std() == pytest.approx(5, abs=.8)
    assert widths[:-1][short].mean() == pytest.approx(34.5, abs=4)


@pytest.mark.parametrize("ext_len", [0, 3])
def test_inputs_are_the_text_before_the_targets(ext_len):
    context = Context(tgt_len=5, mem_len=4, ext_len=ext_len)
    streams = Streams(text(53), START, 4)
    for k in range(streams.segments(5)):
        segment = streams.segment(range(4), k, context)
        again = segment.tokens_BQ.size(1) - segment.targets_BT.size(1)
        assert again == (ext_len if k else 0)
        for tokens, targets in zip(segment.tokens_BQ.tolist(), segment.targets_BT.tolist()):
            for i, target in enumerate(targets):
                if target != IGNORE:
                    assert tokens[again + i] == (START if target == 100 else target - 1)
                    assert tokens[again:] == sorted(tokens[again:]) or START in tokens or IGNORE in targets
            for i in range(again):
                assert tokens[i] == targets[0] - 1 - again + i


def test_a_stream_goes_on_where_its_last_segment_ended():
    streams = Streams(text(1000), START, 7)
    context = Context(tgt_len=10, mem_len=4)
    segments = [streams.segment(range(2, 5), k, context).targets_BT for k in range(streams.segments(10))]
    for before, after in pairwise(segments):
        for a, b in zip(before.tolist(), after.tolist()):
            assert b[0] in (a[-1] + 1, IGNORE)


def test_padding_occurs_only_at_the_end_of_the_last_segment():
    streams = Streams(text(103), START, 10)
    context = Context(tgt_len=4, mem_len=4)
    for k in range(streams.segments(4)):
        padded = streams.segment(range(10), k, context).targets_BT == IGNORE
        assert not padded[:, :-1].any()
        assert k == streams.segments(4) - 1 or not padded.any()


def test_ranks_and_micro_batches_partition_the_batch_without_losing_a_sequence():
    for total in (5, 8, 13, 96):
        for ranks in range(1, 6):
            for micro in (None, 1, 2, 5):
                batch = Batch(size=total, micro_size=micro)
                pieces = [batch.micro_batches(rank, ranks) for rank in range(ranks)]
                assert [s for rank in pieces for piece in rank for s in piece] == list(range(total))
                sizes = [sum(map(len, rank)) for rank in pieces]
                assert max(sizes) - min(sizes) <= 1
                assert micro is None or all(len(piece) <= micro for rank in pieces for piece in rank)


def test_a_batch_smaller_than_the_ranks_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="at most 3 ranks"):
        Batch(size=3).total(4)


def test_cluster_rows_tell_which_targets_each_tail_cluster_has():
    streams = Streams(np.array([0, 5, 3, 9, 5, 1, 8], dtype=np.uint16), 0, 1)
    segment = streams.segment(range(1), 0, Context(tgt_len=7, mem_len=0), cutoffs=(3, 6))
    assert [rows.tolist() for rows in segment.rows] == [[1, 2, 4], [3, 6]]
