"""The verbs: what they choose and say as whole values, what they do against the strict EC2 and real sshds."""
from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import urllib.request
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

import launch_tensorboard
from cluster import deliver, doors, ec2, ssh, verbs, verbs_mosh, verbs_ssh, verbs_sync
from cluster.__main__ import VERBS, main, split
from cluster.ec2 import Cloud, Instance, Thing
from cluster.journal import Journal, home, owner_name
from cluster.local import free_port
from cluster.rehearsal import sshd
from cluster.rehearsal.ec2 import StrictEc2
from cluster.run import Refused
from cluster.stacks import stack_for
from cluster.verbs_lists import Cluster, Doomed, choose, doomed, hosts_text, loud, ls_text
from tests.cluster.sshd import Machine, needs_sshd
from tests.waiting import until

CHECKOUT = Path(__file__).parents[2]
POLICY = CHECKOUT / "docs/iam_policy.json"
NOW = 1_800_000_000.0
HOUR = 3600.0
ME = owner_name()


def machine(id: str, cluster: str, node: int = 0, *, age_h: float = 1, left_h: float | None = 1, owner: str = "ann",
            market: ec2.Market = "spot", state: str = "running", public: str | None = "198.51.100.7") -> Instance:
    tags = ec2.tags_of(cluster, owner, "", NOW + HOUR * (left_h or 0), "10/60")
    if left_h is None:
        del tags[ec2.EXPIRES]
    return Instance(id, node, state, "p3.2xlarge", market, "us-east-1a", "10.0.0.1", public, NOW - HOUR * age_h, tags,
                    "")


def thing(what, id: str, cluster: str, *, left_h: float | None = 1) -> Thing:
    return Thing(what, id, cluster, None if left_h is None else NOW + HOUR * left_h, what in ("volume", "address"))


# --- pure ---

def test_an_exact_name_wins_over_a_part_and_of_parts_the_newest_comes_first():
    new = machine("i-2", "test_16", age_h=1)
    there = [machine("i-1", "test", age_h=9), new, machine("i-3", "tiny", age_h=5)]
    assert [x.name for x in choose(there, "test")] == ["test"]
    assert [x.name for x in choose(there, "t")] == ["test_16", "tiny", "test"]
    assert choose(there, "_16") == [Cluster("test_16", "ann", (new,))]


def test_a_name_that_fits_nothing_is_answered_with_what_there_is():
    there = [machine("i-1", "test"), machine("i-2", "test", 1), machine("i-3", "tiny", age_h=2)]
    with pytest.raises(Refused) as refused:
        choose(there, "big")
    assert str(refused.value) == "No cluster is called like 'big'; there is: test, tiny"
    with pytest.raises(Refused, match=r"^There are no machines\.$"):
        choose([], "big")


def test_two_users_clusters_of_one_name_are_two_clusters():
    assert len(choose([machine("i-1", "test"), machine("i-2", "test", owner="bob")], "test")) == 2


def test_ls_is_a_table_oldest_first():
    there = [machine("i-3", "new", age_h=.5, market="ondemand", left_h=50),
             machine("i-2", "old", 1, age_h=3, left_h=-2),
             machine("i-1", "old", 0, age_h=3, left_h=None, public=None),
             machine("i-4", "off", age_h=.1, state="stopped")]
    assert ls_text(there, NOW, {"i-1": 2.0, "i-3": 3.06, "i-4": 1.0}) == """\
name  node  owner  type        market    zone        age         cost       deadline          state    address
old   0     ann    p3.2xlarge  spot      us-east-1a  3 h 00 min  $6.00      NONE              running  -
old   1     ann    p3.2xlarge  spot      us-east-1a  3 h 00 min  unknown    PAST, 2 h 00 min  running  198.51.100.7
new   0     ann    p3.2xlarge  ondemand  us-east-1a  30 min      $1.53      in 2 days         running  198.51.100.7
off   0     ann    p3.2xlarge  spot      us-east-1a  6 min       disk only  in 1 h 00 min     stopped  198.51.100.7"""


def test_what_costs_and_should_not_is_told_loudly():
    there = [machine("i-1", "fine"), machine("i-2", "late", left_h=-3), machine("i-3", "mute", left_h=None)]
    things = [thing("address", "eip-1", "fine"), thing("address", "eip-2", "gone"),
              thing("security group", "sg-1", "gone")]
    assert list(loud(there, things, NOW)) == [
        "!!! i-2 (late, node 0) should have ended 3 h 00 min ago. End it:  python -m cluster gc",
        "!!! i-3 (mute, node 0) does not say when it ends (txl:expires). If nobody needs it:  "
        "python -m cluster kill mute",
        "!!! address eip-2 of gone costs, without a machine:  python -m cluster gc"]


