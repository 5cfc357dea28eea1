"""Transformer-XL (arXiv:1901.02860): relative attention over a memory of earlier hidden states.

B batch, Q query positions, M memory positions, K = M + Q key positions, N heads, H head width, D model width, L layers
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.draw import draw
from engine.fused import Dropout, Linear, attend, attention, computing_in, linear, linear_relu
from engine.split import Reads
from txl.adaptive import AdaptiveVocabulary
from txl.config import Context, Model
from txl.memory import Fixed, Hidden, Kept, Memory


class TransformerXL(nn.Module):
    """Tokens and memory in, negative log-likelihoods and the next memory out."""

    def __init__(self, model: Model, n_token: int):
        super().__init__()
        self.config = model
        self.vocabulary = AdaptiveVocabulary(model, n_token)
        self.layers = nn.ModuleList(Layer(model) for _ in range(model.n_layer))
        biases = (model.n_layer if model.untie_r else 1, model.n_head, model.d_head)
        self.u = nn.Parameter(torch.empty(biases)) if model.attn_type in ("rel", "shaw") else None
        self.v = nn.Parameter(torch.empty(biases)) if model.attn_type == "rel" else None
        self.final_norm = nn.LayerNorm(model.d_model) if model.final_lnorm else nn.Identity()
        self.dropout = Dropout(model.dropout)
        initialise(self, model)

    def forward(self, tokens_BQ: Tensor, targets_BT: Tensor, memory: Memory | None, context: Context,
                rows: tuple[Tensor, ...] | None = None, in_tails: int | None = None,
                reads: Reads | None = None) -> tuple[Tensor, Memory]:
        """-log p of each target in nats, [B, T] fp32, and the memory for the segment that follows.

        tokens_BQ are the T tokens before the targets and, in front of them, the tokens that the extended context
        re-reads (Q = T + ext). `rows` is adaptive.cluster_rows(targets_BT), and `in_tails` how many tokens are
        beyond the head, if the caller has them; `reads` is needed where tails are split over ranks (engine/split.py).
        """
        hidden_BQD, memory = self.hidden(tokens_BQ, memory, context, in_tails, reads)
        hidden_BTD = hidden_BQD[:, -targets_BT.size(1):]
        nll_R = self.vocabulary.nll(hidden_BTD.flatten(0, 1), targets_BT.flatten(), rows, reads)
        return nll_R.view_as(targets_BT), memory

    def hidden(self, tokens_BQ: Tensor, memory: Memory | None, context: Context,
               in_tails: int | None = None, reads: Reads | None = None) -> tuple[Tensor, Memory]:
        """The last layer's output, [B, Q, D], and the next memory."""
        B, Q = tokens_BQ.shape
        h_BQD = self.dropout(self.vocabulary.embed(tokens_BQ, in_tails, reads))
        if isinstance(memory, Kept):
            return self._read(h_BQD, memory, context)
        past_LBMD, length = memory or self.fresh_memory(B, context, h_BQD)
        M = past_LBMD.size(2)
        visible_QK = visible(Q, M, length, context.mem_len if context.same_length else None, h_BQD.device)
        distance_P = distances(M + Q, context.clamp_len, h_BQD.device)
        sines_PD = self.dropout(sinusoids(distance_P, like=h_BQD)) if self.config.attn_type in ("rel", "abs") else None

        inputs = []
        for i, (layer, past_BMD) in enumerate(zip(self.layers, past_LBMD)):
            inputs.append(h_BQD)                  # without positions: as memory it has others
            bias = i if self.config.untie_r else 0
            u_NH, v_NH = (None if biases is None else biases[bias] for biases in (self.u, self.v))
            if i == 0 and self.config.attn_type == "abs" and sines_PD is not None:
                past_BMD, h_BQD = past_BMD.to(h_BQD.dtype) + sines_PD[1:1 + M], h_BQD + sines_PD[1 + M:]
            run = layer if self.training else layer.forward    # what may be compiled is for the shapes of training
            h_BQD = run(h_BQD, past_BMD, sines_PD if self.config.attn_type == "rel" else distance_P, u_NH, v_NH,
                        visible_QK)
        return self.dropout(self.final_norm(h_BQD)), self._remember(inputs, past_LBMD, length, context)

    def fresh_memory(self, B: int, context: Context, like: Tensor) -> Hidden:
        """A memory of zeros of which nothing is real: they are masked, not attended to."""
        return like.new_zeros(self.config.n_layer, B, context.mem_len, self.config.d_model), 0

    def reading(self, B: int, context: Context) -> Memory:
        """A fresh memory for B streams that are read without gradients, in evaluation, by weights that stay as they
        are until they are read: where keys do not depend on where they are, the faster kind."""
        bias, model = self.vocabulary.bias, self.config
        if model.attn_type not in ("rel", "shaw"):
            return self.fresh_memory(B, context, bias)
        kv = torch.zeros(model.n_layer, B, context.mem_len, 2, model.n_head, model.d_head, device=bias.device,
                         dtype=computing_in(bias))
        return Kept(kv.unbind(), 0)

    @torch.no_grad()
    def _read(self, h_BQD: Tensor, kept: Kept, context: Context) -> tuple[Tensor, Memory]:
        """As `hidden`, of embedded tokens."""
        Q, M, length = h_BQD.size(1), kept.kv[0].size(1), kept.length
        reach, P = context.mem_len if context.same_length else None, M + Q + 1
        fixed, kvs = kept.fixed, []
        if not fixed or fixed[0].r_NHP.size(2) < P:
            fixed = self._fixed(P, context.clamp_len, reach, h_BQD)
        # with a full memory and same_length nothing is to be hidden but by its distance, see rel_shift
        full = isinstance(length, int) and length == M
        hidden_QK = None if full and reach is not None and reach <= M else ~visible(Q, M, length, reach, h_BQD.device)
        new = max(0, Q - context.ext_len)
        for layer, past_BM2NH, of_layer in zip(cast(Iterable[Layer], self.layers), kept.kv, fixed):
            h_BQD, kv_BK2NH = layer.read(h_BQD, past_BM2NH, of_layer, hidden_QK)
            kvs.append(kv_BK2NH[:, new:new + M])
        length = (length + new).clamp(max=M) if isinstance(length, Tensor) else min(M, length + new)
        return self.final_norm(h_BQD), Kept(tuple(kvs), length, fixed)

    def _fixed(self, P: int, clamp_len: int | None, reach: int | None, like: Tensor) -> tuple[Fixed, ...]:
        """In full precision: products with them are in autocast's."""
        distance_P, further_P = distances(P - 1, clamp_len, like.device), distances(P - 1, None, like.device)
        dtype, found = computing_in(like), []
        with torch.autocast(like.device.type, enabled=False):
            where_P = sinusoids(distance_P, like) if self.config.attn_type == "rel" else distance_P
            for i, layer in enumerate(cast(Iterable[Layer], self.layers)):
                bias = i if self.config.untie_r else 0
                u_NH, v_NH = (None if biases is None else biases[bias] for biases in (self.u, self.v))
                assert u_NH is not None
                r_NHP, c_N1P = (x * layer.attention.d_head ** -0.5 for x in layer.attention.fixed(where_P, u_NH, v_NH))
                c_N1P = c_N1P if reach is None else c_N1P.masked_fill(further_P > reach, float("-inf"))
                qkv_bias = F.pad(u_NH.flatten(), (0, 2 * u_NH.numel()))
                found.append(Fixed(*(x.to(dtype).contiguous() for x in (qkv_bias, r_NHP, c_N1P))))
        return tuple(found)

    @torch.no_grad()
    def _remember(self, inputs: list[Tensor], past_LBMD: Tensor, length: int | Tensor, context: Context) -> Memory:
        """The last M of memory and segment; of the segment the ext_len last tokens are left out, for the next segment
        reads them again."""
        M, Q = past_LBMD.size(2), inputs[0].size(1)
        new = max(0, Q - context.ext_len)
        segments = torch.stack([h_BQD[:, :new] for h_BQD in inputs]).to(past_LBMD.dtype)
        length = (length + new).clamp(max=M) if isinstance(length, Tensor) else min(M, length + new)
        return torch.cat([past_LBMD, segments], dim=2)[:, :, new:].detach().contiguous(), length


