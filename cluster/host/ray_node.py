"""One machine's part of a Ray cluster that a launch starts, and on node 0 the training on it. A supervisor runs it.

    python -m cluster.host.ray_node runs/NAME --node=I --address=OWN --head=ADDRESS:PORT        in ~/txl

Node 0 starts Ray's head, waits for the other machines and runs the driver (ray_driver.py); its status is what all end
with, as it tells them. A machine whose Ray ends before that has failed. Beside this, on every machine:
runs/NAME/ray_job.json, what to train (cluster/ray_gang.py), and runs/NAME/nodes/ray.token, mode 0600.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import ray_keeper
from cluster.host.ray_driver import FRAME, NODE_LABEL
from cluster.local import free_port
from cluster.ray_api import Dashboard, RayNode, Trouble

JOIN_S = 300                                      # for all machines to be there
MISSED_S = 90                                     # that one may be missing: Ray waits for ever for another
TELL_S = 30                                       # for the others to be told of the end
END_S = 5                                         # for the driver's last words to be read
LOOK_S = 1
RUNS = "Ray runtime started"                      # how `ray start` says so
TOKEN, JOB, ENDED = "nodes/ray.token", "ray_job.json", "nodes/ray.ended"


class Failed(Exception):
    """This machine's part has ended badly; the message says how."""


@dataclass(frozen=True)
class Seat:
    """A machine's place in the cluster."""
    run_dir: Path
    node: int
    address: str
    head: str                                     # ADDRESS:PORT
    job: dict[str, Any]
    token: str

    @property
    def count(self) -> int:
        return self.job["ranks"] // self.job["per_machine"]

    @property
    def dashboard(self) -> Dashboard:
        return Dashboard(f"http://127.0.0.1:{self.job['dashboard_port']}", self.token)

    @property
    def env(self) -> dict[str, str]:
        return ray_keeper.environment(self.token, alone=False) | {
            "PYTHONPATH": os.getcwd(), "RAY_ADDRESS": self.head, "RAY_TRAIN_V2_ENABLED": "1", "RAY_DEDUP_LOGS": "0",
            "PYTHONUNBUFFERED": "1"}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    for name, kind in (("--node", int), ("--address", str), ("--head", str)):
        parser.add_argument(name, type=kind, required=True)
    args = parser.parse_args(argv)
    seat = Seat(**vars(args), job=json.loads((args.run_dir / JOB).read_text()),
                token=(args.run_dir / TOKEN).read_text())
    asked = threading.Event()                     # to save and end
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: asked.set())
    try:
        if seat.node:
            meet(seat, asked)
        with Ray(seat) as ray:
            return lead(seat, ray, asked) if seat.node == 0 else join(seat, ray, asked)
    except Failed as error:
        print(error, flush=True)
        return 1


