from __future__ import annotations

import json
import time

import pytest
from botocore.exceptions import ConnectionClosedError, ReadTimeoutError

from cluster.rehearsal.ec2 import LOST
from tests.cluster.rehearsal.aws import SPOT, Caller, eventually, refused

# --- a launch is all or nothing, once ---


def test_a_launch_takes_place_for_as_many_as_there_is_room_or_not_at_all(ec2, aws):
    ec2.world.capacity |= {("ondemand", "us-east-1a"): 3, ("spot", "us-east-1a"): 1}
    with refused("InsufficientInstanceCapacity") as no:
        aws.run(4)
    assert no.status == 500                       # which botocore would repeat by itself
    assert aws.all() == []
    assert len(aws.run(2, MaxCount=5)) == 3
    with refused("InsufficientInstanceCapacity"):
        aws.run(1)
    assert len(aws.run(1, **SPOT)) == 1           # the other market has its own room
    assert len(aws.run(1, zone="us-east-1b")) == 1


def test_room_comes_back_when_machines_go(ec2, aws):
    ec2.world.capacity["ondemand", "us-east-1a"] = 1
    ids = aws.run(1)
    aws.ec2.terminate_instances(InstanceIds=ids)
    aws.until("terminated", *ids)
    assert aws.run(1)


def test_the_same_token_means_the_same_machines(aws):
    first = aws.run(2, ClientToken="once")
    assert aws.run(2, ClientToken="once") == first
    assert [x["InstanceId"] for x in aws.all(client_token="once")] == first
    assert aws.all(client_token="never") == []
    with refused("IdempotentParameterMismatch"):
        aws.run(3, ClientToken="once")
    assert len(aws.all()) == 2


def test_machines_of_a_launch_are_numbered_and_have_addresses_of_their_own_on_loopback(ec2, aws):
    ec2.world.boot_s = 1.5                        # longer than the question after it takes on a busy machine
    ids = aws.run(3, **SPOT)
    assert "PublicIpAddress" not in aws.one(ids[0])
    aws.until("running", *ids)
    machines = [aws.one(id) for id in ids]
    assert [x["AmiLaunchIndex"] for x in machines] == [0, 1, 2]
    assert all(x["InstanceLifecycle"] == "spot" and x["SpotInstanceRequestId"].startswith("sir-") for x in machines)
    addresses = [x[key] for x in machines for key in ("PrivateIpAddress", "PublicIpAddress")]
    assert len({*addresses}) == 6
    assert all(address.startswith("127.") for address in addresses)