class Layer(nn.Module):
    def __init__(self, model: Model):
        super().__init__()
        self.pre_lnorm = model.pre_lnorm
        self.attention = {"rel": RelativeAttention, "shaw": ShawAttention}.get(model.attn_type, Attention)(model)
        self.positions = nn.Parameter(torch.empty(model.positions, model.d_model)) \
            if model.positions is not None and model.attn_type == "learned" else None
        self.attention_norm = nn.LayerNorm(model.d_model)
        self.feed_forward = nn.Sequential(
            Linear(model.d_model, model.d_inner), nn.ReLU(), Dropout(model.dropout),
            Linear(model.d_inner, model.d_model), Dropout(model.dropout))
        self.feed_forward_norm = nn.LayerNorm(model.d_model)
        self.dropout = Dropout(model.dropout)

    def forward(self, h_BQD: Tensor, past_BMD: Tensor, where_P: Tensor, u_NH: Tensor | None, v_NH: Tensor | None,
                visible_QK: Tensor) -> Tensor:
        """`where_P`: what the attention takes for positions, see there."""
        M = past_BMD.size(1)
        keys_BKD = torch.cat([past_BMD.to(h_BQD.dtype), h_BQD], dim=1)
        if self.positions is not None:
            keys_BKD = keys_BKD + self.dropout(F.embedding(_rows(where_P, self.positions)[1:], self.positions))
            h_BQD = keys_BKD[:, M:]
        if self.pre_lnorm:
            keys_BKD = self.attention_norm(keys_BKD)
            queries_BQD = keys_BKD[:, M:]
            h_BQD = h_BQD + self.dropout(self.attention(queries_BQD, keys_BKD, where_P, u_NH, v_NH, visible_QK))
            return h_BQD + self.feed_forward(self.feed_forward_norm(h_BQD))
        attended_BQD = self.dropout(self.attention(h_BQD, keys_BKD, where_P, u_NH, v_NH, visible_QK))
        h_BQD = self.attention_norm(h_BQD + attended_BQD)
        return self.feed_forward_norm(h_BQD + self.feed_forward(h_BQD))

    def read(self, h_BQD: Tensor, past_BM2NH: Tensor, fixed: Fixed, hidden_QK: Tensor | None) -> tuple[Tensor, Tensor]:
        """As forward without gradients and dropout, of keys and values; and these with the segment's own."""
        queries_BQD = self.attention_norm(h_BQD) if self.pre_lnorm else h_BQD
        attended_BQD, kv_BK2NH = self.attention.read(queries_BQD, past_BM2NH, fixed, hidden_QK)
        h_BQD = h_BQD + attended_BQD
        h_BQD = h_BQD if self.pre_lnorm else self.attention_norm(h_BQD)
        inner, *_, outer, _ = cast(Iterable[Linear], self.feed_forward)
        h_BQI = linear_relu(self.feed_forward_norm(h_BQD) if self.pre_lnorm else h_BQD, inner.weight, inner.bias)
        h_BQD = h_BQD + outer(h_BQI)
        return h_BQD if self.pre_lnorm else self.feed_forward_norm(h_BQD), kv_BK2NH


