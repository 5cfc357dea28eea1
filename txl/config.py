"""Transformer-XL's types: model, data, context lengths, recipe. Frozen values, standard library only.

Names are those of the paper (arXiv:1901.02860) and of its ancestors' options.
"""
from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from engine import config as engine

LEARNED = ("shaw", "learned")                     # attn_types with a table of positions
Dataset = Literal["wt103", "wt2", "ptb", "enwik8", "text8", "lm1b", "stdlib", "wiki", "git", "text"]


@dataclass(frozen=True)
class Model:
    """Shape, regularisation and initialisation. With `cutoffs` embedding and softmax are adaptive.

    attn_type, how positions come in: "rel" is the paper's, sinusoids of the distance between query and key; "shaw"
    (arXiv:1803.02155, with a bias for each distance) learned vectors of that distance for each layer and head. The two
    others are of a plain attention, and count from the segment's end, also in the memory: "abs" adds sinusoids to the
    embeddings (arXiv:1706.03762), "learned" a vector of a table to the input of each layer.

    cutoffs (20000, 40000, 200000) makes a head of the 20,000 first words and three tail clusters; with div_val v,
    cluster i has embeddings of d_embed / v**i dimensions, projected to d_model.
    """
    n_layer: int
    d_model: int
    n_head: int
    d_head: int
    d_inner: int
    d_embed: int | None = None                    # None: d_model
    dropout: float = 0.1
    dropatt: float = 0.0
    pre_lnorm: bool = False
    final_lnorm: bool = False                     # a last norm after the layers; pre_lnorm's ancestors had none
    attn_type: Literal["rel", "shaw", "abs", "learned"] = "rel"
    positions: int | None = None                  # rows of a learned table of distances; what is further has the last
    untie_r: bool = False                         # u and v of each layer's own rather than shared
    tie_weight: bool = True                       # softmax weights are the embedding's
    tie_projs: tuple[bool, ...] | None = None     # by cluster, head first; None: all but the head
    cutoffs: tuple[int, ...] = ()
    sample_softmax: int | None = None             # words to draw, of which training tells the target apart; None: all
    div_val: int = 1
    init: Literal["normal", "uniform"] = "normal"
    init_std: float = 0.02
    init_range: float = 0.1
    proj_init_std: float = 0.01

    def __post_init__(self):
        if min(self.n_layer, self.d_model, self.n_head, self.d_head, self.d_inner, self.div_val) < 1:
            raise ValueError("n_layer, d_model, n_head, d_head, d_inner and div_val must be at least 1")
        if (self.positions is None or self.positions < 1) if self.attn_type in LEARNED else self.positions is not None:
            raise ValueError(f"positions, at least 1, is for attn_type {' and '.join(LEARNED)}, which need it: the "
                             f"ancestors had tgt_len + ext_len + mem_len; here attn_type is {self.attn_type}")
        if self.untie_r and self.attn_type not in ("rel", "shaw"):
            raise ValueError(f"untie_r is about u and v, which attn_type {self.attn_type} has not")
        if self.d_model % 2:
            raise ValueError(f"d_model must be even (half of it sines, half cosines), not {self.d_model}")
        if not (0 <= self.dropout < 1 and 0 <= self.dropatt < 1):
            raise ValueError("dropout and dropatt must lie in [0, 1)")
        if list(self.cutoffs) != sorted(set(self.cutoffs)) or min(self.cutoffs, default=1) < 1:
            raise ValueError(f"cutoffs must be positive and rise, not {self.cutoffs}")
        if self.div_val > 1 and not self.cutoffs:
            raise ValueError("div_val above 1 needs cutoffs: it shrinks the embeddings of the tail clusters")
        if self.sample_softmax is not None and (self.sample_softmax < 1 or self.cutoffs):
            raise ValueError("sample_softmax must be at least 1, and is for a softmax without cutoffs")
        if self.d_embed_of(len(self.cutoffs)) < 1:
            raise ValueError("div_val leaves the last cluster no dimension")
        if self.tie_projs is not None and len(self.tie_projs) != len(self.cutoffs) + 1:
            raise ValueError(f"tie_projs needs one entry for the head and one a cluster: {len(self.cutoffs) + 1}")

    def d_embed_of(self, cluster: int) -> int:
        """Embedding width of a cluster; 0 is the head."""
        return (self.d_embed or self.d_model) // self.div_val ** cluster

    def ties_proj(self, cluster: int) -> bool:
        return cluster > 0 if self.tie_projs is None else self.tie_projs[cluster]


