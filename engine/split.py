"""A tied table's tails split over the ranks: each keeps some rows of every tail, and trains these alone.

No gradient of a tail travels, and an optimizer's work and memory for them are a rank's share. Instead, in each forward,
the rows of tokens that are read come from the ranks that have them, and the hidden states of targets in tails go to all
ranks, which score them against their own rows; backward their gradients take the same ways back. All of it is exact:
Megatron's vocabulary-parallel softmax (arXiv:1909.08053), of the words of the tails.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engine.config import Wire, share_of
from engine.exchange import gathering, rounded
from engine.fused import computing_in, product, product_into
from engine.memory import empty_like
from engine.tied import Tied

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor    # torch 2.11's name


@dataclass(frozen=True)
class Shards:
    """Which rank has which rows of a table: of each tail its share, as even as can be. `edges`: where the tails begin,
    and the last one ends."""
    edges: tuple[int, ...]
    ranks: int

    def pieces(self, rank: int) -> list[range]:
        """Rows of the table, tail by tail."""
        shares = [(low, share_of(high - low, rank, self.ranks)) for low, high in pairwise(self.edges)]
        return [range(low + share.start, low + share.stop) for low, share in shares]

    def rows(self, rank: int) -> Tensor:
        """The same, [S]."""
        return torch.cat([torch.arange(piece.start, piece.stop) for piece in self.pieces(rank)])

    def places(self, tokens_T: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens in tails: the rank that has each, and where it is among the rows of that rank."""
        tail_T = torch.bucketize(tokens_T, torch.tensor(self.edges[1:]), right=True)
        low_T, size_T = torch.tensor(self.edges)[tail_T], torch.tensor(self.edges).diff()[tail_T]
        rank_T = ((tokens_T - low_T + 1) * self.ranks - 1) // size_T
        return rank_T, self._before[rank_T, tail_T] + tokens_T - low_T - rank_T * size_T // self.ranks

    @cached_property
    def _before(self) -> Tensor:
        """[ranks, tails]: rows of a rank before those of a tail."""
        return torch.tensor([list(accumulate(map(len, self.pieces(rank)[:-1]), initial=0))
                             for rank in range(self.ranks)])


class Reads:
    """Of a micro-batch: the tokens in tails that this rank reads, and what ranks must know of each other's.

    They ask each other before a step needs it, on the processor: no GPU and no other rank is waited for. First how many
    rows each reads of each, and how many targets it has in each tail; then which rows.
    """

    def __init__(self, shards: Shards, tokens: Tensor, targets_in: Sequence[int]):
        """Of tokens on the processor. `targets_in`: how many targets are in each tail."""
        tokens_T = tokens.flatten()
        places_R = (tokens_T >= shards.edges[0]).nonzero().squeeze(1)
        rank_R, row_R = shards.places(tokens_T[places_R])
        order_R = rank_R.argsort(stable=True)
        self.places_R, self._rows_R = places_R[order_R], row_R[order_R]         # by the rank that has them
        self._ranks = shards.ranks
        self._counts = torch.cat([torch.bincount(rank_R, minlength=shards.ranks), torch.tensor(targets_in)])

    def to(self, device: torch.device) -> Reads:
        if device.type != "cpu":
            self.places_R = self.places_R.pin_memory().to(device, non_blocking=True)
        return self

    def ask_how_many(self) -> None:
        """Collective, and does not wait."""
        self._all = [torch.empty_like(self._counts) for _ in range(self._ranks)]
        self._asking = dist.all_gather(self._all, self._counts, async_op=True)

    @cached_property
    def known(self) -> Known:
        self._asking.wait()
        counts = [x.tolist() for x in self._all]
        return Known([x[:self._ranks] for x in counts], [x[self._ranks:] for x in counts])

    def ask_which(self, rank: int) -> None:
        """Collective, and does not wait for it; once it is known how many."""
        of_others, of_this = self.known.reads[rank], [counts[rank] for counts in self.known.reads]
        self._asked = self._rows_R.new_empty(sum(of_this))
        self._asking = dist.all_to_all_single(self._asked, self._rows_R, of_this, of_others, async_op=True)

    @cached_property
    def asked(self) -> Tensor:
        """Of this rank's rows those that each rank reads, rank by rank; on the device of places_R."""
        self._asking.wait()
        device = self.places_R.device
        return self._asked if device.type == "cpu" else self._asked.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Known:
    """reads[r][s]: how many rows rank r reads of rank s. targets[r][i]: how many targets of r are in tail i."""
    reads: list[list[int]]
    targets: list[list[int]]

    @cached_property
    def most(self) -> list[int]:
        """Of each tail, the most targets that a rank has in it: all send so many rows, the rest of them zeros, and one
        where nobody has any."""
        return [max(1, *of_tail) for of_tail in zip(*self.targets)]