class Attention(nn.Module):
    """score_ij = (q_i + u).k_j / sqrt(H), softmax over the visible j, values, output. Positions are in its input, or
    in what a subclass adds to the scores."""

    def __init__(self, model: Model):
        super().__init__()
        self.n_head, self.d_head, self.dropatt = model.n_head, model.d_head, model.dropatt
        width = model.n_head * model.d_head
        self.qkv = Linear(model.d_model, 3 * width, bias=False)
        self.of_positions(model)                  # here: an optimizer's state in a checkpoint goes by the order
        self.out = Linear(width, model.d_model, bias=False)

    def of_positions(self, model: Model) -> None:
        """Makes the parameters that are about positions."""

    def forward(self, queries_BQD: Tensor, keys_BKD: Tensor, where_P: Tensor, u_NH: Tensor | None,
                v_NH: Tensor | None, visible_QK: Tensor) -> Tensor:
        width, heads = self.n_head * self.d_head, (self.n_head, self.d_head)
        w_q, w_kv = self.qkv.weight.split([width, 2 * width])          # memory needs no queries: a sixth of the work
        q_BNQH = linear(queries_BQD, w_q).unflatten(-1, heads).transpose(1, 2)
        k_BKNH, v_BKNH = linear(keys_BKD, w_kv).unflatten(-1, (2, *heads)).unbind(2)

        bias_BNQK = self.bias(q_BNQH, where_P, v_NH)
        q_u_BNQH = q_BNQH if u_NH is None else q_BNQH + u_NH.unsqueeze(1).to(q_BNQH.dtype)
        a_BNQH = attention(q_u_BNQH, k_BKNH.transpose(1, 2), v_BKNH.transpose(1, 2), bias_BNQK, visible_QK,
                           self.dropatt if self.training else 0.0)
        return self.out(a_BNQH.transpose(1, 2).flatten(2))

    def bias(self, q_BNQH: Tensor, where_P: Tensor, v_NH: Tensor | None) -> Tensor | None:
        """What is added to q·kᵀ."""
        return None

    def read(self, queries_BQD: Tensor, past_BM2NH: Tensor, fixed: Fixed,
             hidden_QK: Tensor | None) -> tuple[Tensor, Tensor]:
        B, Q, _ = queries_BQD.shape
        qkv_BQ3NH = linear(queries_BQD, self.qkv.weight, fixed.qkv_bias).unflatten(-1, (3, self.n_head, self.d_head))
        kv_BK2NH = torch.cat([past_BM2NH.to(qkv_BQ3NH.dtype), qkv_BQ3NH[:, :, 1:]], dim=1)
        P = kv_BK2NH.size(1) + 1
        q_NRH = qkv_BQ3NH[:, :, 0].flatten(0, 1).transpose(0, 1)
        scores_NRP = torch.baddbmm(fixed.c_N1P[..., -P:], q_NRH, fixed.r_NHP[..., -P:])
        bias_BNQK = rel_shift(scores_NRP.unflatten(1, (B, Q)).transpose(0, 1))
        if hidden_QK is not None:
            bias_BNQK = bias_BNQK.masked_fill(hidden_QK, float("-inf"))
        q_BNQH, k_BNKH, v_BNKH = (x.transpose(1, 2) for x in (qkv_BQ3NH[:, :, 0], *kv_BK2NH.unbind(2)))
        return self.out(attend(q_BNQH, k_BNKH, v_BNKH, bias_BNQK).transpose(1, 2).flatten(2)), kv_BK2NH

    def fixed(self, where_P: Tensor, u_NH: Tensor, v_NH: Tensor | None) -> tuple[Tensor, Tensor]:
        """r [N, H, P] and c [N, 1, P] with bias = rel_shift((q + u)·r + c)."""
        raise NotImplementedError


