"""The supervisor as a process, with small shell commands in torchrun's place."""
from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from cluster import run
from cluster.host import supervisor
from cluster.rehearsal import keeper
from tests.disks import fill, small_disk
from tests.waiting import until

SOURCE = supervisor.__file__
SLEEPS = "echo here; sleep 60"
ASKED = "trap 'echo asked; exit 7' TERM; echo here; while :; do sleep 0.05; done"


class Node:
    """A machine's home, in which node 0 of the run x.1 is to run."""

    def __init__(self, home: Path):
        self.home, self.run_dir = home, home / "runs/x.1"
        self.lease = home / "var/lib/txl/lease"
        (self.run_dir / "nodes").mkdir(parents=True)
        self.lease.mkdir(parents=True)
        self.env = os.environ | {"TXL_ROOT": str(home), "TXL_TMUX": "0", "TMUX_TMPDIR": str(home)}
        self.started: list[subprocess.Popen] = []

    def launches(self, script: str, launch: str = "first", private: str = "127.16.0.1", **others):
        (self.run_dir / "nodes/0.launch.json").write_text(json.dumps(
            {"launch": launch, "command": ["sh", "-c", script], "env": {}, "private": private, "tensorboard": None}
            | others))

    def starts(self, script: str | None = None, *flags: str, **launch) -> subprocess.Popen:
        if script is not None:
            self.launches(script, **launch)
        self.started.append(subprocess.Popen(
            [sys.executable, SOURCE, *flags, "runs/x.1", "0"], cwd=self.home, env=self.env, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True))
        return self.started[-1]

    def ends(self, script: str | None = None, *flags: str, **launch) -> tuple[int, str]:
        """Exit status and what it said."""
        process = self.starts(script, *flags, **launch)
        return process.wait(120), process.stdout.read()

    @property
    def told(self) -> dict:
        path = self.run_dir / "nodes/0.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def log(self) -> str:
        path = self.run_dir / "logs/node-0.log"
        return path.read_text() if path.exists() else ""

    def logs(self, word: str):
        until(lambda: word in self.log.splitlines())

    def alive(self, word: str) -> list[int]:
        """Processes of this machine whose command line has the word."""
        return [pid for pid in keeper.processes(self.home) if word.encode() in keeper.command(pid)]


class Clock:
    """In the place of the module time: the test moves it."""
    now, date = 1000.0, 1e9
    strftime, sleep = staticmethod(time.strftime), staticmethod(time.sleep)

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.date


@pytest.fixture
def node(tmp_path):
    n = Node(tmp_path)
    yield n
    keeper.end(n.home)
    for process in n.started:
        process.wait()
        process.stdout.close()


def _kill(pid: int):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def ended(node: Node) -> int:
    return until(lambda: node.told.get("state") == "ended") and node.told["status"]


@pytest.mark.parametrize(("last", "status", "exits", "state"), [
    ("exit 0", 0, 0, "succeeded"), ("exit 3", 3, 3, "failed"), ("kill -9 $$", -9, 137, "failed")])
def test_it_ends_as_its_command_ends_and_tells_launcher_and_watchdog(node, last, status, exits, state):
    assert node.ends(f"echo done; {last}")[0] == exits
    assert {name: node.told[name] for name in ("launch", "state", "status")} == {
        "launch": "first", "state": "ended", "status": status}
    assert json.loads((node.lease / "run").read_text())["state"] == state
    begin, end = node.log.splitlines()
    when, command = begin.removeprefix(f"{run.LAUNCHED} ").split(": ", 1)
    assert abs(datetime.strptime(when, "%Y-%m-%d %H:%M:%S %z").timestamp() - time.time()) < 60
    assert (command, end) == (f"sh -c 'echo done; {last}'", "done")


def test_while_it_runs_it_beats(node):
    process = node.starts(SLEEPS)
    node.logs("here")
    first = until(lambda: node.told)
    assert (first["launch"], first["state"], first["status"], first["pid"]) == ("first", "running", None, process.pid)
    assert abs(first["at"] - time.time()) < 60
    until(lambda: node.told["beat"] >= first["beat"] + 2)
    assert json.loads((node.lease / "run").read_text())["state"] == "running"


