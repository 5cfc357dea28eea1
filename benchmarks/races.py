"""Models that are raced against other projects' code, and trained by nobody: configs by name, beside configs.py's."""
from __future__ import annotations

from dataclasses import replace

from cluster.spec import Config, Machines
from configs import LOCAL, NVIDIA_CUTOFFS, PAPER_WT103_BASE
from engine.config import Batch, Clock, Optim
from txl.config import Context, Data, Model

ABOUT = "A race, see python -m benchmarks.train --help"
REAL = replace(                                   # the original's model for wikitext-103, at its vocabulary
    PAPER_WT103_BASE, model=replace(PAPER_WT103_BASE.model, cutoffs=NVIDIA_CUTOFFS), batch=Batch(size=2))
SMALL = replace(
    REAL,
    model=Model(n_layer=4, d_model=128, n_head=4, d_head=32, d_inner=512),
    data=Data("text", "random words", n_token=10_000),
    context=Context(tgt_len=64, mem_len=64), eval_context=Context(tgt_len=64, mem_len=64), test_context=None,
    batch=Batch(size=16), optim=Optim("adam", lr=.00025), clock=Clock())
SMALL_ADAPTIVE = replace(SMALL, model=replace(SMALL.model, cutoffs=(1000, 4000)))

RACES = {name: Config(recipe, Machines(LOCAL), "Races", ABOUT) for name, recipe in (
    ("race_real", REAL), ("race_small", SMALL), ("race_small_adaptive", SMALL_ADAPTIVE))}