class RelativeAttention(Attention):
    """score_ij = ((q_i + u).k_j + (q_i + v).r_{i-j}) / sqrt(H), r from sinusoids of the distances, `where_P` [P, D]."""

    def of_positions(self, model: Model) -> None:
        self.r = Linear(model.d_model, model.n_head * model.d_head, bias=False)

    def bias(self, q_BNQH: Tensor, where_P: Tensor, v_NH: Tensor | None) -> Tensor:
        assert v_NH is not None
        r_NHP = self.r(where_P).unflatten(-1, (self.n_head, self.d_head)).permute(1, 2, 0)
        q_v_BNQH = q_BNQH + v_NH.unsqueeze(1).to(q_BNQH.dtype)
        return rel_shift(q_v_BNQH @ r_NHP)

    def fixed(self, where_P: Tensor, u_NH: Tensor, v_NH: Tensor | None) -> tuple[Tensor, Tensor]:
        assert v_NH is not None
        r_NHP = self.r(where_P).unflatten(-1, (self.n_head, self.d_head)).permute(1, 2, 0)
        return r_NHP, (v_NH - u_NH).unsqueeze(1) @ r_NHP


class ShawAttention(Attention):
    """score_ij = ((q_i + u).k_j + q_i.r_{i-j} + b_{i-j}) / sqrt(H), r and b from tables by distance, `where_P` [P]."""

    def of_positions(self, model: Model) -> None:
        self.r = nn.Parameter(torch.empty(model.positions or 0, model.n_head, model.d_head))
        self.r_bias = nn.Parameter(torch.empty(model.positions or 0, model.n_head))

    def bias(self, q_BNQH: Tensor, where_P: Tensor, v_NH: Tensor | None) -> Tensor:
        row_P = _rows(where_P, self.r)
        r_NHP, b_NP = self.r[row_P].permute(1, 2, 0).to(q_BNQH.dtype), self.r_bias[row_P].T.to(q_BNQH.dtype)
        return rel_shift(q_BNQH @ r_NHP + b_NP.unsqueeze(1))

    def fixed(self, where_P: Tensor, u_NH: Tensor, v_NH: Tensor | None) -> tuple[Tensor, Tensor]:
        row_P = _rows(where_P, self.r)
        r_NHP = self.r[row_P].permute(1, 2, 0)
        return r_NHP, self.r_bias[row_P].T.unsqueeze(1) - u_NH.unsqueeze(1) @ r_NHP


