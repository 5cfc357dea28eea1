"""What can go wrong in the cloud and at the laptop while machines are taken, against the strict EC2 with sshds behind.

After every test each machine that still costs has a living watchdog with a deadline for it.
"""
from __future__ import annotations

import getpass
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import boto3
import pytest

import launch
from benchmarks.launch import PYTHON3
from cluster import aws, ec2, gang, ready, verbs
from cluster.__main__ import main
from cluster.journal import Journal, owner_name
from cluster.plan import Plan
from cluster.rehearsal.bench import Bench
from cluster.rehearsal.hosts import Knobs
from cluster.rehearsal.world import Machine, price
from cluster.run import Broken, Refused, Stopped
from tests.cluster.launching import Person, is_spot, launched, plan_of, requests, until
from tests.cluster.sshd import needs_sshd

CHECKOUT = Path(__file__).parents[2]
POLICY = CHECKOUT / "docs" / "iam_policy.json"
SPOT = [("spot", f"us-east-1{letter}") for letter in "abcdef"]
pytestmark = needs_sshd


class Onlooker(Person):
    """Does `then` at a line, and stays."""
    def interrupted(self) -> bool:
        return False


def planned(*argv: str) -> Plan:
    """As the command line says."""
    flags = launch.parse(launch.Flags, [*argv, "--backend=aws", "--name=two", "--wait=0"], prog="launch.py", about="")
    return launch.make_plan(flags, launch.find_config(flags))