class Tails(nn.Module):
    """A rank's rows of the tails. In a forward come `embed` and `send`, once, then Sent's `score` and `nll`: each is
    collective."""

    def __init__(self, rows_SD: Tensor, shards: Shards, rank: int, wire: Wire):
        super().__init__()
        self.table = Tied(rows_SD)
        self.shards, self.rank, self.wire = shards, rank, wire
        self._rows_S = shards.rows(rank).to(rows_SD.device)      # no buffer, which DDP would give to all ranks

    def embed(self, reads: Reads) -> Tensor:
        """[R, D], in the order of reads.places_R."""
        to, of = [counts[self.rank] for counts in reads.known.reads], reads.known.reads[self.rank]
        return _Fetch.apply(self.table.embed(reads.asked, in_tails=0), to, of, self.wire)

    def send(self, states: Sequence[Tensor], targets: Sequence[Tensor], bias_V: Tensor, reads: Reads) -> Sent:
        """Begins to send the states [R, D] of targets [R] in each tail, counted from its first, to all ranks.
        `bias_V`: of the whole table."""
        sent = Sent(reads.known, self, self.table.weight(), bias_V.index_select(0, self._rows_S))
        state_MD = sent.padded(states)
        sent.states = _Gather.apply(state_MD.to(computing_in(state_MD)), sent)
        sent.targets, sent.telling = gathering(sent.padded(targets, -1))
        return sent

    def joined(self, head_HD: Tensor, rows_SD: Tensor) -> Tensor:
        """[V, D] on every rank, of the head and each one's rows. Collective."""
        pieces = [self.shards.pieces(rank) for rank in range(self.shards.ranks)]
        most = max(sum(map(len, of_rank)) for of_rank in pieces)
        gathered, work = gathering(F.pad(rows_SD, (0, 0, 0, most - len(rows_SD))))
        whole_VD = head_HD.new_empty(self.shards.edges[-1], head_HD.size(1))
        whole_VD[:len(head_HD)] = head_HD
        work.wait()
        for of_rank, rows in zip(pieces, gathered.split(most)):
            at = 0
            for piece in of_rank:
                whole_VD[piece.start:piece.stop] = rows[at:at + len(piece)]
                at += len(piece)
        return whole_VD


class Sent:
    """Of a forward, from `send` on: the states of targets in tails, their scores, and their gradients.

    A rows of a tail are those of all ranks, as many of each; M rows of a rank are those of one tail after the other.
    """

    def __init__(self, known: Known, tails: Tails, weight_SD: Tensor, bias_S: Tensor):
        self.known, self.weight, self.bias = known, weight_SD, bias_S
        self.rank, self.ranks, self.wire = tails.rank, tails.shards.ranks, tails.wire
        self.pieces, self.lows = tails.shards.pieces(tails.rank), tails.shards.edges
        self.states = self.targets = self.returned = torch.empty(0)
        self.work: Any = None                     # what was begun last with states
        self.telling: Any = None                  # with what is about them

    def padded(self, of_tails: Sequence[Tensor], value: float = 0) -> Tensor:
        """[M, ...] of [R, ...] of each tail."""
        return torch.cat([F.pad(x, (*[0, 0] * (x.ndim - 1), 0, most - len(x)), value=value)
                          for x, most in zip(of_tails, self.known.most)])

    def by_tail(self, of_ranks: Tensor) -> list[Tensor]:
        """[A, ...] of each tail of [ranks * M, ...]."""
        return [part.flatten(0, 1) for part in of_ranks.unflatten(0, (self.ranks, -1)).split(self.known.most, dim=1)]

    @torch.no_grad()
    def score(self) -> None:
        """What this rank's rows say of all states. Begins to add it up."""
        own = [len(piece) for piece in self.pieces]
        self.work.wait()
        self.telling.wait()
        self.x = self.by_tail(self.states)
        row = [t_A - (piece.start - low) for t_A, piece, low in zip(self.by_tail(self.targets), self.pieces, self.lows)]
        self.row = [row_A.masked_fill((row_A < 0) | (row_A >= n), -1) for row_A, n in zip(row, own)]
        with torch.autocast(self.states.device.type, enabled=False):
            self.scores = [product(x_AD, w_SD.to(x_AD.dtype), b_S.to(x_AD.dtype))
                           for x_AD, w_SD, b_S in zip(self.x, self.weight.split(own), self.bias.split(own))]
        precise = torch.promote_types(self.states.dtype, torch.float32)
        here_A = torch.cat([scores_AS.to(precise).logsumexp(1) for scores_AS in self.scores])
        # float64 holds e to the power of any score that is still one, so that no greatest need be known first
        self.sums_2A = torch.stack([here_A.double().exp(), torch.cat([*map(_at, self.scores, self.row)]).double()])
        self.work = dist.all_reduce(self.sums_2A, async_op=True)

    def nll(self) -> list[Tensor]:
        """-log p of this rank's targets in nats, [R] of each tail, after `score`."""
        return list(_TailNll.apply(self, self.states, self.weight, self.bias))


