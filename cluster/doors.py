"""One UDP port of a cluster for one address, open only while somebody here uses it: mosh needs one.

Of each there is a file in the cluster's folder here, locked while the port is used and emptied when it is closed. One
that is not empty and not locked was left by a process that was killed; whoever comes next closes it.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from cluster import interrupts
from cluster.ec2 import CallFailed, Cloud, Door
from cluster.journal import Journal, owner_name
from cluster.run import Refused


@contextlib.contextmanager
def opened(cloud: Cloud, cluster: str, cidr: str, ports: Iterable[int]) -> Iterator[Door]:
    """The first of `ports` that nobody here uses. Closed on Ctrl-C, SIGTERM and a closed terminal too, which raise
    KeyboardInterrupt in the block. Raises Refused."""
    folder = _folder(cluster)
    folder.mkdir(mode=0o700, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for port in ports:
            if (lock := stack.enter_context(_locked(folder / str(port)))) is not None:
                break
        else:
            raise Refused(f"No UDP port for mosh is free on this machine of {cluster}. End one that is in use")
        door = cloud.door(owner_name(), cluster, port, cidr)
        stack.enter_context(interrupts.as_ctrl_c())
        try:
            os.write(lock, b"open")
            cloud.open_door(door)
            yield door
        finally:
            with interrupts.unheard():
                if _closed(cloud, door):
                    os.truncate(lock, 0)


def in_use(cluster: str) -> set[int]:
    """Ports that a process here keeps open."""
    return {port for port, used in _noted(cluster) if used}


def forgotten(cloud: Cloud, cluster: str | None = None) -> list[Door]:
    """Open doors of this user that no process here uses."""
    return [door for door in cloud.doors(owner_name(), cluster) if door.port not in in_use(door.cluster)]


def close_forgotten(cloud: Cloud, cluster: str) -> None:
    """What a process that was killed has left open. EC2 is asked only if there is a trace of one."""
    if all(used for _, used in _noted(cluster)):
        return
    try:
        if not [door for door in forgotten(cloud, cluster) if not _closed(cloud, door)]:
            forget(cluster)
    except CallFailed as error:
        print(f"A port that mosh left open could not be looked for: {error}", file=sys.stderr)


def forget(cluster: str) -> None:
    """The traces of doors that are closed."""
    for path in _folder(cluster).glob("*"):
        with _locked(path) as lock:
            if lock is not None:
                os.truncate(lock, 0)


def _noted(cluster: str) -> Iterator[tuple[int, bool]]:
    """Port by port of what is open for all that is known here, and whether somebody uses it."""
    for path in _folder(cluster).glob("*"):
        with _locked(path) as lock:
            if lock is None or os.fstat(lock).st_size:
                yield int(path.name), lock is None


def _closed(cloud: Cloud, door: Door) -> bool:
    try:
        cloud.close_door(door)
    except CallFailed as error:
        print(f"UDP port {door.port} of {door.cluster} is still open to {door.cidr}: {error}\n"
              f"To close it:  python -m cluster gc", file=sys.stderr)
        return False
    print(f"UDP port {door.port} of {door.cluster} is closed again.")
    return True


def _folder(cluster: str) -> Path:
    return Journal(cluster).folder / "mosh"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """The file, open and locked; None where another process has it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file
    finally:
        os.close(file)