def test_gc_takes_what_is_past_its_deadline_and_what_has_no_machine_but_no_group_of_a_launch_elsewhere():
    late, fine, mute = (machine("i-1", "late", left_h=-1), machine("i-2", "fine"), machine("i-3", "mute", left_h=None))
    things = {name: thing(what, name, cluster, left_h=left_h) for name, what, cluster, left_h in (
        ("of late", "security group", "late", -1),
        ("of fine", "security group", "fine", 1),
        ("of mute", "volume", "mute", None),
        ("open request of fine", "spot request", "fine", 1),
        ("costs", "address", "gone", 1),
        ("launched here", "placement group", "here", 1),
        ("launching elsewhere?", "placement group", "elsewhere", 1),
        ("expired elsewhere", "security group", "old", -1))}
    assert doomed([late, fine, mute], things.values(), NOW, known={"here"}) == Doomed((late,), tuple(
        things[name] for name in ("of late", "open request of fine", "costs", "launched here", "expired elsewhere")))


def test_a_cluster_of_which_one_machine_has_time_left_keeps_its_group():
    group, late = thing("security group", "sg-1", "x"), machine("i-1", "x", left_h=-1)
    assert doomed([late, machine("i-2", "x", 1)], [group], NOW, {"x"}) == Doomed((late,), ())


def test_hosts_are_lines_for_etc_hosts():
    there = [machine("i-1", "x", 1, public="198.51.100.2"), machine("i-0", "x", 0), machine("i-2", "x", 2, public=None)]
    assert hosts_text(there) == "198.51.100.7\tx-node-0\n198.51.100.2\tx-node-1"


def test_a_node_is_told_in_a_line():
    running = {"launch": "1", "state": "running", "status": None, "at": NOW - 2}
    ended = running | {"state": "ended", "status": 1, "at": NOW - 120}
    deadline = {"in_s": 1180.0, "why": "no lease"}
    assert [verbs_ssh.node_text(*said, NOW) for said in (
        (running, None, deadline), (ended, None, deadline), (None, None, None))] == [
        "running, last heard 2 s ago; powers itself off in 19 min as things stand (no lease)",
        "ended with status 1, 2 min ago; powers itself off in 19 min as things stand (no lease)",
        "no supervisor; NO WATCHDOG answers for its end"]


@pytest.mark.parametrize(("line", "words", "flags"), [
    ("ls", [], []),
    ("ls tiny --all", ["tiny"], ["--all"]),
    ("kill tiny --region us-west-2", ["tiny"], ["--region", "us-west-2"]),
    ("cmd x ls -l --all", ["x", "ls", "-l", "--all"], []),
    ("cmd x --all_nodes ls -l", ["x", "ls", "-l"], ["--all_nodes"]),
    ("cmd x -- --odd", ["x", "--odd"], []),
    ("ssh", [], []),
    ("ssh --node=1", [], ["--node=1"]),
    ("ssh x --node=1 -- ls --", ["x", "ls", "--"], ["--node=1"]),
    ("put x a b", ["x", "a", "b"], []),
    ("gc surplus", [], ["surplus"])])
def test_words_come_first_then_flags_then_a_command_as_it_stands(line, words, flags):
    verb, *rest = line.split()
    assert split(VERBS[verb], rest) == (words, flags)


@pytest.mark.parametrize(("line", "said"), [
    ("kil x", "Did you mean 'kill'"), ("kill", "Something is missing"), ("kill x --al", "Did you mean '--all'"),
    ("gc x", "What is 'x' for"), ("nano x", "Something is missing"),
    ("prices a b", "What is 'b' for"), ("sync x --wach", "Did you mean '--watch'"), ("smoke now", "What is 'now' for"),
    ("mosh x --node=one", "--node"), ("kill ''", "The name is empty")])
def test_misuse_is_told_with_status_2(line, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(line))
    assert (ended.value.code, said in capsys.readouterr().err) == (2, True)


