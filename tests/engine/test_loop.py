"""The training loop: exact resume, ranks that add up, an end that is an end, and no training on garbage."""
from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

from engine import checkpoint
from engine.config import Batch, Clock, Optim, Schedule, Stop
from engine.loop import Diverged, train
from engine.run import Run
from engine.values import BadValue
from engine.world import world
from tests.ranks import run_ranks
from tests.txl.small import RECIPE, corpus, train_here
from txl.config import Context
from txl.task import TransformerXLTask

EXACT = {
    "fp32": RECIPE,
    "bf16": replace(RECIPE, precision="bf16"),
    "shuffled": replace(RECIPE, roll=True, varlen=True),
    "accumulation": replace(RECIPE, batch=Batch(size=4, micro_size=1)),
    "uneven_accumulation": replace(RECIPE, batch=Batch(size=5, micro_size=2)),
    "adamw_plateau": replace(RECIPE, optim=Optim("adamw", lr=0.01), schedule=Schedule("plateau")),
    "ext_len": replace(RECIPE, context=Context(tgt_len=6, mem_len=5, ext_len=3)),
    "bf16_div_val": replace(RECIPE, precision="bf16", model=replace(RECIPE.model, div_val=2, pre_lnorm=True)),
}


def same(a, b, where=""):
    """Bit for bit, through dictionaries and lists."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(one, other, ranks=1):
    """Same weights, optimizer, memories, generators and logged losses at the end."""
    a, b = (checkpoint.complete(folder / "checkpoints")[-1] for folder in (one, other))
    assert (a.step, a.valid_loss) == (b.step, b.valid_loss)
    best_a, best_b = (checkpoint.find(folder) for folder in (one, other))
    assert (best_a.step, best_a.valid_loss) == (best_b.step, best_b.valid_loss)
    first, second = a.shared(), b.shared()
    for state in (first, second):
        for name in ("seconds", "timed_seconds", "timed_tokens"):         # of each start
            state["progress"].pop(name)
    same(first, second)
    for rank in range(ranks):
        same(a.of_rank(rank), b.of_rank(rank))
    same(losses(one), losses(other))


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["kind"], r["step"], r["tokens"], r["loss"]) for r in records]


@pytest.mark.parametrize("name", EXACT)
def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(tmp_path, name):
    recipe = EXACT[name]
    train_here(tmp_path / "straight", recipe)
    for stop_after in (1, 5, 4, 2, 5):                            # at 1, 6, 10 (evaluated), 12 (a new epoch), 17
        assert not train_here(tmp_path / "stopped", recipe, stop_after=stop_after).finished
    train_here(tmp_path / "stopped", recipe)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("name", ["fp32", "bf16", "accumulation"])
def test_two_ranks_stopped_and_resumed_equal_never_stopped_bit_for_bit(tmp_path, name):
    recipe = EXACT[name]
    run_ranks(2, train_here, tmp_path / "straight", recipe)
    run_ranks(2, train_here, tmp_path / "stopped", recipe, None, 7)
    run_ranks(2, train_here, tmp_path / "stopped", recipe, None, 6)
    run_ranks(2, train_here, tmp_path / "stopped", recipe)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped", ranks=2)


def test_resuming_from_any_checkpoint_after_a_kill_gives_the_same_run(tmp_path):
    """A killed run has logged more than its last checkpoint knows; that part is done again, not logged twice."""
    train_here(tmp_path / "straight")
    for step in (3, 6, 10, 15, 18):
        shutil.copytree(tmp_path / "straight", tmp_path / "killed")
        for later in checkpoint.complete(tmp_path / "killed" / "checkpoints"):
            if later.step > step:
                shutil.rmtree(later.path)
        with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
            file.write('{"kind": "train", "step": 2')             # cut off in the middle of a line
        train_here(tmp_path / "killed")
        assert_same_run(tmp_path / "straight", tmp_path / "killed")
        shutil.rmtree(tmp_path / "killed")


def final_weights(folder):
    return checkpoint.complete(folder / "checkpoints")[-1].shared()["model"]


# No dropout, which differs by rank; no clipping, which would hide a gradient of the wrong size; no Adam, likewise.
PLAIN = replace(RECIPE, model=replace(RECIPE.model, dropout=0.0, dropatt=0.0), optim=Optim("sgd", lr=0.2, clip=None))


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_equal_one_rank_with_the_whole_batch(tmp_path, ranks):
    """Also where the ranks' shares differ: 5 sequences on 2 ranks, 5 on 3."""
    recipe = replace(PLAIN, batch=Batch(size=5))
    train_here(tmp_path / "one", recipe)
    run_ranks(ranks, train_here, tmp_path / "many", recipe)
    for name, weight in final_weights(tmp_path / "one").items():
        assert_close(final_weights(tmp_path / "many")[name], weight, rtol=1e-3, atol=1e-5)
    for one, many in zip(losses(tmp_path / "one"), losses(tmp_path / "many")):
        assert one[:3] == many[:3]
        assert one[3] == pytest.approx(many[3], rel=1e-4)


