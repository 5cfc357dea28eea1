"""Machines that exist: how their names are read, what is in the way on them, and that nothing of theirs is harmed."""
from __future__ import annotations

import fcntl
import getpass
import os
import shutil
from dataclasses import asdict, replace

import pytest

from cluster import hosts, run
from cluster.__main__ import main
from cluster.backends import Wish
from cluster.hosts import Machine
from cluster.run import Refused
from cluster.spec import Terms
from cluster.ssh import Host, Shell
from configs import tiny
from tests.cluster.contract_cases import agent
from tests.cluster.sshd import needs_sshd, put


@pytest.mark.parametrize(("given", "named"), [
    ("a", [("a", None)]),
    ("me@a:2222,[fe80::1],b.lab", [("me@a:2222", None), ("[fe80::1]", None), ("b.lab", None)]),
    ("a=10.0.0.1, b", [("a", "10.0.0.1"), ("b", None)]),
])
def test_hosts_are_named_as_ssh_takes_them_with_their_address_among_themselves(given, named):
    assert hosts.parsed(given) == named


def test_hosts_may_stand_in_a_file(tmp_path):
    (tmp_path / "lab").write_text("# ours\ngpu1  10.0.0.1   # the old one\n\ngpu2\n")
    assert hosts.parsed(str(tmp_path / "lab")) == [("gpu1", "10.0.0.1"), ("gpu2", None)]


@pytest.mark.parametrize(("given", "said"), [
    (None, "Which machines?"), ("", "Which machines?"), ("a,,b", "'' is no host"), ("-oProxyCommand=x", "is no host"),
    ("a b c", "is no host"), ("a;rm", "is no host"), ("a,b,a", "a twice"),
])
def test_what_is_no_host_is_refused(given, said):
    with pytest.raises(Refused, match=said):
        hosts.parsed(given)


def test_a_file_without_hosts_is_refused(tmp_path):
    (tmp_path / "none").write_text("# nobody\n")
    with pytest.raises(Refused, match="names no machine"):
        hosts.parsed(str(tmp_path / "none"))


