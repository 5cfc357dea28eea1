"""What the rehearsal's EC2 knows of its machines beyond moto: states that take time, addresses, room, prices."""
from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from moto.ec2.models.instance_types import INSTANCE_TYPE_OFFERINGS, INSTANCE_TYPES
from moto.ec2.models.instances import Instance, InstanceState, StateReason

from cluster.spec import Machines

PENDING, RUNNING, SHUTTING_DOWN, TERMINATED, STOPPING, STOPPED = (
    ("pending", 0), ("running", 16), ("shutting-down", 32), ("terminated", 48), ("stopping", 64), ("stopped", 80))
NEXT = {"pending": RUNNING, "shutting-down": TERMINATED, "stopping": STOPPED}
BY_USER = ("Client.UserInitiatedShutdown", "User initiated shutdown")
BY_ITSELF = ("Client.InstanceInitiatedShutdown", "Instance initiated shutdown")
BY_SPOT = ("Server.SpotInstanceTermination", "Spot instance termination")
SPOT_SHARE = 0.35                                 # a rehearsal's spot price over the on-demand price; made up
USD_PER_CORE = 0.05                               # on-demand price where the project's table has none; made up


class Refusal(Exception):
    """EC2 says no, with one of its own error codes."""

    def __init__(self, code: str, message: str, status: int = 400):
        super().__init__(message)
        self.code, self.message, self.status = code, message, status


@dataclass(eq=False)
class Machine:
    """An instance: moto's object, which EC2's replies are made of, and what moto does not keep."""
    instance: Any
    market: Literal["spot", "ondemand"]
    user_data: str
    efa: int                                      # network interfaces that speak EFA
    private: str
    wants_public: bool
    made: float                                   # time.monotonic()
    launched: float                               # unix time; travels back as the bench travels forward
    public_key: str = ""                          # of its key pair
    profile: str | None = None                    # name of its instance profile
    ended: float | None = None
    due: float | None = None                      # time.monotonic() of the next change of state
    powered: bool = False

    @property
    def id(self) -> str:
        return self.instance.id

    @property
    def node(self) -> int:
        return self.instance.ami_launch_index

    @property
    def kind(self) -> str:
        return self.instance.instance_type

    @property
    def zone(self) -> str:
        return self.instance.placement.zone

    @property
    def state(self) -> str:
        return self.instance.state

    @property
    def public(self) -> str | None:
        """The address it is reached at from outside, its own or an elastic one."""
        return self.instance.public_ip

    @property
    def addresses(self) -> list[str]:
        return [self.private] + ([self.public] if self.public else [])

    @property
    def tags(self) -> dict[str, str]:
        return {tag["key"]: tag["value"] for tag in self.instance.get_tags()}


class Power(Protocol):
    """What stands behind the machines. Called with the world locked, so none of it may wait for long."""
    def made(self, machine: Machine) -> None: ...
    def on(self, machine: Machine) -> None: ...
    def off(self, machine: Machine) -> None: ...
    def reboot(self, machine: Machine) -> None: ...
    def moved(self, machine: Machine) -> None:
        """Its addresses changed."""
    def asked(self) -> Iterable[tuple[str, str]]:
        """Machines (ids) that asked for "off" or "reboot" themselves since the last call."""


class NoPower:
    """Machines that are records only."""
    def made(self, machine: Machine) -> None: pass
    def on(self, machine: Machine) -> None: pass
    def off(self, machine: Machine) -> None: pass
    def reboot(self, machine: Machine) -> None: pass
    def moved(self, machine: Machine) -> None: pass
    def asked(self) -> Iterable[tuple[str, str]]: return ()


@dataclass
class Addresses:
    """Loopback addresses 127.OCTET.x.y. x begins with the process, so that rehearsals side by side seldom meet."""
    octet: int
    taken: int = 0
    free: list[str] = field(default_factory=list)

    def take(self, reuse: bool = False) -> str:
        if reuse and self.free:
            return self.free.pop(0)
        x, y = divmod(self.taken, 250)
        self.taken += 1
        return f"127.{self.octet}.{(os.getpid() + x) % 250}.{y + 1}"


