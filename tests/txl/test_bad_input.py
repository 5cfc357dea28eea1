"""What is wrong with the input is one clear line, with what to do, before the first step: by the trainer's own door.

A download that is cut short is in test_datasets.py, a checkpoint in tests/engine/test_checkpoint.py; that ranks which
do not divide the batch train all the same, and to the same weights, is in tests/engine/test_loop.py.
"""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine.values import to_json
from tests.ranks import run_ranks
from tests.txl.small import RECIPE
from txl.config import Data, Recipe
from txl.data import prepare
from txl.train import main

TEXT = "the cat sat on the mat and the dog ran to the cat\n"


def written(folder: Path, recipe: Recipe) -> str:
    """The recipe's file in a run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(to_json(recipe)))
    return str(folder / "recipe.json")


def recipe_on(folder: Path) -> Recipe:
    """A recipe of one step on a text of its own in `folder`/data, of twelve words."""
    (folder / "data").mkdir(parents=True)
    for split in ("train", "valid", "test"):
        (folder / "data" / f"{split}.txt").write_text(TEXT * (6 if split == "train" else 1))
    return replace(RECIPE, data=Data("text", str(folder / "data")), model=replace(RECIPE.model, cutoffs=()),
                   stop=replace(RECIPE.stop, max_steps=1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run that ended well; its text is in data/."""
    folder = tmp_path_factory.mktemp("trained")
    assert main([written(folder, recipe_on(folder))]) == 0
    return folder


def with_weights_of(trained: Path, folder: Path, how: str) -> Recipe:
    """A run in `folder`, on a text of its own, that goes on where the trained one ended, or starts from its weights."""
    recipe = recipe_on(folder)
    if how == "init_from":
        return replace(recipe, init_from=str(trained))
    shutil.copytree(trained / "checkpoints", folder / "checkpoints")
    return replace(recipe, stop=replace(recipe.stop, max_steps=2))


def said(folder: Path, recipe: Recipe) -> str:
    """What the trainer ends with, in its status and on the screen, having made no step."""
    lines = len((folder / "metrics.jsonl").read_text().splitlines()) if (folder / "metrics.jsonl").exists() else 0
    assert main([written(folder, recipe)]) == 1
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed"
    assert "\n" not in status["message"]
    after = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    assert len(after) <= lines
    return status["message"]


@pytest.mark.parametrize(("spoilt", "message"), [
    (('"n_layer"', '"n_layers"'), "recipe.model: unknown key 'n_layers'. Did you mean 'n_layer'?"),
    (('"seed": 1111', '"seed": 1111, "sed": 1'), "recipe: unknown key 'sed'. Did you mean 'seed'?"),
    (('"n_layer": 2', '"n_layer": "two"'), "recipe.model.n_layer takes a whole number, not 'two'"),
    (("}", ""), "is not a recipe that can be read")])