def test_the_lease_changes_each_20_seconds_whatever_the_date_does(node, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(supervisor, "time", clock)
    monkeypatch.setenv("TXL_ROOT", str(node.home))
    (node.run_dir / "logs").mkdir()
    with open(node.run_dir / "logs/node-0.log", "ab", buffering=0) as log:
        job = supervisor.Job(node.run_dir, 0, supervisor.Launch("first", ["sleep", "60"], {}, "127.0.0.1"), log, 0)
        leases = []
        for second in range(61):
            clock.now, clock.date = 1000.0 + second, clock.date + (86400 if second % 2 else -86400)
            job.beat()
            leases.append((node.lease / "run").read_text())
        job.kill()
    changes = [second for second in range(1, 61) if leases[second] != leases[second - 1]]
    assert changes == [20, 40, 60]


def test_a_machine_without_a_lease_is_left_without_one(node):
    shutil.rmtree(node.home / "var")
    assert node.ends("true")[0] == 0
    assert not (node.home / "var").exists()


def test_the_interface_of_the_private_address_is_for_gloo_and_nccl_unless_the_launch_says_otherwise(node):
    assert node.ends("echo $GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME $WHO", env={"NCCL_SOCKET_IFNAME": "^lo", "WHO": "me"}
                     )[0] == 0
    assert node.log.splitlines()[-1] == "lo ^lo me"


def test_each_address_is_found_on_the_interface_that_the_system_says():
    if not shutil.which("ip"):
        pytest.skip("no iproute2 to compare with")
    listed = json.loads(subprocess.run(["ip", "-json", "-4", "addr"], capture_output=True, check=True).stdout)
    truth = {info["local"]: link["ifname"] for link in listed for info in link["addr_info"]}
    assert {address: supervisor.interface(address) for address in truth} == truth


def test_an_address_that_this_machine_does_not_have_starts_nothing(node):
    status, said = node.ends("echo never", private="198.51.100.7")
    assert status == 1
    assert "this machine is to be 198.51.100.7, and has 127.0.0.1 (lo)" in said
    assert "never" not in node.log


@pytest.mark.parametrize(("launch", "why"), [
    (None, "the launcher writes it first"), ("{", "does not say what to start"), ('{"launch": "x"}', "command"),
    ("[]", "does not say what to start"),
    ('{"launch": "x", "command": ["no-such-program"], "env": {}, "private": "127.0.0.1"}', "no-such-program")])
@pytest.mark.parametrize("flags", [[], ["--detach"]], ids=" ".join)
def test_what_cannot_start_says_why(node, launch, why, flags):
    if launch is not None:
        (node.run_dir / "nodes/0.launch.json").write_text(launch)
    status, said = node.ends(None, *flags)
    assert status == 1
    assert said.startswith("node 0 of x.1 was not started: ")
    assert why in said
    assert node.told == {}


def test_a_request_to_kill_ends_all_descendants_wherever_they_went(node):
    """One in a session of its own, one whose parent is gone, one that hears no signal."""
    node.starts("setsid sleep 61 & (setsid sh -c 'sleep 62 & exit' &) ; trap '' TERM; echo here; sleep 63; sleep 64")
    until(lambda: all(node.alive(f"sleep\0{n}") for n in ("61", "62", "63")))
    (node.run_dir / "nodes/0.kill").touch()
    assert ended(node) == -signal.SIGKILL
    assert node.alive("sleep\0") == []
    assert json.loads((node.lease / "run").read_text())["state"] == "failed"


def test_a_request_to_kill_an_earlier_launch_does_not_kill_this_one(node):
    (node.run_dir / "nodes/0.kill").touch()
    assert node.ends("sleep 1.2")[0] == 0


def test_what_a_command_leaves_behind_when_it_is_killed_ends_with_it(node):
    node.ends("setsid sleep 61 & kill -9 $$")
    assert ended(node) == -signal.SIGKILL
    assert node.alive("sleep\0") == []


def test_sigterm_to_the_supervisor_lets_the_command_end_in_its_own_way(node):
    process = node.starts(ASKED)
    node.logs("here")
    process.terminate()
    assert ended(node) == 7
    assert node.log.splitlines()[-1] == "asked"


def test_a_sigterm_that_comes_as_the_command_begins_is_handed_on_too(node):
    node.starts("trap 'exit 7' TERM; kill -TERM $PPID; while :; do sleep 0.05; done")
    assert ended(node) == 7


def test_when_the_supervisor_is_killed_the_command_is_asked_to_end(node):
    process = node.starts(ASKED)
    node.logs("here")
    until(lambda: node.told)
    process.kill()
    node.logs("asked")
    assert node.told["state"] == "running"                            # nobody was left to tell
    until(lambda: not node.alive("sh\0-c"))


def test_one_launch_runs_once(node):
    node.launches("echo here; sleep 1")
    pair = [node.starts(None), node.starts(None)]
    assert [process.wait(120) for process in pair] == [0, 0]
    assert node.log.count("here\n") == 1
    said = "".join(process.stdout.read() for process in pair)
    assert "launch first of node 0 runs already" in said
    assert node.ends(None) == (0, "launch first of node 0 has ended already\n")
    assert node.log.count("here\n") == 1
    assert node.ends("echo again", launch="second")[0] == 0
    assert node.log.splitlines()[-1] == "again"


def test_a_second_launch_does_not_start_while_the_command_of_the_first_lives(node):
    first = node.starts("trap '' TERM; echo here; while :; do sleep 1; done")
    node.logs("here")
    first.kill()                                                      # and its command does not listen
    status, said = node.ends("echo never", launch="second")
    assert status == 1
    assert "launch first still runs on this machine. End it:  touch runs/x.1/nodes/0.kill" in said
    assert "never" not in node.log


def test_a_detached_start_returns_when_the_command_runs_and_lives_on_without_its_terminal(node):
    node.launches(ASKED)
    detach = f"{sys.executable} {SOURCE} --detach runs/x.1 0; echo status $?; sleep 60"
    pid, terminal = pty.fork()
    if pid == 0:                                                      # as below sshd
        os.chdir(node.home)
        os.execve("/bin/sh", ["sh", "-c", detach], node.env)
    said = b""
    while b"status" not in said or not said.endswith(b"\n"):
        said += os.read(terminal, 1000)
    assert said.startswith(b"runs: node 0 of x.1")
    assert said.endswith(b"status 0\r\n")
    assert node.told["state"] == "running"
    os.close(terminal)                                                # the connection is gone
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGHUP
    beat = node.told["beat"]
    until(lambda: node.told["beat"] > beat)
    os.kill(node.told["pid"], signal.SIGHUP)
    os.kill(node.told["pid"], signal.SIGTERM)
    assert ended(node) == 7


def test_a_detached_start_of_what_runs_already_is_content(node):
    assert node.ends(SLEEPS, "--detach")[0] == 0
    assert node.ends(None, "--detach") == (0, "launch first of node 0 runs already\n")


def test_a_tmux_session_shows_the_log_and_its_end_harms_nothing(node):
    if not shutil.which("tmux"):
        pytest.skip("no tmux")
    node.env["TXL_TMUX"] = "1"

    def tmux(*words: str) -> str:
        return subprocess.run(["tmux", *words], env=node.env, capture_output=True, text=True, timeout=120).stdout

    node.starts("echo here; trap 'echo asked; exit 7' TERM; while :; do sleep 0.05; done")
    until(lambda: "here" in tmux("capture-pane", "-p", "-t", "txl-x_1").splitlines())
    tmux("kill-server")
    beat = node.told["beat"]
    until(lambda: node.told["beat"] > beat)
    assert node.told["state"] == "running"


def test_tensorboard_ends_with_the_supervisor(node):
    node.starts("echo here; sleep 1.5", tensorboard=["sh", "-c", "echo board; sleep 62"])
    until(lambda: node.alive("sleep\0" + "62"))
    assert ended(node) == 0
    assert node.alive("sleep\0") == []
    assert (node.run_dir / "logs/tensorboard.log").read_text() == "board\n"


def test_a_tensorboard_that_ends_or_is_not_there_harms_nothing_and_is_tried_again_a_minute_later(node, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(supervisor, "time", clock)
    (node.run_dir / "logs").mkdir()
    board = node.home / "board"
    launch = supervisor.Launch("first", ["sleep", "60"], {}, "127.0.0.1", [str(board)])
    log = node.run_dir / "logs/tensorboard.log"
    with open(node.run_dir / "logs/node-0.log", "ab", buffering=0) as file:
        job = supervisor.Job(node.run_dir, 0, launch, file, 0)
        job.tensorboard.keep()
        board.write_text("#!/bin/sh\necho board\n")
        board.chmod(0o755)
        for clock.now in (1059.0, 1060.0):
            job.tensorboard.keep()
        job.tensorboard.process.wait(120)
        for clock.now in (1119.0, 1120.0):
            job.tensorboard.keep()
        job.tensorboard.process.wait(120)
        job.kill()
    assert log.read_text() == "board\nboard\n"


def mirror(script: str) -> list[str]:
    """For a launch: $1 is --last where the last pass is all that is wanted."""
    return ["sh", "-c", script, "mirror"]


UP = "until [ -e up ]; do sleep 0.05; done"       # a command that ends once the mirror is at work


@pytest.mark.parametrize(("end", "status"), [("exit 0", 0), ("exit 3", 3)])
def test_the_end_is_told_to_launcher_and_watchdog_only_after_the_mirrors_last_pass(node, end, status):
    keeps = ("trap 'sleep 1.5; cp runs/x.1/nodes/0.json told; cp var/lib/txl/lease/run leased; exit 0' TERM; touch up; "
             "while :; do sleep 0.05; done")
    node.ends(f"{UP}; {end}", mirror=mirror(keeps))
    before = json.loads((node.home / "told").read_text())
    assert (before["state"], before["status"]) == ("running", None)
    assert json.loads((node.home / "leased").read_text())["state"] == "running"
    assert (node.told["state"], node.told["status"]) == ("ended", status)
    assert node.told["beat"] > before["beat"]


@pytest.mark.parametrize("before", ["kill -9 $$", "exit 1", "exit 0"])
def test_a_mirror_that_has_ended_is_started_once_more_for_the_last_pass(node, before):
    node.ends("sleep 0.5", mirror=mirror(f'[ "$1" = --last ] && {{ echo kept >> kept; exit 0; }}; {before}'))
    assert (node.home / "kept").read_text() == "kept\n"


def test_a_mirror_that_gave_up_is_believed(node):
    gives_up = 'trap "echo tried >> tries; exit 3" TERM; touch up; while :; do sleep 0.05; done'
    assert node.ends(UP, mirror=mirror(gives_up))[0] == 0
    assert (node.home / "tries").read_text() == "tried\n"


def test_what_ends_the_training_at_once_leaves_the_mirror_its_last_pass(node):
    keeps = "trap 'touch kept; exit 0' TERM; touch up; while :; do sleep 0.05; done"
    node.starts(SLEEPS, mirror=mirror(keeps))
    until((node.home / "up").exists)
    (node.run_dir / "nodes/0.kill").touch()
    assert ended(node) == -signal.SIGKILL
    assert (node.home / "kept").exists()


def test_a_mirror_that_moves_nothing_is_not_waited_for_for_ever(node, monkeypatch):
    monkeypatch.setattr(supervisor, "MIRROR_S", 2)
    monkeypatch.setattr(supervisor, "BEAT_S", .1)
    (node.run_dir / "logs").mkdir()
    moves = "trap '' TERM; for i in 1 2 3 4 5 6; do echo $i > 0.mirror; sleep 0.5; done; touch moved; sleep 60"
    launch = supervisor.Launch("first", ["true"], {}, "127.0.0.1", mirror=mirror(f"cd {node.run_dir}/nodes; {moves}"))
    with open(node.run_dir / "logs/node-0.log", "ab", buffering=0) as file:
        job = supervisor.Job(node.run_dir, 0, launch, file, 0)
        job.mirror.keep()
        until((node.run_dir / "nodes/0.mirror").exists)
        job.finish_mirror()
        job.mirror.process.wait(120)
    assert (node.run_dir / "nodes/moved").exists()
    assert not job.mirror.runs()


def test_a_full_disk_ends_no_training_and_its_end_is_told(tmp_path):
    with small_disk(tmp_path, "size=128k"):
        node = Node(tmp_path)
        process = node.starts("echo here; while [ ! -e go ]; do sleep 0.05; done")
        node.logs("here")
        fill(tmp_path)
        beat = node.told["beat"]
        until(lambda: node.told["beat"] >= beat + 2)
        os.mkfifo(tmp_path / "go")                                    # an entry of no blocks
        assert process.wait(120) == 0
        assert (node.told["state"], node.told["status"]) == ("ended", 0)
        assert json.loads((node.lease / "run").read_text())["state"] == "succeeded"
        process.stdout.close()
