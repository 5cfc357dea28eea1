"""Transformer-XL's weights under other projects' names, to ours and back. Pure: dictionaries of tensors.

    original   kimiyoung/transformer-xl, pytorch/
    nvidia     NVIDIA/DeepLearningExamples, PyTorch/LanguageModeling/Transformer-XL
    hf         Hugging Face transformers, TransfoXLLMHeadModel

All compute the same function, so a tensor of theirs is one of ours or a part of it: `links` lists which. What differs:
the original and nvidia look cluster i up in column -i of the head, so that their clusters stand in reverse order, while
hf has them as they come; what is tied stands in their files once for every place where it is used; u and v are called
r_w_bias and r_r_bias; and only hf can have them layer by layer.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Literal

import torch
from torch import Tensor

from engine.values import BadValue, from_json, to_json
from txl.config import Model
from txl.model import TransformerXL

Dialect = Literal["original", "nvidia", "hf"]
EMBEDDING = {"original": "word_emb.emb_layers.", "nvidia": "word_emb.emb_layers.",
             "hf": "transformer.word_emb.emb_layers."}


class Unconvertible(ValueError):
    """Weights cannot be brought in or taken out. The message is meant for the user as it stands."""


@dataclass(frozen=True)
class Link:
    """One tensor: `part` of `ours`, with its rows `turned` round or not, is each of `theirs`."""
    ours: str
    theirs: tuple[str, ...]
    part: slice | int | EllipsisType = ...
    turned: bool = False

    def of(self, weights: Mapping[str, Tensor]) -> Tensor:
        tensor = weights[self.ours][self.part]
        return tensor.flip(0) if self.turned else tensor


def dialect_of(names: Iterable[str]) -> Dialect:
    """Whose names these are. Raises Unconvertible where nobody's."""
    names = list(names)
    if any(name.startswith(EMBEDDING["hf"]) for name in names):
        return "hf"
    if any(name.startswith("crit.out_layers_biases.") for name in names):
        return "nvidia"
    if any(name.startswith(EMBEDDING["original"]) for name in names):
        return "original"
    raise Unconvertible(f"These are not the weights of a Transformer-XL that is known here: {_some(sorted(names))}")


def n_token_of(state: Mapping[str, Tensor], dialect: Dialect) -> int:
    """Size of the vocabulary: the rows of all embedding tables."""
    return sum(len(x) for name, x in state.items() if name.startswith(EMBEDDING[dialect]))


def to_ours(state: Mapping[str, Tensor], model: Model, dialect: Dialect) -> dict[str, Tensor]:
    """Their state dict as ours. Raises Unconvertible, naming the tensors, unless every one of them is accounted for.

    Of tied tensors one name is enough; those that are there must be equal.
    """
    check_expressible(model, dialect)
    shapes = _shapes(model, n_token_of(state, dialect))
    found = links(model, n_token_of(state, dialect), dialect)
    known = {name for link in found for name in link.theirs} | {buffer_name(dialect)}
    wrong = [f"{name} is unknown" for name in state if name not in known]
    weights = {name: torch.empty(shape.shape) for name, shape in shapes.items() if not shape.numel()}
    for link in found:
        there = [name for name in link.theirs if name in state]
        if not there:
            wrong.append(f"{' or '.join(link.theirs)} is missing")
            continue
        first, expected = state[there[0]], link.of(shapes).shape
        if first.shape != expected:
            wrong.append(f"{there[0]} is {tuple(first.shape)}, not {tuple(expected)}")
            continue
        wrong += [f"{name} is not {there[0]}, to which the model ties it" for name in there[1:]
                  if not torch.equal(state[name], first)]
        whole = weights.setdefault(link.ours, torch.empty(shapes[link.ours].shape, dtype=first.dtype))
        whole[link.part] = first.flip(0) if link.turned else first
    if wrong:
        raise Unconvertible(f"These weights do not fit the model: {_some(wrong, '; ')}")
    return weights


