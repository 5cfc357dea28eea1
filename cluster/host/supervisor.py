"""Runs one node's command and tells how it is: docs/aws.md, "Supervisor". Python 3.8, standard library, Linux.

    python3 cluster/host/supervisor.py runs/NAME I              until the command ends, with its exit status
    python3 cluster/host/supervisor.py --detach runs/NAME I     until the command runs: 0, or 1 and why it does not
"""
from __future__ import annotations

import argparse
import array
import contextlib
import ctypes
import fcntl
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

BEAT_S = 1
LEASE_S = 20
START_S = 30                                      # that a detached start may take
AGAIN_S = 60                                      # between two starts of a companion that ends
MIRROR_S = 720                                    # a last pass of the mirror without progress; it gives up before
MIRROR_ENDS = (0, 3)                              # statuses of a mirror that has done what it could: host/bucket.py
GONE_S = 10                                       # for what was killed to be gone
LAUNCHED = "=== launched"                         # cluster/run.py: how the line of a launch begins in a node's log
RUNS = "runs: "                                   # how the word of a supervisor begins whose command has started
IFNAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
SIOCGIFCONF, IFREQ_BYTES = 0x8912, 40             # linux/sockios.h, and struct ifreq where a pointer has 64 bits
PR_SET_PDEATHSIG = 1                              # linux/prctl.h


class Launch(NamedTuple):
    """nodes/I.launch.json."""
    launch: str                                   # an ID: it names one start, and runs once
    command: list[str]
    env: dict[str, str]
    private: str
    tensorboard: list[str] | None = None
    mirror: list[str] | None = None


class CannotStart(Exception):
    """Nothing was started; the message says why."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detach", action="store_true")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("node", type=int)
    args = parser.parse_args(argv)
    if args.detach:
        return detached([sys.executable, __file__, str(args.run_dir), str(args.node)])
    try:
        return supervise(args.run_dir, args.node)
    except (CannotStart, OSError) as error:
        sys.exit(f"node {args.node} of {args.run_dir.name} was not started: {error}")


def detached(command: list[str]) -> int:
    """Start a supervisor that outlives this process and its terminal; pass on what it says until its command runs."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             start_new_session=True, text=True)
    assert child.stdout is not None
    limit = threading.Timer(START_S, child.kill)
    limit.start()
    said = child.stdout.read()                    # to its end: once its command runs, a supervisor writes to the log
    limit.cancel()
    if said.startswith(RUNS):
        print(said, end="")
        return 0
    status = child.wait(START_S)
    print(said or f"it did not start within {START_S} s\n", end="", file=sys.stderr if status else sys.stdout)
    return 1 if status else 0


def supervise(run_dir: Path, node: int) -> int:
    """Start what nodes/I.launch.json says and stay until it has ended. The status is a shell's: 128 and the signal.

    A launch that runs already, or has ended, is not started again: then 0. Raises CannotStart, OSError.
    """
    nodes = run_dir / "nodes"
    launch = _launch(nodes / f"{node}.launch.json")
    lock = _lock(nodes / f"{node}.lock", launch.launch)
    if lock is None or _ended(nodes / f"{node}.json", launch.launch):
        print(f"launch {launch.launch} of node {node} {'runs' if lock is None else 'has ended'} already")
        return 0
    with contextlib.suppress(FileNotFoundError):  # meant for an earlier launch
        os.unlink(nodes / f"{node}.kill")
    (run_dir / "logs").mkdir(exist_ok=True)
    with open(run_dir / "logs" / f"node-{node}.log", "ab", buffering=0) as log:
        job = Job(run_dir, node, launch, log, lock)
        print(f"{RUNS}node {node} of {run_dir.name}, supervisor {os.getpid()}, log {log.name}", flush=True)
        os.dup2(log.fileno(), 1)                  # nobody need be left to read the other
        os.dup2(log.fileno(), 2)
        _show(run_dir.name, Path(log.name))
        status = job.follow()
    return status if status >= 0 else 128 - status


