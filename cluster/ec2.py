"""EC2: what is asked of it, as values (pure), and the one class that talks to it. boto3 is loaded with the class."""
from __future__ import annotations

import contextlib
import functools
import hashlib
import ipaddress
import json
import os
import re
import time
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal
from urllib.parse import urlsplit

from cluster.bucket import role_path
from cluster.run import Refused
from engine.values import nearest

Market = Literal["spot", "ondemand"]
Verdict = Literal["capacity", "quota", "denied", "expired", "throttled", "invalid", "duplicate", "missing", "busy",
                  "unreachable"]
CANONICAL = "099720109477"                        # account that publishes Ubuntu
CHECKIP = "https://checkip.amazonaws.com"
CONNECT_S, READ_S = 5, 20                         # the longest that one attempt may take to connect, and to answer
READS = {"total_max_attempts": 5, "mode": "standard"}      # botocore's own backoff, at most 20 s between attempts
ONCE = {"total_max_attempts": 1, "mode": "standard"}       # else botocore repeats "no capacity", which is a 5xx
VISIBLE_S = (.5, 1, 2, 4, 8, 15)                  # pauses until what was just made is visible to EC2's other calls
CLUSTER, OWNER, EXPIRES = "txl:cluster", "txl:owner", "txl:expires"        # tags
DOOR = "mosh"                                     # description of a rule that is there for a while only
REGION = "txl:region"                             # a tag of roles, which are in none

# Codes of EC2, IAM and STS by what to do about them. What is in no row: any ...LimitExceeded is a quota, any
# ...NotFound missing, any ...Duplicate duplicate, a 5xx throttled, and the rest is our request's fault.
CODES: dict[Verdict, str] = {
    "capacity": "InsufficientInstanceCapacity InsufficientHostCapacity InsufficientReservedInstanceCapacity "
                "InsufficientCapacity UnfulfillableCapacity InsufficientFreeAddressesInSubnet SpotMaxPriceTooLow "
                "Unsupported",
    "quota": "MaxSpotInstanceCountExceeded",
    "denied": "UnauthorizedOperation AuthFailure AccessDenied AccessDeniedException Blocked OptInRequired "
              "PendingVerification InvalidClientTokenId SignatureDoesNotMatch MissingAuthenticationToken "
              "UnrecognizedClientException",
    "expired": "ExpiredToken ExpiredTokenException RequestExpired",
    "throttled": "RequestLimitExceeded Throttling ThrottlingException EC2ThrottledException",
    "missing": "InvalidPlacementGroup.Unknown ParameterNotFound NoSuchEntity",
    "duplicate": "EntityAlreadyExists",
    "busy": "DependencyViolation InvalidGroup.InUse InvalidPlacementGroup.InUse InvalidIPAddress.InUse VolumeInUse "
            "IncorrectInstanceState IncorrectState DeleteConflict ConcurrentModification",
}
VERDICTS = {code: verdict for verdict, codes in CODES.items() for code in codes.split()}
NOT_HERE = "Unsupported"                          # the kind is not offered in this zone: asking there again is useless
ADVICE: dict[Verdict, str] = {
    "quota": "Ask for more in the console's Service Quotas, or for fewer or other machines.",
    "denied": "docs/iam_policy.json lists what this launcher needs; whoever runs the account can grant it.",
    "expired": "Sign in again (for example `aws sso login`), check the clock, then give the same command again.",
    "throttled": "EC2 is overloaded or asked too often: try again in some minutes.",
    "unreachable": "Check the network and the region, then give the same command again.",
}
STANDARD = "a c d h i m r t z"
QUOTAS: tuple[tuple[Market, str, str], ...] = (   # of vCPUs: whose families, and how Service Quotas lists it
    ("ondemand", "p", "Running On-Demand P instances, L-417A185B"),
    ("ondemand", "g vt", "Running On-Demand G and VT instances, L-DB2E81BA"),
    ("ondemand", STANDARD, f"Running On-Demand Standard ({STANDARD.upper()}) instances, L-1216C47A"),
    ("spot", "p2 p3 p4", "All P4, P3 and P2 Spot Instance Requests, L-7212CCBC"),
    ("spot", "p5", "All P5 Spot Instance Requests, L-C4BD4855"),
    ("spot", "g vt", "All G and VT Spot Instance Requests, L-3819A6DF"),
    ("spot", STANDARD, f"All Standard ({STANDARD.upper()}) Spot Instance Requests, L-34B43A08"),
)


class CallFailed(Exception):
    """AWS did not do what it was asked, or did not say whether it did (`unreachable`)."""

    def __init__(self, action: str, code: str, said: str, verdict: Verdict):
        advice = ADVICE.get(verdict)
        super().__init__(f"{action}: {code}: {said}" + (f"\n{advice}" if advice else ""))
        self.action, self.code, self.said, self.verdict = action, code, said, verdict


