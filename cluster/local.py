"""The backend `local`: this machine. N machines of a config are N torchrun agents on loopback."""
from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster import run
from cluster.backends import Watch, Wish
from cluster.plan import Layout, Node, Plan, price, torchrun
from cluster.run import Broken, Refused
from cluster.spec import LOCAL

CHECKOUT = Path(__file__).resolve().parent.parent
# TensorBoard for as long as somebody holds the lock on its standard input: no launcher need be left to end it.
TENSORBOARD = """
import fcntl, subprocess, sys
tensorboard = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *sys.argv[1:]], stdin=subprocess.DEVNULL)
fcntl.flock(0, fcntl.LOCK_SH)
fcntl.flock(0, fcntl.LOCK_UN)
tensorboard.terminate()
tensorboard.wait()
"""
GRACE_S = 15                                      # between asking the nodes that are left to end and ending them


@dataclass(frozen=True)
class Here:
    """What a layout needs to know of this machine."""
    python: str
    gpus: tuple[str, ...]                         # as CUDA_VISIBLE_DEVICES names them
    cores: int
    port: int                                     # free on loopback
    loopback: str = "lo"
    pythonpath: str | None = None                 # where the code is, if not in the current directory


def survey(wish: Wish) -> Here:
    """Looks at this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Here(sys.executable, _gpus(), cores, free_port(), "lo0" if sys.platform == "darwin" else "lo", pythonpath())


def pythonpath() -> str | None:
    """What lets a training find the code, where that is not in the current directory."""
    path = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return None if Path.cwd() == CHECKOUT else os.pathsep.join(path)


def lay_out(wish: Wish, here: Here) -> Layout:
    """Ranks on the GPUs here, divided among the nodes; one rank a node on the processor where there are not enough."""
    config, machines, recipe, run_dir = wish.config, wish.config.machines, wish.config.recipe, Path("runs", wish.name)
    per_node = min(len(here.gpus) // machines.count, machines.gpus_per_machine or len(here.gpus))
    if recipe.batch.size is not None:
        per_node = min(per_node, recipe.batch.size // machines.count)          # no rank without a sequence
    ranks = max(1, per_node)
    env = {"OMP_NUM_THREADS": str(max(1, here.cores // (ranks * machines.count))), "GLOO_SOCKET_IFNAME": here.loopback}
    if not per_node:
        # Threads that wait for one another spin 300,000 times, and where other work has the cores do nothing else:
        # tiny on 2 cores, alone and beside 2 busy loops, makes 32,000 and 205 tokens/s, with this 28,000 and 2,700.
        env["GOMP_SPINCOUNT"] = "10000"
    if here.pythonpath:
        env["PYTHONPATH"] = here.pythonpath
    gpus = [",".join(here.gpus[i * per_node:(i + 1) * per_node]) for i in range(machines.count)]
    nodes = tuple(
        Node(i, "127.0.0.1", ranks, env | {"CUDA_VISIBLE_DEVICES": gpus[i]},
             torchrun(here.python, recipe.entry, run_dir / "recipe.json", nnodes=machines.count, node_rank=i,
                      ranks=ranks, master_addr="127.0.0.1", master_port=here.port))
        for i in range(machines.count))
    where = f"{per_node} of its {len(here.gpus)} GPUs" if per_node else "its processor"
    count = "one node" if machines.count == 1 else f"{machines.count} nodes"
    return Layout(
        nodes=nodes,
        machines=f"this machine: {count}, {'each with ' if machines.count > 1 else ''}"
                 f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {where}",
        cost="$0 here" + ("" if machines.kind == LOCAL else f". The config's own machines, {price(config)}"),
        setup=f"none: {here.python} as it is",
        notes=tuple(_notes(wish, ranks, per_node)))


def apply(plan: Plan, watch: Watch) -> LocalJob:
    """Start one torchrun agent per node, in sessions of their own: they outlive the launcher."""
    for module in ["torch"] + ["tensorboard"] * plan.tensorboard:
        if importlib.util.find_spec(module) is None:
            raise Refused(f"{sys.executable} has no {module}. Install what training needs:\n"
                          f"  {sys.executable} -m pip install -r {os.path.relpath(CHECKOUT / 'requirements.txt')}")
    refuse_if_running(plan.run_dir, plan.config.recipe.entry)
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    with lock(plan.run_dir) as held:
        run.record(plan.run_dir, plan.config.recipe, str(plan), plan.command, plan.overrides, CHECKOUT)
        job = LocalJob(plan, held, watch)
        job.start()
    return job                                    # from here on the agents hold the lock


class LocalJob:
    """A plan being carried out on this machine (cluster.backends.Job)."""

    def __init__(self, plan: Plan, lock: int, watch: Watch):
        self.plan, self._lock, self._watch = plan, lock, watch
        self._agents: list[subprocess.Popen] = []
        self._tensorboard: subprocess.Popen | None = None
        self._kill_at: float | None = None        # set when a node failed: when the others are ended by force

    def start(self) -> None:
        try:
            for node in self.plan.layout.nodes:
                with open(self.plan.run_dir / "logs" / f"node-{node.rank}.log", "ab", buffering=0) as log:
                    log.write(f"{run.LAUNCHED} {time.strftime('%Y-%m-%d %H:%M:%S %z')}: {node}\n".encode())
                    self._agents.append(subprocess.Popen(
                        node.command, env=os.environ | node.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                        start_new_session=True, pass_fds=[self._lock]))
            pids = " ".join(str(agent.pid) for agent in self._agents)
            os.truncate(self._lock, 0)
            os.pwrite(self._lock, f"torchrun {pids}, started by {os.getpid()} at {time.strftime('%H:%M:%S, %Y-%m-%d')}"
                      .encode(), 0)
            if self.plan.tensorboard:
                self._tensorboard = start_tensorboard(self.plan.run_dir, self._watch)
        except BaseException as error:
            self.kill()
            for agent in self._agents:
                agent.wait()                      # whoever tries again finds the lock free
            if self._agents and isinstance(error, OSError):
                raise Broken(f"{run.why(error)}. What was started is ended again.\n{run.MEND}") from error
            raise

    def poll(self) -> tuple[int, ...] | None:
        statuses = [agent.poll() for agent in self._agents]
        ended = tuple(status for status in statuses if status is not None)
        if len(ended) == len(statuses):
            _kill(self._ranks())                  # of an agent that was killed itself
            return ended
        if any(statuses):                         # the others would wait for it
            now = time.monotonic()
            if self._kill_at is None:
                self._kill_at = now + GRACE_S
                for agent, status in zip(self._agents, statuses):
                    if status is None:
                        agent.terminate()
            elif now > self._kill_at:
                self.kill()
        return None

    def stop(self) -> None:
        (self.plan.run_dir / "stop").touch()

    def kill(self) -> None:
        _kill([agent.pid for agent in self._agents if agent.poll() is None] + self._ranks())
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):        # an unheard request, on which a later trainer would stop at once
            (self.plan.run_dir / "stop").unlink()
        if self._tensorboard and self._tensorboard.poll() is None:
            os.killpg(self._tensorboard.pid, signal.SIGTERM)
            self._tensorboard.wait()

    def machines(self) -> str:
        return ""

    def _ranks(self) -> list[int]:
        return ranks_of(self.plan.run_dir, self.plan.config.recipe.entry)

def start_tensorboard(run_dir: Path, watch: Watch) -> subprocess.Popen:
    """For as long as somebody holds the run's lock."""
    port = free_port()
    with open(run_dir / "logs" / "tensorboard.log", "ab") as log, open(run_dir / "lock", "rb") as lock:
        tensorboard = subprocess.Popen(
            [sys.executable, "-c", TENSORBOARD, f"--logdir={run_dir}", "--host=127.0.0.1", f"--port={port}"],
            stdin=lock, stdout=log, stderr=log, start_new_session=True)
    watch.say(f"TensorBoard until the run ends: http://127.0.0.1:{port}")
    return tensorboard


