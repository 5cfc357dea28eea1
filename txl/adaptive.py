"""Adaptive embedding and softmax over one vocabulary, tied: tables, projections, cluster logits, biases.

Sources: adaptive softmax arXiv:1609.04309, adaptive input arXiv:1809.10853; with one cluster (no cutoffs) both are
the plain ones. B batch, T positions, R = B*T rows, D d_model, V vocabulary.
"""
from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.fused import Part, linear, softmax_nll
from engine.split import Reads
from engine.tied import Tied
from engine.values import BadValue
from txl.config import Model

IGNORE = -1                                       # a target that is not there: no loss, no gradient


def cluster_rows(targets_BT: Tensor, cutoffs: tuple[int, ...]) -> tuple[Tensor, ...]:
    """For each tail cluster the rows of targets_BT.flatten() that fall into it.

    Called on the host, where the batch is made: the sizes are then known there, and choosing rows on the device
    need not wait for it.
    """
    flat_R = targets_BT.flatten()
    edges = (*cutoffs, torch.iinfo(flat_R.dtype).max)
    return tuple(((flat_R >= low) & (flat_R < high)).nonzero().squeeze(1) for low, high in pairwise(edges))


def chance(words: Tensor, V: int, tries: int) -> Tensor:
    """That a word is among so many drawn log-uniformly: word n, of a vocabulary with the frequent ones first, each time
    with p = log((n + 2) / (n + 1)) / log(V + 1)."""
    p = torch.log1p(1 / (words + 1.0)) / math.log(V + 1)
    return -torch.expm1(tries * torch.log1p(-p))


