"""A real Ray on this machine, of several nodes that are all on loopback, with a token; ended whatever happens."""
from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster import ray_keeper
from cluster.local import free_port
from cluster.ray_api import Dashboard, Trouble
from tests.waiting import until

LACKS = None if importlib.util.find_spec("ray") else "no Ray in this Python"
# `ray start`, which of its own accord joins nodes on loopback to no cluster: it takes another address for them.
START = """
from ray._private import ray_constants, services
ray_constants.ENABLE_RAY_CLUSTER, services.resolve_ip_for_localhost = True, lambda host: host
from ray.scripts.scripts import main
main()
"""
TOKEN = "0123456789abcdef0123456789abcdef"


@dataclass
class Bench:
    """`nodes`: the process of each, in a session of its own, the head first."""
    folder: Path
    address: str
    gcs: int
    nodes: list[subprocess.Popen] = field(default_factory=list)

    @property
    def env(self) -> dict[str, str]:
        """Of a launcher that is to use it."""
        return os.environ | {"RAY_ADDRESS": self.address, "RAY_AUTH_TOKEN": TOKEN}

    @property
    def home(self) -> Path:
        """Of whoever the nodes run as."""
        return self.folder / "home"

    @property
    def dashboard(self) -> Dashboard:
        return Dashboard(self.address, TOKEN)

    def add(self, cpus: int) -> None:
        """A node more; returns once the cluster has it."""
        leads = not self.nodes
        self.nodes.append(self._started(cpus, leads))
        for _ in range(3):
            until(lambda: self.nodes[-1].poll() is not None or self._whole(), limit_s=300)
            if self.nodes[-1].poll() is None:
                return
            self.nodes[-1] = self._started(cpus, leads)       # Ray gives its parts 30 s, too little on a busy machine
        raise AssertionError((self.folder / "log").read_text())

    def kill(self) -> None:
        """The newest node ends without a word, with all that runs there."""
        node = self.nodes.pop()
        _end([node.pid, *ray_keeper.descendants(node.pid)])
        node.wait()

    def _started(self, cpus: int, leads: bool) -> subprocess.Popen:
        """With a disk of its own: two that unpack the same code into one folder take each other's files away."""
        where = ["--head", f"--port={self.gcs}", "--dashboard-host=127.0.0.1",
                 f"--dashboard-port={self.address.rpartition(':')[2]}", f"--ray-client-server-port={free_port()}"
                 ] if leads else [f"--address=127.0.0.1:{self.gcs}"]
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", START, "start", "--block", "--disable-usage-stats", *where,
                 "--node-ip-address=127.0.0.1", f"--temp-dir={self.folder / str(free_port())}",
                 "--dashboard-agent-listen-port=0", f"--num-cpus={cpus}", "--num-gpus=0",
                 "--object-store-memory=80000000"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=ray_keeper.environment(TOKEN) | {
                    "HOME": str(self.home), "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
                    "RAY_worker_niceness": "0"})          # on a busy machine ranks that are nice starve

    def _whole(self) -> bool:
        with contextlib.suppress(Trouble):
            return len(self.dashboard.nodes()) == len(self.nodes)
        return False


@contextlib.contextmanager
def ray(*cpus: int) -> Iterator[Bench]:
    """A cluster with a node for each of the numbers."""
    folder = Path(tempfile.mkdtemp(prefix="txl-ray-", dir="/tmp"))      # names of sockets are short
    bench = Bench(folder, f"http://127.0.0.1:{free_port()}", free_port())
    try:
        for count in cpus:
            bench.add(count)
        yield bench
    finally:
        _end([pid for node in bench.nodes for pid in [node.pid, *ray_keeper.descendants(node.pid)]])
        for node in bench.nodes:
            node.wait()
        ray_keeper.sweep(folder)


def _end(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
