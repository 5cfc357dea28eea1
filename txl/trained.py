"""A run read back, for whoever evaluates it or writes with it."""
from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from engine import checkpoint
from engine.precision import Precision, describe, precision_for
from engine.values import BadValue
from engine.weights import load_weights
from engine.world import World
from txl.config import Recipe
from txl.data import Corpus, load
from txl.model import TransformerXL
from txl.task import read_recipe


@dataclass(frozen=True)
class Trained:
    """A run's recipe, its data, and the model with the weights of one checkpoint."""
    recipe: Recipe
    corpus: Corpus
    net: TransformerXL
    checkpoint: checkpoint.Checkpoint

    @property
    def folder(self) -> Path:
        return self.checkpoint.path.parent.parent


def precision_of(trained: Trained, w: World) -> Precision:
    """What the run was trained in; where this device cannot do that, fp32, and a line that says so."""
    name = trained.recipe.precision
    try:
        return precision_for(name, w.device)
    except BadValue:
        if w.leads:
            print(f"The run was trained in {name}, which {describe(w.device)} cannot do: here it is fp32",
                  file=sys.stderr)
        return precision_for("fp32", w.device)


def restore(path: Path, w: World) -> Trained:
    """The run at `path` (its folder, or a checkpoint's). Raises BadValue, DataError, CheckpointError."""
    found = checkpoint.find(path)
    recipe = read_recipe(found.path.parent.parent / "recipe.json")
    corpus = load(recipe.data)
    net = TransformerXL(recipe.model, corpus.n_token)
    load_weights(net, found, corpus.vocab.hash)
    return Trained(recipe, corpus, net.to(w.device).eval(), found)