def from_ours(weights: Mapping[str, Tensor], model: Model, dialect: Dialect) -> dict[str, Tensor]:
    """Our state dict as theirs, with what is tied under all its names. Raises Unconvertible where they have no such
    model."""
    check_expressible(model, dialect)
    n_token = len(weights["vocabulary.bias"])
    state = {buffer_name(dialect): 1 / (10000 ** (torch.arange(0.0, model.d_model, 2.0) / model.d_model))}
    for link in links(model, n_token, dialect):
        tensor = link.of(weights).clone()
        state |= dict.fromkeys(link.theirs, tensor)
    return state


def links(model: Model, n_token: int, dialect: Dialect) -> list[Link]:
    """Every tensor of theirs but the frequencies of the positions, and what it is of ours."""
    edges = (0, *model.cutoffs, n_token)
    clusters = range(len(edges) - 1)
    tables = [0] if model.div_val == 1 else list(clusters)      # also of projections and of biases
    of_table = {i: 0 if model.div_val == 1 else i for i in clusters}
    projected = model.div_val > 1 or model.d_embed_of(0) != model.d_model
    body = "transformer." if dialect == "hf" else ""
    out_weight, out_bias = (("crit.out_layers_weights.{}", "crit.out_layers_biases.{}") if dialect == "nvidia" else
                            ("crit.out_layers.{}.weight", "crit.out_layers.{}.bias"))
    turned = dialect != "hf"

    found = []
    for i in tables:
        embedding, softmax = f"{EMBEDDING[dialect]}{i}.weight", out_weight.format(i)
        if model.tie_weight:                                     # nvidia's softmax then has no table of its own
            found.append(Link(f"vocabulary.tables.{i}", (embedding,) if dialect == "nvidia" else (embedding, softmax)))
        else:
            found += [Link(f"vocabulary.tables.{i}", (embedding,)), Link(f"vocabulary.out_tables.{i}", (softmax,))]
        words = ... if model.div_val == 1 else slice(edges[i], edges[i + 1])
        found.append(Link("vocabulary.bias", (out_bias.format(i),), words))
        if projected:
            shared = ((f"crit.shared_out_projs.{i}",) if dialect == "nvidia" else
                      tuple(f"crit.out_projs.{j}" for j in clusters if of_table[j] == i and model.ties_proj(j)))
            found.append(Link(f"vocabulary.in_projs.{i}", (f"{body}word_emb.emb_projs.{i}", *shared)))
    if projected:
        found += [Link(f"vocabulary.out_projs.{j}", (f"crit.out_projs.{j}",)) for j in clusters
                  if not model.ties_proj(j)]
    if model.cutoffs:
        found += [Link(f"vocabulary.cluster_{x}", (f"crit.cluster_{x}",), turned=turned) for x in ("weight", "bias")]

    for i in range(model.n_layer):
        found += [Link(f"layers.{i}.{ours}", (f"{body}layers.{i}.{theirs}",)) for ours, theirs in _LAYER.items()]
    for ours, theirs in (("u", "r_w_bias"), ("v", "r_r_bias")):
        each = [f"{body}layers.{i}.dec_attn.{theirs}" for i in range(model.n_layer)] if dialect == "hf" else []
        if model.untie_r:
            found += [Link(ours, (name,), i) for i, name in enumerate(each)]
        else:
            found.append(Link(ours, (f"{body}{theirs}", *each), 0))
    return found


def buffer_name(dialect: Dialect) -> str:
    """Of the frequencies of the positions, which the width decides; they are in the file, but are no weights."""
    return f"{'transformer.' if dialect == 'hf' else ''}pos_emb.inv_freq"


def check_expressible(model: Model, dialect: Dialect) -> None:
    """Raises Unconvertible where their code has no such model."""
    ties = [model.ties_proj(i) for i in range(len(model.cutoffs) + 1)]
    projected = model.div_val > 1 or model.d_embed_of(0) != model.d_model
    lacks = (["final_lnorm=true"] if model.final_lnorm else []) + (
        ["untie_r=true"] if model.untie_r and dialect != "hf" else []) + (
        [f"tie_projs={','.join(map(str, ties)).lower()}"]
        if dialect == "hf" and projected and (ties[0] or len(set(ties[1:])) > 1) else [])
    if lacks:
        raise Unconvertible(f"{dialect} has no models with {' and '.join(lacks)}")


