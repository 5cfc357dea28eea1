from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.run import MASTER, Refused, Standing, newest_checkpoint, port_of, read_status, record, standing
from configs import tiny
from engine.values import from_json, override

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def run_dir(tmp_path):
    record(tmp_path / "runs" / "x", tiny.recipe, "the plan", "python launch.py --config=tiny", ("a.b=1",), CHECKOUT)
    return tmp_path / "runs" / "x"


def changed(*overrides: str):
    return override(tiny, *overrides).recipe


def test_what_led_to_a_run_is_kept_with_it(run_dir):
    assert from_json(type(tiny.recipe), json.loads((run_dir / "recipe.json").read_text())) == tiny.recipe
    assert (run_dir / "plan.txt").read_text() == "the plan\n"
    assert "python launch.py --config=tiny\n    a.b=1\n" in (run_dir / "command.txt").read_text()
    assert (run_dir / "logs").is_dir()
    assert not list(run_dir.glob(".*"))


def test_a_second_launch_adds_its_command_and_takes_the_request_to_stop_away(run_dir):
    (run_dir / "stop").touch()
    record(run_dir, tiny.recipe, "another plan", "python launch.py --again", (), CHECKOUT)
    assert len((run_dir / "command.txt").read_text().splitlines()) == 3
    assert not (run_dir / "stop").exists()


def test_a_run_outside_git_says_so(tmp_path):
    record(tmp_path / "run", tiny.recipe, "", "", (), tmp_path)
    assert "is not a git checkout" in (tmp_path / "run" / "commit.txt").read_text()


def test_a_name_is_new_until_a_recipe_has_it(tmp_path):
    assert standing(tmp_path / "nothing", tiny.recipe) == Standing("new")


def checkpoint(folder: Path, step: int, ranks: int = 1, size: int = 3) -> None:
    """A checkpoint of one file of 3 bytes, of which `size` are there."""
    folder.mkdir(parents=True)
    (folder / "model.pt").write_bytes(b"123"[:size])
    (folder / "meta.json").write_text(json.dumps({"step": step, "ranks": ranks, "valid_loss": None, "vocabulary": "",
                                                  "files": {"model.pt": 3}}))


def test_the_same_recipe_goes_on_from_the_newest_whole_checkpoint(run_dir):
    assert str(standing(run_dir, tiny.recipe)) == "starts again, no checkpoint is here"
    folders = run_dir / "checkpoints"
    checkpoint(folders / "step-00000020", 20)
    checkpoint(folders / "step-00000040", 40, ranks=2)
    checkpoint(folders / "step-00000060", 60, size=2)                              # truncated
    checkpoint(folders / ".step-00000080.partial", 80)
    (folders / "step-00000080").mkdir()                                            # without meta.json
    assert newest_checkpoint(run_dir)["step"] == 40
    assert standing(run_dir, tiny.recipe) == Standing("unfinished", 40, ranks=2)
    assert str(standing(run_dir, tiny.recipe)) == "goes on from step 40"


def test_missing_weights_to_start_from_are_noticed_until_there_is_a_checkpoint_to_go_on_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = override(tiny, "recipe.init_from=runs/gone").recipe
    run_dir = Path("runs/x")
    with pytest.raises(Refused, match="There is no checkpoint runs/gone"):
        standing(run_dir, recipe)
    record(run_dir, recipe, "", "", (), tmp_path)
    with pytest.raises(Refused, match="There is no checkpoint runs/gone"):
        standing(run_dir, recipe)
    checkpoint(run_dir / "checkpoints/step-00000020", 20)
    assert standing(run_dir, recipe).step == 20


def test_a_file_that_nothing_makes_must_be_there_before_machines_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = override(tiny, "recipe.data.eval_sets=mail=mail.txt").recipe
    with pytest.raises(Refused, match=r"There is no mail\.txt, which the recipe names and nothing makes"):
        standing(Path("runs/x"), recipe)
    Path("mail.txt").write_text("Dear all,\n")
    assert standing(Path("runs/x"), recipe) == Standing()


def test_a_checkpoint_fetched_without_the_memories_of_ranks_counts(run_dir):
    folder = run_dir / "checkpoints" / "step-00000020"
    checkpoint(folder, 20, ranks=16)
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"]["rank-0.pt"] = 1000
    (folder / "meta.json").write_text(json.dumps(meta))
    assert standing(run_dir, tiny.recipe) == Standing("unfinished", 20, ranks=16)


def test_what_moves_only_the_clock_may_change(run_dir):
    assert standing(run_dir, changed("recipe.clock.log_interval=1")).changes == ("clock.log_interval: 10 -> 1",)


def test_another_recipe_of_that_name_is_refused_with_the_differences(run_dir):
    with pytest.raises(Refused) as refused:
        standing(run_dir, changed("recipe.optim.lr=.02", "recipe.seed=5", "recipe.clock.log_interval=1"))
    assert str(refused.value) == (f"{run_dir} is another run, with another recipe (theirs -> yours):\n"
                                  f"  optim.lr: 0.004 -> 0.02\n  seed: 1111 -> 5\n"
                                  f"Choose another --name, or remove {run_dir}")


def test_a_finished_run_says_what_it_reached(run_dir):
    (run_dir / "status.json").write_text('{"state": "finished", "step": 60, "message": "test ppl 500"}')
    assert str(standing(run_dir, tiny.recipe)) == "finished at step 60, test ppl 500"


@pytest.mark.parametrize("text", ["", "{", "{}", '{"batch": 3}'])
def test_a_spoilt_recipe_is_refused(run_dir, text):
    (run_dir / "recipe.json").write_text(text)
    with pytest.raises(Refused, match="is not a recipe that this version reads"):
        standing(run_dir, tiny.recipe)


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"\xff{}"), lambda path: path.mkdir()])
def test_what_is_not_a_text_is_no_recipe_either(run_dir, spoil):
    (run_dir / "recipe.json").unlink()
    spoil(run_dir / "recipe.json")
    with pytest.raises(Refused, match="is not a recipe that this version reads"):
        standing(run_dir, tiny.recipe)


def test_no_status_is_no_error(run_dir):
    assert read_status(run_dir) == {}
    (run_dir / "status.json").write_text("{")
    assert read_status(run_dir) == {}


def test_weights_that_lie_under_others_must_be_there_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = override(tiny, "recipe.init_from=here", "recipe.init_under=runs/gone").recipe
    (tmp_path / "here").mkdir()
    with pytest.raises(Refused, match="There is no checkpoint runs/gone"):
        standing(Path("runs/x"), recipe)
    assert recipe.inputs[-2:] == ("here", "runs/gone")


def test_launches_that_know_nothing_of_each_other_may_be_told_ports_that_never_meet(monkeypatch):
    def ports() -> set[int]:
        return {port_of(f"run-{i}", MASTER) for i in range(500)}

    monkeypatch.delenv("TXL_PORTS")               # the tests' own
    usual = ports()
    monkeypatch.setenv("TXL_PORTS", "1")
    assert not usual & ports()
