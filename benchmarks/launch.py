"""What a launch costs the one who launches, by the number of machines: calls to AWS, handshakes, bytes, seconds.

    python -m benchmarks.launch
    python -m benchmarks.launch --hosts=1 --hosts=16 --rounds=5 --record

On the rehearsal: StrictEc2, and machines that are sshds on loopback and share this machine's processors. In the timed
rounds they take code and data, hash both and start supervisors; importing torch and training, which is not the
launcher's work, is not done. One round more trains, up to the first step. --record adds rows to benchmarks/launch.md.
"""
from __future__ import annotations

import contextlib
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.tables import dated, show
from cluster.local import CHECKOUT
from cluster.rehearsal import keeper
from cluster.rehearsal.bench import Bench
from cluster.rehearsal.hosts import Knobs
from cluster.rehearse import NAME, Stage
from cluster.spec import Machines
from configs import CONFIGS
from engine.cli import flag, misuse, parse
from engine.run import processor

TABLE = Path(__file__).with_name("launch.md")
HEADING = ("| date | commit | machines | calls to AWS | handshakes from here, inside | steps | MB from here | "
           "seconds | "
           "survey / machines / ready / to node 0 / to the others / start | CPU s here | CPU s of the machines | "
           "first step after s | on |")
CONFIG = replace(CONFIGS["tiny"], machines=Machines("c5.xlarge"))
LAUNCH_S = 300                                    # the most that one launch may take
# Parts of a launch, and how the line begins that says that one has ended.
PARTS = {"survey": "Asking for", "machines": r"\d+ machine\(s\) run", "ready": "Bringing the code",
         "to node 0": "Checking the environment", "to the others": "Starting the training",
         "start": "It trains"}
FIRST_STEP = "step "
# On a machine: the launcher's question after torch is answered, and what torchrun would do is left undone.
PYTHON3 = f"""\
case "$*" in *"import "*torch*) exit 0 ;; *torch.distributed.run*) exec sleep {LAUNCH_S} ;; esac
exec {sys.executable} "$@"
"""


@dataclass(frozen=True)
class Flags:
    hosts: tuple[int, ...] = flag("how many machines; may be repeated", default=(1, 2, 4, 8, 16))
    rounds: int = flag("timed rounds; the median counts", default=3)
    no_training: bool = flag("leave out the round that trains", default=False)
    record: bool = flag("add the rows to benchmarks/launch.md", default=False)


@dataclass(frozen=True)
class Cost:
    """Of one launch, until its supervisors run."""
    calls: int                                    # to AWS
    here: int                                     # handshakes of this machine's ssh
    inside: int                                   # and of the machines among themselves
    steps: int                                    # commands and copies at node 0, nearly all one after another
    sent: int                                     # bytes from here to the machines: what TCP carries
    parts_s: dict[str, float]
    cpu_s: float                                  # of the launcher and what it has started here
    machines_cpu_s: float

    @property
    def total_s(self) -> float:
        return sum(self.parts_s.values())


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="-m benchmarks.launch", about=__doc__)
    if flags.rounds < 1 or any(count < 1 for count in flags.hosts):
        misuse("--rounds and --hosts must be at least 1")
    costs: dict[int, list[Cost]] = {count: [] for count in flags.hosts}
    first: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="txl-") as name:
        folder = Path(name)
        subprocess.run([sys.executable, *(CONFIG.recipe.prepare or ())], cwd=folder, check=True, timeout=LAUNCH_S,
                       stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(CHECKOUT)})
        for _ in range(flags.rounds):             # interleaved, as shared machines drift
            for count, found in costs.items():
                found.append(launch(folder, count))
                print(f"{count:>2} machine(s): {found[-1].total_s:5.1f} s", flush=True)
        for count in [] if flags.no_training else flags.hosts:
            first[count] = first_step(folder, count)
            print(f"{count:>2} machine(s): first step after {first[count]:5.1f} s", flush=True)
    rows = [row(count, found, first.get(count)) for count, found in costs.items()]
    show(HEADING, rows, TABLE if flags.record else None)
    return 0


def launch(folder: Path, count: int) -> Cost:
    """One launch of `count` machines, which are gone when this returns. The data is in `folder`."""
    quick = Knobs(scripts=(("python3", PYTHON3),))
    with bench(folder) as stage, Relay(stage.hosts.port) as relay:
        stage.hosts.next += [quick] * count
        seconds, sent = [0.0], 0
        with launcher(stage, count, relay, "--detach") as process:
            ends = list(PARTS.values())
            for line, second in timed(process):
                if ends and re.match(ends[0], line):
                    seconds.append(second)
                    ends.pop(0)
                    sent = sum(relay.sent[machine.public] for machine in stage.instances())
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert not ends, f"the launch came to its end without {ends[0]!r}"
        home = Path(stage.env["TXL_HOME"])
        logins = handshakes(stage, [machine.id for machine in stage.instances()], home)
        sockets = re.findall(r"ControlPath (\S+)", (home / f"clusters/{NAME}/ssh_config").read_text())
        masters = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
                   if any(path in command_of(pid) for path in sockets)]
        return Cost(
            calls=len(stage.ec2.calls), sent=sent, here=sum(here for here, _ in logins),
            inside=sum(inside for _, inside in logins),
            steps=log_of(stage, stage.instances()[0].id).count("Starting session: "),
            parts_s={part: end - begin for part, begin, end in zip(PARTS, seconds, seconds[1:])},
            cpu_s=used.ru_utime + used.ru_stime + cpu_s(masters),
            machines_cpu_s=cpu_s(keeper.processes(stage.folder / "hosts")))