CONFIG = """
Host gpu1
  HostName 10.1.2.3
  User me
  Port 2222
  IdentityFile ~/.ssh/lab
  ProxyJump door
  UserKnownHostsFile {known} /nonexistent
Host *
  User nobody
  RemoteCommand tmux
  LocalForward 9999 localhost:9999
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A person whose ssh has a configuration."""
    known = tmp_path / "known"
    known.write_text("[10.1.2.3]:2222 ssh-ed25519 KEY1\n10.1.2.3 ssh-ed25519 KEY2\nother ssh-ed25519 KEY3\n"
                     "@cert-authority [10.1.2.3]:2222 ssh-ed25519 KEY4\n")
    (tmp_path / "config").write_text(CONFIG.format(known=known))
    put(tmp_path, {"bin/ssh": f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/config "$@"\n'})
    (tmp_path / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")


@needs_sshd
def test_a_host_is_what_ones_own_ssh_makes_of_its_name(lab):
    host, keys = hosts.resolved(1, "gpu1", None)
    assert (host.node, host.address, host.alias) == (1, "10.1.2.3", "10.1.2.3-2222")
    said = dict(host.settings)
    assert {name: said[name] for name in ("User", "Port", "IdentityFile", "ProxyCommand")} == {
        "User": "me", "Port": "2222", "IdentityFile": ["~/.ssh/lab"], "ProxyCommand": "ssh -W '[%h]:%p' door"}
    assert not said.keys() & {"RemoteCommand", "LocalForward", "HostName"}       # what is for a person at a terminal
    assert sorted(keys.splitlines()) == ["10.1.2.3-2222 ssh-ed25519 KEY1",
                                         "@cert-authority 10.1.2.3-2222 ssh-ed25519 KEY4"]
    assert dict(hosts.resolved(1, "gpu1", "root")[0].settings)["User"] == "root"
    assert dict(hosts.resolved(1, "gpu1:22", None)[0].settings)["Port"] == "22"


ANSWER = "cores 8\naddress 10.0.0.7 fe80::1\ngpus 0\ncapability \n"


@pytest.mark.parametrize(("more", "said"), [
    ("", []),
    ("lacks rsync\nlacks flock\n", ["it has no rsync, flock."]),
    ("strange ~/txl\n", ["its ~/txl is not a launch's"]),
    ("busy txl/runs/mine/nodes/0.lock\n", []),
    ("busy txl/runs/other/nodes/0.lock\nbusy txl/runs/other/nodes/1.lock\n", ["run other trains there"]),
])
def test_what_is_in_the_way_is_said(more, said):
    found = list(hosts.in_the_way(ANSWER + more, "mine"))
    assert len(found) == len(said)
    assert all(line.startswith(begin) for line, begin in zip(found, said))


@pytest.mark.parametrize(("address", "among", "private"), [
    ("10.0.0.7 10.0.0.7 172.17.0.1", None, "10.0.0.7"),
    ("fe80::9 192.168.1.4 fe80::9", None, "192.168.1.4"),
    ("10.0.0.7", "10.9.9.9", "10.9.9.9"),
    ("", None, "gpu1.lab"),
])
def test_a_machine_is_known_to_the_others_by_the_address_that_it_has_itself(address, among, private):
    shell = Shell(None, "node-0", Host(0, "gpu1.lab", "gpu1.lab", "x"))
    answer = f"cores 8\naddress {address}\ngpus 2\ncapability 8.0\n"
    assert hosts.machine("gpu1", among, shell, answer).shell.host.private == private


def wish(count: int, *names: str, gpus: int | None = None, **terms) -> Wish:
    config = replace(tiny, machines=replace(tiny.machines, count=count, gpus=gpus))
    return Wish("mine", config, run.NEW, Terms(hosts=",".join(names) or None, **terms))


def of_gpus(*gpus: int, capability: float = 8.0) -> tuple[Machine, ...]:
    return tuple(Machine(f"gpu{i}", Shell(None, f"node-{i}", Host(i, f"10.0.0.{i}", f"10.0.0.{i}", "x")), 8, x,
                         capability if x else 0.0) for i, x in enumerate(gpus))


def test_each_machine_has_as_many_ranks_as_the_one_with_the_fewest_gpus():
    layout = hosts.lay_out(wish(2), of_gpus(8, 4))
    assert [node.ranks for node in layout.nodes] == [4, 4]
    assert any("gpu0 8, gpu1 4" in note for note in layout.notes)
    assert [node.env["OMP_NUM_THREADS"] for node in layout.nodes] == ["1", "1"]
    assert [node.ranks for node in hosts.lay_out(wish(2, gpus=2), of_gpus(8, 4)).nodes] == [2, 2]
    assert [node.env for node in hosts.lay_out(wish(1), of_gpus(0)).nodes] == [{"OMP_NUM_THREADS": "8"}]
    with pytest.raises(ValueError, match=r"machines\.gpus=8, but gpu1 has 4"):
        hosts.lay_out(wish(2, gpus=8), of_gpus(8, 4))


def test_torch_is_the_build_that_the_machines_gpus_run():
    volta, current, none = (of_gpus(n, capability=c)[0].ground for n, c in ((8, 7.0), (8, 7.5), (0, 0.0)))
    assert volta.index_url.endswith("/cu126")
    assert current.index_url is None
    assert none.index_url.endswith("/cpu")


@pytest.fixture
def three(trio, tmp_path, monkeypatch):
    """The names of three machines, which an agent's key opens."""
    for name in [name for name in os.environ if name.startswith("TXL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TXL_HOME", str(tmp_path / "txl"))
    with agent(trio.key) as socket:
        monkeypatch.setenv("SSH_AUTH_SOCK", socket)
        yield [f"{getpass.getuser()}@{machine.address}:{machine.port}" for machine in trio.all]
    for shell in trio.shells:
        shell.close()


@needs_sshd
def test_machines_are_asked_what_they_have_and_nothing_on_them_changes(trio, three):
    trio[1].has("nvidia-smi", 'case "$*" in -L) echo "GPU 0: x"; echo "GPU 1: x" ;; *) echo 9.0; echo 8.6 ;; esac')
    before = [sorted(machine.home.rglob("*")) for machine in trio.all]
    found = hosts.survey(wish(2, *three[:2]))
    assert [(x.gpus, x.capability) for x in found] == [(0, 0.0), (2, 8.6)]
    assert [x.shell.host.private for x in found] == [machine.address for machine in trio.all[:2]]
    assert [sorted(machine.home.rglob("*")) for machine in trio.all] == before
    for x in found:
        x.shell.close()


@needs_sshd
def test_a_folder_that_is_somebodys_own_is_refused_and_left_alone(trio, three):
    put(trio[0].home, {"txl/thesis.tex": "years of work"})
    put(trio[1].home, {"txl/cluster/host/supervisor.py": "", "txl/.git/HEAD": "a checkout"})
    put(trio[2].home, {"txl/cluster/host/supervisor.py": ""})
    with pytest.raises(Refused, match="its ~/txl is not a launch's") as refused:
        hosts.survey(wish(3, *three))
    assert [name in str(refused.value) for name in three] == [True, True, False]
    assert (trio[0].home / "txl/thesis.tex").read_text() == "years of work"


@needs_sshd
def test_a_run_that_trains_there_is_not_disturbed_by_another(trio, three):
    put(trio[0].home, {"txl/cluster/host/supervisor.py": "", "txl/runs/other/nodes/0.lock": "L"})
    with open(trio[0].home / "txl/runs/other/nodes/0.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Refused, match="run other trains there"):
            hosts.survey(wish(1, three[0]))
    hosts.survey(wish(1, three[0]))[0].shell.close()


@needs_sshd
def test_a_run_that_may_train_on_other_machines_is_not_begun_again_on_these(trio, three):
    put(trio[0].home, {"txl/cluster/host/supervisor.py": "", "txl/runs/mine/nodes/0.lock": "L"})
    hosts.survey(wish(1, three[0]))[0].shell.close()
    hosts.Journal("mine").note(hosts.HOSTED, names=[three[0]], hosts=[])
    with open(trio[0].home / "txl/runs/mine/nodes/0.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Refused, match=rf"mine trains on {three[0]}.*\n.*--hosts={three[0]}\n"):
            hosts.survey(wish(1, three[1]))
    hosts.survey(wish(1, three[0]))[0].shell.close()
    trio[0].stop()
    try:
        with pytest.raises(Refused, match="whether it trains there cannot be asked"):
            hosts.survey(wish(1, three[1]))
    finally:
        trio[0].start()
    hosts.survey(wish(1, three[1]))[0].shell.close()


@needs_sshd
def test_who_cannot_be_reached_without_a_question_is_named(three):
    with pytest.raises(Refused, match=r"1 of 2 machines: node-1: .*refused") as refused:
        hosts.survey(wish(2, three[0], "127.77.0.99:9"))
    assert "node-1 is 127.77.0.99:9" in str(refused.value)
    assert "Nothing was started" in str(refused.value)


def test_as_many_machines_are_wanted_as_the_config_has():
    with pytest.raises(Refused, match=r"--hosts names 2 machine\(s\), and the config is for 1\. .* --machines=2"):
        hosts.survey(wish(1, "a", "b"))


@needs_sshd
def test_the_verbs_find_the_machines_that_a_run_was_started_on(trio, three, tmp_path, capfd):
    found = hosts.survey(wish(2, *three[:2]))
    hosts.Journal("mine").note(hosts.HOSTED, names=three[:2], hosts=[asdict(x.shell.host) for x in found])
    for i, machine in enumerate(trio.all[:2]):
        put(machine.home, {f"txl/runs/mine/logs/rank-{i}.log": f"I am rank {i}\n", "txl/runs/mine/nodes/x": ""})
    for rank in (0, 1):
        assert main(["logs", "mine", f"--rank={rank}"]) == 0
        assert capfd.readouterr().out == f"I am rank {rank}\n"
    assert main(["status", "mine"]) == 0
    assert capfd.readouterr().out.splitlines()[:2] == [
        f"node-{i} {machine.address}: no supervisor" for i, machine in enumerate(trio.all[:2])]
    put(tmp_path, {"notes/a": "b"})
    assert main(["sync", "mine", str(tmp_path / "notes"), "kept"]) == 0
    assert [(machine.home / "kept/a").exists() for machine in trio.all] == [True, True, False]
    for machine in trio.all[:2]:
        shutil.rmtree(machine.home / "kept")
    for x in found:
        x.shell.close()