@dataclass(frozen=True)
class Context:
    """How much text one step sees, in tokens: it predicts tgt_len, re-reads ext_len, remembers mem_len.

    clamp_len caps the distance that positions express; same_length lets every query see exactly the
    mem_len tokens before it (and itself) rather than between mem_len and mem_len + tgt_len.
    """
    tgt_len: int
    mem_len: int
    ext_len: int = 0
    clamp_len: int | None = None
    same_length: bool = False

    def __post_init__(self):
        if self.tgt_len < 1 or self.mem_len < 0 or self.ext_len < 0 or (self.clamp_len or 1) < 1:
            raise ValueError("tgt_len and clamp_len must be at least 1, mem_len and ext_len not negative")


@dataclass(frozen=True)
class Data:
    """A text and how it becomes tokens. `dir` holds {train,valid,test}.txt; tokens are cached beside them.

    eval_sets are further texts, NAME=PATH, which every validation scores by their names; they choose no checkpoint.
    """
    dataset: Dataset
    dir: str
    vocab: Literal["word", "char", "byte", "bpe"] = "word"
    n_token: int | None = None                    # what the vocabulary must hold: checked; for bpe, made so large
    bpe_files: str | None = None                  # a folder with encoder.json and vocab.bpe (GPT-2's) instead
    word_list: str | None = None                  # a file of the words in the order of their ids, rather than counted
    lower_case: bool = False
    min_freq: int = 0                             # words rarer than this become <unk>; characters U+FFFD
    max_size: int | None = None                   # only the most frequent words or characters; the rest become that
    eval_sets: tuple[str, ...] = ()

    def __post_init__(self):
        counted = [name for name in ("lower_case", "min_freq", "max_size") if getattr(self, name)]
        if counted and self.vocab in ("byte", "bpe"):
            raise ValueError(f"{' and '.join(counted)} is for a word or char vocabulary, and this one is {self.vocab}")
        names = [text.partition("=")[0] for text in self.eval_sets]
        for text, name in zip(self.eval_sets, names):
            if not re.fullmatch(r"[A-Za-z][\w.-]*=.+", text) or name in ("train", "valid", "test", "all"):
                raise ValueError(f"an evaluation set is NAME=PATH, where NAME begins with a letter and is not train, "
                                 f"valid, test or all, unlike {text!r}")
        if len(set(names)) < len(names):
            raise ValueError(f"evaluation sets need different names: {', '.join(names)}")
        if self.vocab == "bpe" and self.n_token is None:
            raise ValueError("a bpe vocabulary needs n_token, its size")
        if self.vocab == "byte" and self.n_token not in (None, 256):
            raise ValueError("a byte vocabulary has exactly 256 tokens")

    @property
    def eval_paths(self) -> dict[str, str]:
        """The further texts by their names."""
        return {name: path for name, _, path in (text.partition("=") for text in self.eval_sets)}

    @property
    def end_of_line(self) -> str:
        """What ends a line where tokens are words: the One Billion Word Benchmark's has a name of its own."""
        return "<S>" if self.dataset == "lm1b" else "<eos>"


