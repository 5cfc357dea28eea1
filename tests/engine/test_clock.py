"""What a run writes and when, and what it says at its end: log, evaluations, checkpoints, targets."""
from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import run as runs
from engine import checkpoint
from engine.config import Clock, Schedule, Stop
from engine.loop import train
from engine.run import Run
from engine.world import world
from tests.txl.small import RECIPE, corpus, train_here
from txl.task import TransformerXLTask

CHECKOUT = Path(__file__).parents[2]


def records(folder, kind):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [x for x in lines if x["kind"] == kind]


def status(folder):
    return json.loads((folder / "status.json").read_text())


def steps_kept(folder):
    return [found.step for found in checkpoint.complete(folder / "checkpoints")]


class Unread(TransformerXLTask):
    def evaluate(self, model, split, world):
        raise AssertionError(f"{split} was not to be read")


def test_without_evaluation_and_test_neither_is_read_and_checkpoints_are_written(tmp_path):
    recipe = replace(RECIPE, clock=replace(RECIPE.clock, eval_interval=None, test=False, keep_checkpoints=2))
    with world() as w:
        outcome = train(w, Unread(recipe, corpus()), recipe, Run(tmp_path, w))
    assert outcome.finished
    assert outcome.test is None
    assert steps_kept(tmp_path) == [18, 20]
    assert status(tmp_path)["state"] == "finished"


def test_without_evaluation_the_test_is_of_the_last_weights(tmp_path):
    recipe = replace(RECIPE, clock=replace(RECIPE.clock, eval_interval=None))
    outcome = train_here(tmp_path, recipe)
    net = TransformerXLTask(recipe, corpus()).build().eval()
    net.load_state_dict(checkpoint.complete(tmp_path / "checkpoints")[-1].shared()["model"])
    with world() as w:
        assert TransformerXLTask(recipe, corpus()).evaluate(net, "test", w).loss == pytest.approx(outcome.test.loss)


def test_evaluations_do_not_move_the_curve(tmp_path):
    train_here(tmp_path / "with")
    train_here(tmp_path / "without", replace(RECIPE, clock=replace(RECIPE.clock, eval_interval=None, test=False)))
    assert [x["loss"] for x in records(tmp_path / "with", "train")] == \
           [x["loss"] for x in records(tmp_path / "without", "train")]


def test_the_first_steps_are_logged_each_and_their_mean_is_what_one_log_would_have_said(tmp_path):
    train_here(tmp_path / "each", replace(RECIPE, clock=replace(RECIPE.clock, log_first_steps=6)))
    train_here(tmp_path / "plain")
    each = {x["step"]: x for x in records(tmp_path / "each", "train")}
    plain = {x["step"]: x for x in records(tmp_path / "plain", "train")}
    assert list(each) == [1, 2, 3, 4, 5, 6, 8, 12, 16, 20]
    assert sum(each[step]["loss"] for step in (1, 2, 3, 4)) / 4 == pytest.approx(plain[4]["loss"])


def test_the_checkpoint_at_the_end_of_each_epoch_stays(tmp_path):
    """An epoch has 11 steps; the best is of step 30, where the only evaluation is."""
    clock = Clock(log_interval=10, eval_interval=30, checkpoint_interval=4, checkpoint_epochs=True, keep_checkpoints=1)
    recipe = replace(RECIPE, stop=Stop(max_steps=30), clock=clock)
    train_here(tmp_path, recipe, stop_after=17)                   # and so do those of an earlier start
    train_here(tmp_path, recipe)
    assert steps_kept(tmp_path) == [11, 22, 30]


def test_all_checkpoints_are_kept_where_asked(tmp_path):
    train_here(tmp_path, replace(RECIPE, clock=replace(RECIPE.clock, keep_checkpoints=None)))
    assert steps_kept(tmp_path) == [3, 6, 9, 10, 12, 15, 18, 20]


def test_weights_of_two_runs_lie_one_over_the_other(tmp_path):
    deep = replace(RECIPE, model=replace(RECIPE.model, n_layer=3))
    train_here(tmp_path / "deep", deep, stop_after=2)
    train_here(tmp_path / "shallow", stop_after=3)
    both = replace(deep, init_from=str(tmp_path / "shallow"), init_under=str(tmp_path / "deep"), freeze=("layers.*",))
    train_here(tmp_path / "both", both, stop_after=1)
    under, over, weights = (checkpoint.find(tmp_path / x).shared()["model"] for x in ("deep", "shallow", "both"))
    for name, x in weights.items():
        if name.startswith("layers."):
            assert x.equal(over.get(name, under[name])), name
    assert f"are those of {tmp_path / 'deep'}: layers.2" in (tmp_path / "both/logs/rank-0.log").read_text()


