from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import peers, train
from benchmarks.machine import bytes_now, forget_peak, now, peak_bytes
from benchmarks.race import race
from benchmarks.races import RACES
from configs import CONFIGS
from engine.config import Batch
from engine.task import Position, Step
from engine.values import BadValue
from engine.watch import Timed
from txl.config import Context, Data, Model, Recipe, n_params

RECIPE: Recipe = replace(
    RACES["race_small"].recipe, model=Model(n_layer=2, d_model=16, n_head=2, d_head=8, d_inner=24, cutoffs=(20, 50)),
    data=Data("text", "random words", n_token=200), context=Context(tgt_len=8, mem_len=8), batch=Batch(size=4))
HOW = train.How(steps=3, clock="cpu", threads=1)
CPU = torch.device("cpu")

# What a checkout of the original has, and nothing of its: words that are all alike, and cost what one weight says.
CHECKOUT = """
import numpy as np, torch
assert torch.version.cuda.split('.')[1] is not None

class MemTransformerLM(torch.nn.Module):
    def __init__(self, n_token, n_layer, n_head, d_model, d_head, d_inner, dropout, dropatt, **rest):
        super().__init__()
        assert torch.ones(1).byte().dtype == torch.bool
        assert rest["mem_len"] == 8 and rest["cutoffs"] == [20, 50] and rest["tie_projs"] == [False, True, True]
        self.layer_norm, self.out = torch.nn.LayerNorm(3), torch.nn.Linear(3, n_token)

    def forward(self, data, target, *mems):
        assert data.shape == target.shape == (8, 4) and data.is_contiguous()
        assert len(mems) == 0 or (mems[0][-1] == data[0] - data[0]).all()
        hidden = self.layer_norm(torch.ones(3) * torch.arange(3.0))
        scores = self.out(hidden).log_softmax(0)
        return [-scores[target], torch.zeros(2, 4)]
"""


def test_ours_against_ours_is_the_same_training_in_two_processes():
    rounds = race({name: partial(train.ours, RECIPE, HOW) for name in ("one", "other")}, rounds=2)
    assert [x.losses for x in rounds["one"]] == [x.losses for x in rounds["other"]]
    for x in rounds["one"]:
        assert x.tokens == 3 * 4 * 8
        assert x.params == n_params(RECIPE.model, 200)
        assert [part for part, seconds in x.seconds.items() if seconds > 0] == ["load", "forward", "backward",
                                                                                "optimizer"]
        assert x.rate == x.tokens / sum(x.seconds.values())


def test_a_profile_is_a_trace_of_one_rounds_operations(tmp_path, capsys):
    path = tmp_path / "trace"
    assert train.main(["--config=tiny", "--rounds=1", "--steps=2", "--threads=1", f"--profile={path}"]) == 0
    names = [event["name"] for event in json.loads(path.read_text())["traceEvents"]]
    layers = CONFIGS["tiny"].recipe.model.n_layer
    assert names.count("_AttentionBackward") == 2 * layers        # of two steps
    assert "Self CPU" in capsys.readouterr().err


def test_communication_is_what_backward_takes_more_than_without_it():
    def take(step: Step, timed: Timed, seconds: float) -> torch.Tensor:
        with timed.part("backward"):
            time.sleep(seconds)
        return torch.ones(())
    steps = itertools.repeat(Step(Position(), Position(), (), tokens=7, fresh=False))
    one_round = train._rounds(steps, partial(take, seconds=.3), replace(HOW, clock="wall"), CPU, 0, 0,
                              silent=partial(take, seconds=.1))
    x = one_round()
    assert x.seconds["backward"] == pytest.approx(3 * .1, abs=.1)
    assert x.seconds["communication"] == pytest.approx(3 * .2, abs=.1)
    assert x.rate == pytest.approx(3 * 7 / .9, rel=.1)      # the silent steps are no training


def test_a_checkout_is_trained_on_our_tokens_in_steps_like_ours(tmp_path, capsys):
    (tmp_path / "pytorch").mkdir()
    (tmp_path / "pytorch" / "mem_transformer.py").write_text(CHECKOUT)
    begin = [f"--set=recipe.{x}" for x in (
        "model.n_layer=2", "model.d_model=16", "model.n_head=2", "model.d_head=8", "model.d_inner=24",
        "model.cutoffs=(20,50)", "data.n_token=200", "context.tgt_len=8", "context.mem_len=8", "batch.size=4",
        "optim.lr=0.1")]
    assert train.main(["--config=race_small", *begin, f"--against={tmp_path}", "--rounds=3", "--steps=4", "--threads=1",
                       "--clock=cpu"]) == 0
    heading, own, its = (line.split(" | ") for line in capsys.readouterr().out.splitlines())
    assert len(heading) == len(own) == len(its)
    assert (own[3], its[3]) == ("ours", "original")
    assert own[5] == ""
    assert float(its[5].split()[0]) > 0                     # the ratio, in the row of whom ours is compared with
    first, last = map(float, its[8].split(", "))
    assert first == pytest.approx(math.log(200), abs=.3)
    assert last < first - .3                                # ours are Zipf's words, of which it can learn how often