def process(bench: Bench, *more: str) -> subprocess.Popen[str]:
    """A launcher that can be killed."""
    env = bench.env | {"TXL_HOME": os.environ["TXL_HOME"]}
    return subprocess.Popen(
        [sys.executable, str(CHECKOUT / "launch.py"), "--config=tiny", "--backend=aws", "--name=two", "--wait=0",
         "--instance_type=c5.xlarge", "--machines=2", "--set=machines.gpus=1", "--set=recipe.batch.size=none",
         "--set=recipe.batch.local_size=2", "--skip_setup", f"--ssh_user={bench.user}", "--yes", *more],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def reads_until(launcher: subprocess.Popen[str], marker: str) -> None:
    assert launcher.stdout is not None
    assert any(marker in line for line in launcher.stdout), f"{marker} was never said"


def abandoned(bench: Bench, *flags: str, says: str = "2 machine(s) run") -> list[Machine]:
    """Machines of a launch that was lost once it had said `says`, and could not end them."""
    before = len(bench.instances())
    bench.ec2.fail("TerminateInstances", "UnauthorizedOperation", times=math.inf, status=403)
    with pytest.raises(Stopped, match="may still run"):
        aws.apply(plan_of(bench, *flags), Person(says))
    bench.ec2.heal()
    assert until(lambda: not bench.unguarded())
    return bench.instances()[before:]


def adopted(bench: Bench, *flags: str) -> Person:
    """The same command again, as far as the machines that are there."""
    person = Person("Bringing the code")
    with pytest.raises(Stopped):
        aws.apply(plan_of(bench, *flags), person)
    return person


def rules_of_port_22() -> set[str]:
    (group,) = boto3.client("ec2").describe_security_groups(Filters=[
        {"Name": "group-name", "Values": [f"txl-{owner_name()}-two"]}])["SecurityGroups"]
    return {x["CidrIp"] for rule in group["IpPermissions"] if rule.get("ToPort") == 22 for x in rule["IpRanges"]}


def terms_of(bench: Bench, machine: Machine) -> dict[str, Any]:
    """What its watchdog goes by, once the machine has booted so far."""
    path = bench.hosts[machine.id].root / "var/lib/txl/terms.json"
    until(path.exists)
    return json.loads(path.read_text())


@pytest.fixture
def hasty(monkeypatch):
    """Of a network that gives no answer little is waited for."""
    monkeypatch.setattr(ec2, "READ_S", .5)
    monkeypatch.setattr(ec2, "READS", ec2.ONCE)
    monkeypatch.setattr(gang, "SHOWN_S", 2)


# --- where there is room ---

def test_the_third_zone_gets_the_whole_gang_and_the_first_two_nothing(bench):
    plan, before = plan_of(bench), len(bench.instances())
    zones = plan.layout.facts.zones
    bench.world.capacity = {("spot", zones[0]): 1, ("spot", zones[1]): 0}
    with pytest.raises(Stopped):
        aws.apply(plan, Person("2 machine(s) run"))
    assert [params["Placement.AvailabilityZone"] for params in requests(bench)] == list(zones[:3])
    assert [machine.zone for machine in bench.instances()[before:]] == [zones[2]] * 2


def test_where_spot_is_exhausted_on_demand_machines_hold_the_budget_at_their_own_price(bench):
    bench.world.capacity = dict.fromkeys(SPOT, 1)
    limits = list[float]()
    person = Person("2 machine(s) run", lambda: limits.extend(terms_of(bench, x)["budget_s"] for x in bench.alive()))
    before = len(bench.instances())
    with pytest.raises(Stopped):
        aws.apply(plan_of(bench, "--fallback=ondemand", "--budget=5", "--disk_gib=200"), person)
    assert [machine.market for machine in bench.instances()[before:]] == ["ondemand"] * 2
    per_hour = 2 * (price("c5.xlarge", "ondemand", "us-east-1a") + 200 * .08 / 730 + .005)
    assert limits == pytest.approx([3600 * 5 / per_hour] * 2, rel=.01)


def test_on_demand_machines_that_would_not_fit_the_budget_are_not_taken(bench):
    bench.world.capacity = dict.fromkeys(SPOT, 0)
    plan = planned("--config=one_machine", "--fallback=ondemand", "--budget=40")      # about 3 hours at 31 dollars
    with pytest.raises(Refused, match=r"On demand it would cost \$\d+\.\d+ in all, and of --budget \$40\.00 are left"):
        aws.apply(plan, Person())
    assert all(is_spot(params) for params in requests(bench))
    assert bench.leftovers() == []


@pytest.mark.parametrize(("flags", "code", "quota"), [
    ((), "MaxSpotInstanceCountExceeded", "L-34B43A08"), (("--nospot",), "VcpuLimitExceeded", "L-1216C47A")])
def test_a_quota_of_zero_is_named_as_service_quotas_lists_it(bench, flags, code, quota):
    bench.ec2.fail("RunInstances", code, times=math.inf)
    with pytest.raises(Refused, match=quota):
        aws.apply(plan_of(bench, *flags), Person())
    assert len(requests(bench)) == 1
    assert bench.leftovers() == []


def test_without_an_address_in_the_quota_machines_that_need_one_are_taken_back(bench, monkeypatch):
    monkeypatch.setattr(bench.world, "address_limit", 0)
    plan = planned("--config=one_machine_p4d", "--machines=2", "--skip_setup", f"--ssh_user={bench.user}")
    with pytest.raises(Broken, match=r"(?s)AddressLimitExceeded.*Service Quotas.*2 machine\(s\).* are terminated"):
        aws.apply(plan, Person())
    assert len(requests(bench)) == 1
    assert bench.alive() == []
    assert bench.leftovers() == []


@pytest.mark.parametrize(("action", "code"), [
    ("CreatePlacementGroup", "PlacementGroupLimitExceeded"), ("CreateSecurityGroup", "SecurityGroupLimitExceeded"),
    ("CreateSecurityGroup", "UnauthorizedOperation"), ("AuthorizeSecurityGroupIngress", "UnauthorizedOperation")])
def test_groups_that_cannot_be_made_are_said_before_any_machine_is_asked_for(bench, action, code):
    bench.ec2.fail(action, code, times=math.inf, status=403)
    with pytest.raises(Refused, match=rf"(?s){action}: {code}.*Nothing of this launch is left"):
        aws.apply(plan_of(bench), Person())
    assert requests(bench) == []
    bench.ec2.heal()
    assert bench.leftovers() == []


def test_who_may_not_tag_is_told_what_is_missing_and_where_it_stands(bench):
    said = "You are not authorized to perform this operation. User: me is not authorized to perform: ec2:CreateTags"
    bench.ec2.fail("RunInstances", "UnauthorizedOperation", times=math.inf, status=403, message=said)
    with pytest.raises(Refused, match=r"(?s)ec2:CreateTags.*docs/iam_policy\.json"):
        aws.apply(plan_of(bench), Person())
    assert len(requests(bench)) == 1
    assert bench.leftovers() == []


# --- the front door ---

@pytest.mark.parametrize(("argv", "said"), [
    (["--vpc=vpc-12345678"], "has no VPC vpc-12345678: name one of yours"),
    (["--instance_type=c5.xlrage"], "has no instance type 'c5.xlrage'. Did you mean 'c5.xlarge'?"),
    (["--instance_type=p5e.48xlarge"], "no zone does). Take another --region or --vpc"),
    (["--image=ami-12345678"], "has no image ami-12345678"),
    (["--region="], "region"),
    (["--nospot", "--instance_type=m6a.24xlarge"], "What 1 x m6a.24xlarge cost is not known. Launch? Nobody is here"),
    (["--nospot", "--instance_type=m6a.24xlarge", "--yes", "--budget=5"],
     "--budget cannot be held: what a m6a.24xlarge costs is not known"),
])
def test_what_cannot_be_is_refused_with_what_to_do_and_no_machine_asked_for(bench, capsys, argv, said, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    with pytest.raises(SystemExit) as ended:
        launch.main(["--config=tiny", "--backend=aws", "--name=two", *argv] + ["--instance_type=c5.xlarge"] *
                    (not any("--instance_type" in word for word in argv)))
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in told
    assert "Traceback" not in told
    assert requests(bench) == []
    assert bench.leftovers() == []


def test_ctrl_c_while_the_account_is_asked_is_answered_in_a_line(bench):
    asked = threading.Event()
    bench.ec2.fail("DescribeInstanceTypes", times=1, hang_s=5, status=500, when=lambda params: asked.set() or True)
    launcher = process(bench)
    assert asked.wait(120)
    launcher.send_signal(signal.SIGINT)
    said = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 130
    assert said.endswith("Nothing was started.\n")
    assert "Traceback" not in said
    assert requests(bench) == []


# --- answers that do not come ---

def test_a_socket_that_hangs_at_the_launch_makes_no_second_gang(bench, hasty):
    before = len(bench.instances())
    bench.ec2.fail("RunInstances", hang_s=1, after=True)
    launched(bench, until="2 machine(s) run")
    assert until(lambda: len(requests(bench)) > 1)
    assert len({params["ClientToken"] for params in requests(bench)}) == 1
    assert len(bench.instances()) == before + 2
    assert bench.alive() == []


def test_errors_of_ec2_itself_in_between_are_gone_through(bench, monkeypatch):
    plan = plan_of(bench)
    bench.ec2.fail("*", "InternalError", times=math.inf, status=500, every=4)
    with pytest.raises(Stopped):
        aws.apply(plan, Person("Bringing the code"))
    bench.ec2.heal()
    assert len({params["ClientToken"] for params in requests(bench)}) == 1
    assert bench.alive() == []


def test_an_endpoint_that_is_lost_in_the_middle_leaves_guarded_machines_that_the_same_command_finds(bench, hasty):
    before, plan = len(bench.instances()), plan_of(bench)
    person = Onlooker("Asking for", lambda: bench.ec2.fail("*", after=True, times=math.inf))
    with pytest.raises(Broken, match=r"(?s)6 times in a row AWS did not answer.*what was asked for may still run"):
        aws.apply(plan, person)
    machines = bench.instances()[before:]
    assert len(machines) == 2
    bench.ec2.heal()
    assert "2 machine(s) of two are up already: taking these." in adopted(bench).lines
    assert len(bench.instances()) == before + 2
    assert {note["usd_per_hour"] > 0 for note in Journal("two").notes("launched")} == {True}


def test_credentials_that_expire_before_the_launch_are_said_once_and_nothing_is_left(bench):
    plan = plan_of(bench)
    bench.ec2.fail("RunInstances", "ExpiredToken", times=math.inf)
    with pytest.raises(Refused, match=r"(?s)ExpiredToken.*Sign in again.*Nothing of this launch is left"):
        aws.apply(plan, Person())
    assert len(requests(bench)) == 1
    assert bench.leftovers() == []


def test_credentials_that_expire_while_machines_boot_leave_them_guarded_and_the_same_command_goes_on(bench):
    plan, before = plan_of(bench), len(bench.instances())
    person = Onlooker("Asking for", lambda: bench.ec2.fail(
        "*", "RequestExpired", times=math.inf, when=lambda params: params["Action"] != "RunInstances"))
    with pytest.raises(Broken) as broken:
        aws.apply(plan, person)
    machines = bench.instances()[before:]
    assert str(broken.value).count("Sign in again") == 1
    assert all(machine.id in str(broken.value) for machine in machines)
    assert len(bench.alive()) == 2
    bench.ec2.heal()
    assert until(lambda: not bench.unguarded())
    assert "2 machine(s) of two are up already: taking these." in adopted(bench).lines
    assert len(bench.instances()) == before + 2


# --- a launcher that dies, or is asked to ---

def test_a_launcher_killed_before_the_reply_leaves_machines_that_the_same_command_takes(bench):
    sent, before = threading.Event(), len(bench.instances())
    bench.ec2.fail("RunInstances", hang_s=2, after=True, when=lambda params: sent.set() or True)
    launcher = process(bench)
    assert sent.wait(120)
    launcher.kill()
    launcher.communicate()
    person = adopted(bench)                       # at once: EC2 is still at work on the request
    assert "2 machine(s) of two are up already: taking these." in person.lines
    assert len(bench.instances()) == before + 2
    (noted,) = Journal("two").notes("launched")
    assert set(noted["ids"]) == {machine.id for machine in bench.instances()[before:]}
    assert noted["usd_per_hour"] > 0


def test_machines_of_a_killed_launcher_that_ec2_does_not_show_yet_are_waited_for(bench, monkeypatch):
    before = len(bench.instances())
    bench.world.hidden_s = 4
    launcher = process(bench)
    assert until(lambda: Journal("two").notes("launched"), 60)
    launcher.kill()
    launcher.communicate()
    assert "2 machine(s) of two are up already: taking these." in adopted(bench).lines
    assert len(bench.instances()) == before + 2


def test_machines_that_ec2_does_not_show_yet_are_ended_all_the_same(bench):
    bench.world.hidden_s = 3
    person = Person("Asking for")
    with pytest.raises(Stopped, match=r"The 2 machine\(s\) of this launch are terminated"):
        aws.apply(plan_of(bench), person)
    assert bench.alive() == []


def test_a_second_ctrl_c_while_it_rolls_back_ends_the_machines_all_the_same(bench):
    ending, before = threading.Event(), len(bench.instances())
    bench.ec2.fail("TerminateInstances", "RequestLimitExceeded", status=503, hang_s=1,
                   when=lambda params: ending.set() or True)
    launcher = process(bench)
    reads_until(launcher, "2 machine(s) run")
    launcher.send_signal(signal.SIGINT)
    assert ending.wait(120)
    launcher.send_signal(signal.SIGINT)
    said = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == 130
    assert "The 2 machine(s) of this launch are terminated." in said
    assert len(bench.instances()) == before + 2
    assert bench.alive() == []


# --- what cannot be ended ---

def test_machines_that_cannot_be_ended_are_named(bench):
    before = len(bench.instances())
    bench.ec2.fail("TerminateInstances", "UnauthorizedOperation", times=math.inf, status=403)
    with pytest.raises(Stopped) as stopped:
        aws.apply(plan_of(bench), Person("2 machine(s) run"))
    assert all(machine.id in str(stopped.value) for machine in bench.instances()[before:])


def test_groups_of_machines_that_are_long_in_going_are_left_to_gc(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench.world, "shutdown_s", 3600)
    begun = time.monotonic()
    with pytest.raises(Stopped, match=r"are terminated\.\nStill in use: .*security group sg-.*python -m cluster gc"):
        aws.apply(plan_of(bench), Person("2 machine(s) run"))
    assert time.monotonic() - begun < 60
    assert bench.leftovers() != []
    for machine in bench.instances():
        machine.due = machine.due and time.monotonic()
    assert until(lambda: not bench.billable())
    assert verbs.gc([], verbs.Sweeping(yes=True)) == 0
    assert bench.leftovers() == []


# --- the laptop ---

def test_a_laptop_that_has_moved_is_let_in_by_the_same_command_and_nobody_else_any_longer(bench):
    abandoned(bench, "--ssh_cidr=203.0.113.7/32")
    assert rules_of_port_22() == {"203.0.113.7/32"}
    group = requests(bench)[0]["NetworkInterface.1.SecurityGroupId.1"]
    boto3.client("ec2").authorize_security_group_ingress(GroupId=group, IpPermissions=[
        {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}])
    seen = list[set[str]]()
    person = Person("2 machine(s) run", lambda: seen.append(rules_of_port_22()))
    with pytest.raises(Stopped, match=r"up already stay\. To end them:  python -m cluster kill two$"):
        aws.apply(plan_of(bench), person)
    assert seen == [{"127.0.0.1/32"}]


def test_two_people_may_use_the_same_name_at_the_same_time(bench, monkeypatch, tmp_path):
    mine, login = abandoned(bench), bench.user
    monkeypatch.setattr(getpass, "getuser", lambda: "somebody else")
    monkeypatch.setenv("TXL_HOME", str(tmp_path / "another laptop"))
    person = Person("Bringing the code")
    with pytest.raises(Stopped, match=r"The 1 machine\(s\) of this launch are terminated"):
        aws.apply(planned("--config=tiny", "--instance_type=c5.xlarge", "--skip_setup", f"--ssh_user={login}"), person)
    assert not any("up already" in line for line in person.lines)
    assert {machine.id for machine in bench.alive()} == {machine.id for machine in mine}


# --- what may be asked ---

@pytest.mark.slow
def test_launches_of_all_kinds_and_all_verbs_ask_for_nothing_that_the_published_policy_does_not_grant(bench, capsys):
    launched(bench)
    efa = ("--config=tiny", "--instance_type=p4d.24xlarge", "--machines=2", "--skip_setup", f"--ssh_user={bench.user}",
           "--set=machines.gpus=1", "--set=recipe.batch.size=none", "--set=recipe.batch.local_size=2")
    with pytest.raises(Stopped):                  # with an address, and a way through node 0
        aws.apply(planned(*efa), Person("Bringing the code"))
    machines = abandoned(bench, "--nospot")
    yes = ["two", "--yes"]
    for argv in (["ls"], ["hosts"], ["spot_prices", "c5.xlarge"], ["prices", "--refresh"],
                 ["stop", *yes], ["gc", "--dry_run"]):
        assert main(argv) == 0, argv
    assert until(lambda: all(machine.state == "stopped" for machine in machines))
    assert main(["start", *yes]) == 0
    assert main(["kill", *yes]) == 0
    assert main(["gc", "--yes"]) == 0
    granted = {action for statement in json.loads(POLICY.read_text())["Statement"]
               for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])}
    called = {f"{call.service}:{call.action}" for call in bench.ec2.calls}
    assert {"ec2:AllocateAddress", "ec2:AssociateAddress", "ec2:ReleaseAddress", "ec2:StopInstances",
            "ec2:DeleteSecurityGroup", "ec2:DeletePlacementGroup", "pricing:GetProducts"} <= called
    assert called <= granted
    assert bench.leftovers() == []


