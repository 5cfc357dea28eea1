from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import infer, train
from benchmarks.races import RACES
from txl.config import Context, Model

SMALL = RACES["race_small"].recipe
RECIPE = replace(SMALL, model=Model(n_layer=2, d_model=16, n_head=2, d_head=8, d_inner=24),
                 test_context=Context(tgt_len=4, mem_len=10, clamp_len=6, same_length=True))


def test_inference_is_timed_segment_by_segment_once_the_memory_is_full(capsys):
    one_round = infer.ours(infer.How(RECIPE, batch=2, segments=5, clock="cpu", threads=1))
    assert [len(one_round()) for _ in range(3)] == [10 // 4 + 2, 5, 5]


def test_a_row_has_throughput_and_percentiles_of_every_batch(capsys):
    assert infer.main(["--config=race_small", "--set=recipe.model.n_layer=1", "--batch=1,3", "--rounds=2",
                       "--segments=2", "--threads=1", "--clock=cpu"]) == 0
    heading, one, three = (line.split(" | ") for line in capsys.readouterr().out.splitlines())
    assert len(heading) == len(one) == len(three)
    assert (one[3], three[3]) == ("1 x 64, mem_len 64", "3 x 64, mem_len 64")
    mean, *within = (float(x.replace(",", "")) for x in three[6].replace(";", "").replace(", ", " ").split())
    assert within == sorted(within)
    assert float(three[5].replace(",", "")) == pytest.approx(3 * 64 / (mean / 1000), rel=.01)


@pytest.mark.parametrize("main", [infer.main, train.main])
@pytest.mark.parametrize("flag", ["--rounds=0", "--threads=0", "--clock=sun", "--config=no_such"])
def test_what_cannot_be_measured_is_refused_in_a_line(main, flag, capsys):
    with pytest.raises(SystemExit) as ended:
        main([flag] if flag.startswith("--config") else ["--config=race_small", flag])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_processors_clock_is_refused_where_a_gpu_works(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        infer.main(["--config=race_small", "--clock=cpu"])
    assert "does not see what a GPU does" in capsys.readouterr().err