def test_local_batches_of_two_ranks_equal_twice_the_batch_on_one(tmp_path):
    train_here(tmp_path / "one", replace(PLAIN, batch=Batch(local_size=6)))
    run_ranks(2, train_here, tmp_path / "two", replace(PLAIN, batch=Batch(local_size=3)))
    for name, weight in final_weights(tmp_path / "one").items():
        assert_close(final_weights(tmp_path / "two")[name], weight, rtol=1e-3, atol=1e-5)


def test_accumulated_micro_batches_equal_the_whole_batch(tmp_path):
    train_here(tmp_path / "whole", replace(PLAIN, batch=Batch(size=5)))
    train_here(tmp_path / "pieces", replace(PLAIN, batch=Batch(size=5, micro_size=2)))
    for name, weight in final_weights(tmp_path / "whole").items():
        assert_close(final_weights(tmp_path / "pieces")[name], weight, rtol=1e-3, atol=1e-5)


def test_ranks_drop_out_differently(tmp_path):
    run_ranks(2, train_here, tmp_path, RECIPE, None, 1)
    first, second = (checkpoint.complete(tmp_path / "checkpoints")[0].of_rank(rank)["cpu_rng"] for rank in (0, 1))
    assert not torch.equal(first, second)


class Watching(TransformerXLTask):
    memories: ClassVar[list] = []

    def loss(self, model, segment, memory):
        self.memories.append(memory)
        return super().loss(model, segment, memory)


def test_memory_begins_empty_with_each_epoch_and_only_then(tmp_path):
    """An epoch has 11 steps, each of two micro-batches with memories of their own."""
    recipe = replace(RECIPE, batch=Batch(size=4, micro_size=2), stop=Stop(max_steps=23))
    Watching.memories.clear()
    with world() as w:
        train(w, Watching(recipe, corpus()), recipe, Run(tmp_path, w))
    assert [i for i, memory in enumerate(Watching.memories) if memory is None] == [0, 1, 22, 23, 44, 45]


def test_a_run_of_two_ranks_goes_on_with_one(tmp_path):
    """Not to the bit, for memories start anew, but it goes on from its step and learns."""
    run_ranks(2, train_here, tmp_path, RECIPE, None, 9)
    outcome = train_here(tmp_path)
    assert outcome.finished
    assert outcome.step == 20
    assert "memories start empty" in (tmp_path / "logs" / "rank-0.log").read_text()


def test_it_stops_when_it_says_and_tests_once_with_the_best_weights(tmp_path):
    clock = Clock(log_interval=4, eval_interval=5, checkpoint_interval=3)
    recipe = replace(RECIPE, stop=Stop(max_tokens=1000), clock=clock)
    outcome = train_here(tmp_path, recipe)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    valid = {r["step"]: r["loss"] for r in records if r["kind"] == "valid"}
    tests = [r for r in records if r["kind"] == "test"]
    assert 1000 <= outcome.tokens < 1000 + 32
    assert [r["step"] for r in tests] == [outcome.step]
    assert tests[0]["eval_tokens"] == 97
    assert "every token once, 3 streams" in tests[0]["protocol"]
    found = checkpoint.complete(tmp_path / "checkpoints")
    assert checkpoint.best(found).step == min(valid, key=valid.get)
    assert len(found) <= 3                                        # the two newest and the best
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "finished"
    assert f"{math.exp(outcome.test.loss):.3f}" in status["message"]


