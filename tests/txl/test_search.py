"""Choosing by log-probabilities, against enumeration: every draw, every text, every choice by hand."""
from __future__ import annotations

import itertools
import math

import pytest
import torch

from txl.search import Beam, beam_search, chances

P = torch.tensor([[0.05, 0.4, 0.1, 0.25, 0.2], [0.1, 0.1, 0.1, 0.65, 0.05]], dtype=torch.float64)


def slow_chances(p: list[float], temperature: float, top_k: int | None, top_p: float) -> list[float]:
    sharp = [x ** (1 / temperature) for x in p]
    sharp = [x / sum(sharp) for x in sharp]
    order = sorted(range(len(p)), key=lambda i: -sharp[i])[:top_k]
    in_k = sum(sharp[i] for i in order)
    kept, have = [], 0.0
    for i in order:                                                # until they have top_p together
        if have >= top_p - 1e-12:
            break
        kept.append(i)
        have += sharp[i] / in_k
    total = sum(sharp[i] for i in kept)
    return [sharp[i] / total if i in kept else 0.0 for i in range(len(p))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 2, 4, 9])
@pytest.mark.parametrize("top_p", [0.01, 0.45, 0.55, 0.7, 0.93, 1.0])
def test_what_is_drawn_from_is_the_likeliest_by_number_then_by_probability(temperature, top_k, top_p):
    drawn = chances(P.log(), temperature, top_k, top_p)
    for row, p in zip(drawn, P.tolist()):
        assert row.tolist() == pytest.approx(slow_chances(p, temperature, top_k, top_p), abs=1e-9)


def test_at_temperature_0_only_the_likeliest_is_drawn():
    assert chances(P.log(), 0.0, top_k=3, top_p=0.5).tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]


def test_of_equally_likely_words_no_more_than_top_k_are_kept():
    assert (chances(torch.zeros(1, 6), top_k=4) > 0).sum() == 4


class Table:
    """log p of the next of three words by the whole text before, at random; it knows which rows it has."""
    V = 3

    def __init__(self, seed: int):
        self.seed, self.rows, self.asked = seed, [()], 0

    def log_prob(self, text: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1000 + sum((t + 1) * 4 ** i for i, t in enumerate(text)))
        return torch.randn(self.V, generator=generator, dtype=torch.float64).mul(2).log_softmax(0)

    def advance(self, rows: list[int], tokens: list[int]) -> torch.Tensor:
        self.rows, self.asked = [(*self.rows[row], token) for row, token in zip(rows, tokens)], self.asked + 1
        return torch.stack(list(map(self.log_prob, self.rows)))

    def score(self, text: tuple[int, ...]) -> float:
        return sum(float(self.log_prob(text[:i])[token]) for i, token in enumerate(text))

    def search(self, beams: int, length: int, **how) -> list[list[Beam]]:
        self.rows = [()]
        return beam_search(self.log_prob(())[None], self.advance, beams, length, **how)


@pytest.mark.parametrize("seed", range(5))
def test_beams_for_every_text_find_the_best_of_all_texts(seed):
    table = Table(seed)
    [found] = table.search(3 ** 4, 4)
    every = sorted(itertools.product(range(3), repeat=4), key=lambda text: -table.score(text))
    assert [beam.tokens for beam in found] == every
    assert [beam.score for beam in found] == pytest.approx([table.score(text) for text in every])


@pytest.mark.parametrize("seed", range(5))
def test_beams_for_every_text_find_the_best_that_end_early_too(seed):
    table = Table(seed)
    [found] = table.search(3 ** 4, 4, ended=lambda tokens: tokens[-1] == 2)
    every = [text for n in range(1, 5) for text in itertools.product(range(3), repeat=n)
             if 2 not in text[:-1] and (n == 4 or text[-1] == 2)]
    assert [beam.tokens for beam in found] == sorted(every, key=lambda text: -table.score(text))
    assert all(beam.ended == (beam.tokens[-1] == 2) for beam in found)


@pytest.mark.parametrize("seed", range(5))
def test_one_beam_always_takes_the_likeliest(seed):
    table, text = Table(seed), ()
    for _ in range(6):
        text = (*text, int(table.log_prob(text).argmax()))
    assert [[beam.tokens for beam in group] for group in table.search(1, 6)] == [[text]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_beams_are_the_best_extensions_of_the_best(seed, beams):
    table, kept = Table(seed), [()]
    for _ in range(5):
        kept = sorted(((*text, token) for text in kept for token in range(3)), key=lambda text: -table.score(text))
        kept = kept[:beams]
    assert [beam.tokens for beam in table.search(beams, 5)[0]] == kept


def test_a_search_whose_beams_have_all_ended_asks_no_more():
    table = Table(1)
    [found] = table.search(2, 50, ended=lambda tokens: len(tokens) == 3)
    assert table.asked == 2
    assert [len(beam.tokens) for beam in found] == [3, 3]


def test_groups_avoid_what_the_groups_before_chose_as_in_a_table_by_hand():
    """The same three words at every step: .5, .3, .2."""
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)

    def search(beams, length, groups, diversity):
        return beam_search(p.log(), lambda rows, tokens: p.log().expand(len(rows), 3), beams, length, groups=groups,
                           diversity=diversity)

    # Each choice of an earlier group halves a word. Group 1 takes a and b; then a .25, b .15, c .2: group 2, a and c.
    one = search(4, 1, 2, math.log(2))
    assert [[beam.tokens for beam in group] for group in one] == [[(0,), (1,)], [(0,), (2,)]]
    assert [math.exp(beam.score) for group in one for beam in group] == pytest.approx([0.5, 0.3, 0.5, 0.2])

    # Three groups of one. Step 1: a; then a .25, b .3, c .2: b; then a .25, b .15, c .2: a. Step 2, the same anew.
    three = search(3, 2, 3, math.log(2))
    assert [[beam.tokens for beam in group] for group in three] == [[(0, 0)], [(1, 1)], [(0, 0)]]
    assert [math.exp(group[0].score) for group in three] == pytest.approx([0.25, 0.09, 0.25])

    # At a factor of 3: a; then a .17, b .3, c .2: b; then a .17, b .1, c .2: c.
    assert [group[0].tokens for group in search(3, 2, 3, math.log(3))] == [(0, 0), (1, 1), (2, 2)]
    assert [group[0].tokens for group in search(3, 2, 3, 0.0)] == [(0, 0)] * 3


def test_a_beam_that_has_ended_chooses_nothing_that_other_groups_would_have_to_avoid():
    """At .5, .3, .2 and a factor of 2: a, and b beside it. Then a is .15 and b .09, unless group 1 still counted."""
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    found = beam_search(p.log(), lambda rows, tokens: p.log().expand(len(rows), 3), 2, 2, groups=2,
                        diversity=math.log(2), ended=lambda tokens: tuple(tokens) == (0,))
    assert [group[0].tokens for group in found] == [(0,), (1, 0)]