class AdaptiveVocabulary(nn.Module):
    """The vocabulary's end of the model: `embed` tokens, and `nll` or `log_prob` of what they might be.

    With div_val 1 there is one table for all words (its LAMB trust ratio is then that of the ancestors), with
    div_val > 1 one per cluster. The head scores its own words and one entry a tail cluster, in natural order (the
    original PyTorch code has the clusters' columns reversed: mind it when weights are converted).
    """

    def __init__(self, model: Model, n_token: int):
        super().__init__()
        self.edges = (0, *model.cutoffs, n_token)
        self.clusters = list(pairwise(self.edges))
        if self.edges[-1] <= self.edges[-2]:
            raise BadValue(f"the last cutoff {model.cutoffs[-1]} must be below the vocabulary's {n_token} tokens")
        self.cutoffs, self.d_model = model.cutoffs, model.d_model
        self.samples = model.sample_softmax
        self.shared_table = model.div_val == 1
        sizes = [(n_token, model.d_embed_of(0))] if self.shared_table else [
            (high - low, model.d_embed_of(i)) for i, (low, high) in enumerate(self.clusters)]
        projected = not self.shared_table or model.d_embed_of(0) != model.d_model

        def projections(count: int) -> nn.ParameterList:
            return nn.ParameterList(torch.empty(model.d_model, sizes[min(i, len(sizes) - 1)][1]) for i in range(count))

        tables = [torch.empty(size) for size in sizes]
        tied = self.shared_table and model.tie_weight and self.samples is None
        self.tables = Tied(tables[0], model.cutoffs) if tied else nn.ParameterList(tables)
        self.in_projs = projections(len(sizes) if projected else 0)
        self.out_tables = None if model.tie_weight else nn.ParameterList(torch.empty(size) for size in sizes)
        ties = [model.ties_proj(i) for i in range(len(self.clusters))]
        own = projections(len(self.clusters) if projected else 0)
        self.out_projs = nn.ParameterDict({str(i): proj for i, proj in enumerate(own) if not ties[i]})
        self.bias = nn.Parameter(torch.zeros(n_token))
        self.cluster_weight = nn.Parameter(torch.empty(len(self.cutoffs), model.d_embed_of(0)))
        self.cluster_bias = nn.Parameter(torch.zeros(len(self.cutoffs)))

    def embed(self, tokens_BT: Tensor, in_tails: int | None = None, reads: Reads | None = None) -> Tensor:
        """Embeddings times sqrt(d_model), projected to D. Every table is read for every token and masked: no shape
        depends on the data, and the tail tables are narrow. In the parameters' precision, for it begins the residual
        stream: autocast would hand on a projection's 16 bits. `in_tails`: how many tokens are beyond the head, if the
        caller knows; `reads`: which, where tails are split over ranks."""
        if self.shared_table:
            embedded = (self.tables.embed(tokens_BT, in_tails, reads) if isinstance(self.tables, Tied) else
                        F.embedding(tokens_BT, self.tables[0]))
            embedded = linear(embedded, self.in_projs[0]) if len(self.in_projs) else embedded
        else:
            embedded = torch.zeros((), device=tokens_BT.device)
            for (low, high), table, proj in zip(self.clusters, self.tables, self.in_projs):
                inside = (tokens_BT >= low) & (tokens_BT < high)
                rows = F.embedding((tokens_BT - low).clamp(0, high - low - 1), table)
                embedded = embedded + linear(rows * inside.unsqueeze(-1), proj)
        return embedded.to(self.bias.dtype) * self.d_model ** 0.5

    def nll(self, hidden_RD: Tensor, target_R: Tensor, rows: tuple[Tensor, ...] | None = None,
            reads: Reads | None = None) -> Tensor:
        """-log p(target) in nats, in the order of the rows; 0 where the target is IGNORE. Autocast makes it fp32.

        `rows` is cluster_rows(target), computed here where absent. A cluster without a target still takes part, with
        no rows, so that all its parameters get a (zero) gradient on every rank. With sample_softmax training has an
        estimate, evaluation all words. `reads`: see embed.
        """
        if self.samples is not None and self.training:
            return self._sampled_nll(hidden_RD, target_R, self.samples)
        rows = cluster_rows(target_R, self.cutoffs) if rows is None else rows
        head_target_R = target_R
        for i, rows_C in enumerate(rows):
            head_target_R = head_target_R.index_fill(0, rows_C, self.cutoffs[0] + i)
        tables = list(self.tables if self.out_tables is None else self.out_tables)
        if isinstance(self.tables, Tied):
            tables = [self.tables.weight()]
        states = [self._project(0, hidden_RD)]
        states += [self._project(i, hidden_RD.index_select(0, rows_C)) for i, rows_C in enumerate(rows, start=1)]
        targets = [head_target_R]
        targets += [target_R.index_select(0, rows_C) - low for rows_C, low in zip(rows, self.cutoffs)]
        parts = [[Part(0, low, high) if self.shared_table else Part(i, 0, high - low)]
                 for i, (low, high) in enumerate(self.clusters)]
        if self.cutoffs:
            parts[0].append(Part(len(tables), 0, len(self.cutoffs)))
        head_bias, *biases = self.bias.split([high - low for low, high in self.clusters])
        weights, biases = [*tables, self.cluster_weight], [torch.cat([head_bias, self.cluster_bias]), *biases]
        split = self.tables.tails if isinstance(self.tables, Tied) else None
        if split is None:
            nll_R, *tails = softmax_nll(states, targets, parts, weights, biases)
        else:
            assert reads is not None
            sent = split.send(states[1:], targets[1:], self.bias, reads)       # on their way while the head is scored
            nll_R, = softmax_nll(states[:1], targets[:1], parts[:1], weights, biases[:1], sent.score)
            tails = sent.nll()
        for rows_C, nll_C in zip(rows, tails):
            nll_R = nll_R.index_add(0, rows_C, nll_C)
        return nll_R

    def _sampled_nll(self, hidden_RD: Tensor, target_R: Tensor, samples: int) -> Tensor:
        """-log p(target) among itself and S words that are drawn for all rows in 2 * samples tries, in fp32.

        Each counts by how often it is expected (arXiv:1412.2007): one that is drawn twice counts once, one that is a
        row's target not among that row's others.
        """
        V, tries = len(self.bias), 2 * samples
        uniform_S = torch.rand(tries, device=hidden_RD.device, dtype=torch.float64)
        drawn_S = (((V + 1) ** uniform_S).long() - 1).clamp(0, V - 1).sort().values
        again_S = F.pad(drawn_S[1:] == drawn_S[:-1], (1, 0))
        target = target_R.clamp(min=0)
        table, h = self._table(0), self._project(0, hidden_RD)
        true_R = (h * table[target]).sum(-1).float() + self.bias[target] - chance(target, V, tries).log()
        others_RS = linear(h, table[drawn_S]).float() + self.bias[drawn_S] - chance(drawn_S, V, tries).log()
        others_RS = others_RS.masked_fill(again_S | (drawn_S == target.unsqueeze(1)), float("-inf"))
        nll_R = torch.cat([true_R.unsqueeze(1), others_RS], dim=1).logsumexp(1) - true_R
        unused = self.cluster_weight.sum() + self.cluster_bias.sum()      # 0: DDP wants a gradient of every parameter
        return nll_R.masked_fill(target_R == IGNORE, 0.0) + unused

    def log_prob(self, hidden_RD: Tensor) -> Tensor:
        """log p of every word, [R, V]."""
        head = self._head(hidden_RD).log_softmax(-1)
        n_head = self.edges[1]
        tails = [self._cluster(i, hidden_RD).log_softmax(-1) + head[:, n_head + i - 1:n_head + i]
                 for i in range(1, len(self.clusters))]
        return torch.cat([head[:, :n_head], *tails], dim=-1)

    def _head(self, hidden_RD: Tensor) -> Tensor:
        weight = torch.cat([self._table(0), self.cluster_weight])
        bias = torch.cat([self.bias[:self.edges[1]], self.cluster_bias])
        return linear(self._project(0, hidden_RD), weight, bias)

    def _cluster(self, i: int, hidden_RD: Tensor) -> Tensor:
        return linear(self._project(i, hidden_RD), self._table(i), self.bias[self.edges[i]:self.edges[i + 1]])

    def _table(self, i: int) -> Tensor:
        tables = self.tables if self.out_tables is None else self.out_tables
        return tables[0][self.edges[i]:self.edges[i + 1]] if self.shared_table else tables[i]

    def _project(self, i: int, hidden_RD: Tensor) -> Tensor:
        if not len(self.in_projs):
            return hidden_RD
        own = str(i) in self.out_projs
        return linear(hidden_RD, (self.out_projs[str(i)] if own else self.in_projs[0 if self.shared_table else i]).T)