def rel_shift(scores_BNQP: Tensor) -> Tensor:
    """Query-by-distance scores to query-by-key scores, [B, N, Q, K] from [B, N, Q, P] with P = K + 1.

    In: column p is distance K-p, the first is spare. Out: column k is key k. Keys in the query's future are garbage,
    scores of distances that no query of this segment is from a key: they must not be visible. With that spare column,
    row q of the result starts Q-q columns into row q, which makes it one stretch of memory: a view, aligned where Q and
    K are multiples of what is to be aligned to, and its gradient one padded copy.
    Source: Transformer-XL (arXiv:1901.02860), appendix B.
    """
    B, N, Q, P = scores_BNQP.shape
    K = P - 1
    return scores_BNQP.reshape(B, N, Q * P)[:, :, Q:].unflatten(2, (Q, K))


def distances(K: int, clamp_len: int | None, device: torch.device) -> Tensor:
    """K (which is spare), K-1 … 0, at most clamp_len, [K + 1]."""
    distance_P = torch.arange(K, -1, -1, device=device)
    return distance_P if clamp_len is None else distance_P.clamp(max=clamp_len)


def sinusoids(distance_P: Tensor, like: Tensor) -> Tensor:
    """Of the distances, [P, D]: sines in the first half of the width of `like`, cosines in the second."""
    D = like.size(-1)
    frequency = 10_000.0 ** -(torch.arange(0, D, 2, dtype=like.dtype, device=like.device) / D)
    angle = distance_P.to(like.dtype).unsqueeze(1) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def _rows(distance_P: Tensor, table: Tensor) -> Tensor:
    """Of a table by distance: what is further than it reaches has its last row."""
    return distance_P.clamp(max=table.size(0) - 1)


def visible(Q: int, M: int, length: int | Tensor, reach: int | None, device: torch.device) -> Tensor:
    """Which keys a query sees, [Q, K]: not the future, not memory that is not real, nothing further than `reach`.
    [B, 1, Q, K] where the rows differ in how much of it is real."""
    query_Q1 = torch.arange(M, M + Q, device=device).unsqueeze(1)
    key_K = torch.arange(M + Q, device=device)
    seen_QK = (key_K <= query_Q1) & (key_K >= M - length)
    return seen_QK if reach is None else seen_QK & (query_Q1 - key_K <= reach)


def initialise(net: TransformerXL, model: Model) -> None:
    """The ancestors' rules: weights N(0, init_std) or U(±init_range), projections N(0, proj_init_std), biases 0,
    norms' weights N(1, init_std)."""
    draw((parameter, _rule(name, model)) for name, parameter in net.named_parameters())


def _rule(name: str, model: Model) -> Callable[..., object]:
    """By a parameter's name."""
    owner = name.rpartition(".")[0]
    if "norm" in owner and name.endswith("weight"):
        return partial(Tensor.normal_, mean=1.0, std=model.init_std)
    if name.endswith("bias"):
        return lambda bias, **_: bias.zero_()
    if "in_projs" in owner or "out_projs" in owner:
        return partial(Tensor.normal_, mean=0.0, std=model.proj_init_std)
    if model.init == "uniform":
        return lambda weight, **how: weight.uniform_(-model.init_range, model.init_range, **how)
    return partial(Tensor.normal_, mean=0.0, std=model.init_std)