class World:
    """Settings first: they may be changed at any time. `capacity` is how many machines a market has room for in a zone,
    all launches together; what is not in it is plenty."""

    def __init__(self, power: Power):
        self.capacity: dict[tuple[str, str], int] = {}
        self.boot_s = 0.3
        self.shutdown_s = 0.3
        self.hidden_s = 0.0                       # how long a new machine is unknown to all other calls
        self.profile_misses = 0                   # how many RunInstances will not know their instance profile yet
        self.address_limit = 5                    # EC2's default quota of elastic addresses
        self.reuse_addresses = False              # of machines that are gone, as EC2 does
        self.machines: dict[str, Machine] = {}
        self.private, self.public, self.elastic = Addresses(16), Addresses(32), Addresses(48)
        self._power = power

    def add(self, machine: Machine) -> None:
        self.machines[machine.id] = machine
        self._enter(machine, PENDING, self.boot_s)
        self._power.made(machine)

    def visible(self, machine: Machine) -> bool:
        return time.monotonic() >= machine.made + self.hidden_s

    def room(self, market: str, zone: str) -> int:
        used = sum((m.market, m.zone) == (market, zone) and m.state not in ("terminated", "stopped")
                   for m in self.machines.values())
        return self.capacity.get((market, zone), 10_000) - used

    def end(self, machine: Machine, reason: tuple[str, str] = BY_USER) -> None:
        """Terminate it; nothing happens where it is going already."""
        if machine.state in ("shutting-down", "terminated"):
            return
        machine.ended = time.time()
        self._because(machine, reason)
        self._enter(machine, SHUTTING_DOWN, self.shutdown_s)

    def reclaim(self, machine: Machine) -> None:
        self.end(machine, BY_SPOT)

    def stop(self, machine: Machine, reason: tuple[str, str] = BY_USER) -> None:
        self._because(machine, reason)
        self._enter(machine, STOPPING, self.shutdown_s)

    def start(self, machine: Machine) -> None:
        self._because(machine, ("", ""))
        self._enter(machine, PENDING, self.boot_s)

    def reboot(self, machine: Machine) -> None:
        self._power.reboot(machine)

    def moved(self, machine: Machine) -> None:
        """An elastic address came or went. Without one, a machine that was given a public address has one again."""
        if machine.public is None and machine.wants_public and machine.state == "running":
            machine.instance.nics[0].public_ip = self.public.take()
        self._power.moved(machine)

    def tick(self) -> None:
        """Bring everything to where it is at this moment."""
        for id, wish in self._power.asked():
            machine = self.machines[id]
            if machine.state != "running":
                continue
            if wish == "reboot":
                self.reboot(machine)
            elif machine.instance.instance_initiated_shutdown_behavior == "terminate":
                self.end(machine, BY_ITSELF)
            else:
                self.stop(machine, BY_ITSELF)
        for machine in list(self.machines.values()):
            if machine.powered and machine.state in ("shutting-down", "stopping"):
                machine.powered = False
                self._power.off(machine)
            if machine.due is not None and time.monotonic() >= machine.due:
                self._arrive(machine)

    def travel(self, seconds: float) -> None:
        """Everything that is here has been here `seconds` longer."""
        for machine in self.machines.values():
            machine.launched -= seconds
            machine.ended = machine.ended and machine.ended - seconds

    def _enter(self, machine: Machine, state: tuple[str, int], seconds: float | None = None) -> None:
        machine.instance._state = InstanceState(*state)
        machine.due = None if seconds is None else time.monotonic() + seconds

    def _because(self, machine: Machine, reason: tuple[str, str]) -> None:
        code, message = reason
        machine.instance.state_reason = StateReason(f"{code}: {message}", code) if code else StateReason()
        machine.instance._reason = message and f"{message} ({time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} GMT)"

    def _arrive(self, machine: Machine) -> None:
        state = NEXT[machine.state]
        self._enter(machine, state)
        if state == RUNNING:
            if machine.wants_public and machine.public is None:
                machine.instance.nics[0].public_ip = self.public.take(self.reuse_addresses)
            machine.powered = True
            self._power.on(machine)
            return
        nic = machine.instance.nics.get(0)
        elastic = {address.public_ip: address for address in machine.instance.ec2_backend.addresses}
        if nic and nic.public_ip not in elastic:
            self.public.free += [nic.public_ip] if nic.public_ip else []
            nic.public_ip = None
        if state == TERMINATED:
            if nic and nic.public_ip:
                machine.instance.ec2_backend.disassociate_address(address=nic.public_ip)
            self._dissolve(machine)

    def _dissolve(self, machine: Machine) -> None:
        """Only now go its interfaces and volumes, and with them what keeps a security group from being deleted."""
        instance, backend = machine.instance, machine.instance.ec2_backend
        instance.teardown_defaults()
        for nic in list(instance.nics.values()):
            if nic.delete_on_termination:
                backend.enis.pop(nic.id, None)
            else:
                nic.instance, nic.attachment_id, nic.status = None, None, "available"
        instance.security_groups, instance.__class__ = [], _Gone
        if association := backend.iam_instance_profile_associations.get(instance.id):
            backend.disassociate_iam_instance_profile(association_id=association.association_id)
        self.private.free.append(machine.private)


class _Gone(Instance):
    """A terminated instance as EC2 goes on describing it: without interfaces and addresses."""
    private_ip = private_ip_address = public_ip = public_ip_address = public_dns_name = subnet_id = vpc_id = None
    private_dns_name = ""
    network_interfaces = ()                       # type: ignore[assignment]


def offered(kind: str, region: str) -> list[str]:
    """The zones of a region that have this kind of machine."""
    return sorted(x["Location"] for x in INSTANCE_TYPE_OFFERINGS["availability-zone"].get(region, [])
                  if x["InstanceType"] == kind)


def kinds_of(region: str) -> list[str]:
    """What a region offers anywhere."""
    return sorted({x["InstanceType"] for x in INSTANCE_TYPE_OFFERINGS["availability-zone"].get(region, [])
                   if x["InstanceType"] in INSTANCE_TYPES})


def on_demand(kind: str) -> float:
    """Dollars per hour: of the project's table, else made up from the number of cores."""
    return Machines(kind).usd_per_hour or USD_PER_CORE * INSTANCE_TYPES[kind]["VCpuInfo"]["DefaultVCpus"]


def price(kind: str, market: str, zone: str) -> float:
    """Dollars per hour. On spot made up: SPOT_SHARE of on-demand in zone a, one percent more in each further one."""
    share = SPOT_SHARE * (1 + 0.01 * (ord(zone[-1]) - ord("a"))) if market == "spot" else 1
    return round(on_demand(kind) * share, 6)


def facts(kind: str) -> tuple[int, str, int]:
    """Number, name and memory in MiB of the GPUs of a kind of machine."""
    gpus = INSTANCE_TYPES[kind].get("GpuInfo", {}).get("Gpus", [])
    return (gpus[0]["Count"], gpus[0]["Name"], gpus[0]["MemoryInfo"]["SizeInMiB"]) if gpus else (0, "", 0)
