"""A rehearsal: StrictEc2, its machines, and what there is to ask about them. Linux; no account, no privileges.

    with Bench(Path("rehearsal")) as bench:
        subprocess.run([sys.executable, "launch.py", "--config=…", f"--ssh_user={bench.user}"], env=bench.env)
        assert not bench.billable()
"""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.rehearsal import keeper, sshd
from cluster.rehearsal.hosts import Facts, Hosts

if TYPE_CHECKING:
    from cluster.rehearsal.ec2 import StrictEc2
    from cluster.rehearsal.world import Machine

FREE = ("shutting-down", "terminated")            # states that cost nothing and never will again
NEEDS = ("sshd", "ssh", "ssh-keygen")


@dataclass(frozen=True)
class Line:
    """Of the bill."""
    id: str
    kind: str
    market: str
    zone: str
    hours: float
    usd: float


class Bench:
    """A context manager. What it makes is below `folder`, whose contents stay unless `remove`; no process stays."""

    def __init__(self, folder: Path, *, region: str = "us-east-1", remove: bool = False):
        self.folder, self.region, self._remove = folder.resolve(), region, remove
        self._stack, self._ports = ExitStack(), os.environ.get("TXL_PORTS", "0")

    def __enter__(self) -> Bench:
        """Raises RuntimeError where something it needs is not installed."""
        missing = [name for name in NEEDS if not (sshd.SSHD if name == "sshd" else shutil.which(name))]
        if missing:
            raise RuntimeError(f"A rehearsal needs {', '.join(missing)}:  "
                               f"apt-get install openssh-server openssh-client rsync")
        try:
            from cluster.rehearsal.ec2 import StrictEc2
            from cluster.rehearsal.world import facts
        except ImportError as error:
            raise RuntimeError(f"A rehearsal needs moto ({error}):  "
                               f"{sys.executable} -m pip install -r requirements.txt") from error
        with ExitStack() as stack:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Unix sockets have 108 bytes for their name, and a folder of tests or of a run may be deep
            tmp = Path(tempfile.mkdtemp(prefix="txl-"))
            machines = self.folder / "hosts"
            stack.callback(self._end_with_us(machines, tmp))
            self.hosts = Hosts(machines, tmp, lambda kind: Facts(*facts(kind)))
            stack.callback(self.hosts.close)
            self.ec2: StrictEc2 = stack.enter_context(StrictEc2(self.region, self.hosts))
            self.world, self.hosts.aws = self.ec2.world, self.ec2.url
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def user(self) -> str:
        """Whom to log in as on every machine."""
        return sshd.user()

    @property
    def env(self) -> dict[str, str]:
        """The complete environment of a launcher that rehearses: nothing of the user's AWS configuration is in it."""
        return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TXL_"))} | {
            "AWS_ENDPOINT_URL": self.ec2.url, "AWS_ACCESS_KEY_ID": "rehearsal", "AWS_SECRET_ACCESS_KEY": "rehearsal",
            "AWS_DEFAULT_REGION": self.region, "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
            "TXL_HOME": str(self.folder / "txl"), "TXL_SSH_PORT": str(self.hosts.port), "TXL_SSH_USER": self.user,
            "TXL_PORTS": self._ports}

    def advance(self, seconds: float) -> None:
        """What exists is `seconds` older: the watchdogs' clocks go forward, launch and end of machines back."""
        with self.ec2.lock:
            self.world.travel(seconds)
            for host in self.hosts.all.values():
                host.travel(seconds)

    def reclaim(self, id: str) -> None:
        """EC2 takes a spot machine back, without a word beforehand."""
        with self.ec2.lock:
            self.world.reclaim(self.world.machines[id])

    def instances(self) -> list[Machine]:
        """All that ever were, in the order of launch."""
        with self.ec2.lock:
            self.world.tick()
            return list(self.world.machines.values())

    def alive(self) -> list[Machine]:
        return [machine for machine in self.instances() if machine.state not in FREE]

    def billable(self) -> list[str]:
        """Instances that are not terminated, addresses, and volumes of no instance."""
        backend = self.ec2.backend
        return [f"{machine.id} {machine.state} {machine.market} {machine.kind} {machine.tags.get('Name', '')}"
                for machine in self.instances() if machine.state != "terminated"] + [
            f"{address.allocation_id} {address.public_ip}" for address in backend.addresses] + [
            f"{volume.id} {volume.size} GiB" for volume in self._loose_volumes()]

    def unguarded(self) -> list[str]:
        """What would go on costing if everybody went away now: machines without a living watchdog that has a deadline
        for them, and addresses and volumes that do not say when they expire."""
        backend = self.ec2.backend
        return [f"{machine.id} {machine.state}" for machine in self.alive()
                if machine.state == "stopped" or not self.hosts[machine.id].guarded()] + [
            thing.id for thing in [*backend.addresses, *self._loose_volumes()]
            if "txl:expires" not in [tag["key"] for tag in thing.get_tags()]]

    def leftovers(self) -> list[str]:
        """What a launch makes beside instances, and must take away again."""
        from cluster.rehearsal.roles import role_names

        backend = self.ec2.backend
        return [f"security group {group.id} {group.name}" for vpc in backend.groups.values() for group in vpc.values()
                if group.name != "default"] + [
            f"placement group {name}" for name in self.ec2.groups] + [
            f"address {address.public_ip}" for address in backend.addresses] + [
            f"role {name}" for name in role_names()] + [
            f"volume {id}" for id in backend.volumes] + [f"network interface {id}" for id in backend.enis]

    def bill(self) -> list[Line]:
        """By the rehearsal's prices, from launch to end or now."""
        from cluster.rehearsal.world import price

        lines = []
        for machine in self.instances():
            hours = ((machine.ended or time.time()) - machine.launched) / 3600
            lines.append(Line(machine.id, machine.kind, machine.market, machine.zone, hours,
                              hours * price(machine.kind, machine.market, machine.zone)))
        return lines

    def _loose_volumes(self) -> list[Any]:
        return [volume for volume in self.ec2.backend.volumes.values() if volume.attachment is None]

    def _end_with_us(self, machines: Path, tmp: Path) -> Callable[[], None]:
        """Start the keeper; what is returned lets it do its work and waits for it."""
        remove = [tmp] + [self.folder] * self._remove
        process = subprocess.Popen([sys.executable, "-I", keeper.__file__, machines, *remove], stdin=subprocess.PIPE,
                                   start_new_session=True)

        def finish() -> None:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)
        return finish