def refuse_if_running(run_dir: Path, entry: str) -> None:
    """Raises Refused where a launch of this run is still going on, or ranks of one whose torchrun was killed."""
    if not (run_dir / "lock").exists():
        return
    with lock(run_dir):
        if pids := ranks_of(run_dir, entry):
            raise _running(run_dir, f"ranks without torchrun: {' '.join(map(str, pids))}")


def ranks_of(run_dir: Path, entry: str) -> list[int]:
    """Processes that train this run, by their command lines: torchrun puts each into its own session. Linux only."""
    tail, pids = [b"-m", entry.encode(), os.fsencode(run_dir / "recipe.json")], []
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):        # it ended meanwhile, or it is another user's
            words = (proc / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            if words[-3:] == tail and b"torch.distributed.run" not in words and (proc / "cwd").samefile("."):
                pids.append(int(proc.name))
    return pids


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[int]:
    """The run's lock, as a descriptor; whoever inherits it keeps the lock. Raises Refused where another has it."""
    held = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _running(run_dir, os.pread(held, 1000, 0).decode() or "being started") from error
        yield held
    finally:
        os.close(held)


def _running(run_dir: Path, who: str) -> Refused:
    return Refused(f"{run_dir} is running: {who}.\nWatch it:  tail -f {run_dir}/logs/rank-0.log\n"
                   f"Stop it:   touch {run_dir}/stop   (it saves and ends; then the same command goes on)")


def _notes(wish: Wish, ranks: int, per_node: int) -> Iterator[str]:
    machines, recipe = wish.config.machines, wish.config.recipe
    if machines.kind != LOCAL:
        asked = machines.gpus_per_machine
        if asked is None:
            yield f"{machines.kind} is not in the table of cluster/spec.py: its GPUs and price are unknown."
        elif asked != ranks and recipe.batch.size is None:
            yield (f"{machines.count * ranks} ranks instead of {machines.count * asked}: a smaller batch, "
                   f"and with it another curve.")
    if not per_node and recipe.precision in ("fp16", "tf32"):
        yield f"{recipe.precision} is for GPUs. On a processor take --set recipe.precision=fp32"
    if idle := wish.terms.given("skip_setup", "yes", "detach"):
        yield f"without effect on this machine: {', '.join(idle)}"


def _gpus() -> tuple[str, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(gpu.strip() for gpu in visible.split(",") if gpu.strip() not in ("", "-1"))
    count = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
            count = sum(line.startswith("GPU ") for line in listed.splitlines())
    return tuple(map(str, range(count)))


def free_port(address: str = "127.0.0.1") -> int:
    """Free there, "" for everywhere, and for a minute only for who names it: a connection that was closed there keeps
    the system from giving it to any program that asks for some port, while the one that this is for starts."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as other:
            listener.accept()[0].close()          # this end is the first to close, and so the one that lingers
            other.recv(1)
        return port


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
