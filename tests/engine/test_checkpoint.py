"""Checkpoints: whole or not there, the best and the newest kept, nothing executed on loading."""
from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cluster.run import newest_and_best
from engine import checkpoint
from engine.checkpoint import CheckpointError
from engine.world import World
from tests.ranks import run_ranks

ALONE = World(0, 0, 1, torch.device("cpu"))


def meta(valid_loss=None):
    return {"valid_loss": valid_loss, "vocabulary": "v"}


def save(folder, step, valid_loss=None, keep=2, size=3):
    shared = {"x": torch.full((size,), float(step))}
    checkpoint.save(ALONE, folder, step, shared, {"rank": 0}, meta(valid_loss), keep)
    return checkpoint.read(folder / f"step-{step:08d}")


def steps(folder):
    return [c.step for c in checkpoint.complete(folder)]


def test_what_was_saved_comes_back(tmp_path):
    saved = save(tmp_path, 7, valid_loss=3.5)
    found, = checkpoint.complete(tmp_path)
    assert found == saved
    assert (found.step, found.ranks, found.valid_loss, found.vocabulary) == (7, 1, 3.5, "v")
    assert torch.equal(found.shared()["x"], torch.full((3,), 7.0))
    assert found.of_rank(0) == {"rank": 0}


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, loss in ((1, 5.0), (2, 3.0), (3, None), (4, 4.0), (5, None), (6, 3.0)):
        save(tmp_path, step, loss)
    assert steps(tmp_path) == [2, 5, 6]
    assert checkpoint.best(checkpoint.complete(tmp_path)).step == 2


def test_other_machines_are_brought_what_the_trainer_goes_on_from_and_tests_with(tmp_path):
    assert newest_and_best(tmp_path) == []
    for step, loss in ((1, 5.0), (2, 3.0), (3, None), (4, 4.0), (5, None), (6, 3.0)):
        save(tmp_path / "checkpoints", step, loss, keep=10)
        there = checkpoint.complete(tmp_path / "checkpoints")
        wanted = {there[-1].path} | ({checkpoint.best(there).path} if any(c.valid_loss for c in there) else set())
        assert set(newest_and_best(tmp_path)) == wanted


@pytest.mark.parametrize("damage", ["truncate", "remove_file", "remove_meta", "garble_meta"])
def test_a_damaged_checkpoint_is_not_there(tmp_path, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2).path
    if damage == "truncate":
        os.truncate(path / "model.pt", 100)
    elif damage == "remove_file":
        (path / "model.pt").unlink()
    elif damage == "remove_meta":
        (path / "meta.json").unlink()
    else:
        (path / "meta.json").write_text('{"step": ')
    assert steps(tmp_path) == [1]
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        checkpoint.read(path)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 100)])
def test_without_a_ranks_own_file_the_checkpoint_is_there_and_the_rank_has_nothing(tmp_path, damage):
    found = save(tmp_path, 2)
    damage(found.path / "rank-0.pt")
    assert steps(tmp_path) == [2]
    assert found.of_rank(0) is None


def test_a_ranks_file_of_another_save_of_the_same_step_is_not_taken(tmp_path):
    found, other = save(tmp_path / "one", 2), save(tmp_path / "other", 2)
    shutil.rmtree(found.path)
    other.path.rename(found.path)
    assert found.of_rank(0) is None
    assert checkpoint.read(found.path).of_rank(0) == {"rank": 0}


def test_bytes_that_changed_without_changing_length_are_an_error_that_names_the_file(tmp_path):
    path = save(tmp_path, 2).path / "model.pt"
    path.write_bytes(os.urandom(path.stat().st_size))
    with pytest.raises(CheckpointError, match=r"model\.pt is damaged .* Remove .*step-00000002"):
        checkpoint.complete(tmp_path)[0].shared()


def test_loading_executes_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)
    path = save(tmp_path, 2).path / "model.pt"
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    about = path.parent / "meta.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"files": {"model.pt": path.stat().st_size}}))
    with pytest.raises(CheckpointError):
        checkpoint.complete(tmp_path)[0].shared()
    assert not (tmp_path / "executed").exists()