def test_a_recipe_that_is_wrong_is_said_on_the_screen_and_nothing_is_made(tmp_path, capsys, spoilt, message):
    path = Path(written(tmp_path, RECIPE))
    path.write_text(path.read_text().replace(*spoilt))
    assert main([str(path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


def changed(name: str, content: str | bytes) -> Callable[[Path, Recipe], Recipe]:
    """Another content for a file of the text."""
    def change(folder: Path, recipe: Recipe) -> Recipe:
        (folder / "data" / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return recipe
    return change


def with_data(**options: object) -> Callable[[Path, Recipe], Recipe]:
    def change(folder: Path, recipe: Recipe) -> Recipe:
        return replace(recipe, data=replace(recipe.data, **options))
    return change


def tokens_truncated_without_a_text(folder: Path, recipe: Recipe) -> Recipe:
    os.truncate(prepare(recipe.data) / "train.bin", 9)
    (folder / "data" / "train.txt").unlink()
    return recipe


def tokens_damaged(folder: Path, recipe: Recipe) -> Recipe:
    path = prepare(recipe.data) / "valid.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    return recipe


def words_of_a_list(folder: Path, recipe: Recipe) -> Recipe:
    (folder / "words").write_text("<eos>\nthe\ncat\n")
    return replace(recipe, data=replace(recipe.data, word_list=str(folder / "words")))


@pytest.mark.parametrize(("spoil", "message"), [
    (changed("valid.txt", ""), "valid.txt is empty. Put the text there"),
    (changed("test.txt", "the zebra\n"), "The word 'zebra' of"),
    (changed("test.txt", b"the c\xe9t\n"), "test.txt is not UTF-8 at byte 5 (line 1). Convert it with iconv"),
    (changed("train.txt", TEXT), "A step of 4 sequences of 8 tokens is more than the text to train on, which has 14"),
    (words_of_a_list, "add <unk> to it as a line of its own"),
    (with_data(eval_sets=("mail=/nowhere/mail.txt",)), "The evaluation set mail cannot be read"),
    (with_data(n_token=30), "has 10 tokens, but data.n_token expects 30. If this is the text you mean: --set"),
    (with_data(dir="/nowhere"), "/nowhere lacks train.txt, valid.txt, test.txt"),
    (tokens_truncated_without_a_text, "lacks train.txt"),
    (tokens_damaged, "valid.bin is damaged: it has a token that is none of the 10 in the vocabulary. Delete")])
def test_a_text_that_cannot_be_trained_on_ends_the_run_before_a_step(tmp_path, spoil, message):
    recipe = recipe_on(tmp_path)
    assert message in said(tmp_path, spoil(tmp_path, recipe))


def test_tokens_that_were_truncated_are_made_anew_where_their_text_is_there(tmp_path):
    recipe = recipe_on(tmp_path)
    os.truncate(prepare(recipe.data) / "train.bin", 9)
    assert main([written(tmp_path, recipe)]) == 0


@pytest.mark.parametrize(("shape", "message"), [
    ({"d_inner": 25}, "(24, 16) there and (25, 16) here"), ({"n_layer": 3}, "is absent there and"),
    ({"n_layer": 1}, "and absent here")])
@pytest.mark.parametrize("how", ["resumed", "init_from"])
def test_weights_of_another_shape_are_refused(trained, tmp_path, shape, message, how):
    recipe = with_weights_of(trained, tmp_path / "run", how)
    error = said(tmp_path / "run", replace(recipe, model=replace(recipe.model, **shape)))
    assert "do not fit this model: " in error
    assert message in error
    assert "Use the recipe.model that they were trained as" in error


@pytest.mark.parametrize("how", ["resumed", "init_from"])
def test_weights_of_another_vocabulary_are_refused(trained, tmp_path, how):
    recipe = with_weights_of(trained, tmp_path / "run", how)
    for split in ("train", "valid", "test"):                      # as many words, in another order
        (tmp_path / "run" / "data" / f"{split}.txt").write_text(TEXT.replace("cat", "mat") * 6)
    assert "was trained on another vocabulary" in said(tmp_path / "run", recipe)


def test_weights_that_were_damaged_are_named_with_what_to_remove(trained, tmp_path):
    recipe = with_weights_of(trained, tmp_path / "run", "resumed")
    path = next((tmp_path / "run" / "checkpoints").glob("*/model.pt"))
    path.write_bytes(b"\0" * path.stat().st_size)
    assert f"{path} is damaged" in (error := said(tmp_path / "run", recipe))
    assert f"Remove {path.parent}" in error
    os.truncate(path, 100)
    start = replace(recipe_on(tmp_path / "new"), init_from=str(path.parent))
    assert f"{path.parent} is not a complete checkpoint" in said(tmp_path / "new", start)


def _ended(folder: Path) -> int:
    return main([str(folder / "recipe.json")])


def test_more_ranks_than_sequences_end_all_ranks_with_what_to_do(tmp_path):
    recipe = recipe_on(tmp_path)
    written(tmp_path, replace(recipe, batch=replace(recipe.batch, size=1)))
    assert run_ranks(2, _ended, tmp_path) == [1, 1]
    assert ("batch.size 1 leaves some of the 2 ranks without a sequence. Use at most 1 ranks or a larger batch"
            in json.loads((tmp_path / "status.json").read_text())["message"])
    assert not (tmp_path / "metrics.jsonl").exists()
