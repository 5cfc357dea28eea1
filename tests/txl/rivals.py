"""The judge of converted weights: other projects' Transformer-XL from their published code's layout, in slow loops.

A model here is a state dict in their names and layout; nothing of ours but the numbers of txl.config.Model is used.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.txl.reference import sinusoid
from txl.config import Model

LAYER = {"dec_attn.qkv_net.weight": ("3NH", "D"), "dec_attn.r_net.weight": ("NH", "D"),
         "dec_attn.o_net.weight": ("D", "NH"), "dec_attn.layer_norm.weight": ("D",), "dec_attn.layer_norm.bias": ("D",),
         "pos_ff.CoreNet.0.weight": ("F", "D"), "pos_ff.CoreNet.0.bias": ("F",), "pos_ff.CoreNet.3.weight": ("D", "F"),
         "pos_ff.CoreNet.3.bias": ("D",), "pos_ff.layer_norm.weight": ("D",), "pos_ff.layer_norm.bias": ("D",)}


def state_dict(m: Model, V: int, dialect: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random weights as the modules of that project would give them, tied ones being one tensor under each name."""
    generator = torch.Generator().manual_seed(seed)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 0.4

    size = {"D": m.d_model, "NH": m.n_head * m.d_head, "3NH": 3 * m.n_head * m.d_head, "F": m.d_inner}
    body = "transformer." if dialect == "hf" else ""
    edges, width = [0, *m.cutoffs, V], m.d_embed or m.d_model
    clusters = len(edges) - 1
    tied = list(m.tie_projs) if m.tie_projs is not None else [False] + [True] * (clusters - 1)
    state = {f"{body}pos_emb.inv_freq": 1 / (10000 ** (torch.arange(0.0, m.d_model, 2.0) / m.d_model))}
    for name in ("r_w_bias", "r_r_bias"):
        shared = new(m.n_head, m.d_head)
        if not m.untie_r:
            state[f"{body}{name}"] = shared
        for i in range(m.n_layer if dialect == "hf" else 0):
            state[f"{body}layers.{i}.dec_attn.{name}"] = new(m.n_head, m.d_head) if m.untie_r else shared
    for i in range(m.n_layer):
        state |= {f"{body}layers.{i}.{name}": new(*(size[s] for s in shape)) for name, shape in LAYER.items()}
    if m.cutoffs:
        state |= {"crit.cluster_weight": new(clusters - 1, width), "crit.cluster_bias": new(clusters - 1)}
    tables = [(V, width)] if m.div_val == 1 else [
        (edges[i + 1] - edges[i], width // m.div_val ** i) for i in range(clusters)]
    for i, (rows, columns) in enumerate(tables):
        state[f"{body}word_emb.emb_layers.{i}.weight"] = table = new(rows, columns)
        if dialect == "nvidia":
            state[f"crit.out_layers_biases.{i}"] = new(rows)
            if not m.tie_weight:
                state[f"crit.out_layers_weights.{i}"] = new(rows, columns)
        else:
            state[f"crit.out_layers.{i}.bias"] = new(rows)
            state[f"crit.out_layers.{i}.weight"] = table if m.tie_weight else new(rows, columns)
    if m.div_val > 1 or width != m.d_model:
        projs = [new(m.d_model, columns) for _, columns in tables]
        for i, proj in enumerate(projs):
            state[f"{body}word_emb.emb_projs.{i}"] = proj
            if dialect == "nvidia":
                state[f"crit.shared_out_projs.{i}"] = proj
        for j in range(clusters):
            i = 0 if m.div_val == 1 else j
            if not tied[j]:
                state[f"crit.out_projs.{j}"] = new(m.d_model, tables[i][1])
            elif dialect != "nvidia":
                state[f"crit.out_projs.{j}"] = projs[i]
    return state


def log_probs(state: dict[str, Tensor], m: Model, dialect: str, tokens: list[int], past: list[list[Tensor]],
              mem_len: int, clamp_len: int) -> tuple[Tensor, list[list[Tensor]]]:
    """log p of every word after each of the tokens of one stream, [Q, V], and what each layer then remembers."""
    body = "transformer." if dialect == "hf" else ""
    hidden = [embed(state, m, body, token) for token in tokens]
    remembered = []
    for i in range(m.n_layer):
        remembered.append((past[i] + hidden)[-mem_len:])
        hidden = layer(state, m, f"{body}layers.{i}.", past[i], hidden, *biases(state, m, body, dialect, i), clamp_len)
    return torch.stack([softmax(state, m, dialect, h) for h in hidden]), remembered


def biases(state, m, body, dialect, i):
    where = f"{body}layers.{i}.dec_attn." if dialect == "hf" else body
    return state[f"{where}r_w_bias"], state[f"{where}r_r_bias"]


def embed(state, m, body, token):
    tables = [x for n, x in state.items() if n.startswith(f"{body}word_emb.emb_layers.")]
    i = 0
    while token >= len(tables[i]):
        token, i = token - len(tables[i]), i + 1
    e = tables[i][token]
    proj = state.get(f"{body}word_emb.emb_projs.{i}")
    return (e if proj is None else proj @ e) * math.sqrt(m.d_model)


def layer(state, m, name, past, now, r_w_bias, r_r_bias, clamp_len):
    def norm(which, x):
        x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5)
        return x * state[f"{name}{which}.layer_norm.weight"] + state[f"{name}{which}.layer_norm.bias"]

    def core(x):
        inner = state[f"{name}pos_ff.CoreNet.0.weight"] @ x + state[f"{name}pos_ff.CoreNet.0.bias"]
        return state[f"{name}pos_ff.CoreNet.3.weight"] @ inner.clamp(min=0) + state[f"{name}pos_ff.CoreNet.3.bias"]

    keys = past + now
    seen = [norm("dec_attn", h) for h in keys] if m.pre_lnorm else keys
    heads = [(state[f"{name}dec_attn.qkv_net.weight"] @ x).view(3, m.n_head, m.d_head) for x in seen]
    outputs = []
    for q, h in enumerate(now):
        i, attended = len(past) + q, []
        for n in range(m.n_head):
            scores = []
            for j in range(i + 1):
                r = state[f"{name}dec_attn.r_net.weight"] @ sinusoid(min(i - j, clamp_len), m.d_model)
                content = (heads[i][0][n] + r_w_bias[n]) @ heads[j][1][n]
                position = (heads[i][0][n] + r_r_bias[n]) @ r.view(m.n_head, m.d_head)[n]
                scores.append((content + position) / m.d_head ** 0.5)
            attended.append(sum(p * heads[j][2][n] for j, p in enumerate(torch.stack(scores).softmax(0))))
        a = state[f"{name}dec_attn.o_net.weight"] @ torch.cat(attended)
        if m.pre_lnorm:
            outputs.append(h + a + core(norm("pos_ff", h + a)))
        else:
            x = norm("dec_attn", h + a)
            outputs.append(norm("pos_ff", x + core(x)))
    return outputs


def softmax(state, m, dialect, h):
    """Column -i of the head is cluster i in the original and in NVIDIA's; Hugging Face counts from the words on."""
    V = sum(len(x) for name, x in state.items() if "out_layers" in name and "bias" in name)
    edges = [0, *m.cutoffs, V]
    log_p = []
    for i in range(len(edges) - 1):
        table = 0 if m.div_val == 1 else i
        rows = slice(edges[i], edges[i + 1]) if m.div_val == 1 else slice(None)
        if dialect == "nvidia":
            own = "crit.out_layers_weights.{}" if not m.tie_weight else "word_emb.emb_layers.{}.weight"
            weight = state[own.format(table)]
            bias = state[f"crit.out_layers_biases.{table}"]
            proj = state.get(f"crit.out_projs.{i}", state.get(f"crit.shared_out_projs.{table}"))
        else:
            weight, bias = state[f"crit.out_layers.{table}.weight"], state[f"crit.out_layers.{table}.bias"]
            proj = state.get(f"crit.out_projs.{i}")
        weight, bias = weight[rows], bias[rows]
        if i == 0 and m.cutoffs:
            weight = torch.cat([weight, state["crit.cluster_weight"]])
            bias = torch.cat([bias, state["crit.cluster_bias"]])
        part = (weight @ (h if proj is None else proj.T @ h) + bias).log_softmax(0)
        if i == 0:
            head = part
            log_p.append(part[:edges[1]])
        else:
            log_p.append(part + (head[edges[1] + i - 1] if dialect == "hf" else head[-i]))
    return torch.cat(log_p)