# --- a budget ---

def test_a_budget_is_used_up_while_nobody_is_there_and_the_next_launch_is_refused_with_the_numbers(bench):
    machines = abandoned(bench, "--budget=0.05")
    budget_s = terms_of(bench, machines[0])["budget_s"]
    assert gang.WORTH_S < budget_s < 1200         # so that no other limit comes first
    bench.advance(budget_s + 60)
    assert until(lambda: not bench.alive())
    assert all("budget" in (bench.hosts[x.id].root / "var/lib/txl/watchdog.log").read_text() for x in machines)
    book = Journal("two").folder / "journal.jsonl"                # time passes for the laptop too
    notes = [json.loads(line) for line in book.read_text().splitlines()]
    book.write_text("".join(json.dumps(note | {key: note[key] - budget_s - 60 for key in ("at", "until")
                                               if note.get(key)}) + "\n" for note in notes))
    before = len(requests(bench))
    with pytest.raises(Refused, match=r"two has cost \$0\.05, and --budget is \$0\.05: not 10 minutes more"):
        aws.apply(plan_of(bench, "--budget=0.05"), Person())
    assert len(requests(bench)) == before


# --- machines that are not as they must be ---

@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setitem(ready.wait_ready.__kwdefaults__, "patience_s", .2)


def test_a_bad_machine_costs_its_gang_and_another_gang_is_asked_for(bench, impatient):
    bench.hosts.next = [Knobs(), Knobs(disk_gib=1)]
    person = Person("Bringing the code")
    before = len(bench.instances())
    with pytest.raises(Stopped, match=r"Given up. The 2 machine\(s\) of this launch are terminated"):
        aws.apply(plan_of(bench), person)
    first, second = requests(bench)
    assert first["ClientToken"] != second["ClientToken"]
    assert len(bench.instances()) == before + 4
    bad = bench.instances()[before + 1].id
    (told,) = [line for line in person.lines if "1.0 GiB are free on its disk" in line]
    assert "node-1" in told
    assert bad in told
    assert bench.alive() == []