def meet(seat: Seat, asked: threading.Event) -> None:
    """Wait until node 0 listens: Ray itself gives up on a head that is late. Raises Failed."""
    host, _, port = seat.head.rpartition(":")
    deadline = time.monotonic() + JOIN_S
    while not asked.is_set():
        try:
            socket.create_connection((host, int(port)), LOOK_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise Failed(f"Nothing answers at {seat.head}, where node 0 is to be, after {JOIN_S} s: {error}"
                             ) from error
        time.sleep(LOOK_S / 4)


class Ray:
    """`ray start --block` on this machine; when this ends, all of Ray is gone here."""

    def __init__(self, seat: Seat):
        ray_keeper.adopt_orphans()
        self._seat, self._until = seat, time.monotonic() + JOIN_S
        self.ended = ""                           # how it did, if it has been started again
        self._folder = Path(tempfile.mkdtemp(prefix="txl-ray-", dir="/tmp"))      # names of sockets are short
        self._start()

    def __enter__(self) -> Ray:
        return self

    def __exit__(self, *_: object) -> None:
        ray_keeper.wind_up(self._process, self._folder)

    def check(self) -> None:
        """Raises Failed where it has ended. One that has not got as far as to run is started again: Ray gives its parts
        30 s, which is too little on a machine that is busy, or for a head that is."""
        if self._process.poll() is None:
            return
        words = (self._folder / "log").read_text(errors="replace")
        said = f"Ray has ended on this machine, with status {self._process.returncode}. Its last words:"
        self.ended = "\n  ".join([said, *words.splitlines()[-8:]])
        if RUNS in words or time.monotonic() > self._until:
            raise Failed(self.ended)
        ray_keeper.end_descendants()
        self._start()

    def _start(self) -> None:
        with open(self._folder / "log", "wb") as log:
            self._process = subprocess.Popen(command(self._seat, self._folder), stdin=subprocess.DEVNULL, stdout=log,
                                             stderr=log, env=self._seat.env)


def command(seat: Seat, folder: Path) -> list[str]:
    """`ray start` on this machine."""
    port, cpus = int(seat.head.rpartition(":")[2]), max(seat.job["per_machine"], os.cpu_count() or 1)
    where = [f"--address={seat.head}"] if seat.node else ray_keeper.head(port, seat.job["dashboard_port"], free_port())
    return [*ray_keeper.ray_start(folder, seat.address, cpus), *where, f"--labels={NODE_LABEL}={seat.node}"]


def lead(seat: Seat, ray: Ray, asked: threading.Event) -> int:
    """Node 0: the training's exit status. Raises Failed."""
    nodes = joined(seat, ray, asked)
    if asked.is_set():
        return 128 + signal.SIGTERM
    job = seat.job
    if all(node.gpus >= job["per_machine"] for node in nodes):
        job = job | {"resources": job["resources"] | {"GPU": 1}}
    driver = subprocess.Popen([sys.executable, "-m", "cluster.host.ray_driver"], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                              env=seat.env | {"TXL_RAY_JOB": json.dumps(job)})
    reader = threading.Thread(target=pass_on, args=(driver.stdout,), daemon=True)
    reader.start()
    whole_at, told = time.monotonic(), False
    while driver.poll() is None:
        time.sleep(LOOK_S)
        ray.check()
        if asked.is_set() and not told:
            driver.terminate()
            told = True
        there = alive(seat)
        if there is None or len(there) >= seat.count:
            whole_at = time.monotonic()
        elif time.monotonic() > whole_at + MISSED_S:
            tell(seat, 1)
            raise Failed(f"{seat.count - len(there)} of {seat.count} machines have left Ray.")
    reader.join(END_S)
    status = driver.returncode if driver.returncode >= 0 else 128 - driver.returncode
    tell(seat, status)
    return status


def joined(seat: Seat, ray: Ray, asked: threading.Event) -> list[RayNode]:
    """All machines, once they are there. Raises Failed."""
    deadline = time.monotonic() + JOIN_S
    while not asked.is_set():
        there = alive(seat) or []
        if len(there) >= seat.count:
            return there
        ray.check()
        if time.monotonic() > deadline:
            raise Failed(f"After {JOIN_S} s {len(there)} of {seat.count} machines have joined Ray. "
                         f"{ray.ended or 'The logs of the other machines say why.'}")
        time.sleep(LOOK_S / 4)
    return []


def join(seat: Seat, ray: Ray, asked: threading.Event) -> int:
    """Another machine: what node 0 says that the status is. Raises Failed where Ray ends before."""
    while True:
        with contextlib.suppress(OSError, ValueError, KeyError):
            said = json.loads((seat.run_dir / ENDED).read_text())
            if said["id"] == seat.job["id"]:
                return said["status"]
        if asked.is_set():
            return 128 + signal.SIGTERM
        ray.check()
        time.sleep(LOOK_S)


def alive(seat: Seat) -> list[RayNode] | None:
    """The machines that are part of it now; None where the dashboard does not answer."""
    with contextlib.suppress(Trouble):
        return seat.dashboard.nodes()
    return None


def pass_on(output: Any) -> None:
    """What the driver prints, for the log; of what it says for a launcher the words for a person."""
    for line in output:
        if line.startswith(FRAME):
            with contextlib.suppress(ValueError):
                frame = json.loads(line[len(FRAME):])
                if word := frame.get("word") or frame.get("refused"):
                    print(word, flush=True)
        elif line.strip():
            print(line, end="", flush=True)


def tell(seat: Seat, status: int) -> None:
    """Have every machine know the end. One that cannot be told loses Ray, and that is a failure there."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", TELL, str(Path(seat.job["root"], seat.run_dir, ENDED)),
                        json.dumps({"id": seat.job["id"], "status": status})],
                       stdin=subprocess.DEVNULL, env=seat.env, timeout=TELL_S)


# A file on every machine, from there by its own home. In a process of its own: it may hang with Ray.
TELL = """
import os, sys, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as At
ray.init(log_to_driver=False, logging_level="error")

@ray.remote(num_cpus=0, max_retries=0)
def write(path, text):
    path = os.path.expanduser(path)
    with open(path + ".partial", "w") as file:
        file.write(text)
    os.replace(path + ".partial", path)

ray.get([write.options(scheduling_strategy=At(node["NodeID"], soft=False)).remote(*sys.argv[1:])
         for node in ray.nodes() if node["Alive"]], timeout=20)
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
