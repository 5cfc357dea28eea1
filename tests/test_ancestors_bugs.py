"""The bugs that were found in Transformer-XL's ancestors, and for each the test that would catch it here.

K kimiyoung/transformer-xl, O and H cybertronai/transformer-xl (old-master and its HEAD), P and T NVIDIA's PyTorch and
TensorFlow. Those that other tests catch stand in the table, with files below tests/; the tests below are of the rest.
"""
from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engine.loop
from engine import checkpoint
from engine.checkpoint import Checkpoint
from engine.config import Batch, Clock, Optim, Schedule, Stop
from engine.loop import train
from engine.precision import precision_for
from engine.run import Run
from engine.schedule import lr_at
from engine.task import Position
from engine.values import BadValue
from engine.world import World, world
from tests.txl.small import RECIPE, corpus, train_here
from tests.txl.test_model import MODELS, V, build, run_fast
from txl.config import Context, Data, Recipe
from txl.model import TransformerXL
from txl.task import TransformerXLTask, evaluate

CAUGHT_ELSEWHERE = """
claims
  O: "21.5 perplexity" was withdrawn, "examples/sec" are six times the truth
      test_configs.py::test_cybertronais_claims_stand_beside_their_corrections
  O: "277M parameters" is another model's number
      test_configs.py::test_parameter_counts_are_those_of_the_published_models
  all: perplexity depends on a protocol that is not said
      txl/test_protocol.py::test_the_loss_is_that_of_their_loops
      txl/test_evaluate.py::test_flags_change_the_context_and_the_table_says_so
data
  K O P: the tail and the first token of each stream are never predicted
      txl/test_batches.py::test_every_token_is_a_target_exactly_once
  K: enwik8 loses its newlines
      txl/test_vocab.py::test_bytes_come_back_as_they_were
  all: a cache that is stale after the text changed
      txl/test_data.py::test_a_changed_text_of_the_same_size_is_encoded_anew
  K T: a cache named after its folder alone serves another dataset
      txl/test_data.py::test_another_option_makes_other_tokens_and_leaves_the_first
  K: every rank writes the cache, and may load it empty
      txl/test_data.py::test_processes_that_come_at_once_share_one_result
  K: an unknown word is an AssertionError
      txl/test_vocab.py::test_a_word_outside_is_an_error_with_its_place_where_there_is_no_unk
  P: roll accumulates, and a resumed run reads other data
      txl/test_batches.py::test_a_rolled_stream_begins_anywhere_goes_on_at_its_beginning_and_is_another_in_each_epoch
      engine/test_loop.py::test_stopped_and_resumed_equals_never_stopped_bit_for_bit
  O: the same segment boundaries in every epoch
      txl/test_batches.py::test_segments_of_random_lengths_are_those_of_the_original
  P: varlen crashes
      txl/test_batches.py::test_in_an_epochs_own_order_too_every_token_is_a_target_once_after_the_one_before_it
  P: a checkpoint of an epoch's first batch replays it
      txl/test_task.py::test_the_data_go_on_from_any_position
  P: sentences in any order (lm1b) cannot be trained on; K: the last batch of them is dropped
      txl/test_batches.py::test_one_stream_of_shuffled_sentences_is_the_originals
      txl/test_batches.py::test_shuffled_streams_have_every_sentence_whole_once_and_in_another_order_each_epoch
      txl/test_task.py::test_ranks_agree_on_the_order_of_sentences
  H: git's texts are written under names that are not read
      txl/test_folders.py::test_the_command_makes_texts_and_tokens_of_a_folder_and_says_what_it_did
  P: the number of ranks must divide the batch, else the mean is not weighted
      engine/test_loop.py::test_several_ranks_equal_one_rank_with_the_whole_batch
  H: tokens are counted on one rank
      engine/test_loop.py::test_several_ranks_equal_one_rank_with_the_whole_batch
model
  O: attention of types 1 and 2 fails, 3 needs n_head * d_head = d_model; P's 2 adds positions twice, its pre_lnorm does
     not normalise queries; K's memory overlaps an extended context (mlen and qlen swapped)
      txl/test_model.py::test_three_segments_match_the_formulas_forward_and_backward
  K O: same_length sees one key fewer than it says
      txl/test_model.py::test_same_length_lets_every_query_see_mem_len_tokens_before_it
  K: cluster i is column -i
      txl/test_convert.py::test_every_word_has_the_log_probability_that_their_model_gives_it
  K: losses come in the order of the clusters
      txl/test_task.py::test_the_loss_equals_predicting_one_token_after_the_other
  O: with DDP an empty tail cluster has no gradient
      txl/test_model.py::test_a_cluster_without_targets_still_gets_a_zero_gradient
  K O P: sampled softmax cannot be built, or not evaluated
      txl/test_model.py::test_a_sampled_softmax_draws_the_frequent_words_more_often_and_evaluates_all
  K O: positions in fp16 are exact to 2048 only
      txl/test_model.py::test_autocast_keeps_positions_and_residuals_in_fp32
  P: fp16 logits
      engine/test_precision.py::test_matrix_products_have_the_precision_and_the_loss_has_fp32
training
  O: training never ends
      engine/test_loop.py::test_it_stops_when_it_says_and_tests_once_with_the_best_weights
  K O P: the first step has the full rate despite the warm-up
      engine/test_schedule.py::test_warmup_counts_the_step_being_taken_and_joins_what_follows
  O: the cosine begins with a jump
      engine/test_schedule.py::test_a_warmup_in_the_other_unit_gives_a_smooth_fall_whatever_the_batches_hold
  O: the learning-rate finder does not end
      engine/test_finder.py::test_through_the_loop_it_ends_by_itself_and_its_suggestion_is_stable
  P: memory goes on from the end of one epoch into another order of the next
      engine/test_loop.py::test_memory_begins_empty_with_each_epoch_and_only_then
  P: no evaluation, no checkpoints
      engine/test_clock.py::test_without_evaluation_and_test_neither_is_read_and_checkpoints_are_written
  O H: LAMB never moves what begins at zero
      engine/test_optim.py::test_a_tensor_of_zeros_moves_by_lr_times_adams_step
  O H: LAMB makes NaN of a step of zero
      engine/test_optim.py::test_a_gradient_of_zeros_changes_nothing_and_makes_no_nan
  O H: adagrad asserts
      engine/test_optim.py::test_build_makes_the_optimizer_that_is_named
  all: NaN and divergence go unnoticed
      engine/test_loop.py::test_a_loss_that_is_not_a_number_stops_the_run_and_names_step_and_tensor
      engine/test_loop.py::test_a_loss_that_runs_away_stops_the_run
      engine/test_loop.py::test_fp16_that_overflows_at_every_scale_is_given_up
  O: a warm start reaches rank 0 only
      engine/test_nodes.py::test_a_warm_start_needs_the_weights_on_the_leading_disk_only
  O H: strict=False hides what does not fit
      engine/test_loop.py::test_a_warm_start_that_does_not_fit_names_the_tensors
  P: a restart file that is missing is no error
      engine/test_nodes.py::test_a_warm_start_from_nowhere_ends_all_ranks_with_the_reason
  O: checkpoints lack schedule, generators, memory and place
      engine/test_loop.py::test_resuming_from_any_checkpoint_after_a_kill_gives_the_same_run
  P: resuming needs as many ranks
      engine/test_loop.py::test_a_run_of_two_ranks_goes_on_with_one
  P: a finished run that is started again fails
      engine/test_loop.py::test_a_finished_run_started_again_changes_nothing
  P: ranks do not agree when to stop
      engine/test_world.py::test_what_one_rank_asks_all_ranks_hear_later
  O H: pickled modules are loaded
      engine/test_checkpoint.py::test_loading_executes_nothing
      txl/test_convert.py::test_nothing_that_is_pickled_in_a_file_is_run
evaluation
  O: every rank has a loss of its own, and streams get tiny with many ranks
      txl/test_task.py::test_the_loss_is_the_same_for_every_number_of_ranks
  O: the training's lengths are evaluated
      txl/test_task.py::test_the_test_is_measured_by_its_own_context
  O: bits per character are those of the sum; positions are counted for tokens
      txl/test_evaluate.py::test_a_vocabulary_of_words_has_its_perplexity_per_word
  P: --split=all fails
      txl/test_evaluate.py::test_all_is_validation_and_test
  P: percentiles are strings
      engine/test_cli.py::test_numbers_stand_between_commas_or_in_flags_of_their_own_but_a_text_keeps_its_commas
  P: --manual fails
      txl/test_evaluate.py::test_a_text_costs_what_the_same_text_as_a_split_does
  T: the mean over batches is not weighted
      txl/test_task.py::test_the_loss_equals_predicting_one_token_after_the_other
input
  P: a mistyped flag is ignored
      engine/test_cli.py::test_misuse_is_said_on_stderr_and_ends_with_status_2
  P: so is an unknown key
      engine/test_values.py::test_json_that_does_not_fit_names_the_path_and_what_fits
  all: options that nothing reads
      txl/test_options.py::test_every_option_of_the_ancestors_has_its_answer_in_a_line
  K P: published commands fail
      test_launch.py::test_the_commands_at_the_top_of_the_file_can_be_copied
  O H: eval(args.config)
      engine/test_cli.py::test_a_value_is_what_was_typed_and_not_evaluated_as_python
  O: AWS alone
      cluster/test_contract.py::test_it_loses_what_torchrun_by_hand_loses_to_the_last_digit
  P: needs CUDA; O H: --local needs a process group
      engine/test_world.py::test_a_world_of_one_hears_itself
"""
ROOT = Path(__file__).parent.parent
ALONE = World(0, 0, 1, torch.device("cpu"))
SHORT = replace(RECIPE, stop=Stop(max_steps=4), clock=Clock(log_interval=1, eval_interval=100, checkpoint_interval=100))


