"""A Ray of a run's own on this machine: started, kept while it has work, ended. Everything it opens is on loopback.

    python -m cluster.ray_keeper FOLDER            (what `start` starts) until the run's job has ended, or SIGTERM

FOLDER is Ray's own, below /tmp as the names of its sockets must be short: `token` (0600), `start.json`, `log`. The
keeper inherits the run's lock: the run is known to be alive as long as its Ray is. No launcher need be left to end it.
"""
from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from cluster.ray_api import Dashboard, Trouble

LINGER_S = 20                                     # after the last job's end: a launcher that follows ends it sooner
IDLE_S = 300                                      # without any job: whoever started it is gone
END_S = 5                                         # for Ray to end by itself: it waits for processes, up to 30 s
STORE_BYTES = 100 << 20                           # of shared memory: a training passes nothing through it
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
CHECKOUT = Path(__file__).resolve().parent.parent


def start(cpus: int, gpus: int, ports: tuple[int, int], lock: int) -> tuple[Path, subprocess.Popen]:
    """A keeper that has `lock`, and its folder. `ports`: free ones. Ray answers some seconds later, if it does."""
    folder = Path(tempfile.mkdtemp(prefix="txl-ray-", dir="/tmp"))
    with open(os.open(folder / "token", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    (folder / "start.json").write_text(json.dumps({
        "address": f"http://127.0.0.1:{ports[0]}", "command": [
            *ray_start(folder, "127.0.0.1", cpus), *head(0, *ports), f"--num-gpus={gpus}"]}))
    path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(folder / "log", "ab") as log:
        keeper = subprocess.Popen([sys.executable, "-m", "cluster.ray_keeper", str(folder)], stdin=subprocess.DEVNULL,
                                  stdout=log, stderr=log, start_new_session=True, pass_fds=[lock],
                                  env=os.environ | {"PYTHONPATH": path})
    return folder, keeper


def ray_start(folder: Path, address: str, cpus: int) -> list[str]:
    """`ray start` of a machine that has `address` among the others. GPUs Ray counts itself if it is not told."""
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
            f"--temp-dir={folder}", f"--node-ip-address={address}", "--dashboard-agent-listen-port=0",
            f"--num-cpus={cpus}", f"--object-store-memory={STORE_BYTES}"]


def head(port: int, dashboard: int, client: int) -> list[str]:
    """What it is told besides on the first machine; the dashboard is on that one's loopback."""
    return ["--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}"]


def dashboard(folder: Path) -> Dashboard:
    """Of the Ray in `folder`. Raises OSError where it is gone."""
    return Dashboard(json.loads((folder / "start.json").read_text())["address"], (folder / "token").read_text())


def end(pid: int) -> None:
    """End a keeper and its Ray; returns once they are gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 4 * END_S
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(.1)


def alive(pid: int) -> bool:
    """Whether a process is a keeper that runs."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        return b"cluster.ray_keeper" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """Its children, theirs, and so on."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):        # it ended meanwhile
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]


def sweep(folder: Path) -> None:
    """What a killed Ray has left: its processes, by the folder in their command lines, and the folder."""
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):        # it ended meanwhile, or it is another user's
            if os.fsencode(folder) in (proc / "cmdline").read_bytes() and int(proc.name) != os.getpid():
                os.kill(int(proc.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def adopt_orphans() -> None:
    """From here on, who loses its parent among what this process starts is a child of this one."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def wind_up(ray: subprocess.Popen, folder: Path) -> None:
    """End a `ray start --block` and all else that this process has started, and remove Ray's folder."""
    ray.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        ray.wait(END_S)
    end_descendants()
    sweep(folder)


def end_descendants() -> None:
    """All that this process has started."""
    while its := descendants(os.getpid()):        # agents of Ray's outlive a raylet that is killed
        for pid in its:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(.1)


def environment(token: str, *, alone: bool = True) -> dict[str, str]:
    """The training's own Python first, no word to Ray's makers, nobody without the token.

    `alone`: nothing but loopback.
    """
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return ours | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token,
        # Nobody looks at these, and each is a Python that starts, or a process that is never idle.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_enable_metrics_collection": "0",
        "RAY_prestart_worker_first_driver": "0",
        # Ray puts its node's address in the place of 127.0.0.1, and listens on all, except where it is told that this
        # machine is of a kind that it does not build clusters of.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": str(int(not alone))}


def main(argv: list[str]) -> int:
    folder, told = Path(argv[0]), [False]

    def note(signum: int, frame: FrameType | None) -> None:
        told[0] = True
    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    adopt_orphans()
    start = json.loads((folder / "start.json").read_text())
    api = dashboard(folder)
    ray = subprocess.Popen(start["command"], stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent,
                           env=environment((folder / "token").read_text()))
    quiet_since, had_work = time.monotonic(), False
    try:
        while not told[0] and ray.poll() is None:
            time.sleep(.5)
            with contextlib.suppress(Trouble):    # it is starting up, or busy
                jobs = api.jobs()
                had_work = had_work or bool(jobs)
                if not all(job.ended for job in jobs):
                    quiet_since = time.monotonic()
            if time.monotonic() - quiet_since > (LINGER_S if had_work else IDLE_S):
                break
    finally:
        wind_up(ray, folder)
    return 0


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