@pytest.mark.parametrize(("change", "code"), [
    ({"InstanceType": "p9.huge"}, "InvalidParameterValue"),
    ({"ImageId": "ami-0123456789abcdef0"}, "InvalidAMIID.NotFound"),
    ({"ImageId": "ubuntu"}, "InvalidAMIID.Malformed"),
    ({"KeyName": "nobody's"}, "InvalidKeyPair.NotFound"),
    ({"SubnetId": "subnet-0123456789abcdef0"}, "InvalidSubnetID.NotFound"),
    ({"SecurityGroupIds": ["sg-0123456789abcdef0"]}, "InvalidGroup.NotFound"),
    ({"Placement": {"GroupName": "nowhere"}}, "InvalidPlacementGroup.Unknown"),
    ({"MinCount": 2, "MaxCount": 1}, "InvalidParameterValue"),
    ({"UserData": "x" * 16385}, "InvalidParameterValue"),
    ({"InstanceType": "p3dn.24xlarge"}, "Unsupported"),                  # offered in us-east-1c and 1d alone
    ({"InstanceType": "c7g.large"}, "InvalidParameterValue"),            # an arm, and the image is not
    ({"BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 8}}]}, "InvalidBlockDeviceMapping"),
    ({"DryRun": True}, "DryRunOperation"),
])
def test_what_a_launch_cannot_be_is_said_in_ec2s_own_words(aws, change, code):
    with refused(code):
        aws.run(**change)
    assert aws.all() == []
    assert aws.ec2.describe_volumes()["Volumes"] == []


def test_a_type_goes_where_it_is_offered(aws):
    offers = aws.ec2.describe_instance_type_offerings(
        LocationType="availability-zone", Filters=[{"Name": "instance-type", "Values": ["p3dn.24xlarge"]}])
    assert sorted(x["Location"] for x in offers["InstanceTypeOfferings"]) == ["us-east-1c", "us-east-1d"]
    with refused("Unsupported") as no:
        aws.run(kind="p3dn.24xlarge", zone="us-east-1b")
    assert "us-east-1c, us-east-1d" in no.said
    somewhere = aws.run(kind="p3dn.24xlarge", Placement={})
    assert aws.one(somewhere[0])["Placement"]["AvailabilityZone"] in ("us-east-1c", "us-east-1d")


# --- network interfaces, groups, addresses ---


def interfaces(aws: Caller, count: int, group: str, **more) -> dict:
    return {"NetworkInterfaces": [
        {"DeviceIndex": min(card, 1), "NetworkCardIndex": card, "SubnetId": aws.subnets["us-east-1a"],
         "Groups": [group], "InterfaceType": "efa-only" if card else "efa"} | more for card in range(count)]}


@pytest.fixture
def group(aws) -> str:
    return aws.ec2.create_security_group(GroupName="txl-x", Description="x")["GroupId"]


def test_several_network_cards_have_several_interfaces_and_no_public_address(aws, group):
    with refused("InvalidParameterCombination"):
        aws.run(**interfaces(aws, 4, group, AssociatePublicIpAddress=True))
    with refused("AttachmentLimitExceeded"):
        aws.run(**interfaces(aws, 5, group))
    with refused("AttachmentLimitExceeded"):
        aws.run(kind="c5.large", **interfaces(aws, 1, group))
    id, = aws.run(**interfaces(aws, 4, group))
    aws.until("running", id)
    machine = aws.one(id)
    assert [x["InterfaceType"] for x in machine["NetworkInterfaces"]] == ["efa", "efa-only", "efa-only", "efa-only"]
    assert [x["Attachment"]["DeviceIndex"] for x in machine["NetworkInterfaces"]] == [0, 1, 1, 1]
    assert len({x["PrivateIpAddress"] for x in machine["NetworkInterfaces"]}) == 4
    assert "PublicIpAddress" not in machine


def test_one_interface_may_have_a_public_address(aws, group):
    id, = aws.run(**interfaces(aws, 1, group, AssociatePublicIpAddress=True))
    aws.until("running", id)
    assert aws.one(id)["PublicIpAddress"].startswith("127.32.")


def test_a_security_group_and_a_placement_group_stay_until_the_machines_are_really_gone(ec2, aws, group):
    aws.ec2.create_placement_group(GroupName="txl-x", Strategy="cluster")
    ids = aws.run(2, Placement={"GroupName": "txl-x", "AvailabilityZone": "us-east-1a"}, **interfaces(aws, 2, group))
    assert {aws.one(id)["Placement"]["GroupName"] for id in ids} == {"txl-x"}
    ec2.world.shutdown_s = 3600
    aws.ec2.terminate_instances(InstanceIds=ids)
    assert {x["State"]["Name"] for x in aws.all()} == {"shutting-down"}
    with refused("DependencyViolation"):
        aws.ec2.delete_security_group(GroupId=group)
    with refused("InvalidPlacementGroup.InUse"):
        aws.ec2.delete_placement_group(GroupName="txl-x")
    assert len(aws.ec2.describe_network_interfaces()["NetworkInterfaces"]) == 4
    for machine in ec2.world.machines.values():
        machine.due = time.monotonic()
    aws.until("terminated", *ids)
    aws.ec2.delete_security_group(GroupId=group)
    aws.ec2.delete_placement_group(GroupName="txl-x")
    assert aws.ec2.describe_network_interfaces()["NetworkInterfaces"] == aws.ec2.describe_volumes()["Volumes"] == []
    gone = aws.one(ids[0])
    assert gone["NetworkInterfaces"] == gone["SecurityGroups"] == []
    assert "PrivateIpAddress" not in gone
    assert "PublicIpAddress" not in gone


def test_what_is_not_to_be_deleted_with_its_machine_is_left(aws, group):
    disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 20, "DeleteOnTermination": False}}
    id, = aws.run(BlockDeviceMappings=[disk], **interfaces(aws, 1, group, DeleteOnTermination=False))
    aws.ec2.terminate_instances(InstanceIds=[id])
    aws.until("terminated", id)
    assert [x["State"] for x in aws.ec2.describe_volumes()["Volumes"]] == ["available"]
    assert [x["Status"] for x in aws.ec2.describe_network_interfaces()["NetworkInterfaces"]] == ["available"]