def test_the_tests_of_the_table_exist():
    named = [word for word in CAUGHT_ELSEWHERE.split() if "::" in word]
    assert len(named) > 50
    missing = []
    for file, tests in itertools.groupby(sorted(named), key=lambda name: name.partition("::")[0]):
        there = {x.name for x in ast.parse((ROOT / "tests" / file).read_text()).body if isinstance(x, ast.FunctionDef)}
        missing += [test for test in tests if test.partition("::")[2] not in there]
    assert not missing


# Modules.

SOURCES = [path for folder in ("engine", "txl", "cluster") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_importing_a_module_reads_no_command_line_and_says_nothing():
    """O and H parse sys.argv where they are imported; H's train.py imports modules that are not there."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES
             if path.parent.name in ("engine", "txl")]
    code = f"import importlib\nfor name in {names}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code, "--no_such_flag"], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(x.func), x) for x in ast.walk(tree) if isinstance(x, ast.Call)]


def test_no_assert_checks_what_a_person_gives():
    """O and H do, so that `python -O` checks nothing. Here assert only tells the type checker what cannot be None."""
    told = [(path.name, ast.unparse(x.test)) for path in SOURCES for x in ast.walk(ast.parse(path.read_text()))
            if isinstance(x, ast.Assert)]
    assert told
    assert [(name, test) for name, test in told if " is not None" not in test] == []


def test_no_text_becomes_code_and_no_file_becomes_an_object():
    """H evaluates its --config, O and H load pickled models from shared disks."""
    for path in SOURCES:
        for name, call in calls(ast.parse(path.read_text())):
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads"), path
            if name == "torch.load":
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert keywords.get("weights_only") == "True", path


def test_training_asks_for_no_account_and_powers_nothing_off():
    """O and H call `sudo shutdown` and H needs wandb, in train.py."""
    for path in SOURCES:
        if path.parent.name in ("engine", "txl"):
            imported = {alias.name.partition(".")[0] for x in ast.walk(ast.parse(path.read_text()))
                        if isinstance(x, (ast.Import, ast.ImportFrom))
                        for alias in ([ast.alias(x.module or "")] if isinstance(x, ast.ImportFrom) else x.names)}
            assert not imported & {"wandb", "boto3", "cluster"}, path
            for name, call in calls(ast.parse(path.read_text())):
                assert not name.startswith(("os.system", "os.popen", "os.exec", "os.spawn", "os.posix_spawn")), path
                if name.startswith("subprocess."):           # nothing but this Python
                    assert ast.unparse(call.args[0]).startswith("[sys.executable, '-c', PROGRAM"), path
            assert not {"os.system", "os.popen"} & {name for name, _ in calls(ast.parse(path.read_text()))}, path


# Data.

@pytest.mark.parametrize("length", [64, 97, 101, 330])
def test_every_rank_has_as_many_steps_and_knows_of_all_targets(length):
    """O's and H's ranks cut files of their own: one with a batch more waits for the others for ever."""
    for ranks in (1, 2, 3, 7):
        recipe = replace(RECIPE, batch=Batch(size=7))
        worlds = [World(rank, rank, ranks, torch.device("cpu")) for rank in range(ranks)]
        epochs = [list(itertools.takewhile(lambda step: step.position.epoch == 0, TransformerXLTask(
            recipe, corpus(length=length)).steps(w, Position()))) for w in worlds]
        assert len({len(epoch) for epoch in epochs}) == 1
        for steps in zip(*epochs):
            targets = sum(int((s.targets_BT >= 0).sum()) for step in steps for s in step.micro_batches)
            assert {step.tokens for step in steps} == {targets}


def test_the_order_of_the_data_does_not_depend_on_the_hash_seed(tmp_path):
    """O's list(set(...)) gives each rank another order of the files, and words of equal frequency other numbers."""
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("all words are as frequent here\n")
    code = ("import sys; from pathlib import Path; from txl.vocab import WordVocab; "
            f"print(WordVocab.count([Path({str(tmp_path / 'train.txt')!r})]).content())")
    said = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True,
                           text=True, timeout=300, check=True).stdout for seed in ("1", "2")}
    assert said == {"<eos>\nall\nwords\nare\nas\nfrequent\nhere\n"}


