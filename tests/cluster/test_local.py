"""The backend `local` with small scripts in torchrun's place."""
from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path

import pytest

from cluster import local
from cluster.backends import Wish
from cluster.follow import Screen
from cluster.plan import Layout, Node, Plan
from cluster.run import NEW, Broken, Refused, Standing
from cluster.spec import Config, Terms
from configs import tiny
from engine.values import override
from tests.waiting import alive, until

SLEEPS = "import time; print('here', flush=True); time.sleep(60)"
ENDS = "print('done')"
FAILS = "import sys; sys.exit('no such luck')"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); time.sleep(60)"


def plan_of(*scripts: str, name: str = "x", tensorboard: bool = False) -> Plan:
    nodes = tuple(Node(i, "127.0.0.1", 1, {"WHO": f"node {i}"}, (sys.executable, "-c", script))
                  for i, script in enumerate(scripts))
    return Plan(name, "tiny", tiny, "local", Layout(nodes, "", "", ""), command="python launch.py --config=tiny",
                tensorboard=tensorboard)


def wish(config: Config, standing: Standing = NEW) -> Wish:
    return Wish("x", config, standing, Terms())


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """apply(), in an empty folder; what is left running at the end is killed."""
    monkeypatch.chdir(tmp_path)
    started = []

    def start(*scripts: str, **options):
        started.append(local.apply(plan_of(*scripts, **options), Screen(sys.stdout)))
        return started[-1]

    yield start
    for job in started:
        job.kill()


def ended(job) -> tuple[int, ...]:
    return until(job.poll)


def test_each_node_has_its_environment_its_log_and_its_exit_status(jobs):
    job = jobs("import os; print(os.environ['WHO'], input.__name__)", "import os; print(os.environ['WHO'])")
    assert ended(job) == (0, 0)
    logs = [Path(f"runs/x/logs/node-{i}.log").read_text().splitlines() for i in range(2)]
    assert [log[-1] for log in logs] == ["node 0 input", "node 1"]
    assert all(log[0].startswith("=== launched") for log in logs)


def test_a_node_has_nothing_to_read(jobs):
    assert ended(jobs("input()")) == (1,)


def test_one_node_that_fails_ends_the_others(jobs):
    job = jobs(FAILS, SLEEPS)
    assert ended(job) == (1, -signal.SIGTERM)


def test_a_node_that_does_not_listen_is_ended_by_force(jobs, monkeypatch):
    monkeypatch.setattr(local, "GRACE_S", 0)
    job = jobs("import os, time\nwhile not os.path.exists('go'): time.sleep(.01)\nraise SystemExit(3)", DEAF)
    until(lambda: "here" in Path("runs/x/logs/node-1.log").read_text().splitlines())
    Path("go").touch()
    assert ended(job) == (3, -signal.SIGKILL)


def test_a_node_that_is_done_waits_for_the_others(jobs):
    job = jobs(ENDS, "import time; time.sleep(.3)")
    assert ended(job) == (0, 0)


def test_kill_ends_everything_at_once(jobs):
    job = jobs(DEAF, SLEEPS)
    job.kill()
    assert ended(job) == (-signal.SIGKILL, -signal.SIGKILL)


def test_stop_asks_by_a_file(jobs):
    job = jobs(SLEEPS)
    job.stop()
    assert Path("runs/x/stop").exists()


def test_a_request_to_stop_that_nobody_heard_does_not_stop_the_next_training(jobs):
    job = jobs(FAILS)
    job.stop()
    ended(job)
    job.close()
    assert not Path("runs/x/stop").exists()


def test_a_run_that_is_going_on_is_not_started_again(jobs):
    job = jobs(SLEEPS)
    with pytest.raises(Refused, match=r"runs/x is running: torchrun \d+, started by \d+.*\n.*\n.*touch runs/x/stop"):
        jobs(ENDS)
    assert ended(jobs(ENDS, name="y")) == (0,)                                    # another one may
    job.kill()
    ended(job)
    assert ended(jobs(ENDS)) == (0,)


def test_a_run_outlives_its_launcher_and_stays_locked(jobs):
    launcher = ("import os; from cluster import local; from tests.cluster.test_local import SLEEPS, plan_of; "
                "local.apply(plan_of(SLEEPS), None); os._exit(9)")
    subprocess.run([sys.executable, "-c", launcher], env=os.environ | {"PYTHONPATH": str(local.CHECKOUT)}, check=False)
    agent = int(Path("runs/x/lock").read_text().split()[1].rstrip(","))
    try:
        assert alive(agent)
        with pytest.raises(Refused, match=f"runs/x is running: torchrun {agent}"):
            jobs(ENDS)
    finally:
        os.kill(agent, signal.SIGKILL)
    until(lambda: not alive(agent))
    assert ended(jobs(ENDS)) == (0,)


# What torchrun does: ranks in sessions of their own, known by their command line.
STARTS_A_RANK = ("import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', "
                 "'-m', 'txl.train', 'runs/x/recipe.json'], start_new_session=True); time.sleep(60)")


