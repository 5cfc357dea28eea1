"""Reading a run back: its table, its samples, and what is said when there is nothing to read."""
from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest

from engine.loop import train
from engine.run import Run
from engine.values import to_json
from engine.world import world
from tests.txl.small import RECIPE
from txl import evaluate, generate
from txl.config import Data
from txl.data import load
from txl.task import TransformerXLTask


@pytest.fixture(scope="module")
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


def test_the_table_compares_unigram_no_memory_and_memory(run, capsys):
    assert evaluate.main([f"--run={run}"]) == 0
    out = capsys.readouterr().out
    unigram, without, with_memory = (
        float(re.search(rf"^{name}\s+(\d+\.\d+)", out, re.MULTILINE)[1])
        for name in ("a unigram model", "this model without memory", "this model"))
    assert with_memory < without < unigram
    tested = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert tested["kind"] == "test"
    assert with_memory == pytest.approx(tested["ppl"], abs=0.005)
    assert "every token once, 3 streams" in out


def test_the_unigram_model_is_counts_plus_one():
    train_ids, text = np.array([0, 0, 1, 2, 0], dtype=np.uint16), np.array([0, 3, 1], dtype=np.uint16)
    expected = -math.log(4 / 9) - math.log(1 / 9) - math.log(2 / 9)
    assert evaluate.unigram_nats(train_ids, text, 4) == pytest.approx(expected)


def test_flags_change_the_context_and_the_table_says_so(run, capsys):
    assert evaluate.main([f"--run={run}", "--split=valid", "--tgt_len=5", "--mem_len=11", "--clamp_len=7",
                          "--same_length"]) == 0
    assert "tgt_len 5, mem_len 11, clamp_len 7, same_length" in capsys.readouterr().out


def test_a_folder_without_a_run_is_one_clear_line(tmp_path, capsys):
    assert evaluate.main([f"--run={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No checkpoint at" in error


def test_samples_repeat_with_their_seed_and_begin_with_the_prompt(run, capsys):
    def sampled(*flags):
        assert generate.main([f"--run={run}", "--length=40", *flags]) == 0
        return capsys.readouterr().out
    assert sampled("--seed=1") == sampled("--seed=1") != sampled("--seed=2")
    assert sampled("--prompt=the quick brown").startswith("the quick brown")
    assert sampled("--temperature=0", "--seed=1") == sampled("--temperature=0", "--seed=2")


def test_the_likeliest_continuation_is_what_the_text_always_says(run, capsys):
    generate.main([f"--run={run}", "--prompt=the quick", "--length=1", "--temperature=0"])
    assert capsys.readouterr().out.split() == ["the", "quick", "brown"]
