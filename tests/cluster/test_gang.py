"""What can go wrong with a launch: the backend itself against the strict EC2 and machines that are sshds on loopback.

After every test each machine that still costs has a living watchdog with a deadline for it.
"""
from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import boto3
import pytest

from cluster import aws
from cluster.gang import Launch
from cluster.journal import Journal, owner_name
from cluster.rehearsal.world import Machine, price
from cluster.run import Refused, Stopped
from tests.cluster.launching import Person, is_spot, launched, plan_of, requests
from tests.cluster.sshd import needs_sshd

POLICY = Path(__file__).parents[2] / "docs" / "iam_policy.json"
pytestmark = needs_sshd


@pytest.mark.parametrize("line", ["Asking for 2 x", "2 machine(s) run", "Bringing the code"])
def test_ctrl_c_ends_the_machines_at_every_stage(bench, line):
    before = len(bench.instances())
    with pytest.raises(Stopped, match=r"The 2 machine\(s\) of this launch are terminated"):
        aws.apply(plan_of(bench), Person(line))
    assert len(bench.instances()) == before + 2
    assert bench.alive() == []
    assert bench.leftovers() == []


def test_no_capacity_anywhere_is_refused_with_all_that_was_tried_and_nothing_is_left(bench):
    bench.world.capacity = {("spot", f"us-east-1{letter}"): 1 for letter in "abcdef"}      # one, but not the gang
    plan = plan_of(bench)
    with pytest.raises(Refused) as refused:
        aws.apply(plan, Person())
    zones = [params["Placement.AvailabilityZone"] for params in requests(bench)]
    assert sorted(zones) == sorted(plan.layout.facts.zones)
    assert all(f"spot, {zone}: InsufficientInstanceCapacity once" in str(refused.value) for zone in zones)
    assert "--fallback=ondemand" in str(refused.value)
    assert bench.alive() == []
    assert bench.leftovers() == []


def test_a_quota_ends_spot_in_all_zones_at_once(bench):
    bench.ec2.fail("RunInstances", "MaxSpotInstanceCountExceeded", times=math.inf, when=is_spot)
    with pytest.raises(Refused, match="MaxSpotInstanceCountExceeded once"):
        aws.apply(plan_of(bench), Person())
    assert len(requests(bench)) == 1
    assert bench.alive() == []


def test_who_may_not_launch_is_told_so_once(bench):
    bench.ec2.fail("RunInstances", "UnauthorizedOperation", times=math.inf, status=403)
    with pytest.raises(Refused, match="EC2 refused the launch, and would anywhere: UnauthorizedOperation"):
        aws.apply(plan_of(bench), Person())
    assert len(requests(bench)) == 1
    assert bench.leftovers() == []


def test_a_lost_reply_is_asked_for_again_by_the_same_token_and_there_is_one_gang(bench):
    before = len(bench.instances())
    bench.ec2.fail("RunInstances", after=True)
    launched(bench)
    first, second = (params["ClientToken"] for params in requests(bench))
    assert first == second
    assert len(bench.instances()) == before + 2
    assert bench.alive() == []


def test_machines_that_ec2_does_not_show_yet_are_waited_for(bench):
    bench.world.hidden_s = 2
    launched(bench)
    assert len(requests(bench)) == 1
    assert bench.alive() == []


def test_machines_of_another_number_under_the_same_name_are_named_and_left_alone(bench):
    plan, other = plan_of(bench), plan_of(bench, count=1)        # both planned before either had machines
    seen = list[str]()

    def another() -> None:
        seen.extend(machine.id for machine in bench.alive())
        launch_other = Launch(other, Journal("two"), Person())
        with pytest.raises(Refused, match=r"two has machines that are not 1 running c5\.xlarge") as refused:
            launch_other.carry_out()
        assert all(id in str(refused.value) for id in seen)
        assert [machine.id for machine in bench.alive()] == seen

    with pytest.raises(Stopped):
        aws.apply(plan, Person("2 machine(s) run", another))
    assert len(seen) == 2


def test_of_two_launchers_of_one_name_the_second_is_refused_and_told_of_the_first(bench):
    plan, refused = plan_of(bench), list[Refused]()

    def second() -> None:
        with pytest.raises(Refused, match=f"two is being worked on: launched by process {os.getpid()} ") as error:
            aws.apply(plan, Person())
        refused.append(error.value)

    with pytest.raises(Stopped):
        aws.apply(plan, Person("Asking for", second))
    assert len(refused) == 1
    assert len(requests(bench)) == 1


