"""`--ray`: a real Ray that a launch starts on machines, here sshds on loopback, and its parts without a launch."""
from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import launch
from cluster import ray_gang
from cluster.backends import Wish
from cluster.driven import Launcher
from cluster.host.ray_node import ENDED, TOKEN
from cluster.local import free_port
from cluster.run import NEW
from cluster.spec import Terms
from configs import tiny
from engine.cli import parse
from engine.values import BadValue, override, to_json
from tests.cluster import ray_bench
from tests.cluster.contract_cases import ssh
from tests.cluster.sshd import LACKS
from tests.cluster.test_contract import CHECKOUT, LAUNCH_S, OVERRIDES, curve, make_text
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(ray_bench.LACKS is not None, reason=str(ray_bench.LACKS))]


def processes(mark: bytes) -> dict[int, bytes]:
    """Those with `mark` in their environment: their command lines."""
    found = {}
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (proc / "environ").read_bytes():
                found[int(proc.name)] = (proc / "cmdline").read_bytes()
    return found


@pytest.mark.skipif(LACKS is not None, reason=str(LACKS))
def test_a_rank_that_dies_starts_again_ctrl_c_ends_ray_and_the_same_command_leaves_the_curve_as_it_is(
        tmp_path, by_hand):
    here = tmp_path / "here"
    make_text(here / "data/little")
    (tmp_path / "world").mkdir()
    with ssh(tmp_path / "world") as world:
        command = [sys.executable, str(CHECKOUT / "launch.py"), "--config=tiny", "--backend=ssh", "--ray", "--name=x",
                   *world.flags, *(f"--set={override}" for override in OVERRIDES)]
        first = Launcher(command, tmp_path / "first", cwd=here, env=world.env)
        try:
            page = first.until(r"^Ray's dashboard: (http://127.0.0.1:\d+)$", LAUNCH_S)[1]
            first.until("^step 1[0-9]0/", LAUNCH_S)
            homes = sorted(Path(world.env["TXL_HOME"]).parent.glob("m/*/home"))
            token_file = homes[0] / "txl/runs/x" / TOKEN
            token = token_file.read_text().encode()
            assert token_file.stat().st_mode & 0o777 == 0o600
            assert closed(page) == 401
            its = processes(token)                # who knows the token, by its environment
            assert its
            assert not [line for line in its.values() if token in line]
            assert nodes(page, token.decode()) == {"0", "1"}
            ranks = {home: [pid for pid in its if b"RayTrainWorker" in its[pid] and pid in processes(bytes(home))]
                     for home in homes}
            assert [len(found) for found in ranks.values()] == [1, 1]
            os.kill(ranks[homes[1]][0], signal.SIGKILL)
            first.until("^resuming from .*step", LAUNCH_S)
            first.until("^step 2[0-9]0/", LAUNCH_S)
            first.ctrl_c()
            assert first.wait(LAUNCH_S) == 130
            assert until(lambda: not processes(token))
            second = Launcher(command, tmp_path / "second", cwd=here, env=world.env)
            second.until("^resuming from .*step", LAUNCH_S)
            assert second.wait(LAUNCH_S) == 0, (tmp_path / "second").read_text()
            assert token_file.read_bytes() != token
        finally:
            first.kill()
        assert curve(here / "runs/x") == by_hand
        assert "Ray has started the ranks again" in (here / "runs/x/logs/node-0.log").read_text()
        told = [token, token_file.read_bytes()]
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != token_file.name
                    and any(secret in path.read_bytes() for secret in told)]


