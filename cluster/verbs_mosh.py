"""`mosh`: a terminal that survives a bad network. It speaks UDP, for which one port is open meanwhile (doors.py)."""
from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cluster import doors
from cluster.ec2 import Cloud, caller_address
from cluster.follow import FAILED, FINISHED
from cluster.run import Refused
from cluster.ssh import Shell, Trouble
from cluster.verbs import one_cluster
from cluster.verbs_ssh import ToOne, one, shells_of
from engine.cli import flag

# The first ports that a mosh-server there could have, a line each. Python 3.8.
FREE = """
import socket
found = []
for port in range(60001, 61000):                  # mosh's own range
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.bind(("", port))
            found.append(port)
        except OSError:
            pass
    if len(found) == 10:
        break
print(*found)
"""
NO_SERVER = 3


@dataclass(frozen=True)
class Moshing(ToOne):
    ssh_cidr: str | None = flag("for whom to open the UDP port; else this machine's address", None)


def mosh(words: Sequence[str], flags: Moshing) -> int:
    if shutil.which("mosh") is None:
        raise Refused("mosh is not installed here:  sudo apt-get install mosh, or brew install mosh")
    if not sys.stdin.isatty():
        raise Refused("mosh needs a terminal. For a command:  python -m cluster cmd")
    cloud = Cloud(flags.region)
    found = one_cluster(cloud, words)
    shell = one(shells_of(cloud, found, flags.ssh_user), flags.node)
    if shell.host and shell.host.jump:
        raise Refused(f"{shell.name} has no public address, and mosh does not go through node-0 as ssh does:  "
                      f"python -m cluster ssh {found.name} --node={flags.node}")
    ports = free_ports(shell, found.name)
    with doors.opened(cloud, found.name, flags.ssh_cidr or caller_address(), ports) as door:
        print(f"UDP port {door.port} of {found.name} is open to {door.cidr} alone, until you leave.", flush=True)
        status = subprocess.call(["mosh", f"--ssh={shlex.join(['ssh', '-F', str(shell.config)])}", "-p",
                                  str(door.port), shell.name])
    return FAILED if status else FINISHED


def free_ports(shell: Shell, run: str) -> list[int]:
    """Raises Trouble where there is no mosh-server."""
    said = shell.run(f"command -v mosh-server > /dev/null || exit {NO_SERVER}; python3 -c {shlex.quote(FREE)}",
                     check=False)
    if said.status == NO_SERVER:
        raise Trouble(shell.name, f"it has no mosh-server. Install it:  "
                                  f"python -m cluster cmd {run} --all_nodes 'sudo apt-get install -y mosh'")
    return [int(port) for port in said.out.split()]