def test_a_cutoff_beyond_the_vocabulary_is_refused_before_anything_is_built():
    """P's default cutoffs with its own byte pairs crash while the model is built."""
    with pytest.raises(ValueError, match="last cutoff 30 must be below the 20 tokens"):
        replace(RECIPE, model=replace(RECIPE.model, cutoffs=(10, 30)), data=Data("text", "nowhere", n_token=20))
    with pytest.raises(BadValue, match="last cutoff 30 must be below the vocabulary's 20 tokens"):
        TransformerXL(replace(RECIPE.model, cutoffs=(10, 30)), 20)


def test_a_split_shorter_than_its_streams_has_a_loss():
    """T divides by zero batches."""
    net = TransformerXLTask(RECIPE, corpus()).build().eval()
    score = evaluate(net, corpus(), "valid", RECIPE.eval_context, 500, ALONE)
    assert score.tokens == 101
    assert 0 < score.loss < 10


# Model.

@pytest.mark.parametrize("name", ["plain", "shaw", "abs", "learned", "pre_lnorm"])
def test_a_memory_is_not_changed_by_whoever_reads_it(name):
    """P's absolute positions are added into the caller's memory, and the next segment adds them again."""
    net, context = build(MODELS[name]), Context(tgt_len=4, mem_len=5)
    tokens = torch.randint(0, V, (2, 4))
    _, (hidden_LBMD, length) = net(tokens, tokens, None, context)
    before = hidden_LBMD.clone()
    net(tokens, tokens, (hidden_LBMD, length), context)
    assert torch.equal(hidden_LBMD, before)