class Job:
    """A command that runs, with what beats and ends with it."""

    def __init__(self, run_dir: Path, node: int, launch: Launch, log: Any, lock: int):
        self.run_dir, self.node, self.launch = run_dir, node, launch
        self.mark = os.urandom(8).hex()           # in the environment of all that it starts
        ifnames = {} if launch.env.keys() >= set(IFNAMES) else dict.fromkeys(IFNAMES, interface(launch.private))
        self.env = {**os.environ, **ifnames, **launch.env, "TXL_JOB": self.mark}
        lease = Path(os.environ.get("TXL_ROOT", "") + "/var/lib/txl/lease")
        self.lease = lease / "run" if lease.is_dir() else None         # none: a machine that does not power itself off
        self.beats, self.leases, self.lease_at = 0, 0, 0.0
        unmarked = {name: value for name, value in self.env.items() if name != "TXL_JOB"}      # it outlives the rest
        self.tensorboard = Companion(launch.tensorboard, self.env, run_dir / "logs" / "tensorboard.log")
        self.mirror = Companion(launch.mirror, unmarked, run_dir / "logs" / f"bucket-{node}.log")
        log.write(f"{LAUNCHED} {time.strftime('%Y-%m-%d %H:%M:%S %z')}: {shlex.join(launch.command)}\n".encode())
        stops = signal.SIGTERM, signal.SIGINT
        signal.pthread_sigmask(signal.SIG_BLOCK, stops)           # until they can be handed on
        self.command = _spawn(launch.command, self.env, log, keep=[lock])      # nothing else starts while it lives
        for stop in stops:
            signal.signal(stop, lambda *_: self.command.terminate())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
        self.beat()

    def follow(self) -> int:
        """Until the command has ended: the exit status as subprocess gives it."""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
        while self.command.poll() is None:
            self.tensorboard.keep()
            self.mirror.keep()
            # Not by sigtimedwait: interrupted until its time is over, it returns a signal that never came (Python 3.11)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.command.wait(BEAT_S)
            if (self.run_dir / "nodes" / f"{self.node}.kill").exists():
                self.kill()
            self.beat()
        status = self.command.returncode
        self.kill()                               # TensorBoard, and the ranks of a torchrun that was killed itself
        self.finish_mirror()
        self.beat(status)
        return status

    def beat(self, status: int | None = None) -> None:
        """Tell the watchdog, then the launcher. A disk that is full does not end a training."""
        if self.lease and (status is not None or time.monotonic() >= self.lease_at):
            self.lease_at = time.monotonic() + LEASE_S
            self.leases += 1
            state = "running" if status is None else "failed" if status else "succeeded"
            _replace(self.lease, {"state": state, "beat": self.leases})
        self.beats += 1
        _replace(self.run_dir / "nodes" / f"{self.node}.json", {
            "launch": self.launch.launch, "state": "running" if status is None else "ended", "status": status,
            "pid": os.getpid(), "beat": self.beats, "at": time.time()})

    def kill(self) -> None:
        """The command and all that it started, whatever became of their parents and sessions."""
        until, quiet = time.monotonic() + GONE_S, 0
        if self.command.poll() is None:
            os.killpg(self.command.pid, signal.SIGKILL)
        while quiet < 2 and time.monotonic() < until:                 # twice: amid an exec there is no environment
            pids = _marked(f"TXL_JOB={self.mark}".encode())
            quiet = 0 if pids else quiet + 1
            for pid in pids:
                with contextlib.suppress(OSError):                     # it is gone
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def finish_mirror(self) -> None:
        """Once more what the run's folder has: launcher and watchdog hear of the end when it is kept, or given up."""
        for _ in range(2):                        # where it is killed, or ends before it hears us: by a new one
            self.mirror.finish()
            moved, until = "", time.monotonic() + MIRROR_S
            while self.mirror.runs():
                self.beat()
                now = _text(self.run_dir / "nodes" / f"{self.node}.mirror")
                if now != moved:
                    moved, until = now, time.monotonic() + MIRROR_S
                if time.monotonic() > until:
                    self.mirror.kill()
                    return
                self.mirror.wait(BEAT_S)
            if self.mirror.status in MIRROR_ENDS:
                return