def test_placement_groups_are_found_by_name_and_tag(aws):
    tags = [{"ResourceType": "placement-group", "Tags": [{"Key": "txl:owner", "Value": "me"}]}]
    aws.ec2.create_placement_group(GroupName="a", Strategy="cluster", TagSpecifications=tags)
    aws.ec2.create_placement_group(GroupName="b", Strategy="spread")
    with refused("InvalidPlacementGroup.Duplicate"):
        aws.ec2.create_placement_group(GroupName="a", Strategy="cluster")
    with refused("InvalidPlacementGroup.Unknown"):
        aws.ec2.describe_placement_groups(GroupNames=["c"])
    with refused("InvalidPlacementGroup.Unknown"):
        aws.ec2.delete_placement_group(GroupName="c")

    def names(**filters):
        asked = [{"Name": name.replace("__", ":").replace("_", "-"), "Values": [value]}
                 for name, value in filters.items()]
        return [x["GroupName"] for x in aws.ec2.describe_placement_groups(Filters=asked)["PlacementGroups"]]
    assert names() == ["a", "b"]
    assert names(tag__txl__owner="me") == names(strategy="cluster") == names(group_name="a*") == ["a"]
    assert names(state="deleting") == []
    with refused("InvalidParameterCombination"):
        aws.run(kind="t3.medium", Placement={"GroupName": "a"})


def test_an_elastic_address_is_kept_until_it_is_released(ec2, aws):
    ec2.world.boot_s = 3600
    id, = aws.run()
    address = aws.ec2.allocate_address()
    with refused("InvalidInstanceID"):
        aws.ec2.associate_address(InstanceId=id, AllocationId=address["AllocationId"])       # it is pending
    ec2.world.machines[id].due = time.monotonic()
    aws.until("running", id)
    own = aws.one(id)["PublicIpAddress"]
    association = aws.ec2.associate_address(InstanceId=id, AllocationId=address["AllocationId"])["AssociationId"]
    assert aws.one(id)["PublicIpAddress"] == address["PublicIp"] != own
    with refused("InvalidIPAddress.InUse"):
        aws.ec2.release_address(AllocationId=address["AllocationId"])
    aws.ec2.stop_instances(InstanceIds=[id])
    aws.until("stopped", id)
    assert aws.one(id)["PublicIpAddress"] == address["PublicIp"]
    aws.ec2.disassociate_address(AssociationId=association)
    assert "PublicIpAddress" not in aws.one(id)
    aws.ec2.associate_address(InstanceId=id, AllocationId=address["AllocationId"])
    aws.ec2.terminate_instances(InstanceIds=[id])
    aws.until("terminated", id)
    left, = aws.ec2.describe_addresses()["Addresses"]
    assert left["PublicIp"] == address["PublicIp"]
    assert not left.get("InstanceId")
    aws.ec2.release_address(AllocationId=address["AllocationId"])
    assert aws.ec2.describe_addresses()["Addresses"] == []


def test_a_machine_with_several_interfaces_must_be_told_which_of_them_gets_the_address(aws, group):
    id, = aws.run(**interfaces(aws, 4, group))
    aws.until("running", id)
    address = aws.ec2.allocate_address()
    with refused("InvalidInstanceID"):
        aws.ec2.associate_address(InstanceId=id, AllocationId=address["AllocationId"])
    aws.ec2.associate_address(NetworkInterfaceId=aws.one(id)["NetworkInterfaces"][0]["NetworkInterfaceId"],
                              AllocationId=address["AllocationId"])
    assert aws.one(id)["PublicIpAddress"] == address["PublicIp"]