@dataclass(frozen=True)
class Instance:
    id: str
    node: int                                     # AmiLaunchIndex
    state: str                                    # pending, running, stopping, stopped, shutting-down, terminated
    kind: str
    market: Market
    zone: str
    private: str                                  # "" once it is terminated
    public: str | None
    launched: float                               # unix time; a stopped one that is started begins anew
    tags: dict[str, str]
    token: str                                    # ClientToken of the launch


@dataclass(frozen=True)
class Type:
    name: str
    cores: int                                    # vCPUs
    memory_gib: float
    gpus: int
    gpu: str | None                               # "V100", as EC2 calls it
    gpu_memory_gib: float                         # of each
    arch: str                                     # x86_64 or arm64
    efa: int                                      # EFA interfaces it takes at most
    cards: int                                    # network cards
    nvme_gib: float                               # all its own disks together
    spot: bool


@dataclass(frozen=True)
class Image:
    id: str
    name: str
    source: str                                   # the reference it was found by
    root_device: str
    size_gib: int                                 # the least a root volume may have

    def __str__(self) -> str:
        return f"image {self.id}, {self.name}"


@dataclass(frozen=True)
class Network:
    vpc: str
    subnets: dict[str, str]                       # zone -> subnet


@dataclass(frozen=True)
class Thing:
    """Something of ours that is no machine. `id` is what `Cloud.remove` needs."""
    what: Literal["spot request", "volume", "address", "placement group", "security group", "role"]
    id: str
    cluster: str
    expires: float | None                         # unix time; None: nothing was said
    billable: bool


@dataclass(frozen=True)
class Door:
    """A UDP port of a cluster's machines that is open to one address for a while (doors.py)."""
    group: str
    cluster: str
    port: int
    cidr: str