@pytest.mark.parametrize("name", ["plain", "shaw", "abs", "learned", "pre_lnorm"])
def test_what_is_not_yet_remembered_is_not_attended_to(name):
    """T begins with zeros, and attends to them."""
    net, context = build(MODELS[name]), Context(tgt_len=4, mem_len=5)
    tokens = torch.randint(0, V, (2, 4))
    without, _ = net(tokens, tokens, None, Context(tgt_len=4, mem_len=0))
    garbage, _ = net(tokens, tokens, (torch.full((2, 2, 5, 8), 1e6, dtype=torch.float64), 0), context)
    torch.testing.assert_close(garbage, without)


def test_a_feed_forward_that_fails_is_heard_of_and_none_is_left_out():
    """O's decoder layers go on without it, in a bare `except: pass`; with d_inner 0 always."""
    net, tokens = build(MODELS["plain"]), torch.zeros(1, 4, dtype=torch.long)
    net.layers[1].feed_forward[3] = torch.nn.Linear(99, 8).double()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net(tokens, tokens, None, Context(4, 4))
    with pytest.raises(ValueError, match="d_inner"):
        replace(RECIPE.model, d_inner=0)


@pytest.mark.parametrize("changed", [{"clamp_len": 2}, {"same_length": True}], ids=str)
def test_clamp_len_and_same_length_act_in_16_bits_too(changed):
    """O sets them on a wrapper of its fp16 models, where nothing reads them."""
    net, tokens = build(MODELS["plain"]).float(), torch.randint(0, V, (2, 33)).tolist()
    with torch.no_grad():
        net.v *= 30                                           # distances matter

    def nats(context: Context, precision: str) -> torch.Tensor:
        with precision_for(precision, ALONE.device).autocast():
            return run_fast(net, tokens, context)
    plain = Context(tgt_len=8, mem_len=8)
    exact, rough = (nats(replace(plain, **changed), x) - nats(plain, x) for x in ("fp32", "bf16"))
    assert exact.abs().mean() > 0.05
    assert (rough - exact).abs().mean() < 0.3 * exact.abs().mean()