def model_of(config: Mapping[str, Any], dialect: Dialect, base: Model) -> Model:
    """The model that their configuration describes; what it does not mention (initialisation) is as in `base`.

    Raises Unconvertible where a value is missing or means something that is not computed here, and BadValue where one
    is of another type.
    """
    lacking = [name for name in _SAME if name not in config]
    if lacking:
        raise Unconvertible(f"The configuration lacks {', '.join(lacking)}")
    for name, value in (("attn_type", 0), ("layer_norm_epsilon", 1e-5)):
        if config.get(name, value) != value:
            raise Unconvertible(f"The configuration has {name}={config[name]}; here it is always {value}")
    if config.get("sample_softmax", -1) > 0:
        raise Unconvertible("The configuration has sample_softmax, a softmax over a sample, which is not computed here")
    tied = config.get("proj_share_all_but_first", True)
    told = {name: config[name] for name in _SAME} | {
        "final_lnorm": False, "untie_r": config.get("untie_r", True) if dialect == "hf" else False,
        "tie_weight": config.get("tie_word_embeddings" if dialect == "hf" else "tie_weight", True),
        "tie_projs": list(config.get("tie_projs", [False] + [tied] * len(config["cutoffs"])))}
    return from_json(Model, to_json(base) | told)


def config_of(model: Model, n_token: int, dialect: Dialect) -> dict[str, Any]:
    """The configuration that their code builds this model from: nvidia's model_config, hf's config.json."""
    width = model.d_embed_of(0)
    told = {name: getattr(model, name) for name in _SAME} | {
        "d_embed": width, "cutoffs": list(model.cutoffs), "clamp_len": -1, "same_length": False, "attn_type": 0,
        "sample_softmax": -1}
    ties = [model.ties_proj(i) for i in range(len(model.cutoffs) + 1)]
    if dialect == "nvidia":
        return told | {"n_token": n_token, "tie_weight": model.tie_weight, "tie_projs": ties, "dtype": None}
    return told | {
        "model_type": "transfo-xl", "architectures": ["TransfoXLLMHeadModel"], "vocab_size": n_token,
        "tie_word_embeddings": model.tie_weight, "untie_r": model.untie_r, "layer_norm_epsilon": 1e-5,
        "proj_share_all_but_first": all(ties[1:]), "adaptive": bool(model.cutoffs), "eos_token_id": 0,
        "init": model.init, "init_std": model.init_std, "init_range": model.init_range,
        "proj_init_std": model.proj_init_std}


_SAME = ("n_layer", "n_head", "d_model", "d_head", "d_inner", "d_embed", "div_val", "cutoffs", "dropout", "dropatt",
         "pre_lnorm")
_LAYER = {
    "attention.qkv.weight": "dec_attn.qkv_net.weight",
    "attention.r.weight": "dec_attn.r_net.weight",
    "attention.out.weight": "dec_attn.o_net.weight",
    "attention_norm.weight": "dec_attn.layer_norm.weight",
    "attention_norm.bias": "dec_attn.layer_norm.bias",
    "feed_forward.0.weight": "pos_ff.CoreNet.0.weight",
    "feed_forward.0.bias": "pos_ff.CoreNet.0.bias",
    "feed_forward.3.weight": "pos_ff.CoreNet.3.weight",
    "feed_forward.3.bias": "pos_ff.CoreNet.3.bias",
    "feed_forward_norm.weight": "pos_ff.layer_norm.weight",
    "feed_forward_norm.bias": "pos_ff.layer_norm.bias",
}


def _shapes(model: Model, n_token: int) -> dict[str, Tensor]:
    """Our tensors without their content."""
    try:
        with torch.device("meta"):
            return TransformerXL(model, n_token).state_dict()
    except BadValue as error:
        raise Unconvertible(f"These weights do not fit the model: {error}") from error


def _some(what: list[str], between: str = ", ") -> str:
    return between.join(what[:3]) + (f", and {len(what) - 3} more" if len(what) > 3 else "")
