"""Requests as whole values; everything that is sent, against an EC2 that is strict (cluster/rehearsal) on loopback."""
from __future__ import annotations

import ast
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, get_args

import pytest

pytest.importorskip("moto.server", reason="the strict EC2 needs moto[server]")
import boto3
from botocore.validate import validate_parameters

from cluster import ec2
from cluster.ec2 import (
    CallFailed,
    Cloud,
    Image,
    Thing,
    Type,
    Verdict,
    caller_address,
    needs_jump,
    quota,
    run_instances_request,
    tags_of,
    token,
    verdict_of,
)
from cluster.rehearsal.ec2 import StrictEc2
from cluster.run import Refused

REPO = Path(__file__).resolve().parents[2]
P3DN = Type("p3dn.24xlarge", 96, 768, 8, "V100", 32, "x86_64", efa=1, cards=1, nvme_gib=1676, spot=True)
P4D = Type("p4d.24xlarge", 96, 1152, 8, "A100", 40, "x86_64", efa=4, cards=4, nvme_gib=7450, spot=True)
C5 = Type("c5.large", 2, 4, 0, None, 0, "x86_64", efa=0, cards=1, nvme_gib=0, spot=True)
UBUNTU = "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id"
IMAGE = Image("ami-1", "ubuntu", UBUNTU, "/dev/sda1", 8)
EXPIRES = 1_800_000_000.0                         # 2027-01-15 08:00:00 UTC
TAGS = tags_of("run", "me", "0123abcd", EXPIRES, "10/60")


def request_of(kind=C5, count=1, market="spot", **changes):
    return run_instances_request(**{
        "kind": kind, "count": count, "market": market, "zone": "us-east-1c", "subnet": "subnet-c", "group": "sg-1",
        "placement": "txl-me-run", "image": IMAGE, "disk_gib": 200, "user_data": "#!/bin/sh", "tags": TAGS,
        "token": "txl-1", **changes})


# --- pure ---

