from __future__ import annotations

import json
import math
import random
import re
import statistics

import pytest

from benchmarks import quality
from configs import CONFIGS, DEMO, one_machine
from engine.values import BadValue, differences
from txl.config import n_params


def cut(name: str, tokens: int = 1_000_000):
    return quality.reduced(CONFIGS[name].recipe, DEMO.data, 2048, tokens)


def test_cut_down_nvidias_recipe_and_ours_differ_in_the_optimizer_alone():
    assert [line.partition(":")[0] for line in differences(cut("nvidia_base"), cut("base_muon"))] == [
        "optim.name", "optim.lr", "optim.betas", "optim.eps", "optim.momentum", "optim.bias_correction"]


def test_what_is_cut_keeps_the_proportions_and_the_rest():
    whole, small = CONFIGS["nvidia_base"].recipe, cut("nvidia_base")
    assert quality.tokens(small) == pytest.approx(1_000_000, rel=1e-3)
    assert small.schedule.warmup_steps / small.stop.max_steps == pytest.approx(1000 / 40_000, rel=.05)
    for edge, small_edge in zip(whole.model.cutoffs, small.model.cutoffs):
        assert small_edge / 2048 == pytest.approx(edge / 267_735, abs=1e-3)
    assert n_params(small.model, 2048) == 1_121_411
    assert (small.optim, small.roll, small.model.dropout) == (whole.optim, True, whole.model.dropout)


def test_a_schedule_in_tokens_is_refused():
    with pytest.raises(BadValue, match="in steps"):
        quality.reduced(one_machine.recipe, DEMO.data, 2048, 1_000_000)


@pytest.mark.slow
def test_the_row_is_of_the_seeds_tests_and_what_is_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    words = random.Random(0).choices(["to", "be", "or", "not", "that", "is", "the", "question"], k=4000)
    for split in ("train", "valid", "test"):
        (tmp_path / f"text/{split}.txt").write_text("\n".join(" ".join(words[i:i + 8]) for i in range(0, 4000, 8)))
    command = ["--config=nvidia_base", "--data=text", "--vocab=char", "--tokens=2048", "--seeds=2",
               "--set=recipe.model.cutoffs=[]"]
    assert quality.main(command) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    losses = [json.loads(line)["loss"] for path in tmp_path.glob("runs/quality/*/metrics.jsonl")
              for line in path.read_text().splitlines() if json.loads(line)["kind"] == "test"]
    assert len(set(losses)) == 2
    mean, deviation = map(float, re.search(r"\| ([0-9.]+) \+- ([0-9.]+) \|", row).groups())
    assert mean == pytest.approx(statistics.mean(map(math.exp, losses)), abs=.006)
    assert deviation == pytest.approx(abs(math.exp(losses[0]) - math.exp(losses[1])) / math.sqrt(2), abs=.006)

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert quality.main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == row
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
