"""What every backend keeps to: launch.py as a person types it, two ranks on two machines, and what is left on the disk.

Nothing here knows a backend: contract_cases.py has them. The judge of a curve is torchrun by hand, without a launcher.
"""
from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.driven import Launcher
from cluster.local import free_port
from configs import tiny
from engine.complete import intact
from engine.values import override, to_json
from tests.cluster.contract_cases import CASES, Case, World
from tests.waiting import until

CHECKOUT = Path(__file__).resolve().parents[2]
STEPS = 300
OVERRIDES = ("recipe.data.dataset=text", "recipe.data.dir=data/little", "recipe.data.vocab=word",
             "recipe.data.n_token=none", f"recipe.stop.max_steps={STEPS}", "recipe.clock.eval_interval=150",
             "recipe.clock.checkpoint_interval=50")
LAUNCH_S = 300                                    # for a launcher to come to what is waited for, on a busy machine
pytestmark = pytest.mark.slow


class Desk:
    """Where the launches of a case are typed."""

    def __init__(self, case: Case, world: World, folder: Path):
        self.case, self.world, self.here, self._screens = case, world, folder / "here", folder
        self._launchers: list[Launcher] = []

    def launch(self, name: str, *flags: str) -> Launcher:
        return self.type(name, shlex.join([
            sys.executable, str(CHECKOUT / "launch.py"), "--config=tiny", f"--backend={self.case.backend}",
            f"--name={name}", *self.world.flags, *(f"--set={override}" for override in OVERRIDES), *flags]))

    def type(self, name: str, command: str) -> Launcher:
        self._launchers.append(Launcher([*two_cores(), *shlex.split(command)], self._screens / f"{name}.screen",
                                        cwd=self.here, env=self.world.env))
        return self._launchers[-1]

    def leave(self) -> None:
        for launcher in self._launchers:
            launcher.kill()                       # of a process that has ended: nothing

    def screen(self, name: str) -> str:
        """All that the launchers of a run have said."""
        return (self._screens / f"{name}.screen").read_text()

    def said(self, name: str, file: str) -> Any:
        return json.loads((self.here / "runs" / name / file).read_text())

    def curve(self, name: str) -> list[tuple[str, int, float]]:
        return curve(self.here / "runs" / name)

    def state(self) -> tuple[dict[Path, bytes], list[object]]:
        """All that there is here, and all that launches have taken so far."""
        files = {path: path.read_bytes() if path.is_file() else b"" for path in self.here.rglob("*")}
        return files, list(self.world.started())


@pytest.fixture(scope="module", params=[pytest.param(case, id=case.backend, marks=pytest.mark.skipif(
    case.lacks is not None, reason=f"{case.backend}: {case.lacks}")) for case in CASES])
