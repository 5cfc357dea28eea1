from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from engine.loop import train
from engine.run import Run
from engine.values import to_json
from engine.world import world
from tests.txl.small import RECIPE
from txl.config import Data
from txl.data import load
from txl.task import TransformerXLTask


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run on a small text of words, trained far enough to beat a unigram model."""
    folder = tmp_path_factory.mktemp("run")
    words = random.Random(1)
    sentence = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    for split, lines in (("train", 300), ("valid", 30), ("test", 30)):
        text = "".join(" ".join(sentence[:words.randint(3, 9)]) + "\n" for _ in range(lines))
        (folder / f"{split}.txt").write_text(text)
    recipe = replace(RECIPE, data=Data("text", str(folder)), model=replace(RECIPE.model, cutoffs=(3, 5), dropout=0.0),
                     optim=replace(RECIPE.optim, name="adam"), stop=replace(RECIPE.stop, max_steps=60))
    (folder / "recipe.json").write_text(json.dumps(to_json(recipe)))
    with world() as w:
        train(w, TransformerXLTask(recipe, load(recipe.data)), recipe, Run(folder, w))
    return folder