class Worsening(TransformerXLTask):
    """Validation is worse each time, so the first checkpoint stays the best."""
    seen: ClassVar[list] = []

    def evaluate(self, model, split, world):
        score = super().evaluate(model, split, world)
        self.seen.append(split)
        return replace(score, nats=1000.0 * len(self.seen)) if split == "valid" else score


def test_the_test_is_of_the_best_weights_not_of_the_last(tmp_path):
    Worsening.seen.clear()
    with world() as w:
        outcome = train(w, Worsening(RECIPE, corpus()), RECIPE, Run(tmp_path, w))
        task = TransformerXLTask(RECIPE, corpus())
        losses = {}
        for found in checkpoint.complete(tmp_path / "checkpoints"):
            net = task.build().eval()
            net.load_state_dict(found.shared()["model"])
            losses[found.step] = task.evaluate(net, "test", w).loss
    assert Worsening.seen == ["valid", "valid", "test"]
    assert outcome.test.loss == pytest.approx(losses[10])
    assert outcome.test.loss != pytest.approx(losses[20])


def test_a_finished_run_started_again_changes_nothing(tmp_path):
    first = train_here(tmp_path)
    weights = final_weights(tmp_path)
    again = train_here(tmp_path)
    assert again.test.loss == first.test.loss
    same(final_weights(tmp_path), weights)


def test_a_text_that_repeats_beyond_the_segment_is_predicted_with_memory_and_not_without(tmp_path):
    """Nine of ten tokens are what stood 12 tokens before; a segment has 8, so only memory can tell."""
    generator = np.random.default_rng(0)
    text = generator.integers(0, 20, 6000).astype(np.uint16)
    for i in range(12, len(text)):
        if generator.random() < 0.9:
            text[i] = text[i - 12]
    data = corpus(train=text[:5000], n_token=20)
    data.splits["valid"] = data.splits["test"] = text[5000:]
    recipe = replace(RECIPE, model=replace(RECIPE.model, n_layer=1, d_model=32, d_head=16, d_inner=64, dropout=0.0,
                                           dropatt=0.0, cutoffs=()),
                     batch=Batch(size=16), eval_streams=4, optim=Optim("adam", lr=0.01),
                     schedule=Schedule("cosine", warmup_steps=20), stop=Stop(max_steps=200),
                     clock=Clock(log_interval=100, eval_interval=200))

    def test_loss(mem_len):
        context = Context(tgt_len=8, mem_len=mem_len)
        run = tmp_path / f"mem-{mem_len}"
        return train_here(run, replace(recipe, context=context, eval_context=context), data).test.loss

    repeats = 0.9 + 0.1 / 20
    best_possible = -repeats * math.log(repeats) - (1 - repeats) * math.log(0.1 / 20)
    assert test_loss(0) > math.log(20) - 0.1                       # no better than a guess
    assert test_loss(16) < best_possible + 0.6


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_step_and_tensor(tmp_path):
    train_here(tmp_path, stop_after=7)                            # a good run up to here
    with pytest.raises(Diverged, match=r"At step \d+ the loss .* the gradient of \S+ .*step-0000000\d \(step \d+\)"):
        train_here(tmp_path, replace(RECIPE, optim=replace(RECIPE.optim, lr=1e30, clip=None)))
    newest = checkpoint.complete(tmp_path / "checkpoints")[-1]
    assert all(torch.isfinite(x).all() for x in newest.shared()["model"].values())


