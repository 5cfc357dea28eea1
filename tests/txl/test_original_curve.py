"""The original Transformer-XL's training (kimiyoung/transformer-xl, PyTorch), derived again, and ours beside it.

Everything below but the two runs of `engine.loop.train` is plain: a text counted into words and cut into streams,
sinusoids of explicit distances, one head after the other, every word's probability, Adam by its formula. It follows the
original as published, where that and ours decide differently so:

- The learning rate is set after a step, for the next one: without a warm-up, as in the recipe for wikitext-103's base
  model, that is ours. With one the original's first step has the full rate and its cosine begins with a jump.
- The first token of a stream is never predicted, and the tail that fills no stream is dropped. Ours predicts every
  token, so each of the original's streams is given the token before it here, and there is no tail.
- The loss of a step is the mean over its targets, also of the shorter segment that ends an epoch. Memory begins empty
  with each epoch.
- Cluster i of the adaptive softmax is column -i of the head: reversed.
- A cluster without a target has a gradient of zero, as in the torch of its time, so its moments go on. (torch today
  makes it None, and Adam leaves the tensor alone.) But eps is added to the root of the corrected second moment, as
  torch's Adam does today; that of 2018 added it before.

The original's own modules (commit 44781ed, their masks made boolean for torch 2.13), stepped as its train.py does in
float64, were run beside this file: the losses of these two cases differ from those here by less than 3e-11.
"""
from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import Batch, Clock, Optim, Schedule, Stop
from engine.loop import train
from engine.run import Run
from engine.world import world
from txl.config import Context, Data, Model, Recipe
from txl.data import load
from txl.model import TransformerXL
from txl.task import TransformerXLTask

STREAMS, TGT_LEN, MEM_LEN, STEPS = 4, 6, 9, 240
BASE = Model(n_layer=2, d_model=12, n_head=2, d_head=5, d_inner=20, dropout=0.0, cutoffs=(8, 16))
CASES = {"one_table": (BASE, 0.00025), "a_table_for_each_cluster": (replace(BASE, d_embed=8, div_val=2), 0.002)}


def recipe_of(case: str, folder: Path) -> Recipe:
    """The original's run_wt103_base.sh, but for its sizes; `lr` is its own in one case."""
    model, lr = CASES[case]
    context = Context(tgt_len=TGT_LEN, mem_len=MEM_LEN)
    return Recipe(model=model, data=Data("text", str(folder)), context=context, eval_context=context, eval_streams=2,
                  batch=Batch(size=STREAMS), optim=Optim("adam", lr=lr, clip=0.25), schedule=Schedule("cosine"),
                  stop=Stop(max_steps=STEPS), clock=Clock(log_interval=1, eval_interval=10_000))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder with a text in which each word depends on the one before, of 400 tokens with the ends of its lines."""
    folder, words = tmp_path_factory.mktemp("text"), random.Random(3)
    for split, lines in (("train", 50), ("valid", 4), ("test", 4)):
        said = []
        for _ in range(lines):
            number = words.choice((0, 1, 2))
            said.append(" ".join(f"w{(number := (number * 5 + words.choice((1, 1, 2))) % 27)}" for _ in range(7)))
        (folder / f"{split}.txt").write_text("\n".join(said) + "\n")
    return folder


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-9), (torch.float32, 1e-4)],
                         ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_of_every_step_is_that_of_the_original(case, dtype, within, text, tmp_path):
    recipe = recipe_of(case, text)
    with world() as w, computing_in(dtype):
        train(w, Converted(recipe, load(recipe.data)), recipe, Run(tmp_path, w))
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    ours = torch.tensor([x["loss"] for x in records if x["kind"] == "train"], dtype=torch.float64)
    theirs = torch.tensor(original_curve(case, text), dtype=torch.float64)
    assert len(theirs) == STEPS
    assert theirs[-17:].mean() < theirs[:17].mean() - 0.1     # of an epoch: it learns
    torch.testing.assert_close(ours, theirs, rtol=within, atol=0.0)


class Converted(TransformerXLTask):
    """Begins with the same weights whatever the precision."""

    def build(self) -> TransformerXL:
        with computing_in(torch.float32):
            net = super().build()
        return net.to(torch.get_default_dtype())


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@cache
def original_curve(case: str, folder: Path) -> list[float]:
    """The loss of every step."""
    model, lr = CASES[case]
    streams, n_token = batchify(folder)
    parameters = initial_weights(recipe_of(case, folder), n_token)
    adam = Adam(list(parameters.values()))
    losses: list[float] = []
    while len(losses) < STEPS:
        memory = [torch.zeros(STREAMS, 0, model.d_model, dtype=torch.float64)] * model.n_layer
        for first in range(0, len(streams[0]) - 1, TGT_LEN):
            inputs = torch.tensor([stream[first:first + TGT_LEN] for stream in streams])
            targets = torch.tensor([stream[first + 1:first + 1 + TGT_LEN] for stream in streams])
            inputs = inputs[:, :targets.size(1)]
            log_prob, memory = language_model(parameters, model, n_token, inputs, memory)
            loss = -log_prob.gather(2, targets.unsqueeze(2)).mean()
            gradients = clipped(list(torch.autograd.grad(loss, list(parameters.values()))), 0.25)
            adam.step(gradients, lr * (1 + math.cos(math.pi * len(losses) / STEPS)) / 2)
            losses.append(loss.item())
            if len(losses) == STEPS:
                break
    return losses


def batchify(folder: Path) -> tuple[list[list[int]], int]:
    """The streams' token ids, and how many words there are: the end of a line is 0, then the most frequent first."""
    lines = [line.split() for line in (folder / "train.txt").read_text().splitlines()]
    frequent = Counter(word for line in lines for word in line).most_common()
    number = {"<eos>": 0} | {word: i for i, (word, _) in enumerate(frequent, start=1)}
    ids = [number[word] for line in lines for word in [*line, "<eos>"]]
    length, tail = divmod(len(ids), STREAMS)
    assert tail == 0
    before = [0, *ids]                                        # what precedes the first: an end of a line
    return [before[b * length:(b + 1) * length + 1] for b in range(STREAMS)], len(number)