def test_there_are_five_elastic_addresses_and_no_more(aws):
    for _ in range(5):
        aws.ec2.allocate_address(Domain="vpc")
    with refused("AddressLimitExceeded"):
        aws.ec2.allocate_address(Domain="vpc")


# --- states ---


def test_states_take_their_time(ec2, aws):
    ec2.world.boot_s = ec2.world.shutdown_s = 3600
    id, = aws.run()
    for action in (aws.ec2.stop_instances, aws.ec2.reboot_instances):
        with refused("IncorrectInstanceState"):
            action(InstanceIds=[id])
    assert aws.one(id)["State"]["Name"] == "pending"
    ec2.world.machines[id].due = time.monotonic()
    aws.until("running", id)
    change, = aws.ec2.stop_instances(InstanceIds=[id])["StoppingInstances"]
    assert (change["PreviousState"]["Name"], change["CurrentState"]["Name"]) == ("running", "stopping")
    with refused("IncorrectInstanceState"):
        aws.ec2.start_instances(InstanceIds=[id])
    change, = aws.ec2.terminate_instances(InstanceIds=[id])["TerminatingInstances"]
    assert (change["PreviousState"]["Name"], change["CurrentState"]["Name"]) == ("stopping", "shutting-down")
    ec2.world.machines[id].due = time.monotonic()
    aws.until("terminated", id)
    for action in (aws.ec2.stop_instances, aws.ec2.start_instances, aws.ec2.reboot_instances):
        with refused("IncorrectInstanceState"):
            action(InstanceIds=[id])
    aws.ec2.terminate_instances(InstanceIds=[id])             # again: as often as one likes
    assert aws.one(id)["State"]["Name"] == "terminated"


def test_a_stopped_machine_comes_back_at_another_public_address(aws):
    id, = aws.run()
    aws.until("running", id)
    before = aws.one(id)
    aws.ec2.stop_instances(InstanceIds=[id])
    aws.until("stopped", id)
    assert "PublicIpAddress" not in aws.one(id)
    aws.ec2.start_instances(InstanceIds=[id])
    aws.until("running", id)
    after = aws.one(id)
    assert after["PublicIpAddress"] != before["PublicIpAddress"]
    assert after["PrivateIpAddress"] == before["PrivateIpAddress"]


def test_a_spot_machine_cannot_be_stopped(aws):
    ids = aws.run(**SPOT)
    aws.until("running", *ids)
    with refused("UnsupportedOperation"):
        aws.ec2.stop_instances(InstanceIds=ids)


def test_one_unknown_machine_keeps_all_of_a_request_from_happening(aws):
    ids = aws.run(2)
    with refused("InvalidInstanceID.NotFound"):
        aws.ec2.terminate_instances(InstanceIds=[*ids, "i-0123456789abcdef0"])
    assert {x["State"]["Name"] for x in aws.all()} <= {"pending", "running"}


def test_addresses_of_machines_that_are_gone_are_used_again_if_asked_for(ec2, aws):
    ec2.world.reuse_addresses = True
    first, = aws.run()
    aws.until("running", first)
    address = aws.one(first)["PublicIpAddress"]
    aws.ec2.terminate_instances(InstanceIds=[first])
    aws.until("terminated", first)
    second, = aws.run()
    aws.until("running", second)
    assert aws.one(second)["PublicIpAddress"] == address


def test_for_a_while_nobody_knows_of_a_new_machine(ec2, aws):
    ec2.world.hidden_s = 3600
    id, = aws.run(ClientToken="once")
    assert aws.all() == []
    assert aws.all(client_token="once") == []
    for action in (aws.ec2.describe_instances, aws.ec2.terminate_instances):
        with refused("InvalidInstanceID.NotFound"):
            action(InstanceIds=[id])
    with refused("InvalidInstanceID.NotFound"):
        aws.ec2.create_tags(Resources=[id], Tags=[{"Key": "a", "Value": "b"}])
    assert aws.run(ClientToken="once") == [id]
    ec2.world.hidden_s = 0
    assert [x["InstanceId"] for x in aws.all()] == [id]