def test_the_step_and_tensor_named_are_those_where_it_began(tmp_path):
    """However long it goes unnoticed: looking at every step and looking after twenty name the same."""
    def message(log_interval, eval_interval=1000):
        recipe = replace(RECIPE, optim=Optim("sgd", lr=1e18, clip=None), divergence_nats=1e30,
                         clock=Clock(log_interval=log_interval, eval_interval=eval_interval, checkpoint_interval=1000))
        with pytest.raises(Diverged) as diverged:
            train_here(tmp_path / f"{log_interval}-{eval_interval}", recipe)
        said = re.match(r"At step (\d+) the loss of rank 0 was \S+, and (the gradient of \S+)", str(diverged.value))
        return said.groups()
    assert message(1) == message(20) == message(20, eval_interval=10)


def test_a_loss_that_runs_away_stops_the_run(tmp_path):
    recipe = replace(RECIPE, optim=Optim("sgd", lr=3.0, clip=None), schedule=Schedule("constant"),
                     divergence_nats=0.05, stop=Stop(max_steps=400), clock=Clock(log_interval=2, eval_interval=400))
    with pytest.raises(Diverged, match=r"rose to .* at step"):
        train_here(tmp_path, recipe)


def test_a_finite_blow_up_between_two_logs_is_not_saved_as_a_good_checkpoint(tmp_path):
    train_here(tmp_path, stop_after=7)                            # logged at step 4
    wild = replace(RECIPE, optim=Optim("lamb", lr=8.0, clip=None, max_weight_norm=None), divergence_nats=0.5,
                   clock=Clock(log_interval=1000, eval_interval=1000, checkpoint_interval=3))
    with pytest.raises(Diverged, match=r"rose to .* at step (9|12|15)\b"):
        train_here(tmp_path, wild)
    assert checkpoint.complete(tmp_path / "checkpoints")[-1].step < 15


class Unmeasurable(TransformerXLTask):
    def evaluate(self, model, split, world):
        return replace(super().evaluate(model, split, world), nats=math.nan)


def test_a_validation_loss_that_is_not_a_number_stops_the_run(tmp_path):
    with world() as w, pytest.raises(Diverged, match="validation loss at step 10 is nan"):
        train(w, Unmeasurable(RECIPE, corpus()), RECIPE, Run(tmp_path, w))
    assert all(c.valid_loss is None for c in checkpoint.complete(tmp_path / "checkpoints"))


FP16 = replace(RECIPE, precision="fp16", optim=Optim("adam", lr=0.02), batch=Batch(size=2),
               model=replace(RECIPE.model, n_layer=1, cutoffs=(), dropout=0.0))       # small: fp16 is slow on a CPU


def test_fp16_learns_as_fp32_does(tmp_path):
    train_here(tmp_path / "fp16", FP16)
    train_here(tmp_path / "fp32", replace(FP16, precision="fp32"))
    for half, full in zip(losses(tmp_path / "fp16"), losses(tmp_path / "fp32")):
        assert half[3] == pytest.approx(full[3], rel=0.02)


def test_fp16_skips_a_step_that_overflows_and_goes_on(tmp_path):
    """A loss scale far too large makes the first gradients overflow; they are skipped, and the scale comes down."""
    train_here(tmp_path, FP16, stop_after=1)
    start = checkpoint.complete(tmp_path / "checkpoints")[0]
    state = start.shared()
    before = {name: x.clone() for name, x in state["model"].items()}
    state["scaler"]["scale"] = 2.0 ** 40
    recipe = replace(FP16, clock=replace(FP16.clock, log_interval=1))
    torch.save(state, start.path / "model.pt")
    meta = json.loads((start.path / "meta.json").read_text())
    meta["files"]["model.pt"] = (start.path / "model.pt").stat().st_size
    (start.path / "meta.json").write_text(json.dumps(meta))
    train_here(tmp_path, recipe, stop_after=3)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    same(dict(final_weights(tmp_path)), before)
    assert checkpoint.complete(tmp_path / "checkpoints")[-1].shared()["scaler"]["scale"] == 2.0 ** 37
    assert train_here(tmp_path, replace(FP16, stop=Stop(max_steps=40))).finished
    assert not torch.equal(final_weights(tmp_path)["u"], before["u"])


class Overflowing(TransformerXLTask):
    def loss(self, model, segment, memory):
        nats, memory = super().loss(model, segment, memory)
        return nats + (nats * 1e30 - nats.detach() * 1e30), memory           # an ordinary loss, an impossible gradient