def test_help_has_a_line_for_each_verb(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(sum(line.startswith(f"  {name} ") for line in lines) == 1 for name in VERBS)


# --- against EC2 ---

@pytest.fixture(scope="module")
def strict():
    """EC2 with a client: making either takes most of a second."""
    with StrictEc2() as strict, pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ENDPOINT_URL": strict.url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
                            "AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": "/dev/null",
                            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_EC2_METADATA_DISABLED": "true"}.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        cloud = Cloud()
        for module in (verbs, verbs_ssh, verbs_mosh):
            patch.setattr(module, "Cloud", lambda region: cloud)
        yield strict, cloud


@pytest.fixture
def bench(strict, tmp_path, monkeypatch):
    """An empty account, and a laptop that nobody sits at."""
    ec2_, cloud = strict
    ec2_.world.boot_s = ec2_.world.shutdown_s = 0
    ec2_.calls.clear()
    monkeypatch.setenv("TXL_HOME", str(tmp_path / "txl"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verbs, "AGAIN_S", .1)
    with open(os.devnull) as nobody:
        monkeypatch.setattr("sys.stdin", nobody)
        yield SimpleNamespace(cloud=cloud, world=ec2_.world, count=ec2_.count, calls=ec2_.calls, fail=ec2_.fail)
    ec2_.world.shutdown_s = 0
    cloud.terminate(x.id for x in cloud.instances())
    until(lambda: all(x.state == "terminated" for x in cloud.instances(alive=False)))
    for thing in cloud.leftovers():
        cloud.remove(thing)


def launched(bench, name: str, count: int = 1, *, market: ec2.Market = "spot", owner: str | None = None,
             left_h: float = 5, kind: str = "c5.large") -> list[Instance]:
    """Machines as a launch makes them."""
    cloud, owner = bench.cloud, owner or owner_name()
    type_, network = cloud.type(kind), cloud.network()
    image, zone = cloud.image(stack_for(type_).image), min(cloud.zones(kind))
    tags = ec2.tags_of(name, owner, "", time.time() + HOUR * left_h, "10/60")
    group = cloud.security_group(f"txl-{owner}-{name}", network.vpc, "127.0.0.1/32", tags)
    placement = cloud.placement_group(f"txl-{owner}-{name}", tags) if count > 1 else None
    cloud.run_instances(ec2.run_instances_request(
        kind=type_, count=count, market=market, zone=zone, subnet=network.subnets[zone], group=group,
        placement=placement, image=image, disk_gib=10, user_data="", tags=tags, token=uuid.uuid4().hex))
    until(lambda: all(x.state == "running" for x in cloud.instances(cluster=name, owner=owner)))
    return cloud.instances(cluster=name, owner=owner)


def left(bench) -> tuple[set[str], set[str]]:
    """OWNER/CLUSTER of what has machines, and the clusters that have groups."""
    return ({f"{x.tags[ec2.OWNER]}/{x.tags[ec2.CLUSTER]}" for x in bench.cloud.instances()},
            {x.cluster for x in bench.cloud.leftovers()})


def test_kill_ends_the_machines_and_then_what_they_held_and_nothing_else(bench, capsys):
    ids = {x.id for x in launched(bench, "one", 2)}
    launched(bench, "two")
    launched(bench, "one", owner="bob")
    bench.world.shutdown_s = 1.5
    assert main(["kill", "one", "--yes"]) == 0
    assert left(bench) == ({f"{ME}/two", "bob/one"}, {"two", "one"})
    assert not bench.cloud.leftovers(cluster="one", owner=ME)
    assert set(Journal("one").notes("gone")[0]["ids"]) == ids
    assert "Waiting until the machines are really gone" in capsys.readouterr().out


def test_kill_of_several_machines_wants_a_yes_and_of_another_users_all(bench, capsys):
    launched(bench, "one", 2)
    launched(bench, "hers", owner="bob")
    for line, said in (("kill one", "End one of "), ("kill hers", "No cluster is called like 'hers'; there is: one")):
        with pytest.raises(SystemExit) as ended:
            main(line.split())
        assert (ended.value.code, said in capsys.readouterr().err) == (2, True)
    assert bench.count("TerminateInstances") == 0
    assert main(["kill", "hers", "--all"]) == 0
    assert left(bench)[0] == {f"{ME}/one"}


@pytest.mark.parametrize(("answer", "ended"), [("y\n", True), ("\n", False), ("", False)])
def test_at_a_terminal_kill_asks_and_only_a_yes_is_a_yes(bench, capsys, monkeypatch, answer, ended):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    launched(bench, "one", 2)
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    if ended:
        assert main(["kill", "one"]) == 0
    else:
        with pytest.raises(SystemExit):
            main(["kill", "one"])
    assert f"End one of {ME} (2 x c5.large)? [y/N]" in capsys.readouterr().out
    assert bool(left(bench)[0]) != ended


def test_kill_leaves_the_groups_to_a_launcher_that_is_at_work_on_them_and_gc_takes_them_later(bench, capsys):
    launched(bench, "one")
    with Journal("one").alone("launched"):
        assert main(["kill", "one"]) == 0
    assert left(bench) == (set(), {"one"})
    assert "one is being worked on: launched by" in capsys.readouterr().err
    Journal("one").note("intent", token="x")
    assert main(["gc"]) == 0
    assert left(bench) == (set(), set())


def test_kill_says_what_is_left_when_a_machine_does_not_go(bench, capsys, monkeypatch):
    monkeypatch.setattr(verbs, "TRIES", 2)
    bench.world.shutdown_s = 1000
    launched(bench, "one")
    assert main(["kill", "one"]) == 1
    assert "python -m cluster gc" in capsys.readouterr().err
    bench.world.shutdown_s = 0
    for machine in bench.world.machines.values():
        machine.due = machine.due and 0


def test_gc_ends_what_is_past_its_deadline_and_a_dry_run_ends_nothing(bench, capsys):
    late, = launched(bench, "late", left_h=-1)
    launched(bench, "fine")
    launched(bench, "hers", owner="bob", left_h=-1)
    assert main(["gc", "--dry_run"]) == 0
    assert f"machine {late.id} of late, past its deadline" in capsys.readouterr().out
    assert left(bench)[0] == {f"{ME}/late", f"{ME}/fine", "bob/hers"}
    assert main(["gc"]) == 0
    assert left(bench) == ({f"{ME}/fine", "bob/hers"}, {"fine", "hers"})


def test_ls_lists_with_cost_as_noted_at_the_launch_and_others_only_if_asked_to(bench, capsys):
    one, = launched(bench, "one")
    launched(bench, "hers", owner="bob", left_h=-1)
    Journal("one").note("launched", ids=[one.id, "i-other"], usd_per_hour=2 * 3600.0, until=NOW, market="spot")
    before = time.time()
    assert main([]) == 0
    head, _, row, *more = capsys.readouterr().out.splitlines()
    assert (head.startswith("us-east-1, account "), more) == (True, [])
    words = row.split()
    assert before - one.launched <= float(words.pop(8).strip("$")) + .01 <= time.time() - one.launched + .02
    assert words == ["one", "0", ME, "c5.large", "spot", one.zone, "0", "min", "in", "4", "h", "59", "min", "running",
                     one.public]
    assert main(["ls", "--all"]) == 0
    assert "(hers, node 0) should have ended 1 h 00 min ago" in capsys.readouterr().out


def test_on_demand_machines_stop_and_start_and_spot_ones_are_told_what_to_do_instead(bench, capsys):
    launched(bench, "spotty")
    with pytest.raises(SystemExit):
        main(["stop", "spotty"])
    assert "python -m cluster kill spotty" in capsys.readouterr().err
    launched(bench, "steady", market="ondemand")
    assert main(["stop", "steady"]) == 0
    until(lambda: bench.cloud.instances(cluster="steady")[0].state == "stopped")
    assert main(["start", "steady"]) == 0
    until(lambda: bench.cloud.instances(cluster="steady")[0].state == "running")
    assert bench.count("StopInstances") == bench.count("StartInstances") == 1


def test_keys_prints_the_public_key_that_is_there(bench, capsys):
    assert main(["keys"]) == 0
    path, key = capsys.readouterr().out.splitlines()
    assert (Path(path).read_text().strip(), key.split()[0]) == (key, "ssh-ed25519")


def test_spot_prices_are_listed_cheapest_first(bench, capsys):
    assert main(["spot_prices", "p3dn.24xlarge"]) == 0
    first, second, listed = capsys.readouterr().out.splitlines()
    assert (first.split()[0], second.split()[0]) == ("us-east-1c", "us-east-1d")
    assert float(first.split("$")[1].split()[0]) < float(second.split("$")[1].split()[0])
    assert listed.startswith("on demand        $31.2120 per hour, list of ")


def test_prices_are_those_of_the_table_until_amazons_own_list_is_asked_for(bench, capsys):
    assert main(["prices", "c5.l"]) == 0
    assert capsys.readouterr().out.splitlines() == ["c5.large           $0.0850 per hour",
                                                    "On demand, Linux, by the list of July 2026."]
    for line, said in (("prices c5.lage", "Did you mean 'c5.large'"), ("prices --region=us-east-1", "--refresh")):
        with pytest.raises(SystemExit):
            main(line.split())
        assert said in capsys.readouterr().err
    assert bench.count("GetProducts") == 0
    assert main(["prices", "x1e.", "--refresh"]) == 0             # in no table of ours; the rehearsal makes prices up
    kept, *rows, dated = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"\d{{3,}} prices of us-east-1 by AWS's list of today, kept in {home()}/prices.json", kept)
    assert bench.count("GetProducts") == -(-int(kept.split()[0]) // 100)
    assert rows[0] == "x1e.16xlarge       $3.2000 per hour"
    assert dated == f"On demand, Linux, by the list of {time.strftime('%-d %B %Y')}, us-east-1."


def test_an_empty_list_of_prices_is_not_kept(bench, capsys, monkeypatch):
    monkeypatch.setattr(bench.cloud, "region", "eu-west-1")       # of which this EC2 has no list
    with pytest.raises(SystemExit):
        main(["prices", "--refresh"])
    assert "AWS's list has no machine of eu-west-1" in capsys.readouterr().err
    assert not (home() / "prices.json").exists()


# --- on machines ---

@pytest.fixture
def two(bench, tmp_path, monkeypatch):
    """A cluster of two whose machines are sshds, with a run that has written what runs write."""
    there, port = launched(bench, "one", 2), free_port("")
    monkeypatch.setenv("TXL_SSH_PORT", str(port))
    authorized = ssh.key(home()).with_suffix(".pub").read_text()
    hosts = [Machine(tmp_path / f"machine-{x.node}", x.public or "", port, authorized, x.private) for x in there]
    try:
        for host in hosts:
            host.start()
            (host.home / "txl/runs/one/logs").mkdir(parents=True)
            (host.home / "txl/runs/one/nodes").mkdir()
        yield SimpleNamespace(hosts=hosts, user=f"--ssh_user={sshd.user()}")
        for x in there:
            ssh.Shell(Journal("one").folder / "ssh_config", f"node-{x.node}").close()
    finally:
        for host in hosts:
            host.stop()


@needs_sshd
def test_commands_run_on_one_machine_or_on_all_and_the_config_keeps_the_user(two, capfd):
    for host, name in zip(two.hosts, ("a", "b")):
        (host.home / "who").write_text(f"{name}\n")
    assert main(["cmd", "one", two.user, "cat who | tr a-z A-Z"]) == 0
    assert main(["cmd", "one", "--node=1", "cat", "who"]) == 0             # the user is known by now
    assert main(["ssh", "one", "--node=1", "cat", "no such file"]) == 1
    assert main(["cmd", "one", "--all_nodes", "--yes", "cat who; test $(cat who) = a"]) == 1
    said = capfd.readouterr()
    assert said.out.splitlines() == ["A", "b", "node-0: a", "node-1: b"]
    assert "node-1: status 1" in said.err
    with pytest.raises(SystemExit):
        main(["cmd", "one", "--all_nodes", "cat who"])
    assert "Nobody is here to answer" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["ssh", "one", "--node=2"])
    assert "node-2 does not run; there is node-0, node-1" in capfd.readouterr().err
    two.hosts[0].stop()
    assert main(["cmd", "one", "--all_nodes", "--yes", "cat who"]) == 1
    said = capfd.readouterr()
    assert (said.out, said.err.startswith("node-0: ")) == ("node-1: b\n", True)


@needs_sshd
def test_files_go_there_and_come_back(two, tmp_path, capfd):
    (tmp_path / "a b").write_text("text\n")
    assert main(["put", "one", "a b", "there/", "--node=1", two.user]) == 0
    assert (two.hosts[1].home / "there/a b").read_text() == "text\n"
    assert main(["get", "one", "there/a b", "back", "--node=1"]) == 0
    assert (tmp_path / "back").read_text() == "text\n"
    assert main(["cat", "one", "there/a b", "--node=1"]) == 0
    assert capfd.readouterr().out == "text\n"


@needs_sshd
def test_sync_brings_the_code_to_all_machines_and_says_that_a_training_runs(two, tmp_path, capfd, monkeypatch):
    checkout = tmp_path / "checkout"
    for name, text in {".gitignore": "*.tmp\n", "a.py": "1\n", "x.tmp": "", "runs/one/stop": ""}.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    monkeypatch.setattr(verbs_sync, "CHECKOUT", checkout)
    assert main(["sync", "one", two.user]) == 0
    assert "A training runs" not in capfd.readouterr().out
    for host in two.hosts:
        assert (host.home / "txl/a.py").read_text() == "1\n"
        assert sorted(path.name for path in (host.home / "txl").iterdir()) == [".gitignore", "a.py", "runs"]
        assert sorted(path.name for path in (host.home / "txl/runs/one").iterdir()) == ["logs", "nodes"]
    (checkout / "a.py").rename(checkout / "b.py")
    with open(two.hosts[1].home / "txl/runs/one/nodes/1.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)          # as the supervisor of node 1 does
        assert main(["sync", "one"]) == 0
    assert "A training runs on node-1: " in capfd.readouterr().out
    assert all((host.home / "txl/b.py").exists() and not (host.home / "txl/a.py").exists() for host in two.hosts)


@needs_sshd
def test_sync_watches_a_folder_and_brings_it_after_each_change_until_ctrl_c(two, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/first").write_text("1")
    there = [host.home / "kept/notes" for host in two.hosts]
    with following("sync", "one", "notes", "kept/notes", "--watch", two.user) as program:
        assert "compared" in program.stdout.readline()
        assert [(path / "first").read_text() for path in there] == ["1", "1"]
        (tmp_path / "notes/first").write_text("2")
        (tmp_path / "notes/second").write_text("new")
        until(lambda: all((path / "second").exists() and (path / "first").read_text() == "2" for path in there))


def test_a_watched_folder_is_sent_once_for_each_change_and_again_after_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verbs_sync, "WATCH_S", 0)
    monkeypatch.setattr(verbs_sync, "AGAIN_S", 0)
    (tmp_path / "file").write_text("1")
    sent, looks = list[str](), iter(range(1000))

    def send() -> None:
        sent.append((tmp_path / "file").read_text())
        if len(sent) == 1:
            raise ssh.Unreachable("node-0", "gone")

    def interrupted() -> bool:
        if (look := next(looks)) == 30:
            (tmp_path / "file").write_text("22")
        return look > 60

    with contextlib.suppress(ssh.Interrupted):
        verbs_sync.watch(deliver.goods(tmp_path, "there"), send, interrupted)
    assert sent == ["1", "1", "22"]
    assert capsys.readouterr().err == "node-0: gone\n"


@needs_sshd
def test_sync_of_what_is_not_there_or_goes_nowhere_is_refused(two, capsys):
    for line, said in (("sync one .", "HERE THERE"), ("sync one missing there", "There is no missing here")):
        with pytest.raises(SystemExit) as ended:
            main(line.split())
        assert (ended.value.code, said in capsys.readouterr().err) == (2, True)
    with Journal("one").alone("launched"), pytest.raises(SystemExit):
        main(["sync", "one", ".", "there", two.user])
    assert "one is being worked on: launched by" in capsys.readouterr().err


@needs_sshd
def test_nano_edits_with_the_machines_editor_and_says_so_where_there_is_none(two):
    first = two.hosts[0]
    (first.home / "notes").write_text("old\n")
    for name in ("nano", "vi"):                   # the machine's, whatever this one has
        first.has(name, f'[ -t 0 ] && echo {name} "$@" >> edits')
    for editor, said in (("", "nano ./notes\n"), ("vi -R", "vi -R ./notes\n"), ("missing", "nano ./notes\n")):
        first.has("sh", f'EDITOR={shlex.quote(editor)} exec /bin/sh "$@"')
        with typing("nano", "one", "notes", two.user) as program:
            program.until_it_ends(0)
        assert (first.home / "edits").read_text() == said
        (first.home / "edits").unlink()
    (first.bin / "nano").unlink()
    (first.bin / "vi").unlink()
    first.has("sh", f'EDITOR= PATH={shlex.quote(str(first.bin))} exec /bin/sh "$@"')
    with typing("nano", "one", "notes") as program:
        program.until_it_ends(1)
        assert b"No editor is on node-0. Install one:  python -m cluster cmd one --node=0 sudo apt-get" in program.seen


@needs_sshd
def test_status_tells_of_supervisors_the_training_and_the_power_off_and_of_a_machine_that_is_silent(two, capfd):
    first, second = two.hosts
    (first.home / "txl/runs/one/nodes/0.json").write_text(
        json.dumps({"launch": "1", "state": "running", "status": None, "pid": 1, "beat": 3, "at": time.time()}))
    (first.home / "txl/runs/one/status.json").write_text(json.dumps({"state": "training", "step": 7, "message": ""}))
    (first.root / "var/lib/txl/deadline.json").write_text(json.dumps({"in_s": 1199.0, "why": "no lease"}))
    second.stop()
    assert main(["status", "one", two.user]) == 1
    node_0, node_1, training = capfd.readouterr().out.splitlines()
    assert node_0.split(" ", 2)[2].startswith("running, last heard ")
    assert node_0.endswith("powers itself off in 19 min as things stand (no lease)")
    assert "Connection refused" in node_1
    assert training == "training: training at step 7"


@needs_sshd
def test_a_ranks_log_is_found_on_the_machine_that_has_it_and_followed_until_ctrl_c(two, capfd):
    log = two.hosts[1].home / "txl/runs/one/logs/rank-3.log"
    log.write_text("step 1\n")
    assert main(["logs", "one", "--rank=3", two.user]) == 0
    assert capfd.readouterr().out == "step 1\n"
    with pytest.raises(SystemExit):
        main(["logs", "one", "--rank=4"])
    with following("logs", "one", "-f", "--rank=3") as program:
        assert program.stdout.readline() == "step 1\n"
        with open(log, "a") as file:
            file.write("step 2\n")
        assert program.stdout.readline() == "step 2\n"


@needs_sshd
def test_tensorboard_is_started_on_node_0_and_reached_through_a_tunnel(two, capfd):
    first, real = two.hosts[0], sys.executable
    first.has("python3", f"""[ "$2" = tensorboard.main ] || exec {real} "$@"
for word; do case $word in --port=*) port=${{word#--port=}} ;; esac; done
echo $$ > pid
exec {real} -m http.server --bind 127.0.0.1 $port""")
    (first.home / "txl/marker").write_text("node 0")
    try:
        with following("tensorboard", "one", two.user) as program:
            url = next(line for line in program.stdout if "http://" in line).split()[-1]
            assert urllib.request.urlopen(f"{url}/marker", timeout=120).read() == b"node 0"
    finally:
        os.kill(int((first.home / "txl/pid").read_text()), signal.SIGKILL)


@needs_sshd
@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_attach_shows_the_nodes_log_in_a_tmux_that_stays(two):
    first, tmux = two.hosts[0], shutil.which("tmux")
    first.has("tmux", f'export TMUX_TMPDIR="{first.folder}"\nexec {tmux} "$@"')
    (first.home / "txl/runs/one/logs/node-0.log").write_text("torchrun says\n")
    try:
        with typing("attach", "one", two.user) as program:
            program.until_it_says(b"torchrun says")
            program.types(b"\x02d")               # Ctrl-B D
            program.until_it_ends(0)
        sessions = subprocess.run([first.bin / "tmux", "ls"], capture_output=True, text=True).stdout
        assert sessions.startswith("txl-one: ")
    finally:
        subprocess.run([first.bin / "tmux", "kill-server"], check=False)


# --- mosh ---

needs_mosh = pytest.mark.skipif(not shutil.which("mosh") or not shutil.which("mosh-server"), reason="needs mosh")


@pytest.fixture
def moshed(two, monkeypatch):
    """Of servers whose client is gone none stays."""
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    for host in two.hosts:
        host.has("mosh-server", f'MOSH_SERVER_NETWORK_TMOUT=5 exec {shutil.which("mosh-server")} "$@"')
    return two


def udp(bench) -> list[tuple[int, int, str]]:
    return [(rule["FromPort"], rule["ToPort"], source["CidrIp"])
            for group in bench.cloud._ec2.describe_security_groups()["SecurityGroups"]
            for rule in group["IpPermissions"] if rule["IpProtocol"] == "udp" for source in rule["IpRanges"]]


@needs_sshd
@needs_mosh
@pytest.mark.parametrize("leaves", ["exit", "SIGTERM", "closed terminal"])
def test_mosh_has_one_udp_port_open_to_this_address_alone_and_only_as_long_as_it_runs(bench, moshed, leaves):
    with typing("mosh", "one", "--node=1", moshed.user) as program:
        program.until_it_says(b"is open to 127.0.0.1/32 alone, until you leave")
        program.until_it_says(b"\x1b[?1049h")     # mosh's own screen
        program.types(b"echo $((6 * 7)) from $(basename $(dirname $HOME))\n")
        program.until_it_says(b"42 from machine-1")
        (low, high, source), = udp(bench)
        assert (low, source) == (high, "127.0.0.1/32")
        assert 60001 <= low < 61000
        if leaves == "exit":
            program.types(b"exit\n")
            program.until_it_ends(0)
        elif leaves == "SIGTERM":
            program.process.terminate()
            program.until_it_ends(130)
        else:
            program.hang_up()
            program.process.wait(120)
    assert udp(bench) == []
    granted = {action for statement in json.loads(POLICY.read_text())["Statement"]
               for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])}
    assert {f"{call.service}:{call.action}" for call in bench.calls} <= granted