# Training.

def records(folder: Path, kind: str = "train") -> list[dict]:
    return [x for x in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if x["kind"] == kind]


@pytest.mark.parametrize("schedule", [
    Schedule("cosine", warmup_steps=2, eta_min=0.001), Schedule("constant", warmup_tokens=50),
    Schedule("inv_sqrt", warmup_steps=2), Schedule("plateau", decay_rate=0.1)], ids=lambda schedule: schedule.name)
def test_every_schedule_trains_and_the_rate_that_is_logged_is_the_one_that_was_used(tmp_path, schedule):
    """O: constant, inv_sqrt and dev_perf end in an UnboundLocalError, P: constant does. T logs a train op for it."""
    recipe = replace(SHORT, schedule=schedule, clock=replace(SHORT.clock, eval_interval=1))
    used = []
    step = torch.optim.SGD.step

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            used.append(self.param_groups[0]["lr"])
            return step(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "SGD", Watched)
        train_here(tmp_path, replace(recipe, optim=Optim("sgd", lr=0.1)))
    valid, expected, tokens = [x["loss"] for x in records(tmp_path, "valid")], [], 0
    for i, record in enumerate(records(tmp_path)):
        expected.append(lr_at(schedule, 0.1, recipe.stop, step=i, tokens=tokens, tokens_after=record["tokens"],
                              valid_losses=valid[:i]))
        tokens = record["tokens"]
    assert used == expected
    assert [x["lr"] for x in records(tmp_path)] == expected
    assert min(used) > 0                                      # T's first rate is 0