def test_everything_of_a_launch_carries_its_tags(aws):
    tags = [{"Key": "txl:cluster", "Value": "x"}]
    id, = aws.run(TagSpecifications=[{"ResourceType": what, "Tags": tags}
                                     for what in ("instance", "volume", "network-interface")])
    volume, = aws.ec2.describe_volumes()["Volumes"]
    interface, = aws.ec2.describe_network_interfaces()["NetworkInterfaces"]
    assert aws.one(id)["Tags"] == volume["Tags"] == interface["TagSet"] == tags


# --- the market, images, prices ---


def test_scores_tell_where_there_is_room_by_the_zones_ids(ec2, aws):
    ec2.world.capacity["spot", "us-east-1c"] = 3
    ids = {x["ZoneId"]: x["ZoneName"] for x in aws.ec2.describe_availability_zones()["AvailabilityZones"]}

    def scores(count):
        return {ids[x["AvailabilityZoneId"]]: x["Score"] for x in aws.ec2.get_spot_placement_scores(
            InstanceTypes=["p3dn.24xlarge"], TargetCapacity=count, SingleAvailabilityZone=True,
            RegionNames=["us-east-1"])["SpotPlacementScores"]}
    assert scores(3) == {"us-east-1c": 9, "us-east-1d": 9}
    assert scores(4) == {"us-east-1c": 1, "us-east-1d": 9}


def test_spot_prices_are_of_each_zone_and_follow_the_list_price(aws):
    prices = {x["AvailabilityZone"]: float(x["SpotPrice"]) for x in aws.ec2.describe_spot_price_history(
        InstanceTypes=["p3dn.24xlarge"], ProductDescriptions=["Linux/UNIX"])["SpotPriceHistory"]}
    product, = aws.client("pricing").get_products(ServiceCode="AmazonEC2", Filters=[
        {"Type": "TERM_MATCH", "Field": "instanceType", "Value": "p3dn.24xlarge"}])["PriceList"]
    term, = json.loads(product)["terms"]["OnDemand"].values()
    dimension, = term["priceDimensions"].values()
    listed = float(dimension["pricePerUnit"]["USD"])
    assert prices == pytest.approx({"us-east-1c": listed * .35 * 1.02, "us-east-1d": listed * .35 * 1.03})


@pytest.mark.parametrize(("name", "owner"), [
    ("/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id", "898082745236"),
    ("/aws/service/canonical/ubuntu/server/24.04/stable/current/arm64/hvm/ebs-gp3/ami-id", "099720109477"),
])
def test_public_parameters_lead_to_images_of_their_publishers(aws, name, owner):
    ssm = aws.client("ssm")
    image = ssm.get_parameter(Name=name)["Parameter"]["Value"]
    assert [x["Value"] for x in ssm.get_parameters(Names=[name])["Parameters"]] == [image]
    found, = aws.ec2.describe_images(ImageIds=[image], Owners=[owner])["Images"]
    assert found["Architecture"] == ("arm64" if "arm64" in name else "x86_64")
    assert aws.ec2.describe_images(ImageIds=[image], Owners=["111111111111"])["Images"] == []
    kind = "c7g.large" if "arm64" in name else "p4d.24xlarge"
    id, = aws.run(kind=kind, ImageId=f"resolve:ssm:{name}")
    assert aws.one(id)["ImageId"] == image


def test_an_unknown_parameter_is_not_found(aws):
    with refused("ParameterNotFound"):
        aws.client("ssm").get_parameter(Name="/aws/service/nothing/here")


def test_s3_and_sts_are_motos(ec2, aws):
    s3 = aws.client("s3")
    s3.create_bucket(Bucket="txl-runs")
    s3.put_object(Bucket="txl-runs", Key="a/b", Body=b"weights")
    assert s3.get_object(Bucket="txl-runs", Key="a/b")["Body"].read() == b"weights"
    with refused("NoSuchKey"):
        s3.get_object(Bucket="txl-runs", Key="a/c")
    assert aws.client("sts").get_caller_identity()["Account"] == "123456789012"
    assert [(call.action, call.service, call.code) for call in ec2.calls[-5:]] == [
        ("CreateBucket", "s3", None), ("PutObject", "s3", None), ("GetObject", "s3", None),
        ("GetObject", "s3", "NoSuchKey"), ("GetCallerIdentity", "sts", None)]


