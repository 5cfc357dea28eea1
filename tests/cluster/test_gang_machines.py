"""What can go wrong with machines that came: the launch says which one lacks what, and what it took is given back or
stays for a while, guarded by its own watchdog."""
from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import boto3
import pytest

from cluster import aws, gang, outfit, reach, ready, remote
from cluster.__main__ import main as cluster
from cluster.backends import LOST
from cluster.driven import Launcher
from cluster.gang import Launch
from cluster.journal import Journal
from cluster.outfit import Outfit
from cluster.plan import Plan
from cluster.rehearsal.bench import Bench
from cluster.rehearsal.hosts import Host, Knobs
from cluster.rehearse import LAUNCH_S, NAME, Stage
from cluster.run import Broken, Stopped, newest_checkpoint
from configs import tiny
from engine.values import override
from tests.cluster.launching import Person, launched, plan_of, requests, until
from tests.cluster.sshd import BARE_PYTHON, needs_sshd
from tests.disks import small_disk

STAY = "The machines stay for 20 minutes: once it is mended, the same command takes them"
pytestmark = needs_sshd


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setitem(ready.wait_ready.__kwdefaults__, "patience_s", .2)


def test_data_that_is_not_here_is_made_on_node_0_which_alone_may_have_a_way_out_and_copied(bench):
    nowhere = f'case "$*" in *txl.data*) echo "no way out" >&2; exit 1 ;; esac\nexec {sys.executable} "$@"'
    bench.hosts.next = [Knobs(), Knobs(scripts=(("python3", nowhere),))]
    before = len(bench.instances())
    with pytest.raises(Stopped):
        aws.apply(plan_of(bench, kind="p4d.24xlarge"), Person("Starting the training"))
    homes = [bench.hosts[machine.id].home / "txl/data/stdlib" for machine in bench.instances()[before:]]
    first, second = ({str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*") if path.is_file()}
                     for home in homes)
    assert len(first) > 3
    assert first == second


# --- machines that are not fit ---

@pytest.mark.parametrize(("kind", "knobs", "said"), [
    ("p4d.24xlarge", [Knobs(gpus=7), Knobs(efa=False)],
     [r"node-0: 7 of 8 GPUs are there", r"node-1: EFA was asked for and is not there \(fi_info: fi_getinfo: -61"]),
    ("p4d.24xlarge", [Knobs(gpus=0), Knobs(clock_off_s=86400)],
     [r"node-0: 0 of 8 GPUs are there \(nvidia-smi: NVIDIA-SMI has", r"node-1: its clock is 86[34]\d\d s ahead"]),
    ("c5.xlarge", [Knobs(init_status="error"), Knobs(clock_off_s=-86400)],
     [r"node-0: cloud-init failed: status: error", r"node-1: its clock is 86[34]\d\d s behind ours"]),
    ("c5.xlarge", [Knobs(answers=False), Knobs(init_s=2, drops_after_s=1)],
     [r"node-0: not ready after 4 s: ssh: connect to host 127\.\S+ port \d+: Connection refused",
      r"node-1: not ready after 4 s: .*(Connection refused|closed|ended)"]),
], ids=["a GPU and EFA missing", "driver and clock", "cloud-init and clock", "silent from the start and after a while"])
def test_each_machine_is_named_with_what_it_lacks_and_all_are_given_back(bench, monkeypatch, kind, knobs, said):
    monkeypatch.setattr(gang, "READY_S", 4 if not knobs[0].answers else 60)
    bench.hosts.next = knobs
    with pytest.raises(Broken, match=rf"(?s){'.*'.join(said)}.*The 2 machine\(s\) of this launch are terminated"):
        aws.apply(plan_of(bench, kind=kind), Person())
    assert bench.alive() == []


def test_machines_at_addresses_of_earlier_ones_are_taken_for_what_they_are(bench, monkeypatch):
    monkeypatch.setattr(bench.world, "reuse_addresses", True)
    monkeypatch.setattr(bench.world.public, "free", [])
    configs = []
    for _ in range(2):
        launched(bench)
        assert until(lambda: not bench.billable())
        configs.append((Journal("two").folder / "ssh_config").read_text())
    first, second = ({line.split()[1] for line in config.splitlines() if "HostName" in line} for config in configs)
    assert first == second                        # the same places, other host keys


def standing(bench: Bench, *more: str) -> list[str]:
    """Two machines that a launcher has left ready behind, as one that is killed; their ids."""
    return [shell.host.alias for shell in Launch(plan_of(bench, *more), Journal("two"), Person()).gang()]


def test_machines_that_were_stopped_and_started_are_reached_at_their_new_addresses(bench):
    ids = standing(bench, "--nospot")
    config = Journal("two").folder / "ssh_config"
    before = config.read_text()
    assert cluster(["stop", "two", "--yes"]) == 0
    assert until(lambda: {machine.state for machine in bench.alive()} == {"stopped"})
    assert cluster(["start", "two", "--yes"]) == 0
    with pytest.raises(Stopped, match=r"The 2 machine\(s\) that were up already stay"):
        aws.apply(plan_of(bench, "--nospot"), Person("Bringing the code"))
    assert len(requests(bench)) == 1
    for machine in bench.alive():
        assert machine.id in ids
        assert f"HostName {machine.public}\n" not in before
        assert f"HostName {machine.public}\n" in config.read_text()


def test_a_machine_that_shows_another_host_key_than_before_is_not_talked_to_and_left_alone(bench):
    bench.hosts.next = [Knobs(), Knobs(new_host_key=True)]
    ids = standing(bench, "--nospot")
    boto3.client("ec2").reboot_instances(InstanceIds=ids[1:])
    assert until(lambda: bench.hosts[ids[1]].booted)
    with pytest.raises(Broken, match=r"(?s)node-1: another machine answers at its address, or its host key was "
                                     r"replaced: ssh refuses.*The 2 machine\(s\) that were up already stay"):
        aws.apply(plan_of(bench, "--nospot"), Person())
    assert [machine.id for machine in bench.alive()] == ids


# --- what they are brought ---

@pytest.mark.parametrize(("node", "options", "said"), [
    (0, "size=200k", "No space left on device"), (1, "size=200k", "No space left on device"),
    (0, "nr_inodes=20", "No space left on device"), (1, "ro", "Read-only file system")])
def test_where_the_code_finds_no_room_the_machine_is_named_and_the_machines_stay(bench, node, options, said):
    disks = contextlib.ExitStack()

    def replace_disk() -> None:
        machine = next(x for x in bench.alive() if x.node == node)
        disks.enter_context(small_disk(bench.hosts[machine.id].home / "txl", options))

    with disks, pytest.raises(Broken, match=f"(?s)node-{node}: .*({said}|is the disk full).*{STAY}"):
        aws.apply(plan_of(bench), Hook("Bringing the code", replace_disk))
    assert len(bench.alive()) == 2                # and they are guarded: the fixture asks


class Hook(Person):
    """Does something once a line is said, and stays."""

    def interrupted(self) -> bool:
        return False


def of_index(plan: Plan, index: str) -> Plan:
    """The plan where torch comes from an index of one's own."""
    facts = plan.layout.facts
    return replace(plan, layout=replace(plan.layout, facts=replace(facts, stack=replace(facts.stack, index_url=index))))


def bare(host: Host, index: str) -> None:
    """Its python has no packages, and pip looks for the rest in this index."""
    (host.root / "bin/python3").unlink(missing_ok=True)
    (host.root / "bin/python3").symlink_to(BARE_PYTHON)
    (host.home / ".config/pip").mkdir(parents=True, exist_ok=True)
    (host.home / ".config/pip/pip.conf").write_text(f"[global]\nindex-url = {index}\nretries = 1\n")


@pytest.mark.slow
def test_what_pip_says_is_told_and_once_that_is_mended_the_same_command_goes_on_with_the_same_machines(bench, index):
    def plan(index: str) -> Plan:
        return of_index(replace(plan_of(bench), terms=replace(plan_of(bench).terms, skip_setup=False)), index)

    def prepare(index: str) -> None:
        for machine in bench.alive():
            bare(bench.hosts[machine.id], index)

    nowhere = "http://127.0.0.1:9"                # nobody listens at this port of the system's
    with pytest.raises(Broken, match=rf"(?s)node-0: the installation failed: .*torch==.*Connection refused.*{STAY}"):
        aws.apply(plan(nowhere), Hook("Bringing the code", lambda: prepare(nowhere)))
    ids = [machine.id for machine in bench.alive()]
    assert len(ids) == 2
    there = index(torch="2.13.0", numpy="2.4.0", tensorboard="2.20.0")
    prepare(there)
    with pytest.raises(Broken, match=rf"(?s)the installation failed: ERROR: .*tokenizers.*{STAY}"):
        aws.apply(plan(there), Person())
    index(tokenizers="0.22.0", fire="0.7.1")
    Path("data/stdlib").mkdir(parents=True)       # else it would be made there, which takes a real environment
    with pytest.raises(Stopped, match=r"The 2 machine\(s\) that were up already stay"):
        aws.apply(plan(there), Person("Copying all of it to 1 more."))
    assert [machine.id for machine in bench.alive()] == ids
    assert len(requests(bench)) == 1


# --- while they work ---

@pytest.fixture
def quick(monkeypatch):
    """Following in tenths of seconds, of trainings that are a line of shell."""
    for name, seconds in {"FETCH_S": .1, "FETCH_OTHERS_S": .2, "ASK_S": .2, "SILENT_S": 5, "GRACE_S": .3}.items():
        monkeypatch.setattr(remote, name, seconds)
    monkeypatch.setattr(gang, "SHOWN_S", 1)
    monkeypatch.setattr(outfit, "node_command", lambda *_: ("sh", "-c", "echo begun; exec sleep 1000"))
    monkeypatch.setattr(Outfit, "_inputs", lambda _: [])
    for name in ("provide", "everywhere"):
        monkeypatch.setattr(reach, name, lambda *_, **__: "python3")


def test_a_machine_that_is_started_anew_is_lost_to_the_training_but_not_to_its_watchdog_and_then_taken_again(
        bench, quick):
    person = Person()
    job = aws.apply(plan_of(bench), person)
    first, second = (bench.hosts[machine.id] for machine in bench.alive())
    bench.advance(900)
    ages = [second.root / "var/lib/txl" / name for name in ("age.json", "deadline.json")]
    assert until(lambda: json.loads(ages[0].read_text())["age"] > 900)
    boto3.client("ec2").reboot_instances(InstanceIds=[second.id])
    assert until(lambda: job.poll() is not None)
    assert job.poll() == (-15, LOST)
    assert any(line.startswith("node-1: nothing of it runs any more: the machine was started anew") for line in
               person.lines)
    job.close()
    assert until(lambda: bench.unguarded() == [])
    assert json.loads(ages[0].read_text())["age"] > 900
    again = aws.apply(plan_of(bench), person)
    assert until(lambda: all((host.home / f"txl/runs/two/nodes/{i}.json").read_text().count("running")
                             for i, host in enumerate((first, second))))
    assert again.poll() is None
    assert again.launch != job.launch
    assert len(requests(bench)) == 1
    again.kill()
    assert until(lambda: again.poll() is not None)
    again.close()


def test_a_machine_that_is_stopped_amid_the_training_is_said_to_be_and_the_others_do_not_wait(bench, quick):
    person = Person()
    job = aws.apply(plan_of(bench, "--nospot"), person)
    last = bench.alive()[1].id
    boto3.client("ec2").stop_instances(InstanceIds=[last])
    assert until(lambda: job.poll() is not None)
    assert job.poll() == (-15, LOST)
    assert any(re.match("node-1: its machine is stop(ping|ped)", line) for line in person.lines)
    job.close()
    boto3.client("ec2").terminate_instances(InstanceIds=[last])


def test_other_machines_go_on_with_the_logs_and_numbers_of_those_that_are_gone(bench, quick, monkeypatch):
    for gang_ in ("first", "second"):
        monkeypatch.setattr(outfit, "node_command", lambda wish, node, *_, gang_=gang_: ("sh", "-c", f"""
            cd runs/two
            for file in logs/rank-{node}.log metrics.jsonl; do echo {gang_} of {node} >> $file; done
            exec sleep 1000"""))
        job = aws.apply(plan_of(bench), Person())
        logs = {Path("runs/two/logs", f"rank-{node}.log"): node for node in (0, 1)}
        assert until(lambda logs=logs, gang_=gang_: all(
            path.exists() and path.read_text().endswith(f"{gang_} of {node}\n") for path, node in logs.items()))
        with bench.ec2.lock:
            for machine in bench.alive():
                bench.world.end(machine)
        assert until(lambda job=job: job.poll() is not None)
        job.close()
    for path, node in {**logs, Path("runs/two/metrics.jsonl"): 0}.items():
        assert path.read_text() == f"first of {node}\nsecond of {node}\n"


def test_another_launcher_follows_a_training_that_one_has_left_and_sees_its_end(bench, quick, monkeypatch):
    monkeypatch.setattr(outfit, "node_command", lambda *_: ("sh", "-c", "while [ ! -e go ]; do sleep .1; done"))
    aws.apply(plan_of(bench), Person())._over.set()
    person = Person()
    job = aws.apply(plan_of(bench), person)
    assert "It is training there already: following it." in person.lines
    for machine in bench.alive():
        (bench.hosts[machine.id].home / "txl/go").touch()
    assert until(lambda: job.poll() is not None)
    assert job.poll() == (0, 0)
    job.close()


# --- while the launcher comes and goes ---

@pytest.mark.slow
def test_a_training_outlives_a_closed_terminal_and_a_suspended_laptop_and_ctrl_c_ends_it_with_a_checkpoint_or_at_once(
        bench, tmp_path, request, stdlib):
    (tmp_path / "data").symlink_to(stdlib)
    stage = Stage(bench, tmp_path, override(tiny, "machines.count=2"), ["--set=recipe.stop.max_steps=100000",
                                                                             "--set=recipe.clock.eval_interval=100000"])

    def launch_until(marker: str) -> Launcher:
        launcher = stage.launch_until(marker)
        request.addfinalizer(launcher.kill)       # of a process that has ended: nothing
        return launcher

    launcher = launch_until("^step ")
    launcher.send(signal.SIGHUP)                   # the terminal is closed
    assert launcher.wait(LAUNCH_S) == -signal.SIGHUP

    launcher = launch_until("It is training there already: following it")
    launcher.until("^step ", LAUNCH_S)
    launcher.send(signal.SIGSTOP)                  # the laptop sleeps
    time.sleep(3)
    launcher.send(signal.SIGCONT)
    launcher.until("^step ", LAUNCH_S)
    launcher.ctrl_c()
    step = int(launcher.until(r"^Stopped at step (\d+) of 100000", LAUNCH_S)[1])
    assert launcher.wait(LAUNCH_S) == 130
    run_dir = tmp_path / "runs" / NAME
    assert newest_checkpoint(run_dir)["step"] == step

    launcher = launch_until(f"goes on from step {step}")
    launcher.until("^step ", LAUNCH_S)
    launcher.ctrl_c()
    launcher.until("Ctrl-C again kills", LAUNCH_S)            # signals of one kind that are pending at once are one
    launcher.ctrl_c()
    launcher.until("^Killing", LAUNCH_S)
    assert int(launcher.until(r"^Killed\. The last checkpoint is of step (\d+)", LAUNCH_S)[1]) >= step
    assert launcher.wait(LAUNCH_S) == 130
    assert len(requests(bench)) == 1
