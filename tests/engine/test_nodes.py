"""Nodes with a disk each: one run in several folders, resumed from the leading rank's."""
from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import checkpoint
from engine.checkpoint import CheckpointError
from engine.config import Clock, Stop
from engine.loop import train
from engine.run import Run
from engine.world import world
from tests.engine.test_checkpoint import ALONE, FullDisk, meta
from tests.engine.test_loop import Worsening, assert_same_run, final_weights, losses, same
from tests.ranks import run_ranks
from tests.txl.small import RECIPE, corpus, train_here
from txl.task import TransformerXLTask

RUN = Path("run")                                                 # in each node's own directory
SHORT = replace(RECIPE, stop=Stop(max_steps=10))
BEFORE, NEWEST = "step-00000003", "step-00000005"                 # of a run that was stopped after 5 steps


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    root = tmp_path_factory.mktemp("stopped")
    run_ranks(2, train_on_nodes, root, 1, SHORT, 5)
    return root


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """Two nodes of one rank whose run was stopped after 5 steps."""
    shutil.copytree(stopped_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The same run on one disk, never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    run_ranks(2, train_here, folder, SHORT)
    return folder


def go_to_node(root: Path, per_node: int) -> None:
    """Makes this rank one of several on a machine: the directory is all that tells machines apart."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(rank % per_node)
    folder = root / f"node-{rank // per_node}"
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)


def train_on_nodes(root: Path, per_node: int, recipe=SHORT, stop_after: int | None = None):
    go_to_node(root, per_node)
    return train_here(RUN, recipe, None, stop_after)


def train_on_one_disk(folder: Path, per_node: int, stop_after: int | None = None):
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % per_node)
    return train_here(folder, SHORT, None, stop_after)


def files(root: Path, node: int, step: str = NEWEST) -> list[str]:
    return sorted(path.name for path in (root / f"node-{node}" / RUN / "checkpoints" / step).iterdir())


def gathered(root: Path, nodes: int, to: Path) -> Path:
    """The run as one disk would have it: every node's files of ranks beside the leading rank's."""
    shutil.copytree(root / "node-0" / RUN, to)
    for node in range(1, nodes):
        for path in (root / f"node-{node}" / RUN / "checkpoints").glob("step-*/rank-*.pt"):
            shutil.copy(path, to / "checkpoints" / path.parent.name)
    return to


def log(root: Path, rank: int = 0, node: int = 0) -> str:
    return (root / f"node-{node}" / RUN / "logs" / f"rank-{rank}.log").read_text()


def test_on_disks_of_their_own_stopped_and_resumed_equals_one_disk_never_stopped_bit_for_bit(stopped, straight):
    assert files(stopped, 0) == ["meta.json", "model.pt", "rank-0.pt"]
    assert files(stopped, 1) == ["meta.json", "rank-1.pt"]
    run_ranks(2, train_on_nodes, stopped, 1)
    assert_same_run(straight, gathered(stopped, 2, stopped / "gathered"), ranks=2)
    assert "memories start empty" not in log(stopped)


@pytest.mark.slow
def test_four_ranks_on_two_disks_equal_four_on_one_that_stop_at_the_same_step(tmp_path):
    """Only such runs are equal to the bit: sums of more than two ranks depend on when DDP laid its buckets out."""
    run_ranks(4, train_on_one_disk, tmp_path / "one", 2, 5)
    run_ranks(4, train_on_nodes, tmp_path, 2, SHORT, 5)
    ranks = [f"rank-{rank}.pt" for rank in range(4)]
    assert sorted(path.name for path in (tmp_path / "one" / "checkpoints" / NEWEST).iterdir()) == [
        "meta.json", "model.pt", *ranks]
    assert files(tmp_path, 0) == ["meta.json", "model.pt", *ranks[:2]]
    assert files(tmp_path, 1) == ["meta.json", *ranks[2:]]
    run_ranks(4, train_on_one_disk, tmp_path / "one", 2)
    run_ranks(4, train_on_nodes, tmp_path, 2)
    assert_same_run(tmp_path / "one", gathered(tmp_path, 2, tmp_path / "gathered"), ranks=4)


def test_every_node_keeps_what_the_leading_one_keeps(tmp_path):
    recipe = replace(SHORT, clock=Clock(log_interval=4, eval_interval=4, checkpoint_interval=3, keep_checkpoints=1))
    leftover = tmp_path / "node-1" / RUN / "checkpoints" / ".step-00000003.0123456789abcdef.partial"
    leftover.mkdir(parents=True)                                  # of a start that was killed as it wrote
    (leftover / "rank-1.pt").write_text("half")
    (leftover.parent / "step-00000099").mkdir()                   # of a life that the leading node does not know
    run_ranks(2, train_on_nodes, tmp_path, 1, recipe)
    best = checkpoint.find(tmp_path / "node-0" / RUN)
    first, second = (sorted(p.name for p in (tmp_path / f"node-{i}" / RUN / "checkpoints").iterdir()) for i in (0, 1))
    assert first == second == [checkpoint.name(step) for step in sorted({best.step, 10})]


def lose_disk(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints.parent)


def lose_file(checkpoints: Path) -> None:
    (checkpoints / NEWEST / "rank-1.pt").unlink()


def truncate_file(checkpoints: Path) -> None:
    os.truncate(checkpoints / NEWEST / "rank-1.pt", 100)


def put_another_save(checkpoints: Path) -> None:
    path = checkpoints / NEWEST / "meta.json"
    path.write_text(path.read_text().replace('"nonce": "', '"nonce": "f'))


@pytest.mark.parametrize("lose", [lose_disk, lose_file, truncate_file, put_another_save])
def test_a_node_without_its_memories_costs_the_memories_of_all_but_not_the_step(stopped, lose):
    lose(stopped / "node-1" / RUN / "checkpoints")
    first, second = run_ranks(2, train_on_nodes, stopped, 1)
    assert first.finished
    assert second.finished
    assert "step 5\nrank-R.pt is missing or damaged on the machine of rank(s) 1: memories start empty" in log(stopped)
    assert [step for kind, step, _, _ in losses(stopped / "node-0" / RUN) if kind == "train"] == [4, 8, 10]


def test_without_a_whole_model_in_the_newest_all_nodes_go_on_from_the_one_before(stopped, straight):
    os.truncate(stopped / "node-0" / RUN / "checkpoints" / NEWEST / "model.pt", 100)
    run_ranks(2, train_on_nodes, stopped, 1)
    assert f"resuming from {RUN / 'checkpoints' / BEFORE}, step 3" in log(stopped)
    shutil.rmtree(stopped / "node-0" / RUN / "checkpoints" / NEWEST)
    assert_same_run(straight, gathered(stopped, 2, stopped / "gathered"), ranks=2)


def test_without_the_leading_disk_the_run_begins_again(stopped):
    shutil.rmtree(stopped / "node-0" / RUN)
    run_ranks(2, train_on_nodes, stopped, 1, SHORT, 2)
    assert "resuming" not in log(stopped)
    assert [path.name for path in (stopped / "node-1" / RUN / "checkpoints").iterdir()] == ["step-00000002"]


def _error(root, recipe=SHORT):
    try:
        train_on_nodes(root, 1, recipe)
    except CheckpointError as error:
        return str(error)


def test_a_model_whose_bytes_changed_ends_all_ranks_with_its_name(stopped):
    path = stopped / "node-0" / RUN / "checkpoints" / NEWEST / "model.pt"
    path.write_bytes(os.urandom(path.stat().st_size))
    first, second = run_ranks(2, _error, stopped)
    assert first == second
    assert f"{RUN / 'checkpoints' / NEWEST / 'model.pt'} is damaged" in first


def _worsen(root):
    """The test's loss of a run whose first checkpoint is its best, and the loss of those weights alone."""
    go_to_node(root, 1)
    recipe = replace(SHORT, clock=replace(SHORT.clock, eval_interval=5))
    with world() as w:
        outcome = train(w, Worsening(recipe, corpus()), recipe, Run(RUN, w))
    found = checkpoint.find(root / "node-0" / RUN)
    task = TransformerXLTask(recipe, corpus())
    net = task.build().eval()
    net.load_state_dict(found.shared()["model"])
    return found.step, outcome.test.loss, task.evaluate(net, "test", ALONE).loss


def test_the_test_is_of_the_best_weights_on_every_node(tmp_path):
    for step, tested, alone in run_ranks(2, _worsen, tmp_path):
        assert step == 5
        assert tested == pytest.approx(alone)


def test_a_warm_start_needs_the_weights_on_the_leading_disk_only(tmp_path):
    train_here(tmp_path / "node-0" / "first")
    source = checkpoint.find(tmp_path / "node-0" / "first")
    recipe = replace(SHORT, init_from="first", optim=replace(SHORT.optim, lr=0.0))
    run_ranks(2, train_on_nodes, tmp_path, 1, recipe, 2)
    same(final_weights(tmp_path / "node-0" / RUN), source.shared()["model"])


def test_a_warm_start_from_nowhere_ends_all_ranks_with_the_reason(tmp_path):
    first, second = run_ranks(2, _error, tmp_path, replace(SHORT, init_from="first"))
    assert first == second
    assert "No checkpoint at first" in first


def _save_twice(root, per_node, break_it):
    """A good checkpoint, then one which the last node's first rank cannot write. What each rank was told."""
    go_to_node(root, per_node)
    with world() as w:
        shared, own = {"x": torch.ones(3)}, {"rank": w.rank}
        checkpoint.save(w, Path("checkpoints"), 4, shared, own, meta(), 1)
        if w.rank == w.size - per_node:
            own = break_it(Path("checkpoints"), own)
        try:
            checkpoint.save(w, Path("checkpoints"), 5, shared, own, meta(), 1)
        except CheckpointError as error:
            return str(error)


def full_disk(checkpoints: Path, own: dict) -> dict:
    return FullDisk()


def folder_replaced_by_a_file(checkpoints: Path, own: dict) -> dict:
    checkpoints.rename("away")
    checkpoints.touch()
    return own


@pytest.mark.parametrize(("ranks", "per_node"), [(2, 1), (4, 2)])
@pytest.mark.parametrize(("break_it", "said", "where"), [(full_disk, "No space left", "checkpoints"),
                                                         (folder_replaced_by_a_file, "Not a directory", "away")])
def test_a_disk_that_fails_on_one_node_ends_all_and_leaves_what_was_there(tmp_path, ranks, per_node, break_it, said,
                                                                           where):
    errors = run_ranks(ranks, _save_twice, tmp_path, per_node, break_it)
    assert said in errors[-per_node]
    assert all("could not be written" in error for error in errors)
    for node, folder in ((0, "checkpoints"), (1, where)):
        assert [path.name for path in (tmp_path / f"node-{node}" / folder).iterdir()] == ["step-00000004"]
    assert checkpoint.complete(tmp_path / "node-0" / "checkpoints")[0].step == 4
