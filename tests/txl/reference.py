"""The judge: Transformer-XL written from the paper's formulas, one query and one key at a time. Slow on purpose."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from txl.config import Context, Model
from txl.model import TransformerXL


def forward(net: TransformerXL, m: Model, tokens: list[list[int]], past: list[list[list[Tensor]]], context: Context):
    """Hidden states of the last layer [b][q] and every layer's inputs [layer][b][q].

    past[layer][b] are the hidden states that the layer remembers of stream b, oldest first.
    """
    hidden = [[embed(net, m, token) for token in stream] for stream in tokens]
    inputs = []
    for i, layer in enumerate(net.layers):
        inputs.append(hidden)
        u, v = (x if x is None else x[i if m.untie_r else 0] for x in (net.u, net.v))
        hidden = [run_layer(layer, m, *placed(layer, m, i, past[i][b], hidden[b], context), u, v, context)
                  for b in range(len(tokens))]
    if m.final_lnorm:
        hidden = [[layer_norm(net.final_norm, h) for h in stream] for stream in hidden]
    return hidden, inputs


def placed(layer, m: Model, i: int, past: list[Tensor], now: list[Tensor], context: Context):
    """What layer i remembers and what it is given, with the positions that are added to them."""
    if m.attn_type not in ("abs", "learned") or (m.attn_type == "abs" and i > 0):
        return past, now
    whole = past + now
    for j, h in enumerate(whole):
        distance = len(whole) - 1 - j
        if context.clamp_len is not None:
            distance = min(distance, context.clamp_len)
        whole[j] = h + (sinusoid(distance, m.d_model) if m.attn_type == "abs" else
                        layer.positions[min(distance, m.positions - 1)])
    return whole[:len(past)], whole[len(past):]


def run_layer(layer, m: Model, past: list[Tensor], now: list[Tensor], u: Tensor, v: Tensor, context: Context):
    keys = past + now
    seen = [layer_norm(layer.attention_norm, h) for h in keys] if m.pre_lnorm else keys
    outputs = []
    for q, h in enumerate(now):
        position = len(past) + q
        a = attend(layer.attention, m, seen, position, u, v, context)
        if m.pre_lnorm:
            x = h + a
            outputs.append(x + feed_forward(layer.feed_forward, layer_norm(layer.feed_forward_norm, x)))
        else:
            x = layer_norm(layer.attention_norm, h + a)
            outputs.append(layer_norm(layer.feed_forward_norm, x + feed_forward(layer.feed_forward, x)))
    return outputs


def attend(attention, m: Model, seen: list[Tensor], i: int, u: Tensor, v: Tensor, context: Context) -> Tensor:
    width = m.n_head * m.d_head
    w_q, w_k, w_v = (attention.qkv.weight[j * width:(j + 1) * width] for j in range(3))
    heads = []
    for n in range(m.n_head):
        part = slice(n * m.d_head, (n + 1) * m.d_head)
        q = w_q[part] @ seen[i]
        scores, values = [], []
        for j in range(i + 1):                                      # never the future
            distance = i - j
            if context.same_length and distance > context.mem_len:
                continue
            if context.clamp_len is not None:
                distance = min(distance, context.clamp_len)
            k = w_k[part] @ seen[j]
            if m.attn_type == "rel":
                r = attention.r.weight[part] @ sinusoid(distance, m.d_model).to(q.dtype)
                score = (q + u[n]) @ k + (q + v[n]) @ r
            elif m.attn_type == "shaw":
                row = min(distance, m.positions - 1)
                score = (q + u[n]) @ k + q @ attention.r[row, n] + attention.r_bias[row, n]
            else:
                score = q @ k
            scores.append(score / math.sqrt(m.d_head))
            values.append(w_v[part] @ seen[j])
        weights = torch.stack(scores).softmax(0)
        heads.append(sum(w * x for w, x in zip(weights, values)))
    return attention.out.weight @ torch.cat(heads)


def sinusoid(distance: int, d: int) -> Tensor:
    angles = [distance / 10000 ** (2 * k / d) for k in range(d // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)


def layer_norm(norm, x: Tensor) -> Tensor:
    mean = sum(x) / len(x)
    variance = sum((x - mean) ** 2) / len(x)
    return (x - mean) / torch.sqrt(variance + 1e-5) * norm.weight + norm.bias


def feed_forward(sequential, x: Tensor) -> Tensor:
    inner, outer = sequential[0], sequential[3]
    return outer.weight @ (inner.weight @ x + inner.bias).clamp(min=0) + outer.bias


def cluster_of(m: Model, n_token: int, token: int) -> tuple[int, int, int]:
    """Cluster of a token, and the bounds of that cluster."""
    edges = [0, *m.cutoffs, n_token]
    i = max(j for j in range(len(edges) - 1) if token >= edges[j])
    return i, edges[i], edges[i + 1]


def table(net: TransformerXL, m: Model, i: int, low: int, high: int, output: bool) -> Tensor:
    tables = net.vocabulary.out_tables if output and not m.tie_weight else net.vocabulary.tables
    return tables[0][low:high] if m.div_val == 1 else tables[i]


def embed(net: TransformerXL, m: Model, token: int) -> Tensor:
    i, low, high = cluster_of(m, len(net.vocabulary.bias), token)
    e = table(net, m, i, low, high, output=False)[token - low]
    projs = net.vocabulary.in_projs
    if len(projs):
        e = projs[i if m.div_val > 1 else 0] @ e
    return e * math.sqrt(m.d_model)


def log_prob(net: TransformerXL, m: Model, h: Tensor, token: int) -> Tensor:
    """log p(token): of its cluster, times of it in the cluster."""
    vocabulary = net.vocabulary
    i, low, high = cluster_of(m, len(vocabulary.bias), token)
    first = m.cutoffs[0] if m.cutoffs else len(vocabulary.bias)
    head_h = project(net, m, 0, h)
    head = [table(net, m, 0, 0, first, output=True)[t] @ head_h + vocabulary.bias[t] for t in range(first)]
    head += [vocabulary.cluster_weight[c] @ head_h + vocabulary.cluster_bias[c] for c in range(len(m.cutoffs))]
    head = torch.stack(head).log_softmax(0)
    if i == 0:
        return head[token]
    weights, tail_h = table(net, m, i, low, high, output=True), project(net, m, i, h)
    tail = torch.stack([weights[t] @ tail_h + vocabulary.bias[low + t] for t in range(high - low)]).log_softmax(0)
    return head[first + i - 1] + tail[token - low]


def project(net: TransformerXL, m: Model, i: int, h: Tensor) -> Tensor:
    projs = net.vocabulary.in_projs
    if not len(projs):
        return h
    own = net.vocabulary.out_projs
    tied = m.tie_projs[i] if m.tie_projs is not None else i > 0
    proj = (projs[i] if m.div_val > 1 else projs[0]) if tied else own[str(i)]
    return proj.T @ h