@pytest.mark.parametrize(("changed", "said"), [
    ({"init_under": "x"}, "about what init_from names, which is none"),
    ({"init_under": "x", "init_from": "y", "init_partly": True}, "give one"),
    ({"schedule": Schedule("plateau"), "clock": Clock(eval_interval=None)}, "plateau goes by the validation"),
])
def test_what_excludes_each_other_is_refused(changed, said):
    with pytest.raises(ValueError, match=said):
        replace(RECIPE, **changed)


@pytest.mark.parametrize("wrong", [
    {"eval_interval": 0}, {"keep_checkpoints": 0}, {"log_first_steps": -1},
    {"target_perplexity": 20.0, "eval_interval": None}])
def test_a_clock_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=r"eval_interval|keep_checkpoints|log_first_steps"):
        Clock(**wrong)


def paced(folder):
    """Tokens per second after the first log line, by the log."""
    first, *_, last = records(folder, "train")
    return (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])


def test_a_run_says_its_targets_and_what_it_reached(tmp_path):
    """Perplexity: the best of the validations. Tokens/s: of all but the first log interval."""
    reachable = replace(RECIPE, clock=replace(RECIPE.clock, target_perplexity=1000.0, target_tokens_per_s=1e9))
    train_here(tmp_path, reachable)
    best = min(math.exp(x["loss"]) for x in records(tmp_path, "valid"))
    reached, message = status(tmp_path)["reached"], status(tmp_path)["message"]
    assert reached["perplexity"] == pytest.approx(best)
    assert reached["tokens_per_s"] == pytest.approx(paced(tmp_path))
    assert f"reached: valid ppl {best:.3f} (target: at most 1000)" in message
    assert f"MISSED: {reached['tokens_per_s']:,.0f} tokens/s (target: at least 1,000,000,000)" in message
    assert (tmp_path / "logs" / "rank-0.log").read_text().splitlines()[-1] == message


def test_the_first_interval_of_every_start_is_left_out_of_the_speed(tmp_path):
    train_here(tmp_path, stop_after=10)
    train_here(tmp_path)
    log = {x["step"]: x for x in records(tmp_path, "train")}      # steps 1 to 4 and 11, 12 began a start
    tokens = sum(log[b]["tokens"] - log[a]["tokens"] for a, b in ((4, 8), (12, 16), (16, 20)))
    seconds = sum(log[b]["seconds"] - log[a]["seconds"] for a, b in ((4, 8), (12, 16), (16, 20)))
    assert status(tmp_path)["reached"]["tokens_per_s"] == pytest.approx(tokens / seconds)


@pytest.mark.parametrize(("target", "reached", "missed"), [
    ({}, {}, False),
    ({"target_perplexity": 20.0}, {"perplexity": 20.0}, False),
    ({"target_perplexity": 20.0}, {"perplexity": 20.01}, True),
    ({"target_perplexity": 20.0}, {"perplexity": math.nan}, True),
    ({"target_perplexity": 20.0}, {"perplexity": None}, True),
    ({"target_tokens_per_s": 100.0}, {"tokens_per_s": 100.0}, False),
    ({"target_tokens_per_s": 100.0}, {"tokens_per_s": 99.0}, True),
    ({"target_tokens_per_s": 100.0}, {}, True),
    ({"target_perplexity": 20.0, "target_tokens_per_s": 100.0}, {"perplexity": 19.0, "tokens_per_s": 1.0}, True),
])
def test_a_target_is_reached_or_missed_and_one_that_was_not_measured_is_missed(target, reached, missed):
    recipe = replace(RECIPE, clock=Clock(**target))
    assert bool(runs.missed(recipe, {"reached": reached})) == missed


def test_the_launcher_tells_a_missed_target_by_its_exit_status_and_the_ranks_end_well(tmp_path):
    """Through torchrun. The same command again starts nothing, and asks the finished run about the target of today."""
    (tmp_path / "text").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text("the cat sat on the mat\n" * 40)
    smallest = ["model.n_layer=1", "model.d_model=8", "model.n_head=1", "model.d_head=4", "model.d_inner=8",
                "data.dataset=text", "data.dir=text", "data.vocab=byte", "data.n_token=256", "stop.max_steps=4",
                "clock.log_interval=2", "eval_streams=2"]

    def launched(target):
        words = [f"--set=recipe.{x}" for x in [*smallest, f"clock.target_perplexity={target}"]]
        done = subprocess.run([sys.executable, CHECKOUT / "launch.py", "--config=tiny", "--backend=local", *words],
                              cwd=tmp_path, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr
    code, said = launched(1.5)
    assert code == 3, said
    assert "Finished at step 4" in said
    assert "MISSED: valid ppl" in said
    assert status(tmp_path / "runs" / "tiny")["state"] == "finished"
    code, said = launched(1.4)
    assert code == 3
    assert "Nothing to do" in said
    assert "It missed valid ppl" in said
    assert launched(100_000)[0] == 0