class Companion:
    """A command that is kept running beside the job's, if there is one. What it says goes to a log of its own."""

    def __init__(self, command: list[str] | None, env: dict[str, str], log: Path):
        self.command, self.env, self.log = command, env, log
        self.process: subprocess.Popen | None = None
        self.started = -math.inf

    def keep(self) -> None:
        if self.command and not self.runs() and time.monotonic() >= self.started + AGAIN_S:
            self._start(self.command)

    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def status(self) -> int | None:
        """Of its end; 0 for none that was ever to start."""
        return self.process.poll() if self.process else 0

    def finish(self) -> None:
        """Ask it for what it does last, also where it does not run."""
        if self.process and self.runs():
            self.process.terminate()
        elif self.command:
            self._start([*self.command, "--last"])

    def wait(self, seconds: float) -> None:
        if self.process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)

    def kill(self) -> None:
        if self.process and self.runs():
            os.killpg(self.process.pid, signal.SIGKILL)

    def _start(self, command: list[str]) -> None:
        self.started = time.monotonic()
        with contextlib.suppress(OSError), open(self.log, "ab") as log:
            self.process = _spawn(command, self.env, log)


def interface(private: str) -> str:
    """The network interface with this IPv4 address; lo has all of 127.0.0.0/8. Raises CannotStart where none has it."""
    if private.startswith("127."):
        return "lo"
    room = array.array("B", bytes(IFREQ_BYTES * 256))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, SIOCGIFCONF, struct.pack("iP", len(room), room.buffer_info()[0]))
    there = {}
    for at in range(0, struct.unpack("iP", answer)[0], IFREQ_BYTES):
        name = room[at:at + 16].tobytes().split(b"\0")[0].decode()
        there[socket.inet_ntoa(room[at + 20:at + 24].tobytes())] = name.split(":")[0]      # eth0:1 is eth0's label
    if private not in there:
        have = ", ".join(f"{address} ({name})" for address, name in there.items())
        raise CannotStart(f"this machine is to be {private}, and has {have or 'no address'}")
    return there[private]


def _launch(path: Path) -> Launch:
    try:
        given = json.loads(path.read_text())
        return Launch(**{name: given[name] for name in Launch._fields if name in given})
    except FileNotFoundError as error:
        raise CannotStart(f"there is no {path}: the launcher writes it first. Is this the code's directory?") from error
    except (ValueError, TypeError) as error:
        raise CannotStart(f"{path} does not say what to start: {error}") from error


def _lock(path: Path, launch: str) -> int | None:
    """The node's lock, as a descriptor; None where this same launch holds it. Raises CannotStart where another does."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    for _ in range(20):                           # its holder may be about to write its name, or to end
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 1000, 0).decode()
            if holder == launch:
                return None
            time.sleep(0.05)
        else:
            os.truncate(lock, 0)
            os.pwrite(lock, launch.encode(), 0)
            return lock
    raise CannotStart(f"launch {holder} still runs on this machine. End it:  touch {path.with_suffix('.kill')}")


def _ended(path: Path, launch: str) -> bool:
    try:
        last = json.loads(path.read_text())
        return last["launch"] == launch and last["state"] == "ended"
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return False


def _spawn(command: list[str], env: dict[str, str], log: Any, keep: list[int] | None = None) -> subprocess.Popen:
    """In a session of its own, and sent SIGTERM when this process dies, of whatever it does."""
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def before_exec() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:                # it died before that
            os._exit(1)

    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                            pass_fds=keep or [], preexec_fn=before_exec)


def _show(name: str, log: Path) -> None:
    """A tmux session in which the log goes by. Nothing hangs on it."""
    tmux = shutil.which("tmux")
    if tmux and os.environ.get("TXL_TMUX") != "0":
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run([tmux, "new-session", "-d", "-s", re.sub("[.:]", "_", f"txl-{name}"),
                            shlex.join(["tail", "-n", "+1", "-F", str(log.resolve())])],
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=10)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _marked(mark: bytes) -> list[int]:
    """Processes that have the mark in their environment."""
    pids = []
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):        # it ended meanwhile, or it is another user's
            if mark in (proc / "environ").read_bytes().split(b"\0"):
                pids.append(int(proc.name))
    return pids


def _replace(path: Path, value: dict[str, Any]) -> None:
    """Beside, then renamed. On a full disk in place: the blocks a file has can still be written. Or not at all."""
    data, beside = json.dumps(value).encode(), path.with_name(f".{path.name}.partial")
    with contextlib.suppress(OSError):
        try:
            beside.write_bytes(data)
            os.replace(beside, path)
        except OSError:
            with open(path, "r+b") as file:
                file.write(data)
                file.truncate()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