class Split:
    """What of a learner is split: tables, and the optimizer's state of them."""

    def __init__(self, tables: Sequence[Tied], rank: int, ranks: int, wire: Wire, optimizer: torch.optim.Optimizer,
                 model: nn.Module):
        self._tables, self._optimizer, self._model = tables, optimizer, model
        for table in tables:
            whole = table[0]
            shards = Shards((*table.cutoffs, len(whole)), ranks)
            parts = [rows.to(whole.device) for rows in (torch.arange(table.head), shards.rows(rank))]
            head, rows = (whole.detach()[part] for part in parts)
            table[0], table.tails = nn.Parameter(head), Tails(rows, shards, rank, wire)
            self._move([whole], list(table.parameters()), [
                {key: x[part] if x.shape == whole.shape else x.clone()
                 for key, x in optimizer.state.get(whole, {}).items()} for part in parts])
        cast(Any, optimizer).split = self.pairs   # for those that go by norms

    @property
    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Head and rows of each table."""
        return [(table[0], table.tails.table[0]) for table in self._tables if table.tails is not None]

    def share_overflow(self) -> None:
        """Where the gradient of one rank's rows is not finite, that of the head becomes so on all ranks: each scales
        its loss for itself, and they must all skip the same steps. Collective."""
        for head, rows in self.pairs:
            if head.grad is not None and rows.grad is not None:
                bad = (~torch.linalg.vector_norm(rows.grad, float("inf")).isfinite()).float()
                dist.all_reduce(bad)
                head.grad[0, 0] += torch.where(bad > 0, float("inf"), 0.0)

    @contextmanager
    def whole(self, optimizer: bool) -> Iterator[None]:
        """With the tables as they are on one rank, and with the optimizer's state of them, if that is wanted; what
        becomes of them then is not kept. Within another it changes nothing. Collective."""
        apart = [(table, table[0], table.tails) for table in self._tables if table.tails is not None]
        states = []
        for table, head, tails in apart:
            rows = tails.table[0]
            table[0], table.tails = nn.Parameter(tails.joined(head.detach(), rows.detach())), None
            if optimizer:
                of = [self._optimizer.state.get(x, {}) for x in (head, rows)]
                states.append(of)
                self._move([head, rows], [table[0]], [
                    {key: tails.joined(x, of[1][key]) if x.shape == head.shape else x for key, x in of[0].items()}])
        try:
            yield
        finally:
            for i, (table, head, tails) in enumerate(apart):
                whole, table[0], table.tails = table[0], head, tails
                if optimizer:
                    self._move([whole], [head, tails.table[0]], states[i])

    def _move(self, old: Sequence[Tensor], new: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
        """The optimizer from parameters to others in their place."""
        names = {p: name for name, p in self._model.named_parameters()}
        for group in self._optimizer.param_groups:
            at = next((i for i, p in enumerate(group["params"]) if p is old[0]), None)
            if at is not None:
                group["params"][at:at + len(old)] = new
                group["param_names"] = [names[p] for p in group["params"]]
        for p in old:
            self._optimizer.state.pop(p, None)
        self._optimizer.state.update({p: state for p, state in zip(new, states) if state})


def over_ranks(norms: Tensor, params: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Norms of parameters, [..., P]; of a rank's rows becomes that of all ranks' rows. Collective."""
    mine = [i for i, p in enumerate(params) if any(p is rows for _, rows in pairs)]
    if mine:
        squares = norms[..., mine].square()
        dist.all_reduce(squares)
        norms[..., mine] = squares.sqrt()
    return norms


