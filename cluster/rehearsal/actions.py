"""EC2's actions where moto is kinder than EC2, or silent: each does what EC2's documentation says of it.

Named as moto wants them, one method an action. What is not here is moto's own.
"""
from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import time
from datetime import datetime, timezone
from typing import Any

from moto.core.responses import ActionResult, EmptyResult
from moto.ec2.models.amis import Ami
from moto.ec2.models.core import TaggedEC2Resource
from moto.ec2.models.instance_types import INSTANCE_TYPES
from moto.ec2.responses import EC2Response
from moto.ec2.utils import convert_tag_spec, filter_dict_attribute_mapping, random_id

from cluster.rehearsal.roles import profile_named
from cluster.rehearsal.world import Machine, Refusal, World, kinds_of, offered, on_demand, price

IMAGES = {"/aws/service/deeplearning/ami/": "898082745236", "/aws/service/canonical/": "099720109477",
          "/aws/service/ami-amazon-linux-latest/": "137112412989"}
PAGE = 100                                        # products of a price list in one reply, at most
USER_DATA_LIMIT = 16384                           # bytes, before base64
UNSUPPORTED = "The requested configuration is currently not supported. Please check the documentation for supported " \
              "configurations."

# moto keeps these of an instance, and filters by them once told so.
filter_dict_attribute_mapping.setdefault("client-token", "client_token")
filter_dict_attribute_mapping.setdefault("instance-lifecycle", "lifecycle")
filter_dict_attribute_mapping.setdefault("placement-group-name", "placement.group_name")


