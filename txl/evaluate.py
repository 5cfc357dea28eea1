"""What a run reached, as a table: a unigram model, this model without memory, and with it.

    python -m txl.evaluate --run=runs/demo
    python -m txl.evaluate --run=runs/demo --split=valid --tgt_len=64 --mem_len=640 --clamp_len=400 --same_length

Every token of the split is predicted once. Perplexity is per token of the run's own vocabulary; bits per byte can be
compared between vocabularies.
"""
from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from engine import checkpoint
from engine.cli import flag, parse
from engine.loop import load_weights
from engine.precision import precision_for
from engine.task import Score
from engine.values import BadValue, override
from engine.world import World, world
from txl.config import Context, Recipe
from txl.data import Corpus, DataError, load
from txl.model import TransformerXL
from txl.task import evaluate, read_recipe


@dataclass(frozen=True)
class Flags:
    run: str = flag("folder of the run, or of one of its checkpoints; of a run the best is taken")
    split: Literal["test", "valid", "train"] = flag("which text", default="test")
    tgt_len: int | None = flag("tokens predicted at a time; unless given, the recipe's for the split", default=None)
    mem_len: int | None = flag("tokens remembered", default=None)
    clamp_len: int | None = flag("cap of the distance that positions express", default=None)
    same_length: bool = flag("every token sees exactly mem_len before it", default=False)


@dataclass(frozen=True)
class Trained:
    """A run read back: its recipe, its data, and the model with the weights of one checkpoint."""
    recipe: Recipe
    corpus: Corpus
    net: TransformerXL
    checkpoint: checkpoint.Checkpoint


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="-m txl.evaluate", about=__doc__)
    with world() as w:
        try:
            trained = restore(Path(flags.run), w)
            lines = table(trained, flags.split, _context(trained.recipe, flags), w)
        except (BadValue, DataError, checkpoint.CheckpointError) as error:
            print(error, file=sys.stderr)
            return 1
        if w.leads:
            print(lines)
    return 0


def restore(path: Path, w: World) -> Trained:
    """The run at `path` (its folder, or a checkpoint's). Raises BadValue, DataError, CheckpointError."""
    found = checkpoint.find(path)
    recipe = read_recipe(found.path.parent.parent / "recipe.json")
    corpus = load(recipe.data)
    net = TransformerXL(recipe.model, corpus.n_token)
    load_weights(net, found, corpus.vocab.hash)
    return Trained(recipe, corpus, net.to(w.device).eval(), found)


def table(trained: Trained, split: str, context: Context, w: World) -> str:
    """The comparison, with the protocol it was measured by and what the training cost."""
    corpus, recipe = trained.corpus, trained.recipe
    with precision_for(recipe.precision, w.device).autocast():
        with_memory = evaluate(trained.net, corpus, split, context, recipe.eval_streams, w)
        without = evaluate(trained.net, corpus, split, replace(context, mem_len=0), recipe.eval_streams, w)
    unigram = unigram_nats(corpus.splits["train"], corpus.splits[split], corpus.n_token)
    rows = [("a unigram model", unigram), ("this model without memory", without.nats),
            ("this model with memory", with_memory.nats)]
    lines = [f"{split} of {recipe.data.dir}, {with_memory.tokens:,} tokens of a vocabulary of {corpus.n_token:,}",
             f"{'':<28}{'perplexity':>12}{'of unigram':>12}{'bits per byte':>15}"]
    for name, nats in rows:
        ppl = math.exp(nats / with_memory.tokens)
        share = ppl / math.exp(unigram / with_memory.tokens)
        lines.append(f"{name:<28}{ppl:>12.2f}{share:>12.1%}{nats / math.log(2) / corpus.n_bytes[split]:>15.3f}")
    return "\n".join([*lines, f"({with_memory.protocol}; weights of step {trained.checkpoint.step})",
                      *_cost(trained.checkpoint.path.parent.parent / "metrics.jsonl", with_memory)])


def unigram_nats(train: np.ndarray, text: np.ndarray, n_token: int) -> float:
    """What `text` costs a model that only knows how often each token was in `train`, one added to every count."""
    counts = np.bincount(train, minlength=n_token) + 1.0
    return float(-np.log(counts / counts.sum())[text].sum())


def _context(recipe: Recipe, flags: Flags) -> Context:
    given = [f"{name}={getattr(flags, name)}" for name in ("tgt_len", "mem_len", "clamp_len", "same_length")
             if getattr(flags, name) is not None and getattr(flags, name) is not False]
    return override(recipe.context_of(flags.split), *given)


def _cost(metrics: Path, score: Score) -> list[str]:
    """Speed and minutes of the training, from its own log; speed of this evaluation."""
    evaluated = f"evaluated at {score.tokens / score.seconds:,.0f} tokens/s"
    if not metrics.exists():
        return [evaluated]
    whole = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
    train = [x for x in map(json.loads, whole) if x["kind"] == "train"]
    if not train:
        return [evaluated]
    rate = sorted(x["tokens_per_s"] for x in train)[len(train) // 2]
    return [f"trained on {train[-1]['tokens']:,} tokens in {train[-1]['seconds'] / 60:.1f} minutes, "
            f"{rate:,.0f} tokens/s; {evaluated}"]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main(sys.argv[1:]))
