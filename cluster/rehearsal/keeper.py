"""Ends what runs on rehearsal machines, and waits for the bench to go: even SIGKILL leaves nothing behind.

    python keeper.py FOLDER [FOLDER TO REMOVE ...]     until its standard input ends
"""
from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

PATIENCE_S = 10


def processes(root: Path) -> set[int]:
    """What runs on the machines below `root`: whatever has their TXL_ROOT in its environment, their sshds (which write
    over theirs, but name their configuration), and what those started."""
    here, below = f"TXL_ROOT={root}".encode(), f"TXL_ROOT={root}/".encode()
    config, found, parents = f"{root}/".encode(), set(), {}
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):        # it ended meanwhile, or it is another user's
            pid = int(proc.name)
            state, parent = (proc / "stat").read_text().rpartition(")")[2].split()[:2]
            if state == "Z":
                continue
            parents[pid] = int(parent)
            environment = (proc / "environ").read_bytes().split(b"\0")
            words = (proc / "cmdline").read_bytes()
            if any(x == here or x.startswith(below) for x in environment) or (b"sshd" in words and config in words):
                found.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def command(pid: int) -> bytes:
    """A process's words, each ended by a zero; none once it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def end(root: Path) -> None:
    """Kill everything on the machines below `root`. They are stopped first, so that none starts another meanwhile."""
    deadline = time.monotonic() + PATIENCE_S
    while pids := processes(root):
        for sign in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids | processes(root):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, sign)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes on {root} do not end: {sorted(pids)}")
        time.sleep(0.01)


def main(argv: list[str]) -> None:
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.SIG_IGN)
    sys.stdin.buffer.read()                       # ends with the bench, however that ends
    end(Path(argv[0]))
    for folder in argv[1:]:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
