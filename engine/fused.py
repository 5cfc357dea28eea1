"""Layers that training spends its time in: linear maps, attention, dropout, softmax losses. The same mathematics as
torch.nn's; only time and memory differ, and on a CPU which numbers a seed drops.

On a CPU torch (2.13) hands products of float32 to MKL, which has no AVX-512 for AMD's processors: oneDNN, in the same
torch, takes three quarters of the time there. Dropout draws its bits one by one; here four share a draw.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.memory import empty_like

CHUNK_BYTES = {True: 4 << 20, False: 256 << 20}   # of scores worked on at a time: on a CPU (True) what a cache holds
BLOCK = 1 << 14                                   # rows of a table
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Part(NamedTuple):
    """Rows of one of several weights."""
    weight: int
    first: int
    last: int


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The operations that a GPU would be given, whatever the device; to count them."""
    global _cpu_ways
    _cpu_ways = False
    try:
        yield
    finally:
        _cpu_ways = True


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias, [..., out] of x [..., in], weight [out, in] and bias [out]."""
    if not _onednn(x):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """relu(linear(x, weight, bias)), without a gradient."""
    if _onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu", [], "")
    if computing_in(x) != weight.dtype:            # autocast does not know what follows
        return F.linear(x, weight, bias).relu_()
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])


def computing_in(x: Tensor) -> torch.dtype:
    """The precision of a product with x: autocast's, where there is one."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Linear(nn.Linear):
    """Its weights are for whoever makes it to fill."""

    def reset_parameters(self) -> None:
        """Nothing: torch's numbers would be drawn to be overwritten, a tenth of building a model."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Dropout(nn.Dropout):
    """On a CPU the probability is rounded to a multiple of 2**-16."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or not _on_cpu(x):
            return super().forward(x)
        return _Dropout.apply(x, round(self.p * 2 ** 16))


def attention(q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, bias_BNQK: Tensor | None, visible_QK: Tensor,
              dropout: float = 0.0) -> Tensor:
    """softmax((q·kᵀ + bias) / √H over the visible keys)·v, [B, N, Q, H]; each query must see a key. `visible_QK` may
    also be [B, 1, Q, K]; dropout is of the softmax's probabilities.

    On a CPU torch has no fused kernel for a bias that is learned, and keeps six tensors of the scores' size where one
    is needed. On a GPU not cuDNN's: its backward with a mask gives NaN at lengths of 64 modulo 128 on Hopper
    (pytorch #196678).
    """
    if bias_BNQK is not None and dropout == 0 and torch.is_grad_enabled() and _on_cpu(q_BNQH):
        return _Attention.apply(q_BNQH, k_BNKH, v_BNKH, bias_BNQK, visible_QK)
    mask = visible_QK if bias_BNQK is None else \
        (bias_BNQK * q_BNQH.size(-1) ** -0.5).masked_fill(~visible_QK, float("-inf"))
    return attend(q_BNQH, k_BNKH, v_BNKH, mask, dropout)


