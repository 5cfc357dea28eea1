"""Following a run on real sshds with real supervisors: what ends, what is lost or only silent, what is fetched."""
from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from cluster import reach, remote, run
from cluster.backends import LOST
from cluster.follow import failure, unlogged
from cluster.local import free_port
from cluster.plan import torchrun
from cluster.rehearsal import keeper
from cluster.remote import RemoteJob
from cluster.run import TENSORBOARD, Broken, port_of
from configs import tiny
from engine.values import override, to_json
from tests.cluster.launching import Person, until
from tests.cluster.sshd import needs_sshd, put
from tests.disks import small_disk

CHECKOUT = Path(__file__).parents[2]
NAME = f"r{os.getpid()}"                          # of TensorBoard's port, which all machines share
RUN = Path("runs", NAME)
FOREVER = "echo begun; exec sleep 1000"
FINISHES = (f"mkdir -p {RUN}/checkpoints/step-1; echo weights > {RUN}/checkpoints/step-1/model.pt; "
            f"""echo '{{"state": "finished", "step": 1, "message": ""}}' > {RUN}/status.json""")
pytestmark = needs_sshd


@pytest.fixture
def start(trio, tmp_path, monkeypatch):
    """start(script of node 0, ...) runs them on as many machines; returns their job and who reads what it says."""
    monkeypatch.chdir(tmp_path)
    for name, seconds in {"FETCH_S": .1, "FETCH_OTHERS_S": .2, "ASK_S": .2, "SILENT_S": 4, "GRACE_S": .3}.items():
        monkeypatch.setattr(remote, name, seconds)
    jobs = []

    def started(*scripts: str, launch: str = "first", begin: bool = True, board: bool = False,
                person: Person | None = None, **hooks) -> tuple[RemoteJob, Person]:
        shells, person = trio.shells[:len(scripts)], person or Person()
        for machine in trio.all[:len(scripts)]:
            shutil.copytree(CHECKOUT / "cluster/host", machine.home / "txl/cluster/host", dirs_exist_ok=True)
        if begin:
            reach.start(shells, RUN.as_posix(), [
                {"launch": launch, "command": ["sh", "-c", script], "env": {}, "private": machine.address,
                 "tensorboard": ["python3", "-m", "http.server", "--bind=127.0.0.1", str(port_of(NAME, TENSORBOARD))]
                 if board and not i else None} for i, (script, machine) in enumerate(zip(scripts, trio.all))])
        pages = {"TensorBoard": port_of(NAME, TENSORBOARD)} if board else {}
        jobs.append(RemoteJob(RUN, shells, launch, person, pages=pages, **hooks))
        return jobs[-1], person

    yield started
    for job in jobs:
        job._over.set()
    for machine in trio.all:
        keeper.end(machine.root)
        if machine.process is None:
            machine.start()
    for job in jobs:
        for thread in job._threads:
            thread.join(120)
            assert not thread.is_alive()


def statuses(job: RemoteJob, seconds: float = 120) -> tuple[int, ...] | None:
    """Once none runs; None where that takes too long."""
    until(lambda: job.poll() is not None, seconds)
    return job.poll()


def logged(node: int, word: str) -> bool:
    with suppress(FileNotFoundError):
        return word in (RUN / "logs" / f"node-{node}.log").read_text().splitlines()
    return False


def test_when_a_node_fails_the_others_are_ended_and_each_has_its_status(start):
    job, person = start(FOREVER, "exit 3", FOREVER)
    assert statuses(job) == (-15, 3, -15)
    assert person.lines[0] == "node-1: ended with status 3"
    assert sorted(person.lines[1:]) == ["node-0: ended, as it was told to", "node-2: ended, as it was told to"]


def test_after_a_failure_the_others_have_a_while_to_end_by_themselves(start, monkeypatch):
    monkeypatch.setattr(remote, "GRACE_S", 20)
    job, _ = start("sleep 2; exit 5", "exit 3")
    assert statuses(job) == (5, 3)


def test_a_request_to_stop_reaches_the_training_and_what_came_of_it_is_here_after_the_end(start):
    job, _ = start(f"while [ ! -e {RUN}/stop ]; do sleep .05; done; {FINISHES}", "true")
    job.stop()
    assert statuses(job) == (0, 0)
    job.close()
    assert run.read_status(RUN)["state"] == "finished"
    assert (RUN / "checkpoints/step-1/model.pt").read_text() == "weights\n"
    assert not (RUN / "stop").exists()