def test_machines_that_cannot_be_terminated_are_said_to_end_themselves_and_how_to_end_them(bench):
    bench.ec2.fail("TerminateInstances", "UnauthorizedOperation", times=math.inf, status=403)
    with pytest.raises(Stopped, match=r"(?s)powers itself off within 20 minutes.*python -m cluster kill two"):
        aws.apply(plan_of(bench), Person("2 machine(s) run"))
    assert len(bench.alive()) == 2                    # and they are guarded: the fixture asks


def test_a_budget_that_earlier_machines_have_used_up_starts_nothing(bench):
    now = time.time()
    Journal("two").note("launched", at=now - 7200, ids=["i-1"], usd_per_hour=10.0, until=now, market="spot")
    with pytest.raises(Refused, match=r"two has cost \$20\.00, and --budget is \$5\.00"):
        aws.apply(plan_of(bench, "--budget=5"), Person())
    assert requests(bench) == []
    assert bench.leftovers() == []


def test_the_machines_themselves_hold_the_budget(bench):
    bench_machines = list[Machine]()
    person = Person("2 machine(s) run", lambda: bench_machines.extend(bench.alive()))
    with pytest.raises(Stopped):
        aws.apply(plan_of(bench, "--budget=5", "--disk_gib=200"), person)
    for machine in bench_machines:
        terms = json.loads((bench.hosts[machine.id].root / "var/lib/txl/terms.json").read_text())
        bid = 1.2 * price(machine.kind, "spot", machine.zone)
        usd_per_hour = 2 * (bid + 200 * .08 / 730 + .005)         # machine, disk, address
        assert terms["budget_s"] == pytest.approx(3600 * 5 / usd_per_hour, rel=.01)
    assert len(bench_machines) == 2
    (request,) = requests(bench)
    assert float(request["InstanceMarketOptions.SpotOptions.MaxPrice"]) == pytest.approx(bid, rel=.01)


def test_which_image_the_machines_have_is_in_the_plan_and_noted_with_the_launch(bench):
    launched(bench)
    (request,), (intent,) = requests(bench), Journal("two").notes("intent")
    assert intent["image"] == request["ImageId"]
    assert f"image {request['ImageId']}, " in " ".join(str(plan_of(bench)).split())


def test_port_22_is_open_to_the_launcher_alone_and_everything_among_the_machines(bench):
    rules = dict[str, set[tuple[str, int | None, str]]]()

    def look() -> None:
        (group,) = boto3.client("ec2").describe_security_groups(Filters=[
            {"Name": "group-name", "Values": [f"txl-{owner_name()}-two"]}])["SecurityGroups"]
        rules[group["GroupId"]] = {
            (rule["IpProtocol"], rule.get("ToPort") if rule["IpProtocol"] == "tcp" else None, source)
            for rule in group["IpPermissions"] for source in [
                *(x["CidrIp"] for x in rule["IpRanges"]), *(x["GroupId"] for x in rule["UserIdGroupPairs"])]}

    with pytest.raises(Stopped):
        aws.apply(plan_of(bench), Person("2 machine(s) run", look))
    ((group, found),) = rules.items()
    assert found == {("tcp", 22, "127.0.0.1/32"), ("-1", None, group)}


def test_machines_are_asked_for_encrypted_tagged_and_such_that_power_off_ends_them(bench):
    launched(bench, until="Asking for")
    (request,) = requests(bench)
    assert request["MetadataOptions.HttpTokens"] == "required"
    assert request["BlockDeviceMapping.1.Ebs.Encrypted"] == "true"
    assert request["InstanceInitiatedShutdownBehavior"] == "terminate"
    tagged = {request[f"TagSpecification.{i}.ResourceType"]: {
        request[f"TagSpecification.{i}.Tag.{j}.Key"] for j in range(1, 8)} for i in range(1, 5)}
    tags = {"Name", "User", "txl:cluster", "txl:owner", "txl:config", "txl:expires", "txl:minutes"}
    assert tagged == dict.fromkeys(["instance", "volume", "network-interface", "spot-instances-request"], tags)


def test_a_launch_asks_for_nothing_that_the_published_policy_does_not_grant(bench):
    launched(bench)
    granted = {action for statement in json.loads(POLICY.read_text())["Statement"]
               for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])}
    called = {f"{call.service}:{call.action}" for call in bench.ec2.calls}
    assert "ec2:TerminateInstances" in called
    assert called <= granted


def test_a_launch_gets_through_where_every_second_call_is_throttled(bench):
    plan = plan_of(bench)
    bench.ec2.fail("*", "RequestLimitExceeded", times=math.inf, status=503, every=2)
    with pytest.raises(Stopped):
        aws.apply(plan, Person("Bringing the code"))
    assert len({params["ClientToken"] for params in requests(bench)}) == 1
    bench.ec2.heal()
    assert bench.alive() == []
