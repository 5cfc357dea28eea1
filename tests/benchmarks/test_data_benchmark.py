from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks import data
from benchmarks.races import RACES
from engine.config import Batch
from txl.data import load

# A checkout of nobody's: its vocabulary is the shortest that counts and encodes as the peers do.
VOCABULARY = """
from collections import Counter
import torch

class Vocab:
    def __init__(self, special, lower_case):
        self.symbols, self.counter = list(special), Counter()

    def count_file(self, path):
        for line in open(path, encoding="utf-8"):
            self.counter.update(line.split())

    def build_vocab(self):
        print("building")
        self.symbols += [word for word, _ in self.counter.most_common()]
        self.ids = {word: i for i, word in enumerate(self.symbols)}

    def encode_file(self, path, ordered):
        return torch.tensor([self.ids[w] for line in open(path, encoding="utf-8") for w in [*line.split(), "<eos>"]])
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "vocabulary.py").write_text(VOCABULARY)
    (tmp_path / "mem_transformer.py").write_text("")
    return tmp_path


def test_the_text_that_is_made_is_always_the_same_and_its_words_are_as_frequent_as_natural_ones(tmp_path):
    for name in "ab":
        data.write_text(tmp_path / name, 4_000_000)
    text = (tmp_path / "a").read_bytes()
    assert text == (tmp_path / "b").read_bytes()
    assert 4_000_000 <= len(text) < 5_000_000
    counts = sorted(Counter(text.decode().split()).values(), reverse=True)
    tokens = sum(counts)
    assert .06 < sum(counts[20_000:]) / tokens < .08              # wikitext-103: 7 %
    assert 5 < len(text) / tokens < 6                             # 5.2 bytes
    assert 7.5 < counts[0] / counts[19] < 8.5                     # (20 + 1.7) / (1 + 1.7) = 8.04


def test_a_row_tells_speed_memory_and_whether_a_peers_ids_are_the_same(checkout, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "TABLE", tmp_path / "table.md")
    assert data.main(["--mb=1", "--config=race_small", "--rounds=1", f"--against={checkout}", "--record"]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    cells = dict(zip(heading.split(" | "), row.split(" | ")))
    assert cells["command"] == "`--mb=1 --config=race_small --rounds=1 --against=original`"
    assert float(cells["MB/s"]) > 0
    assert 20 < float(cells["peak MB"].split(",")[0]) < 200       # without torch
    assert float(cells["first batch s"]) < 2
    whole, parts = cells["first step s"].split(": ")
    seconds = [float(part.split()[1]) for part in parts.split(" + ")]
    assert sum(seconds) == pytest.approx(float(whole.split()[0]), abs=0.03)        # they are rounded
    assert min(seconds) >= 0 < seconds[0]
    assert cells["against"].endswith("its ids are the same")
    assert (tmp_path / "table.md").read_text() == row + "\n"


def test_a_start_is_all_that_comes_before_the_first_step_and_nothing_of_it(tmp_path):
    recipe = RACES["race_small_adaptive"].recipe
    begun, = data.time_starts(tmp_path, recipe, rounds=1)
    assert set(begun) == {"imports", "data", "build", "optimizer", "rest"}
    run = tmp_path / "run"
    assert json.loads((run / "status.json").read_text()) == {"state": "training", "step": 0, "message": ""}
    assert f"{recipe.params:,} parameters" in (run / "logs" / "rank-0.log").read_text()
    assert any((run / "tensorboard").iterdir())
    assert (run / "metrics.jsonl").read_text() == ""
    assert not (run / "checkpoints").exists()


def test_of_what_a_start_imports_nothing_was_there_before():
    program = ("import sys, benchmarks.start; "
               "print([x for x in sys.modules if x.partition('.')[0] in ('engine', 'txl', 'configs', 'tensorboard')])")
    assert subprocess.check_output([sys.executable, "-c", program], cwd=data.HERE.parent, text=True) == "[]\n"


def test_the_text_of_a_start_has_a_configs_own_words_and_a_step_of_them(tmp_path):
    recipe = RACES["race_small"].recipe
    longer = replace(recipe, batch=Batch(size=1000))
    for folder, of in (("short", recipe), ("long", longer)):
        (tmp_path / folder).mkdir()
        corpus = load(data.text_for(of, tmp_path / folder))
        assert corpus.n_token == recipe.data.n_token == 10_000
        assert len(corpus.splits["train"]) >= of.batch.total(1) * of.context.tgt_len


def test_a_config_that_there_is_not_is_one_line(capsys):
    with pytest.raises(SystemExit):
        data.main(["--config=nvidia_bass"])
    assert "There is no config 'nvidia_bass'." in capsys.readouterr().err


def test_what_is_no_checkout_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        data.main([f"--against={tmp_path}"])
    assert "there is no mem_transformer.py" in capsys.readouterr().err
