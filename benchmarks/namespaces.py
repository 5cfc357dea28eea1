"""Machines that are network namespaces of this one, each with a link to a switch. Linux, root, iproute2.

No name is given to anything: a namespace lives as long as the process in it, so nothing is left however that ends.
"""
from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from engine.values import BadValue

CLONE_NEWNET, PR_SET_PDEATHSIG = 0x40000000, 1
LIBC = "libc.so.6"


def enter_switch() -> None:
    """This process goes into a network of its own, with a switch and nothing else, for good. Raises BadValue."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise BadValue(f"{' and '.join(missing)} of iproute2 is not here. Install iproute2")
    _own_network()
    _run("ip link add switch type bridge")
    _run("ip link set switch up")


def shape(mbit: float | None) -> None:
    """What this machine sends, to so many Mbit/s; None: as fast as it goes. Raises BadValue."""
    with contextlib.suppress(BadValue):            # there was none
        _run("tc qdisc del dev eth0 root")
    if mbit is not None:
        _run(f"tc qdisc add dev eth0 root tbf rate {round(1000 * mbit)}kbit burst 32kb limit 4mb")


@contextlib.contextmanager
def machines(count: int, function: Callable[..., None]) -> Iterator[list[Any]]:
    """function(pipe) on each of `count` machines at the switch, as the ranks of a world; their pipes, by rank.

    They end with this context.
    """
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    try:
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_machine, args=(rank, count, there, function, os.getpid()), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        for rank, pipe in enumerate(pipes):
            answer(pipe)                           # it is in its network
            _run(f"ip link add port{rank} type veth peer name eth0 netns {processes[rank].pid}")
            _run(f"ip link set port{rank} master switch up")
            pipe.send(None)
        yield pipes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        for rank in range(len(pipes)):             # the kernel removes a link some time after its machine
            with contextlib.suppress(BadValue):
                _run(f"ip link del port{rank}")


def answer(pipe: Any) -> Any:
    """What a machine sends next. Raises BadValue with what went wrong there."""
    try:
        found = pipe.recv()
    except EOFError:
        raise BadValue("a machine died without a word") from None
    if isinstance(found, Exception):
        raise BadValue(f"on a machine: {found}")
    return found


def _machine(rank: int, count: int, pipe: Any, function: Callable[..., None], parent: int) -> None:
    ctypes.CDLL(LIBC).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:                     # it was gone before that
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # Ctrl-C goes to all; the one that started us ends us
    try:
        _own_network()
        pipe.send(None)
        pipe.recv()
        _run("ip link set lo up")
        _run(f"ip addr add 10.0.0.{rank + 1}/24 dev eth0")
        _run("ip link set eth0 up")
        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(count), MASTER_ADDR="10.0.0.1",
                          MASTER_PORT="29500", GLOO_SOCKET_IFNAME="eth0")
        function(pipe)
    except Exception as error:
        pipe.send(type(error)(f"{error}\n{traceback.format_exc()}"))


def _own_network() -> None:
    libc = ctypes.CDLL(LIBC, use_errno=True)       # os.unshare is there from Python 3.12 on
    if libc.unshare(CLONE_NEWNET):
        raise BadValue(f"A network namespace cannot be made here: {os.strerror(ctypes.get_errno())}. It needs root")


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise BadValue(f"`{command}` failed: {done.stderr.strip()}")