def run_instances_request(*, kind: Type, count: int, market: Market, zone: str, subnet: str, group: str,
                          placement: str | None, image: Image, disk_gib: int, user_data: str, tags: Mapping[str, str],
                          token: str, profile: str | None = None, key_pair: str | None = None) -> dict[str, Any]:
    """Keyword arguments for RunInstances: all `count` in one zone, or none. `token` makes a repeat harmless.
    `key_pair` is a label, as whom it lets in is the user-data's matter (boot.py)."""
    tagged = ["instance", "volume", "network-interface"] + ["spot-instances-request"] * (market == "spot")
    request: dict[str, Any] = {
        "ImageId": image.id, "InstanceType": kind.name, "MinCount": count, "MaxCount": count, "ClientToken": token,
        "Placement": {"AvailabilityZone": zone} | ({"GroupName": placement} if placement and count > 1 else {}),
        "NetworkInterfaces": _interfaces(kind, count, subnet, group),
        "BlockDeviceMappings": [{"DeviceName": image.root_device, "Ebs": {
            "VolumeSize": max(disk_gib, image.size_gib), "VolumeType": "gp3", "Iops": 3000, "Throughput": 250,
            "Encrypted": True, "DeleteOnTermination": True}}],
        "InstanceInitiatedShutdownBehavior": "terminate",          # the watchdog's power-off ends the bill
        "MetadataOptions": {"HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        "UserData": user_data,                                     # boto3 encodes it
        "TagSpecifications": [{"ResourceType": what, "Tags": _tag_list(tags)} for what in tagged],
    }
    if market == "spot":                          # without a price of ours: on-demand is the most that spot costs
        request["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": {
            "SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}}
    if key_pair:
        request["KeyName"] = key_pair
    if profile:
        request["IamInstanceProfile"] = {"Arn" if profile.startswith("arn:") else "Name": profile}
    return request


def needs_jump(kind: Type, count: int) -> bool:
    """Whether the machines come without public addresses: EC2 gives none to several network interfaces."""
    return len(_interfaces(kind, count, "", "")) > 1


def token(intent: str, market: Market, zone: str, round: int) -> str:
    """The ClientToken of one attempt. The same attempt sent again has the same one, and EC2 acts once."""
    return "txl-" + hashlib.sha256("\0".join((intent, market, zone, str(round))).encode()).hexdigest()[:40]


def tags_of(cluster: str, owner: str, config_hash: str, expires: float, minutes: str) -> dict[str, str]:
    """What everything of a cluster carries. `expires`: unix time; `minutes`: "10/60", after success / failure."""
    return {"Name": cluster, "User": owner, CLUSTER: cluster, OWNER: owner, "txl:config": config_hash,
            EXPIRES: datetime.fromtimestamp(expires, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "txl:minutes": minutes}


def expires(tags: Mapping[str, str]) -> float | None:
    """Unix time of txl:expires; None where it is absent or unreadable."""
    with contextlib.suppress(KeyError, ValueError):
        return datetime.fromisoformat(tags[EXPIRES].replace("Z", "+00:00")).timestamp()
    return None


def quota(kind: str, market: Market) -> str:
    """What Service Quotas calls the limit on vCPUs that holds for a kind of machine, and its code."""
    family = re.split(r"(?<=\d)", kind)[0]        # p4 of p4d.24xlarge
    names = {family, family.rstrip("0123456789")}
    return next((name for of, families, name in QUOTAS if of == market and names & set(families.split())),
                f"vCPUs of {kind}, {market}")


def caller_address(url: str = CHECKIP) -> str:
    """The address from which this machine is seen, as "a.b.c.d/32"; loopback in a rehearsal. Raises Refused."""
    if _is_loopback(os.environ.get("AWS_ENDPOINT_URL_EC2") or os.environ.get("AWS_ENDPOINT_URL")):
        return "127.0.0.1/32"
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return f"{ipaddress.IPv4Address(reply.read(100).decode('ascii').strip())}/32"
    except (OSError, ValueError) as error:
        raise Refused(f"Who may reach the machines by SSH? {url} does not tell this machine's public address "
                      f"({error}). Give it yourself:  --ssh_cidr=203.0.113.7/32") from error


def verdict_of(code: str, status: int) -> Verdict:
    """What an error's code and HTTP status say about what to do."""
    if code in VERDICTS:
        return VERDICTS[code]
    by_ending: dict[str, Verdict] = {"LimitExceeded": "quota", "NotFound": "missing", "Duplicate": "duplicate"}
    return next((verdict for ending, verdict in by_ending.items() if code.endswith(ending)),
                "throttled" if status >= 500 else "invalid")


@contextlib.contextmanager
def classified(operation: str) -> Iterator[None]:
    """What boto3 raises in the block becomes CallFailed. `operation` as boto3 spells it."""
    from botocore import exceptions, parsers
    action = "".join(word.capitalize() for word in operation.split("_"))
    try:
        yield
    except exceptions.ClientError as error:
        raise _refused_by_aws(action, error.response) from error
    except (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError,
            parsers.ResponseParserError) as error:
        raise CallFailed(action, type(error).__name__, str(error), "unreachable") from error
    except (exceptions.ParamValidationError, exceptions.OperationNotPageableError):
        raise                                     # our mistake
    except exceptions.BotoCoreError as error:     # what is left before anything is sent: finding credentials
        raise CallFailed(action, type(error).__name__, str(error), "expired") from error


class Cloud:
    """One account in one region. Every call ends within two minutes; what fails raises CallFailed.

    Endpoint, profile and credentials come by AWS's own environment variables and files. Raises Refused where these
    do not lead to an account. `sleep` is only waited with until what was just made is visible everywhere.
    """

    def __init__(self, region: str | None = None, *, sleep: Callable[[float], None] = time.sleep):
        try:
            import boto3
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
        except ImportError as error:
            raise Refused(f"Machines on AWS need boto3 ({error}):  pip install -r requirements-launch.txt") from error
        try:
            session = boto3.Session(region_name=region)
            if session.region_name is None:
                raise Refused("No AWS region. Name one:  --region=us-east-1  or  export AWS_DEFAULT_REGION=us-east-1")
            self.region: str = session.region_name

            @functools.cache
            def client(service: str, once: bool = False) -> Any:
                return session.client(service, config=Config(connect_timeout=CONNECT_S, read_timeout=READ_S,
                                                             retries=ONCE if once else READS))

            self._client = client
            clients = [client("ec2"), client("ec2", once=True), client("ssm"), client("sts")]
        except BotoCoreError as error:
            raise Refused(f"The AWS configuration cannot be used: {error}\n"
                          f"See `aws configure list`, AWS_PROFILE and ~/.aws/config") from error
        self._ec2, self._once, self._ssm, sts = clients
        self._sleep = sleep
        try:
            caller = self._call("get_caller_identity", on=sts)
        except CallFailed as error:
            raise Refused(_no_entry(error, session)) from error
        self.account, self.caller = caller["Account"], caller["Arn"]

    # --- reads ---

    def type(self, name: str) -> Type:
        """Raises Refused where the region has no such type."""
        try:
            return _type(self._call("describe_instance_types", InstanceTypes=[name])["InstanceTypes"][0])
        except CallFailed as error:
            if error.code not in ("InvalidInstanceType", "InvalidParameterValue"):
                raise
            offered = self._pages("describe_instance_type_offerings", "InstanceTypeOfferings")
            raise Refused(f"{self.region} has no instance type {name!r}."
                          f"{nearest(name, sorted(x['InstanceType'] for x in offered))} Choose another "
                          f"--instance_type, or another --region") from error

    def network(self, vpc: str | None = None) -> Network:
        """The default VPC, or `vpc`, with a subnet of each zone that machines are reached in. Raises Refused."""
        which: dict[str, Any] = {"VpcIds": [vpc]} if vpc else {"Filters": _filters({"is-default": "true"})}
        try:
            found = self._call("describe_vpcs", **which)["Vpcs"]
        except CallFailed as error:
            if error.verdict != "missing":
                raise
            found = []
        if not found:
            raise Refused(f"{self.region} has no VPC {vpc}: name one of yours, --vpc=vpc-…" if vpc else
                          f"The account has no default VPC in {self.region}. Name one, --vpc=vpc-…, or make it:  "
                          f"aws ec2 create-default-vpc --region {self.region}")
        chosen = found[0]["VpcId"]
        mine = _filters({"vpc-id": chosen})
        subnets = self._pages("describe_subnets", "Subnets", Filters=mine)
        if vpc:                                   # the default one comes with its route
            tables = self._pages("describe_route_tables", "RouteTables", Filters=mine)
            subnets = [subnet for subnet in subnets if _is_public(subnet["SubnetId"], tables)]
        if not subnets:
            raise Refused(f"No subnet of {chosen} has a route to an internet gateway, so its machines could not be "
                          f"reached. Choose another --vpc, or add the route 0.0.0.0/0 to a subnet" if vpc else
                          f"The default VPC {chosen} has no subnet. Make one:  "
                          f"aws ec2 create-default-subnet --availability-zone {self.region}a")
        roomiest = sorted(subnets, key=lambda x: (x["AvailableIpAddressCount"], x["SubnetId"]))
        return Network(chosen, {subnet["AvailabilityZone"]: subnet["SubnetId"] for subnet in roomiest})

    def zones(self, kind: str) -> set[str]:
        """Where the kind is offered."""
        return {x["Location"] for x in self._pages(
            "describe_instance_type_offerings", "InstanceTypeOfferings", LocationType="availability-zone",
            Filters=_filters({"instance-type": kind}))}

    def scores(self, kind: str, count: int) -> dict[str, int]:
        """EC2's guess, 1 to 10, whether spot has room for `count` in a zone; {} where it tells us nothing."""
        try:
            scores = self._pages("get_spot_placement_scores", "SpotPlacementScores", InstanceTypes=[kind],
                                 TargetCapacity=count, SingleAvailabilityZone=True, RegionNames=[self.region])
            zones = self._call("describe_availability_zones")["AvailabilityZones"]
        except CallFailed:
            return {}                             # only an order of preference
        names = {zone["ZoneId"]: zone["ZoneName"] for zone in zones}
        return {names[x["AvailabilityZoneId"]]: x["Score"] for x in scores if x.get("AvailabilityZoneId") in names}

    def spot_prices(self, kind: str) -> dict[str, float]:
        """Dollars per hour and machine now, by zone; {} where EC2 does not say."""
        try:
            prices = self._pages("describe_spot_price_history", "SpotPriceHistory", InstanceTypes=[kind],
                                 ProductDescriptions=["Linux/UNIX", "Linux/UNIX (Amazon VPC)"],
                                 StartTime=datetime.now(timezone.utc))
        except CallFailed:
            return {}
        return {x["AvailabilityZone"]: float(x["SpotPrice"]) for x in sorted(prices, key=lambda x: x["Timestamp"])}

    def image(self, reference: str) -> Image:
        """By "ami-…" or SSM parameter "/aws/…"; only of Amazon, Canonical or this account. Raises Refused."""
        try:
            ami = reference if reference.startswith("ami-") else self._call(
                "get_parameter", on=self._ssm, Name=reference)["Parameter"]["Value"]
            found = self._call("describe_images", ImageIds=[ami])["Images"]
        except CallFailed as error:
            if error.verdict != "missing" and not error.code.startswith(("InvalidAMIID", "ValidationException")):
                raise
            raise Refused(f"{self.region} has no image {reference}: {error.said}\n"
                          f"Name one:  --image=ami-…  or an SSM parameter, --image=/aws/service/…") from error
        # A name anybody can take; whose image it is decides.
        if not found or (found[0].get("ImageOwnerAlias") != "amazon"
                         and found[0]["OwnerId"] not in (CANONICAL, self.account)):
            raise Refused(f"{reference} is not an image of Amazon, Canonical or this account: it would not be "
                          f"trusted with a training. Copy it to the account, or name another --image")
        image = found[0]
        root: dict[str, Any] = next((x["Ebs"] for x in image["BlockDeviceMappings"]
                                     if x.get("DeviceName") == image["RootDeviceName"] and "Ebs" in x), {})
        return Image(image["ImageId"], image.get("Name", ""), reference, image["RootDeviceName"],
                     root.get("VolumeSize", 1))

    def instances(self, cluster: str | None = None, owner: str | None = None, token: str | None = None,
                  alive: bool = True) -> list[Instance]:
        """Ours, by launch and node. `alive`: those that cost or may cost again, so not those that are going."""
        filters = _ours(cluster, owner) if token is None else _filters({"client-token": token})
        if alive:
            filters += _filters({"instance-state-name": ("pending", "running", "stopping", "stopped")})
        reservations = self._pages("describe_instances", "Reservations", Filters=filters)
        return _instances(x for reservation in reservations for x in reservation["Instances"])

    def has_profile(self, name: str) -> bool | None:
        """Whether there is an instance profile of this name; None where one may not ask."""
        try:
            self.call("iam", "get_instance_profile", InstanceProfileName=name)
        except CallFailed as error:
            if error.verdict not in ("missing", "denied"):
                raise
            return None if error.verdict == "denied" else False
        return True

    def leftovers(self, owner: str | None = None, cluster: str | None = None) -> list[Thing]:
        """What carries our tags and is no machine nor part of one, in the order in which it can be removed. Of living
        clusters too: what is left over is what no machine of `instances` belongs to."""
        def ours(operation: str, key: str, **states: str) -> list[dict[str, Any]]:
            return self._call(operation, Filters=_ours(cluster, owner) + _filters(states))[key]
        return [
            *(_thing("spot request", x["SpotInstanceRequestId"], x)
              for x in ours("describe_spot_instance_requests", "SpotInstanceRequests", state="open")),
            *(_thing("volume", x["VolumeId"], x) for x in ours("describe_volumes", "Volumes", status="available")),
            *(_thing("address", x["AllocationId"], x) for x in ours("describe_addresses", "Addresses")),
            *(_thing("placement group", x["GroupName"], x)
              for x in ours("describe_placement_groups", "PlacementGroups", state="available")),
            *(_thing("security group", x["GroupId"], x) for x in ours("describe_security_groups", "SecurityGroups")),
            *(_thing("role", name, {"Tags": tags}) for name, tags in self._roles(owner, cluster)),
        ]

    def key_pair(self, owner: str) -> str | None:
        """The key pair by which ncluster knows whose a machine is: `ncluster kill` passes over others, and fails at one
        without any. None where the owner has none, or we are not told."""
        name = f"ncluster-{owner}"
        try:
            found = self._call("describe_key_pairs", Filters=_filters({"key-name": name}))["KeyPairs"]
        except CallFailed:
            return None                           # the launch needs none
        return name if found else None

    # --- acts ---

    def run_instances(self, request: dict[str, Any]) -> list[Instance]:
        """Sent once. After CallFailed with `unreachable` or `throttled` the machines may be there all the same: send
        the same request, with its token, again, or look for the token."""
        return _instances(self._call("run_instances", on=self._once, **request)["Instances"])

    def terminate(self, ids: Iterable[str]) -> list[str]:
        """Returns those EC2 does not know: gone long ago, or made so lately that they are not visible yet."""
        ids = list(ids)
        try:
            if ids:
                self._call("terminate_instances", InstanceIds=ids)
        except CallFailed as error:
            if error.verdict != "missing":
                raise
            if len(ids) == 1:
                return ids
            return [unknown for one in ids for unknown in self.terminate([one])]     # one unknown id stops them all
        return []

    def stop_instances(self, ids: Iterable[str]) -> None:
        self._call("stop_instances", InstanceIds=list(ids))

    def start_instances(self, ids: Iterable[str]) -> None:
        self._call("start_instances", InstanceIds=list(ids))

    def security_group(self, name: str, vpc: str, cidr: str, tags: Mapping[str, str],
                       doors: Collection[int] = ()) -> str:
        """The id of the group `name`, made where it is missing. Its rules become these and no others: SSH from `cidr`,
        everything among its members (EFA needs both directions by name of the group), everything outwards; of UDP
        ports those of `doors` stay open."""
        try:
            group = self._call("create_security_group", GroupName=name, VpcId=vpc,
                               Description=f"Machines of {tags[CLUSTER]}",
                               TagSpecifications=_tag_specification("security-group", tags))["GroupId"]
        except CallFailed as error:
            if error.verdict != "duplicate":
                raise
            group = None
        found = self._visible("describe_security_groups", "SecurityGroups",
                              Filters=_filters({"group-name": name, "vpc-id": vpc}))
        if OWNER not in _tags(found):
            raise Refused(f"There is a security group {name} ({found['GroupId']}) in {vpc} that is not ours. Remove "
                          f"it, or choose another --name")
        group = group or found["GroupId"]
        everyone = ("-1", -1, -1, "group", group)
        opened = {rule for permission in found["IpPermissions"] for rule in _rules(permission)
                  if rule[0] == "udp" and rule[1] in doors}
        self._make_equal(group, found["IpPermissions"], {("tcp", 22, 22, "cidr", cidr), everyone} | opened,
                         "authorize_security_group_ingress", "revoke_security_group_ingress")
        self._make_equal(group, found["IpPermissionsEgress"], {("-1", -1, -1, "cidr", "0.0.0.0/0"), everyone},
                         "authorize_security_group_egress", "revoke_security_group_egress")
        return group

    def doors(self, owner: str, cluster: str | None = None) -> list[Door]:
        """The open ones, by what their rules say they are for."""
        groups = self._call("describe_security_groups", Filters=_ours(cluster, owner))["SecurityGroups"]
        return [Door(group["GroupId"], _tags(group).get(CLUSTER, ""), permission["FromPort"], entry["CidrIp"])
                for group in groups for permission in group["IpPermissions"] if permission["IpProtocol"] == "udp"
                for entry in permission["IpRanges"] if entry.get("Description") == DOOR]

    def door(self, owner: str, cluster: str, port: int, cidr: str) -> Door:
        """For `open_door`. Raises Refused where the cluster has no group."""
        groups = self._call("describe_security_groups", Filters=_ours(cluster, owner))["SecurityGroups"]
        if not groups:
            raise Refused(f"{cluster} has no security group of its own, in which a port could be opened")
        return Door(groups[0]["GroupId"], cluster, port, cidr)

    def open_door(self, door: Door) -> None:
        with _but_for("duplicate"):
            self._call("authorize_security_group_ingress", GroupId=door.group, IpPermissions=[_permission_of(door)])

    def close_door(self, door: Door) -> None:
        """One that is closed already is fine."""
        with _but_for("missing"):
            self._call("revoke_security_group_ingress", GroupId=door.group, IpPermissions=[_permission_of(door)])

    def placement_group(self, name: str, tags: Mapping[str, str]) -> str:
        """Its name. Machines of it are near one another: full bandwidth for a single flow, and EFA."""
        with _but_for("duplicate"):
            self._call("create_placement_group", GroupName=name, Strategy="cluster",
                       TagSpecifications=_tag_specification("placement-group", tags))
        return name

    def role(self, name: str, path: str, trust: Mapping[str, Any], policy: Mapping[str, Any],
             tags: Mapping[str, str]) -> str:
        """The instance profile `name`, whose role of the same name may do what `policy` says and no more. EC2 may take
        some seconds until it knows a new one: RunInstances then fails with `missing`."""
        iam = self._client("iam")
        with _but_for("duplicate"):
            self._call("create_role", on=iam, RoleName=name, Path=path, AssumeRolePolicyDocument=json.dumps(trust),
                       Tags=_tag_list({**tags, REGION: self.region}))
        self._patiently("put_role_policy", on=iam, RoleName=name, PolicyName=name, PolicyDocument=json.dumps(policy))
        with _but_for("duplicate"):
            self._call("create_instance_profile", on=iam, InstanceProfileName=name, Path=path)
        with _but_for("quota"):                   # it has its one role already
            self._patiently("add_role_to_instance_profile", on=iam, InstanceProfileName=name, RoleName=name)
        return name

    def address(self, instance_id: str, tags: Mapping[str, str]) -> str:
        """A public address for a running machine that came without one: the cluster's own where it has one already."""
        machine = self._visible("describe_instances", "Reservations", InstanceIds=[instance_id])["Instances"][0]
        primary = next(x["NetworkInterfaceId"] for x in machine["NetworkInterfaces"]
                       if x["Attachment"]["DeviceIndex"] == 0 and not x["Attachment"].get("NetworkCardIndex"))
        held = self._call("describe_addresses", Filters=_ours(tags[CLUSTER], tags[OWNER]))["Addresses"]
        for address in held:
            if address.get("NetworkInterfaceId") == primary:
                return address["PublicIp"]
        free = next((address for address in held if not address.get("AssociationId")), None)
        if free is None:                          # once: a repeat would be a second one
            free = self._call("allocate_address", on=self._once, Domain="vpc",
                              TagSpecifications=_tag_specification("elastic-ip", tags))
        self._patiently("associate_address", AllocationId=free["AllocationId"], NetworkInterfaceId=primary)
        return free["PublicIp"]

    def remove(self, thing: Thing) -> None:
        """What is gone already is fine. CallFailed with `busy`: something still uses it, ask again later."""
        if thing.what == "role":
            self._remove_role(thing.id)
            return
        operation, name = {
            "spot request": ("cancel_spot_instance_requests", "SpotInstanceRequestIds"),
            "volume": ("delete_volume", "VolumeId"),
            "address": ("release_address", "AllocationId"),
            "placement group": ("delete_placement_group", "GroupName"),
            "security group": ("delete_security_group", "GroupId"),
        }[thing.what]
        with _but_for("missing"):
            self._call(operation, **{name: [thing.id] if name.endswith("Ids") else thing.id})

    # --- other services ---

    def call(self, service: str, operation: str, **arguments: Any) -> dict[str, Any]:
        return self._call(operation, on=self._client(service), **arguments)

    def pages(self, service: str, operation: str, key: str, **arguments: Any) -> list[dict[str, Any]]:
        return self._pages(operation, key, on=self._client(service), **arguments)

    # --- below ---

    def _roles(self, owner: str | None, cluster: str | None) -> Iterator[tuple[str, list[dict[str, str]]]]:
        """Name and tags of those of this region. Who may not list them has made none."""
        try:
            there = self.pages("iam", "list_roles", "Roles", PathPrefix=role_path(owner, cluster))
        except CallFailed as error:
            if error.verdict != "denied":
                raise
            return
        for role in there:
            listed: list[dict[str, str]] = []
            with _but_for("missing"):             # gone meanwhile
                listed = self.call("iam", "list_role_tags", RoleName=role["RoleName"])["Tags"]
            tags = _tags({"Tags": listed})
            if tags.get(REGION) == self.region and cluster in (None, tags.get(CLUSTER)):
                yield role["RoleName"], listed

    def _remove_role(self, name: str) -> None:
        """The role itself last: by it the rest is found."""
        profile, role = {"InstanceProfileName": name}, {"RoleName": name}
        for operation, arguments in (("remove_role_from_instance_profile", profile | role),
                                     ("delete_instance_profile", profile),
                                     ("delete_role_policy", role | {"PolicyName": name}), ("delete_role", role)):
            with _but_for("missing"):
                self.call("iam", operation, **arguments)

    def _make_equal(self, group: str, permissions: list[dict[str, Any]], wanted: set[Rule], allow: str,
                    forbid: str) -> None:
        there = {rule for permission in permissions for rule in _rules(permission)}
        if new := wanted - there:                 # first, so that a change of address locks nobody out
            with _but_for("duplicate"):
                self._patiently(allow, GroupId=group, IpPermissions=[_permission(rule) for rule in sorted(new)])
        if old := there - wanted:
            with _but_for("missing"):
                self._call(forbid, GroupId=group, IpPermissions=[_permission(rule) for rule in sorted(old)])

    def _call(self, operation: str, *, on: Any = None, **arguments: Any) -> dict[str, Any]:
        with classified(operation):
            return getattr(on or self._ec2, operation)(**arguments)

    def _pages(self, operation: str, key: str, *, on: Any = None, **arguments: Any) -> list[dict[str, Any]]:
        with classified(operation):
            pages = (on or self._ec2).get_paginator(operation).paginate(**arguments)
            return [item for page in pages for item in page.get(key, [])]

    def _patiently(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """For what refers to something just made: EC2 may not know it everywhere yet."""
        for pause_s in VISIBLE_S:
            with _but_for("missing"):
                return self._call(operation, **arguments)
            self._sleep(pause_s)
        return self._call(operation, **arguments)

    def _visible(self, operation: str, key: str, **arguments: Any) -> dict[str, Any]:
        """The first that is listed, once it is."""
        for pause_s in (*VISIBLE_S, 0):
            if listed := self._patiently(operation, **arguments)[key]:
                return listed[0]
            self._sleep(pause_s)
        raise CallFailed(operation, "NotListed", f"{arguments} does not appear, though EC2 says that it exists",
                         "missing")


Rule = tuple[str, int, int, str, str]             # protocol, from, to, one of SOURCES, its value
SOURCES = {"cidr": ("IpRanges", "CidrIp"), "cidr6": ("Ipv6Ranges", "CidrIpv6"),
           "list": ("PrefixListIds", "PrefixListId"), "group": ("UserIdGroupPairs", "GroupId")}


def _interfaces(kind: Type, count: int, subnet: str, group: str) -> list[dict[str, Any]]:
    """EFA where machines talk to one another: card 0 also carries IP, the others only EFA."""
    common = {"SubnetId": subnet, "Groups": [group], "DeleteOnTermination": True}
    if count == 1 or kind.efa == 0:
        return [{"DeviceIndex": 0, "AssociatePublicIpAddress": True, **common}]
    if kind.efa == 1:
        return [{"DeviceIndex": 0, "InterfaceType": "efa", "AssociatePublicIpAddress": True, **common}]
    return [{"NetworkCardIndex": card, "DeviceIndex": min(card, 1), "InterfaceType": "efa-only" if card else "efa",
             **common} for card in range(min(kind.efa, kind.cards))]


def _type(raw: dict[str, Any]) -> Type:
    gpus = [gpu for gpu in raw.get("GpuInfo", {}).get("Gpus", []) if gpu["Manufacturer"] == "NVIDIA"]
    network, gib = raw["NetworkInfo"], 2 ** 30
    return Type(
        name=raw["InstanceType"],
        cores=raw["VCpuInfo"]["DefaultVCpus"],
        memory_gib=raw["MemoryInfo"]["SizeInMiB"] / 1024,
        gpus=sum(gpu["Count"] for gpu in gpus),
        gpu=gpus[0]["Name"] if gpus else None,
        gpu_memory_gib=gpus[0]["MemoryInfo"]["SizeInMiB"] / 1024 if gpus else 0,
        arch="arm64" if "arm64" in raw["ProcessorInfo"]["SupportedArchitectures"] else "x86_64",
        efa=network.get("EfaInfo", {}).get("MaximumEfaInterfaces", 0),
        cards=network.get("MaximumNetworkCards", 1),
        nvme_gib=raw.get("InstanceStorageInfo", {}).get("TotalSizeInGB", 0) * 1e9 // gib,
        spot="spot" in raw["SupportedUsageClasses"])


def _instances(raw: Iterable[dict[str, Any]]) -> list[Instance]:
    return sorted((Instance(
        id=x["InstanceId"], node=x["AmiLaunchIndex"], state=x["State"]["Name"], kind=x["InstanceType"],
        market="spot" if x.get("InstanceLifecycle") == "spot" else "ondemand",
        zone=x["Placement"]["AvailabilityZone"], private=x.get("PrivateIpAddress", ""),
        public=x.get("PublicIpAddress") or None, launched=x["LaunchTime"].timestamp(), tags=_tags(x),
        token=x.get("ClientToken", "")) for x in raw), key=lambda x: (x.launched, x.node, x.id))


def _thing(what: Any, id: str, raw: dict[str, Any]) -> Thing:
    tags = _tags(raw)
    return Thing(what, id, tags.get(CLUSTER, ""), expires(tags), billable=what in ("volume", "address"))


def _is_public(subnet: str, tables: list[dict[str, Any]]) -> bool:
    """By its route table, which is the VPC's main one where it has none of its own."""
    own = [t for t in tables if any(a.get("SubnetId") == subnet for a in t["Associations"])]
    main = [t for t in tables if any(a.get("Main") for a in t["Associations"])]
    return any(route.get("DestinationCidrBlock") == "0.0.0.0/0" and route.get("GatewayId", "").startswith("igw-")
               for table in own or main for route in table["Routes"])


def _rules(permission: dict[str, Any]) -> Iterator[Rule]:
    ports = permission["IpProtocol"], permission.get("FromPort", -1), permission.get("ToPort", -1)
    for source, (key, value) in SOURCES.items():
        for entry in permission.get(key, []):
            yield (*ports, source, entry[value])


def _permission(rule: Rule) -> dict[str, Any]:
    protocol, low, high, source, value = rule
    key, name = SOURCES[source]
    ports = {} if protocol == "-1" else {"FromPort": low, "ToPort": high}
    return {"IpProtocol": protocol, **ports, key: [{name: value}]}


def _permission_of(door: Door) -> dict[str, Any]:
    return {"IpProtocol": "udp", "FromPort": door.port, "ToPort": door.port,
            "IpRanges": [{"CidrIp": door.cidr, "Description": DOOR}]}


def _filters(values: Mapping[str, str | tuple[str, ...]]) -> list[dict[str, Any]]:
    return [{"Name": name, "Values": [value] if isinstance(value, str) else list(value)}
            for name, value in values.items()]


def _ours(cluster: str | None, owner: str | None) -> list[dict[str, Any]]:
    named = {f"tag:{tag}": value for tag, value in ((CLUSTER, cluster), (OWNER, owner)) if value is not None}
    return _filters(named or {"tag-key": CLUSTER})


def _tags(raw: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in raw.get("Tags", [])}


def _tag_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def _tag_specification(what: str, tags: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"ResourceType": what, "Tags": _tag_list(tags)}]


@contextlib.contextmanager
def _but_for(verdict: Verdict) -> Iterator[None]:
    try:
        yield
    except CallFailed as error:
        if error.verdict != verdict:
            raise


def _refused_by_aws(action: str, response: dict[str, Any]) -> CallFailed:
    code, status = response["Error"].get("Code", ""), response["ResponseMetadata"].get("HTTPStatusCode", 400)
    said = re.split(r"\s*Encoded authorization failure", response["Error"].get("Message", ""))[0]
    unseen = code == "InvalidParameterValue" and "Invalid IAM Instance Profile" in said      # one just made, at times
    return CallFailed(action, code, " ".join(said.split()), "missing" if unseen else verdict_of(code, status))


def _no_entry(error: CallFailed, session: Any) -> str:
    """Why the first call, who am I, failed."""
    profile = session.profile_name
    if error.code == "NoCredentialsError":
        return ("No AWS credentials. Set them up by `aws configure` or `aws sso login`, name a profile by AWS_PROFILE, "
                "or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if error.verdict == "expired":
        return (f"The AWS credentials of profile {profile!r} have expired or cannot be renewed: {error.said}\n"
                f"Sign in again:  aws sso login --profile {profile}   (or renew the keys)")
    if error.verdict == "unreachable":
        regions = session.get_available_regions("ec2")
        unknown = f" {session.region_name!r} is not a region that boto3 knows." + nearest(
            session.region_name, regions) if session.region_name not in regions else ""
        return f"AWS does not answer: {error.said}.{unknown} Check the network and --region"
    return (f"AWS does not accept the credentials of profile {profile!r} in {session.region_name}: {error.code}: "
            f"{error.said}\nAre they active, and is the region enabled for the account?")


def _is_loopback(url: str | None) -> bool:
    host = urlsplit(url or "").hostname or ""
    return host == "localhost" or host.startswith("127.")