def test_fp16_that_overflows_at_every_scale_is_given_up(tmp_path):
    recipe = replace(FP16, stop=Stop(max_steps=60), clock=Clock(log_interval=10, eval_interval=60))
    with world() as w, pytest.raises(Diverged, match="overflows fp16"):
        train(w, Overflowing(recipe, corpus()), recipe, Run(tmp_path, w))


def test_warm_start_takes_the_weights_of_another_run_and_nothing_else(tmp_path):
    train_here(tmp_path / "first")
    best = checkpoint.find(tmp_path / "first")
    recipe = replace(RECIPE, init_from=str(tmp_path / "first"), optim=replace(RECIPE.optim, lr=0.0))
    train_here(tmp_path / "second", recipe, stop_after=2)
    same(final_weights(tmp_path / "second"), best.shared()["model"])
    assert checkpoint.complete(tmp_path / "second" / "checkpoints")[-1].step == 2


def test_a_warm_start_with_the_optimizer_goes_on_as_the_first_run_would_have(tmp_path):
    """What a step of SGD owes to the momentum of the first run, by hand."""
    sgd = replace(PLAIN, optim=Optim("sgd", lr=0.1, momentum=0.9, clip=None), schedule=Schedule("constant"))
    train_here(tmp_path / "first", sgd, stop_after=3)
    before = checkpoint.complete(tmp_path / "first" / "checkpoints")[-1].shared()
    started = {}
    for name, optimizer in (("with", True), ("without", False)):
        recipe = replace(sgd, init_from=str(tmp_path / "first"), init_optim=optimizer,
                         optim=replace(sgd.optim, momentum=0.5))         # the recipe's, not the first run's
        train_here(tmp_path / name, recipe, stop_after=1)
        started[name] = checkpoint.complete(tmp_path / name / "checkpoints")[-1].shared()
    names = before["optimizer"]["param_groups"][0]["param_names"]
    for i, name in enumerate(names):
        momentum = before["optimizer"]["state"][i]["momentum_buffer"]
        with_, without = (started[x]["model"][name] for x in ("with", "without"))
        torch.testing.assert_close(with_, without - 0.1 * 0.5 * momentum)


def test_an_optimizer_of_another_kind_is_not_taken(tmp_path):
    train_here(tmp_path / "first", stop_after=2)
    recipe = replace(RECIPE, init_from=str(tmp_path / "first"), init_optim=True, optim=Optim("adamw", lr=0.01))
    with pytest.raises(checkpoint.CheckpointError, match="is another one, or of other parameters"):
        train_here(tmp_path / "second", recipe)


def test_a_deeper_model_takes_the_layers_there_are_and_trains_only_those_that_are_new(tmp_path):
    train_here(tmp_path / "first", stop_after=3)
    source = checkpoint.find(tmp_path / "first").shared()["model"]
    deeper = replace(RECIPE, init_from=str(tmp_path / "first"), init_partly=True, freeze_below=2,
                     freeze=("vocabulary.*",), model=replace(RECIPE.model, n_layer=3))
    run_ranks(2, train_here, tmp_path / "second", deeper, None, 1)
    train_here(tmp_path / "second", deeper, stop_after=2)
    at = [found.shared()["model"] for found in checkpoint.complete(tmp_path / "second" / "checkpoints")]
    for name, x in at[-1].items():
        if name.startswith(("vocabulary.", "layers.0.", "layers.1.")):
            assert torch.equal(x, source[name]), name
        elif name.startswith("layers.2."):
            assert not torch.equal(x, at[0][name]), name
    assert train_here(tmp_path / "second", deeper).finished
    log = (tmp_path / "second/logs/rank-0.log").read_text()
    assert "lacks 11 tensors, which begin anew: layers.2" in log
    # the first model's 4,880, but for u and v, of two heads of 8 each
    assert "7,032 parameters, 4,848 of them frozen |" in log