def test_after_two_gangs_with_a_bad_machine_it_gives_up_with_both_reasons(bench, impatient):
    bench.hosts.next = [Knobs(), Knobs(disk_gib=1), Knobs(disk_gib=2), Knobs()]
    with pytest.raises(Broken) as broken:
        aws.apply(plan_of(bench), Person())
    assert "node-1: 1.0 GiB are free" in str(broken.value)
    assert "node-0: 2.0 GiB are free" in str(broken.value)
    assert len(requests(bench)) == 2
    assert bench.alive() == []
    assert bench.leftovers() == []


def test_what_is_wrong_with_all_machines_is_not_tried_twice(bench, impatient):
    bench.hosts.next = [Knobs(disk_gib=1), Knobs(disk_gib=1)]
    with pytest.raises(Broken, match=r"node-0, node-1: 1\.0 GiB are free"):
        aws.apply(plan_of(bench), Person())
    assert len(requests(bench)) == 1
    assert bench.alive() == []


@pytest.mark.slow
def test_credentials_that_expire_while_it_trains_end_nothing_and_the_same_command_is_told_to_sign_in(bench):
    bench.hosts.next = [Knobs(scripts=(("python3", PYTHON3),))] * 2              # torchrun is a sleep
    person = Person()
    job = aws.apply(plan_of(bench), person)
    bench.ec2.fail("*", "ExpiredToken", times=math.inf, status=403)
    with pytest.raises(Refused, match="Sign in again"):
        plan_of(bench)
    assert job.poll() is None                     # following takes no credentials
    bench.ec2.heal()
    again = aws.apply(plan_of(bench), Person())
    assert again.poll() is None
    bench.ec2.fail("*", "ExpiredToken", times=math.inf, status=403)
    for one in (again, job):
        one.kill()
        assert until(lambda one=one: one.poll() is not None)
        one.close()
    assert any(line.startswith("Whether the machines are still there cannot be asked: ") for line in person.lines)
    assert len(bench.alive()) == 2                # and they are guarded: the fixture asks