@needs_sshd
@needs_mosh
def test_the_port_of_a_mosh_that_was_killed_is_closed_by_the_next_verb_and_that_of_a_living_one_stays(
        bench, moshed, capfd):
    with typing("mosh", "one", moshed.user) as killed, typing("mosh", "one", "--node=1", moshed.user) as living:
        for program in (killed, living):
            program.until_it_says(b"alone, until you leave")
        until(lambda: len(udp(bench)) == 2)
        killed.process.kill()
        killed.process.wait()
        before = bench.count("RevokeSecurityGroupIngress")
        assert main(["ssh", "one", "true"]) == 0
        (port, _, _), = udp(bench)
        assert doors.in_use("one") == {port}
        assert bench.count("RevokeSecurityGroupIngress") == before + 1
        before = bench.count("DescribeSecurityGroups")
        assert main(["ssh", "one", "true"]) == 0
        assert bench.count("DescribeSecurityGroups") == before    # nothing is looked for without a trace
        living.until_it_says(b"\x1b[?1049h")
        living.types(b"exit\n")
        living.until_it_ends(0)
    assert udp(bench) == []


@needs_sshd
def test_mosh_says_what_is_missing_where(two, monkeypatch):
    two.hosts[0].has("sh", 'PATH=/nowhere exec /bin/sh "$@"')
    with typing("mosh", "one", two.user) as program:
        program.until_it_ends(1 if shutil.which("mosh") else 2)
        assert (b"node-0: it has no mosh-server. Install it:  python -m cluster cmd one --all_nodes 'sudo apt-get "
                b"install -y mosh'" if shutil.which("mosh") else b"mosh is not installed here") in program.seen


