"""Transformer-XL (arXiv:1901.02860): relative attention over a memory of earlier hidden states.

B batch, Q query positions, M memory positions, K = M + Q key positions, N heads, H head width, D model width, L layers
"""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from txl.adaptive import AdaptiveVocabulary
from txl.config import Context, Model

# What a stream remembers: hidden_LBMD, the input of each layer at the M positions before the segment, and how many of
# them (the last ones) are real. M never changes, so a run has one shape from its first step on; a fresh memory has 0.
# A plain tuple, so that a checkpoint of it loads without trusting a class. Where rows differ in how many, [B, 1, 1, 1].
Memory = tuple[Tensor, int | Tensor]


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
        self.dropout = nn.Dropout(model.dropout)
        initialise(self, model)

    def forward(self, tokens_BQ: Tensor, targets_BT: Tensor, memory: Memory | None, context: Context,
                rows: tuple[Tensor, ...] | None = None) -> tuple[Tensor, Memory]:
        """-log p of each target in nats, [B, T] fp32, and the memory for the segment that follows.

        tokens_BQ are the T tokens before the targets and, in front of them, the tokens that the extended context
        re-reads (Q = T + ext). `rows` is adaptive.cluster_rows(targets_BT), if the caller has it.
        """
        hidden_BQD, memory = self.hidden(tokens_BQ, memory, context)
        hidden_BTD = hidden_BQD[:, -targets_BT.size(1):]
        nll_R = self.vocabulary.nll(hidden_BTD.flatten(0, 1), targets_BT.flatten(), rows)
        return nll_R.view_as(targets_BT), memory

    def hidden(self, tokens_BQ: Tensor, memory: Memory | None, context: Context) -> tuple[Tensor, Memory]:
        """The last layer's output, [B, Q, D], and the next memory."""
        B, Q = tokens_BQ.shape
        h_BQD = self.dropout(self.vocabulary.embed(tokens_BQ))
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
                past_BMD, h_BQD = past_BMD.to(h_BQD.dtype) + sines_PD[:M], h_BQD + sines_PD[M:-1]
            h_BQD = layer(h_BQD, past_BMD, sines_PD if self.config.attn_type == "rel" else distance_P, u_NH, v_NH,
                          visible_QK)
        return self.dropout(self.final_norm(h_BQD)), self._remember(inputs, past_LBMD, length, context)

    def fresh_memory(self, B: int, context: Context, like: Tensor) -> Memory:
        """A memory of zeros of which nothing is real: they are masked, not attended to."""
        return like.new_zeros(self.config.n_layer, B, context.mem_len, self.config.d_model), 0

    @torch.no_grad()
    def _remember(self, inputs: list[Tensor], past_LBMD: Tensor, length: int | Tensor, context: Context) -> Memory:
        """The last M of memory and segment; of the segment the ext_len last tokens are left out, for the next segment
        reads them again."""
        M, Q = past_LBMD.size(2), inputs[0].size(1)
        new = max(0, Q - context.ext_len)
        segments = torch.stack([h_BQD[:, :new] for h_BQD in inputs]).to(past_LBMD.dtype)
        length = (length + new).clamp(max=M) if isinstance(length, Tensor) else min(M, length + new)
        return torch.cat([past_LBMD, segments], dim=2)[:, :, new:].detach(), length


