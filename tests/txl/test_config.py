"""What a recipe says of itself before anything is loaded."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from configs import CONFIGS, WT103, WT103_BPE, one_machine, tiny
from engine import config as engine
from engine.cli import parse
from engine.values import BadValue, override
from tests.txl.small import RECIPE
from txl import data
from txl.config import Context, Data, Model, flops_per_token


def test_a_recipe_of_no_model_in_particular_reads_nothing_and_costs_nobody_knows_what():
    bare = engine.Recipe(batch=RECIPE.batch, optim=RECIPE.optim, schedule=RECIPE.schedule, stop=RECIPE.stop)
    assert (bare.inputs, bare.prepare, bare.flops_per_token) == ((), None, None)


def test_inputs_are_the_text_the_byte_pairs_and_the_run_to_start_from():
    assert one_machine.recipe.inputs == ("data/wikitext-103",)
    assert replace(RECIPE, data=WT103_BPE, init_from="runs/a").inputs == ("data/wikitext-103", "data/gpt2", "runs/a")
    unread = replace(WT103_BPE, vocab="word")
    assert replace(RECIPE, data=unread).inputs == ("data/wikitext-103",)


def test_evaluation_sets_are_inputs_and_can_be_typed():
    recipe = override(RECIPE, "data.eval_sets=mail=data/mail.txt,code=data/a=b.py")
    assert recipe.data.eval_paths == {"mail": "data/mail.txt", "code": "data/a=b.py"}
    assert recipe.inputs == ("nowhere", "data/mail.txt", "data/a=b.py")
    assert made(replace(recipe, data=replace(WT103, eval_sets=("a=b",)))) == WT103      # nothing makes those
    for wrong, said in (("mail", "NAME=PATH"), ("a=", "NAME=PATH"), ("test=x", "is not train"), ("1=x", "NAME=PATH"),
                        ("a=b,a=c", "different names: a, a")):
        with pytest.raises(BadValue, match=said):
            override(RECIPE, f"data.eval_sets={wrong}")


def test_byte_pairs_have_no_sentences_to_shuffle():
    with pytest.raises(ValueError, match="shuffle_sentences needs a token that ends a line"):
        replace(RECIPE, data=WT103_BPE, shuffle_sentences=True)


def made(recipe) -> Data:
    """What the program that a recipe names for its inputs would make."""
    module, name, *argv = recipe.prepare
    assert (module, name) == ("-m", "txl.data")
    flags = parse(data.Flags, argv, prog="", about="")
    return data._usual(flags, Path(flags.dir))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_prepares_the_inputs_of_a_config_makes_exactly_its_tokens(name):
    recipe = CONFIGS[name].recipe
    if recipe.data.dataset in ("git", "wiki"):
        assert recipe.prepare is None             # a folder of one's own: nobody else has it
    else:
        assert made(recipe) == recipe.data


@pytest.mark.parametrize("wanted", [
    replace(WT103, n_token=None, lower_case=True, min_freq=3, max_size=1000), replace(WT103, dir="/mnt/a b"),
    replace(WT103, vocab="bpe", n_token=999), replace(WT103_BPE, bpe_files="elsewhere"),
    replace(WT103, dataset="enwik8", n_token=None), replace(WT103, vocab="char", n_token=None, min_freq=2)])
def test_what_prepares_the_inputs_knows_every_option(wanted):
    assert made(replace(RECIPE, data=wanted)) == wanted


def test_nothing_prepares_a_text_of_ones_own():
    assert RECIPE.data.dataset == "text"
    assert RECIPE.prepare is None


def test_the_cost_is_known_with_the_size_of_the_vocabulary():
    """One layer of d_model 2 and a softmax over 7 tokens: multiply-adds by hand, times 2, times 3 passes."""
    recipe = replace(RECIPE, model=Model(1, 2, 1, 2, 4), context=Context(1, 0), data=Data("text", "x", n_token=7))
    assert recipe.flops_per_token == 6 * (4 * 2 * 2 + 2 * 2 * 4 + 3 * 2 * 0.5 + 2 * 7)
    assert replace(recipe, data=Data("text", "x")).flops_per_token is None
    assert tiny.recipe.flops_per_token == flops_per_token(tiny.recipe.model, tiny.recipe.context, 1024)
