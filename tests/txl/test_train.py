"""Every machine comes to the same tokens by itself, or all of them end with the reason."""
from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine.values import to_json
from engine.world import world
from tests.ranks import run_ranks
from tests.txl.small import RECIPE
from txl.config import Data
from txl.data import DataError, load
from txl.train import same_corpus

HERE = platform.node()


def texts(folder, train="the cat sat\n" * 3):
    folder.mkdir(parents=True)
    for split, text in (("train", train), ("valid", "the cat\n"), ("test", "a cat\n")):
        (folder / f"{split}.txt").write_text(text)


def _words_of_a_node(root):
    """The training tokens of a rank on a node of its own, or what it is told."""
    os.chdir(root / f"node-{os.environ['RANK']}")
    with world() as w:
        try:
            return same_corpus(w, Data("text", "data", vocab="byte")).splits["train"].tolist()
        except DataError as error:
            return str(error)


def test_machines_that_prepare_the_same_text_go_on_with_the_same_tokens(tmp_path):
    texts(tmp_path / "node-0" / "data")
    texts(tmp_path / "node-1" / "data")
    assert run_ranks(2, _words_of_a_node, tmp_path) == [list(b"the cat sat\n" * 3)] * 2


@pytest.mark.parametrize("other", ["the cat sat\n" * 4, "the dog sat\n" * 3])
def test_another_text_on_a_machine_ends_all_with_one_line_that_names_it(tmp_path, other):
    """Also one of the same length, in bytes, which are the same vocabulary everywhere."""
    texts(tmp_path / "node-0" / "data")
    texts(tmp_path / "node-1" / "data")
    texts(tmp_path / "node-2" / "data", other)
    first, second, third = run_ranks(3, _words_of_a_node, tmp_path)
    assert first == second == third
    assert "The machines have different tokens of data." in first
    assert f"rank(s) 0, 1 on {HERE}: 36 of train, 8 of valid, 6 of test (" in first
    assert f"rank(s) 2 on {HERE}: {len(other)} of train, 8 of valid" in first
    assert "\n" not in first


def test_a_text_that_one_machine_lacks_ends_all_with_its_name(tmp_path):
    texts(tmp_path / "node-0" / "data")
    (tmp_path / "node-1").mkdir()
    first, second = run_ranks(2, _words_of_a_node, tmp_path)
    assert first == second
    assert first.startswith(f"rank(s) 1 on {HERE}: data lacks train.txt, valid.txt, test.txt")


def test_a_text_that_all_lack_is_said_once(tmp_path):
    for node in (0, 1):
        (tmp_path / f"node-{node}").mkdir()
    first, second = run_ranks(2, _words_of_a_node, tmp_path)
    assert first == second
    assert first.startswith("data lacks train.txt, valid.txt, test.txt")


def test_tokens_without_their_text_have_the_fingerprint_of_both(tmp_path):
    texts(tmp_path / "data")
    data = Data("text", str(tmp_path / "data"), vocab="byte")
    before = load(data).fingerprint
    (tmp_path / "data" / "train.txt").unlink()
    assert load(data).fingerprint == before


def test_a_rank_whose_work_is_written_ends_without_taking_the_interpreter_apart(tmp_path):
    """Threads of gloo's abort a process that does, now and then: here it always would."""
    texts(tmp_path / "data", "the cat sat\n" * 100)
    recipe = replace(RECIPE, data=Data("text", str(tmp_path / "data"), vocab="byte"),
                     stop=replace(RECIPE.stop, max_steps=3))
    (tmp_path / "recipe.json").write_text(json.dumps(to_json(recipe)))
    (tmp_path / "sitecustomize.py").write_text("import atexit, os; atexit.register(os.abort)\n")
    ended = subprocess.run([sys.executable, "-m", "txl.train", tmp_path / "recipe.json"], text=True,
                           capture_output=True, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"})
    assert ended.returncode == 0, ended.stderr
    assert "step 3/3" in ended.stdout
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"