def test_one_spot_machine_as_a_whole():
    tags = [{"Key": "Name", "Value": "run"}, {"Key": "User", "Value": "me"}, {"Key": "txl:cluster", "Value": "run"},
            {"Key": "txl:owner", "Value": "me"}, {"Key": "txl:config", "Value": "0123abcd"},
            {"Key": "txl:expires", "Value": "2027-01-15T08:00:00Z"}, {"Key": "txl:minutes", "Value": "10/60"}]
    assert request_of() == {
        "ImageId": "ami-1", "InstanceType": "c5.large", "MinCount": 1, "MaxCount": 1, "ClientToken": "txl-1",
        "Placement": {"AvailabilityZone": "us-east-1c"},
        "NetworkInterfaces": [{"DeviceIndex": 0, "AssociatePublicIpAddress": True, "SubnetId": "subnet-c",
                               "Groups": ["sg-1"], "DeleteOnTermination": True}],
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {
            "VolumeSize": 200, "VolumeType": "gp3", "Iops": 3000, "Throughput": 250, "Encrypted": True,
            "DeleteOnTermination": True}}],
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {"HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        "UserData": "#!/bin/sh",
        "TagSpecifications": [{"ResourceType": what, "Tags": tags} for what in (
            "instance", "volume", "network-interface", "spot-instances-request")],
        "InstanceMarketOptions": {"MarketType": "spot", "SpotOptions": {
            "SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}},
    }


def test_on_demand_differs_by_the_market_alone():
    spot, ondemand = request_of(), request_of(market="ondemand")
    del spot["InstanceMarketOptions"]
    spot["TagSpecifications"] = spot["TagSpecifications"][:3]
    assert ondemand == spot


def test_a_gang_comes_in_one_piece_and_close_together():
    request = request_of(P3DN, 16)
    assert (request["MinCount"], request["MaxCount"]) == (16, 16)
    assert request["Placement"] == {"AvailabilityZone": "us-east-1c", "GroupName": "txl-me-run"}


def test_one_efa_card_still_has_a_public_address():
    assert request_of(P3DN, 2)["NetworkInterfaces"] == [
        {"DeviceIndex": 0, "InterfaceType": "efa", "AssociatePublicIpAddress": True, "SubnetId": "subnet-c",
         "Groups": ["sg-1"], "DeleteOnTermination": True}]
    assert not needs_jump(P3DN, 2)


def test_several_efa_cards_have_no_public_address_and_only_the_first_carries_ip():
    common = {"SubnetId": "subnet-c", "Groups": ["sg-1"], "DeleteOnTermination": True}
    assert request_of(P4D, 2)["NetworkInterfaces"] == [
        {"NetworkCardIndex": 0, "DeviceIndex": 0, "InterfaceType": "efa", **common},
        {"NetworkCardIndex": 1, "DeviceIndex": 1, "InterfaceType": "efa-only", **common},
        {"NetworkCardIndex": 2, "DeviceIndex": 1, "InterfaceType": "efa-only", **common},
        {"NetworkCardIndex": 3, "DeviceIndex": 1, "InterfaceType": "efa-only", **common}]
    assert needs_jump(P4D, 2)


@pytest.mark.parametrize(("kind", "count"), [(P4D, 1), (P3DN, 1), (C5, 4)])
def test_without_efa_to_use_it_is_one_plain_interface(kind, count):
    (interface,) = request_of(kind, count)["NetworkInterfaces"]
    assert interface["AssociatePublicIpAddress"]
    assert "InterfaceType" not in interface
    assert not needs_jump(kind, count)


def test_a_disk_is_never_smaller_than_its_image():
    image = replace(IMAGE, size_gib=75)
    assert request_of(image=image, disk_gib=20)["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] == 75


@pytest.mark.parametrize(("profile", "said"), [("train", {"Name": "train"}), (
    "arn:aws:iam::1:instance-profile/train", {"Arn": "arn:aws:iam::1:instance-profile/train"})])
def test_a_profile_is_given_by_name_or_arn(profile, said):
    assert request_of(profile=profile)["IamInstanceProfile"] == said


@pytest.mark.parametrize("kind", [C5, P3DN, P4D])
@pytest.mark.parametrize("market", ["spot", "ondemand"])
def test_every_field_is_one_that_boto3_knows(cloud, kind, market):
    shape = cloud._ec2.meta.service_model.operation_model("RunInstances").input_shape
    validate_parameters(request_of(kind, 2, market, profile="x"), shape)


def test_a_token_is_the_same_for_the_same_attempt_only():
    base = ("intent", "spot", "us-east-1a", 0)
    others = [("other", *base[1:]), ("intent", "ondemand", "us-east-1a", 0), ("intent", "spot", "us-east-1b", 0),
              ("intent", "spot", "us-east-1a", 1)]
    assert token(*base) == token(*base)
    assert len({token(*base), *(token(*x) for x in others)}) == 5
    assert len(token("x" * 500, "ondemand", "us-east-1a", 10 ** 9)) <= 64


def test_expires_is_read_back_from_the_tags():
    assert ec2.expires(TAGS) == EXPIRES
    assert ec2.expires({}) is None
    assert ec2.expires({"txl:expires": "soon"}) is None


@pytest.mark.parametrize(("kind", "market", "code"), [
    ("p4d.24xlarge", "spot", "L-7212CCBC"), ("p3dn.24xlarge", "spot", "L-7212CCBC"),
    ("p5.48xlarge", "spot", "L-C4BD4855"), ("p3dn.24xlarge", "ondemand", "L-417A185B"),
    ("p5.48xlarge", "ondemand", "L-417A185B"),
    ("g5.xlarge", "spot", "L-3819A6DF"), ("g4dn.xlarge", "ondemand", "L-DB2E81BA"),
    ("c5.large", "spot", "L-34B43A08"), ("t3.medium", "ondemand", "L-1216C47A")])
def test_quotas_go_by_family_and_market(kind, market, code):
    assert quota(kind, market).endswith(code)


def test_a_quota_nobody_knows_the_code_of_is_named_after_the_kind():
    assert quota("trn1.32xlarge", "spot") == "vCPUs of trn1.32xlarge, spot"


CODES: list[tuple[str, int, Verdict]] = [
    ("InsufficientInstanceCapacity", 500, "capacity"), ("InsufficientHostCapacity", 500, "capacity"),
    ("InsufficientReservedInstanceCapacity", 500, "capacity"), ("UnfulfillableCapacity", 500, "capacity"),
    ("SpotMaxPriceTooLow", 400, "capacity"), ("Unsupported", 400, "capacity"),
    ("InsufficientFreeAddressesInSubnet", 400, "capacity"),
    ("VcpuLimitExceeded", 400, "quota"), ("MaxSpotInstanceCountExceeded", 400, "quota"),
    ("AddressLimitExceeded", 400, "quota"), ("PlacementGroupLimitExceeded", 400, "quota"),
    ("UnauthorizedOperation", 403, "denied"), ("AuthFailure", 401, "denied"), ("OptInRequired", 401, "denied"),
    ("ExpiredToken", 400, "expired"), ("RequestExpired", 400, "expired"),
    ("RequestLimitExceeded", 503, "throttled"), ("Throttling", 400, "throttled"), ("InternalError", 500, "throttled"),
    ("Unavailable", 503, "throttled"), ("SomethingNew", 500, "throttled"),
    ("InvalidParameterValue", 400, "invalid"), ("InvalidParameterCombination", 400, "invalid"),
    ("IdempotentParameterMismatch", 400, "invalid"), ("SomethingNew", 400, "invalid"),
    ("InvalidGroup.Duplicate", 400, "duplicate"), ("InvalidPlacementGroup.Duplicate", 400, "duplicate"),
    ("InvalidInstanceID.NotFound", 400, "missing"), ("InvalidPlacementGroup.Unknown", 400, "missing"),
    ("DependencyViolation", 400, "busy"), ("InvalidPlacementGroup.InUse", 400, "busy"),
]


@pytest.mark.parametrize(("code", "status", "verdict"), CODES)
def test_each_error_code_has_its_verdict(code, status, verdict):
    assert verdict_of(code, status) == verdict


def test_every_verdict_but_silence_is_reached_by_some_code():
    assert {verdict for _, _, verdict in CODES} == {*get_args(Verdict)} - {"unreachable"}


def test_importing_does_not_load_boto3():
    code = "import sys, cluster.ec2, cluster.ladder, cluster.prices, cluster.stacks; print('boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True,
                          check=True).stdout == "False\n"


# --- on a strict EC2 ---

@pytest.fixture(scope="module")
def everything():
    with StrictEc2() as strict, environment(strict.url):
        strict.world.boot_s = strict.world.shutdown_s = 0
        slept: list[float] = []
        cloud = Cloud(sleep=slept.append)
        cloud.slept = slept
        yield strict, cloud


@pytest.fixture
def aws(everything):
    strict, _ = everything
    strict.heal()
    strict.calls.clear()
    yield strict
    strict.heal()


@pytest.fixture
def cloud(everything):
    everything[1].slept.clear()
    return everything[1]


@contextmanager
def environment(url: str | None, **more: str):
    """Nothing of the user's AWS configuration, and the endpoint on loopback."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith("AWS_"):
                patch.delenv(name)
        settings = {"AWS_ACCESS_KEY_ID": "AKIAREHEARSAL", "AWS_SECRET_ACCESS_KEY": "rehearsal",
                    "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1",
                    "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
                    **({"AWS_ENDPOINT_URL": url} if url else {}), **more}
        for name, value in settings.items():
            if value:
                patch.setenv(name, value)
        yield


def launched(cloud, count=1, market="ondemand", kind=C5, cluster="run", round=0):
    """Machines that came, by a request against what is really there."""
    tags = tags_of(cluster, "me", "0123abcd", EXPIRES, "10/60")
    zone = min(cloud.zones(kind.name))
    network = cloud.network()
    return cloud.run_instances(request_of(
        kind, count, market, zone=zone, subnet=network.subnets[zone], image=cloud.image(UBUNTU), tags=tags,
        group=cloud.security_group(f"txl-me-{cluster}", network.vpc, "203.0.113.7/32", tags),
        placement=cloud.placement_group(f"txl-me-{cluster}", tags) if count > 1 else None,
        token=token(cluster, market, zone, round)))


def test_a_cloud_says_who_it_is_and_asks_nothing_else_for_it(aws):
    cloud = Cloud()
    assert (cloud.region, cloud.account) == ("us-east-1", "123456789012")
    assert cloud.caller.startswith("arn:aws:")
    assert [(call.service, call.action) for call in aws.calls] == [("sts", "GetCallerIdentity")]


def test_types_are_ec2s_own(cloud):
    assert cloud.type("p4d.24xlarge") == P4D
    assert cloud.type("p3dn.24xlarge") == P3DN
    assert cloud.type("c5.large") == C5


def test_an_unknown_type_is_refused_with_the_nearest(cloud):
    with pytest.raises(Refused, match=r"us-east-1 has no .* 'p4d\.24large'\. Did you mean 'p4d\.24xlarge'\?"):
        cloud.type("p4d.24large")


def test_the_default_network_has_a_subnet_in_each_zone(cloud):
    network = cloud.network()
    subnets = boto3.client("ec2").describe_subnets(Filters=[{"Name": "vpc-id", "Values": [network.vpc]}])["Subnets"]
    assert network.subnets == {x["AvailabilityZone"]: x["SubnetId"] for x in subnets}


def test_without_a_default_network_it_says_what_to_do(aws):
    with environment(aws.url, AWS_DEFAULT_REGION="eu-west-1"):
        client, cloud = boto3.client("ec2"), Cloud()
        (vpc,) = client.describe_vpcs()["Vpcs"]
        for subnet in client.describe_subnets()["Subnets"]:
            client.delete_subnet(SubnetId=subnet["SubnetId"])
        with pytest.raises(Refused, match="has no subnet"):
            cloud.network()
        client.delete_vpc(VpcId=vpc["VpcId"])
        with pytest.raises(Refused, match=r"no default VPC in eu-west-1.*--vpc=vpc-….*create-default-vpc"):
            cloud.network()


def test_of_another_network_only_subnets_that_can_be_reached_count(cloud):
    client = boto3.client("ec2")
    vpc = client.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    a, b = (client.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{i}.0/24", AvailabilityZone=f"us-east-1{'ab'[i]}")
            ["Subnet"]["SubnetId"] for i in range(2))
    with pytest.raises(Refused, match=f"No subnet of {vpc} has a route to an internet gateway"):
        cloud.network(vpc)
    gateway = client.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
    client.attach_internet_gateway(InternetGatewayId=gateway, VpcId=vpc)
    table = client.create_route_table(VpcId=vpc)["RouteTable"]["RouteTableId"]
    client.create_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", GatewayId=gateway)
    client.associate_route_table(RouteTableId=table, SubnetId=b)
    assert cloud.network(vpc) == ec2.Network(vpc, {"us-east-1b": b})
    assert a not in cloud.network(vpc).subnets.values()


def test_an_unknown_network_is_refused(cloud):
    with pytest.raises(Refused, match="us-east-1 has no VPC vpc-12345678"):
        cloud.network("vpc-12345678")


def test_zones_scores_and_prices_are_by_the_names_of_zones(cloud):
    zones = cloud.zones("p3dn.24xlarge")
    assert zones == {"us-east-1c", "us-east-1d"}                  # as moto's copy of EC2's list has it
    scores, prices = cloud.scores("p3dn.24xlarge", 2), cloud.spot_prices("p3dn.24xlarge")
    assert set(scores) <= set(cloud.network().subnets)
    assert zones <= set(scores)
    assert all(1 <= score <= 10 for score in scores.values())
    assert set(prices) == zones
    assert all(price > 0 for price in prices.values())


@pytest.mark.parametrize("action", ["GetSpotPlacementScores", "DescribeSpotPriceHistory"])
def test_scores_and_prices_that_may_not_be_seen_are_simply_not_known(cloud, aws, action):
    aws.fail(action, "UnauthorizedOperation", status=403)
    read = {"GetSpotPlacementScores": lambda: cloud.scores("c5.large", 1),
            "DescribeSpotPriceHistory": lambda: cloud.spot_prices("c5.large")}[action]
    assert read() == {}
    assert read() != {}


def test_images_are_found_by_public_name_and_by_id(cloud):
    image = cloud.image(UBUNTU)
    assert image.source == UBUNTU
    assert cloud.image(image.id) == replace(image, source=image.id)
    root = boto3.client("ec2").describe_images(ImageIds=[image.id])["Images"][0]
    assert image.root_device == root["RootDeviceName"]


def test_an_image_of_a_stranger_is_refused(cloud, aws):
    image = cloud.image(UBUNTU)
    ami = aws.backend.amis[image.id]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ami, "owner_id", "666666666666")
        patch.setattr(ami, "owner_alias", None)
        with pytest.raises(Refused, match=f"{image.id} is not an image of Amazon, Canonical or this account"):
            cloud.image(image.id)


@pytest.mark.parametrize("reference", ["ami-00000000000000000", "/aws/service/nothing/here"])
def test_an_unknown_image_is_refused(cloud, reference):
    with pytest.raises(Refused, match=f"us-east-1 has no image {reference}.*\n.*--image="):
        cloud.image(reference)


def test_a_gang_comes_ranked_and_is_found_by_cluster_owner_and_token(cloud):
    gang = launched(cloud, 3, "spot", cluster="gang")
    assert [x.node for x in gang] == [0, 1, 2]
    assert {(x.kind, x.market, x.token) for x in gang} == {("c5.large", "spot", token("gang", "spot", gang[0].zone, 0))}
    assert gang[0].tags == tags_of("gang", "me", "0123abcd", EXPIRES, "10/60")
    ids = [x.id for x in gang]
    assert [x.id for x in cloud.instances(cluster="gang")] == ids
    assert [x.id for x in cloud.instances(cluster="gang", owner="me")] == ids
    assert [x.id for x in cloud.instances(token=gang[0].token)] == ids
    assert set(ids) <= {x.id for x in cloud.instances()}
    assert cloud.instances(cluster="gang", owner="you") == []
    assert abs(gang[0].launched - time.time()) < 60
    cloud.terminate(ids)
    assert cloud.instances(cluster="gang") == []
    assert [x.id for x in cloud.instances(cluster="gang", alive=False)] == ids


def test_the_same_launch_sent_twice_is_one(cloud):
    assert [x.id for x in launched(cloud, 2, cluster="twice")] == [x.id for x in launched(cloud, 2, cluster="twice")]


def test_a_launch_whose_reply_was_lost_is_unreachable_and_there(cloud, aws):
    aws.fail("RunInstances", after=True)
    with pytest.raises(CallFailed) as failed:
        launched(cloud, cluster="lost")
    assert failed.value.verdict == "unreachable"
    assert aws.count("RunInstances") == 1
    (there,) = cloud.instances(cluster="lost")
    assert [x.id for x in launched(cloud, cluster="lost")] == [there.id]


def test_no_room_for_all_of_a_gang_is_room_for_none(cloud, aws):
    zone = min(cloud.zones("p3dn.24xlarge"))
    aws.world.capacity["spot", zone] = 15
    with pytest.raises(CallFailed) as failed:
        launched(cloud, 16, "spot", P3DN, cluster="sixteen")
    assert (failed.value.verdict, failed.value.code) == ("capacity", "InsufficientInstanceCapacity")
    assert cloud.instances(cluster="sixteen") == []
    assert aws.count("RunInstances") == 1         # a 5xx, which boto3 would repeat by itself
    aws.world.capacity.clear()


@pytest.mark.parametrize(("code", "status", "verdict"), CODES)
def test_a_launch_is_sent_once_whatever_the_answer(cloud, aws, code, status, verdict):
    aws.fail("RunInstances", code, status=status, times=9, message="no")
    with pytest.raises(CallFailed, match=f"^RunInstances: {code}: no") as failed:
        cloud.run_instances(request_of())
    assert (failed.value.action, failed.value.code, failed.value.said) == ("RunInstances", code, "no")
    assert failed.value.verdict == verdict
    assert aws.count("RunInstances") == 1


def test_a_read_is_repeated_where_ec2_stumbles_on_every_second_call(cloud, aws):
    aws.fail("DescribeInstanceTypeOfferings", "RequestLimitExceeded", status=503, every=2, times=9)
    for _ in range(3):
        assert cloud.zones("c5.large")
    assert aws.count("DescribeInstanceTypeOfferings") > 3


def test_what_iam_encodes_is_left_out(cloud, aws):
    aws.fail("RunInstances", "UnauthorizedOperation", status=403, message="You are not authorized to perform this "
             "operation. Encoded authorization failure message: 4GIOHlTkIaWHQD0Q0m6XSnuUMCm-abc")
    with pytest.raises(CallFailed) as failed:
        cloud.run_instances(request_of())
    assert str(failed.value) == ("RunInstances: UnauthorizedOperation: You are not authorized to perform this "
                                 "operation.\ndocs/iam_policy.json lists what this launcher needs; whoever runs the "
                                 "account can grant it.")


def test_being_forbidden_to_tag_is_being_denied(cloud, aws):
    aws.fail("CreateSecurityGroup", "UnauthorizedOperation", status=403, message="not authorized: ec2:CreateTags")
    with pytest.raises(CallFailed, match=r"ec2:CreateTags\ndocs/iam_policy.json") as failed:
        cloud.security_group("txl-me-x", cloud.network().vpc, "203.0.113.7/32", TAGS)
    assert failed.value.verdict == "denied"


def test_terminating_ends_the_known_and_names_the_unknown(cloud):
    ids = [x.id for x in launched(cloud, 2, cluster="ends")]
    unknown = "i-00000000000000000"
    assert cloud.terminate([ids[0], unknown, ids[1]]) == [unknown]
    assert cloud.instances(cluster="ends") == []
    assert cloud.terminate(ids) == []             # again does no harm
    assert cloud.terminate([]) == []


def test_machines_not_yet_visible_are_not_taken_for_gone(cloud, aws):
    aws.world.hidden_s = 60
    (machine,) = launched(cloud, cluster="hidden")
    assert cloud.terminate([machine.id]) == [machine.id]
    aws.world.hidden_s = 0
    assert cloud.terminate([machine.id]) == []


def test_machines_stop_and_start_again(cloud, aws):
    (machine,) = launched(cloud, cluster="stops")
    wait(lambda: cloud.instances(cluster="stops")[0].state == "running")
    cloud.stop_instances([machine.id])
    wait(lambda: cloud.instances(cluster="stops")[0].state == "stopped")
    cloud.start_instances([machine.id])
    wait(lambda: cloud.instances(cluster="stops")[0].state == "running")


def rules(group: str) -> tuple[list, list]:
    """What the group lets in and out, as EC2 describes it."""
    (found,) = boto3.client("ec2").describe_security_groups(GroupIds=[group])["SecurityGroups"]
    return tuple(sorted((rule["IpProtocol"], rule.get("FromPort"), *[x["CidrIp"] for x in rule["IpRanges"]],
                         *[x["CidrIpv6"] for x in rule["Ipv6Ranges"]],
                         *[x["GroupId"] for x in rule["UserIdGroupPairs"]])
                        for rule in found[way]) for way in ("IpPermissions", "IpPermissionsEgress"))


def test_a_security_group_has_these_rules_and_no_others(cloud, aws):
    vpc = cloud.network().vpc
    group = cloud.security_group("txl-me-rules", vpc, "203.0.113.7/32", TAGS)
    closed = [("-1", None, group), ("tcp", 22, "203.0.113.7/32")], [("-1", None, "0.0.0.0/0", group)]
    assert rules(group) == closed
    boto3.client("ec2").authorize_security_group_ingress(GroupId=group, IpPermissions=[
        {"IpProtocol": "tcp", "FromPort": 6379, "ToPort": 6379, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]},
        {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "Ipv6Ranges": [{"CidrIpv6": "::/0"}]}])
    assert cloud.security_group("txl-me-rules", vpc, "203.0.113.7/32", TAGS) == group
    assert rules(group) == closed
    before = aws.count("AuthorizeSecurityGroupIngress") + aws.count("AuthorizeSecurityGroupEgress")
    cloud.security_group("txl-me-rules", vpc, "203.0.113.7/32", TAGS)
    assert aws.count("AuthorizeSecurityGroupIngress") + aws.count("AuthorizeSecurityGroupEgress") == before


def test_a_caller_who_moved_is_let_in_and_the_old_address_no_longer(cloud, aws):
    vpc = cloud.network().vpc
    group = cloud.security_group("txl-me-moved", vpc, "203.0.113.7/32", TAGS)
    aws.calls.clear()
    assert cloud.security_group("txl-me-moved", vpc, "198.51.100.9/32", TAGS) == group
    assert rules(group)[0] == [("-1", None, group), ("tcp", 22, "198.51.100.9/32")]
    changes = [call.action for call in aws.calls if call.action.endswith("Ingress")]
    assert changes == ["AuthorizeSecurityGroupIngress", "RevokeSecurityGroupIngress"]


def test_a_strangers_group_of_that_name_is_left_alone(cloud):
    vpc = cloud.network().vpc
    boto3.client("ec2").create_security_group(GroupName="txl-me-strange", VpcId=vpc, Description="a stranger's")
    with pytest.raises(Refused, match=r"security group txl-me-strange .* that is not ours"):
        cloud.security_group("txl-me-strange", vpc, "203.0.113.7/32", TAGS)


def test_a_group_just_made_is_waited_for_until_ec2_knows_it_everywhere(cloud, aws):
    aws.fail("AuthorizeSecurityGroupIngress", "InvalidGroup.NotFound", times=3)
    group = cloud.security_group("txl-me-late", cloud.network().vpc, "203.0.113.7/32", TAGS)
    assert rules(group)[0] == [("-1", None, group), ("tcp", 22, "203.0.113.7/32")]
    assert cloud.slept == [.5, 1, 2]


def test_what_never_becomes_visible_is_not_waited_for_for_ever(cloud, aws):
    aws.fail("AuthorizeSecurityGroupIngress", "InvalidGroup.NotFound", times=99)
    with pytest.raises(CallFailed, match=r"InvalidGroup.NotFound"):
        cloud.security_group("txl-me-never", cloud.network().vpc, "203.0.113.7/32", TAGS)
    assert sum(cloud.slept) < 60


def test_a_placement_group_made_twice_is_one(cloud, aws):
    assert cloud.placement_group("txl-me-close", TAGS) == cloud.placement_group("txl-me-close", TAGS)
    (group,) = boto3.client("ec2").describe_placement_groups(GroupNames=["txl-me-close"])["PlacementGroups"]
    assert group["Strategy"] == "cluster"


def test_an_address_is_taken_once_and_used_again(cloud, aws):
    tags = tags_of("jump", "me", "0123abcd", EXPIRES, "10/60")
    first, _ = launched(cloud, 2, kind=P4D, cluster="jump")
    wait(lambda: all(x.state == "running" for x in cloud.instances(cluster="jump")))
    public = cloud.address(first.id, tags)
    assert cloud.address(first.id, tags) == public
    assert aws.count("AllocateAddress") == 1
    assert cloud.instances(cluster="jump")[0].public == public
    (address,) = [x for x in cloud.leftovers(cluster="jump") if x.what == "address"]
    assert address == Thing("address", address.id, "jump", EXPIRES, billable=True)


def test_an_address_of_a_launcher_that_died_before_using_it_is_used(cloud, aws):
    tags = tags_of("died", "me", "0123abcd", EXPIRES, "10/60")
    (machine,) = launched(cloud, cluster="died")
    wait(lambda: cloud.instances(cluster="died")[0].state == "running")
    aws.fail("AssociateAddress", "UnauthorizedOperation", status=403)
    with pytest.raises(CallFailed):
        cloud.address(machine.id, tags)
    cloud.address(machine.id, tags)
    assert aws.count("AllocateAddress") == 1


def test_no_address_left_in_the_quota_says_so(cloud, aws):
    (machine,) = launched(cloud, cluster="quota")
    aws.fail("AllocateAddress", "AddressLimitExceeded", message="The maximum number of addresses has been reached.")
    with pytest.raises(CallFailed, match="AddressLimitExceeded") as failed:
        cloud.address(machine.id, tags_of("quota", "me", "x", EXPIRES, "10/60"))
    assert failed.value.verdict == "quota"


def test_what_is_left_over_is_found_and_removed_in_an_order_that_works(cloud, aws):
    tags = tags_of("over", "me", "0123abcd", EXPIRES, "10/60")
    machines = launched(cloud, 2, kind=P4D, cluster="over")
    wait(lambda: all(x.state == "running" for x in cloud.instances(cluster="over")))
    cloud.address(machines[0].id, tags)
    boto3.client("ec2").create_volume(AvailabilityZone="us-east-1a", Size=1, TagSpecifications=[
        {"ResourceType": "volume", "Tags": [{"Key": k, "Value": v} for k, v in tags.items()]}])
    things = cloud.leftovers(cluster="over")
    assert [(x.what, x.billable, x.expires) for x in things] == [
        ("volume", True, EXPIRES), ("address", True, EXPIRES), ("placement group", False, EXPIRES),
        ("security group", False, EXPIRES)]
    with pytest.raises(CallFailed) as failed:
        cloud.remove(things[-1])                  # the machines are in it
    assert failed.value.verdict == "busy"
    cloud.terminate([x.id for x in machines])
    wait(lambda: {x.state for x in cloud.instances(cluster="over", alive=False)} == {"terminated"})
    for thing in things:
        cloud.remove(thing)
        cloud.remove(thing)                       # gone is gone
    assert cloud.leftovers(cluster="over") == []


def test_leftovers_are_by_owner_and_never_anothers(cloud):
    cloud.placement_group("txl-you-x", tags_of("x", "you", "0123abcd", EXPIRES, "10/60"))
    assert [(x.what, x.id) for x in cloud.leftovers(owner="you")] == [("placement group", "txl-you-x")]
    assert "txl-you-x" not in [x.id for x in cloud.leftovers(owner="me")]
    assert "txl-you-x" in [x.id for x in cloud.leftovers()]


# --- no way in ---

def test_without_a_region_it_says_how_to_name_one():
    with environment(None, AWS_DEFAULT_REGION=""), pytest.raises(Refused, match=r"No AWS region.*--region=us-east-1"):
        Cloud()


def test_without_credentials_it_says_where_they_come_from():
    with environment(None, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY=""), \
            pytest.raises(Refused, match=r"No AWS credentials.*aws configure"):
        Cloud()


def test_an_unknown_profile_is_refused_by_name():
    with environment(None, AWS_PROFILE="nobody"), pytest.raises(Refused, match=r"\(nobody\).*could not be found"):
        Cloud()


def test_a_session_that_ended_says_how_to_sign_in_again(tmp_path):
    config = tmp_path / "config"
    config.write_text("[profile work]\nsso_session = s\nsso_account_id = 123456789012\nsso_role_name = r\n"
                      "[sso-session s]\nsso_start_url = https://example.invalid/start\nsso_region = us-east-1\n")
    with environment("http://127.0.0.1:9", AWS_CONFIG_FILE=str(config), AWS_PROFILE="work", AWS_ACCESS_KEY_ID="",
                     AWS_SECRET_ACCESS_KEY="", HOME=str(tmp_path)), \
            pytest.raises(Refused, match=r"profile 'work' have expired.*\n.*aws sso login --profile work"):
        Cloud()


@pytest.mark.parametrize(("code", "said"), [
    ("ExpiredToken", "have expired.*\n.*aws sso login"),
    ("InvalidClientTokenId", "does not accept the credentials .* InvalidClientTokenId.*\n.*active")])
def test_keys_that_aws_refuses_are_refused(aws, code, said):
    aws.fail("GetCallerIdentity", code, status=403)
    with pytest.raises(Refused, match=said):
        Cloud()


def test_credentials_that_expire_on_the_way_stop_at_once(cloud, aws):
    aws.fail("DescribeInstances", "RequestExpired", times=9)
    with pytest.raises(CallFailed, match="Sign in again") as failed:
        cloud.instances()
    assert failed.value.verdict == "expired"
    assert aws.count("DescribeInstances") == 1


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(ec2, "READ_S", 5)
    monkeypatch.setattr(ec2, "READS", ec2.ONCE)


def test_a_region_that_does_not_answer_is_questioned(hasty):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with environment(url, AWS_DEFAULT_REGION="us-eastt-1"), \
            pytest.raises(Refused, match=r"does not answer.*'us-eastt-1' is not a region.*Did you mean 'us-east-1'"):
        Cloud()


def test_a_socket_that_hangs_is_given_up(hasty):
    begun = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent, \
            environment(f"http://127.0.0.1:{silent.getsockname()[1]}"), \
            pytest.raises(Refused, match="AWS does not answer"):
        Cloud()
    assert time.monotonic() - begun < 50          # botocore itself would wait for 60


def test_a_page_that_is_no_answer_of_aws_is_no_answer(hasty):
    with page("<html>Please accept our terms") as url, environment(url), \
            pytest.raises(Refused, match="AWS does not answer"):
        Cloud()


def test_a_launch_that_hangs_may_have_happened(aws, hasty):
    cloud = Cloud()
    aws.fail("RunInstances", hang_s=10)
    with pytest.raises(CallFailed, match="ReadTimeoutError") as failed:
        cloud.run_instances(request_of())
    assert failed.value.verdict == "unreachable"


# --- who calls ---

@contextmanager
def page(text: str):
    """A web server on loopback with this one page."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET
        log_message: ClassVar = lambda *_: None

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_caller_is_where_the_web_sees_it():
    with environment(None), page("203.0.113.7\n") as url:
        assert caller_address(url) == "203.0.113.7/32"


@pytest.mark.parametrize("text", ["<html>", "203.0.113.300", "2001:db8::1", ""])
def test_what_is_no_address_is_refused(text):
    with environment(None), page(text) as url, pytest.raises(Refused, match="--ssh_cidr="):
        caller_address(url)


def test_a_caller_nobody_sees_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with environment(None), pytest.raises(Refused, match="--ssh_cidr="):
        caller_address(url)


def test_in_a_rehearsal_the_caller_is_loopback():
    with environment("http://127.0.0.1:9"):
        assert caller_address("http://example.invalid") == "127.0.0.1/32"


# --- what it may do ---

POLICY = json.loads((REPO / "docs/iam_policy.json").read_text())
# By tags in other calls, by the first spot request, by giving a role to machines.
IMPLIED = {"ec2:CreateTags", "iam:TagRole", "iam:CreateServiceLinkedRole", "iam:PassRole"}
S3 = {"s3:HeadBucket": "s3:ListBucket", "s3:ListObjectsV2": "s3:ListBucket"}       # what policies call them


def actions(statement: dict) -> set[str]:
    return {statement["Action"]} if isinstance(statement["Action"], str) else set(statement["Action"])


def test_the_policy_allows_what_the_code_calls_and_nothing_else(cloud):
    called = set()
    for service, file in [("ec2", "ec2"), ("ssm", "ec2"), ("sts", "ec2"), ("pricing", "prices"), ("iam", "ec2"),
                          ("s3", "bucket")]:
        model = boto3.client(service, region_name="us-east-1").meta
        words = {node.value for node in ast.walk(ast.parse((REPO / f"cluster/{file}.py").read_text()))
                 if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        called |= {f"{service}:{model.method_to_api_mapping[word]}" for word in words
                   if word in model.method_to_api_mapping}
    assert set().union(*map(actions, POLICY["Statement"])) == {S3.get(x, x) for x in called} | IMPLIED


def test_what_changes_or_ends_something_is_allowed_on_our_things_only():
    for statement in POLICY["Statement"]:
        for action in actions(statement):
            if re.match(r"ec2:(Terminate|Stop|Start|Delete|Release|Revoke|Authorize|Cancel|Associate)", action):
                assert statement["Condition"] == {"Null": {"aws:ResourceTag/txl:owner": "false"}}, action
            if re.match(r"iam:(Create|Delete|Put|Pass|Add|Remove|Tag)", action) and "ServiceLinked" not in action:
                named = statement["Resource"]
                assert all("/txl/" in x for x in ([named] if isinstance(named, str) else named)), action
            if action == "iam:PassRole":
                assert statement["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
            if action == "ec2:CreateTags":
                assert set(statement["Condition"]["StringEquals"]["ec2:CreateAction"]) == {
                    "AllocateAddress", "CreatePlacementGroup", "CreateSecurityGroup", "RunInstances"}


def wait(done, timeout_s: float = 5) -> None:
    end = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < end, "timed out"
        time.sleep(.02)