def test_a_machine_that_vanishes_amid_the_last_fetch_leaves_the_run_unfinished_here_and_the_next_job_gets_the_rest(
        start, trio):
    job, _ = start(FINISHES, "true", person=Person("Fetching the run's folder", trio[0].stop))
    assert statuses(job) == (0, 0)
    assert not (RUN / "status.json").exists()     # else the same command would say that there is nothing to do
    with pytest.raises(Broken, match=r"(?s)^The training has ended\. Not all .*node-0: .*The same command again"):
        job.close()
    assert not (RUN / "status.json").exists()
    trio[0].start()
    again, _ = start(FINISHES, "true", begin=False)
    assert statuses(again) == (0, 0)
    again.close()
    assert run.read_status(RUN)["state"] == "finished"
    assert (RUN / "checkpoints/step-1/model.pt").exists()


def test_of_a_training_that_failed_its_failure_is_told_though_not_all_can_be_fetched(start, trio):
    job, person = start("exit 3", person=Person("Fetching the run's folder", trio[0].stop))
    assert statuses(job) == (3,)
    job.close()
    assert person.lines[-1].startswith("Not all of the run's folder could be fetched: ")


def test_a_node_whose_machine_was_started_anew_is_lost_rather_than_waited_for(start, trio):
    job, person = start(FOREVER, FOREVER)
    assert until(lambda: logged(1, "begun"))
    keeper.end(trio[1].root)                      # all that ran on it; it answers
    assert statuses(job) == (-15, LOST)
    assert person.lines[0].startswith("node-1: nothing of it runs any more: the machine was started anew")


def test_a_supervisor_that_is_only_held_up_is_waited_for(start, trio):
    job, person = start("echo begun; while [ ! -e go ]; do sleep .05; done")
    assert until(lambda: logged(0, "begun"))
    pid = json.loads((trio[0].home / "txl" / RUN / "nodes/0.json").read_text())["pid"]
    os.kill(pid, signal.SIGSTOP)
    assert not until(lambda: job.poll() is not None, 6)
    os.kill(pid, signal.SIGCONT)
    (trio[0].home / "txl/go").touch()
    assert statuses(job) == (0,)
    assert person.lines == []


def test_who_follows_a_launch_that_another_has_replaced_is_told_so(start, trio, monkeypatch):
    job, person = start(FOREVER)
    assert until(lambda: logged(0, "begun"))
    with monkeypatch.context() as patient:        # nobody asks between the two
        patient.setattr(remote, "SILENT_S", 1000)
        keeper.end(trio[0].root)
        start(FOREVER, launch="second")
    assert statuses(job) == (LOST,)
    assert person.lines == ["node-0: launch second has taken its place"]


def test_a_machine_out_of_reach_is_told_with_its_reason_once_and_followed_on_when_it_is_back(start, trio):
    def unknown(nodes):
        raise ConnectionError("no network")

    job, person = start(FOREVER, "echo begun; while [ ! -e go ]; do sleep .05; done; echo later", gone=unknown)
    assert until(lambda: logged(1, "begun"))
    assert job.machines() == "2 up"
    trio[1].stop()
    assert until(lambda: job.poll() or person.lines)
    assert person.lines == [f"Nothing for 4 s from 1 of 2 machines: node-1: ssh: connect to host {trio[1].address} "
                            f"port {trio.port}: Connection refused"]
    assert job.machines() == "no answer from node-1"
    assert not until(lambda: job.poll() or person.lines[1:], 2)
    trio[1].start()
    assert until(lambda: job.poll() or person.lines[1:])
    assert person.lines[1:] == ["node-1 answers again."]
    (trio[1].home / "txl/go").touch()
    assert until(lambda: logged(1, "later"))


def test_a_machine_that_the_cloud_says_is_gone_is_lost_and_the_others_are_ended(start, trio):
    job, person = start(FOREVER, FOREVER, gone=lambda nodes: {1: "taken away"} if 1 in nodes else {})
    assert until(lambda: logged(1, "begun"))
    trio[1].stop()
    assert statuses(job) == (-15, LOST)
    assert "node-1: taken away" in person.lines