class Actions(EC2Response):
    world: World                                  # both set on the subclass that serves one bench
    groups: dict[str, PlacementGroup]
    launches: dict[str, tuple[str, Any]]          # by ClientToken: digest of the parameters, reservation

    def call_action(self) -> Any:
        """Dry runs of anything, and names of machines that nobody was told of yet, before the action itself."""
        for id in self._ids():
            machine = self.world.machines.get(id)
            if machine is None or not self.world.visible(machine):
                raise _no_instance(id)
        if self._get_bool_param("DryRun") and self._get_action() != "RunInstances":
            raise _dry_run()
        return super().call_action()

    # --- machines ---

    def run_instances(self) -> ActionResult:
        token = self._get_param("ClientToken")
        asked = hashlib.sha256(repr(sorted((key, value) for key, value in self.querystring.items()
                                           if key != "ClientToken")).encode()).hexdigest()
        if token in self.launches:
            before, reservation = self.launches[token]
            if before != asked:
                raise Refusal("IdempotentParameterMismatch", f"The client token {token} was used before, with other "
                                                             f"parameters.")
            return ActionResult(reservation)
        if str(self._get_param("ImageId", "")).startswith("resolve:ssm:"):
            self.params["ImageId"] = self.public_image(self._get_param("ImageId").removeprefix("resolve:ssm:"))
        if len(user_data := base64.b64decode(self._get_param("UserData", ""))) > USER_DATA_LIMIT:
            raise Refusal("InvalidParameterValue", f"User data is limited to {USER_DATA_LIMIT} bytes")
        self._check_image()
        self._check_interfaces()
        self._check_profile()
        market = self._get_param("InstanceMarketOptions.MarketType") or "ondemand"
        zone, count = self._zone(market), self._room(market)
        if self._get_bool_param("DryRun"):
            raise _dry_run()
        self.params["MinCount"] = count
        if not self._get_param("SubnetId") and not self._get_param("NetworkInterfaces"):
            self.params.setdefault("Placement", {})["AvailabilityZone"] = zone
        super().run_instances()
        reservation = list(self.ec2_backend.reservations.values())[-1]
        for instance in reservation.instances:
            self._complete(instance, market, user_data.decode())
        if token:
            self.launches[token] = asked, reservation
        return ActionResult(reservation)

    def describe_instances(self) -> ActionResult:
        hidden = {machine.id for machine in self.world.machines.values() if not self.world.visible(machine)}
        result: Any = super().describe_instances().result
        for reservation in result["Reservations"]:            # copies, so nothing is lost
            reservation.instances = [x for x in reservation.instances if x.id not in hidden]
        result["Reservations"] = [x for x in result["Reservations"] if x.instances]
        return ActionResult(result)

    def terminate_instances(self) -> ActionResult:
        before = [(machine, machine.instance.instance_state) for machine in self._machines()]
        for machine, _ in before:
            self.world.end(machine)
        return _changes("TerminatingInstances", before)

    def stop_instances(self) -> ActionResult:
        before = [(machine, machine.instance.instance_state) for machine in self._machines()]
        for machine, state in before:
            if machine.market == "spot":
                raise Refusal("UnsupportedOperation", f"You can't stop the Spot Instance '{machine.id}' because it is "
                                                      f"associated with a one-time Spot Instance request.")
            if state.name not in ("running", "stopping", "stopped"):
                raise _wrong_state(machine, "stopped")
        for machine, state in before:
            if state.name == "running":
                self.world.stop(machine)
        return _changes("StoppingInstances", before)

    def start_instances(self) -> ActionResult:
        before = [(machine, machine.instance.instance_state) for machine in self._machines()]
        for machine, state in before:
            if state.name not in ("pending", "running", "stopped"):
                raise _wrong_state(machine, "started")
        for machine, state in before:
            if state.name == "stopped":
                self.world.start(machine)
        return _changes("StartingInstances", before)

    def reboot_instances(self) -> ActionResult:
        machines = self._machines()
        for machine in machines:
            if machine.state != "running":
                raise _wrong_state(machine, "rebooted")
        for machine in machines:
            self.world.reboot(machine)
        return EmptyResult()

    # --- what belongs to machines ---

    def create_placement_group(self) -> ActionResult:
        name = self._get_param("GroupName")
        if name in self.groups:
            raise Refusal("InvalidPlacementGroup.Duplicate", f"The placement group '{name}' already exists.")
        group = PlacementGroup(self.ec2_backend, name, self._get_param("Strategy", "cluster"))
        group.add_tags(self._tags("placement-group"))
        self.groups[name] = group
        return ActionResult({"PlacementGroup": group})

    def describe_placement_groups(self) -> ActionResult:
        names, ids = self._get_param("GroupNames", []), self._get_param("GroupIds", [])
        for name in names:
            self._group(name)
        found = [group for group in self.groups.values() if (not names or group.group_name in names)
                 and (not ids or group.id in ids) and group.matches(self._filters_from_querystring())]
        return ActionResult({"PlacementGroups": found})

    def delete_placement_group(self) -> ActionResult:
        name = self._group(self._get_param("GroupName")).group_name
        if any(machine.instance.placement.group_name == name and machine.state != "terminated"
               for machine in self.world.machines.values()):
            raise Refusal("InvalidPlacementGroup.InUse",
                          f"The placement group {name} is in use and may not be deleted.")
        del self.groups[name]
        return EmptyResult()

    def delete_security_group(self) -> Any:
        backend, id = self.ec2_backend, self._get_param("GroupId")
        group = backend.get_security_group_from_id(id) if id else \
            backend.get_security_group_from_name(self._get_param("GroupName"))
        if group and any(group in eni.group_set for eni in backend.enis.values()):
            raise Refusal("DependencyViolation", f"resource {group.id} has a dependent object")
        return super().delete_security_group()

    def allocate_address(self) -> ActionResult:
        if len(self.ec2_backend.addresses) >= self.world.address_limit:
            raise Refusal("AddressLimitExceeded", "The maximum number of addresses has been reached.")
        self.params["Domain"], self.params["Address"] = "vpc", self.world.elastic.take()
        return super().allocate_address()

    def associate_address(self) -> ActionResult:
        nic = self._get_param("NetworkInterfaceId")
        machine = self.world.machines.get(self._get_param("InstanceId")) or next(
            (m for m in self.world.machines.values() if nic in [x.id for x in m.instance.nics.values()]), None)
        if machine and machine.state not in ("running", "stopped"):
            raise Refusal("InvalidInstanceID", f"The {machine.state} instance '{machine.id}' is not in a valid state "
                                               f"for this operation.")
        if machine and not nic and len(machine.instance.nics) > 1:
            raise Refusal("InvalidInstanceID", f"There are multiple interfaces attached to instance '{machine.id}'. "
                                               f"Please specify an interface ID for the operation instead.")
        if machine and machine.public:                        # what it had is gone, also where this is repeated
            for address in self.ec2_backend.address_by_ip([machine.public], fail_if_not_found=False):
                self.ec2_backend.disassociate_address(address=address.public_ip)
        result = super().associate_address()
        if machine:
            self.world.moved(machine)
        return result

    def disassociate_address(self) -> ActionResult:
        named = self._get_param("AssociationId"), self._get_param("PublicIp")
        machines = [self.world.machines[address.eni.instance.id] for address in self.ec2_backend.addresses
                    if address.eni and address.eni.instance and {address.association_id, address.public_ip} & {*named}]
        result = super().disassociate_address()
        for machine in machines:
            self.world.moved(machine)
        return result

    def release_address(self) -> ActionResult:
        id = self._get_param("AllocationId")
        for address in self.ec2_backend.addresses:
            if address.allocation_id == id and address.association_id:
                raise Refusal("InvalidIPAddress.InUse", f"The address {address.public_ip} is in use.")
        return super().release_address()

    # --- the market and its goods ---

    def get_spot_placement_scores(self) -> ActionResult:
        """9 where there is room for all of them, else 1; EC2 says that its own are no promise either."""
        kinds, target = self._get_param("InstanceTypes", []), self._get_int_param("TargetCapacity")
        ids = {zone.name: zone.zone_id for zone in self.ec2_backend.describe_availability_zones()}
        scores = {zone: 9 if self.world.room("spot", zone) >= target else 1
                  for kind in kinds for zone in offered(kind, self.region)}
        if not self._get_bool_param("SingleAvailabilityZone"):
            return ActionResult({"SpotPlacementScores": [{"Region": self.region, "Score": max(scores.values())}]
                                 if scores else []})
        return ActionResult({"SpotPlacementScores": [{"Region": self.region, "AvailabilityZoneId": ids[zone],
                                                      "Score": score} for zone, score in scores.items()]})

    def describe_spot_price_history(self) -> ActionResult:
        zones = self._get_param("AvailabilityZone") or ",".join(
            self._filters_from_querystring().get("availability-zone", []))
        return ActionResult({"SpotPriceHistory": [
            {"InstanceType": kind, "ProductDescription": "Linux/UNIX", "AvailabilityZone": zone,
             "SpotPrice": f"{price(kind, 'spot', zone):.6f}", "Timestamp": datetime.now(timezone.utc)}
            for kind in self._get_param("InstanceTypes", []) if kind in INSTANCE_TYPES
            for zone in offered(kind, self.region) if not zones or zone in zones.split(",")]})

    def describe_images(self) -> ActionResult:
        owners = [self.current_account if x == "self" else x for x in self._get_param("Owners", [])]
        found: Any = super().describe_images().result                 # moto: of anybody, once they are named
        return ActionResult({"Images": [x for x in found["Images"]
                                        if not owners or {x.owner_id, x.owner_alias} & {*owners}]})

    def public_image(self, name: str) -> str:
        """The image behind a public SSM parameter: any name under IMAGES has one, registered when first asked for."""
        backend = self.ec2_backend
        id = "ami-" + hashlib.sha256(name.encode()).hexdigest()[:17]
        if id not in backend.amis:
            owner = next((owner for prefix, owner in IMAGES.items() if name.startswith(prefix)), None)
            if owner is None:
                raise Refusal("InvalidParameterValue", f"The parameter {name} is not known.")
            backend.amis[id] = Ami(
                backend, id, name=name.strip("/").replace("/", "-"), description="of a rehearsal", owner_id=owner,
                owner_alias="amazon", public=True, virtualization_type="hvm", root_device_type="ebs",
                architecture="arm64" if "arm64" in name else "x86_64", region_name=f"{self.region}a")
        return id

    # --- private ---

    def _ids(self) -> list[str]:
        """Every instance that the request names outside of filters."""
        ids = [*self._get_param("InstanceIds", []), self._get_param("InstanceId"), *self._get_param("Resources", [])]
        return [id for id in ids if isinstance(id, str) and id.startswith("i-")]

    def _machines(self) -> list[Machine]:
        return [self.world.machines[id] for id in self._ids()]

    def _tags(self, what: str) -> dict[str, str]:
        return convert_tag_spec(self._get_param("TagSpecifications", [])).get(what, {})

    def _group(self, name: str) -> PlacementGroup:
        if name not in self.groups:
            raise Refusal("InvalidPlacementGroup.Unknown", f"The Placement Group '{name}' is unknown.")
        return self.groups[name]

    def _check_image(self) -> None:
        image, kind = self._get_param("ImageId", ""), self._get_param("InstanceType", "m1.small")
        if not image.startswith("ami-"):
            raise Refusal("InvalidAMIID.Malformed", f'Invalid id: "{image}" (expecting "ami-...")')
        if image not in self.ec2_backend.amis:
            raise Refusal("InvalidAMIID.NotFound", f"The image id '[{image}]' does not exist")
        if kind not in INSTANCE_TYPES:
            raise Refusal("InvalidParameterValue", f"Invalid value '{kind}' for InstanceType.")
        key = self._get_param("KeyName")
        if key and key not in self.ec2_backend.key_pairs:
            raise Refusal("InvalidKeyPair.NotFound", f"The key pair '{key}' does not exist")
        ami = self.ec2_backend.amis[image]
        if ami.architecture not in INSTANCE_TYPES[kind]["ProcessorInfo"]["SupportedArchitectures"]:
            raise Refusal("InvalidParameterValue", f"The architecture '{ami.architecture}' of the specified instance "
                                                   f"type does not match the architecture of the specified AMI.")
        for mapping in self._get_param("BlockDeviceMappings", []):
            size, least = mapping.get("Ebs", {}).get("VolumeSize"), ami.ebs_snapshot.volume.size
            if mapping.get("DeviceName") == ami.root_device_name and size and size < least:
                raise Refusal("InvalidBlockDeviceMapping", f"Volume of size {size}GB is smaller than snapshot "
                                                           f"'{ami.ebs_snapshot.id}', expect size>= {least}GB")

    def _check_interfaces(self) -> None:
        kind, nics = self._get_param("InstanceType"), self._get_param("NetworkInterfaces", [])
        facts = INSTANCE_TYPES[kind]
        if len(nics) > 1 and any(nic.get("AssociatePublicIpAddress") for nic in nics):
            raise Refusal("InvalidParameterCombination", "The associatePublicIPAddress parameter cannot be specified "
                                                         "when launching with multiple network interfaces.")
        if nics and self._get_param("SecurityGroupIds", []):
            raise Refusal("InvalidParameterCombination", "Network interfaces and an instance-level security groups may "
                                                         "not be specified on the same request")
        efa = sum("efa" in nic.get("InterfaceType", "") for nic in nics)
        if efa > facts["NetworkInfo"].get("EfaInfo", {}).get("MaximumEfaInterfaces", 0):
            raise Refusal("AttachmentLimitExceeded", f"EFA interfaces count {efa} exceeds allowed limit for {kind}")
        if len(nics) > facts["NetworkInfo"]["MaximumNetworkInterfaces"]:
            raise Refusal("AttachmentLimitExceeded", f"Interface count {len(nics)} exceeds the limit for {kind}")
        for id in [x for nic in nics for x in nic.get("Groups", [])] + self._get_param("SecurityGroupIds", []):
            if self.ec2_backend.get_security_group_from_id(id) is None:
                raise Refusal("InvalidGroup.NotFound", f"The security group '{id}' does not exist")
        if name := self._get_param("Placement.GroupName"):
            strategy = self._group(name).strategy
            if strategy not in facts["PlacementGroupInfo"]["SupportedStrategies"]:
                raise Refusal("InvalidParameterCombination",
                              f"{strategy.capitalize()} placement groups are not supported by the '{kind}' instance "
                              f"type. Specify a supported instance type or change the placement group strategy, and "
                              f"try again.")

    def _check_profile(self) -> None:
        asked = self._get_param("IamInstanceProfile") or {}
        missed = bool(asked and self.world.profile_misses)
        self.world.profile_misses -= missed
        for name, value in asked.items():
            profile = profile_named(value.rpartition("/")[2])
            if profile is None or missed:
                raise Refusal("InvalidParameterValue", f"Value ({value}) for parameter iamInstanceProfile."
                              f"{name.lower()} is invalid. Invalid IAM Instance Profile {name.lower()}")

    def _zone(self, market: str) -> str:
        """Where the launch would be. Raises Unsupported where the type is not offered there."""
        kind, nics = self._get_param("InstanceType"), self._get_param("NetworkInterfaces", [])
        subnet = self._get_param("SubnetId") or next((nic["SubnetId"] for nic in nics if "SubnetId" in nic), None)
        zone = self.ec2_backend.get_subnet(subnet).availability_zone if subnet else \
            self._get_param("Placement.AvailabilityZone")
        fitting = offered(kind, self.region)
        if not fitting:
            raise Refusal("Unsupported", UNSUPPORTED)
        if zone is None:
            return max(fitting, key=lambda zone: self.world.room(market, zone))
        if zone not in fitting:
            raise Refusal("Unsupported", f"Your requested instance type ({kind}) is not supported in your requested "
                                         f"Availability Zone ({zone}). Please retry your request by not specifying an "
                                         f"Availability Zone or choosing {', '.join(fitting)}.")
        return zone

    def _room(self, market: str) -> int:
        """How many come: as many as there is room for up to MaxCount. Raises where that is less than MinCount."""
        least, most = (int(self._get_param(name, 1)) for name in ("MinCount", "MaxCount"))
        if not 1 <= least <= most:
            raise Refusal("InvalidParameterValue", f"MinCount {least} and MaxCount {most}: the minimum is at least 1 "
                                                   f"and the maximum not below it.")
        zone = self._zone(market)
        count = min(most, self.world.room(market, zone))
        if count < least:
            raise Refusal("InsufficientInstanceCapacity", f"We currently do not have sufficient "
                          f"{self._get_param('InstanceType')} capacity in the Availability Zone you requested "
                          f"({zone}). Our system will be working on provisioning additional capacity.", 500)
        return count

    def _complete(self, instance: Any, market: Any, user_data: str) -> None:
        """What moto leaves out of a new instance."""
        backend, nics = self.ec2_backend, self._get_param("NetworkInterfaces", [])
        # moto keeps one interface per device index, and a machine with several cards has several of index 1
        enis = [eni for eni in backend.enis.values() if eni.instance is instance]
        instance.nics = dict(enumerate(enis))
        private = ""
        for eni, asked in zip(enis, nics or [{}]):
            eni.interface_type = asked.get("InterfaceType", "interface")
            eni.delete_on_termination = asked.get("DeleteOnTermination", True)
            address = self.world.private.take(self.world.reuse_addresses)
            private = private or address
            eni.private_ip_address, eni.private_ip_addresses = address, [{"Primary": True, "PrivateIpAddress": address}]
            eni.add_tags(self._tags("network-interface"))
        wants_public = len(enis) == 1 and bool(enis[0].public_ip)
        enis[0].public_ip, enis[0].public_ip_auto_assign = None, False
        instance.placement.group_name = self._get_param("Placement.GroupName", "")
        instance.client_token = self._get_param("ClientToken", "")
        if market == "spot":
            instance.spot_instance_request_id = random_id("sir", 8)
        root = instance.root_device_name
        disks = {disk.get("DeviceName"): disk.get("Ebs", {}) for disk in self._get_param("BlockDeviceMappings", [])}
        if root in instance.block_device_mapping:
            instance.block_device_mapping[root].delete_on_termination = \
                disks.get(root, {}).get("DeleteOnTermination", True)
        if (profile := self._get_param("IamInstanceProfile")) and instance.ami_launch_index:     # moto: only the first
            backend.associate_iam_instance_profile(instance.id, profile.get("Name"), profile.get("Arn"))
        self.world.add(Machine(
            instance, market, user_data, efa=sum("efa" in eni.interface_type for eni in enis), private=private,
            wants_public=wants_public, made=time.monotonic(), launched=time.time(),
            profile=(profile.get("Name") or profile["Arn"].rpartition("/")[2]) if profile else None,
            public_key=backend.key_pairs[instance.key_name].public_key.strip() if instance.key_name else ""))


