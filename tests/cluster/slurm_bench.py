"""A real Slurm on loopback: Debian's daemons with two nodes that are both this machine, and a munge of its own.

Its nodes are called 127.0.0.1 and 127.0.0.2, so that a node's name leads to it without a name service.
"""
from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.local import free_port
from tests.waiting import until

PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])            # where Debian has daemons
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if not shutil.which(name, path=PATH)]
LACKS = f"needs slurm-wlm and munge, for {', '.join(MISSING)}" if MISSING else None
NODES = ("127.0.0.1", "127.0.0.2")
# Ends, when its standard input does, all processes with a word in their environment: the daemons, the keepers of their
# jobs, the jobs. No test, however it ends itself, leaves any.
GUARD = """
import os, pathlib, sys
sys.stdin.read()
def those():
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if sys.argv[1].encode() in (process / "environ").read_bytes().split(bytes(1)):
                yield int(process.name)
        except OSError:
            pass
while found := list(those()):
    for pid in found:
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            pass
"""
CONF = """\
ClusterName=bench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
FirstJobId={first_job}
AuthType=auth/munge
# A job that is queued again waits for as long as a credential lasts; no less than 5 s is taken.
AuthInfo=socket={root}/munge,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
Epilog={root}/epilog
ReturnToService=2
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


@dataclass(frozen=True)
class Slurm:
    root: Path                                    # where a job is as long in ending as a file `slow` is there
    env: dict[str, str]                           # with which Slurm's commands find it

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        return subprocess.run(command, env=self.env, stdout=subprocess.PIPE, text=True, timeout=300, check=True).stdout

    def jobs(self) -> list[str]:
        """All that were ever submitted; no test lasts until Slurm forgets them."""
        return re.findall(r"^JobId=(\d+)", self.ask("scontrol", "--oneliner", "show", "jobs"), re.MULTILINE)


@contextlib.contextmanager
def slurm(root: Path) -> Iterator[Slurm]:
    """Up in the block, and gone after it with every job, whatever happens."""
    host = socket.gethostname()
    (root / "state").mkdir()
    (root / "slurm.conf").write_text(CONF.format(
        host=host, port=free_port(), user=getpass.getuser(), root=root,
        # A job's port follows from its id, and other workers have other Slurms, and gangs at 20000 and on (conftest.py)
        first_job=7000 + 400 * int(os.environ["TXL_PORTS"]), nodes="\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2" for node in NODES)))
    (root / "epilog").write_text(f"#!/bin/sh\nwhile [ -e {root}/slow ]; do sleep .1; done\n")
    (root / "epilog").chmod(0o755)
    key = root / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(64))
    bench = Slurm(root, os.environ | {"PATH": PATH, "SLURM_CONF": str(root / "slurm.conf")})
    with open(root / "guard.out", "ab") as out:
        guard = subprocess.Popen([sys.executable, "-c", GUARD, f"SLURM_CONF={root}/slurm.conf"], stdout=out, stderr=out,
                                 stdin=subprocess.PIPE, start_new_session=True)
    daemons = []

    def start(*command: str) -> None:
        with open(root / f"{Path(command[0]).name}.out", "ab") as out:
            daemons.append(subprocess.Popen(command, env=bench.env, cwd=root, stdin=subprocess.DEVNULL, stdout=out,
                                            stderr=out, start_new_session=True))
    try:
        start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={root}/munge",
              *(f"--{file}-file={root}/munged.{file}" for file in ("pid", "log", "seed")))
        until((root / "munge").exists)
        start("slurmctld", "-D")
        for node in NODES:
            start("slurmd", "-D", "-N", node)
        until(lambda: subprocess.run(["sinfo", "--noheader", "--format=%T"], env=bench.env, capture_output=True,
                                     timeout=300).stdout == b"idle\n")
        yield bench
    finally:
        guard.communicate(timeout=300)
        for daemon in daemons:
            daemon.wait(timeout=300)
