"""A table of vectors that embeds tokens and is a softmax's weight at once, and how ranks share its gradient."""
from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from engine.config import Wire
from engine.exchange import gathering, rounded
from engine.scaling import gathers

if TYPE_CHECKING:
    from engine.split import Reads, Tails


class Tied(nn.ParameterList):
    """The table, [V, D], as its only parameter. Its rows before the first of `cutoffs` are the frequent tokens', the
    head; at each a tail begins. Where these are split over ranks (engine/split.py), the parameter is the head alone.

    In a forward with gradients comes `embed`, then `weight`, once. To the softmax's gradient the rows of the embedded
    tokens are added in place: autograd would make one of the table's size of them.
    """

    def __init__(self, table: Tensor, cutoffs: tuple[int, ...] = ()):
        super().__init__([table])
        self.cutoffs, self.head = cutoffs, cutoffs[0] if cutoffs else len(table)
        self.tails: Tails | None = None
        self.in_tails = 0                         # tokens of the last embedding that are of the tails
        self.exchange: TableExchange | None = None
        self._begun: tuple[Tensor, TableExchange | None] | None = None

    def embed(self, tokens: Tensor, in_tails: int | None = None, reads: Reads | None = None) -> Tensor:
        """[..., D]. `in_tails`: how many of the tokens are of the tails, if the caller knows: a GPU is asked else.
        `reads`: which, where they are split."""
        if self.tails is not None:
            assert reads is not None
            rows = self._embed(tokens.where(tokens < self.head, 0), in_tails=0)
            return rows.flatten(0, -2).index_copy(0, reads.places_R, self.tails.embed(reads)).view_as(rows)
        return self._embed(tokens, in_tails)

    def _embed(self, tokens: Tensor, in_tails: int | None) -> Tensor:
        self._begun = None
        if not torch.is_grad_enabled():
            return F.embedding(tokens, self[0])
        self.in_tails = int((tokens >= self.head).sum()) if in_tails is None else in_tails
        exchange = self.exchange if self.exchange is not None and self.exchange.is_due else None
        if exchange is not None:
            exchange.begin(self.in_tails)
        rows: list[tuple[Tensor, Tensor]] = []
        weight = _Tie.apply(self[0], rows, exchange)
        self._begun = weight, exchange
        return _Embed.apply(weight, tokens, rows)

    def weight(self) -> Tensor:
        """For the softmax of this forward."""
        begun, self._begun = self._begun, None
        weight, exchange = begun or (self[0], None)
        return weight if exchange is None else _Send.apply(weight, exchange)