@dataclass(frozen=True, kw_only=True)
class Recipe(engine.Recipe):
    """A Transformer-XL training run as one value: with the data it names, everything that makes the number."""
    entry: ClassVar[str] = "txl.train"
    model: Model
    data: Data
    context: Context
    eval_context: Context                         # validation while training
    test_context: Context | None = None           # the test at the end; None: eval_context
    eval_streams: int = 16                        # parallel streams a split is cut into; part of the protocol
    eval_max_segments: int | None = None          # a validation while training reads so many of each; None: all
    roll: bool = False                            # each epoch each stream begins at another place (NVIDIA's)
    varlen: bool = False                          # training segments of random lengths around tgt_len (the original's)
    shuffle_sentences: bool = False               # each epoch the lines of the text come in an order of its own (lm1b)

    freeze_below: int = 0                         # layers, from the input on, that stay as they are

    @property
    def frozen(self) -> tuple[str, ...]:
        return *self.freeze, *(f"layers.{i}.*" for i in range(self.freeze_below))

    def context_of(self, split: str) -> Context:
        """What an evaluation of `split` sees."""
        return self.test_context if split == "test" and self.test_context is not None else self.eval_context

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.freeze_below <= self.model.n_layer:
            raise ValueError(f"freeze_below is {self.freeze_below}, and there are {self.model.n_layer} layers")
        if min(self.eval_streams, 1 if self.eval_max_segments is None else self.eval_max_segments) < 1:
            raise ValueError("eval_streams and eval_max_segments must be at least 1")
        if self.shuffle_sentences and self.data.vocab == "bpe":
            raise ValueError("shuffle_sentences needs a token that ends a line, which byte pairs have not: use the "
                             "word, char or byte vocabulary")
        if self.clock.split_tails and not (self.model.cutoffs and self.model.tie_weight and self.model.div_val == 1):
            raise ValueError("clock.split_tails is for one table of all words, embedding and softmax at once, that has "
                             "tails: model.cutoffs, tie_weight=true and div_val=1")
        if self.data.n_token is not None and self.model.cutoffs and self.model.cutoffs[-1] >= self.data.n_token:
            raise ValueError(f"the last cutoff {self.model.cutoffs[-1]} must be below the {self.data.n_token} tokens "
                             f"of the vocabulary")

    @property
    def tokens_per_sequence(self) -> int:
        return self.context.tgt_len

    @property
    def params(self) -> int | None:
        return n_params(self.model, self.data.n_token) if self.data.n_token is not None else None

    @property
    def flops_per_token(self) -> float | None:
        n_token = self.data.n_token
        return flops_per_token(self.model, self.context, n_token) if n_token is not None else None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The text's folder with the tokens below it, the vocabulary's files, further texts to evaluate on, the runs
        that training starts from."""
        byte_pairs = (self.data.bpe_files,) if self.data.vocab == "bpe" and self.data.bpe_files is not None else ()
        weights = (path for path in (self.init_from, self.init_under) if path is not None)
        return self.data.dir, *byte_pairs, *self.given, *weights

    @property
    def given(self) -> tuple[str, ...]:
        words = (self.data.word_list,) if self.data.vocab == "word" and self.data.word_list is not None else ()
        return *words, *self.data.eval_paths.values()

    @property
    def prepare(self) -> tuple[str, ...] | None:
        if self.data.dataset in ("wiki", "git", "text"):
            return None
        return "-m", "txl.data", *(f"--{name}={value}" for name, value in vars(self.data).items()
                                   if value and name != "eval_sets")


def n_params(model: Model, n_token: int) -> int:
    """Trainable parameters of `model` over a vocabulary of `n_token`, without building it."""
    d, tables = model.d_model, table_params(model, n_token)
    clusters = len(model.cutoffs) * (model.d_embed_of(0) + 1)
    projected = model.div_val > 1 or model.d_embed_of(0) != d
    in_projs = [d * model.d_embed_of(i) for i in range(len(tables) if model.div_val > 1 else 1)] if projected else []
    out_projs = [d * model.d_embed_of(i if model.div_val > 1 else 0) for i in range(len(tables))
                 if projected and not model.ties_proj(i)]
    return (body_params(model) + sum(tables) * (1 if model.tie_weight else 2) + n_token + clusters + sum(in_projs)
            + sum(out_projs))


def body_params(model: Model) -> int:
    """Of those, all that are not of the vocabulary."""
    d, heads = model.d_model, model.n_head * model.d_head
    of_positions = {"rel": d * heads, "abs": 0, "shaw": (model.positions or 0) * (heads + model.n_head),
                    "learned": (model.positions or 0) * d}[model.attn_type]
    attention = 3 * d * heads + heads * d + of_positions + 2 * d     # q, k, v; out; r or tables; norm
    feed_forward = 2 * d * model.d_inner + model.d_inner + d + 2 * d
    biases_uv = {"rel": 2, "shaw": 1}.get(model.attn_type, 0) * heads * (model.n_layer if model.untie_r else 1)
    return model.n_layer * (attention + feed_forward) + biases_uv + (2 * d if model.final_lnorm else 0)


def table_params(model: Model, n_token: int) -> tuple[int, ...]:
    """The embedding's table by cluster, the head first. If it is not tied, the softmax has as many parameters more."""
    edges = (0, *model.cutoffs, n_token)
    return tuple((high - low) * model.d_embed_of(i if model.div_val > 1 else 0)
                 for i, (low, high) in enumerate(itertools.pairwise(edges)))


def flops_per_token(model: Model, context: Context, n_token: int) -> float:
    """Floating-point operations that training needs per target, forward and backward; tail clusters not counted.

    A product of [m, k] and [k, n] is 2mkn. Keys and values of the memory are computed anew but get no gradient of
    their input; half of the tgt_len x tgt_len scores are masked and not needed; relative positions are shared by the
    batch and left out.
    """
    width, d = model.n_head * model.d_head, model.d_model
    products = 3 if model.attn_type in ("rel", "shaw") else 2        # with keys, with positions, with values
    scores = products * 2 * width * (context.mem_len + context.tgt_len / 2)
    per_token = 2 * (4 * d * width + 2 * d * model.d_inner) + scores
    memory = 2 * 2 * d * width * context.mem_len / context.tgt_len
    scored = model.cutoffs[0] + len(model.cutoffs) if model.cutoffs else n_token
    head = 2 * d * min(scored, 2 * (model.sample_softmax or n_token))
    return model.n_layer * (3 * per_token + 2 * memory) + 3 * head