def test_a_launch_and_gc_close_the_ports_that_nobody_here_uses_and_no_others(bench, capsys):
    launched(bench, "one")
    network = bench.cloud.network()
    tags = ec2.tags_of("one", ME, "", time.time() + HOUR, "10/60")

    def launch() -> None:
        bench.cloud.security_group(f"txl-{ME}-one", network.vpc, "127.0.0.1/32", tags, doors.in_use("one"))

    left = bench.cloud.door(ME, "one", 60009, "198.51.100.1/32")
    with doors.opened(bench.cloud, "one", "127.0.0.1/32", [60001]) as door:
        bench.cloud.open_door(left)
        launch()
        assert udp(bench) == [(60001, 60001, "127.0.0.1/32")]
        bench.cloud.open_door(left)
        assert main(["gc", "--dry_run"]) == 0
        assert "UDP port 60009 of one, open to 198.51.100.1/32 for a mosh that is no more" in capsys.readouterr().out
        assert len(udp(bench)) == 2
        assert main(["gc"]) == 0
        assert udp(bench) == [(door.port, door.port, door.cidr)]
        with pytest.raises(Refused, match="No UDP port"), doors.opened(bench.cloud, "one", door.cidr, [60001]):
            pass
    assert udp(bench) == []


def test_a_cluster_that_is_killed_takes_its_open_port_with_it(bench, capsys):
    launched(bench, "one")
    with doors.opened(bench.cloud, "one", "127.0.0.1/32", [60001]):
        assert main(["kill", "one"]) == 0
        assert left(bench) == (set(), set())
    assert capsys.readouterr().err == ""
    assert doors.in_use("one") == set()