class Layer(nn.Module):
    def __init__(self, model: Model):
        super().__init__()
        self.pre_lnorm = model.pre_lnorm
        self.attention = {"rel": RelativeAttention, "shaw": ShawAttention}.get(model.attn_type, Attention)(model)
        self.positions = nn.Parameter(torch.empty(model.positions, model.d_model)) \
            if model.positions is not None and model.attn_type == "learned" else None
        self.attention_norm = nn.LayerNorm(model.d_model)
        self.feed_forward = nn.Sequential(
            nn.Linear(model.d_model, model.d_inner), nn.ReLU(), nn.Dropout(model.dropout),
            nn.Linear(model.d_inner, model.d_model), nn.Dropout(model.dropout))
        self.feed_forward_norm = nn.LayerNorm(model.d_model)
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, h_BQD: Tensor, past_BMD: Tensor, where_P: Tensor, u_NH: Tensor | None, v_NH: Tensor | None,
                visible_QK: Tensor) -> Tensor:
        """`where_P`: what the attention takes for positions, see there."""
        M = past_BMD.size(1)
        keys_BKD = torch.cat([past_BMD.to(h_BQD.dtype), h_BQD], dim=1)
        if self.positions is not None:
            keys_BKD = keys_BKD + self.dropout(F.embedding(_rows(where_P, self.positions)[:-1], self.positions))
            h_BQD = keys_BKD[:, M:]
        if self.pre_lnorm:
            keys_BKD = self.attention_norm(keys_BKD)
            queries_BQD = keys_BKD[:, M:]
            h_BQD = h_BQD + self.dropout(self.attention(queries_BQD, keys_BKD, where_P, u_NH, v_NH, visible_QK))
            return h_BQD + self.feed_forward(self.feed_forward_norm(h_BQD))
        attended_BQD = self.dropout(self.attention(h_BQD, keys_BKD, where_P, u_NH, v_NH, visible_QK))
        h_BQD = self.attention_norm(h_BQD + attended_BQD)
        return self.feed_forward_norm(h_BQD + self.feed_forward(h_BQD))


class Attention(nn.Module):
    """score_ij = (q_i + u).k_j / sqrt(H), softmax over the visible j, values, output. Positions are in its input, or
    in what a subclass adds to the scores."""

    def __init__(self, model: Model):
        super().__init__()
        self.n_head, self.d_head, self.dropatt = model.n_head, model.d_head, model.dropatt
        width = model.n_head * model.d_head
        self.qkv = nn.Linear(model.d_model, 3 * width, bias=False)
        self.of_positions(model)                  # here: an optimizer's state in a checkpoint goes by the order
        self.out = nn.Linear(width, model.d_model, bias=False)

    def of_positions(self, model: Model) -> None:
        """Makes the parameters that are about positions."""

    def forward(self, queries_BQD: Tensor, keys_BKD: Tensor, where_P: Tensor, u_NH: Tensor | None,
                v_NH: Tensor | None, visible_QK: Tensor) -> Tensor:
        width, heads = self.n_head * self.d_head, (self.n_head, self.d_head)
        w_q, w_kv = self.qkv.weight.split([width, 2 * width])          # memory needs no queries: a sixth of the work
        q_BNQH = F.linear(queries_BQD, w_q).unflatten(-1, heads).transpose(1, 2)
        k_BKNH, v_BKNH = F.linear(keys_BKD, w_kv).unflatten(-1, (2, *heads)).unbind(2)

        mask_BNQK = self.mask(q_BNQH, where_P, v_NH, visible_QK)
        q_u_BNQH = q_BNQH if u_NH is None else q_BNQH + u_NH.unsqueeze(1).to(q_BNQH.dtype)
        with _kernels(q_BNQH.device):
            a_BNQH = F.scaled_dot_product_attention(
                q_u_BNQH, k_BKNH.transpose(1, 2), v_BKNH.transpose(1, 2), attn_mask=mask_BNQK,
                dropout_p=self.dropatt if self.training else 0.0)
        return self.out(a_BNQH.transpose(1, 2).flatten(2))

    def mask(self, q_BNQH: Tensor, where_P: Tensor, v_NH: Tensor | None, visible_QK: Tensor) -> Tensor:
        """What is added to the scores, -inf where a key is not seen; or which are seen, where nothing is."""
        return visible_QK