def test_a_writer_killed_at_any_moment_leaves_the_one_before_it(tmp_path):
    save(tmp_path, 1)
    code = ("import sys, torch; sys.path.insert(0, sys.argv[2]); from tests.engine import test_checkpoint as t\n"
            "from pathlib import Path\n"
            "for step in range(2, 10**6): t.save(Path(sys.argv[1]), step, size=2_000_000)")
    checkout = Path(__file__).parents[2]
    for delay in (0.0, 0.011, 0.023, 0.037):
        writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(checkout)])
        while steps(tmp_path)[-1] == 1:
            assert writer.poll() is None, "the writer itself failed"
            time.sleep(0.01)                                      # until it has begun
        time.sleep(delay)
        writer.kill()
        writer.wait()
        found = checkpoint.complete(tmp_path)
        assert found
        for each in found:
            assert torch.equal(each.shared()["x"][:3], torch.full((3,), float(each.step)))
        for each in found:
            if each.step > 1:
                each.path.rename(tmp_path / "away")
                subprocess.run(["rm", "-rf", str(tmp_path / "away")], check=True)
        if not steps(tmp_path):
            save(tmp_path, 1)
    save(tmp_path, 10**6)
    assert not list(tmp_path.glob(".step-*")), "what killed writers left behind is swept"


class FullDisk(dict):
    """Cannot be written: what the operating system says of a full disk comes in the middle."""
    def __reduce__(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_a_killed_writer_left_of_the_same_step_does_not_get_in(tmp_path):
    """It had got as far as meta.json, and with another rank's file."""
    partial = tmp_path / ".step-00000003.partial"
    partial.mkdir()
    (partial / "meta.json").write_text("{}")
    (partial / "rank-1.pt").write_text("another's")
    save(tmp_path, 3)
    assert steps(tmp_path) == [3]
    assert sorted(x.name for x in (tmp_path / "step-00000003").iterdir()) == ["meta.json", "model.pt", "rank-0.pt"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    os.truncate(save(tmp_path, 3).path / "model.pt", 10)
    assert steps(tmp_path) == []
    save(tmp_path, 3)
    assert steps(tmp_path) == [3]


def test_weights_of_another_vocabulary_are_refused(tmp_path):
    found = save(tmp_path, 1)
    found.check_vocabulary("v")
    with pytest.raises(CheckpointError, match="trained on another vocabulary"):
        found.check_vocabulary("w")


def test_a_full_disk_is_an_error_and_earlier_checkpoints_stay(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"No space left on device.*Earlier checkpoints are untouched"):
        checkpoint.save(ALONE, tmp_path, 2, {"x": FullDisk()}, {}, meta(), 2)
    assert steps(tmp_path) == [1]
    assert not list(tmp_path.glob(".step-*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_what_the_disk_says_is_not_lost_in_what_torch_says_of_it():
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint._write(Path("/dev/full"), {"x": torch.zeros(1_000_000)})


def _save_with_one_full_disk(folder):
    from engine.world import world
    with world() as w:
        try:
            checkpoint.save(w, folder, 5, {"x": 1}, FullDisk() if w.rank == 1 else {}, meta(), 2)
        except CheckpointError as error:
            return str(error)


def test_when_one_rank_cannot_write_all_ranks_fail_together(tmp_path):
    first, second = run_ranks(2, _save_with_one_full_disk, tmp_path)
    assert "1 other rank(s) failed" in first
    assert "No space left" in second
    assert steps(tmp_path) == []


def test_a_run_is_found_by_its_folder_or_its_checkpoints(tmp_path):
    run = tmp_path / "run"
    save(run / "checkpoints", 1, 2.0)
    newest = save(run / "checkpoints", 2, 3.0)
    assert checkpoint.find(run).step == 1
    assert checkpoint.find(newest.path).step == 2
    with pytest.raises(CheckpointError, match="No checkpoint at"):
        checkpoint.find(tmp_path / "nothing")