def desk(request, tmp_path_factory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp(request.param.backend)
    (folder / "world").mkdir()
    make_text(folder / "here/data/little")
    with request.param.world(folder / "world") as world:
        desk = Desk(request.param, world, folder)
        try:
            yield desk
        finally:
            desk.leave()


@pytest.fixture(scope="module")
def straight(desk) -> Path:
    """The folder of a run that nothing has disturbed."""
    assert desk.launch("straight").wait(LAUNCH_S) == 0, desk.screen("straight")
    return desk.here / "runs/straight"


def test_a_dry_run_prints_the_plan_and_leaves_everything_as_it_is(desk):
    before = desk.state()
    assert desk.launch("dry", "--dry_run").wait(LAUNCH_S) == 0
    assert desk.screen("dry").startswith("run       runs/dry: new\n")
    assert "over 2 rank(s), 4 each" in desk.screen("dry")
    assert desk.state() == before


@pytest.mark.parametrize(("flag", "said"), [
    ("--nmae=x", "There is no flag --nmae. Did you mean '--name'?"),
    ("--set=recipe.optm.lr=1", "Recipe has no field 'optm'. Did you mean 'optim'?"),
    ("--set=recipe.batch.size=1", "leaves some of the 2 ranks without a sequence"),
    ("--checkpoint=runs/gone", "There is no checkpoint runs/gone"),
])
def test_what_cannot_be_is_refused_in_a_line_and_leaves_everything_as_it_is(desk, flag, said):
    before = desk.state()
    assert desk.launch("wrong", flag).wait(LAUNCH_S) == 2
    assert said in desk.screen("wrong")
    assert desk.state() == before


def test_a_run_that_has_ended_is_here_as_a_whole(desk, straight):
    assert {path.name for path in straight.iterdir()} >= {
        "recipe.json", "plan.txt", "command.txt", "commit.txt", "machine.json", "metrics.jsonl", "status.json",
        "checkpoints", "logs", "tensorboard"}
    assert not (straight / "stop").exists()
    assert desk.said("straight", "recipe.json") == to_json(override(tiny, *OVERRIDES).recipe)
    assert {(straight / "logs" / f"{name}.log").exists() for name in ("node-0", "node-1", "rank-0", "rank-1")} == {True}
    assert list((straight / "tensorboard").glob("events.*"))
    assert "data/little" in (straight / "command.txt").read_text()
    assert desk.said("straight", "machine.json").items() >= {"ranks": 2, "threads": 1}.items()
    whole = filter(None, map(intact, (straight / "checkpoints").iterdir()))
    assert {meta["step"] for meta in whole} == {STEPS - 50, STEPS}               # the newest two


def test_the_screen_shows_the_plan_the_log_of_rank_0_and_the_end(desk, straight):
    screen, plan, log = (desk.screen("straight"), *((straight / name).read_text() for name in
                                                     ("plan.txt", "logs/rank-0.log")))
    status = desk.said("straight", "status.json")
    assert (status["state"], status["step"]) == ("finished", STEPS)
    assert screen.startswith(plan)
    assert [line for line in screen.splitlines() if line in log.splitlines()] == log.splitlines()
    assert screen.endswith(f"Finished at step {STEPS}: {status['message']}. Everything is in runs/straight\n")


def test_it_loses_what_torchrun_by_hand_loses_to_the_last_digit(desk, straight, by_hand):
    assert desk.curve("straight") == by_hand
    assert len(by_hand) == STEPS // 10 + 2 + 1                                   # train, valid, test


def test_the_same_command_again_says_that_the_run_is_finished_and_does_nothing(desk, straight):
    before = desk.state()
    assert desk.launch("straight").wait(LAUNCH_S) == 0
    assert desk.screen("straight").endswith(
        "Nothing to do: runs/straight is finished. For another run, another --name.\n")
    assert desk.state() == before


def test_another_recipe_under_that_name_is_refused_with_the_difference(desk, straight):
    before = desk.state()
    assert desk.launch("straight", "--set=recipe.seed=7").wait(LAUNCH_S) == 2
    assert "seed: 1111 -> 7" in desk.screen("straight")
    assert desk.state() == before


def test_ctrl_c_saves_and_the_command_it_prints_goes_on_though_the_launcher_is_killed_to_the_same_end(
        desk, by_hand):
    run_dir = desk.here / "runs/disturbed"
    first = desk.launch("disturbed")
    first.until("^step ", LAUNCH_S)
    first.ctrl_c()
    stopped = first.until(rf"^Stopped at step (\d+) of {STEPS}\. Go on with:  (.*)", LAUNCH_S)
    step, go_on = int(stopped[1]), stopped[2]
    assert first.wait(LAUNCH_S) == 130
    assert 0 < step < STEPS
    assert desk.said("disturbed", "status.json").items() >= {"state": "stopped", "step": step}.items()
    assert intact(run_dir / f"checkpoints/step-{step:08}")
    assert not (run_dir / "stop").exists()

    second = desk.type("disturbed", go_on)
    second.until(f"resuming from .*step {step}$", LAUNCH_S)
    second.kill()
    third = desk.type("disturbed", go_on)
    if not desk.case.follows and third.wait(LAUNCH_S) == 2:
        assert "runs/disturbed is running" in desk.screen("disturbed")
        until(lambda: desk.said("disturbed", "status.json")["state"] == "finished", LAUNCH_S)
        third = desk.type("disturbed", go_on)
    assert third.wait(LAUNCH_S) == 0, desk.screen("disturbed")
    assert desk.said("disturbed", "status.json")["state"] == "finished"
    assert desk.curve("disturbed") == by_hand
    assert (run_dir / "logs/rank-0.log").read_text().count("resuming from") == 1          # it was not disturbed by that


def test_a_training_that_fails_is_told_with_its_reason_and_how_to_go_on(desk):
    failing = desk.launch("failing", "--set=recipe.optim.lr=1e30")
    assert failing.wait(LAUNCH_S) == 1
    screen, status = desk.screen("failing"), desk.said("failing", "status.json")
    assert status["state"] == "failed"
    assert re.match(r"Diverged: At step \d+ the loss of rank \d was ", status["message"])
    assert status["message"] in screen
    assert re.search(r"There is no checkpoint yet\. Once it is mended, go on with:  .*launch\.py .*--name=failing ",
                     screen.splitlines()[-1])


def make_text(folder: Path) -> None:
    """Texts so small that evaluating costs nothing, the same each time, from which something can be learnt."""
    folder.mkdir(parents=True)
    chance = random.Random(7)
    for split, count in (("train", 20000), ("valid", 2000), ("test", 2000)):
        words = [f"w{min(199, int(chance.paretovariate(.7)))}" for _ in range(count)]
        lines = (" ".join(words[i:i + 20]) for i in range(0, count, 20))
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")


def train_by_hand(folder: Path) -> None:
    """The recipe with two ranks, by torchrun alone, in `folder`/runs/x."""
    make_text(folder / "data/little")
    (folder / "runs/x").mkdir(parents=True)
    (folder / "runs/x/recipe.json").write_text(json.dumps(to_json(override(tiny, *OVERRIDES).recipe)))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
                    f"--master-port={free_port()}", "-m", "txl.train", "runs/x/recipe.json"], cwd=folder, check=True,
                   env=os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                   timeout=LAUNCH_S)


def curve(run_dir: Path) -> list[tuple[str, int, float]]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(record["kind"], record["step"], record["loss"]) for record in records]


def two_cores() -> list[str]:
    """One for each rank of a launch here, however many there are: then a rank has one thread."""
    cores = sorted(os.sched_getaffinity(0))
    some = ",".join(map(str, random.sample(cores, k=min(2, len(cores)))))
    return ["taskset", "--cpu-list", some] if shutil.which("taskset") else []