@pytest.mark.parametrize(("changed", "said"), [
    ({"freeze": ("layer.0.*",)}, r"No parameter is called layer.0.\*, which is to be frozen. There are: u, v, "),
    ({"freeze": ("*",)}, "nothing would be trained"),
])
def test_what_cannot_be_frozen_is_named(tmp_path, changed, said):
    with pytest.raises(BadValue, match=said):
        train_here(tmp_path, replace(RECIPE, **changed))


@pytest.mark.parametrize(("changed", "said"), [
    ({"init_partly": True}, "about what init_from names, which is none"),
    ({"init_optim": True, "init_from": "x", "freeze": ("u",)}, "not with init_partly, nor with frozen"),
    ({"freeze_below": 3}, "freeze_below is 3, and there are 2 layers"),
])
def test_a_warm_start_that_makes_no_sense_is_refused(changed, said):
    with pytest.raises(ValueError, match=said):
        replace(RECIPE, **changed)


def test_a_run_goes_on_without_the_run_it_was_warmly_started_from(tmp_path):
    train_here(tmp_path / "first")
    recipe = replace(RECIPE, init_from=str(tmp_path / "first"))
    train_here(tmp_path / "second", recipe, stop_after=2)
    shutil.rmtree(tmp_path / "first")
    assert train_here(tmp_path / "second", recipe).finished


def test_a_run_whose_vocabulary_has_changed_is_not_resumed(tmp_path):
    train_here(tmp_path, stop_after=2)
    other = corpus()
    other.vocab.hash = "other"
    with pytest.raises(checkpoint.CheckpointError, match="trained on another vocabulary"):
        train_here(tmp_path, data=other)


def test_tensorboard_has_cybertronais_tags_over_global_tokens(tmp_path):
    train_here(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    expected = {"_loss", "learning/epoch", "learning/loss", "learning/ppl", "learning/lr", "learning/base_lr",
                "learning/val_loss", "learning/val_ppl", "learning/test_loss", "learning/test_ppl", "times/step",
                "times/load", "times/backwards", "times/batches_per_sec", "times/samples_per_sec",
                "times/tokens_per_sec", "sizes/batch_size", "sizes/seq_size", "sizes/params", "sizes/non_emb_params"}
    tags = events.Tags()
    assert expected <= set(tags["scalars"])
    assert {"lamb/weight_norm", "lamb/adam_norm", "lamb/trust_ratio"} <= set(tags["histograms"])
    logged = [(tokens, loss) for kind, _, tokens, loss in losses(tmp_path) if kind == "train"]
    shown = [(event.step, event.value) for event in events.Scalars("learning/loss")]
    assert [tokens for tokens, _ in shown] == [tokens for tokens, _ in logged]
    assert [loss for _, loss in shown] == pytest.approx([loss for _, loss in logged])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_lose_what_plain_ones_lose(tmp_path, monkeypatch):
    import torch._inductor.config as inductor
    monkeypatch.setattr(inductor.cpp, "vec_isa_ok", False)     # g++ takes most of the time, and for loops the least
    data = corpus()
    data.splits["test"] = data.splits["test"][:96]             # whole segments: each shape is a compilation
    recipe = replace(PLAIN, stop=Stop(max_steps=6), clock=replace(PLAIN.clock, eval_interval=None))
    train_here(tmp_path / "plain", recipe, data)
    train_here(tmp_path / "compiled", replace(recipe, clock=replace(recipe.clock, compile=True)), data)
    assert [kind for kind, *_ in losses(tmp_path / "plain")] == ["train", "train", "test"]
    for plain, compiled in zip(losses(tmp_path / "plain"), losses(tmp_path / "compiled")):
        assert compiled[3] == pytest.approx(plain[3], rel=1e-5)
    assert checkpoint.find(tmp_path / "compiled").shared()["model"].keys() == final_weights(tmp_path / "plain").keys()


def test_a_warm_start_that_does_not_fit_names_the_tensors(tmp_path):
    train_here(tmp_path / "first", stop_after=2)
    recipe = replace(RECIPE, init_from=str(tmp_path / "first"), model=replace(RECIPE.model, d_inner=25))
    with pytest.raises(checkpoint.CheckpointError, match="feed_forward"):
        train_here(tmp_path / "second", recipe)