class DataDependent(TorchDispatchMode):
    """Remembers what cannot go on before the device has answered: a number for Python, a shape made of data."""
    TAGS: ClassVar = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.TAGS & set(func.tags):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("div_val", [1, 2])
def test_no_step_waits_for_the_device(tmp_path, monkeypatch, div_val):
    """O, H and P ask for the loss at every step, O and H for the sum of all parameters, and P's adaptive softmax for
    which targets are in a cluster."""
    watch, step = DataDependent(), engine.loop._Training._step

    def watched(self, *args):
        with watch:
            step(self, *args)
    monkeypatch.setattr(engine.loop._Training, "_step", watched)
    train_here(tmp_path, replace(SHORT, model=replace(RECIPE.model, div_val=div_val)))
    assert watch.seen == []
    with watch:
        torch.ones(()).item()
        torch.ones(2).nonzero()
    assert len(watch.seen) == 2                               # it sees what it is to see


def test_the_loss_of_a_step_in_pieces_is_that_of_all_its_pieces(tmp_path):
    """T logs that of the last one."""
    recipe = replace(SHORT, model=replace(RECIPE.model, dropout=0.0, dropatt=0.0))
    train_here(tmp_path / "whole", recipe)
    train_here(tmp_path / "pieces", replace(recipe, batch=Batch(size=4, micro_size=1)))
    assert [x["loss"] for x in records(tmp_path / "pieces")] == pytest.approx(
        [x["loss"] for x in records(tmp_path / "whole")], rel=1e-5)


def test_without_memory_it_saves_and_goes_on(tmp_path):
    """P's checkpoints cannot hold a memory of length 0."""
    recipe = replace(SHORT, context=Context(tgt_len=8, mem_len=0), eval_context=Context(tgt_len=8, mem_len=0))
    train_here(tmp_path / "straight", recipe)
    assert not train_here(tmp_path / "stopped", recipe, stop_after=2).finished
    train_here(tmp_path / "stopped", recipe)
    straight, stopped = ([x["loss"] for x in records(tmp_path / name)] for name in ("straight", "stopped"))
    assert stopped == straight


def test_the_last_step_is_validated_and_saved_whatever_the_intervals(tmp_path):
    """T saves only at multiples of save_steps and never validates; P saves only where it evaluates."""
    train_here(tmp_path, SHORT)
    found = checkpoint.complete(tmp_path / "checkpoints")
    assert [x.step for x in found] == [4]
    assert found[0].valid_loss == records(tmp_path, "valid")[-1]["loss"]
    train_here(tmp_path / "unevaluated", replace(SHORT, clock=replace(SHORT.clock, checkpoint_interval=2)))
    assert [x.step for x in checkpoint.complete(tmp_path / "unevaluated" / "checkpoints")] == [2, 4]


def test_a_validation_loss_of_zero_is_the_best():
    """P takes 0.0 for none."""
    zero, worse = (Checkpoint(Path(f"step-{step}"), step, 1, loss, "words") for step, loss in ((3, 0.0), (6, 0.1)))
    assert checkpoint.best([zero, worse]) is zero


def test_the_time_of_evaluations_is_not_that_of_steps(tmp_path, monkeypatch):
    """O's and K's milliseconds per batch include them."""
    late, clock = [0.0], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])

    class Slow(TransformerXLTask):
        def evaluate(self, model, split, world):
            late[0] += 10_000
            return super().evaluate(model, split, world)

    recipe: Recipe = replace(SHORT, clock=replace(SHORT.clock, eval_interval=1))
    with world() as w:
        train(w, Slow(recipe, corpus()), recipe, Run(tmp_path, w))
    assert late[0] == 50_000
    assert records(tmp_path)[-1]["seconds"] < 5_000
    assert max(x["step_ms"] for x in records(tmp_path)) < 5e6
    assert np.isfinite([x["tokens_per_s"] for x in records(tmp_path)]).all()