def test_a_folder_without_a_peer_and_two_of_the_same_are_refused(tmp_path):
    with pytest.raises(BadValue, match="no mem_transformer"):
        peers.find(str(tmp_path))
    (tmp_path / "mem_transformer.py").touch()
    assert peers.find(str(tmp_path)).name == "original"
    with pytest.raises(BadValue, match="same project"):
        peers.find_all([str(tmp_path), str(tmp_path)])
    (tmp_path / "globals.py").touch()
    assert peers.find(str(tmp_path)).name == "cybertronai"
    (tmp_path / "lamb.py").touch()
    assert peers.find(str(tmp_path)).name == "NVIDIA"


def test_what_a_peer_has_not_is_refused(tmp_path):
    with pytest.raises(BadValue, match="untie_r"):
        peers.Peer("original", tmp_path).build(replace(RECIPE.model, untie_r=True), 200, RECIPE.context)


def test_a_factor_before_the_tensors_is_understood_as_torch_once_did():
    x, y, z = (torch.randn(5) for _ in range(3))
    add_, addcmul_ = peers._number_first(torch.Tensor.add_, 1), peers._number_first(torch.Tensor.addcmul_, 2)
    torch.testing.assert_close(add_(x.clone(), .3, y), x + .3 * y)
    torch.testing.assert_close(add_(x.clone(), -torch.tensor(.3) * 2, y), x - .6 * y)
    torch.testing.assert_close(add_(x.clone(), y), x + y)
    torch.testing.assert_close(add_(x.clone(), y, alpha=.3), x + .3 * y)
    torch.testing.assert_close(addcmul_(x.clone(), .3, y, z), x + .3 * y * z)
    torch.testing.assert_close(addcmul_(x.clone(), y, z, value=.3), x + .3 * y * z)


def test_the_peak_of_memory_is_of_what_came_after_it_was_forgotten():
    """By mappings of its own: malloc may have kept what other tests freed."""
    mib = 1 << 20

    def hold(size):
        with mmap.mmap(-1, size) as held:
            held.write(b"1" * size)
    hold(200 * mib)
    begin = bytes_now(CPU)
    hold(80 * mib)
    assert 75 * mib < peak_bytes(CPU) - begin < 190 * mib         # and what is written there
    forget_peak(CPU)
    assert peak_bytes(CPU) - begin < 40 * mib


def test_the_processors_clock_does_not_count_waiting():
    begin = now("cpu", CPU), now("wall", CPU)
    time.sleep(.3)
    assert now("cpu", CPU) - begin[0] < .1
    assert now("wall", CPU) - begin[1] >= .3


CHECKOUTS = [x for x in os.environ.get("TXL_PEERS", "").split(os.pathsep) if x]


@pytest.mark.skipif(not CHECKOUTS, reason="TXL_PEERS names no checkouts of other projects (separated by colons)")
@pytest.mark.slow
def test_the_peers_have_our_parameters_and_learn_as_ours_does():
    found = peers.find_all(CHECKOUTS)
    recipe = replace(RECIPE, model=replace(RECIPE.model, dropout=0.0), optim=replace(RECIPE.optim, lr=.01))
    how = replace(HOW, steps=20)
    rounds = race({"ours": partial(train.ours, recipe, how)} | {
        peer.name: partial(train.theirs, recipe, how, peer, True) for peer in found}, rounds=2)
    for name, of in rounds.items():
        assert of[0].params == n_params(recipe.model, 200), name
        # what knows nothing pays for 20 words and 2 clusters, and of Zipf's words 15% and 23% are in these
        assert of[0].losses[0] == pytest.approx(math.log(22) + .15 * math.log(30) + .23 * math.log(150), abs=.3), name
        assert of[-1].losses[1] == pytest.approx(rounds["ours"][-1].losses[1], abs=.15), name


@pytest.mark.skipif(not CHECKOUTS, reason="TXL_PEERS names no checkouts of other projects (separated by colons)")
@pytest.mark.slow
@pytest.mark.parametrize("path", CHECKOUTS, ids=lambda path: Path(path).name)
def test_a_peers_own_optimizer_and_its_bf16_run(path):
    peer = peers.find(path)
    rounds = race({peer.name: partial(train.theirs, replace(RECIPE, precision="bf16"), HOW, peer, False)}, rounds=1)
    assert all(math.isfinite(loss) for x in rounds[peer.name] for loss in x.losses)
