"""The backends that pass the shared suite (test_contract.py), each in its world. A further one is a Case more."""
from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from cluster.rehearsal.bench import Bench
from cluster.rehearsal.sshd import user
from tests.cluster import ray_bench, slurm_bench
from tests.cluster.launching import until
from tests.cluster.sshd import LACKS, machines


@dataclass(frozen=True)
class World:
    """Where a backend finds two machines, or what stands for them. A rank has one thread there: with another number
    of threads sums are made in another order, and the curve differs in the last digits."""
    flags: tuple[str, ...] = ()                   # of launch.py, beside --config, --name and --backend
    env: Mapping[str, str] | None = None          # of launch.py, all of it; None: the tests' own
    started: Callable[[], Sequence[object]] = tuple      # what launches have taken so far: machines, jobs


@dataclass(frozen=True)
class Case:
    backend: str
    world: Callable[[Path], AbstractContextManager[World]]       # the folder is empty, and the world's own
    lacks: str | None = None                      # why it cannot be here; None: it can
    follows: bool = True                          # what runs already; else the same command refuses while it does


@contextlib.contextmanager
def local(folder: Path) -> Iterator[World]:
    yield World(("--machines=2",))


@contextlib.contextmanager
def aws(folder: Path) -> Iterator[World]:
    with Bench(folder) as bench:
        yield World(("--machines=2", "--instance_type=c5.large", f"--ssh_user={bench.user}", "--skip_setup", "--yes"),
                    bench.env, bench.instances)


@contextlib.contextmanager
def ssh(folder: Path) -> Iterator[World]:
    with machines(folder / "m", 2) as them, agent(them.key) as socket:
        for machine in them.all:
            machine.has("python3", f'exec {sys.executable} "$@"')
            machine.has("nproc", "echo 1")
        env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TXL_"))}
        hosts = ",".join(f"{user()}@{machine.address}:{machine.port}" for machine in them.all)
        yield World(("--machines=2", f"--hosts={hosts}", "--skip_setup"),
                    env | {"SSH_AUTH_SOCK": socket, "TXL_HOME": str(folder / "txl"),
                           "TXL_PORTS": os.environ["TXL_PORTS"]})


@contextlib.contextmanager
def agent(key: Path) -> Iterator[str]:
    """An ssh-agent of one's own with this key: its socket."""
    with tempfile.TemporaryDirectory() as folder:                     # short, as a socket's name must be
        socket = f"{folder}/agent"
        with subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL) as process:
            try:
                assert until(lambda: Path(socket).exists())
                subprocess.run(["ssh-add", "-q", key], env=os.environ | {"SSH_AUTH_SOCK": socket}, check=True)
                yield socket
            finally:
                process.terminate()


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[World]:
    with slurm_bench.slurm(folder) as bench:
        yield World(("--machines=2",), bench.env, bench.jobs)


@contextlib.contextmanager
def ray(folder: Path) -> Iterator[World]:
    with ray_bench.ray(1, 1) as bench:
        yield World(("--machines=2", f"--storage_path={folder.parent / 'here'}"), bench.env,
                    lambda: sorted(job.id for job in bench.dashboard.jobs()))


CASES = (
    Case("local", local, follows=False),
    Case("aws", aws, LACKS),
    Case("ssh", ssh, LACKS),
    Case("slurm", slurm, slurm_bench.LACKS),
    Case("ray", ray, ray_bench.LACKS),
)