@needs_mosh
def test_a_machine_behind_node_0_is_not_for_mosh(bench):
    first, _ = launched(bench, "one", 2, kind="p4d.24xlarge")
    bench.cloud.address(first.id, first.tags)     # as a launch does: EC2 gives these none
    with typing("mosh", "one", "--node=1") as program:
        program.until_it_ends(2)
        assert b"node-1 has no public address, and mosh does not go through node-0" in program.seen
    assert udp(bench) == []


def test_a_port_that_cannot_be_closed_is_named_and_closed_later(bench, capsys):
    launched(bench, "one")
    with doors.opened(bench.cloud, "one", "127.0.0.1/32", [60001]):
        bench.fail("RevokeSecurityGroupIngress", "UnauthorizedOperation", status=403)
    assert "UDP port 60001 of one is still open to 127.0.0.1/32" in capsys.readouterr().err
    doors.close_forgotten(bench.cloud, "one")
    assert udp(bench) == []


def test_launch_tensorboard_is_the_verb_and_refuses_a_run_that_is_nowhere(bench, capsys):
    with pytest.raises(SystemExit) as ended:
        launch_tensorboard.main(["--name=nowhere"])
    assert (ended.value.code, capsys.readouterr().err) == (2, "There are no machines.\n")


def test_logs_of_a_run_without_machines_are_those_here(bench, tmp_path, capfd):
    (tmp_path / "runs/here/logs").mkdir(parents=True)
    (tmp_path / "runs/here/recipe.json").touch()
    (tmp_path / "runs/here/logs/rank-0.log").write_text("step 5\n")
    launched(bench, "here_too")
    assert main(["logs", "here"]) == 0
    assert capfd.readouterr().out == "step 5\n"