class RelativeAttention(Attention):
    """score_ij = ((q_i + u).k_j + (q_i + v).r_{i-j}) / sqrt(H), r from sinusoids of the distances, `where_P` [P, D]."""

    def of_positions(self, model: Model) -> None:
        self.r = nn.Linear(model.d_model, model.n_head * model.d_head, bias=False)

    def mask(self, q_BNQH: Tensor, where_P: Tensor, v_NH: Tensor | None, visible_QK: Tensor) -> Tensor:
        assert v_NH is not None
        r_NHP = self.r(where_P).unflatten(-1, (self.n_head, self.d_head)).permute(1, 2, 0)
        q_v_BNQH = q_BNQH + v_NH.unsqueeze(1).to(q_BNQH.dtype)
        bias_BNQK = rel_shift(q_v_BNQH @ r_NHP) * self.d_head ** -0.5
        return bias_BNQK.masked_fill(~visible_QK, float("-inf"))


class ShawAttention(Attention):
    """score_ij = ((q_i + u).k_j + q_i.r_{i-j} + b_{i-j}) / sqrt(H), r and b from tables by distance, `where_P` [P]."""

    def of_positions(self, model: Model) -> None:
        self.r = nn.Parameter(torch.empty(model.positions or 0, model.n_head, model.d_head))
        self.r_bias = nn.Parameter(torch.empty(model.positions or 0, model.n_head))

    def mask(self, q_BNQH: Tensor, where_P: Tensor, v_NH: Tensor | None, visible_QK: Tensor) -> Tensor:
        row_P = _rows(where_P, self.r)
        r_NHP, b_NP = self.r[row_P].permute(1, 2, 0).to(q_BNQH.dtype), self.r_bias[row_P].T.to(q_BNQH.dtype)
        bias_BNQK = rel_shift(q_BNQH @ r_NHP + b_NP.unsqueeze(1)) * self.d_head ** -0.5
        return bias_BNQK.masked_fill(~visible_QK, float("-inf"))


def rel_shift(scores_BNQP: Tensor) -> Tensor:
    """Query-by-distance scores to query-by-key scores, [B, N, Q, K] from [B, N, Q, P] with P = K + 1.

    In: column p is distance K-1-p, and the last column is anything. Out: column k is key k. Keys in the query's future
    are garbage: mask them after. With that spare column, row q of the result starts Q-1-q columns into row q, which
    makes it one stretch of memory: a view, and its gradient one padded copy.
    Source: Transformer-XL (arXiv:1901.02860), appendix B.
    """
    B, N, Q, P = scores_BNQP.shape
    K = P - 1
    return scores_BNQP.reshape(B, N, Q * P)[:, :, Q - 1:Q - 1 + Q * K].unflatten(2, (Q, K))


def _kernels(device: torch.device) -> AbstractContextManager:
    """Not cuDNN's: its backward with a mask gives NaN at lengths of 64 modulo 128 on Hopper (pytorch #196678)."""
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if device.type == "cuda" else nullcontext()


def distances(K: int, clamp_len: int | None, device: torch.device) -> Tensor:
    """K-1 … 0, at most clamp_len, and one spare, [K + 1]."""
    return torch.arange(K - 1, -2, -1, device=device).clamp(0, clamp_len)


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


@torch.no_grad()
def initialise(net: TransformerXL, model: Model) -> None:
    """The ancestors' rules: weights N(0, init_std) or U(±init_range), projections N(0, proj_init_std), biases 0,
    norms' weights N(1, init_std)."""
    for name, parameter in net.named_parameters():
        owner = name.rpartition(".")[0]
        if "norm" in owner and name.endswith("weight"):
            parameter.normal_(1.0, model.init_std)
        elif name.endswith("bias"):
            parameter.zero_()
        elif "in_projs" in owner or "out_projs" in owner:
            parameter.normal_(0.0, model.proj_init_std)
        elif model.init == "uniform":
            parameter.uniform_(-model.init_range, model.init_range)
        else:
            parameter.normal_(0.0, model.init_std)