def closed(page: str) -> int:
    """The status with which a dashboard turns somebody away who has no token."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{page}/api/v0/nodes", timeout=30)
    return refused.value.code


def nodes(page: str, token: str) -> set[str]:
    """Which of our nodes Ray has, by their labels."""
    request = urllib.request.Request(f"{page}/api/v0/nodes?detail=1", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        said = json.load(answer)["data"]["result"]["result"]
    return {node["labels"]["txl-node"] for node in said if node["state"] == "ALIVE"}


class Seats:
    """Machines that are no more than a home folder and an address of loopback, each with its part of one cluster."""

    def __init__(self, folder: Path, count: int, *sets: str):
        values = dict(assignment.split("=") for assignment in (f"machines.count={count}", *OVERRIDES, *sets))
        wish = Wish("x", override(tiny, *map("=".join, values.items())), NEW, Terms(ray=True))
        told, port = ray_gang.told(wish, count, "1"), free_port()
        told["runs/x/recipe.json"] = json.dumps(to_json(wish.config.recipe))
        self.homes, self.processes = [folder / str(i) for i in range(count)], []
        for i, home in enumerate(self.homes):
            make_text(home / "txl/data/little")
            (home / "txl/runs/x/nodes").mkdir(parents=True)
            for package in ("cluster", "engine", "txl"):
                (home / "txl" / package).symlink_to(CHECKOUT / package)
            for name, text in told.items():
                (home / "txl" / name).write_text(text)
            command = ray_gang.command(sys.executable, "x", i, f"127.77.0.{i + 1}", "127.77.0.1", port)
            with open(home / "log", "wb") as log:
                self.processes.append(subprocess.Popen(
                    [sys.executable, "-c", HASTY, *command[3:]], cwd=home / "txl", stdout=log, stderr=log,
                    start_new_session=True, env=os.environ | {"HOME": str(home), "OMP_NUM_THREADS": "1"}))

    @property
    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def log(self, i: int) -> str:
        return (self.homes[i] / "log").read_text()

    def of(self, i: int, what: bytes) -> list[int]:
        return [pid for pid, line in processes(b"HOME=" + bytes(self.homes[i]) + b"\0").items() if what in line]


# ray_node, but a machine that is missing is waited for less long.
HASTY = """
import sys
from cluster.host import ray_node
ray_node.MISSED_S = 5
sys.exit(ray_node.main(sys.argv[1:]))
"""


@pytest.fixture
def seats(tmp_path) -> Iterator[type]:
    made = []

    def start(count: int, *sets: str) -> Seats:
        made.append(Seats(tmp_path, count, *sets))
        return made[-1]
    yield start
    for process in [process for one in made for process in one.processes]:
        process.terminate()
        process.wait(LAUNCH_S)
    for home in [home for one in made for home in one.homes]:
        for pid in processes(b"HOME=" + bytes(home) + b"\0"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_where_a_machine_is_lost_all_end_and_say_so(seats):
    both = seats(2, "recipe.stop.max_steps=100000")
    progress = both.homes[0] / "txl/runs/x/logs/rank-0.log"
    until(lambda: both.ended or (progress.exists() and "step 10/" in progress.read_text()), limit_s=LAUNCH_S)
    for pid in both.of(1, b"raylet"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert [process.wait(LAUNCH_S) for process in both.processes] == [1, 1]
    assert "Ray has ended on this machine" in both.log(1)
    assert "1 of 2 machines have left Ray" in both.log(0)
    assert not both.of(0, b"ray")
    assert not both.of(1, b"ray")


def test_what_the_trainer_calls_wrong_is_the_status_on_every_machine(seats):
    both = seats(2, "recipe.data.dir=data/none")
    assert [process.wait(LAUNCH_S) for process in both.processes] == [1, 1]
    assert re.search(r"Root Cause .*\n.*\n  rank      : \d\n  exitcode  : 1", both.log(0))
    assert "data/none" in both.log(0)
    assert json.loads((both.homes[1] / "txl/runs/x" / ENDED).read_text())["status"] == 1


# ray_node, where something else stands for `ray start`, and all is to be there within 2 s.
FAKED = """
import sys
from cluster.host import ray_node
ray_node.JOIN_S, ray_node.command = 2, lambda *_: ["sh", "-c", sys.argv[1]]
sys.exit(ray_node.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("node", "ray", "said", "tries"), [
    (0, "exec sleep 60", "After 2 s 0 of 2 machines have joined Ray.", {1}),
    (1, "exec sleep 60", "Nothing answers at 127.0.0.1:9, where node 0 is to be, after 2 s", {0}),
    (0, "exit 7", "Ray has ended on this machine, with status 7.", set(range(2, 20))),
    (0, "echo Ray runtime started.; exit 7", "Ray has ended on this machine, with status 7.", {1}),
])
def test_who_does_not_come_is_waited_for_in_vain_and_a_ray_that_has_not_run_is_started_again(
        tmp_path, node, ray, said, tries):
    (tmp_path / "x/nodes").mkdir(parents=True)
    (tmp_path / "x/nodes/ray.token").write_text("secret")
    (tmp_path / "x/ray_job.json").write_text(json.dumps({"ranks": 2, "per_machine": 1, "dashboard_port": 9}))
    done = subprocess.run([sys.executable, "-c", FAKED, f"echo >> tries; {ray}", "x", f"--node={node}",
                           "--address=127.0.0.1", "--head=127.0.0.1:9"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(CHECKOUT)}, timeout=LAUNCH_S)
    assert (done.returncode, said in done.stdout) == (1, True), done
    log = tmp_path / "tries"
    assert (len(log.read_text().splitlines()) if log.exists() else 0) in tries


@pytest.mark.parametrize("backend", ["local", "slurm", "ray"])
def test_it_is_for_machines_that_a_launch_starts_things_on(tmp_path, monkeypatch, backend):
    monkeypatch.chdir(tmp_path)
    flags = parse(launch.Flags, ["--config=tiny", f"--backend={backend}", "--ray"], prog="", about="")
    with pytest.raises(BadValue, match=re.escape(f"--ray: not for --backend={backend}, only for --backend=aws and")):
        launch.make_plan(flags, tiny)
