from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from benchmarks import communication
from benchmarks.communication import sent
from benchmarks.scaling import workload
from configs import CONFIGS
from engine.step import Learner
from engine.task import Position
from engine.watch import Timed
from engine.world import world
from tests.ranks import run_ranks
from tests.txl.small import N_TOKEN, RECIPE, corpus
from txl.task import TransformerXLTask


@pytest.mark.parametrize(("exchange", "bits"), [("fp32", 32), ("bf16", 16), ("bf16_feedback", 16)])
def test_groups_are_what_the_scaling_model_counts(exchange, bits):
    models = {(config.recipe.model, config.recipe.data.n_token): config for config in CONFIGS.values()
              if config.recipe.data.n_token and config.recipe.precision != "fp16"}
    for config in models.values():
        recipe = replace(config.recipe, optim=replace(config.recipe.optim, exchange=exchange))
        groups, expected = sent(recipe, recipe.data.n_token), workload(config).gradients(bits)
        tables = ["word table"] if recipe.model.tie_weight else ["embedding", "softmax"]
        for table in tables:
            assert (groups[f"{table}: head"], groups[f"{table}: tails"]) == (expected.head, expected.tails), config
        again = groups.get("word table: head, again", 0)
        assert again in (0, expected.early(1).late)
        assert bool(again) == workload(replace(config, recipe=recipe)).today.startswith("early"), config
        assert sum(groups.values()) == expected.total + again, config


IN_16_BITS = replace(RECIPE, optim=replace(RECIPE.optim, exchange="bf16"))
FROZEN = replace(IN_16_BITS, freeze=("layers.0.*",))
SPLIT = replace(IN_16_BITS, clock=replace(RECIPE.clock, split_tails=True))


def _reduced(recipe):
    """Bytes in 16 bits that a step has all-reduced."""
    all_reduce, sizes = dist.all_reduce, []

    def noted(tensor, *args, **settings):
        sizes.append(tensor.nbytes if tensor.dtype == torch.bfloat16 else 0)
        return all_reduce(tensor, *args, **settings)
    dist.all_reduce = noted
    with world() as w:
        _step(recipe, w)
    return sum(sizes)


def _step(recipe, w):
    learner = Learner(w, TransformerXLTask(recipe, corpus()), recipe)
    learner.distribute()
    learner.take(next(learner.ahead(learner.task.steps(w, Position()))), 0.0, Timed())


@pytest.mark.parametrize("recipe", [IN_16_BITS, SPLIT, FROZEN, replace(FROZEN, freeze=("vocabulary.tables.*",))])
def test_bytes_are_those_that_ranks_reduce(recipe):
    expected = sum(sent(recipe, N_TOKEN).values())
    assert run_ranks(2, _reduced, recipe) == [expected] * 2
    assert (expected < sum(sent(IN_16_BITS, N_TOKEN).values())) == (recipe is not IN_16_BITS)


def test_overlap_is_the_share_of_the_exchange_that_costs_nothing():
    def overlap(*seconds):
        return str(communication.Timing(*seconds)).rpartition("| ")[2]
    assert (overlap(1.0, 1.0, .5), overlap(1.5, 1.0, .5), overlap(1.1, 1.0, .4)) == ("100%", "0%", "75%")
    assert overlap(1.6, 1.0, .5) == "ranks wait for each other longer than the exchange takes"


def test_two_ranks_print_one_row_with_their_overlap():
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
         "benchmarks.communication", "--config=tiny", "--set=recipe.optim.exchange=bf16", "--rounds=2", "--steps=2",
         "--threads=1"], capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    heading, row = done.stdout.splitlines()
    cells = [cell.strip() for cell in row.split("|")]
    assert heading.count("|") == row.count("|")
    with_exchange, without, alone = map(float, cells[6].replace(",", "").split(" / "))
    expected = 100 * (1 - (with_exchange - without) / alone)
    if cells[7].endswith("%"):
        assert int(cells[7].rstrip("%")) == pytest.approx(expected, abs=20 / alone + 1)
    else:
        assert expected < 20 / alone                              # below 0, but for what is rounded here
    assert float(cells[4]) == pytest.approx(workload(CONFIGS["tiny"]).gradients(16).total / 1e6, abs=.05)
    assert re.search(r"word table: head [\d.]+", cells[5])


def test_without_the_size_of_the_vocabulary_it_asks_for_it(capsys):
    with pytest.raises(SystemExit) as end:
        communication.main(["--config=nvidia_base", "--set=recipe.data.n_token=none"])
    assert end.value.code == 2
    assert "--set=recipe.data.n_token=N" in capsys.readouterr().err