def test_a_machine_that_takes_connections_and_says_nothing_does_not_hold_up_the_log_of_another(start, trio):
    job, _ = start("while :; do date +%s.%N; sleep .1; done", FOREVER)
    assert until(lambda: logged(1, "begun"))
    with trio[1].mute():
        for _ in range(3):
            size = (RUN / "logs/node-0.log").stat().st_size
            assert until(lambda size=size: (RUN / "logs/node-0.log").stat().st_size > size, 4)
        assert until(lambda: job.machines() == "no answer from node-1")


def test_killing_ends_at_once_though_a_machine_cannot_be_told(start, trio):
    job, person = start(FOREVER, FOREVER)
    assert until(lambda: logged(1, "begun"))
    trio[1].stop()
    job.kill()
    assert statuses(job) == (-15, LOST)
    told = "node-1: it could not be told to end, and may go on: "     # in ssh's words, of this way or the one before
    assert any(line.startswith((f"{told}ssh: connect", f"{told}mux_client", f"{told}Connection", f"{told}kex_"))
               for line in person.lines), person.lines


def test_tensorboard_is_reached_at_one_address_which_comes_back_when_the_way_there_was_cut(start, trio):
    _, person = start(FOREVER, board=True)

    def served() -> bool:
        url = person.lines[0].partition(": ")[2]
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
        return False

    assert until(lambda: person.lines)
    assert person.lines[0].startswith("TensorBoard: http://127.0.0.1:")
    assert until(served)
    trio[0].cut()
    assert until(lambda: len(person.lines) == 3)
    assert person.lines[1:] == ["TensorBoard is out of reach for now: the tunnel broke", person.lines[0]]
    assert until(served)


def test_a_full_disk_here_is_said_and_following_goes_on_when_there_is_room(start, trio, tmp_path):
    with small_disk(tmp_path / "runs", "size=256k"):
        job, person = start(f"echo begun; while [ ! -e go ]; do sleep .05; done; head -c 100000 /dev/urandom > "
                            f"{RUN}/logs/rank-0.log; echo later; exec sleep 1000")
        assert until(lambda: logged(0, "begun"))
        subprocess.run(["dd", "if=/dev/zero", "of=runs/ballast", "bs=4096"], capture_output=True)
        (trio[0].home / "txl/go").touch()
        assert until(lambda: job.poll() or person.lines)
        assert "No space left on device" in person.lines[0]
        Path("runs/ballast").unlink()
        assert until(lambda: job.poll() or logged(0, "later"))
        job._over.set()
        for thread in job._threads:
            thread.join(120)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "said"), [
    ("size=20m", "metrics.jsonl or tensorboard/ could not be written: [Errno 28] No space left on device"),
    ("size=20m,nr_inodes=60", "CheckpointError: The checkpoint of step ")], ids=["blocks", "inodes"])
def test_a_training_that_fills_its_machines_disk_says_so_and_leaves_its_last_checkpoint(start, trio, options, said):
    recipe = override(tiny, "recipe.stop.max_steps=100000", "recipe.clock.eval_interval=100000",
                      "recipe.clock.checkpoint_interval=20", "recipe.clock.log_interval=1").recipe
    code, python = trio[0].home / "txl", sys.executable
    line = torchrun(python, recipe.entry, RUN / "recipe.json", ranks=1, nnodes=1, node_rank=0, master_port=free_port(),
                    master_addr="127.0.0.1")
    script = f"export PYTHONPATH={CHECKOUT}\n{shlex.join([python, *recipe.prepare])} && exec {shlex.join(line)}"
    with small_disk(code / "runs", options), ExitStack() as here:
        put(code / RUN, {"recipe.json": json.dumps(to_json(recipe))})
        job, _ = start(script)
        here.callback(job._over.set)
        assert until(lambda: list(code.glob(f"{RUN}/checkpoints/step-*")), 200)
        if "inodes" in options:
            with suppress(OSError):
                for i in range(100):
                    (code / "runs" / str(i)).touch()
        else:
            subprocess.run(["dd", "if=/dev/zero", f"of={code}/runs/ballast", "bs=512"], capture_output=True)
        status, = statuses(job, 200)
        assert status > 0                         # 120 is Python's where it cannot say its last words
        job.close()
    assert json.loads((trio[0].root / "var/lib/txl/lease/run").read_text())["state"] == "failed"
    assert run.newest_checkpoint(RUN)["step"] >= 20
    shown = f"{failure(RUN, 1, (status,), 0)} {unlogged(RUN, 0)} {(RUN / 'logs/rank-0.log').read_text()}"
    assert said in shown
    assert "No space left on device" in shown
    assert "Make room and run the same command again" in shown