# --- faults and the journal ---


def test_dry_runs_change_nothing(aws):
    with refused("DryRunOperation") as no:
        aws.ec2.create_security_group(GroupName="x", Description="x", DryRun=True)
    assert no.status == 412
    assert [x["GroupName"] for x in aws.ec2.describe_security_groups()["SecurityGroups"]] == ["default"]


def test_what_the_rehearsal_does_not_know_is_said_and_written_down(ec2, aws):
    with refused("InvalidAction"):
        aws.ec2.describe_capacity_reservations()
    call = ec2.calls[-1]
    assert (call.action, call.service, call.code) == ("DescribeCapacityReservations", "ec2", "InvalidAction")


def test_every_request_is_in_the_journal(ec2, aws):
    aws.run(2)
    call, = [call for call in ec2.calls if call.action == "RunInstances"]
    assert (call.service, call.params["InstanceType"], call.params["MinCount"], call.code) == (
        "ec2", "p4d.24xlarge", "2", None)
    parameter = next(call for call in ec2.calls if call.service == "ssm")
    assert parameter.params["Name"].startswith("/aws/service/canonical/")
    assert ec2.count("RunInstances") == 1


def test_a_fault_strikes_as_often_and_as_chosen(ec2, aws):
    ec2.fail("DescribeInstances", "RequestLimitExceeded", times=2, status=503)
    for _ in range(2):
        with refused("RequestLimitExceeded") as no:
            aws.all()
        assert no.status == 503
    assert aws.all() == []
    ec2.fail("DescribeVpcs", "InternalError", times=float("inf"), status=500, every=2)
    outcomes = []
    for _ in range(4):
        try:
            aws.ec2.describe_vpcs()
            outcomes.append(True)
        except Exception:
            outcomes.append(False)
    assert outcomes == [True, False, True, False]
    ec2.fail("RunInstances", "UnauthorizedOperation", status=403, when=lambda params: "TagSpecification.1.ResourceType"
             in params)
    assert aws.run()
    with refused("UnauthorizedOperation"):
        aws.run(TagSpecifications=[{"ResourceType": "instance", "Tags": [{"Key": "a", "Value": "b"}]}])
    ec2.fail("*", "Boom", times=float("inf"))
    with refused("Boom"):
        aws.all()
    ec2.heal()
    assert len(aws.all()) == 1


@pytest.mark.parametrize(("service", "action", "code"), [
    ("sts", "get_caller_identity", "ExpiredToken"), ("ssm", "get_parameter", "ThrottlingException"),
    ("s3", "list_buckets", "AccessDenied")])
def test_every_service_fails_in_its_own_format(ec2, aws, service, action, code):
    ec2.fail("*", code, status=403, message="<because & so>")
    with refused(code) as no:
        getattr(aws.client(service), action)(**({"Name": "/x"} if service == "ssm" else {}))
    assert no.said == "<because & so>"


def test_a_reply_can_be_lost_after_the_deed(ec2, aws):
    ec2.fail("RunInstances", after=True)
    with pytest.raises(ConnectionClosedError):
        aws.run(2, ClientToken="once")
    assert ec2.calls[-1].code == LOST
    lost = [x["InstanceId"] for x in aws.all(client_token="once")]
    assert len(lost) == 2
    assert aws.run(2, ClientToken="once") == lost


def test_an_endpoint_can_hang(ec2, aws):
    ec2.fail("DescribeInstances", hang_s=60)
    with pytest.raises(ReadTimeoutError):
        aws.client("ec2", read_timeout=0.2).describe_instances()
    assert aws.all() == []                        # the others are served meanwhile


def test_requests_side_by_side_are_all_answered(aws):
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(8) as pool:
        ids = [id for made in pool.map(lambda i: aws.run(2, ClientToken=f"t{i}"), range(8)) for id in made]
    assert len({*ids}) == 16
    eventually(lambda: all(x["State"]["Name"] == "running" for x in aws.all()))
    assert len({x["PrivateIpAddress"] for x in aws.all()}) == 16
