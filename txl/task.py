"""Transformer-XL as the engine's task: what a step reads, what it loses, how a split is scored."""
from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import share_of
from engine.split import Shards
from engine.task import Position, Score, Step
from engine.values import BadValue, from_json
from engine.world import World
from txl.batches import Segment, Sentences, Streams
from txl.config import Context, Recipe, body_params, flops_per_token
from txl.data import Corpus
from txl.memory import Memory
from txl.model import TransformerXL
from txl.protocol import Protocol, context_for, described, segments


@dataclass(frozen=True)
class TransformerXLTask:
    recipe: Recipe
    corpus: Corpus

    @property
    def flops_per_token(self) -> float:
        return flops_per_token(self.recipe.model, self.recipe.context, self.corpus.n_token)

    @property
    def vocabulary(self) -> str:
        return self.corpus.vocab.hash

    @property
    def sizes(self) -> dict[str, float]:
        """For the log: the length of a sequence, and the parameters that are not embeddings."""
        return {"seq_size": self.recipe.context.tgt_len, "non_emb_params": body_params(self.recipe.model)}

    @property
    def eval_sets(self) -> tuple[str, ...]:
        return tuple(self.recipe.data.eval_paths)

    def build(self) -> TransformerXL:
        net = TransformerXL(self.recipe.model, self.corpus.n_token)
        if self.recipe.clock.compile:
            for layer in net.layers:
                layer.compile()                    # one graph serves all layers: they differ in weights only
        return net

    def steps(self, world: World, start: Position) -> Iterator[Step]:
        """Epoch after epoch of segments; memory starts anew with each epoch, since the text does. Raises BadValue."""
        recipe, text = self.recipe, self.corpus.splits["train"]
        sequences = recipe.batch.total(world.size)
        if sequences * recipe.context.tgt_len > len(text):
            raise BadValue(f"A step of {sequences} sequences of {recipe.context.tgt_len} tokens is more than the text "
                           f"to train on, which has {len(text):,} tokens. Use a smaller recipe.batch or "
                           f"recipe.context.tgt_len, or more text")
        return self._steps(world, start)

    def _steps(self, world: World, start: Position) -> Iterator[Step]:
        recipe, context, cutoffs = self.recipe, self.recipe.context, self.recipe.model.cutoffs
        text, edge = self.corpus.splits["train"], self.corpus.vocab.start
        plain = Streams(text, edge, recipe.batch.total(world.size))
        sentences = Sentences(text, edge) if recipe.shuffle_sentences else None
        shares = recipe.batch.micro_batches(world.rank, world.size)
        shards = Shards((*cutoffs, self.corpus.n_token), world.size) \
            if recipe.clock.split_tails and world.size > 1 else None
        epoch, share_done = start.epoch, (start.index, start.steps)
        while True:
            streams = plain.of_epoch(recipe.seed, epoch, roll=recipe.roll,
                                     varlen=context.tgt_len if recipe.varlen else None, sentences=sentences)
            count = streams.segments(context.tgt_len)
            first = share_done[0] * count // share_done[1]
            for k in range(first, count):
                following = Position(epoch, k + 1, count) if k + 1 < count else Position(epoch + 1, 0, count)
                segments = [streams.segment(share, k, context, cutoffs, whole=recipe.clock.compile)
                            for share in shares]   # whole: one shape is compiled once
                segments = [segment.shared(shards) for segment in segments] if shards else segments
                there = tuple(segment.to(world.device) for segment in segments)
                yield Step(Position(epoch, k, count), following, there, streams.targets(k, context.tgt_len), k == 0)
            epoch, share_done = epoch + 1, (0, 1)

    def loss(self, model: nn.Module, segment: Segment, memory: Memory | None) -> tuple[Tensor, Memory]:
        nll_BT, memory = model(segment.tokens_BQ, segment.targets_BT, memory, self.recipe.context, segment.rows,
                               segment.in_tails, segment.reads)
        return nll_BT.sum(), memory

    def evaluate(self, model: Any, split: str, world: World) -> Score:
        """By the recipe's context for the split, in its eval_streams."""
        recipe = self.recipe
        return evaluate(model, self.corpus, split, recipe.context_of(split), recipe.eval_streams, world,
                        max_segments=recipe.eval_max_segments if split != "test" else None)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file. Raises BadValue, saying what is wrong with it."""
    try:
        return from_json(Recipe, json.loads(path.read_text()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadValue(f"{path} is not a recipe that can be read ({error}). launch.py writes one into every run's "
                       f"folder") from error


@torch.no_grad()
def evaluate(model: TransformerXL, corpus: Corpus, split: str, context: Context, count: int, world: World,
             protocol: Protocol = "exact", after_segment: Callable[[], None] = lambda: None,
             max_segments: int | None = None) -> Score:
    """The loss of a split, read in `count` parallel streams as the protocol has it. Raises BadValue.

    With `max_segments`, of the beginnings of the streams: so many segments that count.

    The number depends on `count` (short streams know less), not on the ranks, which share the streams out.
    """
    begin = time.perf_counter()
    mine = share_of(count, world.rank, world.size)
    reading = context_for(protocol, context)
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    tokens, counted, memory = 0, 0, model.reading(len(mine), reading)
    for segment, counts in segments(protocol, corpus.splits[split], corpus.vocab.start, count, mine, reading,
                                    model.config.cutoffs):
        tokens += int((segment.targets_BT >= 0).sum()) if counts else 0
        segment = segment.to(world.device)
        nll_BT, memory = model(segment.tokens_BQ, segment.targets_BT, memory, reading, segment.rows)
        if counts:
            nats += nll_BT.sum(dtype=torch.float64)
        after_segment()
        counted += counts
        if counted == max_segments:
            break
    total_nats, total_tokens = world.sum(nats.item(), tokens)
    return Score(total_nats, int(total_tokens), time.perf_counter() - begin,
                 described(protocol, context, count, max_segments))