class PlacementGroup(TaggedEC2Resource):
    """With the names that moto's serializer looks for."""

    def __init__(self, backend: Any, name: str, strategy: str):
        self.ec2_backend, self.group_name, self.strategy, self.state = backend, name, strategy, "available"
        self.id = self.group_id = random_id("pg", 17)
        self.group_arn = f"arn:aws:ec2:{backend.region_name}:{backend.account_id}:placement-group/{name}"

    def matches(self, filters: Any) -> bool:
        return all(any(fnmatch.fnmatchcase(str(value), pattern) for pattern in patterns
                       for value in _list(self.get_filter_value(name))) for name, patterns in filters.items())


def price_list(body: dict[str, Any], region: str) -> dict[str, Any]:
    """pricing.GetProducts: a product for each kind of machine of the region that all filters fit, a page at a time."""
    wanted = {(x["Field"], x["Value"]) for x in body.get("Filters", [])}
    kinds = [kind for kind in kinds_of(region) if wanted <= _listed(kind, region).items()]
    first = int(body.get("NextToken", 0))
    end = first + body.get("MaxResults", PAGE)
    return {"FormatVersion": "aws_v1", "PriceList": [json.dumps({
        "product": {"productFamily": "Compute Instance", "sku": kind, "attributes": _listed(kind, region)},
        "serviceCode": "AmazonEC2",
        "terms": {"OnDemand": {f"{kind}.T": {"sku": kind, "priceDimensions": {f"{kind}.T.D": {
            "unit": "Hrs", "pricePerUnit": {"USD": f"{on_demand(kind):.10f}"}}}}}},
    }) for kind in kinds[first:end]]} | ({"NextToken": str(end)} if end < len(kinds) else {})


def _listed(kind: str, region: str) -> dict[str, str]:
    return {"instanceType": kind, "operatingSystem": "Linux", "tenancy": "Shared", "preInstalledSw": "NA",
            "capacitystatus": "Used", "marketoption": "OnDemand", "regionCode": region}


def _changes(key: str, before: list[tuple[Machine, Any]]) -> ActionResult:
    return ActionResult({key: [{"InstanceId": machine.id, "CurrentState": machine.instance.instance_state,
                                "PreviousState": state} for machine, state in before]})


def _dry_run() -> Refusal:
    return Refusal("DryRunOperation", "Request would have succeeded, but DryRun flag is set.", 412)


def _no_instance(id: str) -> Refusal:
    return Refusal("InvalidInstanceID.NotFound", f"The instance ID '{id}' does not exist")


def _wrong_state(machine: Machine, what: str) -> Refusal:
    return Refusal("IncorrectInstanceState",
                   f"The instance '{machine.id}' is not in a state from which it can be {what}.")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