class TableExchange:
    """Makes a tied table's gradient the mean over ranks; DistributedDataParallel is to leave that table alone.

    The softmax's part is made first in backward, and travels while the rest is made. Of the embedding's, made last,
    the head travels as a whole, and of the tails the rows of the tokens that were read, from each rank to all others.
    (DDP sends the sum of both, as large as the table, when nothing is left to hide behind.)
    """

    def __init__(self, tied: Tied, wire: Wire, ddp: DistributedDataParallel):
        self._table, self._head, self._wire = tied[0], tied.head, wire
        self._ddp = weakref.ref(ddp)              # no circle, for it is to be gone before the process group
        # what rounding has taken so far, as engine.exchange.Remainder has it for other gradients
        self._lost = torch.zeros_like(tied[0]) if wire == "bf16_feedback" else None

    @property
    def is_due(self) -> bool:
        """False in DDP's no_sync, which is around all but the last of a step's micro-batches."""
        ddp = self._ddp()
        return ddp is not None and ddp.require_backward_grad_sync

    def begin(self, in_tails: int) -> None:
        """Of a forward. The ranks tell each other the most of `in_tails`, on the processor: a GPU is not waited for."""
        self._most, self._asked = torch.tensor(in_tails), None
        if self._head < len(self._table):
            self._asked = dist.all_reduce(self._most, dist.ReduceOp.MAX, async_op=True)

    def send(self, grad: Tensor) -> None:
        """The softmax's part, and with it what earlier micro-batches have left in the table's gradient."""
        if self._table.grad is not None:
            grad += self._table.grad
            self._table.grad = None
        grad /= dist.get_world_size()
        if self._lost is not None:
            grad += self._lost
        self._sent = rounded(grad, self._wire)
        if self._lost is not None:
            torch.sub(grad, self._sent, out=self._lost)
        self._sending = dist.all_reduce(self._sent, async_op=True)

    def end(self, grad: Tensor, tokens_R: Tensor, grads_RD: Tensor) -> None:
        """`grad`, what was sent, becomes the mean of it and of the embedding's part, whose rows these are."""
        ranks = dist.get_world_size()
        if self._asked is not None:
            self._asked.wait()
        head, most = late_rows(self._head, len(grad), int(self._most), ranks)
        grads_RD = grads_RD / ranks
        tail_R = tokens_R >= head
        of_head = grad.new_zeros(head, grad.size(1))
        of_head.index_add_(0, tokens_R.where(~tail_R, 0), grads_RD * ~tail_R.unsqueeze(1))
        # of all ranks as many rows as of the one with most, the rest of them zeros; nonzero would wait for a GPU
        first = tail_R.byte().argsort(descending=True, stable=True)[:most]
        lacking = most - len(first)
        ids_M = F.pad(tokens_R[first], (0, lacking))
        rows_MD = F.pad(grads_RD[first] * tail_R[first].unsqueeze(1), (0, 0, 0, lacking))

        sent_head, sent_MD = rounded(of_head, self._wire), rounded(rows_MD, self._wire)
        if self._lost is not None:
            self._lost[:head] += of_head - sent_head
            self._lost.index_add_(0, ids_M, rows_MD - sent_MD)
        sending_head = dist.all_reduce(sent_head, async_op=True)
        ids, rows = ids_M, sent_MD
        if most:
            (ids, sending_ids), (rows, sending_rows) = gathering(ids_M), gathering(sent_MD)
            sending_ids.wait()
            sending_rows.wait()
        self._sending.wait()
        if self._sent is not grad:
            grad.copy_(self._sent)
        sending_head.wait()
        grad[:head] += sent_head
        _add_rows_(grad, ids, rows.to(grad.dtype))
        del self._sent, self._sending


def travelling_early(model: nn.Module) -> list[Tied]:
    """The tables whose gradients have their own way. All of one without tails would have to travel twice."""
    return [module for module in model.modules()
            if isinstance(module, Tied) and module[0].requires_grad and module.cutoffs]


def late_rows(head: int, V: int, most: int, ranks: int) -> tuple[int, int]:
    """Of the embedding's part: how many rows are all-reduced, and how many gathered of each rank, if that is less."""
    return (head, most) if gathers(most, ranks, V - head) else (V, 0)


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: list[tuple[Tensor, Tensor]], exchange: TableExchange | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.rows, ctx.exchange, ctx.like = rows, exchange, table.detach()
        return table.view_as(table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """After all that used the weight."""
        grad = torch.zeros_like(ctx.like) if grad is None else grad
        for tokens, of_rows in ctx.rows:
            if ctx.exchange is None:
                grad.index_add_(0, tokens.flatten(), of_rows.flatten(0, -2))
            else:
                ctx.exchange.end(grad, tokens.flatten(), of_rows.flatten(0, -2))
        return grad, None, None


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.rows, ctx.tokens = rows, tokens
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.rows.append((ctx.tokens, grad))
        return None, None, None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, exchange: TableExchange) -> Tensor:
        ctx.exchange = exchange
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.send(grad)
        return grad, None


def _add_rows_(table: Tensor, ids: Tensor, rows: Tensor) -> None:
    """In one order, and so to the same sums on every rank: a GPU's index_add_ takes any."""
    if table.is_cuda:
        table.index_put_((ids,), rows, accumulate=True)
    else:
        table.index_add_(0, ids, rows)
