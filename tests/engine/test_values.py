from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

from configs import CONFIGS, one_machine, tiny
from engine.config import Batch, LinearLr
from engine.values import BadValue, differences, from_json, override, parse, to_json


@dataclass(frozen=True)
class Inner:
    number: int = 1
    rate: float | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner
    other: Inner | None = None
    names: tuple[str, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    mode: Literal["slow", "fast"] = "slow"
    text: str | None = None
    on: bool = False


@pytest.mark.parametrize("name", CONFIGS)
def test_every_recipe_survives_json(name):
    recipe = CONFIGS[name].recipe
    assert from_json(type(recipe), json.loads(json.dumps(to_json(recipe)))) == recipe


@pytest.mark.parametrize("seed", range(50))
def test_any_value_survives_json_and_its_overrides_reach_it(seed):
    draw = random.Random(seed)
    start, goal = _any_outer(draw), _any_outer(draw)
    assert from_json(Outer, json.loads(json.dumps(to_json(goal)))) == goal
    assert list(differences(goal, goal)) == []
    if start.other is None or goal.other is None:
        goal = replace(goal, other=start.other)
    assert override(start, *_assignments(goal)) == goal
    assert bool(list(differences(start, goal))) == (start != goal)


def test_an_override_takes_the_type_of_its_field():
    config = override(one_machine, "recipe.stop.max_tokens=1e9", "recipe.optim.lr=1e-2", "recipe.model.cutoffs=10,20",
                      "recipe.optim.clip=none", "machines.spot=false", "recipe.optim.betas=.9,.98")
    recipe = config.recipe
    assert (recipe.stop.max_tokens, recipe.optim.lr, recipe.model.cutoffs, recipe.optim.clip, config.machines.spot,
            recipe.optim.betas) == (1_000_000_000, 0.01, (10, 20), None, False, (0.9, 0.98))
    assert type(recipe.stop.max_tokens) is int


def test_overrides_take_effect_together():
    config = override(one_machine, "recipe.batch.local_size=none", "recipe.batch.size=64")
    assert config.recipe.batch == Batch(size=64)
    with pytest.raises(BadValue, match="give exactly one of"):
        override(one_machine, "recipe.batch.size=64")


def test_one_field_of_a_learning_rate_rule_can_be_overridden():
    assert override(one_machine, "recipe.optim.lr.base_batch=64").recipe.optim.lr == LinearLr(.000125 * 5 / 3, 64)


@pytest.mark.parametrize(("assignment", "message"), [
    ("recipe.optim.lr", "is not an assignment"),
    ("=3", "is not an assignment"),
    ("recipe.optimizer.lr=1", "recipe.optimizer: Recipe has no field 'optimizer'. Did you mean 'optim'?"),
    ("recip.optim.lr=1", "recip: Config has no field 'recip'. Did you mean 'recipe'?"),
    ("recipe.optim.lr=fast", "recipe.optim.lr takes a number or LinearLr, not 'fast'"),
    ("recipe.optim.lr=nan", "recipe.optim.lr takes a number or LinearLr, not 'nan'"),
    ("recipe.optim.lr=-1", "recipe.optim.lr=-1: lr, weight_decay and eps must not be negative"),
    ("recipe.optim.name=lam", "must be one of lamb, adamw, adam, sgd, adagrad, muon, not 'lam'. Did you mean 'lamb'?"),
    ("recipe.optim=adam", "recipe.optim is a group of fields; set one of them: recipe.optim.name"),
    ("recipe.seed.x=1", "recipe.seed.x: seed is 1111 and has no fields of its own"),
    ("recipe.stop.max_steps=1.5", "recipe.stop.max_steps takes a whole number or none, not '1.5'"),
    ("recipe.model.cutoffs=1,x", r"recipe.model.cutoffs[1] takes a whole number, not 'x'"),
    ("recipe.optim.betas=.9", "recipe.optim.betas takes 2 values, not 1"),
    ("recipe.context=none", "recipe.context takes Context, not 'none'"),
    ("", "is not an assignment"),
])
def test_an_override_that_does_not_fit_names_the_path_and_what_fits(assignment, message):
    with pytest.raises(BadValue) as error:
        override(one_machine, assignment)
    assert message in str(error.value)


def test_the_same_field_cannot_be_overridden_twice():
    for pair in (("recipe.seed=1", "recipe.seed=2"), ("recipe.optim.lr=1", "recipe.optim.lr.base_lr=2")):
        with pytest.raises(BadValue, match="set the same thing"):
            override(one_machine, *pair)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda data: data.update(sed=1), "recipe: unknown key 'sed'. Did you mean 'seed'?"),
    (lambda data: data["optim"].update(lr="0.1"), "recipe.optim.lr takes a number or LinearLr, not '0.1'"),
    (lambda data: data["model"].update(n_layer=2.0), "recipe.model.n_layer takes a whole number, not 2.0"),
    (lambda data: data["model"].update(n_layer=True), "recipe.model.n_layer takes a whole number, not True"),
    (lambda data: data["context"].pop("tgt_len"), "recipe.context: missing tgt_len"),
    (lambda data: data["batch"].update(size=0), "recipe.batch: batch sizes must be at least 1"),
    (lambda data: data.update(data=None), "recipe.data takes Data, not None"),
])
def test_json_that_does_not_fit_names_the_path_and_what_fits(spoil, message):
    data = to_json(tiny.recipe)
    spoil(data)
    with pytest.raises(BadValue) as error:
        from_json(type(tiny.recipe), data)
    assert message in str(error.value)


def test_differences_are_listed_leaf_by_leaf():
    new = override(tiny, "recipe.optim.lr=0.02", "recipe.clock.log_interval=5").recipe
    assert list(differences(tiny.recipe, new)) == ["optim.lr: 0.004 -> 0.02", "clock.log_interval: 10 -> 5"]


def test_a_typed_word_becomes_what_its_type_says():
    assert parse(int, "1.8e9", "x") == 1_800_000_000
    assert parse(int, "12345678901234567", "x") == 12345678901234567
    assert parse(bool, "No", "x") is False
    assert parse(int | None, "none", "x") is None
    assert parse(tuple[str, ...], "a, b", "x") == ("a", "b")


def _any_outer(draw: random.Random) -> Outer:
    def inner() -> Inner:
        return Inner(draw.randrange(-10**18, 10**18), draw.choice([None, draw.uniform(-1e9, 1e9), 1e-300]))
    return Outer(inner(), draw.choice([None, inner()]), tuple(draw.choices(["a", "b-c", "d.e"], k=draw.randrange(4))),
                 (draw.random(), draw.random()), draw.choice(["slow", "fast"]), draw.choice([None, "x", "1e3"]),
                 draw.random() < .5)


def _assignments(value: Any, path: str = "") -> list[str]:
    """Every leaf of `value` as an override."""
    if dataclasses.is_dataclass(value):
        return [a for f in dataclasses.fields(value) for a in _assignments(getattr(value, f.name), f"{path}.{f.name}")]
    text = ",".join(map(repr if path.endswith("pair") else str, value)) if isinstance(value, tuple) else str(value)
    return [f"{path[1:]}={text}"]