@pytest.mark.skipif(not Path("/proc").exists(), reason="ranks are found in /proc")
def test_ranks_do_not_outlive_a_torchrun_that_was_killed(jobs):
    job = jobs(STARTS_A_RANK)
    rank, = until(lambda: local.ranks_of(Path("runs/x"), "txl.train"))
    os.kill(job._agents[0].pid, signal.SIGKILL)
    assert ended(job) == (-signal.SIGKILL,)
    until(lambda: not alive(rank))


@pytest.mark.skipif(not Path("/proc").exists(), reason="ranks are found in /proc")
@pytest.mark.parametrize("words", [["-f"], ["-m", "txl.evaluate"], ["txl.train"]])
def test_who_only_looks_at_a_recipe_is_no_rank_and_outlives_the_run(words, jobs):
    reader = subprocess.Popen([sys.executable, "-c", SLEEPS, *words, "runs/x/recipe.json"], stdout=subprocess.PIPE)
    try:
        reader.stdout.readline()
        assert ended(jobs(ENDS)) == (0,)
        assert reader.poll() is None
    finally:
        reader.kill()
        reader.communicate()


@pytest.mark.skipif(not Path("/proc").exists(), reason="ranks are found in /proc")
def test_ranks_left_by_torchrun_and_launcher_keep_the_run_from_starting(jobs):
    job = jobs(STARTS_A_RANK)
    rank, = until(lambda: local.ranks_of(Path("runs/x"), "txl.train"))
    os.kill(job._agents[0].pid, signal.SIGKILL)
    job._agents[0].wait()
    with pytest.raises(Refused, match=f"ranks without torchrun: {rank}"):
        jobs(ENDS)
    job.kill()
    until(lambda: not alive(rank))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            return b"TensorBoard" in page.read()
    except (OSError, HTTPException):              # the second where it ends in the middle of an answer
        return False


def test_tensorboard_is_there_until_the_run_ends(jobs, capsys):
    job = jobs(SLEEPS, tensorboard=True)
    url = re.search(r"TensorBoard until the run ends: (http://127\.0\.0\.1:\d+)\n", capsys.readouterr().out)[1]
    until(lambda: answers(url))
    os.kill(job._agents[0].pid, signal.SIGTERM)
    assert ended(job) == (-signal.SIGTERM,)
    job.close()
    until(lambda: not answers(url))


def test_tensorboard_ends_with_the_run_where_no_launcher_is_left(jobs):
    launcher = ("import os, sys; from cluster import local; from cluster.follow import Screen; "
                "from tests.cluster.test_local import SLEEPS, plan_of; "
                "local.apply(plan_of(SLEEPS, tensorboard=True), Screen(sys.stdout)); os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", launcher], env=os.environ | {"PYTHONPATH": str(local.CHECKOUT)},
                          stdout=subprocess.PIPE, text=True, check=False)
    agent = int(Path("runs/x/lock").read_text().split()[1].rstrip(","))
    try:
        until(lambda: answers(done.stdout.split()[-1]))
    finally:
        os.kill(agent, signal.SIGKILL)
    until(lambda: not alive(agent) and not answers(done.stdout.split()[-1]))
    assert ended(jobs(ENDS)) == (0,)                                              # the lock is free


def test_without_torch_nothing_is_made(jobs, monkeypatch):
    monkeypatch.setattr(local.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"has no torch\. (?s:.*)-m pip install -r .*requirements\.txt"):
        jobs(ENDS)
    assert not Path("runs").exists()


def test_a_command_that_cannot_be_started_leaves_nothing_running(jobs):
    plan = plan_of(SLEEPS, ENDS)
    broken = Node(1, "127.0.0.1", 1, {}, ("/no/such/python",))
    plan = Plan("x", "tiny", tiny, "local", Layout((plan.layout.nodes[0], broken), "", "", ""))
    with pytest.raises(Broken, match=r"No such file or directory: /no/such/python\. What was started is ended again"):
        local.apply(plan, Screen(sys.stdout))
    assert ended(jobs(ENDS)) == (0,)                                              # the lock is free



def test_a_run_that_has_a_checkpoint_of_its_own_needs_none_to_start_from():
    warm = override(tiny, "recipe.init_from=runs/gone")
    assert local.survey(wish(warm, Standing("unfinished", step=20, ranks=1))).cores >= 1


@pytest.mark.parametrize(("visible", "gpus"), [("", ()), ("-1", ()), ("2,3", ("2", "3")), ("GPU-8, 1", ("GPU-8", "1"))])
def test_only_the_gpus_that_the_user_lets_be_seen_are_used(visible, gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local.survey(wish(tiny)).gpus == gpus


def test_a_free_port_is_in_use_for_all_but_programs_that_listen_there_by_its_name():
    """The system itself gives a port to who asks for any only where a plain bind could have it."""
    port = local.free_port()
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("127.0.0.1", port))
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