class following:
    """A verb in a process of its own, which Ctrl-C must end well."""
    def __init__(self, *words: str):
        self.process = subprocess.Popen([sys.executable, "-m", "cluster", *words], stdout=subprocess.PIPE, text=True,
                                        stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
                                        start_new_session=True)

    def __enter__(self):
        return self.process

    def __exit__(self, kind, error, trace):
        self.process.send_signal(signal.SIGINT)
        try:
            assert self.process.wait(120) == 0 or error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)           # what it has started holds its output open
            self.process.communicate()


class typing:
    """A verb in a terminal of its own, and somebody at its keyboard."""
    def __init__(self, *words: str):
        self.keyboard, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        self.seen = self.typed = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster", *words], stdin=terminal, stdout=terminal, stderr=terminal,
            start_new_session=True, env=os.environ | {"PYTHONPATH": str(CHECKOUT), "TERM": "xterm"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(terminal)

    def __enter__(self):
        return self

    def __exit__(self, *_: object):
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            os.close(self.keyboard)

    def types(self, text: bytes) -> None:
        self.typed = text
        os.write(self.keyboard, text)

    def hang_up(self) -> None:
        os.close(self.keyboard)

    def until_it_says(self, text: bytes) -> None:
        deadline = time.monotonic() + 120
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            assert self._reads() or self.process.poll() is None, self.seen

    def until_it_ends(self, status: int) -> None:
        """Typed once more now and then, as a person would: a terminal that is still being set up loses keys."""
        deadline, again = time.monotonic() + 300, time.monotonic() + 5
        while self.process.poll() is None and time.monotonic() < deadline:        # read: a full terminal would block it
            self._reads()
            if self.typed and time.monotonic() > again:
                again += 5
                with contextlib.suppress(OSError):
                    os.write(self.keyboard, self.typed)
        while self._reads():
            pass
        assert self.process.returncode == status, self.seen

    def _reads(self) -> bool:
        try:
            said = os.read(self.keyboard, 10_000) if select.select([self.keyboard], [], [], .1)[0] else b""
        except OSError:                           # EIO: everybody there has gone
            return False
        self.seen += said
        return bool(said)
