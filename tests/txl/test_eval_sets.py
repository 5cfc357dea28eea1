"""Further texts that a validation scores: by their names everywhere, and without a say in anything."""
from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.values import to_json
from tests.txl.small import RECIPE
from txl import evaluate
from txl.config import Data
from txl.train import main


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with two evaluation sets, in with/, and the same without, in without/."""
    folder = tmp_path_factory.mktemp("sets")
    for name, line, count in (("train", "the cat sat on the mat", 40), ("valid", "the cat sat", 9),
                              ("test", "the mat", 9), ("mats", "the mat the mat on", 7), ("cats", "cat cat cat", 5)):
        (folder / f"{name}.txt").write_text(f"{line}\n" * count)
    sets = (f"mats={folder / 'mats.txt'}", f"cats={folder / 'cats.txt'}")
    for name, eval_sets in (("with", sets), ("without", ())):
        recipe = replace(RECIPE, data=Data("text", str(folder), eval_sets=eval_sets),
                         model=replace(RECIPE.model, cutoffs=()), stop=replace(RECIPE.stop, max_steps=6),
                         clock=replace(RECIPE.clock, eval_interval=3))
        (folder / name).mkdir()
        (folder / name / "recipe.json").write_text(json.dumps(to_json(recipe)))
        assert main([str(folder / name / "recipe.json")]) == 0
    return folder


def numbers(run: Path) -> list[tuple[str, int, float]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(x["kind"], x["step"], x["loss"]) for x in records if x["kind"] != "train"]


def test_every_validation_reports_each_by_its_name(run):
    kinds = [(kind, step) for kind, step, _ in numbers(run / "with")]
    assert kinds == [("valid", 3), ("mats", 3), ("cats", 3), ("valid", 6), ("mats", 6), ("cats", 6), ("test", 6)]
    log = (run / "with" / "logs" / "rank-0.log").read_text()
    assert re.findall(r"^(\w+) at step 6 \|.* (\d+) tokens", log, re.M) == [
        ("valid", "36"), ("mats", "42"), ("cats", "20"), ("test", "27")]
    tags = EventAccumulator(str(run / "with" / "tensorboard"))
    tags.Reload()
    logged = {(kind, step): loss for kind, step, loss in numbers(run / "with")}
    for name in ("mats", "cats"):
        steps = [logged[name, step] for step in (3, 6)]
        assert [x.value for x in tags.Scalars(f"learning/{name}_loss")] == pytest.approx(steps, rel=1e-6)


def test_they_change_nothing_else_and_choose_no_checkpoint(run):
    assert [x for x in numbers(run / "with") if x[0] in ("valid", "test")] == numbers(run / "without")
    losses = [{path.parent.name: json.loads(path.read_text())["valid_loss"]
               for path in (run / name).glob("checkpoints/*/meta.json")} for name in ("with", "without")]
    assert losses[0] == losses[1] != {}


def test_they_can_be_evaluated_by_name_and_all_includes_them(run, capsys):
    def said(split: str) -> str:
        assert evaluate.main([f"--run={run / 'with'}", f"--split={split}"]) == 0
        return capsys.readouterr().out
    mats = said("mats")
    assert mats.startswith(f"mats, {run / 'mats.txt'}, 42 tokens of a vocabulary of 6 words, the ends of lines among "
                           f"them\n")
    rows = re.compile(r"^(?:a|this) .*model.*", re.M)
    assert rows.findall(said("all")) == [row for split in ("valid", "test", "mats", "cats")
                                         for row in rows.findall(said(split))]
    assert evaluate.main([f"--run={run / 'with'}", "--split=mat"]) == 1
    assert "--split=mat is none of the run's texts: train, valid, test, mats, cats, all. Did you mean 'mats'?" in \
        capsys.readouterr().err


def test_a_run_is_evaluated_without_those_that_are_not_asked_for(run, capsys):
    (run / "mats.txt").rename(run / "moved")
    try:
        assert evaluate.main([f"--run={run / 'with'}", "--split=test"]) == 0
        assert evaluate.main([f"--run={run / 'with'}", "--split=mats"]) == 1
        assert "The evaluation set mats cannot be read" in capsys.readouterr().err
    finally:
        (run / "moved").rename(run / "mats.txt")