def initial_weights(recipe: Recipe, n_token: int) -> dict[str, Tensor]:
    """Those that ours begins with."""
    torch.manual_seed(recipe.seed)
    state = TransformerXL(recipe.model, n_token).state_dict()
    for name in ("vocabulary.cluster_weight", "vocabulary.cluster_bias"):
        state[name] = state[name].flip(0)
    return {name: x.double().clone().requires_grad_() for name, x in state.items()}


def language_model(w: dict[str, Tensor], m: Model, n_token: int, inputs: Tensor, memory: list[Tensor]):
    """log p of every word after each input, [B, Q, V], and what each layer then remembers."""
    hidden = embedded(w, m, n_token)[inputs] * math.sqrt(m.d_model)
    remembered = []
    for i in range(m.n_layer):
        remembered.append(torch.cat([memory[i], hidden], 1)[:, -MEM_LEN:].detach())
        hidden = layer(w, m, f"layers.{i}.", memory[i], hidden)
    return adaptive_log_softmax(w, m, n_token, hidden), remembered


def embedded(w: dict[str, Tensor], m: Model, n_token: int) -> Tensor:
    """Every word's embedding, [V, D]."""
    if m.div_val == 1:
        return w["vocabulary.tables.0"]
    return torch.cat([w[f"vocabulary.tables.{i}"] @ w[f"vocabulary.in_projs.{i}"].T for i in range(3)])


def layer(w: dict[str, Tensor], m: Model, name: str, memory: Tensor, hidden: Tensor) -> Tensor:
    past, now = memory.size(1), hidden.size(1)
    distance = torch.tensor([[past + q - k for k in range(past + now)] for q in range(now)])
    keys, positions = torch.cat([memory, hidden], 1), sinusoids(distance, m.d_model)
    w_q, w_k, w_v = w[f"{name}attention.qkv.weight"].chunk(3)
    heads = []
    for n in range(m.n_head):
        mine = slice(n * m.d_head, (n + 1) * m.d_head)
        q, k, v = hidden @ w_q[mine].T, keys @ w_k[mine].T, keys @ w_v[mine].T
        r = positions @ w[f"{name}attention.r.weight"][mine].T              # [Q, K, H]
        content = (q + w["u"][0, n]) @ k.transpose(1, 2)
        position = torch.stack([(q[:, i] + w["v"][0, n]) @ r[i].T for i in range(now)], 1)
        scores = (content + position) / math.sqrt(m.d_head)
        heads.append(scores.masked_fill(distance < 0, float("-inf")).softmax(-1) @ v)
    attended = torch.cat(heads, -1) @ w[f"{name}attention.out.weight"].T
    x = layer_norm(w, f"{name}attention_norm", hidden + attended)
    inner = (x @ w[f"{name}feed_forward.0.weight"].T + w[f"{name}feed_forward.0.bias"]).clamp(min=0)
    outer = inner @ w[f"{name}feed_forward.3.weight"].T + w[f"{name}feed_forward.3.bias"]
    return layer_norm(w, f"{name}feed_forward_norm", x + outer)


def sinusoids(distance: Tensor, d_model: int) -> Tensor:
    angles = [distance / 10000 ** (2 * k / d_model) for k in range(d_model // 2)]
    return torch.stack([angle.sin() for angle in angles] + [angle.cos() for angle in angles], -1).double()


def layer_norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = torch.sqrt((centred ** 2).mean(-1, keepdim=True) + 1e-5)
    return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]


def adaptive_log_softmax(w: dict[str, Tensor], m: Model, n_token: int, hidden: Tensor) -> Tensor:
    edges, parts = (0, *m.cutoffs, n_token), []
    for i in range(3):
        words, projected = slice(edges[i], edges[i + 1]), hidden
        weight = w["vocabulary.tables.0"][words] if m.div_val == 1 else w[f"vocabulary.tables.{i}"]
        bias = w["vocabulary.bias"][words]
        if m.div_val > 1:                                     # the head's projection is its own, the others are tied
            projected = hidden @ w["vocabulary.out_projs.0" if i == 0 else f"vocabulary.in_projs.{i}"]
        if i == 0:
            weight = torch.cat([weight, w["vocabulary.cluster_weight"]])
            bias = torch.cat([bias, w["vocabulary.cluster_bias"]])
        parts.append((projected @ weight.T + bias).log_softmax(-1))
    head, *tails = parts
    return torch.cat([head[..., :edges[1]], *(tail + head[..., -i, None] for i, tail in enumerate(tails, 1))], -1)


def clipped(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    norm = math.sqrt(sum(float((g ** 2).sum()) for g in gradients))
    return [g * min(1.0, max_norm / (norm + 1e-6)) for g in gradients]


class Adam:
    """arXiv:1412.6980, with its defaults."""

    def __init__(self, parameters: list[Tensor]):
        self.parameters, self.steps = parameters, 0
        self.m, self.v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    @torch.no_grad()
    def step(self, gradients: list[Tensor], lr: float) -> None:
        self.steps += 1
        for p, g, m, v in zip(self.parameters, gradients, self.m, self.v):
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g ** 2)
            p -= lr * (m / (1 - 0.9 ** self.steps)) / (torch.sqrt(v / (1 - 0.999 ** self.steps)) + 1e-8)