def handshakes(stage: Bench, ids: Iterable[str], home: Path) -> list[tuple[int, int]]:
    """Of each machine, those that let somebody in, as its sshd tells: by the key in `home`, and by others."""
    ours = subprocess.run(["ssh-keygen", "-lf", home / "keys/id_ed25519.pub"], capture_output=True, text=True,
                          check=True).stdout.split()[1]
    keys = [re.findall(r"Accepted publickey .*(SHA256:\S+)", log_of(stage, id)) for id in ids]
    return [(found.count(ours), len(found) - found.count(ours)) for found in keys]


def log_of(stage: Bench, id: str) -> str:
    """What its sshd says."""
    return (stage.hosts[id].root / "var/log/sshd.log").read_text()


def first_step(folder: Path, count: int) -> float:
    """Seconds from the command to the training's first line of progress, on machines that share our processors."""
    with bench(folder) as stage, launcher(stage, count) as process:
        for line, second in timed(process):
            if line.startswith(FIRST_STEP):
                return second
    raise AssertionError("the training has ended without a step")


def row(count: int, costs: list[Cost], first: float | None) -> str:
    """Of the table: medians, and of the seconds their range."""
    def median(values: Iterable[float]) -> float:
        return statistics.median(values)
    totals = [cost.total_s for cost in costs]
    parts = " / ".join(f"{median(cost.parts_s[part] for cost in costs):.1f}" for part in PARTS)
    return dated(
        f"{count} | {median(cost.calls for cost in costs):.0f} | "
        f"{median(cost.here for cost in costs):.0f}, {median(cost.inside for cost in costs):.0f} | "
        f"{median(cost.steps for cost in costs):.0f} | "
        f"{median(cost.sent for cost in costs) / 1e6:.3f} | "
        f"{median(totals):.1f} ({min(totals):.1f} to {max(totals):.1f}) | {parts} | "
        f"{median(cost.cpu_s for cost in costs):.1f} | {median(cost.machines_cpu_s for cost in costs):.1f} | "
        f"{'' if first is None else f'{first:.0f}'} | {os.cpu_count()} x {processor()}")


@contextlib.contextmanager
def bench(folder: Path) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(dir=folder) as here:
        (Path(here) / "data").symlink_to(folder / "data")
        with Bench(Path(here)) as stage:
            yield stage


@contextlib.contextmanager
def launcher(stage: Bench, count: int, relay: Relay | None = None, *more: str) -> Iterator[subprocess.Popen[str]]:
    config = replace(CONFIG, machines=replace(CONFIG.machines, count=count))
    port = {"TXL_SSH_PORT": str(relay.port)} if relay else {}
    with subprocess.Popen([*Stage(stage, stage.folder, config).command, *more], cwd=stage.folder, text=True,
                          stdout=subprocess.PIPE, env=stage.env | {"PYTHONUNBUFFERED": "1"} | port) as process:
        deadline = threading.Timer(LAUNCH_S, process.kill)
        deadline.start()
        try:
            yield process
        finally:
            deadline.cancel()
            process.kill()


def timed(process: subprocess.Popen[str]) -> Iterator[tuple[str, float]]:
    """Its lines, and after how many seconds they were said."""
    began = time.monotonic()
    assert process.stdout is not None
    for line in process.stdout:
        yield line, time.monotonic() - began


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    return ""


def cpu_s(pids: Iterable[int]) -> float:
    """Of processes that live, and of their children that have ended."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


class Relay:
    """A port by which every machine is reached at each of its addresses, and which counts the bytes that go there."""

    def __init__(self, to_port: int):
        self.sent, self._to_port = Counter[str | None](), to_port
        self._server = socket.socket()
        # Of loopback alone, as all addresses of 127.0.0.0/8 cannot be had in another way.
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        self._server.bind(("", 0))
        self._server.listen(100)
        self.port: int = self._server.getsockname()[1]

    def __enter__(self) -> Relay:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)   # wakes accept()
        self._server.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):        # closed
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        address = client.getsockname()[0]
        try:
            machine = socket.create_connection((address, self._to_port), 10)
        except OSError:                           # not up yet
            client.close()
            return
        machine.settimeout(None)
        threading.Thread(target=self._pump, args=(machine, client), daemon=True).start()
        self._pump(client, machine, address)

    def _pump(self, source: socket.socket, target: socket.socket, counted: str | None = None) -> None:
        with contextlib.suppress(OSError):        # the other direction has ended
            while block := source.recv(1 << 16):
                if counted:
                    self.sent[counted] += len(block)
                target.sendall(block)
        for end in (source, target):              # close() alone would not wake the other direction
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