def of_tables(norms: Tensor, params: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The same, and of head and rows then that of the table, for both. Collective."""
    norms, at = over_ranks(norms, params, pairs), {id(p): i for i, p in enumerate(params)}
    for pair in pairs:
        if ids := [at[id(p)] for p in pair if id(p) in at]:
            norms[..., ids] = norms[..., ids].norm(dim=-1, keepdim=True)
    return norms


def _swap(x: Tensor, given: list[int], taken: list[int]) -> Tensor:
    """Rows of x, so many to each rank, for those that each gives this one."""
    out = x.new_empty(sum(taken), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), taken, given)
    return out


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, given: list[int], taken: list[int], wire: Wire) -> Tensor:
        ctx.given, ctx.taken, ctx.wire = given, taken, wire
        return _swap(rows, given, taken)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mean = _swap(rounded(grad, ctx.wire), ctx.taken, ctx.given).to(grad.dtype) / dist.get_world_size()
        return mean, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state_MD: Tensor, sent: Sent) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.sent, ctx.dtype = sent, state_MD.dtype
        gathered, sent.work = gathering(state_MD)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any) -> tuple[Tensor | None, ...]:
        """What _TailNll sent back, while other gradients were made."""
        sent = ctx.sent
        sent.work.wait()
        return sent.returned.to(ctx.dtype) * sent.grad_M.unsqueeze(1).to(ctx.dtype), None


class _TailNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent: Sent, states: Tensor, weight_SD: Tensor, bias_S: Tensor) -> tuple[Tensor, ...]:
        x, scores, count = sent.x, sent.scores, [len(x_AD) for x_AD in sent.x]
        sent.work.wait()
        total_A = sent.sums_2A[0].log()
        nll_A = (total_A - sent.sums_2A[1]).to(torch.promote_types(states.dtype, torch.float32))
        for scores_AS, total, row_A in zip(scores, total_A.to(nll_A.dtype).split(count), sent.row):
            scores_AS.copy_((scores_AS.to(total.dtype) - total.unsqueeze(1)).exp_())
            if scores_AS.size(1):                  # p, less 1 at the target
                one_A1 = (row_A >= 0).to(scores_AS.dtype).unsqueeze(1)
                scores_AS.scatter_add_(1, row_A.clamp(min=0).unsqueeze(1), -one_A1)
        ctx.sent = sent
        ctx.save_for_backward(weight_SD, *x, *scores)
        del sent.x, sent.scores, sent.row, sent.sums_2A
        return tuple(nll.unflatten(0, (sent.ranks, -1))[sent.rank, :mine]
                     for nll, mine in zip(nll_A.split(count), sent.known.targets[sent.rank]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sent, (weight_SD, *saved) = ctx.sent, ctx.saved_tensors
        own, x, d_scores = [len(piece) for piece in sent.pieces], saved[:len(saved) // 2], saved[len(saved) // 2:]
        sent.grad_M = sent.padded(grads)
        everyones, telling = gathering(sent.grad_M)
        back = [product(d_AS, w_SD.to(d_AS.dtype).t()).unflatten(0, (sent.ranks, -1))
                for d_AS, w_SD in zip(d_scores, weight_SD.split(own))]
        sent.states = rounded(torch.cat(back, dim=1).flatten(0, 1), sent.wire)
        sent.returned = sent.states.new_empty(len(sent.grad_M), sent.states.size(1))
        sent.work = _reduce_scatter(sent.returned, sent.states, async_op=True)
        telling.wait()
        g = [g_A.unsqueeze(1).to(x[0].dtype) for g_A in sent.by_tail(everyones)]
        of_weight = empty_like(weight_SD)
        for whole, d_AS, x_AD, g_A1 in zip(of_weight.split(own), d_scores, x, g):
            product_into(whole, d_AS.t(), (g_A1 / sent.ranks * x_AD).t())      # the mean; of a bias DDP makes it
        of_bias = torch.cat([(g_A1.t() @ d_AS).squeeze(0) for g_A1, d_AS in zip(g, d_scores)])
        return None, None, of_weight, of_bias


def _at(scores_AS: Tensor, row_A: Tensor) -> Tensor:
    """Of each row the score there, 0 where that is -1."""
    if not scores_AS.size(1):
        return scores_AS.new_zeros(len(row_A))
    return scores_AS.gather(1, row_A.clamp(min=0).unsqueeze(1)).squeeze(1).masked_fill(row_A < 0, 0.0)