def attend(q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q·kᵀ / √H + mask)·v; a mask of booleans says what is visible."""
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends) if q_BNQH.is_cuda else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q_BNQH, k_BNKH, v_BNKH, attn_mask=mask, dropout_p=dropout)


def softmax_nll(states: Sequence[Tensor], targets: Sequence[Tensor], parts: Sequence[Sequence[Part]],
                weights: Sequence[Tensor], biases: Sequence[Tensor],
                meanwhile: Callable[[], None] | None = None) -> tuple[Tensor, ...]:
    """-log p(target) in nats under several softmaxes at once, [R] of each, of states [R, D] and targets [R]; 0 where
    the target is -1. fp32 under autocast.

    The i-th is a softmax over states[i]·wᵀ + biases[i], with w the rows of weights that parts[i] names, one above the
    other. No row may be in two of them, and every row in one: the gradient of a weight is then made once, as a whole.
    (Autograd, given slices of one table, makes a gradient of the table's size for each, and adds them up.) Kept for
    backward is one number in the precision of the products for each score. `meanwhile` is called when scores are made.
    """
    return _SoftmaxNll.apply(torch.is_grad_enabled(), parts, meanwhile, len(states), len(weights), *targets, *states,
                             *weights, *biases)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        """So many of 2**16."""
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
        kept = torch.empty(x.shape, dtype=torch.uint8)
        torch.ge(bits[:x.numel()].view(x.shape), dropped - 2 ** 15, out=kept)
        ctx.save_for_backward(kept)
        ctx.scale = 2 ** 16 / (2 ** 16 - dropped)
        return kept.to(x.dtype).mul_(ctx.scale).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, = ctx.saved_tensors
        return kept.to(grad.dtype).mul_(ctx.scale).mul_(grad), None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad_RO = grad.flatten(0, -2)
        return (product(grad, weight.t()) if of_x else None,
                product(grad_RO.t(), x.flatten(0, -2).t()) if of_weight else None,
                grad_RO.sum(0) if of_bias else None)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, visible: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            ctx.scale, ctx.shape = q.size(-1) ** -0.5, bias.shape[:2]
            scores = torch.baddbmm(bias.flatten(0, 1), q, k.mT, beta=ctx.scale, alpha=ctx.scale)
            scores.unflatten(0, ctx.shape).masked_fill_(~visible, float("-inf"))
            p = scores.softmax(-1)
            ctx.save_for_backward(q, k, v, p)
            return torch.bmm(p, v).unflatten(0, ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        grad = grad.flatten(0, 1)
        of_v = torch.bmm(p.mT, grad)
        of_scores = torch._softmax_backward_data(torch.bmm(grad, v.mT), p, -1, p.dtype).mul_(ctx.scale)
        of_q, of_k = torch.bmm(of_scores, k), torch.bmm(of_scores.mT, q)
        return *(x.unflatten(0, ctx.shape) for x in (of_q, of_k, of_v, of_scores)), None


class _SoftmaxNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorded: bool, parts: Sequence[Sequence[Part]], meanwhile: Callable[[], None] | None,
                n: int, n_weights: int, *tensors: Tensor) -> Any:
        targets, states, weights = tensors[:n], tensors[n:2 * n], tensors[2 * n:2 * n + n_weights]
        kind = states[0].device.type
        dtype = computing_in(states[0])
        ctx.parts, nlls, saved = parts, [], []
        with torch.autocast(kind, enabled=False):
            for target_R, state_RD, rows, bias in zip(targets, states, parts, tensors[2 * n + n_weights:]):
                state_RD = state_RD.to(dtype)
                scores_RV = _scores(state_RD, weights, rows, bias.to(dtype))
                if meanwhile is not None:
                    meanwhile()
                nlls.append(_nll(scores_RV, target_R, differentiate=recorded and any(ctx.needs_input_grad)))
                saved += [target_R, state_RD, scores_RV]
        ctx.save_for_backward(*saved, *weights)
        return tuple(nlls)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = iter(ctx.saved_tensors)
        kept = [(next(saved), next(saved), next(saved)) for _ in grads]
        weights, needed = list(saved), ctx.needs_input_grad[5 + 2 * len(grads):]
        of_weights = [empty_like(weight) if needs else None for weight, needs in zip(weights, needed)]
        of_states, of_biases = [], []
        for grad_R, (target_R, state_RD, d_scores_RV), rows in zip(grads, kept, ctx.parts):
            grad_R1 = grad_R.masked_fill(target_R < 0, 0.0).unsqueeze(1).to(state_RD.dtype)
            weighted_RD, at = grad_R1 * state_RD, 0
            of_state = torch.zeros_like(state_RD, dtype=grad_R.dtype)
            for weight, first, last in _blocks(weights, rows, state_RD):
                d_block, whole = d_scores_RV[:, at:at + last - first], of_weights[weight]
                at += last - first
                of_state += product(d_block, weights[weight][first:last].to(state_RD.dtype).t())
                if whole is not None:
                    product_into(whole[first:last], d_block.t(), weighted_RD.t())
            of_states.append(of_state * grad_R1)
            of_biases.append((grad_R1.t() @ d_scores_RV).squeeze(0))
        return *[None] * (5 + len(grads)), *of_states, *of_weights, *of_biases


def _blocks(weights: Sequence[Tensor], parts: Sequence[Part], like: Tensor) -> Iterator[Part]:
    """The same rows, in pieces where a CPU would else copy all of them to 16 bits: half the size of a table."""
    for weight, first, last in parts:
        rows = BLOCK if _on_cpu(like) and weights[weight].dtype != like.dtype else max(1, last - first)
        yield from (Part(weight, i, min(i + rows, last)) for i in range(first, last, rows))


def _scores(state_RD: Tensor, weights: Sequence[Tensor], parts: Sequence[Part], bias: Tensor) -> Tensor:
    blocks = list(_blocks(weights, parts, state_RD))
    scores_RV, at = state_RD.new_empty(len(state_RD), len(bias)), 0
    for weight, first, last in blocks:
        rows, of = weights[weight][first:last].to(state_RD.dtype), slice(at, at := at + last - first)
        if len(blocks) == 1:
            return product(state_RD, rows, bias)
        if _onednn(state_RD):
            scores_RV[:, of] = product(state_RD, rows, bias[of])
        else:
            torch.addmm(bias[of], state_RD, rows.t(), out=scores_RV[:, of])
    return scores_RV


def _nll(scores_RV: Tensor, target_R: Tensor, *, differentiate: bool) -> Tensor:
    """-log p(target), 0 where there is none; on request turns the scores into its gradient by them, p less 1 at the
    target."""
    R, V = scores_RV.shape
    precise = torch.promote_types(scores_RV.dtype, torch.float32)
    rows = max(1, CHUNK_BYTES[_on_cpu(scores_RV)] // (V * precise.itemsize))
    if not differentiate:
        return torch.cat([F.cross_entropy(scores.to(precise), target, ignore_index=-1, reduction="none")
                          for scores, target in zip(scores_RV.split(rows), target_R.split(rows))])
    nll_R = torch.empty(R, dtype=precise, device=scores_RV.device)
    for scores, target, nll in zip(scores_RV.split(rows), target_R.split(rows), nll_R.split(rows)):
        exact, at = scores.to(precise), target.clamp(min=0).unsqueeze(1)
        p = exact.softmax(1)
        # the greatest p is at least 1/V, so its logarithm is precise, and is the greatest score less their logsumexp
        torch.sub(exact.amax(1) - p.amax(1).log(), exact.gather(1, at).squeeze(1), out=nll)
        scores.copy_(p).scatter_add_(1, at, torch.full_like(at, -1, dtype=scores.dtype))
    return nll_R.masked_fill_(target_R < 0, 0.0)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a·bᵀ + bias, of any strides."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "") if _onednn(a) else F.linear(a, b, bias)


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a·bᵀ"""
    if _onednn(a):
        for out_part, a_part in zip(out.split(2048), a.split(2048)):         # a cache holds so many rows until copied
            out_part.copy_(product(a_part, b))
    elif out.dtype == a.dtype:
        torch.mm(a, b.t(), out=out)
    else:
        out.copy_(a @ b.t())


def _onednn(x: Tensor) -> bool:
    return (HAS_ONEDNN and x.dtype == torch.float32 and x.numel() > 0 and _on_cpu(x)
            and not torch.is_autocast_enabled("cpu"))


_cpu_ways = True


def _on_cpu(x: Tensor) -> bool:
    return x.is_cpu and _cpu_ways and not torch.compiler.is_compiling()
