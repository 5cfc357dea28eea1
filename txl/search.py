"""Choosing what comes next, by log-probabilities from wherever: drawing, beam search, diverse beams.

B rows, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Which of the present rows go on, each with which token; a row may go on more than once or not at all.
# Gives log p of what follows, [B, V].
Advance = Callable[[list[int], list[int]], Tensor]


def chances(log_prob_BV: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """Probabilities to draw from: p ** (1 / temperature) of the top_k likeliest and, of these, of the fewest likeliest
    that have top_p together; of the likeliest alone at temperature 0."""
    if temperature == 0:
        return F.one_hot(log_prob_BV.argmax(-1), log_prob_BV.size(-1)).to(log_prob_BV.dtype)
    ranked = (log_prob_BV / temperature).sort(dim=-1, descending=True, stable=True)
    p_BV = ranked.values.softmax(-1)
    if top_k is not None:
        p_BV = F.normalize(p_BV * (torch.arange(p_BV.size(-1), device=p_BV.device) < top_k), p=1, dim=-1)
    if top_p < 1:
        p_BV = p_BV * (p_BV.cumsum(-1) - p_BV < top_p)
    return torch.zeros_like(p_BV).scatter(-1, ranked.indices, F.normalize(p_BV, p=1, dim=-1))


@dataclass(frozen=True)
class Beam:
    score: float                                  # log p of its tokens
    tokens: tuple[int, ...] = ()
    ended: bool = False


def beam_search(log_prob_1V: Tensor, advance: Advance, beams: int, length: int, *, groups: int = 1,
                diversity: float = 0.0, ended: Callable[[Sequence[int]], bool] = lambda tokens: False
                ) -> list[list[Beam]]:
    """The likeliest continuations of `length` tokens, or fewer where `ended`, by group, the best first.

    Each of the groups has beams / groups of them. When a group chooses, a token is worth `diversity` less for each beam
    of the groups before it that has just chosen it; the scores remain log-probabilities. Source: arXiv:1610.02424, with
    Hamming distance.
    """
    found = [[Beam(0.0)] for _ in range(groups)]
    log_prob_BV = log_prob_1V.double().cpu()
    row_of: dict[tuple[int, ...], int] = {(): 0}
    for step in range(length):
        chosen_V = torch.zeros(log_prob_BV.size(-1), dtype=torch.float64)
        for g, group in enumerate(found):
            found[g] = _extended(group, log_prob_BV, row_of, beams // groups, diversity * chosen_V, ended)
            for beam in found[g]:
                chosen_V[beam.tokens[-1]] += len(beam.tokens) == step + 1     # one that ended earlier chose nothing
        live = list(dict.fromkeys(beam.tokens for group in found for beam in group if not beam.ended))
        if not live or step + 1 == length:
            break
        log_prob_BV = advance([row_of[tokens[:-1]] for tokens in live], [tokens[-1] for tokens in live]).double().cpu()
        row_of = {tokens: row for row, tokens in enumerate(live)}
    return [sorted(group, key=lambda beam: -beam.score) for group in found]


def _extended(group: list[Beam], log_prob_BV: Tensor, row_of: dict[tuple[int, ...], int], count: int,
              penalty_V: Tensor, ended: Callable[[Sequence[int]], bool]) -> list[Beam]:
    """The best of the beams that have ended and of all extensions, by a token, of those that have not."""
    candidates = [(beam.score, beam) for beam in group if beam.ended]
    live = [beam for beam in group if not beam.ended]
    if live:
        score_BV = torch.stack([beam.score + log_prob_BV[row_of[beam.tokens]] for beam in live])
        best = (score_BV - penalty_V).flatten().topk(min(count, score_BV.numel()))
        for value, index in zip(best.values.tolist(), best.indices.tolist()):
            row, token = divmod(index, score_BV.size(1))
            tokens = (*live[row].tokens, token)
            candidates.append((value, Beam(float(score_BV[row, token]), tokens, ended(tokens))))
    return [beam for _, beam in sorted(candidates, key=lambda candidate: -candidate[0])[:count]]
